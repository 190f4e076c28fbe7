"""Who may use whom: the table of docs/design.md for Python, the three layers for C++.

Nothing is imported or compiled here; the files are read.
"""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from native import ISA_FLAGS, isa_of

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "gplws"
CPU_FILES = sorted((REPOSITORY / "csrc/cpu").glob("*.*"))
CUDA_FILES = sorted((REPOSITORY / "csrc/cuda").glob("*.*"))
ISA_FILES = [
    path for path in CPU_FILES if path.stem.endswith(tuple("_" + isa for isa in ISA_FLAGS))
]

# Plain C headers: all that a file compiled with the flags of one ISA may include. An inline
# function of an STL header would be compiled with them too, and the linker may pick that copy for
# code that must run everywhere.
C_HEADERS = {"immintrin.h", "math.h", "stddef.h", "stdint.h", "string.h"}
# These few C++ headers declare types only, nothing that is compiled.
TYPE_HEADERS = {"cstddef", "cstdint"}


def unit_of(parts: tuple[str, ...]) -> str:
    """Row of the table that a module belongs to: ``ops`` for ``("ops", "reference")``."""
    return parts[0] if parts else "__init__"


def permitted_imports() -> dict[str, set[str]]:
    """For each unit of the package the units that it may import, as docs/design.md says."""
    text = (REPOSITORY / "docs/design.md").read_text(encoding="utf-8")
    table = text.split("may import from gplws |\n", 1)[1].split("\n\n", 1)[0]
    permitted: dict[str, set[str]] = {}
    for row in table.splitlines()[1:]:
        path, _, rule = (cell.strip() for cell in row.strip("|").split("|"))
        unit = path.strip("`/").removesuffix(".py")
        named = set(re.findall(r"`(\w+)`", rule))
        words = re.sub(r"`\w+`|,", "", rule).split()
        if words in (["all", "of", "the", "above"], ["and", "below"]):
            named |= set(permitted)
        else:
            assert words in ([], ["nothing"]), f"docs/design.md: rule not understood: {rule!r}"
        assert named <= set(permitted), f"docs/design.md: {unit} names a unit that comes later"
        permitted[unit] = named
    permitted["__init__"] = set(permitted) - {"cli"}
    permitted["cli"].add("__init__")  # the command line is a user of the public interface
    permitted["__main__"] = {"cli"}
    return permitted


def imported_units(path: Path) -> Iterator[tuple[int, str]]:
    """Line and unit of each import of gplws in a module, those inside functions included."""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join(base)]
            if base == ["gplws"]:
                names = [
                    f"gplws.{alias.name}" if is_unit(alias.name) else "gplws"
                    for alias in node.names
                ]
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] == "gplws":
                yield node.lineno, unit_of(parts[1:])


def is_unit(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def includes(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    yield from re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


def all_includes(path: Path) -> set[str]:
    """Headers that a file includes, itself or through headers of its own folder."""
    found: set[str] = set()
    for name in includes(path):
        local = path.parent / name
        found |= all_includes(local) if local.is_file() else {name}
    return found


def test_modules_import_only_what_the_table_in_the_design_document_permits() -> None:
    permitted = permitted_imports()
    modules = sorted(PACKAGE.rglob("*.py"))
    assert modules
    wrong = []
    for path in modules:
        relative = path.relative_to(PACKAGE)
        unit = unit_of(relative.with_suffix("").parts)
        assert unit in permitted, f"docs/design.md has no row for gplws/{relative}"
        wrong += [
            f"gplws/{relative}:{line} imports {imported}"
            for line, imported in imported_units(path)
            if imported != unit and imported not in permitted[unit]
        ]
    assert not wrong, "\n".join(wrong)


def test_the_table_in_the_design_document_is_understood() -> None:
    permitted = permitted_imports()
    assert permitted["_extension"] == set()
    assert permitted["ops"] == {"_extension"}
    assert permitted["reconstruct"] >= {"models", "classical", "io", "data"}
    assert "cli" not in permitted["reconstruct"]
    assert "reconstruct" in permitted["cli"]


@pytest.mark.parametrize("path", CPU_FILES + CUDA_FILES, ids=lambda path: path.name)
def test_kernels_include_neither_torch_nor_other_layers(path: Path) -> None:
    for name in includes(path):
        foreign = re.match(r"(torch|ATen|c10|pybind11|Python\.h)\b", name)
        assert not foreign, f"{path.name} includes {name}"
        if (REPOSITORY / "csrc" / name).is_file() or (path.parent / name).is_file():
            local = next(p for p in (path.parent / name, REPOSITORY / "csrc" / name) if p.is_file())
            assert local.resolve().parent == path.parent, f"{path.name} includes {name}"
        if path in CPU_FILES:
            assert not name.startswith("cuda"), f"{path.name} includes {name}"


def test_the_python_module_includes_no_torch_header() -> None:
    assert not [n for n in includes(REPOSITORY / "csrc/ops/bind.cpp") if n.startswith("torch")]


@pytest.mark.parametrize("path", ISA_FILES, ids=lambda path: path.name)
def test_files_compiled_for_one_isa_include_only_c_headers(path: Path) -> None:
    assert all_includes(path) <= C_HEADERS | TYPE_HEADERS


@pytest.mark.parametrize("path", ISA_FILES, ids=lambda path: path.name)
def test_objects_compiled_for_one_isa_define_no_symbol_that_another_could_pick(path: Path) -> None:
    objects = list((REPOSITORY / "build").glob(f"native-*/csrc_cpu_{path.name}.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("no objects of an earlier build here, or no nm to read them")
    for compiled in objects:
        shown = subprocess.run(["nm", "-C", compiled], capture_output=True, text=True, check=True)
        # W, V: weak; u: unique over the process.
        shared = re.findall(r"^\S+ [WVu] .*$", shown.stdout, re.MULTILINE)
        assert not shared, f"{compiled.name} defines {shared}"


def test_the_isa_of_a_file_is_the_suffix_of_its_name() -> None:
    assert isa_of(Path("focus_search_avx512.cpp")) == "avx512"
    assert isa_of(Path("focus_search_avx512bf16.cpp")) == "avx512bf16"
    assert isa_of(Path("focus_search_baseline.cpp")) == "baseline"
    assert isa_of(Path("focus_search.cpp")) == "baseline"
