#include "cuda/up_conv3d.h"

#include <torch/csrc/stable/library.h>

#include "cuda_stream.h"
#include "up_conv3d.h"

namespace gplws {
namespace {

UpConv3dSizes check_on_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual, int64_t groups) {
  const UpConv3dSizes s = check_up_conv3d(x, weight, bias, residual, groups);
  check_axes("up_conv3d", {s.frames});  // all else has 64 bits wherever it can be as long
  return s;
}

void compute(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
             const OptionalTensor& residual, const UpConv3dSizes& s, Tensor& y) {
  if (y.numel() == 0) return;
  const CudaStream stream(x);
  // The weights are small: made dense. x and residual are read where they lie.
  const Tensor dense_weight = torch::stable::contiguous(weight);
  const OptionalTensor dense_bias = contiguous_or_none(bias);
  cuda::UpConv3dParams p{};
  p.x = x.const_data_ptr();
  p.weight = dense_weight.const_data_ptr();
  p.bias = data_or_null(dense_bias);
  p.residual = data_or_null(residual);
  p.y = y.mutable_data_ptr();
  p.x_strides = strides_of(x);
  if (residual) p.residual_strides = strides_of(*residual);
  p.y_strides = strides_of(y);
  p.batch = s.batch;
  p.channels = s.channels;
  p.channels_out = s.channels_out;
  p.frames = s.frames;
  p.height = s.height;
  p.width = s.width;
  p.type = float_type_of(x);
  STD_CUDA_CHECK(cuda::launch_up_conv3d(p, stream.get()));
}

Tensor up_conv3d_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& residual, int64_t groups) {
  const UpConv3dSizes s = check_on_cuda(x, weight, bias, residual, groups);
  Tensor y = empty_on_device_of(x, s.output(), x.scalar_type(), followed_format(x));
  compute(x, weight, bias, residual, s, y);
  return y;
}

void up_conv3d_out_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, int64_t groups, Tensor out) {
  const UpConv3dSizes s = check_on_cuda(x, weight, bias, residual, groups);
  check_out_in_any_format("up_conv3d", out, x, s.output());
  check_up_conv3d_apart(out, x, weight, bias, residual);
  compute(x, weight, bias, residual, s, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CUDA, m) {
  m.impl("up_conv3d", TORCH_BOX(&up_conv3d_cuda));
  m.impl("up_conv3d.out", TORCH_BOX(&up_conv3d_out_cuda));
}

}  // namespace gplws
