#include "bind_cuda_walk.h"

#include <memory>
#include <stdexcept>

#include "bind_walk.h"
#include "cpu/rows.h"
#include "cuda/emulated_walk.h"
#include "cuda/half.h"
#include "plan.h"
#ifdef SPNET_CUDA_ARCHITECTURES
#include "cuda/walk.h"
#endif

namespace py = pybind11;

namespace {

namespace cuda = spnet::cuda;
using spnet::cpu::Dtype;

// Reads the tables and calls make with them and a value of the dtype's type.
template <class Make>
auto with_plan(Address ints, int64_t n_ints, Address floats, int64_t n_floats, Dtype dtype,
               const Make& make) {
  const auto* values = reinterpret_cast<const float*>(floats);
  const spnet::Plan plan = spnet::read_plan(reinterpret_cast<const int64_t*>(ints), n_ints, values, n_floats);
  if (dtype == Dtype::float16) return make(plan, values, cuda::Float16());
  if (dtype == Dtype::bfloat16) return make(plan, values, cuda::BFloat16());
  throw std::invalid_argument("plan: dtype: expected float16 or bfloat16");
}

struct EmulatedPlan {
  cuda::WalkLayout layout;
  Dtype dtype;
};

constexpr const char* kRun =
    "Logits (float32) [batch, classes] and decisions (uint8) [batch, blocks] of x (the plan's dtype); "
    "strides in elements. With paths (bool [batch, blocks], address not 0) no router is computed.";

void bind_emulated(py::module_& m) {
  py::class_<EmulatedPlan>(
      m, "EmulatedCudaPlan",
      "The CUDA walk on host memory, for tests: the kernel's own source, thousands of times slower.")
      .def(py::init([](Address ints, int64_t n_ints, Address floats, int64_t n_floats, Dtype dtype,
                       int64_t shared_limit) {
             return with_plan(ints, n_ints, floats, n_floats, dtype,
                              [&](const spnet::Plan& plan, const float* values, auto element) {
                                return EmulatedPlan{
                                    cuda::lay_out_walk<decltype(element)>(plan, values, shared_limit), dtype};
                              });
           }),
           py::arg("ints"), py::arg("n_ints"), py::arg("floats"), py::arg("n_floats"), py::arg("dtype"),
           py::arg("shared_limit"), py::call_guard<py::gil_scoped_release>())
      .def(
          "run",
          [](const EmulatedPlan& plan, Address x, int64_t batch, int64_t stride_n, int64_t stride_c,
             int64_t stride_h, int64_t stride_w, Address paths, float threshold, Address logits,
             Address decisions, int thread_blocks) {
            const spnet::WalkBatch work = batch_of(x, batch, stride_n, stride_c, stride_h, stride_w, paths,
                                                   threshold, logits, decisions);
            const auto emulate = plan.dtype == Dtype::float16 ? cuda::emulate_walk<cuda::Float16>
                                                              : cuda::emulate_walk<cuda::BFloat16>;
            return emulate(plan.layout, work, thread_blocks);
          },
          kRun, py::arg("x"), py::arg("batch"), py::arg("stride_n"), py::arg("stride_c"), py::arg("stride_h"),
          py::arg("stride_w"), py::arg("paths"), py::arg("threshold"), py::arg("logits"),
          py::arg("decisions"), py::arg("thread_blocks"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly(
          "shared_bytes", [](const EmulatedPlan& plan) { return plan.layout.network.shared_bytes; },
          "Shared memory of a thread block.");
}

#ifdef SPNET_CUDA_ARCHITECTURES
void bind_device(py::module_& m) {
  py::class_<cuda::DevicePlan>(
      m, "CudaPlan", "A routed network on a device, in float16 or bfloat16; csrc/plan.h says the format.")
      .def(py::init(
               [](Address ints, int64_t n_ints, Address floats, int64_t n_floats, Dtype dtype, int device) {
                 return with_plan(ints, n_ints, floats, n_floats, dtype,
                                  [&](const spnet::Plan& plan, const float* values, auto element) {
                                    return cuda::DevicePlan::make<decltype(element)>(plan, values, device);
                                  });
               }),
           py::arg("ints"), py::arg("n_ints"), py::arg("floats"), py::arg("n_floats"), py::arg("dtype"),
           py::arg("device"), py::call_guard<py::gil_scoped_release>())
      .def(
          "run",
          [](const cuda::DevicePlan& plan, Address x, int64_t batch, int64_t stride_n, int64_t stride_c,
             int64_t stride_h, int64_t stride_w, Address paths, float threshold, Address logits,
             Address decisions, Address stream) {
            plan.run(batch_of(x, batch, stride_n, stride_c, stride_h, stride_w, paths, threshold, logits,
                              decisions),
                     stream);
          },
          kRun, py::arg("x"), py::arg("batch"), py::arg("stride_n"), py::arg("stride_c"), py::arg("stride_h"),
          py::arg("stride_w"), py::arg("paths"), py::arg("threshold"), py::arg("logits"),
          py::arg("decisions"), py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("shared_bytes", &cuda::DevicePlan::shared_bytes,
                             "Shared memory of a thread block.");
}
#endif

}  // namespace

void bind_cuda_walk(py::module_& m) {
  bind_emulated(m);
#ifdef SPNET_CUDA_ARCHITECTURES
  bind_device(m);
#endif
}
