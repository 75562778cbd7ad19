// The rows of a product in the forms that its matrices take: floats padded to whole blocks, Int8Blocks, or both.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "int8_rows.h"
#include "isa.h"
#include "memory.h"
#include "packed_matrix.h"

namespace glmlocal {

inline constexpr int kMaxChunkRows = 128;  // rows of one panel product; whole groups of them
static_assert(kMaxChunkRows % kGroupRows == 0);
inline constexpr int kFewRows = 4;  // so many are read as they are, also where more are taken in groups

struct Activations {
  const float* floats = nullptr;  // [rows, float_stride]
  ptrdiff_t float_stride = 0;
  const Int8Block* blocks = nullptr;  // [rows, block_stride]
  ptrdiff_t block_stride = 0;
};

// x fp32 [num_rows, in]; the result lives in the calling thread's scratch (or is x itself) until the next call.
Activations prepare_activations(const float* x, int64_t num_rows, int64_t in, bool as_floats, bool as_int8);

// Appends row_of(0) … row_of(count - 1) and fills the last group up with the last of them.
template <class RowOf>
void append_run(std::vector<const Int8Block*>& rows, int64_t count, RowOf&& row_of) {
  const int64_t padded = (count + kGroupRows - 1) / kGroupRows * kGroupRows;
  for (int64_t i = 0; i < padded; ++i) rows.push_back(row_of(std::min(i, count - 1)));
}

// Rows of `blocks` blocks, gathered once for all panels: [rows / kGroupRows][blocks] in the calling thread's scratch.
const Int8Group* gather_groups(Scratch slot, std::span<const Int8Block* const> rows, int64_t blocks);

// panel_product (isa.h) on the rows row_of(0) … row_of(num_rows - 1) of x, num_rows ≤ kMaxChunkRows; `groups` are the same
// rows or null.
template <class RowOf>
void panel_product(const PackedMatrix& w, int panel, const Activations& x, const Int8Group* groups, int num_rows, RowOf&& row_of,
                   float* out, ptrdiff_t out_stride, const std::byte* next) {
  if (w.int8_activations) {
    const Int8Block* rows[kMaxChunkRows];
    for (int i = 0; i < num_rows; ++i) rows[i] = x.blocks + row_of(i) * x.block_stride;
    kernels().panel_product_int8(w, panel, rows, groups, num_rows, out, out_stride, next);
  } else {
    const float* rows[kMaxChunkRows];
    for (int i = 0; i < num_rows; ++i) rows[i] = x.floats + row_of(i) * x.float_stride;
    kernels().panel_product(w, panel, rows, num_rows, out, out_stride);
  }
}

}  // namespace glmlocal
