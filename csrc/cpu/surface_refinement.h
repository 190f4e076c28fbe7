// Refinement of a depth map along its own surface on the CPU, float32: what ops and kernels agree
// on. All tensors contiguous, results apart from inputs.
#pragma once
#include <cstdint>

namespace gplws::cpu {

// Samples on each side of the surface.
constexpr int kSurfaceSamples = 3;
constexpr int kSurfaceSampleCount = 2 * kSurfaceSamples + 1;

struct SmoothSurfaceParams {
  const float* depth;  // (height, width)
  float* result;       // likewise
  int64_t height, width;
  float limit;  // difference of depth from which on a neighbour has no say, > 0
};

struct SampleSurfaceParams {
  const float* responses;  // (frames, pixels)
  const float* surface;    // (pixels), frames
  float* values;           // (kSurfaceSampleCount, pixels), times the weights
  float* distances;        // likewise, spacings
  float* weights;          // likewise
  int64_t frames, pixels;
  float spacing;  // frames
};

struct FitPeakParams {
  const float* values;     // (kSurfaceSampleCount, pixels)
  const float* middle;     // likewise: what the middle sample is to each; or none of the three:
  const float* distances;  // times weights; all samples count alike
  const float* weights;
  float* vertex;  // (pixels)
  bool* concave;  // likewise
  int64_t pixels;
};

struct SurfaceRefinementKernel {
  // Floats of scratch for each thread that smooths, 64-byte aligned.
  int64_t (*smooth_scratch)(const SmoothSurfaceParams&);
  void (*smooth_rows)(const SmoothSurfaceParams&, int64_t begin, int64_t end, float* scratch);
  void (*sample_pixels)(const SampleSurfaceParams&, int64_t begin, int64_t end);
  void (*fit_pixels)(const FitPeakParams&, int64_t begin, int64_t end);
};

// The kernel of the ISA in use.
const SurfaceRefinementKernel& surface_refinement_kernel();

}  // namespace gplws::cpu
