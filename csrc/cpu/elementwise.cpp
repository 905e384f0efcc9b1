// y = f(x) and y = f(a, b) with broadcasting, their backwards, dropout, strided copies.
// Every f is written on vectors; functions of the C library are applied lane by lane. An output may be the very
// array of an input (x += dx is `binary` with y = a), so nothing here is declared restrict.
#include <math.h>

#include "../random.h"
#include "vec.h"

namespace tinyres::TINYRES_TARGET {
namespace {

inline float exp_of(float x) { return ::expf(x); }
inline double exp_of(double x) { return ::exp(x); }
inline float log_of(float x) { return ::logf(x); }
inline double log_of(double x) { return ::log(x); }
inline float sqrt_of(float x) { return ::sqrtf(x); }
inline double sqrt_of(double x) { return ::sqrt(x); }
inline float tanh_of(float x) { return ::tanhf(x); }
inline double tanh_of(double x) { return ::tanh(x); }
inline float pow_of(float x, float y) { return ::powf(x, y); }
inline double pow_of(double x, double y) { return ::pow(x, y); }

// The argument of exp is never positive, so that it cannot overflow.
template <class T>
inline T sigmoid_of(T x) {
  const T e = exp_of(x < 0 ? x : -x);
  return (x < 0 ? e : T(1)) / (1 + e);
}

template <class T, class F, class... V>
inline Vec<T> lanewise(const F& f, V... v) {
  Vec<T> y{};
  for (int lane = 0; lane < LANES<T>; lane++) y[lane] = f(v[lane]...);
  return y;
}

// ---- dense arrays of one shape ------------------------------------------------------------------------------------

// y[i] = f(inputs[i]...)
template <class T, class F, class... Inputs>
void map(T* y, i64 n, const F& f, const Inputs*... inputs) {
  parallel_ranges(n, PART, [&](i64 begin, i64 end) {
    for_vectors<T>(end - begin, [&](i64 i, i64 lanes) {
      store_first(y + begin + i, f(load_first(inputs + begin + i, lanes)...), lanes);
    });
  });
}

template <class T>
void unary(Unary op, T* y, const T* x, i64 n) {
  using V = Vec<T>;
  switch (op) {
    case Unary::neg: return map(y, n, [](V v) { return -v; }, x);
    case Unary::exp: return map(y, n, [](V v) { return lanewise<T>([](T e) { return exp_of(e); }, v); }, x);
    case Unary::log: return map(y, n, [](V v) { return lanewise<T>([](T e) { return log_of(e); }, v); }, x);
    case Unary::sqrt: return map(y, n, [](V v) { return lanewise<T>([](T e) { return sqrt_of(e); }, v); }, x);
    case Unary::sigmoid: return map(y, n, [](V v) { return lanewise<T>([](T e) { return sigmoid_of(e); }, v); }, x);
    case Unary::tanh: return map(y, n, [](V v) { return lanewise<T>([](T e) { return tanh_of(e); }, v); }, x);
    case Unary::relu:  // v second: a comparison with NaN is false and keeps it
      return map(y, n, [](V v) { return larger<T>(V{}, v); }, x);
  }
}

template <class T>
void unary_backward(Unary op, T* dx, const T* dy, const T* y, i64 n) {
  using V = Vec<T>;
  switch (op) {
    case Unary::sqrt: return map(dx, n, [](V g, V v) { return g / (v + v); }, dy, y);
    case Unary::sigmoid: return map(dx, n, [](V g, V v) { return g * (v * (T(1) - v)); }, dy, y);
    case Unary::tanh: return map(dx, n, [](V g, V v) { return g * (T(1) - v * v); }, dy, y);
    case Unary::relu: return map(dx, n, [](V g, V v) { return v > T(0) ? g : V{}; }, dy, y);
    default:  // the others are -dy, dy * y and dy / x; the bindings let none of them through
      return;
  }
}

template <class T>
void add_relu(T* y, const T* a, const T* b, i64 n) {
  map(y, n, [](Vec<T> u, Vec<T> v) { return larger<T>(Vec<T>{}, u + v); }, a, b);
}

template <class T>
void maximum_backward(T* da, T* db, const T* dy, const T* a, const T* b, i64 n) {
  using V = Vec<T>;
  const auto share = [](V g, V mine, V other) { return mine > other ? g : (mine == other ? g * T(0.5) : V{}); };
  map(da, n, share, dy, a, b);
  map(db, n, share, dy, b, a);
}

// y = a^b: da = dy * b * a^(b-1), db = dy * y * log(a). Where b is 0, y is 1 whatever a is; where a is 0, y does not
// move with b: those two are zero, where the formulas give 0 * inf.
template <class T>
void pow_backward(T* da, T* db, const T* dy, const T* a, const T* b, const T* y, i64 n) {
  using V = Vec<T>;
  const auto by_a = [](T g, T u, T v) { return v == 0 ? T(0) : g * v * pow_of(u, v - 1); };
  const auto by_b = [](T g, T u, T w) { return u == 0 ? T(0) : g * w * log_of(u); };
  map(da, n, [&](V g, V u, V v) { return lanewise<T>(by_a, g, u, v); }, dy, a, b);
  map(db, n, [&](V g, V u, V w) { return lanewise<T>(by_b, g, u, w); }, dy, a, y);
}

template <class T>
void dropout(T* y, const T* x, i64 n, double p, RandomKey key) {
  // Uniform i is k * 2^-24 with k the upper 24 bits of word i: compared exactly, as integers.
  const std::uint32_t threshold = std::uint32_t(::ceil(p * 0x1p24));
  const T scale = T(1 / (1 - p));
  parallel_ranges(n, PART, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; i += 4) {
      const philox::Block bits = philox::block(std::uint64_t(i) / 4, key.key, key.draw);
      for (i64 j = 0; j < 4 && i + j < end; j++) y[i + j] = bits.word[j] >> 8 >= threshold ? x[i + j] * scale : T(0);
    }
  });
}

