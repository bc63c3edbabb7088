#include "core/kinematics.hpp"

#include <algorithm>

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

py::tuple follow_arms(const Doubles& pose, const Doubles& gripper, const Doubles& velocity, const Doubles& command,
                      const Doubles& gain, const Doubles& decay, const Doubles& scale, double gripper_step,
                      const Doubles& low, const Doubles& high) {
  if (command.ndim() != 3 || command.shape(2) != 7) throw py::value_error("follow: want command (B, K, 7)");
  const py::ssize_t rows = command.shape(0), steps = command.shape(1);
  if (pose.ndim() != 2 || pose.shape(0) != rows || pose.shape(1) != 7 || gripper.ndim() != 1 ||
      gripper.shape(0) != rows || velocity.ndim() != 2 || velocity.shape(0) != rows || velocity.shape(1) != 6) {
    throw py::value_error("follow: want pose (B, 7), gripper (B,), velocity (B, 6) of the same B as command");
  }
  const ControllerModel model{constants<6>(gain, "gain"),   constants<6>(decay, "decay"),
                              constants<6>(scale, "scale"), gripper_step,
                              constants<3>(low, "low"),     constants<3>(high, "high")};
  Doubles pose_end({rows, py::ssize_t{7}}), gripper_end(rows), velocity_end({rows, py::ssize_t{6}});
  Doubles path_pose({rows, steps, py::ssize_t{7}}), path_gripper({rows, steps});
  std::copy_n(pose.data(), pose.size(), pose_end.mutable_data());
  std::copy_n(gripper.data(), gripper.size(), gripper_end.mutable_data());
  std::copy_n(velocity.data(), velocity.size(), velocity_end.mutable_data());
  const double* in = command.data();
  double *p = pose_end.mutable_data(), *g = gripper_end.mutable_data(), *v = velocity_end.mutable_data();
  double *pp = path_pose.mutable_data(), *pg = path_gripper.mutable_data();
  {
    py::gil_scoped_release nogil;
    follow(model, static_cast<std::size_t>(rows), static_cast<std::size_t>(steps), in, p, g, v, pp, pg);
  }
  return py::make_tuple(path_pose, path_gripper, pose_end, gripper_end, velocity_end);
}

}  // namespace

void bind_kinematics(py::module_& m) {
  m.def("follow", follow_arms, py::arg("pose").noconvert(), py::arg("gripper").noconvert(),
        py::arg("velocity").noconvert(), py::arg("command").noconvert(), py::arg("gain").noconvert(),
        py::arg("decay").noconvert(), py::arg("scale").noconvert(), py::arg("gripper_step"), py::arg("low").noconvert(),
        py::arg("high").noconvert(),
        "B arms through K commands, all float64: path pose (B, K, 7), path gripper (B, K), then the last pose (B, 7), "
        "gripper (B,) and velocity (B, 6); else TypeError, ValueError.");
}

}  // namespace worldenv
