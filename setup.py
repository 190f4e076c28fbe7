"""Compiles gplws/_C (CPU kernels, always) and gplws/_cuda.so (CUDA kernels, where nvcc is found).

The metadata is in pyproject.toml, the work in build_tools/. Environment variables:

    GPLWS_CUDA=auto|0|1     CUDA kernels if nvcc is found (auto, the default), never (0), surely (1)
    TORCH_CUDA_ARCH_LIST    CUDA architectures, e.g. "8.0;9.0+PTX"; default: all from 7.5 to 12.0
    CUDA_HOME               where nvcc lives; default: PATH, then /usr/local/cuda*
    CXX, CXXFLAGS, LDFLAGS  C++ compiler and extra flags
    NVCC_PREPEND_FLAGS, NVCC_APPEND_FLAGS
                            extra flags of nvcc
    MAX_JOBS                number of parallel compile jobs
    GPLWS_SANITIZE          address,undefined: CPU kernels that watch themselves, for
                            build_tools/check_sanitizers.py
    GPLWS_TORCH_DIR         the torch package whose headers to build with
"""

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_tools"))
from toolchain import require_platform, require_setuptools

# Before native, which imports what Windows has not and an old setuptools may not have.
require_platform()
require_setuptools()

from native import BuildExt, BuildPy

setup(
    ext_modules=[Extension("gplws._C", sources=[])],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
