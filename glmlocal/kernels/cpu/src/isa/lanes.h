// Beyond simd.h: rows whose length is no multiple of 16, and transposing.
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

// out[column * out_stride + row] = rows[row][first_column + column] for 16 rows and 16 columns. Four rows at a time are
// transposed within quarters of a vector; loading quarter L of vector j from row 4·L + j puts the rest in its place.
#if defined(__AVX512F__)
GLM_INLINE void transpose(const float* const* rows, int first_column, float* out, ptrdiff_t out_stride) {
  unroll<4>([&](auto quarter) {
    const int column = 4 * quarter.v;
    __m512 r[4];
    unroll<4>([&](auto j) {
      const int at = first_column + column;
      __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(rows[j.v] + at));
      x = _mm512_insertf32x4(x, _mm_loadu_ps(rows[j.v + 4] + at), 1);
      x = _mm512_insertf32x4(x, _mm_loadu_ps(rows[j.v + 8] + at), 2);
      r[j.v] = _mm512_insertf32x4(x, _mm_loadu_ps(rows[j.v + 12] + at), 3);
    });
    const __m512 a = _mm512_unpacklo_ps(r[0], r[1]), b = _mm512_unpackhi_ps(r[0], r[1]);
    const __m512 c = _mm512_unpacklo_ps(r[2], r[3]), d = _mm512_unpackhi_ps(r[2], r[3]);
    float* to = out + column * out_stride;
    _mm512_storeu_ps(to, _mm512_shuffle_ps(a, c, 0x44));
    _mm512_storeu_ps(to + out_stride, _mm512_shuffle_ps(a, c, 0xEE));
    _mm512_storeu_ps(to + 2 * out_stride, _mm512_shuffle_ps(b, d, 0x44));
    _mm512_storeu_ps(to + 3 * out_stride, _mm512_shuffle_ps(b, d, 0xEE));
  });
}
#elif defined(__AVX2__)
GLM_INLINE void transpose(const float* const* rows, int first_column, float* out, ptrdiff_t out_stride) {
  unroll<8>([&](auto part) {
    const int half = 8 * (part.v / 4), column = 4 * (part.v % 4);
    __m256 r[4];
    unroll<4>([&](auto j) {
      const int at = first_column + column;
      const __m256 x = _mm256_castps128_ps256(_mm_loadu_ps(rows[half + j.v] + at));
      r[j.v] = _mm256_insertf128_ps(x, _mm_loadu_ps(rows[half + 4 + j.v] + at), 1);
    });
    const __m256 a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
    const __m256 c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
    float* to = out + column * out_stride + half;
    _mm256_storeu_ps(to, _mm256_shuffle_ps(a, c, 0x44));
    _mm256_storeu_ps(to + out_stride, _mm256_shuffle_ps(a, c, 0xEE));
    _mm256_storeu_ps(to + 2 * out_stride, _mm256_shuffle_ps(b, d, 0x44));
    _mm256_storeu_ps(to + 3 * out_stride, _mm256_shuffle_ps(b, d, 0xEE));
  });
}
#else
GLM_INLINE void transpose(const float* const* rows, int first_column, float* out, ptrdiff_t out_stride) {
  unroll<16>([&](auto part) {
    const int row = 4 * (part.v / 4), column = 4 * (part.v % 4);
    Quad r[4];
    unroll<4>([&](auto j) { __builtin_memcpy(&r[j.v], rows[row + j.v] + first_column + column, sizeof(Quad)); });
    const Quad a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    const Quad c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    const Quad columns[4] = {__builtin_shufflevector(a, c, 0, 1, 4, 5), __builtin_shufflevector(a, c, 2, 3, 6, 7),
                             __builtin_shufflevector(b, d, 0, 1, 4, 5), __builtin_shufflevector(b, d, 2, 3, 6, 7)};
    unroll<4>([&](auto j) { __builtin_memcpy(out + (column + j.v) * out_stride + row, &columns[j.v], sizeof(Quad)); });
  });
}
#endif

}  // namespace glmlocal::GLM_ISA
