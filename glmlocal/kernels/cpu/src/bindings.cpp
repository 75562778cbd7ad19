// Python bindings and nothing else. Ops take addresses that glmlocal/kernels/cpu has validated; weights are objects that
// keep the buffer they point into alive. The GIL is released while an op runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <stdexcept>

#include "attention.h"
#include "bindings_offload.h"
#include "blocks.h"
#include "isa.h"
#include "memory.h"
#include "ops.h"
#include "packed_matrix.h"
#include "quantize.h"
#include "steps.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace glmlocal;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Address = uintptr_t;

const std::map<std::string, Codes> kCodes{{"f32", Codes::f32}, {"bf16", Codes::bf16}, {"f16", Codes::f16},
                                          {"u8", Codes::u8},   {"u6", Codes::u6},     {"u5", Codes::u5},
                                          {"u4", Codes::u4},   {"u3", Codes::u3},     {"u2", Codes::u2},
                                          {"e4m3", Codes::e4m3}};
const std::map<std::string, FloatType> kFloatTypes{{"f16", FloatType::f16}, {"bf16", FloatType::bf16}, {"f32", FloatType::f32}};

const std::map<std::string, CacheType> kCacheTypes{{"f32", CacheType::f32}, {"bf16", CacheType::bf16},
                                                   {"fp8", CacheType::fp8}, {"i8", CacheType::i8}};

template <class Value>
Value named(const std::map<std::string, Value>& names, const std::string& name) {
  if (const auto found = names.find(name); found != names.end()) return found->second;
  std::string known;
  for (const auto& [key, value] : names) known += (known.empty() ? "" : ", ") + key;
  throw std::invalid_argument("'" + name + "' is not one of " + known);
}

template <class Value>
std::string name_of(const std::map<std::string, Value>& names, Value value) {
  for (const auto& [name, each] : names) {
    if (each == value) return name;
  }
  return "";
}

template <class T>
T* pointer(Address address, const char* what) {
  if (address == 0) throw std::invalid_argument(std::string(what) + ": the tensor has no memory (freed?)");
  if (address % alignof(T) != 0) throw std::invalid_argument(std::string(what) + ": misaligned memory");
  return reinterpret_cast<T*>(address);
}

// A packed matrix and the array it borrows.
struct Matrix {
  Bytes buffer;
  PackedMatrix packed;

  Matrix(const MatrixLayout& layout, const MatrixFormat& format, Bytes data, float zero_point, const std::vector<float>& values,
         bool int8_activations)
      : buffer(std::move(data)) {
    if (!(matrix_layout(layout.out_features, layout.in_features, format) == layout)) {
      throw std::invalid_argument("the layout is not that of the format");
    }
    if (int64_t(buffer.size()) != layout.num_bytes) {
      throw std::invalid_argument("buffer of " + std::to_string(buffer.size()) + " bytes, wanted " + std::to_string(layout.num_bytes));
    }
    if (reinterpret_cast<Address>(buffer.data()) % kAlignment != 0) {
      throw std::invalid_argument("buffer at " + std::to_string(reinterpret_cast<Address>(buffer.data())) +
                                  ", wanted an address that is a multiple of 64 (see allocate)");
    }
    const int bits = lines_per_block(format.codes);
    if (bits <= 4 && values.size() != size_t(1) << bits) {
      throw std::invalid_argument(std::to_string(values.size()) + " values for codes of " + std::to_string(bits) + " bits");
    }
    packed = make_packed_matrix(layout, format, reinterpret_cast<const std::byte*>(buffer.data()), zero_point, values.data());
    if (int8_activations && !use_int8_activations(packed)) {
      throw std::invalid_argument("int8 activations need codes that mean integers of 8 bits, with or without a sign");
    }
  }

  void run(Address x, int64_t num_rows, Address bias, Address out) const {
    if (num_rows <= 0 || packed.out_features() == 0) return;
    const float* from = packed.in_features() == 0 ? nullptr : pointer<const float>(x, "x");
    float* to = pointer<float>(out, "out");
    const float* add = bias == 0 ? nullptr : pointer<const float>(bias, "bias");
    nb::gil_scoped_release release;
    const Product product{&packed, add, to};
    linear({&product, 1}, from, num_rows, packed.in_features());
  }

