// Loops shared out among the threads of torch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>
#include <mutex>

#include "scratch.h"

namespace gplws {

// Pieces of work worth a thread: values that are looked at once, and pixels that take long each.
constexpr int64_t kValuesWorthAThread = 1 << 16;
constexpr int64_t kPixelsWorthAThread = 1 << 12;

// How many items of `size` values or pixels each are worth a thread.
constexpr int64_t grain_of(int64_t worth, int64_t size) { return worth / size + 1; }

// Calls work(begin, end) for pieces of 0 .. count, of at least `grain` where there are so many.
// torch's loop says no more of an error than that there was one: here the first is kept, and thrown
// once all threads have ended.
template <class Work>
void parallel_for(int64_t count, int64_t grain, const Work& work) {
  std::mutex mutex;
  std::exception_ptr error;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      work(begin, end);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// The same with scratch memory of a thread's own: work(begin, end, scratch).
template <class Work>
void parallel_for_with_scratch(int64_t count, int64_t grain, int64_t scratch_floats,
                               const Work& work) {
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(scratch_floats);
    work(begin, end, scratch.data());
  });
}

}  // namespace gplws
