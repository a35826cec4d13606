#include "bind_watch.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/fingerprint.h"
#include "cpu/pool.h"
#include "cpu/team.h"

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

// Where and how the tensors of some parts lie in memory: address, device, dtype, shape and strides of each.
class Layouts {
 public:
  Layouts(const std::vector<py::list>& parts, const py::capsule& exchange) : api_(exchange_api(exchange)) {
    for (const py::list& tensors : parts) {
      Part part{tensors, {}, {}};
      const bool all = each(tensors, [&](const void* values, size_t bytes) {
        part.layouts.append(static_cast<const char*>(values), bytes);
        return true;
      });
      if (!all) throw py::error_already_set();
      for (const py::handle tensor : tensors) {
        const auto address = [](const py::object& cdata) {
          return reinterpret_cast<const char*>(cdata.cast<std::uintptr_t>());
        };
        part.places.push_back({reinterpret_cast<const char*>(tensor.ptr()), address(tensor.attr("_cdata")),
                               address(tensor.attr("untyped_storage")().attr("_cdata"))});
      }
      parts_.push_back(std::move(part));
    }
  }

  int64_t parts() const { return parts_.size(); }

  bool unchanged(int64_t number) const {
    const Part& part = parts_[number];
    for (const Place& place : part.places) fetch(place);
    size_t at = 0;
    const bool same = each(part.tensors, [&part, &at](const void* values, size_t bytes) {
      const bool fits = at + bytes <= part.layouts.size();
      const bool same = fits && std::memcmp(&part.layouts[at], values, bytes) == 0;
      at += bytes;
      return same;
    });
    PyErr_Clear();  // a tensor has become one without memory
    return same;
  }

 private:
  // Where PyTorch kept what it reads of a tensor. It lies all over the memory, and would be waited for piece
  // by piece. Only ever a hint to the processor, so it does no harm that a tensor may have got another
  // storage.
  struct Place {
    const char *object, *tensor, *storage;
  };

  struct Part {
    py::list tensors;
    std::string layouts;
    std::vector<Place> places;
  };

  static void fetch(const Place& place) {
    __builtin_prefetch(place.object);
    for (int line = 0; line < 3; ++line) __builtin_prefetch(place.tensor + 64 * line);
    for (int line = 0; line < 2; ++line) __builtin_prefetch(place.storage + 64 * line);
  }

  // Hands the numbers of all tensors to take(values, bytes) until it returns false or there is a Python
  // error.
  template <class Take>
  bool each(const py::list& tensors, const Take& take) const {
    for (const py::handle tensor : tensors) {
      DLTensor t{};
      if (api_.tensor_from_object(tensor.ptr(), &t) != 0) return false;
      const auto address = reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset;
      const int32_t kind[] = {t.device_type, t.device_id, t.ndim, t.type_code, t.type_bits, t.type_lanes};
      const size_t row = t.ndim * sizeof(int64_t);
      const bool goes_on = take(&address, sizeof(address)) && take(kind, sizeof(kind)) &&
                           take(t.shape, row) && take(t.strides, row);
      if (!goes_on) return false;
    }
    return true;
  }

  const DLPackExchangeApi& api_;
  std::vector<Part> parts_;
};

// A number that no dictionary has had before, new at every change; 0 where Python does not tell.
uint64_t version(PyObject* dict) {
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

// Dictionaries and what they are to hold.
class Facts {
 public:
  explicit Facts(const std::vector<py::list>& lists) {
    for (const py::list& list : lists) {
      std::vector<Dictionary> dictionaries;
      std::vector<Instance> instances;
      const auto n = static_cast<Py_ssize_t>(list.size());
      for (Py_ssize_t i = 0; i < n;) {
        const bool is_own = i == 0 && list[i].is_none();
        Dictionary each{is_own ? nullptr : list[i].ptr(), i + 1, i + 1};
        while (each.end + 1 < n && py::isinstance<py::str>(list[each.end])) each.end += 2;
        if ((!is_own && !PyDict_Check(each.object)) ||
            (each.end < n && !PyDict_Check(list[each.end].ptr()))) {
          throw std::invalid_argument("facts: expected dictionaries, each before its keys and values");
        }
        dictionaries.push_back(each);
        for (i += 2; i < each.end; i += 2) {
          const py::object value = list[i];
          const py::type type = py::type::of(value);
          if (reinterpret_cast<PyTypeObject*>(type.ptr())->tp_flags & Py_TPFLAGS_HEAPTYPE) {
            instances.push_back({value.ptr(), type});
          }
        }
        i = each.end;
      }
      lists_.push_back({list, std::move(dictionaries), std::move(instances)});
    }
  }

  int64_t lists() const { return lists_.size(); }

  // May run beside the thread that has Python's lock, as long as that one runs no Python code: then nothing
  // in the lists and dictionaries moves, and nothing in here needs the lock.
  bool hold(int64_t number, const py::dict& own) {
    auto& [list, dictionaries, instances] = lists_[number];
    for (const Instance& each : instances) {
      if (py::type::handle_of(each.object).ptr() != each.type.ptr()) return false;
    }
    for (Dictionary& each : dictionaries) {
      PyObject* const dict = each.object == nullptr ? own.ptr() : each.object;
      const uint64_t now = version(dict);
      if (now != 0 && now == each.version) continue;
      PyObject *key = nullptr, *value = nullptr;
      Py_ssize_t i = each.begin;
      for (Py_ssize_t place = 0; PyDict_Next(dict, &place, &key, &value); i += 2) {
        if (i == each.end || PyList_GET_ITEM(list.ptr(), i) != key) return false;
        PyObject* const fact = PyList_GET_ITEM(list.ptr(), i + 1);
        if (fact != value && fact != Py_Ellipsis) return false;
      }
      if (i != each.end) return false;
      each.version = now;
    }
    return true;
  }

 private:
  struct Dictionary {
    PyObject* object;       // null: the own one
    Py_ssize_t begin, end;  // of its keys and values in the list
    uint64_t version = 0;   // at which it held them
  };

  // A value of a class that was written in Python may be given another class, of which no dictionary tells.
  struct Instance {
    PyObject* object;
    py::type type;
  };

  struct List {
    py::list entries;  // which hold the objects below
    std::vector<Dictionary> dictionaries;
    std::vector<Instance> instances;
  };

  std::vector<List> lists_;
};

// So many bytes are compared with Python's lock held, which takes a thread about a millisecond.
constexpr int64_t kMostLockedBytes = 16 * 1024 * 1024;

// One char for each part, not 0 where it is chosen: where its column of decisions has a True, or where it has
// no column.
std::string chosen_parts(int64_t parts, const char* decisions, int64_t rows, int64_t columns) {
  if (columns > parts) {
    throw std::invalid_argument("decisions: expected at most " + std::to_string(parts) + " columns, got " +
                                std::to_string(columns));
  }
  std::string chosen(parts, 1);
  std::fill_n(chosen.begin(), columns, 0);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; ++i) chosen[i] |= decisions[row * columns + i];
  }
  return chosen;
}

