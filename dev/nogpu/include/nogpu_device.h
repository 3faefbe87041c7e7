// What kernels call: barriers, warp operations, atomics, loads and stores, arithmetic, and the PTX
// helpers. Included by nogpu.h.
#pragma once

// ---- source text that a host compiler does not know

#define __launch_bounds__(...)
#undef __shared__  // translate.py has replaced those that it understood
#define __shared__ nogpu_does_not_understand_this_shared_declaration

// ---- barriers and fences

NOGPU_RAW inline void __syncthreads(NOGPU_SITE) { nogpu::barrier("__syncthreads", 0, file, line); }
NOGPU_RAW inline int __syncthreads_count(int p, NOGPU_SITE) {
    return nogpu::barrier("__syncthreads_count", p, file, line);
}
NOGPU_RAW inline int __syncthreads_or(int p, NOGPU_SITE) {
    return nogpu::barrier("__syncthreads_or", p, file, line) != 0;
}
NOGPU_RAW inline int __syncthreads_and(int p, NOGPU_SITE) {
    return nogpu::barrier("__syncthreads_and", !p, file, line) == 0;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
[[noreturn]] inline void __trap() { nogpu::fail("__trap"); }

// ---- warp operations: each lane brings its arguments, the last one to come fills in all results

namespace nogpu {

NOGPU_RAW inline void sync_op(Thread*, unsigned) {}

struct Vote {
    unsigned predicate, result;
};
NOGPU_RAW inline void ballot_op(Thread* lanes, unsigned mask) {
    unsigned votes = 0;
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        int i = __builtin_ctz(rest);
        votes |= (((Vote*)lanes[i].args)->predicate != 0) * (1u << i);
    }
    for (unsigned rest = mask; rest; rest &= rest - 1)
        ((Vote*)lanes[__builtin_ctz(rest)].args)->result = votes;
}
NOGPU_RAW inline unsigned ballot(const char* what, unsigned mask, bool predicate, const char* file,
                                 int line) {
    Vote v = {predicate, 0};
    warp_op(what, mask, ballot_op, &v, file, line);
    return v.result;
}

struct Shuffle {
    uint64_t value, result;
    int source;
};
NOGPU_RAW inline void shuffle_op(Thread* lanes, unsigned mask) {
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        Shuffle* s = (Shuffle*)lanes[__builtin_ctz(rest)].args;
        // What a lane outside the mask has is undefined: NaN, so that it is not mistaken for a
        // value.
        s->result = mask >> s->source & 1 ? ((Shuffle*)lanes[s->source].args)->value : ~0ull;
    }
}
template <class T>
NOGPU_RAW T shuffle(const char* what, unsigned mask, T value, int source, const char* file,
                    int line) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>,
                  "a shuffle moves at most 8 bytes");
    Shuffle s = {0, 0, source};
    memcpy(&s.value, &value, sizeof(T));
    warp_op(what, mask, shuffle_op, &s, file, line);
    memcpy((void*)&value, &s.result, sizeof(T));
    return value;
}
NOGPU_RAW inline int lane() { return worker && worker->thread ? worker->thread->lane : 0; }
NOGPU_RAW inline void check_width(int width, const char* file, int line) {
    if (width < 1 || width > 32 || (width & (width - 1)))
        fail("shuffle with width %d at %s:%d", width, base_name(file), line);
}

}  // namespace nogpu

NOGPU_RAW inline void __syncwarp(unsigned mask = 0xffffffff, NOGPU_SITE) {
    nogpu::warp_op("__syncwarp", mask, nogpu::sync_op, nullptr, file, line);
}
NOGPU_RAW inline unsigned __activemask(NOGPU_SITE) {
    unsigned mask = 0;
    nogpu::warp_op("__activemask", 0, nogpu::active_mask_op, &mask, file, line);
    return mask;
}
NOGPU_RAW inline unsigned __ballot_sync(unsigned mask, int p, NOGPU_SITE) {
    return nogpu::ballot("__ballot_sync", mask, p, file, line);
}
NOGPU_RAW inline int __any_sync(unsigned mask, int p, NOGPU_SITE) {
    return nogpu::ballot("__any_sync", mask, p, file, line) != 0;
}
NOGPU_RAW inline int __all_sync(unsigned mask, int p, NOGPU_SITE) {
    return nogpu::ballot("__all_sync", mask, !p, file, line) == 0;
}

