// Body of the grouped 3x3x3 conv + pointwise conv, compiled once per ISA (GPLWS_ISA).
//
// One vector holds neighbouring pixels of a row. A task walks down the frames of its tile and keeps
// the three frames that the 3x3x3 window needs in a zero-padded scratch ring, so the inner loop has
// no border cases:
//
//   scratch[slot 3][channel][row][half stride][column]   slot = frame mod 3
//
// With stride 2 the even and the odd columns of a row are stored apart ("halves"), so that every
// tap reads consecutive floats there too. The inner loop is the same for both convs: it sums `taps`
// x `channels` products into a register block of K output channels x V vectors.
#include "group_pointwise_conv3d.h"

#include <stdint.h>
#include <string.h>

namespace gplws::cpu::GPLWS_ISA {

#include "vec.h"

namespace {

constexpr int kTaps = 27;
constexpr int kMaxVectors = 8;                 // pixels per row chunk: kMaxVectors * kLanes
constexpr int64_t kScratchFloats = 96 * 1024;  // 384 KiB: the ring should stay in L2
constexpr int64_t kMaxTileHeight = 16;

struct Geometry {
  int64_t row;      // floats per row of scratch, all halves
  int64_t half;     // floats per half
  int64_t channel;  // floats per channel
  int64_t slot;     // floats per ring slot
  int64_t mid;      // floats of the middle result: middle x chunk
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

Geometry geometry(const GroupPointwiseConv3dParams& p, int64_t tile_height, int64_t tile_width) {
  Geometry g;
  // One vector of padding on the left keeps the middle tap aligned; one on the right takes the halo
  // and the lanes of the last, partly used vector.
  g.half = (ceil_div(tile_width, kLanes) + 2) * kLanes;
  g.row = g.half * p.stride;
  g.channel = g.row * ((tile_height - 1) * p.stride + 3);
  g.slot = g.channel * p.channels;
  g.mid = p.pointwise ? p.middle * kMaxVectors * kLanes : 0;
  return g;
}

// Output channels are computed in blocks; a block and its vectors share the accumulators.
constexpr int vectors_of(int block) {
  int v = 1;
  while (2 * v * block <= kAccumulators && 2 * v <= kMaxVectors) v *= 2;
  return v;
}

int next_block(int64_t channels) {
  constexpr int kBlocks[] = {12, 8, 6, 4, 3, 2};
  for (int block : kBlocks)
    if (channels >= block) return block;
  return 1;
}

// Weights of `rows` output channels, block after block: [block][input channel][tap][K].
float* pack_rows(const float* weight, int64_t rows, int64_t channels, int taps, float* out) {
  for (int64_t k0 = 0; k0 < rows;) {
    const int block = next_block(rows - k0);
    for (int64_t ct = 0; ct < channels * taps; ++ct)
      for (int k = 0; k < block; ++k) *out++ = weight[(k0 + k) * channels * taps + ct];
    k0 += block;
  }
  return out;
}

int64_t packed_size(const GroupPointwiseConv3dParams& p) {
  return p.middle * (p.channels / p.groups) * kTaps + (p.pointwise ? p.channels_out * p.middle : 0);
}

void pack(const GroupPointwiseConv3dParams& p, const float* weight, const float* pointwise_weight,
          float* packed) {
  const int64_t inputs = p.channels / p.groups, outputs = p.middle / p.groups;
  for (int64_t g = 0; g < p.groups; ++g)
    packed = pack_rows(weight + g * outputs * inputs * kTaps, outputs, inputs, kTaps, packed);
  if (p.pointwise) pack_rows(pointwise_weight, p.channels_out, p.middle, 1, packed);
}

GroupPointwiseConv3dPlan plan(const GroupPointwiseConv3dParams& p, int64_t threads) {
  GroupPointwiseConv3dPlan t;
  const int64_t chunk = kMaxVectors * kLanes;
  // Equal tiles rather than full ones and a narrow rest.
  t.tile_width = ceil_div(ceil_div(p.width_out, ceil_div(p.width_out, chunk)), kLanes) * kLanes;
  while (t.tile_width > kLanes && 3 * geometry(p, 1, t.tile_width).slot > kScratchFloats)
    t.tile_width = ceil_div(t.tile_width / 2, kLanes) * kLanes;
  t.tile_height = 1;
  while (t.tile_height < min64(kMaxTileHeight, p.height_out) &&
         3 * geometry(p, t.tile_height + 1, t.tile_width).slot <= kScratchFloats)
    ++t.tile_height;
  t.tiles_w = ceil_div(p.width_out, t.tile_width);
  t.tiles_h = ceil_div(p.height_out, t.tile_height);
  t.tile_height = ceil_div(p.height_out, t.tiles_h);
  // Cutting along the frames costs two extra frames of copying a piece, so only to feed all
  // threads.
  const int64_t tiles = p.batch * t.tiles_h * t.tiles_w;
  t.tiles_n = min64(p.frames, max64(1, ceil_div(2 * threads, tiles)));
  t.tile_frames = ceil_div(p.frames, t.tiles_n);
  t.tiles_n = ceil_div(p.frames, t.tile_frames);
  t.tasks = tiles * t.tiles_n;
  const Geometry g = geometry(p, t.tile_height, t.tile_width);
  t.scratch_floats = 3 * g.slot + g.mid;
  return t;
}

// acc[k][v] += sum over channels and taps of w[channel][tap][k] * x[channel][offset(tap) + v].
template <int K, int V>
GPLWS_INLINE void accumulate(const float* x, int64_t channel_stride, int64_t channels,
                             const int64_t* offsets, int taps, const float* w,
                             int64_t w_channel_stride, Vec (&acc)[K][V]) {
  for (int64_t c = 0; c < channels; ++c) {
    const float* wt = w;
    for (int t = 0; t < taps; ++t) {
      const float* xt = x + offsets[t];
      if constexpr (K <= V) {
        Vec wk[K];
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) wk[k] = broadcast(wt[k]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          const Vec xv = load_once(xt + v * kLanes);
#pragma GCC unroll 16
          for (int k = 0; k < K; ++k) acc[k][v] += wk[k] * xv;
        }
      } else {
        Vec xv[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) xv[v] = load_once(xt + v * kLanes);
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) {
          const Vec wk = broadcast(wt[k]);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) acc[k][v] += wk * xv[v];
        }
      }
      wt += K;
    }
    x += channel_stride;
    w += w_channel_stride;
  }
}

