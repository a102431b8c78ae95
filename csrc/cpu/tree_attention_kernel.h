// The kernel, included once for each instruction set from inside that set's namespace (hence no guard and no includes; see
// tree_attention.cpp). The namespace provides
//   Vec of kLanes floats, set1, load(const T*), load_bits(const float*), store(T*, Vec), add, sub, mul, div, max, fma(a, b, c),
//   at_least(x, low, y)             y in the lanes where x >= low (or x is NaN), else 0
//   select(bits, a, b)              a in the lanes whose bit is set, else b
//   scale_exponent(x, n)            bits(x) + (bits(n) << 23)
//   highest(Vec)                    the largest lane
//   Count, no_count(), count(Count, Vec), total(Count)    sums of the bit patterns of floats, modulo 2^32
//   multiply_pairs(a, b, c)         c + the dot products of pairs of bfloat16 (only where kPairs<T>)
//   keep(Vec&)                      holds a value in its register
//   kMaxRows, kMaxSums              rows of a group; sums that fit in registers
//   kPairs<T>                       queries and keys are multiplied as pairs of bfloat16
//   pack_keys<T>(keys, stride, count, dim, panels, fetch)

// 2^x for x <= 0, with a relative error below 1e-7; below -125, zero.
SPECDEC_INLINE Vec exp2(Vec x) {
  const Vec rounder = set1(12582912.0f);  // 1.5 * 2^23: the sum's lowest bits are the nearest integer
  const Vec shifted = add(x, rounder), r = sub(x, sub(shifted, rounder));
  Vec y = set1(0.00015353361959569156f);  // (2^r - 1) / r on [-1/2, 1/2], relative error 2e-9
  y = fma(y, r, set1(0.0013398875016719103f));
  y = fma(y, r, set1(0.00961843691766262f));
  y = fma(y, r, set1(0.055503323674201965f));
  y = fma(y, r, set1(0.24022647738456726f));
  y = fma(y, r, set1(0.6931471824645996f));
  y = fma(y, r, set1(1.0f));
  return at_least(x, set1(-125.0f), scale_exponent(y, shifted));
}

SPECDEC_INLINE Vec tanh(Vec x) {
  const Vec z = mul(x, x), size = max(x, sub(set1(0.0f), x));
  Vec y = set1(-0.005704910960048437f);  // (tanh(x) - x) / x^3 for |x| < 0.625, relative error 5e-9
  y = fma(y, z, set1(0.020639022812247276f));
  y = fma(y, z, set1(-0.053739696741104126f));
  y = fma(y, z, set1(0.13331441581249237f));
  y = fma(y, z, set1(-0.3333328068256378f));
  const Vec small = fma(mul(y, z), x, x);
  const Vec e = exp2(mul(size, set1(-2.0f * kLog2E)));
  const Vec large = div(sub(set1(1.0f), e), add(set1(1.0f), e));
  const Vec is_large = at_least(size, set1(0.625f), set1(1.0f));
  const Vec sign = sub(at_least(x, set1(0.0f), set1(2.0f)), set1(1.0f));
  return fma(is_large, mul(large, sign), mul(sub(set1(1.0f), is_large), small));
}

// Where element `vec` * kLanes of a row lies, of a matrix that is stored in panels of kPanel columns.
SPECDEC_INLINE int64_t panel_offset(int64_t vec, int64_t panel_stride) {
  return vec * kLanes / kPanel * panel_stride + vec * kLanes % kPanel;
}

template <bool Pairs>
SPECDEC_INLINE Vec product(Vec x, Vec y, Vec sum) {
  if constexpr (Pairs)
    return multiply_pairs(x, y, sum);
  else
    return fma(x, y, sum);
}

// sums[i][v] += sum over k of a[i, k] * b[k, v], k in ascending order: an element is one chain of operations, whatever NR and NV.
template <class T, bool Pairs, int NR, int NV>
SPECDEC_INLINE void add_products(const float* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t panel_stride, int64_t steps,
                                 Vec (&sums)[NR][NV]) {
  for (int64_t k = 0; k < steps; ++k, b += b_stride) {
    if constexpr (NR > NV) {
      Vec bs[NV];
      for (int v = 0; v < NV; ++v) bs[v] = load(b + panel_offset(v, panel_stride));
      for (int v = 0; v < NV; ++v) keep(bs[v]);
      for (int i = 0; i < NR; ++i) {
        const Vec x = set1(a[i * a_stride + k]);
        for (int v = 0; v < NV; ++v) sums[i][v] = product<Pairs>(x, bs[v], sums[i][v]);
      }
    } else {
      Vec xs[NR];
      for (int i = 0; i < NR; ++i) xs[i] = set1(a[i * a_stride + k]);
      for (int i = 0; i < NR; ++i) keep(xs[i]);
      for (int v = 0; v < NV; ++v) {
        const Vec y = load(b + panel_offset(v, panel_stride));
        for (int i = 0; i < NR; ++i) sums[i][v] = product<Pairs>(xs[i], y, sums[i][v]);
      }
    }
  }
}

