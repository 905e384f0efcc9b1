// Tests of what only the emulation of CUDA does (csrc/cuda/compat/host.h): reports of mistakes, recovery from them,
// schedules. What CUDA itself promises is in compat_test.cu.
#include <cmath>
#include <string>
#include <thread>

#include "testing.h"

using namespace tinyres;

namespace {

template <class Action>
std::string error_of(Action action) {
  try {
    action();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "no error";
}

void check_text(const std::string& text, const std::string& part, int line) {
  const bool holds = text.find(part) != std::string::npos;
  check_that(holds, ("\"" + text + "\" should contain \"" + part + "\"").c_str(), __FILE__, line);
}

// The launch must fail with a message that starts with op and block and contains `part`.
template <class Kernel, class... Args>
void check_fails(int line, const std::string& part, Kernel* kernel, unsigned threads, std::size_t smem, Args... args) {
  const std::string text = error_of([&] { launch("some_op", kernel, dim3(1), dim3(threads), smem, nullptr, args...); });
  check_text(text, "[some_op] block (0, 0, 0): ", line);
  check_text(text, part, line);
}
#define CHECK_FAILS(...) check_fails(__LINE__, __VA_ARGS__)

std::string at(int line) { return std::string(__FILE__) + ":" + std::to_string(line); }

// ---- threads that do not meet
// ----------------------------------------------------------------------------------------

constexpr int BARRIERS = __LINE__ + 3;
__global__ void different_barriers() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

constexpr int SHUFFLE_AND_BARRIER = __LINE__ + 3;
__global__ void shuffle_and_barrier(int* y) {
  if (threadIdx.x < 5) {
    y[threadIdx.x] = __shfl_sync(~0u, 1, 0);
  } else {
    __syncthreads();
  }
}

constexpr int RETURNED = __LINE__ + 3;
__global__ void some_returned() {
  if (threadIdx.x == 63) return;
  __syncthreads();
}

constexpr int OPERATIONS = __LINE__ + 3;
__global__ void different_operations(int* y) {
  if (threadIdx.x < 16) {
    y[threadIdx.x] = __any_sync(~0u, 1);
  } else {
    y[threadIdx.x] = __all_sync(~0u, 1);
  }
}

__global__ void different_masks(int* y) {
  const unsigned mask = threadIdx.x < 8 ? 0x0000ffffu : ~0u;
  y[threadIdx.x] = __shfl_sync(mask, 1, 0);
}

__global__ void crossing_masks(int* y) {  // each agrees with one neighbour, no two with each other
  const unsigned masks[] = {3u, 6u, 5u};
  if (threadIdx.x < 3) y[threadIdx.x] = __shfl_sync(masks[threadIdx.x], 1, int(threadIdx.x));
}

__global__ void not_in_mask(int* y) { y[threadIdx.x] = __shfl_sync(0xffffu, 1, 0); }

__global__ void from_outside_mask(int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_down_sync(0xffffu, 1, 8u);
}

__global__ void odd_width(int* y) { y[threadIdx.x] = __shfl_sync(~0u, 1, 0, 12); }

__global__ void vote_of_all(int* y) { y[threadIdx.x] = __any_sync(~0u, 1); }

void test_meetings() {
  Array<int> y(64);
  const std::string barriers = error_of([] { launch("op", different_barriers, 1, 64, 0, nullptr); });
  check_text(barriers, "__syncthreads at ", __LINE__);
  check_text(barriers, at(BARRIERS), __LINE__);
  check_text(barriers, at(BARRIERS + 2), __LINE__);
  CHECK_FAILS("threads 0..4 in __shfl_sync at " + at(SHUFFLE_AND_BARRIER) + ", threads 5..31 in __syncthreads at " +
                  at(SHUFFLE_AND_BARRIER + 2),
              shuffle_and_barrier, 32, 0, y.data());
  CHECK_FAILS("threads 0..62 in __syncthreads at " + at(RETURNED) + ", thread 63 returned", some_returned, 64, 0);
  const std::string operations = error_of([&] { launch("op", different_operations, 1, 32, 0, nullptr, y.data()); });
  check_text(operations, "warp diverged: in __a", __LINE__);
  check_text(operations, "__any_sync at " + at(OPERATIONS), __LINE__);
  check_text(operations, "__all_sync at " + at(OPERATIONS + 2), __LINE__);
  CHECK_FAILS("warp diverged", different_masks, 32, 0, y.data());
  CHECK_FAILS("no thread can go on: threads 0..2 in __shfl_sync", crossing_masks, 32, 0, y.data());
  CHECK_FAILS("not in mask 0x0000ffff", not_in_mask, 32, 0, y.data());
  CHECK_FAILS("reads from lane", from_outside_mask, 32, 0, y.data());
  CHECK_FAILS("width must be a power of two", odd_width, 32, 0, y.data());
  CHECK_FAILS("has lanes 0x000003ff only", vote_of_all, 42, 0, y.data());
}

// ---- shared memory
// ---------------------------------------------------------------------------------------------------

__global__ void large_static() {
  SHARED(a, float[8][1024]);
  SHARED(b, float[5][1024]);
  a[0][0] = b[0][0] = 0;
}

__global__ void large_dynamic(int n) {
  SmemArena arena;
  arena.take<float>(3);
  arena.take<double>(n);
}

__global__ void unequal_arena() {
  SmemArena arena;
  arena.take<float>(threadIdx.x == 7 ? 5 : 4);
}

__global__ void fresh(float* y) {
  SHARED(s, float[32]);
  SHARED(n, double);
  SmemArena arena;
  bf16* d = arena.take<bf16>(32);
  y[threadIdx.x] = s[threadIdx.x] + to_float(d[threadIdx.x]) + float(n);
  s[threadIdx.x] = 1;
  d[threadIdx.x] = from_float<bf16>(1);
}

void test_shared() {
  CHECK_FAILS("shared array b (20480 bytes) makes 53248 bytes of static shared memory; at most 49152", large_static, 1,
              0);
  CHECK(error_of([] { launch("op", large_dynamic, 1, 8, 16 + 80, nullptr, 10); }) == "no error");
  CHECK_FAILS("SmemArena::take of 88 bytes after 16; the launch gives 96", large_dynamic, 8, 96, 11);
  CHECK_FAILS("SmemArena::take of 0 elements", large_dynamic, 8, 96, 0);
  CHECK_FAILS("SmemArena::take number 1 of", unequal_arena, 8, 96);
  Array<float> y(64);
  for (int block = 0; block < 2; block++) launch("op", fresh, 1, 32, 64, nullptr, y.data() + 32 * block);
  for (int i = 0; i < 64; i++) CHECK(std::isnan(y[i]));
}

// ---- asynchronous copies and fragments
// -----------------------------------------------------------------------------------

enum class Mistake { none, misaligned, to_global, too_many, no_wait, no_commit, late };

__global__ void copy(Mistake mistake, float* y, float* x) {
  SHARED(s, float[512]);
  const int t = int(threadIdx.x);
  if (mistake == Mistake::misaligned) cp_async16(&s[4 * t], x + 4 * t + 1);
  if (mistake == Mistake::to_global) cp_async16(y + 4 * t, x + 4 * t);
  if (mistake == Mistake::too_many) {
    for (int i = 0; i < 200; i++) cp_async4(&s[i], x);
  }
  cp_async16(&s[4 * t], x + 4 * t);
  if (mistake == Mistake::late) y[t] = s[4 * t];
  if (mistake != Mistake::no_commit) cp_async_commit();
  if (mistake == Mistake::no_wait) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
  if (mistake == Mistake::none) y[t] = s[4 * t];
}

__global__ void load_row(int offset, u32* from, u32* y) {
  SHARED(s, u32[32][4]);
  for (int i = 0; i < 4; i++) s[threadIdx.x][i] = 0;
  u32 d[4];
  ldmatrix_x4(d, (from ? from : &s[0][0]) + 4 * threadIdx.x + offset);
  y[threadIdx.x] = d[0];
}

__global__ void multiply_tf32(float* y, float a) {
  float d[4] = {};
  const u32 x[4] = {__float_as_uint(a), 0, 0, 0}, one[2] = {to_tf32(1), 0};
  mma_tf32_1688(d, x, one);
  y[threadIdx.x] = d[0];
}

void test_copies() {
  alignas(16) float x[256] = {}, y[256];
  CHECK_FAILS("both addresses must be multiples of 16", copy, 8, 0, Mistake::misaligned, y, x);
  CHECK_FAILS("cp_async16 at " + std::string(__FILE__) + ":", copy, 8, 0, Mistake::misaligned, y, x);
  CHECK_FAILS("the destination must lie in one array of SHARED or SmemArena", copy, 8, 0, Mistake::to_global, y, x);
  CHECK_FAILS("more than 128 copies of one thread", copy, 8, 0, Mistake::too_many, y, x);
  CHECK_FAILS("returned with 1 asynchronous copies never waited for", copy, 8, 0, Mistake::no_wait, y, x);
  CHECK_FAILS("returned with 1 asynchronous copies never waited for", copy, 8, 0, Mistake::no_commit, y, x);
#ifndef TINYRES_ASAN  // which forbids the read
  launch("op", copy, 1, 8, 0, nullptr, Mistake::late, y, x);
  for (int i = 0; i < 8; i++) CHECK(std::isnan(y[i]));
#endif
  launch("op", copy, 1, 8, 0, nullptr, Mistake::none, y, x);
  for (int i = 0; i < 8; i++) CHECK(y[i] == 0);

  alignas(16) u32 rows[32 * 4] = {}, z[32];
  CHECK_FAILS("ldmatrix_x4 at " + std::string(__FILE__), load_row, 32, 0, 1, static_cast<u32*>(nullptr), z);
  CHECK_FAILS("a row must be 16 bytes, aligned, of one shared array", load_row, 32, 0, 0, rows, z);

  // Bits that tf32 does not have are ignored, so that a forgotten to_tf32 shows: 1 + 2^-11 + 2^-12 would round up.
  launch("op", multiply_tf32, 1, 32, 0, nullptr, y, 1.0f + 0x1.8p-11f);
  CHECK(y[0] == 4.0f && __uint_as_float(to_tf32(1.0f + 0x1.8p-11f)) == 1.0f + 0x1p-10f);
}

// ---- launches
// ----------------------------------------------------------------------------------------------------------

__global__ void nothing() {}
__global__ void launches() { launch("inner", nothing, 1, 1, 0, nullptr); }

void test_launches() {
  const auto error = [](dim3 grid, dim3 block, std::size_t smem) {
    return error_of([=] { launch("op", nothing, grid, block, smem, nullptr); });
  };
  check_text(error(0, 32, 0), "[op] a grid has 1 to", __LINE__);
  check_text(error(dim3(1, 65536), 32, 0), "[op] a grid has 1 to", __LINE__);
  check_text(error(1, 0, 0), "[op] a block has 1 to 1024 threads", __LINE__);
  check_text(error(1, dim3(33, 32), 0), "[op] a block has 1 to 1024 threads", __LINE__);
  check_text(error(1, dim3(1, 1, 65), 0), "at most 64 along z; got (1, 1, 65)", __LINE__);
  check_text(error(1, 1, 232449), "at most 232448 bytes of shared memory; got 232449", __LINE__);
  CHECK(error(dim3(7, 3, 2), 33, 232448) == "no error");
  CHECK_FAILS("launch of inner inside a kernel", launches, 1, 0);
}

__global__ void fails_in_block(unsigned block, int* done) {
  SHARED(s, int[64]);
  s[threadIdx.x] = 1;
  __syncthreads();
  if (blockIdx.x == block && threadIdx.x >= 32) return;
  __syncthreads();
  int sum = 0;
  for (const int value : s) sum += value;
  atomicAdd(done, sum);
}

void test_recovery() {
  for (int i = 0; i < 80; i++) {
    Array<int> done(1);
    const unsigned block = unsigned(i % 5);
    const std::string error = error_of([&] { launch("op", fails_in_block, 4, 64, 0, nullptr, block, done.data()); });
    if (block < 4) {
      check_text(error, "[op] block (" + std::to_string(block) + ", 0, 0): no thread can go on", __LINE__);
    } else {
      CHECK(error == "no error" && done[0] == 4 * 64 * 64);
    }
  }
}

// Every OS thread has a machine of its own.
void test_os_threads() {
  int sums[2] = {};
  const auto work = [&sums](int i) {
    for (int round = 0; round < 20; round++) {
      Array<int> done(1);
      launch("op", fails_in_block, 3, 64, 0, nullptr, 9u, done.data());
      sums[i] += done[0];
    }
  };
  std::thread first(work, 0), second(work, 1);
  first.join();
  second.join();
  CHECK(sums[0] == 20 * 3 * 64 * 64 && sums[1] == sums[0]);
}

// ---- schedules
// -----------------------------------------------------------------------------------------------------------

__global__ void note_order(int* order, int* next) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  order[atomicAdd(next, 1)] = i;
  __syncthreads();
  order[atomicAdd(next, 1)] = i;  // the same order again, after the barrier
}

std::string run_order(const char* schedule, int blocks, int threads) {
  setenv("TINYRES_SCHEDULE", schedule, 1);
  const int n = blocks * threads;
  Array<int> order(2 * n, -1), next(1);
  launch("op", note_order, dim3(unsigned(blocks)), dim3(unsigned(threads)), 0, nullptr, order.data(), next.data());
  std::string text;
  for (int i = 0; i < 2 * n; i++) {
    if (i / threads % 2 == 0) text += std::to_string(order[i]) + " ";
    if (i / threads % 2 == 0) CHECK(order[i] == order[i + threads]);
  }
  return text;
}

void test_schedules() {
  const char* given = std::getenv("TINYRES_SCHEDULE");
  const std::string kept = given ? given : "";
  std::string ascending, descending;
  for (int i = 0; i < 4 * 70; i++) {
    ascending += std::to_string(i) + " ";
    descending += std::to_string(4 * 70 - 1 - i) + " ";
  }
  CHECK(run_order("", 4, 70) == ascending);
  CHECK(run_order("forward", 4, 70) == ascending);
  CHECK(run_order("reverse", 4, 70) == descending);
  const std::string one = run_order("random:1", 4, 70), two = run_order("random:2", 4, 70);
  CHECK(one == run_order("random:1", 4, 70));
  CHECK(one != two && one != ascending && two != ascending && one.size() == ascending.size());
  for (const int i : {0, 1, 69, 70, 139, 279}) CHECK((" " + one).find(" " + std::to_string(i) + " ") != one.npos);
  for (const char* wrong : {"random", "random:", "random:x", "backward"}) {
    setenv("TINYRES_SCHEDULE", wrong, 1);
    check_text(error_of([] { launch("op", nothing, 1, 1, 0, nullptr); }),
               std::string("[op] TINYRES_SCHEDULE must be forward, reverse or random:SEED; got ") + wrong, __LINE__);
  }
  setenv("TINYRES_SCHEDULE", kept.c_str(), 1);
}

}  // namespace

int main() {
  test_meetings();
  test_shared();
  test_copies();
  test_launches();
  test_recovery();
  test_os_threads();
  test_schedules();
  return report();
}
