// Many rows of int8 activations times a piece of a panel (int8_piece.h), all sums in registers.
//
// Codes are bytes around kMiddleCode, or as they are where the scheme has offsets: in either case what integer sums begin
// with is known already. Dot products and fp32 arithmetic want the same two ports of a CPU, so a block of 32 columns can take
// 8 / 10 of its time for the dot products at best; whatever else these loops did would be seen. Included by int8.cpp alone.
#pragma once

#include <cstddef>

#include "isa/int8_piece.h"

namespace glmlocal::GLM_ISA {
namespace {

// From one tile of a piece to the next, in bytes and floats; 0: one tile, which is worked out several times.
struct TileStep {
  ptrdiff_t codes, floats;
};

// scale · sum, rounded once, of a sum that began with kFloatBaseBits.
GLM_INLINE F scaled_sum(U sum, F scale, F minus_base) {
  if constexpr (kFmaIsFused) return fma(as_float(sum), scale, minus_base);
  else return mul(sub(as_float(sum), broadcast(kFloatBase)), scale);
}

// num_rows × kDotTiles sums over the blocks of a piece, continuing the chains in `out` unless `fresh`. panel_tiles is the
// piece's number of tiles; its pointers are at the first of ours.
template <int bits, int num_rows, bool offsets, bool halves>
GLM_FLATTEN void multiply_in_registers(const Piece& piece, int panel_tiles, TileStep step, const Int8Block* const* rows, int first_block,
                                       int blocks, Ahead ahead, float* out, ptrdiff_t out_stride, bool fresh) {
  constexpr int tiles = kDotTiles, parts = halves ? 2 : 1, chains = kDotChains / (num_rows * tiles) >= 2 ? 2 : 1;
  F acc[num_rows * tiles];
  unroll<num_rows>([&](auto m) {
    unroll<tiles>([&](auto t) { acc[m.v * tiles + t.v] = fresh ? zero() : load(out + m.v * out_stride + t.v * step.floats); });
  });
  const Int8Block* x[num_rows];
  unroll<num_rows>([&](auto m) { x[m.v] = rows[m.v] + first_block; });
  const std::byte* codes = piece.codes;
  const float *scales = piece.scales, *piece_offsets = piece.offsets;
  const ptrdiff_t line = panel_tiles * 64, scale_line = panel_tiles * kTileRows;
  int32_t base_bits = kFloatBaseBits;
  for (int b = 0; b < blocks; ++b) {
    for (int i = 0; i < ahead.lines; ++i, ahead.from += 64) __builtin_prefetch(ahead.from, 0, 2);
    unroll<parts>([&](auto half) {
      if constexpr (halves) asm volatile("" ::: "memory");  // GCC would begin the second half's sums before the first one's end
      U sums[chains][num_rows * tiles];  // by turns: a few rows' chains alone would wait for one another
      if constexpr (offsets) asm volatile("" : "+m"(base_bits));  // read anew: a register that held it would be one too many
      unroll<num_rows>([&](auto m) {
        const U begin = splat(uint32_t(offsets ? base_bits : x[m.v][b].starts[part_of(halves, half.v)]));
        unroll<tiles>([&](auto t) { sums[0][m.v * tiles + t.v] = begin; });
      });
      if constexpr (chains == 2) unroll<num_rows * tiles>([&](auto i) { sums[1][i.v] = splat(0); });
      unroll<kQuads / parts>([&](auto q) {
        U w[tiles];
        unroll<tiles>([&](auto t) { w[t.v] = load_words(codes + t.v * step.codes); });
        unroll<num_rows>([&](auto m) {
          const U word = splat(word_of(x[m.v][b], half.v * (kQuads / 2) + q.v));
          unroll<tiles>([&](auto t) {
            U& sum = sums[q.v % chains][m.v * tiles + t.v];
            sum = Dots<bits>::add(sum, w[t.v], word);
          });
        });
        codes += line;
      });
      F scale[tiles];
      unroll<tiles>([&](auto t) { scale[t.v] = load(scales + t.v * step.floats); });
      scales += scale_line;
      unroll<num_rows>([&](auto m) {
        const F x_scale = broadcast(x[m.v][b].scale), minus_base = broadcast(x[m.v][b].minus_base);
        unroll<tiles>([&](auto t) {
          constexpr int i = m.v * tiles + t.v;
          const U sum = chains == 2 ? add_words(sums[0][i], sums[1][i]) : sums[0][i];
          acc[i] = fma(scaled_sum(sum, x_scale, minus_base), scale[t.v], acc[i]);
        });
      });
      if constexpr (offsets) {
        F offset[tiles];
        unroll<tiles>([&](auto t) { offset[t.v] = load(piece_offsets + t.v * step.floats); });
        piece_offsets += scale_line;
        unroll<num_rows>([&](auto m) {
          const F x_sum = broadcast(x[m.v][b].sums[part_of(halves, half.v)]);
          unroll<tiles>([&](auto t) { acc[m.v * tiles + t.v] = fma(x_sum, offset[t.v], acc[m.v * tiles + t.v]); });
        });
      }
    });
  }
  unroll<num_rows>([&](auto m) {
    unroll<tiles>([&](auto t) { store(out + m.v * out_stride + t.v * step.floats, acc[m.v * tiles + t.v]); });
  });
}

template <int bits, bool offsets, bool halves, int most_rows = kDotRows>
auto function_in_registers(int num_rows) {
  if constexpr (most_rows > 1) {
    if (num_rows < most_rows) return function_in_registers<bits, offsets, halves, most_rows - 1>(num_rows);
  }
  return multiply_in_registers<bits, most_rows, offsets, halves>;
}
template <int bits>
auto function_in_registers(const Piece& piece, int num_rows) {
  if (piece.halves) return piece.has_offsets ? function_in_registers<bits, true, true>(num_rows) : function_in_registers<bits, false, true>(num_rows);
  return piece.has_offsets ? function_in_registers<bits, true, false>(num_rows) : function_in_registers<bits, false, false>(num_rows);
}

// What takes the piece's codes to bytes around kMiddleCode; codes with offsets have no zero point.
GLM_INLINE int shift_to_middle(const PackedMatrix& w) { return w.format.has_min ? 0 : w.int8_zero_point - kMiddleCode; }

// The panel's blocks from `first` on, taken apart in `piece` with shift_to_middle.
template <class Codec>
void multiply_piece_in_registers(const PackedMatrix& w, int panel, const Piece& piece, const Int8Block* const* rows, int num_rows, int first,
                                 int count, float* out, ptrdiff_t out_stride, const std::byte* next) {
  const int tiles = w.tiles_in(panel);
  const int row_tiles = (num_rows + kDotRows - 1) / kDotRows;
  Spread spread(w, panel, first + count, Codec::lines, row_tiles * ((tiles + kDotTiles - 1) / kDotTiles) * count, next);
  for (int m = 0; m < num_rows; m += kDotRows) {  // not of equal height: 12 chains of dot products do not fill two ports, 14 do
    const int row_count = num_rows - m < kDotRows ? num_rows - m : kDotRows;
    const auto multiply = function_in_registers<8>(piece, row_count);
    for (int tile = 0; tile < tiles; tile += kDotTiles) {
      const int at = tile * kTileRows;
      const TileStep step = tiles - tile < kDotTiles ? TileStep{0, 0} : TileStep{64, kTileRows};
      const Piece ours{piece.codes + tile * 64, piece.scales + at, piece.offsets + at, nullptr, piece.has_offsets, piece.halves};
      multiply(ours, tiles, step, rows + m, first, count, spread.take(count), out + m * out_stride + at, out_stride, first == 0);
    }
  }
}

}  // namespace
}  // namespace glmlocal::GLM_ISA
