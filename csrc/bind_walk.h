#pragma once

#include <pybind11/pybind11.h>

// core.Plan, and the measurements of its convolutions.
void bind_walk(pybind11::module_& m);
