// What the forward and the backward kernel share: a call's arguments, products of registers, and layouts of rows.
//
// Rows are multiplied by units, each of them 16 rows of another matrix. Units are laid out step by step along what is
// summed over, a step being the number of elements that one multiply-add sums: 2 in bfloat16, 1 in float32.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "native_vector.h"

namespace {

constexpr int64_t MOST_DIM = 256;
constexpr int64_t ROWS = 128;         // queries computed at a time
constexpr int64_t UNITS = 16;         // units computed at a time: their V and the scores of 8 queries fit a first-level cache
constexpr float SAFE_POWER = 100.0f;  // powers of two whose sums and products stay inside float32's range
constexpr float NOTHING = -INFINITY;

}  // namespace

// Mirrored field by field in native.py. Strides are in elements; H|1 and B|1 dimensions have stride 0.
struct Call {
    int64_t batch, heads, tokens, head_dim, padded_dim, tiles, tile;
    int64_t block, block_units, blocks, level_blocks, threads, wide_out;
    int64_t laid;  // key_units, value_units, unit_weight and longest hold what an earlier call laid out
    int64_t query_stride[3], key_stride[3], value_stride[3], pooled_key_stride[3], pooled_value_stride[3];
    int64_t weight_stride[2], list_stride[2], query_rows_stride, key_rows_stride;
    float scale;
    const void *query, *key, *value, *pooled_key, *pooled_value;
    const float* weight;
    const int32_t *key_rows, *query_rows, *count, *masked_count, *pool, *row_masks;
    const int64_t *start, *mask_start;
    void *key_units, *value_units;
    float *unit_weight, *longest;
    char* scratch;
    void* out;
    float* lse;
};

namespace {

struct Single {
    using Element = float;
    static constexpr int64_t step = 1;
    static Floats load(const float* from) { return vec::load(from); }
    static void store(float* to, Floats x) { vec::store(to, x); }
    static void store_steps(float* to, Floats even, Floats odd) {
        vec::store(to, even);
        vec::store(to + LANES, odd);
    }
    static Floats multiply_add(Floats sum, const float* one, Floats many) {
        return vec::multiply_add(vec::spread(*one), many, sum);
    }
    static Floats add_squares(Floats sum, const float* from) {
        const Floats x = vec::load(from);
        return vec::multiply_add(x, x, sum);
    }
    // Sixteen elements, zeros where the mask is not set.
    static void keep(float* to, const float* from, Mask mask) { vec::store(to, vec::load_some(from, mask)); }
    using Register = Floats;
    static Register panel(const float* from) { return vec::load(from); }
    static Floats bits(const float* from) { return vec::load(from); }
    static void store_bits(float* to, Floats x) { vec::store(to, x); }
    // All bits of a step's rows that `shown` names, the first in bit 0, and none of the others'.
    static Floats of_rows(uint32_t shown) { return vec::spread_bits(shown & 1 ? -1 : 0); }
    // What this leaves, 8e-8, is as much as float32's rounding. Of 0 it is exactly 1.
    static Floats exp2_of_fraction(Floats x) {
        Floats y = vec::spread(1.32746331e-3f);
        y = vec::multiply_add(y, x, vec::spread(9.67196189e-3f));
        y = vec::multiply_add(y, x, vec::spread(5.55067845e-2f));
        y = vec::multiply_add(y, x, vec::spread(2.40222350e-1f));
        y = vec::multiply_add(y, x, vec::spread(6.93147063e-1f));
        return vec::multiply_add(y, x, vec::spread(1.0f));
    }
};

#ifdef __AVX512BF16__
struct Brain {
    using Element = uint16_t;
    static constexpr int64_t step = 2;
    static __m512 load(const uint16_t* from) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static void store(uint16_t* to, __m512 x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
    }
    static void store_steps(uint16_t* to, __m512 even, __m512 odd) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
        _mm512_store_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    static __m512 add_squares(__m512 sum, const uint16_t* from) {
        const __m512bh x = (__m512bh)_mm512_loadu_si512(from);
        return _mm512_dpbf16_ps(sum, x, x);
    }
    static void keep(uint16_t* to, const uint16_t* from, Mask mask) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi16(mask, from));
    }
    using Register = __m512i;
    static Register panel(const uint16_t* from) { return _mm512_load_si512(from); }
    static Floats bits(const uint16_t* from) { return _mm512_castsi512_ps(_mm512_load_si512(from)); }
    static void store_bits(uint16_t* to, Floats x) { _mm512_store_si512(to, _mm512_castps_si512(x)); }
    static Floats of_rows(uint32_t shown) { return vec::spread_bits((shown & 1 ? 0xffff : 0) | (shown & 2 ? 0xffff0000 : 0)); }
    static __m512 multiply_add(__m512 sum, const uint16_t* one, Register many) {
        int32_t pair;
        std::memcpy(&pair, one, 4);
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)many);
    }
    // What this leaves, 3e-6, is a thousandth of bfloat16's rounding.
    static __m512 exp2_of_fraction(__m512 x) {
        __m512 y = _mm512_set1_ps(9.58285481e-3f);
        y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(5.59064262e-2f));
        y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(2.40240991e-1f));
        y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(6.93124175e-1f));
        return _mm512_fmadd_ps(y, x, _mm512_set1_ps(1.0f));
    }
};
#endif

