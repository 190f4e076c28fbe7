// Body of the gradient of the input of a grouped 3x3x3 conv with stride 2 in rows and columns,
// compiled once per ISA (GPLWS_ISA).
//
// It is a transposed conv: row a of grad reaches the input rows 2a - 1, 2a and 2a + 1, so an even
// row of the result sees one row of the window and an odd one two, and so do columns. A vector of
// neighbouring pixels of grad, those to the right, below and right below therefore make four result
// vectors with 1, 2, 2 and 4 taps: its quad. Even and odd columns are interleaved when they are
// stored.
//
// Rows are as short as 5 pixels in the lower levels of the network, so a vector must not end with
// its row. grad is copied into scratch, where the rows follow each other with one zero in between,
// which is the padding to the right, and the loop runs over one long row:
//
//   scratch[channel of grad][slot][row][column]
//
// What it makes at the place of that zero is dropped: results are gathered in scratch, and rows
// without it are copied from there.
//
// The four slots are those of Winograd's minimal filtering along the frames, F(2, 3): differences
// and a sum of frames n - 1 .. n + 2 give frames n and n + 1 of the result with 4 x 9 taps where
// the plain sum has 54. They are made while grad is copied.
//
// Source: S. Winograd, "Arithmetic Complexity of Computations", SIAM 1980,
// doi:10.1137/1.9781611970364; A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural
// Networks", CVPR 2016, doi:10.1109/CVPR.2016.435.
#include "conv3d_input_gradient.h"

#include <stdint.h>
#include <string.h>

