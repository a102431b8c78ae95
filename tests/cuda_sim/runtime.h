// What the simulator's runtime offers to sim.h: fibers, collectives, asynchronous copies, launches. See runtime.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoDevice = 100 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = void*;

namespace sim {

// What a target allows, and the order in which runnable warps are resumed. Set by the driver before a launch.
struct Settings {
  size_t shared_limit = 163 * 1024;  // bytes a block may ask for: 163 KiB sm_80, 99 KiB sm_86, 227 KiB sm_90 and sm_100
  int multiprocessors = 4;
  int order = 0;  // 0: forward, 1: backward, else: the seed of a shuffle
};
extern Settings settings;

struct Thread {
  dim3 index;
  int lane;
};
Thread* self();
extern dim3 block_index, grid_size;

unsigned char* shared_memory();
void block_barrier();
void warp_barrier(unsigned mask);
// Lane exchange: every lane hands in a value and receives that of lane `source`.
float shuffle(unsigned mask, float value, int source);
// Every lane hands in an address; rows[i] is that of lane i.
void exchange_rows(const char* operation, const void* row, const void* (&rows)[32]);
// c += a b for one m16n8k16 tile, from this lane's fragments: 8 elements of a, 4 of b.
void multiply(float (&c)[4], const float (&fragments)[12]);

struct Copy {
  void* destination;
  const void* source;  // nullptr: zeros
};
void copy_begin(Copy copy);
void copy_commit();
// Takes the next copy of a group older than the latest `pending` ones; false: no more.
bool copy_next(int pending, Copy& copy);

cudaError_t set_shared_memory(const void* kernel, int bytes);
cudaError_t launch(const void* kernel, void (*call)(const void* kernel, void** arguments), dim3 grid, dim3 block,
                   void** arguments, size_t shared_bytes);

template <class Argument>
void call(const void* kernel, void** arguments) {
  reinterpret_cast<void (*)(Argument)>(const_cast<void*>(kernel))(*static_cast<Argument*>(arguments[0]));
}

}  // namespace sim
