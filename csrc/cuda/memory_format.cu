// A block takes some pixels of a frame with all their channels (128 at most) through shared memory:
// both sides are read and written in pieces that lie side by side, as long as possible.
// Neighbouring channels are an odd number of words apart there, so they meet different banks.
#include "cuda/memory_format.h"

#include <algorithm>
#include <climits>

#include "cuda/device.h"
#include "cuda/divider.h"

namespace gplws::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTileValues = 8192;  // of a block: 16 KB, several blocks to a multiprocessor
constexpr int kMinTilePixels = 64;
constexpr int kMaxTileChannels = 128;
constexpr int kPadding = 2;  // values behind the pixels of a channel

struct Plan {
  int tile_channels, tile_pixels;
  int64_t channel_tiles, pixel_tiles, tiles;
};

// kValues values that lie side by side: a word of them, where both sides are aligned.
template <int kValues>
struct Values {
  uint16_t value[kValues];
};

template <int kValues>
__device__ Values<kValues> load_values(const uint16_t* from) {
  if constexpr (kValues == 1) {
    return {{*from}};
  } else {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
    return {{static_cast<uint16_t>(word), static_cast<uint16_t>(word >> 16)}};
  }
}

template <int kValues>
__device__ void store_values(uint16_t* to, const Values<kValues>& values) {
  if constexpr (kValues == 1) {
    *to = values.value[0];
  } else {
    *reinterpret_cast<uint32_t*>(to) = values.value[0] | static_cast<uint32_t>(values.value[1])
                                                             << 16;
  }
}

template <int kValues, bool kToLast>
__global__ void __launch_bounds__(kThreads)
    change_format_kernel(const __grid_constant__ MemoryFormatParams p,
                         const __grid_constant__ Plan plan,
                         const __grid_constant__ Divider by_units,
                         const __grid_constant__ Divider by_channels) {
  auto* shared = reinterpret_cast<uint16_t*>(dynamic_shared_memory());
  const int pitch = plan.tile_pixels + kPadding;
  const int units = plan.tile_channels * plan.tile_pixels / kValues;
  const auto* from = static_cast<const uint16_t*>(p.from);
  auto* to = static_cast<uint16_t*>(p.to);
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    int64_t rest = tile;
    const int64_t first_pixel = rest % plan.pixel_tiles * plan.tile_pixels;
    rest /= plan.pixel_tiles;
    const int64_t first_channel = rest % plan.channel_tiles * plan.tile_channels;
    const int64_t image = rest / plan.channel_tiles;
    const int pixels =
        static_cast<int>(min(static_cast<int64_t>(plan.tile_pixels), p.pixels - first_pixel));
    const int channels =
        static_cast<int>(min(static_cast<int64_t>(plan.tile_channels), p.channels - first_channel));
    const int64_t frame = image % p.frames, batch = image / p.frames;
    const int64_t plane_step = p.frames * p.pixels;  // from one channel to the next
    const int64_t planar =
        ((batch * p.channels + first_channel) * p.frames + frame) * p.pixels + first_pixel;
    const int64_t last = (image * p.pixels + first_pixel) * p.channels + first_channel;

    // Neighbouring threads have neighbouring pixels of a channel.
    const auto for_planes = [&](auto action) {
      for (int i = static_cast<int>(threadIdx.x); i < units; i += kThreads) {
        const int channel = by_units.quotient(i);
        const int pixel = (i - channel * by_units.divisor) * kValues;
        if (channel < channels && pixel < pixels)
          action(planar + channel * plane_step + pixel, shared + channel * pitch + pixel);
      }
    };
    // Neighbouring threads have neighbouring channels of a pixel. The second value of a pair may be
    // the first one of the next pixel.
    const auto for_pixels = [&](auto action) {
      for (int i = static_cast<int>(threadIdx.x); i < units; i += kThreads) {
        const int pixel = by_channels.quotient(i * kValues);
        const int channel = i * kValues - pixel * plan.tile_channels;
        if (pixel >= pixels || channel >= channels) continue;
        uint16_t* places[2] = {shared + channel * pitch + pixel, nullptr};
        places[1] = channel + 1 < plan.tile_channels ? places[0] + pitch : shared + pixel + 1;
        action(last + pixel * p.channels + channel, places);
      }
    };

    if constexpr (kToLast) {
      for_planes([&](int64_t at, uint16_t* place) {
        store_values(place, load_values<kValues>(from + at));
      });
      __syncthreads();
      for_pixels([&](int64_t at, uint16_t* const* places) {
        Values<kValues> values;
        for (int j = 0; j < kValues; ++j) values.value[j] = *places[j];
        store_values(to + at, values);
      });
    } else {
      for_pixels([&](int64_t at, uint16_t* const* places) {
        const Values<kValues> values = load_values<kValues>(from + at);
        for (int j = 0; j < kValues; ++j) *places[j] = values.value[j];
      });
      __syncthreads();
      for_planes(
          [&](int64_t at, uint16_t* place) { store_values(to + at, load_values<kValues>(place)); });
    }
    __syncthreads();
  }
}

Plan plan_of(const MemoryFormatParams& p) {
  Plan plan;
  plan.tile_channels = static_cast<int>(std::min<int64_t>(p.channels, kMaxTileChannels));
  plan.tile_pixels =
      std::max(kTileValues / plan.tile_channels / kMinTilePixels, 1) * kMinTilePixels;
  plan.channel_tiles = (p.channels + plan.tile_channels - 1) / plan.tile_channels;
  plan.pixel_tiles = (p.pixels + plan.tile_pixels - 1) / plan.tile_pixels;
  plan.tiles = p.batch * p.frames * plan.channel_tiles * plan.pixel_tiles;
  return plan;
}

template <bool kToLast>
cudaError_t launch_change(const MemoryFormatParams& p, cudaStream_t stream) {
  const Plan plan = plan_of(p);
  // All pairs are aligned words: of pixels of a plane, and of what lies side by side in a tile.
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint32_t) == 0;
  };
  const bool pairs = p.pixels % 2 == 0 && (plan.channel_tiles == 1 || p.channels % 2 == 0) &&
                     aligned(p.from) && aligned(p.to);
  const int values = pairs ? 2 : 1;
  const auto kernel = pairs ? change_format_kernel<2, kToLast> : change_format_kernel<1, kToLast>;
  const int shared_bytes = plan.tile_channels * (plan.tile_pixels + kPadding) * 2;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(plan.tiles, INT_MAX)));
  return launch(kernel, grid, kThreads, shared_bytes, stream, p, plan,
                Divider::of(plan.tile_pixels / values), Divider::of(plan.tile_channels));
}

}  // namespace

cudaError_t launch_to_channels_last(const MemoryFormatParams& params, cudaStream_t stream) {
  return launch_change<true>(params, stream);
}

cudaError_t launch_to_contiguous(const MemoryFormatParams& params, cudaStream_t stream) {
  return launch_change<false>(params, stream);
}

}  // namespace gplws::cuda
