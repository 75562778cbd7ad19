// One attention task: tiles of keys against rows of queries, a few rows at a time.

// CPUs with AVX-512 that also multiply pairs of bf16 are asked for at run time; clang takes this as a compiler flag only.
#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC target("avx512bf16")
#define GLM_HAS_PAIRS 1
#elif defined(__AVX512BF16__)
#define GLM_HAS_PAIRS 1
#endif

#include "attention.h"

#include <algorithm>
#include <type_traits>

#include "isa/attention_operands.h"
#include "memory.h"

namespace glmlocal::GLM_ISA {
namespace {

constexpr int kTileColumns = kTileKeys / kLanes;
constexpr int kRows = kGemmRows, kColumns = kGemmTiles;  // of a register tile
constexpr int kTransposeWork = 100;  // 16 × 16 floats take about as long as so many fmas
constexpr int kWidenWork = 2;        // and so 16 operands, made of elements of the cache
constexpr float kLowest = -3.402823466e38f;              // finite: minus infinity less itself would be NaN

// The next tile of keys and values, asked for while this one is worked on. Its lines are far apart, which no hardware
// prefetcher follows, and a CPU drops what it is asked for too fast: a few lines every few dozen fmas, never all at once.
class Prefetch {
 public:
  static constexpr int kSteps = 8;  // loop iterations of the kernels between two calls of advance()

  // Rows of row_bytes, offsets in bytes. `work` fmas (of 16 lanes) will be done meanwhile.
  void start(const void* const* keys, const void* const* values, ptrdiff_t key_offset, ptrdiff_t value_offset, int count,
             int row_bytes, int64_t work) {
    keys_ = keys, values_ = values, key_offset_ = key_offset, value_offset_ = value_offset;
    count_ = count, size_ = row_bytes, row_ = at_ = credit_ = 0;
    in_values_ = false;
    const int64_t pieces = 2 * count * ((row_bytes + kPiece - 1) / kPiece);
    rate_ = int(pieces * kOne * 33 / 32 / work);  // done just before the end
  }

  GLM_INLINE void advance(int work) {
    for (credit_ += rate_ * work; credit_ >= kOne; credit_ -= kOne) {
      if (row_ == count_) {
        if (in_values_) return;
        in_values_ = true, row_ = 0;
      }
      const char* p = in_values_ ? (const char*)values_[row_] + value_offset_ : (const char*)keys_[row_] + key_offset_;
      unroll<kPiece / kLine>([&](auto line) { __builtin_prefetch(p + at_ + line.v * kLine, 0, 2); });
      if ((at_ += kPiece) >= size_) at_ = 0, ++row_;
    }
  }

 private:
  static constexpr int kLine = 64, kPiece = 2 * kLine, kOne = 1 << 16;

