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
  void (*pack)(const LinearArgs& args, void* packed, int64_t row_begin, int64_t row_end);
  void (*multiply)(const LinearArgs& args, const void* packed, int64_t out_begin, int64_t out_end);
};

// One call in two parallel steps: pack() every row of x, then multiply() every block of kBlock output features.
//
// Guarantee (batch invariance): y[n, m] is one fixed sequence of operations over k, whatever the number of rows, the tile that
// it falls into and the thread that runs it. A row's result is therefore the same bits alone or among others.
class Linear {
 public:
  static constexpr int64_t kBlock = 8;

  explicit Linear(const LinearArgs& args);

  int64_t blocks() const { return (args_.out_features + kBlock - 1) / kBlock; }
  void pack(int64_t row_begin, int64_t row_end) const;
  void multiply(int64_t block_begin, int64_t block_end) const;

 private:
  struct Free {
    void operator()(void* memory) const;
  };

  LinearArgs args_;
  const LinearKernel* kernel_;
  std::unique_ptr<void, Free> packed_;
};

// Name of the instruction set in use: "avx512_bf16", "avx512", "avx2" or "portable". SPECDEC_CPU_ISA, read at first use, may
// ask for a smaller one.
const char* linear_isa();

}  // namespace specdec
