// y = f(x) and y = f(a, b) with broadcasting, their backwards, dropout, strided copies.
//
// A kernel here computes next to nothing, so its time is that of its reads and writes: a thread moves packs of 16 bytes
// wherever addresses allow it, neighbouring threads move neighbouring packs, and a grid of at most MAX_BLOCKS strides
// over the array. Two patterns carry all but dropout: `map` over dense arrays of one shape, `strided` over views of two
// operands. What is done to an element is a functor, compiled into its own kernel: no loop decides what to do.
// An output may be the very array of an input (x += dx is `binary` with y = a), so nothing here is declared restrict.
#include "common.h"
#include "random.h"

namespace tinyres {
namespace {

constexpr int THREADS = 256;
constexpr i64 MAX_BLOCKS = 4096;  // a few times what a GPU holds at once: threads that end at about the same time

inline dim3 blocks_for(i64 items) { return dim3(unsigned(min(ceil_div(items, THREADS), MAX_BLOCKS))); }

// N neighbouring elements, read and written by one instruction.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

template <class T>
constexpr int PACK = 16 / sizeof(T);

template <int N, class T>
bool aligned(const T* p) {
  return reinterpret_cast<std::uintptr_t>(p) % sizeof(Pack<T, N>) == 0;
}

template <int N, class T>
__device__ Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <class T, int N>
__device__ void store(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// f(inputs[j]...) for each element j of the packs
template <class T, int N, class F, class... Packs>
__device__ Pack<T, N> each(const F& f, const Packs&... inputs) {
  Pack<T, N> y;
  for (int j = 0; j < N; j++) y.at[j] = f(inputs.at[j]...);
  return y;
}

// A function of numbers as one of stored elements.
template <class T, class F>
struct Rounded {
  F f;
  template <class... Inputs>
  __device__ T operator()(Inputs... inputs) const {
    return narrow<T>(f(wide(inputs)...));
  }
};

// ---- dense arrays of one shape ------------------------------------------------------------------------------------

template <int N, class T, class F, class... Inputs>
__global__ void map_kernel(T* y, i64 n, F f, const Inputs*... inputs) {
  const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x, threads = i64(gridDim.x) * blockDim.x;
  for (i64 pack = thread; pack < n / N; pack += threads)
    store(y + pack * N, each<T, N>(f, load<N>(inputs + pack * N)...));
  for (i64 i = n / N * N + thread; i < n; i += threads) store(y + i, each<T, 1>(f, load<1>(inputs + i)...));
}

// y[i] = f(inputs[i]...)
template <class T, class F, class... Inputs>
void map(const char* op, T* y, i64 n, const F& f, const Inputs*... inputs) {
  if (n == 0) return;
  constexpr int N = PACK<T>;
  const bool packs = (aligned<N>(y) && ... && aligned<N>(inputs));
  const auto kernel = packs ? map_kernel<N, T, Rounded<T, F>, Inputs...> : map_kernel<1, T, Rounded<T, F>, Inputs...>;
  launch(op, kernel, blocks_for(packs ? ceil_div(n, N) : n), dim3(THREADS), 0, current_stream(), y, n, Rounded<T, F>{f},
         inputs...);
}

struct Relu {
  template <class W>
  __device__ W operator()(W x) const {
    return W(0) > x ? W(0) : x;  // a comparison with NaN is false and keeps it
  }
};

// The argument of exp is never positive, so that it cannot overflow.
template <class W>
__device__ W sigmoid(W x) {
  const W e = exp(x < 0 ? x : -x);
  return (x < 0 ? e : W(1)) / (1 + e);
}

template <Unary OP>
struct UnaryOf {
  template <class W>
  __device__ W operator()(W x) const {
    switch (OP) {
      case Unary::neg: return -x;
      case Unary::exp: return exp(x);
      case Unary::log: return log(x);
      case Unary::sqrt: return sqrt(x);
      case Unary::sigmoid: return sigmoid(x);
      case Unary::tanh: return tanh(x);
      default: return Relu{}(x);
    }
  }
};

template <class T>
void unary(Unary op, T* y, const T* x, i64 n) {
  switch (op) {
    case Unary::neg: return map("unary", y, n, UnaryOf<Unary::neg>{}, x);
    case Unary::exp: return map("unary", y, n, UnaryOf<Unary::exp>{}, x);
    case Unary::log: return map("unary", y, n, UnaryOf<Unary::log>{}, x);
    case Unary::sqrt: return map("unary", y, n, UnaryOf<Unary::sqrt>{}, x);
    case Unary::sigmoid: return map("unary", y, n, UnaryOf<Unary::sigmoid>{}, x);
    case Unary::tanh: return map("unary", y, n, UnaryOf<Unary::tanh>{}, x);
    case Unary::relu: return map("unary", y, n, UnaryOf<Unary::relu>{}, x);
  }
}

// From y = f(x) and dy. The other functions' are -dy, dy * y and dy / x; the bindings let none of them through.
template <Unary OP>
struct UnaryBackward {
  template <class W>
  __device__ W operator()(W dy, W y) const {
    switch (OP) {
      case Unary::sqrt: return dy / (y + y);
      case Unary::sigmoid: return dy * (y * (1 - y));
      case Unary::tanh: return dy * (1 - y * y);
      default: return y > 0 ? dy : W(0);  // relu
    }
  }
};

template <class T>
void unary_backward(Unary op, T* dx, const T* dy, const T* y, i64 n) {
  switch (op) {
    case Unary::sqrt: return map("unary_backward", dx, n, UnaryBackward<Unary::sqrt>{}, dy, y);
    case Unary::sigmoid: return map("unary_backward", dx, n, UnaryBackward<Unary::sigmoid>{}, dy, y);
    case Unary::tanh: return map("unary_backward", dx, n, UnaryBackward<Unary::tanh>{}, dy, y);
    case Unary::relu: return map("unary_backward", dx, n, UnaryBackward<Unary::relu>{}, dy, y);
    default: return;
  }
}

struct AddRelu {
  template <class W>
  __device__ W operator()(W a, W b) const {
    return Relu{}(a + b);
  }
};

template <class T>
void add_relu(T* y, const T* a, const T* b, i64 n) {
  map("add_relu", y, n, AddRelu{}, a, b);
}

// The share of one operand of maximum in dy.
struct MaximumShare {
  template <class W>
  __device__ W operator()(W dy, W mine, W other) const {
    return mine > other ? dy : mine == other ? dy / 2 : W(0);
  }
};

template <class T>
void maximum_backward(T* da, T* db, const T* dy, const T* a, const T* b, i64 n) {
  map("maximum_backward", da, n, MaximumShare{}, dy, a, b);
  map("maximum_backward", db, n, MaximumShare{}, dy, b, a);
}

// y = a^b: da = dy * b * a^(b-1), db = dy * y * log(a). Where b is 0, y is 1 whatever a is; where a is 0, y does not
// move with b: those two are zero, where the formulas give 0 * inf.
struct PowByA {
  template <class W>
  __device__ W operator()(W dy, W a, W b) const {
    return b == 0 ? W(0) : dy * b * pow(a, b - 1);
  }
};
struct PowByB {
  template <class W>
  __device__ W operator()(W dy, W a, W y) const {
    return a == 0 ? W(0) : dy * y * log(a);
  }
};

template <class T>
void pow_backward(T* da, T* db, const T* dy, const T* a, const T* b, const T* y, i64 n) {
  map("pow_backward", da, n, PowByA{}, dy, a, b);
  map("pow_backward", db, n, PowByB{}, dy, a, y);
}

// Word i of the draw decides on element i. The generator makes four words at a time: N is 4, or 1.
template <int N, class T>
__device__ void dropout_pack(T* y, const T* x, i64 i, u32 threshold, Wide<T> scale, RandomKey key) {
  const philox::Block bits = philox::block(u64(i) / 4, key.key, key.draw);
  Pack<T, N> pack = load<N>(x + i);
  for (int j = 0; j < N; j++) {
    const bool keep = bits.word[N == 4 ? j : i % 4] >> 8 >= threshold;
    pack.at[j] = narrow<T>(keep ? wide(pack.at[j]) * scale : Wide<T>(0));
  }
  store(y + i, pack);
}

template <int N, class T>
__global__ void dropout_kernel(T* y, const T* x, i64 n, u32 threshold, Wide<T> scale, RandomKey key) {
  const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x, threads = i64(gridDim.x) * blockDim.x;
  for (i64 pack = thread; pack < n / N; pack += threads) dropout_pack<N>(y, x, pack * N, threshold, scale, key);
  for (i64 i = n / N * N + thread; i < n; i += threads) dropout_pack<1>(y, x, i, threshold, scale, key);
}

template <class T>
void dropout(T* y, const T* x, i64 n, double p, RandomKey key) {
  if (n == 0) return;
  // Uniform i is k * 2^-24 with k the upper 24 bits of word i: compared exactly, as integers.
  const u32 threshold = u32(ceil(p * 0x1p24));
  const bool packs = aligned<4>(y) && aligned<4>(x);
  const auto kernel = packs ? dropout_kernel<4, T> : dropout_kernel<1, T>;
  launch("dropout", kernel, blocks_for(packs ? ceil_div(n, 4) : n), dim3(THREADS), 0, current_stream(), y, x, n,
         threshold, Wide<T>(1 / (1 - p)), key);
}

template <class W>
struct Constant {
  W value;
  __device__ W operator()() const { return value; }
};

template <class T>
void fill(T* y, double value, i64 n) {
  map("fill", y, n, Constant<Wide<T>>{Wide<T>(value)});
}

struct Same {
  __device__ float operator()(float x) const { return x; }
};

void cast_to_bf16(bf16* y, const float* x, i64 n) { map("cast", y, n, Same{}, x); }
void cast_from_bf16(float* y, const bf16* x, i64 n) { map("cast", y, n, Same{}, x); }

// ---- strided arrays -----------------------------------------------------------------------------------------------

// The pack of an operand that begins at p: neighbours, or one element N times where the last axis repeats it.
template <int N, class T>
__device__ Pack<T, N> load_or_repeat(const T* p, i64 stride) {
  if (stride != 0) return load<N>(p);
  Pack<T, N> pack;
  for (int j = 0; j < N; j++) pack.at[j] = *p;
  return pack;
}

// Elements i to i + N - 1 in row-major order, which lie in one row of the last axis where N > 1.
template <int N, class T, class F>
__device__ void strided_pack(T* y, const T* a, const T* b, const Strided& s, int i, const F& f) {
  const int last = s.rank - 1;
  int to_y = 0, to_a = 0, to_b = 0;
  for (int axis = last, rest = i; axis >= 0; axis--) {
    const int size = int(s.size[axis]), above = axis == 0 ? 0 : rest / size, index = rest - above * size;
    to_y += index * int(s.y[axis]);
    to_a += index * int(s.a[axis]);
    to_b += index * int(s.b[axis]);
    rest = above;
  }
  const Pack<T, N> u = load_or_repeat<N>(a + to_a, s.a[last]), v = load_or_repeat<N>(b + to_b, s.b[last]);
  store(y + to_y, each<T, N>(f, u, v));
}

template <int N, class T, class F>
__global__ void strided_kernel(T* y, const T* a, const T* b, Strided s, i64 n, F f) {
  const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x, threads = i64(gridDim.x) * blockDim.x;
  for (i64 pack = thread; pack < n / N; pack += threads) strided_pack<N>(y, a, b, s, int(pack) * N, f);
  for (i64 i = n / N * N + thread; i < n; i += threads) strided_pack<1>(y, a, b, s, int(i), f);
}

// Whether the N elements from any multiple of N on are neighbours at p, and aligned.
template <class T>
bool in_packs(const T* p, const i64* stride, int last) {
  for (int axis = 0; axis < last; axis++)
    if (stride[axis] % PACK<T> != 0) return false;
  return stride[last] == 1 && aligned<PACK<T>>(p);
}

inline i64 magnitude(i64 stride) { return stride < 0 ? -stride : stride; }

// y[s.y] = f(a[s.a], b[s.b]). Kernels compute offsets in int, for 64-bit divisions are slow: where an offset might not
// fit, the work is cut in two across the axis that reaches farthest.
template <class T, class F>
void strided(const char* op, T* y, const T* a, const T* b, Strided s, const F& f) {
  if (s.rank == 0) {  // a scalar
    s.rank = 1;
    s.size[0] = s.y[0] = s.a[0] = s.b[0] = 1;
  }
  i64 n = 1, reach = 0, farthest_reach = -1;
  int farthest = 0;
  for (int axis = 0; axis < s.rank; axis++) {
    const i64 stride = max(magnitude(s.y[axis]), max(magnitude(s.a[axis]), magnitude(s.b[axis])));
    const i64 axis_reach = (s.size[axis] - 1) * stride;
    n *= s.size[axis];
    reach += axis_reach;
    if (axis_reach > farthest_reach) {
      farthest = axis;
      farthest_reach = axis_reach;
    }
  }
  if (n == 0) return;
  if (reach > 0x7fffffff) {
    Strided half = s;
    const i64 cut = half.size[farthest] = s.size[farthest] / 2;
    strided(op, y, a, b, half, f);
    half.size[farthest] = s.size[farthest] - cut;
    return strided(op, y + cut * s.y[farthest], a + cut * s.a[farthest], b + cut * s.b[farthest], half, f);
  }
  constexpr int N = PACK<T>;
  const int last = s.rank - 1;
  const bool packs = (s.rank == 1 || s.size[last] % N == 0) && in_packs(y, s.y, last) &&
                     (s.a[last] == 0 || in_packs(a, s.a, last)) && (s.b[last] == 0 || in_packs(b, s.b, last));
  const auto kernel = packs ? strided_kernel<N, T, F> : strided_kernel<1, T, F>;
  launch(op, kernel, blocks_for(packs ? ceil_div(n, N) : n), dim3(THREADS), 0, current_stream(), y, a, b, s, n, f);
}

template <Binary OP>
struct BinaryOf {
  template <class W>
  __device__ W operator()(W a, W b) const {
    switch (OP) {
      case Binary::add: return a + b;
      case Binary::sub: return a - b;
      case Binary::mul: return a * b;
      case Binary::div: return a / b;
      case Binary::pow: return pow(a, b);
      default: return a > b || a != a ? a : b;  // maximum: b wherever the comparison is false, NaN included
    }
  }
};

template <class T>
void binary(Binary op, T* y, const T* a, const T* b, const Strided& s) {
  Strided dense = s;
  for (i64 axis = s.rank - 1, stride = 1; axis >= 0; stride *= s.size[axis--]) dense.y[axis] = stride;
  const auto run = [&](auto f) { strided("binary", y, a, b, dense, Rounded<T, decltype(f)>{f}); };
  switch (op) {
    case Binary::add: return run(BinaryOf<Binary::add>{});
    case Binary::sub: return run(BinaryOf<Binary::sub>{});
    case Binary::mul: return run(BinaryOf<Binary::mul>{});
    case Binary::div: return run(BinaryOf<Binary::div>{});
    case Binary::pow: return run(BinaryOf<Binary::pow>{});
    case Binary::maximum: return run(BinaryOf<Binary::maximum>{});
  }
}

// Not by way of numbers, so that the bits of a NaN are kept.
template <class T>
struct First {
  __device__ T operator()(T a, T) const { return a; }
};

template <class T>
void copy(T* y, const T* a, const Strided& s) {
  Strided twice = s;  // the second operand is the first once more; the compiler drops it
  for (int axis = 0; axis < s.rank; axis++) twice.b[axis] = s.a[axis];
  strided("copy", y, a, a, twice, First<T>{});
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
  if constexpr (std::is_same_v<T, float>) {
    table.to_bf16 = cast_to_bf16;
    table.from_bf16 = cast_from_bf16;
  }
}

template void elementwise_kernels<float>(Kernels<float>&);
template void elementwise_kernels<double>(Kernels<double>&);
template void elementwise_kernels<bf16>(Kernels<bf16>&);

}  // namespace tinyres
