// The kernel, included once for each instruction set from inside that set's namespace (hence no guard and no includes; see
// linear.cpp). The namespace provides
//   Vec, zero(), sum4(a, b, c, d)   sums in float; the sums over the lanes of four of them, each by the same tree of additions
//   Quad, add, load4, store4        four outputs in float, and from and to float and T; transpose(Quad[4])
//   kTileOutputs, kTileRows         rows of weight and of x whose sums fit in registers beside the former's operands and one of x
//   Format<T>                       kStep elements of T are kParts Operands: part<P>(elements); a row of x is kept as Packed:
//                                   load(), store(); fma(weight, x, Vec). Where there is a faster way to part<P> of several
//                                   rows, parts<P>(rows, k, operands), which may read the element before row + k. Where some
//                                   shapes of tile are better done as a whole, tile<MR, NR>(), for a multiple of kTileStep

template <class T>
constexpr bool kHasParts = requires(const T* const (&w)[1], typename Format<T>::Operand (&to)[1]) {
  Format<T>::template parts<0>(w, 0, to);
};

template <class T, int MR, int NR>
constexpr bool kHasTile = requires(const T* const (&w)[MR]) { Format<T>::template tile<MR, NR>(w, nullptr, 0, 0, nullptr, Ahead{}); };

// sums[n][m] += w[m][k .. k + kStep] * x[n][k .. k + kStep], part by part. kFirst: nothing before w[m] + k may be read.
template <class T, int MR, int NR, bool kFirst, int P = 0>
SPECDEC_INLINE void step(const T* const (&w)[MR], const typename Format<T>::Packed* x, int64_t x_stride, int64_t k,
                         Vec (&sums)[NR][MR]) {
  using F = Format<T>;
  const typename F::Packed* xk = x + k + P * (F::kStep / F::kParts);
  if constexpr (NR == 1 && !kHasParts<T>) {  // each weight is used once: none is held
    const typename F::Operand xn = F::load(xk);
    SPECDEC_UNROLL
    for (int m = 0; m < MR; ++m) sums[0][m] = F::fma(F::template part<P>(w[m] + k), xn, sums[0][m]);
  } else {
    typename F::Operand ws[MR];
    if constexpr (kHasParts<T> && !kFirst) {
      F::template parts<P>(w, k, ws);
    } else {
      SPECDEC_UNROLL
      for (int m = 0; m < MR; ++m) ws[m] = F::template part<P>(w[m] + k);
    }
    SPECDEC_UNROLL
    for (int n = 0; n < NR; ++n) {
      const typename F::Operand xn = F::load(xk + n * x_stride);
      SPECDEC_UNROLL
      for (int m = 0; m < MR; ++m) sums[n][m] = F::fma(ws[m], xn, sums[n][m]);
    }
  }
  if constexpr (P + 1 < F::kParts) step<T, MR, NR, kFirst, P + 1>(w, x, x_stride, k, sums);
}

// to[n * MR + m] = the sum over the lanes of sums[n][m]. By recursion: a loop would keep the sums in memory.
template <int MR, int NR, int I = 0>
SPECDEC_INLINE void reduce(const Vec (&sums)[NR][MR], float* to) {
  constexpr int kLast = MR * NR - 1, J = std::min(I + 1, kLast), K = std::min(I + 2, kLast), L = std::min(I + 3, kLast);
  store4(to + I, sum4(sums[I / MR][I % MR], sums[J / MR][J % MR], sums[K / MR][K % MR], sums[L / MR][L % MR]));
  if constexpr (I + 4 <= kLast) reduce<MR, NR, I + 4>(sums, to);
}

// y[m * y_stride + n] = w[m] . x[n] for MR rows of weight and NR packed rows of x.
template <class T, int MR, int NR>
SPECDEC_NOINLINE void tile(const T* const (&w)[MR], const typename Format<T>::Packed* x, int64_t x_stride, int64_t in_features,
                           float* y, int64_t y_stride, Ahead ahead) {
  using F = Format<T>;
  constexpr int64_t kLines = (MR * F::kStep * sizeof(T) + kLine - 1) / kLine;
  Vec sums[NR][MR];
  SPECDEC_UNROLL
  for (int n = 0; n < NR; ++n) {
    SPECDEC_UNROLL
    for (int m = 0; m < MR; ++m) sums[n][m] = zero();
  }

  const int64_t full = in_features / F::kStep * F::kStep;
  if (full > 0) step<T, MR, NR, true>(w, x, x_stride, 0, sums);
  for (int64_t k = F::kStep; k < full; k += F::kStep) {
    for (int64_t line = 0; line < kLines; ++line) __builtin_prefetch(ahead.from + line * kLine);
    ahead.from += ahead.bytes_a_step;
    step<T, MR, NR, false>(w, x, x_stride, k, sums);
  }
  if (full < in_features) {
    T rest[MR][F::kStep] = {};
    const T* rests[MR];
    for (int m = 0; m < MR; ++m) {
      std::memcpy(rest[m], w[m] + full, (in_features - full) * sizeof(T));
      rests[m] = rest[m];
    }
    step<T, MR, NR, true>(rests, x + full, x_stride, 0, sums);
  }

  float flat[(MR * NR + 3) / 4 * 4];
  reduce<MR, NR>(sums, flat);
  for (int n = 0; n < NR; ++n)
    for (int m = 0; m < MR; ++m) y[m * y_stride + n] = flat[n * MR + m];
}