  const void* const* keys_;
  const void* const* values_;
  ptrdiff_t key_offset_, value_offset_;
  int count_, size_, row_, at_, rate_, credit_;
  bool in_values_;
};

// The keys and values of one tile, for the first kv head. Where the slots of keys are neighbours, keys[i] is not the
// address of one key but of the i-th part of what belongs to the block, good for prefetching only.
struct Tile {
  int first, count;
  const void* keys[kTileKeys];
  const void* values[kTileKeys];
};

// Everything a task works on. One row is one query head of one token; rows of a kv head are next to each other.
struct Workspace {
  int rows, rows_per_head, head_dim, width;  // width: head_dim rounded up to whole vectors
  float* q;                                  // [rows][head_dim] operands, times the scale
  float* key_rows;                           // [kTileKeys][width], one key's operands each
  float* keys;                               // [head_dim][kTileKeys] operands, where those of the cache cannot be read
  float* values;                             // [kTileKeys][width] operands, the same
  float* q_scales;                           // [rows], of integers
  float* maximum;                            // [rows], of the current split
  float* own;                                // [rows][partial_size], for a split that is folded at once
  float* folded;                             // [rows][partial_size], of the splits so far
  float* result;  // of the current split; while it runs, the last 16 floats of a row are the lanes' sums of weights
  const float* key_columns[kTileColumns];  // operand d of 16 keys is at key_columns[…] + d * key_stride
  ptrdiff_t key_stride;
  const float* value_rows[kTileKeys];  // of each key or pair of keys
  float key_scales[kTileKeys];         // of int8 caches, of integers, or of both
  float value_scales[kTileKeys];
  Prefetch prefetch;
};

void make_workspace(const AttentionTask& task, Workspace& w) {
  w.rows_per_head = task.num_tokens * task.group;
  w.rows = w.rows_per_head * task.num_heads;
  w.head_dim = task.head_dim;
  w.width = padded_head_dim(task.head_dim);
  const size_t rows = size_t(w.rows), width = size_t(w.width), partials = rows * size_t(partial_size(task.head_dim));
  float* next = scratch(Scratch::attention, 3 * kTileKeys * width + 2 * partials + rows * width + 2 * rows);
  auto take = [&](size_t size) {
    float* p = next;
    next += size;
    return p;
  };
  w.key_rows = take(kTileKeys * width);
  w.keys = take(kTileKeys * width);
  w.values = take(kTileKeys * width);
  w.own = take(partials);
  w.folded = take(partials);
  w.q = take(rows * width);
  w.q_scales = take(rows);
  w.maximum = take(rows);
}

// Rows are head_dim / step operands apart; what a row has beyond them is overwritten by the next one.
template <class Math>
void scale_queries(const AttentionTask& task, const Workspace& w) {
  float *to = w.q, *q_scale = w.q_scales;
  for (int head = 0; head < task.num_heads; ++head) {
    for (int token = 0; token < task.num_tokens; ++token) {
      const float* from = task.q + token * task.q_stride + head * task.group * task.head_dim;
      for (int member = 0; member < task.group; ++member, from += task.head_dim, to += task.head_dim / Math::step) {
        F scale = broadcast(task.scale);
        if constexpr (Math::integers) {
          const float largest = largest_of_row(from, task.head_dim), most = float(Math::most_of_query(task.head_dim));
          scale = inverse_of(broadcast(largest), most);
          *q_scale++ = largest / most * task.scale;
        }
        for (int d = 0; d < task.head_dim; d += kLanes) {
          const int left = task.head_dim - d;
          Math::put(to, d, mul(left < kLanes ? load_first(from + d, left) : load(from + d), scale));
        }
      }
    }
  }
}

bool slots_are_neighbours(const AttentionTask& task) {
  return task.key_strides.slot == 1 && task.block_size % kLanes == 0;
}

template <class Element>
void find_tile(const AttentionTask& task, int first, Tile& tile) {
  const int left = task.first_position + task.num_tokens - first;
  tile.first = first;
  tile.count = left < kTileKeys ? left : kTileKeys;
  const ptrdiff_t key_step = slots_are_neighbours(task) ? task.head_dim : task.key_strides.slot;
  int block = first / task.block_size, slot = first % task.block_size;
  for (int i = 0; i < tile.count; ++i) {
    tile.keys[i] = (const Element*)task.keys + task.block_table[block] * task.key_strides.block + slot * key_step;
    tile.values[i] = (const Element*)task.values + task.block_table[block] * task.value_strides.block + slot * task.value_strides.slot;
    if (++slot == task.block_size) slot = 0, ++block;
  }
}

// One row of head_dim elements → operands, zeros after them. `scale` takes the scale of integers, times what is there.
template <class Element, class Math>
GLM_INLINE const float* operand_row(const Element* from, int head_dim, float* to, float& scale) {
  [[maybe_unused]] F inverse;
  if constexpr (Math::integers) {
    const float largest = largest_of_row(from, head_dim);
    inverse = inverse_of(broadcast(largest), Math::kMost);
    scale *= largest * (1.0f / Math::kMost);
  }
  const auto scaled = [&](F x) {
    if constexpr (Math::integers) return mul(x, inverse);
    else return x;
  };
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) Math::put(to, d, scaled(widen(from + d)));
  if (d < head_dim) Math::put(to, d, scaled(widen_first(from + d, head_dim - d)));
  return to;
}

// Does the cache hold operands as the inner loops take them?
template <class Element, class Math>
constexpr bool holds_operands = std::is_same_v<Element, float> && Math::step == 1;

// Operands of `vectors` · 16 keys, feature by feature.
template <class Element, class Math, int vectors>
GLM_INLINE void put_columns(const Element* from, ptrdiff_t feature, int size, float* to, Prefetch& prefetch) {
  constexpr int steps = Prefetch::kSteps / 2;  // head_dim is a multiple of kSteps
  for (int begin = 0; begin < size; begin += steps) {
    prefetch.advance(steps * vectors * kWidenWork);
    unroll<steps>([&](auto) {
      Math::template put_operands<vectors>(to, from, from + (Math::step - 1) * feature);
      from += Math::step * feature;
      to += kTileKeys;
    });
  }
}

#if defined(__AVX512VNNI__)
// The same of 16 keys as integers. `scales` take theirs, times what is there.
template <class Element>
GLM_INLINE void put_integer_columns(const Element* from, ptrdiff_t feature, int head_dim, float* to, float* scales, Prefetch& prefetch) {
  constexpr int steps = Prefetch::kSteps;  // head_dim is a multiple of kSteps
  U magnitude = splat(0);
  for (int d = 0; d < head_dim; d += steps) {
    unroll<steps>([&](auto i) { magnitude = larger_magnitude(magnitude, widen(from + (d + i.v) * feature)); });
  }
  const F largest = as_float(magnitude), inverse = inverse_of(largest, Integers::kMost);
  store(scales, mul(load(scales), mul(largest, broadcast(1.0f / Integers::kMost))));
  for (int d = 0; d < head_dim; d += steps) {
    prefetch.advance(2 * steps * kWidenWork);
    unroll<steps / 2>([&](auto) {
      store(to, Integers::operands(mul(widen(from), inverse), mul(widen(from + feature), inverse)));
      from += 2 * feature;
      to += kTileKeys;
    });
  }
}
#endif

// Points key_columns at the keys of one head. Lanes of keys that do not exist hold anything. Not inlined, as the next one,
// because their loops need all registers.
template <class Element, class Math>
__attribute__((noinline)) void load_keys(const AttentionTask& task, const Tile& tile, int head, Workspace& w) {
  const ptrdiff_t offset = head * task.key_strides.head, feature = task.key_strides.feature;
  const int size = w.head_dim / Math::step;
  w.key_stride = kTileKeys;
  for (int c = 0; c < kTileColumns; ++c) w.key_columns[c] = w.keys + c * kLanes;
  if (slots_are_neighbours(task)) {
    const int columns = task.block_size % (2 * kLanes) == 0 ? 2 : 1;
    for (int c = 0; c < kTileColumns && c * kLanes < tile.count; c += columns) {
      const int position = tile.first + c * kLanes;
      const Element* from = (const Element*)task.keys + offset +
                            task.block_table[position / task.block_size] * task.key_strides.block + position % task.block_size;
      if constexpr (holds_operands<Element, Math>) {
        for (int i = 0; i < columns; ++i) w.key_columns[c + i] = from + i * kLanes;
        for (int i = c + columns; i < kTileColumns; ++i) w.key_columns[i] = from;
        w.key_stride = feature;
      } else if constexpr (Math::integers) {
        for (int i = 0; i < columns; ++i) {
          put_integer_columns(from + i * kLanes, feature, w.head_dim, w.keys + (c + i) * kLanes, w.key_scales + (c + i) * kLanes, w.prefetch);
        }
      } else if (columns == 2) {
        put_columns<Element, Math, 2>(from, feature, size, w.keys + c * kLanes, w.prefetch);
      } else {
        put_columns<Element, Math, 1>(from, feature, size, w.keys + c * kLanes, w.prefetch);
      }
    }
    return;
  }
  const float* rows[kTileKeys];
  for (int i = 0; i < kTileKeys; ++i) {
    const Element* from = (const Element*)tile.keys[i < tile.count ? i : 0] + offset;
    if constexpr (holds_operands<Element, Math>) {
      rows[i] = from;
    } else {
      w.prefetch.advance(size / kLanes * kWidenWork);
      rows[i] = operand_row<Element, Math>(from, w.head_dim, w.key_rows + i * w.width, w.key_scales[i]);
    }
  }
  for (int c = 0; c < kTileColumns && c * kLanes < tile.count; ++c) {
    float* to = w.keys + c * kLanes;
    int d = 0;
    for (; d + kLanes <= size; d += kLanes) {
      w.prefetch.advance(kTransposeWork);
      transpose(rows + c * kLanes, d, to + d * kTileKeys, kTileKeys);
    }
    for (; d < size; ++d) {
      for (int i = 0; i < kLanes; ++i) to[d * kTileKeys + i] = rows[c * kLanes + i][d];
    }
  }
}

#if defined(__AVX512VNNI__)
// Pairs of one integer each of two values. `scales` take theirs, times what is there.
template <class Element>
GLM_INLINE void put_integer_values(const Element* const* values, int head_dim, float* to, float* const* scales) {
  F inverse[2];
  unroll<2>([&](auto i) {
    const float largest = largest_of_row(values[i.v], head_dim);
    inverse[i.v] = inverse_of(broadcast(largest), Integers::kMost);
    *scales[i.v] *= largest * (1.0f / Integers::kMost);
  });
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    store(to + d, Integers::operands(mul(widen(values[0] + d), inverse[0]), mul(widen(values[1] + d), inverse[1])));
  }
  if (d == head_dim) return;
  const int rest = head_dim - d;
  store(to + d, Integers::operands(mul(widen_first(values[0] + d, rest), inverse[0]), mul(widen_first(values[1] + d, rest), inverse[1])));
}
#endif

