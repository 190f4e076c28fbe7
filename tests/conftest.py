"""Fixtures and markers that all tests share."""

import os
from pathlib import Path

import pytest
import torch

_REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


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
