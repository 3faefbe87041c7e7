// LayerNorm, backward: dx = (dy w - mean(dy w) - n mean(dy w n)) rstd with n = (x - mean) rstd, added to dx where the residual
// stream's gradient is there already; dw += sum over tokens of dy n, db += sum of dy. dx, dy, x (N, C), mean and rstd (N), w
// (C); dw and db (C) in fp32. The trainer's sums have a fixed order: no atomics.
//
// Floor, with E bytes an element: dy, x and dx read, dx written, 4 N C E + 8 N bytes (3 N C E where nothing is added to).
// Arithmetic, 16 N C, is nowhere near a device's rate: memory limits.

#include "common.cuh"

// 1: a thread a row; each element goes to its column's sums by an atomic addition.
__global__ void backward1(floatX* dx, float* dw, float* db, const floatX* dy, const floatX* x, const float* mean,
                          const float* rstd, const floatX* w, int N, int C, bool accumulate) {
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
        float n = (to_float(x[at + j]) - m) * s, d = (to_float(dy[at + j]) * to_float(w[j]) - sum / C - n * sum_norm / C) * s;
        store(dx + at + j, accumulate ? to_float(dx[at + j]) + d : d);
    }
}

// 2: a warp a row, 4 rows a block, 16 bytes a load. The atomics stay: N of them for each column. Without dw, dx alone, for 4.
__global__ void __launch_bounds__(128)
    backward2(floatX* dx, float* dw, float* db, const floatX* dy, const floatX* x, const float* mean, const float* rstd,
              const floatX* w, int N, int C, bool accumulate) {
    int lane = threadIdx.x % WARP, i = blockIdx.x * 4 + threadIdx.x / WARP;
    if (i >= N) return;
    size_t at = size_t(i) * C;
    float m = mean[i], s = rstd[i], sum = 0, sum_norm = 0;
    for (int j = lane * PACK; j < C; j += WARP * PACK) {
        Pack pd = load_pack(dy + at + j), px = load_pack(x + at + j), pw = load_pack(w + j);
        for (int k = 0; k < PACK; k++) {
            float d = to_float(pd.x[k]), n = (to_float(px.x[k]) - m) * s;
            sum += d * to_float(pw.x[k]), sum_norm += d * to_float(pw.x[k]) * n;
            if (dw) atomicAdd(dw + j + k, d * n), atomicAdd(db + j + k, d);
        }
    }
    sum = warp_sum(sum) / C, sum_norm = warp_sum(sum_norm) / C;
    for (int j = lane * PACK; j < C; j += WARP * PACK) {
        Pack pd = load_pack(dy + at + j), px = load_pack(x + at + j), pw = load_pack(w + j), old = {};
        if (accumulate) old = load_pack(dx + at + j);
        for (int k = 0; k < PACK; k++) {
            float d = (to_float(pd.x[k]) * to_float(pw.x[k]) - sum - (to_float(px.x[k]) - m) * s * sum_norm) * s;
            store(&pd.x[k], accumulate ? to_float(old.x[k]) + d : d);
        }
        store_pack(dx + at + j, pd);
    }
}

// 4: both sums in one pass over dy and x. grid (ceil(C / (8 packs)), SLABS), block (8, 32); partial (SLABS, 2C): dw, then db.
__global__ void __launch_bounds__(SUM_ROWS* SUM_PACKS)
    column_sums4(float* partial, const floatX* dy, const floatX* x, const float* mean, const float* rstd, int N, int C) {
    __shared__ float sums[2][SUM_ROWS][SUM_PACKS * PACK + 1];
    int column = (blockIdx.x * SUM_PACKS + threadIdx.x) * PACK, rows = (N + SLABS - 1) / SLABS;
    int last = min(N, int(blockIdx.y + 1) * rows);
    float dw[PACK] = {}, db[PACK] = {};
    for (int i = blockIdx.y * rows + threadIdx.y; i < last && column < C; i += SUM_ROWS) {
        Pack pd = load_pack(dy + size_t(i) * C + column), px = load_pack(x + size_t(i) * C + column);
        float m = mean[i], s = rstd[i];
        for (int k = 0; k < PACK; k++) {
            dw[k] += to_float(pd.x[k]) * (to_float(px.x[k]) - m) * s;
            db[k] += to_float(pd.x[k]);
        }
    }
    for (int k = 0; k < PACK; k++) {
        sums[0][threadIdx.y][threadIdx.x * PACK + k] = dw[k];
        sums[1][threadIdx.y][threadIdx.x * PACK + k] = db[k];
    }
    __syncthreads();
    int own = threadIdx.y * SUM_PACKS + threadIdx.x, which = own / (SUM_PACKS * PACK), of = own % (SUM_PACKS * PACK);
    int to = blockIdx.x * SUM_PACKS * PACK + of;
    if (which > 1 || to >= C) return;
    float total = 0;
    for (int i = 0; i < SUM_ROWS; i++) total += sums[which][i][of];
    partial[(size_t(blockIdx.y) * 2 + which) * C + to] = total;
}

