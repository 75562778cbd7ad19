// Activations as integers: what rows of floats become before they meet weights that are integer codes.
//
// Every 32 neighbouring columns share a scale of (largest magnitude) / 127, as llama.cpp's Q8_0 and Q8_1 do, and are
// rounded to the nearest of -127 … 127. The sums serve codes with zero points and offsets.
#pragma once

#include <cstdint>

#include "packed_matrix.h"

namespace glmlocal {

struct alignas(16) Int8Block {
  int8_t codes[kBlockColumns];
  float scale;
  int32_t sum, half_sums[2];  // of all codes, and of columns 0 … 15 and 16 … 31
};
static_assert(sizeof(Int8Block) == 48);

// The same block of columns of up to 16 rows, as tile products take it (isa/int8_amx.h). `sums` and `half_sums` are in
// units of the weights' offsets: scale · Σ codes. Rows that do not exist are copies of the last.
inline constexpr int kGroupRows = 16;
struct alignas(64) Int8Group {
  int8_t codes[kGroupRows][kBlockColumns];
  float scales[kGroupRows], sums[kGroupRows], half_sums[2][kGroupRows];
};
static_assert(sizeof(Int8Group) == 768);

}  // namespace glmlocal
