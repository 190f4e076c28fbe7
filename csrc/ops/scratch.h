// Working memory of one thread during one call.
#pragma once

#include <stdlib.h>

#include <cstdint>

#include "check.h"

namespace gplws {

class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    // Not std::aligned_alloc, which wants a multiple of the alignment: of memory that ends where it
    // should, AddressSanitizer sees every access beyond.
    void* memory = nullptr;
    const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
    check(posix_memalign(&memory, kAlignment, bytes) == 0, "out of memory: no room for ", bytes,
          " bytes of scratch");
    data_ = static_cast<float*>(memory);
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() { return data_; }

 private:
  static constexpr size_t kAlignment = 64;
  float* data_;
};

}  // namespace gplws
