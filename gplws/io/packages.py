"""Packages that only some files need, and that come with an extra."""

from __future__ import annotations

import importlib.util
import sys

_LEAST_PYTHON = dict.fromkeys(("liffile", "sdfio", "x3pio", "zarr"), (3, 11))


def require_package(package: str, what: str, extra: str) -> None:
    """Raise ModuleNotFoundError where ``package`` is missing; it says what to install.

    Args:
        package: name of its module.
        what: needs it: "a .czi file", or the path of one.
        extra: of this package, that installs it.
    """
    least = _LEAST_PYTHON.get(package, (3, 10))
    if sys.version_info < least:
        raise ModuleNotFoundError(
            f"{what} needs the package {package}, and that Python {least[0]}.{least[1]}",
            name=package,
        )
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{what} needs the package {package}: pip install 'gplws[{extra}]'",
            name=package,
        )
