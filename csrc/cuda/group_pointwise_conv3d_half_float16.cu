#include "cuda/group_pointwise_conv3d_half_kernel.h"

namespace gplws::cuda {

template cudaError_t launch_half<Float16>(const GroupPointwiseConv3dHalfParams& params,
                                          const HalfPlan& plan, void* scratch, cudaStream_t stream);

}  // namespace gplws::cuda
