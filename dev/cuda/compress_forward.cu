// What a compressed linear layer keeps in place of its input: z = x P, x (N, n), P (n, r), z (N,
// r); beside the layer's own product y = x W^T, y (N, m), W (m, n), and in the kernels that make x.
//
// Floor, with E bytes an element: z alone x read and z written, (N n + N r) E bytes, and 2 N n r
// operations with a dense P, 2 N n with the sparse one; y as well, (N n + m n + N m + N r) E and 2
// N n (m + r). A dense P has r operations for each of x's bytes in bf16: at r = 192 products take
// nearly as long as the memory. The sparse fold has one: memory. P itself is small, n r E, and
// drawn in microseconds: it need not be in memory, but little is saved by that. Where blocks read
// it again it is counted once.
//
// Fused into the kernel that makes x, LayerNorm or GELU, the fold reads x when it has just been
// written, from a cache: of the bytes that are predicted for it, N n E never come from memory. That
// is what fusion saves: near a third of LayerNorm with the fold behind it, if x is too large for
// L2, and a launch.

#include "common.cuh"
#include "tiles.cuh"

// 1: a thread an element of z. A warp reads a row of x and 32 columns of P.
__global__ void project1(floatX* z, const floatX* x, const floatX* p, int N, int n, int r) {
    int j = blockIdx.x * 32 + threadIdx.x, i = blockIdx.y * 8 + threadIdx.y;
    if (i >= N || j >= r) return;
    float sum = 0;
    for (int k = 0; k < n; k++)
        sum += to_float(x[size_t(i) * n + k]) * to_float(p[size_t(k) * r + j]);
    store(z + size_t(i) * r + j, sum);
}

// P^T (r, n), for 4: a thread a block of Philox. Its stores are n elements apart, but all of
// them are few.
__global__ void draw_transposed(floatX* p, int n, int r, float scale, uint64_t seed,
                                uint64_t stream) {
    int i = (blockIdx.x * blockDim.x + threadIdx.x) * QUAD;
    if (i >= n * r) return;
    curandStatePhilox4_32_10_t state;
    curand_init(seed, stream, i, &state);
    float4 x = curand_normal4(&state);
    const float four[QUAD] = {x.x, x.y, x.z, x.w};
    for (int e = 0; e < QUAD; e++)
        store(p + size_t((i + e) % r) * n + (i + e) / r, scale * four[e]);
}

// 6: the fold with 8 rows a thread: where a column's inputs stand, and their signs, are found once
// for 8 rows, and 8 loads are on their way at once. grid (ceil(r / 128), ceil(N / 8)).
__global__ void __launch_bounds__(128) fold6(Fold f, const floatX* x, int N) {
    int j = blockIdx.x * 128 + threadIdx.x, i = blockIdx.y * 8;
    if (j >= f.r) return;
    float sum[8] = {};
    for (int first = 0, stripe = 0; first < f.n; first += f.r, stripe++) {
        int turned = j - f.shift[stripe], k = first + (turned < 0 ? turned + f.r : turned);
        if (k >= f.n) continue;
        float sign = f.sign[k];
        for (int e = 0; e < 8; e++)
            sum[e] += i + e < N ? sign * to_float(x[size_t(i + e) * f.n + k]) : 0;
    }
    for (int e = 0; e < 8 && i + e < N; e++) store(f.z + size_t(i + e) * f.r + j, sum[e]);
}

// ---- P in a tensor-core kernel of our own, r a multiple of 8

#ifndef PRECISION_FP32
// z (16, 64) += rows 16 warp.. of x, times p
__device__ inline void add_product(float z[8][4], Tile& x, Tile& p) {
    int lane = threadIdx.x % WARP;
    uint32_t a[4][4], b[4];
    load_rows(a, x, threadIdx.x / WARP * 16);
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            ldmatrix_x4_trans(b, chunk_of(p, 16 * k + lane % 16, j + lane / 16));
            mma_m16n8k16_bf16(z[j], a[k], b);
            mma_m16n8k16_bf16(z[j + 1], a[k], b + 2);
        }
    }
}

__device__ inline void write_corner(floatX* to, const float z[8][4], int rows, int columns,
                                    int ld) {
    for (int i = 0; i < 4; i += 2) {
        int row = threadIdx.x / WARP * 16 + row_of(i);
        for (int j = 0; j < 8 && row < rows && 8 * j < columns; j++)
            *(__nv_bfloat162*)(to + size_t(row) * ld + column_of(j, 0)) =
                __floats2bfloat162_rn(z[j][i], z[j][i + 1]);
    }
}

