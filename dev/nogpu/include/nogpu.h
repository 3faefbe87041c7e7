// Runs CUDA kernels on a CPU, for tests: the engine. README.md beside this folder says how to build
// with it and what it finds.
//
// A thread block runs on one operating-system thread. Each of its CUDA threads runs on a fiber of
// its own and keeps the processor until it waits for others (a barrier, a shuffle) or ends; then
// another thread of the block, picked at random, goes on. A kernel that never waits runs one thread
// after the other on one fiber. Blocks run in a random order; a grid that takes long is spread over
// as many processors as OpenMP gives.
//
// This header is included once, at the top of the one file that translate.py writes, ahead of
// everything in the CUDA source.
#pragma once
#ifdef __CUDACC__
#error "nogpu is for a host compiler: nvcc builds the CUDA source itself"
#endif
#ifndef __NOGPU__
#define __NOGPU__ 1
#endif

// the toolkit's own: types, structs and declarations are the real ones, only the bodies are ours
#include <cuda_runtime.h>
#include <boost/context/detail/fcontext.hpp>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <math.h>
#include <chrono>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define NOGPU_ASAN 1
#else
#define NOGPU_ASAN 0
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

// The engine's own hot code needs no checking, and would cost several times as much with it.
#define NOGPU_RAW __attribute__((no_sanitize("address", "undefined")))
// Where a waiting function was called from: default arguments are evaluated at the call.
#define NOGPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// What a kernel sees. One set for each operating-system thread; the scheduler sets threadIdx
// whenever it changes threads.
inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
static constexpr int warpSize = 32;

namespace nogpu {

const int MAX_THREADS = 1024, MAX_WARPS = 32;  // of a block
// __shared__ declarations in the whole program
const int MAX_SHARED = 1024;
// dynamic shared memory that needs no cudaFuncSetAttribute
const size_t DEFAULT_SHARED = 48 << 10;
// address space; only what is used becomes memory
const size_t FIBER_STACK = 256 << 10;
// address space for all of cudaMalloc: addresses are never used twice
const size_t DEVICE_SPACE = (size_t)1 << 40;
const size_t DEVICE_REDZONE = 1 << 20, SHARED_REDZONE = 4096;

inline size_t setting(const char* name, size_t otherwise) {
    const char* text = getenv(name);
    return text && *text ? strtoull(text, nullptr, 0) : otherwise;
}
inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}
inline uint64_t seed() {
    static uint64_t s = setting("NOGPU_SEED", 1);
    return s;
}
// Shared memory a block may have at most: 227 KB as on sm_90; 99 is what sm_86, sm_89 and sm_120
// have.
inline size_t max_shared() {
    static size_t s = setting("NOGPU_SHARED_KB", 227) << 10;
    return s;
}

// ---- the structures of a running block

struct Fiber {
    void* context;  // where it stopped
    // lowest address and size, which AddressSanitizer has to be told at each switch
    const void* stack;
    size_t bytes;
    void* fake_stack;
    Fiber* next;  // in the list of idle ones
};

struct Thread;
// Completes a warp-wide operation for all lanes in mask at once, when the last of them has arrived.
// lanes[i].args is what lane i brought.
typedef void (*WarpOp)(Thread* lanes, unsigned mask);

// a cp.async on its way
struct Copy {
    void* to;
    const void* from;
    bool valid;
    int group;
};

struct Warp {
    // one bit a lane; each lane that exists is in exactly one of the four others
    unsigned exists, ready, in_op, at_barrier, done;
    int number;
    Thread* lanes;
};

struct Thread {
    uint3 index;
    int lane;
    Warp* warp;
    Fiber* fiber;      // null until it starts
    const char* what;  // what it waits for, and where in the source
    const char* file;
    int line;
    unsigned mask;  // of the warp operation it waits in
    WarpOp op;
    void* args;
    std::vector<Copy> copies;
    int group;  // the cp.async group that is open
};

struct Launch {
    const char* name;
    dim3 grid, block;
    size_t smem;
    uint64_t number;  // 1 for the program's first launch
    void (*invoke)(const void*);
    const void* call;
};

