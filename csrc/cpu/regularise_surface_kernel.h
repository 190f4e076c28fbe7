// Body of the regularisation of a depth map, compiled once per ISA (GPLWS_ISA).
//
// To be minimised is sum data (d - depth)^2 + sum weight (d_p - d_q)^2 over pixels and pairs of
// neighbours. It has the matrix A with the diagonal D; the correction of the surface is found by
// conjugate gradients that are preconditioned by D. One pass over the image is one step of these: a
// row moves along the direction of the step before and turns, and as soon as the row below has
// turned as well it is multiplied by A:
//
//   residual -= length moved;  correction += length direction
//   direction = residual / D + bend direction;  moved = A direction
//
// How far to bend needs residual^2 / D before the residual is there: it follows from three sums of
// the pass before. Each row is summed by itself, and these sums are added in double, so that
// threads do not matter and little is lost where the three cancel.
//
// A is applied as flows: what flows from a pixel to a neighbour is computed once, leaves the one
// and enters the other. Flows to the row below wait in one line. Where all is equal nothing flows,
// to the bit.
//
// Bands of rows go to different threads. What two of them compute both, at their edge, is to be the
// same to the bit: products are settled there before they are added, not fused in one band only.
#include "regularise_surface.h"

#include <stddef.h>
#include <stdint.h>

namespace gplws::cpu::GPLWS_ISA {

#include "vec.h"
//
#include "sizes.h"

namespace {

using Params = RegulariseSurfaceParams;

// A pixel's own diagonal is at least this, so that one without confidence or neighbours is defined.
constexpr float kLeastDiagonal = 1e-6f;
constexpr float kLargest = 3.402823466e38f;

// Planes of the memory. First the weights of a pixel and its neighbours to the right, below, and
// below to the right and left.
enum Plane {
  kRight,
  kDown,
  kDownRight,
  kDownLeft,
  kData,
  kInverse,  // 1 / D
  kResidual,
  kMoved,
  kDirection,
  kCorrection,
  kSurface,
  kPlanes
};
constexpr int kPairs = 4;

// What a neighbouring band needs of the rows at its edges, which their own band changes meanwhile.
constexpr int kShared = 3;
constexpr Plane kSharedPlanes[kShared] = {kResidual, kMoved, kDirection};

// Rows hold whole vectors and at least one pixel beyond the image, where all weights are 0, as they
// are before the first pixel of a row that is in the image. Rows of zeros are above and below.
struct Memory {
  explicit Memory(const Params& p)
      : pitch(plane_size(p.width + 1)),
        plane(plane_size((p.height + 2) * pitch)),
        line(pitch + 2 * kLanes),
        height(p.height),
        bands(p.bands) {
    planes = kLanes;
    lines = planes + kPlanes * plane + kLanes;
    edges = lines + bands * kBandLines * line;
    floats = edges + 2 * bands * 2 * kShared * pitch;
    memory = p.memory;
  }
  float* row(int number, int64_t y) const {
    return memory + planes + number * plane + (y + 1) * pitch;
  }
  float* above(int64_t band) const { return band_line(band, 0); }
  float* below(int64_t band) const { return band_line(band, 1); }
  float* flows(int64_t band) const { return band_line(band, 2); }
  // What is shared of a band's first (0) or last (1) row.
  float* edge(int side, int64_t band, int which) const {
    return memory + edges + ((side * bands + band) * 2 + which) * kShared * pitch;
  }
  int64_t first(int64_t band) const { return height * band / bands; }

  int64_t pitch, plane, line, height, bands;
  int64_t planes, lines, edges, floats;
  float* memory;

 private:
  static constexpr int64_t kBandLines = 3;
  float* band_line(int64_t band, int64_t number) const {
    return memory + lines + (band * kBandLines + number) * line + kLanes;
  }
};

int64_t memory_floats(const Params& p) { return Memory(p).floats; }

// Lines of renew: the guide of two rows, the weights of the row above a band.
constexpr int64_t kLines = 2 + kPairs;

int64_t scratch_floats(const Params& p) { return kLines * Memory(p).line; }

void clear(float* begin, const float* end) {
  __builtin_memset(begin, 0, static_cast<size_t>(end - begin) * sizeof(float));
}

void copy(float* to, const float* from, int64_t count) {
  __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

void prepare(const Params& p) {
  const Memory m(p);
  float* last = m.memory;
  for (int plane = 0; plane < kPlanes; ++plane) {
    clear(last, m.row(plane, 0));
    last = m.row(plane, p.height);
  }
  clear(last, m.memory + m.floats);
}

void start(const Params& p, int64_t band) {
  const Memory m(p);
  const int64_t begin = m.first(band), end = m.first(band + 1);
  for (int plane = 0; plane < kPlanes; ++plane) clear(m.row(plane, begin), m.row(plane, end));
  for (int64_t y = begin; y < end; ++y) copy(m.row(kSurface, y), p.depth + y * p.width, p.width);
}

typedef double DoubleVec __attribute__((vector_size(GPLWS_VEC_BYTES)));
typedef float PartVec __attribute__((vector_size(GPLWS_VEC_BYTES / 2)));

// Lanes of the lower half plus those of the upper half, in double.
GPLWS_INLINE DoubleVec add_halves(Vec v) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm512_castps512_ps256(v)) + _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm256_castps256_ps128(v)) + _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
#else
  PartVec parts[2];
  __builtin_memcpy(parts, &v, sizeof(v));
  return __builtin_convertvector(parts[0], DoubleVec) +
         __builtin_convertvector(parts[1], DoubleVec);
#endif
}

