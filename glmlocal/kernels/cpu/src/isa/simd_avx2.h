#pragma once

#include <immintrin.h>

namespace glmlocal::GLM_ISA {

struct F { __m256 lo, hi; };
struct U { __m256i lo, hi; };

GLM_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
GLM_INLINE F broadcast(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
GLM_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
GLM_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.lo); _mm256_storeu_ps(p + 8, x.hi); }
GLM_INLINE F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
GLM_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
GLM_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
GLM_INLINE F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
GLM_INLINE F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
GLM_INLINE F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
GLM_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
GLM_INLINE F round(F x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.lo, mode), _mm256_round_ps(x.hi, mode)};
}
GLM_INLINE F where_less(F a, F b, F yes, F no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
GLM_INLINE __m256 exp2_int(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
GLM_INLINE F exp2_int(F n) { return {exp2_int(n.lo), exp2_int(n.hi)}; }

GLM_INLINE F load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
GLM_INLINE F load_i8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
GLM_INLINE F load_u8(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}

GLM_INLINE U load_bytes(const void* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)((const char*)p + 8)))};
}
GLM_INLINE U load_halves(const void* p) {
  const __m128i* q = (const __m128i*)p;
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1))};
}
GLM_INLINE U load_words(const void* p) {
  const __m256i* q = (const __m256i*)p;
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
GLM_INLINE U splat(uint32_t x) { const __m256i v = _mm256_set1_epi32(int(x)); return {v, v}; }
GLM_INLINE U shift_right(U x, int n) {
  const __m128i count = _mm_cvtsi32_si128(n);
  return {_mm256_srl_epi32(x.lo, count), _mm256_srl_epi32(x.hi, count)};
}
template <int n> GLM_INLINE U shr(U x) { return {_mm256_srli_epi32(x.lo, n), _mm256_srli_epi32(x.hi, n)}; }
template <int n> GLM_INLINE U shl(U x) { return {_mm256_slli_epi32(x.lo, n), _mm256_slli_epi32(x.hi, n)}; }
template <int n> GLM_INLINE U sar(U x) { return {_mm256_srai_epi32(x.lo, n), _mm256_srai_epi32(x.hi, n)}; }
GLM_INLINE U bit_and(U a, U b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
GLM_INLINE U select(U m, U a, U b) {
  return {_mm256_or_si256(_mm256_and_si256(m.lo, a.lo), _mm256_andnot_si256(m.lo, b.lo)),
          _mm256_or_si256(_mm256_and_si256(m.hi, a.hi), _mm256_andnot_si256(m.hi, b.hi))};
}
GLM_INLINE F as_float(U x) { return {_mm256_castsi256_ps(x.lo), _mm256_castsi256_ps(x.hi)}; }
GLM_INLINE U as_words(F x) { return {_mm256_castps_si256(x.lo), _mm256_castps_si256(x.hi)}; }

GLM_INLINE U max_words(U a, U b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
GLM_INLINE U add_words(U a, U b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
GLM_INLINE U to_words(F x) { return {_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi)}; }
GLM_INLINE F to_float(U x) { return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)}; }
GLM_INLINE void store_words(void* p, U x) {
  _mm256_storeu_si256((__m256i*)p, x.lo);
  _mm256_storeu_si256((__m256i*)p + 1, x.hi);
}
GLM_INLINE void store_low_bytes(int8_t* p, U x) {
  alignas(64) int32_t words[16];
  store_words(words, x);
  for (int i = 0; i < 16; ++i) p[i] = int8_t(words[i]);
}

#if defined(__AVXVNNI__)
inline constexpr bool kDotKnowsBits = false;
template <bool> GLM_INLINE __m256i dot(__m256i sums, __m256i codes, __m256i x) { return _mm256_dpbusd_avx_epi32(sums, codes, x); }
#else
inline constexpr bool kDotKnowsBits = true;
// maddubs adds two products in 16 bits, which 8-bit codes overflow; those go in two halves.
template <bool eight_bits>
GLM_INLINE __m256i dot(__m256i sums, __m256i codes, __m256i x) {
  if constexpr (eight_bits) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
  } else {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
  }
}
#endif
template <bool eight_bits> GLM_INLINE U dot(U sums, U codes, U x) {
  return {dot<eight_bits>(sums.lo, codes.lo, x.lo), dot<eight_bits>(sums.hi, codes.hi, x.hi)};
}
struct ByteTable { __m256i values; };
GLM_INLINE ByteTable make_byte_table(const uint8_t* values) { return {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values))}; }
GLM_INLINE U lookup_bytes(ByteTable table, U index) { return {_mm256_shuffle_epi8(table.values, index.lo), _mm256_shuffle_epi8(table.values, index.hi)}; }

struct Table { __m256 first, second; };  // values 0 … 7 and 8 … 15
GLM_INLINE Table make_table(const float* values) { return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)}; }
GLM_INLINE __m256 lookup(Table table, __m256i index) {
  const __m256 high_half = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 becomes the sign: blendv's selector
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.first, index), _mm256_permutevar8x32_ps(table.second, index), high_half);
}
GLM_INLINE F lookup(Table table, U index) { return {lookup(table, index.lo), lookup(table, index.hi)}; }

struct ByteBias { __m256 bias; };
GLM_INLINE ByteBias byte_bias(float bias) { return {_mm256_set1_ps(bias)}; }
template <int j>
GLM_INLINE __m256 byte_value(__m256i words, __m256 bias) {
  const __m256i byte = _mm256_and_si256(_mm256_srli_epi32(words, 8 * j), _mm256_set1_epi32(255));
  return _mm256_sub_ps(_mm256_cvtepi32_ps(byte), bias);
}
template <int j>
GLM_INLINE F byte_value(U words, ByteBias bias) { return {byte_value<j>(words.lo, bias.bias), byte_value<j>(words.hi, bias.bias)}; }

GLM_INLINE float sum(F x) {
  const __m256 a = _mm256_add_ps(x.lo, x.hi);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
GLM_INLINE float maximum(F x) {
  const __m256 a = _mm256_max_ps(x.lo, x.hi);
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

GLM_INLINE int32_t sum_words(U x) {
  const __m256i both = _mm256_add_epi32(x.lo, x.hi);
  __m128i a = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  a = _mm_add_epi32(a, _mm_shuffle_epi32(a, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32(a, 0xB1)));
}
GLM_INLINE int32_t max_of_words(U x) {
  const __m256i both = _mm256_max_epi32(x.lo, x.hi);
  __m128i a = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  a = _mm_max_epi32(a, _mm_shuffle_epi32(a, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(a, _mm_shuffle_epi32(a, 0xB1)));
}

// While weights are decoded: rows at once, and accumulators (of 16 lanes) that leave registers for decoding.
inline constexpr int kGemvRows = 4, kGemvChains = 2, kGemvUnscaledChains = 4;
inline constexpr int kGemmRows = 6, kGemmTiles = 1;  // 12 accumulators, 2 weights, 1 activation of 16 registers
inline constexpr int kDotRows = 4, kDotTiles = 1;    // 8 accumulators, 2 weights, activations and constants of the dot product
inline constexpr int kDotGemvChains = 2;  // and as many fp32 sums

}  // namespace glmlocal::GLM_ISA
