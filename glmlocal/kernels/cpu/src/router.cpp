#include "router.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "memory.h"
#include "thread_pool.h"

namespace glmlocal {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int kTaskTokens = 24, kTaskExperts = 16;
constexpr double kNsPerFlop = 1.0 / 60, kNsPerByte = 1.0 / 30;  // of one thread

// The indices of the `count` largest values, falling, of equals the one that comes first.
void choose_largest(const float* values, int num_values, int count, int32_t* chosen) {
  int found = 0;
  for (int i = 0; i < num_values; ++i) {
    const float value = values[i];
    if (found == count && !(value > values[chosen[found - 1]])) continue;
    int at = found < count ? found++ : found - 1;
    for (; at > 0 && value > values[chosen[at - 1]]; --at) chosen[at] = chosen[at - 1];
    chosen[at] = i;
  }
}

// Minus infinity for the experts of all but the topk_group groups whose two largest values have the largest sums.
void drop_groups(const RouterSettings& settings, float* choice, int num_experts, float* group_scores, int32_t* kept) {
  const int size = num_experts / settings.n_group;
  for (int group = 0; group < settings.n_group; ++group) {
    int32_t best[2];
    const float* values = choice + group * size;
    choose_largest(values, size, 2, best);
    group_scores[group] = values[best[0]] + values[best[1]];
  }
  choose_largest(group_scores, settings.n_group, settings.topk_group, kept);
  for (int group = 0; group < settings.n_group; ++group) {
    if (std::find(kept, kept + settings.topk_group, group) != kept + settings.topk_group) continue;
    std::fill_n(choice + group * size, size, kNever);
  }
}

}  // namespace

void check_router(const RouterSettings& settings, int64_t num_experts) {
  auto fail = [](const std::string& message) { throw std::invalid_argument("router_topk: " + message); };
  const int64_t groups = settings.n_group;
  if (groups < 1 || num_experts % groups != 0 || (groups > 1 && num_experts / groups < 2)) {
    fail("n_group wanted a divisor of the " + std::to_string(num_experts) + " experts that leaves at least 2 in a group, found " +
         std::to_string(groups));
  }
  if (groups > 1 && (settings.topk_group < 1 || settings.topk_group > groups)) {
    fail("topk_group wanted from 1 to n_group = " + std::to_string(groups) + ", found " + std::to_string(settings.topk_group));
  }
  const int64_t candidates = groups > 1 ? num_experts / groups * settings.topk_group : num_experts;
  if (settings.top_k < 1 || settings.top_k > candidates) {
    fail("top_k wanted from 1 to the " + std::to_string(candidates) + " experts to choose from, found " + std::to_string(settings.top_k));
  }
}

void router_topk(const RouterSettings& settings, const float* x, const float* weight, const float* correction_bias,
                 int64_t num_tokens, int64_t num_experts, int64_t hidden, int32_t* ids, float* weights) {
  const int experts = int(num_experts);
  const KernelTable& kernel = kernels();
  float* scores = scratch(Scratch::scores, size_t(num_tokens * num_experts));

  // Few tokens are bound by reading the weight: cut it; many by arithmetic: cut the tokens.
  const int task_experts = num_tokens < kTaskTokens ? kTaskExperts : experts;
  const int token_tasks = int((num_tokens + kTaskTokens - 1) / kTaskTokens), expert_tasks = (experts + task_experts - 1) / task_experts;
  const double cost_ns = double(num_experts) * hidden * (2.0 * num_tokens * kNsPerFlop + 4 * kNsPerByte);
  parallel_for(token_tasks * expert_tasks, cost_ns, [&](int task) {
    const int64_t token = int64_t(task / expert_tasks) * kTaskTokens;
    const int expert = task % expert_tasks * task_experts;
    kernel.router_scores(x + token * hidden, weight + expert * hidden, int(std::min<int64_t>(kTaskTokens, num_tokens - token)),
                         std::min(task_experts, experts - expert), int(hidden), scores + token * num_experts + expert, num_experts);
  });

  parallel_for(token_tasks, double(num_tokens * num_experts) * 4, [&](int task) {
    const int64_t begin = int64_t(task) * kTaskTokens, end = std::min(num_tokens, begin + kTaskTokens);
    float* choice = scratch(Scratch::work, size_t(experts + settings.n_group + settings.n_group));
    float* group_scores = choice + experts;
    auto* kept = reinterpret_cast<int32_t*>(group_scores + settings.n_group);
    for (int64_t token = begin; token < end; ++token) {
      const float* score = scores + token * num_experts;
      for (int e = 0; e < experts; ++e) {
        const float sum = score[e] + correction_bias[e];
        choice[e] = sum == sum ? sum : kNever;  // a NaN would compare as equal to everything
      }
      if (settings.n_group > 1) drop_groups(settings, choice, experts, group_scores, kept);
      int32_t* chosen = ids + token * settings.top_k;
      float* out = weights + token * settings.top_k;
      choose_largest(choice, experts, settings.top_k, chosen);
      float total = 0;
      for (int i = 0; i < settings.top_k; ++i) total += score[chosen[i]];
      for (int i = 0; i < settings.top_k; ++i) {
        const float share = settings.norm_topk_prob ? score[chosen[i]] / (total + 1e-20f) : score[chosen[i]];
        out[i] = share * settings.routed_scaling_factor;
      }
    }
  });
}

}  // namespace glmlocal
