// Dtypes of the tensors that CUDA kernels read and write.
#pragma once

namespace gplws::cuda {

enum class FloatType { kFloat32, kBfloat16, kFloat16 };

}  // namespace gplws::cuda
