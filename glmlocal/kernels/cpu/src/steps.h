// The steps between matrix products: norms, rotation and storing of queries and keys, choosing experts.
//
// All work row by row in one fixed order per row, so that a row's result does not depend on the batch or the threads.
#pragma once

#include <cstdint>

#include "attention.h"

namespace glmlocal {

// out[r] = x[r] · rsqrt(mean(x[r]²) + eps) · weight; rows of `features` floats.
void rms_norm(const float* x, int64_t rows, int64_t features, const float* weight, float eps, float* out);

// q and k are rotated in place, after a norm of each head where q_norm and k_norm are given; k and v then go to their slots.
struct RopeStore {
  float* q;                 // [tokens, heads, head_dim]
  float* k;                 // [tokens, kv_heads, head_dim]
  const float* v;           // the same
  int64_t tokens, heads, kv_heads, head_dim;
  const float* q_norm;      // [head_dim], or null
  const float* k_norm;
  float eps;
  const float* cos_sin;     // [max_positions, rotary_dim]
  int64_t max_positions, rotary_dim;
  const int64_t* positions; // [tokens]
  const int64_t* slots;     // [tokens]
  CacheType type;
  void* keys;               // [num_blocks, block_size, kv_heads, head_dim], in any order in memory
  void* values;
  CacheStrides key_strides, value_strides;
  float* key_scales;        // int8: [num_blocks, kv_heads, block_size], else null
  float* value_scales;
  int64_t num_blocks, block_size;
};

// Returns -1, or without doing anything the index of the first token whose position or slot is out of range.
int64_t rope_store(const RopeStore& job);

struct Routing {
  int64_t experts, top_k, n_group, topk_group;
  bool norm_topk_prob;
  float routed_scaling_factor;
};

// ids, weights [rows, top_k] from logits [rows, experts]; equal scores go to the lower id.
void router_topk(const Routing& routing, const float* logits, int64_t rows, const float* correction_bias, int32_t* ids,
                 float* weights);

}  // namespace glmlocal
