// The classifier: logits (N, Vp) = x wte^T, softmax and cross entropy over the first V words
// of them, and back: the gradients of x (N, C) and of wte (Vp, C), which is fp32. Logits
// exist for `rows` tokens at a time; ld, the elements from one row of them to the next, is Vp
// rounded up to 8.
//
// 1 to 4 are its middle, for one chunk: logits become their gradient, times scale, and losses are
// left. Floor, with E bytes an element: logits read and written, 2 rows ld E bytes, 206 MB for 1024
// tokens of GPT-2. A row takes 101 KB in bf16. That is more than a multiprocessor's cache has for
// each of its blocks, and the rows of all blocks together, 528 on H200, take 53 MB: all of its
// second cache; half of that where blocks have 1024 threads. An exponential, or a reciprocal, goes
// through a unit of 16 lanes a clock: 1 takes three an element, 43 us for these tokens on H200,
// nearly the floor's 49 us; 2 to 4 take 2.1.
//
// 5 to 9 are the whole, in chunks. Bytes for each token, each kernel reading what it needs once but
// for the middle: 6 ld E for logits (written by a product; read twice and written; read by the
// product for x's gradient and by that for wte's) and (8 + 2 E) Vp C / rows for wte (read by two
// products; its gradient read and written). GPT-2 (C = 768, bf16), kB a token:
//
//     rows                    256    512   1024   2048   4096   8192
//     logits                  604    604    604    604    604    604
//     wte                    1811    905    453    226    113     57
//     logits in memory, MiB    25     49     98    196    393    786
//
// The product for wte's gradient does 2 Vp C rows FLOPs for 8 Vp C bytes: rows / 4 FLOPs a byte,
// whatever C. A device of F FLOPs a byte waits for its memory below rows = 4 F: 610 for A100 (312
// TFLOP/s, 2.04 TB/s), 655 for RTX 4090, 820 for H200, 1610 for L4. There the product's bytes take
// as long as its arithmetic, and the two overlap in part; at twice that little is left to win. So
// by time the optimum begins at 2048. The trainer takes what its wide buffer has free then, 3,001
// tokens at B = 64 and T = 1024, or 1024 in a buffer of their own where that is less. A chunk of
// 256, small enough for its logits to stay in a second cache of 50 MB, would save 604 kB a token at
// best, and pays 1358 for it.

#include "common.cuh"

// 1: a block a row, an element a thread, three passes: maximum, sum, gradient.
__global__ void __launch_bounds__(256)
    softmax1(floatX* logits, float* losses, const int* targets, int V, int ld, float scale) {
    __shared__ float reduce[WARP];
    floatX* row = logits + size_t(blockIdx.x) * ld;
    int target = targets[blockIdx.x];
    float most = -INFINITY, sum = 0;
    for (int j = threadIdx.x; j < V; j += blockDim.x) most = fmaxf(most, to_float(row[j]));
    most = block_reduce(most, reduce, true);
    for (int j = threadIdx.x; j < V; j += blockDim.x) sum += __expf(to_float(row[j]) - most);
    sum = block_reduce(sum, reduce, false);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + most - to_float(row[target]);
    __syncthreads();  // the target's logit is read before it becomes its gradient
    for (int j = threadIdx.x; j < ld; j += blockDim.x) {
        float y =
            j < V ? __expf(to_float(row[j]) - most) / sum - (j == target ? 1.0f : 0.0f) : 0.0f;
        store(row + j, y * scale);
    }
}

// A pack's gradient; factor = scale / sum, a division a row. target counts from the pack's
// first element.
__device__ inline void store_gradient(floatX* to, Pack p, float most, float factor, int target,
                                      float scale) {
    for (int k = 0; k < PACK; k++) {
        float y = __expf(to_float(p.x[k]) - most) * factor;
        store(&p.x[k], k == target ? y - scale : y);
    }
    store_pack(to, p);
}

// The block's maximum, and its sum, in each of its threads.
__device__ inline void take_together(float* most, float* sum, float* reduce) {
    float own = *most;
    *most = block_reduce(own, reduce, true);
    *sum = block_reduce(*sum * __expf(own - *most), reduce, false);
}

