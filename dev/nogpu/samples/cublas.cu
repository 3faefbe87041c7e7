// cuBLAS's products against plain loops: transposes, leading dimensions, strides, types, alpha and
// beta, and what the calls refuse.
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cstring>
#include "check.h"

static float as_float(float x) { return x; }
static float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
static void set(float& x, float v) { x = v; }
static void set(__nv_bfloat16& x, float v) { x = __float2bfloat16(v); }
static cudaDataType type_of(float) { return CUDA_R_32F; }
static cudaDataType type_of(__nv_bfloat16) { return CUDA_R_16BF; }

// A stored matrix of rows x columns in a buffer of ld * columns, and `count` of them `stride`
// apart. Between columns and between matrices stands 1e30: a product that reads it is far off.
template <class T>
struct Stored {
    std::vector<T> data;
    int ld;
    long long stride;
};
template <class T>
Stored<T> make(Numbers& numbers, int rows, int columns, int extra, int count) {
    Stored<T> s;
    s.ld = rows + extra;
    s.stride = (long long)s.ld * columns + 3 * extra;
    s.data.resize(s.stride * count);
    for (T& x : s.data) set(x, 1e30f);
    for (int i = 0; i < count; i++)
        for (int c = 0; c < columns; c++)
            for (int r = 0; r < rows; r++)
                set(s.data[i * s.stride + (long long)c * s.ld + r], numbers.uniform());
    return s;
}

// As the trainer calls it: D = alpha op(A) op(B) + beta C + bias for `count` matrices, all pointers
// on `alignment` bytes. No bias: null.
template <class AB, class C>
static cublasStatus_t by_lt(cublasHandle_t cublas, int ta, int tb, int m, int n, int k, float alpha,
                            const AB* a, const Stored<AB>& like_a, const AB* b,
                            const Stored<AB>& like_b, float beta, const C* c, C* d,
                            const Stored<C>& like_c, int count, const void* bias,
                            uint32_t alignment) {
    auto handle = (cublasLtHandle_t)cublas;
    uint32_t epilogue = bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t of_a, of_b, of_c;
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t chosen;
    int found = 0;
    cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof(ta));
    cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof(tb));
    cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                   sizeof(epilogue));
    cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias,
                                   sizeof(bias));
    auto lay_out = [&](cublasLtMatrixLayout_t of, cudaDataType type, int rows, int columns, int ld,
                       int64_t stride) {
        cublasLtMatrixLayoutInit(of, type, rows, columns, ld);
        cublasLtMatrixLayoutSetAttribute(of, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                         sizeof(count));
        cublasLtMatrixLayoutSetAttribute(of, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                                         sizeof(stride));
    };
    lay_out(&of_a, type_of(AB()), ta ? k : m, ta ? m : k, like_a.ld, like_a.stride);
    lay_out(&of_b, type_of(AB()), tb ? n : k, tb ? k : n, like_b.ld, like_b.stride);
    lay_out(&of_c, type_of(C()), m, n, like_c.ld, like_c.stride);
    cublasLtMatmulPreferenceInit(&preference);
    for (auto of :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        cublasLtMatmulPreferenceSetAttribute(&preference, of, &alignment, sizeof(alignment));
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle, &product, &of_a, &of_b, &of_c,
                                                           &of_c, &preference, 1, &chosen, &found);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    CHECK(found == 1);
    return cublasLtMatmul(handle, &product, &alpha, a, &of_a, b, &of_b, &beta, c, &of_c, d, &of_c,
                          &chosen.algo, nullptr, 0, nullptr);
}

enum Call { SGEMM, GEMM_EX, STRIDED_BATCHED, BIASED, TO_ANOTHER };

