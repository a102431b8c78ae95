// Runs specdec::Linear on cases read from stdin and compares it with a plain loop in double. One line a case:
//
//   dtype=bf16 rows=5 in=77 out=49 bias=1
//
// Every matrix lies in a heap block of its size; y is NaN before. The blocks of y are computed one call each, the last first.
// Exits with 1 if an error is too large.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdio>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include "specdec_linear.h"

namespace {

using specdec::DType;

template <class T>
bool run(const char* name, DType dtype, double tolerance, int rows, int in, int out, bool has_bias) {
  std::mt19937 random(rows * 7919 + in * 31 + out);
  std::normal_distribution<float> normal;
  const auto draw = [&](int64_t count) {
    std::vector<T> elements(count);
    for (T& element : elements) element = T(normal(random));
    return elements;
  };
  const std::vector<T> x = draw(rows * in), weight = draw(out * in), bias = draw(has_bias ? out : 0);
  std::vector<T> y(rows * out, T(NAN));
  const specdec::Linear linear({dtype, x.data(), weight.data(), has_bias ? bias.data() : nullptr, y.data(), rows, in, out});
  const specdec::Linear::Packed packed = linear.pack();
  for (int64_t block = linear.blocks(); block-- > 0;) linear.multiply(packed, block, block + 1);

  double squares = 0, norm = 0;
  for (int n = 0; n < rows; ++n)
    for (int m = 0; m < out; ++m) {
      double expected = has_bias ? float(bias[m]) : 0;
      for (int k = 0; k < in; ++k) expected += double(float(x[n * in + k])) * float(weight[m * in + k]);
      const double error = float(y[n * out + m]) - expected;
      squares += error * error;
      norm += expected * expected;
    }
  const bool good = std::sqrt(squares / norm) <= tolerance;  // false for NaN
  std::printf("%s isa=%s relative=%.2e dtype=%s rows=%d in=%d out=%d bias=%d\n", good ? "ok" : "WRONG", specdec::linear_isa(),
              std::sqrt(squares / norm), name, rows, in, out, has_bias);
  return good;
}

bool run(const std::string& line) {
  char dtype[5];
  int rows, in, out, bias;
  if (std::sscanf(line.c_str(), "dtype=%4s rows=%d in=%d out=%d bias=%d", dtype, &rows, &in, &out, &bias) != 5) return false;
  const std::string name = dtype;
  if (name == "fp32") return run<float>(dtype, DType::kFloat32, 1e-6, rows, in, out, bias);
  if (name == "fp16") return run<c10::Half>(dtype, DType::kFloat16, 5e-4, rows, in, out, bias);
  return name == "bf16" && run<c10::BFloat16>(dtype, DType::kBFloat16, 4e-3, rows, in, out, bias);
}

}  // namespace

int main() {
  bool good = true;
  for (std::string line; std::getline(std::cin, line);) good &= run(line);
  return good ? 0 : 1;
}
