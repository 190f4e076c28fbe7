// Per-group argmax focus search on the CPU, float32: what the op and the kernels agree on.
#pragma once
#include <cstdint>

namespace gplws::cpu {

enum class Refinement : int { kNone = 0, kParabola = 1, kGaussian = 2 };

// All tensors contiguous; `pixels` = height x width.
struct FocusSearchParams {
  const float* volume;  // (batch, frames, pixels)
  const float* tables;  // of each image, or of all; see fill_focus_tables
  float* depth;         // (batch, pixels)
  int64_t* index;       // (batch, pixels)
  float* peak;          // (batch, pixels)
  float* confidence;    // (batch, pixels)
  int64_t batch, frames, pixels;
  int64_t table_size;    // entries of one table
  int64_t table_stride;  // between the tables of two images; 0: shared
  bool regular;          // the tables serve the fit through three frames
  int64_t group_size;    // frames per group
  int64_t radius;
  Refinement refinement;
  bool log_scale;
};

// Entries of a table, the tail unused: a kernel may read the first of them as whole vectors.
inline int64_t focus_table_size(int64_t frames) { return frames < 32 ? 32 : frames; }

constexpr int kFocusTables = 3;

// Fills the tables of one image: the position of each frame, half its gap to the frame before, and
// its gap to the frame behind as a multiple of that. False where the gaps vary so much that a
// parabola through three frames may be flat by its rounding.
bool fill_focus_tables(const float* positions, int64_t frames, float* tables);

struct FocusSearchKernel {
  // Searches pixels [begin, end) of the flattened (batch, pixels).
  void (*run)(const FocusSearchParams&, int64_t begin, int64_t end);
};

// The kernel of the ISA in use.
const FocusSearchKernel& focus_search_kernel();

}  // namespace gplws::cpu
