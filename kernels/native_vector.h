// Sixteen floats at a time: a register of AVX-512, or two of AVX2, and how many of them hold the sums of a product.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t LANES = 16;  // keys in a unit, and floats in a register
using Mask = uint16_t;         // of sixteen lanes, the first in bit 0

#ifdef __AVX512F__

constexpr int GROUP = 8;  // queries in registers at a time; with two units, 16 sums of 32 registers
constexpr int TALL = 8;   // the same, of the forward kernel
constexpr int WIDE = 2;   // units at a time
using Floats = __m512;

namespace vec {

inline Floats spread(float x) { return _mm512_set1_ps(x); }
inline Floats spread_bits(int32_t x) { return _mm512_castsi512_ps(_mm512_set1_epi32(x)); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load_some(const float* from, Mask mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline void store_some(float* to, Floats x, Mask mask) { _mm512_mask_storeu_ps(to, mask, x); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
// The second where either is NaN.
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats bits_of_both(Floats a, Floats b) { return _mm512_and_ps(a, b); }
inline Floats select(Mask mask, Floats x, Floats otherwise) { return _mm512_mask_mov_ps(otherwise, mask, x); }
inline Mask strange(Floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }
// Takes the nearest whole number from x, and returns it for `scale`, which makes 0 of the least power.
constexpr float LEAST_POWER = -1000;
inline Floats split(Floats& x) {
    const Floats whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = _mm512_sub_ps(x, whole);
    return whole;
}
// x · 2^whole.
inline Floats scale(Floats x, Floats whole) { return _mm512_scalef_ps(x, whole); }
// What `split` takes.
inline Floats within_powers(Floats x) { return x; }

// Of 16 rows of 32-bit words, `stride` apart, `count` columns (16 or fewer), each as the 16 words of a register.
inline void transpose(const int32_t* rows, int64_t stride, int64_t count, int32_t* to) {
    __m512i a[LANES], b[LANES];
    const Mask held = (1u << count) - 1;
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; ++i) a[i] = _mm512_maskz_loadu_epi32(held, rows + i * stride);
#pragma GCC unroll 8
    for (int64_t i = 0; i < LANES; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    // Then a[4 i + j] holds in its quarter q column 4 q + j of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
    for (int64_t i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
        for (int64_t j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
        const __m512i even[2] = {_mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88)};
        const __m512i odd[2] = {_mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd), _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd)};
        b[j] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        b[4 + j] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        b[8 + j] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        b[12 + j] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; ++i)
        if (i < count) _mm512_storeu_si512(to + i * LANES, b[i]);
}

}  // namespace vec

#else

constexpr int GROUP = 4;  // queries in registers at a time: 8 sums of 16 registers
constexpr int TALL = 6;   // the same, of the forward kernel: 12 sums
constexpr int WIDE = 1;   // units at a time
constexpr int64_t HALF = LANES / 2;
struct Floats {
    __m256 low, high;
};

namespace vec {

inline Floats spread(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats spread_bits(int32_t x) { return {_mm256_castsi256_ps(_mm256_set1_epi32(x)), _mm256_castsi256_ps(_mm256_set1_epi32(x))}; }
inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + HALF)}; }
inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x.low), _mm256_storeu_ps(to + HALF, x.high); }
// All bits of the lanes that eight bits of a mask name.
inline __m256i lanes(int32_t mask) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), each), each);
}
inline Floats load_some(const float* from, Mask mask) { return {_mm256_maskload_ps(from, lanes(mask)), _mm256_maskload_ps(from + HALF, lanes(mask >> HALF))}; }
inline void store_some(float* to, Floats x, Mask mask) {
    _mm256_maskstore_ps(to, lanes(mask), x.low), _mm256_maskstore_ps(to + HALF, lanes(mask >> HALF), x.high);
}
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return {_mm256_fmadd_ps(a.low, b.low, sum.low), _mm256_fmadd_ps(a.high, b.high, sum.high)}; }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats subtract(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
// The second where either is NaN.
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats bits_of_both(Floats a, Floats b) { return {_mm256_and_ps(a.low, b.low), _mm256_and_ps(a.high, b.high)}; }
inline Floats select(Mask mask, Floats x, Floats otherwise) {
    if (mask == 0xffff) return x;
    return {_mm256_blendv_ps(otherwise.low, x.low, _mm256_castsi256_ps(lanes(mask))),
            _mm256_blendv_ps(otherwise.high, x.high, _mm256_castsi256_ps(lanes(mask >> HALF)))};
}
inline Mask strange(Floats x) {
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.low, x.low, _CMP_UNORD_Q)), high = _mm256_movemask_ps(_mm256_cmp_ps(x.high, x.high, _CMP_UNORD_Q));
    return static_cast<Mask>(low | high << HALF);
}
inline float sum_of(Floats x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest_of(Floats x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
// Takes the nearest whole number from x, -127 ... 128, and returns it for `scale`: in the last bits of a large float.
constexpr float LEAST_POWER = -127;
inline __m256 split(__m256& x) {
    const __m256 large = _mm256_set1_ps(12582912), sum = _mm256_add_ps(x, large);
    x = _mm256_sub_ps(x, _mm256_sub_ps(sum, large));
    return sum;
}
inline Floats split(Floats& x) {
    const __m256 low = split(x.low), high = split(x.high);
    return {low, high};
}
// x · 2^whole for an x of 0.7 to 1.4, by its exponent's bits: 1 becomes 0 at -127, and infinite at 128.
inline __m256 scale(__m256 x, __m256 whole) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(whole), 23)));
}
inline Floats scale(Floats x, Floats whole) { return {scale(x.low, whole.low), scale(x.high, whole.high)}; }
// What `split` takes, and NaN.
inline Floats within_powers(Floats x) { return {_mm256_min_ps(_mm256_set1_ps(128), x.low), _mm256_min_ps(_mm256_set1_ps(128), x.high)}; }

// Of 8 rows of 32-bit words, `stride` apart, `count` columns (8 or fewer), each as 8 words, LANES apart.
inline void transpose_half(const int32_t* rows, int64_t stride, int64_t count, int32_t* to) {
    __m256 a[HALF], b[HALF];
    const __m256i held = lanes((1 << count) - 1);
#pragma GCC unroll 8
    for (int64_t i = 0; i < HALF; ++i) a[i] = _mm256_castsi256_ps(_mm256_maskload_epi32(rows + i * stride, held));
#pragma GCC unroll 4
    for (int64_t i = 0; i < HALF; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    // Then a[4 i + j] holds in its half h column 4 h + j of rows 4 i to 4 i + 3.
#pragma GCC unroll 2
    for (int64_t i = 0; i < HALF; i += 4)
#pragma GCC unroll 2
        for (int64_t j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
            a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
        }
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
        b[j] = _mm256_permute2f128_ps(a[j], a[4 + j], 0x20);
        b[4 + j] = _mm256_permute2f128_ps(a[j], a[4 + j], 0x31);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < HALF; ++i)
        if (i < count) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * LANES), _mm256_castps_si256(b[i]));
}

// Of 16 rows of 32-bit words, `stride` apart, `count` columns (16 or fewer), each as 16 words.
inline void transpose(const int32_t* rows, int64_t stride, int64_t count, int32_t* to) {
    for (int64_t first = 0; first < count; first += HALF)
        for (int64_t row = 0; row < LANES; row += HALF)
            transpose_half(rows + row * stride + first, stride, count - first < HALF ? count - first : HALF, to + first * LANES + row);
}

}  // namespace vec

#endif

}  // namespace
