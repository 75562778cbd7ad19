#include "norm_rope.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "memory.h"
#include "thread_pool.h"

namespace glmlocal {
namespace {

constexpr int kTaskTokens = 32;
constexpr double kNsPerFloat = 0.5;  // of one thread, out of cache

// Calls body(begin, end) for pieces of 0 … count - 1 on the threads; `floats` are touched by each.
template <class Body>
void for_pieces(int64_t count, int64_t piece, int64_t floats, Body&& body) {
  parallel_for(int((count + piece - 1) / piece), double(count) * floats * kNsPerFloat, [&](int task) {
    const int64_t begin = task * piece;
    body(begin, std::min(count, begin + piece));
  });
}

int64_t rows_per_task(int64_t size) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, size)); }

void check_range(const char* name, const int64_t* values, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] >= 0 && values[i] < limit) continue;
    throw std::out_of_range(std::string(name) + " wanted values from 0 to " + std::to_string(limit - 1) + ", found " +
                            std::to_string(values[i]) + " for token " + std::to_string(i));
  }
}

struct Slot {
  ptrdiff_t block, offset;
};
Slot slot_of(const KeyValueCache& cache, int64_t slot) { return {slot / cache.block_size, slot % cache.block_size}; }

void write_key(const KeyValueCache& cache, Slot slot, int64_t head, const float* from) {
  const CacheStrides& strides = cache.key_strides;
  float* to = cache.keys + slot.block * strides.block + slot.offset * strides.slot + head * strides.head;
  for (int64_t d = 0; d < cache.head_dim; ++d) to[d * strides.feature] = from[d];
}

void write_value(const KeyValueCache& cache, Slot slot, int64_t head, const float* from) {
  const CacheStrides& strides = cache.value_strides;
  float* to = cache.values + slot.block * strides.block + slot.offset * strides.slot + head * strides.head;
  std::memcpy(to, from, size_t(cache.head_dim) * sizeof(float));
}

}  // namespace

void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t size, float* out) {
  const KernelTable& kernel = kernels();
  for_pieces(rows, rows_per_task(size), size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) kernel.rms_norm(x + row * size, weight, eps, int(size), out + row * size);
  });
}

void add_rms_norm(const float* x, float* residual, const float* weight, float eps, int64_t rows, int64_t size, float* out) {
  const KernelTable& kernel = kernels();
  for_pieces(rows, rows_per_task(size), 2 * size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      kernel.add_rows(residual + row * size, x + row * size, int(size));
      kernel.rms_norm(residual + row * size, weight, eps, int(size), out + row * size);
    }
  });
}

void check_positions(const Rotation& rotation, int64_t tokens) {
  check_range("positions", rotation.positions, tokens, rotation.max_positions);
}

void check_slots(const KeyValueCache& cache, const int64_t* slots, int64_t tokens) {
  check_range("slot_mapping", slots, tokens, cache.num_blocks * cache.block_size);
}

void rope(const Heads<float>& x, const Rotation& rotation) {
  const KernelTable& kernel = kernels();
  for_pieces(x.tokens, kTaskTokens, x.heads * rotation.rotary_dim, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      kernel.rope(x.data + t * x.stride, rotation.cos_sin + rotation.positions[t] * rotation.rotary_dim, int(rotation.rotary_dim / 2),
                  int(x.heads), int(x.head_dim));
    }
  });
}

void kv_write(const Heads<const float>& k, const Heads<const float>& v, const KeyValueCache& cache, const int64_t* slots) {
  for_pieces(k.tokens, kTaskTokens, 2 * k.heads * k.head_dim, [&](int64_t begin, int64_t end) {
    // Heads outside: the keys of one head and block stay in L1 while neighbouring slots are written.
    for (int64_t head = 0; head < k.heads; ++head) {
      for (int64_t t = begin; t < end; ++t) {
        const Slot slot = slot_of(cache, slots[t]);
        write_key(cache, slot, head, k.data + t * k.stride + head * k.head_dim);
        write_value(cache, slot, head, v.data + t * v.stride + head * v.head_dim);
      }
    }
  });
}

void qk_norm_rope_kv_write(const Heads<float>& q, const Heads<const float>& k, const Heads<const float>& v, const HeadNorm& norm,
                           const Rotation& rotation, const KeyValueCache& cache, const int64_t* slots) {
  const KernelTable& kernel = kernels();
  const int head_dim = int(q.head_dim), half = int(rotation.rotary_dim / 2);
  auto angles = [&](int64_t token) { return rotation.cos_sin + rotation.positions[token] * rotation.rotary_dim; };
  for_pieces(q.tokens, kTaskTokens, (q.heads + 2 * k.heads) * head_dim, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* token = q.data + t * q.stride;
      if (norm.q_weight) {
        for (int64_t head = 0; head < q.heads; ++head) {
          float* x = token + head * head_dim;
          kernel.rms_norm(x, norm.q_weight, norm.eps, head_dim, x);
        }
      }
      kernel.rope(token, angles(t), half, int(q.heads), head_dim);
    }
    float* key = scratch(Scratch::work, size_t(head_dim));
    for (int64_t head = 0; head < k.heads; ++head) {
      for (int64_t t = begin; t < end; ++t) {
        const float* from = k.data + t * k.stride + head * head_dim;
        if (norm.k_weight) kernel.rms_norm(from, norm.k_weight, norm.eps, head_dim, key);
        else std::memcpy(key, from, size_t(head_dim) * sizeof(float));
        kernel.rope(key, angles(t), half, 1, head_dim);
        const Slot slot = slot_of(cache, slots[t]);
        write_key(cache, slot, head, key);
        write_value(cache, slot, head, v.data + t * v.stride + head * head_dim);
      }
    }
  });
}

}  // namespace glmlocal
