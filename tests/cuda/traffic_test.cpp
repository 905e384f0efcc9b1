// The counter of bytes (compat/host/traffic.h) on kernels whose traffic can be told from their source.
#include "cuda/compat/host/traffic.h"

#include "cuda/elementwise.cu"
#include "kernel_testing.h"

using namespace tinyres;
namespace traffic = tinyres::emulation::traffic;

namespace {

constexpr int BLOCK = 64;
__constant__ const float WEIGHTS[3] = {0.25f, 0.5f, 0.25f};

struct Three {
  float x, y, z;
};
struct __attribute__((packed)) Odd {
  u32 four;
  u64 eight;
};
struct Parameters {
  const float* x;
  float factor[20];
};

// Everything that is no traffic: parameters, constants, shared memory, a thread's own arrays, indices.
__global__ void no_traffic(Parameters parameters, int n) {
  SHARED(shared, float[BLOCK]);
  SmemArena arena;
  float* more = arena.take<float>(BLOCK);
  float own[20];
  for (int i = 0; i < n; i++) own[i] = parameters.factor[(i + int(threadIdx.x)) % n] * WEIGHTS[i % 3];
  shared[threadIdx.x] = own[threadIdx.x % n];
  __syncthreads();
  more[threadIdx.x] = shared[BLOCK - 1 - threadIdx.x] + __shfl_xor_sync(~0u, own[0], 1);
}

__global__ void three_neighbours(float* y, const float* x, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] = x[i] * WEIGHTS[0] + x[i + 1] * WEIGHTS[1] + x[i + 2] * WEIGHTS[2];
}

__global__ void every_eighth(float* y, const float* x) { y[threadIdx.x * 8] = x[threadIdx.x * 8]; }

__global__ void across_sectors(u64* y, const Odd* x) { *y = x[2].eight; }

// By 16 bytes, by 12, and past the registers.
__global__ void by_vectors(float4* y, const float4* x) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void by_threes(Three* y, const Three* x) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void by_copies(float* y, const float* x, bool valid) {
  SHARED(shared, float[BLOCK][4]);
  cp_async16_zfill(shared[threadIdx.x], x + 4 * threadIdx.x, valid);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = shared[threadIdx.x][0];
}

__global__ void count_up(int* total, unsigned* most, float* sum) {
  atomicAdd(total, 1);
  atomicMax(most, threadIdx.x);
  if (threadIdx.x == 0) sum[blockIdx.x] = 1;
}

traffic::Launch only() {
  const std::vector<traffic::Launch> launches = traffic::take();
  CHECK(launches.size() == 1);
  return launches.empty() ? traffic::Launch{} : launches[0];
}

void expect(u64 asked_read, u64 read, u64 asked_written, u64 written) {
  const traffic::Launch l = only();
  CHECK(l.read.asked == asked_read && l.read.marked == 0 && l.read.others == read);
  CHECK(l.written.asked == asked_written && l.written.marked == 0 && l.written.others == written);
}

// Elements that begin with a sector.
template <class T>
struct Aligned {
  explicit Aligned(int n) : memory(n + 32) {
    at = memory.data();
    while (reinterpret_cast<std::uintptr_t>(at) % 32) at++;
  }
  Array<T> memory;
  T* at;
};

