#include "bind_watch.h"

#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "cpu/fingerprint.h"

namespace py = pybind11;

namespace {

// DLPack's table of functions, by which tensors are read without knowing whose they are; version 1 as in
// https://dmlc.github.io/dlpack/latest/c_api.html
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);  // borrows; not 0: a Python error is set
  void* current_stream;
};

const DLPackExchangeApi& exchange_api(const py::capsule& capsule) {
  const auto* api =
      static_cast<const DLPackExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->major != 1 || api->tensor_from_object == nullptr) {
    throw std::invalid_argument("exchange: expected DLPack 1 with its borrowing function, got version " +
                                std::to_string(api->major));
  }
  return *api;
}

// Where and how tensors lie in memory: address, device, dtype, shape and strides of each.
class Layouts {
 public:
  Layouts(py::list tensors, const py::capsule& exchange)
      : tensors_(std::move(tensors)), api_(exchange_api(exchange)) {
    each([this](const void* values, size_t bytes) {
      layouts_.append(static_cast<const char*>(values), bytes);
      return true;
    });
  }

  bool unchanged() const {
    size_t place = 0;
    return each([&](const void* values, size_t bytes) {
      const bool fits = place + bytes <= layouts_.size();
      const bool same = fits && std::memcmp(&layouts_[place], values, bytes) == 0;
      place += bytes;
      return same;
    });
  }

 private:
  // Hands the numbers of all tensors to take(values, bytes) until it returns false.
  template <class Take>
  bool each(const Take& take) const {
    for (const py::handle tensor : tensors_) {
      DLTensor t{};
      if (api_.tensor_from_object(tensor.ptr(), &t) != 0) throw py::error_already_set();
      const auto address = reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset;
      const int32_t kind[] = {t.device_type, t.device_id, t.ndim, t.type_code, t.type_bits, t.type_lanes};
      const size_t row = t.ndim * sizeof(int64_t);
      const bool goes_on = take(&address, sizeof(address)) && take(kind, sizeof(kind)) &&
                           take(t.shape, row) && take(t.strides, row);
      if (!goes_on) return false;
    }
    return true;
  }

  py::list tensors_;
  const DLPackExchangeApi& api_;
  std::string layouts_;
};

// No Python code runs in here, so nothing in the lists and dictionaries can move meanwhile.
bool holds(const py::list& facts, const py::dict& own) {
  PyObject* const list = facts.ptr();
  const Py_ssize_t n = PyList_GET_SIZE(list);
  const auto fact = [list](Py_ssize_t i) { return PyList_GET_ITEM(list, i); };
  for (Py_ssize_t i = 0; i < n;) {
    PyObject* const dict = fact(i) == Py_None ? own.ptr() : fact(i);
    ++i;
    if (!PyDict_Check(dict)) return false;
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t place = 0; PyDict_Next(dict, &place, &key, &value); i += 2) {
      if (i + 1 >= n || fact(i) != key) return false;
      if (fact(i + 1) != value && fact(i + 1) != Py_Ellipsis) return false;
    }
    if (i < n && !PyDict_Check(fact(i))) return false;
  }
  return true;
}

}  // namespace

void bind_watch(py::module_& m) {
  namespace cpu = spnet::cpu;
  py::class_<cpu::Fingerprint>(
      m, "Fingerprint", "What stands in n spans of memory, a table of (address, bytes, part) as int64.")
      .def(py::init([](std::uintptr_t spans, int64_t n, int64_t parts, int threads) {
             static_assert(sizeof(cpu::Span) == 3 * sizeof(int64_t), "read from a table of 64-bit integers");
             return new cpu::Fingerprint(reinterpret_cast<const cpu::Span*>(spans), n, parts, threads);
           }),
           py::arg("spans"), py::arg("n"), py::arg("parts"), py::arg("threads"),
           py::call_guard<py::gil_scoped_release>())
      .def(
          "matches",
          [](const cpu::Fingerprint& fingerprint, std::string_view chosen, const py::list& facts,
             const py::dict& own, int threads) {
            std::optional<py::gil_scoped_release> released;
            return fingerprint.matches(chosen, threads, [&] {
              const bool same = holds(facts, own);
              released.emplace();
              return same;
            });
          },
          "Whether every byte of the chosen parts (a bool of each, and their spans must still be there to be "
          "read) is what it was, and every one of the facts: a flat list of a dictionary, its keys (strings) "
          "and values by turns, the next dictionary and so on. Each must have the very same entries in the "
          "same order, but any value will do for an Ellipsis. None in the place of the first dictionary "
          "stands for own.",
          py::arg("chosen"), py::arg("facts"), py::arg("own"), py::arg("threads"));
  py::class_<Layouts>(m, "Layouts",
                      "Address, device, dtype, shape and strides of every tensor in a list; exchange is the "
                      "__dlpack_c_exchange_api__ of their class.")
      .def(py::init<py::list, py::capsule>(), py::arg("tensors"), py::arg("exchange"))
      .def("unchanged", &Layouts::unchanged);
}
