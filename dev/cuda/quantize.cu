// int8 with a scale for each group of neighbours, as the tape may keep what the backward pass
// needs: codes (groups, width), scales (groups); x = scale * code, where the group's largest |x|
// has code 127 or -127. x (N, C) in groups of hs, as qkv and attention's output have them, a group
// a head; the residual stream's groups are its rows.
//
// Floor, with E bytes an element: x read, codes and scales written, N C (E + 1 + E / hs) bytes;
// back again the same. H200's memory gives a multiprocessor 19 bytes a clock, 6 elements, for which
// it can issue 128 threads' instructions: about 20 an element. So it is arithmetic that this layer
// has to save, not bytes: a second read of x finds it in the cache. For a head of 64, 2 takes 23 of
// those and 4 takes 11 (counted in sm_90's machine code); a warp a group, with a division and a
// conversion for each element, took 89 and 40.

#include "common.cuh"

// 1: a thread a group, an element at a time: neighbours in a warp read addresses `width`
// elements apart.
__global__ void quantize1(int8_t* codes, floatX* scales, const floatX* x, int64_t groups,
                          int width) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= groups) return;
    float most = 0;
    for (int j = 0; j < width; j++) most = fmaxf(most, fabsf(to_float(x[i * width + j])));
    store(scales + i, most / 127);
    float scale = to_float(scales[i]);
    for (int j = 0; j < width; j++) {
        float code = scale < LEAST_SCALE ? 0 : rintf(to_float(x[i * width + j]) * (1 / scale));
        codes[i * width + j] = int8_t(code);
    }
}

// 3: back again, an element a thread; its group by a division of 64 bits, some 70 instructions.
__global__ void dequantize3(floatX* x, const int8_t* codes, const floatX* scales, int64_t groups,
                            int width) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < groups * width) store(x + i, to_float(scales[i / width]) * codes[i]);
}

// 6: LayerNorm's own kernel, with residual sum, that leaves the sum's codes as well, a scale a
// row: the row is in its hands. One warp a row, 4 rows a block; dynamic shared memory: 4 C floats.
__global__ void __launch_bounds__(128)
    layernorm6(floatX* y, floatX* sum, float* mean, float* rstd, int8_t* codes, floatX* scales,
               const floatX* x, const floatX* delta, const floatX* bias, const floatX* w,
               const floatX* b, int N, int C) {
    extern __shared__ float rows[];
    int lane = threadIdx.x % WARP, i = blockIdx.x * 4 + threadIdx.x / WARP;
    if (i >= N) return;
    float *row = rows + threadIdx.x / WARP * C, m = 0, s = 0, most = 0;
    size_t at = size_t(i) * C;
    for (int j = lane * PACK; j < C; j += WARP * PACK) {
        Pack p = load_pack(x + at + j), d = load_pack(delta + at + j), e = load_pack(bias + j);
        for (int k = 0; k < PACK; k++) {
            store(&p.x[k], to_float(p.x[k]) + to_float(d.x[k]) + to_float(e.x[k]));
            m += row[j + k] = to_float(p.x[k]);
            most = fmaxf(most, fabsf(row[j + k]));
        }
        store_pack(sum + at + j, p);
    }
    m = warp_sum(m) / C;
    floatX rounded;
    store(&rounded, warp_max(most) / 127);
    float scale = to_float(rounded), inverse = scale < LEAST_SCALE ? 0 : 1 / scale;
    for (int j = lane * PACK; j < C; j += WARP * PACK) {
        Codes c;
        for (int k = 0; k < PACK; k++) {
            s += (row[j + k] - m) * (row[j + k] - m);
            c.x[k] = int8_t(__float_as_int(__fmul_rn(row[j + k], inverse) + 12582912.0f));
        }
        *reinterpret_cast<Codes*>(codes + at + j) = c;
    }
    s = rsqrtf(warp_sum(s) / C + LAYERNORM_EPS);
    for (int j = lane * PACK; j < C; j += WARP * PACK) {
        Pack p, pw = load_pack(w + j), pb = load_pack(b + j);
        for (int k = 0; k < PACK; k++)
            store(&p.x[k], (row[j + k] - m) * s * to_float(pw.x[k]) + to_float(pb.x[k]));
        store_pack(y + at + j, p);
    }
    if (lane == 0) mean[i] = m, rstd[i] = s, scales[i] = rounded;
}

// A model of one layer whose tape keeps one row as int8: attention's output, a scale a head, or the
// residual, a scale a token.
static Model tape_of(int row, int C, int hs, int8_t* codes, floatX* scales) {
    Model s = {};
    s.config.C = C, s.config.NH = C / hs, s.slots = 1;
    s.kept[row] = AS_INT8, s.codes[row] = codes, s.scales[row] = scales;
    return s;
}

