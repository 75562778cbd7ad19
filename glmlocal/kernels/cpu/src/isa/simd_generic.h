// GCC and clang vector extensions: SSE2 on x86-64, NEON on aarch64, without naming either.
#pragma once

namespace glmlocal::GLM_ISA {

typedef float Quad __attribute__((vector_size(16)));
typedef uint32_t QuadU __attribute__((vector_size(16)));
typedef int32_t QuadI __attribute__((vector_size(16)));

struct F { Quad v[4]; };
struct U { QuadU v[4]; };
using Table = const float*;
using ByteBias = float;

template <class Out, class Op>
GLM_INLINE Out map(Op&& op) { return {{op(0), op(1), op(2), op(3)}}; }

GLM_INLINE QuadU blend(QuadU m, QuadU a, QuadU b) { return (a & m) | (b & ~m); }

GLM_INLINE F broadcast(float x) { const Quad q{x, x, x, x}; return {{q, q, q, q}}; }
GLM_INLINE F zero() { return broadcast(0); }
GLM_INLINE F load(const float* p) { F x; __builtin_memcpy(&x, p, sizeof x); return x; }
GLM_INLINE void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
GLM_INLINE F add(F a, F b) { return map<F>([&](int i) { return a.v[i] + b.v[i]; }); }
GLM_INLINE F sub(F a, F b) { return map<F>([&](int i) { return a.v[i] - b.v[i]; }); }
GLM_INLINE F mul(F a, F b) { return map<F>([&](int i) { return a.v[i] * b.v[i]; }); }
GLM_INLINE F div(F a, F b) { return map<F>([&](int i) { return a.v[i] / b.v[i]; }); }
inline constexpr bool kFmaIsFused = false;
GLM_INLINE F fma(F a, F b, F c) { return map<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
GLM_INLINE F where_less(F a, F b, F yes, F no) {
  return map<F>([&](int i) { return (Quad)blend((QuadU)(a.v[i] < b.v[i]), (QuadU)yes.v[i], (QuadU)no.v[i]); });
}
GLM_INLINE F max(F a, F b) { return where_less(b, a, a, b); }
GLM_INLINE F min(F a, F b) { return where_less(a, b, a, b); }
GLM_INLINE F round(F x) {  // to the nearest integer; right for |x| < 2^22
  const F magic = broadcast(12582912.0f);
  return sub(add(x, magic), magic);
}
GLM_INLINE F exp2_int(F n) {
  return map<F>([&](int i) { return (Quad)((QuadU)(__builtin_convertvector(n.v[i], QuadI) + 127) << 23); });
}

template <class T>
GLM_INLINE U load_narrow(const T* p) {
  return map<U>([&](int i) { return QuadU{p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]}; });
}
GLM_INLINE U load_bytes(const void* p) { return load_narrow((const uint8_t*)p); }
GLM_INLINE U load_halves(const void* p) { return load_narrow((const uint16_t*)p); }
GLM_INLINE U load_words(const void* p) { U x; __builtin_memcpy(&x, p, sizeof x); return x; }
GLM_INLINE U splat(uint32_t x) { const QuadU q{x, x, x, x}; return {{q, q, q, q}}; }
GLM_INLINE U shift_right(U x, int n) { return map<U>([&](int i) { return x.v[i] >> n; }); }
template <int n> GLM_INLINE U shr(U x) { return map<U>([&](int i) { return x.v[i] >> n; }); }
template <int n> GLM_INLINE U shl(U x) { return map<U>([&](int i) { return x.v[i] << n; }); }
template <int n> GLM_INLINE U sar(U x) { return map<U>([&](int i) { return (QuadU)((QuadI)x.v[i] >> n); }); }
GLM_INLINE U bit_and(U a, U b) { return map<U>([&](int i) { return a.v[i] & b.v[i]; }); }
GLM_INLINE U select(U m, U a, U b) { return map<U>([&](int i) { return blend(m.v[i], a.v[i], b.v[i]); }); }
GLM_INLINE F as_float(U x) { return map<F>([&](int i) { return (Quad)x.v[i]; }); }
GLM_INLINE U as_words(F x) { return map<U>([&](int i) { return (QuadU)x.v[i]; }); }

GLM_INLINE U max_words(U a, U b) {
  return map<U>([&](int i) { return blend((QuadU)((QuadI)a.v[i] > (QuadI)b.v[i]), a.v[i], b.v[i]); });
}
GLM_INLINE U sub_bytes(U a, U b) {
  using Bytes = uint8_t __attribute__((vector_size(16)));
  return map<U>([&](int i) { return (QuadU)((Bytes)a.v[i] - (Bytes)b.v[i]); });
}
GLM_INLINE U add_words(U a, U b) { return map<U>([&](int i) { return a.v[i] + b.v[i]; }); }
GLM_INLINE U to_words(F x) {
  const F nearest = round(x);
  return map<U>([&](int i) { return (QuadU)__builtin_convertvector(nearest.v[i], QuadI); });
}
GLM_INLINE F to_float(U x) { return map<F>([&](int i) { return __builtin_convertvector((QuadI)x.v[i], Quad); }); }
GLM_INLINE void store_words(void* p, U x) { __builtin_memcpy(p, &x, sizeof x); }
GLM_INLINE void store_low_bytes(int8_t* p, U x) {
  for (int i = 0; i < 16; ++i) p[i] = int8_t(x.v[i / 4][i % 4]);
}
template <int j> GLM_INLINE QuadI signed_byte(QuadU x) { return (QuadI)(x << (24 - 8 * j)) >> 24; }
GLM_INLINE U dot(U sums, U codes, U x) {
  return map<U>([&](int i) {
    QuadI total = (QuadI)sums.v[i];
    unroll<4>([&](auto j) { total += (QuadI)(codes.v[i] >> (8 * j.v) & 255) * signed_byte<j.v>(x.v[i]); });
    return (QuadU)total;
  });
}
using ByteTable = const uint8_t*;
GLM_INLINE ByteTable make_byte_table(const uint8_t* values) { return values; }
GLM_INLINE U lookup_bytes(ByteTable table, U index) {
  uint8_t bytes[64];
  store_words(bytes, index);
  for (int i = 0; i < 64; ++i) bytes[i] = table[bytes[i] & 15];
  return load_words(bytes);
}
GLM_INLINE int32_t sum_words(U x) {
  int32_t total = 0;
  for (int i = 0; i < 16; ++i) total += int32_t(x.v[i / 4][i % 4]);
  return total;
}
GLM_INLINE int32_t max_of_words(U x) {
  int32_t largest = INT32_MIN;
  for (int i = 0; i < 16; ++i) largest = int32_t(x.v[i / 4][i % 4]) > largest ? int32_t(x.v[i / 4][i % 4]) : largest;
  return largest;
}

template <class T>
GLM_INLINE F load_integers(const T* p) {
  return map<F>([&](int i) { return Quad{float(p[4 * i]), float(p[4 * i + 1]), float(p[4 * i + 2]), float(p[4 * i + 3])}; });
}
GLM_INLINE F load_i8(const int8_t* p) { return load_integers(p); }
GLM_INLINE F load_u8(const uint8_t* p) { return load_integers(p); }
GLM_INLINE F load_f16(const uint16_t* p) {
  return map<F>([&](int i) {
    const QuadU half{p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]};
    const QuadU magnitude = (half & 0x7fff) << 13;
    const QuadU not_finite = (QuadU)((half & 0x7c00) == 0x7c00);
    // Times 2^112 moves the exponent bias from 15 to 127 and normalizes subnormals.
    const QuadU finite = (QuadU)((Quad)magnitude * 0x1p112f);
    return (Quad)(blend(not_finite, magnitude | 0x7f800000, finite) | (half & 0x8000) << 16);
  });
}

