// Router logits: dot products of tokens and experts, each summed in one order whatever is computed beside it.
#include "isa/lanes.h"
#include "memory.h"
#include "router.h"

namespace glmlocal::GLM_ISA {
namespace {

constexpr int kTokens = kGemmTiles >= 4 ? 6 : 2, kExperts = kGemmTiles >= 4 ? 4 : 2;  // of a register tile
constexpr int kChunk = 512;  // features: the chunks of all experts stay in L2 while tokens pass

// sums[token][expert][16 lanes] += products of features begin … end - 1, where lane l holds features l, l + 16, …
template <int tokens, int experts>
void add_products(const float* x, const float* weight, int hidden, int begin, int end, float* sums, int sums_stride) {
  F acc[tokens][experts];
  unroll<tokens>([&](auto t) {
    unroll<experts>([&](auto e) { acc[t.v][e.v] = begin == 0 ? zero() : load(sums + t.v * sums_stride + e.v * 16); });
  });
  auto step = [&](auto&& read, int k) {
    F w[experts];
    unroll<experts>([&](auto e) { w[e.v] = read(weight + e.v * ptrdiff_t(hidden) + k); });
    unroll<tokens>([&](auto t) {
      const F part = read(x + t.v * ptrdiff_t(hidden) + k);
      unroll<experts>([&](auto e) { acc[t.v][e.v] = fma(part, w[e.v], acc[t.v][e.v]); });
    });
  };
  int k = begin;
  for (; k + 16 <= end; k += 16) step([](const float* p) { return load(p); }, k);
  if (k < end) step([&](const float* p) { return load_first(p, end - k); }, k);
  unroll<tokens>([&](auto t) {
    unroll<experts>([&](auto e) { store(sums + t.v * sums_stride + e.v * 16, acc[t.v][e.v]); });
  });
}

template <int most_tokens, int most_experts>
void add_products(int tokens, int experts, const float* x, const float* weight, int hidden, int begin, int end, float* sums,
                  int sums_stride) {
  if constexpr (most_tokens > 1) {
    if (tokens < most_tokens) {
      return add_products<most_tokens - 1, most_experts>(tokens, experts, x, weight, hidden, begin, end, sums, sums_stride);
    }
  }
  if constexpr (most_experts > 1) {
    if (experts < most_experts) {
      return add_products<most_tokens, most_experts - 1>(tokens, experts, x, weight, hidden, begin, end, sums, sums_stride);
    }
  }
  add_products<most_tokens, most_experts>(x, weight, hidden, begin, end, sums, sums_stride);
}

}  // namespace

void router_scores(const float* x, const float* weight, int num_tokens, int num_experts, int hidden, float* scores,
                   ptrdiff_t scores_stride) {
  const int stride = num_experts * 16;
  float* sums = scratch(Scratch::work, size_t(num_tokens) * stride + 16);
  for (int begin = 0; begin < hidden; begin += kChunk) {
    const int end = begin + kChunk < hidden ? begin + kChunk : hidden;
    for (int token = 0; token < num_tokens; token += kTokens) {
      const int tokens = num_tokens - token < kTokens ? num_tokens - token : kTokens;
      for (int expert = 0; expert < num_experts; expert += kExperts) {
        const int experts = num_experts - expert < kExperts ? num_experts - expert : kExperts;
        add_products<kTokens, kExperts>(tokens, experts, x + ptrdiff_t(token) * hidden, weight + ptrdiff_t(expert) * hidden, hidden,
                                        begin, end, sums + token * ptrdiff_t(stride) + expert * 16, stride);
      }
    }
  }
  const F one = broadcast(1.0f);
  for (int token = 0; token < num_tokens; ++token) {
    for (int expert = 0; expert < num_experts; expert += 16) {
      const int n = num_experts - expert < 16 ? num_experts - expert : 16;
      alignas(64) float logits[16] = {};
      for (int i = 0; i < n; ++i) logits[i] = hidden == 0 ? 0.0f : sum(load(sums + token * ptrdiff_t(stride) + (expert + i) * 16));
      store_first(scores + token * scores_stride + expert, div(one, add(one, exp(sub(zero(), load(logits))))), n);
    }
  }
}

}  // namespace glmlocal::GLM_ISA
