#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "check.hpp"
#include "core/kinematics.hpp"

using namespace worldenv;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

ControllerModel free_model() {
  return {{0.1, 0.12, 0.14, 0.085, 0.09, 0.1},  {0.6, 0.55, 0.5, 0.6, 0.7, 0.5},
          {0.05, 0.05, 0.05, 0.5, 0.5, 0.5},    0.125,
          {-kInfinity, -kInfinity, -kInfinity}, {kInfinity, kInfinity, kInfinity}};
}

ArmState at_rest() {
  ArmState state{{0.1, 0.2, 0.3, 0, 0, 0, 1}, 1.0, {}};
  state.aim = {0, 0, 0, 1};
  state.ramp = state.gripper;
  return state;
}

bool near(double a, double b) { return std::abs(a - b) < 1e-14; }

void a_command_lags() {
  const ControllerModel model = free_model();
  ArmState state = at_rest();
  const double push[7] = {1, -0.5, 3, 0, 0, 0, 0};  // 3 counts as 1
  advance(model, push, state);
  REQUIRE(near(state.pose[0], 0.1 + 0.005) && near(state.pose[1], 0.2 - 0.003) && near(state.pose[2], 0.3 + 0.007));
  const double still[7] = {};
  advance(model, still, state);
  REQUIRE(near(state.pose[0], 0.1 + 0.005 * 1.6) && near(state.velocity[0], 0.005 * 0.6));
}

// A step about (x, y, z), from a pose that is turned about all three axes itself, against rotation matrices.
void a_turn_is_of_the_world_frame_from_the_left() {
  using Matrix = std::array<std::array<double, 3>, 3>;
  const auto matrix = [](const double* q) {
    const double x = q[0], y = q[1], z = q[2], w = q[3];
    return Matrix{{{1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)},
                   {2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)},
                   {2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)}}};
  };
  ArmState state = at_rest();
  state.pose = {0, 0, 0, 0.5, -0.1, 0.7, 0.5};  // of length 1
  const Matrix before = matrix(&state.pose[3]);
  ControllerModel model = free_model();
  for (int i = 3; i < 6; ++i) model.gain[i] = 1.0;
  const double command[7] = {0, 0, 0, 0.4, -0.8, 0.6, 0};
  advance(model, command, state);
  const Matrix after = matrix(&state.pose[3]);
  const double axis[3] = {0.2, -0.4, 0.3}, angle = std::sqrt(0.29);
  for (int column = 0; column < 3; ++column) {  // Rodrigues' formula on each column
    const double v[3] = {before[0][column], before[1][column], before[2][column]};
    const double dot = (axis[0] * v[0] + axis[1] * v[1] + axis[2] * v[2]) / (angle * angle);
    for (int i = 0; i < 3; ++i) {
      const double cross = (axis[(i + 1) % 3] * v[(i + 2) % 3] - axis[(i + 2) % 3] * v[(i + 1) % 3]) / angle;
      const double want = v[i] * std::cos(angle) + cross * std::sin(angle) + axis[i] * dot * (1 - std::cos(angle));
      REQUIRE(near(after[i][column], want));
    }
  }
}

void one_long_turn_is_many_short_ones() {
  ControllerModel model = free_model();
  model.decay = {};
  const double command[7] = {0, 0, 0, 0.6, 0.48, 0.64, 0};
  for (const int turns : {1, 5, 8, 12, 20}) {  // of half a radian: 8 and 12 are between pi and two pi
    ArmState one = at_rest(), many = at_rest();
    for (int i = 3; i < 6; ++i) model.gain[i] = turns;
    advance(model, command, one);
    for (int i = 3; i < 6; ++i) model.gain[i] = 1.0;
    for (int step = 0; step < turns; ++step) advance(model, command, many);
    double cosine = 0;
    for (int i = 3; i < 7; ++i) cosine += one.pose[i] * many.pose[i];
    REQUIRE(near(std::abs(cosine), 1.0));
  }
}

void the_sign_is_continuous() {
  ArmState state = at_rest();
  ControllerModel model = free_model();
  for (const double gain : {0.1, 20.0}) {  // at 20 a step turns by more than pi
    model.gain[3] = gain;
    for (int step = 0; step < 200; ++step) {
      const ArmState before = state;
      const double about_x[7] = {0, 0, 0, 1, 0.3, 0, 0};
      advance(model, about_x, state);
      double cosine = 0, norm = 0;
      for (int i = 3; i < 7; ++i) {
        cosine += before.pose[i] * state.pose[i];
        norm += state.pose[i] * state.pose[i];
      }
      REQUIRE(cosine >= 0.0 && near(norm, 1.0));
    }
  }
}

void the_gripper_stays_within() {
  ArmState state = at_rest();
  const double shut[7] = {0, 0, 0, 0, 0, 0, 0.1};
  for (int step = 1; step <= 20; ++step) {
    advance(free_model(), shut, state);
    REQUIRE(state.gripper == std::max(0.0, 1.0 - 0.125 * step));
  }
  const double still[7] = {};
  advance(free_model(), still, state);
  REQUIRE(state.gripper == 0.0);
  const double open[7] = {0, 0, 0, 0, 0, 0, -1};
  advance(free_model(), open, state);
  REQUIRE(state.gripper == 0.125);
}

void a_wall_holds_and_moves_nobody() {
  ControllerModel model = free_model();
  model.high[0] = 0.102;
  model.low[1] = 0.25;  // y begins outside
  ArmState state = at_rest();
  const double push[7] = {1, -1, 0, 0, 0, 0, 0};
  advance(model, push, state);
  REQUIRE(state.pose[0] == 0.102 && near(state.velocity[0], 0.002));
  REQUIRE(state.pose[1] == 0.2 && state.velocity[1] == 0.0);
}

