// Codes as bytes for integer dot products: Codec::quad<q>(lines) is a word per row with the codes of columns
// 4q … 4q + 3 of a block, for the block's lines as packed_matrix.h draws them. They are below 2^Codec::bits, which is 4, 6
// or 8: the widths that Dots tells apart.
#pragma once

#include "isa/codecs.h"

namespace glmlocal::GLM_ISA {

template <int q> GLM_INLINE U quad_of_4_bits(const std::byte* p) {
  return bit_and(shr<q % 2 * 4>(load_words(p + q / 2 * 64)), splat(0x0f0f0f0f));
}
template <int q> GLM_INLINE U quad_of_2_bits(const std::byte* p) {  // garbage above the two bits
  return shr<q % 4 * 2>(load_words(p + q / 4 * 64));
}

struct PlainQuads {
  GLM_INLINE explicit PlainQuads(const PackedMatrix&) {}
};

struct Quads8 : PlainQuads {
  static constexpr int lines = 8;
  static constexpr int bits = 8;
  using PlainQuads::PlainQuads;
  template <int q> GLM_INLINE U quad(const std::byte* p) const { return load_words(p + q * 64); }
};

struct Quads6 : PlainQuads {
  static constexpr int lines = 6;
  static constexpr int bits = 6;
  using PlainQuads::PlainQuads;
  template <int q> GLM_INLINE U quad(const std::byte* p) const {
    return select(splat(0x30303030), move_bit<q % 4 * 2, 4>(load_words(p + 256 + q / 4 * 64)), quad_of_4_bits<q>(p));
  }
};

struct Quads5 : PlainQuads {
  static constexpr int lines = 5;
  static constexpr int bits = 6;
  using PlainQuads::PlainQuads;
  template <int q> GLM_INLINE U quad(const std::byte* p) const {
    return select(splat(0x10101010), move_bit<q, 4>(load_words(p + 256)), quad_of_4_bits<q>(p));
  }
};

struct Quads4 : PlainQuads {
  static constexpr int lines = 4;
  static constexpr int bits = 4;
  using PlainQuads::PlainQuads;
  template <int q> GLM_INLINE U quad(const std::byte* p) const { return quad_of_4_bits<q>(p); }
};

// A codebook of int8 values, which w.bytes holds plus 128.
struct QuadsOfTable {
  static constexpr int lines = 4;
  static constexpr int bits = 8;
  ByteTable table;
  GLM_INLINE explicit QuadsOfTable(const PackedMatrix& w) : table(make_byte_table(w.bytes)) {}
  template <int q> GLM_INLINE U quad(const std::byte* p) const { return lookup_bytes(table, quad_of_4_bits<q>(p)); }
};

struct Quads3 : PlainQuads {
  static constexpr int lines = 3;
  static constexpr int bits = 4;
  using PlainQuads::PlainQuads;
  template <int q> GLM_INLINE U quad(const std::byte* p) const {
    return select(splat(0x04040404), move_bit<q, 2>(load_words(p + 128)), bit_and(quad_of_2_bits<q>(p), splat(0x03030303)));
  }
};

struct Quads2 : PlainQuads {
  static constexpr int lines = 2;
  static constexpr int bits = 4;
  using PlainQuads::PlainQuads;
  template <int q> GLM_INLINE U quad(const std::byte* p) const { return bit_and(quad_of_2_bits<q>(p), splat(0x03030303)); }
};

}  // namespace glmlocal::GLM_ISA