// The second stage of 4 and 5: grid ceil(2C / 32), block (32, 16). dw, db (C) += sum of partial (parts, 2C)
__global__ void __launch_bounds__(512) add_parts(float* dw, float* db, const float* partial, int parts, int C) {
    __shared__ float sums[16][WARP];
    int column = blockIdx.x * WARP + threadIdx.x;
    float sum = 0;
    for (int i = threadIdx.y; i < parts && column < 2 * C; i += 16) sum += partial[size_t(i) * 2 * C + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= 2 * C) return;
    for (int i = 1; i < 16; i++) sum += sums[i][threadIdx.x];
    *(column < C ? dw + column : db + column - C) += sum;
}

// 5: all in one pass. A block takes BAND5 rows; each thread owns one pack of channels, so that its shares of dw and db stay in
// its registers from row to row, and a row's dy and x there between the sums over it and dx. ROWS5 rows at a time share a
// barrier and have their loads on the way together. grid ceil(N / BAND5), block C / PACK threads, rounded up to warps. partial
// (ceil(N / BAND5), 2C): dw, then db.
enum { BAND5 = 32, ROWS5 = 2 };
__global__ void __launch_bounds__(3072 / PACK)
    backward5(floatX* dx, float* partial, const floatX* dy, const floatX* x, const float* mean, const float* rstd,
              const floatX* w, int N, int C, bool accumulate) {
    __shared__ float sums[2][2 * ROWS5][WARP];  // two in turn, so that one barrier a turn is enough
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP, column = threadIdx.x * PACK;
    bool inside = column < C;
    int first = blockIdx.x * BAND5, last = min(N, first + BAND5);
    float dw[PACK] = {}, db[PACK] = {};
    Pack pw = {};
    if (inside) pw = load_pack(w + column);
    for (int turn = 0; first < last; first += ROWS5, turn ^= 1) {
        Pack pd[ROWS5] = {}, px[ROWS5] = {}, old[ROWS5] = {};
        float m[ROWS5] = {}, s[ROWS5] = {}, total[2 * ROWS5] = {};
#pragma unroll
        for (int i = 0; i < ROWS5; i++) {
            if (first + i >= last) continue;
            size_t at = size_t(first + i) * C + column;
            m[i] = mean[first + i], s[i] = rstd[first + i];
            if (inside) pd[i] = load_pack(dy + at), px[i] = load_pack(x + at);
            if (inside && accumulate) old[i] = load_pack(dx + at);
        }
#pragma unroll
        for (int i = 0; i < ROWS5; i++) {
            for (int k = 0; k < PACK; k++) {
                float d = to_float(pd[i].x[k]), n = (to_float(px[i].x[k]) - m[i]) * s[i];
                dw[k] += d * n, db[k] += d;
                total[2 * i] += d * to_float(pw.x[k]), total[2 * i + 1] += d * to_float(pw.x[k]) * n;
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * ROWS5; i++) {
            total[i] = warp_sum(total[i]);
            if (lane == 0) sums[turn][i][warp] = total[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2 * ROWS5; i++) {
            total[i] = 0;
            for (int k = 0; k < warps; k++) total[i] += sums[turn][i][k];
            total[i] /= C;
        }
#pragma unroll
        for (int i = 0; i < ROWS5; i++) {
            for (int k = 0; k < PACK; k++) {
                float n = (to_float(px[i].x[k]) - m[i]) * s[i];
                float d = (to_float(pd[i].x[k]) * to_float(pw.x[k]) - total[2 * i] - n * total[2 * i + 1]) * s[i];
                store(&pd[i].x[k], to_float(old[i].x[k]) + d);
            }
            if (inside && first + i < last) store_pack(dx + size_t(first + i) * C + column, pd[i]);
        }
    }
    for (int k = 0; k < PACK && inside; k++) {
        partial[size_t(blockIdx.x) * 2 * C + column + k] = dw[k];
        partial[size_t(blockIdx.x) * 2 * C + C + column + k] = db[k];
    }
}

static std::vector<Variant> variants(Arrays& a, const Size& size) {
    int N = size[0], C = size[1], bands = blocks_for(N, BAND5), threads = blocks_for(C, WARP * PACK) * WARP;
    bool accumulate = size[2];
    floatX *dy = a.normals(int64_t(N) * C), *x = a.normals(int64_t(N) * C, 2, 0.5), *w = a.normals(C, 0.5, 1);
    floatX* dx = accumulate ? a.normals(int64_t(N) * C) : a.room<floatX>(int64_t(N) * C);
    float *mean = a.normals_fp32(N, 0.1), *rstd = a.normals_fp32(N, 0.1, 0.5), *dw = a.normals_fp32(C), *db = a.normals_fp32(C);
    float* partial = a.room<float>(std::max<int64_t>(4 * SLABS, 2 * bands) * C);

    auto check = [=, &a] {
        Floats want = a.start(dx), dws = a.start(dw), dbs = a.start(db);
        cpu::layernorm_backward(want.data(), dws.data(), dbs.data(), a.start(dy).data(), a.start(x).data(),
                                a.start(mean).data(), a.start(rstd).data(), a.start(w).data(), N, C, accumulate ? 1.0f : 0.0f);
        // dx is rounded once; before that it is of size 1, with the fp32 errors of two sums of C terms: some 1e-6.
        expect("dx", dx, want, 1e-5);
        // Sums of at most 100 terms of size 1 in another order: 100 2^-24 of 10 or so.
        expect("dw", dw, dws, 1e-4, 0);
        expect("db", db, dbs, 1e-4, 0);
    };
    double NC = double(N) * C, row = NC * sizeof(floatX), dx_bytes = (accumulate ? 4 : 3) * row + 8 * N;
    double parts = 16.0 * C;  // dw's and db's, written and read, for each slab or band
    Work floor = {dx_bytes, 16 * NC}, atomics = {dx_bytes + 2 * row + 16 * NC, 16 * NC};
    Work three_passes = {dx_bytes + 5 * row + SLABS * parts, 20 * NC},
         two_passes = {dx_bytes + 4 * row + SLABS * parts, 20 * NC};
    Work one_pass = {dx_bytes + bands * parts, 16 * NC};
    dim3 slabs(blocks_for(C, SUM_PACKS * PACK), SLABS), of_columns(blocks_for(2 * C, WARP));
    return {
        {"a thread a row; dw and db by atomic additions", atomics, floor,
         [=] { backward1<<<blocks_for(N, 128), 128>>>(dx, dw, db, dy, x, mean, rstd, w, N, C, accumulate); }, check, false},
        {"a warp a row, 16 bytes a load; the atomics stay", atomics, floor,
         [=] { backward2<<<blocks_for(N, 4), 128>>>(dx, dw, db, dy, x, mean, rstd, w, N, C, accumulate); }, check, false},
        {"dx, then dw, then db, in two stages each: the trainer's", three_passes, floor,
         [=] {
             Model s = {};
             s.config.C = C;
             s.params[LNFW] = w, s.grads[LNFW] = dw, s.grads[LNFB] = db, s.partial = partial;
             layernorm_backward(s, dx, dy, x, mean, rstd, LNFW, 0, N, accumulate);
         },
         check},
        // These are not the trainer's yet, and for a GPU to judge: less traffic, but in 5 a barrier for every two rows.
        {"dx by 2; dw and db from one pass over dy and x, in two stages", two_passes, floor,
         [=] {
             backward2<<<blocks_for(N, 4), 128>>>(dx, nullptr, nullptr, dy, x, mean, rstd, w, N, C, accumulate);
             column_sums4<<<slabs, dim3(SUM_PACKS, SUM_ROWS)>>>(partial, dy, x, mean, rstd, N, C);
             add_parts<<<of_columns, dim3(WARP, 16)>>>(dw, db, partial, SLABS, C);
         },
         check},
        {"all in one pass: bands of rows, dw and db in registers", one_pass, floor,
         [=] {
             backward5<<<bands, threads>>>(dx, partial, dy, x, mean, rstd, w, N, C, accumulate);
             add_parts<<<of_columns, dim3(WARP, 16)>>>(dw, db, partial, bands, C);
         },
         check},
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
