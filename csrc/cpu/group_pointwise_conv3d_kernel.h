// Body of the grouped 3x3x3 conv + pointwise conv, compiled once per ISA (GPLWS_ISA).
//
// One vector holds neighbouring pixels of a row. A task walks down the frames of its tile and keeps
// what the 3x3x3 window needs of them in zero-padded scratch, so the inner loop has no border
// cases:
//
//   scratch[slot][unit][row][half stride][column]
//
// A unit is what one 32-bit lane holds of a pixel: a float, or two neighbouring channels in
// bfloat16, which one instruction multiplies and adds up (see the schemes in
// group_pointwise_conv3d_schemes.h). With stride 2 the even and the odd columns of a row are stored
// apart ("halves"), so that every tap reads consecutive units there too.
//
// How the slots are used depends on the frames of the result that a step makes:
//
//   one    direct: a ring of three frames, slot = frame mod 3; 27 taps.
//   two    Winograd's minimal filtering along the frames (F(2, 3)): four slots hold differences and
//          a sum of frames n-1 .. n+2, and 4 x 9 taps give frames n and n+1, where the direct way
//          needs 54. Rounding grows by about a factor of two. A single frame can only be left over
//          at the end of the stack, where the first two slots are frames n-1 and n: it is computed
//          directly.
//
// Source: S. Winograd, "Arithmetic Complexity of Computations", SIAM 1980,
// doi:10.1137/1.9781611970364; A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural
// Networks", CVPR 2016, doi:10.1109/CVPR.2016.435.
#include "group_pointwise_conv3d.h"

#include <stdint.h>
#include <string.h>

