// Hammers the thread pool and the allocator, to be run under the sanitizers: jobs of every size from two threads at
// once, nested jobs, exceptions, more threads than CPUs, blocks that change hands, and (not under ThreadSanitizer,
// which does not support it) forks. Exits with 1 and a line of text at the first thing that is wrong.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "memory.h"
#include "parallel.h"

using namespace tinyres;

namespace {

void expect(bool condition, const char* rule) {
  if (condition) return;
  std::fprintf(stderr, "pool_stress: %s\n", rule);
  std::_Exit(1);
}

template <class F>
void parallel_for(i64 chunks, const F& body) {
  parallel_run(
      chunks, [](void* context, i64 chunk) { (*static_cast<const F*>(context))(chunk); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Plain, unsynchronised writes: the pool itself must order them before the caller's reads.
void every_chunk_runs_once(i64 chunks) {
  std::vector<int> runs(std::size_t(chunks), 0);
  parallel_for(chunks, [&](i64 chunk) { runs[std::size_t(chunk)]++; });
  for (const int count : runs) expect(count == 1, "every chunk must run exactly once");
}

void nested_jobs_run_inline() {
  std::atomic<i64> total{0};
  parallel_for(8, [&](i64) { parallel_for(8, [&](i64 chunk) { total += chunk; }); });
  expect(total == 8 * 28, "nested jobs must run");
}

void exceptions_reach_the_caller() {
  bool caught = false;
  try {
    parallel_for(64, [](i64 chunk) {
      if (chunk == 17) throw std::runtime_error("chunk 17");
    });
  } catch (const std::runtime_error& error) {
    caught = std::strcmp(error.what(), "chunk 17") == 0;
  }
  expect(caught, "an exception must reach the caller");
}

void blocks_belong_to_one(i64 round) {
  std::vector<unsigned char*> blocks(16);
  parallel_for(16, [&](i64 chunk) {
    const std::size_t bytes = std::size_t(1 + (round * 977 + chunk * 131) % 10000);
    auto* block = static_cast<unsigned char*>(memory_take(bytes));
    expect(reinterpret_cast<std::uintptr_t>(block) % ALIGNMENT == 0, "blocks must be aligned");
    std::memset(block, int(chunk), bytes);
    const Scratch<double> scratch(1 + chunk);
    scratch[chunk] = double(chunk);
    expect(block[0] == chunk && block[bytes - 1] == chunk && scratch[chunk] == double(chunk),
           "a block must belong to one holder");
    blocks[std::size_t(chunk)] = block;
  });
  for (auto* block : blocks) memory_return(block);
}

void work(int rounds, int thread_count) {
  set_threads(thread_count);
  for (i64 round = 0; round < rounds; round++) {
    every_chunk_runs_once(round % 67);
    nested_jobs_run_inline();
    exceptions_reach_the_caller();
    blocks_belong_to_one(round);
    if (round % 64 == 0) memory_release();
  }
}

#ifndef __SANITIZE_THREAD__
void a_forked_child_works() {
  const pid_t child = fork();
  expect(child >= 0, "fork must succeed");
  if (child == 0) {
    alarm(60);
    work(20, 3);
    std::_Exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child must finish its work");
}
#endif

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 1000;
  {
    std::thread other([=] { work(rounds, 2); });
    work(rounds, 4);
#ifndef __SANITIZE_THREAD__
    for (int i = 0; i < 20; i++) a_forked_child_works();
#endif
    other.join();
  }
  const MemoryStats stats = memory_stats();
  expect(stats.bytes_in_use == 0, "every block must have come back");
  std::printf("pool_stress: %d rounds passed\n", rounds);
}
