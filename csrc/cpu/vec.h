// The vector type of the kernels: GCC/Clang vector extensions, as wide as the ISA that the
// including file is compiled for. Included only by <op>_kernel.h files, inside their per-ISA
// namespace, and free of STL headers: an inline function of the STL compiled with AVX-512 flags
// could be picked by the linker for baseline code.
#include <stdint.h>

#if defined(__AVX512F__)
#define GPLWS_VEC_BYTES 64
#elif defined(__AVX2__)
#define GPLWS_VEC_BYTES 32
#else
#define GPLWS_VEC_BYTES 16
#endif

typedef float Vec __attribute__((vector_size(GPLWS_VEC_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(GPLWS_VEC_BYTES)));
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#define __builtin_shufflevector(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif
typedef float UnalignedVec __attribute__((vector_size(GPLWS_VEC_BYTES), aligned(4), may_alias));

constexpr int kLanes = GPLWS_VEC_BYTES / 4;

// Registers that one inner loop may fill with accumulators, leaving room for its operands.
#if defined(__AVX512F__)
constexpr int kAccumulators = 24;  // of 32
#else
constexpr int kAccumulators = 12;  // of 16
#endif

#define GPLWS_INLINE static inline __attribute__((always_inline))

GPLWS_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }

// A value in a register, of which the compiler must not know where it is from.
GPLWS_INLINE Vec settled(Vec v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

// A load that is not repeated as the memory operand of each of its uses: a misaligned 64-byte load
// costs two cycles, a register none.
GPLWS_INLINE Vec load_once(const float* p) { return settled(load(p)); }

GPLWS_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// A store past the caches, to an address that is a multiple of the vector's size; other threads see
// it after finish_streaming(). AddressSanitizer does not see such stores: it gets plain ones.
#if defined(__AVX2__) && !defined(__SANITIZE_ADDRESS__)
#if defined(__AVX512F__)
GPLWS_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
#else
GPLWS_INLINE void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
#endif
GPLWS_INLINE void finish_streaming() { _mm_sfence(); }
#else
GPLWS_INLINE void stream(float* p, Vec v) { store(p, v); }
GPLWS_INLINE void finish_streaming() {}
#endif

// x - 0 is x for every x, so this is a plain broadcast; a loop over the lanes is not recognised.
GPLWS_INLINE Vec broadcast(float s) { return s - Vec{}; }

// Masked loads and stores of the first `count` lanes, 0 <= count < kLanes. AddressSanitizer does
// not see them: it gets a loop.
#if defined(__AVX2__) && !defined(__SANITIZE_ADDRESS__)
#define GPLWS_MASKED
#if defined(__AVX512F__)
GPLWS_INLINE __mmask16 first_lanes(int count) {
  return static_cast<__mmask16>((1u << static_cast<unsigned>(count)) - 1);
}
GPLWS_INLINE Vec load_masked(const float* p, int count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), p);
}
GPLWS_INLINE void store_masked(float* p, Vec v, int count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), v);
}
#else
GPLWS_INLINE __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
GPLWS_INLINE Vec load_masked(const float* p, int count) {
  return _mm256_maskload_ps(p, first_lanes(count));
}
GPLWS_INLINE void store_masked(float* p, Vec v, int count) {
  _mm256_maskstore_ps(p, first_lanes(count), v);
}
#endif
#endif

// The first `count` >= 0 lanes from memory, zero behind them; reads nothing beyond.
GPLWS_INLINE Vec load_first(const float* p, int count) {
  if (count >= kLanes) return load(p);
#if defined(GPLWS_MASKED)
  return load_masked(p, count);
#else
  float lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

GPLWS_INLINE void store_first(float* p, Vec v, int count) {
  if (count >= kLanes) {
    store(p, v);
    return;
  }
#if defined(GPLWS_MASKED)
  store_masked(p, v, count);
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
#endif
}

// bfloat16: the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

typedef uint32_t WordVec __attribute__((vector_size(GPLWS_VEC_BYTES)));
typedef uint16_t HalfVec __attribute__((vector_size(GPLWS_VEC_BYTES / 2)));
typedef uint16_t UnalignedHalfVec
    __attribute__((vector_size(GPLWS_VEC_BYTES / 2), aligned(2), may_alias));

// To the nearest bfloat16, ties to even.
GPLWS_INLINE HalfVec narrow(Vec v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<HalfVec>(_mm512_cvtneps_pbh(v));
#else
  const WordVec bits = reinterpret_cast<WordVec>(v);
  const WordVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const WordVec nan = WordVec{} + 0x7fc0;
  return __builtin_convertvector(v == v ? rounded : nan, HalfVec);
#endif
}

GPLWS_INLINE Vec widen(HalfVec v) {
  return reinterpret_cast<Vec>(__builtin_convertvector(v, WordVec) << 16);
}

GPLWS_INLINE Vec load(const BFloat16* p) {
  return widen(*reinterpret_cast<const UnalignedHalfVec*>(p));
}

GPLWS_INLINE void store(BFloat16* p, Vec v) { *reinterpret_cast<UnalignedHalfVec*>(p) = narrow(v); }

#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
GPLWS_INLINE void stream(BFloat16* p, Vec v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(narrow(v)));
}
#else
GPLWS_INLINE void stream(BFloat16* p, Vec v) { store(p, v); }
#endif

