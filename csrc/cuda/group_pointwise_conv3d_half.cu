// How group_pointwise_conv3d is cut into blocks, warps and matrix products for tensor cores.
#include "cuda/group_pointwise_conv3d_half.h"

#include <algorithm>
#include <climits>

#include "cuda/device.h"

namespace gplws::cuda {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kPixels = 16;  // rows of a product
constexpr int kMaxTiles = 3;
constexpr int64_t kMaxChannels = 4096;  // beyond it, no plan fits
// Loading an input frame and waiting for it costs about half of computing one.
constexpr double kFrameOverhead = 0.5;

template <class Number>
Number ceil_div(Number a, Number b) {
  return (a + b - 1) / b;
}

template <class Number>
Number round_up(Number a, Number b) {
  return ceil_div(a, b) * b;
}

// Bytes that neighbouring pixels lie apart: an odd number of 16, so that eight of them meet all
// banks of shared memory.
int pixel_pitch(int chunks) { return (chunks % 2 == 0 ? chunks + 1 : chunks) * 16; }

// Largest of 16, 8, 4 and 2 that divides all of these numbers of bytes.
template <class... Bytes>
int common_alignment(Bytes... bytes) {
  uint64_t all = 16;
  ((all |= static_cast<uint64_t>(bytes)), ...);
  return static_cast<int>(all & (~all + 1));
}

// How many groups make a slab: as many as waste the fewest products.
int64_t groups_of_slab(int64_t groups, int64_t inputs, int64_t outputs) {
  int64_t best = 1, best_cost = 0;
  for (int64_t count = 1; count <= groups && count <= 8; ++count) {
    if (groups % count != 0) continue;
    const int64_t cost = groups / count * round_up(count * inputs, int64_t{8}) *
                         round_up(count * outputs, int64_t{8});
    if (best_cost == 0 || cost < best_cost) {
      best = count;
      best_cost = cost;
    }
  }
  return best;
}

bool plan_channels(const GroupPointwiseConv3dHalfParams& p, HalfPlan& plan) {
  if (p.channels == 0 || p.middle == 0 || p.channels > kMaxChannels || p.middle > kMaxChannels ||
      p.channels_out > kMaxChannels)
    return false;
  const int64_t inputs = p.channels / p.groups, outputs = p.middle / p.groups;
  const int64_t count = groups_of_slab(p.groups, inputs, outputs);
  plan.slab_channels = static_cast<int>(count * inputs);
  plan.slab_outputs = static_cast<int>(count * outputs);
  plan.chunks = ceil_div(plan.slab_channels, 8);
  const int tiles = ceil_div(plan.slab_outputs, 8);
  plan.parts = ceil_div(tiles, kMaxTiles);
  plan.tiles = ceil_div(tiles, plan.parts);
  plan.slabs = static_cast<int>(p.groups / count) * plan.parts;
  plan.pairs = ceil_div(3 * plan.chunks, 2);
  plan.rows = p.stride == 1 && plan.tiles < 3 ? 4 : 2;

  // The pointwise conv needs all channels of the middle in one block.
  if (p.pointwise && plan.slabs > kMaxWarps) return false;

  plan.middle_pairs = plan.out_tiles = plan.out_group = plan.middle_bytes = 0;
  if (p.pointwise) {
    plan.middle_pairs = ceil_div(plan.slabs * plan.tiles, 2);
    plan.middle_bytes = pixel_pitch(2 * plan.middle_pairs);
    plan.out_group = p.channels_out > 16 ? 4 : p.channels_out > 8 ? 2 : 1;
    plan.out_tiles = static_cast<int>(round_up(p.channels_out, int64_t{8} * plan.out_group)) / 8;
  }
  plan.conv_words = int64_t{plan.slabs} * plan.pairs * 9 * plan.tiles * kLanesPerWarp * 2;
  plan.pointwise_words = int64_t{plan.middle_pairs} * plan.out_tiles * kLanesPerWarp * 2;
  return true;
}

// Gives a block this many slabs: all, or whole slabs of input, or parts of one that divide evenly.
bool share_slabs(const GroupPointwiseConv3dHalfParams& p, HalfPlan& plan, int count) {
  if (count > plan.slabs || (p.pointwise && count != plan.slabs)) return false;
  if (count != plan.slabs && count % plan.parts != 0 && plan.parts % count != 0) return false;
  plan.block_slabs = count;
  plan.block_inputs = ceil_div(count, plan.parts);
  plan.slab_sets = ceil_div(plan.slabs, count);
  plan.pixel_bytes = pixel_pitch(plan.block_inputs * plan.chunks);
  return true;
}

// How x may be read and y written: by pieces of so many bytes.
void plan_accesses(const GroupPointwiseConv3dHalfParams& p, HalfPlan& plan) {
  plan.channels_nearest = p.x_strides.channel == 1;
  plan.granule = 2;
  if (plan.channels_nearest || p.channels == 1)
    plan.granule = common_alignment(reinterpret_cast<uintptr_t>(p.x), 2 * plan.slab_channels,
                                    2 * p.channels, 2 * p.x_strides.batch, 2 * p.x_strides.frame,
                                    2 * p.x_strides.row, 2 * p.x_strides.column);
  plan.store_bytes = 2;
  if (p.y_strides.channel == 1)
    plan.store_bytes = common_alignment(
        reinterpret_cast<uintptr_t>(p.y), p.pointwise ? 0 : 2 * plan.slab_outputs,
        2 * p.y_strides.batch, 2 * p.y_strides.frame, 2 * p.y_strides.row, 2 * p.y_strides.column);
}

struct Arrangement {
  int sets_w, sets_h;
};

// Lays out the shared memory of a block of this arrangement; false where there is not enough.
bool fits(const GroupPointwiseConv3dHalfParams& p, const DeviceLimits& limits, HalfPlan& plan,
          Arrangement arrangement, WeightPlace place, int stages) {
  const int stride = static_cast<int>(p.stride);
  plan.sets_w = arrangement.sets_w;
  plan.sets_h = arrangement.sets_h;
  plan.warps = plan.sets_w * plan.sets_h * plan.block_slabs;
  plan.tile_columns = plan.sets_w * kPixels;
  plan.tile_rows = plan.sets_h * plan.rows;
  plan.input_rows = (plan.tile_rows - 1) * stride + 3;
  plan.input_columns = (plan.tile_columns - 1) * stride + 3;
  plan.odd_columns = (plan.input_columns + 1) / 2;
  plan.positions = plan.input_columns;
  plan.weights = place;
  plan.stages = stages;
  const int64_t stage = int64_t{plan.input_rows} * plan.positions * plan.pixel_bytes;
  const int64_t conv = place == WeightPlace::kShared
                           ? int64_t{4} * plan.conv_words / plan.slabs * plan.block_slabs
                           : 0;
  const int64_t pointwise = place == WeightPlace::kGlobal ? 0 : 4 * plan.pointwise_words;
  const int64_t middle = int64_t{plan.tile_rows} * plan.tile_columns * plan.middle_bytes;
  const int64_t total = conv + pointwise + middle + stages * stage;
  if (total > limits.shared_bytes) return false;
  plan.stage_bytes = static_cast<int>(stage);
  plan.weight_offset = 0;
  plan.pointwise_offset = static_cast<int>(conv);
  plan.middle_offset = static_cast<int>(conv + pointwise);
  plan.stage_offset = static_cast<int>(conv + pointwise + middle);
  plan.shared_bytes = static_cast<int>(total);
  plan.granted_bytes = limits.shared_bytes;
  return true;
}

bool plan_pixels(const GroupPointwiseConv3dHalfParams& p, const DeviceLimits& limits,
                 HalfPlan& plan) {
  const bool in_registers = p.stride == 1 && plan.chunks == 1 && plan.tiles == 1;
  const WeightPlace first = in_registers ? WeightPlace::kRegisters : WeightPlace::kShared;
  // The most slabs in a block read x the fewest times. Large tiles share their borders; where the
  // image is small they would stay empty.
  constexpr Arrangement kArrangements[] = {{2, 4}, {2, 2}, {1, 4}, {1, 2}, {2, 1}, {1, 1}};
  for (const WeightPlace place : {first, WeightPlace::kGlobal})
    for (int slabs = kMaxWarps; slabs > 0; --slabs) {
      if (!share_slabs(p, plan, slabs)) continue;
      for (const Arrangement& a : kArrangements) {
        if (a.sets_w * a.sets_h * slabs > kMaxWarps) continue;
        if (a.sets_w > 1 && p.width_out <= kPixels) continue;
        if (a.sets_h > 1 && p.height_out <= (a.sets_h / 2) * plan.rows) continue;
        for (const int stages : {3, 2})
          if (fits(p, limits, plan, a, place, stages)) return true;
      }
    }
  return false;
}

// Cuts the frames into segments where there would be too few blocks: each segment reads the frame
// before and the one behind it once more.
bool plan_blocks(const GroupPointwiseConv3dHalfParams& p, const DeviceLimits& limits,
                 HalfPlan& plan) {
  plan.tiles_w = ceil_div(p.width_out, int64_t{plan.tile_columns});
  plan.tiles_h = ceil_div(p.height_out, int64_t{plan.tile_rows});
  const int64_t tiles = p.batch * plan.tiles_h * plan.tiles_w * plan.slab_sets;
  const int64_t resident = limits.shared_memory / (plan.shared_bytes + 1024);
  const int64_t per_processor = resident < 1 ? 1 : resident < 2 ? resident : 2;
  const int64_t slots = limits.processors * per_processor;
  double best_cost = 0.0;
  for (int64_t segments = 1; segments <= p.frames && segments <= 64; ++segments) {
    const int64_t frames = ceil_div(p.frames, segments);
    const int64_t count = ceil_div(p.frames, frames);
    const double waves = static_cast<double>(ceil_div(tiles * count, slots));
    const double cost =
        waves * (static_cast<double>(frames) + (static_cast<double>(frames) + 2) * kFrameOverhead);
    if (segments == 1 || cost < best_cost) {
      best_cost = cost;
      plan.segments = count;
      plan.frames_per_segment = frames;
    }
  }
  plan.blocks = tiles * plan.segments;
  return plan.blocks <= INT_MAX;
}

// Stands for all kernels, which are compiled for the same architectures.
__global__ void any_kernel() {}

}  // namespace

