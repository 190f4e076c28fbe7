// Body of the grouped 3x3x3 conv + pointwise conv, compiled once per ISA (GPLWS_ISA).
//
// One vector holds neighbouring pixels of a row. A task walks down the frames of its tile and keeps
// the three frames that the 3x3x3 window needs in a zero-padded scratch ring, so the inner loop has
// no border cases:
//
//   scratch[slot 3][unit][row][half stride][column]   slot = frame mod 3
//
// A unit is what one 32-bit lane holds of a pixel: a float, or two neighbouring channels in
// bfloat16, which one instruction multiplies and adds up (see the schemes in
// group_pointwise_conv3d_schemes.h). With stride 2 the even and the odd columns of a row are stored
// apart ("halves"), so that every tap reads consecutive units there too. The inner loop is the same
// for both convs: it sums `taps` x `units` products into a register block of K output channels x V
// vectors.
#include "group_pointwise_conv3d.h"

#include <stdint.h>
#include <string.h>

namespace gplws::cpu::GPLWS_ISA {

#include "vec.h"

namespace {

#include "group_pointwise_conv3d_schemes.h"

constexpr int kTaps = 27;
constexpr int kMaxVectors = 8;                  // pixels per row chunk: kMaxVectors * kLanes
constexpr int64_t kScratchFloats = 160 * 1024;  // 640 KiB: the ring should stay in L2
constexpr int64_t kMaxTileWidth = 512, kMinTileWidth = 128;
constexpr int64_t kMinTileHeight = 4;
constexpr int64_t kMaxTileHeight = 16;

// Sizes in units, that is in 32-bit words.
struct Geometry {
  int64_t group_units;  // units that hold the input channels of a group
  int64_t row;          // of scratch, all halves
  int64_t half;
  int64_t unit;  // distance between two units of a pixel
  int64_t slot;  // of the ring
  int64_t mid;   // middle result: middle x chunk floats, then the same as units
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

template <class S>
Geometry geometry(const GroupPointwiseConv3dParams& p, int64_t tile_height, int64_t tile_width) {
  Geometry g;
  g.group_units = ceil_div(p.channels / p.groups, S::kChannelsPerUnit);
  // One vector of padding on the left keeps the middle tap aligned; one on the right takes the halo
  // and the lanes of the last, partly used vector.
  g.half = (ceil_div(tile_width, kLanes) + 2) * kLanes;
  g.row = g.half * p.stride;
  g.unit = g.row * ((tile_height - 1) * p.stride + 3);
  g.slot = g.unit * g.group_units * p.groups;
  g.mid = 0;
  if (p.pointwise) {
    g.mid = p.middle;
    if (S::kChannelsPerUnit > 1) g.mid += ceil_div(p.middle, S::kChannelsPerUnit);
    g.mid *= kMaxVectors * kLanes;
  }
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

// Weights of `rows` output channels, block after block: [block][unit][tap][K].
template <class S>
float* pack_rows(const float* weight, int64_t rows, int64_t channels, int taps, float* out) {
  const int64_t units = ceil_div(channels, S::kChannelsPerUnit);
  for (int64_t k0 = 0; k0 < rows;) {
    const int block = next_block(rows - k0);
    for (int64_t u = 0; u < units; ++u)
      for (int t = 0; t < taps; ++t)
        for (int k = 0; k < block; ++k) {
          const int64_t c = u * S::kChannelsPerUnit;
          const float* w = weight + ((k0 + k) * channels + c) * taps + t;
          *out++ = S::weight(w[0], c + 1 < channels ? w[taps * (S::kChannelsPerUnit - 1)] : 0.0f);
        }
    k0 += block;
  }
  return out;
}

template <class S>
int64_t packed_size(const GroupPointwiseConv3dParams& p) {
  const int64_t units = ceil_div(p.channels / p.groups, S::kChannelsPerUnit);
  const int64_t pointwise_units = ceil_div(p.middle, S::kChannelsPerUnit);
  return p.middle * units * kTaps + (p.pointwise ? p.channels_out * pointwise_units : 0);
}

template <class S>
void pack(const GroupPointwiseConv3dParams& p, const float* weight, const float* pointwise_weight,
          float* packed) {
  const int64_t inputs = p.channels / p.groups, outputs = p.middle / p.groups;
  for (int64_t g = 0; g < p.groups; ++g)
    packed = pack_rows<S>(weight + g * outputs * inputs * kTaps, outputs, inputs, kTaps, packed);
  if (p.pointwise) pack_rows<S>(pointwise_weight, p.channels_out, p.middle, 1, packed);
}

template <class S>
GroupPointwiseConv3dPlan plan(const GroupPointwiseConv3dParams& p, int64_t threads) {
  GroupPointwiseConv3dPlan t;
  const auto fits = [&](int64_t height, int64_t width) {
    return 3 * geometry<S>(p, height, width).slot <= kScratchFloats;
  };
  // Wide tiles, since memory likes long pieces of rows, as long as they are some rows high as well:
  // the rows above and below are copied for each tile. Equal tiles rather than a narrow rest.
  const int64_t wanted_height = min64(kMinTileHeight, p.height_out);
  int64_t widest = kMaxTileWidth;
  while (widest > kMinTileWidth && !fits(wanted_height, widest)) widest /= 2;
  while (widest > kLanes && !fits(1, widest)) widest /= 2;
  t.tile_width = ceil_div(ceil_div(p.width_out, ceil_div(p.width_out, widest)), kLanes) * kLanes;
  t.tile_height = 1;
  while (t.tile_height < min64(kMaxTileHeight, p.height_out) &&
         fits(t.tile_height + 1, t.tile_width))
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
  const Geometry g = geometry<S>(p, t.tile_height, t.tile_width);
  t.scratch_floats = 3 * g.slot + g.mid;
  return t;
}

// acc[k][v] += sum over units and taps of w[unit][tap][k] * x[unit][offset(tap) + v].
template <class S, int K, int V>
GPLWS_INLINE void accumulate(const float* x, int64_t unit_stride, int64_t units,
                             const int64_t* offsets, int taps, const float* w,
                             int64_t w_unit_stride, Vec (&acc)[K][V]) {
  for (int64_t u = 0; u < units; ++u) {
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
          for (int k = 0; k < K; ++k) acc[k][v] = S::multiply_add(wk[k], xv, acc[k][v]);
        }
      } else {
        Vec xv[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) xv[v] = load_once(xt + v * kLanes);
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) {
          const Vec wk = broadcast(wt[k]);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) acc[k][v] = S::multiply_add(wk, xv[v], acc[k][v]);
        }
      }
      wt += K;
    }
    x += unit_stride;
    w += w_unit_stride;
  }
}

