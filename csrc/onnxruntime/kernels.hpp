// What a network spends on a CPU beside its products, each of several operators of ONNX in one pass over memory:
// float32, one thread, no allocation. A NaN among the inputs of a result is a NaN in it.
#pragma once

#include <cstddef>

namespace worldenv {

// GroupNorm of x (rows, channels, pixels), statistics over all pixels of a group's channels; then SiLU, where asked
// for.
struct GroupNorm {
  const float* x;
  const float* weight;  // (channels)
  const float* bias;    // (channels)
  float* y;             // like x
  std::size_t rows, channels, pixels;
  std::size_t groups;  // divides channels
  float epsilon;
  bool silu;
};

// LayerNorm of each row of x (rows, width).
struct LayerNorm {
  const float* x;
  const float* weight;  // (width)
  const float* bias;    // (width)
  float* y;             // like x
  std::size_t rows, width;
  float epsilon;
};

// value * gelu(gate) of `count` numbers each, exact GELU.
struct GatedGelu {
  const float* value;
  const float* gate;
  float* y;
  std::size_t count;
};

constexpr std::size_t kMostChannelsIn = 64, kMostChannelsOut = 8, kMostRow = 256;

// A 3x3 convolution, one pixel of zeros around each picture, to at most kMostChannelsOut channels of at most
// kMostChannelsIn, of rows of at most kMostRow pixels: a runtime that computes sixteen channels at a time computes most
// of them for nothing.
struct NarrowConv {
  const float* x;       // (pictures, channels_in, height, width)
  const float* weight;  // (channels_out, channels_in, 3, 3)
  const float* bias;    // (channels_out)
  float* y;             // (pictures, channels_out, height, width)
  std::size_t pictures, channels_in, channels_out, height, width;
};

constexpr std::size_t kPanel = 16;  // output channels whose weights lie beside each other
constexpr std::size_t kQuad = 4;    // columns that are computed together

// A convolution of three rows and one or three columns, four rows of results at a time (`winograd.hpp`). What is not a
// number at one point of a tile makes none of the tile's four rows one.
struct WinogradConv {
  const float* x;       // (pictures, channels_in, height + 2 - 2 * above, width)
  const float* weight;  // (6, channels_out / kPanel, taps, channels_in, kPanel): G times the rows of the weight
  const float* bias;    // (channels_out)
  float* y;             // (pictures, channels_out, height, width)
  std::size_t pictures, channels_in;
  std::size_t channels_out;   // a multiple of kPanel
  std::size_t height, width;  // width a multiple of kQuad
  std::size_t taps;           // columns: 1, or 3 with one zero on each side of a row
  std::size_t above;          // rows of zeros above a picture, and below: 0 or 1
};

constexpr std::size_t kMostKeys = 32, kMostWidth = 128;

// softmax(scale q k^T) v of each head, without a mask, for at most kMostKeys keys of at most kMostWidth numbers.
struct FewKeys {
  const float* q;  // (batch, queries, heads, width)
  const float* k;  // (batch, keys, heads, width), or (batch, heads, keys, width) where heads come first
  const float* v;  // like k
  float* y;        // like q
  std::size_t batch, queries, keys, heads, width;
  bool heads_first;
  float scale;
};

// The kernels for one instruction set: results of two differ by how sums are rounded.
struct Kernels {
  void (*group_norm)(const GroupNorm&);
  void (*layer_norm)(const LayerNorm&);
  void (*gated_gelu)(const GatedGelu&);
  void (*narrow_conv)(const NarrowConv&);
  void (*few_keys)(const FewKeys&);
  void (*winograd_conv)(const WinogradConv&);
};

enum class Machine { kAny, kAvx2, kAvx512 };

// What this machine has: the last of Machine whose instructions it knows.
Machine widest();

// For `machine`, which must not be wider than this one.
const Kernels& kernels(Machine machine);

}  // namespace worldenv
