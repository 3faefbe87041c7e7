// Barriers, warps, shared memory, atomics, launches and the runtime's calls: each kernel against a
// plain computation.
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include "check.h"

// ---- a launch, one thread an element

__global__ void vector_add(float* c, const float* a, const float* b, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = __ldg(a + i) + __ldcs(&b[i]);
}
static void test_vector_add() {
    const int n = 1000;
    std::vector<float> a(n), b(n);
    for (int i = 0; i < n; i++) {
        a[i] = i;
        b[i] = 0.5f * i;
    }
    float *da = to_device(a), *db = to_device(b), *dc = device_array<float>(n);
    vector_add<<<(n + 127) / 128, 128>>>(dc, da, db, n);
    auto c = to_host(dc, n);
    for (int i = 0; i < n; i++) CHECK(c[i] == 1.5f * i);
    CUDA(cudaFree(da));
    CUDA(cudaFree(db));
    CUDA(cudaFree(dc));
}

// ---- shuffles, static shared memory, a barrier, a __shared__ array in a function

// all threads get it; blockDim.x is a multiple of 32
__device__ float block_sum(float v) {
    __shared__ float sums[32];
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffff, v, d);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();  // an earlier call may still be reading
    if (lane == 0) sums[warp] = v;
    __syncthreads();
    v = lane < (int)blockDim.x / 32 ? sums[lane] : 0.0f;
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffff, v, d);
    return v;
}
template <int THREADS>
__global__ void __launch_bounds__(THREADS) row_statistics(float2* out, const float* in, int n) {
    const float* row = in + (size_t)blockIdx.x * n;
    float s = 0.0f, squares = 0.0f;
    for (int i = threadIdx.x; i < n; i += THREADS) s += row[i];
    float mean = block_sum(s) / n;
    for (int i = threadIdx.x; i < n; i += THREADS) squares += (row[i] - mean) * (row[i] - mean);
    squares = block_sum(squares) / n;
    if (threadIdx.x == 0) out[blockIdx.x] = make_float2(mean, squares);
}
static void test_reduction() {
    const int rows = 37, n = 300;
    Numbers numbers;
    std::vector<float> in(rows * n);
    for (float& x : in) x = numbers.uniform();
    float* din = to_device(in);
    float2* dout = device_array<float2>(rows);
    row_statistics<128><<<rows, 128>>>(dout, din, n);
    auto out = to_host(dout, rows);
    for (int r = 0; r < rows; r++) {
        double mean = 0, variance = 0;
        for (int i = 0; i < n; i++) mean += in[r * n + i] / (double)n;
        for (int i = 0; i < n; i++) variance += (in[r * n + i] - mean) * (in[r * n + i] - mean) / n;
        CHECK(fabs(out[r].x - mean) < 1e-6);
        CHECK(fabs(out[r].y - variance) < 1e-6);
    }
    CUDA(cudaFree(din));
    CUDA(cudaFree(dout));
}

// ---- three dimensions; a struct as an argument; a 2-d __shared__ tile; several variables in one
// declaration

