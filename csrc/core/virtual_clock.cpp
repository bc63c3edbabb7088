#include "virtual_clock.hpp"

#include <algorithm>
#include <queue>
#include <stdexcept>
#include <tuple>

#include "philox.hpp"

namespace worldenv {
namespace {

[[noreturn]] void refuse(const char* what) { throw std::invalid_argument(std::string("simulate: ") + what); }

Nanoseconds nanoseconds(double seconds) { return static_cast<Nanoseconds>(seconds * 1e9 + 0.5); }

}  // namespace

Forecast simulate(const Simulation& simulation) {
  const SchedulerConfig& config = simulation.config;
  Scheduler scheduler(config);
  if (config.streams != 1) refuse("want one stream per device: how batches share a device is not modelled");
  if (simulation.cost.size() != config.stages.size()) refuse("want one list of costs per stage");
  if (simulation.chunk < 1 || simulation.group < 1) refuse("want at least 1 frame per chunk and 1 rollout per group");
  std::vector<std::vector<Affine>> cost(config.stages.size(), std::vector<Affine>(config.devices));
  for (std::size_t s = 0; s < config.stages.size(); ++s) {
    if (simulation.cost[s].size() != config.stages[s].devices.size()) refuse("want one cost per device of a stage");
    for (std::size_t i = 0; i < simulation.cost[s].size(); ++i) {
      if (!simulation.cost[s][i].possible()) refuse("want costs of 0 seconds or more");
      cost[s][config.stages[s].devices[i]] = simulation.cost[s][i];
    }
  }
  if (!(simulation.jitter >= 0.0 && simulation.jitter <= 1.0)) refuse("want a jitter of 0 to 1");
  const auto rollouts = static_cast<std::uint32_t>(simulation.lengths.size());
  std::vector<Job> jobs;
  for (std::uint32_t i = 0; i < rollouts; ++i) {
    if (simulation.lengths[i] < 1) refuse("want lengths of at least 1 frame");
    jobs.push_back({i, i / simulation.group, simulation.limit});
  }

  Forecast forecast;
  forecast.work.resize(config.devices);
  using Event = std::tuple<Nanoseconds, std::uint64_t, BatchId>;  // when it is done, which was started first, which
  std::priority_queue<Event, std::vector<Event>, std::greater<>> running;
  std::vector<Verdict> verdicts;
  std::uint64_t started = 0;
  Nanoseconds now = 0, opened = simulation.warm_up == 0 ? 0 : kNever, shut = kNever;
  const Commands* commands = &scheduler.submit(jobs, now);
  const auto judge = static_cast<std::uint32_t>(config.stages.size()) - 1;
  while (true) {
    for (const BatchId id : commands->start) {
      const Batch& batch = scheduler.batch(id);
      double takes = cost[batch.stage][batch.device].seconds(batch.shape);
      if (simulation.jitter > 0.0) {
        const Block words =
            philox4x32({static_cast<std::uint32_t>(started), static_cast<std::uint32_t>(started >> 32), 0, 0},
                       {simulation.seed, 0});
        takes *= 1.0 + simulation.jitter * (words[0] * 0x1p-31 - 1.0);
      }
      running.emplace(now + nanoseconds(takes), started++, id);
    }
    for (const Ending& ending : commands->endings) {
      forecast.endings.push_back(ending);
      forecast.ended_at.push_back(static_cast<double>(now) * 1e-9);
      forecast.rollouts += opened != kNever && shut == kNever;
    }
    if (opened == kNever && forecast.endings.size() >= simulation.warm_up) opened = now;
    if (shut == kNever && scheduler.waiting() == 0 && opened != kNever) shut = now;
    if (running.empty() && commands->wake == kNever) break;
    if (running.empty() || commands->wake < std::get<0>(running.top())) {
      now = std::max(now, commands->wake) + simulation.event_time;
      commands = &scheduler.wake(now);
      continue;
    }
    const auto [done, order, id] = running.top();
    running.pop();
    now = std::max(now, done) + simulation.event_time;  // the scheduler was perhaps still at the event before
    const Batch& batch = scheduler.batch(id);
    const Nanoseconds inside = std::min(done, shut) - std::max(batch.started, opened);
    if (opened != kNever && inside > 0) {  // the part of the batch that lies in the window
      std::uint32_t useful = 0;
      for (const Item& item : batch.items) useful += item.chunk * simulation.chunk < simulation.lengths[item.rollout];
      const std::uint32_t largest = config.stages[batch.stage].buckets.back();
      const double part = static_cast<double>(inside) / static_cast<double>(done - batch.started);
      forecast.work[batch.device] += part * useful * cost[batch.stage][batch.device].seconds(largest) / largest;
    }
    verdicts.clear();
    if (batch.stage == judge) {
      for (const Item& item : batch.items) {
        const std::uint32_t first = item.chunk * simulation.chunk, length = simulation.lengths[item.rollout];
        verdicts.push_back({length <= first + simulation.chunk, 1.0});
        if (length <= first) continue;  // lock step: after the end
        const std::uint32_t frames = std::min(simulation.chunk, length - first);
        ++forecast.all_chunks;
        forecast.all_frames += frames;
      }
    }
    commands = &scheduler.complete(id, verdicts, now);
  }
  forecast.seconds = forecast.ended_at.empty() ? 0.0 : forecast.ended_at.back();
  forecast.window = opened == kNever ? 0.0 : static_cast<double>(std::min(shut, now) - opened) * 1e-9;
  forecast.statistics = scheduler.statistics();
  return forecast;
}

}  // namespace worldenv
