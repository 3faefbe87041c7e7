// common.cuh: what the files of dev/cuda share. Each of them is one layer: its kernels, numbered
// from the naive one upward, and a main of one line that hands a Layer to `harness`, which checks,
// predicts and times. README.md says how to run them.
//
// A file gives for each size (its own meaning: {N, C}, say) a list of variants. Their arrays
// come from Arrays, which fills them before each variant anew: inputs with their numbers,
// results with NaN.

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

// A file uses a part of the trainers and of this. The compiler leaves out the rest, since nothing
// here is seen from outside.
#ifdef __NVCC__
#pragma nv_diagnostic push
#pragma nv_diag_suppress 177  // declared but never referenced
#endif
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-variable"

#define TESTING
namespace {
namespace cpu {
#include "../../train_gpt2_compact.cpp"
}
namespace gpu {
#include "../../train_gpt2_compact.cu"
}

using namespace gpu;  // variants are written in the trainer's words
typedef std::vector<float> Floats;
typedef std::vector<int> Size;

// ---- what a file gives

// Bytes to and from memory, and arithmetic: a multiplication with its addition counts 2, an
// exponential 1.
struct Work {
    double bytes, flops;
};

struct Variant {
    const char* idea;  // in a line
    // what it asks for, but for what the caches surely hold: weights, lines that neighbours share
    Work work;
    // the least that any variant with these results moves and computes
    Work floor;
    std::function<void()> run;    // launches it; null where it does not take this size
    std::function<void()> check;  // after run: calls `expect` for each result
    bool repeatable = true;       // two runs give the same bits; false needs a reason
};

struct Arrays;

struct Layer {
    const char* name;
    std::vector<const char*> dims;  // the names of a size's numbers
    // awkward ones, small: on a CPU all of them together take a second or so
    std::vector<Size> checked;
    Size timed;
    // The same variants, in the same order, at each size. All device memory comes from Arrays, and
    // nothing is launched here.
    std::function<std::vector<Variant>(Arrays&, const Size&)> variants;
};

// ---- arrays

template <class T>
Floats fetch(const T* from, int64_t count) {  // to the host
    std::vector<T> raw(count);
    CUDA(cudaMemcpy(raw.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost));
    return Floats(raw.begin(), raw.end());
}

// The arrays of a layer at one size. A dry one draws nothing and allocates nothing: its
// pointers are null.
struct Arrays {
    struct Array {
        char* device;
        std::vector<char> start;  // what it holds before a variant runs
    };
    bool dry;
    uint64_t drawn = 0;
    std::vector<Array> all;
    explicit Arrays(bool dry) : dry(dry) {}
    Arrays(const Arrays&) = delete;
    ~Arrays() {
        for (Array& a : all) cudaFree(a.device);
    }

    // Normal numbers, the same in every run: in floatX, or in fp32.
    floatX* normals(int64_t count, float scale = 1, float mean = 0) {
        Floats drawn = draw(count, scale, mean);
        return put(std::vector<floatX>(drawn.begin(), drawn.end()));
    }
    float* normals_fp32(int64_t count, float scale = 1, float mean = 0) {
        return put(draw(count, scale, mean));
    }
    // Any numbers; a result that a kernel adds to begins so as well.
    template <class T>
    T* put(const std::vector<T>& host) {
        return (T*)add((const char*)host.data(), host.size() * sizeof(T));
    }
    // A result: NaN (integers: -1) until it is written.
    template <class T>
    T* room(int64_t count) {
        std::vector<char> unset(dry ? 0 : count * sizeof(T), char(0xFF));
        return (T*)add(unset.data(), unset.size());
    }
    // What an array began with, for the CPU's reference.
    template <class T>
    Floats start(const T* array) const {
        for (const Array& a : all) {
            if (a.device == (const char*)array)
                return Floats((const T*)a.start.data(),
                              (const T*)a.start.data() + a.start.size() / sizeof(T));
        }
        fail("start: no array begins there");
    }