// a __shared__ array of this worker; block: the last one that touched it
struct Shared {
    char* data;
    uint64_t block;
};
// One for each operating-system thread that runs blocks.
struct SharedSite {
    const char* name;
    size_t bytes, align;
};
struct Worker {
    const Launch* launch;
    Warp* warp;      // the running thread's
    Thread* thread;  // the running one
    uint64_t random;
    unsigned ready_warps;  // warps that have a ready lane
    int nthreads, nwarps, ndone, narrived;
    const char* barrier_what;  // the barrier that threads wait at now
    const char* barrier_file;
    int barrier_line, barrier_count, barrier_result;
    Fiber main;  // the stack that runs the block's loop
    Fiber* idle;
    char* dynamic;  // dynamic shared memory
    // blocks run by this worker, to see first touches of a __shared__ array
    uint64_t block_number;
    size_t static_bytes;  // __shared__ arrays touched by this block, bytes
    int nactive;          // ... and which
    int active[MAX_SHARED];
    Shared shared[MAX_SHARED];
    Warp warps[MAX_WARPS];
    Thread threads[MAX_THREADS];
};
inline thread_local Worker* worker = nullptr;
// a library call that reads device memory now
inline thread_local const char* host_call = nullptr;

inline std::vector<SharedSite>& shared_sites() {
    static auto* v = new std::vector<SharedSite>;
    return *v;
}

// ---- device memory: one range of addresses. It is closed to the host (a host read or write traps,
// as it would with a GPU) but for the time that a kernel or a library call runs. Every allocation
// lies between two poisoned zones; a freed one is never used again.

struct Allocation {
    char* data;
    size_t bytes;
    bool freed;
};

struct Device {
    char* base;
    size_t used;         // bytes of the address range given away
    size_t live, limit;  // bytes allocated now, and what the device says it has
    std::vector<Allocation> list;
    std::map<const void*, size_t> pinned;  // host memory that kernels may use too
    // __device__ variables whose address was asked for
    std::map<const void*, size_t> symbols;
    std::map<const void*, size_t> max_dynamic;  // by kernel: cudaFuncSetAttribute
    uint64_t launches;
};
void install_handlers();

inline Device& device() {
    static Device* d = [] {
        Device* n = new Device();
        n->limit = setting("NOGPU_MEMORY_MB", 8192) << 20;
        void* p = mmap(nullptr, DEVICE_SPACE, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) {
            perror("nogpu: mmap");
            abort();
        }
        n->base = (char*)p;
        install_handlers();
        return n;
    }();
    return *d;
}
inline void open_device() {
    Device& d = device();
    if (d.used) mprotect(d.base, d.used, PROT_READ | PROT_WRITE);
}
inline void close_device() {
    Device& d = device();
    if (d.used) mprotect(d.base, d.used, PROT_NONE);
}

inline bool is_device(const void* p) {
    Device& d = device();
    return (const char*)p >= d.base && (const char*)p < d.base + DEVICE_SPACE;
}

// The allocation that holds p, or else the one that p is nearest to, no more than slack bytes away.
inline Allocation* find_allocation(const void* p, size_t slack) {
    const char* c = (const char*)p;
    Allocation* nearest = nullptr;
    for (Allocation& a : device().list) {
        size_t away = c < a.data             ? a.data - c
                      : c < a.data + a.bytes ? 0
                                             : c - (a.data + a.bytes) + 1;
        if (away <= slack) {
            nearest = &a;
            slack = away;
        }
    }
    return nearest;
}
// p .. p + bytes is within one live allocation
inline bool device_span(const void* p, size_t bytes) {
    Allocation* a = find_allocation(p, 0);
    return a && !a->freed && (size_t)((const char*)p - a->data) + bytes <= a->bytes;
}
inline bool in_map(const std::map<const void*, size_t>& m, const void* p) {
    auto it = m.upper_bound(p);
    return it != m.begin() && (--it, (const char*)p < (const char*)it->first + it->second);
}

// ---- error messages

inline const char* base_name(const char* path) {
    const char* s = strrchr(path, '/');
    return s ? s + 1 : path;
}

