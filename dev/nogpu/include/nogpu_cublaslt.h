// cublasLt's products on a CPU, of one matrix or a batch, D = C or not: cuBLAS's product, in which
// an epilogue's bias joins the sum before it is rounded. What the choice of an algorithm was told,
// shapes and alignment, must hold for the call. Included by cublasLt.h.
#pragma once
#include <cublas_v2.h>

namespace nogpu {

// What stands in the opaque types.
struct LtProduct {
    int32_t compute, ta, tb;
    uint32_t epilogue;
    const void* bias;
};
struct LtLayout {
    int32_t type;
    int32_t rows, columns, ld, batch;
    int64_t stride;
};
// of A, B, C and D
struct LtPreference {
    uint64_t workspace;
    uint32_t reduction, alignment[4];
};
struct LtChoice {
    int32_t m, n, k, batch;
    uint32_t alignment[4];
};

template <class T, class Opaque>
T lt_read(const Opaque* from) {
    static_assert(sizeof(T) <= sizeof(*from), "no room");
    T x;
    memcpy(&x, from, sizeof(T));
    return x;
}
template <class T, class Opaque>
cublasStatus_t lt_write(Opaque* to, const T& x) {
    memcpy(to, &x, sizeof(T));
    return CUBLAS_STATUS_SUCCESS;
}
template <class T>
cublasStatus_t lt_take(T& to, const void* value, size_t size) {
    if (!value || size != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&to, value, size);
    return CUBLAS_STATUS_SUCCESS;
}
inline LtChoice lt_shapes(const LtProduct& p, const LtLayout& a, const LtLayout& b) {
    LtChoice shapes = {};
    shapes.m = p.ta ? a.columns : a.rows, shapes.k = p.ta ? a.rows : a.columns,
    shapes.n = p.tb ? b.rows : b.columns, shapes.batch = a.batch;
    return shapes;
}

}  // namespace nogpu

