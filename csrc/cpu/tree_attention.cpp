// Tree attention on a CPU: flash attention over blocks of 64 positions, in fp32, on the cache as it lies.
//
// The query heads that share a KV head, times the nodes, are the rows of one matrix: a key or value is read from the cache
// once for all of them, widened (bf16, fp16) on its way into a block that stays in the second-level cache. One kernel
// (tree_attention_kernel.h) is compiled for each instruction set, and the best that this CPU has is chosen at run time.
//
// Guarantee: the result of a (node, head) is a function of its query and of the keys and values that it sees, in the order
// of their positions: the same bits whatever the other rows of the batch, the other nodes, N, the number of threads, the
// strides, and whether a token that it sees is a node of the tree or committed to the prefix. A tree's nodes therefore get,
// bit for bit, what decoding their paths token by token would give. (Under one instruction set; where depths are what the
// mask says, and values are finite.) It holds because
//   - a score is one chain of operations over d;
//   - positions, not slots, are cut into blocks and splits, at fixed places: a tree node belongs to the block of its depth;
//   - in a block the largest score and the sum of the weights (integers) do not depend on the keys' order, and the weighted
//     values are one chain of operations in which a key that is not seen has weight 0 and changes nothing;
//   - blocks are added to their split, and splits to the total, in ascending order; an empty one changes nothing.
#include "../tree_attention.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "isa.h"

namespace specdec {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kLine = 64;           // bytes of a line of the cache
constexpr int64_t kBlock = 64;          // positions whose scores are computed together
constexpr int64_t kPanel = 16;          // columns that lie together in a packed matrix
constexpr int64_t kMaxKeys = 320;       // of a block: up to 63 of the prefix and SPECDEC_MAX_NODES nodes, padded to kPanel
constexpr int64_t kWords = kMaxKeys / 64;
constexpr int64_t kNodeWords = SPECDEC_MAX_NODES / 64;
constexpr int64_t kChain = 128;          // of d, at most, in one of the two sums that a score has: for accuracy
constexpr int64_t kRowElements = 24576;  // of the queries of a unit: they, the sums and a block stay in the second-level cache
constexpr int64_t kFewRows = 4;          // a tile of more rows is not interrupted: that costs it 5 %
constexpr int64_t kFetchSteps = 32;      // steps after which other tiles fetch a part of the next block
constexpr int64_t kPackWork = 2;         // packing 8 keys, in the units of Fetch::beside
constexpr int64_t kMaxPartials = 1 << 25;  // floats; a call that would keep more does not cut the positions
constexpr double kThreadWork = 3e5;        // products that are worth waking a thread for
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Scores are kept in units of ln 2: score * factor, or tanh(score * factor) * cap.
struct Scale {
  float factor, cap;
};

// Rows that share a KV head of one batch row: row r is node r / group, head r % group of the KV head's.
struct Unit {
  const TreeAttentionParams* params;
  Scale scale;
  int64_t batch, kv_head, group;
  int64_t first_row, rows;
  int64_t prefix, nodes;
  int64_t dim;
  const void *keys, *values;  // slot 0
  int64_t key_stride, value_stride;
  int64_t first_split, splits, first_item;
  int32_t pending;  // items that are not done
};

// The keys at positions [64 i, 64 i + 64): the last `committed` slots of the prefix and the nodes of these depths, which lie
// among the slots [slot, slot + keys).
struct Block {
  int64_t slot, keys, committed, first_node;
  uint64_t members[kNodeWords];  // nodes at these positions
};

// Softmax over some of the keys: the largest score [rows], the sum of the weights [rows] and of the weighted values [rows, dim].
struct Partial {
  float *maxima, *sums, *output;
};

struct Rows {
  const char* from;
  int64_t stride;  // bytes
};

// Fetches a block's keys and values into the second-level cache, some rows at a time beside the work on the block before it: all
// at once they would fill the queue of misses, and memory would idle for the rest of the block. (1.1 to 1.5 times as fast from
// memory, bench/attention.py; 0.95 times where few rows meet keys that are in the cache already.)
class Fetch {
 public:
  // The block at `slot`; `work`: the sum of what beside() will be told.
  Fetch(const Rows& keys, const Rows& values, int64_t slot, int64_t row_bytes, int64_t work)
      : keys_{keys.from + slot * keys.stride, keys.stride},
        values_{values.from + slot * values.stride, values.stride},
        row_bytes_(row_bytes),
        rate_((kBlock << kFraction) / work + 1) {}

