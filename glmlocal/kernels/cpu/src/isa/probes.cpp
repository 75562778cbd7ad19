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

namespace {

template <int num_streams>
float read_streams(const std::byte* data, size_t num_bytes) {
  constexpr ptrdiff_t step = 256, ahead = num_streams == 1 ? 2048 : 1024;
  const ptrdiff_t part = ptrdiff_t(num_bytes) / num_streams;
  F acc[4] = {zero(), zero(), zero(), zero()};
  for (ptrdiff_t at = 0; at < part; at += step) {
    for (int stream = 0; stream < num_streams; ++stream) {
      const std::byte* p = data + stream * part + at;
      unroll<4>([&](auto i) {
        __builtin_prefetch(p + ahead + i.v * 64);
        acc[i.v] = max(acc[i.v], load((const float*)(p + i.v * 64)));
      });
    }
  }
  return maximum(max(max(acc[0], acc[1]), max(acc[2], acc[3])));
}

}  // namespace

// One stream or four: which is faster depends on the CPU's own prefetching (Zen 3: four, by a third).
float read_bytes(const void* data, size_t num_bytes, bool in_four_streams) {
  return in_four_streams ? read_streams<4>((const std::byte*)data, num_bytes) : read_streams<1>((const std::byte*)data, num_bytes);
}

}  // namespace glmlocal::GLM_ISA
