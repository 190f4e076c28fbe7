#include "../cpu/surface_refinement.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "parallel.h"
#include "tensors.h"

namespace gplws {
namespace {

constexpr int64_t kCount = cpu::kSurfaceSampleCount;

Tensor smooth_surface_cpu(const Tensor& depth, double limit) {
  constexpr const char* kOp = "smooth_surface";
  check(depth.scalar_type() == ScalarType::Float, kOp, ": depth must be float32");
  check(depth.dim() == 2, kOp, ": depth must be (H, W)");
  check(limit > 0, kOp, ": limit must be positive");
  Tensor result = torch::stable::new_empty(depth, {depth.size(0), depth.size(1)});
  if (result.numel() == 0) return result;
  const Tensor dense = torch::stable::contiguous(depth);
  cpu::SmoothSurfaceParams p{};
  p.depth = dense.const_data_ptr<float>();
  p.result = result.mutable_data_ptr<float>();
  p.height = depth.size(0);
  p.width = depth.size(1);
  p.limit = static_cast<float>(limit);
  const cpu::SurfaceRefinementKernel& kernel = cpu::surface_refinement_kernel();
  parallel_for_with_scratch(p.height, grain_of(kPixelsWorthAThread, p.width),
                            kernel.smooth_scratch(p),
                            [&](int64_t begin, int64_t end, float* scratch) {
                              kernel.smooth_rows(p, begin, end, scratch);
                            });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> sample_surface_cpu(const Tensor& responses,
                                                      const Tensor& surface, int64_t spacing) {
  constexpr const char* kOp = "sample_surface";
  check(responses.scalar_type() == ScalarType::Float, kOp, ": responses must be float32");
  check(responses.dim() == 3, kOp, ": responses must be (N, H, W)");
  check_frames(kOp, "responses", responses.size(0));
  const int64_t height = responses.size(1), width = responses.size(2);
  check_operand(kOp, surface, "surface", responses, {height, width}, "responses");
  check(spacing >= 1, kOp, ": spacing must be positive");
  Tensor values = torch::stable::new_empty(surface, {kCount, height, width});
  Tensor distances = torch::stable::new_empty(surface, {kCount, height, width});
  Tensor weights = torch::stable::new_empty(surface, {kCount, height, width});
  if (values.numel() == 0) return {values, distances, weights};
  const Tensor dense_responses = torch::stable::contiguous(responses);
  const Tensor dense_surface = torch::stable::contiguous(surface);
  cpu::SampleSurfaceParams p{};
  p.responses = dense_responses.const_data_ptr<float>();
  p.surface = dense_surface.const_data_ptr<float>();
  p.values = values.mutable_data_ptr<float>();
  p.distances = distances.mutable_data_ptr<float>();
  p.weights = weights.mutable_data_ptr<float>();
  p.frames = responses.size(0);
  p.pixels = height * width;
  p.spacing = static_cast<float>(spacing);
  const cpu::SurfaceRefinementKernel& kernel = cpu::surface_refinement_kernel();
  parallel_for(p.pixels, kPixelsWorthAThread,
               [&](int64_t begin, int64_t end) { kernel.sample_pixels(p, begin, end); });
  return {values, distances, weights};
}

std::tuple<Tensor, Tensor> fit_peak_cpu(const Tensor& values, const OptionalTensor& middle,
                                        const OptionalTensor& distances,
                                        const OptionalTensor& weights) {
  constexpr const char* kOp = "fit_peak";
  check(values.scalar_type() == ScalarType::Float, kOp, ": values must be float32");
  check(values.dim() == 3 && values.size(0) == kCount, kOp, ": values must be (", kCount,
        ", H, W)");
  const int64_t height = values.size(1), width = values.size(2);
  const std::vector<int64_t> shape{kCount, height, width};
  const bool given = middle.has_value();
  check(distances.has_value() == given && weights.has_value() == given, kOp,
        ": middle, distances and weights go together");
  if (given) {
    check_operand(kOp, *middle, "middle", values, shape, "values");
    check_operand(kOp, *distances, "distances", values, shape, "values");
    check_operand(kOp, *weights, "weights", values, shape, "values");
  }
  Tensor vertex = torch::stable::new_empty(values, {height, width});
  Tensor concave = torch::stable::new_empty(values, {height, width}, ScalarType::Bool);
  if (vertex.numel() == 0) return {vertex, concave};
  const Tensor dense_values = torch::stable::contiguous(values);
  const OptionalTensor dense_middle = contiguous_or_none(middle);
  const OptionalTensor dense_distances = contiguous_or_none(distances);
  const OptionalTensor dense_weights = contiguous_or_none(weights);
  cpu::FitPeakParams p{};
  p.values = dense_values.const_data_ptr<float>();
  p.middle = floats_or_null(dense_middle);
  p.distances = floats_or_null(dense_distances);
  p.weights = floats_or_null(dense_weights);
  p.vertex = vertex.mutable_data_ptr<float>();
  p.concave = concave.mutable_data_ptr<bool>();
  p.pixels = height * width;
  const cpu::SurfaceRefinementKernel& kernel = cpu::surface_refinement_kernel();
  parallel_for(p.pixels, kPixelsWorthAThread,
               [&](int64_t begin, int64_t end) { kernel.fit_pixels(p, begin, end); });
  return {vertex, concave};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CPU, m) {
  m.impl("smooth_surface", TORCH_BOX(&smooth_surface_cpu));
  m.impl("sample_surface", TORCH_BOX(&sample_surface_cpu));
  m.impl("fit_peak", TORCH_BOX(&fit_peak_cpu));
}

}  // namespace gplws