  // The weights as the kernels see them, fp32 [out, in]: for tests and for the plain path.
  void unpack(Address out) const {
    if (packed.out_features() == 0 || packed.in_features() == 0) return;
    float* to = pointer<float>(out, "out");
    std::vector<float> panel(size_t(packed.padded_in()) * kPanelRows);
    for (int p = 0; p < packed.panels(); ++p) {
      kernels().panel_weights(packed, p, panel.data());
      const int stride = packed.tiles_in(p) * kTileRows;
      for (int row = 0; row < packed.rows_in(p); ++row) {
        for (int k = 0; k < packed.in_features(); ++k) {
          to[(int64_t(p) * kPanelRows + row) * packed.in_features() + k] = panel[size_t(k) * stride + row];
        }
      }
    }
  }
};

// The experts of one layer; keeps their matrices alive.
struct Experts {
  std::vector<nb::object> owners;
  std::vector<const PackedMatrix*> gate, up, down;
  int64_t hidden_size = 0, intermediate_size = 0;

  Experts(nb::sequence gates, nb::sequence ups, nb::sequence downs) {
    if (nb::len(gates) != nb::len(ups) || nb::len(gates) != nb::len(downs) || nb::len(gates) == 0) {
      throw std::invalid_argument("experts: wanted as many gate as up as down matrices, at least one; found " +
                                  std::to_string(nb::len(gates)) + ", " + std::to_string(nb::len(ups)) + ", " +
                                  std::to_string(nb::len(downs)));
    }
    take(gates, gate);
    take(ups, up);
    take(downs, down);
    hidden_size = gate[0]->in_features();
    intermediate_size = gate[0]->out_features();
    for (size_t e = 0; e < gate.size(); ++e) {
      check("gate", e, *gate[e], intermediate_size, hidden_size);
      check("up", e, *up[e], intermediate_size, hidden_size);
      check("down", e, *down[e], hidden_size, intermediate_size);
    }
  }

  void run(Address x, int64_t num_tokens, Address ids, Address weights, int top_k, Address out) const {
    if (num_tokens <= 0 || hidden_size == 0) return;
    const float* from = pointer<const float>(x, "x");
    const int32_t* id = top_k == 0 ? nullptr : pointer<const int32_t>(ids, "topk_ids");
    const float* weight = top_k == 0 ? nullptr : pointer<const float>(weights, "topk_weights");
    float* to = pointer<float>(out, "out");
    int64_t bad;
    {
      nb::gil_scoped_release release;
      bad = experts_ffn({gate.data(), up.data(), down.data(), int(gate.size())}, from, num_tokens, id, weight, top_k, to);
    }
    if (bad >= 0) {
      throw nb::index_error(("topk_ids: expert " + std::to_string(id[bad]) + " of token " + std::to_string(bad / top_k) +
                             ", but there are " + std::to_string(gate.size())).c_str());
    }
  }

 private:
  void take(nb::sequence objects, std::vector<const PackedMatrix*>& into) {
    for (nb::handle object : objects) {
      into.push_back(&nb::cast<const Matrix&>(object).packed);
      owners.push_back(nb::borrow(object));
    }
  }

  static void check(const char* name, size_t expert, const PackedMatrix& matrix, int64_t out, int64_t in) {
    if (matrix.out_features() == out && matrix.in_features() == in) return;
    throw std::invalid_argument("expert " + std::to_string(expert) + ": " + name + " is [" + std::to_string(matrix.out_features()) +
                                ", " + std::to_string(matrix.in_features()) + "], wanted [" + std::to_string(out) + ", " +
                                std::to_string(in) + "]");
  }
};

