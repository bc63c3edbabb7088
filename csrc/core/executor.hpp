// What runs a batch. Python callables live in csrc/bindings; here are the interface and the one that does nothing.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "scheduler.hpp"

namespace worldenv {

Nanoseconds clock_now();  // of the steady clock, which counts from anywhere

class Executor {
 public:
  virtual ~Executor() = default;
  // Runs `batch` and, in the judging stage, fills in one verdict per item (none elsewhere). What it throws fails the
  // batch. Called from one thread per device and stage, never twice at once for the same two.
  virtual void run(const Batch& batch, std::span<Verdict> verdicts) = 0;
};

// Rollout n ends after lengths[n % size] chunks; otherwise nothing is done.
class NoOpExecutor : public Executor {
 public:
  explicit NoOpExecutor(std::vector<std::uint32_t> lengths) : lengths_(std::move(lengths)) {}
  void run(const Batch& batch, std::span<Verdict> verdicts) override;

 private:
  std::vector<std::uint32_t> lengths_;
};

// Drives `jobs` through a scheduler on this thread with `executor`, and gives the nanoseconds that each event took
// the scheduler, the executor's own time not among them.
std::vector<Nanoseconds> measure_overhead(const SchedulerConfig& config, std::span<const Job> jobs, Executor& executor);

}  // namespace worldenv
