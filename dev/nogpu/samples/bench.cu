// How fast nogpu runs kernels: nanoseconds for a thread, a barrier, a shuffle, an mma; blocks a
// second; cuBLAS's rate.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <chrono>
#include <cstdint>
#include <cstdio>
#ifndef __NOGPU__
#include "../ptx_reference.cuh"
#endif

static double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

__global__ void straight(float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = 2.0f * i;
}
__global__ void barriers(float* out, int rounds) {
    __shared__ float line[1024];
    float v = threadIdx.x;
    for (int r = 0; r < rounds; r++) {
        line[threadIdx.x] = v;
        __syncthreads();
        v += line[(threadIdx.x + 1) % blockDim.x];
        __syncthreads();
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = v;
}
__global__ void shuffles(float* out, int rounds) {
    float v = threadIdx.x;
    for (int r = 0; r < rounds; r++) v += __shfl_xor_sync(0xffffffff, v, 1 << r % 5);
    out[blockIdx.x * blockDim.x + threadIdx.x] = v;
}
// the usual row sum: strided loads, shuffles, one barrier
__global__ void reduction(float* out, const float* in, int n) {
    __shared__ float sums[32];
    float v = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) v += in[(size_t)blockIdx.x * n + i];
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffff, v, d);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < (int)blockDim.x / 32; i++) v += sums[i];
        out[blockIdx.x] = v;
    }
}
__global__ void mmas(float* out, int rounds) {
    float d[4] = {};
    uint32_t a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80},
             b[2] = {0x3f803f80, 0x3f803f80};
    for (int r = 0; r < rounds; r++) mma_m16n8k16_bf16(d, a, b);
    out[blockIdx.x * blockDim.x + threadIdx.x] = d[0];
}

int main() {
    float* p;
    const int n = 1 << 20;
    if (cudaMalloc((void**)&p, 2 * n * sizeof(float)) != cudaSuccess) return 1;
    cudaMemset(p, 0, 2 * n * sizeof(float));
    const int threads = 256;
    for (int pass = 0; pass < 2; pass++) {  // the first one makes the fibers
        double t = seconds();
        straight<<<n / threads, threads>>>(p, n);
        t = seconds() - t;
        if (pass)
            printf("straight: %.1f ns a thread, %.0f blocks of %d a second\n", 1e9 * t / n,
                   n / threads / t, threads);

        const int blocks = 64, rounds = 20;
        t = seconds();
        barriers<<<blocks, threads>>>(p, rounds);
        t = seconds() - t;
        if (pass)
            printf("barriers: %.1f ns a thread and barrier\n",
                   1e9 * t / blocks / threads / rounds / 2);

        t = seconds();
        shuffles<<<blocks, threads>>>(p, 2 * rounds);
        t = seconds() - t;
        if (pass)
            printf("shuffles: %.1f ns a thread and shuffle\n",
                   1e9 * t / blocks / threads / rounds / 2);

        t = seconds();
        reduction<<<n / 768, threads>>>(p + n, p, 768);
        t = seconds() - t;
        if (pass) printf("row sums of 768: %.0f blocks of %d a second\n", n / 768 / t, threads);

        t = seconds();
        mmas<<<blocks, 128>>>(p, rounds);
        t = seconds() - t;
        if (pass) printf("mma: %.0f ns each\n", 1e9 * t / blocks / 4 / rounds);
    }
    double start = seconds();
    for (int i = 0; i < 1000; i++) straight<<<1, 32>>>(p, n);
    printf("launch: %.1f us for one block of 32 threads", 1e3 * (seconds() - start));
    start = seconds();
    for (int i = 0; i < 1000; i++) straight<<<4, 128>>>(p, n);
    printf(", %.1f us for 4 of 128\n", 1e3 * (seconds() - start));
    printf("launch errors: %s\n", cudaGetErrorString(cudaGetLastError()));

    cublasHandle_t handle;
    cublasCreate(&handle);
    const int m = 1024;
    float one = 1.0f, zero = 0.0f;
    double t = seconds();
    cublasSgemm(handle, CUBLAS_OP_T, CUBLAS_OP_N, m, m, m, &one, p, m, p + n, m, &zero, p, m);
    cudaDeviceSynchronize();
    t = seconds() - t;
    printf("cublasSgemm of 1024: %.1f GFLOP/s\n", 2e-9 * m * m * m / t);
    t = seconds();
    cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, m, m, m, &one, p, CUDA_R_16BF, m, p + n,
                 CUDA_R_16BF, m, &zero, p + n / 2, CUDA_R_32F, m, CUBLAS_COMPUTE_32F,
                 CUBLAS_GEMM_DEFAULT);
    cudaDeviceSynchronize();
    t = seconds() - t;
    printf("cublasGemmEx of 1024, bf16: %.1f GFLOP/s\n", 2e-9 * m * m * m / t);
    cublasDestroy(handle);
    cudaFree(p);
    return 0;
}
