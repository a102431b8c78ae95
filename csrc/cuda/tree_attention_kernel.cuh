// Tree attention for N nodes a row over a KV cache, split over the keys (flash decoding, Dao et al. 2023) and merged.
//
// The query heads of one KV head are packed as rows of one matrix, row = node * groups + head, so that a block reads each key
// once for all of them. A block takes one tile of packed rows and one split of the keys, walks over them tile by tile with the
// online softmax (Milakov and Gimelshein, 2018) and has for every row, of its scores s, m = max(s), l = sum(exp(s - m)) and
// o = sum(exp(s - m) v). It writes o / l and m + log(l).
//
//   attend_simt   fp32; a warp owns a few rows, a lane one key of the scores and every 32nd column of the output
//   attend_mma    fp16, bf16; mma.m16n8k16, kRowWarps warps along the rows and 4 / kRowWarps along the keys of a tile
//   merge_splits  o = sum(exp(lse_i - lse) o_i), lse = log(sum(exp(lse_i)))
#pragma once

#include <limits>

#include "../tree_attention.h"
#include "device.cuh"

namespace specdec {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Arguments {
  TreeAttentionParams p;
  int groups;  // query heads a KV head
  int splits;
  float* partial_output;  // [splits, batch, nodes, query_heads, head_dim], normalised; unused if splits is 1
  float* partial_lse;     // [splits, batch, nodes, query_heads]
};

// What one block works on.
struct Tile {
  int row;  // of the batch
  int kv_head;
  int first;       // packed query row of the tile's row 0
  int live;        // the tile's rows below this one have a node; none if it is not positive
  int prefix;      // P: slot of node 0
  int begin, end;  // key slots of the block's split

  __device__ int node(const Arguments& a, int r) const { return (first + r) / a.groups; }
  __device__ int head(const Arguments& a, int r) const { return kv_head * a.groups + (first + r) % a.groups; }
};

// Lengths beyond the tensors are clamped, so that a bad one cannot lead outside of them.
__device__ inline int node_count(const TreeAttentionParams& p, int64_t row) {
  return min(max(p.node_counts[row], 0), min(p.nodes, p.slots));
}

template <int kRows, int kKeys>
__device__ Tile make_tile(const Arguments& a) {
  const TreeAttentionParams& p = a.p;
  Tile t;
  t.row = blockIdx.z / p.kv_heads;
  t.kv_head = blockIdx.z % p.kv_heads;
  t.first = blockIdx.x * kRows;
  const int nodes = node_count(p, t.row);
  t.live = min(nodes * a.groups - t.first, kRows);
  t.prefix = min(max(p.prefix_lengths[t.row], 0), p.slots - nodes);
  const int total = t.live > 0 ? t.prefix + nodes : 0;
  const int first_seen = p.window > 0 ? max(0, t.prefix - p.window + 1) / kKeys * kKeys : 0;  // by the root
  const int tiles = (total - first_seen + kKeys - 1) / kKeys;
  const int share = (tiles + a.splits - 1) / a.splits * kKeys;
  t.begin = first_seen + static_cast<int>(blockIdx.y) * share;
  t.end = min(t.begin + share, total);
  return t;
}

// Bit b: row r of the tile sees slot key + b.
__device__ inline uint32_t visible_keys(const Arguments& a, const Tile& t, int r, int key) {
  const TreeAttentionParams& p = a.p;
  if (r >= t.live || key >= t.end) return 0;
  const int64_t node = static_cast<int64_t>(t.row) * p.nodes + t.node(a, r);
  const int offset = key - t.prefix;  // node of bit 0; negative in the prefix
  uint32_t bits = kAllLanes;
  if (offset > -32) {
    const int words = (p.nodes + 31) / 32, word = offset >> 5;
    const int32_t* mask = p.ancestor_mask + node * words;
    const uint32_t low = word < 0 ? kAllLanes : static_cast<uint32_t>(mask[word]);
    const uint32_t high = word + 1 < words ? static_cast<uint32_t>(mask[word + 1]) : 0;
    bits = static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> (offset & 31));
  }
  if (t.end - key < 32) bits &= (1u << (t.end - key)) - 1;
  if (p.window > 0) {
    const int depth = p.depths[node];
    const int passed = min(depth - p.window + 1 - offset, min(-offset, 32));  // prefix slots of this word out of the window
    if (passed > 0) bits &= passed < 32 ? kAllLanes << passed : 0;
    if (depth >= p.window) {  // rare: else every ancestor is near enough
#pragma unroll 1
      for (int b = max(0, -offset); b < min(32, t.end - key); ++b) {
        if (depth - p.depths[static_cast<int64_t>(t.row) * p.nodes + offset + b] >= p.window) bits &= ~(1u << b);
      }
    }
  }
  return bits;
}

