// How commands become motion under a lagging controller. Definition and source: worldenv/kinematics.py.
#pragma once

#include <array>
#include <cstddef>

namespace worldenv {

struct ControllerModel {
  std::array<double, 6> gain;   // share of the asked displacement that is made in the same step
  std::array<double, 6> decay;  // share of the last displacement that goes on
  std::array<double, 6> scale;  // displacement that a command of 1 asks for [m, rad]
  double gripper_step;          // travel of the ramp that the gripper follows, per step, of full travel
  std::array<double, 3> low;    // workspace [m]; -inf where there is no limit
  std::array<double, 3> high;   // workspace [m]; +inf where there is no limit
  bool coupled = false;         // whether `coupling` counts
  // What gain and decay of single axes leave out: (6, 18) row by row, on what is asked now, was asked last, and moved
  // last.
  std::array<double, 108> coupling{};
  bool holds_turn = false;    // a rotation command of exactly 0 asks for the orientation that was asked for before
  double gripper_now = 1.0;   // share of the ramp in the gripper
  double gripper_last = 0.0;  // share of the ramp one step ago; the rest is the gripper's own last opening
};

// One arm: x y z [m] and unit quaternion x y z w; gripper 0 shut .. 1 open; last displacement [m, rad], world frame.
struct ArmState {
  std::array<double, 7> pose;
  double gripper;
  std::array<double, 6> velocity;
  std::array<double, 6> asked{};  // what was asked for last [m, rad]
  std::array<double, 4> aim{};    // the orientation that was asked for last, unit quaternion x y z w
  double ramp = 0.0;              // what the gripper follows, 0 shut .. 1 open
};

// One control step of command (7), each clipped to [-1, 1].
void advance(const ControllerModel& model, const double* command, ArmState& state);

// `arms[0 .. rows)` through `steps` commands (rows, steps, 7), from the start to the end; path_pose (rows, steps, 7)
// and path_gripper (rows, steps) hold the states after each command.
void follow(const ControllerModel& model, std::size_t rows, std::size_t steps, const double* command, ArmState* arms,
            double* path_pose, double* path_gripper);

}  // namespace worldenv
