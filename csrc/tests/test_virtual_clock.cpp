#include <algorithm>
#include <cmath>
#include <limits>

#include "check.hpp"
#include "core/virtual_clock.hpp"

using namespace worldenv;

namespace {

bool near(double a, double b) { return std::abs(a - b) <= 1e-6 * std::abs(b); }

// policy, 3 denoising steps, reflector; all on each device, exactly the costs given.
Simulation simple(std::uint32_t devices, std::uint32_t slots, Affine policy, Affine denoise, Affine reflector) {
  std::vector<std::uint32_t> all, buckets;
  for (std::uint32_t d = 0; d < devices; ++d) all.push_back(d);
  for (std::uint32_t b = 1; b <= slots; ++b) buckets.push_back(b);
  Simulation simulation;
  simulation.config.stages = {
      {"policy", 1, buckets, all, {}}, {"denoise", 3, buckets, all, {}}, {"reflector", 1, buckets, all, {}}};
  simulation.config.devices = devices;
  simulation.config.slots = slots;
  simulation.cost = {{devices, policy}, {devices, denoise}, {devices, reflector}};
  simulation.limit = 10;
  return simulation;
}

void one_rollout_takes_the_sum_of_its_batches() {
  Simulation simulation = simple(1, 1, {1, 0.5}, {2, 0.25}, {3, 0.125});
  simulation.config.overlap = Overlap::kOff;
  simulation.lengths = {20};  // 3 chunks of 8
  const Forecast forecast = simulate(simulation);
  REQUIRE(near(forecast.seconds, 3 * (1.5 + 3 * 2.25 + 3.125)));
  REQUIRE(forecast.all_chunks == 3 && forecast.all_frames == 20 && forecast.endings[0].chunks == 3);
}

void lock_step_pays_for_the_horizon() {
  Simulation simulation = simple(2, 4, {1, 0.5}, {2, 0.25}, {3, 0.125});
  simulation.config.discipline = Discipline::kLockStep;
  simulation.lengths.assign(16, 20);  // two waves of 2 x 4
  const Forecast forecast = simulate(simulation);
  REQUIRE(near(forecast.seconds, 2 * 10 * (3.0 + 3 * 3.0 + 3.5)));
  REQUIRE(forecast.statistics.dead_chunks == 16 * 7 && forecast.all_frames == 16 * 20);
}

void overlap_hides_the_judge_on_a_device_of_its_own() {
  Simulation simulation = simple(2, 1, {0, 1}, {0, 1}, {0, 4});
  simulation.config.stages[0].devices = simulation.config.stages[1].devices = {0};
  simulation.config.stages[2].devices = {1};
  simulation.cost = {{{0, 1}}, {{0, 1}}, {{0, 4}}};
  simulation.lengths = {80};
  simulation.config.overlap = Overlap::kOff;
  REQUIRE(near(simulate(simulation).seconds, 10 * 8.0));
  simulation.config.overlap = Overlap::kAlways;
  REQUIRE(near(simulate(simulation).seconds, 10 * 4.0 + 4.0));
  simulation.lengths = {
      40};  // chunk 5 is begun and dropped: the slot is free when its batch has ended, at most 1 s later
  const Forecast stopped = simulate(simulation);
  REQUIRE(near(stopped.seconds, 5 * 4.0 + 4.0) && stopped.statistics.dropped == 1);
  std::uint64_t wasted = 0;
  for (const auto& stage : stopped.statistics.stages) {
    for (const StageStatistics& one : stage) wasted += one.wasted;
  }
  REQUIRE(wasted == 4);
}

// What `auto` chooses is about the better of never and always: at any placement, for a slow and a fast judge, and for
// rollouts that always stop as for those that mostly go on.
void auto_is_about_the_better_choice() {
  double worst = 0.0;
  for (const std::uint32_t slots : {1, 2, 6}) {
    for (const bool split : {false, true}) {
      for (const double judge : {0.3, 2.0}) {
        for (const std::uint32_t length : {6, 70}) {
          Simulation simulation = simple(2, slots, {0.05, 0.1}, {0.1, 0.3}, {0.1, judge});
          if (split) {
            simulation.config.stages[0].devices = simulation.config.stages[1].devices = {0};
            simulation.config.stages[2].devices = {1};
            for (auto& cost : simulation.cost) cost.resize(1);
          }
          simulation.jitter = 0.1;
          for (std::uint32_t i = 0; i < 200; ++i) simulation.lengths.push_back(1 + (i * 37) % length);
          double seconds[3], wasted[3] = {};
          for (const Overlap overlap : {Overlap::kOff, Overlap::kAuto, Overlap::kAlways}) {
            simulation.config.overlap = overlap;
            const Forecast forecast = simulate(simulation);
            seconds[static_cast<int>(overlap)] = forecast.seconds;
            for (const auto& stage : forecast.statistics.stages) {
              for (const StageStatistics& one : stage)
                wasted[static_cast<int>(overlap)] += static_cast<double>(one.wasted_time) * 1e-9;
            }
          }
          // Needed work keeps the simulators busy: beside it, a chunk that may be dropped only takes room
          if (slots == 6 && split && judge < 1.0) REQUIRE(wasted[1] < 0.3 * wasted[2]);
          worst = std::max(worst, seconds[1] / std::min(seconds[0], seconds[2]));
        }
      }
    }
  }
  REQUIRE(worst < 1.06);  // seen: 1.05, with two slots that share a device of their own
}

void the_same_seed_gives_the_same_run() {
  Simulation simulation = simple(4, 7, {0.1, 0.1}, {0.2, 0.3}, {0.1, 0.2});
  simulation.jitter = 0.3;
  for (std::uint32_t i = 0; i < 300; ++i) simulation.lengths.push_back(1 + (i * 37) % 80);
  const Forecast a = simulate(simulation), b = simulate(simulation);
  simulation.seed = 1;
  const Forecast c = simulate(simulation);
  REQUIRE(a.ended_at == b.ended_at && a.ended_at != c.ended_at && a.endings.size() == 300);
  for (const Ending& ending : c.endings) REQUIRE(ending.chunks == (simulation.lengths[ending.rollout] + 7) / 8);
}

void many_slots_come_near_the_bound() {
  Simulation simulation = simple(4, 8, {0.1, 0.2}, {0.1, 0.5}, {0.1, 0.3});
  for (std::uint32_t i = 0; i < 1000; ++i) simulation.lengths.push_back(1 + (i * 37) % 80);
  simulation.warm_up = 64;
  const Forecast forecast = simulate(simulation);
  const double best = (0.2 + 0.1 / 8) + 3 * (0.5 + 0.1 / 8) + (0.3 + 0.1 / 8);
  double work = 0.0;
  for (const double one : forecast.work) work += one;
  REQUIRE(work > 0.97 * 4 * forecast.window && work <= 4.000001 * forecast.window);
  REQUIRE(forecast.rollouts > 800 && forecast.rollouts < 1000);
  simulation.warm_up = 0;  // all but the end, when fewer and fewer are left
  const Forecast whole = simulate(simulation);
  work = static_cast<double>(whole.all_chunks) * best;
  REQUIRE(work < 4 * whole.seconds && work > 0.93 * 4 * whole.seconds);
}

void the_scheduler_itself_can_be_the_bound() {
  Simulation simulation = simple(64, 4, {0, 1e-3}, {0, 1e-3}, {0, 1e-3});
  for (std::uint32_t i = 0; i < 2000; ++i) simulation.lengths.push_back(1 + (i * 37) % 80);
  const double free = simulate(simulation).seconds;
  simulation.event_time = 1000;
  REQUIRE(simulate(simulation).seconds < 1.1 * free);
  simulation.event_time = 10'000'000;
  const Forecast slow = simulate(simulation);
  REQUIRE(slow.seconds > 0.99 * 1e-2 * static_cast<double>(slow.statistics.events));
}

void what_is_not_modelled_is_refused() {
  const auto refused = [](const Simulation& simulation) {
    try {
      simulate(simulation);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  Simulation simulation = simple(1, 1, {}, {}, {});
  simulation.lengths = {1};
  REQUIRE(!refused(simulation));
  simulation.config.streams = 2;
  REQUIRE(refused(simulation));
  simulation.config.streams = 1;
  simulation.cost[1].clear();
  REQUIRE(refused(simulation));
  simulation.cost.pop_back();
  REQUIRE(refused(simulation));
  for (const double wrong : {-1.0, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    for (const Affine cost : {Affine{wrong, 0.0}, Affine{0.0, wrong}}) {
      simulation = simple(1, 1, {}, cost, {});
      simulation.lengths = {1};
      REQUIRE(refused(simulation));
      simulation = simple(1, 1, {}, {}, {});
      simulation.lengths = {1};
      simulation.config.stages[1].cost = {cost};
      REQUIRE(refused(simulation));
    }
    simulation = simple(1, 1, {}, {}, {});
    simulation.lengths = {1};
    simulation.jitter = wrong;
    REQUIRE(refused(simulation));
  }
  simulation = simple(1, 1, {}, {}, {});
  simulation.lengths = {0};
  REQUIRE(refused(simulation));
}

}  // namespace

int main() {
  return test::run({
      {"one rollout takes the sum of its batches", one_rollout_takes_the_sum_of_its_batches},
      {"lock step pays for the horizon", lock_step_pays_for_the_horizon},
      {"overlap hides the judge on a device of its own", overlap_hides_the_judge_on_a_device_of_its_own},
      {"auto is about the better choice", auto_is_about_the_better_choice},
      {"the same seed gives the same run", the_same_seed_gives_the_same_run},
      {"many slots come near the bound", many_slots_come_near_the_bound},
      {"the scheduler itself can be the bound", the_scheduler_itself_can_be_the_bound},
      {"what is not modelled is refused", what_is_not_modelled_is_refused},
  });
}
