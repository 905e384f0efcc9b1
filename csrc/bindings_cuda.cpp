// tinyres._emulated and tinyres._cuda: the CUDA kernels, compiled for the CPU by the C++ compiler (TINYRES_EMULATED)
// or for the GPU by nvcc. Arrays are CuPy's, and NumPy's too where the kernels run on the CPU.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "gil.h"

#ifdef TINYRES_TRAFFIC
#include "cuda/compat/host/traffic.h"
#endif

#ifdef TINYRES_EMULATED
#define TINYRES_MODULE _emulated
#include "cuda/compat/cuda.h"
#else
#define TINYRES_MODULE _cuda
#include <cuda_runtime.h>
#endif

namespace tinyres {

#ifdef TINYRES_EMULATED
constexpr bool ON_HOST = true;
inline bool readable() { return !emulation::captured; }  // what is captured has not been worked out yet
#else
constexpr bool ON_HOST = false;
inline bool readable() { return false; }
#endif
constexpr bool BFLOAT16 = true;

// What pybind11's array has, of a NumPy array or of an array that lies elsewhere and tells its address by `.data.ptr`,
// as CuPy's do.
class Array {
 public:
  static constexpr int c_style = 1, MAX_AXES = 32;

  int flags() const { return dense_ ? c_style : 0; }
  bool writeable() const { return writeable_; }
  pybind11::dtype dtype() const { return dtype_; }
  pybind11::ssize_t itemsize() const { return dtype_.itemsize(); }
  pybind11::ssize_t ndim() const { return ndim_; }
  pybind11::ssize_t size() const { return size_; }
  const pybind11::ssize_t* shape() const { return shape_; }
  pybind11::ssize_t shape(pybind11::ssize_t axis) const { return shape_[axis]; }
  pybind11::ssize_t strides(pybind11::ssize_t axis) const { return strides_[axis]; }
  const void* data() const { return data_; }

  // Whether `source` is such an array; then this describes it.
  bool describe(pybind11::handle source) {
    namespace py = pybind11;
    if (py::isinstance<py::array>(source)) {
      if (!ON_HOST) return false;
      const auto array = py::reinterpret_borrow<py::array>(source);
      dtype_ = array.dtype();
      data_ = array.data();
      writeable_ = array.writeable();
      return set_axes(array.ndim(), array.shape(), array.strides());
    }
    const py::object data = py::getattr(source, "data", py::none());
    const py::object address = py::getattr(data, "ptr", py::none());
    if (address.is_none()) return false;
    dtype_ = source.attr("dtype").cast<py::dtype>();
    data_ = reinterpret_cast<const void*>(address.cast<std::uintptr_t>());
    writeable_ = true;
    const py::tuple shape = source.attr("shape"), strides = source.attr("strides");
    py::ssize_t sizes[MAX_AXES], steps[MAX_AXES];
    if (shape.size() > MAX_AXES) return false;
    for (std::size_t i = 0; i < shape.size(); i++) {
      sizes[i] = shape[i].cast<py::ssize_t>();
      steps[i] = strides[i].cast<py::ssize_t>();
    }
    return set_axes(py::ssize_t(shape.size()), sizes, steps);
  }

 private:
  bool set_axes(pybind11::ssize_t ndim, const pybind11::ssize_t* shape, const pybind11::ssize_t* strides) {
    if (ndim > MAX_AXES) return false;
    ndim_ = ndim;
    size_ = 1;
    dense_ = true;
    for (pybind11::ssize_t i = ndim - 1; i >= 0; i--) {
      shape_[i] = shape[i];
      strides_[i] = strides[i];
      dense_ = dense_ && (shape[i] == 1 || strides[i] == size_ * itemsize());
      size_ *= shape[i];
    }
    dense_ = dense_ || size_ == 0;
    return true;
  }

