// train_gpt2_compact.cpp: trains GPT-2 with compressed activations on the CPU, in one file.
// The method is CompAct (Shamshoum et al., arXiv 2410.15352).
//
// A linear layer y = x W^T + b needs its input x in the backward pass for one thing only: the
// weight gradient dy^T x. Here it may keep z = x P instead. P (n, r) has few columns, is random and
// is never stored. The weight gradient is then dy^T z. It and the optimizer's moments have r
// columns in place of n. The optimizer's step U, AdamW's or Muon's, is lifted back to the weight as
// U P^T. The forward pass stays exact, and so does the gradient that flows to the layer below.
// With rank ratio 1 the layer keeps x: that is the ordinary optimizer.
//
// How to read it, top to bottom:
//   1. the host, in short           options, random numbers, memory plan, tape (as in the .cu file)
//   2. layers                       forward beside backward: embedding, LayerNorm, GELU, attention
//   3. the compressed linear layer  z is made, kept and used, and the step is lifted to the weight
//   4. the optimizer                AdamW and Muon, from the gradient to the step
//   5. the model                    parameters, tape, forward, backward, update
//   6. all else of the host         files, data, samples, checkpoints, main (as in the .cu file)
//
// Shapes: B sequences of T tokens, N = B*T; C channels, NH heads of hs = C/NH; L layers; V words,
// Vp with padding. A weight is (m, n) = (outputs, inputs), row-major, as llm.c stores it.

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
// layers: forward beside backward. Any number of threads gives the same result, but in a matrix
// product: there a thread's share, and so a library's order of additions, depends on their number.
// =================================================================================================

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads() { return 1; }
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
static void omp_set_num_threads(int) {}
#endif

// ---- embedding: x = wte[token] + wpe[position]

enum { STRIP = 64 };  // columns that a thread owns where it walks over all rows

static void embedding_forward(float* x, const int* tokens, const float* wte, const float* wpe,
                              int B, int T, int C) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < B * T; i++) {
        const float* word = wte + size_t(tokens[i]) * C;
        const float* position = wpe + size_t(i % T) * C;
        for (int j = 0; j < C; j++) x[size_t(i) * C + j] = word[j] + position[j];
    }
}

// dwte, dwpe += gradient. A thread owns its columns for all tokens, also for equal ones: no race.
static void embedding_backward(float* dwte, float* dwpe, const float* dx, const int* tokens, int B,
                               int T, int C) {
#pragma omp parallel for schedule(static)
    for (int first = 0; first < C; first += STRIP) {
        int last = std::min(C, first + STRIP);
        for (int i = 0; i < B * T; i++) {
            for (int j = first; j < last; j++) {
                dwte[size_t(tokens[i]) * C + j] += dx[size_t(i) * C + j];
                dwpe[size_t(i % T) * C + j] += dx[size_t(i) * C + j];
            }
        }
    }
}

// ---- LayerNorm: y = (x - mean) rstd w + b over a token's channels. Variance: over C, not C - 1.

static const float LAYERNORM_EPS = 1e-5f;

// y, x (N, C); mean, rstd (N) are kept for the backward pass
static void layernorm_forward(float* y, float* mean, float* rstd, const float* x, const float* w,
                              const float* b, int N, int C) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < N; i++) {
        const float* xi = x + size_t(i) * C;
        float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < C; j++) sum += xi[j];
        float m = sum / C;
#pragma omp simd reduction(+ : squares)
        for (int j = 0; j < C; j++) squares += (xi[j] - m) * (xi[j] - m);
        float s = 1.0f / sqrtf(squares / C + LAYERNORM_EPS);
        for (int j = 0; j < C; j++) y[size_t(i) * C + j] = (xi[j] - m) * s * w[j] + b[j];
        mean[i] = m;
        rstd[i] = s;
    }
}

// dx (N, C) = beta dx + gradient; dw, db (C) += gradient. Reads the layer's input, not its output.
static void layernorm_backward(float* dx, float* dw, float* db, const float* dy, const float* x,
                               const float* mean, const float* rstd, const float* w, int N, int C,
                               float beta) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < N; i++) {
        const float *xi = x + size_t(i) * C, *dyi = dy + size_t(i) * C;
        float* dxi = dx + size_t(i) * C;
        float m = mean[i], s = rstd[i], sum = 0, sum_norm = 0;
#pragma omp simd reduction(+ : sum, sum_norm)
        for (int j = 0; j < C; j++) {
            sum += dyi[j] * w[j];
            sum_norm += dyi[j] * w[j] * (xi[j] - m) * s;
        }
        for (int j = 0; j < C; j++) {
            float d = (dyi[j] * w[j] - sum / C - (xi[j] - m) * s * sum_norm / C) * s;
            dxi[j] = beta == 0.0f ? d : beta * dxi[j] + d;
        }
    }
#pragma omp parallel for schedule(static)
    for (int first = 0; first < C; first += STRIP) {
        int last = std::min(C, first + STRIP);
        for (int i = 0; i < N; i++) {
            for (int j = first; j < last; j++) {
                db[j] += dy[size_t(i) * C + j];
                dw[j] += dy[size_t(i) * C + j] * (x[size_t(i) * C + j] - mean[i]) * rstd[i];
            }
        }
    }
}

// ---- GELU, GPT-2's tanh form: x/2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)

// exp without branches or calls, so that the compiler can vectorise the loop around it; a
// polynomial of Cephes (Moshier, 1989). x is clamped to [-87.3, 88.3]; NaN stays NaN.
static inline float exp_simd(float x) {
    x = x < -87.3f ? -87.3f : x > 88.3f ? 88.3f : x;
    float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits are round(x / ln 2)
    float n = shifted - 12582912.0f;
    float f = x - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    return p * float_of_bits((bits_of_float(shifted) + 127) << 23);
}

static const float GELU_SCALE = 0.797884561f;

static void gelu_forward(float* y, const float* x, size_t count) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < count; i++) {
        float u = GELU_SCALE * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
        y[i] = x[i] / (1.0f + exp_simd(-2.0f * u));
    }
}

// d *= gelu'(x), in place
static void gelu_backward(float* d, const float* x, size_t count) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < count; i++) {
        float u = GELU_SCALE * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
        float du = GELU_SCALE * (1.0f + 0.134145f * x[i] * x[i]);
        float sigmoid = 1.0f / (1.0f + exp_simd(-2.0f * u));
        d[i] *= sigmoid + x[i] * sigmoid * (1.0f - sigmoid) * 2.0f * du;
    }
}

// GELU with two bits kept of each x. Its derivative is then a step function: the sum of a_i over
// x > c_i (Approx-BP, arXiv 2406.16282, section 4.2). The forward pass stays exact.
static const float GELU_CUTS[3] = {-3.1858810036855245f, -0.001178821281161997f,
                                   3.190832613414926f};
static const float GELU_SLOPES[4] = {0.0f, -0.04922261145617846f, 1.0487405950855512f, 1.0f};

// bits (count / 4 bytes): how many cuts lie below x, four x a byte, the first in the lowest bits
static void gelu_bits(uint8_t* bits, const float* x, size_t count) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count / 4; i++) {
        int byte = 0;
        for (int k = 0; k < 4; k++)
            for (float cut : GELU_CUTS) byte += (x[4 * i + k] > cut) << 2 * k;
        bits[i] = uint8_t(byte);
    }
}

// d *= the step function, in place
static void gelu_backward_2bit(float* d, const uint8_t* bits, size_t count) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; i++) d[i] *= GELU_SLOPES[bits[i / 4] >> i % 4 * 2 & 3];
}

// ---- int8 for what the tape keeps, a scale for each group of neighbours (after Mesa, 2111.11124)

static const float LEAST_SCALE = 1e-30f;  // a smaller one has no inverse: all codes are 0

// codes, x (groups, width), scales (groups): x = scale * code. The largest |x| has code +-127.
static void quantize(int8_t* codes, float* scales, const float* x, int64_t groups, int width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < groups; i++) {
        float most = 0;
        for (int j = 0; j < width; j++) most = std::max(most, fabsf(x[i * width + j]));
        float scale = scales[i] = most / 127, inverse = scale < LEAST_SCALE ? 0 : 1 / scale;
        for (int j = 0; j < width; j++) {
            float code = rintf(x[i * width + j] * inverse);
            codes[i * width + j] = int8_t(std::max(-127.0f, std::min(127.0f, code)));
        }
    }
}

static void dequantize(float* x, const int8_t* codes, const float* scales, int64_t groups,
                       int width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < groups; i++)
        for (int j = 0; j < width; j++) x[i * width + j] = scales[i] * codes[i * width + j];
}

// ---- the matrix product: a BLAS library's where there is one, else ours

