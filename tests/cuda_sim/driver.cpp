// Runs specdec_tree_attention_cuda on cases read from stdin and compares it with float64. One line of key=value a case:
//
//   dtype=fp16 D=64 Hq=4 Hkv=2 N=33 P=100,0 n=33,5 window=0 softcap=0 splits=3 order=0 shared=163 seed=1
//
// Prints the relative L2 error of the output and the largest error of the log-sum-exp of each case; exits with 1 if one is too
// large. Linked with the simulator it needs no GPU; compiled with nvcc it runs on one (then order and shared have no effect).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

#include "../../csrc/cuda/device.cuh"
#include "../../csrc/tree_attention.h"
#include "../drivers.h"

namespace {

using drivers::Case;
using drivers::Errors;
using drivers::kInfinity;

constexpr int kSpareSlots = 5;  // behind the longest row

struct DType {
  const char* name;
  int code, bits_dropped, min_exponent;  // of float's 23 bits of fraction; of the smallest normal number
  double tolerance;
};
constexpr DType kDTypes[] = {{"fp32", SPECDEC_FLOAT32, 0, -126, 1e-6},
                             {"fp16", SPECDEC_FLOAT16, 13, -14, 5e-4},
                             {"bf16", SPECDEC_BFLOAT16, 16, -126, 4e-3}};
constexpr double kLseTolerance = 2e-5;

// Numbers that the type represents exactly, and their encoding.
double rounded(const DType& type, double x) {
  if (x == 0 || std::isnan(x)) return x;
  const double unit = std::exp2(std::max(std::ilogb(x), type.min_exponent) - 23 + type.bits_dropped);
  return std::nearbyint(x / unit) * unit;
}

void encode(const DType& type, double x, char* to) {
  const float narrow = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  if (type.code == SPECDEC_FLOAT32) {
    std::memcpy(to, &bits, 4);
    return;
  }
  uint32_t half = bits >> 16;
  if (type.code == SPECDEC_FLOAT16) {
    const uint32_t sign = bits >> 16 & 0x8000;
    if (std::isnan(x)) half = 0x7fff;
    else if (std::fabs(x) < 0x1p-14) half = sign | static_cast<uint32_t>(std::fabs(x) * 0x1p24);
    else half = sign | ((bits & 0x7fffffff) - (112u << 23)) >> 13;
  }
  std::memcpy(to, &half, 2);
}

double decode(const DType& type, const char* from) {
  uint32_t bits = 0;
  std::memcpy(&bits, from, type.code == SPECDEC_FLOAT32 ? 4 : 2);
  if (type.code == SPECDEC_FLOAT16) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double magnitude = exponent == 31 ? (fraction ? NAN : kInfinity)
                             : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                            : std::ldexp(fraction, -24);
    return bits >> 15 ? -magnitude : magnitude;
  }
  if (type.code == SPECDEC_BFLOAT16) bits <<= 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Device memory with the bytes of a vector.
class Device {
 public:
  Device(const void* host, size_t bytes) : bytes_(bytes) {
    require(cudaMalloc(&data_, bytes));
    require(cudaMemcpy(data_, host, bytes, cudaMemcpyHostToDevice));
  }
  explicit Device(const std::vector<int32_t>& host) : Device(host.data(), 4 * host.size()) {}
  explicit Device(size_t bytes) : Device(std::vector<char>(bytes, '\xff').data(), bytes) {}
  Device(const DType& type, const std::vector<double>& host) : Device(encoded(type, host).data(), host.size() * item(type)) {}
  Device(const Device&) = delete;
  ~Device() { cudaFree(data_); }

