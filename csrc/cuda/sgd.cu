// SGD with momentum and weight decay for all parameters in one launch. A network has a hundred and more, most of them
// small (a batch norm has two vectors of C): a launch for each would cost more than its work. So every parameter is
// cut into chunks of a fixed size, a block takes one chunk, and finds out whose it is in a table of all parameters.
#include <vector>

#include "common.h"

namespace tinyres {
namespace {

constexpr int THREADS = 256;
constexpr i64 CHUNK = 8 * THREADS;  // elements; the 270,000 of a ResNet-20 make about a block per multiprocessor

template <class T>
struct Parameter {
  T* w;
  T* velocity;
  const T* dw;
  i64 n, first_chunk;  // number of the first among the chunks of all parameters
  Wide<T> decay;
};

template <class T>
struct Rule {
  Wide<T> lr, momentum;
  bool nesterov;
};

template <class T>
__global__ void update(const Parameter<T>* __restrict__ table, int count, Rule<T> rule) {
  // The last parameter whose chunks begin at or before this one, which is never an empty parameter.
  const i64 chunk = blockIdx.x;
  int own = 0;
  for (int above = count; above - own > 1;) {
    const int middle = own + (above - own) / 2;
    (table[middle].first_chunk <= chunk ? own : above) = middle;
  }
  const Parameter<T> p = table[own];
  const i64 begin = (chunk - p.first_chunk) * CHUNK, end = min(begin + CHUNK, p.n);
  for (i64 i = begin + threadIdx.x; i < end; i += THREADS) {
    const Wide<T> w = wide(p.w[i]);
    const Wide<T> g = wide(p.dw[i]) + p.decay * w;
    Wide<T> step = g;
    if (p.velocity) {
      const Wide<T> v = rule.momentum * wide(p.velocity[i]) + g;
      p.velocity[i] = narrow<T>(v);
      step = rule.nesterov ? g + rule.momentum * v : v;
    }
    p.w[i] = narrow<T>(w - rule.lr * step);
  }
}

template <class T>
void sgd(i64 count, T* const* w, T* const* velocity, const T* const* dw, const i64* n, const double* decay, double lr,
         double momentum, bool nesterov) {
  std::vector<Parameter<T>> table;
  i64 chunks = 0;
  for (i64 p = 0; p < count; p++) {
    table.push_back({w[p], velocity ? velocity[p] : nullptr, dw[p], n[p], chunks, Wide<T>(decay[p])});
    chunks += ceil_div(n[p], CHUNK);
  }
  if (chunks == 0) return;
  const Scratch<Parameter<T>> on_device(count);
  copy_to_device("sgd", on_device.get(), table.data(), table.size() * sizeof(table[0]), current_stream());
  launch("sgd", update<T>, dim3(u32(chunks)), THREADS, 0, current_stream(), on_device.get(), int(count),
         Rule<T>{Wide<T>(lr), Wide<T>(momentum), nesterov});
}

}  // namespace

template <class T>
void sgd_kernels(Kernels<T>& table) {
  table.sgd = sgd<T>;
}

template void sgd_kernels<float>(Kernels<float>&);
template void sgd_kernels<double>(Kernels<double>&);
template void sgd_kernels<bf16>(Kernels<bf16>&);

}  // namespace tinyres
