// One Python function for each kernel of the table, arguments in the same order; shared by the extensions, each of
// which says first what an Array is. A binding checks that the arrays are what the kernel will take them for, because
// a wrong pointer ends the interpreter; rules of the operation itself are the op's to check and to word.
// Letters: N batch, H W input size, C channels, K filters, R S window, P Q output size.
//
// Before this header, the including file defines in namespace tinyres:
//   Array                       pybind11's NumPy array, or another type with the members used here
//   bool readable()             whether the bindings may read the elements now, to check indices among them
//   constexpr bool BFLOAT16     whether there is a table for bf16; else its kernels are those of float (see Call)
//   void begin_call()           called first by every binding
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "gil.h"
#include "kernels.h"
#include "memory.h"

namespace tinyres {
namespace {

namespace py = pybind11;

using OptionalArray = std::optional<Array>;
using Pair = std::pair<i64, i64>;

// Far beyond any use, and small enough that no index computed from it can overflow.
constexpr i64 MAX_WINDOW = i64(1) << 20;

constexpr const char* BINARY_NAMES[] = {"add", "sub", "mul", "div", "pow", "maximum"};
constexpr const char* UNARY_NAMES[] = {"neg", "exp", "log", "sqrt", "sigmoid", "tanh", "relu"};
constexpr const char* ALGORITHM_NAMES[] = {"auto", "naive", "direct", "tiled", "winograd", "mma"};

// The sizes that an array must have: up to four given, or those of another array, or of a list.
struct Shape {
  Shape(std::initializer_list<py::ssize_t> sizes) : size(given), rank(py::ssize_t(sizes.size())) {
    std::copy(sizes.begin(), sizes.end(), given);
  }
  explicit Shape(const Array& array) : size(array.shape()), rank(array.ndim()) {}
  explicit Shape(const std::vector<py::ssize_t>& sizes) : size(sizes.data()), rank(py::ssize_t(sizes.size())) {}
  Shape(const Shape&) = delete;

  py::ssize_t given[4];
  const py::ssize_t* size;
  py::ssize_t rank;
};

std::string text(const Shape& shape) {
  std::string result = "(";
  for (py::ssize_t i = 0; i < shape.rank; i++) result += (i ? ", " : "") + std::to_string(shape.size[i]);
  return result + (shape.rank == 1 ? ",)" : ")");
}

constexpr char NATIVE = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? '<' : '>';  // as it is called after a swap

inline bool is_native(const py::dtype& type) {
  return type.byteorder() == '=' || type.byteorder() == '|' || type.byteorder() == NATIVE;
}

// NumPy has no such type of its own, but others teach it one of this name, to which it gives a number.
inline bool is_bfloat16(const py::dtype& type) {
  static int number = -1;
  if (type.kind() != 'V' || type.itemsize() != 2 || !is_native(type)) return false;
  if (number < 0 && std::string(py::str(type)) == "bfloat16") number = type.num();
  return type.num() == number;
}

template <class T>
bool is(const py::dtype& type) {
  if constexpr (std::is_same_v<T, bf16>) return is_bfloat16(type);
  const char kind = std::is_floating_point_v<T> ? 'f' : std::is_signed_v<T> ? 'i' : 'u';
  return type.kind() == kind && type.itemsize() == py::ssize_t(sizeof(T)) && is_native(type);
}

template <class T>
bool holds(const Array& array) {
  return is<T>(array.dtype());
}

template <class T>
std::string type_name() {
  if constexpr (std::is_same_v<T, bf16>) return "bfloat16";
  return (std::is_floating_point_v<T> ? "float" : std::is_signed_v<T> ? "int" : "uint") + std::to_string(8 * sizeof(T));
}

// The checks of one call, each of which names the kernel when it fails.
//
// Where there is no table for bf16, a call on such arrays runs the kernel of float on copies of them: `in` and `out`
// hand out the copies, and what was written is rounded back when the kernel is done. So every kernel sums in float and
// rounds once, as one written for bf16 does. Arrays that are Wide<bf16> by their contract are float, and taken as they
// are.
class Call {
 public:
  explicit Call(const char* kernel) : kernel_(kernel) { begin_call(); }

  void expect(bool condition, const char* rule) const {
    if (!condition) throw py::value_error("[" + std::string(kernel_) + "] " + rule);
  }

  [[noreturn]] void out_of_memory(const std::string& wanted, const char* why) const {
    const std::string message = "[" + std::string(kernel_) + "] out of memory for " + wanted + ": " + why;
    PyErr_SetString(py::module_::import("tinyres.errors").attr("OutOfMemoryError").ptr(), message.c_str());
    throw py::error_already_set();
  }

  // Runs body(T()) for the element type of `array`.
  template <class F>
  void typed(const Array& array, const F& body) const {
    try {
      if (holds<float>(array)) {
        body(float());
      } else if (holds<double>(array)) {
        body(double());
      } else if (holds<bf16>(array)) {
        if constexpr (BFLOAT16) {
          body(bf16());
        } else {
          copying_ = true;
          body(float());
          for (const Copy& copy : copies_) copy.round_back();
        }
      } else {
        throw py::type_error("[" + std::string(kernel_) + "] arrays must be float32, float64 or bfloat16; got " +
                             std::string(py::str(array.dtype())));
      }
    } catch (const std::bad_alloc& error) {
      out_of_memory("scratch", error.what());
    }
  }

  // A dense array to be read: its elements.
  template <class T>
  const T* in(const char* name, const Array& array, const Shape& shape) const {
    check_dense<T>(name, array, shape);
    return elements<T>(array, Use::read);
  }

  template <class T>
  const T* in(const char* name, const OptionalArray& array, const Shape& shape) const {
    return array ? in<T>(name, *array, shape) : nullptr;
  }

  // A dense array to be written.
  template <class T>
  T* out(const char* name, const Array& array, const Shape& shape) const {
    check_dense<T>(name, array, shape);
    expect_array(array.writeable(), name, "must be writable");
    return const_cast<T*>(elements<T>(array, Use::write));
  }

  template <class T>
  T* out(const char* name, const OptionalArray& array, const Shape& shape) const {
    return array ? out<T>(name, *array, shape) : nullptr;
  }

  // An array with any strides that are whole elements.
  template <class T>
  const T* view(const char* name, const Array& array, const Shape& shape) const {
    check<T>(name, array, shape);
    check_strides(name, array);
    return elements<T>(array, Use::read);
  }

  // The same, to be written.
  template <class T>
  T* out_view(const char* name, const Array& array, const Shape& shape) const {
    check<T>(name, array, shape);
    check_strides(name, array);
    expect_array(array.writeable(), name, "must be writable");
    return const_cast<T*>(elements<T>(array, Use::write_view));
  }

  // The same, of a shape that broadcasts to `shape`.
  template <class T>
  const T* operand(const char* name, const Array& array, const Shape& shape) const {
    check_type<T>(name, array);
    const py::ssize_t missing = shape.rank - array.ndim();
    bool fits = missing >= 0;
    for (py::ssize_t i = 0; fits && i < array.ndim(); i++) {
      fits = array.shape(i) == shape.size[i + missing] || array.shape(i) == 1;
    }
    if (!fits) wrong_shape(name, array, shape);
    check_strides(name, array);
    return elements<T>(array, Use::read);
  }

  void rank(const char* name, const Array& array, py::ssize_t rank) const {
    if (array.ndim() != rank)
      throw py::value_error("[" + std::string(kernel_) + "] " + name + " must have " + std::to_string(rank) +
                            " axes; got shape " + text(Shape(array)));
  }

  template <std::size_t SIZE>
  int choice(const char* const (&names)[SIZE], std::string_view name) const {
    for (std::size_t i = 0; i < SIZE; i++) {
      if (name == names[i]) return int(i);
    }
    throw py::value_error("[" + std::string(kernel_) + "] unknown name " + std::string(name));
  }

 private:
  enum class Use { read, write, write_view };

  // The elements of a bf16 array as float, with whatever lies between them in memory: strides stay what they are.
  struct Copy {
    Use use;
    bf16* original;
    std::unique_ptr<float[], void (*)(void*)> values;
    i64 count;

