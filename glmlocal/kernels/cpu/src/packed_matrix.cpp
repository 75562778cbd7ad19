#include "packed_matrix.h"

#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

namespace glmlocal {
namespace {

// Keeps every product below 2^63 and every index below 2^31.
constexpr int64_t kMaxFeatures = int64_t(1) << 24;

int code_bits(Codes codes) {
  switch (codes) {
    case Codes::f32: return 32;
    case Codes::bf16: case Codes::f16: return 16;
    case Codes::u8: case Codes::e4m3: return 8;
    case Codes::u6: return 6;
    case Codes::u5: return 5;
    case Codes::u4: return 4;
    case Codes::u3: return 3;
    case Codes::u2: return 2;
  }
  return 0;
}

bool valid_size(int size) { return size >= 16 && std::has_single_bit(unsigned(size)); }

}  // namespace

int lines_per_block(Codes codes) { return code_bits(codes); }

MatrixLayout matrix_layout(int64_t out_features, int64_t in_features, const MatrixFormat& format) {
  if (out_features < 0 || in_features < 0 || out_features > kMaxFeatures || in_features > kMaxFeatures) {
    throw std::invalid_argument("matrix [" + std::to_string(out_features) + ", " + std::to_string(in_features) +
                                "]: wanted sizes from 0 to " + std::to_string(kMaxFeatures));
  }
  MatrixLayout layout{};
  layout.out_features = out_features;
  layout.in_features = in_features;
  layout.tiles = (out_features + kTileRows - 1) / kTileRows;
  layout.blocks = (in_features + kBlockColumns - 1) / kBlockColumns;

  int64_t end = 0;
  auto section = [&](bool present, int64_t num_bytes) -> int64_t {
    if (!present) return -1;
    const int64_t offset = end;
    end = (end + num_bytes + 63) & ~int64_t(63);
    return offset;
  };
  layout.codes_offset = section(true, layout.tiles * layout.blocks * lines_per_block(format.codes) * 64);
  layout.scale_offset = layout.sub_scale_offset = layout.min_offset = layout.sub_min_offset = -1;
  if (format.group_size != 0) {
    if (!valid_size(format.group_size) || !valid_size(format.super_size) || format.super_size < format.group_size) {
      throw std::invalid_argument("group size " + std::to_string(format.group_size) + ", super size " +
                                  std::to_string(format.super_size) + ": wanted powers of two, at least 16");
    }
    const int64_t columns = layout.blocks * kBlockColumns;
    layout.groups = (columns + format.group_size - 1) / format.group_size;
    layout.supers = (columns + format.super_size - 1) / format.super_size;
    const int64_t rows = layout.tiles * kTileRows;
    layout.scale_offset = section(true, rows * layout.supers * float_bytes(format.scale_type));
    layout.sub_scale_offset = section(format.has_sub_scale, rows * layout.groups);
    const bool is_zero_point = format.has_sub_min && !format.has_sub_scale;
    const int64_t mins = format.has_sub_min ? layout.supers : layout.groups;
    layout.min_offset =
        is_zero_point ? layout.scale_offset : section(format.has_min, rows * mins * float_bytes(format.scale_type));
    layout.sub_min_offset = section(format.has_sub_min, rows * layout.groups);
  }
  layout.num_bytes = end;
  return layout;
}

PackedMatrix make_packed_matrix(const MatrixLayout& layout, const MatrixFormat& format, const std::byte* data,
                                float zero_point, const float* values) {
  PackedMatrix matrix{format, layout, data};
  matrix.zero_point = zero_point;
  if (format.group_size != 0) {
    matrix.group_shift = std::countr_zero(unsigned(format.group_size));
    matrix.super_shift = std::countr_zero(unsigned(format.super_size));
    const int bits = code_bits(format.codes);
    if (bits <= 4) {
      for (int i = 0; i < 16; ++i) matrix.values[i] = values[i & ((1 << bits) - 1)];
    }
  }
  return matrix;
}

bool use_int8_activations(PackedMatrix& matrix) {
  const Codes codes = matrix.format.codes;
  if (matrix.format.group_size == 0 || codes == Codes::e4m3) return false;
  const int bits = code_bits(codes);
  const float first = bits <= 4 ? matrix.values[0] : -matrix.zero_point;
  // Products of many rows take bytes, either codes as they are or codes around kMiddleCode.
  const int most = (1 << bits) - 1;
  const bool fits = matrix.format.has_min ? first == 0 : first >= -128 && first + float(most) <= 127;
  bool linear = first == std::nearbyint(first) && fits;
  for (int i = 0; bits <= 4 && i < 1 << bits; ++i) linear = linear && matrix.values[i] == first + float(i);
  if (linear) {
    matrix.int8_zero_point = -int(first);
  } else {
    if (codes != Codes::u4) return false;
    for (int i = 0; i < 16; ++i) {
      const float value = matrix.values[i];
      if (value != std::nearbyint(value) || value < -128 || value > 127) return false;
      matrix.bytes[i] = uint8_t(int(value) + 128);
    }
    matrix.has_codebook = true;
    matrix.int8_zero_point = 128;
  }
  matrix.int8_activations = true;
  return true;
}

}  // namespace glmlocal
