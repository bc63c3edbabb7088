// The kernels as operators of ONNX Runtime, in domain "worldenv": a session loads this library by
// SessionOptions.register_custom_ops_library. What a graph must hold for each is said in engines/onnx_fusion.py, which
// writes it. An operator whose tensors do not fit throws: the runtime catches that and fails the run by its message.
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime/c_api.hpp"
#include "onnxruntime/kernels.hpp"

namespace worldenv {
namespace {

using namespace ort;

const Kernels& kHere = kernels(widest());

// Calls an entry of the table that gives a status; throws what that says.
template <typename... Given>
void ask(const OrtApi* api, Entry entry, Given... given) {
  OrtStatus* status = call<OrtStatus*>(api, entry, given...);
  if (!status) return;
  const std::string said = call<const char*>(api, kGetErrorMessage, static_cast<const OrtStatus*>(status));
  call<void>(api, kReleaseStatus, status);
  throw std::runtime_error("worldenv: " + said);
}

struct Tensor {
  float* data;
  std::vector<std::int64_t> shape;

  std::size_t length(std::size_t axis) const { return static_cast<std::size_t>(shape[axis]); }
  std::size_t count(std::size_t first) const {  // of all axes from `first` on
    std::size_t product = 1;
    for (std::size_t axis = first; axis < shape.size(); ++axis) product *= length(axis);
    return product;
  }
};

// What one call of an operator is given.
class Call {
 public:
  Call(const OrtApi* api, OrtKernelContext* context) : api_(api), context_(context) {}

  Tensor input(std::size_t index) const {
    const OrtValue* value = nullptr;
    ask(api_, kGetInput, static_cast<const OrtKernelContext*>(context_), index, &value);
    OrtTensorTypeAndShapeInfo* info = nullptr;
    ask(api_, kGetTensorTypeAndShape, value, &info);
    std::size_t axes = 0;
    ask(api_, kGetDimensionsCount, static_cast<const OrtTensorTypeAndShapeInfo*>(info), &axes);
    std::vector<std::int64_t> shape(axes);
    ask(api_, kGetDimensions, static_cast<const OrtTensorTypeAndShapeInfo*>(info), shape.data(), axes);
    call<void>(api_, kReleaseTensorTypeAndShapeInfo, info);
    return {data(const_cast<OrtValue*>(value)), shape};
  }

  float* output(const std::vector<std::int64_t>& shape) const {
    OrtValue* value = nullptr;
    ask(api_, kGetOutput, context_, std::size_t{0}, shape.data(), shape.size(), &value);
    return data(value);
  }

 private:
  float* data(OrtValue* value) const {
    void* data = nullptr;
    ask(api_, kGetTensorMutableData, value, &data);
    return static_cast<float*>(data);
  }

  const OrtApi* api_;
  OrtKernelContext* context_;
};

// Attributes of a node, which must be there.
class Attributes {
 public:
  Attributes(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  std::int64_t integer(const char* name) const {
    std::int64_t value = 0;
    ask(api_, kGetAttributeInt, info_, name, &value);
    return value;
  }
  float number(const char* name) const {
    float value = 0;
    ask(api_, kGetAttributeFloat, info_, name, &value);
    return value;
  }

 private:
  const OrtApi* api_;
  const OrtKernelInfo* info_;
};

[[noreturn]] void unfit(const char* name, const char* want) {
  throw std::runtime_error(std::string("worldenv.") + name + ": want " + want);
}

struct GroupNormOperator {
  static constexpr const char* kName = "GroupNorm";
  static constexpr std::size_t kInputs = 3;
  std::size_t groups;
  float epsilon;
  bool silu;

  explicit GroupNormOperator(const Attributes& of)
      : groups(static_cast<std::size_t>(of.integer("groups"))),
        epsilon(of.number("epsilon")),
        silu(of.integer("silu") != 0) {}

