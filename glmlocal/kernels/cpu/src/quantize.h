#pragma once

#include <cstddef>
#include <cstdint>

namespace glmlocal {

inline constexpr int kQuantGroup = 32;  // columns that share a scale
inline constexpr int kMaxCandidates = 16;

struct QuantizeRule {
  float low, high;               // the codes as signed numbers: -zero_point … 2^bits - 1 - zero_point
  float candidates[kMaxCandidates];  // what the largest weight of a group may become, in steps
  int num_candidates;
  float limit;                   // magnitudes from here on are refused
};

// fp32 [rows, columns] → codes uint8 [rows, columns] and fp16-exact scales fp32 [rows, ceil(columns / 32)]: the bits of
// formats/quantize.py, which says what is done and why. False for a weight that is not finite or not below the limit.
bool quantize_rows(const float* weights, int64_t rows, int64_t columns, const QuantizeRule& rule, uint8_t* codes, float* scales);

}  // namespace glmlocal
