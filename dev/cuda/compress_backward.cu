// The compressed gradient of a linear layer: G = dy^T z + beta G, dy (N, m), z (N, r), G (m, r) in
// fp32; and the bias gradient db (m) += sum over tokens of dy. The sum runs over all N tokens, tens
// of thousands, while G is small: r is n/4 or n/8, so there are few tiles of G, fewer than
// multiprocessors, and the tokens must be split among blocks too (split-K).
//
// Floor, with E bytes an element: dy and z read, (N m + N r) E bytes, G written, and read where it
// is added to, 8 m r; 2 N m r operations, in bf16 r for each byte of dy: at r = 192 products take
// nearly as long as the memory. db is in these bytes too, if dy's columns are summed when they are
// read for the product: by itself it reads dy again, N m E. z is small beside dy: where blocks read
// it again it is counted once.

#include "common.cuh"
#include "tiles.cuh"

// 1: a thread an element of G; it walks all tokens. Neighbours read neighbours in z, and one
// element of dy.
__global__ void product1(float* g, const floatX* dy, const floatX* z, float beta, int N, int m,
                         int r) {
    int j = blockIdx.x * 32 + threadIdx.x, o = blockIdx.y * 8 + threadIdx.y;
    if (o >= m || j >= r) return;
    float sum = 0;
    for (int i = 0; i < N; i++)
        sum += to_float(dy[size_t(i) * m + o]) * to_float(z[size_t(i) * r + j]);
    size_t at = size_t(o) * r + j;
    g[at] = sum + (beta == 0 ? 0 : beta * g[at]);
}

enum { SQUARE = 32 };  // a tile's side, in 2 and 3

// 2: a block of 32 x 8 threads makes a tile of 32 x 32 of G, from 32 tokens at a time in shared
// memory: dy is read r / 32 times, z m / 32 times. 3: the same over a slab of tokens for each
// blockIdx.z, whose sums go to `partial` (slabs, m, r).
__global__ void __launch_bounds__(256) product2(float* g, float* partial, const floatX* dy,
                                                const floatX* z, float beta, int N, int m, int r) {
    __shared__ float dys[SQUARE][SQUARE + 1], zs[SQUARE][SQUARE + 1];
    int j0 = blockIdx.x * SQUARE, o0 = blockIdx.y * SQUARE, slab = (N + gridDim.z - 1) / gridDim.z;
    int first = blockIdx.z * slab, last = min(N, first + slab), x = threadIdx.x;
    float sum[4] = {};
    for (int i0 = first; i0 < last; i0 += SQUARE) {
        for (int y = threadIdx.y; y < SQUARE; y += 8) {
            int i = i0 + y;
            dys[y][x] = i < last && o0 + x < m ? to_float(dy[size_t(i) * m + o0 + x]) : 0;
            zs[y][x] = i < last && j0 + x < r ? to_float(z[size_t(i) * r + j0 + x]) : 0;
        }
        __syncthreads();
        for (int k = 0; k < SQUARE; k++) {
            for (int e = 0; e < 4; e++) sum[e] += dys[k][threadIdx.y * 4 + e] * zs[k][x];
        }
        __syncthreads();
    }
    for (int e = 0; e < 4; e++) {
        int o = o0 + threadIdx.y * 4 + e, j = j0 + x;
        size_t at = size_t(o) * r + j;
        if (o >= m || j >= r) continue;
        if (partial)
            partial[blockIdx.z * size_t(m) * r + at] = sum[e];
        else
            g[at] = sum[e] + (beta == 0 ? 0 : beta * g[at]);
    }
}

// g (count) = beta g + the sum of partial (slabs, count), always in the same order; a thread an
// element
__global__ void add_slabs(float* g, const float* partial, float beta, int slabs, size_t count) {
    size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float sum = beta == 0 ? 0 : beta * g[i];
    for (int slab = 0; slab < slabs; slab++) sum += partial[slab * count + i];
    g[i] = sum;
}

