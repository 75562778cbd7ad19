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
//               (int8_registers.h)
//   … on AVX2   the same with fp32 sums in L1 (int8_memory.h)
//   … on AMX    the same with tile products (int8_amx.h)

#include "isa.h"
#include "isa/int8_memory.h"
#include "isa/int8_registers.h"
#if defined(__AMX_INT8__)
#include "isa/int8_amx.h"
#endif

namespace glmlocal::GLM_ISA {
namespace {

constexpr ptrdiff_t kPrefetchBytes = 4096;  // two threads: 8 KiB 0.97, 12 KiB 0.93, 16 KiB 0.85 of this; none at all 0.66

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
          const auto start = Sums::begin(start_of(rows[m.v][b], part_of(halves, half), zero_point));
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
          const U start = start_of(block, part_of(halves, half), zero_point);
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
          const F x_sum = broadcast(rows[m.v][b].sums[part_of(halves, half)]);
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

template <class Codec>
void multiply_many_rows(const PackedMatrix& w, int panel, const Int8Block* const* rows, int num_rows, float* out, ptrdiff_t out_stride,
                        const std::byte* next) {
  const int blocks = int(w.layout.blocks);
  const Piece piece = piece_scratch(w);
  int first = 0;
  do {  // once even without columns, to write the zeros
    const int count = blocks - first < kChunkBlocks ? blocks - first : kChunkBlocks;
    take_apart<Codec>(w, panel, first, count, kDotSumsInMemory ? 0 : shift_to_middle(w), piece);
    widen_scales(w, panel, first, count, piece);
    if constexpr (kDotSumsInMemory) multiply_piece_in_memory<Codec>(w, panel, piece, rows, num_rows, first, count, out, out_stride, next);
    else multiply_piece_in_registers<Codec>(w, panel, piece, rows, num_rows, first, count, out, out_stride, next);
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
  if (!done && groups != nullptr && w.layout.blocks != 0) return multiply_groups<Codec>(w, panel, groups, num_rows, out, out_stride, next);
#endif
  if (!done) multiply_many_rows<Codec>(w, panel, rows, num_rows, out, out_stride, next);
}

}  // namespace

// The scale without its last two digits, infinite from kInfiniteScale on.
GLM_INLINE float few_digits(float scale) {
  if (scale >= kInfiniteScale) return __builtin_inff();
  uint32_t bits;
  __builtin_memcpy(&bits, &scale, 4);
  bits &= ~3u;
  __builtin_memcpy(&scale, &bits, 4);
  return scale;
}

void quantize_row(const float* x, int blocks, Int8Block* out) {
  for (int b = 0; b < blocks; ++b, x += kBlockColumns) {
    Int8Block& block = out[b];
    const F first = load(x), second = load(x + 16);
    // Magnitudes order as integers too, and NaN is the largest: it survives in the scale.
    const U magnitude = splat(0x7fffffff);
    const int32_t bits = max_of_words(max_words(bit_and(as_words(first), magnitude), bit_and(as_words(second), magnitude)));
    float largest;
    __builtin_memcpy(&largest, &bits, 4);
    block.scale = few_digits(largest / 127.0f);
    block.minus_base = -kFloatBase * block.scale;
    // A subnormal scale has lost digits, and its inverse would be infinite.
    const F inverse = broadcast(block.scale < 1.17549435e-38f ? 0.0f : 127.0f / largest);
    const U finite = splat(block.scale < kInfiniteScale ? 0xffffffffu : 0u);
    const U a = bit_and(to_words(mul(first, inverse)), finite), c = bit_and(to_words(mul(second, inverse)), finite);
    store_low_bytes(block.codes, a);
    store_low_bytes(block.codes + 16, c);
    const int32_t half_sums[2] = {sum_words(a), sum_words(c)};
    const int32_t by_part[3] = {half_sums[0] + half_sums[1], half_sums[0], half_sums[1]};
    for (int part = kWholeBlock; part <= kSecondHalf; ++part) {
      block.starts[part] = kFloatBaseBits - kMiddleCode * by_part[part];
      block.sums[part] = block.scale * float(by_part[part]);
    }
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
