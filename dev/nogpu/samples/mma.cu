// A matrix product on tensor cores: cp.async into two buffers, ldmatrix, mma, against plain loops.
// B comes as (N, K) or as (K, N). All numbers are small multiples of 1/8, so every sum is exact in
// fp32 whatever its order, and the results have to be equal.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cstdint>
#include <cstring>
#include "check.h"
#ifndef __NOGPU__
#include "../ptx_reference.cuh"
#endif

// PITCH: 80 bytes a row, so eight rows are in different banks
const int TILE_M = 64, TILE_N = 32, TILE_K = 32, PITCH = 40;

enum Layout { B_IS_NK, B_IS_KN, B_IS_KN_X4 };

// grid (ceil(N / 32), ceil(M / 64)), 128 threads: each warp makes 16 rows by 32 columns of C. K
// and, for B (K, N), N are multiples of 8.
template <Layout layout>
__global__ void __launch_bounds__(128)
    product(float* c, const __nv_bfloat16* a, const __nv_bfloat16* b, int M, int N, int K) {
    __shared__ __align__(16) __nv_bfloat16 sa[2][TILE_M][PITCH];
    __shared__ __align__(16) __nv_bfloat16 sb[2][32][PITCH];  // 32 x 32: (n, k) or (k, n)
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m0 = blockIdx.y * TILE_M,
        n0 = blockIdx.x * TILE_N;
    float d[4][4] = {};

    auto load = [&](int buffer, int k0) {
        for (int i = threadIdx.x; i < TILE_M * 4; i += blockDim.x) {
            int row = i / 4, column = i % 4 * 8;
            bool valid = m0 + row < M && k0 + column < K;
            cp_async_16_zfill(&sa[buffer][row][column],
                              valid ? a + (size_t)(m0 + row) * K + k0 + column : a, valid);
        }
        int row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
        int n = layout == B_IS_NK ? n0 + row : n0 + column,
            k = layout == B_IS_NK ? k0 + column : k0 + row;
        bool valid = n < N && k < K;
        size_t at = layout == B_IS_NK ? (size_t)n * K + k : (size_t)k * N + n;
        cp_async_16_zfill(&sb[buffer][row][column], valid ? b + at : b, valid);
        cp_async_commit();
    };

    int steps = (K + TILE_K - 1) / TILE_K;
    load(0, 0);
    for (int step = 0; step < steps; step++) {
        int now = step % 2;
        if (step + 1 < steps) {
            load(1 - now, (step + 1) * TILE_K);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        for (int k = 0; k < TILE_K; k += 16) {
            uint32_t fa[4], fb[4][2];
            ldmatrix_x4(fa, &sa[now][16 * warp + lane % 16][k + lane / 16 * 8]);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (layout == B_IS_NK)
                    ldmatrix_x2(fb[j], &sb[now][8 * j + lane % 8][k + lane / 8 % 2 * 8]);
                if (layout == B_IS_KN) ldmatrix_x2_trans(fb[j], &sb[now][k + lane % 16][8 * j]);
                if (layout == B_IS_KN_X4 && j % 2 == 0) {
                    uint32_t r[4];
                    ldmatrix_x4_trans(r, &sb[now][k + lane % 16][8 * j + lane / 16 * 8]);
                    fb[j][0] = r[0];
                    fb[j][1] = r[1];
                    fb[j + 1][0] = r[2];
                    fb[j + 1][1] = r[3];
                }
            }
#pragma unroll
            for (int j = 0; j < 4; j++) mma_m16n8k16_bf16(d[j], fa, fb[j]);
        }
        __syncthreads();  // before the next step's copies overwrite this buffer
    }
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 4; i++) {
            int m = m0 + 16 * warp + lane / 4 + i / 2 * 8, n = n0 + 8 * j + lane % 4 * 2 + i % 2;
            if (m < M && n < N) c[(size_t)m * N + n] = d[j][i];
        }
}

static void test(Layout layout, int M, int N, int K) {
    Numbers numbers;
    std::vector<float> a(M * K), b(K * N);  // b by (K, N)
    for (float& x : a) x = ((int)(numbers.next() % 17) - 8) / 8.0f;
    for (float& x : b) x = ((int)(numbers.next() % 17) - 8) / 8.0f;
    std::vector<__nv_bfloat16> ha(M * K), hb(K * N);
    for (int i = 0; i < M * K; i++) ha[i] = __float2bfloat16(a[i]);
    for (int k = 0; k < K; k++)
        for (int n = 0; n < N; n++)
            hb[layout == B_IS_NK ? n * K + k : k * N + n] = __float2bfloat16(b[k * N + n]);
    __nv_bfloat16 *da = to_device(ha), *db = to_device(hb);
    float* dc = device_array<float>(M * N);
    dim3 grid((N + TILE_N - 1) / TILE_N, (M + TILE_M - 1) / TILE_M);
    if (layout == B_IS_NK)
        product<B_IS_NK><<<grid, 128>>>(dc, da, db, M, N, K);
    else if (layout == B_IS_KN)
        product<B_IS_KN><<<grid, 128>>>(dc, da, db, M, N, K);
    else
        product<B_IS_KN_X4><<<grid, 128>>>(dc, da, db, M, N, K);
    auto c = to_host(dc, M * N);
    int wrong = 0;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            float sum = 0.0f;
            for (int k = 0; k < K; k++) sum += a[m * K + k] * b[k * N + n];
            wrong += !(c[m * N + n] == sum);
        }
    if (wrong)
        printf("layout %d, M %d, N %d, K %d: %d of %d are wrong\n", layout, M, N, K, wrong, M * N);
    failures += wrong;
    CUDA(cudaFree(da));
    CUDA(cudaFree(db));
    CUDA(cudaFree(dc));
}

int main() {
    for (Layout layout : {B_IS_NK, B_IS_KN, B_IS_KN_X4}) {
        test(layout, 64, 32, 32);
        test(layout, 128, 64, 96);
        test(layout, 100, 40, 72);
        test(layout, 1, 8, 8);
    }
    printf(failures ? "%d elements wrong\n" : "all checks passed\n", failures);
    return failures != 0;
}
