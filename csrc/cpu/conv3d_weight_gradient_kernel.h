// Body of the gradient of the weight of a grouped 3x3x3 conv, compiled once per ISA (GPLWS_ISA).
//
//   gradient[o][i][kn][kh][kw] = sum over pixels of grad[o] at (n, h, w) times
//                                x[i] at (n + kn - 1, stride h + kh - 1, stride w + kw - 1)
//
// A vector holds neighbouring pixels, and each pair of channels and tap has one vector of sums,
// whose lanes are added up at the end. The sums of the three taps of a row for some pairs of
// channels stay in registers during a whole chunk of pixels.
//
// Rows are as short as 10 pixels in the lower levels of the network, so a vector must not end with
// its row. Both tensors are copied into scratch, where the rows follow each other with one zero in
// between, which is the padding of both neighbours; the loop then runs over one long row. In grad
// the place of that zero is zero too, so the taps that cross it add nothing. With stride 2, the
// rows and columns of x of even and odd number lie in four planes, so that every tap reads
// consecutive pixels there too:
//
//   scratch[piece][channel of x, then of grad][slot][plane][row][column]
//
// The four slots are those of Winograd's minimal filtering along the frames, F(3, 2): frames d0 ..
// d3 of x and g0, g1 of grad give the three taps along the frames from four products where the
// plain sum has six. The sums and differences of the frames are made while they are copied.
//
// Source: S. Winograd, "Arithmetic Complexity of Computations", SIAM 1980,
// doi:10.1137/1.9781611970364; A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural
// Networks", CVPR 2016, doi:10.1109/CVPR.2016.435.
#include "conv3d_weight_gradient.h"

#include <stdint.h>
#include <string.h>

