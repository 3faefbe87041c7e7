// int8 with a scale for each group of neighbours, as the tape may keep what the backward pass
// needs: codes (groups, width), scales (groups); x = scale * code, where the group's largest |x|
// has code 127 or -127. x (N, C) in groups of hs, as qkv and attention's output have them, a group
// a head; the residual stream's groups are its rows.
//
// Floor, with E bytes an element: x read, codes and scales written, N C (E + 1 + E / hs) bytes;
// back again the same. H200's memory gives a multiprocessor 19 bytes a clock, 6 elements, for which
// it can issue 128 threads' instructions: about 20 an element. For a head of 64, 2 takes 89 of
// those, 4 takes 23 and 5 takes 20; back again 7 takes 40 and 8 takes 10 (counted in sm_90's
// machine code). So it is arithmetic that this layer has to save, not bytes: a second read of x
// finds it in the cache.

#include "common.cuh"

// The code of x as the CPU computes it.
__device__ inline int8_t plain_code(float x, float scale) {
    float code = scale > 0 ? rintf(x / scale) : 0.0f;
    return int8_t(fmaxf(-127.0f, fminf(127.0f, code)));
}

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
    for (int j = 0; j < width; j++)
        codes[i * width + j] = plain_code(to_float(x[i * width + j]), scale);
}

// The codes of a pack: one store or load.
struct alignas(PACK) Codes {
    uint32_t x[PACK / 4];
};

// From 3 on: block (lanes, 128 / lanes). Lanes of one warp share a group, no more of them
// than it has elements to read at once, so that a head of 64 takes 8 lanes of a warp and not
// all of them twice.
static dim3 lanes_for(int width) {
    int lanes = 1, each = width % PACK == 0 ? PACK : 1;
    while (lanes < WARP && lanes * each < width) lanes *= 2;
    return dim3(lanes, 128 / lanes);
}

// The largest over the lanes that share a group.
__device__ inline float group_max(float most) {
    for (int offset = blockDim.x / 2; offset > 0; offset /= 2)
        most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, offset));
    return most;
}

// 3: 16 bytes a load, 8 lanes a head of 64; the arithmetic stays. Here and below a group past the
// last is one without elements, since its lanes are wanted in the warp's shuffles.
__global__ void __launch_bounds__(128)
    quantize3(int8_t* codes, floatX* scales, const floatX* x, int64_t groups, int width) {
    int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    int lane = threadIdx.x, end = i < groups ? width : 0, step = blockDim.x * PACK;
    x += i * width, codes += i * width;
    float most = 0;
    for (int j = lane * PACK; j < end; j += step) {
        Pack p = load_pack(x + j);
        for (int k = 0; k < PACK; k++) most = fmaxf(most, fabsf(to_float(p.x[k])));
    }
    floatX rounded;
    store(&rounded, group_max(most) / 127);
    if (lane == 0 && end > 0) scales[i] = rounded;
    for (int j = lane * PACK; j < end; j += step) {
        Pack p = load_pack(x + j);
        Codes c = {};
        for (int k = 0; k < PACK; k++)
            c.x[k / 4] |= uint32_t(uint8_t(plain_code(to_float(p.x[k]), to_float(rounded))))
                          << k % 4 * 8;
        *reinterpret_cast<Codes*>(codes + j) = c;
    }
}

// The same code, of a scale that is not near 0, as a byte. x / scale is the product with inverse =
// 1 / scale, corrected once by what it leaves of x, as the device itself divides (Markstein, IBM J.
// Res. Dev. 34, 1990). To its sum with 1.5 * 2^23 only whole numbers are near, and that one's
// lowest byte is theirs. It needs no limit: at a scale that bf16 has made smaller the largest |x|
// stays below 127.5.
const float NEAR_0 = 1e-30f;

__device__ inline uint32_t fast_code(float x, float scale, float inverse) {
    float code = x * inverse;
    code = fmaf(fmaf(-code, scale, x), inverse, code);
    return __float_as_uint(code + 12582912.0f) & 0xFF;
}

