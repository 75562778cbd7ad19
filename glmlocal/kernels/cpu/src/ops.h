// The ops as Python calls them: raw pointers to contiguous fp32, shapes already checked, work spread over the thread pool.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "packed_matrix.h"

namespace glmlocal {

// out[m][n] = Σ_k x[m][k] · weight[n][k] (+ bias[n]); x [num_rows, in], bias [out] or null, out [num_rows, out].
struct Product {
  const PackedMatrix* weight;
  const float* bias;
  float* out;
};
// At least one product, all of the same x.
void linear(std::span<const Product> products, const float* x, int64_t num_rows, int64_t in);

struct ExpertMatrices {
  const PackedMatrix* const* gate;  // [num_experts], each [intermediate, hidden]
  const PackedMatrix* const* up;    // the same
  const PackedMatrix* const* down;  // each [hidden, intermediate]
  int num_experts;
};

// out[t] = Σ over t's slots of weight · down(silu(gate(x[t])) · up(x[t])), summed in ascending order of expert id, so that a
// token's result does not depend on the batch it is in. x, out [num_tokens, hidden]; ids, weights [num_tokens, top_k].
// Returns -1, or without doing anything the index of the first id that is not 0 … num_experts - 1.
int64_t experts_ffn(const ExpertMatrices& experts, const float* x, int64_t num_tokens, const int32_t* ids,
                    const float* weights, int top_k, float* out);

// The same in parts, for experts that are not all in memory at once. Null matrices are those of experts that are not there.
// Writes row token · top_k + slot of `rows` [num_tokens · top_k, row_floats] for every pair whose expert is there, and leaves
// the others alone: down(silu(gate(x)) · up(x)), not weighed yet. row_floats is hidden padded to whole tiles of down.
int64_t experts_rows(const ExpertMatrices& experts, const float* x, int64_t num_tokens, const int32_t* ids, int top_k, float* rows);

// What experts_ffn gives, bit for bit, once all rows are there. ids, weights [num_tokens, top_k]; out [num_tokens, hidden].
void weigh_rows(const float* rows, int64_t row_floats, int64_t num_tokens, int64_t hidden_size, const int32_t* ids,
                const float* weights, int top_k, float* out);

// experts_ffn with one expert for all rows and no weights. x, out [num_rows, hidden].
void swiglu_ffn(const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down, const float* x, int64_t num_rows,
                float* out);

// GB/s at which all threads together read memory beyond the last-level cache: best of several passes over num_bytes.
double read_bandwidth(size_t num_bytes);
// fp32 fma GFLOP/s of all threads together, nothing loaded or stored.
double fma_peak();
// The same of the int8 dot products, in GOP/s.
double int8_peak();

// How a product is cut into tasks. Costs assume a core that reads 25 GB/s and computes 100 GFLOP/s: only the order of
// magnitude matters, for deciding whether waking another thread pays.
double product_cost_ns(const PackedMatrix& w, int64_t num_rows);
int chunk_rows(int64_t num_rows, int64_t panels);

}  // namespace glmlocal
