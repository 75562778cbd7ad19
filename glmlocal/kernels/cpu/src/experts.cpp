#include <algorithm>
#include <cstring>
#include <vector>

#include "activations.h"
#include "isa.h"
#include "memory.h"
#include "ops.h"
#include "thread_pool.h"

namespace glmlocal {
namespace {

// One (token, slot) of the routing.
struct Pair {
  int64_t token;
  float weight;
  int64_t index;  // token · top_k + slot
};

// All pairs, expert by expert; within an expert by token.
struct Routing {
  std::vector<Pair> pairs;
  std::vector<int64_t> first;  // [num_experts + 1] index into pairs
};

// One panel of gate and up for some of one expert's pairs, which begin with a group of rows.
struct HiddenTask {
  int expert, panel;
  int64_t first_pair;
  int num_pairs;
  int64_t first_group;
};

int64_t num_groups(int64_t rows) { return rows <= kFewRows ? 0 : (rows + kGroupRows - 1) / kGroupRows; }

// The pairs of experts that have more than a few, in groups of rows; each expert's begin with a new one. Nothing where the
// kernels take none.
class PairGroups {
 public:
  template <class RowOf>
  PairGroups(Scratch slot, const Routing& routing, int64_t blocks, bool int8, RowOf&& row_of) : blocks_(blocks) {
    if (!int8 || !kernels().takes_groups) return;
    std::vector<const Int8Block*> rows;
    for (size_t e = 0; e + 1 < routing.first.size(); ++e) {
      const int64_t count = routing.first[e + 1] - routing.first[e];
      if (count > kFewRows) append_run(rows, count, [&](int64_t i) { return row_of(routing.first[e] + i); });
    }
    if (!rows.empty()) groups_ = gather_groups(slot, rows, blocks);
  }
  // From this group on, for so many rows; null where they are not in groups.
  const Int8Group* at(int64_t group, int64_t rows) const { return groups_ == nullptr || rows <= kFewRows ? nullptr : groups_ + group * blocks_; }

 private:
  const Int8Group* groups_ = nullptr;
  int64_t blocks_;
};

int64_t find_bad_id(const int32_t* ids, int64_t count, int num_experts) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= num_experts) return i;
  }
  return -1;
}

void sort_by_expert(Routing& routing, int num_experts, int64_t num_pairs, const int32_t* ids, const float* weights, int top_k) {
  std::vector<int64_t>& first = routing.first;
  first.assign(size_t(num_experts) + 1, 0);
  for (int64_t i = 0; i < num_pairs; ++i) ++first[size_t(ids[i]) + 1];
  for (int e = 0; e < num_experts; ++e) first[e + 1] += first[e];
  routing.pairs.resize(size_t(num_pairs));
  // Filling moves first[e] to the start of expert e + 1; the shift afterwards puts it back.
  for (int64_t i = 0; i < num_pairs; ++i) routing.pairs[size_t(first[ids[i]]++)] = {i / top_k, weights[i], i};
  for (int e = num_experts; e > 0; --e) first[e] = first[e - 1];
  first[0] = 0;
}

// The same with the pairs of those experts alone whose matrices are there.
void sort_present(Routing& routing, const ExpertMatrices& experts, int64_t num_pairs, const int32_t* ids, int top_k) {
  std::vector<int64_t>& first = routing.first;
  first.assign(size_t(experts.num_experts) + 1, 0);
  for (int64_t i = 0; i < num_pairs; ++i) first[size_t(ids[i]) + 1] += experts.gate[ids[i]] != nullptr;
  for (int e = 0; e < experts.num_experts; ++e) first[e + 1] += first[e];
  routing.pairs.resize(size_t(first[experts.num_experts]));
  std::vector<int64_t> at(first.begin(), first.end() - 1);
  for (int64_t i = 0; i < num_pairs; ++i) {
    if (experts.gate[ids[i]] != nullptr) routing.pairs[size_t(at[size_t(ids[i])]++)] = {i / top_k, 1.0f, i};
  }
}

void list_hidden_tasks(std::vector<HiddenTask>& tasks, const ExpertMatrices& experts, const Routing& routing) {
  tasks.clear();
  int active = 0;
  for (int e = 0; e < experts.num_experts; ++e) active += routing.first[e + 1] > routing.first[e];
  int64_t first_group = 0;
  for (int e = 0; e < experts.num_experts; ++e) {
    const int64_t begin = routing.first[e], end = routing.first[e + 1];
    if (begin == end) continue;
    const int panels = experts.gate[e]->panels();
    const int chunk = chunk_rows(end - begin, int64_t(panels) * active);
    for (int64_t at = begin; at < end; at += chunk) {
      for (int panel = 0; panel < panels; ++panel) {
        tasks.push_back({e, panel, at, int(std::min<int64_t>(chunk, end - at)), first_group + (at - begin) / kGroupRows});
      }
    }
    first_group += num_groups(end - begin);
  }
}

