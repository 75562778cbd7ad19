// What this core can do at most, with the instructions the kernels use: the ceilings of the benchmarks.
#include "isa/simd.h"

namespace glmlocal::GLM_ISA {

double fma_flops(int iterations) {
  // As many chains as a register tile of matmul.cpp has, so that latency is hidden and nothing is loaded.
  constexpr int chains = kGemmRows * kGemmTiles;
  float start[chains * 16] = {};
  asm volatile("" : "+m"(start));  // else equal chains would be computed once
  F acc[chains];
  unroll<chains>([&](auto i) { acc[i.v] = load(start + i.v * 16); });
  const F factor = load(start), term = load(start + 16 % (chains * 16));
  for (int i = 0; i < iterations; ++i) {
    unroll<chains>([&](auto c) { acc[c.v] = fma(factor, acc[c.v], term); });
  }
  F total = zero();
  unroll<chains>([&](auto i) { total = add(total, acc[i.v]); });
  const float result = sum(total);
  asm volatile("" ::"m"(result));
  return double(iterations) * chains * 16 * 2;
}

float read_bytes(const void* data, size_t num_bytes) {
  const float* p = (const float*)data;
  const float* end = p + num_bytes / sizeof(float);
  F acc[4] = {zero(), zero(), zero(), zero()};
  for (; p < end; p += 64) {
    unroll<4>([&](auto i) {
      __builtin_prefetch(p + 512 + i.v * 16);
      acc[i.v] = max(acc[i.v], load(p + i.v * 16));
    });
  }
  return maximum(max(max(acc[0], acc[1]), max(acc[2], acc[3])));
}

}  // namespace glmlocal::GLM_ISA