  std::vector<char> read() const {
    std::vector<char> host(bytes_);
    require(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return host;
  }
  static size_t item(const DType& type) { return type.code == SPECDEC_FLOAT32 ? 4 : 2; }
  static void require(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error("CUDA error " + std::to_string(error));
  }
  template <class T>
  T* as() const { return static_cast<T*>(data_); }

 private:
  static std::vector<char> encoded(const DType& type, const std::vector<double>& host) {
    std::vector<char> bytes(host.size() * item(type));
    for (size_t i = 0; i < host.size(); ++i) encode(type, host[i], &bytes[i * item(type)]);
    return bytes;
  }
  void* data_ = nullptr;
  size_t bytes_;
};

// A tree a row: node j's parent comes before it. What concerns nodes that do not exist is random. One node in `blind` (0: none)
// sees no node, not even itself.
struct Trees {
  std::vector<int32_t> mask, depths;
  int words;
  Trees(int rows, int nodes, const std::vector<int32_t>& counts, int blind, std::mt19937& random) : words((nodes + 31) / 32) {
    mask.resize(rows * nodes * words);
    depths.resize(rows * nodes);
    for (int32_t& bits : mask) bits = static_cast<int32_t>(random());
    for (int32_t& depth : depths) depth = static_cast<int32_t>(random() % 1000);
    for (int b = 0; b < rows; ++b) {
      for (int i = 0; i < counts[b]; ++i) {
        int32_t* bits = &mask[(b * nodes + i) * words];
        const int parent = i == 0 ? -1 : static_cast<int>(random() % 3 ? i - 1 - random() % std::min(i, 4) : random() % i);
        for (int j = 0; j < counts[b]; ++j) {
          const bool inherited = parent >= 0 && sees(b, nodes, parent, j);
          const bool seen = (j == i || inherited) && (blind == 0 || i % blind != 1);
          const uint32_t bit = 1u << (j % 32), others = bits[j / 32] & ~bit;
          bits[j / 32] = static_cast<int32_t>(seen ? others | bit : others);
        }
        depths[b * nodes + i] = parent < 0 ? 0 : depths[b * nodes + parent] + 1;
      }
    }
  }
  bool sees(int row, int nodes, int i, int j) const { return mask[(row * nodes + i) * words + j / 32] >> (j % 32) & 1; }
};

// What `set=field:value` overwrites, to see that the launcher refuses it.
void overwrite(TreeAttentionParams& p, const std::string& field, double value) {
  const std::map<std::string, int32_t*> integers = {
      {"dtype", &p.dtype}, {"batch", &p.batch}, {"query_heads", &p.query_heads}, {"kv_heads", &p.kv_heads}, {"nodes", &p.nodes},
      {"slots", &p.slots}, {"head_dim", &p.head_dim}, {"window", &p.window}, {"num_splits", &p.num_splits}};
  const std::map<std::string, int64_t*> longs = {
      {"struct_size", &p.struct_size}, {"workspace_size", &p.workspace_size}, {"query_strides", &p.query_strides[2]},
      {"key_strides", &p.key_strides[2]}, {"value_strides", &p.value_strides[2]}};
  const std::map<std::string, float*> floats = {{"scale", &p.scale}, {"softcap", &p.softcap}};
  const std::map<std::string, void*> pointers = {
      {"query", &p.query}, {"key_cache", &p.key_cache}, {"value_cache", &p.value_cache}, {"prefix_lengths", &p.prefix_lengths},
      {"node_counts", &p.node_counts}, {"ancestor_mask", &p.ancestor_mask}, {"depths", &p.depths}, {"output", &p.output},
      {"lse", &p.lse}, {"workspace", &p.workspace}};  // plus value bytes; 0: null
  if (integers.count(field)) *integers.at(field) = static_cast<int32_t>(value);
  else if (longs.count(field)) *longs.at(field) = static_cast<int64_t>(value);
  else if (floats.count(field)) *floats.at(field) = static_cast<float>(value);
  else {
    char* pointer;
    std::memcpy(&pointer, pointers.at(field), sizeof pointer);
    pointer = value == 0 ? nullptr : pointer + static_cast<int>(value);
    std::memcpy(pointers.at(field), &pointer, sizeof pointer);
  }
}

bool run(const std::string& line) {
  const Case c(line);
  const std::string name = c.string("dtype", "fp32");
  const DType& type = *std::find_if(std::begin(kDTypes), std::end(kDTypes), [&](const DType& t) { return t.name == name; });
  const std::vector<int32_t> prefix = c.list("P", "40"), counts = c.list("n", "1");
  const int rows = prefix.size(), D = c.number("D", 64), heads = c.number("Hq", 1), kv_heads = c.number("Hkv", 1);
  const int pitch = D + c.number("pad", 0);  // elements from one slot of a cache to the next
  const int nodes = c.number("N", 1), window = c.number("window", 0), groups = heads / kv_heads;
  const double softcap = c.number("softcap", 0), scale = c.number("scale", 1 / std::sqrt(D));
  int slots = kSpareSlots;
  for (int b = 0; b < rows; ++b) slots = std::max(slots, prefix[b] + counts[b] + kSpareSlots);
#ifndef __CUDACC__
  sim::settings.order = c.number("order", 0);
  sim::settings.shared_limit = c.number("shared", 163) * 1024;
#endif

  std::mt19937 random(c.number("seed", 1));
  std::normal_distribution<double> normal;
  const auto draw = [&](double spread) { return rounded(type, spread * normal(random)); };
  const Trees trees(rows, nodes, counts, c.number("blind", 0), random);
  std::vector<double> query(rows * nodes * heads * D, NAN);  // [batch, nodes, query_heads, D]
  std::vector<double> keys(rows * kv_heads * slots * pitch, NAN), values(keys);
  const auto query_at = [&](int b, int i, int h) { return ((static_cast<int64_t>(b) * nodes + i) * heads + h) * D; };
  const auto cache_at = [&](int b, int h, int slot) { return ((static_cast<int64_t>(b) * kv_heads + h) * slots + slot) * pitch; };
  for (int b = 0; b < rows; ++b) {
    std::generate_n(&query[query_at(b, 0, 0)], counts[b] * heads * D, [&] { return draw(1.5); });
    for (int h = 0; h < kv_heads; ++h) {
      for (int slot = 0; slot < prefix[b] + counts[b]; ++slot) {
        std::generate_n(&keys[cache_at(b, h, slot)], D, [&] { return draw(1); });
        std::generate_n(&values[cache_at(b, h, slot)], D, [&] { return draw(1); });
      }
    }
  }

  const Device d_query(type, query), d_keys(type, keys), d_values(type, values), d_prefix(prefix), d_counts(counts);
  const Device d_mask(trees.mask), d_depths(trees.depths);
  const Device d_output(query.size() * Device::item(type)), d_lse(query.size() / D * sizeof(float));
  TreeAttentionParams p = {};
  p.struct_size = sizeof p;
  p.query = d_query.as<void>(), p.key_cache = d_keys.as<void>(), p.value_cache = d_values.as<void>();
  p.prefix_lengths = d_prefix.as<int32_t>(), p.node_counts = d_counts.as<int32_t>();
  p.ancestor_mask = d_mask.as<int32_t>(), p.depths = d_depths.as<int32_t>();
  p.output = d_output.as<void>(), p.lse = d_lse.as<float>();
  p.query_strides[0] = nodes * heads * D, p.query_strides[1] = D, p.query_strides[2] = heads * D;
  for (int64_t* strides : {p.key_strides, p.value_strides}) {
    strides[0] = kv_heads * slots * pitch, strides[1] = slots * pitch, strides[2] = pitch;
  }
  p.dtype = type.code, p.batch = rows, p.query_heads = heads, p.kv_heads = kv_heads, p.nodes = nodes, p.slots = slots;
  p.head_dim = D, p.window = window, p.scale = scale, p.softcap = softcap, p.num_splits = c.number("splits", 1);
  p.workspace_size = specdec_tree_attention_cuda_workspace(&p);
  const Device workspace(static_cast<size_t>(std::max<int64_t>(p.workspace_size, 0)));
  p.workspace = workspace.as<void>();
  if (const std::string change = c.string("set", ""); !change.empty()) {
    const size_t colon = change.find(':');
    overwrite(p, change.substr(0, colon), std::stod(change.substr(colon + 1)));
  }
  const int status = p.workspace_size < 0 ? static_cast<int>(p.workspace_size) : specdec_tree_attention_cuda(&p, nullptr);
  if (status != 0) {
    std::printf("status=%d %s\n", status, line.c_str());
    return false;
  }
  Device::require(cudaDeviceSynchronize());

  const std::vector<char> output = d_output.read(), lse = d_lse.read();
  Errors errors;
  for (int b = 0; b < rows; ++b)
    for (int i = 0; i < nodes; ++i)
      for (int h = 0; h < heads; ++h) {
        // Node i of row b, the slow way: the scores of the slots that it sees, their softmax, the mean of their values.
        std::vector<int> seen;
        for (int slot = 0; i < counts[b] && slot < prefix[b] + counts[b]; ++slot) {
          const int j = slot - prefix[b], depth = trees.depths[b * nodes + i];
          const int position = j < 0 ? slot : prefix[b] + trees.depths[b * nodes + j];
          if (window > 0 && prefix[b] + depth - position >= window) continue;
          if (j < 0 || trees.sees(b, nodes, i, j)) seen.push_back(slot);
        }
        const int64_t row = query_at(b, i, h) / D;
        errors.add_row(
            D, scale, softcap, &query[query_at(b, i, h)], seen.size(),
            [&](size_t k) { return &keys[cache_at(b, h / groups, seen[k])]; },
            [&](size_t k) { return &values[cache_at(b, h / groups, seen[k])]; },
            [&](int d) { return decode(type, &output[(row * D + d) * Device::item(type)]); },
            p.lse == nullptr ? nullptr : reinterpret_cast<const float*>(lse.data()) + row);
      }
  const bool good = errors.relative() <= type.tolerance && errors.lse <= kLseTolerance;  // false for NaN
  std::printf("%s relative=%.2e lse=%.2e %s\n", good ? "ok" : "WRONG", errors.relative(), errors.lse, line.c_str());
  return good;
}

}  // namespace

int main() { return drivers::run_cases(run); }