// Which forms of activations some matrices take.
struct Forms {
  bool floats, int8;
  Forms operator|(Forms other) const { return {floats || other.floats, int8 || other.int8}; }
};

Forms forms_of(const PackedMatrix* const* matrices, int count) {
  Forms forms{false, false};
  for (int e = 0; e < count; ++e) {
    if (matrices[e] != nullptr) (matrices[e]->int8_activations ? forms.int8 : forms.floats) = true;
  }
  return forms;
}

// silu(gate) · up of every pair, in the forms that the down matrices take. A panel is two whole blocks of columns.
class Hidden {
 public:
  Hidden(const PackedMatrix& down, int64_t num_pairs, Forms forms) : padded_in_(down.padded_in()) {
    rows_.float_stride = padded_in_;
    rows_.block_stride = down.layout.blocks;
    if (forms.floats) rows_.floats = floats_ = scratch(Scratch::hidden, size_t(num_pairs * rows_.float_stride));
    if (forms.int8) {
      const size_t num_bytes = size_t(num_pairs * rows_.block_stride) * sizeof(Int8Block);
      rows_.blocks = blocks_ = reinterpret_cast<Int8Block*>(scratch(Scratch::int8_hidden, num_bytes / sizeof(float)));
    }
  }

  const Activations& rows() const { return rows_; }
  PairGroups groups(const Routing& routing) const {
    return {Scratch::hidden_groups, routing, rows_.block_stride, blocks_ != nullptr, [&](int64_t pair) { return blocks_ + pair * rows_.block_stride; }};
  }

  // `row` has room for kPanelRows floats, the first `width` of which are the panel's; the last panel also clears what pads
  // the row to whole blocks.
  void store(int64_t pair, int panel, float* row, int width) const {
    const int padded = std::min(kPanelRows, padded_in_ - panel * kPanelRows);
    std::fill(row + width, row + std::max(padded, width), 0.0f);
    if (floats_ != nullptr) std::copy_n(row, padded, floats_ + pair * rows_.float_stride + panel * kPanelRows);
    if (blocks_ != nullptr) {
      kernels().quantize_row(row, padded / kBlockColumns, blocks_ + pair * rows_.block_stride + panel * (kPanelRows / kBlockColumns));
    }
  }

 private:
  int padded_in_;
  Activations rows_;
  float* floats_ = nullptr;
  Int8Block* blocks_ = nullptr;
};

// What is read after the down panel of expert e: the same panel of the next expert that has pairs, or the first one's next.
const std::byte* next_down(const ExpertMatrices& experts, const Routing& routing, int e, int panel) {
  const auto has_pairs = [&](int expert) { return routing.first[expert + 1] > routing.first[expert]; };
  for (int other = e + 1; other < experts.num_experts; ++other) {
    if (has_pairs(other)) return experts.down[other]->panel_codes(panel);
  }
  if (panel + 1 == experts.down[e]->panels()) return nullptr;
  int first = 0;
  while (!has_pairs(first)) ++first;
  return experts.down[first]->panel_codes(panel + 1);
}

// silu(gate) · up of all pairs, panel by panel.
void compute_hidden(const ExpertMatrices& experts, const Routing& routing, const std::vector<HiddenTask>& tasks,
                    const Activations& input, const Hidden& hidden, double cost) {
  if (tasks.empty()) return;
  const KernelTable& kernel = kernels();
  const PairGroups groups(Scratch::groups, routing, experts.gate[tasks[0].expert]->layout.blocks, input.blocks != nullptr,
                          [&](int64_t pair) { return input.blocks + routing.pairs[size_t(pair)].token * input.block_stride; });
  parallel_for(int(tasks.size()), cost, [&](int index) {
    const HiddenTask task = tasks[size_t(index)];
    const PackedMatrix &gate = *experts.gate[task.expert], &up = *experts.up[task.expert];
    const auto token_of = [&](int i) { return routing.pairs[size_t(task.first_pair + i)].token; };
    const int width = gate.tiles_in(task.panel) * kTileRows;
    float* gate_tile = scratch(Scratch::tile, size_t(task.num_pairs) * kPanelRows);
    float* up_tile = scratch(Scratch::tile2, size_t(task.num_pairs) * kPanelRows);
    const HiddenTask* following = size_t(index) + 1 < tasks.size() ? &tasks[size_t(index) + 1] : nullptr;
    panel_product(gate, task.panel, input, groups.at(task.first_group, task.num_pairs), task.num_pairs, token_of, gate_tile, kPanelRows, up.panel_codes(task.panel));
    panel_product(up, task.panel, input, groups.at(task.first_group, task.num_pairs), task.num_pairs, token_of, up_tile, kPanelRows,
                  following == nullptr ? nullptr : experts.gate[following->expert]->panel_codes(following->panel));
    for (int i = 0; i < task.num_pairs; ++i) {
      float* row = gate_tile + i * kPanelRows;
      kernel.silu_mul(row, up_tile + i * kPanelRows, width);
      hidden.store(task.first_pair + i, task.panel, row, width);
    }
  });
}

}  // namespace

