#include "cuda/group_pointwise_conv3d_resident_kernel.h"

namespace gplws::cuda {

template cudaError_t pack_resident_type<Float16>(const GroupPointwiseConv3dHalfParams& params,
                                                 ResidentLayer layer, void* packed,
                                                 cudaStream_t stream);
template cudaError_t launch_resident_type<Float16>(const GroupPointwiseConv3dHalfParams& params,
                                                   const ResidentPlan& plan, const void* packed,
                                                   bool ready, cudaStream_t stream);

}  // namespace gplws::cuda
