// test_gpt2.cu: holds the CUDA trainer to the CPU trainer: tensor by tensor in many configurations,
// then over training runs.
//
//   make test_gpt2cu             for a GPU; make test_gpt2_nogpu for a CPU (dev/nogpu);
//                                PRECISION=FP32 for the other precision
//   ./test_gpt2cu [--list] [--figures] [NAME]
//                                the case called NAME, or all whose names contain it;
//                                --figures prints all
//
// A line for each case: the figure that came nearest to its bound, or beyond it. Both trainers
// start from the same weights, numbers that bf16 holds, all of them large enough to matter: biases,
// LayerNorm's weights, padded words too.

// All headers of both trainers stand here first: within the namespaces below, their guards leave
// nothing of them.
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <glob.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <new>
#include <set>
#include <sstream>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <curand_kernel.h>

#define TESTING
namespace cpu {
#include "train_gpt2_compact.cpp"
}

// ---- two streams under nogpu, which runs everything at once: here the second one is as late and
// as early as it may be on a GPU. Late: its copies are made when something waits for them. Early: a
// copy has to have waited for all that the first stream was given before it, or the two could meet.

#ifdef __NOGPU__
struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    cudaMemcpyKind kind;
    cudaEvent_t recorded;  // not a copy: an event that comes to pass here
};
static std::vector<Copy> copies;  // of the second stream, not yet made
// Work of the first stream, and how much of it the second one has waited for.
static int64_t given, waited_for;
static std::map<cudaEvent_t, int64_t> events;  // of the first stream: the work before them

static cudaError_t make_copies(size_t count) {
    cudaError_t status = cudaSuccess;
    for (size_t i = 0; i < count && status == cudaSuccess; i++) {
        const Copy& c = copies[i];
        if (!c.recorded) status = cudaMemcpy(c.to, c.from, c.bytes, c.kind);
    }
    copies.erase(copies.begin(), copies.begin() + count);
    return status;
}

static cudaError_t copy_on_stream(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                  cudaStream_t stream = nullptr) {
    if (!stream) return given++, cudaMemcpyAsync(to, from, bytes, kind);
    if (waited_for < given)
        cpu::fail("a copy on the second stream has not waited for the first one's work");
    copies.push_back({to, from, bytes, kind, nullptr});
    return cudaSuccess;
}

static cudaError_t record_on_stream(cudaEvent_t event, cudaStream_t stream = nullptr) {
    if (stream)
        copies.push_back({nullptr, nullptr, 0, cudaMemcpyDefault, event});
    else
        events[event] = given;
    return cudaSuccess;
}

static cudaError_t wait_on_stream(cudaStream_t stream, cudaEvent_t event, unsigned) {
    if (stream) return waited_for = std::max(waited_for, events[event]), cudaSuccess;
    size_t count = copies.size();
    while (count > 0 && copies[count - 1].recorded != event) count--;
    return make_copies(count);
}

static cudaError_t wait_for_all() {
    cudaError_t status = make_copies(copies.size());
    return status == cudaSuccess ? cudaDeviceSynchronize() : status;
}

static cudaError_t count_kernel() { return given++, cudaGetLastError(); }

#define cudaMemcpyAsync copy_on_stream
#define cudaEventRecord record_on_stream
#define cudaStreamWaitEvent wait_on_stream
#define cudaDeviceSynchronize wait_for_all
#define cudaGetLastError count_kernel
#endif
namespace gpu {
#include "train_gpt2_compact.cu"
}
#ifdef __NOGPU__
#undef cudaMemcpyAsync
#undef cudaEventRecord
#undef cudaStreamWaitEvent
#undef cudaDeviceSynchronize
#undef cudaGetLastError
#endif

using gpu::check;  // for the macros CUDA and LAUNCHED
typedef std::vector<float> Floats;

// ---- bounds, relative to the norm of what they are about

struct Bounds {
    double activation, gradient;  // norm of a tensor's difference over its norm
    double moment,
        moved;      // the same for Adam's moments, and for what the steps have added to the weights
    double norm;    // of all gradients
    double normal;  // of a projection, in units of its standard deviation
    double curve;   // losses over a hundred steps, absolute
    double rounded;  // the share of weights rounded at random that become another number
};

// log, sin and cos are other code than the CPU's; on a GPU cuRAND takes the fast ones, whose
// absolute error is 2^-20 or so.
#ifdef __NOGPU__
static const double NORMAL_ERROR = 1.0 / (1 << 18);
#else
static const double NORMAL_ERROR = 1.0 / (1 << 16);
#endif

// A rounding to p bits errs by 2^-p at most, and by about 0.4 * 2^-p in the root of the mean
// square; k of them in a row by sqrt(k) times that.
#ifdef PRECISION_FP32
// p = 24: a sum of n terms in another order differs by about sqrt(n) 2^-24, 5e-6 for the longest
// here, and rarely more than some such stand in a row. Then Adam: an element whose gradient is all
// but zero steps by noise over --eps.
static const Bounds bounds = {2e-5, 2e-5, 5e-5, 2e-4, 3e-5, NORMAL_ERROR, 1e-4, 2e-3};
#else
// p = 8: 0.0016 for each tensor written in bf16. Forward some 10 of them stand in a row (0.005, as
// is seen), backward twice as many, and the gradient of the stream is rounded again and again. Adam
// makes steps of equal size of gradients large and small, thus of errors. What is wrong errs more:
// a scale by several percent, a bias or a head left out by tens of them.
static const Bounds bounds = {0.02, 0.03, 0.05, 0.1, 0.02, NORMAL_ERROR, 0.02, 0.06};
#endif
// Of codes as many differ as an activation's error spans, a quarter of its bound or less. int8: the
// largest of a group, about 3 times its root mean square, is 127 of them; bf16 rounds the scale,
// too. 2 bits: fch near one of the cuts, that is near 0, where it has a density of 0.4 at most,
// being about 1 itself. A code of int8 that differs is off by 1/40 of its group's root mean square,
// attention's scores, which are about 2, treble that, and there are three such tensors in its
// backward pass. fch's slope is off by 1.1 where it is 0.75 in the root of the mean square, and two
// layers add up. So the gradients are off by the root of the share that differs, times:
static const double CODES = 20, BITS = 0.25, FLIPPED_CODE = 1.0 / 7, FLIPPED_BIT = 2;
// Weights without master copies differ by the distance of neighbours, 2^-8 to 2^-7 of themselves,
// where they do; attention as above makes more of it.
static const double ROUNDED = sqrt(bounds.rounded) / 64;
// A row by itself (a token, a word, an output) may err more than the tensor: the worst of thousands
// of normal errors is 4 of their standard deviations off.
static const double ROW = 5;

// ---- the report

static FILE* report;  // the trainers' own lines on standard output go nowhere
static bool show_figures;

struct Worst {
    double ratio, figure, bound;
    std::string what;
};
static Worst worst;

// A figure and its bound; NaN is beyond any.
static void expect(const std::string& what, double figure, double bound) {
    double ratio = figure == 0 ? 0 : fabs(figure) / bound;
    if (std::isnan(ratio)) ratio = INFINITY;
    if (show_figures || ratio > 1)
        fprintf(report, "    %-44s %9.2e of %9.2e\n", what.c_str(), figure, bound);
    if (worst.what.empty() || ratio > worst.ratio) worst = {ratio, figure, bound, what};
}

static void expect_equal(const std::string& what, const Floats& got, const Floats& want) {
    int64_t differ = got.size() != want.size();
    for (size_t i = 0; !differ && i < got.size(); i++)
        differ += memcmp(&got[i], &want[i], sizeof(float)) != 0;
    expect(what + ": bits that differ", double(differ), 0);
}