// For an x that is far from overflow.
template <class Kind>
Floats exp2_of_safe(Floats x) {
    // The order of operands lets NaN through; below the least power all is 0.
    x = vec::larger(vec::spread(vec::LEAST_POWER), x);
    const Floats whole = vec::split(x);
    return vec::scale(Kind::exp2_of_fraction(x), whole);
}

template <class Kind>
Floats exp2(Floats x) {
    return exp2_of_safe<Kind>(vec::within_powers(x));
}

// sum[r][u] += rows[r] · columns[u] over `steps` steps.
template <class Kind, int U, int R>
inline void multiply(Floats (&sum)[R][U], const typename Kind::Element* rows, int64_t stride,
                     const typename Kind::Element* (&columns)[U], int64_t steps) {
    for (int64_t s = 0; s < steps; ++s) {
        typename Kind::Register many[U];
#pragma GCC unroll 2
        for (int u = 0; u < U; ++u) many[u] = Kind::panel(columns[u] + s * LANES * Kind::step);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
            for (int u = 0; u < U; ++u)
                sum[r][u] = Kind::multiply_add(sum[r][u], rows + r * stride + s * Kind::step, many[u]);
        }
    }
}

template <class Kind>
float squared(const typename Kind::Element* row, int64_t padded_dim) {
    Floats sum = vec::spread(0);
    for (int64_t d = 0; d < padded_dim; d += LANES) {
        const Floats x = Kind::load(row + d);
        sum = vec::multiply_add(x, x, sum);
    }
    return vec::sum_of(sum);
}

// The larger; NaN if either is.
inline float larger(float a, float b) { return a > b || a != a ? a : b; }

// The key and value of a pyramid row; null where it is padding.
template <class Element>
struct Row {
    const Element *key = nullptr, *value = nullptr;

    Row() = default;
    Row(const Call& call, int64_t entry, int64_t head, int64_t row) {
        const int64_t level = call.level_blocks * call.block;
        const bool fine = row < level;
        const int64_t token = fine ? call.key_rows[head * call.key_rows_stride + row] : row - level;
        if (token < 0) return;
        key = at(fine ? call.key : call.pooled_key, fine ? call.key_stride : call.pooled_key_stride, entry, head, token);
        value = at(fine ? call.value : call.pooled_value, fine ? call.value_stride : call.pooled_value_stride, entry, head, token);
    }

