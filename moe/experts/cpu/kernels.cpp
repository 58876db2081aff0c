// The experts' arithmetic on a CPU: forward and backward of a mixture of feed-forward networks, fused.
//
// Shape legend: T tokens, K choices, R rows (kept assignments, sorted by expert), E experts, D model width, F hidden
// width, P columns of `up` (F, or 2F when gated: gate first).
//
//   pre = x[token] up_e      h = act(pre)      out = h down_e      y_t = sum_k weight_tk out[row_tk]
//
// An expert's rows are worked on in slices that stay in cache. Two ways, by the rows at hand:
//   thin (<= 8 rows)  weights are streamed once, in the order in which they lie, and never copied;
//   thick             both factors are packed into panels of 16, and a register tile of 8 x 32 is summed over them.
// Products are summed in float32. With bfloat16 activations, panels hold pairs of neighbouring terms, as the
// processor's bfloat16 dot product wants them, and weights may be bfloat16 or float32 (rounded while they are packed).
//
// Plain C entry points for ctypes; no Python and no torch headers, so that it compiles in seconds.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// ---------------------------------------------------------------- vectors of 16

constexpr int V = 16;
typedef float vf __attribute__((vector_size(4 * V)));
typedef uint32_t vu __attribute__((vector_size(4 * V)));
typedef int32_t vi __attribute__((vector_size(4 * V)));
typedef uint16_t vh __attribute__((vector_size(2 * V)));

struct bf16 {
    uint16_t bits;
};

inline vf splat(float x) { return vf{} + x; }
inline vf as_float(vu x) { return (vf)x; }

inline vu round_to_bf16(vf x) {  // nearest even, in the low half; a NaN stays one
    vu bits = (vu)x;
    vu rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(x != x);
    return (rounded & ~nan) | ((bits >> 16 | 0x40) & nan);
}

inline vf load(const float* from) {
    vf x;
    memcpy(&x, from, sizeof x);
    return x;
}
inline vf load(const bf16* from) {
    vh x;
    memcpy(&x, from, sizeof x);
    return as_float(__builtin_convertvector(x, vu) << 16);
}
inline void store(float* to, vf x) { memcpy(to, &x, sizeof x); }
inline void store(bf16* to, vf x) {
    vh h = __builtin_convertvector(round_to_bf16(x), vh);
    memcpy(to, &h, sizeof h);
}

