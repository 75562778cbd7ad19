#include "activations.h"

#include <algorithm>
#include <cstring>

#include "memory.h"
#include "thread_pool.h"

namespace glmlocal {
namespace {

constexpr double kNsPerFloat = 0.2;  // to read one and round it

void quantize(const float* x, int64_t in, Int8Block* out) {
  const int whole = int(in / kBlockColumns), rest = int(in % kBlockColumns);
  kernels().quantize_row(x, whole, out);
  if (rest == 0) return;
  float last[kBlockColumns] = {};
  std::copy_n(x + int64_t(whole) * kBlockColumns, rest, last);
  kernels().quantize_row(last, 1, out + whole);
}

// Lines from one row to the next. Rows a multiple of 4 KiB apart would share the sets of the first cache, and a tile's rows
// push one another out; an odd multiple of 16 lines keeps four neighbours apart.
int64_t row_stride(int64_t blocks) {
  constexpr int64_t step = 16, long_row = 64;
  return blocks < long_row ? blocks : ((blocks + step - 1) / step | 1) * step;
}

}  // namespace

Activations prepare_activations(const float* x, int64_t num_rows, int64_t in, bool as_floats, bool as_int8) {
  Activations result;
  const int64_t blocks = (in + kBlockColumns - 1) / kBlockColumns;
  const double cost = kNsPerFloat * double(num_rows) * double(in);
  if (as_floats) {
    result.float_stride = blocks * kBlockColumns;
    result.floats = x;
    if (result.float_stride != in) {
      const ptrdiff_t stride = result.float_stride;
      float* padded = scratch(Scratch::padded, size_t(num_rows * stride));
      parallel_for(int(num_rows), cost, [&](int m) {
        std::copy_n(x + m * in, in, padded + m * stride);
        std::fill(padded + m * stride + in, padded + (m + 1) * stride, 0.0f);
      });
      result.floats = padded;
    }
  }
  if (as_int8) {
    const int64_t stride = row_stride(blocks);
    auto* rows = reinterpret_cast<Int8Block*>(scratch(Scratch::int8_rows, size_t(num_rows * stride) * sizeof(Int8Block) / sizeof(float)));
    parallel_for(int(num_rows), cost, [&](int m) { quantize(x + m * in, in, rows + m * stride); });
    result.blocks = rows;
    result.block_stride = stride;
  }
  return result;
}

const Int8Group* gather_groups(Scratch slot, std::span<const Int8Block* const> rows, int64_t blocks) {
  const int64_t num_groups = int64_t(rows.size()) / kGroupRows;
  auto* groups = reinterpret_cast<Int8Group*>(scratch(slot, size_t(num_groups * blocks) * sizeof(Int8Group) / sizeof(float)));
  parallel_for(int(num_groups), kNsPerFloat * double(rows.size()) * double(blocks) * kBlockColumns, [&](int index) {
    Int8Group* group = groups + index * blocks;
    for (int m = 0; m < kGroupRows; ++m) {
      const Int8Block* row = rows[size_t(index) * kGroupRows + size_t(m)];
      for (int64_t b = 0; b < blocks; ++b) {
        const Int8Block& block = row[b];
        std::memcpy(group[b].codes[m], block.codes, kBlockColumns);
        group[b].scales[m] = block.scale;
        group[b].sums[m] = block.sums[kWholeBlock];
        for (int half = 0; half < 2; ++half) group[b].half_sums[half][m] = block.sums[kFirstHalf + half];
      }
    }
  });
  return groups;
}

}  // namespace glmlocal
