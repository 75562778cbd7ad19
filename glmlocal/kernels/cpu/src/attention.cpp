#include "attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "thread_pool.h"

namespace glmlocal {
namespace {

// A query tile of about this many rows reuses a tile of keys often enough to hide its transposing.
constexpr int kTileRows = 192;
// Beyond this the splits of one tile run one after another: their partial results would take too much memory.
constexpr int kMostSplitTokens = 4;
// One thread: about 60 flops per ns.
constexpr double kNsPerFlop = 1.0 / 60;

struct Sizes {
  int group, head_dim, kv_heads;
  ptrdiff_t slot_stride;
};

// Queries of one request that one task per kv head takes; a whole tile of splits in one task, or each split in its own.
struct QueryTile {
  int request, first_token, num_tokens, first_position;
  int num_splits;
  bool split;
  ptrdiff_t partials;  // offset of its partial results
};

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

std::vector<QueryTile> make_tiles(const AttentionBatch& batch, int tile_tokens) {
  std::vector<QueryTile> tiles;
  for (int r = 0; r < batch.requests; ++r) {
    const int begin = batch.query_start_loc[r], end = batch.query_start_loc[r + 1];
    const int computed = batch.seq_lens[r] - (end - begin);
    for (int token = begin; token < end; token += tile_tokens) {
      const int count = std::min(tile_tokens, end - token), first_position = computed + token - begin;
      const int num_splits = ceil_div(first_position + count, kSplitKeys);
      tiles.push_back({r, token, count, first_position, num_splits, end - begin <= kMostSplitTokens && num_splits > 1, 0});
    }
  }
  return tiles;
}

}  // namespace

void check_attention(const KeyValueCache& cache, const AttentionBatch& batch) {
  auto fail = [](const std::string& message) { throw std::invalid_argument("paged_attention: " + message); };
  if (batch.query_start_loc[0] != 0 || batch.query_start_loc[batch.requests] != batch.tokens) {
    fail("query_start_loc: wanted 0 … " + std::to_string(batch.tokens) + " (the tokens of q), found " +
         std::to_string(batch.query_start_loc[0]) + " … " + std::to_string(batch.query_start_loc[batch.requests]));
  }
  for (int64_t r = 0; r < batch.requests; ++r) {
    const std::string request = "request " + std::to_string(r) + ": ";
    const int64_t begin = batch.query_start_loc[r], end = batch.query_start_loc[r + 1], seq_len = batch.seq_lens[r];
    if (end < begin) fail(request + "query_start_loc goes down from " + std::to_string(begin) + " to " + std::to_string(end));
    if (seq_len < end - begin) {
      fail(request + "seq_lens: wanted at least its " + std::to_string(end - begin) + " new tokens, found " + std::to_string(seq_len));
    }
    if (begin == end) continue;
    const int64_t blocks = (seq_len + cache.block_size - 1) / cache.block_size;
    if (blocks > batch.max_blocks) {
      fail(request + "block_tables: wanted " + std::to_string(blocks) + " blocks of " + std::to_string(cache.block_size) +
           " for seq_len " + std::to_string(seq_len) + ", found " + std::to_string(batch.max_blocks));
    }
    const int32_t* table = batch.block_tables + r * batch.max_blocks;
    for (int64_t b = 0; b < blocks; ++b) {
      if (table[b] < 0 || table[b] >= cache.num_blocks) {
        fail(request + "block_tables: wanted blocks below " + std::to_string(cache.num_blocks) + ", found " + std::to_string(table[b]) +
             " at " + std::to_string(b));
      }
    }
  }
}

void paged_attention(const KeyValueCache& cache, const AttentionBatch& batch) {
  const int kv_heads = int(cache.kv_heads), head_dim = int(cache.head_dim), group = int(batch.heads / cache.kv_heads);
  const KernelTable& kernel = kernels();
  std::vector<QueryTile> tiles = make_tiles(batch, std::clamp(kTileRows / group, 1, kTileKeys));

  // One job per kv head and tile, or per kv head and split of a tile.
  struct Job { int tile, split; };
  std::vector<Job> jobs;
  ptrdiff_t num_partials = 0;
  double flops = 0;
  const ptrdiff_t size = partial_size(head_dim);
  for (int t = int(tiles.size()) - 1; t >= 0; --t) {  // the longest of a prompt first
    QueryTile& tile = tiles[t];
    flops += 4.0 * tile.num_tokens * (tile.first_position + tile.num_tokens) * batch.heads * head_dim;
    if (tile.split) {
      tile.partials = num_partials;
      num_partials += tile.num_splits * size * tile.num_tokens * batch.heads;
      for (int s = 0; s < tile.num_splits; ++s) jobs.push_back({t, s});
    } else {
      jobs.push_back({t, -1});
    }
  }
  float* partials = num_partials ? scratch(Scratch::partials, size_t(num_partials)) : nullptr;
  const int hpt = getenv("HPT") ? atoi(getenv("HPT")) : 1, pieces = kv_heads / hpt;
  auto run_job = [&](int index) {
    const Job& job = jobs[index / pieces];
    const int kv_head = index % pieces * hpt;
    const QueryTile& tile = tiles[job.tile];
    AttentionTask task{};
    task.q = batch.q + tile.first_token * batch.q_stride + kv_head * group * head_dim;
    task.q_stride = batch.q_stride;
    task.out_stride = batch.heads * head_dim;
    task.out = batch.out + tile.first_token * task.out_stride + kv_head * group * head_dim;
    task.keys = cache.keys + kv_head * head_dim;
    task.values = cache.values + kv_head * head_dim;
    task.slot_stride = ptrdiff_t(kv_heads) * head_dim;
    task.block_stride = task.slot_stride * cache.block_size;
    task.head_stride = head_dim; task.num_heads = hpt;
    task.key_slot_stride = task.slot_stride;
    if (getenv("HM")) { task.head_stride = head_dim * cache.block_size; task.slot_stride = head_dim; task.key_slot_stride = getenv("KT") ? 1 : head_dim; task.keys = cache.keys + kv_head * head_dim * cache.block_size;  task.values = cache.values + kv_head * head_dim * cache.block_size; }
    task.block_table = batch.block_tables + tile.request * batch.max_blocks;
    task.block_size = int(cache.block_size);
    task.num_tokens = tile.num_tokens;
    task.group = group;
    task.head_dim = head_dim;
    task.first_position = tile.first_position;
    task.scale = batch.scale;
    task.first_split = tile.split ? job.split : 0;
    task.num_splits = tile.split ? 1 : tile.num_splits;
    if (tile.split) {
      const ptrdiff_t rows = tile.num_tokens * group;
      task.partial_stride = rows * size;
      task.partials = partials + tile.partials + job.split * (rows * size * kv_heads) + kv_head * rows * size;
    task.partial_stride = 0;
    }
    kernel.attend(task);
  };
  parallel_for(int(jobs.size()) * pieces, flops * kNsPerFlop, run_job);
  if (!partials) return;

  std::vector<int> split_tiles;
  for (int t = 0; t < int(tiles.size()); ++t) {
    if (tiles[t].split) split_tiles.push_back(t);
  }
  parallel_for(int(split_tiles.size()) * kv_heads, double(num_partials) / 10, [&](int index) {
    const QueryTile& tile = tiles[split_tiles[index / kv_heads]];
    const int kv_head = index % kv_heads;
    const int rows = tile.num_tokens * group;
    for (int row = 0; row < rows; ++row) {
      const int token = row / group;
      float* first = partials + tile.partials + (kv_head * ptrdiff_t(rows) + row) * size;
      const int num_splits = ceil_div(tile.first_position + token + 1, kSplitKeys);
      kernel.merge_splits(first, rows * size * kv_heads, num_splits, head_dim,
                          batch.out + (ptrdiff_t(tile.first_token + token) * batch.heads + kv_head * group + row % group) * head_dim);
    }
  });
}

}  // namespace glmlocal