namespace gplws::cpu::GPLWS_ISA {

#include "vec.h"

#include "sizes.h"

namespace {

constexpr int kSlots = 4;
// Channels of grad and of x whose three taps share the accumulators; 27 of 32 registers, where
// three more hold grad and one holds x, or 9 of 16.
constexpr int kOut = 3;
#if defined(__AVX512F__)
constexpr int kIn = 3;
#else
constexpr int kIn = 1;
#endif
constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }
constexpr int kSums = round_up(kOut * kIn * 3, kLanes);

constexpr int64_t kScratchFloats = 176 * 1024;  // 704 KiB: a chunk should stay in L2
constexpr int64_t kMaxBlock = 24, kMinBlock = 6;
constexpr int64_t kMinRows = 4;
// Of pixels in a chunk: adding up the lanes at its end costs as much as some ten of them.
constexpr int64_t kMinVectors = 24;
constexpr int64_t kTasks = 32;  // to feed many threads, as far as there are pieces

// Sizes in floats.
struct Geometry {
  int64_t row;      // columns of grad and the zero behind them
  int64_t length;   // of the long row, in whole vectors
  int64_t x_plane;  // one plane of one slot
  int64_t x_slot, x_channel;
  int64_t grad_slot, grad_channel;
  int64_t grad;  // where the channels of grad begin
  int64_t piece;
};

Geometry geometry(const Conv3dWeightGradientParams& p, int64_t rows, int64_t block_in,
                  int64_t block_out) {
  Geometry g;
  g.row = p.width_out + 1;
  g.length = ceil_div(rows * g.row, kLanes) * kLanes;
  // The rows above and below; and, as whole vectors are stored and read, one vector more.
  const int64_t halo = p.stride == 1 ? 2 : 1;
  g.x_plane = plane_size((rows + halo) * g.row + kLanes + 2);
  g.x_slot = p.stride * p.stride * g.x_plane;
  g.x_channel = kSlots * g.x_slot;
  g.grad_slot = plane_size(rows * g.row + kLanes);
  g.grad_channel = kSlots * g.grad_slot;
  g.grad = block_in * g.x_channel;
  g.piece = g.grad + block_out * g.grad_channel;
  return g;
}

int64_t partial_size(int64_t block_in, int64_t block_out) {
  return kSlots * 3 * kSums * ceil_div(block_in, kIn) * ceil_div(block_out, kOut);
}

Conv3dWeightGradientPlan plan(const Conv3dWeightGradientParams& p) {
  Conv3dWeightGradientPlan t;
  const int64_t inputs = p.channels / p.groups, outputs = p.channels_out / p.groups;
  const auto piece = [&](int64_t rows) { return geometry(p, rows, t.block_in, t.block_out).piece; };
  const int64_t least_rows = min64(kMinRows, p.height_out);
  // With stride 2 a channel of x has four planes.
  int64_t largest_in = kMaxBlock / (p.stride * p.stride), largest_out = kMaxBlock;
  for (;;) {
    t.block_in = min64(largest_in, inputs);
    t.block_out = min64(largest_out, outputs);
    t.rows = least_rows;
    while (t.rows < p.height_out && piece(t.rows + 1) <= kScratchFloats) ++t.rows;
    t.row_blocks = ceil_div(p.height_out, t.rows);
    t.rows = ceil_div(p.height_out, t.row_blocks);
    t.pieces = p.batch * ceil_div(p.frames, 2) * t.row_blocks;
    t.chunk_pieces = min64(t.pieces, max64(1, kScratchFloats / piece(t.rows)));
    const Geometry g = geometry(p, t.rows, t.block_in, t.block_out);
    const bool fits = g.piece <= kScratchFloats;
    const bool long_enough = t.chunk_pieces * g.length >= kMinVectors * kLanes;
    if (fits && (long_enough || t.chunk_pieces == t.pieces)) break;
    // Smaller blocks are copied more often, but leave room for more pixels.
    int64_t& larger = 2 * g.grad > g.piece ? largest_in : largest_out;
    if (larger <= kMinBlock) break;
    larger /= 2;
  }
  t.blocks_in = ceil_div(inputs, t.block_in);
  t.blocks_out = ceil_div(outputs, t.block_out);
  t.blocks = p.groups * t.blocks_in * t.blocks_out;
  // A slice is a chunk at least: what its sums cost at the end is little then.
  t.slices = min64(ceil_div(kTasks, t.blocks), ceil_div(t.pieces, t.chunk_pieces));
  t.partial_floats = partial_size(t.block_in, t.block_out);
  const int64_t slice = ceil_div(t.pieces, t.slices);
  t.chunk_pieces = ceil_div(slice, ceil_div(slice, t.chunk_pieces));  // equal chunks
  const int64_t zeros = p.width + 2 * kLanes;
  t.scratch_floats = t.chunk_pieces * piece(t.rows) + zeros;
  return t;
}

// One or, with stride 2, two neighbouring vectors of four frames of a row of x into the four slots;
// `load(frame, vector)`.
template <int64_t Stride, class Load>
GPLWS_INLINE void copy_x_vectors(Load load, int64_t slot, int64_t plane, float* dst) {
  Vec d[4][Stride];
#pragma GCC unroll 4
  for (int f = 0; f < 4; ++f) {
    if constexpr (Stride == 1) {
      d[f][0] = load(f, 0);
    } else {
      const Vec low = load(f, 0), high = load(f, 1);
      d[f][0] = even_lanes(low, high);
      d[f][1] = odd_lanes(low, high);
    }
  }
#pragma GCC unroll 2
  for (int64_t s = 0; s < Stride; ++s) {
    // Columns of odd number, and all with stride 1, have the zero before column 0 in front.
    float* to = Stride == 1 || s == 1 ? dst + 1 : dst + plane;
    store(to, d[0][s] - d[2][s]);
    store(to + slot, d[1][s] + d[2][s]);
    store(to + 2 * slot, d[2][s] - d[1][s]);
    store(to + 3 * slot, d[1][s] - d[3][s]);
  }
}

// Four frames of a row of x into the four slots. Zeros behind the end of the row are stored too:
// the next row begins there and is copied later.
template <int64_t Stride>
GPLWS_INLINE void copy_x_row(const float* const (&rows)[4], int64_t width, int64_t slot,
                             int64_t plane, float* dst) {
  const int64_t step = Stride * kLanes, whole = width / step * step;
  for (int64_t w = 0; w < whole; w += step)
    copy_x_vectors<Stride>([&](int f, int i) { return load(rows[f] + w + i * kLanes); }, slot,
                           plane, dst + w / Stride);
  if (whole == width) return;
  const int rest = static_cast<int>(width - whole);
  const int counts[2] = {rest, rest > kLanes ? rest - kLanes : 0};
  copy_x_vectors<Stride>(
      [&](int f, int i) { return load_first(rows[f] + whole + i * kLanes, counts[i]); }, slot,
      plane, dst + whole / Stride);
}

// A block of rows of a pair of frames of one image.
struct Piece {
  int64_t image, frame, row;
};

Piece piece_of(const Conv3dWeightGradientParams& p, const Conv3dWeightGradientPlan& t,
               int64_t index) {
  const int64_t pairs = ceil_div(p.frames, 2), block = index % t.row_blocks;
  index /= t.row_blocks;
  return {index / pairs, index % pairs * 2, block * t.rows};
}

void copy_x(const Conv3dWeightGradientParams& p, const Conv3dWeightGradientPlan& t,
            const Geometry& g, const Piece& piece, int64_t channel, int64_t channels,
            const float* zeros, float* dst) {
  const int64_t image_plane = p.height * p.width;
  const int64_t rows = p.stride == 1 ? t.rows + 2 : 2 * t.rows + 1;
  for (int64_t c = 0; c < channels; ++c, dst += g.x_channel) {
    const float* volume = p.x + (piece.image * p.channels + channel + c) * p.frames * image_plane;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = piece.row * p.stride - 1 + r;
      const float* frames[4];
      for (int64_t f = 0; f < 4; ++f) {
        const int64_t n = piece.frame - 1 + f;
        const bool inside = n >= 0 && n < p.frames && h >= 0 && h < p.height;
        frames[f] = inside ? volume + n * image_plane + h * p.width : zeros;
      }
      if (p.stride == 1)
        copy_x_row<1>(frames, p.width, g.x_slot, 0, dst + r * g.row);
      else  // r = 0 is a row of odd number
        copy_x_row<2>(frames, p.width, g.x_slot, g.x_plane,
                      dst + (r % 2 == 0 ? 0 : 2 * g.x_plane) + r / 2 * g.row);
    }
  }
}

