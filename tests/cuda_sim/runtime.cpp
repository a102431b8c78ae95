// Runs a kernel's blocks one after the other, each thread of a block as a fiber on a stack of its own.
//
// Compiled without sanitizers: what they should see happens in sim.h. Under ThreadSanitizer each fiber is a thread of its own and
// only barriers order them (lane exchanges do not: on a GPU they order no memory); under AddressSanitizer a block's shared
// memory is a heap block of exactly the size asked for.
#include "runtime.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>


#ifndef __x86_64__
#error "the context switch below is x86-64"
#endif

// void switch_stack(void** save, void* load): saves the callee's registers and the stack pointer, and resumes another stack.
asm(R"(
.text
.global switch_stack
switch_stack:
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
.section .note.GNU-stack,"",@progbits
.text
)");
extern "C" void switch_stack(void** save, void* load);

#ifdef SIM_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);  // flag 1: the switch orders no memory
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void* __tsan_get_current_fiber() { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

#ifdef SIM_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
}
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

namespace sim {

Settings settings;
dim3 block_index, grid_size;

namespace {

constexpr size_t kStackBytes = 512 * 1024;
constexpr size_t kSharedWithoutAttribute = 48 * 1024;

enum class State { kRunnable, kInWarp, kInBlock, kDone };

struct Fiber : Thread {
  State state = State::kDone;
  void* stack_pointer = nullptr;
  void* stack = nullptr;
  void* tsan = nullptr;
  void* asan = nullptr;
  std::vector<std::vector<Copy>> groups;  // the last one is still open
  const char* operation = nullptr;        // the collective it waits in: one literal each
  unsigned mask = 0;
  int64_t collectives = 0;  // it has been through
};

// What the lanes of a warp hand in; the next collective uses the other one, for lanes that have not read this one yet.
struct Exchange {
  const void* rows[32];
  float values[32];
  float a[16][16], b[16][8], c[16][8];
};

struct Warp {
  Exchange exchange[2];
  unsigned arrived = 0;
};

struct Block {
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  int threads = 0;
  char order_token = 0;  // ThreadSanitizer: what the host did before the launch, and the other way round
};

Block block;
Fiber* current = nullptr;
void* host_stack_pointer = nullptr;
void* host_tsan = nullptr;
void* host_asan = nullptr;
const void* host_stack = nullptr;
size_t host_stack_size = 0;
struct {
  const void* kernel;
  void (*call)(const void*, void**);
  void** arguments;
} job;
std::unordered_map<const void*, size_t> allowed_shared;

[[noreturn]] void fail(const char* what, const char* detail = "") {
  const dim3 at = current != nullptr ? current->index : dim3{};
  std::fprintf(stderr, "cuda_sim: %s%s, block (%u, %u, %u), thread %u\n", what, detail, block_index.x, block_index.y,
               block_index.z, at.x);
  std::fflush(nullptr);
  std::_Exit(3);
}

void to_host(State state) {
  Fiber* self = current;
  self->state = state;
  __sanitizer_start_switch_fiber(&self->asan, host_stack, host_stack_size);
  __tsan_switch_to_fiber(host_tsan, 1);
  switch_stack(&self->stack_pointer, host_stack_pointer);
  __sanitizer_finish_switch_fiber(self->asan, nullptr, nullptr);
}

void to_fiber(Fiber* fiber) {
  current = fiber;
  __sanitizer_start_switch_fiber(&host_asan, fiber->stack, kStackBytes);
  __tsan_switch_to_fiber(fiber->tsan, 1);
  switch_stack(&host_stack_pointer, fiber->stack_pointer);
  __sanitizer_finish_switch_fiber(host_asan, nullptr, nullptr);
  current = nullptr;
}

// A fiber lives as long as the process and runs one thread of every block.
void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_size);
  for (;;) {
    __tsan_acquire(&block.order_token);
    job.call(job.kernel, job.arguments);
    for (const auto& group : current->groups) {
      if (!group.empty()) fail("a thread ended with an asynchronous copy under way");
    }
    __tsan_release(&block.order_token);
    to_host(State::kDone);
  }
}