// Where a block of output channels goes, and what happens to it on the way.
template <class Value>
struct Output {
  Value* y;
  int64_t channel_stride;
  const float* bias;      // null: none
  const Value* residual;  // null: none; strides of y
  bool relu, residual_relu;
};

// The input of one of the convs: units of neighbouring pixels, and the weights that go with them.
struct Input {
  const float* x;
  int64_t unit_stride, units;
  const int64_t* offsets;  // of each tap that is used
  int taps, skipped_taps, packed_taps;
};

template <class Value, typename Residual>
GPLWS_INLINE Vec finish(Vec v, const Output<Value>& out, Residual residual) {
  if (out.relu) v = relu(v);
  if (out.residual) {
    v += residual();
    if (out.residual_relu) v = relu(v);
  }
  return v;
}

template <class Value>
__attribute__((noinline)) void finish_partly(Vec v, const Output<Value>& out, int64_t at,
                                             int64_t pixels) {
  const int count = pixels < kLanes ? static_cast<int>(pixels) : kLanes;
  const auto residual = [&] { return load_first(out.residual + at, count); };
  store_first(out.y + at, finish(v, out, residual), count);
}

// Not inlined: in the middle of a larger function the compiler runs out of registers.
template <class S, int K, int V, class Value>
__attribute__((noinline)) void conv_block(const Input& in, const float* w, const Output<Value>& out,
                                          int64_t pixels) {
  Vec acc[K][V];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    const Vec b = broadcast(out.bias ? out.bias[k] : 0.0f);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[k][v] = b;
  }
  accumulate<S, K, V>(in.x, in.unit_stride, in.units, in.offsets, in.taps, w + in.skipped_taps * K,
                      in.packed_taps * K, acc);
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
  // The end of a row: the last vector is only partly used. Unrolled as well, since a loop over
  // `acc` would force it into memory from the start.
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      finish_partly(acc[k][v], out, k * out.channel_stride + v * kLanes, pixels - v * kLanes);
  }
}

