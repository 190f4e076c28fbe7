// Where the elements of a 5-D tensor lie.
#pragma once

#include <cstdint>

namespace gplws::cuda {

// Strides in elements of a (B, C, N, H, W) tensor.
struct Strides5 {
  int64_t batch, channel, frame, row, column;
};

}  // namespace gplws::cuda
