// What a caller asks of a mixture. Both structs are mirrored field by field in `moe/experts/cpu_mixture.py`.
//
// Shape legend: T tokens, K choices of each, R rows (kept assignments, sorted by expert), E experts, D model width,
// F hidden width, P columns of `up` (F, or 2F when gated: gate first).

#pragma once

#include <cstdint>

extern "C" {

// Everything one call works on.
struct Job {
    int64_t width, hidden, top_k, activation;
    int64_t half, half_weights;  // 1: bfloat16 activations, bfloat16 weights
    const void *x, *up, *down;   // [T, D], [E, D, P], [E, F, D]
    const int64_t* assignments;  // [R], t * K + k of each row
    const int64_t* row_of;       // [T, K]
    const uint8_t* kept;         // [T, K]
    const float* weights;        // [T, K]
    const float* up_bias;        // [E, P]; null: none
    void *pre, *out, *y;         // [R, P], [R, D], [T, D]
    const void* dy;              // [T, D]; used by the backward, like all that follow
    void *dpre, *wh;             // [R, P], [R, F]; null without tasks of the kinds BACKWARD_ROWS, BACKWARD_WEIGHTS
    void *dx_rows, *dx;          // [R, D], [T, D]; null: not wanted
    float *dweight, *dweights;   // [R], [T, K]
    void *dup, *ddown;           // like up and down; null: not wanted
    float* dup_bias;             // [E, P]; null: not wanted
};

// A piece of work: `kind`, then what it is a piece of.
struct Task {
    int64_t kind, expert;
    int64_t from, to;     // rows, or tokens
    int64_t part, parts;  // of an expert's gradients
};

enum Kind { FORWARD = 0, COMBINE = 1, BACKWARD_ROWS = 2, BACKWARD_WEIGHTS = 3, BACKWARD_EXPERT = 4, SPREAD = 5 };
}
