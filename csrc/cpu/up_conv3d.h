// Transposed 3x3x3 conv that doubles H and W, on the CPU, float32 and bfloat16:
// what op and kernels agree on.
#pragma once
#include <cstdint>

namespace gplws::cpu {

// All tensors contiguous; optional ones may be null.
struct UpConv3dParams {
  const void* x;         // (batch, channels, frames, height, width)
  const float* weight;   // (channels, 1, 3, 3, 3)
  const float* bias;     // (channels_out)
  const void* residual;  // shape of y
  void* y;               // (batch, channels_out, frames, 2 height, 2 width)
  int64_t batch, channels, channels_out;
  int64_t frames, height, width;
};

// Rows of the input that one task turns into twice as many rows, over all frames of one channel.
constexpr int64_t kUpConv3dTaskRows = 8;

struct UpConv3dKernel {
  // Computes tasks [begin, end) of batch x channels_out x ceil(height / kUpConv3dTaskRows).
  void (*run)(const UpConv3dParams&, int64_t begin, int64_t end);
};

// By the dtype of x, residual and y; weight and bias are float32 for both.
struct UpConv3dTable {
  UpConv3dKernel float32, bfloat16;
};

// The kernel of the ISA in use.
const UpConv3dKernel& up_conv3d_kernel(bool bfloat16);

}  // namespace gplws::cpu