void test_accesses() {
  Aligned<float> x(1024), y(1024);
  go(no_traffic, dim3(3), dim3(BLOCK), BLOCK * sizeof(float), Parameters{x.at, {}}, 20);
  expect(0, 0, 0, 0);
  go(three_neighbours, dim3(2), dim3(BLOCK), 0, y.at, x.at, 100);  // 102 of x, in 13 sectors
  expect(3 * 400, 13 * 32, 400, 13 * 32);
  go(every_eighth, dim3(1), dim3(BLOCK), 0, y.at, x.at);  // 4 bytes of each sector
  expect(4 * BLOCK, 32 * BLOCK, 4 * BLOCK, 32 * BLOCK);
  go(across_sectors, dim3(1), dim3(1), 0, reinterpret_cast<u64*>(y.at), reinterpret_cast<Odd*>(x.at));  // 28 to 36
  expect(8, 64, 8, 32);
  go(by_vectors, dim3(1), dim3(BLOCK), 0, reinterpret_cast<float4*>(y.at), reinterpret_cast<float4*>(x.at));
  expect(16 * BLOCK, 16 * BLOCK, 16 * BLOCK, 16 * BLOCK);
  go(by_threes, dim3(1), dim3(BLOCK), 0, reinterpret_cast<Three*>(y.at), reinterpret_cast<Three*>(x.at));
  expect(12 * BLOCK, 12 * BLOCK, 12 * BLOCK, 12 * BLOCK);
  go(by_copies, dim3(1), dim3(BLOCK), 0, y.at, x.at, true);
  expect(16 * BLOCK, 16 * BLOCK, 4 * BLOCK, 4 * BLOCK);
  go(by_copies, dim3(1), dim3(BLOCK), 0, y.at, x.at, false);
  expect(0, 0, 4 * BLOCK, 4 * BLOCK);
}

void test_atomics() {
  Aligned<int> total(1), most(1);
  Aligned<float> sum(1);
  *total.at = *most.at = 0;
  go(count_up, dim3(2), dim3(BLOCK), 0, total.at, reinterpret_cast<unsigned*>(most.at), sum.at);
  CHECK(*total.at == 2 * BLOCK && *most.at == BLOCK - 1 && *sum.at == 1);
  const traffic::Launch l = only();
  CHECK(l.read.others == 2 * 32 && l.written.others == 3 * 32 && l.written.asked >= 4 * (4 * BLOCK + 2));
}

void test_marks() {
  Aligned<float> x(256), y(256);
  const auto run = [&] {
    go(by_vectors, dim3(1), dim3(BLOCK), 0, reinterpret_cast<float4*>(y.at), reinterpret_cast<float4*>(x.at));
    return only();
  };
  traffic::mark(x.at, 1024, true);
  traffic::Launch l = run();
  CHECK(l.read.marked == 1024 && l.read.others == 0 && l.written.marked == 0 && l.written.others == 1024);
  traffic::mark(x.at + 64, 64, false);  // as an array of that size, in the place of the first
  l = run();
  CHECK(l.read.marked == 0 && l.read.others == 1024);
  traffic::mark(x.at + 64, 256, true), traffic::mark(y.at, 512, true);
  l = run();
  CHECK(l.read.marked == 256 && l.read.others == 768 && l.written.marked == 512 && l.written.others == 512);
  traffic::mark(y.at, 512, false);
  CHECK(run().written.marked == 0);
}

// What every reader knows: an addition of n floats reads 8 n bytes and writes 4 n.
void test_elementwise() {
  constexpr int n = 5000;
  Kernels<float> k{};
  elementwise_kernels(k);
  Aligned<float> a(n), b(n), y(n);
  Strided s{1, {n}, {1}, {1}, {1}};
  traffic::take();
  k.binary(Binary::add, y.at, a.at, b.at, s);
  const traffic::Launch l = only();
  CHECK(l.op == "binary" && l.grid.x > 1 && l.block.x > 1);
  CHECK(l.read.asked == 8 * n && l.read.others == 8 * n && l.written.asked == 4 * n && l.written.others == 4 * n);
}

}  // namespace

// For whoever looks names up by what nm says.
void print_a_kernel() {
  Aligned<float> x(BLOCK), y(BLOCK);
  go(every_eighth, dim3(1), dim3(1), 0, y.at, x.at);
  std::printf("every_eighth %zu\n", std::size_t(only().kernel));
}

int main() {
  print_a_kernel();
  test_accesses();
  test_atomics();
  test_marks();
  test_elementwise();
  return report();
}