struct Shape {
    int x, y, z;
};
__global__ void coordinates(int* out, Shape s) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y,
        z = blockIdx.z * blockDim.z + threadIdx.z;
    if (x < s.x && y < s.y && z < s.z) out[(z * s.y + y) * s.x + x] = x + 100 * y + 10000 * z;
}
__global__ void transpose(float* out, const float* in, int n) {
    __shared__ float tile[16][17], /* padding keeps banks apart */ last;
    int x = blockIdx.x * 16 + threadIdx.x, y = blockIdx.y * 16 + threadIdx.y;
    if (x < n && y < n) tile[threadIdx.y][threadIdx.x] = in[y * n + x];
    if (threadIdx.x == 3 && threadIdx.y == 5) last = 1.0f;
    __syncthreads();
    int tx = blockIdx.y * 16 + threadIdx.x, ty = blockIdx.x * 16 + threadIdx.y;
    if (tx < n && ty < n) out[ty * n + tx] = tile[threadIdx.x][threadIdx.y] * last;
}
static void test_dimensions() {
    Shape s = {13, 7, 5};
    int* dout = device_array<int>(s.x * s.y * s.z);
    coordinates<<<dim3(4, 2, 3), dim3(4, 4, 2)>>>(dout, s);
    auto out = to_host(dout, s.x * s.y * s.z);
    for (int z = 0; z < s.z; z++)
        for (int y = 0; y < s.y; y++)
            for (int x = 0; x < s.x; x++)
                CHECK(out[(z * s.y + y) * s.x + x] == x + 100 * y + 10000 * z);
    const int n = 50;
    std::vector<float> in(n * n);
    for (int i = 0; i < n * n; i++) in[i] = i;
    float *din = to_device(in), *dt = device_array<float>(n * n);
    dim3 grid((n + 15) / 16, (n + 15) / 16), block(16, 16);
    transpose<<<grid, block>>>(dt, din, n);
    auto t = to_host(dt, n * n);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) CHECK(t[i * n + j] == in[j * n + i]);
    CUDA(cudaFree(dout));
    CUDA(cudaFree(din));
    CUDA(cudaFree(dt));
}

// ---- dynamic shared memory, also more than 48 KB

__global__ void reverse(float* data, int n) {
    extern __shared__ __align__(16) unsigned char buffer[];
    float* line = (float*)buffer;
    for (int i = threadIdx.x; i < n; i += blockDim.x) line[i] = data[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) data[i] = line[n - 1 - i];
}
static void test_dynamic_shared() {
    for (int n : {100, 20000}) {
        std::vector<float> in(n);
        for (int i = 0; i < n; i++) in[i] = i;
        float* d = to_device(in);
        size_t bytes = n * sizeof(float);
        if (bytes > 48 << 10) {
            reverse<<<1, 64, bytes>>>(d, n);  // refused before it is asked for
            CHECK(cudaGetLastError() == cudaErrorInvalidValue);
            CUDA(cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      (int)bytes));
        }
        reverse<<<1, 64, bytes>>>(d, n);
        auto out = to_host(d, n);
        for (int i = 0; i < n; i++) CHECK(out[i] == in[n - 1 - i]);
        CUDA(cudaFree(d));
    }
}

// ---- warps: every shuffle and vote, widths, a last warp of 8 lanes, halves that go apart