template <class T>
NOGPU_RAW T __shfl_sync(unsigned mask, T value, int source, int width = 32, NOGPU_SITE) {
    nogpu::check_width(width, file, line);
    int lane = nogpu::lane();
    return nogpu::shuffle("__shfl_sync", mask, value, (lane & -width) | (source & (width - 1)),
                          file, line);
}
template <class T>
NOGPU_RAW T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, NOGPU_SITE) {
    nogpu::check_width(width, file, line);
    int lane = nogpu::lane();
    return nogpu::shuffle("__shfl_up_sync", mask, value,
                          delta > (unsigned)(lane & (width - 1)) ? lane : lane - (int)delta, file,
                          line);
}
template <class T>
NOGPU_RAW T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, NOGPU_SITE) {
    nogpu::check_width(width, file, line);
    int lane = nogpu::lane();
    bool out = delta >= 32 || (lane & (width - 1)) + (int)delta >= width;
    return nogpu::shuffle("__shfl_down_sync", mask, value, out ? lane : lane + (int)delta, file,
                          line);
}
template <class T>
NOGPU_RAW T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, NOGPU_SITE) {
    nogpu::check_width(width, file, line);
    int lane = nogpu::lane(), source = (lane ^ bits) & 31;
    return nogpu::shuffle("__shfl_xor_sync", mask, value,
                          source > (lane | (width - 1)) ? lane : source, file, line);
}

// ---- atomics: real ones, for blocks run side by side

namespace nogpu {
// for what the processor has no instruction for
template <class T, class F>
T atomic_update(T* p, F change) {
    T was, will;
    __atomic_load(p, &was, __ATOMIC_SEQ_CST);
    do will = change(was);
    while (!__atomic_compare_exchange(p, &was, &will, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return was;
}
}  // namespace nogpu

#define NOGPU_ATOMICS(T)                                                                         \
    inline T atomicAdd(T* p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }         \
    inline T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }       \
    inline T atomicAnd(T* p, T v) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }         \
    inline T atomicOr(T* p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }           \
    inline T atomicXor(T* p, T v) { return __atomic_fetch_xor(p, v, __ATOMIC_SEQ_CST); }         \
    inline T atomicMin(T* p, T v) {                                                              \
        return nogpu::atomic_update(p, [=](T was) { return v < was ? v : was; });                \
    }                                                                                            \
    inline T atomicMax(T* p, T v) {                                                              \
        return nogpu::atomic_update(p, [=](T was) { return v > was ? v : was; });                \
    }                                                                                            \
    inline T atomicCAS(T* p, T expected, T v) {                                                  \
        __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
        return expected;                                                                         \
    }
NOGPU_ATOMICS(int)
NOGPU_ATOMICS(unsigned)
NOGPU_ATOMICS(unsigned long long)
#undef NOGPU_ATOMICS
inline int atomicSub(int* p, int v) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }
inline unsigned atomicSub(unsigned* p, unsigned v) {
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);
}
inline unsigned atomicInc(unsigned* p, unsigned v) {
    return nogpu::atomic_update(p, [=](unsigned was) { return was >= v ? 0 : was + 1; });
}
inline unsigned atomicDec(unsigned* p, unsigned v) {
    return nogpu::atomic_update(p, [=](unsigned was) { return was == 0 || was > v ? v : was - 1; });
}
inline float atomicAdd(float* p, float v) {
    return nogpu::atomic_update(p, [=](float was) { return was + v; });
}
inline double atomicAdd(double* p, double v) {
    return nogpu::atomic_update(p, [=](double was) { return was + v; });
}
inline float atomicExch(float* p, float v) {
    return nogpu::atomic_update(p, [=](float) { return v; });
}

