// The rollout scheduler: one deterministic state machine. An event comes in with its time, commands come out; it knows
// no thread and no clock, so the threaded runner (runner.hpp) and the planner (virtual_clock.hpp) drive the same code.
//
// A chunk of a rollout passes the stages in order, each `steps` times; the last stage judges it: ended, or on to the
// next chunk. A rollout is at one place (its front), and at one more while a chunk of it is judged: then its front may
// already work on the next chunk. That work is speculative until the verdict, and dropped if the rollout has ended.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <limits>
#include <queue>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cost_model.hpp"
#include "slots.hpp"

namespace worldenv {

using Nanoseconds = std::int64_t;  // of the clock that the caller keeps
inline constexpr Nanoseconds kNever = std::numeric_limits<Nanoseconds>::max();
inline constexpr std::uint32_t kMaxStages = 8;

struct Stage {
  std::string name;
  std::uint32_t steps = 1;             // visits per chunk: denoising steps, 1 elsewhere
  std::vector<std::uint32_t> buckets;  // shapes of a batch, ascending; fewer items are padded to the next shape
  std::vector<std::uint32_t> devices;  // where it is placed, ascending
  std::vector<Affine> cost;            // prior, one per entry of `devices`; empty: the largest batch is the best
};

enum class Overlap {
  kOff,    // the next chunk starts after the verdict
  kAuto,   // speculate in places that are free anyway, and where the measured times say that it pays
  kAlways  // speculate wherever nothing certain is lost by it at once
};

enum class Discipline {
  kContinuous,
  kLockStep  // the baseline: all slots together, stage by stage, to the last chunk, whatever the verdicts
};

struct SchedulerConfig {
  std::vector<Stage> stages;  // in the order of a chunk; at least two, the last one judges
  std::uint32_t devices = 1;
  std::uint32_t slots = 1;    // rollouts in flight per home device; homes are the first stage's devices
  std::uint32_t streams = 1;  // batches that may run on one device at once
  Overlap overlap = Overlap::kAuto;
  Discipline discipline = Discipline::kContinuous;
  Nanoseconds linger = 0;                // how long an idle device waits for a batch to fill, where more may come
  Nanoseconds max_wait = 1'000'000'000;  // work that waited this long goes before larger batches
  std::uint32_t attempts = 3;            // runs of a failing item alone before its rollout is given up
  std::uint32_t unread = 0;  // rollouts whose ending nobody has taken, above which none is started; 0: no limit
};

struct Job {
  std::uint32_t rollout;  // its number in the run, as in its noise key
  std::uint32_t group;    // rollouts of one group share a context
  std::uint32_t chunks;   // limit
};

struct Item {
  std::uint32_t slot, rollout, chunk, step;
  bool speculative;  // when the batch was started
};

using BatchId = std::uint32_t;

struct Batch {
  BatchId id = 0;
  std::uint32_t stage = 0, device = 0;
  std::uint32_t shape = 0;  // bucket: items.size() of it are used
  Nanoseconds started = 0;
  std::vector<Item> items;
};

struct Verdict {
  bool ended = false;
  double value = 0.0;  // the return, should the rollout end here
};

enum class Why { kStopped, kLimit, kFailed, kCancelled };

struct Ending {
  std::uint32_t rollout, group;
  std::uint32_t chunks;  // that count: up to the verdict that ended it
  Why why;
  double value;         // of the last verdict that counts
  std::string message;  // kFailed: stage, chunk, and what the executor said
};

// A group is told when all its rollouts have ended, not before: early endings are the short ones.
struct GroupEnding {
  std::uint32_t group;
  std::uint32_t rollouts, failed, cancelled;
  double mean, low, high;  // of the values of those that ended; 0 where none did
};

// What an event asks for. Valid until the next event.
struct Commands {
  std::vector<BatchId> start;
  std::vector<Ending> endings;
  std::vector<GroupEnding> groups;
  Nanoseconds wake = kNever;  // call `wake` then
};

struct StageStatistics {  // of one stage on one device
  std::uint64_t batches = 0, items = 0, padding = 0, speculative = 0, wasted = 0, failures = 0;
  Nanoseconds busy = 0, wasted_time = 0, queued = 0;  // wasted_time: the dropped items' share of their batches
};

struct Statistics {
  std::vector<std::vector<StageStatistics>> stages;  // [stage][device]
  std::uint64_t events = 0, verdicts = 0, stops = 0, endings = 0, failed = 0, cancelled = 0, groups = 0;
  std::uint64_t confirmed = 0, dropped = 0;  // chunks that were begun before the verdict
  std::uint64_t dead_chunks = 0;             // lock step: chunks after the end
};

class Scheduler {
 public:
  explicit Scheduler(SchedulerConfig config);  // std::invalid_argument says what is wrong and what is wanted

