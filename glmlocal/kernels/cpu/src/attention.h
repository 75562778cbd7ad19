// Causal grouped-query attention over a paged cache.
//
// The keys of a sequence are cut into tiles and the tiles into splits, at fixed positions. A query's result is
//
//   per split: online softmax over its tiles, in order; then the splits folded together, in order
//
// with every sum over features and keys taken in one fixed order. Neither the other queries of a call, nor how a prompt
// is cut into chunks, nor the number of threads takes part in that, so they never change a bit of the result.
//
// Products and sums are fp32, where the cache is or the CPU has nothing faster. Where it multiplies pairs of bf16 as fast as
// floats, queries and probabilities are rounded to bf16: what other caches hold is exact in bf16, and twice as much is done at
// a time. Where it multiplies pairs of int16 (AVX-512 VNNI), queries, keys, values and the weights of a tile become integers
// over a scale of each row's own (docs/design/008).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cache_type.h"

namespace glmlocal {

inline constexpr int kLanes = 16;
inline constexpr int kTileKeys = 64;    // keys and values of 128 features: 64 KiB
inline constexpr int kSplitKeys = 512;  // what one thread does of a long sequence at a time

// [num_blocks, block_size, kv_heads, head_dim] with these distances in elements. Features are next to each other, or,
// of keys and where block_size is a multiple of 16, slots are: [num_blocks, kv_heads, head_dim, block_size] is the order
// that the dot products want and saves transposing each tile (a third of the time of decoding).
struct CacheStrides {
  ptrdiff_t block, slot, head, feature;
};
struct KeyValueCache {
  CacheType type;
  const void* keys;
  const void* values;
  CacheStrides key_strides, value_strides;
  const float* key_scales;  // int8: [num_blocks, kv_heads, block_size]; else null
  const float* value_scales;
  int64_t num_blocks, block_size, kv_heads, head_dim;
};

// New tokens of all requests one after another; those of request r are query_start_loc[r] … [r + 1] and its last ones.
struct AttentionBatch {
  const float* q;  // [tokens, heads, head_dim], tokens q_stride floats apart
  ptrdiff_t q_stride;
  float* out;  // [tokens, heads, head_dim]
  int64_t tokens, heads;
  const int32_t* block_tables;  // [requests, max_blocks]
  int64_t max_blocks;
  const int32_t* query_start_loc;  // [requests + 1]
  const int32_t* seq_lens;         // [requests], the new tokens included
  int64_t requests;
  float scale;
};

// Some consecutive new tokens of one request, the query heads of some kv heads, some consecutive splits of the keys.
struct AttentionTask {
  const float* q;  // [num_tokens, num_heads, group, head_dim], tokens q_stride floats apart
  ptrdiff_t q_stride;
  float* out;
  ptrdiff_t out_stride;
  CacheType type;
  const void* keys;  // of the first kv head
  const void* values;
  CacheStrides key_strides, value_strides;
  const float* key_scales;  // of the first kv head, or null; those of a block are scale_block_stride floats apart
  const float* value_scales;
  ptrdiff_t scale_block_stride;
  const int32_t* block_table;
  int block_size;
  int num_tokens, num_heads, group, head_dim;
  int first_position;  // of the first token; token t sees the keys at positions 0 … first_position + t
  int first_split, num_splits;
  float scale;
  // Where the task covers only one of the splits: what `merge_splits` takes, for each row (kv head, token, head of the
  // group), [rows][partial_size(head_dim)]. Null where it covers all and writes `out`.
  float* partials;
};

constexpr int padded_head_dim(int head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

// The weighted sum of values, then the sum of the weights, then the largest score.
constexpr int partial_size(int head_dim) { return padded_head_dim(head_dim) + kLanes; }

// Throws std::invalid_argument where a length or a block id does not fit the cache or the other lengths.
void check_attention(const KeyValueCache& cache, const AttentionBatch& batch);

// What is multiplied where the cache is not fp32.
enum class AttentionOperands { fp32, bf16, int16 };
AttentionOperands attention_operands();

// The batch must have passed check_attention().
void paged_attention(const KeyValueCache& cache, const AttentionBatch& batch);

}  // namespace glmlocal
