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

// Outputs [NR, MR] from MR rows of weight and NR packed rows of x, of which the first `count` columns are stored.
template <class T, int MR, int NR>
SPECDEC_INLINE void tile(const LinearArgs& args, int64_t out, int64_t count, const typename Format<T>::Packed* x,
                         int64_t x_stride, T* y, bool prefetch) {
  using F = Format<T>;
  const T* w[MR];
  for (int m = 0; m < MR; ++m)  // past the last row: that row again, not stored
    w[m] = static_cast<const T*>(args.weight) + (m < count ? out + m : out) * args.in_features;
  Vec sums[MR][NR];
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) sums[m][n] = zero();

  const int64_t full = args.in_features / F::kStep * F::kStep, ahead = MR * args.in_features;
  for (int64_t k = 0; k < full; k += F::kStep) {
    if (prefetch)
      for (int m = 0; m < MR; ++m) __builtin_prefetch(w[m] + ahead + k);
    step<T, MR, NR>(w, x, x_stride, k, sums);
  }
  if (full < args.in_features) {
    T rest[MR][F::kStep] = {};
    const T* rests[MR];
    for (int m = 0; m < MR; ++m) {
      std::memcpy(rest[m], w[m] + full, (args.in_features - full) * sizeof(T));
      rests[m] = rest[m];
    }
    step<T, MR, NR>(rests, x + full, x_stride, 0, sums);
  }

  for (int m = 0; m < MR && m < count; m += 4) {
    const int64_t used = count - m < 4 ? count - m : 4;
    Quad bias;
    if (args.bias != nullptr) {
      T four[4] = {};
      std::memcpy(four, static_cast<const T*>(args.bias) + out + m, used * sizeof(T));
      bias = load4(four);
    }
    for (int n = 0; n < NR; ++n) {
      Quad quad = sum4(sums[m][n], sums[m + 1][n], sums[m + 2][n], sums[m + 3][n]);
      if (args.bias != nullptr) quad = add(quad, bias);
      T* to = y + n * args.out_features + out + m;
      if (used == 4) {
        store4(to, quad);
      } else {
        T four[4];
        store4(four, quad);
        std::memcpy(to, four, used * sizeof(T));
      }
    }
  }
}

// A tile of 4 rows of weight and `rows` <= NR rows of x.
template <class T, int NR>
SPECDEC_INLINE void tile_of(int64_t rows, const LinearArgs& args, int64_t out, int64_t count,
                            const typename Format<T>::Packed* x, int64_t x_stride, T* y, bool prefetch) {
  if constexpr (NR > 1) {
    if (rows < NR) return tile_of<T, NR - 1>(rows, args, out, count, x, x_stride, y, prefetch);
  }
  tile<T, 4, NR>(args, out, count, x, x_stride, y, prefetch);
}

template <class T>
int64_t packed_stride(const LinearArgs& args) {
  constexpr int64_t step = Format<T>::kStep;
  return (args.in_features + step - 1) / step * step;
}

// y[:, out_begin:out_end]
template <class T>
void multiply(const LinearArgs& args, const void* packed, int64_t out_begin, int64_t out_end) {
  const auto* x = static_cast<const typename Format<T>::Packed*>(packed);
  const int64_t x_stride = packed_stride<T>(args);
  T* y = static_cast<T*>(args.y);
  if (args.rows == 1) {  // 8 sums in flight hide the latency of an addition, 4 do not
    for (int64_t out = out_begin; out < out_end; out += 8)
      tile<T, 8, 1>(args, out, out_end - out, x, x_stride, y, out + 16 <= out_end);
    return;
  }
  const int64_t groups = (args.rows + kMaxRows - 1) / kMaxRows;
  for (int64_t out = out_begin; out < out_end; out += 4) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = args.rows * group / groups, rows = args.rows * (group + 1) / groups - first;
      tile_of<T, kMaxRows>(rows, args, out, out_end - out, x + first * x_stride, x_stride, y + first * args.out_features,
                           group == 0 && out + 8 <= out_end);
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
