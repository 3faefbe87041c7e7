// GELU, GPT-2's tanh form: y = x/2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3);
// backward d *= dy/dx, in place. x, y, d (N, n), n = 4C. In the trainer the forward pass makes the
// sparse projection's z (N, r) of y on the way, and the backward pass the bias's gradient, the sums
// of d's columns.
//
// Floor, with E bytes an element: forward 2 N n E (x, y), with the fold N r E more; backward 3 N n
// E (x and d read, d written); backward that makes y again, too, 4 N n E. Arithmetic, 10 N n
// forward and 18 N n backward, is nowhere near a device's rate: memory limits, if the exponential
// is the fast one.
//
// The last four keep 2 bits an element for the backward pass in place of x (Approx-BP, arXiv
// 2406.16282): between which of three cuts x lies. The derivative is then a step function, the sum
// of the steps at the cuts below x: not GELU's own, but that of a sum of three ReLUs which the
// paper fitted to it. Floor: 2 N n E + N n / 4 forward, as much backward.

#include "common.cuh"

// 1: a thread an element, 2 bytes a load in bf16, by the definition.
__global__ void forward1(floatX* y, const floatX* x, size_t count) {
    size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float v = to_float(x[i]), u = GELU_SCALE * (v + 0.044715f * v * v * v);
    store(y + i, 0.5f * v * (1.0f + tanhf(u)));
}

// 2: a pack a thread, 16 bytes a load, and one fast exponential in place of tanhf.
__global__ void forward2(floatX* y, const floatX* x, size_t count) {
    size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (at >= count) return;
    Pack p = load_pack(x + at);
    for (int k = 0; k < PACK; k++) {
        float v = to_float(p.x[k]), u = GELU_SCALE * (v + 0.044715f * v * v * v);
        store(&p.x[k], v / (1.0f + __expf(-2.0f * u)));
    }
    store_pack(y + at, p);
}

// 5: a thread an element, by tanhf: dy/dx = (1 + t)/2 + x/2 (1 - t^2) du/dx.
__global__ void backward5(floatX* d, const floatX* x, size_t count) {
    size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float v = to_float(x[i]), t = tanhf(GELU_SCALE * (v + 0.044715f * v * v * v)),
          du = GELU_SCALE * (1.0f + 0.134145f * v * v);
    store(d + i, to_float(d[i]) * (0.5f * (1.0f + t) + 0.5f * v * (1.0f - t * t) * du));
}

// 8: backward and, from the same exponential, y again: for the levels of recomputation that do not
// keep it. A pack a thread.
__global__ void backward8(floatX* d, floatX* y, const floatX* x, size_t count) {
    size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (at >= count) return;
    Pack pd = load_pack(d + at), px = load_pack(x + at);
    for (int k = 0; k < PACK; k++) {
        float v = to_float(px.x[k]), u = GELU_SCALE * (v + 0.044715f * v * v * v),
              du = GELU_SCALE * (1.0f + 0.134145f * v * v);
        float sigmoid = 1.0f / (1.0f + __expf(-2.0f * u));
        store(&pd.x[k], to_float(pd.x[k]) * (sigmoid + v * sigmoid * (1.0f - sigmoid) * 2.0f * du));
        store(&px.x[k], v * sigmoid);
    }
    store_pack(d + at, pd);
    store_pack(y + at, px);
}

// 10: forward, and the codes: how many of the cuts lie below x, element i in bits 2 (i % 4) of byte
// i / 4. A pack a thread, and one store for the codes of it.
__global__ void forward10(floatX* y, uint8_t* codes, const floatX* x, size_t count) {
    size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (at >= count) return;
    Pack p = load_pack(x + at);
    uint32_t bits = 0;
    for (int k = 0; k < PACK; k++) {
        float v = to_float(p.x[k]), u = GELU_SCALE * (v + 0.044715f * v * v * v);
        bits |= uint32_t((v > GELU_CUTS[0]) + (v > GELU_CUTS[1]) + (v > GELU_CUTS[2])) << 2 * k;
        store(&p.x[k], v / (1.0f + __expf(-2.0f * u)));
    }
    store_pack(y + at, p);
    if (PACK == 8)
        *reinterpret_cast<uint16_t*>(codes + at / 4) = uint16_t(bits);
    else
        codes[at / 4] = uint8_t(bits);
}

// 12: backward from the codes, a pack a thread, and one load for the codes of it.
__global__ void backward12(floatX* d, const uint8_t* codes, size_t count) {
    size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (at >= count) return;
    Pack p = load_pack(d + at);
    uint32_t bits = PACK == 8 ? *reinterpret_cast<const uint16_t*>(codes + at / 4) : codes[at / 4];
    for (int k = 0; k < PACK; k++) {
        store(&p.x[k], to_float(p.x[k]) * GELU_SLOPES[bits >> 2 * k & 3]);
    }
    store_pack(d + at, p);
}

