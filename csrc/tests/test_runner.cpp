#include <chrono>
#include <thread>

#include "check.hpp"
#include "core/runner.hpp"
#include "toy_world.hpp"

using namespace worldenv;
using worldenv::test::mix;
using worldenv::test::Toy;
using namespace std::chrono_literals;

namespace {

// The toy world on worker threads, each batch after a delay that depends on nothing but chance.
class Slow : public Executor {
 public:
  Slow(Toy& toy, std::uint32_t bad) : toy_(toy), bad_(bad) {}
  void run(const Batch& batch, std::span<Verdict> verdicts) override {
    std::uint64_t dice = 0;
    {
      const std::lock_guard held(toy_.lock);
      dice = chance_ = mix(chance_, 3);
    }
    if (dice % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(dice / 3 % 50));
    for (const Item& item : batch.items) {
      if (item.rollout == bad_ && batch.stage == 1) throw std::runtime_error("bad");
    }
    for (std::size_t i = 0; i < batch.items.size(); ++i) {
      const Verdict verdict = toy_.run(batch, batch.items[i]);
      if (!verdicts.empty()) verdicts[i] = verdict;
    }
  }

 private:
  Toy& toy_;
  std::uint32_t bad_;
  std::uint64_t chance_ = 1;
};

SchedulerConfig chain(std::uint32_t slots, std::uint32_t devices, std::uint32_t streams, Overlap overlap) {
  std::vector<std::uint32_t> all;
  for (std::uint32_t d = 0; d < devices; ++d) all.push_back(d);
  SchedulerConfig config;
  config.stages = {
      {"policy", 1, {1, 4}, all, {}}, {"denoise", 3, {1, 2, 4}, all, {}}, {"reflector", 1, {1, 4}, all, {}}};
  config.devices = devices;
  config.slots = slots;
  config.streams = streams;
  config.overlap = overlap;
  return config;
}

std::vector<Job> jobs(std::uint32_t count, std::uint32_t limit) {
  std::vector<Job> out;
  for (std::uint32_t i = 0; i < count; ++i) out.push_back({i, i / 8, limit});
  return out;
}

constexpr std::uint32_t kNobody = 1000000;

void threads_give_the_rollouts_of_a_plain_loop() {
  std::uint32_t seed = 0;
  for (const std::uint32_t slots : {1, 3, 7}) {
    for (const std::uint32_t devices : {1, 4}) {
      for (const Overlap overlap : {Overlap::kOff, Overlap::kAuto, Overlap::kAlways}) {
        SchedulerConfig config = chain(slots, devices, 1 + ++seed % 3, overlap);
        config.linger = seed % 2 ? 20'000 : 0;
        config.unread = seed % 4 == 0 ? 2 : 0;
        Toy toy{{1, 3, 1}, seed, {}, {}, {}};
        Slow executor(toy, kNobody);
        Runner runner(config, {&executor, &executor, &executor});
        runner.submit(jobs(24, 5));
        std::uint32_t rollouts = 0, groups = 0;
        while (const auto report = runner.next(10s)) {
          groups += std::holds_alternative<GroupEnding>(*report);
          if (!std::holds_alternative<Ending>(*report)) continue;
          const Ending& ending = std::get<Ending>(*report);
          REQUIRE(std::pair(ending.chunks, ending.value) == toy.alone(ending.rollout, 5));
          ++rollouts;
        }
        REQUIRE(rollouts == 24 && groups == 3 && runner.idle());
      }
    }
  }
}

void a_thrown_error_costs_its_own_rollout() {
  Toy toy{{1, 3, 1}, 4, {}, {}, {}};
  Slow executor(toy, 11);
  Runner runner(chain(7, 2, 2, Overlap::kAlways), {&executor, &executor, &executor});
  runner.submit(jobs(24, 5));
  std::uint32_t good = 0, bad = 0;
  while (const auto report = runner.next(10s)) {
    if (!std::holds_alternative<Ending>(*report)) continue;
    const Ending& ending = std::get<Ending>(*report);
    if (ending.why == Why::kFailed) {
      REQUIRE(ending.rollout == 11 && ending.message == "stage denoise, chunk 0, step 0: bad");
      ++bad;
    } else {
      REQUIRE(std::pair(ending.chunks, ending.value) == toy.alone(ending.rollout, 5));
      ++good;
    }
  }
  REQUIRE(good == 23 && bad == 1);
}

void several_threads_submit_and_cancel() {
  Toy toy{{1, 3, 1}, 4, {}, {}, {}};
  Slow executor(toy, kNobody);
  Runner runner(chain(7, 2, 1, Overlap::kAuto), {&executor, &executor, &executor});
  std::vector<std::thread> threads;
  for (std::uint32_t t = 0; t < 4; ++t) {
    threads.emplace_back([&runner, t] {
      for (std::uint32_t i = 0; i < 10; ++i) {
        const std::uint32_t number = t * 100 + i;
        runner.submit(std::vector<Job>{{number, number, 5}});
        if (i % 3 == 0) runner.cancel(number);
        (void)runner.statistics();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::uint32_t ended = 0, cancelled = 0;
  while (const auto report = runner.next(10s)) {
    if (!std::holds_alternative<Ending>(*report)) continue;
    const Ending& ending = std::get<Ending>(*report);
    ++ended;
    cancelled += ending.why == Why::kCancelled;
    if (ending.why != Why::kCancelled) REQUIRE(std::pair(ending.chunks, ending.value) == toy.alone(ending.rollout, 5));
  }
  REQUIRE(ended == 40 && cancelled <= 16);
}

void it_stops_in_the_middle() {
  Toy toy{{1, 3, 1}, 4, {}, {}, {}};
  Slow executor(toy, kNobody);
  Runner runner(chain(3, 2, 1, Overlap::kAuto), {&executor, &executor, &executor});
  REQUIRE(!runner.next(1ms).has_value());
  runner.submit(jobs(800, 5));
  REQUIRE(runner.next(10s).has_value());
  runner.stop();
  runner.stop();
  bool refused = false;
  try {
    runner.submit(jobs(1, 5));
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  REQUIRE(refused && !runner.idle());
}

void nothing_is_dispatched_for_nothing() {
  NoOpExecutor executor({1, 2, 3, 4});
  const SchedulerConfig config = chain(16, 1, 1, Overlap::kOff);
  const std::vector<Nanoseconds> spent = measure_overhead(config, jobs(400, 9), executor);
  REQUIRE(!spent.empty() && spent.size() <= 100 * (1 + 2 + 3 + 4) * 5);
}

}  // namespace

int main() {
  return test::run({
      {"threads give the rollouts of a plain loop", threads_give_the_rollouts_of_a_plain_loop},
      {"a thrown error costs its own rollout", a_thrown_error_costs_its_own_rollout},
      {"several threads submit and cancel", several_threads_submit_and_cancel},
      {"it stops in the middle", it_stops_in_the_middle},
      {"nothing is dispatched for nothing", nothing_is_dispatched_for_nothing},
  });
}
