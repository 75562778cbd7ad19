// Many rows of int8 activations times a piece of a panel (int8_piece.h) where registers are few: fp32 sums stay in L1.
// Included by int8.cpp alone.
#pragma once

#include "isa/int8_piece.h"

namespace glmlocal::GLM_ISA {
namespace {

// num_rows × tiles sums over the blocks of a piece, continuing the chains in `out` unless `fresh`.
// panel_tiles is the piece's number of tiles; its pointers are at the first of ours.
template <int bits, int num_rows, int tiles>
GLM_FLATTEN void multiply_tile(const Piece& piece, int panel_tiles, int zero_point, const Int8Block* const* rows, int first_block, int blocks,
                               Ahead ahead, float* out, ptrdiff_t out_stride, bool fresh) {
  using Sums = TileDots<bits>;
  TileSums<true, num_rows * tiles> acc(piece.sums);
  unroll<num_rows>([&](auto m) {
    unroll<tiles>([&](auto t) { acc.set(m.v * tiles + t.v, fresh ? zero() : load(out + m.v * out_stride + t.v * kTileRows)); });
  });
  const Int8Block* x[num_rows];
  unroll<num_rows>([&](auto m) { x[m.v] = rows[m.v] + first_block; });
  const std::byte* codes = piece.codes;
  const float *scales = piece.scales, *all_offsets = piece.offsets;
  const bool offsets = piece.has_offsets, halves = piece.halves;
  const ptrdiff_t line = panel_tiles * 64, scale_line = panel_tiles * kTileRows;
  typename Sums::Partial sums[num_rows * tiles];
  // `parts` times so many words of columns, then what they add to the fp32 sums: the whole block, or one half of it.
  const auto multiply = [&](auto words, int parts, int b, int half) {
    unroll<num_rows>([&](auto m) {
      const auto start = Sums::begin(start_of(x[m.v][b], part_of(halves, half), zero_point));
      unroll<tiles>([&](auto t) { sums[m.v * tiles + t.v] = start; });
    });
    int first_word = half * (kQuads / 2);
    for (int part = 0; part < parts; ++part, first_word += words.v) {
      unroll<words.v>([&](auto q) {
        unroll<Sums::passes>([&](auto pass) {  // over the vectors of a word, where their codes are taken apart again
          U w[tiles];
          unroll<tiles>([&](auto t) { w[t.v] = load_words(codes + t.v * 64); });
          unroll<num_rows>([&](auto m) {
            const U word = splat(word_of(x[m.v][b], first_word + q.v));
            unroll<tiles>([&](auto t) {
              typename Sums::Partial& sum = sums[m.v * tiles + t.v];
              sum = Sums::template add_part<pass.v>(sum, w[t.v], word);
            });
          });
        });
        codes += line;
      });
    }
    acc.stay();
    F scale[tiles];
    unroll<tiles>([&](auto t) { scale[t.v] = load(scales + t.v * kTileRows); });
    unroll<num_rows>([&](auto m) {
      const U start = start_of(x[m.v][b], part_of(halves, half), zero_point);
      const F x_scale = broadcast(x[m.v][b].scale);
      unroll<tiles>([&](auto t) {
        constexpr int i = m.v * tiles + t.v;
        acc.set(i, fma(mul(to_float(Sums::end(start, sums[i])), x_scale), scale[t.v], acc.get(i)));
      });
    });
    scales += scale_line;
    if (!offsets) return;
    unroll<num_rows>([&](auto m) {
      const F x_sum = broadcast(x[m.v][b].sums[part_of(halves, half)]);
      unroll<tiles>([&](auto t) {
        constexpr int i = m.v * tiles + t.v;
        acc.set(i, fma(x_sum, load(all_offsets + t.v * kTileRows), acc.get(i)));
      });
    });
    all_offsets += scale_line;
  };
  for (int b = 0; b < blocks; ++b) {
    for (int i = 0; i < ahead.lines; ++i, ahead.from += 64) __builtin_prefetch(ahead.from, 0, 2);
    if (!halves) {  // a loop would put integer sums on the stack
      multiply(Constant<kQuads>{}, 1, b, 0);
    } else {
      for (int half = 0; half < 2; ++half) multiply(Constant<kQuads / 2>{}, 1, b, half);
    }
  }
  unroll<num_rows>([&](auto m) {
    unroll<tiles>([&](auto t) { store(out + m.v * out_stride + t.v * kTileRows, acc.get(m.v * tiles + t.v)); });
  });
}

using TileFunction = void (*)(const Piece&, int, int, const Int8Block* const*, int, int, Ahead, float*, ptrdiff_t, bool);

// By number of rows, most_rows at most, and of tiles: kDotTiles or 1.
template <int bits, int most_rows>
TileFunction tile_function(int num_rows, bool one_tile) {
  if constexpr (most_rows > 1) {
    if (num_rows < most_rows) return tile_function<bits, most_rows - 1>(num_rows, one_tile);
  }
  return one_tile ? multiply_tile<bits, most_rows, 1> : multiply_tile<bits, most_rows, kDotTiles>;
}

// The panel's blocks from `first` on, taken apart in `piece`.
template <class Codec>
void multiply_piece_in_memory(const PackedMatrix& w, int panel, const Piece& piece, const Int8Block* const* rows, int num_rows, int first,
                              int count, float* out, ptrdiff_t out_stride, const std::byte* next) {
  constexpr int bits = Codec::bits, most_rows = TileDots<bits>::rows;
  const int tiles = w.tiles_in(panel);
  const int row_tiles = (num_rows + most_rows - 1) / most_rows;  // of nearly equal height
  Spread spread(w, panel, first + count, Codec::lines, row_tiles * ((tiles + kDotTiles - 1) / kDotTiles) * count, next);
  for (int i = 0; i < row_tiles; ++i) {
    const int m = num_rows * i / row_tiles, row_count = num_rows * (i + 1) / row_tiles - m;
    for (int tile = 0; tile < tiles;) {
      const bool one_tile = tiles - tile < kDotTiles;
      Piece ours = piece;
      ours.codes += tile * 64;
      ours.scales += tile * kTileRows;
      ours.offsets += tile * kTileRows;
      tile_function<bits, most_rows>(row_count, one_tile)(ours, tiles, w.int8_zero_point, rows + m, first, count, spread.take(count),
                                                          out + m * out_stride + tile * kTileRows, out_stride, first == 0);
      tile += one_tile ? 1 : kDotTiles;
    }
  }
}

}  // namespace
}  // namespace glmlocal::GLM_ISA