// 4: one division a group, and no conversion: those, and reciprocals, go through a unit of 16 lanes
// a clock, which 3 asks three times for each element. What packs do not take, odd widths and scales
// near 0, goes element by element.
__global__ void __launch_bounds__(128)
    quantize4(int8_t* codes, floatX* scales, const floatX* x, int64_t groups, int width) {
    int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    int lane = threadIdx.x, lanes = blockDim.x, end = i < groups ? width : 0,
        packed = width % PACK == 0 ? end : 0;
    x += i * width, codes += i * width;
    float most = 0;
    for (int j = lane * PACK; j < packed; j += lanes * PACK) {
        Pack p = load_pack(x + j);
        for (int k = 0; k < PACK; k++) most = fmaxf(most, fabsf(to_float(p.x[k])));
    }
    for (int j = packed + lane; j < end; j += lanes) most = fmaxf(most, fabsf(to_float(x[j])));
    floatX rounded;
    store(&rounded, group_max(most) / 127);
    if (lane == 0 && end > 0) scales[i] = rounded;
    float scale = to_float(rounded), inverse = 1.0f / scale;
    if (scale < NEAR_0) packed = 0;
    for (int j = lane * PACK; j < packed; j += lanes * PACK) {
        Pack p = load_pack(x + j);
        Codes c = {};
        for (int k = 0; k < PACK; k++)
            c.x[k / 4] |= fast_code(to_float(p.x[k]), scale, inverse) << k % 4 * 8;
        *reinterpret_cast<Codes*>(codes + j) = c;
    }
    for (int j = packed + lane; j < end; j += lanes) codes[j] = plain_code(to_float(x[j]), scale);
}

// 5: as 4, with x in registers from the one pass to the other: a pack a lane, so groups of 32
// packs at most.
__global__ void __launch_bounds__(128)
    quantize5(int8_t* codes, floatX* scales, const floatX* x, int64_t groups, int width) {
    int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, at = i * width + threadIdx.x * PACK;
    bool inside = i < groups && int(threadIdx.x) * PACK < width;
    int4 bits = {};
    if (inside) bits = *reinterpret_cast<const int4*>(x + at);
    Pack p;
    memcpy(&p, &bits, 16);
    float most = 0;
    for (int k = 0; k < PACK; k++) most = fmaxf(most, fabsf(to_float(p.x[k])));
    floatX rounded;
    store(&rounded, group_max(most) / 127);
    if (!inside) return;
    if (threadIdx.x == 0) scales[i] = rounded;
    float scale = to_float(rounded), inverse = 1.0f / scale;
    Codes c = {};
    for (int k = 0; k < PACK && scale >= NEAR_0; k++)
        c.x[k / 4] |= fast_code(to_float(p.x[k]), scale, inverse) << k % 4 * 8;
    *reinterpret_cast<Codes*>(codes + at) = c;
    for (int k = 0; k < PACK && scale < NEAR_0; k++)
        codes[at + k] = plain_code(to_float(p.x[k]), scale);
}

// 6: back again, an element a thread; its group by a division of 64 bits, some 70 instructions.
__global__ void dequantize6(floatX* x, const int8_t* codes, const floatX* scales, int64_t groups,
                            int width) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < groups * width) store(x + i, to_float(scales[i / width]) * codes[i]);
}

// 8: 8 codes a load, 16 bytes a store; lanes as in 3, so that nothing is divided. Takes any width.
__global__ void __launch_bounds__(128)
    dequantize8(floatX* x, const int8_t* codes, const floatX* scales, int64_t groups, int width) {
    int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (i >= groups) return;
    int lane = threadIdx.x, lanes = blockDim.x, packed = width % PACK == 0 ? width : 0;
    x += i * width, codes += i * width;
    float scale = to_float(scales[i]);
    for (int j = lane * PACK; j < packed; j += lanes * PACK) {
        Codes c = *reinterpret_cast<const Codes*>(codes + j);
        Pack p;
        for (int k = 0; k < PACK; k++) store(&p.x[k], scale * int8_t(c.x[k / 4] >> k % 4 * 8));
        store_pack(x + j, p);
    }
    for (int j = packed + lane; j < width; j += lanes) store(x + j, scale * codes[j]);
}

