// What module.cpp puts together: one function per core file. Only files of this folder know Python.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace worldenv {

namespace py = pybind11;

// No forcecast: another dtype or a strided array is refused, not copied.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void bind_philox(py::module_& m);
void bind_kinematics(py::module_& m);
void bind_scheduler(py::module_& m);

}  // namespace worldenv