// 3: the row is read once and stays in shared memory, as many elements of it as there is room for,
// `kept`; the rest is read again.
__global__ void __launch_bounds__(1024) softmax3(floatX* logits, float* losses, const int* targets,
                                                 int V, int ld, float scale, int kept) {
    extern __shared__ int4 shared[];
    __shared__ float reduce[WARP];
    floatX *row = logits + size_t(blockIdx.x) * ld, *own = (floatX*)shared;
    int target = targets[blockIdx.x];
    float most = -INFINITY, sum = 0, wanted = to_float(row[target]);
    for (int j = threadIdx.x * PACK; j < V; j += blockDim.x * PACK) {
        Pack p = without_padding(load_pack(row + j), V - j);
        if (j < kept) store_pack(own + j, p);
        add_exponentials(p, &most, &sum);
    }
    take_together(&most, &sum, reduce);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + most - wanted;
    float factor = scale / sum;
    for (int j = threadIdx.x * PACK; j < ld; j += blockDim.x * PACK) {
        Pack p =
            j < kept && j < V ? load_pack(own + j) : without_padding(load_pack(row + j), V - j);
        store_gradient(row + j, p, most, factor, target - j, scale);
    }
}

static void launch_softmax3(floatX* logits, float* losses, const int* targets, int rows, int V,
                            int ld, float scale) {
    int room;
    CUDA(cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    int kept = std::min(ld, (room - WARP * int(sizeof(float))) / 16 * PACK),
        bytes = kept * sizeof(floatX);
    CUDA(cudaFuncSetAttribute(softmax3, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    softmax3<<<rows, 1024, bytes>>>(logits, losses, targets, V, ld, scale, kept);
}

// 4: the row stays in registers, 7 packs a thread, 57,344 elements in bf16; what is beyond is read
// again. All loads are on their way at once, but a multiprocessor has registers for one block
// alone, and little to do while that one waits.
enum { OWN = 7, STEP = 1024 * PACK };

__device__ inline Pack pack_of(int4 bits) {
    Pack p;
    memcpy(&p, &bits, 16);
    return p;
}

__global__ void __launch_bounds__(1024)
    softmax4(floatX* logits, float* losses, const int* targets, int V, int ld, float scale) {
    __shared__ float reduce[WARP];
    floatX* row = logits + size_t(blockIdx.x) * ld;
    int target = targets[blockIdx.x], first = threadIdx.x * PACK;
    float most = -INFINITY, sum = 0, wanted = to_float(row[target]);
    int4 own[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        if (first + i * STEP < ld) own[i] = *reinterpret_cast<const int4*>(row + first + i * STEP);
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        if (first + i * STEP < V)
            add_exponentials(without_padding(pack_of(own[i]), V - first - i * STEP), &most, &sum);
    }
    for (int j = first + OWN * STEP; j < V; j += STEP)
        add_exponentials(without_padding(load_pack(row + j), V - j), &most, &sum);
    take_together(&most, &sum, reduce);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + most - wanted;
    float factor = scale / sum;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        int j = first + i * STEP;
        if (j < ld)
            store_gradient(row + j, without_padding(pack_of(own[i]), V - j), most, factor,
                           target - j, scale);
    }
    for (int j = first + OWN * STEP; j < ld; j += STEP)
        store_gradient(row + j, without_padding(load_pack(row + j), V - j), most, factor,
                       target - j, scale);
}

static std::vector<Variant> variants(Arrays& a, const Size& size) {
    int N = size[0], V = size[1], Vp = size[2], C = size[3], rows = size[4];  // rows: of a chunk
    Model s = {};
    s.config.V = V, s.config.Vp = Vp, s.config.C = C;
    int ld = logits_width(s.config);
    float scale = 1.0f / N, beta = 1;
    std::vector<int> words(N);
    for (int i = 0; i < N; i++) words[i] = i == 0 ? V - 1 : int(philox(1, a.drawn, i).x % V);
    // the padding's too: a kernel that counts it is wrong
    floatX* logits = a.normals(int64_t(rows) * ld, 2);
    floatX *x = a.normals(int64_t(N) * C), *wte = a.normals(int64_t(Vp) * C, 0.5f / sqrtf(C));
    float *dwte = a.normals_fp32(int64_t(Vp) * C, scale), *losses = a.room<float>(N);
    floatX* dx = a.room<floatX>(int64_t(N) * C);
    int* targets = a.put(words);
    s.wide = x;
    s.spare = dx;
    s.params[WTE] = wte;
    s.grads[WTE] = dwte;
    s.logits = a.room<floatX>(int64_t(N) * ld);
    s.d_targets = targets;
    s.d_losses = losses;
    auto in_chunks = [=](int of) {
        return [=, from = words, to = Floats(N)]() mutable {
            s.targets = from.data(), s.losses = to.data(), s.chunk = of;
            classifier(s, N, true, scale, beta);
        };
    };

    // The CPU adds up 50257 exponentials in a chain, each time rounding a sum in fp32: some 1e-5 of
    // it.
    auto check = [=, &a] {
        Floats from = a.start(logits), want(int64_t(rows) * V), want_losses(rows),
               padded(from.size(), 0.0f);
        for (int64_t i = 0; i < int64_t(want.size()); i++) want[i] = from[i / V * ld + i % V];
        cpu::cross_entropy(want.data(), want_losses.data(), words.data(), rows, V, scale);
        for (int64_t i = 0; i < int64_t(want.size()); i++) padded[i / V * ld + i % V] = want[i];
        expect("logits", logits, padded, 1e-7 * scale, ROUNDING + 5e-5);
        expect("losses", losses, want_losses, 5e-5, 0);
    };
    // In bf16, logits up to 2 and their gradients are rounded: 2^-8 each, which moves a gradient
    // by 1 % or less.
    auto check_all = [=, &a] {
        Floats want_x(int64_t(N) * C), want_wte = a.start(dwte), want_losses(N), from = a.start(x),
                                       weights = a.start(wte);
        Floats workspace(int64_t(cpu::CHUNK) * V);
        std::vector<int> want_targets = words;
        cpu::Model c = {};
        c.config.V = V, c.config.C = C;
        c.wide = from.data();
        c.spare = want_x.data();
        c.params[cpu::WTE] = weights.data();
        c.grads[cpu::WTE] = want_wte.data();
        c.logits = workspace.data();
        c.targets = want_targets.data();
        c.losses = want_losses.data();
        cpu::classifier(c, N, true, scale, beta);
        double bound = IS_BF16 ? 0.02 : 2e-5;
        expect("losses", losses, want_losses, bound);
        expect("dx", dx, want_x, bound * scale);
        expect("dwte", dwte, want_wte, bound * scale, 1e-6);
    };

    double E = sizeof(floatX), pass = rows * ld * E, matrix = double(Vp) * C, tokens = N * C * E,
           F = 8.0 * rows * V;
    auto middle = [=](double passes) { return Work{passes * pass, F}; };
    // of a row: what 5 has no registers for
    double beyond = std::max(0.0, 1 - double(OWN * STEP) / ld);
    auto whole = [=](int of) {
        return Work{6.0 * N * ld * E + 3 * tokens + blocks_for(N, of) * matrix * (2 * E + 8),
                    6 * matrix * N + 8.0 * N * V};
    };
    Work floor = {2 * tokens + matrix * (E + 8), 6 * matrix * N};
    int quarter = blocks_for(rows, 4);
    auto chunks = [=](const char* idea, int of) {
        return Variant{idea, whole(of), floor, in_chunks(of), check_all};
    };
    return {
        {"middle: three passes, an element a thread", middle(4), middle(2),
         [=] { softmax1<<<rows, 256>>>(logits, losses, targets, V, ld, scale); }, check},
        {"middle: the trainer's: maximum and sum in one pass, 16 bytes a load", middle(3),
         middle(2),
         [=] { cross_entropy_kernel<<<rows, 1024>>>(logits, losses, targets, V, ld, scale, true); },
         check},
        // Not the trainer's yet, as is 4.
        {"middle: as 2, the row stays in shared memory", middle(2), middle(2),
         [=] { launch_softmax3(logits, losses, targets, rows, V, ld, scale); }, check},
        {"middle: as 2, the row stays in registers", middle(2 + beyond), middle(2),
         [=] { softmax4<<<rows, 1024>>>(logits, losses, targets, V, ld, scale); }, check},
        chunks("all: in chunks of 1024, as where the trainer's buffer is small", CHUNK),
        chunks("all: in chunks of 256", quarter),
        chunks("all: in chunks of 2048", 2 * rows),
        chunks("all: in chunks of 4096", 4 * rows),
        chunks("all: in one chunk", N),
    };
}

// The chunks are named after those of the size that is timed.
int main(int argc, char** argv) {
    return harness(
        {"classifier_chunked",
         {"N", "V", "Vp", "C", "rows"},
         {{1, 40, 40, 8, 1}, {3, 50257, 50257, 8, 3}, {11, 1003, 1024, 40, 2}, {9, 3, 3, 8, 4}},
         {8192, 50257, 50304, 768, CHUNK},
         variants},
        argc, argv);
}