// got against want in rows of `row` numbers. A row is measured against its own size, or a typical
// row's where it is smaller: what cancels out in a sum leaves the rounding of its parts. Rounding
// is noise, it turns a tensor rather than scales it: so the cosine is held more closely than the
// norm of the difference would hold it, which is to bound^2 / 2.
static void expect_close(const std::string& what, const Floats& got, const float* want, int64_t row,
                         double bound) {
    double difference = 0, size = 0, got_size = 0, dot = 0, worst_row = 0;
    std::vector<double> row_difference(got.size() / row), row_size(got.size() / row);
    for (size_t i = 0; i < got.size(); i++) {
        double d = double(got[i]) - want[i], w = double(want[i]) * want[i];
        difference += d * d, size += w, got_size += double(got[i]) * got[i],
            dot += double(got[i]) * want[i];
        row_difference[i / row] += d * d, row_size[i / row] += w;
    }
    if (size == 0) return expect(what + ", zeros", sqrt(difference), 0);
    expect(what, sqrt(difference / size), bound);
    if (gpu::IS_BF16)
        expect(what + ", 1 - cosine", 1 - dot / sqrt(size * got_size), bound * bound / 4);
    double typical = size / row_size.size();
    for (size_t i = 0; i < row_size.size(); i++)
        worst_row = std::max(worst_row, sqrt(row_difference[i] / std::max(row_size[i], typical)));
    expect(what + ", worst row", worst_row, ROW * bound);
}

// Codes differ where what they stand for lies between two of them. Returns the share that does,
// which is to be no more than `bound`, a single one aside; and that of those that are not next to
// each other but a small part of that.
static double expect_codes(const std::string& what, const Floats& got, const Floats& want,
                           double bound) {
    double differ = 0, far = 0, count = double(got.size());
    for (size_t i = 0; i < got.size(); i++)
        differ += !(got[i] == want[i]), far += !(fabs(got[i] - want[i]) <= 1);
    expect(what + ", share that differs", differ / count, bound + 1 / count);
    expect(what + ", share that is not next to it", far / count, bound / 20 + 1 / count);
    return differ / count;
}

// ---- what is compared: a model on each side

const int PAPER = 1 << gpu::QKV | 1 << gpu::FC | 1 << gpu::FCPROJ, ALL = PAPER | 1 << gpu::ATTPROJ;
const int SEED = 11;

struct Setup {
    const char* name;
    int B, T, C, NH, L, V, Vp;
    double rank;
    int compress, projection, moments, gap, recompute, micros, steps;
    int savings = 0;  // of memory: any of these
    int optimizer = gpu::ADAMW;
};
enum {
    TWO_BITS = 1,
    INT8 = 2,
    NO_MASTER = 4,
    OFFLOAD = 8,
    GENERATES = 16
};  // the fourth on the GPU alone

// lr and weight decay are large: a few steps move the weights, and decay is a good part of it.
// Without master weights a step is shorter than the way to a weight's neighbour, so that it is for
// the random bits to say which of the two it becomes.
template <class Options>
static void set_options(Options& o, const Setup& u) {
    o.batch = u.B, o.seq = u.T, o.total_batch = u.micros * u.B * u.T;
    o.rank = u.rank, o.compress = u.compress, o.projection = u.projection, o.gap = u.gap;
    o.moments = u.moments, o.optimizer = u.optimizer;
    o.recompute = u.recompute, o.seed = SEED;
    if (u.savings & TWO_BITS) o.gelu = gpu::GELU_2BIT;
    if (u.savings & INT8) o.tape = gpu::TAPE_INT8;
    if (u.savings & NO_MASTER) o.master = gpu::MASTER_NONE;
    o.generates = u.savings & GENERATES;
    o.alpha = 0.7, o.lr = u.savings & NO_MASTER ? 2e-4 : 2e-3, o.weight_decay = 1, o.clip = 0.5,
    o.eps = 1e-4;
}

template <class Tensor>
static char* data_of(const Tensor& t) {
    char* data;
    memcpy(&data, t.home, sizeof(data));
    return data;
}

struct Cpu {
    cpu::Model s;
    cpu::Plan plan;
    explicit Cpu(const Setup& u) {
        cpu::Options o;
        set_options(o, u);
        plan = cpu::model_plan(s, {u.T + 3, u.V, u.L, u.NH, u.C, u.Vp}, o);
        cpu::model_allocate(s, plan);
    }
    Cpu(const Cpu&) = delete;
    ~Cpu() {
        std::string category;
        for (const cpu::Tensor& t : plan.tensors) {
            if (t.category != category) free(data_of(t));  // an arena begins with its first tensor
            category = t.category;
        }
    }
};

// All that a step has to write before it reads it begins as NaN. Under nogpu, too, each tensor
// stands alone, so that AddressSanitizer sees a step out of one into the next; gradients stay
// together, since the norm takes them for one. One at a time: the trainer has one handle of cuBLAS.
struct Gpu {
    gpu::Model s;
    gpu::Plan plan;
    std::vector<void*> memory, pinned;  // of the device, of the host
    explicit Gpu(const Setup& u, [[maybe_unused]] bool apart = true) {
        gpu::Options o;
        set_options(o, u);
        o.offload = u.savings & OFFLOAD;
        plan = gpu::model_plan(s, {u.T + 3, u.V, u.L, u.NH, u.C, u.Vp}, o);
        gpu::model_allocate(s, plan);
        for (const std::string& category : plan.categories()) {
            bool host = category == "host", arena = true, alone = false;
#ifdef __NOGPU__
            alone = apart && category != "gradients";
#endif
            for (const gpu::Tensor& t : plan.tensors) {
                if (t.category != category || t.type == "byte")
                    continue;  // or a gap, which has no place of its own
                char* data = data_of(t);
                if (arena) (host ? pinned : memory).push_back(data);
                arena = false;
                if (alone) {
                    CUDA(host ? cudaMallocHost((void**)&data, t.bytes())
                              : cudaMalloc((void**)&data, t.bytes()));
                    memcpy(t.home, &data, sizeof(data));
                    (host ? pinned : memory).push_back(data);
                }
                if (host)
                    memset(data, 0xFF, t.bytes());
                else
                    CUDA(cudaMemset(data, category == "moments" ? 0 : 0xFF, t.bytes()));
            }
        }
        for (int i = 0; i < gpu::PARAMS && !gpu::IS_BF16; i++) s.master[i] = (float*)s.params[i];
        for (void* data : {(void*)s.inputs, (void*)s.targets, (void*)s.sorted, (void*)s.losses})
            pinned.push_back(data);
    }
    Gpu(const Gpu&) = delete;
    ~Gpu() {
        for (void* data : memory) cudaFree(data);
        for (void* data : pinned) cudaFreeHost(data);
        for (int i = 0; i < 2 && s.options.offload; i++)
            cudaEventDestroy(s.computed[i]), cudaEventDestroy(s.copied[i]);
        if (s.options.offload) cudaStreamDestroy(s.copies);
        cublasDestroy(gpu::cublas);
    }
};

static const cpu::Tensor& tensor_of(const cpu::Plan& plan, const std::string& name) {
    for (const cpu::Tensor& t : plan.tensors) {
        if (t.name == name) return t;
    }
    cpu::fail("the CPU trainer has no tensor " + name);
}

static Floats fetch(const gpu::Tensor& t) {
    Floats out(t.count());
    gpu::visit(t, 0, t.count(), false, [&](const float* from, int64_t at, int64_t n) {
        std::copy(from, from + n, out.begin() + at);
    });
    return out;
}

static Floats fetch(const cpu::Tensor& t) {
    Floats out(t.count());
    cpu::visit(t, 0, t.count(), false, [&](const float* from, int64_t at, int64_t n) {
        std::copy(from, from + n, out.begin() + at);
    });
    return out;
}

// The GPU's tensors of some categories, one after the other.
static Floats fetch_all(const gpu::Plan& plan, std::initializer_list<const char*> categories) {
    Floats all;
    for (const gpu::Tensor& t : plan.tensors) {
        bool wanted = t.type != "byte" && std::find(categories.begin(), categories.end(),
                                                    t.category) != categories.end();
        if (!wanted) continue;
        Floats one = fetch(t);
        all.insert(all.end(), one.begin(), one.end());
    }
    return all;
}

