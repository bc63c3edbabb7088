// Each kernel against its definition in double, for every instruction set of this machine, at odd sizes; with guards
// behind what is written.
#include <algorithm>
#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "check.hpp"
#include "onnxruntime/kernels.hpp"

using namespace worldenv;

namespace {

using Floats = std::vector<float>;
constexpr float kGuard = -77.0F;
const float kNan = std::bit_cast<float>(0x7FC00001U);  // its lowest bits are not 0

Floats normal(std::size_t count, float scale = 1.0F, float shift = 0.0F) {
  static std::mt19937 generator(7);
  std::normal_distribution<float> draw(shift, scale);
  Floats x(count);
  std::generate(x.begin(), x.end(), [&] { return draw(generator); });
  return x;
}

Floats room(std::size_t count) { return Floats(count + 3, kGuard); }

std::vector<Machine> machines() {
  std::vector<Machine> all;
  for (const Machine one : {Machine::kAny, Machine::kAvx2, Machine::kAvx512})
    if (one <= widest()) all.push_back(one);
  return all;
}

double silu(double x) { return x / (1 + std::exp(-x)); }
double gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }

// Off by at most `error` of the largest number there is, and nothing was written behind.
void require_close(const Floats& y, const std::vector<double>& want, double error) {
  double most = 1e-3;
  for (const double one : want) most = std::max(most, std::abs(one));
  for (std::size_t i = 0; i < want.size(); ++i) REQUIRE(std::abs(y[i] - want[i]) <= error * most);
  for (std::size_t i = want.size(); i < y.size(); ++i) REQUIRE(y[i] == kGuard);
}

std::vector<double> normalised(const GroupNorm& work) {
  std::vector<double> y(work.rows * work.channels * work.pixels);
  const std::size_t channels = work.channels / work.groups, count = channels * work.pixels;
  for (std::size_t first = 0; first < y.size(); first += count) {
    double mean = 0, square = 0;
    for (std::size_t i = 0; i < count; ++i) mean += work.x[first + i] / static_cast<double>(count);
    for (std::size_t i = 0; i < count; ++i)
      square += std::pow(work.x[first + i] - mean, 2) / static_cast<double>(count);
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t c = (first + i) / work.pixels % work.channels;
      const double one = (work.x[first + i] - mean) / std::sqrt(square + work.epsilon) * work.weight[c] + work.bias[c];
      y[first + i] = work.silu ? silu(one) : one;
    }
  }
  return y;
}

void group_norms() {
  struct Size {
    std::size_t rows, channels, pixels, groups;
  };
  for (const Machine machine : machines())
    for (const Size size :
         {Size{1, 1, 1, 1}, Size{2, 6, 5, 3}, Size{3, 4, 16, 4}, Size{1, 64, 48, 32}, Size{2, 8, 1000, 2}})
      for (const bool with_silu : {false, true})
        for (const float shift : {0.0F, 300.0F}) {
          const std::size_t count = size.rows * size.channels * size.pixels;
          const Floats x = normal(count, 3.0F, shift), weight = normal(size.channels), bias = normal(size.channels);
          Floats y = room(count);
          const GroupNorm work{x.data(),      weight.data(), bias.data(), y.data(), size.rows,
                               size.channels, size.pixels,   size.groups, 1e-5F,    with_silu};
          kernels(machine).group_norm(work);
          require_close(y, normalised(work), shift == 0.0F ? 1e-6 : 1e-4);  // 300 is known to 3e-5
        }
}

