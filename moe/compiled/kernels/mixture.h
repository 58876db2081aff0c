// A mixture of experts, forward and backward, task by task. Shape legend in `job.h`; m rows of a slice.
//
//   pre = x[token] up_e + up_bias_e      h = act(pre)      out = h down_e      y_t = sum_k weight_tk out[row_tk]
//
// `X` is the type of activations, `W` that of weights: floats, bfloat16, or bfloat16 and floats, which are then rounded
// while they are packed. Products are summed in float32. What a task computes depends on nothing but its rows.

#pragma once

#include "activation.h"
#include "job.h"
#include "product.h"
#include "scratch.h"
#include "thin.h"

namespace {

template <typename X, typename W>
class Mixture {
public:
    Mixture(const Job& job, Scratch<X>& scratch)
        : job(job),
          scratch(scratch),
          activation((Activation)job.activation),
          K(job.top_k),
          D(job.width),
          F(job.hidden),
          P(gated(activation) ? 2 * F : F) {}

    void run(const Task& task) {
        switch (task.kind) {
            case FORWARD:
                return for_slices(task, [&](int64_t row, int64_t m) { forward(task.expert, row, m); });
            case COMBINE:
                return combine(task);
            case BACKWARD_ROWS:
                left = {0, (X*)job.dpre, (X*)job.wh};
                return backward_rows(task);
            case BACKWARD_WEIGHTS:
                left = {0, (X*)job.dpre, (X*)job.wh};
                return backward_weights(task);
            case BACKWARD_EXPERT: {
                const int64_t m = task.to - task.from;
                left = {task.from, scratch.dpre.get(m * P), scratch.weighted_h.get(m * F)};
                backward_rows(task);
                return backward_weights(task);
            }
            case SPREAD:
                return spread(task);
        }
    }

private:
    // Rows worked on at once: as many as keep their panels and pre-activations in the second cache, so that the second
    // product finds there what the first one left.
    static constexpr int64_t SLICE = 512 / sizeof(X);
    static constexpr int64_t BLOCK = 128;  // rows of a gradient of weights that are packed at once, for the same reason

    const Job& job;
    Scratch<X>& scratch;
    const Activation activation;
    const int64_t K, D, F, P;
    struct {
        int64_t first;  // the row that begins there
        X *dpre, *weighted_h;
    } left = {};  // what the backward's rows leave for its weights

    int64_t token(int64_t row) const { return job.assignments[row] / K; }
    float weight(int64_t row) const { return job.weights[job.assignments[row]]; }
    const X* x(int64_t row) const { return (const X*)job.x + token(row) * D; }
    const X* dy(int64_t row) const { return (const X*)job.dy + token(row) * D; }
    X* pre(int64_t row) const { return (X*)job.pre + row * P; }
    X* out(int64_t row) const { return (X*)job.out + row * D; }
    X* dpre(int64_t row) const { return left.dpre + (row - left.first) * P; }
    X* weighted_h(int64_t row) const { return left.weighted_h + (row - left.first) * F; }
    X* dx(int64_t row) const { return (X*)job.dx_rows + row * D; }
    const W* up(int64_t expert) const { return (const W*)job.up + expert * D * P; }
    const float* up_bias(int64_t expert) const { return job.up_bias + expert * P; }
    const W* down(int64_t expert) const { return (const W*)job.down + expert * F * D; }

    // ------------------------------------------------------------ rows

    template <typename Body>
    static void for_slices(const Task& task, Body body) {
        for (int64_t row = task.from; row < task.to; row += SLICE)
            body(row, task.to - row < SLICE ? task.to - row : SLICE);
    }

    // Panels of rows; row(i) is where row i begins.
    template <typename Row>
    const Unit<X>* packed(Row row, int64_t m, int64_t length) {
        int64_t panel = units_of<X>(length) * LANES;
        Unit<X>* panels = scratch.rows.get((m + LANES - 1) / LANES * panel);
        for (int64_t i = 0; i < m; i += LANES)
            pack_rows<X>([&](int64_t j) { return row(i + j); }, m - i, length, panels + i / LANES * panel);
        return panels;
    }

    template <typename Row>
    static const float* floats(Buffer<float>& buffer, Row row, int64_t m, int64_t length) {
        float* to = buffer.get(m * length);
        for (int64_t i = 0; i < m; i++)
            for (int64_t c = 0; c < length; c += LANES)
                store(to + i * length + c, load(row(i) + c, length - c), length - c);
        return to;
    }

    static void store_rows(X* to, const float* from, int64_t count) {
        for (int64_t c = 0; c < count; c += LANES) store(to + c, load(from + c, count - c), count - c);
    }

