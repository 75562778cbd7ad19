// A layer's three calls and the thread pool, over buffers of exactly their size (see sanitize.cpp).
#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "blocks.h"
#include "ops.h"
#include "thread_pool.h"

namespace glmlocal {
namespace {

constexpr int kThreads = 3;

float small() { return float(rand() % 2001 - 1000) / 1000; }

std::vector<float> floats(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& x : values) x = small();
  return values;
}

// A matrix and its bytes.
struct Matrix {
  std::unique_ptr<std::byte[], void (*)(void*)> data{nullptr, std::free};
  PackedMatrix packed{};

  Matrix(int64_t out, int64_t in, bool integers) {
    const MatrixFormat format = integers ? MatrixFormat{Codes::u4, FloatType::f16, 32, 32} : MatrixFormat{Codes::bf16};
    const MatrixLayout layout = matrix_layout(out, in, format);
    data.reset(static_cast<std::byte*>(aligned_alloc(64, size_t(layout.num_bytes))));
    for (int64_t i = 0; i < layout.num_bytes; ++i) data[size_t(i)] = std::byte(i * 37 & 0x3b);  // no float that is not finite
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = float(i - 8);
    packed = make_packed_matrix(layout, format, data.get(), 8, values);
    if (integers && !use_int8_activations(packed)) std::abort();
  }
};

struct Shape {
  int64_t hidden, heads, kv_heads, head_dim, experts, top_k, intermediate;
};

void run_layer(const Shape& s, CacheType type, bool integers, const std::vector<int>& lengths, const std::vector<int>& computed) {
  const int64_t block_size = 16, max_blocks = 40, requests = int64_t(lengths.size()), num_blocks = max_blocks * requests;
  std::vector<int64_t> positions, slots;
  std::vector<int32_t> tables, starts{0}, seq_lens;
  for (int64_t r = 0; r < requests; ++r) {
    for (int64_t b = 0; b < max_blocks; ++b) tables.push_back(int32_t(b * requests + r));
    for (int t = 0; t < lengths[size_t(r)]; ++t) {
      const int64_t position = computed[size_t(r)] + t;
      positions.push_back(position);
      slots.push_back((position / block_size * requests + r) * block_size + position % block_size);
    }
    starts.push_back(int32_t(positions.size()));
    seq_lens.push_back(computed[size_t(r)] + lengths[size_t(r)]);
  }
  const int64_t tokens = int64_t(positions.size()), kv_size = s.kv_heads * s.head_dim, elements = num_blocks * block_size * kv_size;
  const auto keys = std::make_unique<std::byte[]>(size_t(elements) * cache_itemsize(type));
  const auto cached = std::make_unique<std::byte[]>(size_t(elements) * cache_itemsize(type));
  std::vector<float> key_scales = floats(num_blocks * s.kv_heads * block_size), value_scales = key_scales;
  const bool scaled = type == CacheType::i8;
  const KeyValueCache cache{type, keys.get(), cached.get(),
                            {kv_size * block_size, 1, s.head_dim * block_size, block_size}, {kv_size * block_size, kv_size, s.head_dim, 1},
                            scaled ? key_scales.data() : nullptr, scaled ? value_scales.data() : nullptr,
                            num_blocks, block_size, s.kv_heads, s.head_dim};

  const Matrix q(s.heads * s.head_dim, s.hidden, integers), k(kv_size, s.hidden, integers), v(kv_size, s.hidden, integers);
  const Matrix o(s.hidden, s.heads * s.head_dim, integers), gate(s.experts, s.hidden, false);
  const Matrix up(s.intermediate, s.hidden, integers), down(s.hidden, s.intermediate, integers);
  const std::vector<float> norm = floats(s.hidden), head_norm = floats(s.head_dim), bias = floats(s.heads * s.head_dim), correction = floats(s.experts);
  const int64_t max_positions = block_size * max_blocks, rotary_dim = s.head_dim / 2;
  const std::vector<float> cos_sin = floats(max_positions * rotary_dim);
  AttentionBlock block{s.hidden, s.heads, s.kv_heads, s.head_dim, norm.data(), norm.data(), 1e-5f,
                       {&q.packed, &k.packed, &v.packed}, {bias.data(), nullptr, nullptr}, &o.packed,
                       head_norm.data(), head_norm.data(), cos_sin.data(), max_positions, rotary_dim};
  block.gate = &gate.packed;
  block.correction_bias = correction.data();
  block.routing = {s.experts, s.top_k, 1, 1, true, 1.5f};
  const StepIndex step{tokens, positions.data(), slots.data(), tables.data(), max_blocks, starts.data(), seq_lens.data(), requests};

  const std::vector<float> x = floats(tokens * s.hidden);
  std::vector<float> residual(x.size()), hidden(x.size()), routed(x.size()), out(x.size()), weights(size_t(tokens * s.top_k));
  std::vector<int32_t> ids(weights.size());
  if (attention_block(block, step, cache, x.data(), residual.data(), hidden.data(), ids.data(), weights.data()) != -1) std::abort();
  const std::vector<const PackedMatrix*> ups(size_t(s.experts), &up.packed), downs(size_t(s.experts), &down.packed);
  const ExpertMatrices experts{ups.data(), ups.data(), downs.data(), int(s.experts)};
  if (experts_ffn(experts, hidden.data(), tokens, ids.data(), weights.data(), int(s.top_k), routed.data()) != -1) std::abort();
  combine(&up.packed, &up.packed, &down.packed, residual.data(), hidden.data(), routed.data(), tokens, s.hidden, out.data());
}

}  // namespace

int run_blocks() {
  configure_threads({}, kThreads);
  int layers = 0;
  for (CacheType type : {CacheType::f32, CacheType::bf16, CacheType::fp8, CacheType::i8}) {
    for (bool integers : {true, false}) {
      for (const Shape& shape : {Shape{64, 4, 2, 16, 8, 2, 64}, Shape{96, 6, 1, 24, 5, 3, 40}}) {
        run_layer(shape, type, integers, {1}, {0});
        run_layer(shape, type, integers, {1, 1, 1}, {5, 600, 63});   // decoding; one context of several splits
        run_layer(shape, type, integers, {70, 3}, {530, 17});        // a chunk of a prompt beside drafts
        layers += 3;
      }
    }
  }
  return layers;
}

int run_pool() {
  constexpr int jobs = 2000, callers = 3;
  std::atomic<int> done{0};
  const auto call = [&] {
    for (int job = 0; job < jobs; ++job) {
      std::vector<int> seen(size_t(job % 17), 0);
      parallel_for(int(seen.size()), 1e9, [&](int task) { seen[size_t(task)] += 1; });
      for (int times : seen) {
        if (times != 1) std::abort();
      }
      ++done;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < callers; ++i) threads.emplace_back(call);
  for (int size : {1, 4, 2}) configure_threads({}, size);  // while jobs run
  for (std::thread& thread : threads) thread.join();
  configure_threads({}, 1);  // workers end before their leaks are looked for
  return done;
}

}  // namespace glmlocal
