// Images beyond their borders. Included only by <op>_kernel.h files, inside their per-ISA
// namespace.

// The pixel that stands for pixel i of n, which may lie outside, more than once mirrored.
static inline int64_t mirrored(int64_t i, int64_t n) {
  if (i >= 0 && i < n) return i;
  if (n == 1) return 0;
  const int64_t period = 2 * (n - 1);
  i %= period;
  if (i < 0) i += period;
  return i < n ? i : period - i;
}

// Fills `reach` pixels on both sides of a line of `width`, without repeating the edge.
static inline void mirror_ends(float* line, int64_t width, int64_t reach) {
  for (int64_t i = 1; i <= reach; ++i) {
    line[-i] = line[mirrored(-i, width)];
    line[width - 1 + i] = line[mirrored(width - 1 + i, width)];
  }
}
