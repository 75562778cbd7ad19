// Pointwise steps between matrix products; n is a multiple of 16.
#include "isa/simd.h"

namespace glmlocal::GLM_ISA {

void silu_mul(float* gate, const float* up, int n) {
  for (int i = 0; i < n; i += 16) store(gate + i, mul(silu(load(gate + i)), load(up + i)));
}

void add_scaled(float* out, const float* x, float scale, int n) {
  const F factor = broadcast(scale);
  for (int i = 0; i < n; i += 16) store(out + i, fma(load(x + i), factor, load(out + i)));
}

}  // namespace glmlocal::GLM_ISA
