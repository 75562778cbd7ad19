// The tile registers of AMX. GCC's intrinsics take no constant by name, and do not tell the compiler what they read.
#pragma once

#include "isa/simd.h"

namespace glmlocal::GLM_ISA {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int bytes) {
    rows[tile] = uint8_t(num_rows);
    row_bytes[tile] = uint16_t(bytes);
  }
};
static_assert(sizeof(TileConfig) == 64);

// The registers are in use as long as this lives.
class Tiles {
 public:
  explicit Tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int tile> GLM_INLINE void clear_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(tile)); }
template <int tile> GLM_INLINE void load_tile(const void* from, ptrdiff_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile> GLM_INLINE void store_tile(void* to, ptrdiff_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
// sums += rows (int8) · codes (int8, or unsigned)
template <int sums, int rows, int codes, bool unsigned_codes> GLM_INLINE void multiply_tiles() {
  if constexpr (unsigned_codes) asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(rows), "i"(codes));
  else asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(rows), "i"(codes));
}

}  // namespace glmlocal::GLM_ISA
