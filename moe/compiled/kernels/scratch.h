// Memory that threads keep, so that tasks need not ask the system for any. A thread's grows to what its largest expert
// needs, and stays so.

#pragma once

#include <vector>

#include "panels.h"

namespace {

// Holds what the last task left. Begins with a line of the caches: a vector across two lines costs two loads.
template <typename T>
class Buffer {
public:
    T* get(int64_t size) {
        const size_t enough = (size * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
        if (lines.size() < enough) {
            lines.clear();  // else it is copied, and grows to more than enough
            lines.resize(enough);
        }
        return (T*)lines.data();
    }

private:
    struct alignas(64) Line {
        char bytes[64];
    };
    std::vector<Line> lines;
};

// One thread's.
template <typename X>
struct Scratch {
    Buffer<Unit<X>> rows, panels;
    Buffer<float> in, sums, between;
    Buffer<X> h;
    Buffer<X> dpre, weighted_h;  // of all of an expert's rows
};

}  // namespace
