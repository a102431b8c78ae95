// Instruction sets: the macros by which a kernel is compiled for each of them in one file, and which one this CPU gets.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__)
#define SPECDEC_X86
#include <immintrin.h>
#endif

#define SPECDEC_INLINE inline __attribute__((always_inline))
// A tile is a function of its own: inlined beside others, its sums no longer get all the registers.
#define SPECDEC_NOINLINE __attribute__((noinline))

#define SPECDEC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SPECDEC_TARGET_BEGIN(isa) SPECDEC_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define SPECDEC_TARGET_END _Pragma("clang attribute pop")
#else
#define SPECDEC_TARGET_BEGIN(isa) _Pragma("GCC push_options") SPECDEC_PRAGMA(GCC target(isa))
#define SPECDEC_TARGET_END _Pragma("GCC pop_options")
#endif

#define SPECDEC_AVX2 "avx2,fma,f16c"
#define SPECDEC_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#define SPECDEC_AVX512_BF16 "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"

// Initialises a table [Isa][dtype] with kernel<T>() of each instruction set's namespace, for float, Half and BFloat16. Only
// bfloat16 has instructions of its own in the last set.
#define SPECDEC_KERNELS_OF(isa) {isa::kernel<float>(), isa::kernel<Half>(), isa::kernel<BFloat16>()}
#ifdef SPECDEC_X86
#define SPECDEC_KERNEL_TABLE                                                                       \
  {SPECDEC_KERNELS_OF(portable), SPECDEC_KERNELS_OF(avx2), SPECDEC_KERNELS_OF(avx512),             \
   {avx512::kernel<float>(), avx512::kernel<Half>(), avx512_bf16::kernel<BFloat16>()}}
#else
#define SPECDEC_KERNEL_TABLE {SPECDEC_KERNELS_OF(portable)}
#endif

namespace specdec {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

inline Isa best_isa() {
#ifdef SPECDEC_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kPortable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq"))
    return Isa::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kPortable;
#endif
}

// The best that the CPU has, or the smaller one that SPECDEC_CPU_ISA, read at first use, asks for.
inline Isa isa() {
  static const Isa chosen = [] {
    const char* wanted = std::getenv("SPECDEC_CPU_ISA");
    if (wanted == nullptr) return best_isa();
    const auto* found = std::find(std::begin(kIsaNames), std::end(kIsaNames), std::string_view(wanted));
    return found == std::end(kIsaNames) ? Isa::kPortable : std::min(best_isa(), Isa(found - std::begin(kIsaNames)));
  }();
  return chosen;
}

inline const char* isa_name() { return kIsaNames[int(isa())]; }

}  // namespace specdec
