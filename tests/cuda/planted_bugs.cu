// Kernels with and without one deliberate bug each: they test the emulation, not themselves. A change after which a bug
// is no longer noticed has blunted the tool that all other kernels are checked with.
//
//   planted_bugs (correct|bug) (all|NAME) SCHEDULE...      one line each: NAME SCHEDULE (ok | wrong | error: REASON)
//
// A kernel without its bug must be clean under every schedule and sanitizer.
#include <cmath>
#include <string>

#include "testing.h"

using namespace tinyres;

// Not in the unnamed namespace below, where ASan would guard the array: it guards none that several files may share.
template <bool BUG>
__global__ void past_raw(float* y, const float* x) {
  __shared__ float s[128];
  const int t = int(threadIdx.x);
  s[t] = x[t];
  __syncthreads();
  y[t] = s[BUG || t < 127 ? t + 1 : t];
}

namespace {

// ---- barriers -----------------------------------------------------------------------------------------------------

// Batch norm's first step: block (8, 16) takes 8 columns of x (M, C); every row of threads subtracts the mean.
template <bool BUG>
__global__ void centre(float* y, const float* x, int M, int C) {
  SHARED(part, float[16][8]);
  const int c = int(blockIdx.x) * 8 + int(threadIdx.x), first = int(threadIdx.y);
  float sum = 0;
  for (int m = first; m < M; m += 16) sum += x[m * C + c];
  part[threadIdx.y][threadIdx.x] = sum;
  if (!BUG) __syncthreads();
  float total = 0;
  for (int i = 0; i < 16; i++) total += part[i][threadIdx.x];
  for (int m = first; m < M; m += 16) y[m * C + c] = x[m * C + c] - total / float(M);
}

template <bool BUG>
__global__ void tree_sum(float* y, const float* x) {
  SHARED(s, float[128]);
  const int t = int(threadIdx.x);
  s[t] = x[t];
  __syncthreads();
  for (int half = 64; half > 0; half /= 2) {
    if (t < half) s[t] += s[t + half];
    if (!BUG) __syncthreads();
  }
  if (t == 0) *y = s[0];
}

// y[t] = sum over tiles and i of x[tile][i] * ((t + i) % 5)
template <bool BUG>
__global__ void tile_loop(float* y, const float* x, int tiles) {
  SHARED(s, float[128]);
  const int t = int(threadIdx.x);
  float sum = 0;
  for (int tile = 0; tile < tiles; tile++) {
    s[t] = x[tile * 128 + t];
    __syncthreads();
    for (int i = 0; i < 128; i++) sum += s[i] * float((t + i) % 5);
    if (!BUG) __syncthreads();
  }
  y[t] = sum;
}

// The same with tiles of 256 floats that 64 threads fetch ahead of their use.
enum class Missing { nothing, barrier_after_wait, barrier_before_refill, wait };

template <Missing MISSING>
__global__ void pipeline(float* y, const float* x, int tiles) {
  SHARED(s, float[2][256]);
  const int t = int(threadIdx.x);
  float sum = 0;
  cp_async16(&s[0][t * 4], x + t * 4);
  cp_async_commit();
  for (int tile = 0; tile < tiles; tile++) {
    const bool more = tile + 1 < tiles;
    cp_async16_zfill(&s[(tile + 1) % 2][t * 4], x + (more ? tile + 1 : 0) * 256 + t * 4, more);
    cp_async_commit();
    if (MISSING != Missing::wait) cp_async_wait<1>();
    if (MISSING != Missing::barrier_after_wait) __syncthreads();
    for (int i = 0; i < 256; i++) sum += s[tile % 2][i] * float((t + i) % 5);
    if (MISSING != Missing::barrier_before_refill) __syncthreads();
  }
  if (MISSING != Missing::wait) cp_async_wait<0>();
  y[t] = sum;
}

template <bool BUG>
__global__ void swap_neighbours(float* y, const float* x) {
  SHARED(s, float[128]);
  s[threadIdx.x] = x[threadIdx.x];
  if (!BUG) __syncwarp();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}

// ---- lost updates, and what was never written
// ------------------------------------------------------------------------

template <bool BUG>
__global__ void count_positive(int* y, const float* x) {
  SHARED(count, int);
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (x[threadIdx.x] > 0) {
    if (BUG) {
      count++;
    } else {
      atomicAdd(&count, 1);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) *y = count;
}

// y[c] = sum of x (rows, 32) over rows, of which every block has one
template <bool BUG>
__global__ void sum_over_blocks(float* y, const float* x) {
  const int c = int(threadIdx.x);
  const float value = x[int(blockIdx.x) * 32 + c];
  if (BUG) {
    y[c] += value;
  } else {
    atomicAdd(&y[c], value);
  }
}

// The last block to come adds up what the others left.
template <bool BUG>
__global__ void last_block_sum(float* y, float* part, unsigned* arrived, const float* x) {
  if (threadIdx.x != 0) return;
  float sum = 0;
  for (int i = 0; i < 32; i++) sum += x[int(blockIdx.x) * 32 + i];
  part[blockIdx.x] = sum;
  if (!BUG) __threadfence();
  if (atomicAdd(arrived, 1) != gridDim.x - 1) return;
  if (!BUG) __threadfence();
  float total = 0;
  for (int i = 0; i < int(gridDim.x); i++) total += part[i];
  *y = total;
}

template <bool BUG>
__global__ void unwritten(float* y, const float* x, int n) {
  SHARED(s, float[129]);
  const int t = int(threadIdx.x);
  s[t] = x[t];
  if (!BUG && t == 0) s[n] = 0;
  __syncthreads();
  y[t] = s[t] + s[t + 1];
}

// ---- threads that do not come
// ----------------------------------------------------------------------------------------

__device__ float warp_sum(float value) {
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(~0u, value, unsigned(delta));
  return value;
}

template <bool BUG>
__global__ void half_warp_shuffle(float* y, const float* x) {
  float value = x[threadIdx.x];
  if (!BUG || threadIdx.x % 32 < 16) value = warp_sum(value);
  if (threadIdx.x % 32 == 0) y[threadIdx.x / 32] = value;
}

template <bool BUG>
__global__ void two_barriers(float* y, const float* x) {
  SHARED(s, float[128]);
  s[threadIdx.x] = x[threadIdx.x];
  if (BUG && threadIdx.x >= 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = s[127 - threadIdx.x];
}

template <bool BUG>
__global__ void early_return(float* y, const float* x, int n) {
  const int t = int(threadIdx.x);
  if (BUG && t >= n) return;
  const float sum = warp_sum(t < n ? x[t] : 0);
  if (t % 32 == 0) y[t / 32] = sum;
}

// ---- addresses ----------------------------------------------------------------------------------------------------

// y[t] = x[t + 1], but for the last, which nobody looks at
template <bool BUG>
__global__ void past_static(float* y, const float* x) {
  SHARED(s, float[128]);
  const int t = int(threadIdx.x);
  s[t] = x[t];
  __syncthreads();
  y[t] = s[BUG || t < 127 ? t + 1 : t];
}

template <bool BUG>
__global__ void past_dynamic(float* y, const float* x) {
  SmemArena arena;
  float* s = arena.take<float>(128);
  const int t = int(threadIdx.x);
  s[t] = x[t];
  __syncthreads();
  y[t] = s[BUG || t < 127 ? t + 1 : t];
}

template <bool BUG>
__global__ void misaligned(float* y, const float* x) {
  const float4& v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + (BUG ? 1 : 0));
  const int i = BUG ? 1 : 0;
  y[threadIdx.x] = i ? v.x + v.y + v.z : v.y + v.z + v.w;  // x[1..3] or the same three
}

// ---- each against its reference
// ---------------------------------------------------------------------------------------

// Small whole numbers: every sum of them is exact, in whatever order.
float sample(int i) { return float((i * 7 + 3) % 11 - 4); }

struct Samples : Array<float> {
  explicit Samples(int n) : Array(n) {
    for (int i = 0; i < n; i++) (*this)[i] = sample(i);
  }
};

template <class Reference>
bool equal(Array<float>& y, int n, Reference reference) {
  for (int i = 0; i < n; i++) {
    if (!(y[i] == reference(i))) return false;
  }
  return true;
}

float sum_of(int first, int n) {
  float sum = 0;
  for (int i = first; i < first + n; i++) sum += sample(i);
  return sum;
}

bool check_centre(bool bug) {
  const int M = 64, C = 16;
  Samples x(M * C);
  Array<float> y(M * C);
  go(bug ? centre<true> : centre<false>, dim3(C / 8), dim3(8, 16), 0, y.data(), x.data(), M, C);
  return equal(y, M * C, [=](int i) {
    float sum = 0;
    for (int m = 0; m < M; m++) sum += sample(m * C + i % C);
    return sample(i) - sum / float(M);
  });
}

bool check_tree(bool bug) {
  Samples x(128);
  Array<float> y(1);
  go(bug ? tree_sum<true> : tree_sum<false>, dim3(1), dim3(128), 0, y.data(), x.data());
  return equal(y, 1, [](int) { return sum_of(0, 128); });
}

template <class Kernel>
bool check_tiles(Kernel* kernel, int threads, int size) {
  const int tiles = 4;
  Samples x(tiles * size);
  Array<float> y(threads);
  go(kernel, dim3(1), dim3(unsigned(threads)), 0, y.data(), x.data(), tiles);
  return equal(y, threads, [=](int t) {
    float sum = 0;
    for (int i = 0; i < tiles * size; i++) sum += sample(i) * float((t + i % size) % 5);
    return sum;
  });
}

bool check_tile_loop(bool bug) { return check_tiles(bug ? tile_loop<true> : tile_loop<false>, 128, 128); }

template <Missing MISSING>
bool check_pipeline(bool bug) {
  return check_tiles(bug ? pipeline<MISSING> : pipeline<Missing::nothing>, 64, 256);
}

bool check_swap(bool bug) {
  Samples x(128);
  Array<float> y(128);
  go(bug ? swap_neighbours<true> : swap_neighbours<false>, dim3(1), dim3(128), 0, y.data(), x.data());
  return equal(y, 128, [](int i) { return sample(i ^ 1); });
}

bool check_count(bool bug) {
  Samples x(128);
  Array<int> y(1);
  go(bug ? count_positive<true> : count_positive<false>, dim3(1), dim3(128), 0, y.data(), x.data());
  int count = 0;
  for (int i = 0; i < 128; i++) count += sample(i) > 0;
  return y[0] == count;
}

bool check_blocks(bool bug) {
  Samples x(6 * 32);
  Array<float> y(32);
  go(bug ? sum_over_blocks<true> : sum_over_blocks<false>, dim3(6), dim3(32), 0, y.data(), x.data());
  return equal(y, 32, [](int c) {
    float sum = 0;
    for (int row = 0; row < 6; row++) sum += sample(row * 32 + c);
    return sum;
  });
}

bool check_last_block(bool bug) {
  Samples x(6 * 32);
  Array<float> y(1), part(6);
  Array<unsigned> arrived(1);
  go(bug ? last_block_sum<true> : last_block_sum<false>, dim3(6), dim3(32), 0, y.data(), part.data(), arrived.data(),
     x.data());
  return equal(y, 1, [](int) { return sum_of(0, 6 * 32); });
}

bool check_unwritten(bool bug) {
  Samples x(128);
  Array<float> y(128);
  go(bug ? unwritten<true> : unwritten<false>, dim3(1), dim3(128), 0, y.data(), x.data(), 128);
  return equal(y, 128, [](int i) { return sample(i) + (i < 127 ? sample(i + 1) : 0); });
}

bool check_half_warp(bool bug) {
  Samples x(64);
  Array<float> y(2);
  go(bug ? half_warp_shuffle<true> : half_warp_shuffle<false>, dim3(1), dim3(64), 0, y.data(), x.data());
  return equal(y, 2, [](int i) { return sum_of(i * 32, 32); });
}

bool check_two_barriers(bool bug) {
  Samples x(128);
  Array<float> y(128);
  go(bug ? two_barriers<true> : two_barriers<false>, dim3(1), dim3(128), 0, y.data(), x.data());
  return equal(y, 128, [](int i) { return sample(127 - i); });
}

bool check_early_return(bool bug) {
  Samples x(50);
  Array<float> y(2);
  go(bug ? early_return<true> : early_return<false>, dim3(1), dim3(64), 0, y.data(), x.data(), 50);
  return equal(y, 2, [](int i) { return i ? sum_of(32, 18) : sum_of(0, 32); });
}

template <class Kernel>
bool check_past(Kernel* kernel) {
  Samples x(128);
  Array<float> y(128);
  go(kernel, dim3(1), dim3(128), 128 * sizeof(float), y.data(), x.data());
  return equal(y, 127, [](int i) { return sample(i + 1); });
}
bool check_past_static(bool bug) { return check_past(bug ? past_static<true> : past_static<false>); }
bool check_past_dynamic(bool bug) { return check_past(bug ? past_dynamic<true> : past_dynamic<false>); }
bool check_past_raw(bool bug) { return check_past(bug ? past_raw<true> : past_raw<false>); }

bool check_misaligned(bool bug) {
  Samples x(32 * 4 + 4);
  Array<float> y(32);
  go(bug ? misaligned<true> : misaligned<false>, dim3(1), dim3(32), 0, y.data(), x.data());
  return equal(y, 32, [](int i) { return sum_of(4 * i + 1, 3); });
}

struct Case {
  const char* name;
  bool (*check)(bool bug);
};
const Case CASES[] = {
    {"reduction_barrier", check_centre},
    {"tree_barrier", check_tree},
    {"tile_second_barrier", check_tile_loop},
    {"copy_barrier_after_wait", check_pipeline<Missing::barrier_after_wait>},
    {"copy_barrier_before_refill", check_pipeline<Missing::barrier_before_refill>},
    {"copy_wait", check_pipeline<Missing::wait>},
    {"syncwarp", check_swap},
    {"shared_count", check_count},
    {"sum_of_blocks", check_blocks},
    {"threadfence", check_last_block},
    {"unwritten_shared", check_unwritten},
    {"half_warp_shuffle", check_half_warp},
    {"two_barriers", check_two_barriers},
    {"early_return", check_early_return},
    {"past_static", check_past_static},
    {"past_dynamic", check_past_dynamic},
    {"past_raw", check_past_raw},
    {"misaligned", check_misaligned},
};

std::string outcome(const Case& c, bool bug) {
  try {
    return c.check(bug) ? "ok" : "wrong";
  } catch (const std::exception& error) {
    return std::string("error: ") + error.what();
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const bool bug = std::string(argv[1]) == "bug";
  for (const Case& c : CASES) {
    if (std::string(argv[2]) != "all" && std::string(argv[2]) != c.name) continue;
    for (int i = 3; i < argc; i++) {
      setenv("TINYRES_SCHEDULE", argv[i], 1);
      std::printf("%s %s %s\n", c.name, argv[i], outcome(c, bug).c_str());
      std::fflush(stdout);
    }
  }
}