    void round_back() const {
      if (use == Use::read) return;
      const NoGil released;
      if (use == Use::write) return kernels<float>().to_bf16(original, values.get(), count);
      for (i64 i = 0; i < count; i++) {  // what lies between the elements is not the view's to touch
        const float before = to_float(original[i]);
        if (std::memcmp(&before, &values[i], sizeof before) != 0) original[i] = to_bf16(values[i]);
      }
    }
  };

  template <class T>
  const T* elements(const Array& array, Use use) const {
    if constexpr (!BFLOAT16 && std::is_same_v<T, float>) {
      if (copying_ && holds<bf16>(array)) return copied(array, use);
    }
    return static_cast<const T*>(array.data());
  }

  const float* copied(const Array& array, Use use) const {
    i64 before = 0, after = 0;  // elements from the first to the lowest and the highest in memory
    for (py::ssize_t i = 0; i < array.ndim() && array.size() > 0; i++) {
      const i64 reach = (array.shape(i) - 1) * (array.strides(i) / array.itemsize());
      (reach < 0 ? before : after) += reach;
    }
    const i64 count = array.size() > 0 ? after - before + 1 : 0;
    bf16* const original = const_cast<bf16*>(static_cast<const bf16*>(array.data())) + before;
    void* const block = memory_take(std::size_t(count) * sizeof(float));
    copies_.push_back(Copy{use, original, {static_cast<float*>(block), memory_return}, count});
    float* const values = copies_.back().values.get();
    const NoGil released;
    kernels<float>().from_bf16(values, original, count);
    return values - before;
  }

  template <class T>
  void check_dense(const char* name, const Array& array, const Shape& shape) const {
    check<T>(name, array, shape);
    expect_array(array.flags() & Array::c_style, name, "must be dense");
  }

  template <class T>
  void check(const char* name, const Array& array, const Shape& shape) const {
    check_type<T>(name, array);
    bool same = array.ndim() == shape.rank;
    for (py::ssize_t i = 0; same && i < shape.rank; i++) same = array.shape(i) == shape.size[i];
    if (!same) wrong_shape(name, array, shape);
  }

  template <class T>
  void check_type(const char* name, const Array& array) const {
    const bool copied = copying_ && std::is_same_v<T, float> && holds<bf16>(array);
    if (!holds<T>(array) && !copied)
      throw py::type_error("[" + std::string(kernel_) + "] " + name + " must be " + type_name<T>() + "; got " +
                           std::string(py::str(array.dtype())));
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(array.data());
    expect_array(address % (copied ? alignof(bf16) : alignof(T)) == 0, name, "must be aligned");
  }

  [[noreturn]] void wrong_shape(const char* name, const Array& array, const Shape& shape) const {
    throw py::value_error("[" + std::string(kernel_) + "] " + name + " must have shape " + text(shape) + "; got " +
                          text(Shape(array)));
  }

  void check_strides(const char* name, const Array& array) const {
    for (py::ssize_t i = 0; i < array.ndim() && array.size() > 0; i++) {
      const bool whole = array.shape(i) == 1 || array.strides(i) % array.itemsize() == 0;  // 1: nothing to step
      expect_array(whole, name, "must have strides of whole elements");
    }
  }

  void expect_array(bool condition, const char* name, const char* rule) const {
    if (!condition) throw py::value_error("[" + std::string(kernel_) + "] " + name + " " + rule);
  }

  const char* kernel_;
  mutable bool copying_ = false;
  mutable std::vector<Copy> copies_;
};

// Elementwise -------------------------------------------------------------------------------------------------------

// Strides in elements along the axes of y, 0 where an operand is repeated, with neighbouring axes merged wherever all
// operands allow it.
inline Strided strided(const Call& call, const Array& y, const Array& a, const Array& b) {
  const auto stride = [&](const Array& array, py::ssize_t axis) -> i64 {
    axis -= y.ndim() - array.ndim();
    return axis < 0 || array.shape(axis) == 1 ? 0 : array.strides(axis) / array.itemsize();
  };
  Strided s;
  s.rank = 0;
  for (py::ssize_t axis = 0; axis < y.ndim(); axis++) {
    const i64 size = y.shape(axis);
    if (size == 1) continue;
    const i64 sy = stride(y, axis), sa = stride(a, axis), sb = stride(b, axis);
    const int last = s.rank - 1;
    if (last >= 0 && s.y[last] == size * sy && s.a[last] == size * sa && s.b[last] == size * sb) {
      s.size[last] *= size;
      s.y[last] = sy, s.a[last] = sa, s.b[last] = sb;
      continue;
    }
    call.expect(s.rank < MAX_RANK, "at most 16 axes that cannot be merged");
    s.size[s.rank] = size;
    s.y[s.rank] = sy, s.a[s.rank] = sa, s.b[s.rank] = sb;
    s.rank++;
  }
  if (s.rank == 0) {
    s.rank = 1;
    s.size[0] = s.y[0] = s.a[0] = s.b[0] = 1;
  }
  return s;
}

void binary(std::string_view name, const Array& y, const Array& a, const Array& b) {
  const Call call("binary");
  const Binary op = Binary(call.choice(BINARY_NAMES, name));
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(y));
    const T* const ap = call.operand<T>("a", a, Shape(y));
    const T* const bp = call.operand<T>("b", b, Shape(y));
    if (y.size() == 0) return;
    const Strided s = strided(call, y, a, b);
    const NoGil released;
    kernels<T>().binary(op, yp, ap, bp, s);
  });
}

void unary(std::string_view name, const Array& y, const Array& x) {
  const Call call("unary");
  const Unary op = Unary(call.choice(UNARY_NAMES, name));
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(y));
    const T* const xp = call.in<T>("x", x, Shape(y));
    const NoGil released;
    kernels<T>().unary(op, yp, xp, y.size());
  });
}

void unary_backward(std::string_view name, const Array& dx, const Array& dy, const Array& y) {
  const Call call("unary_backward");
  const Unary op = Unary(call.choice(UNARY_NAMES, name));
  call.expect(op == Unary::sqrt || op == Unary::sigmoid || op == Unary::tanh || op == Unary::relu,
              "only sqrt, sigmoid, tanh and relu have a kernel for backward");
  call.typed(dx, [&](auto zero) {
    using T = decltype(zero);
    T* const dxp = call.out<T>("dx", dx, Shape(dx));
    const T* const dyp = call.in<T>("dy", dy, Shape(dx));
    const T* const yp = call.in<T>("y", y, Shape(dx));
    const NoGil released;
    kernels<T>().unary_backward(op, dxp, dyp, yp, dx.size());
  });
}

void add_relu(const Array& y, const Array& a, const Array& b) {
  const Call call("add_relu");
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(y));
    const T* const ap = call.in<T>("a", a, Shape(y));
    const T* const bp = call.in<T>("b", b, Shape(y));
    const NoGil released;
    kernels<T>().add_relu(yp, ap, bp, y.size());
  });
}

void maximum_backward(const Array& da, const Array& db, const Array& dy, const Array& a, const Array& b) {
  const Call call("maximum_backward");
  call.typed(dy, [&](auto zero) {
    using T = decltype(zero);
    T* const dap = call.out<T>("da", da, Shape(dy));
    T* const dbp = call.out<T>("db", db, Shape(dy));
    const T* const dyp = call.in<T>("dy", dy, Shape(dy));
    const T* const ap = call.in<T>("a", a, Shape(dy));
    const T* const bp = call.in<T>("b", b, Shape(dy));
    const NoGil released;
    kernels<T>().maximum_backward(dap, dbp, dyp, ap, bp, dy.size());
  });
}

void pow_backward(const Array& da, const Array& db, const Array& dy, const Array& a, const Array& b, const Array& y) {
  const Call call("pow_backward");
  call.typed(dy, [&](auto zero) {
    using T = decltype(zero);
    T* const dap = call.out<T>("da", da, Shape(dy));
    T* const dbp = call.out<T>("db", db, Shape(dy));
    const T* const dyp = call.in<T>("dy", dy, Shape(dy));
    const T* const ap = call.in<T>("a", a, Shape(dy));
    const T* const bp = call.in<T>("b", b, Shape(dy));
    const T* const yp = call.in<T>("y", y, Shape(dy));
    const NoGil released;
    kernels<T>().pow_backward(dap, dbp, dyp, ap, bp, yp, dy.size());
  });
}

