#include "blocks.h"

#include <cmath>

#include "isa.h"
#include "memory.h"
#include "ops.h"
#include "thread_pool.h"

namespace glmlocal {
namespace {

// then(r) for every row r, spread over the threads.
template <class Then>
void for_rows(int64_t rows, int64_t row_size, Then&& then) {
  parallel_for(int(rows), 0.5 * double(rows * row_size), [&](int r) { then(int64_t(r)); });
}

}  // namespace

int64_t attention_block(const AttentionBlock& block, const StepIndex& step, const KeyValueCache& cache, const float* x,
                        float* residual, float* hidden, int32_t* ids, float* weights) {
  const int64_t tokens = step.tokens, size = block.hidden_size, q_size = block.heads * block.head_dim, kv_size = block.kv_heads * block.head_dim;
  for (int64_t t = 0; t < tokens; ++t) {
    if (step.positions[t] < 0 || step.positions[t] >= block.max_positions) return t;
    if (step.slots[t] < 0 || step.slots[t] >= cache.num_blocks * cache.block_size) return t;
  }
  float* normed = scratch(Scratch::normed, size_t(tokens * size));
  float* q = scratch(Scratch::query, size_t(tokens * q_size));
  float* k = scratch(Scratch::key, size_t(tokens * kv_size));
  float* v = scratch(Scratch::value, size_t(tokens * kv_size));
  float* context = scratch(Scratch::context, size_t(tokens * q_size));

  rms_norm(x, tokens, size, block.input_norm, block.eps, normed);
  const Product products[]{{block.qkv[0], block.qkv_bias[0], q}, {block.qkv[1], block.qkv_bias[1], k}, {block.qkv[2], block.qkv_bias[2], v}};
  linear(products, normed, tokens, size);
  rope_store({.q = q, .k = k, .v = v, .tokens = tokens, .heads = block.heads, .kv_heads = block.kv_heads, .head_dim = block.head_dim,
              .q_norm = block.q_norm, .k_norm = block.k_norm, .eps = block.eps, .cos_sin = block.cos_sin,
              .max_positions = block.max_positions, .rotary_dim = block.rotary_dim, .positions = step.positions, .slots = step.slots,
              .type = cache.type, .keys = const_cast<void*>(cache.keys), .values = const_cast<void*>(cache.values),
              .key_strides = cache.key_strides, .value_strides = cache.value_strides,
              .key_scales = const_cast<float*>(cache.key_scales), .value_scales = const_cast<float*>(cache.value_scales),
              .num_blocks = cache.num_blocks, .block_size = cache.block_size});
  paged_attention(cache, {.q = q, .q_stride = q_size, .out = context, .tokens = tokens, .heads = block.heads,
                          .block_tables = step.block_tables, .max_blocks = step.max_blocks, .query_start_loc = step.query_start_loc,
                          .seq_lens = step.seq_lens, .requests = step.requests, .scale = float(1.0 / std::sqrt(double(block.head_dim)))});
  const Product output{block.o, nullptr, residual};
  linear({&output, 1}, context, tokens, q_size);
  const auto norm = kernels().rms_norm_row;
  for_rows(tokens, size, [&](int64_t t) {
    float* row = residual + t * size;
    for (int64_t i = 0; i < size; ++i) row[i] = x[t * size + i] + row[i];
    norm(row, block.post_norm, block.eps, int(size), hidden + t * size);
  });
  if (block.gate == nullptr) return -1;
  float* logits = scratch(Scratch::logits, size_t(tokens * block.routing.experts));
  const Product scores{block.gate, nullptr, logits};
  linear({&scores, 1}, hidden, tokens, size);
  router_topk(block.routing, logits, tokens, block.correction_bias, ids, weights);
  return -1;
}

void combine(const PackedMatrix* gate, const PackedMatrix* up, const PackedMatrix* down, const float* residual,
             const float* hidden, const float* routed, int64_t rows, int64_t hidden_size, float* out) {
  const int64_t size = hidden_size;
  if (gate != nullptr) swiglu_ffn(*gate, *up, *down, hidden, rows, out);
  for_rows(rows, size, [&](int64_t r) {
    float* row = out + r * size;
    const float *base = residual + r * size, *add = routed == nullptr ? nullptr : routed + r * size;
    if (gate == nullptr) {
      for (int64_t i = 0; i < size; ++i) row[i] = base[i] + add[i];
    } else if (add == nullptr) {
      for (int64_t i = 0; i < size; ++i) row[i] = base[i] + row[i];
    } else {
      for (int64_t i = 0; i < size; ++i) row[i] = base[i] + (row[i] + add[i]);
    }
  });
}

}  // namespace glmlocal
