// Body of the transposed conv, compiled once per ISA (GPLWS_ISA).
//
// With stride 2, an even row or column of the result sees one tap of the kernel, an odd one two. A
// vector of neighbouring input pixels therefore makes four result vectors: (even, odd row) x (even,
// odd column), from the pixels themselves and those to the right, below, and right below. The even
// and odd columns are interleaved when they are stored.
#include "up_conv3d.h"

#include <stdint.h>

namespace gplws::cpu::GPLWS_ISA {

#include "vec.h"

namespace {

struct Quad {
  Vec even_even, even_odd, odd_even, odd_odd;  // row, column
};

// `count` pixels of a row from p on, of `width_left` that the row still has; zero behind its end.
struct Pixels {
  Vec here, right;
};

template <class Value>
GPLWS_INLINE Pixels load_pixels(const Value* p, int64_t width_left) {
  const int count = width_left < kLanes ? static_cast<int>(width_left) : kLanes;
  if (width_left > kLanes) return {load(p), load(p + 1)};
  return {load_first(p, count), load_first(p + 1, count - 1)};
}

// Adds what one frame of one input channel contributes; w[kh * 3 + kw].
template <class Value>
GPLWS_INLINE void add_taps(const Value* row, const Value* row_below, int64_t width_left,
                           const float* w, Quad& q) {
  const Pixels top = load_pixels(row, width_left);
  q.even_even += broadcast(w[4]) * top.here;
  q.even_odd += broadcast(w[5]) * top.here + broadcast(w[3]) * top.right;
  q.odd_even += broadcast(w[7]) * top.here;
  q.odd_odd += broadcast(w[8]) * top.here + broadcast(w[6]) * top.right;
  if (row_below == nullptr) return;
  const Pixels bottom = load_pixels(row_below, width_left);
  q.odd_even += broadcast(w[1]) * bottom.here;
  q.odd_odd += broadcast(w[2]) * bottom.here + broadcast(w[0]) * bottom.right;
}

template <class Value>
GPLWS_INLINE void store_interleaved(Vec even, Vec odd, const Value* residual, Value* y, int count) {
  const Vec low = interleave_low(even, odd), high = interleave_high(even, odd);
  const int first = count < kLanes ? count : kLanes, second = count - first;
  if (residual) {
    store_first(y, low + load_first(residual, first), first);
    if (second > 0) store_first(y + kLanes, high + load_first(residual + kLanes, second), second);
  } else {
    store_first(y, low, first);
    if (second > 0) store_first(y + kLanes, high, second);
  }
}

template <class Value>
void up_rows(const UpConv3dParams& p, int64_t image, int64_t k, int64_t frame, int64_t h) {
  const int64_t ratio = p.channels / p.channels_out, plane = p.height * p.width;
  const int64_t out_row = 2 * p.width;
  const int64_t out =
      ((image * p.channels_out + k) * p.frames + frame) * 4 * plane + 2 * h * out_row;
  const bool below = h + 1 < p.height;
  for (int64_t w = 0; w < p.width; w += kLanes) {
    const int64_t left = p.width - w;
    const Vec b = broadcast(p.bias ? p.bias[k] : 0.0f);
    Quad q{b, b, b, b};
    for (int64_t c = k * ratio; c < (k + 1) * ratio; ++c)
      for (int64_t kn = 0; kn < 3; ++kn) {
        const int64_t n = frame + 1 - kn;
        if (n < 0 || n >= p.frames) continue;
        const Value* row = static_cast<const Value*>(p.x) +
                           ((image * p.channels + c) * p.frames + n) * plane + h * p.width + w;
        add_taps(row, below ? row + p.width : nullptr, left, p.weight + c * 27 + kn * 9, q);
      }
    const int count = left < kLanes ? 2 * static_cast<int>(left) : 2 * kLanes;
    const int64_t at = out + 2 * w;
    const Value* residual = p.residual ? static_cast<const Value*>(p.residual) + at : nullptr;
    Value* y = static_cast<Value*>(p.y) + at;
    store_interleaved(q.even_even, q.even_odd, residual, y, count);
    store_interleaved(q.odd_even, q.odd_odd, residual ? residual + out_row : nullptr, y + out_row,
                      count);
  }
}

template <class Value>
void run(const UpConv3dParams& p, int64_t begin, int64_t end) {
  const int64_t strips = (p.height + kUpConv3dTaskRows - 1) / kUpConv3dTaskRows;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t strip = task % strips, k = task / strips % p.channels_out;
    const int64_t image = task / strips / p.channels_out;
    const int64_t first = strip * kUpConv3dTaskRows;
    const int64_t last =
        first + kUpConv3dTaskRows < p.height ? first + kUpConv3dTaskRows : p.height;
    for (int64_t n = 0; n < p.frames; ++n)
      for (int64_t h = first; h < last; ++h) up_rows<Value>(p, image, k, n, h);
  }
}

}  // namespace

extern const UpConv3dTable kUpConv3d;
const UpConv3dTable kUpConv3d{{run<float>}, {run<BFloat16>}};

}  // namespace gplws::cpu::GPLWS_ISA
