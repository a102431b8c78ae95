// The kernel, included once for each instruction set from inside that set's namespace (hence no guard and no includes; see
// linear.cpp). The namespace provides
//   Vec, zero(), sum4(a, b, c, d)   sums in float; the sums over the lanes of four of them, each by the same tree of additions
//   Quad, add, load4, store4        four outputs in float, and from and to T
//   kMaxRows                        rows of x whose sums fit in registers beside 4 rows of weight
//   Format<T>                       kStep elements of T are kParts Operands: part<P>(elements); a row of x is kept as Packed:
//                                   load(), store(); fma(weight, x, Vec)

// sums[m][n] += w[m][k .. k + kStep] * x[n][k .. k + kStep], part by part.
template <class T, int MR, int NR, int P = 0>
SPECDEC_INLINE void step(const T* const (&w)[MR], const typename Format<T>::Packed* x, int64_t x_stride, int64_t k,
                         Vec (&sums)[MR][NR]) {
  using F = Format<T>;
  typename F::Operand xs[NR];
  for (int n = 0; n < NR; ++n) xs[n] = F::load(x + n * x_stride + k + P * (F::kStep / F::kParts));
  for (int n = 0; n < NR; ++n) keep(xs[n]);
  for (int m = 0; m < MR; ++m) {
    const typename F::Operand wm = F::template part<P>(w[m] + k);
    for (int n = 0; n < NR; ++n) sums[m][n] = F::fma(wm, xs[n], sums[m][n]);
  }
  if constexpr (P + 1 < F::kParts) step<T, MR, NR, P + 1>(w, x, x_stride, k, sums);
}

// What a tile fetches into the cache meanwhile, some lines a step: the weights of the next tile, which follow its own.
struct Ahead {
  const char* from;
  int64_t bytes_a_step;
};

// y[n, m] = w[m] . x[n] + bias[m] for MR rows of weight and NR packed rows of x; y's rows are kOutputs apart.
template <class T, int MR, int NR>
SPECDEC_NOINLINE void tile(const T* const (&w)[MR], const typename Format<T>::Packed* x, int64_t x_stride, int64_t in_features,
                         const float* bias, T* y, Ahead ahead) {
  using F = Format<T>;
  Vec sums[MR][NR];
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) sums[m][n] = zero();

  const int64_t full = in_features / F::kStep * F::kStep;
  for (int64_t k = 0; k < full; k += F::kStep) {
    for (const char* stop = ahead.from + ahead.bytes_a_step; ahead.from < stop; ahead.from += kLine)
      __builtin_prefetch(ahead.from);
    step<T, MR, NR>(w, x, x_stride, k, sums);
  }
  if (full < in_features) {
    T rest[MR][F::kStep] = {};
    const T* rests[MR];
    for (int m = 0; m < MR; ++m) {
      std::memcpy(rest[m], w[m] + full, (in_features - full) * sizeof(T));
      rests[m] = rest[m];
    }
    step<T, MR, NR>(rests, x + full, x_stride, 0, sums);
  }

  for (int m = 0; m < MR; m += 4)
    for (int n = 0; n < NR; ++n)
      store4(y + n * kOutputs + m,
             add(sum4(sums[m][n], sums[m + 1][n], sums[m + 2][n], sums[m + 3][n]), load4(bias + m)));
}

// A tile of `rows` <= NR rows of x.
template <class T, int MR, int NR>
SPECDEC_INLINE void tile_of(int64_t rows, const T* const (&w)[MR], const typename Format<T>::Packed* x, int64_t x_stride,
                            int64_t in_features, const float* bias, T* y, Ahead ahead) {
  if constexpr (NR > 1) {
    if (rows < NR) return tile_of<T, MR, NR - 1>(rows, w, x, x_stride, in_features, bias, y, ahead);
  }
  tile<T, MR, NR>(w, x, x_stride, in_features, bias, y, ahead);
}

template <class T>
int64_t packed_stride(const LinearArgs& args) {
  constexpr int64_t step = Format<T>::kStep;
  return (args.in_features + step - 1) / step * step;
}