// Where a block of output channels goes, and what happens to it on the way.
struct Output {
  float* y;
  int64_t channel_stride;
  const float* bias;      // null: none
  const float* residual;  // null: none; strides of y
  bool relu, residual_relu;
};

template <typename Residual>
GPLWS_INLINE Vec finish(Vec v, const Output& out, Residual residual) {
  if (out.relu) v = relu(v);
  if (out.residual) {
    v += residual();
    if (out.residual_relu) v = relu(v);
  }
  return v;
}

template <int K, int V>
void conv_block(const float* x, int64_t channel_stride, int64_t channels, const int64_t* offsets,
                int taps, const float* w, int64_t w_channel_stride, const Output& out,
                int64_t pixels) {
  Vec acc[K][V];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    const Vec b = broadcast(out.bias ? out.bias[k] : 0.0f);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[k][v] = b;
  }
  accumulate<K, V>(x, channel_stride, channels, offsets, taps, w, w_channel_stride, acc);
  if (pixels >= V * kLanes) {
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const int64_t at = k * out.channel_stride + v * kLanes;
        store(out.y + at, finish(acc[k][v], out, [&] { return load(out.residual + at); }));
      }
    }
    return;
  }
  // The end of a row: the last vector is only partly used.
  for (int k = 0; k < K; ++k)
    for (int v = 0; v < V; ++v) {
      const int64_t at = k * out.channel_stride + v * kLanes;
      const int64_t left = pixels - v * kLanes;
      const int count = left < kLanes ? static_cast<int>(left) : kLanes;
      const auto residual = [&] { return load_first(out.residual + at, count, 0.0f); };
      store_first(out.y + at, finish(acc[k][v], out, residual), count);
    }
}

// One block of K output channels over a row chunk of `pixels` pixels: V vectors at a time, then the
// rest in halves.
template <int K, int V = vectors_of(K)>
void conv_row(const float* x, int64_t channel_stride, int64_t channels, const int64_t* offsets,
              int taps, const float* w, int64_t w_channel_stride, Output out, int64_t pixels) {
  while (pixels > (V - 1) * kLanes) {
    conv_block<K, V>(x, channel_stride, channels, offsets, taps, w, w_channel_stride, out, pixels);
    x += V * kLanes;
    out.y += V * kLanes;
    if (out.residual) out.residual += V * kLanes;
    pixels -= V * kLanes;
  }
  if constexpr (V > 1) {
    if (pixels > 0)
      conv_row<K, V / 2>(x, channel_stride, channels, offsets, taps, w, w_channel_stride, out,
                         pixels);
  }
}

