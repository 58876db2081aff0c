// Products for experts with few rows ("thin"): each weight is read once, in the order in which weights are stored.
//
// Shape legend: m rows, a number the compiler knows; k, n the sides of weights w [k, n], which are their rows' number
// and length.
//
// With 8 rows or fewer a weight takes part in so few multiplications that the time goes into reading it. Packing would
// write it and read it once more; here it goes from memory into a register, and sums wait in the nearest cache.

#pragma once

#include "vector.h"

namespace {

constexpr int THIN = 8;  // most rows

// Rows of weights that are asked for before their turn: the processor's own guess stops where a page ends.
constexpr int64_t AHEAD = 8;

// out [m, n] = a [m, k] w
template <int m, typename W>
inline void thin_multiply(const float* a, const W* w, float* out, int64_t k, int64_t n) {
    constexpr int64_t BLOCK = 512;  // columns whose sums stay in the nearest cache
    for (int64_t from = 0; from < n; from += BLOCK) {
        int64_t columns = n - from < BLOCK ? n - from : BLOCK;
        float* sums = out + from;
        for (int i = 0; i < m; i++) memset(sums + i * n, 0, columns * sizeof(float));
        int64_t t = 0;
        for (; t + 4 <= k; t += 4) {  // 4 rows of weights for each time that sums are loaded and stored
            const W* row = w + t * n + from;
            for_vectors(columns, [&](int64_t c, auto count) {
                f32x16 w0 = load(row + c, count), w1 = load(row + n + c, count);
                f32x16 w2 = load(row + 2 * n + c, count), w3 = load(row + 3 * n + c, count);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) __builtin_prefetch(row + (AHEAD + i) * n + c);
#pragma GCC unroll 8
                for (int i = 0; i < m; i++) {
                    const float* x = a + i * k + t;
                    f32x16 total = load(sums + i * n + c, count);
                    total += x[0] * w0;
                    total += x[1] * w1;
                    total += x[2] * w2;
                    total += x[3] * w3;
                    store(sums + i * n + c, total, count);
                }
            });
        }
        for (; t < k; t++)
            for_vectors(columns, [&](int64_t c, auto count) {
                f32x16 weights = load(w + t * n + from + c, count);
                for (int i = 0; i < m; i++) {
                    float* to = sums + i * n + c;
                    store(to, load(to, count) + a[i * k + t] * weights, count);
                }
            });
    }
}

// out [m, k] = a [m, n] w^T
template <int m, typename W>
inline void thin_multiply_transposed(const float* a, const W* w, float* out, int64_t k, int64_t n) {
    int64_t t = 0;
    for (; t + 2 <= k; t += 2) {  // 2 rows of weights for each time that `a` is loaded
        const W* row = w + t * n;
        f32x16 sums[m][2];
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) sums[i][0] = sums[i][1] = f32x16{};
        for_vectors(n, [&](int64_t c, auto count) {
            f32x16 w0 = load(row + c, count), w1 = load(row + n + c, count);
            __builtin_prefetch(row + AHEAD * n + c);
            __builtin_prefetch(row + (AHEAD + 1) * n + c);
#pragma GCC unroll 8
            for (int i = 0; i < m; i++) {
                f32x16 x = load(a + i * n + c, count);
                sums[i][0] += x * w0;
                sums[i][1] += x * w1;
            }
        });
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) {
            out[i * k + t] = sum(sums[i][0]);
            out[i * k + t + 1] = sum(sums[i][1]);
        }
    }
    for (; t < k; t++)
        for (int i = 0; i < m; i++) {
            f32x16 total = {};
            for_vectors(
                n, [&](int64_t c, auto count) { total += load(a + i * n + c, count) * load(w + t * n + c, count); });
            out[i * k + t] = sum(total);
        }
}

// out [k, n] = a [m, k]^T b [m, n]: a gradient of weights, written once and read by nobody here.
template <int m, typename W>
inline void thin_outer(const float* a, const float* b, W* out, int64_t k, int64_t n) {
    for (int64_t t = 0; t < k; t++)
        for_vectors(n, [&](int64_t c, auto count) {
            f32x16 total = a[t] * load(b + c, count);
#pragma GCC unroll 8
            for (int i = 1; i < m; i++) total += a[i * k + t] * load(b + i * n + c, count);
            stream(out + t * n + c, total, count);
        });
}

}  // namespace
