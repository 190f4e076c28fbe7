"""Python in a process of its own, in the repository: benchmarks are no part of the package."""

import json
import subprocess
import sys
from pathlib import Path


def run(repository: Path, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` at the root of the repository, with ``given`` as its input."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=repository, input=given, capture_output=True, text=True)


def run_main(
    repository: Path, module: str, *calls: str, before: str = ""
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Call ``main`` of a module several times in one process.

    Args:
        repository: where.
        module: its name.
        calls: arguments of each call, as in a shell.
        before: code that runs first; the module is ``module`` there.

    Returns:
        The process, and for each call how it ended: "" or the text of its SystemExit.
    """
    script = f"""
import importlib, json, shlex, sys
module = importlib.import_module({module!r})
{before}
ends = []
for call in {list(calls)!r}:
    sys.argv = [{module!r}, *shlex.split(call)]
    try:
        module.main()
        ends.append("")
    except SystemExit as error:
        ends.append(str(error.code))
    for stream in (sys.stdout, sys.stderr):
        print("--- end of call", file=stream)
print(json.dumps(ends))
"""
    ended = run(repository, "-c", script)
    assert ended.returncode == 0, ended.stderr
    return ended, json.loads(ended.stdout.splitlines()[-1])
