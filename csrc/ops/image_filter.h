// What the filters of images on the CPU share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "parallel.h"
#include "tensors.h"

namespace gplws {

// The largest reach of a filter and spacing of its taps, px: scratch memory grows with them, up to
// some hundred MB for each thread. gplws/ops/arguments.py has the same number.
constexpr int64_t kMostReach = 1 << 12;

// A batch of float32 images.
inline void check_images(const char* op, const Tensor& images) {
  check(images.scalar_type() == ScalarType::Float, op, ": images must be float32");
  check(images.dim() == 3, op, ": images must be (C, H, W)");
}

inline std::vector<int64_t> sizes_of_images(const Tensor& images) {
  return {images.size(0), images.size(1), images.size(2)};
}

// Filters row by row into `result`; `p` says all but where the images are.
template <class Params>
void filter_images(const Tensor& images, Params p, int64_t (*scratch_floats)(const Params&),
                   void (*rows)(const Params&, int64_t begin, int64_t end, float* scratch),
                   Tensor& result) {
  if (result.numel() == 0) return;
  const Tensor dense = torch::stable::contiguous(images);
  p.images = dense.const_data_ptr<float>();
  p.result = result.mutable_data_ptr<float>();
  p.count = images.size(0);
  p.height = images.size(1);
  p.width = images.size(2);
  const int64_t grain = grain_of(kValuesWorthAThread, p.width);
  parallel_for_with_scratch(
      p.count * p.height, grain, scratch_floats(p),
      [&](int64_t begin, int64_t end, float* scratch) { rows(p, begin, end, scratch); });
}

}  // namespace gplws