inline void print_where() {
    Worker* w = worker;
    if (host_call)
        fprintf(stderr, "nogpu: in %s\n", host_call);
    else if (w && w->thread) {
        const Launch* l = w->launch;
        uint3 t = w->thread->index;
        fprintf(stderr,
                "nogpu: in kernel %s, launch %llu, grid (%u,%u,%u) of (%u,%u,%u) threads, block "
                "(%u,%u,%u), thread (%u,%u,%u)\n",
                l->name, (unsigned long long)l->number, l->grid.x, l->grid.y, l->grid.z, l->block.x,
                l->block.y, l->block.z, blockIdx.x, blockIdx.y, blockIdx.z, t.x, t.y, t.z);
    } else
        fprintf(stderr, "nogpu: in host code, after launch %llu\n",
                (unsigned long long)device().launches);
    fprintf(stderr, "nogpu: run again with NOGPU_SEED=%llu\n", (unsigned long long)seed());
}

inline bool describe_in(const char* kind, const char* name, const char* data, size_t bytes,
                        const char* c, size_t slack) {
    if (c + slack < data || c >= data + bytes + slack) return false;
    fprintf(stderr, "nogpu: the address is ");
    if (c < data)
        fprintf(stderr, "%zu bytes before", (size_t)(data - c));
    else if (c < data + bytes)
        fprintf(stderr, "at byte %zu of", (size_t)(c - data));
    else
        fprintf(stderr, "%zu bytes past the end of", (size_t)(c - data) - bytes);
    fprintf(stderr, " %s%s%s, %zu bytes\n", kind, *name ? " " : "", name, bytes);
    return true;
}
// says what p is near to
inline void describe(const void* p) {
    Worker* w = worker;
    const char* c = (const char*)p;
    if (w && w->thread) {
        for (int i = 0; i < w->nactive; i++) {
            const SharedSite& s = shared_sites()[w->active[i]];
            if (describe_in("__shared__", s.name, w->shared[w->active[i]].data, s.bytes, c,
                            SHARED_REDZONE))
                return;
        }
        if (describe_in("dynamic shared memory", "", w->dynamic, w->launch->smem, c,
                        SHARED_REDZONE))
            return;
    }
    if (!is_device(p)) return;
    Allocation* a = find_allocation(p, DEVICE_REDZONE);
    if (a)
        describe_in(a->freed ? "freed device memory" : "device memory", "", a->data, a->bytes, c,
                    DEVICE_REDZONE);
    if (!(w && w->thread) && !host_call)
        fprintf(stderr, "nogpu: host code used a device pointer\n");
}

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    static std::mutex once;
    // never given back: the first error of the blocks side by side is the one to read
    once.lock();
    fflush(stdout);
    fprintf(stderr, "nogpu: error: ");
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fprintf(stderr, "\n");
    print_where();
    signal(SIGABRT, SIG_DFL);
    abort();
}

// A trap (null pointer, closed device memory, full fiber stack, division by zero) or a failed
// assert: say where, then let it take its course.
inline struct sigaction old_actions[32];
inline bool reported = false;
inline void on_signal(int number, siginfo_t* info, void*) {
    fflush(stdout);
    fprintf(stderr, "nogpu: error: %s", strsignal(number));
    if (number == SIGSEGV) fprintf(stderr, " at address %p", info->si_addr);
    fprintf(stderr, "\n");
    if (number == SIGSEGV) describe(info->si_addr);
    print_where();
    reported = true;
    sigaction(number, &old_actions[number], nullptr);
    // the others come again by themselves when this returns
    if (number == SIGABRT) raise(number);
}
inline void install_handlers() {
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int number : {SIGSEGV, SIGFPE, SIGABRT}) sigaction(number, &action, &old_actions[number]);
}

// ---- fibers

NOGPU_RAW inline void arrived(Fiber* self, boost::context::detail::transfer_t came) {
    Fiber* from = (Fiber*)came.data;
    from->context = came.fctx;
#if NOGPU_ASAN
    __sanitizer_finish_switch_fiber(self->fake_stack, &from->stack, &from->bytes);
#else
    (void)self;
#endif
}
NOGPU_RAW inline void jump(Fiber* self, Fiber* to) {
#if NOGPU_ASAN
    __sanitizer_start_switch_fiber(&self->fake_stack, to->stack, to->bytes);
#endif
    arrived(self, boost::context::detail::jump_fcontext(to->context, self));
}

void fiber_main(boost::context::detail::transfer_t came);

