// Many rows of int8 activations on AMX: a piece of a panel (int8_piece.h) times groups of 16 rows.
//
// A line of codes holds four columns of 16 outputs, which is what a row of the second factor of a tile product is: a block
// of 32 columns is a tile as it lies. One product makes the integer sums of 16 rows × 16 outputs over a block (or half of
// one, where the scales are finer), and vectors add them to fp32 sums in registers exactly as the other ways do.
//
// Tiles and vectors take turns of a whole piece: Emerald Rapids does not work at both at once, and what a tile has stored
// cannot be loaded for a while (one step after another 30 ns, 16 at a time 20).
//
// The operating system must have been asked for the tile registers (isa.cpp). Included by int8.cpp alone.
#pragma once

#include "isa/amx.h"
#include "isa/int8_piece.h"

namespace glmlocal::GLM_ISA {
namespace {

// Tile registers: sums and rows for full height, the same for the last, lower group of rows, and codes.
constexpr int kFullSums = 0, kFullRows = 1, kLastSums = 2, kLastRows = 3, kCodes = 4;

// For sums over `columns` (32 or 16), with full and lower groups of rows.
GLM_INLINE TileConfig tile_config(int columns, int last_rows) {
  TileConfig config;
  config.set(kFullSums, kGroupRows, 64);
  config.set(kFullRows, kGroupRows, columns);
  config.set(kLastSums, last_rows, 64);
  config.set(kLastRows, last_rows, columns);
  config.set(kCodes, columns / 4, 64);
  return config;
}

// The codes of 16 outputs, zero points taken off unless they are unsigned, and their scales and offsets (null: none), of
// `blocks` blocks; `line` bytes lie between the codes of one word of columns and the next, scale_line floats between the
// scales of two blocks or half blocks.
struct AmxCodes {
  const std::byte* codes;
  const float *scales, *offsets;
  ptrdiff_t line, scale_line;
  int blocks;
};

// height × 16 sums over the blocks of a piece, continuing the chains in `out` unless `fresh`. Of the results of rows from
// num_rows on, which are copies of the last, only one is kept.
template <int height, bool last, bool halves, bool unsigned_codes>
GLM_FLATTEN void multiply_amx(const Int8Group* x, const AmxCodes& w, int num_rows, Ahead ahead, float* out, ptrdiff_t out_stride, bool fresh) {
  constexpr int parts = halves ? 2 : 1, columns = kBlockColumns / parts, words = columns / 4;
  constexpr int sums_tile = last ? kLastSums : kFullSums, rows_tile = last ? kLastRows : kFullRows;
  alignas(64) int32_t sums[kChunkBlocks * parts][height * kTileRows];
  for (int b = 0; b < w.blocks; ++b) {
    unroll<parts>([&](auto half) {
      const int step = b * parts + half.v;
      clear_tile<sums_tile>();
      load_tile<rows_tile>(&x[b].codes[0][half.v * columns], kBlockColumns);
      load_tile<kCodes>(w.codes + step * words * w.line, w.line);
      multiply_tiles<sums_tile, rows_tile, kCodes, unsigned_codes>();
      store_tile<sums_tile>(sums[step], kTileRows * sizeof(int32_t));
    });
    for (int i = 0; i < ahead.lines; ++i, ahead.from += 64) __builtin_prefetch(ahead.from, 0, 2);
  }
  const auto to = [&](int m) { return out + (m < num_rows ? m : num_rows - 1) * out_stride; };
  F acc[height];
  unroll<height>([&](auto m) { acc[m.v] = fresh ? zero() : load(to(m.v)); });
  const float *scales = w.scales, *offsets = w.offsets;
  for (int step = 0; step < w.blocks * parts; ++step, scales += w.scale_line) {
    const Int8Group& group = x[step / parts];
    const F scale = load(scales);
    unroll<height>([&](auto m) {
      const F dot = mul(to_float(load_words(sums[step] + m.v * kTileRows)), broadcast(group.scales[m.v]));
      acc[m.v] = fma(dot, scale, acc[m.v]);
    });
    if (offsets == nullptr) continue;
    const F offset = load(offsets);
    offsets += w.scale_line;
    const float* x_sums = halves ? group.half_sums[step % parts] : group.sums;
    unroll<height>([&](auto m) { acc[m.v] = fma(broadcast(x_sums[m.v]), offset, acc[m.v]); });
  }
  unroll<height>([&](auto m) { store(to(m.v), acc[m.v]); });
}

template <bool halves, bool unsigned_codes>
auto amx_function(int height) {
  switch (height) {
    case 4: return multiply_amx<4, true, halves, unsigned_codes>;
    case 8: return multiply_amx<8, true, halves, unsigned_codes>;
    case 12: return multiply_amx<12, true, halves, unsigned_codes>;
    default: return multiply_amx<kGroupRows, false, halves, unsigned_codes>;
  }
}

// Rows of a lower group, which a tile product takes less time for.
GLM_INLINE int low_height(int rows) { return (rows + 3) / 4 * 4; }

template <bool halves, bool unsigned_codes>
void multiply_piece_amx(const PackedMatrix& w, int panel, const Piece& piece, const Int8Group* groups, int num_rows, int first, int count,
                        int lines_per_block, float* out, ptrdiff_t out_stride, const std::byte* next) {
  const int tiles = w.tiles_in(panel), num_groups = (num_rows + kGroupRows - 1) / kGroupRows;
  Spread spread(w, panel, first + count, lines_per_block, num_groups * tiles * count, next);
  for (int m = 0; m < num_rows; m += kGroupRows, groups += w.layout.blocks) {
    const int rows_here = num_rows - m < kGroupRows ? num_rows - m : kGroupRows;
    const auto multiply = amx_function<halves, unsigned_codes>(low_height(rows_here));
    for (int tile = 0; tile < tiles; ++tile) {
      const int at = tile * kTileRows;
      const AmxCodes codes{piece.codes + tile * 64, piece.scales + at, piece.has_offsets ? piece.offsets + at : nullptr,
                           tiles * 64, tiles * kTileRows, count};
      multiply(groups + first, codes, rows_here, spread.take(count), out + m * out_stride + at, out_stride, first == 0);
    }
  }
}

template <class Codec, bool halves>
void multiply_groups(const PackedMatrix& w, int panel, const Int8Group* groups, int num_rows, float* out, ptrdiff_t out_stride,
                     const std::byte* next) {
  const int blocks = int(w.layout.blocks), rest = num_rows % kGroupRows;
  const Piece piece = piece_scratch(w);
  const Tiles tiles(tile_config(kBlockColumns / (halves ? 2 : 1), rest == 0 ? kGroupRows : low_height(rest)));
  for (int first = 0; first < blocks; first += kChunkBlocks) {
    const int count = blocks - first < kChunkBlocks ? blocks - first : kChunkBlocks;
    take_apart<Codec>(w, panel, first, count, w.int8_zero_point, piece);
    widen_scales(w, panel, first, count, piece);
    const auto multiply = w.int8_zero_point == 0 ? multiply_piece_amx<halves, true> : multiply_piece_amx<halves, false>;
    multiply(w, panel, piece, groups, num_rows, first, count, Codec::lines, out, out_stride, next);
  }
}

template <class Codec>
void multiply_groups(const PackedMatrix& w, int panel, const Int8Group* groups, int num_rows, float* out, ptrdiff_t out_stride,
                     const std::byte* next) {
  if (in_halves(w)) multiply_groups<Codec, true>(w, panel, groups, num_rows, out, out_stride, next);
  else multiply_groups<Codec, false>(w, panel, groups, num_rows, out, out_stride, next);
}

}  // namespace
}  // namespace glmlocal::GLM_ISA
