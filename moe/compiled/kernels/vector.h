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

// To the nearest, ties to even. What is not a number stays so; the processor's own instruction makes subnormal numbers
// zero, as its dot product does.
inline u16x16 round_to_bf16(f32x16 x) {
#ifdef __AVX512BF16__
    return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
    u32x16 bits = (u32x16)x;
    u32x16 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    u32x16 nan = (u32x16)(x != x);
    return __builtin_convertvector((rounded & ~nan) | ((bits >> 16 | 0x40) & nan), u16x16);
#endif
}

// First those of `low`, then those of `high`.
inline u16x32 round_to_bf16(f32x16 low, f32x16 high) {
#ifdef __AVX512BF16__
    return (u16x32)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
    u16x16 halves[2] = {round_to_bf16(low), round_to_bf16(high)};
    u16x32 both;
    memcpy(&both, halves, sizeof both);
    return both;
#endif
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
    u16x16 rounded = round_to_bf16(x);
    memcpy((void*)to, &rounded, sizeof rounded);
}

inline void store(uint32_t* to, u32x16 x) { memcpy(to, &x, sizeof x); }

// ---------------------------------------------------------------- ends of rows

// 0 < count < 16.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline f32x16 load_part(const float* from, int64_t count) {
    return (f32x16)_mm512_maskz_loadu_ps((1u << count) - 1, from);
}

inline f32x16 load_part(const bf16* from, int64_t count) {
    u16x16 x = (u16x16)_mm256_maskz_loadu_epi16((1u << count) - 1, from);
    return (f32x16)(__builtin_convertvector(x, u32x16) << 16);
}

inline void store_part(float* to, f32x16 x, int64_t count) { _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)x); }

inline void store_part(bf16* to, f32x16 x, int64_t count) {
    _mm256_mask_storeu_epi16(to, (1u << count) - 1, (__m256i)round_to_bf16(x));
}
#else
template <typename T>
inline f32x16 load_part(const T* from, int64_t count) {
    T part[LANES] = {};
    memcpy((void*)part, from, count * sizeof(T));
    return load(part);
}

template <typename T>
inline void store_part(T* to, f32x16 x, int64_t count) {
    T part[LANES];
    store(part, x);
    memcpy((void*)to, part, count * sizeof(T));
}
#endif

// The first `count` of 16, or all of them, or none (a negative count); lanes that aren't loaded are zero.
template <typename T>
inline f32x16 load(const T* from, int64_t count) {
    return count >= LANES ? load(from) : count > 0 ? load_part(from, count) : f32x16{};
}

template <typename T>
inline void store(T* to, f32x16 x, int64_t count) {
    if (count >= LANES)
        store(to, x);
    else if (count > 0)
        store_part(to, x, count);
}

// A store for results that nobody reads soon. An ordinary one fetches the line that it is about to overwrite, and
// evicts another that may still be wanted; this one does neither, if it fills its part of a line. Other threads see
// what it wrote once this one has taken its next task: that is an atomic addition, which waits for all stores.
template <typename T>
inline void stream(T* to, f32x16 x, int64_t count) {
#ifdef __AVX512F__
    if (count >= LANES && (uintptr_t)to % (LANES * sizeof(T)) == 0) {
        if constexpr (std::is_same_v<T, float>)
            _mm512_stream_ps(to, (__m512)x);
        else
            _mm256_stream_si256((__m256i*)to, (__m256i)round_to_bf16(x));
        return;
    }
#endif
    store(to, x, count);
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

template <typename T>
inline void stream(T* to, f32x16 x, Whole) {
    stream(to, x, LANES);
}

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
