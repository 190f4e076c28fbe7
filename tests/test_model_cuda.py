"""The model of a multiprocessor: what it reads of machine code, and what it says of plain cases."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import model_cuda
import pytest
from model_cuda import Instruction, Kind

pytestmark = pytest.mark.no_cpu_kernels

LISTING = """
.text._ZN5gplws38group_pointwise_conv3d_resident_kernelINS_8Bfloat16ELNS_13ResidentLayerE2EEEvv:
        /*0000*/                   LDS.64 R2, [R0] ;          /* 0x0000000000027984 */
                                                              /* 0x000e280000000a00 */
.L_x_1:
        /*0010*/              @P0  BRA `(.L_x_2) ;            /* 0x0000000000047947 */
                                                              /* 0x000fea0003800000 */
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;  /* 0x000000020804723c */
                                                              /* 0x001fec0000041804 */
.L_x_2:
        /*0030*/              @P1  BRA `(.L_x_1) ;            /* 0xfffffffc00f47947 */
                                                              /* 0x000fea000383ffff */
.text._ZN5gplws20pack_resident_kernelINS_8Bfloat16ELNS_13ResidentLayerE2EEEvv:
        /*0000*/                   EXIT ;                     /* 0x000000000000794d */
                                                              /* 0x000fea0003800000 */
