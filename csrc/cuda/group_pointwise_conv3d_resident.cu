// Which calls of group_pointwise_conv3d the resident kernels do, and how they are shared out.
#include "cuda/group_pointwise_conv3d_resident.h"

#include <climits>

#include "cuda/group_pointwise_conv3d_resident_layers.h"

namespace gplws::cuda {
namespace {

// Entering a tile and walking over the frames beside it costs as much as so many frames.
constexpr double kTileOverhead = 1.0;

// What of the sizes of a layer does not depend on types at compile time.
struct LayerFacts {
  int inputs, groups, outputs, channels_out, stride, parts, blocks;
  int tile_rows, tile_columns, pair, piece_bytes, shared_bytes;
  int64_t packed_bytes;
  bool relu, pointwise_relu;
  Loading loading;
};

template <ResidentLayer kLayer>
constexpr LayerFacts facts_of() {
  using G = LayerGeometry<kLayer>;
  return {G::kSizes.inputs,
          G::kSizes.groups,
          G::kSizes.groups * G::kSizes.group_outputs,
          G::kSizes.channels_out,
          G::kStride,
          G::kSizes.parts,
          G::kSizes.blocks,
          G::kTileRows,
          G::kTileColumns,
          G::kPair,
          G::kPieceBytes,
          G::kSharedBytes,
          int64_t{4} * G::kPackedWords,
          G::kRelu,
          G::kPointwiseRelu,
          G::kSizes.loading};
}

struct Candidate {
  ResidentLayer layer;
  LayerFacts facts;
};

constexpr Candidate kCandidates[] = {
    {ResidentLayer::kStem, facts_of<ResidentLayer::kStem>()},
    {ResidentLayer::k12, facts_of<ResidentLayer::k12>()},
    {ResidentLayer::kHead, facts_of<ResidentLayer::kHead>()},
    {ResidentLayer::k24, facts_of<ResidentLayer::k24>()},
    {ResidentLayer::k48, facts_of<ResidentLayer::k48>()},
    {ResidentLayer::k96, facts_of<ResidentLayer::k96>()},
    {ResidentLayer::kDown12, facts_of<ResidentLayer::kDown12>()},
    {ResidentLayer::kDown24, facts_of<ResidentLayer::kDown24>()},
    {ResidentLayer::kDown48, facts_of<ResidentLayer::kDown48>()},
};

const LayerFacts& facts_of_layer(ResidentLayer layer) {
  for (const Candidate& candidate : kCandidates)
    if (candidate.layer == layer) return candidate.facts;
  return kCandidates[0].facts;  // not reached
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool fits(const GroupPointwiseConv3dHalfParams& p, const LayerFacts& facts) {
  return p.channels == facts.inputs && p.groups == facts.groups && p.middle == facts.outputs &&
         p.pointwise == (facts.channels_out > 0) &&
         p.channels_out == (p.pointwise ? facts.channels_out : facts.outputs) &&
         p.stride == facts.stride;
}

bool activates_as(const GroupPointwiseConv3dHalfParams& p, const LayerFacts& facts) {
  return p.relu == facts.relu && (!p.pointwise || p.pointwise_relu == facts.pointwise_relu);
}

// Whether a pointer and the steps between lines are multiples of so many bytes.
bool aligned(const void* pointer, const Strides5& strides, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0 &&
         2 * strides.batch % bytes == 0 && 2 * strides.frame % bytes == 0 &&
         2 * strides.row % bytes == 0;
}

// Whether an image of `height` lines, and a tile that reaches beyond it, can be addressed with 32
// bits.
bool near(const Strides5& strides, int64_t channels, int64_t height, int64_t width) {
  const int64_t last = (height - 1 + kMostLines) * strides.row + (width - 1) * strides.column +
                       (channels - 1) * strides.channel;
  return strides.row >= 0 && strides.column >= 0 && strides.channel >= 0 && last < INT_MAX;
}

bool takes_layout(const GroupPointwiseConv3dHalfParams& p, const LayerFacts& facts) {
  const bool planes = facts.loading == Loading::kPlanes;
  const bool x_fits = planes ? p.x_strides.column == 1 && 2 * p.x_strides.channel % 4 == 0 &&
                                   aligned(p.x, p.x_strides, 4)
                             : p.x_strides.channel == 1 && p.x_strides.column == facts.inputs &&
                                   aligned(p.x, p.x_strides, facts.piece_bytes);
  const int64_t y_bytes = facts.channels_out == 1 ? 4 : 16;
  const bool y_fits = (p.y_strides.channel == 1 || p.channels_out == 1) &&
                      p.y_strides.column == p.channels_out && aligned(p.y, p.y_strides, y_bytes);
  return x_fits && y_fits && p.width % facts.pair == 0 &&
         2 * p.width * facts.inputs % (facts.loading == Loading::kCopies16 ? 16 : 1) == 0 &&
         near(p.x_strides, p.channels, p.height, p.width) &&
         near(p.y_strides, p.channels_out, p.height_out, p.width_out);
}

// Cuts the frames into segments where there would be too few blocks: each segment reads the frame
// before and the one behind it once more. False: there are too many tiles to be counted.
bool share_out(const GroupPointwiseConv3dHalfParams& p, const DeviceLimits& limits,
               const LayerFacts& facts, ResidentPlan* plan) {
  const int64_t tiles_w = ceil_div(p.width_out, facts.tile_columns);
  const int64_t tiles_h = ceil_div(p.height_out, facts.tile_rows);
  const int64_t tiles = p.batch * tiles_h * tiles_w;
  const int64_t by_memory = limits.shared_memory / (facts.shared_bytes + 1024);
  const int64_t resident = by_memory < facts.blocks ? by_memory : facts.blocks;
  int64_t slots = limits.processors * resident / facts.parts;
  if (slots < 1) slots = 1;
  double best_cost = 0.0;
  int64_t best_count = 1;
  for (int64_t segments = 1; segments <= p.frames && segments <= 64; ++segments) {
    const int64_t frames = ceil_div(p.frames, segments);
    const int64_t count = ceil_div(p.frames, frames);
    const double rounds = static_cast<double>(ceil_div(tiles * count, slots));
    const double cost = rounds * (static_cast<double>(frames) + kTileOverhead);
    if (segments == 1 || cost < best_cost) {
      best_cost = cost;
      best_count = count;
      plan->frames_per_segment = static_cast<int>(frames);
    }
  }
  if (tiles * best_count > INT_MAX - slots) return false;  // kernels count so much further
  plan->tiles_w = Divider::of(static_cast<int>(tiles_w));
  plan->tiles_h = Divider::of(static_cast<int>(tiles_h));
  plan->segments = Divider::of(static_cast<int>(best_count));
  plan->tiles = static_cast<int>(tiles * best_count);
  plan->blocks = plan->tiles < slots ? plan->tiles : static_cast<int>(slots);
  plan->parts = facts.parts;
  return true;
}

}  // namespace

ResidentLayer resident_layer(const GroupPointwiseConv3dHalfParams& p, const DeviceLimits& limits) {
  if (!serves_capability(limits.capability)) return ResidentLayer::kNone;
  for (const Candidate& candidate : kCandidates)
    if (fits(p, candidate.facts) && candidate.facts.shared_bytes <= limits.shared_bytes)
      return candidate.layer;
  return ResidentLayer::kNone;
}

bool plan_resident(const GroupPointwiseConv3dHalfParams& p, const DeviceLimits& limits,
                   ResidentPlan* plan) {
  *plan = ResidentPlan{};
  const ResidentLayer layer = resident_layer(p, limits);
  if (layer == ResidentLayer::kNone || p.residual || p.frames >= INT_MAX / 2) return false;
  const LayerFacts& facts = facts_of_layer(layer);
  if (!activates_as(p, facts) || !takes_layout(p, facts)) return false;
  plan->layer = layer;
  plan->packed_bytes = facts.packed_bytes;
  return share_out(p, limits, facts, plan);
}

int64_t packed_bytes(ResidentLayer layer) {
  return layer == ResidentLayer::kNone ? 0 : facts_of_layer(layer).packed_bytes;
}

cudaError_t pack_resident(const GroupPointwiseConv3dHalfParams& p, FloatType type,
                          ResidentLayer layer, void* packed, cudaStream_t stream) {
  return type == FloatType::kBfloat16 ? pack_resident_type<Bfloat16>(p, layer, packed, stream)
                                      : pack_resident_type<Float16>(p, layer, packed, stream);
}

cudaError_t launch_resident(const GroupPointwiseConv3dHalfParams& p, FloatType type,
                            const ResidentPlan& plan, const void* packed, bool ready,
                            cudaStream_t stream) {
  return type == FloatType::kBfloat16
             ? launch_resident_type<Bfloat16>(p, plan, packed, ready, stream)
             : launch_resident_type<Float16>(p, plan, packed, ready, stream);
}

}  // namespace gplws::cuda