  // To be called after every `work` units of work: the rows that are due by then.
  SPECDEC_INLINE void beside(int64_t work) {
    due_ += work * rate_;
    for (; done_ < due_ >> kFraction; ++done_, keys_.from += keys_.stride, values_.from += values_.stride)
      for (int64_t byte = 0; byte < row_bytes_; byte += kLine) {
        __builtin_prefetch(keys_.from + byte, 0, 2);
        __builtin_prefetch(values_.from + byte, 0, 2);
      }
  }

 private:
  static constexpr int kFraction = 20;
  Rows keys_, values_;
  int64_t row_bytes_, rate_, due_ = 0, done_ = 0;  // rate_ and due_ in rows << kFraction
};

struct Scratch {
  float *queries, *keys, *values;
};

// The functions of one instruction set and one dtype.
struct Kernel {
  void (*pack_queries)(const Unit& unit, float* packed);
  void (*attend_split)(const Unit& unit, int64_t split, const Scratch& scratch, const Partial& sum);
  void (*merge)(const Unit& unit, const Partial& part, const Partial& sum);
  void (*finish)(const Unit& unit, const Partial& sum);
};

// First position of a split: 0, 256, 512, 1024, 2048, 3072, ... Short ones give few keys to several threads.
constexpr int64_t split_begin(int64_t split) { return split <= 2 ? 256 * split : 1024 * (split - 2); }
constexpr int64_t split_of(int64_t position) { return position < 1024 ? (position >= 256) + (position >= 512) : position / 1024 + 2; }

int64_t node_of(const Unit& unit, int64_t row) { return (unit.first_row + row) / unit.group; }
int64_t head_of(const Unit& unit, int64_t row) { return unit.kv_head * unit.group + (unit.first_row + row) % unit.group; }

const int32_t* depths_of(const Unit& unit) { return unit.params->depths + unit.batch * unit.params->nodes; }

const void* query_of(const Unit& unit, int64_t row, int64_t item_size) {
  const int64_t* strides = unit.params->query_strides;
  const int64_t offset = unit.batch * strides[0] + head_of(unit, row) * strides[1] + node_of(unit, row) * strides[2];
  return static_cast<const char*>(unit.params->query) + offset * item_size;
}

int64_t output_row(const Unit& unit, int64_t row) {
  const TreeAttentionParams& params = *unit.params;
  return (unit.batch * params.nodes + node_of(unit, row)) * params.query_heads + head_of(unit, row);
}

Block make_block(const Unit& unit, int64_t index) {
  const int64_t begin = index * kBlock, end = begin + kBlock;
  Block block = {.slot = begin, .committed = std::clamp<int64_t>(unit.prefix - begin, 0, kBlock)};
  block.keys = block.committed;
  if (end <= unit.prefix) return block;
  const int32_t* depths = depths_of(unit);
  int64_t first = -1, last = -1;
  for (int64_t node = 0; node < unit.nodes; ++node) {
    const int64_t position = unit.prefix + depths[node];
    if (position < begin || position >= end) continue;
    block.members[node / 64] |= uint64_t{1} << (node % 64);
    if (first < 0) first = node;
    last = node;
  }
  if (first < 0) return block;
  block.first_node = block.committed > 0 ? 0 : first;
  block.slot = unit.prefix - block.committed + block.first_node;
  block.keys = block.committed + last + 1 - block.first_node;
  return block;
}

void set_bits(uint64_t* words, int64_t begin, int64_t end) {
  for (int64_t bit = begin; bit < end;) {
    const int64_t size = std::min(end - bit, 64 - bit % 64);
    words[bit / 64] |= (size == 64 ? ~uint64_t{0} : (uint64_t{1} << size) - 1) << (bit % 64);
    bit += size;
  }
}

// Which of the block's keys the row sees: `words`, or those of the row before where it is of the same node, or nullptr for
// every one of a whole block. Returns whether it sees any.
bool visible_keys(const Unit& unit, const Block& block, int64_t row, const uint64_t* before, uint64_t* words,
                  const uint64_t*& visible) {
  const int64_t node = node_of(unit, row), window = unit.params->window;
  const int64_t depth = depths_of(unit)[node];
  const int64_t low = window > 0 ? std::max<int64_t>(0, unit.prefix + depth - window + 1 - block.slot) : 0;
  visible = nullptr;
  if (block.committed == kBlock && low == 0) return true;
  visible = words;
  if (before != nullptr && node == node_of(unit, row - 1)) {
    std::memcpy(words, before, kWords * sizeof(uint64_t));
  } else {
    std::memset(words, 0, kWords * sizeof(uint64_t));
    set_bits(words, low, block.committed);
    const int64_t mask_words = (unit.params->nodes + 31) / 32;
    const int32_t* mask = unit.params->ancestor_mask + (unit.batch * unit.params->nodes + node) * mask_words;
    for (int64_t word = 0; word < mask_words; ++word) {
      uint32_t seen = uint32_t(mask[word]) & uint32_t(block.members[word / 2] >> (word % 2 * 32));
      for (; seen != 0; seen &= seen - 1) {
        const int64_t key = word * 32 + __builtin_ctz(seen), bit = block.committed + key - block.first_node;
        if (window == 0 || depth - depths_of(unit)[key] < window) words[bit / 64] |= uint64_t{1} << (bit % 64);
      }
    }
  }
  return std::any_of(words, words + kWords, [](uint64_t word) { return word != 0; });
}

// ---- any CPU -----------------------------------------------------------------------------------------------------------

namespace portable {

constexpr int kLanes = 8;
constexpr int kMaxRows = 3, kMaxSums = 6;
template <class T>
constexpr bool kPairs = false;

using Vec = float __attribute__((vector_size(32)));
using Count = uint32_t __attribute__((vector_size(32)));

SPECDEC_INLINE Vec set1(float x) { return Vec{x, x, x, x, x, x, x, x}; }
SPECDEC_INLINE void keep(Vec&) {}
SPECDEC_INLINE Vec add(Vec a, Vec b) { return a + b; }
SPECDEC_INLINE Vec sub(Vec a, Vec b) { return a - b; }
SPECDEC_INLINE Vec mul(Vec a, Vec b) { return a * b; }
SPECDEC_INLINE Vec div(Vec a, Vec b) { return a / b; }
SPECDEC_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
SPECDEC_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
SPECDEC_INLINE Vec at_least(Vec x, Vec low, Vec y) { return x < low ? set1(0.0f) : y; }
SPECDEC_INLINE Vec multiply_pairs(Vec, Vec, Vec c) { return c; }

SPECDEC_INLINE Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
SPECDEC_INLINE void store(float* to, Vec x) { std::memcpy(to, &x, sizeof(x)); }
template <class T>
SPECDEC_INLINE Vec load(const T* from) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = float(from[i]);
  return x;
}
template <class T>
SPECDEC_INLINE void store(T* to, Vec x) {
  for (int i = 0; i < kLanes; ++i) to[i] = T(x[i]);
}

SPECDEC_INLINE Vec select(uint64_t bits, Vec a, Vec b) {
  for (int i = 0; i < kLanes; ++i) b[i] = bits >> i & 1 ? a[i] : b[i];
  return b;
}
SPECDEC_INLINE Vec scale_exponent(Vec x, Vec n) { return Vec(Count(x) + (Count(n) << 23)); }
SPECDEC_INLINE float highest(Vec x) {
  float top = x[0];
  for (int i = 1; i < kLanes; ++i) top = x[i] > top ? x[i] : top;
  return top;
}
SPECDEC_INLINE Count no_count() { return Count{}; }
SPECDEC_INLINE Count count(Count sum, Vec x) { return sum + Count(x); }
SPECDEC_INLINE uint32_t total(Count sum) {
  uint32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all += sum[i];
  return all;
}

template <class T>
void pack_keys(const T* keys, int64_t stride, int64_t count, int64_t dim, float* panels, Fetch&) {
  for (int64_t first = 0; first < count; first += kPanel, panels += dim * kPanel)
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t i = 0; i < kPanel; ++i) panels[d * kPanel + i] = float(keys[std::min(first + i, count - 1) * stride + d]);
}

