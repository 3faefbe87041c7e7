// cuBLAS's matrix products on a CPU, with its rules: column-major, C = alpha op(A) op(B) + beta
// C, beta = 0 does not read C. Each element is one sum in fp32 over k in ascending order, a
// product and an addition at a time, scaled in fp32 and rounded once when it is stored. Included
// by cublas_v2.h.
#pragma once

struct cublasContext {
    cudaStream_t stream;
};

namespace nogpu {

// 16 floats: however many registers that is on this processor
typedef float Vector __attribute__((vector_size(64), aligned(4)));
const int TILE_M = 16, TILE_N = 6;  // of C, held in registers
// packed copies that stay in the second-level cache
const int BLOCK_M = 192, BLOCK_N = 192, BLOCK_K = 256;

struct Matrix {
    const void* data;
    cudaDataType type;
    int ld;
    bool transposed;
};
struct Product {
    int m, n, k;
    float alpha, beta;
    Matrix a, b;
    void* c;
    const void* from;  // what beta multiplies: c itself, but for cublasLt
    cudaDataType c_type;
    int ldc;
    const void* bias;  // of C's type, one for each of its rows; or null
};

NOGPU_RAW inline float load(const void* p, cudaDataType type, size_t i) {
    if (type == CUDA_R_32F) return ((const float*)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t*)p)[i] << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
NOGPU_RAW inline void store(void* p, cudaDataType type, size_t i, float v) {
    if (type == CUDA_R_32F) {
        ((float*)p)[i] = v;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &v, 4);
    // to the nearest, ties to even; a NaN stays one
    ((uint16_t*)p)[i] = v != v ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Copies rows x columns of op(matrix), from (row, column) on, into strips of `width` rows each,
// zeros below the last row: to[column][width]. Rows run along m for A and along n for B,
// columns along k.
template <cudaDataType type>
NOGPU_RAW void pack(float* to, const Matrix& x, bool row_is_contiguous, int row, int rows,
                    int column, int columns, int width) {
    for (int r0 = 0; r0 < rows; r0 += width, to += (size_t)width * columns) {
        int n = rows - r0 < width ? rows - r0 : width;
        if (row_is_contiguous) {
            for (int c = 0; c < columns; c++) {
                size_t at = (size_t)(column + c) * x.ld + row + r0;
                for (int r = 0; r < n; r++) to[c * width + r] = load(x.data, type, at + r);
                for (int r = n; r < width; r++) to[c * width + r] = 0.0f;
            }
        } else {
            for (int r = 0; r < width; r++) {
                size_t at = (size_t)(row + r0 + (r < n ? r : 0)) * x.ld + column;
                for (int c = 0; c < columns; c++)
                    to[c * width + r] = r < n ? load(x.data, type, at + c) : 0.0f;
            }
        }
    }
}
NOGPU_RAW inline void pack(float* to, const Matrix& x, bool row_is_contiguous, int row, int rows,
                           int column, int columns, int width) {
    if (x.type == CUDA_R_32F)
        pack<CUDA_R_32F>(to, x, row_is_contiguous, row, rows, column, columns, width);
    else
        pack<CUDA_R_16BF>(to, x, row_is_contiguous, row, rows, column, columns, width);
}

// sum[j] += a[k] b[k][j] for k = 0 .. columns - 1; sum holds TILE_N columns of TILE_M
static inline __attribute__((always_inline)) NOGPU_RAW void tile(float* sum, const float* a,
                                                                 const float* b, int columns) {
    Vector s[TILE_N];
    for (int j = 0; j < TILE_N; j++) s[j] = *(const Vector*)(sum + j * TILE_M);
    for (int k = 0; k < columns; k++) {
        Vector v = *(const Vector*)(a + k * TILE_M);
        for (int j = 0; j < TILE_N; j++) s[j] += v * b[k * TILE_N + j];
    }
    for (int j = 0; j < TILE_N; j++) *(Vector*)(sum + j * TILE_M) = s[j];
}
// The same for wider registers. No fused multiply-add (fp-contract is off): every processor gives
// the same bits.
__attribute__((optimize("O3", "fp-contract=off"))) NOGPU_RAW inline void tile_any(float* s,
                                                                                  const float* a,
                                                                                  const float* b,
                                                                                  int n) {
    tile(s, a, b, n);
}
#ifdef __x86_64__
__attribute__((target("avx2"), optimize("O3", "fp-contract=off"))) NOGPU_RAW inline void tile_avx2(
    float* s, const float* a, const float* b, int n) {
    tile(s, a, b, n);
}
__attribute__((target("avx512f"), optimize("O3", "fp-contract=off"))) NOGPU_RAW inline void
tile_avx512(float* s, const float* a, const float* b, int n) {
    tile(s, a, b, n);
}
#endif
typedef void (*TileFunction)(float*, const float*, const float*, int);
inline TileFunction choose_tile() {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) return tile_avx512;
    if (__builtin_cpu_supports("avx2")) return tile_avx2;
#endif
    return tile_any;
}

// The block of C at (i0, j0). buffer holds the block's sums and the packed pieces of A and B.
NOGPU_RAW inline void product_block(const Product& p, int i0, int j0, float* buffer,
                                    TileFunction tile_function) {
    int m = p.m - i0 < BLOCK_M ? p.m - i0 : BLOCK_M, n = p.n - j0 < BLOCK_N ? p.n - j0 : BLOCK_N;
    float *sums = buffer, *a = sums + BLOCK_M * BLOCK_N, *b = a + BLOCK_M * BLOCK_K;
    memset(sums, 0, sizeof(float) * BLOCK_M * BLOCK_N);
    for (int k0 = 0; k0 < p.k && p.alpha != 0.0f; k0 += BLOCK_K) {
        int k = p.k - k0 < BLOCK_K ? p.k - k0 : BLOCK_K;
        pack(a, p.a, !p.a.transposed, i0, m, k0, k, TILE_M);
        pack(b, p.b, p.b.transposed, j0, n, k0, k, TILE_N);
        for (int j = 0; j < n; j += TILE_N)
            for (int i = 0; i < m; i += TILE_M)
                tile_function(
                    sums + (j / TILE_N * (BLOCK_M / TILE_M) + i / TILE_M) * TILE_M * TILE_N,
                    a + (size_t)i * k, b + (size_t)j * k, k);
    }
    for (int j = 0; j < n; j++)
        for (int i = 0; i < m; i++) {
            size_t at = (size_t)(j0 + j) * p.ldc + i0 + i;
            float v =
                p.alpha * sums[(j / TILE_N * (BLOCK_M / TILE_M) + i / TILE_M) * TILE_M * TILE_N +
                               j % TILE_N * TILE_M + i % TILE_M];
            if (p.beta != 0.0f) v += p.beta * load(p.from, p.c_type, at);
            if (p.bias) v += load(p.bias, p.c_type, i0 + i);
            store(p.c, p.c_type, at, v);
        }
}

// Every column that a product touches must lie in one device allocation.
inline void check_matrix(const char* call, const char* name, const void* data, cudaDataType type,
                         int rows, int columns, int ld) {
    if (!rows || !columns) return;
    size_t element = type == CUDA_R_32F ? 4 : 2,
           bytes = ((size_t)(columns - 1) * ld + rows) * element;
    host_call = call;
    if ((size_t)data % element) fail("%s: matrix %s is not aligned to its elements", call, name);
    if (!device_span(data, bytes)) {
        describe(data);
        fail(
            "%s: matrix %s, %d x %d with leading dimension %d, %zu bytes at %p, is not within one "
            "device allocation",
            call, name, rows, columns, ld, bytes, data);
    }
#if NOGPU_ASAN  // a program may have poisoned parts of its own arena
    for (int j = 0; j < columns; j++)
        if (void* bad =
                __asan_region_is_poisoned((char*)data + (size_t)j * ld * element, rows * element)) {
            describe(bad);
            fail(
                "%s: column %d of matrix %s, %d x %d with leading dimension %d, touches poisoned "
                "memory at %p",
                call, j, name, rows, columns, ld, bad);
        }
#endif
    host_call = nullptr;
}

inline cublasStatus_t products(const char* call, cublasHandle_t handle, cublasOperation_t ta,
                               cublasOperation_t tb, int m, int n, int k, const void* alpha,
                               const void* a, cudaDataType a_type, int lda, long long stride_a,
                               const void* b, cudaDataType b_type, int ldb, long long stride_b,
                               const void* beta, void* c, cudaDataType c_type, int ldc,
                               long long stride_c, int count, const void* bias = nullptr,
                               const void* from = nullptr) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (ta < CUBLAS_OP_N || ta > CUBLAS_OP_C || tb < CUBLAS_OP_N || tb > CUBLAS_OP_C)
        return CUBLAS_STATUS_INVALID_VALUE;
    auto at_least = [](int x) { return x > 1 ? x : 1; };
    if (m < 0 || n < 0 || k < 0 || count < 0 || !alpha || !beta ||
        lda < at_least(ta == CUBLAS_OP_N ? m : k) || ldb < at_least(tb == CUBLAS_OP_N ? k : n) ||
        ldc < at_least(m))
        return CUBLAS_STATUS_INVALID_VALUE;
    bool types = a_type == b_type &&
                 ((a_type == CUDA_R_32F && c_type == CUDA_R_32F) ||
                  (a_type == CUDA_R_16BF && (c_type == CUDA_R_32F || c_type == CUDA_R_16BF)));
    if (!types) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (!m || !n || !count) return CUBLAS_STATUS_SUCCESS;
    note_launch("product", m, n, k, count);
    float factor_a, factor_c;
    memcpy(&factor_a, alpha, 4);
    memcpy(&factor_c, beta, 4);
    size_t element = a_type == CUDA_R_32F ? 4 : 2, element_c = c_type == CUDA_R_32F ? 4 : 2;
    open_device();
    std::vector<Product> list(count);
    for (int i = 0; i < count; i++) {
        Product& p = list[i];
        p = {m,
             n,
             k,
             factor_a,
             factor_c,
             {(const char*)a + i * stride_a * (long long)element, a_type, lda, ta != CUBLAS_OP_N},
             {(const char*)b + i * stride_b * (long long)element, b_type, ldb, tb != CUBLAS_OP_N},
             (char*)c + i * stride_c * (long long)element_c,
             (const char*)(from ? from : c) + i * stride_c * (long long)element_c,
             c_type,
             ldc,
             bias};
        if (factor_a != 0.0f && k) {
            check_matrix(call, "A", p.a.data, a_type, ta == CUBLAS_OP_N ? m : k,
                         ta == CUBLAS_OP_N ? k : m, lda);
            check_matrix(call, "B", p.b.data, b_type, tb == CUBLAS_OP_N ? k : n,
                         tb == CUBLAS_OP_N ? n : k, ldb);
        }
        check_matrix(call, from ? "D" : "C", p.c, c_type, m, n, ldc);
        if (factor_c != 0.0f) check_matrix(call, "C", p.from, c_type, m, n, ldc);
        if (bias) check_matrix(call, "bias", bias, c_type, m, 1, m);
    }
    TileFunction tile_function = choose_tile();
    int rows = (m + BLOCK_M - 1) / BLOCK_M, columns = (n + BLOCK_N - 1) / BLOCK_N;
    long long blocks = (long long)rows * columns * count;
#ifdef _OPENMP
#pragma omp parallel if (blocks > 1 && 2.0 * m * n * k * count > 2e8)
#endif
    {
        static thread_local std::vector<float> buffer(BLOCK_M * BLOCK_N +
                                                      (BLOCK_M + BLOCK_N) * BLOCK_K);
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
        for (long long i = 0; i < blocks; i++)
            product_block(list[i / (rows * columns)], (int)(i % rows) * BLOCK_M,
                          (int)(i / rows % columns) * BLOCK_N, buffer.data(), tile_function);
    }
    close_device();
    return CUBLAS_STATUS_SUCCESS;
}
// TF32 is not rounded here: a test has to allow for it
inline bool computes_in_fp32(cublasComputeType_t t) {
    return t == CUBLAS_COMPUTE_32F || t == CUBLAS_COMPUTE_32F_PEDANTIC ||
           t == CUBLAS_COMPUTE_32F_FAST_TF32;
}

}  // namespace nogpu