void check_swiglu(const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down) {
  const int64_t hidden = gate.in_features(), intermediate = gate.out_features();
  if (up.in_features() == hidden && up.out_features() == intermediate && down.in_features() == intermediate && down.out_features() == hidden) {
    return;
  }
  throw std::invalid_argument("swiglu_ffn: up wanted [" + std::to_string(intermediate) + ", " + std::to_string(hidden) +
                              "] and down transposed to that, as gate has it");
}

void run_swiglu(const Matrix& gate, const Matrix& up, const Matrix& down, Address x, int64_t num_rows, Address out) {
  check_swiglu(gate.packed, up.packed, down.packed);
  const int64_t hidden = gate.packed.in_features();
  if (num_rows <= 0 || hidden == 0) return;
  const float* from = pointer<const float>(x, "x");
  float* to = pointer<float>(out, "out");
  nb::gil_scoped_release release;
  swiglu_ffn(gate.packed, up.packed, down.packed, from, num_rows, to);
}

void run_rms_norm(Address x, int64_t rows, int64_t features, Address weight, float eps, Address out) {
  if (rows <= 0 || features <= 0) return;
  const float *from = pointer<const float>(x, "x"), *scale = pointer<const float>(weight, "weight");
  float* to = pointer<float>(out, "out");
  nb::gil_scoped_release release;
  rms_norm(from, rows, features, scale, eps, to);
}

// Of a cache [num_blocks, block_size, kv_heads, head_dim].
using Strides = std::array<int64_t, 4>;

CacheStrides cache_strides(const Strides& s) { return {s[0], s[1], s[2], s[3]}; }

template <class T>
T* cache_pointer(CacheType type, Address address, const char* what) {
  if (address % cache_itemsize(type) != 0) throw std::invalid_argument(std::string(what) + ": misaligned memory");
  return pointer<T>(address, what);
}
float* scales_pointer(CacheType type, Address address, const char* what) {
  return type == CacheType::i8 ? pointer<float>(address, what) : nullptr;
}

KeyValueCache make_cache(const std::string& type_name, Address keys, const Strides& key_strides, Address key_scales, Address values,
                         const Strides& value_strides, Address value_scales, const Strides& shape) {
  const CacheType type = named(kCacheTypes, type_name);
  const bool has_blocks = shape[0] > 0;  // empty tensors have no memory
  return {.type = type,
          .keys = has_blocks ? cache_pointer<const std::byte>(type, keys, "keys") : nullptr,
          .values = has_blocks ? cache_pointer<const std::byte>(type, values, "values") : nullptr,
          .key_strides = cache_strides(key_strides), .value_strides = cache_strides(value_strides),
          .key_scales = has_blocks ? scales_pointer(type, key_scales, "key_scales") : nullptr,
          .value_scales = has_blocks ? scales_pointer(type, value_scales, "value_scales") : nullptr,
          .num_blocks = shape[0], .block_size = shape[1], .kv_heads = shape[2], .head_dim = shape[3]};
}

nb::builtin_exception bad_token(int64_t token, int64_t position, int64_t slot, int64_t max_positions, int64_t num_slots) {
  return nb::index_error(("token " + std::to_string(token) + " has position " + std::to_string(position) + " and slot " +
                          std::to_string(slot) + ", wanted below " + std::to_string(max_positions) + " and " +
                          std::to_string(num_slots)).c_str());
}

