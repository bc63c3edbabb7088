#include "scheduler.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace worldenv {
namespace {

constexpr std::uint32_t kWaiting = std::numeric_limits<std::uint32_t>::max();
constexpr double kDecay = 63.0 / 64.0;  // what is measured of a device is a mean over some 64 batches
constexpr double kRanks = 32.0;         // two batches whose use of the device differs by less than 1/32 go by age

// A prior on the stop rate, worth 16 verdicts: a rollout of about 16 chunks.
constexpr double kStopsSeen = 1.0, kVerdictsSeen = 16.0;

double seconds(Nanoseconds time) { return static_cast<double>(time) * 1e-9; }

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("scheduler: " + what); }

bool ascends(const std::vector<std::uint32_t>& values) {
  return std::adjacent_find(values.begin(), values.end(), std::greater_equal<>()) == values.end();
}

SchedulerConfig checked(SchedulerConfig config) {
  const auto count = config.stages.size();
  if (count < 2 || count > kMaxStages) {
    refuse(std::to_string(count) + " stages: want 2 to " + std::to_string(kMaxStages) + ", the last one judges");
  }
  if (config.devices < 1 || config.slots < 1 || config.streams < 1 || config.attempts < 1) {
    refuse("devices, slots, streams and attempts: want at least 1 of each");
  }
  if (config.linger < 0 || config.max_wait < 0) refuse("linger and max_wait: want times of 0 or more");
  for (const Stage& stage : config.stages) {
    if (stage.steps < 1) refuse("stage " + stage.name + ": want at least 1 step");
    if (stage.buckets.empty() || stage.buckets.front() < 1 || !ascends(stage.buckets)) {
      refuse("stage " + stage.name + ": want bucket sizes of 1 or more, ascending");
    }
    if (stage.devices.empty() || stage.devices.back() >= config.devices || !ascends(stage.devices)) {
      refuse("stage " + stage.name + ": want devices below " + std::to_string(config.devices) + ", ascending");
    }
    if (!stage.cost.empty() && stage.cost.size() != stage.devices.size()) {
      refuse("stage " + stage.name + ": want one cost per device, or none");
    }
    for (const Affine& cost : stage.cost) {
      if (!cost.possible()) refuse("stage " + stage.name + ": want costs of 0 seconds or more");
    }
  }
  if (config.stages.back().steps != 1) refuse("stage " + config.stages.back().name + " judges: want 1 step");
  return config;
}

}  // namespace

void Scheduler::Fifo::push(Entry entry) {
  if (head == entries.size()) {
    entries.clear();
    head = 0;
  } else if (head > 1024 && head > entries.size() / 2) {
    entries.erase(entries.begin(), entries.begin() + static_cast<std::ptrdiff_t>(head));
    head = 0;
  }
  entries.push_back(entry);
  ++live;
}

Scheduler::Scheduler(SchedulerConfig config)
    : config_(checked(std::move(config))), slots_(config_.stages[0].devices, config_.devices, config_.slots) {
  rollouts_.resize(slots_.count());
  accounts_.resize(slots_.count());
  devices_.resize(config_.devices);
  queues_.resize(config_.stages.size() * config_.devices);
  statistics_.stages.assign(config_.stages.size(), std::vector<StageStatistics>(config_.devices));
  for (std::uint32_t s = 0; s < config_.stages.size(); ++s) {
    const Stage& stage = config_.stages[s];
    for (std::size_t i = 0; i < stage.devices.size(); ++i) {
      Queue& here = queue(s, stage.devices[i]);
      here.cost = CostModel(stage.cost.empty() ? Affine{} : stage.cost[i]);
      here.best = here.cost.fit().seconds(stage.buckets.back()) / stage.buckets.back();
      devices_[stage.devices[i]].stages.push_back(s);
    }
  }
  // Devices between which a rollout may pass are one component: while none of it runs, nothing can arrive there.
  std::vector<std::uint32_t> root(config_.devices);
  std::iota(root.begin(), root.end(), 0);
  const auto find = [&root](std::uint32_t d) {
    while (root[d] != d) d = root[d] = root[root[d]];
    return d;
  };
  for (const Stage& stage : config_.stages) {
    std::uint32_t elsewhere = kWaiting;  // the devices of homes that lack this stage, and the stage's own, are joined
    for (const std::uint32_t home : config_.stages[0].devices) {
      if (std::binary_search(stage.devices.begin(), stage.devices.end(), home)) continue;
      if (elsewhere == kWaiting) {
        elsewhere = find(stage.devices[0]);
        for (const std::uint32_t d : stage.devices) root[find(d)] = find(elsewhere);
      }
      root[find(home)] = find(elsewhere);
    }
  }
  for (std::uint32_t d = 0; d < config_.devices; ++d) devices_[d].component = find(d);
  component_running_.resize(config_.devices);
}

