// Reductions over axes: y (outer, inner) of x (outer, n, inner). Sums run in double whatever the element type.
//
// A long sum of few outputs is cut into parts of rows, by the shape alone, whose sums are added up in order; a wide
// one is cut into runs of outputs, each summed by one thread.
#include "vec.h"

namespace tinyres::TINYRES_TARGET {
namespace {

constexpr i64 RUN = 1024;  // outputs summed at once: their sums stay in the L1 cache

// total[i] = sum over rows of x[row * stride + i], i < count.
template <class T>
void sum_rows(double* total, const T* x, i64 rows, i64 stride, i64 count) {
  for (i64 i = 0; i < count; i++) total[i] = 0;
  for (i64 row = 0; row < rows; row++, x += stride)
    for (i64 i = 0; i < count; i++) total[i] += double(x[i]);
}

// The sum of n neighbours. Sixteen sums at once, because an addition takes several cycles.
template <class T>
double sum_run(const T* x, i64 n) {
  double lanes[16] = {}, rest = 0;
  const i64 whole = n / 16 * 16;
  for (i64 i = 0; i < whole; i += 16)
    for (int lane = 0; lane < 16; lane++) lanes[lane] += double(x[i + lane]);
  for (i64 i = whole; i < n; i++) rest += double(x[i]);
  for (int width = 8; width > 0; width /= 2)
    for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
  return lanes[0] + rest;
}

template <class T>
void sum(T* y, const T* x, i64 outer, i64 n, i64 inner) {
  if (inner > RUN) {
    const i64 runs = (inner + RUN - 1) / RUN;
    parallel_for(outer * runs, [&](i64 task) {
      const i64 o = task / runs, first = task % runs * RUN, count = first + RUN < inner ? RUN : inner - first;
      double total[RUN];
      sum_rows(total, x + o * n * inner + first, n, inner, count);
      for (i64 i = 0; i < count; i++) y[o * inner + first + i] = T(total[i]);
    });
    return;
  }
  // Parts of an output's rows, and as many short outputs to a task as make up a part.
  const i64 rows = items_per_part(inner), parts = n > rows ? (n + rows - 1) / rows : 1;
  Scratch<double> partial(outer * parts * inner);
  parallel_ranges(outer * parts, items_per_part((n < rows ? n : rows) * inner), [&](i64 begin, i64 end) {
    for (i64 task = begin; task < end; task++) {
      const i64 first = task % parts * rows, count = first + rows < n ? rows : n - first;
      const T* from = x + (task / parts * n + first) * inner;
      double* total = &partial[task * inner];
      if (inner == 1)
        *total = sum_run(from, count);
      else
        sum_rows(total, from, count, inner, inner);
    }
  });
  parallel_ranges(outer, items_per_part(parts * inner), [&](i64 begin, i64 end) {
    for (i64 o = begin; o < end; o++) {
      double* total = &partial[o * parts * inner];
      for (i64 part = 1; part < parts; part++)
        for (i64 i = 0; i < inner; i++) total[i] += total[part * inner + i];
      for (i64 i = 0; i < inner; i++) y[o * inner + i] = T(total[i]);
    }
  });
}

template <class T>
void max(T* y, const T* x, i64 outer, i64 n, i64 inner) {
  const i64 runs = (inner + RUN - 1) / RUN;
  parallel_ranges(outer * runs, items_per_part(n * (inner < RUN ? inner : RUN)), [&](i64 begin, i64 end) {
    for (i64 task = begin; task < end; task++) {
      const i64 o = task / runs, first = task % runs * RUN, count = first + RUN < inner ? RUN : inner - first;
      T* const largest = y + o * inner + first;
      const T* from = x + o * n * inner + first;
      for (i64 i = 0; i < count; i++) largest[i] = from[i];
      for (i64 row = 1; row < n; row++) {
        from += inner;
        for (i64 i = 0; i < count; i++)  // a NaN wins, and stays
          largest[i] = from[i] > largest[i] || from[i] != from[i] ? from[i] : largest[i];
      }
    }
  });
}

// The ties of an output are counted first, then its gradient is shared among them.
template <class T>
void max_backward(T* dx, const T* dy, const T* x, const T* y, i64 outer, i64 n, i64 inner) {
  const i64 runs = (inner + RUN - 1) / RUN;
  parallel_ranges(outer * runs, items_per_part(n * (inner < RUN ? inner : RUN)), [&](i64 begin, i64 end) {
    for (i64 task = begin; task < end; task++) {
      const i64 o = task / runs, first = task % runs * RUN, count = first + RUN < inner ? RUN : inner - first;
      const i64 out = o * inner + first, in = o * n * inner + first;
      T ties[RUN];
      for (i64 i = 0; i < count; i++) ties[i] = 0;
      for (i64 row = 0; row < n; row++)
        for (i64 i = 0; i < count; i++) ties[i] += T(x[in + row * inner + i] == y[out + i]);
      for (i64 row = 0; row < n; row++)
        for (i64 i = 0; i < count; i++)
          // A NaN ties with nothing, not itself: 0 * dy / 0 is NaN.
          dx[in + row * inner + i] = dy[out + i] * T(x[in + row * inner + i] == y[out + i]) / ties[i];
    }
  });
}

}  // namespace

template <class T>
void reduce_kernels(Kernels<T>& table) {
  table.sum = sum<T>;
  table.max = max<T>;
  table.max_backward = max_backward<T>;
}

template void reduce_kernels<float>(Kernels<float>&);
template void reduce_kernels<double>(Kernels<double>&);

}  // namespace tinyres::TINYRES_TARGET
