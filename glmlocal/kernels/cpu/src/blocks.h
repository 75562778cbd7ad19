// A layer in three calls: everything up to the choice of experts, the experts (ops.h), and what joins them to the residual.
// Between them the caller may look at the chosen experts, which is where tiers of memory come in.
#pragma once

#include <array>
#include <cstdint>

#include "attention.h"
#include "packed_matrix.h"
#include "steps.h"

namespace glmlocal {

// Pre-norm attention, residual, post-norm and, where `gate` is given, the router. Matrices and vectors are borrowed.
struct AttentionBlock {
  int64_t hidden_size, heads, kv_heads, head_dim;
  const float *input_norm, *post_norm;              // [hidden_size]
  float eps;
  std::array<const PackedMatrix*, 3> qkv;           // [heads · head_dim or kv_heads · head_dim, hidden_size]
  std::array<const float*, 3> qkv_bias;             // or null
  const PackedMatrix* o;                            // [hidden_size, heads · head_dim]
  const float *q_norm, *k_norm;                     // [head_dim], or null
  const float* cos_sin;                             // [max_positions, rotary_dim]
  int64_t max_positions, rotary_dim;
  const PackedMatrix* gate = nullptr;               // [experts, hidden_size]
  const float* correction_bias = nullptr;           // [experts]
  Routing routing{};
};

// What a step's tokens are; see attention.h and steps.h.
struct StepIndex {
  int64_t tokens;
  const int64_t *positions, *slots;
  const int32_t* block_tables;
  int64_t max_blocks;
  const int32_t *query_start_loc, *seq_lens;
  int64_t requests;
};

// x, residual, hidden fp32 [tokens, hidden_size]: residual = x + attention(norm(x)), hidden = post_norm(residual). With a
// gate also ids and weights [tokens, top_k]. Returns -1, or before anything is written the index of the first token whose
// position or slot is out of range. The step must have passed check_attention(). `keys` of the cache are written.
int64_t attention_block(const AttentionBlock& block, const StepIndex& step, const KeyValueCache& cache, const float* x,
                        float* residual, float* hidden, int32_t* ids, float* weights);

// out = residual + (ffn(hidden) + routed); gate, up and down are all null or none, as is `routed`. [rows, hidden_size]
void combine(const PackedMatrix* gate, const PackedMatrix* up, const PackedMatrix* down, const float* residual,
             const float* hidden, const float* routed, int64_t rows, int64_t hidden_size, float* out);

}  // namespace glmlocal
