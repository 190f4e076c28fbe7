#include "../cpu/spline_smooth.h"

#include <torch/csrc/stable/library.h>

#include "image_filter.h"

namespace gplws {
namespace {

constexpr const char* kOp = "spline_smooth";

void check_arguments(const Tensor& images, int64_t spacing) {
  check_images(kOp, images);
  check(spacing >= 1 && spacing <= kMostReach, kOp, ": spacing must be 1 to ", kMostReach, ", got ",
        spacing);
}

void smooth(const Tensor& images, int64_t spacing, Tensor& result) {
  cpu::SplineSmoothParams p{};
  p.spacing = spacing;
  const cpu::SplineSmoothKernel& kernel = cpu::spline_smooth_kernel();
  filter_images(images, p, kernel.scratch_floats, kernel.rows, result);
}

Tensor spline_smooth_cpu(const Tensor& images, int64_t spacing) {
  check_arguments(images, spacing);
  Tensor result = torch::stable::new_empty(images, sizes_of_images(images));
  smooth(images, spacing, result);
  return result;
}

void spline_smooth_out_cpu(const Tensor& images, int64_t spacing, Tensor out) {
  check_arguments(images, spacing);
  check_operand(kOp, out, "out", images, sizes_of_images(images), "images");
  check(is_dense(out, {2, 1, 0}), kOp, ": out must be contiguous");
  check_apart(kOp, {"out", &out}, {{"images", &images}});
  smooth(images, spacing, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CPU, m) {
  m.impl("spline_smooth", TORCH_BOX(&spline_smooth_cpu));
  m.impl("spline_smooth.out", TORCH_BOX(&spline_smooth_out_cpu));
}

}  // namespace gplws
