// Smoothing of images by a cubic B-spline with spaced taps on the CPU, float32: what op and kernels
// agree on.
#pragma once
#include <cstdint>

namespace gplws::cpu {

// Both tensors contiguous, not empty and apart.
struct SplineSmoothParams {
  const float* images;  // (count, height, width)
  float* result;        // likewise
  int64_t count, height, width;
  int64_t spacing;  // from tap to tap, pixels
};

struct SplineSmoothKernel {
  // Floats of scratch for each thread, 64-byte aligned.
  int64_t (*scratch_floats)(const SplineSmoothParams&);
  // Computes rows [begin, end) of count x height.
  void (*rows)(const SplineSmoothParams&, int64_t begin, int64_t end, float* scratch);
};

// The kernel of the ISA in use.
const SplineSmoothKernel& spline_smooth_kernel();

}  // namespace gplws::cpu