static std::vector<Variant> variants(Arrays& a, const Size& size) {
    int N = size[0], n = size[1], r = n / 4;
    size_t count = size_t(N) * n;
    floatX *x = a.normals(count, 2), *d = a.normals(count), *y = a.room<floatX>(count),
           *z = a.room<floatX>(int64_t(N) * r);
    float *db = a.normals_fp32(n), *partial = a.room<float>(int64_t(SLABS) * n);
    uint8_t* codes = a.room<uint8_t>(count / 4);
    std::vector<uint8_t> any(a.dry ? 0 : count / 4);
    for (size_t i = 0; i < any.size(); i++) any[i] = uint8_t(philox(1, a.drawn, i).x);
    const uint8_t* kept = a.put(any);
    SparseProjection projection(a, n, r);
    Fold fold = projection.fold(z);
    int scalars = blocks_for(count, 256), packs = blocks_for(count, 256 * PACK);

    // Before the one rounding: an exponential of |2u| up to 60 or so, relative to which fp32 errs
    // by 60 2^-24, and 1 - t^2.
    auto check_y = [=, &a] {
        Floats want(count);
        cpu::gelu_forward(want.data(), a.start(x).data(), count);
        expect("y", y, want, 1e-5);
    };
    auto check_z = [=] {  // z of the y that is there: the same terms in the same order
        check_y();
        expect("z", z, projection.project(fetch(y, count)), 1e-5);
    };
    auto check_d = [=, &a] {
        Floats want = a.start(d);
        cpu::gelu_backward(want.data(), a.start(x).data(), count);
        expect("d", d, want, 1e-5);
    };
    // db of the d that is there: its sums of at most 13 terms of size 1 in another order, 13
    // 2^-24 of 10 or so.
    auto check_db = [=, &a] {
        Floats want = a.start(db), terms = fetch(d, count);
        for (size_t i = 0; i < count; i++) want[i % n] += terms[i];
        expect("db", db, want, 1e-5, 0);
    };
    auto check_d_and_db = [=] { check_d(), check_db(); };
    auto check_both = [=] { check_y(), check_d(); };
    auto check_codes = [=, &a] {
        check_y();
        std::vector<uint8_t> want(count / 4);
        cpu::gelu_bits(want.data(), a.start(x).data(), count);
        expect("codes", codes, Floats(want.begin(), want.end()), 0, 0);
    };
    // One product of the same two numbers, and its rounding.
    auto check_steps = [=, &a] {
        Floats want = a.start(d), from = a.start(kept);
        cpu::gelu_backward_2bit(want.data(), std::vector<uint8_t>(from.begin(), from.end()).data(),
                                count);
        expect("d", d, want, 0);
    };
    auto check_steps_and_db = [=] { check_steps(), check_db(); };
    auto trainers_forward = [=](Fold f) { gelu_forward(y, nullptr, x, f, N, n); };
    auto trainers_backward = [=](const uint8_t* bits) {
        gelu_backward(d, db, partial, x, bits, N, n);
    };

    double E = sizeof(floatX), all = count * E, F = 10.0 * count, B = 18.0 * count;
    double sums = 8.0 * SLABS * n;
    Work forward = {2 * all, F}, with_z = {2 * all + double(N) * r * E, F + 2 * count};
    Work backward = {3 * all, B}, both = {4 * all, B + count}, twice = {5 * all + sums, F + B};
    Work coded = {2 * all + count / 4.0, F + 3 * count},
         stepped = {2 * all + count / 4.0, 1.0 * count};
    return {
        {"forward: a thread an element, tanhf", forward, forward,
         [=] { forward1<<<scalars, 256>>>(y, x, count); }, check_y},
        {"forward: 16 bytes a load, x sigmoid(2u)", forward, forward,
         [=] { forward2<<<packs, 256>>>(y, x, count); }, check_y},
        {"forward: the trainer's, a block a row", forward, forward,
         [=] { trainers_forward(Fold{}); }, check_y},
        {"forward with the fold: the trainer's", with_z, with_z, [=] { trainers_forward(fold); },
         check_z},
        {"backward: a thread an element, tanhf", backward, backward,
         [=] { backward5<<<scalars, 256>>>(d, x, count); }, check_d},
        {"backward: the trainer's, 16 bytes a load, with the sums of d",
         {backward.bytes + sums, backward.flops},
         backward,
         [=] { trainers_backward(nullptr); },
         check_d_and_db},
        {"y again, then backward: the trainer's two", twice, both,
         [=] {
             trainers_forward(Fold{});
             trainers_backward(nullptr);
         },
         check_both},
        // Not the trainer's yet: a fifth less traffic than 7 where y and x stand side by side.
        {"backward that makes y on the way", both, both,
         [=] { backward8<<<packs, 256>>>(d, y, x, count); }, check_both},
        {"forward that keeps 2 bits an element: the trainer's", coded, coded,
         [=] { gelu_forward(y, codes, x, Fold{}, N, n); }, check_codes},
        {"the same, a pack a thread", coded, coded,
         [=] { forward10<<<packs, 256>>>(y, codes, x, count); }, check_codes},
        {"backward from 2 bits an element: the trainer's, with the sums of d",
         {stepped.bytes + sums, stepped.flops},
         stepped,
         [=] { trainers_backward(kept); },
         check_steps_and_db},
        {"without the sums, one load for a pack's codes", stepped, stepped,
         [=] { backward12<<<packs, 256>>>(d, kept, count); }, check_steps},
    };
}

int main(int argc, char** argv) {
    return harness(
        {"gelu", {"N", "n"}, {{1, 3072}, {13, 3072}, {7, 6400}, {5, 40}}, {16384, 3072}, variants},
        argc, argv);
}
