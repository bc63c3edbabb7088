#include <cmath>
#include <numbers>
#include <thread>
#include <vector>

#include "check.hpp"
#include "core/philox.hpp"

using namespace worldenv;

namespace {

struct Numbers {
  std::vector<std::uint32_t> rollout, chunk, step;
  Draw draw(std::size_t count, std::size_t first = 0) const {
    return {9, 2, rollout.data() + first, chunk.data() + first, step.data() + first, rollout.size() - first, count};
  }
};

const Numbers kNumbers{{0, 7, 0xFFFFFFFF}, {1, 5, 0}, {3, 3, 4}};

void published_blocks() {  // Random123's kat_vectors
  REQUIRE(philox4x32({0, 0, 0, 0}, {0, 0}) == Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  const std::uint32_t ones = 0xFFFFFFFF;
  REQUIRE(philox4x32({ones, ones, ones, ones}, {ones, ones}) == Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  REQUIRE(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
          Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

void words_lie_where_they_are_documented() {
  const std::size_t count = 11;
  std::vector<std::uint32_t> words(3 * count);
  philox_bits(kNumbers.draw(count), words.data());
  for (std::size_t row = 0; row < 3; ++row) {
    for (std::uint32_t e = 0; e < count; ++e) {
      const Block block = philox4x32({kNumbers.chunk[row], kNumbers.step[row], 2, e / 4}, {9, kNumbers.rollout[row]});
      REQUIRE(words[row * count + e] == block[e % 4]);
    }
  }
}

void nothing_is_written_past_the_end() {
  for (std::size_t count = 0; count < 10; ++count) {
    std::vector<std::uint32_t> words(3 * count + 1, 0xABCD);
    std::vector<double> unit(3 * count + 1, -7.0);
    std::vector<float> normal(3 * count + 1, -7.0F);
    philox_bits(kNumbers.draw(count), words.data());
    philox_uniform(kNumbers.draw(count), unit.data());
    philox_normal(kNumbers.draw(count), normal.data());
    REQUIRE(words.back() == 0xABCD && unit.back() == -7.0 && normal.back() == -7.0F);
  }
}

void uniforms_and_normals_are_functions_of_the_words() {
  const std::size_t count = 100000;
  std::vector<std::uint32_t> words(3 * count);
  std::vector<double> unit(3 * count);
  std::vector<float> normal(3 * count);
  philox_bits(kNumbers.draw(count), words.data());
  philox_uniform(kNumbers.draw(count), unit.data());
  philox_normal(kNumbers.draw(count), normal.data());
  for (std::size_t i = 0; i < words.size(); i += 2) {
    REQUIRE(unit[i] == (words[i] + 0.5) / 4294967296.0);
    const double radius = std::sqrt(-2.0 * std::log(unit[i])), angle = 2.0 * std::numbers::pi * unit[i + 1];
    // Half a unit in the last place of float32, and what the library's functions differ by
    const double slack = radius * 0x1p-24 + 1e-14;
    REQUIRE(std::abs(normal[i] - radius * std::cos(angle)) <= slack);
    REQUIRE(std::abs(normal[i + 1] - radius * std::sin(angle)) <= slack);
  }
}

void threads_draw_what_one_draws() {
  const std::size_t count = 4001;
  std::vector<float> whole(3 * count), parts(3 * count);
  philox_normal(kNumbers.draw(count), whole.data());
  {
    std::vector<std::jthread> threads;
    for (std::size_t row = 0; row < 3; ++row) {
      threads.emplace_back([&parts, row, count] {
        Draw draw = kNumbers.draw(count, row);
        draw.rows = 1;
        philox_normal(draw, parts.data() + row * count);
      });
    }
  }
  REQUIRE(whole == parts);
}

}  // namespace

int main() {
  return test::run(
      {{"published blocks", published_blocks},
       {"words lie where they are documented", words_lie_where_they_are_documented},
       {"nothing is written past the end", nothing_is_written_past_the_end},
       {"uniforms and normals are functions of the words", uniforms_and_normals_are_functions_of_the_words},
       {"threads draw what one draws", threads_draw_what_one_draws}});
}
