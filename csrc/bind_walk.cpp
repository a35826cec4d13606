#include "bind_walk.h"

#include "cpu/speed.h"
#include "cpu/walk.h"

namespace py = pybind11;

void bind_walk(py::module_& m) {
  namespace cpu = spnet::cpu;
  py::enum_<cpu::Precision>(m, "Precision")
      .value("float32", cpu::Precision::float32)
      .value("bfloat16", cpu::Precision::bfloat16);
  m.def("has_bfloat16", &cpu::has_bfloat16,
        "Whether plans of bfloat16 maps and weights run here: the processor, the build and the level in use "
        "have AVX512_BF16.");

  py::class_<cpu::PackedPlan>(m, "Plan", "A routed network for the native walk; csrc/plan.h says the format.")
      .def(py::init(
               [](Address ints, int64_t n_ints, Address floats, int64_t n_floats, cpu::Precision precision) {
                 return new cpu::PackedPlan(reinterpret_cast<const int64_t*>(ints), n_ints,
                                            reinterpret_cast<const float*>(floats), n_floats, precision);
               }),
           py::arg("ints"), py::arg("n_ints"), py::arg("floats"), py::arg("n_floats"),
           py::arg("precision") = cpu::Precision::float32, py::call_guard<py::gil_scoped_release>())
      .def(
          "run",
          [](const cpu::PackedPlan& plan, Address x, int64_t batch, int64_t stride_n, int64_t stride_c,
             int64_t stride_h, int64_t stride_w, Address paths, float threshold, Address logits,
             Address decisions, int threads, bool is_bfloat16) {
            const spnet::WalkBatch work = batch_of(x, batch, stride_n, stride_c, stride_h, stride_w, paths,
                                                   threshold, logits, decisions);
            cpu::walk(plan, work, is_bfloat16, threads);
          },
          "Logits (float32) [batch, classes] and decisions (uint8) [batch, blocks] of x (float32, or "
          "bfloat16 where the plan is); strides in elements. With paths (bool [batch, blocks], address "
          "not 0) no router is computed.",
          py::arg("x"), py::arg("batch"), py::arg("stride_n"), py::arg("stride_c"), py::arg("stride_h"),
          py::arg("stride_w"), py::arg("paths"), py::arg("threshold"), py::arg("logits"),
          py::arg("decisions"), py::arg("threads"), py::arg("is_bfloat16") = false,
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("workspace_bytes", &cpu::PackedPlan::workspace_bytes,
                             "Working memory of each thread that runs a sample, in bytes.")
      .def_readonly("precision", &cpu::PackedPlan::precision)
      .def_property_readonly(
          "level", [](const cpu::PackedPlan& plan) { return cpu::level_name(plan.level); },
          "The instruction-set level that the weights are packed for.");

  m.def(
      "fma_gflops", &cpu::fma_gflops,
      "What the processor reaches in a loop of nothing but fused multiply-adds on registers, at the level in "
      "use.",
      py::arg("threads"), py::arg("seconds"), py::arg("precision") = cpu::Precision::float32,
      py::call_guard<py::gil_scoped_release>());
  m.def("conv_gflops", &cpu::conv_gflops,
        "What the walk's 3x3 convolution reaches on maps [channels, height, width], one in each thread, "
        "counted as the direct one.",
        py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("threads"), py::arg("seconds"),
        py::arg("precision") = cpu::Precision::float32, py::call_guard<py::gil_scoped_release>());
}