namespace gplws::cpu::GPLWS_ISA {

#include "vec.h"

#include "sizes.h"

namespace {

#include "group_pointwise_conv3d_schemes.h"

constexpr int kPlaneTaps = 9;                   // of the window in one frame or slot
constexpr int kMaxVectors = 8;                  // in a row chunk
constexpr int64_t kScratchFloats = 240 * 1024;  // 960 KiB: the slots should stay near L2
constexpr int64_t kMiddleFloats = 12 * 1024;    // 48 KiB of middle results, near L1
constexpr int64_t kMaxTileWidth = 512, kMinTileWidth = 64;
constexpr int64_t kMaxTileHeight = 16, kMinTileHeight = 4;
// Output channels that a register block may have, so that it is two vectors wide (whole cache lines
// for the stores); in a step of two frames each has two results.
constexpr int kMaxBlock = kAccumulators / 2, kMaxPairBlock = kAccumulators / 4;

template <class S>
constexpr bool kPaired = S::kFramesPerStep == 2;
template <class S>
constexpr int kSlots = kPaired<S> ? 4 : 3;
// Packed taps: those of the three frames; or those of frame n, for a single frame, then of the
// slots.
template <class S>
constexpr int kTaps = kPaired<S> ? 5 * kPlaneTaps : 3 * kPlaneTaps;
template <class S>
constexpr int kConvBlock = kPaired<S> ? kMaxPairBlock : kMaxBlock;

// Sizes in units, that is in 32-bit words.
struct Geometry {
  int64_t group_units;  // units that hold the input channels of a group
  int64_t row;          // of scratch, all halves
  int64_t half;
  int64_t unit;  // distance between two units of a pixel
  int64_t slot;
  int64_t chunk;  // pixels of a row that are finished at a time
  // Where the rest of scratch begins: the middle result (middle x chunk floats a frame), the same
  // as units, and a row of zeros.
  int64_t mid, mid_frame, mid_units, zeros, end;
};

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
  int64_t vectors = kMaxVectors;
  while (vectors > 2 && S::kFramesPerStep * p.middle * vectors * kLanes > kMiddleFloats)
    vectors /= 2;
  g.chunk = vectors * kLanes;
  const int64_t packed_units = S::kChannelsPerUnit > 1 ? ceil_div(p.middle, 2) : 0;
  g.mid = kSlots<S> * g.slot;
  g.mid_frame = p.pointwise ? p.middle * g.chunk : 0;
  g.mid_units = g.mid + S::kFramesPerStep * g.mid_frame;
  g.zeros = g.mid_units + (p.pointwise ? packed_units * g.chunk : 0);
  g.end = g.zeros + g.row;
  return g;
}

// Output channels are computed in blocks; a block and its vectors share the accumulators.
constexpr int vectors_of(int block, int accumulators) {
  int v = 1;
  while (2 * v * block <= accumulators && 2 * v <= kMaxVectors) v *= 2;
  return v;
}

int next_block(int64_t channels, int largest) {
  constexpr int kBlocks[] = {12, 8, 6, 4, 3, 2};
  for (int block : kBlocks)
    if (channels >= block && block <= largest) return block;
  return 1;
}

// The packed taps of one pair of channels. Those of the four slots give m0, m1, m2 and -m3, and
// frames n = m0 + m1 + m2 and n+1 = m1 - m2 - m3. Without slots they are the weights as they are.
template <class S>
const float* packed_taps(const float* w, float* buffer) {
  if constexpr (!kPaired<S>) return w;
  for (int t = 0; t < kPlaneTaps; ++t) {
    const float before = w[t], here = w[kPlaneTaps + t], behind = w[2 * kPlaneTaps + t];
    buffer[t] = here;
    buffer[kPlaneTaps + t] = before;
    buffer[2 * kPlaneTaps + t] = 0.5f * (before + here + behind);
    buffer[3 * kPlaneTaps + t] = 0.5f * (before - here + behind);
    buffer[4 * kPlaneTaps + t] = -behind;
  }
  return buffer;
}

// Weights of `rows` output channels, block after block: [block][unit][tap][K]. `taps_of(row,
// channel, buffer)` is where those of one pair of channels are, for which it may use the buffer.
template <class S, int Taps, class TapsOf>
float* pack_rows(int64_t rows, int64_t channels, int largest_block, TapsOf taps_of, float* out) {
  float first_buffer[Taps], second_buffer[Taps], words_buffer[Taps + kLanes];
  for (int64_t k0 = 0; k0 < rows;) {
    const int block = next_block(rows - k0, largest_block);
    for (int64_t c = 0; c < channels; c += S::kChannelsPerUnit) {
      for (int k = 0; k < block; ++k) {
        const bool both = S::kChannelsPerUnit > 1 && c + 1 < channels;
        const float* first = taps_of(k0 + k, c, first_buffer);
        const float* second = both ? taps_of(k0 + k, c + 1, second_buffer) : nullptr;
        const float* words = S::weights(first, second, Taps, words_buffer);
        for (int t = 0; t < Taps; ++t) out[t * block + k] = words[t];
      }
      out += Taps * block;
    }
    k0 += block;
  }
  return out;
}

template <class S>
int64_t packed_size(const GroupPointwiseConv3dParams& p) {
  const int64_t units = ceil_div(p.channels / p.groups, S::kChannelsPerUnit);
  const int64_t pointwise_units = ceil_div(p.middle, S::kChannelsPerUnit);
  return p.middle * units * kTaps<S> + (p.pointwise ? p.channels_out * pointwise_units : 0);
}

template <class S>
void pack(const GroupPointwiseConv3dParams& p, const float* weight, const float* pointwise_weight,
          float* packed) {
  const int64_t inputs = p.channels / p.groups, outputs = p.middle / p.groups;
  for (int64_t g = 0; g < p.groups; ++g) {
    const auto taps_of = [&](int64_t row, int64_t channel, float* buffer) {
      const int64_t pair = (g * outputs + row) * inputs + channel;
      return packed_taps<S>(weight + pair * 3 * kPlaneTaps, buffer);
    };
    packed = pack_rows<S, kTaps<S>>(outputs, inputs, kConvBlock<S>, taps_of, packed);
  }
  if (!p.pointwise) return;
  const auto tap_of = [&](int64_t row, int64_t channel, float*) {
    return pointwise_weight + row * p.middle + channel;
  };
  pack_rows<S, 1>(p.channels_out, p.middle, kMaxBlock, tap_of, packed);
}

// Where part i of `parts` begins: equal parts but for one.
int64_t part_start(int64_t i, int64_t size, int64_t parts) { return i * size / parts; }

// What a tile takes, in instructions on vectors: a model to choose between ways of cutting.
template <class S>
struct TileCost {
  int64_t result_row;  // the convs of a row of the result, in one step
  int64_t input_row;   // filling a row of all slots that a step fills
  int64_t stride, frames;