    Floats draw(int64_t count, float scale, float mean) {
        Floats out(dry ? 0 : count);
        draw_normals(out.data(), 0, out.size(), scale, 1, drawn++);
        for (float& x : out) x += mean;
        return out;
    }
    char* add(const char* start, size_t bytes) {
        if (dry) return nullptr;
        all.push_back({nullptr, std::vector<char>(start, start + bytes)});
        CUDA(cudaMalloc((void**)&all.back().device, bytes));
        return all.back().device;
    }
    void restart() {
        for (Array& a : all)
            CUDA(cudaMemcpy(a.device, a.start.data(), a.start.size(), cudaMemcpyHostToDevice));
    }
    std::vector<std::vector<char>> contents() const {
        std::vector<std::vector<char>> out;
        for (const Array& a : all) {
            out.emplace_back(a.start.size());
            CUDA(cudaMemcpy(out.back().data(), a.device, a.start.size(), cudaMemcpyDeviceToHost));
        }
        return out;
    }
};

// A sparse projection (n, r): for the kernels that fold, and for the CPU's reference.
struct SparseProjection {
    cpu::Linear linear;
    Floats sign;
    std::vector<int> shift;
    float* d_sign;
    int* d_shift;
    SparseProjection(Arrays& a, int n, int r) : linear{1, n, r}, sign(n), shift((n + r - 1) / r) {
        cpu::draw_projection(sign.data(), shift.data(), linear, SPARSE, 1, a.drawn++);
        d_sign = a.put(sign), d_shift = a.put(shift);
    }
    Fold fold(floatX* z) const { return Fold{z, d_sign, d_shift, linear.n, linear.r}; }
    Floats project(const Floats& x) const {  // z (N, r) of x (N, n)
        int N = int(x.size() / linear.n);
        Floats z(int64_t(N) * linear.r);
        cpu::project(z.data(), x.data(), sign.data(), shift.data(), linear, SPARSE, N);
        return z;
    }
};

// ---- comparison

// What one rounding to floatX moves a number by, relative to it: half a unit in the last place,
// 2^-8 in bf16 and 2^-24 in fp32. A little more, since what is rounded here and there differs by
// some fp32 roundings.
const double ROUNDING = IS_BF16 ? 1.02 / (1 << 8) : 4.0 / (1 << 24);

struct Worst {
    double ratio = -1;  // the error over its bound; none yet
    std::string what;
};
Worst worst;  // of the variant that is being checked

// Each of count elements on the device within absolute + relative |want| of what is wanted.
template <class T>
void expect(const char* what, const T* got, const Floats& want, double absolute,
            double relative = ROUNDING) {
    Floats numbers = fetch(got, want.size());
    for (size_t i = 0; i < want.size(); i++) {
        double error = fabs(double(numbers[i]) - want[i]),
               ratio = error == 0 ? 0 : error / (absolute + relative * fabs(want[i]));
        if (std::isnan(ratio)) ratio = INFINITY;
        if (ratio > worst.ratio)
            worst = {ratio, text("%s[%zu]: %g, not %g", what, i, numbers[i], want[i])};
    }
}

// ---- measurement

const int64_t LARGE = 512 << 20;  // bytes, more than any L2 cache

// grid 1024, block 256. Reading leaves no lines in the cache that would have to be written back
// while a variant is timed, as writing would. The memory is all zeros, so nothing is written.
__global__ void read_all(float4* from) {
    float sum = 0;
    for (int64_t i = blockIdx.x * 256 + threadIdx.x; i < LARGE / 16; i += 1024 * 256) {
        float4 x = from[i];
        sum += x.x + x.y + x.z + x.w;
    }
    if (sum != 0) from[0].x = sum;
}

// The device's events around some work, in milliseconds; the work before the first event keeps the
// device busy while the host is launching.
struct Stopwatch {
    cudaEvent_t start, end;
    float4* large;
    Stopwatch() {
        CUDA(cudaEventCreate(&start));
        CUDA(cudaEventCreate(&end));
        CUDA(cudaMalloc((void**)&large, LARGE));
        CUDA(cudaMemset(large, 0, LARGE));
    }
    ~Stopwatch() { cudaEventDestroy(start), cudaEventDestroy(end), cudaFree(large); }

