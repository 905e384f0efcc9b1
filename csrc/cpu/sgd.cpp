// SGD with momentum and weight decay for all parameters in one call. Most parameters are small (a batch norm has two
// vectors of C), so the work is cut as if they lay end to end, not one by one.
#include "vec.h"

namespace tinyres::TINYRES_TARGET {
namespace {

// Elements begin .. end - 1 of a parameter.
template <class T>
void update(const SgdParameter<T>& p, i64 begin, i64 end, T lr, const SgdRule& rule) {
  const T momentum = T(rule.momentum), decay = T(p.decay);
  T* const w = p.w + begin;
  T* const velocity = p.velocity ? p.velocity + begin : nullptr;
  const T* const dw = p.dw + begin;
  for_vectors<T>(end - begin, [&](i64 i, i64 lanes) {
    const Vec<T> w_old = load_first(w + i, lanes);
    Vec<T> sum = load_first(dw + i, lanes);
    for (i64 part = 1; part < p.parts; part++) sum += load_first(dw + part * p.n + i, lanes);
    const Vec<T> g = sum + decay * w_old;
    Vec<T> step = g;
    if (velocity) {
      const Vec<T> v = momentum * load_first(velocity + i, lanes) + g;
      store_first(velocity + i, v, lanes);
      step = rule.nesterov ? g + momentum * v : v;
    }
    store_first(w + i, w_old - lr * step, lanes);
  });
  if (p.copy)
    for (i64 i = begin; i < end; i++) p.copy[i] = to_bf16(float(p.w[i]));
}

template <class T>
void sgd(i64 count, const SgdParameter<T>* parameters, const SgdRule& rule) {
  const T lr = T(rule.lr_array ? *rule.lr_array : rule.lr);
  Scratch<i64> start(count + 1);  // where each parameter begins in the row of all
  start[0] = 0;
  for (i64 p = 0; p < count; p++) start[p + 1] = start[p] + parameters[p].n;
  parallel_ranges(start[count], PART, [&](i64 begin, i64 end) {
    // The last parameter that starts at or before `begin`, by bisection.
    i64 p = 0;
    for (i64 above = count; above - p > 1;) {
      const i64 middle = (p + above) / 2;
      (start[middle] <= begin ? p : above) = middle;
    }
    for (; begin < end; p++) {
      const i64 stop = end < start[p + 1] ? end : start[p + 1];
      update(parameters[p], begin - start[p], stop - start[p], lr, rule);
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
