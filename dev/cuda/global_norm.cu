// The norm of all gradients, as one vector: norm[0] = sqrt(sum of squares), norm[1] = what they are
// multiplied with so that it is at most CLIP. Every update waits for it.
//
// Floor: 4 bytes an element, read once; 2 FLOPs. All variants move just that; what differs is how
// much of it is on its way at once. A device needs its bandwidth times the time of a load: H200,
// 4.8 TB/s for 0.7 us, 3.4 MB; A100, 1.2 MB. 1024 blocks of 256 threads with 16 bytes each are 4.2
// MB, if all blocks fit at once.

#include "common.cuh"

static const float CLIP = 1;

// 1: a thread an element, and all add to one number: one addition at a time, in an order that
// differs from run to run. The sum loses what is small beside it: the norm of four million normal
// numbers comes out 0.2 % too small, and 2^24 ones and one more are still 2^24.
__global__ void squares1(float* sum, const float* grads, size_t count) {
    size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) atomicAdd(sum, grads[i] * grads[i]);
}

// 2: a thread adds up its share of the elements and a block its threads' sums: 1024 atomic
// additions are left.
__global__ void __launch_bounds__(256) squares2(float* sum, const float* grads, size_t count) {
    __shared__ float reduce[WARP];
    float squares = 0;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
         i += size_t(gridDim.x) * blockDim.x)
        squares += grads[i] * grads[i];
    squares = block_reduce(squares, reduce, false);
    if (threadIdx.x == 0) atomicAdd(sum, squares);
}

// 4: four loads of 16 bytes are on their way before the first is needed. A block's sum, in all of
// its threads; any count.
__device__ inline float squares_of_block(const float* grads, size_t count, float* reduce) {
    size_t thread = size_t(blockIdx.x) * blockDim.x + threadIdx.x,
           threads = size_t(gridDim.x) * blockDim.x;
    size_t quads = count / QUAD;
    float sum = 0;
    for (size_t i = thread; i < quads; i += 4 * threads) {
        float4 g[4] = {};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (i + k * threads < quads) g[k] = load_quad(grads + (i + k * threads) * QUAD);
        }
#pragma unroll
        for (int k = 0; k < 4; k++)
            sum += g[k].x * g[k].x + g[k].y * g[k].y + g[k].z * g[k].z + g[k].w * g[k].w;
    }
    if (thread < count % QUAD) sum += grads[quads * QUAD + thread] * grads[quads * QUAD + thread];
    return block_reduce(sum, reduce, false);
}

__global__ void __launch_bounds__(256) squares4(float* partial, const float* grads, size_t count) {
    __shared__ float reduce[WARP];
    float sum = squares_of_block(grads, count, reduce);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// 5: one launch: the block that is through last adds up all partial sums, in their order whichever
// block it is. done: 0 before and after. The sums of other blocks are read past the first-level
// cache, which does not see their writes.
__global__ void __launch_bounds__(256) norm5(float* norm, float* partial, unsigned* done,
                                             const float* grads, size_t count, float clip) {
    __shared__ float reduce[WARP];
    __shared__ bool last;
    float sum = squares_of_block(grads, count, reduce);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
        __threadfence();
        last = atomicInc(done, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    sum = 0;
    for (int i = threadIdx.x; i < int(gridDim.x); i += blockDim.x) sum += __ldcg(partial + i);
    sum = sqrtf(block_reduce(sum, reduce, false));
    if (threadIdx.x == 0) norm[0] = sum, norm[1] = sum > clip ? clip / sum : 1.0f;
}

static std::vector<Variant> variants(Arrays& a, const Size& size) {
    size_t count = size[0];
    float *grads = a.normals_fp32(count, 0.01), *partial = a.room<float>(NORM_BLOCKS),
          *norm = a.room<float>(2);
    unsigned* done = a.put(std::vector<unsigned>(1, 0));

    // The same squares, added up in another order. Chains of additions are short, here and there,
    // and each addition errs by 2^-24 of its sum at most: far less than 1e-5 together. The chain of
    // 1 is not short.
    auto check_within = [=, &a](double relative) {
        Floats host = a.start(grads);
        float* from = host.data();
        cpu::Plan plan;
        cpu::plan_add(plan, "gradients", "grads", "fp32", {int64_t(count)}, &from);
        float want = float(cpu::gradient_norm(plan));
        expect("norm", norm, {want, want > CLIP ? CLIP / want : 1.0f}, 0, relative);
    };
    auto check_norm = [=] { check_within(1e-5); };
    auto add_up = [=] { norm_kernel<<<1, 256>>>(norm, partial, NORM_BLOCKS, CLIP); };
    // The first partial sum is the one that 1 and 2 add to.
    auto clear = [=] { CUDA(cudaMemsetAsync(partial, 0, NORM_BLOCKS * sizeof(float))); };
    Work once = {4.0 * count, 2.0 * count};
    auto trainers = [=] {
        squares_kernel<<<NORM_BLOCKS, 256>>>(partial, grads, count);
        add_up();
    };
    return {
        {"a thread an element, an atomic addition each", once, once,
         [=] {
             clear();
             squares1<<<blocks_for(count, 256), 256>>>(partial, grads, count);
             add_up();
         },
         [=] { check_within(5e-3); }, false},
        {"an atomic addition for each of 1024 blocks", once, once,
         [=] {
             clear();
             squares2<<<NORM_BLOCKS, 256>>>(partial, grads, count);
             add_up();
         },
         check_norm, false},
        {"1024 partial sums, then theirs: the trainer's", once, once,
         count % QUAD == 0 ? trainers : std::function<void()>(), check_norm},
        // Not the trainer's yet.
        {"as 3, four loads a thread on their way at once; any count", once, once,
         [=] {
             squares4<<<NORM_BLOCKS, 256>>>(partial, grads, count);
             add_up();
         },
         check_norm},
        {"as 4, in one launch: the last block adds up", once, once,
         [=] { norm5<<<NORM_BLOCKS, 256>>>(norm, partial, done, grads, count, CLIP); }, check_norm},
    };
}

int main(int argc, char** argv) {
    return harness({"global_norm", {"count"}, {{7}, {4200004}}, {124475904}, variants}, argc, argv);
}