#if defined(USE_OPENBLAS)
#include <cblas.h>
#elif defined(USE_ACCELERATE)
#include <Accelerate/Accelerate.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
// GCC's and Clang's portable vectors. 12 accumulators of them fill one register file.
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));
enum { BLOCK_ROWS = 6, BLOCK_COLUMNS = 2 * LANES };

static int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// c (rows, BLOCK_COLUMNS) += a (rows, K) b (K, BLOCK_COLUMNS), the sums held in registers: it is
// inlined, so rows is a constant. Element (i, k) of a stands at a[i * ar + k * ak]: a transpose
// costs nothing.
__attribute__((always_inline)) static inline void product_block(float* c, size_t ldc,
                                                                const float* a, size_t ar,
                                                                size_t ak, const float* b,
                                                                size_t ldb, int K, const int rows) {
    Vector sum[BLOCK_ROWS][2];
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = Vector{};
    for (int k = 0; k < K; k++) {
        Vector b0 = *(const Vector*)(b + k * ldb), b1 = *(const Vector*)(b + k * ldb + LANES);
        for (int i = 0; i < rows; i++) {
            sum[i][0] += a[i * ar + k * ak] * b0;
            sum[i][1] += a[i * ar + k * ak] * b1;
        }
    }
    for (int i = 0; i < rows; i++) {
        *(Vector*)(c + i * ldc) += sum[i][0];
        *(Vector*)(c + i * ldc + LANES) += sum[i][1];
    }
}

// c (M, N) += a (M, K) b (K, N); N a multiple of BLOCK_COLUMNS.
static void product(float* c, size_t ldc, const float* a, size_t ar, size_t ak, const float* b,
                    size_t ldb, int M, int N, int K) {
    for (int j = 0; j < N; j += BLOCK_COLUMNS) {
        int i = 0;
        for (; i + BLOCK_ROWS <= M; i += BLOCK_ROWS)
            product_block(c + i * ldc + j, ldc, a + i * ar, ar, ak, b + j, ldb, K, BLOCK_ROWS);
        for (; i < M; i++)
            product_block(c + i * ldc + j, ldc, a + i * ar, ar, ak, b + j, ldb, K, 1);
    }
}

// One thread's share of a matrix product: c (M, N) = alpha a b + beta c, leading dimensions ld*.
static void product_slab(float* c, int ldc, const float* a, int lda, bool ta, const float* b,
                         int ldb, bool tb, int M, int N, int K, float alpha, float beta) {
#if defined(USE_OPENBLAS) || defined(USE_ACCELERATE)
    cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, M, N,
                K, alpha, a, lda, b, ldb, beta, c, ldc);
#else
    const int KC = 256, NC = 8 * BLOCK_COLUMNS;  // 256 KiB of b at most: they stay in the L2 cache
    static thread_local float packed[KC * NC];
    size_t ar = ta ? 1 : lda, ak = ta ? lda : 1, bk = tb ? 1 : ldb, bj = tb ? ldb : 1;
    for (int i = 0; i < M; i++) {
        float* row = c + size_t(i) * ldc;
        for (int j = 0; j < N; j++) row[j] = beta == 0.0f ? 0.0f : beta * row[j];
    }
    for (int k0 = 0; k0 < K; k0 += KC) {
        int kc = std::min(KC, K - k0);
        for (int j0 = 0; j0 < N; j0 += NC) {
            int nc = std::min(NC, N - j0);
            // A piece of b becomes panels of (kc, BLOCK_COLUMNS), the last one padded with 0.
            for (int j = 0; j < round_up(nc, BLOCK_COLUMNS); j++) {
                float* to = packed + j / BLOCK_COLUMNS * kc * BLOCK_COLUMNS + j % BLOCK_COLUMNS;
                const float* from = b + k0 * bk + (j0 + j) * bj;
                for (int k = 0; k < kc; k++)
                    to[k * BLOCK_COLUMNS] = j < nc ? alpha * from[k * bk] : 0.0f;
            }
            for (int i = 0; i < M; i += BLOCK_ROWS) {
                int rows = std::min<int>(BLOCK_ROWS, M - i);
                for (int j = 0; j < nc; j += BLOCK_COLUMNS) {
                    int columns = std::min<int>(BLOCK_COLUMNS, nc - j);
                    float tile[BLOCK_ROWS * BLOCK_COLUMNS] = {};
                    float* to = c + size_t(i) * ldc + j0 + j;
                    product(tile, BLOCK_COLUMNS, a + i * ar + k0 * ak, ar, ak, packed + j * kc,
                            BLOCK_COLUMNS, rows, BLOCK_COLUMNS, kc);
                    for (int e = 0; e < rows; e++)
                        for (int d = 0; d < columns; d++)
                            to[e * size_t(ldc) + d] += tile[e * BLOCK_COLUMNS + d];
                }
            }
        }
    }
#endif
}

// c (M, N) = alpha a b + beta c, all row-major. a is (M, K), or (K, M) when ta; b is (K, N), or
// (N, K) when tb. With beta = 0, c is not read. A thread computes a slab of c's rows or columns.
static void matmul(float* c, const float* a, bool ta, const float* b, bool tb, int M, int N, int K,
                   float alpha, float beta) {
    if (M == 1 && tb) {  // a matrix times a vector: b is read once, as it lies
#pragma omp parallel for schedule(static)
        for (int j = 0; j < N; j++) {
            const float* row = b + size_t(j) * K;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int k = 0; k < K; k++) sum += a[k] * row[k];
            c[j] = alpha * sum + (beta == 0.0f ? 0.0f : beta * c[j]);
        }
        return;
    }
    int lda = ta ? M : K, ldb = tb ? K : N;
    bool by_columns = N >= M;
    int64_t extent = by_columns ? N : M, unit = by_columns ? BLOCK_COLUMNS : BLOCK_ROWS;
    int64_t blocks = (extent + unit - 1) / unit;
#pragma omp parallel
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int64_t first = blocks * thread / threads * unit;
        int64_t last = std::min(extent, blocks * (thread + 1) / threads * unit);
        int count = int(last - first);
        const float* a_share = a + (by_columns ? 0 : ta ? first : first * lda);
        const float* b_share = b + (!by_columns ? 0 : tb ? first * ldb : first);
        float* c_share = c + (by_columns ? first : first * N);
        int rows = by_columns ? M : count, columns = by_columns ? count : N;
        if (count > 0)
            product_slab(c_share, N, a_share, lda, ta, b_share, ldb, tb, rows, columns, K, alpha,
                         beta);
    }
}

// ---- attention: causal, in tiles of TILE queries by TILE keys with an online softmax
// (FlashAttention-2, arXiv 2307.08691): nothing of size T x T exists. A thread takes one head of
// one sequence, so no two write the same place.

enum { TILE = 64 };

// Floats of scratch that one thread's tiles take (the backward pass needs the more).
static size_t attention_scratch(int hs) {
    int wide = round_up(hs, BLOCK_COLUMNS);
    return TILE * size_t(8 * wide + 2 * TILE);
}

// Copies a tile (rows, hs) with leading dimension ld to (TILE, wide); 0 where there is none.
static void load_tile(float* tile, const float* from, size_t ld, int rows, int hs, int wide) {
    for (int i = 0; i < TILE; i++)
        for (int d = 0; d < wide; d++)
            tile[i * wide + d] = i < rows && d < hs ? from[i * ld + d] : 0.0f;
}

// Likewise its transpose, to (hs, TILE).
static void load_transpose(float* tile, const float* from, size_t ld, int rows, int hs) {
    for (int d = 0; d < hs; d++)
        for (int i = 0; i < TILE; i++) tile[d * TILE + i] = i < rows ? from[i * ld + d] : 0.0f;
}

