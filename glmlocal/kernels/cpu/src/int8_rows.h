// Activations as integers: what rows of floats become before they meet weights that are integer codes.
//
// Every 32 neighbouring columns share a scale of (largest magnitude) / 127, as llama.cpp's Q8_0 and Q8_1 do, and are
// rounded to the nearest of -127 … 127. Sums serve codes with zero points and offsets.
//
// Integer sums of many rows' products begin with the bits of kFloatBase, so that their words, read as floats, are kFloatBase
// + sum: fma(word, scale, minus_base) is scale · sum, rounded once, and no conversion is needed. minus_base has to be exact,
// which takes a scale of at most 22 significant bits and below kInfiniteScale.
#pragma once

#include <cstdint>

#include "packed_matrix.h"

namespace glmlocal {

// What a sum is over: the whole block, its columns 0 … 15, its columns 16 … 31.
enum Part { kWholeBlock, kFirstHalf, kSecondHalf };
inline constexpr int kMiddleCode = 128;  // the zero point of codes in many rows' products
inline constexpr float kFloatBase = 0x1.8p23f;  // plus an integer below 2^22, of either sign: all its bits
inline constexpr int32_t kFloatBaseBits = 0x4b400000;
inline constexpr float kInfiniteScale = 0x1p103f;  // scales from here on are taken for infinite

// A line of the cache.
struct alignas(64) Int8Block {
  int8_t codes[kBlockColumns];
  float scale;
  float minus_base;   // -kFloatBase · scale
  float sums[3];      // scale · Σ codes, by part: what a weight's offset is multiplied with
  int32_t starts[3];  // kFloatBaseBits - kMiddleCode · Σ codes, by part: what integer sums begin with

  int32_t sum(int part) const { return (kFloatBaseBits - starts[part]) >> 7; }  // exact: a multiple of 128
};
static_assert(sizeof(Int8Block) == 64 && kMiddleCode == 1 << 7);

// The same block of columns of up to 16 rows, as tile products take it (isa/int8_amx.h). `sums` and `half_sums` are in
// units of the weights' offsets: scale · Σ codes. Rows that do not exist are copies of the last.
inline constexpr int kGroupRows = 16;
struct alignas(64) Int8Group {
  int8_t codes[kGroupRows][kBlockColumns];
  float scales[kGroupRows], sums[kGroupRows], half_sums[2][kGroupRows];
};
static_assert(sizeof(Int8Group) == 768);

}  // namespace glmlocal
