// test_gpt2.cu: holds the CUDA trainer to the CPU trainer: tensor by tensor in many configurations, then over training runs.
//
//   make test_gpt2cu       for a GPU, make test_gpt2_nogpu for a CPU (dev/nogpu); PRECISION=FP32 for the other precision
//   ./test_gpt2cu [--list] [--figures] [NAME]    the case called NAME, or all whose names contain it; --figures prints all
//
// A line for each case: the figure that came nearest to its bound, or beyond it. Both trainers start from the same weights,
// numbers that bf16 holds, all of them large enough to matter: biases, LayerNorm's weights, padded words too.

// All headers of both trainers stand here first: within the namespaces below, their guards leave nothing of them.
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <glob.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
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
#include <string>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <curand_kernel.h>

#define TESTING
namespace cpu {
#include "train_gpt2_compact.cpp"
}
namespace gpu {
#include "train_gpt2_compact.cu"
}

using gpu::check;  // for the macros CUDA and LAUNCHED
typedef std::vector<float> Floats;

// ---- bounds, relative to the norm of what they are about

struct Bounds {
    double activation, gradient;  // norm of a tensor's difference over its norm
    double moment, moved;         // the same for Adam's moments, and for what the steps have added to the weights
    double norm;                  // of all gradients
    double normal;                // of a projection, in units of its standard deviation
    double curve;                 // losses over a hundred steps, absolute
};

// log, sin and cos are other code than the CPU's; on a GPU cuRAND takes the fast ones, whose absolute error is 2^-20 or so.
#ifdef __NOGPU__
static const double NORMAL_ERROR = 1.0 / (1 << 18);
#else
static const double NORMAL_ERROR = 1.0 / (1 << 16);
#endif

// A rounding to p bits errs by 2^-p at most, and by about 0.4 * 2^-p in the root of the mean square; k of them in a row by
// sqrt(k) times that.
#ifdef PRECISION_FP32
// p = 24: a sum of n terms in another order differs by about sqrt(n) 2^-24, 5e-6 for the longest here, and rarely more than
// some such stand in a row. Then Adam: an element whose gradient is all but zero steps by noise over --eps.
static const Bounds bounds = {2e-5, 2e-5, 5e-5, 2e-4, 3e-5, NORMAL_ERROR, 1e-4};
#else
// p = 8: 0.0016 for each tensor written in bf16. Forward some 10 of them stand in a row (0.005, as is seen), backward twice as
// many, and the gradient of the stream is rounded again and again. Adam makes steps of equal size of gradients large and
// small, thus of errors. What is wrong errs more: a scale by several percent, a bias or a head left out by tens of them.
static const Bounds bounds = {0.02, 0.03, 0.05, 0.1, 0.02, NORMAL_ERROR, 0.02};
#endif
// A row by itself (a token, a word, an output) may err more than the tensor: the worst of thousands of normal errors is 4 of
// their standard deviations off.
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
    if (show_figures || ratio > 1) fprintf(report, "    %-44s %9.2e of %9.2e\n", what.c_str(), figure, bound);
    if (worst.what.empty() || ratio > worst.ratio) worst = {ratio, figure, bound, what};
}

static void expect_equal(const std::string& what, const Floats& got, const Floats& want) {
    int64_t differ = got.size() != want.size();
    for (size_t i = 0; !differ && i < got.size(); i++) differ += memcmp(&got[i], &want[i], sizeof(float)) != 0;
    expect(what + ": bits that differ", double(differ), 0);
}

// got against want in rows of `row` numbers. A row is measured against its own size, or a typical row's where it is smaller:
// what cancels out in a sum leaves the rounding of its parts. Rounding is noise, it turns a tensor rather than scales it: so
// the cosine is held more closely than the norm of the difference would hold it, which is to bound^2 / 2.
static void expect_close(const std::string& what, const Floats& got, const float* want, int64_t row, double bound) {
    double difference = 0, size = 0, got_size = 0, dot = 0, worst_row = 0;
    std::vector<double> row_difference(got.size() / row), row_size(got.size() / row);
    for (size_t i = 0; i < got.size(); i++) {
        double d = double(got[i]) - want[i], w = double(want[i]) * want[i];
        difference += d * d, size += w, got_size += double(got[i]) * got[i], dot += double(got[i]) * want[i];
        row_difference[i / row] += d * d, row_size[i / row] += w;
    }
    if (size == 0) return expect(what + ", zeros", sqrt(difference), 0);
    expect(what, sqrt(difference / size), bound);
    if (gpu::IS_BF16) expect(what + ", 1 - cosine", 1 - dot / sqrt(size * got_size), bound * bound / 4);
    double typical = size / row_size.size();
    for (size_t i = 0; i < row_size.size(); i++)
        worst_row = std::max(worst_row, sqrt(row_difference[i] / std::max(row_size[i], typical)));
    expect(what + ", worst row", worst_row, ROW * bound);
}

