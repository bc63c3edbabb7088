#include "cost_model.hpp"

#include <algorithm>

namespace worldenv {
namespace {

constexpr double kDecay = 0.99;

}  // namespace

void CostModel::observe(std::uint32_t shape, double seconds) {
  const double b = shape;
  n_ = kDecay * n_ + 1.0;
  b_ = kDecay * b_ + b;
  bb_ = kDecay * bb_ + b * b;
  t_ = kDecay * t_ + seconds;
  bt_ = kDecay * bt_ + b * seconds;
  const double mean = b_ / n_, spread = bb_ / n_ - mean * mean;
  if (spread < 1e-3 * mean * mean) {  // one shape so far: its time says nothing of the slope
    const double expected = prior_.fixed + prior_.per_item * mean;
    const double scale = expected > 0.0 ? t_ / n_ / expected : 0.0;
    fit_ = {scale * prior_.fixed, scale * prior_.per_item};
    return;
  }
  const double steepest = t_ / b_;  // through the origin: no cost of a batch is below 0
  const double slope = std::clamp((bt_ / n_ - mean * t_ / n_) / spread, 0.0, steepest);
  fit_ = {t_ / n_ - slope * mean, slope};
}

}  // namespace worldenv