// out (N, C), qkv (N, 3C); lse (B, NH, T): the logarithm of the softmax's denominator, kept for the
// backward pass
static void attention_forward(float* out, float* lse, const float* qkv, float* scratch, int B,
                              int T, int C, int NH) {
    int hs = C / NH, wide = round_up(hs, BLOCK_COLUMNS);
    size_t ld = 3 * size_t(C);
    float scale = 1.0f / sqrtf(float(hs));
#pragma omp parallel for schedule(dynamic)
    for (int bh = 0; bh < B * NH; bh++) {
        int b = bh / NH, h = bh % NH;
        const float* q = qkv + size_t(b) * T * ld + h * hs;
        const float *k = q + C, *v = q + 2 * C;
        float* kt = scratch + omp_get_thread_num() * attention_scratch(hs);
        float *vs = kt + TILE * wide, *o = vs + TILE * wide, *s = o + TILE * wide;
        float *top = s + TILE * TILE, *sum = top + TILE;  // of each query: its greatest score
        for (int q0 = 0; q0 < T; q0 += TILE) {
            int queries = std::min<int>(TILE, T - q0);
            memset(o, 0, sizeof(float) * TILE * wide);
            std::fill(top, top + TILE, -INFINITY);
            std::fill(sum, sum + TILE, 0.0f);
            for (int k0 = 0; k0 <= q0; k0 += TILE) {
                int keys = std::min<int>(TILE, T - k0);
                load_transpose(kt, k + k0 * ld, ld, keys, hs);
                load_tile(vs, v + k0 * ld, ld, keys, hs, wide);
                memset(s, 0, sizeof(float) * TILE * TILE);
                product(s, TILE, q + q0 * ld, ld, 1, kt, TILE, queries, TILE, hs);
                for (int i = 0; i < queries; i++) {
                    float *si = s + i * TILE, most = top[i], total = 0;
                    int visible = std::min<int>(TILE, q0 + i - k0 + 1);
#pragma omp simd reduction(max : most)
                    for (int j = 0; j < visible; j++) most = std::max(most, si[j] * scale);
#pragma omp simd reduction(+ : total)
                    for (int j = 0; j < visible; j++)
                        total += si[j] = exp_simd(si[j] * scale - most);
                    std::fill(si + visible, si + TILE, 0.0f);
                    float shrink = exp_simd(top[i] - most);  // what was summed, at the new maximum
                    for (int d = 0; d < wide; d++) o[i * wide + d] *= shrink;
                    sum[i] = sum[i] * shrink + total;
                    top[i] = most;
                }
                product(o, wide, s, TILE, 1, vs, wide, queries, wide, keys);
            }
            for (int i = 0; i < queries; i++) {
                float* to = out + (size_t(b) * T + q0 + i) * C + h * hs;
                for (int d = 0; d < hs; d++) to[d] = o[i * wide + d] / sum[i];
                lse[size_t(bh) * T + q0 + i] = top[i] + logf(sum[i]);
            }
        }
    }
}

// The same for n tokens that follow `past` others. The cache (past + n, 2C) holds the keys and
// values of those; the new ones join them.
static void attention_cached(float* out, float* cache, const float* qkv, int past, int n, int C,
                             int NH) {
    int hs = C / NH;
    size_t ld = 2 * size_t(C);
    float scale = 1.0f / sqrtf(float(hs));
    for (int i = 0; i < n; i++)
        memcpy(cache + (past + i) * ld, qkv + i * 3 * size_t(C) + C, ld * sizeof(float));
#pragma omp parallel for schedule(static)
    for (int row = 0; row < n * NH; row++) {
        int i = row / NH, h = row % NH;
        const float *q = qkv + i * 3 * size_t(C) + h * hs, *k = cache + h * hs, *v = k + C;
        float *o = out + size_t(i) * C + h * hs, s[TILE], top = -INFINITY, sum = 0;
        std::fill(o, o + hs, 0.0f);
        for (int first = 0; first <= past + i; first += TILE) {
            int keys = std::min<int>(TILE, past + i + 1 - first);
            float most = top;
            for (int j = 0; j < keys; j++) {
                const float* kj = k + (first + j) * ld;
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int d = 0; d < hs; d++) dot += q[d] * kj[d];
                s[j] = dot * scale;
                most = std::max(most, s[j]);
            }
            float shrink = exp_simd(top - most);
            for (int d = 0; d < hs; d++) o[d] *= shrink;
            sum *= shrink;
            top = most;
            for (int j = 0; j < keys; j++) {
                const float *vj = v + (first + j) * ld, p = exp_simd(s[j] - most);
                sum += p;
                for (int d = 0; d < hs; d++) o[d] += p * vj[d];
            }
        }
        for (int d = 0; d < hs; d++) o[d] /= sum;
    }
}

// dqkv (N, 3C) = gradient, from dout and out (N, C). With p the softmax again from lse:
// dv = p^T dout, dp = dout v^T, ds = p (dp - sum over d of dout out) scale, dq = ds k, dk = ds^T q.
static void attention_backward(float* dqkv, const float* dout, const float* qkv, const float* out,
                               const float* lse, float* scratch, int B, int T, int C, int NH) {
    int hs = C / NH, wide = round_up(hs, BLOCK_COLUMNS);
    size_t ld = 3 * size_t(C), tile = size_t(TILE) * wide;
    float scale = 1.0f / sqrtf(float(hs));
#pragma omp parallel for schedule(dynamic)
    for (int bh = 0; bh < B * NH; bh++) {
        int b = bh / NH, h = bh % NH;
        size_t at = size_t(b) * T * ld + h * hs, at_out = size_t(b) * T * C + h * hs;
        const float *q = qkv + at, *k = q + C, *v = q + 2 * C;
        float *dq = dqkv + at, *dk = dq + C, *dv = dq + 2 * C;
        float* kt = scratch + omp_get_thread_num() * attention_scratch(hs);
        float *vt = kt + tile, *ks = vt + tile, *qs = ks + tile, *dos = qs + tile;
        float *dks = dos + tile, *dvs = dks + tile, *dqs = dvs + tile;
        float *p = dqs + tile, *ds = p + TILE * TILE;
        for (int t = 0; t < T; t++) std::fill(dq + t * ld, dq + t * ld + hs, 0.0f);
        for (int k0 = 0; k0 < T; k0 += TILE) {
            int keys = std::min<int>(TILE, T - k0);
            load_transpose(kt, k + k0 * ld, ld, keys, hs);
            load_transpose(vt, v + k0 * ld, ld, keys, hs);
            load_tile(ks, k + k0 * ld, ld, keys, hs, wide);
            memset(dks, 0, sizeof(float) * tile);
            memset(dvs, 0, sizeof(float) * tile);
            for (int q0 = k0; q0 < T; q0 += TILE) {
                int queries = std::min<int>(TILE, T - q0);
                load_tile(qs, q + q0 * ld, ld, queries, hs, wide);
                load_tile(dos, dout + at_out + size_t(q0) * C, C, queries, hs, wide);
                memset(p, 0, sizeof(float) * TILE * TILE);
                memset(ds, 0, sizeof(float) * TILE * TILE);
                memset(dqs, 0, sizeof(float) * tile);
                product(p, TILE, qs, wide, 1, kt, TILE, queries, TILE, hs);
                product(ds, TILE, dos, wide, 1, vt, TILE, queries, TILE, hs);
                for (int i = 0; i < queries; i++) {
                    const float* oi = out + at_out + size_t(q0 + i) * C;
                    float *pi = p + i * TILE, *dsi = ds + i * TILE;
                    float dot = 0, log_sum = lse[size_t(bh) * T + q0 + i];
#pragma omp simd reduction(+ : dot)
                    for (int d = 0; d < hs; d++) dot += dos[i * wide + d] * oi[d];
                    int visible = std::min(keys, q0 + i - k0 + 1);
                    for (int j = 0; j < visible; j++) {
                        pi[j] = exp_simd(pi[j] * scale - log_sum);
                        dsi[j] = pi[j] * (dsi[j] - dot) * scale;
                    }
                    std::fill(pi + visible, pi + TILE, 0.0f);
                    std::fill(dsi + visible, dsi + TILE, 0.0f);
                }
                product(dvs, wide, p, 1, TILE, dos, wide, keys, wide, queries);
                product(dks, wide, ds, 1, TILE, qs, wide, keys, wide, queries);
                product(dqs, wide, ds, TILE, 1, ks, wide, queries, wide, keys);
                for (int i = 0; i < queries; i++)
                    for (int d = 0; d < hs; d++) dq[(q0 + i) * ld + d] += dqs[i * wide + d];
            }
            for (int j = 0; j < keys; j++) {
                memcpy(dk + (k0 + j) * ld, dks + j * wide, sizeof(float) * hs);
                memcpy(dv + (k0 + j) * ld, dvs + j * wide, sizeof(float) * hs);
            }
        }
    }
}

// ---- softmax and cross entropy of a chunk of tokens

// losses (rows); logits (rows, V) become their gradient, times scale. A target of -1 is not
// predicted: no loss, no gradient.
static void cross_entropy(float* logits, float* losses, const int* targets, int rows, int V,
                          float scale) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < rows; i++) {
        float *row = logits + size_t(i) * V, most = row[0], sum = 0;
        if (targets[i] < 0) {
            std::fill(row, row + V, 0.0f);
            losses[i] = 0;
            continue;
        }
#pragma omp simd reduction(max : most)
        for (int j = 0; j < V; j++) most = std::max(most, row[j]);
        float wanted = row[targets[i]] - most;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < V; j++) sum += row[j] = exp_simd(row[j] - most);
        losses[i] = logf(sum) - wanted;
        for (int j = 0; j < V; j++) row[j] *= scale / sum;
        row[targets[i]] -= scale;
    }
}

// =================================================================================================
// the compressed linear layer: follow z through it. x becomes z (make_z), z is kept
// (linear_forward), z makes the gradient (linear_backward), and the step goes back to W (lift).
// =================================================================================================

