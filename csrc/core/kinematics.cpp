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

// Rotation vector [rad] of p * conj(q), the shorter way: what turns q into p from the left.
std::array<double, 3> between(const double* p, const double* q) {
  const double x = p[3] * -q[0] + p[0] * q[3] + p[1] * -q[2] - p[2] * -q[1];
  const double y = p[3] * -q[1] - p[0] * -q[2] + p[1] * q[3] + p[2] * -q[0];
  const double z = p[3] * -q[2] + p[0] * -q[1] - p[1] * -q[0] + p[2] * q[3];
  const double w = p[3] * q[3] - p[0] * -q[0] - p[1] * -q[1] - p[2] * -q[2];
  const double length = std::sqrt(x * x + y * y + z * z);
  const double size = length > 0.0 ? 2.0 * std::atan2(length, std::abs(w)) / length : 2.0;
  const double factor = w < 0.0 ? -size : size;
  return {factor * x, factor * y, factor * z};
}

}  // namespace

void advance(const ControllerModel& m, const double* command, ArmState& state) {
  std::array<double, 6> asked, moved;
  for (std::size_t i = 0; i < 6; ++i) asked[i] = m.scale[i] * std::clamp(command[i], -1.0, 1.0);
  if (m.holds_turn) {
    if (command[3] == 0.0 && command[4] == 0.0 && command[5] == 0.0) {
      const auto turn_left = between(state.aim.data(), state.pose.data() + 3);
      std::copy_n(turn_left.data(), 3, asked.data() + 3);
    } else {
      std::copy_n(state.pose.data() + 3, 4, state.aim.data());
      turn(asked.data() + 3, state.aim.data());
    }
  }
  for (std::size_t i = 0; i < 6; ++i) {
    moved[i] = m.gain[i] * asked[i] + m.decay[i] * state.velocity[i];
    if (m.coupled) {
      const double* row = m.coupling.data() + 18 * i;
      double others = 0.0;
      for (std::size_t j = 0; j < 6; ++j) {
        others += row[j] * asked[j] + row[6 + j] * state.asked[j] + row[12 + j] * state.velocity[j];
      }
      moved[i] += others;
    }
  }
  state.velocity = moved;
  state.asked = asked;
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
  const double ramp = std::clamp(state.ramp + m.gripper_step * direction, 0.0, 1.0);
  state.gripper = m.gripper_now * ramp + m.gripper_last * state.ramp +
                  (1.0 - m.gripper_now - m.gripper_last) * state.gripper;  // of (1, 0), exactly the ramp
  state.ramp = ramp;
}

void follow(const ControllerModel& model, std::size_t rows, std::size_t steps, const double* command, ArmState* arms,
            double* path_pose, double* path_gripper) {
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t step = row * steps; step < (row + 1) * steps; ++step) {
      advance(model, command + 7 * step, arms[row]);
      std::copy_n(arms[row].pose.data(), 7, path_pose + 7 * step);
      path_gripper[step] = arms[row].gripper;
    }
  }
}

}  // namespace worldenv
