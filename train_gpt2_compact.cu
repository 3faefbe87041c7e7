// train_gpt2_compact.cu: trains GPT-2 with compressed activations on one NVIDIA GPU, in one file.
//
// The method (CompAct, arXiv 2410.15352) and its reference on the CPU are in
// train_gpt2_compact.cpp: a linear layer keeps z = x P instead of its input x, with a random P (n,
// r) that is never stored. Weight gradient and the optimizer's moments have r columns instead of n;
// the rest is exact.
//
// How to read it, top to bottom: the host, in short; layers, forward beside backward; the
// compressed linear layer; the optimizer; the model; all else of the host. The first and the last
// of these are the same text as in the .cpp file, which says more of each.
//
// Shapes: B sequences of T tokens, N = B*T; C channels, NH heads of hs = C/NH; L layers; V words,
// Vp with padding. A weight is (m, n) = (outputs, inputs), row-major, as llm.c stores it. bf16 with
// fp32 master weights by default, fp32 with -DPRECISION_FP32.

// =================================================================================================
// the host, in short: what a model needs of it; the same text in both trainers
// =================================================================================================

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

// What went wrong, for the person at the terminal. The status is 2 for bad input, else 1.
struct Failure {
    int status;
    std::string message;
};

// Texts and numbers, one after another, as one text.
template <class... Parts>
static std::string join(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// The input is at fault, an option or a file: the message names it and says what would be right.
template <class... Parts>
[[noreturn]] static void refuse(const Parts&... parts) {
    throw Failure{2, join(parts...)};
}

// The machine is at fault: no memory, no disk space.
template <class... Parts>
[[noreturn]] static void fail(const Parts&... parts) {
    throw Failure{1, join(parts...)};
}

// ---- options: what the user asked for

enum { QKV, ATTPROJ, FC, FCPROJ, LINEARS };
enum { GAUSSIAN, RADEMACHER, SPARSE };
enum { ADAMW, MUON };
enum { KEEP, MOVE, RESET };
enum { COSINE, LINEAR, CONSTANT, WSD };
enum { TYPE_FP32, TYPE_BF16 };
enum { GELU_EXACT, GELU_2BIT };
enum { TAPE_FULL, TAPE_INT8 };
enum { MASTER_FP32, MASTER_NONE };

struct Options {
    std::string train, val, model = "d12", out, tokenizer, prompt, hellaswag, dump, plan;
    bool generates = false;  // text after a prompt, and trains nothing
    int channels = 0, heads = 0, layers = 0, context = 0;
    int batch = 4, seq = 0, total_batch = 0, steps = -1, warmup = 0, schedule = COSINE;
    double lr = 3e-4, final_lr_frac = 0.1, weight_decay = 0.1, clip = 1.0;
    double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, rank = 0.25, alpha = 1.0, temperature = 0.8;
    int compress = 1 << QKV | 1 << FC | 1 << FCPROJ;
    int optimizer = MUON, projection = SPARSE, gap = 100, moments = KEEP;
    int recompute = 0, gelu = GELU_EXACT, tape = TAPE_FULL, master = MASTER_FP32;
    int64_t memory = 0;
    int val_every = 250, val_batches = 20, sample_every = 0, sample_tokens = 128, top_k = 50;
    int checkpoint_every = -1, keep = 2, checkpoint_type = TYPE_FP32, seed = 1337;
    bool offload = false, val_first = false, resume = false, overfit = false, help = false;
};

enum { MOST_SEQUENCES = 65535 };  // of a micro batch: a GPU's grid has no more rows
enum { PIECE = 256 };             // tokens of a prompt that are read at once

// The shape of a model, as in the header of llm.c's model file.
struct Config {
    int context, V, L, NH, C, Vp;
};

// ---- processes that share each step: with `make MPI=1` those that mpirun started, else one

struct Processes {
    int rank = 0, count = 1;  // who this is, and of how many
    int local = 0;            // who it is among those of its machine, which says whose GPU is whose
};

static Processes processes;

// ---- random numbers: Philox4x32-10 (Salmon et al., SC'11), cuRAND's PHILOX4_32_10

struct Words {
    uint32_t x, y, z, w;
};

// Block `index` of a stream: the words of curand_init(seed, stream, 4 * index) and curand4.
static inline Words philox(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    Words c = {uint32_t(index), uint32_t(index >> 32), uint32_t(stream), uint32_t(stream >> 32)};
    for (int round = 0; round < 10; round++) {
        uint64_t p = uint64_t(0xD2511F53u) * c.x, q = uint64_t(0xCD9E8D57u) * c.z;
        c = {uint32_t(q >> 32) ^ c.y ^ k0, uint32_t(q), uint32_t(p >> 32) ^ c.w ^ k1, uint32_t(p)};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// Streams 0 to LINEARS-1 belong to the linear layers' projections, the others to what this names.
enum { STREAM_INIT = 8, STREAM_SHARDS, STREAM_SEQUENCES, STREAM_SAMPLE, STREAM_ROUND };

static uint64_t stream_of(int purpose, uint64_t layer, uint64_t epoch) {
    return epoch << 32 | layer << 8 | purpose;
}

// ---- the memory plan: every tensor of the run is listed in it before any is allocated

static int64_t count_of(const std::vector<int64_t>& shape) {
    int64_t count = 1;
    for (int64_t d : shape) count *= d;
    return count;
}

struct Tensor {
    std::string category, name, type;
    std::vector<int64_t> shape;
    void* home;  // the address of the model's pointer to it
    int64_t count() const { return count_of(shape); }
    int bits() const {
        return type == "2bit" ? 2 : type == "int8" || type == "byte" ? 8 : type == "bf16" ? 16 : 32;
    }
    int64_t bytes() const { return count() / 8 * bits() + (count() % 8 * bits() + 7) / 8; }
};

// Matrix-product FLOPs of one training step, for each token of it.
struct Flops {
    double forward, backward, recompute, projection, update;
    double total() const { return forward + backward + recompute + projection + update; }
};

struct Plan {
    std::vector<Tensor> tensors;
    Flops flops;
    std::vector<std::string> categories() const;
    // Of a category. Of all: what lies where the trainer computes, thus not what waits on the host.
    int64_t bytes(const std::string& category = "") const;
};

static void plan_add(Plan& plan, const char* category, const std::string& name, const char* type,
                     const std::vector<int64_t>& shape, void* home) {
    if (count_of(shape) > 0) plan.tensors.push_back({category, name, type, shape, home});
}

// ---- parameters, in the order of the model file

// clang-format off
enum { WTE, WPE, LN1W, LN1B, QKVW, QKVB, ATTPROJW, ATTPROJB, LN2W, LN2B, FCW, FCB, FCPROJW, FCPROJB,
       LNFW, LNFB, PARAMS };

struct ParamRow {
    const char* name;
    int rows, columns;  // one layer's share, in multiples of C; columns 0 for a vector
    int linear;         // the linear layer whose weight this is, or -1
};

static const ParamRow param_rows[PARAMS] = {
    {"wte", 0, 1, -1},           {"wpe", 0, 1, -1},     {"ln1w", 1, 0, -1}, {"ln1b", 1, 0, -1},
    {"qkvw", 3, 1, QKV},         {"qkvb", 3, 0, -1},
    {"attprojw", 1, 1, ATTPROJ}, {"attprojb", 1, 0, -1}, {"ln2w", 1, 0, -1}, {"ln2b", 1, 0, -1},
    {"fcw", 4, 1, FC},           {"fcb", 4, 0, -1},
    {"fcprojw", 1, 4, FCPROJ},   {"fcprojb", 1, 0, -1}, {"lnfw", 1, 0, -1}, {"lnfb", 1, 0, -1}};
// clang-format on

static bool has_layers(int param) { return param > WPE && param < LNFW; }

static int weight_of(int which) {
    const int weights[LINEARS] = {QKVW, ATTPROJW, FCW, FCPROJW};
    return weights[which];
}

// A linear layer's outputs, inputs and rank; r == n means full rank, no projection.
struct Linear {
    int m, n, r;
    bool compressed() const { return r < n; }
};

// ---- the tape: what the forward pass keeps for the backward pass, a row a tensor. This table and
// the options alone say what is kept, and how. Memory, FLOPs and --help follow from it.

enum { RESIDUAL, LN1, QKVR, ATTY, RESIDUAL2, LN2, FCH, FCH_GELU, TAPE_ROWS };
enum { NEVER = 6, NONE = -1, ATTENTION = LINEARS };
enum { NO_SCALES, OF_TOKEN, OF_HEADS };

struct TapeRow {
    const char* name;
    int width;      // in channels, for each token and layer
    int gone_from;  // the recomputation level from which the backward pass computes it again
    int input_of;   // the linear layer that alone needs it, so that z can stand in for it
    int made_by;    // the product that computes it again, or none: then it costs next to nothing
    int scales;     // with --tape int8: one for a token's whole row, one for each head, or no int8
};

static const TapeRow tape_rows[TAPE_ROWS] = {
    {"residual", 1, NEVER, NONE, NONE, OF_TOKEN},  // the stream into the block
    {"ln1", 1, 2, QKV, NONE, NO_SCALES},           //
    {"qkv", 3, 4, NONE, QKV, OF_HEADS},            //
    {"atty", 1, 5, NONE, ATTENTION, OF_HEADS},     // attention's output, also for its own gradient
    {"residual2", 1, 5, NONE, ATTPROJ, OF_TOKEN},  // the stream after attention
    {"ln2", 1, 2, FC, NONE, NO_SCALES},            //
    {"fch", 4, 3, NONE, FC, NO_SCALES},            // before GELU
    {"fch_gelu", 4, 1, FCPROJ, NONE, NO_SCALES},   //
};

// How the tape keeps a row: not at all, whole, as z = x P, as int8 with scales, as 2 bits each.
enum { GONE, WHOLE, AS_Z, AS_INT8, AS_2BIT };

enum { NEWTON_SCHULZ = 5 };  // iterations of Muon

// Muon orthogonalises q, k and v apart.
static int blocks_of(int which) { return which == QKV ? 3 : 1; }

// ---- what the rest of the host gives, defined there

static std::string commas(int64_t n);
__attribute__((format(printf, 1, 2))) static std::string text(const char* format, ...);
static double seconds();
static inline float float_of_bits(uint32_t bits);
static inline uint32_t bits_of_float(float x);
static float float_of_bf16(uint16_t x);
static uint16_t bf16_of_float(float x);
static void draw_normals(float* out, int64_t start, int64_t count, float scale, uint64_t seed,
                         uint64_t stream);
// Tokens of a forward pass: a micro batch, or a piece of a prompt.
static int64_t rows_of(const Options& options);
// Tokens whose keys and values the cache has room for: a sequence, where text is generated.
static int64_t cached_tokens(const Options& options);
// The whole parameter over all layers. With a rank: its gradient and moments, a layer's (m, r).
static std::vector<int64_t> param_shape(const Config& config, int param, int rank = 0);
static int64_t param_count(const Config& config, int param, int rank = 0);
static Linear linear_shape(const Config& config, const Options& options, int which);
static int how_kept(int row, const Options& options, const Linear* linears);
static int scales_of(const Config& config, int row);  // the int8 scales of a row for each token
static Flops matrix_flops(const Config& config, const Options& options, const Linear* linears);

// =================================================================================================
// layers: forward beside backward. Sums have a fixed order: two runs agree bit for bit.
// =================================================================================================

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <curand_kernel.h>
#include <omp.h>

// Weights, activations and their gradients; everything that accumulates is fp32.
#ifdef PRECISION_FP32
typedef float floatX;
static const char* const TYPE_X = "fp32";
static const cudaDataType_t CUDA_X = CUDA_R_32F;
#else
typedef __nv_bfloat16 floatX;
static const char* const TYPE_X = "bf16";
static const cudaDataType_t CUDA_X = CUDA_R_16BF;
#endif

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

// 16 bytes of activations: one load or store. Channels are a multiple of PACK: rows begin on 16.
enum { PACK = 16 / sizeof(floatX), WARP = 32 };
struct alignas(16) Pack {
    floatX x[PACK];
};
__device__ inline Pack load_pack(const floatX* from);
__device__ inline void store_pack(floatX* to, const Pack& pack);

// ---- embedding: x = wte[token] + wpe[position]

// A block a token.
__global__ void embedding_forward_kernel(floatX* x, const int* tokens, const floatX* wte,
                                         const floatX* wpe, int T, int C) {
    size_t at = size_t(blockIdx.x) * C, word = size_t(tokens[blockIdx.x]) * C;
    size_t position = size_t(blockIdx.x % T) * C;
    for (int j = threadIdx.x * PACK; j < C; j += blockDim.x * PACK) {
        Pack a = load_pack(wte + word + j), b = load_pack(wpe + position + j);
        for (int k = 0; k < PACK; k++) store(&a.x[k], to_float(a.x[k]) + to_float(b.x[k]));
        store_pack(x + at + j, a);
    }
}

// A block (8, 32) takes 8 packs of columns, each thread every 32nd row. These are the column of the
// block that a thread owns, and the sum of all in that column.
enum { SUM_ROWS = 32, SUM_PACKS = 8, SUM_COLUMNS = SUM_PACKS * PACK };
__device__ inline int own_column() { return threadIdx.y * SUM_PACKS + threadIdx.x; }
__device__ inline float column_sum(const float sum[PACK]) {
    __shared__ float sums[SUM_ROWS][SUM_COLUMNS + 1];
    for (int k = 0; k < PACK; k++) sums[threadIdx.y][threadIdx.x * PACK + k] = sum[k];
    __syncthreads();
    float total = 0;
    for (int i = 0; i < SUM_ROWS && own_column() < SUM_COLUMNS; i++) total += sums[i][own_column()];
    return total;
}

// dwte += gradient. Grid (words, ceil(C / (8 packs))), block (8, 32): for a word that occurs, whose
// tokens are order[starts[w]] to order[starts[w + 1] - 1], so that no two blocks add to one place.
// 32 tokens at a time, since a word may be a sixth of all.
__global__ void __launch_bounds__(SUM_ROWS* SUM_PACKS)
    word_backward_kernel(float* dwte, const floatX* dx, const int* order, const int* starts,
                         const int* words, int C) {
    int last = starts[blockIdx.x + 1], column = blockIdx.y * SUM_COLUMNS + threadIdx.x * PACK;
    float sum[PACK] = {};
    for (int i = starts[blockIdx.x] + threadIdx.y; i < last && column < C; i += SUM_ROWS) {
        Pack p = load_pack(dx + size_t(order[i]) * C + column);
        for (int k = 0; k < PACK; k++) sum[k] += to_float(p.x[k]);
    }
    float total = column_sum(sum);
    int to = blockIdx.y * SUM_COLUMNS + own_column();
    if (own_column() < SUM_COLUMNS && to < C) dwte[size_t(words[blockIdx.x]) * C + to] += total;
}

// dwpe += gradient. A block a position.
__global__ void position_backward_kernel(float* dwpe, const floatX* dx, int B, int T, int C) {
    for (int j = threadIdx.x * PACK; j < C; j += blockDim.x * PACK) {
        float sum[PACK] = {};
        for (int b = 0; b < B; b++) {
            Pack p = load_pack(dx + (size_t(b) * T + blockIdx.x) * C + j);
            for (int k = 0; k < PACK; k++) sum[k] += to_float(p.x[k]);
        }
        for (int k = 0; k < PACK; k++) dwpe[size_t(blockIdx.x) * C + j + k] += sum[k];
    }
}

// ---- what kernels share: calls that are checked, packs and quads, reductions

static const bool IS_BF16 = sizeof(floatX) == 2;

static void check(cudaError_t status, const char* file, int line) {
    if (status == cudaSuccess) return;
    const std::pair<cudaError_t, const char*> hints[] = {
        {cudaErrorMemoryAllocation,
         "a smaller --batch, --seq or --rank, or --recompute 5, takes less memory"},
        {cudaErrorNoKernelImageForDevice, "build for this device: make GPU_COMPUTE_CAPABILITY=NN"},
        {cudaErrorUnsupportedPtxVersion,
         "the driver is older than the toolkit that built this: update one of them"},
        {cudaErrorNoDevice, "is a GPU there, and its driver new enough?"},
        {cudaErrorInsufficientDriver, "is a GPU there, and its driver new enough?"}};
    std::string hint = "compute-sanitizer finds the place";
    for (auto& row : hints)
        if (row.first == status) hint = row.second;
    fail(file, ":", line, ": ", cudaGetErrorString(status), " (", cudaGetErrorName(status), "); ",
         hint);
}

static void check(cublasStatus_t status, const char* file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS)
        fail(file, ":", line, ": cuBLAS failed with status ", int(status),
             "; is memory left for its workspace?");
}

#define CUDA(call) check(call, __FILE__, __LINE__)
#define LAUNCHED() check(cudaGetLastError(), __FILE__, __LINE__)  // after each kernel

__device__ inline Pack load_pack(const floatX* from) {
    int4 bits = *reinterpret_cast<const int4*>(from);
    Pack pack;
    memcpy(&pack, &bits, 16);
    return pack;
}

__device__ inline void store_pack(floatX* to, const Pack& pack) {
    int4 bits;
    memcpy(&bits, &pack, 16);
    *reinterpret_cast<int4*>(to) = bits;
}

// Four fp32 of the optimizer's: one load or store. Every tensor's count is a multiple of 8, since
// the channels are.
enum { QUAD = 4 };

__device__ inline float4 load_quad(const float* from) {
    return *reinterpret_cast<const float4*>(from);
}
__device__ inline float4 load_quad(const __nv_bfloat16* from) {  // bf16 is fp32's upper half
    int2 bits = *reinterpret_cast<const int2*>(from);
    return {__uint_as_float(uint32_t(bits.x) << 16), __uint_as_float(bits.x & 0xFFFF0000u),
            __uint_as_float(uint32_t(bits.y) << 16), __uint_as_float(bits.y & 0xFFFF0000u)};
}
__device__ inline void store_quad(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
__device__ inline void store_quad(__nv_bfloat16* to, float4 x) {
    __nv_bfloat162 two[2] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
    int2 bits;
    memcpy(&bits, two, 8);
    *reinterpret_cast<int2*>(to) = bits;
}

// The sum over a warp, in every lane; the order of additions is fixed.
__device__ inline float warp_sum(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
    return x;
}

// The sum (or maximum) over a block of whole warps, in every thread. shared: 32 floats; two calls
// in a row may share them.
__device__ inline float block_reduce(float x, float* shared, bool maximum) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = maximum ? warp_max(x) : warp_sum(x);
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = lane < warps ? shared[lane] : maximum ? -INFINITY : 0.0f;
    return maximum ? warp_max(x) : warp_sum(x);
}

// Block `index` of a stream of random words, by cuRAND's Philox.
__device__ inline uint4 philox_block(uint64_t seed, uint64_t stream, uint64_t index) {
    curandStatePhilox4_32_10_t state;
    curand_init(seed, stream, 4 * index, &state);
    return curand4(&state);
}

static int blocks_for(int64_t count, int each) { return int((count + each - 1) / each); }

// ---- sums over tokens, as bias and LayerNorm gradients need them. Two stages and no atomics:
// partial sums of every column, each over some rows, then their sum.

enum { SLABS = 64, PARTS = 16 };

// Grid (ceil(m / (8 packs)), SLABS): of a slab of rows, to partial (SLABS, m).
__device__ inline void store_column_sums(float* partial, const float sum[PACK], int m) {
    float total = column_sum(sum);
    int to = blockIdx.x * SUM_COLUMNS + own_column();
    if (own_column() < SUM_COLUMNS && to < m) partial[size_t(blockIdx.y) * m + to] = total;
}

// Grid as above, block (8, 32). Reads dy (N, m) once.
__global__ void __launch_bounds__(SUM_ROWS* SUM_PACKS)
    column_sums(float* partial, const floatX* dy, int N, int m) {
    int column = blockIdx.x * SUM_COLUMNS + threadIdx.x * PACK, rows = (N + SLABS - 1) / SLABS;
    int last = min(N, int(blockIdx.y + 1) * rows);
    float sum[PACK] = {};
    for (int i = blockIdx.y * rows + threadIdx.y; i < last && column < m; i += SUM_ROWS) {
        Pack p = load_pack(dy + size_t(i) * m + column);
        for (int k = 0; k < PACK; k++) sum[k] += to_float(p.x[k]);
    }
    store_column_sums(partial, sum, m);
}

// The second stage. Grid (ceil(m / 32), vectors), block (32, PARTS): a, b and c, m long each, +=
// the sums of their columns of partial (parts, vectors m); a null one is left out.
__global__ void __launch_bounds__(PARTS* WARP)
    add_partial_sums(float* a, float* b, float* c, const float* partial, int parts, int m) {
    __shared__ float sums[PARTS][WARP];
    int column = blockIdx.x * WARP + threadIdx.x, width = gridDim.y * m;
    float sum = 0, *to = blockIdx.y == 0 ? a : blockIdx.y == 1 ? b : c;
    for (int i = threadIdx.y; i < parts && column < m; i += PARTS)
        sum += partial[size_t(i) * width + blockIdx.y * m + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= m || !to) return;
    for (int i = 1; i < PARTS; i++) sum += sums[i][threadIdx.x];
    to[column] += sum;
}

// a, b and c, so many as `vectors` says, each (m), += the sums of partial (parts, vectors m)
static void add_partial(int vectors, float* a, float* b, float* c, const float* partial, int parts,
                        int m) {
    dim3 grid(blocks_for(m, WARP), vectors), block(WARP, PARTS);
    add_partial_sums<<<grid, block>>>(a, b, c, partial, parts, m);
    LAUNCHED();
}

// out (m) += sum over tokens of dy (N, m)
static void sum_columns(float* out, float* partial, const floatX* dy, int N, int m) {
    dim3 grid(blocks_for(m, SUM_COLUMNS), SLABS), block(SUM_PACKS, SUM_ROWS);
    column_sums<<<grid, block>>>(partial, dy, N, m);
    LAUNCHED();
    add_partial(1, out, nullptr, nullptr, partial, SLABS, m);
}

// ---- the sparse projection's signed fold, for the kernels that make x

// z (N, r) = x P: z[j] = sum of sign[k] x[k] over the k that go to column j
struct Fold {
    floatX* z;  // null: no fold wanted
    const float* sign;
    const int* shift;
    int n, r;
};

// Threads `lane` of `lanes` share a row; neighbours read neighbours. x (n) has been written by
// these same threads.
__device__ inline void fold_row(const Fold& f, size_t row, const floatX* x, int lane, int lanes) {
    for (int j = lane; j < f.r; j += lanes) {
        float sum = 0;
        for (int first = 0, stripe = 0; first < f.n; first += f.r, stripe++) {
            int turned = j - f.shift[stripe], k = first + (turned < 0 ? turned + f.r : turned);
            if (k < f.n) sum += f.sign[k] * to_float(x[k]);
        }
        store(f.z + row * f.r + j, sum);
    }
}

// ---- LayerNorm, fused with the residual sum before it and the fold after it

static const float LAYERNORM_EPS = 1e-5f;

// sum (N, C) = x + delta + bias where delta is given. y = LayerNorm of that sum (or of x), rounded
// as it is stored, so that a later run from the stored stream gives the same bits. delta and y may
// be one. One warp a row, 4 rows a block; dynamic shared memory: 4 C elements, of the sum, then of
// y, for the fold. Reads x, delta; writes sum, y, z, mean, rstd: each once.
__global__ void __launch_bounds__(128)
    layernorm_kernel(floatX* y, floatX* sum, float* mean, float* rstd, const floatX* x,
                     const floatX* delta, const floatX* bias, const floatX* w, const floatX* b,
                     Fold fold, int N, int C) {
    extern __shared__ int4 rows[];  // 16 bytes a lane: as floats, 8 lanes would meet in each bank
    int lane = threadIdx.x % WARP, i = blockIdx.x * 4 + threadIdx.x / WARP;
    if (i >= N) return;
    floatX* row = (floatX*)rows + threadIdx.x / WARP * C;
    float total = 0, squares = 0;
    size_t at = size_t(i) * C;
    for (int j = lane * PACK; j < C; j += WARP * PACK) {
        Pack p = load_pack(x + at + j);
        if (delta) {
            Pack d = load_pack(delta + at + j), e = load_pack(bias + j);
            for (int k = 0; k < PACK; k++)
                store(&p.x[k], to_float(p.x[k]) + to_float(d.x[k]) + to_float(e.x[k]));
            store_pack(sum + at + j, p);
        }
        store_pack(row + j, p);
        for (int k = 0; k < PACK; k++) total += to_float(p.x[k]);
    }
    float m = warp_sum(total) / C;
    for (int j = lane * PACK; j < C; j += WARP * PACK) {
        Pack p = load_pack(row + j);
        for (int k = 0; k < PACK; k++) squares += (to_float(p.x[k]) - m) * (to_float(p.x[k]) - m);
    }
    float s = rsqrtf(warp_sum(squares) / C + LAYERNORM_EPS);
    for (int j = lane * PACK; j < C; j += WARP * PACK) {
        Pack p = load_pack(row + j), pw = load_pack(w + j), pb = load_pack(b + j);
        for (int k = 0; k < PACK; k++)
            store(&p.x[k], (to_float(p.x[k]) - m) * s * to_float(pw.x[k]) + to_float(pb.x[k]));
        store_pack(y + at + j, p);
        store_pack(row + j, p);
    }
    if (lane == 0) {
        mean[i] = m;
        rstd[i] = s;
    }
    __syncwarp();
    if (fold.z) fold_row(fold, i, row, lane, WARP);
}

// dx (N, C) = gradient, added to dx where accumulate. partial (bands, 3C): the sums of weight, of
// bias, and of what dx then is, which is the gradient of the bias of the projection before it.
// A block takes a band of rows; grid the bands, block C / PACK threads, rounded up to warps. Each
// thread owns a pack of channels: its shares of the sums stay in registers from row to row, and a
// row's dy and x stay there between the sums over it and dx. Two rows at a time share a barrier,
// and their loads are on the way together. Reads dy, x, dx: each once.
__global__ void __launch_bounds__(3072 / PACK)
    layernorm_backward_kernel(floatX* dx, float* partial, const floatX* dy, const floatX* x,
                              const float* mean, const float* rstd, const floatX* w, int N, int C,
                              int band, bool accumulate) {
    __shared__ float sums[2][4][WARP];  // two in turn, so that one barrier a turn is enough
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int column = threadIdx.x * PACK, first = blockIdx.x * band, last = min(N, first + band);
    bool inside = column < C;
    float dw[PACK] = {}, db[PACK] = {}, below[PACK] = {};
    Pack pw = {};
    if (inside) pw = load_pack(w + column);
    for (int turn = 0; first < last; first += 2, turn ^= 1) {
        Pack pd[2] = {}, px[2] = {}, old[2] = {};
        float m[2] = {}, s[2] = {}, total[4] = {};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (first + i >= last) continue;
            size_t at = size_t(first + i) * C + column;
            m[i] = mean[first + i];
            s[i] = rstd[first + i];
            if (inside) pd[i] = load_pack(dy + at);
            if (inside) px[i] = load_pack(x + at);
            if (inside && accumulate) old[i] = load_pack(dx + at);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            for (int k = 0; k < PACK; k++) {
                float d = to_float(pd[i].x[k]), n = (to_float(px[i].x[k]) - m[i]) * s[i];
                dw[k] += d * n;
                db[k] += d;
                total[2 * i] += d * to_float(pw.x[k]);
                total[2 * i + 1] += d * to_float(pw.x[k]) * n;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            total[i] = warp_sum(total[i]);
            if (lane == 0) sums[turn][i][warp] = total[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            total[i] = 0;
            for (int k = 0; k < warps; k++) total[i] += sums[turn][i][k];
            total[i] /= C;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (!inside || first + i >= last) continue;
            for (int k = 0; k < PACK; k++) {
                float n = (to_float(px[i].x[k]) - m[i]) * s[i];
                float d = to_float(pd[i].x[k]) * to_float(pw.x[k]);
                d = (d - total[2 * i] - n * total[2 * i + 1]) * s[i];
                store(&pd[i].x[k], to_float(old[i].x[k]) + d);
                below[k] += to_float(pd[i].x[k]);
            }
            store_pack(dx + size_t(first + i) * C + column, pd[i]);
        }
    }
    for (int k = 0; k < PACK && inside; k++) {
        float* to = partial + size_t(blockIdx.x) * 3 * C + column + k;
        to[0] = dw[k];
        to[C] = db[k];
        to[2 * C] = below[k];
    }
}

enum { BANDS = 1024, BAND = 8 };  // at most so many, of at least so many rows

static int band_of(int64_t N) { return int(std::max<int64_t>(BAND, (N + BANDS - 1) / BANDS)); }

// ---- GELU, GPT-2's tanh form: x/2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)

static const float GELU_SCALE = 0.797884561f;

// GELU with two bits kept of each x. Its derivative is then a step function: the sum of a_i over
// x > c_i (Approx-BP, arXiv 2406.16282, section 4.2). The forward pass stays exact.
__device__ static const float GELU_CUTS[3] = {-3.1858810036855245f, -0.001178821281161997f,
                                              3.190832613414926f};
__device__ static const float GELU_SLOPES[4] = {0.0f, -0.04922261145617846f, 1.0487405950855512f,
                                                1.0f};

// A block a row of n = 4C, which stands in dynamic shared memory too if it is to be folded. Reads
// x; writes y, which may be x; folded, z; and bits (n / 4 bytes a row) where they are wanted: how
// many cuts lie below x, four elements a byte, the first in the lowest bits.
__global__ void __launch_bounds__(256)
    gelu_forward_kernel(floatX* y, uint8_t* bits, const floatX* x, Fold fold, int n) {
    extern __shared__ int4 rows[];
    floatX* row = (floatX*)rows;
    size_t at = size_t(blockIdx.x) * n;
    for (int j = threadIdx.x * PACK; j < n; j += blockDim.x * PACK) {
        Pack p = load_pack(x + at + j);
        uint32_t cuts = 0;
        for (int k = 0; k < PACK; k++) {
            float v = to_float(p.x[k]), u = GELU_SCALE * (v + 0.044715f * v * v * v);
            for (int i = 0; i < 3; i++) cuts += uint32_t(v > GELU_CUTS[i]) << 2 * k;
            store(&p.x[k], v / (1.0f + __expf(-2.0f * u)));
        }
        store_pack(y + at + j, p);
        if (fold.z) store_pack(row + j, p);
        for (int k = 0; bits && k < PACK; k += 4) bits[(at + j + k) / 4] = uint8_t(cuts >> 2 * k);
    }
    __syncthreads();
    if (fold.z) fold_row(fold, blockIdx.x, row, threadIdx.x, blockDim.x);
}

static void gelu_forward(floatX* y, uint8_t* bits, const floatX* x, Fold fold, int N, int n) {
    gelu_forward_kernel<<<N, 256, fold.z ? n * sizeof(floatX) : 0>>>(y, bits, x, fold, n);
    LAUNCHED();
}

// d (N, n) *= gelu'(x), in place, or the step function where bits are given; on the way the sums of
// d's columns, for the bias. Grid and block as column_sums. Reads d and x once.
__global__ void __launch_bounds__(SUM_ROWS* SUM_PACKS)
    gelu_backward_kernel(floatX* d, float* partial, const floatX* x, const uint8_t* bits, int N,
                         int n) {
    int column = blockIdx.x * SUM_COLUMNS + threadIdx.x * PACK, rows = (N + SLABS - 1) / SLABS;
    int last = min(N, int(blockIdx.y + 1) * rows);
    float sum[PACK] = {};
    for (int i = blockIdx.y * rows + threadIdx.y; i < last && column < n; i += SUM_ROWS) {
        size_t at = size_t(i) * n + column;
        Pack pd = load_pack(d + at), px = {};
        uint32_t cuts = 0;
        if (!bits) px = load_pack(x + at);
        for (int k = 0; bits && k < PACK; k += 4) cuts |= uint32_t(bits[(at + k) / 4]) << 2 * k;
        for (int k = 0; k < PACK; k++) {
            float slope = GELU_SLOPES[cuts >> 2 * k & 3];
            if (!bits) {
                float v = to_float(px.x[k]), u = GELU_SCALE * (v + 0.044715f * v * v * v);
                float du = GELU_SCALE * (1.0f + 0.134145f * v * v);
                float sigmoid = 1.0f / (1.0f + __expf(-2.0f * u));
                slope = sigmoid + v * sigmoid * (1.0f - sigmoid) * 2.0f * du;
            }
            store(&pd.x[k], to_float(pd.x[k]) * slope);
            sum[k] += to_float(pd.x[k]);
        }
        store_pack(d + at, pd);
    }
    store_column_sums(partial, sum, n);
}

// As above; db (n) += the sums of d's columns.
static void gelu_backward(floatX* d, float* db, float* partial, const floatX* x,
                          const uint8_t* bits, int N, int n) {
    dim3 grid(blocks_for(n, SUM_COLUMNS), SLABS), block(SUM_PACKS, SUM_ROWS);
    gelu_backward_kernel<<<grid, block>>>(d, partial, x, bits, N, n);
    LAUNCHED();
    add_partial(1, db, nullptr, nullptr, partial, SLABS, n);
}

// ---- int8 for what the tape keeps, a scale for each group of neighbours (after Mesa, 2111.11124)

static const float LEAST_SCALE = 1e-30f;  // a smaller one has no inverse: all codes are 0

enum { GROUP = 8 };  // lanes that share a group
struct alignas(PACK) Codes {
    int8_t x[PACK];  // of a pack: one load or store
};

// codes, x (groups, width), scales (groups): x = scale * code. The largest |x| has code +-127.
// GROUP lanes a group, 16 groups a block; width is a multiple of PACK. Reads x twice, the second
// time from the cache. A code is the lowest byte of the product's sum with 1.5 2^23, near which
// there are only whole numbers: a conversion would take four times as long.
__global__ void __launch_bounds__(128)
    quantize_kernel(int8_t* codes, floatX* scales, const floatX* x, int64_t groups, int width) {
    int64_t i = (int64_t(blockIdx.x) * 128 + threadIdx.x) / GROUP;
    int first = threadIdx.x % GROUP * PACK, last = i < groups ? width : 0;  // all lanes shuffle
    float most = 0;
    for (int j = first; j < last; j += GROUP * PACK) {
        Pack p = load_pack(x + i * width + j);
        for (int k = 0; k < PACK; k++) most = fmaxf(most, fabsf(to_float(p.x[k])));
    }
    for (int other = GROUP / 2; other > 0; other /= 2)
        most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, other));
    floatX rounded;
    store(&rounded, most / 127);
    float scale = to_float(rounded), inverse = scale < LEAST_SCALE ? 0 : 1 / scale;
    if (first == 0 && last > 0) scales[i] = rounded;
    for (int j = first; j < last; j += GROUP * PACK) {
        Pack p = load_pack(x + i * width + j);
        Codes c;
        for (int k = 0; k < PACK; k++)
            c.x[k] = int8_t(__float_as_int(__fmul_rn(to_float(p.x[k]), inverse) + 12582912.0f));
        *reinterpret_cast<Codes*>(codes + i * width + j) = c;
    }
}

__global__ void __launch_bounds__(128)
    dequantize_kernel(floatX* x, const int8_t* codes, const floatX* scales, int64_t groups,
                      int width) {
    int64_t i = (int64_t(blockIdx.x) * 128 + threadIdx.x) / GROUP;
    if (i >= groups) return;
    float scale = to_float(scales[i]);
    for (int j = threadIdx.x % GROUP * PACK; j < width; j += GROUP * PACK) {
        Codes c = *reinterpret_cast<const Codes*>(codes + i * width + j);
        Pack p;
        for (int k = 0; k < PACK; k++) store(&p.x[k], scale * c.x[k]);
        store_pack(x + i * width + j, p);
    }
}

// ---- attention for any type and head size, plain: tiles of ATT keys (or queries) with an online
// softmax, a block for each query (or key) of each head. lse (B, NH, T), the logarithm of the
// softmax's denominator, is kept for the backward pass. The tensor-core kernels below take bf16
// with heads of 64.

enum { ATT = 128, HEAD = 64, FLASH = 128 };

// products[j] = sum over d of x[d] rows[j, d] for j < count, 0 from there to ATT: x (hs) in shared
// memory, rows `stride` elements apart. 8 lanes a row: neighbours read neighbours. Has no barrier
// of its own.
__device__ inline void row_products(float* products, const float* x, const floatX* rows,
                                    size_t stride, int count, int hs) {
    const int LANES = 8;
    for (int j = threadIdx.x / LANES; j < ATT; j += ATT / LANES) {
        float sum = 0;
        for (int d = threadIdx.x % LANES; d < hs && j < count; d += LANES)
            sum += x[d] * to_float(rows[j * stride + d]);
        for (int other = LANES / 2; other > 0; other /= 2)
            sum += __shfl_xor_sync(0xFFFFFFFF, sum, other);
        if (threadIdx.x % LANES == 0) products[j] = sum;
    }
}

// out (N, C), qkv (N, 3C). Keys and values lie side by side in rows of `width`: in qkv, or, with
// `past` tokens before these, in the cache of a text that is being generated, which has no lse.
// Grid (B NH, T), block ATT, dynamic shared memory ATT + 2 hs + 32 floats.
__global__ void __launch_bounds__(ATT)
    attention_plain_forward(floatX* out, float* lse, const floatX* qkv, const floatX* kv, int width,
                            int past, int T, int C, int NH) {
    extern __shared__ float shared[];
    int hs = C / NH, t = blockIdx.y, b = blockIdx.x / NH, h = blockIdx.x % NH, tid = threadIdx.x;
    int last = past + t;
    float *p = shared, *q = p + ATT, *o = q + hs, *reduce = o + hs;
    const floatX* query = qkv + (size_t(b) * T + t) * 3 * C + h * hs;
    const floatX* keys = kv + size_t(b) * T * width + h * hs;
    float top = -INFINITY, sum = 0, scale = rsqrtf(float(hs));
    for (int d = tid; d < hs; d += ATT) {
        q[d] = to_float(query[d]);
        o[d] = 0;
    }
    __syncthreads();
    for (int k0 = 0; k0 <= last; k0 += ATT) {
        int count = min(int(ATT), last - k0 + 1);
        row_products(p, q, keys + size_t(k0) * width, width, count, hs);
        __syncthreads();
        float s = tid < count ? p[tid] * scale : -INFINITY;
        float most = fmaxf(top, block_reduce(s, reduce, true)), shrink = expf(top - most);
        p[tid] = expf(s - most);
        sum = sum * shrink + block_reduce(p[tid], reduce, false);  // its barriers serve p, too
        for (int d = tid; d < hs; d += ATT) {
            float total = o[d] * shrink;
            for (int j = 0; j < count; j++)
                total += p[j] * to_float(keys[size_t(k0 + j) * width + C + d]);
            o[d] = total;
        }
        top = most;
        __syncthreads();
    }
    for (int d = tid; d < hs; d += ATT)
        store(out + (size_t(b) * T + t) * C + h * hs + d, o[d] / sum);
    if (tid == 0 && lse) lse[size_t(blockIdx.x) * T + t] = top + logf(sum);
}

// Keys and values of qkv's rows (3C) go behind the `past` rows (2C) of the cache; a block a row.
__global__ void cache_kernel(floatX* cache, const floatX* qkv, int past, int C) {
    int64_t row = blockIdx.x;
    for (int j = threadIdx.x * PACK; j < 2 * C; j += blockDim.x * PACK)
        store_pack(cache + (past + row) * 2 * C + j, load_pack(qkv + row * 3 * C + C + j));
}

// dq, of one query a block: ds = p (dp - dot) scale, dq = ds k; and dot (B, NH, T), the sum of
// dout out over a head. Grid, block and shared memory (2 ATT + 3 hs floats) as forward.
__global__ void __launch_bounds__(ATT)
    attention_plain_dq(floatX* dqkv, float* dot, const floatX* dout, const floatX* qkv,
                       const floatX* out, const float* lse, int T, int C, int NH) {
    __shared__ float reduce[WARP];
    extern __shared__ float shared[];
    int hs = C / NH, t = blockIdx.y, b = blockIdx.x / NH, h = blockIdx.x % NH, tid = threadIdx.x;
    float *ds = shared, *dp = ds + ATT, *q = dp + ATT, *dout_t = q + hs, *dq = dout_t + hs;
    const floatX* base = qkv + size_t(b) * T * 3 * C + h * hs;
    size_t row = size_t(blockIdx.x) * T + t, at = (size_t(b) * T + t) * C + h * hs;
    float scale = rsqrtf(float(hs)), log_sum = lse[row], dot_t = 0;
    for (int d = tid; d < hs; d += ATT) {
        q[d] = to_float(base[size_t(t) * 3 * C + d]);
        dout_t[d] = to_float(dout[at + d]);
        dot_t += dout_t[d] * to_float(out[at + d]);
        dq[d] = 0;
    }
    dot_t = block_reduce(dot_t, reduce, false);  // its barriers serve q and dout_t, too
    if (tid == 0) dot[row] = dot_t;
    for (int k0 = 0; k0 <= t; k0 += ATT) {
        int keys = min(int(ATT), t - k0 + 1);
        const floatX* k = base + size_t(k0) * 3 * C + C;
        row_products(ds, q, k, 3 * C, keys, hs);
        row_products(dp, dout_t, k + C, 3 * C, keys, hs);
        __syncthreads();
        float p = expf(ds[tid] * scale - log_sum);
        ds[tid] = tid < keys ? p * (dp[tid] - dot_t) * scale : 0.0f;
        __syncthreads();
        for (int d = tid; d < hs; d += ATT)
            for (int j = 0; j < keys; j++)
                dq[d] += ds[j] * to_float(base[size_t(k0 + j) * 3 * C + C + d]);
        __syncthreads();
    }
    for (int d = tid; d < hs; d += ATT)
        store(dqkv + (size_t(b) * T + t) * 3 * C + h * hs + d, dq[d]);
}

// dk and dv, of one key a block: dv = p^T dout, dk = ds^T q. Dynamic shared memory 2 ATT + 4 hs
// floats.
__global__ void __launch_bounds__(ATT)
    attention_plain_dkv(floatX* dqkv, const floatX* dout, const floatX* qkv, const float* lse,
                        const float* dot, int T, int C, int NH) {
    extern __shared__ float shared[];
    int hs = C / NH, t = blockIdx.y, b = blockIdx.x / NH, h = blockIdx.x % NH, tid = threadIdx.x;
    float *p = shared, *ds = p + ATT, *k = ds + ATT, *v = k + hs, *dk = v + hs, *dv = dk + hs;
    const floatX* base = qkv + size_t(b) * T * 3 * C + h * hs;
    const floatX* dout_b = dout + size_t(b) * T * C + h * hs;
    float scale = rsqrtf(float(hs));
    for (int d = tid; d < hs; d += ATT) {
        k[d] = to_float(base[size_t(t) * 3 * C + C + d]);
        v[d] = to_float(base[size_t(t) * 3 * C + 2 * C + d]);
        dk[d] = dv[d] = 0;
    }
    __syncthreads();
    for (int q0 = t; q0 < T; q0 += ATT) {
        int i = q0 + tid, queries = min(int(ATT), T - q0);
        size_t row = size_t(blockIdx.x) * T + i;
        row_products(p, k, base + size_t(q0) * 3 * C, 3 * C, queries, hs);
        row_products(ds, v, dout_b + size_t(q0) * C, C, queries, hs);
        __syncthreads();
        p[tid] = i < T ? expf(p[tid] * scale - lse[row]) : 0.0f;
        ds[tid] = i < T ? p[tid] * (ds[tid] - dot[row]) * scale : 0.0f;
        __syncthreads();
        for (int d = tid; d < hs; d += ATT) {
            for (int j = 0; j < queries; j++) {
                dv[d] += p[j] * to_float(dout_b[size_t(q0 + j) * C + d]);
                dk[d] += ds[j] * to_float(base[size_t(q0 + j) * 3 * C + d]);
            }
        }
        __syncthreads();
    }
    floatX* to = dqkv + (size_t(b) * T + t) * 3 * C + C + h * hs;
    for (int d = tid; d < hs; d += ATT) {
        store(to + d, dk[d]);
        store(to + C + d, dv[d]);
    }
}

#ifndef PRECISION_FP32
// ---- attention on tensor cores: FlashAttention-2 (arXiv 2307.08691) with mma.sync, heads of 64. A
// block of 4 warps takes 128 queries (or keys), 32 a warp, and walks the keys (or queries) in tiles
// of 64, which come by cp.async, the next one while this one is used. What a warp reads of a tile
// in shared memory serves its 32 rows: with 16, reading would take longer than multiplying.
// Products go by 8 columns: s[j] is 32 rows by columns 8j..8j+7.

enum { TILE = 64, FLASH_THREADS = 128 };
static const float LOG2E = 1.44269504f,
                   FLASH_SCALE = LOG2E / 8;  // the softmax is one of powers of 2

#ifndef __NOGPU__                             // compute capability 8.0 and newer
__device__ inline float exp2_fast(float x) {  // exp2f in one instruction; below 2^-126 it is 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline uint32_t shared_address(const void* p) {
    return uint32_t(__cvta_generic_to_shared(p));
}

// d (16 x 8, fp32) += a (16 x 16, bf16, by rows) b (16 x 8, bf16, by columns), over a warp. In the
// PTX ISA's layout lane 4g + t holds rows g and g + 8 of d, columns 2t and 2t + 1.
__device__ inline void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of bf16 from shared memory: lanes 8i to 8i + 7 point to the rows of matrix i.
// trans: each transposed.
__device__ inline void ldmatrix_x4(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ inline void ldmatrix_x4_trans(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// 16 bytes from global to shared memory, behind the compute; zeros, without reading, when not
// valid.
__device__ inline void cp_async_16_zfill(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int N>
__device__ inline void cp_async_wait() {  // until at most N groups of this thread are on their way
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}
#endif

// A tile is TILE rows, with 16 bytes to spare each: so the 8 rows that ldmatrix reads at once lie
// in different banks.
typedef __nv_bfloat16 Row[HEAD + 8];

// Rows first..first+63 and 64 columns of a matrix with leading dimension ld; zeros from row `rows`
// on.
__device__ inline void load_tile(Row* tile, const __nv_bfloat16* from, int ld, int column,
                                 int first, int rows) {
    int row = threadIdx.x / 8, d = threadIdx.x % 8 * 8;
    from += int64_t(first + row) * ld + column + d;
    for (int i = 0; i < TILE; i += FLASH_THREADS / 8)
        cp_async_16_zfill(&tile[row + i][d], from + int64_t(i) * ld, first + row + i < rows);
}

// This warp's 32 of 128 rows as the mma's left operand: a[m][k] is rows 16m..16m+15, columns
// 16k..16k+15.
__device__ inline void load_rows(uint32_t a[2][4][4], const Row* rows) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int m = 0; m < 2; m++)
        for (int k = 0; k < 4; k++)
            ldmatrix_x4(a[m][k], &rows[32 * warp + 16 * m + lane % 16][16 * k + lane / 16 * 8]);
}

// s (32, 8) += a (32, 64) times 8 rows of a tile, transposed: a column of s for each row
__device__ inline void add_times_transpose(float s[2][4], const uint32_t a[2][4][4],
                                           const Row* rows) {
    int lane = threadIdx.x % WARP;
    for (int k = 0; k < 4; k += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, &rows[lane % 8][16 * k + lane / 8 * 8]);
        for (int m = 0; m < 2; m++) {
            mma_m16n8k16_bf16(s[m], a[m][k], b);
            mma_m16n8k16_bf16(s[m], a[m][k + 1], b + 2);
        }
    }
}

// o (32, 64) += s (32, 16), rounded to bf16, times 16 rows of a tile: an accumulator's layout is a
// left operand's.
__device__ inline void add_times(float o[8][2][4], const float s[2][2][4], const Row* rows) {
    int lane = threadIdx.x % WARP;
    uint32_t a[2][4];
    for (int m = 0; m < 2; m++) {
        for (int i = 0; i < 4; i++) {
            const float* pair = &s[i / 2][m][i % 2 * 2];
            __nv_bfloat162 two = __floats2bfloat162_rn(pair[0], pair[1]);
            memcpy(&a[m][i], &two, 4);
        }
    }
    for (int j = 0; j < 8; j += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, &rows[lane % 16][8 * j + lane / 16 * 8]);
        for (int m = 0; m < 2; m++) {
            mma_m16n8k16_bf16(o[j][m], a[m], b);
            mma_m16n8k16_bf16(o[j + 1][m], a[m], b + 2);
        }
    }
}

