#include "../cpu/spline_smooth.h"

#include <torch/csrc/stable/library.h>

#include "scratch.h"
#include "tensors.h"

namespace gplws {
namespace {

constexpr const char* kOp = "spline_smooth";
// Far beyond it sizes of scratch memory would overflow.
constexpr int64_t kMostSpacing = 1 << 30;

void check_arguments(const Tensor& images, int64_t spacing) {
  check_images(kOp, images);
  check(spacing >= 1 && spacing <= kMostSpacing, kOp, ": spacing must be 1 to ", kMostSpacing,
        ", got ", spacing);
}

void smooth(const Tensor& images, int64_t spacing, Tensor& result) {
  if (result.numel() == 0) return;
  const Tensor dense = torch::stable::contiguous(images);
  cpu::SplineSmoothParams p{};
  p.images = dense.const_data_ptr<float>();
  p.result = result.mutable_data_ptr<float>();
  p.count = images.size(0);
  p.height = images.size(1);
  p.width = images.size(2);
  p.spacing = spacing;
  // A piece of work worth a thread: some 64 Ki values.
  const int64_t grain = (1 << 16) / p.width + 1;
  const cpu::SplineSmoothKernel& kernel = cpu::spline_smooth_kernel();
  torch::stable::parallel_for(0, p.count * p.height, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(kernel.scratch_floats(p));
    kernel.rows(p, begin, end, scratch.data());
  });
}

Tensor spline_smooth_cpu(const Tensor& images, int64_t spacing) {
  check_arguments(images, spacing);
  Tensor result =
      torch::stable::new_empty(images, {images.size(0), images.size(1), images.size(2)});
  smooth(images, spacing, result);
  return result;
}

void spline_smooth_out_cpu(const Tensor& images, int64_t spacing, Tensor out) {
  check_arguments(images, spacing);
  check_operand(kOp, out, "out", images, {images.size(0), images.size(1), images.size(2)},
                "images");
  check(is_dense(out, {2, 1, 0}), kOp, ": out must be contiguous");
  check(out.const_data_ptr<float>() != images.const_data_ptr<float>() || out.numel() == 0, kOp,
        ": out must not be images");
  smooth(images, spacing, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CPU, m) {
  m.impl("spline_smooth", TORCH_BOX(&spline_smooth_cpu));
  m.impl("spline_smooth.out", TORCH_BOX(&spline_smooth_out_cpu));
}

}  // namespace gplws
