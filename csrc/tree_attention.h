/* Tree attention: the nodes of each row's draft tree attend to the row's cached prefix and to their own ancestors.
 *
 * One struct, one launcher a device. Plain C: no torch, no CUDA, so that it can be called through ctypes and simulated.
 *
 * Query node i of row b sees the cache slots 0..P-1 (P = prefix_lengths[b]) and the slots P + j of the nodes j whose bit is
 * set in its ancestor mask (its own among them), j < n = node_counts[b]. With a window w it sees of these only the keys at a
 * distance below w: its position is P + depths[b][i], a prefix slot's is the slot, a node's P + its depth. Slots from P + n on
 * are never read. Score s = scale * q.k, then softcap * tanh(s / softcap) if softcap > 0.
 */
#ifndef SPECDEC_TREE_ATTENTION_H
#define SPECDEC_TREE_ATTENTION_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { SPECDEC_FLOAT32 = 0, SPECDEC_FLOAT16 = 1, SPECDEC_BFLOAT16 = 2 };

enum { SPECDEC_MAX_NODES = 256 };

/* What a launcher returns: 0, a negative code that names the bad argument, or (CUDA) a positive cudaError_t. */
enum {
  SPECDEC_OK = 0,
  SPECDEC_BAD_STRUCT_SIZE = -1,
  SPECDEC_BAD_DTYPE = -2,
  SPECDEC_BAD_BATCH = -3,
  SPECDEC_BAD_QUERY_HEADS = -4,   /* not a multiple of kv_heads */
  SPECDEC_BAD_KV_HEADS = -5,
  SPECDEC_BAD_NODES = -6,         /* not in 1..SPECDEC_MAX_NODES */
  SPECDEC_BAD_SLOTS = -7,
  SPECDEC_BAD_HEAD_DIM = -8,      /* not one that the device's kernels take */
  SPECDEC_BAD_QUERY = -9,         /* null, or (CUDA) not aligned to 16 bytes; the strides count as part of the argument */
  SPECDEC_BAD_KEY_CACHE = -10,
  SPECDEC_BAD_VALUE_CACHE = -11,
  SPECDEC_BAD_PREFIX_LENGTHS = -12, /* null, or (CPU) P < 0 or P + n > slots */
  SPECDEC_BAD_NODE_COUNTS = -13,    /* null, or (CPU) n < 0 or n > nodes */
  SPECDEC_BAD_ANCESTOR_MASK = -14,
  SPECDEC_BAD_DEPTHS = -15,         /* null, or (CPU) a depth not in 0..nodes-1 */
  SPECDEC_BAD_SCALE = -16,          /* not finite */
  SPECDEC_BAD_SOFTCAP = -17,        /* negative or not finite */
  SPECDEC_BAD_WINDOW = -18,         /* negative */
  SPECDEC_BAD_OUTPUT = -19,
  SPECDEC_BAD_LSE = -20,
  SPECDEC_BAD_WORKSPACE = -21,      /* (CUDA) null or too small for num_splits */
  SPECDEC_BAD_NUM_SPLITS = -22,     /* (CUDA) negative or too many */
  SPECDEC_BAD_NUM_THREADS = -23     /* (CPU) negative */
};

/* Runs task(context, i) for every i in [0, tasks), in parallel or not, and returns when all have returned. */
typedef void (*SpecdecParallelFor)(void* pool, int64_t tasks, void (*task)(void* context, int64_t index), void* context);

typedef struct TreeAttentionParams {
  int64_t struct_size; /* sizeof(TreeAttentionParams) */

  /* All pointers are of the launcher's device. Elements of query, caches and output have type `dtype`. */
  const void* query;             /* [batch, query_heads, nodes, head_dim] */
  const void* key_cache;         /* [batch, kv_heads, slots, head_dim] */
  const void* value_cache;       /* [batch, kv_heads, slots, head_dim] */
  const int32_t* prefix_lengths; /* [batch] P */
  const int32_t* node_counts;    /* [batch] n */
  const int32_t* ancestor_mask;  /* [batch, nodes, ceil(nodes / 32)] contiguous; bit j & 31 of word j >> 5: node j is seen */
  const int32_t* depths;         /* [batch, nodes] contiguous */
  void* output;                  /* [batch, nodes, query_heads, head_dim] contiguous; zero for nodes >= n */
  float* lse;                    /* [batch, nodes, query_heads] contiguous, natural log-sum-exp of the scores, -inf for nodes
                                    >= n; or NULL */
  void* workspace;               /* CUDA: at least specdec_tree_attention_cuda_workspace() bytes, aligned to 16; CPU: unused */
  int64_t workspace_size;        /* bytes at workspace */

  /* Strides in elements; head_dim is contiguous. */
  int64_t query_strides[3]; /* of batch, query head, node */
  int64_t key_strides[3];   /* of batch, KV head, slot */
  int64_t value_strides[3]; /* of batch, KV head, slot */

  int32_t dtype; /* SPECDEC_FLOAT32, ... */
  int32_t batch;
  int32_t query_heads;
  int32_t kv_heads; /* query head h reads KV head h / (query_heads / kv_heads) */
  int32_t nodes;    /* N: nodes of the largest tree */
  int32_t slots;    /* T */
  int32_t head_dim; /* D, of keys and values; CPU: 16 32 64 80 96 112 128 192 256; CUDA: 64 96 128 256 */
  int32_t window;   /* 0: off */
  float scale;
  float softcap; /* 0: off */

  int32_t num_splits; /* CUDA: KV splits; 0: the launcher chooses. CPU: unused */

  /* CPU: how many threads may work (0: one). parallel_for runs them; NULL: threads are started for the call. */
  int32_t num_threads;
  SpecdecParallelFor parallel_for;
  void* parallel_pool; /* first argument of parallel_for */
} TreeAttentionParams;

/* Computes output and lse before it returns. */
int specdec_tree_attention_cpu(const TreeAttentionParams* params);

/* Name of the instruction set in use: "avx512_bf16", "avx512", "avx2" or "portable"; $SPECDEC_CPU_ISA lowers it. */
const char* specdec_tree_attention_isa(void);

/* Queues the kernels on the stream (a cudaStream_t); neither allocates nor synchronises. The contents of prefix_lengths and
 * node_counts are not checked: they are on the device. */
int specdec_tree_attention_cuda(const TreeAttentionParams* params, void* stream);

/* Bytes of workspace that the call needs; it depends on sizes and num_splits, not on the contents of tensors. Negative: a code
 * as above. */
int64_t specdec_tree_attention_cuda_workspace(const TreeAttentionParams* params);

#ifdef __cplusplus
}
#endif

#endif /* SPECDEC_TREE_ATTENTION_H */
