// The scheduler on real threads: one worker per device and stage, and one that keeps the time.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <variant>
#include <vector>

#include "executor.hpp"
#include "scheduler.hpp"

namespace worldenv {

class Runner {
 public:
  using Report = std::variant<Ending, GroupEnding>;

  // One executor per stage; each outlives the runner.
  Runner(SchedulerConfig config, std::vector<Executor*> executors);
  ~Runner();  // stops
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;

  void submit(std::span<const Job> jobs);  // throws as Scheduler::submit
  void cancel(std::uint32_t rollout);
  // The next ending of a rollout or a group, in order; nothing where there is none within `patience`, or nothing is
  // under way. When a rollout's ending is given out, none of its work runs any more.
  std::optional<Report> next(std::chrono::nanoseconds patience);
  bool idle() const;  // nothing under way and every report taken
  bool stopped() const;
  // Lets running batches end, starts no more, and joins the threads; what is under way is lost.
  void stop();
  Statistics statistics() const;

 private:
  struct Worker {
    std::condition_variable ready;
    const Batch* batch = nullptr;
    std::thread thread;
  };

  void obey(const Commands& commands);  // holding the lock
  void work(Worker& worker, Executor& executor);
  void keep_time();

  mutable std::mutex lock_;
  Scheduler scheduler_;
  std::vector<std::vector<std::unique_ptr<Worker>>> workers_;  // [stage][device], null where it is not placed
  std::deque<Report> reports_;
  std::condition_variable reported_, alarm_;
  std::thread timer_;
  Nanoseconds wake_ = kNever;
  bool stopping_ = false;
};

}  // namespace worldenv
