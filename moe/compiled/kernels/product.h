// Products of packed factors, for experts with more rows than the thin way (`thin.h`) takes.
//
// Shape legend: out [m, columns] = rows [m, terms] right [terms, columns]. `rows` is packed as a whole; `right` 32
// columns at a time just before they are used, so that its panels are in the nearest cache when every row needs them.

#pragma once

#include "panels.h"

namespace {

// 8 x 32: each vector of the right factor is loaded once for 8 rows, 16 sums that don't wait for each other hide how
// long a multiply-add takes, and sums and factors together fit into 32 registers.
constexpr int TILE_ROWS = 8, TILE_COLUMNS = 2 * LANES;
typedef f32x16 Tile[TILE_ROWS][2];

// ---------------------------------------------------------------- right factors: to pack and to ask for ahead

struct Nothing {
    void operator()(int64_t) const {}
};

// w [terms, columns] as it is stored.
template <typename X, typename W>
struct Stored {
    const W* w;
    int64_t terms, columns;

    void pack(int64_t n, Unit<X>* left, Unit<X>* right) const {
        pack_column_pair<X>([&](int64_t t) { return w + t * columns + n; }, columns - n, terms, left, right);
    }
    // Each call asks for one unit of columns n .. n+31, from unit `first` on.
    auto ahead(int64_t n, int64_t first) const {
        return [from = w + first * TERMS<X> * columns + n, columns = columns](int64_t call) {
            constexpr int line = 64 / sizeof(W);
            for (int i = 0; i < TERMS<X>; i++)
                for (int c = 0; c < TILE_COLUMNS; c += line)
                    __builtin_prefetch(from + (call * TERMS<X> + i) * columns + c, 0, 2);
        };
    }
};

// The transpose of w [columns, terms].
template <typename X, typename W>
struct Transposed {
    const W* w;
    int64_t terms, columns;

    void pack(int64_t n, Unit<X>* left, Unit<X>* right) const {
        pack_rows<X>([&](int64_t i) { return w + (n + i) * terms; }, columns - n, terms, left);
        pack_rows<X>([&](int64_t i) { return w + (n + LANES + i) * terms; }, columns - n - LANES, terms, right);
    }
    // Rows n .. n+31 of w lie one after the other: each call asks for the next as many numbers as a unit has.
    auto ahead(int64_t n, int64_t first) const {
        constexpr int share = TILE_COLUMNS * TERMS<X>;
        return [from = w + n * terms + first * share](int64_t call) {
            constexpr int line = 64 / sizeof(W);
            for (int c = 0; c < share; c += line) __builtin_prefetch(from + call * share + c, 0, 2);
        };
    }
};

// Rows from anywhere: row(t) is where the columns of term t begin.
template <typename X, typename Row>
struct Gathered {
    Row row;
    int64_t terms, columns;

    void pack(int64_t n, Unit<X>* left, Unit<X>* right) const {
        pack_column_pair<X>([&](int64_t t) { return row(t) + n; }, columns - n, terms, left, right);
    }
    Nothing ahead(int64_t, int64_t) const { return {}; }  // just written, or read before: in a cache
};

// ---------------------------------------------------------------- the register tile

inline void multiply_add(f32x16& total, float a, f32x16 b) { total += a * b; }

inline void multiply_add(f32x16& total, uint32_t a, u32x16 b) {
#ifdef __AVX512BF16__
    total = (f32x16)_mm512_dpbf16_ps((__m512)total, (__m512bh)splat(a), (__m512bh)b);
#else
    total += (f32x16)(splat(a) << 16) * (f32x16)(b << 16);
    total += (f32x16)(splat(a) & 0xFFFF0000u) * (f32x16)(b & 0xFFFF0000u);
#endif
}

// Sums `rows` lanes of a panel against two panels of columns; calls ahead(0), ahead(1), ... every `stride` units.
// Never inlined: all products share it, and a call is nothing against the sums.
template <int rows, typename Unit, typename Ahead = Nothing>
[[gnu::noinline]] void sum_tile(const Unit* a, const Unit* left, const Unit* right, int64_t units, Tile& tile,
                                int64_t stride = INT64_MAX, Ahead ahead = {}) {
    f32x16 sums[rows][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = f32x16{};
    for (int64_t u = 0, call = 0; u < units; call++) {
        ahead(call);
        int64_t end = units - u < stride ? units : u + stride;
        for (; u < end; u++) {
            auto b0 = load(left + u * LANES), b1 = load(right + u * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                multiply_add(sums[i][0], a[u * LANES + i], b0);
                multiply_add(sums[i][1], a[u * LANES + i], b1);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        tile[i][0] = sums[i][0];
        tile[i][1] = sums[i][1];
    }
}

// ---------------------------------------------------------------- the product

// Columns n .. n+31 of a row, or as many of them as there are.
template <typename T>
inline void store_pair(T* row, int64_t n, f32x16 left, f32x16 right, int64_t columns) {
    store(row + n, left, columns - n);
    store(row + n + LANES, right, columns - n - LANES);
}

template <typename T>
inline void stream_pair(T* row, int64_t n, f32x16 left, f32x16 right, int64_t columns) {
    stream(row + n, left, columns - n);
    stream(row + n + LANES, right, columns - n - LANES);
}

// sink(i, n, left, right) gets columns n .. n+31 of row i, where those past the last are zero. `panels` has room for
// two panels.
//
// While tiles are summed memory has nothing to do, and packing would wait for it. So the first tiles of 32 columns ask
// for the next 32, sharing the lines among them: one alone would ask faster than memory answers.
template <typename X, typename Right, typename Sink>
inline void multiply(const Unit<X>* rows, int64_t m, const Right& right, Unit<X>* panels, Sink sink) {
    const int64_t units = units_of<X>(right.terms);
    const int64_t sharers = m >= 64 ? 8 : m >= 32 ? 4 : m >= 16 ? 2 : 1;
    Unit<X>*left = panels, *next = panels + units * LANES;
    for (int64_t n = 0; n < right.columns; n += TILE_COLUMNS) {
        right.pack(n, left, next);
        for (int64_t i = 0; i < m; i += TILE_ROWS) {
            const Unit<X>* a = rows + i / LANES * LANES * units + i % LANES;
            const int64_t tile_rows = m - i < TILE_ROWS ? m - i : TILE_ROWS, share = i / TILE_ROWS;
            Tile tile;
            if (tile_rows == TILE_ROWS && share < sharers)
                sum_tile<TILE_ROWS>(a, left, next, units, tile, sharers,
                                    right.ahead(n + TILE_COLUMNS, units / sharers * share));
            else
                with_constant<TILE_ROWS / 2>((tile_rows + 1) / 2, [&](auto pairs) {  // odd heights aren't worth code
                    sum_tile<2 * pairs>(a, left, next, units, tile);
                });
            for (int64_t r = 0; r < tile_rows; r++) sink(i + r, n, tile[r][0], tile[r][1]);
        }
    }
}

}  // namespace
