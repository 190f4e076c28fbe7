"""setuptools.build_meta, which asks for torch only where none is installed.

Naming torch in ``build-system.requires`` would fetch the newest CUDA torch (several GB) into every
isolated build, even where a torch is installed already.
"""

import toolchain
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403
from torch_headers import MINIMUM, find_torch

_ConfigSettings = dict[str, str | list[str] | None] | None


def _torch_if_missing() -> list[str]:
    if find_torch():
        return []
    # Before pip fetches a torch for minutes, make sure that it is of use.
    toolchain.find_cxx()
    return ["torch>={}.{}.0a0".format(*MINIMUM)]  # as in pyproject.toml


def get_requires_for_build_wheel(config_settings: _ConfigSettings = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_if_missing()


def get_requires_for_build_editable(config_settings: _ConfigSettings = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_if_missing()