void dropout(const Array& y, const Array& x, double p, std::uint64_t key, std::uint64_t draw) {
  const Call call("dropout");
  call.expect(p >= 0 && p < 1, "p must lie in [0, 1)");
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(y));
    const T* const xp = call.in<T>("x", x, Shape(y));
    const NoGil released;
    kernels<T>().dropout(yp, xp, y.size(), p, RandomKey{key, draw});
  });
}

void copy(const Array& y, const Array& a) {
  const Call call("copy");
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out_view<T>("y", y, Shape(y));
    const T* const ap = call.operand<T>("a", a, Shape(y));
    if (y.size() == 0) return;
    const Strided s = strided(call, y, a, a);
    const NoGil released;
    kernels<T>().copy(yp, ap, s);
  });
}

void fill(const Array& y, double value) {
  const Call call("fill");
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(y));
    const NoGil released;
    kernels<T>().fill(yp, value, y.size());
  });
}

void cast(const Array& y, const Array& x) {
  const Call call("cast");
  if (is_bfloat16(y.dtype())) {
    bf16* const yp = call.out<bf16>("y", y, Shape(y));
    const float* const xp = call.in<float>("x", x, Shape(y));
    const NoGil released;
    kernels<float>().to_bf16(yp, xp, y.size());
  } else {
    float* const yp = call.out<float>("y", y, Shape(y));
    const bf16* const xp = call.in<bf16>("x", x, Shape(y));
    const NoGil released;
    kernels<float>().from_bf16(yp, xp, y.size());
  }
}

// Reductions -------------------------------------------------------------------------------------------------------

void sum(const Array& y, const Array& x) {
  const Call call("sum");
  call.rank("x", x, 3);
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(y));
    const T* const xp = call.in<T>("x", x, Shape(x));
    call.expect(y.size() == x.shape(0) * x.shape(2), "y must have an element for each of x's first and last axis");
    if (y.size() == 0) return;
    const NoGil released;
    kernels<T>().sum(yp, xp, x.shape(0), x.shape(1), x.shape(2));
  });
}

void max(const Array& y, const Array& x) {
  const Call call("max");
  call.rank("x", x, 3);
  call.expect(x.shape(1) > 0, "of no elements there is no largest");
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(y));
    const T* const xp = call.in<T>("x", x, Shape(x));
    call.expect(y.size() == x.shape(0) * x.shape(2), "y must have an element for each of x's first and last axis");
    if (y.size() == 0) return;
    const NoGil released;
    kernels<T>().max(yp, xp, x.shape(0), x.shape(1), x.shape(2));
  });
}

void max_backward(const Array& dx, const Array& dy, const Array& x, const Array& y) {
  const Call call("max_backward");
  call.rank("x", x, 3);
  call.typed(dx, [&](auto zero) {
    using T = decltype(zero);
    T* const dxp = call.out<T>("dx", dx, Shape(x));
    const T* const dyp = call.in<T>("dy", dy, {x.shape(0), x.shape(2)});
    const T* const xp = call.in<T>("x", x, Shape(x));
    const T* const yp = call.in<T>("y", y, {x.shape(0), x.shape(2)});
    if (x.size() == 0) return;
    const NoGil released;
    kernels<T>().max_backward(dxp, dyp, xp, yp, x.shape(0), x.shape(1), x.shape(2));
  });
}

// Matrix multiplication ---------------------------------------------------------------------------------------------

void matmul(const Array& y, const Array& a, const Array& b) {
  const Call call("matmul");
  const py::ssize_t rank = y.ndim() == 2 ? 2 : 3, row = rank - 2, column = rank - 1;  // one matrix, or a batch
  call.rank("y", y, rank);
  call.rank("a", a, rank);
  call.rank("b", b, rank);
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    const py::ssize_t batch = rank == 2 ? 1 : y.shape(0), M = y.shape(row), N = y.shape(column), K = a.shape(column);
    const auto matrices = [&](py::ssize_t rows, py::ssize_t columns) {
      return rank == 2 ? Shape{rows, columns} : Shape{batch, rows, columns};
    };
    T* const yp = call.out<T>("y", y, matrices(M, N));
    const T* const ap = call.view<T>("a", a, matrices(M, K));
    const T* const bp = call.view<T>("b", b, matrices(K, N));
    const auto stride = [](const Array& array, py::ssize_t axis) {
      return i64(array.strides(axis) / array.itemsize());
    };
    const i64 a_batch = rank == 2 ? 0 : stride(a, 0), b_batch = rank == 2 ? 0 : stride(b, 0);
    const MatrixView a_view{stride(a, row), stride(a, column)}, b_view{stride(b, row), stride(b, column)};
    const i64 size = y.size();
    if (size == 0) return;
    const NoGil released;
    if (K == 0) return kernels<T>().fill(yp, 0, size);
    kernels<T>().matmul(yp, ap, bp, batch, M, N, K, a_batch, a_view, b_batch, b_view);
  });
}

// Windows: convolution and pooling ----------------------------------------------------------------------------------

// The window that leads from `input` (N, H, W, C) to `output` (N, P, Q, K), both of which it checks.
Window window_between(const Call& call, const Array& input, const Array& output, Pair size, Pair stride, Pair padding) {
  call.rank("input", input, 4);
  call.rank("output", output, 4);
  const auto within = [](Pair pair, i64 low) {
    return pair.first >= low && pair.second >= low && pair.first <= MAX_WINDOW && pair.second <= MAX_WINDOW;
  };
  call.expect(within(size, 1), "the window must be between 1 and 2**20");
  call.expect(within(stride, 1), "the stride must be between 1 and 2**20");
  call.expect(within(padding, 0), "the padding must be between 0 and 2**20");
  Window s;
  s.N = input.shape(0), s.H = input.shape(1), s.W = input.shape(2), s.C = input.shape(3);
  s.P = output.shape(1), s.Q = output.shape(2), s.K = output.shape(3);
  s.R = size.first, s.S = size.second;
  s.stride_h = stride.first, s.stride_w = stride.second;
  s.pad_h = padding.first, s.pad_w = padding.second;
  call.expect(s.H > 0 && s.W > 0 && s.C > 0 && s.K > 0, "image sizes and channels must not be 0");
  call.expect(s.R <= s.H + 2 * s.pad_h && s.S <= s.W + 2 * s.pad_w, "the window must fit into the padded image");
  call.expect(output.shape(0) == s.N && s.P == (s.H + 2 * s.pad_h - s.R) / s.stride_h + 1 &&
                  s.Q == (s.W + 2 * s.pad_w - s.S) / s.stride_w + 1,
              "the output must have the size that input, window, stride and padding give");
  return s;
}

Window convolution(const Call& call, const Array& input, const Array& w, const Array& output, Pair stride,
                   Pair padding) {
  call.rank("w", w, 4);
  return window_between(call, input, output, {w.shape(0), w.shape(1)}, stride, padding);
}

Window pooling(const Call& call, const Array& input, const Array& output, Pair size, Pair stride, Pair padding) {
  const Window s = window_between(call, input, output, size, stride, padding);
  call.expect(s.K == s.C, "input and output must have the same channels");
  return s;
}

void conv2d_forward(const Array& y, const Array& x, const Array& w, Pair stride, Pair padding,
                    std::string_view algorithm) {
  const Call call("conv2d_forward");
  const ConvAlgorithm chosen = ConvAlgorithm(call.choice(ALGORITHM_NAMES, algorithm));
  const Window s = convolution(call, x, w, y, stride, padding);
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(y));
    const T* const xp = call.in<T>("x", x, Shape(x));
    const T* const wp = call.in<T>("w", w, {s.R, s.S, s.C, s.K});
    if (s.N == 0) return;
    const NoGil released;
    kernels<T>().conv2d_forward(yp, xp, wp, {}, s, chosen);
  });
}

