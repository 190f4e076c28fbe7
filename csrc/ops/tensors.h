// Small helpers that all ops share: what a tensor is, said once.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace gplws {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Dense in the order `axes` (innermost first); axes of size 1 may have any stride.
template <size_t D>
bool is_dense(const Tensor& t, const int64_t (&axes)[D]) {
  int64_t expected = 1;
  for (const int64_t axis : axes) {
    const int64_t size = t.size(axis);
    if (size == 1) continue;
    if (t.stride(axis) != expected) return false;
    expected *= size;
  }
  return true;
}

// The memory format of a result that follows the 5-D input `x`: channels_last_3d where x is dense
// in that order and not in the default one, else contiguous.
inline MemoryFormat followed_format(const Tensor& x) {
  if (x.numel() == 0 || is_dense(x, {4, 3, 2, 1, 0})) return MemoryFormat::Contiguous;
  return is_dense(x, {1, 4, 3, 2, 0}) ? MemoryFormat::ChannelsLast3d : MemoryFormat::Contiguous;
}

inline bool same_device(const Tensor& a, const Tensor& b) { return a.device() == b.device(); }

inline const float* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr<float>() : nullptr;
}

inline OptionalTensor contiguous_or_none(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

}  // namespace gplws