// A sum of products over a row: of four vectors in float32, of these sums in double.
class Sum {
 public:
  // Of the vectors from x on.
  __attribute__((always_inline)) void add(int64_t x, Vec a, Vec b) {
    few_ += a * b;
    if (x % (4 * kLanes) == 3 * kLanes) close();
  }
  __attribute__((always_inline)) double total() {
    close();
    double sum = 0;
    for (int i = 0; i < kLanes / 2; ++i) sum += many_[i];
    return sum;
  }

 private:
  __attribute__((always_inline)) void close() {
    many_ += add_halves(few_);
    few_ = Vec{};
  }

  Vec few_{};
  DoubleVec many_{};
};

void share_edges(const Memory& m, int side, int64_t band) {
  for (int which = 0; which < 2; ++which) {
    const int64_t y = which == 0 ? m.first(band) : m.first(band + 1) - 1;
    for (int i = 0; i < kShared; ++i)
      copy(m.edge(side, band, which) + i * m.pitch, m.row(kSharedPlanes[i], y), m.pitch);
  }
}

// What a difference is multiplied by before minus its square is an exponent.
GPLWS_INLINE Vec exponent_scale(float scale) {
  const double inverse = 0.70710678118654752 / static_cast<double>(scale);
  const double largest = static_cast<double>(kLargest);
  return broadcast(static_cast<float>(inverse < largest ? inverse : largest));
}

// The four weights of each pixel of a row with those to the right and below, 0 beyond the image.
// The guide's lines have zeros beside them.
void weigh_row(const Params& p, const Memory& m, int64_t y, const float* guide_here,
               const float* guide_below, float* const weights[kPairs]) {
  const bool has_below = y + 1 < p.height;
  const float *here = m.row(kSurface, y), *below = m.row(kSurface, y + 1);
  const Vec straight = broadcast(p.strength), oblique = broadcast(p.strength * 0.70710678f);
  const Vec guide_scale = exponent_scale(p.guide_scale);
  const Vec smoothness_scale = exponent_scale(p.smoothness_scale);
  for (int64_t x = 0; x < m.pitch; x += kLanes) {
    const Vec own_guide = load(guide_here + x), own = load(here + x);
    const auto similarity = [&](const float* other_guide,
                                const float* other) __attribute__((always_inline)) {
      const Vec edge = (load(other_guide + x) - own_guide) * guide_scale;
      const Vec difference = (load(other + x) - own) * smoothness_scale;
      return exp_negative(-(settled(edge * edge) + difference * difference));
    };
    store(weights[kRight] + x, straight * similarity(guide_here + 1, here + 1));
    if (!has_below) continue;
    store(weights[kDown] + x, straight * similarity(guide_below, below));
    store(weights[kDownRight] + x, oblique * similarity(guide_below + 1, below + 1));
    store(weights[kDownLeft] + x, oblique * similarity(guide_below - 1, below - 1));
  }
  for (int pair = 0; pair < kPairs; ++pair) {
    const bool goes_right = pair == kRight || pair == kDownRight;
    const bool is_empty = pair != kRight && !has_below;
    clear(weights[pair] + (is_empty ? 0 : p.width - (goes_right ? 1 : 0)), weights[pair] + m.pitch);
  }
  weights[kDownLeft][0] = 0;
}

