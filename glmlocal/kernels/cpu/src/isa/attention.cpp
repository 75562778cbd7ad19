// One attention task: tiles of keys against rows of queries, a few rows at a time.
#include "attention.h"

#include "isa/lanes.h"
#include "memory.h"

namespace glmlocal::GLM_ISA {
namespace {

constexpr int kTileColumns = kTileKeys / kLanes;
constexpr int kRows = kGemmRows, kColumns = kGemmTiles;  // of a register tile
constexpr int kTransposeWork = 100;  // 16 × 16 floats take about as long as so many fmas
constexpr float kLowest = -3.402823466e38f;              // finite: minus infinity less itself would be NaN

// The next tile of keys and values, asked for while this one is worked on. Its lines are far apart, which no hardware
// prefetcher follows, and a CPU drops what it is asked for too fast: a few lines every few dozen fmas, never all at once.
class Prefetch {
 public:
  static constexpr int kSteps = 8;  // loop iterations of the kernels between two calls of advance()

  // `work` fmas (of 16 lanes) will be done meanwhile.
  void start(const float* const* keys, const float* const* values, ptrdiff_t key_offset, ptrdiff_t value_offset, int count,
             int head_dim, int64_t work) {
    keys_ = keys, values_ = values, key_offset_ = key_offset, value_offset_ = value_offset;
    count_ = count, size_ = head_dim, row_ = at_ = credit_ = 0;
    in_values_ = false;
    const int64_t pieces = 2 * count * ((head_dim + kPiece - 1) / kPiece);
    rate_ = int(pieces * kOne * 33 / 32 / work);  // done just before the end
  }

  GLM_INLINE void advance(int work) {
    for (credit_ += rate_ * work; credit_ >= kOne; credit_ -= kOne) {
      if (row_ == count_) {
        if (in_values_) return;
        in_values_ = true, row_ = 0;
      }
      const float* p = (in_values_ ? values_[row_] + value_offset_ : keys_[row_] + key_offset_) + at_;
      unroll<kPiece / kLanes>([&](auto line) { __builtin_prefetch(p + line.v * kLanes, 0, 2); });
      if ((at_ += kPiece) >= size_) at_ = 0, ++row_;
    }
  }

 private:
  static constexpr int kPiece = 4 * kLanes, kOne = 1 << 16;