// A linear layer of one block: its shape, its tensors, and what its P is drawn from.
struct LinearLayer {
    Linear shape;              // m outputs, n inputs, rank r
    float *w, *b;              // (m, n), (m)
    float *dw, *db;            // (m, r), (m)
    float *moment1, *moment2;  // (m, r); Muon has the first one alone
    float* z;                  // (N, r) on the tape, or null: z is then made in the backward pass,
    float* z_now;              // (N, r) here
    int projection;            // the kind of P
    uint64_t seed, stream;     // P's numbers: they depend on layer, linear and epoch
    float* p;                  // P (n, r), sparse: (n) signs, where it stands once it is drawn
    int* shift;                // sparse: a rotation for each stripe of r inputs
};

// out[i] = scale with a random sign: bit i % 128 of block i / 128 of a stream, 1 for minus.
static void draw_signs(float* out, int64_t count, float scale, uint64_t seed, uint64_t stream) {
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < (count + 127) / 128; block++) {
        Words bits = philox(seed, stream, block);
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
        for (int64_t i = 128 * block; i < std::min(count, 128 * (block + 1)); i++) {
            uint32_t sign = (words[i % 128 / 32] >> i % 32) << 31;
            out[i] = float_of_bits(bits_of_float(scale) ^ sign);
        }
    }
}

// P (n, r) with E[P P^T] = I, drawn anew wherever it is needed. gaussian: N(0, 1/r) (CompAct,
// section 3.1). rademacher: signs / sqrt(r). sparse: one sign in each row, p[k], in column
// (k + shift[k / r]) mod r, so that z is a signed fold of x. Another projection is another branch
// here, in project, and in lift.
static void draw_projection(float* p, int* shift, const Linear& shape, int projection,
                            uint64_t seed, uint64_t stream) {
    int n = shape.n, r = shape.r;
    int64_t count = int64_t(n) * r;
    float scale = 1.0f / sqrtf(float(r));
    if (projection == GAUSSIAN) return draw_normals(p, 0, count, scale, seed, stream);
    if (projection == RADEMACHER) return draw_signs(p, count, scale, seed, stream);
    draw_signs(p, n, 1.0f, seed, stream);
    for (int stripe = 0; stripe * r < n; stripe++)
        shift[stripe] = philox(seed, stream, (1ull << 32) + stripe).x % r;
}

// x (N, n) -> z (N, r) = x P
static void project(float* z, const float* x, const float* p, const int* shift, const Linear& shape,
                    int projection, int N) {
    int n = shape.n, r = shape.r;
    if (projection != SPARSE) return matmul(z, x, false, p, false, N, r, n, 1.0f, 0.0f);
#pragma omp parallel for schedule(static)
    for (int i = 0; i < N; i++) {
        const float* xi = x + size_t(i) * n;
        float* zi = z + size_t(i) * r;
        std::fill(zi, zi + r, 0.0f);
        for (int first = 0; first < n; first += r) {  // a stripe, rotated: two runs need no modulo
            int turn = shift[first / r], last = std::min(n, first + r);
            int wrap = std::min(n, first + r - turn);
            for (int k = first; k < wrap; k++) zi[k - first + turn] += p[k] * xi[k];
            for (int k = first + r - turn; k < last; k++) zi[k - first + turn - r] += p[k] * xi[k];
        }
    }
}

// The present P of a layer, drawn to its place.
static const float* projection_now(const LinearLayer& linear) {
    draw_projection(linear.p, linear.shift, linear.shape, linear.projection, linear.seed,
                    linear.stream);
    return linear.p;
}

static void make_z(const LinearLayer& linear, float* z, const float* x, int N) {
    project(z, x, projection_now(linear), linear.shift, linear.shape, linear.projection, N);
}

// x (N, n) -> y (N, m) = x W^T + b, plus residual (N, m) where it is given. x is whole here: y is
// exact. When training, z (N, r) = x P is kept for the backward pass, and x may be overwritten.
static void linear_forward(const LinearLayer& linear, float* y, const float* x,
                           const float* residual, int N, bool training) {
    int m = linear.shape.m, n = linear.shape.n;
#pragma omp parallel for schedule(static)
    for (int i = 0; i < N; i++) {
        float* yi = y + size_t(i) * m;
        for (int j = 0; j < m; j++)
            yi[j] = residual ? residual[size_t(i) * m + j] + linear.b[j] : linear.b[j];
    }
    matmul(y, x, false, linear.w, true, N, m, n, 1.0f, 1.0f);
    if (training && linear.z) make_z(linear, linear.z, x, N);
}

// db (m) += sum over tokens of dy (N, m)
static void bias_backward(float* db, const float* dy, int N, int m) {
#pragma omp parallel for schedule(static)
    for (int first = 0; first < m; first += STRIP) {
        int last = std::min(m, first + STRIP);
        for (int i = 0; i < N; i++)
            for (int j = first; j < last; j++) db[j] += dy[size_t(i) * m + j];
    }
}

// dy (N, m), z (N, r) -> G (m, r) = dy^T z, added to beta times what stands there; at full rank
// dy^T x (m, n). dy -> dx (N, n) = dy W, exact. x may be null where z is on the tape. It may be dx
// itself, since it is read first.
static void linear_backward(const LinearLayer& linear, float* dx, const float* dy, const float* x,
                            int N, float beta) {
    int m = linear.shape.m, n = linear.shape.n, r = linear.shape.r;
    const float* kept = x;
    if (linear.shape.compressed()) {
        kept = linear.z ? linear.z : linear.z_now;
        if (!linear.z) make_z(linear, linear.z_now, x, N);
    }
    matmul(linear.dw, dy, true, kept, false, m, r, N, 1.0f, beta);
    bias_backward(linear.db, dy, N, m);
    matmul(dx, dy, false, linear.w, false, N, n, m, 1.0f, 0.0f);
}

// U (m, r), P (n, r) -> W (m, n) = keep W - step U P^T: the step of the small space, lifted
// (CompAct, algorithm 2). Sparse: row o of U is gathered to the inputs, each with its sign.
static void lift(float* w, const float* u, const float* p, const int* shift, const Linear& shape,
                 int projection, float keep, float step) {
    int m = shape.m, n = shape.n, r = shape.r;
    if (projection != SPARSE) return matmul(w, u, false, p, true, m, n, r, -step, keep);
#pragma omp parallel for schedule(static)
    for (int o = 0; o < m; o++) {
        float* wo = w + size_t(o) * n;
        const float* uo = u + size_t(o) * r;
        for (int first = 0; first < n; first += r) {
            int turn = shift[first / r], last = std::min(n, first + r);
            int wrap = std::min(n, first + r - turn);
            for (int k = first; k < wrap; k++)
                wo[k] = keep * wo[k] - step * p[k] * uo[k - first + turn];
            for (int k = first + r - turn; k < last; k++)
                wo[k] = keep * wo[k] - step * p[k] * uo[k - first + turn - r];
        }
    }
}

// =================================================================================================
// the optimizer: a gradient becomes a step. AdamW for all that is no linear layer's weight; AdamW
// or Muon for those, in the space of their gradients.
// =================================================================================================

// ---- AdamW (Loshchilov and Hutter, arXiv 1711.05101)

struct Adam {
    float lr, beta1, beta2, eps, decay;
    float grad_scale;          // below 1 when the gradient is clipped
    float correct1, correct2;  // 1 / (1 - beta^t)
};

// Moves the moments on by gradient g; returns the direction U = M^ / (sqrt(V^) + eps).
static inline float adam_direction(const Adam& a, float g, float* m, float* v) {
    g *= a.grad_scale;
    *m = a.beta1 * *m + (1.0f - a.beta1) * g;
    *v = a.beta2 * *v + (1.0f - a.beta2) * g * g;
    return *m * a.correct1 / (sqrtf(*v * a.correct2) + a.eps);
}

static void adam_update(float* w, const float* g, float* m, float* v, int64_t count,
                        const Adam& a) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++)
        w[i] -= a.lr * (adam_direction(a, g[i], m + i, v + i) + a.decay * w[i]);
}

// ---- Muon (Jordan et al. 2024): the step is the nearest orthogonal matrix to the momentum

