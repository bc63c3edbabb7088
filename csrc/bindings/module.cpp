#include "bindings.hpp"

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core: counter RNG and kinematics. Everything here works on contiguous arrays without the GIL.";
  worldenv::bind_philox(m);
  worldenv::bind_kinematics(m);
}
