// Attention, forward: out = softmax(q k^T / 8) v, causal, per head of 64; qkv (N, 3C), out (N, C),
// lse (B, NH, T), the log of the softmax's denominator.
//
// Floor, with E bytes an element: qkv read, out and lse written, 4 N C E + 4 N NH bytes.
// Arithmetic: for each query and each key up to it two products of 64, 256, and about 4 for the
// softmax. The tensor cores, or the exponentials, limit, not memory: attention.md has the model.

#include "common.cuh"

#ifndef PRECISION_FP32

// 2 to 5: tensor cores by mma.sync. A block of 4 warps takes 64 M queries, a warp 16 M of them, and
// walks the keys in tiles of 64. In shared memory a row has LINE elements: with 64 the 8 rows that
// ldmatrix reads at once lie in the same banks. AHEAD: the next tile comes while this one is used.
template <int M, int LINE, bool AHEAD>
__global__ void __launch_bounds__(128, 2)
    attention_tiles(__nv_bfloat16* out, float* lse, const __nv_bfloat16* qkv, int T, int C) {
    __shared__ __align__(16) __nv_bfloat16 tiles[AHEAD ? 4 : 2][TILE][LINE];  // k and v; at first q
    int lane = threadIdx.x % WARP, h = blockIdx.y, begin = blockIdx.x * T, column = h * HEAD;
    int q0 = (gridDim.z - 1 - blockIdx.z) * 64 * M, first = q0 + threadIdx.x / WARP * 16 * M;
    auto load = [&](int tile, int column, int row) {  // 64 rows from row on; zeros beyond T
        int chunk = threadIdx.x % 8 * 8;
        for (int i = threadIdx.x / 8; i < TILE; i += 16)
            cp_async_16_zfill(&tiles[tile][i][chunk],
                              qkv + int64_t(begin + row + i) * 3 * C + column + chunk, row + i < T);
    };
    for (int m = 0; m < M; m++) load(m, column, q0 + m * TILE);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t q[M][4][4];
    const auto* rows = tiles[0] + (first - q0);
    for (int m = 0; m < M; m++) {
        for (int k = 0; k < 4; k++)
            ldmatrix_x4(q[m][k], &rows[16 * m + lane % 16][16 * k + lane / 16 * 8]);
    }
    __syncthreads();
    float o[M][8][4] = {}, top[M][2], sum[M][2] = {};
    for (int m = 0; m < M; m++) top[m][0] = top[m][1] = -INFINITY;
    int keys = min(q0 + 64 * M, T);
    if (AHEAD) load(0, column + C, 0), load(1, column + 2 * C, 0), cp_async_commit();
    for (int k0 = 0; k0 < keys; k0 += TILE) {
        int now = AHEAD ? k0 / TILE % 2 * 2 : 0, next = AHEAD ? k0 + TILE : k0;
        if (next < keys) {
            load(AHEAD ? 2 - now : 0, column + C, next);
            load(AHEAD ? 3 - now : 1, column + 2 * C, next);
        }
        cp_async_commit();
        cp_async_wait<AHEAD ? 1 : 0>();
        __syncthreads();
        float s[M][8][4] = {};
#pragma unroll
        for (int j = 0; j < 8; j += 2) {  // s = q k^T
            for (int k = 0; k < 4; k++) {
                uint32_t b[4];
                ldmatrix_x4(
                    b, &tiles[now][8 * j + lane / 16 * 8 + lane % 8][16 * k + lane / 8 % 2 * 8]);
                for (int m = 0; m < M; m++) {
                    mma_m16n8k16_bf16(s[m][j], q[m][k], b);
                    mma_m16n8k16_bf16(s[m][j + 1], q[m][k], b + 2);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 2 * M; r++) {
            int m = r / 2, half = r % 2;
            float most = top[m][half], total = 0;
            for (int l = 0; l < 16; l++) {
                int j = l / 2, i = 2 * half + l % 2;
                bool hidden =
                    k0 + 8 * j + lane % 4 * 2 + i % 2 > first + 16 * m + lane / 4 + half * 8;
                s[m][j][i] = hidden ? -INFINITY : s[m][j][i] * (LOG2E / 8);
                most = fmaxf(most, s[m][j][i]);
            }
            most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
            float shrink = exp2f(top[m][half] - most);
            for (int l = 0; l < 16; l++) {
                int j = l / 2, i = 2 * half + l % 2;
                total += s[m][j][i] = exp2f(s[m][j][i] - most);
                o[m][j][i] *= shrink;
            }
            sum[m][half] = sum[m][half] * shrink + total;
            top[m][half] = most;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {  // o += s v
            uint32_t a[M][4], b[4];
            for (int l = 0; l < 4 * M; l++) {
                const float* pair = &s[l / 4][2 * k + l / 2 % 2][l % 2 * 2];
                __nv_bfloat162 two = __floats2bfloat162_rn(pair[0], pair[1]);
                memcpy(&a[l / 4][l % 4], &two, 4);
            }
            for (int j = 0; j < 8; j += 2) {
                ldmatrix_x4_trans(b, &tiles[now + 1][16 * k + lane % 16][8 * j + lane / 16 * 8]);
                for (int m = 0; m < M; m++) {
                    mma_m16n8k16_bf16(o[m][j], a[m], b);
                    mma_m16n8k16_bf16(o[m][j + 1], a[m], b + 2);
                }
            }
        }
        __syncthreads();
    }
    for (int r = 0; r < 2 * M; r++) {
        int m = r / 2, half = r % 2, row = first + 16 * m + lane / 4 + half * 8;
        sum[m][half] += __shfl_xor_sync(0xFFFFFFFFu, sum[m][half], 1);
        sum[m][half] += __shfl_xor_sync(0xFFFFFFFFu, sum[m][half], 2);
        if (row >= T) continue;
        for (int j = 0; j < 8; j++) {
            __nv_bfloat162 two = __floats2bfloat162_rn(o[m][j][2 * half] / sum[m][half],
                                                       o[m][j][2 * half + 1] / sum[m][half]);
            *reinterpret_cast<__nv_bfloat162*>(out + int64_t(begin + row) * C + column + 8 * j +
                                               lane % 4 * 2) = two;
        }
        if (lane % 4 == 0)
            lse[size_t(blockIdx.x * gridDim.y + h) * T + row] =
                top[m][half] / LOG2E + logf(sum[m][half]);
    }
}
#endif

static std::vector<Variant> variants(Arrays& a, const Size& size) {
    int B = size[0], T = size[1], NH = size[2], C = NH * HEAD;
    int64_t N = int64_t(B) * T;
    floatX *qkv = a.normals(N * 3 * C, 1.5), *out = a.room<floatX>(N * C);
    float* lse = a.room<float>(N * NH);

    // A weight is rounded to bf16 before it meets its v: out is off by 2^-9 of sum p |v| at most,
    // rarely by half of that, and |v| is 1.2 in the mean. In fp32 sums of 64 and of T terms are in
    // another order.
    auto check = [=, &a] {
        Floats from = a.start(qkv), outs(N * C), lses(N * NH),
               scratch(cpu::attention_scratch(HEAD) * omp_get_max_threads());
        cpu::attention_forward(outs.data(), lses.data(), from.data(), scratch.data(), B, T, C, NH);
        expect("out", out, outs, IS_BF16 ? 4e-3 : 5e-6);
        expect("lse", lse, lses, 2e-5, 2e-6);
    };

    // Keys and values are asked for once by every block of `queries`, up to its last query's;
    // products are made of whole tiles.
    double E = sizeof(floatX), heads = double(B) * NH, once = 4 * N * C * E + 4 * N * NH;
    auto work = [=](int queries, int rows, int tile) {
        double read = 0, pairs = 0;
        for (int q0 = 0; q0 < T; q0 += queries) read += cpu::round_up(min(q0 + queries, T), tile);
        for (int r0 = 0; r0 < T; r0 += rows) pairs += rows * cpu::round_up(min(r0 + rows, T), tile);
        return Work{2 * N * C * E + 4 * N * NH + heads * read * 2 * HEAD * E, heads * pairs * 260};
    };
    Work floor = {once, heads * T * (T + 1) / 2 * 260};
    std::vector<Variant> all = {
        {"plain: a block a query, sums in fp32", work(1, 1, 1), floor,
         [=] {
             attention_plain_forward<<<dim3(B * NH, T), ATT,
                                       (ATT + 2 * HEAD + 32) * sizeof(float)>>>(
                 out, lse, qkv, qkv + C, 3 * C, 0, T, C, NH);
         },
         check}};
#ifndef PRECISION_FP32
    dim3 grid64(B, NH, blocks_for(T, 64)), grid128(B, NH, blocks_for(T, 128));
    all.push_back(
        {"tensor cores: 64 queries a block, 16 a warp, 64 keys a tile", work(64, 64, 64), floor,
         [=] { attention_tiles<1, 64, false><<<grid64, 128>>>(out, lse, qkv, T, C); }, check});
    all.push_back({"rows of 144 bytes in shared memory: ldmatrix meets no bank twice",
                   work(64, 64, 64), floor,
                   [=] { attention_tiles<1, 72, false><<<grid64, 128>>>(out, lse, qkv, T, C); },
                   check});
    all.push_back({"the next tile comes while this one is used", work(64, 64, 64), floor,
                   [=] { attention_tiles<1, 72, true><<<grid64, 128>>>(out, lse, qkv, T, C); },
                   check});
    all.push_back({"128 queries a block, 32 a warp: half as much is read for a product",
                   work(128, 128, 64), floor,
                   [=] { attention_tiles<2, 72, true><<<grid128, 128>>>(out, lse, qkv, T, C); },
                   check});
#endif
    all.push_back({IS_BF16
                       ? "fewer instructions: mask only where needed, powers of 2; the trainer's"
                       : "the trainer's: the plain one",
                   IS_BF16 ? work(128, 32, 64) : work(1, 1, 1), floor,
                   [=] { attention_forward(out, lse, qkv, B, T, C, NH); }, check});
    return all;
}

int main(int argc, char** argv) {
    return harness(
        {"attention_forward",
         {"B", "T", "NH"},
         {{3, 1, 1}, {1, 63, 1}, {1, 64, 1}, {1, 65, 2}, {1, 127, 1}, {2, 129, 1}, {1, 200, 2}},
         {16, 1024, 12},
         variants},
        argc, argv);
}
