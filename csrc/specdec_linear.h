// y = x @ weight.T (+ bias) for few rows on a CPU: what csrc/binding.cpp needs of csrc/cpu/linear.cpp. No torch here.
#pragma once

#include <cstdint>
#include <memory>

namespace specdec {

enum class DType { kFloat32, kFloat16, kBFloat16 };

// One call. x, weight, bias and y share one dtype; every matrix is row-major and contiguous.
struct LinearArgs {
  DType dtype;
  const void* x;       // [rows, in_features]
  const void* weight;  // [out_features, in_features]
  const void* bias;    // [out_features] or nullptr
  void* y;             // [rows, out_features]
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
};

// The functions of one instruction set and one dtype.
struct LinearKernel {
  int64_t step;       // a packed row is padded with zeros to a multiple of this many elements
  int64_t item_size;  // bytes of an element of a packed row
  void (*pack)(const LinearArgs& args, void* packed);
  void (*multiply)(const LinearArgs& args, const void* packed, int64_t out_begin, int64_t out_end);
};

// One call: each thread packs every row of x for itself, then multiplies blocks of kBlock output features. A copy of x in each
// thread's own cache costs less than a second parallel region and than lines that go from core to core.
//
// Guarantee (batch invariance): y[n, m] is one fixed sequence of operations over k, whatever the number of rows, the tile that
// it falls into and the thread that runs it. A row's result is therefore the same bits alone or among others.
class Linear {
 public:
  struct Free {
    void operator()(void* memory) const;
  };
  using Packed = std::unique_ptr<void, Free>;

  static constexpr int64_t kBlock = 24;  // whole tiles of 3 and of 4 outputs

  explicit Linear(const LinearArgs& args);

  int64_t blocks() const { return (args_.out_features + kBlock - 1) / kBlock; }
  Packed pack() const;
  void multiply(const Packed& packed, int64_t block_begin, int64_t block_end) const;

 private:
  LinearArgs args_;
  const LinearKernel* kernel_;
};

// Name of the instruction set in use: "avx512_bf16", "avx512", "avx2" or "portable". SPECDEC_CPU_ISA, read at first use, may
// ask for a smaller one.
const char* linear_isa();

}  // namespace specdec
