#pragma once

#include <pybind11/pybind11.h>

// core.EmulatedCudaPlan, and core.CudaPlan where the CUDA kernels are built.
void bind_cuda_walk(pybind11::module_& m);
