// Where rollouts live while they run: a fixed number of slots per home device. A rollout is put where most are free.
#pragma once

#include <cstdint>
#include <set>
#include <utility>
#include <vector>

namespace worldenv {

class Slots {
 public:
  // `per_device` slots on each of `homes` [device numbers] of `devices` devices.
  Slots(const std::vector<std::uint32_t>& homes, std::uint32_t devices, std::uint32_t per_device);

  std::uint32_t count() const { return static_cast<std::uint32_t>(home_.size()); }
  std::uint32_t free() const { return free_count_; }
  std::uint32_t home(std::uint32_t slot) const { return home_[slot]; }

  // Takes a free slot on the device with the most of them (ties: the lowest number); needs free() > 0.
  std::uint32_t take();
  void release(std::uint32_t slot);

 private:
  std::vector<std::uint32_t> home_;                           // by slot
  std::vector<std::vector<std::uint32_t>> free_;              // by device; the last is taken first
  std::set<std::pair<std::int64_t, std::uint32_t>> by_free_;  // (-free slots, device) of devices that have any
  std::uint32_t free_count_;
};

}  // namespace worldenv
