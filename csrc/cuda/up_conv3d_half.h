// up_conv3d in 16 bits on tensor cores, for two channels in to one channel out.
#pragma once

#include "cuda/up_conv3d.h"

namespace gplws::cuda {

// Whether these kernels can do it on the current device, in any layout: layouts do not change a
// bit.
bool up_conv3d_half_fits(const UpConv3dParams& params);

// As launch_up_conv3d, for what fits.
cudaError_t launch_up_conv3d_half(const UpConv3dParams& params, cudaStream_t stream);

}  // namespace gplws::cuda