inline Fiber* idle_fiber(Worker* w) {
    if (Fiber* f = w->idle) {
        w->idle = f->next;
        return f;
    }
    static std::mutex lock;
    static int count = 0;
    lock.lock();
    size_t number = count++;
    lock.unlock();
    size_t page = sysconf(_SC_PAGESIZE);
    char* p = (char*)mmap(nullptr, FIBER_STACK + page, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (p == MAP_FAILED) {
        perror("nogpu: mmap of a stack");
        abort();
    }
    mprotect(p, page, PROT_NONE);  // so that a stack that grows too far traps
    Fiber* f = new Fiber();
    f->stack = p + page;
    // Stacks that all began at the same place of a page would fight for the same few cache lines;
    // so each begins somewhere else.
    f->bytes = FIBER_STACK - number * 5 % 32 * 128;
    f->context = boost::context::detail::make_fcontext(p + page + f->bytes, f->bytes, fiber_main);
    return f;
}

// ---- the scheduler: which thread of the block goes on

// xorshift
NOGPU_RAW inline uint64_t random(Worker* w) {
    uint64_t x = w->random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return w->random = x;
}
// splitmix64: far apart for neighbours
NOGPU_RAW inline uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return (x ^ (x >> 31)) | 1;
}
// the first bit that is set, from a random place on
NOGPU_RAW inline int random_bit(unsigned bits, uint64_t r) {
    unsigned s = r & 31;
    unsigned turned = bits >> s | bits << (-s & 31);
    return (__builtin_ctz(turned) + s) & 31;
}

inline void active_mask_op(Thread*, unsigned) {}  // only a mark: see release_active_mask

// __activemask: lanes that wait in it go on together as soon as no other lane of the warp can run.
NOGPU_RAW inline void release_active_mask(Warp* wp) {
    unsigned mask = 0;
    for (int i = 0; i < 32; i++)
        if ((wp->in_op >> i & 1) && wp->lanes[i].op == active_mask_op) mask |= 1u << i;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) *(unsigned*)wp->lanes[i].args = mask;
    wp->in_op &= ~mask;
    wp->ready |= mask;
}

// A warp runs until none of its lanes can go on, so that warps get as far apart as the program's
// barriers let them; now and then another warp gets in between. Returns null when no thread of the
// block can go on.
NOGPU_RAW inline Thread* pick(Worker* w) {
    uint64_t r = random(w);
    Warp* wp = w->warp;
    if (!wp->ready && wp->in_op) release_active_mask(wp);
    if (!wp->ready || (r & 63) == 0) {
        if (!wp->ready) w->ready_warps &= ~(1u << wp->number);
        if (!w->ready_warps) return nullptr;
        wp = w->warp = w->warps + random_bit(w->ready_warps, r >> 16);
    }
    return wp->lanes + random_bit(wp->ready, r >> 32);
}

NOGPU_RAW inline void set_current(Worker* w, Thread* t) {
    w->thread = t;
    threadIdx = t->index;
}

NOGPU_RAW inline void go_to(Worker* w, Fiber* self, Thread* next) {
    if (!next->fiber) next->fiber = idle_fiber(w);
    set_current(w, next);
    jump(self, next->fiber);
}

// how many there are, and the first of each place
inline void list_threads(Worker* w, const char* state, unsigned Warp::*which) {
    struct Place {
        Thread* first;
        int count;
    };
    std::vector<Place> places;
    for (int i = 0; i < w->nthreads; i++) {
        Thread* t = w->threads + i;
        if (!(t->warp->*which >> t->lane & 1)) continue;
        bool known = false;
        for (Place& p : places)
            if (*state == 'e' || (p.first->line == t->line && p.first->mask == t->mask &&
                                  !strcmp(p.first->file, t->file))) {
                p.count++;
                known = true;
                break;
            }
        if (!known) places.push_back({t, 1});
    }
    for (Place& p : places) {
        Thread* t = p.first;
        fprintf(stderr, "nogpu: %4d thread%s %s", p.count, p.count == 1 ? "" : "s", state);
        if (*state != 'e') fprintf(stderr, " %s, %s:%d", t->what, base_name(t->file), t->line);
        if (t->warp->in_op >> t->lane & 1) fprintf(stderr, ", mask 0x%08x", t->mask);
        fprintf(stderr, "; the first is thread (%u,%u,%u)\n", t->index.x, t->index.y, t->index.z);
    }
}
[[noreturn]] inline void fail_stuck(Worker* w) {
    // name a thread that waits, not the one that happened to come last
    Thread* waits = nullptr;
    for (int i = 0; i < w->nthreads && !waits; i++) {
        Thread* t = w->threads + i;
        if (((t->warp->at_barrier | t->warp->in_op) >> t->lane) & 1) waits = t;
    }
    list_threads(w, "wait at", &Warp::at_barrier);
    list_threads(w, "wait in", &Warp::in_op);
    list_threads(w, "exited", &Warp::done);
    set_current(w, waits);
    bool in_op = waits->warp->in_op >> waits->lane & 1;
    fail("%s at %s:%d is not reached by all threads %s", waits->what, base_name(waits->file),
         waits->line, in_op ? "in its mask" : "of the block");
}

