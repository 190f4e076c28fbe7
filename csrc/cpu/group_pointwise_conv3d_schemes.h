// How numbers lie in memory and how they are multiplied; included by
// group_pointwise_conv3d_kernel.h.
//
// A scheme has the Value that tensors hold, the channels that share a 32-bit unit of scratch, and
//   kFramesPerStep     frames of the result that are made together (see the kernel)
//   Rows               a row of a unit's first channel and of the next one;
//   Rows::units        a vector of units from neighbouring columns, behind `count` of them zeros
//   LastRow            the same for the last unit of an odd number of channels
//   weights(a, b, n)   n weights of a unit's channels, each pair as one 32-bit word; b may be null
//   multiply_add       accumulator + products of the unit's channels, in float32
//   pack_middle        rows of floats -> rows of units, between the two convs

// float32 throughout.
struct Float32 {
  using Value = float;
  static constexpr int kFramesPerStep = 2;
  static constexpr int kChannelsPerUnit = 1;
  struct Rows {
    const float* row;
    const float* next_channel;
    Vec units(int64_t column, int count) const { return load_first(row + column, count); }
  };
  using LastRow = Rows;
  static const float* weights(const float* first, const float*, int, float*) { return first; }
  GPLWS_INLINE Vec multiply_add(Vec w, Vec x, Vec sum) { return sum + w * x; }
  static void pack_middle(const float*, int64_t, int64_t, int64_t, float*) {}
};

// bfloat16 in memory, computed in float32: for machines that cannot multiply bfloat16.
struct Widened {
  using Value = BFloat16;
  static constexpr int kFramesPerStep = 2;
  static constexpr int kChannelsPerUnit = 1;
  struct Rows {
    const BFloat16* row;
    const BFloat16* next_channel;
    Vec units(int64_t column, int count) const { return load_first(row + column, count); }
  };
  using LastRow = Rows;
  static const float* weights(const float* first, const float*, int, float*) { return first; }
  GPLWS_INLINE Vec multiply_add(Vec w, Vec x, Vec sum) { return sum + w * x; }
  // The middle result is rounded to bfloat16, as it is where it is stored as such.
  static void pack_middle(float* mid, int64_t channels, int64_t chunk, int64_t pixels, float*) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < pixels; i += kLanes) {
        float* p = mid + c * chunk + i;
        store(p, widen(narrow(load(p))));
      }
  }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 channels, multiplied and added up by one instruction.
struct Pairs {
  using Value = BFloat16;
  static constexpr int kFramesPerStep = 1;  // differences of frames would be rounded to bfloat16
  static constexpr int kChannelsPerUnit = 2;
  struct Rows {
    const BFloat16* first;
    const BFloat16* second;
    Vec units(int64_t column, int count) const {
      return pair(load_half_first(first + column, count), load_half_first(second + column, count));
    }
  };
  struct LastRow {
    const BFloat16* row;
    const BFloat16* none;
    Vec units(int64_t column, int count) const {
      return pair(load_half_first(row + column, count), HalfVec{});
    }
  };
  GPLWS_INLINE Vec pair(HalfVec low, HalfVec high) {
    return reinterpret_cast<Vec>(__builtin_convertvector(low, WordVec) |
                                 __builtin_convertvector(high, WordVec) << 16);
  }
  static const float* weights(const float* first, const float* second, int count, float* words) {
    for (int i = 0; i < count; i += kLanes) {
      const Vec low = load_first(first + i, count - i);
      const Vec high = second ? load_first(second + i, count - i) : Vec{};
      store(words + i, pair(narrow(low), narrow(high)));
    }
    return words;
  }
  GPLWS_INLINE Vec multiply_add(Vec w, Vec x, Vec sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  static void pack_middle(const float* mid, int64_t channels, int64_t chunk, int64_t pixels,
                          float* units) {
    for (int64_t c = 0; c < channels; c += 2)
      for (int64_t i = 0; i < pixels; i += kLanes) {
        const float* p = mid + c * chunk + i;
        const Vec second = c + 1 < channels ? load(p + chunk) : Vec{};
        store(units + c / 2 * chunk + i, pair(narrow(load(p)), narrow(second)));
      }
  }
};
#endif