// y[first_row : first_row + rows, out : out + count] for count <= kOutputs, MR outputs and up to NR rows at a time.
template <class T, int MR, int NR>
void multiply_block(const LinearArgs& args, const void* packed, int64_t first_row, int64_t rows, int64_t out, int64_t count) {
  using F = Format<T>;
  const int64_t x_stride = packed_stride<T>(args), groups = (rows + NR - 1) / NR;
  const auto* x = static_cast<const typename F::Packed*>(packed) + first_row * x_stride;
  constexpr int64_t step_bytes = MR * F::kStep * sizeof(T);
  const int64_t tile_bytes = MR * args.in_features * sizeof(T);
  const int64_t fetchers = std::min<int64_t>(groups, step_bytes < 2 * kLine ? 1 : 2);
  float bias[kOutputs] = {};
  if (args.bias != nullptr)
    for (int64_t m = 0; m < count; ++m) bias[m] = float(static_cast<const T*>(args.bias)[out + m]);

  T block[kRowsOfBlock * kOutputs];  // whole lines of y are written at once: its rows may share one set of the cache
  for (int64_t done = 0; done < count; done += MR) {
    const T* w[MR];
    for (int m = 0; m < MR; ++m)  // past the last row: the first again, not stored
      w[m] = static_cast<const T*>(args.weight) + (out + done + (done + m < count ? m : 0)) * args.in_features;
    const char* next = reinterpret_cast<const char*>(w[0] + MR * args.in_features);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = rows * group / groups, size = rows * (group + 1) / groups - begin;
      const bool fetches = first_row == 0 && group < fetchers;
      const Ahead ahead = {next + group * (tile_bytes / fetchers), fetches ? step_bytes / fetchers : 0};
      tile_of<T, MR, NR>(size, w, x + begin * x_stride, x_stride, args.in_features, bias + done,
                         block + begin * kOutputs + done, ahead);
    }
  }
  for (int64_t n = 0; n < rows; ++n)
    std::memcpy(static_cast<T*>(args.y) + (first_row + n) * args.out_features + out, block + n * kOutputs, count * sizeof(T));
}

// y[:, out_begin:out_end]
template <class T>
void multiply(const LinearArgs& args, const void* packed, int64_t out_begin, int64_t out_end) {
  const int64_t row_bytes = packed_stride<T>(args) * sizeof(typename Format<T>::Packed);
  const int64_t fitting = std::clamp<int64_t>(kCacheForX / std::max<int64_t>(1, row_bytes), 4 * kMaxRows, kRowsOfBlock);
  const int64_t blocks = (args.rows + fitting - 1) / fitting;
  for (int64_t out = out_begin; out < out_end; out += kOutputs) {
    const int64_t count = std::min<int64_t>(kOutputs, out_end - out);
    if (args.rows == 1) {  // 8 sums in flight hide the latency of an addition, 4 do not
      multiply_block<T, 8, 1>(args, packed, 0, 1, out, count);
      continue;
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = args.rows * block / blocks, rows = args.rows * (block + 1) / blocks - first;
      multiply_block<T, 4, kMaxRows>(args, packed, first, rows, out, count);
    }
  }
}

template <class T, int P = 0>
SPECDEC_INLINE void pack_step(const T* from, typename Format<T>::Packed* to) {
  using F = Format<T>;
  F::store(to + P * (F::kStep / F::kParts), F::template part<P>(from));
  if constexpr (P + 1 < F::kParts) pack_step<T, P + 1>(from, to);
}

// Rows of x as the kernel reads them: the parts of each step one after another, zeros up to the end of the last step.
template <class T>
void pack(const LinearArgs& args, void* packed, int64_t row_begin, int64_t row_end) {
  using F = Format<T>;
  const int64_t full = args.in_features / F::kStep * F::kStep, stride = packed_stride<T>(args);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* from = static_cast<const T*>(args.x) + row * args.in_features;
    auto* to = static_cast<typename F::Packed*>(packed) + row * stride;
    for (int64_t k = 0; k < full; k += F::kStep) pack_step<T>(from + k, to + k);
    if (full < args.in_features) {
      T rest[F::kStep] = {};
      std::memcpy(rest, from + full, (args.in_features - full) * sizeof(T));
      pack_step<T>(rest, to + full);
    }
  }
}

template <class T>
constexpr LinearKernel kernel() {
  return {Format<T>::kStep, sizeof(typename Format<T>::Packed), pack<T>, multiply<T>};
}
