// Working memory of one thread during one call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace gplws {

class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    // std::aligned_alloc wants a multiple of the alignment.
    const size_t bytes =
        (static_cast<size_t>(floats) * sizeof(float) + kAlignment) & ~(kAlignment - 1);
    data_ = static_cast<float*>(std::aligned_alloc(kAlignment, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() { return data_; }

 private:
  static constexpr size_t kAlignment = 64;
  float* data_;
};

}  // namespace gplws