// ---- loads and stores with a cache hint

template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldca(const T* p) {
    return *p;
}
template <class T>
T __ldcg(const T* p) {
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
T __ldcv(const T* p) {
    return *p;
}
template <class T>
T __ldlu(const T* p) {
    return *p;
}
template <class T>
void __stwb(T* p, T v) {
    *p = v;
}
template <class T>
void __stcg(T* p, T v) {
    *p = v;
}
template <class T>
void __stcs(T* p, T v) {
    *p = v;
}
template <class T>
void __stwt(T* p, T v) {
    *p = v;
}

// ---- arithmetic. The fast intrinsics are as exact here as the plain functions; a test's bounds
// have to allow for what the GPU's lose.

#define __expf(x) expf(x)  // macros, because the C library keeps these names for itself
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __sincosf(x, s, c) sincosf(x, s, c)
inline float __tanhf(float x) { return tanhf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

template <class To, class From>
To nogpu_bits(From v) {
    To t;
    static_assert(sizeof(To) == sizeof(From), "");
    memcpy(&t, &v, sizeof t);
    return t;
}
inline int __float_as_int(float x) { return nogpu_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return nogpu_bits<unsigned>(x); }
inline float __int_as_float(int x) { return nogpu_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return nogpu_bits<float>(x); }
inline long long __double_as_longlong(double x) { return nogpu_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return nogpu_bits<double>(x); }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline int __float2int_rd(float x) { return (int)floorf(x); }
inline int __float2int_ru(float x) { return (int)ceilf(x); }
inline unsigned __float2uint_rn(float x) { return (unsigned)rintf(x); }
inline unsigned __float2uint_rz(float x) { return (unsigned)x; }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
    return r;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned)((uint64_t)x * y >> 32); }
