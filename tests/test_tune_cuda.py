"""Other sizes of blocks: into the header, and the choice among them."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import model_cuda
import pytest
import tune_cuda

pytestmark = pytest.mark.no_cpu_kernels


def test_sizes_are_changed_for_the_named_layers_and_no_others(repository: Path) -> None:
    header = (repository / tune_cuda.HEADER).read_text()
    changed = tune_cuda.with_sizes(header, {"k12": (4, 7, 8, 9), "kDown48": (2, 5, 6, 3)})
    returns = [re.findall(r"return \{(.*)\};", text) for text in (header, changed)]
    differing = [(a, b) for a, b in zip(*returns, strict=True) if a != b]
    assert [b.split(", ")[7:11] for _, b in differing] == [list("4789"), list("2563")]
    assert all(a.split(", ")[:7] == b.split(", ")[:7] for a, b in differing)
    assert tune_cuda.with_sizes(header, {}) == header


def test_every_candidate_fits_the_header(repository: Path) -> None:
    header = (repository / tune_cuda.HEADER).read_text()
    first, *others = tune_cuda.variants()
    assert first == {} and all(others)
    for sizes in others:
        written = tune_cuda.with_sizes(header, sizes)
        for numbers in sizes.values():
            assert f" {', '.join(map(str, numbers))}," in written
    assert set(tune_cuda.CANDIDATES) <= set(tune_cuda.LAYERS)


@pytest.mark.parametrize("sizes", tune_cuda.variants(), ids=lambda sizes: str(len(sizes)))
def test_every_candidate_meets_what_the_header_demands(
    repository: Path, tmp_path: Path, sizes: dict[str, tune_cuda.Sizes]
) -> None:
    shutil.copytree(repository / "csrc/cuda", tmp_path / "csrc/cuda")
    header = tmp_path / tune_cuda.HEADER
    header.write_text(tune_cuda.with_sizes(header.read_text(), sizes))
    layers = model_cuda.layers_of(tmp_path, tmp_path)  # compiles its static assertions
    assert all(layers[name].blocks == numbers[3] for name, numbers in sizes.items())


def test_a_layer_that_is_not_there_is_named(repository: Path) -> None:
    with pytest.raises(ValueError, match="k7"):
        tune_cuda.with_sizes((repository / tune_cuda.HEADER).read_text(), {"k7": (1, 1, 1, 1)})


def test_only_what_is_clearly_faster_is_chosen() -> None:
    first = dict.fromkeys(tune_cuda.CANDIDATES, 100.0)
    times = [first, *({} for _ in tune_cuda.variants()[1:])]
    times[3] = {"k12": 90.0, "k24": 99.5}
    assert tune_cuda.fastest(times) == {"k12": tune_cuda.CANDIDATES["k12"][2]}


def test_the_copy_of_the_package_is_measured_by_a_python_310_as_well(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gplws").mkdir()
    (tmp_path / "gplws/__init__.py").touch()
    script = "import gplws, benchmarks, json; print(json.dumps([gplws.__file__]))"
    python = tmp_path / "python3.10"
    lines = ["#!/bin/sh", "unset PYTHONSAFEPATH", shlex.join([sys.executable, "-c", script]), ""]
    python.write_text("\n".join(lines))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert tune_cuda._measured(tmp_path, {}, 0.1) == [str(tmp_path / "gplws/__init__.py")]