void conv2d_bias_forward(const Array& y, const Array& x, const Array& w, const Array& b, const OptionalArray& residual,
                         bool relu, Pair stride, Pair padding, std::string_view algorithm) {
  const Call call("conv2d_bias_forward");
  const ConvAlgorithm chosen = ConvAlgorithm(call.choice(ALGORITHM_NAMES, algorithm));
  const Window s = convolution(call, x, w, y, stride, padding);
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(y));
    const T* const xp = call.in<T>("x", x, Shape(x));
    const T* const wp = call.in<T>("w", w, {s.R, s.S, s.C, s.K});
    const T* const bp = call.in<T>("b", b, {s.K});
    const T* const residual_p = call.in<T>("residual", residual, Shape(y));
    if (s.N == 0) return;
    const NoGil released;
    kernels<T>().conv2d_forward(yp, xp, wp, {bp, residual_p, relu}, s, chosen);
  });
}

void conv2d_backward_input(const Array& dx, const Array& dy, const Array& w, Pair stride, Pair padding,
                           std::string_view algorithm, bool add) {
  const Call call("conv2d_backward_input");
  const ConvAlgorithm chosen = ConvAlgorithm(call.choice(ALGORITHM_NAMES, algorithm));
  const Window s = convolution(call, dx, w, dy, stride, padding);
  call.typed(dx, [&](auto zero) {
    using T = decltype(zero);
    T* const dxp = call.out<T>("dx", dx, Shape(dx));
    const T* const dyp = call.in<T>("dy", dy, Shape(dy));
    const T* const wp = call.in<T>("w", w, {s.R, s.S, s.C, s.K});
    if (s.N == 0) return;
    const NoGil released;
    kernels<T>().conv2d_backward_input(dxp, dyp, wp, s, chosen, add);
  });
}

void conv2d_backward_weight(const Array& dw, const Array& dy, const Array& x, Pair stride, Pair padding,
                            std::string_view algorithm) {
  const Call call("conv2d_backward_weight");
  const ConvAlgorithm chosen = ConvAlgorithm(call.choice(ALGORITHM_NAMES, algorithm));
  const Window s = convolution(call, x, dw, dy, stride, padding);
  call.typed(dy, [&](auto zero) {
    using T = decltype(zero);
    Wide<T>* const dwp = call.out<Wide<T>>("dw", dw, {s.R, s.S, s.C, s.K});
    const T* const dyp = call.in<T>("dy", dy, Shape(dy));
    const T* const xp = call.in<T>("x", x, Shape(x));
    const NoGil released;
    if (s.N == 0) return kernels<Wide<T>>().fill(dwp, 0, s.R * s.S * s.C * s.K);
    kernels<T>().conv2d_backward_weight(dwp, dyp, xp, s, chosen);
  });
}

// Every window must hold at least one real element, or there is no largest one.
Window max_pooling(const Call& call, const Array& input, const Array& output, Pair size, Pair stride, Pair padding) {
  const Window s = pooling(call, input, output, size, stride, padding);
  call.expect(s.pad_h < s.R && s.pad_w < s.S, "the padding must be smaller than the window");
  return s;
}

// 3x3 convolutions fused with batch norm, on devices whose table has them --------------------------------------------
// The structs of kernels.h come as tuples of their members, in order; None stands for an empty one. How many rows there
// are follows from the array's size.

using BatchNormTuple =
    std::tuple<Array, Array, OptionalArray, Array, Array, OptionalArray, OptionalArray, double,
               double>;  // gamma, beta, rows, mean, inv_std, running_mean, running_var, momentum, eps
using GradientTuple = std::tuple<Array, Array, Array, Array, OptionalArray, Array,
                                 Array>;                          // y, gamma, mean, inv_std, rows, dgamma, dbeta
using ShortcutTuple = std::tuple<Array, i64, i64>;                // x, stride, before
using MaskTuple = std::tuple<Array, Array, Array, Array, Array>;  // y, gamma, beta, mean, inv_std, of an InputGradient

constexpr i64 MAX_PIXELS = i64(1) << 31;  // the kernels count them by int

// The rows of an array, each of so many numbers.
i64 count_rows(const Call& call, const Array& rows, i64 numbers) {
  const bool whole = rows.ndim() == 1 && rows.size() > 0 && rows.size() < MAX_PIXELS && rows.size() % numbers == 0;
  call.expect(whole, "rows must be an array of one axis that holds whole rows of sums");
  return rows.size() / numbers;
}

template <class T>
BatchNorm<T> batch_norm_of(const Call& call, const std::optional<BatchNormTuple>& given, py::ssize_t C) {
  using W = Wide<T>;
  BatchNorm<T> bn{};
  if (!given) return bn;
  const auto& [gamma, beta, rows, mean, inv_std, running_mean, running_var, momentum, eps] = *given;
  bn.gamma = call.in<W>("gamma", gamma, {C});
  bn.beta = call.in<W>("beta", beta, {C});
  bn.momentum = momentum, bn.eps = eps;
  if (!rows) {
    bn.mean = const_cast<W*>(call.in<W>("mean", mean, {C}));
    bn.inv_std = const_cast<W*>(call.in<W>("inv_std", inv_std, {C}));
    return bn;
  }
  bn.row_count = count_rows(call, *rows, 2 * C + 1);
  bn.rows = call.in<W>("rows", *rows, Shape(*rows));
  bn.mean = call.out<W>("mean", mean, {C});
  bn.inv_std = call.out<W>("inv_std", inv_std, {C});
  bn.running_mean = call.out<W>("running_mean", running_mean, {C});
  bn.running_var = call.out<W>("running_var", running_var, {C});
  return bn;
}

template <class T>
BatchNormGradient<T> gradient_of(const Call& call, const std::optional<GradientTuple>& given, const Array& dz) {
  using W = Wide<T>;
  BatchNormGradient<T> gradient{};
  if (!given) return gradient;
  const auto& [y, gamma, mean, inv_std, rows, dgamma, dbeta] = *given;
  const py::ssize_t K = dz.shape(3);
  gradient.y = call.in<T>("y", y, Shape(dz));
  gradient.gamma = call.in<W>("gamma", gamma, {K});
  gradient.mean = call.in<W>("mean", mean, {K});
  gradient.inv_std = call.in<W>("inv_std", inv_std, {K});
  if (!rows) {
    gradient.dgamma = const_cast<W*>(call.in<W>("dgamma", dgamma, {K}));
    gradient.dbeta = const_cast<W*>(call.in<W>("dbeta", dbeta, {K}));
    return gradient;
  }
  gradient.row_count = count_rows(call, *rows, 2 * K);
  gradient.rows = call.in<W>("rows", *rows, Shape(*rows));
  gradient.dgamma = call.out<W>("dgamma", dgamma, {K});
  gradient.dbeta = call.out<W>("dbeta", dbeta, {K});
  return gradient;
}

// What goes round to `to` (N, H, W, C), forward; or backward, when it is the smaller of the two images.
template <class T>
Shortcut<T> shortcut_of(const Call& call, const std::optional<ShortcutTuple>& given, const Array& to, bool backward) {
  if (!given) return {};
  const auto& [x, stride, before] = *given;
  call.rank("shortcut", x, 4);
  constexpr i64 WHOLE = 16 / i64(sizeof(T));  // channels that are moved at once
  const i64 C = x.shape(3);
  call.expect(stride >= 1 && stride <= MAX_WINDOW, "the shortcut's stride must be between 1 and 2**20");
  call.expect(before >= 0 && before <= MAX_WINDOW && before % WHOLE == 0 && C > 0 && C % WHOLE == 0,
              "the shortcut's channels, and those before them, must fill 16 bytes");
  bool fits = x.shape(0) == to.shape(0) && (!backward || before + to.shape(3) <= C);
  for (int axis = 1; axis < 3; axis++) {
    const i64 large = (backward ? to : x).shape(axis), small = (backward ? x : to).shape(axis);
    fits = fits && large > 0 && small == (large - 1) / stride + 1;
  }
  call.expect(fits, "the shortcut must have the size that its stride gives, and all channels");
  return {call.in<T>("shortcut", x, Shape(x)), x.shape(1), x.shape(2), C, stride, before};
}