"""
LAYER = model_cuda.Layer(8, 2, 8, 32, 1, 24, 512, 1, 1)


@pytest.fixture(scope="module")
def model(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("model") / "model"
    source = repository / "build_tools/model_cuda.cpp"
    subprocess.run([compiler, "-O1", "-std=c++20", "-Wall", source, "-o", program], check=True)
    return program


def numbers_of(kind: Kind, stall: int = 1, cost: int = 0, **more: int) -> tuple[int, ...]:
    given = {"write": 7, "read": 7, "awaited": 0, "bytes": 0} | more
    return (kind, stall, given["write"], given["read"], given["awaited"], cost, given["bytes"])


def cycles_of(model: Path, trace: list[tuple[int, ...]], warps: int, blocks: int = 1) -> float:
    lines = [f"{blocks} {warps} 8 1", str(len(trace))]
    lines += [" ".join(map(str, map(int, numbers))) for numbers in trace]
    lines += ["0"] * warps
    return float(model_cuda.run(model, text="\n".join(lines)).split()[0])


def test_machine_code_is_read_with_its_stalls_and_scoreboards() -> None:
    code = model_cuda.kernels_of(LISTING)
    assert list(code) == [2]
    load, skip, product, back = code[2]
    assert [i.kind for i in code[2]] == [
        Kind.SHARED,
        Kind.ARITHMETIC,
        Kind.PRODUCT,
        Kind.ARITHMETIC,
    ]
    assert (skip.target, back.target, skip.predicated) == (3, 1, True)
    trace = model_cuda.operations_of([load, product], LAYER)
    assert trace[0] == (Kind.SHARED, 4, 0, 7, 0, 2, 0)  # writes scoreboard 0, two turns
    assert trace[1] == (Kind.PRODUCT, 6, 7, 7, 1, 16, 0)  # waits for it
    assert model_cuda.loop_of(code[2]) == (1, 3)


def test_a_warp_does_what_surrounds_the_conv_before_or_behind_it() -> None:
    def branch(target: int, predicated: bool = True) -> Instruction:
        return Instruction("BRA", predicated, "", 0, target)

    rest = [
        Instruction("LDGSTS.E.128", False, "[R1], [R2]", 0),
        Instruction("LDGDEPBAR", False, "", 0),
    ]
    conv = [Instruction("HMMA.16816.F32.BF16", False, "", 0)] * 36
    code = [Instruction("BAR.SYNC", False, "0x0", 0), branch(4), *rest, *conv, branch(43), *rest]
    code.append(branch(0))
    early, late = (list(model_cuda.path_of(code, first)) for first in (False, True))
    assert [i.name for i in early[1:5]] == ["BRA", "LDGSTS", "LDGDEPBAR", "HMMA"]
    assert [i.name for i in late[1:4]] == ["BRA", "HMMA", "HMMA"]
    assert [i.name for i in late[-4:]] == ["BRA", "LDGSTS", "LDGDEPBAR", "BRA"]
    assert len(early) == len(late) == len(code) - 2
    copied = [numbers[-1] for numbers in model_cuda.operations_of(early, LAYER) if numbers[-1]]
    assert copied == [3 * 8 * 32 * 24 // 8]  # bytes of a warp, as if a turn had three frames


def test_code_without_products_has_no_loop() -> None:
    with pytest.raises(ValueError, match="no loop"):
        model_cuda.loop_of([Instruction("EXIT", False, "", 0)])


@pytest.mark.parametrize(
    ("trace", "warps", "blocks", "expected"),
    [
        # A warp alone is held by the stalls of its own code.
        ([numbers_of(Kind.ARITHMETIC, stall=5)] * 20, 1, 1, 100),
        # Four warps of a scheduler hide each other's: one instruction a cycle.
        ([numbers_of(Kind.ARITHMETIC, stall=4)] * 20, 16, 1, 80),
        # Tensor cores take a product of a scheduler every six cycles, half ones every four.
        ([numbers_of(Kind.PRODUCT, cost=16)] * 20, 16, 1, 480),
        ([numbers_of(Kind.PRODUCT, cost=8)] * 20, 8, 2, 320),
        # All warps share one pipe to shared memory.
        ([numbers_of(Kind.SHARED, cost=4)] * 10, 16, 1, 640),
        # 2944 bytes of each of four warps from DRAM, at 18.4 bytes a cycle.
        (
            [
                numbers_of(Kind.COPY, cost=4, bytes=2944),
                numbers_of(Kind.COMMIT),
                numbers_of(Kind.WAIT, cost=2),
            ],
            4,
            1,
            640,
        ),
    ],
)
def test_plain_cases_take_as_long_as_their_limit_says(
    model: Path, trace: list[tuple[int, ...]], warps: int, blocks: int, expected: int
) -> None:
    found = cycles_of(model, trace, warps, blocks)
    assert expected * 0.98 <= found <= expected * 1.06 + 4


def test_a_result_is_waited_for_and_a_barrier_holds_all_warps(model: Path) -> None:
    load = numbers_of(Kind.SHARED, cost=1, write=0)
    use = numbers_of(Kind.ARITHMETIC, awaited=1)
    assert 28 <= cycles_of(model, [load, use], 1) <= 34
    work = [numbers_of(Kind.ARITHMETIC, stall=8)] * 10
    alone = cycles_of(model, work, 8)
    assert alone + 20 <= cycles_of(model, [*work, numbers_of(Kind.BARRIER)], 8) <= alone + 24


def test_frames_of_the_busiest_multiprocessor_are_counted_as_the_plan_shares_them_out() -> None:
    assert LAYER.steps == 40  # 1024 tiles, 264 places
    few = model_cuda.Layer(12, 1, 4, 16, 1, 192, 64, 1, 1)
    assert few.steps == 6  # 64 tiles: two segments of five frames, one more to read


def test_what_cannot_be_done_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs no-such-program"):
        model_cuda.run("no-such-program")
    with pytest.raises(argparse.ArgumentTypeError, match="'k12=4,2' is not"):
        model_cuda._sizes("k12=4,2")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(model_cuda.sys, "path", [str(tmp_path)])
    with pytest.raises(SystemExit, match="nvidia-cuda-nvdisasm"):
        model_cuda.find_disassembler()


def test_the_kernels_of_this_tree_can_be_predicted(repository: Path) -> None:
    try:
        model_cuda.find_disassembler()
    except SystemExit as reason:
        pytest.skip(str(reason))
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    layer, said = model_cuda.predict_all(repository, {}, ["k24"])["k24"]
    assert layer.warps == 8 and layer.blocks == 2
    assert 500 < said.cycles < 5000
    assert 0.1 < said.busy["tensor"] <= 1 and sum(said.waits.values()) == pytest.approx(1, abs=0.01)
