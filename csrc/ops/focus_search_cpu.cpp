#include "../cpu/focus_search.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "focus_search.h"
#include "parallel.h"
#include "scratch.h"

namespace gplws {
namespace {

void search(const Tensor& volume, const Tensor& focus_positions, const FocusSearchSizes& s,
            int64_t refinement, bool log_scale, Tensor& depth, Tensor& index, Tensor& peak,
            Tensor& confidence) {
  const Tensor dense_volume = torch::stable::contiguous(volume);
  const Tensor dense_positions = torch::stable::contiguous(focus_positions);
  cpu::FocusSearchParams p{};
  p.volume = dense_volume.const_data_ptr<float>();
  p.depth = depth.mutable_data_ptr<float>();
  p.index = index.mutable_data_ptr<int64_t>();
  p.peak = peak.mutable_data_ptr<float>();
  p.confidence = confidence.mutable_data_ptr<float>();
  p.batch = s.batch;
  p.frames = s.frames;
  p.pixels = s.height * s.width;
  p.group_size = s.group_size;
  p.radius = s.radius;
  p.refinement = static_cast<cpu::Refinement>(refinement);
  p.log_scale = log_scale;

  const int64_t images = s.position_stride == 0 ? 1 : s.batch;
  p.table_size = cpu::focus_table_size(s.frames);
  const int64_t table_floats = cpu::kFocusTables * p.table_size;
  p.table_stride = s.position_stride == 0 ? 0 : table_floats;
  Scratch tables(images * table_floats);
  p.tables = tables.data();
  p.regular = true;
  for (int64_t i = 0; i < images; ++i) {
    const float* positions = dense_positions.const_data_ptr<float>() + i * s.frames;
    p.regular &= cpu::fill_focus_tables(positions, s.frames, tables.data() + i * table_floats);
  }

  const cpu::FocusSearchKernel& kernel = cpu::focus_search_kernel();
  parallel_for(depth.numel(), grain_of(kValuesWorthAThread, s.frames),
               [&](int64_t begin, int64_t end) { kernel.run(p, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> focus_search_cpu(const Tensor& volume,
                                                            const Tensor& focus_positions,
                                                            int64_t groups, int64_t refinement,
                                                            int64_t radius, bool log_scale) {
  const FocusSearchSizes s =
      check_focus_search(volume, focus_positions, groups, refinement, radius);
  Tensor depth = torch::stable::new_empty(volume, s.output());
  Tensor index = torch::stable::new_empty(volume, s.output(), ScalarType::Long);
  Tensor peak = torch::stable::new_empty(volume, s.output());
  Tensor confidence = torch::stable::new_empty(volume, s.output());
  search(volume, focus_positions, s, refinement, log_scale, depth, index, peak, confidence);
  return {depth, index, peak, confidence};
}

// A result to write into, which joins the others that the next one must be apart from.
void check_result(const char* name, const Tensor& out, ScalarType dtype, const Tensor& volume,
                  const FocusSearchSizes& s, std::vector<NamedTensor>& others) {
  check_device("focus_search", out, name, volume, "volume");
  check(out.scalar_type() == dtype && out.dim() == 3 && out.size(0) == s.batch &&
            out.size(1) == s.height && out.size(2) == s.width && is_dense(out, {2, 1, 0}),
        "focus_search: ", name, " must be a contiguous (B, H, W) of its dtype");
  check_apart("focus_search", {name, &out}, others);
  others.push_back({name, &out});
}

void focus_search_out_cpu(const Tensor& volume, const Tensor& focus_positions, int64_t groups,
                          int64_t refinement, int64_t radius, bool log_scale, Tensor depth,
                          Tensor index, Tensor peak, Tensor confidence) {
  const FocusSearchSizes s =
      check_focus_search(volume, focus_positions, groups, refinement, radius);
  std::vector<NamedTensor> others{{"volume", &volume}, {"focus_positions", &focus_positions}};
  check_result("out.depth", depth, ScalarType::Float, volume, s, others);
  check_result("out.index", index, ScalarType::Long, volume, s, others);
  check_result("out.peak", peak, ScalarType::Float, volume, s, others);
  check_result("out.confidence", confidence, ScalarType::Float, volume, s, others);
  search(volume, focus_positions, s, refinement, log_scale, depth, index, peak, confidence);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gplws, CPU, m) {
  m.impl("focus_search", TORCH_BOX(&focus_search_cpu));
  m.impl("focus_search.out", TORCH_BOX(&focus_search_out_cpu));
}

}  // namespace gplws
