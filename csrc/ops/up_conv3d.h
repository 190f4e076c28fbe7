// What the CPU and the CUDA op share: the checks that guard memory, and the sizes of the result.
#pragma once

#include "tensors.h"

namespace gplws {

struct UpConv3dSizes {
  int64_t batch, channels, channels_out, frames, height, width;

  std::vector<int64_t> output() const {
    return {batch, channels_out, frames, 2 * height, 2 * width};
  }
};

inline UpConv3dSizes check_up_conv3d(const Tensor& x, const Tensor& weight,
                                     const OptionalTensor& bias, const OptionalTensor& residual,
                                     int64_t groups) {
  const char* kOp = "up_conv3d";
  check_float_dtype(kOp, x);
  check(x.dim() == 5, "up_conv3d: x must be (B, C, N, H, W)");
  UpConv3dSizes s{x.size(0), x.size(1), groups, x.size(2), x.size(3), x.size(4)};
  check(groups >= 1 && s.channels % groups == 0, "up_conv3d: groups = ", groups,
        " must divide the ", s.channels, " channels of x");
  check_operand(kOp, weight, "weight", x, {s.channels, 1, 3, 3, 3});
  if (bias) check_operand(kOp, *bias, "bias", x, {groups});
  if (residual) check_operand(kOp, *residual, "residual", x, s.output());
  return s;
}

inline void check_up_conv3d_apart(const Tensor& out, const Tensor& x, const Tensor& weight,
                                  const OptionalTensor& bias, const OptionalTensor& residual) {
  const Tensor* const same = tensor_or_null(residual);
  check_apart("up_conv3d", {"out", &out},
              {{"x", &x}, {"weight", &weight}, {"bias", tensor_or_null(bias)}, {"residual", same}},
              same);
}

}  // namespace gplws