  void run(const Call& call) const {
    const Tensor x = call.input(0), weight = call.input(1), bias = call.input(2);
    const std::size_t channels = x.shape.size() < 2 ? 0 : x.length(1);
    if (channels == 0 || groups == 0 || channels % groups || weight.count(0) != channels || bias.count(0) != channels)
      unfit(kName, "(N, C, ...), weight and bias (C), C a multiple of groups");
    kHere.group_norm({x.data, weight.data, bias.data, call.output(x.shape), x.length(0), channels, x.count(2), groups,
                      epsilon, silu});
  }
};

struct LayerNormOperator {
  static constexpr const char* kName = "LayerNorm";
  static constexpr std::size_t kInputs = 3;
  float epsilon;

  explicit LayerNormOperator(const Attributes& of) : epsilon(of.number("epsilon")) {}

  void run(const Call& call) const {
    const Tensor x = call.input(0), weight = call.input(1), bias = call.input(2);
    const std::size_t width = x.shape.empty() ? 0 : x.length(x.shape.size() - 1);
    if (width == 0 || weight.count(0) != width || bias.count(0) != width) unfit(kName, "(..., C), weight and bias (C)");
    kHere.layer_norm({x.data, weight.data, bias.data, call.output(x.shape), x.count(0) / width, width, epsilon});
  }
};

struct GatedGeluOperator {
  static constexpr const char* kName = "GatedGelu";
  static constexpr std::size_t kInputs = 2;

  explicit GatedGeluOperator(const Attributes&) {}

  void run(const Call& call) const {
    const Tensor value = call.input(0), gate = call.input(1);
    if (value.shape != gate.shape) unfit(kName, "value and gate of one shape");
    kHere.gated_gelu({value.data, gate.data, call.output(value.shape), value.count(0)});
  }
};

struct NarrowConvOperator {
  static constexpr const char* kName = "NarrowConv";
  static constexpr std::size_t kInputs = 3;

  explicit NarrowConvOperator(const Attributes&) {}

  void run(const Call& call) const {
    const Tensor x = call.input(0), weight = call.input(1), bias = call.input(2);
    if (x.shape.size() != 4 || weight.shape.size() != 4 || weight.shape[1] != x.shape[1] || weight.shape[2] != 3 ||
        weight.shape[3] != 3 || bias.count(0) != weight.length(0) || x.length(1) > kMostChannelsIn ||
        weight.length(0) > kMostChannelsOut || x.length(3) > kMostRow)
      unfit(kName, "(N, C, H, W), weight (O, C, 3, 3), bias (O), at most 64 channels to 8, in rows of 256");
    std::vector<std::int64_t> shape = x.shape;
    shape[1] = weight.shape[0];
    kHere.narrow_conv({x.data, weight.data, bias.data, call.output(shape), x.length(0), x.length(1), weight.length(0),
                       x.length(2), x.length(3)});
  }
};

struct WinogradConvOperator {
  static constexpr const char* kName = "WinogradConv";
  static constexpr std::size_t kInputs = 3;
  std::int64_t above;

  explicit WinogradConvOperator(const Attributes& of) : above(of.integer("above")) {}

  void run(const Call& call) const {
    const Tensor x = call.input(0), weight = call.input(1), bias = call.input(2);
    const std::vector<std::int64_t>& panels = weight.shape;
    const std::int64_t one = static_cast<std::int64_t>(kPanel);
    if (x.shape.size() != 4 || panels.size() != 5 || panels[0] != 6 || (panels[2] != 1 && panels[2] != 3) ||
        panels[3] != x.shape[1] || panels[4] != one || bias.count(0) != weight.length(1) * kPanel || x.shape[3] % 4 ||
        (above != 0 && above != 1) || x.shape[2] + 2 * above < 3)
      unfit(kName,
            "(N, C, H, W), weight (6, O / 16, 1 or 3, C, 16), bias (O), W a multiple of 4, above 0 or 1, three rows");
    const std::vector<std::int64_t> shape{x.shape[0], panels[1] * one, x.shape[2] - 2 + 2 * above, x.shape[3]};
    kHere.winograd_conv({x.data, weight.data, bias.data, call.output(shape), x.length(0), x.length(1), bias.count(0),
                         static_cast<std::size_t>(shape[2]), x.length(3), weight.length(2),
                         static_cast<std::size_t>(above)});
  }
};

struct FewKeysOperator {
  static constexpr const char* kName = "FewKeysAttention";
  static constexpr std::size_t kInputs = 3;
  bool heads_first;
  float scale;