static std::vector<Variant> variants(Arrays& a, const Size& size) {
    int N = size[0], C = size[1], hs = size[2];
    int64_t count = int64_t(N) * C, groups = count / hs;
    Floats numbers = a.draw(count, 2, 0);
    // one group of zeros, and one near to it: its scale has no inverse
    for (int j = 0; j < hs && !a.dry && groups > 2; j++) {
        numbers[j] = 0;
        numbers[count - hs + j] *= 1e-37f;
    }
    floatX *x = a.put(std::vector<floatX>(numbers.begin(), numbers.end())),
           *scales = a.room<floatX>(groups);
    int8_t* codes = a.room<int8_t>(count);
    // For the way back.
    std::vector<int8_t> any(a.dry ? 0 : count);
    for (size_t i = 0; i < any.size(); i++) any[i] = int8_t(philox(1, a.drawn, i).x % 255 - 127);
    int8_t* kept = a.put(any);
    floatX *kept_scales = a.normals(groups, 0.1), *back = a.room<floatX>(count);
    // For LayerNorm.
    floatX *delta = a.normals(count), *bias = a.normals(C), *w = a.normals(C, 0.5, 1),
           *b = a.normals(C);
    floatX *sum = a.room<floatX>(count), *y = a.room<floatX>(count);
    float *mean = a.room<float>(N), *rstd = a.room<float>(N);

    // Scales are rounded once. Codes are the CPU's, of the scale as it is kept: in fp32 that is the
    // CPU's own scale.
    auto check_codes = [=](const Floats& from, int64_t groups, int width) {
        Floats want_scales(groups), scale = fetch(scales, groups);
        std::vector<int8_t> want(from.size());
        cpu::quantize(want.data(), want_scales.data(), from.data(), groups, width);
        for (size_t i = 0; i < from.size() && IS_BF16; i++) {
            float s = scale[i / width];
            want[i] = s < LEAST_SCALE ? 0 : int8_t(rintf(from[i] * (1 / s)));
        }
        expect("scales", scales, want_scales, 5e-41);  // half of the least number of bf16
        expect("codes", codes, Floats(want.begin(), want.end()), 0, 0);
    };
    auto check = [=, &a] { check_codes(a.start(x), groups, hs); };
    // One product of the same two numbers, and its rounding.
    auto check_back = [=, &a] {
        Floats want(count);
        cpu::dequantize(want.data(), any.data(), a.start(kept_scales).data(), groups, hs);
        expect("x", back, want, 0);
    };
    // The sum is the same three numbers added in the same order, so its bits are the same; the rest
    // is that of the rounded sum.
    auto check_layernorm = [=, &a] {
        Floats from = a.start(x), deltas = a.start(delta), biases = a.start(bias), want(count),
               means(N), rstds(N);
        for (int64_t i = 0; i < count; i++)
            from[i] = float(floatX(from[i] + deltas[i] + biases[i % C]));
        expect("sum", sum, from, 0, 0);
        check_codes(from, N, C);
        cpu::layernorm_forward(want.data(), means.data(), rstds.data(), from.data(),
                               a.start(w).data(), a.start(b).data(), N, C);
        expect("y", y, want, 1e-5);
        expect("mean", mean, means, 1e-5, 0);
        expect("rstd", rstd, rstds, 0, 1e-5);
    };

    double E = sizeof(floatX), all = count * E;
    Work once = {all + count + groups * E, 6.0 * count}, twice = {once.bytes + all, once.flops},
         product = {once.bytes, 1.0 * count};
    Work fused = {4 * all + count + N * (E + 8), 16.0 * count},
         apart = {fused.bytes + 2 * all, fused.flops};
    return {
        {"a thread a group", twice, once,
         [=] { quantize1<<<blocks_for(groups, 128), 128>>>(codes, scales, x, groups, hs); }, check},
        {"the trainer's: 8 lanes a group, 16 bytes a load, one division a group, no conversion",
         twice, once,
         [=] {
             Model s = tape_of(ATTY, C, hs, codes, scales);
             tape_store(s, ATTY, 0, x, N);
         },
         check},
        {"back: a thread an element", product, product,
         [=] { dequantize3<<<blocks_for(count, 256), 256>>>(back, kept, kept_scales, groups, hs); },
         check_back},
        {"back: the trainer's: 8 lanes a group, 16 bytes a store", product, product,
         [=] {
             Model s = tape_of(ATTY, C, hs, kept, kept_scales);
             tape_load(s, ATTY, 0, back, N);
         },
         check_back},
        {"residual sum and LayerNorm, then the sum's rows to int8: the trainer's two", apart, fused,
         [=] {
             Model s = tape_of(RESIDUAL, C, hs, codes, scales);
             s.params[LNFW] = w, s.params[LNFB] = b;
             layernorm_forward(s, y, sum, mean, rstd, x, delta, bias, LNFW, 0, Fold{}, N);
             tape_store(s, RESIDUAL, 0, sum, N);
         },
         check_layernorm},
        // Not the trainer's: LayerNorm would do a third thing, for a flag.
        {"the same, fused", fused, fused,
         [=] {
             layernorm6<<<blocks_for(N, 4), 128, 4 * C * sizeof(float)>>>(
                 y, sum, mean, rstd, codes, scales, x, delta, bias, w, b, N, C);
         },
         check_layernorm},
    };
}

int main(int argc, char** argv) {
    return harness({"quantize",
                    {"N", "C", "hs"},
                    {{1, 768, 64},
                     {3, 1600, 64},
                     {5, 40, 8},
                     {7, 48, 24},
                     {3, 768, 768},
                     {3, 1600, 1600},
                     {1, 8, 8}},
                    {16384, 1600, 64},
                    variants},
                   argc, argv);
}