#ifndef PRECISION_FP32
// 8: tensor cores, a block a tile of 64 x 64 of G over a slab of tokens, m and r multiples of 8. A
// token is a row of both tiles in shared memory, so ldmatrix turns them both. grid (ceil(r / 64),
// ceil(m / 64), slabs), block 128, a warp 16 rows of G. 9: db on the way, from the blocks of the
// first columns: one more product, with a z of ones that no memory holds.
__global__ void __launch_bounds__(FLASH_THREADS)
    product8(float* partial, float* partial_db, const floatX* dy, const floatX* z, int N, int m,
             int r) {
    __shared__ __align__(128) Tile tiles[2][2];
    int j0 = blockIdx.x * SIDE, o0 = blockIdx.y * SIDE, slab = (N + gridDim.z - 1) / gridDim.z;
    int first = blockIdx.z * slab, last = min(N, first + slab), lane = threadIdx.x % WARP,
        own = threadIdx.x / WARP * 16;
    bool with_db = partial_db && blockIdx.x == 0;
    float sum[8][4] = {}, db[4] = {};
    const uint32_t ones[2] = {0x3F803F80, 0x3F803F80};
    auto load_both = [&](int stage, int i) {
        load_corner(tiles[stage][0], dy + size_t(i) * m + o0, m, last - i, m - o0);
        load_corner(tiles[stage][1], z + size_t(i) * r + j0, r, last - i, r - j0);
    };
    load_both(0, first);
    cp_async_commit();
    for (int i0 = first, stage = 0; i0 < last; i0 += SIDE, stage ^= 1) {
        if (i0 + SIDE < last) load_both(stage ^ 1, i0 + SIDE);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int k = 0; k < SIDE; k += 16) {
            uint32_t a[4], b[4];
            ldmatrix_x4_trans(
                a, chunk_of(tiles[stage][0], k + lane / 16 * 8 + lane % 8, own / 8 + lane / 8 % 2));
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                ldmatrix_x4_trans(b, chunk_of(tiles[stage][1], k + lane % 16, j + lane / 16));
                mma_m16n8k16_bf16(sum[j], a, b);
                mma_m16n8k16_bf16(sum[j + 1], a, b + 2);
            }
            if (with_db) mma_m16n8k16_bf16(db, a, ones);
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; i += 2) {
        int o = o0 + own + row_of(i);
        if (o >= m) continue;
        float* to = partial + (size_t(blockIdx.z) * m + o) * r + j0;
        for (int j = 0; j < 8 && j0 + 8 * j < r; j++)
            *(float2*)(to + column_of(j, 0)) = {sum[j][i], sum[j][i + 1]};
        if (with_db && lane % 4 == 0) partial_db[size_t(blockIdx.z) * m + o] = db[i];
    }
}
#endif

