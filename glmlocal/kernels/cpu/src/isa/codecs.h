// How each kind of code becomes a float: one small struct per kind, whatever the ISA, batch size or scale codec.
//
// A codec is opened on half a block (16 columns) of one tile: half.open(lines, 0 or 1), where `lines` points at the
// block (packed_matrix.h draws it). value<k>(half) is then value(code) of column k = 0 … 15 for the tile's 16 rows; k is a
// constant, so shifts and masks are too and neighbouring columns share their loads.
#pragma once

#include "packed_matrix.h"
#include "simd.h"

namespace glmlocal::GLM_ISA {

struct F32Codec {
  static constexpr bool scaled = false;
  static constexpr int lines = 32;
  GLM_INLINE explicit F32Codec(const PackedMatrix&) {}
  struct Half {
    const std::byte* p;
    GLM_INLINE void open(const std::byte* lines, int half) { p = lines + half * 1024; }
  };
  template <int k> GLM_INLINE F value(const Half& half) const { return load((const float*)(half.p + k * 64)); }
};

struct Bf16Codec {
  static constexpr bool scaled = false;
  static constexpr int lines = 16;
  GLM_INLINE explicit Bf16Codec(const PackedMatrix&) {}
  struct Half {
    const std::byte* p;
    GLM_INLINE void open(const std::byte* lines, int half) { p = lines + half * 512; }
  };
  template <int k> GLM_INLINE F value(const Half& half) const {
    const U pair = load_words(half.p + k / 2 * 64);
    if constexpr (k % 2 == 0) return as_float(shl<16>(pair));
    else return as_float(bit_and(pair, splat(0xffff0000)));
  }
};

struct F16Codec {
  static constexpr bool scaled = false;
  static constexpr int lines = 16;
  GLM_INLINE explicit F16Codec(const PackedMatrix&) {}
  struct Half {
    const std::byte* p;
    GLM_INLINE void open(const std::byte* lines, int half) { p = lines + half * 512; }
  };
  template <int k> GLM_INLINE F value(const Half& half) const { return load_f16((const uint16_t*)(half.p + k * 32)); }
};

// Planes: four codes per word, one in each byte, of columns k & ~3 … k | 3. Bits above the plane's own are garbage.
template <int k> GLM_INLINE U plane4(const std::byte* p) { return shr<k / 4 % 2 * 4>(load_words(p + k / 8 * 64)); }
template <int k> GLM_INLINE U plane2(const std::byte* p) { return shr<k / 4 * 2>(load_words(p)); }

// Bit `from` of every byte moved to bit `to`.
template <int from, int to> GLM_INLINE U move_bit(U words) {
  if constexpr (from > to) return shr<from - to>(words);
  else return shl<to - from>(words);
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
  struct Half {
    const std::byte* p;
    GLM_INLINE void open(const std::byte* lines, int half) { p = lines + half * 64; }
  };
  template <int k> GLM_INLINE F value(const Half& half) const { return lookup(table, shr<k % 4 * 8 + k / 4 * 2>(load_words(half.p))); }
};

struct U3Codec : TableCodec {
  static constexpr int lines = 3;
  using TableCodec::TableCodec;
  struct Half {
    const std::byte* low;
    U high;
    GLM_INLINE void open(const std::byte* lines, int half) { low = lines + half * 64; high = shift_right(load_words(lines + 128), half * 4); }
  };
  template <int k> GLM_INLINE F value(const Half& half) const {
    const U codes = select(splat(0x04040404), move_bit<k / 4, 2>(half.high), plane2<k>(half.low));
    return lookup(table, shr<k % 4 * 8>(codes));
  }
};

struct U4Codec : TableCodec {
  static constexpr int lines = 4;
  using TableCodec::TableCodec;
  struct Half {
    const std::byte* p;
    GLM_INLINE void open(const std::byte* lines, int half) { p = lines + half * 128; }
  };
  template <int k> GLM_INLINE F value(const Half& half) const {
    return lookup(table, shr<k % 4 * 8 + k / 4 % 2 * 4>(load_words(half.p + k / 8 * 64)));
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
  struct Half {
    const std::byte* low;
    U high;
    GLM_INLINE void open(const std::byte* lines, int half) { low = lines + half * 128; high = shift_right(load_words(lines + 256), half * 4); }
  };
  template <int k> GLM_INLINE F value(const Half& half) const {
    const U low = bit_and(plane4<k>(half.low), splat(0x0f0f0f0f));
    return byte_value<k % 4>(select(splat(0x10101010), move_bit<k / 4, 4>(half.high), low), bias);
  }
};

struct U6Codec : ByteCodec {
  static constexpr int lines = 6;
  using ByteCodec::ByteCodec;
  struct Half {
    const std::byte *low, *high;
    GLM_INLINE void open(const std::byte* lines, int half) { low = lines + half * 128; high = lines + 256 + half * 64; }
  };
  template <int k> GLM_INLINE F value(const Half& half) const {
    const U low = bit_and(plane4<k>(half.low), splat(0x0f0f0f0f));
    return byte_value<k % 4>(select(splat(0x30303030), move_bit<k / 4 * 2, 4>(load_words(half.high)), low), bias);
  }
};

struct U8Codec : ByteCodec {
  static constexpr int lines = 8;
  using ByteCodec::ByteCodec;
  struct Half {
    const std::byte* p;
    GLM_INLINE void open(const std::byte* lines, int half) { p = lines + half * 256; }
  };
  template <int k> GLM_INLINE F value(const Half& half) const { return byte_value<k % 4>(load_words(half.p + k / 4 * 64), bias); }
};

// fp8: sign, 4 bits of exponent (bias 7), 3 of mantissa. The same bits at the places of fp32's sign, exponent and mantissa
// are the number times 2^-120, subnormals included; the scales, which hold 2^120 times too much, put that right exactly.
struct E4m3Codec {
  static constexpr bool scaled = true;
  static constexpr int lines = 8;
  GLM_INLINE explicit E4m3Codec(const PackedMatrix&) {}
  struct Half {
    const std::byte* p;
    GLM_INLINE void open(const std::byte* lines, int half) { p = lines + half * 256; }
  };
  template <int k> GLM_INLINE F value(const Half& half) const {
    const U top = shl<24 - k % 4 * 8>(load_words(half.p + k / 4 * 64));
    return as_float(bit_and(sar<4>(top), splat(0x87f00000)));
  }
};

// Scales and offsets of the groups of one panel.
class GroupScales {
 public:
  static constexpr bool may_have_offsets = true, may_have_halves = true;
  GLM_INLINE GroupScales(const PackedMatrix& w, int panel, int tiles) : format_(w.format), tiles_(tiles) {
    const MatrixLayout& layout = w.layout;
    const int64_t first_row = int64_t(panel) * kPanelRows;
    const int64_t bytes = float_bytes(format_.scale_type);
    group_shift_ = w.group_shift;
    super_shift_ = w.super_shift;
    scale_ = w.data + layout.scale_offset + first_row * layout.supers * bytes;
    sub_scale_ = (const int8_t*)(w.data + layout.sub_scale_offset + first_row * layout.groups);
    min_ = w.data + layout.min_offset + first_row * (format_.has_sub_min ? layout.supers : layout.groups) * bytes;
    sub_min_ = (const uint8_t*)(w.data + layout.sub_min_offset + first_row * layout.groups);
  }

