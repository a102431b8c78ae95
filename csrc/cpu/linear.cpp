// y = x @ weight.T (+ bias) for few rows: dot products over k, some rows of weight by some rows of x in registers at a time.
//
// The weights are read once, in the dtype they are stored in, and widened in registers; x is widened once a call (pack). The
// lanes of a vector are different k of the same product, so nothing is repacked. One kernel (linear_kernel.h) is compiled for
// each instruction set, and the best that this CPU has is chosen at run time.
#include "../specdec_linear.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "isa.h"

namespace specdec {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kLine = 64;                 // bytes of a line of the cache
constexpr int64_t kOutputs = Linear::kBlock;  // outputs that are computed before they are written to y
constexpr int64_t kRowsOfBlock = 96;          // at most so many rows of x between two writes
constexpr int64_t kCacheForX = 192 * 1024;    // bytes of packed rows that stay in the second-level cache beside the weights

// ---- any CPU -----------------------------------------------------------------------------------------------------------

#define SPECDEC_UNROLL  // a Vec is vectorised as a loop
namespace portable {

constexpr int kLanes = 8;
constexpr int kTileOutputs = 4, kTileRows = 3;

struct Vec {
  float lane[kLanes];
};
struct Quad {
  float lane[4];
};

Vec zero() { return {}; }

float sum(const Vec& v) {
  const float* l = v.lane;
  return ((l[0] + l[1]) + (l[2] + l[3])) + ((l[4] + l[5]) + (l[6] + l[7]));
}
Quad sum4(const Vec& a, const Vec& b, const Vec& c, const Vec& d) { return {{sum(a), sum(b), sum(c), sum(d)}}; }

Quad add(Quad a, const Quad& b) {
  for (int i = 0; i < 4; ++i) a.lane[i] += b.lane[i];
  return a;
}

template <class T>
Quad load4(const T* from) {
  return {{float(from[0]), float(from[1]), float(from[2]), float(from[3])}};
}
template <class T>
void store4(T* to, const Quad& quad) {
  for (int i = 0; i < 4; ++i) to[i] = T(quad.lane[i]);
}

template <class T>
struct Format {
  using Packed = float;
  using Operand = Vec;
  static constexpr int kStep = kLanes, kParts = 1;

  template <int>
  static SPECDEC_INLINE Vec part(const T* from) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = float(from[i]);
    return v;
  }
  static SPECDEC_INLINE Vec load(const float* from) {
    Vec v;
    std::memcpy(v.lane, from, sizeof(v.lane));
    return v;
  }
  static SPECDEC_INLINE void store(float* to, const Vec& v) { std::memcpy(to, v.lane, sizeof(v.lane)); }
  static SPECDEC_INLINE Vec fma(const Vec& a, const Vec& b, Vec c) {
    for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
};

#include "linear_kernel.h"

}  // namespace portable

// Of loops over sums: as arrays that are indexed, the sums would stay in memory.
#undef SPECDEC_UNROLL
#define SPECDEC_UNROLL _Pragma("GCC unroll 16")

#ifdef SPECDEC_X86

// ---- AVX2 + FMA + F16C -------------------------------------------------------------------------------------------------

SPECDEC_TARGET_BEGIN(SPECDEC_AVX2)
namespace avx2 {

constexpr int kLanes = 8;
constexpr int kTileOutputs = 3, kTileRows = 4;  // 12 sums, 3 operands of weight and 1 of x: the 16 registers

using Vec = __m256;
using Quad = __m128;

SPECDEC_INLINE Vec zero() { return _mm256_setzero_ps(); }
SPECDEC_INLINE Quad add(Quad a, Quad b) { return _mm_add_ps(a, b); }

SPECDEC_INLINE Quad sum4(Vec a, Vec b, Vec c, Vec d) {
  const Vec pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

// Nearest, ties to even; a NaN becomes the quiet one.
SPECDEC_INLINE __m128i to_bfloat16(Quad quad) {
  const __m128i bits = _mm_castps_si128(quad), odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i rounded = _mm_srli_epi32(_mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff))), 16);
  const __m128i is_nan = _mm_castps_si128(_mm_cmpunord_ps(quad, quad));
  const __m128i result = _mm_blendv_epi8(rounded, _mm_set1_epi32(0x7fc0), is_nan);
  return _mm_packus_epi32(result, result);
}

