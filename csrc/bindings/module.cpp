#include "bindings.hpp"
#include "onnxruntime/kernels.hpp"

PYBIND11_MODULE(_core, m) {
  m.doc() =
      "The C++ core: counter RNG, kinematics, rollout scheduler. Arrays are contiguous, and worked on without the GIL.";
  worldenv::bind_philox(m);
  worldenv::bind_kinematics(m);
  worldenv::bind_scheduler(m);
  m.attr("MOST_KEYS") = worldenv::kMostKeys;
  m.attr("MOST_WIDTH") = worldenv::kMostWidth;
  m.attr("MOST_CHANNELS_IN") = worldenv::kMostChannelsIn;
  m.attr("MOST_CHANNELS_OUT") = worldenv::kMostChannelsOut;
  m.attr("MOST_ROW") = worldenv::kMostRow;
  m.attr("PANEL") = worldenv::kPanel;
  m.attr("QUAD") = worldenv::kQuad;
  m.attr("OPERATORS") = WORLDENV_OPERATORS;
}
