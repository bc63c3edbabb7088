#include "core/kinematics.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "bindings.hpp"

namespace worldenv {
namespace {

using Doubles = Array<double>;

template <std::size_t N>
std::array<double, N> constants(const Doubles& from, const char* what) {
  if (from.ndim() != 1 || from.shape(0) != static_cast<py::ssize_t>(N)) {
    throw py::value_error(std::string("follow: ") + what + ": want (" + std::to_string(N) + ",)");
  }
  std::array<double, N> to{};
  std::copy_n(from.data(), N, to.data());
  return to;
}

// The last columns of a state's row in `follow`: pose 7, gripper, velocity 6, asked 6, aim 4, ramp.
constexpr py::ssize_t kState = 25;

void read(const double* row, ArmState& arm) {
  std::copy_n(row, 7, arm.pose.data());
  arm.gripper = row[7];
  std::copy_n(row + 8, 6, arm.velocity.data());
  std::copy_n(row + 14, 6, arm.asked.data());
  std::copy_n(row + 20, 4, arm.aim.data());
  arm.ramp = row[24];
}

void write(const ArmState& arm, double* row) {
  std::copy_n(arm.pose.data(), 7, row);
  row[7] = arm.gripper;
  std::copy_n(arm.velocity.data(), 6, row + 8);
  std::copy_n(arm.asked.data(), 6, row + 14);
  std::copy_n(arm.aim.data(), 4, row + 20);
  row[24] = arm.ramp;
}

py::tuple follow_arms(const Doubles& state, const Doubles& command, const ControllerModel& model) {
  if (command.ndim() != 3 || command.shape(2) != 7) throw py::value_error("follow: want command (B, K, 7)");
  const py::ssize_t rows = command.shape(0), steps = command.shape(1);
  if (state.ndim() != 2 || state.shape(0) != rows || state.shape(1) != kState) {
    throw py::value_error("follow: want state (B, 25) of the same B as command");
  }
  std::vector<ArmState> arms(static_cast<std::size_t>(rows));
  for (std::size_t row = 0; row < arms.size(); ++row)
    read(state.data() + kState * static_cast<py::ssize_t>(row), arms[row]);
  Doubles path_pose({rows, steps, py::ssize_t{7}}), path_gripper({rows, steps}), end({rows, kState});
  const double* in = command.data();
  double *pose = path_pose.mutable_data(), *gripper = path_gripper.mutable_data();
  {
    py::gil_scoped_release nogil;
    follow(model, arms.size(), static_cast<std::size_t>(steps), in, arms.data(), pose, gripper);
  }
  double* out = end.mutable_data();
  for (std::size_t row = 0; row < arms.size(); ++row) write(arms[row], out + kState * static_cast<py::ssize_t>(row));
  return py::make_tuple(path_pose, path_gripper, end);
}

ControllerModel make_model(const Doubles& gain, const Doubles& decay, const Doubles& scale, double gripper_step,
                           const Doubles& low, const Doubles& high, const std::optional<Doubles>& coupling,
                           bool holds_turn, double gripper_now, double gripper_last) {
  ControllerModel model{constants<6>(gain, "gain"),   constants<6>(decay, "decay"),
                        constants<6>(scale, "scale"), gripper_step,
                        constants<3>(low, "low"),     constants<3>(high, "high")};
  if (coupling) {
    if (coupling->ndim() != 2 || coupling->shape(0) != 6 || coupling->shape(1) != 18) {
      throw py::value_error("follow: coupling: want (6, 18)");
    }
    model.coupled = true;
    std::copy_n(coupling->data(), model.coupling.size(), model.coupling.data());
  }
  model.holds_turn = holds_turn;
  model.gripper_now = gripper_now;
  model.gripper_last = gripper_last;
  return model;
}

}  // namespace

void bind_kinematics(py::module_& m) {
  py::class_<ControllerModel>(m, "ControllerModel")
      .def(py::init(&make_model), py::arg("gain").noconvert(), py::arg("decay").noconvert(),
           py::arg("scale").noconvert(), py::arg("gripper_step"), py::arg("low").noconvert(),
           py::arg("high").noconvert(), py::arg("coupling").noconvert(), py::arg("holds_turn"), py::arg("gripper_now"),
           py::arg("gripper_last"),
           "Constants: gain, decay, scale (6,), low, high (3,), coupling (6, 18) or None, float64; else ValueError.");
  m.def("follow", follow_arms, py::arg("state").noconvert(), py::arg("command").noconvert(), py::arg("model"),
        "B arms through K commands, all float64: path pose (B, K, 7), path gripper (B, K), and the state (B, 25) after "
        "them; a row of the state is pose 7, gripper, velocity 6, asked 6, aim 4, ramp. Else TypeError, ValueError.");
}

}  // namespace worldenv
