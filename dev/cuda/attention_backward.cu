// Attention, backward: dqkv (N, 3C) from dout, out (N, C), qkv (N, 3C) and lse (B, NH, T), causal,
// per head of 64. With p the softmax again: dot = sum over d of dout out, dv = p^T dout, dp = dout
// v^T, ds = p (dp - dot) / 8, dq = ds k, dk = ds^T q.
//
// Floor, with E bytes an element: qkv, dout, out and lse read, dqkv written, 8 N C E + 4 N NH
// bytes. Arithmetic: for each query and each key up to it five products of 64, 640, and about 6 for
// p and ds. The tensor cores limit, not memory: attention.md has the model. dq sums over keys, dk
// and dv over queries: one pass for all three needs atomic additions, whose order is not the same
// in two runs, or a second pass over what it kept; two passes make p and dp twice, seven products.

#include "common.cuh"

#ifndef PRECISION_FP32
// 2 and 4: tensor cores by mma.sync, tiles of 64 x 64, a warp 16 rows; each tile is waited
// for, then used.

// dot first, in a pass of its own; a warp each, 8 a block
__global__ void __launch_bounds__(256)
    dot2(float* dot, const floatX* dout, const floatX* out, int64_t count, int T, int C, int NH) {
    int64_t i = int64_t(blockIdx.x) * 8 + threadIdx.x / WARP;
    if (i >= count) return;
    int hs = C / NH, t = int(i % T), h = int(i / T % NH), b = int(i / T / NH);
    size_t at = (size_t(b) * T + t) * C + h * hs;
    float sum = 0;
    for (int d = threadIdx.x % WARP; d < hs; d += WARP)
        sum += to_float(dout[at + d]) * to_float(out[at + d]);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) dot[i] = sum;
}

// Rows 16 warp..16 warp+15 of a tile as the mma's left operand
__device__ inline void load_rows16(uint32_t a[4][4], const Row* tile) {
    int lane = threadIdx.x % WARP;
    for (int k = 0; k < 4; k++)
        ldmatrix_x4(a[k], &tile[threadIdx.x / WARP * 16 + lane % 16][16 * k + lane / 16 * 8]);
}

// s (16, 64) = a (16, 64) tile^T
__device__ inline void times_transpose16(float s[8][4], const uint32_t a[4][4], const Row* tile) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        for (int i = 0; i < 4; i++) s[j][i] = s[j + 1][i] = 0;
        for (int k = 0; k < 4; k++) {
            uint32_t b[4];
            ldmatrix_x4(b, &tile[8 * j + lane / 16 * 8 + lane % 8][16 * k + lane / 8 % 2 * 8]);
            mma_m16n8k16_bf16(s[j], a[k], b);
            mma_m16n8k16_bf16(s[j + 1], a[k], b + 2);
        }
    }
}

__device__ inline uint32_t pair16(const float* from) {
    __nv_bfloat162 two = __floats2bfloat162_rn(from[0], from[1]);
    uint32_t bits;
    memcpy(&bits, &two, 4);
    return bits;
}

// o (16, 64) += a (16, 16) times 16 rows of a tile
__device__ inline void add16(float o[8][4], const uint32_t a[4], const Row* rows) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, &rows[lane % 16][8 * j + lane / 16 * 8]);
        mma_m16n8k16_bf16(o[j], a, b);
        mma_m16n8k16_bf16(o[j + 1], a, b + 2);
    }
}

// o (16, 64) += s (16, 64), rounded to bf16, times the tile
__device__ inline void add_times16(float o[8][4], const float s[8][4], const Row* tile) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t a[4] = {pair16(s[2 * k]), pair16(s[2 * k] + 2), pair16(s[2 * k + 1]),
                         pair16(s[2 * k + 1] + 2)};
        add16(o, a, tile + 16 * k);
    }
}

__device__ inline void write_rows16(__nv_bfloat16* to, int ld, const float o[8][4], float scale,
                                    int first, int rows) {
    for (int i = 0; i < 4; i += 2) {
        int row = first + threadIdx.x % WARP / 4 + i / 2 * 8;
        for (int j = 0; j < 8 && row < rows; j++)
            *reinterpret_cast<__nv_bfloat162*>(to + int64_t(row) * ld + 8 * j +
                                               threadIdx.x % 4 * 2) =
                __floats2bfloat162_rn(o[j][i] * scale, o[j][i + 1] * scale);
    }
}

__device__ inline void arrive() {
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
}

