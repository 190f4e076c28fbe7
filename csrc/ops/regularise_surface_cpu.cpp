#include "../cpu/regularise_surface.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "scratch.h"
#include "tensors.h"

namespace gplws {
namespace {

constexpr const char* kOp = "regularise_surface";
// Conjugate gradients for each quadratic function.
constexpr int kSteps = 12;
// What a quotient is divided by is at least this.
constexpr double kTiny = 1e-30;
// A residual below this share of the terms that it sums is rounding: steps that follow it may run
// away where little holds the surface.
constexpr double kRounding = 1.2e-7;

cpu::RegulariseSurfaceSums total(const std::vector<cpu::RegulariseSurfaceSums>& rows) {
  cpu::RegulariseSurfaceSums sums{};
  for (const cpu::RegulariseSurfaceSums& row : rows) {
    sums.magnitude += row.magnitude;
    sums.product += row.product;
    sums.curvature += row.curvature;
    sums.crossing += row.crossing;
    sums.square += row.square;
  }
  return sums;
}

// Majorises and minimises; `p` says all but how it is done.
void regularise(cpu::RegulariseSurfaceParams p, int64_t iterations) {
  const cpu::RegulariseSurfaceKernel& kernel = cpu::regularise_surface_kernel();
  const int64_t threads = torch::stable::get_num_threads();
  p.bands =
      std::clamp<int64_t>(p.height * p.width / kPixelsWorthAThread, 1, std::min(threads, p.height));
  Scratch memory(kernel.memory_floats(p));
  std::vector<cpu::RegulariseSurfaceSums> rows(static_cast<size_t>(p.height));
  float* const result = p.result;
  p.memory = memory.data();
  p.sums = rows.data();
  const auto each_band = [&](const auto& call) {
    parallel_for(p.bands, 1, [&](int64_t begin, int64_t end) {
      for (int64_t band = begin; band < end; ++band) call(band);
    });
  };
  kernel.prepare(p);
  each_band([&](int64_t band) { kernel.start(p, band); });
  int side = 0;
  for (int64_t i = 0; i < iterations; ++i) {
    p.result = i + 1 < iterations ? nullptr : result;
    parallel_for_with_scratch(p.bands, 1, kernel.scratch_floats(p),
                              [&](int64_t begin, int64_t end, float* scratch) {
                                for (int64_t band = begin; band < end; ++band)
                                  kernel.renew(p, band, side, scratch);
                              });
    const double least = kRounding * kRounding * total(rows).magnitude;
    float length = 0, bend = 0;
    for (int k = 0; k < kSteps; ++k) {
      each_band([&](int64_t band) { kernel.step(p, band, side, length, bend); });
      side = 1 - side;
      const cpu::RegulariseSurfaceSums sums = total(rows);
      if (sums.product <= least) {
        length = 0;
        break;
      }
      const bool moves = sums.curvature > 0;
      length = moves ? static_cast<float>(sums.product / std::max(sums.curvature, kTiny)) : 0.0f;
      const double moved = length;
      const double renewed = sums.product - 2 * moved * sums.crossing + moved * moved * sums.square;
      bend = renewed > 0 ? static_cast<float>(renewed / std::max(sums.product, kTiny)) : 0.0f;
    }
    each_band([&](int64_t band) { kernel.finish(p, band, length); });
  }
}

Tensor regularise_surface_cpu(const Tensor& depth, const Tensor& confidence, const Tensor& guide,
                              double strength, double data_scale, double smoothness_scale,
                              double guide_scale, int64_t iterations) {
  check(depth.scalar_type() == ScalarType::Float, kOp, ": depth must be float32");
  check(depth.dim() == 3, kOp, ": depth must be (B, H, W)");
  const int64_t batch = depth.size(0), height = depth.size(1), width = depth.size(2);
  check_operand(kOp, confidence, "confidence", depth, {batch, height, width}, "depth");
  check_operand(kOp, guide, "guide", depth, {batch, height, width}, "depth");
  check(iterations >= 1, kOp, ": iterations must be positive");
  Tensor result = torch::stable::new_empty(depth, {batch, height, width});
  if (result.numel() == 0) return result;
  const Tensor dense_depth = torch::stable::contiguous(depth);
  const Tensor dense_confidence = torch::stable::contiguous(confidence);
  const Tensor dense_guide = torch::stable::contiguous(guide);
  cpu::RegulariseSurfaceParams p{};
  p.height = height;
  p.width = width;
  p.strength = static_cast<float>(strength);
  p.data_scale = static_cast<float>(data_scale);
  p.smoothness_scale = static_cast<float>(smoothness_scale);
  p.guide_scale = static_cast<float>(guide_scale);
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t at = i * height * width;
    p.depth = dense_depth.const_data_ptr<float>() + at;
    p.confidence = dense_confidence.const_data_ptr<float>() + at;
    p.guide = dense_guide.const_data_ptr<float>() + at;
    p.result = result.mutable_data_ptr<float>() + at;
    regularise(p, iterations);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CPU, m) {
  m.impl("regularise_surface", TORCH_BOX(&regularise_surface_cpu));
}

}  // namespace gplws
