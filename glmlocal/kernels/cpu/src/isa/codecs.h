// How each kind of code becomes a float: one small struct per kind, whatever the ISA, batch size or scale codec.
//
// value<k>(lines) gives the 16 rows' value(code) of column k of a block; `lines` points at the block's lines of one tile
// (packed_matrix.h draws them). k is a constant, so shifts and masks are too and neighbouring columns share their loads.
#pragma once

#include "packed_matrix.h"
#include "simd.h"

namespace glmlocal::GLM_ISA {

struct F32Codec {
  static constexpr bool scaled = false;
  static constexpr int lines = 32;
  GLM_INLINE explicit F32Codec(const PackedMatrix&) {}
  template <int k> GLM_INLINE F value(const std::byte* p) const { return load((const float*)(p + k * 64)); }
};

struct Bf16Codec {
  static constexpr bool scaled = false;
  static constexpr int lines = 16;
  GLM_INLINE explicit Bf16Codec(const PackedMatrix&) {}
  template <int k> GLM_INLINE F value(const std::byte* p) const {
    const U pair = load_words(p + k / 2 * 64);
    if constexpr (k % 2 == 0) return as_float(shl<16>(pair));
    else return as_float(bit_and(pair, splat(0xffff0000)));
  }
};

struct F16Codec {
  static constexpr bool scaled = false;
  static constexpr int lines = 16;
  GLM_INLINE explicit F16Codec(const PackedMatrix&) {}
  template <int k> GLM_INLINE F value(const std::byte* p) const { return load_f16((const uint16_t*)(p + k * 32)); }
};

// Planes: four codes per word, one in each byte, of columns k & ~3 … k | 3. Bits above the plane's own are garbage.
template <int k> GLM_INLINE U plane4(const std::byte* p) { return shr<k / 4 % 2 * 4>(load_words(p + k / 8 * 64)); }
template <int k> GLM_INLINE U plane2(const std::byte* p) { return shr<k / 4 % 4 * 2>(load_words(p + k / 16 * 64)); }
template <int k, int to_bit> GLM_INLINE U plane1(const std::byte* p) {
  const U line = load_words(p);
  constexpr int from_bit = k / 4;
  if constexpr (from_bit > to_bit) return shr<from_bit - to_bit>(line);
  else return shl<to_bit - from_bit>(line);
}

// At most 4 bits: a table gives the value, so zero points and codebooks cost nothing.
struct TableCodec {
  static constexpr bool scaled = true;
  Table table;
  GLM_INLINE explicit TableCodec(const PackedMatrix& w) : table(make_table(w.values)) {}
};

struct U2Codec : TableCodec {
  static constexpr int lines = 2;
  using TableCodec::TableCodec;
  template <int k> GLM_INLINE F value(const std::byte* p) const {
    return lookup(table, shr<k % 4 * 8 + k / 4 % 4 * 2>(load_words(p + k / 16 * 64)));
  }
};

struct U3Codec : TableCodec {
  static constexpr int lines = 3;
  using TableCodec::TableCodec;
  template <int k> GLM_INLINE F value(const std::byte* p) const {
    return lookup(table, shr<k % 4 * 8>(select(splat(0x04040404), plane1<k, 2>(p + 128), plane2<k>(p))));
  }
};

struct U4Codec : TableCodec {
  static constexpr int lines = 4;
  using TableCodec::TableCodec;
  template <int k> GLM_INLINE F value(const std::byte* p) const {
    return lookup(table, shr<k % 4 * 8 + k / 4 % 2 * 4>(load_words(p + k / 8 * 64)));
  }
};

// More than 4 bits: value = code - zero_point.
struct ByteCodec {
  static constexpr bool scaled = true;
  ByteBias bias;
  GLM_INLINE explicit ByteCodec(const PackedMatrix& w) : bias(byte_bias(w.zero_point)) {}
};

struct U5Codec : ByteCodec {
  static constexpr int lines = 5;
  using ByteCodec::ByteCodec;
  template <int k> GLM_INLINE F value(const std::byte* p) const {
    const U low = bit_and(plane4<k>(p), splat(0x0f0f0f0f));
    return byte_value<k % 4>(select(splat(0x10101010), plane1<k, 4>(p + 256), low), bias);
  }
};

struct U6Codec : ByteCodec {
  static constexpr int lines = 6;
  using ByteCodec::ByteCodec;
  template <int k> GLM_INLINE F value(const std::byte* p) const {
    const U low = bit_and(plane4<k>(p), splat(0x0f0f0f0f));
    constexpr int from_bit = k / 4 % 4 * 2;
    const U line = load_words(p + 256 + k / 16 * 64);
    U high;
    if constexpr (from_bit > 4) high = shr<from_bit - 4>(line);
    else high = shl<4 - from_bit>(line);
    return byte_value<k % 4>(select(splat(0x30303030), high, low), bias);
  }
};

struct U8Codec : ByteCodec {
  static constexpr int lines = 8;
  using ByteCodec::ByteCodec;
  template <int k> GLM_INLINE F value(const std::byte* p) const { return byte_value<k % 4>(load_words(p + k / 4 * 64), bias); }
};

// Scales and offsets of the groups of one panel.
class GroupScales {
 public:
  GLM_INLINE GroupScales(const PackedMatrix& w, int panel, int tiles) : format_(w.format), tiles_(tiles) {
    const MatrixLayout& layout = w.layout;
    const int64_t first_row = int64_t(panel) * kPanelRows;
    const int64_t float_bytes = format_.scale_type == FloatType::f16 ? 2 : 4;
    group_shift_ = w.group_shift;
    super_shift_ = w.super_shift;
    scale_ = w.data + layout.scale_offset + first_row * layout.supers * float_bytes;
    sub_scale_ = (const int8_t*)(w.data + layout.sub_scale_offset + first_row * layout.groups);
    min_ = w.data + layout.min_offset + first_row * (format_.has_sub_min ? layout.supers : layout.groups) * float_bytes;
    sub_min_ = (const uint8_t*)(w.data + layout.sub_min_offset + first_row * layout.groups);
  }

  // Of the group that holds `column`. The product of two-level scales is exact for fp16 supers, so it rounds as
  // formats/quant.py does; the offset of a symmetric scheme is 0.
  GLM_INLINE void load_group(int column, int tile, F& scale, F& offset) const {
    const int64_t group = (int64_t(column >> group_shift_) * tiles_ + tile) * kTileRows;
    const int64_t super = (int64_t(column >> super_shift_) * tiles_ + tile) * kTileRows;
    scale = load_float(scale_, super);
    if (format_.has_sub_scale) scale = mul(scale, load_i8(sub_scale_ + group));
    offset = zero();
    if (format_.has_sub_min) offset = sub(zero(), mul(load_float(min_, super), load_u8(sub_min_ + group)));
    else if (format_.has_min) offset = load_float(min_, group);
  }

 private:
  GLM_INLINE F load_float(const std::byte* section, int64_t index) const {
    if (format_.scale_type == FloatType::f16) return load_f16((const uint16_t*)section + index);
    return load((const float*)section + index);
  }

  MatrixFormat format_;
  int tiles_, group_shift_, super_shift_;
  const std::byte *scale_, *min_;
  const int8_t* sub_scale_;
  const uint8_t* sub_min_;
};

}  // namespace glmlocal::GLM_ISA