    template <typename T>
    static void add_row(float* to, const T* row, int64_t count) {
        for (int64_t c = 0; c < count; c += LANES)
            store(to + c, load(to + c, count - c) + load(row + c, count - c), count - c);
    }

    // ------------------------------------------------------------ forward

    void forward(int64_t expert, int64_t row, int64_t m) {
        if (m <= THIN)
            forward_thin(expert, row, m);
        else
            forward_thick(expert, row, m);
    }

    void forward_thin(int64_t expert, int64_t row, int64_t m) {
        const float* in = floats(scratch.in, [&](int64_t i) { return x(row + i); }, m, D);
        float* sums = scratch.sums.get(m * (P > D ? P : D));
        with_constant<THIN>(m, [&](auto rows) { thin_multiply<rows>(in, up(expert), sums, D, P); });
        if (job.up_bias)
            for (int64_t i = 0; i < m; i++) add_row(sums + i * P, up_bias(expert), P);
        store_rows(pre(row), sums, m * P);
        float* h = scratch.between.get(m * F);
        for (int64_t i = 0; i < m; i++) activate_row(activation, pre(row + i), h + i * F, F);
        with_constant<THIN>(m, [&](auto rows) { thin_multiply<rows>(h, down(expert), sums, F, D); });
        store_rows(out(row), sums, m * D);
    }

    void forward_thick(int64_t expert, int64_t row, int64_t m) {
        Unit<X>* panels = scratch.panels.get(2 * LANES * units_of<X>(D > F ? D : F));
        auto in = packed([&](int64_t i) { return x(row + i); }, m, D);
        multiply<X>(in, m, Stored<X, W>{up(expert), D, P}, panels, [&](int64_t i, int64_t n, f32x16 a, f32x16 b) {
            if (job.up_bias) {
                a += load(up_bias(expert) + n, P - n);
                b += load(up_bias(expert) + n + LANES, P - n - LANES);
            }
            store_pair(pre(row + i), n, a, b, P);
        });
        X* h = scratch.h.get(m * F);
        for (int64_t i = 0; i < m; i++) activate_row(activation, pre(row + i), h + i * F, F);
        in = packed([&](int64_t i) { return h + i * F; }, m, F);
        multiply<X>(in, m, Stored<X, W>{down(expert), F, D}, panels,
                    [&](int64_t i, int64_t n, f32x16 a, f32x16 b) { store_pair(out(row + i), n, a, b, D); });
    }

    // ------------------------------------------------------------ backward: dpre, weight * h, dweight, dx of rows

    void backward_rows(const Task& task) {
        for_slices(task, [&](int64_t row, int64_t m) {
            if (m <= THIN)
                backward_thin(task.expert, row, m);
            else
                backward_thick(task.expert, row, m);
        });
    }

    // Columns n .. n+15 of a row's dh.
    void backward_activation(int64_t row, int64_t n, f32x16 dh, f32x16& dweight) {
        activate_backward(activation, dh, weight(row), pre(row), dpre(row), weighted_h(row), dweight, n, F);
    }

    void backward_thin(int64_t expert, int64_t row, int64_t m) {
        const float* in = floats(scratch.in, [&](int64_t i) { return dy(row + i); }, m, D);
        float* sums = scratch.sums.get(m * (F > D ? F : D));
        with_constant<THIN>(m, [&](auto rows) { thin_multiply_transposed<rows>(in, down(expert), sums, F, D); });
        for (int64_t i = 0; i < m; i++) {
            f32x16 dweight = {};
            for (int64_t f = 0; f < F; f += LANES)
                backward_activation(row + i, f, load(sums + i * F + f, F - f), dweight);
            job.dweight[row + i] = sum(dweight);
        }
        if (!job.dx_rows) return;
        in = floats(scratch.between, [&](int64_t i) { return dpre(row + i); }, m, P);
        with_constant<THIN>(m, [&](auto rows) { thin_multiply_transposed<rows>(in, up(expert), sums, D, P); });
        store_rows(dx(row), sums, m * D);
    }

    void backward_thick(int64_t expert, int64_t row, int64_t m) {
        Unit<X>* panels = scratch.panels.get(2 * LANES * units_of<X>(D > P ? D : P));
        float* dweights = scratch.sums.get(m * LANES);
        memset(dweights, 0, m * LANES * sizeof(float));
        auto in = packed([&](int64_t i) { return dy(row + i); }, m, D);
        multiply<X>(in, m, Transposed<X, W>{down(expert), D, F}, panels, [&](int64_t i, int64_t n, f32x16 a, f32x16 b) {
            f32x16 dweight = load(dweights + i * LANES);
            backward_activation(row + i, n, a, dweight);
            backward_activation(row + i, n + LANES, b, dweight);
            store(dweights + i * LANES, dweight);
        });
        for (int64_t i = 0; i < m; i++) job.dweight[row + i] = sum(load(dweights + i * LANES));
        if (!job.dx_rows) return;
        in = packed([&](int64_t i) { return dpre(row + i); }, m, P);
        multiply<X>(in, m, Transposed<X, W>{up(expert), P, D}, panels,
                    [&](int64_t i, int64_t n, f32x16 a, f32x16 b) { store_pair(dx(row + i), n, a, b, D); });
    }