// Data, 1 / D and residual of a row, whose weights are there; `above` are those of the row above.
void measure_row(const Params& p, const Memory& m, int64_t y, const float* const above[kPairs]) {
  const float *depth = p.depth + y * p.width, *confidence = p.confidence + y * p.width;
  const float* here = m.row(kSurface, y);
  const Vec data_scale = exponent_scale(p.data_scale);
  Sum magnitudes;
  for (int64_t x = 0; x < m.pitch; x += kLanes) {
    const int count = static_cast<int>(max64(0, min64(kLanes, p.width - x)));
    const Vec own = load(here + x);
    const Vec deviation = load_first(depth + x, count) - own;
    const Vec scaled = deviation * data_scale;
    const Vec data = load_first(confidence + x, count) * exp_negative(-(scaled * scaled));
    Vec diagonal = data, residual = data * deviation, size = magnitude(residual);
    const auto add = [&](const float* weights, int64_t at, int64_t dy, int64_t dx)
                         __attribute__((always_inline)) {
                           const Vec weight = load(weights + x + at);
                           const Vec flow = weight * (load(m.row(kSurface, y + dy) + x + dx) - own);
                           diagonal += weight;
                           residual += flow;
                           size += magnitude(flow);
                         };
    add(m.row(kRight, y), 0, 0, 1);
    add(m.row(kRight, y), -1, 0, -1);
    add(m.row(kDown, y), 0, 1, 0);
    add(above[kDown], 0, -1, 0);
    add(m.row(kDownRight, y), 0, 1, 1);
    add(above[kDownRight], -1, -1, -1);
    add(m.row(kDownLeft, y), 0, 1, -1);
    add(above[kDownLeft], 1, -1, 1);
    const Vec inverse = broadcast(1.0f) / maximum(diagonal, broadcast(kLeastDiagonal));
    store(m.row(kData, y) + x, data);
    store(m.row(kInverse, y) + x, inverse);
    store(m.row(kResidual, y) + x, residual);
    magnitudes.add(x, size, size * inverse);
  }
  clear(m.row(kCorrection, y), m.row(kCorrection, y + 1));
  p.sums[y].magnitude = magnitudes.total();
}

void renew(const Params& p, int64_t band, int side, float* scratch) {
  const Memory m(p);
  clear(scratch, scratch + scratch_floats(p));
  const auto guide = [&](int64_t y) { return scratch + (y & 1) * m.line + kLanes; };
  const auto read_guide = [&](int64_t y) {
    if (y < p.height) copy(guide(y), p.guide + y * p.width, p.width);
  };
  const int64_t begin = m.first(band), end = m.first(band + 1);
  float *above[kPairs], *here[kPairs];
  for (int pair = 0; pair < kPairs; ++pair) above[pair] = scratch + (2 + pair) * m.line + kLanes;
  if (begin > 0) {
    read_guide(begin - 1);
    read_guide(begin);
    weigh_row(p, m, begin - 1, guide(begin - 1), guide(begin), above);
  } else {
    read_guide(begin);
  }
  for (int64_t y = begin; y < end; ++y) {
    read_guide(y + 1);
    for (int pair = 0; pair < kPairs; ++pair) here[pair] = m.row(pair, y);
    weigh_row(p, m, y, guide(y), guide(y + 1), here);
    measure_row(p, m, y, above);
    for (int pair = 0; pair < kPairs; ++pair) above[pair] = here[pair];
  }
  share_edges(m, side, band);
}

// The direction in row y of another band, of whose edge this is what is shared.
void turn_other(const Memory& m, int64_t y, const float* edge, Vec length, Vec bend,
                float* direction) {
  const float *residual = edge, *moved = edge + m.pitch, *before = edge + 2 * m.pitch;
  const float* inverse = m.row(kInverse, y);
  for (int64_t x = 0; x < m.pitch; x += kLanes) {
    const Vec left = load(residual + x) - length * load(moved + x);
    const Vec scaled = settled(left * load(inverse + x));
    store(direction + x, scaled + bend * load(before + x));
  }
}

double turn_row(const Memory& m, int64_t y, Vec length, Vec bend) {
  float *residual = m.row(kResidual, y), *direction = m.row(kDirection, y);
  float* correction = m.row(kCorrection, y);
  const float *moved = m.row(kMoved, y), *inverse = m.row(kInverse, y);
  Sum product;
  for (int64_t x = 0; x < m.pitch; x += kLanes) {
    const Vec before = load(direction + x);
    const Vec left = load(residual + x) - length * load(moved + x);
    const Vec scaled = settled(left * load(inverse + x));
    store(residual + x, left);
    store(correction + x, load(correction + x) + length * before);
    store(direction + x, scaled + bend * before);
    product.add(x, left, scaled);
  }
  return product.total();
}

// Flows of the pixels of row y, as vectors of which the lanes before or behind are wanted too.
class Flows {
 public:
  Flows(const Memory& m, int64_t y, const float* here, const float* below)
      : here_(here),
        below_(below),
        right_(m.row(kRight, y)),
        down_(m.row(kDown, y)),
        down_right_(m.row(kDownRight, y)),
        down_left_(m.row(kDownLeft, y)),
        next_left_(to_left(0)) {}

