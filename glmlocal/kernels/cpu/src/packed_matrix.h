// A weight matrix [out_features, in_features] in the layout that the kernels read.
//
// Rows (output features) are grouped into tiles of 16, one vector lane per row, and tiles into panels of 4; the last panel
// may have fewer tiles. Columns are grouped into blocks of 32. Both are padded with zero weights. Codes are stored as
//
//   codes[panel][block][tile][bits][64 bytes]        so that a panel is one sequential stream
//
// where each 64-byte line holds one 32-bit word per row. Within a block (columns k = 0 … 31) the lines are
//
//   f32      32 lines, line k = the 16 weights of column k
//   bf16     16 lines, word = columns 2·line (low half) and 2·line + 1 (high half)
//   f16      16 lines, line = 16 weights of column 2·line, then 16 of column 2·line + 1
//   8 bits    8 lines, byte j of a word = column 4·line + j; e4m3 (fp8) lies the same way
//   4 bits    4 lines, byte j = column 8·line + j in the low nibble, 8·line + 4 + j in the high one
//   2 bits    2 lines, byte j, bits 2i and 2i + 1 = column 16·line + 4i + j
//   1 bit     1 line,  byte j, bit i = column 4i + j
//
// and 3, 5, 6 bits are planes one after another: 2 + 1, 4 + 1, 4 + 2 (low bits first). Taking one plane apart with the
// same shift in all bytes gives four neighbouring columns per word, which is what int8 dot products want as well.
//
// Scales and offsets have one value per row and group of columns:
//
//   scale, min           [panel][group or super group][tile][16] fp16, bf16 or fp32
//   sub_scale, sub_min   [panel][group][tile][16] int8, uint8
//
// The offset of an integer zero point (a sub_min without a sub_scale) is -scale · sub_min, so its min is the scale section.
//
// The matrix borrows one buffer that holds all sections; the binding keeps the buffer alive.
#pragma once

#include <cstddef>
#include <cstdint>

namespace glmlocal {

inline constexpr int kTileRows = 16;
inline constexpr int kPanelTiles = 4;
inline constexpr int kPanelRows = kTileRows * kPanelTiles;
inline constexpr int kBlockColumns = 32;

enum class Codes : uint8_t { f32, bf16, f16, u8, u6, u5, u4, u3, u2, e4m3 };
enum class FloatType : uint8_t { f16, bf16, f32 };

constexpr int float_bytes(FloatType type) { return type == FloatType::f32 ? 4 : 2; }

struct MatrixFormat {
  Codes codes;
  FloatType scale_type = FloatType::f16;
  int group_size = 0;  // columns per scale, a power of two ≥ 16, above in_features for one per row; 0 for f32, bf16 and f16
  int super_size = 0;  // columns per super scale; equal to group_size when there are no sub-scales
  bool has_sub_scale = false;
  bool has_min = false;
  bool has_sub_min = false;
};

struct MatrixLayout {
  int64_t out_features, in_features;
  int64_t tiles, blocks, groups, supers;
  // Byte offsets of the sections in the buffer; -1 for a section that the format does not have.
  int64_t codes_offset, scale_offset, sub_scale_offset, min_offset, sub_min_offset;
  int64_t num_bytes;
  bool operator==(const MatrixLayout&) const = default;
};

int lines_per_block(Codes codes);

// Throws std::invalid_argument for a format or shape that cannot be.
MatrixLayout matrix_layout(int64_t out_features, int64_t in_features, const MatrixFormat& format);

struct PackedMatrix {
  MatrixFormat format;
  MatrixLayout layout;
  const std::byte* data;
  int group_shift = 0, super_shift = 0;  // columns >> shift = index
  float zero_point = 0;
  // value(code) by the low 4 bits of a code; codes of 2 and 3 bits repeat, so that higher bits need no masking.
  alignas(64) float values[16] = {};
  // For products with int8 activations: value = code - int8_zero_point, the code of a codebook being `bytes[code]`.
  bool int8_activations = false;
  bool has_codebook = false;
  int int8_zero_point = 0;
  alignas(16) uint8_t bytes[16] = {};

  int out_features() const { return int(layout.out_features); }
  int in_features() const { return int(layout.in_features); }
  int padded_in() const { return int(layout.blocks) * kBlockColumns; }
  int panels() const { return int((layout.tiles + kPanelTiles - 1) / kPanelTiles); }
  int tiles_in(int panel) const {
    const int64_t left = layout.tiles - int64_t(panel) * kPanelTiles;
    return left < kPanelTiles ? int(left) : kPanelTiles;
  }
  // Where the codes of a panel begin.
  const std::byte* panel_codes(int panel) const {
    return data + layout.codes_offset + int64_t(panel) * kPanelTiles * layout.blocks * lines_per_block(format.codes) * 64;
  }
  int rows_in(int panel) const {
    const int64_t left = layout.out_features - int64_t(panel) * kPanelRows;
    return left < kPanelRows ? int(left) : kPanelRows;
  }
};

// Whether codes of the format can meet int8 activations: integers of 8 bits, with or without a sign, or a codebook of such.
// `values` as below. Sets the matrix up for it; false leaves it unchanged.
bool use_int8_activations(PackedMatrix& matrix);

// `values` has 2^bits entries for codes of at most 4 bits and is ignored for others: integers mean code - zero_point, and
// e4m3 means its value · 2^-120 (codecs.h), so its scales come multiplied by 2^120.
PackedMatrix make_packed_matrix(const MatrixLayout& layout, const MatrixFormat& format, const std::byte* data,
                                float zero_point, const float* values);

}  // namespace glmlocal