void run_rope_store(Address q, int64_t tokens, int64_t heads, Address k, Address v, Address q_norm, Address k_norm, float eps,
                    Address cos_sin, int64_t max_positions, int64_t rotary_dim, Address positions, Address slots,
                    const std::string& cache_type, Address k_cache, const Strides& k_strides, Address k_scales, Address v_cache,
                    const Strides& v_strides, Address v_scales, const Strides& cache_shape) {
  if (tokens <= 0) return;
  const CacheType type = named(kCacheTypes, cache_type);
  const auto [num_blocks, block_size, kv_heads, head_dim] = cache_shape;
  const RopeStore job{
      .q = pointer<float>(q, "q"), .k = pointer<float>(k, "k"), .v = pointer<const float>(v, "v"),
      .tokens = tokens, .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim,
      .q_norm = q_norm == 0 ? nullptr : pointer<const float>(q_norm, "q_norm"),
      .k_norm = k_norm == 0 ? nullptr : pointer<const float>(k_norm, "k_norm"), .eps = eps,
      .cos_sin = pointer<const float>(cos_sin, "cos_sin"), .max_positions = max_positions, .rotary_dim = rotary_dim,
      .positions = pointer<const int64_t>(positions, "positions"), .slots = pointer<const int64_t>(slots, "slot_mapping"),
      .type = type, .keys = cache_pointer<std::byte>(type, k_cache, "k_cache"), .values = cache_pointer<std::byte>(type, v_cache, "v_cache"),
      .key_strides = cache_strides(k_strides), .value_strides = cache_strides(v_strides),
      .key_scales = scales_pointer(type, k_scales, "k_scales"), .value_scales = scales_pointer(type, v_scales, "v_scales"),
      .num_blocks = num_blocks, .block_size = block_size};
  int64_t bad;
  {
    nb::gil_scoped_release release;
    bad = rope_store(job);
  }
  if (bad >= 0) throw bad_token(bad, job.positions[bad], job.slots[bad], max_positions, num_blocks * block_size);
}

void check_routing(const Routing& r) {
  const bool grouped = r.n_group >= 1 && r.topk_group >= 1 && r.topk_group <= r.n_group && r.experts % r.n_group == 0;
  if (grouped && r.top_k >= 1 && r.top_k <= r.experts / r.n_group * r.topk_group) return;
  throw std::invalid_argument("router_topk: cannot choose " + std::to_string(r.top_k) + " of " + std::to_string(r.experts) +
                              " experts in " + std::to_string(r.topk_group) + " of " + std::to_string(r.n_group) + " groups");
}

void run_router_topk(Address logits, int64_t rows, int64_t experts, Address correction_bias, int64_t top_k, int64_t n_group,
                     int64_t topk_group, bool norm_topk_prob, float routed_scaling_factor, Address ids, Address weights) {
  const Routing routing{experts, top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor};
  check_routing(routing);
  if (rows <= 0) return;
  const float *from = pointer<const float>(logits, "logits"), *bias = pointer<const float>(correction_bias, "correction_bias");
  int32_t* id = pointer<int32_t>(ids, "topk_ids");
  float* weight = pointer<float>(weights, "topk_weights");
  nb::gil_scoped_release release;
  router_topk(routing, from, rows, bias, id, weight);
}

void run_paged_attention(Address q, int64_t tokens, int64_t heads, const std::string& cache_type, Address k_cache,
                         const Strides& k_strides, Address k_scales, Address v_cache, const Strides& v_strides, Address v_scales,
                         const Strides& cache_shape, Address block_tables, int64_t max_blocks, Address query_start_loc,
                         Address seq_lens, int64_t requests, float scale, Address out) {
  const KeyValueCache cache = make_cache(cache_type, k_cache, k_strides, k_scales, v_cache, v_strides, v_scales, cache_shape);
  const bool has_tokens = tokens > 0;
  const AttentionBatch batch{.q = has_tokens ? pointer<const float>(q, "q") : nullptr, .q_stride = heads * cache.head_dim,
                             .out = has_tokens ? pointer<float>(out, "out") : nullptr, .tokens = tokens, .heads = heads,
                             .block_tables = requests * max_blocks > 0 ? pointer<const int32_t>(block_tables, "block_tables") : nullptr,
                             .max_blocks = max_blocks,
                             .query_start_loc = pointer<const int32_t>(query_start_loc, "query_start_loc"),
                             .seq_lens = requests > 0 ? pointer<const int32_t>(seq_lens, "seq_lens") : nullptr,
                             .requests = requests, .scale = scale};
  check_attention(cache, batch);
  if (tokens <= 0) return;
  nb::gil_scoped_release release;
  paged_attention(cache, batch);
}

// A layer's cache; the caller keeps its tensors alive.
struct LayerCache {
  KeyValueCache cache;

