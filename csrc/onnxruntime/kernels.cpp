#include "onnxruntime/kernels.hpp"

#include <cmath>

#include "onnxruntime/lanes.hpp"
#include "onnxruntime/winograd.hpp"

namespace worldenv {
namespace {

struct Moments {
  float mean, scale;
};

// Sum of what `of` makes of `count` numbers, a vector at a time; four sums at once, or each would wait for the one
// before.
template <typename L, typename Of>
WORLDENV_INLINE float summed(const float* x, std::size_t count, float rest, Of of) {
  constexpr std::size_t kSums = 4;
  L total[kSums] = {};
  std::size_t i = 0;
  for (; i + kSums * kLanes<L> <= count; i += kSums * kLanes<L>)
    for (std::size_t s = 0; s < kSums; ++s) total[s] += of(load<L>(x + i + s * kLanes<L>));
  for (; i < count; i += kLanes<L>) total[0] += of(load<L>(x + i, count - i, rest));
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// The second moment is about the mean that was found first.
template <typename L>
WORLDENV_INLINE Moments moments(const float* x, std::size_t count, float epsilon) {
  const float mean = summed<L>(x, count, 0.0F, [](L one) WORLDENV_INLINED { return one; }) / static_cast<float>(count);
  const float square =
      summed<L>(x, count, mean, [mean](L one) WORLDENV_INLINED { return (one - mean) * (one - mean); });
  return {mean, 1.0F / std::sqrt(square / static_cast<float>(count) + epsilon)};
}

template <typename L, bool kSilu>
WORLDENV_INLINE void normalised(const GroupNorm& work) {
  const std::size_t channels = work.channels / work.groups, pixels = work.pixels, count = channels * pixels;
  for (std::size_t group = 0; group < work.rows * work.groups; ++group) {
    const float* x = work.x + group * count;
    float* y = work.y + group * count;
    const Moments of = moments<L>(x, count, work.epsilon);
    const std::size_t first = group % work.groups * channels;
    for (std::size_t c = 0; c < channels; ++c, x += pixels, y += pixels) {
      const float scale = of.scale * work.weight[first + c], bias = work.bias[first + c];
      for (std::size_t i = 0; i < pixels; i += kLanes<L>) {
        const std::size_t here = pixels - i;
        L value = (load<L>(x + i, here, 0.0F) - of.mean) * scale + bias;
        if constexpr (kSilu) value = silu(value);
        store(y + i, value, here);
      }
    }
  }
}

template <typename L>
WORLDENV_INLINE void normalise_groups(const GroupNorm& work) {
  work.silu ? normalised<L, true>(work) : normalised<L, false>(work);
}

template <typename L>
WORLDENV_INLINE void normalise_rows(const LayerNorm& work) {
  for (std::size_t row = 0; row < work.rows; ++row) {
    const float* x = work.x + row * work.width;
    float* y = work.y + row * work.width;
    const Moments of = moments<L>(x, work.width, work.epsilon);
    for (std::size_t i = 0; i < work.width; i += kLanes<L>) {
      const std::size_t here = work.width - i;
      const L d = (load<L>(x + i, here, 0.0F) - of.mean) * of.scale;
      store(y + i, d * load<L>(work.weight + i, here, 0.0F) + load<L>(work.bias + i, here, 0.0F), here);
    }
  }
}

template <typename L>
WORLDENV_INLINE void gate(const GatedGelu& work) {
  for (std::size_t i = 0; i < work.count; i += kLanes<L>) {
    const std::size_t here = work.count - i;
    store(work.y + i, load<L>(work.value + i, here, 0.0F) * gelu(load<L>(work.gate + i, here, 0.0F)), here);
  }
}

// What one head of one batch reads and writes, and how far apart its rows are.
struct Head {
  const float* q;
  const float* k;
  const float* v;
  float* y;
  std::size_t step, context_step;
};

// As many queries at a time as there are lanes, one in each: a softmax is then a sum over keys, and nothing is added up
// across lanes.
template <typename L>
WORLDENV_INLINE void attend(const FewKeys& work, const Head& head) {
  constexpr std::size_t kAtOnce = 4;
  const std::size_t width = work.width, keys = work.keys;
  // Rows of all heads lie a power of two apart, where a cache has room for a few: those that are read again and again
  // are brought together.
  alignas(64) float key[kMostKeys][kMostWidth];
  alignas(64) float value[kMostKeys][kMostWidth];
  for (std::size_t j = 0; j < keys; ++j)
    for (std::size_t e = 0; e < width; e += kLanes<L>) {
      store(key[j] + e, load<L>(head.k + j * head.context_step + e, width - e, 0.0F));
      store(value[j] + e, load<L>(head.v + j * head.context_step + e, width - e, 0.0F));
    }
  alignas(64) float turned[kMostWidth][kLanes<L>];
  alignas(64) float weight[kMostKeys + kAtOnce][kLanes<L>];
  for (std::size_t first = 0; first < work.queries; first += kLanes<L>) {
    const std::size_t queries = work.queries - first < kLanes<L> ? work.queries - first : kLanes<L>;
    for (std::size_t e = 0; e < width; e += kLanes<L>) {
      L square[kLanes<L>];
      for (std::size_t i = 0; i < kLanes<L>; ++i)
        square[i] = load<L>(head.q + (first + (i < queries ? i : 0)) * head.step + e, width - e, 0.0F);
      transpose(square);
      for (std::size_t i = 0; i < kLanes<L>; ++i) store(turned[e + i], square[i] * work.scale);
    }
    L most = all<L>(-INFINITY);
    for (std::size_t j = 0; j < keys; j += kAtOnce) {
      const float* k[kAtOnce];
      for (std::size_t n = 0; n < kAtOnce; ++n) k[n] = key[j + n < keys ? j + n : j];
      L score[kAtOnce] = {};
      for (std::size_t e = 0; e < width; ++e)
        for (std::size_t n = 0; n < kAtOnce; ++n) score[n] += load<L>(turned[e]) * k[n][e];
      for (std::size_t n = 0; n < kAtOnce; ++n) {
        most = score[n] > most ? score[n] : most;
        store(weight[j + n], score[n]);
      }
    }
    L total = {};
    for (std::size_t j = 0; j < keys; ++j) {
      const L one = exp(load<L>(weight[j]) - most);
      total += one;
      store(weight[j], one);
    }
    for (std::size_t j = 0; j < keys; ++j) store(weight[j], load<L>(weight[j]) / total);
    for (std::size_t e = 0; e < width; e += kLanes<L>)
      for (std::size_t i = 0; i < queries; i += kAtOnce) {
        L out[kAtOnce] = {};
        for (std::size_t j = 0; j < keys; ++j) {
          const L part = load<L>(value[j] + e);
          for (std::size_t n = 0; n < kAtOnce; ++n) out[n] += part * weight[j][i + n];
        }
        for (std::size_t n = 0; n < kAtOnce && i + n < queries; ++n)
          store(head.y + (first + i + n) * head.step + e, out[n], width - e);
      }
  }
}

template <typename L>
WORLDENV_INLINE void attend(const FewKeys& work) {
  const std::size_t step = work.heads * work.width;
  for (std::size_t b = 0; b < work.batch; ++b)
    for (std::size_t h = 0; h < work.heads; ++h) {
      const std::size_t own = b * work.queries * step + h * work.width;
      const std::size_t other = b * work.keys * step + h * work.width * (work.heads_first ? work.keys : 1);
      attend<L>(work, {work.q + own, work.k + other, work.v + other, work.y + own, step,
                       work.heads_first ? work.width : step});
    }
}

// Rows of a picture's channels as a convolution walks them: three at a time, with zeros around the picture. Row 0 is of
// zeros.
struct Rows {
  alignas(64) float room[3][kMostChannelsIn * (kMostRow + 2)];
  std::size_t step;  // from one channel to the next: a row, rounded up, and a zero on each side
};

// Row `y` takes the place of the one three above it.
template <typename L>
WORLDENV_INLINE void take(const NarrowConv& work, Rows& rows, const float* x, std::size_t y) {
  const bool inside = y > 0 && y <= work.height;
  for (std::size_t c = 0; c < work.channels_in; ++c) {
    float* to = rows.room[y % 3] + c * rows.step;
    to[0] = 0.0F;
    for (std::size_t i = 0; i < work.width; i += kLanes<L>)
      store(to + 1 + i, inside ? load<L>(x + (c * work.height + y - 1) * work.width + i, work.width - i, 0.0F) : L{});
    to[rows.step - 1] = 0.0F;
  }
}

// kBlocks vectors of pixels of every output channel, which begin at column `first` of row `y`.
template <typename L, std::size_t kOut, std::size_t kBlocks>
WORLDENV_INLINE void convolve(const NarrowConv& work, const Rows& rows, const float* weight, float* to, std::size_t y,
                              std::size_t first) {
  L sums[kOut][kBlocks];
  for (std::size_t o = 0; o < kOut; ++o)
    for (std::size_t b = 0; b < kBlocks; ++b) sums[o][b] = all<L>(o < work.channels_out ? work.bias[o] : 0.0F);
  for (std::size_t c = 0; c < work.channels_in; ++c)
    for (std::size_t down = 0; down < 3; ++down)
      for (std::size_t right = 0; right < 3; ++right, weight += kOut) {
        const float* pixels = rows.room[(y + down) % 3] + c * rows.step + first + right;
        for (std::size_t b = 0; b < kBlocks; ++b) {
          const L some = load<L>(pixels + b * kLanes<L>);
          for (std::size_t o = 0; o < kOut; ++o) sums[o][b] += some * weight[o];
        }
      }
  for (std::size_t o = 0; o < work.channels_out; ++o)
    for (std::size_t b = 0; b < kBlocks; ++b) {
      const std::size_t i = first + b * kLanes<L>;
      store(to + (o * work.height + y) * work.width + i, sums[o][b], work.width - i);
    }
}

template <typename L, std::size_t kOut>
WORLDENV_INLINE void convolve(const NarrowConv& work) {
  constexpr std::size_t kBlocks =
      kLanes<L> == 16 ? 2 : 1;  // sums stay in registers, of which those with 64 bytes are twice as many
  alignas(64) float weight[kMostChannelsIn * 9 * kOut];  // of all output channels beside each other
  for (std::size_t i = 0; i < work.channels_in * 9; ++i)
    for (std::size_t o = 0; o < kOut; ++o)
      weight[i * kOut + o] = o < work.channels_out ? work.weight[o * work.channels_in * 9 + i] : 0.0F;
  Rows rows;
  rows.step = (work.width + kLanes<L> - 1) / kLanes<L> * kLanes<L> + 2;
  for (std::size_t n = 0; n < work.pictures; ++n) {
    const float* x = work.x + n * work.channels_in * work.height * work.width;
    float* to = work.y + n * work.channels_out * work.height * work.width;
    take<L>(work, rows, x, 0);
    take<L>(work, rows, x, 1);
    for (std::size_t y = 0; y < work.height; ++y) {
      take<L>(work, rows, x, y + 2);
      std::size_t i = 0;
      for (; i + kBlocks * kLanes<L> <= work.width; i += kBlocks * kLanes<L>)
        convolve<L, kOut, kBlocks>(work, rows, weight, to, y, i);
      for (; i < work.width; i += kLanes<L>) convolve<L, kOut, 1>(work, rows, weight, to, y, i);
    }
  }
}

template <typename L>
WORLDENV_INLINE void convolve(const NarrowConv& work) {
  work.channels_out <= 4 ? convolve<L, 4>(work) : convolve<L, 8>(work);
}

// A table of the kernels, all of whose code is compiled for `instructions`, with so many lanes: what is inlined into a
// function is compiled as that is.
#define WORLDENV_KERNELS(table, lanes, instructions)                                                     \
  struct table {                                                                                         \
    instructions static void group_norm(const GroupNorm& work) { normalise_groups<Lanes<lanes>>(work); } \
    instructions static void layer_norm(const LayerNorm& work) { normalise_rows<Lanes<lanes>>(work); }   \
    instructions static void gated_gelu(const GatedGelu& work) { gate<Lanes<lanes>>(work); }             \
    instructions static void narrow_conv(const NarrowConv& work) { convolve<Lanes<lanes>>(work); }       \
    instructions static void few_keys(const FewKeys& work) { attend<Lanes<lanes>>(work); }               \
    instructions static void winograd_conv(const WinogradConv& work) { convolve<Lanes<lanes>>(work); }   \
  };

WORLDENV_KERNELS(Any, 4, )
#if defined(__x86_64__)
WORLDENV_KERNELS(Avx2, 8, [[gnu::target("avx2,fma")]])
WORLDENV_KERNELS(Avx512, 16, [[gnu::target("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq")]])
#else
using Avx2 = Any;
using Avx512 = Any;
#endif

template <typename Table>
constexpr Kernels kTable{Table::group_norm,  Table::layer_norm, Table::gated_gelu,
                         Table::narrow_conv, Table::few_keys,   Table::winograd_conv};

}  // namespace

Machine widest() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return avx2 && avx512 ? Machine::kAvx512 : avx2 ? Machine::kAvx2 : Machine::kAny;
#else
  return Machine::kAny;
#endif
}

const Kernels& kernels(Machine machine) {
  return machine == Machine::kAvx512 ? kTable<Avx512> : machine == Machine::kAvx2 ? kTable<Avx2> : kTable<Any>;
}

}  // namespace worldenv
