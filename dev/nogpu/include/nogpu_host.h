// The runtime calls of a host program. Everything has happened when a call returns, but for a copy
// into pinned host memory: that arrives when the program waits for it. A call that is missing here
// shows as an undefined reference when the program is linked. Included by nogpu.h.
#pragma once

struct CUstream_st {
    unsigned flags;
};
// seconds; negative until it is recorded
struct CUevent_st {
    double time;
};

namespace nogpu {

// Copies and fills as a device makes them: over the parts of an arena that the program has
// poisoned, too. Whether device memory is large enough is checked before. The attribute keeps g++
// from calling memcpy and memset instead, which AddressSanitizer watches.
#define NOGPU_DEVICE_COPY \
    __attribute__((optimize("O3", "no-tree-loop-distribute-patterns"))) NOGPU_RAW inline
NOGPU_DEVICE_COPY void raw_copy(char* to, const char* from, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = from[i];
}
NOGPU_DEVICE_COPY void raw_fill(char* to, char value, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = value;
}
inline void check_host(const void* p, size_t n) {
#if NOGPU_ASAN
    if (!is_device(p) && __asan_region_is_poisoned((void*)p, n))
        fail("cudaMemcpy of %zu bytes: host memory at %p is out of range", n, p);
#else
    (void)p, (void)n;
#endif
}

struct Arrival {
    char* to;
    std::vector<char> data;
    cudaStream_t stream;
};
inline std::vector<Arrival>& arrivals() {
    static auto* v = new std::vector<Arrival>;
    return *v;
}
inline void wait_for_copies() {
    for (Arrival& a : arrivals()) memcpy(a.to, a.data.data(), a.data.size());
    arrivals().clear();
}
// what the same stream brought there is there
inline void arrive_before_reading(const void* from, size_t n, cudaStream_t stream) {
    std::vector<Arrival> late;
    for (Arrival& a : arrivals()) {
        if (a.stream == stream && a.to < (const char*)from + n &&
            (const char*)from < a.to + a.data.size())
            memcpy(a.to, a.data.data(), a.data.size());
        else
            late.push_back(std::move(a));
    }
    arrivals() = std::move(late);
}

// a GPU says less
inline cudaError_t refuse(cudaError_t e, const char* why) {
    fprintf(stderr, "nogpu: %s: %s\n", cudaGetErrorName(e), why);
    return result(e);
}
// is this end of a copy what its kind says?
inline bool device_copy_side(const void* p, size_t n, bool must_be_device) {
    return is_device(p) ? must_be_device && device_span(p, n)
                        : !must_be_device || in_map(device().symbols, p);
}
inline cudaError_t copy(void* to, const void* from, size_t n, cudaMemcpyKind kind, bool async,
                        cudaStream_t stream = nullptr) {
    if (!async) wait_for_copies();
    arrive_before_reading(from, n, stream);
    if (!n) return cudaSuccess;
    if (kind == cudaMemcpyDefault)
        kind = is_device(from) ? (is_device(to) ? cudaMemcpyDeviceToDevice : cudaMemcpyDeviceToHost)
                               : (is_device(to) ? cudaMemcpyHostToDevice : cudaMemcpyHostToHost);
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (!device_copy_side(to, n, to_device))
        return refuse(cudaErrorInvalidValue,
                      "cudaMemcpy: the destination is not what the direction says, or too small");
    if (!device_copy_side(from, n, from_device))
        return refuse(cudaErrorInvalidValue,
                      "cudaMemcpy: the source is not what the direction says, or too small");
    check_host(to, n);
    check_host(from, n);
    open_device();
    if (async && kind == cudaMemcpyDeviceToHost && in_map(device().pinned, to)) {
        arrivals().push_back({(char*)to, std::vector<char>(n), stream});
        raw_copy(arrivals().back().data.data(), (const char*)from, n);
        memset(to, 0xff, n);  // nothing a program may look at before it has waited
    } else
        raw_copy((char*)to, (const char*)from, n);
    close_device();
    return cudaSuccess;
}
inline cudaError_t fill(void* p, int value, size_t n) {
    if (!n) return cudaSuccess;
    if (!device_span(p, n))
        return refuse(cudaErrorInvalidValue, "cudaMemset: not device memory, or too small");
    open_device();
    raw_fill((char*)p, (char)value, n);
    close_device();
    return cudaSuccess;
}

}  // namespace nogpu

