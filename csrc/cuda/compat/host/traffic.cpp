// Counts bytes (traffic.h). Not instrumented itself, and nothing else of the build is but the kernels' files.
#include "traffic.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <map>
#include <unordered_map>
#include <utility>

#include "../cuda.h"

namespace tinyres::emulation::traffic {
namespace {

struct Range {
  std::uintptr_t begin = 0, end = 0;
  bool holds(std::uintptr_t at) const { return at - begin < end - begin; }
};

constexpr int SECTOR = 32, PAGE = 4096, SECTORS = PAGE / SECTOR, WORDS = SECTORS / 64;

// Which sectors of 4 KB were met: read, written.
struct Page {
  u64 met[2][WORDS] = {};
};

struct Counter {
  bool counts = false;
  Launch launch;
  std::unordered_map<std::uintptr_t, Page> pages;
  std::pair<std::uintptr_t, Page*> recent[1024];    // by the last bits of the page's number
  std::vector<Range> aside;                         // of this library or program, and of the launcher's stack
  std::map<std::uintptr_t, std::uintptr_t> marked;  // begin and end
  std::vector<Launch> launches;

  void touch(std::uintptr_t at, std::size_t bytes, bool writes) {
    (writes ? launch.written : launch.read).asked += bytes;
    for (std::uintptr_t sector = at / SECTOR; sector <= (at + bytes - 1) / SECTOR; sector++) {
      auto& [number, page] = recent[sector / SECTORS % 1024];
      if (!page || number != sector / SECTORS) number = sector / SECTORS, page = &pages[number];
      page->met[writes][sector % SECTORS / 64] |= u64(1) << sector % 64;
    }
  }
};

Counter counter;

// A library's variables, constants among them, and its variables of this thread (threadIdx).
int keep_aside(dl_phdr_info* info, std::size_t, void* own) {
  std::vector<Range> ranges;
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& part = info->dlpi_phdr[i];
    const std::uintptr_t begin = info->dlpi_addr + part.p_vaddr;
    const std::uintptr_t of_thread = reinterpret_cast<std::uintptr_t>(info->dlpi_tls_data);
    if (part.p_type == PT_LOAD) ranges.push_back({begin, begin + part.p_memsz});
    if (part.p_type == PT_LOAD) ours |= ranges.back().holds(reinterpret_cast<std::uintptr_t>(own));
    if (part.p_type == PT_TLS && of_thread) ranges.push_back({of_thread, of_thread + part.p_memsz});
  }
  if (ours) counter.aside.insert(counter.aside.end(), ranges.begin(), ranges.end());
  return ours;
}

// Whether a kernel runs, and `at` is global memory: neither a thread's own, nor shared, nor a variable, nor a kernel's
// parameter, which lies on the launcher's stack.
bool is_traffic(std::uintptr_t at) {
  if (!counter.counts || !engine || !engine->current || !engine->current->fiber) return false;
  const Fiber& fiber = *engine->current->fiber;
  const std::uintptr_t lowest = reinterpret_cast<std::uintptr_t>(fiber.stack);
  const Range stack{lowest, lowest + fiber.bytes};
  if (!stack.holds(reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0)))) return false;  // the launcher's code
  if (stack.holds(at) || is_shared(reinterpret_cast<const void*>(at), 1)) return false;
  for (const Range& range : counter.aside)
    if (range.holds(at)) return false;
  return true;
}

void accessed(const volatile void* p, std::size_t bytes, bool writes) {
  const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(p);
  if (bytes && is_traffic(at)) counter.touch(at, bytes, writes);
}

void add_page(std::uintptr_t number, const Page& page) {
  for (int i = 0; i < SECTORS; i++) {
    const std::uintptr_t at = number * PAGE + std::uintptr_t(i) * SECTOR;
    const auto after = counter.marked.upper_bound(at);
    const bool marked = after != counter.marked.begin() && at < std::prev(after)->second;
    for (const bool writes : {false, true}) {
      Bytes& bytes = writes ? counter.launch.written : counter.launch.read;
      if (page.met[writes][i / 64] >> i % 64 & 1) (marked ? bytes.marked : bytes.others) += SECTOR;
    }
  }
}

}  // namespace

Counting::Counting(const char* op, const void* kernel, dim3 grid, dim3 block) {
  if (counter.aside.empty()) {
    dl_iterate_phdr(keep_aside, &counter);
    pthread_attr_t attributes;
    void* stack;
    std::size_t bytes;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) std::abort();
    pthread_attr_getstack(&attributes, &stack, &bytes);
    pthread_attr_destroy(&attributes);
    const std::uintptr_t lowest = reinterpret_cast<std::uintptr_t>(stack);
    counter.aside.push_back({lowest, lowest + bytes});
  }
  Dl_info from;
  if (!dladdr(kernel, &from)) std::abort();
  const std::uintptr_t offset =
      reinterpret_cast<std::uintptr_t>(kernel) - reinterpret_cast<std::uintptr_t>(from.dli_fbase);
  counter.launch = {op, offset, grid, block, {}, {}};
  counter.counts = true;
}