extern "C" {

cublasStatus_t cublasCreate(cublasHandle_t* h) {
    *h = new cublasContext();
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy(cublasHandle_t h) {
    delete h;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream(cublasHandle_t h, cudaStream_t s) {
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    h->stream = s;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetMathMode(cublasHandle_t h, cublasMath_t) {
    return h ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_INITIALIZED;
}
cublasStatus_t cublasSetWorkspace(cublasHandle_t h, void* p, size_t n) {
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    return !n || (nogpu::device_span(p, n) && (size_t)p % 256 == 0) ? CUBLAS_STATUS_SUCCESS
                                                                    : CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasSgemm(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m,
                           int n, int k, const float* alpha, const float* a, int lda,
                           const float* b, int ldb, const float* beta, float* c, int ldc) {
    return nogpu::products("cublasSgemm", h, ta, tb, m, n, k, alpha, a, CUDA_R_32F, lda, 0, b,
                           CUDA_R_32F, ldb, 0, beta, c, CUDA_R_32F, ldc, 0, 1);
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t h, cublasOperation_t ta,
                                         cublasOperation_t tb, int m, int n, int k,
                                         const float* alpha, const float* a, int lda,
                                         long long stride_a, const float* b, int ldb,
                                         long long stride_b, const float* beta, float* c, int ldc,
                                         long long stride_c, int count) {
    return nogpu::products("cublasSgemmStridedBatched", h, ta, tb, m, n, k, alpha, a, CUDA_R_32F,
                           lda, stride_a, b, CUDA_R_32F, ldb, stride_b, beta, c, CUDA_R_32F, ldc,
                           stride_c, count);
}
cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m,
                            int n, int k, const void* alpha, const void* a, cudaDataType a_type,
                            int lda, const void* b, cudaDataType b_type, int ldb, const void* beta,
                            void* c, cudaDataType c_type, int ldc, cublasComputeType_t compute,
                            cublasGemmAlgo_t) {
    if (h && !nogpu::computes_in_fp32(compute)) return CUBLAS_STATUS_NOT_SUPPORTED;
    return nogpu::products("cublasGemmEx", h, ta, tb, m, n, k, alpha, a, a_type, lda, 0, b, b_type,
                           ldb, 0, beta, c, c_type, ldc, 0, 1);
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta,
                                          cublasOperation_t tb, int m, int n, int k,
                                          const void* alpha, const void* a, cudaDataType a_type,
                                          int lda, long long stride_a, const void* b,
                                          cudaDataType b_type, int ldb, long long stride_b,
                                          const void* beta, void* c, cudaDataType c_type, int ldc,
                                          long long stride_c, int count,
                                          cublasComputeType_t compute, cublasGemmAlgo_t) {
    if (h && !nogpu::computes_in_fp32(compute)) return CUBLAS_STATUS_NOT_SUPPORTED;
    return nogpu::products("cublasGemmStridedBatchedEx", h, ta, tb, m, n, k, alpha, a, a_type, lda,
                           stride_a, b, b_type, ldb, stride_b, beta, c, c_type, ldc, stride_c,
                           count);
}
const char* cublasGetStatusName(cublasStatus_t s) {
    switch (s) {
        case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
        case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
        default: return "CUBLAS_STATUS of another kind";
    }
}
const char* cublasGetStatusString(cublasStatus_t s) { return cublasGetStatusName(s); }

}  // extern "C"
