// Activations between an expert's two products, and their gradients.
//
// Shape legend: F hidden width; a row of `pre` has F columns, or 2F when gated (gate first).
//
//   gelu      h = gelu(pre)
//   swiglu    h = silu(gate) * value
//   geglu     h = gelu(gate) * value

#pragma once

#include "vector.h"

namespace {

enum Activation : int64_t { GELU = 0, SWIGLU = 1, GEGLU = 2 };

inline bool gated(Activation activation) { return activation != GELU; }

struct ValueAndSlope {
    f32x16 value, slope;
};

// The normal distribution up to x, and its density. With z = |x| / sqrt 2 and u = 1 / (1 + 0.4 z), erfc(z) is
// exp(-z^2) u q(u); q is fitted so that erfc is off by less than 1e-7.
inline ValueAndSlope normal(f32x16 x) {
    f32x16 z = (x < 0 ? -x : x) * 0.70710678f;
    f32x16 u = 1.0f / (1.0f + 0.4f * z);
    f32x16 e = exp_of(-z * z);
    f32x16 q = splat(-0.20029444992542267f);
    q = q * u + 0.7092923521995544f;
    q = q * u - 0.3711453676223755f;
    q = q * u + 0.4684673249721527f;
    q = q * u + 0.16174554824829102f;
    q = q * u + 0.23193460702896118f;
    f32x16 tail = 0.5f * e * (q * u);
    return {x < 0 ? tail : 1.0f - tail, 0.39894228f * e};
}

inline ValueAndSlope gelu(f32x16 x) {
    ValueAndSlope phi = normal(x);
    return {x * phi.value, phi.value + x * phi.slope};
}

inline f32x16 sigmoid(f32x16 x) {
    f32x16 e = exp_of(x < 0 ? x : -x);  // of -|x|, which never overflows
    f32x16 s = 1.0f / (1.0f + e);
    return x < 0 ? e * s : s;
}

inline ValueAndSlope silu(f32x16 x) {
    f32x16 s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
}

inline ValueAndSlope activate(Activation activation, f32x16 x) { return activation == SWIGLU ? silu(x) : gelu(x); }

// A row of h from one of pre.
template <typename X, typename H>
inline void activate_row(Activation activation, const X* pre, H* h, int64_t hidden) {
    for (int64_t f = 0; f < hidden; f += LANES) {
        int64_t left = hidden - f;
        f32x16 result = activate(activation, load(pre + f, left)).value;
        if (gated(activation)) result *= load(pre + hidden + f, left);
        store(h + f, result, left);
    }
}

// Columns f .. f+15 of a row's gradients. From dh = dy down^T, not yet times the row's weight: those of dpre, and of
// weight * h, which the gradient of `down` is made of. Adds dh h, lane by lane, to the gradient of the weight.
template <typename X>
inline void activate_backward(Activation activation, f32x16 dh, float weight, const X* pre, X* dpre, X* weighted_h,
                              f32x16& dweight, int64_t f, int64_t hidden) {
    int64_t left = hidden - f;
    if (left <= 0) return;
    ValueAndSlope gate = activate(activation, load(pre + f, left));
    f32x16 h = gate.value, weighted_dh = weight * dh;
    if (gated(activation)) {
        f32x16 value = load(pre + hidden + f, left);
        h *= value;
        store(dpre + hidden + f, weighted_dh * gate.value, left);
        weighted_dh *= value;
    }
    store(dpre + f, weighted_dh * gate.slope, left);
    store(weighted_h + f, weight * h, left);
    dweight += dh * h;
}

}  // namespace
