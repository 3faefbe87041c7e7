// LayerNorm, forward: y = (x - mean) rstd w + b over the channels of each token; x, y (N, C), mean
// and rstd (N), w and b (C). In the trainer it also makes its input, sum = x + delta + bias, the
// residual stream, and the sparse projection's z (N, r) of y.
//
// Floor, with E bytes an element: x read, y written, 2 N C E + 8 N bytes; with the residual sum
// delta read and sum written as well, 4 N C E + 8 N; with the fold z written, N r E more.
// Arithmetic, 8 N C, is nowhere near a device's rate: memory limits.

#include "common.cuh"

// 1: a thread a row, its channels one after the other: neighbours in a warp read addresses C
// elements apart.
__global__ void layernorm1(floatX* y, float* mean, float* rstd, const floatX* x, const floatX* w,
                           const floatX* b, int N, int C) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N) return;
    size_t at = size_t(i) * C;
    float m = 0, s = 0;
    for (int j = 0; j < C; j++) m += to_float(x[at + j]);
    m /= C;
    for (int j = 0; j < C; j++) s += (to_float(x[at + j]) - m) * (to_float(x[at + j]) - m);
    s = rsqrtf(s / C + LAYERNORM_EPS);
    for (int j = 0; j < C; j++)
        store(y + at + j, (to_float(x[at + j]) - m) * s * to_float(w[j]) + to_float(b[j]));
    mean[i] = m, rstd[i] = s;
}

// 2: a warp a row, 4 rows a block: neighbours read neighbours, and shuffles add up.
__global__ void __launch_bounds__(128)
    layernorm2(floatX* y, float* mean, float* rstd, const floatX* x, const floatX* w,
               const floatX* b, int N, int C) {
    int lane = threadIdx.x % WARP, i = blockIdx.x * 4 + threadIdx.x / WARP;
    if (i >= N) return;
    size_t at = size_t(i) * C;
    float m = 0, s = 0;
    for (int j = lane; j < C; j += WARP) m += to_float(x[at + j]);
    m = warp_sum(m) / C;
    for (int j = lane; j < C; j += WARP) s += (to_float(x[at + j]) - m) * (to_float(x[at + j]) - m);
    s = rsqrtf(warp_sum(s) / C + LAYERNORM_EPS);
    for (int j = lane; j < C; j += WARP)
        store(y + at + j, (to_float(x[at + j]) - m) * s * to_float(w[j]) + to_float(b[j]));
    if (lane == 0) mean[i] = m, rstd[i] = s;
}

// 3: the row is read once and stays in shared memory, 4 C floats; each lane meets only what it
// wrote, so nothing waits.
__global__ void __launch_bounds__(128)
    layernorm3(floatX* y, float* mean, float* rstd, const floatX* x, const floatX* w,
               const floatX* b, int N, int C) {
    extern __shared__ float rows[];
    int lane = threadIdx.x % WARP, i = blockIdx.x * 4 + threadIdx.x / WARP;
    if (i >= N) return;
    size_t at = size_t(i) * C;
    float *row = rows + threadIdx.x / WARP * C, m = 0, s = 0;
    for (int j = lane; j < C; j += WARP) m += row[j] = to_float(x[at + j]);
    m = warp_sum(m) / C;
    for (int j = lane; j < C; j += WARP) s += (row[j] - m) * (row[j] - m);
    s = rsqrtf(warp_sum(s) / C + LAYERNORM_EPS);
    for (int j = lane; j < C; j += WARP)
        store(y + at + j, (row[j] - m) * s * to_float(w[j]) + to_float(b[j]));
    if (lane == 0) mean[i] = m, rstd[i] = s;
}

// 4: 16 bytes a load: an eighth of the loads, each a full line's share, so enough of them are on
// their way at once.
__global__ void __launch_bounds__(128)
    layernorm4(floatX* y, float* mean, float* rstd, const floatX* x, const floatX* w,
               const floatX* b, int N, int C) {
    extern __shared__ float rows[];
    int lane = threadIdx.x % WARP, i = blockIdx.x * 4 + threadIdx.x / WARP;
    if (i >= N) return;
    size_t at = size_t(i) * C;
    float *row = rows + threadIdx.x / WARP * C, m = 0, s = 0;
    for (int j = lane * PACK; j < C; j += WARP * PACK) {
        Pack p = load_pack(x + at + j);
        for (int k = 0; k < PACK; k++) m += row[j + k] = to_float(p.x[k]);
    }
    m = warp_sum(m) / C;
    for (int j = lane * PACK; j < C; j += WARP * PACK) {
        for (int k = 0; k < PACK; k++) s += (row[j + k] - m) * (row[j + k] - m);
    }
    s = rsqrtf(warp_sum(s) / C + LAYERNORM_EPS);
    for (int j = lane * PACK; j < C; j += WARP * PACK) {
        Pack p, pw = load_pack(w + j), pb = load_pack(b + j);
        for (int k = 0; k < PACK; k++)
            store(&p.x[k], (row[j + k] - m) * s * to_float(pw.x[k]) + to_float(pb.x[k]));
        store_pack(y + at + j, p);
    }
    if (lane == 0) mean[i] = m, rstd[i] = s;
}