extern "C" {

// ---- memory

cudaError_t cudaMalloc(void** p, size_t n) {
    nogpu::Device& d = nogpu::device();
    if (!p) return nogpu::result(cudaErrorInvalidValue);
    *p = nullptr;
    if (!n) return cudaSuccess;
    if (n > d.limit - d.live) return nogpu::result(cudaErrorMemoryAllocation);
    // Aligned to an odd multiple of 256 bytes, which is what a GPU promises; between poisoned zones
    // that are wide for a large array. A large one is in huge pages: opening and closing the device
    // then costs microseconds.
    const size_t huge = (size_t)2 << 20, page = n < huge ? 4096 : huge;
    size_t zone = n < nogpu::DEVICE_REDZONE / 8 ? nogpu::DEVICE_REDZONE / 8 : nogpu::DEVICE_REDZONE;
    size_t start = d.used + zone + 256, end = (start + n + zone + page - 1) / page * page;
    if (end > nogpu::DEVICE_SPACE) return nogpu::result(cudaErrorMemoryAllocation);
    char* data = d.base + start;
    if (n >= huge) madvise(d.base + d.used, end - d.used, MADV_HUGEPAGE);
    ASAN_POISON_MEMORY_REGION(d.base + d.used, end - d.used);
    ASAN_UNPOISON_MEMORY_REGION(data, n);
    d.used = end;
    d.live += n;
    d.list.push_back({data, n, false});
    nogpu::open_device();
    nogpu::raw_fill(data, (char)0xff, n);
    nogpu::close_device();
    *p = data;
    return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
    nogpu::wait_for_copies();
    if (!p) return cudaSuccess;
    nogpu::Allocation* a = nogpu::find_allocation(p, 0);
    if (!a || a->data != p || a->freed)
        return nogpu::refuse(cudaErrorInvalidValue,
                             "cudaFree of what cudaMalloc did not give, or twice");
    a->freed = true;
    nogpu::device().live -= a->bytes;
    size_t page = sysconf(_SC_PAGESIZE), first = (size_t)p / page * page,
           last = ((size_t)p + a->bytes + page - 1) / page * page;
    madvise((void*)first, last - first, MADV_DONTNEED);
    ASAN_POISON_MEMORY_REGION(p, a->bytes);
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, size_t n) {
    *p = malloc(n ? n : 1);
    if (!*p) return nogpu::result(cudaErrorMemoryAllocation);
    memset(*p, 0xff, n);
    nogpu::device().pinned[*p] = n;
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { return cudaMallocHost(p, n); }
cudaError_t cudaFreeHost(void* p) {
    nogpu::wait_for_copies();
    if (!p) return cudaSuccess;
    if (!nogpu::device().pinned.erase(p))
        return nogpu::refuse(cudaErrorInvalidValue,
                             "cudaFreeHost of what cudaMallocHost did not give, or twice");
    free(p);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind kind) {
    return nogpu::copy(to, from, n, kind, false);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return nogpu::copy(to, from, n, kind, true, stream);
}
cudaError_t cudaMemset(void* p, int value, size_t n) { return nogpu::fill(p, value, n); }
cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t) {
    return nogpu::fill(p, value, n);
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
    *total = nogpu::device().limit;
    *free_bytes = *total - nogpu::device().live;
    return cudaSuccess;
}
// ---- the device

// One is as good as another: a process works with one alone.
cudaError_t cudaGetDeviceCount(int* n) {
    *n = std::max(1, atoi(getenv("NOGPU_DEVICES") ? getenv("NOGPU_DEVICES") : "1"));
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int number) {
    int count;
    cudaGetDeviceCount(&count);
    return number >= 0 && number < count ? cudaSuccess : nogpu::result(cudaErrorInvalidDevice);
}
cudaError_t cudaGetDevice(int* number) {
    *number = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    nogpu::wait_for_copies();
    return cudaSuccess;
}
cudaError_t cudaDeviceReset() {
    nogpu::wait_for_copies();
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int number) {
    if (cudaSetDevice(number) != cudaSuccess) return cudaErrorInvalidDevice;
    *p = cudaDeviceProp{};
    snprintf(p->name, sizeof p->name, "nogpu (CPU)");
    p->major = 9;
    p->multiProcessorCount = 4;
    p->totalGlobalMem = nogpu::device().limit;
    p->sharedMemPerBlock = nogpu::DEFAULT_SHARED;
    p->sharedMemPerBlockOptin = nogpu::max_shared();
    p->sharedMemPerMultiprocessor = nogpu::max_shared() + 1024;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = nogpu::MAX_THREADS;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = 4 << 20;
    p->memoryBusWidth = 64;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: *value = nogpu::MAX_THREADS; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)nogpu::DEFAULT_SHARED; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)nogpu::max_shared(); break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = (int)nogpu::max_shared() + 1024;
            break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMultiProcessorCount: *value = 4; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
        case cudaDevAttrClockRate: *value = 1000000; break;
        case cudaDevAttrMemoryClockRate: *value = 1000000; break;
        case cudaDevAttrGlobalMemoryBusWidth: *value = 64; break;
        case cudaDevAttrL2CacheSize: *value = 4 << 20; break;
        default:
            return nogpu::refuse(cudaErrorInvalidValue,
                                 "cudaDeviceGetAttribute: an attribute that nogpu does not know");
    }
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || (size_t)value > nogpu::max_shared())
        return nogpu::result(cudaErrorInvalidValue);
    nogpu::device().max_dynamic[kernel] = (size_t)value;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          size_t smem) {
    *blocks = threads < 1 || threads > 1024 || smem > nogpu::max_shared() ? 0
              : 2048 / threads > 32                                       ? 32
                                                                          : 2048 / threads;
    if (smem && *blocks > (int)(nogpu::max_shared() / smem))
        *blocks = (int)(nogpu::max_shared() / smem);
    return cudaSuccess;
}