// The first `count` of 16, the others zero. `All` is a count known when this is compiled: loops over whole vectors
// must not ask each one how long it is.
struct All {};
template <typename T>
inline vf load(const T* from, All) {
    return load(from);
}
template <typename T>
inline void store(T* to, vf x, All) {
    store(to, x);
}
template <typename T>
inline vf load(const T* from, int64_t count) {
    if (count >= V) return load(from);
    T part[V] = {};
    memcpy(part, from, count > 0 ? count * sizeof(T) : 0);
    return load(part);
}
template <typename T>
inline void store(T* to, vf x, int64_t count) {
    if (count >= V) return store(to, x);
    T part[V];
    store(part, x);
    memcpy(to, part, count > 0 ? count * sizeof(T) : 0);
}
// A store that passes the caches by: what it writes won't be read soon, and need not be read before.
template <typename T, typename Left>
inline void stream(T* to, vf x, Left left) {
    store(to, x, left);
}
#ifdef __AVX512F__
inline void stream(float* to, vf x, All) {
    if ((uintptr_t)to % 64 == 0)
        _mm512_stream_ps(to, (__m512)x);
    else
        store(to, x);
}
inline void stream(bf16* to, vf x, All) {
    vh h = __builtin_convertvector(round_to_bf16(x), vh);
    if ((uintptr_t)to % 32 == 0)
        _mm256_stream_si256((__m256i*)to, (__m256i)h);
    else
        memcpy(to, &h, sizeof h);
}
#endif
// body(c, how many of 16) for c = 0, 16, ... below n
template <typename Body>
inline void by_vectors(int64_t n, Body body) {
    int64_t c = 0;
    for (; c + V <= n; c += V) body(c, All{});
    if (c < n) body(c, n - c);
}
inline float sum(vf x) {
    typedef float v8 __attribute__((vector_size(32)));
    typedef float v4 __attribute__((vector_size(16)));
    v8 halves[2];
    memcpy(halves, &x, sizeof x);
    v8 eight = halves[0] + halves[1];
    v4 quarters[2];
    memcpy(quarters, &eight, sizeof eight);
    v4 four = quarters[0] + quarters[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

inline vf exp_of(vf x) {                  // for x <= 88; to 2 units in the last place
    constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    x = x < -87.0f ? splat(-87.0f) : x;
    vf n = x * 1.44269504f + shift;
    vf k = n - shift;
    vf r = (x - k * 0.693359375f) + k * 2.12194440e-4f;  // ln 2 in two parts
    vf p = splat(1.0f / 720);
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return as_float((vu)p + ((vu)n << 23));
}

// ---------------------------------------------------------------- activations

enum Activation { GELU = 0, SWIGLU = 1, GEGLU = 2 };

struct Slope {
    vf value, slope;
};

// The normal distribution up to x and its density. With z = |x| / sqrt 2 and u = 1 / (1 + 0.4 z), erfc(z) is
// exp(-z^2) u q(u); q is fitted so that erfc is off by less than 1e-7.
inline Slope normal(vf x) {
    vf z = (x < 0 ? -x : x) * 0.70710678f;
    vf u = 1.0f / (1.0f + 0.4f * z);
    vf e = exp_of(-z * z);
    vf q = splat(-0.20029444992542267f);
    q = q * u + 0.7092923521995544f;
    q = q * u - 0.3711453676223755f;
    q = q * u + 0.4684673249721527f;
    q = q * u + 0.16174554824829102f;
    q = q * u + 0.23193460702896118f;
    vf tail = 0.5f * e * (q * u);
    return {x < 0 ? tail : 1.0f - tail, 0.39894228f * e};
}
inline Slope gelu(vf x) {
    Slope phi = normal(x);
    return {x * phi.value, phi.value + x * phi.slope};
}
inline vf gelu_of(vf x) { return x * normal(x).value; }
inline vf sigmoid(vf x) {
    vf e = exp_of(x < 0 ? x : -x);  // of -|x|: never overflows
    vf s = 1.0f / (1.0f + e);
    return x < 0 ? e * s : s;
}
inline Slope silu(vf x) {
    vf s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
}
inline vf silu_of(vf x) { return x * sigmoid(x); }

// ---------------------------------------------------------------- panels

// What a register tile sums over: floats, or pairs of bfloat16.
template <typename X>
struct Packed;
template <>
struct Packed<float> {
    typedef float unit;
    static constexpr int terms = 1;  // of the sum in one unit
};
template <>
struct Packed<bf16> {
    typedef uint32_t unit;
    static constexpr int terms = 2;
};

template <typename X>
inline int64_t units(int64_t terms) {
    return (terms + Packed<X>::terms - 1) / Packed<X>::terms;
}

inline void multiply_add(vf& acc, float a, vf b) { acc += a * b; }
inline void multiply_add(vf& acc, uint32_t a, vu b) {
#ifdef __AVX512BF16__
    acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(vu{} + a), (__m512bh)b);
#else
    vf high = as_float((vu{} + a) & 0xFFFF0000u), low = as_float((vu{} + a) << 16);
    acc += low * as_float(b << 16);
    acc += high * as_float(b & 0xFFFF0000u);
#endif
}
inline vf panel_vector(const float* from) { return load(from); }
inline vu panel_vector(const uint32_t* from) {
    vu x;
    memcpy(&x, from, sizeof x);
    return x;
}

template <int step>
inline void exchange(vu (&r)[V]) {
    vi low, high;
    for (int j = 0; j < V; j++) {
        low[j] = (j & step) ? V + j - step : j;
        high[j] = (j & step) ? V + j : j + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < V; i++)
        if (!(i & step)) {
            vu a = r[i], b = r[i | step];
            r[i] = __builtin_shuffle(a, b, (vu)low);
            r[i | step] = __builtin_shuffle(a, b, (vu)high);
        }
}
inline void transpose(vu (&r)[V]) {
    exchange<1>(r);
    exchange<2>(r);
    exchange<4>(r);
    exchange<8>(r);
}

// 16 units of the sum from one row: floats, or 32 values rounded to pairs.
inline void row_units(const float* from, int64_t count, vu& to, float*) { to = (vu)load(from, count); }
inline void row_units(const bf16* from, int64_t count, vu& to, uint32_t*) {
    if (count >= 2 * V) {
        memcpy(&to, from, sizeof to);
    } else {
        to = vu{};
        memcpy(&to, from, count * sizeof(bf16));
    }
}
inline void row_units(const float* from, int64_t count, vu& to, uint32_t*) {
    bf16 pairs[2 * V];
    store(pairs, load(from, count));
    store(pairs + V, load(from + V, count - V));
    memcpy(&to, pairs, sizeof to);
}

// A panel [units][16] of 16 rows (fewer: zeros), each summed along itself.
template <typename X, typename S, typename Row>
inline void pack_along(Row row, int64_t rows, int64_t length, typename Packed<X>::unit* panel) {
    constexpr int terms = Packed<X>::terms;
    int64_t total = units<X>(length);
    for (int64_t u = 0; u < total; u += V) {
        vu block[V];
        for (int i = 0; i < V; i++) {
            block[i] = vu{};
            if (i < rows)
                row_units((const S*)row(i) + u * terms, length - u * terms, block[i], (typename Packed<X>::unit*)0);
        }
        transpose(block);
        int64_t left = total - u < V ? total - u : V;
        for (int64_t i = 0; i < left; i++) memcpy(panel + (u + i) * V, &block[i], sizeof(vu));
    }
}

inline vu bf16_bits(const float* from, int64_t count) { return round_to_bf16(load(from, count)); }
inline vu bf16_bits(const bf16* from, int64_t count) { return (vu)load(from, count) >> 16; }

// A panel [units][16] of 16 columns (fewer: zeros), summed down the rows.
template <typename X, typename S, typename Row>
inline void pack_across(Row row, int64_t rows, int64_t columns, float* panel) {
    for (int64_t r = 0; r < rows; r++) store(panel + r * V, load((const S*)row(r), columns));
}
template <typename Row>
inline void pack_across_32(Row row, int64_t rows, uint32_t* panel, uint32_t* next) {  // of two panels, from bfloat16
    typedef uint16_t vw __attribute__((vector_size(64)));
    vw low, high;
    for (int j = 0; j < V; j++) {
        low[2 * j] = j, low[2 * j + 1] = 2 * V + j;
        high[2 * j] = V + j, high[2 * j + 1] = 3 * V + j;
    }
    for (int64_t r = 0; r < rows; r += 2) {
        vw even, odd = {};
        memcpy(&even, row(r), sizeof even);
        if (r + 1 < rows) memcpy(&odd, row(r + 1), sizeof odd);
        vw left = __builtin_shuffle(even, odd, low), right = __builtin_shuffle(even, odd, high);
        memcpy(panel + r / 2 * V, &left, sizeof left);
        memcpy(next + r / 2 * V, &right, sizeof right);
    }
}
template <typename X, typename S, typename Row>
inline void pack_across(Row row, int64_t rows, int64_t columns, uint32_t* panel) {
    for (int64_t r = 0; r < rows; r += 2) {
        vu even = bf16_bits((const S*)row(r), columns);
        vu odd = r + 1 < rows ? bf16_bits((const S*)row(r + 1), columns) : vu{};
        vu pairs = even | odd << 16;
        memcpy(panel + r / 2 * V, &pairs, sizeof pairs);
    }
}

// ---------------------------------------------------------------- the register tile

constexpr int TILE_ROWS = 8, TILE_COLUMNS = 2 * V;

template <int rows, typename Unit, typename Ahead>
inline void sum_tile(int64_t terms, const Unit* a, const Unit* b0, const Unit* b1, vf (&acc)[TILE_ROWS][2],
                     int64_t stride, Ahead ahead) {
    vf sums[rows][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = vf{};
    for (int64_t t = 0, unit = 0; t < terms; unit++) {
        ahead(unit);
        int64_t end = terms - t < stride ? terms : t + stride;
        for (; t < end; t++) {
            auto left = panel_vector(b0 + t * V), right = panel_vector(b1 + t * V);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                multiply_add(sums[i][0], a[t * V + i], left);
                multiply_add(sums[i][1], a[t * V + i], right);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        acc[i][0] = sums[i][0];
        acc[i][1] = sums[i][1];
    }
}

// Product of packed panels: `sink(i, n, left, right)` gets row i's columns n .. n+31.
template <typename Unit, typename PackB, typename Ahead, typename Sink>
inline void multiply(const Unit* a, int64_t m, int64_t terms, int64_t from, int64_t to, Unit* b, PackB pack_b,
                     Ahead ahead, Sink sink) {
    // The first tiles of a panel share in asking for the next panel: memory is slower than one tile's time.
    const int64_t sharers = m >= 64 ? 8 : m >= 32 ? 4 : m >= 16 ? 2 : 1;
    for (int64_t n = from; n < to; n += TILE_COLUMNS) {
        pack_b(n, b, b + terms * V);
        for (int64_t i = 0; i < m; i += TILE_ROWS) {
            const Unit* part = a + i / V * V * terms + i % V;
            vf acc[TILE_ROWS][2];
            int64_t rows = m - i < TILE_ROWS ? m - i : TILE_ROWS;
            auto nothing = [](int64_t) {};
            if (rows == TILE_ROWS && i / TILE_ROWS < sharers) {
                int64_t first = terms / sharers * (i / TILE_ROWS);
                sum_tile<8>(terms, part, b, b + terms * V, acc, sharers,
                            [&](int64_t unit) { ahead(n + TILE_COLUMNS, first + unit); });
            } else if (rows > 6)
                sum_tile<8>(terms, part, b, b + terms * V, acc, terms, nothing);
            else if (rows > 4)
                sum_tile<6>(terms, part, b, b + terms * V, acc, terms, nothing);
            else if (rows > 2)
                sum_tile<4>(terms, part, b, b + terms * V, acc, terms, nothing);
            else
                sum_tile<2>(terms, part, b, b + terms * V, acc, terms, nothing);
            for (int64_t r = 0; r < rows; r++) sink(i + r, n, acc[r][0], acc[r][1]);
        }
    }
}

// ---------------------------------------------------------------- thin products: weights streamed in their own order

constexpr int64_t AHEAD = 8;  // rows of weights asked for before their turn: the processor's own guess stops at pages

// out [m, n] = a [m, k] w [k, n]
template <int m, typename W>
inline void thin_multiply(const float* a, const W* w, float* out, int64_t k, int64_t n) {
    constexpr int64_t BLOCK = 512;  // so that the sums stay in the first cache
    for (int64_t from = 0; from < n; from += BLOCK) {
        int64_t columns = n - from < BLOCK ? n - from : BLOCK;
        for (int i = 0; i < m; i++) memset(out + i * n + from, 0, columns * sizeof(float));
        int64_t t = 0;
        for (; t + 4 <= k; t += 4) {
            const W* row = w + t * n + from;
            float* sums = out + from;
            by_vectors(columns, [&](int64_t c, auto left) {
                vf w0 = load(row + c, left), w1 = load(row + n + c, left);
                vf w2 = load(row + 2 * n + c, left), w3 = load(row + 3 * n + c, left);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) __builtin_prefetch(row + (AHEAD + i) * n + c);
#pragma GCC unroll 8
                for (int i = 0; i < m; i++) {
                    const float* x = a + i * k + t;
                    vf total = load(sums + i * n + c, left);
                    total += x[0] * w0;
                    total += x[1] * w1;
                    total += x[2] * w2;
                    total += x[3] * w3;
                    store(sums + i * n + c, total, left);
                }
            });
        }
        for (; t < k; t++)
            by_vectors(columns, [&](int64_t c, auto left) {
                vf w0 = load(w + t * n + from + c, left);
                for (int i = 0; i < m; i++) {
                    float* to = out + i * n + from + c;
                    store(to, load(to, left) + a[i * k + t] * w0, left);
                }
            });
    }
}

// out [m, k] = a [m, n] w [k, n]^T
template <int m, typename W>
inline void thin_multiply_transposed(const float* a, const W* w, float* out, int64_t k, int64_t n) {
    int64_t t = 0;
    for (; t + 2 <= k; t += 2) {
        vf sums[m][2];
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) sums[i][0] = sums[i][1] = vf{};
        by_vectors(n, [&](int64_t c, auto left) {
            vf w0 = load(w + t * n + c, left), w1 = load(w + (t + 1) * n + c, left);
            __builtin_prefetch(w + (t + AHEAD) * n + c);
            __builtin_prefetch(w + (t + AHEAD + 1) * n + c);
#pragma GCC unroll 8
            for (int i = 0; i < m; i++) {
                vf x = load(a + i * n + c, left);
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
            vf total = vf{};
            by_vectors(n,
                       [&](int64_t c, auto left) { total += load(a + i * n + c, left) * load(w + t * n + c, left); });
            out[i * k + t] = sum(total);
        }
}

// out [k, n] = a [m, k]^T b [m, n]
template <int m, typename W>
inline void thin_outer(const float* a, const float* b, W* out, int64_t k, int64_t n) {
    for (int64_t t = 0; t < k; t++)
        by_vectors(n, [&](int64_t c, auto left) {
            vf total = a[t] * load(b + c, left);
#pragma GCC unroll 8
            for (int i = 1; i < m; i++) total += a[i * k + t] * load(b + i * n + c, left);
            stream(out + t * n + c, total, left);
        });
}

#define BY_ROWS(call) \
    switch (m) {      \
        case 1:       \
            call(1);  \
            break;    \
        case 2:       \
            call(2);  \
            break;    \
        case 3:       \
            call(3);  \
            break;    \
        case 4:       \
            call(4);  \
            break;    \
        case 5:       \
            call(5);  \
            break;    \
        case 6:       \
            call(6);  \
            break;    \
        case 7:       \
            call(7);  \
            break;    \
        default:      \
            call(8);  \
            break;    \
    }

constexpr int64_t THIN = 8;  // most rows of the thin way
template <typename X>
constexpr int64_t SLICE = 512 / sizeof(X);  // rows of an expert worked on at once
constexpr int64_t BLOCK = 128;              // rows of a weight gradient worked on at once

// ---------------------------------------------------------------- one mixture

struct Sizes {
    int64_t width, hidden, top_k, activation;
    int64_t columns() const { return activation == GELU ? hidden : 2 * hidden; }
};

template <typename T>
struct Scratch {  // one thread's
    std::vector<T> data;
    T* get(int64_t size) {
        if ((int64_t)data.size() < size) data.resize(size);
        return data.data();
    }
};

// h from a row of pre.
template <typename X, typename H>
inline void activate(const X* pre, H* h, const Sizes& s) {
    for (int64_t f = 0; f < s.hidden; f += V) {
        int64_t left = s.hidden - f;
        vf gate = load(pre + f, left), value;
        switch (s.activation) {
            case GELU:
                value = gelu_of(gate);
                break;
            case SWIGLU:
                value = silu_of(gate) * load(pre + s.hidden + f, left);
                break;
            default:
                value = gelu_of(gate) * load(pre + s.hidden + f, left);
        }
        store(h + f, value, left);
    }
}

// From 16 columns of dh = dy down_e^T: those of d pre and of weight * h; adds to the gate's gradient.
template <typename X>
inline void activation_backward(vf dh, const X* pre, float weight, X* dpre, X* wh, vf& dweight, int64_t f,
                                const Sizes& s) {
    int64_t left = s.hidden - f;
    if (left <= 0) return;
    vf gate = load(pre + f, left), h;
    vf scaled = weight * dh;
    if (s.activation == GELU) {
        Slope a = gelu(gate);
        h = a.value;
        store(dpre + f, scaled * a.slope, left);
    } else {
        Slope a = s.activation == SWIGLU ? silu(gate) : gelu(gate);
        vf value = load(pre + s.hidden + f, left);
        h = a.value * value;
        store(dpre + f, scaled * value * a.slope, left);
        store(dpre + s.hidden + f, scaled * a.value, left);
    }
    store(wh + f, weight * h, left);
    dweight += dh * h;
}

template <typename X, typename W>
struct Mixture {
    typedef typename Packed<X>::unit Unit;
    Sizes s;
    const X* x;                  // [T, D]
    const W* up;                 // [E, D, P]
    const W* down;               // [E, F, D]
    const int64_t* assignments;  // [R]

    Scratch<Unit> a, b;
    Scratch<float> f0, f1, f2;
    Scratch<X> t0;

    int64_t token(int64_t row) const { return assignments[row] / s.top_k; }
    const X* row_of_x(int64_t row) const { return x + token(row) * s.width; }

    template <typename Row>
    Unit* packed_along(Row row, int64_t m, int64_t length) {
        int64_t panel = units<X>(length) * V;
        Unit* to = a.get((m + V - 1) / V * panel);
        for (int64_t i = 0; i < m; i += V)
            pack_along<X, X>([&](int64_t j) { return row(i + j); }, m - i < V ? m - i : V, length, to + i / V * panel);
        return to;
    }
    // Columns n .. n+15 of w [k, columns]; and rows n .. n+15 of w [rows, k], as columns of its transpose.
    template <typename S, typename Row>
    static void pack_pair(Row row, int64_t rows, int64_t columns, Unit* to, Unit* next) {
        if constexpr (sizeof(S) == 2)
            if (columns >= TILE_COLUMNS) return pack_across_32(row, rows, to, next);
        pack_across<X, S>(row, rows, columns, to);
        pack_across<X, S>([&](int64_t r) { return row(r) + V; }, rows, columns - V, next);
    }
    void pack_columns(const W* w, int64_t k, int64_t columns, int64_t n, Unit* to, Unit* next) {
        pack_pair<W>([&](int64_t t) { return w + t * columns + n; }, k, columns - n, to, next);
    }
    // Ask for unit t of columns n .. n+31 of w.
    static auto columns_ahead(const W* w, int64_t columns) {
        return [=](int64_t n, int64_t t) {
            constexpr int terms = Packed<X>::terms, line = 64 / sizeof(W);
            for (int i = 0; i < terms; i++)
                for (int c = 0; c < TILE_COLUMNS; c += line)
                    __builtin_prefetch(w + (t * terms + i) * columns + n + c, 0, 2);
        };
    }
    static auto rows_ahead(const W* w, int64_t k) {
        return [=](int64_t n, int64_t t) {  // line by line through the next 32 rows
            constexpr int terms = Packed<X>::terms;
            constexpr int64_t step = TILE_COLUMNS * terms * sizeof(W) / 64 * (64 / sizeof(W));
            for (int64_t c = 0; c < step; c += 64 / sizeof(W)) __builtin_prefetch(w + n * k + t * step + c, 0, 2);
        };
    }
    void pack_rows(const W* w, int64_t rows, int64_t k, int64_t n, Unit* to, Unit* next) {
        auto row = [&](int64_t t) { return w + (n + t) * k; };
        pack_along<X, W>(row, rows - n, k, to);
        pack_along<X, W>([&](int64_t t) { return row(V + t); }, rows - n - V, k, next);
    }
    float* floats_of(Scratch<float>& to, const X* rows, int64_t m, int64_t n) {
        float* out = to.get(m * n);
        for (int64_t c = 0; c < m * n; c += V) store(out + c, load(rows + c, m * n - c), m * n - c);
        return out;
    }
    template <typename Row>
    float* gathered(Scratch<float>& to, Row row, int64_t m, int64_t n) {
        float* out = to.get(m * n);
        for (int64_t i = 0; i < m; i++)
            for (int64_t c = 0; c < n; c += V) store(out + i * n + c, load(row(i) + c, n - c), n - c);
        return out;
    }
    static void store_rows(const float* from, X* to, int64_t count) {
        for (int64_t c = 0; c < count; c += V) store(to + c, load(from + c, count - c), count - c);
    }

    void forward_rows(int64_t e, int64_t from, int64_t to, X* pre, X* out) {
        for (int64_t r = from; r < to; r += SLICE<X>) {
            int64_t m = to - r < SLICE<X> ? to - r : SLICE<X>;
            if (m <= THIN)
                forward_thin(e, r, m, pre + r * s.columns(), out + r * s.width);
            else
                forward_thick(e, r, m, pre + r * s.columns(), out + r * s.width);
        }
    }
    void forward_thin(int64_t e, int64_t r, int64_t m, X* pre, X* out) {
        int64_t D = s.width, F = s.hidden, P = s.columns();
        const float* rows = gathered(f0, [&](int64_t i) { return row_of_x(r + i); }, m, D);
        float* sums = f1.get(m * (P > D ? P : D));
#define CALL(rows_) thin_multiply<rows_>(rows, up + e * D * P, sums, D, P)
        BY_ROWS(CALL)
#undef CALL
        store_rows(sums, pre, m * P);
        float* h = f2.get(m * F);
        for (int64_t i = 0; i < m; i++) activate(pre + i * P, h + i * F, s);
#define CALL(rows_) thin_multiply<rows_>(h, down + e * F * D, sums, F, D)
        BY_ROWS(CALL)
#undef CALL
        store_rows(sums, out, m * D);
    }
    void forward_thick(int64_t e, int64_t r, int64_t m, X* pre, X* out) {
        int64_t D = s.width, F = s.hidden, P = s.columns();
        const W *up_e = up + e * D * P, *down_e = down + e * F * D;
        int64_t longest = units<X>(D > F ? D : F);
        Unit* panels = b.get(2 * longest * V);
        Unit* rows = packed_along([&](int64_t i) { return row_of_x(r + i); }, m, D);
        multiply(
            rows, m, units<X>(D), 0, P, panels,
            [&](int64_t n, Unit* to, Unit* next) { pack_columns(up_e, D, P, n, to, next); }, columns_ahead(up_e, P),
            [&](int64_t i, int64_t n, vf left, vf right) {
                store(pre + i * P + n, left, P - n);
                store(pre + i * P + n + V, right, P - n - V);
            });
        X* h = t0.get(m * F);
        for (int64_t i = 0; i < m; i++) activate(pre + i * P, h + i * F, s);
        rows = packed_along([&](int64_t i) { return h + i * F; }, m, F);
        multiply(
            rows, m, units<X>(F), 0, D, panels,
            [&](int64_t n, Unit* to, Unit* next) { pack_columns(down_e, F, D, n, to, next); }, columns_ahead(down_e, D),
            [&](int64_t i, int64_t n, vf left, vf right) {
                store(out + i * D + n, left, D - n);
                store(out + i * D + n + V, right, D - n - V);
            });
    }

    // Gradients of rows: dpre [R, P], wh [R, F] = weight * h, dweight [R], dx_rows [R, D].
    void backward_rows(int64_t e, int64_t from, int64_t to, const X* dy, const X* pre, const float* weights, X* dpre,
                       X* wh, float* dweight, X* dx_rows) {
        for (int64_t r = from; r < to; r += SLICE<X>) {
            int64_t m = to - r < SLICE<X> ? to - r : SLICE<X>, D = s.width, F = s.hidden, P = s.columns();
            if (m <= THIN)
                backward_thin(e, r, m, dy, pre + r * P, weights, dpre + r * P, wh + r * F, dweight + r,
                              dx_rows ? dx_rows + r * D : nullptr);
            else
                backward_thick(e, r, m, dy, pre + r * P, weights, dpre + r * P, wh + r * F, dweight + r,
                               dx_rows ? dx_rows + r * D : nullptr);
        }
    }
    void backward_thin(int64_t e, int64_t r, int64_t m, const X* dy, const X* pre, const float* weights, X* dpre, X* wh,
                       float* dweight, X* dx_rows) {
        int64_t D = s.width, F = s.hidden, P = s.columns();
        const float* rows = gathered(f0, [&](int64_t i) { return dy + token(r + i) * D; }, m, D);
        float* sums = f1.get(m * (F > D ? F : D));
#define CALL(rows_) thin_multiply_transposed<rows_>(rows, down + e * F * D, sums, F, D)
        BY_ROWS(CALL)
#undef CALL
        for (int64_t i = 0; i < m; i++) {
            vf total = vf{};
            for (int64_t f = 0; f < F; f += V)
                activation_backward(load(sums + i * F + f, F - f), pre + i * P, weights[assignments[r + i]],
                                    dpre + i * P, wh + i * F, total, f, s);
            dweight[i] = sum(total);
        }
        if (!dx_rows) return;
        const float* grads = floats_of(f2, dpre, m, P);
#define CALL(rows_) thin_multiply_transposed<rows_>(grads, up + e * D * P, sums, D, P)
        BY_ROWS(CALL)
#undef CALL
        store_rows(sums, dx_rows, m * D);
    }
    void backward_thick(int64_t e, int64_t r, int64_t m, const X* dy, const X* pre, const float* weights, X* dpre,
                        X* wh, float* dweight, X* dx_rows) {
        int64_t D = s.width, F = s.hidden, P = s.columns();
        const W *up_e = up + e * D * P, *down_e = down + e * F * D;
        Unit* panels = b.get(2 * units<X>(D > P ? D : P) * V);
        float* totals = f0.get(m * V);
        memset(totals, 0, m * V * sizeof(float));
        Unit* rows = packed_along([&](int64_t i) { return dy + token(r + i) * D; }, m, D);
        multiply(
            rows, m, units<X>(D), 0, F, panels,
            [&](int64_t n, Unit* to, Unit* next) { pack_rows(down_e, F, D, n, to, next); }, rows_ahead(down_e, D),
            [&](int64_t i, int64_t n, vf left, vf right) {
                float weight = weights[assignments[r + i]];
                vf total = load(totals + i * V);
                activation_backward(left, pre + i * P, weight, dpre + i * P, wh + i * F, total, n, s);
                activation_backward(right, pre + i * P, weight, dpre + i * P, wh + i * F, total, n + V, s);
                store(totals + i * V, total);
            });
        for (int64_t i = 0; i < m; i++) dweight[i] = sum(load(totals + i * V));
        if (!dx_rows) return;
        rows = packed_along([&](int64_t i) { return dpre + i * P; }, m, P);
        multiply(
            rows, m, units<X>(P), 0, D, panels,
            [&](int64_t n, Unit* to, Unit* next) { pack_rows(up_e, D, P, n, to, next); }, rows_ahead(up_e, P),
            [&](int64_t i, int64_t n, vf left, vf right) {
                store(dx_rows + i * D + n, left, D - n);
                store(dx_rows + i * D + n + V, right, D - n - V);
            });
    }

    // Rows `from .. to` of out [k, n] = left [m, k]^T right [m, n], both by their rows.
    template <typename Left, typename Right>
    void weight_gradient(Left left, Right right, int64_t m, int64_t k, int64_t n, int64_t from, int64_t to, W* out) {
        if (m == 0) {
            memset((void*)(out + from * n), 0, (to - from) * n * sizeof(W));
            return;
        }
        if (m <= THIN) {
            int64_t part = to - from;
            const float* one = gathered(f0, [&](int64_t i) { return left(i) + from; }, m, part);
            const float* other = gathered(f1, right, m, n);
            W* rows = out + from * n;
#define CALL(rows_) thin_outer<rows_>(one, other, rows, part, n)
            BY_ROWS(CALL)
#undef CALL
            return;
        }
        int64_t panel = units<X>(m) * V;
        Unit* panels = b.get(2 * panel);
        for (int64_t t = from; t < to; t += BLOCK) {
            int64_t rows = to - t < BLOCK ? to - t : BLOCK;
            Unit* packed = a.get((rows + V - 1) / V * panel);
            for (int64_t i = 0; i < rows; i += V)
                pack_across<X, X>([&](int64_t j) { return left(j) + t + i; }, m, k - t - i, packed + i / V * panel);
            multiply(
                packed, rows, units<X>(m), 0, n, panels,
                [&](int64_t c, Unit* into, Unit* next) {
                    pack_pair<X>([&](int64_t j) { return right(j) + c; }, m, n - c, into, next);
                },
                [](int64_t, int64_t) {},
                [&](int64_t i, int64_t c, vf one, vf other) {
                    W* row = out + (t + i) * n;
                    store(row + c, one, n - c);
                    store(row + c + V, other, n - c - V);
                });
        }
    }
    void backward_weights(int64_t e, int64_t from, int64_t to, int64_t part, int64_t parts, const X* dy, const X* dpre,
                          const X* wh, W* dup, W* ddown) {
        int64_t D = s.width, F = s.hidden, P = s.columns(), m = to - from;
        auto share = [&](int64_t all, int64_t i) { return i >= parts ? all : (all * i / parts) / V * V; };
        if (dup)
            weight_gradient([&](int64_t i) { return row_of_x(from + i); },
                            [&](int64_t i) { return dpre + (from + i) * P; }, m, D, P, share(D, part),
                            share(D, part + 1), dup + e * D * P);
        if (ddown)
            weight_gradient([&](int64_t i) { return wh + (from + i) * F; },
                            [&](int64_t i) { return dy + token(from + i) * D; }, m, F, D, share(F, part),
                            share(F, part + 1), ddown + e * F * D);
    }
};

}  // namespace

// ---------------------------------------------------------------- entry points

extern "C" {

// Everything one call works on. Mirrored field by field in `mixture.py`.
struct Job {
    int64_t width, hidden, top_k, activation;
    int64_t half, half_weights;  // 1: bfloat16 activations, bfloat16 weights
    const void *x, *up, *down;
    const int64_t *assignments, *row_of;
    const uint8_t* kept;
    const float* weights;            // [T, K]
    void *pre, *out, *y;             // forward
    const void* dy;                  // backward, from here on
    void *dpre, *wh, *dx_rows, *dx;  // dx null: not wanted
    float *dweight, *dweights;       // [R], [T, K]
    void *dup, *ddown;               // null: not wanted
};

// A piece of a phase: `kind`, then what it is a piece of.
struct Task {
    int64_t kind, expert, from, to, part, parts;
};
enum Kind { FORWARD = 0, COMBINE = 1, BACKWARD_ROWS = 2, BACKWARD_WEIGHTS = 3, BACKWARD_EXPERT = 4, SPREAD = 5 };
}

namespace {

// A token's rows, weighted (or not), summed.
template <typename X>
void combine(const Job& job, const X* rows, X* to, bool weighted, int64_t from, int64_t until) {
    int64_t D = job.width, K = job.top_k;
    for (int64_t t = from; t < until; t++)
        for (int64_t c = 0; c < D; c += V) {
            vf total = vf{};
            for (int64_t k = t * K; k < (t + 1) * K; k++)
                if (job.kept[k]) {
                    vf row = load(rows + job.row_of[k] * D + c, D - c);
                    total += weighted ? job.weights[k] * row : row;
                }
            store(to + t * D + c, total, D - c);
        }
}

template <typename X, typename W>
void run(const Job& job, const Task* tasks, int64_t count, std::atomic<int64_t>& next) {
    static thread_local Mixture<X, W> own;  // keeps its scratch memory from call to call
    own.s = {job.width, job.hidden, job.top_k, job.activation};
    own.x = (const X*)job.x;
    own.up = (const W*)job.up;
    own.down = (const W*)job.down;
    own.assignments = job.assignments;
    const X *pre = (const X*)job.pre, *dy = (const X*)job.dy;
    X *dpre = (X*)job.dpre, *wh = (X*)job.wh;
    for (int64_t i; (i = next.fetch_add(1)) < count;) {
        const Task& t = tasks[i];
        if (t.kind == FORWARD) own.forward_rows(t.expert, t.from, t.to, (X*)job.pre, (X*)job.out);
        if (t.kind == BACKWARD_ROWS || t.kind == BACKWARD_EXPERT)
            own.backward_rows(t.expert, t.from, t.to, dy, pre, job.weights, dpre, wh, job.dweight, (X*)job.dx_rows);
        if (t.kind == BACKWARD_WEIGHTS || t.kind == BACKWARD_EXPERT)
            own.backward_weights(t.expert, t.from, t.to, t.part, t.parts, dy, dpre, wh, (W*)job.dup, (W*)job.ddown);
        if (t.kind == COMBINE) combine<X>(job, (const X*)job.out, (X*)job.y, true, t.from, t.to);
        if (t.kind == SPREAD) {
            if (job.dx) combine<X>(job, (const X*)job.dx_rows, (X*)job.dx, false, t.from, t.to);
            for (int64_t k = t.from * job.top_k; k < t.to * job.top_k; k++)
                job.dweights[k] = job.kept[k] ? job.dweight[job.row_of[k]] : 0;
        }
    }
}

}  // namespace

extern "C" {

// Work on tasks until none is left; several threads may share `next`.
void mixture_run(const Job* job, const Task* tasks, int64_t count, int64_t* next) {
    auto& shared = *reinterpret_cast<std::atomic<int64_t>*>(next);
    if (!job->half)
        run<float, float>(*job, tasks, count, shared);
    else if (job->half_weights)
        run<bf16, bf16>(*job, tasks, count, shared);
    else
        run<bf16, float>(*job, tasks, count, shared);
}

// A stable counting sort of kept assignments by expert; returns how many there are.
// assignments [N], ends [E], row_of [N] (0 where nothing is kept).
int64_t plan_rows(const int64_t* choices, const uint8_t* kept, int64_t count, int64_t experts, int64_t* assignments,
                  int32_t* ends, int64_t* row_of) {
    std::vector<int64_t> place(experts + 1, 0);
    for (int64_t i = 0; i < count; i++)
        if (kept[i]) place[choices[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) ends[e] = (int32_t)(place[e + 1] += place[e]);
    for (int64_t i = 0; i < count; i++) {
        row_of[i] = 0;
        if (kept[i]) assignments[row_of[i] = place[choices[i]]++] = i;
    }
    return place.empty() || experts == 0 ? 0 : ends[experts - 1];
}
}
