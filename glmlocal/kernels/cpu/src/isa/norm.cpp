// RMSNorm and rotary positions, one row or one token at a time.
#include "isa/lanes.h"

namespace glmlocal::GLM_ISA {
namespace {

// Calls f(i, n) for the vectors of a row of `size` floats: n is 16 but for a last, shorter one.
template <class Visit>
GLM_INLINE void for_vectors(int size, Visit&& f) {
  int i = 0;
  for (; i + 16 <= size; i += 16) f(i, 16);
  if (i < size) f(i, size - i);
}
GLM_INLINE F load_some(const float* p, int n) { return n == 16 ? load(p) : load_first(p, n); }
GLM_INLINE void store_some(float* p, F x, int n) { n == 16 ? store(p, x) : store_first(p, x, n); }

GLM_INLINE float inverse_rms(const float* x, float eps, int size) {
  F sums[4] = {zero(), zero(), zero(), zero()};
  int i = 0;
  for (; i + 64 <= size; i += 64) {
    unroll<4>([&](auto j) {
      const F part = load(x + i + 16 * j.v);
      sums[j.v] = fma(part, part, sums[j.v]);
    });
  }
  for_vectors(size - i, [&](int at, int n) {
    const F part = load_some(x + i + at, n);
    sums[0] = fma(part, part, sums[0]);
  });
  const float total = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  return 1.0f / __builtin_sqrtf(total / float(size) + eps);
}

}  // namespace

void rms_norm(const float* x, const float* weight, float eps, int size, float* out) {
  const F scale = broadcast(inverse_rms(x, eps, size));
  for_vectors(size, [&](int i, int n) {
    store_some(out + i, mul(mul(load_some(x + i, n), scale), load_some(weight + i, n)), n);
  });
}

void add_rows(float* x, const float* y, int size) {
  for_vectors(size, [&](int i, int n) { store_some(x + i, add(load_some(x + i, n), load_some(y + i, n)), n); });
}

void rope(float* x, const float* cos_sin, int half, int num_heads, int head_dim) {
  for (int head = 0; head < num_heads; ++head, x += head_dim) {
    for_vectors(half, [&](int j, int n) {
      const F first = load_some(x + j, n), second = load_some(x + half + j, n);
      const F cos = load_some(cos_sin + j, n), sin = load_some(cos_sin + half + j, n);
      store_some(x + j, sub(mul(first, cos), mul(second, sin)), n);
      store_some(x + half + j, add(mul(second, cos), mul(first, sin)), n);
    });
  }
}

}  // namespace glmlocal::GLM_ISA
