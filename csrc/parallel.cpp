// A caller publishes a job, its chunks dealt out in equal shares: thread i gets the i-th part of them in every job.
// What it wrote in one kernel is so in its own core's cache when the next one reads it, which took 7 % off a training
// step. A thread that has finished its share helps with the others.
//
// Picking a chunk is one compare-and-swap on the share's state, which carries the job's generation and the number of
// chunks left: a worker that comes late, or was suspended between looking and picking, finds none left or fails that
// swap, and touches nothing. So the caller can finish a job alone and waits for nothing but chunks that somebody else
// is computing: a busy second core costs speed, never a stall.
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <strings.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace tinyres {
namespace {

constexpr int MAX_THREADS = 1024;
constexpr i64 MAX_CHUNKS = INT32_MAX;

// Long enough to bridge the Python between two kernels, short enough not to be noticed by anybody else.
constexpr std::chrono::microseconds SPIN{50};

// The CPUs on which the calling thread may run; where the system does not tell, only their number is right.
std::vector<int> available_cpus() {
  std::vector<int> result;
#ifdef __linux__
  // The kernel refuses a set smaller than its own.
  for (int cpus = 1024; cpus <= 1 << 20 && result.empty(); cpus *= 2) {
    cpu_set_t* set = CPU_ALLOC(cpus);
    const std::size_t bytes = CPU_ALLOC_SIZE(cpus);
    if (set && sched_getaffinity(0, bytes, set) == 0) {
      for (int cpu = 0; cpu < cpus; cpu++)
        if (CPU_ISSET_S(cpu, bytes, set)) result.push_back(cpu);
    }
    if (set) CPU_FREE(set);
  }
#endif
  if (result.empty()) result.resize(std::max(1u, std::thread::hardware_concurrency()));
  return result;
}

// OMP_PROC_BIND asks for it, as in OpenMP: a thread then stays on its CPU, and what it has in that CPU's cache is there
// for its next kernel. Not so by default, for two processes would bind themselves to the same CPUs.
bool binding_wanted() {
  const char* const asked = std::getenv("OMP_PROC_BIND");
  return asked && *asked && strcasecmp(asked, "false") != 0;
}

// The CPUs to bind threads to: those of the process before the first was bound, in a forked child as well.
const std::vector<int>& places() {
  static const std::vector<int> found = available_cpus();
  return found;
}

void bind_to(int cpu) {
#ifdef __linux__
  cpu_set_t* set = CPU_ALLOC(cpu + 1);
  const std::size_t bytes = CPU_ALLOC_SIZE(cpu + 1);
  if (!set) return;
  CPU_ZERO_S(bytes, set);
  CPU_SET_S(cpu, bytes, set);
  pthread_setaffinity_np(pthread_self(), bytes, set);  // on failure the thread stays where the system puts it
  CPU_FREE(set);
#else
  (void)cpu;
#endif
}

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
bool spin_until(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + SPIN;
  do {
    for (int i = 0; i < 32; i++) {
      if (condition()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return condition();
}

// Sleeping until a condition holds that another thread brings about without holding the mutex: the sleeper raises the
// flag before it looks, the other one looks at the flag after its change.
class Sleeper {
 public:
  template <class Condition>
  void sleep_until(const Condition& condition) {
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_ = true;
    wake_.wait(lock, condition);
    asleep_ = false;
  }

  void wake() {
    if (!asleep_) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }
    wake_.notify_one();
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<bool> asleep_{false};
};

int count_cpus() { return int(binding_wanted() ? places().size() : available_cpus().size()); }

class Pool {
 public:
  Pool() {
    if (bind_) bind_to(places()[0]);
  }

  // False if the pool serves another call; then nothing has been run.
  bool run(i64 chunks, int threads, void (*fn)(void*, i64), void* context) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    const int helpers = hire(int(std::min<i64>(threads, chunks)) - 1);
    fn_.store(fn, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    chunks_.store(chunks, std::memory_order_relaxed);
    helpers_.store(helpers, std::memory_order_relaxed);
    spin_.store(threads <= cpus_, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);

    const std::uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
    for (int i = 0; i <= helpers; i++) {
      const i64 left = share_end(i, chunks, helpers) - share_end(i - 1, chunks, helpers);
      shares_[i].state.store(std::uint64_t(generation) << 32 | std::uint64_t(left));
    }
    generation_.store(generation);
    for (int i = 0; i < helpers; i++) workers_[std::size_t(i)].wake();
    work(generation, 0);

    const auto finished = [&] { return done_.load() == chunks; };
    if (!finished() && !(spin_.load(std::memory_order_relaxed) && spin_until(finished))) caller_.sleep_until(finished);
    const std::exception_ptr error = std::exchange(error_, nullptr);
    busy_.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
    return true;
  }

 private:
  struct alignas(64) Share {              // a cache line each
    std::atomic<std::uint64_t> state{0};  // generation of its job << 32 | chunks left
  };

  static std::uint32_t generation_of(std::uint64_t state) { return std::uint32_t(state >> 32); }
  static i64 share_end(int share, i64 chunks, int helpers) { return chunks * (share + 1) / (helpers + 1); }

  // Brings the number of workers up to `count` if the system lets it; returns how many of them will help.
  int hire(int count) {
    if (int(workers_.size()) < count) {
      // Workers block all signals: those belong to the thread in which the interpreter waits.
      sigset_t all, before;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      try {
        while (int(workers_.size()) < count) hire_one();
      } catch (const std::exception&) {
        // No more threads to be had: those that exist, or the caller alone, do the work.
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    return std::min(count, int(workers_.size()));
  }

  void hire_one() {
    const int index = int(workers_.size());
    const std::uint32_t seen = generation_.load(std::memory_order_relaxed);
    Sleeper& sleeper = workers_.emplace_back();
    try {
      std::thread([this, index, seen, &sleeper] { serve(index, seen, sleeper); }).detach();
    } catch (...) {
      workers_.pop_back();
      throw;
    }
  }

  [[noreturn]] void serve(int index, std::uint32_t seen, Sleeper& sleeper) {
    const auto published = [&] { return generation_.load() != seen; };
    if (bind_) bind_to(places()[std::size_t(index + 1) % places().size()]);
    bool spin = false;
    for (;;) {
      if (!(spin && spin_until(published))) sleeper.sleep_until(published);
      seen = generation_.load(std::memory_order_acquire);
      const bool wanted = index < helpers_.load(std::memory_order_relaxed);
      if (wanted) work(seen, index + 1);
      spin = wanted && spin_.load(std::memory_order_relaxed);
    }
  }

  // The fields of the job are read before a chunk is picked and used only if the swap succeeds: then a chunk was left
  // all the time, and the fields are written only while none is.
  void work(std::uint32_t generation, int own) {
    i64 ran = 0, chunks = 0;
    const int helpers = helpers_.load(std::memory_order_relaxed);
    for (int i = 0; i <= helpers; i++) {
      const int share = (own + i) % (helpers + 1);
      std::atomic<std::uint64_t>& shared = shares_[share].state;
      std::uint64_t state = shared.load(std::memory_order_acquire);
      while (generation_of(state) == generation) {
        const std::uint32_t left = std::uint32_t(state);
        if (left == 0) break;
        chunks = chunks_.load(std::memory_order_relaxed);
        auto* const fn = fn_.load(std::memory_order_relaxed);
        void* const context = context_.load(std::memory_order_relaxed);
        if (!shared.compare_exchange_weak(state, state - 1)) continue;
        call(fn, context, share_end(share, chunks, helpers) - left);
        ran++;
        state = shared.load(std::memory_order_acquire);
      }
    }
    if (ran > 0 && done_.fetch_add(ran) + ran == chunks) caller_.wake();
  }

  void call(void (*fn)(void*, i64), void* context, i64 chunk) {
    if (failed_.load(std::memory_order_relaxed)) return;
    try {
      fn(context, chunk);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }

  std::atomic<bool> busy_{false};
  std::atomic<std::uint32_t> generation_{0};  // of the newest job
  Share shares_[MAX_THREADS];                 // of the caller, then of worker 0, 1 ...
  std::atomic<void (*)(void*, i64)> fn_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<i64> chunks_{0};
  std::atomic<int> helpers_{0};    // workers 0 .. helpers-1 take part
  std::atomic<bool> spin_{false};  // a waiting thread has a CPU of its own
  std::atomic<i64> done_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  Sleeper caller_;
  std::deque<Sleeper> workers_;
  const bool bind_ = binding_wanted();
  const int cpus_ = count_cpus();
};

thread_local int requested_threads = 0;
std::atomic<int> known_default{0};

// Never destroyed, as its workers live until the process ends. They do not survive a fork: the child gets a new pool.
Pool* current_pool = nullptr;

Pool& pool() {
  static const bool once = [] {
    current_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] {
      current_pool = new Pool;
      known_default = 0;
    });
    return true;
  }();
  (void)once;
  return *current_pool;
}

}  // namespace

void parallel_run(i64 chunks, void (*fn)(void* context, i64 chunk), void* context) {
  const int count = threads();
  if (chunks > 1 && chunks <= MAX_CHUNKS && count > 1 && pool().run(chunks, count, fn, context)) return;
  for (i64 chunk = 0; chunk < chunks; chunk++) fn(context, chunk);
}

int threads() {
  if (requested_threads > 0) return requested_threads;
  const int known = known_default.load(std::memory_order_relaxed);
  return known > 0 ? known : default_threads();
}

void set_threads(int count) { requested_threads = std::clamp(count, 0, MAX_THREADS); }

int default_threads() {
  const char* const asked = std::getenv("OMP_NUM_THREADS");
  const long count = asked ? std::strtol(asked, nullptr, 10) : 0;
  const int result = std::min(count > 0 && count <= INT32_MAX ? int(count) : count_cpus(), MAX_THREADS);
  known_default = result;
  return result;
}

}  // namespace tinyres
