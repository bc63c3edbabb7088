#include <algorithm>
#include <optional>
#include <queue>
#include <set>

#include "check.hpp"
#include "core/scheduler.hpp"
#include "toy_world.hpp"

using namespace worldenv;
using worldenv::test::mix;
using worldenv::test::Toy;

namespace {

struct Dice {  // a stream of numbers, a function of the seed
  std::uint64_t state;
  std::uint32_t operator()(std::uint32_t below) { return static_cast<std::uint32_t>((state = mix(state, 7)) % below); }
};

SchedulerConfig chain(std::uint32_t slots, std::uint32_t devices = 1) {
  std::vector<std::uint32_t> all;
  for (std::uint32_t d = 0; d < devices; ++d) all.push_back(d);
  SchedulerConfig config;
  config.stages = {{"policy", 1, {1, 2, 4, 8}, all, {}},
                   {"denoise", 3, {1, 2, 4, 8}, all, {}},
                   {"decode", 1, {4}, all, {}},
                   {"reflector", 1, {1, 2, 4, 8}, all, {}}};
  config.devices = devices;
  config.slots = slots;
  return config;
}

// Drives a scheduler through random delays, and holds every batch to what the header says of it.
class Drive {
 public:
  Drive(const SchedulerConfig& config, Toy& toy, std::uint64_t seed, Nanoseconds began = 0)
      : scheduler(config), toy_(toy), dice_{seed}, now_(began) {}

  void submit(const std::vector<Job>& jobs) {
    for (const Job& job : jobs) limit_[job.rollout] = job.chunks;
    take(scheduler.submit(jobs, now_));
  }

  void take(const Commands& commands) {
    const SchedulerConfig& config = scheduler.config();
    for (const Ending& ending : commands.endings) {
      REQUIRE(ended.emplace(ending.rollout, ending).second);
      std::erase_if(occupant_, [&](const auto& one) { return one.second == ending.rollout; });
    }
    for (const BatchId id : commands.start) {
      const Batch& batch = scheduler.batch(id);
      const Stage& stage = config.stages[batch.stage];
      REQUIRE(std::find(stage.buckets.begin(), stage.buckets.end(), batch.shape) != stage.buckets.end());
      REQUIRE(!batch.items.empty() && batch.items.size() <= batch.shape);
      for (const std::uint32_t smaller : stage.buckets) REQUIRE(smaller >= batch.shape || smaller < batch.items.size());
      REQUIRE(std::find(stage.devices.begin(), stage.devices.end(), batch.device) != stage.devices.end());
      REQUIRE(++on_device_[batch.device] <= config.streams);
      REQUIRE(on_stage_.insert({batch.stage, batch.device}).second);
      for (const Item& item : batch.items) {
        REQUIRE(occupant_.emplace(item.slot, item.rollout).first->second == item.rollout);
        REQUIRE(item.chunk <= judged_[item.rollout] + (config.overlap == Overlap::kOff ? 0 : 1));
        REQUIRE(item.speculative == (item.chunk > judged_[item.rollout]) && item.chunk < limit_.at(item.rollout));
      }
      running_.emplace(now_ + 1 + dice_(1000), id);
    }
    for (const GroupEnding& group : commands.groups) groups.push_back(group);
    REQUIRE(occupant_.size() <= config.slots * config.stages[0].devices.size());
    wake_ = commands.wake;
  }

  // One event; false when nothing is left. `faulty` may throw for an item, before the toy has run it.
  template <typename Faulty>
  bool step(Faulty faulty) {
    if (running_.empty() && wake_ == kNever) return false;
    if (running_.empty() || wake_ < running_.top().first) {
      now_ = std::max(now_, wake_);
      take(scheduler.wake(now_));
      return true;
    }
    const auto [done, id] = running_.top();
    running_.pop();
    now_ = done;
    const Batch& batch = scheduler.batch(id);
    --on_device_[batch.device];
    on_stage_.erase({batch.stage, batch.device});
    try {
      for (const Item& item : batch.items) faulty(batch, item);
    } catch (const std::runtime_error& error) {
      take(scheduler.fail(id, error.what(), now_));
      return true;
    }
    std::vector<Verdict> verdicts;
    const bool judges = batch.stage + 1 == scheduler.config().stages.size();
    for (const Item& item : batch.items) {
      const Verdict verdict = toy_.run(batch, item);
      if (judges) verdicts.push_back(verdict);
      if (judges) ++judged_[item.rollout];
    }
    take(scheduler.complete(id, verdicts, now_));
    return true;
  }
  void run() {
    while (step([](const Batch&, const Item&) {})) {
    }
  }