int64_t experts_ffn(const ExpertMatrices& experts, const float* x, int64_t num_tokens, const int32_t* ids,
                    const float* weights, int top_k, float* out) {
  const int64_t num_pairs = num_tokens * top_k;
  if (const int64_t bad = find_bad_id(ids, num_pairs, experts.num_experts); bad >= 0) return bad;
  if (num_tokens == 0) return -1;
  thread_local Routing routing_storage;
  thread_local std::vector<HiddenTask> task_storage;
  Routing& routing = routing_storage;  // the tasks below run on other threads: they must see this thread's
  std::vector<HiddenTask>& tasks = task_storage;
  sort_by_expert(routing, experts.num_experts, num_pairs, ids, weights, top_k);
  list_hidden_tasks(tasks, experts, routing);

  const PackedMatrix &any_gate = *experts.gate[0], &any_down = *experts.down[0];
  const int64_t hidden_size = any_gate.in_features();
  const ptrdiff_t out_stride = any_down.layout.tiles * kTileRows;
  const Forms in = forms_of(experts.gate, experts.num_experts) | forms_of(experts.up, experts.num_experts);
  const Activations input = prepare_activations(x, num_tokens, hidden_size, in.floats, in.int8);
  const Hidden hidden(any_down, num_pairs, forms_of(experts.down, experts.num_experts));
  float* sums = out_stride == hidden_size ? out : scratch(Scratch::rows, size_t(num_tokens) * out_stride);
  const KernelTable& kernel = kernels();
  double gate_cost = 0, down_cost = 0;
  for (int e = 0; e < experts.num_experts; ++e) {
    const int64_t count = routing.first[e + 1] - routing.first[e];
    if (count == 0) continue;
    gate_cost += 2 * product_cost_ns(*experts.gate[e], count);
    down_cost += product_cost_ns(*experts.down[e], count);
  }

  compute_hidden(experts, routing, tasks, input, hidden, gate_cost);
  const PairGroups groups = hidden.groups(routing);

  parallel_for(any_down.panels(), down_cost, [&](int panel) {
    const int64_t column = int64_t(panel) * kPanelRows;
    const int width = any_down.tiles_in(panel) * kTileRows;
    for (int64_t t = 0; t < num_tokens; ++t) std::fill_n(sums + t * out_stride + column, width, 0.0f);
    float* tile = scratch(Scratch::tile, size_t(kMaxChunkRows) * width);
    int64_t group = 0;
    for (int e = 0; e < experts.num_experts; ++e) {
      for (int64_t at = routing.first[e]; at < routing.first[e + 1]; at += kMaxChunkRows) {
        const int count = int(std::min<int64_t>(kMaxChunkRows, routing.first[e + 1] - at));
        const std::byte* next = next_down(experts, routing, e, panel);
        panel_product(*experts.down[e], panel, hidden.rows(), groups.at(group, count), count, [&](int i) { return at + i; }, tile, width, next);
        group += num_groups(count);  // no chunk but an expert's last has few
        for (int i = 0; i < count; ++i) {
          const Pair pair = routing.pairs[size_t(at + i)];
          kernel.add_scaled(sums + pair.token * out_stride + column, tile + i * width, pair.weight, width);
        }
      }
    }
  });

  if (sums != out) {
    for (int64_t t = 0; t < num_tokens; ++t) std::memcpy(out + t * hidden_size, sums + t * out_stride, hidden_size * sizeof(float));
  }
  return -1;
}

