#include "../cpu/local_filters.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>

#include "image_filter.h"

namespace gplws {
namespace {

Tensor symmetric_filter_cpu(const Tensor& images, const Tensor& weights) {
  constexpr const char* kOp = "symmetric_filter";
  check_images(kOp, images);
  check(weights.dim() == 2 && weights.size(0) >= 1 && weights.size(0) <= kMostReach + 1, kOp,
        ": weights must be (R + 1, R + 1)");
  const int64_t size = weights.size(0);
  check_operand(kOp, weights, "weights", images, {size, size}, "images");
  const Tensor dense = torch::stable::contiguous(weights);
  cpu::LocalFilterParams p{};
  p.reach = size - 1;
  p.weights = dense.const_data_ptr<float>();
  const cpu::LocalFilterKernel& kernel = cpu::local_filter_kernel();
  Tensor result = torch::stable::new_empty(images, sizes_of_images(images));
  filter_images(images, p, kernel.symmetric_scratch, kernel.symmetric_rows, result);
  return result;
}

Tensor second_differences_cpu(const Tensor& images, const Tensor& shifts) {
  constexpr const char* kOp = "second_differences";
  check_images(kOp, images);
  check_device(kOp, shifts, "shifts", images, "images");
  check(shifts.scalar_type() == ScalarType::Long && shifts.dim() == 2 && shifts.size(0) >= 1 &&
            shifts.size(1) == 2,
        kOp, ": shifts must be (D, 2) of int64, D >= 1");
  const Tensor dense = torch::stable::contiguous(shifts);
  cpu::LocalFilterParams p{};
  p.shifts = dense.const_data_ptr<int64_t>();
  p.shift_count = shifts.size(0);
  for (int64_t i = 0; i < 2 * p.shift_count; ++i) {
    const int64_t shift = p.shifts[i];
    check(shift >= -kMostReach && shift <= kMostReach, kOp, ": shifts must be within ", kMostReach,
          " pixels, got ", shift);
    if (std::abs(shift) > p.reach) p.reach = std::abs(shift);
  }
  const cpu::LocalFilterKernel& kernel = cpu::local_filter_kernel();
  Tensor result = torch::stable::new_empty(images, sizes_of_images(images));
  filter_images(images, p, kernel.differences_scratch, kernel.differences_rows, result);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CPU, m) {
  m.impl("symmetric_filter", TORCH_BOX(&symmetric_filter_cpu));
  m.impl("second_differences", TORCH_BOX(&second_differences_cpu));
}

}  // namespace gplws