// Weights that make every part count: the streams of about 1 / sqrt(C), where LayerNorm's epsilon
// shows, everything after it of about 1; attention that prefers some keys, biases and LayerNorm's
// weights that differ, padded words that are not zero.
static void set_cpu_weights(Cpu& c) {
    for (int i = 0; i < cpu::PARAMS; i++) {
        const cpu::ParamRow& row = cpu::param_rows[i];
        bool norm = i == cpu::LN1W || i == cpu::LN2W || i == cpu::LNFW;
        float scale = row.columns == 0 ? 0.3f : 1 / sqrtf(float(row.columns * c.s.config.C));
        int64_t count = cpu::param_count(c.s.config, i);
        cpu::draw_normals(c.s.params[i], 0, count, i == cpu::QKVW ? 1.5f * scale : scale, SEED,
                          cpu::stream_of(99, i, 0));
        for (int64_t j = 0; j < count; j++) {
            float x = c.s.params[i][j] + (norm ? 1.0f : 0.0f);
            c.s.params[i][j] = gpu::IS_BF16 ? cpu::float_of_bf16(cpu::bf16_of_float(x)) : x;
        }
    }
    cpu::model_round(c.s);
}

static void copy_weights(Gpu& g, const Cpu& c) {
    int i = 0;
    for (const gpu::Tensor& t : gpu::weights_of(g.plan)) {
        const float* from = c.s.params[i++];
        gpu::visit(t, 0, t.count(), true, [&](float* to, int64_t at, int64_t n) {
            std::copy(from + at, from + at + n, to);
        });
    }
    gpu::model_round(g.s);
}

// Tokens of micro batch `number`: some occur often, most do not.
static int token(const Setup& u, uint64_t number, int i) {
    cpu::Words w = cpu::philox(SEED, 77, number << 32 | i);
    return int(w.x % (w.y % 4 == 0 ? 3 : u.V));
}

template <class Model>
static void set_tokens(Model& s, const Setup& u, uint64_t number, int N) {
    for (int i = 0; i < N; i++) {
        s.inputs[i] = token(u, number, i);
        s.targets[i] = token(u, number, i + 1);
    }
}

// ---- one optimizer step against the CPU's, tensor by tensor, and ten of them

static void compare_losses(const Gpu& g, const Cpu& c, const std::string& what, int N,
                           double bound = bounds.activation / 2) {
    gpu::model_wait();
    expect_close(what, Floats(g.s.losses, g.s.losses + N), c.s.losses, 1, bound);
}

// Tensors of a category that are on both sides: under one name, in one shape.
static void compare_category(const Gpu& g, const Cpu& c, const std::string& category,
                             const Setup& u, double bound) {
    int found = 0, wanted = 0;
    for (const cpu::Tensor& t : c.plan.tensors) wanted += t.category == category;
    for (const gpu::Tensor& t : g.plan.tensors) {
        if (t.category != category || t.type == "byte") continue;
        const cpu::Tensor& other = tensor_of(c.plan, t.name);
        if (other.shape != t.shape) gpu::fail(t.name + " differs in shape");
        int64_t row = t.name == "lse" ? u.T : t.shape.size() > 1 ? t.shape.back() : t.count();
        if (t.bits() >= 16) expect_close(t.name, fetch(t), fetch(other).data(), row, bound);
        found++;
    }
    expect(category + ": tensors of the CPU that the GPU has not", wanted - found, 0);
}

// The tape's codes, made of activations that differ by no more than `activation`. Returns the
// relative error that those which differ bring to the gradients.
static double compare_codes(const Gpu& g, const Cpu& c, const std::string& when,
                            double activation) {
    double error = 0;
    for (const gpu::Tensor& t : g.plan.tensors) {
        if (t.type != "2bit" && t.type != "int8") continue;
        bool bits = t.type == "2bit";
        double share = expect_codes(when + t.name, fetch(t), fetch(tensor_of(c.plan, t.name)),
                                    (bits ? BITS : CODES) * activation);
        error = std::max(error, (bits ? FLIPPED_BIT : FLIPPED_CODE) * sqrt(share));
    }
    return error;
}

// P itself: signs are equal, normals apart from the rounding to bf16.
static void compare_projections(Gpu& g, Cpu& c, const std::string& when) {
    for (int which = 0; which < gpu::LINEARS; which++) {
        for (int layer = 0; g.s.linear[which].compressed() && layer < g.s.config.L; layer++) {
            Floats got = gpu::model_projection(g.s, which, layer),
                   want = cpu::model_projection(c.s, which, layer);
            double worst_one = 0, unit = 1 / sqrt(double(g.s.linear[which].r));
            bool gaussian = g.s.options.projection == gpu::GAUSSIAN;
            for (size_t i = 0; i < got.size(); i++) {
                double exact = gaussian || !gpu::IS_BF16
                                   ? want[i]
                                   : cpu::float_of_bf16(cpu::bf16_of_float(want[i]));
                double free = gaussian && gpu::IS_BF16 ? fabs(exact) / 256 : 0;
                worst_one = std::max(worst_one, (fabs(got[i] - exact) - free) / unit);
                if (std::isnan(got[i])) worst_one = NAN;
            }
            expect(when + gpu::param_rows[gpu::weight_of(which)].name + "." + gpu::join(layer),
                   worst_one, gaussian ? bounds.normal : 0);
        }
    }
}

static void tensors(const Setup& u) {
    Cpu c(u);
    Gpu g(u);
    Bounds b = bounds;
    double flipped = 0;
    int N = u.B * u.T;
    set_cpu_weights(c);
    copy_weights(g, c);
    std::vector<Floats> start;
    for (const gpu::Tensor& t : gpu::weights_of(g.plan)) start.push_back(fetch(t));
    for (int step = 0; step < u.steps; step++) {
        std::string when = "step " + gpu::join(step) + " ";
        gpu::model_begin_step(g.s, step);
        cpu::model_begin_step(c.s, step);
        for (int micro = 0; micro < u.micros; micro++) {
            set_tokens(g.s, u, step * u.micros + micro, N);
            set_tokens(c.s, u, step * u.micros + micro, N);
            gpu::model_accumulate(g.s, u.B, u.T, micro == 0, 1.0f / (u.micros * N));
            cpu::model_accumulate(c.s, u.B, u.T, micro == 0, 1.0f / (u.micros * N));
            compare_losses(g, c, when + "losses", N, b.activation / 2);
            if (gpu::IS_BF16 && step > 0)
                continue;  // the weights that compute are rounded on one side only by now
            flipped = std::max(flipped, compare_codes(g, c, when, b.activation));
        }
        if (step == 0) {
            compare_category(g, c, "tape", u, b.activation + (u.savings & INT8 ? flipped : 0));
            compare_category(g, c, "gradients", u, b.gradient + flipped);
        }
        if (step % u.gap == 0) compare_projections(g, c, when + "P ");
        double got = gpu::model_update(g.s, g.plan, step, g.s.options.lr),
               want = cpu::model_update(c.s, c.plan, step, c.s.options.lr);
        expect(when + "norm", fabs(got - want) / want, b.norm + flipped);
        if (u.savings & NO_MASTER)
            b.activation = bounds.activation + ROUNDED, b.norm = bounds.norm + ROUNDED;
    }
    if (u.savings & NO_MASTER) flipped += ROUNDED;
    compare_category(g, c, "moments", u, b.moment + 2 * flipped);
    int i = 0;
    for (const gpu::Tensor& t : gpu::weights_of(g.plan)) {
        Floats got = fetch(t), want = fetch(tensor_of(c.plan, gpu::param_rows[i].name));
        for (size_t j = 0; j < got.size(); j++) {
            bool key_bias =
                i == gpu::QKVB &&
                int(j) / u.C % 3 == 1;  // its gradient is 0: softmax does not see it; noise only
            got[j] = key_bias ? 0 : got[j] - start[i][j],
            want[j] = key_bias ? 0 : want[j] - start[i][j];
        }
        if (u.savings & NO_MASTER) {
            double slack = (b.moved + 2 * flipped) * g.s.options.lr * u.steps;
            for (size_t j = 0; j < got.size();
                 j++) {  // 0: alike but for what the steps differ by, 1: neighbours, 2: neither
                double apart = fabs(double(got[j]) - want[j]), w = start[i][j],
                       step = fabs(w + got[j]) / 128;
                got[j] = apart <= slack ? 0.0f : apart <= slack + step ? 1.0f : 2.0f;
                want[j] = 0;
            }
            expect_codes(t.name + " rounded", got, want, bounds.rounded);
        } else {
            expect_close(t.name + " moved", got, want.data(), got.size(), b.moved + 2 * flipped);
        }
        i++;
    }
    if (!gpu::IS_BF16 || u.savings & NO_MASTER) return;
    Floats master = fetch_all(g.plan, {"master"});
    for (float& x : master) x = cpu::float_of_bf16(cpu::bf16_of_float(x));
    expect_equal("the rounded weights", fetch_all(g.plan, {"parameters"}), master);
}