// Operands of one value or of two, zeros after them.
template <class Element, class Math>
GLM_INLINE void put_values(const Element* first, const Element* second, int head_dim, float* to) {
  const int whole = head_dim / kLanes * kLanes;
  int d = 0;
  for (; d + 2 * kLanes <= whole; d += 2 * kLanes) Math::template put_operands<2>(to + d, first + d, second + d);
  if (d < whole) Math::template put_operands<1>(to + d, first + d, second + d);
  if (whole == head_dim) return;
  Element ends[2][kLanes] = {};
  for (d = whole; d < head_dim; ++d) {
    ends[0][d - whole] = first[d];
    ends[1][d - whole] = second[d];
  }
  Math::template put_operands<1>(to + whole, ends[0], ends[1]);
}

// Points value_rows at the values of one head, or at copies where they are no operands or their features do not fill whole
// vectors.
template <class Element, class Math>
__attribute__((noinline)) void load_values(const AttentionTask& task, const Tile& tile, int head, Workspace& w) {
  const ptrdiff_t offset = head * task.value_strides.head;
  for (int i = 0; i < tile.count; i += Math::step) {
    const Element* first = (const Element*)tile.values[i] + offset;
    const Element* second = (const Element*)tile.values[i + 1 < tile.count ? i + 1 : i] + offset;  // add_columns masks it
    float* to = w.values + i / Math::step * w.width;
    w.value_rows[i / Math::step] = to;
    if constexpr (holds_operands<Element, Math>) {
      if (w.head_dim % kLanes == 0) {
        w.value_rows[i] = first;
        continue;
      }
    }
    w.prefetch.advance(w.width / kLanes * kWidenWork);
    if constexpr (Math::integers) {
      float nobody = 1;
      const Element* const pair[] = {first, second};
      float* const scales[] = {w.value_scales + i, i + 1 < tile.count ? w.value_scales + i + 1 : &nobody};
      put_integer_values(pair, w.head_dim, to, scales);
    } else {
      put_values<Element, Math>(first, second, w.head_dim, to);
    }
  }
}