bool unchanged(Facts& facts, const py::dict& own, const Layouts* layouts,
               const spnet::cpu::Fingerprint* fingerprint, std::uintptr_t decisions, int64_t rows,
               int64_t columns, int threads) {
  namespace cpu = spnet::cpu;
  const int64_t parts = fingerprint == nullptr ? 0 : fingerprint->parts();
  if (layouts != nullptr && layouts->parts() != parts) {
    throw std::invalid_argument("layouts: expected " + std::to_string(parts) + " parts, got " +
                                std::to_string(layouts->parts()));
  }
  const std::string chosen = chosen_parts(parts, reinterpret_cast<const char*>(decisions), rows, columns);
  std::vector<int64_t> ranges;
  int64_t bytes = 0;
  for (int64_t range = 0; fingerprint != nullptr && range < fingerprint->ranges(); ++range) {
    if (!chosen[fingerprint->part(range)]) continue;
    ranges.push_back(range);
    bytes += fingerprint->bytes(range);
  }

  std::atomic<bool> same{true};
  // Parts below this one may be read: their tensors were found where they lay, in memory that the caller
  // holds.
  std::atomic<int64_t> found{layouts == nullptr ? parts : 0};
  const auto compare = [&](int64_t range) {
    for (cpu::Spin spin; found.load(std::memory_order_acquire) <= fingerprint->part(range); spin.wait()) {
      if (!same) return false;
    }
    return fingerprint->matches(range);
  };
  const int64_t lists = facts.lists(), all = lists + ranges.size();
  const auto check = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && same; ++i) {
      if (!(i < lists ? facts.hold(i, own) : compare(ranges[i - lists]))) same = false;
    }
  };
  // PyTorch is asked by the thread that has the lock. The others start with the facts, which wait for no
  // answer.
  const auto ask = [&] {
    for (int64_t part = found; part < parts && same; ++part) {
      if (chosen[part] && !layouts->unchanged(part)) {
        same = false;
      } else {
        found.store(part + 1, std::memory_order_release);
      }
    }
  };
  const int64_t locked = bytes <= kMostLockedBytes ? all : lists;
  cpu::parallel_for(locked, 1, threads, check, ask);
  if (locked < all && same) {
    py::gil_scoped_release release;
    cpu::parallel_for(all - locked, 1, threads,
                      [&](int64_t begin, int64_t end) { check(locked + begin, locked + end); });
  }
  return same;
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
           py::call_guard<py::gil_scoped_release>());
  py::class_<Layouts>(
      m, "Layouts",
      "Address, device, dtype, shape and strides of the tensors of some parts, a list of each; "
      "exchange is the __dlpack_c_exchange_api__ of their class.")
      .def(py::init<const std::vector<py::list>&, const py::capsule&>(), py::arg("parts"),
           py::arg("exchange"));
  py::class_<Facts>(m, "Facts",
                    "What dictionaries are to hold: lists of a dictionary, its keys (strings) and values by "
                    "turns, the next dictionary and so on. Any value will do for an Ellipsis; None in the "
                    "place of a list's first dictionary stands for one that is named later.")
      .def(py::init<const std::vector<py::list>&>(), py::arg("lists"));
  m.def(
      "unchanged", &unchanged,
      "Whether all dictionaries have the very same entries in the same order, and layouts and bytes of the "
      "chosen parts are what they were (None: of no part). own: the dictionary of which the facts have None. "
      "decisions: address of bool [rows, columns]; a part is chosen where its column has a True, or where it "
      "has no column. Bytes are read where the layouts of their part are what they were; many of them "
      "without Python's lock.",
      py::arg("facts"), py::arg("own"), py::arg("layouts"), py::arg("fingerprint"), py::arg("decisions"),
      py::arg("rows"), py::arg("columns"), py::arg("threads"));
}
