// torch.ops.specdec.linear and tree_attention over csrc/cpu, by torch's stable ABI: one build serves every torch from 2.10 on.
#ifdef SPECDEC_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "specdec_linear.h"
#include "tree_attention.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMultiplyGrain = 32768;  // products that are worth a thread
constexpr int64_t kChunksPerThread = 16;    // of unequal speed: a thread that is done takes chunks of the others

// SPECDEC_FLOAT32, ... of `x`, which the message calls `name`.
int32_t dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return SPECDEC_FLOAT32;
    case ScalarType::Half:
      return SPECDEC_FLOAT16;
    case ScalarType::BFloat16:
      return SPECDEC_BFLOAT16;
    default:
      STD_TORCH_CHECK(false, "specdec::", name, " must be float32, float16 or bfloat16");
  }
}
static_assert(int(specdec::DType::kFloat32) == SPECDEC_FLOAT32 && int(specdec::DType::kFloat16) == SPECDEC_FLOAT16 &&
              int(specdec::DType::kBFloat16) == SPECDEC_BFLOAT16);

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

// Runs body(prepared, begin, end) over [0, count) in chunks, each of torch's threads with its own prepare(). A thread takes the
// chunks of its own stretch one after another, so that it uses what it has fetched ahead, and then what is left of the others'.
template <class Prepare, class Body>
void parallel_chunks(int64_t count, int64_t chunk, const Prepare& prepare, const Body& body) {
  struct alignas(64) Stretch {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t chunks = (count + chunk - 1) / chunk;
  const int64_t workers = std::min<int64_t>(chunks, torch::stable::get_num_threads());
  std::vector<Stretch> stretches(workers);
  for (int64_t i = 0; i < workers; ++i) {
    stretches[i].next.store(chunks * i / workers, std::memory_order_relaxed);
    stretches[i].end = chunks * (i + 1) / workers;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    const auto prepared = prepare();
    for (int64_t i = 0; i < workers; ++i) {
      Stretch& stretch = stretches[(worker + i) % workers];
      for (int64_t c; (c = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;)
        body(prepared, c * chunk, std::min(count, (c + 1) * chunk));
    }
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

  const specdec::LinearArgs args = {.dtype = specdec::DType(dtype_of(x, "linear: x")),
                                    .x = x.data_ptr(),
                                    .weight = weight.data_ptr(),
                                    .bias = bias ? bias->data_ptr() : nullptr,
                                    .y = y.data_ptr(),
                                    .rows = y.numel() / out_features,
                                    .in_features = in_features,
                                    .out_features = out_features};
  const specdec::Linear call(args);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t block_work = specdec::Linear::kBlock * in_features * args.rows;
  const int64_t chunk = std::max((call.blocks() + threads * kChunksPerThread - 1) / (threads * kChunksPerThread),
                                 kMultiplyGrain / std::max<int64_t>(1, block_work));
  parallel_chunks(
      call.blocks(), std::max<int64_t>(1, chunk), [&] { return call.pack(); },
      [&](const specdec::Linear::Packed& packed, int64_t begin, int64_t end) { call.multiply(packed, begin, end); });
  return y;
}

std::string linear_isa() { return specdec::linear_isa(); }

// ---- tree_attention ----------------------------------------------------------------------------------------------------

#define CHECK_ARGUMENT(condition, ...) STD_TORCH_CHECK(condition, "specdec::tree_attention: ", __VA_ARGS__)

void check_matrix(const Tensor& x, const char* name, const Tensor& query) {
  CHECK_ARGUMENT(x.dim() == 4, name, " must have 4 dimensions, has ", x.dim());
  CHECK_ARGUMENT(x.get_device_index() == query.get_device_index() && x.is_cpu() == query.is_cpu(), name, " must be on query's device");
  CHECK_ARGUMENT(x.scalar_type() == query.scalar_type(), name, " must have query's dtype");
  CHECK_ARGUMENT(x.size(0) == query.size(0), name, " has ", x.size(0), " rows, query ", query.size(0));
  CHECK_ARGUMENT(x.size(3) == query.size(3), name, " has head dimension ", x.size(3), ", query ", query.size(3));
  CHECK_ARGUMENT(x.stride(3) == 1 || x.size(3) == 1, name, " must be contiguous in its last dimension");
}

void check_integers(const Tensor& x, const char* name, std::initializer_list<int64_t> shape, const Tensor& query) {
  CHECK_ARGUMENT(x.scalar_type() == ScalarType::Int && x.is_contiguous(), name, " must be a contiguous int32 tensor");
  CHECK_ARGUMENT(x.get_device_index() == query.get_device_index() && x.is_cpu() == query.is_cpu(), name, " must be on query's device");
  const auto sizes = x.sizes();
  const bool fits = std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
  if (fits) return;
  std::string wanted;
  for (const int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  CHECK_ARGUMENT(false, name, " must be [", wanted, "]");
}

void check_launch(int code, const TreeAttentionParams& p) {
  switch (code) {
    case SPECDEC_OK:
      return;
    case SPECDEC_BAD_QUERY_HEADS:
      CHECK_ARGUMENT(false, "query has ", p.query_heads, " heads, which is not a multiple of key_cache's ", p.kv_heads);
    case SPECDEC_BAD_KV_HEADS:
      CHECK_ARGUMENT(false, "key_cache has no heads");
    case SPECDEC_BAD_NODES:
      CHECK_ARGUMENT(false, "query has ", p.nodes, " nodes, the op takes 1 to ", int(SPECDEC_MAX_NODES));
    case SPECDEC_BAD_HEAD_DIM:
      CHECK_ARGUMENT(false, "query has head dimension ", p.head_dim, ", for which there is no kernel");
    case SPECDEC_BAD_PREFIX_LENGTHS:
      CHECK_ARGUMENT(false, "prefix_lengths: P < 0, or P + n is more than the cache's ", p.slots, " slots");
    case SPECDEC_BAD_NODE_COUNTS:
      CHECK_ARGUMENT(false, "node_counts must be in 0..", p.nodes);
    case SPECDEC_BAD_DEPTHS:
      CHECK_ARGUMENT(false, "depths of the nodes must be in 0..", p.nodes - 1);
    case SPECDEC_BAD_SCALE:
      CHECK_ARGUMENT(false, "scale must be finite");
    case SPECDEC_BAD_SOFTCAP:
      CHECK_ARGUMENT(false, "softcap must be finite and at least 0");
    case SPECDEC_BAD_WINDOW:
      CHECK_ARGUMENT(false, "window must be at least 0");
    case SPECDEC_BAD_SLOTS:
      CHECK_ARGUMENT(false, "key_cache has ", p.slots, " slots, which the op does not take");
    case SPECDEC_BAD_BATCH:
      CHECK_ARGUMENT(false, "query has ", p.batch, " rows, which the op does not take");
    case SPECDEC_BAD_QUERY:
      CHECK_ARGUMENT(false, "query must be aligned to 16 bytes, its strides too");
    case SPECDEC_BAD_KEY_CACHE:
      CHECK_ARGUMENT(false, "key_cache must be aligned to 16 bytes, its strides too");
    case SPECDEC_BAD_VALUE_CACHE:
      CHECK_ARGUMENT(false, "value_cache must be aligned to 16 bytes, its strides too");
    default:
      CHECK_ARGUMENT(code < 0, "the launch failed with CUDA error ", code);
      CHECK_ARGUMENT(false, "refused by the launcher with code ", code);
  }
}

// The C struct of a call, but for the output and what is the device's own.
TreeAttentionParams attention_params(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& prefix_lengths,
                                     const Tensor& node_counts, const Tensor& ancestor_mask, const Tensor& depths, double scale,
                                     double softcap, int64_t window) {
  const int32_t dtype = dtype_of(query, "tree_attention: query");
  check_matrix(query, "query", query);
  check_matrix(keys, "key_cache", query);
  check_matrix(values, "value_cache", query);
  CHECK_ARGUMENT(values.size(1) == keys.size(1), "value_cache has ", values.size(1), " heads, key_cache ", keys.size(1));
  CHECK_ARGUMENT(values.size(2) == keys.size(2), "value_cache has ", values.size(2), " slots, key_cache ", keys.size(2));
  const int64_t batch = query.size(0), nodes = query.size(2);
  check_integers(prefix_lengths, "prefix_lengths", {batch}, query);
  check_integers(node_counts, "node_counts", {batch}, query);
  check_integers(ancestor_mask, "ancestor_mask", {batch, nodes, (nodes + 31) / 32}, query);
  check_integers(depths, "depths", {batch, nodes}, query);
  return {.struct_size = sizeof(TreeAttentionParams),
          .query = query.data_ptr(),
          .key_cache = keys.data_ptr(),
          .value_cache = values.data_ptr(),
          .prefix_lengths = static_cast<const int32_t*>(prefix_lengths.data_ptr()),
          .node_counts = static_cast<const int32_t*>(node_counts.data_ptr()),
          .ancestor_mask = static_cast<const int32_t*>(ancestor_mask.data_ptr()),
          .depths = static_cast<const int32_t*>(depths.data_ptr()),
          .query_strides = {query.stride(0), query.stride(1), query.stride(2)},
          .key_strides = {keys.stride(0), keys.stride(1), keys.stride(2)},
          .value_strides = {values.stride(0), values.stride(1), values.stride(2)},
          .dtype = dtype,
          .batch = int32_t(batch),
          .query_heads = int32_t(query.size(1)),
          .kv_heads = int32_t(keys.size(1)),
          .nodes = int32_t(nodes),
          .slots = int32_t(keys.size(2)),
          .head_dim = int32_t(query.size(3)),
          .window = int32_t(std::clamp<int64_t>(window, -1, INT32_MAX)),
          .scale = float(scale),
          .softcap = float(softcap)};
}

// Output and log-sum-exp of a call, entered in its struct.
std::tuple<Tensor, Tensor> new_outputs(const Tensor& query, TreeAttentionParams& params) {
  const int64_t batch = params.batch, nodes = params.nodes, heads = params.query_heads;
  Tensor output = torch::stable::new_empty(query, {batch, nodes, heads, params.head_dim});
  Tensor lse = torch::stable::new_empty(query, {batch, nodes, heads}, ScalarType::Float);
  params.output = output.data_ptr();
  params.lse = static_cast<float*>(lse.data_ptr());
  return {output, lse};
}

void run_on_torch_threads(void*, int64_t tasks, void (*task)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(context, i);
  });
}

std::tuple<Tensor, Tensor> tree_attention_cpu(Tensor query, Tensor keys, Tensor values, Tensor prefix_lengths, Tensor node_counts,
                                              Tensor ancestor_mask, Tensor depths, double scale, double softcap, int64_t window) {
  TreeAttentionParams params =
      attention_params(query, keys, values, prefix_lengths, node_counts, ancestor_mask, depths, scale, softcap, window);
  auto [output, lse] = new_outputs(query, params);
  params.num_threads = int32_t(torch::stable::get_num_threads());
  params.parallel_for = run_on_torch_threads;
  check_launch(specdec_tree_attention_cpu(&params), params);
  return {output, lse};
}

#ifdef SPECDEC_WITH_CUDA
std::tuple<Tensor, Tensor> tree_attention_cuda(Tensor query, Tensor keys, Tensor values, Tensor prefix_lengths, Tensor node_counts,
                                               Tensor ancestor_mask, Tensor depths, double scale, double softcap, int64_t window) {
  TreeAttentionParams params =
      attention_params(query, keys, values, prefix_lengths, node_counts, ancestor_mask, depths, scale, softcap, window);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  auto [output, lse] = new_outputs(query, params);
  if (output.numel() == 0) return {output, lse};
  const int64_t needed = specdec_tree_attention_cuda_workspace(&params);
  if (needed < 0) check_launch(int(needed), params);
  Tensor workspace = torch::stable::new_empty(query, {needed}, ScalarType::Byte);
  params.workspace = workspace.data_ptr();
  params.workspace_size = needed;
  void* const stream = torch::stable::accelerator::getCurrentStream(query.get_device_index()).nativeHandle();
  check_launch(specdec_tree_attention_cuda(&params, stream), params);
  return {output, lse};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specdec, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("linear_isa() -> str");
  m.def(
      "tree_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor prefix_lengths, Tensor node_counts, "
      "Tensor ancestor_mask, Tensor depths, float scale, float softcap=0.0, int window=0) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(specdec, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("tree_attention", TORCH_BOX(&tree_attention_cpu));
}

#ifdef SPECDEC_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(specdec, CUDA, m) { m.impl("tree_attention", TORCH_BOX(&tree_attention_cuda)); }
#endif

STABLE_TORCH_LIBRARY_IMPL(specdec, CompositeExplicitAutograd, m) { m.impl("linear_isa", TORCH_BOX(&linear_isa)); }
