// A "cuda" back end without a GPU, for tests/pretend_gpu.py: memory of the host, operators of the CPU, and the refusals
// of a GPU.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

constexpr c10::DeviceIndex kGpus = 2;
thread_local c10::DeviceIndex current = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before(c10::kCUDA, current);
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {c10::kCUDA, current}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < kGpus, "CUDA error: invalid device ordinal");
    current = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kGpus; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// Draws as a CPU's, and is refused where one of a CPU is wanted, as a GPU's is.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(c10::DeviceIndex index, at::Generator draws = at::detail::createCPUGenerator())
      : GeneratorImpl({c10::kCUDA, index}, c10::DispatchKeySet(c10::DispatchKey::CUDA)), host(std::move(draws)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.unsafeGetGeneratorImpl()->seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(device().index(), host.clone()); }

  at::Generator host;
};

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  // what is only traced is laid out as cuDNN would have it; what runs never asks
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  long versionCuDNN() const override { return 91300; }
  long versionRuntimeCuDNN() const override { return 91300; }
  long versionCuDNNFrontend() const override { return 11500; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kGpus; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current : index);
  }
  c10::DeviceIndex current_device() const override { return current; }
};

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks);
}

namespace {

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr host = c10::GetCPUAllocator()->allocate(bytes);
    void* data = host.get();
    const c10::DeleterFnPtr release = host.get_deleter();
    return {data, host.release_context(), release, c10::Device(c10::kCUDA, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Allocator allocator;

void forget(void* kept) { delete static_cast<c10::Storage*>(kept); }

// The same memory, said to be on `device`.
c10::Storage said_to_be_on(const c10::Storage& storage, c10::Device device) {
  auto* kept = new c10::Storage(storage);
  c10::Allocator* resizes = device.is_cpu() ? nullptr : &allocator;
  return {c10::Storage::use_byte_size_t(), storage.nbytes(),
          c10::DataPtr(storage.mutable_data(), kept, &forget, device), resizes, false};
}

at::Tensor like(const c10::Storage& storage, const at::Tensor& shape, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), shape.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(shape.sizes(), shape.strides(), shape.storage_offset());
  return made;
}

at::Tensor host(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  if (tensor.numel() == 0)
    return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(c10::kCPU));  // may be resized
  at::Tensor made = like(said_to_be_on(tensor.storage(), c10::kCPU), tensor, c10::DispatchKey::CPU);
  if (tensor.is_conj()) made._set_conj(true);
  if (tensor.is_neg()) made._set_neg(true);
  return made;
}

// `tensor`, which an operator of the CPU made, as one of the GPU; a view of `given`, where it has its memory.
at::Tensor gpu(const at::Tensor& tensor, c10::Device home, const std::vector<at::Tensor>& given) {
  if (!tensor.defined()) return tensor;
  for (const at::Tensor& one : given) {
    if (one.is_cuda() && one.storage().data() == tensor.storage().data() && tensor.storage().data() != nullptr) {
      return like(one.storage(), tensor, c10::DispatchKey::CUDA);
    }
  }
  return like(said_to_be_on(tensor.storage(), home), tensor, c10::DispatchKey::CUDA);
}

c10::IValue mapped(const c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> all;
    for (const at::Tensor& one : value.toTensorVector()) all.push_back(change(one));
    return all;
  }
  if (value.isList() && value.toListRef().size() > 0) {
    c10::List<c10::IValue> found = value.toList();
    if (found.elementType()->kind() == c10::TypeKind::OptionalType) {
      c10::List<std::optional<at::Tensor>> all;
      for (const c10::IValue& one : value.toListRef()) {
        if (!one.isTensor() && !one.isNone()) return value;
        all.push_back(one.isNone() ? std::nullopt : std::optional<at::Tensor>(change(one.toTensor())));
      }
      return all;
    }
  }
  return value;
}