// One block of K output channels over a row chunk of `pixels` pixels: V vectors at a time, then the
// rest in halves.
template <class S, int K, class Value, int V = vectors_of(K)>
void conv_row(Input in, const float* w, Output<Value> out, int64_t pixels) {
  while (pixels > (V - 1) * kLanes) {
    conv_block<S, K, V>(in, w, out, pixels);
    in.x += V * kLanes;
    out.y += V * kLanes;
    if (out.residual) out.residual += V * kLanes;
    pixels -= V * kLanes;
  }
  if constexpr (V > 1) {
    if (pixels > 0) conv_row<S, K, Value, V / 2>(in, w, out, pixels);
  }
}

// `rows` output channels, block after block, in the order of `pack_rows`.
template <class S, class Value>
void conv_rows(const Input& in, const float* w, int64_t rows, Output<Value> out, int64_t pixels) {
  for (int64_t k0 = 0; k0 < rows;) {
    const int block = next_block(rows - k0);
    switch (block) {
#define GPLWS_BLOCK(K)                  \
  case K:                               \
    conv_row<S, K>(in, w, out, pixels); \
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
    w += in.units * in.packed_taps * block;
    out.y += block * out.channel_stride;
    if (out.bias) out.bias += block;
    if (out.residual) out.residual += block * out.channel_stride;
  }
}

// The part of the image that one tile needs, and where it goes.
struct Tile {
  int64_t image, h0, w0, height, width;  // of the output
};

// Copies one row of units, zero outside the image, into its halves of scratch. A half starts one
// vector left of the tile; tiles start at multiples of a vector.
template <class Rows>
void copy_row(const Rows& rows, int64_t row_width, int64_t w0, int64_t stride, int64_t half,
              float* dst) {
  const Vec zero = {};
  const auto units = [&](int64_t column) {
    const int64_t left = row_width - column;
    if (column < 0 || left <= 0) return zero;
    return rows.units(column, left < kLanes ? static_cast<int>(left) : kLanes);
  };
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t column = (w0 - kLanes + i) * stride;
    const Vec first = units(column);
    if (stride == 1) {
      store(dst + i, first);
    } else {
      const Vec second = units(column + kLanes);
      store(dst + i, even_lanes(first, second));
      store(dst + half + i, odd_lanes(first, second));
    }
  }
}

template <class S>
void copy_frame(const GroupPointwiseConv3dParams& p, const Geometry& g, const Tile& tile,
                int64_t frame, float* slot) {
  const int64_t height = (tile.height - 1) * p.stride + 3;
  const int64_t inputs = p.channels / p.groups, channel = p.frames * p.height * p.width;
  const auto* image = static_cast<const typename S::Value*>(p.x) +
                      (tile.image * p.channels * p.frames + frame) * p.height * p.width;
  for (int64_t group = 0; group < p.groups; ++group)
    for (int64_t u = 0; u < g.group_units; ++u) {
      const int64_t c = u * S::kChannelsPerUnit;
      const auto* plane = image + (group * inputs + c) * channel;
      const bool whole = c + S::kChannelsPerUnit <= inputs;
      float* unit = slot + (group * g.group_units + u) * g.unit;
      for (int64_t r = 0; r < height; ++r) {
        const int64_t h = tile.h0 * p.stride - 1 + r;
        float* dst = unit + r * g.row;
        if (h < 0 || h >= p.height) {
          memset(dst, 0, g.row * sizeof(*dst));
          continue;
        }
        const auto* row = plane + h * p.width;
        if (whole)
          copy_row(typename S::Rows{row, row + channel}, p.width, tile.w0, p.stride, g.half, dst);
        else
          copy_row(typename S::LastRow{row}, p.width, tile.w0, p.stride, g.half, dst);
      }
    }
}

