// The element types of a KV cache, and how a float becomes one. Every one of them widens to a float exactly.
//
// Always inlined, because files compiled for different instruction sets include this.
#pragma once

#include <cstddef>
#include <cstdint>

namespace glmlocal {

#define GLM_ALWAYS_INLINE inline __attribute__((always_inline))

// int8 has one fp32 scale per token and kv head for keys and one for values: value = code · scale.
enum class CacheType { f32, bf16, fp8, i8 };

struct Bf16 { uint16_t bits; };
struct Fp8 { uint8_t bits; };  // e4m3fn: no infinity, NaN is 0x7f, the largest number 448

// Calls f with a value of the element type.
template <class Body>
GLM_ALWAYS_INLINE auto with_element(CacheType type, Body&& f) {
  switch (type) {
    case CacheType::bf16: return f(Bf16{});
    case CacheType::fp8: return f(Fp8{});
    case CacheType::i8: return f(int8_t{});
    default: return f(float{});
  }
}

GLM_ALWAYS_INLINE size_t cache_itemsize(CacheType type) {
  return with_element(type, [](auto element) { return sizeof element; });
}

GLM_ALWAYS_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

GLM_ALWAYS_INLINE float convert_to(float, float x) { return x; }

// To the nearest, ties to even, as all of these.
GLM_ALWAYS_INLINE Bf16 convert_to(Bf16, float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};  // the payload may be in the lower half only
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Beyond ±448 it stays there, infinity too.
GLM_ALWAYS_INLINE Fp8 convert_to(Fp8, float x) {
  const uint8_t sign = uint8_t(bits_of(x) >> 24 & 0x80);
  float size = x < 0 ? -x : x;
  if (x != x) return {uint8_t(sign | 0x7f)};
  size = size < 448.0f ? size : 448.0f;
  if (size < 0x1p-6f) return {uint8_t(sign | (bits_of(size + 0x1p14f) & 15))};  // subnormal: 2^14 has 2^-9 as its last bit
  const uint32_t bits = bits_of(size);
  return {uint8_t(sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)))};
}

}  // namespace glmlocal