Counting::~Counting() {
  counter.counts = false;
  for (const auto& [number, page] : counter.pages) add_page(number, page);
  counter.pages.clear();
  for (auto& entry : counter.recent) entry = {};
  counter.launches.push_back(std::move(counter.launch));
}

void mark(const void* p, std::size_t bytes, bool marked) {
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(p), end = begin + bytes;
  auto next = counter.marked.lower_bound(begin);
  if (next != counter.marked.begin() && std::prev(next)->second > begin) --next;
  while (next != counter.marked.end() && next->first < end) next = counter.marked.erase(next);  // whose place this is
  if (marked && bytes) counter.marked[begin] = end;
}

std::vector<Launch> take() { return std::exchange(counter.launches, {}); }

}  // namespace tinyres::emulation::traffic

// ---- what the compiler's instrumentation calls --------------------------------------------------------------------

using tinyres::emulation::traffic::accessed;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

#define ACCESSES(name, bytes)                                    \
  void __tsan_read##name(void* p) { accessed(p, bytes, false); } \
  void __tsan_write##name(void* p) { accessed(p, bytes, true); }
#define UNALIGNED(bytes)                                                    \
  void __tsan_unaligned_read##bytes(void* p) { accessed(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { accessed(p, bytes, true); }
ACCESSES(1, 1)
ACCESSES(2, 2)
ACCESSES(4, 4)
ACCESSES(8, 8)
ACCESSES(16, 16)
UNALIGNED(2)
UNALIGNED(4)
UNALIGNED(8)
UNALIGNED(16)
void __tsan_read_range(void* p, unsigned long bytes) { accessed(p, bytes, false); }
void __tsan_write_range(void* p, unsigned long bytes) { accessed(p, bytes, true); }

// An atomic operation takes the place of the instruction: it has to do the work too.
#define ATOMICS(bits, Word)                                                                                        \
  Word __tsan_atomic##bits##_load(const volatile void* p, int) {                                                   \
    accessed(p, sizeof(Word), false);                                                                              \
    return __atomic_load_n(static_cast<const volatile Word*>(p), __ATOMIC_SEQ_CST);                                \
  }                                                                                                                \
  void __tsan_atomic##bits##_store(volatile void* p, Word value, int) {                                            \
    accessed(p, sizeof(Word), true);                                                                               \
    __atomic_store_n(static_cast<volatile Word*>(p), value, __ATOMIC_SEQ_CST);                                     \
  }                                                                                                                \
  Word __tsan_atomic##bits##_exchange(volatile void* p, Word value, int) {                                         \
    accessed(p, sizeof(Word), false), accessed(p, sizeof(Word), true);                                             \
    return __atomic_exchange_n(static_cast<volatile Word*>(p), value, __ATOMIC_SEQ_CST);                           \
  }                                                                                                                \
  Word __tsan_atomic##bits##_fetch_add(volatile void* p, Word value, int) {                                        \
    accessed(p, sizeof(Word), false), accessed(p, sizeof(Word), true);                                             \
    return __atomic_fetch_add(static_cast<volatile Word*>(p), value, __ATOMIC_SEQ_CST);                            \
  }                                                                                                                \
  Word __tsan_atomic##bits##_fetch_sub(volatile void* p, Word value, int) {                                        \
    accessed(p, sizeof(Word), false), accessed(p, sizeof(Word), true);                                             \
    return __atomic_fetch_sub(static_cast<volatile Word*>(p), value, __ATOMIC_SEQ_CST);                            \
  }                                                                                                                \
  bool __tsan_atomic##bits##_compare_exchange_strong(volatile void* p, void* expected, Word value, int, int) {     \
    accessed(p, sizeof(Word), false), accessed(p, sizeof(Word), true);                                             \
    return __atomic_compare_exchange_n(static_cast<volatile Word*>(p), static_cast<Word*>(expected), value, false, \
                                       __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                        \
  }                                                                                                                \
  bool __tsan_atomic##bits##_compare_exchange_weak(volatile void* p, void* expected, Word value, int a, int b) {   \
    return __tsan_atomic##bits##_compare_exchange_strong(p, expected, value, a, b);                                \
  }
ATOMICS(8, unsigned char)
ATOMICS(32, unsigned int)
ATOMICS(64, unsigned long)

}  // extern "C"