Fiber* make_fiber(int thread) {
  auto* fiber = new Fiber;
  fiber->index = {static_cast<unsigned>(thread), 0, 0};
  fiber->lane = thread % 32;
  fiber->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fiber->stack == MAP_FAILED) fail("no memory for a stack");
  auto* top = reinterpret_cast<void**>(static_cast<char*>(fiber->stack) + kStackBytes);
  top[-2] = reinterpret_cast<void*>(&fiber_main);  // fiber_main sees the stack that a call would leave: 8 below a multiple of 16
  fiber->stack_pointer = top - 8;                  // and six registers
  fiber->tsan = __tsan_create_fiber(0);
  return fiber;
}

bool any(State state) {
  return std::any_of(block.fibers.begin(), block.fibers.begin() + block.threads, [&](Fiber* f) { return f->state == state; });
}

// Resumes the lanes of a warp until each waits for the block or is done.
void run_warp(int warp) {
  for (bool progress = true; progress;) {
    progress = false;
    for (int i = 32 * warp; i < std::min(32 * warp + 32, block.threads); ++i) {
      if (block.fibers[i]->state != State::kRunnable) continue;
      to_fiber(block.fibers[i]);
      progress = true;
    }
  }
  for (int i = 32 * warp; i < std::min(32 * warp + 32, block.threads); ++i) {
    if (block.fibers[i]->state == State::kInWarp) {
      current = block.fibers[i];
      fail("deadlock: lanes are missing in ", current->operation);
    }
  }
}

void run_block(std::mt19937& random) {
  std::vector<int> order((block.threads + 31) / 32);
  std::iota(order.begin(), order.end(), 0);
  if (settings.order == 1) std::reverse(order.begin(), order.end());
  for (int i = 0; i < block.threads; ++i) {
    Fiber& fiber = *block.fibers[i];
    fiber.state = State::kRunnable;
    fiber.groups.assign(1, {});
  }
  __tsan_release(&block.order_token);
  while (any(State::kRunnable)) {
    if (settings.order > 1) std::shuffle(order.begin(), order.end(), random);
    for (int warp : order) run_warp(warp);
    if (!any(State::kInBlock)) break;
    if (any(State::kDone)) fail("a thread ended while others wait in __syncthreads");
    for (int i = 0; i < block.threads; ++i) block.fibers[i]->state = State::kRunnable;
  }
  __tsan_acquire(&block.order_token);
}

// Waits for the lanes of the mask; returns what they exchange in this collective. The last lane to come runs `finish`.
template <class Finish>
Exchange& collective(const char* operation, unsigned mask, Finish finish) {
  Fiber& self = *current;
  Warp& warp = block.warps[self.index.x / 32];
  Exchange& exchange = warp.exchange[self.collectives++ % 2];
  if (!(mask >> self.lane & 1)) fail("a lane is not in the mask of its own ", operation);
  self.operation = operation;
  self.mask = mask;
  warp.arrived |= 1u << self.lane;
  if (warp.arrived != mask) {
    to_host(State::kInWarp);
    return exchange;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Fiber& other = *block.fibers[self.index.x / 32 * 32 + lane];
    if (other.operation != operation) fail("lanes of a warp meet in different operations, one of them ", operation);
    if (other.mask != mask) fail("lanes of a warp name different masks in ", operation);
    other.state = State::kRunnable;
  }
  finish(exchange);
  warp.arrived = 0;
  return exchange;
}

// The name by which nvcc knows a kernel too: both compilers mangle alike.
std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || info.dli_sname == nullptr) fail("a kernel without a symbol");
  return info.dli_sname;
}

void call_translation(const void* kernel, void** arguments) {
  reinterpret_cast<void (*)(void*)>(const_cast<void*>(kernel))(arguments[0]);
}

constexpr auto kNothing = [](Exchange&) {};

Exchange& next_exchange() { return block.warps[current->index.x / 32].exchange[current->collectives % 2]; }

}  // namespace

Thread* self() { return current; }
unsigned char* shared_memory() { return block.shared; }

void block_barrier() {
  __tsan_release(&block.warps);
  to_host(State::kInBlock);
  __tsan_acquire(&block.warps);
}

