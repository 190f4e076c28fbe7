"""The script for machines with a GPU: its steps, its verdicts and its limits, with stand-ins."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from repository_runs import run

pytestmark = pytest.mark.no_cpu_kernels

# Stands in for Python, the profiler and nvidia-smi: says what it was called for, fails where told.
STAND_IN = """#!/usr/bin/env bash
echo "CALL ${0##*/} $*"
[[ "$*" == *"import xdist"* ]] && exit 1
[[ -n "${FAILS:-}" && "$*" == *"$FAILS"* ]] && exit 7
[[ -n "${HANGS:-}" && "$*" == *"$HANGS"* ]] && sleep 60
echo "end of ${0##*/}"
"""


def check_cuda(
    repository: Path, tmp_path: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], str, str]:
    """Ends, summary.txt and logs.txt of a call in which every tool is a stand-in."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("python3", "compute-sanitizer", "nvidia-smi", "nvcc"):
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    out = tmp_path / "out"
    ended = subprocess.run(
        ["bash", str(repository / "build_tools/check_cuda.sh"), str(out), *arguments],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "python3"}
        | environment,
        capture_output=True,
        text=True,
    )
    files = (out / "summary.txt", out / "logs.txt")
    return ended, *(file.read_text() if file.exists() else "" for file in files)


def test_without_names_all_steps_run_but_the_training(repository, tmp_path) -> None:
    ended, summary, logs = check_cuda(repository, tmp_path)
    assert ended.returncode == 0, ended.stderr
    verdicts = [line.split()[:2] for line in summary.splitlines()[:-2]]
    names = "machine install tests memcheck racecheck rest bench".split()
    assert verdicts == [[name, "passed"] for name in names]
    assert logs.count("--tool memcheck") == 4 and logs.count("--tool racecheck") == 2
    assert "half and torch.bfloat16" in logs and "-m benchmarks.gpu --out" in logs
    assert "train_on_gpu" not in logs


def test_tests_in_which_errors_are_thrown_have_a_process_of_their_own(repository, tmp_path) -> None:
    ended, summary, logs = check_cuda(repository, tmp_path, "tests", FAILS="-k not (")
    selections = re.findall(r"-m pytest .*-m cuda -k (.*)", logs)
    assert len(selections) == 2 and selections[0] == f"not ({selections[1]})"
    assert ended.returncode == 1 and summary.startswith("tests      FAILED (7)")


def test_what_is_missing_is_listed_by_a_python_310_as_well(repository, tmp_path) -> None:
    python = tmp_path / "python3.10"
    hidden = "import sys; sys.modules['tomllib'] = None; exec(sys.stdin.read())"
    python.write_text(f'#!/bin/sh\n[ "$1" = - ] && exec {sys.executable} -c "{hidden}"\n')
    python.chmod(0o755)
    _, _, logs = check_cuda(repository, tmp_path, "machine", PYTHON=str(python))
    assert "dependencies that are missing: " in logs


def test_a_selection_that_fails_under_the_sanitizer_is_not_hidden_by_the_others(
    repository, tmp_path
) -> None:
    fails = "half and not current_stream and torch.bfloat16"
    ended, summary, _ = check_cuda(repository, tmp_path, "memcheck", FAILS=fails)
    assert ended.returncode == 1
    assert summary.startswith("memcheck   FAILED (7)")
    assert "1 of 4 selections failed" in summary


# Collects tests/test_cuda.py for each selection, in one process; prints what each of them selects.
COLLECT = """
import contextlib, io, json, sys
import pytest

found = {}
for selection in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = pytest.main(["--collect-only", "-q", "tests/test_cuda.py", "-k", selection])
    assert code == 0, said.getvalue()
    found[selection] = [line for line in said.getvalue().splitlines() if "::" in line]
print(json.dumps(found))
"""


def test_what_runs_under_the_sanitizer_is_there_and_leaves_no_kernel_out(
    repository, tmp_path
) -> None:
    _, _, logs = check_cuda(repository, tmp_path, "memcheck", "racecheck")
    memcheck, racecheck = (
        re.findall(r"test_cuda\.py -k (.*)", said) for said in logs.split("==== racecheck")
    )
    ended = run(repository, "-c", COLLECT, given=json.dumps([*memcheck, *racecheck]))
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    for selections, ops in (
        (memcheck, {"conv_agrees": 2, "way_up": 2, "search": 3}),
        (racecheck, {"conv_agrees": 2, "way_up": 2}),
    ):
        selected = [found[selection] for selection in selections]
        assert not any(
            "current_stream" in n or "elements" in n for names in selected for n in names
        )
        for op, least in ops.items():
            assert sum(any(op in name for name in names) for names in selected) >= least


def test_steps_are_chosen_by_name_and_given_their_options(repository, tmp_path) -> None:
    ended, summary, logs = check_cuda(
        repository,
        tmp_path,
        "bench",
        "train",
        BENCH_OPTIONS="--parts ops --quick",
        TRAIN_OPTIONS="--total 24",
        CHECK_SECONDS="165",
    )
    assert ended.returncode == 0
    assert [line.split()[0] for line in summary.splitlines()[:2]] == ["bench", "train"]
    # What is left of the 165 s when the step begins, less the 6 or 45 s that it needs at its end.
    bench = re.search(r"-m benchmarks\.gpu .*--minutes (\S+) --parts ops --quick", logs)
    train = re.search(r"-m build_tools\.train_on_gpu .*--minutes (\S+) --total 24", logs)
    assert bench and 1 < float(bench[1]) <= 2.65
    assert train and 0.5 < float(train[1]) <= 2


def test_a_step_that_fails_or_hangs_does_not_stop_the_ones_after_it(repository, tmp_path) -> None:
    ended, summary, _ = check_cuda(
        repository,
        tmp_path,
        *("tests", "memcheck", "bench"),
        FAILS="-m cuda",
        HANGS="memcheck",
        CHECK_SECONDS="7",
    )
    assert ended.returncode == 1
    tests, memcheck, bench = summary.splitlines()[:3]
    assert tests.startswith("tests      FAILED (7)")
    assert memcheck.startswith("memcheck   OUT OF TIME")
    assert bench == "bench      NO TIME LEFT"


@pytest.mark.parametrize("arguments", [(), ("FOLDER", "fly")])
def test_wrong_use_shows_the_steps(repository, tmp_path, arguments) -> None:
    command = ["bash", str(repository / "build_tools/check_cuda.sh"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert "racecheck   the same: races" in ended.stderr
    assert ("no such step: fly" in ended.stderr) == bool(arguments)
    assert not list(tmp_path.iterdir())