namespace gplws::cpu::GPLWS_ISA {

#include "vec.h"

#include "sizes.h"

namespace {

constexpr int kSlots = 4;
constexpr int kTaps = 9;  // of a slot
constexpr int kQuad = 4;  // (even, odd row) x (even, odd column)
// Channels of the result whose quads share the accumulators: 24 of 32 registers, or 12 of 16.
constexpr int kMaxBlock = kAccumulators / kQuad;

constexpr int64_t kScratchFloats = 176 * 1024;  // 704 KiB: a task should stay in L2
constexpr int64_t kMinRows = 4;                 // the row below them is copied once more
constexpr int64_t kTasksPerThread = 4;

// Sizes in floats.
struct Geometry {
  int64_t row;      // columns of grad and the zero behind them
  int64_t length;   // of the long row, in whole vectors
  int64_t slot;     // one plane of grad
  int64_t channel;  // its four slots
  int64_t result;   // where results are gathered
  int64_t line;     // of them: every other row of one channel and frame
  int64_t zeros, end;
};

Geometry geometry(const Conv3dInputGradientParams& p, int64_t rows) {
  Geometry g;
  g.row = p.width_out + 1;
  g.length = ceil_div(rows * g.row - 1, kLanes) * kLanes;
  // The row below and, as whole vectors are stored and read, one vector more.
  g.slot = plane_size((rows + 1) * g.row + kLanes);
  g.channel = kSlots * g.slot;
  g.result = p.channels_out / p.groups * g.channel;
  g.line = plane_size(2 * g.length);
  g.zeros = g.result + 2 * 2 * kMaxBlock * g.line;
  g.end = g.zeros + p.width_out + kLanes;
  return g;
}

Conv3dInputGradientPlan plan(const Conv3dInputGradientParams& p, int64_t threads) {
  const int64_t columns = p.batch * p.groups * ceil_div(p.frames, 2);
  const int64_t wanted = ceil_div(kTasksPerThread * threads, columns);  // row blocks
  int64_t rows = max64(min64(kMinRows, p.height_out), p.height_out / wanted);
  while (rows > 1 && geometry(p, rows).end > kScratchFloats) --rows;
  Conv3dInputGradientPlan t;
  t.row_blocks = ceil_div(p.height_out, rows);
  t.rows = ceil_div(p.height_out, t.row_blocks);
  t.tasks = columns * t.row_blocks;
  t.scratch_floats = geometry(p, t.rows).end;
  return t;
}

int64_t packed_size(const Conv3dInputGradientParams& p) {
  return p.channels * (p.channels_out / p.groups) * kSlots * kTaps;
}

// The taps of the window in the order in which add_taps needs them: those of the pixel here, to the
// right, below and right below.
constexpr int kTapOrder[kTaps] = {4, 5, 7, 8, 3, 6, 1, 2, 0};
// Slots in the order in which make_block needs them.
constexpr int kSlotOrder[kSlots] = {1, 2, 0, 3};

int next_block(int64_t channels) {
  constexpr int kBlocks[] = {6, 4, 3, 2};
  for (int block : kBlocks)
    if (channels >= block && block <= kMaxBlock) return block;
  return 1;
}

// packed[group][block of channels][slot][channel of grad][tap][channel of the block]
void pack(const Conv3dInputGradientParams& p, const float* weight, float* packed) {
  const int64_t inputs = p.channels / p.groups, outputs = p.channels_out / p.groups;
  for (int64_t group = 0; group < p.groups; ++group)
    for (int64_t first = 0; first < inputs;) {
      const int block = next_block(inputs - first);
      for (int slot : kSlotOrder)
        for (int64_t o = 0; o < outputs; ++o)
          for (int tap : kTapOrder)
            for (int k = 0; k < block; ++k) {
              const float* w = weight + ((group * outputs + o) * inputs + first + k) * 27 + tap;
              // Transposed, the frames of the window follow each other backwards.
              const float before = w[2 * kTaps], here = w[kTaps], behind = w[0];
              const float slots[kSlots] = {before, 0.5f * (before + here + behind),
                                           0.5f * (before - here + behind), -behind};
              *packed++ = slots[slot];
            }
      first += block;
    }
}

// Rows of grad from `first_row` on, of frames `frame` - 1 .. `frame` + 2, into the four slots.
// Zeros behind the end of a row are stored too: the next row begins there and is copied later.
void copy_grad(const Conv3dInputGradientParams& p, const Geometry& g, int64_t image, int64_t group,
               int64_t frame, int64_t first_row, int64_t rows, float* scratch) {
  const int64_t outputs = p.channels_out / p.groups, plane = p.height_out * p.width_out;
  const float* zeros = scratch + g.zeros;
  for (int64_t o = 0; o < outputs; ++o) {
    const float* volume =
        p.grad + (image * p.channels_out + group * outputs + o) * p.frames * plane;
    for (int64_t r = 0; r <= rows; ++r) {
      const int64_t h = first_row + r;
      const float* d[4];
      for (int64_t f = 0; f < 4; ++f) {
        const int64_t n = frame - 1 + f;
        const bool inside = n >= 0 && n < p.frames && h < p.height_out;
        d[f] = inside ? volume + n * plane + h * p.width_out : zeros;
      }
      float* to = scratch + o * g.channel + r * g.row;
      for (int64_t w = 0; w < p.width_out; w += kLanes, to += kLanes) {
        const int count = static_cast<int>(min64(p.width_out - w, kLanes));
        const Vec d0 = load_first(d[0] + w, count), d1 = load_first(d[1] + w, count);
        const Vec d2 = load_first(d[2] + w, count), d3 = load_first(d[3] + w, count);
        store(to, d0 - d2);
        store(to + g.slot, d1 + d2);
        store(to + 2 * g.slot, d2 - d1);
        store(to + 3 * g.slot, d1 - d3);
      }
    }
  }
}

// Adds what one slot of one channel of grad contributes to the quads of K channels; w[tap * K + k].
template <int K>
GPLWS_INLINE void add_taps(const float* x, int64_t row, const float* w, Vec (&sums)[K][kQuad]) {
  const Vec here = load_once(x), right = load_once(x + 1);
  const Vec below = load_once(x + row), right_below = load_once(x + row + 1);
#pragma GCC unroll 6
  for (int k = 0; k < K; ++k) {
    sums[k][0] += broadcast(w[k]) * here;
    sums[k][1] += broadcast(w[K + k]) * here;
    sums[k][2] += broadcast(w[2 * K + k]) * here;
    sums[k][3] += broadcast(w[3 * K + k]) * here;
  }
#pragma GCC unroll 6
  for (int k = 0; k < K; ++k) {
    sums[k][1] += broadcast(w[4 * K + k]) * right;
    sums[k][3] += broadcast(w[5 * K + k]) * right;
  }
#pragma GCC unroll 6
  for (int k = 0; k < K; ++k) {
    sums[k][2] += broadcast(w[6 * K + k]) * below;
    sums[k][3] += broadcast(w[7 * K + k]) * below;
  }
#pragma GCC unroll 6
  for (int k = 0; k < K; ++k) sums[k][3] += broadcast(w[8 * K + k]) * right_below;
}

template <int K>
GPLWS_INLINE void store_quads(const Vec (&sums)[K][kQuad], int64_t line, float* to) {
#pragma GCC unroll 6
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd, to += line) {
      store(to, interleave_low(sums[k][2 * odd], sums[k][2 * odd + 1]));
      store(to + kLanes, interleave_high(sums[k][2 * odd], sums[k][2 * odd + 1]));
    }
  }
}