// 5's first half: sum = x + delta + bias; a block a row.
__global__ void __launch_bounds__(128)
    residual5(floatX* sum, const floatX* x, const floatX* delta, const floatX* bias, int C) {
    size_t at = size_t(blockIdx.x) * C;
    for (int j = threadIdx.x * PACK; j < C; j += blockDim.x * PACK) {
        Pack p = load_pack(x + at + j), d = load_pack(delta + at + j), e = load_pack(bias + j);
        for (int k = 0; k < PACK; k++)
            store(&p.x[k], to_float(p.x[k]) + to_float(d.x[k]) + to_float(e.x[k]));
        store_pack(sum + at + j, p);
    }
}

// The trainer's own function, with whatever it launches; null arrays: not wanted.
static void trainers(floatX* y, floatX* sum, float* mean, float* rstd, const floatX* x,
                     const floatX* delta, const floatX* bias, floatX* w, floatX* b, Fold fold,
                     int N, int C) {
    Model s = {};
    s.config.C = C;
    s.params[LNFW] = w, s.params[LNFB] = b;
    layernorm_forward(s, y, sum, mean, rstd, x, delta, bias, LNFW, 0, fold, N);
}

static std::vector<Variant> variants(Arrays& a, const Size& size) {
    int N = size[0], C = size[1], r = C / 4, blocks = blocks_for(N, 4),
        shared = 4 * C * sizeof(float);
    floatX *x = a.normals(int64_t(N) * C, 2, 0.5), *delta = a.normals(int64_t(N) * C),
           *bias = a.normals(C);
    floatX *w = a.normals(C, 0.5, 1), *b = a.normals(C);
    floatX *y = a.room<floatX>(int64_t(N) * C), *sum = a.room<floatX>(int64_t(N) * C),
           *z = a.room<floatX>(int64_t(N) * r);
    float *mean = a.room<float>(N), *rstd = a.room<float>(N);
    SparseProjection projection(a, C, r);
    Fold fold = projection.fold(z);

    // In fp32 means and squares are sums of C terms in another order, whose rounding grows like
    // sqrt(C) 2^-24: 1e-5 is enough.
    auto check_y = [=, &a](const Floats& from) {
        Floats want(from.size()), means(N), rstds(N);
        cpu::layernorm_forward(want.data(), means.data(), rstds.data(), from.data(),
                               a.start(w).data(), a.start(b).data(), N, C);
        expect("y", y, want, 1e-5);
        expect("mean", mean, means, 1e-5, 0);
        expect("rstd", rstd, rstds, 0, 1e-5);
    };
    auto check = [=, &a] { check_y(a.start(x)); };
    // The sum is the same three numbers added in the same order, so its bits are the same; then y
    // is that of the rounded sum.
    auto check_sum = [=, &a] {
        Floats want = a.start(x), deltas = a.start(delta), biases = a.start(bias);
        for (size_t i = 0; i < want.size(); i++)
            want[i] = float(floatX(want[i] + deltas[i] + biases[i % C]));
        expect("sum", sum, want, 0, 0);
        check_y(want);
    };
    // z of the y that is there: its terms, C / r of them, are the same, and their order too.
    auto check_all = [=] {
        check_sum();
        expect("z", z, projection.project(fetch(y, int64_t(N) * C)), 1e-5);
    };

    double E = sizeof(floatX), rows = double(N) * C * E, NC = double(N) * C;
    Work plain = {2 * rows + 8 * N, 8 * NC}, thrice = {4 * rows + 8 * N, 8 * NC},
         with_sum = {4 * rows + 8 * N, 10 * NC};
    Work with_z = {4 * rows + double(N) * r * E + 8 * N, 12 * NC};
    return {
        {"a thread a row, three loops", thrice, plain,
         [=] { layernorm1<<<blocks_for(N, 128), 128>>>(y, mean, rstd, x, w, b, N, C); }, check},
        {"a warp a row: coalesced, sums by shuffles", thrice, plain,
         [=] { layernorm2<<<blocks, 128>>>(y, mean, rstd, x, w, b, N, C); }, check},
        {"reads once: the row stays in shared memory", plain, plain,
         [=] { layernorm3<<<blocks, 128, shared>>>(y, mean, rstd, x, w, b, N, C); }, check},
        {"16 bytes a load", plain, plain,
         [=] { layernorm4<<<blocks, 128, shared>>>(y, mean, rstd, x, w, b, N, C); }, check},
        {"with the residual sum, by a kernel before 4",
         {5 * rows + 8 * N, 10 * NC},
         with_sum,
         [=] {
             residual5<<<N, 128>>>(sum, x, delta, bias, C);
             layernorm4<<<blocks, 128, shared>>>(y, mean, rstd, sum, w, b, N, C);
         },
         check_sum},
        {"with the residual sum, fused: the trainer's", with_sum, with_sum,
         [=] { trainers(y, sum, mean, rstd, x, delta, bias, w, b, Fold{}, N, C); }, check_sum},
        {"with residual sum and fold, fused: the trainer's", with_z, with_z,
         [=] { trainers(y, sum, mean, rstd, x, delta, bias, w, b, fold, N, C); }, check_all},
    };
}

int main(int argc, char** argv) {
    return harness({"layernorm_forward",
                    {"N", "C"},
                    {{1, 768}, {37, 768}, {1, 1600}, {37, 1600}, {5, 40}},
                    {16384, 768},
                    variants},
                   argc, argv);
}
