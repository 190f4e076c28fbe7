#include "../cpu/up_conv3d.h"

#include <torch/csrc/stable/library.h>

#include "float_values.h"
#include "parallel.h"
#include "up_conv3d.h"

namespace gplws {
namespace {

void compute(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
             const OptionalTensor& residual, const UpConv3dSizes& s, Tensor& y) {
  if (y.numel() == 0) return;
  const Tensor dense_x = torch::stable::contiguous(x);
  const FloatValues float_weight(weight), float_bias(bias);
  const OptionalTensor dense_residual = contiguous_or_none(residual);
  cpu::UpConv3dParams p{};
  p.x = dense_x.const_data_ptr();
  p.weight = float_weight.data();
  p.bias = float_bias.data();
  p.residual = dense_residual ? dense_residual->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.batch = s.batch;
  p.channels = s.channels;
  p.channels_out = s.channels_out;
  p.frames = s.frames;
  p.height = s.height;
  p.width = s.width;

  const int64_t strips = (s.height + cpu::kUpConv3dTaskRows - 1) / cpu::kUpConv3dTaskRows;
  const cpu::UpConv3dKernel& kernel =
      cpu::up_conv3d_kernel(x.scalar_type() == ScalarType::BFloat16);
  parallel_for(s.batch * s.channels_out * strips, 1,
               [&](int64_t begin, int64_t end) { kernel.run(p, begin, end); });
}

Tensor up_conv3d_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, int64_t groups) {
  const UpConv3dSizes s = check_up_conv3d(x, weight, bias, residual, groups);
  Tensor y = torch::stable::new_empty(x, s.output());
  compute(x, weight, bias, residual, s, y);
  const MemoryFormat format = followed_format(x);
  return format == MemoryFormat::Contiguous ? y : torch::stable::contiguous(y, format);
}

void up_conv3d_out_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual, int64_t groups, Tensor out) {
  const UpConv3dSizes s = check_up_conv3d(x, weight, bias, residual, groups);
  check_out("up_conv3d", out, x, s.output());
  check_up_conv3d_apart(out, x, weight, bias, residual);
  compute(x, weight, bias, residual, s, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CPU, m) {
  m.impl("up_conv3d", TORCH_BOX(&up_conv3d_cpu));
  m.impl("up_conv3d.out", TORCH_BOX(&up_conv3d_out_cpu));
}

}  // namespace gplws
