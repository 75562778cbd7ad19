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

// About this many rows of queries share one pass over the keys: enough to hide the loading, few enough to stay in L2.
constexpr int kTileRows = 192;
// With more new tokens than this the splits run one after another: their partial results would take too much memory.
constexpr int kMostSplitTokens = 4;
constexpr double kNsPerFlop = 1.0 / 60, kNsPerByte = 1.0 / 30;  // of one thread

// Consecutive new tokens of one request, each of whose tasks covers `heads` kv heads and either all splits or one.
struct QueryTile {
  int request, first_token, num_tokens, first_position, num_splits;
  bool separate_splits;
  int heads;
  ptrdiff_t partials;  // where its partial results begin, [split][kv head][token][head of the group]
};

int ceil_div(int a, int b) { return (a + b - 1) / b; }

std::vector<QueryTile> make_tiles(const AttentionBatch& batch, int tile_tokens) {
  std::vector<QueryTile> tiles;
  for (int r = 0; r < batch.requests; ++r) {
    const int begin = batch.query_start_loc[r], end = batch.query_start_loc[r + 1];
    const int num_computed = batch.seq_lens[r] - (end - begin);
    for (int token = begin; token < end; token += tile_tokens) {
      const int count = std::min(tile_tokens, end - token), position = num_computed + token - begin;
      const int num_splits = ceil_div(position + count, kSplitKeys);
      tiles.push_back({r, token, count, position, num_splits, num_splits > 1 && end - begin <= kMostSplitTokens, 1, 0});
    }
  }
  // The last tokens of a prompt see the most keys: what takes longest goes first.
  std::reverse(tiles.begin(), tiles.end());
  return tiles;
}

// Few queries are bound by reading the cache, which is fastest in large pieces: give one task as many kv heads as leaves
// every thread several tasks.
void share_heads(std::vector<QueryTile>& tiles, int kv_heads, int group) {
  int64_t units = 0;
  for (const QueryTile& tile : tiles) units += tile.separate_splits ? tile.num_splits : 1;
  int heads = kv_heads;
  while (heads > 1 && (kv_heads % heads != 0 || units * (kv_heads / heads) < 4 * num_threads())) --heads;
  for (QueryTile& tile : tiles) {
    tile.heads = tile.num_tokens <= kMostSplitTokens && heads * tile.num_tokens * group <= 2 * kTileRows ? heads : 1;
  }
}

}  // namespace

void check_attention(const KeyValueCache& cache, const AttentionBatch& batch) {
  auto fail = [](const std::string& message) { throw std::invalid_argument("paged_attention: " + message); };
  const int64_t first = batch.query_start_loc[0], last = batch.query_start_loc[batch.requests];
  if (first != 0 || last != batch.tokens) {
    fail("query_start_loc wanted to go from 0 to the " + std::to_string(batch.tokens) + " tokens of q, found " +
         std::to_string(first) + " to " + std::to_string(last));
  }
  for (int64_t r = 0; r < batch.requests; ++r) {
    const std::string request = " of request " + std::to_string(r);
    const int64_t begin = batch.query_start_loc[r], end = batch.query_start_loc[r + 1], seq_len = batch.seq_lens[r];
    if (end < begin) fail("query_start_loc" + request + " falls from " + std::to_string(begin) + " to " + std::to_string(end));
    if (seq_len < end - begin) {
      fail("seq_lens" + request + " wanted at least its " + std::to_string(end - begin) + " new tokens, found " + std::to_string(seq_len));
    }
    if (begin == end) continue;
    const int64_t blocks = (seq_len + cache.block_size - 1) / cache.block_size;
    if (blocks > batch.max_blocks) {
      fail("block_tables" + request + " wanted " + std::to_string(blocks) + " blocks of " + std::to_string(cache.block_size) +
           " for " + std::to_string(seq_len) + " tokens, found " + std::to_string(batch.max_blocks));
    }
    const int32_t* table = batch.block_tables + r * batch.max_blocks;
    for (int64_t b = 0; b < blocks; ++b) {
      if (table[b] >= 0 && table[b] < cache.num_blocks) continue;
      fail("block_tables" + request + " wanted blocks from 0 to " + std::to_string(cache.num_blocks - 1) + ", found " +
           std::to_string(table[b]));
    }
  }
}