// x (rows, columns) becomes the nearest matrix with orthonormal rows or columns, whichever are
// fewer, by Newton-Schulz iterations X <- a X + (b A + c A^2) X from X / ||X||_F, with A = X X^T,
// or X^T X on the other side. Singular values end between 0.7 and 1.2, those below some 1e-3 of the
// norm further down. Zeros stay zeros. work: (rows, columns) and twice (k, k), k the smaller side.
static void orthogonalise(float* x, int rows, int columns, float* work) {
    const float a = 3.4445f, b = -4.7750f, c = 2.0315f;
    bool tall = rows > columns;
    int k = tall ? columns : rows, longer = tall ? rows : columns;
    size_t count = size_t(rows) * columns, square = size_t(k) * k;
    float *next = work, *gram = next + count, *poly = gram + square;
    double squares = 0;  // in double: no scale of x is too large or too small
    for (size_t i = 0; i < count; i++) squares += double(x[i]) * x[i];
    double scale = squares > 0 ? 1 / sqrt(squares) : 0;
    for (size_t i = 0; i < count; i++) x[i] = float(x[i] * scale);
    for (int i = 0; i < NEWTON_SCHULZ; i++) {
        matmul(gram, x, tall, x, !tall, k, k, longer, 1.0f, 0.0f);
        memcpy(poly, gram, square * sizeof(float));
        matmul(poly, gram, false, gram, false, k, k, k, c, b);
        memcpy(next, x, count * sizeof(float));
        matmul(next, tall ? x : poly, false, tall ? poly : x, false, rows, columns, k, 1.0f, a);
        memcpy(x, next, count * sizeof(float));
    }
}

// g (rows, columns) becomes the step U = 0.2 sqrt(max(rows, columns)) orth(g + mu M) after
// M = mu M + g: Nesterov's form. The factor is Moonlight's (arXiv 2502.16982): the root mean square
// of U is 0.2, about that of AdamW's step, and so it is once U is lifted, as E[P P^T] = I. So
// learning rate and decay carry over, from AdamW and from rank to rank.
static void muon_direction(float* g, float* m, int rows, int columns, float grad_scale,
                           float* work) {
    const float mu = 0.95f;
    size_t count = size_t(rows) * columns;
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < count; i++) {
        m[i] = mu * m[i] + grad_scale * g[i];
        g[i] = grad_scale * g[i] + mu * m[i];
    }
    orthogonalise(g, rows, columns, work);
    float factor = 0.2f * sqrtf(float(std::max(rows, columns)));
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < count; i++) g[i] *= factor;
}

// ---- a linear layer's weight, with either

// G (m, r) -> U (m, r), in G's place: the optimizer's step in the small space, (m, n) at full rank.
static void linear_direction(const LinearLayer& linear, int optimizer, int blocks, const Adam& a,
                             float* work) {
    int m = linear.shape.m, r = linear.shape.r;
    int64_t count = int64_t(m) * r;
    float *g = linear.dw, *first = linear.moment1, *second = linear.moment2;
    if (optimizer == MUON) {
        for (int64_t i = 0; i < count; i += count / blocks)
            muon_direction(g + i, first + i, m / blocks, r, a.grad_scale, work);
        return;
    }
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++) g[i] = adam_direction(a, g[i], first + i, second + i);
}

// U (m, r) -> W (m, n): W -= lr (alpha U P^T + wd W); at full rank W -= lr (U + wd W).
static void linear_update(const LinearLayer& linear, int optimizer, int blocks, const Adam& a,
                          float alpha, float* work) {
    linear_direction(linear, optimizer, blocks, a, work);
    float *w = linear.w, *u = linear.dw, keep = 1.0f - a.lr * a.decay;
    if (linear.shape.compressed())
        return lift(w, u, projection_now(linear), linear.shift, linear.shape, linear.projection,
                    keep, a.lr * alpha);
    int64_t count = int64_t(linear.shape.m) * linear.shape.n;
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++) w[i] = keep * w[i] - a.lr * u[i];
}

// M (m, r) -> M P_old^T P_new: the first moment moves into the space of the next projection (Flora,
// arXiv 2402.03293). change: (r, r). The gradient's memory, free until the next backward pass,
// serves for the product.
static void move_moment(const LinearLayer& linear, const LinearLayer& next, float* change) {
    int m = linear.shape.m, n = linear.shape.n, r = linear.shape.r;
    const float *p = projection_now(linear), *p_next = projection_now(next);
    if (linear.projection == SPARSE) {
        std::fill(change, change + r * int64_t(r), 0.0f);
        for (int k = 0; k < n; k++) {
            int row = (k + linear.shift[k / r]) % r, column = (k + next.shift[k / r]) % r;
            change[int64_t(row) * r + column] += p[k] * p_next[k];
        }
    } else {
        matmul(change, p, true, p_next, false, r, r, n, 1.0f, 0.0f);
    }
    matmul(linear.dw, linear.moment1, false, change, false, m, r, r, 1.0f, 0.0f);
    memcpy(linear.moment1, linear.dw, sizeof(float) * m * r);
}

// ---- weights in bf16 alone

// Rounds to bf16, up or down at random, so that the mean is w: this stands in for master weights.
// Element i is moved by 16 bits of block i / 8 of a stream.
static void round_stochastically(float* w, int64_t count, uint64_t seed, uint64_t stream) {
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < (count + 7) / 8; block++) {
        Words random = philox(seed, stream, block);
        const uint32_t words[4] = {random.x, random.y, random.z, random.w};
        for (int64_t i = 8 * block; i < std::min(count, 8 * block + 8); i++) {
            uint32_t moved = bits_of_float(w[i]) + (words[i % 8 / 2] >> i % 2 * 16 & 0xFFFF);
            w[i] = float_of_bits(moved & 0xFFFF0000u);
        }
    }
}

// =================================================================================================
// the model: parameters, tape, gradients; forward, backward, update
// =================================================================================================

struct Model {
    Config config;
    Options options;
    Linear linear[LINEARS];
    int64_t epoch;  // of the projections
    float *params[PARAMS], *grads[PARAMS], *m[PARAMS], *v[PARAMS];
    // the tape: a row is kept in one of these ways, as kept[row] says, or is null in all
    int kept[TAPE_ROWS];
    float* tape[TAPE_ROWS];          // (L, N, width C)
    float* z[LINEARS];               // (L, N, r) in place of the input of a compressed layer
    void* codes[TAPE_ROWS];          // (L, N, width C) int8, or 2 bits an element
    float* scales[TAPE_ROWS];        // (L, N, scales) of the int8
    float *ln_mean[2], *ln_rstd[2];  // (L, N) of a block's two LayerNorms
    float* lse;                      // (L, N, NH) floats, (B, NH, T) in a layer
    float *lnf_mean, *lnf_rstd;      // (N)
    // workspace, reused by every layer
    float* now[TAPE_ROWS];         // (N, width C) of this block what the tape lacks whole
    float* dresidual;              // (N, C) gradient of the stream
    float* wide;                   // (N, 4C) inputs and gradients on their way; after the
                                   // forward pass the head's input; in the update Muon's
    float* spare;                  // (N, C) likewise; (N, 4C) where fch or qkv comes back
    float* z_now;                  // (N, r) z where it is not on the tape
    float *p, *p_next, *p_change;  // P (n, r), or (n) signs; the next P; (r, r) between them
    int *shift, *shift_next;       // sparse: a rotation for each stripe of r inputs
    float* logits;                 // (CHUNK, V)
    float* scratch;                // attention's tiles, for each thread
    float* cache;                  // (L, seq, 2C) keys and values of a text in the making
    // data
    int *inputs, *targets;  // (N)
    float* losses;          // (N)
};

enum { CHUNK = 256 };    // tokens whose logits exist at one time
enum { NO_CACHE = -1 };  // for `past`: attention is among the tokens at hand

// ---- memory: what there is, and where

// Whether fch or qkv comes back into `spare`, which otherwise has a block's width of C at most.
static bool spare_is_wide(const Model& model) {
    return model.kept[FCH] == GONE || model.kept[QKVR] != WHOLE;
}

// Rows (4C) of `wide`: N, or what Muon needs in the update, X (rows, r) once more and two (k, k).
static int64_t wide_rows(const Model& model, int64_t N) {
    int64_t most = 0, width = 4 * model.config.C;
    for (int i = 0; i < LINEARS && model.options.optimizer == MUON; i++) {
        int64_t rows = model.linear[i].m / blocks_of(i), r = model.linear[i].r;
        int64_t k = std::min(rows, r);
        most = std::max(most, rows * r + 2 * k * k);
    }
    return std::max(N, (most + width - 1) / width);
}

