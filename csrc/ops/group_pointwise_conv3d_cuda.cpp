#include "cuda/group_pointwise_conv3d.h"

#include <torch/csrc/stable/library.h>

#include "cuda_stream.h"
#include "group_pointwise_conv3d.h"

namespace gplws {
namespace {

cuda::Strides5 strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(3), t.stride(4)};
}

Tensor group_pointwise_conv3d_cuda(const Tensor& x, const Tensor& weight,
                                   const OptionalTensor& bias,
                                   const OptionalTensor& pointwise_weight,
                                   const OptionalTensor& pointwise_bias,
                                   const OptionalTensor& residual, int64_t groups, int64_t stride,
                                   bool relu, bool pointwise_relu, bool residual_relu) {
  check_float32_on_cuda("group_pointwise_conv3d", x);
  const GroupPointwiseConv3dSizes s = check_group_pointwise_conv3d(
      x, weight, bias, pointwise_weight, pointwise_bias, residual, groups, stride);
  for (const int64_t size :
       {s.batch, s.channels, s.middle, s.channels_out, s.frames, s.height, s.width, groups})
    STD_TORCH_CHECK(size <= cuda::kMaxAxis, "group_pointwise_conv3d: no axis may be longer than ",
                    cuda::kMaxAxis, " on CUDA, got ", size);
  const CudaStream stream(x);
  Tensor y = empty_on_device_of(x, s.output(), x.scalar_type(), followed_format(x));
  if (y.numel() == 0) return y;

  // The weights are small: made dense. x and residual are read where they lie.
  const Tensor dense_weight = torch::stable::contiguous(weight);
  const OptionalTensor dense_bias = contiguous_or_none(bias);
  const OptionalTensor dense_pointwise_weight = contiguous_or_none(pointwise_weight);
  const OptionalTensor dense_pointwise_bias = contiguous_or_none(pointwise_bias);

  cuda::GroupPointwiseConv3dParams p{};
  p.x = x.const_data_ptr<float>();
  p.weight = dense_weight.const_data_ptr<float>();
  p.bias = floats_or_null(dense_bias);
  p.pointwise_weight = floats_or_null(dense_pointwise_weight);
  p.pointwise_bias = floats_or_null(dense_pointwise_bias);
  p.residual = floats_or_null(residual);
  p.y = y.mutable_data_ptr<float>();
  p.x_strides = strides_of(x);
  if (residual) p.residual_strides = strides_of(*residual);
  p.y_strides = strides_of(y);
  p.batch = s.batch;
  p.channels = s.channels;
  p.frames = s.frames;
  p.height = s.height;
  p.width = s.width;
  p.middle = s.middle;
  p.channels_out = s.channels_out;
  p.height_out = s.height_out;
  p.width_out = s.width_out;
  p.groups = groups;
  p.stride = stride;
  p.pointwise = pointwise_weight.has_value();
  p.relu = relu;
  p.pointwise_relu = pointwise_relu;
  p.residual_relu = residual_relu;
  STD_CUDA_CHECK(cuda::launch_group_pointwise_conv3d(p, stream.get()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CUDA, m) {
  m.impl("group_pointwise_conv3d", TORCH_BOX(&group_pointwise_conv3d_cuda));
}

}  // namespace gplws
