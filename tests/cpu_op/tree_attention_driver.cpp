// Runs specdec_tree_attention_cpu on cases read from stdin and compares it with a plain loop in double. One line a case:
//
//   dtype=fp16 D=64 Hq=4 Hkv=2 N=33 P=300,0 n=33,5 window=0 softcap=0 layout=cache lse=1 seed=1
//
// Each case runs on one thread, on four that the op starts and on four of a parallel_for of the driver's, always in a thread of
// its own, so that the memory that a thread keeps from call to call is new and no larger than the call needs. Every tensor lies
// in a heap block that ends with its last element; what nobody may read is NaN, what must be written is NaN before. Prints the
// instruction set, the most tasks that parallel_for got and the errors of each case; exits with 1 if one is wrong.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../drivers.h"
#include "tree_attention.h"

namespace {

using drivers::Case;
using drivers::Errors;

constexpr double kLseTolerance = 1e-5;

// [batch, heads, tokens, dim] twice: as the op reads it, and in double for the plain loop.
template <class T>
struct Tensor {
  int64_t heads, tokens, dim, strides[3];
  std::vector<T> data;
  std::vector<double> values;

  // dense: [batch, heads, tokens, dim]; cache: the same with room for more tokens; tokens: [batch, tokens, heads, dim].
  Tensor(const std::string& layout, int64_t batch, int64_t heads, int64_t tokens, int64_t dim)
      : heads(heads), tokens(tokens), dim(dim), values(batch * heads * tokens * dim, NAN) {
    const int64_t capacity = layout == "cache" ? 2 * tokens + 3 : tokens;
    strides[0] = heads * capacity * dim;
    strides[1] = layout == "tokens" ? dim : capacity * dim;
    strides[2] = layout == "tokens" ? heads * dim : dim;
    data = std::vector<T>(offset(batch - 1, heads - 1, tokens - 1) + dim, T(NAN));
  }
  int64_t offset(int64_t b, int64_t h, int64_t token) const { return b * strides[0] + h * strides[1] + token * strides[2]; }
  const double* at(int64_t b, int64_t h, int64_t token) const { return &values[((b * heads + h) * tokens + token) * dim]; }

  // Standard normal values for the first `count` tokens of a row.
  void fill(int64_t b, int64_t count, std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t token = 0; token < count; ++token)
        for (int64_t d = 0; d < dim; ++d) {
          T& element = data[offset(b, h, token) + d] = T(normal(random));
          values[((b * heads + h) * tokens + token) * dim + d] = float(element);
        }
  }
};

// A tree a row: a node's parent comes before it. What concerns nodes that do not exist is random.
struct Trees {
  int nodes, words;
  std::vector<int32_t> mask, depths;

  Trees(const std::vector<int32_t>& counts, int nodes, std::mt19937& random) : nodes(nodes), words((nodes + 31) / 32) {
    mask.resize(counts.size() * nodes * words);
    depths.resize(counts.size() * nodes);
    for (int32_t& bits : mask) bits = int32_t(random());
    for (int32_t& depth : depths) depth = int32_t(random());
    for (size_t b = 0; b < counts.size(); ++b)
      for (int i = 0; i < counts[b]; ++i) {
        const int parent = i == 0 ? -1 : int(i - 1 - random() % std::min(i, 4));
        depths[b * nodes + i] = parent < 0 ? 0 : depths[b * nodes + parent] + 1;
        for (int j = 0; j < counts[b]; ++j) {
          const uint32_t bit = 1u << (j % 32);
          int32_t& bits = mask[(b * nodes + i) * words + j / 32];
          bits = int32_t(j == i || (parent >= 0 && sees(b, parent, j)) ? uint32_t(bits) | bit : uint32_t(bits) & ~bit);
        }
      }
  }
  bool sees(int b, int i, int j) const { return uint32_t(mask[(b * nodes + i) * words + j / 32]) >> (j % 32) & 1; }
};

// A thread a task; the caller takes none. `most` is the largest number of tasks so far.
void parallel_for(void* most, int64_t tasks, void (*task)(void*, int64_t), void* context) {
  *static_cast<int64_t*>(most) = std::max(*static_cast<int64_t*>(most), tasks);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < tasks; ++i) threads.emplace_back(task, context, i);
  for (std::thread& thread : threads) thread.join();
}