// the caller has taken the running thread's ready bit away, or given it back
NOGPU_RAW inline void wait_for_others(Worker* w) {
    Thread* self = w->thread;
    Thread* next = pick(w);
    if (!next) fail_stuck(w);
    if (next != self) go_to(w, self->fiber, next);
}

NOGPU_RAW inline void warp_op(const char* what, unsigned mask, WarpOp op, void* args,
                              const char* file, int line) {
    Worker* w = worker;
    if (!w || !w->thread) fail("%s outside a kernel, %s:%d", what, base_name(file), line);
    Thread* t = w->thread;
    Warp* wp = t->warp;
    unsigned me = 1u << t->lane;
    t->what = what;
    t->file = file;
    t->line = line;
    t->mask = mask;
    t->op = op;
    t->args = args;
    if (op != active_mask_op) {
        if (!(mask & me))
            fail("%s at %s:%d: the calling lane %d is not in the mask 0x%08x", what,
                 base_name(file), line, t->lane, mask);
        mask &= wp->exists;  // the last warp may have fewer than 32 lanes
        if (mask & wp->done) {
            uint3 i = wp->lanes[__builtin_ctz(mask & wp->done)].index;
            fail("%s at %s:%d: thread (%u,%u,%u), in the mask 0x%08x, has exited", what,
                 base_name(file), line, i.x, i.y, i.z, t->mask);
        }
    }
    wp->ready &= ~me;
    wp->in_op |= me;
    if (op != active_mask_op && (wp->in_op & mask) == mask) {
        for (unsigned rest = mask; rest; rest &= rest - 1) {
            Thread* o = wp->lanes + __builtin_ctz(rest);
            if (o->op != op || o->mask != t->mask || (o->what != what && strcmp(o->what, what)))
                fail(
                    "lanes that wait for each other are in different operations: %s at %s:%d, mask "
                    "0x%08x, and in thread (%u,%u,%u) %s at %s:%d, mask 0x%08x",
                    what, base_name(file), line, t->mask, o->index.x, o->index.y, o->index.z,
                    o->what, base_name(o->file), o->line, o->mask);
        }
        op(wp->lanes, mask);
        wp->in_op &= ~mask;
        wp->ready |= mask;
    }
    wait_for_others(w);
}

// All threads of the block; returns how many came with a predicate that is not 0.
NOGPU_RAW inline int barrier(const char* what, int predicate, const char* file, int line) {
    Worker* w = worker;
    if (!w || !w->thread) fail("%s outside a kernel, %s:%d", what, base_name(file), line);
    Thread* t = w->thread;
    Warp* wp = t->warp;
    t->what = what;
    t->file = file;
    t->line = line;
    t->mask = 0;
    if (w->narrived++ == 0) {
        w->barrier_what = what;
        w->barrier_file = file;
        w->barrier_line = line;
        w->barrier_count = 0;
    } else if (w->barrier_line != line ||
               (w->barrier_what != what && strcmp(w->barrier_what, what)) ||
               (w->barrier_file != file && strcmp(w->barrier_file, file))) {
        fail(
            "divergent barrier: this thread is at %s, %s:%d, while others of its block wait at %s, "
            "%s:%d",
            what, base_name(file), line, w->barrier_what, base_name(w->barrier_file),
            w->barrier_line);
    }
    w->barrier_count += predicate != 0;
    wp->ready &= ~(1u << t->lane);
    wp->at_barrier |= 1u << t->lane;
    if (w->narrived == w->nthreads) {
        w->barrier_result = w->barrier_count;
        w->narrived = 0;
        for (int i = 0; i < w->nwarps; i++) {
            w->warps[i].at_barrier = 0;
            w->warps[i].ready = w->warps[i].exists;
        }
        w->ready_warps = w->nwarps == 32 ? ~0u : (1u << w->nwarps) - 1;
    }
    wait_for_others(w);
    // the next barrier cannot end before this thread has come to it, so the value is still there
    return w->barrier_result;
}