__global__ void warps(int* out) {
    int lane = threadIdx.x % 32, v = 100 + lane;
    unsigned all = 0xffffffff;
    int r[10];
    r[0] = __shfl_sync(all, v, (lane * 7 + 3) % 32);
    r[1] = __shfl_up_sync(all, v, 5);
    r[2] = __shfl_down_sync(all, v, 5);
    r[3] = __shfl_xor_sync(all, v, 9);
    r[4] = __shfl_sync(all, v, 2, 8);
    r[5] = __shfl_up_sync(all, v, 3, 8);
    r[6] = __shfl_down_sync(all, v, 3, 8);
    r[7] = __shfl_xor_sync(all, v, 12, 8);
    r[8] = (int)__ballot_sync(all, lane % 3 == 0);
    r[9] = __any_sync(all, lane == 31) + 2 * __any_sync(all, lane == 99) +
           4 * __all_sync(all, lane < 32) + 8 * __all_sync(all, lane < 31);
    for (int i = 0; i < 10; i++) out[(blockIdx.x * 32 + lane) * 10 + i] = r[i];
}
// 40 threads: the second warp has 8
__global__ void small_warp(int* out) {
    int lane = threadIdx.x % 32, sum = lane, lanes = threadIdx.x < 32 ? 32 : 8;
    unsigned active = __activemask();
    for (int d = lanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(active, sum, d);
    double first = __shfl_sync(0xffffffff, 0.5 + lane, 0);
    out[threadIdx.x] = sum + 1000 * __popc(__ballot_sync(0xffffffff, first == 0.5));
}
__global__ void halves(int* out) {
    __shared__ int line[32];
    int lane = threadIdx.x, v = lane;
    if (lane < 16) {
        for (int d = 8; d > 0; d /= 2) v += __shfl_xor_sync(0x0000ffff, v, d);
        line[lane] = v;
        __syncwarp(0x0000ffff);
        v = line[15 - lane];
    } else {
        v = __shfl_sync(0xffff0000, v, 31);
    }
    __syncwarp();
    out[lane] = v;
}
static void test_warps() {
    int* d = device_array<int>(4 * 32 * 10);
    warps<<<4, 32>>>(d);
    auto out = to_host(d, 4 * 32 * 10);
    for (int block = 0; block < 4; block++)
        for (int lane = 0; lane < 32; lane++) {
            int* r = &out[(block * 32 + lane) * 10];
            int segment = lane / 8 * 8, in = lane % 8;
            CHECK(r[0] == 100 + (lane * 7 + 3) % 32);
            CHECK(r[1] == 100 + (lane < 5 ? lane : lane - 5));
            CHECK(r[2] == 100 + (lane + 5 > 31 ? lane : lane + 5));
            CHECK(r[3] == 100 + (lane ^ 9));
            CHECK(r[4] == 100 + segment + 2);
            CHECK(r[5] == 100 + (in < 3 ? lane : lane - 3));
            CHECK(r[6] == 100 + (in + 3 > 7 ? lane : lane + 3));
            CHECK(r[7] == 100 + ((lane ^ 12) >= segment + 8 ? lane : lane ^ 12));
            CHECK(r[8] == 0x49249249);
            CHECK(r[9] == 1 + 4);
        }
    small_warp<<<1, 40>>>(d);
    out = to_host(d, 40);
    for (int i = 0; i < 40; i++) CHECK(out[i] == (i < 32 ? 496 + 32000 : 28 + 8000));
    halves<<<1, 32>>>(d);
    out = to_host(d, 32);
    for (int i = 0; i < 32; i++) CHECK(out[i] == (i < 16 ? 120 : 31));
    CUDA(cudaFree(d));
}

// ---- barriers that count; atomics; the last block of a grid

__global__ void counts(int* out) {
    int n = __syncthreads_count(threadIdx.x % 5 == 0), some = __syncthreads_or(threadIdx.x == 77),
        every = __syncthreads_and(threadIdx.x < 99);
    out[threadIdx.x] = n + 1000 * (some != 0) + 2000 * (every != 0);
}
__device__ unsigned blocks_done;
__constant__ float scale[2];
__global__ void atomics(int* i, unsigned* u, float* f, double* d, unsigned long long* big,
                        float* total) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(i, 1);
    atomicMax(i + 1, t);
    atomicMin(i + 2, -t);
    if (atomicCAS(i + 3, 0, 7) == 0) atomicAdd(i + 4, 1);
    atomicAdd(u, 2u);
    atomicOr(u + 1, 1u << (t % 32));
    atomicInc(u + 2, 9u);
    atomicAdd(f, 0.5f);
    atomicAdd(d, 0.25);
    atomicMax(big, (unsigned long long)t << 33);
    __threadfence();
    if (threadIdx.x == 0 && atomicAdd(&blocks_done, 1u) == gridDim.x - 1)
        *total = *(volatile float*)f * scale[1];
}
static void test_counts() {
    int* d = device_array<int>(100);
    counts<<<1, 100>>>(d);
    auto out = to_host(d, 100);
    for (int x : out) CHECK(x == 20 + 1000);
    CUDA(cudaFree(d));

    const int threads = 50 * 64;
    int* di = to_device(std::vector<int>(5, 0));
    unsigned* du = to_device(std::vector<unsigned>(3, 0));
    float* df = to_device(std::vector<float>(2, 0.0f));
    double* dd = to_device(std::vector<double>(1, 0.0));
    unsigned long long* dbig = to_device(std::vector<unsigned long long>(1, 0));
    float factors[2] = {0.0f, 3.0f};
    CUDA(cudaMemcpyToSymbol(scale, factors, sizeof factors));
    atomics<<<50, 64>>>(di, du, df, dd, dbig, df + 1);
    auto i = to_host(di, 5);
    auto u = to_host(du, 3);
    auto f = to_host(df, 2);
    CHECK(i[0] == threads && i[1] == threads - 1 && i[2] == -(threads - 1) && i[3] == 7 &&
          i[4] == 1);
    CHECK(u[0] == 2 * threads && u[1] == 0xffffffff && u[2] == threads % 10);
    CHECK(f[0] == 0.5f * threads);
    CHECK(to_host(dd, 1)[0] == 0.25 * threads);
    CHECK(to_host(dbig, 1)[0] == (unsigned long long)(threads - 1) << 33);
    unsigned done = 0;
    CUDA(cudaMemcpyFromSymbol(&done, blocks_done, sizeof done));
    CHECK(done == 50);
    CUDA(cudaFree(di));
    CUDA(cudaFree(du));
    CUDA(cudaFree(df));
    CUDA(cudaFree(dd));
    CUDA(cudaFree(dbig));
}