// Asks for the part of a frame that copy_frame will read two frames from now: the rows that belong
// to output row r, of one group. Row pieces of a tile are too short for the hardware's prefetcher.
template <class S>
void prefetch_rows(const GroupPointwiseConv3dParams& p, const Tile& tile, int64_t frame,
                   int64_t group, int64_t r) {
  const int64_t inputs = p.channels / p.groups, channel = p.frames * p.height * p.width;
  const auto* image = static_cast<const typename S::Value*>(p.x) +
                      (tile.image * p.channels * p.frames + frame) * p.height * p.width;
  const int64_t first = tile.w0 * p.stride;
  const int64_t columns = min64(tile.width * p.stride + 1, p.width - first);
  constexpr int64_t kLine = 64 / sizeof(typename S::Value);
  for (int64_t c = group * inputs; c < (group + 1) * inputs; ++c)
    for (int64_t s = 0; s < p.stride; ++s) {
      const int64_t h = min64((tile.h0 + r) * p.stride + s + 1, p.height - 1);
      const auto* row = image + c * channel + h * p.width + first;
      for (int64_t i = 0; i < columns; i += kLine) __builtin_prefetch(row + i, 0, 2);
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

template <class S>
void run_tile(const GroupPointwiseConv3dParams& p, const Geometry& g, const Tile& tile, int64_t n0,
              int64_t n1, float* scratch) {
  using Value = typename S::Value;
  const int64_t outputs = p.middle / p.groups;
  const int64_t plane = p.height_out * p.width_out, volume = p.frames * plane;
  const int64_t chunk = kMaxVectors * kLanes;
  const int64_t pointwise_units = ceil_div(p.middle, S::kChannelsPerUnit);
  float* mid = scratch + 3 * g.slot;
  float* mid_units = S::kChannelsPerUnit > 1 ? mid + p.middle * chunk : mid;
  const float* pointwise = p.packed + p.middle * g.group_units * kTaps;
  const int64_t here = 0;
  const Input mid_input{mid_units, chunk, pointwise_units, &here, 1, 0, 1};

  for (int64_t n = max64(n0 - 1, 0); n < min64(n0 + 1, p.frames); ++n)
    copy_frame<S>(p, g, tile, n, scratch + (n % 3) * g.slot);
  for (int64_t n = n0; n < n1; ++n) {
    if (n + 1 < p.frames) copy_frame<S>(p, g, tile, n + 1, scratch + ((n + 1) % 3) * g.slot);
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
        const Output<Value> last{static_cast<Value*>(p.y) + at,
                                 volume,
                                 p.pointwise ? p.pointwise_bias : p.bias,
                                 p.residual ? static_cast<const Value*>(p.residual) + at : nullptr,
                                 p.pointwise ? p.pointwise_relu : p.relu,
                                 p.residual_relu};
        for (int64_t group = 0; group < p.groups; ++group) {
          const int64_t k0 = group * outputs;
          if (w == 0 && n + 2 < p.frames) prefetch_rows<S>(p, tile, n + 2, group, r);
          const Input input{x + group * g.group_units * g.unit,
                            g.unit,
                            g.group_units,
                            offsets + skipped,
                            taps,
                            skipped,
                            kTaps};
          const float* w_group = p.packed + k0 * g.group_units * kTaps;
          const float* bias = p.bias ? p.bias + k0 : nullptr;
          if (p.pointwise) {
            const Output<float> out{mid + k0 * chunk, chunk, bias, nullptr, p.relu, false};
            conv_rows<S>(input, w_group, outputs, out, pixels);
          } else {
            Output<Value> out = last;
            out.y += k0 * volume;
            out.bias = bias;
            if (out.residual) out.residual += k0 * volume;
            conv_rows<S>(input, w_group, outputs, out, pixels);
          }
        }
        if (p.pointwise) {
          S::pack_middle(mid, p.middle, chunk, pixels, mid_units);
          conv_rows<S>(mid_input, pointwise, p.channels_out, last, pixels);
        }
      }
  }
}

template <class S>
void run(const GroupPointwiseConv3dParams& p, const GroupPointwiseConv3dPlan& plan, int64_t begin,
         int64_t end, float* scratch) {
  const Geometry g = geometry<S>(p, plan.tile_height, plan.tile_width);
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
    run_tile<S>(p, g, tile, n0, min64(n0 + plan.tile_frames, p.frames), scratch);
  }
}

template <class S>
constexpr GroupPointwiseConv3dKernel kKernel{packed_size<S>, pack<S>, plan<S>, run<S>};

}  // namespace

extern const GroupPointwiseConv3dTable kGroupPointwiseConv3d;
const GroupPointwiseConv3dTable kGroupPointwiseConv3d{GPLWS_GROUP_POINTWISE_SCHEMES};

}  // namespace gplws::cpu::GPLWS_ISA
