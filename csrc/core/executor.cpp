#include "executor.hpp"

#include <chrono>
#include <deque>

namespace worldenv {

Nanoseconds clock_now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void NoOpExecutor::run(const Batch& batch, std::span<Verdict> verdicts) {
  for (std::size_t i = 0; i < verdicts.size(); ++i) {
    const Item& item = batch.items[i];
    verdicts[i] = {item.chunk + 1 >= lengths_[item.rollout % lengths_.size()], 1.0};
  }
}

std::vector<Nanoseconds> measure_overhead(const SchedulerConfig& config, std::span<const Job> jobs,
                                          Executor& executor) {
  Scheduler scheduler(config);
  std::vector<Nanoseconds> spent;
  std::vector<Verdict> verdicts;
  std::deque<BatchId> running;
  const auto judge = static_cast<std::uint32_t>(config.stages.size()) - 1;
  Nanoseconds before = clock_now();
  const Commands* commands = &scheduler.submit(jobs, before);
  while (true) {
    running.insert(running.end(), commands->start.begin(), commands->start.end());
    if (running.empty()) break;
    const Batch& batch = scheduler.batch(running.front());
    running.pop_front();
    verdicts.assign(batch.stage == judge ? batch.items.size() : 0, {});
    executor.run(batch, verdicts);
    before = clock_now();
    commands = &scheduler.complete(batch.id, verdicts, before);
    spent.push_back(clock_now() - before);
  }
  return spent;
}

}  // namespace worldenv
