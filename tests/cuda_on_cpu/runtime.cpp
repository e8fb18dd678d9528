// The fibers behind cuda_runtime.h, and the order in which they run.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define WITH_ASAN 1
#else
#define WITH_ASAN 0
#endif

// The one `extern __shared__` array of csrc/device.cuh.
namespace cmpose {
alignas(128) unsigned char cmpose_shared[cuda_on_cpu::kSharedLimit];
}
using cmpose::cmpose_shared;

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = WITH_ASAN ? 256 * 1024 : 64 * 1024;

enum class State { kReady, kAtBarrier, kInCollective, kEnded };

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int group;
};

struct Fiber {
  void* stack_pointer = nullptr;  // while it does not run
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  void* fake_stack = nullptr;
  State state = State::kEnded;
  dim3 thread;
  int lane = 0, warp = 0, line = 0;
  std::vector<Copy> copies;
  int groups = 0;
};

struct Warp {
  unsigned mask = 0, arrived = 0;
  int line = 0, turn = 0;
  uint32_t slots[2][32][kSlotWords];  // by turn: a lane may be a turn ahead of one that still reads
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
Fiber* self = nullptr;
int live = 0, waiting = 0, members = 0;
const std::function<void()>* body = nullptr;
std::string failure;
bool failed = false;

// -- switching: hand-written where it is known, since swapcontext makes two system calls ----------

#if defined(__x86_64__)
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.pushsection .text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch,@function
cuda_on_cpu_switch:
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
  ret
.size cuda_on_cpu_switch,.-cuda_on_cpu_switch
.popsection
)");
void* scheduler_pointer = nullptr;
#else
ucontext_t scheduler_context;
#endif

#if WITH_ASAN
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
void* scheduler_fake = nullptr;
#endif

void switch_to_scheduler(bool ends) {
  Fiber* fiber = self;
#if WITH_ASAN
  __sanitizer_start_switch_fiber(ends ? nullptr : &fiber->fake_stack, scheduler_bottom,
                                 scheduler_size);
#else
  (void)ends;
#endif
#if defined(__x86_64__)
  cuda_on_cpu_switch(&fiber->stack_pointer, scheduler_pointer);
#else
  swapcontext(&fiber->context, &scheduler_context);
#endif
#if WITH_ASAN
  __sanitizer_finish_switch_fiber(fiber->fake_stack, nullptr, nullptr);
#endif
}

void switch_to(Fiber* fiber) {
  self = fiber;
  threadIdx = fiber->thread;
#if WITH_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber->stack.get(), kStackBytes);
#endif
#if defined(__x86_64__)
  cuda_on_cpu_switch(&scheduler_pointer, fiber->stack_pointer);
#else
  swapcontext(&scheduler_context, &fiber->context);
#endif
#if WITH_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
}

void fiber_main() {
#if WITH_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  (*body)();
  self->state = State::kEnded;
  --live;
  switch_to_scheduler(true);
  std::abort();  // nobody resumes a fiber that has ended
}

void prepare(Fiber* fiber) {
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(fiber->stack.get() + kStackBytes) & ~uintptr_t{15};
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;  // so that the stack is aligned as after a call
  *--stack = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  fiber->stack_pointer = stack;
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber->context, fiber_main, 0);
#endif
}

void wait(State state) {
  self->state = state;
  switch_to_scheduler(false);
}

void release(State state) {
  for (int i = 0; i < members; ++i)
    if (fibers[i]->state == state) fibers[i]->state = State::kReady;
}

std::string where(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.thread.x) + " of block " + std::to_string(blockIdx.x) +
         " at line " + std::to_string(fiber.line);
}

void note(const std::string& what) {
  if (!failed) failure = what;
  failed = true;
}

void release_barrier() {
  const Fiber* first = nullptr;
  for (int i = 0; i < members; ++i) {
    const Fiber& fiber = *fibers[i];
    if (fiber.state != State::kAtBarrier) continue;
    if (first && fiber.line != first->line)
      note("threads of a block wait at different barriers: " + where(*first) + ", " + where(fiber));
    if (!first) first = &fiber;
  }
  waiting = 0;
  release(State::kAtBarrier);
}

void run_block(std::vector<int>& order, std::mt19937* shuffle) {
  live = members;
  waiting = 0;
  for (Warp& warp : warps) warp.mask = warp.arrived = 0;
  for (int i = 0; i < members; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.state = State::kReady;
    fiber.copies.clear();
    fiber.groups = 0;
    prepare(&fiber);
  }
  while (live > 0) {
    bool progress = false;
    if (shuffle) std::shuffle(order.begin(), order.end(), *shuffle);
    for (int i : order) {
      if (fibers[i]->state != State::kReady) continue;
      switch_to(fibers[i].get());
      progress = true;
      if (failed) return;
      if (live > 0 && waiting == live) release_barrier();
    }
    if (!progress) {
      for (int i = 0; i < members; ++i) {
        const Fiber& fiber = *fibers[i];
        if (fiber.state == State::kReady || fiber.state == State::kEnded) continue;
        note(std::string("not all threads reach ") +
             (fiber.state == State::kAtBarrier ? "a barrier: " : "a warp collective: ") +
             where(fiber) + " waits, others have ended or wait elsewhere");
        return;
      }
    }
  }
}

}  // namespace