    // The median of 11 runs or more, up to a tenth of a second of them; the first is not counted.
    double median(const std::function<void()>& run) {
        Floats times;
        for (double sum = 0; times.size() < 12 || (sum < 100 && times.size() < 500);
             sum += times.back()) {
            read_all<<<1024, 256>>>(large);
            LAUNCHED();
            CUDA(cudaEventRecord(start));
            run();
            CUDA(cudaEventRecord(end));
            CUDA(cudaEventSynchronize(end));
            times.emplace_back();
            CUDA(cudaEventElapsedTime(&times.back(), start, end));
        }
        times.erase(times.begin());
        std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
        return times[times.size() / 2];
    }
    // Bytes a second of a copy, those read and those written.
    double bandwidth() {
        auto copy = [&] {
            CUDA(cudaMemcpyAsync(large, (char*)large + LARGE / 2, LARGE / 2,
                                 cudaMemcpyDeviceToDevice));
        };
        return LARGE / (median(copy) / 1e3);
    }
};

// ---- the harness

std::string size_text(const Layer& layer, const Size& size, const char* format,
                      const char* between) {
    std::string out;
    for (size_t i = 0; i < size.size(); i++)
        out += (i ? between : "") + text(format, layer.dims[i], size[i]);
    return out;
}

bool check_variant(const Layer& layer, int number, const Variant& listed) {
    Worst all;
    try {
        for (const Size& size : layer.checked) {
            Arrays arrays(false);
            Variant variant = layer.variants(arrays, size)[number - 1];
            if (!variant.run) continue;
            worst = {};
            arrays.restart();
            variant.run();
            LAUNCHED();
            CUDA(cudaDeviceSynchronize());
            variant.check();
            auto first = arrays.contents();
            arrays.restart();
            variant.run();
            CUDA(cudaDeviceSynchronize());
            if (variant.repeatable && arrays.contents() != first)
                worst = {INFINITY, "two runs differ"};
            if (worst.ratio > all.ratio)
                all = {worst.ratio, worst.what + " at " + size_text(layer, size, "%s=%d", " ")};
        }
    } catch (const Failure& failure) {
        all = {INFINITY, failure.message};
    }
    bool good = all.ratio >= 0 && all.ratio <= 1;
    printf("%3d  %s  %5.2f of the bound; %s\n", number, good ? "passed" : "FAILED", all.ratio,
           listed.idea);
    if (!good) printf("     %s\n", all.ratio < 0 ? "compares nothing" : all.what.c_str());
    fflush(stdout);
    return good;
}

// What all JSON lines say about a variant.
std::string variant_json(const Layer& layer, int number, const Variant& v) {
    return "{\"layer\": " + json_string(layer.name) +
           text(", \"variant\": %d, \"idea\": ", number) + json_string(v.idea) +
           ", \"precision\": \"" + TYPE_X + "\", \"size\": {" +
           size_text(layer, layer.timed, "\"%s\": %d", ", ") +
           text("}, \"bytes\": %.0f, \"flops\": %.0f, \"floor_bytes\": %.0f, \"floor_flops\": %.0f",
                v.work.bytes, v.work.flops, v.floor.bytes, v.floor.flops);
}

// Times the variants from first to last at the size for it. Returns the JSON lines.
std::string time_variants(const Layer& layer, int first, int last) {
    Stopwatch watch;
    double bandwidth = watch.bandwidth(), rate = model_peak_flops();
    printf("%s; a copy runs at %.0f GB/s, matrix products at %.1f TFLOP/s\n",
           model_device().c_str(), bandwidth / 1e9, rate / 1e12);
    Arrays arrays(false);
    std::vector<Variant> variants = layer.variants(arrays, layer.timed);
    std::string lines;
    for (int number = first; number <= last; number++) {
        const Variant& v = variants[number - 1];
        if (!v.run) continue;
        arrays.restart();
        // 0: a rate that could not be found
        double ms = watch.median(v.run), arithmetic = rate > 0 ? v.floor.flops / rate : 0;
        double floor = 1e3 * std::max(v.floor.bytes / bandwidth, arithmetic);
        // Arithmetic shows where there is much of it for each byte: where it can be what limits.
        std::string tflops =
            v.work.flops > 16 * v.work.bytes ? text("%7.1f TFLOP/s", v.work.flops / ms / 1e9) : "";
        printf("%3d  %9.4f ms  %6.0f GB/s %15s  %3.0f %% of the floor; %s\n", number, ms,
               v.work.bytes / ms / 1e6, tflops.c_str(), 100 * floor / ms, v.idea);
        fflush(stdout);
        lines += variant_json(layer, number, v) + ", \"device\": " + json_string(model_device()) +
                 text(", \"bytes_per_s\": %.4g, \"flops_per_s\": %.4g", bandwidth, rate) +
                 text(", \"floor_ms\": %.6f, \"ms\": %.6f}\n", floor, ms);
    }
    return lines;
}

int run_harness(const Layer& layer, int argc, char** argv) {
    Arrays dry(true);
    std::vector<Variant> listed = layer.variants(dry, layer.timed);
    int count = int(listed.size()), first = 1, last = count, failed = 0;
    std::string mode, json;
    for (int i = 1; i < argc; i++) {
        std::string argument = argv[i];
        char* end = argv[i];
        long number = strtol(argv[i], &end, 10);
        if (argument == "--check" || argument == "--predict") {
            if (!mode.empty()) refuse(argument + ": " + mode + " is given already");
            mode = argument;
        } else if (argument == "--json") {
            if (i + 1 == argc || !*argv[i + 1]) refuse("--json: a file's name is missing");
            json = argv[++i];
        } else if (end == argv[i] || *end || number < 1 || number > count) {
            refuse(argument + ": is neither a variant, 1 to " + join(count) +
                   ", nor one of --check, --predict, --json FILE");
        } else if (first == last && count > 1) {
            refuse(argument + ": one variant or all of them");
        } else {
            first = last = int(number);
        }
    }
    if (!json.empty() && !mode.empty())
        refuse("--json: " + mode + " measures nothing to be written");
    if (mode == "--predict") {
        for (int number = first; number <= last; number++)
            printf("%s}\n", variant_json(layer, number, listed[number - 1]).c_str());
        return 0;
    }
#ifdef __NOGPU__
    if (!json.empty()) refuse("--json: a CPU in a GPU's place is not timed");
#endif
    FILE* file = json.empty() ? nullptr : fopen(json.c_str(), "ab");
    if (!json.empty() && !file)
        refuse("--json: " + json + " cannot be written: " + strerror(errno));
    int devices;
    CUDA(cudaGetDeviceCount(&devices));  // says what is missing where cuBLAS would only fail
    CUDA(cublasCreate(&cublas));
    printf("%s, %s against the CPU at %zu sizes\n", layer.name, TYPE_X, layer.checked.size());
    for (int number = first; number <= last; number++)
        failed += !check_variant(layer, number, listed[number - 1]);
    printf("%d passed, %d failed\n", last - first + 1 - failed, failed);
#ifdef __NOGPU__
    printf("not timed: a CPU in a GPU's place\n");
#else
    if (failed == 0 && mode != "--check") {
        printf("%s at %s\n", layer.name, size_text(layer, layer.timed, "%s=%d", " ").c_str());
        std::string lines = time_variants(layer, first, last);
        if (file &&
            (fwrite(lines.data(), 1, lines.size(), file) != lines.size() || fclose(file) != 0))
            fail(json + ": cannot be written: " + strerror(errno));
    }
#endif
    CUDA(cublasDestroy(cublas));
    return failed > 0;
}

// A file's main: ./FILE [VARIANT] [--check | --predict | --json FILE]. Status 0, 1 where a check
// failed, 2 for bad input.
int harness(const Layer& layer, int argc, char** argv) {
    try {
        return run_harness(layer, argc, argv);
    } catch (const Failure& failure) {
        fflush(stdout);
        fprintf(stderr, "%s: %s\n", layer.name, one_line(failure.message).c_str());
        return failure.status;
    }
}

}  // namespace

#pragma GCC diagnostic pop
#ifdef __NVCC__
#pragma nv_diagnostic pop
#endif