// Whether every row of the tile surely sees the keys [key, key + count). The deepest position is P + N - 1.
__device__ inline bool all_visible(const Arguments& a, const Tile& t, int key, int count) {
  return key + count <= t.prefix && key + count <= t.end && (a.p.window == 0 || t.prefix + a.p.nodes - 1 - key < a.p.window);
}

// Products -> scores.
template <int kCount>
__device__ __forceinline__ void scale_and_cap(const TreeAttentionParams& p, float (&s)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] *= p.scale;
  if (p.softcap > 0) {
    const float inverse = 1 / p.softcap;
#pragma unroll
    for (int i = 0; i < kCount; ++i) s[i] = p.softcap * tanhf(s[i] * inverse);
  }
}

// exp(s - m); 0 for s = -inf, also where no key was seen yet and m is -inf as well.
__device__ inline float weight(float s, float m) { return fast_exp2((s - (m == -kInfinity ? 0 : m)) * kLog2E); }

// Starts copying kRows rows of D elements, row r from source(r); from row `valid` (at least 1) on they are zeros.
template <class T, int D, int kRows, int kPitch, class Source>
__device__ void load_rows(void* shared, int valid, Source source) {
  constexpr int kChunk = 16 / sizeof(T), kChunks = D / kChunk;  // elements a copy, copies a row
#pragma unroll
  for (int first = 0; first < kRows * kChunks; first += kThreads) {
    const int i = first + threadIdx.x, r = i / kChunks, d = i % kChunks * kChunk;
    if (first + kThreads > kRows * kChunks && r >= kRows) break;
    cp_async(static_cast<T*>(shared) + r * kPitch + d, source(min(r, valid - 1)) + d, r < valid);
  }
}

template <class T, int D, int kRows, int kPitch>
__device__ void load_query(void* shared, const Arguments& a, const Tile& t) {
  const int64_t* stride = a.p.query_strides;
  const T* query = static_cast<const T*>(a.p.query) + t.row * stride[0];
  if (t.live <= 0) return;
  const auto source = [&](int r) { return query + t.head(a, r) * stride[1] + t.node(a, r) * stride[2]; };
  load_rows<T, D, kRows, kPitch>(shared, t.live, source);
}

// The slots that a block reads of one cache.
template <class T>
struct Slots {
  const T* first;  // slot 0 of the block's row and KV head
  int64_t stride;

  __device__ Slots(const void* cache, const int64_t (&strides)[3], const Tile& t)
      : first(static_cast<const T*>(cache) + t.row * strides[0] + t.kv_head * strides[1]), stride(strides[2]) {}

  // Starts copying the slots from `slot` on, up to `end`; one group of copies, which may be empty.
  template <int D, int kKeys, int kPitch>
  __device__ void load(void* shared, int slot, int end) const {
    if (slot < end) {
      const T* tile = first + slot * stride;
      load_rows<T, D, kKeys, kPitch>(shared, end - slot, [&](int r) { return tile + r * stride; });
    }
    cp_async_commit();
  }
};

// --- what a block leaves behind ---------------------------------------------------------------------------------------------

__device__ inline void store4(float* to, const float (&x)[4]) { *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]}; }

template <class T>
__device__ void store4(T* to, const float (&x)[4]) {
  *reinterpret_cast<uint2*>(to) = {pack(T{}, x[0], x[1]), pack(T{}, x[2], x[3])};
}

// The softmax state of a tile's rows in shared memory, in kParts parts of its keys.
template <int kRows, int D, int kParts>
struct Partials {
  static constexpr int kPitch = D + 8;  // 8 rows apart: the lanes of attend_mma store to distinct banks
  float o[kParts][kRows][kPitch];
  float m[kParts][kRows], l[kParts][kRows];
};