// Row and column, in 32 x 8, of this lane's element [m][i]. It holds four rows, r = 2m + i/2; four
// lanes share a row.
__device__ inline int row_of(int m, int i) { return 16 * m + threadIdx.x % WARP / 4 + i / 2 * 8; }
__device__ inline int column_of(int i) { return threadIdx.x % 4 * 2 + i % 2; }

// Hides from queries the keys after them: what is right of the diagonal where rows are queries
// (side 1), left of it where they are keys (side -1).
__device__ inline void hide(float s[2][4], int first_row, int first_column, int side) {
    for (int m = 0; m < 2; m++) {
        for (int i = 0; i < 4; i++) {
            int right = first_column + column_of(i) - first_row - row_of(m, i);
            if (right * side > 0) s[m][i] = -INFINITY;
        }
    }
}

// Writes this warp's 32 x 64, times scale, to 64 columns of a matrix: rows first.., those below
// `rows`.
__device__ inline void write_rows(__nv_bfloat16* to, int ld, int column, const float o[8][2][4],
                                  float scale, int first, int rows) {
    for (int r = 0; r < 4; r++) {
        int m = r / 2, i = r % 2 * 2, row = first + row_of(m, i);
        if (row >= rows) continue;
        __nv_bfloat16* at = to + int64_t(row) * ld + column + column_of(0);
        for (int j = 0; j < 8; j++) {
            const float* pair = &o[j][m][i];
            __nv_bfloat162 two = __floats2bfloat162_rn(pair[0] * scale, pair[1] * scale);
            *reinterpret_cast<__nv_bfloat162*>(at + 8 * j) = two;
        }
    }
}

// to (64) = the sums of the columns over a block, of whose 128 rows each thread has summed four:
// column 8j + column_of(i) in sums[j][i]. tile: room in shared memory.
__device__ inline void write_column_sums(float* to, Row* tile, const float sums[8][2]) {
    float(*rows)[HEAD + 8] = (float(*)[HEAD + 8]) tile;
    for (int j = 0; j < 8; j++) {
        float* pair = &rows[threadIdx.x / 4][8 * j + column_of(0)];
        *reinterpret_cast<float2*>(pair) = {sums[j][0], sums[j][1]};
    }
    __syncthreads();
    if (threadIdx.x >= HEAD) return;
    float total = 0;
    for (int i = 0; i < FLASH_THREADS / 4; i++) total += rows[i][threadIdx.x];
    to[threadIdx.x] = total;
}

// out (N, C), lse (B, NH, T), qkv (N, 3C). Grid (NH, ceil(T / 128), B), block 128. Reads k and v
// once for every 128 queries. A sequence's blocks run together, so what they read again, 3 MB at
// d12, is in the L2 cache.
__global__ void __launch_bounds__(FLASH_THREADS, 2)
    attention_flash_forward(__nv_bfloat16* out, float* lse, const __nv_bfloat16* qkv, int T, int C,
                            int NH) {
    __shared__ __align__(16) Row tiles[4][TILE];  // k and v, two of each; at first also q
    int h = blockIdx.x, begin = blockIdx.z * T, end = begin + T, column = h * HEAD;
    int q0 = (gridDim.y - 1 - blockIdx.y) * FLASH;  // the longest rows first
    int first = q0 + threadIdx.x / WARP * 32;
    float o[8][2][4] = {}, sum[4] = {}, top[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    uint32_t q[2][4][4];
    load_tile(tiles[0], qkv, 3 * C, column + C, begin, end);
    load_tile(tiles[1], qkv, 3 * C, column + 2 * C, begin, end);
    load_tile(tiles[2], qkv, 3 * C, column, begin + q0, end);
    load_tile(tiles[3], qkv, 3 * C, column, begin + q0 + TILE, end);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    load_rows(q, tiles[2]);
    int keys = min(q0 + FLASH, T);
    for (int k0 = 0; k0 < keys; k0 += TILE) {
        int stage = k0 / TILE % 2;
        Row(*now)[TILE] = tiles + 2 * stage, (*next)[TILE] = tiles + 2 * (1 - stage);
        cp_async_wait<0>();
        __syncthreads();  // now is there, next is done with
        if (k0 + TILE < keys) {
            load_tile(next[0], qkv, 3 * C, column + C, begin + k0 + TILE, end);
            load_tile(next[1], qkv, 3 * C, column + 2 * C, begin + k0 + TILE, end);
            cp_async_commit();
        }
        if (k0 >= first + 32) continue;  // all keys of the tile are after all queries of the warp
        float s[8][2][4] = {};
        for (int j = 0; j < 8; j++) add_times_transpose(s[j], q, now[0] + 8 * j);
        for (int j = 0; j < 8 && k0 + TILE > first; j++) hide(s[j], first, k0 + 8 * j, 1);
        for (int r = 0; r < 4; r++) {
            int m = r / 2, i = r % 2 * 2;
            float most = top[r];
            for (int j = 0; j < 8; j++) most = fmaxf(most, fmaxf(s[j][m][i], s[j][m][i + 1]));
            most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
            float shrink = exp2_fast((top[r] - most) * FLASH_SCALE);
            for (int j = 0; j < 8; j++) {
                o[j][m][i] *= shrink;
                o[j][m][i + 1] *= shrink;
            }
            sum[r] *= shrink;
            top[r] = most;
        }
        // The tensor cores take 16 columns while the next ones become powers.
        for (int j = 0; j < 8; j++) {
            for (int m = 0; m < 2; m++) {
                for (int i = 0; i < 4; i++) {
                    int r = 2 * m + i / 2;
                    s[j][m][i] = exp2_fast(s[j][m][i] * FLASH_SCALE - top[r] * FLASH_SCALE);
                    sum[r] += s[j][m][i];
                }
            }
            if (j % 2 == 1) add_times(o, s + j - 1, now[1] + 8 * (j - 1));
        }
    }
    for (int r = 0; r < 4; r++) {
        int m = r / 2, i = r % 2 * 2, row = first + row_of(m, i);
        sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], 2);
        float inverse = 1 / sum[r];
        for (int j = 0; j < 8; j++) {
            o[j][m][i] *= inverse;
            o[j][m][i + 1] *= inverse;
        }
        if (threadIdx.x % 4 == 0 && row < T)
            lse[size_t(blockIdx.z * NH + h) * T + row] = top[r] / 8 + logf(sum[r]);
    }
    write_rows(out, C, column, o, 1, begin + first, end);
}

// dq, and on the way dot (B, NH, T), the sums of dout out over a head, and partial (B T/128, 2, C),
// those of the block's dq and dout over its queries. Grid and block as forward. For each tile of
// keys: p again, dp = dout v^T, ds = p (dp - dot), dq += ds k.
__global__ void __launch_bounds__(FLASH_THREADS, 2)
    attention_flash_dq(__nv_bfloat16* dqkv, float* partial, float* dot, const __nv_bfloat16* dout,
                       const __nv_bfloat16* qkv, const __nv_bfloat16* out, const float* lse, int T,
                       int C, int NH) {
    __shared__ __align__(16) Row tiles[4][TILE];  // k and v, two of each; at first q and dout
    int h = blockIdx.x, begin = blockIdx.z * T, end = begin + T, column = h * HEAD;
    int q0 = (gridDim.y - 1 - blockIdx.y) * FLASH, first = q0 + threadIdx.x / WARP * 32;
    float dq[8][2][4] = {}, sum[4], dots[4], sums[8][2] = {};
    uint32_t q[2][4][4], d[2][4][4];
    for (int i = 0; i < 2; i++) {
        load_tile(tiles[i], qkv, 3 * C, column, begin + q0 + i * TILE, end);
        load_tile(tiles[2 + i], dout, C, column, begin + q0 + i * TILE, end);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    load_rows(q, tiles[0]);
    load_rows(d, tiles[2]);
    __syncthreads();
    load_tile(tiles[0], qkv, 3 * C, column + C, begin, end);
    load_tile(tiles[1], qkv, 3 * C, column + 2 * C, begin, end);
    cp_async_commit();
    for (int r = 0; r < 4; r++) {
        int row = first + row_of(r / 2, r % 2 * 2), inside = min(row, T - 1);
        size_t at = size_t(blockIdx.z * NH + h) * T + inside;
        const __nv_bfloat16* from = out + int64_t(begin + inside) * C + column + column_of(0);
        sum[r] = row < T ? lse[at] * LOG2E : INFINITY;  // beyond T p is 0, and so is dq
        dots[r] = 0;
        for (int j = 0; j < 8; j++) {
            __nv_bfloat162 x = *reinterpret_cast<const __nv_bfloat162*>(from + 8 * j), y;
            memcpy((void*)&y, &d[r / 2][j / 2][j % 2 * 2 + r % 2], 4);
            dots[r] += to_float(x.x) * to_float(y.x) + to_float(x.y) * to_float(y.y);
            sums[j][0] += to_float(y.x);
            sums[j][1] += to_float(y.y);
        }
        dots[r] += __shfl_xor_sync(0xFFFFFFFFu, dots[r], 1);
        dots[r] += __shfl_xor_sync(0xFFFFFFFFu, dots[r], 2);
        if (threadIdx.x % 4 == 0 && row < T) dot[at] = dots[r];
    }
    int block = blockIdx.z * gridDim.y + blockIdx.y;
    write_column_sums(partial + (2 * block + 1) * int64_t(C) + column, tiles[2], sums);
    int keys = min(q0 + FLASH, T);
    for (int k0 = 0; k0 < keys; k0 += TILE) {
        int stage = k0 / TILE % 2;
        Row(*now)[TILE] = tiles + 2 * stage, (*next)[TILE] = tiles + 2 * (1 - stage);
        cp_async_wait<0>();
        __syncthreads();
        if (k0 + TILE < keys) {
            load_tile(next[0], qkv, 3 * C, column + C, begin + k0 + TILE, end);
            load_tile(next[1], qkv, 3 * C, column + 2 * C, begin + k0 + TILE, end);
            cp_async_commit();
        }
        if (k0 >= first + 32) continue;
#pragma unroll
        for (int k = 0; k < TILE; k += 16) {
            float s[2][2][4] = {}, dp[2][2][4] = {};
            for (int j = 0; j < 2; j++) {
                add_times_transpose(s[j], q, now[0] + k + 8 * j);
                add_times_transpose(dp[j], d, now[1] + k + 8 * j);
            }
            for (int j = 0; j < 2 && k0 + TILE > first; j++) hide(s[j], first, k0 + k + 8 * j, 1);
            for (int j = 0; j < 2; j++) {
                for (int m = 0; m < 2; m++) {
                    for (int i = 0; i < 4; i++) {
                        int r = 2 * m + i / 2;
                        float p = exp2_fast(s[j][m][i] * FLASH_SCALE - sum[r]);
                        dp[j][m][i] = p * (dp[j][m][i] - dots[r]);
                    }
                }
            }
            add_times(dq, dp, now[0] + k);
        }
    }
    write_rows(dqkv, 3 * C, column, dq, 0.125f, begin + first, end);
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 2; i++)
            sums[j][i] = 0.125f * (dq[j][0][i] + dq[j][0][i + 2] + dq[j][1][i] + dq[j][1][i + 2]);
    __syncthreads();
    write_column_sums(partial + 2 * block * int64_t(C) + column, tiles[0], sums);
}

// dk and dv. Grid and block as forward, for keys. Walks the tiles of
// queries from the diagonal on, all transposed: s^T = k q^T, dp^T = v dout^T, dv += p^T dout,
// dk += ds^T q.
__global__ void __launch_bounds__(FLASH_THREADS, 2)
    attention_flash_dkv(__nv_bfloat16* dqkv, const __nv_bfloat16* dout, const __nv_bfloat16* qkv,
                        const float* lse, const float* dot, int T, int C, int NH) {
    __shared__ __align__(16) Row tiles[4][TILE];    // q and dout, two of each; at first k and v
    __shared__ float sums[2][TILE], dots[2][TILE];  // of the queries
    int h = blockIdx.x, begin = blockIdx.z * T, end = begin + T, column = h * HEAD;
    int k0 = blockIdx.y * FLASH, first = k0 + threadIdx.x / WARP * 32;
    float dk[8][2][4] = {}, dv[8][2][4] = {};
    uint32_t k[2][4][4], v[2][4][4];
    for (int i = 0; i < 2; i++) {
        load_tile(tiles[i], qkv, 3 * C, column + C, begin + k0 + i * TILE, end);
        load_tile(tiles[2 + i], qkv, 3 * C, column + 2 * C, begin + k0 + i * TILE, end);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    load_rows(k, tiles[0]);
    load_rows(v, tiles[2]);
    __syncthreads();
    load_tile(tiles[0], qkv, 3 * C, column, begin + k0, end);
    load_tile(tiles[1], dout, C, column, begin + k0, end);
    cp_async_commit();
    // Half of the threads fetch lse, half dot, a tile ahead; both are 0 beyond T, as q and dout
    // are.
    int query = threadIdx.x % TILE;
    auto fetch = [&](int t) {
        return t < T ? (threadIdx.x < TILE ? lse : dot)[size_t(blockIdx.z * NH + h) * T + t] : 0;
    };
    float ahead = fetch(k0 + query);
    for (int q0 = k0; q0 < T; q0 += TILE) {
        int stage = q0 / TILE % 2;
        Row(*now)[TILE] = tiles + 2 * stage, (*next)[TILE] = tiles + 2 * (1 - stage);
        float* to = threadIdx.x < TILE ? sums[stage] : dots[stage];
        to[query] = ahead * (threadIdx.x < TILE ? LOG2E : 1);
        cp_async_wait<0>();
        __syncthreads();
        if (q0 + TILE < T) {
            load_tile(next[0], qkv, 3 * C, column, begin + q0 + TILE, end);
            load_tile(next[1], dout, C, column, begin + q0 + TILE, end);
            cp_async_commit();
            ahead = fetch(q0 + TILE + query);
        }
        if (q0 + TILE <= first) continue;
#pragma unroll 1  // more at once, and registers run out
        for (int t = 0; t < TILE; t += 16) {
            float p[2][2][4] = {}, dp[2][2][4] = {};
            for (int j = 0; j < 2; j++) {
                add_times_transpose(p[j], k, now[0] + t + 8 * j);
                add_times_transpose(dp[j], v, now[1] + t + 8 * j);
            }
            for (int j = 0; j < 2 && q0 < first + 32; j++) hide(p[j], first, q0 + t + 8 * j, -1);
            for (int j = 0; j < 2; j++) {
                for (int m = 0; m < 2; m++) {
                    for (int i = 0; i < 4; i++) {
                        int at = t + 8 * j + column_of(i);
                        p[j][m][i] = exp2_fast(p[j][m][i] * FLASH_SCALE - sums[stage][at]);
                        dp[j][m][i] = p[j][m][i] * (dp[j][m][i] - dots[stage][at]);
                    }
                }
            }
            add_times(dv, p, now[1] + t);
            add_times(dk, dp, now[0] + t);
        }
    }
    write_rows(dqkv, 3 * C, column + C, dk, 0.125f, begin + first, end);
    write_rows(dqkv, 3 * C, column + 2 * C, dv, 1, begin + first, end);
}
#endif

static void attention_forward(floatX* out, float* lse, const floatX* qkv, int B, int T, int C,
                              int NH) {
    int hs = C / NH;
#ifndef PRECISION_FP32
    if (hs == HEAD) {
        dim3 grid(NH, blocks_for(T, FLASH), B);
        attention_flash_forward<<<grid, FLASH_THREADS>>>(out, lse, qkv, T, C, NH);
        return LAUNCHED();
    }
#endif
    attention_plain_forward<<<dim3(B * NH, T), ATT, (ATT + 2 * hs + 32) * sizeof(float)>>>(
        out, lse, qkv, qkv + C, 3 * C, 0, T, C, NH);
    LAUNCHED();
}

// The same for n tokens that follow `past` others. The cache (past + n, 2C) holds the keys and
// values of those; the new ones join them.
static void attention_cached(floatX* out, floatX* cache, const floatX* qkv, int past, int n, int C,
                             int NH) {
    int hs = C / NH;
    cache_kernel<<<n, 128>>>(cache, qkv, past, C);
    LAUNCHED();
    attention_plain_forward<<<dim3(NH, n), ATT, (ATT + 2 * hs + 32) * sizeof(float)>>>(
        out, nullptr, qkv, cache, 2 * C, past, n, C, NH);
    LAUNCHED();
}

// dqkv (N, 3C) = gradient; db (3C) += the sums of its columns; partial and dot (B, NH, T) are
// workspace. On tensor cores: a query's softmax sums to 1, so the sum of dv is that of dout, and
// that of dk is 0.
static void attention_backward(floatX* dqkv, float* db, float* partial, float* dot,
                               const floatX* dout, const floatX* qkv, const floatX* out,
                               const float* lse, int B, int T, int C, int NH) {
    int hs = C / NH;
#ifndef PRECISION_FP32
    if (hs == HEAD) {
        dim3 grid(NH, blocks_for(T, FLASH), B);
        attention_flash_dq<<<grid, FLASH_THREADS>>>(dqkv, partial, dot, dout, qkv, out, lse, T, C,
                                                    NH);
        LAUNCHED();
        add_partial(2, db, db + 2 * C, nullptr, partial, B * grid.y, C);
        attention_flash_dkv<<<grid, FLASH_THREADS>>>(dqkv, dout, qkv, lse, dot, T, C, NH);
        return LAUNCHED();
    }
#endif
    dim3 grid(B * NH, T);
    attention_plain_dq<<<grid, ATT, (2 * ATT + 3 * hs) * sizeof(float)>>>(dqkv, dot, dout, qkv, out,
                                                                          lse, T, C, NH);
    LAUNCHED();
    attention_plain_dkv<<<grid, ATT, (2 * ATT + 4 * hs) * sizeof(float)>>>(dqkv, dout, qkv, lse,
                                                                           dot, T, C, NH);
    LAUNCHED();
    sum_columns(db, partial, dqkv, B * T, 3 * C);
}

// ---- softmax and cross entropy

// A pack of logits, of which `words` are words': the padding counts as -infinity. Its exponential
// is 0, and so is its gradient.
__device__ inline Pack without_padding(Pack p, int words) {
    for (int k = 0; k < PACK && words < PACK; k++)
        if (k >= words) store(&p.x[k], -INFINITY);
    return p;
}

// A thread's running maximum, and its sum of exponentials relative to that (Milakov and Gimelshein,
// arXiv 1805.02867): 9 exponentials a pack.
__device__ inline void add_exponentials(const Pack& p, float* most, float* sum) {
    float larger = *most;
    for (int k = 0; k < PACK; k++) larger = fmaxf(larger, to_float(p.x[k]));
    *sum *= __expf(*most - larger);
    for (int k = 0; k < PACK; k++) *sum += __expf(to_float(p.x[k]) - larger);
    *most = larger;
}

// losses (rows); logits (rows, ld) become their gradient, times scale. Padded words, V and above,
// get 0. A target of -1 is not predicted: no loss, no gradient. A block a row, read twice: for
// maximum and sum, and for the gradient. Blocks are so large that the rows of those that run at
// once, 26 MB on an H100, stay in the L2 cache between the two.
__global__ void __launch_bounds__(1024)
    cross_entropy_kernel(floatX* logits, float* losses, const int* targets, int V, int ld,
                         float scale, bool gradient) {
    __shared__ float reduce[WARP];
    floatX* row = logits + size_t(blockIdx.x) * ld;
    int target = targets[blockIdx.x];
    float own = -INFINITY, sum = 0, wanted = to_float(row[max(target, 0)]);
    for (int j = threadIdx.x * PACK; j < V; j += blockDim.x * PACK)
        add_exponentials(without_padding(load_pack(row + j), V - j), &own, &sum);
    float most = block_reduce(own, reduce, true);
    sum = block_reduce(sum * __expf(own - most), reduce, false);
    if (target < 0) scale = 0;
    if (threadIdx.x == 0) losses[blockIdx.x] = target < 0 ? 0.0f : logf(sum) + most - wanted;
    float factor = scale / sum;
    for (int j = threadIdx.x * PACK; j < ld && gradient; j += blockDim.x * PACK) {
        Pack p = without_padding(load_pack(row + j), V - j);
        for (int k = 0; k < PACK; k++) {
            float y = __expf(to_float(p.x[k]) - most) * factor;
            store(&p.x[k], j + k == target ? y - scale : y);
        }
        store_pack(row + j, p);
    }
}

// ---- matrix products: cuBLAS, which thinks in columns: a row-major c = a b is its c^T = b^T a^T

static cublasHandle_t cublas;
static void* products_workspace;  // ours, so that no result depends on what else it serves
enum { CUBLAS_BYTES = 32 << 20 };

// c (M, N) = alpha a b + beta c, all row-major; a is (M, K), or (K, M) when ta; b is (K, N), or
// (N, K) when tb. a and b have one type, c its own; sums are fp32. With beta = 0, c is not read.
// lda and ldc: elements from row to row, 0 where rows are tight.
static void matmul(void* c, cudaDataType_t type_c, const void* a, bool ta, const void* b, bool tb,
                   cudaDataType_t type_ab, int M, int N, int K, float alpha, float beta,
                   int lda = 0, int ldc = 0) {
    if (lda == 0) lda = ta ? M : K;
    if (ldc == 0) ldc = N;
    cublasOperation_t op_a = ta ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    CUDA(cublasGemmEx(cublas, op_b, op_a, N, M, K, &alpha, b, type_ab, tb ? K : N, a, type_ab, lda,
                      &beta, c, type_c, ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// Elements from matrix to matrix of a batch: each begins on 16 bytes.
static int64_t stride_of(int64_t rows, int64_t columns) { return (rows * columns + 7) / 8 * 8; }

// d = alpha a b + beta c + bias, as above, for `batch` matrices of one type, all tight; d may be c.
// The bias (N) may be null. It joins the fp32 sum, so d is written once. This is cublasLt, a part
// of cuBLAS that takes its handle. What it chooses follows from shapes and from alignment, that of
// the bias and 16 bytes for all else: so whatever is computed again has the same bits.
static void matmul_lt(floatX* d, const floatX* c, const floatX* a, bool ta, const floatX* b,
                      bool tb, int M, int N, int K, float alpha, float beta, const floatX* bias,
                      int batch) {
    const int32_t op_a = ta ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    const uint32_t epilogue = bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    const uint32_t alignment = 16, sums = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const uint64_t bytes = CUBLAS_BYTES;
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t of_a, of_b, of_d;
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t chosen;
    int found;
    CUDA(cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    auto set = [&](cublasLtMatmulDescAttributes_t what, const void* value, size_t size) {
        CUDA(cublasLtMatmulDescSetAttribute(&product, what, value, size));
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, &op_b, sizeof(op_b));
    set(CUBLASLT_MATMUL_DESC_TRANSB, &op_a, sizeof(op_a));
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof(epilogue));
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof(bias));
    auto lay_out = [&](cublasLtMatrixLayout_t of, int rows, int columns) {
        int64_t stride = stride_of(rows, columns);
        CUDA(cublasLtMatrixLayoutInit(of, CUDA_X, columns, rows, columns));
        CUDA(cublasLtMatrixLayoutSetAttribute(of, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch,
                                              sizeof(batch)));
        CUDA(cublasLtMatrixLayoutSetAttribute(of, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                              &stride, sizeof(stride)));
    };
    lay_out(&of_a, ta ? K : M, ta ? M : K);
    lay_out(&of_b, tb ? N : K, tb ? K : N);
    lay_out(&of_d, M, N);
    CUDA(cublasLtMatmulPreferenceInit(&preference));
    auto prefer = [&](cublasLtMatmulPreferenceAttributes_t what, const void* value, size_t size) {
        CUDA(cublasLtMatmulPreferenceSetAttribute(&preference, what, value, size));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes));
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &sums, sizeof(sums));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &alignment, sizeof(alignment));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignment, sizeof(alignment));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignment, sizeof(alignment));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignment, sizeof(alignment));
    auto handle = (cublasLtHandle_t)cublas;
    CUDA(cublasLtMatmulAlgoGetHeuristic(handle, &product, &of_b, &of_a, &of_d, &of_d, &preference,
                                        1, &chosen, &found));
    CUDA(cublasLtMatmul(handle, &product, &alpha, b, &of_b, a, &of_a, &beta, c, &of_d, d, &of_d,
                        &chosen.algo, products_workspace, CUBLAS_BYTES, nullptr));
}