// events

void Scheduler::begin(Nanoseconds now) {
  commands_.start.clear();
  commands_.endings.clear();
  commands_.groups.clear();
  now_ = std::max(now_, now);  // workers take the time before they take the lock
  ++statistics_.events;
}

const Commands& Scheduler::finish() {
  if (admitting_) admit();
  for (; !wakes_.empty() && wakes_.top().first <= now_; wakes_.pop()) touch(wakes_.top().second);
  if (config_.discipline == Discipline::kLockStep) open_phase();
  for (const std::uint32_t device : touched_) {
    devices_[device].touched = false;
    Choice choice;
    while (devices_[device].running < config_.streams && choose(device, choice)) start(device, choice);
  }
  touched_.clear();
  commands_.wake = wakes_.empty() ? kNever : wakes_.top().first;
  return commands_;
}

const Commands& Scheduler::submit(std::span<const Job> jobs, Nanoseconds now) {
  std::unordered_map<std::uint32_t, std::uint32_t> sizes, numbers;
  for (const Job& job : jobs) {
    if (job.chunks < 1) refuse("rollout " + std::to_string(job.rollout) + ": want a limit of at least 1 chunk");
    if (where_.contains(job.rollout) || numbers[job.rollout]++ > 0) {
      refuse("rollout " + std::to_string(job.rollout) + " is in flight; want each number once");
    }
    if (groups_.contains(job.group)) {
      refuse("group " + std::to_string(job.group) + " is in flight; submit its rollouts together");
    }
    ++sizes[job.group];
  }
  begin(now);
  if (idle()) {  // the time before is no device's: a clock counts from anywhere, and rollouts may have been long away
    for (Device& device : devices_) device.last = now_;
  }
  for (const auto& [group, size] : sizes) groups_[group].size = size;
  for (const Job& job : jobs) {
    where_[job.rollout] = kWaiting;
    waiting_.push_back(job);
  }
  admitting_ = true;
  return finish();
}

const Commands& Scheduler::complete(BatchId id, std::span<const Verdict> verdicts, Nanoseconds now) {
  Batch& batch = batches_[id];
  const bool judges = batch.stage == judge();
  if (judges && verdicts.size() != batch.items.size()) {
    return fail(
        id, std::to_string(verdicts.size()) + " verdicts for " + std::to_string(batch.items.size()) + " rollouts", now);
  }
  begin(now);
  const Nanoseconds taken = now_ - batch.started, share = taken / batch.shape;
  StageStatistics& stage = count(batch.stage, batch.device);
  stage.busy += taken;
  Queue& here = queue(batch.stage, batch.device);
  here.cost.observe(batch.shape, seconds(taken));
  const std::uint32_t largest = config_.stages[batch.stage].buckets.back();
  here.best = here.cost.fit().seconds(largest) / largest;
  std::uint32_t needed = 0;
  for (const Item& item : batch.items) {
    const Rollout& rollout = rollouts_[item.slot];
    needed += !rollout.leaving && item.chunk <= rollout.judged;
  }
  devices_[batch.device].certain += seconds(taken) * needed / batch.shape;
  close(batch, false);
  for (std::size_t i = 0; i < batch.items.size(); ++i) {
    const Item& item = batch.items[i];
    Rollout& rollout = rollouts_[item.slot];
    Line& line = rollout.line[lane(batch.stage)];
    line.state = State::kIdle;
    line.attempts = 0;
    line.alone = false;
    if (rollout.leaving) {
      if (item.speculative) waste(rollout, batch.stage, share);
      release(item.slot);
    } else if (judges) {
      judged(item.slot, verdicts[i]);
    } else {
      if (item.chunk > rollout.judged) accounts_[item.slot].spent.emplace_back(batch.stage, share);
      advance(item.slot);
    }
  }
  return finish();
}

