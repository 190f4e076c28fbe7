// Division of integers by a number that is known before the kernel runs.
#pragma once

#include <cstdint>

namespace gplws::cuda {

// Quotients of 0 .. 2^31 - 1 by a multiplication and a shift (Granlund and Montgomery, "Division by
// invariant integers using multiplication", 1994).
struct Divider {
  int divisor;
  uint32_t multiplier;
  int shift;

  static constexpr Divider of(int divisor) {
    int shift = 0;
    while (int64_t{1} << shift < divisor) ++shift;
    const uint64_t rest = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
    const uint64_t multiplier = (rest << 32) / static_cast<uint64_t>(divisor) + 1;
    return {divisor, static_cast<uint32_t>(multiplier), shift};
  }

  constexpr int quotient(int number) const {
    const uint32_t n = static_cast<uint32_t>(number);
    const uint32_t high = static_cast<uint32_t>(uint64_t{multiplier} * n >> 32);
    return static_cast<int>((high + n) >> shift);
  }
};

static_assert(Divider::of(1).quotient(0x7fffffff) == 0x7fffffff);
static_assert(Divider::of(2).quotient(0x7fffffff) == 0x3fffffff);
static_assert(Divider::of(3).quotient(0x7fffffff) == 0x7fffffff / 3);
static_assert(Divider::of(7).quotient(48) == 6 && Divider::of(7).quotient(49) == 7);
static_assert(Divider::of(0x7fffffff).quotient(0x7ffffffe) == 0);
static_assert(Divider::of(0x7fffffff).quotient(0x7fffffff) == 1);

}  // namespace gplws::cuda