// Heads of 64 are the tensor cores' in bf16, all others and fp32 the plain kernels'. T ends inside
// a tile of 64 or of 128, on it, one beyond; C, V and the ranks are odd in some rows; the last rows
// have GPT-2's own widths. 5 updates with --gap 2, and 3 with --gap 1, cross two epochs.
static const Setup setups[] = {
    // name, B, T, C, NH, L, V, Vp, rank, compress, projection, moments, gap, recompute, micros,
    // steps, savings
    {"full-rank", 1, 64, 128, 2, 2, 257, 384, 1.0, PAPER, gpu::GAUSSIAN, gpu::KEEP, 4, 0, 1, 3},
    {"full-rank-level-2", 2, 17, 64, 1, 2, 257, 257, 1.0, PAPER, gpu::GAUSSIAN, gpu::KEEP, 2, 2, 2,
     5},
    {"gaussian-keep-level-1", 1, 33, 64, 1, 2, 257, 257, 1.0 / 4, PAPER, gpu::GAUSSIAN, gpu::KEEP,
     2, 1, 1, 5},
    {"gaussian-move", 1, 65, 128, 2, 2, 257, 320, 1.0 / 2, PAPER, gpu::GAUSSIAN, gpu::MOVE, 1, 0, 1,
     3},
    {"gaussian-reset-level-2-all", 1, 33, 64, 1, 2, 256, 256, 1.0 / 8, ALL, gpu::GAUSSIAN,
     gpu::RESET, 2, 2, 1, 5},
    {"gaussian-odd", 3, 11, 48, 3, 2, 61, 64, 0.1, ALL, gpu::GAUSSIAN, gpu::MOVE, 1, 0, 2, 3},
    {"gaussian-rank-1", 1, 33, 64, 2, 2, 257, 257, 1.0 / 64, ALL, gpu::GAUSSIAN, gpu::MOVE, 1, 1, 1,
     3},
    {"rademacher-keep-level-2", 1, 65, 64, 1, 2, 257, 257, 1.0 / 4, PAPER, gpu::RADEMACHER,
     gpu::KEEP, 1, 2, 1, 3},
    {"rademacher-move-all", 2, 17, 64, 1, 2, 257, 384, 1.0 / 8, ALL, gpu::RADEMACHER, gpu::MOVE, 2,
     0, 1, 5},
    {"rademacher-rank-3", 2, 17, 48, 3, 2, 257, 257, 3, PAPER, gpu::RADEMACHER, gpu::RESET, 1, 1, 1,
     3},
    {"sparse-keep-all", 1, 100, 64, 1, 2, 257, 257, 1.0 / 2, ALL, gpu::SPARSE, gpu::KEEP, 1, 0, 1,
     3},
    {"sparse-move-level-2", 1, 33, 128, 2, 2, 257, 384, 1.0 / 4, PAPER, gpu::SPARSE, gpu::MOVE, 2,
     2, 1, 5},
    {"sparse-reset-level-1-all", 1, 33, 64, 1, 2, 257, 257, 1.0 / 8, ALL, gpu::SPARSE, gpu::RESET,
     2, 1, 2, 5},
    {"sparse-odd", 3, 11, 48, 3, 2, 61, 64, 0.1, ALL, gpu::SPARSE, gpu::MOVE, 1, 0, 2, 3},
    {"sparse-rank-1", 1, 33, 64, 2, 2, 257, 257, 1.0 / 64, ALL, gpu::SPARSE, gpu::KEEP, 1, 1, 1, 3},
    {"one-token", 3, 1, 64, 1, 2, 257, 257, 1.0 / 4, PAPER, gpu::GAUSSIAN, gpu::KEEP, 1, 0, 1, 3},
    {"level-3", 2, 17, 64, 1, 2, 257, 257, 1.0, PAPER, gpu::GAUSSIAN, gpu::KEEP, 2, 3, 2, 3},
    {"level-4-gaussian-odd", 3, 11, 48, 3, 2, 61, 64, 0.1, ALL, gpu::GAUSSIAN, gpu::KEEP, 2, 4, 1,
     3},
    {"level-5-sparse-all", 1, 65, 64, 1, 2, 257, 257, 1.0 / 4, ALL, gpu::SPARSE, gpu::KEEP, 1, 5, 1,
     2},
    {"2bit", 2, 17, 64, 1, 2, 257, 257, 1.0, PAPER, gpu::GAUSSIAN, gpu::KEEP, 1, 0, 1, 3, TWO_BITS},
    {"2bit-level-2-sparse-odd", 3, 11, 48, 3, 2, 61, 64, 0.1, ALL, gpu::SPARSE, gpu::MOVE, 2, 2, 2,
     3, TWO_BITS},
    {"int8", 2, 17, 64, 1, 2, 257, 257, 1.0, PAPER, gpu::GAUSSIAN, gpu::KEEP, 1, 0, 1, 3, INT8},
    {"int8-level-4-odd", 3, 11, 48, 3, 2, 61, 64, 0.1, ALL, gpu::GAUSSIAN, gpu::MOVE, 2, 4, 2, 3,
     INT8},
    {"int8-level-5-sparse", 1, 65, 64, 1, 2, 257, 257, 1.0 / 4, PAPER, gpu::SPARSE, gpu::KEEP, 1, 5,
     1, 2, INT8},
    {"no-master", 2, 17, 64, 1, 2, 257, 257, 1.0, PAPER, gpu::GAUSSIAN, gpu::KEEP, 1, 0, 1, 3,
     NO_MASTER},
    {"no-master-gaussian-level-3", 2, 17, 64, 1, 2, 257, 257, 1.0 / 4, PAPER, gpu::GAUSSIAN,
     gpu::MOVE, 2, 3, 1, 3, NO_MASTER},
    {"no-master-rademacher", 2, 17, 64, 1, 2, 257, 257, 1.0 / 4, PAPER, gpu::RADEMACHER, gpu::KEEP,
     1, 0, 1, 3, NO_MASTER},
    {"no-master-sparse-odd", 3, 11, 48, 3, 2, 61, 64, 0.1, ALL, gpu::SPARSE, gpu::RESET, 1, 0, 1, 3,
     NO_MASTER},
    {"saving-all", 1, 33, 64, 1, 2, 257, 257, 1.0 / 4, ALL, gpu::SPARSE, gpu::KEEP, 1, 2, 2, 2,
     TWO_BITS | INT8 | NO_MASTER},
    {"saving-all-level-5", 1, 33, 64, 1, 2, 257, 257, 1.0 / 4, PAPER, gpu::GAUSSIAN, gpu::KEEP, 1,
     5, 2, 2, INT8 | NO_MASTER},
    {"heads-of-64", 2, 130, 192, 3, 1, 61, 61, 1.0 / 4, PAPER, gpu::SPARSE, gpu::KEEP, 1, 0, 1, 1},
    {"heads-of-160", 1, 150, 320, 2, 1, 61, 61, 1.0 / 4, PAPER, gpu::SPARSE, gpu::KEEP, 1, 0, 1, 1},
    {"heads-of-8", 2, 260, 24, 3, 1, 61, 61, 1.0, PAPER, gpu::GAUSSIAN, gpu::KEEP, 1, 0, 1, 1},
    {"two-chunks", 130, 8, 16, 1, 1, 61, 64, 1.0 / 4, PAPER, gpu::SPARSE, gpu::KEEP, 1, 0, 1, 1},
    {"many-words", 1, 21, 16, 2, 1, 9001, 9088, 1.0, PAPER, gpu::GAUSSIAN, gpu::KEEP, 1, 0, 1, 2},
    {"width-of-d12", 1, 12, 768, 12, 1, 61, 64, 1.0 / 8, PAPER, gpu::GAUSSIAN, gpu::MOVE, 1, 0, 1,
     2},
    {"width-of-d12-sparse", 1, 12, 768, 12, 1, 61, 64, 1.0 / 2, ALL, gpu::SPARSE, gpu::KEEP, 1, 2,
     1, 1},
    {"width-of-d48", 1, 5, 1600, 25, 1, 61, 64, 1.0 / 64, PAPER, gpu::SPARSE, gpu::KEEP, 1, 0, 1,
     1},
    {"muon-full-rank", 2, 65, 64, 1, 2, 257, 257, 1.0, PAPER, gpu::GAUSSIAN, gpu::KEEP, 4, 2, 1, 3,
     0, gpu::MUON},
    {"muon-gaussian-move", 1, 65, 64, 1, 2, 257, 257, 1.0 / 4, PAPER, gpu::GAUSSIAN, gpu::MOVE, 1,
     0, 1, 3, 0, gpu::MUON},
    {"muon-sparse-odd", 3, 11, 48, 3, 2, 61, 64, 0.1, ALL, gpu::SPARSE, gpu::KEEP, 2, 0, 2, 3, 0,
     gpu::MUON},
    {"muon-no-master", 2, 33, 64, 1, 2, 257, 257, 1.0 / 4, PAPER, gpu::SPARSE, gpu::RESET, 1, 0, 1,
     3, NO_MASTER, gpu::MUON},
#ifndef __NOGPU__
    {"long", 2, 1024, 128, 2, 2, 257, 257, 1.0 / 4, PAPER, gpu::GAUSSIAN, gpu::KEEP, 4, 0, 1, 10},
    {"long-plain", 1, 1024, 96, 2, 2, 257, 257, 1.0 / 4, PAPER, gpu::SPARSE, gpu::KEEP, 4, 2, 1,
     10},
#endif
};