// ---- vectors, bf16, arithmetic

__global__ void arithmetic(float4* out, __nv_bfloat16* half, const float4* in, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float4 v = __ldcs(in + i);
    float4 r =
        make_float4(rsqrtf(v.x), __expf(-v.y), __fdividef(v.z, v.w), fmaxf(tanhf(v.x), 0.5f));
    r.x += (float)(min(i, 3) + max(2u, 1u)) + min(v.x, v.y) + __int_as_float(0x3f800000) +
           (float)__popc(0xf0f0u) + exp2f(3.0f);
    __stcs(out + i, r);
    __nv_bfloat162 pair = __floats2bfloat162_rn(v.x, v.y);
    half[2 * i] = __float2bfloat16(v.z);
    half[2 * i + 1] = __float2bfloat16(__bfloat162float(pair.x) + __bfloat1622float2(pair).y);
}
static void test_arithmetic() {
    const int n = 100;
    Numbers numbers;
    std::vector<float4> in(n);
    for (float4& v : in)
        v = make_float4(2.0f + numbers.uniform(), numbers.uniform(), numbers.uniform(),
                        2.0f + numbers.uniform());
    float4 *din = to_device(in), *dout = device_array<float4>(n);
    __nv_bfloat16* dhalf = device_array<__nv_bfloat16>(2 * n);
    arithmetic<<<2, 64>>>(dout, dhalf, din, n);
    auto out = to_host(dout, n);
    auto half = to_host(dhalf, 2 * n);
    for (int i = 0; i < n; i++) {
        float4 v = in[i];
        CHECK(fabs(out[i].x -
                   (1 / sqrt(v.x) + std::min(i, 3) + 2 + std::min(v.x, v.y) + 1 + 8 + 8)) < 1e-4);
        CHECK(fabs(out[i].y - exp(-v.y)) < 1e-5);
        CHECK(fabs(out[i].z - v.z / v.w) < 1e-5);
        CHECK(fabs(out[i].w - std::max(tanhf(v.x), 0.5f)) < 1e-5);
        CHECK(fabs(__bfloat162float(half[2 * i]) - v.z) <= fabs(v.z) / 256);
        CHECK(fabs(__bfloat162float(half[2 * i + 1]) - (v.x + v.y)) <= 0.03);
    }
    CUDA(cudaFree(din));
    CUDA(cudaFree(dout));
    CUDA(cudaFree(dhalf));
}

// ---- what a launch refuses

