// A world in which every stage's result depends on the result before it: a stage run early, twice at once, or with
// another rollout's input shows in the values. Chunk c+1 needs the frames of chunk c, its verdict that of chunk c too.
#pragma once

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "core/executor.hpp"
#include "core/philox.hpp"

namespace worldenv::test {

inline std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  const Block words = philox4x32({static_cast<std::uint32_t>(a), static_cast<std::uint32_t>(a >> 32),
                                  static_cast<std::uint32_t>(b), static_cast<std::uint32_t>(b >> 32)},
                                 {1, 2});
  return (std::uint64_t{words[0]} << 32) | words[1];
}

struct Toy {
  std::vector<std::uint32_t> steps;  // per stage; the last stage judges
  std::uint32_t seed = 0;

  std::uint32_t length(std::uint32_t rollout) const { return 1 + mix(seed, rollout) % 7; }  // chunks
  double value(std::uint64_t state) const { return static_cast<double>(state % 1000) / 1000.0; }

  // What a plain loop gives: chunks and value.
  std::pair<std::uint32_t, double> alone(std::uint32_t rollout, std::uint32_t limit) const {
    std::uint64_t frames = rollout, watch = 0;
    for (std::uint32_t chunk = 0;; ++chunk) {
      for (std::uint32_t stage = 0; stage + 1 < steps.size(); ++stage) {
        for (std::uint32_t step = 0; step < steps[stage]; ++step) frames = mix(frames, stage * 100 + step);
      }
      watch = mix(watch, frames);
      if (chunk + 1 >= length(rollout) || chunk + 1 == limit) return {chunk + 1, value(watch)};
    }
  }

  // Runs one item on what is remembered; throws where it comes out of turn.
  Verdict run(const Batch& batch, const Item& item) {
    const std::lock_guard held(lock);
    const auto judge = static_cast<std::uint32_t>(steps.size()) - 1;
    if (batch.stage == judge) {
      const std::uint64_t before = item.chunk == 0 ? 0 : watch.at({item.rollout, item.chunk - 1});
      const std::uint64_t seen = frames.at({item.rollout, item.chunk, judge - 1, steps[judge - 1] - 1});
      const std::uint64_t now = watch[{item.rollout, item.chunk}] = mix(before, seen);
      return {item.chunk + 1 >= length(item.rollout), value(now)};
    }
    std::uint64_t before = item.rollout;
    if (item.step > 0) {
      before = frames.at({item.rollout, item.chunk, batch.stage, item.step - 1});
    } else if (batch.stage > 0) {
      before = frames.at({item.rollout, item.chunk, batch.stage - 1, steps[batch.stage - 1] - 1});
    } else if (item.chunk > 0) {
      before = frames.at({item.rollout, item.chunk - 1, judge - 1, steps[judge - 1] - 1});
    }
    const std::tuple key{item.rollout, item.chunk, batch.stage, item.step};
    if (frames.contains(key))
      throw std::logic_error("rollout " + std::to_string(item.rollout) + " was run twice there");
    frames[key] = mix(before, batch.stage * 100 + item.step);
    return {};
  }

  std::mutex lock;
  std::map<std::tuple<std::uint32_t, std::uint32_t, std::uint32_t, std::uint32_t>, std::uint64_t> frames;
  std::map<std::pair<std::uint32_t, std::uint32_t>, std::uint64_t> watch;
};

}  // namespace worldenv::test