// count(table), of the kernels for elements of that type.
template <class F>
i64 count_by(const py::object& dtype, const F& count) {
  const py::dtype type = py::dtype::from_args(dtype);
  if (is<float>(type)) return count(kernels<float>());
  if (is<double>(type)) return count(kernels<double>());
  if constexpr (BFLOAT16)
    if (is<bf16>(type)) return count(kernels<bf16>());
  throw py::type_error("the type must be float32, float64 or bfloat16; got " + std::string(py::str(type)));
}

// The 3x3 window of padding 1 over images x (N, H, W, C).
Window window3x3(const Call& call, const std::vector<i64>& x, i64 K, i64 stride) {
  bool fits = x.size() == 4;
  for (const i64 size : x) fits = fits && size >= 1 && size <= MAX_WINDOW;
  call.expect(fits && K >= 1 && K <= MAX_WINDOW, "x must be (N, H, W, C), sizes between 1 and 2**20");
  call.expect(stride >= 1 && stride <= MAX_WINDOW, "the stride must be between 1 and 2**20");
  return {x[0], x[1], x[2], x[3], K, 3, 3, (x[1] - 1) / stride + 1, (x[2] - 1) / stride + 1, stride, stride, 1, 1};
}

i64 conv3x3_rows(const py::object& dtype, const std::vector<i64>& x, i64 K, i64 stride, bool backward) {
  const Window s = window3x3(Call("conv3x3_rows"), x, K, stride);
  return count_by(dtype, [&](const auto& table) { return table.conv3x3_rows(s, backward); });
}

i64 conv3x3_slabs(const py::object& dtype, const std::vector<i64>& x, i64 K, i64 stride) {
  const Window s = window3x3(Call("conv3x3_slabs"), x, K, stride);
  return count_by(dtype, [&](const auto& table) { return table.conv3x3_slabs(s); });
}

void conv3x3_forward(const Array& y, const OptionalArray& rows, const Array& x, const Array& w,
                     const std::optional<BatchNormTuple>& norm, i64 stride) {
  const Call call("conv3x3_forward");
  const Window s = convolution(call, x, w, y, {stride, stride}, {1, 1});
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(y));
    Wide<T>* const rows_p = call.out<Wide<T>>("rows", rows, {kernels<T>().conv3x3_rows(s, false) * (2 * s.K + 1)});
    const T* const xp = call.in<T>("x", x, Shape(x));
    const T* const wp = call.in<T>("w", w, {s.R, s.S, s.C, s.K});
    const BatchNorm<T> bn = batch_norm_of<T>(call, norm, s.C);
    const NoGil released;
    kernels<T>().conv3x3_forward(yp, rows_p, xp, wp, bn, s);
  });
}

void conv3x3_backward_input(const Array& dx, const OptionalArray& rows, const Array& dz, const Array& w,
                            const std::optional<GradientTuple>& gradient, const std::optional<ShortcutTuple>& shortcut,
                            const OptionalArray& output, const std::optional<MaskTuple>& before, i64 stride) {
  const Call call("conv3x3_backward_input");
  const Window s = convolution(call, dx, w, dz, {stride, stride}, {1, 1});
  call.expect(before || !rows, "sums need the batch norm that they are for");
  call.typed(dx, [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    T* const dxp = call.out<T>("dx", dx, Shape(dx));
    const T* const dzp = call.in<T>("dz", dz, Shape(dz));
    const T* const wp = call.in<T>("w", w, {s.R, s.S, s.C, s.K});
    const BatchNormGradient<T> of_z = gradient_of<T>(call, gradient, dz);
    InputGradient<T> input{};
    input.shortcut = shortcut_of<T>(call, shortcut, dx, true);
    input.output = call.in<T>("output", output, Shape(dx));
    if (before) {
      const auto& [y, gamma, beta, mean, inv_std] = *before;
      input.y = call.in<T>("y", y, Shape(dx));
      input.gamma = call.in<W>("gamma", gamma, {s.C});
      input.beta = call.in<W>("beta", beta, {s.C});
      input.mean = call.in<W>("mean", mean, {s.C});
      input.inv_std = call.in<W>("inv_std", inv_std, {s.C});
    }
    input.rows = call.out<W>("rows", rows, {kernels<T>().conv3x3_rows(s, true) * 2 * s.C});
    const NoGil released;
    kernels<T>().conv3x3_backward_input(dxp, dzp, wp, of_z, input, s);
  });
}

void conv3x3_backward_weight(const OptionalArray& dw, const OptionalArray& slabs, const Array& dz, const Array& x,
                             const std::optional<GradientTuple>& gradient, const std::optional<BatchNormTuple>& norm,
                             i64 stride) {
  const Call call("conv3x3_backward_weight");
  call.rank("dz", dz, 4);
  call.expect(dw.has_value() != slabs.has_value(), "either dw or slabs must be given");
  call.expect(!norm || !std::get<2>(*norm), "the batch norm's mean and inv_std must be known");
  const Window s = window_between(call, x, dz, {3, 3}, {stride, stride}, {1, 1});
  call.typed(dz, [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    W* const dwp = call.out<W>("dw", dw, {3, 3, s.C, s.K});
    const std::vector<py::ssize_t> parts{kernels<T>().conv3x3_slabs(s), 3, 3, s.C, s.K};
    W* const slabs_p = call.out<W>("slabs", slabs, Shape(parts));
    const T* const dzp = call.in<T>("dz", dz, Shape(dz));
    const T* const xp = call.in<T>("x", x, Shape(x));
    const BatchNormGradient<T> of_z = gradient_of<T>(call, gradient, dz);
    const BatchNorm<T> bn = batch_norm_of<T>(call, norm, s.C);
    const NoGil released;
    kernels<T>().conv3x3_backward_weight(dwp, slabs_p, dzp, xp, of_z, bn, s);
  });
}

void block_output(const Array& y, const Array& x, const BatchNormTuple& norm,
                  const std::optional<ShortcutTuple>& shortcut, const std::optional<BatchNormTuple>& shortcut_norm) {
  const Call call("block_output");
  call.rank("y", y, 4);
  const py::ssize_t N = y.shape(0), H = y.shape(1), W = y.shape(2), C = y.shape(3);
  call.expect(y.size() > 0 && y.size() / C < MAX_PIXELS, "y must have pixels, and under 2**31");
  call.expect(shortcut || !shortcut_norm, "without a shortcut there is no batch norm of it");
  if (shortcut_norm) {
    const auto& [around, stride, before] = *shortcut;
    call.expect(around.ndim() == 4 && around.shape(3) == C && before == 0,
                "a shortcut with a batch norm must have the channels of y");
  }
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(y));
    const T* const xp = call.in<T>("x", x, Shape(y));
    const BatchNorm<T> bn = batch_norm_of<T>(call, norm, C), around = batch_norm_of<T>(call, shortcut_norm, C);
    const Shortcut<T> from = shortcut_of<T>(call, shortcut, y, false);
    const NoGil released;
    kernels<T>().block_output(yp, xp, bn, from, around, N, H, W, C);
  });
}

i64 block_output_rows(const py::object& dtype, i64 M, i64 C) {
  Call("block_output_rows").expect(M >= 1 && M < MAX_PIXELS && C >= 1 && C <= MAX_WINDOW, "M or C is out of range");
  return count_by(dtype, [&](const auto& table) { return table.block_output_rows(M, C); });
}

