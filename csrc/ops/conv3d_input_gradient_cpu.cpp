#include <torch/csrc/stable/library.h>

#include "../cpu/conv3d_input_gradient.h"
#include "parallel.h"
#include "scratch.h"
#include "tensors.h"

namespace gplws {
namespace {

constexpr const char* kOp = "conv3d_input_gradient";

cpu::Conv3dInputGradientParams check_conv3d_input_gradient(const Tensor& grad, const Tensor& weight,
                                                           int64_t groups, bool even_height,
                                                           bool even_width) {
  check(grad.scalar_type() == ScalarType::Float, kOp, ": grad must be float32");
  check(grad.dim() == 5, kOp, ": grad must be (B, M, N, ceil(H / 2), ceil(W / 2))");
  check(weight.dim() == 5, kOp, ": weight must be (M, C / groups, 3, 3, 3)");
  cpu::Conv3dInputGradientParams p{};
  p.batch = grad.size(0);
  p.channels_out = grad.size(1);
  p.frames = grad.size(2);
  p.height_out = grad.size(3);
  p.width_out = grad.size(4);
  p.height = even_height || p.height_out == 0 ? 2 * p.height_out : 2 * p.height_out - 1;
  p.width = even_width || p.width_out == 0 ? 2 * p.width_out : 2 * p.width_out - 1;
  p.groups = groups;
  check(groups >= 1 && p.channels_out % groups == 0, kOp, ": groups = ", groups,
        " must divide the ", p.channels_out, " channels of grad");
  p.channels = weight.size(1) * groups;
  check_operand(kOp, weight, "weight", grad, {p.channels_out, p.channels / groups, 3, 3, 3},
                "grad");
  return p;
}

Tensor conv3d_input_gradient_cpu(const Tensor& grad, const Tensor& weight, int64_t groups,
                                 bool even_height, bool even_width) {
  cpu::Conv3dInputGradientParams p =
      check_conv3d_input_gradient(grad, weight, groups, even_height, even_width);
  Tensor result =
      torch::stable::new_empty(grad, {p.batch, p.channels, p.frames, p.height, p.width});
  if (result.numel() == 0) return result;
  if (grad.numel() == 0) return torch::stable::fill_(result, 0.0);
  const Tensor dense_grad = torch::stable::contiguous(grad);
  const Tensor dense_weight = torch::stable::contiguous(weight);
  p.grad = dense_grad.const_data_ptr<float>();
  p.input_gradient = result.mutable_data_ptr<float>();

  const cpu::Conv3dInputGradientKernel& kernel = cpu::conv3d_input_gradient_kernel();
  Scratch packed(kernel.packed_size(p));
  kernel.pack(p, dense_weight.const_data_ptr<float>(), packed.data());
  p.packed = packed.data();
  const cpu::Conv3dInputGradientPlan plan = kernel.plan(p, torch::stable::get_num_threads());
  parallel_for_with_scratch(plan.tasks, 1, plan.scratch_floats,
                            [&](int64_t begin, int64_t end, float* scratch) {
                              kernel.run(p, plan, begin, end, scratch);
                            });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CPU, m) {
  m.impl("conv3d_input_gradient", TORCH_BOX(&conv3d_input_gradient_cpu));
}

}  // namespace gplws
