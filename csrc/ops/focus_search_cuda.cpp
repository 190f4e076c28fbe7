#include "cuda/focus_search.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda_stream.h"
#include "focus_search.h"

namespace gplws {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> focus_search_cuda(const Tensor& volume,
                                                             const Tensor& focus_positions,
                                                             int64_t groups, int64_t refinement,
                                                             int64_t radius, bool log_scale) {
  const FocusSearchSizes s =
      check_focus_search(volume, focus_positions, groups, refinement, radius);
  const CudaStream stream(volume);
  Tensor depth = empty_on_device_of(volume, s.output(), ScalarType::Float);
  Tensor index = empty_on_device_of(volume, s.output(), ScalarType::Long);
  Tensor peak = empty_on_device_of(volume, s.output(), ScalarType::Float);
  Tensor confidence = empty_on_device_of(volume, s.output(), ScalarType::Float);

  // The volume is read where it lies; the positions are few.
  const Tensor dense_positions = torch::stable::contiguous(focus_positions);
  cuda::FocusSearchParams p{};
  p.volume = volume.const_data_ptr();
  p.volume_type = float_type_of(volume);
  p.positions = dense_positions.const_data_ptr<float>();
  p.depth = depth.mutable_data_ptr<float>();
  p.index = index.mutable_data_ptr<int64_t>();
  p.peak = peak.mutable_data_ptr<float>();
  p.confidence = confidence.mutable_data_ptr<float>();
  p.batch_stride = volume.stride(0);
  p.frame_stride = volume.stride(1);
  p.row_stride = volume.stride(2);
  p.column_stride = volume.stride(3);
  p.position_stride = s.position_stride;
  p.batch = s.batch;
  p.frames = s.frames;
  p.height = s.height;
  p.width = s.width;
  p.group_size = s.group_size;
  p.radius = s.radius;
  p.refinement = static_cast<cuda::FocusRefinement>(refinement);
  p.log_scale = log_scale;
  STD_CUDA_CHECK(cuda::launch_focus_search(p, stream.get()));
  return {depth, index, peak, confidence};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CUDA, m) { m.impl("focus_search", TORCH_BOX(&focus_search_cuda)); }

}  // namespace gplws
