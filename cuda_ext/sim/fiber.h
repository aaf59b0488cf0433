// SPDX-License-Identifier: Apache-2.0
// Fibers: contexts with a stack of their own, one for every CUDA thread of the emulator.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace dtq::sim {

constexpr size_t kStack = 256 * 1024;  // frames are several times larger under address sanitizer

#if defined(__x86_64__)
extern "C" void dtq_sim_switch(void** save, void* load);
// weak: every file that includes this has its own copy
asm(R"(
.text
.weak dtq_sim_switch
.type dtq_sim_switch,@function
dtq_sim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size dtq_sim_switch,.-dtq_sim_switch
)");
#endif

// One for the scheduler and one for each fiber.
struct Context {
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t u;
#endif
  char* stack = nullptr;          // null for the scheduler
  const void* bottom = nullptr;   // of the stack, for address sanitizer
  size_t size = 0;
  void* fake = nullptr;
};

// A stack of the pool. An abandoned fiber may have left it poisoned.
inline char* stack_of(size_t index) {
  static thread_local std::vector<char*> pool;
  while (pool.size() <= index) pool.push_back(static_cast<char*>(std::aligned_alloc(64, kStack)));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(pool[index], kStack);
#endif
  return pool[index];
}

inline void prepare(Context& c, char* stack, void (*entry)()) {
  c.stack = stack;
  c.bottom = stack;
  c.size = kStack;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // aligns the stack as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;  // the registers that dtq_sim_switch pops
  c.sp = top;
#else
  getcontext(&c.u);
  c.u.uc_stack.ss_sp = stack;
  c.u.uc_stack.ss_size = kStack;
  c.u.uc_link = nullptr;
  makecontext(&c.u, entry, 0);
#endif
}

// The first thing a fiber does: tells address sanitizer which stack is in use.
inline void arrived(Context& self, Context& other) {
#if defined(__SANITIZE_ADDRESS__)
  const void** bottom = other.stack ? nullptr : &other.bottom;
  __sanitizer_finish_switch_fiber(self.fake, bottom, other.stack ? nullptr : &other.size);
#else
  (void)self, (void)other;
#endif
}

inline void switch_to(Context& from, Context& to, bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake, to.bottom, to.size);
#else
  (void)last;
#endif
#if defined(__x86_64__)
  dtq_sim_switch(&from.sp, to.sp);
#else
  swapcontext(&from.u, &to.u);
#endif
  arrived(from, to);
}

}  // namespace dtq::sim
