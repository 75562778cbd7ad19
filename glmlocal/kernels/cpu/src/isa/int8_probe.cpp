// The same as probes.cpp for integer dot products.
#include "isa/simd.h"

namespace glmlocal::GLM_ISA {

GLM_FLATTEN double int8_ops(int iterations) {
  // Codes of 4 bits, where that matters: no other number of bits goes faster. What sums of 16 bits take to be added up is
  // not counted, nor do they stay in range.
  using Sums = TileDots<4>;
  constexpr int chains = kDotRows * kDotTiles, words = 8;
  uint32_t start[chains * 16] = {};
  asm volatile("" : "+m"(start));
  typename Sums::Partial sums[chains];
  unroll<chains>([&](auto c) { sums[c.v] = Sums::begin(load_words(start + c.v * 16)); });
  for (int i = 0; i < iterations; ++i) {
    unroll<words>([&](auto) {
      asm volatile("" : "+m"(start));  // else parts of a product that is the same every time would leave the loop
      const U codes = load_words(start), x = splat(start[16 % (chains * 16)]);
      unroll<chains>([&](auto c) { sums[c.v] = Sums::template add_part<0>(sums[c.v], codes, x); });
    });
  }
  U total = splat(0);
  unroll<chains>([&](auto c) { total = add_words(total, Sums::end(splat(0), sums[c.v])); });
  const int32_t result = sum_words(total);
  asm volatile("" ::"m"(result));
  return double(iterations) * words * chains * 64 * 2;
}

}  // namespace glmlocal::GLM_ISA
