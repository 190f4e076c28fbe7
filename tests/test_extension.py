"""The compiled parts are loaded, described truthfully, and missed loudly."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import gplws
from gplws import _extension

PACKAGE = Path(_extension.__file__).parent
ISAS = ["baseline", "avx2", "avx512"]
CUDA_OPS = ["group_pointwise_conv3d", "up_conv3d", "focus_search"]
CPU_OPS = [  # CUDA: stock ops
    "conv3d_input_gradient",
    "conv3d_weight_gradient",
    "spline_smooth",
    "symmetric_filter",
    "second_differences",
    "smooth_surface",
    "sample_surface",
    "fit_peak",
    "regularise_surface",
]
OPS = [*CUDA_OPS, *CPU_OPS]


def run_python(
    code: str, folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter whose sys.path begins with ``folder``."""
    variables = {**os.environ, "PYTHONPATH": str(folder), **(environment or {})}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True)


def build_info_under(isa: str) -> dict[str, object]:
    code = "import json; from gplws._extension import build_info; print(json.dumps(build_info()))"
    finished = run_python(code, PACKAGE.parent, {"GPLWS_CPU_ISA": isa})
    assert finished.returncode == 0, finished.stderr
    info: dict[str, object] = json.loads(finished.stdout)
    return info


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """Folder with a copy of the Python files of gplws, without the compiled ones."""
    copy = tmp_path / "site"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.safetensors")
    shutil.copytree(PACKAGE, copy / "gplws", ignore=ignore)
    return copy


@pytest.mark.parametrize("op", OPS)
def test_the_compiled_cpu_kernels_are_registered(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gplws::{op}", "CPU")
    # From the shared library: a fallback in Python would be registered from a .py file.
    dump = torch._C._dispatch_dump(f"gplws::{op}")
    registered = next(line for line in dump.splitlines() if line.startswith("CPU:"))
    assert ".py" not in registered, registered


def test_the_module_comes_from_a_shared_library_beside_the_package() -> None:
    module = sys.modules["gplws._C"]
    assert module.__file__ is not None
    assert Path(module.__file__).suffix == ".so"
    assert Path(module.__file__).parent == PACKAGE


@pytest.mark.cuda
@pytest.mark.parametrize("op", CUDA_OPS)
def test_the_compiled_cuda_kernels_are_registered(op: str) -> None:
    assert gplws.build_info()["cuda"], gplws.build_info()["cuda_status"]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gplws::{op}", "CUDA")


def test_build_info_names_versions_and_compiler(repository: Path) -> None:
    info = gplws.build_info()
    pyproject = (repository / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{info["version"]}"\n' in pyproject
    assert info["torch"] == torch.__version__
    assert info["torch_cuda"] == torch.version.cuda
    assert info["torch_target"] == "2.10"
    assert tuple(map(int, info["torch_headers"].split("."))) >= (2, 10)
    assert info["compiler"].lower().startswith(("gcc", "clang", "apple"))
    assert info["commit"] is None or len(info["commit"].removesuffix("-dirty")) >= 12
    json.dumps(info)


def test_build_info_gives_either_a_loaded_cuda_library_or_the_reason() -> None:
    info = gplws.build_info()
    assert info["cuda"] == (info["cuda_status"] == "loaded")
    if not info["cuda_status"].startswith("not built: "):
        assert info["cuda_archs"]
        assert info["cuda_archs"][-1].endswith("+PTX") or "TORCH_CUDA_ARCH_LIST" in os.environ
        assert info["nvcc"]
        assert info["cuda"] or torch.version.cuda is None
    else:
        assert info["cuda_archs"] == []
        assert info["nvcc"] is None


def test_build_info_gives_the_threads_of_torch() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert gplws.build_info()["threads"] == threads
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def best() -> dict[str, object]:
    """build_info() where nothing is requested."""
    return build_info_under("")


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_caps_the_isa(isa: str, best: dict[str, object]) -> None:
    capped = build_info_under(isa)
    assert best["cpu_isa_requested"] is None
    assert capped["cpu_isa_requested"] == isa
    # What the CPU does not have is not used, and the difference shows.
    expected = min(isa, str(best["cpu_isa"]), key=ISAS.index)
    assert capped["cpu_isa"] == expected
    assert capped["cpu_isa"] in capped["cpu_isas"]  # type: ignore[operator]
    if expected != "avx512":
        assert not capped["avx512_bf16"]


def test_an_unknown_isa_is_an_error_that_names_the_variable_and_its_values() -> None:
    finished = run_python("import gplws", PACKAGE.parent, {"GPLWS_CPU_ISA": "sse9"})
    assert finished.returncode == 1
    last_line = finished.stderr.strip().splitlines()[-1]
    assert last_line == (
        "ValueError: environment variable GPLWS_CPU_ISA: expected one of baseline, avx2, avx512, "
        "got 'sse9'"
    )


def test_a_missing_extension_is_an_import_error_with_a_remedy(package_copy: Path) -> None:
    finished = run_python("import gplws", package_copy)
    assert finished.returncode == 1
    last_line = finished.stderr.strip().splitlines()[-1]
    assert last_line.startswith(
        f"ImportError: the compiled kernels of gplws are missing in {package_copy / 'gplws'}; "
    )
    assert f"{sys.executable} -m pip install --force-reinstall" in last_line


def test_a_broken_extension_is_an_import_error_with_a_remedy(package_copy: Path) -> None:
    name = Path(str(sys.modules["gplws._C"].__file__)).name
    (package_copy / "gplws" / name).write_bytes(b"not a shared library")
    finished = run_python("import gplws", package_copy)
    assert finished.returncode == 1
    assert "ImportError: the compiled kernels of gplws do not load" in finished.stderr
    assert "-m pip install --force-reinstall" in finished.stderr


def test_a_source_tree_without_extension_says_that_it_is_one(package_copy: Path) -> None:
    (package_copy / "setup.py").touch()
    (package_copy / "csrc").mkdir()
    finished = run_python("import gplws", package_copy)
    assert finished.returncode == 1
    last_line = finished.stderr.strip().splitlines()[-1]
    assert f"{package_copy} is the source tree" in last_line
    assert last_line.endswith(f"{sys.executable} -m pip install -e {package_copy}")


def test_an_old_torch_is_an_import_error_with_a_remedy() -> None:
    code = "import torch; torch.__version__ = '2.9.1'; import gplws"
    finished = run_python(code, PACKAGE.parent)
    assert finished.returncode == 1
    last_line = finished.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: gplws needs torch 2.10 or newer, found 2.9.1")
