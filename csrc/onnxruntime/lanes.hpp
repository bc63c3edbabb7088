// Several float32 at once, and what networks compute of them, in the compiler's vector types. L is the vector:
// Lanes<16> where the machine has registers of 64 bytes, Lanes<8> or Lanes<4> where it has no longer ones; wider ones
// than it has are taken apart number by number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <utility>

// All of it becomes part of the function that uses it, also where nothing is optimised: it is compiled for that
// function's instructions.
#define WORLDENV_INLINE [[gnu::always_inline]] inline
#define WORLDENV_INLINED __attribute__((always_inline))  // of a lambda

namespace worldenv {

template <std::size_t kCount>
struct Vector {
  using Floats [[gnu::vector_size(4 * kCount)]] = float;
  using Bits [[gnu::vector_size(4 * kCount)]] = std::uint32_t;
};

template <std::size_t kCount>
using Lanes = typename Vector<kCount>::Floats;

template <typename L>
constexpr std::size_t kLanes = sizeof(L) / sizeof(float);

template <typename L>
WORLDENV_INLINE L all(float x) {
  return L{} + x;
}

template <typename L>
WORLDENV_INLINE L load(const float* from) {
  L x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// `count` of them, or as many as there are lanes; the others are `rest`.
template <typename L>
WORLDENV_INLINE L load(const float* from, std::size_t count, float rest) {
  if (count >= kLanes<L>) return load<L>(from);
  L x = all<L>(rest);
  std::memcpy(&x, from, count * sizeof(float));
  return x;
}

template <typename L>
WORLDENV_INLINE void store(float* to, L x) {
  std::memcpy(to, &x, sizeof x);
}

template <typename L>
WORLDENV_INLINE void store(float* to, L x, std::size_t count) {
  if (count >= kLanes<L>) return store(to, x);
  std::memcpy(to, &x, count * sizeof(float));
}

// Of all lanes: halves are added to each other.
template <typename L>
WORLDENV_INLINE float sum(L x) {
  if constexpr (kLanes<L> == 4) {
    return (x[0] + x[2]) + (x[1] + x[3]);
  } else {
    Lanes<kLanes<L> / 2> low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    return sum<Lanes<kLanes<L> / 2>>(low + high);
  }
}

template <std::size_t kBy, typename L, std::size_t... kLane>
WORLDENV_INLINE void exchange(L& a, L& b, std::index_sequence<kLane...>) {
  constexpr std::size_t kCount = sizeof...(kLane);
  const L low = __builtin_shufflevector(a, b, (kLane & kBy ? kCount + kLane - kBy : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kBy ? kCount + kLane : kLane + kBy)...);
  a = low;
}

// Lane i of row j becomes lane j of row i, for as many rows as lanes: squares are exchanged, from large ones to small
// ones.
template <typename L, std::size_t kBy = kLanes<L> / 2>
WORLDENV_INLINE void transpose(L* rows) {
  for (std::size_t i = 0; i < kLanes<L>; ++i)
    if (!(i & kBy)) exchange<kBy>(rows[i], rows[i + kBy], std::make_index_sequence<kLanes<L>>{});
  if constexpr (kBy > 1) transpose<L, kBy / 2>(rows);
}

// e^x to two units in the last place, for x between -87 and 88, and beyond as there; NaN of NaN. Range reduction by
// Cody and Waite, then Taylor's polynomial of degree 7, whose remainder on half of ln 2 is 5e-9.
template <typename L>
WORLDENV_INLINE L exp(L x) {
  constexpr float kLog2E = 1.44269504F, kLn2High = 0.693359375F, kLn2Low = -2.12194440e-4F,
                  kRound = 12582912.0F;  // 1.5 * 2^23
  x = x < -87.0F ? all<L>(-87.0F) : x;
  x = x > 88.0F ? all<L>(88.0F) : x;
  const L shifted = x * kLog2E + kRound;
  const L n = shifted - kRound;
  const L r = (x - n * kLn2High) - n * kLn2Low;
  L p = all<L>(1.0F / 5040);
  for (const float coefficient : {1.0F / 720, 1.0F / 120, 1.0F / 24, 1.0F / 6, 0.5F, 1.0F, 1.0F})
    p = p * r + coefficient;
  typename Vector<kLanes<L>>::Bits bits, power;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&power, &p, sizeof power);
  power += bits << 23;  // n, in the lowest bits of the mantissa, goes to p's exponent: p 2^n
  std::memcpy(&p, &power, sizeof p);
  return x == x ? p : x;  // of a NaN the exponent is none
}

// x / (1 + e^-x).
template <typename L>
WORLDENV_INLINE L silu(L x) {
  return x / (exp(-x) + 1.0F);
}

// x Phi(x), exact GELU, to 3e-7 of |x|: the error function by 7.1.26 of Abramowitz and Stegun.
template <typename L>
WORLDENV_INLINE L gelu(L x) {
  const L z = (x < 0.0F ? -x : x) * 0.70710678F;
  const L t = 1.0F / (z * 0.3275911F + 1.0F);
  L p = all<L>(1.061405429F);
  for (const float coefficient : {-1.453152027F, 1.421413741F, -0.284496736F, 0.254829592F}) p = p * t + coefficient;
  const L tail = p * t * exp(-z * z) * 0.5F;  // 1 - Phi(|x|)
  return x * (x < 0.0F ? tail : 1.0F - tail);
}

}  // namespace worldenv