// Lists every tensor of the run, with the place of its pointer in the model. Sets the model up, but
// allocates nothing.
static Plan model_plan(Model& model, const Config& config, const Options& options) {
    if (options.offload)
        refuse("--offload: is for the GPU's trainer; here all memory is the host's");
    Plan plan;
    model = Model{};
    model.config = config;
    model.options = options;
    for (int i = 0; i < LINEARS; i++) model.linear[i] = linear_shape(config, options, i);
    bool trains = !options.generates, muon = options.optimizer == MUON;
    bool sparse = options.projection == SPARSE, z_kept[LINEARS] = {};
    bool moves = options.moments == MOVE && options.gap > 0;
    int64_t L = config.L, C = config.C, N = rows_of(options), trained = trains ? N : 0;
    auto add = [&](const char* category, const std::string& name, const char* type,
                   const std::vector<int64_t>& shape,
                   void* home) { plan_add(plan, category, name, type, shape, home); };

    for (int i = 0; i < PARAMS; i++)
        add("parameters", param_rows[i].name, "fp32", param_shape(config, i), &model.params[i]);
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

    for (int i = 0; i < TAPE_ROWS; i++) {
        const TapeRow& row = tape_rows[i];
        std::string name = row.name;
        int kept = model.kept[i] = how_kept(i, options, model.linear);
        int64_t r = kept == AS_Z ? model.linear[row.input_of].r : 0;
        if (kept == WHOLE) add("tape", name, "fp32", {L, N, row.width * C}, &model.tape[i]);
        if (kept == AS_Z) add("tape", name + ".z", "fp32", {L, N, r}, &model.z[row.input_of]);
        if (kept == AS_Z) z_kept[row.input_of] = true;
        if (kept == AS_INT8)
            add("tape", name + ".scale", "fp32", {L, N, scales_of(config, i)}, &model.scales[i]);
    }
    add("tape", "ln1_mean", "fp32", {L, N}, &model.ln_mean[0]);
    add("tape", "ln1_rstd", "fp32", {L, N}, &model.ln_rstd[0]);
    add("tape", "ln2_mean", "fp32", {L, N}, &model.ln_mean[1]);
    add("tape", "ln2_rstd", "fp32", {L, N}, &model.ln_rstd[1]);
    add("tape", "lse", "fp32", {L, trained, config.NH}, &model.lse);
    add("tape", "lnf_mean", "fp32", {N}, &model.lnf_mean);
    add("tape", "lnf_rstd", "fp32", {N}, &model.lnf_rstd);
    for (int i = 0; i < TAPE_ROWS; i++) {  // after all that has to begin on 4 bytes
        std::string name = tape_rows[i].name;
        std::vector<int64_t> shape = {L, N, tape_rows[i].width * C};
        if (model.kept[i] == AS_INT8) add("tape", name + ".int8", "int8", shape, &model.codes[i]);
        if (model.kept[i] == AS_2BIT) add("tape", name + ".2bit", "2bit", shape, &model.codes[i]);
    }

    // The stream out of the last block is in no row of the tape. qkv comes back into `spare`,
    // unless the block's other half has to be computed while it waits.
    add("workspace", "stream", "fp32", {N, C}, &model.now[RESIDUAL]);
    if (model.kept[ATTY] == GONE) add("workspace", "qkv", "fp32", {N, 3 * C}, &model.now[QKVR]);
    if (model.kept[ATTY] != WHOLE) add("workspace", "atty", "fp32", {N, C}, &model.now[ATTY]);
    if (model.kept[RESIDUAL2] != WHOLE)
        add("workspace", "residual2", "fp32", {N, C}, &model.now[RESIDUAL2]);
    add("workspace", "dresidual", "fp32", {trained, C}, &model.dresidual);
    add("workspace", "wide", "fp32", {wide_rows(model, N), 4 * C}, &model.wide);
    add("workspace", "spare", "fp32", {N, spare_is_wide(model) ? 4 * C : C}, &model.spare);

    int64_t z_now = 0, p_count = 0, p_change = 0, stripes = 0;
    for (int i = 0; i < LINEARS; i++) {
        if (!model.linear[i].compressed()) continue;
        int64_t n = model.linear[i].n, r = model.linear[i].r;
        if (!z_kept[i]) z_now = std::max(z_now, r);
        p_count = std::max(p_count, sparse ? n : n * r);
        p_change = std::max(p_change, r * r);
        if (sparse) stripes = std::max(stripes, (n + r - 1) / r);
    }
    int64_t threads = trains ? omp_get_max_threads() : 0, tiles = attention_scratch(C / config.NH);
    int64_t chunk = std::min<int64_t>(CHUNK, trained), cached = cached_tokens(options);
    add("workspace", "z", "fp32", {N, z_now}, &model.z_now);
    add("workspace", "projection", "fp32", {p_count}, &model.p);
    add("workspace", "projection_shift", "int32", {stripes}, &model.shift);
    add("workspace", "projection_next", "fp32", {moves * p_count}, &model.p_next);
    add("workspace", "projection_next_shift", "int32", {moves * stripes}, &model.shift_next);
    add("workspace", "projection_change", "fp32", {moves * p_change}, &model.p_change);
    add("workspace", "logits", "fp32", {chunk, config.V}, &model.logits);
    add("workspace", "attention_tiles", "fp32", {threads, tiles}, &model.scratch);
    add("workspace", "keys_values", "fp32", {L, cached, 2 * C}, &model.cache);
    add("data", "inputs", "int32", {N}, &model.inputs);
    add("data", "targets", "int32", {trained}, &model.targets);
    add("data", "losses", "fp32", {trained}, &model.losses);

    plan.flops = matrix_flops(config, options, model.linear);
    return plan;
}

// One arena for each category. It is zeroed: moments start from 0, and so does the gradient of
// padded words, which nothing writes.
static void model_allocate(Model&, const Plan& plan) {
#if defined(USE_OPENBLAS)
    openblas_set_num_threads(1);  // our own threads call it, each for its slab
#endif
    for (const std::string& category : plan.categories()) {
        char* arena = (char*)calloc(plan.bytes(category), 1);
        if (!arena)
            fail("not enough memory: ", commas(plan.bytes(category)), " bytes for ", category,
                 " could not be had; a smaller --batch, --seq or --rank, or --recompute 5, takes "
                 "less");
        for (const Tensor& t : plan.tensors) {
            if (t.category != category) continue;
            memcpy(t.home, &arena, sizeof(arena));
            arena += t.bytes();
        }
    }
}

// Parameter i of one layer in params, grads, m or v.
static float* param_at(const Model& model, float* const* group, int i, int layer) {
    const ParamRow& row = param_rows[i];
    int64_t C = model.config.C, columns = row.columns == 0 ? 1 : row.columns * C;
    if (row.linear >= 0 && group != model.params) columns = model.linear[row.linear].r;
    return !group[i] ? nullptr : group[i] + layer * row.rows * C * columns;
}

// A linear layer of a block, in an epoch of the projections. N: tokens of the pass at hand.
static LinearLayer linear_at(const Model& model, int which, int layer, int N, int64_t epoch) {
    int w = weight_of(which), b = w + 1;
    const Linear& shape = model.linear[which];
    float* z = model.z[which];
    return {shape,
            param_at(model, model.params, w, layer),
            param_at(model, model.params, b, layer),
            param_at(model, model.grads, w, layer),
            param_at(model, model.grads, b, layer),
            param_at(model, model.m, w, layer),
            param_at(model, model.v, w, layer),
            z ? z + int64_t(layer) * N * shape.r : nullptr,
            model.z_now,
            model.options.projection,
            uint64_t(model.options.seed),
            stream_of(which, layer, epoch),
            model.p,
            model.shift};
}

static LinearLayer linear_at(const Model& model, int which, int layer, int N) {
    return linear_at(model, which, layer, N, model.epoch);
}

// Row `row` of the tape in a layer. Where the tape does not keep it whole: where it stands for now.
static float* tape_at(const Model& model, int row, int layer, int N, float* otherwise) {
    int64_t stride = int64_t(N) * tape_rows[row].width * model.config.C;
    return model.tape[row] ? model.tape[row] + layer * stride : otherwise;
}

// Where a block's tensors stand while it is worked on. What is not on the tape lies in wide and
// spare as the forward pass goes: ln1 in wide, qkv in spare, ln2 in the one and fch in the other,
// fch_gelu in wide. fch that is kept as bits becomes its GELU in place.
struct Block {
    float *residual, *ln1, *qkv, *atty, *residual2, *ln2, *fch, *fch_gelu;
};

static Block block_at(const Model& model, int layer, int N) {
    bool bits = model.kept[FCH] == AS_2BIT, after_last = layer == model.config.L;
    float *stream = model.now[RESIDUAL], *qkv = model.now[QKVR];
    return {after_last ? stream : tape_at(model, RESIDUAL, layer, N, stream),
            tape_at(model, LN1, layer, N, model.wide),
            tape_at(model, QKVR, layer, N, qkv ? qkv : model.spare),
            tape_at(model, ATTY, layer, N, model.now[ATTY]),
            tape_at(model, RESIDUAL2, layer, N, model.now[RESIDUAL2]),
            tape_at(model, LN2, layer, N, bits ? model.spare : model.wide),
            tape_at(model, FCH, layer, N, bits ? model.wide : model.spare),
            tape_at(model, FCH_GELU, layer, N, model.wide)};
}

// A row (N, width C) that the tape keeps as int8: onto it, and back again.
static void tape_store(Model& model, int row, int layer, const float* x, int N) {
    if (model.kept[row] != AS_INT8) return;
    int64_t width = tape_rows[row].width * int64_t(model.config.C);
    int64_t scales = scales_of(model.config, row), first = int64_t(layer) * N;
    quantize((int8_t*)model.codes[row] + first * width, model.scales[row] + first * scales, x,
             N * scales, int(width / scales));
}