// A tile: sums[i][v] = sum over k of a[i, k] * b[k, v].
template <class T, bool Pairs, int NR, int NV>
SPECDEC_INLINE void multiply(const float* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t panel_stride, int64_t steps,
                             Vec (&sums)[NR][NV], Fetch& fetch) {
  for (int i = 0; i < NR; ++i)
    for (int v = 0; v < NV; ++v) sums[i][v] = set1(0.0f);
  if constexpr (NR > kFewRows) {
    add_products<T, Pairs>(a, a_stride, b, b_stride, panel_stride, steps, sums);
    fetch.beside(NV);
  } else {
    for (int64_t k = 0; k < steps; k += kFetchSteps) {
      add_products<T, Pairs>(a + k, a_stride, b + k * b_stride, b_stride, panel_stride, std::min(kFetchSteps, steps - k), sums);
      fetch.beside(NV);
    }
  }
}

template <int NR>
constexpr int kVecs = NR * 4 <= kMaxSums ? 4 : 2;

// scores[i, v] = (Add ? scores[i, v] : 0) + queries[i] . keys[v] over `steps` of d, for the vectors [first, vecs) of keys.
template <bool Pairs, bool Add, int NR, int NV>
SPECDEC_NOINLINE void score(const float* queries, int64_t stride, const float* keys, int64_t steps, int64_t first, int64_t vecs,
                            float* scores, Fetch& fetch) {
  for (; first + NV <= vecs; first += NV) {
    Vec sums[NR][NV];
    multiply<float, Pairs, NR, NV>(queries, stride, keys + panel_offset(first, stride * kPanel), kPanel, stride * kPanel, steps,
                                   sums, fetch);
    for (int i = 0; i < NR; ++i)
      for (int v = 0; v < NV; ++v) {
        float* to = scores + i * kMaxKeys + (first + v) * kLanes;
        store(to, Add ? add(load(to), sums[i][v]) : sums[i][v]);
      }
  }
  if constexpr (NV > 1) {
    if (first < vecs) score<Pairs, Add, NR, NV / 2>(queries, stride, keys, steps, first, vecs, scores, fetch);
  }
}

// A matrix of values, in panels or as it lies in the cache.
template <class T>
struct Values {
  const T* from;
  int64_t stride, panel_stride;  // of keys, of kPanel columns
};

// output[i] = output[i] * old_weight[i] + (weights[i] . values) * new_weight[i] for the vectors [first, vecs) of columns.
template <class T, int NR, int NV>
SPECDEC_NOINLINE void weigh(const float* weights, Values<T> values, int64_t keys, int64_t first, int64_t vecs,
                            const float* old_weight, const float* new_weight, float* output, Fetch& fetch) {
  for (; first + NV <= vecs; first += NV) {
    Vec sums[NR][NV];
    multiply<T, false, NR, NV>(weights, kMaxKeys, values.from + panel_offset(first, values.panel_stride), values.stride,
                               values.panel_stride, keys, sums, fetch);
    for (int i = 0; i < NR; ++i)
      for (int v = 0; v < NV; ++v) {
        float* to = output + (i * vecs + first + v) * kLanes;
        store(to, fma(sums[i][v], set1(new_weight[i]), mul(load(to), set1(old_weight[i]))));
      }
  }
  if constexpr (NV > 1) {
    if (first < vecs) weigh<T, NR, NV / 2>(weights, values, keys, first, vecs, old_weight, new_weight, output, fetch);
  }
}

// Scores of one row become weights 2^(score - largest), zero where not visible. The sum is exact in units of 2^-23, hence the
// same for every order of the keys.
template <bool Capped>
SPECDEC_INLINE void softmax(float* row, int64_t vecs, const uint64_t* visible, const Scale& scale, float& largest, float& sum) {
  const Vec none = set1(-kInfinity);
  Vec top = none;
  for (int64_t v = 0; v < vecs; ++v) {
    Vec x = mul(load(row + v * kLanes), set1(scale.factor));
    if constexpr (Capped) x = mul(tanh(x), set1(scale.cap));
    if (visible != nullptr) x = select(visible[v * kLanes / 64] >> (v * kLanes % 64), x, none);
    store(row + v * kLanes, x);
    top = max(top, x);
  }
  largest = highest(top);
  const Vec base = set1(std::max(largest, kLowest)), one = set1(1.0f);
  Count counts = no_count();
  for (int64_t v = 0; v < vecs; ++v) {
    const Vec weight = exp2(sub(load(row + v * kLanes), base));
    counts = count(counts, add(weight, one));  // its bit pattern is that of 1.0 plus the weight in units of 2^-23
    store(row + v * kLanes, weight);
  }
  constexpr uint32_t bits_of_one = 0x3f800000u;
  sum = float(total(counts) - uint32_t(vecs * kLanes) * bits_of_one) * 0x1p-23f;
}

