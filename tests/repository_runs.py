"""Python in a process of its own, in the repository."""

import subprocess
import sys
from pathlib import Path


def run(repository: Path, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` at the root of the repository, with ``given`` as its input."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=repository, input=given, capture_output=True, text=True)
