#include "steps.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "isa.h"
#include "memory.h"
#include "thread_pool.h"

namespace glmlocal {
namespace {

// Rows in tasks of a few µs each; cost_ns is one row's.
template <class Body>
void parallel_rows(int64_t rows, double cost_ns, Body&& body) {
  const int64_t per_task = std::clamp<int64_t>(int64_t(4000 / cost_ns), 1, std::max<int64_t>(rows, 1));
  parallel_for(int((rows + per_task - 1) / per_task), cost_ns * double(rows), [&](int task) {
    for (int64_t r = task * per_task; r < std::min(rows, (task + 1) * per_task); ++r) body(r);
  });
}

// The index of the largest score; the lowest among equals.
int64_t index_of_largest(float* scores, int64_t count) {
  return std::max_element(scores, scores + count) - scores;
}

// Scores of experts outside the topk_group groups with the largest sums of their two best become -inf.
void drop_groups(const Routing& routing, float* choice, float* group_scores) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  const int64_t size = routing.experts / routing.n_group;
  for (int64_t g = 0; g < routing.n_group; ++g) {
    float first = kNever, second = kNever;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      if (choice[i] > first) {
        second = first;
        first = choice[i];
      } else {
        second = std::max(second, choice[i]);
      }
    }
    group_scores[g] = first + second;
  }
  for (int64_t kept = 0; kept < routing.topk_group; ++kept) {
    group_scores[index_of_largest(group_scores, routing.n_group)] = kNever;  // marks it as kept
  }
  for (int64_t g = 0; g < routing.n_group; ++g) {
    if (group_scores[g] != kNever) std::fill_n(choice + g * size, size, kNever);
  }
}

// Codes of -127 … 127 and the scale that makes the largest of them 127; what is not finite makes the scale so too.
void store_codes(const float* from, int dim, int8_t* to, ptrdiff_t stride, float* scale) {
  float largest = 0;
  for (int i = 0; i < dim; ++i) {
    const float size = std::abs(from[i]);
    if (size > largest || size != size) largest = size;
  }
  *scale = largest / 127;
  for (int i = 0; i < dim; ++i) {
    const float code = from[i] / *scale;  // NaN where the scale is 0 or not finite; a subnormal one may be far off
    to[i * stride] = code != code ? 0 : int8_t(std::lrint(std::clamp(code, -127.0f, 127.0f)));
  }
}

void store_head(const RopeStore& job, const float* from, int64_t t, int64_t h, void* cache, const CacheStrides& strides, float* scales) {
  const int64_t block = job.slots[t] / job.block_size, slot = job.slots[t] % job.block_size;
  with_element(job.type, [&](auto element) {
    using Element = decltype(element);
    Element* to = (Element*)cache + block * strides.block + slot * strides.slot + h * strides.head;
    if constexpr (std::is_same_v<Element, int8_t>) {
      store_codes(from, int(job.head_dim), to, strides.feature, scales + (block * job.kv_heads + h) * job.block_size + slot);
    } else {
      for (int64_t i = 0; i < job.head_dim; ++i) to[i * strides.feature] = convert_to(Element{}, from[i]);
    }
  });
}

}  // namespace

void rms_norm(const float* x, int64_t rows, int64_t features, const float* weight, float eps, float* out) {
  const auto row = kernels().rms_norm_row;
  parallel_rows(rows, 2.0 + 0.1 * double(features),
                [&](int64_t r) { row(x + r * features, weight, eps, int(features), out + r * features); });
}

int64_t rope_store(const RopeStore& job) {
  for (int64_t t = 0; t < job.tokens; ++t) {
    if (job.positions[t] < 0 || job.positions[t] >= job.max_positions) return t;
    if (job.slots[t] < 0 || job.slots[t] >= job.num_blocks * job.block_size) return t;
  }
  const KernelTable& kernel = kernels();
  const int dim = int(job.head_dim), half = int(job.rotary_dim / 2);
  parallel_rows(job.tokens, 0.3 * double((job.heads + 2 * job.kv_heads) * job.head_dim), [&](int64_t t) {
    const float* cos = job.cos_sin + job.positions[t] * job.rotary_dim;
    const auto turn = [&](float* head, const float* norm) {
      if (norm != nullptr) kernel.rms_norm_row(head, norm, job.eps, dim, head);
      kernel.rotate(head, cos, cos + half, half);
    };
    for (int64_t h = 0; h < job.heads; ++h) turn(job.q + (t * job.heads + h) * dim, job.q_norm);
    for (int64_t h = 0; h < job.kv_heads; ++h) {
      const int64_t row = (t * job.kv_heads + h) * dim;
      turn(job.k + row, job.k_norm);
      store_head(job, job.k + row, t, h, job.keys, job.key_strides, job.key_scales);
      store_head(job, job.v + row, t, h, job.values, job.value_strides, job.value_scales);
    }
  });
  return -1;
}

void router_topk(const Routing& routing, const float* logits, int64_t rows, const float* correction_bias, int32_t* ids,
                 float* weights) {
  const auto sigmoid = kernels().sigmoid;
  const int64_t experts = routing.experts;
  parallel_rows(rows, double(experts * (2 + routing.top_k)), [&](int64_t r) {
    float* scores = scratch(Scratch::tile, size_t(2 * experts + routing.n_group));
    float *choice = scores + experts, *group_scores = choice + experts;
    sigmoid(logits + r * experts, int(experts), scores);
    for (int64_t e = 0; e < experts; ++e) choice[e] = scores[e] + correction_bias[e];
    if (routing.n_group > 1) drop_groups(routing, choice, group_scores);
    float sum = 0;
    for (int64_t k = 0; k < routing.top_k; ++k) {
      const int64_t e = index_of_largest(choice, experts);
      choice[e] = -std::numeric_limits<float>::infinity();
      ids[r * routing.top_k + k] = int32_t(e);
      weights[r * routing.top_k + k] = scores[e];
      sum += scores[e];
    }
    const float divisor = routing.norm_topk_prob ? sum + 1e-20f : 1.0f;
    for (int64_t k = 0; k < routing.top_k; ++k) {
      float& weight = weights[r * routing.top_k + k];
      weight = weight / divisor * routing.routed_scaling_factor;
    }
  });
}

}  // namespace glmlocal