// =================================================================================================
// the compressed linear layer: follow z through it. x becomes z (make_z, or a fold in the kernel
// that made x), z is kept (linear_forward), z makes the gradient (linear_backward), and the step
// goes back to W (lift).
// =================================================================================================

// A linear layer of one block: its shape, its tensors, and what its P is drawn from.
struct LinearLayer {
    Linear shape;           // m outputs, n inputs, rank r
    floatX *w, *b;          // (m, n), (m)
    float* dw;              // (m, r)
    floatX* z;              // (N, r) on the tape, or null: z is then made in the backward pass,
    floatX* z_now;          // (N, r) here
    int projection;         // the kind of P
    uint64_t seed, stream;  // P's numbers: they depend on layer, linear and epoch
    floatX* p;              // a dense P (n, r), where it stands once it is drawn
    float* sign;            // a sparse one: (n) signs,
    int* shift;             // and a rotation for each stripe of r inputs
};

// P (n, r) with E[P P^T] = I, drawn anew wherever it is needed, by cuRAND's Philox. gaussian:
// N(0, 1/r) (CompAct, section 3.1). rademacher: signs / sqrt(r). sparse: one sign in each row,
// sign[k], in column (k + shift[k / r]) mod r, so that z is a signed fold of x.

// A thread a block of Philox: 4 numbers.
__global__ void gaussian_kernel(floatX* p, int64_t count, float scale, uint64_t seed,
                                uint64_t stream) {
    int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * QUAD;
    if (i >= count) return;
    curandStatePhilox4_32_10_t state;
    curand_init(seed, stream, i, &state);
    float4 x = curand_normal4(&state);
    store_quad(p + i, {scale * x.x, scale * x.y, scale * x.z, scale * x.w});
}

// Signs i, i+1, ... by the low bits of the result: bit i % 128 of block i / 128, 1 for minus.
__device__ inline uint32_t random_signs(uint64_t seed, uint64_t stream, int64_t i) {
    uint4 bits = philox_block(seed, stream, i / 128);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    return words[i % 128 / 32] >> i % 32;
}

// A thread 8 signs.
__global__ void rademacher_kernel(floatX* p, int64_t count, float scale, uint64_t seed,
                                  uint64_t stream) {
    int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (i >= count) return;
    uint32_t bits = random_signs(seed, stream, i);
    for (int k = 0; k < 8; k++) store(p + i + k, bits >> k & 1 ? -scale : scale);
}

// A thread an input, and a stripe.
__global__ void sparse_kernel(float* sign, int* shift, int n, int r, uint64_t seed,
                              uint64_t stream) {
    int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= n) return;
    sign[k] = random_signs(seed, stream, k) & 1 ? -1.0f : 1.0f;
    if (int64_t(k) * r < n) shift[k] = philox_block(seed, stream, (1ull << 32) + k).x % r;
}

static void draw_projection(floatX* p, float* sign, int* shift, const Linear& shape, int projection,
                            uint64_t seed, uint64_t stream) {
    int n = shape.n, r = shape.r;
    int64_t count = int64_t(n) * r;
    float scale = 1.0f / sqrtf(float(r));
    if (projection == GAUSSIAN)
        gaussian_kernel<<<blocks_for(count, 256 * QUAD), 256>>>(p, count, scale, seed, stream);
    if (projection == RADEMACHER)
        rademacher_kernel<<<blocks_for(count, 256 * 8), 256>>>(p, count, scale, seed, stream);
    if (projection == SPARSE)
        sparse_kernel<<<blocks_for(n, 256), 256>>>(sign, shift, n, r, seed, stream);
    LAUNCHED();
}

// The present P of a layer, drawn to its place.
static const floatX* projection_now(const LinearLayer& linear) {
    draw_projection(linear.p, linear.sign, linear.shift, linear.shape, linear.projection,
                    linear.seed, linear.stream);
    return linear.p;
}

// What the kernel that produces x (N, n) needs to fold it into z (N, r) on the way: nothing where z
// is not wanted, or P is dense.
static Fold fold_into(const LinearLayer& linear, floatX* z) {
    if (!z || linear.projection != SPARSE) return Fold{};
    projection_now(linear);
    return Fold{z, linear.sign, linear.shift, linear.shape.n, linear.shape.r};
}

// A block a row of an x that is there already.
__global__ void __launch_bounds__(256) fold_kernel(Fold fold, const floatX* x) {
    fold_row(fold, blockIdx.x, x + size_t(blockIdx.x) * fold.n, threadIdx.x, blockDim.x);
}

// x (N, n) -> z (N, r) = x P, for an x that is there already. Dense P is (n, r).
static void make_z(const LinearLayer& linear, floatX* z, const floatX* x, int N) {
    int n = linear.shape.n, r = linear.shape.r;
    if (linear.projection == SPARSE) {
        fold_kernel<<<N, 256>>>(fold_into(linear, z), x);
        return LAUNCHED();
    }
    matmul(z, CUDA_X, x, false, projection_now(linear), false, CUDA_X, N, r, n, 1.0f, 0.0f);
}

// x (N, n) -> y (N, m) = x W^T, plus b where with_bias (else whoever takes y adds it). x is whole
// here: y is exact. When training, z (N, r) = x P is kept for the backward pass, and x may be
// overwritten. A sparse z is there by now, from the kernel that made x.
static void linear_forward(const LinearLayer& linear, floatX* y, const floatX* x, int N,
                           bool with_bias, bool training) {
    int m = linear.shape.m, n = linear.shape.n;
    if (with_bias)
        matmul_lt(y, y, x, false, linear.w, true, N, m, n, 1.0f, 0.0f, linear.b, 1);
    else
        matmul(y, CUDA_X, x, false, linear.w, true, CUDA_X, N, m, n, 1.0f, 0.0f);
    if (training && linear.z && linear.projection != SPARSE) make_z(linear, linear.z, x, N);
}

// dy (N, m), z (N, r) -> G (m, r) = dy^T z, added to beta times what stands there; at full rank
// dy^T x (m, n). dy -> dx (N, n) = dy W, exact. The bias's gradient, the sum of dy, comes from the
// kernels that made dy. x may be null where z is on the tape or, sparse, in z_now already. It may
// be dx itself, since it is read first.
static void linear_backward(const LinearLayer& linear, floatX* dx, const floatX* dy,
                            const floatX* x, int N, float beta) {
    int m = linear.shape.m, n = linear.shape.n, r = linear.shape.r;
    const floatX* kept = x;
    if (linear.shape.compressed()) {
        kept = linear.z ? linear.z : linear.z_now;
        if (!linear.z && x) make_z(linear, linear.z_now, x, N);
    }
    matmul(linear.dw, CUDA_R_32F, dy, true, kept, false, CUDA_X, m, r, N, 1.0f, beta);
    matmul(dx, CUDA_X, dy, false, linear.w, false, CUDA_X, N, n, m, 1.0f, 0.0f);
}

// ---- the step's way back. How a weight is moved, and rounded, is the same for all parameters.

// A parameter's share of one layer, as the optimizer moves it. master: fp32 copies, w itself in
// fp32, or null where there are none. stochastic: the result is rounded to bf16, up or down at
// random, so that its mean is exact; element i is then moved by 16 bits of block (first + i) / 8 of
// a stream.
struct Weights {
    floatX* w;
    float* master;
    bool stochastic;
    uint64_t seed, stream;
    int64_t first;
};

__device__ inline float round_stochastically(float x, uint32_t random) {
    return __uint_as_float((__float_as_uint(x) + (random & 0xFFFF)) & 0xFFFF0000u);
}

// Weights i to i + 3: keep w - step u.
__device__ inline void move_weights(const Weights& to, size_t i, float4 u, float keep, float step) {
    float4 x = to.master ? load_quad(to.master + i) : load_quad(to.w + i);
    x = {keep * x.x - step * u.x, keep * x.y - step * u.y, keep * x.z - step * u.z,
         keep * x.w - step * u.w};
    if (to.stochastic) {
        uint4 random = philox_block(to.seed, to.stream, (to.first + i) / 8);
        uint32_t low = i % 8 ? random.z : random.x, high = i % 8 ? random.w : random.y;
        x = {round_stochastically(x.x, low), round_stochastically(x.y, low >> 16),
             round_stochastically(x.z, high), round_stochastically(x.w, high >> 16)};
    }
    if (to.master) store_quad(to.master + i, x);
    if (IS_BF16) store_quad(to.w + i, x);
}

// w = the rounding of master, to bf16 in any case where `narrow`
__global__ void round_kernel(floatX* w, const float* master, size_t count, bool narrow) {
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * QUAD;
    if (i >= count) return;
    float4 x = load_quad(master + i);
    auto rounded = [](float y) { return __bfloat162float(__float2bfloat16_rn(y)); };
    if (narrow) x = {rounded(x.x), rounded(x.y), rounded(x.z), rounded(x.w)};
    store_quad(w + i, x);
}

static void round_weights(floatX* w, const float* master, size_t count, bool narrow) {
    round_kernel<<<blocks_for(count, 256 * QUAD), 256>>>(w, master, count, narrow);
    LAUNCHED();
}

// W = keep W - step * u, u (m, n) of either type
__global__ void lift_kernel(Weights to, const float* u, const floatX* narrow, size_t count,
                            float keep, float step) {
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * QUAD;
    if (i >= count) return;
    move_weights(to, i, u ? load_quad(u + i) : load_quad(narrow + i), keep, step);
}

static void lift_whole(const Weights& to, const float* u, const floatX* narrow, size_t count,
                       float keep, float step) {
    lift_kernel<<<blocks_for(count, 256 * QUAD), 256>>>(to, u, narrow, count, keep, step);
    LAUNCHED();
}

// U (m, r), a dense P (n, r) -> W (m, n) = keep W - step U P^T: the step of the small space, lifted
// (CompAct, algorithm 2). lifted: (m, n) where weights have no master copies. A sparse P lifts as
// it steps, in sparse_update_kernel.
static void lift(const LinearLayer& linear, const Weights& to, const floatX* u, float keep,
                 float step, float* lifted) {
    int m = linear.shape.m, n = linear.shape.n, r = linear.shape.r;
    size_t count = size_t(m) * n;
    const floatX* p = projection_now(linear);
    if (to.stochastic) {
        matmul(lifted, CUDA_R_32F, u, false, p, true, CUDA_X, m, n, r, 1.0f, 0.0f);
        return lift_whole(to, lifted, nullptr, count, keep, step);
    }
    matmul(to.master, CUDA_R_32F, u, false, p, true, CUDA_X, m, n, r, -step, keep);
    if (IS_BF16) round_weights(to.w, to.master, count, false);
}

// =================================================================================================
// the optimizer: a gradient becomes a step. AdamW for all that is no linear layer's weight; AdamW
// or Muon for those, in the space of their gradients.
// =================================================================================================

// ---- global norm: at most NORM_BLOCKS partial sums, each over its own stride of all gradients,
// then their sum in one block: no atomics

enum { NORM_BLOCKS = 1024 };

__global__ void __launch_bounds__(256)
    squares_kernel(float* partial, const float* grads, size_t count) {
    __shared__ float reduce[WARP];
    float sum = 0;
    size_t first = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * QUAD;
    for (size_t i = first; i < count; i += size_t(gridDim.x) * blockDim.x * QUAD) {
        float4 g = load_quad(grads + i);
        sum += g.x * g.x + g.y * g.y + g.z * g.z + g.w * g.w;
    }
    sum = block_reduce(sum, reduce, false);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// norm[0] = the norm, norm[1] = what gradients are multiplied with so that it is at most clip
// (0: not clipped)
__global__ void __launch_bounds__(256)
    norm_kernel(float* norm, const float* partial, int blocks, float clip) {
    __shared__ float reduce[WARP];
    float sum = 0;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) sum += partial[i];
    sum = sqrtf(block_reduce(sum, reduce, false));
    if (threadIdx.x > 0) return;
    norm[0] = sum;
    norm[1] = clip > 0 && sum > clip ? clip / sum : 1.0f;
}

// ---- AdamW (Loshchilov and Hutter, arXiv 1711.05101), a quad of elements a thread

struct Adam {
    float lr, beta1, beta2, eps, decay;
    const float* norm;         // norm[1] scales the gradient
    float correct1, correct2;  // 1 / (1 - beta^t)
};

__device__ inline float adam_element(const Adam& a, float g, float* m, float* v) {
    g *= a.norm[1];
    *m = a.beta1 * *m + (1.0f - a.beta1) * g;
    *v = a.beta2 * *v + (1.0f - a.beta2) * g * g;
    return *m * a.correct1 / (sqrtf(*v * a.correct2) + a.eps);
}

// Moves the moments of four elements on by their gradients; returns the direction
// U = M^ / (sqrt(V^) + eps).
__device__ inline float4 adam_direction(const Adam& a, const float* g, float* m, float* v) {
    float4 g4 = load_quad(g), m4 = load_quad(m), v4 = load_quad(v), u;
    u.x = adam_element(a, g4.x, &m4.x, &v4.x);
    u.y = adam_element(a, g4.y, &m4.y, &v4.y);
    u.z = adam_element(a, g4.z, &m4.z, &v4.z);
    u.w = adam_element(a, g4.w, &m4.w, &v4.w);
    store_quad(m, m4);
    store_quad(v, v4);
    return u;
}

__global__ void adam_kernel(Weights to, const float* g, float* m, float* v, size_t count, Adam a) {
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * QUAD;
    if (i >= count) return;
    float4 u = adam_direction(a, g + i, m + i, v + i);
    move_weights(to, i, u, 1.0f - a.lr * a.decay, a.lr);
}

static void adam_update(const Weights& to, const float* g, float* m, float* v, size_t count,
                        const Adam& a) {
    adam_kernel<<<blocks_for(count, 256 * QUAD), 256>>>(to, g, m, v, count, a);
    LAUNCHED();
}

// G (m, r) -> U (m, r): Adam's direction in the small space
__global__ void direction_kernel(floatX* u, const float* g, float* m, float* v, size_t count,
                                 Adam a) {
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * QUAD;
    if (i < count) store_quad(u + i, adam_direction(a, g + i, m + i, v + i));
}

// ---- Muon (Jordan et al. 2024): the step is the nearest orthogonal matrix to the momentum.
// Batches: all matrices of one shape.

enum { MUON_SLABS = 64 };  // partial sums of a matrix

// M = mu M + g, x = g + mu M, Nesterov's form, g scaled by norm[1]; partial (batch, MUON_SLABS):
// sums of x's squares, in double, so that no scale is too large or too small. count: elements of a
// matrix. Grid (MUON_SLABS, batch), block 256.
__global__ void muon_momentum_kernel(floatX* x, double* partial, const float* g, float* m,
                                     const float* norm, size_t count) {
    const float mu = 0.95f;
    __shared__ double sums[256];
    double sum = 0;
    size_t first = blockIdx.y * count, stride = size_t(MUON_SLABS) * blockDim.x * QUAD;
    for (size_t i = (blockIdx.x * blockDim.x + threadIdx.x) * QUAD; i < count; i += stride) {
        float4 g4 = load_quad(g + first + i), m4 = load_quad(m + first + i);
        float gs[QUAD] = {g4.x, g4.y, g4.z, g4.w}, ms[QUAD] = {m4.x, m4.y, m4.z, m4.w}, xs[QUAD];
        for (int e = 0; e < QUAD; e++) {
            float scaled = gs[e] * norm[1];
            ms[e] = mu * ms[e] + scaled;
            xs[e] = scaled + mu * ms[e];
            sum += double(xs[e]) * xs[e];
        }
        store_quad(m + first + i, {ms[0], ms[1], ms[2], ms[3]});
        store_quad(x + first + i, {xs[0], xs[1], xs[2], xs[3]});
    }
    sums[threadIdx.x] = sum;
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) partial[blockIdx.y * MUON_SLABS + blockIdx.x] = sums[0];
}

// x /= ||x||_F; zeros stay zeros. Grid (MUON_SLABS, batch), block 256.
__global__ void muon_scale_kernel(floatX* x, const double* partial, size_t count) {
    double sum = 0;
    for (int i = 0; i < MUON_SLABS; i++) sum += partial[blockIdx.y * MUON_SLABS + i];
    double scale = sum > 0 ? rsqrt(sum) : 0;
    size_t first = blockIdx.y * count, stride = size_t(MUON_SLABS) * blockDim.x * QUAD;
    for (size_t i = (blockIdx.x * blockDim.x + threadIdx.x) * QUAD; i < count; i += stride) {
        float4 v = load_quad(x + first + i);
        store_quad(x + first + i, {float(v.x * scale), float(v.y * scale), float(v.z * scale),
                                   float(v.w * scale)});
    }
}

// Each x (rows, columns) becomes the nearest matrix with orthonormal rows or columns, whichever are
// fewer, by Newton-Schulz iterations X <- a X + (b A + c A^2) X from ||X||_F = 1, with A = X X^T,
// or X^T X on the other side. Singular values end between 0.7 and 1.2, those below some 1e-3 of the
// norm further down. x and next (batch, rows, columns) take turns; returns where the last one
// stands. gram and poly (batch, k, k), k the smaller side.
static floatX* orthogonalise(floatX* x, floatX* next, floatX* gram, floatX* poly, int rows,
                             int columns, int batch) {
    const float a = 3.4445f, b = -4.7750f, c = 2.0315f;
    bool tall = rows > columns;
    int k = tall ? columns : rows, longer = tall ? rows : columns;
    for (int i = 0; i < NEWTON_SCHULZ; i++) {
        matmul_lt(gram, gram, x, tall, x, !tall, k, k, longer, 1.0f, 0.0f, nullptr, batch);
        matmul_lt(poly, gram, gram, false, gram, false, k, k, k, c, b, nullptr, batch);
        matmul_lt(next, x, tall ? x : poly, false, tall ? poly : x, false, rows, columns, k, 1.0f,
                  a, nullptr, batch);
        std::swap(x, next);
    }
    return x;
}

// Elements of workspace for the matrices of one layer: X twice, two k x k matrices, and sums of
// doubles.
static int64_t muon_elements(const Linear& shape, int blocks) {
    int64_t rows = shape.m / blocks, k = std::min<int64_t>(rows, shape.r);
    int64_t sums = MUON_SLABS * sizeof(double) / sizeof(floatX);
    return blocks * (sums + 2 * stride_of(rows, shape.r) + 2 * stride_of(k, k));
}

// G (layers, m, r) -> U (layers, m, r) = orth(G + mu M), in the workspace, whose place it returns.
// muon_factor is still to come.
static floatX* muon_directions(void* work, const float* g, float* m, const float* norm,
                               const Linear& shape, int blocks, int layers) {
    int rows = shape.m / blocks, k = std::min(rows, shape.r), batch = layers * blocks;
    int64_t count = int64_t(rows) * shape.r;  // m, and so this, is a multiple of 8
    double* partial = (double*)work;
    floatX *x = (floatX*)(partial + batch * MUON_SLABS), *next = x + batch * count;
    floatX *gram = next + batch * count, *poly = gram + batch * stride_of(k, k);
    dim3 grid(MUON_SLABS, batch);
    muon_momentum_kernel<<<grid, 256>>>(x, partial, g, m, norm, count);
    LAUNCHED();
    muon_scale_kernel<<<grid, 256>>>(x, partial, count);
    LAUNCHED();
    return orthogonalise(x, next, gram, poly, rows, shape.r, batch);
}

// 0.2 sqrt(max(rows, columns)): the root mean square of U is 0.2, about that of AdamW's step
// (Moonlight, arXiv 2502.16982), and so it is once U is lifted, as E[P P^T] = I. So learning rate
// and decay carry over, from AdamW and from rank to rank.
static float muon_factor(const Linear& shape, int blocks) {
    return 0.2f * sqrtf(float(std::max(shape.m / blocks, shape.r)));
}

// ---- a linear layer's weight, with either

// The sparse update in one kernel, a block a row of W (m, n). G -> U, the row (r) in shared memory:
// Muon's where given, else Adam's direction. Then the signed gather W = (1 - lr wd) W - by U P^T. A
// row of odd rank r may begin anywhere, so it is read one by one.
__global__ void __launch_bounds__(256)
    sparse_update_kernel(Weights to, const floatX* given, const float* g, float* m, float* v,
                         const float* sign, const int* shift, int n, int r, Adam a, float by) {
    extern __shared__ float u[];
    for (int j = threadIdx.x; j < r; j += blockDim.x) {
        size_t i = size_t(blockIdx.x) * r + j;
        u[j] = given ? float(given[i]) : adam_element(a, g[i], m + i, v + i);
    }
    __syncthreads();
    for (int k = threadIdx.x * QUAD; k < n; k += blockDim.x * QUAD) {
        float4 signs = load_quad(sign + k);
        float step[QUAD] = {signs.x, signs.y, signs.z, signs.w};
        for (int e = 0; e < QUAD; e++) {
            int stripe = (k + e) / r, column = k + e - stripe * r + shift[stripe];
            step[e] *= u[column < r ? column : column - r];
        }
        size_t i = size_t(blockIdx.x) * n + k;
        move_weights(to, i, {step[0], step[1], step[2], step[3]}, 1.0f - a.lr * a.decay, by);
    }
}

// What the optimizer of a linear layer's weight needs beside its gradient.
struct Step {
    Weights to;
    float *m, *v;     // moments (m, r); Muon has the first one alone
    const floatX* u;  // (m, r) Muon's U but for its factor, null for AdamW
    int blocks;       // of Muon
    float alpha;
    floatX* adam_u;  // (m, r) workspace: Adam's U on its way to the lift of a dense P
    float* lifted;   // (m, n) workspace: of the lift
};

// U (m, r) -> W (m, n): W -= lr (alpha U P^T + wd W); at full rank W -= lr (U + wd W).
static void linear_update(const LinearLayer& linear, const Step& step, const Adam& a) {
    int m = linear.shape.m, n = linear.shape.n, r = linear.shape.r;
    const floatX* u = step.u;
    size_t small = size_t(m) * r, whole = size_t(m) * n;
    float keep = 1.0f - a.lr * a.decay, by = a.lr;
    if (u) by *= muon_factor(linear.shape, step.blocks);
    if (!linear.shape.compressed()) {
        if (u) return lift_whole(step.to, nullptr, u, whole, keep, by);
        return adam_update(step.to, linear.dw, step.m, step.v, whole, a);
    }
    by *= step.alpha;
    if (linear.projection == SPARSE) {
        projection_now(linear);
        sparse_update_kernel<<<m, 256, r * sizeof(float)>>>(step.to, u, linear.dw, step.m, step.v,
                                                            linear.sign, linear.shift, n, r, a, by);
        return LAUNCHED();
    }
    if (!u) {
        direction_kernel<<<blocks_for(small, 256 * QUAD), 256>>>(step.adam_u, linear.dw, step.m,
                                                                 step.v, small, a);
        LAUNCHED();
        u = step.adam_u;
    }
    lift(linear, step.to, u, keep, by, step.lifted);
}

// change (r, r) = P_old^T P_new, sparse; a thread a row, so that none is written twice at once
__global__ void sparse_change_kernel(float* change, const float* sign, const int* shift,
                                     const float* sign_next, const int* shift_next, int n, int r) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= r) return;
    float* to = change + size_t(row) * r;
    for (int j = 0; j < r; j++) to[j] = 0;
    for (int first = 0, stripe = 0; first < n; first += r, stripe++) {
        int turned = row - shift[stripe], k = first + (turned < 0 ? turned + r : turned);
        if (k < n) to[(k - first + shift_next[stripe]) % r] += sign[k] * sign_next[k];
    }
}

// M (m, r) -> M P_old^T P_new: the first moment moves into the space of the next projection (Flora,
// arXiv 2402.03293). change: (r, r). The gradient's memory, free until the next backward pass,
// serves for the product.
static void move_moment(const LinearLayer& linear, const LinearLayer& next, float* moment,
                        float* change) {
    int m = linear.shape.m, n = linear.shape.n, r = linear.shape.r;
    const floatX *p = projection_now(linear), *p_next = projection_now(next);
    if (linear.projection == SPARSE) {
        sparse_change_kernel<<<blocks_for(r, 128), 128>>>(change, linear.sign, linear.shift,
                                                          next.sign, next.shift, n, r);
        LAUNCHED();
    } else {
        matmul(change, CUDA_R_32F, p, true, p_next, false, CUDA_X, r, r, n, 1.0f, 0.0f);
    }
    matmul(linear.dw, CUDA_R_32F, moment, false, change, false, CUDA_R_32F, m, r, r, 1.0f, 0.0f);
    CUDA(cudaMemcpyAsync(moment, linear.dw, sizeof(float) * m * r, cudaMemcpyDeviceToDevice));
}

// =================================================================================================
// the model: parameters, tape, gradients; forward, backward, update
// =================================================================================================

struct Model {
    Config config;
    Options options;
    Linear linear[LINEARS];
    int64_t epoch;  // of the projections
    floatX* params[PARAMS];
    float* master[PARAMS];  // fp32 copies of the weights, the weights themselves in fp32
    float *grads[PARAMS], *m[PARAMS], *v[PARAMS];
    // the tape: a row is kept in one of these ways, as kept[row] says, or is null in all. Of L
    // layers, or of those at hand: `slots`.
    int kept[TAPE_ROWS], slots;
    floatX* tape[TAPE_ROWS];         // (slots, N, width C)
    floatX* z[LINEARS];              // (slots, N, r) in place of the input of a compressed layer
    void* codes[TAPE_ROWS];          // (slots, N, width C) int8, or 2 bits an element
    floatX* scales[TAPE_ROWS];       // (slots, N, scales) of the int8
    float *ln_mean[2], *ln_rstd[2];  // (L, N) of a block's two LayerNorms
    float* lse;                      // (L, N, NH) floats, (B, NH, T) in a layer
    float *lnf_mean, *lnf_rstd;      // (N)
    // the tape's other layers in the host's memory: each tensor's home, its copy (L - slots, ...),
    // its bytes in a layer
    struct {
        void *home, *host;
        int64_t bytes;
    } offloaded[2 * TAPE_ROWS];
    int offloads;
    cudaStream_t copies;
    cudaEvent_t computed[2], copied[2];  // for each slot
    // workspace, reused by every layer
    floatX* now[TAPE_ROWS];   // (N, width C) of this block what the tape lacks whole
    floatX* dresidual;        // (N, C) gradient of the stream
    floatX* wide;             // (N, 4C) inputs and gradients on their way; after the forward pass
                              // the head's input; in the update Muon's
    int64_t wide_rows;        // N, or what Muon needs for a layer
    floatX* spare;            // (N, C) likewise; (N, 4C) where fch or qkv comes back
    floatX* z_now;            // (N, r) z where it is not on the tape
    floatX *p, *p_next, *u;   // P (n, r); the next epoch's; Adam's U (m, r) on its way to the lift
    float *sign, *sign_next;  // sparse: (n) signs
    int *shift, *shift_next;  // sparse: a rotation for each stripe of r inputs
    float* p_change;          // (r, r) P_old^T P_new
    float* lifted;            // (m, n) a dense step on its way to weights without master copies
    floatX* logits;           // (chunk, logits_width), in `wide` where that has room
    int chunk;                // tokens whose logits exist at one time
    floatX* cache;            // (L, seq, 2C) keys and values of a text in the making
    float *partial, *dot;     // sums of columns, of slabs, bands or blocks; (N, NH)
    float *norm_partial, *norm;
    // data
    int *d_inputs, *d_targets;              // (N)
    float* d_losses;                        // (N)
    int *word_order, *word_starts, *words;  // (N), (N + 1), (N): the tokens sorted by word
    // on the host, in pinned memory, so that no copy waits
    int *inputs, *targets;  // (N)
    int* sorted;            // (3N + 1) word_order, word_starts, words
    float* losses;          // (N)
};