void block_output_backward(const Array& dz, const Array& rows, const Array& dy, const Array& output, const Array& y,
                           const Array& mean) {
  const Call call("block_output_backward");
  call.rank("dz", dz, 4);
  call.expect(dz.size() > 0 && dz.size() / dz.shape(3) < MAX_PIXELS, "dz must have pixels, and under 2**31");
  const i64 C = dz.shape(3), M = dz.size() / C;
  call.typed(dz, [&](auto zero) {
    using T = decltype(zero);
    T* const dzp = call.out<T>("dz", dz, Shape(dz));
    Wide<T>* const rows_p = call.out<Wide<T>>("rows", rows, {kernels<T>().block_output_rows(M, C) * 2 * C});
    const T* const dyp = call.in<T>("dy", dy, Shape(dz));
    const T* const output_p = call.in<T>("output", output, Shape(dz));
    const T* const yp = call.in<T>("y", y, Shape(dz));
    const Wide<T>* const mean_p = call.in<Wide<T>>("mean", mean, {C});
    const NoGil released;
    kernels<T>().block_output_backward(dzp, rows_p, dyp, output_p, yp, mean_p, M, C);
  });
}

void max_pool2d_forward(const Array& y, const Array& argmax, const Array& x, Pair size, Pair stride, Pair padding) {
  const Call call("max_pool2d_forward");
  const Window s = max_pooling(call, x, y, size, stride, padding);
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(y));
    std::int32_t* const ip = call.out<std::int32_t>("argmax", argmax, Shape(y));
    const T* const xp = call.in<T>("x", x, Shape(x));
    if (s.N == 0) return;
    const NoGil released;
    kernels<T>().max_pool2d_forward(yp, ip, xp, s);
  });
}

// Whether every position lies inside its window and inside the image.
bool inside(const std::int32_t* argmax, const Window& s) {
  for (i64 n = 0; n < s.N; n++) {
    for (i64 p = 0; p < s.P; p++) {
      for (i64 q = 0; q < s.Q; q++, argmax += s.C) {
        const i64 h = p * s.stride_h - s.pad_h, w = q * s.stride_w - s.pad_w;
        bool good = true;
        for (i64 c = 0; c < s.C; c++) good &= argmax[c] >= 0 && argmax[c] < s.R * s.S;
        if (!good) return false;
        if (h >= 0 && w >= 0 && h + s.R <= s.H && w + s.S <= s.W) continue;
        for (i64 c = 0; c < s.C; c++) {
          const i64 row = h + argmax[c] / s.S, column = w + argmax[c] % s.S;
          if (row < 0 || row >= s.H || column < 0 || column >= s.W) return false;
        }
      }
    }
  }
  return true;
}

void max_pool2d_backward(const Array& dx, const Array& dy, const Array& argmax, Pair size, Pair stride, Pair padding) {
  const Call call("max_pool2d_backward");
  const Window s = max_pooling(call, dx, dy, size, stride, padding);
  call.typed(dx, [&](auto zero) {
    using T = decltype(zero);
    T* const dxp = call.out<T>("dx", dx, Shape(dx));
    const T* const dyp = call.in<T>("dy", dy, Shape(dy));
    const std::int32_t* const ip = call.in<std::int32_t>("argmax", argmax, Shape(dy));
    call.expect(!readable() || inside(ip, s), "argmax must lie inside of the window and of the image");
    if (s.N == 0) return;
    const NoGil released;
    kernels<T>().max_pool2d_backward(dxp, dyp, ip, s);
  });
}

void avg_pool2d_forward(const Array& y, const Array& x, Pair size, Pair stride, Pair padding) {
  const Call call("avg_pool2d_forward");
  const Window s = pooling(call, x, y, size, stride, padding);
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(y));
    const T* const xp = call.in<T>("x", x, Shape(x));
    if (s.N == 0) return;
    const NoGil released;
    kernels<T>().avg_pool2d_forward(yp, xp, s);
  });
}

void avg_pool2d_backward(const Array& dx, const Array& dy, Pair size, Pair stride, Pair padding) {
  const Call call("avg_pool2d_backward");
  const Window s = pooling(call, dx, dy, size, stride, padding);
  call.typed(dx, [&](auto zero) {
    using T = decltype(zero);
    T* const dxp = call.out<T>("dx", dx, Shape(dx));
    const T* const dyp = call.in<T>("dy", dy, Shape(dy));
    if (s.N == 0) return;
    const NoGil released;
    kernels<T>().avg_pool2d_backward(dxp, dyp, s);
  });
}

void global_avg_pool2d_forward(const Array& y, const Array& x) {
  const Call call("global_avg_pool2d_forward");
  call.rank("x", x, 4);
  call.typed(y, [&](auto zero) {
    using T = decltype(zero);
    const py::ssize_t N = x.shape(0), HW = x.shape(1) * x.shape(2), C = x.shape(3);
    T* const yp = call.out<T>("y", y, {N, C});
    const T* const xp = call.in<T>("x", x, Shape(x));
    call.expect(HW > 0, "the image must not be empty");
    if (N * C == 0) return;
    const NoGil released;
    kernels<T>().global_avg_pool2d_forward(yp, xp, N, HW, C);
  });
}

void global_avg_pool2d_backward(const Array& dx, const Array& dy) {
  const Call call("global_avg_pool2d_backward");
  call.rank("dx", dx, 4);
  call.typed(dx, [&](auto zero) {
    using T = decltype(zero);
    const py::ssize_t N = dx.shape(0), HW = dx.shape(1) * dx.shape(2), C = dx.shape(3);
    T* const dxp = call.out<T>("dx", dx, Shape(dx));
    const T* const dyp = call.in<T>("dy", dy, {N, C});
    if (N * HW * C == 0) return;
    const NoGil released;
    kernels<T>().global_avg_pool2d_backward(dxp, dyp, N, HW, C);
  });
}

// Batch norm --------------------------------------------------------------------------------------------------------

// x as (M, C): the last axis against all others.
std::pair<i64, py::ssize_t> rows_and_channels(const Call& call, const Array& x) {
  call.expect(x.ndim() >= 1 && x.size() > 0, "x must have at least one axis and one element");
  const py::ssize_t C = x.shape(x.ndim() - 1);
  return {x.size() / C, C};
}

void batch_norm_forward(const Array& y, const Array& mean, const Array& inv_std, const OptionalArray& running_mean,
                        const OptionalArray& running_var, const Array& x, const Array& gamma, const Array& beta,
                        const OptionalArray& residual, bool relu, double momentum, double eps) {
  const Call call("batch_norm_forward");
  call.expect(running_mean.has_value() == running_var.has_value(), "running_mean and running_var go together");
  const auto [M, C] = rows_and_channels(call, x);
  call.typed(x, [&, M = M, C = C](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(x));
    Wide<T>* const mean_p = call.out<Wide<T>>("mean", mean, {C});
    Wide<T>* const inv_std_p = call.out<Wide<T>>("inv_std", inv_std, {C});
    Wide<T>* const running_mean_p = call.out<Wide<T>>("running_mean", running_mean, {C});
    Wide<T>* const running_var_p = call.out<Wide<T>>("running_var", running_var, {C});
    const T* const xp = call.in<T>("x", x, Shape(x));
    const Wide<T>* const gamma_p = call.in<Wide<T>>("gamma", gamma, {C});
    const Wide<T>* const beta_p = call.in<Wide<T>>("beta", beta, {C});
    const T* const residual_p = call.in<T>("residual", residual, Shape(x));
    const NoGil released;
    kernels<T>().batch_norm_forward(yp, mean_p, inv_std_p, running_mean_p, running_var_p, xp, gamma_p, beta_p,
                                    residual_p, relu, momentum, eps, M, C);
  });
}

void batch_norm_backward(const Array& dx, const OptionalArray& dresidual, const Array& dgamma, const Array& dbeta,
                         const Array& dy, const Array& x, const OptionalArray& y, const Array& gamma,
                         const OptionalArray& beta, const Array& mean, const Array& inv_std) {
  const Call call("batch_norm_backward");
  call.expect(!(y.has_value() && beta.has_value()), "the mask comes from y or from beta, not from both");
  const auto [M, C] = rows_and_channels(call, x);
  call.typed(x, [&, M = M, C = C](auto zero) {
    using T = decltype(zero);
    T* const dxp = call.out<T>("dx", dx, Shape(x));
    T* const dresidual_p = call.out<T>("dresidual", dresidual, Shape(x));
    Wide<T>* const dgamma_p = call.out<Wide<T>>("dgamma", dgamma, {C});
    Wide<T>* const dbeta_p = call.out<Wide<T>>("dbeta", dbeta, {C});
    const T* const dyp = call.in<T>("dy", dy, Shape(x));
    const T* const xp = call.in<T>("x", x, Shape(x));
    const T* const yp = call.in<T>("y", y, Shape(x));
    const Wide<T>* const gamma_p = call.in<Wide<T>>("gamma", gamma, {C});
    const Wide<T>* const beta_p = call.in<Wide<T>>("beta", beta, {C});
    const Wide<T>* const mean_p = call.in<Wide<T>>("mean", mean, {C});
    const Wide<T>* const inv_std_p = call.in<Wide<T>>("inv_std", inv_std, {C});
    const NoGil released;
    kernels<T>().batch_norm_backward(dxp, dresidual_p, dgamma_p, dbeta_p, dyp, xp, yp, gamma_p, beta_p, mean_p,
                                     inv_std_p, M, C);
  });
}