#include "tree_attention_kernel.h"

}  // namespace portable

#ifdef SPECDEC_X86

// ---- AVX2 + FMA + F16C -------------------------------------------------------------------------------------------------

SPECDEC_TARGET_BEGIN(SPECDEC_AVX2)
namespace avx2 {

constexpr int kLanes = 8;
constexpr int kMaxRows = 6, kMaxSums = 12;  // 12 sums, 3 operands and 1 more: the 16 registers
template <class T>
constexpr bool kPairs = false;

using Vec = __m256;
using Count = __m256i;

SPECDEC_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
// Keeps v in a register here: the compiler neither folds its load into each use nor moves it.
SPECDEC_INLINE void keep(Vec& v) { asm volatile("" : "+x"(v)); }
SPECDEC_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
SPECDEC_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
SPECDEC_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
SPECDEC_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
SPECDEC_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
SPECDEC_INLINE Vec fma(Vec a, Vec b, Vec c) {  // in place: of the intrinsic, GCC 12 spills sums
  asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
  return c;
}
SPECDEC_INLINE Vec multiply_pairs(Vec, Vec, Vec c) { return c; }
SPECDEC_INLINE Vec at_least(Vec x, Vec low, Vec y) { return _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_NLT_UQ), y); }

SPECDEC_INLINE Vec load(const float* from) { return _mm256_loadu_ps(from); }
SPECDEC_INLINE Vec load(const Half* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
SPECDEC_INLINE Vec load(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

SPECDEC_INLINE void store(float* to, Vec x) { _mm256_storeu_ps(to, x); }
SPECDEC_INLINE void store(Half* to, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// Nearest, ties to even; a NaN becomes the quiet one.
SPECDEC_INLINE void store(BFloat16* to, Vec x) {
  const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
}

SPECDEC_INLINE Vec select(uint64_t bits, Vec a, Vec b) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i hidden = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), bit), _mm256_setzero_si256());
  return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(hidden));
}
SPECDEC_INLINE Vec scale_exponent(Vec x, Vec n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}
SPECDEC_INLINE float highest(Vec x) {
  __m128 top = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  return _mm_cvtss_f32(_mm_max_ss(top, _mm_shuffle_ps(top, top, 1)));
}
SPECDEC_INLINE Count no_count() { return _mm256_setzero_si256(); }
SPECDEC_INLINE Count count(Count sum, Vec x) { return _mm256_add_epi32(sum, _mm256_castps_si256(x)); }
SPECDEC_INLINE uint32_t total(Count sum) {
  __m128i all = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  all = _mm_add_epi32(all, _mm_shuffle_epi32(all, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_add_epi32(all, _mm_shuffle_epi32(all, 0xb1))));
}

