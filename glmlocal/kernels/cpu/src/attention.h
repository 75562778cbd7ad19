// Causal grouped-query attention over a paged cache.
//
// The keys of a sequence are cut into tiles and the tiles into splits, at fixed positions. A query's result is
//
//   per split: online softmax over its tiles, in order; then the splits folded together, in order
//
// with every sum over features and keys taken in one fixed order. Neither the other queries of a call, nor how a prompt
// is cut into chunks, nor the number of threads takes part in that, so they never change a bit of the result.
#pragma once

#include <cstddef>
#include <cstdint>

namespace glmlocal {

inline constexpr int kTileKeys = 64;    // one transposed tile of keys, 32 KiB at 128 features, stays in L1 or L2
inline constexpr int kSplitKeys = 512;  // what one thread does of a long sequence at a time
inline constexpr int kLanes = 16;

struct KeyValueCache {  // fp32 [num_blocks, block_size, kv_heads, head_dim] each
  const float* keys;
  const float* values;
  int64_t num_blocks, block_size, kv_heads, head_dim;
};

// New tokens of all requests one after another; those of request r are query_start_loc[r] … [r + 1] and its last ones.
struct AttentionBatch {
  const float* q;           // [tokens, heads, head_dim], tokens q_stride floats apart
  ptrdiff_t q_stride;
  float* out;               // [tokens, heads, head_dim]
  int64_t tokens, heads;
  const int32_t* block_tables;  // [requests, max_blocks]
  int64_t max_blocks;
  const int32_t* query_start_loc;  // [requests + 1]
  const int32_t* seq_lens;         // [requests], the new tokens included
  int64_t requests;
  float scale;
};

// Some consecutive new tokens of one request, the query heads of one kv head, some consecutive splits of its keys.
struct AttentionTask {
  const float* q;  // [num_tokens, group, head_dim]
  ptrdiff_t q_stride;
  float* out;
  ptrdiff_t out_stride;
  const float* keys;  // of this kv head: slot s at s * slot_stride
  const float* values;
  ptrdiff_t block_stride, slot_stride, head_stride, key_slot_stride;
  const int32_t* block_table;
  int block_size;
  int num_tokens, num_heads, group, head_dim;
  int first_position;  // of the first token; token t sees the keys at positions 0 … first_position + t
  int first_split, num_splits;
  float scale;
  // Where the task covers only some of the splits: per split and row (token, head of the group) what `merge_splits`
  // takes, [num_splits][rows][partial_size(head_dim)]. Null where it covers all and writes `out`.
  float* partials;
  ptrdiff_t partial_stride;  // floats from one split to the next
};

constexpr int padded_head_dim(int head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

// Unnormalized result, then the sum of exponentials, then the maximum.
constexpr int partial_size(int head_dim) { return padded_head_dim(head_dim) + kLanes; }

// Throws std::invalid_argument where a length, a block id or the sizes do not fit together; reads nothing else.
void check_attention(const KeyValueCache& cache, const AttentionBatch& batch);

// The batch must have passed check_attention().
void paged_attention(const KeyValueCache& cache, const AttentionBatch& batch);

}  // namespace glmlocal
