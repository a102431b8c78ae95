// The CUDA launcher of csrc/tree_attention.h: checks the arguments, chooses kernel and splits, queues one or two kernels.
#include <algorithm>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

#include "tree_attention_kernel.cuh"

namespace specdec {
namespace {

constexpr int kMaxSplits = 128;
constexpr int kKeysPerSplit = 256;  // the launcher's own choice gives a split at least so many slots

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// 16-byte loads: so aligned are the pointer and, where the dimension is not 1, each stride.
bool loadable(const void* pointer, const int64_t (&strides)[3], int item, int size0, int size1, int size2) {
  const int sizes[3] = {size0, size1, size2};
  for (int i = 0; i < 3; ++i) {
    if (sizes[i] > 1 && strides[i] * item % 16 != 0) return false;
  }
  return pointer != nullptr && aligned(pointer);
}

int check(const TreeAttentionParams& p) {
  if (p.struct_size != sizeof(TreeAttentionParams)) return SPECDEC_BAD_STRUCT_SIZE;
  if (p.dtype < SPECDEC_FLOAT32 || p.dtype > SPECDEC_BFLOAT16) return SPECDEC_BAD_DTYPE;
  if (p.kv_heads < 1) return SPECDEC_BAD_KV_HEADS;
  if (p.batch < 1 || p.batch > 65535 / p.kv_heads) return SPECDEC_BAD_BATCH;  // they share the grid's z
  if (p.query_heads < 1 || p.query_heads % p.kv_heads != 0) return SPECDEC_BAD_QUERY_HEADS;
  if (p.nodes < 1 || p.nodes > SPECDEC_MAX_NODES) return SPECDEC_BAD_NODES;
  if (p.slots < 1 || p.slots > (1 << 30)) return SPECDEC_BAD_SLOTS;
  if (p.head_dim != 64 && p.head_dim != 96 && p.head_dim != 128 && p.head_dim != 256) return SPECDEC_BAD_HEAD_DIM;
  const int item = p.dtype == SPECDEC_FLOAT32 ? 4 : 2;
  if (!loadable(p.query, p.query_strides, item, p.batch, p.query_heads, p.nodes)) return SPECDEC_BAD_QUERY;
  if (!loadable(p.key_cache, p.key_strides, item, p.batch, p.kv_heads, p.slots)) return SPECDEC_BAD_KEY_CACHE;
  if (!loadable(p.value_cache, p.value_strides, item, p.batch, p.kv_heads, p.slots)) return SPECDEC_BAD_VALUE_CACHE;
  if (p.prefix_lengths == nullptr) return SPECDEC_BAD_PREFIX_LENGTHS;
  if (p.node_counts == nullptr) return SPECDEC_BAD_NODE_COUNTS;
  if (p.ancestor_mask == nullptr) return SPECDEC_BAD_ANCESTOR_MASK;
  if (p.depths == nullptr) return SPECDEC_BAD_DEPTHS;
  if (!std::isfinite(p.scale)) return SPECDEC_BAD_SCALE;
  if (!std::isfinite(p.softcap) || p.softcap < 0) return SPECDEC_BAD_SOFTCAP;
  if (p.window < 0) return SPECDEC_BAD_WINDOW;
  if (p.output == nullptr || !aligned(p.output)) return SPECDEC_BAD_OUTPUT;
  if (reinterpret_cast<uintptr_t>(p.lse) % sizeof(float) != 0) return SPECDEC_BAD_LSE;
  if (p.num_splits < 0 || p.num_splits > kMaxSplits) return SPECDEC_BAD_NUM_SPLITS;
  return SPECDEC_OK;
}

// What is launched for these sizes.
struct Plan {
  int row_warps;  // of attend_mma
  int tiles;      // of packed query rows
  int splits;
};

int rows_of(const TreeAttentionParams& p, int row_warps) {
  if (p.dtype == SPECDEC_FLOAT32) return p.head_dim == 256 ? SimtShape<256>::kRows : SimtShape<128>::kRows;
  return 16 * row_warps;
}

// Few packed rows share one warp's 16 and spread the keys over the warps. Splits are added until every multiprocessor has two
// blocks, counting all slots as used: lengths are on the device, and the choice must outlive a CUDA graph's replays.
cudaError_t make_plan(const TreeAttentionParams& p, Plan& plan) {
  const int packed = p.nodes * (p.query_heads / p.kv_heads);
  plan.row_warps = packed <= 16 && p.head_dim <= 128 ? 1 : packed <= 32 ? 2 : 4;
  const int rows = rows_of(p, plan.row_warps);
  plan.tiles = (packed + rows - 1) / rows;
  plan.splits = p.num_splits;
  if (plan.splits > 0) return cudaSuccess;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t blocks = static_cast<int64_t>(plan.tiles) * p.batch * p.kv_heads;
  const int64_t wanted = (2 * multiprocessors + blocks - 1) / blocks, most = (p.slots + kKeysPerSplit - 1) / kKeysPerSplit;
  plan.splits = static_cast<int>(std::clamp<int64_t>(std::min(wanted, most), 1, kMaxSplits));
  return error;
}

// Output rows of the call; a split leaves head_dim + 1 floats for each.
int64_t output_rows(const TreeAttentionParams& p) { return static_cast<int64_t>(p.batch) * p.nodes * p.query_heads; }

int64_t workspace_bytes(const TreeAttentionParams& p, const Plan& plan) {
  return plan.splits == 1 ? 0 : plan.splits * output_rows(p) * (p.head_dim + 1) * static_cast<int64_t>(sizeof(float));
}

template <class Kernel>
cudaError_t launch(Kernel* kernel, dim3 grid, size_t shared_bytes, const Arguments& a, cudaStream_t stream) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Arguments*>(&a)};
  return cudaLaunchKernel(kernel, grid, dim3{kThreads, 1, 1}, arguments, shared_bytes, stream);
}