// The first `count` lanes from memory, zero behind them.
GPLWS_INLINE HalfVec load_half_first(const BFloat16* p, int count) {
  if (count >= kLanes) return *reinterpret_cast<const UnalignedHalfVec*>(p);
#if defined(GPLWS_MASKED) && defined(__AVX512F__)
  return reinterpret_cast<HalfVec>(_mm256_maskz_loadu_epi16(first_lanes(count), p));
#else
  HalfVec v = {};
  for (int i = 0; i < count; ++i) v[i] = p[i].bits;
  return v;
#endif
}

GPLWS_INLINE Vec load_first(const BFloat16* p, int count) {
  return widen(load_half_first(p, count));
}

GPLWS_INLINE void store_first(BFloat16* p, Vec v, int count) {
  if (count >= kLanes) {
    store(p, v);
    return;
  }
  const HalfVec half = narrow(v);
#if defined(GPLWS_MASKED) && defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, first_lanes(count), reinterpret_cast<__m256i>(half));
#else
  for (int i = 0; i < count; ++i) p[i].bits = half[i];
#endif
}

// a0 b0 a1 b1 ... of the lower and of the upper halves of two vectors.
// Below, the lanes of even and of odd number of two vectors: the opposite.
#if GPLWS_VEC_BYTES == 64
GPLWS_INLINE Vec even_lanes(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
GPLWS_INLINE Vec odd_lanes(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
GPLWS_INLINE Vec interleave_low(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
GPLWS_INLINE Vec interleave_high(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
}
#elif GPLWS_VEC_BYTES == 32
GPLWS_INLINE Vec even_lanes(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
}
GPLWS_INLINE Vec odd_lanes(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
GPLWS_INLINE Vec interleave_low(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
GPLWS_INLINE Vec interleave_high(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
GPLWS_INLINE Vec even_lanes(Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6); }
GPLWS_INLINE Vec odd_lanes(Vec a, Vec b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7); }
GPLWS_INLINE Vec interleave_low(Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
GPLWS_INLINE Vec interleave_high(Vec a, Vec b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// Lanes 1 on of `a` and the first of `b`; the last lane of `a` and all but the last of `b`.
#if GPLWS_VEC_BYTES == 64
GPLWS_INLINE Vec one_later(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
}
GPLWS_INLINE Vec one_earlier(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29,
                                 30);
}
#elif GPLWS_VEC_BYTES == 32
GPLWS_INLINE Vec one_later(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8);
}
GPLWS_INLINE Vec one_earlier(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 7, 8, 9, 10, 11, 12, 13, 14);
}
#else
GPLWS_INLINE Vec one_later(Vec a, Vec b) { return __builtin_shufflevector(a, b, 1, 2, 3, 4); }
GPLWS_INLINE Vec one_earlier(Vec a, Vec b) { return __builtin_shufflevector(a, b, 3, 4, 5, 6); }
#endif

// `b` where either is NaN: one instruction each, which compilers do not find by themselves.
#if defined(__AVX512F__)
GPLWS_INLINE Vec minimum(Vec a, Vec b) { return _mm512_min_ps(a, b); }
GPLWS_INLINE Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
GPLWS_INLINE Vec minimum(Vec a, Vec b) { return _mm256_min_ps(a, b); }
GPLWS_INLINE Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }
#else
GPLWS_INLINE Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
GPLWS_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
#endif
// NaN stays NaN, as in torch.relu.
GPLWS_INLINE Vec relu(Vec v) { return maximum(Vec{}, v); }
GPLWS_INLINE Vec magnitude(Vec v) { return maximum(v, -v); }

// Natural logarithm of positive normal numbers, within 2 ulp: x = m 2^e with m in
// [sqrt(1/2), sqrt(2)), log(1 + t) by its odd series in s = t / (2 + t).
GPLWS_INLINE Vec log_positive(Vec x) {
  const IntVec bits = reinterpret_cast<IntVec>(x);
  IntVec exponent = (bits >> 23) - 127;
  Vec m = reinterpret_cast<Vec>((bits & 0x007fffff) | 0x3f800000);  // [1, 2)
  const IntVec upper = m > broadcast(1.41421356f);
  m = upper ? m * broadcast(0.5f) : m;
  exponent -= upper;  // a true comparison is -1
  const Vec e = __builtin_convertvector(exponent, Vec);
  const Vec t = m - broadcast(1.0f);
  const Vec s = t / (m + broadcast(1.0f));
  const Vec q = s * s;  // <= 0.0295
  const Vec series =
      broadcast(2.0f / 3) +
      q * (broadcast(2.0f / 5) + q * (broadcast(2.0f / 7) + q * broadcast(2.0f / 9)));
  // log(m) = 2 s + s q series; t - s t = 2 s without its rounding error.
  return e * broadcast(0.693359375f) +
         (e * broadcast(-2.12194440e-4f) + (t - s * (t - q * series)));
}

// exp of x <= 0, within 2 ulp, 0 below the normal numbers: x = k log(2) + r with |r| <= log(2) / 2.
GPLWS_INLINE Vec exp_negative(Vec x) {
  const Vec bounded = maximum(x, broadcast(-87.3f));
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec k = (bounded * broadcast(1.44269504f) + magic) - magic;
  const Vec r = (bounded - k * broadcast(0.693359375f)) + k * broadcast(2.12194440e-4f);
  Vec series = broadcast(1.0f / 720);
  series = series * r + broadcast(1.0f / 120);
  series = series * r + broadcast(1.0f / 24);
  series = series * r + broadcast(1.0f / 6);
  series = series * r + broadcast(0.5f);
  series = series * r + broadcast(1.0f);
  series = series * r + broadcast(1.0f);
  const IntVec power = (__builtin_convertvector(k, IntVec) + 127) << 23;
  return x < bounded ? Vec{} : series * reinterpret_cast<Vec>(power);
}

// Comparisons lane by lane, in the registers that the ISA has for them.
#if defined(__AVX512F__)
typedef __mmask16 Mask;
GPLWS_INLINE Mask not_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
GPLWS_INLINE Mask not_less(Mask where, Vec a, Vec b) {
  return _mm512_mask_cmp_ps_mask(where, a, b, _CMP_NLT_UQ);
}
GPLWS_INLINE Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
GPLWS_INLINE Vec select(Mask where, Vec yes, Vec no) { return _mm512_mask_mov_ps(no, where, yes); }
GPLWS_INLINE IntVec select(Mask where, IntVec yes, IntVec no) {
  return reinterpret_cast<IntVec>(
      _mm512_mask_mov_epi32(reinterpret_cast<__m512i>(no), where, reinterpret_cast<__m512i>(yes)));
}
// The higher of both, `b` where `a` is NaN or masked out.
GPLWS_INLINE Vec maximum_where(Mask where, Vec a, Vec b) {
  return _mm512_mask_max_ps(b, where, a, b);
}
#else
typedef IntVec Mask;
GPLWS_INLINE Mask not_less(Vec a, Vec b) { return ~(a < b); }
GPLWS_INLINE Mask not_less(Mask where, Vec a, Vec b) { return where & ~(a < b); }
GPLWS_INLINE Mask greater(Vec a, Vec b) { return a > b; }
GPLWS_INLINE Vec select(Mask where, Vec yes, Vec no) { return where ? yes : no; }
GPLWS_INLINE IntVec select(Mask where, IntVec yes, IntVec no) { return where ? yes : no; }
GPLWS_INLINE Vec maximum_where(Mask where, Vec a, Vec b) { return where ? maximum(a, b) : b; }
#endif

// table[at[i]] in lane i. AddressSanitizer does not see gathers: it gets a loop.
GPLWS_INLINE Vec gather(const float* table, IntVec at) {
#if defined(__SANITIZE_ADDRESS__)
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = table[at[i]];
  return v;
#elif defined(__AVX512F__)
  return _mm512_i32gather_ps(reinterpret_cast<__m512i>(at), table, 4);
#elif defined(__AVX2__)
  return _mm256_i32gather_ps(table, reinterpret_cast<__m256i>(at), 4);
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = table[at[i]];
  return v;
#endif
}

// p[row[i] * stride + i] in lane i < count, 0 behind them.
GPLWS_INLINE Vec gather_rows(const float* p, IntVec row, int64_t stride, int count) {
  float lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[row[i] * stride + i];
  return load(lanes);
}

// Stores the first `count` lanes as 64-bit integers.
GPLWS_INLINE void store_first(int64_t* p, IntVec v, int count) {
  int32_t lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof(v));
  if (count >= kLanes) {
    for (int i = 0; i < kLanes; ++i) p[i] = lanes[i];
  } else {
    for (int i = 0; i < count; ++i) p[i] = lanes[i];
  }
}
