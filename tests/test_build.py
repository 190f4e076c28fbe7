"""The parts of the build that decide what is compiled, and its error sentences.

Whole installations are checked by build_tools/check_install_matrix.sh.
"""

import os
import re
import runpy
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import native
import pytest
import toolchain
import torch_headers
from packaging.requirements import Requirement
from setuptools import Distribution
from setuptools.command.egg_info import FileList
from toolchain import BuildError, CudaToolchain

pytestmark = pytest.mark.no_cpu_kernels

NVCC_13_ARCHS = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "11.0", "10.3", "12.0", "12.1"]


def write_program(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def write_nvcc(folder: Path, version: str = "13.0.88", archs: str = "75 80 90 100 120") -> Path:
    listed = " ".join(f"compute_{arch}" for arch in archs.split())
    script = (
        f'case "$1" in --version) echo "Cuda compilation tools, V{version}";; '
        f'--list-gpu-arch) printf "%s\\n" {listed};; esac'
    )
    return write_program(folder / "bin", "nvcc", script)


def write_torch(folder: Path, version: tuple[int, int, int]) -> Path:
    header = folder / "include/torch/headeronly/version.h"
    header.parent.mkdir(parents=True)
    names = ("MAJOR", "MINOR", "PATCH")
    lines = [f"#define TORCH_VERSION_{name} {n}" for name, n in zip(names, version, strict=True)]
    header.write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "GPLWS_TORCH_DIR")
    names += ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "GPLWS_CUDA", "GPLWS_SANITIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)


def test_windows_is_named_before_anything_that_it_does_not_have(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delitem(sys.modules, "native")
    with pytest.raises(BuildError, match="Windows is not supported; build it inside WSL 2"):
        runpy.run_path(str(repository / "setup.py"))


def test_torch_is_found_without_importing_it() -> None:
    torch = torch_headers.find_torch()
    assert torch is not None
    assert torch.version >= torch_headers.MINIMUM
    assert (torch.include / "torch/csrc/stable/library.h").is_file()
    assert torch.lib.is_dir()


def test_a_torch_that_is_too_old_is_not_used_but_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GPLWS_TORCH_DIR", str(write_torch(tmp_path / "torch", (2, 9, 1))))
    assert torch_headers.find_torch() is None
    with pytest.raises(BuildError, match=r"found torch 2\.9\.1 in .*pip install \"torch>=2\.10\""):
        toolchain.require_torch()


def test_a_missing_torch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPLWS_TORCH_DIR", str(tmp_path))
    with pytest.raises(BuildError, match=r"torch 2\.10 or newer is needed to build, found none"):
        toolchain.require_torch()


def test_torch_is_a_build_requirement_only_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import backend

    assert not any("torch" in need for need in backend.get_requires_for_build_wheel())
    monkeypatch.setenv("GPLWS_TORCH_DIR", str(tmp_path))
    assert "torch>=2.10.0a0" in backend.get_requires_for_build_wheel()
    assert "torch>=2.10.0a0" in backend.get_requires_for_build_editable()


def test_a_vendors_build_of_the_oldest_torch_is_not_replaced(repository: Path) -> None:
    listed = re.findall(r'"(torch>=.*?)"', (repository / "pyproject.toml").read_text())
    assert len(listed) == 1
    accepted = Requirement(listed[0]).specifier
    assert "2.10.0a0+nv25.12" in accepted and "2.9.1" not in accepted


def test_a_missing_compiler_is_one_sentence_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError) as caught:
        toolchain.find_cxx()
    message = str(caught.value)
    assert message.startswith("gplws: no C++ compiler was found (looked for g++, c++, clang++")
    for remedy in ("apt-get install g++", "conda install", "xcode-select --install", "CXX"):
        assert remedy in message
    assert "\n" not in message


def test_a_compiler_named_in_cxx_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(BuildError, match="CXX=no-such-compiler -m64 names no program"):
        toolchain.find_cxx()