const Commands& Scheduler::fail(BatchId id, std::string_view message, Nanoseconds now) {
  begin(now);
  Batch& batch = batches_[id];
  ++count(batch.stage, batch.device).failures;
  close(batch, true);
  for (const Item& item : batch.items) {
    Rollout& rollout = rollouts_[item.slot];
    const Lane at = lane(batch.stage);
    Line& line = rollout.line[at];
    line.state = State::kIdle;
    line.alone = true;
    if (rollout.leaving) {
      release(item.slot);
    } else if (item.chunk > rollout.judged) {
      line.state = State::kParked;  // perhaps nobody will ask for it
      line.attempts = 0;
    } else if (batch.items.size() == 1 && ++line.attempts >= config_.attempts) {
      accounts_[item.slot].ending.message =
          "stage " + config_.stages[batch.stage].name + ", chunk " + std::to_string(item.chunk) +
          (config_.stages[batch.stage].steps > 1 ? ", step " + std::to_string(item.step) : "") + ": " +
          std::string(message);
      leave(item.slot, Why::kFailed);
    } else {
      if (config_.discipline == Discipline::kLockStep) join_phase(batch.device, 1);
      enqueue(item.slot, at);
    }
  }
  return finish();
}

const Commands& Scheduler::cancel(std::uint32_t number, Nanoseconds now) {
  begin(now);
  const auto found = where_.find(number);
  if (found == where_.end()) return finish();
  if (found->second == kWaiting) {
    const auto job =
        std::find_if(waiting_.begin(), waiting_.end(), [&](const Job& one) { return one.rollout == number; });
    const Ending ending{number, job->group, 0, Why::kCancelled, 0.0, {}};
    waiting_.erase(job);
    where_.erase(found);
    report(ending);
  } else if (!rollouts_[found->second].leaving) {
    leave(found->second, Why::kCancelled);
  }
  return finish();
}

const Commands& Scheduler::taken(std::uint32_t count, Nanoseconds now) {
  begin(now);
  unread_ -= std::min(unread_, count);
  admitting_ = true;
  return finish();
}

const Commands& Scheduler::wake(Nanoseconds now) {
  begin(now);
  return finish();
}

// rollouts

void Scheduler::touch(std::uint32_t device) {
  if (std::exchange(devices_[device].touched, true)) return;
  touched_.push_back(device);
}

