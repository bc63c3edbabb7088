// The same scheduler on a clock that jumps from event to event: the capacity planner. Batches take what a cost model
// says, verdicts come from given lengths; nothing else differs from a run (runner.hpp).
#pragma once

#include <cstdint>
#include <vector>

#include "cost_model.hpp"
#include "scheduler.hpp"

namespace worldenv {

struct Simulation {
  SchedulerConfig config;                 // one stream per device: how batches share a device is not modelled
  std::vector<std::vector<Affine>> cost;  // what batches take [s]; [stage], one per entry of its `devices`
  std::vector<std::uint32_t> lengths;     // frames to the end, by rollout; a rollout's number is its place here
  std::uint32_t chunk = 8;                // frames per chunk
  std::uint32_t limit = 1;                // chunks per rollout at most
  std::uint32_t group = 1;                // rollouts per group, one after the other
  std::uint32_t warm_up = 0;   // the window opens when so many rollouts have ended, and shuts when the last starts
  Nanoseconds event_time = 0;  // what each event takes the scheduler, which does one at a time
  double jitter = 0.0;         // each batch takes 1 - jitter .. 1 + jitter of what it should
  std::uint32_t seed = 0;      // of the jitter
};

struct Forecast {
  double seconds = 0.0;        // to the last ending
  double window = 0.0;         // [s]
  std::uint64_t rollouts = 0;  // that ended in the window
  std::vector<double> work;    // by device: what the window's useful items take in the largest batches [s]
  std::uint64_t all_chunks = 0, all_frames = 0;  // of the whole run, up to the ends
  std::vector<Ending> endings;                   // in their order
  std::vector<double> ended_at;                  // [s], like endings
  Statistics statistics;
};

// invalid_argument: a cost or length is missing or impossible, more than one stream.
Forecast simulate(const Simulation& simulation);

}  // namespace worldenv