NOGPU_RAW inline void thread_ends(Worker* w) {
    Thread* t = w->thread;
    Warp* wp = t->warp;
    unsigned me = 1u << t->lane;
    for (unsigned rest = wp->in_op; rest; rest &= rest - 1) {
        Thread* o = wp->lanes + __builtin_ctz(rest);
        if (o->mask & me)
            fail("thread exits while thread (%u,%u,%u) waits for it in %s at %s:%d, mask 0x%08x",
                 o->index.x, o->index.y, o->index.z, o->what, base_name(o->file), o->line, o->mask);
    }
    wp->ready &= ~me;
    wp->done |= me;
    w->ndone++;
}

// A fiber runs one thread of a block after the other, for as long as the program lasts.
NOGPU_RAW inline void fiber_main(boost::context::detail::transfer_t came) {
    Worker* w = worker;
    Fiber* self = w->thread->fiber;
    arrived(self, came);
    for (;;) {
        w->launch->invoke(w->launch->call);
        thread_ends(w);
        Thread* next = nullptr;
        if (w->ndone < w->nthreads) {
            next = pick(w);
            if (!next) fail_stuck(w);
            if (!next->fiber) {  // not started yet: no switch at all
                next->fiber = self;
                set_current(w, next);
                continue;
            }
        }
        self->next = w->idle;
        w->idle = self;
        if (next)
            go_to(w, self, next);
        else
            jump(self, &w->main);  // the block is done
    }
}

// ---- shared memory. Every array is filled with 0xff (NaN in float and bf16, -1 in int) when a
// block first touches it, and has poisoned zones around it. It is aligned to what its declaration
// asks for and no more, so that a vector access that needs more is found.

inline char* guarded(size_t bytes, size_t align) {
    align = align < 8 ? 8 : align;  // AddressSanitizer works in units of 8 bytes
    size_t total = 2 * SHARED_REDZONE + 4 * align + bytes;
    char* p = (char*)malloc(total);
    size_t start = (size_t)p + SHARED_REDZONE + 2 * align;
    // the address is an odd multiple of align
    size_t at = start - start % (2 * align) + align - (size_t)p;
    ASAN_POISON_MEMORY_REGION(p, total);
    ASAN_UNPOISON_MEMORY_REGION(p + at, bytes);
    return p + at;
}
inline int shared_id(const char* name, size_t bytes, size_t align) {
    static std::mutex lock;
    std::lock_guard<std::mutex> guard(lock);
    std::vector<SharedSite>& sites = shared_sites();
    if (sites.empty()) sites.reserve(MAX_SHARED);  // other workers read it while it grows
    if (sites.size() == MAX_SHARED) fail("more than %d __shared__ declarations", MAX_SHARED);
    sites.push_back({name, bytes, align});
    return (int)sites.size() - 1;
}
inline void* shared_first_touch(Worker* w, int id) {
    const SharedSite& site = shared_sites()[id];
    Shared& s = w->shared[id];
    if (!s.data) s.data = guarded(site.bytes, site.align);
    w->static_bytes += site.bytes;
    if (w->static_bytes > DEFAULT_SHARED || w->static_bytes + w->launch->smem > max_shared())
        fail("too much shared memory: %zu bytes static, %zu dynamic", w->static_bytes,
             w->launch->smem);
    w->active[w->nactive++] = id;
    memset(s.data, 0xff, site.bytes);
    s.block = w->block_number;
    return s.data;
}
NOGPU_RAW inline void* shared(int id) {
    Worker* w = worker;
    if (!w || !w->thread) fail("a __shared__ variable outside a kernel");
    return w->shared[id].block == w->block_number ? w->shared[id].data : shared_first_touch(w, id);
}
inline void* dynamic_shared(size_t align) {
    if (!worker || !worker->thread) fail("extern __shared__ outside a kernel");
    if (align > 128) fail("extern __shared__ aligned to more than 128 bytes");
    return worker->dynamic;
}
inline bool in_shared(const void* p, size_t bytes) {
    Worker* w = worker;
    const char* c = (const char*)p;
    if (c >= w->dynamic && c + bytes <= w->dynamic + w->launch->smem) return true;
    for (int i = 0; i < w->nactive; i++) {
        const char* data = w->shared[w->active[i]].data;
        if (c >= data && c + bytes <= data + shared_sites()[w->active[i]].bytes) return true;
    }
    return false;
}

