#include "cuda/group_pointwise_conv3d.h"
#include "cuda/group_pointwise_conv3d_half.h"
#include "cuda/group_pointwise_conv3d_resident.h"
#include "cuda/memory_format.h"

#include <torch/csrc/stable/library.h>

#include "cuda_stream.h"
#include "group_pointwise_conv3d.h"

namespace gplws {
namespace {

using Operands = GroupPointwiseConv3dOperands;
using Options = GroupPointwiseConv3dOptions;

// Weights that were packed for the tensor cores before; null: none.
using Packed = const Tensor*;

// What the params of the float32 and of the half-precision kernels have in common: all but the
// pointers.
template <class Params>
Params params_of(const GroupPointwiseConv3dSizes& s, const Operands& operands,
                 const Options& options, const Tensor& y) {
  Params p = group_pointwise_conv3d_params<Params>(s, operands, options);
  p.x_strides = strides_of(operands.x);
  if (operands.residual) p.residual_strides = strides_of(*operands.residual);
  p.y_strides = strides_of(y);
  return p;
}

void convolve_float32(const GroupPointwiseConv3dSizes& s, const Operands& operands,
                      const Options& options, Tensor& y, cudaStream_t stream) {
  auto p = params_of<cuda::GroupPointwiseConv3dParams>(s, operands, options, y);
  p.x = operands.x.const_data_ptr<float>();
  p.weight = operands.weight.const_data_ptr<float>();
  p.bias = floats_or_null(operands.bias);
  p.pointwise_weight = floats_or_null(operands.pointwise_weight);
  p.pointwise_bias = floats_or_null(operands.pointwise_bias);
  p.residual = floats_or_null(operands.residual);
  p.y = y.mutable_data_ptr<float>();
  bool wait = false;
  STD_CUDA_CHECK(cuda::sums_wait_in_result(p, &wait));
  OptionalTensor apart;  // of the residual, which sums would overwrite before it is added
  if (wait && p.residual == p.y) {
    apart = torch::stable::clone(*operands.residual);
    p.residual = apart->const_data_ptr<float>();
    p.residual_strides = strides_of(*apart);
  }
  STD_CUDA_CHECK(cuda::launch_group_pointwise_conv3d(p, stream));
}

cuda::GroupPointwiseConv3dHalfParams half_params_of(const GroupPointwiseConv3dSizes& s,
                                                    const Operands& operands,
                                                    const Options& options, Tensor& y) {
  auto p = params_of<cuda::GroupPointwiseConv3dHalfParams>(s, operands, options, y);
  p.x = operands.x.const_data_ptr();
  p.weight = operands.weight.const_data_ptr();
  p.bias = data_or_null(operands.bias);
  p.pointwise_weight = data_or_null(operands.pointwise_weight);
  p.pointwise_bias = data_or_null(operands.pointwise_bias);
  p.residual = data_or_null(operands.residual);
  p.y = y.mutable_data_ptr();
  return p;
}

// Of so many channels, a contiguous tensor costs a conv on tensor cores more than being rearranged.
constexpr int64_t kManyChannels = 8;

bool is_to_be_rearranged(const Tensor& t) {
  return t.size(1) >= kManyChannels && is_dense(t, {4, 3, 2, 1, 0}) &&
         !is_dense(t, {1, 4, 3, 2, 0});
}

cuda::MemoryFormatParams format_params_of(const Tensor& from, Tensor& to) {
  return {from.const_data_ptr(), to.mutable_data_ptr(), from.size(0),
          from.size(1),          from.size(2),          from.size(3) * from.size(4)};
}

Tensor in_channels_last(const Tensor& x, cudaStream_t stream) {
  Tensor last = empty_on_device_of(x, {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)},
                                   x.scalar_type(), MemoryFormat::ChannelsLast3d);
  STD_CUDA_CHECK(cuda::launch_to_channels_last(format_params_of(x, last), stream));
  return last;
}

// False where the tensor cores cannot do it: on old devices, and with very many channels.
bool convolve_half(const GroupPointwiseConv3dSizes& s, const Operands& operands,
                   const Options& options, Packed packed, Tensor& y, cudaStream_t stream) {
  const auto p = half_params_of(s, operands, options, y);
  cuda::DeviceLimits limits;
  STD_CUDA_CHECK(cuda::device_limits(&limits));
  const cuda::FloatType type = float_type_of(operands.x);
  const auto scratch_of = [&](int64_t bytes) {
    return empty_on_device_of(operands.x, {bytes}, ScalarType::Byte);
  };
  cuda::ResidentPlan resident;
  if (cuda::plan_resident(p, limits, &resident)) {
    if (packed && packed->numel() == resident.packed_bytes) {
      STD_CUDA_CHECK(
          cuda::launch_resident(p, type, resident, packed->const_data_ptr(), true, stream));
      return true;
    }
    Tensor scratch = scratch_of(resident.packed_bytes);
    void* weights = scratch.mutable_data_ptr();
    STD_CUDA_CHECK(cuda::pack_resident(p, type, resident.layer, weights, stream));
    STD_CUDA_CHECK(cuda::launch_resident(p, type, resident, weights, false, stream));
    return true;
  }
  cuda::HalfPlan plan;
  if (!cuda::plan_group_pointwise_conv3d_half(p, limits, &plan)) return false;
  Tensor scratch = scratch_of(cuda::scratch_bytes(plan));
  STD_CUDA_CHECK(
      cuda::launch_group_pointwise_conv3d_half(p, type, plan, scratch.mutable_data_ptr(), stream));
  return true;
}

// The same in whichever memory format is faster.
bool convolve_half_in_any_format(const GroupPointwiseConv3dSizes& s, const Operands& operands,
                                 const Options& options, Packed packed, Tensor& y,
                                 cudaStream_t stream) {
  const bool rearrange_x = is_to_be_rearranged(operands.x), rearrange_y = is_to_be_rearranged(y);
  if (!rearrange_x && !rearrange_y) return convolve_half(s, operands, options, packed, y, stream);
  cuda::DeviceLimits limits;
  STD_CUDA_CHECK(cuda::device_limits(&limits));
  if (limits.capability < 80) return false;
  const Tensor x = rearrange_x ? in_channels_last(operands.x, stream) : operands.x;
  const Operands rearranged{x,
                            operands.weight,
                            operands.bias,
                            operands.pointwise_weight,
                            operands.pointwise_bias,
                            operands.residual};
  if (!rearrange_y) return convolve_half(s, rearranged, options, packed, y, stream);
  Tensor last = empty_on_device_of(y, s.output(), y.scalar_type(), MemoryFormat::ChannelsLast3d);
  if (!convolve_half(s, rearranged, options, packed, last, stream)) return false;
  STD_CUDA_CHECK(cuda::launch_to_contiguous(format_params_of(last, y), stream));
  return true;
}

OptionalTensor floats_where_they_lie(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::to(*t, ScalarType::Float)) : std::nullopt;
}

