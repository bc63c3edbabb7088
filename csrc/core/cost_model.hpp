// What a batch costs: seconds affine in the batch's shape, per stage and device; given, or fitted to what was measured.
#pragma once

#include <cmath>
#include <cstdint>

namespace worldenv {

// fixed + per_item * b seconds for a batch of shape b.
struct Affine {
  double fixed = 1.0;
  double per_item = 0.0;

  double seconds(std::uint32_t shape) const { return fixed + per_item * shape; }
  bool possible() const { return fixed >= 0.0 && per_item >= 0.0 && std::isfinite(fixed) && std::isfinite(per_item); }
};

// The affine law behind a stream of measured batches: least squares, the last hundred or so counting most. Until
// two shapes have been seen it is the prior, scaled to the shape that was.
class CostModel {
 public:
  explicit CostModel(Affine prior = {}) : prior_(prior), fit_(prior) {}

  void observe(std::uint32_t shape, double seconds);
  const Affine& fit() const { return fit_; }

 private:
  Affine prior_, fit_;
  double n_ = 0.0, b_ = 0.0, bb_ = 0.0, t_ = 0.0, bt_ = 0.0;  // decayed sums: 1, shape, shape^2, seconds, both
};

}  // namespace worldenv