__global__ void nothing() {}
static cudaError_t try_launch(dim3 grid, dim3 block, size_t smem) {
    nothing<<<grid, block, smem>>>();
    cudaError_t e = cudaGetLastError();
    CHECK(cudaGetLastError() == cudaSuccess);
    return e;
}
static void test_launch_errors() {
    CHECK(try_launch(1, 1, 0) == cudaSuccess);
    CHECK(try_launch(3, 1024, 48 << 10) == cudaSuccess);
    CHECK(try_launch(1, 1025, 0) == cudaErrorInvalidConfiguration);
    CHECK(try_launch(1, dim3(32, 33), 0) == cudaErrorInvalidConfiguration);
    CHECK(try_launch(1, dim3(1, 1, 65), 0) == cudaErrorInvalidConfiguration);
    CHECK(try_launch(0, 1, 0) == cudaErrorInvalidConfiguration);
    CHECK(try_launch(dim3(1, 65536), 1, 0) == cudaErrorInvalidConfiguration);
    CHECK(try_launch(1, 1, (48 << 10) + 1) == cudaErrorInvalidValue);
    int most = 0;
    CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    CHECK(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, most + 1) ==
          cudaErrorInvalidValue);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    CUDA(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    CHECK(try_launch(1, 1, most) == cudaSuccess);
    CHECK(try_launch(1, 1, most + 1) == cudaErrorInvalidValue);
}

// ---- streams, events, memory

static void test_runtime() {
    int devices = 0;
    CUDA(cudaGetDeviceCount(&devices));
    CUDA(cudaSetDevice(0));
    CHECK(devices >= 1);
    cudaDeviceProp properties;
    CUDA(cudaGetDeviceProperties(&properties, 0));
    CHECK(properties.warpSize == 32 && properties.major >= 8);

    size_t free_before, free_now, total;
    CUDA(cudaMemGetInfo(&free_before, &total));
    const int n = 10000;
    float* d = device_array<float>(n);
    CUDA(cudaMemGetInfo(&free_now, &total));
    CHECK(free_now <= free_before && free_before <= total);
    void* too_much = nullptr;
    CHECK(cudaMalloc(&too_much, total + 1) == cudaErrorMemoryAllocation && !too_much);
    CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);

    cudaStream_t stream;
    cudaEvent_t start, end;
    CUDA(cudaStreamCreate(&stream));
    CUDA(cudaEventCreate(&start));
    CUDA(cudaEventCreate(&end));
    float* pinned;
    CUDA(cudaMallocHost((void**)&pinned, n * sizeof(float)));
    for (int i = 0; i < n; i++) pinned[i] = i;
    CUDA(cudaEventRecord(start, stream));
    CUDA(cudaMemcpyAsync(d, pinned, n * sizeof(float), cudaMemcpyHostToDevice, stream));
    vector_add<<<(n + 255) / 256, 256, 0, stream>>>(d, d, d, n);
    CUDA(cudaStreamSynchronize(stream));
    CUDA(cudaMemcpyAsync(pinned, d, n * sizeof(float), cudaMemcpyDeviceToHost, stream));
    CUDA(cudaMemsetAsync(d, 0, n * sizeof(float), stream));
    CUDA(cudaEventRecord(end, stream));
    CUDA(cudaStreamWaitEvent(stream, end, 0));
    CUDA(cudaEventSynchronize(end));
    for (int i = 0; i < n; i++) CHECK(pinned[i] == 2.0f * i);
    float ms = -1;
    CUDA(cudaEventElapsedTime(&ms, start, end));
    CHECK(ms >= 0 && ms < 1e5);
    for (float x : to_host(d, n)) CHECK(x == 0.0f);
    CUDA(cudaFreeHost(pinned));
    CUDA(cudaEventDestroy(start));
    CUDA(cudaEventDestroy(end));
    CUDA(cudaStreamDestroy(stream));
    CUDA(cudaFree(d));
    CUDA(cudaMemGetInfo(&free_now, &total));
    CHECK(free_now == free_before);
}

int main() {
    test_vector_add();
    test_reduction();
    test_dimensions();
    test_dynamic_shared();
    test_warps();
    test_counts();
    test_arithmetic();
    test_launch_errors();
    test_runtime();
    printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
    return failures != 0;
}
