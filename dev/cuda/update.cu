// The optimizer's step of a compressed linear layer: moments M and V move on by the gradient G, all
// (m, r) in fp32, and give Adam's direction U; the weight W (m, n) becomes (1 - lr wd) W - lr alpha
// U P^T, P (n, r). With master weights W is their fp32 copy, and the bf16 weight its rounding;
// without, bf16 alone, rounded at random. In fp32 both are one array.
//
// Floor: G, M and V read, M and V written, 20 m r bytes; for each weight 10 bytes in bf16 with
// master weights (fp32 read and written, bf16 written), 4 without; in fp32 8. Arithmetic: 2 m n r
// operations with a dense P, at r = 192 an eighth of these bytes' time on tensor cores, twice it
// without; 2 m n with the sparse one. P is drawn once. Beyond this the trainer's dense way reads
// the master weights twice, since cuBLAS ends at its sum; without them U P^T goes through memory in
// fp32, 8 bytes a weight. A product of our own that moves the weights where its sums are would save
// that: by dev/roofline.py 0.3 % of d12's step at 65,536 tokens at most. U and P are small: where
// blocks read them again they are counted once, for any L2 holds them, as they are for cuBLAS.

#include "common.cuh"

// 1: a thread four weights; it reads a row of U, which its neighbours read too, and four of P.
__global__ void lift1(Weights to, const floatX* u, const floatX* p, int m, int n, int r, float keep,
                      float step) {
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * QUAD;
    if (i >= size_t(m) * n) return;
    const floatX *row = u + i / n * r, *column = p + i % n * r;
    float sum[QUAD] = {};
    for (int j = 0; j < r; j++) {
        for (int e = 0; e < QUAD; e++)
            sum[e] += to_float(row[j]) * to_float(column[size_t(e) * r + j]);
    }
    move_weights(to, i, {sum[0], sum[1], sum[2], sum[3]}, keep, step);
}

// 4: the sparse P^T by a thread for four weights: each takes its sign times an element of its row
// of U.
__global__ void gather4(Weights to, const floatX* u, const float* sign, const int* shift, int m,
                        int n, int r, float keep, float step) {
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * QUAD;
    if (i >= size_t(m) * n) return;
    float lifted[QUAD];
    for (int e = 0; e < QUAD; e++) {
        int k = int(i % n) + e, stripe = k / r, column = (k - stripe * r + shift[stripe]) % r;
        lifted[e] = sign[k] * to_float(u[i / n * r + column]);
    }
    move_weights(to, i, {lifted[0], lifted[1], lifted[2], lifted[3]}, keep, step);
}

