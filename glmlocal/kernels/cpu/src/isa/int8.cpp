// Rows of int8 activations times one panel (64 rows) of a matrix of integer codes.
//
// Per block of 32 columns (16 where the scales are finer) every output takes
//
//   dot ← Σ (code - zero_point) · x                     exact, in int32
//   acc ← fma(float(dot) · x_scale, w_scale, acc)
//   acc ← fma(x_scale · float(Σ x), w_offset, acc)      where the scheme has offsets
//
// in the order of the columns, whatever the number of rows and whichever of the ways below runs: batching, chunking
// and threads never change a bit of the result.
//
//   few rows    codes are taken apart in registers and used at once; bound by memory bandwidth
//   many rows   a piece of a panel is taken apart into L1 and multiplied in register tiles; bound by the dot products
//   … on AMX    the same with tile products (int8_amx.h)

#include "isa.h"
#include "isa/int8_piece.h"
#if defined(__AMX_INT8__)
#include "isa/int8_amx.h"
#endif

namespace glmlocal::GLM_ISA {
namespace {

constexpr ptrdiff_t kPrefetchBytes = 4096;  // two threads: 8 KiB 0.97, 12 KiB 0.93, 16 KiB 0.85 of this; none at all 0.66

GLM_INLINE uint32_t word_of(const Int8Block& block, int quad) {
  uint32_t word;
  __builtin_memcpy(&word, block.codes + quad * 4, 4);
  return word;
}

// What a sum starts from, for one block of one row, or half of it: codes mean code - zero_point.
GLM_INLINE int32_t sum_of(const Int8Block& block, bool halves, int half) { return halves ? block.half_sums[half] : block.sum; }
GLM_INLINE U start_of(int32_t sum, int zero_point) { return splat(uint32_t(-zero_point * sum)); }

// fp32 sums, in registers or, where those are few, in memory that stays in L1.
template <bool in_memory, int count> struct TileSums;
template <int count> struct TileSums<false, count> {
  F sums[count];
  GLM_INLINE explicit TileSums(float*) {}
  GLM_INLINE F get(int i) const { return sums[i]; }
  GLM_INLINE void set(int i, F x) { sums[i] = x; }
  GLM_INLINE void stay() {}
  GLM_INLINE void next() {}
  GLM_INLINE void rewind(float*) {}
};
template <int count> struct TileSums<true, count> {
  float* sums;
  GLM_INLINE explicit TileSums(float* memory) : sums(memory) {}
  GLM_INLINE F get(int i) const { return load(sums + i * kTileRows); }
  GLM_INLINE void set(int i, F x) { store(sums + i * kTileRows, x); }
  // They are not loaded before they are wanted: GCC would do so ahead of a branch, and put them on the stack.
  GLM_INLINE void stay() { asm volatile("" : "+r"(sums)); }
  GLM_INLINE void next() { sums += count * kTileRows; }
  GLM_INLINE void rewind(float* memory) { sums = memory; }
};

template <int num_rows>
constexpr int kTilesOfFewRows = kDotGemvChains / num_rows >= 4 ? 4 : kDotGemvChains / num_rows >= 2 ? 2 : 1;

// `groups` times `tiles` tiles of a panel from first_tile on, block by block, so that memory is read in its order. More than
// one group needs kDotSumsInMemory. Rows and results of a caller with fewer than num_rows rows are repeated.
template <class Codec, class Scales, int num_rows>
GLM_FLATTEN void multiply_few_rows(const PackedMatrix& w, int panel, int first_tile, int groups, const Int8Block* const* rows,
                                   float* const* out, const std::byte* next) {
  using Sums = Dots<Codec::bits>;
  constexpr int tiles = kTilesOfFewRows<num_rows>, count = num_rows * tiles;
  constexpr int block_bytes = Codec::lines * 64;
  const int panel_tiles = w.tiles_in(panel);
  const Codec codec(w);
  const Scales scales(w, panel, panel_tiles);
  const std::byte* lines = w.panel_codes(panel) + first_tile * block_bytes;
  const ptrdiff_t own_bytes = groups * tiles * block_bytes, skipped_bytes = panel_tiles * block_bytes - own_bytes;
  const int blocks_ahead = int((kPrefetchBytes + own_bytes - 1) / own_bytes);
  const bool past_caches = reads_past_caches();
  const int zero_point = w.int8_zero_point;
  const bool offsets = Scales::may_have_offsets && w.format.has_min;
  const bool halves = Scales::may_have_halves && in_halves(w);
  const int blocks = int(w.layout.blocks);
  if (next == nullptr) next = lines;
  const std::byte* ahead = blocks > blocks_ahead ? lines + blocks_ahead * (own_bytes + skipped_bytes) : next;
  float* const memory = kDotSumsInMemory ? scratch(Scratch::panel, num_rows * kPanelRows) : nullptr;
  TileSums<kDotSumsInMemory, count> acc(memory);
  for (int g = 0; g < groups; ++g, acc.next()) unroll<count>([&](auto i) { acc.set(i.v, zero()); });
  for (int b = 0; b < blocks; ++b, lines += skipped_bytes, ahead += skipped_bytes) {
    if (b + blocks_ahead == blocks) ahead = next;
    acc.rewind(memory);
    for (int tile = first_tile; tile < first_tile + groups * tiles; tile += tiles) {
      // The next panel is fetched from four places at once, into L2, where fp32 sums are in memory (AVX2 without VNNI) and where
      // whole panels are multiplied on Intel's: on Zen 3 1.05 times as fast as fetching what comes next here.
      const std::byte* later = next + (ptrdiff_t(tile) * blocks + b) * block_bytes;
      unroll<tiles * Codec::lines>([&](auto line) {
        if constexpr (kDotSumsInMemory) __builtin_prefetch(later + line.v * 64, 0, 2);
        else if (past_caches) __builtin_prefetch(ahead + line.v * 64, 0, 0);
        else if (tiles < kPanelTiles) __builtin_prefetch(ahead + line.v * 64, 0, 3);
        else __builtin_prefetch(later + (line.v / Codec::lines * blocks * Codec::lines + line.v % Codec::lines) * 64, 0, 2);
      });
      typename Sums::Partial sums[count];
      const auto begin = [&](int half) {
        unroll<num_rows>([&](auto m) {
          const auto start = Sums::begin(start_of(sum_of(rows[m.v][b], halves, half), zero_point));
          unroll<tiles>([&](auto t) { sums[m.v * tiles + t.v] = start; });
        });
      };
      const auto end = [&](int half) {
        const int column = b * kBlockColumns + half * (kBlockColumns / 2);
        acc.stay();
        F scale[tiles];
        unroll<tiles>([&](auto t) { scale[t.v] = scales.load_scale(column, tile + t.v); });
        unroll<num_rows>([&](auto m) {
          const Int8Block& block = rows[m.v][b];
          const U start = start_of(sum_of(block, halves, half), zero_point);
          const F x_scale = broadcast(block.scale);
          unroll<tiles>([&](auto t) {
            constexpr int i = m.v * tiles + t.v;
            acc.set(i, fma(mul(to_float(Sums::end(start, sums[i])), x_scale), scale[t.v], acc.get(i)));
          });
        });
        if (!offsets) return;
        F offset[tiles];
        unroll<tiles>([&](auto t) { offset[t.v] = scales.load_offset(column, tile + t.v); });
        unroll<num_rows>([&](auto m) {
          const F x_sum = broadcast(rows[m.v][b].scale * float(sum_of(rows[m.v][b], halves, half)));
          unroll<tiles>([&](auto t) {
            constexpr int i = m.v * tiles + t.v;
            acc.set(i, fma(x_sum, offset[t.v], acc.get(i)));
          });
        });
      };
      begin(0);
      unroll<kQuads>([&](auto q) {
        if constexpr (q.v == kQuads / 2) {
          if (halves) {
            end(0);
            begin(1);
          }
        }
        unroll<tiles>([&](auto t) {
          const U codes = codec.template quad<q.v>(lines + t.v * block_bytes);
          unroll<num_rows>([&](auto m) {
            sums[m.v * tiles + t.v] = Sums::add(sums[m.v * tiles + t.v], codes, splat(word_of(rows[m.v][b], q.v)));
          });
        });
      });
      end(halves ? 1 : 0);
      lines += tiles * block_bytes;
      ahead += tiles * block_bytes;
      acc.next();
    }
  }
  acc.rewind(memory);
  for (int tile = first_tile; tile < first_tile + groups * tiles; tile += tiles) {
    unroll<num_rows>([&](auto m) {
      unroll<tiles>([&](auto t) { store(out[m.v] + (tile + t.v) * kTileRows, acc.get(m.v * tiles + t.v)); });
    });
    acc.next();
  }
}

// Returns whether the panel's tiles can be taken so many at a time; a ragged last panel goes the other way.
template <class Codec, class Scales, int num_rows>
bool multiply_few_rows(const PackedMatrix& w, int panel, const Int8Block* const* given, int num_given, float* out, ptrdiff_t out_stride,
                       const std::byte* next) {
  constexpr int together = kTilesOfFewRows<num_rows>;
  const int tiles = w.tiles_in(panel);
  if (tiles % together != 0) return false;
  const Int8Block* rows[num_rows];
  float* to[num_rows];
  for (int m = 0; m < num_rows; ++m) {
    const int row = m < num_given ? m : num_given - 1;
    rows[m] = given[row];
    to[m] = out + row * out_stride;
  }
  const int groups = kDotSumsInMemory ? tiles / together : 1;
  for (int tile = 0; tile < tiles; tile += groups * together) {
    const int end = tile + groups * together;
    const std::byte* after = end < tiles ? w.panel_codes(panel) + end * (Codec::lines * 64) : next;
    multiply_few_rows<Codec, Scales, num_rows>(w, panel, tile, groups, rows, to, after);
  }
  return true;
}

template <class Codec, class Scales>
bool multiply_few_rows(const PackedMatrix& w, int panel, const Int8Block* const* rows, int num_rows, float* out, ptrdiff_t out_stride,
                       const std::byte* next) {
  if (num_rows > kDotGemvRows) return false;
  if constexpr (kDotGemvRows >= 4) {
    if (num_rows > 2) return multiply_few_rows<Codec, Scales, 4>(w, panel, rows, num_rows, out, out_stride, next);
  }
  if (num_rows == 2) return multiply_few_rows<Codec, Scales, 2>(w, panel, rows, num_rows, out, out_stride, next);
  return multiply_few_rows<Codec, Scales, 1>(w, panel, rows, num_rows, out, out_stride, next);
}

// num_rows × tiles sums over the blocks of a piece, continuing the chains in `out` unless `fresh`.
// panel_tiles is the piece's number of tiles; its pointers are at the first of ours.
template <int bits, int num_rows, int tiles>
GLM_FLATTEN void multiply_tile(const Piece& piece, int panel_tiles, int zero_point, const Int8Block* const* rows, int first_block, int blocks,
                               Ahead ahead, float* out, ptrdiff_t out_stride, bool fresh) {
  using Sums = TileDots<bits>;
  TileSums<kDotSumsInMemory, num_rows * tiles> acc(piece.sums);
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
      const auto start = Sums::begin(start_of(sum_of(x[m.v][b], halves, half), zero_point));
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
      const U start = start_of(sum_of(x[m.v][b], halves, half), zero_point);
      const F x_scale = broadcast(x[m.v][b].scale);
      unroll<tiles>([&](auto t) {
        constexpr int i = m.v * tiles + t.v;
        acc.set(i, fma(mul(to_float(Sums::end(start, sums[i])), x_scale), scale[t.v], acc.get(i)));
      });
    });
    scales += scale_line;
    if (!offsets) return;
    unroll<num_rows>([&](auto m) {
      const F x_sum = broadcast(x[m.v][b].scale * float(sum_of(x[m.v][b], halves, half)));
      unroll<tiles>([&](auto t) {
        constexpr int i = m.v * tiles + t.v;
        acc.set(i, fma(x_sum, load(all_offsets + t.v * kTileRows), acc.get(i)));
      });
    });
    all_offsets += scale_line;
  };
  for (int b = 0; b < blocks; ++b) {
    for (int i = 0; i < ahead.lines; ++i, ahead.from += 64) __builtin_prefetch(ahead.from, 0, 2);
    if (kDotSumsInMemory && !halves) {  // a loop would put integer sums on the stack where registers are few
      multiply(Constant<kQuads>{}, 1, b, 0);
    } else {
      for (int half = 0; half < (halves ? 2 : 1); ++half) multiply(Constant<kQuads / 2>{}, halves ? 1 : 2, b, half);
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
template <int bits>
void multiply_piece(const PackedMatrix& w, int panel, const Piece& piece, const Int8Block* const* rows, int num_rows, int first, int count,
                    int lines_per_block, float* out, ptrdiff_t out_stride, const std::byte* next) {
  constexpr int most_rows = TileDots<bits>::rows;
  const int tiles = w.tiles_in(panel);
  const int row_tiles = (num_rows + most_rows - 1) / most_rows;  // of nearly equal height
  Spread spread(w, panel, first + count, lines_per_block, row_tiles * ((tiles + kDotTiles - 1) / kDotTiles) * count, next);
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

template <class Codec>
void multiply_many_rows(const PackedMatrix& w, int panel, const Int8Block* const* rows, int num_rows, float* out, ptrdiff_t out_stride,
                        const std::byte* next) {
  const int blocks = int(w.layout.blocks);
  const Piece piece = piece_scratch(w);
  int first = 0;
  do {  // once even without columns, to write the zeros
    const int count = blocks - first < kChunkBlocks ? blocks - first : kChunkBlocks;
    take_apart<Codec>(w, panel, first, count, 0, piece);
    widen_scales(w, panel, first, count, piece);
    multiply_piece<kDotKnowsBits ? Codec::bits : 8>(w, panel, piece, rows, num_rows, first, count, Codec::lines, out, out_stride, next);
    first += count;
  } while (first < blocks);
}

template <class Codec>
void multiply(const PackedMatrix& w, int panel, const Int8Block* const* rows, [[maybe_unused]] const Int8Group* groups, int num_rows,
              float* out, ptrdiff_t out_stride, const std::byte* next) {
  const bool done = PlainScales::fit(w.format) && !in_halves(w)
                        ? multiply_few_rows<Codec, PlainScales>(w, panel, rows, num_rows, out, out_stride, next)
                        : multiply_few_rows<Codec, GroupScales>(w, panel, rows, num_rows, out, out_stride, next);
#if defined(__AMX_INT8__)
  if (!done && groups != nullptr && multiply_groups<Codec>(w, panel, groups, num_rows, out, out_stride, next)) return;
#endif
  if (!done) multiply_many_rows<Codec>(w, panel, rows, num_rows, out, out_stride, next);
}

}  // namespace

void quantize_row(const float* x, int blocks, Int8Block* out) {
  for (int b = 0; b < blocks; ++b, x += kBlockColumns) {
    Int8Block& block = out[b];
    const F first = load(x), second = load(x + 16);
    // Magnitudes order as integers too, and NaN is the largest: it survives in the scale.
    const U magnitude = splat(0x7fffffff);
    const int32_t bits = max_of_words(max_words(bit_and(as_words(first), magnitude), bit_and(as_words(second), magnitude)));
    float largest;
    __builtin_memcpy(&largest, &bits, 4);
    block.scale = largest / 127.0f;
    // A subnormal scale has lost digits, and its inverse would be infinite.
    const F inverse = broadcast(block.scale < 1.17549435e-38f ? 0.0f : 127.0f / largest);
    const U finite = splat(uint32_t(bits) < 0x7f800000u ? 0xffffffffu : 0u);
    const U a = bit_and(to_words(mul(first, inverse)), finite), c = bit_and(to_words(mul(second, inverse)), finite);
    store_low_bytes(block.codes, a);
    store_low_bytes(block.codes + 16, c);
    block.half_sums[0] = sum_words(a);
    block.half_sums[1] = sum_words(c);
    block.sum = block.half_sums[0] + block.half_sums[1];
  }
}

void panel_product_int8(const PackedMatrix& w, int panel, const Int8Block* const* rows, const Int8Group* groups, int num_rows, float* out,
                        ptrdiff_t out_stride, const std::byte* next) {
  switch (w.format.codes) {
    case Codes::u8: return multiply<Quads8>(w, panel, rows, groups, num_rows, out, out_stride, next);
    case Codes::u6: return multiply<Quads6>(w, panel, rows, groups, num_rows, out, out_stride, next);
    case Codes::u5: return multiply<Quads5>(w, panel, rows, groups, num_rows, out, out_stride, next);
    case Codes::u4:
      if (w.has_codebook) return multiply<QuadsOfTable>(w, panel, rows, groups, num_rows, out, out_stride, next);
      return multiply<Quads4>(w, panel, rows, groups, num_rows, out, out_stride, next);
    case Codes::u3: return multiply<Quads3>(w, panel, rows, groups, num_rows, out, out_stride, next);
    case Codes::u2: return multiply<Quads2>(w, panel, rows, groups, num_rows, out, out_stride, next);
    default: return;  // the others are never bound to int8 activations
  }
}

}  // namespace glmlocal::GLM_ISA
