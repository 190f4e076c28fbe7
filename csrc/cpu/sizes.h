// Sizes of tiles and scratch. Included only by <op>_kernel.h files, inside their per-ISA namespace,
// after vec.h.

GPLWS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// To whole vectors.
GPLWS_INLINE int64_t round_up(int64_t floats) { return ceil_div(floats, kLanes) * kLanes; }
GPLWS_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
GPLWS_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// At least so many floats; an odd number of vectors, so that planes do not meet in the same sets of
// the cache.
GPLWS_INLINE int64_t plane_size(int64_t floats) { return (ceil_div(floats, kLanes) | 1) * kLanes; }