void batch_norm_inference(const Array& y, const Array& x, const Array& gamma, const Array& beta, const Array& mean,
                          const Array& var, const OptionalArray& residual, bool relu, double eps) {
  const Call call("batch_norm_inference");
  const auto [M, C] = rows_and_channels(call, x);
  call.typed(x, [&, M = M, C = C](auto zero) {
    using T = decltype(zero);
    T* const yp = call.out<T>("y", y, Shape(x));
    const T* const xp = call.in<T>("x", x, Shape(x));
    const Wide<T>* const gamma_p = call.in<Wide<T>>("gamma", gamma, {C});
    const Wide<T>* const beta_p = call.in<Wide<T>>("beta", beta, {C});
    const Wide<T>* const mean_p = call.in<Wide<T>>("mean", mean, {C});
    const Wide<T>* const var_p = call.in<Wide<T>>("var", var, {C});
    const T* const residual_p = call.in<T>("residual", residual, Shape(x));
    const NoGil released;
    kernels<T>().batch_norm_inference(yp, xp, gamma_p, beta_p, mean_p, var_p, residual_p, relu, eps, M, C);
  });
}

void batch_norm_inference_backward(const Array& dx, const Array& dgamma, const Array& dbeta, const Array& dy,
                                   const Array& x, const Array& gamma, const Array& mean, const Array& var,
                                   double eps) {
  const Call call("batch_norm_inference_backward");
  const auto [M, C] = rows_and_channels(call, x);
  call.typed(x, [&, M = M, C = C](auto zero) {
    using T = decltype(zero);
    T* const dxp = call.out<T>("dx", dx, Shape(x));
    Wide<T>* const dgamma_p = call.out<Wide<T>>("dgamma", dgamma, {C});
    Wide<T>* const dbeta_p = call.out<Wide<T>>("dbeta", dbeta, {C});
    const T* const dyp = call.in<T>("dy", dy, Shape(x));
    const T* const xp = call.in<T>("x", x, Shape(x));
    const Wide<T>* const gamma_p = call.in<Wide<T>>("gamma", gamma, {C});
    const Wide<T>* const mean_p = call.in<Wide<T>>("mean", mean, {C});
    const Wide<T>* const var_p = call.in<Wide<T>>("var", var, {C});
    const NoGil released;
    kernels<T>().batch_norm_inference_backward(dxp, dgamma_p, dbeta_p, dyp, xp, gamma_p, mean_p, var_p, eps, M, C);
  });
}

// Loss and training -------------------------------------------------------------------------------------------------

bool all_below(const i64* values, i64 n, i64 limit) {
  bool good = true;
  for (i64 i = 0; i < n; i++) good &= values[i] >= 0 && values[i] < limit;
  return good;
}

void cross_entropy(const Array& loss, const Array& dlogits, const Array& logits, const Array& labels,
                   double smoothing) {
  const Call call("cross_entropy");
  call.rank("logits", logits, 2);
  call.expect(logits.size() > 0, "logits must not be empty");
  call.expect(smoothing >= 0 && smoothing <= 1, "smoothing must lie in [0, 1]");
  call.typed(logits, [&](auto zero) {
    using T = decltype(zero);
    const py::ssize_t N = logits.shape(0), K = logits.shape(1);
    Wide<T>* const loss_p = call.out<Wide<T>>("loss", loss, {});
    T* const dlogits_p = call.out<T>("dlogits", dlogits, {N, K});
    const T* const logits_p = call.in<T>("logits", logits, {N, K});
    const i64* const labels_p = call.in<i64>("labels", labels, {N});
    call.expect(!readable() || all_below(labels_p, N, K), "labels must lie between 0 and K - 1");
    const NoGil released;
    kernels<T>().cross_entropy(loss_p, dlogits_p, logits_p, labels_p, smoothing, N, K);
  });
}

i64 classifier_parts(i64 N, i64 C, i64 K) {
  const Call call("classifier_parts");
  call.expect(N > 0 && C > 0 && K > 0 && std::max({N, C, K}) <= INT32_MAX, "N, C and K must be 1 to 2**31 - 1");
  return kernels<float>().classifier_parts(N, C, K);
}

// dw and db have an axis more where they are wanted in parts.
void classifier(const Array& loss, const OptionalArray& dx, const OptionalArray& dw, const OptionalArray& db,
                const Array& metrics, const Array& x, const Array& w, const Array& b, const Array& labels,
                double smoothing) {
  const Call call("classifier");
  call.rank("x", x, 4);
  call.rank("w", w, 2);
  call.expect(x.size() > 0 && w.size() > 0, "x and w must not be empty");
  call.expect(smoothing >= 0 && smoothing <= 1, "smoothing must lie in [0, 1]");
  call.expect(dx.has_value() == dw.has_value() && dx.has_value() == db.has_value(), "dx, dw and db go together");
  call.typed(x, [&](auto zero) {
    using T = decltype(zero);
    const py::ssize_t N = x.shape(0), HW = x.shape(1) * x.shape(2), C = x.shape(3), K = w.shape(1);
    call.expect(C + 2 * K <= CLASSIFIER_LIMIT && N <= INT32_MAX && HW * C <= INT32_MAX,
                "C + 2 K must be at most 11000, N and H W C under 2**31");
    const bool parts = dw && dw->ndim() == 3;
    const py::ssize_t count = kernels<T>().classifier_parts(N, C, K);
    Wide<T>* const loss_p = call.out<Wide<T>>("loss", loss, {});
    T* const dx_p = call.out<T>("dx", dx, Shape(x));
    Wide<T>* const dw_p = parts ? call.out<Wide<T>>("dw", dw, {count, C, K}) : call.out<Wide<T>>("dw", dw, {C, K});
    Wide<T>* const db_p = parts ? call.out<Wide<T>>("db", db, {count, K}) : call.out<Wide<T>>("db", db, {K});
    double* const metrics_p = call.out<double>("metrics", metrics, {4});
    const T* const xp = call.in<T>("x", x, Shape(x));
    const T* const wp = call.in<T>("w", w, {C, K});
    const T* const bp = call.in<T>("b", b, {K});
    const i64* const labels_p = call.in<i64>("labels", labels, {N});
    call.expect(!readable() || all_below(labels_p, N, K), "labels must lie between 0 and K - 1");
    call.expect(!readable() || metrics_p[3] == 0, "the last element of metrics must be 0");
    const NoGil released;
    kernels<T>().classifier(loss_p, dx_p, dw_p, db_p, metrics_p, xp, wp, bp, labels_p, smoothing, parts, N, HW, C, K);
  });
}