void layer_norms() {
  for (const Machine machine : machines())
    for (const std::size_t width : {1, 7, 16, 64, 100, 257}) {
      const std::size_t rows = 5;
      const Floats x = normal(rows * width), weight = normal(width), bias = normal(width);
      Floats y = room(rows * width);
      kernels(machine).layer_norm({x.data(), weight.data(), bias.data(), y.data(), rows, width, 1e-5F});
      std::vector<double> want(rows * width);
      for (std::size_t row = 0; row < rows;
           ++row) {  // a row is one picture of one group, whose weights are another for each pixel
        const Floats one(width, 1.0F), none(width, 0.0F);
        const auto plain =
            normalised({x.data() + row * width, one.data(), none.data(), nullptr, 1, width, 1, 1, 1e-5F, false});
        for (std::size_t i = 0; i < width; ++i) want[row * width + i] = plain[i] * weight[i] + bias[i];
      }
      require_close(y, want, 1e-6);
    }
}

void gated_gelus() {
  for (const Machine machine : machines())
    for (const std::size_t count : {0, 1, 15, 16, 33, 1000}) {
      const Floats value = normal(count), gate = normal(count, 3.0F);
      Floats y = room(count);
      kernels(machine).gated_gelu({value.data(), gate.data(), y.data(), count});
      // of a negative gate little is left, and that is known as well as the gate itself: whatever numbers are drawn
      for (std::size_t i = 0; i < count; ++i)
        REQUIRE(std::abs(y[i] - value[i] * gelu(gate[i])) <= 3e-7 * std::abs(value[i] * gate[i]));
      for (std::size_t i = count; i < y.size(); ++i) REQUIRE(y[i] == kGuard);
    }
}

void far_out() {  // neither overflows, and a small result is as good as a large one
  for (const Machine machine : machines()) {
    const Floats gate{-200, -40, -6, -3, -1e-6F, 0, 1e-6F, 3, 6, 40, 200, 3e38F}, one(gate.size(), 1.0F);
    Floats y = room(gate.size());
    kernels(machine).gated_gelu({one.data(), gate.data(), y.data(), gate.size()});
    for (std::size_t i = 0; i < gate.size(); ++i) REQUIRE(std::abs(y[i] - gelu(gate[i])) <= 3e-7 * std::abs(gate[i]));
    const float weight = 1.0F, none = 0.0F;  // a norm whose epsilon is all there is: the identity
    for (const float x : {-100.0F, -88.0F, -20.0F, -5.0F, 5.0F, 88.0F, 100.0F, 1000.0F}) {
      const Floats bias{x};
      kernels(machine).group_norm({&none, &weight, bias.data(), y.data(), 1, 1, 1, 1, 1.0F, true});
      REQUIRE(std::abs(y[0] - silu(x)) <= std::max(1e-6 * std::abs(silu(x)), 1e-35));
    }
  }
}

void attention() {
  struct Size {
    std::size_t batch, queries, keys, heads, width;
  };
  for (const Machine machine : machines())
    for (const Size size : {Size{1, 1, 1, 1, 1}, Size{2, 12, 12, 3, 32}, Size{1, 37, 16, 2, 32}, Size{2, 17, 5, 1, 20},
                            Size{1, 3, 32, 2, 128}, Size{3, 16, 31, 2, 7}})
      for (const bool heads_first : {false, true}) {
        const std::size_t count = size.batch * size.queries * size.heads * size.width,
                          context = size.batch * size.keys * size.heads * size.width;
        const Floats q = normal(count), k = normal(context), v = normal(context);
        Floats y = room(count);
        const float scale = 0.3F;
        kernels(machine).few_keys({q.data(), k.data(), v.data(), y.data(), size.batch, size.queries, size.keys,
                                   size.heads, size.width, heads_first, scale});
        std::vector<double> want(count);
        for (std::size_t b = 0; b < size.batch; ++b)
          for (std::size_t i = 0; i < size.queries; ++i)
            for (std::size_t h = 0; h < size.heads; ++h) {
              const std::size_t row = ((b * size.queries + i) * size.heads + h) * size.width;
              const auto at = [&](std::size_t j) {
                return (heads_first ? (b * size.heads + h) * size.keys + j : (b * size.keys + j) * size.heads + h) *
                       size.width;
              };
              std::vector<double> score(size.keys);
              for (std::size_t j = 0; j < size.keys; ++j)
                for (std::size_t e = 0; e < size.width; ++e)
                  score[j] += static_cast<double>(scale) * q[row + e] * k[at(j) + e];
              const double top = *std::max_element(score.begin(), score.end());
              double total = 0;
              for (double& one : score) total += one = std::exp(one - top);
              for (std::size_t j = 0; j < size.keys; ++j)
                for (std::size_t e = 0; e < size.width; ++e) want[row + e] += score[j] / total * v[at(j) + e];
            }
        require_close(y, want,
                      1e-5);  // scores of some hundred are known to 1e-5, and so is what they are the exponents of
      }
}

