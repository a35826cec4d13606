// Python bindings. Memory comes as addresses, streams as handles: the core knows nothing of PyTorch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>

#include "bind_cuda_walk.h"
#include "bind_walk.h"
#include "bind_watch.h"
#include "cpu/level.h"
#include "cpu/rows.h"
#include "cuda/tiling.h"
#ifdef SPNET_CUDA_ARCHITECTURES
#include "cuda/rows.h"
#endif

namespace py = pybind11;

namespace {

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Other Python threads run meanwhile, unless the work is so short that handing the lock over would dominate
// it.
class LongWork {
 public:
  explicit LongWork(int64_t bytes) {
    if (bytes >= spnet::cpu::kSmallBytes) released_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> released_;
};

void bind_cpu(py::module_& m) {
  namespace cpu = spnet::cpu;
  py::enum_<cpu::Dtype>(m, "Dtype")
      .value("float32", cpu::Dtype::float32)
      .value("float64", cpu::Dtype::float64)
      .value("bfloat16", cpu::Dtype::bfloat16)
      .value("float16", cpu::Dtype::float16);

  m.def(
      "compact",
      [](Address mask, int64_t batch, Address out) {
        const LongWork work(batch);
        return cpu::compact(pointer<uint8_t>(mask), batch, pointer<int64_t>(out));
      },
      "Positions of non-zero bytes of mask [batch] into out [batch], ascending; returns their number.",
      py::arg("mask"), py::arg("batch"), py::arg("out"));
  m.def(
      "gather_rows",
      [](Address src, int64_t batch, Address index, int64_t n, Address dst, int64_t row_bytes, int threads) {
        const LongWork work(n * row_bytes);
        cpu::gather_rows(pointer<void>(src), batch, pointer<int64_t>(index), n, pointer<void>(dst), row_bytes,
                         threads);
      },
      "dst[i] = src[index[i]] for i in [0, n).", py::arg("src"), py::arg("batch"), py::arg("index"),
      py::arg("n"), py::arg("dst"), py::arg("row_bytes"), py::arg("threads"));
  m.def(
      "scatter_add_rows",
      [](Address dst, int64_t batch, Address index, int64_t n, Address src, int64_t row_elems,
         cpu::Dtype dtype, bool relu, int threads) {
        const LongWork work(n * row_elems);
        cpu::scatter_add_rows(pointer<void>(dst), batch, pointer<int64_t>(index), n, pointer<void>(src),
                              row_elems, dtype, relu, threads);
      },
      "dst[index[i]] = dst[index[i]] + src[i], or its ReLU, for i in [0, n).", py::arg("dst"),
      py::arg("batch"), py::arg("index"), py::arg("n"), py::arg("src"), py::arg("row_elems"),
      py::arg("dtype"), py::arg("relu"), py::arg("threads"));

  m.def(
      "cpu_level", [] { return std::string(cpu::level_name(cpu::level())); },
      "The instruction-set level in use.");
  m.def(
      "cpu_levels",
      [] {
        py::list names;
        for (const cpu::Level level : cpu::levels()) names.append(cpu::level_name(level));
        return names;
      },
      "The instruction-set levels that this processor runs, ascending.");
  m.def("set_cpu_level", &cpu::set_level, "Chooses a level, for tests and measurements.", py::arg("name"));
}

#ifdef SPNET_CUDA_ARCHITECTURES
void bind_cuda(py::module_ m) {
  namespace cuda = spnet::cuda;
  m.doc() = "The same operations on device memory and the caller's stream.";
  py::enum_<cuda::Dtype>(m, "Dtype")
      .value("float32", cuda::Dtype::float32)
      .value("bfloat16", cuda::Dtype::bfloat16)
      .value("float16", cuda::Dtype::float16);
  m.def(
      "compact",
      [](int device, Address stream, Address mask, int64_t batch, Address out, Address count) {
        cuda::compact({device, stream}, pointer<uint8_t>(mask), batch, pointer<int64_t>(out),
                      pointer<int64_t>(count));
      },
      "Positions of non-zero bytes of mask [batch] into out [batch], ascending; their number into count [1].",
      py::arg("device"), py::arg("stream"), py::arg("mask"), py::arg("batch"), py::arg("out"),
      py::arg("count"));
  m.def(
      "gather_rows",
      [](int device, Address stream, Address src, int64_t batch, Address index, Address count, int64_t n_max,
         Address dst, int64_t row_bytes) {
        cuda::gather_rows({device, stream}, pointer<void>(src), batch, pointer<int64_t>(index),
                          pointer<int64_t>(count), n_max, pointer<void>(dst), row_bytes);
      },
      "dst[i] = src[index[i]] for i below the number at count (address 0: n_max).", py::arg("device"),
      py::arg("stream"), py::arg("src"), py::arg("batch"), py::arg("index"), py::arg("count"),
      py::arg("n_max"), py::arg("dst"), py::arg("row_bytes"));
  m.def(
      "scatter_add_rows",
      [](int device, Address stream, Address dst, int64_t batch, Address index, Address count, int64_t n_max,
         Address src, int64_t row_elems, cuda::Dtype dtype, bool relu) {
        cuda::scatter_add_rows({device, stream}, pointer<void>(dst), batch, pointer<int64_t>(index),
                               pointer<int64_t>(count), n_max, pointer<void>(src), row_elems, dtype, relu);
      },
      "dst[index[i]] = dst[index[i]] + src[i], or its ReLU, for i below the number at count (address 0: "
      "n_max).",
      py::arg("device"), py::arg("stream"), py::arg("dst"), py::arg("batch"), py::arg("index"),
      py::arg("count"), py::arg("n_max"), py::arg("src"), py::arg("row_elems"), py::arg("dtype"),
      py::arg("relu"));
}
#endif

// The kernels' index arithmetic, so that tests reach it without a GPU.
void bind_tiling(py::module_ m) {
  namespace cuda = spnet::cuda;
  m.def("warp_span", [](int64_t n, int parts, int part) {
    const cuda::Span span = cuda::warp_span(n, parts, part);
    return py::make_tuple(span.begin, span.end);
  });
  m.def("tiles_per_row", &cuda::tiles_per_row);
  m.def("row_tile", [](int64_t tile, int64_t row_elems, int64_t tile_elems) {
    const cuda::Tile result = cuda::row_tile(tile, row_elems, tile_elems);
    return py::make_tuple(result.row, result.elems.begin, result.elems.end);
  });
  m.def("divide", [](int dividend, int divisor) { return cuda::Divisor::of(divisor).divide(dividend); });
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() =
      "The native core of spnet: operations on raw memory. Use spnet.execution.ops, which checks its input.";
  m.attr("version") = SPNET_VERSION;
  m.attr("compiler") = SPNET_COMPILER;
  m.attr("cuda_status") = SPNET_CUDA_STATUS;
  bind_cpu(m);
  bind_walk(m);
  bind_watch(m);
  bind_cuda_walk(m);
  bind_tiling(m.def_submodule("tiling"));
#ifdef SPNET_CUDA_ARCHITECTURES
  m.attr("cuda_architectures") = SPNET_CUDA_ARCHITECTURES;
  bind_cuda(m.def_submodule("cuda"));
#else
  m.attr("cuda_architectures") = py::none();
#endif
}