  LayerCache(const std::string& type, Address keys, const Strides& key_strides, Address key_scales, Address values,
             const Strides& value_strides, Address value_scales, const Strides& shape)
      : cache(make_cache(type, keys, key_strides, key_scales, values, value_strides, value_scales, shape)) {}
};

StepIndex make_step(int64_t tokens, Address positions, Address slots, Address block_tables, int64_t max_blocks,
                    Address query_start_loc, Address seq_lens, int64_t requests) {
  return {.tokens = tokens,
          .positions = tokens > 0 ? pointer<const int64_t>(positions, "positions") : nullptr,
          .slots = tokens > 0 ? pointer<const int64_t>(slots, "slot_mapping") : nullptr,
          .block_tables = requests * max_blocks > 0 ? pointer<const int32_t>(block_tables, "block_tables") : nullptr,
          .max_blocks = max_blocks,
          .query_start_loc = pointer<const int32_t>(query_start_loc, "query_start_loc"),
          .seq_lens = requests > 0 ? pointer<const int32_t>(seq_lens, "seq_lens") : nullptr,
          .requests = requests};
}

// An attention block; keeps its matrices alive, its vectors are the caller's to keep.
struct BoundBlock {
  std::vector<nb::object> owners;
  AttentionBlock block;

  BoundBlock(int64_t hidden_size, int64_t heads, int64_t kv_heads, int64_t head_dim, float eps,
             const std::map<std::string, Address>& vectors, nb::dict matrices, Address cos_sin, int64_t max_positions,
             int64_t rotary_dim) {
    if (rotary_dim < 0 || rotary_dim % 2 != 0 || rotary_dim > head_dim) {
      throw std::invalid_argument("attention_block: cos_sin has " + std::to_string(rotary_dim) + " columns, wanted an even number up to " +
                                  std::to_string(head_dim));
    }
    const auto vector = [&](const char* name) -> const float* {
      const Address address = vectors.at(name);
      return address == 0 ? nullptr : pointer<const float>(address, name);
    };
    const auto matrix = [&](const char* name) {
      const nb::object owner = matrices[name];
      owners.push_back(owner);
      return &nb::cast<const Matrix&>(owner).packed;
    };
    block = {.hidden_size = hidden_size, .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim,
             .input_norm = vector("input_layernorm"), .post_norm = vector("post_attention_layernorm"), .eps = eps,
             .qkv = {matrix("q_proj"), matrix("k_proj"), matrix("v_proj")},
             .qkv_bias = {vector("q_bias"), vector("k_bias"), vector("v_bias")}, .o = matrix("o_proj"),
             .q_norm = vector("q_norm"), .k_norm = vector("k_norm"),
             .cos_sin = rotary_dim == 0 ? nullptr : pointer<const float>(cos_sin, "cos_sin"),
             .max_positions = max_positions, .rotary_dim = rotary_dim};
  }

  void set_router(nb::object gate, Address correction_bias, int64_t top_k, int64_t n_group, int64_t topk_group, bool norm_topk_prob,
                  float routed_scaling_factor) {
    const PackedMatrix& packed = nb::cast<const Matrix&>(gate).packed;
    const Routing routing{packed.out_features(), top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor};
    check_routing(routing);
    block.gate = &packed;
    block.correction_bias = pointer<const float>(correction_bias, "e_score_correction_bias");
    block.routing = routing;
    owners.push_back(std::move(gate));
  }