// The same of two frames of a row of grad.
GPLWS_INLINE void copy_grad_vectors(Vec a, Vec b, int64_t slot, float* dst) {
  store(dst, a);
  store(dst + slot, a + b);
  store(dst + 2 * slot, a - b);
  store(dst + 3 * slot, -b);
}

void copy_grad(const Conv3dWeightGradientParams& p, const Conv3dWeightGradientPlan& t,
               const Geometry& g, const Piece& piece, int64_t channel, int64_t channels,
               const float* zeros, float* dst) {
  const int64_t image_plane = p.height_out * p.width_out;
  const int64_t whole = p.width_out / kLanes * kLanes;
  const int rest = static_cast<int>(p.width_out - whole);
  for (int64_t c = 0; c < channels; ++c, dst += g.grad_channel) {
    const float* volume =
        p.grad + (piece.image * p.channels_out + channel + c) * p.frames * image_plane;
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t h = piece.row + r, n = piece.frame;
      const float* row = volume + n * image_plane + h * p.width_out;
      const float* first = h < p.height_out ? row : zeros;
      const float* second = h < p.height_out && n + 1 < p.frames ? row + image_plane : zeros;
      float* to = dst + r * g.row;
      int64_t w = 0;
      for (; w < whole; w += kLanes)
        copy_grad_vectors(load(first + w), load(second + w), g.grad_slot, to + w);
      if (rest > 0)
        copy_grad_vectors(load_first(first + w, rest), load_first(second + w, rest), g.grad_slot,
                          to + w);
    }
  }
}

// What the inner loop reads of one slot: rows of some channels of grad, and of x where the taps of
// one row of the window begin.
struct Operands {
  const float* grad;
  const float* x;      // the first and the last tap
  const float* x_mid;  // the tap between them, with stride 2
  int64_t grad_channel, x_channel;
  int64_t piece, pieces, length;
};

