#include "quantize.h"

#include <cmath>
#include <cstring>

// No fused operations and sums in a fixed order of 8 partial sums: every clone gives the same bits, and so does numpy.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define GLM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GLM_CLONES
#endif

#define GLM_INLINE inline __attribute__((always_inline))

namespace glmlocal {
namespace {

constexpr int kSums = 8;     // of the columns of a group: column c belongs to sum c % 8
constexpr int kGroups = 16;  // that are quantized at once, one per lane
constexpr float kZero = 1e-30f;  // smaller weights have no scale in fp16 by far

using Lanes = float __attribute__((vector_size(kGroups * sizeof(float))));
using Mask = int32_t __attribute__((vector_size(kGroups * sizeof(float))));
using Codes = uint8_t __attribute__((vector_size(kGroups)));
using Bits = uint32_t __attribute__((vector_size(kGroups * sizeof(float))));

GLM_INLINE Lanes all(float x) { return x - Lanes{}; }

// Nearest fp16, ties to even, for magnitudes below 65504.
GLM_INLINE Lanes to_f16(Lanes x) {
  const Lanes subnormal = (x + 0.75f) - 0.75f;  // multiples of 2^-24
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += 0xfff + ((bits >> 13) & 1);
  bits &= ~0x1fffu;
  Lanes normal;
  std::memcpy(&normal, &bits, sizeof normal);
  return (x < 0 ? -x : x) < 0x1p-14f ? subnormal : normal;
}

GLM_INLINE Lanes sum(const Lanes* v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

GLM_INLINE Lanes magnitude(Lanes v) { return v < 0 ? -v : v; }

GLM_INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

// The nearest integer, ties to even, for magnitudes below 2^22, clipped.
GLM_INLINE Lanes code_of(Lanes exact, float low, float high) {
  Lanes code = (exact + 0x1.8p23f) - 0x1.8p23f;
  code = code < low ? all(low) : code;
  return code > high ? all(high) : code;
}

// w[c]: column c of every group. Codes go to `chosen`, less the lowest, and scales to `scale_out`. False: see quantize_rows.
GLM_CLONES bool quantize_groups(const Lanes* w, const QuantizeRule& rule, Codes* chosen, Lanes* scale_out) {
  Lanes most{}, size{}, relative[kQuantGroup];
  Mask fine = most == most;
  for (int c = 0; c < kQuantGroup; ++c) most = larger(magnitude(w[c]), most);
  for (int c = kQuantGroup - 1; c >= 0; --c) {  // the first of the largest decides the sign
    const Lanes value = magnitude(w[c]);
    size = value == most ? -w[c] : size;
    fine &= value < rule.limit;  // false for NaN
  }
  for (int g = 0; g < kGroups; ++g) {
    if (!fine[g]) return false;
  }
  const auto counts = most > kZero;
  size = counts ? size : all(1);
  for (int c = 0; c < kQuantGroup; ++c) relative[c] = counts ? w[c] / size : all(0);

  Lanes best_error = all(INFINITY), best_scale{}, best_steps{};
  for (int candidate = 0; candidate < rule.num_candidates; ++candidate) {
    const float steps = rule.candidates[candidate];
    Lanes shifts[kSums], norms[kSums], squares[kSums];
    for (int j = 0; j < kSums; ++j) {
      Lanes shift{}, norm{}, square{};
      for (int c = j; c < kQuantGroup; c += kSums) {
        const Lanes exact = relative[c] * steps, code = code_of(exact, rule.low, rule.high), error = exact - code;
        shift += error * code;
        norm += code * code;
        square += error * error;
      }
      shifts[j] = shift;
      norms[j] = norm;
      squares[j] = square;
    }
    const Lanes shift = sum(shifts), norm = sum(norms);
    const auto any = norm > 0;
    const Lanes slope = any ? shift / norm : all(0);
    const Lanes wanted = any ? (1 + slope) / steps * size : all(0);
    const Lanes scale = to_f16(wanted);
    const Lanes rounding = (scale - wanted) / size;
    const Lanes left = (sum(squares) - shift * slope) / (steps * steps) + rounding * rounding * norm;
    const auto better = left < best_error;
    best_error = better ? left : best_error;
    best_scale = better ? scale : best_scale;
    best_steps = better ? all(steps) : best_steps;
  }
  // The nearest codes for the scale as rounded, unless the largest changed: then quantizing again would differ.
  const Lanes inverse = best_scale != 0 ? 1 / best_scale : all(0);
  Lanes largest_code{}, largest_best{};
  for (int c = 0; c < kQuantGroup; ++c) {
    largest_code = larger(magnitude(code_of(w[c] * inverse, rule.low, rule.high)), largest_code);
    largest_best = larger(magnitude(code_of(relative[c] * best_steps, rule.low, rule.high)), largest_best);
  }
  const auto same = largest_code == largest_best;
  for (int c = 0; c < kQuantGroup; ++c) {
    const Lanes code = code_of(same ? w[c] * inverse : relative[c] * best_steps, rule.low, rule.high);
    chosen[c] = __builtin_convertvector(__builtin_convertvector(code - rule.low, Mask), Codes);
  }
  *scale_out = best_scale;
  return true;
}

}  // namespace

bool quantize_rows(const float* weights, int64_t rows, int64_t columns, const QuantizeRule& rule, uint8_t* codes, float* scales) {
  const int64_t per_row = (columns + kQuantGroup - 1) / kQuantGroup, num_groups = rows * per_row;
  alignas(64) float tile[kQuantGroup][kGroups], scale[kGroups];
  alignas(64) uint8_t chosen[kQuantGroup][kGroups];
  for (int64_t first = 0; first < num_groups; first += kGroups) {
    const int count = int(num_groups - first < kGroups ? num_groups - first : kGroups);
    const auto place = [&](int g) { return (first + g) / per_row * columns + (first + g) % per_row * kQuantGroup; };
    const auto width = [&](int g) {
      const int64_t left = columns - (first + g) % per_row * kQuantGroup;
      return int(left < kQuantGroup ? left : kQuantGroup);
    };
    for (int g = 0; g < kGroups; ++g) {
      const int filled = g < count ? width(g) : 0;
      const float* from = weights + (filled != 0 ? place(g) : 0);
      for (int c = 0; c < filled; ++c) tile[c][g] = from[c];
      for (int c = filled; c < kQuantGroup; ++c) tile[c][g] = 0;
    }
    const bool fine = quantize_groups(reinterpret_cast<const Lanes*>(tile), rule, reinterpret_cast<Codes*>(chosen),
                                      reinterpret_cast<Lanes*>(scale));
    if (!fine) return false;
    for (int g = 0; g < count; ++g) {
      uint8_t* to = codes + place(g);
      const int filled = width(g);
      for (int c = 0; c < filled; ++c) to[c] = chosen[c][g];
      scales[first + g] = scale[g];
    }
  }
  return true;
}

}  // namespace glmlocal