  // Rollouts of one group are submitted together. invalid_argument: a number or group that is in flight, no chunks.
  const Commands& submit(std::span<const Job> jobs, Nanoseconds now);
  // The batch has run; the judging stage gives one verdict per item, the others none.
  const Commands& complete(BatchId batch, std::span<const Verdict> verdicts, Nanoseconds now);
  // The batch threw: its items are run again, each alone, so that one bad rollout takes no other with it.
  const Commands& fail(BatchId batch, std::string_view message, Nanoseconds now);
  // Gives a rollout up; nothing happens where it has ended or was never there.
  const Commands& cancel(std::uint32_t rollout, Nanoseconds now);
  // The consumer has taken the endings of `count` rollouts.
  const Commands& taken(std::uint32_t count, Nanoseconds now);
  const Commands& wake(Nanoseconds now);

  const Batch& batch(BatchId id) const { return batches_[id]; }  // stays where it is; its own until it is completed
  const SchedulerConfig& config() const { return config_; }
  const Statistics& statistics() const { return statistics_; }
  std::size_t waiting() const { return waiting_.size(); }
  std::uint32_t live() const { return live_; }
  bool idle() const { return live_ == 0 && waiting_.empty(); }
  double stop_rate() const;  // expected of the next verdict
  Affine cost(std::uint32_t stage, std::uint32_t device) const { return queue(stage, device).cost.fit(); }

 private:
  struct Position {
    std::uint32_t chunk = 0, stage = 0, step = 0;
    bool operator==(const Position&) const = default;
  };
  enum class State : std::uint8_t { kIdle, kQueued, kRunning, kParked };  // kParked: until the verdict
  enum class Track : std::uint8_t { kCertain, kSpeculative, kAlone };
  struct Line {
    Position at{};
    State state = State::kIdle;
    Track track = Track::kCertain;  // where it is queued
    bool alone = false;             // has failed in company
    std::uint32_t ticket = 0;       // an entry with another ticket is stale
    std::uint32_t attempts = 0;
    Nanoseconds since = 0;
  };
  enum Lane : std::uint32_t { kFront, kJudge };
  struct Rollout {  // of one slot
    Job job{};
    bool live = false, leaving = false, ended = false;  // leaving: as soon as nothing of it runs; ended: lock step
    std::array<Line, 2> line;
    std::array<std::uint32_t, kMaxStages> route{};  // device by stage
    std::uint32_t judged = 0;                       // chunks with a verdict
  };
  struct Account {  // of one slot; apart from what every step of a rollout touches
    std::vector<std::pair<std::uint32_t, Nanoseconds>> spent;  // on speculation since the last verdict: stage, time
    Ending ending{};
  };
  struct Entry {
    std::uint32_t slot, ticket;
  };
  struct Fifo {
    std::vector<Entry> entries;
    std::size_t head = 0;
    std::uint32_t live = 0;  // entries that are not stale
    void push(Entry entry);
  };
  struct Queue {  // of one stage on one device
    std::array<Fifo, 3> tracks;
    CostModel cost;
    double best = 0.0;         // seconds per item in the largest batch
    std::uint32_t routed = 0;  // live rollouts
    bool busy = false;         // one batch at a time: an executor is not entered twice
    Fifo& track(Track which) { return tracks[static_cast<std::size_t>(which)]; }
  };
  struct Device {
    std::vector<std::uint32_t> stages;
    std::uint32_t running = 0, component = 0;
    std::uint32_t phase_left = 0;  // lock step: rollouts here that have not begun the phase
    bool touched = false;
    double certain = 0.0, span = 0.0;  // decayed: seconds of work that was needed, seconds that passed
    Nanoseconds last = 0;
  };
  struct Group {
    std::uint32_t size = 0, done = 0, failed = 0, cancelled = 0;
    double sum = 0.0, low = 0.0, high = 0.0;
  };
  struct Choice {
    std::uint32_t stage = 0, shape = 0, count = 0;
    Track track = Track::kCertain;
  };