  TileCost(const GroupPointwiseConv3dParams& p, int64_t tile_width)
      : stride(p.stride), frames(p.frames) {
    const Geometry g = geometry<S>(p, 1, tile_width);
    const int64_t units = ceil_div(p.middle, S::kChannelsPerUnit);
    const int64_t taps = kPaired<S> ? 2 * kPlaneTaps : 3 * kPlaneTaps;  // for each frame
    const int64_t conv = p.middle * g.group_units * taps;
    const int64_t pointwise = p.pointwise ? p.channels_out * units : 0;
    result_row = tile_width / kLanes * S::kFramesPerStep * (conv + pointwise);
    input_row = g.row / kLanes * g.group_units * p.groups * (kPaired<S> ? 12 : 6);
  }

  int64_t of(int64_t rows, int64_t steps) const {
    const int64_t fills = kPaired<S> ? steps : min64(frames, steps + 2);
    return steps * rows * result_row + fills * ((rows - 1) * stride + 3) * input_row;
  }
};

template <class S>
GroupPointwiseConv3dPlan plan(const GroupPointwiseConv3dParams& p, int64_t threads) {
  GroupPointwiseConv3dPlan t;
  const auto fits = [&](int64_t height, int64_t width) {
    return kSlots<S> * geometry<S>(p, height, width).slot <= kScratchFloats;
  };
  // Wide tiles, since memory likes long pieces of rows and whole rows best, as long as they are
  // some rows high as well: the rows above and below are copied for each tile. Equal tiles rather
  // than a narrow rest.
  const int64_t wanted_height = min64(kMinTileHeight, p.height_out);
  int64_t widest = kMaxTileWidth;
  while (widest > kMinTileWidth && !fits(wanted_height, min64(widest, p.width_out))) widest /= 2;
  while (widest > kLanes && !fits(1, widest)) widest /= 2;
  t.tile_width = ceil_div(ceil_div(p.width_out, ceil_div(p.width_out, widest)), kLanes) * kLanes;
  t.tiles_w = ceil_div(p.width_out, t.tile_width);
  int64_t highest = 1;
  while (highest < min64(kMaxTileHeight, p.height_out) && fits(highest + 1, t.tile_width))
    ++highest;
  // Threads get equal numbers of tasks. Where these are few, those of some may take much longer:
  // then lower tiles, or some of the frames (never cut between the frames of one step), which copy
  // the rows and frames around them once more.
  const TileCost<S> cost(p, t.tile_width);
  const int64_t columns = p.batch * t.tiles_w, enough = 4 * threads;
  const int64_t fewest = ceil_div(p.height_out, highest);
  const int64_t most = max64(fewest, min64(p.height_out, enough / columns));
  const int64_t steps = ceil_div(p.frames, S::kFramesPerStep);
  int64_t least = INT64_MAX;
  for (int64_t h = fewest; h <= most; ++h) {
    const int64_t busy = ceil_div(threads, columns * h);  // a task for each thread
    const int64_t parts[] = {1, busy, 2 * busy, enough / (columns * h)};
    for (const int64_t wanted : parts) {
      const int64_t n = max64(1, min64(wanted, steps));
      const int64_t each = cost.of(ceil_div(p.height_out, h), ceil_div(steps, n));
      const int64_t takes = ceil_div(columns * h * n, threads) * each;
      if (takes >= least) continue;
      least = takes;
      t.tiles_h = h;
      t.tiles_n = n;
    }
  }
  t.tile_height = ceil_div(p.height_out, t.tiles_h);
  t.tasks = columns * t.tiles_h * t.tiles_n;
  t.scratch_floats = geometry<S>(p, t.tile_height, t.tile_width).end;
  return t;
}

// acc[k][v] += w[k] * x[v]: one tap of one unit. What there is less of stays in registers.
template <class S, int K, int V>
GPLWS_INLINE void accumulate_tap(const float* x, const float* w, Vec (&acc)[K][V]) {
  if constexpr (K <= V) {
    Vec wk[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) wk[k] = broadcast(w[k]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const Vec xv = load_once(x + v * kLanes);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) acc[k][v] = S::multiply_add(wk[k], xv, acc[k][v]);
    }
  } else {
    Vec xv[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) xv[v] = load_once(x + v * kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      const Vec wk = broadcast(w[k]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[k][v] = S::multiply_add(wk, xv[v], acc[k][v]);
    }
  }
}

// Where a block of output channels goes, and what happens to it on the way.
template <class Value>
struct Output {
  Value* y;
  int64_t channel_stride, frame_stride;
  const float* bias;      // null: none
  const Value* residual;  // null: none; strides of y
  bool relu, residual_relu;
  bool stream;  // store past the caches; y is aligned
};

// The input of one of the convs: units of neighbouring pixels, and the taps that are used of the
// packed ones.
struct Input {
  const float* x;
  int64_t unit_stride, units;
  const int64_t* offsets;  // of each tap that is used
  int taps, skipped_taps, packed_taps;
  int64_t slot_stride;  // for steps of two frames, whose taps are the same in all slots
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

// Finishes and stores a block, `frame` frames behind where `out` points.
template <int K, int V, class Value>
GPLWS_INLINE void finish_block(const Vec (&acc)[K][V], const Output<Value>& out, int64_t frame,
                               int64_t pixels) {
  const int64_t start = frame * out.frame_stride;
  if (pixels >= V * kLanes) {
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const int64_t at = start + k * out.channel_stride + v * kLanes;
        const Vec value = finish(acc[k][v], out, [&] { return load(out.residual + at); });
        if (out.stream)
          stream(out.y + at, value);
        else
          store(out.y + at, value);
      }
    }
    return;
  }
  // The end of a row: the last vector is only partly used. Unrolled as well, since a loop over
  // `acc` would force it into memory from the start.
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t at = start + k * out.channel_stride + v * kLanes;
      finish_partly(acc[k][v], out, at, pixels - v * kLanes);
    }
  }
}

