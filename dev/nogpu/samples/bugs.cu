// Planted bugs, one a run: bugs NAME. The test sees each of them found. Those that show only in the
// results have a right version beside them, run by bugs NAME right.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cstdint>
#include <cstring>
#include "check.h"
#ifndef __NOGPU__
#include "../ptx_reference.cuh"
#endif

static bool right = false;

// ---- barriers

__global__ void divergent_barrier(float* out) {
    if (threadIdx.x < 40) {
        out[threadIdx.x] = 1.0f;
        __syncthreads();
    } else {
        __syncthreads();
    }
}
__global__ void early_exit(float* out, int n) {
    if ((int)threadIdx.x >= n) return;
    out[threadIdx.x] = 1.0f;
    __syncthreads();
}
// thread i takes what thread i + 32 wrote
__global__ void neighbours(float* out, bool with_barrier) {
    __shared__ float line[256];
    line[threadIdx.x] = threadIdx.x;
    if (with_barrier) __syncthreads();
    out[threadIdx.x] = line[(threadIdx.x + 32) % 256];
}
// a barrier before the read, but none before the next write
__global__ void rewritten(float* out, bool with_barrier) {
    __shared__ float line[256];
    float sum = 0.0f;
    for (int round = 0; round < 4; round++) {
        line[threadIdx.x] = threadIdx.x + 1000 * round;
        __syncthreads();
        sum += line[(threadIdx.x + 32) % 256];
        if (with_barrier) __syncthreads();
    }
    out[threadIdx.x] = sum;
}

// ---- warps

__global__ void lane_neighbours(float* out, bool with_sync) {
    __shared__ float line[32];
    line[threadIdx.x] = threadIdx.x;
    if (with_sync) __syncwarp();
    out[threadIdx.x] = line[(threadIdx.x + 1) % 32];
}
__global__ void exited_lane(int* out) {
    if (threadIdx.x == 9) return;
    out[threadIdx.x] = __shfl_xor_sync(0xffffffff, (int)threadIdx.x, 1);
}
__global__ void shuffle_in_branch(int* out) {
    int v = threadIdx.x;
    if (threadIdx.x < 8) v = __shfl_xor_sync(0xffffffff, v, 1);
    __syncthreads();
    out[threadIdx.x] = v;
}
__global__ void not_in_mask(int* out) { out[threadIdx.x] = __any_sync(0x0000ffff, 1); }
__global__ void two_operations(int* out) {
    int v = threadIdx.x;
    if (v < 16)
        v = __shfl_xor_sync(0xffffffff, v, 1);
    else
        v = __ballot_sync(0xffffffff, v);
    out[threadIdx.x] = v;
}

// ---- ranges

__global__ void shared_overrun(float* out, int n) {
    __shared__ float before[32], tile[33], after[32];
    before[threadIdx.x] = after[threadIdx.x] = 0.0f;
    tile[threadIdx.x] = threadIdx.x;
    float* p = tile;
    if (threadIdx.x == 7) p[n] = 1.0f;
    out[threadIdx.x] = tile[threadIdx.x] + before[threadIdx.x] + after[threadIdx.x];
}
__global__ void dynamic_overrun(float* out) {
    extern __shared__ float buffer[];
    buffer[threadIdx.x + 1] = threadIdx.x;
    out[threadIdx.x] = 0.0f;
}
__global__ void global_write(float* out, int shift) { out[(int)threadIdx.x + shift] = 1.0f; }
__global__ void misaligned(float* out) {
    *(float4*)(out + 1 + 4 * threadIdx.x) = make_float4(1, 2, 3, 4);
}
__global__ void misaligned_shared(float* out) {
    __shared__ float line[128];  // nothing aligns it to 16 bytes
    ((float4*)line)[threadIdx.x] = make_float4(1, 2, 3, 4);
    __syncthreads();
    out[threadIdx.x] = line[threadIdx.x];
}

// ---- values that are not there yet