static std::vector<Variant> variants(Arrays& a, const Size& size) {
    const int TIMES = 8;  // slabs of tokens
    int N = size[0], m = size[1], r = size[2], wide = r + PACK, slab = N / TIMES;
    float beta = float(size[3]);
    size_t count = size_t(m) * r;
    floatX *dy = a.normals(int64_t(N) * m), *z = a.normals(int64_t(N) * r);
    float *g = a.normals_fp32(count, 10), *db = a.normals_fp32(m, 10),
          *sums = a.room<float>(int64_t(SLABS) * m);
    float* partial = a.room<float>(TIMES * count);

    // For 7: rows of r numbers, one number more, and zeros up to the next 16 bytes.
    auto widen = [=](const Floats& from, const Floats& last) {
        Floats out(last.size() * wide);
        for (size_t i = 0; i < last.size(); i++) {
            std::copy_n(from.begin() + i * r, r, out.begin() + i * wide);
            out[i * wide + r] = last[i];
        }
        return out;
    };
    Floats z_ones, g_db;
    if (!a.dry) z_ones = widen(a.start(z), Floats(N, 1.0f)), g_db = widen(a.start(g), a.start(db));
    floatX* z1 = a.put(std::vector<floatX>(z_ones.begin(), z_ones.end()));
    float* gb = a.put(g_db);

    // Sums of N products in another order, of size sqrt(N): their rounding grows like N 2^-24. No
    // result is rounded to floatX.
    double bound = 1e-6 * N + 1e-5, fp32 = 4.0 / (1 << 24);
    auto wanted = [=, &a] {
        Floats want = a.start(g);
        cpu::matmul(want.data(), a.start(dy).data(), true, a.start(z).data(), false, m, r, N, 1,
                    beta);
        return want;
    };
    auto wanted_db = [=, &a](float times) {
        Floats want = a.start(db);
        for (float& x : want) x *= times;
        cpu::bias_backward(want.data(), a.start(dy).data(), N, m);
        return want;
    };
    auto check_g = [=] { expect("g", g, wanted(), bound, fp32); };
    auto check_both = [=] {  // db is added to in any case, as in the trainer
        check_g();
        expect("db", db, wanted_db(1), bound, fp32);
    };
    auto check_gb = [=] { expect("g and db", gb, widen(wanted(), wanted_db(beta)), bound, fp32); };

    auto add = [=] { add_slabs<<<blocks_for(count, 256), 256>>>(g, partial, beta, TIMES, count); };
    dim3 grid(blocks_for(r, SQUARE), blocks_for(m, SQUARE)), split = grid, threads(SQUARE, 8);
    split.z = TIMES;
    auto trainers = [=] { matmul(g, CUDA_R_32F, dy, true, z, false, CUDA_X, m, r, N, 1, beta); };
    std::function<void()> batched;
    if (slab * TIMES == N) {
        batched = [=] {
            const float one = 1, zero = 0;
            CUDA(cublasGemmStridedBatchedEx(cublas, CUBLAS_OP_N, CUBLAS_OP_T, r, m, slab, &one, z,
                                            CUDA_X, r, int64_t(slab) * r, dy, CUDA_X, m,
                                            int64_t(slab) * m, &zero, partial, CUDA_R_32F, r, count,
                                            TIMES, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
            add();
        };
    }

    const double E = sizeof(floatX), D = E * N * m, Z = E * N * r, G = 4.0 * count,
                 slabs = 2 * TIMES * G;
    const double result = beta == 0 ? G : 2 * G, flops = 2.0 * N * count, more = double(N) * m;
    Work floor = {D + Z + result, flops}, floor_db = {floor.bytes + 8 * m, flops + more};
    Work tiled = {grid.x * D + Z + result, flops};
    std::vector<Variant> list = {
        {"a thread an element of G",
         {D * r / 32 + Z + result, flops},
         floor,
         [=] {
             product1<<<dim3(blocks_for(r, 32), blocks_for(m, 8)), dim3(32, 8)>>>(g, dy, z, beta, N,
                                                                                  m, r);
         },
         check_g},
        {"tiles in shared memory", tiled, floor,
         [=] { product2<<<grid, threads>>>(g, nullptr, dy, z, beta, N, m, r); }, check_g},
        {"as 2, the tokens split in 8, then a sum",
         {tiled.bytes + slabs, flops},
         floor,
         [=] {
             product2<<<split, threads>>>(g, partial, dy, z, beta, N, m, r);
             add();
         },
         check_g},
        {"cuBLAS: the trainer's", floor, floor, trainers, check_g},
        {"cuBLAS for each of 8 slabs of tokens, then a sum",
         {floor.bytes + slabs, flops},
         floor,
         batched,
         check_g},
        {"with db, by two kernels after 4: the trainer's for qkv, where attention is the plain one",
         {floor_db.bytes + D + 8.0 * SLABS * m, floor_db.flops},
         floor_db,
         [=] {
             trainers();
             sum_columns(db, sums, dy, N, m);
         },
         check_both},
        // Not the trainer's yet: dy is read once. z takes 16 bytes a token more, and G's rows are
        // no longer tight.
        {"with db, one product: z with a column of ones",
         {D + (Z + result) * wide / r, flops * wide / r},
         floor_db,
         [=] { matmul(gb, CUDA_R_32F, dy, true, z1, false, CUDA_X, m, wide, N, 1, beta); },
         check_gb},
    };
#ifndef PRECISION_FP32
    std::function<void()> own, own_with_db;
    float* partial_db = a.room<float>(int64_t(TIMES) * m);
    dim3 tiles(blocks_for(r, SIDE), blocks_for(m, SIDE), TIMES);
    if (m % 8 == 0 && r % 8 == 0) {
        own = [=] {
            product8<<<tiles, FLASH_THREADS>>>(partial, nullptr, dy, z, N, m, r);
            add();
        };
        own_with_db = [=] {
            product8<<<tiles, FLASH_THREADS>>>(partial, partial_db, dy, z, N, m, r);
            add();
            add_slabs<<<blocks_for(m, 256), 256>>>(db, partial_db, 1, TIMES, m);
        };
    }
    Work read = {tiles.x * D + Z + result + slabs, flops};
    list.push_back({"tensor cores, the tokens split in 8, then a sum", read, floor, own, check_g});
    list.push_back({"as 8, with db on the way",
                    {read.bytes + 8.0 * (TIMES + 1) * m, flops + 8 * more},
                    floor_db,
                    own_with_db,
                    check_both});
#endif
    return list;
}

int main(int argc, char** argv) {
    return harness({"compress_backward",
                    {"N", "m", "r", "accumulate"},
                    {{1, 768, 24, 0},
                     {37, 72, 100, 1},
                     {200, 1600, 8, 0},
                     {256, 136, 72, 1},
                     {531, 40, 7, 0},
                     {3, 8, 1, 1}},
                    {16384, 2304, 192, 1},
                    variants},
                   argc, argv);
}