    // ------------------------------------------------------------ backward: weights

    // One of several parts of an expert's gradients: some of their rows, summed over all of its rows of activations.
    // That of its bias, a small thing, goes with the first part.
    void backward_weights(const Task& task) {
        const int64_t first = task.from, m = task.to - task.from;
        auto begin = [&](int64_t all, int64_t part) {
            return part >= task.parts ? all : all * part / task.parts / LANES * LANES;
        };
        auto x_row = [&](int64_t i) { return x(first + i); };
        auto dpre_row = [&](int64_t i) { return dpre(first + i); };
        auto h_row = [&](int64_t i) { return weighted_h(first + i); };
        auto dy_row = [&](int64_t i) { return dy(first + i); };
        if (job.dup)
            weight_gradient(x_row, dpre_row, m, D, P, begin(D, task.part), begin(D, task.part + 1),
                            (W*)job.dup + task.expert * D * P);
        if (job.ddown)
            weight_gradient(h_row, dy_row, m, F, D, begin(F, task.part), begin(F, task.part + 1),
                            (W*)job.ddown + task.expert * F * D);
        if (job.dup_bias && task.part == 0) {
            float* total = job.dup_bias + task.expert * P;
            memset(total, 0, P * sizeof(float));
            for (int64_t i = 0; i < m; i++) add_row(total, dpre_row(i), P);
        }
    }

    // Rows from .. to of out [k, n] = left [m, k]^T right [m, n]; left(i) and right(i) are where rows i begin.
    template <typename Left, typename Right>
    void weight_gradient(Left left, Right right, int64_t m, int64_t k, int64_t n, int64_t from, int64_t to, W* out) {
        if (m == 0) {
            memset((void*)(out + from * n), 0, (to - from) * n * sizeof(W));
            return;
        }
        if (m <= THIN) {
            const float* a = floats(scratch.in, [&](int64_t i) { return left(i) + from; }, m, to - from);
            const float* b = floats(scratch.sums, right, m, n);
            with_constant<THIN>(m, [&](auto rows) { thin_outer<rows>(a, b, out + from * n, to - from, n); });
            return;
        }
        const int64_t panel = units_of<X>(m) * LANES;
        Unit<X>* panels = scratch.panels.get(2 * panel);
        Unit<X>* a = scratch.rows.get(BLOCK / LANES * panel);
        for (int64_t block = from; block < to; block += BLOCK) {
            const int64_t rows = to - block < BLOCK ? to - block : BLOCK;
            for (int64_t i = block; i < block + rows; i += LANES)
                pack_columns<X>([&](int64_t t) { return left(t) + i; }, k - i, m, a + (i - block) / LANES * panel);
            multiply<X>(a, rows, Gathered<X, Right>{right, m, n}, panels,
                        [&](int64_t i, int64_t c, f32x16 one, f32x16 other) {
                            stream_pair(out + (block + i) * n, c, one, other, n);
                        });
        }
    }

    // ------------------------------------------------------------ tokens

    void combine(const Task& task) {
        for_sums(task, (const X*)job.out, (X*)job.y, [&](int64_t k, f32x16 row) { return job.weights[k] * row; });
    }

    void spread(const Task& task) {
        if (job.dx) for_sums(task, (const X*)job.dx_rows, (X*)job.dx, [](int64_t, f32x16 row) { return row; });
        for (int64_t k = task.from * K; k < task.to * K; k++)
            job.dweights[k] = job.kept[k] ? job.dweight[job.row_of[k]] : 0;
    }

    // Each token's kept rows, made terms of a sum by `term`.
    template <typename Term>
    void for_sums(const Task& task, const X* rows, X* to, Term term) {
        for (int64_t t = task.from; t < task.to; t++)
            for (int64_t c = 0; c < D; c += LANES) {
                f32x16 total = {};
                for (int64_t k = t * K; k < (t + 1) * K; k++)
                    if (job.kept[k]) total += term(k, load(rows + job.row_of[k] * D + c, D - c));
                store(to + t * D + c, total, D - c);
            }
    }
};

}  // namespace