void Scheduler::admit() {
  admitting_ = false;
  if (config_.discipline == Discipline::kLockStep && live_ > 0) return;
  while (!waiting_.empty() && slots_.free() > 0 && (config_.unread == 0 || unread_ < config_.unread)) {
    const std::uint32_t slot = slots_.take();
    Rollout& rollout = rollouts_[slot];
    rollout.job = waiting_.front();
    waiting_.pop_front();
    rollout.live = true;
    rollout.leaving = rollout.ended = false;
    rollout.judged = 0;
    accounts_[slot].spent.clear();
    accounts_[slot].ending = {rollout.job.rollout, rollout.job.group, 0, Why::kLimit, 0.0, {}};
    for (std::uint32_t s = 0; s < config_.stages.size(); ++s) {
      const std::vector<std::uint32_t>& at = config_.stages[s].devices;
      std::uint32_t device = slots_.home(slot);
      for (std::uint32_t before = 0; before < s && !std::binary_search(at.begin(), at.end(), device); ++before) {
        device = rollout.route[before];
      }
      if (!std::binary_search(at.begin(), at.end(), device)) {
        device = *std::min_element(at.begin(), at.end(), [&](std::uint32_t a, std::uint32_t b) {
          return queue(s, a).routed < queue(s, b).routed;
        });
      }
      rollout.route[s] = device;
      ++queue(s, device).routed;
    }
    where_[rollout.job.rollout] = slot;
    ++live_;
    for (Line& line : rollout.line) {
      line.alone = false;
      line.attempts = 0;
    }
    rollout.line[kFront].at = {};
    enqueue(slot, kFront);
  }
}

void Scheduler::enqueue(std::uint32_t slot, Lane at) {
  Rollout& rollout = rollouts_[slot];
  Line& line = rollout.line[at];
  line.state = State::kQueued;
  line.since = now_;
  line.track = line.alone ? Track::kAlone : line.at.chunk > rollout.judged ? Track::kSpeculative : Track::kCertain;
  const std::uint32_t device = rollout.route[line.at.stage];
  queue(line.at.stage, device).track(line.track).push({slot, ++line.ticket});
  touch(device);
}

void Scheduler::unqueue(std::uint32_t slot, Lane at) {
  Rollout& rollout = rollouts_[slot];
  Line& line = rollout.line[at];
  --queue(line.at.stage, rollout.route[line.at.stage]).track(line.track).live;
  line.state = State::kIdle;
  ++line.ticket;
}

void Scheduler::advance(std::uint32_t slot) {
  Rollout& rollout = rollouts_[slot];
  Line& line = rollout.line[kFront];
  if (++line.at.step < config_.stages[line.at.stage].steps) {
    enqueue(slot, kFront);
    return;
  }
  line.at.step = 0;
  if (++line.at.stage < judge()) {
    enqueue(slot, kFront);
  } else if (line.at.chunk == rollout.judged) {
    hand_to_judge(slot);
  } else {
    line.state = State::kParked;  // a chunk is judged after the one before it
  }
}

void Scheduler::hand_to_judge(std::uint32_t slot) {
  Rollout& rollout = rollouts_[slot];
  Line& line = rollout.line[kFront];
  rollout.line[kJudge].at = line.at;
  enqueue(slot, kJudge);
  line.at = {line.at.chunk + 1, 0, 0};
  line.state = State::kIdle;
  const bool speculates = config_.overlap != Overlap::kOff && config_.discipline == Discipline::kContinuous;
  if (speculates && line.at.chunk < rollout.job.chunks) enqueue(slot, kFront);
}

void Scheduler::judged(std::uint32_t slot, Verdict verdict) {
  Rollout& rollout = rollouts_[slot];
  Account& account = accounts_[slot];
  Line& line = rollout.line[kFront];
  const double seen = static_cast<double>(std::min<std::uint64_t>(statistics_.verdicts + 1, 64));
  verdict_wait_ += (seconds(now_ - rollout.line[kJudge].since) - verdict_wait_) / seen;
  ++rollout.judged;
  statistics_.dead_chunks += rollout.ended;
  if (!rollout.ended) {
    ++statistics_.verdicts;
    statistics_.stops += verdict.ended;
    account.ending.chunks = rollout.judged;
    account.ending.value = verdict.value;
    rollout.ended = verdict.ended;
  }
  const bool at_limit = rollout.judged == rollout.job.chunks;
  const bool begun = !account.spent.empty() || line.state == State::kRunning;
  if (at_limit || (rollout.ended && config_.discipline == Discipline::kContinuous)) {
    statistics_.dropped += begun;
    leave(slot, rollout.ended ? Why::kStopped : Why::kLimit);
    return;
  }
  statistics_.confirmed += begun;
  account.spent.clear();
  if (line.state == State::kQueued) {
    unqueue(slot, kFront);
    enqueue(slot, kFront);
  } else if (line.state == State::kParked && line.at.stage == judge()) {
    hand_to_judge(slot);
  } else if (line.state != State::kRunning) {
    enqueue(slot, kFront);
  }
}