enum { SPARE_BYTES = 256 << 20 };  // stay free for kernels, which are loaded when first called
enum { CHUNK = 1024 };   // tokens whose logits have a buffer where `wide` has no such room
enum { NO_CACHE = -1 };  // for `past`: attention is among the tokens at hand

// ---- memory: what there is, and where

// Bytes between a tensor and the host.
static void model_get(void* host, const void* from, size_t bytes) {
    CUDA(cudaMemcpy(host, from, bytes, cudaMemcpyDeviceToHost));
}
static void model_set(void* to, const void* host, size_t bytes) {
    CUDA(cudaMemcpy(to, host, bytes, cudaMemcpyHostToDevice));
}

static int logits_width(const Config& config) {  // each row begins on 16 bytes
    return (config.Vp + 7) / 8 * 8;
}

// Whether fch or qkv comes back into `spare`, which otherwise has a block's width of C at most.
static bool spare_is_wide(const Model& model) {
    return model.kept[FCH] == GONE || model.kept[QKVR] != WHOLE;
}

// Lists every tensor of the run, in the device's memory but for category "host", with the place of
// its pointer in the model. Sets the model up, but allocates nothing.
static Plan model_plan(Model& model, const Config& config, const Options& options) {
    if (options.seq > 65535)
        refuse("--seq: ", options.seq, " is more than the 65535 that the GPU's kernels take");
    if (config.C % 8 != 0 || config.C > 3072)
        refuse("--channels: ", config.C,
               " is not a multiple of 8 up to 3072, as the GPU's kernels need it");
    if (options.tape == TAPE_INT8 && config.C / config.NH % 8 != 0)
        refuse("--tape int8: heads of ", config.C / config.NH,
               " channels are not a multiple of 8, as the GPU's kernels need it");
    Plan plan;
    model = Model{};
    model.config = config;
    model.options = options;
    for (int i = 0; i < LINEARS; i++) model.linear[i] = linear_shape(config, options, i);
    bool trains = !options.generates, muon = options.optimizer == MUON;
    bool sparse = options.projection == SPARSE, z_kept[LINEARS] = {};
    bool moves = options.moments == MOVE && options.gap > 0;
    bool copies = IS_BF16 && options.master == MASTER_FP32 && trains;
    int64_t L = config.L, C = config.C, N = rows_of(options), trained = trains ? N : 0;
    int64_t width = logits_width(config);
    auto add = [&](const char* category, const std::string& name, const char* type,
                   const std::vector<int64_t>& shape, void* home) {
        static void* nowhere;  // each tensor begins on 256 bytes: the gap before it is in the plan
        int64_t gap = -plan.bytes(category) & 255;
        plan_add(plan, category, "alignment", "byte", {gap}, &nowhere);
        plan_add(plan, category, name, type, shape, home);
    };

    for (int i = 0; i < PARAMS; i++)
        add("parameters", param_rows[i].name, TYPE_X, param_shape(config, i), &model.params[i]);
    for (int i = 0; i < PARAMS && copies; i++)
        add("master", join("master.", param_rows[i].name), "fp32", param_shape(config, i),
            &model.master[i]);
    auto add_group = [&](const char* category, const std::string& prefix, float** home) {
        for (int i = 0; i < PARAMS && trains; i++) {
            int rank = param_rows[i].linear >= 0 ? model.linear[param_rows[i].linear].r : 0;
            if (rank > 0 && muon && home == model.v) continue;
            add(category, prefix + param_rows[i].name, "fp32", param_shape(config, i, rank),
                &home[i]);
        }
    };
    add_group("gradients", "grad.", model.grads);
    add_group("moments", "m.", model.m);
    add_group("moments", "v.", model.v);

    model.slots = options.offload ? std::min(2, config.L) : config.L;
    auto keep = [&](const std::string& name, const char* type, int64_t width, void* home) {
        add("tape", name, type, {model.slots, N, width}, home);
        auto& offloaded = model.offloaded[model.offloads];
        std::vector<int64_t> others = {L - model.slots, N, width};
        Tensor away = {"host", "host." + name, type, others, &offloaded.host};
        if (away.count() == 0) return;
        offloaded.home = home;
        offloaded.bytes = away.bytes() / (L - model.slots);
        plan.tensors.push_back(away);
        model.offloads++;
    };
    for (int i = 0; i < TAPE_ROWS; i++) {
        const TapeRow& row = tape_rows[i];
        std::string name = row.name;
        int kept = model.kept[i] = how_kept(i, options, model.linear), in = row.input_of;
        if (kept == WHOLE) keep(name, TYPE_X, row.width * C, &model.tape[i]);
        if (kept == AS_Z) keep(name + ".z", TYPE_X, model.linear[in].r, &model.z[in]);
        if (kept == AS_Z) z_kept[in] = true;
        if (kept == AS_2BIT) keep(name + ".2bit", "2bit", row.width * C, &model.codes[i]);
        if (kept != AS_INT8) continue;
        keep(name + ".int8", "int8", row.width * C, &model.codes[i]);
        keep(name + ".scale", TYPE_X, scales_of(config, i), &model.scales[i]);
    }
    add("tape", "ln1_mean", "fp32", {L, N}, &model.ln_mean[0]);
    add("tape", "ln1_rstd", "fp32", {L, N}, &model.ln_rstd[0]);
    add("tape", "ln2_mean", "fp32", {L, N}, &model.ln_mean[1]);
    add("tape", "ln2_rstd", "fp32", {L, N}, &model.ln_rstd[1]);
    add("tape", "lse", "fp32", {L, trained, config.NH}, &model.lse);
    add("tape", "lnf_mean", "fp32", {N}, &model.lnf_mean);
    add("tape", "lnf_rstd", "fp32", {N}, &model.lnf_rstd);

    // The stream out of the last block is in no row of the tape. qkv comes back into `spare`,
    // unless the block's other half has to be computed while it waits.
    add("workspace", "stream", TYPE_X, {N, C}, &model.now[RESIDUAL]);
    if (model.kept[ATTY] == GONE) add("workspace", "qkv", TYPE_X, {N, 3 * C}, &model.now[QKVR]);
    if (model.kept[ATTY] != WHOLE) add("workspace", "atty", TYPE_X, {N, C}, &model.now[ATTY]);
    if (model.kept[RESIDUAL2] != WHOLE)
        add("workspace", "residual2", TYPE_X, {N, C}, &model.now[RESIDUAL2]);
    add("workspace", "dresidual", TYPE_X, {trained, C}, &model.dresidual);
    model.wide_rows = N;
    for (int i = 0; i < LINEARS && muon; i++) {
        int64_t elements = muon_elements(model.linear[i], blocks_of(i));
        model.wide_rows = std::max(model.wide_rows, (elements + 4 * C - 1) / (4 * C));
    }
    add("workspace", "wide", TYPE_X, {model.wide_rows, 4 * C}, &model.wide);
    add("workspace", "spare", TYPE_X, {N, spare_is_wide(model) ? 4 * C : C}, &model.spare);

    int64_t z_now = 0, dense = 0, p_change = 0, u = 0, lifted = 0, signs = 0, stripes = 0;
    for (int i = 0; i < LINEARS; i++) {
        if (!model.linear[i].compressed()) continue;
        int64_t m = model.linear[i].m, n = model.linear[i].n, r = model.linear[i].r;
        if (!z_kept[i]) z_now = std::max(z_now, r);
        p_change = std::max(p_change, r * r);
        if (sparse) signs = std::max(signs, n);
        if (sparse) stripes = std::max(stripes, (n + r - 1) / r);
        if (sparse) continue;
        dense = std::max(dense, n * r);
        if (!muon) u = std::max(u, m * r);
        if (options.master == MASTER_NONE) lifted = std::max(lifted, m * n);
    }
    add("workspace", "z", TYPE_X, {N, z_now}, &model.z_now);
    add("workspace", "projection", TYPE_X, {dense}, &model.p);
    add("workspace", "projection_next", TYPE_X, {moves * dense}, &model.p_next);
    add("workspace", "update", TYPE_X, {u}, &model.u);
    add("workspace", "lifted", "fp32", {lifted}, &model.lifted);
    add("workspace", "projection_sign", "fp32", {signs}, &model.sign);
    add("workspace", "projection_sign_next", "fp32", {moves * signs}, &model.sign_next);
    add("workspace", "projection_shift", "int32", {stripes}, &model.shift);
    add("workspace", "projection_shift_next", "int32", {moves * stripes}, &model.shift_next);
    add("workspace", "projection_change", "fp32", {moves * p_change}, &model.p_change);
    add("workspace", "products", "byte", {CUBLAS_BYTES}, &products_workspace);
    // The gradient of wte is read and written once a chunk: the fewer the better. Beside the head's
    // input, `wide` is free then.
    int64_t free_rows = std::min(N, (model.wide_rows * 4 - N) * C / width);
    int64_t own = trains ? std::min<int64_t>(CHUNK, N) : 1;
    if (free_rows >= own) own = 0;
    model.chunk = int(own > 0 ? own : free_rows);
    add("workspace", "logits", TYPE_X, {own, width}, &model.logits);
    add("workspace", "keys_values", TYPE_X, {L, cached_tokens(options), 2 * C}, &model.cache);
    add("data", "inputs", "int32", {N}, &model.d_inputs);
    plan.flops = matrix_flops(config, options, model.linear);
    if (!trains) return plan;
    int64_t bands = blocks_for(N, band_of(N)), blocks = blocks_for(options.seq, FLASH);
    int64_t sums = std::max({int64_t(SLABS * 4), bands * 3, options.batch * blocks * 2});
    add("workspace", "column_sums", "fp32", {sums, C}, &model.partial);
    add("workspace", "attention_dot", "fp32", {N, config.NH}, &model.dot);
    add("workspace", "norm_partial", "fp32", {NORM_BLOCKS}, &model.norm_partial);
    add("workspace", "norm", "fp32", {2}, &model.norm);
    add("data", "targets", "int32", {N}, &model.d_targets);
    add("data", "losses", "fp32", {N}, &model.d_losses);
    add("data", "word_order", "int32", {N}, &model.word_order);
    add("data", "word_starts", "int32", {N + 1}, &model.word_starts);
    add("data", "words", "int32", {N}, &model.words);
    return plan;
}

// Says what would fit, where the plan does not.
[[noreturn]] static void fail_for_memory(const Model& model, const Plan& plan, size_t free_bytes) {
    Options options = model.options;
    int64_t accumulated = options.total_batch / options.seq;
    std::string said = join("not enough memory: the plan takes ", commas(plan.bytes()), " bytes, ",
                            commas(free_bytes), " are free");
    std::string choose =
        join("; --memory ", int64_t(free_bytes) / 1000000, "MB chooses --recompute and -b");
    for (Model other; options.batch > 1;) {
        for (options.batch--; accumulated % options.batch != 0;) options.batch--;
        if (model_plan(other, model.config, options).bytes() < int64_t(free_bytes))
            fail(said, "; -b ", options.batch, " -d ", options.total_batch, " would fit", choose);
    }
    fail(said, ", and -b 1 does not fit either; a smaller --seq or --rank takes less", choose);
}

#ifdef USE_MPI
#include <mpi.h>
#include <nccl.h>

// Gradients go to the other processes on a stream of their own.
static struct {
    ncclComm_t everybody;
    cudaStream_t stream;
    cudaEvent_t computed, exchanged;
} exchange;

static void check(ncclResult_t status, const char* file, int line) {
    const char* reason = ncclGetErrorString(status);
    if (status != ncclSuccess)
        fail(file, ":", line, ": NCCL: ", reason, "; NCCL_DEBUG=INFO says more");
}
#endif

// Each process of a machine has a GPU of its own, and a way to the others'.
static void begin_exchange() {
#ifdef USE_MPI
    CUDA(cudaSetDevice(processes.local));
    if (processes.count == 1) return;
    ncclUniqueId id;
    if (processes.rank == 0) CUDA(ncclGetUniqueId(&id));
    MPI_Bcast(&id, sizeof(id), MPI_BYTE, 0, MPI_COMM_WORLD);
    CUDA(ncclCommInitRank(&exchange.everybody, processes.count, id, processes.rank));
    CUDA(cudaStreamCreateWithFlags(&exchange.stream, cudaStreamNonBlocking));
    CUDA(cudaEventCreateWithFlags(&exchange.computed, cudaEventDisableTiming));
    CUDA(cudaEventCreateWithFlags(&exchange.exchanged, cudaEventDisableTiming));
#endif
}

// One arena for each category. It is zeroed: moments start from 0, and so does the gradient of
// padded words, which nothing writes.
static void model_allocate(Model& model, const Plan& plan) {
    const Options& options = model.options;
    size_t free_bytes, total_bytes, N = rows_of(options);
    begin_exchange();
    CUDA(cublasCreate(&cublas));
    // Sums stay in fp32, also those that cuBLAS splits.
    int math = CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    CUDA(cublasSetMathMode(cublas, cublasMath_t(math)));
    CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
    free_bytes -= std::min<size_t>(free_bytes, SPARE_BYTES);
    if (plan.bytes() > int64_t(free_bytes)) fail_for_memory(model, plan, free_bytes);
    for (const std::string& category : plan.categories()) {
        char* arena;
        int64_t bytes = plan.bytes(category);
        if (category == "host") {
            CUDA(cudaMallocHost((void**)&arena, bytes));
        } else {
            CUDA(cudaMalloc((void**)&arena, bytes));
            CUDA(cudaMemset(arena, 0, bytes));
        }
        for (const Tensor& t : plan.tensors) {
            if (t.category != category) continue;
            memcpy(t.home, &arena, sizeof(arena));
            arena += t.bytes();
        }
    }
    fprintf(options.generates ? stderr : stdout,
            "device memory: the plan's %s bytes, of %s that were free; the libraries took %s "
            "before\n",
            commas(plan.bytes()).c_str(), commas(free_bytes).c_str(),
            commas(total_bytes - free_bytes).c_str());
    CUDA(cublasSetWorkspace(cublas, products_workspace, CUBLAS_BYTES));
    if (!model.logits) model.logits = model.wide + N * model.config.C;
    for (int i = 0; i < PARAMS && !IS_BF16; i++) model.master[i] = (float*)model.params[i];
    for (int i = 0; i < 2 && options.offload; i++) {
        CUDA(cudaEventCreateWithFlags(&model.computed[i], cudaEventDisableTiming));
        CUDA(cudaEventCreateWithFlags(&model.copied[i], cudaEventDisableTiming));
    }
    if (options.offload) CUDA(cudaStreamCreateWithFlags(&model.copies, cudaStreamNonBlocking));
    CUDA(cudaMallocHost((void**)&model.inputs, N * sizeof(int)));
    CUDA(cudaMallocHost((void**)&model.targets, N * sizeof(int)));
    CUDA(cudaMallocHost((void**)&model.sorted, (3 * N + 1) * sizeof(int)));
    CUDA(cudaMallocHost((void**)&model.losses, N * sizeof(float)));
}

// Parameter i of one layer: in params and master, and in grads, m and v. Those without layers have
// layer 0.
static int64_t param_offset(const Model& model, int i, int layer) {
    return layer * (param_count(model.config, i) / model.config.L);
}

static int64_t grad_offset(const Model& model, int i, int layer) {
    int linear = param_rows[i].linear, rank = linear >= 0 ? model.linear[linear].r : 0;
    return layer * (param_count(model.config, i, rank) / model.config.L);
}

// A linear layer of a block, in an epoch of the projections. N: tokens of the pass at hand.
static LinearLayer linear_at(const Model& model, int which, int layer, int N, int64_t epoch) {
    int w = weight_of(which), b = w + 1;
    const Linear& shape = model.linear[which];
    floatX* z = model.z[which];
    return {shape,
            model.params[w] + param_offset(model, w, layer),
            model.params[b] + param_offset(model, b, layer),
            model.grads[w] ? model.grads[w] + grad_offset(model, w, layer) : nullptr,
            z ? z + layer % model.slots * int64_t(N) * shape.r : nullptr,
            model.z_now,
            model.options.projection,
            uint64_t(model.options.seed),
            stream_of(which, layer, epoch),
            model.p,
            model.sign,
            model.shift};
}

static LinearLayer linear_at(const Model& model, int which, int layer, int N) {
    return linear_at(model, which, layer, N, model.epoch);
}

// A parameter from its element `first` on, for optimizer step `step`.
static Weights weights_at(const Model& model, int i, int64_t first, int64_t step) {
    return {model.params[i] + first,
            model.master[i] ? model.master[i] + first : nullptr,
            model.options.master == MASTER_NONE,
            uint64_t(model.options.seed),
            stream_of(STREAM_ROUND, i, step),
            first};
}

// Row `row` of the tape in a layer. Where the tape does not keep it whole: where it stands for now.
static floatX* tape_at(const Model& model, int row, int layer, int N, floatX* otherwise) {
    int64_t stride = int64_t(N) * tape_rows[row].width * model.config.C;
    return model.tape[row] ? model.tape[row] + layer % model.slots * stride : otherwise;
}

// Where a block's tensors stand while it is worked on. What is not on the tape lies in wide and
// spare as the forward pass goes: ln1 in wide, qkv in spare, ln2 in the one and fch in the other,
// fch_gelu in wide. fch that is kept as bits becomes its GELU in place. delta is what a projection
// adds to the stream: attention's stands where ln2 will, the other one in spare.
struct Block {
    floatX *residual, *ln1, *qkv, *atty, *delta, *residual2, *ln2, *fch, *fch_gelu;
};

static Block block_at(const Model& model, int layer, int N) {
    bool bits = model.kept[FCH] == AS_2BIT, after_last = layer == model.config.L;
    floatX *stream = model.now[RESIDUAL], *qkv = model.now[QKVR];
    floatX *one = bits ? model.spare : model.wide, *other = bits ? model.wide : model.spare;
    return {after_last ? stream : tape_at(model, RESIDUAL, layer, N, stream),
            tape_at(model, LN1, layer, N, model.wide),
            tape_at(model, QKVR, layer, N, qkv ? qkv : model.spare),
            tape_at(model, ATTY, layer, N, model.now[ATTY]),
            one,
            tape_at(model, RESIDUAL2, layer, N, model.now[RESIDUAL2]),
            tape_at(model, LN2, layer, N, one),
            tape_at(model, FCH, layer, N, other),
            tape_at(model, FCH_GELU, layer, N, model.wide)};
}

// A row (N, width C) that the tape keeps as int8: onto it, and back again.
static void tape_store(Model& model, int row, int layer, const floatX* x, int N) {
    if (model.kept[row] != AS_INT8) return;
    int64_t width = tape_rows[row].width * int64_t(model.config.C);
    int64_t scales = scales_of(model.config, row), first = layer % model.slots * int64_t(N);
    quantize_kernel<<<blocks_for(N * scales, 128 / GROUP), 128>>>(
        (int8_t*)model.codes[row] + first * width, model.scales[row] + first * scales, x,
        N * scales, int(width / scales));
    LAUNCHED();
}

static void tape_load(Model& model, int row, int layer, floatX* x, int N) {
    if (model.kept[row] != AS_INT8) return;
    int64_t width = tape_rows[row].width * int64_t(model.config.C);
    int64_t scales = scales_of(model.config, row), first = layer % model.slots * int64_t(N);
    dequantize_kernel<<<blocks_for(N * scales, 128 / GROUP), 128>>>(
        x, (int8_t*)model.codes[row] + first * width, model.scales[row] + first * scales,
        N * scales, int(width / scales));
    LAUNCHED();
}

static uint8_t* fch_bits(const Model& model, int layer, int N) {
    int64_t bytes = int64_t(N) * model.config.C;
    bool bits = model.kept[FCH] == AS_2BIT;
    return bits ? (uint8_t*)model.codes[FCH] + layer % model.slots * bytes : nullptr;
}

// --offload: two layers' tapes are on the device, layer l's in slot l % 2; those of the last two
// stay. The others go to the host's memory behind the next layers' forward pass and come back
// behind the backward pass of the layer two above (after MEMO, arXiv 2407.12117). The stream of
// copies waits for the slot's work, and the work on a slot for its copies.
static void wait_for_slot(Model& model, int layer) {
    if (model.offloads > 0) CUDA(cudaStreamWaitEvent(nullptr, model.copied[layer % 2], 0));
}

// After work on slot layer % 2: `layer` goes to the host, or comes back to the slot.
static void copy_tape(Model& model, int layer, bool back) {
    if (model.offloads == 0 || layer < 0 || layer >= model.config.L - model.slots) return;
    cudaMemcpyKind way = back ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
    CUDA(cudaEventRecord(model.computed[layer % 2]));
    CUDA(cudaStreamWaitEvent(model.copies, model.computed[layer % 2], 0));
    for (int i = 0; i < model.offloads; i++) {
        const auto& away = model.offloaded[i];
        char *slot, *host = (char*)away.host + layer * away.bytes;
        memcpy(&slot, away.home, sizeof(slot));
        slot += layer % 2 * away.bytes;
        CUDA(
            cudaMemcpyAsync(back ? slot : host, back ? host : slot, away.bytes, way, model.copies));
    }
    CUDA(cudaEventRecord(model.copied[layer % 2], model.copies));
}

// ---- the forward pass

// sum = x + delta + bias where delta is given; y = LayerNorm of it with parameters w, w + 1 of a
// layer, folded on the way.
static void layernorm_forward(const Model& model, floatX* y, floatX* sum, float* mean, float* rstd,
                              const floatX* x, const floatX* delta, const floatX* bias, int w,
                              int layer, Fold fold, int N) {
    int C = model.config.C;
    int64_t first = has_layers(w) ? param_offset(model, w, layer) : 0;
    const floatX *weight = model.params[w] + first, *b = model.params[w + 1] + first;
    layernorm_kernel<<<blocks_for(N, 4), 128, 4 * C * sizeof(floatX)>>>(
        y, sum, mean, rstd, x, delta, bias, weight, b, fold, N, C);
    LAUNCHED();
}

// LayerNorm 1 or 2 of a block, by its weight: LN1W or LN2W.
static void block_layernorm(const Model& model, const Block& b, int w, floatX* y, int layer,
                            const floatX* x, const floatX* delta, const floatX* bias, Fold fold,
                            int N) {
    int which = w == LN2W;
    int64_t first = int64_t(layer) * N;
    layernorm_forward(model, y, which ? b.residual2 : b.residual, model.ln_mean[which] + first,
                      model.ln_rstd[which] + first, x, delta, bias, w, layer, fold, N);
}

// For an input that is made in the forward pass: folded onto the tape.
static Fold fold_kept(const Model& model, int which, int layer, int N, bool training) {
    LinearLayer linear = linear_at(model, which, layer, N);
    return training ? fold_into(linear, linear.z) : Fold{};
}

// For an input that is computed again: folded into z_now where that is all that the backward pass
// wants of it.
static Fold fold_now(const Model& model, int which, int layer) {
    LinearLayer linear = linear_at(model, which, layer, 0);
    return linear.shape.compressed() && !linear.z ? fold_into(linear, linear.z_now) : Fold{};
}

// The block's first half: stream + delta + bias is the residual, or stream alone where delta is
// null; then all up to ln2. The last recomputation level runs it again, from the residual.
static void attention_half(Model& model, const Block& b, int layer, int B, int T, int past,
                           const floatX* stream, const floatX* delta, const floatX* bias,
                           bool training) {
    int N = B * T, C = model.config.C, NH = model.config.NH;
    Fold fold = fold_kept(model, QKV, layer, N, training);
    block_layernorm(model, b, LN1W, b.ln1, layer, stream, delta, bias, fold, N);
    linear_forward(linear_at(model, QKV, layer, N), b.qkv, b.ln1, N, true, training);
    if (past == NO_CACHE) {
        attention_forward(b.atty, model.lse + int64_t(layer) * N * NH, b.qkv, B, T, C, NH);
    } else {
        floatX* cache = model.cache + 2 * int64_t(layer) * model.options.seq * C;
        attention_cached(b.atty, cache, b.qkv, past, T, C, NH);
    }
    if (training) {
        tape_store(model, RESIDUAL, layer, b.residual, N);
        tape_store(model, QKVR, layer, b.qkv, N);
        tape_store(model, ATTY, layer, b.atty, N);
    }
    LinearLayer attproj = linear_at(model, ATTPROJ, layer, N);
    linear_forward(attproj, b.delta, b.atty, N, false, training);
    fold = fold_kept(model, FC, layer, N, training);
    block_layernorm(model, b, LN2W, b.ln2, layer, b.residual, b.delta, attproj.b, fold, N);
    if (training) tape_store(model, RESIDUAL2, layer, b.residual2, N);
}

// inputs (B, T) -> the head's input (B*T, C), left in `wide`. When training, fills the tape on the
// way. For text that is being generated (B = 1), `past` tokens came before. The cache has their
// keys and values, and gets those of these tokens.
static void model_forward(Model& model, int B, int T, int past, bool training) {
    int N = B * T, L = model.config.L, C = model.config.C;
    const floatX* wpe = model.params[WPE] + std::max(past, 0) * int64_t(C);
    floatX* first = block_at(model, 0, N).residual;
    CUDA(cudaMemcpyAsync(model.d_inputs, model.inputs, N * sizeof(int), cudaMemcpyHostToDevice));
    embedding_forward_kernel<<<N, 128>>>(first, model.d_inputs, model.params[WTE], wpe, T, C);
    LAUNCHED();
    const floatX *stream = first, *delta = nullptr, *bias = nullptr;  // their sum comes in next
    for (int layer = 0; layer < L; layer++) {
        Block b = block_at(model, layer, N);
        if (training && layer >= model.slots) wait_for_slot(model, layer);
        attention_half(model, b, layer, B, T, past, stream, delta, bias, training);
        linear_forward(linear_at(model, FC, layer, N), b.fch, b.ln2, N, true, training);
        Fold fold = fold_kept(model, FCPROJ, layer, N, training);
        uint8_t* bits = training ? fch_bits(model, layer, N) : nullptr;
        gelu_forward(b.fch_gelu, bits, b.fch, fold, N, 4 * C);
        LinearLayer fcproj = linear_at(model, FCPROJ, layer, N);
        linear_forward(fcproj, model.spare, b.fch_gelu, N, false, training);
        stream = b.residual2;
        delta = model.spare;
        bias = fcproj.b;
        if (training) copy_tape(model, layer, false);
    }
    layernorm_forward(model, model.wide, model.now[RESIDUAL], model.lnf_mean, model.lnf_rstd,
                      stream, delta, bias, LNFW, 0, Fold{}, N);
}

// Logits (rows, V) of tokens first, first+1, ..., straight after a forward pass, to the host.
// Padded words have none.
static void model_logits(const Model& model, float* logits, int first, int rows) {
    int V = model.config.V, Vp = model.config.Vp, C = model.config.C;
    std::vector<floatX> raw(V);
    for (int row = 0; row < rows; row++) {
        const floatX* x = model.wide + int64_t(first + row) * C;
        matmul(model.logits, CUDA_X, x, false, model.params[WTE], true, CUDA_X, 1, Vp, C, 1.0f,
               0.0f);
        model_get(raw.data(), model.logits, V * sizeof(floatX));
        for (int i = 0; i < V; i++) logits[int64_t(row) * V + i] = float(raw[i]);
    }
}

// ---- the backward pass

// The losses of all N tokens, a chunk of tokens at a time. When training also their gradients: the
// head's input's into `spare`, and wte's, added to beta times what stands there. scale is
// 1 / (tokens of the optimizer step).
static void classifier(Model& model, int N, bool training, float scale, float beta) {
    int V = model.config.V, Vp = model.config.Vp, C = model.config.C;
    int ld = logits_width(model.config);
    const floatX* wte = model.params[WTE];
    floatX* logits = model.logits;
    CUDA(cudaMemcpyAsync(model.d_targets, model.targets, N * sizeof(int), cudaMemcpyHostToDevice));
    for (int first = 0; first < N; first += model.chunk) {
        int rows = std::min(model.chunk, N - first);
        floatX *x = model.wide + int64_t(first) * C, *dx = model.spare + int64_t(first) * C;
        matmul(logits, CUDA_X, x, false, wte, true, CUDA_X, rows, Vp, C, 1.0f, 0.0f, 0, ld);
        cross_entropy_kernel<<<rows, 1024>>>(logits, model.d_losses + first,
                                             model.d_targets + first, V, ld, scale, training);
        LAUNCHED();
        if (!training) continue;
        matmul(dx, CUDA_X, logits, false, wte, false, CUDA_X, rows, C, Vp, 1.0f, 0.0f, ld);
        matmul(model.grads[WTE], CUDA_R_32F, logits, true, x, false, CUDA_X, Vp, C, rows, 1.0f,
               first == 0 ? beta : 1.0f, ld);
    }
    CUDA(cudaMemcpyAsync(model.losses, model.d_losses, N * sizeof(float), cudaMemcpyDeviceToHost));
}

// The losses of inputs against targets (B, T), and nothing else: there after model_wait.
static void model_evaluate(Model& model, int B, int T) {
    model_forward(model, B, T, NO_CACHE, false);
    classifier(model, B * T, false, 0.0f, 0.0f);
}

// The embedding's gradient. While the device is still at the layers above, the host sorts the
// tokens by word (a counting sort would touch all words). Each word's rows are then summed in
// order.
static void embedding_backward(Model& model, int B, int T) {
    int N = B * T, C = model.config.C;
    const int* inputs = model.inputs;
    int *order = model.sorted, *starts = order + N, *words = starts + N + 1, count = 0;
    for (int i = 0; i < N; i++) order[i] = i;
    std::stable_sort(order, order + N, [&](int a, int b) { return inputs[a] < inputs[b]; });
    for (int i = 0; i < N; i++) {
        int word = inputs[order[i]];
        if (i > 0 && word == words[count - 1]) continue;
        starts[count] = i;
        words[count++] = word;
    }
    starts[count] = N;
    auto send = [](int* to, const int* from, int n) {
        CUDA(cudaMemcpyAsync(to, from, n * sizeof(int), cudaMemcpyHostToDevice));
    };
    send(model.word_order, order, N);
    send(model.word_starts, starts, count + 1);
    send(model.words, words, count);
    dim3 grid(count, blocks_for(C, SUM_COLUMNS)), block(SUM_PACKS, SUM_ROWS);
    word_backward_kernel<<<grid, block>>>(model.grads[WTE], model.dresidual, model.word_order,
                                          model.word_starts, model.words, C);
    LAUNCHED();
    position_backward_kernel<<<T, 256>>>(model.grads[WPE], model.dresidual, B, T, C);
    LAUNCHED();
}

// db_below: the gradient of the bias that was added on the way into x, or null: it is the sum of
// what dx then is.
static void layernorm_backward(Model& model, floatX* dx, const floatX* dy, const floatX* x,
                               const float* mean, const float* rstd, int w, int layer,
                               float* db_below, int N, bool accumulate) {
    int C = model.config.C, band = band_of(N), bands = blocks_for(N, band);
    int64_t first = has_layers(w) ? param_offset(model, w, layer) : 0;
    layernorm_backward_kernel<<<bands, blocks_for(C, WARP * PACK) * WARP>>>(
        dx, model.partial, dy, x, mean, rstd, model.params[w] + first, N, C, band, accumulate);
    LAUNCHED();
    add_partial(3, model.grads[w] + first, model.grads[w + 1] + first, db_below, model.partial,
                bands, C);
}

// dresidual (N, C) += the gradient of LayerNorm 1 or 2's input x; dy (N, C) is in `spare`.
static void block_layernorm_backward(Model& model, int w, const floatX* x, int layer,
                                     float* db_below, int N) {
    int which = w == LN2W;
    int64_t first = int64_t(layer) * N;
    layernorm_backward(model, model.dresidual, model.spare, x, model.ln_mean[which] + first,
                       model.ln_rstd[which] + first, w, layer, db_below, N, true);
}

static float* bias_grad(const Model& model, int i, int layer) {
    return model.grads[i] + grad_offset(model, i, layer);
}