  pybind11::dtype dtype_;
  const void* data_ = nullptr;
  bool writeable_ = false, dense_ = false;
  pybind11::ssize_t ndim_ = 0, size_ = 0, shape_[MAX_AXES], strides_[MAX_AXES];
};

// What the launchers ask of their caller (cuda/common.h), answered by the adapter in Python ---------------------------

namespace {

pybind11::object* allocate = nullptr;  // (bytes) -> an array of that size
pybind11::object* stream = nullptr;    // () -> the address of the stream to launch on; nullptr: the default one
thread_local cudaStream_t stream_of_call = nullptr;

void begin_call() {
  stream_of_call = nullptr;
  if (stream)
    enter_interpreter([] { stream_of_call = reinterpret_cast<cudaStream_t>((*stream)().cast<std::uintptr_t>()); });
}

}  // namespace

cudaStream_t current_stream() { return stream_of_call; }

thread_local std::vector<std::pair<void*, pybind11::object>> scratch_blocks;

void* scratch_take(std::size_t bytes) {
  const Gil gil;
  if (!allocate) throw pybind11::value_error("scratch memory needs an allocator: call connect first");
  enter_interpreter([bytes] {
    pybind11::object block = (*allocate)(bytes);
    Array array;
    if (!array.describe(block) || !array.flags() || std::size_t(array.size() * array.itemsize()) < bytes)
      throw pybind11::type_error("the allocator must return a dense array of as many bytes as it was asked for");
    scratch_blocks.emplace_back(const_cast<void*>(array.data()), std::move(block));
  });
  return scratch_blocks.back().first;
}

void scratch_return(void* block) noexcept {
  const Gil gil;
  for (auto held = scratch_blocks.begin(); held != scratch_blocks.end(); ++held) {
    if (held->first != block) continue;
    enter_interpreter([held] { scratch_blocks.erase(held); });
    return;
  }
}

}  // namespace tinyres

namespace pybind11::detail {
template <>
struct type_caster<tinyres::Array> {
  PYBIND11_TYPE_CASTER(tinyres::Array, const_name("array"));
  bool load(handle source, bool) { return value.describe(source); }
};
}  // namespace pybind11::detail

#include "bindings.h"

PYBIND11_MODULE(TINYRES_MODULE, module) {
  using namespace tinyres;
  namespace py = pybind11;
  module.doc() = "CUDA kernels of tinyres; tinyres/backend/cuda.py is the way in";
  define_kernels(module);
  module.attr("conv_algorithms") = py::make_tuple("auto", "naive", "tiled", "mma", "direct");
  module.def(
      "connect",
      [](const py::object& allocator, const py::object& stream_address) {
        delete std::exchange(allocate, new py::object(allocator));
        delete std::exchange(stream, stream_address.is_none() ? nullptr : new py::object(stream_address));
      },
      "Where scratch memory comes from, (bytes) -> array, and the stream that is launched on, () -> address or None");
  module.def("launches", &launch_count, "How many kernels this thread has launched, or captured");
#ifdef TINYRES_EMULATED
  // What CuPy's Stream and Graph do on a GPU.
  using emulation::captured, emulation::Graph;
  py::class_<Graph>(module, "Graph", py::module_local())
      .def("launch",
           [](const Graph& graph) {
             const NoGil released;
             for (const auto& run : graph.launches) run();
           })
      .def("__len__", [](const Graph& graph) { return graph.launches.size(); });
  module.def("begin_capture", [] {
    if (captured) throw py::value_error("this thread captures already");
    captured = new Graph;
  });
  module.def("end_capture", [] {
    if (!captured) throw py::value_error("this thread does not capture");
    return std::unique_ptr<Graph>(std::exchange(captured, nullptr));
  });
#endif
#ifdef TINYRES_TRAFFIC
  namespace traffic = emulation::traffic;
  module.def(
      "mark",
      [](std::uintptr_t at, std::size_t bytes, bool marked) {
        traffic::mark(reinterpret_cast<void*>(at), bytes, marked);
      },
      "Count the array at this address apart from now on, or no longer");
  module.def(
      "take_launches",
      [] {
        const auto sizes = [](dim3 d) { return py::make_tuple(d.x, d.y, d.z); };
        const auto counts = [](const traffic::Bytes& b) { return py::make_tuple(b.asked, b.marked, b.others); };
        py::list launches;
        for (const traffic::Launch& l : traffic::take())
          launches.append(
              py::make_tuple(l.op, l.kernel, sizes(l.grid), sizes(l.block), counts(l.read), counts(l.written)));
        return launches;
      },
      "Since the last call: (op, kernel's offset, grid, block, read, written), bytes as (asked, marked, others)");
#endif
}