int64_t experts_rows(const ExpertMatrices& experts, const float* x, int64_t num_tokens, const int32_t* ids, int top_k, float* rows) {
  const int64_t num_pairs = num_tokens * top_k;
  if (const int64_t bad = find_bad_id(ids, num_pairs, experts.num_experts); bad >= 0) return bad;
  thread_local Routing routing_storage;
  thread_local std::vector<HiddenTask> task_storage;
  Routing& routing = routing_storage;
  std::vector<HiddenTask>& tasks = task_storage;
  sort_present(routing, experts, num_pairs, ids, top_k);
  const int64_t num_present = routing.first[experts.num_experts];
  if (num_present == 0) return -1;
  list_hidden_tasks(tasks, experts, routing);

  int any = 0;
  while (routing.first[any + 1] == routing.first[any]) ++any;
  const PackedMatrix& any_down = *experts.down[any];
  const int64_t hidden_size = experts.gate[any]->in_features(), row_floats = any_down.layout.tiles * kTileRows;
  const Forms in = forms_of(experts.gate, experts.num_experts) | forms_of(experts.up, experts.num_experts);
  const Activations input = prepare_activations(x, num_tokens, hidden_size, in.floats, in.int8);
  const Hidden hidden(any_down, num_present, forms_of(experts.down, experts.num_experts));
  double gate_cost = 0, down_cost = 0;
  std::vector<HiddenTask> down_tasks;
  int64_t first_group = 0;
  for (int e = 0; e < experts.num_experts; ++e) {
    const int64_t count = routing.first[e + 1] - routing.first[e];
    if (count == 0) continue;
    gate_cost += 2 * product_cost_ns(*experts.gate[e], count);
    down_cost += product_cost_ns(*experts.down[e], count);
    for (int64_t at = routing.first[e]; at < routing.first[e + 1]; at += kMaxChunkRows) {
      const int chunk = int(std::min<int64_t>(kMaxChunkRows, routing.first[e + 1] - at));
      for (int panel = 0; panel < any_down.panels(); ++panel) down_tasks.push_back({e, panel, at, chunk, first_group});
      first_group += num_groups(chunk);
    }
  }
  compute_hidden(experts, routing, tasks, input, hidden, gate_cost);
  const PairGroups groups = hidden.groups(routing);
  parallel_for(int(down_tasks.size()), down_cost, [&](int index) {
    const HiddenTask task = down_tasks[size_t(index)];
    const PackedMatrix& down = *experts.down[task.expert];
    const int width = down.tiles_in(task.panel) * kTileRows;
    float* tile = scratch(Scratch::tile, size_t(task.num_pairs) * width);
    const HiddenTask* following = size_t(index) + 1 < down_tasks.size() ? &down_tasks[size_t(index) + 1] : nullptr;
    panel_product(down, task.panel, hidden.rows(), groups.at(task.first_group, task.num_pairs), task.num_pairs, [&](int i) { return task.first_pair + i; }, tile, width,
                  following == nullptr ? nullptr : experts.down[following->expert]->panel_codes(following->panel));
    for (int i = 0; i < task.num_pairs; ++i) {
      const int64_t pair = routing.pairs[size_t(task.first_pair + i)].index;
      std::copy_n(tile + i * width, width, rows + pair * row_floats + int64_t(task.panel) * kPanelRows);
    }
  });
  return -1;
}

void weigh_rows(const float* rows, int64_t row_floats, int64_t num_tokens, int64_t hidden_size, const int32_t* ids,
                const float* weights, int top_k, float* out) {
  const KernelTable& kernel = kernels();
  std::vector<int> storage(size_t(num_tokens) * size_t(top_k));
  parallel_for(int(num_tokens), 0.5 * double(num_tokens) * top_k * double(hidden_size), [&](int token) {
    int* order = storage.data() + int64_t(token) * top_k;
    const int32_t* id = ids + int64_t(token) * top_k;
    for (int i = 0; i < top_k; ++i) order[i] = i;
    std::stable_sort(order, order + top_k, [&](int a, int b) { return id[a] < id[b]; });
    float* sum = scratch(Scratch::tile, size_t(row_floats));
    std::fill_n(sum, row_floats, 0.0f);
    for (int i = 0; i < top_k; ++i) {
      const int64_t pair = int64_t(token) * top_k + order[i];
      kernel.add_scaled(sum, rows + pair * row_floats, weights[pair], int(row_floats));
    }
    std::memcpy(out + token * hidden_size, sum, size_t(hidden_size) * sizeof(float));
  });
}

void swiglu_ffn(const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down, const float* x, int64_t num_rows,
                float* out) {
  thread_local std::vector<int32_t> ids;
  thread_local std::vector<float> weights;
  ids.assign(size_t(num_rows), 0);
  weights.assign(size_t(num_rows), 1.0f);
  const PackedMatrix *gates[]{&gate}, *ups[]{&up}, *downs[]{&down};
  experts_ffn({gates, ups, downs, 1}, x, num_rows, ids.data(), weights.data(), 1, out);
}

}  // namespace glmlocal
