#include "runner.hpp"

#include <stdexcept>
#include <string>

namespace worldenv {

Runner::Runner(SchedulerConfig config, std::vector<Executor*> executors) : scheduler_(std::move(config)) {
  const std::vector<Stage>& stages = scheduler_.config().stages;
  if (executors.size() != stages.size()) {
    throw std::invalid_argument("runner: " + std::to_string(executors.size()) + " executors for " +
                                std::to_string(stages.size()) + " stages: want one each");
  }
  workers_.resize(stages.size());
  for (std::size_t s = 0; s < stages.size(); ++s) {
    workers_[s].resize(scheduler_.config().devices);
    for (const std::uint32_t d : stages[s].devices) {
      workers_[s][d] = std::make_unique<Worker>();
      Worker& worker = *workers_[s][d];
      worker.thread = std::thread([this, &worker, executor = executors[s]] { work(worker, *executor); });
    }
  }
  timer_ = std::thread([this] { keep_time(); });
}

Runner::~Runner() { stop(); }

void Runner::submit(std::span<const Job> jobs) {
  const std::lock_guard held(lock_);
  if (stopping_) throw std::invalid_argument("runner: it has been stopped");
  obey(scheduler_.submit(jobs, clock_now()));
}

void Runner::cancel(std::uint32_t rollout) {
  const std::lock_guard held(lock_);
  obey(scheduler_.cancel(rollout, clock_now()));
}

std::optional<Runner::Report> Runner::next(std::chrono::nanoseconds patience) {
  std::unique_lock held(lock_);
  reported_.wait_for(held, patience, [this] { return !reports_.empty() || scheduler_.idle() || stopping_; });
  if (reports_.empty()) return std::nullopt;
  Report report = std::move(reports_.front());
  reports_.pop_front();
  if (std::holds_alternative<Ending>(report)) obey(scheduler_.taken(1, clock_now()));
  return report;
}

bool Runner::idle() const {
  const std::lock_guard held(lock_);
  return reports_.empty() && scheduler_.idle();
}

bool Runner::stopped() const {
  const std::lock_guard held(lock_);
  return stopping_;
}

Statistics Runner::statistics() const {
  const std::lock_guard held(lock_);
  return scheduler_.statistics();
}

void Runner::stop() {
  {
    const std::lock_guard held(lock_);
    stopping_ = true;
    for (auto& stage : workers_) {
      for (auto& worker : stage) {
        if (worker) worker->ready.notify_one();
      }
    }
    alarm_.notify_one();
    reported_.notify_all();
  }
  for (auto& stage : workers_) {
    for (auto& worker : stage) {
      if (worker && worker->thread.joinable()) worker->thread.join();
    }
  }
  if (timer_.joinable()) timer_.join();
}

void Runner::obey(const Commands& commands) {
  for (const BatchId id : commands.start) {
    const Batch& batch = scheduler_.batch(id);
    Worker& worker = *workers_[batch.stage][batch.device];
    worker.batch = &batch;
    worker.ready.notify_one();
  }
  for (const Ending& ending : commands.endings) reports_.emplace_back(ending);
  for (const GroupEnding& ending : commands.groups) reports_.emplace_back(ending);
  if (!commands.endings.empty() || scheduler_.idle()) reported_.notify_all();
  if (commands.wake < wake_) alarm_.notify_one();
  wake_ = commands.wake;
}

void Runner::work(Worker& worker, Executor& executor) {
  const std::size_t judge = scheduler_.config().stages.size() - 1;
  std::vector<Verdict> verdicts;
  std::unique_lock held(lock_);
  while (true) {
    worker.ready.wait(held, [&] { return worker.batch != nullptr || stopping_; });
    if (stopping_) return;
    const Batch& batch = *std::exchange(worker.batch, nullptr);
    held.unlock();
    verdicts.assign(batch.stage == judge ? batch.items.size() : 0, {});
    bool failed = false;
    std::string message;
    try {
      executor.run(batch, verdicts);
    } catch (const std::exception& error) {
      failed = true;
      message = error.what();
    }
    held.lock();
    if (stopping_) return;
    obey(failed ? scheduler_.fail(batch.id, message, clock_now())
                : scheduler_.complete(batch.id, verdicts, clock_now()));
  }
}

void Runner::keep_time() {
  std::unique_lock held(lock_);
  while (!stopping_) {
    if (wake_ == kNever) {
      alarm_.wait(held);
    } else if (clock_now() < wake_) {
      alarm_.wait_until(held, std::chrono::steady_clock::time_point(std::chrono::nanoseconds(wake_)));
    } else {
      obey(scheduler_.wake(clock_now()));
    }
  }
}

}  // namespace worldenv
