#include "core/philox.hpp"

#include "bindings.hpp"

namespace worldenv {
namespace {

using Words = Array<std::uint32_t>;

template <typename T>
Array<T> fill(std::uint32_t seed, const Words& rollout, const Words& chunk, const Words& step, std::uint32_t stream,
              std::size_t count, void (*draw)(const Draw&, T*)) {
  if (rollout.ndim() != 1 || chunk.ndim() != 1 || step.ndim() != 1 || chunk.size() != rollout.size() ||
      step.size() != rollout.size()) {
    throw py::value_error("philox: want rollout, chunk and step (B,) of equal length");
  }
  if (count > (std::size_t{1} << 34)) throw py::value_error("philox: want at most 2^34 elements in a draw");
  Array<T> out({rollout.shape(0), static_cast<py::ssize_t>(count)});
  const Draw what{seed, stream, rollout.data(), chunk.data(), step.data(), static_cast<std::size_t>(rollout.size()),
                  count};
  T* to = out.mutable_data();
  {
    py::gil_scoped_release nogil;
    draw(what, to);
  }
  return out;
}

template <typename T>
void bind(py::module_& m, const char* name, void (*draw)(const Draw&, T*), const char* doc) {
  m.def(
      name,
      [draw](std::uint32_t seed, const Words& rollout, const Words& chunk, const Words& step, std::uint32_t stream,
             std::size_t count) { return fill<T>(seed, rollout, chunk, step, stream, count, draw); },
      py::arg("seed"), py::arg("rollout").noconvert(), py::arg("chunk").noconvert(), py::arg("step").noconvert(),
      py::arg("stream"), py::arg("count"), doc);
}

}  // namespace

void bind_philox(py::module_& m) {
  bind<std::uint32_t>(m, "philox_bits", philox_bits,
                      "Words (B, count) uint32 of rollout, chunk, step (B,) uint32; else TypeError, ValueError.");
  bind<double>(m, "philox_uniform", philox_uniform, "The same words as uniform float64 in (0, 1).");
  bind<float>(m, "philox_normal", philox_normal, "Standard normal float32 of the same words, by pairs.");
}

}  // namespace worldenv