extern "C" {

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t,
                                                 cudaDataType type, uint64_t rows, uint64_t columns,
                                                 int64_t ld) {
    return nogpu::lt_write(
        layout, nogpu::LtLayout{type, (int32_t)rows, (int32_t)columns, (int32_t)ld, 1, 0});
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t what,
                                                const void* value, size_t size) {
    auto l = nogpu::lt_read<nogpu::LtLayout>(layout);
    cublasStatus_t status = what == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT
                                ? nogpu::lt_take(l.batch, value, size)
                            : what == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET
                                ? nogpu::lt_take(l.stride, value, size)
                                : CUBLAS_STATUS_NOT_SUPPORTED;
    return status == CUBLAS_STATUS_SUCCESS ? nogpu::lt_write(layout, l) : status;
}
cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t product, size_t,
                                               cublasComputeType_t compute, cudaDataType_t scale) {
    if (scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    return nogpu::lt_write(product, nogpu::LtProduct{compute, CUBLAS_OP_N, CUBLAS_OP_N,
                                                     CUBLASLT_EPILOGUE_DEFAULT, nullptr});
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product,
                                              cublasLtMatmulDescAttributes_t what,
                                              const void* value, size_t size) {
    auto p = nogpu::lt_read<nogpu::LtProduct>(product);
    cublasStatus_t status =
        what == CUBLASLT_MATMUL_DESC_TRANSA         ? nogpu::lt_take(p.ta, value, size)
        : what == CUBLASLT_MATMUL_DESC_TRANSB       ? nogpu::lt_take(p.tb, value, size)
        : what == CUBLASLT_MATMUL_DESC_EPILOGUE     ? nogpu::lt_take(p.epilogue, value, size)
        : what == CUBLASLT_MATMUL_DESC_BIAS_POINTER ? nogpu::lt_take(p.bias, value, size)
                                                    : CUBLAS_STATUS_NOT_SUPPORTED;
    return status == CUBLAS_STATUS_SUCCESS ? nogpu::lt_write(product, p) : status;
}
cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t preference,
                                                     size_t) {
    return nogpu::lt_write(
        preference, nogpu::LtPreference{0, CUBLASLT_REDUCTION_SCHEME_MASK, {256, 256, 256, 256}});
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t what,
                                                    const void* value, size_t size) {
    auto p = nogpu::lt_read<nogpu::LtPreference>(preference);
    int of = what - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
    cublasStatus_t status = what == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
                                ? nogpu::lt_take(p.workspace, value, size)
                            : what == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK
                                ? nogpu::lt_take(p.reduction, value, size)
                            : of >= 0 && of < 4 ? nogpu::lt_take(p.alignment[of], value, size)
                                                : CUBLAS_STATUS_NOT_SUPPORTED;
    return status == CUBLAS_STATUS_SUCCESS ? nogpu::lt_write(preference, p) : status;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t product,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t* results,
                                              int* found) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (wanted < 1) return CUBLAS_STATUS_INVALID_VALUE;
    auto p = nogpu::lt_read<nogpu::LtProduct>(product);
    auto preferred = nogpu::lt_read<nogpu::LtPreference>(preference);
    *found = 0;
    bool biased = p.epilogue == CUBLASLT_EPILOGUE_BIAS && p.bias;
    if (!(biased || p.epilogue == CUBLASLT_EPILOGUE_DEFAULT) ||
        !nogpu::computes_in_fp32((cublasComputeType_t)p.compute))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    nogpu::LtChoice choice =
        nogpu::lt_shapes(p, nogpu::lt_read<nogpu::LtLayout>(a), nogpu::lt_read<nogpu::LtLayout>(b));
    memcpy(choice.alignment, preferred.alignment, sizeof(choice.alignment));
    results[0] = {};
    results[0].state = CUBLAS_STATUS_SUCCESS;
    *found = 1;
    return nogpu::lt_write(&results[0].algo, choice);
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t product,
                              const void* alpha, const void* a, cublasLtMatrixLayout_t a_layout,
                              const void* b, cublasLtMatrixLayout_t b_layout, const void* beta,
                              const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algo,
                              void* workspace, size_t size, cudaStream_t) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    auto p = nogpu::lt_read<nogpu::LtProduct>(product);
    auto la = nogpu::lt_read<nogpu::LtLayout>(a_layout),
         lb = nogpu::lt_read<nogpu::LtLayout>(b_layout),
         lc = nogpu::lt_read<nogpu::LtLayout>(c_layout),
         ld = nogpu::lt_read<nogpu::LtLayout>(d_layout);
    nogpu::LtChoice shapes = nogpu::lt_shapes(p, la, lb),
                    chosen = nogpu::lt_read<nogpu::LtChoice>(algo);
    bool biased = p.epilogue == CUBLASLT_EPILOGUE_BIAS;
    if (lc.ld != ld.ld || lc.stride != ld.stride || (biased && ld.batch != 1))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (shapes.m != chosen.m || shapes.n != chosen.n || shapes.k != chosen.k ||
        shapes.k != (p.tb ? lb.columns : lb.rows))
        return CUBLAS_STATUS_INVALID_VALUE;
    const nogpu::LtLayout layouts[4] = {la, lb, lc, ld};
    const void* pointers[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        const nogpu::LtLayout& l = layouts[i];
        size_t apart = l.batch > 1 ? l.stride * (l.type == CUDA_R_32F ? 4 : 2) : 0;
        if ((size_t)pointers[i] % chosen.alignment[i] || apart % chosen.alignment[i] ||
            l.batch != chosen.batch || l.type != (i < 2 ? la.type : ld.type) ||
            (i >= 2 && (l.rows != shapes.m || l.columns != shapes.n)))
            return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (size && (!nogpu::device_span(workspace, size) || (size_t)workspace % 16))
        return CUBLAS_STATUS_INVALID_VALUE;
    return nogpu::products("cublasLtMatmul", (cublasHandle_t)handle, (cublasOperation_t)p.ta,
                           (cublasOperation_t)p.tb, shapes.m, shapes.n, shapes.k, alpha, a,
                           (cudaDataType)la.type, la.ld, la.stride, b, (cudaDataType)lb.type, lb.ld,
                           lb.stride, beta, d, (cudaDataType)ld.type, ld.ld, ld.stride, ld.batch,
                           biased ? p.bias : nullptr, c);
}

}  // extern "C"