template <class AB, class C>
static void test(cublasHandle_t handle, Call call, bool ta, bool tb, int m, int n, int k,
                 float alpha, float beta, int extra) {
    Numbers numbers;
    numbers.state = m * 10007 + n * 101 + k;
    int count = call == STRIDED_BATCHED || call == TO_ANOTHER ? 3 : 1;
    auto a = make<AB>(numbers, ta ? k : m, ta ? m : k, extra, count);
    auto b = make<AB>(numbers, tb ? n : k, tb ? k : n, extra, count);
    auto c = make<C>(numbers, m, n, extra, count);
    if (beta == 0.0f)
        for (C& x : c.data) set(x, NAN);  // must not be read
    Stored<C> d = c;                      // what is written to, with C's numbers or others
    for (C& x : d.data)
        if (call == TO_ANOTHER) set(x, 7.0f);
    std::vector<C> bias(m);
    for (C& x : bias) set(x, call == BIASED ? numbers.uniform() : 0.0f);
    C* dbias = to_device(bias);
    AB *da = to_device(a.data), *db = to_device(b.data);
    C *dc = to_device(c.data), *dd = call == TO_ANOTHER ? to_device(d.data) : dc;
    cublasOperation_t opa = ta ? CUBLAS_OP_T : CUBLAS_OP_N, opb = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    cudaDataType ab_type = type_of(AB()), c_type = type_of(C());
    cublasStatus_t status;
    if (call == SGEMM)
        status = cublasSgemm(handle, opa, opb, m, n, k, &alpha, (const float*)da, a.ld,
                             (const float*)db, b.ld, &beta, (float*)dc, c.ld);
    else if (call == GEMM_EX)
        status =
            cublasGemmEx(handle, opa, opb, m, n, k, &alpha, da, ab_type, a.ld, db, ab_type, b.ld,
                         &beta, dc, c_type, c.ld, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    else if (call == BIASED)
        status = by_lt(handle, ta, tb, m, n, k, alpha, da, a, db, b, beta, dc, dc, c, 1, dbias, 16);
    else if (call == TO_ANOTHER)
        status = by_lt(handle, ta, tb, m, n, k, alpha, da, a, db, b, beta, dc, dd, c, count,
                       nullptr, sizeof(C));
    else
        status = cublasGemmStridedBatchedEx(handle, opa, opb, m, n, k, &alpha, da, ab_type, a.ld,
                                            a.stride, db, ab_type, b.ld, b.stride, &beta, dc,
                                            c_type, c.ld, c.stride, count, CUBLAS_COMPUTE_32F,
                                            CUBLAS_GEMM_DEFAULT);
    CHECK(status == CUBLAS_STATUS_SUCCESS);
    auto got = to_host(dd, c.data.size());
    int wrong = 0;
    std::vector<bool> part(c.data.size(), false);
    for (int i = 0; i < count; i++)
        for (int col = 0; col < n; col++)
            for (int row = 0; row < m; row++) {
                double sum = 0.0, size = 0.0;
                for (int q = 0; q < k; q++) {
                    double x = as_float(a.data[i * a.stride + (ta ? (long long)row * a.ld + q
                                                                  : (long long)q * a.ld + row)]);
                    double y = as_float(b.data[i * b.stride + (tb ? (long long)q * b.ld + col
                                                                  : (long long)col * b.ld + q)]);
                    sum += x * y;
                    size += fabs(x * y);
                }
                size_t at = i * c.stride + (long long)col * c.ld + row;
                part[at] = true;
                double want = alpha * sum, before = as_float(c.data[at]);
                if (beta != 0.0f) want += beta * before;
                want += as_float(bias[row]);
                // k + 3 roundings in fp32 of at most `size`, then one to C's type
                double bound = (k + 4) * 6e-8 *
                                   (fabs(alpha) * size + fabs(beta == 0.0f ? 0.0 : beta * before) +
                                    fabs(as_float(bias[row]))) +
                               1e-30;
                if (c_type == CUDA_R_16BF) bound += fabs(want) / 256;
                wrong += !(fabs(as_float(got[at]) - want) <= bound);
            }
    for (size_t i = 0; i < got.size(); i++)  // what is not C stays as it was, bit for bit
        if (!part[i]) wrong += memcmp(&got[i], &d.data[i], sizeof(C)) != 0;
    if (wrong)
        printf(
            "call %d, types %d %d, transposed %d %d, m %d n %d k %d, alpha %g, beta %g, extra %d: "
            "%d wrong\n",
            call, ab_type, c_type, ta, tb, m, n, k, alpha, beta, extra, wrong);
    failures += wrong;
    CUDA(cudaFree(da));
    CUDA(cudaFree(db));
    CUDA(cudaFree(dc));
    if (dd != dc) CUDA(cudaFree(dd));
    CUDA(cudaFree(dbias));
}

static void test_refusals(cublasHandle_t h) {
    float one = 1.0f, zero = 0.0f;
    std::vector<float> ones(100, 1.0f);
    float* d = to_device(ones);
    auto sgemm = [&](cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, int lda,
                     int ldb, int ldc) {
        return cublasSgemm(h, ta, tb, m, n, k, &one, d, lda, d, ldb, &zero, d + 50, ldc);
    };
    CHECK(sgemm(CUBLAS_OP_N, CUBLAS_OP_N, 4, 3, 5, 4, 5, 4) == CUBLAS_STATUS_SUCCESS);
    // lda < m
    CHECK(sgemm(CUBLAS_OP_N, CUBLAS_OP_N, 4, 3, 5, 3, 5, 4) == CUBLAS_STATUS_INVALID_VALUE);
    // lda < k
    CHECK(sgemm(CUBLAS_OP_T, CUBLAS_OP_N, 4, 3, 5, 4, 5, 4) == CUBLAS_STATUS_INVALID_VALUE);
    // ldb < k
    CHECK(sgemm(CUBLAS_OP_N, CUBLAS_OP_N, 4, 3, 5, 4, 4, 4) == CUBLAS_STATUS_INVALID_VALUE);
    // ldb < n
    CHECK(sgemm(CUBLAS_OP_N, CUBLAS_OP_T, 4, 3, 5, 4, 2, 4) == CUBLAS_STATUS_INVALID_VALUE);
    // ldc < m
    CHECK(sgemm(CUBLAS_OP_N, CUBLAS_OP_N, 4, 3, 5, 4, 5, 3) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(sgemm(CUBLAS_OP_N, CUBLAS_OP_N, -1, 3, 5, 4, 5, 4) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(sgemm(CUBLAS_OP_N, CUBLAS_OP_N, 0, 3, 5, 1, 5, 1) == CUBLAS_STATUS_SUCCESS);
    CHECK(cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, 2, &one, d, CUDA_R_16BF, 2, d, CUDA_R_32F,
                       2, &zero, d + 50, CUDA_R_32F, 2, CUBLAS_COMPUTE_32F,
                       CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, 2, &one, d, CUDA_R_32F, 2, d, CUDA_R_32F,
                       2, &zero, d + 50, CUDA_R_16BF, 2, CUBLAS_COMPUTE_32F,
                       CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_NOT_SUPPORTED);
    auto aligned = [&](const float* a, const void* bias, int count, int apart) {
        Stored<float> like = {{}, 4, apart};
        return by_lt(h, 0, 0, 4, 3, 4, 1.0f, a, like, d, like, 0.0f, d + 60, d + 60, like, count,
                     bias, 16);
    };
    CHECK(aligned(d, d + 1, 1, 0) == CUBLAS_STATUS_SUCCESS);
    CHECK(aligned(d, nullptr, 2, 16) == CUBLAS_STATUS_SUCCESS);
    // the choice was told 16 bytes
    CHECK(aligned(d + 1, d + 1, 1, 0) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(aligned(d, nullptr, 2, 17) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(aligned(d, d + 1, 2, 16) == CUBLAS_STATUS_NOT_SUPPORTED);  // a bias for a batch
    CHECK(cublasSgemm(nullptr, CUBLAS_OP_N, CUBLAS_OP_N, 1, 1, 1, &one, d, 1, d, 1, &zero, d, 1) ==
          CUBLAS_STATUS_NOT_INITIALIZED);
    CUDA(cudaFree(d));
}

int main() {
    cublasHandle_t handle;
    if (cublasCreate(&handle) != CUBLAS_STATUS_SUCCESS) return 1;
    cudaStream_t stream;
    CUDA(cudaStreamCreate(&stream));
    CHECK(cublasSetStream(handle, stream) == CUBLAS_STATUS_SUCCESS);
    CHECK(cublasSetMathMode(handle, CUBLAS_DEFAULT_MATH) == CUBLAS_STATUS_SUCCESS);
    void* workspace = device_array<char>(1 << 20);
    CHECK(cublasSetWorkspace(handle, workspace, 1 << 20) == CUBLAS_STATUS_SUCCESS);

    const int shapes[][3] = {{1, 1, 1},     {16, 6, 8},     {17, 7, 3},   {5, 40, 33},
                             {64, 50, 300}, {200, 195, 20}, {33, 1, 257}, {8, 8, 0}};
    const float factors[][2] = {{1.0f, 0.0f}, {-0.5f, 1.0f}, {1.5f, 0.25f}, {0.0f, 2.0f}};
    for (auto& s : shapes)
        for (int transposes = 0; transposes < 4; transposes++)
            for (auto& f : factors)
                for (int extra : {0, 5}) {
                    bool ta = transposes & 1, tb = transposes & 2;
                    // k = 0: C = beta C, once
                    if (s[2] == 0 && (f[0] != 1.0f || extra)) continue;
                    // leading dimensions must still be 1
                    if (s[2] == 0) extra = 1;
                    test<float, float>(handle, SGEMM, ta, tb, s[0], s[1], s[2], f[0], f[1], extra);
                    test<__nv_bfloat16, float>(handle, GEMM_EX, ta, tb, s[0], s[1], s[2], f[0],
                                               f[1], extra);
                    test<__nv_bfloat16, __nv_bfloat16>(handle, GEMM_EX, ta, tb, s[0], s[1], s[2],
                                                       f[0], f[1], extra);
                    if (s[2])
                        test<float, float>(handle, BIASED, ta, tb, s[0], s[1], s[2], f[0], f[1],
                                           extra);
                    if (s[2])
                        test<__nv_bfloat16, __nv_bfloat16>(handle, BIASED, ta, tb, s[0], s[1], s[2],
                                                           f[0], f[1], extra);
                    if (s[0] < 100)
                        test<__nv_bfloat16, __nv_bfloat16>(handle, STRIDED_BATCHED, ta, tb, s[0],
                                                           s[1], s[2], f[0], f[1], extra);
                    if (s[0] < 100 && s[2])
                        test<__nv_bfloat16, __nv_bfloat16>(handle, TO_ANOTHER, ta, tb, s[0], s[1],
                                                           s[2], f[0], f[1], extra);
                    if (s[0] < 20)
                        test<float, float>(handle, STRIDED_BATCHED, ta, tb, s[0], s[1], s[2], f[0],
                                           f[1], extra);
                }
    test_refusals(handle);
    CHECK(cublasDestroy(handle) == CUBLAS_STATUS_SUCCESS);
    CUDA(cudaStreamDestroy(stream));
    CUDA(cudaFree(workspace));
    printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
    return failures != 0;
}