// Adds the parts up and writes the rows: output and lse, or with several splits this split's share of the workspace.
template <class T, int D, int kRows, int kParts>
__device__ void store_rows(const Arguments& a, const Tile& t, const Partials<kRows, D, kParts>& parts) {
  const TreeAttentionParams& p = a.p;
  for (int i = threadIdx.x; i < kRows * (D / 4); i += kThreads) {
    const int r = i / (D / 4), column = i % (D / 4) * 4;
    if (t.first + r >= p.nodes * a.groups || (r >= t.live && a.splits > 1)) continue;  // merge_splits writes rows without a node
    float o[4] = {}, l = 0, m = -kInfinity;
    if (r < t.live) {
      for (int part = 0; part < kParts; ++part) m = fmaxf(m, parts.m[part][r]);
      for (int part = 0; part < kParts; ++part) {
        const float w = weight(parts.m[part][r], m);
        l += w * parts.l[part][r];
        const float4 x = *reinterpret_cast<const float4*>(&parts.o[part][r][column]);
        o[0] += w * x.x, o[1] += w * x.y, o[2] += w * x.z, o[3] += w * x.w;
      }
      const float inverse = l > 0 ? 1 / l : 0;
      for (float& x : o) x *= inverse;
    }
    const int64_t row = (static_cast<int64_t>(t.row) * p.nodes + t.node(a, r)) * p.query_heads + t.head(a, r);
    const int64_t partial = blockIdx.y * (static_cast<int64_t>(p.batch) * p.nodes * p.query_heads) + row;
    float* lse = a.splits > 1 ? a.partial_lse + partial : p.lse == nullptr ? nullptr : p.lse + row;
    if (column == 0 && lse != nullptr) *lse = l > 0 ? m + logf(l) : -kInfinity;
    if (a.splits > 1) {
      store4(a.partial_output + partial * D + column, o);
    } else {
      store4(static_cast<T*>(p.output) + row * D + column, o);
    }
  }
}

// --- fp32 -------------------------------------------------------------------------------------------------------------------

template <int D>
struct SimtShape {
  static constexpr int kRows = D == 256 ? 16 : 32;
  static constexpr int kKeys = 32;         // one a lane
  static constexpr int kPitch = D + 4;     // floats a key: an odd number of 16-byte chunks, so that 8 lanes meet no bank twice
  static constexpr int kWarpRows = kRows / kWarps;

  float query[kRows][D];
  union {
    struct {
      float keys[kKeys][kPitch], values[kKeys][kPitch];
    };
    Partials<kRows, D, 1> parts;
  };
  float weights[kRows][kKeys];
};

// A warp's rows: what each lane holds of them.
template <int D>
struct SimtWarp {
  using Shape = SimtShape<D>;
  static constexpr int kKeys = Shape::kKeys, kRows = Shape::kWarpRows, kColumns = D / 32;

  const Arguments& a;
  const Tile& t;
  Shape& shared;
  int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * kRows;
  float s[kRows];                 // of this lane's key
  float o[kRows][kColumns] = {};  // of the columns lane + 32 c
  float m[kRows], l[kRows];       // l: of this lane's keys

  __device__ SimtWarp(const Arguments& a, const Tile& t, Shape& shared) : a(a), t(t), shared(shared) {
    for (int r = 0; r < kRows; ++r) m[r] = -kInfinity, l[r] = 0;
  }

  __device__ __forceinline__ void multiply_keys() {
#pragma unroll
    for (float& x : s) x = 0;
#pragma unroll 4
    for (int d = 0; d < D; d += 4) {
      const float4 k = *reinterpret_cast<const float4*>(&shared.keys[lane][d]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 q = *reinterpret_cast<const float4*>(&shared.query[row0 + r][d]);
        s[r] += q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w;
      }
    }
  }

  // Products of the tile that begins at slot `key` -> scores, -inf where a key is not seen.
  __device__ __forceinline__ void mask(int key) {
    scale_and_cap(a.p, s);
    if (all_visible(a, t, key, kKeys)) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!(visible_keys(a, t, row0 + r, key) >> lane & 1)) s[r] = -kInfinity;
    }
  }

  // Scores -> weights, in shared memory.
  __device__ __forceinline__ void soften() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float largest = s[r];