// ---- what must be equal bit for bit on the GPU

const Setup small = {"",        2, 33, 64, 1, 2, 257, 384, 1.0 / 4, PAPER, gpu::GAUSSIAN,
                     gpu::MOVE, 2, 0,  1,  0};
// Tensors end between 256 bytes.
const Setup odd = {"", 3, 21, 48, 3, 2, 61, 61, 0.1, ALL, gpu::SPARSE, gpu::MOVE, 2, 0, 2, 0};
// All that saves memory; of five layers' tapes three wait on the host.
const Setup saving = {"",
                      1,
                      14,
                      32,
                      2,
                      5,
                      61,
                      61,
                      1.0 / 4,
                      ALL,
                      gpu::SPARSE,
                      gpu::RESET,
                      2,
                      2,
                      2,
                      0,
                      TWO_BITS | INT8 | NO_MASTER | OFFLOAD};

static void start_gpu(Gpu& g, const Setup& u) {
    Cpu c(u);
    set_cpu_weights(c);
    copy_weights(g, c);
}

// Steps [first, last) of a run; returns the losses of all micro batches. An evaluation after each
// of them is to change nothing.
static Floats train(Gpu& g, const Setup& u, int first, int last, bool evaluations = false) {
    Floats losses;
    for (int step = first; step < last; step++) {
        gpu::model_begin_step(g.s, step);
        for (int micro = 0; micro < u.micros; micro++) {
            set_tokens(g.s, u, step * u.micros + micro, u.B * u.T);
            gpu::model_accumulate(g.s, u.B, u.T, micro == 0, 1.0f / (u.micros * u.B * u.T));
            gpu::model_wait();
            losses.insert(losses.end(), g.s.losses, g.s.losses + u.B * u.T);
            if (evaluations)
                set_tokens(g.s, u, 99, u.T), gpu::model_evaluate(g.s, 1, u.T), gpu::model_wait();
        }
        if (u.steps == 0) gpu::model_update(g.s, g.plan, step, g.s.options.lr);
    }
    return losses;
}

// Recomputation gives the gradients that the whole tape gives.
static void levels(Setup u) {
    Floats losses, gradients;
    u.steps = 1;  // no update: gradients stay
    for (u.recompute = 0;
         u.recompute < (u.savings & TWO_BITS ? gpu::tape_rows[gpu::FCH].gone_from : gpu::NEVER);
         u.recompute++) {
        Gpu g(u);
        start_gpu(g, u);
        Floats now = train(g, u, 0, 1);
        if (u.recompute == 0) losses = now, gradients = fetch_all(g.plan, {"gradients"});
        expect_equal("losses at level " + gpu::join(u.recompute), now, losses);
        expect_equal("gradients at level " + gpu::join(u.recompute),
                     fetch_all(g.plan, {"gradients"}), gradients);
    }
}

// The layers whose tape waits on the host have the gradients that they have on the device, at any
// level, whatever the tape keeps and how; evaluations in between are not in the way. Of one layer
// or two none has to wait.
static void offload(int layers) {
    Setup u = {"", 1, 5, 16, 2, layers, 61, 61, 1.0, PAPER, gpu::SPARSE, gpu::KEEP, 1, 0, 2, 1};
    for (int i = 0; i < 2 * gpu::NEVER; i++) {
        u.recompute = i / 2, u.rank = (u.recompute + i) % 2 ? 0.2 : 1.0;
        int codes = i % 2 == 0                                         ? 0
                    : u.recompute < gpu::tape_rows[gpu::FCH].gone_from ? INT8 | TWO_BITS
                                                                       : INT8;
        if (layers <= 2 && u.recompute % 5 != 0) continue;
        Floats losses[2], gradients[2];
        for (int away = 0; away < 2; away++) {
            u.savings = codes | (away ? OFFLOAD : 0);
            Gpu g(u, away);
            start_gpu(g, u);
            losses[away] = train(g, u, 0, 1, away);
            gradients[away] = fetch_all(g.plan, {"gradients"});
        }
        std::string what = "level " + gpu::join(u.recompute) + (codes & INT8 ? ", int8" : "") +
                           (codes & TWO_BITS ? ", 2bit" : "");
        expect_equal(what + ", losses", losses[1], losses[0]);
        expect_equal(what + ", gradients", gradients[1], gradients[0]);
    }
}

// Two runs of one seed; blocks run in another order the second time.
static void repeat(const Setup& u) {
    Floats losses[2], state[2];
    for (int run = 0; run < 2; run++) {
        Gpu g(u, run == 0);
        start_gpu(g, u);
        losses[run] = train(g, u, 0, 3);
        state[run] = fetch_all(g.plan, {"parameters", "master", "moments"});
    }
    expect_equal("losses", losses[1], losses[0]);
    expect_equal("weights and moments", state[1], state[0]);
}

// An evaluation of fewer and shorter sequences than planned gives the CPU's losses, and the
// training after it is none the wiser.
static void evaluate(const Setup& u) {
    Cpu c(u);
    Gpu g(u);
    set_cpu_weights(c);
    copy_weights(g, c);
    Setup once = u;
    once.steps = 1;
    train(g, once, 0, 1);
    Floats before = fetch_all(g.plan, {"gradients"});
    for (int T : {u.T, u.T - 12, 1}) {
        set_tokens(g.s, u, 5, T);
        set_tokens(c.s, u, 5, T);
        gpu::model_evaluate(g.s, 1, T);
        cpu::model_evaluate(c.s, 1, T);
        compare_losses(g, c, "losses of " + gpu::join(T) + " tokens", T);
    }
    train(g, once, 0, 1);
    expect_equal("gradients after an evaluation", fetch_all(g.plan, {"gradients"}), before);
}

// ---- kernels by themselves, given what the CPU's functions are given