// ---- streams and events

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
    *s = new CUstream_st{flags};
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithFlags(s, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) {
    nogpu::wait_for_copies();
    delete s;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    nogpu::wait_for_copies();
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t) {
    nogpu::wait_for_copies();
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
    *e = new CUevent_st{-1.0};
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    delete e;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
    e->time = nogpu::now();
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
    nogpu::wait_for_copies();
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t) {
    nogpu::wait_for_copies();
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
    if (start->time < 0 || end->time < 0) return nogpu::result(cudaErrorInvalidResourceHandle);
    *ms = (float)(1e3 * (end->time - start->time));
    return cudaSuccess;
}

// ---- errors

cudaError_t cudaPeekAtLastError() { return nogpu::last_error; }
cudaError_t cudaGetLastError() {
    cudaError_t e = nogpu::last_error;
    nogpu::last_error = cudaSuccess;
    return e;
}
#define NOGPU_ERRORS(X)                                                \
    X(cudaSuccess, "no error")                                         \
    X(cudaErrorInvalidValue, "invalid argument")                       \
    X(cudaErrorMemoryAllocation, "out of memory")                      \
    X(cudaErrorInvalidConfiguration, "invalid configuration argument") \
    X(cudaErrorInvalidDevice, "invalid device ordinal")                \
    X(cudaErrorInvalidResourceHandle, "invalid resource handle")       \
    X(cudaErrorNotSupported, "operation not supported")
const char* cudaGetErrorName(cudaError_t e) {
    switch (e) {
#define X(name, text) \
    case name: return #name;
        NOGPU_ERRORS(X)
#undef X
        default: return "cudaErrorUnknown";
    }
}
const char* cudaGetErrorString(cudaError_t e) {
    switch (e) {
#define X(name, text) \
    case name: return text;
        NOGPU_ERRORS(X)
#undef X
        default: return "unknown error";
    }
}
#undef NOGPU_ERRORS

}  // extern "C"

// What cuda_runtime.h has for nvcc alone. A __device__ or __constant__ variable is an ordinary
// variable here.
template <class T>
cudaError_t cudaMemcpyToSymbol(const T& symbol, const void* from, size_t n, size_t offset = 0,
                               cudaMemcpyKind = cudaMemcpyHostToDevice) {
    if (offset + n > sizeof(T))
        return nogpu::refuse(cudaErrorInvalidValue, "cudaMemcpyToSymbol: the variable is smaller");
    memcpy((char*)&symbol + offset, from, n);
    return cudaSuccess;
}
template <class T>
cudaError_t cudaMemcpyFromSymbol(void* to, const T& symbol, size_t n, size_t offset = 0,
                                 cudaMemcpyKind = cudaMemcpyDeviceToHost) {
    if (offset + n > sizeof(T))
        return nogpu::refuse(cudaErrorInvalidValue,
                             "cudaMemcpyFromSymbol: the variable is smaller");
    memcpy(to, (const char*)&symbol + offset, n);
    return cudaSuccess;
}
template <class T>
cudaError_t cudaGetSymbolAddress(void** p, const T& symbol) {
    *p = (void*)&symbol;
    nogpu::device().symbols[*p] = sizeof(T);
    return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute((const void*)kernel, attribute, value);
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(P...),
                                                          int threads, size_t smem) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, (const void*)kernel, threads,
                                                         smem);
}

// For a program that divides an arena itself: between #ifdef __NOGPU__ and #endif it may have the
// gaps between its arrays watched. Without AddressSanitizer these do nothing.
inline void nogpu_poison(void* p, size_t n) { ASAN_POISON_MEMORY_REGION(p, n); }
inline void nogpu_unpoison(void* p, size_t n) { ASAN_UNPOISON_MEMORY_REGION(p, n); }
