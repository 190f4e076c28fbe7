"""One command times all networks and shows the paper's table beside them."""

import json
import logging
from collections.abc import Iterator

import pytest
from networks import small_gplws
from torch import Tensor, nn

from benchmarks import latency
from benchmarks.networks import frames_of
from benchmarks.summary import fastest, times_gplws


def test_table_7_sets_the_kernels_against_the_fastest_setting_of_each_network() -> None:
    rows = [
        {"network": network, "precision": precision, "shape": "10x512x512", "seconds": seconds}
        for network, precision, seconds in (
            ("gplws", "float32", {"gplws": [1.0, 9.0, 2.0], "eager": [0.5]}),
            ("fvnet", "float32", {"eager": [5.0], "openvino": [4.0]}),
            ("fvnet", "bfloat16", {"eager": [1.0]}),
            ("ddffnet", "float32", {}),
        )
    ]
    measured = fastest(rows, "float32")
    assert measured == {"10x512x512": {"gplws": 2.0, "fvnet": 4.0}}
    _, table = latency.table_7(measured, times_gplws(rows, "float32"))
    assert ["10x512x512", "FVNet", "4.000", "(14.330)", "50.00", "(33.71)"] in table
    assert ["10x512x512", "DDFFNet", "", "(23.489)", "", "(59.57)"] in table


def test_a_shape_is_given_by_its_sizes() -> None:
    assert latency.shapes_of("7x8x9") == [(7, 8, 9)]


class Sum(nn.Module):
    """In the place of a published network."""

    def __init__(self, name: str, n_frames: int) -> None:
        super().__init__()
        self.frames = n_frames if frames_of(name) else None

    def forward(self, stack: Tensor) -> Tensor:
        assert self.frames in (None, stack.shape[2])
        return stack.sum((1, 2))


@pytest.fixture
def small_networks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small networks in the place of the large ones, and no pictures."""
    monkeypatch.setattr(latency, "random_gplws", small_gplws)
    monkeypatch.setattr(latency, "random_peer", Sum)
    monkeypatch.setattr(latency.plots, "latency", print)
    yield
    logging.disable(logging.NOTSET)  # the command wants no warnings of exporters


@pytest.mark.usefixtures("small_networks")
def test_one_command_times_all_networks_and_says_which_are_built_anew(
    call, tmp_path, capsys
) -> None:
    options = "--paper --shapes 2x16x16 3x16x16 --engines eager --seconds 0.1"
    assert call(latency, f"{options} --out {tmp_path}") == ""
    assert "ddffnet: made for one number of frames" in capsys.readouterr().out
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    peers = ["fvnet", "dfvnet", "aifdepthnet", "ddffnet", "defocusnet"]
    assert [row["network"] for row in rows[::2]] == ["gplws", *peers]
    assert all(("gplws_beside" in row) == (row["network"] != "gplws") for row in rows)
    assert all(not row["left_out"] and row["precision"] == "float32" for row in rows)
    frames = {
        row["shape"]: row.get("made_for_frames") for row in rows if row["network"] == "ddffnet"
    }
    assert frames == {"2x16x16": 2, "3x16x16": 3}
    assert sum("made_for_frames" in row for row in rows) == 2


@pytest.mark.usefixtures("small_networks")
def test_rows_of_an_earlier_commit_are_kept_and_single_ones_measured_anew(call, tmp_path) -> None:
    options = f"--precision float32 --shapes 2x16x16 --engines eager --seconds 0.1 --out {tmp_path}"
    path = tmp_path / "latency.json"
    for networks, which_are_new in (
        ("fvnet dfvnet", [True, True]),
        ("fvnet --again", [True, False]),
        ("dfvnet --resume", [False, False]),
    ):
        assert call(latency, f"{options} --networks {networks}") == ""
        content = json.loads(path.read_text())
        rows = content["rows"]
        assert [row["network"] for row in rows] == ["fvnet", "dfvnet"]
        assert [row["commit"] != "older" for row in rows] == which_are_new
        content["machine"]["commit"] = "older"
        content["rows"] = [{**row, "commit": "older"} for row in rows]
        path.write_text(json.dumps(content))