template <class T>
struct Array {  // on the device
    size_t count;
    T* data;
    explicit Array(const Floats& from) : count(from.size()) {
        CUDA(cudaMalloc((void**)&data, count * sizeof(T)));
        set(from);
    }
    Array(const Array&) = delete;
    ~Array() { cudaFree(data); }
    void set(const Floats& from) {
        std::vector<T> raw(from.begin(), from.end());
        CUDA(cudaMemcpy(data, raw.data(), count * sizeof(T), cudaMemcpyHostToDevice));
    }
    Floats get() const {
        std::vector<T> raw(count);
        CUDA(cudaMemcpy(raw.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
        return Floats(raw.begin(), raw.end());
    }
};

static float narrow(float x) { return float(gpu::floatX(x)); }

static Floats normals(size_t count, float scale, int purpose) {
    Floats out(count);
    cpu::draw_normals(out.data(), 0, count, scale, SEED, cpu::stream_of(98, purpose, 0));
    for (float& x : out) x = narrow(x);
    return out;
}

// GELU with its bits, of numbers as near to the cuts as the type has them, of the cuts themselves
// in fp32, and of any others.
static void kernel_gelu() {
    const int rows = 2, n = 4 * 768, count = rows * n;  // more than a block takes at once
    Floats x = normals(count, 2, 0), d = normals(count, 1, 1), y(count);
    size_t at = 0;
    for (float cut : cpu::GELU_CUTS) {
        uint32_t bits = cpu::bits_of_float(narrow(cut)), unit = gpu::IS_BF16 ? 1 << 16 : 1;
        for (int k = -3; k <= 3; k++) x[at++] = cpu::float_of_bits(bits + k * unit);
    }
    for (float special : {0.0f, -0.0f, 1e-40f, -1e-40f, 30.0f, -30.0f}) x[at++] = narrow(special);
    std::vector<uint8_t> bits(count / 4);
    cpu::gelu_forward(y.data(), x.data(), count);
    cpu::gelu_bits(bits.data(), x.data(), count);
    Array<gpu::floatX> dx(d), dy(Floats(count, NAN)), in_place(x), from(x);
    Array<uint8_t> got(Floats(count / 4, 255)), got_in_place(Floats(count / 4, 255));
    gpu::gelu_forward_kernel<<<rows, 256>>>(dy.data, got.data, from.data, gpu::Fold{}, n);
    LAUNCHED();
    gpu::gelu_forward_kernel<<<rows, 256>>>(in_place.data, got_in_place.data, in_place.data,
                                            gpu::Fold{}, n);
    LAUNCHED();
    expect_equal("bits", got.get(), Floats(bits.begin(), bits.end()));
    expect_equal("bits, in place", got_in_place.get(), Floats(bits.begin(), bits.end()));
    expect_close("GELU", dy.get(), y.data(), count, bounds.activation);
    expect_equal("GELU in place", in_place.get(), dy.get());
    Array<float> sums(Floats(n, 1.0f)), partial(Floats(gpu::SLABS * n, NAN));
    gpu::gelu_backward(dx.data, sums.data, partial.data, nullptr, got.data, rows, n);
    cpu::gelu_backward_2bit(d.data(), bits.data(), count);
    for (float& one : d) one = narrow(one);
    expect_equal("the step derivative", dx.get(), d);
    Floats want(n);
    for (int j = 0; j < n; j++) want[j] = 1.0f + (d[j] + d[n + j]);
    expect_equal("its sums", sums.get(), want);
}

// int8 and back: zeros, a number that dwarfs its group, numbers so small that the scale is rounded
// to 0 or has no inverse, and scales just above and below the least.
static void kernel_int8() {
    const int groups = 9;
    const float least = ldexpf(1, gpu::IS_BF16 ? -133 : -149);
    for (int width : {8, 64, 200}) {
        Floats x = normals(groups * width, 3, width), scales(groups), back(x.size());
        for (int j = 0; j < width; j++) {
            x[j] = j % 2 ? 0.0f : -0.0f;
            x[width + j] = j == 5 ? -3e38f : x[width + j];
            x[2 * width + j] = least * (j % 60);
            x[3 * width + j] = (j % 2 ? least : -least) * (190 - j);
            x[4 * width + j] = -2.5f;
            x[5 * width + j] = 1.1f * 127 * gpu::LEAST_SCALE * (j % 2 ? j + 1 : -width) / width;
            x[6 * width + j] = 0.9f * 127 * gpu::LEAST_SCALE * (j % 2 ? j + 1 : -width) / width;
        }
        for (float& one : x) one = narrow(one);
        std::vector<int8_t> codes(x.size());
        cpu::quantize(codes.data(), scales.data(), x.data(), groups, width);
        for (float& scale : scales) scale = narrow(scale);
        for (size_t i = 0; i < x.size() && gpu::IS_BF16; i++) {  // by the scale as it is kept
            float scale = scales[i / width], inverse = scale < gpu::LEAST_SCALE ? 0 : 1 / scale;
            codes[i] = int8_t(rintf(x[i] * inverse));
        }
        cpu::dequantize(back.data(), codes.data(), scales.data(), groups, width);
        for (float& one : back) one = narrow(one);
        Array<gpu::floatX> from(x), got_scales(Floats(groups, NAN)),
            got_back(Floats(x.size(), NAN));
        Array<int8_t> got(Floats(x.size(), -128));
        gpu::quantize_kernel<<<1, 128>>>(got.data, got_scales.data, from.data, groups, width);
        LAUNCHED();
        gpu::dequantize_kernel<<<1, 128>>>(got_back.data, got.data, got_scales.data, groups, width);
        LAUNCHED();
        std::string what = "groups of " + gpu::join(width) + ": ";
        expect_equal(what + "scales", got_scales.get(), scales);
        expect_equal(what + "codes", got.get(), Floats(codes.begin(), codes.end()));
        expect_equal(what + "numbers", got_back.get(), back);
        expect(what + "a scale of 0", scales[2], 0);
        expect(what + "a code of 127", codes[5 * width] + 127, 0);
        expect(what + "too small a scale", codes[6 * width], 0);
    }
}

// Weights moved and rounded at random, under many streams: as the CPU rounds them, to one of the
// two neighbours, and by no more off the mean than chance allows. W - 2^-10 U has an exact product,
// so that it does not matter whether it is fused with the sum.
static void kernel_round() {
    const int count = 1000, first = 3 * count, streams = 400;
    Floats w = normals(count, 0.1f, 0), u = normals(count, 1, 1), exact(count);
    w[0] = 1, u[0] = 1e-3f;     // up across a power of two
    w[1] = 0.5f, w[2] = -0.0f;  // what bf16 holds
    u[1] = u[2] = 0;
    std::vector<double> sum(count);
    double strangers = 0, off = 0, off_squared = 0, chances = 0;
    Array<float> step(u);
    Array<gpu::floatX> to(w);
    for (int i = 0; i < count; i++) exact[i] = w[i] - u[i] / 1024;
    for (int stream = 0; stream < streams; stream++) {
        to.set(w);
        gpu::Weights weights = {
            to.data, gpu::IS_BF16 ? nullptr : (float*)to.data, true, SEED, uint64_t(stream), first};
        gpu::lift_kernel<<<gpu::blocks_for(count, 256 * gpu::QUAD), 256>>>(
            weights, step.data, nullptr, count, 1.0f, 1.0f / 1024);
        LAUNCHED();
        Floats got = to.get(), want(first + count);
        std::copy(exact.begin(), exact.end(), want.begin() + first);
        cpu::round_stochastically(want.data(), first + count, SEED, stream);
        expect_equal("stream " + gpu::join(stream), got, Floats(want.begin() + first, want.end()));
        for (int i = 0; i < count; i++) {
            uint32_t down = cpu::bits_of_float(exact[i]) & 0xFFFF0000u,
                     bits = cpu::bits_of_float(got[i]);
            bool on_the_spot = cpu::bits_of_float(exact[i]) == down;
            strangers += bits != down && (on_the_spot || bits != down + 0x10000u);
            sum[i] += got[i];
        }
    }
    expect("neither of the two neighbours", strangers, 0);
    for (int i = 0; i < count; i++) {
        uint32_t bits = cpu::bits_of_float(exact[i]), down = bits & 0xFFFF0000u;
        double up = (bits - down) / 65536.0,
               step = cpu::float_of_bits(down + 0x10000u) - cpu::float_of_bits(down);
        if (up < 0.05 || up > 0.95) continue;  // chance is not normal there
        double error = (sum[i] / streams - exact[i]) / (step * sqrt(up * (1 - up) / streams));
        off += error, off_squared += error * error, chances++;
    }
    expect("weights that chance decides", 800 / chances, 1);
    expect("mean, in standard errors", off / sqrt(chances), 4);
    expect("its variance, over what chance makes of it, in standard errors",
           (off_squared / chances - 1) / sqrt(2 / chances), 4);
}

// ---- files

struct Folder {
    std::string path = (std::filesystem::temp_directory_path() / "test_gpt2.XXXXXX").string();
    Folder() {
        if (!mkdtemp(&path[0])) gpu::fail(path + ": cannot be made");
    }
    ~Folder() {
        std::error_code error;
        std::filesystem::remove_all(path, error);
    }
};

// A run that is saved, in the middle of an epoch or at its end, and goes on in a new process's
// memory.
static void resume(const Setup& u) {
    Folder folder;
    const gpu::Identity identity = {{"--seed", gpu::join(SEED)}};
    const int last = 3;
    Floats whole;
    for (int stop : {0, 1, 2}) {
        std::string path = folder.path + "/state";
        if (stop > 0) {
            Gpu g(u, false);
            start_gpu(g, u);
            train(g, u, 0, stop);
            gpu::write_state(g.plan, identity, stop, path)->commit();
        }
        Gpu g(u, false);
        if (stop > 0)
            expect("step of the state", double(gpu::read_state(g.plan, identity, path)) - stop, 0);
        stop > 0 ? gpu::model_round(g.s) : start_gpu(g, u);
        train(g, u, stop, last);
        Floats end = fetch_all(g.plan, {"parameters", "master", "moments"});
        if (stop == 0) whole = end;
        expect_equal("weights and moments, saved after " + gpu::join(stop), end, whole);
    }
}

static std::string contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
}

static void compare_logits(const Gpu& g, const Cpu& c, const std::string& what, int first,
                           int rows) {
    Floats got(size_t(rows) * g.s.config.V), want(got.size());
    gpu::model_logits(g.s, got.data(), first, rows);
    cpu::model_logits(c.s, want.data(), first, rows);
    expect_close(what, got, want.data(), g.s.config.V, bounds.activation);
}

// llm.c's model file, fp32 and bf16, made by the CPU trainer: both read the same weights from it
// and compute the same logits, and the GPU's writes the same bytes again; but for what is lost
// without master weights.
static void model_file(const Setup& u) {
    Folder folder;
    for (int type : {int(cpu::TYPE_FP32), int(cpu::TYPE_BF16)}) {
        std::string name = type == cpu::TYPE_BF16 ? "version 5: " : "version 3: ";
        std::string path = folder.path + "/model.bin", rounded = folder.path + "/rounded.bin",
                    again = folder.path + "/again.bin";
        Cpu c(u);
        set_cpu_weights(c);
        for (int i = 0; i < cpu::PARAMS; i++) {  // no longer what bf16 holds
            for (int64_t j = 0; j < cpu::param_count(c.s.config, i); j++)
                c.s.params[i][j] *= 1.001f;
        }
        cpu::write_model(c.plan, c.s.config, type, path)->commit();
        cpu::read_model(c.plan, path);
        cpu::model_round(c.s);
        cpu::write_model(c.plan, c.s.config, type, rounded)->commit();
        gpu::Config config = gpu::read_model_config(path);
        expect(name + "the header differs", memcmp(&config, &c.s.config, sizeof(config)) != 0, 0);
        Gpu g(u, false);
        gpu::read_model(g.plan, path);
        gpu::model_round(g.s);
        int i = 0;
        for (const gpu::Tensor& t : gpu::weights_of(g.plan))
            expect_equal(name + t.name, fetch(t), fetch(c.plan.tensors[i++]));
        set_tokens(g.s, u, 3, u.B * u.T);
        set_tokens(c.s, u, 3, u.B * u.T);
        gpu::model_forward(g.s, u.B, u.T, gpu::NO_CACHE, false);
        cpu::model_forward(c.s, u.B, u.T, cpu::NO_CACHE, false);
        compare_logits(g, c, name + "logits", 0, u.B * u.T);
        gpu::write_model(g.plan, g.s.config, type, again)->commit();
        expect(name + "the file written again differs", contents(again) != contents(rounded), 0);
    }
}

// The logits of a model that generates, through the cache and however the text is cut, are those of
// the CPU's training forward pass. The last token sees more keys than attention takes at a time.
static void generating() {
    Setup u = {"", 1, 140, 64, 2, 2, 257, 384, 1.0, 0, gpu::GAUSSIAN, gpu::KEEP, 0, 0, 1, 0};
    Cpu c(u);
    u.savings = GENERATES;
    Gpu g(u);
    set_cpu_weights(c);
    copy_weights(g, c);
    set_tokens(c.s, u, 0, u.T);
    cpu::model_forward(c.s, 1, u.T, cpu::NO_CACHE, false);
    for (const std::vector<int>& pieces :
         {std::vector<int>{140}, {129, 1, 1, 7, 2}, {1, 1, 126, 1, 11}}) {
        int past = 0;
        for (int n : pieces) {
            std::copy_n(c.s.inputs + past, n, g.s.inputs);
            gpu::model_forward(g.s, 1, n, past, false);
            Floats got(size_t(n) * u.V), want(got.size());
            gpu::model_logits(g.s, got.data(), 0, n);
            cpu::model_logits(c.s, want.data(), past, n);
            past += n;
            expect_close("logits of " + gpu::join(pieces.size()) + " pieces", got, want.data(), u.V,
                         bounds.activation);
        }
    }
}

struct Record {
    std::string name;
    std::vector<int64_t> shape;
    Floats data;
};

static std::vector<Record> read_dump(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<Record> records;
    for (int32_t length, dims; file.read((char*)&length, 4);) {
        Record r = {std::string(length, '\0'), {}, {}};
        file.read(&r.name[0], length).read((char*)&dims, 4);
        int64_t count = 1;
        for (int64_t d; dims > 0 && file.read((char*)&d, 8); dims--)
            r.shape.push_back(d), count *= d;
        r.data.resize(count);
        if (!file.read((char*)r.data.data(), count * 4)) gpu::fail(path + " is cut short");
        records.push_back(r);
    }
    return records;
}

// --dump gives the same records on both sides.
static void dump(const Setup& u) {
    Folder folder;
    Cpu c(u);
    Gpu g(u);
    set_cpu_weights(c);
    copy_weights(g, c);
    set_tokens(g.s, u, 0, u.B * u.T);
    set_tokens(c.s, u, 0, u.B * u.T);
    gpu::model_begin_step(g.s, 0);
    cpu::model_begin_step(c.s, 0);
    gpu::model_accumulate(g.s, u.B, u.T, true, 1.0f / (u.B * u.T));
    cpu::model_accumulate(c.s, u.B, u.T, true, 1.0f / (u.B * u.T));
    g.s.options.dump = folder.path + "/gpu";
    c.s.options.dump = folder.path + "/cpu";
    gpu::write_dump(g.s, g.plan, g.s.options);
    cpu::write_dump(c.s, c.plan, c.s.options);
    std::vector<Record> got = read_dump(g.s.options.dump), want = read_dump(c.s.options.dump);
    expect("records", double(got.size()) - double(want.size()), 0);
    for (size_t i = 0; i < std::min(got.size(), want.size()); i++) {
        bool same = got[i].name == want[i].name && got[i].shape == want[i].shape;
        expect(want[i].name + ": name or shape differ from " + got[i].name, !same, 0);
        int64_t row = want[i].name == "logits" ? u.V : want[i].data.size();
        if (same)
            expect_close(want[i].name, got[i].data, want[i].data.data(), row, bounds.gradient);
    }
}

// ---- memory

// The device gives what the plan says and no more; tensors begin on 256 bytes; a fresh model is the
// CPU's, bit for bit.
static void memory(const Setup& u) {
    Cpu c(u);
    size_t before, after, total;
    CUDA(cudaMemGetInfo(&before, &total));
    Gpu g(u, false);
    CUDA(cudaMemGetInfo(&after, &total));
#ifdef __NOGPU__  // a GPU gives whole pages, and cuBLAS takes some
    expect("bytes taken beyond the plan", double(before - after) - g.plan.bytes(), 0);
#endif
    for (const gpu::Tensor& t : g.plan.tensors) {
        if (t.type != "byte" && t.category != "host")
            expect(t.name + " is off 256 bytes by", double(size_t(data_of(t)) % 256), 0);
    }
    cpu::initialise(c.plan, c.s.config, SEED);
    gpu::initialise(g.plan, g.s.config, SEED);
    cpu::model_round(c.s);
    gpu::model_round(g.s);
    int i = 0;
    for (const gpu::Tensor& t : gpu::weights_of(g.plan))
        expect_equal(t.name, fetch(t), fetch(c.plan.tensors[i++]));
}

// A plan that no device holds is refused, and the batch named instead is the largest divisor that
// fits: of a power of 2.
static void too_large() {
    Setup u = {"",  1 << 15, 1024,          256,       4, 4, 257, 257,
               1.0, PAPER,   gpu::GAUSSIAN, gpu::KEEP, 1, 0, 1,   0};
    std::string said;
    size_t free_bytes, total;
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    try {
        Gpu g(u);
    } catch (const gpu::Failure& failure) {
        said = failure.message;
        cublasDestroy(gpu::cublas);
    }
    size_t at = said.find("; -b ");
    int64_t bytes[2], batch = at == std::string::npos ? 0 : atoll(said.c_str() + at + 5);
    for (int i = 0; i < 2; i++) {
        gpu::Options o;
        gpu::Model s;
        set_options(o, u);
        o.batch = int(batch << i);
        bytes[i] = gpu::model_plan(s, {u.T, u.V, u.L, u.NH, u.C, u.Vp}, o).bytes();
    }
    expect("the batch that fits does not", !(batch > 0 && bytes[0] < int64_t(free_bytes)), 0);
    expect("twice the batch would fit", !(bytes[1] >= int64_t(free_bytes)), 0);
}

// ---- a training run: 100 steps of a small model that learns to count, from GPT-2's initialisation

#ifndef __NOGPU__  // which takes half a minute for what test_cuda_training.py sees in twelve steps
static void curve(double rank, int projection) {
    Setup u = {"", 2, 16, 32, 2, 1, 61, 64, rank, PAPER, projection, gpu::MOVE, 20, 0, 1, 0};
    Cpu c(u);
    Gpu g(u);
    c.s.options.weight_decay = g.s.options.weight_decay = 0.1;
    cpu::initialise(c.plan, c.s.config, SEED);
    copy_weights(g, c);
    int N = u.B * u.T;
    double first = 0, last = 0, apart = 0;
    for (int step = 0; step < 100; step++) {
        for (int i = 0; i < N; i++) {
            int start = token(u, step, i / u.T);
            c.s.inputs[i] = g.s.inputs[i] = (start + 7 * (i % u.T)) % u.V;
            c.s.targets[i] = g.s.targets[i] = (start + 7 * (i % u.T + 1)) % u.V;
        }
        cpu::model_begin_step(c.s, step);
        gpu::model_begin_step(g.s, step);
        cpu::model_accumulate(c.s, u.B, u.T, true, 1.0f / N);
        gpu::model_accumulate(g.s, u.B, u.T, true, 1.0f / N);
        double loss = cpu::mean_loss(c.s, 0, N),
               difference = fabs(gpu::mean_loss(g.s, 0, N) - loss);
        if (!(difference <= apart)) apart = difference;
        if (step == 0) first = loss;
        last = loss;
        if (show_figures && step % 10 == 9)
            fprintf(report, "    step %d: loss %.6f, %.2e apart\n", step + 1, loss, difference);
        cpu::model_update(c.s, c.plan, step, 5e-3);
        gpu::model_update(g.s, g.plan, step, 5e-3);
    }
    expect("losses apart, at most", apart, bounds.curve);
    expect("last loss over the first", last / first, 0.3);  // or there was nothing to see
}
#endif

// ---- main

struct Case {
    std::string name;
    std::function<void()> run;
};

static std::vector<Case> all_cases() {
    std::vector<Case> cases;
    for (const Setup& u : setups)
        cases.push_back({std::string("tensors-") + u.name, [&u] { tensors(u); }});
    for (int i = 0; i < 4; i++) {
        Setup u = small;
        u.projection = i % 3, u.rank = i < 3 ? u.rank : 1.0, u.compress = i == 2 ? ALL : PAPER;
        std::string name = i == 0   ? "gaussian"
                           : i == 1 ? "rademacher"
                           : i == 2 ? "sparse"
                                    : "full-rank";
        cases.push_back({"levels-" + name, [u] { levels(u); }});
        cases.push_back({"repeat-" + name, [u] { repeat(u); }});
    }
    cases.push_back({"levels-odd", [] { levels(odd); }});
    cases.push_back({"levels-odd-gaussian", [] {
                         Setup u = odd;
                         u.projection = gpu::GAUSSIAN;
                         levels(u);
                     }});
    cases.push_back({"levels-2bit", [] {
                         Setup u = odd;
                         u.savings = TWO_BITS;
                         levels(u);
                     }});
    cases.push_back({"repeat-saving", [] { repeat(saving); }});
    const std::pair<const char*, const Setup*> shapes[] = {
        {"", &small}, {"-odd", &odd}, {"-saving", &saving}};
    for (auto& [which, u] : shapes) {
        const Setup& shape = *u;
        cases.push_back({std::string("evaluate") + which, [&shape] { evaluate(shape); }});
        cases.push_back({std::string("resume") + which, [&shape] { resume(shape); }});
        cases.push_back({std::string("model-file") + which, [&shape] { model_file(shape); }});
        cases.push_back({std::string("memory") + which, [&shape] { memory(shape); }});
        // It needs all of the tape.
        if (!(shape.savings & OFFLOAD))
            cases.push_back({std::string("dump") + which, [&shape] { dump(shape); }});
    }
    cases.push_back({"generating", [] { generating(); }});
    cases.push_back({"kernel-gelu", [] { kernel_gelu(); }});
    cases.push_back({"kernel-int8", [] { kernel_int8(); }});
    cases.push_back({"kernel-round", [] { kernel_round(); }});
    cases.push_back({"too-large", [] { too_large(); }});
#ifndef __NOGPU__
    cases.push_back({"curve-full-rank", [] { curve(1.0, gpu::GAUSSIAN); }});
    cases.push_back({"curve-gaussian", [] { curve(1.0 / 4, gpu::GAUSSIAN); }});
#endif
    for (int layers : {1, 2, 3, 5})
        cases.push_back({"offload-" + gpu::join(layers), [layers] { offload(layers); }});
    return cases;
}

int main(int argc, char** argv) {
    // Used, so that the compiler does not miss their uses.
    if (argc > 99) cpu::run(argc, argv), gpu::run(argc, argv);
    report = fdopen(dup(1), "w");
    setvbuf(report, nullptr, _IOLBF, 1024);
    if (!freopen("/dev/null", "w", stdout)) return 2;
    std::string wanted;
    bool list = false, exact = false;
    for (int i = 1; i < argc; i++) {
        std::string argument = argv[i];
        if (argument == "--list")
            list = true;
        else if (argument == "--figures")
            show_figures = true;
        else
            wanted = argument;
    }
    std::vector<Case> cases = all_cases();
    for (const Case& one : cases) exact |= one.name == wanted;
    int passed = 0, failed = 0;
    for (const Case& one : cases) {
        if (exact ? one.name != wanted : one.name.find(wanted) == std::string::npos) continue;
        if (list) {
            fprintf(report, "%s\n", one.name.c_str());
            continue;
        }
        double began = gpu::seconds();
        worst = {};
        std::string error;
        try {
            one.run();
        } catch (const gpu::Failure& failure) {
            error = failure.message;
        } catch (const cpu::Failure& failure) {
            error = failure.message;
        }
        bool good = error.empty() && !worst.what.empty() && worst.ratio <= 1;
        std::string figure = gpu::text("%.2e of %.2e", worst.figure, worst.bound);
        fprintf(report, "%-36s %-46s %-20s %6.1f s  %s\n", one.name.c_str(),
                error.empty() ? worst.what.c_str() : error.c_str(),
                error.empty() ? figure.c_str() : "", gpu::seconds() - began,
                good ? "ok" : "FAILED");
        ++(good ? passed : failed);
    }
    if (list) return 0;
    fprintf(report, "%d passed, %d failed\n", passed, failed);
    return failed > 0 || passed == 0;
}
