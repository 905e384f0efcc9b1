// SGD with momentum and weight decay for all parameters in one launch. A network has a hundred and more, most of them
// small (a batch norm has two vectors of C): a launch for each would cost more than its work. So every parameter is
// cut into chunks, a block takes one chunk, and finds out whose it is in a table of all parameters. The table is a
// parameter of the kernel itself: a launch that is captured keeps it, and nothing is copied before.
//
// A gradient may come in parts, as the kernels leave it that split their sums over blocks. They are most of what is
// read then: 5 MB for a convolution of ResNet-20, of whose weights the largest are 147 KB. Parts are added as
// launch_sum_parts adds them, so whoever sums first and updates then gets the same bits.
#include <vector>

#include "correlation.h"

namespace tinyres {
namespace {

constexpr int THREADS = 256;
constexpr int EACH = 4;  // elements of a thread: as many loads in flight, and more where there are parts

// Few parts: a thread adds them all. Many: a warp adds those of its turn, and the warps' sums are then added.
constexpr int CHUNK = EACH * THREADS, SPLIT_CHUNK = EACH * WARP;
static_assert(SUM_LANES * WARP == THREADS, "a warp for each turn");

__host__ __device__ constexpr int chunk_of(int parts) { return sum_lanes(parts) > 1 ? SPLIT_CHUNK : CHUNK; }

template <class T>
struct Entry {
  T *w, *velocity;
  const T* dw;
  bf16* copy;
  i64 n;
  u32 first_chunk;  // its number among the chunks of all parameters
  int parts;
  Wide<T> decay;
};

template <class T, int CAPACITY>
struct Table {
  Entry<T> entries[CAPACITY];
  int count;
};

// A whole ResNet-20 fits into the small table, which is quicker to send; the large one is what a launch can take along.
constexpr int SMALL = 64;
template <class T>
constexpr int LARGE = int((MAX_PARAMETER_BYTES - sizeof(SgdRule) - 16) / sizeof(Entry<T>));

// Element i of a parameter as it was, read ahead of its gradient.
template <class T>
struct Element {
  Wide<T> w, velocity;

  __device__ Element(const Entry<T>& p, i64 i) : w(0), velocity(0) {
    if (i >= p.n) return;
    w = wide(p.w[i]);
    if (p.velocity) velocity = wide(p.velocity[i]);
  }

  __device__ void update(const Entry<T>& p, const SgdRule& rule, i64 i, Wide<T> dw) const {
    if (i >= p.n) return;
    const Wide<T> lr(rule.lr_array ? *rule.lr_array : rule.lr), momentum(rule.momentum);
    const Wide<T> g = dw + p.decay * w;
    Wide<T> step = g;
    if (p.velocity) {
      const Wide<T> v = momentum * velocity + g;
      p.velocity[i] = narrow<T>(v);
      step = rule.nesterov ? g + momentum * v : v;
    }
    const Wide<T> result = w - lr * step;
    p.w[i] = narrow<T>(result);
    if constexpr (std::is_same_v<T, float>) {
      if (p.copy) p.copy[i] = from_float<bf16>(result);
    }
  }
};

// Up to four parts: neighbouring threads take neighbouring elements.
template <class T>
__device__ void update_chunk(const Entry<T>& p, const SgdRule& rule, i64 begin) {
  const auto at = [&](int j) { return begin + j * THREADS + threadIdx.x; };
  const Element<T> old[EACH] = {{p, at(0)}, {p, at(1)}, {p, at(2)}, {p, at(3)}};
  Wide<T> dw[EACH] = {};
#pragma unroll
  for (int j = 0; j < EACH; j++)
    if (at(j) < p.n) dw[j] = wide(p.dw[at(j)]);
  for (int part = 1; part < p.parts; part++)
#pragma unroll
    for (int j = 0; j < EACH; j++)
      if (at(j) < p.n) dw[j] += wide(p.dw[part * p.n + at(j)]);
#pragma unroll
  for (int j = 0; j < EACH; j++) old[j].update(p, rule, at(j), dw[j]);
}

// More: warp number `lane` adds parts lane, lane + lanes, ..., four of them in flight for each of its elements.
template <class T>
__device__ void update_split_chunk(const Entry<T>& p, const SgdRule& rule, i64 begin) {
  SHARED(sums, Wide<T>[SUM_LANES][SPLIT_CHUNK]);
  const int thread = int(threadIdx.x), lane = thread / WARP, column = thread % WARP, lanes = sum_lanes(p.parts);
  const bool mine = thread < SPLIT_CHUNK;
  const Element<T> old(p, mine ? begin + thread : p.n);
  Wide<T> sum[EACH] = {};
  if (lane < lanes) {
#pragma unroll 4
    for (int part = lane; part < p.parts; part += lanes)
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const i64 i = begin + j * WARP + column;
        if (i < p.n) sum[j] += wide(p.dw[part * p.n + i]);
      }
  }
#pragma unroll
  for (int j = 0; j < EACH; j++) sums[lane][j * WARP + column] = sum[j];
  __syncthreads();
  if (!mine) return;
  Wide<T> dw = sums[0][thread];
  for (int other = 1; other < lanes; other++) dw += sums[other][thread];
  old.update(p, rule, begin + thread, dw);
}

template <class T, int CAPACITY>
__global__ void __launch_bounds__(THREADS)
    update(const __grid_constant__ Table<T, CAPACITY> table, const __grid_constant__ SgdRule rule) {
  // The last parameter whose chunks begin at or before this one.
  const u32 chunk = blockIdx.x;
  int own = 0;
  for (int above = table.count; above - own > 1;) {
    const int middle = own + (above - own) / 2;
    (table.entries[middle].first_chunk <= chunk ? own : above) = middle;
  }
  const Entry<T>& p = table.entries[own];
  const i64 begin = i64(chunk - p.first_chunk) * chunk_of(p.parts);
  if (sum_lanes(p.parts) > 1)
    update_split_chunk(p, rule, begin);
  else
    update_chunk(p, rule, begin);
}

template <int CAPACITY, class T>
void launch_update(const std::vector<SgdParameter<T>>& parameters, const SgdRule& rule) {
  for (std::size_t first = 0; first < parameters.size(); first += CAPACITY) {
    Table<T, CAPACITY> table{};
    u32 chunks = 0;
    for (std::size_t i = first; i < parameters.size() && table.count < CAPACITY; i++) {
      const SgdParameter<T>& p = parameters[i];
      const int parts = int(p.parts);
      table.entries[table.count++] = {p.w, p.velocity, p.dw, p.copy, p.n, chunks, parts, Wide<T>(p.decay)};
      chunks += u32(ceil_div(p.n, chunk_of(parts)));
    }
    launch("sgd", update<T, CAPACITY>, dim3(chunks), dim3(THREADS), 0, current_stream(), table, rule);
  }
}

template <class T>
void sgd(i64 count, const SgdParameter<T>* parameters, const SgdRule& rule) {
  std::vector<SgdParameter<T>> filled;
  for (i64 p = 0; p < count; p++)
    if (parameters[p].n > 0) filled.push_back(parameters[p]);
  if (filled.size() <= SMALL)
    launch_update<SMALL>(filled, rule);
  else
    launch_update<LARGE<T>>(filled, rule);
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
