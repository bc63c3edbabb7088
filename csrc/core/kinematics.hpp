// How commands become motion under a lagging controller. Definition and source: worldenv/kinematics.py.
#pragma once

#include <array>
#include <cstddef>

namespace worldenv {

struct ControllerModel {
  std::array<double, 6> gain;   // share of the asked displacement that is made in the same step
  std::array<double, 6> decay;  // share of the last displacement that goes on
  std::array<double, 6> scale;  // displacement that a command of 1 asks for [m, rad]
  double gripper_step;          // travel of the gripper per step, of full travel
  std::array<double, 3> low;    // workspace [m]; -inf where there is no limit
  std::array<double, 3> high;   // workspace [m]; +inf where there is no limit
};

// One arm: x y z [m] and unit quaternion x y z w; gripper 0 shut .. 1 open; last displacement [m, rad], world frame.
struct ArmState {
  std::array<double, 7> pose;
  double gripper;
  std::array<double, 6> velocity;
};

// One control step of command (7), each clipped to [-1, 1].
void advance(const ControllerModel& model, const double* command, ArmState& state);

// `rows` arms through `steps` commands (rows, steps, 7). pose (rows, 7), gripper (rows) and velocity (rows, 6) go from
// the start to the end; path_pose (rows, steps, 7) and path_gripper (rows, steps) hold the states after each command.
void follow(const ControllerModel& model, std::size_t rows, std::size_t steps, const double* command, double* pose,
            double* gripper, double* velocity, double* path_pose, double* path_gripper);

}  // namespace worldenv
