"""The examples of docstrings give what they say."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from stacks import textured_stack
from torch import nn

import gplws


def examples(name: str) -> list[doctest.DocTest]:
    module = importlib.import_module(name)
    names = {**vars(module), "gplws": gplws, "np": np, "torch": torch, "nn": nn}
    return [found for found in doctest.DocTestFinder().find(module, globs=names) if found.examples]


EXAMPLES = {
    name: found
    for _, name, _ in pkgutil.walk_packages(gplws.__path__, "gplws.")
    if not name.endswith(("._C", "._cuda")) and (found := examples(name))
}


@pytest.fixture(scope="session")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The frames of the example of ``gplws.reconstruct``."""
    folder = tmp_path_factory.mktemp("frames")
    for number, frame in enumerate(textured_stack(2.0, n_frames=5).numpy()):
        cv2.imwrite(str(folder / f"{number}.png"), (255 * frame).astype(np.uint8))
    return folder


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_run_as_written(
    name: str, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stack_folder").symlink_to(frames)
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for example in EXAMPLES[name]:
        runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)


def test_there_are_examples() -> None:
    assert sum(len(found) for found in EXAMPLES.values()) > 20