  // From x on; x rises from 0 by whole vectors.
  __attribute__((always_inline)) void go(int64_t x) {
    own = load(here_ + x);
    const Vec right = load(right_ + x) * (load(here_ + x + 1) - own);
    const Vec down = settled(load(down_ + x) * (load(below_ + x) - own));
    const Vec down_right = settled(load(down_right_ + x) * (load(below_ + x + 1) - own));
    const Vec down_left = next_left_;
    next_left_ = to_left(x + kLanes);
    into = (right - one_earlier(last_right_, right)) + (down + (down_right + down_left));
    to_below =
        down + (one_earlier(last_down_right_, down_right) + one_later(down_left, next_left_));
    last_right_ = right;
    last_down_right_ = down_right;
  }

  Vec own;       // the direction
  Vec into;      // what flows into the pixels, but for the row above
  Vec to_below;  // what flows from the pixels below into this row

 private:
  __attribute__((always_inline)) Vec to_left(int64_t x) const {
    return settled(load(down_left_ + x) * (load(below_ + x - 1) - load(here_ + x)));
  }

  const float *here_, *below_, *right_, *down_, *down_right_, *down_left_;
  Vec last_right_{}, last_down_right_{}, next_left_;
};

// moved = A direction in row y. `flows` of the row above become those of this one.
void multiply_row(const Memory& m, int64_t y, const float* below, float* flows,
                  RegulariseSurfaceSums& sums) {
  const float *residual = m.row(kResidual, y), *data = m.row(kData, y);
  const float* inverse = m.row(kInverse, y);
  float* moved = m.row(kMoved, y);
  Flows row(m, y, m.row(kDirection, y), below);
  Sum curvature, crossing, square;
  for (int64_t x = 0; x < m.pitch; x += kLanes) {
    row.go(x);
    const Vec result = load(data + x) * row.own - (row.into - load(flows + x));
    store(flows + x, row.to_below);
    store(moved + x, result);
    const Vec scaled = result * load(inverse + x);
    curvature.add(x, result, row.own);
    crossing.add(x, scaled, load(residual + x));
    square.add(x, scaled, result);
  }
  sums.curvature = curvature.total();
  sums.crossing = crossing.total();
  sums.square = square.total();
}

void step(const Params& p, int64_t band, int side, float length, float bend) {
  const Memory m(p);
  const int64_t begin = m.first(band), end = m.first(band + 1);
  const Vec lengths = broadcast(length), bends = broadcast(bend);
  const float* behind = m.row(kDirection, p.height);
  if (band + 1 < p.bands) {
    turn_other(m, end, m.edge(side, band + 1, 0), lengths, bends, m.below(band));
    behind = m.below(band);
  }
  float* flows = m.flows(band);
  p.sums[begin].product = turn_row(m, begin, lengths, bends);
  if (band > 0) {
    turn_other(m, begin - 1, m.edge(side, band - 1, 1), lengths, bends, m.above(band));
    Flows row(m, begin - 1, m.above(band), m.row(kDirection, begin));
    for (int64_t x = 0; x < m.pitch; x += kLanes) {
      row.go(x);
      store(flows + x, row.to_below);
    }
  } else {
    clear(flows, flows + m.pitch);
  }
  for (int64_t y = begin; y < end; ++y) {
    if (y + 1 < end) p.sums[y + 1].product = turn_row(m, y + 1, lengths, bends);
    multiply_row(m, y, y + 1 < end ? m.row(kDirection, y + 1) : behind, flows, p.sums[y]);
  }
  share_edges(m, 1 - side, band);
}

void finish(const Params& p, int64_t band, float length) {
  const Memory m(p);
  const Vec lengths = broadcast(length);
  for (int64_t y = m.first(band); y < m.first(band + 1); ++y) {
    float* surface = m.row(kSurface, y);
    const float *correction = m.row(kCorrection, y), *direction = m.row(kDirection, y);
    for (int64_t x = 0; x < m.pitch; x += kLanes) {
      const Vec whole = load(correction + x) + lengths * load(direction + x);
      store(surface + x, load(surface + x) + whole);
    }
    if (p.result != nullptr) copy(p.result + y * p.width, surface, p.width);
  }
}

}  // namespace

extern const RegulariseSurfaceKernel kRegulariseSurface;
const RegulariseSurfaceKernel kRegulariseSurface{memory_floats, scratch_floats, prepare, start,
                                                 renew,         step,           finish};

}  // namespace gplws::cpu::GPLWS_ISA
