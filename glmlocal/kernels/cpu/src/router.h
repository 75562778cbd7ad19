// GLM-4.5's router ("noaux_tc"): sigmoid scores, a bias that takes part in choosing only, groups, top-k.
#pragma once

#include <cstdint>

namespace glmlocal {

struct RouterSettings {
  int top_k, n_group, topk_group;
  bool norm_topk_prob;
  float routed_scaling_factor;
};

// Throws std::invalid_argument where so many experts cannot be chosen so.
void check_router(const RouterSettings& settings, int64_t num_experts);

// x [num_tokens, hidden], weight [num_experts, hidden], correction_bias [num_experts]; ids and weights [num_tokens, top_k],
// by falling score + bias, of equals the lower id first. A token's result does not depend on the others.
void router_topk(const RouterSettings& settings, const float* x, const float* weight, const float* correction_bias,
                 int64_t num_tokens, int64_t num_experts, int64_t hidden, int32_t* ids, float* weights);

}  // namespace glmlocal
