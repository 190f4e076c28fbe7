#include "cuda/up_conv3d.h"

#include <torch/csrc/stable/library.h>

#include "cuda_stream.h"
#include "up_conv3d.h"

namespace gplws {
namespace {

Tensor up_conv3d_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& residual, int64_t groups) {
  check_float32_on_cuda("up_conv3d", x);
  const UpConv3dSizes s = check_up_conv3d(x, weight, bias, residual, groups);
  const CudaStream stream(x);
  Tensor y = empty_on_device_of(x, s.output(), x.scalar_type());
  if (y.numel() > 0) {
    const Tensor dense_x = aligned_contiguous(x);
    const Tensor dense_weight = torch::stable::contiguous(weight);
    const OptionalTensor dense_bias = contiguous_or_none(bias);
    const OptionalTensor dense_residual =
        residual ? OptionalTensor(aligned_contiguous(*residual)) : std::nullopt;
    cuda::UpConv3dParams p{};
    p.x = dense_x.const_data_ptr<float>();
    p.weight = dense_weight.const_data_ptr<float>();
    p.bias = floats_or_null(dense_bias);
    p.residual = floats_or_null(dense_residual);
    p.y = y.mutable_data_ptr<float>();
    p.batch = s.batch;
    p.channels = s.channels;
    p.channels_out = s.channels_out;
    p.frames = s.frames;
    p.height = s.height;
    p.width = s.width;
    STD_CUDA_CHECK(cuda::launch_up_conv3d(p, stream.get()));
  }
  const MemoryFormat format = followed_format(x);
  return format == MemoryFormat::Contiguous ? y : torch::stable::contiguous(y, format);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CUDA, m) { m.impl("up_conv3d", TORCH_BOX(&up_conv3d_cuda)); }

}  // namespace gplws
