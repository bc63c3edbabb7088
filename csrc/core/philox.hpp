// The counter RNG: Philox4x32-10 (Salmon et al. 2011). Definition, bit widths and order of words: worldenv/noise.py,
// whose results these functions equal to the last bit.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace worldenv {

using Block = std::array<std::uint32_t, 4>;
using Key = std::array<std::uint32_t, 2>;

// One block of four words.
Block philox4x32(Block counter, Key key);

// What one draw is for. Each array has `rows` entries; row b has the key (seed, rollout[b]) and the counter words
// (chunk[b], step[b], stream, element / 4).
struct Draw {
  std::uint32_t seed;
  std::uint32_t stream;
  const std::uint32_t* rollout;
  const std::uint32_t* chunk;
  const std::uint32_t* step;
  std::size_t rows;
  std::size_t count;  // elements per row, at most 2^34
};

// Each fills out (rows, count), row after row.
void philox_bits(const Draw& draw, std::uint32_t* out);
void philox_uniform(const Draw& draw, double* out);  // (w + 1/2) / 2^32, in (0, 1)
void philox_normal(const Draw& draw, float* out);    // Box-Muller in double on the words (2p, 2p + 1)

}  // namespace worldenv