  // Of the group that holds `column`. The product of two-level scales is exact for fp16 supers, so it rounds as
  // formats/quant.py does; the offset of a symmetric scheme is 0.
  GLM_INLINE void load_group(int column, int tile, F& scale, F& offset) const {
    scale = load_scale(column, tile);
    offset = load_offset(column, tile);
  }
  GLM_INLINE F load_scale(int column, int tile) const {
    const F scale = load_float(scale_, line(column >> super_shift_, tile));
    return format_.has_sub_scale ? mul(scale, load_i8(sub_scale_ + line(column >> group_shift_, tile))) : scale;
  }
  GLM_INLINE F load_offset(int column, int tile) const {
    const int64_t group = line(column >> group_shift_, tile);
    if (format_.has_sub_min) return sub(zero(), mul(load_float(min_, line(column >> super_shift_, tile)), load_u8(sub_min_ + group)));
    return format_.has_min ? load_float(min_, group) : zero();
  }

 private:
  GLM_INLINE int64_t line(int unit, int tile) const { return (int64_t(unit) * tiles_ + tile) * kTileRows; }
  GLM_INLINE F load_float(const std::byte* section, int64_t index) const {
    if (format_.scale_type == FloatType::f16) return load_f16((const uint16_t*)section + index);
    if (format_.scale_type == FloatType::bf16) return as_float(shl<16>(load_halves((const uint16_t*)section + index)));
    return load((const float*)section + index);
  }

  MatrixFormat format_;
  int tiles_, group_shift_, super_shift_;
  const std::byte *scale_, *min_;
  const int8_t* sub_scale_;
  const uint8_t* sub_min_;
};

// The same for formats of one fp16 number per group and no offset: nothing is decided while columns go by.
class PlainScales {
 public:
  static constexpr bool may_have_offsets = false, may_have_halves = false;
  static bool fit(const MatrixFormat& format) {
    return format.scale_type == FloatType::f16 && !format.has_sub_scale && !format.has_min;
  }
  GLM_INLINE PlainScales(const PackedMatrix& w, int panel, int tiles)
      : shift_(w.super_shift), line_(tiles * kTileRows),
        scale_((const uint16_t*)(w.data + w.layout.scale_offset) + int64_t(panel) * kPanelRows * w.layout.supers) {}
  GLM_INLINE F load_scale(int column, int tile) const { return load_f16(scale_ + (column >> shift_) * line_ + tile * kTileRows); }
  GLM_INLINE F load_offset(int, int) const { return zero(); }
  // Brings the scales of columns first … end - 1 nearer; they lie one after another.
  GLM_INLINE void prefetch(int first, int end) const {
    const auto* last = (const std::byte*)(scale_ + ((end - 1) >> shift_) * line_ + line_);
    for (auto* p = (const std::byte*)(scale_ + (first >> shift_) * line_); p < last; p += 64) __builtin_prefetch(p, 0, 2);
  }

 private:
  int shift_;
  ptrdiff_t line_;
  const uint16_t* scale_;
};

}  // namespace glmlocal::GLM_ISA