SPECDEC_INLINE void transpose(__m256 (&x)[8]) {
  __m256 a[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  __m256 b[8];
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

// 8 keys of 32-bit items, or of 16-bit ones taken in pairs: item d of key i becomes panels[d * kPanel + i].
template <class T>
SPECDEC_INLINE void transpose_items(const T* const (&keys)[8], int64_t d, __m256 (&x)[8]) {
  for (int i = 0; i < 8; ++i) x[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(keys[i] + d));
  transpose(x);
}

SPECDEC_INLINE void pack_eight(const float* const (&keys)[8], int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; d += 8) {
    __m256 x[8];
    transpose_items(keys, d, x);
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + (d + i) * kPanel, x[i]);
  }
}
SPECDEC_INLINE void pack_eight(const Half* const (&keys)[8], int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; d += 8) {
    __m256 x[8];
    for (int i = 0; i < 8; ++i) x[i] = load(keys[i] + d);
    transpose(x);
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + (d + i) * kPanel, x[i]);
  }
}
SPECDEC_INLINE void pack_eight(const BFloat16* const (&keys)[8], int64_t dim, float* to) {
  const __m256 high = _mm256_castsi256_ps(_mm256_set1_epi32(~0xffff));
  for (int64_t d = 0; d < dim; d += 16) {
    __m256 x[8];
    transpose_items(keys, d, x);
    for (int i = 0; i < 8; ++i) {
      _mm256_storeu_ps(to + (d + 2 * i) * kPanel, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x[i]), 16)));
      _mm256_storeu_ps(to + (d + 2 * i + 1) * kPanel, _mm256_and_ps(x[i], high));
    }
  }
}
SPECDEC_INLINE void pack_eight_pairs(const BFloat16* const (&keys)[8], int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; d += 16) {
    __m256 x[8];
    transpose_items(keys, d, x);
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + (d / 2 + i) * kPanel, x[i]);
  }
}