// Indices may be on the CPU, where what is indexed is on a GPU.
bool index_on_cpu(const std::string& name, size_t argument) {
  return argument == 1 && (name == "aten::index" || name == "aten::index_put_" || name == "aten::index_put" ||
                           name == "aten::_index_put_impl_");
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  const auto first = stack->end() - static_cast<std::ptrdiff_t>(count);
  std::vector<c10::IValue> arguments(first, stack->end());
  std::vector<at::Tensor> given;
  std::optional<c10::Device> home;
  const char* refused = "Expected all tensors to be on the same device, but found at least two devices, ";
  for (size_t i = 0; i < count; ++i) {
    mapped(arguments[i], [&](const at::Tensor& one) {
      if (!one.defined()) return one;
      if (one.is_cuda()) {
        given.push_back(one);
        TORCH_CHECK(!home || *home == one.device(), refused, home->str(), " and ", one.device().str(), "! (",
                    schema.name(), ")");
        if (!home) home = one.device();
      }
      return one;
    });
  }
  bool to_host = false;
  for (size_t i = 0; i < count; ++i) {
    if (arguments[i].isDevice()) {
      to_host = arguments[i].toDevice().is_cpu();
      if (!to_host) home = arguments[i].toDevice();
      arguments[i] = c10::Device(c10::kCPU);
    }
  }
  for (size_t i = 0; i < count && home; ++i) {
    mapped(arguments[i], [&](const at::Tensor& one) {
      const bool scalar =
          one.defined() && one.dim() == 0 && arguments[i].isTensor();  // one number may come from the CPU
      const bool there = !one.defined() || one.is_cuda() || scalar || index_on_cpu(schema.name(), i);
      TORCH_CHECK(there, refused, "cpu and ", home->str(), "! (", schema.name(), ")");
      return one;
    });
  }
  const bool drawn_there = home.has_value();  // an operator comes here by its generator's device too
  if (!home) home = c10::Device(c10::kCUDA, current);
  std::vector<c10::IValue> plain;
  for (const c10::IValue& one : arguments) {
    if (one.isGenerator()) {
      auto* drawing = dynamic_cast<Generator*>(one.toGenerator().unsafeGetGeneratorImpl());
      TORCH_CHECK(drawing != nullptr, "Expected a 'cuda' device type for generator but found 'cpu'");
      TORCH_CHECK(drawn_there, "Expected a 'cpu' device type for generator but found 'cuda'");
      plain.push_back(drawing->host);
    } else {
      plain.push_back(mapped(one, host));
    }
  }
  torch::jit::Stack inner = plain;
  op.callBoxed(&inner);
  torch::jit::pop(*stack, count);
  for (size_t i = 0; i < inner.size(); ++i) {
    const auto* alias = schema.returns()[i].alias_info();
    std::optional<c10::IValue> same;
    for (size_t j = 0; alias && alias->isWrite() && j < count && !same; ++j) {
      const auto* written = schema.arguments()[j].alias_info();
      if (written && written->isWrite() && written->beforeSets() == alias->beforeSets()) {
        same = arguments[j];
        if (arguments[j].isTensor()) {  // its shape may have changed
          const at::Tensor after = plain[j].toTensor();
          at::Tensor one = arguments[j].toTensor();
          if (one.sizes() != after.sizes() || one.strides() != after.strides()) {
            TORCH_CHECK(one.storage().data() == after.storage().data() || one.numel() == 0,
                        "pretend_gpu: ", schema.name(), " moved its memory");
            if (one.storage().data() != after.storage().data())
              one.unsafeGetTensorImpl()->set_storage_keep_dtype(said_to_be_on(after.storage(), *home));
            one.unsafeGetTensorImpl()->set_sizes_and_strides(after.sizes(), after.strides(), after.storage_offset());
          }
        }
      }
    }
    stack->push_back(
        same ? *same : mapped(inner[i], [&](const at::Tensor& one) { return to_host ? one : gpu(one, *home, given); }));
  }
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard there(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA), at::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard there(device);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA), at::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool) {
  host(to).copy_(host(from));
  return to;
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(self.storage()),
                                                             c10::DispatchKeySet(c10::DispatchKey::CUDA), self.dtype());
  const int64_t start = offset ? offset->expect_int() : self.storage_offset();
  made.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                                    start);
  return made;
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                                    offset.expect_int());
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, c10::Storage storage) {
  const c10::SymInt count(static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize())), one(1);
  return set_storage(self, std::move(storage), 0, {&count, 1}, {&one, 1});
}

// What runs is the CPU's own; what is only traced for a GPU is written as it would be there: flash attention (1), or
// with a mask or in float32 the memory-efficient one (2).
int64_t choose_attention(const at::Tensor& query, const at::Tensor&, const at::Tensor&,
                         const std::optional<at::Tensor>& mask, double, bool, std::optional<double>, bool) {
  if (!query.unsafeGetTensorImpl()->is_python_dispatch()) return 0;
  return mask || query.scalar_type() == at::kFloat ? 2 : 1;
}

at::Scalar item(const at::Tensor& self) { return at::_local_scalar_dense(host(self)); }

const bool chosen = [] {
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  return true;
}();

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  // for any device, but they look for kernels of the GPU inside
  for (const char* name : {"convolution", "convolution_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("copy_", &copy_);
  library.impl("as_strided", &as_strided);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("_local_scalar_dense", &item);
}

}  // namespace
