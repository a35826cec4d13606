#pragma once

#include <pybind11/pybind11.h>

// What tells whether a model is still the one that its plan was made of.
void bind_watch(pybind11::module_& m);
