// What the CPU and the CUDA op share: the checks that guard memory, and the sizes of the results.
#pragma once

#include "tensors.h"

namespace gplws {

struct FocusSearchSizes {
  int64_t batch, frames, height, width;
  int64_t group_size;       // frames per group
  int64_t position_stride;  // between the positions of two images; 0: shared
  int64_t radius;           // no more than reaches over the whole stack

  std::vector<int64_t> output() const { return {batch, height, width}; }
};

inline FocusSearchSizes check_focus_search(const Tensor& volume, const Tensor& focus_positions,
                                           int64_t groups, int64_t refinement, int64_t radius) {
  const ScalarType dtype = volume.scalar_type();
  check(dtype == ScalarType::Float ||
            (volume.is_cuda() && (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half)),
        "focus_search: volume must be float32 or, on CUDA, bfloat16 or float16");
  check(focus_positions.scalar_type() == ScalarType::Float,
        "focus_search: focus_positions must be float32");
  check_device("focus_search", focus_positions, "focus_positions", volume, "volume");
  check(volume.dim() == 4, "focus_search: volume must be (B, N, H, W)");
  FocusSearchSizes s;
  s.batch = volume.size(0);
  s.frames = volume.size(1);
  s.height = volume.size(2);
  s.width = volume.size(3);
  check_frames("focus_search", "volume", s.frames);
  const int64_t dim = focus_positions.dim();
  check((dim == 1 && focus_positions.size(0) == s.frames) ||
            (dim == 2 && focus_positions.size(0) == s.batch && focus_positions.size(1) == s.frames),
        "focus_search: focus_positions must be (N,) or (B, N) with N = ", s.frames);
  check(groups >= 1, "focus_search: groups must be at least 1, got ", groups);
  check(refinement >= 0 && refinement <= 2, "focus_search: unknown refinement ", refinement);
  check(radius >= 1, "focus_search: radius must be at least 1, got ", radius);
  s.position_stride = dim == 2 ? s.frames : 0;
  s.radius = radius < s.frames ? radius : s.frames;
  s.group_size = s.frames / groups + (s.frames % groups != 0);
  return s;
}

}  // namespace gplws