SPECDEC_INLINE __m128i load64(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
SPECDEC_INLINE void store64(void* to, __m128i bits) { _mm_storel_epi64(static_cast<__m128i*>(to), bits); }

SPECDEC_INLINE Quad load4(const float* from) { return _mm_loadu_ps(from); }
SPECDEC_INLINE Quad load4(const Half* from) { return _mm_cvtph_ps(load64(from)); }
SPECDEC_INLINE Quad load4(const BFloat16* from) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(load64(from)), 16));
}
SPECDEC_INLINE void store4(float* to, Quad quad) { _mm_storeu_ps(to, quad); }
SPECDEC_INLINE void store4(Half* to, Quad quad) { store64(to, _mm_cvtps_ph(quad, _MM_FROUND_TO_NEAREST_INT)); }
SPECDEC_INLINE void store4(BFloat16* to, Quad quad) { store64(to, to_bfloat16(quad)); }

struct Floats {
  using Packed = float;
  using Operand = Vec;
  static SPECDEC_INLINE Vec load(const float* from) { return _mm256_loadu_ps(from); }
  static SPECDEC_INLINE void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
  static SPECDEC_INLINE Vec fma(Vec a, Vec b, Vec c) {  // in place: of the intrinsic, GCC 12 spills sums
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
    return c;
  }
};

template <class T>
struct Format;

template <>
struct Format<float> : Floats {
  static constexpr int kStep = kLanes, kParts = 1;
  template <int>
  static SPECDEC_INLINE Vec part(const float* from) {
    return _mm256_loadu_ps(from);
  }
};

template <>
struct Format<Half> : Floats {
  static constexpr int kStep = kLanes, kParts = 1;
  template <int>
  static SPECDEC_INLINE Vec part(const Half* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
};

struct Bits {
  char bytes[32];
};
alignas(32) constexpr uint32_t kOddHalves[kLanes] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                     0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};

// 16 elements are one load: the even ones are its low halves, the odd ones its high halves.
template <>
struct Format<BFloat16> : Floats {
  static constexpr int kStep = 2 * kLanes, kParts = 2;
  template <int P>
  static SPECDEC_INLINE Vec part(const BFloat16* from) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_castsi256_ps(P == 0 ? _mm256_slli_epi32(both, 16) : _mm256_slli_epi32(_mm256_srli_epi32(both, 16), 16));
  }
  // One instruction each: read from one element before, the even ones are high halves too, and a mask is all that is needed.
  // A shift would wait for a unit that multiplies. The mask is loaded for each part: kept, it would push a sum out.
  template <int P, int MR>
  static SPECDEC_INLINE void parts(const BFloat16* const (&w)[MR], int64_t k, Vec (&to)[MR]) {
    Vec mask;
    asm volatile("vmovaps %1, %0" : "=x"(mask) : "m"(kOddHalves));
    SPECDEC_UNROLL
    for (int m = 0; m < MR; ++m)
      asm volatile("vandps %1, %2, %0" : "=x"(to[m]) : "m"(*reinterpret_cast<const Bits*>(w[m] + k - (P == 0))), "x"(mask));
  }
};

#include "linear_kernel.h"

}  // namespace avx2
SPECDEC_TARGET_END

// ---- AVX-512 -----------------------------------------------------------------------------------------------------------

