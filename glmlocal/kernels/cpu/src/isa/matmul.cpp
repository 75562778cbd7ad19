// Rows of activations times one panel (64 rows) of a packed matrix.
//
// Every output is one chain acc ← fma(w[k], x[k], acc) over k = 0, 1, 2 … with w the fp32 weight, whatever the number of
// rows and whichever of the two ways below runs: batching, chunking and threads never change a bit of the result.
//
//   few rows    weights are decoded in registers and used at once; bound by memory bandwidth
//   many rows   a panel is decoded to fp32 in L2-sized pieces and multiplied in register tiles; bound by fma throughput

#include "isa.h"
#include "isa/codecs.h"
#include "memory.h"

namespace glmlocal::GLM_ISA {
namespace {

constexpr int kChunkColumns = 512;  // 64 rows × 512 columns of fp32 = 128 KiB
constexpr int kHalfBlock = 16;      // columns that share a scale at least
constexpr ptrdiff_t kPrefetchBytes = 8192;  // about the latency of memory at full speed; 2048 costs a quarter of it

template <class Codec>
GLM_INLINE const std::byte* panel_codes(const PackedMatrix& w, int panel) {
  return w.data + w.layout.codes_offset + int64_t(panel) * kPanelTiles * w.layout.blocks * (Codec::lines * 64);
}

// scale and offset per tile; empty for codecs that need none.
template <bool scaled, int tiles> struct TileScales { F scale[tiles], offset[tiles]; };
template <int tiles> struct TileScales<false, tiles> {};

template <int k, class Codec, int tiles>
GLM_INLINE F weight(const Codec& codec, const typename Codec::Half& half, const TileScales<Codec::scaled, tiles>& scales, int tile) {
  const F value = codec.template value<k>(half);
  if constexpr (Codec::scaled) return fma(value, scales.scale[tile], scales.offset[tile]);
  else return value;
}

template <class Codec, int tiles>
GLM_INLINE void load_scales(const GroupScales& groups, int column, int first_tile, TileScales<Codec::scaled, tiles>& scales) {
  if constexpr (Codec::scaled) {
    unroll<tiles>([&](auto t) { groups.load_group(column, first_tile + t.v, scales.scale[t.v], scales.offset[t.v]); });
  }
}

// As many tiles at once as leave the accumulators in registers. Codecs without scales leave theirs to accumulators.
template <class Codec, int num_rows>
constexpr int tiles_of_few_rows() {
  constexpr int chains = (Codec::scaled ? kGemvChains : kGemvUnscaledChains) / num_rows;
  return chains >= 4 ? 4 : chains >= 2 ? 2 : 1;
}

// `num_rows` × `tiles` accumulators in registers; tiles first_tile … of the panel.
template <class Codec, int num_rows>
void multiply_few_rows(const PackedMatrix& w, int panel, int first_tile, const float* const* rows, float* const* out) {
  constexpr int tiles = tiles_of_few_rows<Codec, num_rows>();
  constexpr int block_bytes = Codec::lines * 64;
  const int panel_tiles = w.tiles_in(panel);
  const Codec codec(w);
  const GroupScales groups(w, panel, panel_tiles);
  const std::byte* block = panel_codes<Codec>(w, panel) + first_tile * block_bytes;
  const ptrdiff_t next_block = panel_tiles * block_bytes;
  constexpr ptrdiff_t own_bytes = tiles * block_bytes;
  const ptrdiff_t prefetch = (kPrefetchBytes + own_bytes - 1) / own_bytes * next_block;  // the same tiles, blocks ahead
  const bool scale_per_half = w.format.group_size == kHalfBlock;
  const float* x[num_rows];
  unroll<num_rows>([&](auto m) { x[m.v] = rows[m.v]; });

  F acc[num_rows][tiles];
  unroll<num_rows>([&](auto m) { unroll<tiles>([&](auto t) { acc[m.v][t.v] = zero(); }); });
  TileScales<Codec::scaled, tiles> scales;
  for (int column = 0; column < w.padded_in(); column += kBlockColumns, block += next_block) {
    for (int line = 0; line < tiles * Codec::lines; ++line) __builtin_prefetch(block + line * 64 + prefetch);
    for (int half = 0; half < 2; ++half) {
      const int first = column + half * kHalfBlock;
      if (half == 0 || scale_per_half) load_scales<Codec, tiles>(groups, first, first_tile, scales);
      typename Codec::Half lines[tiles];
      unroll<tiles>([&](auto t) { lines[t.v].open(block + t.v * block_bytes, half); });
      // One column of every tile, then the next column: independent chains hide the latency of fma.
      unroll<kHalfBlock>([&](auto k) {
        F activation[num_rows];
        unroll<num_rows>([&](auto m) { activation[m.v] = broadcast(x[m.v][first + k.v]); });
        unroll<tiles>([&](auto t) {
          const F value = weight<k.v, Codec, tiles>(codec, lines[t.v], scales, t.v);
          unroll<num_rows>([&](auto m) { acc[m.v][t.v] = fma(value, activation[m.v], acc[m.v][t.v]); });
        });
      });
    }
  }
  unroll<num_rows>([&](auto m) {
    unroll<tiles>([&](auto t) { store(out[m.v] + (first_tile + t.v) * kTileRows, acc[m.v][t.v]); });
  });
}

// A caller with fewer rows repeats its last one: each instantiation costs every build a third of a second.
template <class Codec, int num_rows>
void multiply_few_rows(const PackedMatrix& w, int panel, const float* const* given, int num_given, float* out, ptrdiff_t out_stride) {
  const float* rows[num_rows];
  float* to[num_rows];
  for (int m = 0; m < num_rows; ++m) {
    const int row = m < num_given ? m : num_given - 1;
    rows[m] = given[row];
    to[m] = out + row * out_stride;
  }
  constexpr int together = tiles_of_few_rows<Codec, num_rows>();
  for (int tile = 0; tile < w.tiles_in(panel); tile += together) multiply_few_rows<Codec, num_rows>(w, panel, tile, rows, to);
}

// out[k - begin][tiles * 16] for columns begin … end - 1, both multiples of 32.
template <class Codec>
void decode_columns(const PackedMatrix& w, int panel, int begin, int end, float* out) {
  constexpr int block_bytes = Codec::lines * 64;
  const int tiles = w.tiles_in(panel);
  const Codec codec(w);
  const GroupScales groups(w, panel, tiles);
  const bool scale_per_half = w.format.group_size == kHalfBlock;
  const std::byte* lines = panel_codes<Codec>(w, panel) + int64_t(begin / kBlockColumns) * tiles * block_bytes;
  const ptrdiff_t stride = tiles * kTileRows;
  for (int column = begin; column < end; column += kBlockColumns, out += kBlockColumns * stride) {
    for (int tile = 0; tile < tiles; ++tile, lines += block_bytes) {
      for (int line = 0; line < Codec::lines; ++line) __builtin_prefetch(lines + line * 64 + kPrefetchBytes);
      float* to = out + tile * kTileRows;
      TileScales<Codec::scaled, 1> scales;
      for (int half = 0; half < 2; ++half) {
        const int first = half * kHalfBlock;
        if (half == 0 || scale_per_half) load_scales<Codec, 1>(groups, column + first, tile, scales);
        typename Codec::Half columns;
        columns.open(lines, half);
        unroll<kHalfBlock>([&](auto k) { store(to + (first + k.v) * stride, weight<k.v, Codec, 1>(codec, columns, scales, 0)); });
      }
    }
  }
}

// A register tile: num_rows rows × `tiles` tiles over `columns` columns, continuing the chains in `out` unless `fresh`.
template <int num_rows, int tiles>
void multiply_tile(const float* weights, ptrdiff_t weight_stride, int columns, const float* const* rows, int first_column,
                   float* out, ptrdiff_t out_stride, bool fresh) {
  const float* x[num_rows];
  unroll<num_rows>([&](auto m) { x[m.v] = rows[m.v] + first_column; });
  F acc[num_rows][tiles];
  unroll<num_rows>([&](auto m) {
    unroll<tiles>([&](auto t) { acc[m.v][t.v] = fresh ? zero() : load(out + m.v * out_stride + t.v * kTileRows); });
  });
  for (int k = 0; k < columns; ++k, weights += weight_stride) {
    F value[tiles];
    unroll<tiles>([&](auto t) { value[t.v] = load(weights + t.v * kTileRows); });
    unroll<num_rows>([&](auto m) {
      const F activation = broadcast(x[m.v][k]);
      unroll<tiles>([&](auto t) { acc[m.v][t.v] = fma(value[t.v], activation, acc[m.v][t.v]); });
    });
  }
  unroll<num_rows>([&](auto m) {
    unroll<tiles>([&](auto t) { store(out + m.v * out_stride + t.v * kTileRows, acc[m.v][t.v]); });
  });
}

using TileFunction = void (*)(const float*, ptrdiff_t, int, const float* const*, int, float*, ptrdiff_t, bool);

// Tiles: kGemmTiles or 1.
template <int most_rows>
TileFunction tile_function(int num_rows, bool one_tile) {
  if constexpr (most_rows > 1) {
    if (num_rows < most_rows) return tile_function<most_rows - 1>(num_rows, one_tile);
  }
  return one_tile ? multiply_tile<most_rows, 1> : multiply_tile<most_rows, kGemmTiles>;
}

template <class Codec>
void multiply_many_rows(const PackedMatrix& w, int panel, const float* const* rows, int num_rows, float* out, ptrdiff_t out_stride) {
  float* weights = scratch(Scratch::panel, size_t(kChunkColumns) * kPanelRows);
  const int tiles = w.tiles_in(panel);
  const ptrdiff_t stride = tiles * kTileRows;
  int begin = 0;
  do {  // once even without columns, to write the zeros
    const int end = begin + kChunkColumns < w.padded_in() ? begin + kChunkColumns : w.padded_in();
    decode_columns<Codec>(w, panel, begin, end, weights);
    for (int tile = 0; tile < tiles;) {
      const bool one_tile = tiles - tile < kGemmTiles;
      for (int m = 0; m < num_rows; m += kGemmRows) {
        const int row_count = num_rows - m < kGemmRows ? num_rows - m : kGemmRows;
        tile_function<kGemmRows>(row_count, one_tile)(weights + tile * kTileRows, stride, end - begin, rows + m, begin,
                                                      out + m * out_stride + tile * kTileRows, out_stride, begin == 0);
      }
      tile += one_tile ? 1 : kGemmTiles;
    }
    begin += kChunkColumns;
  } while (begin < w.padded_in());
}

// At most kGemvRows rows, of a panel with all its tiles.
template <class Codec>
void multiply_in_registers(const PackedMatrix& w, int panel, const float* const* rows, int num_rows, float* out, ptrdiff_t out_stride) {
  if constexpr (kGemvRows >= 4) {
    if (num_rows > 2) return multiply_few_rows<Codec, 4>(w, panel, rows, num_rows, out, out_stride);
  }
  if (num_rows == 2) return multiply_few_rows<Codec, 2>(w, panel, rows, num_rows, out, out_stride);
  if (num_rows == 1) multiply_few_rows<Codec, 1>(w, panel, rows, num_rows, out, out_stride);
}

template <class Codec>
void multiply(const PackedMatrix& w, int panel, const float* const* rows, int num_rows, float* out, ptrdiff_t out_stride) {
  if (num_rows > 2 * kGemvRows || w.tiles_in(panel) != kPanelTiles) return multiply_many_rows<Codec>(w, panel, rows, num_rows, out, out_stride);
  // Decoding a panel twice in registers is cheaper than writing it to the cache once.
  const int first = num_rows > kGemvRows ? (num_rows + 1) / 2 : num_rows;
  multiply_in_registers<Codec>(w, panel, rows, first, out, out_stride);
  multiply_in_registers<Codec>(w, panel, rows + first, num_rows - first, out + first * out_stride, out_stride);
}

template <class Visit>
GLM_INLINE void with_codec(Codes codes, Visit&& visit) {
  switch (codes) {
    case Codes::f32: return visit.template operator()<F32Codec>();
    case Codes::bf16: return visit.template operator()<Bf16Codec>();
    case Codes::f16: return visit.template operator()<F16Codec>();
    case Codes::u8: return visit.template operator()<U8Codec>();
    case Codes::u6: return visit.template operator()<U6Codec>();
    case Codes::u5: return visit.template operator()<U5Codec>();
    case Codes::u4: return visit.template operator()<U4Codec>();
    case Codes::u3: return visit.template operator()<U3Codec>();
    case Codes::u2: return visit.template operator()<U2Codec>();
    case Codes::e4m3: return visit.template operator()<E4m3Codec>();
  }
}

}  // namespace

void panel_product(const PackedMatrix& w, int panel, const float* const* rows, int num_rows, float* out, ptrdiff_t out_stride) {
  with_codec(w.format.codes, [&]<class Codec>() { multiply<Codec>(w, panel, rows, num_rows, out, out_stride); });
}

void panel_weights(const PackedMatrix& w, int panel, float* out) {
  with_codec(w.format.codes, [&]<class Codec>() { decode_columns<Codec>(w, panel, 0, w.padded_in(), out); });
}

}  // namespace glmlocal::GLM_ISA
