// Regularisation of a depth map on the CPU, float32: what op and kernels agree on. All tensors
// contiguous, the result apart from the inputs.
#pragma once
#include <cstdint>

namespace gplws::cpu {

// Sums over a row of the image, each divided by the diagonal D.
struct RegulariseSurfaceSums {
  // Of renew: squares of the magnitudes that the residual is a sum of.
  double magnitude;
  // Of step, where moved is the matrix times direction:
  double product;    // residual * residual
  double curvature;  // direction * moved, not divided
  double crossing;   // residual * moved
  double square;     // moved * moved
};

struct RegulariseSurfaceParams {
  const float* depth;  // (height, width), as all of these
  const float* confidence;
  const float* guide;
  float* result;  // or none, where the surface is to be renewed again
  int64_t height, width;
  float strength, data_scale, smoothness_scale, guide_scale;
  int64_t bands;                // pieces of whole rows, 1 .. height, which may go to other threads
  float* memory;                // 64-byte aligned, shared by the bands
  RegulariseSurfaceSums* sums;  // (height)
};

// The last four work on one band; all bands are to be done before any goes on with the next.
struct RegulariseSurfaceKernel {
  int64_t (*memory_floats)(const RegulariseSurfaceParams&);
  // Floats of scratch for each thread that renews, 64-byte aligned.
  int64_t (*scratch_floats)(const RegulariseSurfaceParams&);
  // Memory that all bands read.
  void (*prepare)(const RegulariseSurfaceParams&);
  // The surface is depth.
  void (*start)(const RegulariseSurfaceParams&, int64_t band);
  // The quadratic function that touches the energy at the surface.
  void (*renew)(const RegulariseSurfaceParams&, int64_t band, int side, float* scratch);
  // Moves by `length` along the direction, bends that by `bend` times what it was, and multiplies
  // it by the matrix. `side` is 0 and 1 in turns, that of renew the same as in the step behind it.
  void (*step)(const RegulariseSurfaceParams&, int64_t band, int side, float length, float bend);
  // Moves for the last time: into the surface, and copies that to the result.
  void (*finish)(const RegulariseSurfaceParams&, int64_t band, float length);
};

// The kernel of the ISA in use.
const RegulariseSurfaceKernel& regularise_surface_kernel();

}  // namespace gplws::cpu
