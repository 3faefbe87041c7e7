// test_curand.cpp: the trainer's random numbers against cuRAND's own device header, compiled for
// the host.
//
//   g++ -std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -Wall -Wextra
//   -Wno-unused-function
//       -isystem $CUDA/include -isystem $CUDA/include/cccl
//       dev/test/test_curand.cpp -o build/test_curand $(pkg-config --cflags --libs gtest)
//
// with CUDA=/usr/local/cuda or wherever the toolkit stands. It needs the toolkit's headers alone,
// no GPU and no nvcc.

#define TESTING
#include "../../train_gpt2_compact.cpp"

#include <cuda_runtime.h>
#include <curand_kernel.h>
#include <gtest/gtest.h>

TEST(Curand, WordsAreEqual) {
    uint64_t numbers[3] = {
        1, 2, 3};  // seed, stream, index: of all sizes, some with their upper half in use
    for (int i = 0; i < 100000; i++) {
        for (uint64_t& x : numbers) x = x * 0xD1342543DE82EF95ull + 0xB5297A4D3F84D5B5ull;
        const uint64_t seed = numbers[0] >> i % 64, stream = numbers[1] >> i * 7 % 64,
                       index = numbers[2] >> (2 + i * 5 % 62);
        curandStatePhilox4_32_10_t state;
        curand_init(seed, stream, 4 * index, &state);
        const uint4 theirs = curand4(&state), following = curand4(&state);
        const Words ours = philox(seed, stream, index);
        ASSERT_TRUE(ours.x == theirs.x && ours.y == theirs.y && ours.z == theirs.z &&
                    ours.w == theirs.w)
            << seed << " " << stream << " " << index;
        if (index == UINT64_MAX >> 2) continue;
        const Words next = philox(seed, stream, index + 1);
        ASSERT_TRUE(next.x == following.x && next.w == following.w)
            << seed << " " << stream << " " << index;
    }
}

TEST(Curand, NormalsAgree) {
    const int64_t count = 1000000, start = 4000;
    std::vector<float> ours(count);
    for (uint64_t stream : {stream_of(QKV, 0, 0), stream_of(FCPROJ, 11, 5)}) {
        draw_normals(ours.data(), start, count, 1.0f, 1337, stream);
        curandStatePhilox4_32_10_t state;
        curand_init(1337, stream, start, &state);
        double worst = 0;
        for (int64_t i = 0; i < count; i += 4) {
            const float4 block = curand_normal4(&state);
            const float theirs[4] = {block.x, block.y, block.z, block.w};
            for (int j = 0; j < 4; j++) {
                const double ulp = ldexp(1.0, ilogb(theirs[j]) - 23);
                worst = std::max(worst, fabs(double(ours[i + j]) - theirs[j]) / ulp);
            }
        }
        // sin or cos 1.5 ulp, log's 0.8 halved by the root, and two roundings: 3 or so on this
        // side, 1 to 2 on the other.
        EXPECT_LE(worst, 5);
    }
}

TEST(Curand, SignsAreItsBits) {
    const int count = 100000;
    std::vector<float> signs(count);
    const uint64_t stream = stream_of(FC, 3, 7);
    draw_signs(signs.data(), count, 1.0f, 1337, stream);
    curandStatePhilox4_32_10_t state;
    curand_init(1337, stream, 0, &state);
    for (int i = 0; i < count;) {
        const uint4 block = curand4(&state);
        const uint32_t words[4] = {block.x, block.y, block.z, block.w};
        for (int bit = 0; bit < 128 && i < count; bit++, i++)
            ASSERT_EQ(signs[i] < 0, words[bit / 32] >> bit % 32 & 1) << i;
    }
}

int main(int argc, char** argv) {
    testing::InitGoogleTest(&argc, argv);
    return RUN_ALL_TESTS();
}
