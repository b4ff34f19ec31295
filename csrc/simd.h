// One vector width a machine, chosen at compile time; the compiler's vector extensions do the
// rest, so that the same source serves AVX-512, AVX2, NEON and plain SSE. Also the element types of
// rows and pool, and their conversions from and to fp32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace blend {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t vb __attribute__((vector_size(W)));

template <typename V, typename T>
inline V load_as(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V, typename T>
inline void store_as(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

inline vf load(const float* from) { return load_as<vf>(from); }
inline void store(float* to, vf value) { store_as(to, value); }
inline vf splat(float value) { return value - vf{}; }

inline float sum(vf v) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += v[i];
  return total;
}

inline vf max(vf a, vf b) { return a > b ? a : b; }

inline float max(vf v) {
  float best = v[0];
  for (int i = 1; i < W; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// 2^x for |x| < 2^22, relative error below 2e-7; exactly 0 below 2^-126 (also for -inf).
inline vf exp2(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf shifted = x + magic;
  const vf f = x - (shifted - magic);
  vf p = splat(1.32764713e-3f);  // minimax on [-1/2, 1/2], relative error 7.5e-8
  p = p * f + 9.67554096e-3f;
  p = p * f + 5.55071309e-2f;
  p = p * f + 2.40221202e-1f;
  p = p * f + 6.93146944e-1f;
  p = p * f + 1.00000012f;
  const vi exponent = (vi)shifted << 23;  // the magic's own bits fall out at the top
  const vf scaled = (vf)((vi)p + exponent);
  return x > -126.0f ? scaled : vf{};
}

// tanh, absolute error below 2e-7 and relative error below 1e-6.
inline vf tanh(vf x) {
  const vf small = x * x;
  const vf series = x * (1.0f + small * (-1.0f / 3 + small * (2.0f / 15 + small * (-17.0f / 315))));
  const vf bounded = x > 20.0f ? splat(20.0f) : (x < -20.0f ? splat(-20.0f) : x);
  const vf grown = exp2(bounded * 2.885390082f);
  const vf closed = 1.0f - 2.0f / (grown + 1.0f);
  return small < 0.04f ? series : closed;
}

// Element types: how one vector or one element of the pool reads and writes as fp32.

struct F32 {
  typedef float type;
  static vf read(const type* from) { return load(from); }
  static void write(type* to, vf value) { store(to, value); }
  static float get(const type* from) { return *from; }
  static void put(type* to, float value) { *to = value; }
};

struct BF16 {
  typedef uint16_t type;
  static vf read(const type* from) {
    return (vf)(__builtin_convertvector(load_as<vh>(from), vu) << 16);
  }
  static void write(type* to, vf value) {
    const vu bits = (vu)value;
    const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const vu kept = value == value ? rounded : (vu{} + 0x7fc0u);
    store_as(to, __builtin_convertvector(kept, vh));
  }
  static float get(const type* from) {
    const uint32_t bits = (uint32_t)*from << 16;
    return load_as<float>(&bits);
  }
  static void put(type* to, float value) {
    const uint32_t bits = load_as<uint32_t>(&value);
    *to = value == value ? (type)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : 0x7fc0;
  }
};

struct F16 {
  typedef _Float16 type;
  static vf read(const type* from) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(load_as<__m256i>(from));
#elif defined(__F16C__) && defined(__AVX__)
    return (vf)_mm256_cvtph_ps(load_as<__m128i>(from));
#else
    vf value;
    for (int i = 0; i < W; ++i) value[i] = (float)from[i];
    return value;
#endif
  }
  static void write(type* to, vf value) {
#if defined(__AVX512F__)
    store_as(to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX__)
    store_as(to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < W; ++i) to[i] = (type)value[i];
#endif
  }
  static float get(const type* from) { return (float)*from; }
  static void put(type* to, float value) { *to = (type)value; }
};

// fp8 of M bits of mantissa, as torch has it: e4m3fn (no infinity, NaN is 0x7f) and e5m2. Writing
// rounds to nearest even and saturates at the largest finite value; NaN stays NaN.
template <int M>
struct F8 {
  typedef uint8_t type;

  static vf read(const type* from) {
    const vu code = __builtin_convertvector(load_as<vb>(from), vu);
    const vu magnitude = code & 0x7f;
    // In a float's exponent and mantissa the code is a number 2^(127 - BIAS) too small; what has
    // no implicit one (exponent 0) takes one on loan.
    const vf normal = (vf)((magnitude << SHIFT) + ((127 - BIAS) << 23));
    const vf small = (vf)((magnitude << SHIFT) + ((128 - BIAS) << 23)) - LEAST;
    const vf value = magnitude < (1 << M) ? small : normal;
    const vf above = M == 3 ? splat(NAN) : (magnitude == TOP + 1 ? splat(INFINITY) : splat(NAN));
    return (vf)((vu)(magnitude > TOP ? above : value) | (code & 0x80) << 24);
  }
  static void write(type* to, vf value) {
    const vu bits = (vu)value, exact = bits & 0x7fffffff;
    const vf magnitude = (vf)exact;
    const vf kept = magnitude > LARGEST ? splat(LARGEST) : magnitude;
    const vu normal = rounded((vu)kept) - ((127 - BIAS) << M);
    // Below the least normal number, codes count its steps: the sum's last bits are the code.
    const vu small = (vu)(kept + STEPS) - STEPS_BITS;
    const vu code = kept < LEAST ? small : normal;
    const vu known = magnitude == magnitude ? code : vu{} + 0x7f;
    store_as(to, __builtin_convertvector(known | bits >> 24 & 0x80, vb));
  }
  static float get(const type* from) {
    type lanes[W] = {*from};
    return read(lanes)[0];
  }
  static void put(type* to, float value) {
    type lanes[W];
    write(lanes, splat(value));
    *to = lanes[0];
  }

 private:
  static constexpr int BIAS = M == 3 ? 7 : 15;
  static constexpr int SHIFT = 23 - M;
  static constexpr uint32_t TOP = M == 3 ? 0x7e : 0x7b;  // the largest finite code
  static constexpr float LARGEST = M == 3 ? 448.0f : 57344.0f;
  static constexpr float LEAST = M == 3 ? 0x1p-6f : 0x1p-14f;  // the least normal number
  static constexpr float STEPS = M == 3 ? 0x1p14f : 0x1p7f;    // its step is fp8's least
  static constexpr uint32_t STEPS_BITS = M == 3 ? 0x46800000 : 0x43000000;

  static vu rounded(vu bits) {
    return (bits + ((1u << (SHIFT - 1)) - 1) + (bits >> SHIFT & 1)) >> SHIFT;
  }
};

typedef F8<3> E4M3;
typedef F8<2> E5M2;

// Swap neighbours: lane i takes lane i ^ 1.
template <int... J>
inline vf swap_pairs(vf v, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(v, v, (J ^ 1)...);
}
inline vf swap_pairs(vf v) { return swap_pairs(v, std::make_integer_sequence<int, W>{}); }

// Transpose of W x W in registers: at each step, blocks of S change places across the diagonal.
template <int S, int... J>
inline void transpose_step(vf* r, std::integer_sequence<int, J...>) {
  for (int i = 0; i < W; ++i) {
    if (i & S) continue;
    const vf a = r[i], b = r[i + S];
    r[i] = __builtin_shufflevector(a, b, ((J & S) ? W + J - S : J)...);
    r[i + S] = __builtin_shufflevector(a, b, ((J & S) ? W + J : J + S)...);
  }
}
inline void transpose(vf* r) {
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
  if constexpr (W >= 16) transpose_step<8>(r, lanes);
  if constexpr (W >= 8) transpose_step<4>(r, lanes);
  transpose_step<2>(r, lanes);
  transpose_step<1>(r, lanes);
}

}  // namespace blend