// The backward pass of one block: dresidual holds the gradient of the stream out of it, and then of
// the stream into it. What the tape lacks comes back first; where only its fold is wanted, that is
// made on the way. The gradient of each layer's input takes the place of that input, once it is
// read. In `wide` the gradients of qkv (3C) and of attention's output (C) lie side by side.
static void block_backward(Model& model, int layer, int B, int T, float beta) {
    int N = B * T, C = model.config.C, NH = model.config.NH;
    int64_t NC = int64_t(N) * C;
    Block b = block_at(model, layer, N);
    const int* kept = model.kept;
    auto unless_folded = [](const floatX* x, const Fold& fold) { return fold.z ? nullptr : x; };
    auto normalise = [&](int w, floatX* y, const floatX* x, Fold fold) {
        block_layernorm(model, b, w, y, layer, x, nullptr, nullptr, fold, N);
    };
    tape_load(model, RESIDUAL, layer, b.residual, N);
    tape_load(model, ATTY, layer, b.atty, N);
    tape_load(model, RESIDUAL2, layer, b.residual2, N);
    if (kept[ATTY] == GONE)
        attention_half(model, b, layer, B, T, NO_CACHE, b.residual, nullptr, nullptr, false);
    else if (kept[FCH] == GONE)
        normalise(LN2W, b.ln2, b.residual2, Fold{});
    LinearLayer fc = linear_at(model, FC, layer, N), fcproj = linear_at(model, FCPROJ, layer, N);
    if (kept[FCH] == GONE) linear_forward(fc, b.fch, b.ln2, N, true, false);

    // residual2 + fcproj(gelu(fc(ln2)))
    floatX *dwide = model.wide, *dspare = model.spare;
    Fold fold = {};
    if (kept[FCH_GELU] == GONE) {
        fold = fold_now(model, FCPROJ, layer);
        gelu_forward(b.fch_gelu, nullptr, b.fch, fold, N, 4 * C);
    }
    linear_backward(fcproj, dwide, model.dresidual, unless_folded(b.fch_gelu, fold), N, beta);
    gelu_backward(dwide, bias_grad(model, FCB, layer), model.partial, b.fch,
                  fch_bits(model, layer, N), N, 4 * C);
    fold = Fold{};
    if (kept[LN2] == GONE) {
        b.ln2 = model.spare;
        fold = fold_now(model, FC, layer);
        normalise(LN2W, b.ln2, b.residual2, fold);
    }
    linear_backward(fc, dspare, dwide, unless_folded(b.ln2, fold), N, beta);
    block_layernorm_backward(model, LN2W, b.residual2, layer, bias_grad(model, ATTPROJB, layer), N);

    // residual + attproj(attention(qkv(ln1)))
    LinearLayer qkv = linear_at(model, QKV, layer, N),
                attproj = linear_at(model, ATTPROJ, layer, N);
    floatX *dqkv = dwide, *datty = dwide + 3 * NC;
    float* lse = model.lse + int64_t(layer) * N * NH;
    linear_backward(attproj, datty, model.dresidual, b.atty, N, beta);
    tape_load(model, QKVR, layer, b.qkv, N);
    fold = Fold{};
    if (kept[LN1] == GONE) {
        b.ln1 = model.spare + (spare_is_wide(model) ? 3 * NC : 0);  // behind qkv, if it is there
        fold = fold_now(model, QKV, layer);
        normalise(LN1W, b.ln1, b.residual, fold);
    }
    if (kept[QKVR] == GONE && !model.now[QKVR]) linear_forward(qkv, b.qkv, b.ln1, N, true, false);
    attention_backward(dqkv, bias_grad(model, QKVB, layer), model.partial, model.dot, datty, b.qkv,
                       b.atty, lse, B, T, C, NH);
    linear_backward(qkv, dspare, dqkv, unless_folded(b.ln1, fold), N, beta);
    float* db_below = layer > 0 ? bias_grad(model, FCPROJB, layer - 1) : nullptr;
    block_layernorm_backward(model, LN1W, b.residual, layer, db_below, N);
}

enum { NO_LAYER = -1 };

// Sums a layer's gradients over all processes, once they are computed; or those that belong to no
// layer, the last ones: then what the device does next waits for all of them.
static void exchange_gradients(Model& model, int layer) {
#ifdef USE_MPI
    if (processes.count == 1) return;
    CUDA(cudaEventRecord(exchange.computed));
    CUDA(cudaStreamWaitEvent(exchange.stream, exchange.computed, 0));
    CUDA(ncclGroupStart());
    for (int i = 0; i < PARAMS; i++) {
        if (has_layers(i) != (layer != NO_LAYER)) continue;
        int which = param_rows[i].linear;
        int64_t count = param_count(model.config, i, which < 0 ? 0 : model.linear[which].r);
        if (layer != NO_LAYER) count /= model.config.L;
        float* g = model.grads[i] + std::max(layer, 0) * count;
        CUDA(ncclAllReduce(g, g, count, ncclFloat, ncclSum, exchange.everybody, exchange.stream));
    }
    CUDA(ncclGroupEnd());
    if (layer != NO_LAYER) return;
    CUDA(cudaEventRecord(exchange.exchanged, exchange.stream));
    CUDA(cudaStreamWaitEvent(nullptr, exchange.exchanged, 0));
#else
    (void)model, (void)layer;
#endif
}

// Forward and backward pass of one micro batch, which the device has still to do: its losses, and
// its gradients times scale, added to those of the step's earlier micro batches unless this is the
// first. Those of the last one go to the other processes, each layer's while the layers below it
// still compute. The gradient of the residual stream flows down in dresidual.
static void model_accumulate(Model& model, int B, int T, bool first, float scale,
                             bool last = false) {
    int N = B * T, L = model.config.L;
    float beta = first ? 0.0f : 1.0f;
    for (int i = 0; first && i < PARAMS; i++) {
        // What matrix products write is spared: they start with beta = 0.
        if (i == WTE || param_rows[i].linear >= 0) continue;
        CUDA(cudaMemsetAsync(model.grads[i], 0, param_count(model.config, i) * sizeof(float)));
    }
    model_forward(model, B, T, NO_CACHE, true);
    classifier(model, N, true, scale, beta);
    layernorm_backward(model, model.dresidual, model.spare, model.now[RESIDUAL], model.lnf_mean,
                       model.lnf_rstd, LNFW, 0, bias_grad(model, FCPROJB, L - 1), N, false);
    for (int layer = L - 1; layer >= 0; layer--) {
        if (layer < L - model.slots) wait_for_slot(model, layer);
        block_backward(model, layer, B, T, beta);
        copy_tape(model, layer - model.slots, true);
        if (last) exchange_gradients(model, layer);
    }
    embedding_backward(model, B, T);
    if (last) exchange_gradients(model, NO_LAYER);
}

// Until the device has done all that it was given: then the losses are there, and inputs and
// targets are free.
static void model_wait() { CUDA(cudaDeviceSynchronize()); }

// ---- the update

// Before optimizer step `step` (from 0): the projections' epoch advances every --gap steps, for all
// layers together. The moments stay as they are (CompAct), or start again from zero, or the first
// of them moves into the new space.
static void model_begin_step(Model& model, int64_t step) {
    const Options& options = model.options;
    model.epoch = options.gap > 0 ? step / options.gap : 0;
    if (options.gap == 0 || step == 0 || step % options.gap != 0) return;
    for (int i = 0; i < model.config.L * LINEARS; i++) {
        int layer = i / LINEARS, which = i % LINEARS, w = weight_of(which);
        LinearLayer old = linear_at(model, which, layer, 0, model.epoch - 1);
        LinearLayer next = linear_at(model, which, layer, 0);
        size_t bytes = sizeof(float) * old.shape.m * old.shape.r;
        int64_t first = grad_offset(model, w, layer);
        if (!old.shape.compressed()) continue;
        if (options.moments == RESET) {
            CUDA(cudaMemsetAsync(model.m[w] + first, 0, bytes));
            if (model.v[w]) CUDA(cudaMemsetAsync(model.v[w] + first, 0, bytes));
        } else if (options.moments == MOVE) {
            next.p = model.p_next;
            next.sign = model.sign_next;
            next.shift = model.shift_next;
            move_moment(old, next, model.m[w] + first, model.p_change);
        }
    }
}

// What AdamW needs for its step t (from 1).
static Adam adam_of(const Options& options, double lr, const float* norm, int64_t t) {
    Adam a = {};
    a.lr = float(lr);
    a.beta1 = float(options.beta1);
    a.beta2 = float(options.beta2);
    a.eps = float(options.eps);
    a.norm = norm;
    a.correct1 = float(1 / (1 - pow(options.beta1, t)));
    a.correct2 = float(1 / (1 - pow(options.beta2, t)));
    return a;
}

// One layer's weight of a linear; u is Muon's U, null for AdamW.
static void update_linear(Model& model, int which, int layer, const Adam& a, int64_t step,
                          const floatX* u) {
    int w = weight_of(which);
    int64_t first = grad_offset(model, w, layer);
    Weights to = weights_at(model, w, param_offset(model, w, layer), step);
    float *m = model.m[w] + first, *v = u ? nullptr : model.v[w] + first;
    linear_update(
        linear_at(model, which, layer, 0),
        {to, m, v, u, blocks_of(which), float(model.options.alpha), model.u, model.lifted}, a);
}

// Muon's step of a linear in all layers, as many at once as the workspace holds.
static void update_by_muon(Model& model, int which, const Adam& a, int64_t step) {
    const Linear& shape = model.linear[which];
    int w = weight_of(which), blocks = blocks_of(which), L = model.config.L;
    int64_t room = model.wide_rows * 4 * model.config.C, count = int64_t(shape.m) * shape.r;
    int most = int(std::min<int64_t>(L, room / muon_elements(shape, blocks)));
    for (int layer = 0; layer < L; layer += most) {
        int layers = std::min(most, L - layer);
        int64_t first = grad_offset(model, w, layer);
        const floatX* u = muon_directions(model.wide, model.grads[w] + first, model.m[w] + first,
                                          model.norm, shape, blocks, layers);
        for (int j = 0; j < layers; j++)
            update_linear(model, which, layer + j, a, step, u + j * count);
    }
}

// One optimizer step from the accumulated gradients. Returns their global norm, before clipping.
// The compressed ones count as they are: E||G||^2 = ||dW||^2, since E[P P^T] = I. Matrices decay,
// vectors do not.
static double model_update(Model& model, const Plan& plan, int64_t step, double lr) {
    const Options& options = model.options;
    float decay = float(options.weight_decay);
    size_t gradients = plan.bytes("gradients") / sizeof(float);
    int blocks = std::min<int>(NORM_BLOCKS, blocks_for(gradients, 256 * QUAD));
    squares_kernel<<<blocks, 256>>>(model.norm_partial, model.grads[0], gradients);
    LAUNCHED();
    norm_kernel<<<1, 256>>>(model.norm, model.norm_partial, blocks, float(options.clip));
    LAUNCHED();
    Adam exact = adam_of(options, lr, model.norm, step + 1), compressed = exact;
    if (options.moments == RESET && options.gap > 0)  // these moments are younger
        compressed = adam_of(options, lr, model.norm, step % options.gap + 1);
    compressed.decay = decay;
    for (int i = 0; i < PARAMS; i++) {
        int which = param_rows[i].linear;
        exact.decay = param_rows[i].columns > 0 ? decay : 0.0f;
        if (which < 0) {
            adam_update(weights_at(model, i, 0, step), model.grads[i], model.m[i], model.v[i],
                        param_count(model.config, i), exact);
            continue;
        }
        const Adam& a = model.linear[which].compressed() ? compressed : exact;
        if (options.optimizer == MUON) update_by_muon(model, which, a, step);
        for (int layer = 0; options.optimizer == ADAMW && layer < model.config.L; layer++)
            update_linear(model, which, layer, a, step, nullptr);
    }
    float norm;
    model_get(&norm, model.norm, sizeof(norm));  // waits for all of it
    return norm;
}

// ---- what the host asks of a model

// Rounds freshly read weights, which stand in their fp32 copies where there are any, to the type in
// which they are kept.
static void model_round(Model& model) {
    bool narrow = model.options.master == MASTER_NONE;
    for (int i = 0; i < PARAMS && model.master[i] && (IS_BF16 || narrow); i++)
        round_weights(model.params[i], model.master[i], param_count(model.config, i), narrow);
}

// Seconds since the last call, by events: when the device came to the one, until it came to the
// other.
static double model_clock() {
    static cudaEvent_t events[2];
    static int calls = 0;
    cudaEvent_t& now = events[calls % 2];
    if (calls < 2) CUDA(cudaEventCreate(&now));
    CUDA(cudaEventRecord(now));
    CUDA(cudaEventSynchronize(now));
    float milliseconds = 0;
    if (calls > 0) CUDA(cudaEventElapsedTime(&milliseconds, events[(calls + 1) % 2], now));
    calls++;
    return milliseconds / 1e3;
}

// P (n, r) of a layer in the present epoch, written out in full, for --dump.
static std::vector<float> model_projection(Model& model, int which, int layer) {
    LinearLayer linear = linear_at(model, which, layer, 0);
    int n = linear.shape.n, r = linear.shape.r;
    std::vector<float> out(int64_t(n) * r, 0.0f), sign(n);
    const floatX* p = projection_now(linear);
    if (linear.projection != SPARSE) {
        std::vector<floatX> dense(out.size());
        model_get(dense.data(), p, dense.size() * sizeof(floatX));
        std::transform(dense.begin(), dense.end(), out.begin(), [](floatX x) { return float(x); });
        return out;
    }
    std::vector<int> shift((n + r - 1) / r);
    model_get(sign.data(), linear.sign, n * sizeof(float));
    model_get(shift.data(), linear.shift, shift.size() * sizeof(int));
    for (int k = 0; k < n; k++) out[int64_t(k) * r + (k + shift[k / r]) % r] = sign[k];
    return out;
}

// What was found on the machine, in a line.
static std::string model_device() {
    cudaDeviceProp device;
    CUDA(cudaGetDeviceProperties(&device, processes.local));
    return join(device.name, ", compute capability ", device.major, ".", device.minor, ", ",
                device.multiProcessorCount, " multiprocessors, ", TYPE_X);
}

static const char* model_attention(const Config& config) {
    return IS_BF16 && config.C == HEAD * config.NH
               ? "on tensor cores"
               : "plain and slow: the tensor cores take bf16 and heads of 64";
}

// FLOP/s of a large product, measured here: for a second, in which the clocks rise; the last round
// counts. 0 where there is no memory for it.
static double measured_flops() {
    const size_t SIZE = 4096, TIMES = 8;
    floatX* memory;
    if (cudaMalloc((void**)&memory, 3 * sizeof(floatX) * SIZE * SIZE) != cudaSuccess) {
        cudaGetLastError();
        return 0;
    }
    floatX *a = memory + SIZE * SIZE, *b = a + SIZE * SIZE;
    // 0.0115 everywhere: zeros would be too easy.
    CUDA(cudaMemset(memory, 0x3C, 3 * sizeof(floatX) * SIZE * SIZE));
    double start = seconds(), elapsed = 0;
    for (bool warm = false; !warm; warm = seconds() - start > 1) {
        double before = seconds();
        for (size_t i = 0; i < TIMES; i++)
            matmul(memory, CUDA_X, a, false, b, true, CUDA_X, SIZE, SIZE, SIZE, 1.0f, 0.0f);
        CUDA(cudaDeviceSynchronize());
        elapsed = seconds() - before;
    }
    CUDA(cudaFree(memory));
    return TIMES * 2.0 * SIZE * SIZE * SIZE / elapsed;
}

// Dense matrix-product rate in FLOP/s for the type that computes, without sparsity, from NVIDIA's
// data sheets; measured for a device that is not listed, or a part of one.
static double model_peak_flops() {
#ifdef __NOGPU__
    return 0;  // a CPU in a GPU's place
#endif
    const struct {
        const char* name;
        double bf16, fp32;
    } devices[] = {{"H200 NVL", 835e12, 60e12},     {"GH200", 989e12, 67e12},
                   {"H200", 989e12, 67e12},         {"H100 NVL", 835e12, 60e12},
                   {"H100 PCIe", 756e12, 51e12},    {"H100", 989e12, 67e12},
                   {"GB200", 2500e12, 80e12},       {"B200", 2250e12, 75e12},
                   {"A100", 312e12, 19.5e12},       {"A10G", 70e12, 35e12},
                   {"L40S", 362e12, 91.6e12},       {"L40", 181e12, 90.5e12},
                   {"L4", 121e12, 30.3e12},         {"RTX 3090", 71e12, 35.6e12},
                   {"RTX 4090", 165.2e12, 82.6e12}, {"RTX 5090", 209.5e12, 104.8e12}};
    cudaDeviceProp device;
    CUDA(cudaGetDeviceProperties(&device, processes.local));
    for (auto& row : devices) {
        const char* at = strstr(device.name, row.name);
        if (!at || strstr(device.name, "MIG")) continue;
        bool more = at[strlen(row.name)] != '\0';
        if (row.name[0] == 'R' && more) continue;  // RTX 4090 D, 4090 Laptop
        return IS_BF16 ? row.bf16 : row.fp32;
    }
    return measured_flops();
}

// =================================================================================================
// all else of the host; the same text in both trainers
// =================================================================================================

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <glob.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <new>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>

#ifdef USE_MPI
#include <mpi.h>
#endif
#ifndef REVISION
#define REVISION "unknown"
#endif

// ---- text

static std::string text(const char* format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    return line;
}

// 1234567 as 1,234,567
static std::string commas(int64_t n) {
    std::string digits = join(n);
    for (int at = int(digits.size()) - 3; at > 0; at -= 3) digits.insert(at, ",");
    return digits;
}

// The character of UTF-8 text at byte i and its length; U+FFFD and 1 where none begins there.
static uint32_t character_at(const std::string& raw, size_t i, size_t* length) {
    const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    unsigned char c = raw[i];
    *length = c < 0x80 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
    uint32_t code = *length == 1 ? c : c & (0x7F >> *length);
    bool good = c < 0x80 || (c >= 0xC0 && c < 0xF8);
    for (size_t j = 1; good && j < *length; j++) {
        good = (raw[i + j] & 0xC0) == 0x80;  // the string's closing 0 stops this in time
        code = code << 6 | (raw[i + j] & 0x3F);
    }
    bool surrogate = code >= 0xD800 && code <= 0xDFFF;
    if (good && code >= least[*length] && code <= 0x10FFFF && !surrogate) return code;
    *length = 1;
    return 0xFFFD;
}

// Bytes that are no UTF-8, and control characters, would upset a terminal or a JSON reader: they
// become U+FFFD. Lines end with \n, whatever they ended with.
static std::string printable(const std::string& raw) {
    std::string out;
    for (size_t i = 0, length; i < raw.size(); i += length) {
        uint32_t code = character_at(raw, i, &length);
        bool blank = code == '\n' || code == '\t';
        bool control = (code < 0x20 && !blank) || (code >= 0x7F && code < 0xA0);
        if (code == '\r')
            out += raw[i + 1] == '\n' ? "" : "\n";
        else
            out += code == 0xFFFD || control ? "\xEF\xBF\xBD" : raw.substr(i, length);
    }
    return out;
}

static std::string one_line(const std::string& raw) {
    std::string out = printable(raw);
    for (char& c : out) c = c == '\n' || c == '\t' ? ' ' : c;
    return out;
}

static std::string json_string(const std::string& raw) {
    std::string out = "\"";
    for (char c : printable(raw)) {
        if (c == '"' || c == '\\') out += '\\';
        out += c == '\n' ? "\\n" : c == '\t' ? "\\t" : std::string(1, c);
        // U+2028 and U+2029, which some readers take for ends of lines, are escaped.
        size_t last = out.size() < 3 ? 0 : out.size() - 3;
        if (out.compare(last, 3, "\xE2\x80\xA8") == 0) out.replace(last, 3, "\\u2028");
        if (out.compare(last, 3, "\xE2\x80\xA9") == 0) out.replace(last, 3, "\\u2029");
    }
    return out + "\"";
}

static double seconds() {
    auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(now).count();
}

// ---- shapes and plan

static int64_t rows_of(const Options& options) {
    return options.generates ? std::min<int64_t>(PIECE, options.seq)
                             : int64_t(options.batch) * options.seq;
}

static int64_t cached_tokens(const Options& options) {
    return options.generates || options.sample_every != 0 ? options.seq : 0;
}

static std::vector<int64_t> param_shape(const Config& config, int param, int rank) {
    const ParamRow& row = param_rows[param];
    if (param == WTE) return {config.Vp, config.C};
    if (param == WPE) return {config.context, config.C};
    std::vector<int64_t> shape;
    if (has_layers(param)) shape.push_back(config.L);
    shape.push_back(int64_t(row.rows) * config.C);
    if (row.columns > 0) shape.push_back(rank > 0 ? rank : int64_t(row.columns) * config.C);
    return shape;
}

static int64_t param_count(const Config& config, int param, int rank) {
    return count_of(param_shape(config, param, rank));
}

static int64_t parameter_count(const Config& config) {
    int64_t sum = 0;
    for (int i = 0; i < PARAMS; i++) sum += param_count(config, i);
    return sum;
}

static Linear linear_shape(const Config& config, const Options& options, int which) {
    const ParamRow& row = param_rows[weight_of(which)];
    int m = row.rows * config.C, n = row.columns * config.C;
    double r = options.rank <= 1.0 ? round(options.rank * n) : options.rank;
    if (options.rank < 1.0 && r >= 8) r = round(r / 8) * 8;  // so that rows of z begin on 16 bytes
    bool compressed = options.compress >> which & 1;
    return {m, n, compressed ? std::max(1, int(std::min<double>(r, n))) : n};
}

static int how_kept(int row, const Options& options, const Linear* linears) {
    const TapeRow& t = tape_rows[row];
    bool bits = options.gelu == GELU_2BIT;  // which do not give fch's GELU again
    int gone_from = row == FCH_GELU && bits ? tape_rows[FCH].gone_from : t.gone_from;
    if (options.generates || options.recompute >= gone_from) return GONE;
    if (t.input_of != NONE && linears[t.input_of].compressed()) return AS_Z;
    if (row == FCH && bits) return AS_2BIT;
    return t.scales != NO_SCALES && options.tape == TAPE_INT8 ? AS_INT8 : WHOLE;
}

static int scales_of(const Config& config, int row) {
    return tape_rows[row].scales == OF_HEADS ? tape_rows[row].width * config.NH : 1;
}

// Causal attention counts half of T x T. The update's lift, and Muon's products, are spread over
// the tokens of an optimizer step.
static Flops matrix_flops(const Config& config, const Options& options, const Linear* linears) {
    double L = config.L, attention = double(options.seq) * config.C;
    double head = 2.0 * config.V * config.C;
    Flops f = {head + L * 2 * attention, 2 * head + L * 5 * attention, 0, 0, 0};
    for (int i = 0; i < LINEARS; i++) {
        double m = linears[i].m, n = linears[i].n, r = linears[i].r;
        f.forward += L * 2 * m * n;
        f.backward += L * 2 * m * (n + r);
        if (options.optimizer == MUON) {
            double blocks = blocks_of(i), rows = m / blocks, k = std::min(rows, r);
            double iteration = 4 * rows * r * k + 2 * k * k * k;
            f.update += L * blocks * NEWTON_SCHULZ * iteration / options.total_batch;
        }
        if (!linears[i].compressed() || options.projection == SPARSE) continue;
        f.projection += L * 2 * n * r;
        f.update += L * 2 * m * n * r / options.total_batch;
    }
    for (int i = 0; i < TAPE_ROWS; i++) {
        int by = tape_rows[i].made_by;
        if (by == NONE || how_kept(i, options, linears) != GONE) continue;
        double linear = by == ATTENTION ? 0 : double(linears[by].m) * linears[by].n;
        f.recompute += L * 2 * (by == ATTENTION ? attention : linear);
    }
    if (options.generates) f = {f.forward, 0, 0, 0, 0};
    return f;
}

int64_t Plan::bytes(const std::string& category) const {
    int64_t sum = 0;
    for (const Tensor& t : tensors)
        if (category.empty() ? t.category != "host" : t.category == category) sum += t.bytes();
    return sum;
}

std::vector<std::string> Plan::categories() const {
    std::vector<std::string> names;
    for (const Tensor& t : tensors)
        if (std::find(names.begin(), names.end(), t.category) == names.end())
            names.push_back(t.category);
    return names;
}

// ---- bits of floats, and random numbers