// ---- blocks and grids

inline Worker* this_worker() {
    if (worker) return worker;
    Worker* w = worker = new Worker();
    w->dynamic = guarded(max_shared(), 128);
#if !NOGPU_ASAN              // which brings its own
    stack_t alternate = {};  // a full fiber stack leaves no room to say so
    alternate.ss_size = 64 << 10;
    alternate.ss_sp = malloc(alternate.ss_size);
    sigaltstack(&alternate, nullptr);
#endif
    return w;
}
// what is the same for all blocks of a launch
inline void set_up(Worker* w, const Launch* l) {
    w->launch = l;
    w->nthreads = (int)(l->block.x * l->block.y * l->block.z);
    w->nwarps = (w->nthreads + 31) / 32;
    for (int i = 0; i < w->nthreads; i++) {
        Thread* t = w->threads + i;
        unsigned u = i;
        t->index = {u % l->block.x, u / l->block.x % l->block.y, u / l->block.x / l->block.y};
        t->lane = i % 32;
        t->warp = w->warps + i / 32;
    }
    for (int i = 0; i < w->nwarps; i++) {
        int lanes = w->nthreads - 32 * i;
        w->warps[i] = {lanes >= 32 ? ~0u : (1u << lanes) - 1, 0, 0, 0, 0, i, w->threads + 32 * i};
    }
    ASAN_POISON_MEMORY_REGION(w->dynamic, max_shared());
    ASAN_UNPOISON_MEMORY_REGION(w->dynamic, l->smem);
    blockDim = l->block;
    gridDim = l->grid;
}
inline void run_block(Worker* w, uint64_t b) {
    const Launch* l = w->launch;
    blockIdx = {(unsigned)(b % l->grid.x), (unsigned)(b / l->grid.x % l->grid.y),
                (unsigned)(b / l->grid.x / l->grid.y)};
    // so a block's order is the same however the blocks are spread
    w->random = mix(seed() ^ mix(l->number ^ mix(b)));
    w->block_number++;
    w->nactive = 0;
    w->static_bytes = 0;
    memset(w->dynamic, 0xff, l->smem);
    w->ndone = w->narrived = 0;
    for (int i = 0; i < w->nwarps; i++) {
        w->warps[i].ready = w->warps[i].exists;
        w->warps[i].done = 0;
    }
    w->ready_warps = w->nwarps == 32 ? ~0u : (1u << w->nwarps) - 1;
    for (int i = 0; i < w->nthreads; i++) {
        Thread* t = w->threads + i;
        t->fiber = nullptr;
        t->copies.clear();
        t->group = 0;
    }
    w->warp = w->warps + random_bit(w->ready_warps, random(w));
    go_to(w, &w->main, pick(w));
    w->thread = nullptr;
}
inline void run_grid(const Launch& l) {
    uint64_t blocks = (uint64_t)l.grid.x * l.grid.y * l.grid.z;
    if (blocks >= 1ull << 31)
        fail("kernel %s: a grid of %llu blocks is too much here", l.name,
             (unsigned long long)blocks);
    std::vector<unsigned> order(blocks);
    uint64_t r = mix(seed() ^ mix(l.number));
    for (uint64_t i = 0; i < blocks; i++) {  // a random order, made as it grows
        r = mix(r);
        uint64_t j = r % (i + 1);
        order[i] = order[j];
        order[j] = (unsigned)i;
    }
    open_device();
    // Most launches of a test are short. Only what is left after 5 ms is worth waking other
    // processors for.
    uint64_t first = 0;
    set_up(this_worker(), &l);
    for (double start = now(); first < blocks && now() - start < 0.005; first++)
        run_block(worker, order[first]);
    if (first < blocks) {
#ifdef _OPENMP
#pragma omp parallel
#endif
        {
            set_up(this_worker(), &l);
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
            for (uint64_t i = first; i < blocks; i++) run_block(worker, order[i]);
        }
    }
    close_device();
}

