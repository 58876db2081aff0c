// Panels: how factors of a product lie while a register tile (`product.h`) sums over them.
//
// A panel [units][16] holds 16 rows or columns of a factor, one in each lane, with the terms of the sum one after the
// other. So every step of a tile reads one whole vector and the next step reads the next one, however far apart the
// rows of the factor are: no strides, no pages to look up, and nothing to shuffle between the multiplications.
//
// A unit is what a lane multiplies in one step: a float, or two neighbouring bfloat16 terms, because that is what the
// processor's bfloat16 dot product takes. Lanes and terms that the factor doesn't have are zero.

#pragma once

#include "vector.h"

namespace {

template <typename X>
constexpr int TERMS = 4 / sizeof(X);  // in a unit

template <typename X>
using Unit = std::conditional_t<TERMS<X> == 1, float, uint32_t>;

template <typename X>
inline int64_t units_of(int64_t terms) {
    return (terms + TERMS<X> - 1) / TERMS<X>;
}

// ---------------------------------------------------------------- rows: the sum runs along them

// 16 units of a row, of which `left` values are left. `X` is float for units that are floats; `S` is what is stored.
template <typename X, typename S>
inline u32x16 load_units(const S* from, int64_t left) {
    if constexpr (TERMS<X> == 1) {
        return (u32x16)load(from, left);
    } else if constexpr (sizeof(S) == sizeof(bf16)) {
        if (left >= 2 * LANES) return load((const uint32_t*)from);
        u32x16 pairs = {};
        memcpy(&pairs, from, left * sizeof(S));
        return pairs;
    } else {
        return (u32x16)round_to_bf16(load(from, left), load(from + LANES, left - LANES));
    }
}

// One step of a transposition: rows i and i + step exchange the lanes in which `step` is set and those in which not.
template <int step>
inline void exchange(u32x16 (&rows)[LANES]) {
    u32x16 first, second;
    for (int j = 0; j < LANES; j++) {
        first[j] = (j & step) ? LANES + j - step : j;
        second[j] = (j & step) ? LANES + j : j + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & step)) {
            u32x16 upper = rows[i], lower = rows[i | step];
            rows[i] = __builtin_shuffle(upper, lower, first);
            rows[i | step] = __builtin_shuffle(upper, lower, second);
        }
}

inline void transpose(u32x16 (&rows)[LANES]) {
    exchange<1>(rows);
    exchange<2>(rows);
    exchange<4>(rows);
    exchange<8>(rows);
}

// A panel of `count` rows (at most 16 of them, perhaps none), each `terms` long; row(i) is where row i begins.
template <typename X, typename Row>
inline void pack_rows(Row row, int64_t count, int64_t terms, Unit<X>* panel) {
    int64_t units = units_of<X>(terms);
    for (int64_t u = 0; u < units; u += LANES) {
        u32x16 block[LANES];
        for (int i = 0; i < LANES; i++)
            block[i] = i < count ? load_units<X>(row(i) + u * TERMS<X>, terms - u * TERMS<X>) : u32x16{};
        transpose(block);
        int64_t left = units - u < LANES ? units - u : LANES;
        for (int64_t i = 0; i < left; i++) memcpy(panel + (u + i) * LANES, &block[i], sizeof block[i]);
    }
}

// ---------------------------------------------------------------- columns: the sum runs down the rows

// A panel of the first `count` columns (at most 16 of them, perhaps none) of `terms` rows.
template <typename X, typename Row>
inline void pack_columns(Row row, int64_t count, int64_t terms, Unit<X>* panel) {
    if constexpr (TERMS<X> == 1) {
        for (int64_t t = 0; t < terms; t++) store(panel + t * LANES, load(row(t), count));
    } else {
        u16x32 pairs;
        for (int j = 0; j < LANES; j++) pairs[2 * j] = j, pairs[2 * j + 1] = LANES + j;
        for (int64_t t = 0; t < terms; t += 2) {
            u16x32 both = round_to_bf16(load(row(t), count), t + 1 < terms ? load(row(t + 1), count) : f32x16{});
            store(panel + t / 2 * LANES, (u32x16)__builtin_shuffle(both, pairs));
        }
    }
}

// Two panels of 32 columns that are stored as bfloat16: rows are interleaved as they are, without widening them.
template <typename Row>
inline void pack_32_columns(Row row, int64_t terms, uint32_t* left, uint32_t* right) {
    u16x32 first, second;
    for (int j = 0; j < LANES; j++) {
        first[2 * j] = j, first[2 * j + 1] = 2 * LANES + j;
        second[2 * j] = LANES + j, second[2 * j + 1] = 3 * LANES + j;
    }
    for (int64_t t = 0; t < terms; t += 2) {
        u16x32 even, odd = {};
        memcpy(&even, row(t), sizeof even);
        if (t + 1 < terms) memcpy(&odd, row(t + 1), sizeof odd);
        store(left + t / 2 * LANES, (u32x16)__builtin_shuffle(even, odd, first));
        store(right + t / 2 * LANES, (u32x16)__builtin_shuffle(even, odd, second));
    }
}

// Two panels of the first `count` columns (at most 32 are taken).
template <typename X, typename Row>
inline void pack_column_pair(Row row, int64_t count, int64_t terms, Unit<X>* left, Unit<X>* right) {
    if constexpr (sizeof(*row(0)) == sizeof(bf16))
        if (count >= 2 * LANES) return pack_32_columns(row, terms, left, right);
    pack_columns<X>(row, count, terms, left);
    pack_columns<X>([&](int64_t t) { return row(t) + LANES; }, count - LANES, terms, right);
}

}  // namespace