#pragma unroll
      for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
      largest = fmaxf(m[r], largest);
      const float rescale = weight(m[r], largest), w = weight(s[r], largest);
      m[r] = largest;
      l[r] = l[r] * rescale + w;
#pragma unroll
      for (float& x : o[r]) x *= rescale;
      shared.weights[row0 + r][lane] = w;
    }
  }

  __device__ __forceinline__ void multiply_values() {
#pragma unroll 2
    for (int k = 0; k < kKeys; k += 4) {
      float v[4][kColumns];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) v[j][c] = shared.values[k + j][lane + 32 * c];
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 w = *reinterpret_cast<const float4*>(&shared.weights[row0 + r][k]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) o[r][c] += w.x * v[0][c] + w.y * v[1][c] + w.z * v[2][c] + w.w * v[3][c];
      }
    }
  }

  __device__ __forceinline__ void leave() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) l[r] += __shfl_xor_sync(kAllLanes, l[r], step);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) shared.parts.o[0][row0 + r][lane + 32 * c] = o[r][c];
      if (lane == 0) shared.parts.m[0][row0 + r] = m[r], shared.parts.l[0][row0 + r] = l[r];
    }
  }
};

template <int D>
__global__ void __launch_bounds__(kThreads) attend_simt(const Arguments a) {
  using Shape = SimtShape<D>;
  Shape& shared = *reinterpret_cast<Shape*>(dynamic_shared());
  const Tile t = make_tile<Shape::kRows, Shape::kKeys>(a);
  SimtWarp<D> warp(a, t, shared);
  const Slots<float> keys(a.p.key_cache, a.p.key_strides, t), values(a.p.value_cache, a.p.value_strides, t);
  const auto load = [&](const Slots<float>& slots, void* tile, int key) {
    slots.template load<D, Shape::kKeys, Shape::kPitch>(tile, key, t.end);
  };

  load_query<float, D, Shape::kRows, D>(shared.query, a, t);
  load(keys, shared.keys, t.begin);
  for (int key = t.begin; key < t.end; key += Shape::kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // the keys have arrived, and nobody reads the last values any more
    load(values, shared.values, key);
    warp.multiply_keys();
    warp.mask(key);
    warp.soften();
    cp_async_wait<0>();
    __syncthreads();  // the values and this warp's weights have arrived, and nobody reads the keys any more
    load(keys, shared.keys, key + Shape::kKeys);
    warp.multiply_values();
  }
  cp_async_wait<0>();
  __syncthreads();  // the keys and values give their memory to the result
  warp.leave();
  __syncthreads();
  store_rows<float>(a, t, shared.parts);
}

// --- fp16 and bf16 ----------------------------------------------------------------------------------------------------------

template <int D, int kRowWarps>
struct MmaShape {
  static constexpr int kRows = 16 * kRowWarps;
  static constexpr int kKeyWarps = kWarps / kRowWarps;
  static constexpr int kKeys = D == 256 ? 32 : 64;
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  static_assert(kWarpKeys % 16 == 0, "a warp multiplies 16 keys at a time");
  static constexpr int kPitch = D + 8;  // an odd number of 16-byte chunks: the 8 rows of an ldmatrix meet no bank twice

  struct Stage {
    uint16_t keys[kKeys][kPitch], values[kKeys][kPitch];
  };
  static constexpr size_t kQueryBytes = kRows * kPitch * sizeof(uint16_t);
  using Parts = Partials<kRows, D, kKeyWarps>;

  // The query lies where the second stage will be and is read into registers; at D = 256 these would not suffice, so it stays
  // behind the stages. Parts take over the memory at the end.
  static constexpr bool kQueryInRegisters = D <= 128;
  static constexpr size_t kQueryOffset = (kQueryInRegisters ? 1 : 2) * sizeof(Stage);
  static constexpr size_t kStagesAndQuery = 2 * sizeof(Stage) + (kQueryInRegisters ? 0 : kQueryBytes);
  static constexpr size_t kSharedBytes = kStagesAndQuery > sizeof(Parts) ? kStagesAndQuery : sizeof(Parts);
  static_assert(kQueryBytes <= sizeof(Stage));
};