    static const Element* at(const void* base, const int64_t* stride, int64_t entry, int64_t head, int64_t token) {
        return static_cast<const Element*>(base) + entry * stride[0] + head * stride[1] + token * stride[2];
    }
};

// A row of `head_dim` elements, or none at all, with zeros up to D.
template <class Element>
void lay_row(const Element* from, int64_t head_dim, int64_t D, Element* to) {
    const int64_t held = from ? head_dim : 0;
    if (held) std::memcpy(to, from, held * sizeof(*to));
    if (held < D) std::memset(to + held, 0, (D - held) * sizeof(*to));
}

// Sixteen rows of D elements as a unit, whose products are summed over D: [D / step][row][step], a step being 32 bits.
template <class Kind>
void lay_along(const typename Kind::Element* rows, int64_t D, typename Kind::Element* to) {
    const int64_t words = D / Kind::step;
    for (int64_t first = 0; first < words; first += LANES)
        vec::transpose(reinterpret_cast<const int32_t*>(rows) + first, words, std::min(LANES, words - first), reinterpret_cast<int32_t*>(to) + first * LANES);
}

// The largest square of the length of a unit's rows, laid along; NaN if any is.
template <class Kind>
float longest_of(const typename Kind::Element* unit, int64_t D) {
    Floats sum = vec::spread(0);
    for (int64_t at = 0; at < D * LANES; at += LANES * Kind::step) sum = Kind::add_squares(sum, unit + at);
    return vec::strange(sum) ? NAN : vec::largest_of(sum);
}

// Sixteen rows of D elements as a unit, whose products are summed over the rows: [D / 16][row / step][column][step].
template <class Kind>
void lay_across(const typename Kind::Element* rows, int64_t D, typename Kind::Element* to) {
    for (int64_t d = 0; d < D; d += LANES)
        for (int64_t lane = 0; lane < LANES; lane += 2)
            Kind::store_steps(to + (d + lane) * LANES, Kind::load(rows + lane * D + d), Kind::load(rows + (lane + 1) * D + d));
}

// The 16 pyramid rows of a unit, zeros where they are not read, and their log-weights in powers of two.
template <class Kind>
void read_unit(const Call& call, int64_t entry, int64_t head, int64_t unit, typename Kind::Element* keys,
               typename Kind::Element* values, float* weights) {
    const int64_t first = unit % call.block_units * LANES, D = call.padded_dim;
    const float* weight = call.weight + entry * call.weight_stride[0] + head * call.weight_stride[1];
    for (int64_t lane = 0; lane < LANES; ++lane) {
        const int64_t row = unit / call.block_units * call.block + first + lane;
        const bool live = first + lane < call.block && weight[row] > NOTHING;
        weights[lane] = live ? weight[row] * static_cast<float>(M_LOG2E) : NOTHING;
        const Row<typename Kind::Element> from = live ? Row<typename Kind::Element>(call, entry, head, row) : Row<typename Kind::Element>();
        lay_row(from.key, call.head_dim, D, keys + lane * D);
        lay_row(from.value, call.head_dim, D, values + lane * D);
    }
}

// Which rows of a unit a row mask shows. `first` is a multiple of 16, so that they are half a word.
inline Mask shown(const int32_t* bits, int64_t first) {
    return bits ? static_cast<Mask>(static_cast<uint32_t>(bits[first / 32]) >> (first % 32)) : 0xffff;
}

// Write 16 floats or fewer of an output row.
template <class Kind>
void write(const Call& call, int64_t token, int64_t d, Floats x) {
    const int64_t here = std::min(LANES, call.head_dim - d), at = token * call.head_dim + d;
    if (call.wide_out) {
        vec::store_some(static_cast<float*>(call.out) + at, x, (1u << here) - 1);
    } else {
        alignas(64) typename Kind::Element narrow[LANES];
        Kind::store(narrow, x);
        std::memcpy(static_cast<typename Kind::Element*>(call.out) + at, narrow, here * sizeof(narrow[0]));
    }
}

}  // namespace
