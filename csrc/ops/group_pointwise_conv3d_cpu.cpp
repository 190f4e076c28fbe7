#include <torch/csrc/stable/library.h>

#include "../cpu/group_pointwise_conv3d.h"
#include "float_values.h"
#include "group_pointwise_conv3d.h"
#include "parallel.h"
#include "scratch.h"

namespace gplws {
namespace {

using Operands = GroupPointwiseConv3dOperands;
using Options = GroupPointwiseConv3dOptions;

// Checks the operands, lets `make_result` check or make the result, and computes it.
template <class MakeResult>
Tensor convolve(const Operands& operands, const Options& options, MakeResult make_result) {
  const GroupPointwiseConv3dSizes s = check_group_pointwise_conv3d(operands, options);
  Tensor y = make_result(s);
  if (y.numel() == 0) return y;
  const Tensor dense_x = torch::stable::contiguous(operands.x);
  const FloatValues weight(operands.weight), bias(operands.bias);
  const FloatValues pointwise_weight(operands.pointwise_weight),
      pointwise_bias(operands.pointwise_bias);
  const OptionalTensor dense_residual = contiguous_or_none(operands.residual);

  auto p = group_pointwise_conv3d_params<cpu::GroupPointwiseConv3dParams>(s, operands, options);
  p.x = dense_x.const_data_ptr();
  p.bias = bias.data();
  p.pointwise_bias = pointwise_bias.data();
  p.residual = dense_residual ? dense_residual->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();

  const cpu::GroupPointwiseConv3dKernel& kernel =
      cpu::group_pointwise_conv3d_kernel(operands.x.scalar_type() == ScalarType::BFloat16);
  Scratch packed(kernel.packed_size(p));
  kernel.pack(p, weight.data(), pointwise_weight.data(), packed.data());
  p.packed = packed.data();

  const cpu::GroupPointwiseConv3dPlan plan = kernel.plan(p, torch::stable::get_num_threads());
  parallel_for_with_scratch(plan.tasks, 1, plan.scratch_floats,
                            [&](int64_t begin, int64_t end, float* scratch) {
                              kernel.run(p, plan, begin, end, scratch);
                            });
  return y;
}

Tensor group_pointwise_conv3d_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& pointwise_weight,
                                  const OptionalTensor& pointwise_bias,
                                  const OptionalTensor& residual, int64_t groups, int64_t stride,
                                  bool relu, bool pointwise_relu, bool residual_relu) {
  const Tensor y = convolve(
      {x, weight, bias, pointwise_weight, pointwise_bias, residual},
      {groups, stride, relu, pointwise_relu, residual_relu},
      [&](const GroupPointwiseConv3dSizes& s) { return torch::stable::new_empty(x, s.output()); });
  const MemoryFormat format = followed_format(x);
  return format == MemoryFormat::Contiguous ? y : torch::stable::contiguous(y, format);
}

void group_pointwise_conv3d_out_cpu(const Tensor& x, const Tensor& weight,
                                    const OptionalTensor& bias,
                                    const OptionalTensor& pointwise_weight,
                                    const OptionalTensor& pointwise_bias,
                                    const OptionalTensor& residual, int64_t groups, int64_t stride,
                                    bool relu, bool pointwise_relu, bool residual_relu,
                                    Tensor out) {
  const Operands operands{x, weight, bias, pointwise_weight, pointwise_bias, residual};
  convolve(operands, {groups, stride, relu, pointwise_relu, residual_relu},
           [&](const GroupPointwiseConv3dSizes& s) {
             check_out("group_pointwise_conv3d", out, x, s.output());
             check_group_pointwise_conv3d_apart(out, operands);
             return out;
           });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CPU, m) {
  m.impl("group_pointwise_conv3d", TORCH_BOX(&group_pointwise_conv3d_cpu));
  m.impl("group_pointwise_conv3d.out", TORCH_BOX(&group_pointwise_conv3d_out_cpu));
}

}  // namespace gplws
