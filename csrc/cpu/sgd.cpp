// SGD with momentum and weight decay for all parameters in one call. Most parameters are small (a batch norm has two
// vectors of C), so the work is cut as if they lay end to end, not one by one.
#include "vec.h"

namespace tinyres::TINYRES_TARGET {
namespace {

struct Rule {
  double lr, momentum;
  bool nesterov;
};

template <class T>
void update(T* w, T* velocity, const T* dw, i64 n, T decay, const Rule& rule) {
  const T lr = T(rule.lr), momentum = T(rule.momentum);
  for_vectors<T>(n, [&](i64 i, i64 lanes) {
    const Vec<T> w_old = load_first(w + i, lanes);
    const Vec<T> g = load_first(dw + i, lanes) + decay * w_old;
    Vec<T> step = g;
    if (velocity) {
      const Vec<T> v = momentum * load_first(velocity + i, lanes) + g;
      store_first(velocity + i, v, lanes);
      step = rule.nesterov ? g + momentum * v : v;
    }
    store_first(w + i, w_old - lr * step, lanes);
  });
}

template <class T>
void sgd(i64 count, T* const* w, T* const* velocity, const T* const* dw, const i64* n, const double* decay, double lr,
         double momentum, bool nesterov) {
  const Rule rule{lr, momentum, nesterov};
  Scratch<i64> start(count + 1);  // where each parameter begins in the row of all
  start[0] = 0;
  for (i64 p = 0; p < count; p++) start[p + 1] = start[p] + n[p];
  parallel_ranges(start[count], PART, [&](i64 begin, i64 end) {
    // The last parameter that starts at or before `begin`, by bisection.
    i64 p = 0;
    for (i64 above = count; above - p > 1;) {
      const i64 middle = (p + above) / 2;
      (start[middle] <= begin ? p : above) = middle;
    }
    for (; begin < end; p++) {
      const i64 offset = begin - start[p], stop = end < start[p + 1] ? end : start[p + 1];
      T* v = velocity && velocity[p] ? velocity[p] + offset : nullptr;
      update(w[p] + offset, v, dw[p] + offset, stop - begin, T(decay[p]), rule);
      begin = stop;
    }
  });
}

}  // namespace

template <class T>
void sgd_kernels(Kernels<T>& table) {
  table.sgd = sgd<T>;
}

template void sgd_kernels<float>(Kernels<float>&);
template void sgd_kernels<double>(Kernels<double>&);

}  // namespace tinyres::TINYRES_TARGET
