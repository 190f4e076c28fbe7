// Which instruction set the CPU kernels of this process use.
#pragma once

namespace gplws::cpu {

// Ordered: a larger value includes all smaller ones.
enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best set that the CPU and the operating system support, capped by the environment variable
// GPLWS_CPU_ISA (baseline, avx2 or avx512). Read once, at the first call; gplws/_extension.py
// rejects other values of the variable before this library is loaded.
Isa cpu_isa();

const char* isa_name(Isa isa);

// True only where cpu_isa() is kAvx512 as well, so that the cap covers this extension too.
bool cpu_has_avx512bf16();

}  // namespace gplws::cpu