// `rows` output channels, block after block, in the order of `pack_rows`.
void conv_rows(const float* x, int64_t channel_stride, int64_t channels, const int64_t* offsets,
               int taps, int skipped_taps, int packed_taps, const float* w, int64_t rows,
               Output out, int64_t pixels) {
  for (int64_t k0 = 0; k0 < rows;) {
    const int block = next_block(rows - k0);
    const float* wb = w + skipped_taps * block;
    const int64_t w_channel_stride = packed_taps * block;
    switch (block) {
#define GPLWS_BLOCK(K)                                                                          \
  case K:                                                                                       \
    conv_row<K>(x, channel_stride, channels, offsets, taps, wb, w_channel_stride, out, pixels); \
    break;
      GPLWS_BLOCK(1)
      GPLWS_BLOCK(2)
      GPLWS_BLOCK(3)
      GPLWS_BLOCK(4)
      GPLWS_BLOCK(6)
      GPLWS_BLOCK(8)
      GPLWS_BLOCK(12)
#undef GPLWS_BLOCK
    }
    k0 += block;
    w += channels * packed_taps * block;
    out.y += block * out.channel_stride;
    if (out.bias) out.bias += block;
    if (out.residual) out.residual += block * out.channel_stride;
  }
}

// The part of the image that one tile needs, and where it goes.
struct Tile {
  int64_t image, h0, w0, height, width;  // of the output
};

// Copies one row of the input, zero outside the image, into its halves of the scratch row.
void copy_row(const float* src, int64_t src_width, int64_t w0, int64_t stride, int64_t half,
              float* dst) {
  if (stride == 1) {
    // dst[i] = src[w0 - kLanes + i]; only one column of each padding is ever read, all must be
    // finite.
    const int64_t first = w0 - kLanes;
    const int64_t begin = first < 0 ? -first : 0;
    const int64_t end = max64(begin, min64(half, src_width - first));
    memset(dst, 0, begin * sizeof(float));
    memcpy(dst + begin, src + first + begin, (end - begin) * sizeof(float));
    memset(dst + end, 0, (half - end) * sizeof(float));
    return;
  }
  // even[i] = src[2 (w0 - kLanes + i)], odd[i] the column after it.
  float* even = dst;
  float* odd = dst + half;
  const int64_t first = w0 - kLanes;
  const int64_t begin = first < 0 ? -first : 0;
  const int64_t both = max64(begin, min64(half, src_width / 2 - first));
  memset(even, 0, begin * sizeof(float));
  memset(odd, 0, begin * sizeof(float));
  const float* pairs = src + 2 * first;
  for (int64_t i = begin; i < both; ++i) {
    even[i] = pairs[2 * i];
    odd[i] = pairs[2 * i + 1];
  }
  memset(even + both, 0, (half - both) * sizeof(float));
  memset(odd + both, 0, (half - both) * sizeof(float));
  if (src_width % 2 != 0 && both < half && first + both == src_width / 2)
    even[both] = src[src_width - 1];
}

void copy_frame(const GroupPointwiseConv3dParams& p, const Geometry& g, const Tile& tile,
                int64_t frame, float* slot) {
  const int64_t rows = (tile.height - 1) * p.stride + 3;
  for (int64_t c = 0; c < p.channels; ++c) {
    const float* plane =
        p.x + ((tile.image * p.channels + c) * p.frames + frame) * p.height * p.width;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = tile.h0 * p.stride - 1 + r;
      float* dst = slot + c * g.channel + r * g.row;
      if (h < 0 || h >= p.height)
        memset(dst, 0, g.row * sizeof(float));
      else
        copy_row(plane + h * p.width, p.width, tile.w0, p.stride, g.half, dst);
    }
  }
}

