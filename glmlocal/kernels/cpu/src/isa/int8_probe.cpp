// The same as probes.cpp for integer dot products.
#include "isa/simd.h"

namespace glmlocal::GLM_ISA {

double int8_ops(int iterations) {
  // Blocks of codes of 4 bits, where that matters: no other number of bits goes faster.
  using Sums = TileDots<4>;
  constexpr int chains = kDotRows * kDotTiles, words = 8;
  uint32_t start[chains * 16] = {};
  asm volatile("" : "+m"(start));
  U acc[chains];
  unroll<chains>([&](auto i) { acc[i.v] = load_words(start + i.v * 16); });
  for (int i = 0; i < iterations; ++i) {
    typename Sums::Partial sums[chains];
    unroll<chains>([&](auto c) { sums[c.v] = Sums::begin(acc[c.v]); });
    unroll<words>([&](auto) {
      asm volatile("" ::"r"(start) : "memory");  // else parts of a product that is the same every time would leave the loop
      const U codes = load_words(start), x = load_words(start + 16 % (chains * 16));
      unroll<chains>([&](auto c) { sums[c.v] = Sums::template add_part<0>(sums[c.v], codes, x); });
    });
    unroll<chains>([&](auto c) { acc[c.v] = Sums::end(acc[c.v], sums[c.v]); });
  }
  U total = splat(0);
  unroll<chains>([&](auto i) { total = add_words(total, acc[i.v]); });
  const int32_t result = sum_words(total);
  asm volatile("" ::"m"(result));
  return double(iterations) * words * chains * 64 * 2;
}

}  // namespace glmlocal::GLM_ISA
