// Vectors of 16 floats: one AVX-512 register each. Where registers are narrower the compiler takes several.
//
// bfloat16 is a way to store numbers, not to compute with them: loads widen it to float32, stores round it.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

inline f32x16 splat(float x) { return f32x16{} + x; }

inline u32x16 splat(uint32_t x) { return u32x16{} + x; }

// To the nearest, ties to even, in the low half of each lane. What is not a number stays so.
inline u32x16 round_to_bf16(f32x16 x) {
    u32x16 bits = (u32x16)x;
    u32x16 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    u32x16 nan = (u32x16)(x != x);
    return (rounded & ~nan) | ((bits >> 16 | 0x40) & nan);
}

// ---------------------------------------------------------------- whole vectors

inline f32x16 load(const float* from) {
    f32x16 x;
    memcpy(&x, from, sizeof x);
    return x;
}

inline f32x16 load(const bf16* from) {
    u16x16 x;
    memcpy(&x, from, sizeof x);
    return (f32x16)(__builtin_convertvector(x, u32x16) << 16);
}

inline u32x16 load(const uint32_t* from) {
    u32x16 x;
    memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float* to, f32x16 x) { memcpy(to, &x, sizeof x); }

inline void store(bf16* to, f32x16 x) {
    u16x16 rounded = __builtin_convertvector(round_to_bf16(x), u16x16);
    memcpy(to, &rounded, sizeof rounded);
}

inline void store(uint32_t* to, u32x16 x) { memcpy(to, &x, sizeof x); }

// ---------------------------------------------------------------- ends of rows

// The first `count` of 16 (none if it is negative); lanes that aren't loaded are zero.
template <typename T>
inline f32x16 load(const T* from, int64_t count) {
    if (count >= LANES) return load(from);
    T part[LANES] = {};
    if (count > 0) memcpy((void*)part, from, count * sizeof(T));
    return load(part);
}

template <typename T>
inline void store(T* to, f32x16 x, int64_t count) {
    if (count >= LANES) return store(to, x);
    T part[LANES];
    store(part, x);
    if (count > 0) memcpy((void*)to, part, count * sizeof(T));
}

// ---------------------------------------------------------------- sizes that the compiler knows

// A count of 16: loops over whole vectors must not ask each one how long it is.
struct Whole {};

template <typename T>
inline f32x16 load(const T* from, Whole) {
    return load(from);
}

template <typename T>
inline void store(T* to, f32x16 x, Whole) {
    store(to, x);
}

// body(c, count) for c = 0, 16, ... below n, with the count of columns that are left: `Whole` except at the end.
template <typename Body>
inline void for_vectors(int64_t n, Body body) {
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES) body(c, Whole{});
    if (c < n) body(c, n - c);
}

// body(n) with n = 1 .. limit as a constant; a larger one counts as the limit.
template <int limit, typename Body>
inline void with_constant(int64_t n, Body body) {
    if constexpr (limit > 1)
        if (n < limit) return with_constant<limit - 1>(n, body);
    body(std::integral_constant<int, limit>{});
}

// ---------------------------------------------------------------- stores around the caches

// For results that nobody reads soon. An ordinary store fetches the line that it is about to overwrite, and evicts
// another that may still be wanted; this one does neither, if it fills its line.
template <typename T, typename Count>
inline void stream(T* to, f32x16 x, Count count) {
    store(to, x, count);
}

#ifdef __AVX512F__
inline void stream(float* to, f32x16 x, Whole) {
    if ((uintptr_t)to % 64 == 0)
        _mm512_stream_ps(to, (__m512)x);
    else
        store(to, x);
}

inline void stream(bf16* to, f32x16 x, Whole) {
    u16x16 rounded = __builtin_convertvector(round_to_bf16(x), u16x16);
    if ((uintptr_t)to % 32 == 0)
        _mm256_stream_si256((__m256i*)to, (__m256i)rounded);
    else
        memcpy(to, &rounded, sizeof rounded);
}
#endif

// ---------------------------------------------------------------- arithmetic

// By halves: always in the same order, whatever the width of a register.
inline float sum(f32x16 x) {
    typedef float f32x8 __attribute__((vector_size(32)));
    typedef float f32x4 __attribute__((vector_size(16)));
    f32x8 halves[2];
    memcpy(halves, &x, sizeof x);
    f32x8 eight = halves[0] + halves[1];
    f32x4 quarters[2];
    memcpy(quarters, &eight, sizeof eight);
    f32x4 four = quarters[0] + quarters[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x for x <= 88, to 2 units in the last place; below -87 it is 0. With n = x / ln 2 rounded, e^x is 2^n e^r where
// |r| <= ln 2 / 2, and a polynomial gives e^r.
inline f32x16 exp_of(f32x16 x) {
    constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    auto below = x < -87.0f;
    x = below ? splat(-87.0f) : x;
    f32x16 shifted = x * 1.44269504f + shift;
    f32x16 n = shifted - shift;
    f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first one exact times n
    f32x16 p = splat(1.0f / 720);
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    f32x16 y = (f32x16)((u32x16)p + ((u32x16)shifted << 23));  // n added to the exponent
    return below ? f32x16{} : y;
}

}  // namespace
