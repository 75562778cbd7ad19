// Bindings of attention, positions, norms and the router. They take tensors, check everything about them before anything is
// read or written, and release the GIL.
#include "bindings_ops.h"

#include <limits>
#include <stdexcept>

#include "attention.h"
#include "norm_rope.h"
#include "router.h"
#include "tensor.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace glmlocal {
namespace {

int64_t int_sized(int64_t size, const char* what) {
  if (size <= std::numeric_limits<int32_t>::max() / 64) return size;
  throw std::invalid_argument(std::string(what) + " of " + std::to_string(size) + " is too large");
}

void bind_rms_norm(nb::handle x_object, nb::handle weight_object, float eps, nb::handle out_object) {
  const auto x = tensor_of_any_shape<const float>(x_object, "rms_norm: x");
  const int64_t size = int_sized(x.shape[x.ndim - 1], "rms_norm: a row");
  const auto weight = tensor<const float>(weight_object, "rms_norm: weight", {size});
  const auto out = tensor_of_any_shape<float>(out_object, "rms_norm: out");
  if (out.numel() != x.numel()) throw std::invalid_argument("rms_norm: out is not of the shape of x");
  if (x.numel() == 0) return;
  nb::gil_scoped_release release;
  rms_norm(x.get(), weight.get(), eps, x.numel() / size, size, out.get());
}

void bind_add_rms_norm(nb::handle x_object, nb::handle residual_object, nb::handle weight_object, float eps, nb::handle out_object) {
  const auto x = tensor<const float>(x_object, "add_rms_norm: x", {-1, -1});
  const int64_t rows = x.shape[0], size = int_sized(x.shape[1], "add_rms_norm: a row");
  const auto residual = tensor<float>(residual_object, "add_rms_norm: residual", {rows, size});
  const auto weight = tensor<const float>(weight_object, "add_rms_norm: weight", {size});
  const auto out = tensor<float>(out_object, "add_rms_norm: out", {rows, size});
  if (x.numel() == 0) return;
  nb::gil_scoped_release release;
  add_rms_norm(x.get(), residual.get(), weight.get(), eps, rows, size, out.get());
}

template <class T>
Heads<T> heads(nb::handle object, const char* name, int64_t tokens, int64_t num_heads, int64_t head_dim) {
  const auto x = tensor<T>(object, name, {tokens, num_heads, head_dim}, Layout::rows);
  int_sized(x.shape[1] * x.shape[2], name);
  return {x.get(), x.strides[0], x.shape[0], x.shape[1], x.shape[2]};
}

// Token strides only matter where there are tokens; a stride below a token's size would make them overlap.
void check_no_overlap(const Heads<float>& x, const char* name) {
  if (x.tokens < 2 || x.stride >= x.heads * x.head_dim) return;
  throw std::invalid_argument(std::string(name) + " wanted tokens that do not overlap, found a stride of " + std::to_string(x.stride));
}

Rotation rotation(nb::handle cos_sin_object, nb::handle positions_object, int64_t tokens, int64_t head_dim) {
  const auto cos_sin = tensor<const float>(cos_sin_object, "cos_sin", {-1, -1});
  const int64_t rotary_dim = cos_sin.shape[1];
  if (rotary_dim % 2 != 0 || rotary_dim > head_dim) {
    throw std::invalid_argument("cos_sin wanted an even number of columns, at most head_dim = " + std::to_string(head_dim) + ", found " +
                                std::to_string(rotary_dim));
  }
  const auto positions = tensor<const int64_t>(positions_object, "positions", {tokens});
  const Rotation result{cos_sin.get(), cos_sin.shape[0], rotary_dim, positions.get()};
  check_positions(result, tokens);
  return result;
}

CacheStrides strides_of(const TensorView& cache) { return {cache.strides[0], cache.strides[1], cache.strides[2], cache.strides[3]}; }

KeyValueCache key_value_cache(nb::handle k_object, nb::handle v_object, int64_t kv_heads, int64_t head_dim) {
  const auto k = tensor<float>(k_object, "k_cache", {-1, -1, kv_heads, head_dim}, Layout::strided);
  const auto v = tensor<float>(v_object, "v_cache", {k.shape[0], k.shape[1], k.shape[2], k.shape[3]}, Layout::strided);
  int_sized(k.shape[1], "k_cache: a block");
  if (k.shape[1] == 0) throw std::invalid_argument("k_cache wanted blocks of at least 1 token, found 0");
  if (v.shape[3] > 1 && v.strides[3] != 1) {
    throw std::invalid_argument("v_cache wanted features next to each other, found a stride of " + std::to_string(v.strides[3]));
  }
  return {k.get(), v.get(), strides_of(k), strides_of(v), k.shape[0], k.shape[1], k.shape[2], k.shape[3]};
}

const int64_t* slots(nb::handle object, const KeyValueCache& cache, int64_t tokens) {
  const auto slot_mapping = tensor<const int64_t>(object, "slot_mapping", {tokens});
  check_slots(cache, slot_mapping.get(), tokens);
  return slot_mapping.get();
}

void bind_rope(nb::handle x_object, nb::handle cos_sin, nb::handle positions) {
  const auto x = heads<float>(x_object, "rope_: x", -1, -1, -1);
  check_no_overlap(x, "rope_: x");
  const Rotation angles = rotation(cos_sin, positions, x.tokens, x.head_dim);
  if (x.tokens == 0) return;
  nb::gil_scoped_release release;
  rope(x, angles);
}

void bind_kv_write(nb::handle k_object, nb::handle v_object, nb::handle k_cache, nb::handle v_cache, nb::handle slot_mapping) {
  const auto k = heads<const float>(k_object, "kv_write: k", -1, -1, -1);
  const auto v = heads<const float>(v_object, "kv_write: v", k.tokens, k.heads, k.head_dim);
  const KeyValueCache cache = key_value_cache(k_cache, v_cache, k.heads, k.head_dim);
  const int64_t* slot = slots(slot_mapping, cache, k.tokens);
  if (k.tokens == 0) return;
  nb::gil_scoped_release release;
  kv_write(k, v, cache, slot);
}

void bind_qk_norm_rope_kv_write(nb::handle q_object, nb::handle k_object, nb::handle v_object, nb::handle q_norm, nb::handle k_norm,
                                float eps, nb::handle cos_sin, nb::handle positions, nb::handle k_cache, nb::handle v_cache,
                                nb::handle slot_mapping) {
  const auto q = heads<float>(q_object, "q", -1, -1, -1);
  check_no_overlap(q, "q");
  const auto k = heads<const float>(k_object, "k", q.tokens, -1, q.head_dim);
  const auto v = heads<const float>(v_object, "v", k.tokens, k.heads, k.head_dim);
  auto weight = [&](nb::handle object, const char* name) {
    return object.is_none() ? nullptr : tensor<const float>(object, name, {q.head_dim}).get();
  };
  const HeadNorm norm{weight(q_norm, "q_norm"), weight(k_norm, "k_norm"), eps};
  const Rotation angles = rotation(cos_sin, positions, q.tokens, q.head_dim);
  const KeyValueCache cache = key_value_cache(k_cache, v_cache, k.heads, k.head_dim);
  const int64_t* slot = slots(slot_mapping, cache, q.tokens);
  if (q.tokens == 0) return;
  nb::gil_scoped_release release;
  qk_norm_rope_kv_write(q, k, v, norm, angles, cache, slot);
}

void bind_paged_attention(nb::handle q_object, nb::handle k_cache, nb::handle v_cache, nb::handle block_tables_object,
                          nb::handle query_start_loc_object, nb::handle seq_lens_object, float scale, nb::handle out_object) {
  const auto q = heads<const float>(q_object, "paged_attention: q", -1, -1, -1);
  const KeyValueCache cache = key_value_cache(k_cache, v_cache, -1, q.head_dim);
  if (cache.kv_heads == 0 || q.heads % cache.kv_heads != 0) {
    throw std::invalid_argument("paged_attention: wanted as many query heads for each of the " + std::to_string(cache.kv_heads) +
                                " kv heads, found " + std::to_string(q.heads));
  }
  if (q.head_dim % 8 != 0 || q.head_dim == 0) {
    throw std::invalid_argument("paged_attention: head_dim wanted a multiple of 8, found " + std::to_string(q.head_dim));
  }
  const auto seq_lens = tensor<const int32_t>(seq_lens_object, "paged_attention: seq_lens", {-1});
  const int64_t requests = seq_lens.shape[0];
  const auto block_tables = tensor<const int32_t>(block_tables_object, "paged_attention: block_tables", {requests, -1});
  const auto query_start_loc = tensor<const int32_t>(query_start_loc_object, "paged_attention: query_start_loc", {requests + 1});
  const auto out = tensor<float>(out_object, "paged_attention: out", {q.tokens, q.heads, q.head_dim});
  const AttentionBatch batch{q.data, q.stride, out.get(), q.tokens, q.heads, block_tables.get(), block_tables.shape[1],
                             query_start_loc.get(), seq_lens.get(), requests, scale};
  check_attention(cache, batch);
  if (q.tokens == 0) return;
  nb::gil_scoped_release release;
  paged_attention(cache, batch);
}

void bind_router_topk(nb::handle x_object, nb::handle weight_object, nb::handle bias_object, int top_k, int n_group, int topk_group,
                      bool norm_topk_prob, float routed_scaling_factor, nb::handle ids_object, nb::handle weights_object) {
  const auto x = tensor<const float>(x_object, "router_topk: x", {-1, -1});
  const int64_t tokens = x.shape[0], hidden = int_sized(x.shape[1], "router_topk: a row");
  const auto weight = tensor<const float>(weight_object, "router_topk: weight", {-1, hidden});
  const int64_t experts = int_sized(weight.shape[0], "router_topk: a number of experts");
  const auto bias = tensor<const float>(bias_object, "router_topk: correction_bias", {experts});
  const RouterSettings settings{top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor};
  check_router(settings, experts);
  const auto ids = tensor<int32_t>(ids_object, "router_topk: topk_ids", {tokens, top_k});
  const auto weights = tensor<float>(weights_object, "router_topk: topk_weights", {tokens, top_k});
  if (tokens == 0) return;
  nb::gil_scoped_release release;
  router_topk(settings, x.get(), weight.get(), bias.get(), tokens, experts, hidden, ids.get(), weights.get());
}

}  // namespace