void Scheduler::leave(std::uint32_t slot, Why why) {
  Rollout& rollout = rollouts_[slot];
  Account& account = accounts_[slot];
  rollout.leaving = true;
  account.ending.why = why;
  for (const auto& [stage, share] : account.spent) waste(rollout, stage, share);
  account.spent.clear();
  for (const Lane at : {kFront, kJudge}) {
    if (rollout.line[at].state != State::kQueued) continue;
    if (phase_left_ > 0 && rollout.line[at].at == phase_) join_phase(rollout.route[phase_.stage], -1);
    unqueue(slot, at);
  }
  release(slot);
}

void Scheduler::waste(const Rollout& rollout, std::uint32_t stage, Nanoseconds share) {
  StageStatistics& wasted = count(stage, rollout.route[stage]);
  ++wasted.wasted;
  wasted.wasted_time += share;
}

// Frees the slot of a rollout that has left, once none of its work runs: its memory may be written until then.
void Scheduler::release(std::uint32_t slot) {
  Rollout& rollout = rollouts_[slot];
  for (const Line& line : rollout.line) {
    if (line.state == State::kRunning) return;
  }
  for (Line& line : rollout.line) line.state = State::kIdle;
  for (std::uint32_t s = 0; s < config_.stages.size(); ++s) --queue(s, rollout.route[s]).routed;
  where_.erase(rollout.job.rollout);
  rollout.live = false;
  --live_;
  slots_.release(slot);
  report(std::move(accounts_[slot].ending));
  admitting_ = true;
}

void Scheduler::report(Ending ending) {
  const auto found = groups_.find(ending.group);
  Group& group = found->second;
  if (ending.why == Why::kFailed) {
    ++group.failed;
  } else if (ending.why == Why::kCancelled) {
    ++group.cancelled;
  } else {
    const bool first = group.done == group.failed + group.cancelled;
    group.low = first ? ending.value : std::min(group.low, ending.value);
    group.high = first ? ending.value : std::max(group.high, ending.value);
    group.sum += ending.value;
  }
  ++group.done;
  ++statistics_.endings;
  statistics_.failed += ending.why == Why::kFailed;
  statistics_.cancelled += ending.why == Why::kCancelled;
  ++unread_;
  commands_.endings.push_back(std::move(ending));
  if (group.done < group.size) return;
  const std::uint32_t ended = group.size - group.failed - group.cancelled;
  commands_.groups.push_back({found->first, group.size, group.failed, group.cancelled, ended ? group.sum / ended : 0.0,
                              group.low, group.high});
  groups_.erase(found);
  ++statistics_.groups;
}

// batches

// The oldest entry that is not stale; null where there is none.
const Scheduler::Entry* Scheduler::front(Fifo& fifo, Lane at) {
  if (fifo.live == 0) {
    fifo.head = fifo.entries.size();
    return nullptr;
  }
  while (rollouts_[fifo.entries[fifo.head].slot].line[at].ticket != fifo.entries[fifo.head].ticket) ++fifo.head;
  return &fifo.entries[fifo.head];
}

// The shape to run `count` items in, and its seconds per item: the largest that they fill or the least that holds them.
std::pair<std::uint32_t, double> Scheduler::shape(std::uint32_t stage, std::uint32_t device,
                                                  std::uint32_t count) const {
  const std::vector<std::uint32_t>& buckets = config_.stages[stage].buckets;
  const Affine cost = queue(stage, device).cost.fit();
  const auto above = std::lower_bound(buckets.begin(), buckets.end(), count);
  std::pair<std::uint32_t, double> best{0, 0.0};
  if (above != buckets.end()) best = {*above, cost.seconds(*above) / count};
  if (above != buckets.begin()) {
    const std::uint32_t filled = *std::prev(above);
    const double each = cost.seconds(filled) / filled;
    if (best.first == 0 || each < best.second) best = {filled, each};
  }
  return best;
}

