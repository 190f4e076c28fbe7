// The launchers, as functions that Python can call with flat arguments. Strides and sizes come as
// arrays of numbers in the order of the members of the params structs.
#include <cstdint>
#include <vector>

#include "cuda/focus_search.h"
#include "cuda/group_pointwise_conv3d.h"
#include "cuda/group_pointwise_conv3d_half.h"
#include "cuda/group_pointwise_conv3d_quads.h"
#include "cuda/group_pointwise_conv3d_resident.h"
#include "cuda/memory_format.h"
#include "cuda/up_conv3d.h"

using namespace gplws::cuda;

namespace {

Strides5 strides_from(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4]}; }

// tensors: x, weight, bias, pointwise_weight, pointwise_bias, residual, y; numbers: strides of x,
// residual and y, then the members from `batch` on.
template <class Params>
Params conv_params(void* const* tensors, const int64_t* numbers) {
  Params p{};
  const auto set = [](auto& pointer, void* tensor) {
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(tensor);
  };
  set(p.x, tensors[0]);
  set(p.weight, tensors[1]);
  set(p.bias, tensors[2]);
  set(p.pointwise_weight, tensors[3]);
  set(p.pointwise_bias, tensors[4]);
  set(p.residual, tensors[5]);
  set(p.y, tensors[6]);
  p.x_strides = strides_from(numbers);
  p.residual_strides = strides_from(numbers + 5);
  p.y_strides = strides_from(numbers + 10);
  const int64_t* n = numbers + 15;
  p.batch = n[0];
  p.channels = n[1];
  p.frames = n[2];
  p.height = n[3];
  p.width = n[4];
  p.middle = n[5];
  p.channels_out = n[6];
  p.height_out = n[7];
  p.width_out = n[8];
  p.groups = n[9];
  p.stride = n[10];
  p.pointwise = n[11] != 0;
  p.relu = n[12] != 0;
  p.pointwise_relu = n[13] != 0;
  p.residual_relu = n[14] != 0;
  return p;
}

}  // namespace

#define GPLWS_EXPORT extern "C" __attribute__((visibility("default")))

// `facts` takes what of the plan for threads of four columns a test may want to know; zeros where
// the general kernel does it.
GPLWS_EXPORT int emulate_group_pointwise_conv3d(void* const* tensors, const int64_t* numbers,
                                                int64_t* facts) {
  const auto p = conv_params<GroupPointwiseConv3dParams>(tensors, numbers);
  DeviceLimits limits;
  QuadsPlan plan;
  if (device_limits(&limits) != cudaSuccess) return cudaErrorInvalidValue;
  if (!plan_group_pointwise_conv3d_quads(p, limits, &plan)) plan = QuadsPlan{};
  bool sums_wait = false;
  if (sums_wait_in_result(p, &sums_wait) != cudaSuccess) return cudaErrorInvalidValue;
  const int64_t told[] = {
      plan.frames,        plan.slot_channels, plan.out_channels,   plan.quads,
      plan.rows,          plan.block_slots,   plan.sets,           plan.threads,
      plan.shared_bytes,  plan.tiles,         plan.column_vectors, plan.channel_vectors,
      plan.input_vectors, sums_wait};
  for (const int64_t fact : told) *facts++ = fact;
  return launch_group_pointwise_conv3d(p, nullptr);
}

// Returns CUDA's error, or -1 where these kernels cannot do it. `facts` takes what of the plan a
// test may want to know.
GPLWS_EXPORT int emulate_group_pointwise_conv3d_half(void* const* tensors, const int64_t* numbers,
                                                     int type, int64_t* facts) {
  const auto p = conv_params<GroupPointwiseConv3dHalfParams>(tensors, numbers);
  DeviceLimits limits;
  HalfPlan plan;
  if (device_limits(&limits) != cudaSuccess) return cudaErrorInvalidValue;
  if (!plan_group_pointwise_conv3d_half(p, limits, &plan)) return -1;
  const int64_t told[] = {static_cast<int64_t>(plan.weights),
                          plan.granule,
                          plan.store_bytes,
                          plan.stages,
                          plan.segments,
                          plan.blocks,
                          plan.warps,
                          plan.tile_columns,
                          plan.tile_rows,
                          plan.tiles,
                          plan.chunks,
                          plan.slabs,
                          plan.shared_bytes};
  for (const int64_t fact : told) *facts++ = fact;
  // Scratch comes with garbage in it.
  std::vector<uint4> scratch(static_cast<size_t>(scratch_bytes(plan) / 16),
                             uint4{~0u, ~0u, ~0u, ~0u});
  return launch_group_pointwise_conv3d_half(p, static_cast<FloatType>(type), plan, scratch.data(),
                                            nullptr);
}

