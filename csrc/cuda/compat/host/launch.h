// Grids: one block after the other.
#pragma once

#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "scheduler.h"
#ifdef TINYRES_TRAFFIC
#include "traffic.h"
#endif

namespace tinyres {
namespace emulation {

constexpr std::size_t MAX_STATIC_SMEM = 48 << 10, MAX_SMEM = 227 << 10;  // of compute capability 9.0

inline Schedule chosen_schedule(const char* op) {
  const char* text = std::getenv("TINYRES_SCHEDULE");
  const std::string name = text ? text : "";
  if (name.empty() || name == "forward") return {Schedule::forward, 0};
  if (name == "reverse") return {Schedule::reverse, 0};
  if (name.rfind("random:", 0) == 0 && name.size() > 7 && name.find_first_not_of("0123456789", 7) == std::string::npos)
    return {Schedule::random, std::strtoull(text + 7, nullptr, 10)};
  throw std::invalid_argument("[" + std::string(op) +
                              "] TINYRES_SCHEDULE must be forward, reverse or random:SEED; got " + name);
}

inline std::string text_of(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}
inline std::string text_of(dim3 v) { return text_of(uint3{v.x, v.y, v.z}); }

inline void check_launch(const char* op, dim3 grid, dim3 block, std::size_t smem_bytes) {
  std::string wrong;
  if (u64(block.x) * block.y * block.z - 1 >= MAX_THREADS || block.x > 1024 || block.y > 1024 || block.z > 64)
    wrong = "a block has 1 to 1024 threads, at most 64 along z; got " + text_of(block);
  if (grid.x - 1 >= 0x7fffffffu || grid.y - 1 >= 65535 || grid.z - 1 >= 65535)
    wrong = "a grid has 1 to 2147483647 x 65535 x 65535 blocks; got " + text_of(grid);
  if (smem_bytes > MAX_SMEM)
    wrong = "a block has at most " + std::to_string(MAX_SMEM) + " bytes of shared memory; got " +
            std::to_string(smem_bytes);
  if (!wrong.empty()) throw std::runtime_error("[" + std::string(op) + "] " + wrong);
}

// Block number i of the schedule; blocks are independent, so any order must do.
inline u64 block_in_order(const Schedule& schedule, u64 i, u64 blocks) {
  if (schedule.kind == Schedule::forward) return i;
  if (schedule.kind == Schedule::reverse) return blocks - 1 - i;
  u64 state = schedule.seed;
  const u64 offset = next_random(state) % blocks;
  u64 factor = next_random(state) % 1000000 + 1, a, b;
  do {  // until it has no divisor in common with `blocks`
    factor++;
    for (a = factor, b = blocks; b;) {
      const u64 rest = a % b;
      a = b;
      b = rest;
    }
  } while (a != 1);
  return (i * factor + offset) % blocks;
}

inline void run_grid(const char* op, dim3 grid, dim3 block, std::size_t smem_bytes, void (*body)(void*), void* call) {
  if (engine) fail("launch of %s inside a kernel", op);
  check_launch(op, grid, block, smem_bytes);
  static thread_local std::unique_ptr<Engine> machine;
  if (!machine) machine.reset(new Engine);
  Engine& e = *machine;
  e.schedule = chosen_schedule(op);
  e.op = op;
  e.threads = int(block.x * block.y * block.z);
  e.warps = (e.threads + 31) / 32;
  e.dynamic_bytes = smem_bytes;
  e.body = body;
  e.call = call;
  blockDim = block;
  gridDim = grid;
  for (int i = 0; i < e.threads; i++) {
    const unsigned t = unsigned(i);
    e.all[i].index = uint3{t % block.x, t / block.x % block.y, t / block.x / block.y};
  }
  struct InProgress {
    explicit InProgress(Engine& e) { engine = &e; }
    ~InProgress() { engine = nullptr; }
  } in_progress(e);
  e.prepare_sanitizer();
  bool done = true;
  const u64 blocks = u64(grid.x) * grid.y * grid.z;
  for (u64 i = 0; i < blocks && done; i++) done = e.run_block(block_in_order(e.schedule, i, blocks));
  tsan_acquire(&e.finish);
  if (!done) throw std::runtime_error("[" + std::string(op) + "] block " + text_of(blockIdx) + ": " + e.reason());
}

// Launches with their arguments, as a CUDA graph holds them.
struct Graph {
  std::vector<std::function<void()>> launches;
};

// Where this thread's launches go instead of being run, while it captures; else nullptr.
inline thread_local Graph* captured = nullptr;

}  // namespace emulation

constexpr int MAX_PARAMETER_BYTES = 32764;  // of CUDA

// The stream is accepted and ignored: the kernel has run when this returns, or is captured.
template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t smem_bytes, cudaStream_t,
            Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "as many arguments as the kernel has parameters");
  static_assert((std::is_trivially_copyable_v<Params> && ...), "kernel parameters are passed by value, as bytes");
  static_assert((sizeof(Params) + ... + 0) <= MAX_PARAMETER_BYTES, "more bytes of parameters than a launch takes");
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> args;
  } call{kernel, std::tuple<Params...>(static_cast<Params>(args)...)};
  auto run = [=]() mutable {
#ifdef TINYRES_TRAFFIC
    const emulation::traffic::Counting counting(op, reinterpret_cast<const void*>(kernel), grid, block);
#endif
    emulation::run_grid(
        op, grid, block, smem_bytes,
        [](void* call) { std::apply(static_cast<Call*>(call)->kernel, static_cast<Call*>(call)->args); }, &call);
  };
  launches++;
  if (!emulation::captured) return run();
  emulation::check_launch(op, grid, block, smem_bytes);
  emulation::captured->launches.push_back(run);
}

}  // namespace tinyres
