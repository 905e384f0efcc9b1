// tinyres._cpu: the CPU's kernels over NumPy arrays, its thread pool and its allocator.
#include <pybind11/numpy.h>

#include <new>

namespace tinyres {
using Array = pybind11::array;
constexpr bool BFLOAT16 = false;
constexpr bool readable() { return true; }
inline void begin_call() {}
}  // namespace tinyres

#include "bindings.h"
#include "dispatch.h"
#include "memory.h"
#include "parallel.h"
#include "random.h"

namespace tinyres {
namespace {

// Memory ------------------------------------------------------------------------------------------------------------

Array empty(const std::vector<py::ssize_t>& shape, const py::object& dtype) {
  const py::dtype type = py::dtype::from_args(dtype);
  const Call call("empty");
  // Others hold references or sizes of their own, which undefined contents would break.
  const bool number = std::string_view("biuf").find(type.kind()) != std::string_view::npos;
  call.expect(number || is_bfloat16(type), "dtype must be a number");
  i64 bytes = type.itemsize();
  bool fits = true;
  for (const i64 size : shape) {
    call.expect(size >= 0, "sizes must not be negative");
    fits = fits && !__builtin_mul_overflow(bytes, std::max<i64>(size, 1), &bytes);
  }
  const auto wanted = [&] { return text(Shape(shape)) + " " + std::string(py::str(type)); };
  if (!fits) call.out_of_memory(wanted(), "more bytes than can be counted");

  void* block = nullptr;
  try {
    block = memory_take(std::size_t(bytes));
  } catch (const std::bad_alloc& error) {
    call.out_of_memory(wanted(), error.what());
  }
  PyObject* const owner =
      PyCapsule_New(block, nullptr, [](PyObject* capsule) { memory_return(PyCapsule_GetPointer(capsule, nullptr)); });
  if (!owner) {
    memory_return(block);
    throw py::error_already_set();
  }
  return Array(type, shape, {}, block, py::reinterpret_steal<py::object>(owner));
}

py::dict stats() {
  const MemoryStats stats = memory_stats();
  py::dict result;
  result["system_allocations"] = stats.system_allocations;
  result["taken"] = stats.taken;
  result["bytes_in_use"] = stats.bytes_in_use;
  result["peak_bytes_in_use"] = stats.peak_bytes_in_use;
  result["bytes_held"] = stats.bytes_held;
  return result;
}

void philox_bits(const Array& out, std::uint64_t key, std::uint64_t draw) {
  std::uint32_t* const bits = Call("philox").out<std::uint32_t>("out", out, Shape(out));
  const NoGil released;
  philox::philox_fill(bits, out.size(), key, draw);
}

}  // namespace
}  // namespace tinyres

PYBIND11_MODULE(_cpu, module) {
  using namespace tinyres;
  namespace py = pybind11;
  module.doc() = "CPU kernels of tinyres; tinyres/backend/adapter.py is the way in";
  choose_isa();
  module.def("isa", &isa, "The instruction set in use");
  module.def("isas", &isas, "The instruction sets that this machine can run");

  module.def("threads", &threads, "Threads used by calls from this thread");
  module.def(
      "set_threads",
      [](int count) {
        Call("set_threads").expect(count >= 0 && count <= 1024, "threads must be between 0 (the default) and 1024");
        set_threads(count);
      },
      "Threads for calls from this thread; 0 returns to the default");
  module.def("default_threads", &default_threads, "OMP_NUM_THREADS, else the CPUs that this process may use");

  module.def("empty", &empty, "An uninitialised array (shape, dtype) in pooled memory");
  module.def("memory_stats", &stats, "Counters of the allocator");
  module.def("memory_reset_peak", &memory_reset_peak, "Starts peak_bytes_in_use from the present use");
  module.def("memory_release", &memory_release, "Gives waiting blocks back to the system");

  define_kernels(module);
  module.attr("conv_algorithms") = py::make_tuple("auto", "naive", "direct", "winograd");
  module.def("philox", &philox_bits);
}