// 16 rows times kWarpKeys keys of a tile: what each lane of a warp holds of them. In a 16 x 8 block of mma's results these are
// rows lane / 4 and that + 8 (`half`), columns 2 (lane % 4) and the next.
template <class T, int D, int kRowWarps>
struct MmaWarp {
  using Shape = MmaShape<D, kRowWarps>;
  static constexpr int kKeys = Shape::kWarpKeys;
  using Rows = uint16_t[Shape::kPitch];

  const Arguments& a;
  const Tile& t;
  const Rows* query;  // of all warps
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int row0 = warp % kRowWarps * 16, part = warp / kRowWarps, key0 = part * kKeys;
  int row = row0 + lane / 4, column = lane % 4 * 2;
  bool works = row0 < t.live;  // a warp without rows only copies

  uint32_t q[Shape::kQueryInRegisters ? D / 16 : 1][4];
  float s[kKeys / 8][4];
  float o[D / 8][4] = {}, m[2] = {-kInfinity, -kInfinity}, l[2] = {};  // l: of this lane's columns

  __device__ MmaWarp(const Arguments& a, const Tile& t, const Rows* query) : a(a), t(t), query(query) {}

  __device__ __forceinline__ void take_query(int d) {
    ldmatrix(q[Shape::kQueryInRegisters ? d / 16 : 0], &query[row0 + lane % 16][d + lane / 16 * 8]);
  }

  __device__ __forceinline__ void multiply_keys(const Rows* keys) {
#pragma unroll
    for (auto& block : s) {
      for (float& x : block) x = 0;
    }
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      if constexpr (!Shape::kQueryInRegisters) take_query(d);
      const uint32_t(&block)[4] = q[Shape::kQueryInRegisters ? d / 16 : 0];
#pragma unroll
      for (int n = 0; n < kKeys; n += 16) {
        uint32_t k[4];
        ldmatrix(k, &keys[key0 + n + lane % 8 + lane / 16 * 8][d + lane / 8 % 2 * 8]);
        mma(T{}, s[n / 8], block, k[0], k[1]);
        mma(T{}, s[n / 8 + 1], block, k[2], k[3]);
      }
    }
  }

  // Products of the tile that begins at slot `key` -> scores, -inf where a key is not seen.
  __device__ __forceinline__ void mask(int key) {
#pragma unroll
    for (auto& block : s) scale_and_cap(a.p, block);
    if (all_visible(a, t, key, Shape::kKeys)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t bits = 0;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        if (n % 4 == 0) bits = visible_keys(a, t, row + 8 * half, key + key0 + n * 8) >> column;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!(bits >> (n % 4 * 8 + e) & 1)) s[n][2 * half + e] = -kInfinity;
        }
      }
    }
  }

  // Scores -> weights.
  __device__ __forceinline__ void soften() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = m[half];
#pragma unroll
      for (const auto& block : s) largest = fmaxf(largest, fmaxf(block[2 * half], block[2 * half + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
      const float rescale = weight(m[half], largest);
      m[half] = largest;
      l[half] *= rescale;
#pragma unroll
      for (auto& block : s) {
        for (int e = 2 * half; e < 2 * half + 2; ++e) l[half] += block[e] = weight(block[e], largest);
      }
#pragma unroll
      for (auto& block : o) block[2 * half] *= rescale, block[2 * half + 1] *= rescale;
    }
  }

  __device__ __forceinline__ void multiply_values(const Rows* values) {
#pragma unroll
    for (int n = 0; n < kKeys; n += 16) {
      const float(&even)[4] = s[n / 8], (&odd)[4] = s[n / 8 + 1];
      const uint32_t w[4] = {pack(T{}, even[0], even[1]), pack(T{}, even[2], even[3]), pack(T{}, odd[0], odd[1]),
                             pack(T{}, odd[2], odd[3])};
#pragma unroll
      for (int d = 0; d < D; d += 16) {
        uint32_t v[4];
        ldmatrix_transposed(v, &values[key0 + n + lane % 16][d + lane / 16 * 8]);
        mma(T{}, o[d / 8], w, v[0], v[1]);
        mma(T{}, o[d / 8 + 1], w, v[2], v[3]);
      }
    }
  }

  __device__ __forceinline__ void leave(typename Shape::Parts& parts) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[half] += __shfl_xor_sync(kAllLanes, l[half], 1);
      l[half] += __shfl_xor_sync(kAllLanes, l[half], 2);
      const int r = row + 8 * half;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<float2*>(&parts.o[part][r][8 * n + column]) = {o[n][2 * half], o[n][2 * half + 1]};
      }
      if (column == 0) parts.m[part][r] = m[half], parts.l[part][r] = l[half];
    }
  }
};