// A tile of `rows` <= NR rows of x; `many`: of so many that products take longer than reading the weights.
template <class T, int MR, int NR>
SPECDEC_INLINE void tile_of(int64_t rows, bool many, const T* const (&w)[MR], const typename Format<T>::Packed* x, int64_t x_stride,
                            int64_t in_features, float* y, Ahead ahead) {
  if constexpr (NR > 1) {
    if (rows < NR) return tile_of<T, MR, NR - 1>(rows, many, w, x, x_stride, in_features, y, ahead);
  }
  if constexpr (kHasTile<T, MR, NR>) {
    if (many && in_features % Format<T>::kTileStep == 0) return Format<T>::template tile<MR, NR>(w, x, x_stride, in_features, y, ahead);
  }
  tile<T, MR, NR>(w, x, x_stride, in_features, y, kRowStride, ahead);
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
  const T* weight = static_cast<const T*>(args.weight) + out * args.in_features;
  const int64_t tile_bytes = MR * args.in_features * sizeof(T);
  const int64_t bytes_a_step = first_row == 0 ? MR * F::kStep * sizeof(T) / groups : 0;

  int64_t begins[kRowsOfBlock + 1];
  for (int64_t group = 0; group <= groups; ++group) begins[group] = rows * group / groups;
  const int64_t share = tile_bytes / groups;
  float sums[kOutputs * kRowStride];  // [output, row]; of a single row [output]
  for (int64_t done = 0; done < count; done += MR) {
    const T* w[MR];
    for (int m = 0; m < MR; ++m)  // past the last row: the last again, not stored
      w[m] = weight + std::min(done + m, count - 1) * args.in_features;
    const char* next = reinterpret_cast<const char*>(w[0]) + tile_bytes;
    if constexpr (NR == 1) {
      tile<T, MR, 1>(w, x, x_stride, args.in_features, sums + done, 1, {next, bytes_a_step});
      continue;
    }
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = begins[group];
      tile_of<T, MR, NR>(begins[group + 1] - begin, args.rows > kTileRows, w, x + begin * x_stride, x_stride, args.in_features,
                         sums + done * kRowStride + begin, {next + group * share, bytes_a_step});
    }
  }

  float bias[kOutputs] = {};
  if (args.bias != nullptr)
    for (int64_t m = 0; m < count; ++m) bias[m] = float(static_cast<const T*>(args.bias)[out + m]);
  for (int64_t n = 0; n < rows; n += 4) {
    for (int64_t m = 0; m < count; m += 4) {
      Quad quads[4];
      if constexpr (NR == 1) {
        quads[0] = load4(sums + m);
      } else {
        for (int i = 0; i < 4; ++i) quads[i] = load4(sums + (m + i) * kRowStride + n);
        transpose(quads);
      }
      for (int64_t i = 0; i < std::min<int64_t>(4, rows - n); ++i) {
        T* y = static_cast<T*>(args.y) + (first_row + n + i) * args.out_features + out + m;
        T line[4];
        store4(m + 4 <= count ? y : line, add(quads[i], load4(bias + m)));
        if (m + 4 > count) std::memcpy(y, line, (count - m) * sizeof(T));
      }
    }
  }
}

// y[:, out_begin:out_end]
template <class T>
void multiply(const LinearArgs& args, const void* packed, int64_t out_begin, int64_t out_end) {
  const int64_t row_bytes = packed_stride<T>(args) * sizeof(typename Format<T>::Packed);
  const int64_t fitting = std::clamp<int64_t>(kCacheForX / std::max<int64_t>(1, row_bytes), 4 * kTileRows, kRowsOfBlock);
  const int64_t blocks = (args.rows + fitting - 1) / fitting;
  for (int64_t out = out_begin; out < out_end; out += kOutputs) {
    const int64_t count = std::min<int64_t>(kOutputs, out_end - out);
    if (args.rows == 1) {
      multiply_block<T, 4, 1>(args, packed, 0, 1, out, count);
      continue;
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = args.rows * block / blocks, rows = args.rows * (block + 1) / blocks - first;
      if constexpr (kHasTile<T, 2, 5>) {  // else in groups of two or three, which load more for a product
        if (rows == 5 || rows == 9 || rows == 10) {
          multiply_block<T, 2, 5>(args, packed, first, rows, out, count);
          continue;
        }
      }
      multiply_block<T, kTileOutputs, kTileRows>(args, packed, first, rows, out, count);
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
void pack(const LinearArgs& args, void* packed) {
  using F = Format<T>;
  const int64_t full = args.in_features / F::kStep * F::kStep, stride = packed_stride<T>(args);
  for (int64_t row = 0; row < args.rows; ++row) {
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
