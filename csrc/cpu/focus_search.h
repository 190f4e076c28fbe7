// Per-group argmax focus search on the CPU, float32: what the op and the kernels agree on.
#pragma once
#include <cstdint>

namespace gplws::cpu {

enum class Refinement : int { kNone = 0, kParabola = 1, kGaussian = 2 };

// All tensors contiguous; `pixels` = height x width.
struct FocusSearchParams {
  const float* volume;     // (batch, frames, pixels)
  const float* positions;  // (frames), or (batch, frames) with position_stride = frames
  float* depth;            // (batch, pixels)
  int64_t* index;          // (batch, pixels)
  float* peak;             // (batch, pixels)
  float* confidence;       // (batch, pixels)
  int64_t batch, frames, pixels;
  int64_t position_stride;  // 0: all images share the positions
  int64_t group_size;       // frames per group
  int64_t radius;
  Refinement refinement;
  bool log_scale;
};

// Searches pixels [begin, end) of the flattened (batch, pixels).
using FocusSearchKernel = void (*)(const FocusSearchParams&, int64_t begin, int64_t end);

struct FocusSearchTable {
  FocusSearchKernel run;
};

// The kernel of the ISA in use.
FocusSearchKernel focus_search_kernel();

}  // namespace gplws::cpu