static std::vector<Variant> variants(Arrays& a, const Size& size) {
    int m = size[0], n = size[1], r = size[2];
    size_t small = size_t(m) * r, whole = size_t(m) * n;
    floatX *w = a.normals(whole), *u = a.room<floatX>(small), *p = a.room<floatX>(int64_t(n) * r);
    float *master = IS_BF16 ? a.normals_fp32(whole) : (float*)w, *lifted = a.room<float>(whole),
          *sign = a.room<float>(n);
    float *g = a.normals_fp32(small), *mean = a.normals_fp32(small),
          *norm = a.put(Floats{2.0f, 0.5f});
    int* shift = a.room<int>((n + r - 1) / r);
    Floats positive = a.draw(small, 0.3, 0);
    for (float& x : positive) x = fabsf(x) + 0.5f;  // so that U is of size 1
    float* v = a.put(positive);

    // The trainer, with one such layer in it. Steps are large, so that a weight that was not moved
    // shows even in bf16.
    auto model = [=](int projection, int masters) {
        auto s = std::make_shared<Model>();
        s->config.L = 1;
        s->options.projection = projection, s->options.master = masters, s->options.alpha = 0.5;
        s->linear[QKV] = {m, n, r};
        s->params[QKVW] = w,
        s->master[QKVW] = masters == MASTER_FP32 || !IS_BF16 ? master : nullptr;
        s->grads[QKVW] = g, s->m[QKVW] = mean, s->v[QKVW] = v;
        s->u = u, s->p = p, s->lifted = lifted, s->sign = sign, s->shift = shift;
        return s;
    };
    const cpu::Adam adam = {0.1f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.5f, 5.0f, 10.0f};
    const Adam on_device = {0.1f, 0.9f, 0.95f, 1e-8f, 0.1f, norm, 5.0f, 10.0f};
    const float keep = 1.0f - adam.lr * adam.decay, step = adam.lr * 0.5f;
    const int time = 7;  // the optimizer's step
    auto with = model(GAUSSIAN, MASTER_FP32), without = model(GAUSSIAN, MASTER_NONE);
    auto sparse = model(SPARSE, MASTER_FP32), sparse_without = model(SPARSE, MASTER_NONE);
    uint64_t seed = with->options.seed, stream = stream_of(QKV, 0, 0);
    Weights to = weights_at(*with, QKVW, 0, time);

    // One rounding in fp32, or a few where the sum is smaller than its terms.
    const double fp32 = 4.0 / (1 << 24), few = 1e-6;
    // Weights moved by step times `direction` (m, r) lifted with P (n, r), or signs and shifts:
    // sums of r terms, of size 1.
    auto check_weights = [=, &a](const Floats& direction, const Floats& projection,
                                 const std::vector<int>& shifts, bool masters) {
        Floats want = masters ? a.start(master) : a.start(w);
        cpu::lift(want.data(), direction.data(), projection.data(), shifts.data(), {m, n, r},
                  shifts.empty() ? GAUSSIAN : SPARSE, keep, step);
        if (masters) {
            expect("master", master, want, few, fp32);
            return expect("w", w, want, few);
        }
        // At random up or down: never as far as the next but one, and to where the CPU's
        // random number says, but for one in 2^16 for each last place that the sum before is
        // off: 1 % is enough.
        expect("w", w, want, few, 1.0 / (1 << 7));
        Floats got = fetch(w, whole);
        cpu::round_stochastically(want.data(), whole, seed, stream_of(STREAM_ROUND, QKVW, time));
        size_t others = 0;
        for (size_t i = 0; i < whole; i++) others += got[i] != want[i];
        double ratio = others / (0.01 * whole + 1);
        if (ratio > worst.ratio)
            worst = {ratio, text("%zu of %zu w not where the random number says", others, whole)};
    };
    auto check_moments = [=, &a] {  // and U
        Floats direction = a.start(g), means = a.start(mean), squares = a.start(v);
        for (size_t i = 0; i < small; i++)
            direction[i] = cpu::adam_direction(adam, direction[i], &means[i], &squares[i]);
        expect("m", mean, means, few, fp32);
        expect("v", v, squares, few, fp32);
        return direction;
    };
    // Dense: U and P as the device has them, so that an element that is rounded to the other
    // neighbour here makes no difference.
    auto check_dense = [=](bool masters) {
        expect("u", u, check_moments(), 1e-5);
        Arrays own(false);
        floatX* drawn = own.room<floatX>(int64_t(n) * r);
        draw_projection(drawn, nullptr, nullptr, {m, n, r}, GAUSSIAN, seed, stream);
        check_weights(fetch(u, small), fetch(drawn, int64_t(n) * r), {}, masters);
    };
    auto check_with = [=] { check_dense(true); };
    auto check_alone = [=] { check_dense(false); };
    auto check_sparse = [=](bool masters, bool rounded) {
        Floats direction = check_moments(), signs(n);
        std::vector<int> shifts((n + r - 1) / r);
        cpu::draw_projection(signs.data(), shifts.data(), {m, n, r}, SPARSE, seed, stream);
        if (rounded) expect("u", u, direction, 1e-5), direction = fetch(u, small);
        check_weights(direction, signs, shifts, masters);
    };

    auto directions = [=] {
        direction_kernel<<<blocks_for(small, 256 * QUAD), 256>>>(u, g, mean, v, small, on_device);
    };
    auto drawn = [=](int projection) {
        draw_projection(p, sign, shift, {m, n, r}, projection, seed, stream);
    };
    const double E = sizeof(floatX), moments = 20.0 * small, U = E * small, P = E * n * r,
                 W = double(whole);
    const double moved = (IS_BF16 ? 10 : 8) * W, alone = 2 * E * W, product = 2 * W * r,
                 drawing = 31.0 * n * r;
    // through: a product's way by fp32, written and read
    const double adams = 12.0 * small + 3 * W, through = 8 * W;
    Work floor = {moments + moved, adams + product + drawing},
         floor_alone = {moments + alone, floor.flops};
    Work sparse_floor = {moments + moved, adams + W}, sparse_alone = {moments + alone, adams + W};
    return {
        {"dense: a thread four weights",
         {floor.bytes + 2 * U + 2 * P, floor.flops},
         floor,
         [=] {
             directions();
             drawn(GAUSSIAN);
             lift1<<<blocks_for(whole, 256 * QUAD), 256>>>(to, u, p, m, n, r, keep, step);
         },
         check_with},
        {"dense: the trainer's, cuBLAS into the master weights, then the rounding",
         {moments + 2 * U + 2 * P + (IS_BF16 ? 14 : 8) * W, floor.flops},
         floor,
         [=] { update_linear(*with, QKV, 0, on_device, time, nullptr); },
         check_with},
        {"dense, no master weights: the trainer's, cuBLAS, then the move",
         {floor_alone.bytes + 2 * U + 2 * P + through, floor.flops},
         floor_alone,
         [=] { update_linear(*without, QKV, 0, on_device, time, nullptr); },
         check_alone},
        {"sparse: U to memory, then gathered",
         {sparse_floor.bytes + 2 * U, sparse_floor.flops},
         sparse_floor,
         [=] {
             directions();
             drawn(SPARSE);
             gather4<<<blocks_for(whole, 256 * QUAD), 256>>>(to, u, sign, shift, m, n, r, keep,
                                                             step);
         },
         [=] { check_sparse(true, true); }},
        {"sparse: the trainer's, U in shared memory", sparse_floor, sparse_floor,
         [=] { update_linear(*sparse, QKV, 0, on_device, time, nullptr); },
         [=] { check_sparse(true, false); }},
        {"sparse, no master weights: the trainer's", sparse_alone, sparse_alone,
         [=] { update_linear(*sparse_without, QKV, 0, on_device, time, nullptr); },
         [=] { check_sparse(false, false); }},
    };
}

int main(int argc, char** argv) {
    return harness(
        {"update",
         {"m", "n", "r"},
         {{8, 768, 192}, {24, 1600, 333}, {72, 136, 100}, {16, 40, 7}, {8, 8, 1}, {136, 64, 8}},
         {3072, 768, 192},
         variants},
        argc, argv);
}
