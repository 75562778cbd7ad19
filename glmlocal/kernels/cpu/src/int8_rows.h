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

}  // namespace glmlocal
