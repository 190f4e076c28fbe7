"""One command times all networks and shows the paper's table beside them."""

import json

from repository_runs import run, run_main

TABLE = """
import json
from benchmarks.latency import shapes_of, table_7
from benchmarks.summary import fastest, times_gplws
rows = [
    {"network": n, "precision": p, "shape": "10x512x512", "seconds": s}
    for n, p, s in (
        ("gplws", "float32", {"gplws": [1.0, 9.0, 2.0], "eager": [0.5]}),
        ("fvnet", "float32", {"eager": [5.0], "openvino": [4.0]}),
        ("fvnet", "bfloat16", {"eager": [1.0]}),
        ("ddffnet", "float32", {}),
    )
]
measured = fastest(rows, "float32")
table = table_7(measured, times_gplws(rows, "float32"))[1]
print(json.dumps([measured, table, shapes_of("7x8x9")]))
"""


def test_table_7_sets_the_kernels_against_the_fastest_setting_of_each_network(repository) -> None:
    ended = run(repository, "-c", TABLE)
    assert ended.returncode == 0, ended.stderr
    measured, table, shapes = json.loads(ended.stdout)
    assert measured == {"10x512x512": {"gplws": 2.0, "fvnet": 4.0}}
    assert ["10x512x512", "FVNet", "4.000", "(14.330)", "50.00", "(33.71)"] in table
    assert ["10x512x512", "DDFFNet", "", "(23.489)", "", "(59.57)"] in table
    assert shapes == [[7, 8, 9]]


# A small network in the place of the large ones, and no pictures.
SMALL_PEERS = """
import torch
from benchmarks.networks import frames_of


class Sum(torch.nn.Module):
    def __init__(self, name, n_frames):
        super().__init__()
        self.frames = n_frames if frames_of(name) else None

    def forward(self, stack):
        assert self.frames in (None, stack.shape[2])
        return stack.sum((1, 2))


module.random_peer = Sum
module.plots.latency = print
"""


def test_one_command_times_all_networks_and_says_which_are_built_anew(repository, tmp_path) -> None:
    ended, ends = run_main(
        repository,
        "benchmarks.latency",
        f"--paper --shapes 2x16x16 3x16x16 --engines eager --seconds 0.1 --out {tmp_path}",
        before=SMALL_PEERS,
    )
    assert ends == [""]
    assert "ddffnet: made for one number of frames" in ended.stdout
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


def test_rows_of_an_earlier_commit_are_kept_and_single_ones_measured_anew(
    repository, tmp_path
) -> None:
    options = f"--precision float32 --shapes 2x16x16 --engines eager --seconds 0.1 --out {tmp_path}"
    path = tmp_path / "latency.json"
    for networks, which_are_new in (
        ("fvnet dfvnet", [True, True]),
        ("fvnet --again", [True, False]),
        ("dfvnet --resume", [False, False]),
    ):
        call = f"{options} --networks {networks}"
        assert run_main(repository, "benchmarks.latency", call, before=SMALL_PEERS)[1] == [""]
        content = json.loads(path.read_text())
        rows = content["rows"]
        assert [row["network"] for row in rows] == ["fvnet", "dfvnet"]
        assert [row["commit"] != "older" for row in rows] == which_are_new
        content["machine"]["commit"] = "older"
        content["rows"] = [{**row, "commit": "older"} for row in rows]
        path.write_text(json.dumps(content))
