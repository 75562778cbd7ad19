// A piece of a panel of integer codes, taken apart into L1: what the ways of multiplying many rows have in common.
// Included by int8.cpp alone.
#pragma once

#include "int8_rows.h"
#include "isa/int8_codecs.h"
#include "memory.h"

namespace glmlocal::GLM_ISA {
namespace {

constexpr int kQuads = kBlockColumns / 4;
constexpr int kChunkBlocks = kDotInTiles ? 8 : 16;  // 64 rows × 512 columns of bytes = 32 KiB, in L1 with the rows they meet; half beside tile sums

// Blocks whose scales are finer than they are end twice, after each half. One function does both, with a branch that
// always goes the same way: each instantiation costs every build a third of a second.
GLM_INLINE bool in_halves(const PackedMatrix& w) { return w.format.group_size < kBlockColumns; }

// A piece of a panel, taken apart: bytes [block][quad][tile][64], scales and offsets [block or half block][tile][16].
// `sums` has room for the fp32 sums of a register tile.
struct Piece {
  std::byte* codes;
  float *scales, *offsets, *sums;
  bool has_offsets, halves;
};

GLM_INLINE Piece piece_scratch(const PackedMatrix& w) {
  constexpr size_t bytes = size_t(kChunkBlocks) * kBlockColumns * kPanelRows, floats = size_t(kChunkBlocks) * 2 * kPanelRows;
  float* memory = scratch(Scratch::panel, bytes / sizeof(float) + 2 * floats + kDotRows * kDotTiles * kTileRows);
  float* scales = memory + bytes / sizeof(float);
  return {(std::byte*)memory, scales, scales + floats, scales + 2 * floats, w.format.has_min, in_halves(w)};
}

// Codes less `shift`.
template <class Codec>
GLM_FLATTEN void take_apart(const PackedMatrix& w, int panel, int first_block, int blocks, int shift, const Piece& piece) {
  constexpr int block_bytes = Codec::lines * 64;
  const int tiles = w.tiles_in(panel);
  const Codec codec(w);
  const U shifts = splat(uint8_t(shift) * 0x01010101u);
  const auto shifted = [&](auto codes) {
    if constexpr (kDotSumsInMemory) return codes;
    else return sub_bytes(codes, shifts);
  };
  const std::byte* lines = w.panel_codes(panel) + int64_t(first_block) * tiles * block_bytes;
  std::byte* to = piece.codes;
  for (int b = 0; b < blocks; ++b, to += kQuads * tiles * 64) {
    for (int t = 0; t < tiles; ++t, lines += block_bytes) {
      unroll<kQuads>([&](auto q) { store_words(to + (q.v * tiles + t) * 64, shifted(codec.template quad<q.v>(lines))); });
    }
  }
}

template <class Scales>
void widen_scales(const PackedMatrix& w, int panel, int first_block, int blocks, const Piece& piece) {
  const int tiles = w.tiles_in(panel), columns = kBlockColumns / (Scales::may_have_halves && piece.halves ? 2 : 1);
  const bool has_offsets = Scales::may_have_offsets && piece.has_offsets;
  const Scales groups(w, panel, tiles);
  float *scales = piece.scales, *offsets = piece.offsets;
  for (int column = first_block * kBlockColumns; column < (first_block + blocks) * kBlockColumns; column += columns) {
    for (int t = 0; t < tiles; ++t, scales += kTileRows, offsets += kTileRows) {
      store(scales, groups.load_scale(column, t));
      if (has_offsets) store(offsets, groups.load_offset(column, t));
    }
  }
}

void widen_scales(const PackedMatrix& w, int panel, int first_block, int blocks, const Piece& piece) {
  if (!PlainScales::fit(w.format) || piece.halves) return widen_scales<GroupScales>(w, panel, first_block, blocks, piece);
  widen_scales<PlainScales>(w, panel, first_block, blocks, piece);
  const int after = first_block + blocks, left = int(w.layout.blocks) - after, next = left < kChunkBlocks ? left : kChunkBlocks;
  if (left > 0) PlainScales(w, panel, w.tiles_in(panel)).prefetch(after * kBlockColumns, (after + next) * kBlockColumns);
}

GLM_INLINE uint32_t word_of(const Int8Block& block, int quad) {
  uint32_t word;
  __builtin_memcpy(&word, block.codes + quad * 4, 4);
  return word;
}

// What to bring into the cache meanwhile: `lines` at each step, one after another.
struct Ahead {
  const std::byte* from;
  int lines;
};

// The lines of the next piece of a panel, or of what comes after the panel, spread over the work on this one.
class Spread {
 public:
  Spread(const PackedMatrix& w, int panel, int after, int lines_per_block, int steps, const std::byte* next) {
    const int tiles = w.tiles_in(panel), blocks = int(w.layout.blocks);
    const int next_count = after < blocks ? blocks - after : kChunkBlocks;
    left_ = (next_count < kChunkBlocks ? next_count : kChunkBlocks) * tiles * lines_per_block;
    from_ = after < blocks ? w.panel_codes(panel) + int64_t(after) * tiles * lines_per_block * 64 : next;
    lines_ = steps == 0 || from_ == nullptr ? 0 : (left_ + steps - 1) / steps;
  }
  Ahead take(int steps) {
    const Ahead ahead{from_, lines_};
    from_ += steps * lines_ * 64;
    left_ -= steps * lines_;
    if (left_ <= 0) lines_ = 0;
    return ahead;
  }

 private:
  const std::byte* from_;
  int lines_, left_;
};

// What a sum is over.
constexpr int part_of(bool halves, int half) { return halves ? kFirstHalf + half : kWholeBlock; }
// What a sum starts from, for part of a block of one row: codes mean code - zero_point.
GLM_INLINE U start_of(const Int8Block& block, int part, int zero_point) { return splat(uint32_t(-zero_point * block.sum(part))); }

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

}  // namespace
}  // namespace glmlocal::GLM_ISA
