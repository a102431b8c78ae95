// torch.ops.specdec.linear over csrc/cpu/linear.cpp, by torch's stable ABI: one build serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "specdec_linear.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPackGrain = 32768;     // elements of x that are worth a thread
constexpr int64_t kMultiplyGrain = 32768;  // products that are worth a thread
constexpr int64_t kChunksPerThread = 8;   // of unequal speed: a thread takes its next chunk when it is done with one

specdec::DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return specdec::DType::kFloat32;
    case ScalarType::Half:
      return specdec::DType::kFloat16;
    case ScalarType::BFloat16:
      return specdec::DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "specdec::linear: x must be float32, float16 or bfloat16");
  }
}

void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() >= 1, "specdec::linear: x must have at least one dimension");
  STD_TORCH_CHECK(weight.dim() == 2, "specdec::linear: weight must be [out_features, in_features]");
  STD_TORCH_CHECK(x.is_cpu() && weight.is_cpu(), "specdec::linear: x and weight must be on the CPU");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "specdec::linear: x and weight must have one dtype");
  STD_TORCH_CHECK(weight.is_contiguous(), "specdec::linear: weight must be contiguous");
  STD_TORCH_CHECK(x.size(x.dim() - 1) == weight.size(1), "specdec::linear: the last dimension of x must be weight.size(1)");
  if (!bias) return;
  STD_TORCH_CHECK(bias->is_cpu() && bias->is_contiguous() && bias->scalar_type() == x.scalar_type() && bias->dim() == 1 &&
                      bias->size(0) == weight.size(0),
                  "specdec::linear: bias must be a contiguous CPU tensor [out_features] of x's dtype");
}

// Runs body(begin, end) over [0, count) in chunks that torch's threads take in turn.
template <class Body>
void parallel_chunks(int64_t count, int64_t chunk, const Body& body) {
  const int64_t chunks = (count + chunk - 1) / chunk;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(chunks, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      body(i * chunk, std::min(count, (i + 1) * chunk));
  });
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  check(x, weight, bias);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const int64_t in_features = weight.size(1), out_features = weight.size(0);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  Tensor y = torch::stable::new_empty(x, shape);
  if (y.numel() == 0) return y;

  const specdec::LinearArgs args = {.dtype = dtype_of(x),
                                    .x = x.data_ptr(),
                                    .weight = weight.data_ptr(),
                                    .bias = bias ? bias->data_ptr() : nullptr,
                                    .y = y.data_ptr(),
                                    .rows = y.numel() / out_features,
                                    .in_features = in_features,
                                    .out_features = out_features};
  const specdec::Linear call(args);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t row_grain = std::max<int64_t>(1, kPackGrain / std::max<int64_t>(1, in_features));
  torch::stable::parallel_for(0, args.rows, row_grain, [&](int64_t begin, int64_t end) { call.pack(begin, end); });
  const int64_t block_work = specdec::Linear::kBlock * in_features * args.rows;
  const int64_t chunk = std::max((call.blocks() + threads * kChunksPerThread - 1) / (threads * kChunksPerThread),
                                 kMultiplyGrain / std::max<int64_t>(1, block_work));
  parallel_chunks(call.blocks(), std::max<int64_t>(1, chunk), [&](int64_t begin, int64_t end) { call.multiply(begin, end); });
  return y;
}

std::string linear_isa() { return specdec::linear_isa(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specdec, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("linear_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(specdec, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

STABLE_TORCH_LIBRARY_IMPL(specdec, CompositeExplicitAutograd, m) { m.impl("linear_isa", TORCH_BOX(&linear_isa)); }
