#include <torch/csrc/stable/library.h>

#include "../cpu/group_pointwise_conv3d.h"
#include "float_values.h"
#include "group_pointwise_conv3d.h"
#include "parallel.h"
#include "scratch.h"

namespace gplws {
namespace {

void compute(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
             const OptionalTensor& pointwise_weight, const OptionalTensor& pointwise_bias,
             const OptionalTensor& residual, int64_t groups, int64_t stride, bool relu,
             bool pointwise_relu, bool residual_relu, const GroupPointwiseConv3dSizes& s,
             Tensor& y) {
  if (y.numel() == 0) return;
  const Tensor dense_x = torch::stable::contiguous(x);
  const FloatValues float_weight(weight), float_bias(bias);
  const FloatValues float_pointwise_weight(pointwise_weight), float_pointwise_bias(pointwise_bias);
  const OptionalTensor dense_residual = contiguous_or_none(residual);

  cpu::GroupPointwiseConv3dParams p{};
  p.x = dense_x.const_data_ptr();
  p.bias = float_bias.data();
  p.pointwise_bias = float_pointwise_bias.data();
  p.residual = dense_residual ? dense_residual->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.batch = s.batch;
  p.channels = s.channels;
  p.middle = s.middle;
  p.channels_out = s.channels_out;
  p.frames = s.frames;
  p.height = s.height;
  p.width = s.width;
  p.height_out = s.height_out;
  p.width_out = s.width_out;
  p.groups = groups;
  p.stride = stride;
  p.pointwise = pointwise_weight.has_value();
  p.relu = relu;
  p.pointwise_relu = pointwise_relu;
  p.residual_relu = residual_relu;

  const cpu::GroupPointwiseConv3dKernel& kernel =
      cpu::group_pointwise_conv3d_kernel(x.scalar_type() == ScalarType::BFloat16);
  Scratch packed(kernel.packed_size(p));
  kernel.pack(p, float_weight.data(), float_pointwise_weight.data(), packed.data());
  p.packed = packed.data();

  const cpu::GroupPointwiseConv3dPlan plan = kernel.plan(p, torch::stable::get_num_threads());
  parallel_for_with_scratch(plan.tasks, 1, plan.scratch_floats,
                            [&](int64_t begin, int64_t end, float* scratch) {
                              kernel.run(p, plan, begin, end, scratch);
                            });
}

Tensor group_pointwise_conv3d_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& pointwise_weight,
                                  const OptionalTensor& pointwise_bias,
                                  const OptionalTensor& residual, int64_t groups, int64_t stride,
                                  bool relu, bool pointwise_relu, bool residual_relu) {
  const GroupPointwiseConv3dSizes s = check_group_pointwise_conv3d(
      x, weight, bias, pointwise_weight, pointwise_bias, residual, groups, stride);
  Tensor y = torch::stable::new_empty(x, s.output());
  compute(x, weight, bias, pointwise_weight, pointwise_bias, residual, groups, stride, relu,
          pointwise_relu, residual_relu, s, y);
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
  const GroupPointwiseConv3dSizes s = check_group_pointwise_conv3d(
      x, weight, bias, pointwise_weight, pointwise_bias, residual, groups, stride);
  check_out("group_pointwise_conv3d", out, x, s.output());
  compute(x, weight, bias, pointwise_weight, pointwise_bias, residual, groups, stride, relu,
          pointwise_relu, residual_relu, s, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CPU, m) {
  m.impl("group_pointwise_conv3d", TORCH_BOX(&group_pointwise_conv3d_cpu));
  m.impl("group_pointwise_conv3d.out", TORCH_BOX(&group_pointwise_conv3d_out_cpu));
}

}  // namespace gplws
