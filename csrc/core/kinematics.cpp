#include "kinematics.hpp"

#include <algorithm>
#include <cmath>

namespace worldenv {
namespace {

// Turns q (x y z w) by the rotation vector r [rad] of the world frame: exp(r) * q. The scalar part of exp(r) is the
// cosine between old and new quaternion: kept at 0 or above, so that the sign is continuous.
void turn(const double* r, double* q) {
  const double angle = std::sqrt(r[0] * r[0] + r[1] * r[1] + r[2] * r[2]);
  // sin(angle / 2) / angle; below 1e-8 its next term is beyond float64
  const double sine = angle > 1e-8 ? std::sin(0.5 * angle) / angle : 0.5;
  const double cosine = std::cos(0.5 * angle);
  const double factor = cosine < 0.0 ? -sine : sine;
  const double x = factor * r[0], y = factor * r[1], z = factor * r[2], w = std::abs(cosine);
  const double a = q[0], b = q[1], c = q[2], d = q[3];
  std::array<double, 4> p{w * a + x * d + y * c - z * b, w * b - x * c + y * d + z * a, w * c + x * b - y * a + z * d,
                          w * d - x * a - y * b - z * c};
  const double norm = std::sqrt(p[0] * p[0] + p[1] * p[1] + p[2] * p[2] + p[3] * p[3]);
  for (std::size_t i = 0; i < 4; ++i) q[i] = p[i] / norm;
}

}  // namespace

void advance(const ControllerModel& m, const double* command, ArmState& state) {
  for (std::size_t i = 0; i < 6; ++i) {
    const double asked = m.scale[i] * std::clamp(command[i], -1.0, 1.0);
    state.velocity[i] = m.gain[i] * asked + m.decay[i] * state.velocity[i];
  }
  for (std::size_t i = 0; i < 3; ++i) {
    // A wall stops what moves outward; whoever starts outside is not moved by it.
    const double before = state.pose[i];
    const double after =
        std::clamp(before + state.velocity[i], std::min(m.low[i], before), std::max(m.high[i], before));
    state.velocity[i] = after - before;
    state.pose[i] = after;
  }
  turn(state.velocity.data() + 3, state.pose.data() + 3);
  const double direction = (command[6] < 0.0) - (command[6] > 0.0);  // -1 opens, +1 shuts
  state.gripper = std::clamp(state.gripper + m.gripper_step * direction, 0.0, 1.0);
}

void follow(const ControllerModel& model, std::size_t rows, std::size_t steps, const double* command, double* pose,
            double* gripper, double* velocity, double* path_pose, double* path_gripper) {
  for (std::size_t row = 0; row < rows; ++row) {
    ArmState state{};
    std::copy_n(pose + 7 * row, 7, state.pose.data());
    std::copy_n(velocity + 6 * row, 6, state.velocity.data());
    state.gripper = gripper[row];
    for (std::size_t step = row * steps; step < (row + 1) * steps; ++step) {
      advance(model, command + 7 * step, state);
      std::copy_n(state.pose.data(), 7, path_pose + 7 * step);
      path_gripper[step] = state.gripper;
    }
    std::copy_n(state.pose.data(), 7, pose + 7 * row);
    std::copy_n(state.velocity.data(), 6, velocity + 6 * row);
    gripper[row] = state.gripper;
  }
}

}  // namespace worldenv