double Scheduler::stop_rate() const {
  return (static_cast<double>(statistics_.stops) + kStopsSeen) /
         (static_cast<double>(statistics_.verdicts) + kVerdictsSeen);
}

// Whether speculative work that takes `cost` seconds is expected to gain time. With the chance 1 - p the rollout goes
// on, and has been saved its wait: the work, at most the time to a verdict. With the chance p it was for nothing.
// An idle device loses by it only if other work comes while it runs (share u of the time), half of it on average.
// Beside certain work in one batch, the device is needed: there is a gain where it would have been free later on.
bool Scheduler::pays(std::uint32_t device, double cost, bool idle) const {
  if (config_.overlap == Overlap::kAlways) return true;
  const Device& here = devices_[device];
  const double p = stop_rate();
  const double u = here.span > 0.0 ? std::min(1.0, here.certain / (here.span * config_.streams)) : 0.0;
  const double gain = (1.0 - p) * std::min(cost, verdict_wait_);
  return idle ? gain > p * u * cost / 2.0 : (1.0 - u) * gain > p * u * cost;
}

bool Scheduler::choose(std::uint32_t device, Choice& choice) {
  struct {
    bool found = false, overdue = false;
    int rank = 0;
    Nanoseconds since = 0;
  } best;
  const bool lock_step = config_.discipline == Discipline::kLockStep;
  bool lingering = false;
  for (const std::uint32_t stage : devices_[device].stages) {
    Queue& here = queue(stage, device);
    if (here.busy) continue;
    const Lane at = lane(stage);
    if (front(here.track(Track::kAlone), at) != nullptr) {
      choice = {stage, config_.stages[stage].buckets.front(), 1, Track::kAlone};
      return true;
    }
    const Entry* oldest = front(here.track(Track::kCertain), at);
    if (oldest == nullptr) continue;
    const Line& line = rollouts_[oldest->slot].line[at];
    if (lock_step && !(devices_[device].phase_left > 0 && line.at == phase_)) continue;
    const std::uint32_t largest = config_.stages[stage].buckets.back();
    const std::uint32_t live = here.track(Track::kCertain).live;
    const std::uint32_t ready = lock_step ? std::min(live, devices_[device].phase_left) : live;
    const std::uint32_t count = std::min(ready, largest);
    const Nanoseconds age = now_ - line.since;
    if (count < largest && age < config_.linger && component_running_[devices_[device].component] > 0) {
      wakes_.emplace(line.since + config_.linger, device);
      lingering = true;
      continue;
    }
    const auto [fits, each] = shape(stage, device, count);
    const int rank = each > 0.0 ? static_cast<int>(kRanks * here.best / each) : 0;
    const bool overdue = age >= config_.max_wait;
    const bool better = !best.found || (overdue != best.overdue        ? overdue
                                        : overdue || rank == best.rank ? line.since < best.since
                                                                       : rank > best.rank);
    if (!better) continue;
    best = {true, overdue, rank, line.since};
    choice = {stage, fits, count, Track::kCertain};
  }
  if (best.found || lingering) return best.found;
  double each_best = 0.0;
  for (const std::uint32_t stage : devices_[device].stages) {
    Queue& here = queue(stage, device);
    if (here.busy || front(here.track(Track::kSpeculative), lane(stage)) == nullptr) continue;
    const std::uint32_t count = std::min(here.track(Track::kSpeculative).live, config_.stages[stage].buckets.back());
    const auto [fits, each] = shape(stage, device, count);
    const double use = each > 0.0 ? here.best / each : 0.0;
    if (!pays(device, here.cost.fit().seconds(fits), true) || (best.found && use <= each_best)) continue;
    best.found = true;
    each_best = use;
    choice = {stage, fits, count, Track::kSpeculative};
  }
  return best.found;
}