  const float* const* keys_;
  const float* const* values_;
  ptrdiff_t key_offset_, value_offset_;
  int count_, size_, row_, at_, rate_, credit_;
  bool in_values_;
};

// The keys and values of one tile, for the first kv head. Where the slots of keys are neighbours, keys[i] is not the
// address of one key but of the i-th part of what belongs to the block, good for prefetching only.
struct Tile {
  int first, count;
  const float* keys[kTileKeys];
  const float* values[kTileKeys];
};

// Everything a task works on. One row is one query head of one token; rows of a kv head are next to each other.
struct Workspace {
  int rows, rows_per_head, head_dim, width;  // width: head_dim rounded up to whole vectors
  float* q;                                  // [rows][head_dim], times the scale
  float* keys;                               // [head_dim][kTileKeys], where the cache has features next to each other
  float* values;                             // [kTileKeys][width], where head_dim is not a multiple of 16
  float* maximum;                            // [rows], of the current split
  float* own;                                // [rows][partial_size], for a split that is folded at once
  float* folded;                             // [rows][partial_size], of the splits so far
  float* result;  // of the current split; while it runs, the last 16 floats of a row are the lanes' sums of weights
  const float* key_columns[kTileColumns];  // feature d of 16 keys is at key_columns[…] + d * key_stride
  ptrdiff_t key_stride;
  const float* value_rows[kTileKeys];
  Prefetch prefetch;
};

void make_workspace(const AttentionTask& task, Workspace& w) {
  w.rows_per_head = task.num_tokens * task.group;
  w.rows = w.rows_per_head * task.num_heads;
  w.head_dim = task.head_dim;
  w.width = padded_head_dim(task.head_dim);
  const size_t rows = size_t(w.rows), width = size_t(w.width), partials = rows * size_t(partial_size(task.head_dim));
  float* next = scratch(Scratch::attention, 2 * kTileKeys * width + 2 * partials + rows * width + rows);
  auto take = [&](size_t size) {
    float* p = next;
    next += size;
    return p;
  };
  w.keys = take(kTileKeys * width);
  w.values = take(kTileKeys * width);
  w.own = take(partials);
  w.folded = take(partials);
  w.q = take(rows * width);
  w.maximum = take(rows);
}

void scale_queries(const AttentionTask& task, const Workspace& w) {
  const int size = task.group * task.head_dim;
  float* to = w.q;
  for (int head = 0; head < task.num_heads; ++head) {
    for (int token = 0; token < task.num_tokens; ++token) {
      const float* from = task.q + token * task.q_stride + head * size;
      for (int i = 0; i < size; ++i) *to++ = from[i] * task.scale;
    }
  }
}

bool slots_are_neighbours(const AttentionTask& task) {
  return task.key_strides.slot == 1 && task.block_size % kLanes == 0;
}

void find_tile(const AttentionTask& task, int first, Tile& tile) {
  const int left = task.first_position + task.num_tokens - first;
  tile.first = first;
  tile.count = left < kTileKeys ? left : kTileKeys;
  const ptrdiff_t key_step = slots_are_neighbours(task) ? task.head_dim : task.key_strides.slot;
  int block = first / task.block_size, slot = first % task.block_size;
  for (int i = 0; i < tile.count; ++i) {
    tile.keys[i] = task.keys + task.block_table[block] * task.key_strides.block + slot * key_step;
    tile.values[i] = task.values + task.block_table[block] * task.value_strides.block + slot * task.value_strides.slot;
    if (++slot == task.block_size) slot = 0, ++block;
  }
}

// Points key_columns at the keys of one head. Lanes of keys that do not exist hold anything.
void load_keys(const AttentionTask& task, const Tile& tile, int head, Workspace& w) {
  const ptrdiff_t offset = head * task.key_strides.head;
  if (slots_are_neighbours(task)) {
    w.key_stride = task.key_strides.feature;
    for (int c = 0; c < kTileColumns; ++c) {
      const int position = tile.first + (c * kLanes < tile.count ? c * kLanes : 0);
      w.key_columns[c] = task.keys + offset + task.block_table[position / task.block_size] * task.key_strides.block +
                         position % task.block_size;
    }
    return;
  }
  const float* rows[kTileKeys];
  for (int i = 0; i < kTileKeys; ++i) rows[i] = tile.keys[i < tile.count ? i : 0] + offset;
  w.key_stride = kTileKeys;
  const int whole = w.head_dim / kLanes * kLanes;
  for (int c = 0; c < kTileColumns; ++c) {
    float* to = w.keys + c * kLanes;
    w.key_columns[c] = to;
    if (c * kLanes >= tile.count) continue;
    for (int d = 0; d < whole; d += kLanes) {
      w.prefetch.advance(kTransposeWork);
      transpose(rows + c * kLanes, d, to + d * kTileKeys, kTileKeys);
    }
    for (int d = whole; d < w.head_dim; ++d) {
      for (int i = 0; i < kLanes; ++i) to[d * kTileKeys + i] = rows[c * kLanes + i][d];
    }
  }
}

// Values whose features do not fill whole vectors are copied, with zeros after them.
void load_values(const AttentionTask& task, const Tile& tile, int head, Workspace& w) {
  const ptrdiff_t offset = head * task.value_strides.head;
  const int whole = w.head_dim / kLanes * kLanes, rest = w.head_dim - whole;
  for (int i = 0; i < tile.count; ++i) {
    w.value_rows[i] = tile.values[i] + offset;
    if (rest == 0) continue;
    float* to = w.values + i * w.width;
    for (int d = 0; d < whole; d += kLanes) store(to + d, load(w.value_rows[i] + d));
    store(to + whole, load_first(w.value_rows[i] + whole, rest));
    w.value_rows[i] = to;
  }
}

// scores[row][key] = q[row] · key, summed over the features in order.
template <int rows, int columns>
GLM_INLINE void score_columns(const float* q, const float* const* key_columns, ptrdiff_t key_stride, int head_dim, float* scores,
                              Prefetch& prefetch) {
  const float* from[columns];
  unroll<columns>([&](auto c) { from[c.v] = key_columns[c.v]; });
  F acc[rows][columns];
  unroll<rows>([&](auto r) { unroll<columns>([&](auto c) { acc[r.v][c.v] = zero(); }); });
  ptrdiff_t at = 0;
  for (int begin = 0; begin < head_dim; begin += Prefetch::kSteps) {  // head_dim is a multiple of kSteps
    prefetch.advance(Prefetch::kSteps * rows * columns);
    for (int d = begin; d < begin + Prefetch::kSteps; ++d, at += key_stride) {
      F key[columns];
      unroll<columns>([&](auto c) { key[c.v] = load(from[c.v] + at); });
      unroll<rows>([&](auto r) {
        const F x = broadcast(q[r.v * head_dim + d]);
        unroll<columns>([&](auto c) { acc[r.v][c.v] = fma(key[c.v], x, acc[r.v][c.v]); });
      });
    }
  }
  unroll<rows>([&](auto r) { unroll<columns>([&](auto c) { store(scores + r.v * kTileKeys + c.v * kLanes, acc[r.v][c.v]); }); });
}

// result[row] = decay[row] · result[row] + Σ weights[row][key] · value[key], in the order of the keys. Null decay: no
// result yet.
template <int rows, int columns>
GLM_INLINE void add_columns(const float* weights, const float* const* values, int num_keys, int first_column, const float* decay,
                            float* result, int stride, Prefetch& prefetch) {
  F acc[rows][columns];
  unroll<rows>([&](auto r) {
    unroll<columns>([&](auto c) {
      acc[r.v][c.v] = decay ? mul(load(result + r.v * stride + c.v * kLanes), broadcast(decay[r.v])) : zero();
    });
  });
  for (int begin = 0; begin < num_keys; begin += Prefetch::kSteps) {
    prefetch.advance(Prefetch::kSteps * rows * columns);
    const int end = begin + Prefetch::kSteps < num_keys ? begin + Prefetch::kSteps : num_keys;
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

// Scores → weights exp(score - maximum), zero for keys beyond num_keys; each lane's running sum of them; and by how much
// a grown maximum shrinks what was summed before.
template <int rows>
GLM_INLINE void softmax_rows(float* scores, int num_keys, bool fresh, float* maximum_so_far, float* sums, int sums_stride,
                             float* decay) {
  alignas(64) float before[kLanes] = {}, after[kLanes] = {};
  unroll<rows>([&](auto r) {
    const float* s = scores + r.v * kTileKeys;
    const F lowest = broadcast(kLowest);
    F best = lowest;
    unroll<kTileColumns>([&](auto c) {
      constexpr int first = decltype(c)::v * kLanes;
      const F x = load(s + first);
      best = max(best, num_keys >= first + kLanes ? x : where_first(num_keys - first, x, lowest));
    });
    before[r.v] = fresh ? kLowest : maximum_so_far[r.v];
    const float highest = maximum(best);
    after[r.v] = highest > before[r.v] ? highest : before[r.v];
    maximum_so_far[r.v] = after[r.v];
  });
  store(decay, exp(sub(load(before), load(after))));
  unroll<rows>([&](auto r) {
    float* s = scores + r.v * kTileKeys;
    const F highest = broadcast(after[r.v]);
    F sum = fresh ? zero() : mul(load(sums + r.v * sums_stride), broadcast(decay[r.v]));
    unroll<kTileColumns>([&](auto c) {
      constexpr int first = decltype(c)::v * kLanes;
      const F e = exp(sub(load(s + first), highest));
      const F x = num_keys >= first + kLanes ? e : where_first(num_keys - first, e, zero());
      store(s + first, x);
      sum = add(sum, x);
    });
    store(sums + r.v * sums_stride, sum);
  });
}

template <int rows>
void attend_rows(Workspace& w, int row, int num_keys, bool fresh) {
  alignas(64) float scores[rows * kTileKeys], decay[kLanes];
  for (int c = 0; c < kTileColumns; c += kColumns) {
    score_columns<rows, kColumns>(w.q + row * w.head_dim, w.key_columns + c, w.key_stride, w.head_dim, scores + c * kLanes, w.prefetch);
  }
  const int stride = w.width + kLanes;
  float* result = w.result + row * ptrdiff_t(stride);
  softmax_rows<rows>(scores, num_keys, fresh, w.maximum + row, result + w.width, stride, decay);
  const float* factor = fresh ? nullptr : decay;
  int column = 0;
  for (; column + kColumns * kLanes <= w.width; column += kColumns * kLanes) {
    add_columns<rows, kColumns>(scores, w.value_rows, num_keys, column, factor, result + column, stride, w.prefetch);
  }
  for (; column < w.width; column += kLanes) {
    add_columns<rows, 1>(scores, w.value_rows, num_keys, column, factor, result + column, stride, w.prefetch);
  }
}

template <int most>
void attend_rows(int rows, Workspace& w, int row, int num_keys, bool fresh) {
  if constexpr (most > 1) {
    if (rows < most) return attend_rows<most - 1>(rows, w, row, num_keys, fresh);
  }
  attend_rows<most>(w, row, num_keys, fresh);
}

// Rows row … end - 1 see the first num_keys keys of the tile.
void attend_range(Workspace& w, int row, int end, int num_keys, bool fresh) {
  for (int pieces = (end - row + kRows - 1) / kRows; pieces > 0; --pieces) {
    const int rows = (end - row + pieces - 1) / pieces;
    attend_rows<kRows>(rows, w, row, num_keys, fresh);
    row += rows;
  }
}

// The first token that sees the key at this position.
int first_token(const AttentionTask& task, int key) { return key > task.first_position ? key - task.first_position : 0; }

void attend_tile(const AttentionTask& task, const Tile& tile, int head, bool fresh, Workspace& w) {
  load_keys(task, tile, head, w);
  load_values(task, tile, head, w);
  const int row = head * w.rows_per_head, end = row + w.rows_per_head;
  int token = first_token(task, tile.first);
  for (; token < task.num_tokens; ++token) {
    const int num_keys = task.first_position + token + 1 - tile.first;
    if (num_keys >= kTileKeys) break;
    attend_range(w, row + token * task.group, row + (token + 1) * task.group, num_keys, fresh);
  }
  attend_range(w, row + token * task.group, end, kTileKeys, fresh);
}

// folded ← both, as if their splits had been one.
GLM_INLINE void fold(float* folded, const float* partial, int width) {
  const float before = folded[width + 1], other = partial[width + 1];
  const float highest = other > before ? other : before;
  alignas(64) float factors[kLanes] = {before - highest, other - highest};
  store(factors, exp(load(factors)));
  const F decay = broadcast(factors[0]), growth = broadcast(factors[1]);
  for (int d = 0; d < width; d += kLanes) store(folded + d, fma(load(partial + d), growth, mul(load(folded + d), decay)));
  folded[width] = folded[width] * factors[0] + partial[width] * factors[1];
  folded[width + 1] = highest;
}

GLM_INLINE void write_result(const float* folded, int head_dim, float* out) {
  const F total = broadcast(folded[padded_head_dim(head_dim)]);
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(out + d, div(load(folded + d), total));
  if (d < head_dim) store_first(out + d, div(load(folded + d), total), head_dim - d);
}

// Turns the lanes' sums into the form that fold() takes, and folds unless others do it.
void end_split(const AttentionTask& task, int first_key, Workspace& w) {
  const ptrdiff_t size = partial_size(task.head_dim);
  for (int head = 0; head < task.num_heads; ++head) {
    for (int r = first_token(task, first_key) * task.group; r < w.rows_per_head; ++r) {
      const int row = head * w.rows_per_head + r;
      float* tail = w.result + row * size + w.width;
      tail[0] = sum(load(tail));
      tail[1] = w.maximum[row];
      if (w.result == w.own) fold(w.folded + row * size, w.own + row * size, w.width);
    }
  }
}

}  // namespace

void attend(const AttentionTask& task) {
  Workspace w;
  make_workspace(task, w);
  scale_queries(task, w);
  const int num_keys = task.first_position + task.num_tokens;
  const int64_t transposed = slots_are_neighbours(task) ? 0 : kTileColumns * (w.width / kLanes) * kTransposeWork;
  const int64_t tile_work = int64_t(w.rows_per_head) * (kTileColumns * w.head_dim + kTileKeys * (w.width / kLanes)) + transposed;
  Tile tiles[2];
  Tile *tile = &tiles[0], *next = &tiles[1];
  find_tile(task, task.first_split * kSplitKeys, *tile);
  for (int split = task.first_split; split < task.first_split + task.num_splits; ++split) {
    const int begin = split * kSplitKeys, end = begin + kSplitKeys < num_keys ? begin + kSplitKeys : num_keys;
    w.result = task.partials ? task.partials : split == 0 ? w.folded : w.own;
    for (int key = begin; key < end; key += kTileKeys) {
      const bool last_tile = key + kTileKeys >= num_keys;
      if (!last_tile) find_tile(task, key + kTileKeys, *next);
      for (int head = 0; head < task.num_heads; ++head) {
        const bool last_head = head + 1 == task.num_heads;
        const Tile& ahead = last_head ? *next : *tile;
        const int ahead_head = last_head ? 0 : head + 1;
        w.prefetch.start(ahead.keys, ahead.values, ahead_head * task.key_strides.head, ahead_head * task.value_strides.head,
                         last_head && last_tile ? 0 : ahead.count, task.head_dim, tile_work);
        attend_tile(task, *tile, head, key == begin, w);
      }
      Tile* const done = tile;
      tile = next;
      next = done;
    }
    end_split(task, begin, w);
  }
  if (task.partials) return;
  for (int row = 0; row < w.rows; ++row) {
    const int head = row / w.rows_per_head, token = row % w.rows_per_head / task.group, member = row % task.group;
    write_result(w.folded + row * ptrdiff_t(partial_size(task.head_dim)), task.head_dim,
                 task.out + token * task.out_stride + (head * task.group + member) * task.head_dim);
  }
}

void merge_splits(float* partials, ptrdiff_t stride, int num_splits, int head_dim, float* out) {
  for (int split = 1; split < num_splits; ++split) fold(partials, partials + split * stride, padded_head_dim(head_dim));
  write_result(partials, head_dim, out);
}

}  // namespace glmlocal::GLM_ISA
