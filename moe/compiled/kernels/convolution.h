// Convolutions along packed sequences, forward and backward, task by task: a token reads the tokens around it, as far
// as its sequence goes. Sums are float32. Mirrored field by field in `moe/attention/banded_cpu.py`.
//
// Shape legend: T tokens, B sequences, H heads, C channels of a head, D = H C, K taps (odd), S tasks.
//
//   CONVOLVE    y[t, h] = sum_k kernel[t, h, k] x[t + k - K / 2, h]          each token's own kernel
//   DEPTHWISE   y[t, d] = sum_k weight[k, d] x[t + k - K / 2, d]             one for each channel
//
// A token's gradient is gathered from the tokens that read it, so no two tasks write to the same place.

#pragma once

#include <algorithm>

#include "scratch.h"
#include "vector.h"

extern "C" {
struct ConvolutionJob {
    int64_t heads, channels, taps, sequences, half;  // H, C, K, B; 1: bfloat16, else float
    const int32_t* ends;                             // [B + 1], where sequences begin and end
    const void* x;                                   // [T, D]
    int64_t x_row;                                   // from one token of x to the next
    const void* kernel;                              // [T, H, K]
    const float* weight;                             // [K, D]
    void* y;                                         // [T, D]
    const void* dy;                                  // [T, D]; used by the backward, like all that follow
    void *dx, *dkernel;                              // [T, D], [T, H, K]; null: not wanted
    float* dweight;                                  // [S, K, D], each task's own
};

struct ConvolutionTask {
    int64_t kind, number;  // of the task: its place in dweight
    int64_t from, to;      // tokens
    int64_t unused[2];     // as long as `Task`
};
}

namespace {

enum ConvolutionKind { CONVOLVE = 0, CONVOLVE_BACKWARD = 1, DEPTHWISE = 2, DEPTHWISE_WEIGHTS = 3 };

template <typename X>
class Convolution {
public:
    Convolution(const ConvolutionJob& job, Buffer<float>& buffer)
        : job(job),
          buffer(buffer),
          H(job.heads),
          C(job.channels),
          D(job.heads * job.channels),
          K(job.taps),
          reach(job.taps / 2),
          x((const X*)job.x),
          dy((const X*)job.dy),
          kernel((const X*)job.kernel) {}

    void run(const ConvolutionTask& task) {
        switch (task.kind) {
            case CONVOLVE:
                return for_tokens(task, [&](int64_t t, int64_t first, int64_t last) { convolve(t, first, last); });
            case CONVOLVE_BACKWARD:
                return for_tokens(task, [&](int64_t t, int64_t first, int64_t last) {
                    if (job.dkernel) kernel_gradient(t, first, last);
                    if (job.dx) gather(t, first, last);
                });
            case DEPTHWISE:
                return for_tokens(task, [&](int64_t t, int64_t first, int64_t last) { depthwise(t, first, last); });
            case DEPTHWISE_WEIGHTS:
                return weight_gradient(task);
        }
    }

private:
    const ConvolutionJob& job;
    Buffer<float>& buffer;
    const int64_t H, C, D, K, reach;
    const X *x, *dy, *kernel;

    // body(t, first, last) for every token of the task, with the taps that are in its sequence: first <= k < last. What
    // is read lies within the tokens in whatever order bounds are, if the last of them is the number of tokens.
    template <typename Body>
    void for_tokens(const ConvolutionTask& task, Body body) {
        const int32_t* ends = job.ends;
        const int64_t tokens = ends[job.sequences];
        int64_t b = std::upper_bound(ends, ends + job.sequences + 1, (int32_t)task.from) - ends - 1;
        for (int64_t t = task.from; t < task.to; t++) {
            while (t >= ends[b + 1]) b++;
            const int64_t start = std::max<int64_t>(0, ends[b]), end = std::min<int64_t>(tokens, ends[b + 1]);
            body(t, std::max<int64_t>(0, start - t + reach), std::min<int64_t>(K, end - t + reach));
        }
    }

    void convolve(int64_t t, int64_t first, int64_t last) {
        float* taps = buffer.get(K);
        for (int64_t h = 0; h < H; h++) {
            widen(kernel + (t * H + h) * K, taps);
            X* out = (X*)job.y + t * D + h * C;
            for_vectors(C, [&](int64_t c, auto count) {
                const X* from = x + (t - reach) * job.x_row + h * C + c;
                f32x16 sum{};
                for (int64_t k = first; k < last; k++) sum += taps[k] * load(from + k * job.x_row, count);
                store(out + c, sum, count);
            });
        }
    }

    // Of the token's own kernel: how what it reads goes with its gradient; nothing for what it doesn't read.
    void kernel_gradient(int64_t t, int64_t first, int64_t last) {
        float* taps = buffer.get(K);
        for (int64_t h = 0; h < H; h++) {
            std::fill(taps, taps + K, 0.0f);
            for (int64_t k = first; k < last; k++) {
                const X* from = x + (t + k - reach) * job.x_row + h * C;
                f32x16 products{};
                for_vectors(C, [&](int64_t c, auto count) {
                    products += load(dy + t * D + h * C + c, count) * load(from + c, count);
                });
                taps[k] = sum(products);
            }
            X* out = (X*)job.dkernel + (t * H + h) * K;
            for_vectors(K, [&](int64_t k, auto count) { store(out + k, load(taps + k, count), count); });
        }
    }

    // The token at tap k of its own kernel is the one that reads it with tap K - 1 - k.
    void gather(int64_t t, int64_t first, int64_t last) {
        for (int64_t h = 0; h < H; h++) {
            X* out = (X*)job.dx + t * D + h * C;
            for_vectors(C, [&](int64_t c, auto count) {
                f32x16 sum{};
                for (int64_t k = first; k < last; k++) {
                    const int64_t reader = t + k - reach;
                    const float tap = single(kernel[(reader * H + h) * K + K - 1 - k]);
                    sum += tap * load(dy + reader * D + h * C + c, count);
                }
                store(out + c, sum, count);
            });
        }
    }

    void depthwise(int64_t t, int64_t first, int64_t last) {
        X* out = (X*)job.y + t * D;
        for_vectors(D, [&](int64_t d, auto count) {
            const X* from = x + (t - reach) * job.x_row + d;
            f32x16 sum{};
            for (int64_t k = first; k < last; k++)
                sum += load(job.weight + k * D + d, count) * load(from + k * job.x_row, count);
            store(out + d, sum, count);
        });
    }

    void weight_gradient(const ConvolutionTask& task) {
        float* sums = buffer.get(K * LANES);
        float* out = job.dweight + task.number * K * D;
        for_vectors(D, [&](int64_t d, auto count) {
            std::fill(sums, sums + K * LANES, 0.0f);
            for_tokens(task, [&](int64_t t, int64_t first, int64_t last) {
                const f32x16 gradient = load(dy + t * D + d, count);
                const X* from = x + (t - reach) * job.x_row + d;
                for (int64_t k = first; k < last; k++) {
                    float* sum = sums + k * LANES;
                    store(sum, load(sum) + gradient * load(from + k * job.x_row, count));
                }
            });
            for (int64_t k = 0; k < K; k++) store(out + k * D + d, load(sums + k * LANES), count);
        });
    }

    void widen(const X* from, float* to) {
        for_vectors(K, [&](int64_t k, auto count) { store(to + k, load(from + k, count), count); });
    }

    static float single(float value) { return value; }

    static float single(bf16 value) {
        uint32_t bits = (uint32_t)value.bits << 16;
        float wide;
        memcpy(&wide, &bits, sizeof wide);
        return wide;
    }
};

}  // namespace
