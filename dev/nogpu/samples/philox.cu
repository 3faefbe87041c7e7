// cuRAND's device generator in a kernel: the integers of Philox4x32-10, which is written out here,
// bit for bit; the normals that the Box-Muller transform makes of those integers.
#include <curand_kernel.h>
#include <cstdint>
#include "check.h"

__global__ void draw(uint4* integers, float4* normals, unsigned long long seed,
                     unsigned long long sequence, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    curandStatePhilox4_32_10_t state;
    curand_init(seed, sequence, 4ull * i, &state);
    integers[i] = curand4(&state);
    curand_init(seed, sequence, 4ull * i, &state);
    normals[i] = curand_normal4(&state);
}

// Salmon et al., SC'11: ten rounds; the counter's words 0, 1 count blocks of four, 2, 3 are
// the sequence.
static void philox(uint32_t out[4], uint64_t seed, uint64_t sequence, uint64_t block) {
    uint32_t c[4] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)sequence,
                     (uint32_t)(sequence >> 32)};
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        uint64_t p = (uint64_t)0xD2511F53u * c[0], q = (uint64_t)0xCD9E8D57u * c[2];
        uint32_t next[4] = {(uint32_t)(q >> 32) ^ c[1] ^ key[0], (uint32_t)q,
                            (uint32_t)(p >> 32) ^ c[3] ^ key[1], (uint32_t)p};
        for (int i = 0; i < 4; i++) c[i] = next[i];
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; i++) out[i] = c[i];
}

int main() {
    const int n = 300;
    const unsigned long long seed = 0x123456789abcdefull, sequence = 77;
    uint4* di = device_array<uint4>(n);
    float4* dn = device_array<float4>(n);
    draw<<<(n + 63) / 64, 64>>>(di, dn, seed, sequence, n);
    auto integers = to_host(di, n);
    auto normals = to_host(dn, n);
    for (int i = 0; i < n; i++) {
        uint32_t u[4];
        philox(u, seed, sequence, i);
        CHECK(integers[i].x == u[0] && integers[i].y == u[1] && integers[i].z == u[2] &&
              integers[i].w == u[3]);
        float z[4] = {normals[i].x, normals[i].y, normals[i].z, normals[i].w};
        for (int j = 0; j < 4; j += 2) {
            double r = sqrt(-2 * log((u[j] + 0.5) / 4294967296.0)),
                   angle = 2 * M_PI * (u[j + 1] + 0.5) / 4294967296.0;
            // The header rounds u and the angle to fp32, which moves a normal by about 1e-6 where
            // the logarithm is steep.
            CHECK(fabs(z[j] - r * sin(angle)) < 2e-5);
            CHECK(fabs(z[j + 1] - r * cos(angle)) < 2e-5);
        }
    }
    CUDA(cudaFree(di));
    CUDA(cudaFree(dn));
    printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
    return failures != 0;
}