  explicit FewKeysOperator(const Attributes& of)
      : heads_first(of.integer("heads_first") != 0), scale(of.number("scale")) {}

  void run(const Call& call) const {
    const Tensor q = call.input(0), k = call.input(1), v = call.input(2);
    const std::size_t heads = heads_first ? 1 : 2, keys = heads_first ? 2 : 1;
    if (q.shape.size() != 4 || k.shape.size() != 4 || k.shape != v.shape || q.shape[0] != k.shape[0] ||
        q.shape[2] != k.shape[heads] || q.shape[3] != k.shape[3] || k.length(keys) == 0 || k.length(keys) > kMostKeys ||
        q.length(3) > kMostWidth)
      unfit(kName, "q (B, L, H, E), keys and values alike, of at most 32 keys and 128 wide");
    kHere.few_keys({q.data, k.data, v.data, call.output(q.shape), q.length(0), q.length(1), k.length(keys), q.length(2),
                    q.length(3), heads_first, scale});
  }
};

// An operator as the runtime knows it.
template <typename Operator>
struct Registered : OrtCustomOp {
  struct Kernel {
    const OrtApi* api;
    Operator run;
  };

  Registered() : OrtCustomOp{} {
    version = kVersion;
    create = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info) -> void* {
      return new Kernel{api, Operator(Attributes(api, info))};
    };
    name = [](const OrtCustomOp*) { return Operator::kName; };
    provider = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
    input_type = output_type = [](const OrtCustomOp*, std::size_t) { return kFloat; };
    input_kind = output_kind = [](const OrtCustomOp*, std::size_t) { return kRequired; };
    inputs = [](const OrtCustomOp*) { return Operator::kInputs; };
    outputs = [](const OrtCustomOp*) { return std::size_t{1}; };
    compute = [](void* kernel, OrtKernelContext* context) {
      const auto& one = *static_cast<const Kernel*>(kernel);
      one.run.run(Call(one.api, context));
    };
    destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }
};

template <typename Operator>
OrtStatus* add(const OrtApi* api, OrtCustomOpDomain* domain) {
  static const Registered<Operator> one;
  return call<OrtStatus*>(api, kCustomOpDomainAdd, domain, static_cast<const OrtCustomOp*>(&one));
}

}  // namespace
}  // namespace worldenv

// What the runtime looks up in the library, once for each session. A domain is kept for as long as the process lasts:
// sessions refer to it.
extern "C" [[gnu::visibility("default")]] OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                       const OrtApiBase* base) {
  using namespace worldenv;
  using namespace worldenv::ort;
  const OrtApi* api = base->get_api(kVersion);
  static std::mutex one_at_a_time;
  static OrtCustomOpDomain* whole = nullptr;
  const std::lock_guard lock(one_at_a_time);
  if (!whole) {
    OrtCustomOpDomain* domain = nullptr;
    if (OrtStatus* status = call<OrtStatus*>(api, kCreateCustomOpDomain, "worldenv", &domain)) return status;
    for (const auto one : {add<GroupNormOperator>, add<LayerNormOperator>, add<GatedGeluOperator>,
                           add<NarrowConvOperator>, add<WinogradConvOperator>, add<FewKeysOperator>})
      if (OrtStatus* status = one(api, domain)) return status;
    whole = domain;
  }
  return call<OrtStatus*>(api, kAddCustomOpDomain, options, whole);
}