void load_scales(const AttentionTask& task, const Tile& tile, int head, Workspace& w) {
  const ptrdiff_t offset = ptrdiff_t(head) * task.block_size;
  int block = tile.first / task.block_size, slot = tile.first % task.block_size;
  for (int i = 0; i < kTileKeys; ++i) {
    const ptrdiff_t at = i < tile.count ? task.block_table[block] * task.scale_block_stride + offset + slot : 0;
    w.key_scales[i] = i < tile.count ? task.key_scales[at] : 0;
    w.value_scales[i] = i < tile.count ? task.value_scales[at] : 0;
    if (++slot == task.block_size) slot = 0, ++block;
  }
}

template <class Math>
GLM_INLINE F sums_as_floats(F sums) {
  if constexpr (Math::integers) return to_float(as_words(sums));
  else return sums;
}

// scores[row][key] = q[row] · key, summed over the features in order.
template <class Math, int rows, int columns>
GLM_INLINE void score_columns(const float* q, const float* const* key_columns, ptrdiff_t key_stride, int head_dim, float* scores,
                              Prefetch& prefetch) {
  constexpr int steps = Prefetch::kSteps / Math::step;  // head_dim is a multiple of kSteps
  const int size = head_dim / Math::step;
  const float* from[columns];
  unroll<columns>([&](auto c) { from[c.v] = key_columns[c.v]; });
  F acc[rows][columns];
  unroll<rows>([&](auto r) { unroll<columns>([&](auto c) { acc[r.v][c.v] = zero(); }); });
  ptrdiff_t at = 0;
  for (int begin = 0; begin < size; begin += steps) {
    prefetch.advance(steps * rows * columns);
    for (int d = begin; d < begin + steps; ++d, at += key_stride) {
      F key[columns];
      unroll<columns>([&](auto c) { key[c.v] = load(from[c.v] + at); });
      unroll<rows>([&](auto r) {
        const F x = broadcast(q[r.v * size + d]);
        unroll<columns>([&](auto c) { acc[r.v][c.v] = Math::multiply_add(key[c.v], x, acc[r.v][c.v]); });
      });
    }
  }
  unroll<rows>([&](auto r) {
    unroll<columns>([&](auto c) { store(scores + r.v * kTileKeys + c.v * kLanes, sums_as_floats<Math>(acc[r.v][c.v])); });
  });
}