// ---- launches: translate.py turns kernel<<<grid, block, smem, stream>>>(arguments) into
// launch(config("kernel", grid, block, smem, stream), kernel, arguments).

inline thread_local cudaError_t last_error = cudaSuccess;
inline cudaError_t result(cudaError_t e) {
    if (e != cudaSuccess) last_error = e;
    return e;
}

// NOGPU_LAUNCHES names a file that gets a line for each launch, and for each product by cuBLAS: its
// name, its size.
inline void note_launch(const char* name, unsigned x, unsigned y, unsigned z, unsigned count) {
    static FILE* file = getenv("NOGPU_LAUNCHES") ? fopen(getenv("NOGPU_LAUNCHES"), "w") : nullptr;
    if (file) fprintf(file, "%s %u %u %u %u\n", name, x, y, z, count);
}

struct Config {
    const char* name;
    dim3 grid, block;
    size_t smem;
};
inline Config config(const char* name, dim3 grid, dim3 block, size_t smem = 0,
                     cudaStream_t = nullptr) {
    return {name, grid, block, smem};
}

template <class T>
void check_argument(const char* name, int number, const T& value) {
    if constexpr (std::is_pointer_v<T>) {
        Device& d = device();
        if (value && !is_device((const void*)value) && !in_map(d.pinned, (const void*)value) &&
            !in_map(d.symbols, (const void*)value))
            fail("kernel %s: argument %d is a host pointer", name, number);
    } else
        (void)name, (void)number, (void)value;
}

template <class... P>
struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
};

template <class... P, class... A>
void launch(const Config& c, void (*kernel)(P...), A&&... arguments) {
    static_assert(sizeof...(P) == sizeof...(A), "a launch must give every argument of the kernel");
    Device& d = device();
    const dim3 g = c.grid, b = c.block;
    if (!g.x || !g.y || !g.z || g.x >= 1u << 31 || g.y > 65535 || g.z > 65535 || !b.x || !b.y ||
        !b.z || b.x > 1024 || b.y > 1024 || b.z > 64 || (uint64_t)b.x * b.y * b.z > MAX_THREADS) {
        result(cudaErrorInvalidConfiguration);
        return;
    }
    auto max = d.max_dynamic.find((const void*)kernel);
    if (c.smem > (max == d.max_dynamic.end() ? DEFAULT_SHARED : max->second)) {
        result(cudaErrorInvalidValue);
        return;
    }
    Call<P...> call = {kernel, std::tuple<P...>(std::forward<A>(arguments)...)};
    std::apply(
        [&](const P&... p) {
            int number = 0;
            (check_argument(c.name, ++number, p), ...);
            (void)number;
        },
        call.arguments);
    auto invoke = [](const void* v) {
        const Call<P...>* k = (const Call<P...>*)v;
        std::apply(k->kernel, k->arguments);
    };
    note_launch(c.name, g.x, g.y, g.z, b.x * b.y * b.z);
    run_grid(Launch{c.name, g, b, c.smem, ++d.launches, invoke, &call});
}

// translate.py calls this at the start of a kernel that has __launch_bounds__.
inline void launch_bounds(unsigned threads) {
    if (blockDim.x * blockDim.y * blockDim.z > threads)
        fail("more threads in a block than __launch_bounds__(%u) allows", threads);
}

}  // namespace nogpu

#if NOGPU_ASAN
// AddressSanitizer calls this ahead of its own report
extern "C" inline __attribute__((used)) void __asan_on_error() {
    if (nogpu::reported) return;
    fflush(stdout);
    fprintf(stderr, "nogpu: error: AddressSanitizer found an access that is out of range\n");
    if (__asan_get_report_address()) nogpu::describe(__asan_get_report_address());
    nogpu::print_where();
}
#endif
// and UndefinedBehaviorSanitizer this
extern "C" inline __attribute__((used)) void __ubsan_on_report() {
    fflush(stdout);
    fprintf(stderr, "nogpu: error: UndefinedBehaviorSanitizer found an error\n");
    nogpu::print_where();
}

#include "nogpu_device.h"
#include "nogpu_host.h"