static void tape_load(Model& model, int row, int layer, float* x, int N) {
    if (model.kept[row] != AS_INT8) return;
    int64_t width = tape_rows[row].width * int64_t(model.config.C);
    int64_t scales = scales_of(model.config, row), first = int64_t(layer) * N;
    dequantize(x, (int8_t*)model.codes[row] + first * width, model.scales[row] + first * scales,
               N * scales, int(width / scales));
}

static uint8_t* fch_bits(const Model& model, int layer, int N) {
    return (uint8_t*)model.codes[FCH] + int64_t(layer) * N * model.config.C;
}

// ---- the forward pass

// LayerNorm 1 or 2 of a block, by its weight: LN1W or LN2W.
static void block_layernorm(Model& model, int w, float* y, const float* x, int layer, int N) {
    int which = w == LN2W;
    int64_t first = int64_t(layer) * N;
    layernorm_forward(y, model.ln_mean[which] + first, model.ln_rstd[which] + first, x,
                      param_at(model, model.params, w, layer),
                      param_at(model, model.params, w + 1, layer), N, model.config.C);
}

// The block's first half, residual to residual2. The last recomputation level runs it again.
static void attention_half(Model& model, const Block& b, int layer, int B, int T, int past,
                           bool training) {
    int N = B * T, C = model.config.C, NH = model.config.NH;
    block_layernorm(model, LN1W, b.ln1, b.residual, layer, N);
    linear_forward(linear_at(model, QKV, layer, N), b.qkv, b.ln1, nullptr, N, training);
    if (past == NO_CACHE) {
        float* lse = model.lse + int64_t(layer) * N * NH;
        attention_forward(b.atty, lse, b.qkv, model.scratch, B, T, C, NH);
    } else {
        float* cache = model.cache + 2 * int64_t(layer) * model.options.seq * C;
        attention_cached(b.atty, cache, b.qkv, past, T, C, NH);
    }
    linear_forward(linear_at(model, ATTPROJ, layer, N), b.residual2, b.atty, b.residual, N,
                   training);
}

// inputs (B, T) -> the head's input (B*T, C), left in `wide`. When training, fills the tape on the
// way. For text that is being generated (B = 1), `past` tokens came before. The cache has their
// keys and values, and gets those of these tokens.
static void model_forward(Model& model, int B, int T, int past, bool training) {
    int N = B * T, L = model.config.L, C = model.config.C;
    const float* wpe = model.params[WPE] + std::max(past, 0) * int64_t(C);
    embedding_forward(block_at(model, 0, N).residual, model.inputs, model.params[WTE], wpe, B, T,
                      C);
    for (int layer = 0; layer < L; layer++) {
        Block b = block_at(model, layer, N);
        if (training) tape_store(model, RESIDUAL, layer, b.residual, N);
        attention_half(model, b, layer, B, T, past, training);
        if (training) {
            tape_store(model, QKVR, layer, b.qkv, N);
            tape_store(model, ATTY, layer, b.atty, N);
            tape_store(model, RESIDUAL2, layer, b.residual2, N);
        }
        block_layernorm(model, LN2W, b.ln2, b.residual2, layer, N);
        linear_forward(linear_at(model, FC, layer, N), b.fch, b.ln2, nullptr, N, training);
        if (training && model.kept[FCH] == AS_2BIT)
            gelu_bits(fch_bits(model, layer, N), b.fch, int64_t(N) * 4 * C);
        gelu_forward(b.fch_gelu, b.fch, int64_t(N) * 4 * C);
        linear_forward(linear_at(model, FCPROJ, layer, N), block_at(model, layer + 1, N).residual,
                       b.fch_gelu, b.residual2, N, training);
    }
    layernorm_forward(model.wide, model.lnf_mean, model.lnf_rstd, model.now[RESIDUAL],
                      model.params[LNFW], model.params[LNFB], N, C);
}

// Logits (rows, V) of tokens first, first+1, ..., straight after a forward pass. Padded words have
// none.
static void model_logits(const Model& model, float* logits, int first, int rows) {
    const float* x = model.wide + int64_t(first) * model.config.C;
    matmul(logits, x, false, model.params[WTE], true, rows, model.config.V, model.config.C, 1.0f,
           0.0f);
}

// ---- the backward pass

// The losses of all N tokens, a chunk of tokens at a time. When training also their gradients: the
// head's input's into `spare`, and wte's, added to beta times what stands there. scale is
// 1 / (tokens of the optimizer step).
static void classifier(Model& model, int N, bool training, float scale, float beta) {
    int V = model.config.V, C = model.config.C;
    for (int first = 0; first < N; first += CHUNK) {
        int rows = std::min<int>(CHUNK, N - first);
        float *x = model.wide + int64_t(first) * C, *dx = model.spare + int64_t(first) * C;
        model_logits(model, model.logits, first, rows);
        cross_entropy(model.logits, model.losses + first, model.targets + first, rows, V, scale);
        if (!training) continue;
        matmul(dx, model.logits, false, model.params[WTE], false, rows, C, V, 1.0f, 0.0f);
        matmul(model.grads[WTE], model.logits, true, x, false, V, C, rows, 1.0f,
               first == 0 ? beta : 1.0f);
    }
}

// The losses of inputs against targets (B, T), and nothing else.
static void model_evaluate(Model& model, int B, int T) {
    model_forward(model, B, T, NO_CACHE, false);
    classifier(model, B * T, false, 0.0f, 0.0f);
}

// dresidual (N, C) += the gradient of LayerNorm 1 or 2's input x; dy (N, C) is in `spare`.
static void block_layernorm_backward(Model& model, int w, const float* x, int layer, int N) {
    int which = w == LN2W;
    int64_t first = int64_t(layer) * N;
    layernorm_backward(model.dresidual, param_at(model, model.grads, w, layer),
                       param_at(model, model.grads, w + 1, layer), model.spare, x,
                       model.ln_mean[which] + first, model.ln_rstd[which] + first,
                       param_at(model, model.params, w, layer), N, model.config.C, 1.0f);
}

// The backward pass of one block: dresidual holds the gradient of the stream out of it, and then of
// the stream into it. What the tape lacks comes back first. The gradient of each layer's input
// takes the place of that input, once it is read. In `wide` the gradients of qkv (3C) and of
// attention's output (C) lie side by side.
static void block_backward(Model& model, int layer, int B, int T, float beta) {
    int N = B * T, C = model.config.C, NH = model.config.NH;
    int64_t NC = int64_t(N) * C;
    Block b = block_at(model, layer, N);
    const int* kept = model.kept;
    tape_load(model, RESIDUAL, layer, b.residual, N);
    tape_load(model, ATTY, layer, b.atty, N);
    tape_load(model, RESIDUAL2, layer, b.residual2, N);
    if (kept[ATTY] == GONE) attention_half(model, b, layer, B, T, NO_CACHE, false);
    if (kept[FCH] == GONE) {
        block_layernorm(model, LN2W, b.ln2, b.residual2, layer, N);
        linear_forward(linear_at(model, FC, layer, N), b.fch, b.ln2, nullptr, N, false);
    }

    // residual2 + fcproj(gelu(fc(ln2)))
    float *dwide = model.wide, *dspare = model.spare;
    if (kept[FCH_GELU] == GONE) gelu_forward(b.fch_gelu, b.fch, 4 * NC);
    linear_backward(linear_at(model, FCPROJ, layer, N), dwide, model.dresidual, b.fch_gelu, N,
                    beta);
    if (kept[FCH] == AS_2BIT)
        gelu_backward_2bit(dwide, fch_bits(model, layer, N), 4 * NC);
    else
        gelu_backward(dwide, b.fch, 4 * NC);
    if (kept[LN2] == GONE) {
        b.ln2 = model.spare;
        block_layernorm(model, LN2W, b.ln2, b.residual2, layer, N);
    }
    linear_backward(linear_at(model, FC, layer, N), dspare, dwide, b.ln2, N, beta);
    block_layernorm_backward(model, LN2W, b.residual2, layer, N);

    // residual + attproj(attention(qkv(ln1)))
    float *dqkv = dwide, *datty = dwide + 3 * NC, *lse = model.lse + int64_t(layer) * N * NH;
    linear_backward(linear_at(model, ATTPROJ, layer, N), datty, model.dresidual, b.atty, N, beta);
    tape_load(model, QKVR, layer, b.qkv, N);
    if (kept[LN1] == GONE) {
        b.ln1 = model.spare + (spare_is_wide(model) ? 3 * NC : 0);  // behind qkv, if it is there
        block_layernorm(model, LN1W, b.ln1, b.residual, layer, N);
    }
    if (kept[QKVR] == GONE && !model.now[QKVR])
        linear_forward(linear_at(model, QKV, layer, N), b.qkv, b.ln1, nullptr, N, false);
    attention_backward(dqkv, datty, b.qkv, b.atty, lse, model.scratch, B, T, C, NH);
    linear_backward(linear_at(model, QKV, layer, N), dspare, dqkv, b.ln1, N, beta);
    block_layernorm_backward(model, LN1W, b.residual, layer, N);
}