void sgd(const std::vector<Array>& weights, const std::optional<std::vector<Array>>& velocities,
         const std::vector<Array>& gradients, const std::vector<double>& decays, const std::variant<double, Array>& lr,
         double momentum, bool nesterov, const std::optional<std::vector<OptionalArray>>& copies) {
  const Call call("sgd");
  const std::size_t count = weights.size();
  call.expect(gradients.size() == count && decays.size() == count && (!velocities || velocities->size() == count) &&
                  (!copies || copies->size() == count),
              "weights, velocities, gradients, decays and copies must be of the same length");
  call.expect(momentum == 0 || velocities, "velocities must be given unless momentum is 0");
  SgdRule rule{0, nullptr, momentum, nesterov};
  if (const double* rate = std::get_if<double>(&lr)) {
    rule.lr = *rate;
  } else {
    rule.lr_array = call.in<double>("lr", std::get<Array>(lr), {});
  }
  if (count == 0) return;
  call.typed(weights[0], [&](auto zero) {
    using T = decltype(zero);
    std::vector<SgdParameter<T>> parameters(count);
    for (std::size_t i = 0; i < count; i++) {
      const Shape shape(weights[i]);
      const bool in_parts = gradients[i].ndim() == shape.rank + 1;
      std::vector<py::ssize_t> sizes(shape.size, shape.size + shape.rank);
      if (in_parts) sizes.insert(sizes.begin(), gradients[i].shape(0));
      SgdParameter<T>& p = parameters[i];
      p.w = call.out<T>("weight", weights[i], shape);
      p.velocity = velocities ? call.out<T>("velocity", (*velocities)[i], shape) : nullptr;
      p.dw = call.in<T>("gradient", gradients[i], Shape(sizes));
      p.n = weights[i].size();
      p.parts = in_parts ? sizes[0] : 1;
      p.decay = decays[i];
      p.copy = copies ? call.out<bf16>("copy", (*copies)[i], shape) : nullptr;
      call.expect(p.parts >= 1 && p.parts <= INT32_MAX, "a gradient must have 1 to 2**31 - 1 parts");
      call.expect(!p.copy || holds<float>(weights[i]), "only float32 weights have copies");
    }
    const NoGil released;
    kernels<T>().sgd(i64(count), parameters.data(), rule);
  });
}

void augment(const Array& x, const Array& images, const Array& index, const Array& top, const Array& left,
             const Array& flip, const Array& mean, const Array& scale) {
  const Call call("augment");
  call.rank("x", x, 4);
  call.rank("images", images, 4);
  call.typed(x, [&](auto zero) {
    using T = decltype(zero);
    const py::ssize_t N = x.shape(0), L = images.shape(0), H = x.shape(1), W = x.shape(2), C = x.shape(3);
    T* const xp = call.out<T>("x", x, Shape(x));
    const std::uint8_t* const images_p = call.in<std::uint8_t>("images", images, {L, H, W, C});
    const i64* const index_p = call.in<i64>("index", index, {N});
    const std::int32_t* const top_p = call.in<std::int32_t>("top", top, {N});
    const std::int32_t* const left_p = call.in<std::int32_t>("left", left, {N});
    const std::uint8_t* const flip_p = call.in<std::uint8_t>("flip", flip, {N});
    const float* const mean_p = call.in<float>("mean", mean, {H, W, C});
    const float* const scale_p = call.in<float>("scale", scale, {C});
    call.expect(!readable() || all_below(index_p, N, L), "index must lie between 0 and the number of images - 1");
    if (x.size() == 0) return;
    const NoGil released;
    kernels<T>().augment(xp, images_p, index_p, top_p, left_p, flip_p, mean_p, scale_p, N, H, W, C);
  });
}

void augment_step(const Array& x, const Array& batch_labels, const Array& images, const Array& labels,
                  const Array& order, const Array& counter, const Array& mean, const Array& scale, std::uint64_t key,
                  i64 batch_size, i64 steps_per_epoch, std::optional<i64> padding) {
  const Call call("augment_step");
  call.rank("x", x, 4);
  call.rank("images", images, 4);
  call.rank("order", order, 1);
  call.typed(x, [&](auto zero) {
    using T = decltype(zero);
    const py::ssize_t N = x.shape(0), L = images.shape(0), H = x.shape(1), W = x.shape(2), C = x.shape(3);
    T* const xp = call.out<T>("x", x, Shape(x));
    i64* const batch_labels_p = call.out<i64>("batch_labels", batch_labels, {N});
    const std::uint8_t* const images_p = call.in<std::uint8_t>("images", images, {L, H, W, C});
    const i64* const labels_p = call.in<i64>("labels", labels, {L});
    const i64* const order_p = call.in<i64>("order", order, Shape(order));
    i64* const counter_p = call.out<i64>("counter", counter, {2});
    const float* const mean_p = call.in<float>("mean", mean, {H, W, C});
    const float* const scale_p = call.in<float>("scale", scale, {C});
    call.expect(x.size() > 0 && N <= INT32_MAX && H * W * C <= INT32_MAX,
                "x must have an element, and N and H W C be under 2**31");
    call.expect(N <= batch_size, "x must have at most batch_size images");
    call.expect(steps_per_epoch >= 1 && order.size() >= 1 && steps_per_epoch - 1 <= (order.size() - 1) / batch_size,
                "each step of an epoch must have an image in order");
    call.expect(!padding || (*padding >= 0 && *padding <= MAX_WINDOW), "padding must lie between 0 and 2**20");
    if (readable()) {
      call.expect(counter_p[0] >= 0 && counter_p[1] == 0, "counter must hold a step, which is not negative, and a 0");
      const i64 first = counter_p[0] % steps_per_epoch * batch_size;
      call.expect(N <= order.size() - first, "order must have that many images for the step");
      call.expect(all_below(order_p + first, N, L), "order must lie between 0 and the number of images - 1");
    }
    const BatchPlan plan{N, batch_size, steps_per_epoch, padding.has_value(), padding.value_or(0), key};
    const NoGil released;
    kernels<T>().augment_step(xp, batch_labels_p, images_p, labels_p, order_p, counter_p, mean_p, scale_p, plan, H, W,
                              C);
  });
}

}  // namespace

inline void define_kernels(py::module_& module) {
  // Fetches NumPy's table of functions. At a first call it would give up the GIL for that, and pybind11 has no
  // enter_interpreter around the way back.
  py::dtype::of<float>();
  module.def("binary", &binary);
  module.def("unary", &unary);
  module.def("unary_backward", &unary_backward);
  module.def("add_relu", &add_relu);
  module.def("maximum_backward", &maximum_backward);
  module.def("pow_backward", &pow_backward);
  module.def("dropout", &dropout);
  module.def("copy", &copy);
  module.def("fill", &fill);
  module.def("cast", &cast);
  module.def("sum", &sum);
  module.def("max", &max);
  module.def("max_backward", &max_backward);
  module.def("matmul", &matmul);
  module.def("conv2d_forward", &conv2d_forward);
  module.def("conv2d_bias_forward", &conv2d_bias_forward);
  module.def("conv2d_backward_input", &conv2d_backward_input);
  module.def("conv2d_backward_weight", &conv2d_backward_weight);
  if (kernels<float>().conv3x3_rows) {
    module.def("conv3x3_rows", &conv3x3_rows);
    module.def("conv3x3_slabs", &conv3x3_slabs);
    module.def("conv3x3_forward", &conv3x3_forward);
    module.def("conv3x3_backward_input", &conv3x3_backward_input);
    module.def("conv3x3_backward_weight", &conv3x3_backward_weight);
    module.def("block_output", &block_output);
    module.def("block_output_rows", &block_output_rows);
    module.def("block_output_backward", &block_output_backward);
  }
  module.def("batch_norm_forward", &batch_norm_forward);
  module.def("batch_norm_backward", &batch_norm_backward);
  module.def("batch_norm_inference", &batch_norm_inference);
  module.def("batch_norm_inference_backward", &batch_norm_inference_backward);
  module.def("max_pool2d_forward", &max_pool2d_forward);
  module.def("max_pool2d_backward", &max_pool2d_backward);
  module.def("avg_pool2d_forward", &avg_pool2d_forward);
  module.def("avg_pool2d_backward", &avg_pool2d_backward);
  module.def("global_avg_pool2d_forward", &global_avg_pool2d_forward);
  module.def("global_avg_pool2d_backward", &global_avg_pool2d_backward);
  module.def("cross_entropy", &cross_entropy);
  if (kernels<float>().classifier) {
    module.def("classifier_parts", &classifier_parts);
    module.def("classifier", &classifier);
  }
  module.def("sgd", &sgd);
  module.def("augment", &augment);
  module.def("augment_step", &augment_step);
}

}  // namespace tinyres