// 2: dq, a block for 64 queries of a head.
__global__ void __launch_bounds__(128)
    dq2(__nv_bfloat16* dqkv, const __nv_bfloat16* dout, const __nv_bfloat16* qkv, const float* lse,
        const float* dot, int T, int C) {
    __shared__ __align__(16) Row tiles[2][TILE];
    int begin = blockIdx.x * T, end = begin + T, column = blockIdx.y * HEAD,
        lane = threadIdx.x % WARP;
    int q0 = (gridDim.z - 1 - blockIdx.z) * TILE, first = q0 + threadIdx.x / WARP * 16;
    size_t head = size_t(blockIdx.x * gridDim.y + blockIdx.y) * T;
    float dq[8][4] = {}, sum[2], dots[2];
    uint32_t q[4][4], d[4][4];
    load_tile(tiles[0], qkv, 3 * C, column, begin + q0, end);
    load_tile(tiles[1], dout, C, column, begin + q0, end);
    arrive();
    load_rows16(q, tiles[0]);
    load_rows16(d, tiles[1]);
    for (int half = 0; half < 2; half++) {
        int row = min(first + lane / 4 + half * 8, T - 1);
        sum[half] = lse[head + row] * LOG2E, dots[half] = dot[head + row];
    }
    for (int k0 = 0; k0 <= q0; k0 += TILE) {
        __syncthreads();
        load_tile(tiles[0], qkv, 3 * C, column + C, begin + k0, end);
        load_tile(tiles[1], qkv, 3 * C, column + 2 * C, begin + k0, end);
        arrive();
        float s[8][4], dp[8][4];
        times_transpose16(s, q, tiles[0]);
        times_transpose16(dp, d, tiles[1]);
        for (int j = 0; j < 8; j++) {
            for (int i = 0; i < 4; i++) {
                bool hidden = k0 + 8 * j + lane % 4 * 2 + i % 2 > first + lane / 4 + i / 2 * 8;
                s[j][i] =
                    hidden ? 0
                           : exp2f(s[j][i] * FLASH_SCALE - sum[i / 2]) * (dp[j][i] - dots[i / 2]);
            }
        }
        add_times16(dq, s, tiles[0]);
    }
    write_rows16(dqkv + column, 3 * C, dq, 0.125f, begin + first, end);
}

// 2: dk and dv, a block for 64 keys of a head. 4: with FUSED dq as well, added to sums (N, C) by
// all blocks of the head, in the order in which they come; dynamic shared memory for 4 tiles, else
// 2, and 128 floats.
template <bool FUSED>
__global__ void __launch_bounds__(128)
    dkv2(__nv_bfloat16* dqkv, float* dq_sums, const __nv_bfloat16* dout, const __nv_bfloat16* qkv,
         const float* lse, const float* dot, int T, int C) {
    extern __shared__ int4 shared[];
    Row(*tiles)[TILE] = (Row(*)[TILE])shared;  // q, dout; where fused also k, ds^T
    float *sums = (float*)(tiles + (FUSED ? 4 : 2)), *dots = sums + TILE;
    int begin = blockIdx.x * T, end = begin + T, column = blockIdx.y * HEAD,
        lane = threadIdx.x % WARP;
    int k0 = blockIdx.z * TILE, warp = threadIdx.x / WARP, first = k0 + warp * 16;
    size_t head = size_t(blockIdx.x * gridDim.y + blockIdx.y) * T;
    float dk[8][4] = {}, dv[8][4] = {};
    uint32_t k[4][4], v[4][4];
    load_tile(tiles[FUSED ? 2 : 0], qkv, 3 * C, column + C, begin + k0, end);
    load_tile(tiles[1], qkv, 3 * C, column + 2 * C, begin + k0, end);
    arrive();
    load_rows16(k, tiles[FUSED ? 2 : 0]);
    load_rows16(v, tiles[1]);
    for (int q0 = k0; q0 < T; q0 += TILE) {
        __syncthreads();
        load_tile(tiles[0], qkv, 3 * C, column, begin + q0, end);
        load_tile(tiles[1], dout, C, column, begin + q0, end);
        int row = q0 + threadIdx.x % TILE;
        sums[threadIdx.x] = row >= T             ? 0
                            : threadIdx.x < TILE ? lse[head + row] * LOG2E
                                                 : dot[head + row];
        arrive();
        float s[8][4], dp[8][4];
        times_transpose16(s, k, tiles[0]);
        for (int j = 0; j < 8; j++) {
            for (int i = 0; i < 4; i++) {
                int query = 8 * j + lane % 4 * 2 + i % 2;
                bool hidden = first + lane / 4 + i / 2 * 8 > q0 + query;
                s[j][i] = hidden ? 0 : exp2f(s[j][i] * FLASH_SCALE - sums[query]);
            }
        }
        add_times16(dv, s, tiles[1]);
        times_transpose16(dp, v, tiles[1]);
        for (int j = 0; j < 8; j++) {
            for (int i = 0; i < 4; i++) s[j][i] *= dp[j][i] - dots[8 * j + lane % 4 * 2 + i % 2];
        }
        add_times16(dk, s, tiles[0]);
        if (FUSED) {
            // ds^T through shared memory: a warp has 16 keys of it and needs 16 queries
            for (int j = 0; j < 8; j++) {
                for (int i = 0; i < 4; i += 2) {
                    __nv_bfloat16* to =
                        &tiles[3][16 * warp + lane / 4 + i / 2 * 8][8 * j + lane % 4 * 2];
                    *reinterpret_cast<__nv_bfloat162*>(to) =
                        __floats2bfloat162_rn(s[j][i], s[j][i + 1]);
                }
            }
            __syncthreads();
            float dq[8][4] = {};
            for (int l = 0; l < 4; l++) {  // dq += ds k, 16 keys at a time
                uint32_t a[4];
                ldmatrix_x4_trans(
                    a, &tiles[3][16 * l + lane / 16 * 8 + lane % 8][16 * warp + lane / 8 % 2 * 8]);
                add16(dq, a, tiles[2] + 16 * l);
            }
            for (int j = 0; j < 8; j++) {
                for (int i = 0; i < 4; i++) {
                    int query = q0 + 16 * warp + lane / 4 + i / 2 * 8,
                        d = column + 8 * j + lane % 4 * 2 + i % 2;
                    if (query < T) atomicAdd(dq_sums + int64_t(begin + query) * C + d, dq[j][i]);
                }
            }
        }
    }
    write_rows16(dqkv + column + C, 3 * C, dk, 0.125f, begin + first, end);
    write_rows16(dqkv + column + 2 * C, 3 * C, dv, 1, begin + first, end);
}

