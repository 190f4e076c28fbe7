"""Loads the compiled parts of gplws once, and says what they are.

``gplws/_C`` registers ``torch.ops.gplws.*`` and the CPU kernels when it is imported; without it
nothing works, so its absence is an ``ImportError``. ``gplws/_cuda.so`` adds the CUDA kernels and is
loaded where torch itself was built with CUDA. Without it, CUDA tensors raise torch's own error
("Could not run 'gplws::...' with arguments from the 'CUDA' backend"), and ``build_info()`` says why
it is not there.
"""

import importlib
import importlib.metadata
import json
import logging
import os
import shlex
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

_ISAS = ("baseline", "avx2", "avx512")
_PACKAGE = Path(__file__).resolve().parent
_logger = logging.getLogger(__name__)


def _requested_isa() -> str | None:
    requested = os.environ.get("GPLWS_CPU_ISA") or None
    if requested is not None and requested not in _ISAS:
        raise ValueError(
            f"environment variable GPLWS_CPU_ISA: expected one of {', '.join(_ISAS)}, "
            f"got {requested!r}"
        )
    return requested


def _installed_from() -> str:
    """What pip installed gplws from: a local folder or archive where that is known."""
    try:
        record = importlib.metadata.distribution("gplws").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        record = None
    url = urlsplit(json.loads(record)["url"]) if record else None
    return url2pathname(url.path) if url and url.scheme == "file" else "gplws"


def _remedy() -> str:
    pip = [sys.executable, "-m", "pip", "install"]
    source = _PACKAGE.parent
    if (source / "setup.py").is_file() and (source / "csrc").is_dir():
        return (
            f"{source} is the source tree, which hides an installed gplws while Python runs inside "
            f"it; compile it in place with: {shlex.join([*pip, '-e', str(source)])}"
        )
    command = [*pip, "--force-reinstall", "--no-deps", "--no-cache-dir", _installed_from()]
    return f"install it again with: {shlex.join(command)}"


def _load_module() -> ModuleType:
    # Not compared as versions: a vendor's 2.10.0a0 has what is needed.
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise ImportError(
            f"gplws needs torch 2.10 or newer, found {torch.__version__}; install it with: "
            f"{sys.executable} -m pip install 'torch>=2.10'"
        )
    # Looked for beside this file only: the import hook of an editable installation elsewhere would
    # otherwise lend its own.
    if PathFinder.find_spec("gplws._C", [str(_PACKAGE)]) is None:
        raise ImportError(f"the compiled kernels of gplws are missing in {_PACKAGE}; {_remedy()}")
    try:
        return importlib.import_module("gplws._C")
    except ImportError as error:
        raise ImportError(
            f"the compiled kernels of gplws do not load ({error}); {_remedy()}"
        ) from error


def _load_cuda() -> str:
    """Loads the CUDA kernels; returns why they are not there, or an empty string."""
    library = _PACKAGE / "_cuda.so"
    if _facts["cuda_absent"]:
        return f"not built: {_facts['cuda_absent']}"
    if torch.version.cuda is None:
        return f"built, not loaded: torch {torch.__version__} was built without CUDA"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        problem = f"built, but they do not load ({error}); {_remedy()}"
        _logger.warning("CUDA kernels of gplws: %s", problem)
        return problem
    return ""


_isa_requested = _requested_isa()
_facts: dict[str, Any] = _load_module().build_facts()
_cuda_problem = _load_cuda()

__version__: str = _facts["version"]


def build_info() -> dict[str, Any]:
    """What was compiled, with what, and what this process uses of it.

    Returns:
        A dictionary with

        - ``version``; ``commit`` of the source (ends in ``-dirty`` where files differed from it;
          None where gplws was not built from a git checkout); ``compiler``;
        - ``torch`` (running), ``torch_cuda`` (CUDA version of that torch, or None),
          ``torch_headers`` (compiled against), ``torch_target`` (oldest that the binary runs on);
        - ``cpu_isa`` (in use), ``cpu_isa_requested`` (the environment variable ``GPLWS_CPU_ISA``,
          or None; a CPU that lacks it uses the best that it has), ``cpu_isas`` (compiled),
          ``avx512_bf16`` (in use);
        - ``threads``: of torch's CPU ops, and so of the kernels, at the time of the call;
        - ``cuda`` (whether the CUDA kernels are loaded), ``cuda_status`` ("loaded", or why not),
          ``cuda_archs`` (compiled; ``+PTX`` marks code that later GPUs can translate), ``nvcc``
          (version, or None).

    Example:
        >>> import gplws
        >>> gplws.build_info()["cpu_isa"] in ("baseline", "avx2", "avx512")
        True
    """
    return {
        "version": __version__,
        "commit": _facts["commit"] or None,
        "compiler": _facts["compiler"],
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "torch_headers": _facts["torch_headers"],
        "torch_target": _facts["torch_target"],
        "cpu_isa": _facts["cpu_isa"],
        "cpu_isa_requested": _isa_requested,
        "cpu_isas": _facts["cpu_isas"].split(),
        "avx512_bf16": _facts["avx512_bf16"],
        "threads": torch.get_num_threads(),
        "cuda": not _cuda_problem,
        "cuda_status": _cuda_problem or "loaded",
        "cuda_archs": _facts["cuda_archs"].split(),
        "nvcc": _facts["nvcc"] or None,
    }