def test_a_compiler_named_in_cxx_may_have_arguments_and_a_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (path,) = toolchain.find_cxx()
    monkeypatch.setenv("CXX", shlex.join(["env", path, "-O1"]))
    assert toolchain.find_cxx() == ["env", path, "-O1"]


def test_a_compiler_without_cpp20_is_one_sentence_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = 'case "$1" in --version) echo "g++ (old) 8.3";; *) exit 1;; esac'
    monkeypatch.setenv("CXX", str(write_program(tmp_path, "old-g++", script)))
    expected = r"\(g\+\+ \(old\) 8\.3\) cannot compile C\+\+20.*gcc 11, clang 12 or newer can"
    with pytest.raises(BuildError, match=expected):
        toolchain.find_cxx()


def test_a_compiler_that_has_cpp20_but_not_yet_its_number_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = shlex.join(toolchain.find_cxx())
    script = f'sed -i s/__cplusplus/201709L/ "$3" && exec {compiler} "$@"'
    early = write_program(tmp_path, "early-g++", script)
    monkeypatch.setenv("CXX", str(early))
    assert toolchain.find_cxx() == [str(early)]


def test_cuda_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPLWS_CUDA", "0")
    assert toolchain.find_cuda() == "GPLWS_CUDA=0 was set"


def test_an_unknown_cuda_switch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPLWS_CUDA", "maybe")
    with pytest.raises(BuildError, match="GPLWS_CUDA must be 0, 1 or auto, not 'maybe'"):
        toolchain.find_cuda()


def test_without_nvcc_cuda_is_left_out_or_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolchain.find_cuda() == "nvcc was not found"
    monkeypatch.setenv("GPLWS_CUDA", "1")
    with pytest.raises(BuildError, match=r"GPLWS_CUDA=1, but nvcc was not found.*CUDA_HOME"):
        toolchain.find_cuda()


def test_an_nvcc_that_is_too_old_is_left_out_with_its_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_nvcc(tmp_path, version="11.8.89")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolchain.find_cuda() == "nvcc 11.8.89 is too old, 12.0 or newer is needed"


def test_all_architectures_that_nvcc_knows_are_compiled_and_the_newest_as_ptx(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = write_nvcc(tmp_path, version="12.4.99", archs="50 70 75 80 86 89 90")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    cuda = toolchain.find_cuda()
    assert cuda == CudaToolchain(str(nvcc), "12.4.99", ("7.5", "8.0", "8.6", "9.0+PTX"))
    assert cuda.gencode_flags[-2:] == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert len(cuda.gencode_flags) == 5  # 8.9 runs the code for 8.6


def test_the_architecture_list_of_torch_is_honoured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    cuda = toolchain.find_cuda()
    assert isinstance(cuda, CudaToolchain)
    assert cuda.archs == ("8.0", "9.0a", "12.0+PTX")
    assert "-gencode=arch=compute_90a,code=sm_90a" in cuda.gencode_flags


@pytest.mark.parametrize(
    ("wanted", "archs"),
    [
        ("9.0", ("9.0",)),
        ("9.0+PTX", ("9.0+PTX",)),
        ("9.0a", ("9.0a",)),
        ("10.0f", ("10.0f",)),
        (" 8.0, 8.6;8.0 ", ("8.0", "8.6")),
    ],
)
def test_architecture_lists_are_parsed(wanted: str, archs: tuple[str, ...]) -> None:
    assert toolchain.parse_arch_list(wanted, NVCC_13_ARCHS, "13.0.88") == archs


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("Hopper", "holds 'Hopper', expected numbers such as 8.6, 9.0a or 9.0\\+PTX"),
        ("90", "holds '90', expected numbers"),
        ("9.0+ptx", "holds '9.0\\+ptx', expected numbers"),
        ("6.0 7.0+PTX", "=6.0 7.0\\+PTX holds no architecture .* run on, 7.5 or newer"),
        ("13.0", "holds '13.0', which nvcc 13.0.88 does not know; it knows 7.5, 8.0"),
    ],
)
def test_wrong_architecture_lists_are_named(wanted: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        toolchain.parse_arch_list(wanted, NVCC_13_ARCHS, "13.0.88")


def test_architectures_that_are_too_old_are_left_out_and_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    archs = toolchain.parse_arch_list("5.2 6.0 7.0 7.5 8.0 9.0+PTX", NVCC_13_ARCHS, "13.0.88")
    assert archs == ("7.5", "8.0", "9.0+PTX")
    said = capsys.readouterr().out
    assert said.startswith("gplws: 5.2, 6.0, 7.0 of TORCH_CUDA_ARCH_LIST left out: ")


@pytest.mark.parametrize("wanted", ["", ";", " , "])
def test_an_architecture_list_without_entries_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: str
) -> None:
    write_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    cuda = toolchain.find_cuda()
    assert isinstance(cuda, CudaToolchain)
    assert cuda.archs == ("7.5", "8.0", "9.0", "10.0", "12.0+PTX")


