"""Fixtures and markers that all tests share."""

import os
from pathlib import Path

import pytest
import torch

_TESTS = Path(__file__).resolve().parent
_REPOSITORY = _TESTS.parent
# Tests of what runs no kernel, or of scripts whose kernels other tests are about.
_NO_CPU_KERNELS = {"benchmarks", "data", "datasets", "io"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skipped = {}
    if not torch.cuda.is_available():
        skipped["cuda"] = "needs a CUDA device"
    if os.environ.get("GPLWS_CPU_ISA"):
        skipped["no_cpu_kernels"] = "says nothing about an instruction set"
    for item in items:
        if item.path.relative_to(_TESTS).parts[0] in _NO_CPU_KERNELS:
            item.add_marker("no_cpu_kernels")
        for marker, reason in skipped.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    """Random weights and inputs are the same in each run, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the source tree that these tests belong to."""
    return _REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The shared data folder: ``GPLWS_SHARED``, or ``shared`` beside the repository."""
    folder = Path(os.environ.get("GPLWS_SHARED") or _REPOSITORY.parent / "shared")
    if folder.is_dir():
        return folder
    message = f"the shared data folder {folder} is not there; set GPLWS_SHARED to where it is"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