AttentionOperands attention_operands() { return kernels().attention_operands(); }

void paged_attention(const KeyValueCache& cache, const AttentionBatch& batch) {
  const int kv_heads = int(cache.kv_heads), head_dim = int(cache.head_dim), group = int(batch.heads / cache.kv_heads);
  const ptrdiff_t size = partial_size(head_dim), itemsize = ptrdiff_t(cache_itemsize(cache.type));
  std::vector<QueryTile> tiles = make_tiles(batch, std::clamp(kTileRows / group, 1, kTileKeys));
  share_heads(tiles, kv_heads, group);

  struct Job {
    const QueryTile* tile;
    int head, split;
  };
  std::vector<Job> jobs;
  ptrdiff_t num_partials = 0;
  double cost_ns = 0;
  for (QueryTile& tile : tiles) {
    const double pairs = double(tile.first_position + tile.num_tokens) * kv_heads * head_dim;
    cost_ns += pairs * (4.0 * tile.num_tokens * group * kNsPerFlop + 2.0 * double(itemsize) * kNsPerByte);
    tile.partials = num_partials;
    if (tile.separate_splits) num_partials += tile.num_splits * tile.num_tokens * batch.heads * size;
    for (int split = 0; split < (tile.separate_splits ? tile.num_splits : 1); ++split) {
      for (int head = 0; head < kv_heads; head += tile.heads) jobs.push_back({&tile, head, split});
    }
  }
  float* partials = num_partials > 0 ? scratch(Scratch::partials, size_t(num_partials)) : nullptr;
  const KernelTable& kernel = kernels();

  parallel_for(int(jobs.size()), cost_ns, [&](int index) {
    const auto [tile, head, split] = jobs[index];
    const ptrdiff_t out_stride = batch.heads * head_dim, rows = ptrdiff_t(tile->num_tokens) * group;
    AttentionTask task{};
    task.q = batch.q + tile->first_token * batch.q_stride + head * group * head_dim;
    task.q_stride = batch.q_stride;
    task.out = batch.out + tile->first_token * out_stride + head * group * head_dim;
    task.out_stride = out_stride;
    task.type = cache.type;
    task.keys = (const std::byte*)cache.keys + head * cache.key_strides.head * itemsize;
    task.values = (const std::byte*)cache.values + head * cache.value_strides.head * itemsize;
    task.key_strides = cache.key_strides;
    task.value_strides = cache.value_strides;
    if (cache.key_scales != nullptr) {
      task.key_scales = cache.key_scales + head * cache.block_size;
      task.value_scales = cache.value_scales + head * cache.block_size;
      task.scale_block_stride = cache.kv_heads * cache.block_size;
    }
    task.block_table = batch.block_tables + tile->request * batch.max_blocks;
    task.block_size = int(cache.block_size);
    task.num_tokens = tile->num_tokens;
    task.num_heads = tile->heads;
    task.group = group;
    task.head_dim = head_dim;
    task.first_position = tile->first_position;
    task.first_split = split;
    task.num_splits = tile->separate_splits ? 1 : tile->num_splits;
    task.scale = batch.scale;
    if (tile->separate_splits) task.partials = partials + tile->partials + (split * ptrdiff_t(kv_heads) + head) * rows * size;
    kernel.attend(task);
  });

  if (num_partials == 0) return;
  parallel_for(int(tiles.size()) * kv_heads, double(num_partials) / 10, [&](int index) {
    const QueryTile& tile = tiles[index / kv_heads];
    const int head = index % kv_heads;
    if (!tile.separate_splits) return;
    for (int row = 0; row < tile.num_tokens * group; ++row) {
      const int token = row / group;
      float* first = partials + tile.partials + (ptrdiff_t(head) * tile.num_tokens * group + row) * size;
      kernel.merge_splits(first, tile.num_tokens * batch.heads * size, ceil_div(tile.first_position + token + 1, kSplitKeys), head_dim,
                          batch.out + (ptrdiff_t(tile.first_token + token) * batch.heads + head * group + row % group) * head_dim);
    }
  });
}

}  // namespace glmlocal
