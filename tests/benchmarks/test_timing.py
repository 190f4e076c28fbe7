"""Candidates take turns, once their results are known to agree."""

import subprocess
from pathlib import Path

import pytest
from repository_runs import run

from gplws.benchmark import FEWEST_ROUNDS, take_turns


def test_results_are_checked_before_anything_is_timed() -> None:
    calls: list[object] = []

    def candidate() -> int:
        calls.append("run")
        return 3

    times = take_turns(
        {"a": candidate},
        seconds=0,
        check=calls.append,
        between=lambda: calls.append("between"),
    )
    assert calls[:2] == ["run", {"a": 3}]
    assert calls[2:] == ["between", "run"] * FEWEST_ROUNDS and len(times["a"]) == FEWEST_ROUNDS


def test_the_commit_of_a_run_is_that_of_the_python_that_ran(repository: Path) -> None:
    if not (repository / ".git").exists():
        pytest.skip("not a work tree of git")
    script = "from benchmarks.timing import machine; print(machine()['commit'])"
    ended = run(repository, "-c", script)
    assert ended.returncode == 0, ended.stderr
    head = subprocess.check_output(["git", "-C", str(repository), "rev-parse", "HEAD"], text=True)
    said = ended.stdout.strip().removesuffix("-dirty")
    assert len(said) >= 12 and head.startswith(said)
