// Where the elements of a 5-D tensor lie, and how long its axes may be.
#pragma once

#include <cstdint>

namespace gplws::cuda {

// Strides in elements of a (B, C, N, H, W) tensor.
struct Strides5 {
  int64_t batch, channel, frame, row, column;
};

// The longest axis where coordinates have 32 bits, with room for the border and for the last,
// partly empty tile. Offsets have 64 bits: only memory limits the number of elements.
constexpr int64_t kMaxAxis = int64_t{1} << 30;

}  // namespace gplws::cuda