// A convolution of three rows in double, from weights (channels_out, channels_in, 3, taps).
std::vector<double> convolved(const WinogradConv& work, const Floats& weight) {
  const std::size_t rows = work.height + 2 - 2 * work.above;
  std::vector<double> y;
  for (std::size_t n = 0; n < work.pictures; ++n)
    for (std::size_t o = 0; o < work.channels_out; ++o)
      for (std::size_t row = 0; row < work.height; ++row)
        for (std::size_t column = 0; column < work.width; ++column) {
          double one = work.bias[o];
          for (std::size_t c = 0; c < work.channels_in; ++c)
            for (std::size_t k = 0; k < 3 * work.taps; ++k) {
              const std::size_t i = row + k / work.taps - work.above;  // wraps round above and on the left
              const std::size_t j = column + k % work.taps - (work.taps - 1) / 2;
              if (i < rows && j < work.width)
                one += static_cast<double>(weight[(o * work.channels_in + c) * 3 * work.taps + k]) *
                       work.x[((n * work.channels_in + c) * rows + i) * work.width + j];
            }
          y.push_back(one);
        }
  return y;
}

Floats panels(const Floats& weight, std::size_t channels_out, std::size_t channels_in, std::size_t taps) {
  constexpr double kAt[6][3] = {{1 / 4.0, 0, 0},
                                {-1 / 6.0, -1 / 6.0, -1 / 6.0},
                                {-1 / 6.0, 1 / 6.0, -1 / 6.0},
                                {1 / 24.0, 1 / 12.0, 1 / 6.0},
                                {1 / 24.0, -1 / 12.0, 1 / 6.0},
                                {0, 0, 1}};
  Floats out;
  for (const auto& at : kAt)
    for (std::size_t o = 0; o < channels_out; o += kPanel)
      for (std::size_t tap = 0; tap < taps; ++tap)
        for (std::size_t c = 0; c < channels_in; ++c)
          for (std::size_t i = 0; i < kPanel; ++i) {
            double one = 0;
            for (std::size_t row = 0; row < 3; ++row)
              one += at[row] * weight[(((o + i) * channels_in + c) * 3 + row) * taps + tap];
            out.push_back(static_cast<float>(one));
          }
  return out;
}

void winograd_convolutions() {
  struct Size {
    std::size_t pictures, channels_in, channels_out, height, width;
  };
  for (const Machine machine : machines())
    for (const Size size : {Size{2, 40, 32, 6, 64}, Size{1, 1, 16, 1, 4}, Size{3, 5, 48, 5, 8}, Size{13, 3, 16, 4, 4},
                            Size{2, 7, 64, 7, 20}, Size{1, 2, 80, 8, 52}})
      for (const std::size_t taps : {1, 3})
        for (const std::size_t above : {0, 1}) {
          const auto [pictures, in, out, height, width] = size;
          const Floats x = normal(pictures * in * (height + 2 - 2 * above) * width),
                       weight = normal(out * in * 3 * taps), bias = normal(out), made = panels(weight, out, in, taps);
          Floats y = room(pictures * out * height * width);
          const WinogradConv work{x.data(), made.data(), bias.data(), y.data(), pictures, in,
                                  out,      height,      width,       taps,     above};
          kernels(machine).winograd_conv(work);
          require_close(y, convolved(work, weight), 4e-6);  // points weigh rows up to five times
        }
}

