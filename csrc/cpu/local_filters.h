// Filters of focus measures on the CPU, float32: what ops and kernels agree on. Images and results
// contiguous, not empty and apart; beyond the borders images are mirrored, without repeating the
// edge.
#pragma once
#include <cstdint>

namespace gplws::cpu {

struct LocalFilterParams {
  const float* images;  // (count, height, width)
  float* result;        // likewise
  int64_t count, height, width;
  int64_t reach;          // of the filter, pixels, >= 0
  const float* weights;   // (reach + 1, reach + 1): a quarter of a symmetric filter
  const int64_t* shifts;  // (shift_count, 2): rows and columns, no further than the reach
  int64_t shift_count;
};

struct LocalFilterKernel {
  // Floats of scratch for each thread, 64-byte aligned.
  int64_t (*symmetric_scratch)(const LocalFilterParams&);
  int64_t (*differences_scratch)(const LocalFilterParams&);
  // Compute rows [begin, end) of count x height.
  void (*symmetric_rows)(const LocalFilterParams&, int64_t begin, int64_t end, float* scratch);
  void (*differences_rows)(const LocalFilterParams&, int64_t begin, int64_t end, float* scratch);
};

// The kernel of the ISA in use.
const LocalFilterKernel& local_filter_kernel();

}  // namespace gplws::cpu
