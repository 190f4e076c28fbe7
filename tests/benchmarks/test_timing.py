"""Candidates take turns, once their results are known to agree."""

from pathlib import Path

from repository_runs import run

SCRIPT = """
from benchmarks.timing import FEWEST_ROUNDS, take_turns
calls = []
def candidate():
    calls.append("run")
    return 3
times = take_turns({"a": candidate}, seconds=0, check=lambda results: calls.append(results))
assert calls[:2] == ["run", {"a": 3}]
assert len(calls) == 2 + FEWEST_ROUNDS and len(times["a"]) == FEWEST_ROUNDS
"""


def test_results_are_checked_before_anything_is_timed(repository: Path) -> None:
    ended = run(repository, "-c", SCRIPT)
    assert ended.returncode == 0, ended.stderr