// Two frames of the result of K channels over the long row: to[frame][channel][even, odd row].
// Not inlined: in the middle of a larger function the compiler runs out of registers.
template <int K>
__attribute__((noinline)) void make_block(const Geometry& g, int64_t outputs, const float* grad,
                                          const float* weight, float* to) {
  for (int64_t i = 0; i < g.length; i += kLanes) {
    const float* w = weight;
    // The sums of slots 1 and 2, m1 and m2, are needed by both frames: m0 goes on top of m1 + m2,
    // and -m3 on top of m1 - m2.
    Vec sums[K][kQuad] = {}, kept[K][kQuad] = {};
    for (int step = 0; step < kSlots; ++step) {
      const float* x = grad + i + kSlotOrder[step] * g.slot;
      for (int64_t o = 0; o < outputs; ++o) {
        add_taps<K>(x, g.row, w, sums);
        x += g.channel;
        w += kTaps * K;
      }
      if (step >= 2) store_quads<K>(sums, g.line, to + 2 * i + (step - 2) * 2 * K * g.line);
#pragma GCC unroll 6
      for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
        for (int q = 0; q < kQuad; ++q) {
          const Vec sum = sums[k][q];
          sums[k][q] = step == 0 ? Vec{} : step == 1 ? kept[k][q] + sum : kept[k][q];
          kept[k][q] = step == 0 ? sum : kept[k][q] - sum;
        }
      }
    }
  }
}

void make_block(int channels, const Geometry& g, int64_t outputs, const float* grad,
                const float* weight, float* to) {
  switch (channels) {
#define GPLWS_BLOCK(K)                                                         \
  case K:                                                                      \
    if constexpr (K <= kMaxBlock) make_block<K>(g, outputs, grad, weight, to); \
    break;
    GPLWS_BLOCK(1)
    GPLWS_BLOCK(2)
    GPLWS_BLOCK(3)
    GPLWS_BLOCK(4)
    GPLWS_BLOCK(6)
#undef GPLWS_BLOCK
  }
}

void run(const Conv3dInputGradientParams& p, const Conv3dInputGradientPlan& t, int64_t begin,
         int64_t end, float* scratch) {
  const Geometry g = geometry(p, t.rows);
  // The zeros between and behind the rows stay as they are.
  memset(scratch, 0, t.scratch_floats * sizeof(*scratch));
  const int64_t inputs = p.channels / p.groups, outputs = p.channels_out / p.groups;
  const int64_t pairs = ceil_div(p.frames, 2), plane = p.height * p.width;
  float* result = scratch + g.result;
  for (int64_t task = begin; task < end; ++task) {
    int64_t index = task;
    const int64_t first_row = index % t.row_blocks * t.rows;
    index /= t.row_blocks;
    const int64_t frame = index % pairs * 2;
    index /= pairs;
    const int64_t group = index % p.groups, image = index / p.groups;
    copy_grad(p, g, image, group, frame, first_row, t.rows, scratch);
    const int64_t frames = min64(2, p.frames - frame);
    const int64_t top = 2 * first_row, height = min64(2 * t.rows, p.height - top);
    const float* weight = p.packed + group * inputs * outputs * kSlots * kTaps;
    for (int64_t first = 0; first < inputs;) {
      const int block = next_block(inputs - first);
      make_block(block, g, outputs, scratch, weight, result);
      weight += block * outputs * kSlots * kTaps;
      for (int64_t f = 0; f < frames; ++f)
        for (int k = 0; k < block; ++k) {
          const int64_t channel = image * p.channels + group * inputs + first + k;
          float* y = p.input_gradient + (channel * p.frames + frame + f) * plane + top * p.width;
          const float* lines = result + (f * block + k) * 2 * g.line;
          for (int64_t r = 0; r < height; ++r)
            memcpy(y + r * p.width, lines + r % 2 * g.line + r / 2 * 2 * g.row,
                   p.width * sizeof(*y));
        }
      first += block;
    }
  }
}

}  // namespace

extern const Conv3dInputGradientKernel kConv3dInputGradient;
const Conv3dInputGradientKernel kConv3dInputGradient{packed_size, pack, plan, run};

}  // namespace gplws::cpu::GPLWS_ISA