inline int __mulhi(int x, int y) { return (int)((int64_t)x * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)((unsigned __int128)x * y >> 64);
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
    return (unsigned)((((uint64_t)hi << 32 | lo) << (n & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
    return (unsigned)(((uint64_t)hi << 32 | lo) >> (n & 31));
}

#define NOGPU_MINMAX(R, A, B)                                    \
    inline R min(A a, B b) { return (R)a < (R)b ? (R)a : (R)b; } \
    inline R max(A a, B b) { return (R)a > (R)b ? (R)a : (R)b; }
NOGPU_MINMAX(int, int, int)
NOGPU_MINMAX(unsigned, unsigned, unsigned)
NOGPU_MINMAX(unsigned, int, unsigned)
NOGPU_MINMAX(unsigned, unsigned, int)
NOGPU_MINMAX(long, long, long)
NOGPU_MINMAX(unsigned long, unsigned long, unsigned long)
NOGPU_MINMAX(unsigned long, long, unsigned long)
NOGPU_MINMAX(unsigned long, unsigned long, long)
NOGPU_MINMAX(long long, long long, long long)
NOGPU_MINMAX(unsigned long long, unsigned long long, unsigned long long)
NOGPU_MINMAX(unsigned long long, long long, unsigned long long)
NOGPU_MINMAX(unsigned long long, unsigned long long, long long)
#undef NOGPU_MINMAX
#define NOGPU_MINMAX(R, A, B, F)                     \
    inline R min(A a, B b) { return fmin##F(a, b); } \
    inline R max(A a, B b) { return fmax##F(a, b); }
NOGPU_MINMAX(float, float, float, f)
NOGPU_MINMAX(double, double, double, )
NOGPU_MINMAX(double, float, double, )
NOGPU_MINMAX(double, double, float, )
#undef NOGPU_MINMAX

// ---- PTX helpers, the bodies of ../ptx_reference.cuh for a CPU. A source takes that file's
// functions between #ifndef __NOGPU__ and #endif.

namespace nogpu {

NOGPU_RAW inline void need_whole_warp(const char* what, const char* file, int line) {
    if (!worker || !worker->thread) fail("%s outside a kernel, %s:%d", what, base_name(file), line);
    if (worker->thread->warp->exists != ~0u)
        fail("%s at %s:%d: the warp has fewer than 32 threads", what, base_name(file), line);
}
static inline __attribute__((always_inline)) NOGPU_RAW float bf16_value(unsigned bits) {
    bits <<= 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// Fragments as in the PTX ISA for mma.m16n8k16, bf16. With g = lane / 4 and q = lane % 4: a[0] is
// row g, a[1] row g + 8, at columns 2q and
struct Mma {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
};
// 2q + 1; a[2] and a[3] the same rows 8 columns on. b[0] is column g, rows 2q and 2q + 1; b[1] 8
// rows on. d[0], d[1] are row g, columns 2q and 2q + 1; d[2], d[3] the same in row g + 8. Of two
// values in a register the lower half comes first.
__attribute__((optimize("O3"))) NOGPU_RAW inline void mma_op(Thread* lanes, unsigned) {
    typedef float Row __attribute__((vector_size(32)));
    float a[16][16];
    Row b[16], d[16];
    for (int lane = 0; lane < 32; lane++) {
        const Mma* m = (const Mma*)lanes[lane].args;
        int g = lane / 4, q = lane % 4;
        for (int half = 0; half < 2; half++) {
            int shift = 16 * half;
            a[g][2 * q + half] = bf16_value(m->a[0] >> shift & 0xffff);
            a[g + 8][2 * q + half] = bf16_value(m->a[1] >> shift & 0xffff);
            a[g][2 * q + half + 8] = bf16_value(m->a[2] >> shift & 0xffff);
            a[g + 8][2 * q + half + 8] = bf16_value(m->a[3] >> shift & 0xffff);
            b[2 * q + half][g] = bf16_value(m->b[0] >> shift & 0xffff);
            b[2 * q + half + 8][g] = bf16_value(m->b[1] >> shift & 0xffff);
            d[g][2 * q + half] = m->d[half];
            d[g + 8][2 * q + half] = m->d[half + 2];
        }
    }
    for (int i = 0; i < 16; i++) {  // fp32, k ascending
        Row sum = d[i];
        for (int k = 0; k < 16; k++) sum += a[i][k] * b[k];
        d[i] = sum;
    }
    for (int lane = 0; lane < 32; lane++) {
        const Mma* m = (const Mma*)lanes[lane].args;
        int g = lane / 4, q = lane % 4;
        for (int half = 0; half < 2; half++) {
            m->d[half] = d[g][2 * q + half];
            m->d[half + 2] = d[g + 8][2 * q + half];
        }
    }
}

// Matrix i of 8 x 8 bf16 has its rows where lanes 8i .. 8i + 7 point. Lane l gets columns 2(l % 4)
// and + 1 of row l / 4; transposed, rows
struct LoadMatrix {
    uint32_t* r;
    const void* row;
};
// 2(l % 4) and + 1 of column l / 4.
template <int count, bool transposed>
NOGPU_RAW void load_matrix_op(Thread* lanes, unsigned) {
    for (int i = 0; i < count; i++) {
        const uint16_t* rows[8];
        for (int row = 0; row < 8; row++)
            rows[row] = (const uint16_t*)((const LoadMatrix*)lanes[8 * i + row].args)->row;
        for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, q = 2 * (lane % 4);
            uint32_t low = transposed ? rows[q][g] : rows[g][q],
                     high = transposed ? rows[q + 1][g] : rows[g][q + 1];
            ((const LoadMatrix*)lanes[lane].args)->r[i] = high << 16 | low;
        }
    }
}
template <int count, bool transposed>
NOGPU_RAW void load_matrix(const char* what, uint32_t* r, const void* row, const char* file,
                           int line) {
    need_whole_warp(what, file, line);
    if (worker->thread->lane < 8 * count) {  // the other lanes' addresses are not used
        if ((size_t)row & 15)
            fail("%s at %s:%d: the row's address %p is not a multiple of 16", what, base_name(file),
                 line, row);
        if (!in_shared(row, 16)) {
            describe(row);
            fail("%s at %s:%d: the row at %p is not in shared memory", what, base_name(file), line,
                 row);
        }
    }
    LoadMatrix l = {r, row};
    warp_op(what, ~0u, load_matrix_op<count, transposed>, &l, file, line);
}

// cp.async: what is at the destination is undefined from here to the wait, so it becomes NaN; the
// copy itself is made in the wait, after other threads had their turn. So a reader that does not
// wait sees NaN, and so does one that was still to read what the copy overwrites.
inline void copy_async(void* to, const void* from, bool valid, const char* file, int line) {
    if (!worker || !worker->thread) fail("cp.async outside a kernel, %s:%d", base_name(file), line);
    if (((size_t)to | (valid ? (size_t)from : 0)) & 15)
        fail("cp.async at %s:%d: %p or %p is not a multiple of 16", base_name(file), line, to,
             from);
    if (!in_shared(to, 16)) {
        describe(to);
        fail("cp.async at %s:%d: the destination %p is not in shared memory", base_name(file), line,
             to);
    }
    char now[16];
    if (valid) memcpy(now, from, 16);  // so that AddressSanitizer names this line
    memset(to, 0xff, 16);
    Thread* t = worker->thread;
    t->copies.push_back({to, from, valid, t->group});
}
// all but the latest so many of the groups committed
inline void copy_wait(int groups) {
    Thread* t = worker->thread;
    if (!t->copies.empty()) wait_for_others(worker);  // this thread stays ready
    size_t kept = 0;
    for (const Copy& c : t->copies) {
        if (c.group >= t->group - groups)
            t->copies[kept++] = c;
        else if (c.valid)
            memcpy(c.to, c.from, 16);
        else
            memset(c.to, 0, 16);
    }
    t->copies.resize(kept);
}

}  // namespace nogpu

// d += a b, 16 x 8 of fp32 from 16 x 16 and 16 x 8 of bf16
NOGPU_RAW inline void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2],
                                        NOGPU_SITE) {
    nogpu::need_whole_warp("mma", file, line);
    nogpu::Mma m = {d, a, b};
    nogpu::warp_op("mma", ~0u, nogpu::mma_op, &m, file, line);
}
NOGPU_RAW inline void ldmatrix_x4(uint32_t r[4], const void* row, NOGPU_SITE) {
    nogpu::load_matrix<4, false>("ldmatrix.x4", r, row, file, line);
}
NOGPU_RAW inline void ldmatrix_x4_trans(uint32_t r[4], const void* row, NOGPU_SITE) {
    nogpu::load_matrix<4, true>("ldmatrix.x4.trans", r, row, file, line);
}
NOGPU_RAW inline void ldmatrix_x2(uint32_t r[2], const void* row, NOGPU_SITE) {
    nogpu::load_matrix<2, false>("ldmatrix.x2", r, row, file, line);
}
NOGPU_RAW inline void ldmatrix_x2_trans(uint32_t r[2], const void* row, NOGPU_SITE) {
    nogpu::load_matrix<2, true>("ldmatrix.x2.trans", r, row, file, line);
}
inline void cp_async_16(void* smem, const void* gmem, NOGPU_SITE) {
    nogpu::copy_async(smem, gmem, true, file, line);
}
inline void cp_async_16_zfill(void* smem, const void* gmem, bool valid, NOGPU_SITE) {
    nogpu::copy_async(smem, gmem, valid, file, line);
}
inline void cp_async_commit() { nogpu::worker->thread->group++; }
template <int N>
void cp_async_wait() {
    nogpu::copy_wait(N);
}
inline float exp2_fast(float x) { return x < -126 ? 0 : exp2f(x); }
