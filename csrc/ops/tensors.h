// Small helpers that all ops share: what a tensor is, said once.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "check.h"

namespace gplws {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The most frames whose numbers float32 can tell apart; gplws/ops/arguments.py has it too.
constexpr int64_t kMostFrames = int64_t{1} << 24;

inline void check_frames(const char* op, const char* name, int64_t frames) {
  check(frames >= 1 && frames <= kMostFrames, op, ": ", name, " must have 1 to ", kMostFrames,
        " frames, got ", frames);
}

// Dense in the order `axes` (innermost first); axes of size 1 may have any stride, and so may all
// of a tensor without elements.
template <size_t D>
bool is_dense(const Tensor& t, const int64_t (&axes)[D]) {
  if (t.numel() == 0) return true;
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

// The tensors of a call lie on the device of the first one.
inline void check_device(const char* op, const Tensor& t, const char* name, const Tensor& first,
                         const char* first_name) {
  check(t.device() == first.device(), op, ": ", name, " is on another device than ", first_name);
}

inline void check_float_dtype(const char* op, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
            (dtype == ScalarType::Half && x.is_cuda()),
        op, ": x must be float32, bfloat16 or, on CUDA, float16");
}

// An operand of the dtype and device of the first argument, `x`, and of this shape.
inline void check_operand(const char* op, const Tensor& t, const char* name, const Tensor& x,
                          const std::vector<int64_t>& shape, const char* x_name = "x") {
  check(t.scalar_type() == x.scalar_type(), op, ": ", name, " has another dtype than ", x_name);
  check_device(op, t, name, x, x_name);
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = t.size(i) == shape[i];
  check(fits, op, ": ", name, " has the wrong shape");
}

// A tensor to write a result into.
inline void check_out(const char* op, const Tensor& out, const Tensor& x,
                      const std::vector<int64_t>& shape) {
  check_operand(op, out, "out", x, shape);
  check(is_dense(out, {4, 3, 2, 1, 0}), op, ": out must be contiguous");
}

// The same where a 5-D result may also be dense in channels_last_3d.
inline void check_out_in_any_format(const char* op, const Tensor& out, const Tensor& x,
                                    const std::vector<int64_t>& shape) {
  check_operand(op, out, "out", x, shape);
  check(is_dense(out, {4, 3, 2, 1, 0}) || is_dense(out, {1, 4, 3, 2, 0}), op,
        ": out must be contiguous or channels_last_3d");
}

// An operand of a call; null where it is absent.
struct NamedTensor {
  const char* name;
  const Tensor* tensor;
};

inline const Tensor* tensor_or_null(const OptionalTensor& t) { return t ? &*t : nullptr; }

// What a tensor with elements occupies: from its first byte to the one behind its last.
struct Memory {
  uintptr_t begin, end;

  explicit Memory(const Tensor& t) : begin(reinterpret_cast<uintptr_t>(t.const_data_ptr())) {
    const auto sizes = t.sizes(), strides = t.strides();
    int64_t last = 0;
    for (size_t axis = 0; axis < sizes.size(); ++axis) last += (sizes[axis] - 1) * strides[axis];
    end = begin + static_cast<uintptr_t>(last + 1) * t.element_size();
  }
};

// A tensor to write a result into lies apart from what other threads still read; `same` among that,
// which is read element by element, may begin where it begins.
inline void check_apart(const char* op, const NamedTensor& out,
                        const std::vector<NamedTensor>& operands, const Tensor* same = nullptr) {
  if (out.tensor->numel() == 0) return;
  const Memory written(*out.tensor);
  for (const NamedTensor& operand : operands) {
    if (operand.tensor == nullptr || operand.tensor->numel() == 0) continue;
    const Memory read(*operand.tensor);
    if (operand.tensor == same && read.begin == written.begin) continue;
    check(read.end <= written.begin || written.end <= read.begin, op, ": ", out.name,
          " must be apart from ", operand.name);
  }
}

inline const float* floats_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr<float>() : nullptr;
}

inline OptionalTensor contiguous_or_none(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

// Contiguous, in float32.
inline Tensor as_floats(const Tensor& t) {
  return torch::stable::contiguous(
      t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

inline OptionalTensor as_floats_or_none(const OptionalTensor& t) {
  return t ? OptionalTensor(as_floats(*t)) : std::nullopt;
}

}  // namespace gplws
