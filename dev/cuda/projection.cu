// The projection P (n, r), drawn anew by Philox wherever it is needed: gaussian, N(0, 1/r) in
// floatX; rademacher, signs / sqrt(r); sparse, a sign (n) for each input and a rotation for each
// stripe of r inputs. Both trainers draw the same numbers, so an element's place in the stream is
// given: a block of Philox makes normals 4i to 4i + 3, or signs 128i to 128i + 127.
//
// Floor, with E bytes an element: P is written, n r E bytes; sparse, 4 n + 4 n / r. Arithmetic, as
// counted here: 100 for a block of Philox (10 rounds of two wide products and four exclusive ors,
// and the keys), 12 for a pair of normals by Box and Muller (logarithm, root, sine, cosine and what
// is between): none of it for tensor cores. At best 31 operations a normal and 0.8 a sign, for 2
// bytes: normals are limited by arithmetic, signs by memory, and small matrices, as all of these
// are, by the launch.

#include "common.cuh"

#ifndef __NOGPU__
#include <curand.h>
#endif

// 1: a generator of its own for each element: a thread computes a block of Philox, 4 words, and
// keeps one normal of it.
__global__ void gaussian1(floatX* p, int64_t count, float scale, uint64_t seed, uint64_t stream) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    curandStatePhilox4_32_10_t state;
    curand_init(seed, stream, i / 2 * 2, &state);
    float2 x = curand_normal2(&state);
    store(p + i, scale * (i % 2 ? x.y : x.x));
}

// 3: two blocks of Philox a thread: 8 normals, 16 bytes a store in bf16, and the generator's start
// is paid once.
__global__ void gaussian3(floatX* p, int64_t count, float scale, uint64_t seed, uint64_t stream) {
    int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (i >= count) return;
    curandStatePhilox4_32_10_t state;
    curand_init(seed, stream, i, &state);
    floatX x[8];
    for (int k = 0; k < 8; k += 4) {
        float4 four = curand_normal4(&state);
        store_quad(x + k, {scale * four.x, scale * four.y, scale * four.z, scale * four.w});
    }
    for (int k = 0; k < 8; k += PACK) store_pack(p + i + k, load_pack(x + k));
}

// Eight elements by the low bits: 16 bytes a store.
__device__ static void store_signs(floatX* to, uint32_t bits, float scale) {
    Pack pack;
    for (int k = 0; k < 8; k++) {
        store(&pack.x[k % PACK], bits >> k & 1 ? -scale : scale);
        if (k % PACK == PACK - 1) store_pack(to + k - k % PACK, pack);
    }
}

// 5: the trainer's, 8 signs a thread, with 16 bytes a store.
__global__ void rademacher5(floatX* p, int64_t count, float scale, uint64_t seed, uint64_t stream) {
    int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (i < count) store_signs(p + i, random_signs(seed, stream, i), scale);
}

// 6: a thread a block of Philox, which the 64 threads share: each word is computed once, not by 16
// threads. Signs 8i to 8i + 7 are byte i of the words.
__global__ void __launch_bounds__(64)
    rademacher6(floatX* p, int64_t count, float scale, uint64_t seed, uint64_t stream) {
    __shared__ uint4 words[64];
    int64_t first = blockIdx.x * int64_t(64 * 128);
    words[threadIdx.x] = philox_block(seed, stream, first / 128 + threadIdx.x);
    __syncthreads();
    for (int i = threadIdx.x * 8; i < 64 * 128 && first + i < count; i += 64 * 8)
        store_signs(p + first + i, ((const uint8_t*)words)[i / 8], scale);
}

#ifndef __NOGPU__
// 8: cuRAND's own kernels, from the host: fp32 to memory, then the rounding. Another order of the
// numbers than ours.
static void host_api8(floatX* p, float* wide, int64_t count, float scale) {
    static curandGenerator_t generator;
    auto check = [](curandStatus_t status) {
        if (status != CURAND_STATUS_SUCCESS)
            fail(text("cuRAND failed with status %d", int(status)));
    };
    if (!generator) check(curandCreateGenerator(&generator, CURAND_RNG_PSEUDO_PHILOX4_32_10));
    check(curandSetPseudoRandomGeneratorSeed(generator, 1));
    check(curandSetGeneratorOffset(generator, 0));
    check(curandGenerateNormal(generator, wide, count, 0, scale));
    if (IS_BF16) round_kernel<<<blocks_for(count, 256 * QUAD), 256>>>(p, wide, count, false);
}
#endif

static void expect_number(const char* what, double got, double want, double bound) {
    double ratio = std::isnan(got) ? INFINITY : fabs(got - want) / bound;
    if (ratio > worst.ratio) worst = {ratio, text("%s: %g, not %g", what, got, want)};
}