// One frame of the result. Not inlined: in the middle of a larger function the compiler runs out of
// registers.
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
  const float* x = in.x;
  w += in.skipped_taps * K;
  for (int64_t u = 0; u < in.units; ++u) {
    for (int t = 0; t < in.taps; ++t) accumulate_tap<S>(x + in.offsets[t], w + t * K, acc);
    x += in.unit_stride;
    w += in.packed_taps * K;
  }
  finish_block(acc, out, 0, pixels);
}

// Two frames of the result from four slots.
template <class S, int K, int V, class Value>
__attribute__((noinline)) void pair_block(const Input& in, const float* w, const Output<Value>& out,
                                          int64_t pixels) {
  // First m1 and m2, which both frames need: their sum and difference; then m0 and -m3 on top.
  Vec here[K][V], next[K][V];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    const Vec b = broadcast(out.bias ? out.bias[k] : 0.0f);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      here[k][v] = b;
      next[k][v] = Vec{};
    }
  }
  for (int outer = 0; outer < 2; ++outer) {
    if (outer) {
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          const Vec sum = here[k][v] + next[k][v];
          next[k][v] = here[k][v] - next[k][v];
          here[k][v] = sum;
        }
      }
    }
    const int first = outer ? 0 : 1, second = outer ? 3 : 2;
    const float* x = in.x;
    const float* w_unit = w;
    for (int64_t u = 0; u < in.units; ++u) {
      const float* w_first = w_unit + (1 + first) * kPlaneTaps * K;
      const float* w_second = w_unit + (1 + second) * kPlaneTaps * K;
      for (int t = 0; t < kPlaneTaps; ++t) {
        const float* xt = x + in.offsets[t];
        accumulate_tap<S>(xt + first * in.slot_stride, w_first, here);
        accumulate_tap<S>(xt + second * in.slot_stride, w_second, next);
        w_first += K;
        w_second += K;
      }
      x += in.unit_stride;
      w_unit += kTaps<S> * K;
    }
  }
  finish_block(here, out, 0, pixels);
  finish_block(next, out, 1, pixels);
}