// result[row] = decay[row] · result[row] + Σ weights[row][key] · value[key], in the order of the keys; integers are summed
// first and multiplied with unit[row]. Null decay: no result yet.
template <class Math, int rows, int columns>
GLM_INLINE void add_columns(const float* weights, const float* unit, const float* const* values, int num_keys, int first_column,
                            const float* decay, float* result, int stride, Prefetch& prefetch) {
  F acc[rows][columns];
  const auto shrunk = [&](auto r, auto c) __attribute__((always_inline)) {
    return decay ? mul(load(result + r.v * stride + c.v * kLanes), broadcast(decay[r.v])) : zero();
  };
  unroll<rows>([&](auto r) {
    unroll<columns>([&](auto c) {
      if constexpr (Math::integers) acc[r.v][c.v] = zero();
      else acc[r.v][c.v] = shrunk(r, c);
    });
  });
  const auto add_row = [&](int i, auto&& masked) __attribute__((always_inline)) {
    const float* from = values[i] + first_column;
    F value[columns];
    unroll<columns>([&](auto c) { value[c.v] = masked(load(from + c.v * kLanes)); });
    unroll<rows>([&](auto r) {
      const F x = broadcast(weights[r.v * kTileKeys + i]);
      unroll<columns>([&](auto c) { acc[r.v][c.v] = Math::multiply_add(value[c.v], x, acc[r.v][c.v]); });
    });
  };
  const int size = (num_keys + (Math::integers ? 1 : 0)) / Math::step;  // an integer weight of a key that is not seen is 0
  for (int begin = 0; begin < size; begin += Prefetch::kSteps) {
    prefetch.advance(Prefetch::kSteps * rows * columns);
    const int end = begin + Prefetch::kSteps < size ? begin + Prefetch::kSteps : size;
    for (int i = begin; i < end; ++i) add_row(i, [](F x) { return x; });
  }
  if constexpr (Math::step == 2 && !Math::integers) {  // the second key of the last pair is one that is not seen, and may be NaN
    if (num_keys % 2 == 1) add_row(size, [](F x) { return as_float(bit_and(as_words(x), splat(0xffff))); });
  }
  unroll<rows>([&](auto r) {
    unroll<columns>([&](auto c) {
      F sum = acc[r.v][c.v];
      if constexpr (Math::integers) sum = fma(sums_as_floats<Math>(sum), broadcast(unit[r.v]), shrunk(r, c));
      store(result + r.v * stride + c.v * kLanes, sum);
    });
  });
}