// 10: LayerNorm's own kernel, with residual sum, that leaves the sum's codes as well, a scale a
// row: the row is in its hands. One warp a row, 4 rows a block; dynamic shared memory: 4 C floats.
__global__ void __launch_bounds__(128)
    layernorm10(floatX* y, floatX* sum, float* mean, float* rstd, int8_t* codes, floatX* scales,
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
    float scale = to_float(rounded), inverse = 1.0f / scale;
    for (int j = lane * PACK; j < C; j += WARP * PACK) {
        Codes c = {};
        for (int k = 0; k < PACK; k++) {
            s += (row[j + k] - m) * (row[j + k] - m);
            c.x[k / 4] |= fast_code(row[j + k], scale, inverse) << k % 4 * 8;
        }
        *reinterpret_cast<Codes*>(codes + at + j) = c;
        for (int k = 0; k < PACK && scale < NEAR_0; k++)
            codes[at + j + k] = plain_code(row[j + k], scale);
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
    dim3 block = lanes_for(hs);
    int blocks = blocks_for(groups, block.y);
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
            float s = scale[i / width], code = s > 0 ? rintf(from[i] / s) : 0.0f;
            want[i] = int8_t(std::max(-127.0f, std::min(127.0f, code)));
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
    std::function<void()> none;  // for widths that it does not take
    bool packs = hs % PACK == 0;
    return {
        {"a thread a group", twice, once,
         [=] { quantize1<<<blocks_for(groups, 128), 128>>>(codes, scales, x, groups, hs); }, check},
        {"a warp a group: the trainer's", twice, once,
         [=] {
             Model s = tape_of(ATTY, C, hs, codes, scales);
             tape_store(s, ATTY, 0, x, N);
         },
         check},
        {"16 bytes a load, lanes as a group needs them", twice, once,
         packs ? [=] { quantize3<<<blocks, block>>>(codes, scales, x, groups, hs); } : none, check},
        // Not the trainer's yet, as are 5, 8 and 10.
        {"as 3, one division a group and no conversion; any width", twice, once,
         [=] { quantize4<<<blocks, block>>>(codes, scales, x, groups, hs); }, check},
        {"as 4, x stays in registers", once, once,
         packs && hs <= WARP * PACK
             ? [=] { quantize5<<<blocks, block>>>(codes, scales, x, groups, hs); }
             : none,
         check},
        {"back: a thread an element", product, product,
         [=] { dequantize6<<<blocks_for(count, 256), 256>>>(back, kept, kept_scales, groups, hs); },
         check_back},
        {"back: a warp a group: the trainer's", product, product,
         [=] {
             Model s = tape_of(ATTY, C, hs, kept, kept_scales);
             tape_load(s, ATTY, 0, back, N);
         },
         check_back},
        {"back: 16 bytes a store, lanes as in 3; any width", product, product,
         [=] { dequantize8<<<blocks, block>>>(back, kept, kept_scales, groups, hs); }, check_back},
        {"residual sum and LayerNorm, then the sum's rows to int8: the trainer's two", apart, fused,
         [=] {
             Model s = tape_of(RESIDUAL, C, hs, codes, scales);
             s.params[LNFW] = w, s.params[LNFB] = b;
             layernorm_forward(s, y, sum, mean, rstd, x, delta, bias, LNFW, 0, Fold{}, N);
             tape_store(s, RESIDUAL, 0, sum, N);
         },
         check_layernorm},
        {"the same, fused", fused, fused,
         [=] {
             layernorm10<<<blocks_for(N, 4), 128, 4 * C * sizeof(float)>>>(
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
                     {3, 200, 25},
                     {7, 24, 12},
                     {3, 768, 768},
                     {3, 1600, 1600},
                     {1, 8, 1}},
                    {16384, 1600, 64},
                    variants},
                   argc, argv);
}
