// Weights and biases on the CPU, which kernels read in float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>

#include "scratch.h"
#include "tensors.h"

namespace gplws {

// The values of a float32 or bfloat16 tensor as contiguous floats: its own, or a copy. A conversion
// by torch takes longer than some layers of a small image.
class FloatValues {
 public:
  explicit FloatValues(const OptionalTensor& t) {
    if (!t) return;
    dense_ = torch::stable::contiguous(*t);
    if (dense_->scalar_type() == ScalarType::Float) {
      data_ = dense_->const_data_ptr<float>();
      return;
    }
    const auto* half = static_cast<const uint16_t*>(dense_->const_data_ptr());
    const int64_t count = dense_->numel();
    float* floats = widened_.emplace(count).data();
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(half[i]) << 16;
      memcpy(floats + i, &bits, sizeof(bits));
    }
    data_ = floats;
  }

  // Null where there is no tensor.
  const float* data() const { return data_; }

 private:
  OptionalTensor dense_;
  std::optional<Scratch> widened_;
  const float* data_ = nullptr;
};

}  // namespace gplws