bool plan_group_pointwise_conv3d_half(const GroupPointwiseConv3dHalfParams& p,
                                      const DeviceLimits& limits, HalfPlan* plan) {
  *plan = HalfPlan{};
  if (limits.capability < 80 || !plan_channels(p, *plan)) return false;
  plan_accesses(p, *plan);
  return plan_pixels(p, limits, *plan) && plan_blocks(p, limits, *plan);
}

cudaError_t device_limits(DeviceLimits* limits) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&limits->processors, cudaDevAttrMultiProcessorCount);
  ask(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&limits->shared_memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  int code = 10 * major + minor;
  if (error == cudaSuccess) error = code_capability(any_kernel, &code);
  limits->capability = std::min(10 * major + minor, code);
  return error;
}

int64_t scratch_bytes(const HalfPlan& plan) { return 4 * (plan.conv_words + plan.pointwise_words); }

cudaError_t launch_group_pointwise_conv3d_half(const GroupPointwiseConv3dHalfParams& p,
                                               FloatType type, const HalfPlan& plan, void* scratch,
                                               cudaStream_t stream) {
  return type == FloatType::kBfloat16 ? launch_half<Bfloat16>(p, plan, scratch, stream)
                                      : launch_half<Float16>(p, plan, scratch, stream);
}

}  // namespace gplws::cuda
