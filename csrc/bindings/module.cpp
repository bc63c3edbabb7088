#include "bindings.hpp"

PYBIND11_MODULE(_core, m) {
  m.doc() =
      "The C++ core: counter RNG, kinematics, rollout scheduler. Arrays are contiguous, and worked on without the GIL.";
  worldenv::bind_philox(m);
  worldenv::bind_kinematics(m);
  worldenv::bind_scheduler(m);
}