void warp_barrier(unsigned mask) {
  Warp* warp = &block.warps[current->index.x / 32];
  __tsan_release(warp);
  collective("__syncwarp", mask, kNothing);
  __tsan_acquire(warp);
}

float shuffle(unsigned mask, float value, int source) {
  next_exchange().values[current->lane] = value;
  if (!(mask >> source & 1)) fail("a shuffle reads a lane outside its mask");
  return collective("shuffle", mask, kNothing).values[source];
}

void exchange_rows(const char* operation, const void* row, const void* (&rows)[32]) {
  next_exchange().rows[current->lane] = row;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("a row that is not aligned to 16 bytes in ", operation);
  std::copy_n(collective(operation, ~0u, kNothing).rows, 32, rows);
}

// Element i of a lane's fragments: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
void multiply(float (&c)[4], const float (&fragments)[12]) {
  const int group = current->lane / 4, quad = current->lane % 4;
  Exchange& mine = next_exchange();
  for (int i = 0; i < 8; ++i) mine.a[group + i / 2 % 2 * 8][2 * quad + i % 2 + i / 4 * 8] = fragments[i];
  for (int i = 0; i < 4; ++i) mine.b[2 * quad + i % 2 + i / 2 * 8][group] = fragments[8 + i];
  const Exchange& all = collective("mma", ~0u, [](Exchange& e) {
    for (int row = 0; row < 16; ++row) {
      float sum[8] = {};
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) sum[column] += e.a[row][k] * e.b[k][column];
      std::copy_n(sum, 8, e.c[row]);
    }
  });
  for (int i = 0; i < 4; ++i) c[i] += all.c[group + i / 2 * 8][2 * quad + i % 2];
}

void copy_begin(Copy copy) {
  if (reinterpret_cast<uintptr_t>(copy.destination) % 16 != 0 || reinterpret_cast<uintptr_t>(copy.source) % 16 != 0) {
    fail("cp.async: an address is not aligned to 16 bytes");
  }
  current->groups.back().push_back(copy);
}

void copy_commit() { current->groups.emplace_back(); }

bool copy_next(int pending, Copy& copy) {
  auto& groups = current->groups;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    if (groups.front().empty()) {
      groups.erase(groups.begin());
      continue;
    }
    copy = groups.front().back();
    groups.front().pop_back();
    return true;
  }
  return false;
}

cudaError_t set_shared_memory(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > settings.shared_limit) return cudaErrorInvalidValue;
  allowed_shared[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, void (*call)(const void*, void**), dim3 grid, dim3 threads, void** arguments,
                   size_t shared_bytes) {
  const size_t allowed = std::max(kSharedWithoutAttribute, allowed_shared[kernel]);
  if (shared_bytes > allowed || grid.y > 65535 || grid.z > 65535 || threads.x > 1024) return cudaErrorInvalidValue;
  if (grid.x * grid.y * grid.z == 0) return cudaErrorInvalidValue;
  // A translation of its PTX (ptx.py) that is linked in runs in the kernel's place.
  const std::string name = name_of(kernel);
  const void* translation = dlsym(RTLD_DEFAULT, ("ptx_" + name).c_str());
  if (std::getenv("SIM_TRACE") != nullptr) {
    const char* kind = translation != nullptr ? "ptx" : "c++";
    std::fprintf(stderr, "launch %s %s shared=%zu grid=%u,%u,%u\n", name.c_str(), kind, shared_bytes, grid.x, grid.y, grid.z);
  }
  if (translation != nullptr) {
    job = {translation, call_translation, arguments};
  } else {
    job = {kernel, call, arguments};
  }
  grid_size = grid;
  host_tsan = __tsan_get_current_fiber();
  block.threads = threads.x;
  while (static_cast<int>(block.fibers.size()) < block.threads) block.fibers.push_back(make_fiber(block.fibers.size()));
  std::mt19937 random(settings.order);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        block.warps.assign((block.threads + 31) / 32, {});
        block.shared = static_cast<unsigned char*>(std::malloc(shared_bytes));
        std::fill_n(block.shared, shared_bytes, 0xff);
        run_block(random);
        std::free(block.shared);
      }
  return cudaSuccess;
}

}  // namespace sim
