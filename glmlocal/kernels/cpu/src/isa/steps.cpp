// One row of the steps between matrix products. Lengths need not be multiples of 16.
#include "isa/simd.h"

namespace glmlocal::GLM_ISA {

void rms_norm_row(const float* x, const float* weight, float eps, int n, float* out) {
  F squares = zero();
  int i = 0;
  for (; i + 16 <= n; i += 16) squares = fma(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (; i < n; ++i) total += x[i] * x[i];
  const float scale = 1.0f / __builtin_sqrtf(total / float(n) + eps);
  const F factor = broadcast(scale);
  for (i = 0; i + 16 <= n; i += 16) store(out + i, mul(mul(load(x + i), factor), load(weight + i)));
  for (; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

// (first, second) ← (first · cos - second · sin, second · cos + first · sin), second being `half` floats behind first.
void rotate(float* head, const float* cos, const float* sin, int half) {
  int i = 0;
  for (; i + 16 <= half; i += 16) {
    const F a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
    store(head + i, sub(mul(a, c), mul(b, s)));
    store(head + half + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

void sigmoid(const float* x, int n, float* out) {
  const auto of = [](F v) { return div(broadcast(1.0f), add(broadcast(1.0f), exp(sub(zero(), v)))); };
  int i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, of(load(x + i)));
  if (i == n) return;
  float tail[16] = {};
  for (int j = i; j < n; ++j) tail[j - i] = x[j];
  store(tail, of(load(tail)));
  for (int j = i; j < n; ++j) out[j] = tail[j - i];
}

}  // namespace glmlocal::GLM_ISA