// ---- what is compared: a model on each side

const int PAPER = 1 << gpu::QKV | 1 << gpu::FC | 1 << gpu::FCPROJ, ALL = PAPER | 1 << gpu::ATTPROJ;
const int SEED = 11;

struct Setup {
    const char* name;
    int B, T, C, NH, L, V, Vp;
    double rank;
    int compress, projection, moments, gap, recompute, micros, steps;
};

// lr and weight decay are large: a few steps move the weights, and decay is a good part of it.
template <class Options>
static void set_options(Options& o, const Setup& u) {
    o.batch = u.B, o.seq = u.T, o.total_batch = u.micros * u.B * u.T;
    o.rank = u.rank, o.compress = u.compress, o.projection = u.projection, o.gap = u.gap;
    o.moments = u.moments;
    o.recompute = u.recompute, o.seed = SEED;
    o.alpha = 0.7, o.lr = 2e-3, o.weight_decay = 1, o.clip = 0.5, o.eps = 1e-4;
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

// All that a step has to write before it reads it begins as NaN. Under nogpu, too, each tensor stands alone, so that
// AddressSanitizer sees a step out of one into the next; gradients stay together, since the norm takes them for one.
// One at a time: the trainer has one handle of cuBLAS.
struct Gpu {
    gpu::Model s;
    gpu::Plan plan;
    std::vector<void*> memory;
    explicit Gpu(const Setup& u, [[maybe_unused]] bool apart = true) {
        gpu::Options o;
        set_options(o, u);
        plan = gpu::model_plan(s, {u.T + 3, u.V, u.L, u.NH, u.C, u.Vp}, o);
        gpu::model_allocate(s, plan);
        std::string category;
        for (const gpu::Tensor& t : plan.tensors) {
            if (t.type == "byte") continue;  // a gap, which has no place of its own
            char* data = data_of(t);
            bool arena = t.category != category, alone = false;
#ifdef __NOGPU__
            alone = apart && t.category != "gradients";
#endif
            if (arena) memory.push_back(data);
            if (alone) {
                CUDA(cudaMalloc((void**)&data, t.bytes()));
                memcpy(t.home, &data, sizeof(data));
                memory.push_back(data);
            }
            category = t.category;
            CUDA(cudaMemset(data, t.category == "moments" ? 0 : 0xFF, t.bytes()));
        }
        for (int i = 0; i < gpu::PARAMS && !gpu::IS_BF16; i++) s.master[i] = (float*)s.params[i];
    }
    Gpu(const Gpu&) = delete;
    ~Gpu() {
        for (void* data : memory) cudaFree(data);
        for (void* data : {(void*)s.inputs, (void*)s.targets, (void*)s.losses}) cudaFreeHost(data);
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
    gpu::visit(t, 0, t.count(), false,
               [&](const float* from, int64_t at, int64_t n) { std::copy(from, from + n, out.begin() + at); });
    return out;
}

static Floats fetch(const cpu::Tensor& t) {
    const float* data = (const float*)data_of(t);
    return Floats(data, data + t.count());
}

// The GPU's tensors of some categories, one after the other.
static Floats fetch_all(const gpu::Plan& plan, std::initializer_list<const char*> categories) {
    Floats all;
    for (const gpu::Tensor& t : plan.tensors) {
        bool wanted = t.type != "byte" && std::find(categories.begin(), categories.end(), t.category) != categories.end();
        if (!wanted) continue;
        Floats one = fetch(t);
        all.insert(all.end(), one.begin(), one.end());
    }
    return all;
}

// The GPU's weights as they train: the fp32 copies, where there are any.
static std::vector<gpu::Tensor> weights(const Gpu& g) {
    std::vector<gpu::Tensor> out;
    for (const gpu::Tensor& t : g.plan.tensors) {
        if (t.category == (gpu::IS_BF16 ? "master" : "parameters") && t.type != "byte") out.push_back(t);
    }
    return out;
}

// Weights that make every part count: the streams of about 1 / sqrt(C), where LayerNorm's epsilon shows, everything after it
// of about 1; attention that prefers some keys, biases and LayerNorm's weights that differ, padded words that are not zero.
static void set_cpu_weights(Cpu& c) {
    for (int i = 0; i < cpu::PARAMS; i++) {
        const cpu::ParamRow& row = cpu::param_rows[i];
        bool norm = i == cpu::LN1W || i == cpu::LN2W || i == cpu::LNFW;
        float scale = row.columns == 0 ? 0.3f : 1 / sqrtf(float(row.columns * c.s.config.C));
        int64_t count = cpu::param_count(c.s.config, i);
        cpu::draw_normals(c.s.params[i], 0, count, i == cpu::QKVW ? 1.5f * scale : scale, SEED, cpu::stream_of(99, i, 0));
        for (int64_t j = 0; j < count; j++) {
            float x = c.s.params[i][j] + (norm ? 1.0f : 0.0f);
            c.s.params[i][j] = gpu::IS_BF16 ? cpu::float_of_bf16(cpu::bf16_of_float(x)) : x;
        }
    }
}

static void copy_weights(Gpu& g, const Cpu& c) {
    int i = 0;
    for (const gpu::Tensor& t : weights(g)) {
        const float* from = c.s.params[i++];
        gpu::visit(t, 0, t.count(), true, [&](float* to, int64_t at, int64_t n) { std::copy(from + at, from + at + n, to); });
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

static void compare_losses(const Gpu& g, const Cpu& c, const std::string& what, int N) {
    expect_close(what, Floats(g.s.losses, g.s.losses + N), c.s.losses, 1, bounds.activation / 2);
}

// Tensors of a category that are on both sides: under one name, in one shape.
static void compare_category(const Gpu& g, const Cpu& c, const std::string& category, const Setup& u, double bound) {
    int found = 0, wanted = 0;
    for (const cpu::Tensor& t : c.plan.tensors) wanted += t.category == category;
    for (const gpu::Tensor& t : g.plan.tensors) {
        if (t.category != category || t.type == "byte") continue;
        const cpu::Tensor& other = tensor_of(c.plan, t.name);
        if (other.shape != t.shape) gpu::fail(t.name + " differs in shape");
        int64_t row = t.name == "lse" ? u.T : t.shape.size() > 1 ? t.shape.back() : t.count();
        expect_close(t.name, fetch(t), (const float*)data_of(other), row, bound);
        found++;
    }
    expect(category + ": tensors of the CPU that the GPU has not", wanted - found, 0);
}

// P itself: signs are equal, normals apart from the rounding to bf16.
static void compare_projections(Gpu& g, Cpu& c, const std::string& when) {
    for (int which = 0; which < gpu::LINEARS; which++) {
        for (int layer = 0; g.s.linear[which].compressed() && layer < g.s.config.L; layer++) {
            Floats got = gpu::model_projection(g.s, which, layer), want = cpu::model_projection(c.s, which, layer);
            double worst_one = 0, unit = 1 / sqrt(double(g.s.linear[which].r));
            bool gaussian = g.s.options.projection == gpu::GAUSSIAN;
            for (size_t i = 0; i < got.size(); i++) {
                double exact = gaussian || !gpu::IS_BF16 ? want[i] : cpu::float_of_bf16(cpu::bf16_of_float(want[i]));
                double free = gaussian && gpu::IS_BF16 ? fabs(exact) / 256 : 0;
                worst_one = std::max(worst_one, (fabs(got[i] - exact) - free) / unit);
                if (std::isnan(got[i])) worst_one = NAN;
            }
            expect(when + gpu::param_rows[gpu::weight_of(which)].name + "." + gpu::str(layer), worst_one,
                   gaussian ? bounds.normal : 0);
        }
    }
}

static void tensors(const Setup& u) {
    Cpu c(u);
    Gpu g(u);
    int N = u.B * u.T;
    set_cpu_weights(c);
    copy_weights(g, c);
    std::vector<Floats> start;
    for (const gpu::Tensor& t : weights(g)) start.push_back(fetch(t));
    for (int step = 0; step < u.steps; step++) {
        std::string when = "step " + gpu::str(step) + " ";
        gpu::model_begin_step(g.s, step);
        cpu::model_begin_step(c.s, step);
        for (int micro = 0; micro < u.micros; micro++) {
            set_tokens(g.s, u, step * u.micros + micro, N);
            set_tokens(c.s, u, step * u.micros + micro, N);
            gpu::model_accumulate(g.s, u.B, u.T, micro == 0, 1.0f / (u.micros * N));
            cpu::model_accumulate(c.s, u.B, u.T, micro == 0, 1.0f / (u.micros * N));
            compare_losses(g, c, when + "losses", N);
        }
        if (step == 0) {
            compare_category(g, c, "tape", u, bounds.activation);
            compare_category(g, c, "gradients", u, bounds.gradient);
        }
        if (step % u.gap == 0) compare_projections(g, c, when + "P ");
        double got = gpu::model_update(g.s, g.plan, step, g.s.options.lr),
               want = cpu::model_update(c.s, c.plan, step, c.s.options.lr);
        expect(when + "norm", fabs(got - want) / want, bounds.norm);
    }
    compare_category(g, c, "moments", u, bounds.moment);
    int i = 0;
    for (const gpu::Tensor& t : weights(g)) {
        Floats got = fetch(t), want = fetch(tensor_of(c.plan, gpu::param_rows[i].name));
        for (size_t j = 0; j < got.size(); j++) {
            bool key_bias = i == gpu::QKVB && int(j) / u.C % 3 == 1;  // its gradient is 0: softmax does not see it; noise only
            got[j] = key_bias ? 0 : got[j] - start[i][j], want[j] = key_bias ? 0 : want[j] - start[i][j];
        }
        expect_close(t.name + " moved", got, want.data(), got.size(), bounds.moved);
        i++;
    }
    if (!gpu::IS_BF16) return;
    Floats master = fetch_all(g.plan, {"master"});
    for (float& x : master) x = cpu::float_of_bf16(cpu::bf16_of_float(x));
    expect_equal("the rounded weights", fetch_all(g.plan, {"parameters"}), master);
}

// Heads of 64 are the tensor cores' in bf16, all others and fp32 the plain kernels'. T ends inside a tile of 64 or of 128, on
// it, one beyond; C, V and the ranks are odd in some rows; the last rows have GPT-2's own widths. 10 updates with --gap 4, and
// 3 with --gap 1, cross two epochs.
static const Setup setups[] = {
    // name, B, T, C, NH, L, V, Vp, rank, compress, projection, moments, gap, recompute, micros, steps
    {"full-rank", 1, 64, 128, 2, 2, 257, 384, 1.0, PAPER, gpu::GAUSSIAN, gpu::KEEP, 4, 0, 1, 3},
    {"full-rank-level-2", 2, 17, 64, 1, 2, 257, 257, 1.0, PAPER, gpu::GAUSSIAN, gpu::KEEP, 4, 2, 2, 10},
    {"gaussian-keep-level-1", 1, 33, 64, 1, 2, 257, 257, 1.0 / 4, PAPER, gpu::GAUSSIAN, gpu::KEEP, 4, 1, 1, 10},
    {"gaussian-move", 1, 65, 128, 2, 2, 257, 320, 1.0 / 2, PAPER, gpu::GAUSSIAN, gpu::MOVE, 1, 0, 1, 3},
    {"gaussian-reset-level-2-all", 1, 33, 64, 1, 2, 256, 256, 1.0 / 8, ALL, gpu::GAUSSIAN, gpu::RESET, 4, 2, 1, 10},
    {"gaussian-odd", 3, 11, 48, 3, 2, 61, 64, 0.1, ALL, gpu::GAUSSIAN, gpu::MOVE, 1, 0, 2, 3},
    {"gaussian-rank-1", 1, 33, 64, 2, 2, 257, 257, 1.0 / 64, ALL, gpu::GAUSSIAN, gpu::MOVE, 1, 1, 1, 3},
    {"rademacher-keep-level-2", 1, 65, 64, 1, 2, 257, 257, 1.0 / 4, PAPER, gpu::RADEMACHER, gpu::KEEP, 1, 2, 1, 3},
    {"rademacher-move-all", 2, 17, 64, 1, 2, 257, 384, 1.0 / 8, ALL, gpu::RADEMACHER, gpu::MOVE, 4, 0, 1, 10},
    {"rademacher-rank-3", 2, 17, 48, 3, 2, 257, 257, 3, PAPER, gpu::RADEMACHER, gpu::RESET, 1, 1, 1, 3},
    {"sparse-keep-all", 1, 100, 64, 1, 2, 257, 257, 1.0 / 2, ALL, gpu::SPARSE, gpu::KEEP, 1, 0, 1, 3},
    {"sparse-move-level-2", 1, 33, 128, 2, 2, 257, 384, 1.0 / 4, PAPER, gpu::SPARSE, gpu::MOVE, 4, 2, 1, 10},
    {"sparse-reset-level-1-all", 1, 33, 64, 1, 2, 257, 257, 1.0 / 8, ALL, gpu::SPARSE, gpu::RESET, 4, 1, 2, 10},
    {"sparse-odd", 3, 11, 48, 3, 2, 61, 64, 0.1, ALL, gpu::SPARSE, gpu::MOVE, 1, 0, 2, 3},
    {"sparse-rank-1", 1, 33, 64, 2, 2, 257, 257, 1.0 / 64, ALL, gpu::SPARSE, gpu::KEEP, 1, 1, 1, 3},
    {"one-token", 3, 1, 64, 1, 2, 257, 257, 1.0 / 4, PAPER, gpu::GAUSSIAN, gpu::KEEP, 1, 0, 1, 3},
    {"heads-of-64", 2, 130, 192, 3, 1, 61, 61, 1.0 / 4, PAPER, gpu::SPARSE, gpu::KEEP, 1, 0, 1, 1},
    {"heads-of-160", 1, 150, 320, 2, 1, 61, 61, 1.0 / 4, PAPER, gpu::SPARSE, gpu::KEEP, 1, 0, 1, 1},
    {"heads-of-8", 2, 260, 24, 3, 1, 61, 61, 1.0, PAPER, gpu::GAUSSIAN, gpu::KEEP, 1, 0, 1, 1},
    {"two-chunks", 33, 32, 16, 1, 1, 61, 64, 1.0 / 4, PAPER, gpu::SPARSE, gpu::KEEP, 1, 0, 1, 1},
    {"many-words", 1, 21, 16, 2, 1, 9001, 9088, 1.0, PAPER, gpu::GAUSSIAN, gpu::KEEP, 1, 0, 1, 2},
    {"width-of-d12", 1, 12, 768, 12, 1, 61, 64, 1.0 / 8, PAPER, gpu::GAUSSIAN, gpu::MOVE, 1, 0, 1, 2},
    {"width-of-d12-sparse", 1, 12, 768, 12, 1, 61, 64, 1.0 / 64, ALL, gpu::SPARSE, gpu::KEEP, 1, 2, 1, 1},
    {"width-of-d48", 1, 5, 1600, 25, 1, 61, 64, 1.0 / 64, PAPER, gpu::SPARSE, gpu::KEEP, 1, 0, 1, 1},
#ifndef __NOGPU__
    {"long", 2, 1024, 128, 2, 2, 257, 257, 1.0 / 4, PAPER, gpu::GAUSSIAN, gpu::KEEP, 4, 0, 1, 10},
    {"long-plain", 1, 1024, 96, 2, 2, 257, 257, 1.0 / 4, PAPER, gpu::SPARSE, gpu::KEEP, 4, 2, 1, 10},
#endif
};

// ---- what must be equal bit for bit on the GPU

const Setup small = {"", 2, 33, 64, 1, 2, 257, 384, 1.0 / 4, PAPER, gpu::GAUSSIAN, gpu::MOVE, 2, 0, 1, 0};
const Setup odd = {"", 3, 21, 48, 3, 2, 61, 61, 0.1, ALL, gpu::SPARSE, gpu::MOVE, 2, 0, 2, 0};  // tensors end between 256 bytes

static void start_gpu(Gpu& g, const Setup& u) {
    Cpu c(u);
    set_cpu_weights(c);
    copy_weights(g, c);
}

// Steps [first, last) of a run; returns the losses of all micro batches.
static Floats train(Gpu& g, const Setup& u, int first, int last) {
    Floats losses;
    for (int step = first; step < last; step++) {
        gpu::model_begin_step(g.s, step);
        for (int micro = 0; micro < u.micros; micro++) {
            set_tokens(g.s, u, step * u.micros + micro, u.B * u.T);
            gpu::model_accumulate(g.s, u.B, u.T, micro == 0, 1.0f / (u.micros * u.B * u.T));
            losses.insert(losses.end(), g.s.losses, g.s.losses + u.B * u.T);
        }
        if (u.steps == 0) gpu::model_update(g.s, g.plan, step, g.s.options.lr);
    }
    return losses;
}

// Recomputation gives the gradients that the whole tape gives.
static void levels(Setup u) {
    Floats losses[3], gradients[3];
    u.steps = 1;  // no update: gradients stay
    for (u.recompute = 0; u.recompute < 3; u.recompute++) {
        Gpu g(u);
        start_gpu(g, u);
        losses[u.recompute] = train(g, u, 0, 1);
        gradients[u.recompute] = fetch_all(g.plan, {"gradients"});
    }
    for (int level = 1; level < 3; level++) {
        expect_equal("losses at level " + gpu::str(level), losses[level], losses[0]);
        expect_equal("gradients at level " + gpu::str(level), gradients[level], gradients[0]);
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

// An evaluation of fewer and shorter sequences than planned gives the CPU's losses, and the training after it is none the
// wiser.
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
        compare_losses(g, c, "losses of " + gpu::str(T) + " tokens", T);
    }
    train(g, once, 0, 1);
    expect_equal("gradients after an evaluation", fetch_all(g.plan, {"gradients"}), before);
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

// A run that is saved, in the middle of an epoch or at its end, and goes on in a new process's memory.
static void resume(const Setup& u) {
    Folder folder;
    const gpu::Identity identity = {{"--seed", gpu::str(SEED)}};
    const int last = 3;
    Floats whole;
    for (int stop : {0, 1, 2}) {
        std::string path = folder.path + "/state";
        if (stop > 0) {
            Gpu g(u, false);
            start_gpu(g, u);
            train(g, u, 0, stop);
            gpu::write_state(g.plan, identity, stop, path);
        }
        Gpu g(u, false);
        if (stop > 0) expect("step of the state", double(gpu::read_state(g.plan, identity, path)) - stop, 0);
        stop > 0 ? gpu::model_round(g.s) : start_gpu(g, u);
        train(g, u, stop, last);
        Floats end = fetch_all(g.plan, {"parameters", "master", "moments"});
        if (stop == 0) whole = end;
        expect_equal("weights and moments, saved after " + gpu::str(stop), end, whole);
    }
}

static std::string contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
}

static void compare_logits(const Gpu& g, const Cpu& c, const std::string& what, int first, int rows) {
    Floats got(size_t(rows) * g.s.config.V), want(got.size());
    gpu::model_logits(g.s, got.data(), first, rows);
    cpu::model_logits(c.s, want.data(), first, rows);
    expect_close(what, got, want.data(), g.s.config.V, bounds.activation);
}

// llm.c's model file, fp32 and bf16, made by the CPU trainer: both read the same weights from it and compute the same logits,
// and the GPU's writes the same bytes again.
static void model_file(const Setup& u) {
    Folder folder;
    for (int type : {int(cpu::TYPE_FP32), int(cpu::TYPE_BF16)}) {
        std::string name = type == cpu::TYPE_BF16 ? "version 5: " : "version 3: ";
        std::string path = folder.path + "/model.bin", again = folder.path + "/again.bin";
        Cpu c(u);
        set_cpu_weights(c);
        for (int i = 0; i < cpu::PARAMS; i++) {  // no longer what bf16 holds
            for (int64_t j = 0; j < cpu::param_count(c.s.config, i); j++) c.s.params[i][j] *= 1.001f;
        }
        cpu::write_model(c.plan, c.s.config, type, path);
        cpu::read_model(c.plan, path);
        gpu::Config config = gpu::read_model_config(path);
        expect(name + "the header differs", memcmp(&config, &c.s.config, sizeof(config)) != 0, 0);
        Gpu g(u, false);
        gpu::read_model(g.plan, path);
        gpu::model_round(g.s);
        int i = 0;
        for (const gpu::Tensor& t : weights(g)) expect_equal(name + t.name, fetch(t), fetch(c.plan.tensors[i++]));
        set_tokens(g.s, u, 3, u.B * u.T);
        set_tokens(c.s, u, 3, u.B * u.T);
        gpu::model_forward(g.s, u.B, u.T, false);
        cpu::model_forward(c.s, u.B, u.T, false);
        compare_logits(g, c, name + "logits", 0, u.B * u.T);
        gpu::write_model(g.plan, g.s.config, type, again);
        expect(name + "the file written again differs", contents(again) != contents(path), 0);
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
        for (int64_t d; dims > 0 && file.read((char*)&d, 8); dims--) r.shape.push_back(d), count *= d;
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
        if (same) expect_close(want[i].name, got[i].data, want[i].data.data(), row, bounds.gradient);
    }
}

// ---- memory

// The device gives what the plan says and no more; tensors begin on 256 bytes; a fresh model is the CPU's, bit for bit.
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
        if (t.type != "byte") expect(t.name + " is off 256 bytes by", double(size_t(data_of(t)) % 256), 0);
    }
    cpu::initialise(c.plan, c.s.config, SEED);
    gpu::initialise(g.plan, g.s.config, SEED);
    int i = 0;
    for (const gpu::Tensor& t : weights(g)) expect_equal(t.name, fetch(t), fetch(c.plan.tensors[i++]));
}

// A plan that no device holds is refused, and the batch named instead is the largest that fits.
static void too_large() {
    Setup u = {"", 1 << 20, 64, 256, 4, 4, 257, 257, 1.0, PAPER, gpu::GAUSSIAN, gpu::KEEP, 1, 0, 1, 0};
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
        double loss = cpu::mean_loss(c.s, 0, N), difference = fabs(gpu::mean_loss(g.s, 0, N) - loss);
        if (!(difference <= apart)) apart = difference;
        if (step == 0) first = loss;
        last = loss;
        if (show_figures && step % 10 == 9) fprintf(report, "    step %d: loss %.6f, %.2e apart\n", step + 1, loss, difference);
        cpu::model_update(c.s, c.plan, step, 5e-3);
        gpu::model_update(g.s, g.plan, step, 5e-3);
    }
    expect("losses apart, at most", apart, bounds.curve);
    expect("last loss over the first", last / first, 0.3);  // or there was nothing to see
}

// ---- main

struct Case {
    std::string name;
    std::function<void()> run;
};

static std::vector<Case> all_cases() {
    std::vector<Case> cases;
    for (const Setup& u : setups) cases.push_back({std::string("tensors-") + u.name, [&u] { tensors(u); }});
    for (int i = 0; i < 4; i++) {
        Setup u = small;
        u.projection = i % 3, u.rank = i < 3 ? u.rank : 1.0;
        std::string name = i == 0 ? "gaussian" : i == 1 ? "rademacher" : i == 2 ? "sparse" : "full-rank";
        cases.push_back({"levels-" + name, [u] { levels(u); }});
        cases.push_back({"repeat-" + name, [u] { repeat(u); }});
    }
    for (const Setup* u : {&small, &odd}) {
        std::string which = u == &odd ? "-odd" : "";
        cases.push_back({"evaluate" + which, [u] { evaluate(*u); }});
        cases.push_back({"resume" + which, [u] { resume(*u); }});
        cases.push_back({"model-file" + which, [u] { model_file(*u); }});
        cases.push_back({"dump" + which, [u] { dump(*u); }});
        cases.push_back({"memory" + which, [u] { memory(*u); }});
    }
    cases.push_back({"too-large", [] { too_large(); }});
    cases.push_back({"curve-full-rank", [] { curve(1.0, gpu::GAUSSIAN); }});
    cases.push_back({"curve-gaussian", [] { curve(1.0 / 4, gpu::GAUSSIAN); }});
    return cases;
}

int main(int argc, char** argv) {
    if (argc > 99) cpu::run(argc, argv), gpu::run(argc, argv);  // used, so that the compiler does not miss their uses
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
        fprintf(report, "%-36s %-46s %-20s %6.1f s  %s\n", one.name.c_str(), error.empty() ? worst.what.c_str() : error.c_str(),
                error.empty() ? figure.c_str() : "", gpu::seconds() - began, good ? "ok" : "FAILED");
        ++(good ? passed : failed);
    }
    if (list) return 0;
    fprintf(report, "%d passed, %d failed\n", passed, failed);
    return failed > 0 || passed == 0;
}
