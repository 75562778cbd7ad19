#include "quantize.h"

#include <bit>
#include <cmath>
#include <cstring>

// No fused operations and sums in a fixed order of 8 lanes: every clone gives the same bits, and so does numpy.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define GLM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GLM_CLONES
#endif

#define GLM_INLINE inline __attribute__((always_inline))

namespace glmlocal {
namespace {

constexpr int kLanes = 8;
constexpr float kZero = 1e-30f;  // smaller weights have no scale in fp16 by far

// Nearest fp16, ties to even, for magnitudes below 65504.
GLM_INLINE float to_f16(float x) {
  if (std::abs(x) < 0x1p-14f) return (x + 0.75f) - 0.75f;  // subnormal: multiples of 2^-24
  uint32_t bits = std::bit_cast<uint32_t>(x);
  bits += 0xfff + ((bits >> 13) & 1);
  return std::bit_cast<float>(bits & ~0x1fffu);
}

using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
constexpr int kVectors = kQuantGroup / kLanes;

GLM_INLINE Lanes all(float x) { return Lanes{x, x, x, x, x, x, x, x}; }

GLM_INLINE Lanes load(const float* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

GLM_INLINE float sum(Lanes v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

GLM_INLINE float largest_of(Lanes v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

GLM_INLINE Lanes magnitude(Lanes v) { return v < 0 ? -v : v; }

// The nearest integer, ties to even, for magnitudes below 2^22, clipped.
GLM_INLINE Lanes code_of(Lanes exact, Lanes low, Lanes high) {
  const Lanes magic = all(0x1.8p23f);
  Lanes code = (exact + magic) - magic;
  code = code < low ? low : code;
  return code > high ? high : code;
}

GLM_CLONES bool quantize_group(const float* weights, const QuantizeRule& rule, float* chosen, float* scale_out) {
  const Lanes low = all(rule.low), high = all(rule.high), limit = all(rule.limit);
  Lanes w[kVectors], most = all(0);
  for (int k = 0; k < kVectors; ++k) {
    w[k] = load(weights + k * kLanes);
    const Lanes size = magnitude(w[k]);
    const auto fine = size < limit;  // false for NaN
    for (int i = 0; i < kLanes; ++i) {
      if (!fine[i]) return false;
    }
    most = size > most ? size : most;
  }
  const float largest = largest_of(most);
  Lanes relative[kVectors] = {}, best[kVectors] = {};
  float size = 1;
  if (largest > kZero) {
    int first = 0;
    while (std::abs(weights[first]) != largest) ++first;
    size = -weights[first];
    for (int k = 0; k < kVectors; ++k) relative[k] = w[k] / all(size);
  }
  float best_error = INFINITY, best_scale = 0;
  for (int c = 0; c < rule.num_candidates; ++c) {
    const float steps = rule.candidates[c];
    Lanes codes[kVectors], shifts = all(0), norms = all(0), squares = all(0);
    for (int k = 0; k < kVectors; ++k) {
      const Lanes exact = relative[k] * all(steps);
      codes[k] = code_of(exact, low, high);
      const Lanes error = exact - codes[k];
      shifts += error * codes[k];
      norms += codes[k] * codes[k];
      squares += error * error;
    }
    const float shift = sum(shifts), norm = sum(norms);
    const float slope = norm > 0 ? shift / norm : 0.0f;
    const float wanted = norm > 0 ? (1 + slope) / steps * size : 0.0f;
    const float scale = to_f16(wanted);
    const float rounding = (scale - wanted) / size;
    const float left = (sum(squares) - shift * slope) / (steps * steps) + rounding * rounding * norm;
    if (left < best_error) {
      best_error = left;
      best_scale = scale;
      for (int k = 0; k < kVectors; ++k) best[k] = codes[k];
    }
  }
  // The nearest codes for the scale as rounded, unless the largest changed: then quantizing again would differ.
  const Lanes inverse = all(best_scale != 0 ? 1 / best_scale : 0.0f);
  Lanes codes[kVectors], largest_code = all(0), largest_best = all(0);
  for (int k = 0; k < kVectors; ++k) {
    codes[k] = code_of(w[k] * inverse, low, high);
    const Lanes one = magnitude(codes[k]), other = magnitude(best[k]);
    largest_code = one > largest_code ? one : largest_code;
    largest_best = other > largest_best ? other : largest_best;
  }
  const bool same = largest_of(largest_code) == largest_of(largest_best);
  for (int k = 0; k < kVectors; ++k) {
    const Lanes code = (same ? codes[k] : best[k]) - low;
    std::memcpy(chosen + k * kLanes, &code, sizeof code);
  }
  *scale_out = best_scale;
  return true;
}

}  // namespace

bool quantize_rows(const float* weights, int64_t rows, int64_t columns, const QuantizeRule& rule, uint8_t* codes, float* scales) {
  float padded[kQuantGroup], chosen[kQuantGroup];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kQuantGroup) {
      const float* group = weights + r * columns + c;
      const int width = columns - c < kQuantGroup ? int(columns - c) : kQuantGroup;
      if (width < kQuantGroup) {
        std::memset(padded, 0, sizeof padded);
        std::memcpy(padded, group, size_t(width) * sizeof(float));
        group = padded;
      }
      if (!quantize_group(group, rule, chosen, scales++)) return false;
      uint8_t* out = codes + r * columns + c;
      for (int i = 0; i < width; ++i) out[i] = uint8_t(int(chosen[i]));
    }
  }
  return true;
}

}  // namespace glmlocal