static std::vector<Variant> variants(Arrays& a, const Size& size) {
    int n = size[0], r = size[1], stripes = (n + r - 1) / r;
    int64_t count = int64_t(n) * r;
    float scale = 1.0f / sqrtf(float(r));
    uint64_t seed = 1337, stream = stream_of(FC, 3, 5);
    floatX* p = a.room<floatX>(count);
    float* sign = a.room<float>(n);
    int* shift = a.room<int>(stripes);
    Linear linear = {1, n, r};

    auto drawn = [=](Floats& out, std::vector<int>& shifts, int projection) {
        cpu::draw_projection(out.data(), shifts.data(), {1, n, r}, projection, seed, stream);
    };
    // Mean, variance and fourth moment (3 for normals) of P sqrt(r) within 5 standard errors: of a
    // normal's first moments.
    auto check_moments = [=] {
        double sums[3] = {};
        for (double x : fetch(p, count))
            x /= scale, sums[0] += x, sums[1] += x * x, sums[2] += x * x * x * x;
        expect_number("mean", sums[0] / count, 0, 5 * sqrt(1.0 / count));
        expect_number("variance", sums[1] / count, 1, 5 * sqrt(2.0 / count));
        expect_number("fourth moment", sums[2] / count, 3, 5 * sqrt(96.0 / count));
    };
    // cuRAND takes a GPU's fast sine and cosine, whose error is 2^-20 or so, times a length of at
    // most 6.7: 1e-5 is enough.
    auto check_normals = [=] {
        Floats want(count);
        std::vector<int> none;
        drawn(want, none, GAUSSIAN);
        expect("p", p, want, 1e-5 * scale);
        check_moments();
    };
    auto check_signs = [=] {
        Floats want(count);
        std::vector<int> none;
        drawn(want, none, RADEMACHER);
        expect("p", p, want, 0);
    };
    auto check_sparse = [=] {
        Floats want(n);
        std::vector<int> shifts(stripes);
        drawn(want, shifts, SPARSE);
        expect("sign", sign, want, 0, 0);
        expect("shift", shift, Floats(shifts.begin(), shifts.end()), 0, 0);
    };
    auto trainers = [=](int projection) {
        draw_projection(p, sign, shift, linear, projection, seed, stream);
    };

    double philox = 100, pair = 12, written = double(count) * sizeof(floatX);
    Work normals = {written, count * (philox / 4 + pair / 2)},
         one_each = {written, count * (philox + pair)};
    Work signs = {written, count * (philox / 128)}, eight_each = {written, count * (philox / 8)};
    Work sparse = {4.0 * n + 4.0 * stripes, (n + stripes) * philox},
         sparse_floor = {sparse.bytes, (n / 128.0 + stripes) * philox};
    std::vector<Variant> list = {
        {"gaussian: a thread a normal", one_each, normals,
         [=] { gaussian1<<<blocks_for(count, 256), 256>>>(p, count, scale, seed, stream); },
         check_normals},
        {"gaussian: the trainer's, 4 normals a thread", normals, normals,
         [=] { trainers(GAUSSIAN); }, check_normals},
        {"gaussian: 8 normals a thread, 16 bytes a store", normals, normals,
         [=] { gaussian3<<<blocks_for(count, 256 * 8), 256>>>(p, count, scale, seed, stream); },
         check_normals},
        {"rademacher: the trainer's, 8 signs a thread", eight_each, signs,
         [=] { trainers(RADEMACHER); }, check_signs},
        {"rademacher: as 4, 16 bytes a store", eight_each, signs,
         [=] { rademacher5<<<blocks_for(count, 256 * 8), 256>>>(p, count, scale, seed, stream); },
         check_signs},
        {"rademacher: 128 signs a thread, by shared memory", signs, signs,
         [=] { rademacher6<<<blocks_for(count, 64 * 128), 64>>>(p, count, scale, seed, stream); },
         check_signs},
        {"sparse: the trainer's, a thread a sign", sparse, sparse_floor, [=] { trainers(SPARSE); },
         check_sparse},
    };
#ifndef __NOGPU__
    float* wide = IS_BF16 ? a.room<float>(count) : (float*)p;
    Work through_fp32 = {written + (IS_BF16 ? 8.0 * count : 0), normals.flops};
    list.push_back({"gaussian: cuRAND's host API, then the rounding", through_fp32, normals,
                    [=] { host_api8(p, wide, count, scale); }, check_moments});
#endif
    return list;
}

int main(int argc, char** argv) {
    return harness({"projection",
                    {"n", "r"},
                    {{768, 192}, {1600, 37}, {40, 7}, {8, 1}},
                    {3072, 768},
                    variants},
                   argc, argv);
}