void narrow_convolutions() {
  struct Size {
    std::size_t pictures, channels_in, channels_out, height, width;
  };
  for (const Machine machine : machines())
    for (const Size size : {Size{1, 1, 1, 1, 1}, Size{2, 8, 8, 5, 64}, Size{1, 3, 5, 4, 33}, Size{2, 16, 3, 3, 17},
                            Size{1, 64, 4, 2, 256}}) {
      const auto [pictures, in, out, height, width] = size;
      const Floats x = normal(pictures * in * height * width), weight = normal(out * in * 9), bias = normal(out);
      Floats y = room(pictures * out * height * width);
      for (const int again : {0, 1}) {  // what the first call left behind is not seen by the second
        (void)again;
        kernels(machine).narrow_conv(
            {x.data(), weight.data(), bias.data(), y.data(), pictures, in, out, height, width});
      }
      const WinogradConv same{x.data(), nullptr, bias.data(), nullptr, pictures, in, out, height, width, 3, 1};
      require_close(y, convolved(same, weight), 1e-6);
    }
}

void a_nan_is_seen_where_it_was() {
  for (const Machine machine : machines()) {
    const Kernels& here = kernels(machine);
    Floats x = normal(64), weight(8, 1.0F), y = room(64);
    x[11] = kNan;
    here.group_norm({x.data(), weight.data(), weight.data(), y.data(), 1, 8, 8, 4, 1e-5F, true});
    for (std::size_t i = 0; i < 64; ++i) REQUIRE(std::isnan(y[i]) == (i < 16));
    here.layer_norm({x.data(), weight.data(), weight.data(), y.data(), 8, 8, 1e-5F});
    for (std::size_t i = 0; i < 64; ++i) REQUIRE(std::isnan(y[i]) == (i / 8 == 1));
    here.gated_gelu({x.data(), x.data(), y.data(), 64});
    for (std::size_t i = 0; i < 64; ++i) REQUIRE(std::isnan(y[i]) == (i == 11));
    const Floats k = normal(64);
    here.few_keys({x.data(), k.data(), k.data(), y.data(), 1, 8, 8, 1, 8, false, 1.0F});
    for (std::size_t i = 0; i < 64; ++i) REQUIRE(std::isnan(y[i]) == (i / 8 == 1));
    here.few_keys({k.data(), x.data(), k.data(), y.data(), 1, 8, 8, 1, 8, false, 1.0F});
    for (std::size_t i = 0; i < 64; ++i) REQUIRE(std::isnan(y[i]));
    const Floats taps = normal(9);
    here.narrow_conv({x.data(), taps.data(), weight.data(), y.data(), 1, 1, 1, 8, 8});  // the NaN is in row 1, column 3
    for (std::size_t i = 0; i < 64; ++i) REQUIRE(std::isnan(y[i]) == (i / 8 <= 2 && i % 8 >= 2 && i % 8 <= 4));
    const Floats sixteen(16, 1.0F), rows = panels(normal(16 * 9), 16, 1, 3);
    Floats more = room(16 * 64);
    here.winograd_conv({x.data(), rows.data(), sixteen.data(), more.data(), 1, 1, 16, 8, 8, 3, 1});
    for (std::size_t i = 0; i < 16 * 64; ++i)  // in all rows of its tile
      REQUIRE(std::isnan(more[i]) == (i % 64 / 8 <= 3 && i % 8 >= 2 && i % 8 <= 4));
  }
}

}  // namespace

int main() {
  return test::run({{"group norms", group_norms},
                    {"layer norms", layer_norms},
                    {"gated GELUs", gated_gelus},
                    {"far out", far_out},
                    {"narrow convolutions", narrow_convolutions},
                    {"Winograd convolutions", winograd_convolutions},
                    {"attention to few keys", attention},
                    {"a NaN is seen where it was", a_nan_is_seen_where_it_was}});
}