// One block of K output channels over a row chunk of `pixels` pixels: V vectors at a time, then the
// rest in halves.
template <class S, int Frames, int K, class Value, int V = vectors_of(K, kAccumulators / Frames)>
void conv_row(Input in, const float* w, Output<Value> out, int64_t pixels) {
  while (pixels > (V - 1) * kLanes) {
    if constexpr (Frames == 2)
      pair_block<S, K, V>(in, w, out, pixels);
    else
      conv_block<S, K, V>(in, w, out, pixels);
    in.x += V * kLanes;
    out.y += V * kLanes;
    if (out.residual) out.residual += V * kLanes;
    pixels -= V * kLanes;
  }
  if constexpr (V > 1) {
    if (pixels > 0) conv_row<S, Frames, K, Value, V / 2>(in, w, out, pixels);
  }
}

// `rows` output channels, block after block, in the order of `pack_rows`.
template <class S, int Frames, int LargestBlock, class Value>
void conv_rows(const Input& in, const float* w, int64_t rows, Output<Value> out, int64_t pixels) {
  for (int64_t k0 = 0; k0 < rows;) {
    const int block = next_block(rows - k0, LargestBlock);
    switch (block) {
#define GPLWS_BLOCK(K)                                                           \
  case K:                                                                        \
    if constexpr (K <= LargestBlock) conv_row<S, Frames, K>(in, w, out, pixels); \
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

// Part of a row of the image: begins at a tile's first column, which is column `first` of `width`.
template <class Rows>
struct RowPart {
  Rows rows;
  int64_t first, width;

  Vec units(int64_t column) const { return rows.units(column, kLanes); }
  // Zero outside the image.
  Vec padded_units(int64_t column) const {
    const int64_t left = width - first - column;
    if (first + column < 0 || left <= 0) return Vec{};
    return rows.units(column, left < kLanes ? static_cast<int>(left) : kLanes);
  }
};

// Stores what two neighbouring vectors of units (with stride 1: one) hold at column i of a row.
template <int Stride>
GPLWS_INLINE void store_units(float* row, int64_t half, int64_t i, const Vec (&v)[Stride]) {
  if constexpr (Stride == 1) {
    store(row + i, v[0]);
  } else {
    store(row + i, even_lanes(v[0], v[1]));
    store(row + half + i, odd_lanes(v[0], v[1]));
  }
}

// A row of one frame as it is, or of four frames n-1 .. n+2 as d0 - d2, d1 + d2, d2 - d1, d1 - d3
// in four slots. `units(frame, column)` loads.
template <int Stride, int Frames, class Units>
GPLWS_INLINE void transform(float* dst, int64_t half, int64_t slot, int64_t i, int64_t column,
                            Units units) {
  Vec d[Frames][Stride];
#pragma GCC unroll 4
  for (int f = 0; f < Frames; ++f)
#pragma GCC unroll 2
    for (int s = 0; s < Stride; ++s) d[f][s] = units(f, column + s * kLanes);
  if constexpr (Frames == 1) {
    store_units<Stride>(dst, half, i, d[0]);
  } else {
    Vec m[4][Stride];
#pragma GCC unroll 2
    for (int s = 0; s < Stride; ++s) {
      m[0][s] = d[0][s] - d[2][s];
      m[1][s] = d[1][s] + d[2][s];
      m[2][s] = d[2][s] - d[1][s];
      m[3][s] = d[1][s] - d[3][s];
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store_units<Stride>(dst + j * slot, half, i, m[j]);
  }
}

// All that a tile needs of one row of one or four frames. A half starts one vector left of the
// tile; tiles start at multiples of a vector.
template <int Stride, class Rows, int Frames>
void transform_row(const RowPart<Rows> (&rows)[Frames], int64_t half, int64_t slot, float* dst) {
  const auto column_of = [&](int64_t i) { return (i - kLanes) * Stride; };
  const auto padded = [&](int f, int64_t column) { return rows[f].padded_units(column); };
  const auto whole = [&](int f, int64_t column) { return rows[f].units(column); };
  int64_t i = 0;
  if (rows[0].first == 0) {
    transform<Stride, Frames>(dst, half, slot, i, column_of(i), padded);
    i += kLanes;
  }
  const int64_t last = rows[0].width - rows[0].first - Stride * kLanes;
  for (; i < half && column_of(i) <= last; i += kLanes)
    transform<Stride, Frames>(dst, half, slot, i, column_of(i), whole);
  for (; i < half; i += kLanes) transform<Stride, Frames>(dst, half, slot, i, column_of(i), padded);
}

// Fills the row at `dst` from a row of the image: of one frame, or of four frames from `frame` on
// for the four slots. `plane` is frame 0 of the unit's first channel.
template <class S, class Rows>
void fill_row(const GroupPointwiseConv3dParams& p, const Geometry& g, const Tile& tile,
              const typename S::Value* plane, int64_t frame, int64_t h,
              const typename S::Value* zeros, float* dst) {
  const int64_t first = tile.w0 * p.stride;
  RowPart<Rows> rows[kPaired<S> ? 4 : 1];
  for (auto& row : rows) {
    const bool inside = frame >= 0 && frame < p.frames && h >= 0 && h < p.height;
    const auto* start = inside ? plane + (frame * p.height + h) * p.width + first : zeros;
    row = {{start, inside ? start + p.frames * p.height * p.width : zeros}, first, p.width};
    ++frame;
  }
  if (p.stride == 1)
    transform_row<1>(rows, g.half, g.slot, dst);
  else
    transform_row<2>(rows, g.half, g.slot, dst);
}

// Fills one slot of the ring with `frame`, or all four with the frames from `frame` on.
template <class S>
void fill(const GroupPointwiseConv3dParams& p, const Geometry& g, const Tile& tile, int64_t frame,
          const float* zero_row, float* slot) {
  using Value = typename S::Value;
  using Rows = typename S::Rows;
  using LastRow = typename S::LastRow;
  const int64_t height = (tile.height - 1) * p.stride + 3;
  const int64_t inputs = p.channels / p.groups, channel = p.frames * p.height * p.width;
  const auto* image = static_cast<const Value*>(p.x) + tile.image * p.channels * channel;
  // Rows are read from one vector before the tile on.
  const auto* zeros = reinterpret_cast<const Value*>(zero_row) + kLanes * p.stride;
  for (int64_t group = 0; group < p.groups; ++group)
    for (int64_t u = 0; u < g.group_units; ++u) {
      const int64_t c = u * S::kChannelsPerUnit;
      const auto* plane = image + (group * inputs + c) * channel;
      const bool whole = c + S::kChannelsPerUnit <= inputs;
      float* dst = slot + (group * g.group_units + u) * g.unit;
      for (int64_t r = 0; r < height; ++r, dst += g.row) {
        const int64_t h = tile.h0 * p.stride - 1 + r;
        if (whole)
          fill_row<S, Rows>(p, g, tile, plane, frame, h, zeros, dst);
        else
          fill_row<S, LastRow>(p, g, tile, plane, frame, h, zeros, dst);
      }
    }
}

// Offsets of the taps of one slot relative to a row's first used column.
void plane_offsets(const GroupPointwiseConv3dParams& p, const Geometry& g, int64_t slot,
                   int64_t* offsets) {
  for (int kh = 0; kh < 3; ++kh)
    for (int kw = 0; kw < 3; ++kw) {
      int64_t column = kw - 1;
      if (p.stride == 2) column = kw == 1 ? 0 : g.half - (kw == 0 ? 1 : 0);
      *offsets++ = slot * g.slot + kh * g.row + column;
    }
}

// The taps that make frames n .. n + Frames - 1 of the result.
struct Taps {
  int64_t offsets[3 * kPlaneTaps];
  int skipped, count;
};

template <class S, int Frames>
Taps taps_of(const GroupPointwiseConv3dParams& p, const Geometry& g, int64_t n) {
  Taps t{};
  if constexpr (!kPaired<S>) {
    // Frames outside the stack are zero: their taps are left out.
    const int64_t first = n == 0 ? 1 : 0, last = n == p.frames - 1 ? 1 : 2;
    for (int64_t j = first; j <= last; ++j)
      plane_offsets(p, g, (n + j + 2) % 3, t.offsets + (j - first) * kPlaneTaps);
    t.skipped = static_cast<int>(first) * kPlaneTaps;
    t.count = static_cast<int>(last - first + 1) * kPlaneTaps;
  } else if (Frames == 1) {
    plane_offsets(p, g, 1, t.offsets);
    plane_offsets(p, g, 0, t.offsets + kPlaneTaps);
    t.count = n == 0 ? kPlaneTaps : 2 * kPlaneTaps;
  } else {
    plane_offsets(p, g, 0, t.offsets);  // the same in all slots
    t.count = kPlaneTaps;
  }
  return t;
}

// The convs of one tile, for frames n .. n + Frames - 1 of the result, whose slots are filled.
template <class S, int Frames>
void run_frames(const GroupPointwiseConv3dParams& p, const Geometry& g, const Tile& tile, int64_t n,
                float* scratch) {
  using Value = typename S::Value;
  const int64_t outputs = p.middle / p.groups;
  const int64_t plane = p.height_out * p.width_out, volume = p.frames * plane;
  float* mid = scratch + g.mid;
  float* mid_units = scratch + g.mid_units;
  const float* pointwise = p.packed + p.middle * g.group_units * kTaps<S>;
  const int64_t here = 0;

  // Past the caches where vectors of the result are aligned: otherwise each line would be read
  // from memory before it is overwritten.
  const bool stream =
      reinterpret_cast<uintptr_t>(p.y) % GPLWS_VEC_BYTES == 0 && p.width_out % kLanes == 0;
  const Taps taps = taps_of<S, Frames>(p, g, n);

  for (int64_t r = 0; r < tile.height; ++r)
    for (int64_t w = 0; w < tile.width; w += g.chunk) {
      const int64_t pixels = min64(g.chunk, tile.width - w);
      const float* x = scratch + r * p.stride * g.row + kLanes + w;
      const int64_t at = tile.image * p.channels_out * volume + n * plane +
                         (tile.h0 + r) * p.width_out + tile.w0 + w;
      const Output<Value> last{static_cast<Value*>(p.y) + at,
                               volume,
                               plane,
                               p.pointwise ? p.pointwise_bias : p.bias,
                               p.residual ? static_cast<const Value*>(p.residual) + at : nullptr,
                               p.pointwise ? p.pointwise_relu : p.relu,
                               p.residual_relu,
                               stream};
      for (int64_t group = 0; group < p.groups; ++group) {
        const int64_t k0 = group * outputs;
        const Input input{x + group * g.group_units * g.unit,
                          g.unit,
                          g.group_units,
                          taps.offsets,
                          taps.count,
                          taps.skipped,
                          kTaps<S>,
                          g.slot};
        const float* w_group = p.packed + k0 * g.group_units * kTaps<S>;
        const float* bias = p.bias ? p.bias + k0 : nullptr;
        if (p.pointwise) {
          const Output<float> out{
              mid + k0 * g.chunk, g.chunk, g.mid_frame, bias, nullptr, p.relu, false, false};
          conv_rows<S, Frames, kConvBlock<S>>(input, w_group, outputs, out, pixels);
        } else {
          Output<Value> out = last;
          out.y += k0 * volume;
          out.bias = bias;
          if (out.residual) out.residual += k0 * volume;
          conv_rows<S, Frames, kConvBlock<S>>(input, w_group, outputs, out, pixels);
        }
      }
      if (!p.pointwise) continue;
      for (int64_t f = 0; f < Frames; ++f) {
        float* middle = mid + f * g.mid_frame;
        S::pack_middle(middle, p.middle, g.chunk, pixels, mid_units);
        const Input input{S::kChannelsPerUnit > 1 ? mid_units : middle,
                          g.chunk,
                          ceil_div(p.middle, S::kChannelsPerUnit),
                          &here,
                          1,
                          0,
                          1,
                          0};
        Output<Value> out = last;
        out.y += f * plane;
        if (out.residual) out.residual += f * plane;
        conv_rows<S, 1, kMaxBlock>(input, pointwise, p.channels_out, out, pixels);
      }
    }
}

template <class S>
void run_tile(const GroupPointwiseConv3dParams& p, const Geometry& g, const Tile& tile, int64_t n0,
              int64_t n1, float* scratch) {
  if constexpr (kPaired<S>) {
    for (int64_t n = n0; n < n1; n += 2) {
      fill<S>(p, g, tile, n - 1, scratch + g.zeros, scratch);
      if (n + 1 < n1)
        run_frames<S, 2>(p, g, tile, n, scratch);
      else
        run_frames<S, 1>(p, g, tile, n, scratch);
    }
  } else {
    const auto fill_ring = [&](int64_t n) {
      fill<S>(p, g, tile, n, scratch + g.zeros, scratch + n % 3 * g.slot);
    };
    for (int64_t n = max64(n0 - 1, 0); n < min64(n0 + 1, p.frames); ++n) fill_ring(n);
    for (int64_t n = n0; n < n1; ++n) {
      if (n + 1 < p.frames) fill_ring(n + 1);
      run_frames<S, 1>(p, g, tile, n, scratch);
    }
  }
}

template <class S>
void run(const GroupPointwiseConv3dParams& p, const GroupPointwiseConv3dPlan& plan, int64_t begin,
         int64_t end, float* scratch) {
  const Geometry g = geometry<S>(p, plan.tile_height, plan.tile_width);
  memset(scratch + g.zeros, 0, (g.end - g.zeros) * sizeof(*scratch));
  const int64_t steps = ceil_div(p.frames, S::kFramesPerStep);
  for (int64_t task = begin; task < end; ++task) {
    int64_t i = task;
    const int64_t tn = i % plan.tiles_n;
    i /= plan.tiles_n;
    const int64_t tw = i % plan.tiles_w;
    i /= plan.tiles_w;
    const int64_t th = i % plan.tiles_h;
    Tile tile;
    tile.image = i / plan.tiles_h;
    tile.h0 = part_start(th, p.height_out, plan.tiles_h);
    tile.w0 = tw * plan.tile_width;
    tile.height = part_start(th + 1, p.height_out, plan.tiles_h) - tile.h0;
    tile.width = min64(plan.tile_width, p.width_out - tile.w0);
    const int64_t n0 = part_start(tn, steps, plan.tiles_n) * S::kFramesPerStep;
    const int64_t n1 = part_start(tn + 1, steps, plan.tiles_n) * S::kFramesPerStep;
    run_tile<S>(p, g, tile, n0, min64(n1, p.frames), scratch);
  }
  finish_streaming();
}

template <class S>
constexpr GroupPointwiseConv3dKernel kKernel{packed_size<S>, pack<S>, plan<S>, run<S>};

}  // namespace

extern const GroupPointwiseConv3dTable kGroupPointwiseConv3d;
const GroupPointwiseConv3dTable kGroupPointwiseConv3d{GPLWS_GROUP_POINTWISE_SCHEMES};

}  // namespace gplws::cpu::GPLWS_ISA
