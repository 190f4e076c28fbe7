"""Finds torch's C++ headers without importing torch, also from inside pip's build isolation.

pip runs an isolated build with the interpreter of the target environment, so ``sysconfig`` still
names that environment's site-packages, although ``import`` does not see them.
"""

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MINIMUM = (2, 10)
"""Oldest torch that gplws runs on; its stable ABI is the target of the build."""


@dataclass(frozen=True)
class TorchHeaders:
    """A torch package that can be compiled against."""

    root: Path
    version: tuple[int, int, int]

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


def find_torch() -> TorchHeaders | None:
    """The first torch of at least version ``MINIMUM``, or None."""
    return next((torch for torch in installed_torches() if torch.version >= MINIMUM), None)


def installed_torches() -> Iterator[TorchHeaders]:
    """Every torch package with headers that this interpreter could use, best first."""
    for root in _candidates():
        version = _read_version(root / "include/torch/headeronly/version.h")
        # Before 2.9 there were no header-only headers; the old place still tells the version.
        version = version or _read_version(root / "include/torch/csrc/api/include/torch/version.h")
        if version:
            yield TorchHeaders(root, version)


def _candidates() -> Iterator[Path]:
    if os.environ.get("GPLWS_TORCH_DIR"):
        yield Path(os.environ["GPLWS_TORCH_DIR"])
        return
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        spec = None
    if spec and spec.submodule_search_locations:
        yield Path(next(iter(spec.submodule_search_locations)))
    for folder in _site_packages():
        yield Path(folder) / "torch"


def _site_packages() -> Iterator[str]:
    for name in ("platlib", "purelib"):
        yield sysconfig.get_path(name)
    if site.ENABLE_USER_SITE is not False:
        yield site.getusersitepackages()
    config = Path(sys.prefix) / "pyvenv.cfg"
    settings = config.read_text() if config.is_file() else ""
    if re.search(r"(?mi)^include-system-site-packages\s*=\s*true", settings):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        for name in ("platlib", "purelib"):
            yield sysconfig.get_path(name, vars=base)


def _read_version(header: Path) -> tuple[int, int, int] | None:
    if not header.is_file():
        return None
    found = dict(re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR|PATCH) (\d+)", header.read_text()))
    if len(found) != 3:
        return None
    return int(found["MAJOR"]), int(found["MINOR"]), int(found["PATCH"])