template <class T, int D, int kRowWarps>
cudaError_t launch_mma(dim3 grid, const Arguments& a, cudaStream_t stream) {
  return launch(attend_mma<T, D, kRowWarps>, grid, MmaShape<D, kRowWarps>::kSharedBytes, a, stream);
}

template <class T, int D>
struct Attend {
  static cudaError_t run(const Plan& plan, dim3 grid, const Arguments& a, cudaStream_t stream) {
    if constexpr (D <= 128) {
      if (plan.row_warps == 1) return launch_mma<T, D, 1>(grid, a, stream);
    }
    return plan.row_warps == 2 ? launch_mma<T, D, 2>(grid, a, stream) : launch_mma<T, D, 4>(grid, a, stream);
  }
};

template <int D>
struct Attend<float, D> {
  static cudaError_t run(const Plan&, dim3 grid, const Arguments& a, cudaStream_t stream) {
    return launch(attend_simt<D>, grid, sizeof(SimtShape<D>), a, stream);
  }
};

template <class T>
cudaError_t run(const Plan& plan, const Arguments& a, cudaStream_t stream) {
  const TreeAttentionParams& p = a.p;
  const dim3 grid = {static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.splits),
                     static_cast<unsigned>(p.batch) * p.kv_heads};
  const auto attend = p.head_dim == 64    ? Attend<T, 64>::run
                      : p.head_dim == 96  ? Attend<T, 96>::run
                      : p.head_dim == 128 ? Attend<T, 128>::run
                                          : Attend<T, 256>::run;
  const cudaError_t error = attend(plan, grid, a, stream);
  if (error != cudaSuccess || plan.splits == 1) return error;
  return launch(merge_splits<T>, dim3{static_cast<unsigned>((output_rows(p) + kWarps - 1) / kWarps), 1, 1}, 0, a, stream);
}

int plan_and_run(const TreeAttentionParams& p, cudaStream_t stream) {
  Plan plan;
  const cudaError_t error = make_plan(p, plan);
  if (error != cudaSuccess) return error;
  const int64_t needed = workspace_bytes(p, plan);
  if (needed > 0 && (p.workspace == nullptr || !aligned(p.workspace) || p.workspace_size < needed)) return SPECDEC_BAD_WORKSPACE;
  float* partial_output = static_cast<float*>(p.workspace);
  float* partial_lse = needed > 0 ? partial_output + plan.splits * output_rows(p) * p.head_dim : nullptr;
  const Arguments a = {p, p.query_heads / p.kv_heads, plan.splits, partial_output, partial_lse};
  if (p.dtype == SPECDEC_FLOAT32) return run<float>(plan, a, stream);
  return p.dtype == SPECDEC_FLOAT16 ? run<Half>(plan, a, stream) : run<BFloat16>(plan, a, stream);
}

}  // namespace
}  // namespace specdec

extern "C" int64_t specdec_tree_attention_cuda_workspace(const TreeAttentionParams* params) {
  const int bad = specdec::check(*params);
  if (bad != SPECDEC_OK) return bad;
  specdec::Plan plan;
  // Without a device the launch says so.
  return specdec::make_plan(*params, plan) == cudaSuccess ? specdec::workspace_bytes(*params, plan) : 0;
}

extern "C" int specdec_tree_attention_cuda(const TreeAttentionParams* params, void* stream) {
  const int bad = specdec::check(*params);
  if (bad != SPECDEC_OK) return bad;
  const int result = specdec::plan_and_run(*params, static_cast<cudaStream_t>(stream));
  if (result > 0) cudaGetLastError();  // it is returned, not left for the next caller of CUDA to find
  return result;
}