  void run(const StepIndex& step, const LayerCache& layer, Address x, Address residual, Address hidden, Address ids, Address weights) const {
    const KeyValueCache& cache = layer.cache;
    if (cache.head_dim != block.head_dim || cache.kv_heads != block.kv_heads) {
      throw std::invalid_argument("attention_block: cache of " + std::to_string(cache.kv_heads) + " heads of " +
                                  std::to_string(cache.head_dim) + ", wanted " + std::to_string(block.kv_heads) + " of " +
                                  std::to_string(block.head_dim));
    }
    check_attention(cache, {.q = nullptr, .q_stride = 0, .out = nullptr, .tokens = step.tokens, .heads = block.heads,
                            .block_tables = step.block_tables, .max_blocks = step.max_blocks, .query_start_loc = step.query_start_loc,
                            .seq_lens = step.seq_lens, .requests = step.requests, .scale = 1});
    if (step.tokens <= 0) return;
    const float* from = pointer<const float>(x, "x");
    float *to_residual = pointer<float>(residual, "residual"), *to_hidden = pointer<float>(hidden, "hidden");
    int32_t* id = block.gate == nullptr ? nullptr : pointer<int32_t>(ids, "topk_ids");
    float* weight = block.gate == nullptr ? nullptr : pointer<float>(weights, "topk_weights");
    int64_t bad;
    {
      nb::gil_scoped_release release;
      bad = attention_block(block, step, cache, from, to_residual, to_hidden, id, weight);
    }
    if (bad >= 0) throw bad_token(bad, step.positions[bad], step.slots[bad], block.max_positions, cache.num_blocks * cache.block_size);
  }
};

void run_combine(std::optional<nb::tuple> ffn, Address residual, Address hidden, Address routed, int64_t rows, int64_t hidden_size,
                 Address out) {
  const PackedMatrix* matrices[3] = {};
  if (ffn) {
    for (size_t i = 0; i < 3; ++i) matrices[i] = &nb::cast<const Matrix&>((*ffn)[i]).packed;
    check_swiglu(*matrices[0], *matrices[1], *matrices[2]);
    if (matrices[0]->in_features() != hidden_size) {
      throw std::invalid_argument("combine: the FFN takes " + std::to_string(matrices[0]->in_features()) + " features, found " +
                                  std::to_string(hidden_size));
    }
  }
  if (rows <= 0 || hidden_size == 0) return;
  if (!ffn && routed == 0) throw std::invalid_argument("combine: wanted an FFN, routed experts' output or both");
  const float *base = pointer<const float>(residual, "residual"), *x = pointer<const float>(hidden, "hidden");
  const float* add = routed == 0 ? nullptr : pointer<const float>(routed, "routed");
  float* to = pointer<float>(out, "out");
  nb::gil_scoped_release release;
  combine(matrices[0], matrices[1], matrices[2], base, x, add, rows, hidden_size, to);
}

nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> allocate(size_t num_bytes) {
  auto* memory = new std::shared_ptr<std::byte>(allocate_weights(num_bytes));
  nb::capsule owner(memory, [](void* p) noexcept { delete static_cast<std::shared_ptr<std::byte>*>(p); });
  return {memory->get(), {num_bytes}, owner};
}

bool run_quantize_rows(Address weights, int64_t rows, int64_t columns, float low, float high, const std::vector<float>& candidates,
                       float limit, Address codes, Address scales) {
  if (candidates.empty() || candidates.size() > size_t(kMaxCandidates)) throw std::invalid_argument("1 to 16 candidates");
  if (rows <= 0 || columns <= 0) return true;
  QuantizeRule rule{low, high, {}, int(candidates.size()), limit};
  std::copy(candidates.begin(), candidates.end(), rule.candidates);
  const float* from = pointer<const float>(weights, "weights");
  uint8_t* code = pointer<uint8_t>(codes, "codes");
  float* scale = pointer<float>(scales, "scales");
  nb::gil_scoped_release release;
  return quantize_rows(from, rows, columns, rule, code, scale);
}

}  // namespace

