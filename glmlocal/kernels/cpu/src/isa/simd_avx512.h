#pragma once

#include <immintrin.h>

namespace glmlocal::GLM_ISA {

using F = __m512;
using U = __m512i;

GLM_INLINE F zero() { return _mm512_setzero_ps(); }
GLM_INLINE F broadcast(float x) { return _mm512_set1_ps(x); }
GLM_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
GLM_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
GLM_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
GLM_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
GLM_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
GLM_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
GLM_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
GLM_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
inline constexpr bool kFmaIsFused = true;
GLM_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
GLM_INLINE F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
GLM_INLINE F where_less(F a, F b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
GLM_INLINE F exp2_int(F n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}

GLM_INLINE F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
GLM_INLINE F load_i8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
GLM_INLINE F load_u8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))); }

GLM_INLINE U load_bytes(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
GLM_INLINE U load_halves(const void* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
GLM_INLINE U load_words(const void* p) { return _mm512_loadu_si512(p); }
GLM_INLINE U splat(uint32_t x) { return _mm512_set1_epi32(int(x)); }
GLM_INLINE U shift_right(U x, int n) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(n)); }
template <int n> GLM_INLINE U shr(U x) { if constexpr (n == 0) return x; else return _mm512_srli_epi32(x, n); }
template <int n> GLM_INLINE U shl(U x) { if constexpr (n == 0) return x; else return _mm512_slli_epi32(x, n); }
template <int n> GLM_INLINE U sar(U x) { return _mm512_srai_epi32(x, n); }
GLM_INLINE U bit_and(U a, U b) { return _mm512_and_si512(a, b); }
GLM_INLINE U select(U m, U a, U b) { return _mm512_ternarylogic_epi32(m, a, b, 0xCA); }
GLM_INLINE F as_float(U x) { return _mm512_castsi512_ps(x); }
GLM_INLINE U as_words(F x) { return _mm512_castps_si512(x); }

GLM_INLINE U sub_bytes(U a, U b) { return _mm512_sub_epi8(a, b); }
GLM_INLINE U max_words(U a, U b) { return _mm512_max_epi32(a, b); }
GLM_INLINE U add_words(U a, U b) { return _mm512_add_epi32(a, b); }
GLM_INLINE U to_words(F x) { return _mm512_cvtps_epi32(x); }
GLM_INLINE F to_float(U x) { return _mm512_cvtepi32_ps(x); }
GLM_INLINE void store_low_bytes(int8_t* p, U x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }
GLM_INLINE void store_words(void* p, U x) { _mm512_storeu_si512(p, x); }

// Written out because GCC 12 copies accumulators through memory around the intrinsic when there are many of them.
GLM_INLINE U dot(U sums, U codes, U x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(x));
  return sums;
}
struct ByteTable { U values; };
GLM_INLINE ByteTable make_byte_table(const uint8_t* values) { return {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)values))}; }
GLM_INLINE U lookup_bytes(ByteTable table, U index) { return _mm512_shuffle_epi8(table.values, index); }

struct Table { F values; };
GLM_INLINE Table make_table(const float* values) { return {load(values)}; }
GLM_INLINE F lookup(Table table, U index) { return _mm512_permutexvar_ps(index, table.values); }

// A byte moved under the exponent of 2^23 is the float 2^23 + byte; taking 2^23 and the bias off in one step is exact.
struct ByteBias { F offset; };
GLM_INLINE ByteBias byte_bias(float bias) { return {broadcast(8388608.0f + bias)}; }
template <int j>
GLM_INLINE F byte_value(U words, ByteBias bias) {
  const __m512i index = _mm512_set1_epi32(j);
  const __m512i repeated = _mm512_add_epi32(index, _mm512_set_epi32(12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0));
  const U moved = _mm512_mask_shuffle_epi8(_mm512_set1_epi32(0x4B000000), 0x1111111111111111, words, repeated);
  return sub(as_float(moved), bias.offset);
}

GLM_INLINE float sum(F x) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
GLM_INLINE float maximum(F x) {
  const __m256 a = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

GLM_INLINE int32_t sum_words(U x) { return _mm512_reduce_add_epi32(x); }
GLM_INLINE int32_t max_of_words(U x) { return _mm512_reduce_max_epi32(x); }

// While weights are decoded: rows at once, and accumulators (of 16 lanes) that leave registers for decoding.
inline constexpr int kGemvRows = 4, kGemvChains = 8, kGemvUnscaledChains = 16;
inline constexpr int kGemmRows = 6, kGemmTiles = 4;  // 24 accumulators, 4 weights, 1 activation of 32 registers
inline constexpr int kDotRows = 7, kDotTiles = 2, kDotChains = 16;  // 14 integer (or two each for few rows) and 14 fp32 sums, 2 weights, 1 activation
inline constexpr int kDotGemvRows = 4, kDotGemvChains = 8;  // chains: and as many fp32 sums
inline constexpr bool kDotSumsInMemory = false;
#if defined(__AMX_INT8__)
inline constexpr bool kDotInTiles = true;
#else
inline constexpr bool kDotInTiles = false;
#endif

}  // namespace glmlocal::GLM_ISA
