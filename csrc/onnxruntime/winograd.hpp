// A convolution of three rows by Winograd's minimal filtering F(4, 3) (Lavin and Gray 2016): four rows of results of
// six products instead of twelve, at the points 0, 1, -1, 2, -2 and infinity.
#pragma once

#include <vector>

#include "onnxruntime/kernels.hpp"
#include "onnxruntime/lanes.hpp"

namespace worldenv {

constexpr std::size_t kTile = 4;    // rows of results that are computed together
constexpr std::size_t kPoints = 6;  // and the products of each

// Tiles of one call are computed some at a time, such that what is made of them stays in a cache. A tile is four rows
// of results of one picture.
struct Tiles {
  std::size_t first, count;
  std::size_t width;  // of a row with its zeros
  float* points;      // (kPoints, channels_in, count, width)
  float* products;    // (kPoints, columns of all tiles, channels_out)
};

// Six rows, of which those beyond the picture are zeros, as points.
template <typename L>
WORLDENV_INLINE void transform(const WinogradConv& work, const Tiles& tiles) {
  const std::size_t per_picture = (work.height + kTile - 1) / kTile, zeros = (work.taps - 1) / 2;
  const std::size_t rows = work.height + 2 - 2 * work.above, step = work.channels_in * tiles.count * tiles.width;
  for (std::size_t t = 0; t < tiles.count; ++t) {
    const std::size_t picture = (tiles.first + t) / per_picture, top = (tiles.first + t) % per_picture * kTile;
    for (std::size_t c = 0; c < work.channels_in; ++c) {
      const float* x = work.x + (picture * work.channels_in + c) * rows * work.width;
      float* to = tiles.points + (c * tiles.count + t) * tiles.width;
      if (zeros)
        for (std::size_t p = 0; p < kPoints; ++p) to[p * step] = to[p * step + tiles.width - 1] = 0.0F;
      for (std::size_t i = 0; i < work.width; i += kLanes<L>) {
        L d[kPoints];
        for (std::size_t j = 0; j < kPoints; ++j) {
          const std::size_t row = top + j - work.above;  // wraps round above
          d[j] = row < rows ? load<L>(x + row * work.width + i) : L{};
        }
        float* here = to + zeros + i;
        const L even = d[4] - 4.0F * d[2], odd = d[3] - 4.0F * d[1];
        const L wide_even = d[4] - d[2], wide_odd = 2.0F * (d[3] - d[1]);
        store(here, 4.0F * d[0] - 5.0F * d[2] + d[4]);
        store(here + step, even + odd);
        store(here + 2 * step, even - odd);
        store(here + 3 * step, wide_even + wide_odd);
        store(here + 4 * step, wide_even - wide_odd);
        store(here + 5 * step, 4.0F * d[1] - 5.0F * d[3] + d[5]);
      }
    }
  }
}

// Products of kPanels panels of weights and kQuads quads of one point, each of which begins at a column of `quads`.
template <typename L, std::size_t kPanels, std::size_t kQuads>
WORLDENV_INLINE void multiply(const WinogradConv& work, const Tiles& tiles, const float* weight,
                              const float* const* quads, float* to) {
  constexpr std::size_t kVectors = kPanels * kPanel / kLanes<L>, kPerPanel = kPanel / kLanes<L>;
  const std::size_t step = tiles.count * tiles.width, panel = work.taps * work.channels_in * kPanel;
  L sums[kQuads * kQuad][kVectors] = {};
  for (std::size_t tap = 0; tap < work.taps; ++tap)
    for (std::size_t c = 0; c < work.channels_in; ++c, weight += kPanel) {
      L some[kVectors];
      for (std::size_t v = 0; v < kVectors; ++v)
        some[v] = load<L>(weight + v / kPerPanel * panel + v % kPerPanel * kLanes<L>);
      for (std::size_t q = 0; q < kQuads; ++q)
        for (std::size_t i = 0; i < kQuad; ++i)
          for (std::size_t v = 0; v < kVectors; ++v) sums[q * kQuad + i][v] += some[v] * quads[q][c * step + tap + i];
    }
  for (std::size_t i = 0; i < kQuads * kQuad; ++i)
    for (std::size_t v = 0; v < kVectors; ++v) store(to + i * work.channels_out + v * kLanes<L>, sums[i][v]);
}

template <typename L, std::size_t kPanels>
WORLDENV_INLINE void multiply(const WinogradConv& work, const Tiles& tiles, std::size_t panel) {
  constexpr std::size_t kQuads = kLanes<L> == 16 ? 3 : 1;  // sums stay in registers: see kBlocks of NarrowConv
  const std::size_t per_row = work.width / kQuad, count = tiles.count * per_row;
  for (std::size_t p = 0; p < kPoints; ++p) {
    const float* weight =
        work.weight + (p * work.channels_out / kPanel + panel) * work.taps * work.channels_in * kPanel;
    const float* points = tiles.points + p * work.channels_in * tiles.count * tiles.width;
    float* to = tiles.products + p * count * kQuad * work.channels_out + panel * kPanel;
    const auto begin = [&](std::size_t quad) { return points + quad / per_row * tiles.width + quad % per_row * kQuad; };
    std::size_t quad = 0;
    for (; quad + kQuads <= count; quad += kQuads) {
      const float* quads[kQuads];
      for (std::size_t q = 0; q < kQuads; ++q) quads[q] = begin(quad + q);
      multiply<L, kPanels, kQuads>(work, tiles, weight, quads, to + quad * kQuad * work.channels_out);
    }
    for (; quad < count; ++quad) {
      const float* one = begin(quad);
      multiply<L, kPanels, 1>(work, tiles, weight, &one, to + quad * kQuad * work.channels_out);
    }
  }
}

// Four rows of four columns of four channels at a time.
WORLDENV_INLINE void untransform(const WinogradConv& work, const Tiles& tiles) {
  using Four = Lanes<4>;
  const std::size_t per_picture = (work.height + kTile - 1) / kTile, columns = tiles.count * work.width;
  const std::size_t step = columns * work.channels_out, plane = work.height * work.width;
  for (std::size_t column = 0; column < columns; column += kQuad) {
    const std::size_t tile = tiles.first + column / work.width, top = tile % per_picture * kTile;
    const std::size_t rows = work.height - top < kTile ? work.height - top : kTile;
    float* y = work.y + tile / per_picture * work.channels_out * plane + top * work.width + column % work.width;
    for (std::size_t o = 0; o < work.channels_out; o += 4, y += 4 * plane) {
      Four made[kTile][kQuad];
      const Four bias = load<Four>(work.bias + o);
      for (std::size_t i = 0; i < kQuad; ++i) {
        const float* from = tiles.products + (column + i) * work.channels_out + o;
        Four m[kPoints];
        for (std::size_t p = 0; p < kPoints; ++p) m[p] = load<Four>(from + p * step);
        const Four sum = m[1] + m[2], difference = m[1] - m[2], wide_sum = m[3] + m[4], wide_difference = m[3] - m[4];
        made[0][i] = m[0] + sum + wide_sum + bias;
        made[1][i] = difference + 2.0F * wide_difference + bias;
        made[2][i] = sum + 4.0F * wide_sum + bias;
        made[3][i] = difference + 8.0F * wide_difference + m[5] + bias;
      }
      for (std::size_t row = 0; row < rows; ++row) {
        transpose(made[row]);
        for (std::size_t i = 0; i < 4; ++i) store(y + i * plane + row * work.width, made[row][i]);
      }
    }
  }
}

template <typename L>
WORLDENV_INLINE void convolve(const WinogradConv& work) {
  constexpr std::size_t kColumns = 48;  // at once, if a row is not longer
  const std::size_t all = work.pictures * ((work.height + kTile - 1) / kTile);
  const std::size_t most = work.width < kColumns ? kColumns / work.width : 1, width = work.width + work.taps - 1;
  static thread_local std::vector<float> room;  // kept: the system would clear new pages at every call
  const std::size_t points = kPoints * work.channels_in * most * width;
  room.resize(points + kPoints * most * work.width * work.channels_out);
  for (std::size_t first = 0; first < all; first += most) {
    const Tiles tiles{first, all - first < most ? all - first : most, width, room.data(), room.data() + points};
    work.width % kLanes<L> ? transform<Lanes<4>>(work, tiles) : transform<L>(work, tiles);
    constexpr std::size_t kTogether = kLanes<L> == 16 ? 2 : 1;
    std::size_t panel = 0;
    for (; panel + kTogether <= work.channels_out / kPanel; panel += kTogether)
      multiply<L, kTogether>(work, tiles, panel);
    for (; panel < work.channels_out / kPanel; ++panel) multiply<L, 1>(work, tiles, panel);
    untransform(work, tiles);
  }
}

}  // namespace worldenv
