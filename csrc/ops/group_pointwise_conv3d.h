// What the CPU and the CUDA op share: the checks that guard memory, and the sizes of the result.
// The Python wrapper gives friendlier errors; these hold for direct calls of torch.ops.
#pragma once

#include "tensors.h"

namespace gplws {

// The operands of a call; those that may be absent as optional tensors.
struct GroupPointwiseConv3dOperands {
  const Tensor& x;
  const Tensor weight;
  const OptionalTensor bias, pointwise_weight, pointwise_bias, residual;
};

struct GroupPointwiseConv3dOptions {
  int64_t groups, stride;
  bool relu, pointwise_relu, residual_relu;
};

struct GroupPointwiseConv3dSizes {
  int64_t batch, channels, middle, channels_out;
  int64_t frames, height, width, height_out, width_out;

  std::vector<int64_t> output() const {
    return {batch, channels_out, frames, height_out, width_out};
  }
};

inline GroupPointwiseConv3dSizes check_group_pointwise_conv3d(
    const GroupPointwiseConv3dOperands& operands, const GroupPointwiseConv3dOptions& options) {
  const char* kOp = "group_pointwise_conv3d";
  const auto& [x, weight, bias, pointwise_weight, pointwise_bias, residual] = operands;
  const int64_t groups = options.groups, stride = options.stride;
  check_float_dtype(kOp, x);
  check(x.dim() == 5, "group_pointwise_conv3d: x must be (B, C, N, H, W)");
  check(weight.dim() == 5, "group_pointwise_conv3d: weight must be 5-D");
  check(stride == 1 || stride == 2, "group_pointwise_conv3d: stride must be 1 or 2, got ", stride);
  GroupPointwiseConv3dSizes s;
  s.batch = x.size(0);
  s.channels = x.size(1);
  s.frames = x.size(2);
  s.height = x.size(3);
  s.width = x.size(4);
  s.height_out = s.height == 0 ? 0 : (s.height - 1) / stride + 1;
  s.width_out = s.width == 0 ? 0 : (s.width - 1) / stride + 1;
  s.middle = weight.size(0);
  check(groups >= 1 && s.channels % groups == 0 && s.middle % groups == 0,
        "group_pointwise_conv3d: groups = ", groups, " must divide the ", s.channels,
        " input channels and the ", s.middle, " channels of weight");
  check_operand(kOp, weight, "weight", x, {s.middle, s.channels / groups, 3, 3, 3});
  if (bias) check_operand(kOp, *bias, "bias", x, {s.middle});
  s.channels_out = s.middle;
  if (pointwise_weight) {
    check(pointwise_weight->dim() == 5, "group_pointwise_conv3d: pointwise_weight must be 5-D");
    s.channels_out = pointwise_weight->size(0);
    check_operand(kOp, *pointwise_weight, "pointwise_weight", x,
                  {s.channels_out, s.middle, 1, 1, 1});
    if (pointwise_bias) check_operand(kOp, *pointwise_bias, "pointwise_bias", x, {s.channels_out});
  } else {
    check(!pointwise_bias, "group_pointwise_conv3d: pointwise_bias without pointwise_weight");
  }
  if (residual) check_operand(kOp, *residual, "residual", x, s.output());
  return s;
}

// What the params of all kernels have in common: neither pointers nor strides.
template <class Params>
Params group_pointwise_conv3d_params(const GroupPointwiseConv3dSizes& s,
                                     const GroupPointwiseConv3dOperands& operands,
                                     const GroupPointwiseConv3dOptions& options) {
  Params p{};
  p.batch = s.batch;
  p.channels = s.channels;
  p.middle = s.middle;
  p.channels_out = s.channels_out;
  p.frames = s.frames;
  p.height = s.height;
  p.width = s.width;
  p.height_out = s.height_out;
  p.width_out = s.width_out;
  p.groups = options.groups;
  p.stride = options.stride;
  p.pointwise = operands.pointwise_weight.has_value();
  p.relu = options.relu;
  p.pointwise_relu = options.pointwise_relu;
  p.residual_relu = options.residual_relu;
  return p;
}

inline void check_group_pointwise_conv3d_apart(const Tensor& out,
                                               const GroupPointwiseConv3dOperands& operands) {
  const Tensor* const same = tensor_or_null(operands.residual);
  check_apart("group_pointwise_conv3d", {"out", &out},
              {{"x", &operands.x},
               {"weight", &operands.weight},
               {"bias", tensor_or_null(operands.bias)},
               {"pointwise_weight", tensor_or_null(operands.pointwise_weight)},
               {"pointwise_bias", tensor_or_null(operands.pointwise_bias)},
               {"residual", same}},
              same);
}

}  // namespace gplws