// sums[(o * In + i) * 3 + kw]. Not inlined: in the middle of a larger function the compiler runs
// out of registers.
template <int Out, int In, int Stride>
__attribute__((noinline)) void sum_products(const Operands& s, Vec* sums) {
  Vec acc[Out][In][3] = {};
  for (int64_t piece = 0; piece < s.pieces; ++piece) {
    const float* grad = s.grad + piece * s.piece;
    const float* x = s.x + piece * s.piece;
    const float* x_mid = s.x_mid + piece * s.piece;
    for (int64_t w = 0; w < s.length; w += kLanes) {
      Vec g[Out];
#pragma GCC unroll 4
      for (int o = 0; o < Out; ++o) g[o] = load_once(grad + o * s.grad_channel + w);
#pragma GCC unroll 4
      for (int i = 0; i < In; ++i) {
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
          const float* tap = x + k;
          if (Stride == 2) tap = k == 1 ? x_mid : x + k / 2;
          const Vec v = load_once(tap + i * s.x_channel + w);
#pragma GCC unroll 4
          for (int o = 0; o < Out; ++o) acc[o][i][k] += g[o] * v;
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < Out; ++o) {
#pragma GCC unroll 4
    for (int i = 0; i < In; ++i) {
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) sums[(o * In + i) * 3 + k] = acc[o][i][k];
    }
  }
}

// Adds the lanes of each of kSums vectors to one float each. Pairs of vectors become one with half
// as many lanes for each, until all lanes are added up.
void add_lanes(Vec* sums, float* partial) {
  int count = kSums;
#pragma GCC unroll 4
  for (int lanes = kLanes; lanes > 1; lanes /= 2) {
    count /= 2;
#pragma GCC unroll 16
    for (int j = 0; j < count; ++j)
      sums[j] = even_lanes(sums[2 * j], sums[2 * j + 1]) + odd_lanes(sums[2 * j], sums[2 * j + 1]);
  }
  for (int j = 0; j < count; ++j) store(partial + j * kLanes, load(partial + j * kLanes) + sums[j]);
}

template <int Stride>
void sum_products(const Operands& s, int64_t out, int64_t in, Vec* sums) {
#define GPLWS_SUM(o, i)                                                       \
  if (out == o && in == i) {                                                  \
    if constexpr (o <= kOut && i <= kIn) sum_products<o, i, Stride>(s, sums); \
    return;                                                                   \
  }
  GPLWS_SUM(3, 3)
  GPLWS_SUM(3, 2)
  GPLWS_SUM(3, 1)
  GPLWS_SUM(2, 3)
  GPLWS_SUM(2, 2)
  GPLWS_SUM(2, 1)
  GPLWS_SUM(1, 3)
  GPLWS_SUM(1, 2)
  GPLWS_SUM(1, 1)
#undef GPLWS_SUM
}

// The channels of a channel block.
struct Block {
  int64_t in, inputs, out, outputs;  // first one and number, of x and of grad
};

Block block_of(const Conv3dWeightGradientParams& p, const Conv3dWeightGradientPlan& t,
               int64_t index) {
  const int64_t inputs = p.channels / p.groups, outputs = p.channels_out / p.groups;
  const int64_t in = index % t.blocks_in * t.block_in;
  index /= t.blocks_in;
  const int64_t out = index % t.blocks_out * t.block_out, group = index / t.blocks_out;
  return {group * inputs + in, min64(t.block_in, inputs - in), group * outputs + out,
          min64(t.block_out, outputs - out)};
}

// Sums of all pairs of channels of a block over the pieces in scratch:
// partial[slot][kh][block of kOut][block of kIn][kSums].
template <int Stride>
void sum_chunk(const Geometry& g, const Block& block, int64_t pieces, const float* scratch,
               float* partial) {
  alignas(GPLWS_VEC_BYTES) Vec sums[kSums] = {};
  Operands s;
  s.grad_channel = g.grad_channel;
  s.x_channel = g.x_channel;
  s.piece = g.piece;
  s.pieces = pieces;
  s.length = g.length;
  for (int64_t slot = 0; slot < kSlots; ++slot)
    for (int64_t kh = 0; kh < 3; ++kh) {
      // Where the first tap of this row of the window begins.
      const float* x = scratch + slot * g.x_slot;
      if (Stride == 1)
        x += kh * g.row;
      else
        x += kh == 1 ? 2 * g.x_plane : kh / 2 * g.row;
      for (int64_t o = 0; o < block.outputs; o += kOut)
        for (int64_t i = 0; i < block.inputs; i += kIn) {
          s.grad = scratch + g.grad + o * g.grad_channel + slot * g.grad_slot;
          s.x = x + i * g.x_channel;
          s.x_mid = s.x + g.x_plane;
          sum_products<Stride>(s, min64(kOut, block.outputs - o), min64(kIn, block.inputs - i),
                               sums);
          add_lanes(sums, partial);
          partial += kSums;
        }
    }
}

void accumulate(const Conv3dWeightGradientParams& p, const Conv3dWeightGradientPlan& t,
                int64_t begin, int64_t end, float* scratch) {
  const Geometry g = geometry(p, t.rows, t.block_in, t.block_out);
  // The zeros between and behind the rows stay as they are.
  memset(scratch, 0, t.scratch_floats * sizeof(*scratch));
  const float* zeros = scratch + t.chunk_pieces * g.piece;
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_of(p, t, task / t.slices);
    const int64_t slice = task % t.slices;
    const int64_t last = t.pieces * (slice + 1) / t.slices;
    float* partial = p.partial + task * t.partial_floats;
    memset(partial, 0, t.partial_floats * sizeof(*partial));
    for (int64_t first = t.pieces * slice / t.slices; first < last; first += t.chunk_pieces) {
      const int64_t pieces = min64(t.chunk_pieces, last - first);
      for (int64_t i = 0; i < pieces; ++i) {
        const Piece piece = piece_of(p, t, first + i);
        float* dst = scratch + i * g.piece;
        copy_x(p, t, g, piece, block.in, block.inputs, zeros, dst);
        copy_grad(p, t, g, piece, block.out, block.outputs, zeros, dst + g.grad);
      }
      if (p.stride == 1)
        sum_chunk<1>(g, block, pieces, scratch, partial);
      else
        sum_chunk<2>(g, block, pieces, scratch, partial);
    }
  }
}

