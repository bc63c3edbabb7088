#include "slots.hpp"

namespace worldenv {

Slots::Slots(const std::vector<std::uint32_t>& homes, std::uint32_t devices, std::uint32_t per_device)
    : free_(devices), free_count_(static_cast<std::uint32_t>(homes.size()) * per_device) {
  for (const std::uint32_t device : homes) {
    const auto first = static_cast<std::uint32_t>(home_.size());
    for (std::uint32_t i = per_device; i-- > 0;) free_[device].push_back(first + i);
    home_.insert(home_.end(), per_device, device);
    by_free_.emplace(-static_cast<std::int64_t>(per_device), device);
  }
}

std::uint32_t Slots::take() {
  const std::uint32_t device = by_free_.begin()->second;
  const std::uint32_t slot = free_[device].back();
  by_free_.erase(by_free_.begin());
  free_[device].pop_back();
  if (!free_[device].empty()) by_free_.emplace(-static_cast<std::int64_t>(free_[device].size()), device);
  --free_count_;
  return slot;
}

void Slots::release(std::uint32_t slot) {
  const std::uint32_t device = home_[slot];
  by_free_.erase({-static_cast<std::int64_t>(free_[device].size()), device});
  free_[device].push_back(slot);
  by_free_.emplace(-static_cast<std::int64_t>(free_[device].size()), device);
  ++free_count_;
}

}  // namespace worldenv