SPECDEC_TARGET_BEGIN(SPECDEC_AVX512)
namespace avx512 {

constexpr int kLanes = 16;
constexpr int kTileOutputs = 4, kTileRows = 6;  // 24 sums, 4 operands of weight and 1 of x, of 32 registers

using Vec = __m512;
using Quad = __m128;
using avx2::add;
using avx2::load4;
using avx2::store4;

SPECDEC_INLINE Vec zero() { return _mm512_setzero_ps(); }

SPECDEC_INLINE __m256 fold(Vec v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
SPECDEC_INLINE Quad sum4(Vec a, Vec b, Vec c, Vec d) { return avx2::sum4(fold(a), fold(b), fold(c), fold(d)); }

struct Floats {
  using Packed = float;
  using Operand = Vec;
  static SPECDEC_INLINE Vec load(const float* from) { return _mm512_loadu_ps(from); }
  static SPECDEC_INLINE void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
  static SPECDEC_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
};

template <class T>
struct Format;

template <>
struct Format<float> : Floats {
  static constexpr int kStep = kLanes, kParts = 1;
  template <int>
  static SPECDEC_INLINE Vec part(const float* from) {
    return _mm512_loadu_ps(from);
  }
};

template <>
struct Format<Half> : Floats {
  static constexpr int kStep = kLanes, kParts = 1;
  template <int>
  static SPECDEC_INLINE Vec part(const Half* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
};

template <>
struct Format<BFloat16> : Floats {
  static constexpr int kStep = 2 * kLanes, kParts = 2;
  template <int P>
  static SPECDEC_INLINE Vec part(const BFloat16* from) {
    const __m512i both = _mm512_loadu_si512(from);
    return _mm512_castsi512_ps(P == 0 ? _mm512_slli_epi32(both, 16) : _mm512_and_si512(both, _mm512_set1_epi32(~0xffff)));
  }
};

#include "linear_kernel.h"

}  // namespace avx512
SPECDEC_TARGET_END

// ---- AVX-512 with the dot product of pairs of bfloat16 -----------------------------------------------------------------

SPECDEC_TARGET_BEGIN(SPECDEC_AVX512_BF16)
namespace avx512_bf16 {

using avx512::add;
using avx512::kTileOutputs;
using avx512::kTileRows;
using avx512::load4;
using avx512::Quad;
using avx512::store4;
using avx512::sum4;
using avx512::Vec;
using avx512::zero;

template <class T>
struct Format;

template <>
struct Format<BFloat16> {
  using Packed = BFloat16;
  using Operand = __m512i;
  static constexpr int kStep = 32, kParts = 1;
  template <int>
  static SPECDEC_INLINE __m512i part(const BFloat16* from) {
    return _mm512_loadu_si512(from);
  }
  static SPECDEC_INLINE __m512i load(const BFloat16* from) { return _mm512_loadu_si512(from); }
  static SPECDEC_INLINE void store(BFloat16* to, __m512i bits) { _mm512_storeu_si512(to, bits); }
  static SPECDEC_INLINE Vec fma(__m512i a, __m512i b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};

#include "linear_kernel.h"

}  // namespace avx512_bf16
SPECDEC_TARGET_END

#endif  // SPECDEC_X86

// ---- choice ------------------------------------------------------------------------------------------------------------

const LinearKernel& choose(DType dtype) {
  static const LinearKernel kernels[][3] = SPECDEC_KERNEL_TABLE;
  return kernels[int(isa())][int(dtype)];
}

constexpr std::align_val_t kAlignment{64};

}  // namespace

const char* linear_isa() { return isa_name(); }

Linear::Linear(const LinearArgs& args) : args_(args), kernel_(&choose(args.dtype)) {}

void Linear::Free::operator()(void* memory) const { ::operator delete(memory, kAlignment); }

Linear::Packed Linear::pack() const {
  const int64_t stride = (args_.in_features + kernel_->step - 1) / kernel_->step * kernel_->step;
  Packed packed(::operator new(args_.rows * stride * kernel_->item_size, kAlignment));
  kernel_->pack(args_, packed.get());
  return packed;
}

void Linear::multiply(const Packed& packed, int64_t block_begin, int64_t block_end) const {
  const int64_t out_end = std::min(block_end * kBlock, args_.out_features);
  kernel_->multiply(args_, packed.get(), block_begin * kBlock, out_end);
}

}  // namespace specdec