template <class T>
void fill(T* y, double value, i64 n) {
  map(y, n, [=]() { return splat(T(value)); });
}

inline void to_bf16(bf16* y, const float* x, i64 n) {
  parallel_ranges(n, PART, [=](i64 begin, i64 end) {
    for (i64 i = begin; i < end; i++) y[i] = tinyres::to_bf16(x[i]);
  });
}

inline void from_bf16(float* y, const bf16* x, i64 n) {
  parallel_ranges(n, PART, [=](i64 begin, i64 end) {
    for (i64 i = begin; i < end; i++) y[i] = to_float(x[i]);
  });
}

// ---- strided arrays -----------------------------------------------------------------------------------------------

// Walks two operands in runs along the last axis, in parts of the flat order: run(flat, p, q, length) with the flat
// position and the operands' offsets of the run's first element.
template <class F>
void walk(const Strided& s, const i64* p_stride, const i64* q_stride, const F& run) {
  if (s.rank == 0) return run(0, 0, 0, 1);
  const int last = s.rank - 1;
  i64 total = 1;
  for (int axis = 0; axis <= last; axis++) total *= s.size[axis];
  parallel_ranges(total, PART, [&](i64 begin, i64 end) {
    i64 index[MAX_RANK], p = 0, q = 0;
    for (i64 axis = last, rest = begin; axis >= 0; axis--) {
      index[axis] = rest % s.size[axis];
      rest /= s.size[axis];
      p += index[axis] * p_stride[axis];
      q += index[axis] * q_stride[axis];
    }
    for (i64 flat = begin; flat < end;) {
      const i64 to_edge = s.size[last] - index[last], length = to_edge < end - flat ? to_edge : end - flat;
      run(flat, p, q, length);
      flat += length;
      // To the start of the next row: like an odometer, an axis at its end goes back to 0 and turns the one before.
      p -= index[last] * p_stride[last];
      q -= index[last] * q_stride[last];
      index[last] = 0;
      for (int axis = last - 1; axis >= 0; axis--) {
        p += p_stride[axis];
        q += q_stride[axis];
        if (++index[axis] < s.size[axis]) break;
        p -= s.size[axis] * p_stride[axis];
        q -= s.size[axis] * q_stride[axis];
        index[axis] = 0;
      }
    }
  });
}

template <class T>
inline Vec<T> load_strided(const T* p, i64 stride, i64 i, i64 lanes) {
  if (stride == 1) return load_first(p + i, lanes);
  if (stride == 0) return splat(*p);
  Vec<T> v{};
  for (i64 lane = 0; lane < lanes; lane++) v[lane] = p[(i + lane) * stride];
  return v;
}

template <class T, class F>
void broadcast(T* y, const T* a, const T* b, const Strided& s, const F& f) {
  const i64 a_step = s.rank ? s.a[s.rank - 1] : 1, b_step = s.rank ? s.b[s.rank - 1] : 1;
  walk(s, s.a, s.b, [&](i64 flat, i64 p, i64 q, i64 length) {
    for_vectors<T>(length, [&](i64 i, i64 lanes) {
      const Vec<T> u = load_strided(a + p, a_step, i, lanes), v = load_strided(b + q, b_step, i, lanes);
      store_first(y + flat + i, f(u, v), lanes);
    });
  });
}

template <class T>
void binary(Binary op, T* y, const T* a, const T* b, const Strided& s) {
  using V = Vec<T>;
  switch (op) {
    case Binary::add: return broadcast(y, a, b, s, [](V u, V v) { return u + v; });
    case Binary::sub: return broadcast(y, a, b, s, [](V u, V v) { return u - v; });
    case Binary::mul: return broadcast(y, a, b, s, [](V u, V v) { return u * v; });
    case Binary::div: return broadcast(y, a, b, s, [](V u, V v) { return u / v; });
    case Binary::pow:
      return broadcast(y, a, b, s, [](V u, V v) { return lanewise<T>([](T e, T f) { return pow_of(e, f); }, u, v); });
    case Binary::maximum:  // u where it is NaN; else v wherever the comparison is false, NaN included
      return broadcast(y, a, b, s, [](V u, V v) { return (u > v) | (u != u) ? u : v; });
  }
}

template <class T>
void copy(T* y, const T* a, const Strided& s) {
  const i64 y_step = s.rank ? s.y[s.rank - 1] : 1, a_step = s.rank ? s.a[s.rank - 1] : 1;
  walk(s, s.y, s.a, [&](i64, i64 p, i64 q, i64 length) {
    if (y_step == 1 && a_step == 1) {
      __builtin_memcpy(y + p, a + q, std::size_t(length) * sizeof(T));
    } else {
      for (i64 i = 0; i < length; i++) y[p + i * y_step] = a[q + i * a_step];
    }
  });
}

}  // namespace

template <class T>
void elementwise_kernels(Kernels<T>& table) {
  table.binary = binary<T>;
  table.unary = unary<T>;
  table.unary_backward = unary_backward<T>;
  table.add_relu = add_relu<T>;
  table.maximum_backward = maximum_backward<T>;
  table.pow_backward = pow_backward<T>;
  table.dropout = dropout<T>;
  table.copy = copy<T>;
  table.fill = fill<T>;
  if constexpr (sizeof(T) == sizeof(float)) {
    table.to_bf16 = to_bf16;
    table.from_bf16 = from_bf16;
  }
}

template void elementwise_kernels<float>(Kernels<float>&);
template void elementwise_kernels<double>(Kernels<double>&);

}  // namespace tinyres::TINYRES_TARGET