// 4's end: dq (N, C), scaled, to its place; a thread a pair of channels
__global__ void dq4(__nv_bfloat16* dqkv, const float* dq_sums, int64_t pairs, int C) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = 2 * i / C;
    if (i >= pairs) return;
    float2 x = reinterpret_cast<const float2*>(dq_sums)[i];
    *reinterpret_cast<__nv_bfloat162*>(dqkv + row * 3 * C + 2 * i % C) =
        __floats2bfloat162_rn(x.x * 0.125f, x.y * 0.125f);
}
#endif

static std::vector<Variant> variants(Arrays& a, const Size& size) {
    int B = size[0], T = size[1], NH = size[2], C = NH * HEAD;
    int64_t N = int64_t(B) * T, rows = N * NH;
    Floats numbers = a.draw(N * 3 * C, 1.5, 0);
    // With one key, a score so low that exp(-lse) is too large for fp32.
    for (int j = 0; j < 2 * HEAD && T == 1 && !a.dry; j++) numbers[j] = j < HEAD ? -4 : 4;
    floatX *qkv = a.put(std::vector<floatX>(numbers.begin(), numbers.end())),
           *dout = a.normals(N * C), *dqkv = a.room<floatX>(N * 3 * C), *out;
    float *lse, *dot = a.room<float>(rows), *db = a.normals_fp32(3 * C, 10);
    float* sums = a.room<float>(std::max(SLABS * 3, B * blocks_for(T, FLASH) * 2) * C);
    {  // what the forward pass leaves
        Floats from = a.dry ? Floats() : a.start(qkv), outs(a.dry ? 0 : N * C),
               lses(a.dry ? 0 : rows);
        Floats scratch(cpu::attention_scratch(HEAD) * omp_get_max_threads());
        if (!a.dry)
            cpu::attention_forward(outs.data(), lses.data(), from.data(), scratch.data(), B, T, C,
                                   NH);
        out = a.put(std::vector<floatX>(outs.begin(), outs.end()));
        lse = a.put(lses);
    }
    // p and ds are rounded to bf16: a sum of n products is off by 2^-9 of the root of the sum of
    // their squares, and by four times as much at worst. ds is as large as 12 for the largest p,
    // and q and k as 6. In fp32 sums are in another order.
    auto compare = [=, &a] {  // not `check`, which is what the macro CUDA calls
        Floats wants(N * 3 * C), scratch(cpu::attention_scratch(HEAD) * omp_get_max_threads());
        cpu::attention_backward(wants.data(), a.start(dout).data(), a.start(qkv).data(),
                                a.start(out).data(), a.start(lse).data(), scratch.data(), B, T, C,
                                NH);
        expect("dqkv", dqkv, wants, IS_BF16 ? 2e-2 : 2e-5);
        return wants;
    };
    // The bias's gradient, too: N numbers, whose errors are independent.
    auto compare_both = [=, &a] {
        Floats wants = compare(), want = a.start(db);
        cpu::bias_backward(want.data(), wants.data(), N, 3 * C);
        expect("db", db, want, (IS_BF16 ? 1e-2 : 2e-5) * sqrt(double(N)));
    };

    double E = sizeof(floatX), heads = double(B) * NH, once = 8 * N * C * E + 4 * rows;
    // What a pass asks for beside its own rows: two rows of the other side for each of its tiles,
    // and the pairs it multiplies.
    auto pass = [=](int block, int group, int tile, double products) {
        double read = 0, pairs = 0;
        for (int r0 = 0; r0 < T; r0 += block) read += cpu::round_up(min(r0 + block, T), tile);
        for (int r0 = 0; r0 < T; r0 += group)
            pairs += group * cpu::round_up(min(r0 + group, T), tile);
        return Work{heads * read * 2 * HEAD * E, heads * pairs * (128 * products + 6)};
    };
    auto both = [=](int block, int group, int tile, double extra) {
        Work dq = pass(block, group, tile, 3), dkv = pass(block, group, tile, 4);
        return Work{dq.bytes + dkv.bytes + (9 * N * C + extra * N * C) * E, dq.flops + dkv.flops};
    };
    Work floor = {once, heads * T * (T + 1) / 2 * 646};
    std::vector<Variant> all;
    all.push_back(
        {"plain: a block a query, then a block a key, sums in fp32", both(1, 1, 1, 1), floor,
         [=] {
             attention_plain_dq<<<dim3(B * NH, T), ATT, (2 * ATT + 3 * HEAD) * sizeof(float)>>>(
                 dqkv, dot, dout, qkv, out, lse, T, C, NH);
             attention_plain_dkv<<<dim3(B * NH, T), ATT, (2 * ATT + 4 * HEAD) * sizeof(float)>>>(
                 dqkv, dout, qkv, lse, dot, T, C, NH);
         },
         compare});
#ifndef PRECISION_FP32
    auto first = [=] { dot2<<<blocks_for(rows, 8), 256>>>(dot, dout, out, rows, T, C, NH); };
    dim3 grid(B, NH, blocks_for(T, TILE));
    all.push_back({"tensor cores: dot, dq, then dk and dv, 64 rows a block, 16 a warp",
                   both(64, 64, 64, 2), floor,
                   [=] {
                       first();
                       dq2<<<grid, 128>>>(dqkv, dout, qkv, lse, dot, T, C);
                       dkv2<false>
                           <<<grid, 128, 2 * sizeof(Row) * TILE + 2 * TILE * sizeof(float)>>>(
                               dqkv, nullptr, dout, qkv, lse, dot, T, C);
                   },
                   compare});
#endif
    Work trainers = IS_BF16 ? both(128, 32, 64, 1) : both(1, 1, 1, 1);
    trainers.bytes += IS_BF16 ? 16.0 * B * blocks_for(T, FLASH) * C : 3 * N * C * E;
    all.push_back(
        {IS_BF16
             ? "128 rows a block, 32 a warp, the next tile ahead, dot and the bias's sums on the "
               "way; the trainer's"
             : "the trainer's: the plain one, then the bias's sums",
         trainers, floor,
         [=] { attention_backward(dqkv, db, sums, dot, dout, qkv, out, lse, B, T, C, NH); },
         compare_both});
#ifndef PRECISION_FP32
    // Not for the trainer: two runs differ. It shows what five products in place of seven would
    // gain.
    float* dq_sums = a.room<float>(N * C);
    Work fused = pass(64, 64, 64, 5);
    fused.bytes += 10 * N * C * E + 3 * 4 * N * C + heads * double(T) * T / TILE / 2 * HEAD * 4;
    all.push_back({"as 2, in one pass: dq by atomic additions", fused, floor,
                   [=] {
                       first();
                       CUDA(cudaMemsetAsync(dq_sums, 0, N * C * sizeof(float)));
                       dkv2<true><<<grid, 128, 4 * sizeof(Row) * TILE + 2 * TILE * sizeof(float)>>>(
                           dqkv, dq_sums, dout, qkv, lse, dot, T, C);
                       dq4<<<blocks_for(N * C / 2, 256), 256>>>(dqkv, dq_sums, N * C / 2, C);
                   },
                   compare, false});
#endif
    return all;
}

int main(int argc, char** argv) {
    return harness(
        {"attention_backward",
         {"B", "T", "NH"},
         {{3, 1, 1}, {1, 63, 1}, {1, 64, 1}, {1, 65, 2}, {1, 127, 1}, {2, 129, 1}, {1, 200, 2}},
         {16, 1024, 12},
         variants},
        argc, argv);
}
