// Beyond simd.h: rows whose length is no multiple of 16.
#pragma once

#include "isa/simd.h"

namespace glmlocal::GLM_ISA {

// The first n of 16 floats at p (1 ≤ n ≤ 16), zeros after them; nothing beyond them is read or written.
#if defined(__AVX512F__)
GLM_INLINE F load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
GLM_INLINE void store_first(float* p, F x, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), x); }
#else
GLM_INLINE F load_first(const float* p, int n) {
  alignas(64) float lanes[16] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
GLM_INLINE void store_first(float* p, F x, int n) {
  alignas(64) float lanes[16];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
#endif

alignas(64) inline constexpr float kLaneIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// `yes` in the first n lanes, `no` in the others.
GLM_INLINE F where_first(int n, F yes, F no) { return where_less(load(kLaneIndex), broadcast(float(n)), yes, no); }

}  // namespace glmlocal::GLM_ISA