// 11: P from memory, to compare with; 12: p null, P drawn in shared memory, tile by tile, by each
// block anew: N / 64 times in all. grid (ceil(r / 64), ceil(N / 64)), block 128. The next tiles
// come, or are drawn, before this one's product.
__global__ void __launch_bounds__(FLASH_THREADS, 4)
    project11(floatX* z, const floatX* x, const floatX* p, Draw draw, int N) {
    __shared__ __align__(128) Tile xs[2], ps[2];
    int n = draw.n, r = draw.r, i0 = blockIdx.y * SIDE, j0 = blockIdx.x * SIDE;
    float sum[8][4] = {};
    for (int k0 = -SIDE, stage = 1; k0 < n; k0 += SIDE, stage ^= 1) {
        int next = k0 + SIDE;
        if (next < n) {
            load_corner(xs[stage ^ 1], x + size_t(i0) * n + next, n, N - i0, n - next);
            if (p)
                load_corner(ps[stage ^ 1], p + size_t(next) * r + j0, r, n - next, r - j0);
            else
                draw_corner(ps[stage ^ 1], draw, next, j0);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        if (k0 >= 0) add_product(sum, xs[stage], ps[stage]);
        __syncthreads();
    }
    write_corner(z + size_t(i0) * r + j0, sum, N - i0, r - j0, r);
}

// 13: 64 columns of P are drawn into shared memory once, then 256 rows of x walk past them: N /
// 256 drawings. grid (ceil(r / 64), ceil(N / 256)), block 128; dynamic shared memory: ceil(n /
// 64) + 2 tiles.
__global__ void __launch_bounds__(FLASH_THREADS)
    project13(floatX* z, const floatX* x, Draw draw, int N) {
    extern __shared__ __align__(128) Tile tiles[];
    int n = draw.n, r = draw.r, j0 = blockIdx.x * SIDE, steps = (n + SIDE - 1) / SIDE;
    int first = blockIdx.y * 256, rows = min(256, N - first),
        total = (rows + SIDE - 1) / SIDE * steps;
    Tile* ps = tiles + 2;
    for (int k = 0; k < steps; k++) draw_corner(ps[k], draw, k * SIDE, j0);
    auto load = [&](int t) {
        int i = t / steps * SIDE, k = t % steps * SIDE;
        if (t < total) load_corner(tiles[t % 2], x + size_t(first + i) * n + k, n, rows - i, n - k);
        cp_async_commit();
    };
    load(0);
    float sum[8][4] = {};
    for (int t = 0; t < total; t++) {
        load(t + 1);
        cp_async_wait<1>();
        __syncthreads();
        add_product(sum, tiles[t % 2], ps[t % steps]);
        __syncthreads();
        if (t % steps < steps - 1) continue;
        int i = t / steps * SIDE;
        write_corner(z + size_t(first + i) * r + j0, sum, rows - i, r - j0, r);
        for (auto& part : sum) part[0] = part[1] = part[2] = part[3] = 0;
    }
}
#endif

static std::vector<Variant> variants(Arrays& a, const Size& size) {
    int N = size[0], n = size[1], m = size[2], r = size[3];
    floatX *x = a.normals(int64_t(N) * n), *w = a.normals(int64_t(m) * n, 1 / sqrtf(float(n)));
    floatX *y = a.room<floatX>(int64_t(N) * m), *z = a.room<floatX>(int64_t(N) * r),
           *p = a.room<floatX>(int64_t(n) * r);
    floatX *wp = a.room<floatX>(int64_t(m + r) * n), *yz = a.room<floatX>(int64_t(N) * (m + r));
    floatX *made = a.room<floatX>(int64_t(N) * n), *lnw = a.normals(n, 0.5, 1), *lnb = a.normals(n);
    float *mean = a.room<float>(N), *rstd = a.room<float>(N), *sign = a.room<float>(n);
    int* shift = a.room<int>((n + r - 1) / r);

    // The trainer, with one such layer in it: QKV, of which only the shape matters here.
    auto model = [=](int projection) {
        auto s = std::make_shared<Model>();
        s->config.C = n, s->config.L = 1, s->slots = 1;
        s->options.projection = projection;
        s->linear[QKV] = {m, n, r};
        s->params[QKVW] = w, s->params[LNFW] = lnw, s->params[LNFB] = lnb;
        s->z[QKV] = z, s->p = p, s->sign = sign, s->shift = shift;
        return s;
    };
    std::shared_ptr<Model> dense = model(GAUSSIAN), sparse = model(SPARSE);
    uint64_t seed = dense->options.seed, stream = stream_of(QKV, 0, 0);
    float scale = 1.0f / sqrtf(float(r));

    // x P by the CPU, with the very P that the device draws: that one is checked in projection.cu,
    // and where cuRAND's last bits differ from the CPU's it may round to the other neighbour. Sums
    // of n terms in another order, of size sqrt(n / r): their rounding grows like sqrt(n) 2^-24.
    double bound = 1e-5 * sqrt(double(n) / r);
    auto project = [=](const Floats& from) {
        Arrays own(false);
        floatX* drawn = own.room<floatX>(int64_t(n) * r);
        draw_projection(drawn, nullptr, nullptr, {m, n, r}, GAUSSIAN, seed, stream);
        Floats want(int64_t(N) * r);
        cpu::project(want.data(), from.data(), fetch(drawn, int64_t(n) * r).data(), nullptr,
                     {m, n, r}, GAUSSIAN, N);
        return want;
    };
    auto linear = [=, &a] {
        Floats want(int64_t(N) * m);
        cpu::matmul(want.data(), a.start(x).data(), false, a.start(w).data(), true, N, m, n, 1, 0);
        return want;
    };
    auto check_z = [=, &a] { expect("z", z, project(a.start(x)), bound); };
    auto check_y_and_z = [=] {
        expect("y", y, linear(), 1e-5);
        check_z();
    };
    auto check_yz = [=, &a] {
        Floats wanted_y = linear(), wanted_z = project(a.start(x)), want;
        for (int i = 0; i < N; i++) {
            want.insert(want.end(), wanted_y.begin() + int64_t(i) * m,
                        wanted_y.begin() + int64_t(i + 1) * m);
            want.insert(want.end(), wanted_z.begin() + int64_t(i) * r,
                        wanted_z.begin() + int64_t(i + 1) * r);
        }
        expect("yz", yz, want, bound);
    };
    // The fold's terms and their order are the CPU's.
    auto check_fold = [=](const Floats& from) {
        Floats want(int64_t(N) * r), signs(n);
        std::vector<int> shifts((n + r - 1) / r);
        cpu::draw_projection(signs.data(), shifts.data(), {m, n, r}, SPARSE, seed, stream);
        cpu::project(want.data(), from.data(), signs.data(), shifts.data(), {m, n, r}, SPARSE, N);
        expect("z", z, want, 1e-5);
    };
    auto check_fold_of_x = [=, &a] { check_fold(a.start(x)); };
    auto check_layernorm = [=, &a] {
        Floats want(int64_t(N) * n), means(N), rstds(N);
        cpu::layernorm_forward(want.data(), means.data(), rstds.data(), a.start(x).data(),
                               a.start(lnw).data(), a.start(lnb).data(), N, n);
        expect("layernorm", made, want, 1e-5);
        check_fold(fetch(made, int64_t(N) * n));
    };
    auto check_gelu = [=, &a] {
        Floats want(int64_t(N) * n);
        cpu::gelu_forward(want.data(), a.start(x).data(), want.size());
        expect("gelu", made, want, 1e-5);
        check_fold(fetch(made, int64_t(N) * n));
    };
    auto fold = [=] { return fold_into(linear_at(*sparse, QKV, 0, N), z); };  // draws
    auto layernorm = [=](Fold f) {
        layernorm_forward(*sparse, made, nullptr, mean, rstd, x, nullptr, nullptr, LNFW, 0, f, N);
    };

    const double E = sizeof(floatX), X = E * N * n, Y = E * N * m, Z = E * N * r, P = E * n * r,
                 W = E * m * n;
    const double elements = double(N) * n, product = 2 * elements * r, drawing = 31.0 * n * r;
    Work z_floor = {X + Z, product + drawing},
         both = {X + W + Y + Z, product + drawing + 2 * elements * m};
    Work folded = {X + Z, 2 * elements};
    Work norm = {2 * X + 8 * N + Z, 10 * elements}, norm_read = {norm.bytes + X, norm.flops};
    Work gelu = {2 * X + Z, 12 * elements}, gelu_read = {gelu.bytes + X, gelu.flops};
    std::vector<Variant> list = {
        {"P drawn, then a thread an element",
         {X * r / 32 + 2 * P + Z, z_floor.flops},
         z_floor,
         [=] {
             draw_projection(p, nullptr, nullptr, {m, n, r}, GAUSSIAN, seed, stream);
             project1<<<dim3(blocks_for(r, 32), blocks_for(N, 8)), dim3(32, 8)>>>(z, x, p, N, n, r);
         },
         check_z},
        {"P drawn, then cuBLAS: the trainer's, dense",
         {z_floor.bytes + 2 * P, z_floor.flops},
         z_floor,
         [=] { make_z(linear_at(*dense, QKV, 0, N), z, x, N); },
         check_z},
        {"y and z, two products: the trainer's layer",
         {both.bytes + X + 2 * P, both.flops},
         both,
         [=] { linear_forward(linear_at(*dense, QKV, 0, N), y, x, N, false, true); },
         check_y_and_z},
        // x is read once for both. It costs a copy of W, as here, or room for P beside each W; and
        // y and z in one array.
        {"y and z, one product with W and P^T in one array",
         {both.bytes + 2 * W + 2 * P, both.flops},
         both,
         [=] {
             CUDA(cudaMemcpyAsync(wp, w, sizeof(floatX) * m * n, cudaMemcpyDeviceToDevice));
             draw_transposed<<<blocks_for(int64_t(n) * r, 256 * QUAD), 256>>>(
                 wp + int64_t(m) * n, n, r, scale, seed, stream);
             matmul(yz, CUDA_X, x, false, wp, true, CUDA_X, N, m + r, n, 1, 0);
         },
         check_yz},
        {"fold, a block a row: the trainer's, sparse", folded, folded,
         [=] { make_z(linear_at(*sparse, QKV, 0, N), z, x, N); }, check_fold_of_x},
        {"fold, 8 rows a thread", folded, folded,
         [=] { fold6<<<dim3(blocks_for(r, 128), blocks_for(N, 8)), 128>>>(fold(), x, N); },
         check_fold_of_x},
        {"LayerNorm, then 5", norm_read, norm,
         [=] {
             layernorm(Fold{});
             make_z(linear_at(*sparse, QKV, 0, N), z, made, N);
         },
         check_layernorm},
        {"LayerNorm with the fold: the trainer's", norm, norm, [=] { layernorm(fold()); },
         check_layernorm},
        {"GELU, then 5", gelu_read, gelu,
         [=] {
             gelu_forward(made, nullptr, x, Fold{}, N, n);
             make_z(linear_at(*sparse, QKV, 0, N), z, made, N);
         },
         check_gelu},
        {"GELU with the fold: the trainer's", gelu, gelu,
         [=] { gelu_forward(made, nullptr, x, fold(), N, n); }, check_gelu},
    };
#ifndef PRECISION_FP32
    std::function<void()> read, redrawn, kept;
    Draw draw = {n, r, scale, seed, stream};
    dim3 grid(blocks_for(r, SIDE), blocks_for(N, SIDE));
    int shared = (blocks_for(n, SIDE) + 2) * sizeof(Tile), most = 0;
    if (!a.dry) CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    if (r % 8 == 0) {
        read = [=] {
            draw_projection(p, nullptr, nullptr, {m, n, r}, GAUSSIAN, seed, stream);
            project11<<<grid, FLASH_THREADS>>>(z, x, p, draw, N);
        };
        redrawn = [=] { project11<<<grid, FLASH_THREADS>>>(z, x, nullptr, draw, N); };
    }
    if (r % 8 == 0 && shared <= most) {
        kept = [=] {
            CUDA(cudaFuncSetAttribute(project13, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      shared));
            project13<<<dim3(grid.x, blocks_for(N, 256)), FLASH_THREADS, shared>>>(z, x, draw, N);
        };
    }
    list.push_back({"tensor cores, P drawn into memory before",
                    {grid.x * X + 2 * P + Z, z_floor.flops},
                    z_floor,
                    read,
                    check_z});
    list.push_back({"tensor cores, P drawn in the kernel, for 64 rows",
                    {grid.x * X + Z, product + grid.y * drawing},
                    z_floor,
                    redrawn,
                    check_z});
    list.push_back({"tensor cores, P drawn in the kernel, for 256 rows",
                    {grid.x * X + Z, product + blocks_for(N, 256) * drawing},
                    z_floor,
                    kept,
                    check_z});
#endif
    return list;
}

int main(int argc, char** argv) {
    return harness({"compress_forward",
                    {"N", "n", "m", "r"},
                    {{1, 768, 24, 192},
                     {37, 768, 40, 333},
                     {5, 1600, 8, 104},
                     {300, 40, 16, 8},
                     {70, 72, 16, 7},
                     {3, 8, 8, 1}},
                    {16384, 768, 2304, 192},
                    variants},
                   argc, argv);
}
