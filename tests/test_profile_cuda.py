"""Reading what the profiler says of CUDA kernels."""

from __future__ import annotations

import pytest
from profile_cuda import kernels_of, short_name, summary_of

pytestmark = pytest.mark.no_cpu_kernels

LISTING = """"Kernel Name","void gplws::cuda::first<3>(int)",
"","Source","# Samples","Instructions Executed","stall_wait","stall_math","stall_wait (Not Issued)"
"1","@P0   BRA 0x10","30","1,000","25","5","24"
"2","      HMMA.16816.F32 R1, R2, R3, R1","60","3,000","0","60","0"
"3","      IMAD.MOV.U32 R1, RZ, RZ, R2","10","4,000","10","0","9"
"Kernel Name","void gplws::cuda::second()",
"Address","Source","# Samples","Instructions Executed","stall_wait"
"1","      EXIT","0","8","0"
"""


def test_instructions_and_stalls_of_each_kernel_are_read() -> None:
    first, second = kernels_of(LISTING.splitlines())
    assert [i.opcode for i in first.instructions] == ["BRA", "HMMA", "IMAD.MOV"]
    assert [i.executed for i in first.instructions] == [1000, 3000, 4000]
    assert first.instructions[0].stalls == {"wait": 25, "math": 5}
    assert len(second.instructions) == 1


def test_the_summary_names_the_shares_and_the_hottest_instruction_first() -> None:
    text = summary_of(next(kernels_of(LISTING.splitlines())))
    assert "## first<3>" in text
    assert "waited for: math 65%, wait 35%" in text
    assert "instructions: IMAD.MOV 50%, HMMA 38%, BRA 12%" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert "HMMA" in rows[1] and "math 100%" in rows[1] and "BRA" in rows[2]


def test_a_kernel_without_samples_has_a_summary() -> None:
    assert "EXIT" in summary_of(list(kernels_of(LISTING.splitlines()))[1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "void gplws::cuda::(anonymous namespace)::up<gplws::cuda::Half, 2>(P, int)",
            "up<Half, 2>",
        ),
        ("void <unnamed>::conv<(Layer)2>(Params, const unsigned int *)", "conv<(Layer)2>"),
    ],
)
def test_names_lose_namespaces_and_arguments(name: str, expected: str) -> None:
    assert short_name(name) == expected