void bind_ops(nb::module_& m) {
  m.attr("KEY_TILE") = kTileKeys;
  m.attr("KEY_SPLIT") = kSplitKeys;
  m.def("rms_norm", &bind_rms_norm, "x"_a, "weight"_a, "eps"_a, "out"_a);
  m.def("add_rms_norm", &bind_add_rms_norm, "x"_a, "residual"_a, "weight"_a, "eps"_a, "out"_a);
  m.def("rope_", &bind_rope, "x"_a, "cos_sin"_a, "positions"_a);
  m.def("kv_write", &bind_kv_write, "k"_a, "v"_a, "k_cache"_a, "v_cache"_a, "slot_mapping"_a);
  m.def("qk_norm_rope_kv_write", &bind_qk_norm_rope_kv_write, "q"_a, "k"_a, "v"_a, "q_norm"_a.none(), "k_norm"_a.none(), "eps"_a,
        "cos_sin"_a, "positions"_a, "k_cache"_a, "v_cache"_a, "slot_mapping"_a);
  m.def("paged_attention", &bind_paged_attention, "q"_a, "k_cache"_a, "v_cache"_a, "block_tables"_a, "query_start_loc"_a,
        "seq_lens"_a, "scale"_a, "out"_a);
  m.def("router_topk", &bind_router_topk, "x"_a, "weight"_a, "correction_bias"_a, "top_k"_a, "n_group"_a, "topk_group"_a,
        "norm_topk_prob"_a, "routed_scaling_factor"_a, "topk_ids"_a, "topk_weights"_a);
}

}  // namespace glmlocal