// Panels [dim or pairs of it][kPanel]; behind the last key, that key again. 
template <class T, bool Pairs = false>
void pack_keys(const T* keys, int64_t stride, int64_t count, int64_t dim, float* panels, Fetch& fetch) {
  for (int64_t first = 0; first < count; first += kPanel, panels += (Pairs ? dim / 2 : dim) * kPanel)
    for (int64_t half = 0; half < kPanel; half += 8) {
      const T* rows[8];
      for (int64_t i = 0; i < 8; ++i) rows[i] = keys + std::min(first + half + i, count - 1) * stride;
      fetch.beside(kPackWork);
      if constexpr (Pairs)
        pack_eight_pairs(rows, dim, panels + half);
      else
        pack_eight(rows, dim, panels + half);
    }
}

#include "tree_attention_kernel.h"

}  // namespace avx2
SPECDEC_TARGET_END

// ---- AVX-512 -----------------------------------------------------------------------------------------------------------

SPECDEC_TARGET_BEGIN(SPECDEC_AVX512)
namespace avx512 {

constexpr int kLanes = 16;
constexpr int kMaxRows = 12, kMaxSums = 24;
template <class T>
constexpr bool kPairs = false;

using Vec = __m512;
using Count = __m512i;
using avx2::pack_keys;

SPECDEC_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
SPECDEC_INLINE void keep(Vec& v) { asm volatile("" : "+v"(v)); }
SPECDEC_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
SPECDEC_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
SPECDEC_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
SPECDEC_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
SPECDEC_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
SPECDEC_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
SPECDEC_INLINE Vec multiply_pairs(Vec, Vec, Vec c) { return c; }
SPECDEC_INLINE Vec at_least(Vec x, Vec low, Vec y) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ), y); }

SPECDEC_INLINE Vec load(const float* from) { return _mm512_loadu_ps(from); }
SPECDEC_INLINE Vec load(const Half* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
SPECDEC_INLINE Vec load(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

SPECDEC_INLINE void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
template <class T>
SPECDEC_INLINE void store(T* to, Vec x) {
  avx2::store(to, _mm512_castps512_ps256(x));
  avx2::store(to + 8, _mm512_extractf32x8_ps(x, 1));
}

SPECDEC_INLINE Vec select(uint64_t bits, Vec a, Vec b) { return _mm512_mask_mov_ps(b, __mmask16(bits), a); }
SPECDEC_INLINE Vec scale_exponent(Vec x, Vec n) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}
SPECDEC_INLINE float highest(Vec x) { return _mm512_reduce_max_ps(x); }
SPECDEC_INLINE Count no_count() { return _mm512_setzero_si512(); }
SPECDEC_INLINE Count count(Count sum, Vec x) { return _mm512_add_epi32(sum, _mm512_castps_si512(x)); }
SPECDEC_INLINE uint32_t total(Count sum) {  // wraps; _mm512_reduce_add_epi32 adds signed ints, whose overflow is undefined
  return avx2::total(_mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1)));
}

#include "tree_attention_kernel.h"

}  // namespace avx512
SPECDEC_TARGET_END

// ---- AVX-512 with the dot product of pairs of bfloat16 -----------------------------------------------------------------

