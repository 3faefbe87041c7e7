// LayerNorm, backward: dx = (dy w - mean(dy w) - n mean(dy w n)) rstd with n = (x - mean) rstd,
// added to dx where the residual stream's gradient is there already; dw += sum over tokens of dy n,
// db += sum of dy. dx, dy, x (N, C), mean and rstd (N), w (C); dw and db (C) in fp32. The trainer's
// sums have a fixed order: no atomics; and it makes the sums of dx on the way, which are the
// gradient of the bias of the projection before.
//
// Floor, with E bytes an element: dy, x and dx read, dx written, 4 N C E + 8 N bytes (3 N C E where
// nothing is added to). Arithmetic, 16 N C, is nowhere near a device's rate: memory limits.

#include "common.cuh"

// 1: a thread a row; each element goes to its column's sums by an atomic addition.
__global__ void backward1(floatX* dx, float* dw, float* db, const floatX* dy, const floatX* x,
                          const float* mean, const float* rstd, const floatX* w, int N, int C,
                          bool accumulate) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N) return;
    size_t at = size_t(i) * C;
    float m = mean[i], s = rstd[i], sum = 0, sum_norm = 0;
    for (int j = 0; j < C; j++) {
        float d = to_float(dy[at + j]), n = (to_float(x[at + j]) - m) * s;
        sum += d * to_float(w[j]), sum_norm += d * to_float(w[j]) * n;
        atomicAdd(dw + j, d * n);
        atomicAdd(db + j, d);
    }
    for (int j = 0; j < C; j++) {
        float n = (to_float(x[at + j]) - m) * s,
              d = (to_float(dy[at + j]) * to_float(w[j]) - sum / C - n * sum_norm / C) * s;
        store(dx + at + j, accumulate ? to_float(dx[at + j]) + d : d);
    }
}

// 2: a warp a row, 4 rows a block, 16 bytes a load. The atomics stay: N of them for each column.
__global__ void __launch_bounds__(128)
    backward2(floatX* dx, float* dw, float* db, const floatX* dy, const floatX* x,
              const float* mean, const float* rstd, const floatX* w, int N, int C,
              bool accumulate) {
    int lane = threadIdx.x % WARP, i = blockIdx.x * 4 + threadIdx.x / WARP;
    if (i >= N) return;
    size_t at = size_t(i) * C;
    float m = mean[i], s = rstd[i], sum = 0, sum_norm = 0;
    for (int j = lane * PACK; j < C; j += WARP * PACK) {
        Pack pd = load_pack(dy + at + j), px = load_pack(x + at + j), pw = load_pack(w + j);
        for (int k = 0; k < PACK; k++) {
            float d = to_float(pd.x[k]), n = (to_float(px.x[k]) - m) * s;
            sum += d * to_float(pw.x[k]), sum_norm += d * to_float(pw.x[k]) * n;
            atomicAdd(dw + j + k, d * n), atomicAdd(db + j + k, d);
        }
    }
    sum = warp_sum(sum) / C, sum_norm = warp_sum(sum_norm) / C;
    for (int j = lane * PACK; j < C; j += WARP * PACK) {
        Pack pd = load_pack(dy + at + j), px = load_pack(x + at + j), pw = load_pack(w + j),
             old = {};
        if (accumulate) old = load_pack(dx + at + j);
        for (int k = 0; k < PACK; k++) {
            float d = (to_float(pd.x[k]) * to_float(pw.x[k]) - sum -
                       (to_float(px.x[k]) - m) * s * sum_norm) *
                      s;
            store(&pd.x[k], accumulate ? to_float(old.x[k]) + d : d);
        }
        store_pack(dx + at + j, pd);
    }
}

static std::vector<Variant> variants(Arrays& a, const Size& size) {
    int N = size[0], C = size[1], bands = blocks_for(N, band_of(N));
    bool accumulate = size[2];
    floatX *dy = a.normals(int64_t(N) * C), *x = a.normals(int64_t(N) * C, 2, 0.5),
           *w = a.normals(C, 0.5, 1);
    floatX* dx = accumulate ? a.normals(int64_t(N) * C) : a.room<floatX>(int64_t(N) * C);
    float *mean = a.normals_fp32(N, 0.1), *rstd = a.normals_fp32(N, 0.1, 0.5),
          *dw = a.normals_fp32(C), *db = a.normals_fp32(C);
    float *below = a.normals_fp32(C), *partial = a.room<float>(int64_t(bands) * 3 * C);

    auto check = [=, &a] {
        Floats want = a.start(dx), dws = a.start(dw), dbs = a.start(db);
        cpu::layernorm_backward(want.data(), dws.data(), dbs.data(), a.start(dy).data(),
                                a.start(x).data(), a.start(mean).data(), a.start(rstd).data(),
                                a.start(w).data(), N, C, accumulate ? 1.0f : 0.0f);
        // dx is rounded once; before that it is of size 1, with the fp32 errors of two sums of C
        // terms: some 1e-6.
        expect("dx", dx, want, 1e-5);
        // Sums of at most 100 terms of size 1 in another order: 100 2^-24 of 10 or so.
        expect("dw", dw, dws, 1e-4, 0);
        expect("db", db, dbs, 1e-4, 0);
    };
    auto check_all = [=, &a] {  // and the sums of the dx that is there
        check();
        Floats want = a.start(below), terms = fetch(dx, int64_t(N) * C);
        for (int64_t i = 0; i < int64_t(terms.size()); i++) want[i % C] += terms[i];
        expect("below", below, want, 1e-4, 0);
    };
    double NC = double(N) * C, row = NC * sizeof(floatX),
           dx_bytes = (accumulate ? 4 : 3) * row + 8 * N;
    Work floor = {dx_bytes, 16 * NC}, atomics = {dx_bytes + 2 * row + 16 * NC, 16 * NC};
    // three sums, written and read, for each band
    Work one_pass = {dx_bytes + 24.0 * C * bands, 17 * NC};
    return {
        {"a thread a row; dw and db by atomic additions", atomics, floor,
         [=] {
             backward1<<<blocks_for(N, 128), 128>>>(dx, dw, db, dy, x, mean, rstd, w, N, C,
                                                    accumulate);
         },
         check, false},
        {"a warp a row, 16 bytes a load; the atomics stay", atomics, floor,
         [=] {
             backward2<<<blocks_for(N, 4), 128>>>(dx, dw, db, dy, x, mean, rstd, w, N, C,
                                                  accumulate);
         },
         check, false},
        {"all in one pass, with dx's own sums: bands of rows, sums in registers: the trainer's",
         one_pass, floor,
         [=] {
             Model s = {};
             s.config.C = C;
             s.params[LNFW] = w, s.grads[LNFW] = dw, s.grads[LNFB] = db, s.partial = partial;
             layernorm_backward(s, dx, dy, x, mean, rstd, LNFW, 0, below, N, accumulate);
         },
         check_all},
    };
}

int main(int argc, char** argv) {
    return harness({"layernorm_backward",
                    {"N", "C", "accumulate"},
                    {{1, 768, 0}, {37, 768, 1}, {1, 1600, 1}, {70, 1600, 0}, {70, 40, 1}},
                    {16384, 768, 1},
                    variants},
                   argc, argv);
}