void axes_that_are_coupled_move_each_other() {
  ControllerModel model = free_model();
  model.coupled = true;
  model.coupling[18 * 1 + 0] = 0.2;       // y moves with what is asked of x now,
  model.coupling[18 * 2 + 6 + 0] = -0.3;  // z with what was asked of x last,
  model.coupling[18 * 4 + 12 + 0] = 2.0;  // ry with how x moved last
  ArmState state = at_rest();
  const double push[7] = {1, 0, 0, 0, 0, 0, 0}, still[7] = {};
  advance(model, push, state);
  REQUIRE(near(state.velocity[0], 0.005) && near(state.velocity[1], 0.01));
  REQUIRE(state.velocity[2] == 0.0 && state.velocity[4] == 0.0);
  advance(model, still, state);
  REQUIRE(near(state.velocity[0], 0.003) && near(state.velocity[1], 0.01 * 0.55));
  REQUIRE(near(state.velocity[2], -0.3 * 0.05) && near(state.velocity[4], 2.0 * 0.005));
  advance(model, still, state);
  REQUIRE(near(state.velocity[2], -0.3 * 0.05 * 0.5) && near(state.velocity[4], 2.0 * 0.003 + 2.0 * 0.005 * 0.7));
}

// A turn of 0.5 rad is asked for once and made little by little where the controller holds it, and breaks off where
// not.
void a_turn_that_is_held_is_made_in_the_end() {
  for (const bool holds : {false, true}) {
    ControllerModel model = free_model();
    model.holds_turn = holds;
    ArmState state = at_rest();
    const double about_z[7] = {0, 0, 0, 0, 0, 1, 0}, still[7] = {0.5, 0, 0, 0, 0, 0, 0};
    advance(model, about_z, state);
    for (int step = 0; step < 400; ++step) advance(model, still, state);
    const double angle = 2.0 * std::atan2(state.pose[5], state.pose[6]);
    REQUIRE(std::abs(angle - (holds ? 0.5 : 0.5 * 0.1 / (1 - 0.5))) < 1e-6);
    REQUIRE(std::abs(state.pose[3]) < 1e-9 && std::abs(state.pose[4]) < 1e-9);
  }
}

void the_gripper_lags_behind_its_ramp() {
  ControllerModel model = free_model();
  model.gripper_now = 0.15;
  model.gripper_last = 0.22;
  ArmState state = at_rest();
  const double shut[7] = {0, 0, 0, 0, 0, 0, 1};
  advance(model, shut, state);
  REQUIRE(near(state.ramp, 0.875) && near(state.gripper, 0.15 * 0.875 + 0.22 + 0.63));
  for (int step = 0; step < 40; ++step) advance(model, shut, state);
  REQUIRE(state.ramp == 0.0 && state.gripper > 0.0 && state.gripper < 1e-6);
}

void threads_follow_what_one_follows() {
  const std::size_t rows = 4, steps = 50;
  std::vector<double> command(rows * steps * 7);
  for (std::size_t i = 0; i < command.size(); ++i) command[i] = std::sin(0.7 * static_cast<double>(i));
  struct Arms {
    std::vector<ArmState> state;
    std::vector<double> path_pose, path_gripper;
  };
  Arms whole{std::vector<ArmState>(rows, at_rest()), std::vector<double>(rows * steps * 7),
             std::vector<double>(rows * steps)};
  Arms parts = whole;
  const auto part = [&](Arms& arms, std::size_t row, std::size_t n) {
    follow(free_model(), n, steps, &command[row * steps * 7], &arms.state[row], &arms.path_pose[row * steps * 7],
           &arms.path_gripper[row * steps]);
  };
  part(whole, 0, rows);
  {
    std::vector<std::jthread> threads;
    for (std::size_t row = 0; row < rows; ++row) threads.emplace_back([&, row] { part(parts, row, 1); });
  }
  for (std::size_t row = 0; row < rows; ++row) {
    const ArmState &one = whole.state[row], &other = parts.state[row];
    REQUIRE(one.pose == other.pose && one.velocity == other.velocity && one.gripper == other.gripper);
    REQUIRE(one.asked == other.asked && one.aim == other.aim && one.ramp == other.ramp);
  }
  REQUIRE(whole.path_pose == parts.path_pose && whole.path_gripper == parts.path_gripper);
  for (std::size_t i = 0; i < 7; ++i) REQUIRE(whole.state[0].pose[i] == whole.path_pose[(steps - 1) * 7 + i]);
}

}  // namespace

int main() {
  return test::run({{"a command lags", a_command_lags},
                    {"a turn is of the world frame, from the left", a_turn_is_of_the_world_frame_from_the_left},
                    {"one long turn is many short ones", one_long_turn_is_many_short_ones},
                    {"the sign is continuous", the_sign_is_continuous},
                    {"the gripper stays within", the_gripper_stays_within},
                    {"a wall holds and moves nobody", a_wall_holds_and_moves_nobody},
                    {"axes that are coupled move each other", axes_that_are_coupled_move_each_other},
                    {"a turn that is held is made in the end", a_turn_that_is_held_is_made_in_the_end},
                    {"the gripper lags behind its ramp", the_gripper_lags_behind_its_ramp},
                    {"threads follow what one follows", threads_follow_what_one_follows}});
}
