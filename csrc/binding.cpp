// torch.ops.specdec.linear, linears and tree_attention over csrc/cpu, by torch's stable ABI: one build serves every torch from 2.10 on.
#ifdef SPECDEC_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
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

Tensor torch_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight), torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The layers of one x: their blocks are shared out together, so that the threads meet once and not once a layer.
void multiply(const std::vector<specdec::Linear>& layers, int64_t block_work) {
  std::vector<int64_t> first{0};  // block of each layer, and the end
  for (const auto& layer : layers) first.push_back(first.back() + layer.blocks());
  const int64_t share = torch::stable::get_num_threads() * kChunksPerThread;
  const int64_t chunk = std::max((first.back() + share - 1) / share, kMultiplyGrain / std::max<int64_t>(1, block_work));
  parallel_chunks(
      first.back(), std::max<int64_t>(1, chunk), [&] { return layers[0].pack(); },
      [&](const specdec::Linear::Packed& packed, int64_t begin, int64_t end) {
        for (size_t i = 0; i < layers.size(); ++i) {
          const int64_t from = std::max(begin, first[i]), to = std::min(end, first[i + 1]);
          if (from < to) layers[i].multiply(packed, from - first[i], to - first[i]);
        }
      });
}

// More than `max_rows` rows, which a compiled model knows only when it runs, are torch's (-1: none are).
std::vector<Tensor> linears(Tensor x, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases, int64_t max_rows) {
  STD_TORCH_CHECK(!weights.empty() && weights.size() == biases.size(), "specdec::linears: there must be a bias, or None, for each weight");
  for (size_t i = 0; i < weights.size(); ++i) check(x, weights[i], biases[i]);
  const int64_t in_features = weights[0].size(1);
  std::vector<Tensor> ys;
  if (max_rows >= 0 && x.numel() > max_rows * in_features) {
    for (size_t i = 0; i < weights.size(); ++i) ys.push_back(torch_linear(x, weights[i], biases[i]));
    return ys;
  }
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  std::vector<specdec::Linear> layers;
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  for (size_t i = 0; i < weights.size(); ++i) {
    shape.back() = weights[i].size(0);
    ys.push_back(torch::stable::new_empty(x, shape));
    if (ys[i].numel() == 0) continue;
    layers.emplace_back(specdec::LinearArgs{.dtype = specdec::DType(dtype_of(x, "linear: x")),
                                            .x = x.data_ptr(),
                                            .weight = weights[i].data_ptr(),
                                            .bias = biases[i] ? biases[i]->data_ptr() : nullptr,
                                            .y = ys[i].data_ptr(),
                                            .rows = rows,
                                            .in_features = in_features,
                                            .out_features = shape.back()});
  }
  if (!layers.empty()) multiply(layers, specdec::Linear::kBlock * in_features * rows);
  return ys;
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t max_rows) {
  return linears(std::move(x), {std::move(weight)}, {std::move(bias)}, max_rows)[0];
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

// ---- cached_tree_attention ---------------------------------------------------------------------------------------------

// What one forward of a compiled model attends to, the same for all its layers; see CompiledForward for how it is packed.
// The first `known` nodes of a row were in an earlier forward: they are in the cache and have no token here.
struct Step {
  int64_t first_row, rows, nodes, fresh;  // nodes: of the largest tree; fresh: most that are not known
  const int32_t *prefix_lengths, *node_counts, *known, *ancestor_mask, *depths;

  bool all_fresh() const { return fresh == nodes && std::all_of(known, known + rows, [](int32_t count) { return count == 0; }); }
};

Step unpack_step(const Tensor& packed) {
  constexpr int64_t kHeader = 4;
  CHECK_ARGUMENT(packed.scalar_type() == ScalarType::Int && packed.is_contiguous() && packed.is_cpu() && packed.dim() == 1 && packed.numel() >= kHeader,
                 "step must be a contiguous int32 tensor on the CPU");
  const int32_t* const data = static_cast<const int32_t*>(packed.data_ptr());
  const int64_t rows = data[1], nodes = data[2], fresh = data[3], words = (nodes + 31) / 32;
  CHECK_ARGUMENT(data[0] >= 0 && rows >= 1 && fresh >= 1 && fresh <= nodes && packed.numel() == kHeader + rows * (3 + nodes * (words + 1)),
                 "step does not hold what its header says");
  const int32_t *const counts = data + kHeader + rows, *const known = counts + rows, *const mask = known + rows;
  for (int64_t row = 0; row < rows; ++row)
    CHECK_ARGUMENT(0 <= known[row] && known[row] <= counts[row] && counts[row] <= nodes && counts[row] - known[row] <= fresh,
                   "step: row ", row, " has ", counts[row], " nodes, ", known[row], " of them known");
  return {data[0], rows, nodes, fresh, data + kHeader, counts, known, mask, mask + rows * nodes * words};
}

// The keys or values of one layer in its group's buffer [G, R, H, C, D].
struct Slab {
  char* data;
  int64_t heads, slots, dim, item_size;
  int64_t strides[3];  // of row, head, slot, in elements
};

Slab slab(const Tensor& buffers, int64_t index, const Step& step, const char* name) {
  CHECK_ARGUMENT(buffers.dim() == 5 && index >= 0 && index < buffers.size(0), name, " must be [G, R, H, C, D] with the layer's index below G");
  CHECK_ARGUMENT(buffers.is_cpu() && buffers.stride(4) == 1, name, " must be on the CPU and contiguous in its last dimension");
  CHECK_ARGUMENT(step.first_row + step.rows <= buffers.size(1), name, " has ", buffers.size(1), " rows, step needs ", step.first_row + step.rows);
  const int64_t item_size = buffers.element_size();
  char* const first = static_cast<char*>(buffers.data_ptr()) + (index * buffers.stride(0) + step.first_row * buffers.stride(1)) * item_size;
  return {first, buffers.size(2), buffers.size(3), buffers.size(4), item_size, {buffers.stride(1), buffers.stride(2), buffers.stride(3)}};
}

// Writes the new nodes' keys or values, [1, H, T, D], to the slots after each row's prefix.
void store(const Tensor& fresh, const Slab& to, const Step& step, const Tensor& query, const char* name) {
  CHECK_ARGUMENT(fresh.dim() == 4 && fresh.size(0) == 1 && fresh.size(1) == to.heads && fresh.size(2) == query.size(2) &&
                     fresh.size(3) == to.dim && fresh.stride(3) == 1 && fresh.scalar_type() == query.scalar_type() && fresh.is_cpu(),
                 name, " must be [1, heads of its buffer, tokens of query, head dimension of its buffer], of query's dtype, contiguous in its last dimension");
  const char* const from = static_cast<const char*>(fresh.data_ptr());
  for (int64_t row = 0; row < step.rows; ++row) {
    const int64_t start = step.prefix_lengths[row], count = step.node_counts[row], known = step.known[row];
    CHECK_ARGUMENT(start >= 0 && start + count <= to.slots, name, ": row ", row, " does not fit in its buffer's ", to.slots, " slots");
    for (int64_t head = 0; head < to.heads; ++head)
      for (int64_t node = known; node < count; ++node)
        std::memcpy(to.data + (row * to.strides[0] + head * to.strides[1] + (start + node) * to.strides[2]) * to.item_size,
                    from + (head * fresh.stride(1) + (row * step.fresh + node - known) * fresh.stride(2)) * to.item_size,
                    to.dim * to.item_size);
  }
}

// move(row, node, token) for every fresh node.
template <class Move>
void for_each_fresh(const Step& step, const Move& move) {
  for (int64_t row = 0; row < step.rows; ++row)
    for (int64_t node = step.known[row]; node < step.node_counts[row]; ++node) move(row, node, row * step.fresh + node - step.known[row]);
}

// query [1, H, T, D] of the fresh nodes -> [H, B * N, D] of all nodes, zeros for the others.
Tensor spread(const Tensor& query, const Step& step) {
  const int64_t heads = query.size(1), dim = query.size(3), size = query.element_size(), places = step.rows * step.nodes;
  Tensor all = torch::stable::new_zeros(query, {1, heads, places, dim});
  for_each_fresh(step, [&](int64_t row, int64_t node, int64_t token) {
    for (int64_t head = 0; head < heads; ++head)
      std::memcpy(static_cast<char*>(all.data_ptr()) + (head * places + row * step.nodes + node) * dim * size,
                  static_cast<const char*>(query.data_ptr()) + (head * query.stride(1) + token * query.stride(2)) * size, dim * size);
  });
  return all;
}

// output [B, N, H, D] of all nodes -> the fresh ones' in fresh [1, T, H, D], zeros elsewhere.
void collect(const Tensor& output, const Step& step, const Tensor& fresh) {
  const int64_t size = fresh.size(2) * fresh.size(3) * fresh.element_size();
  std::memset(fresh.data_ptr(), 0, fresh.numel() * fresh.element_size());
  for_each_fresh(step, [&](int64_t row, int64_t node, int64_t token) {
    std::memcpy(static_cast<char*>(fresh.data_ptr()) + token * size, static_cast<const char*>(output.data_ptr()) + (row * step.nodes + node) * size, size);
  });
}

Tensor cached_tree_attention_cpu(Tensor query, Tensor key, Tensor value, Tensor key_buffers, Tensor value_buffers, int64_t key_index,
                                 int64_t value_index, Tensor packed_step, double scale, double softcap, int64_t window) {
  const Step step = unpack_step(packed_step);
  CHECK_ARGUMENT(query.is_cpu() && query.dim() == 4 && query.size(0) == 1 && query.stride(3) == 1 && query.size(2) >= step.rows * step.fresh,
                 "query must be [1, heads, tokens, head dimension] on the CPU, contiguous in its last dimension, with a token for every node");
  CHECK_ARGUMENT(key_buffers.scalar_type() == query.scalar_type() && value_buffers.scalar_type() == query.scalar_type(),
                 "key_buffers and value_buffers must have query's dtype");
  const Slab keys = slab(key_buffers, key_index, step, "key_buffers"), values = slab(value_buffers, value_index, step, "value_buffers");
  CHECK_ARGUMENT(keys.dim == query.size(3) && values.dim == keys.dim && values.heads == keys.heads && values.slots == keys.slots,
                 "query, key_buffers and value_buffers must agree in head dimension, heads and slots");
  store(key, keys, step, query, "key");
  store(value, values, step, query, "value");

  const int64_t tokens = query.size(2), heads = query.size(1), places = step.rows * step.nodes;
  const bool direct = step.all_fresh();
  const Tensor queries = direct ? query : spread(query, step);
  Tensor output = torch::stable::new_empty(query, {1, direct ? tokens : places, heads, keys.dim});
  const int64_t node_size = heads * keys.dim * keys.item_size;
  if (direct) std::memset(static_cast<char*>(output.data_ptr()) + places * node_size, 0, (tokens - places) * node_size);
  const TreeAttentionParams params = {
      .struct_size = sizeof(TreeAttentionParams),
      .query = queries.data_ptr(),
      .key_cache = keys.data,
      .value_cache = values.data,
      .prefix_lengths = step.prefix_lengths,
      .node_counts = step.node_counts,
      .ancestor_mask = step.ancestor_mask,
      .depths = step.depths,
      .output = output.data_ptr(),
      .query_strides = {step.nodes * queries.stride(2), queries.stride(1), queries.stride(2)},
      .key_strides = {keys.strides[0], keys.strides[1], keys.strides[2]},
      .value_strides = {values.strides[0], values.strides[1], values.strides[2]},
      .dtype = dtype_of(query, "cached_tree_attention: query"),
      .batch = int32_t(step.rows),
      .query_heads = int32_t(heads),
      .kv_heads = int32_t(keys.heads),
      .nodes = int32_t(step.nodes),
      .slots = int32_t(keys.slots),
      .head_dim = int32_t(keys.dim),
      .window = int32_t(std::clamp<int64_t>(window, -1, INT32_MAX)),
      .scale = float(scale),
      .softcap = float(softcap),
      .num_threads = int32_t(torch::stable::get_num_threads()),
      .parallel_for = run_on_torch_threads};
  check_launch(specdec_tree_attention_cpu(&params), params);
  if (direct) return output;
  Tensor fresh = torch::stable::new_empty(query, {1, tokens, heads, keys.dim});
  collect(output, step, fresh);
  return fresh;
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
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None, int max_rows=-1) -> Tensor");
  m.def("linears(Tensor x, Tensor[] weights, Tensor?[] biases, int max_rows=-1) -> Tensor[]");
  m.def("linear_isa() -> str");
  m.def(
      "tree_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor prefix_lengths, Tensor node_counts, "
      "Tensor ancestor_mask, Tensor depths, float scale, float softcap=0.0, int window=0) -> (Tensor, Tensor)");
  // It writes to the buffers and does not say so: a compiler would guard a declared write with copies of the whole cache. Nobody
  // can tell the difference, for nothing else in a compiled model reads or writes them.
  m.def(
      "cached_tree_attention(Tensor query, Tensor key, Tensor value, Tensor key_buffers, Tensor value_buffers, int key_index, "
      "int value_index, Tensor step, float scale, float softcap=0.0, int window=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(specdec, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linears", TORCH_BOX(&linears));
  m.impl("tree_attention", TORCH_BOX(&tree_attention_cpu));
  m.impl("cached_tree_attention", TORCH_BOX(&cached_tree_attention_cpu));
}

#ifdef SPECDEC_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(specdec, CUDA, m) { m.impl("tree_attention", TORCH_BOX(&tree_attention_cuda)); }
#endif

STABLE_TORCH_LIBRARY_IMPL(specdec, CompositeExplicitAutograd, m) { m.impl("linear_isa", TORCH_BOX(&linear_isa)); }
