// Fibres: stacks that one OS thread changes between by a function call.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__x86_64__) && !defined(TINYRES_UCONTEXT)
#define TINYRES_X86_SWITCH 1
#else
#include <ucontext.h>
#endif

// ThreadSanitizer must not see the emulator's own book-keeping: the threads of a block share it without any order that
// CUDA would give them. Every function that touches it carries NO_TSAN and calls no instrumented one (so: no standard
// containers). What is intercepted all the same, malloc and memset among it, is placed with care.
#ifdef TINYRES_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef TINYRES_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(void* p, unsigned long bytes);
extern "C" void __tsan_write_range(void* p, unsigned long bytes);
#define NO_TSAN __attribute__((no_sanitize("thread")))
#elif defined(TINYRES_TRAFFIC)
#define NO_TSAN __attribute__((no_sanitize("thread")))  // nor is it a kernel's traffic
#else
#define NO_TSAN
#endif

namespace tinyres::emulation {

#ifdef TINYRES_TSAN
NO_TSAN inline void tsan_enter(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
NO_TSAN inline void tsan_acquire(void* token) { __tsan_acquire(token); }
NO_TSAN inline void tsan_release(void* token) { __tsan_release(token); }
// What the emulation reads and writes on behalf of a kernel. Said outright, since the compiler may expand a memcpy
// after it has placed its instrumentation. Instrumented, as callers must be, or the kernel's line would be missing from
// the report.
inline void kernel_reads(const void* p, std::size_t bytes) { __tsan_read_range(const_cast<void*>(p), bytes); }
inline void kernel_writes(void* p, std::size_t bytes) { __tsan_write_range(p, bytes); }
#else
inline void tsan_acquire(void*) {}
inline void tsan_release(void*) {}
inline void kernel_reads(const void*, std::size_t) {}
inline void kernel_writes(void*, std::size_t) {}
#endif

struct Fiber {
  char* stack = nullptr;  // its lowest byte; a launcher's stack is not ours, and known only while ASan needs it
  std::size_t bytes = 0;
  void* asan = nullptr;  // ASan's copy of the frames, for its search of uses after return
  void* tsan = nullptr;  // ThreadSanitizer's idea of this fibre
#ifdef TINYRES_X86_SWITCH
  void* top = nullptr;  // where its registers lie while it does not run
#else
  ucontext_t context;
#endif
};

#if defined(TINYRES_ASAN) || defined(TINYRES_TSAN) || defined(TINYRES_TRAFFIC)
constexpr std::size_t STACK_BYTES = 256 << 10;
#else
constexpr std::size_t STACK_BYTES = 64 << 10;
#endif

// Address space only, until touched; an overflow runs into a page without access.
NO_TSAN inline void map_stack(Fiber& fiber) {
  const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, STACK_BYTES + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  if (mprotect(memory, page, PROT_NONE) != 0) {
    munmap(memory, STACK_BYTES + page);
    throw std::bad_alloc();
  }
  fiber.stack = static_cast<char*>(memory) + page;
  fiber.bytes = STACK_BYTES;
}

inline void unmap_stack(Fiber& fiber) {
  const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
  if (!fiber.stack) return;
#ifdef TINYRES_ASAN
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, fiber.bytes);  // whoever gets these addresses next should not inherit it
#endif
  munmap(fiber.stack - page, STACK_BYTES + page);
  fiber.stack = nullptr;
}

// The next change to this fibre calls entry, which must not return; whatever the stack held is given up. Equally
// aligned stacks would fight for the same sets of the cache: `number` staggers them.
NO_TSAN inline void start_at(Fiber& fiber, void (*entry)(), int number) {
  const std::size_t stagger = std::size_t(number) * 320 % 4096;
#ifdef TINYRES_ASAN
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, fiber.bytes);
  fiber.asan = nullptr;
#endif
#ifdef TINYRES_X86_SWITCH
  // Six registers, the entry, and a return address of zero, at which a debugger's back-trace ends.
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.bytes - stagger - 80);
  for (int i = 0; i < 8; i++) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(entry);
  fiber.top = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.bytes - stagger;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

#ifdef TINYRES_X86_SWITCH
// Keeps what the calling convention says a function must keep. It leaves by a jump, since a return would be predicted
// to the place that this stack was called from.
__attribute__((naked, noinline)) NO_TSAN inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmpq *%rcx
  )");
}
#endif

// To be called first thing on a stack that was changed to. Where ASan does not yet know the launcher's stack, it is the
// one that was just left.
NO_TSAN inline void arrived(Fiber& self, Fiber& launcher) {
#ifdef TINYRES_ASAN
  const void* left;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(self.asan, &left, &bytes);
  if (!launcher.stack) {
    launcher.stack = static_cast<char*>(const_cast<void*>(left));
    launcher.bytes = bytes;
  }
#else
  (void)self, (void)launcher;
#endif
}

NO_TSAN inline void switch_fiber(Fiber& from, Fiber& to, Fiber& launcher) {
#ifdef TINYRES_ASAN
  __sanitizer_start_switch_fiber(&from.asan, to.stack, to.bytes);
#endif
#ifdef TINYRES_TSAN
  tsan_enter(to.tsan);
#endif
#ifdef TINYRES_X86_SWITCH
  switch_stack(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived(from, launcher);
}

}  // namespace tinyres::emulation
