#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace tinyres {
namespace {

// Block sizes are multiples of 64 bytes up to 512, then eight to each doubling: at most 12.5 % of a request is lost,
// and a request finds its waiting blocks without a search.
constexpr int CLASSES = 8 + 8 * 38;
constexpr std::size_t LARGEST = std::size_t(1) << 47;

struct SizeClass {
  int index;
  std::size_t bytes;
};

SizeClass size_class(std::size_t bytes) {
  if (bytes <= 512) {
    const std::size_t units = bytes == 0 ? 1 : (bytes + 63) / 64;
    return {int(units) - 1, units * 64};
  }
  const int exponent = 63 - __builtin_clzll(bytes - 1);  // 2^exponent < bytes <= 2^(exponent + 1)
  const std::size_t base = std::size_t(1) << exponent, step = base / 8;
  const std::size_t steps = (bytes - base + step - 1) / step;
  return {8 + 8 * (exponent - 9) + int(steps) - 1, base + steps * step};
}

// Lies in front of every block, as long as the alignment so that the block keeps it.
struct alignas(ALIGNMENT) Header {
  Header* next;
  SizeClass size;
};

Header* header_of(void* block) { return static_cast<Header*>(block) - 1; }

// A large block begins at the border of a huge page and asks for such pages, which spare the misses of address
// translation. What lies in front of it, to reach that border, is never touched but for the header.
constexpr std::size_t HUGE_PAGE = std::size_t(2) << 20;

std::size_t in_front(std::size_t bytes) { return bytes >= HUGE_PAGE ? HUGE_PAGE : sizeof(Header); }

void* new_block(std::size_t bytes) {
  const std::size_t front = in_front(bytes);
  void* raw = nullptr;
  if (posix_memalign(&raw, front == HUGE_PAGE ? HUGE_PAGE : ALIGNMENT, front + bytes)) return nullptr;
  char* const block = static_cast<char*>(raw) + front;
#ifdef MADV_HUGEPAGE
  if (front == HUGE_PAGE) madvise(block, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);  // only a wish
#endif
  return block;
}

void free_block(void* block, std::size_t bytes) { std::free(static_cast<char*>(block) - in_front(bytes)); }

// Says how much was asked for in vain, without asking for more.
class OutOfMemory : public std::bad_alloc {
 public:
  OutOfMemory(std::size_t bytes, const MemoryStats& stats) {
    const double mib = 1 << 20;
    std::snprintf(text_, sizeof text_, "%.1f MiB asked of the system, %.1f MiB in use by tinyres", double(bytes) / mib,
                  double(stats.bytes_in_use) / mib);
  }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[128];
};

class Allocator {
 public:
  Header* take(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (bytes > LARGEST) throw OutOfMemory(bytes, stats_);
    const SizeClass size = size_class(bytes);
    Header* header = waiting_[size.index];
    if (header) {
      waiting_[size.index] = header->next;
    } else {
      header = ask_system(size);
    }
    stats_.taken++;
    stats_.bytes_in_use += i64(size.bytes);
    stats_.peak_bytes_in_use = std::max(stats_.peak_bytes_in_use, stats_.bytes_in_use);
    return header;
  }

  void give(Header* header) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    header->next = waiting_[header->size.index];
    waiting_[header->size.index] = header;
    stats_.bytes_in_use -= i64(header->size.bytes);
  }

  MemoryStats stats() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }

  void reset_peak() {
    const std::lock_guard<std::mutex> lock(mutex_);
    stats_.peak_bytes_in_use = stats_.bytes_in_use;
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    release_waiting();
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  Header* ask_system(const SizeClass& size) {
    void* block = new_block(size.bytes);
    if (!block) {
      release_waiting();
      block = new_block(size.bytes);
    }
    if (!block) throw OutOfMemory(size.bytes, stats_);
    stats_.system_allocations++;
    stats_.bytes_held += i64(size.bytes);
    return new (header_of(block)) Header{nullptr, size};
  }

  void release_waiting() noexcept {
    for (Header*& first : waiting_) {
      while (first) {
        Header* header = first;
        first = header->next;
        stats_.bytes_held -= i64(header->size.bytes);
        ASAN_UNPOISON_MEMORY_REGION(header + 1, header->size.bytes);
        free_block(header + 1, header->size.bytes);
      }
    }
  }

  std::mutex mutex_;
  Header* waiting_[CLASSES] = {};
  MemoryStats stats_ = {};
};

// Never destroyed: arrays may outlive the static objects when the interpreter exits. A fork waits until no other
// thread is inside, so that the child finds the lists whole and the mutex free.
Allocator& allocator() {
  static Allocator* const instance = [] {
    pthread_atfork([] { allocator().lock(); }, [] { allocator().unlock(); }, [] { allocator().unlock(); });
    return new Allocator;
  }();
  return *instance;
}

}  // namespace

// Under AddressSanitizer a waiting block, and what rounding adds to a request, count as out of bounds.
void* memory_take(std::size_t bytes) {
  Header* header = allocator().take(bytes);
  ASAN_POISON_MEMORY_REGION(header + 1, header->size.bytes);
  ASAN_UNPOISON_MEMORY_REGION(header + 1, bytes);
  return header + 1;
}

void memory_return(void* block) noexcept {
  Header* header = header_of(block);
  ASAN_POISON_MEMORY_REGION(block, header->size.bytes);
  allocator().give(header);
}

MemoryStats memory_stats() { return allocator().stats(); }
void memory_reset_peak() { allocator().reset_peak(); }
void memory_release() { allocator().release(); }

}  // namespace tinyres
