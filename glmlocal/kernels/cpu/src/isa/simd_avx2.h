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
inline constexpr bool kFmaIsFused = true;
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

GLM_INLINE U sub_bytes(U a, U b) { return {_mm256_sub_epi8(a.lo, b.lo), _mm256_sub_epi8(a.hi, b.hi)}; }
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
GLM_INLINE U dot(U sums, U codes, U x) {
  return {_mm256_dpbusd_avx_epi32(sums.lo, codes.lo, x.lo), _mm256_dpbusd_avx_epi32(sums.hi, codes.hi, x.hi)};
}
inline constexpr bool kDotSumsInMemory = false, kDotInTiles = false;
inline constexpr int kDotRows = 4, kDotTiles = 1, kDotChains = 4;  // 8 accumulators, 2 weights, activations and constants of the dot product
#else
inline constexpr bool kDotSumsInMemory = true, kDotInTiles = false;
inline constexpr int kDotRows = 6, kDotTiles = 1, kDotChains = 1;  // 12 integer sums, 2 weights, 1 activation, 1 product of 16 registers

// Sums of several products would be added up in another order, one that keeps all of the products on the stack.
template <class Lanes> GLM_INLINE Lanes in_this_order(Lanes x) {
  asm("" : "+x"(x));
  return x;
}

// sums + maddubs(codes, x). One statement, because GCC multiplies ahead of the additions and then keeps sums on the stack.
GLM_INLINE __m256i add_pairs(__m256i sums, __m256i codes, __m256i x) {
  __m256i products;
  asm("vpmaddubsw %[x], %[codes], %[products]\n\tvpaddw %[products], %[sums], %[sums]"
      : [sums] "+x"(sums), [products] "=&x"(products) : [codes] "x"(codes), [x] "x"(x));
  return sums;
}

// maddubs adds two products in 16 bits. A lane of 16 bits holds the products of 16 columns, half of a block, where codes have
// 4 bits: 16 · 15 · 127 = 30480. Its one multiplication and one addition are all that 32 columns take.
template <int bits> struct Dots {
  static_assert(bits == 4);
  using Partial = U;
  static constexpr int rows = kDotRows, passes = 1;
  static GLM_INLINE Partial begin(U) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static GLM_INLINE Partial add(Partial sums, U codes, U x) { return {add_pairs(sums.lo, codes.lo, x.lo), add_pairs(sums.hi, codes.hi, x.hi)}; }
  template <int> static GLM_INLINE Partial add_part(Partial sums, U codes, U x) { return add(sums, codes, x); }
  static GLM_INLINE U end(U start, Partial sums) {
    const __m256i one = _mm256_set1_epi16(1);
    return add_words(start, {_mm256_madd_epi16(sums.lo, one), _mm256_madd_epi16(sums.hi, one)});
  }
};
// 6 bits: 2 · 63 · 127 fit, no more.
template <> struct Dots<6> {
  using Partial = U;
  static constexpr int rows = kDotRows, passes = 1;
  static GLM_INLINE Partial begin(U start) { return start; }
  static GLM_INLINE __m256i add(__m256i sums, __m256i codes, __m256i x) {
    return in_this_order(_mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1))));
  }
  static GLM_INLINE Partial add(Partial sums, U codes, U x) { return {add(sums.lo, codes.lo, x.lo), add(sums.hi, codes.hi, x.hi)}; }
  template <int> static GLM_INLINE Partial add_part(Partial sums, U codes, U x) { return add(sums, codes, x); }
  static GLM_INLINE U end(U, Partial sums) { return sums; }
};
// 8 bits: two products overflow 16 bits. Even and odd bytes are widened.
template <> struct Dots<8> {
  using Partial = U;
  static GLM_INLINE Partial begin(U start) { return start; }
  static GLM_INLINE __m256i add(__m256i sums, __m256i codes, __m256i x) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(x, 8));
    return in_this_order(_mm256_add_epi32(sums, _mm256_add_epi32(even, odd)));
  }
  static GLM_INLINE Partial add(Partial sums, U codes, U x) { return {add(sums.lo, codes.lo, x.lo), add(sums.hi, codes.hi, x.hi)}; }
  static GLM_INLINE U end(U, Partial sums) { return sums; }
};

// In tiles 8 bits are two numbers of 4, which takes 4 instructions for 32 columns and no widening of activations.
template <int bits> struct TileDots : Dots<bits> {};
template <> struct TileDots<8> {
  struct Partial { U low, high; };
  static constexpr int rows = kDotRows / 2, passes = 2;  // one vector of 8 rows at a time: 12 sums, 2 weights, 1 activation, 1 product
  static GLM_INLINE Partial begin(U start) { return {Dots<4>::begin(start), Dots<4>::begin(start)}; }
  static GLM_INLINE void add(__m256i& low, __m256i& high, __m256i codes, __m256i x) {
    const __m256i mask = _mm256_set1_epi8(15);
    low = add_pairs(low, _mm256_and_si256(codes, mask), x);
    high = add_pairs(high, _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask), x);
  }
  template <int part> static GLM_INLINE Partial add_part(Partial sums, U codes, U x) {
    if constexpr (part == 0) add(sums.low.lo, sums.high.lo, codes.lo, x.lo);
    else add(sums.low.hi, sums.high.hi, codes.hi, x.hi);
    return sums;
  }
  static GLM_INLINE U end(U start, Partial sums) {
    const __m256i sixteen = _mm256_set1_epi16(16);
    return Dots<4>::end(add_words(start, {_mm256_madd_epi16(sums.high.lo, sixteen), _mm256_madd_epi16(sums.high.hi, sixteen)}), sums.low);
  }
};
#endif
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
inline constexpr int kDotGemvRows = 4, kDotGemvChains = kDotSumsInMemory ? 1 : 2;  // chains: and as many fp32 sums

}  // namespace glmlocal::GLM_ISA