__global__ void accumulate(float* sum) { sum[threadIdx.x] += 1.0f; }
__global__ void uninitialised_shared(float* out) {
    __shared__ float line[64];
    if (threadIdx.x % 2) line[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = line[threadIdx.x];
}
__global__ void async_copy(float* out, const float* in, bool commit, bool wait) {
    __shared__ __align__(16) float line[128];
    cp_async_16(line + 4 * threadIdx.x, in + 4 * threadIdx.x);
    if (commit) cp_async_commit();
    if (wait) cp_async_wait<0>();
    __syncthreads();
    for (int i = threadIdx.x; i < 128; i += 32) out[i] = line[i];
}
// the second copy overwrites what others still read
__global__ void async_too_early(float* out, const float* in, bool with_barrier) {
    __shared__ __align__(16) float line[128];
    float sum = 0.0f;
    for (int round = 0; round < 2; round++) {
        cp_async_16(line + 4 * threadIdx.x, in + 4 * threadIdx.x);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        sum += line[127 - threadIdx.x];
        if (with_barrier) __syncthreads();
    }
    out[threadIdx.x] = sum;
}
__global__ void ldmatrix_misaligned(float* out) {
    __shared__ __align__(16) __nv_bfloat16 tile[8][20];  // rows of 40 bytes
    uint32_t r[2];
    ldmatrix_x2(r, &tile[threadIdx.x % 8][0]);
    out[threadIdx.x] = r[0];
}
// every block needs what the block before it wrote
__global__ void chain(float* line) {
    if (threadIdx.x == 0) line[blockIdx.x + 1] = line[blockIdx.x] + 1.0f;
}

__global__ void __launch_bounds__(64) small_block(float* out) { out[threadIdx.x] = 1.0f; }

__global__ void null_pointer(float* out, const float* in) { out[threadIdx.x] = in[threadIdx.x]; }

// Prints the first element that is not what it should be.
static int report(const char* name, const float* device, const std::vector<float>& want) {
    auto got = to_host(device, want.size());
    for (size_t i = 0; i < want.size(); i++)
        if (!(got[i] == want[i])) {
            printf("%s: element %zu is %f, not %f%s\n", name, i, got[i], want[i],
                   got[i] != got[i] ? ": read before it was written" : "");
            return 1;
        }
    printf("%s: right\n", name);
    return 0;
}

int main(int argc, char** argv) {
    const char* name = argc > 1 ? argv[1] : "";
    right = argc > 2 && !strcmp(argv[2], "right");
    auto is = [&](const char* s) { return !strcmp(name, s); };
    const int n = 256;
    std::vector<float> numbers(n), shifted(n), sums(n);
    for (int i = 0; i < n; i++) {
        numbers[i] = i;
        shifted[i] = (i + 32) % n;
        sums[i] = 4 * shifted[i] + 6000;
    }
    float *in = to_device(numbers), *out = device_array<float>(n);
    int* integers = device_array<int>(n);

    if (is("divergent_barrier")) divergent_barrier<<<4, 64>>>(out);
    if (is("early_exit")) early_exit<<<4, 64>>>(out, 33);
    if (is("missing_barrier")) {
        neighbours<<<1, n>>>(out, right);
        return report(name, out, shifted);
    }
    if (is("barrier_before_rewrite")) {
        rewritten<<<1, n>>>(out, right);
        return report(name, out, sums);
    }
    if (is("missing_syncwarp")) {
        lane_neighbours<<<1, 32>>>(out, right);
        std::vector<float> want(32);
        for (int i = 0; i < 32; i++) want[i] = (i + 1) % 32;
        return report(name, out, want);
    }
    if (is("exited_lane")) exited_lane<<<1, 32>>>(integers);
    if (is("shuffle_in_branch")) shuffle_in_branch<<<1, 64>>>(integers);
    if (is("not_in_mask")) not_in_mask<<<1, 32>>>(integers);
    if (is("two_operations")) two_operations<<<1, 32>>>(integers);
    if (is("shared_overrun")) shared_overrun<<<2, 32>>>(out, 33);
    if (is("shared_underrun")) shared_overrun<<<2, 32>>>(out, -3);
    if (is("dynamic_overrun")) dynamic_overrun<<<1, 64, 64 * sizeof(float)>>>(out);
    if (is("global_overrun")) global_write<<<1, 64>>>(out, n - 63);
    if (is("global_underrun")) global_write<<<1, 64>>>(out, -3);
    if (is("freed")) {
        CUDA(cudaFree(out));
        global_write<<<1, 64>>>(out, 0);
    }
    // two arrays of 100 in one allocation, the second one 128 elements on
    if (is("arena_gap")) {
#ifdef __NOGPU__
        nogpu_poison(out + 100, 28 * sizeof(float));
#endif
        CUDA(cudaMemset(out, 0, n * sizeof(float)));
        global_write<<<1, 101>>>(out, 0);
    }
    if (is("misaligned")) misaligned<<<1, 32>>>(out);
    if (is("misaligned_shared")) misaligned_shared<<<1, 32>>>(out);
    if (is("uninitialised_global")) {
        if (right) CUDA(cudaMemset(out, 0, n * sizeof(float)));
        accumulate<<<1, n>>>(out);
        return report(name, out, std::vector<float>(n, 1.0f));
    }
    if (is("uninitialised_shared")) {
        uninitialised_shared<<<1, 64>>>(out);
        return report(name, out, std::vector<float>(64, 1.0f));
    }
    std::vector<float> first(numbers.begin(), numbers.begin() + 128);
    if (is("missing_wait")) {
        async_copy<<<1, 32>>>(out, in, true, right);
        return report(name, out, first);
    }
    if (is("missing_commit")) {
        async_copy<<<1, 32>>>(out, in, right, true);
        return report(name, out, first);
    }
    if (is("async_too_early")) {
        async_too_early<<<1, 32>>>(out, in, right);
        std::vector<float> want(32);
        for (int i = 0; i < 32; i++) want[i] = 2.0f * (127 - i);
        return report(name, out, want);
    }
    if (is("ldmatrix_misaligned")) ldmatrix_misaligned<<<1, 32>>>(out);
    if (is("block_order")) {
        CUDA(cudaMemset(out, 0, sizeof(float)));
        chain<<<n - 1, 32>>>(out);
        return report(name, out, numbers);
    }
    if (is("too_many_threads")) small_block<<<1, 65>>>(out);
    if (is("null_pointer")) null_pointer<<<1, 32>>>(out, nullptr);
    if (is("host_pointer")) global_write<<<1, 32>>>(numbers.data(), 0);
    if (is("device_pointer")) printf("%f\n", out[3]);
    if (is("unawaited_copy")) {
        float* pinned;
        CUDA(cudaMallocHost((void**)&pinned, n * sizeof(float)));
        CUDA(cudaMemcpyAsync(pinned, in, n * sizeof(float), cudaMemcpyDeviceToHost));
        if (right) CUDA(cudaDeviceSynchronize());
        float third = pinned[3];
        printf(third == 3.0f ? "unawaited_copy: right\n"
                             : "unawaited_copy: element 3 is %f: read before it was written\n",
               third);
        return third != 3.0f;
    }
    // on one stream the second copy finds what the first has brought
    if (is("copies_on_two_streams")) {
        float* pinned;
        cudaStream_t stream;
        CUDA(cudaMallocHost((void**)&pinned, n * sizeof(float)));
        CUDA(cudaStreamCreate(&stream));
        CUDA(cudaMemcpyAsync(pinned, in, n * sizeof(float), cudaMemcpyDeviceToHost, stream));
        CUDA(cudaMemcpyAsync(out, pinned, n * sizeof(float), cudaMemcpyHostToDevice,
                             right ? stream : nullptr));
        CUDA(cudaStreamDestroy(stream));
        return report(name, out, numbers);
    }
    if (is("copy_too_long"))
        CUDA(cudaMemcpy(numbers.data(), in, (n + 1) * sizeof(float), cudaMemcpyDeviceToHost));
    if (is("copy_direction"))
        CUDA(cudaMemcpy(numbers.data(), in, n * sizeof(float), cudaMemcpyHostToDevice));
    if (is("freed_twice")) {
        CUDA(cudaFree(in));
        CUDA(cudaFree(in));
    }
    if (is("cublas_overrun")) {
        cublasHandle_t handle;
        cublasCreate(&handle);
        float one = 1.0f, zero = 0.0f;
        cublasSgemm(handle, CUBLAS_OP_N, CUBLAS_OP_T, 16, 16, 17, &one, in, 16, in, 16, &zero, out,
                    16);
    }
    CUDA(cudaGetLastError());
    CUDA(cudaDeviceSynchronize());
    printf("%s: nothing found\n", name);
    return 0;
}