void Scheduler::start(std::uint32_t device, const Choice& choice) {
  if (free_batches_.empty()) {
    free_batches_.push_back(static_cast<BatchId>(batches_.size()));
    batches_.emplace_back();
  }
  Batch& batch = batches_[free_batches_.back()];
  batch.id = free_batches_.back();
  free_batches_.pop_back();
  batch.stage = choice.stage;
  batch.device = device;
  batch.started = now_;
  batch.items.clear();
  Queue& here = queue(choice.stage, device);
  const Lane at = lane(choice.stage);
  std::uint32_t room = choice.shape;
  if (choice.track == Track::kCertain) {  // more than padding, where that pays
    const std::uint32_t all = choice.count + here.track(Track::kSpeculative).live;
    const std::uint32_t wider =
        shape(choice.stage, device, std::min(all, config_.stages[choice.stage].buckets.back())).first;
    if (wider > room && pays(device, here.cost.fit().per_item * (wider - room), false)) room = wider;
  }
  batch.shape = room;
  StageStatistics& stage = count(choice.stage, device);
  const auto take = [&](Track track, std::uint32_t most) {
    Fifo& fifo = here.track(track);
    for (const Entry* entry; most > 0 && (entry = front(fifo, at)) != nullptr; --most) {
      Rollout& rollout = rollouts_[entry->slot];
      Line& line = rollout.line[at];
      const bool speculative = line.at.chunk > rollout.judged;
      batch.items.push_back({entry->slot, rollout.job.rollout, line.at.chunk, line.at.step, speculative});
      line.state = State::kRunning;
      stage.queued += now_ - line.since;
      stage.speculative += speculative;
      ++fifo.head;
      --fifo.live;
    }
  };
  if (choice.track == Track::kAlone) {
    take(Track::kAlone, 1);
  } else {
    if (choice.track == Track::kCertain) take(Track::kCertain, std::min(choice.count, room));
    const auto left = room - static_cast<std::uint32_t>(batch.items.size());
    take(Track::kSpeculative, left);
  }
  if (config_.discipline == Discipline::kLockStep) join_phase(device, -static_cast<int>(batch.items.size()));
  ++stage.batches;
  stage.items += batch.items.size();
  stage.padding += batch.shape - batch.items.size();
  here.busy = true;
  ++devices_[device].running;
  ++component_running_[devices_[device].component];
  ++running_;
  commands_.start.push_back(batch.id);
}

// Lock step: when all live rollouts have come to the same place, the next phase opens for all devices.
void Scheduler::open_phase() {
  if (phase_left_ > 0 || running_ > 0 || live_ == 0) return;
  for (const Rollout& rollout : rollouts_) {
    if (!rollout.live) continue;
    const Line& line = rollout.line[rollout.line[kJudge].state == State::kQueued ? kJudge : kFront];
    phase_ = line.at;
    join_phase(rollout.route[line.at.stage], 1);
    touch(rollout.route[line.at.stage]);
  }
}

void Scheduler::join_phase(std::uint32_t device, int change) {
  devices_[device].phase_left += static_cast<std::uint32_t>(change);
  phase_left_ += static_cast<std::uint32_t>(change);
}

void Scheduler::close(Batch& batch, bool failed) {
  Device& device = devices_[batch.device];
  queue(batch.stage, batch.device).busy = false;
  --device.running;
  --component_running_[device.component];
  --running_;
  if (!failed) {
    device.certain *= kDecay;
    device.span = kDecay * (device.span + seconds(now_ - device.last));
    device.last = now_;
  }
  touch(batch.device);
  free_batches_.push_back(batch.id);
}

}  // namespace worldenv
