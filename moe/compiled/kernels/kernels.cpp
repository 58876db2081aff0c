// Arithmetic on a CPU, forward and backward: a mixture of feed-forward networks, fused, and convolutions.
//
// All headers are parts of this one translation unit, hence their unnamed namespaces. Plain C entry points for ctypes,
// and neither Python's headers nor torch's, so that it compiles in seconds.

#include <atomic>
#include <vector>

#include "convolution.h"
#include "mixture.h"

namespace {

template <typename X, typename W>
void run(const Job& job, const Task* tasks, int64_t count, std::atomic<int64_t>& next) {
    static thread_local Scratch<X> scratch;  // kept from call to call
    Mixture<X, W> mixture(job, scratch);
    for (int64_t i; (i = next.fetch_add(1)) < count;) mixture.run(tasks[i]);
}

template <typename X>
void run(const ConvolutionJob& job, const ConvolutionTask* tasks, int64_t count, std::atomic<int64_t>& next) {
    static thread_local Buffer<float> buffer;
    Convolution<X> convolution(job, buffer);
    for (int64_t i; (i = next.fetch_add(1)) < count;) convolution.run(tasks[i]);
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

// The same for a convolution.
void convolution_run(const ConvolutionJob* job, const ConvolutionTask* tasks, int64_t count, int64_t* next) {
    auto& shared = *reinterpret_cast<std::atomic<int64_t>*>(next);
    if (job->half)
        run<bf16>(*job, tasks, count, shared);
    else
        run<float>(*job, tasks, count, shared);
}

// By which a caller knows that its mirror of a job is as large.
int64_t mixture_job_size() { return sizeof(Job); }

int64_t convolution_job_size() { return sizeof(ConvolutionJob); }

// A stable counting sort of kept assignments by expert: assignments [N], ends [E], row_of [N] (0 where nothing is
// kept). Returns how many are kept; -1 if one of them chose no expert.
int64_t plan_rows(const int64_t* choices, const uint8_t* kept, int64_t count, int64_t experts, int64_t* assignments,
                  int32_t* ends, int64_t* row_of) {
    std::vector<int64_t> place(experts + 1, 0);  // of the next row of each expert, once the counts are summed
    for (int64_t i = 0; i < count; i++)
        if (kept[i]) {
            if (choices[i] < 0 || choices[i] >= experts) return -1;
            place[choices[i] + 1]++;
        }
    for (int64_t e = 0; e < experts; e++) ends[e] = (int32_t)(place[e + 1] += place[e]);
    for (int64_t i = 0; i < count; i++) {
        row_of[i] = 0;
        if (kept[i]) assignments[row_of[i] = place[choices[i]]++] = i;
    }
    return experts > 0 ? ends[experts - 1] : 0;
}
}
