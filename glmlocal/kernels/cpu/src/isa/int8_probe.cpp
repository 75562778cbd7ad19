// The same as probes.cpp for integer dot products.
#include "isa/simd.h"
#if defined(__AMX_INT8__)
#include "isa/amx.h"
#endif

namespace glmlocal::GLM_ISA {

#if defined(__AMX_INT8__)

// Full tiles: 64 columns a product. Products whose scales are finer, as all of ours, reach half of it at most.
double int8_ops(int iterations) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, 16, 64);
  const Tiles tiles(config);
  for (int i = 0; i < iterations; ++i) {
    multiply_tiles<0, 4, 6, false>();
    multiply_tiles<1, 4, 7, false>();
    multiply_tiles<2, 5, 6, false>();
    multiply_tiles<3, 5, 7, false>();
  }
  return double(iterations) * 4 * 16 * 16 * 64 * 2;
}

#else

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

#endif

}  // namespace glmlocal::GLM_ISA