  void pause(Nanoseconds time) { now_ += time; }

  Scheduler scheduler;
  std::map<std::uint32_t, Ending> ended;
  std::vector<GroupEnding> groups;

 private:
  Toy& toy_;
  Dice dice_;
  Nanoseconds now_ = 0, wake_ = kNever;
  std::priority_queue<std::pair<Nanoseconds, BatchId>, std::vector<std::pair<Nanoseconds, BatchId>>, std::greater<>>
      running_;
  std::map<std::uint32_t, std::uint32_t> on_device_, occupant_, judged_, limit_;
  std::set<std::pair<std::uint32_t, std::uint32_t>> on_stage_;
};

std::vector<Job> jobs(std::uint32_t count, std::uint32_t group, std::uint32_t limit) {
  std::vector<Job> out;
  for (std::uint32_t i = 0; i < count; ++i) out.push_back({i, i / group, limit});
  return out;
}

Toy toy_of(const SchedulerConfig& config, std::uint32_t seed) {
  std::vector<std::uint32_t> steps;
  for (const Stage& stage : config.stages) steps.push_back(stage.steps);
  return {steps, seed, {}, {}, {}};
}

SchedulerConfig random_config(Dice& dice) {
  const std::uint32_t slot_counts[] = {1, 2, 3, 7, 16};
  SchedulerConfig config = chain(slot_counts[dice(5)], 1u << dice(3));
  config.streams = 1 + dice(3);
  config.overlap = static_cast<Overlap>(dice(3));
  config.linger = dice(2) ? 300 : 0;
  config.max_wait = dice(2) ? 500 : 1'000'000'000;
  config.unread = dice(3) ? 0 : 2;
  if (dice(5) == 0) config.discipline = Discipline::kLockStep;
  for (Stage& stage : config.stages) {
    if (dice(3) == 0) stage.buckets = {4};
  }
  if (config.devices > 1 && dice(2)) {  // split: the last device judges, the others do the rest
    std::vector<std::uint32_t> front;
    for (std::uint32_t d = 0; d + 1 < config.devices; ++d) front.push_back(d);
    for (Stage& stage : config.stages) stage.devices = front;
    config.stages.back().devices = {config.devices - 1};
  }
  return config;
}

void any_schedule_gives_the_rollouts_of_a_plain_loop() {
  std::uint64_t speculated = 0, dropped = 0, confirmed = 0;
  for (std::uint32_t seed = 0; seed < 400; ++seed) {
    Dice dice{seed};
    const SchedulerConfig config = random_config(dice);
    Toy toy = toy_of(config, seed);
    Drive drive(config, toy, seed + 1000);
    drive.submit(jobs(24, 8, 5));
    std::uint32_t read = 0;
    while (true) {
      if (drive.step([](const Batch&, const Item&) {})) continue;
      if (drive.ended.size() == read) break;
      drive.take(
          drive.scheduler.taken(static_cast<std::uint32_t>(drive.ended.size()) - read, 0));  // the consumer was slow
      read = static_cast<std::uint32_t>(drive.ended.size());
    }
    REQUIRE(drive.ended.size() == 24 && drive.groups.size() == 3 && drive.scheduler.idle());
    for (const auto& [rollout, ending] : drive.ended) {
      const auto [chunks, value] = toy.alone(rollout, 5);
      REQUIRE(ending.chunks == chunks && ending.value == value);
      REQUIRE(ending.why == (toy.length(rollout) <= 5 ? Why::kStopped : Why::kLimit));
    }
    const Statistics& statistics = drive.scheduler.statistics();
    std::uint64_t items = 0, wasted = 0, needed = 0;
    for (const auto& stage : statistics.stages) {
      for (const StageStatistics& one : stage) {
        items += one.items;
        wasted += one.wasted;
        speculated += one.speculative;
      }
    }
    for (const auto& [rollout, ending] : drive.ended) needed += ending.chunks * 6;
    needed += statistics.dead_chunks * 6;
    REQUIRE(items == needed + wasted);  // nothing is generated after an end but what is counted as waste
    dropped += statistics.dropped;
    confirmed += statistics.confirmed;
  }
  REQUIRE(speculated > 0 && dropped > 0 && confirmed > 0);
}

// A clock counts from a machine's start, and between two iterations of LOOP no rollout is made: neither is a device's
// idleness.
void what_it_decides_depends_on_no_time_before_the_rollouts() {
  std::uint64_t speculated = 0;
  for (std::uint32_t seed = 0; seed < 100; ++seed) {
    Dice dice{seed};
    SchedulerConfig config = random_config(dice);
    config.overlap = Overlap::kAuto;
    config.unread = 0;
    const Nanoseconds day = 86'400'000'000'000;
    std::vector<std::vector<std::uint64_t>> seen;
    for (const auto& [began, pause] : {std::pair<Nanoseconds, Nanoseconds>{0, 0}, {day, 0}, {0, day}}) {
      Toy toy = toy_of(config, seed);
      Drive drive(config, toy, seed + 1000, began);
      std::vector<std::uint64_t> counted;
      for (std::uint32_t iteration = 0; iteration < 2; ++iteration) {
        std::vector<Job> made = jobs(24, 8, 5);
        for (Job& job : made) job = {job.rollout + 24 * iteration, job.group + 3 * iteration, job.chunks};
        drive.submit(made);
        drive.run();
        drive.pause(pause);
        for (const auto& stage : drive.scheduler.statistics().stages) {
          for (const StageStatistics& one : stage)
            counted.insert(counted.end(), {one.batches, one.speculative, one.wasted});
        }
      }
      seen.push_back(counted);
      for (const auto& stage : drive.scheduler.statistics().stages) {
        for (const StageStatistics& one : stage) speculated += one.speculative;
      }
    }
    REQUIRE(seen[1] == seen[0] && seen[2] == seen[0]);
  }
  REQUIRE(speculated > 0);
}

void groups_come_whole_and_with_their_spread() {
  const SchedulerConfig config = chain(3);
  Toy toy = toy_of(config, 5);
  Drive drive(config, toy, 1);
  drive.submit(jobs(16, 8, 9));
  while (drive.step([](const Batch&, const Item&) {})) {
    for (const GroupEnding& group : drive.groups) {
      for (std::uint32_t i = 8 * group.group; i < 8 * group.group + 8; ++i) REQUIRE(drive.ended.contains(i));
    }
  }
  REQUIRE(drive.groups.size() == 2);
  for (const GroupEnding& group : drive.groups) {
    double sum = 0.0, low = 2.0, high = -1.0;
    for (std::uint32_t i = 8 * group.group; i < 8 * group.group + 8; ++i) {
      const double value = drive.ended.at(i).value;
      sum += value;
      low = std::min(low, value);
      high = std::max(high, value);
    }
    REQUIRE(group.rollouts == 8 && group.failed == 0 && group.cancelled == 0);
    REQUIRE(std::abs(group.mean - sum / 8) < 1e-12 && group.low == low && group.high == high);
  }
}

void failures_are_retried_alone_and_then_told_with_their_key() {
  for (std::uint32_t seed = 0; seed < 200; ++seed) {
    Dice dice{seed + 77};
    const SchedulerConfig config = random_config(dice);
    Toy toy = toy_of(config, seed);
    Drive drive(config, toy, seed);
    drive.submit(jobs(24, 8, 5));
    std::map<std::uint32_t, int> tries;
    const std::uint32_t bad = seed % 24, stage = seed % 4;
    const bool past = config.discipline == Discipline::kContinuous;  // what is only speculative may not fail a rollout
    std::uint32_t read = 0;
    while (true) {
      const bool went = drive.step([&](const Batch& batch, const Item& item) {
        if (item.rollout == bad && batch.stage == stage && item.chunk == 0) {
          tries[bad] += batch.items.size() == 1;
          throw std::runtime_error("no luck");
        }
        if (past && item.chunk >= toy.length(item.rollout)) throw std::runtime_error("nobody asked for this");
        if (dice(20) == 0 && tries[1000 + item.rollout]++ < 1) throw std::runtime_error("once");
      });
      if (went) continue;
      if (drive.ended.size() == read) break;
      drive.take(drive.scheduler.taken(static_cast<std::uint32_t>(drive.ended.size()) - read, 0));
      read = static_cast<std::uint32_t>(drive.ended.size());
    }
    REQUIRE(drive.ended.size() == 24 && drive.scheduler.idle());
    for (const auto& [rollout, ending] : drive.ended) {
      if (rollout == bad) {
        REQUIRE(ending.why == Why::kFailed && tries[bad] == 3);
        REQUIRE(ending.message.starts_with("stage " + config.stages[stage].name + ", chunk 0") &&
                ending.message.ends_with("no luck"));
      } else {
        REQUIRE(ending.why != Why::kFailed && std::pair(ending.chunks, ending.value) == toy.alone(rollout, 5));
      }
    }
    for (const GroupEnding& group : drive.groups) REQUIRE(group.failed == (group.group == bad / 8 ? 1 : 0));
  }
}

void the_cancelled_go_and_the_others_do_not_notice() {
  for (std::uint32_t seed = 0; seed < 200; ++seed) {
    Dice dice{seed + 5};
    SchedulerConfig config = random_config(dice);
    config.unread = 0;
    Toy toy = toy_of(config, seed);
    Drive drive(config, toy, seed);
    drive.submit(jobs(24, 8, 5));
    std::set<std::uint32_t> asked;
    while (drive.step([](const Batch&, const Item&) {})) {
      if (dice(15) != 0) continue;
      const std::uint32_t rollout = dice(24);
      if (!drive.ended.contains(rollout)) asked.insert(rollout);
      drive.take(drive.scheduler.cancel(rollout, 0));
    }
    REQUIRE(drive.ended.size() == 24 && drive.groups.size() == 3 && drive.scheduler.idle());
    std::uint32_t cancelled = 0;
    for (const auto& [rollout, ending] : drive.ended) {
      cancelled += ending.why == Why::kCancelled;
      if (ending.why == Why::kCancelled) {
        REQUIRE(asked.contains(rollout));
      } else {
        REQUIRE(std::pair(ending.chunks, ending.value) == toy.alone(rollout, 5));
      }
    }
    std::uint32_t told = 0;
    for (const GroupEnding& group : drive.groups) told += group.cancelled;
    REQUIRE(told == cancelled);
  }
}

void lock_step_goes_together_to_the_limit() {
  SchedulerConfig config = chain(6, 2);
  config.discipline = Discipline::kLockStep;
  Toy toy = toy_of(config, 3);
  Drive drive(config, toy, 3);
  std::map<std::uint32_t, int> tries;
  drive.submit(jobs(24, 8, 9));
  while (drive.step([&](const Batch& batch, const Item& item) {
    if (item.rollout == 5 && batch.stage == 1 && tries[5]++ < 2) throw std::runtime_error("twice");
  })) {
  }
  REQUIRE(drive.ended.size() == 24);
  std::uint64_t dead = 0, items = 0;
  for (const auto& [rollout, ending] : drive.ended) {
    REQUIRE(std::pair(ending.chunks, ending.value) == toy.alone(rollout, 9));
    dead += 9 - ending.chunks;
  }
  const Statistics& statistics = drive.scheduler.statistics();
  for (const auto& one : statistics.stages[0]) items += one.items;
  REQUIRE(statistics.dead_chunks == dead && dead > 0 && items == 24 * 9);
}

void batches_hold_different_steps_and_chunks() {
  SchedulerConfig config = chain(11);
  config.max_wait = 50;
  Toy toy = toy_of(config, 9);
  Drive drive(config, toy, 9);
  bool mixed_steps = false, mixed_chunks = false;
  drive.submit(jobs(48, 8, 9));
  while (drive.step([&](const Batch& batch, const Item& item) {
    if (batch.stage != 1) return;
    mixed_steps |= item.step != batch.items[0].step;
    mixed_chunks |= item.chunk != batch.items[0].chunk;
  })) {
  }
  REQUIRE(mixed_steps && mixed_chunks);
}

// Two stages on one device: "a" has many ready, "b" few.
void the_fullest_batch_goes_first_but_nobody_waits_for_ever() {
  SchedulerConfig config = chain(8);
  config.overlap = Overlap::kOff;
  for (const Nanoseconds max_wait : {Nanoseconds{1'000'000'000}, Nanoseconds{50}}) {
    config.max_wait = max_wait;
    Scheduler scheduler(config);
    const Commands* commands = &scheduler.submit(jobs(3, 3, 2), 0);
    REQUIRE(commands->start.size() == 1 && scheduler.batch(commands->start[0]).items.size() == 3);
    const BatchId first = commands->start[0];
    commands = &scheduler.submit(std::vector<Job>{{10, 9, 2}}, 10);  // one for the policy, while three are on their way
    REQUIRE(commands->start.empty());
    commands = &scheduler.complete(first, {}, 100);
    const Batch& next = scheduler.batch(commands->start.at(0));
    REQUIRE(next.stage == (max_wait == 50 ? 0u : 1u));
    REQUIRE(next.items.size() == (max_wait == 50 ? 1u : 3u));
  }
}

void an_idle_device_lingers_only_where_more_may_come() {
  SchedulerConfig config = chain(4, 2);
  for (std::size_t s = 0; s < 3; ++s) config.stages[s].devices = {0};
  config.stages[3].devices = {1};
  config.stages[3].buckets = {4};
  config.overlap = Overlap::kOff;
  config.linger = 1000;
  config.stages[2].buckets = {1};
  Scheduler scheduler(config);
  std::vector<BatchId> running;
  const auto take = [&](const Commands& commands) {
    running.insert(running.end(), commands.start.begin(), commands.start.end());
  };
  take(scheduler.submit(jobs(2, 2, 1), 0));
  Nanoseconds now = 0;
  while (scheduler.batch(running.back()).stage < 2) {
    const BatchId id = running.back();
    running.pop_back();
    take(scheduler.complete(id, {}, now += 10));
  }
  const Commands& waits = scheduler.complete(running[0], {}, 100);  // the first is decoded; the second now is
  REQUIRE(waits.start.size() == 1 && scheduler.batch(waits.start[0]).stage == 2 && waits.wake == 1100);
  const BatchId second = waits.start[0];
  const Commands& both = scheduler.complete(second, {}, 200);  // nothing runs any more: no use in waiting
  REQUIRE(both.start.size() == 1 && scheduler.batch(both.start[0]).stage == 3 &&
          scheduler.batch(both.start[0]).items.size() == 2);
}

void results_that_nobody_takes_hold_back_new_rollouts() {
  SchedulerConfig config = chain(2);
  config.unread = 3;
  Toy toy = toy_of(config, 1);
  Drive drive(config, toy, 1);
  drive.submit(jobs(40, 8, 3));
  drive.run();
  REQUIRE(drive.ended.size() >= 3 && drive.ended.size() <= 3 + 2);  // those in flight still come in
  drive.take(drive.scheduler.taken(100, 0));
  drive.run();
  REQUIRE(drive.ended.size() > 5);
}

void speculation_is_off_where_it_does_not_pay() {
  // One device, always busy with certain work: nothing may be wasted. Alone on two devices: the judge's time is free.
  SchedulerConfig busy = chain(16);
  for (Stage& stage : busy.stages) stage.buckets = {1, 2, 3, 4, 5, 6, 7, 8};
  Toy toy = toy_of(busy, 2);
  Drive drive(busy, toy, 2);
  drive.submit(jobs(64, 8, 9));
  drive.run();
  std::uint64_t wasted = 0, items = 0;
  for (const auto& stage : drive.scheduler.statistics().stages) {
    wasted += stage[0].wasted;
    items += stage[0].items;
  }
  REQUIRE(wasted * 100 <= items);
  SchedulerConfig split = chain(1, 2);
  for (std::size_t s = 0; s < 3; ++s) split.stages[s].devices = {0};
  split.stages[3].devices = {1};
  Toy other = toy_of(split, 2);
  Drive free(split, other, 2);
  free.submit(jobs(64, 8, 9));
  free.run();
  REQUIRE(free.scheduler.statistics().confirmed > 64);
}

void what_cannot_be_scheduled_is_refused() {
  const auto message = [](const SchedulerConfig& config) -> std::string {
    try {
      Scheduler{config};
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  REQUIRE(message(chain(1)).empty());
  SchedulerConfig config = chain(0);
  REQUIRE(message(config).find("slots") != std::string::npos);
  config = chain(1);
  config.stages[1].buckets = {4, 2};
  REQUIRE(message(config).find("denoise") != std::string::npos);
  config.stages[1].buckets = {};
  REQUIRE(message(config).find("denoise") != std::string::npos);
  config = chain(1);
  config.stages[2].devices = {1};
  REQUIRE(message(config).find("decode") != std::string::npos);
  config = chain(1);
  config.stages[0].cost = {{}, {}};
  REQUIRE(message(config).find("policy") != std::string::npos);
  config.stages.resize(1);
  REQUIRE(!message(config).empty());
  config.stages.clear();
  REQUIRE(!message(config).empty());
  Scheduler scheduler(chain(1));
  scheduler.submit(jobs(2, 2, 1), 0);
  for (const Job& job : {Job{0, 5, 1}, Job{9, 0, 1}, Job{9, 9, 0}}) {
    bool refused = false;
    try {
      scheduler.submit(std::vector<Job>{job}, 0);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    REQUIRE(refused);
  }
  REQUIRE(scheduler.waiting() == 1 && scheduler.live() == 1);
}

void costs_are_fitted() {
  CostModel model({0.5, 0.1});
  REQUIRE(model.fit().seconds(4) == 0.9);
  for (int i = 0; i < 5; ++i) model.observe(4, 1.8);
  REQUIRE(std::abs(model.fit().fixed - 1.0) < 1e-9 &&
          std::abs(model.fit().per_item - 0.2) < 1e-9);  // the prior, scaled
  for (int i = 0; i < 1200; ++i) model.observe(i % 2 ? 1 : 8, i % 2 ? 3.0 : 10.0);
  REQUIRE(std::abs(model.fit().fixed - 2.0) < 1e-3 && std::abs(model.fit().per_item - 1.0) < 1e-3);
  for (int i = 0; i < 2000; ++i) model.observe(i % 2 ? 1 : 8, i % 2 ? 3.0 : 1.0);  // larger is not cheaper
  REQUIRE(model.fit().per_item >= 0.0 && model.fit().fixed >= 0.0);
}

void slots_are_taken_where_most_are_free() {
  Slots slots({0, 2}, 3, 2);
  const std::uint32_t a = slots.take(), b = slots.take(), c = slots.take();
  REQUIRE(slots.home(a) == 0 && slots.home(b) == 2 && slots.home(c) == 0 && slots.free() == 1);
  slots.release(c);
  slots.release(a);
  REQUIRE(slots.home(slots.take()) == 0 && slots.free() == 2 && slots.count() == 4);
}

}  // namespace

int main() {
  return test::run({
      {"any schedule gives the rollouts of a plain loop", any_schedule_gives_the_rollouts_of_a_plain_loop},
      {"what it decides depends on no time before the rollouts",
       what_it_decides_depends_on_no_time_before_the_rollouts},
      {"groups come whole and with their spread", groups_come_whole_and_with_their_spread},
      {"failures are retried alone, then told with their key", failures_are_retried_alone_and_then_told_with_their_key},
      {"the cancelled go and the others do not notice", the_cancelled_go_and_the_others_do_not_notice},
      {"lock step goes together to the limit", lock_step_goes_together_to_the_limit},
      {"batches hold different steps and chunks", batches_hold_different_steps_and_chunks},
      {"the fullest batch goes first, but nobody waits for ever",
       the_fullest_batch_goes_first_but_nobody_waits_for_ever},
      {"an idle device lingers only where more may come", an_idle_device_lingers_only_where_more_may_come},
      {"results that nobody takes hold back new rollouts", results_that_nobody_takes_hold_back_new_rollouts},
      {"speculation is off where it does not pay", speculation_is_off_where_it_does_not_pay},
      {"what cannot be scheduled is refused", what_cannot_be_scheduled_is_refused},
      {"costs are fitted", costs_are_fitted},
      {"slots are taken where most are free", slots_are_taken_where_most_are_free},
  });
}