SPECDEC_TARGET_BEGIN(SPECDEC_AVX512_BF16)
namespace avx512_bf16 {

using avx512::add;
using avx512::at_least;
using avx512::Count;
using avx512::count;
using avx512::div;
using avx512::fma;
using avx512::highest;
using avx512::keep;
using avx512::kLanes;
using avx512::kMaxRows;
using avx512::kMaxSums;
using avx512::load;
using avx512::max;
using avx512::mul;
using avx512::no_count;
using avx512::scale_exponent;
using avx512::select;
using avx512::set1;
using avx512::store;
using avx512::sub;
using avx512::total;
using avx512::Vec;

template <class T>
constexpr bool kPairs = true;  // the weights of the values stay in float: as bfloat16 they would lose half of their bits

SPECDEC_INLINE Vec multiply_pairs(Vec a, Vec b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

template <class T>
void pack_keys(const T* keys, int64_t stride, int64_t count, int64_t dim, float* panels, Fetch& fetch) {
  avx2::pack_keys<T, true>(keys, stride, count, dim, panels, fetch);
}

#include "tree_attention_kernel.h"

}  // namespace avx512_bf16
SPECDEC_TARGET_END

#endif  // SPECDEC_X86

// ---- one call ----------------------------------------------------------------------------------------------------------

const Kernel& kernel_for(int32_t dtype) {
  static const Kernel kernels[][3] = SPECDEC_KERNEL_TABLE;
  return kernels[int(isa())][dtype];
}

int check_pointers(const TreeAttentionParams& p) {
  if (p.query == nullptr) return SPECDEC_BAD_QUERY;
  if (p.key_cache == nullptr) return SPECDEC_BAD_KEY_CACHE;
  if (p.value_cache == nullptr) return SPECDEC_BAD_VALUE_CACHE;
  if (p.prefix_lengths == nullptr) return SPECDEC_BAD_PREFIX_LENGTHS;
  if (p.node_counts == nullptr) return SPECDEC_BAD_NODE_COUNTS;
  if (p.ancestor_mask == nullptr) return SPECDEC_BAD_ANCESTOR_MASK;
  if (p.depths == nullptr) return SPECDEC_BAD_DEPTHS;
  if (p.output == nullptr) return SPECDEC_BAD_OUTPUT;
  return SPECDEC_OK;
}

int check_lengths(const TreeAttentionParams& p) {
  for (int64_t row = 0; row < p.batch; ++row) {
    const int64_t prefix = p.prefix_lengths[row], nodes = p.node_counts[row];
    if (nodes < 0 || nodes > p.nodes) return SPECDEC_BAD_NODE_COUNTS;
    if (prefix < 0 || prefix + nodes > p.slots) return SPECDEC_BAD_PREFIX_LENGTHS;
    const int32_t* depths = p.depths + row * p.nodes;
    if (std::any_of(depths, depths + nodes, [&](int32_t depth) { return depth < 0 || depth >= p.nodes; }))
      return SPECDEC_BAD_DEPTHS;
  }
  return SPECDEC_OK;
}

int check(const TreeAttentionParams& p) {
  constexpr int32_t dims[] = {16, 32, 64, 80, 96, 112, 128, 192, 256};
  if (p.dtype < SPECDEC_FLOAT32 || p.dtype > SPECDEC_BFLOAT16) return SPECDEC_BAD_DTYPE;
  if (p.batch < 0) return SPECDEC_BAD_BATCH;
  if (p.kv_heads < 1) return SPECDEC_BAD_KV_HEADS;
  if (p.query_heads < 1 || p.query_heads % p.kv_heads != 0) return SPECDEC_BAD_QUERY_HEADS;
  if (p.nodes < 1 || p.nodes > SPECDEC_MAX_NODES) return SPECDEC_BAD_NODES;
  if (p.slots < 0) return SPECDEC_BAD_SLOTS;
  if (std::find(std::begin(dims), std::end(dims), p.head_dim) == std::end(dims)) return SPECDEC_BAD_HEAD_DIM;
  if (!std::isfinite(p.scale)) return SPECDEC_BAD_SCALE;
  if (!std::isfinite(p.softcap) || p.softcap < 0) return SPECDEC_BAD_SOFTCAP;
  if (p.window < 0) return SPECDEC_BAD_WINDOW;
  if (p.num_threads < 0) return SPECDEC_BAD_NUM_THREADS;
  if (p.batch == 0) return SPECDEC_OK;
  const int bad = check_pointers(p);
  return bad != SPECDEC_OK ? bad : check_lengths(p);
}

// Memory that a thread keeps from call to call.
class Arena {
 public:
  float* floats(int64_t count) {
    if (count > size_) {
      memory_.reset(static_cast<float*>(::operator new(count * sizeof(float), kAlignment)));
      size_ = count;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

constexpr int64_t partial_size(int64_t rows, int64_t dim) { return (rows * (dim + 2) + 15) / 16 * 16; }

Partial partial_at(float* memory, int64_t rows, int64_t dim) {
  return {memory + rows * dim, memory + rows * (dim + 1), memory};
}

void clear(const Partial& partial, int64_t rows, int64_t dim) {
  std::fill_n(partial.maxima, rows, -kInfinity);
  std::fill_n(partial.sums, rows, 0.0f);
  std::fill_n(partial.output, rows * dim, 0.0f);
}

// The units of a call, cut by splits or not, and the threads' work on them.
class Call {
 public:
  Call(const TreeAttentionParams& params, std::vector<Unit>& units) : params_(params), kernel_(kernel_for(params.dtype)), units_(units) {
    make_units();
  }

  void clear_rest() const;
  void run();

 private:
  void make_units();
  double products() const;
  void cut(int64_t threads);
  void work();
  void whole(const Unit& unit, float* memory) const;
  void part(Unit& unit, int64_t split, float* memory) const;
  Partial stored(const Unit& unit, int64_t split) const {
    return partial_at(partials_ + (unit.first_item + split) * partial_size_, unit.rows, unit.dim);
  }
  Scratch scratch(const Unit& unit, float* memory) const;

  const TreeAttentionParams& params_;
  const Kernel& kernel_;
  std::vector<Unit>& units_;
  bool cut_ = false;
  int64_t items_ = 0;
  int64_t row_limit_ = 0, partial_size_ = 0;
  float* partials_ = nullptr;
  std::atomic<int64_t> next_{0};
};

// Output rows past n are zero.
void Call::clear_rest() const {
  const int64_t item_size = params_.dtype == SPECDEC_FLOAT32 ? 4 : 2, node_size = params_.query_heads * params_.head_dim * item_size;
  for (int64_t row = 0; row < params_.batch; ++row) {
    const int64_t first = row * params_.nodes + params_.node_counts[row], last = (row + 1) * params_.nodes;
    std::memset(static_cast<char*>(params_.output) + first * node_size, 0, (last - first) * node_size);
    if (params_.lse != nullptr)
      std::fill(params_.lse + first * params_.query_heads, params_.lse + last * params_.query_heads, -kInfinity);
  }
}

void Call::make_units() {
  const TreeAttentionParams& p = params_;
  const int64_t group = p.query_heads / p.kv_heads, item_size = p.dtype == SPECDEC_FLOAT32 ? 4 : 2;
  const Scale scale = p.softcap > 0 ? Scale{p.scale / p.softcap, p.softcap * kLog2E} : Scale{p.scale * kLog2E, 0};
  row_limit_ = kRowElements / p.head_dim;
  units_.clear();
  for (int64_t row = 0; row < p.batch; ++row) {
    const int64_t nodes = p.node_counts[row], rows = nodes * group;
    if (nodes == 0) continue;
    const int32_t* depths = p.depths + row * p.nodes;
    const auto [low, high] = std::minmax_element(depths, depths + nodes);
    const int64_t prefix = p.prefix_lengths[row], first = p.window > 0 ? std::max<int64_t>(0, prefix + *low - p.window + 1) : 0;
    const int64_t first_split = split_of(first), splits = split_of(prefix + *high) + 1 - first_split;
    const int64_t tiles = (rows + row_limit_ - 1) / row_limit_;
    for (int64_t head = 0; head < p.kv_heads; ++head)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first_row = rows * tile / tiles;
        units_.push_back({.params = &p,
                          .scale = scale,
                          .batch = row,
                          .kv_head = head,
                          .group = group,
                          .first_row = first_row,
                          .rows = rows * (tile + 1) / tiles - first_row,
                          .prefix = prefix,
                          .nodes = nodes,
                          .dim = p.head_dim,
                          .keys = static_cast<const char*>(p.key_cache) +
                                  (row * p.key_strides[0] + head * p.key_strides[1]) * item_size,
                          .values = static_cast<const char*>(p.value_cache) +
                                    (row * p.value_strides[0] + head * p.value_strides[1]) * item_size,
                          .key_stride = p.key_strides[2],
                          .value_stride = p.value_strides[2],
                          .first_split = first_split,
                          .splits = splits});
      }
  }
}

// How long the call takes, in products of a row with an element of a key; moving the element costs some of them.
double Call::products() const {
  double sum = 0;
  for (const Unit& unit : units_) sum += double(split_begin(unit.first_split + unit.splits) - split_begin(unit.first_split)) * unit.dim * (unit.rows + 4);
  return sum;
}

// Splits become items of their own where the units alone would not keep the threads busy.
void Call::cut(int64_t threads) {
  const int64_t units = units_.size();
  int64_t rows = 0, splits = 0;
  for (const Unit& unit : units_) {
    rows = std::max(rows, unit.rows);
    splits += unit.splits;
  }
  partial_size_ = partial_size(rows, params_.head_dim);
  cut_ = threads > 1 && units % threads != 0 && units < 4 * threads && splits > units && splits * partial_size_ <= kMaxPartials;
  for (Unit& unit : units_) {
    unit.first_item = items_;
    unit.pending = int32_t(unit.splits);
    items_ += cut_ ? unit.splits : 1;
  }
}

Scratch Call::scratch(const Unit& unit, float* memory) const {
  float* const keys = memory + unit.rows * unit.dim;
  return {memory, keys, keys + kMaxKeys * unit.dim};
}

// All splits of a unit, one after another.
void Call::whole(const Unit& unit, float* memory) const {
  const Scratch scratch = this->scratch(unit, memory);
  const Partial total = partial_at(scratch.values + kMaxKeys * unit.dim, unit.rows, unit.dim);
  const Partial sum = partial_at(total.output + partial_size_, unit.rows, unit.dim);
  kernel_.pack_queries(unit, scratch.queries);
  clear(total, unit.rows, unit.dim);
  kernel_.attend_split(unit, unit.first_split, scratch, total);
  for (int64_t split = 1; split < unit.splits; ++split) {
    clear(sum, unit.rows, unit.dim);
    kernel_.attend_split(unit, unit.first_split + split, scratch, sum);
    kernel_.merge(unit, sum, total);
  }
  kernel_.finish(unit, total);
}

// One split of a unit; who does the last one adds them up.
void Call::part(Unit& unit, int64_t split, float* memory) const {
  const Scratch scratch = this->scratch(unit, memory);
  const Partial sum = stored(unit, split);
  kernel_.pack_queries(unit, scratch.queries);
  clear(sum, unit.rows, unit.dim);
  kernel_.attend_split(unit, unit.first_split + split, scratch, sum);
  if (std::atomic_ref(unit.pending).fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  const Partial total = stored(unit, 0);
  for (int64_t i = 1; i < unit.splits; ++i) kernel_.merge(unit, stored(unit, i), total);
  kernel_.finish(unit, total);
}

// Takes items, the last ones (the longest splits) first, until none is left.
void Call::work() {
  static thread_local Arena arena;
  const int64_t dim = params_.head_dim, rows = std::min<int64_t>(row_limit_, params_.query_heads / params_.kv_heads * params_.nodes);
  float* const memory = arena.floats(rows * dim + 2 * kMaxKeys * dim + 2 * partial_size_);
  for (int64_t taken; (taken = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) {
    const int64_t item = items_ - 1 - taken;
    const auto after = std::upper_bound(units_.begin(), units_.end(), item, [](int64_t i, const Unit& unit) { return i < unit.first_item; });
    Unit& unit = after[-1];
    if (cut_)
      part(unit, item - unit.first_item, memory);
    else
      whole(unit, memory);
  }
}

void Call::run() {
  const int64_t allowed = std::max(1, params_.num_threads);
  const int64_t useful = std::min<int64_t>(allowed, 1 + int64_t(products() / kThreadWork));
  cut(useful);
  static thread_local Arena arena;
  if (cut_) partials_ = arena.floats(items_ * partial_size_);
  const int64_t threads = std::min(useful, items_);
  if (threads <= 1) return work();
  if (params_.parallel_for != nullptr) {
    params_.parallel_for(params_.parallel_pool, threads, [](void* call, int64_t) { static_cast<Call*>(call)->work(); }, this);
    return;
  }
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back([this] { work(); });
  work();
  for (std::thread& thread : others) thread.join();
}

}  // namespace
}  // namespace specdec

int specdec_tree_attention_cpu(const TreeAttentionParams* params) {
  if (params == nullptr || params->struct_size != sizeof(TreeAttentionParams)) return SPECDEC_BAD_STRUCT_SIZE;
  if (const int bad = specdec::check(*params); bad != SPECDEC_OK || params->batch == 0) return bad;
  static thread_local std::vector<specdec::Unit> units;
  specdec::Call call(*params, units);
  call.clear_rest();
  call.run();
  return SPECDEC_OK;
}

const char* specdec_tree_attention_isa(void) { return specdec::isa_name(); }
