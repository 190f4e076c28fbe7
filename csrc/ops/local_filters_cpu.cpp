#include "../cpu/local_filters.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>

#include "scratch.h"
#include "tensors.h"

namespace gplws {
namespace {

// Far beyond it sizes of scratch memory would overflow.
constexpr int64_t kMostReach = 1 << 12;

using Rows = void (*)(const cpu::LocalFilterParams&, int64_t, int64_t, float*);

Tensor filtered(const Tensor& images, cpu::LocalFilterParams p,
                int64_t (*scratch_floats)(const cpu::LocalFilterParams&), Rows rows) {
  Tensor result =
      torch::stable::new_empty(images, {images.size(0), images.size(1), images.size(2)});
  if (result.numel() == 0) return result;
  const Tensor dense = torch::stable::contiguous(images);
  p.images = dense.const_data_ptr<float>();
  p.result = result.mutable_data_ptr<float>();
  p.count = images.size(0);
  p.height = images.size(1);
  p.width = images.size(2);
  // A piece of work worth a thread: some 64 Ki values.
  const int64_t grain = (1 << 16) / p.width + 1;
  torch::stable::parallel_for(0, p.count * p.height, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(scratch_floats(p));
    rows(p, begin, end, scratch.data());
  });
  return result;
}

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
  return filtered(images, p, kernel.symmetric_scratch, kernel.symmetric_rows);
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
  return filtered(images, p, kernel.differences_scratch, kernel.differences_rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CPU, m) {
  m.impl("symmetric_filter", TORCH_BOX(&symmetric_filter_cpu));
  m.impl("second_differences", TORCH_BOX(&second_differences_cpu));
}

}  // namespace gplws
