#include "philox.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>

namespace worldenv {
namespace {

constexpr double kUnit = 1.0 / 4294967296.0;  // 2^-32: products with it are exact

double unit(std::uint32_t word) { return (static_cast<double>(word) + 0.5) * kUnit; }

// sum of c[k] z^k, from the highest power down: the order of operations is part of the definition.
template <std::size_t N>
double horner(double z, const std::array<double, N>& c) {
  double total = c[N - 1];
  for (std::size_t k = N - 1; k-- > 0;) total = total * z + c[k];
  return total;
}

constexpr std::array<double, 11> kLogSeries = [] {  // atanh(s) / s in s^2
  std::array<double, 11> c{};
  for (int k = 0; k < 11; ++k) c[k] = 1.0 / (2 * k + 1);
  return c;
}();

constexpr std::array<double, 9> factorial_series(int first) {  // (-1)^k / (2k + first)!
  std::array<double, 9> c{};
  double factorial = 1.0;  // exact: 17! < 2^53
  for (int k = 0; k < 9; ++k) {
    c[k] = (k % 2 ? -1.0 : 1.0) / factorial;
    factorial *= (2 * k + first + 1) * (2 * k + first + 2);
  }
  return c;
}

constexpr std::array<double, 9> kSinSeries = factorial_series(1);  // sin(x) / x in x^2
constexpr std::array<double, 9> kCosSeries = factorial_series(0);  // cos(x) in x^2

// ln u for u in (0, 1), u normal: u = 2^e m with m in sqrt(1/2) .. sqrt(2), ln m = 2 atanh((m - 1) / (m + 1)).
double log_unit(double u) {
  const auto bits = std::bit_cast<std::uint64_t>(u);
  double exponent = static_cast<double>(static_cast<std::int32_t>(bits >> 52) - 1022);
  double mantissa = std::bit_cast<double>((bits & 0x000FFFFFFFFFFFFFULL) | 0x3FE0000000000000ULL);  // 1/2 .. 1
  const bool low = mantissa < std::numbers::sqrt2 / 2;
  mantissa = low ? 2.0 * mantissa : mantissa;
  exponent = low ? exponent - 1.0 : exponent;
  const double s = (mantissa - 1.0) / (mantissa + 1.0);
  return exponent * std::numbers::ln2 + 2.0 * s * horner(s * s, kLogSeries);
}

// The two normals of one pair of words.
std::array<float, 2> box_muller(std::uint32_t first, std::uint32_t second) {
  const double radius = std::sqrt(-2.0 * log_unit(unit(first)));
  const auto word = static_cast<std::int64_t>(second);
  const std::int64_t quarter = (word + (std::int64_t{1} << 29)) >> 30;  // nearest quarter turn
  const double x = (static_cast<double>(word - (quarter << 30)) + 0.5) * (2.0 * std::numbers::pi / 4294967296.0);
  const double z = x * x;
  const double sin = x * horner(z, kSinSeries);
  const double cos = horner(z, kCosSeries);
  const bool odd = (quarter & 1) != 0;
  double along = odd ? sin : cos;
  double across = odd ? cos : sin;
  along = ((quarter + 1) & 2) != 0 ? -along : along;  // cos is below 0 in quarters 1 and 2, sin in 2 and 3
  across = (quarter & 2) != 0 ? -across : across;
  return {static_cast<float>(radius * along), static_cast<float>(radius * across)};
}

// Calls store(pointer, block, n) for every block of every row; n is 4, or fewer at the end of a row.
template <typename T, typename Store>
void each_block(const Draw& draw, T* out, Store store) {
  for (std::size_t row = 0; row < draw.rows; ++row, out += draw.count) {
    const Key key{draw.seed, draw.rollout[row]};
    for (std::size_t start = 0; start < draw.count; start += 4) {
      const auto element = static_cast<std::uint32_t>(start / 4);
      const Block block = philox4x32({draw.chunk[row], draw.step[row], draw.stream, element}, key);
      store(out + start, block, std::min<std::size_t>(4, draw.count - start));
    }
  }
}

}  // namespace

Block philox4x32(Block c, Key k) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<std::uint32_t>(p0)};
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  return c;
}

void philox_bits(const Draw& draw, std::uint32_t* out) {
  each_block(draw, out, [](std::uint32_t* to, const Block& block, std::size_t n) { std::copy_n(block.data(), n, to); });
}

void philox_uniform(const Draw& draw, double* out) {
  each_block(draw, out, [](double* to, const Block& block, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) to[i] = unit(block[i]);
  });
}

void philox_normal(const Draw& draw, float* out) {
  each_block(draw, out, [](float* to, const Block& block, std::size_t n) {
    const auto first = box_muller(block[0], block[1]);
    const auto second = box_muller(block[2], block[3]);
    const std::array<float, 4> values{first[0], first[1], second[0], second[1]};
    std::copy_n(values.data(), n, to);
  });
}

}  // namespace worldenv
