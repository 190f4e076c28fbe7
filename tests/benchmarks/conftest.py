"""Benchmarks are no part of the package: their tests import them from the source tree."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

# Behind all other places, so that an installed gplws stays the one that is tested.
sys.path.append(str(Path(__file__).resolve().parents[2]))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What is as small as here takes longer on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, str], str]:
    """Calls ``main`` of a module with a command line; returns "" or the text of its SystemExit."""

    def call_main(module: ModuleType, arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [module.__name__, *shlex.split(arguments)])
        try:
            module.main()
        except SystemExit as end:
            return str(end.code)
        return ""

    return call_main