// The weights of two softmax parts in their union: 2^(maximum - common maximum), zero for an empty part. The first part
// becomes the union.
SPECDEC_INLINE void combine(int64_t rows, float* maxima, float* sums, const float* new_maxima, const float* new_sums,
                            float* old_weight, float* new_weight) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, rows - i);
    float part[4][kLanes] = {};
    const float* const from[4] = {maxima + i, sums + i, new_maxima + i, new_sums + i};
    for (int j = 0; j < 4; ++j) std::memcpy(part[j], from[j], lanes * sizeof(float));
    const Vec common = max(load(part[0]), load(part[2])), base = max(common, set1(kLowest));
    const Vec a = exp2(sub(load(part[0]), base)), b = exp2(sub(load(part[2]), base));
    store(part[1], fma(load(part[3]), b, mul(load(part[1]), a)));
    store(part[0], common);
    std::memcpy(maxima + i, part[0], lanes * sizeof(float));
    std::memcpy(sums + i, part[1], lanes * sizeof(float));
    store(part[0], a);
    store(part[1], b);
    std::memcpy(old_weight + i, part[0], lanes * sizeof(float));
    std::memcpy(new_weight + i, part[1], lanes * sizeof(float));
  }
}

// One block of keys for NR rows from `row` on, added to what they have.
template <class T, class V, int NR>
void attend_rows(const Unit& unit, const Block& block, int64_t row, const float* queries, const float* keys, Values<V> values,
                 const Partial& sum, Fetch& fetch) {
  const int64_t dim = unit.dim, stride = kPairs<T> ? dim / 2 : dim;
  uint64_t words[NR][kWords];
  const uint64_t* visible[NR];
  bool any = false;
  for (int i = 0; i < NR; ++i) any |= visible_keys(unit, block, row + i, i > 0 ? words[i - 1] : nullptr, words[i], visible[i]);
  if (!any) return;  // adds nothing, exactly

  alignas(64) float scores[NR * kMaxKeys];
  const int64_t vecs = (block.keys + kPanel - 1) / kPanel * kPanel / kLanes;
  queries += row * stride;
  score<kPairs<T>, false, NR, kVecs<NR>>(queries, stride, keys, std::min(stride, kChain), 0, vecs, scores, fetch);
  if (stride > kChain)
    score<kPairs<T>, true, NR, kVecs<NR>>(queries + kChain, stride, keys + kChain * kPanel, stride - kChain, 0, vecs, scores, fetch);
  float maxima[NR], sums[NR], old_weight[NR], new_weight[NR];
  for (int i = 0; i < NR; ++i) {
    if (unit.scale.cap > 0)
      softmax<true>(scores + i * kMaxKeys, vecs, visible[i], unit.scale, maxima[i], sums[i]);
    else
      softmax<false>(scores + i * kMaxKeys, vecs, visible[i], unit.scale, maxima[i], sums[i]);
  }
  combine(NR, sum.maxima + row, sum.sums + row, maxima, sums, old_weight, new_weight);
  weigh<V, NR, kVecs<NR>>(scores, values, block.keys, 0, dim / kLanes, old_weight, new_weight, sum.output + row * dim,
                     fetch);
}

template <class T, class V, int NR = kMaxRows>
void attend_group(int64_t rows, const Unit& unit, const Block& block, int64_t row, const float* queries, const float* keys,
                  Values<V> values, const Partial& sum, Fetch& fetch) {
  if constexpr (NR > 1) {
    if (rows < NR) return attend_group<T, V, NR - 1>(rows, unit, block, row, queries, keys, values, sum, fetch);
  }
  attend_rows<T, V, NR>(unit, block, row, queries, keys, values, sum, fetch);
}

template <class T, class V>
void attend_block(const Unit& unit, const Block& block, const float* queries, const float* keys, Values<V> values,
                  const Partial& sum, Fetch& fetch) {
  const int64_t groups = (unit.rows + kMaxRows - 1) / kMaxRows;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t row = unit.rows * group / groups, end = unit.rows * (group + 1) / groups;
    attend_group<T, V>(end - row, unit, block, row, queries, keys, values, sum, fetch);
  }
}