def test_every_source_file_belongs_to_exactly_one_library() -> None:
    csrc = native.ROOT / "csrc"
    compiled = native.cpu_sources() + native.cuda_sources()
    assert len(compiled) == len(set(compiled))
    if native.X86:
        assert set(compiled) == {p for p in csrc.rglob("*.c*") if p.suffix in (".cpp", ".cu")}


def test_only_files_of_an_isa_get_its_flags() -> None:
    assert native.ISA_FLAGS["baseline"] == []
    assert not any(flag.startswith("-m") for flag in native._cxx_flags())
    assert "-mavx2" in native.ISA_FLAGS["avx512"]


def test_sanitizers_are_compiled_in_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("sanitize" in flag for flag in native._cxx_flags())
    monkeypatch.setenv("GPLWS_SANITIZE", "undefined, address")
    assert "-fsanitize=address,undefined" in native._cxx_flags()
    assert toolchain.find_cuda() == "GPLWS_SANITIZE was set"
    monkeypatch.setenv("GPLWS_SANITIZE", "memory")
    with pytest.raises(BuildError, match="GPLWS_SANITIZE must hold some of address, undefined"):
        toolchain.sanitizers()


def test_odd_characters_in_paths_and_flags_survive_ninja(tmp_path: Path) -> None:
    ninja = native.NinjaFile()
    odd = tmp_path / "a b$c:d"
    odd.mkdir()
    ninja.rule("copy", "cp $in $out && echo $flags > $out.flags", depfile=False)
    (odd / "in").write_text("content")
    ninja.build(odd / "out", "copy", [odd / "in"], ["-Wl,-rpath,$ORIGIN/x y"])
    (tmp_path / "build.ninja").write_text(ninja.text())
    assert os.spawnl(os.P_WAIT, toolchain.find_ninja(), "ninja", "-C", str(tmp_path)) == 0
    assert (odd / "out").read_text() == "content"
    assert (odd / "out.flags").read_text() == "-Wl,-rpath,$ORIGIN/x y\n"