#ifdef USE_MPI
#include <mpi.h>
#endif

// Sums the gradients over all processes. MPI counts in int.
static void exchange_gradients(Model& model) {
#ifdef USE_MPI
    const int64_t MOST = 1 << 30;
    for (int i = 0; i < PARAMS && processes.count > 1; i++) {
        int which = param_rows[i].linear;
        int64_t count = param_count(model.config, i, which < 0 ? 0 : model.linear[which].r);
        for (int64_t at = 0; at < count; at += MOST)
            MPI_Allreduce(MPI_IN_PLACE, model.grads[i] + at, int(std::min(MOST, count - at)),
                          MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    }
#else
    (void)model;
#endif
}

// Forward and backward pass of one micro batch: its losses, and its gradients times scale, added to
// those of the step's earlier micro batches unless this is the first. After the last one they are
// summed over processes. The gradient of the residual stream flows down in dresidual.
static void model_accumulate(Model& model, int B, int T, bool first, float scale,
                             bool last = false) {
    int N = B * T, C = model.config.C;
    float beta = first ? 0.0f : 1.0f;
    for (int i = 0; first && i < PARAMS; i++) {
        // What matrix products write is spared: they start with beta = 0.
        if (i == WTE || param_rows[i].linear >= 0) continue;
        std::fill(model.grads[i], model.grads[i] + param_count(model.config, i), 0.0f);
    }
    model_forward(model, B, T, NO_CACHE, true);
    classifier(model, N, true, scale, beta);
    layernorm_backward(model.dresidual, model.grads[LNFW], model.grads[LNFB], model.spare,
                       model.now[RESIDUAL], model.lnf_mean, model.lnf_rstd, model.params[LNFW], N,
                       C, 0.0f);
    for (int layer = model.config.L - 1; layer >= 0; layer--)
        block_backward(model, layer, B, T, beta);
    embedding_backward(model.grads[WTE], model.grads[WPE], model.dresidual, model.inputs, B, T, C);
    if (last) exchange_gradients(model);
}

static void model_wait() {}  // a GPU would still be at work

// ---- the update

// Before optimizer step `step` (from 0): the projections' epoch advances every --gap steps, for all
// layers together. The moments stay as they are (CompAct), or start again from zero, or the first
// of them moves into the new space.
static void model_begin_step(Model& model, int64_t step) {
    const Options& options = model.options;
    model.epoch = options.gap > 0 ? step / options.gap : 0;
    if (options.gap == 0 || step == 0 || step % options.gap != 0) return;
    for (int i = 0; i < model.config.L * LINEARS; i++) {
        int layer = i / LINEARS, which = i % LINEARS;
        LinearLayer old = linear_at(model, which, layer, 0, model.epoch - 1);
        LinearLayer next = linear_at(model, which, layer, 0);
        int64_t count = int64_t(old.shape.m) * old.shape.r;
        if (!old.shape.compressed()) continue;
        if (options.moments == RESET) {
            std::fill(old.moment1, old.moment1 + count, 0.0f);
            if (old.moment2) std::fill(old.moment2, old.moment2 + count, 0.0f);
        } else if (options.moments == MOVE) {
            next.p = model.p_next;
            next.shift = model.shift_next;
            move_moment(old, next, model.p_change);
        }
    }
}

// Global norm of all gradients, the compressed ones as they are: E||G||^2 = ||dW||^2, since
// E[P P^T] = I. Partial sums have a fixed extent: the norm is the same for any number of threads.
static double gradient_norm(const Plan& plan) {
    const int64_t PIECE = 1 << 16;
    double total = 0;
    for (const Tensor& t : plan.tensors) {
        if (t.category != "gradients") continue;
        const float* g = *(float**)t.home;
        int64_t count = t.count(), pieces = (count + PIECE - 1) / PIECE;
        std::vector<double> sums(pieces);
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < pieces; i++) {
            float sum = 0;
            int64_t last = std::min(count, (i + 1) * PIECE);
#pragma omp simd reduction(+ : sum)
            for (int64_t j = i * PIECE; j < last; j++) sum += g[j] * g[j];
            sums[i] = sum;
        }
        for (double sum : sums) total += sum;
    }
    return sqrt(total);
}

// What AdamW needs for its step t (from 1).
static Adam adam_of(const Options& options, double lr, float grad_scale, int64_t t) {
    Adam a = {};
    a.lr = float(lr);
    a.beta1 = float(options.beta1);
    a.beta2 = float(options.beta2);
    a.eps = float(options.eps);
    a.grad_scale = grad_scale;
    a.correct1 = float(1 / (1 - pow(options.beta1, t)));
    a.correct2 = float(1 / (1 - pow(options.beta2, t)));
    return a;
}

// One optimizer step from the accumulated gradients, which it uses up. Returns their norm, before
// clipping. Matrices decay, vectors do not.
static double model_update(Model& model, const Plan& plan, int64_t step, double lr) {
    const Options& options = model.options;
    float decay = float(options.weight_decay), alpha = float(options.alpha);
    double norm = gradient_norm(plan);
    float scale = options.clip > 0 && norm > options.clip ? float(options.clip / norm) : 1.0f;
    Adam exact = adam_of(options, lr, scale, step + 1), compressed = exact;
    if (options.moments == RESET && options.gap > 0)  // these moments are younger
        compressed = adam_of(options, lr, scale, step % options.gap + 1);
    compressed.decay = decay;
    for (int i = 0; i < PARAMS; i++) {
        int which = param_rows[i].linear;
        int64_t count = param_count(model.config, i);
        float* w = model.params[i];
        exact.decay = param_rows[i].columns > 0 ? decay : 0.0f;
        for (int layer = 0; which >= 0 && layer < model.config.L; layer++) {
            LinearLayer linear = linear_at(model, which, layer, 0);
            linear_update(linear, options.optimizer, blocks_of(which),
                          linear.shape.compressed() ? compressed : exact, alpha, model.wide);
        }
        if (which < 0) adam_update(w, model.grads[i], model.m[i], model.v[i], count, exact);
        if (options.master == MASTER_NONE)
            round_stochastically(w, count, options.seed, stream_of(STREAM_ROUND, i, step));
    }
    return norm;
}

// ---- what the host asks of a model. On a GPU there is more to each of these.

static void model_get(void* host, const void* from, size_t bytes) { memcpy(host, from, bytes); }
static void model_set(void* to, const void* host, size_t bytes) { memcpy(to, host, bytes); }

// Rounds freshly read weights to the type in which they are kept.
static void model_round(Model& model) {
    for (int i = 0; model.options.master == MASTER_NONE && i < PARAMS; i++) {
        float* w = model.params[i];
        for (int64_t j = 0; j < param_count(model.config, i); j++)
            w[j] = float_of_bf16(bf16_of_float(w[j]));
    }
}

// Seconds since the last call: of the device's own time where it has a clock.
static double model_clock() {
    static double before = seconds();
    double now = seconds(), elapsed = now - before;
    before = now;
    return elapsed;
}

// P (n, r) of a layer in the present epoch, written out in full, for --dump.
static std::vector<float> model_projection(Model& model, int which, int layer) {
    LinearLayer linear = linear_at(model, which, layer, 0);
    int n = linear.shape.n, r = linear.shape.r;
    std::vector<float> out(int64_t(n) * r, 0.0f);
    const float* p = projection_now(linear);
    if (linear.projection != SPARSE) std::copy(p, p + out.size(), out.begin());
    for (int k = 0; linear.projection == SPARSE && k < n; k++)
        out[int64_t(k) * r + (k + linear.shift[k / r]) % r] = p[k];
    return out;
}

// What was found on the machine, in a line.
static std::string model_device() {
    std::string name = "CPU";
    std::ifstream info("/proc/cpuinfo");
    for (std::string line; std::getline(info, line);) {
        if (line.compare(0, 10, "model name") != 0 || line.find(": ") == std::string::npos)
            continue;
        name = line.substr(line.find(": ") + 2);
        break;
    }
#if defined(USE_OPENBLAS)
    const char* blas = "OpenBLAS";
#elif defined(USE_ACCELERATE)
    const char* blas = "Accelerate";
#else
    const char* blas = "no BLAS";
#endif
    return join(name, ", ", omp_get_max_threads(), " threads, ", blas, ", vectors of ", int(LANES),
                " floats");
}

// The FLOPs a second that --plan's are measured against; 0 where they are unknown.
static double model_peak_flops() { return 0; }
static const char* model_attention(const Config&) { return "plain"; }

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