int lane() { return self->lane; }

void fail(const char* what) {
  note(std::string(what) + ": " + where(*self));
  switch_to_scheduler(false);
  std::abort();  // a block that has failed goes no further
}

const char* last_failure() { return failure.c_str(); }

void barrier(int line) {
  self->line = line;
  ++waiting;
  wait(State::kAtBarrier);
}

const uint32_t (*collective(unsigned mask, const uint32_t* words, int count,
                            int line))[kSlotWords] {
  self->line = line;
  Warp& warp = warps[self->warp];
  if (!(mask >> self->lane & 1)) fail("a lane is not in the mask of its warp collective");
  if (warp.arrived && warp.mask != mask) fail("lanes of a warp collective have unequal masks");
  if (warp.arrived && warp.line != line) fail("lanes of a warp are in different collectives");
  warp.mask = mask;
  warp.line = line;
  const int turn = warp.turn;
  if (count) std::memcpy(warp.slots[turn][self->lane], words, 4 * count);
  warp.arrived |= 1u << self->lane;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    warp.turn ^= 1;
    for (int i = self->warp * 32; i < std::min(members, self->warp * 32 + 32); ++i)
      if (fibers[i]->state == State::kInCollective) fibers[i]->state = State::kReady;
  } else {
    wait(State::kInCollective);
  }
  return warp.slots[turn];
}

namespace {
bool early_copies = false;

void make(const Copy& copy) {
  if (copy.from) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}
}  // namespace

void copy_later(void* to, const void* from, int bytes) {
  const Copy copy{to, from, bytes, self->groups};
  if (early_copies) {
    make(copy);
  } else {
    self->copies.push_back(copy);
  }
}

void commit_copies() { ++self->groups; }

void wait_for_copies(int groups_in_flight) {
  std::vector<Copy> left;
  for (const Copy& copy : self->copies) {
    if (copy.group >= self->groups - groups_in_flight) {
      left.push_back(copy);
    } else {
      make(copy);
    }
  }
  self->copies = std::move(left);
}

namespace {
std::map<const void*, unsigned> allowed;
}

void allow_shared(const void* kernel, unsigned bytes) { allowed[kernel] = bytes; }
unsigned allowed_shared(const void* kernel) {
  const auto found = allowed.find(kernel);
  return found == allowed.end() ? kSharedDefault : std::max(found->second, kSharedDefault);
}

int run(dim3 grid, dim3 block, unsigned shared_bytes, unsigned allowed_bytes,
        const std::function<void()>& kernel) {
  failed = false;
  if (shared_bytes > kSharedLimit || shared_bytes > allowed_bytes) {
    note("a block asks for " + std::to_string(shared_bytes) +
         " bytes of shared memory and may "
         "have " +
         std::to_string(std::min(kSharedLimit, allowed_bytes)));
    return 0;
  }
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  members = static_cast<int>(block.x);
  if (block.x % 32 || block.x > 1024 || block.y * block.z != 1 || grid.y * grid.z != 1) {
    note("launches here are one-dimensional, of whole warps");
    return 0;
  }
  warps.resize(members / 32);
  while (static_cast<int>(fibers.size()) < members) fibers.emplace_back(new Fiber);
  std::vector<int> order(members);
  for (int i = 0; i < members; ++i) {
    order[i] = i;
    fibers[i]->thread = dim3(i, 0, 0);
    fibers[i]->lane = i % 32;
    fibers[i]->warp = i / 32;
  }
  const char* asked = std::getenv("CUDA_ON_CPU_ORDER");
  const std::string name = asked ? asked : "forward";
  std::unique_ptr<std::mt19937> shuffle;
  if (name == "backward") {
    std::reverse(order.begin(), order.end());
  } else if (name != "forward") {
    shuffle.reset(new std::mt19937(static_cast<unsigned>(std::stoul(name))));
  }
  const char* copies = std::getenv("CUDA_ON_CPU_COPIES");
  early_copies = copies && std::string(copies) == "early";
#if WITH_ASAN
  __asan_unpoison_memory_region(cmpose_shared, kSharedLimit);
  __asan_poison_memory_region(cmpose_shared + shared_bytes, kSharedLimit - shared_bytes);
#endif
  for (unsigned i = 0; i < grid.x && !failed; ++i) {
    blockIdx = dim3(i, 0, 0);
    std::memset(cmpose_shared, 0xff, shared_bytes);
    run_block(order, shuffle.get());
  }
#if WITH_ASAN
  __asan_unpoison_memory_region(cmpose_shared, kSharedLimit);
#endif
  return !failed;
}

Taker taker = nullptr;

bool hand_over(const void* kernel, dim3 grid, dim3 block, unsigned shared_bytes,
               const std::vector<char>& parameters) {
  failed = false;
  const char* const why = taker(kernel, grid.x, block.x, shared_bytes, parameters.data(),
                                static_cast<unsigned>(parameters.size()));
  if (why) note(why);
  return !why;
}

}  // namespace cuda_on_cpu

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_hand_over(
    cuda_on_cpu::Taker taker) {
  cuda_on_cpu::taker = taker;
}
