// RMSNorm, rotary positions and the cache writes that follow them. Rows and tokens never take part in each other's results.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace glmlocal {

// out = x · rsqrt(mean(x²) + eps) · weight; x, out [rows, size], weight [size]. out may be x.
void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t size, float* out);

// residual ← residual + x, out = rms_norm(residual).
void add_rms_norm(const float* x, float* residual, const float* weight, float eps, int64_t rows, int64_t size, float* out);

// [tokens, heads, head_dim], tokens `stride` floats apart.
template <class T>
struct Heads {
  T* data;
  ptrdiff_t stride;
  int64_t tokens, heads, head_dim;
};

// Row p of the table is cos | sin of rotary_dim / 2 angles; token t is at positions[t].
struct Rotation {
  const float* cos_sin;  // [max_positions, rotary_dim]
  int64_t max_positions, rotary_dim;
  const int64_t* positions;
};

struct HeadNorm {
  const float *q_weight, *k_weight;  // [head_dim], null for none
  float eps;
};

// These throw std::out_of_range for the first position or slot that is outside of the table or the cache.
void check_positions(const Rotation& rotation, int64_t tokens);
void check_slots(const KeyValueCache& cache, const int64_t* slots, int64_t tokens);

// The arguments must have passed the checks. Features (j, j + rotary_dim / 2) are a pair.
void rope(const Heads<float>& x, const Rotation& rotation);
void kv_write(const Heads<const float>& k, const Heads<const float>& v, const KeyValueCache& cache, const int64_t* slots);

// q ← rope(norm(q)); the cache gets rope(norm(k)) and v.
void qk_norm_rope_kv_write(const Heads<float>& q, const Heads<const float>& k, const Heads<const float>& v, const HeadNorm& norm,
                           const Rotation& rotation, const KeyValueCache& cache, const int64_t* slots);

}  // namespace glmlocal
