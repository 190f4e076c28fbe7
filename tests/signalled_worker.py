"""A job for worker processes, which get Ctrl-C and SIGTERM while they import it."""

import multiprocessing
import os
import signal

if multiprocessing.current_process().name != "MainProcess":
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)


def same(step: int) -> int:
    """The step itself."""
    return step