template <class T>
class Test {
 public:
  Test(const Case& c, int dtype, double tolerance) : prefix_(c.list("P")), counts_(c.list("n")), tolerance_(tolerance) {
    std::mt19937 random(c.integer("seed"));
    const int rows = prefix_.size(), dim = c.integer("D"), nodes = c.integer("N");
    const int heads = c.integer("Hq"), kv_heads = c.integer("Hkv");
    const std::string& layout = c.string("layout");
    int slots = 1;
    for (int b = 0; b < rows; ++b) slots = std::max(slots, prefix_[b] + counts_[b]);
    trees_ = std::make_unique<Trees>(counts_, nodes, random);
    const std::string query_layout = layout == "dense" ? "dense" : "tokens";  // as a model hands it over
    query_ = std::make_unique<Tensor<T>>(query_layout, rows, heads, nodes, dim);
    keys_ = std::make_unique<Tensor<T>>(layout, rows, kv_heads, slots, dim);
    values_ = std::make_unique<Tensor<T>>(layout, rows, kv_heads, slots, dim);
    for (int b = 0; b < rows; ++b) {
      query_->fill(b, counts_[b], random);
      keys_->fill(b, prefix_[b] + counts_[b], random);
      values_->fill(b, prefix_[b] + counts_[b], random);
    }
    output_size_ = int64_t(rows) * nodes * heads * dim;
    lse_size_ = c.integer("lse") ? output_size_ / dim : 0;

    p_.struct_size = sizeof p_;
    p_.query = query_->data.data(), p_.key_cache = keys_->data.data(), p_.value_cache = values_->data.data();
    p_.prefix_lengths = prefix_.data(), p_.node_counts = counts_.data();
    p_.ancestor_mask = trees_->mask.data(), p_.depths = trees_->depths.data();
    std::copy_n(query_->strides, 3, p_.query_strides);
    std::copy_n(keys_->strides, 3, p_.key_strides);
    std::copy_n(values_->strides, 3, p_.value_strides);
    p_.dtype = dtype, p_.batch = rows, p_.query_heads = heads, p_.kv_heads = kv_heads, p_.nodes = nodes, p_.slots = slots;
    p_.head_dim = dim, p_.window = c.integer("window"), p_.softcap = c.integer("softcap"), p_.scale = 1 / std::sqrt(float(dim));
  }

  bool run(const std::string& line) {
    int64_t most = 0;
    const Result one = call(1, nullptr, nullptr);
    bool good = one.status == SPECDEC_OK && call(4, nullptr, nullptr) == one && call(4, parallel_for, &most) == one;
    const Errors errors = compare(one);
    good = good && errors.relative() <= tolerance_ && errors.lse <= kLseTolerance;  // false for NaN
    std::printf("%s isa=%s status=%d tasks=%d relative=%.2e lse=%.2e %s\n", good ? "ok" : "WRONG", specdec_tree_attention_isa(),
                one.status, int(most), errors.relative(), errors.lse, line.c_str());
    return good;
  }

 private:
  struct Result {
    int status;
    std::vector<T> output;
    std::vector<float> lse;
    bool operator==(const Result& other) const {  // bit for bit
      return status == other.status && std::memcmp(output.data(), other.output.data(), output.size() * sizeof(T)) == 0 &&
             std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
    }
  };

  Result call(int threads, SpecdecParallelFor pool, void* most) const {
    Result result = {0, std::vector<T>(output_size_, T(NAN)), std::vector<float>(lse_size_, NAN)};
    TreeAttentionParams p = p_;
    p.output = result.output.data(), p.lse = lse_size_ > 0 ? result.lse.data() : nullptr;
    p.num_threads = threads, p.parallel_for = pool, p.parallel_pool = most;
    std::thread([&] { result.status = specdec_tree_attention_cpu(&p); }).join();
    return result;
  }

  // The slots that node i of a row sees.
  std::vector<int> seen(int b, int i) const {
    std::vector<int> slots;
    const int32_t *depths = &trees_->depths[b * p_.nodes], prefix = prefix_[b];
    for (int slot = 0; i < counts_[b] && slot < prefix + counts_[b]; ++slot) {
      const int distance = prefix + depths[i] - (slot < prefix ? slot : prefix + depths[slot - prefix]);
      if (p_.window > 0 && distance >= p_.window) continue;
      if (slot < prefix || trees_->sees(b, i, slot - prefix)) slots.push_back(slot);
    }
    return slots;
  }

  Errors compare(const Result& result) const {
    Errors errors;
    for (int b = 0; b < p_.batch; ++b)
      for (int i = 0; i < p_.nodes; ++i) {
        const std::vector<int> slots = seen(b, i);
        for (int h = 0; h < p_.query_heads; ++h) compare(result, b, i, h, slots, errors);
      }
    return errors;
  }

  void compare(const Result& result, int b, int i, int h, const std::vector<int>& slots, Errors& errors) const {
    const int dim = p_.head_dim, kv_head = h / (p_.query_heads / p_.kv_heads);
    const int64_t row = (int64_t(b) * p_.nodes + i) * p_.query_heads + h;
    errors.add_row(
        dim, p_.scale, p_.softcap, query_->at(b, h, i), slots.size(), [&](size_t k) { return keys_->at(b, kv_head, slots[k]); },
        [&](size_t k) { return values_->at(b, kv_head, slots[k]); }, [&](int d) { return float(result.output[row * dim + d]); },
        lse_size_ == 0 ? nullptr : &result.lse[row]);
  }

  std::vector<int32_t> prefix_, counts_;
  double tolerance_;
  std::unique_ptr<Trees> trees_;
  std::unique_ptr<Tensor<T>> query_, keys_, values_;
  int64_t output_size_ = 0, lse_size_ = 0;
  TreeAttentionParams p_ = {};
};

bool run(const std::string& line) {
  const Case c(line);
  const std::string& dtype = c.string("dtype");
  if (dtype == "fp32") return Test<float>(c, SPECDEC_FLOAT32, 1e-6).run(line);
  if (dtype == "fp16") return Test<c10::Half>(c, SPECDEC_FLOAT16, 5e-4).run(line);
  if (dtype == "bf16") return Test<c10::BFloat16>(c, SPECDEC_BFLOAT16, 4e-3).run(line);
  throw std::invalid_argument("dtype is fp32, fp16 or bf16, not " + dtype);
}

}  // namespace

int main() { return drivers::run_cases(run); }