// Checks the operands, lets `make_result` check or make the result, and computes it.
template <class MakeResult>
Tensor convolve(const Operands& given, const Options& options, Packed packed,
                MakeResult make_result) {
  const GroupPointwiseConv3dSizes s = check_group_pointwise_conv3d(given, options);
  check_axes("group_pointwise_conv3d", {s.batch, s.channels, s.middle, s.channels_out, s.frames,
                                        s.height, s.width, options.groups});
  const auto& [x, weight, bias, pointwise_weight, pointwise_bias, residual] = given;
  const CudaStream stream(x);
  Tensor y = make_result(s);
  if (y.numel() == 0) return y;

  const bool half = x.scalar_type() != ScalarType::Float;
  if (half) {
    // The weights are small: made dense. x and residual are read where they lie.
    const Operands operands{x,
                            torch::stable::contiguous(weight),
                            contiguous_or_none(bias),
                            contiguous_or_none(pointwise_weight),
                            contiguous_or_none(pointwise_bias),
                            residual};
    if (convolve_half_in_any_format(s, operands, options, packed, y, stream.get())) return y;
  }
  const Tensor floats = half ? torch::stable::to(x, ScalarType::Float) : x;
  const Operands operands{floats,
                          as_floats(weight),
                          as_floats_or_none(bias),
                          as_floats_or_none(pointwise_weight),
                          as_floats_or_none(pointwise_bias),
                          floats_where_they_lie(residual)};
  if (!half) {
    convolve_float32(s, operands, options, y, stream.get());
    return y;
  }
  Tensor wide = empty_on_device_of(x, s.output(), ScalarType::Float, followed_format(y));
  convolve_float32(s, operands, options, wide, stream.get());
  torch::stable::copy_(y, wide);
  return y;
}

