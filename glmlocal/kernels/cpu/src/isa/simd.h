// Sixteen fp32 or uint32 lanes as one value, whatever the ISA: what the kernels are written in.
//
// Included only by files that are compiled per ISA. Everything lives in the namespace of that ISA and is inlined, so that
// no function compiled for one CPU can be linked into the code of another. For the same reason these files use nothing of
// the standard library that could be emitted out of line.
//
// The operations, all elementwise unless said otherwise:
//   zero broadcast load store add sub mul div max min     fma(a, b, c) = a·b + c, fused where the ISA can (generic: rounded twice)
//   load_f16 load_i8 load_u8                              16 narrower numbers in memory, widened
//   load_bytes load_halves                                16 uint8 or uint16 in memory, as words with zeros above
//   load_words splat shift_right shr<n> shl<n> sar<n> (keeps the sign) bit_and select(m, a, b) = (a & m) | (b & ~m)      on U
//   as_float as_words, to_words(round to nearest) to_float  reinterpret and convert; words are then signed, as in
//   max_words add_words, sum_words max_of_words (over the lanes), store_words, store_low_bytes (16 bytes)
//   dot(sums, codes, x)                                   sums + Σ over the 4 bytes of each word of codes (0 … 255) · x (int8), exact
//   Dots<bits>, TileDots<bits>                            the same over the 8 words of a block, see below
//   ByteTable, make_byte_table, lookup_bytes(table, words)  each byte (0 … 15) replaced by one of 16
//   Table, make_table, lookup(table, words)               by the low 4 bits of each word
//   byte_bias, byte_value<j>(words, bias)                 byte j of each word as fp32, minus the bias
//   sum, maximum                                          over the lanes, in one fixed order
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#define GLM_INLINE inline __attribute__((always_inline))
#if defined(__SANITIZE_ADDRESS__)
#define GLM_FLATTEN  // instrumented, flat functions take GCC many minutes each
#else
#define GLM_FLATTEN __attribute__((flatten))  // everything called here is inlined, bodies of unroll() above all
#endif

namespace glmlocal::GLM_ISA {

template <int value>
struct Constant {
  static constexpr int v = value;
};

template <class F, int... indices>
GLM_INLINE void unroll(F&& f, std::integer_sequence<int, indices...>) {
  (f(Constant<indices>{}), ...);
}

// Calls f(Constant<0>), f(Constant<1>) … with indices known at compile time, so that arrays of lanes stay in registers.
template <int count, class F>
GLM_INLINE void unroll(F&& f) {
  unroll(f, std::make_integer_sequence<int, count>{});
}

}  // namespace glmlocal::GLM_ISA

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

namespace glmlocal::GLM_ISA {

// Exact int32 sums of start + Σ codes · x over at most 8 words (32 columns), codes below 2^bits (4, 6 or 8), |x| ≤ 127:
//
//   Partial p = begin(start);  p = add(p, codes, x) for each word;  U sums = end(start, p)
//
// TileDots are for register tiles of at most `rows` rows, and add a word in `passes` parts. Where dot() is one instruction
// both are just that, the same for all numbers of bits.
#if defined(__AVX512F__) || defined(__AVXVNNI__) || !defined(__AVX2__)
template <int bits> struct Dots {
  using Partial = U;
  static constexpr int rows = kDotRows, passes = 1;
  static GLM_INLINE Partial begin(U start) { return start; }
  static GLM_INLINE Partial add(Partial sums, U codes, U x) { return dot(sums, codes, x); }
  template <int> static GLM_INLINE Partial add_part(Partial sums, U codes, U x) { return dot(sums, codes, x); }
  static GLM_INLINE U end(U, Partial sums) { return sums; }
};
template <int bits> using TileDots = Dots<bits>;
#endif

// Whether to ask for what is read once by non-temporal prefetches: on Zen 5 they are 1.1 times as fast as others, on
// Emerald Rapids they bring a quarter to a half as much.
#if defined(__x86_64__)
GLM_INLINE bool reads_past_caches() { return __builtin_cpu_is("amd"); }
#else
GLM_INLINE bool reads_past_caches() { return false; }
#endif

// e^x within 2 ulp; 0 below -87.3 and inf above 88.4, where the result leaves the normal numbers; NaN stays NaN.
GLM_INLINE F exp(F x) {
  // e^x = 2^n · e^r with |r| ≤ ln2/2; ln2 in two parts keeps r exact (Cody and Waite); Taylor to r^7 leaves 2^-27.
  const F n = round(mul(x, broadcast(1.44269504088896341f)));
  F r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  F p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return where_less(x, broadcast(-87.33654f), zero(),
                    where_less(broadcast(88.37626f), x, broadcast(__builtin_inff()), mul(p, exp2_int(n))));
}

GLM_INLINE F silu(F x) { return div(x, add(broadcast(1.0f), exp(sub(zero(), x)))); }

}  // namespace glmlocal::GLM_ISA