static inline float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static uint16_t bf16_of_float(float x) {  // to nearest, ties to even
    uint32_t bits = bits_of_float(x);
    return x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static float float_of_bf16(uint16_t x) { return float_of_bits(uint32_t(x) << 16); }

// log and (sin, cos) without branches or calls, so that the compiler can vectorise the loops around
// them. Polynomials of Cephes (Moshier, 1989), within about 2 ulp of the true value.

static inline float log_simd(float x) {              // x positive and normal
    uint32_t bits = bits_of_float(x) - 0x3F3504F3u;  // sqrt(1/2): the mantissa begins there
    float e = float(int32_t(bits) >> 23);
    float f = float_of_bits((bits & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f, ff = f * f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    return p * f * ff - 2.12194440e-4f * e - 0.5f * ff + f + 0.693359375f * e;
}

static inline void sincos_simd(float x, float* s, float* c) {  // x in [0, 2 pi]
    float q = x * 0.636619772f + 12582912.0f;
    uint32_t quadrant = bits_of_float(q);
    q -= 12582912.0f;
    float f = x - q * 1.5703125f - q * 4.837512969970703125e-4f - q * 7.549789948768648e-8f;
    float ff = f * f;
    float sine = ((-1.9515295891e-4f * ff + 8.3321608736e-3f) * ff - 1.6666654611e-1f) * ff * f + f;
    float cosine =
        (2.443315711809948e-5f * ff - 1.388731625493765e-3f) * ff + 4.166664568298827e-2f;
    cosine = cosine * ff * ff - 0.5f * ff + 1.0f;
    uint32_t a = bits_of_float(quadrant & 1 ? cosine : sine);
    uint32_t b = bits_of_float(quadrant & 1 ? sine : cosine);
    *s = float_of_bits(a ^ (quadrant & 2) << 30);
    *c = float_of_bits(b ^ ((quadrant + 1) & 2) << 30);
}

// out[i] = scale * (normal i of a stream), the numbers of curand_normal4: Box-Muller on the words
// of a block in pairs. Starts from normal `start`, a multiple of 4.
static void draw_normals(float* out, int64_t start, int64_t count, float scale, uint64_t seed,
                         uint64_t stream) {
    const int BLOCKS = 128;
    const float step = 2.3283064e-10f, turn = step * 6.2831855f;  // 2^-32, and in radians
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < (count + 3) / 4; first += BLOCKS) {
        uint32_t words[4][BLOCKS];
        float numbers[4 * BLOCKS];
#pragma omp simd
        for (int i = 0; i < BLOCKS; i++) {
            Words block = philox(seed, stream, start / 4 + first + i);
            words[0][i] = block.x;
            words[1][i] = block.y;
            words[2][i] = block.z;
            words[3][i] = block.w;
        }
        for (int pair = 0; pair < 4; pair += 2) {
#pragma omp simd
            for (int i = 0; i < BLOCKS; i++) {
                float length = sqrtf(-2.0f * log_simd(words[pair][i] * step + step / 2)), s, c;
                sincos_simd(words[pair + 1][i] * turn + turn / 2, &s, &c);
                numbers[4 * i + pair] = scale * length * s;
                numbers[4 * i + pair + 1] = scale * length * c;
            }
        }
        int64_t n = std::min<int64_t>(4 * BLOCKS, count - 4 * first);
        memcpy(out + 4 * first, numbers, sizeof(float) * n);
    }
}

static double uniform(uint64_t seed, uint64_t stream, uint64_t index) {  // in [0, 1)
    return philox(seed, stream, index).x / 4294967296.0;
}

// ---- files: every count is held against the file's real size before anything is allocated

enum { MODEL_MAGIC = 20240326, TOKENS_MAGIC = 20240520, TOKENIZER_MAGIC = 20240328 };
enum { HELLASWAG_MAGIC = 20240522, STATE_MAGIC = 20241020, LLAMA_MAGIC = 20240801 };
enum { HEADER_BYTES = 1024, HEADER_INTS = HEADER_BYTES / 4 };

struct CloseFile {
    void operator()(FILE* file) const { fclose(file); }
};
typedef std::unique_ptr<FILE, CloseFile> File;

struct Input {
    std::string path;
    File file;
    int64_t size;
};

static Input open_input(const std::string& path) {
    struct stat info = {};
    bool known = stat(path.c_str(), &info) == 0;
    if (known && !S_ISREG(info.st_mode)) refuse(path, ": is not a file");  // a pipe would wait
    Input in = {path, File(fopen(path.c_str(), "rb")), info.st_size};
    if (!known || !in.file) refuse(path, ": cannot be read: ", strerror(errno));
    return in;
}

static void read_bytes(Input& in, void* to, size_t bytes) {
    if (fread(to, 1, bytes, in.file.get()) != bytes) refuse(in.path, ": ends too early");
}

static std::string read_start(Input& in, int64_t most) {
    std::string start(std::min(in.size, most), '\0');
    read_bytes(in, &start[0], start.size());
    return start;
}

static void seek(Input& in, int64_t offset) {
    if (fseeko(in.file.get(), offset, SEEK_SET) != 0) fail(in.path, ": cannot be searched");
}

static std::string kind_of(int magic) {
    const std::pair<int, const char*> kinds[] = {
        {MODEL_MAGIC, "GPT-2 model file"},   {TOKENS_MAGIC, "token shard"},
        {TOKENIZER_MAGIC, "tokenizer file"}, {HELLASWAG_MAGIC, "HellaSwag file"},
        {STATE_MAGIC, "training state"},     {LLAMA_MAGIC, "Llama 3 token shard"}};
    for (auto& kind : kinds)
        if (kind.first == magic) return kind.second;
    return "";
}

// What a file is by its first bytes, and what to do about it, where it is known to be neither text
// nor one of the above; else "". '?' stands for any byte.
static std::string foreign(const std::string& start) {
    const std::pair<const char*, const char*> kinds[] = {
        {"\x1F\x8B\x08", "is packed by gzip: unpack it first, with gunzip -k"},
        {"BZh?1AY&SY", "is packed by bzip2: unpack it first, with bunzip2 -k"},
        {"\xFD\x37zXZ", "is packed by xz: unpack it first, with unxz -k"},
        {"\x28\xB5\x2F\xFD", "is packed by zstd: unpack it first, with unzstd"},
        {"\x04\x22\x4D\x18", "is packed by lz4: unpack it first, with unlz4"},
        {"PK\x03\x04",
         "is a zip archive, as PyTorch's files are too: unpack it, or import it with "
         "data_prep/hf.py"},
        {"7z\xBC\xAF", "is a 7z archive: unpack it first, with 7z x"},
        {"%PDF-", "is a PDF: convert it first, with pdftotext"},
        {"PAR1", "is a Parquet table: write its column of text to a file first, with pandas"},
        {"\x93NUMPY",
         "is a NumPy array, which other trainers read: data_prep/prepare.py makes token "
         "shards, from text"},
        {"\xFF\xFE", "is text in UTF-16: convert it first, with iconv -f UTF-16 -t UTF-8"},
        {"\xFE\xFF", "is text in UTF-16: convert it first, with iconv -f UTF-16 -t UTF-8"},
    };
    for (auto& kind : kinds) {
        std::string bytes = kind.first;
        bool same = start.size() >= bytes.size();
        for (size_t i = 0; same && i < bytes.size(); i++)
            same = bytes[i] == '?' || bytes[i] == start[i];
        if (same) return kind.second;
    }
    return "";
}

// Whether a file holds bare numbers, as other trainers write their tokens. Of small ones in 16 or
// 32 bits the high bytes are 0, the low ones seldom. (In 64 bits, which count as two of 32, half of
// them are.) Text has no such byte.
static std::string bare_tokens(const std::string& start, int64_t size) {
    int64_t zeros[4] = {}, n = start.size();
    for (int64_t i = 0; i < n; i++) zeros[i % 4] += start[i] == 0;
    int64_t odd = zeros[1] + zeros[3], even = zeros[0] + zeros[2], high = zeros[2] + zeros[3];
    bool wide = size % 4 == 0 && high > n * 49 / 100 && zeros[0] < n * 3 / 16;
    bool narrow = size % 2 == 0 && odd > n / 200 && odd > 10 * even;
    if (!wide && !narrow) return "";
    const char* bits = wide ? "32" : "16";
    return join("looks like token ids of ", bits,
                " bits without a header, which nanoGPT and others ",
                "read: data_prep/prepare.py --type uint", bits, " makes token shards of them; or ",
                "like text in UTF-", bits, ": it reads UTF-8");
}

// Reads the header that all of llm.c's formats share; checks its magic number and its version.
static std::vector<int32_t> read_header(Input& in, int magic, std::initializer_list<int> versions) {
    std::vector<int32_t> header(HEADER_INTS);
    std::string start = read_start(in, HEADER_BYTES), what = kind_of(magic);
    memcpy(header.data(), start.data(), start.size());
    if (header[0] != magic) {
        std::string other = kind_of(header[0]).empty() ? "" : "is a " + kind_of(header[0]);
        if (other.empty()) other = foreign(start);
        if (other.empty()) other = join("begins with ", header[0], ", not ", magic);
        refuse(in.path, ": is no ", what, ": it ", other);
    }
    if (in.size < HEADER_BYTES)
        refuse(in.path, ": ", commas(in.size), " bytes are too few for a ", what);
    if (std::find(versions.begin(), versions.end(), header[1]) == versions.end())
        refuse(in.path, ": is a ", what, " of version ", header[1], ", which is not known");
    return header;
}

static uint64_t checksum(uint64_t sum, const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 4) {
        uint32_t word = 0;
        memcpy(&word, (const char*)data + i, std::min<size_t>(4, bytes - i));
        sum = (sum ^ word) * 0x9E3779B97F4A7C15ull;  // odd: a change of any word changes the sum
        sum ^= sum >> 29;
    }
    return sum;
}

// A file that appears whole or not at all: written beside its name, synced, then renamed.
struct Writer {
    std::string path;
    FILE* file;
    uint64_t sum = 0;
    explicit Writer(const std::string& name)
        : path(name), file(fopen((name + ".tmp").c_str(), "wb")) {
        if (!file) stop();
    }
    Writer(const Writer&) = delete;
    ~Writer() {
        if (!file) return;
        fclose(file);
        unlink((path + ".tmp").c_str());
    }
    [[noreturn]] void stop() { fail(path, ": cannot be written: ", strerror(errno)); }
    void write(const void* data, size_t bytes) {
        sum = checksum(sum, data, bytes);
        if (fwrite(data, 1, bytes, file) != bytes) stop();
    }
    void finish() {
        if (fflush(file) != 0 || fsync(fileno(file)) != 0) stop();
    }
    void commit() {
        finish();
        if (rename((path + ".tmp").c_str(), path.c_str()) != 0) stop();
        fclose(file);
        file = nullptr;
        std::string folder = path.substr(0, path.find_last_of('/') + 1) + ".";
        int handle = open(folder.c_str(), O_RDONLY);
        if (handle < 0) return;
        fsync(handle);  // the new name itself must reach the disk
        close(handle);
    }
};

// Elements [first, first + count) of a tensor as floats, piece by piece: `use` reads each piece, or
// fills it when it is to be stored, which fp32 and bf16 can be. 2bit begins and ends with whole
// bytes.
static void visit(const Tensor& t, int64_t first, int64_t count, bool store,
                  const std::function<void(float*, int64_t at, int64_t n)>& use) {
    const int64_t MOST = 1 << 18;
    std::vector<float> piece(std::min(MOST, count));
    std::vector<uint8_t> raw(piece.size() * t.bits() / 8);
    uint16_t* half = (uint16_t*)raw.data();
    bool fp32 = t.type == "fp32", bf16 = t.type == "bf16", int8 = t.type == "int8";
    char* data;
    memcpy(&data, t.home, sizeof(data));
    for (int64_t at = first, n; at < first + count; at += n) {
        n = std::min(MOST, first + count - at);
        char* from = data + at * t.bits() / 8;
        if (!store) model_get(raw.data(), from, n * t.bits() / 8);
        if (fp32 && !store) memcpy(piece.data(), raw.data(), n * 4);
        if (bf16 && !store) std::transform(half, half + n, piece.begin(), float_of_bf16);
        for (int64_t i = 0; int8 && i < n; i++) piece[i] = int8_t(raw[i]);
        for (int64_t i = 0; t.type == "2bit" && i < n; i++) piece[i] = raw[i / 4] >> i % 4 * 2 & 3;
        use(piece.data(), at, n);
        if (bf16 && store) std::transform(piece.begin(), piece.begin() + n, half, bf16_of_float);
        if (fp32 && store) memcpy(raw.data(), piece.data(), n * 4);
        if (store) model_set(from, raw.data(), n * t.bits() / 8);
    }
}

// ---- the model file: llm.c's, version 3 (fp32) and 5 (bf16)

static bool is_model_file(const std::string& model) {
    return model.find('/') != std::string::npos ||
           std::filesystem::path(model).extension() == ".bin";
}

// A category's tensors, without the gaps between them that some devices need.
static void tensors_of(const Plan& plan, const std::string& category, std::vector<Tensor>& found) {
    for (const Tensor& t : plan.tensors)
        if (t.category == category && t.type != "byte") found.push_back(t);
}

// The weights as files know them, in the order of the file: the fp32 master copies if there are
// any.
static std::vector<Tensor> weights_of(const Plan& plan) {
    std::vector<Tensor> weights;
    tensors_of(plan, plan.bytes("master") > 0 ? "master" : "parameters", weights);
    return weights;
}

static Config read_model_config(const std::string& path) {
    Input in = open_input(path);
    std::vector<int32_t> h = read_header(in, MODEL_MAGIC, {3, 5});
    const struct {
        const char* name;
        int value, low, high;
    } fields[] = {{"context", h[2], 1, 1 << 20},  {"vocabulary", h[3], 1, 1 << 16},
                  {"layers", h[4], 1, 1 << 10},   {"heads", h[5], 1, 1 << 10},
                  {"channels", h[6], 1, 1 << 16}, {"padded vocabulary", h[7], h[3], 1 << 17}};
    for (auto& f : fields)
        if (f.value < f.low || f.value > f.high)
            refuse(path, ": its ", f.name, " is ", f.value, ", not ", f.low, " to ", f.high);
    Config config = {h[2], h[3], h[4], h[5], h[6], h[7]};
    if (config.C % config.NH != 0)
        refuse(path, ": ", config.C, " channels do not divide into ", config.NH, " heads");
    int64_t wanted = HEADER_BYTES + parameter_count(config) * (h[1] == 3 ? 4 : 2);
    if (in.size != wanted)
        refuse(path, ": has ", commas(in.size), " bytes; its header asks for ", commas(wanted));
    return config;
}

static void read_model(const Plan& plan, const std::string& path) {
    Input in = open_input(path);
    bool bf16 = read_header(in, MODEL_MAGIC, {3, 5})[1] == 5;
    std::vector<uint16_t> half;
    for (const Tensor& t : weights_of(plan)) {
        visit(t, 0, t.count(), true, [&](float* to, int64_t, int64_t n) {
            half.resize(bf16 ? n : 0);
            read_bytes(in, bf16 ? (void*)half.data() : to, n * (bf16 ? 2 : 4));
            for (int64_t i = 0; i < n; i++) {
                if (bf16) to[i] = float_of_bf16(half[i]);
                if (!std::isfinite(to[i]))
                    refuse(path, ": ", t.name, " holds a value that is not finite");
            }
        });
    }
}

// The file is there when the writer that comes back commits.
static std::unique_ptr<Writer> write_model(const Plan& plan, const Config& c, int type,
                                           const std::string& path) {
    int version = type == TYPE_BF16 ? 5 : 3;
    int32_t header[HEADER_INTS] = {MODEL_MAGIC, version, c.context, c.V, c.L, c.NH, c.C, c.Vp};
    auto out = std::make_unique<Writer>(path);
    out->write(header, sizeof(header));
    std::vector<uint16_t> half;
    for (const Tensor& t : weights_of(plan)) {
        visit(t, 0, t.count(), false, [&](const float* from, int64_t, int64_t n) {
            if (type == TYPE_FP32) return out->write(from, n * 4);
            half.resize(n);
            std::transform(from, from + n, half.begin(), bf16_of_float);
            out->write(half.data(), n * 2);
        });
    }
    out->finish();
    return out;
}

// GPT-2's initialisation: N(0, 0.02), what adds to the stream scaled by 1 / sqrt(2 L), LayerNorm 1
// and 0.
static void initialise(const Plan& plan, const Config& config, int64_t seed) {
    int next = 0;
    for (const Tensor& t : weights_of(plan)) {
        int i = next++;
        bool adds = i == ATTPROJW || i == FCPROJW, norm = i == LN1W || i == LN2W || i == LNFW;
        float scale = adds ? 0.02f / sqrtf(2.0f * config.L) : 0.02f;
        int64_t words = i == WTE ? int64_t(config.V) * config.C : t.count();  // padded ones stay 0
        visit(t, 0, t.count(), true, [&](float* to, int64_t at, int64_t n) {
            std::fill(to, to + n, norm ? 1.0f : 0.0f);
            if (param_rows[i].columns == 0 || at >= words) return;
            uint64_t stream = stream_of(STREAM_INIT, i, 0);
            draw_normals(to, at, std::min(n, words - at), scale, seed, stream);
        });
    }
}

// ---- tokenizer: what each id stands for. Without a file, ids are bytes where there are at most
// 256 of them, else shown as numbers.

struct Tokenizer {
    std::vector<std::string> pieces;
    int end_of_text;
};

static Tokenizer read_tokenizer(const std::string& path) {
    Input in = open_input(path);
    std::vector<int32_t> h = read_header(in, TOKENIZER_MAGIC, {1, 2});
    Tokenizer t = {{}, h[1] == 1 ? 50256 : h[3]};  // version 1 is GPT-2's and does not say
    if (h[2] < 1 || h[2] > 1 << 16) refuse(path, ": its vocabulary is ", h[2], ", not 1 to 65536");
    if (t.end_of_text < 0 || t.end_of_text >= h[2])
        refuse(path, ": its end-of-text id ", t.end_of_text, " is not below ", h[2]);
    for (int i = 0; i < h[2]; i++) {
        unsigned char length;
        read_bytes(in, &length, 1);
        t.pieces.push_back(std::string(length, '\0'));
        read_bytes(in, &t.pieces.back()[0], length);
    }
    if (fgetc(in.file.get()) != EOF) refuse(path, ": goes on after its ", h[2], " tokens");
    return t;
}

static Tokenizer no_tokenizer(int V) {
    Tokenizer t = {{}, V == 50257 ? 50256 : V == 256 ? '\n' : 0};
    for (int i = 0; i < V; i++)
        t.pieces.push_back(V <= 256 ? std::string(1, char(i)) : join(" ", i));
    return t;
}

static void write_tokenizer(const Tokenizer& tokenizer, const std::string& path) {
    int32_t header[HEADER_INTS] = {TOKENIZER_MAGIC, 2, int32_t(tokenizer.pieces.size()),
                                   tokenizer.end_of_text};
    Writer out(path);
    out.write(header, sizeof(header));
    for (const std::string& piece : tokenizer.pieces) {
        unsigned char length = piece.size();
        out.write(&length, 1);
        out.write(piece.data(), piece.size());
    }
    out.commit();
}

// The one that --tokenizer names, else the file of that name beside the data or the model, else
// none.
static Tokenizer find_tokenizer(Options& options, const std::string& neighbour, int V) {
    std::string beside = neighbour.substr(0, neighbour.find_last_of('/') + 1) + "tokenizer.bin";
    if (options.tokenizer.empty() && access(beside.c_str(), F_OK) == 0) options.tokenizer = beside;
    return options.tokenizer.empty() ? no_tokenizer(V) : read_tokenizer(options.tokenizer);
}

// ---- from text to ids, as GPT-2 does it: the text falls into words, each word into tokens

// Where runs of letters (\p{L}) and numbers (\p{N}) begin and end in Unicode 16: distances in base
// 32, the last digit from '(' on, those before it from ']' on (dev/unicode_ranges.py).
static const char* unicode_letters =
    "_)B.B^7)2),)-?)G)k2,46-/)))a)-)**,)).))+)))<)_;)a30b.)^.*).^1_/C,,^5^3^+*)`+))7*/*2+*)8))FE_A3"
    ")@^)1*,)->,)1)+)?A/3-@).9^2^B^>+):)/278,0***>)/))+,+)8)5*)+6*2)0.,**>)/)*)*)*G,));+81)+)>)/)*)"
    "-+):)7*?)30***>)/)*)-+)F*)+7)9)).++),+*)))*+*+++4>)^<0)+)?)8+)B+*)**F),0)+)?)2)-+)G*)*7*91)+)^"
    "1*)8)-+0+@.-:+@)1))*/^B^8)*4/^B*)))-)@)))2)*1)*-))=,^()^G0)^,C-`;^3<)8.,,+)+*/+,54)9^.))-)*^3)"
    "g5),*/))),*^1),*^)),*/))),*7)^A),*_+^-88_>*.+p4*9)B-_3.0/:5;6:65)+7^<^+),)_+_A/-*^*))-_.2G^9F*"
    "-3^4,B^>?1^=_:)_E^790^>F5*2^4B^,^1+2^,*3-^3*+^1,).)*+)-c(_(e>*.*^.*.*0)))))))G*^=)/))++)/+,*.,"
    "5-+)/`<)5)85`-),)*2))+-.)))))),)3*,--,)^<*_pCd-.,+*4^.))-)*^@/)8?1/)/)/)/)/)/)/)/_8)k=*^2--*,_"
    ">.+)_B),-^3)_F9^(^88m(ck(_(rq5_+^6*e5+82*<^78G*_.^91*`/*_+**)))0=8)+),)?E^<6^:^F.+))*3D2?AE/^7"
    "D)8-)22-)^1?+)0<?+)+^:))+**-*)))@+*3/+4.*.*.1/)/)^3)6.`;Egz,4?,^9ee,h6*`2^./4--))2)5)-)))*)*)`"
    "4^)h3:_(*^>^04`<-)a/^,B.B3_A+.*.*.*+^+4)B);)*)7*6^*`Ci-E+^9^7^(5<)0.^.2F*^,,0^8aF:^,,^,,^00^<4"
    "3)7)/)*)3)7)/)*+^<4f?1>20@.)^2)1_-.*))^4)*+)*?2?1G_);)*2>2B_.^@.*_()7,)+)E^2E+E^+0)DC^>2>2;5:`"
    "6_1^?^;5^;5^,^.D1?dB^2.*8+^CE2)0>^2:^6=C?4^=^A**)5^5^(AB^,E)*)0^++)4^86,=)))^+:)A;*^G/))),)7)2"
    "/^7^.0***>)/)*)-+):)4-F2))*))^.))A)))^4^=:,<+F^8<*))b@^7^1,^,^8<)^C^35)_/C^-/bA^4`<_(G0*)*0)*)"
    "@7)))_F0*^/8)))D)2^0/)=)3^6;):_1c/^)G1)^-9)^9F`8/)*)^.=)A.)*)^(6)g/;7))5)^*`D)_7yBd.c,_o4`)7^^"
    "89.A`yC-o/crAF^t*nA/G9_79F:^88,G=-;j8^5c;_(a(_3-)_*5_(*))Db|@0^c>^12et/,)/)*)f+7)E+*)6,0i4_e,`"
    "3-5+1/2bx._=)_/)**)***,)4)))/)_)),*0)/)D),)-))+/)g<*A)A)G)A)G)A)G)A)G)A)0^v<G..e-^Fa:^52/8)g)F"
    ":^4l,Dd,F*)l7/),)*)7)c-^C_,/)^b<,)C)*))*))2),)))).),))))))+)*))*))))))))))*))*,)/),),)))2)9-+)"
    "-)9ag,^ft(^(a^B.cF*bq*6df97p6_j*mF^l*aw3-a`(";
static const char* unicode_numbers =
    "^82`@*-)*+^j)2a.2c.2iD2`>2,.`42`>2`>2*.`65`;20/`/2`0//;`52`(2`>2_.<e42_.2s7<x9+d72.2>2f42a(3b-"
    "2.2b>2_>2a.2.2^]>)+..2c.^;*-s>^D_6>p>F^h1)u1)A16+g?,a22F0)7^(2^/7yx(2bD2g(.aB2^.2c.2>2_>2i>2qu"
    ">2l5^54^A9*g=C^,,E)0)a.-c22z60A/^/1_3->.b(**8*^6_(1^<*F+_3-`00@0^1/g2.^82.2e>GaF2^2,`8/a.Fa(2^"
    "D2a82/<dC2g>2`>2h>2`.2.<_44j,;_E2q>2_>Ed+2_.2j.2`.=^^3`7lc)2_f.2_>2a.2)/m62e.?toA2^k.<4<`4A^_="
    "^:_g(2j.2l>2d?2s41a(2u?^C)+),_4^5)7{*5_t+2";

static std::vector<uint32_t> unicode_edges(const char* digits) {
    std::vector<uint32_t> edges;
    uint32_t edge = 0, distance = 0;
    for (const char* at = digits; *at; at++) {
        bool last = *at < ']';
        distance = distance * 32 + *at - (last ? '(' : ']');
        if (!last) continue;
        edges.push_back(edge += distance);
        distance = 0;
    }
    return edges;
}

enum { SPACE, LETTER, NUMBER, OTHER };

static int kind_of(uint32_t code) {
    static const std::vector<uint32_t> letters = unicode_edges(unicode_letters);
    static const std::vector<uint32_t> numbers = unicode_edges(unicode_numbers);
    static const std::set<uint32_t> spaces = {0x20,   0x85,   0xA0,   0x1680, 0x2028,
                                              0x2029, 0x202F, 0x205F, 0x3000};
    auto in = [&](const std::vector<uint32_t>& edges) {
        return (std::upper_bound(edges.begin(), edges.end(), code) - edges.begin()) % 2 == 1;
    };
    bool run = (code >= 9 && code <= 13) || (code >= 0x2000 && code <= 0x200A);
    if (run || spaces.count(code)) return SPACE;
    return in(letters) ? LETTER : in(numbers) ? NUMBER : OTHER;
}

// The end of the word at byte i:
// '(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
static size_t word_end(const std::string& raw, size_t i) {
    for (const char* ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
        if (raw.compare(i, strlen(ending), ending) == 0) return i + strlen(ending);
    size_t length, end = i, last = i;
    int kind = SPACE;
    if (raw[i] == ' ' && i + 1 < raw.size()) kind = kind_of(character_at(raw, i + 1, &length));
    if (kind == SPACE)
        kind = kind_of(character_at(raw, i, &length));
    else
        end++;
    while (end < raw.size() && kind_of(character_at(raw, end, &length)) == kind) {
        last = end;
        end += length;
    }
    bool before_word = kind == SPACE && end < raw.size() && last > i;
    return before_word ? last : end;  // the last blank goes to the next word
}

typedef std::unordered_map<std::string, int> Ids;

// Of all neighbours that a token joins, those whose token has the lowest id become one, the first
// ones first, until there are none.
static void encode_word(std::vector<int>& tokens, const Ids& ids, const std::string& word) {
    auto whole = ids.find(word);
    if (whole != ids.end()) return tokens.push_back(whole->second);
    size_t n = word.size();
    // Of the part that begins at a byte: its length, 0 where none does; where the part before
    // begins.
    std::vector<size_t> length(n, 1), before(n);
    std::set<std::tuple<int, size_t, size_t>> joins;  // id, begin, length
    auto offer = [&](size_t i) {
        size_t both = i + length[i] < n ? length[i] + length[i + length[i]] : 0;
        auto found = both > 0 && both < 256 ? ids.find(word.substr(i, both)) : ids.end();
        if (found != ids.end()) joins.insert({found->second, i, both});
    };
    for (size_t i = 0; i < n; i++) {
        before[i] = i - (i > 0);
        offer(i);
    }
    while (!joins.empty()) {
        auto [id, i, both] = *joins.begin();
        size_t next = i + length[i];
        joins.erase(joins.begin());
        bool stands = length[i] > 0 && next < n && length[i] + length[next] == both;
        if (!stands) continue;  // joined otherwise in the meantime
        length[i] = both;
        length[next] = 0;
        if (i + both < n) before[i + both] = i;
        offer(i);
        offer(before[i]);
    }
    for (size_t i = 0; i < n; i += length[i]) {
        auto found = ids.find(word.substr(i, length[i]));
        if (found == ids.end())
            refuse("--prompt: the tokenizer has no token for the byte ",
                   text("0x%02X", (unsigned char)word[i]));
        tokens.push_back(found->second);
    }
}

// An end of text that is spelt out is that token: who writes it in a prompt means it.
static std::vector<int> encode(const Tokenizer& tokenizer, const std::string& raw) {
    std::string mark = tokenizer.pieces[tokenizer.end_of_text];
    Ids ids;
    for (size_t i = 0; i < tokenizer.pieces.size(); i++) ids.insert({tokenizer.pieces[i], int(i)});
    std::vector<int> tokens;
    for (size_t from = 0, to;; from = to + mark.size()) {
        to = mark.size() > 1 ? std::min(raw.find(mark, from), raw.size()) : raw.size();
        std::string part = raw.substr(from, to - from);
        for (size_t i = 0, end; i < part.size(); i = end) {
            end = word_end(part, i);
            encode_word(tokens, ids, part.substr(i, end - i));
        }
        if (to == raw.size()) return tokens;
        tokens.push_back(tokenizer.end_of_text);
    }
}

// ---- data: llm.c's token shards, or any file as bytes. A shard of `tokens` holds (tokens - 1) / T
// sequences. Version 2 is for examples with a loss on the answer alone: int32 tokens, ~token (below
// 0) where a token is read but not predicted. Its header [4] is the length T of an example.

struct Shard {
    std::string path;
    int64_t start, tokens;  // start: bytes before the first token
    int width;              // bytes of a token: 1 in plain text, 2 in a shard, 4 in version 2
    int T = 0;              // the only --seq that it is for; 0: any
};

struct Data {
    std::vector<Shard> shards;
    int V, T;
    int64_t sequences, tokens, seed;
    std::string hash;  // of the files, a quick one
    bool shuffled;
    Input input;             // the shard that was read last
    std::vector<int> ahead;  // inputs and targets of the batch at ahead_place
    int64_t ahead_place;
};

// A file's size and 16 pieces of it, first and last among them; together they are all of a small
// one.
static uint64_t quick_hash(Input& in, uint64_t sum) {
    const int64_t PIECES = 16;
    std::vector<char> piece(std::min<int64_t>(in.size, 1 << 15));
    int64_t length = piece.size();
    sum = checksum(sum, &in.size, sizeof(in.size));
    for (int64_t i = 0; i < PIECES; i++) {
        seek(in, i + 1 == PIECES ? in.size - length : (in.size - length) / (PIECES - 1) * i);
        read_bytes(in, piece.data(), length);
        sum = checksum(sum, piece.data(), length);
    }
    return sum;
}

// The file of that name, or all that match.
static std::vector<std::string> matching_files(const char* option, const std::string& pattern) {
    if (access(pattern.c_str(), F_OK) == 0) return {pattern};
    glob_t found = {};
    if (glob(pattern.c_str(), GLOB_TILDE, nullptr, &found) != 0)
        refuse(option, ": no file matches '", pattern,
               "'; token shards (data_prep/prepare.py makes them) or text are wanted");
    std::vector<std::string> paths(found.gl_pathv, found.gl_pathv + found.gl_pathc);
    globfree(&found);
    return paths;
}

// The vocabulary of a file, and the file as a shard, its header checked.
static int read_shard(Input& in, Shard& shard) {
    std::string start = read_start(in, 1 << 16);
    int32_t magic = 0;
    memcpy(&magic, start.data(), std::min<size_t>(4, start.size()));
    bool ours = !kind_of(magic).empty();
    std::string other = ours ? "" : foreign(start);
    if (!ours && other.empty()) other = bare_tokens(start, in.size);
    if (!other.empty()) refuse(in.path, ": ", other);
    shard = {in.path, 0, in.size, 1};
    if (!ours && std::filesystem::path(in.path).extension() != ".bin") return 256;
    rewind(in.file.get());
    std::vector<int32_t> h = read_header(in, TOKENS_MAGIC, {1, 2});
    int width = 2 * h[1], V = h[3] == 0 ? 50257 : h[3];
    if (h[2] < 0 || in.size != HEADER_BYTES + width * int64_t(h[2]))
        refuse(in.path, ": has ", commas(in.size), " bytes; its header promises ", h[2],
               " tokens of ", width, " after 1,024");
    if (V < 1 || V > 1 << 16) refuse(in.path, ": its vocabulary is ", V, ", not 1 to 65536");
    shard = {in.path, HEADER_BYTES, h[2], width, h[1] == 2 ? h[4] : 0};
    return V;
}

// What goes wrong names the option.
static Data find_data(const char* option, const std::string& pattern) {
    Data data = {};
    uint64_t hash = 0;
    std::vector<std::string> paths = matching_files(option, pattern);
    for (const std::string& path : paths) {
        Input in = open_input(path);
        data.shards.push_back({});
        int V = read_shard(in, data.shards.back());
        hash = quick_hash(in, hash);
        if (data.V != 0 && data.V != V)
            refuse(path, ": has a vocabulary of ", V, ", ", paths[0], " one of ", data.V);
        data.V = V;
    }
    data.hash = text("%016llx", (unsigned long long)hash);
    return data;
}

// Sets the sequence length once it is known, and counts.
static void cut_data(Data& data, const char* option, int T) {
    data.T = T;
    data.sequences = data.tokens = 0;
    for (const Shard& shard : data.shards) {
        if (shard.T != 0 && shard.T != T)
            refuse("--seq: ", T, " is not ", shard.path, "'s length of an example, ", shard.T);
        data.sequences += std::max<int64_t>(0, shard.tokens - 1) / T;
        data.tokens += shard.tokens;
    }
    if (data.sequences == 0)
        refuse(option, ": ", data.shards[0].path, " has ", commas(data.tokens), " tokens there, ",
               "too few for one sequence of --seq ", T, " and the token after it");
}

// A random permutation of 0..n-1 without a table: a Feistel network on the next power of 4, walked
// until it lands below n.
static int64_t permute(int64_t i, int64_t n, uint64_t seed, uint64_t stream) {
    int half = 1;
    while (1ll << 2 * half < n) half++;
    int64_t mask = (1ll << half) - 1;
    do {
        for (int round = 0; round < 6; round++) {
            int64_t left = i >> half, right = i & mask;
            uint32_t random = philox(seed, stream, uint64_t(round) << 32 | right).x;
            i = right << half | (left ^ (random & mask));
        }
    } while (i >= n);
    return i;
}

// The sequence at a place in the endless stream of epochs. Shards come in a new order each epoch,
// sequences in each shard too. It is a function of the place alone: the order is the same for any
// micro batch and after any resume. A target that is not to be predicted is -1.
static void read_sequence(Data& data, int64_t place, int* inputs, int* targets) {
    int64_t epoch = place / data.sequences, left = place % data.sequences, count = 0;
    int number = 0, shards = int(data.shards.size());
    for (int i = 0; i < shards; i++, left -= count) {
        uint64_t stream = stream_of(STREAM_SHARDS, 0, epoch);
        number = data.shuffled ? int(permute(i, shards, data.seed, stream)) : i;
        count = std::max<int64_t>(0, data.shards[number].tokens - 1) / data.T;
        if (left < count) break;
    }
    uint64_t stream = stream_of(STREAM_SEQUENCES, number, epoch);
    if (data.shuffled) left = permute(left, count, data.seed, stream);
    const Shard& shard = data.shards[number];
    if (data.input.path != shard.path) data.input = open_input(shard.path);
    std::vector<uint8_t> raw(size_t(data.T + 1) * shard.width);
    seek(data.input, shard.start + left * data.T * shard.width);
    read_bytes(data.input, raw.data(), raw.size());
    for (int t = 0; t <= data.T; t++) {
        int token = 0;
        for (int i = shard.width - 1; i >= 0; i--)
            token = int(uint32_t(token) << 8 | raw[t * shard.width + i]);
        bool predicted = token >= 0;
        if (!predicted) token = ~token;
        if (token >= data.V)
            refuse(shard.path, ": token ", commas(left * data.T + t), " is ", token, ", not below ",
                   data.V);
        if (t < data.T) inputs[t] = token;
        if (t > 0) targets[t - 1] = predicted ? token : -1;
    }
}

// A batch that will be wanted, while the device works on the one before.
static void read_ahead(Data& data, int64_t place, int64_t B) {
    data.ahead.resize(2 * B * data.T);
    int *inputs = data.ahead.data(), *targets = inputs + B * data.T;
    for (int64_t b = 0; b < B; b++)
        read_sequence(data, place + b, inputs + b * data.T, targets + b * data.T);
    data.ahead_place = place;
}

static void read_batch(Data& data, int64_t place, int B, Model& model) {
    int64_t N = int64_t(B) * data.T;
    if (data.ahead_place != place || int64_t(data.ahead.size()) != 2 * N)
        read_ahead(data, place, B);
    std::copy_n(data.ahead.begin(), N, model.inputs);
    std::copy_n(data.ahead.begin() + N, N, model.targets);
}

// How many tokens the sequences from a place on predict: the loss is their mean.
static int64_t predicted_tokens(Data& data, int64_t place, int64_t sequences) {
    auto masked = [](const Shard& shard) { return shard.width == 4; };
    if (std::none_of(data.shards.begin(), data.shards.end(), masked)) return sequences * data.T;
    std::vector<int> inputs(data.T), targets(data.T);
    int64_t count = 0;
    for (int64_t i = 0; i < sequences; i++) {
        read_sequence(data, place + i, inputs.data(), targets.data());
        count += targets.size() - std::count(targets.begin(), targets.end(), -1);
    }
    return std::max<int64_t>(count, 1);
}

// ---- learning rate of step `step` (from 0): linear warm-up, then the schedule's way down to
// lr * final_lr_frac. wsd: the last fifth goes down, 1 - sqrt (arXiv 2405.18392).

static double learning_rate(const Options& options, int64_t step, int64_t steps) {
    double high = options.lr, low = high * options.final_lr_frac;
    int64_t warmup = options.warmup, decay_from = std::max(warmup, steps * 4 / 5);
    if (step < warmup) return high * double(step + 1) / warmup;
    double done = double(step - warmup) / std::max<int64_t>(1, steps - warmup);
    if (options.schedule == COSINE) return low + 0.5 * (1.0 + cos(M_PI * done)) * (high - low);
    if (options.schedule == LINEAR) return high - done * (high - low);
    if (options.schedule == CONSTANT || step < decay_from) return high;
    return low + (1.0 - sqrt(double(step - decay_from) / (steps - decay_from))) * (high - low);
}

// ---- what all processes find together

enum { SUM, HIGHEST };

// Sums each of n values over the processes, or takes the highest: the same bits for all of them.
static void combine(int how, double* values, int n) {
#ifdef USE_MPI
    MPI_Op op = how == SUM ? MPI_SUM : MPI_MAX;
    MPI_Allreduce(MPI_IN_PLACE, values, n, MPI_DOUBLE, op, MPI_COMM_WORLD);
#else
    (void)how, (void)values, (void)n;
#endif
}

// Whether a value is the same in all processes: as many of its bits as a double holds.
static bool agree(uint64_t value) {
    double low = double(value & ((1ull << 53) - 1)), bounds[] = {low, -low};
    combine(HIGHEST, bounds, 2);
    return bounds[0] == -bounds[1];
}

// ---- evaluation: validation loss, HellaSwag, samples. They use the training buffers between steps
// and change nothing else.

// Of tokens first, first + 1, ... those that are predicted: the sum of their losses, and their
// count.
struct Losses {
    double sum = 0;
    int64_t count = 0;
    void add(const Model& model, int64_t first, int64_t tokens) {
        model_wait();
        for (int64_t i = first; i < first + tokens; i++) {
            sum += model.losses[i];
            count += model.targets[i] >= 0;
        }
    }
    void combine_processes() {
        double both[] = {sum, double(count)};
        combine(SUM, both, 2);
        sum = both[0];
        count = int64_t(both[1]);
    }
    double mean() const { return sum / std::max<int64_t>(count, 1); }
};

static double mean_loss(const Model& model, int64_t first, int64_t tokens) {
    Losses losses;
    losses.add(model, first, tokens);
    return losses.mean();
}

// Those of the first --val-batches batches: the same ones each time.
static int64_t validated_sequences(const Data& data, const Options& options) {
    int64_t wanted = int64_t(options.val_batches) * options.batch;
    return options.val_batches < 0 ? data.sequences : std::min(data.sequences, wanted);
}

static double validate(Model& model, Data& data, const Options& options) {
    Losses losses;
    int64_t end = validated_sequences(data, options), B = options.batch;
    for (int64_t first = B * processes.rank; first < end; first += B * processes.count) {
        int64_t rows = std::min(B, end - first);
        read_batch(data, first, int(rows), model);
        model_evaluate(model, int(rows), data.T);
        losses.add(model, 0, rows * data.T);
    }
    losses.combine_processes();
    return losses.mean();
}

// Bytes of text a token that the validation predicts; 0 where a token's are not known. An end of
// text has none.
static double bytes_per_token(Data& data, const Options& options, const Tokenizer& tokenizer) {
    std::vector<int> inputs(data.T), targets(data.T);
    int64_t tokens = 0, bytes = 0, known = tokenizer.pieces.size();
    for (int64_t i = 0; i < validated_sequences(data, options); i++) {
        read_sequence(data, i, inputs.data(), targets.data());
        for (int target : targets) {
            if (target < 0) continue;  // is read, not predicted
            if (target >= known) return 0;
            tokens++;
            bool ends = target == tokenizer.end_of_text && known > 256;
            if (!ends) bytes += tokenizer.pieces[target].size();
        }
    }
    return double(bytes) / std::max<int64_t>(tokens, 1);
}

struct Example {
    int label;
    std::vector<int> context;
    std::vector<std::vector<int>> endings;  // 2 to 4
};

static std::vector<Example> read_hellaswag(const std::string& path, int V) {
    Input in = open_input(path);
    int count = read_header(in, HELLASWAG_MAGIC, {1})[2];
    if (count < 1 || in.size % 2 != 0)
        refuse(path, ": ", count, " examples in ", commas(in.size), " bytes are not possible");
    std::vector<uint16_t> words((in.size - HEADER_BYTES) / 2);
    read_bytes(in, words.data(), words.size() * 2);
    size_t at = 0;
    auto next = [&](const char* what, int low, int high) {
        if (at >= words.size()) refuse(path, ": ends inside its examples");
        if (words[at] < low || words[at] > high)
            refuse(path, ": ", what, " is ", words[at], ", not ", low, " to ", high, " (word ", at,
                   ")");
        return int(words[at++]);
    };
    auto tokens = [&] {
        std::vector<int> list(next("a length", 1, 65535));
        for (int& token : list) token = next("a token", 0, V - 1);
        return list;
    };
    std::vector<Example> examples;
    for (int i = 0; i < count; i++) {
        Example e;
        size_t start = at;
        next("an example's first word", 65535, 65535);
        size_t bytes = next("an example's size", 0, 65535);
        next("an example's index", i & 65535, i & 65535);
        e.label = next("the right ending", 0, 3);
        e.endings.resize(next("the number of endings", std::max(2, e.label + 1), 4));
        e.context = tokens();
        for (auto& ending : e.endings) ending = tokens();
        if (bytes != (at - start) * 2)
            refuse(path, ": example ", i, " has ", (at - start) * 2, " bytes, not ", bytes);
        examples.push_back(e);
    }
    if (at != words.size()) refuse(path, ": goes on after its ", count, " examples");
    return examples;
}

// The share of examples whose right ending has the lowest mean loss of all. A context too long
// loses its beginning.
static double score_hellaswag(Model& model, const std::vector<Example>& examples,
                              const Options& options) {
    double right = 0;
    for (size_t at = processes.rank; at < examples.size(); at += processes.count) {
        const Example& e = examples[at];
        int endings = int(e.endings.size()), group = std::min(options.batch, endings);
        double losses[4];
        for (int first = 0; first < endings; first += group) {
            int rows = std::min(group, endings - first);
            std::vector<int> row[4];
            size_t longest = options.seq + 1;
            int64_t T = 0;
            for (int b = 0; b < rows; b++) {
                const std::vector<int>& ending = e.endings[first + b];
                row[b] = e.context;
                row[b].insert(row[b].end(), ending.begin(), ending.end());
                if (row[b].size() > longest) row[b].erase(row[b].begin(), row[b].end() - longest);
                T = std::max<int64_t>(T, row[b].size() - 1);
            }
            for (int64_t i = 0; i < rows * T; i++) {  // a row's padding comes after all that counts
                const std::vector<int>& r = row[i / T];
                bool inside = i % T + 1 < int64_t(r.size());
                model.inputs[i] = inside ? r[i % T] : 0;
                model.targets[i] = inside ? r[i % T + 1] : 0;
            }
            model_evaluate(model, rows, int(T));
            for (int b = 0; b < rows; b++) {
                int64_t last = row[b].size() - 1, length = e.endings[first + b].size();
                int64_t scored = std::min(length, last);
                losses[first + b] = mean_loss(model, b * T + last - scored, scored);
            }
        }
        right += std::min_element(losses, losses + endings) - losses == e.label;
    }
    combine(SUM, &right, 1);
    return right / examples.size();
}

// An id from logits (V), at a temperature (0: the best), among the top_k best (0: all). Logits that
// are not finite are passed over; where none is left the answer is 0.
static int sample_token(const float* logits, int V, double temperature, int top_k, double coin) {
    std::vector<std::pair<float, int>> order;  // the best first
    order.reserve(V);
    for (int i = 0; i < V; i++)
        if (std::isfinite(logits[i])) order.push_back({-logits[i], i});
    if (order.empty()) return 0;
    size_t kept = order.size(), i = 0;
    if (top_k > 0) kept = std::min<size_t>(kept, top_k);
    if (temperature == 0) kept = 1;
    std::partial_sort(order.begin(), order.begin() + kept, order.end());
    auto weight = [&](size_t at) {
        double below = double(order[0].first) - order[at].first;
        return kept == 1 ? 1.0 : exp(below / temperature);
    };
    double left = 0;
    for (size_t at = 0; at < kept; at++) left += coin * weight(at);
    while (i + 1 < kept && left >= weight(i)) left -= weight(i++);
    return order[i].second;
}

// How many bytes stand before a character that has only begun.
static size_t whole_characters(const std::string& raw) {
    for (size_t back = 1; back < 4 && back <= raw.size(); back++) {
        unsigned char c = raw[raw.size() - back];
        if (c < 0x80) break;
        if (c < 0xC0) continue;
        size_t length = c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF8 ? 4 : 1;
        return raw.size() - (back < length ? back : 0);
    }
    return raw.size();
}

// --sample-tokens tokens that follow `tokens`, or an end of text where there is none, each handed
// to `use`; an end of text is the last. What the model saw stays in the cache. Where that is full,
// the model goes on from the text's last half.
static void generate(Model& model, const Tokenizer& tokenizer, std::vector<int> tokens,
                     const Options& options, int64_t step,
                     const std::function<void(const std::string&)>& use) {
    int V = model.config.V, past = 0, end = tokenizer.end_of_text;
    std::vector<float> logits(V);
    if (tokens.empty()) tokens.push_back(end < V ? end : 0);
    for (int i = 0; i < options.sample_tokens; i++) {
        if (int64_t(tokens.size()) > options.seq) {
            tokens.erase(tokens.begin(), tokens.end() - (options.seq + 1) / 2);
            past = 0;
        }
        for (int n; past < int(tokens.size()); past += n) {
            n = std::min<int>(PIECE, int(tokens.size()) - past);
            std::copy_n(tokens.begin() + past, n, model.inputs);
            model_forward(model, 1, n, past, false);
            // The last piece's are the ones that count.
            model_logits(model, logits.data(), n - 1, 1);
        }
        double coin = uniform(options.seed, stream_of(STREAM_SAMPLE, 0, step), i);
        int token = sample_token(logits.data(), V, options.temperature, options.top_k, coin);
        if (V > 256 && token == end) break;
        tokens.push_back(token);
        use(size_t(token) < tokenizer.pieces.size() ? tokenizer.pieces[token] : "");
    }
}

// ---- checkpoints: DIR/model_STEP.bin for others, DIR/state_STEP.bin to go on from

// What must be the same for a state to fit: the flag, and its value in words.
typedef std::vector<std::pair<std::string, std::string>> Identity;

static std::string checkpoint_path(const std::string& dir, const std::string& kind, int64_t step) {
    return dir + "/" + kind + text("_%08lld.bin", (long long)step);
}

// What a state holds: the weights and the moments. Projections are drawn again.
static std::vector<Tensor> saved_tensors(const Plan& plan) {
    std::vector<Tensor> saved = weights_of(plan);
    tensors_of(plan, "moments", saved);
    return saved;
}

static int64_t saved_bytes(const Plan& plan) {
    int64_t bytes = 0;
    for (const Tensor& t : saved_tensors(plan)) bytes += t.count() * 4;
    return bytes;
}

// int32[256] {magic, version, step, bytes of the identity}, the identity as lines of flag=value,
// the tensors, a checksum. All in multiples of 4 bytes.
static std::unique_ptr<Writer> write_state(const Plan& plan, const Identity& identity, int64_t step,
                                           const std::string& path) {
    std::string lines;
    for (auto& row : identity) lines += row.first + "=" + row.second + "\n";
    lines += std::string(-lines.size() % 4, '\n');
    int32_t header[HEADER_INTS] = {STATE_MAGIC, 1, int32_t(step), int32_t(lines.size())};
    auto out = std::make_unique<Writer>(path);
    out->write(header, sizeof(header));
    out->write(lines.data(), lines.size());
    auto write = [&](const float* from, int64_t, int64_t n) { out->write(from, n * 4); };
    for (const Tensor& t : saved_tensors(plan)) visit(t, 0, t.count(), false, write);
    uint64_t sum = out->sum;
    out->write(&sum, sizeof(sum));
    out->finish();
    return out;
}

// The value of a flag in a state's lines. Where they lack it: what revisions that did not know the
// flag did.
static std::string saved_value(const std::string& lines, const std::string& flag) {
    size_t at = ("\n" + lines).find("\n" + flag + "="), from = at + flag.size() + 1;
    if (at != std::string::npos) return lines.substr(from, lines.find('\n', from) - from);
    const std::pair<const char*, const char*> before[] = {
        {"--optimizer", "adamw"}, {"--gelu", "exact"}, {"--tape", "full"}, {"--master", "fp32"}};
    for (auto& row : before)
        if (flag == row.first) return row.second;
    return "none";
}

// Refuses a state whose lines do not fit a run's flags. Rows that are no flags may differ.
static void compare_flags(const Identity& identity, const std::string& lines,
                          const std::string& path) {
    std::set<std::string> flags;
    for (auto& [flag, value] : identity) {
        flags.insert(flag);
        std::string was = saved_value(lines, flag), how = " was saved with ";
        if (("\n" + lines).find("\n" + flag + "=") == std::string::npos)
            how = " is of a revision that had no such option and did as with ";
        // What older ones said of it.
        bool less = value.compare(0, was.size() + 2, was + ", ") == 0;
        if (flag[0] == '-' && was != value && !less)
            refuse(flag, ": ", path, how, was, ", not ", value);
    }
    std::istringstream rows(lines);
    for (std::string row; std::getline(rows, row);) {
        std::string flag = row.substr(0, row.find('='));
        if (flag[0] == '-' && flags.count(flag) == 0)
            refuse(flag, ": ", path, " was saved with ", saved_value(lines, flag),
                   ", an option that this revision lacks");
    }
}

// Loads a state and returns its step, and its lines. Refuses one that is not whole, and then one
// that was made with other flags.
static int64_t read_state(const Plan& plan, const Identity& identity, const std::string& path,
                          std::string* saved = nullptr) {
    Input in = open_input(path);
    std::vector<int32_t> h = read_header(in, STATE_MAGIC, {1});
    std::vector<char> piece(1 << 20);
    int64_t body = in.size - HEADER_BYTES - 8;
    uint64_t sum = checksum(0, h.data(), HEADER_BYTES), expected;
    for (int64_t left = body, n; left > 0; left -= n) {
        n = std::min<int64_t>(left, piece.size());
        read_bytes(in, piece.data(), n);
        sum = checksum(sum, piece.data(), n);
    }
    read_bytes(in, &expected, sizeof(expected));
    if (in.size % 4 != 0 || sum != expected)
        refuse(path, ": is cut short or damaged: its checksum does not hold");

    std::string lines(std::max<int64_t>(0, std::min<int64_t>(h[3], body)), '\0');
    seek(in, HEADER_BYTES);
    read_bytes(in, &lines[0], lines.size());
    compare_flags(identity, lines, path);
    if (saved) *saved = lines;
    if (body != int64_t(lines.size()) + saved_bytes(plan))
        refuse(path, ": is of another make: its contents do not fit its flags");
    auto read = [&](float* to, int64_t, int64_t n) { read_bytes(in, to, n * 4); };
    for (const Tensor& t : saved_tensors(plan)) visit(t, 0, t.count(), true, read);
    return h[2];
}

// Steps of which DIR has a file of this kind, the newest first.
static std::vector<int64_t> saved_steps(const std::string& dir, const std::string& kind) {
    std::vector<int64_t> steps;
    std::error_code error;
    for (auto& entry : std::filesystem::directory_iterator(dir, error)) {
        long long step;
        std::string name = entry.path().filename();
        bool saved = sscanf(name.c_str(), (kind + "_%lld.bin").c_str(), &step) == 1;
        if (saved && "/" + name == checkpoint_path("", kind, step)) steps.push_back(step);
    }
    if (error) refuse("the folder ", dir, " cannot be read: ", error.message());
    std::sort(steps.rbegin(), steps.rend());
    return steps;
}

static void save_checkpoint(const Plan& plan, const Config& config, const Options& options,
                            const Identity& identity, int64_t step) {
    const std::string& dir = options.out;
    auto model =
        write_model(plan, config, options.checkpoint_type, checkpoint_path(dir, "model", step));
    auto state = write_state(plan, identity, step, checkpoint_path(dir, "state", step));
    model->commit();
    state->commit();
    std::vector<int64_t> steps = saved_steps(dir, "state");
    // Later ones did not load: they do not count.
    steps.erase(steps.begin(), std::find(steps.begin(), steps.end(), step));
    for (size_t i = options.keep; options.keep > 0 && i < steps.size(); i++)
        for (const char* kind : {"model", "state"})
            unlink(checkpoint_path(dir, kind, steps[i]).c_str());
}

// The step of a line of log.jsonl; -1 in the first line of a start, which has none.
static int64_t logged_step(const std::string& line) {
    long long step;
    return sscanf(line.c_str(), "{\"step\": %lld", &step) == 1 ? step : -1;
}

static bool has_steps(const std::string& path) {
    std::ifstream log(path);
    for (std::string line; std::getline(log, line);)
        if (logged_step(line) >= 0) return true;
    return false;
}

// Whether the disk has room for what steps start + 1 to `steps` will save, beside what is there and
// will go.
static void foresee_disk(const Plan& plan, const Config& config, const Options& options,
                         int64_t start, int64_t steps) {
    struct statvfs disk;
    const std::string& dir = options.out;
    int64_t n = options.checkpoint_every, keep = options.keep;
    if (dir.empty() || n == 0 || statvfs(dir.c_str(), &disk) != 0 || disk.f_blocks == 0) return;
    int64_t weights = parameter_count(config) * (options.checkpoint_type == TYPE_BF16 ? 2 : 4);
    int64_t each = 2 * HEADER_BYTES + weights + saved_bytes(plan);
    int64_t count = n > 0 ? std::max<int64_t>(1, (steps + n - 1) / n - start / n) : 1;
    int64_t old = saved_steps(dir, "state").size();  // an old one goes after the new one came
    if (keep > 0) count = std::min(count, std::max<int64_t>(1, keep + 1 - old));
    double room = double(disk.f_bavail) * disk.f_frsize;
    if (double(count) * each > room)
        fail("--out: ", dir, " has ", commas(int64_t(room)), " bytes of room, ", commas(count),
             " checkpoints of ", commas(each), " bytes will lie there at once; choose another ",
             "folder, or less by --keep or --checkpoint-every");
}

// A run owns its folder as long as it lives: the lock ends with the process, however that ends.
// What a run that was killed left half done is tidied away.
static void take_folder(const Options& options) {
    std::error_code error;
    const std::string& dir = options.out;
    std::filesystem::create_directories(dir, error);
    if (!std::filesystem::is_directory(dir, error) || access(dir.c_str(), W_OK) != 0)
        refuse("--out: ", dir, " is not a folder that can be made or written");
    int lock = open((dir + "/lock").c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0666);
    // Else: a disk that knows no locks.
    if (lock >= 0 && flock(lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        refuse("--out: ", dir,
               " is in use by another run; wait for its end, or give another folder");
    std::vector<int64_t> steps = saved_steps(dir, "state");
    bool logged = has_steps(dir + "/log.jsonl");
    if (!options.resume && (!steps.empty() || logged))
        refuse("--out: ", dir, " holds ", steps.empty() ? "the log" : "checkpoints",
               " of an earlier run; go on from it with --resume, or give another folder");
    for (auto& entry : std::filesystem::directory_iterator(dir)) {
        std::string name = entry.path().filename();
        bool ours = name == "log.jsonl.tmp" || name == "tokenizer.bin.tmp";
        for (const char* kind : {"model", "state"}) {
            long long step = -1;
            sscanf(name.c_str() + std::min<size_t>(5, name.size()), "_%lld", &step);
            ours |= "/" + name == checkpoint_path("", kind, step) + ".tmp";
        }
        bool regular = std::filesystem::is_regular_file(entry.symlink_status());
        if (ours && regular) unlink(entry.path().c_str());
    }
    for (int64_t step : saved_steps(dir, "model")) {  // its state was to follow
        if (!steps.empty() && step > steps[0]) unlink(checkpoint_path(dir, "model", step).c_str());
    }
}

// Goes on from the newest whole state, whose lines come back too, or from step 0 where there is
// none at all.
static int64_t resume(const Plan& plan, const Identity& identity, const std::string& dir,
                      std::string& lines) {
    std::vector<int64_t> steps = saved_steps(dir, "state");
    for (size_t i = 0; i < steps.size(); i++) {
        try {
            return read_state(plan, identity, checkpoint_path(dir, "state", steps[i]), &lines);
        } catch (const Failure& failure) {
            bool other_flags = failure.message.compare(0, 2, "--") == 0;
            if (other_flags || i + 1 == steps.size()) throw;
            fprintf(stderr, "%s; trying the one before\n", one_line(failure.message).c_str());
        }
    }
    return 0;
}

// ---- options: a row each; parsing, --help, the log and the plan's JSON all follow from this table

enum { TEXT, INT, REAL, RANK, BYTES, FLAG, CHOICE, SET, PLAN };

struct OptionRow {
    char letter;
    const char *name, *argument;
    int kind;
    void* value;
    std::string help;  // ends with the default in parentheses where its number would say nothing
    double low = 0, high = 0;
    const char* names = "";  // of choices
};

static const char* linear_names = "qkv,attproj,fc,fcproj";
static const char* optimizer_names = "adamw,muon";
static const char* projection_names = "gaussian,rademacher,sparse";
static const char* moments_names = "keep,move,reset";
static const char* schedule_names = "cosine,linear,constant,wsd";
static const char* type_names = "fp32,bf16";

// What each level computes again, in the tape's own words.
static std::string levels_help() {
    std::string out = "0 keeps all; computed again from level";
    for (int level = 1; level < NEVER; level++) {
        out += join(level > 1 ? ", " : " ", level);
        for (const TapeRow& row : tape_rows)
            if (row.gone_from == level) out += join(" ", row.name);
    }
    return out;
}

// clang-format off
static std::vector<OptionRow> option_table(Options& o) {
    const double MANY = 1e9, WIDE = 1 << 20;
    return {
    {'i', "train", "PATTERN", TEXT, &o.train,
     "token shards (glob), or plain text: bytes as tokens"},
    {'j', "val", "PATTERN", TEXT, &o.val, "likewise; without it, the last 10 % of a plain text"},
    {'e', "model", "M", TEXT, &o.model,
     "d12, d24, d36, d48, any dN; or what to start from: a model file, a run's folder"},
    {0, "channels", "C", INT, &o.channels,
     "the width of a fresh model (64 a layer, or GPT-2's own)", 0, 65536},
    {0, "heads", "NH", INT, &o.heads, "its attention heads (one for 64 channels)", 0, 1024},
    {0, "layers", "L", INT, &o.layers, "its layers (N, of dN)", 0, 1024},
    {0, "context", "T", INT, &o.context, "the longest sequence that it can see (1024)", 0, WIDE},
    {0, "tokenizer", "FILE", TEXT, &o.tokenizer,
     "for text; else tokenizer.bin beside the data or the model"},

    {'b', "batch", "B", INT, &o.batch, "micro batch, in sequences", 1, MOST_SEQUENCES},
    {'t', "seq", "T", INT, &o.seq, "sequence length (the model's context)", 0, WIDE},
    {'d', "total-batch", "N", INT, &o.total_batch,
     "tokens in an optimizer step, by accumulation (B * T)", 0, MANY},
    {'x', "steps", "N", INT, &o.steps, "optimizer steps (once through the data)", -1, MANY},
    {'l', "lr", "X", REAL, &o.lr, "highest learning rate", 0, 100},
    {'u', "warmup", "N", INT, &o.warmup, "steps of linear warm-up", 0, MANY},
    {'q', "final-lr-frac", "X", REAL, &o.final_lr_frac,
     "the last learning rate, as a fraction of the highest", 0, 1},
    {'k', "schedule", "S", CHOICE, &o.schedule, "how the rate falls: ", 0, 0, schedule_names},
    {'c', "weight-decay", "X", REAL, &o.weight_decay, "on matrices only", 0, 100},
    {0, "clip", "X", REAL, &o.clip, "largest global gradient norm; 0: no clipping", 0, MANY},
    {0, "beta1", "X", REAL, &o.beta1, "AdamW's decay of the first moment", 0, 0.999999},
    {0, "beta2", "X", REAL, &o.beta2, "and of the second", 0, 0.999999},
    {0, "eps", "X", REAL, &o.eps, "added to the second moment's root", 1e-30, 1},
    {0, "optimizer", "O", CHOICE, &o.optimizer,
     "of the linear layers' weights; all else takes adamw: ", 0, 0, optimizer_names},

    {0, "rank", "R", RANK, &o.rank,
     "ratio in (0, 1] of a layer's inputs, or a whole rank above 1; 1 is full rank", 0, MANY},
    {0, "compress", "LIST", SET, &o.compress,
     "the layers that this holds for: none, or from ", 0, 0, linear_names},
    {0, "projection", "P", CHOICE, &o.projection, "what is drawn for P: ", 0, 0, projection_names},
    {0, "gap", "T", INT, &o.gap, "steps between new projections; 0: never", 0, MANY},
    {0, "alpha", "A", REAL, &o.alpha, "scale of a compressed layer's step", 0, MANY},
    {0, "moments", "M", CHOICE, &o.moments,
     "the optimizer's, at a new projection: ", 0, 0, moments_names},

    {'r', "recompute", "N", INT, &o.recompute, levels_help(), 0, NEVER - 1},
    {0, "gelu", "G", CHOICE, &o.gelu,
     "2bit keeps 2 bits of each of fch, for a derivative in steps: ", 0, 0, "exact,2bit"},
    {0, "tape", "T", CHOICE, &o.tape,
     "int8 keeps residual, qkv, atty and residual2 in 8 bits: ", 0, 0, "full,int8"},
    {0, "master", "M", CHOICE, &o.master,
     "none keeps weights in bf16 alone, rounded at random: ", 0, 0, "fp32,none"},
    {0, "offload", "", FLAG, &o.offload, "the tape waits in the host's memory (GPU)"},
    {0, "memory", "SIZE", BYTES, &o.memory,
     "such as 24GB: choose -r, no lower than given, and -b to fit (off)"},
    {0, "plan", "", PLAN, &o.plan, "print the memory plan and stop; --plan=json for programs"},

    {'v', "val-every", "N", INT, &o.val_every,
     "evaluate every N steps and at the end; 0: never, -1: at the end", -1, MANY},
    {0, "val-first", "", FLAG, &o.val_first, "evaluate before the first step as well"},
    {'m', "val-batches", "N", INT, &o.val_batches, "validation batches; -1: all", -1, MANY},
    {0, "hellaswag", "FILE", TEXT, &o.hellaswag, "score this at every evaluation"},
    {'s', "sample-every", "N", INT, &o.sample_every,
     "show a sample; -1: at the end (never)", -1, MANY},
    {0, "prompt", "TEXT", TEXT, &o.prompt,
     "train nothing: print this and what the --model makes of it; -: from standard input"},
    {'g', "sample-tokens", "N", INT, &o.sample_tokens,
     "length of a sample, or of what follows a prompt", 1, WIDE},
    {0, "temperature", "X", REAL, &o.temperature,
     "of such text; 0: always the likeliest token", 0, 100},
    {0, "top-k", "K", INT, &o.top_k, "draw from the K likeliest tokens; 0: from all", 0, WIDE},
    {'o', "out", "DIR", TEXT, &o.out, "log.jsonl and checkpoints go here"},
    {'n', "checkpoint-every", "N", INT, &o.checkpoint_every,
     "save every N steps and at the end; 0: never (at the end)", -1, MANY},
    {0, "keep", "K", INT, &o.keep, "checkpoints to keep; 0: all", 0, MANY},
    {0, "checkpoint-type", "T", CHOICE, &o.checkpoint_type,
     "of the weights in model_STEP.bin: ", 0, 0, type_names},
    {'y', "resume", "", FLAG, &o.resume,
     "go on from the newest checkpoint in --out, if there is one"},

    {0, "seed", "S", INT, &o.seed, "of everything random", 0, 2147483647},
    {0, "overfit", "", FLAG, &o.overfit, "one batch again and again"},
    {0, "dump", "FILE", TEXT, &o.dump, "write the first step's tensors for a checker"},
    {'h', "help", "", FLAG, &o.help, "this"},
    };
}
// clang-format on

static std::vector<std::string> split(const std::string& list) {
    std::vector<std::string> parts;
    std::istringstream in(list + ",");
    for (std::string part; std::getline(in, part, ',');) parts.push_back(part);
    return parts;
}

// The names, separated by commas, of the choices whose bits are set.
static std::string names_of(const char* names, int mask) {
    std::string out;
    for (const std::string& name : split(names)) {
        if (mask & 1) out += (out.empty() ? "" : ",") + name;
        mask >>= 1;
    }
    return out.empty() ? "none" : out;
}

static std::string option_value(const OptionRow& row) {
    switch (row.kind) {
        case INT: return join(*(int*)row.value);
        case BYTES: return join(*(int64_t*)row.value);
        case REAL:
        case RANK: return text("%.9g", *(double*)row.value);
        case FLAG: return *(bool*)row.value ? "true" : "false";
        case CHOICE: return names_of(row.names, 1 << *(int*)row.value);
        case SET: return names_of(row.names, *(int*)row.value);
        default: return *(std::string*)row.value;
    }
}

static double number(const OptionRow& row, const std::string& value) {
    char* end;
    bool whole = row.kind == INT;
    const char* allowed = whole ? "+-0123456789" : "+-.eE0123456789";
    double x = strtod(value.c_str(), &end);
    bool digits = !value.empty() && value.find_first_not_of(allowed) == std::string::npos;
    if (!digits || *end || !(x >= row.low && x <= row.high))
        refuse("--", row.name, ": '", value, "' is not a ", whole ? "whole " : "",
               text("number from %.10g to %.10g", row.low, row.high));
    return x;
}

// A size such as 24GB (10^9), 24GiB (2^30), 500 MB or 1e9.
static int64_t bytes_of(const std::string& given, const std::string& value) {
    char* end;
    double x = strtod(value.c_str(), &end), unit = 1;
    std::string rest = end + strspn(end, " "), letters = "KMGT";
    size_t power = rest.empty() ? std::string::npos : letters.find(char(toupper(rest[0])));
    if (power != std::string::npos) {
        bool binary = rest.size() > 1 && tolower(rest[1]) == 'i';
        unit = pow(binary ? 1024 : 1000, power + 1.0);
        rest.erase(0, binary ? 2 : 1);
    }
    // strtod would also take a number in hexadecimal, or an infinite one.
    size_t length = end - value.c_str();
    bool digits = value.find_first_not_of(".eE+0123456789") >= length;
    bool good = length > 0 && value[0] != '+' && digits && x * unit >= 0 && x * unit < 1e18;
    if (!good || (!rest.empty() && rest != "B" && rest != "b"))
        refuse(given, " is not a size such as 24GB, 24GiB or 500MB");
    return int64_t(x * unit);
}

// The bits of the names in a list, or of the one name that a choice takes.
static int mask_of(const OptionRow& row, const std::string& given, const std::string& value) {
    bool set = row.kind == SET;
    if (set && value == "none") return 0;
    std::vector<std::string> names = split(row.names), chosen = {value};
    if (set) chosen = split(value);
    int mask = 0;
    for (const std::string& name : chosen) {
        size_t i = std::find(names.begin(), names.end(), name) - names.begin();
        if (i == names.size())
            refuse(given, set ? " is neither none nor a list from " : " is not one of ", row.names);
        mask |= 1 << i;
    }
    return mask;
}

static void set_option(const OptionRow& row, const std::string& value) {
    std::string name = join("--", row.name), given = name + ": '" + value + "'";
    double x = row.kind == INT || row.kind == REAL || row.kind == RANK ? number(row, value) : 0;
    if (row.kind == FLAG) *(bool*)row.value = true;
    if (row.kind == BYTES) *(int64_t*)row.value = bytes_of(given, value);
    if (row.kind == INT) *(int*)row.value = int(x);
    if (row.kind == REAL || row.kind == RANK) *(double*)row.value = x;
    if (row.kind == TEXT || row.kind == PLAN) *(std::string*)row.value = value;
    if (row.kind == SET) *(int*)row.value = mask_of(row, given, value);
    if (row.kind == CHOICE) *(int*)row.value = int(log2(mask_of(row, given, value)));
    if (row.kind == TEXT && value.empty()) refuse(name, ": is empty; ", row.argument, " is wanted");
    if (row.kind == RANK && (x == 0 || (x > 1 && x != floor(x))))
        refuse(given, " is neither a ratio in (0, 1] nor a whole rank above 1");
    if (row.kind == PLAN && value != "text" && value != "json")
        refuse(given, " is not known; --plan and --plan=json are");
}

static Options parse_options(int argc, char** argv) {
    Options options;
    std::vector<OptionRow> table = option_table(options);
    std::vector<option> longs;
    std::string letters = ":";
    for (const OptionRow& row : table) {
        int takes = *row.argument ? required_argument : no_argument;
        if (row.kind == PLAN) takes = optional_argument;
        longs.push_back({row.name, takes, nullptr, 256 + int(longs.size())});
        if (row.letter) letters += row.letter;
        if (row.letter && takes == required_argument) letters += ":";
    }
    longs.push_back({});
    opterr = 0;
    bool saves = false;  // as is said
    int key, at = optind;
    while ((key = getopt_long(argc, argv, letters.c_str(), longs.data(), nullptr)) != -1) {
        if (key == '?')
            refuse(argv[at],
                   ": is not an option, or stands for several, or takes no value; --help ",
                   "lists them");
        if (key == ':') refuse(argv[at], ": needs a value; --help says which");
        for (size_t i = 0; i < table.size(); i++) {
            const OptionRow& row = table[i];
            if (key != 256 + int(i) && key != row.letter) continue;
            set_option(row, optarg ? optarg : row.kind == PLAN ? "text" : "");
            saves |= row.value == &options.checkpoint_every;
        }
        at = optind;
    }
    if (optind < argc)
        refuse("'", argv[optind], "': is not an option; a value follows its option, as in --train ",
               "FILE");
    saves &= options.checkpoint_every != 0 && options.prompt.empty();
    if (saves && options.out.empty())
        refuse("--checkpoint-every: needs --out, a folder for the checkpoints");
    return options;
}

static void print_help() {
    const std::pair<std::string, const char*> groups[] = {
        {"train", "Model and data"}, {"batch", "Batch, schedule and optimizer"},
        {"rank", "Compression"},     {"recompute", "Memory"},
        {"seed", "Debugging"},       {"val-every", "Evaluation and output"}};
    Options defaults;
    printf("train_gpt2_compact: trains GPT-2 with compressed activations\n\n");
    printf(
        "  ./train_gpt2_compact --train input.txt -e d4 --channels 128 --context 128 --lr 1e-3 "
        "--steps 500 --sample-every -1\n");
    for (const OptionRow& row : option_table(defaults)) {
        std::string left = row.letter ? text("  -%c, --", row.letter) : "      --";
        left += join(row.name, " ", row.argument);
        for (auto& group : groups)
            if (group.first == row.name) printf("\n%s\n", group.second);
        std::string value = option_value(row);
        bool shown = row.kind != FLAG && !value.empty() && row.help.back() != ')';
        if (shown) value = " (" + value + ")";
        printf("%-28s %s%s%s\n", left.c_str(), row.help.c_str(), row.names,
               shown ? value.c_str() : "");
    }
    printf("\nBad input ends with one line and status 2.\n");
}

// The layers of a name like d12; 0 for any other.
static int depth_of(const std::string& name) {
    int depth = 0, end = 0;
    bool fits = name[0] == 'd' && isdigit(name[1]);
    fits = fits && sscanf(name.c_str(), "d%4d%n", &depth, &end) == 1;
    return fits && end == int(name.size()) && depth <= 1024 ? depth : 0;
}

// The model's shape, from a name like d12 with the overrides, or from the header of a model file.
static Config choose_config(const Options& options, int V) {
    const std::string& model = options.model;
    int context = options.context, layers = options.layers;
    if (is_model_file(model)) {
        Config config = read_model_config(model);
        if (options.channels || options.heads || layers || context)
            refuse("--channels, --heads, --layers, --context: are for a fresh model, not for ",
                   model);
        return config;
    }
    int depth = depth_of(model);
    if (depth == 0)
        refuse("--model: '", model, "' is neither d12, d24, d36, d48 or another dN, nor a model ",
               "file such as ./gpt2.bin");
    const int widths[5] = {0, 768, 1024, 1280, 1600};
    int width = depth % 12 == 0 && depth <= 48 ? widths[depth / 12] : 64 * depth;
    Config c = {context ? context : 1024, V ? V : 50257, layers ? layers : depth, 0, 0, 0};
    c.C = options.channels ? options.channels : width;
    c.NH = options.heads ? options.heads : std::max(1, c.C / 64);
    c.Vp = (c.V + 127) / 128 * 128;
    if (c.C % c.NH != 0) refuse("--heads: ", c.C, " channels do not divide into ", c.NH, " heads");
    return c;
}

// For --memory: the least recomputation, from the level given, at which -b sequences fit, and there
// as many as do. Where -b fits at no level: the level that takes the most. With --total-batch, -b
// divides its sequences.
static void fit_memory(Options& options, const Config& config) {
    int64_t rows = options.total_batch / options.seq / processes.count, least = INT64_MAX;
    int64_t limit = std::min<int64_t>(rows ? rows : (1 << 30) / options.seq, MOST_SEQUENCES);
    int last = options.gelu == GELU_2BIT ? tape_rows[FCH].gone_from - 1 : NEVER - 1;
    int first = options.recompute, wish = options.batch;
    auto bytes = [&](int level, int64_t batch) {
        Model model;
        Options other = options;
        other.recompute = level;
        other.batch = int(batch);
        if (rows == 0) other.total_batch = int(batch * options.seq * processes.count);
        return model_plan(model, config, other).bytes();
    };
    auto most = [&](int level) {
        int64_t fits = 0, above = limit + 1;
        while (above - fits > 1) {
            int64_t middle = (fits + above) / 2;
            (bytes(level, middle) <= options.memory ? fits : above) = middle;
        }
        while (rows && fits > 0 && rows % fits != 0) fits--;
        return int(fits);
    };
    if (rows) wish = int(std::min<int64_t>(wish, rows));
    while (rows && rows % wish != 0) wish--;
    options.batch = 0;
    for (int level = first; level <= last && options.batch < wish; level++) {
        int fits = most(level);
        least = std::min(least, bytes(level, 1));
        if (fits <= options.batch) continue;
        options.batch = fits;
        options.recompute = level;
    }
    if (options.batch == 0)
        refuse("--memory: ", commas(options.memory),
               " bytes do not suffice: a single sequence takes ", commas(least), " or more");
}

// Fills in what follows from the model, and looks for contradictions.
static void settle_options(Options& options, const Config& config) {
    if (options.generates) {
        options.batch = 1;
        options.total_batch = options.compress = 0;
        options.optimizer = ADAMW;
        options.gelu = GELU_EXACT;
        options.offload = false;
    }
    if (options.seq == 0) options.seq = config.context;
    if (options.seq > config.context)
        refuse("--seq: ", options.seq, " is more than the model's context of ", config.context);
    if (options.gelu == GELU_2BIT && options.recompute >= tape_rows[FCH].gone_from)
        refuse("--gelu: 2bit keeps bits of what --recompute ", options.recompute,
               " computes again; choose one of them");
    if (options.memory > 0 && options.total_batch % options.seq == 0) fit_memory(options, config);
    int64_t micro = int64_t(options.batch) * options.seq * processes.count;
    std::string all = processes.count > 1 ? join(" of ", processes.count, " processes") : "";
    if (micro > 1 << 30)
        refuse("--batch: ", options.batch, " sequences of ", options.seq, all,
               " are more than 2^30 tokens");
    if (options.total_batch == 0) options.total_batch = int(micro);
    if (options.total_batch % micro != 0)
        refuse("--total-batch: ", options.total_batch, " is no multiple of --batch times --seq",
               all, ", ", micro);
    if (options.offload && !options.dump.empty())
        refuse("--dump: reads the whole tape; leave --offload away");
    if (options.resume && options.out.empty())
        refuse("--resume: needs --out, the folder with the checkpoints");
}

// ---- what is shown: options, plan, dump, log

// Parts joined by what stands between them.
template <class Parts>
static std::string joined(const Parts& parts, const char* between) {
    std::string out;
    for (const auto& part : parts) out += join(out.empty() ? "" : between, part);
    return out;
}

static std::string options_json(Options& options) {
    std::vector<std::string> fields;
    for (const OptionRow& row : option_table(options)) {
        if (row.kind == PLAN || row.value == &options.help) continue;
        bool quoted = row.kind == TEXT || row.kind == CHOICE || row.kind == SET;
        std::string value = option_value(row);
        fields.push_back(json_string(row.name) + ": " + (quoted ? json_string(value) : value));
    }
    return "{" + joined(fields, ", ") + "}";
}

// The plan of a run beside those that it is measured against.
struct Plans {
    Plan run;
    Plan full_rank;  // the same flags at full rank with AdamW
    Plan level_2;    // that at --recompute 2 and nothing else: llm.c's best
};

static Plans make_plans(Model& model, const Config& config, const Options& options) {
    Options full = options;
    full.rank = 1.0;
    full.optimizer = ADAMW;
    Options level_2 = full, plain;
    level_2.recompute = 2;
    level_2.gelu = plain.gelu;
    level_2.tape = plain.tape;
    level_2.master = plain.master;
    level_2.offload = plain.offload;
    Plans plans;
    plans.full_rank = model_plan(model, config, full);
    plans.level_2 = model_plan(model, config, level_2);
    plans.run = model_plan(model, config, options);  // the last one sets the model up
    return plans;
}

static std::string flops_json(const Flops& f) {
    return text(
        "{\"forward\": %.0f, \"backward\": %.0f, \"recompute\": %.0f, "
        "\"projection\": %.0f, \"update\": %.0f, \"total\": %.0f}",
        f.forward, f.backward, f.recompute, f.projection, f.update, f.total());
}

static std::string plan_json(const Plans& plans) {
    const Plan& plan = plans.run;
    std::vector<std::string> categories, tensors;
    for (const std::string& c : plan.categories())
        categories.push_back(join(json_string(c), ": ", plan.bytes(c)));
    for (const Tensor& t : plan.tensors)
        tensors.push_back(join("{\"name\": ", json_string(t.name),
                               ", \"category\": ", json_string(t.category), ", \"shape\": [",
                               joined(t.shape, ", "), "], \"type\": ", json_string(t.type),
                               ", \"bytes\": ", t.bytes(), "}"));
    return join("\"total_bytes\": ", plan.bytes(), ", \"host_bytes\": ", plan.bytes("host"),
                ", \"full_rank_total_bytes\": ", plans.full_rank.bytes(),
                ", \"full_rank_level_2\": {\"total_bytes\": ", plans.level_2.bytes(),
                ", \"flops_per_token\": ", flops_json(plans.level_2.flops), "}",
                ", \"categories\": {", joined(categories, ", "), "}",
                ", \"flops_per_token\": ", flops_json(plan.flops), ", \"tensors\": [",
                joined(tensors, ", "), "]");
}

static void print_plan(const Plans& plans, const Options& options, bool tensors) {
    auto mib = [](int64_t bytes) {
        return commas(bytes >> 20) + text(".%d MiB", int((bytes & 0xFFFFF) * 10 >> 20));
    };
    for (const Tensor& t : plans.run.tensors) {
        if (!tensors) break;
        printf("  %-12s %-22s %-24s %-6s %16s\n", t.category.c_str(), t.name.c_str(),
               joined(t.shape, " x ").c_str(), t.type.c_str(), mib(t.bytes()).c_str());
    }
    if (tensors) printf("\n");
    if (options.memory > 0)
        printf("of %s bytes: chose --recompute %d, -b %d\n", commas(options.memory).c_str(),
               options.recompute, options.batch);
    const Plan* columns[] = {&plans.run, &plans.full_rank, &plans.level_2};
    auto row = [&](const std::string& name, const std::function<std::string(const Plan&)>& cell) {
        printf("  %-12s", name.c_str());
        for (const Plan* plan : columns) printf(" %16s", cell(*plan).c_str());
        printf("\n");
    };
    printf("%-14s %16s %16s %16s\n", "memory", "this run", "full rank", "full rank, -r 2");
    Plan all;
    for (const Plan* plan : columns)
        all.tensors.insert(all.tensors.end(), plan->tensors.begin(), plan->tensors.end());
    for (const std::string& c : all.categories())
        row(c, [&](const Plan& p) { return mib(p.bytes(c)); });
    const Plan& best = plans.level_2;
    row("total", [&](const Plan& p) { return mib(p.bytes()); });
    row("", [&](const Plan& p) { return text("%.0f %%", 100.0 * p.bytes() / best.bytes()); });
    if (processes.count > 1) {
        printf("exchanged by each of %d processes, a step\n", processes.count);
        row("gradients", [&](const Plan& p) { return mib(p.bytes("gradients")); });
    }
    printf("matrix products, FLOPs a token\n");
    row("forward", [](const Plan& p) { return text("%.4g", p.flops.forward); });
    row("backward", [](const Plan& p) { return text("%.4g", p.flops.backward); });
    row("recompute", [](const Plan& p) { return text("%.4g", p.flops.recompute); });
    row("projection", [](const Plan& p) { return text("%.4g", p.flops.projection); });
    row("update", [](const Plan& p) { return text("%.4g", p.flops.update); });
    row("total", [](const Plan& p) { return text("%.4g", p.flops.total()); });
    row("",
        [&](const Plan& p) { return text("%.0f %%", 100 * p.flops.total() / best.flops.total()); });
}

// The step just accumulated, before its update: parameters, gradients, projections, and of its last
// micro batch the tape, tokens, losses and logits. A record: int32 length of the name, name, int32
// dimensions, int64 each, float32 data.
static void write_dump(Model& model, const Plan& plan, const Options& options) {
    Writer out(options.dump);
    int B = options.batch, T = options.seq, V = model.config.V, C = model.config.C;
    int64_t N = int64_t(B) * T;
    auto head = [&](const std::string& name, const std::vector<int64_t>& shape) {
        int32_t length = int32_t(name.size()), dims = int32_t(shape.size());
        out.write(&length, 4);
        out.write(name.data(), name.size());
        out.write(&dims, 4);
        out.write(shape.data(), shape.size() * 8);
    };
    auto write = [&](const float* from, int64_t, int64_t n) { out.write(from, n * 4); };
    auto record = [&](const std::string& name, const std::vector<int64_t>& shape,
                      const std::vector<float>& data) {
        head(name, shape);
        write(data.data(), 0, count_of(shape));
    };
    auto dump = [&](const std::string& name, const Tensor& t, bool whole,
                    std::vector<int64_t> shape) {
        int64_t each = count_of(shape), layers = whole ? 1 : t.shape[0];
        for (int64_t i = 0; i < layers; i++) {
            head(whole ? name : join(name, ".", i), shape);
            visit(t, i * each, each, false, write);
        }
    };
    const std::set<std::string> singles = {"grad.wte",  "grad.wpe",     "grad.lnfw",
                                           "grad.lnfb", "act.lnf_mean", "act.lnf_rstd"};
    std::vector<Tensor> dumped;
    for (const char* category : {"parameters", "gradients", "tape"})
        tensors_of(plan, category, dumped);
    for (const Tensor& t : dumped) {
        bool param = t.category == "parameters", act = t.category == "tape";
        std::string name = (param ? "param." : act ? "act." : "") + t.name;
        bool whole = param || singles.count(name) > 0;
        dump(name, t, whole, std::vector<int64_t>(t.shape.begin() + !whole, t.shape.end()));
    }
    for (int which = 0; which < LINEARS; which++) {
        const Linear& l = model.linear[which];
        std::string name = join("proj.", param_rows[weight_of(which)].name, ".");
        for (int layer = 0; l.compressed() && layer < model.config.L; layer++)
            record(join(name, layer), {l.n, l.r}, model_projection(model, which, layer));
    }
    record("loss", {1}, {float(mean_loss(model, 0, N))});
    record("inputs", {B, T}, std::vector<float>(model.inputs, model.inputs + N));
    record("targets", {B, T}, std::vector<float>(model.targets, model.targets + N));
    model_evaluate(model, B, T);  // again: the backward pass has used the places of what follows
    for (const Tensor& t : plan.tensors) {
        if (t.name == "stream") dump(join("act.residual.", model.config.L), t, true, {N, C});
        if (t.name == "wide") dump("act.lnf", t, true, {N, C});
    }
    std::vector<float> row(V);
    head("logits", {B, T, V});
    for (int64_t i = 0; i < N; i++) {
        model_logits(model, row.data(), int(i), 1);
        write(row.data(), 0, V);
    }
    out.commit();
}

// Opens DIR/log.jsonl for this start, whose first line it gets, without the lines of steps that
// will be done again. Where all are to be done again, the log of before is kept under another name.
static File open_log(const std::string& path, int64_t step, const std::string& first_line) {
    std::string kept, line;
    std::ifstream old(step > 0 ? path : "");
    while (std::getline(old, line) && !old.eof()) {  // a line without its end was cut off
        if (logged_step(line) <= step) kept += line + "\n";
    }
    if (step == 0 && has_steps(path)) {
        int number = 1;
        while (access(join(path, ".", number).c_str(), F_OK) == 0) number++;
        rename(path.c_str(), join(path, ".", number).c_str());
        printf("the log of before is kept as %s.%d\n", path.c_str(), number);
    }
    kept += first_line + "\n";
    Writer out(path);
    out.write(kept.data(), kept.size());
    out.commit();
    return File(fopen(path.c_str(), "ab"));
}

// Such as 42s, 12m30s, 1h12m, 3d4h.
static std::string duration(double seconds) {
    const std::pair<int64_t, char> units[] = {{86400, 'd'}, {3600, 'h'}, {60, 'm'}, {1, 's'}};
    int64_t left = std::llround(std::min(seconds, 1e12)), i = 0;
    while (i < 3 && left < units[i].first) i++;
    std::string out = join(left / units[i].first, units[i].second);
    if (i == 3) return out;
    return out + join(left % units[i].first / units[i + 1].first, units[i + 1].second);
}

static void describe(const Options& options, const Config& config, const Data& train,
                     const Data& val, int64_t steps) {
    int64_t rows = options.total_batch / options.seq;
    std::string validation = val.sequences ? commas(val.tokens) + " tokens" : "none";
    std::string each;
    if (processes.count > 1) each = join(" in each of ", processes.count, " processes");
    std::string method = "full rank";
    if (options.rank != 1.0 && options.compress != 0)
        method = join("rank ", text("%g", options.rank), " of ",
                      names_of(linear_names, options.compress), "; ",
                      names_of(projection_names, 1 << options.projection), ", new every ",
                      options.gap, " steps, alpha ", text("%g", options.alpha), ", moments ",
                      names_of(moments_names, 1 << options.moments));
    printf("device   %s; attention %s; source %s\n", model_device().c_str(),
           model_attention(config), REVISION);
    printf(
        "model    %s: %d layers, %d heads, %d channels, context %d, vocabulary %d (%d): %s "
        "parameters\n",
        options.model.c_str(), config.L, config.NH, config.C, config.context, config.V, config.Vp,
        commas(parameter_count(config)).c_str());
    printf("data     train: %zu file%s, %s tokens, %s sequences of %d; validation: %s\n",
           train.shards.size(), train.shards.size() == 1 ? "" : "s", commas(train.tokens).c_str(),
           commas(train.sequences).c_str(), options.seq, validation.c_str());
    printf("batch    %d x %d, %d accumulated%s: %s tokens a step; %s steps, %.2f epochs\n",
           options.batch, options.seq, int(rows / options.batch / processes.count), each.c_str(),
           commas(options.total_batch).c_str(), commas(steps).c_str(),
           double(steps) * rows / train.sequences);
    printf("method   %s; %s; recompute %d; lr %g, %s\n", method.c_str(),
           names_of(optimizer_names, 1 << options.optimizer).c_str(), options.recompute, options.lr,
           names_of(schedule_names, 1 << options.schedule).c_str());
}

// ---- the process: streams, threads, signals

// A closed descriptor would be the next file's that is opened, and what is printed would go there.
static void open_standard_streams() {
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd) exit(1);
}

// The CPUs whose time the process's control groups, listed in a file, may use: rounded up, or many
// where no quota is set. A container may see its own group at the root of what is mounted.
static int cpu_quota(const std::string& groups, const std::string& root) {
    double quota = 1 << 20;
    std::ifstream list(groups);
    for (std::string line;
         std::getline(list, line);) {  // number:controllers:path; version 2: 0::path
        size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        std::string folder = root + "/" + line.substr(first + 1, second - first - 1);
        std::string path = line.substr(second + 1);
        for (size_t end = path.size(); end != std::string::npos;) {
            std::string group = folder + path.substr(0, end);
            double time = 0, period = 0;  // no limit: "max", or -1 in version 1
            std::ifstream(group + "/cpu.max") >> time >> period;
            std::ifstream(group + "/cpu.cfs_quota_us") >> time;
            std::ifstream(group + "/cpu.cfs_period_us") >> period;
            if (time > 0 && period > 0) quota = std::min(quota, time / period);
            end = end > 0 ? path.rfind('/', end - 1) : std::string::npos;  // the group above
        }
    }
    return int(ceil(quota));
}

// Threads that wait must sleep: spinning takes the core from whoever shares it. GCC's runtime reads
// that from the environment as it is loaded, before main, so the program begins again with it set.
// Who has set how threads wait, or how many there are, has it so.
static void settle_threads(char** argv) {
    if (!getenv("OMP_WAIT_POLICY") && !getenv("GOMP_SPINCOUNT") && !getenv("KMP_BLOCKTIME")) {
        setenv("OMP_WAIT_POLICY", "passive", 1);
        std::error_code error;
        std::string self = std::filesystem::read_symlink("/proc/self/exe", error).string();
        if (!error) execv(self.c_str(), argv);  // which comes back only where it fails
    }
    int quota = cpu_quota("/proc/self/cgroup", "/sys/fs/cgroup");
    if (!getenv("OMP_NUM_THREADS")) omp_set_num_threads(std::min(omp_get_max_threads(), quota));
}

// The first process prints and writes files. What the others would print is the same.
static void begin_processes() {
#ifdef USE_MPI
    MPI_Comm machine;
    MPI_Init(nullptr, nullptr);
    MPI_Comm_rank(MPI_COMM_WORLD, &processes.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &processes.count);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &processes.local);
    // Another MPI's mpirun starts so many runs, each of one process.
    for (std::string mpirun : {"OMPI_COMM_WORLD_", "PMI_"}) {
        const char* count = getenv((mpirun + "SIZE").c_str());
        const char* rank = getenv((mpirun + "RANK").c_str());
        if (processes.count > 1 || !count || !rank || atoi(count) <= 1) continue;
        processes.count = atoi(count);
        processes.rank = atoi(rank);
        refuse("mpirun: has started ", count, " processes that do not find one another: it is of ",
               "another MPI than the mpicxx that built this program");
    }
    if (processes.rank > 0 && !freopen("/dev/null", "w", stdout)) exit(1);
#endif
}

// Says what went wrong, if anything, and ends all processes. Where all met the same fault, the
// first one says so, and the others are ended before they can.
static int end_processes(const Failure& failure) {
    if (failure.status != 0 && processes.rank > 0) {
        signal(SIGTERM, SIG_DFL);  // by which mpirun ends them
        sleep(3);
    }
    std::string who = processes.count > 1 ? join("process ", processes.rank, ": ") : "";
    fflush(stdout);
    if (failure.status != 0)
        fprintf(stderr, "train_gpt2_compact: %s%s\n", who.c_str(),
                one_line(failure.message).c_str());
#ifdef USE_MPI
    if (failure.status != 0 && processes.count > 1) {
        sleep(1);  // what MPICH's mpirun has not read by then is lost
        MPI_Abort(MPI_COMM_WORLD, failure.status);
    }
    MPI_Finalize();
#endif
    return failure.status;
}

static volatile sig_atomic_t stopping = 0;  // the signal that asks to end

// The step is finished first, unless Ctrl-C is the second request. Who reads what is printed may
// have ended by the same signal.
static void stop_soon(int number) {
    if (stopping && number == SIGINT) _exit(128 + number);
    stopping = number;
    signal(SIGPIPE, SIG_IGN);
}

static void expect_signals() {
    for (int number : {SIGINT, SIGTERM, SIGHUP}) {
        // Ignored so far, by nohup and by what a shell starts by &: that stays.
        if (signal(number, stop_soon) == SIG_IGN) signal(number, SIG_IGN);
    }
}

// ---- training

// Whether something with this "every" is due after step `step` of `steps`.
static bool is_due(int every, int64_t step, int64_t steps) {
    bool in_between = every > 0 && step > 0 && step % every == 0;
    return every != 0 && (step == steps || in_between);
}

// What must not change where a run goes on.
static Identity identity_of(const Config& config, Options& options, const Data& train) {
    const std::set<std::string> named = {"seq",      "total-batch", "optimizer", "rank",
                                         "compress", "projection",  "gap",       "moments",
                                         "gelu",     "tape",        "master",    "seed"};
    Identity identity = {{"--channels", join(config.C)},
                         {"--heads", join(config.NH)},
                         {"--layers", join(config.L)},
                         {"--context", join(config.context)}};
    for (const OptionRow& row : option_table(options))
        if (named.count(row.name)) identity.push_back({join("--", row.name), option_value(row)});
    std::string data = join(train.sequences, " sequences of vocabulary ", config.V, ", hash ");
    identity.push_back({"--train", data + train.hash});
    return identity;
}

struct Run {
    Model& model;
    const Plans& plans;
    const Options& options;
    Data &train, &val;
    int64_t start, steps;  // the last step before this start of the program, and the last of all
    Tokenizer tokenizer;
    std::vector<Example> hellaswag;
    double peak;   // FLOPs a second of the device; 0 where they are unknown
    double bytes;  // of text a token of the validation data; 0 where that is not known
    File log;
    void write_log(const std::string& line) {
        if (options.out.empty()) return;
        if (!log || fprintf(log.get(), "%s\n", line.c_str()) < 0 || fflush(log.get()) != 0)
            fail(options.out, "/log.jsonl: cannot be written: ", strerror(errno));
    }
};

// Step `step` (from 1). Adds to what is shown of it: what comes before an evaluation, and after.
// The loss is that of the step's batch, before its update.
static void train_step(Run& run, int64_t step, std::string& line, std::string& times) {
    const Options& options = run.options;
    const Flops& flops = run.plans.run.flops;
    int B = options.batch, T = options.seq, turn = B * processes.count;
    int64_t rows = options.total_batch / T, place = options.overfit ? 0 : (step - 1) * rows;
    int64_t predicted = predicted_tokens(run.train, place, rows);
    double lr = learning_rate(options, step - 1, run.steps);
    Losses losses;
    model_clock();
    model_begin_step(run.model, step - 1);
    for (int64_t done = 0; done < rows; done += turn) {
        int64_t own = place + done + B * processes.rank;
        read_batch(run.train, own, B, run.model);
        bool last = done + turn == rows;
        model_accumulate(run.model, B, T, done == 0, 1.0f / predicted, last);
        bool more = !last || step < run.steps;
        if (more && !options.overfit) read_ahead(run.train, own + turn, B);
        losses.add(run.model, 0, int64_t(B) * T);
    }
    losses.combine_processes();
    bool dumps = step == run.start + 1 && !options.dump.empty();
    if (dumps) write_dump(run.model, run.plans.run, options);
    double loss = losses.mean(), norm = model_update(run.model, run.plans.run, step - 1, lr);
    double elapsed = model_clock(), speed = options.total_batch / elapsed;
    if (!std::isfinite(loss + norm))
        fail("step ", step,
             ": the loss or its gradient is not finite; a lower --lr or more --warmup ",
             "may help");
    line += text(" | loss %.4f", loss);
    times = text(" | norm %.2f | lr %.1e | %.1f ms | ", norm, lr, elapsed * 1e3);
    times += commas(int64_t(speed)) + " tok/s";
    double percent = 100 * speed / run.peak;
    const Config& c = run.model.config;
    // A token's, as llm.c counts them.
    double six_n = 6.0 * parameter_count(c) + 6.0 * c.L * c.C * T;
    if (run.peak > 0)
        times += text(" | %.0f %% MFU (%.0f %% by 6 N)", percent * (flops.forward + flops.backward),
                      percent * six_n);
    run.write_log(
        text("{\"step\": %lld, \"loss\": %.6f, \"norm\": %.6f, \"lr\": %.9g, \"ms\": %.3f, "
             "\"tokens_per_second\": %.1f}",
             (long long)step, loss, norm, lr, elapsed * 1e3, speed));
}

static uint64_t weights_checksum(const Plan& plan) {
    uint64_t sum = 0;
    for (const Tensor& t : weights_of(plan))
        visit(t, 0, t.count(), false,
              [&](const float* from, int64_t, int64_t n) { sum = checksum(sum, from, n * 4); });
    return sum;
}

// Adds what was found to the line that is shown and to the log's record.
static void evaluate(Run& run, int64_t step, std::string& line, std::string& record) {
    if (processes.count > 1 && !agree(weights_checksum(run.plans.run)))
        fail("step ", step, ": the processes' weights have come apart; go on from a checkpoint ",
             "with --resume");
    if (run.val.sequences > 0) {
        double loss = validate(run.model, run.val, run.options);
        if (!std::isfinite(loss))
            fail("step ", step, ": the validation loss is not finite; a lower --lr may help");
        line += text(" | val %.4f", loss);
        record += text(", \"val_loss\": %.6f", loss);
        if (run.bytes > 0)
            record += text(", \"bits_per_byte\": %.6f", loss / (std::log(2.0) * run.bytes));
    }
    if (run.hellaswag.empty()) return;
    double score = score_hellaswag(run.model, run.hellaswag, run.options);
    line += text(" | hellaswag %.4f", score);
    record += text(", \"hellaswag\": %.6f", score);
}

// Shows a sample, and adds it to the log's record.
static void show_sample(Run& run, int64_t step, std::string& record) {
    std::string shown;
    generate(run.model, run.tokenizer, {}, run.options, step,
             [&](const std::string& piece) { shown += piece; });
    printf("--- sample ---\n%s\n--------------\n", printable(shown).c_str());
    record += ", \"sample\": " + json_string(shown);
}

static void train_model(Model& model, const Plans& plans, Options& options, Data& train, Data& val,
                        int64_t steps) {
    const Config& config = model.config;
    const Plan& plan = plans.run;
    const std::string& out = options.out;
    Run run = {model, plans, options, train, val, 0, steps, {}, {}, 0, 0, nullptr};
    if (!options.hellaswag.empty()) run.hellaswag = read_hellaswag(options.hellaswag, config.V);
    bool bytes_alone = train.shards[0].width == 1 && options.tokenizer.empty();
    run.tokenizer = bytes_alone ? no_tokenizer(config.V)
                                : find_tokenizer(options, train.shards[0].path, config.V);
    if (!out.empty() && !options.tokenizer.empty() && processes.rank == 0)
        write_tokenizer(run.tokenizer, out + "/tokenizer.bin");
    Identity identity = identity_of(config, options, train);
    // States of a run have one size.
    identity.push_back({"steps", text("%010lld", (long long)steps)});
    identity.push_back({"rate", ""});  // the learning rate of the last step

    model_allocate(model, plan);
    if (is_model_file(options.model))
        read_model(plan, options.model);
    else
        initialise(plan, config, options.seed);
    std::string before;
    int64_t start = options.resume ? resume(plan, identity, out, before) : 0;
    run.start = start;
    if (!agree(start))
        fail("--out: ", out, " is not the same folder for all processes; give one that all ",
             "machines share");
    if (processes.rank > 0) options.out = options.dump = "";  // the first one writes
    model_round(model);
    if (options.resume)
        printf("%s\n",
               start > 0 ? join("resumed after step ", start).c_str() : "nothing to resume yet");
    if (start > 0 && start >= steps) {
        printf("nothing left to do: --steps asks for %lld\n", (long long)steps);
        return;
    }
    auto rate = [&](int64_t step) { return text("%.2e", learning_rate(options, step - 1, steps)); };
    std::string rate_before = saved_value(before, "rate");
    if (start > 0 && rate_before != "none" && rate_before != rate(start))
        printf(
            "the learning rate was %s at step %lld/%lld and is %s at step %lld/%lld: --steps, --lr "
            "or its schedule has changed\n",
            rate_before.c_str(), (long long)start, atoll(saved_value(before, "steps").c_str()),
            rate(start + 1).c_str(), (long long)start + 1, (long long)steps);
    foresee_disk(plan, config, options, start, steps);
    if (!out.empty())
        run.log =
            open_log(out + "/log.jsonl", start,
                     join("{\"revision\": ", json_string(REVISION),
                          ", \"device\": ", json_string(model_device()), ", \"data\": {\"train\": ",
                          json_string(train.hash), ", \"val\": ", json_string(val.hash), "}",
                          processes.count > 1 ? join(", \"processes\": ", processes.count) : "",
                          ", \"options\": ", options_json(options), ", \"plan\": {",
                          plan_json(plans), "}}"));

    expect_signals();
    run.peak = model_peak_flops() * processes.count;
    bool spelled = val.sequences > 0 && (config.V <= 256 || !options.tokenizer.empty());
    if (spelled) run.bytes = bytes_per_token(val, options, run.tokenizer);
    int64_t first = start == 0 && (options.val_first || steps == 0) ? 0 : start + 1;
    double begin = seconds();
    for (int64_t step = first; step <= steps; step++) {
        std::string line = join("step ", step, "/", steps), times;
        std::string head = join("{\"step\": ", step), record = head;
        if (step > start) train_step(run, step, line, times);
        if (is_due(options.val_every, step, steps) || (options.val_first && step == 0))
            evaluate(run, step, line, record);
        double each = (seconds() - begin) / (step - start);
        if (step > start && step < steps) times += " | eta " + duration(each * (steps - step));
        printf("%s%s\n", line.c_str(), times.c_str());
        bool samples = is_due(options.sample_every, step, steps) && processes.rank == 0;
        if (samples) show_sample(run, step, record);
        if (record != head) run.write_log(record + "}");
        fflush(stdout);
        double signal = stopping;
        combine(HIGHEST, &signal, 1);
        bool stops = signal > 0 && step < steps;
        bool saves = !out.empty() && is_due(options.checkpoint_every, step, stops ? step : steps);
        identity.back().second = rate(step);
        if (saves) save_checkpoint(plan, config, options, identity, step);
        if (!stops) continue;
        double saved = saves;
        combine(HIGHEST, &saved, 1);  // none ends before the first one has saved
        std::string name = signal == SIGINT ? "SIGINT" : signal == SIGTERM ? "SIGTERM" : "SIGHUP";
        std::string end =
            saved > 0 ? "; the same command with -y goes on from there" : ", and nothing is saved";
        throw Failure{128 + int(signal), join("ended by ", name, " after step ", step, end)};
    }
}

// ---- generation

static void show(const std::string& shown) {
    fwrite(shown.data(), 1, shown.size(), stdout);
    if (fflush(stdout) != 0) fail("standard output: cannot be written: ", strerror(errno));
}

// Standard output gets the prompt and what follows, each character when it is whole. All else goes
// to standard error.
static void speak(Model& model, const Plan& plan, Options& options) {
    int V = model.config.V;
    Tokenizer tokenizer = find_tokenizer(options, options.model, V);
    int64_t known = tokenizer.pieces.size();
    if (options.tokenizer.empty() && V > 256)
        refuse("--tokenizer: is missing: no tokenizer.bin stands beside ", options.model,
               ", whose vocabulary of ", V, " is more than bytes");
    if (known > V)
        refuse("--tokenizer: ", options.tokenizer, " has ", known, " tokens, the model ", V);
    std::string prompt = options.prompt == "-" ? "" : options.prompt;
    for (int byte; options.prompt == "-" && (byte = getchar()) != EOF;) prompt += char(byte);
    std::vector<int> tokens = encode(tokenizer, prompt);
    fprintf(stderr, "%s: %s bytes of weights, %s in all; %s tokens of prompt\n",
            printable(options.model).c_str(), commas(plan.bytes("parameters")).c_str(),
            commas(plan.bytes()).c_str(), commas(tokens.size()).c_str());
    if (int64_t(tokens.size()) + options.sample_tokens > options.seq)
        fprintf(stderr,
                "the model sees %d tokens; where they are full, it goes on from the last half "
                "of them\n",
                options.seq);
    model_allocate(model, plan);
    read_model(plan, options.model);
    model_round(model);
    size_t whole = whole_characters(prompt);
    std::string waiting = prompt.substr(whole);
    int64_t count = 0;
    double begin = 0;
    show(prompt.substr(0, whole));
    generate(model, tokenizer, tokens, options, 0, [&](const std::string& piece) {
        if (count++ == 0) begin = seconds();  // the prompt is read
        waiting += piece;
        whole = whole_characters(waiting);
        show(printable(waiting.substr(0, whole)));
        waiting.erase(0, whole);
    });
    show(printable(waiting));
    fprintf(stderr, "\n%s tokens", commas(count).c_str());
    if (count > 1) fprintf(stderr, ", %.1f a second", (count - 1) / (seconds() - begin));
    fprintf(stderr, "\n");
}

// ---- main

// The last tenth of a plain text validates where no other file does.
static void split_text(Data& train, Data& val) {
    for (Shard& shard : train.shards) {
        int64_t kept = shard.tokens - (shard.width == 1 ? shard.tokens / 10 : 0);
        if (kept < shard.tokens) val.shards.push_back({shard.path, kept, shard.tokens - kept, 1});
        shard.tokens = kept;
    }
}

static void run(int argc, char** argv) {
    Options options = parse_options(argc, argv);
    if (options.help) return print_help();
    const Options& o = options;
    options.generates = !o.prompt.empty();
    bool trains = !o.train.empty() || !o.val.empty() || !o.out.empty() || !o.hellaswag.empty() ||
                  !o.dump.empty() || o.memory > 0 || o.resume;
    if (o.generates && trains)
        refuse(
            "--prompt: trains nothing; leave --train, --val, --out, --hellaswag, --dump, --memory ",
            "and --resume away");
    std::error_code error;
    bool folder = std::filesystem::is_directory(o.model, error);
    if (folder && (o.generates || depth_of(o.model) == 0)) {
        std::vector<int64_t> steps = saved_steps(o.model, "model");
        if (steps.empty()) refuse("--model: the folder ", o.model, " holds no model_STEP.bin");
        options.model = checkpoint_path(o.model, "model", steps[0]);
    }
    if (o.generates && !is_model_file(o.model))
        refuse("--prompt: needs --model, a model file or the folder of a run; '", o.model,
               "' has learnt nothing yet");
    if (o.train.empty() && o.plan.empty() && !o.generates)
        refuse("--train: is missing; give it token shards or any text file");
    Data train = {}, val = {};
    if (!o.train.empty()) train = find_data("--train", o.train);
    if (!o.val.empty()) val = find_data("--val", o.val);
    Config config = choose_config(options, train.V);
    for (const Data* data : {&train, &val}) {
        const char* flag = data == &train ? "--train" : "--val";
        // What the model has more are special words, or padding.
        bool fits = data->V <= config.V && config.V <= data->V + data->V / 8;
        if (data->V != 0 && !fits)
            refuse(flag, ": has a vocabulary of ", data->V, ", ",
                   is_model_file(o.model) ? o.model : "--train", " one of ", config.V,
                   ": another tokenizer's");
    }
    settle_options(options, config);

    static Model model;  // its memory lives as long as the program
    Plans plans = make_plans(model, config, options);
    if (o.plan == "json")
        printf("{%s, \"options\": %s}\n", plan_json(plans).c_str(), options_json(options).c_str());
    if (o.plan == "text") print_plan(plans, options, true);
    if (!o.plan.empty()) return;
    if (o.generates) return speak(model, plans.run, options);

    if (val.V == 0) val.V = train.V;
    if (o.val.empty()) split_text(train, val);
    cut_data(train, "--train", o.seq);
    train.shuffled = true;
    train.seed = o.seed;
    bool validates = (o.val_every != 0 || o.val_first) && o.val_batches != 0;
    if (!val.shards.empty() && validates)
        cut_data(val, o.val.empty() ? "--train, its last tenth" : "--val", o.seq);
    int64_t epoch = std::max<int64_t>(1, train.sequences / (o.total_batch / o.seq));
    int64_t steps = o.steps >= 0 ? o.steps : epoch;
    if (!o.out.empty() && processes.rank == 0) take_folder(options);
    agree(0);  // all are here: the folder is made and tidied
    describe(options, config, train, val, steps);
    print_plan(plans, options, false);
    fflush(stdout);
    train_model(model, plans, options, train, val, steps);
}

#ifndef TESTING
int main(int argc, char** argv) {
    open_standard_streams();
    settle_threads(argv);
    Failure failure = {1, "not enough memory for the host's buffers"};
    try {
        begin_processes();
        run(argc, argv);
        show("");
        if (ferror(stdout)) fail("standard output: cannot be written: ", strerror(errno));
        failure = {0, ""};
    } catch (const Failure& caught) {
        failure = caught;
    } catch (const std::bad_alloc&) {}
    return end_processes(failure);
}
#endif