def cuda_commands(root: Path, torch: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The flags of every compilation and of the link of a CUDA library, one CUDA file and one op.

    The source tree is in ``root``, torch in ``torch``.
    """
    for name in ("csrc/cuda/kernel.cu", "csrc/ops/op_cuda.cpp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    monkeypatch.setattr(native, "ROOT", root)
    ninja = native.NinjaFile()
    headers = torch_headers.TorchHeaders(torch, (2, 10, 0))
    cuda = CudaToolchain("nvcc", "13.0.88", ("9.0",))
    native._add_cuda_library(ninja, root / "_cuda.so", headers, ["g++"], cuda)
    lines = [line for line in ninja.text().splitlines() if line.startswith("  flags = ")]
    return [shlex.split(line.removeprefix("  flags = ")) for line in lines]


def test_nvcc_hands_no_path_to_the_host_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    *compiled, _ = cuda_commands(tmp_path / "with blank", tmp_path / "torch", monkeypatch)
    for flags in compiled:
        handed_on = flags[flags.index("-Xcompiler") + 1]
        assert "-fPIC" in handed_on and "-ffp-contract=fast" in handed_on
        assert " " not in handed_on and "/" not in handed_on
        assert f"-I{tmp_path}/with blank/csrc" in flags


def test_a_comma_in_a_path_that_nvcc_would_divide_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=r"the comma in .*/a,b for the end of a path"):
        cuda_commands(tmp_path / "a,b", tmp_path / "torch", monkeypatch)
    with pytest.raises(BuildError, match=r"the comma in .*/c,d/include for the end of a path"):
        cuda_commands(tmp_path / "tree", tmp_path / "c,d", monkeypatch)


def test_extra_flags_of_nvcc_are_in_its_commands_so_that_ninja_compiles_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = cuda_commands(tmp_path, tmp_path / "torch", monkeypatch)
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", "-Xptxas -v")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-DTHREADS=192 '-DNAME=a b'")
    changed = cuda_commands(tmp_path, tmp_path / "torch", monkeypatch)
    assert len(plain) == 3
    extra = ["-DTHREADS=192", "-DNAME=a b"]
    assert changed == [["-Xptxas", "-v", *flags, *extra] for flags in plain]


def test_nvcc_does_not_get_its_extra_flags_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = 'echo "$NVCC_PREPEND_FLAGS|$NVCC_APPEND_FLAGS" > "$2/said"'  # called with -C FOLDER
    ninja = write_program(tmp_path, "ninja", script)
    monkeypatch.setattr(toolchain, "find_ninja", lambda: str(ninja))
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", "-Xptxas -v")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-DTHREADS=192")
    monkeypatch.setenv("MAX_JOBS", "1")
    native.BuildExt(Distribution())._run_ninja(tmp_path, with_cuda=True)
    assert (tmp_path / "said").read_text() == "|--threads 1\n"


def test_a_build_drops_what_the_tree_has_lost_and_keeps_what_is_compiled(tmp_path: Path) -> None:
    tree, built = tmp_path / "tree", tmp_path / "built/gplws"
    for name in ("__init__.py", "new.py", "presets/new.yaml"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    for name in ("old.py", "presets/old.yaml", "models/old.py", "_cuda.so", "_C.so"):
        (built / name).parent.mkdir(parents=True, exist_ok=True)
        (built / name).touch()
    names = {"packages": ["gplws"], "package_dir": {"gplws": str(tree)}, "script_name": "setup.py"}
    files = {"package_data": {"gplws": ["presets/*.yaml"]}, "include_package_data": False}
    command = native.BuildPy(Distribution(names | files))
    command.build_lib = str(tmp_path / "built")
    command.ensure_finalized()
    command.run()
    found = {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}
    assert found == {"__init__.py", "new.py", "presets/new.yaml", "_cuda.so", "_C.so"}


def test_the_source_distribution_has_all_that_the_tests_and_checks_need(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (repository / ".git").exists():
        pytest.skip("which files belong to the source tree is known to git alone")
    monkeypatch.chdir(repository)
    packed = FileList()
    for line in (repository / "MANIFEST.in").read_text().splitlines():
        packed.process_template_line(line)
    tracked = subprocess.check_output(["git", "ls-files"], text=True).split()
    # setuptools itself adds the package and MANIFEST.in.
    needed = {name for name in tracked if not name.startswith("gplws/") and Path(name).exists()}
    assert needed - set(packed.files) == {".gitignore", "MANIFEST.in"}


def test_unchanged_files_keep_their_time(tmp_path: Path) -> None:
    path = tmp_path / "build.ninja"
    native._write_if_changed(path, "same")
    os.utime(path, (0, 0))
    native._write_if_changed(path, "same")
    assert path.stat().st_mtime == 0
    native._write_if_changed(path, "other")
    assert path.stat().st_mtime > 0
