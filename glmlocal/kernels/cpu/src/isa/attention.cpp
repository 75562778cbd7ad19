// One attention task: tiles of keys against rows of queries, a few rows at a time.
#include "attention.h"

#include "isa/lanes.h"
#include "memory.h"

namespace glmlocal::GLM_ISA {
namespace {

constexpr int kTileLanes = kTileKeys / kLanes;
constexpr int kRows = kGemmRows, kColumns = kGemmTiles;  // of a register tile
constexpr float kLowest = -3.402823466e38f;              // finite: minus infinity less itself would be NaN

// The lines of the next tile, asked for one at a time while this one is worked on: rows are a page apart where there are
// many kv heads, which no hardware prefetcher follows.
constexpr int TW = 100, SUB = 8, UN = 4;
struct Prefetch {
  const float* const* keys;
  const float* const* values;
  ptrdiff_t head_offset = 0;
  int row = 0, num_rows = 0, offset = 0, width = 0;
  int rate = 0, credit = 0;  // lines per unit of work, times 65536
  bool second = false;

  GLM_INLINE void step(int work) {
    credit += rate * work;
    for (; credit >= 65536 && row < num_rows; credit -= 65536) {
      const float* p = (second ? values : keys)[row] + head_offset;
      p += offset;
      unroll<UN>([&](auto i) { __builtin_prefetch(p + i.v * kLanes, 0, 2); });
      offset += UN * kLanes;
      if (offset >= width) { offset = 0; if (++row == num_rows && !second) second = true, row = 0; }
    }
  }
};

// Everything a task works on; one row is one query head of one token.
struct Workspace {
  int rows, rows_per_head, head_dim, width;  // width: head_dim rounded up to whole vectors
  float* q;                   // [rows][head_dim], times the scale
  float* keys;                // [head_dim][kTileKeys], used where the cache has them the other way round
  const float* key_columns[kTileLanes];
  ptrdiff_t key_stride;
  float* scores;              // [rows][kTileKeys]
  float* values;              // [kTileKeys][width], used where head_dim is not a multiple of 16
  float* maximum;             // [rows], of the current split
  float* own;                 // [rows][partial_size], for a split that is folded at once
  float* folded;              // [rows][partial_size], of all splits so far
  float* result;              // of the current split; while it runs, a partial's last 16 floats are the lanes' sums
  const float* value_rows[kTileKeys];
  Prefetch* prefetch;
};

Workspace make_workspace(const AttentionTask& task) {
  Workspace w{};
  w.rows_per_head = task.num_tokens * task.group;
  w.rows = w.rows_per_head * task.num_heads;
  w.head_dim = task.head_dim;
  w.width = padded_head_dim(task.head_dim);
  const size_t rows = size_t(w.rows), width = size_t(w.width), partials = rows * size_t(partial_size(task.head_dim));
  float* next = scratch(Scratch::attention, 2 * kTileKeys * width + rows * kTileKeys + 2 * partials + rows * width + rows);
  auto take = [&](size_t size) {
    float* p = next;
    next += size;
    return p;
  };
  w.keys = take(kTileKeys * width);
  w.scores = take(rows * kTileKeys);
  w.values = take(kTileKeys * width);
  w.own = take(partials);
  w.folded = take(partials);
  w.q = take(rows * width);
  w.maximum = take(rows);
  return w;
}

void scale_queries(const AttentionTask& task, const Workspace& w) {
  float* to = w.q;
  const int size = task.group * task.head_dim;
  for (int head = 0; head < task.num_heads; ++head) {
    for (int token = 0; token < task.num_tokens; ++token) {
      const float* from = task.q + token * task.q_stride + head * size;
      for (int i = 0; i < size; ++i) *to++ = from[i] * task.scale;
    }
  }
}

// The addresses of the keys and values at positions first … first + count - 1.
void find_rows(const AttentionTask& task, int first, int count, const float** keys, const float** values) {
  const ptrdiff_t key_row = task.key_slot_stride == 1 ? task.head_dim : task.key_slot_stride;
  int block = first / task.block_size, offset = first % task.block_size;
  for (int i = 0; i < count; ++i) {
    const ptrdiff_t at = task.block_table[block] * task.block_stride;
    keys[i] = task.keys + at + offset * key_row;
    values[i] = task.values + at + offset * task.slot_stride;
    if (++offset == task.block_size) offset = 0, ++block;
  }
}

void find_keys(const AttentionTask& task, Workspace& w, const float* const* rows, int head, int first, int count) {
  if (task.key_slot_stride == 1) {
    w.key_stride = task.block_size;
    for (int c = 0; c < kTileLanes; ++c) {
      const int position = first + (c * kLanes < count ? c * kLanes : 0);
      w.key_columns[c] = task.keys + task.block_table[position / task.block_size] * task.block_stride + position % task.block_size + head * task.head_stride;
    }
    return;
  }
  const float* keys[kTileKeys];
  for (int i = 0; i < kTileKeys; ++i) keys[i] = rows[i < count ? i : 0] + head * task.head_stride;
  w.key_stride = kTileKeys;
  for (int c = 0; c < kTileLanes; ++c) w.key_columns[c] = w.keys + c * kLanes;
  const int whole = w.head_dim / kLanes * kLanes;
  for (int key = 0; key < kTileKeys; key += kLanes) {
    for (int d = 0; d < whole; d += kLanes) { transpose(keys + key, d, w.keys + d * kTileKeys + key, kTileKeys); w.prefetch->step(TW); }
    for (int d = whole; d < w.head_dim; ++d) {
      for (int i = 0; i < kLanes; ++i) w.keys[d * kTileKeys + key + i] = keys[key + i][d];
    }
  }
}

// Values whose rows do not end with a whole vector are copied, with zeros after them.
void pad_values(Workspace& w, int count) {
  const int whole = w.head_dim / kLanes * kLanes, rest = w.head_dim - whole;
  if (rest == 0) return;
  for (int key = 0; key < count; ++key) {
    float* to = w.values + key * w.width;
    for (int d = 0; d < whole; d += kLanes) store(to + d, load(w.value_rows[key] + d));
    store(to + whole, load_first(w.value_rows[key] + whole, rest));
    w.value_rows[key] = to;
  }
}

// scores[row][key] = q[row] · keys[key], summed over the features in order.
template <int rows, int columns>
GLM_INLINE void score_columns(const float* q, const float* const* key_columns, ptrdiff_t key_stride, int head_dim, float* scores, Prefetch& prefetch) {
  F acc[rows][columns];
  unroll<rows>([&](auto r) { unroll<columns>([&](auto c) { acc[r.v][c.v] = zero(); }); });
  const float* from[columns];
  unroll<columns>([&](auto c) { from[c.v] = key_columns[c.v]; });
  ptrdiff_t at = 0;
  for (int begin = 0; begin < head_dim; begin += SUB) {
    prefetch.step(rows * columns * SUB);
    const int end = begin + SUB < head_dim ? begin + SUB : head_dim;
    for (int d = begin; d < end; ++d, at += key_stride) {
      F key[columns];
      unroll<columns>([&](auto c) { key[c.v] = load(from[c.v] + at); });
      unroll<rows>([&](auto r) {
        const F x = broadcast(q[r.v * head_dim + d]);
        unroll<columns>([&](auto c) { acc[r.v][c.v] = fma(key[c.v], x, acc[r.v][c.v]); });
      });
    }
  }
  unroll<rows>([&](auto r) {
    unroll<columns>([&](auto c) { store(scores + r.v * kTileKeys + c.v * kLanes, acc[r.v][c.v]); });
  });
}

// result[row] = decay[row] · result[row] + Σ weights[row][key] · values[key], in the order of the keys.
template <int rows, int columns>
GLM_INLINE void add_columns(const float* weights, const float* const* values, int num_keys, int first_column, const float* decay,
                            float* result, int stride, Prefetch& prefetch) {
  F acc[rows][columns];
  unroll<rows>([&](auto r) {
    unroll<columns>([&](auto c) {
      acc[r.v][c.v] = decay ? mul(load(result + r.v * stride + c.v * kLanes), broadcast(decay[r.v])) : zero();
    });
  });
  for (int begin = 0; begin < num_keys; begin += SUB) {
    prefetch.step(rows * columns * SUB);
    const int end = begin + SUB < num_keys ? begin + SUB : num_keys;
    for (int key = begin; key < end; ++key) {
      const float* from = values[key] + first_column;
      F value[columns];
      unroll<columns>([&](auto c) { value[c.v] = load(from + c.v * kLanes); });
      unroll<rows>([&](auto r) {
        const F x = broadcast(weights[r.v * kTileKeys + key]);
        unroll<columns>([&](auto c) { acc[r.v][c.v] = fma(value[c.v], x, acc[r.v][c.v]); });
      });
    }
  }
  unroll<rows>([&](auto r) { unroll<columns>([&](auto c) { store(result + r.v * stride + c.v * kLanes, acc[r.v][c.v]); }); });
}

// Scores → exp(score - maximum), zero for keys beyond num_keys; the running sum of each lane; by how much the maximum's
// growth shrinks what was summed before.
template <int rows>
GLM_INLINE void softmax_rows(float* scores, int num_keys, bool fresh, float* maximum_so_far, float* sums, int sums_stride,
                             float* decay) {
  alignas(64) float before[kLanes] = {}, after[kLanes] = {};
  const F lowest = broadcast(kLowest);
  unroll<rows>([&](auto r) {
    float* s = scores + r.v * kTileKeys;
    F best = lowest;
    unroll<kTileLanes>([&](auto i) {
      constexpr int first = decltype(i)::v * kLanes;
      const F x = load(s + first);
      best = max(best, num_keys >= first + kLanes ? x : where_first(num_keys - first, x, lowest));
    });
    before[r.v] = fresh ? kLowest : maximum_so_far[r.v];
    const float highest = glmlocal::GLM_ISA::maximum(best);
    after[r.v] = highest > before[r.v] ? highest : before[r.v];
    maximum_so_far[r.v] = after[r.v];
  });
  store(decay, exp(sub(load(before), load(after))));
  unroll<rows>([&](auto r) {
    float* s = scores + r.v * kTileKeys;
    const F highest = broadcast(after[r.v]);
    F sum = fresh ? zero() : mul(load(sums + r.v * sums_stride), broadcast(decay[r.v]));
    unroll<kTileLanes>([&](auto i) {
      constexpr int first = decltype(i)::v * kLanes;
      const F e = exp(sub(load(s + first), highest));
      const F x = num_keys >= first + kLanes ? e : where_first(num_keys - first, e, zero());
      store(s + first, x);
      sum = add(sum, x);
    });
    store(sums + r.v * sums_stride, sum);
  });
}

template <int rows>
void score_rows(const Workspace& w, int row) {
  for (int c = 0; c < kTileLanes; c += kColumns) {
    score_columns<rows, kColumns>(w.q + row * w.head_dim, w.key_columns + c, w.key_stride, w.head_dim,
                                  w.scores + row * kTileKeys + c * kLanes, *w.prefetch);
  }
}

template <int rows>
void add_rows(const Workspace& w, int row, int num_keys, bool fresh) {
  alignas(64) float decay[kLanes];
  float* scores = w.scores + row * kTileKeys;
  const int stride = w.width + kLanes;
  float* result = w.result + row * ptrdiff_t(stride);
  softmax_rows<rows>(scores, num_keys, fresh, w.maximum + row, result + w.width, stride, decay);
  const float* factor = fresh ? nullptr : decay;
  int column = 0;
  for (; column + kColumns * kLanes <= w.width; column += kColumns * kLanes) {
    add_columns<rows, kColumns>(scores, w.value_rows, num_keys, column, factor, result + column, stride, *w.prefetch);
  }
  for (; column < w.width; column += kLanes) {
    add_columns<rows, 1>(scores, w.value_rows, num_keys, column, factor, result + column, stride, *w.prefetch);
  }
}

// Calls f(Constant<rows>, row) for pieces of at most kRows rows that make up row … end - 1.
template <int most, class Visit>
GLM_INLINE void with_rows(int rows, int row, Visit& f) {
  if constexpr (most > 1) {
    if (rows < most) return with_rows<most - 1>(rows, row, f);
  }
  f(Constant<most>{}, row);
}
template <class Visit>
GLM_INLINE void for_rows(int row, int end, Visit&& f) {
  for (int pieces = (end - row + kRows - 1) / kRows; pieces > 0; --pieces) {
    const int rows = (end - row + pieces - 1) / pieces;
    with_rows<kRows>(rows, row, f);
    row += rows;
  }
}

// The first token that sees the key at this position.
int first_token(const AttentionTask& task, int key) { return key > task.first_position ? key - task.first_position : 0; }

void attend_tile(const AttentionTask& task, Workspace& w, const float* const* keys, const float* const* values, int head,
                 int first_key, int count, bool fresh) {
  for (int i = 0; i < count; ++i) w.value_rows[i] = values[i] + head * task.head_stride;
  find_keys(task, w, keys, head, first_key, count);
  pad_values(w, count);
  int token = first_token(task, first_key);
  const int begin = head * w.rows_per_head, end = begin + w.rows_per_head;
  for_rows(begin + token * task.group, end, [&](auto rows, int row) { score_rows<decltype(rows)::v>(w, row); });
  auto add = [&](int row, int row_end, int num_keys) {
    for_rows(row, row_end, [&](auto rows, int first) { add_rows<decltype(rows)::v>(w, first, num_keys, fresh); });
  };
  for (; token < task.num_tokens; ++token) {
    const int num_keys = task.first_position + token + 1 - first_key;
    if (num_keys >= kTileKeys) break;
    add(begin + token * task.group, begin + (token + 1) * task.group, num_keys);
  }
  add(begin + token * task.group, end, kTileKeys);
}

// folded ← both, as if their splits had been one.
GLM_INLINE void fold(float* folded, const float* partial, int width) {
  const float before = folded[width + 1], other = partial[width + 1];
  const float highest = other > before ? other : before;
  alignas(64) float factors[kLanes] = {before - highest, other - highest};
  store(factors, exp(load(factors)));
  const F decay = broadcast(factors[0]), growth = broadcast(factors[1]);
  for (int d = 0; d < width; d += kLanes) {
    store(folded + d, fma(load(partial + d), growth, mul(load(folded + d), decay)));
  }
  folded[width] = folded[width] * factors[0] + partial[width] * factors[1];
  folded[width + 1] = highest;
}

GLM_INLINE void write_result(const float* folded, int head_dim, float* out) {
  const F total = broadcast(folded[padded_head_dim(head_dim)]);
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(out + d, div(load(folded + d), total));
  if (d < head_dim) store_first(out + d, div(load(folded + d), total), head_dim - d);
}

// Turns the lanes' sums into the form that fold() takes.
void end_split(const Workspace& w, int row) {
  float* tail = w.result + row * ptrdiff_t(w.width + kLanes) + w.width;
  tail[0] = sum(load(tail));
  tail[1] = w.maximum[row];
}

}  // namespace

void attend(const AttentionTask& task) {
  Workspace w = make_workspace(task);
  Prefetch prefetch;
  w.prefetch = &prefetch;
  scale_queries(task, w);
  const int size = partial_size(task.head_dim);
  const int num_keys = task.first_position + task.num_tokens;
  const float *keys[2][kTileKeys], *values[2][kTileKeys];
  int which = 0;
  auto keys_of_tile = [&](int first) { return num_keys - first < kTileKeys ? num_keys - first : kTileKeys; };
  find_rows(task, task.first_split * kSplitKeys, keys_of_tile(task.first_split * kSplitKeys), keys[0], values[0]);
  for (int split = task.first_split; split < task.first_split + task.num_splits; ++split) {
    const int begin = split * kSplitKeys, end = begin + kSplitKeys < num_keys ? begin + kSplitKeys : num_keys;
    w.result = task.partials ? task.partials + (split - task.first_split) * task.partial_stride : split == 0 ? w.folded : w.own;
    for (int key = begin; key < end; key += kTileKeys, which ^= 1) {
      const int count = keys_of_tile(key), next = key + kTileKeys;
      if (next < num_keys) find_rows(task, next, keys_of_tile(next), keys[which ^ 1], values[which ^ 1]);
      for (int head = 0; head < task.num_heads; ++head) {
        const bool last = head + 1 == task.num_heads;
        prefetch.keys = keys[which ^ last];
        prefetch.values = values[which ^ last];
        prefetch.head_offset = last ? 0 : (head + 1) * task.head_stride;
        prefetch.num_rows = !last ? count : next < num_keys ? keys_of_tile(next) : 0;
        prefetch.row = prefetch.offset = prefetch.credit = 0;
        prefetch.second = false;
        prefetch.width = task.head_dim;
        const int64_t work = int64_t(w.rows_per_head) * (kTileLanes * w.head_dim + kTileKeys * w.width / kLanes) + (task.key_slot_stride == 1 ? 0 : kTileLanes * w.width / kLanes * TW);
        prefetch.rate = 68000 * (2 * prefetch.num_rows * (w.width / (UN * kLanes))) / work;
        attend_tile(task, w, keys[which], values[which], head, key, count, key == begin);
      }
    }
    for (int head = 0; head < task.num_heads; ++head) {
      for (int r = first_token(task, begin) * task.group; r < w.rows_per_head; ++r) {
        const int row = head * w.rows_per_head + r;
        end_split(w, row);
        if (w.result == w.own) fold(w.folded + row * size, w.own + row * size, w.width);
      }
    }
  }
  if (task.partials) return;
  for (int row = 0; row < w.rows; ++row) {
    const int head = row / w.rows_per_head, token = row % w.rows_per_head / task.group, member = row % task.group;
    write_result(w.folded + row * size, task.head_dim,
                 task.out + token * task.out_stride + (head * task.group + member) * task.head_dim);
  }
}

void merge_splits(float* partials, ptrdiff_t stride, int num_splits, int head_dim, float* out) {
  for (int split = 1; split < num_splits; ++split) fold(partials, partials + split * stride, padded_head_dim(head_dim));
  write_result(partials, head_dim, out);
}

}  // namespace glmlocal::GLM_ISA
