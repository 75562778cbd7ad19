// What attention multiplies: floats, pairs of bf16 or pairs of int16, and how elements of the cache become that.
// Included by attention.cpp alone, which says whether there are pairs of bf16 (GLM_HAS_PAIRS).
#pragma once

#include "cache_type.h"
#include "attention.h"
#include "isa/lanes.h"

namespace glmlocal::GLM_ISA {
namespace {

// 16 elements of the cache, widened.
GLM_INLINE F widen(const float* p) { return load(p); }
GLM_INLINE F widen(const Bf16* p) { return as_float(shl<16>(load_halves(p))); }
GLM_INLINE F widen(const int8_t* p) { return load_i8(p); }
GLM_INLINE F widen(const Fp8* p) {
  // Exponent and mantissa under an exponent of 2 give 2^(e + 1) · (1 + m / 8), eight powers of two too large; where e is 0,
  // m · 2^-9 is wanted. No step makes a subnormal float, which would be slow.
  const U bits = load_bytes(p);
  const F large = as_float(select(splat(0x07f00000), shl<20>(bits), splat(0x40000000)));
  const F subnormal = fma(large, broadcast(0x1p-7f), broadcast(-0x1p-6f));
  const F size = where_less(large, broadcast(4.0f), subnormal, mul(large, broadcast(0x1p-8f)));
  const F number = where_less(broadcast(448.0f), size, broadcast(__builtin_nanf("")), size);
  return as_float(select(splat(0x80000000), shl<24>(bits), as_words(number)));
}
// The first n of them, zeros after them.
template <class Element>
GLM_INLINE F widen_first(const Element* p, int n) {
  Element lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return widen(lanes);
}

// Magnitudes order as integers too, and NaN is the largest.
GLM_INLINE U larger_magnitude(U so_far, F x) { return max_words(so_far, bit_and(as_words(x), splat(0x7fffffff))); }
GLM_INLINE float largest_lane(U magnitudes) {
  const int32_t bits = max_of_words(magnitudes);
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}
// most / largest; 0 where that would not be finite. Values below 2e-31, whose scale is a weight's, are taken for zeros.
GLM_INLINE F inverse_of(F largest, float most) {
  return where_less(broadcast(3e-35f), largest, div(broadcast(most), largest), zero());
}

template <class Element>
GLM_INLINE float largest_of_row(const Element* from, int head_dim) {
  U largest = splat(0);
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) largest = larger_magnitude(largest, widen(from + d));
  if (d < head_dim) largest = larger_magnitude(largest, widen_first(from + d, head_dim - d));
  return largest_lane(largest);
}

// What the inner loops multiply. An operand is one float, or two bf16 or int16 that are neighbours along the sum and lie in
// the place of one float; a row of operands is written 16 features or keys at a time. Integers are a row's numbers over a
// scale of its own, and so are sums of their products.
struct Floats {
  static constexpr int step = 1;
  static constexpr bool integers = false;
  static GLM_INLINE F multiply_add(F a, F b, F c) { return fma(a, b, c); }
  static GLM_INLINE void put(float* row, int at, F x) { store(row + at, x); }
  template <int vectors, class Element>
  static GLM_INLINE void put_operands(float* to, const Element* p, const Element*) {
    unroll<vectors>([&](auto i) { store(to + i.v * kLanes, widen(p + i.v * kLanes)); });
  }
};

#if GLM_HAS_PAIRS
constexpr struct Fp8Sizes {  // the bf16 of each code without its sign
  alignas(64) uint16_t bf16[128] = {};
  constexpr Fp8Sizes() {
    for (int code = 1; code < 8; ++code) {  // subnormal: code · 2^-9
      const int exponent = code >= 4 ? 2 : code >= 2 ? 1 : 0;
      bf16[code] = uint16_t((118 + exponent) << 7 | (code << (7 - exponent) & 0x7f));
    }
    for (int code = 8; code < 127; ++code) bf16[code] = uint16_t((120 << 7) + (code << 4));
    bf16[127] = 0x7fc0;
  }
} kFp8Sizes;

constexpr struct Interleave {  // 0, 32, 1, 33 …: one element of the first vector, one of the second
  alignas(64) uint16_t lanes[64] = {};
  constexpr Interleave() {
    for (int i = 0; i < 64; ++i) lanes[i] = uint16_t(i / 2 + i % 2 * 32);
  }
} kInterleave;

struct Pairs {
  static constexpr int step = 2;
  static constexpr bool integers = false;
  static GLM_INLINE F multiply_add(F a, F b, F c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  static GLM_INLINE void put(float* row, int at, F x) {
    _mm256_storeu_si256((__m256i*)((char*)row + 2 * at), (__m256i)_mm512_cvtneps_pbh(x));
  }
  // Pairs of one element each from both.
  template <int vectors, class Element>
  static GLM_INLINE void put_operands(float* to, const Element* first, const Element* second) {
    unroll<vectors>([&](auto i) { store(to + i.v * kLanes, operands(first + i.v * kLanes, second + i.v * kLanes)); });
  }
  template <int vectors>
  static GLM_INLINE void put_operands(float* to, const Bf16* first, const Bf16* second) {
    if constexpr (vectors == 1) return store(to, operands(first, second));
    static_assert(vectors <= 2);
    const U a = load_words(first), b = load_words(second);
    store(to, as_float(_mm512_permutex2var_epi16(a, load_words(kInterleave.lanes), b)));
    store(to + kLanes, as_float(_mm512_permutex2var_epi16(a, load_words(kInterleave.lanes + 32), b)));
  }

 private:
  template <class Element>
  static GLM_INLINE F operands(const Element* first, const Element* second) {
    return as_float(select(splat(0xffff0000), as_words(widen(second)), shr<16>(as_words(widen(first)))));
  }
  static GLM_INLINE F operands(const Bf16* first, const Bf16* second) {
    return as_float(select(splat(0xffff0000), shl<16>(load_halves(second)), load_halves(first)));
  }
  static GLM_INLINE F operands(const Fp8* first, const Fp8* second) {
    const U codes = select(splat(0xffff0000), shl<16>(load_bytes(second)), load_bytes(first));
    const uint16_t* sizes = kFp8Sizes.bf16;
    const U small = _mm512_permutex2var_epi16(load_words(sizes), codes, load_words(sizes + 32));
    const U large = _mm512_permutex2var_epi16(load_words(sizes + 64), codes, load_words(sizes + 96));
    const U size = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(codes, splat(0x00400040)), small, large);
    return as_float(select(splat(0x80008000), shl<8>(codes), size));
  }
};
// Intel's (Emerald Rapids) take four times as long for a vector of pairs as for one of floats.
bool cpu_has_pairs() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd"); }
#endif

#if defined(__AVX512VNNI__)
// A row is one query's features, one key's or value's, or the weights of a tile's keys; the largest magnitude of each is
// kMost… Sums of head_dim or kTileKeys products stay below 2^31. What a key loses is less than what bf16 loses of its
// largest features: half of 2^-12 of the largest, which is at most sqrt(head_dim) times the root mean square.
struct Integers {
  static constexpr int step = 2;
  static constexpr bool integers = true;
  static constexpr int kMost = 4095, kMostWeight = 8191;  // of a key or value; of a weight
  static_assert(int64_t(kTileKeys) * kMost * kMostWeight < int64_t(1) << 31);
  static int most_of_query(int head_dim) {
    const int64_t most = ((int64_t(1) << 31) - 1) / (int64_t(head_dim) * kMost);
    return most < kMost ? int(most) : kMost;
  }

  static GLM_INLINE F multiply_add(F a, F b, F c) {  // as dot() in simd_avx512.h
    asm("vpdpwssd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
  static GLM_INLINE void put(float* row, int at, F x) {
    _mm256_storeu_si256((__m256i*)((char*)row + 2 * at), _mm512_cvtepi32_epi16(to_words(x)));
  }
  // Pairs of one number each from both, which are whole.
  static GLM_INLINE F operands(F first, F second) {
    return as_float(select(splat(0xffff0000), shl<16>(to_words(second)), to_words(first)));
  }
};
#endif

}  // namespace
}  // namespace glmlocal::GLM_ISA