GLM_INLINE Table make_table(const float* values) { return values; }
GLM_INLINE F lookup(Table table, U index) {
  return map<F>([&](int i) {
    const QuadU low = index.v[i] & 15;
    return Quad{table[low[0]], table[low[1]], table[low[2]], table[low[3]]};
  });
}
GLM_INLINE ByteBias byte_bias(float bias) { return bias; }
template <int j>
GLM_INLINE F byte_value(U words, ByteBias bias) {
  return map<F>([&](int i) { return __builtin_convertvector((QuadI)(words.v[i] >> (8 * j) & 255), Quad) - bias; });
}

// Lanes 8 apart first, then 4, 2, 1: the order of the other ISAs.
template <class Op>
GLM_INLINE float reduce(F x, Op&& op) {
  float lane[16];
  store(lane, x);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = op(lane[i], lane[i + width]);
  }
  return lane[0];
}
GLM_INLINE float sum(F x) { return reduce(x, [](float a, float b) { return a + b; }); }
GLM_INLINE float maximum(F x) { return reduce(x, [](float a, float b) { return a > b ? a : b; }); }

// While weights are decoded: rows at once, and accumulators (of 16 lanes) that leave registers for decoding.
inline constexpr int kGemvRows = 2, kGemvChains = 2, kGemvUnscaledChains = 2;
inline constexpr int kGemmRows = 2, kGemmTiles = 1;  // SSE2: 8 accumulators, 4 weights, 1 activation of 16 registers
inline constexpr int kDotRows = 2, kDotTiles = 1, kDotChains = 1;    // the same
inline constexpr int kDotGemvRows = 2, kDotGemvChains = 2;  // chains: and as many fp32 sums
inline constexpr bool kDotSumsInMemory = false, kDotInTiles = false;

}  // namespace glmlocal::GLM_ISA