// Scores → a row of operands, the weights exp(score - maximum), zero for keys beyond num_keys; each lane's running sum of
// them; and by how much a grown maximum shrinks what was summed before. The keys' scales belong to the scores, as the rows'
// own do, the values' to the operands. unit: what one is worth, of integers.
template <class Math, bool scaled, int rows>
GLM_INLINE void softmax_rows(float* scores, const float* q_scales, const float* key_scales, const float* value_scales, int num_keys,
                             bool fresh, float* maximum_so_far, float* sums, int sums_stride, float* decay, float* unit) {
  alignas(64) float before[kLanes] = {}, after[kLanes] = {};
  unroll<rows>([&](auto r) {
    float* s = scores + r.v * kTileKeys;
    const F lowest = broadcast(kLowest);
    F best = lowest;
    unroll<kTileColumns>([&](auto c) {
      constexpr int first = decltype(c)::v * kLanes;
      F x = load(s + first);
      if constexpr (Math::integers) x = mul(x, broadcast(q_scales[r.v]));
      if constexpr (scaled) store(s + first, x = mul(x, load(key_scales + first)));
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
    F weights[kTileColumns];
    unroll<kTileColumns>([&](auto c) {
      constexpr int first = decltype(c)::v * kLanes;
      const F e = exp(sub(load(s + first), highest));
      const auto visible = [&](F x) { return num_keys >= first + kLanes ? x : where_first(num_keys - first, x, zero()); };
      sum = add(sum, visible(e));
      weights[c.v] = visible(scaled ? mul(e, load(value_scales + first)) : e);
    });
    store(sums + r.v * sums_stride, sum);
    if constexpr (Math::integers) {
      U magnitude = splat(0);
      unroll<kTileColumns>([&](auto c) { magnitude = larger_magnitude(magnitude, weights[c.v]); });
      const float largest = largest_lane(magnitude);
      unit[r.v] = largest / Math::kMostWeight;
      const F inverse = inverse_of(broadcast(largest), Math::kMostWeight);
      unroll<kTileColumns>([&](auto c) { weights[c.v] = mul(weights[c.v], inverse); });
    }
    unroll<kTileColumns>([&](auto c) { Math::put(s, c.v * kLanes, weights[c.v]); });
  });
}

template <class Math, bool scaled, int rows>
void attend_rows(Workspace& w, int row, int num_keys, bool fresh) {
  alignas(64) float scores[rows * kTileKeys], decay[kLanes], unit[kLanes];
  for (int c = 0; c < kTileColumns; c += kColumns) {
    score_columns<Math, rows, kColumns>(w.q + row * (w.head_dim / Math::step), w.key_columns + c, w.key_stride, w.head_dim, scores + c * kLanes, w.prefetch);
  }
  const int stride = w.width + kLanes;
  float* result = w.result + row * ptrdiff_t(stride);
  softmax_rows<Math, scaled, rows>(scores, w.q_scales + row, w.key_scales, w.value_scales, num_keys, fresh, w.maximum + row,
                                   result + w.width, stride, decay, unit);
  const float* factor = fresh ? nullptr : decay;
  int column = 0;
  for (; column + kColumns * kLanes <= w.width; column += kColumns * kLanes) {
    add_columns<Math, rows, kColumns>(scores, unit, w.value_rows, num_keys, column, factor, result + column, stride, w.prefetch);
  }
  for (; column < w.width; column += kLanes) {
    add_columns<Math, rows, 1>(scores, unit, w.value_rows, num_keys, column, factor, result + column, stride, w.prefetch);
  }
}

template <class Math, bool scaled, int most>
void attend_rows(int rows, Workspace& w, int row, int num_keys, bool fresh) {
  if constexpr (most > 1) {
    if (rows < most) return attend_rows<Math, scaled, most - 1>(rows, w, row, num_keys, fresh);
  }
  attend_rows<Math, scaled, most>(w, row, num_keys, fresh);
}

// Rows row … end - 1 see the first num_keys keys of the tile.
template <class Math, bool scaled>
void attend_range(Workspace& w, int row, int end, int num_keys, bool fresh) {
  for (int pieces = (end - row + kRows - 1) / kRows; pieces > 0; --pieces) {
    const int rows = (end - row + pieces - 1) / pieces;
    attend_rows<Math, scaled, kRows>(rows, w, row, num_keys, fresh);
    row += rows;
  }
}

// The first token that sees the key at this position.
int first_token(const AttentionTask& task, int key) { return key > task.first_position ? key - task.first_position : 0; }

template <class Element, class Math>
void attend_tile(const AttentionTask& task, const Tile& tile, int head, bool fresh, Workspace& w) {
  constexpr bool scaled = std::is_same_v<Element, int8_t> || Math::integers;
  if constexpr (std::is_same_v<Element, int8_t>) {
    load_scales(task, tile, head, w);
  } else if constexpr (scaled) {
    std::fill_n(w.key_scales, kTileKeys, 1.0f);
    std::fill_n(w.value_scales, kTileKeys, 1.0f);
  }
  load_keys<Element, Math>(task, tile, head, w);
  load_values<Element, Math>(task, tile, head, w);
  const int row = head * w.rows_per_head, end = row + w.rows_per_head;
  int token = first_token(task, tile.first);
  for (; token < task.num_tokens; ++token) {
    const int num_keys = task.first_position + token + 1 - tile.first;
    if (num_keys >= kTileKeys) break;
    attend_range<Math, scaled>(w, row + token * task.group, row + (token + 1) * task.group, num_keys, fresh);
  }
  attend_range<Math, scaled>(w, row + token * task.group, end, kTileKeys, fresh);
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

template <class Element, class Math>
void attend_with(const AttentionTask& task) {
  Workspace w;
  make_workspace(task, w);
  scale_queries<Math>(task, w);
  const int num_keys = task.first_position + task.num_tokens;
  const int64_t transposed = slots_are_neighbours(task) ? 0 : kTileColumns * (w.width / kLanes) * kTransposeWork;
  const int64_t multiplied = kTileColumns * w.head_dim + kTileKeys * (w.width / kLanes);
  const int64_t widened = holds_operands<Element, Math> ? 0 : multiplied * kWidenWork;
  const int64_t tile_work = (int64_t(w.rows_per_head) * multiplied + transposed + widened) / Math::step;
  const ptrdiff_t itemsize = sizeof(Element);
  Tile tiles[2];
  Tile *tile = &tiles[0], *next = &tiles[1];
  find_tile<Element>(task, task.first_split * kSplitKeys, *tile);
  for (int split = task.first_split; split < task.first_split + task.num_splits; ++split) {
    const int begin = split * kSplitKeys, end = begin + kSplitKeys < num_keys ? begin + kSplitKeys : num_keys;
    w.result = task.partials ? task.partials : split == 0 ? w.folded : w.own;
    for (int key = begin; key < end; key += kTileKeys) {
      const bool last_tile = key + kTileKeys >= num_keys;
      if (!last_tile) find_tile<Element>(task, key + kTileKeys, *next);
      for (int head = 0; head < task.num_heads; ++head) {
        const bool last_head = head + 1 == task.num_heads;
        const Tile& ahead = last_head ? *next : *tile;
        const int ahead_head = last_head ? 0 : head + 1;
        w.prefetch.start(ahead.keys, ahead.values, ahead_head * task.key_strides.head * itemsize,
                         ahead_head * task.value_strides.head * itemsize, last_head && last_tile ? 0 : ahead.count,
                         task.head_dim * int(itemsize), tile_work);
        attend_tile<Element, Math>(task, *tile, head, key == begin, w);
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

}  // namespace

AttentionOperands attention_operands() {
#if GLM_HAS_PAIRS
  if (cpu_has_pairs()) return AttentionOperands::bf16;
#endif
#if defined(__AVX512VNNI__)
  return AttentionOperands::int16;
#else
  return AttentionOperands::fp32;
#endif
}

void attend(const AttentionTask& task) {
  with_element(task.type, [&](auto element) {
    using Element = decltype(element);
    if constexpr (!std::is_same_v<Element, float>) {
#if GLM_HAS_PAIRS
      if (cpu_has_pairs()) return attend_with<Element, Pairs>(task);
#endif
#if defined(__AVX512VNNI__)
      return attend_with<Element, Integers>(task);
#endif
    }
    attend_with<Element, Floats>(task);
  });
}

void merge_splits(float* partials, ptrdiff_t stride, int num_splits, int head_dim, float* out) {
  for (int split = 1; split < num_splits; ++split) fold(partials, partials + split * stride, padded_head_dim(head_dim));
  write_result(partials, head_dim, out);
}

}  // namespace glmlocal::GLM_ISA
