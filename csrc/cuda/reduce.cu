// Reductions over axes: x (outer, n, inner) to y (outer, inner). Sums run in double whatever the element type.
//
// Neighbouring threads take neighbouring elements: those of `inner`, and where it is short those of n too. A group of
// (depth, width) threads joins a run of n for `width` outputs; a block holds as many groups as it has room for. Where
// there are too few outputs to fill a GPU, n is cut into parts of which a second launch joins the results. All of this
// follows from the shape alone, and so does the order of every sum.
#include "join.h"

namespace tinyres {
namespace {

constexpr int THREADS = 256;
constexpr i64 BLOCKS = 4 * 132;  // four on each multiprocessor of an H100 or H200

// ---- the work shared out ------------------------------------------------------------------------------------------

struct Split {
  i64 outer, n, inner;
  int width, depth;
  i64 parts, rows;  // rows of n in a part

  // In parts only if asked.
  Split(i64 outer, i64 n, i64 inner, bool in_parts) : outer(outer), n(n), inner(inner), width(1), depth(1), parts(1) {
    while (width < WARP && width < inner) width *= 2;
    // A warp reads in one piece, and a thread has eight elements to join before it joins with others.
    const i64 deep = max(i64(WARP / width), ceil_div(n, 8));
    while (depth < THREADS / width && depth < min(n, deep)) depth *= 2;
    if (in_parts) parts = max(min(BLOCKS / max(blocks(), i64(1)), n / (8 * depth)), i64(1));
    rows = ceil_div(ceil_div(n, parts), depth) * depth;
    if (n > 0) parts = ceil_div(n, rows);
  }
  int groups() const { return THREADS / (width * depth); }
  i64 columns() const { return ceil_div(inner, width); }
  i64 blocks() const { return ceil_div(outer * parts * columns(), groups()); }
  dim3 grid() const { return dim3(unsigned(blocks())); }
};

// What one thread takes: every depth-th row of n from `row` to before `end`, for the output (o, part, i).
struct Share {
  int level;  // within the depth of its group
  i64 o, part, i, row, end;
  bool inside;

  __device__ explicit Share(const Split& s) {
    const int group_size = s.width * s.depth;
    const int thread = int(threadIdx.x);
    level = thread % group_size / s.width;
    const i64 columns = ceil_div(s.inner, s.width);
    i64 group = i64(blockIdx.x) * (THREADS / group_size) + thread / group_size;
    i = group % columns * s.width + thread % s.width;
    group /= columns;
    part = group % s.parts;
    o = group / s.parts;
    inside = o < s.outer && i < s.inner;
    row = part * s.rows + level;
    end = inside ? min(s.n, (part + 1) * s.rows) : 0;
  }
};

// ---- operations ---------------------------------------------------------------------------------------------------

struct Sum {
  static constexpr const char* NAME = "sum";
  using Value = double;
  static __device__ Value none() { return 0; }
  static __device__ Value join(Value a, Value b) { return a + b; }
};

template <class T>
struct Max {
  static constexpr const char* NAME = "max";
  using Value = Wide<T>;
  static __device__ Value none() { return -Value(INFINITY); }
  static __device__ Value join(Value a, Value b) { return a > b || a != a ? a : b; }  // NaN wins
};

// ---- forward ------------------------------------------------------------------------------------------------------

// y (outer, parts, inner)
template <class Op, class Out, class In>
__global__ void __launch_bounds__(THREADS) reduce(Out* __restrict__ y, const In* __restrict__ x, const Split s) {
  using Value = typename Op::Value;
  const Share share(s);
  Value total = Op::none();
#pragma unroll 8
  for (i64 row = share.row; row < share.end; row += s.depth)
    total = Op::join(total, Value(wide(x[(share.o * s.n + row) * s.inner + share.i])));
  total = join_threads(total, s.width, s.depth, Op::join);
  if (share.level == 0 && share.inside)
    y[(share.o * s.parts + share.part) * s.inner + share.i] = narrow<Out>(Wide<Out>(total));
}

// Of no elements the sum is 0, the maximum -inf.
template <class Op, class T>
void reduce_axis(T* y, const T* x, i64 outer, i64 n, i64 inner) {
  using Value = typename Op::Value;
  if (outer == 0 || inner == 0) return;
  const Split s(outer, n, inner, true);
  if (s.parts == 1) {
    launch(Op::NAME, reduce<Op, T, T>, s.grid(), dim3(THREADS), 0, current_stream(), y, x, s);
    return;
  }
  const Scratch<Value> of_parts(outer * s.parts * inner);
  const Split rest(outer, s.parts, inner, false);
  launch(Op::NAME, reduce<Op, Value, T>, s.grid(), dim3(THREADS), 0, current_stream(), of_parts.get(), x, s);
  launch(Op::NAME, reduce<Op, T, Value>, rest.grid(), dim3(THREADS), 0, current_stream(), y, of_parts.get(), rest);
}

// ---- backward -----------------------------------------------------------------------------------------------------

// The elements equal to the maximum share its gradient. A maximum of NaN equals none, and 0 / 0 makes all of them NaN.
template <class T>
__global__ void share_gradient(T* __restrict__ dx, const T* __restrict__ dy, const T* __restrict__ x,
                               const T* __restrict__ y, const Split s) {
  using W = Wide<T>;
  const Share share(s);
  const i64 output = share.o * s.inner + share.i;
  const W largest = share.inside ? wide(y[output]) : W(0), gradient = share.inside ? wide(dy[output]) : W(0);
  i64 ties = 0;
#pragma unroll 8
  for (i64 row = share.row; row < share.end; row += s.depth)
    ties += wide(x[(share.o * s.n + row) * s.inner + share.i]) == largest;
  const W count = W(join_threads(ties, s.width, s.depth, [](i64 a, i64 b) { return a + b; }));
#pragma unroll 4
  for (i64 row = share.row; row < share.end; row += s.depth) {
    const i64 at = (share.o * s.n + row) * s.inner + share.i;
    dx[at] = narrow<T>(gradient * W(wide(x[at]) == largest) / count);
  }
}

template <class T>
void max_backward(T* dx, const T* dy, const T* x, const T* y, i64 outer, i64 n, i64 inner) {
  if (outer == 0 || inner == 0) return;
  const Split s(outer, n, inner, false);
  launch("max_backward", share_gradient<T>, s.grid(), dim3(THREADS), 0, current_stream(), dx, dy, x, y, s);
}

}  // namespace

template <class T>
void reduce_kernels(Kernels<T>& table) {
  table.sum = reduce_axis<Sum, T>;
  table.max = reduce_axis<Max<T>, T>;
  table.max_backward = max_backward<T>;
}

template void reduce_kernels<float>(Kernels<float>&);
template void reduce_kernels<double>(Kernels<double>&);
template void reduce_kernels<bf16>(Kernels<bf16>&);

}  // namespace tinyres
