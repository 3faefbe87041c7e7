// What the samples share: checks that say what failed, and device arrays filled from host ones.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

inline int failures = 0;
#define CHECK(condition)                                                   \
    do {                                                                   \
        if (!(condition)) {                                                \
            printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            failures++;                                                    \
        }                                                                  \
    } while (0)

inline void cuda_check(cudaError_t e, const char* what, int line) {
    if (e == cudaSuccess) return;
    printf("line %d: %s: %s\n", line, what, cudaGetErrorString(e));
    exit(1);
}
#define CUDA(call) cuda_check(call, #call, __LINE__)

template <class T>
T* to_device(const std::vector<T>& host) {
    T* p;
    CUDA(cudaMalloc((void**)&p, host.size() * sizeof(T)));
    CUDA(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}
template <class T>
T* device_array(size_t n) {
    T* p;
    CUDA(cudaMalloc((void**)&p, n * sizeof(T)));
    return p;
}
// ends a test: it waits, and shows errors of the kernels before
template <class T>
std::vector<T> to_host(const T* p, size_t n) {
    std::vector<T> host(n);
    CUDA(cudaGetLastError());
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(host.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
}

// The same numbers on every machine.
struct Numbers {
    unsigned long long state = 1;
    unsigned next() {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return (unsigned)(state >> 33);
    }
    float uniform() { return (float)(next() % 20001) / 10000.0f - 1.0f; }
};