template <class T, int D, int kRowWarps>
__global__ void __launch_bounds__(kThreads, D <= 128 ? 2 : 1) attend_mma(const Arguments a) {
  using Shape = MmaShape<D, kRowWarps>;
  unsigned char* memory = dynamic_shared();
  auto* stages = reinterpret_cast<typename Shape::Stage*>(memory);
  auto* query = reinterpret_cast<uint16_t(*)[Shape::kPitch]>(memory + Shape::kQueryOffset);
  auto& parts = *reinterpret_cast<typename Shape::Parts*>(memory);
  const Tile t = make_tile<Shape::kRows, Shape::kKeys>(a);
  MmaWarp<T, D, kRowWarps> warp(a, t, query);
  const Slots<T> keys(a.p.key_cache, a.p.key_strides, t), values(a.p.value_cache, a.p.value_strides, t);
  const auto load = [&](const Slots<T>& slots, void* tile, int key) {
    slots.template load<D, Shape::kKeys, Shape::kPitch>(tile, key, t.end);
  };

  load_query<T, D, Shape::kRows, Shape::kPitch>(query, a, t);
  cp_async_commit();
  load(keys, stages[0].keys, t.begin);
  load(values, stages[0].values, t.begin);
  if constexpr (Shape::kQueryInRegisters) {
    cp_async_wait<2>();
    __syncthreads();  // the query has arrived
#pragma unroll
    for (int d = 0; d < D; d += 16) warp.take_query(d);
  }
  for (int key = t.begin, stage = 0; key < t.end; key += Shape::kKeys, stage ^= 1) {
    cp_async_wait<1>();
    __syncthreads();  // the keys have arrived, and nobody reads the other stage any more
    load(keys, stages[stage ^ 1].keys, key + Shape::kKeys);
    load(values, stages[stage ^ 1].values, key + Shape::kKeys);
    if (warp.works) {
      warp.multiply_keys(stages[stage].keys);
      warp.mask(key);
      warp.soften();
    }
    cp_async_wait<2>();
    __syncthreads();  // the values have arrived
    if (warp.works) warp.multiply_values(stages[stage].values);
  }
  cp_async_wait<0>();
  __syncthreads();  // the stages give their memory to the result
  warp.leave(parts);
  __syncthreads();
  store_rows<T>(a, t, parts);
}

// --- merge ------------------------------------------------------------------------------------------------------------------

// One warp an output row [head_dim].
template <class T>
__global__ void __launch_bounds__(kThreads) merge_splits(const Arguments a) {
  const TreeAttentionParams& p = a.p;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.nodes * p.query_heads;
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t node = row / p.query_heads;
  const int splits = node % p.nodes < node_count(p, node / p.nodes) ? a.splits : 0;  // rows without a node were not written
  const int lane = threadIdx.x % 32;

  float lse = -kInfinity;
  for (int i = lane; i < splits; i += 32) lse = fmaxf(lse, a.partial_lse[i * rows + row]);
  for (int step = 16; step > 0; step /= 2) lse = fmaxf(lse, __shfl_xor_sync(kAllLanes, lse, step));
  float sum = 0;
  for (int i = 0; i < splits; ++i) sum += weight(a.partial_lse[i * rows + row], lse);
  if (sum > 0) lse += logf(sum);

  for (int d = 4 * lane; d < p.head_dim; d += 128) {
    float o[4] = {};
    for (int i = 0; i < splits; ++i) {
      const float w = weight(a.partial_lse[i * rows + row], lse);
      if (w == 0) continue;
      const float4 x = *reinterpret_cast<const float4*>(a.partial_output + (i * rows + row) * p.head_dim + d);
      o[0] += w * x.x, o[1] += w * x.y, o[2] += w * x.z, o[3] += w * x.w;
    }
    store4(static_cast<T*>(p.output) + row * p.head_dim + d, o);
  }
  if (lane == 0 && p.lse != nullptr) p.lse[row] = lse;
}

}  // namespace specdec
