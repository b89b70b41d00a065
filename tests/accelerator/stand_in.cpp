// An accelerator for tests on a machine without one. Its memory is the computer's, and the CPU computes what it is asked
// for; but like a GPU it refuses tensors of another device, and under autocast, layers compute in half precision.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <cstdlib>

using at::Tensor;
using Sizes = c10::IntArrayRef;
using Strides = c10::SymIntArrayRef;
using Maybe = std::optional<Tensor>;
using Mask = std::array<bool, 3>;

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr auto KEY = c10::DispatchKey::PrivateUse1;
const c10::Device DEVICE(KIND, 0);

// -- memory --

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* place = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    return {place, place, &std::free, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = KIND;
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
const bool is_registered = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

// -- what every device has to do itself --

Tensor seen_by_cpu(const Tensor& t) {
  return t.is_cpu() ? t : at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU));
}

Tensor empty(Sizes size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(KEY), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(Sizes size, Sizes stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(KEY), c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  seen_by_cpu(to).copy_(seen_by_cpu(from).expand_as(to).clone());
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& t) { return seen_by_cpu(t).item(); }

const Tensor& resize(const Tensor& t, Strides size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor as_strided(const Tensor& t, Strides size, Strides stride, std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(t, size, stride, offset);
}

Tensor reshape_alias(const Tensor& t, Strides size, Strides stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor view(const Tensor& t, Strides size) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor& set_tensor(Tensor& t, const Tensor& source) { return at::native::set_tensor_(t, source); }

Tensor& set_storage(Tensor& t, at::Storage source) { return at::native::set_(t, source); }

Tensor& set_part(Tensor& t, at::Storage source, int64_t offset, Sizes size, Sizes stride) {
  return at::cpu::set_(t, source, offset, size, stride);
}

// -- layers that torch has no default for, or one that needs more --

void check_same(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.device() == b.device(), "A layer's input is on ", a.device(), ", its weights are on ", b.device(), ".");
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "Input type and weight type differ: ", a.scalar_type(), ", ",
              b.scalar_type(), ".");
}

Tensor single(const Tensor& t) { return t.cpu().to(at::kFloat); }  // CPUs are slow at half precision

Tensor like(const Tensor& t, const Tensor& other) {
  return t.defined() ? t.to(other.scalar_type()).contiguous().to(other.device()) : t;
}

Maybe on_cpu(const Maybe& t) { return t && t->defined() ? Maybe(t->cpu()) : std::nullopt; }

Tensor convolution(const Tensor& x, const Tensor& weight, const Maybe& bias, Sizes stride, Sizes padding, Sizes dilation,
                   bool transposed, Sizes output_padding, int64_t groups) {
  check_same(x, weight);
  Maybe offset;
  if (bias && bias->defined()) {
    check_same(x, *bias);
    offset = single(*bias);
  }
  return like(at::convolution(single(x), single(weight), offset, stride, padding, dilation, transposed, output_padding,
                              groups),
              x);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                                        Sizes stride, Sizes padding, Sizes dilation, bool transposed,
                                                        Sizes output_padding, int64_t groups, Mask mask) {
  check_same(x, weight);
  check_same(x, gradient);
  const int64_t channels = gradient.size(1);
  auto [of_x, of_weight, of_bias] =
      at::convolution_backward(single(gradient), single(x), single(weight), Sizes(&channels, 1), stride, padding,
                               dilation, transposed, output_padding, groups, mask);
  return {like(of_x, x), like(of_weight, x), like(of_bias, x)};
}

std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor& x, const Maybe& weight, const Maybe& bias, int64_t count,
                                              int64_t channels, int64_t pixels, int64_t groups, double eps) {
  if (weight && weight->defined()) check_same(weight->to(x.scalar_type()), x);
  auto [y, mean, deviation] = at::native_group_norm(x.cpu().contiguous(), on_cpu(weight), on_cpu(bias), count, channels,
                                                    pixels, groups, eps);
  return {y.to(DEVICE), mean.to(DEVICE), deviation.to(DEVICE)};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(const Tensor& gradient, const Tensor& x, const Tensor& mean,
                                                       const Tensor& deviation, const Maybe& weight, int64_t count,
                                                       int64_t channels, int64_t pixels, int64_t groups, Mask mask) {
  auto [a, b, c] = at::native_group_norm_backward(gradient.cpu().contiguous(), x.cpu().contiguous(), mean.cpu(),
                                                  deviation.cpu(), on_cpu(weight), count, channels, pixels, groups, mask);
  auto back = [](const Tensor& t) { return t.defined() ? t.to(DEVICE) : t; };
  return {back(a), back(b), back(c)};
}

// Everything else: torch's fallback computes on the CPU, and refuses tensors of different devices.
void compute_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("resize_", resize);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view", view);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("native_group_norm", group_norm);
  m.impl("native_group_norm_backward", group_norm_backward);
}

// -- autocast, with torch's own lists --

namespace at::autocast {
#define PICK(_1, _2, NAME, ...) NAME
#define HALF_1(op) KERNEL_PRIVATEUSEONE(op, lower_precision_fp)
#define HALF_2(op, overload) KERNEL_PRIVATEUSEONE(op, overload, lower_precision_fp)
#define HALF(...) PICK(__VA_ARGS__, HALF_2, HALF_1)(__VA_ARGS__)
#define SINGLE_1(op) KERNEL_PRIVATEUSEONE(op, fp32)
#define SINGLE_2(op, overload) KERNEL_PRIVATEUSEONE(op, overload, fp32)
#define SINGLE(...) PICK(__VA_ARGS__, SINGLE_2, SINGLE_1)(__VA_ARGS__)
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(HALF)
  AT_FORALL_FP32(SINGLE)
}
}  // namespace at::autocast
