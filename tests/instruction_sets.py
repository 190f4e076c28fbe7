"""Code under each instruction set, of which a process has one."""

from __future__ import annotations

import os
import subprocess
import sys

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def printed_under_each(code: str) -> list[str]:
    """What code prints under each instruction set, or the best one below that the CPU has."""
    printed = []
    for isa in INSTRUCTION_SETS:
        environment = {**os.environ, "GPLWS_CPU_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    return printed
