// Just enough CUDA for csrc/cuda to compile with g++ and run on a CPU: one fiber a CUDA thread (runtime.cpp).
//
// What is stricter here than on a GPU: shared memory starts as NaN and is as large as the launch asked for; cp.async poisons its
// destination at once and delivers at the wait; every lane of a warp must reach the same collective; warps run in an order
// that the caller chooses; a block that cannot go on is an error. Memory is touched only in this header, so that a sanitizer
// sees each access in the fiber that makes it; runtime.cpp is compiled without.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

#define threadIdx (sim::self()->index)
#define blockIdx (sim::block_index)
#define gridDim (sim::grid_size)

inline void __syncthreads() { sim::block_barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { sim::warp_barrier(mask); }
inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
  return sim::shuffle(mask, value, sim::self()->lane ^ lane_mask);
}
template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }

template <class Argument>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Argument), cudaFuncAttribute, int bytes) {
  return sim::set_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
}
template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return sim::launch(reinterpret_cast<const void*>(kernel), sim::call<Argument>, grid, block, arguments, shared);
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = sim::settings.multiprocessors, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** memory, size_t bytes) { return *memory = std::malloc(bytes), cudaSuccess; }
inline cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

// --- the primitives of csrc/cuda/device.cuh ---------------------------------------------------------------------------------

namespace specdec {

inline unsigned char* dynamic_shared() { return sim::shared_memory(); }

inline void cp_async(void* shared, const void* global, bool valid) {
  std::memset(shared, 0xff, 16);
  sim::copy_begin({shared, valid ? global : nullptr});
}
inline void cp_async_commit() { sim::copy_commit(); }
template <int kPending>
void cp_async_wait() {
  for (sim::Copy copy; sim::copy_next(kPending, copy);) {
    copy.source != nullptr ? std::memcpy(copy.destination, copy.source, 16) : std::memset(copy.destination, 0, 16);
  }
}

// Register m of a lane: elements 2 * (lane % 4) and the next of row lane / 4 of matrix m; transposed: of its column.
inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  const void* rows[32];
  sim::exchange_rows("ldmatrix", row, rows);
  const int lane = sim::self()->lane;
  for (int m = 0; m < 4; ++m) std::memcpy(&r[m], static_cast<const uint32_t*>(rows[8 * m + lane / 4]) + lane % 4, 4);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  const void* rows[32];
  sim::exchange_rows("ldmatrix.trans", row, rows);
  const int lane = sim::self()->lane;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) pair[e] = static_cast<const uint16_t*>(rows[8 * m + lane % 4 * 2 + e])[lane / 4];
    std::memcpy(&r[m], pair, 4);
  }
}

inline float decode(Half, uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
  if (rest >= 0x7c00u << 13) return std::bit_cast<float>(sign | 0x70000000u | rest);  // infinity or NaN
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(rest) * 0x1p112f));
}
inline float decode(BFloat16, uint32_t bits) { return std::bit_cast<float>(bits << 16); }

template <class T>
void mma(T type, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t registers[6] = {a[0], a[1], a[2], a[3], b0, b1};
  float values[12];
  for (int i = 0; i < 12; ++i) values[i] = decode(type, registers[i / 2] >> (i % 2 * 16) & 0xffff);
  sim::multiply(c, values);
}

// Round to nearest, ties to even.
inline uint32_t encode(Half, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7fff;
  if (rest >= 0x477ff000) return sign | 0x7c00;
  if (rest < 0x38800000) return sign | static_cast<uint32_t>(std::nearbyint(std::fabs(x) * 0x1p24f));  // subnormal
  return sign | ((rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}
inline uint32_t encode(BFloat16, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <class T>
uint32_t pack(T type, float low, float high) {
  return encode(type, high) << 16 | encode(type, low);
}

inline float fast_exp2(float x) { return x < -126 ? 0 : std::exp2(x); }

}  // namespace specdec
