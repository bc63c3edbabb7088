// The few functions of ONNX Runtime's C interface that an operator needs. The interface is a table whose entries never
// move once they are published (all of these are of version 1, 101 entries), so their numbers are a fact like a file
// format's; Python wheels come without its header.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtApi;

struct OrtApiBase {
  const OrtApi* (*get_api)(std::uint32_t version);
  const char* (*get_version)();
};

// What the runtime is told of an operator, as of version 8 of the interface.
struct OrtCustomOp {
  std::uint32_t version;
  void* (*create)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*name)(const OrtCustomOp*);
  const char* (*provider)(const OrtCustomOp*);
  int (*input_type)(const OrtCustomOp*, std::size_t);
  std::size_t (*inputs)(const OrtCustomOp*);
  int (*output_type)(const OrtCustomOp*, std::size_t);
  std::size_t (*outputs)(const OrtCustomOp*);
  void (*compute)(void*, OrtKernelContext*);
  void (*destroy)(void*);
  int (*input_kind)(const OrtCustomOp*, std::size_t);
  int (*output_kind)(const OrtCustomOp*, std::size_t);
};
}

namespace worldenv::ort {

constexpr std::uint32_t kVersion = 8;
constexpr int kFloat = 1;     // ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
constexpr int kRequired = 0;  // INPUT_OUTPUT_REQUIRED

// Numbers of entries in OrtApi.
enum Entry : std::size_t {
  kGetErrorMessage = 2,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kGetAttributeFloat = 85,
  kGetAttributeInt = 86,
  kGetInput = 90,
  kGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorTypeAndShapeInfo = 99,
};

// Calls an entry of the table.
template <typename Result, typename... Given>
Result call(const OrtApi* api, Entry entry, Given... given) {
  const auto table = reinterpret_cast<Result (*const*)(Given...)>(api);
  return table[entry](given...);
}

}  // namespace worldenv::ort