// The same for the layers whose sizes are compiled in; only the plan if `launches` is 0.
GPLWS_EXPORT int emulate_resident_conv3d(void* const* tensors, const int64_t* numbers, int type,
                                         int launches, int64_t* facts) {
  const auto p = conv_params<GroupPointwiseConv3dHalfParams>(tensors, numbers);
  DeviceLimits limits;
  ResidentPlan plan;
  if (device_limits(&limits) != cudaSuccess) return cudaErrorInvalidValue;
  if (!plan_resident(p, limits, &plan)) return -1;
  const int64_t told[] = {static_cast<int64_t>(plan.layer), plan.segments.divisor, plan.blocks,
                          plan.tiles, plan.parts};
  for (const int64_t fact : told) *facts++ = fact;
  if (launches == 0) return cudaSuccess;
  std::vector<uint4> packed(static_cast<size_t>(plan.packed_bytes / 16 + 1),
                            uint4{~0u, ~0u, ~0u, ~0u});
  const auto of = static_cast<FloatType>(type);
  const cudaError_t error = pack_resident(p, of, plan.layer, packed.data(), nullptr);
  if (error != cudaSuccess) return error;
  return launch_resident(p, of, plan, packed.data(), false, nullptr);
}

// tensors: x, weight, bias, residual, y; numbers: strides of x, residual and y, batch, channels,
// channels_out, frames, height, width.
GPLWS_EXPORT int emulate_up_conv3d(void* const* tensors, const int64_t* numbers, int type) {
  UpConv3dParams p{};
  p.x = tensors[0];
  p.weight = tensors[1];
  p.bias = tensors[2];
  p.residual = tensors[3];
  p.y = tensors[4];
  p.x_strides = strides_from(numbers);
  p.residual_strides = strides_from(numbers + 5);
  p.y_strides = strides_from(numbers + 10);
  p.batch = numbers[15];
  p.channels = numbers[16];
  p.channels_out = numbers[17];
  p.frames = numbers[18];
  p.height = numbers[19];
  p.width = numbers[20];
  p.type = static_cast<FloatType>(type);
  return launch_up_conv3d(p, nullptr);
}

// tensors: volume, positions, depth, index, peak, confidence; numbers: strides of the volume,
// position_stride, batch, frames, height, width, group_size, radius, refinement, log_scale.
GPLWS_EXPORT int emulate_focus_search(void* const* tensors, const int64_t* numbers, int type) {
  FocusSearchParams p{};
  p.volume = tensors[0];
  p.positions = static_cast<const float*>(tensors[1]);
  p.depth = static_cast<float*>(tensors[2]);
  p.index = static_cast<int64_t*>(tensors[3]);
  p.peak = static_cast<float*>(tensors[4]);
  p.confidence = static_cast<float*>(tensors[5]);
  p.batch_stride = numbers[0];
  p.frame_stride = numbers[1];
  p.row_stride = numbers[2];
  p.column_stride = numbers[3];
  p.position_stride = numbers[4];
  p.batch = numbers[5];
  p.frames = numbers[6];
  p.height = numbers[7];
  p.width = numbers[8];
  p.group_size = numbers[9];
  p.radius = numbers[10];
  p.refinement = static_cast<FocusRefinement>(numbers[11]);
  p.log_scale = numbers[12] != 0;
  p.volume_type = static_cast<FloatType>(type);
  return launch_focus_search(p, nullptr);
}

// tensors: from, to; numbers: batch, channels, frames, pixels.
GPLWS_EXPORT int emulate_change_format(void* const* tensors, const int64_t* numbers, int to_last) {
  const MemoryFormatParams p{tensors[0], tensors[1], numbers[0],
                             numbers[1], numbers[2], numbers[3]};
  return to_last ? launch_to_channels_last(p, nullptr) : launch_to_contiguous(p, nullptr);
}