  Queue& queue(std::uint32_t stage, std::uint32_t device) { return queues_[stage * config_.devices + device]; }
  const Queue& queue(std::uint32_t stage, std::uint32_t device) const {
    return queues_[stage * config_.devices + device];
  }
  std::uint32_t judge() const { return static_cast<std::uint32_t>(config_.stages.size()) - 1; }
  Lane lane(std::uint32_t stage) const { return stage == judge() ? kJudge : kFront; }
  StageStatistics& count(std::uint32_t stage, std::uint32_t device) { return statistics_.stages[stage][device]; }

  void begin(Nanoseconds now);
  const Commands& finish();
  void touch(std::uint32_t device);
  void admit();
  void enqueue(std::uint32_t slot, Lane lane);
  void unqueue(std::uint32_t slot, Lane lane);
  void advance(std::uint32_t slot);
  void hand_to_judge(std::uint32_t slot);
  void judged(std::uint32_t slot, Verdict verdict);
  void leave(std::uint32_t slot, Why why);
  void drop_speculation(Rollout& rollout);
  void waste(const Rollout& rollout, std::uint32_t stage, Nanoseconds share);
  void release(std::uint32_t slot);
  void report(Ending ending);
  const Entry* front(Fifo& fifo, Lane lane);
  std::pair<std::uint32_t, double> shape(std::uint32_t stage, std::uint32_t device, std::uint32_t count) const;
  bool pays(std::uint32_t device, double cost, bool idle) const;
  bool choose(std::uint32_t device, Choice& choice);
  void start(std::uint32_t device, const Choice& choice);
  void open_phase();
  void join_phase(std::uint32_t device, int change);
  void close(Batch& batch, bool failed);

  SchedulerConfig config_;
  Slots slots_;
  std::vector<Rollout> rollouts_;  // by slot
  std::vector<Account> accounts_;  // by slot
  std::vector<Queue> queues_;
  std::vector<Device> devices_;
  std::vector<std::uint32_t> component_running_;  // batches that run on devices which share rollouts
  std::deque<Batch> batches_;                     // a deque, so that a worker may read one while others are added
  std::vector<BatchId> free_batches_;
  std::deque<Job> waiting_;
  std::unordered_map<std::uint32_t, std::uint32_t> where_;  // rollout -> slot, or kWaiting
  std::unordered_map<std::uint32_t, Group> groups_;
  std::vector<std::uint32_t> touched_;
  std::priority_queue<std::pair<Nanoseconds, std::uint32_t>, std::vector<std::pair<Nanoseconds, std::uint32_t>>,
                      std::greater<>>
      wakes_;
  Commands commands_;
  Statistics statistics_;
  Nanoseconds now_ = 0;
  double verdict_wait_ = 0.0;  // decayed mean: seconds from the last frame of a chunk to its verdict
  std::uint32_t live_ = 0, running_ = 0, unread_ = 0;
  bool admitting_ = false;
  Position phase_;                // lock step: what all are at
  std::uint32_t phase_left_ = 0;  // and how many of them have not begun it, on all devices
};

}  // namespace worldenv
