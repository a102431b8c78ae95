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
#include <utility>

#include "isa.h"

namespace specdec {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kLine = 64;                 // bytes of a line of the cache
constexpr int64_t kOutputs = Linear::kBlock;  // outputs that are computed before they are written to y
constexpr int64_t kRowsOfBlock = 96;          // at most so many rows of x between two writes
constexpr int64_t kRowStride = 100;           // of the block in memory: a tile may write four rows where it has three
constexpr int64_t kCacheForX = 192 * 1024;    // bytes of packed rows that stay in the second-level cache beside the weights

// What a tile fetches into the cache meanwhile: its share of the weights of the next tile, which follow its own.
struct Ahead {
  const char* from;
  int64_t bytes_a_step;
};

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
void transpose(Quad (&quads)[4]) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) std::swap(quads[i].lane[j], quads[j].lane[i]);
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
SPECDEC_INLINE void transpose(Quad (&quads)[4]) { _MM_TRANSPOSE4_PS(quads[0], quads[1], quads[2], quads[3]); }

// What _mm256_hadd_ps(a, b) does, in fewer operations.
SPECDEC_INLINE Vec sum_pairs(Vec a, Vec b) { return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd)); }

SPECDEC_INLINE Quad sum4(Vec a, Vec b, Vec c, Vec d) {
  const Vec pairs = sum_pairs(sum_pairs(a, b), sum_pairs(c, d));
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

// A tile of many rows in bfloat16 is written in assembly: GCC moves, spills and reloads registers in each round, and where another
// program has the core's other thread, a product costs what is issued and loaded around it. Addresses: [w0] .. rows of weight, [x0]
// .. rows of x, [i] bytes of weight that are done. A round is 32 elements, twice 16: the even ones are the low halves of one load and
// shifted up, the odd ones its high halves and masked. Registers: sums from 0 on, 15 a row of x, 12 to 14 even weights and before
// them the load; in 3x4, where no register is left, it is loaded again, and the mask too.
#define SPECDEC_FMA(w, sum) "vfmadd231ps %%ymm" #w ", %%ymm15, %%ymm" #sum "\n\t"
#define SPECDEC_X(n, at) "vmovaps " #at "(%[x" #n "],%[i],2), %%ymm15\n\t"
#define SPECDEC_ROW2(n, at, w0, w1, s0, s1) SPECDEC_X(n, at) SPECDEC_FMA(w0, s0) SPECDEC_FMA(w1, s1)
#define SPECDEC_ROW3(n, at, w0, w1, w2, s0, s1, s2) SPECDEC_ROW2(n, at, w0, w1, s0, s1) SPECDEC_FMA(w2, s2)
#define SPECDEC_MASK "vmovaps %[mask], %%ymm14\n\t"
#define SPECDEC_LOAD(m, at, to) "vmovups " #at "(%[w" #m "],%[i]), %%ymm" #to "\n\t"
#define SPECDEC_LOAD_ODD(m, at, to) "vandps " #at "(%[w" #m "],%[i]), %%ymm14, %%ymm" #to "\n\t"
#define SPECDEC_EVEN(load, to) "vpslld $16, %%ymm" #load ", %%ymm" #to "\n\t"
#define SPECDEC_ODD(mask, load) "vandps " mask ", %%ymm" #load ", %%ymm" #load "\n\t"

// 16 elements of every row: from byte `w` of weight and `x` of x on; `x1` is x + 32.
#define SPECDEC_4_ROWS_OF_2(x, w0, w1) SPECDEC_ROW2(0, x, w0, w1, 0, 1) SPECDEC_ROW2(1, x, w0, w1, 2, 3) \
  SPECDEC_ROW2(2, x, w0, w1, 4, 5) SPECDEC_ROW2(3, x, w0, w1, 6, 7)
#define SPECDEC_5_ROWS_OF_2(x, w0, w1) SPECDEC_4_ROWS_OF_2(x, w0, w1) SPECDEC_ROW2(4, x, w0, w1, 8, 9)
#define SPECDEC_2X(ROWS, w, x, x1) SPECDEC_LOAD(0, w, 10) SPECDEC_LOAD(1, w, 11) SPECDEC_EVEN(10, 12) SPECDEC_EVEN(11, 13) \
  ROWS(x, 12, 13) SPECDEC_ODD("%%ymm14", 10) SPECDEC_ODD("%%ymm14", 11) ROWS(x1, 10, 11)
#define SPECDEC_2X4(w, x, x1) SPECDEC_2X(SPECDEC_4_ROWS_OF_2, w, x, x1)
#define SPECDEC_2X5(w, x, x1) SPECDEC_2X(SPECDEC_5_ROWS_OF_2, w, x, x1)

#define SPECDEC_3_ROWS_OF_3(x, w0, w1, w2) SPECDEC_ROW3(0, x, w0, w1, w2, 0, 1, 2) SPECDEC_ROW3(1, x, w0, w1, w2, 3, 4, 5) \
  SPECDEC_ROW3(2, x, w0, w1, w2, 6, 7, 8)
#define SPECDEC_3X3(w, x, x1) SPECDEC_LOAD(0, w, 9) SPECDEC_LOAD(1, w, 10) SPECDEC_LOAD(2, w, 11) \
  SPECDEC_EVEN(9, 12) SPECDEC_EVEN(10, 13) SPECDEC_EVEN(11, 14) SPECDEC_3_ROWS_OF_3(x, 12, 13, 14) \
  SPECDEC_ODD("%[mask]", 9) SPECDEC_ODD("%[mask]", 10) SPECDEC_ODD("%[mask]", 11) SPECDEC_3_ROWS_OF_3(x1, 9, 10, 11)

#define SPECDEC_4_ROWS_OF_3(x) SPECDEC_3_ROWS_OF_3(x, 12, 13, 14) SPECDEC_ROW3(3, x, 12, 13, 14, 9, 10, 11)
#define SPECDEC_3X4(w, x, x1) SPECDEC_LOAD(0, w, 12) SPECDEC_LOAD(1, w, 13) SPECDEC_LOAD(2, w, 14) \
  SPECDEC_EVEN(12, 12) SPECDEC_EVEN(13, 13) SPECDEC_EVEN(14, 14) SPECDEC_4_ROWS_OF_3(x) SPECDEC_MASK \
  SPECDEC_LOAD_ODD(0, w, 12) SPECDEC_LOAD_ODD(1, w, 13) SPECDEC_LOAD_ODD(2, w, 14) SPECDEC_4_ROWS_OF_3(x1)

// The sums over the lanes of four registers, as sum4; then to y, which has a row of kRowStride for each output.
#define SPECDEC_PAIRS(s0, s1, to) "vshufps $0x88, %%ymm" #s1 ", %%ymm" #s0 ", %%ymm15\n\t" \
  "vshufps $0xdd, %%ymm" #s1 ", %%ymm" #s0 ", %%ymm" #to "\n\t" "vaddps %%ymm" #to ", %%ymm15, %%ymm" #to "\n\t"
#define SPECDEC_SUM4(s0, s1, s2, s3) SPECDEC_PAIRS(s0, s1, 12) SPECDEC_PAIRS(s2, s3, 13) SPECDEC_PAIRS(12, 13, 12) \
  "vextractf128 $1, %%ymm12, %%xmm13\n\t" "vaddps %%xmm13, %%xmm12, %%xmm12\n\t"
#define SPECDEC_PUT(move, m, n) move "%%xmm12, 400*" #m "+4*" #n "(%[y])\n\t"
#define SPECDEC_4_ROWS_SUM(m, s0, s1, s2, s3) SPECDEC_SUM4(s0, s1, s2, s3) SPECDEC_PUT("vmovups ", m, 0)
// Three rows are written as four: what follows is another group's, whose turn comes later, or nobody's.
#define SPECDEC_SUM_3X3 SPECDEC_4_ROWS_SUM(0, 0, 3, 6, 6) SPECDEC_4_ROWS_SUM(1, 1, 4, 7, 7) SPECDEC_4_ROWS_SUM(2, 2, 5, 8, 8)
#define SPECDEC_SUM_3X4 SPECDEC_4_ROWS_SUM(0, 0, 3, 6, 9) SPECDEC_4_ROWS_SUM(1, 1, 4, 7, 10) SPECDEC_4_ROWS_SUM(2, 2, 5, 8, 11)
#define SPECDEC_SUM_2X4 SPECDEC_4_ROWS_SUM(0, 0, 2, 4, 6) SPECDEC_4_ROWS_SUM(1, 1, 3, 5, 7)
#define SPECDEC_SUM_2X5 SPECDEC_SUM_2X4 SPECDEC_SUM4(8, 9, 8, 9) SPECDEC_PUT("vmovss ", 0, 4) SPECDEC_PUT("vextractps $1, ", 1, 4)

#define SPECDEC_CLEAR(s) "vxorps %%xmm" #s ", %%xmm" #s ", %%xmm" #s "\n\t"
#define SPECDEC_CLEAR_8 SPECDEC_CLEAR(0) SPECDEC_CLEAR(1) SPECDEC_CLEAR(2) SPECDEC_CLEAR(3) \
  SPECDEC_CLEAR(4) SPECDEC_CLEAR(5) SPECDEC_CLEAR(6) SPECDEC_CLEAR(7)
#define SPECDEC_CLEAR_9 SPECDEC_CLEAR_8 SPECDEC_CLEAR(8)
#define SPECDEC_CLEAR_10 SPECDEC_CLEAR_9 SPECDEC_CLEAR(9)
#define SPECDEC_CLEAR_12 SPECDEC_CLEAR_10 SPECDEC_CLEAR(10) SPECDEC_CLEAR(11)
#define SPECDEC_PREFETCH(at) "prefetcht0 " #at "(%[ahead])\n\t"
#define SPECDEC_2_LINES SPECDEC_PREFETCH(0) SPECDEC_PREFETCH(64)
#define SPECDEC_3_LINES SPECDEC_2_LINES SPECDEC_PREFETCH(128)
// Reads each row's first line by an instruction of its own. Without it weights come later from memory (Zen 3: a tenth of the time of
// few rows): the CPU's prefetcher seems to follow an instruction whose address grows by one and the same step from tile to tile.
#define SPECDEC_TOUCH(m) "vmovups (%[w" #m "]), %%ymm12\n\t"
#define SPECDEC_TOUCH_2 SPECDEC_TOUCH(0) SPECDEC_TOUCH(1)
#define SPECDEC_TOUCH_3 SPECDEC_TOUCH_2 SPECDEC_TOUCH(2)
#define SPECDEC_3_X [x0] "r"(x), [x1] "r"(x + x_stride), [x2] "r"(x + 2 * x_stride)
#define SPECDEC_4_X SPECDEC_3_X, [x3] "r"(x + 3 * x_stride)
#define SPECDEC_5_X SPECDEC_4_X, [x4] "r"(x + 4 * x_stride)
#define SPECDEC_2_W [w0] "r"(w[0]), [w1] "r"(w[1])
#define SPECDEC_3_W SPECDEC_2_W, [w2] "r"(w[2])
#define SPECDEC_TILE(MR, NR, SUMS) \
  asm volatile(SPECDEC_TOUCH_##MR SPECDEC_CLEAR_##SUMS SPECDEC_MASK ".p2align 5\n1:\n\t" \
               SPECDEC_##MR##_LINES "add %[share], %[ahead]\n\t" \
               SPECDEC_##MR##X##NR(0, 0, 32) SPECDEC_##MR##X##NR(32, 64, 96) \
               "add $64, %[i]\n\t" "cmp %[end], %[i]\n\t" "jl 1b\n\t" SPECDEC_SUM_##MR##X##NR "vzeroupper\n\t" \
               : [i] "+r"(i), [ahead] "+r"(ahead.from) \
               : SPECDEC_##MR##_W, SPECDEC_##NR##_X, [end] "r"(end), [share] "rm"(share), [y] "r"(y), \
                 [mask] "m"(kOddHalves) \
               : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
                 "xmm12", "xmm13", "xmm14", "xmm15")

// 16 elements are one load: the even ones are its low halves, the odd ones its high halves.
template <>
struct Format<BFloat16> : Floats {
  static constexpr int kStep = 2 * kLanes, kParts = 2, kTileStep = 2 * kStep;
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
  template <int MR, int NR>
    requires((MR == 3 && (NR == 3 || NR == 4)) || (MR == 2 && (NR == 4 || NR == 5)))
  static SPECDEC_INLINE void tile(const BFloat16* const (&w)[MR], const float* x, int64_t x_stride, int64_t in_features, float* y,
                                  Ahead ahead) {
    static_assert(kRowStride * sizeof(float) == 400 && kRowStride >= kRowsOfBlock + 1);
    int64_t i = 0;
    const int64_t end = in_features * sizeof(BFloat16), share = ahead.bytes_a_step * (kTileStep / kStep);
    if constexpr (MR == 3 && NR == 3) SPECDEC_TILE(3, 3, 9);
    if constexpr (MR == 3 && NR == 4) SPECDEC_TILE(3, 4, 12);
    if constexpr (MR == 2 && NR == 4) SPECDEC_TILE(2, 4, 8);
    if constexpr (MR == 2 && NR == 5) SPECDEC_TILE(2, 5, 10);
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
using avx2::transpose;

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
using avx512::transpose;
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