NB_MODULE(_cpu, m) {
  // A model that lives until the interpreter exits is no leak worth a page of warnings.
  nb::set_leak_warnings(false);

  m.def("isa", &isa);
  m.def("available_isas", &available_isas);
  m.def("set_isa", [](const std::string& name) {
    if (set_isa(name)) return;
    std::string known;
    for (const std::string& each : available_isas()) known += (known.empty() ? "" : ", ") + each;
    throw std::invalid_argument("ISA '" + name + "' is not available here; available: " + known);
  }, "name"_a);

  m.def("configure_threads", &configure_threads, "cpus"_a, "num_threads"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("num_threads", &num_threads);
  m.def("read_bandwidth", &read_bandwidth, "num_bytes"_a = size_t(512) << 20, nb::call_guard<nb::gil_scoped_release>());
  m.def("fma_peak", &fma_peak, nb::call_guard<nb::gil_scoped_release>());
  m.def("int8_peak", &int8_peak, nb::call_guard<nb::gil_scoped_release>());
  m.def("fork_join", [](int tasks, double cost_ns) { parallel_for(tasks, cost_ns, [](int) {}); }, "tasks"_a, "cost_ns"_a,
        nb::call_guard<nb::gil_scoped_release>());

  m.attr("TILE_ROWS") = kTileRows;
  m.attr("PANEL_TILES") = kPanelTiles;
  m.attr("BLOCK_COLUMNS") = kBlockColumns;
  m.def("poison_scratch", &poison_scratch);
  m.def("allocate", &allocate, "num_bytes"_a);
  m.def("quantize_rows", &run_quantize_rows, "weights"_a, "rows"_a, "columns"_a, "low"_a, "high"_a, "candidates"_a, "limit"_a,
        "codes"_a, "scales"_a);

  nb::class_<MatrixFormat>(m, "MatrixFormat")
      .def("__init__", [](MatrixFormat* self, const std::string& codes, const std::string& scale_type, int group_size, int super_size,
                          bool has_sub_scale, bool has_min, bool has_sub_min) {
        new (self) MatrixFormat{named(kCodes, codes), named(kFloatTypes, scale_type), group_size, super_size, has_sub_scale, has_min, has_sub_min};
      }, "codes"_a, nb::kw_only(), "scale_type"_a = "f16", "group_size"_a = 0, "super_size"_a = 0, "has_sub_scale"_a = false,
         "has_min"_a = false, "has_sub_min"_a = false)
      .def_prop_ro("codes", [](const MatrixFormat& format) { return name_of(kCodes, format.codes); })
      .def_prop_ro("scale_type", [](const MatrixFormat& format) { return name_of(kFloatTypes, format.scale_type); })
      .def_ro("group_size", &MatrixFormat::group_size)
      .def_ro("super_size", &MatrixFormat::super_size)
      .def_ro("has_sub_min", &MatrixFormat::has_sub_min);

  nb::class_<MatrixLayout>(m, "MatrixLayout")
      .def_ro("out_features", &MatrixLayout::out_features)
      .def_ro("in_features", &MatrixLayout::in_features)
      .def_ro("tiles", &MatrixLayout::tiles)
      .def_ro("blocks", &MatrixLayout::blocks)
      .def_ro("groups", &MatrixLayout::groups)
      .def_ro("supers", &MatrixLayout::supers)
      .def_ro("codes_offset", &MatrixLayout::codes_offset)
      .def_ro("scale_offset", &MatrixLayout::scale_offset)
      .def_ro("sub_scale_offset", &MatrixLayout::sub_scale_offset)
      .def_ro("min_offset", &MatrixLayout::min_offset)
      .def_ro("sub_min_offset", &MatrixLayout::sub_min_offset)
      .def_ro("num_bytes", &MatrixLayout::num_bytes);
  m.def("matrix_layout", &matrix_layout, "out_features"_a, "in_features"_a, "format"_a);

  nb::class_<Matrix>(m, "Matrix")
      .def(nb::init<const MatrixLayout&, const MatrixFormat&, Bytes, float, const std::vector<float>&, bool>(), "layout"_a, "format"_a,
           nb::arg("data").noconvert(), "zero_point"_a, "values"_a, "int8_activations"_a = false)
      .def("linear", &Matrix::run, "x"_a, "num_rows"_a, "bias"_a, "out"_a)
      .def("unpack", &Matrix::unpack, "out"_a);

  m.def("rms_norm", &run_rms_norm, "x"_a, "rows"_a, "features"_a, "weight"_a, "eps"_a, "out"_a);
  m.def("rope_store", &run_rope_store, "q"_a, "tokens"_a, "heads"_a, "k"_a, "v"_a, "q_norm"_a, "k_norm"_a, "eps"_a, "cos_sin"_a,
        "max_positions"_a, "rotary_dim"_a, "positions"_a, "slots"_a, "cache_type"_a, "k_cache"_a, "k_strides"_a, "k_scales"_a,
        "v_cache"_a, "v_strides"_a, "v_scales"_a, "cache_shape"_a);
  m.def("router_topk", &run_router_topk, "logits"_a, "rows"_a, "experts"_a, "correction_bias"_a, "top_k"_a, "n_group"_a,
        "topk_group"_a, "norm_topk_prob"_a, "routed_scaling_factor"_a, "topk_ids"_a, "topk_weights"_a);

  m.attr("KEY_TILE") = kTileKeys;
  m.attr("KEY_SPLIT") = kSplitKeys;
  m.def("attention_operands", [] {
    const AttentionOperands operands = attention_operands();
    return operands == AttentionOperands::bf16 ? "bf16" : operands == AttentionOperands::int16 ? "int16" : "fp32";
  });
  m.def("paged_attention", &run_paged_attention, "q"_a, "tokens"_a, "heads"_a, "cache_type"_a, "k_cache"_a, "k_strides"_a,
        "k_scales"_a, "v_cache"_a, "v_strides"_a, "v_scales"_a, "cache_shape"_a, "block_tables"_a, "max_blocks"_a, "query_start_loc"_a, "seq_lens"_a, "requests"_a, "scale"_a, "out"_a);

  m.def("swiglu_ffn", &run_swiglu, "gate"_a, "up"_a, "down"_a, "x"_a, "num_rows"_a, "out"_a);

  nb::class_<LayerCache>(m, "LayerCache")
      .def(nb::init<const std::string&, Address, const Strides&, Address, Address, const Strides&, Address, const Strides&>(), "type"_a,
           "keys"_a, "key_strides"_a, "key_scales"_a, "values"_a, "value_strides"_a, "value_scales"_a, "shape"_a);
  nb::class_<StepIndex>(m, "StepIndex")
      .def("__init__", [](StepIndex* self, int64_t tokens, Address positions, Address slots, Address block_tables, int64_t max_blocks,
                          Address query_start_loc, Address seq_lens, int64_t requests) {
        new (self) StepIndex(make_step(tokens, positions, slots, block_tables, max_blocks, query_start_loc, seq_lens, requests));
      }, "tokens"_a, "positions"_a, "slots"_a, "block_tables"_a, "max_blocks"_a, "query_start_loc"_a, "seq_lens"_a, "requests"_a);
  nb::class_<BoundBlock>(m, "AttentionBlock")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, float, const std::map<std::string, Address>&, nb::dict, Address, int64_t, int64_t>(),
           "hidden_size"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "eps"_a, "vectors"_a, "matrices"_a, "cos_sin"_a, "max_positions"_a,
           "rotary_dim"_a)
      .def("set_router", &BoundBlock::set_router, "gate"_a, "correction_bias"_a, "top_k"_a, "n_group"_a, "topk_group"_a,
           "norm_topk_prob"_a, "routed_scaling_factor"_a)
      .def("run", &BoundBlock::run, "step"_a, "cache"_a, "x"_a, "residual"_a, "hidden"_a, "topk_ids"_a, "topk_weights"_a);
  m.def("combine", &run_combine, "ffn"_a.none(), "residual"_a, "hidden"_a, "routed"_a, "rows"_a, "hidden_size"_a, "out"_a);

  nb::class_<Experts>(m, "Experts")
      .def(nb::init<nb::sequence, nb::sequence, nb::sequence>(), "gate"_a, "up"_a, "down"_a)
      .def_ro("hidden_size", &Experts::hidden_size)
      .def_ro("intermediate_size", &Experts::intermediate_size)
      .def("ffn", &Experts::run, "x"_a, "num_tokens"_a, "topk_ids"_a, "topk_weights"_a, "top_k"_a, "out"_a);

  bind_offload(m);
}
