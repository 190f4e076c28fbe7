#include <torch/csrc/stable/library.h>

#include "../cpu/conv3d_weight_gradient.h"
#include "parallel.h"
#include "scratch.h"
#include "tensors.h"

namespace gplws {
namespace {

constexpr const char* kOp = "conv3d_weight_gradient";

cpu::Conv3dWeightGradientParams check_conv3d_weight_gradient(const Tensor& x, const Tensor& grad,
                                                             int64_t groups, int64_t stride) {
  check(x.scalar_type() == ScalarType::Float, kOp, ": x must be float32");
  check(x.dim() == 5, kOp, ": x must be (B, C, N, H, W)");
  check(grad.dim() == 5, kOp, ": grad must be (B, M, N, ceil(H / s), ceil(W / s))");
  check(stride == 1 || stride == 2, kOp, ": stride must be 1 or 2, got ", stride);
  cpu::Conv3dWeightGradientParams p{};
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.channels_out = grad.size(1);
  p.frames = x.size(2);
  p.height = x.size(3);
  p.width = x.size(4);
  p.height_out = (p.height + stride - 1) / stride;
  p.width_out = (p.width + stride - 1) / stride;
  p.groups = groups;
  p.stride = stride;
  check(groups >= 1 && p.channels % groups == 0 && p.channels_out % groups == 0, kOp,
        ": groups = ", groups, " must divide the ", p.channels, " channels of x and the ",
        p.channels_out, " of grad");
  check_operand(kOp, grad, "grad", x,
                {p.batch, p.channels_out, p.frames, p.height_out, p.width_out});
  return p;
}

Tensor conv3d_weight_gradient_cpu(const Tensor& x, const Tensor& grad, int64_t groups,
                                  int64_t stride) {
  cpu::Conv3dWeightGradientParams p = check_conv3d_weight_gradient(x, grad, groups, stride);
  Tensor result =
      torch::stable::new_empty(x, {p.channels_out, p.channels / groups, int64_t{3}, 3, 3});
  if (result.numel() == 0) return result;
  if (x.numel() == 0) return torch::stable::fill_(result, 0.0);
  const Tensor dense_x = torch::stable::contiguous(x);
  const Tensor dense_grad = torch::stable::contiguous(grad);
  p.x = dense_x.const_data_ptr<float>();
  p.grad = dense_grad.const_data_ptr<float>();
  p.weight_gradient = result.mutable_data_ptr<float>();

  const cpu::Conv3dWeightGradientKernel& kernel = cpu::conv3d_weight_gradient_kernel();
  const cpu::Conv3dWeightGradientPlan plan = kernel.plan(p);
  const int64_t tasks = plan.blocks * plan.slices;
  Scratch partial(tasks * plan.partial_floats);
  p.partial = partial.data();
  parallel_for_with_scratch(tasks, 1, plan.scratch_floats,
                            [&](int64_t begin, int64_t end, float* scratch) {
                              kernel.accumulate(p, plan, begin, end, scratch);
                            });
  parallel_for(plan.blocks, 1,
               [&](int64_t begin, int64_t end) { kernel.finish(p, plan, begin, end); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CPU, m) {
  m.impl("conv3d_weight_gradient", TORCH_BOX(&conv3d_weight_gradient_cpu));
}

}  // namespace gplws