// Offsets of the 27 taps for output frame n, relative to a row's first used column.
void tap_offsets(const GroupPointwiseConv3dParams& p, const Geometry& g, int64_t n,
                 int64_t* offsets) {
  for (int kn = 0; kn < 3; ++kn)
    for (int kh = 0; kh < 3; ++kh)
      for (int kw = 0; kw < 3; ++kw) {
        int64_t column = kw - 1;
        if (p.stride == 2) column = kw == 1 ? 0 : g.half - (kw == 0 ? 1 : 0);
        *offsets++ = ((n + kn + 2) % 3) * g.slot + kh * g.row + column;
      }
}

void run_tile(const GroupPointwiseConv3dParams& p, const Geometry& g, const Tile& tile, int64_t n0,
              int64_t n1, float* scratch) {
  float* mid = scratch + 3 * g.slot;
  const int64_t inputs = p.channels / p.groups, outputs = p.middle / p.groups;
  const int64_t plane = p.height_out * p.width_out, volume = p.frames * plane;
  const int64_t chunk = kMaxVectors * kLanes;
  const float* pointwise = p.packed + p.middle * inputs * kTaps;

  for (int64_t n = max64(n0 - 1, 0); n < min64(n0 + 1, p.frames); ++n)
    copy_frame(p, g, tile, n, scratch + (n % 3) * g.slot);
  for (int64_t n = n0; n < n1; ++n) {
    if (n + 1 < p.frames) copy_frame(p, g, tile, n + 1, scratch + ((n + 1) % 3) * g.slot);
    int64_t offsets[kTaps];
    tap_offsets(p, g, n, offsets);
    // Frames outside the stack are zero: their taps are left out.
    const int skipped = n == 0 ? 9 : 0;
    const int taps = kTaps - skipped - (n == p.frames - 1 ? 9 : 0);

    for (int64_t r = 0; r < tile.height; ++r)
      for (int64_t w = 0; w < tile.width; w += chunk) {
        const int64_t pixels = min64(chunk, tile.width - w);
        const float* x = scratch + r * p.stride * g.row + kLanes + w;
        const int64_t at = tile.image * p.channels_out * volume + n * plane +
                           (tile.h0 + r) * p.width_out + tile.w0 + w;
        const Output last{p.y + at,
                          volume,
                          p.pointwise ? p.pointwise_bias : p.bias,
                          p.residual ? p.residual + at : nullptr,
                          p.pointwise ? p.pointwise_relu : p.relu,
                          p.residual_relu};
        for (int64_t group = 0; group < p.groups; ++group) {
          const int64_t k0 = group * outputs;
          Output out = last;
          if (p.pointwise) {
            out = Output{mid + k0 * chunk, chunk, p.bias, nullptr, p.relu, false};
          } else {
            out.y += k0 * volume;
            if (out.residual) out.residual += k0 * volume;
          }
          if (out.bias) out.bias += k0;
          conv_rows(x + group * inputs * g.channel, g.channel, inputs, offsets + skipped, taps,
                    skipped, kTaps, p.packed + k0 * inputs * kTaps, outputs, out, pixels);
        }
        if (p.pointwise) {
          const int64_t here = 0;
          conv_rows(mid, chunk, p.middle, &here, 1, 0, 1, pointwise, p.channels_out, last, pixels);
        }
      }
  }
}

void run(const GroupPointwiseConv3dParams& p, const GroupPointwiseConv3dPlan& plan, int64_t begin,
         int64_t end, float* scratch) {
  const Geometry g = geometry(p, plan.tile_height, plan.tile_width);
  for (int64_t task = begin; task < end; ++task) {
    int64_t i = task;
    const int64_t tn = i % plan.tiles_n;
    i /= plan.tiles_n;
    const int64_t tw = i % plan.tiles_w;
    i /= plan.tiles_w;
    const int64_t th = i % plan.tiles_h;
    Tile tile;
    tile.image = i / plan.tiles_h;
    tile.h0 = th * plan.tile_height;
    tile.w0 = tw * plan.tile_width;
    tile.height = min64(plan.tile_height, p.height_out - tile.h0);
    tile.width = min64(plan.tile_width, p.width_out - tile.w0);
    const int64_t n0 = tn * plan.tile_frames;
    run_tile(p, g, tile, n0, min64(n0 + plan.tile_frames, p.frames), scratch);
  }
}

}  // namespace

extern const GroupPointwiseConv3dKernel kGroupPointwiseConv3d;
const GroupPointwiseConv3dKernel kGroupPointwiseConv3d{packed_size, pack, plan, run};

}  // namespace gplws::cpu::GPLWS_ISA