Tensor group_pointwise_conv3d_cuda(const Tensor& x, const Tensor& weight,
                                   const OptionalTensor& bias,
                                   const OptionalTensor& pointwise_weight,
                                   const OptionalTensor& pointwise_bias,
                                   const OptionalTensor& residual, int64_t groups, int64_t stride,
                                   bool relu, bool pointwise_relu, bool residual_relu) {
  return convolve({x, weight, bias, pointwise_weight, pointwise_bias, residual},
                  {groups, stride, relu, pointwise_relu, residual_relu}, nullptr,
                  [&](const GroupPointwiseConv3dSizes& s) {
                    return empty_on_device_of(x, s.output(), x.scalar_type(), followed_format(x));
                  });
}

void group_pointwise_conv3d_out_cuda(const Tensor& x, const Tensor& weight,
                                     const OptionalTensor& bias,
                                     const OptionalTensor& pointwise_weight,
                                     const OptionalTensor& pointwise_bias,
                                     const OptionalTensor& residual, int64_t groups, int64_t stride,
                                     bool relu, bool pointwise_relu, bool residual_relu,
                                     Tensor out) {
  const Operands operands{x, weight, bias, pointwise_weight, pointwise_bias, residual};
  convolve(operands, {groups, stride, relu, pointwise_relu, residual_relu}, nullptr,
           [&](const GroupPointwiseConv3dSizes& s) {
             check_out_in_any_format("group_pointwise_conv3d", out, x, s.output());
             check_group_pointwise_conv3d_apart(out, operands);
             return out;
           });
}

void group_pointwise_conv3d_packed_cuda(const Tensor& x, const Tensor& weight,
                                        const OptionalTensor& bias,
                                        const OptionalTensor& pointwise_weight,
                                        const OptionalTensor& pointwise_bias, const Tensor& packed,
                                        int64_t groups, int64_t stride, bool relu,
                                        bool pointwise_relu, Tensor out) {
  check_device("group_pointwise_conv3d", packed, "packed", x, "x");
  check(packed.scalar_type() == ScalarType::Byte && is_dense(packed, {0}) &&
            reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0,
        "group_pointwise_conv3d: packed must be what pack_group_pointwise_conv3d made");
  const Operands operands{x, weight, bias, pointwise_weight, pointwise_bias, std::nullopt};
  convolve(operands, {groups, stride, relu, pointwise_relu, false}, &packed,
           [&](const GroupPointwiseConv3dSizes& s) {
             check_out_in_any_format("group_pointwise_conv3d", out, x, s.output());
             check_group_pointwise_conv3d_apart(out, operands);
             check_apart("group_pointwise_conv3d", {"out", &out}, {{"packed", &packed}});
             return out;
           });
}

Tensor pack_group_pointwise_conv3d_cuda(const Tensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& pointwise_weight,
                                        const OptionalTensor& pointwise_bias, int64_t groups,
                                        int64_t stride) {
  check(weight.dim() == 5 && groups >= 1,
        "pack_group_pointwise_conv3d: weight must be 5-D and groups positive");
  const CudaStream stream(weight);
  const bool half = weight.scalar_type() != ScalarType::Float;
  // One voxel of these channels: only the sizes of the layer matter.
  Tensor x =
      empty_on_device_of(weight, {1, weight.size(1) * groups, 1, 1, 1}, weight.scalar_type());
  const Operands operands{x,
                          torch::stable::contiguous(weight),
                          contiguous_or_none(bias),
                          contiguous_or_none(pointwise_weight),
                          contiguous_or_none(pointwise_bias),
                          std::nullopt};
  const Options options{groups, stride, false, false, false};
  const GroupPointwiseConv3dSizes s = check_group_pointwise_conv3d(operands, options);
  const auto p = half_params_of(s, operands, options, x);
  cuda::DeviceLimits limits;
  STD_CUDA_CHECK(cuda::device_limits(&limits));
  const cuda::ResidentLayer layer =
      half ? cuda::resident_layer(p, limits) : cuda::ResidentLayer::kNone;
  Tensor packed = empty_on_device_of(weight, {cuda::packed_bytes(layer)}, ScalarType::Byte);
  if (layer != cuda::ResidentLayer::kNone)
    STD_CUDA_CHECK(cuda::pack_resident(p, float_type_of(weight), layer, packed.mutable_data_ptr(),
                                       stream.get()));
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CUDA, m) {
  m.impl("group_pointwise_conv3d", TORCH_BOX(&group_pointwise_conv3d_cuda));
  m.impl("group_pointwise_conv3d.out", TORCH_BOX(&group_pointwise_conv3d_out_cuda));
  m.impl("group_pointwise_conv3d.packed", TORCH_BOX(&group_pointwise_conv3d_packed_cuda));
  m.impl("pack_group_pointwise_conv3d", TORCH_BOX(&pack_group_pointwise_conv3d_cuda));
}

}  // namespace gplws