void finish(const Conv3dWeightGradientParams& p, const Conv3dWeightGradientPlan& t, int64_t begin,
            int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    float* partial = p.partial + index * t.slices * t.partial_floats;
    for (int64_t slice = 1; slice < t.slices; ++slice)
      for (int64_t i = 0; i < t.partial_floats; i += kLanes)
        store(partial + i, load(partial + i) + load(partial + slice * t.partial_floats + i));
    const Block block = block_of(p, t, index);
    const int64_t inputs = p.channels / p.groups, group = block.out / (p.channels_out / p.groups);
    const int64_t out_blocks = ceil_div(block.outputs, kOut);
    const int64_t in_blocks = ceil_div(block.inputs, kIn);
    const int64_t row = out_blocks * in_blocks * kSums, slot = 3 * row;
    for (int64_t o = 0; o < block.outputs; ++o)
      for (int64_t i = 0; i < block.inputs; ++i) {
        const int64_t width = min64(kIn, block.inputs - i / kIn * kIn);
        const float* m =
            partial + (o / kOut * in_blocks + i / kIn) * kSums + (o % kOut * width + i % kIn) * 3;
        float* w =
            p.weight_gradient + ((block.out + o) * inputs + block.in - group * inputs + i) * 27;
        for (int64_t kh = 0; kh < 3; ++kh)
          for (int64_t kw = 0; kw < 3; ++kw) {
            const float* sum = m + kh * row + kw;
            const float m1 = 0.5f * sum[slot], m2 = 0.5f * sum[2 * slot];
            float* tap = w + kh * 3 + kw;
            tap[0] = sum[0] + (m1 + m2);
            tap[9] = m1 - m2;
            tap[18] = (m1 + m2) + sum[3 * slot];
          }
      }
  }
}

}  // namespace

extern const Conv3dWeightGradientKernel kConv3dWeightGradient;
const Conv3dWeightGradientKernel kConv3dWeightGradient{plan, accumulate, finish};

}  // namespace gplws::cpu::GPLWS_ISA