template <class T>
void pack_values(const T* values, int64_t stride, int64_t count, int64_t dim, float* panels) {
  for (int64_t key = 0; key < count; ++key)
    for (int64_t column = 0; column < dim; column += kPanel)
      for (int64_t lane = 0; lane < kPanel; lane += kLanes)
        store(panels + column * count + key * kPanel + lane, load(values + key * stride + column + lane));
}

template <class T>
void pack_queries(const Unit& unit, float* packed) {
  const int64_t dim = unit.dim;
  for (int64_t row = 0; row < unit.rows; ++row) {
    const T* from = static_cast<const T*>(query_of(unit, row, sizeof(T)));
    if constexpr (kPairs<T>)
      std::memcpy(packed + row * dim / 2, from, dim * sizeof(T));
    else
      for (int64_t d = 0; d < dim; d += kLanes) store(packed + row * dim + d, load(from + d));
  }
}

// What all tiles of a block tell Fetch::beside() together.
inline int64_t tile_work(int64_t rows, int64_t score_steps, int64_t dim) {
  if (rows > kFewRows) return (rows + kMaxRows - 1) / kMaxRows * (kBlock + dim) / kLanes;
  return (kBlock * ((score_steps + kFetchSteps - 1) / kFetchSteps) + dim * (kBlock / kFetchSteps)) / kLanes;
}

// The keys at the positions of one split, for all rows of the unit. `sum` is empty at first.
template <class T>
void attend_split(const Unit& unit, int64_t split, const Scratch& scratch, const Partial& sum) {
  const int64_t row_bytes = unit.dim * sizeof(T), first = split_begin(split) / kBlock, last = split_begin(split + 1) / kBlock;
  const Rows key_rows = {static_cast<const char*>(unit.keys), unit.key_stride * int64_t(sizeof(T))};
  const Rows value_rows = {static_cast<const char*>(unit.values), unit.value_stride * int64_t(sizeof(T))};
  const int64_t work = kPackWork * kBlock / 8 + tile_work(unit.rows, kPairs<T> ? unit.dim / 2 : unit.dim, unit.dim);
  for (int64_t i = first; i < last; ++i) {
    const Block block = make_block(unit, i);
    if (block.keys == 0) continue;
    const T* keys = static_cast<const T*>(unit.keys) + block.slot * unit.key_stride;
    const T* values = static_cast<const T*>(unit.values) + block.slot * unit.value_stride;
    if (i == first) Fetch(key_rows, value_rows, block.slot, row_bytes, 1).beside(1);
    Fetch fetch(key_rows, value_rows, block.slot + kBlock, row_bytes, work);
    pack_keys<T>(keys, unit.key_stride, block.keys, unit.dim, scratch.keys, fetch);
    if (unit.rows <= kMaxRows) {  // read once: they need not be packed
      attend_block<T, T>(unit, block, scratch.queries, scratch.keys, {values, unit.value_stride, kPanel}, sum, fetch);
    } else {
      pack_values<T>(values, unit.value_stride, block.keys, unit.dim, scratch.values);
      attend_block<T, float>(unit, block, scratch.queries, scratch.keys, {scratch.values, kPanel, block.keys * kPanel}, sum, fetch);
    }
  }
}

// Adds the later `part` to `sum`.
inline void merge(const Unit& unit, const Partial& part, const Partial& sum) {
  float old_weight[kLanes], new_weight[kLanes];
  for (int64_t row = 0; row < unit.rows; row += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, unit.rows - row);
    combine(rows, sum.maxima + row, sum.sums + row, part.maxima + row, part.sums + row, old_weight, new_weight);
    for (int64_t i = 0; i < rows; ++i) {
      float* to = sum.output + (row + i) * unit.dim;
      const float* from = part.output + (row + i) * unit.dim;
      for (int64_t d = 0; d < unit.dim; d += kLanes)
        store(to + d, fma(load(from + d), set1(new_weight[i]), mul(load(to + d), set1(old_weight[i]))));
    }
  }
}

// Output and log-sum-exp of the unit's rows.
template <class T>
void finish(const Unit& unit, const Partial& sum) {
  for (int64_t row = 0; row < unit.rows; ++row) {
    const bool empty = sum.maxima[row] == -kInfinity;
    const Vec factor = set1(empty ? 0.0f : 1.0f / sum.sums[row]);
    const int64_t to = output_row(unit, row);
    T* output = static_cast<T*>(unit.params->output) + to * unit.dim;
    for (int64_t d = 0; d < unit.dim; d += kLanes) store(output + d, mul(load(sum.output + row * unit.dim + d), factor));
    if (unit.params->lse != nullptr)
      unit.params->lse[to] = empty ? -kInfinity : sum.maxima[row] * kLn2 + std::log(sum.sums[row]);
  }
}

template <class T>
constexpr Kernel kernel() {
  return {pack_queries<T>, attend_split<T>, merge, finish<T>};
}
