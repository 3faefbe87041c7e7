// test_cpu.cpp: unit tests of the CPU trainer, function by function. test_cpu.py runs them one by
// one under pytest.
//
//   g++ -std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -Wall -Wextra
//       -Wno-unused-function -DUSE_OPENBLAS dev/test/test_cpu.cpp -o build/test_cpu
//       $(pkg-config --cflags --libs openblas gtest)
//
// or without BLAS, or with -O1 -g -fsanitize=address,undefined, which is how the loaders' mutants
// say most.
//
// What a layer must compute is written here once more, naively and in double precision; its
// gradient must be the slope of that. Random inputs come from fixed seeds: a test passes always or
// never, and a statistic's bound is chosen once.

#define TESTING
#include "../../train_gpt2_compact.cpp"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <filesystem>
#include <numeric>
#include <set>

#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes)
#endif
// There where a sanitizer is.
extern "C" size_t __sanitizer_get_allocated_size(const volatile void*);

typedef std::vector<float> Floats;
typedef std::vector<double> Doubles;

// The relative error of one operation in float32, at most.
static const double ROUND = 1.0 / (1 << 24);

// SplitMix64 (Steele et al., OOPSLA'14): the same numbers on any machine, and none of the trainer's
// own.
struct Random {
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed) {}
    uint64_t next() {
        uint64_t x = state += 0x9E3779B97F4A7C15ull;
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
        x = (x ^ x >> 27) * 0x94D049BB133111EBull;
        return x ^ x >> 31;
    }
    int below(int64_t n) { return int(next() % uint64_t(n)); }
    float real() { return float(int64_t(next()) >> 40) / (1 << 23); }  // in [-1, 1)
    Floats reals(size_t n, float scale = 1, float middle = 0) {
        Floats x(n);
        for (float& value : x) value = middle + scale * real();
        return x;
    }
    Floats wholes(
        size_t n) {  // in -4..4: sums of a few thousand of their products are exact in float32
        Floats x(n);
        for (float& value : x) value = float(below(9) - 4);
        return x;
    }
};

static Doubles doubles(const Floats& x) { return Doubles(x.begin(), x.end()); }

static double greatest(const Doubles& x) {
    double most = 0;
    for (double value : x) most = std::max(most, fabs(value));
    return most;
}

// got and want differ nowhere by more than tolerance, in units of `unit`, or of want's greatest
// element. NaN fails.
static void expect_close(const std::string& name, const float* got, const Doubles& want,
                         double tolerance, double unit = 0) {
    if (unit == 0) unit = greatest(want);
    size_t worst = 0;
    double most = -1;
    for (size_t i = 0; i < want.size(); i++) {
        double error = fabs(got[i] - want[i]);
        if (error <= most) continue;
        worst = i, most = error;
        if (std::isnan(error)) break;
    }
    EXPECT_TRUE(most <= tolerance * unit)
        << name << "[" << worst << "] is " << got[worst] << ", must be " << want[worst]
        << ": off by " << most / unit << " units, " << tolerance << " allowed";
}

static void expect_same(const std::string& name, const float* got, const float* want, size_t n) {
    size_t i = 0;
    while (i < n && got[i] == want[i]) i++;
    EXPECT_EQ(i, n) << name << "[" << i << "] is " << got[i] << ", must be " << want[i];
}

// The slope of f at x[i], by central differences. f reads x. With x and f of size 1 and h = 1e-5,
// f's curvature costs about 1e-10 and double precision about 1e-11: nothing beside float32.
static double slope(Doubles& x, size_t i, const std::function<double()>& f) {
    const double h = 1e-5, was = x[i];
    x[i] = was + h;
    double up = f();
    x[i] = was - h;
    double down = f();
    x[i] = was;
    return (up - down) / (2 * h);
}

static Doubles slopes(Doubles& x, const std::function<double()>& f) {
    Doubles all;
    for (size_t i = 0; i < x.size(); i++) all.push_back(slope(x, i, f));
    return all;
}

static double dot(const Doubles& a, const Doubles& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); i++) sum += a[i] * b[i];
    return sum;
}

// c (M, N) = a b, where a and b may be transposed as in the trainer's matmul
static Doubles naive_product(const Doubles& a, bool ta, const Doubles& b, bool tb, int M, int N,
                             int K) {
    Doubles c(size_t(M) * N);
    for (int i = 0; i < M; i++) {
        for (int k = 0; k < K; k++) {
            double left = ta ? a[size_t(k) * M + i] : a[size_t(i) * K + k];
            for (int j = 0; j < N; j++)
                c[size_t(i) * N + j] += left * (tb ? b[size_t(j) * K + k] : b[size_t(k) * N + j]);
        }
    }
    return c;
}

// A model and its memory.
struct Tiny {
    Model s;
    Plan plan;
    Tiny(const Config& c, const Options& o) {
        plan = model_plan(s, c, o);
        model_allocate(s, plan);
    }
    Tiny(const Tiny&) = delete;
    ~Tiny() {
        for (const std::string& category : plan.categories()) {
            for (const Tensor& t : plan.tensors) {
                if (t.category != category) continue;
                free(
                    *(void**)t
                         .home);  // a category's first tensor stands at the beginning of its memory
                break;
            }
        }
    }
    void randomise(uint64_t seed) {
        Random random(seed);
        for (int i = 0; i < PARAMS; i++) {
            bool norm = i == LN1W || i == LN2W || i == LNFW;
            Floats values = random.reals(param_count(s.config, i), 0.3f, norm ? 1.0f : 0.0f);
            std::copy(values.begin(), values.end(), s.params[i]);
        }
    }
    void random_tokens(uint64_t seed) {
        Random random(seed);
        for (int i = 0; i < s.options.batch * s.options.seq; i++) {
            s.inputs[i] = random.below(s.config.V), s.targets[i] = random.below(s.config.V);
        }
    }
};

// Nothing divides anything: 25 and 100 inputs at rank 7, 37 words padded to 40, 5 heads of 5.
static Config odd_config() { return {8, 37, 2, 5, 25, 40}; }

static Options odd_options(int projection, double rank) {
    Options o;
    o.batch = 3, o.seq = 7, o.total_batch = 21;
    o.projection = projection, o.rank = rank, o.optimizer = ADAMW;
    return o;
}

// P (n, r) written out in full, after the design's words: input k goes to column (k + shift[k div
// r]) mod r with its sign.
static Doubles written_out(const Linear& l, int projection, const Floats& p,
                           const std::vector<int>& shift) {
    if (projection != SPARSE) return doubles(p);
    Doubles full(size_t(l.n) * l.r);
    for (int k = 0; k < l.n; k++) full[size_t(k) * l.r + (k + shift[k / l.r]) % l.r] = p[k];
    return full;
}

struct Drawn {
    Floats p;
    std::vector<int> shift;
    Doubles full;
};

static Drawn draw(const Linear& l, int projection, uint64_t seed, uint64_t stream) {
    Drawn d;
    d.p.resize(projection == SPARSE ? l.n : size_t(l.n) * l.r);
    d.shift.resize((l.n + l.r - 1) / l.r);
    draw_projection(d.p.data(), d.shift.data(), l, projection, seed, stream);
    d.full = written_out(l, projection, d.p, d.shift);
    return d;
}

// ---- random numbers

TEST(Philox, KnownAnswers) {  // Random123's kat_vectors, "philox4x32 10": counter, key, result
    const uint32_t rows[][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
         0x94fdcceb, 0x5001e420, 0x24126ea1}};
    for (auto& r : rows) {
        Words w = philox(uint64_t(r[5]) << 32 | r[4], uint64_t(r[3]) << 32 | r[2],
                         uint64_t(r[1]) << 32 | r[0]);
        EXPECT_EQ(w.x, r[6]);
        EXPECT_EQ(w.y, r[7]);
        EXPECT_EQ(w.z, r[8]);
        EXPECT_EQ(w.w, r[9]);
    }
}

TEST(Philox, StreamsDiffer) {
    std::set<uint64_t> streams;
    size_t count = 0;
    for (int purpose = 0; purpose <= STREAM_ROUND; purpose++) {
        for (uint64_t layer : {0, 1, 2, 255, 256, 1023}) {
            for (uint64_t epoch : {0, 1, 2, 255, 256, 1 << 24, 1 << 30})
                streams.insert(stream_of(purpose, layer, epoch)), count++;
        }
    }
    EXPECT_EQ(streams.size(), count);
}

TEST(Elementary, ExpLogSinCos) {
    // In ulps of the true value. Each polynomial is good to less than 1 and is then rounded about
    // once: 0.99 for exp, 0.83 for log and 1.5 for sin and cos were the greatest found.
    auto ulps = [](float got, double want) {
        int exponent;
        frexp(want, &exponent);
        return fabs(got - want) / ldexp(1.0, exponent - 24);
    };
    double worst_exp = 0, worst_log = 0, worst_sin = 0;
    for (uint32_t bits = 0x00800000; bits < 0x7F800000;
         bits += 97) {  // every 97th positive normal float
        float x = float_of_bits(bits), s, c;
        worst_log = std::max(worst_log, ulps(log_simd(x), log(double(x))));
        if (x <= 88.3f) worst_exp = std::max(worst_exp, ulps(exp_simd(x), exp(double(x))));
        if (x <= 87.3f) worst_exp = std::max(worst_exp, ulps(exp_simd(-x), exp(-double(x))));
        if (x > 6.2831855f) continue;
        sincos_simd(x, &s, &c);
        // Near a multiple of pi/2 what counts is how many digits of pi/2 are taken off x: some 46
        // bits are, so 2e-14.
        for (auto& pair : {std::make_pair(s, sin(double(x))), std::make_pair(c, cos(double(x)))}) {
            if (fabs(pair.first - pair.second) > 2e-14)
                worst_sin = std::max(worst_sin, ulps(pair.first, pair.second));
        }
    }
    EXPECT_LE(worst_exp, 1.5);
    EXPECT_LE(worst_log, 1.5);
    EXPECT_LE(worst_sin, 2.0);
    EXPECT_EQ(exp_simd(0.0f), 1.0f);
    EXPECT_EQ(log_simd(1.0f), 0.0f);
}

TEST(Elementary, OutOfRange) {
    float s, c;
    sincos_simd(NAN, &s, &c);
    EXPECT_TRUE(std::isnan(s) && std::isnan(c));
    EXPECT_TRUE(std::isnan(exp_simd(NAN)));
    EXPECT_LT(exp_simd(-INFINITY), 2e-38f);  // clamped: small and large, but neither 0 nor infinite
    EXPECT_GT(exp_simd(-INFINITY), 0.0f);
    EXPECT_GT(exp_simd(INFINITY), 2e38f);
    EXPECT_LT(exp_simd(INFINITY), INFINITY);
    EXPECT_EQ(exp_simd(1e30f), exp_simd(88.3f));
}

TEST(Normals, AreBoxMullerOfTheWords) {
    const int n = 100003;  // not a multiple of 4
    Floats x(n + 1, 7.0f);
    draw_normals(x.data(), 0, n, 3.0f, 99, 5);
    EXPECT_EQ(x[n], 7.0f);
    Doubles want(n);
    for (int i = 0; i < n; i++) {
        Words w = philox(99, 5, i / 4);
        uint32_t u = i & 2 ? w.z : w.x, v = i & 2 ? w.w : w.y;
        // Its rounding is part of the definition, for near 1 it is great.
        const float uniform = ldexpf(float(u) + 0.5f, -32);
        const double angle = (double(float(v)) + 0.5) * ldexp(double(6.2831855f), -32),
                     length = 3 * sqrt(-2 * log(double(uniform)));
        want[i] = length * (i & 1 ? cos(angle) : sin(angle));
    }
    // The angle is up to 2 pi, and rounded once or twice, by 2^-22 at most; the greatest length is
    // 3 * 5; and a little more for the rounding of the number itself.
    expect_close("normals", x.data(), want, 8e-6, 1.0);
}

TEST(Normals, AnyPieceIsTheSame) {
    const int n = 5000;
    Floats whole(n), piece(n);
    draw_normals(whole.data(), 0, n, 0.5f, 1, 2);
    for (int start : {0, 4, 512, 516, 2044}) {
        for (int count : {1, 3, 4, 511, 512, 513, 2000}) {
            draw_normals(piece.data(), start, count, 0.5f, 1, 2);
            expect_same("piece", piece.data(), whole.data() + start, count);
        }
    }
}

TEST(Normals, Moments) {
    const int64_t n = 1 << 22;
    Floats x(n);
    for (uint64_t seed : {0, 1337}) {
        draw_normals(x.data(), 0, n, 1.0f, seed, stream_of(QKV, 1, seed));
        double sum = 0, squares = 0, cubes = 0, fourths = 0, neighbours = 0;
        std::vector<int> bins(64);
        for (int64_t i = 0; i < n; i++) {
            double v = x[i], vv = v * v;
            sum += v, squares += vv, cubes += v * vv, fourths += vv * vv,
                neighbours += v * x[(i + 1) % n];
            // 64 ranges of equal probability.
            bins[std::min(63, int(64 * 0.5 * erfc(-v / sqrt(2.0))))]++;
        }
        // In standard errors. Of a normal's powers 1 to 4 the variances are 1, 2, 15 and 96. Beyond
        // 4: one time in 16,000.
        double root = sqrt(double(n));
        EXPECT_LE(fabs(sum) / root, 4);
        EXPECT_LE(fabs(squares - n) / root / sqrt(2.0), 4);
        EXPECT_LE(fabs(cubes) / root / sqrt(15.0), 4);
        EXPECT_LE(fabs(fourths - 3.0 * n) / root / sqrt(96.0), 4);
        EXPECT_LE(fabs(neighbours) / root, 4);
        double chi = 0;
        for (int count : bins) chi += (count - n / 64.0) * (count - n / 64.0) / (n / 64.0);
        // Chi-square's mean, and 4 of its standard deviations.
        EXPECT_LE(chi, 63 + 4 * sqrt(2.0 * 63));
    }
}

TEST(Signs, AreTheBitsOfTheWords) {
    const int n = 1000;  // not a multiple of 128
    Floats x(n + 1, 7.0f);
    draw_signs(x.data(), n, 0.25f, 3, 4);
    EXPECT_EQ(x[n], 7.0f);
    for (int i = 0; i < n; i++) {
        Words w = philox(3, 4, i / 128);
        uint32_t word = i / 32 % 4 == 0 ? w.x : i / 32 % 4 == 1 ? w.y : i / 32 % 4 == 2 ? w.z : w.w;
        ASSERT_EQ(x[i], word >> i % 32 & 1 ? -0.25f : 0.25f) << i;
    }
}

TEST(Signs, AreBalanced) {
    const int blocks = 20000;
    Floats x(128 * blocks);
    draw_signs(x.data(), x.size(), 1.0f, 1, stream_of(FC, 2, 3));
    double total = 0, spread = 0;
    for (int bit = 0; bit < 128; bit++) {
        double sum = 0, follower = 0;
        for (int i = 0; i < blocks; i++) {
            sum += x[128 * i + bit];
            follower += x[128 * i + bit] * x[128 * i + (bit + 1) % 128];
        }
        EXPECT_LE(fabs(sum) / sqrt(double(blocks)), 4.5)
            << bit;  // one of 256 beyond 4.5: one time in 600
        EXPECT_LE(fabs(follower) / sqrt(double(blocks)), 4.5) << bit;
        total += sum, spread += sum * sum / blocks;
    }
    EXPECT_LE(fabs(total) / sqrt(128.0 * blocks), 4);
    // As uneven as chance makes them, not more even.
    EXPECT_NEAR(spread / 128, 1, 4 * sqrt(2.0 / 128));
}

// ---- matrix product

TEST(Matmul, ShapesTransposesScalesThreads) {
    const int shapes[][3] = {{1, 1, 1},      {1, 97, 1},     {97, 1, 1},    {5, 33, 7},
                             {257, 31, 769}, {31, 257, 300}, {3, 64, 1},    {2, 40, 257},
                             {6, 32, 256},   {13, 300, 130}, {64, 64, 513}, {4, 40, 0}};
    const float scales[][2] = {{1, 0}, {-0.7f, 0}, {1, 1}, {1.3f, 0.5f}};
    const int threads_were = omp_get_max_threads();
    Random random(1);
    for (auto& shape : shapes) {
        const int M = shape[0], N = shape[1], K = shape[2];
        const Floats a = random.reals(M * std::max(1, K)), b = random.reals(N * std::max(1, K)),
                     before = random.reals(size_t(M) * N);
        Doubles a_sizes = doubles(a), b_sizes = doubles(b);
        for (double& value : a_sizes) value = fabs(value);
        for (double& value : b_sizes) value = fabs(value);
        for (int transposes = 0; transposes < 4; transposes++) {
            const bool ta = transposes & 1, tb = transposes & 2;
            const Doubles product = naive_product(doubles(a), ta, doubles(b), tb, M, N, K);
            const Doubles sizes = naive_product(a_sizes, ta, b_sizes, tb, M, N, K);
            for (auto& scale : scales) {
                const float alpha = scale[0], beta = scale[1];
                for (int threads = 1; threads <= 3; threads++) {
                    Floats c = beta == 0 ? Floats(before.size(), NAN) : before;
                    omp_set_num_threads(threads);
                    matmul(c.data(), a.data(), ta, b.data(), tb, M, N, K, alpha, beta);
                    size_t wrong = 0;
                    for (size_t i = 0; i < c.size(); i++) {
                        double old = beta == 0 ? 0.0 : double(beta) * before[i],
                               want = alpha * product[i] + old;
                        // K products summed in any order, times alpha, plus beta c: (K + 3)
                        // roundings of at most the sum of the terms' sizes (Higham, Accuracy and
                        // Stability, 3.1). This cannot be exceeded.
                        wrong += !(fabs(c[i] - want) <=
                                   (K + 3) * ROUND * (fabs(alpha) * sizes[i] + fabs(old)));
                    }
                    EXPECT_EQ(wrong, 0u)
                        << M << " x " << N << " x " << K << (ta ? " ta" : "") << (tb ? " tb" : "")
                        << " alpha " << alpha << " beta " << beta << ", " << threads << " threads";
                }
            }
        }
    }
    omp_set_num_threads(threads_were);
}

TEST(Matmul, BiasGradient) {
    Random random(2);
    for (int m : {1, 63, 64, 65, 200}) {
        const int N = 37;
        Floats dy = random.wholes(size_t(N) * m), db = random.wholes(m);
        Doubles want = doubles(db);
        for (int i = 0; i < N * m; i++) want[i % m] += dy[i];
        bias_backward(db.data(), dy.data(), N, m);
        expect_close("db", db.data(), want, 0, 1);  // whole numbers: exact
    }
}

// ---- layers

struct NaiveNorm {
    Doubles y, mean, rstd;
};

static NaiveNorm naive_layernorm(const Doubles& x, const Doubles& w, const Doubles& b, int N,
                                 int C) {
    NaiveNorm out = {Doubles(x.size()), Doubles(N), Doubles(N)};
    for (int i = 0; i < N; i++) {
        double sum = 0, squares = 0;
        for (int j = 0; j < C; j++) sum += x[i * C + j];
        out.mean[i] = sum / C;
        for (int j = 0; j < C; j++) squares += pow(x[i * C + j] - out.mean[i], 2);
        out.rstd[i] = 1 / sqrt(squares / C + 1e-5);
        for (int j = 0; j < C; j++)
            out.y[i * C + j] = (x[i * C + j] - out.mean[i]) * out.rstd[i] * w[j] + b[j];
    }
    return out;
}

TEST(LayerNorm, ForwardAndBackward) {
    Random random(3);
    for (int C : {1, 2, 7, 64, 65, 200}) {
        const int N = 5;
        const Floats x = random.reals(N * C), w = random.reals(C), b = random.reals(C),
                     dy = random.reals(N * C);
        Floats y(N * C, NAN), mean(N, NAN), rstd(N, NAN), dx(N * C, NAN), dw = random.reals(C),
                                                                          db = random.reals(C);
        Doubles xd = doubles(x), wd = doubles(w), bd = doubles(b);
        auto loss = [&] { return dot(naive_layernorm(xd, wd, bd, N, C).y, doubles(dy)); };
        NaiveNorm want = naive_layernorm(xd, wd, bd, N, C);
        layernorm_forward(y.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), N, C);
        // Sums of up to 200 terms of size 1, in lanes: about sqrt(200) roundings, a few 1e-7; times
        // rstd, which is up to 10 at C = 2 and cancels in y.
        expect_close("y", y.data(), want.y, 2e-6, 1);
        expect_close("mean", mean.data(), want.mean, 1e-6, 1);
        expect_close("rstd", rstd.data(), want.rstd, 3e-6);
        Doubles dx_want = slopes(xd, loss), dw_want = slopes(wd, loss), db_want = slopes(bd, loss);
        for (int j = 0; j < C; j++) dw_want[j] += dw[j], db_want[j] += db[j];
        layernorm_backward(dx.data(), dw.data(), db.data(), dy.data(), x.data(), mean.data(),
                           rstd.data(), w.data(), N, C, 0.0f);
        // dx is a difference of terms of size rstd: in that unit, a few roundings.
        expect_close("dx", dx.data(), dx_want, 3e-6, greatest(want.rstd));
        expect_close("dw", dw.data(), dw_want, 3e-6);
        expect_close("db", db.data(), db_want, 2e-6);
        Floats twice = dx;  // beta 1 adds
        layernorm_backward(twice.data(), dw.data(), db.data(), dy.data(), x.data(), mean.data(),
                           rstd.data(), w.data(), N, C, 1.0f);
        for (size_t i = 0; i < dx.size(); i++) dx_want[i] *= 2;
        expect_close("dx twice", twice.data(), dx_want, 6e-6, greatest(want.rstd));
    }
}

TEST(LayerNorm, LargeMean) {  // a mean of 100 with a spread of 1: E[x^2] - E[x]^2 in float32 would
                              // lose 1e-3 of the variance
    const int N = 4, C = 300;
    Random random(4);
    const Floats x = random.reals(N * C, 1, 100), w(C, 1.0f), b(C, 0.0f);
    Floats y(N * C), mean(N), rstd(N);
    layernorm_forward(y.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), N, C);
    // The mean is off by a few roundings of 100, say 2e-5, which rstd = 1.7 makes 3e-5 in y.
    expect_close("y", y.data(), naive_layernorm(doubles(x), Doubles(C, 1.0), Doubles(C), N, C).y,
                 1e-4, 1);
}

static double naive_gelu(double x) {
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

TEST(Gelu, ForwardAndBackward) {
    Floats x;
    for (int i = -3000; i <= 3000; i++) x.push_back(i * 0.004f);
    for (float far : {-1e4f, -50.0f, 50.0f, 1e4f}) x.push_back(far);
    Floats y(x.size(), NAN), d(x.size(), 0.5f);
    gelu_forward(y.data(), x.data(), x.size());
    gelu_backward(d.data(), x.data(), x.size());
    for (size_t i = 0; i < x.size(); i++) {
        Doubles at = {x[i]};
        double want = naive_gelu(at[0]),
               u = fabs(sqrt(2 / M_PI) * (at[0] + 0.044715 * pow(at[0], 3)));
        // e^-2u repeats the rounding of 2u, some 3 roundings, as its relative error; around that
        // some 6 roundings more. Where tanh is 1 to the last bit of a double, on the far left, the
        // naive form is 0 and tells no more.
        ASSERT_NEAR(y[i], want, (6 + 6 * std::min(u, 20.0)) * ROUND * fabs(want) + 1e-15) << x[i];
        if (fabs(x[i]) > 40) {
            ASSERT_NEAR(d[i], x[i] > 0 ? 0.5 : 0.0, 1e-6) << x[i];
            continue;
        }
        double gradient = 0.5 * slope(at, 0, [&] { return naive_gelu(at[0]); });
        // The same error again, in terms of up to x u' sigma (1 - sigma) = 1.
        ASSERT_NEAR(d[i], gradient, 1e-6) << x[i];
    }
}

// The step function's cuts c_i and steps a_i are those for which sum of a_i relu(x - c_i) is
// nearest to GELU in the mean of squares, among those that meet it far out on both sides: the
// slopes end at 1, and sum of a_i c_i = 0.
TEST(Gelu, StepsAreTheLeastSquares) {
    EXPECT_EQ(GELU_SLOPES[0], 0.0f);
    EXPECT_EQ(GELU_SLOPES[3], 1.0f);
    auto distance = [](const Doubles& free) {  // a_1, a_2, c_1, c_2; the third of each follows
        const double a[3] = {free[0], free[1], 1 - free[0] - free[1]};
        const double c[3] = {free[2], free[3], -(a[0] * free[2] + a[1] * free[3]) / a[2]};
        double sum = 0;
        for (double x = -10; x < 10; x += 0.002) {
            double off = naive_gelu(x);
            for (int i = 0; i < 3; i++) off -= a[i] * std::max(0.0, x - c[i]);
            sum += off * off * 0.002;
        }
        return sum;
    };
    Doubles free = {GELU_SLOPES[1], double(GELU_SLOPES[2]) - GELU_SLOPES[1], GELU_CUTS[0],
                    GELU_CUTS[1]};
    EXPECT_NEAR(-(free[0] * free[2] + free[1] * free[3]) / (1 - free[0] - free[1]), GELU_CUTS[2],
                1e-4);
    for (int i = 0; i < 4; i++) {
        const double h = 1e-3, middle = distance(free), was = free[i];
        free[i] = was + h;
        double up = distance(free);
        free[i] = was - h;
        double down = distance(free);
        free[i] = was;
        // Newton's step to the least: of the published numbers, which are for GELU by erf, 7e-4 at
        // most.
        EXPECT_LT(fabs((up - down) / (2 * h) / ((up + down - 2 * middle) / (h * h))), 3e-3) << i;
    }
}

TEST(Gelu, TwoBits) {
    Random random(41);
    Floats x = random.reals(4 * 501, 6);
    for (int i = 0; i < 3; i++) {  // a cut itself lies below it
        x[4 * i] = GELU_CUTS[i];
        x[4 * i + 1] = nextafterf(GELU_CUTS[i], 10), x[4 * i + 2] = nextafterf(GELU_CUTS[i], -10);
    }
    std::vector<uint8_t> bits(x.size() / 4 + 1, 0xAA);
    gelu_bits(bits.data(), x.data(), x.size());
    EXPECT_EQ(bits.back(), 0xAA) << "writes more than a quarter of a byte an element";
    Floats d = random.reals(x.size()), before = d;
    gelu_backward_2bit(d.data(), bits.data(), x.size());
    std::set<int> met;
    for (size_t i = 0; i < x.size(); i++) {
        int below = (x[i] > GELU_CUTS[0]) + (x[i] > GELU_CUTS[1]) + (x[i] > GELU_CUTS[2]);
        ASSERT_EQ(bits[i / 4] >> i % 4 * 2 & 3, below) << x[i];
        ASSERT_EQ(d[i], before[i] * GELU_SLOPES[below]) << x[i];
        met.insert(below);
    }
    EXPECT_EQ(met.size(), 4u);
}

// ---- int8

TEST(Int8, CodesAndScales) {
    Random random(42);
    for (int width : {1, 3, 16, 100}) {
        const int groups = 40;
        Floats x(groups * width), back(x.size(), NAN), scales(groups + 1, NAN);
        for (int g = 0; g < groups;
             g++) {  // of all sizes, down to where a scale is not a normal number any more
            const Floats part =
                random.reals(width, g == 0 ? 0 : float(pow(10, random.below(80) - 43)));
            std::copy(part.begin(), part.end(), x.begin() + g * width);
        }
        std::vector<int8_t> codes(x.size() + 1, 99);
        quantize(codes.data(), scales.data(), x.data(), groups, width);
        dequantize(back.data(), codes.data(), scales.data(), groups, width);
        EXPECT_EQ(codes.back(), 99);
        EXPECT_TRUE(std::isnan(scales.back()));
        for (int g = 0; g < groups; g++) {
            double most = greatest(Doubles(x.begin() + g * width, x.begin() + (g + 1) * width)),
                   scale = scales[g];
            const double tiny = 1.5e-45;  // a scale that is not normal is a multiple of this
            ASSERT_NEAR(scale, most / 127, 2 * ROUND * most / 127 + tiny);
            for (int j = g * width; j < (g + 1) * width; j++) {
                ASSERT_EQ(back[j], float(scale * codes[j]));
                ASSERT_LE(abs(codes[j]), 127);
                if (scale < LEAST_SCALE) {  // counts as zeros
                    ASSERT_EQ(codes[j], 0);
                    continue;
                }
                ASSERT_LE(fabs(x[j] - scale * codes[j]), scale * (0.5 + 127 * 4 * ROUND)) << x[j];
                ASSERT_TRUE(fabs(x[j]) < most || codes[j] == (x[j] > 0 ? 127 : -127));
            }
        }
        for (int j = 0; j < width; j++) ASSERT_EQ(back[j], 0) << "zeros stay zeros";
    }
}

// One head: out (T, hs), lse (T) from q, k, v (T, 3, hs)
static void naive_attention(Doubles& out, Doubles& lse, const Doubles& qkv, int T, int hs) {
    out.assign(size_t(T) * hs, 0.0);
    lse.assign(T, 0.0);
    Doubles score(T);
    for (int t = 0; t < T; t++) {
        const double* q = &qkv[size_t(t) * 3 * hs];
        double most = -INFINITY, sum = 0;
        for (int k = 0; k <= t; k++) {
            score[k] = 0;
            for (int d = 0; d < hs; d++)
                score[k] += q[d] * qkv[(size_t(k) * 3 + 1) * hs + d] / sqrt(double(hs));
            most = std::max(most, score[k]);
        }
        for (int k = 0; k <= t; k++) sum += score[k] = exp(score[k] - most);
        for (int k = 0; k <= t; k++) {
            for (int d = 0; d < hs; d++)
                out[size_t(t) * hs + d] += score[k] / sum * qkv[(size_t(k) * 3 + 2) * hs + d];
        }
        lse[t] = most + log(sum);
    }
}

// The part of one head in x (B, T, parts, NH, hs), as (T, parts, hs).
static Doubles head_of(const Floats& x, int b, int h, int T, int parts, int NH, int hs) {
    Doubles out;
    for (int i = 0; i < T * parts; i++) {
        for (int d = 0; d < hs; d++)
            out.push_back(x[((size_t(b) * T * parts + i) * NH + h) * hs + d]);
    }
    return out;
}

class Attention : public testing::TestWithParam<std::tuple<int, int>> {};

TEST_P(Attention, ForwardAndBackward) {
    const int B = 2, NH = 2, T = std::get<0>(GetParam()), hs = std::get<1>(GetParam()), C = NH * hs;
    Random random(T * 100 + hs);
    const Floats qkv = random.reals(size_t(B) * T * 3 * C), dout = random.reals(size_t(B) * T * C);
    Floats out(dout.size(), NAN), lse(B * NH * T, NAN), dqkv(qkv.size(), NAN);
    // Whatever stands there must not matter.
    Floats scratch(attention_scratch(hs) * omp_get_max_threads(), NAN);
    attention_forward(out.data(), lse.data(), qkv.data(), scratch.data(), B, T, C, NH);
    std::fill(scratch.begin(), scratch.end(), NAN);
    attention_backward(dqkv.data(), dout.data(), qkv.data(), out.data(), lse.data(), scratch.data(),
                       B, T, C, NH);
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < NH; h++) {
            Doubles x = head_of(qkv, b, h, T, 3, NH, hs), d = head_of(dout, b, h, T, 1, NH, hs), o,
                    l, got_out, got_d, want_d;
            naive_attention(o, l, x, T, hs);
            got_out = head_of(out, b, h, T, 1, NH, hs);
            Floats got(got_out.begin(), got_out.end());
            // Scores are sums of hs products and off by some 1e-7; so are the weights, relatively;
            // out is their mean of v.
            expect_close("out", got.data(), o, 1e-6, 1);
            expect_close("lse", &lse[(b * NH + h) * T], l, 2e-6, 1);
            // A slope costs two runs of the naive head, so of many elements some are drawn, tile
            // borders among them.
            got_d = head_of(dqkv, b, h, T, 3, NH, hs);
            got.clear();
            std::vector<size_t> where;
            for (size_t i = 0; i < x.size(); i++) {
                if (x.size() <= 300) where.push_back(i);
            }
            for (int i = 0; where.empty() || (x.size() > 300 && i < 24); i++) {
                int t = i % 4 == 0 ? std::min(T - 1, 63 + i / 4 % 2) : random.below(T);
                where.push_back((size_t(t) * 3 + i % 3) * hs + random.below(hs));
            }
            auto loss = [&] {
                Doubles out_now, lse_now;
                naive_attention(out_now, lse_now, x, T, hs);
                return dot(out_now, d);
            };
            for (size_t i : where)
                got.push_back(float(got_d[i])), want_d.push_back(slope(x, i, loss));
            // Sums of up to T terms, each a product of rounded factors of size 1.
            expect_close("dqkv", got.data(), want_d, 3e-6, 1);
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Attention,
                         testing::Combine(testing::Values(1, 2, 33, 64, 65, 100),
                                          testing::Values(1, 8, 25, 64, 80)),
                         [](const auto& info) {
                             return text("T%d_hs%d", std::get<0>(info.param),
                                         std::get<1>(info.param));
                         });

TEST(AttentionExtremes,
     LargeScores) {  // scores of a few thousand: exp without the maximum taken off would overflow
    const int T = 130, hs = 16;
    Random random(5);
    Floats qkv = random.reals(size_t(T) * 3 * hs, 40), out(T * hs), lse(T),
           scratch(attention_scratch(hs) * omp_get_max_threads());
    attention_forward(out.data(), lse.data(), qkv.data(), scratch.data(), 1, T, hs, 1);
    Doubles want, want_lse;
    naive_attention(want, want_lse, doubles(qkv), T, hs);
    // A score of 6,400 is off by a few roundings of it, 1e-3; so is a weight, relatively; v is up
    // to 40.
    expect_close("out", out.data(), want, 0.1, 1);
    expect_close("lse", lse.data(), want_lse, 1e-6);
}

TEST(Embedding, ForwardAndBackward) {
    const int B = 2, T = 5, V = 4, C = 70;  // ten tokens of four words: each is met again and again
    Random random(6);
    const Floats wte = random.wholes(V * C), wpe = random.wholes((T + 1) * C),
                 dx = random.wholes(B * T * C);
    std::vector<int> tokens(B * T);
    for (int& token : tokens) token = random.below(V - 1);  // the last word never
    Floats x(B * T * C, NAN), dwte = random.wholes(V * C), dwpe = random.wholes((T + 1) * C);
    Doubles wte_d = doubles(wte), wpe_d = doubles(wpe), dwte_want = doubles(dwte),
            dwpe_want = doubles(dwpe), want(B * T * C);
    auto run = [&] {
        for (int i = 0; i < B * T * C; i++)
            want[i] = wte_d[tokens[i / C] * C + i % C] + wpe_d[i / C % T * C + i % C];
        return dot(want, doubles(dx));
    };
    run();
    embedding_forward(x.data(), tokens.data(), wte.data(), wpe.data(), B, T, C);
    expect_close("x", x.data(), want, 0, 1);  // whole numbers: exact
    Doubles by_word = slopes(wte_d, run), by_place = slopes(wpe_d, run);
    for (size_t i = 0; i < by_word.size(); i++) dwte_want[i] += by_word[i];
    for (size_t i = 0; i < by_place.size(); i++) dwpe_want[i] += by_place[i];
    embedding_backward(dwte.data(), dwpe.data(), dx.data(), tokens.data(), B, T, C);
    // Exact, but for the slope's own 1e-16 / 1e-5 times a sum of 1,000.
    expect_close("dwte", dwte.data(), dwte_want, 1e-7, 1);
    expect_close("dwpe", dwpe.data(), dwpe_want, 1e-7, 1);
}

TEST(CrossEntropy, LossAndGradient) {
    Random random(7);
    for (int V : {1, 2, 37, 1000}) {
        const int N = 4;
        const float scale = 0.3f;
        const Floats logits = random.reals(N * V, 8);
        std::vector<int> targets = {0, V - 1, V / 2, random.below(V)};
        Floats d = logits, losses(N, NAN);
        Doubles x = doubles(logits), want(N);
        auto run = [&] {
            double total = 0;
            for (int i = 0; i < N; i++) {
                double sum = 0;
                for (int j = 0; j < V; j++) sum += exp(x[i * V + j]);
                total += want[i] = log(sum) - x[i * V + targets[i]];
            }
            return total * scale;
        };
        run();
        const Doubles expected = want;
        cross_entropy(d.data(), losses.data(), targets.data(), N, V, scale);
        // exp(x - max) repeats the rounding of x - max, up to 16: 1e-6 relatively, averaged over
        // the sum.
        expect_close("loss", losses.data(), expected, 2e-6, 1);
        expect_close("dlogits", d.data(), slopes(x, run), 1e-6, 1);
    }
}

TEST(CrossEntropy, ExtremeLogits) {
    const int V = 3;
    Floats logits = {1e4f, -1e4f, 0, 3e38f, 3e38f, -3e38f}, losses(2);
    std::vector<int> targets = {1, 0};
    cross_entropy(logits.data(), losses.data(), targets.data(), 2, V, 1.0f);
    EXPECT_NEAR(losses[0], 2e4, 1e-2);
    EXPECT_NEAR(losses[1], log(2.0), 1e-6);
    const Doubles want = {1, -1, 0, -0.5, 0.5, 0};
    expect_close("dlogits", logits.data(), want, 1e-6, 1);
}

TEST(LinearLayer, ForwardAndBackward) {
    Tiny tiny(odd_config(), odd_options(GAUSSIAN, 1.0));
    Model& s = tiny.s;
    tiny.randomise(8);
    Random random(9);
    for (int which = 0; which < LINEARS; which++) {
        const Linear l = s.linear[which];
        const int N = 3, layer = 1, weight = weight_of(which);
        const LinearLayer linear = linear_at(s, which, layer, N);
        const Floats x = random.reals(N * l.n), residual = random.reals(N * l.m),
                     dy = random.reals(N * l.m);
        const float *w = param_at(s, s.params, weight, layer),
                    *b = param_at(s, s.params, weight + 1, layer);
        float *dw = param_at(s, s.grads, weight, layer),
              *db = param_at(s, s.grads, weight + 1, layer);
        Doubles xd = doubles(x), wd(w, w + l.m * l.n), bd(b, b + l.m), y_want;
        auto run = [&] {
            y_want = naive_product(xd, false, wd, true, N, l.m, l.n);
            for (int i = 0; i < N * l.m; i++) y_want[i] += bd[i % l.m] + residual[i];
            return dot(y_want, doubles(dy));
        };
        run();
        Floats y(N * l.m, NAN), dx(N * l.n, NAN);
        linear_forward(linear, y.data(), x.data(), residual.data(), N, true);
        // Sums of 25 to 100 products of at most 0.3: a few roundings of sums of size 3.
        expect_close("y", y.data(), y_want, 3e-6, 1);
        Doubles dx_want = slopes(xd, run), db_want = slopes(bd, run), dw_want;
        for (int i = 0; i < l.m * l.n; i += 7) dw_want.push_back(slope(wd, i, run));
        std::fill(dw, dw + l.m * l.n, NAN);
        std::fill(db, db + l.m, 0.0f);
        linear_backward(linear, dx.data(), dy.data(), x.data(), N, 0.0f);
        expect_close("dx", dx.data(), dx_want, 3e-6, 1);
        expect_close("db", db, db_want, 1e-6, 1);
        Floats some;
        for (int i = 0; i < l.m * l.n; i += 7) some.push_back(dw[i]);
        expect_close("dw", some.data(), dw_want, 1e-6, 1);
        linear_backward(linear, dx.data(), dy.data(), x.data(), N, 1.0f);  // adds
        for (size_t i = 0; i < some.size(); i++) some[i] = dw[7 * i], dw_want[i] *= 2;
        expect_close("dw twice", some.data(), dw_want, 2e-6, 1);
    }
}

// ---- projections

TEST(Projection, ProjectAndLiftAreProductsWithP) {
    const Linear shapes[] = {{9, 6, 1},   {9, 24, 23}, {9, 48, 5}, {9, 50, 7},
                             {9, 64, 16}, {9, 7, 7},   {1, 33, 32}};
    Random random(10);
    for (const Linear& l : shapes) {
        for (int projection : {GAUSSIAN, RADEMACHER, SPARSE}) {
            const int N = 11;
            const float keep = 0.875f, step = 0.3f;
            const Drawn drawn = draw(l, projection, 5, 6);
            const Floats x = random.reals(N * l.n), u = random.reals(l.m * l.r);
            Floats z(N * l.r, NAN), w = random.reals(l.m * l.n);
            Doubles lifted = naive_product(doubles(u), false, drawn.full, true, l.m, l.n, l.r),
                    w_want;
            for (int i = 0; i < l.m * l.n; i++)
                w_want.push_back(double(keep) * w[i] - double(step) * lifted[i]);
            project(z.data(), x.data(), drawn.p.data(), drawn.shift.data(), l, projection, N);
            // Sums of n terms of at most |P|: n roundings of the sum of their sizes, 3 sqrt(n / r)
            // n.
            expect_close("z", z.data(),
                         naive_product(doubles(x), false, drawn.full, false, N, l.r, l.n), 3e-6);
            lift(w.data(), u.data(), drawn.p.data(), drawn.shift.data(), l, projection, keep, step);
            expect_close("w", w.data(), w_want, 3e-6);
        }
    }
}

TEST(Projection, SparseHasOneInARow) {
    for (const Linear& l : {Linear{1, 48, 8}, {1, 50, 7}, {1, 64, 1}, {1, 30, 29}, {1, 12, 12}}) {
        std::set<int> turns;
        for (int epoch = 0; epoch < 200; epoch++) {
            const Drawn drawn = draw(l, SPARSE, 1, stream_of(QKV, 0, epoch));
            std::vector<int> columns(l.r);
            for (int k = 0; k < l.n; k++) {
                int found = 0;
                for (int j = 0; j < l.r; j++) {
                    double value = drawn.full[k * l.r + j];
                    if (value == 0) continue;
                    ASSERT_EQ(fabs(value), 1.0);
                    found++, columns[j]++;
                }
                ASSERT_EQ(found, 1);
            }
            for (int count : columns) {  // balanced; r divides n: all the same
                ASSERT_GE(count, l.n / l.r);
                ASSERT_LE(count, (l.n + l.r - 1) / l.r);
            }
            for (int turn : drawn.shift) {
                ASSERT_TRUE(turn >= 0 && turn < l.r);
                turns.insert(turn);
            }
        }
        // 200 epochs or more of draws: each of up to 29 turns occurs.
        EXPECT_EQ(int(turns.size()), l.r);
    }
}

TEST(Projection, MeanOfPPtIsTheIdentity) {
    const Linear l = {1, 12, 5};
    const int epochs = 6000;
    for (int projection : {GAUSSIAN, RADEMACHER, SPARSE}) {
        Doubles sum(l.n * l.n), squares(l.n * l.n);
        for (int epoch = 0; epoch < epochs; epoch++) {
            const Drawn drawn = draw(l, projection, 2, stream_of(FC, 1, epoch));
            const Doubles product =
                naive_product(drawn.full, false, drawn.full, true, l.n, l.n, l.r);
            for (int i = 0; i < l.n * l.n; i++)
                sum[i] += product[i], squares[i] += product[i] * product[i];
        }
        double chi = 0;
        int cells = 0;
        for (int i = 0; i < l.n; i++) {
            for (int j = 0; j <= i; j++) {
                // The variance of one element: two different rows meet in r products of size 1/r
                // with random signs, so 1/r; a row with itself is r squares, of variance 2/r^2 each
                // if normal, and constant otherwise. In one stripe two rows of the sparse one never
                // meet.
                bool constant = (i == j && projection != GAUSSIAN) ||
                                (i != j && projection == SPARSE && i / l.r == j / l.r);
                double mean = sum[i * l.n + j] / epochs, want = i == j,
                       variance = (i == j ? 2.0 : 1.0) / l.r;
                if (constant) {
                    EXPECT_NEAR(mean, want, 1e-6) << i << " " << j;
                    EXPECT_NEAR(squares[i * l.n + j] / epochs, want, 1e-6) << i << " " << j;
                    continue;
                }
                double errors = (mean - want) / sqrt(variance / epochs);
                EXPECT_LE(fabs(errors), 4.5)
                    << i << " " << j;  // one of 78 beyond 4.5 standard errors: one time in 2,000
                chi += errors * errors, cells++;
                if (i == j) continue;
                // Its square, which is how much one row's gradient leaks into the other's, has mean
                // 1/r too, and a variance of its own: of a dot product of normals, of a sum of r
                // signs, of a meeting that comes one time in r.
                const double r = l.r, spread[] = {(2 + 6 / r) / (r * r), 2 * (r - 1) / (r * r * r),
                                                  (1 - 1 / r) / r};
                double square = squares[i * l.n + j] / epochs;
                EXPECT_LE(fabs(square - 1 / r) / sqrt(spread[projection] / epochs), 4.5)
                    << i << " " << j;
            }
        }
        EXPECT_NEAR(chi / cells, 1, 4 * sqrt(2.0 / cells));  // neither more nor less than chance
    }
}

TEST(Projection, IndependentAcrossLayersLinearsEpochs) {
    const Linear l = {1, 64, 32};
    for (int projection : {GAUSSIAN, RADEMACHER, SPARSE}) {
        std::vector<Floats> all;
        for (uint64_t seed : {1337, 1338}) {
            for (int which : {QKV, FC, FCPROJ}) {
                for (int layer : {0, 1, 11}) {
                    for (int epoch : {0, 1, 7})
                        all.push_back(draw(l, projection, seed, stream_of(which, layer, epoch)).p);
                }
            }
        }
        double chi = 0;
        int pairs = 0;
        for (size_t a = 0; a < all.size(); a++) {
            for (size_t b = 0; b < a; b++, pairs++) {
                const Doubles x = doubles(all[a]), y = doubles(all[b]);
                double correlation = dot(x, y) / sqrt(dot(x, x) * dot(y, y)),
                       errors = correlation * sqrt(double(x.size()));
                // In standard errors. One of 1,431 pairs beyond 5: one time in 1,200.
                EXPECT_LE(fabs(errors), 5) << a << " " << b;
                chi += errors * errors;
            }
        }
        EXPECT_NEAR(chi / pairs, 1, 4 * sqrt(2.0 / pairs));
    }
}

// ---- the compressed linear layer

// The compressed gradient must be dW P, with the dW of the full-rank model. Two micro batches, so
// that gradients add up.
TEST(Compressed, GradientIsFullGradientTimesP) {
    for (int projection : {GAUSSIAN, RADEMACHER, SPARSE}) {
        for (int recompute = 0; recompute < NEVER; recompute++) {
            Options o = odd_options(projection, 7), full_options = o;
            o.recompute = recompute, o.gap = 1;
            full_options.rank = 1.0;
            Tiny low(odd_config(), o), full(odd_config(), full_options);
            for (Tiny* tiny : {&low, &full}) {
                tiny->randomise(11);
                tiny->random_tokens(99);
                // A step before, to be forgotten.
                if (tiny == &low) model_accumulate(tiny->s, o.batch, o.seq, true, 1.0f);
                model_begin_step(tiny->s, 3);
                for (int micro = 0; micro < 2; micro++) {
                    tiny->random_tokens(12 + micro);
                    model_accumulate(tiny->s, o.batch, o.seq, micro == 0, 0.5f / (o.batch * o.seq));
                }
            }
            // The forward pass and what flows to the layer below are the same operations on the
            // same numbers. Recomputing changes nothing either, here where it repeats a layer's
            // forward pass.
            expect_same("losses", low.s.losses, full.s.losses, o.batch * o.seq);
            for (int i = 0; i < PARAMS; i++) {
                int which = param_rows[i].linear;
                if (which < 0 || which == ATTPROJ) {
                    expect_same(param_rows[i].name, low.s.grads[i], full.s.grads[i],
                                param_count(low.s.config, i));
                    continue;
                }
                const Linear l = low.s.linear[which];
                ASSERT_EQ(l.r, 7);
                ASSERT_NE(l.n % l.r, 0);
                for (int layer = 0; layer < low.s.config.L; layer++) {
                    const float* dw = param_at(full.s, full.s.grads, i, layer);
                    const Drawn drawn = draw(l, projection, o.seed, stream_of(which, layer, 3));
                    // dW's rounding, 1e-7 of its greatest, passes through a sum of n with random
                    // signs, and so do the tokens' through z: a few 1e-7 of G's greatest.
                    expect_close(text("%s %d", param_rows[i].name, layer),
                                 param_at(low.s, low.s.grads, i, layer),
                                 naive_product(Doubles(dw, dw + l.m * l.n), false, drawn.full,
                                               false, l.m, l.r, l.n),
                                 3e-6);
                }
            }
        }
    }
}

TEST(Compressed, MicroBatchesAddUp) {  // one batch of 300 tokens, more than a chunk of the
                                       // classifier, or three of 100
    Config c = {100, 37, 2, 2, 24, 40};
    Options o = odd_options(SPARSE, 0.25);
    o.seq = 100, o.batch = 3, o.total_batch = 300;
    Tiny whole(c, o), parts(c, o);
    for (Tiny* tiny : {&whole, &parts}) tiny->randomise(13), tiny->random_tokens(14);
    model_accumulate(whole.s, 3, 100, true, 1.0f / 300);
    Floats losses;
    for (int b = 0; b < 3; b++) {
        std::copy(whole.s.inputs + 100 * b, whole.s.inputs + 100 * (b + 1), parts.s.inputs);
        std::copy(whole.s.targets + 100 * b, whole.s.targets + 100 * (b + 1), parts.s.targets);
        model_accumulate(parts.s, 1, 100, b == 0, 1.0f / 300);
        losses.insert(losses.end(), parts.s.losses, parts.s.losses + 100);
    }
    expect_close("losses", losses.data(), Doubles(whole.s.losses, whole.s.losses + 300), 1e-6);
    for (int i = 0; i < PARAMS; i++) {
        int rank = param_rows[i].linear >= 0 ? whole.s.linear[param_rows[i].linear].r : 0;
        const float* want = whole.s.grads[i];
        // The same terms in another order: rounding of sums of 300.
        expect_close(param_rows[i].name, parts.s.grads[i],
                     Doubles(want, want + param_count(c, i, rank)), 3e-6);
    }
}

// At r = n, with the identity for P, the compressed way is the full-rank way; with a signed
// rotation too, for Adam treats each element for itself, and is odd in the gradient.
TEST(Compressed, IdentityAndRotationAreFullRank) {
    const int m = 10, n = 24, N = 17, count = m * n;
    const Linear l = {m, n, n};
    Random random(15);
    for (int projection : {GAUSSIAN, SPARSE}) {
        Drawn drawn = draw(l, projection, 1, 2);
        if (projection == GAUSSIAN) {
            for (int i = 0; i < n * n; i++) drawn.full[i] = drawn.p[i] = i / n == i % n;
        }
        Floats w = random.reals(count), w_low = w, M(count), V(count), M_low(count), V_low(count),
               g(count), u(count), z(N * n);
        for (int step = 0; step < 5; step++) {
            const float first = float(1 / (1 - pow(0.9, step + 1))),
                        second = float(1 / (1 - pow(0.95, step + 1)));
            const Adam a = {0.02f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.5f, first, second};
            // Whole numbers: every sum is exact, in whatever order the columns of the rotation are
            // summed.
            const Floats x = random.wholes(N * n), dy = random.wholes(N * m);
            matmul(g.data(), dy.data(), true, x.data(), false, m, n, N, 1.0f, 0.0f);
            project(z.data(), x.data(), drawn.p.data(), drawn.shift.data(), l, projection, N);
            matmul(u.data(), dy.data(), true, z.data(), false, m, n, N, 1.0f, 0.0f);
            expect_close("G", u.data(),
                         naive_product(doubles(g), false, drawn.full, false, m, n, n), 0, 1);
            adam_update(w.data(), g.data(), M.data(), V.data(), count, a);
            for (int i = 0; i < count; i++) u[i] = adam_direction(a, u[i], &M_low[i], &V_low[i]);
            lift(w_low.data(), u.data(), drawn.p.data(), drawn.shift.data(), l, projection,
                 1.0f - a.lr * a.decay, a.lr);
        }
        // The moments are made by the same operations; a compiler may fuse a product and a sum in
        // one loop and not in the other, which is a rounding a step.
        Doubles p_squared = drawn.full;
        for (double& value : p_squared) value *= value;
        expect_close("M", M_low.data(),
                     naive_product(doubles(M), false, drawn.full, false, m, n, n), 5 * ROUND);
        expect_close("V", V_low.data(), naive_product(doubles(V), false, p_squared, false, m, n, n),
                     5 * ROUND);
        // w - lr (U + decay w) here, (1 - lr decay) w - lr U there: each is 3 roundings of |w| + lr
        // |U| a step. A step that was left out would be 0.02.
        expect_close("w", w_low.data(), doubles(w), 5 * 6 * ROUND, 1.2);
    }
}

// model_begin_step and model_update over five steps with two changes of P, against the formulae in
// double precision.
TEST(Compressed, UpdateFollowsTheFormulae) {
    for (int projection : {GAUSSIAN, RADEMACHER, SPARSE}) {
        for (int moments : {KEEP, MOVE, RESET}) {
            Options o = odd_options(projection, 7);
            o.gap = 2, o.moments = moments, o.alpha = 1.7, o.clip = 30;
            Tiny tiny(odd_config(), o);
            Model& s = tiny.s;
            tiny.randomise(16);
            Random random(17);
            std::vector<Doubles> w(PARAMS), M(PARAMS), V(PARAMS);
            std::vector<int> layers(PARAMS, 1);
            std::vector<int64_t> low(PARAMS);  // the elements of a layer's gradient
            for (int i = 0; i < PARAMS; i++) {
                int which = param_rows[i].linear;
                if (which >= 0) layers[i] = s.config.L;
                low[i] = which >= 0 ? int64_t(s.linear[which].m) * s.linear[which].r
                                    : param_count(s.config, i);
                w[i].assign(s.params[i], s.params[i] + param_count(s.config, i));
                M[i].resize(low[i] * layers[i]);
                V[i].resize(low[i] * layers[i]);
            }
            for (int step = 0; step < 5; step++) {
                const int epoch = step / 2;
                const double lr = 0.05;
                for (int i = 0; step % 2 == 0 && step > 0 && i < PARAMS; i++) {
                    int which = param_rows[i].linear;
                    if (which < 0 || !s.linear[which].compressed() || moments == KEEP) continue;
                    const Linear l = s.linear[which];
                    if (moments == RESET)
                        M[i].assign(M[i].size(), 0.0), V[i].assign(V[i].size(), 0.0);
                    for (int layer = 0; moments == MOVE && layer < s.config.L; layer++) {
                        const Doubles old =
                            draw(l, projection, o.seed, stream_of(which, layer, epoch - 1)).full;
                        const Doubles next =
                            draw(l, projection, o.seed, stream_of(which, layer, epoch)).full;
                        auto first = M[i].begin() + layer * low[i];
                        const Doubles lifted = naive_product(Doubles(first, first + low[i]), false,
                                                             old, true, l.m, l.n, l.r);
                        const Doubles moved =
                            naive_product(lifted, false, next, false, l.m, l.r, l.n);
                        std::copy(moved.begin(), moved.end(), first);
                    }
                }
                model_begin_step(s, step);
                EXPECT_EQ(s.epoch, epoch);
                std::vector<Doubles> g(PARAMS);
                double norm = 0;
                for (int i = 0; i < PARAMS; i++) {
                    for (size_t j = 0; j < M[i].size(); j++) {
                        // Of size 0.5 to 1: then U does not magnify rounding.
                        float value = random.real();
                        s.grads[i][j] = value < 0 ? value / 2 - 0.5f : value / 2 + 0.5f;
                        g[i].push_back(s.grads[i][j]);
                    }
                    norm += dot(g[i], g[i]);
                }
                norm = sqrt(norm);
                const double scale = std::min(1.0, o.clip / norm);
                ASSERT_LT(scale, 0.9);
                // A sum of some 10,000 like terms.
                EXPECT_NEAR(model_update(s, tiny.plan, step, lr), norm, 1e-6 * norm);
                for (int i = 0; i < PARAMS; i++) {
                    int which = param_rows[i].linear;
                    bool compressed = which >= 0 && s.linear[which].compressed();
                    double t = compressed && moments == RESET ? step % 2 + 1 : step + 1;
                    double decay = param_rows[i].columns > 0 ? o.weight_decay : 0.0;
                    Doubles u(M[i].size());
                    for (size_t j = 0; j < u.size(); j++) {
                        double gradient = g[i][j] * scale;
                        M[i][j] = o.beta1 * M[i][j] + (1 - o.beta1) * gradient;
                        V[i][j] = o.beta2 * V[i][j] + (1 - o.beta2) * gradient * gradient;
                        u[j] = M[i][j] / (1 - pow(o.beta1, t)) /
                               (sqrt(V[i][j] / (1 - pow(o.beta2, t))) + o.eps);
                    }
                    for (int layer = 0; compressed && layer < s.config.L; layer++) {
                        const Linear l = s.linear[which];
                        const Drawn drawn =
                            draw(l, projection, o.seed, stream_of(which, layer, epoch));
                        const Doubles part(u.begin() + layer * low[i],
                                           u.begin() + (layer + 1) * low[i]);
                        const Doubles lifted =
                            naive_product(part, false, drawn.full, true, l.m, l.n, l.r);
                        for (size_t j = 0; j < lifted.size(); j++) {
                            double& to = w[i][layer * lifted.size() + j];
                            to -= lr * (o.alpha * lifted[j] + decay * to);
                        }
                    }
                    for (size_t j = 0; !compressed && j < u.size(); j++)
                        w[i][j] -= lr * (u[j] + decay * w[i][j]);
                    // Five steps of a dozen roundings each, and moving is a sum of 7 n terms: some
                    // 1e-6 of the greatest.
                    std::string name = text("%s, step %d", param_rows[i].name, step);
                    expect_close(name + " M", s.m[i], M[i], 5e-6);
                    expect_close(name + " V", s.v[i], V[i], 5e-6);
                    expect_close(name + " w", s.params[i], w[i], 5e-6,
                                 std::max(1.0, greatest(w[i])));
                }
            }
        }
    }
}

TEST(Compressed, EpochAdvancesWithTheGap) {
    Tiny tiny(odd_config(), odd_options(SPARSE, 7));
    Model& s = tiny.s;
    s.options.gap = 3;
    for (int step = 0; step < 10; step++) {
        model_begin_step(s, step);
        EXPECT_EQ(s.epoch, step / 3);
    }
    s.options.gap = 0;  // never
    model_begin_step(s, 1000);
    EXPECT_EQ(s.epoch, 0);
}

// ---- Muon

// What the iterations make of a singular value of a matrix whose norm is 1.
static double levelled(double s) {
    for (int i = 0; i < 5; i++) s = 3.4445 * s - 4.7750 * pow(s, 3) + 2.0315 * pow(s, 5);
    return s;
}

// Random orthonormal columns, (rows, k): each is freed of those before it, twice.
static Doubles orthonormal(Random& random, int rows, int k) {
    Doubles q = doubles(random.reals(size_t(rows) * k));
    for (int j = 0; j < k; j++) {
        auto column = [&](int at) {
            Doubles one(rows);
            for (int i = 0; i < rows; i++) one[i] = q[i * k + at];
            return one;
        };
        for (int twice = 0; twice < 2 * j; twice++) {
            const Doubles before = column(twice % j);
            const double along = dot(before, column(j));
            for (int i = 0; i < rows; i++) q[i * k + j] -= along * before[i];
        }
        const double length = sqrt(dot(column(j), column(j)));
        for (int i = 0; i < rows; i++) q[i * k + j] /= length;
    }
    return q;
}

static Floats orthogonalised(Floats x, int rows, int columns) {
    const int k = std::min(rows, columns);
    Floats work(x.size() + 2 * k * k, NAN);
    orthogonalise(x.data(), rows, columns, work.data());
    return x;
}

// X = U S V^T is made of its singular values and vectors: it becomes U S' V^T, S' what the
// polynomial makes of S.
TEST(Muon, LevelsSingularValuesAndKeepsTheirVectors) {
    double least = INFINITY, most = 0;  // of all above 0.002 of the norm
    for (double s = 0.002; s <= 1; s *= 1.0001)
        least = std::min(least, levelled(s)), most = std::max(most, levelled(s));
    EXPECT_NEAR(least, 0.68, 0.005);
    EXPECT_NEAR(most, 1.20, 0.005);
    Random random(61);
    for (auto [rows, columns] :
         {std::pair(40, 12), {12, 40}, {24, 24}, {100, 3}, {1, 9}, {9, 1}, {1, 1}}) {
        const int k = std::min(rows, columns);
        for (int rank : std::set<int>{k, (k + 1) / 2, 1}) {
            SCOPED_TRACE(text("%d x %d of rank %d", rows, columns, rank));
            const Doubles u = orthonormal(random, rows, k), v = orthonormal(random, columns, k);
            Doubles s(k), before(u), after(u);
            for (int j = 0; j < rank; j++) s[j] = pow(0.01, double(j) / k);
            const double norm = sqrt(dot(s, s));
            for (int i = 0; i < rows * k; i++)
                before[i] *= s[i % k], after[i] *= levelled(s[i % k] / norm);
            const Doubles exact = naive_product(before, false, v, true, rows, columns, k);
            const Floats x(exact.begin(), exact.end()), got = orthogonalised(x, rows, columns);
            // Rounding x errs by ROUND of its norm, the products as much again, and a direction in
            // which there is next to nothing grows by up to 3.4445^5 = 485. A coefficient that is
            // off by a thousandth shows as 1e-3.
            expect_close("X", got.data(), naive_product(after, false, v, true, rows, columns, k),
                         2 * 485 * ROUND, 1);
            for (int power : {-90, 100}) {
                Floats scaled(x);
                for (float& one : scaled) one = ldexpf(one, power);
                expect_same("X of another scale", orthogonalised(scaled, rows, columns).data(),
                            got.data(), got.size());
            }
        }
    }
}

TEST(Muon, ZerosAndExtremes) {
    const int rows = 8, columns = 5;
    for (float value : {0.0f, 1e-45f, 1.0f, -FLT_MAX}) {  // each of the others is one direction
        const Floats got = orthogonalised(Floats(rows * columns, value), rows, columns);
        const double each = value == 0 ? 0 : copysign(levelled(1) / sqrt(rows * columns), value);
        expect_close(text("of %g", value), got.data(), Doubles(rows * columns, each), 485 * ROUND,
                     1);
        EXPECT_EQ(std::count(got.begin(), got.end(), 0.0f), value == 0 ? rows * columns : 0);
    }
}

// M = mu M + g, and U = 0.2 sqrt(max(rows, columns)) orth(g + mu M): as long as numbers of 0.2 or
// so.
TEST(Muon, Direction) {
    Random random(62);
    for (auto [rows, columns] : {std::pair(24, 8), {8, 24}, {16, 16}}) {
        const int k = std::min(rows, columns), count = rows * columns;
        Floats m = random.reals(count), g = random.reals(count), work(count + 2 * k * k, NAN),
               x(count);
        Doubles M(count), U(count);
        for (int i = 0; i < count; i++) {
            M[i] = 0.95 * m[i] + 0.5 * g[i];
            x[i] = float(0.5 * g[i] + 0.95 * M[i]);
        }
        x = orthogonalised(x, rows, columns);
        const double factor = 0.2 * sqrt(double(rows) * columns / k);
        for (int i = 0; i < count; i++) U[i] = factor * x[i];
        muon_direction(g.data(), m.data(), rows, columns, 0.5f, work.data());
        expect_close("M", m.data(), M, 4 * ROUND);
        expect_close("U", g.data(), U, 2 * 485 * ROUND, factor);  // x is rounded in another order
        const double rms = sqrt(dot(doubles(g), doubles(g)) / count);
        EXPECT_TRUE(rms > 0.2 * 0.68 && rms < 0.2 * 1.2) << rms;
    }
}

// ---- data

static void write_file(const std::string& path, const std::string& bytes) {
    int handle = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    ASSERT_GE(handle, 0) << path;
    ASSERT_EQ(write(handle, bytes.data(), bytes.size()), ssize_t(bytes.size()));
    close(handle);
}

static std::string read_file(const std::string& path) {
    std::string bytes(std::filesystem::file_size(path), '\0');
    FILE* file = fopen(path.c_str(), "rb");
    EXPECT_EQ(fread(&bytes[0], 1, bytes.size(), file), bytes.size());
    fclose(file);
    return bytes;
}

// A folder for the files of one test, in memory where the system has such a place.
struct Folder {
    std::string path;
    Folder() {
        const char* chosen = getenv("TMPDIR");
        path = std::string(chosen                          ? chosen
                           : access("/dev/shm", W_OK) == 0 ? "/dev/shm"
                                                           : "/tmp") +
               "/test_cpu_XXXXXX";
        if (!mkdtemp(&path[0])) throw std::runtime_error(path + ": cannot be made");
    }
    Folder(const Folder&) = delete;
    ~Folder() { std::filesystem::remove_all(path); }
    std::string operator/(const std::string& name) const { return path + "/" + name; }
};

static std::string header_bytes(const std::vector<int32_t>& words) {
    std::string bytes(HEADER_BYTES, '\0');
    memcpy(&bytes[0], words.data(), words.size() * 4);
    return bytes;
}

static std::string uint16_bytes(const std::vector<int>& values) {
    std::string bytes;
    for (int value : values) bytes += char(value & 255), bytes += char(value >> 8);
    return bytes;
}

// ---- what the machine lets a process have

TEST(Threads, Quota) {
    Folder folder;
    auto write = [&](const std::string& name, const std::string& text) {
        std::filesystem::create_directories(std::filesystem::path(folder / name).parent_path());
        write_file(folder / name, text);
    };
    auto quota = [&](const std::string& groups) {
        write("groups", groups);
        return cpu_quota(folder / "groups", folder / "root");
    };
    const int NONE_SET = 1 << 20;
    // No control groups, as on a Mac.
    EXPECT_EQ(cpu_quota(folder / "none", folder / "root"), NONE_SET);
    // version 2: of the groups from its own up to the root, the least counts; a part of a CPU is
    // one
    write("root/a/cpu.max", "350000 100000\n");
    write("root/a/b/cpu.max", "max 100000\n");
    write("root/a/b/c/cpu.max", "999900000 100000\n");
    write("root/d/cpu.max", "5000 50000\n");
    write("root/e/cpu.max", "800000\n");  // without its period it says nothing
    EXPECT_EQ(quota("0::/a/b/c\n"), 4);
    EXPECT_EQ(quota("0::/a\n"), 4);
    EXPECT_EQ(quota("0::/d"), 1);
    for (const char* groups :
         {"0::/\n", "0::/e\n", "0::/none/such\n", "", "\n", "0:\n", "nonsense\n", "0::\n"})
        EXPECT_EQ(quota(groups), NONE_SET) << groups;
    // version 1: the path is the host's, and in a container the group lies at the root; -1 is no
    // limit
    write("root/cpu,cpuacct/cpu.cfs_quota_us", "200000\n");
    write("root/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
    write("root/cpu/x/cpu.cfs_quota_us", "-1\n");
    write("root/cpu/x/cpu.cfs_period_us", "100000\n");
    EXPECT_EQ(quota("7:memory:/a/b\n4:cpu,cpuacct:/docker/0123\n1:name=systemd:/d\n"), 2);
    EXPECT_EQ(quota("4:cpu:/x\n"), NONE_SET);
    EXPECT_EQ(quota("4:cpu,cpuacct:/\n0::/d\n"), 1);
}

TEST(Permute, IsAPermutation) {
    for (int n = 1; n <= 300; n++) {
        for (uint64_t stream : {1, 2, 3}) {
            std::vector<bool> seen(n);
            for (int i = 0; i < n; i++) {
                int64_t to = permute(i, n, 5, stream);
                ASSERT_TRUE(to >= 0 && to < n && !seen[to]) << n << ": " << i;
                seen[to] = true;
            }
        }
    }
    for (int n :
         {262145,
          1000003}) {  // just above a power of 4, where it must walk furthest, and just below one
        std::vector<bool> seen(n);
        for (int i = 0; i < n; i++) {
            int64_t to = permute(i, n, 5, 1);
            ASSERT_TRUE(to >= 0 && to < n && !seen[to]) << n << ": " << i;
            seen[to] = true;
        }
    }
    for (int64_t n : {(1ll << 31) + 11, (1ll << 32) + 1, 3000000000001ll}) {
        std::set<int64_t> images;
        for (int64_t i = 0; i < 5000; i++) {
            for (int64_t from : {i, n - 1 - i}) {
                int64_t to = permute(from, n, 5, 1);
                ASSERT_TRUE(to >= 0 && to < n);
                images.insert(to);
            }
        }
        EXPECT_EQ(images.size(), 10000u);
    }
}

TEST(Permute, IsAnotherInEachEpoch) {
    const int n = 1000;
    std::set<std::vector<int64_t>> orders;
    double fixed = 0, kinds = 0;
    for (uint64_t seed : {1, 2}) {
        for (int epoch = 0; epoch < 50; epoch++, kinds++) {
            std::vector<int64_t> order;
            for (int i = 0; i < n; i++)
                order.push_back(permute(i, n, seed, stream_of(STREAM_SEQUENCES, 0, epoch)));
            for (int i = 0; i < n; i++) fixed += order[i] == i;
            orders.insert(order);
        }
    }
    EXPECT_EQ(orders.size(), kinds);
    // A random permutation leaves one element in place, give or take one.
    EXPECT_NEAR(fixed / kinds, 1, 4 / sqrt(kinds));
}

// Shards whose token at place p is base + p, so that a sequence's first token tells where it comes
// from.
TEST(Data, EverySequenceOnceAnEpoch) {
    Folder folder;
    const int T = 5, tokens[] = {36, 7, 5, 6, 1, 0, 69};  // 7, 1, 0, 1, 0, 0 and 13 sequences
    std::set<int> all;
    for (int i = 0, base = 0; i < 7; i++, base += 100) {
        std::vector<int> values;
        for (int p = 0; p < tokens[i]; p++) values.push_back(base + p);
        write_file(folder / text("part_%d.bin", i),
                   header_bytes({TOKENS_MAGIC, 1, tokens[i], 1000}) + uint16_bytes(values));
        for (int p = 0; p + T < tokens[i]; p += T) all.insert(base + p);
    }
    ASSERT_EQ(all.size(), 22u);
    for (bool shuffled : {false, true}) {
        Data data = find_data("--train", folder / "part_*.bin");
        cut_data(data, "--train", T);
        EXPECT_EQ(data.V, 1000);
        EXPECT_EQ(data.sequences, 22);
        EXPECT_EQ(data.tokens, 36 + 7 + 5 + 6 + 1 + 0 + 69);
        data.shuffled = shuffled, data.seed = 3;
        std::vector<std::vector<int>> epochs;
        int inputs[T], targets[T];
        for (int place = 0; place < 5 * 22; place++) {
            read_sequence(data, place, inputs, targets);
            if (place % 22 == 0) epochs.push_back({});
            epochs.back().push_back(inputs[0]);
            for (int t = 0; t < T; t++) {
                ASSERT_EQ(inputs[t], inputs[0] + t);
                ASSERT_EQ(targets[t], inputs[0] + t + 1);
            }
        }
        // The order of the shards, and that in the last of them.
        std::set<std::vector<int>> shard_orders, inner_orders;
        for (auto& epoch : epochs) {
            EXPECT_EQ(std::set<int>(epoch.begin(), epoch.end()), all);
            std::vector<int> shards, inner;
            for (int first : epoch) {
                if (shards.empty() || shards.back() != first / 100) shards.push_back(first / 100);
                if (first / 100 == 6) inner.push_back(first);
            }
            EXPECT_EQ(shards.size(), 4u);  // one after another: a shard is opened once an epoch
            shard_orders.insert(shards);
            inner_orders.insert(inner);
        }
        EXPECT_EQ(inner_orders.size(), shuffled ? 5u : 1u);
        EXPECT_EQ(shard_orders.size() > 1, shuffled);  // of 24 orders two of five may agree
        EXPECT_EQ(epochs[0] == std::vector<int>(all.begin(), all.end()), !shuffled);
        // Any place at once, in any order.
        Data again = find_data("--train", folder / "part_*.bin");
        cut_data(again, "--train", T);
        again.shuffled = shuffled, again.seed = 3;
        for (int i = 0; i < 200; i++) {
            int place = i * 37 % 110;
            read_sequence(again, place, inputs, targets);
            EXPECT_EQ(inputs[0], epochs[place / 22][place % 22]);
        }
    }
}

TEST(Data, MicroBatchesMakeTheSameStep) {
    Folder folder;
    std::vector<int> values(500);
    for (int i = 0; i < 500; i++) values[i] = i * 7 % 37;
    write_file(folder / "a.bin", header_bytes({TOKENS_MAGIC, 1, 500, 37}) + uint16_bytes(values));
    std::vector<int> orders[4], aims[4];
    for (int batch : {1, 2, 4, 6}) {
        std::vector<int>&order = orders[batch / 2], &aim = aims[batch / 2];
        Options o = odd_options(SPARSE, 7);
        o.batch = batch;
        Tiny tiny(odd_config(), o);
        Data data = find_data("--train", folder / "a.bin");
        cut_data(data, "--train", o.seq);
        data.shuffled = true;
        for (int place = 0; place < 120; place += batch) {
            read_batch(data, place, batch, tiny.s);
            order.insert(order.end(), tiny.s.inputs, tiny.s.inputs + batch * o.seq);
            aim.insert(aim.end(), tiny.s.targets, tiny.s.targets + batch * o.seq);
        }
        EXPECT_EQ(order, orders[0]);
        EXPECT_EQ(aim, aims[0]);
    }
}

TEST(Data, PlainTextIsBytes) {
    Folder folder;
    write_file(folder / "text", std::string("\xFF\x00 bytes, all of them", 21));
    Data data = find_data("--train", folder / "text");
    cut_data(data, "--train", 4);
    EXPECT_EQ(data.V, 256);
    EXPECT_EQ(data.sequences, 5);
    int inputs[4], targets[4];
    read_sequence(data, 0, inputs, targets);
    EXPECT_EQ(inputs[0], 255);
    EXPECT_EQ(inputs[1], 0);
    EXPECT_EQ(targets[3], 'y');
}

// ---- schedule and sampling

TEST(Schedule, Shapes) {
    Options o;
    o.lr = 2.0, o.final_lr_frac = 0.25, o.warmup = 10;
    const int64_t steps = 110;
    for (int schedule : {COSINE, LINEAR, CONSTANT, WSD}) {
        o.schedule = schedule;
        EXPECT_DOUBLE_EQ(learning_rate(o, 0, steps), 0.2);
        EXPECT_DOUBLE_EQ(learning_rate(o, 4, steps), 1.0);
        EXPECT_DOUBLE_EQ(learning_rate(o, 9, steps), 2.0);
        EXPECT_DOUBLE_EQ(learning_rate(o, 10, steps), 2.0);
        for (int64_t step = 10; step < steps; step++) {  // never up again, never below the end
            EXPECT_LE(learning_rate(o, step + 1, steps), learning_rate(o, step, steps) + 1e-12);
            EXPECT_GE(learning_rate(o, step, steps), 0.5 - 1e-12);
        }
    }
    o.schedule = COSINE;
    EXPECT_NEAR(learning_rate(o, 60, steps), 1.25, 1e-12);
    EXPECT_NEAR(learning_rate(o, 35, steps), 1.25 + 0.75 * sqrt(0.5), 1e-12);
    EXPECT_NEAR(learning_rate(o, 110, steps), 0.5, 1e-12);
    o.schedule = LINEAR;
    EXPECT_NEAR(learning_rate(o, 60, steps), 1.25, 1e-12);
    EXPECT_NEAR(learning_rate(o, 110, steps), 0.5, 1e-12);
    o.schedule = CONSTANT;
    EXPECT_EQ(learning_rate(o, 109, steps), 2.0);
    o.schedule = WSD;  // the last fifth, from step 88 on, goes down
    EXPECT_EQ(learning_rate(o, 88, steps), 2.0);
    EXPECT_NEAR(learning_rate(o, 99, steps), 0.5 + 1.5 * (1 - sqrt(0.5)), 1e-12);
    EXPECT_NEAR(learning_rate(o, 110, steps), 0.5, 1e-12);
}

TEST(Schedule, Edges) {
    Options o;
    o.lr = 1.0, o.final_lr_frac = 0.1;
    for (int schedule : {COSINE, LINEAR, CONSTANT, WSD}) {
        o.schedule = schedule, o.warmup = 0;
        EXPECT_EQ(learning_rate(o, 0, 1), 1.0);
        o.warmup = 1;
        EXPECT_EQ(learning_rate(o, 0, 1), 1.0);
        for (int warmup : {8, 20}) {  // as long as the run, and longer: on the way up to the end
            o.warmup = warmup;
            for (int64_t step = 0; step < 8; step++)
                EXPECT_DOUBLE_EQ(learning_rate(o, step, 8), (step + 1.0) / warmup);
        }
        for (int64_t steps = 1; steps < 12; steps++) {
            for (int64_t step = 0; step < steps; step++) {
                for (int warmup = 0; warmup < 12; warmup++) {
                    o.warmup = warmup;
                    double lr = learning_rate(o, step, steps);
                    EXPECT_TRUE(lr > 0 && lr <= 1.0)
                        << schedule << " " << step << " " << steps << " " << warmup;
                }
            }
        }
    }
}

TEST(Sample, Choices) {
    const Floats logits = {0.5f, 3.0f, -1.0f, 3.0f, 2.0f};
    for (double coin : {0.0, 0.3, 0.999999}) {
        // The best; of equals the first.
        EXPECT_EQ(sample_token(logits.data(), 5, 0.0, 0, coin), 1);
        EXPECT_EQ(sample_token(logits.data(), 5, 0.0, 50, coin), 1);
        EXPECT_EQ(sample_token(logits.data(), 5, 5.0, 1, coin), 1);
        EXPECT_EQ(sample_token(logits.data(), 1, 1.0, 0, coin), 0);
    }
    std::set<int> seen;
    for (int i = 0; i < 1000; i++) seen.insert(sample_token(logits.data(), 5, 50.0, 3, i / 1000.0));
    EXPECT_EQ(seen, std::set<int>({1, 3, 4}));
}

TEST(Sample, FollowsTheSoftmax) {
    const int V = 12, draws = 200000;
    Random random(18);
    const Floats logits = random.reals(V, 2);
    for (double temperature : {0.5, 1.0, 2.0}) {
        for (int top_k : {0, 4}) {
            std::vector<std::pair<double, int>> order;
            for (int i = 0; i < V; i++) order.push_back({-logits[i], i});
            std::sort(order.begin(), order.end());
            int kept = top_k ? top_k : V;
            Doubles p(V);
            double total = 0, chi = 0;
            for (int i = 0; i < kept; i++)
                total += p[order[i].second] = exp(-order[i].first / temperature);
            std::vector<int> counts(V);
            for (int i = 0; i < draws; i++)
                counts[sample_token(logits.data(), V, temperature, top_k, uniform(1, 2, i))]++;
            for (int i = 0; i < V; i++) {
                double want = p[i] / total * draws;
                EXPECT_TRUE(want > 0 || counts[i] == 0);
                if (want > 0) chi += (counts[i] - want) * (counts[i] - want) / want;
            }
            EXPECT_LE(
                chi,
                kept - 1 +
                    4 * sqrt(2.0 *
                             (kept - 1)));  // chi-square's mean, and 4 of its standard deviations
        }
    }
}

TEST(Sample, NeverFails) {
    const float extremes[] = {NAN,    INFINITY, -INFINITY, 3.4e38f, -3.4e38f,
                              1e-45f, 0.0f,     -0.0f,     1.0f};
    Random random(19);
    for (int round = 0; round < 20000; round++) {
        const int V = 1 + random.below(6);
        Floats logits(V);
        for (float& x : logits) x = extremes[random.below(9)];
        const double temperature = (const double[]){0, 1e-300, 0.8, 100}[random.below(4)];
        const double coin = (const double[]){0, 0.5, 1 - 1e-16}[random.below(3)];
        int token = sample_token(logits.data(), V, temperature, random.below(8), coin);
        ASSERT_TRUE(token >= 0 && token < V);
        bool any =
            std::any_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); });
        ASSERT_TRUE(any ? std::isfinite(logits[token]) : token == 0);
    }
}

// ---- generating text

// Logits (rows, V) of tokens, handed to the model in pieces of these sizes, through the cache.
static Floats cached_logits(Model& s, const std::vector<int>& tokens,
                            const std::vector<int>& pieces) {
    Floats logits(tokens.size() * s.config.V);
    int past = 0;
    for (int n : pieces) {
        std::copy_n(tokens.begin() + past, n, s.inputs);
        model_forward(s, 1, n, past, false);
        model_logits(s, logits.data() + size_t(past) * s.config.V, 0, n);
        past += n;
    }
    return logits;
}

// However a text is cut, and in a model that only generates as well, the logits are those of the
// training's forward pass, but for the order of fp32 sums: logits are of the order of 10 here, and
// a sum of 100 terms is off by some 1e-6 of it.
TEST(Generate, LogitsAreTheForwardPassS) {
    Config c = {90, 37, 2, 5, 25, 40};  // more than one tile of keys
    Options o = odd_options(SPARSE, 7);
    o.batch = 1, o.seq = 90, o.total_batch = 90, o.sample_every = 1;
    Tiny trained(c, o);
    trained.randomise(5);
    trained.random_tokens(6);
    std::vector<int> tokens(trained.s.inputs, trained.s.inputs + o.seq);
    model_forward(trained.s, 1, o.seq, NO_CACHE, false);
    Floats want(tokens.size() * c.V);
    model_logits(trained.s, want.data(), 0, o.seq);
    o.generates = true, o.compress = 0;
    Tiny generating(c, o);
    generating.randomise(5);
    int64_t N = 90, C = c.C, cache = c.L * N * 2 * C,
            pieces_of_a_layer = N * (14 * C + 4 * c.L + 2 + 1);
    // And nothing else.
    EXPECT_EQ(generating.plan.bytes(), 4 * (parameter_count(c) + cache + pieces_of_a_layer));
    for (const std::vector<int>& pieces :
         {std::vector<int>{90}, {1, 63, 1, 1, 20, 4}, std::vector<int>(90, 1)}) {
        for (Model* s : {&trained.s, &generating.s}) {
            Floats got = cached_logits(*s, tokens, pieces);
            for (size_t i = 0; i < got.size(); i++)
                ASSERT_NEAR(got[i], want[i], 2e-4f) << i << " of " << pieces.size() << " pieces";
        }
    }
}

// Where the context is full, what follows depends on its last half alone; an end of text ends the
// text.
TEST(Generate, GoesOnPastTheContext) {
    Config c = {8, 37, 2, 5, 25, 40};
    Options o;
    o.generates = true, o.compress = 0, o.seq = 8, o.sample_tokens = 30, o.temperature = 0;
    Tiny x(c, o);
    x.randomise(5);
    Tokenizer letters = no_tokenizer(c.V);
    for (std::string& piece : letters.pieces) piece[0] += 64;
    auto text_after = [&](const std::vector<int>& tokens, const Tokenizer& tokenizer, int count) {
        std::string out;
        o.sample_tokens = count;
        generate(x.s, tokenizer, tokens, o, 0, [&](const std::string& piece) { out += piece; });
        return out;
    };
    std::vector<int> tokens = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5},
                     last(tokens.end() - 4, tokens.end());
    std::string all = text_after(tokens, letters, 30);
    EXPECT_EQ(all.size(), 30u);
    EXPECT_EQ(all, text_after(last, letters, 30));
    for (int i = 1; i < 30; i++) {  // each token, computed from nothing with what the model is to
                                    // have seen of the text before
        std::vector<int> seen = last;
        for (int j = 0; j < i; j++) {
            if (seen.size() > 8) seen.erase(seen.begin(), seen.end() - 4);
            seen.push_back(all[j] - 64);
        }
        EXPECT_EQ(text_after(seen, letters, 1), all.substr(i, 1)) << i;
    }
}

TEST(Generate, NeverHalfACharacter) {
    for (std::string whole :
         {"", "a", "\xC3\xA4", "\xE2\x82\xAC", "\xF0\x9F\x98\x80", "\xFF", "\x80\x80\x80\x80"}) {
        EXPECT_EQ(whole_characters("x" + whole), 1 + whole.size());
        for (size_t cut = 1; cut < whole.size() && uint8_t(whole[0]) > 0xC0; cut++)
            EXPECT_EQ(whole_characters("x" + whole.substr(0, cut)), 1u) << whole << cut;
    }
}

// ---- bf16

TEST(Bf16, EveryValueSurvives) {
    for (uint32_t x = 0; x < 65536; x++) {
        float value = float_of_bf16(uint16_t(x));
        uint16_t back = bf16_of_float(value);
        if (std::isnan(value)) {
            ASSERT_TRUE(std::isnan(float_of_bf16(back))) << x;
        } else {
            ASSERT_EQ(back, x);
        }
    }
}

TEST(Bf16, RoundsToNearestEven) {
    for (uint32_t x = 0; x < 0x7F80; x++) {
        for (uint32_t sign : {0u, 0x8000u}) {
            // Half way to the next, which may be infinity.
            const uint32_t low = x | sign, middle = low << 16 | 0x8000;
            ASSERT_EQ(bf16_of_float(float_of_bits(middle - 1)), low);
            ASSERT_EQ(bf16_of_float(float_of_bits(middle)), low + (low & 1));
            ASSERT_EQ(bf16_of_float(float_of_bits(middle + 1)), low + 1);
        }
    }
    // Whose upper half is infinity's.
    EXPECT_TRUE(std::isnan(float_of_bf16(bf16_of_float(float_of_bits(0x7F800001)))));
    EXPECT_TRUE(std::isnan(float_of_bf16(bf16_of_float(float_of_bits(0xFFFFFFFF)))));
}

TEST(StochasticRounding, IsTheWordsOfTheStream) {  // element i is moved by 16 bits of block i / 8
    Random random(43);
    for (size_t count : {1, 7, 8, 9, 1000}) {
        const Floats w = random.reals(count, 3);
        Floats rounded = w;
        rounded.push_back(0.123f);
        round_stochastically(rounded.data(), int64_t(count), 5, 77);
        EXPECT_EQ(rounded.back(), 0.123f) << "is beyond the end";
        for (size_t i = 0; i < count; i++) {
            const Words block = philox(5, 77, i / 8);
            const uint32_t word = i % 8 < 2   ? block.x
                                  : i % 8 < 4 ? block.y
                                  : i % 8 < 6 ? block.z
                                              : block.w;
            const uint32_t sixteen = i % 2 ? word >> 16 : word & 0xFFFF;
            ASSERT_EQ(bits_of_float(rounded[i]), (bits_of_float(w[i]) + sixteen) >> 16 << 16) << i;
        }
    }
}

TEST(StochasticRounding, GoesToANeighbour) {
    Random random(44);
    for (int trial = 0; trial < 40; trial++) {
        Floats w(1000);
        for (float& x : w) x = random.real() * float(pow(10, random.below(60) - 40));
        for (uint16_t exact : {0x0000, 0x8000, 0x3F80, 0xBF80, 0x0001, 0x7F7F, 0xC2F7})
            w.push_back(float_of_bf16(exact));
        Floats rounded = w;
        round_stochastically(rounded.data(), int64_t(w.size()), 6, trial);
        for (size_t i = 0; i < w.size(); i++) {
            const uint32_t low = bits_of_float(w[i]) >> 16, got = bits_of_float(rounded[i]);
            ASSERT_EQ(got & 0xFFFF, 0u) << "is no bf16";
            ASSERT_TRUE(got >> 16 == low || (got >> 16 == low + 1 && bits_of_float(w[i]) & 0xFFFF))
                << w[i] << " " << rounded[i];
        }
    }
}

TEST(StochasticRounding, TheMeanIsTheValue) {
    const int count = 1 << 18;
    for (float sign : {1.0f, -1.0f}) {
        for (uint32_t part : {1u << 8, 1u << 12, 1u << 14, 1u << 15, 0xC000u,
                              0xFF00u}) {  // of 2^16, the way to the next
            const float w = sign * float_of_bits(0x3DCC0000 | part),
                        low = sign * float_of_bits(0x3DCC0000);
            Floats rounded(count, w);
            round_stochastically(rounded.data(), count, 7, part);
            int ups = 0, pairs = 0;
            for (int i = 0; i < count; i++) ups += rounded[i] != low;
            for (int i = 0; i + 1 < count; i++) pairs += rounded[i] != low && rounded[i + 1] != low;
            const double p = part / 65536.0;
            // 4.5 standard deviations; neighbours are independent, so they go up together with p^2,
            // pairs overlap by one
            EXPECT_NEAR(ups, count * p, 4.5 * sqrt(count * p * (1 - p)) + 1) << part;
            EXPECT_NEAR(pairs, count * p * p, 4.5 * sqrt(count * p * p * (1 - p) * (1 + 3 * p)) + 2)
                << part;
        }
    }
}

TEST(StochasticRounding, StreamsAndThreads) {
    const Floats w = Random(45).reals(5000);
    auto rounded = [&](uint64_t seed, uint64_t stream, int threads) {
        Floats x = w;
        omp_set_num_threads(threads);
        round_stochastically(x.data(), 5000, seed, stream);
        omp_set_num_threads(1);
        return x;
    };
    const Floats once = rounded(1, stream_of(STREAM_ROUND, 0, 0), 1);
    EXPECT_EQ(once, rounded(1, stream_of(STREAM_ROUND, 0, 0), 3));
    for (const Floats& other : {rounded(2, stream_of(STREAM_ROUND, 0, 0), 1),
                                rounded(1, stream_of(STREAM_ROUND, 1, 0), 1),
                                rounded(1, stream_of(STREAM_ROUND, 0, 1), 1)}) {
        int same = 0;
        for (int i = 0; i < 5000; i++) same += once[i] == other[i];
        EXPECT_NEAR(same, 5000 * 2 / 3.0, 200)
            << "p^2 + (1 - p)^2 is 2/3 in the mean";  // 33 is one standard deviation
    }
}

// The step of a run without master weights is that of a run with them, rounded by a stream of its
// own for each parameter and step.
TEST(StochasticRounding, OfAStep) {
    for (int projection : {GAUSSIAN, SPARSE}) {
        for (int step : {0, 3}) {
            Options o = odd_options(projection, 7);
            o.master = MASTER_NONE;
            Tiny none(odd_config(), o), full(odd_config(), o);
            for (Tiny* tiny : {&none, &full}) {
                tiny->randomise(46), tiny->random_tokens(47);
                model_round(tiny->s);
                if (tiny == &full) tiny->s.options.master = MASTER_FP32;
                model_begin_step(tiny->s, step);
                model_accumulate(tiny->s, o.batch, o.seq, true, 1.0f / 21);
                model_update(tiny->s, tiny->plan, step, 0.01);
            }
            for (int i = 0; i < PARAMS; i++) {
                int64_t count = param_count(odd_config(), i);
                Floats want(full.s.params[i], full.s.params[i] + count);
                round_stochastically(want.data(), count, o.seed, stream_of(STREAM_ROUND, i, step));
                expect_same(param_rows[i].name, none.s.params[i], want.data(), count);
            }
        }
    }
}

// ---- the plan, and that nothing is touched beside it

struct Combination {
    Config config;
    Options options;
    int micros;
    bool contradictory;  // two bits of what is computed again
};

static Combination draw_combination(Random& random) {
    auto one_of = [&](const Doubles& list) { return list[random.below(int64_t(list.size()))]; };
    int heads = 1 + random.below(3), V = 5 + random.below(40);
    Config c = {
        0, V, 1 + random.below(3), heads, heads * (2 + random.below(8)), V + random.below(9)};
    Options o;
    o.batch = 1 + random.below(3);
    o.seq = random.below(8)
                ? 1 + random.below(20)
                : 60 + random.below(70);  // also more than a tile, and than a chunk of tokens
    c.context = o.seq + random.below(6);
    int micros = 1 + random.below(2);
    o.total_batch = micros * o.batch * o.seq;
    o.rank = one_of({1, 0.5, 0.25, 0.1, 2, 3, 7});
    o.compress = random.below(16);
    o.projection = random.below(3), o.moments = random.below(3), o.gap = random.below(3);
    o.recompute = random.below(NEVER), o.gelu = random.below(3) == 0 ? GELU_2BIT : GELU_EXACT;
    o.tape = random.below(2), o.master = random.below(2), o.optimizer = random.below(2);
    return {c, o, micros, o.gelu == GELU_2BIT && o.recompute >= 3};
}

static std::string words_of(const Combination& x) {
    const Options& o = x.options;
    return text(
        "L %d NH %d C %d V %d T %d B %d seq %d micros %d rank %g compress %d projection %d moments "
        "%d gap %d -r %d gelu %d "
        "tape %d master %d optimizer %d",
        x.config.L, x.config.NH, x.config.C, x.config.V, x.config.context, o.batch, o.seq, x.micros,
        o.rank, o.compress, o.projection, o.moments, o.gap, o.recompute, o.gelu, o.tape, o.master,
        o.optimizer);
}

// Two steps and an evaluation: losses and norms on the way, and the weights at the end.
static Floats two_steps(Tiny& tiny, int micros) {
    Model& s = tiny.s;
    const Options& o = s.options;
    const int N = o.batch * o.seq;
    Floats said;
    tiny.randomise(51);
    model_round(s);
    for (int step = 0; step < 2; step++) {
        model_begin_step(s, step);
        for (int micro = 0; micro < micros; micro++) {
            tiny.random_tokens(52 + 2 * step + micro);
            model_accumulate(s, o.batch, o.seq, micro == 0, 1.0f / o.total_batch);
            said.insert(said.end(), s.losses, s.losses + N);
        }
        said.push_back(float(model_update(s, tiny.plan, step, 0.01)));
        model_evaluate(s, o.batch, o.seq);
        said.insert(said.end(), s.losses, s.losses + N);
    }
    for (int i = 0; i < PARAMS; i++)
        said.insert(said.end(), s.params[i], s.params[i] + param_count(s.config, i));
    return said;
}

// Gives each tensor of a plan memory of its own, of exactly its bytes, between two guards as long
// as a block's longest row. What nothing has written yet is NaN, but for parameters, gradients and
// moments, which begin with zeros.
struct Guarded {
    const Plan& plan;
    const size_t GUARD;
    std::vector<std::vector<uint8_t>> blocks;
    std::vector<void*> before;
    Guarded(const Plan& of, size_t guard) : plan(of), GUARD(guard) {
        for (const Tensor& t : plan.tensors) {
            const bool zeros =
                t.category == "parameters" || t.category == "gradients" || t.category == "moments";
            blocks.emplace_back(size_t(t.bytes()) + 2 * GUARD, 0xFF);
            uint8_t* data = blocks.back().data() + GUARD;
            if (zeros) std::fill(data, data + t.bytes(), 0);
            ASAN_POISON_MEMORY_REGION(data - GUARD, GUARD);
            ASAN_POISON_MEMORY_REGION(data + t.bytes(), GUARD);
            before.push_back(*(void**)t.home);
            *(void**)t.home = data;
        }
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() {
        for (size_t i = 0; i < blocks.size(); i++) {
            ASAN_UNPOISON_MEMORY_REGION(blocks[i].data(), blocks[i].size());
            *(void**)plan.tensors[i].home = before[i];
            for (size_t at : {size_t(0), blocks[i].size() - GUARD}) {
                auto first = blocks[i].begin() + at;
                EXPECT_EQ(std::count(first, first + GUARD, 0xFF), int64_t(GUARD))
                    << plan.tensors[i].name << " is written beside";
            }
        }
    }
};

// The tensors of a category lie one after another in its arena, from its beginning to its end.
static void expect_exact_arenas(const Plan& plan) {
    for (const std::string& category : plan.categories()) {
        char *arena = nullptr, *end = nullptr;
        for (const Tensor& t : plan.tensors) {
            if (t.category != category) continue;
            char* data = *(char**)t.home;
            if (!arena) arena = end = data;
            EXPECT_EQ(data, end) << t.name;
            end += t.bytes();
        }
        EXPECT_EQ(end - arena, plan.bytes(category));
#if defined(__SANITIZE_ADDRESS__)  // which knows how much was asked for
        EXPECT_EQ(int64_t(__sanitizer_get_allocated_size(arena)), plan.bytes(category)) << category;
#endif
    }
}

class Combinations : public testing::TestWithParam<int> {};

TEST_P(Combinations, TouchNothingBesideThePlan) {
    Random random(GetParam());
    for (int asked = 0; asked < 25;) {
        const Combination x = draw_combination(random);
        SCOPED_TRACE(words_of(x));
        Options o = x.options;
        if (x.contradictory) {
            try {
                settle_options(o, x.config);
                ADD_FAILURE() << "is not refused";
            } catch (const Failure& failure) {
                EXPECT_EQ(failure.status, 2);
                EXPECT_EQ(failure.message.rfind("--gelu: ", 0), 0u) << failure.message;
            }
            continue;
        }
        settle_options(o, x.config);
        asked++;
        Tiny tiny(x.config, o);
        expect_exact_arenas(tiny.plan);
        const Floats want = two_steps(tiny, x.micros);
        Floats got;
        {
            Guarded guarded(tiny.plan, 4 * sizeof(float) * o.batch * o.seq * x.config.C);
            got = two_steps(tiny, x.micros);
        }
        ASSERT_EQ(got.size(), want.size());
        EXPECT_EQ(memcmp(got.data(), want.data(), got.size() * 4), 0)
            << "depends on what lay in memory before";
        EXPECT_TRUE(std::all_of(want.begin(), want.end(),
                                [](float value) { return std::isfinite(value); }));
        o.offload = true;
        Model other;
        EXPECT_THROW(model_plan(other, x.config, o), Failure);
        if (testing::Test::HasFailure()) return;
    }
}

INSTANTIATE_TEST_SUITE_P(Seeds, Combinations, testing::Range(1, 11));

// ---- loaders: whatever a file holds, it is loaded or refused in one line. Nothing else, and no
// great memory.

#if defined(__SANITIZE_ADDRESS__)
#define WITH_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define WITH_ASAN 1
#endif
#endif

// While it lives, the process can have 256 MiB more than at its beginning. (AddressSanitizer's own
// takes terabytes.)
struct MemoryLimit {
    rlimit was;
    MemoryLimit() {
        getrlimit(RLIMIT_AS, &was);
#ifndef WITH_ASAN
        long pages = 0;
        if (FILE* file = fopen("/proc/self/statm", "r")) {
            EXPECT_EQ(fscanf(file, "%ld", &pages), 1);
            fclose(file);
        }
        rlimit limit = {rlim_t(pages) * rlim_t(sysconf(_SC_PAGESIZE)) + (256 << 20), was.rlim_max};
        EXPECT_TRUE(pages == 0 || setrlimit(RLIMIT_AS, &limit) == 0);
#endif
    }
    MemoryLimit(const MemoryLimit&) = delete;
    ~MemoryLimit() { setrlimit(RLIMIT_AS, &was); }
};

// Whether the file was accepted. A refusal must be one line that names the file, with the status of
// bad input.
static bool accepts(const std::string& path, const std::function<void()>& read) {
    try {
        read();
        return true;
    } catch (const Failure& failure) {
        EXPECT_EQ(failure.status, 2) << failure.message;
        EXPECT_NE(failure.message.find(path), std::string::npos) << failure.message;
        for (unsigned char c : failure.message)
            EXPECT_TRUE(c >= 0x20 && c != 0x7F) << int(c) << " in " << failure.message;
    } catch (const std::exception& error) {
        ADD_FAILURE() << "neither loaded nor refused: " << error.what();
    }
    return false;
}

// The file with one to three hurts, half of them where magic, version and counts stand.
static std::string mutant(const std::string& valid, Random& random) {
    const uint32_t extremes[] = {0,          1,          2,          3,          5,
                                 255,        256,        32767,      32768,      0xFFFF,
                                 0x10000,    0x10001,    0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
                                 0xFFFFFFFE, 0x7F800000, 0x7FC00000};
    std::string m = valid;
    for (int hurts = 1 + random.below(3); hurts > 0; hurts--) {
        size_t at = random.below(2) ? random.below(32) : random.below(m.size() + 1);
        size_t length = std::min<size_t>(1 + random.below(random.below(2) ? 4 : 64),
                                         m.size() - std::min(at, m.size()));
        size_t word = at / 4 * 4;
        uint32_t value = extremes[random.below(18)], old = 0;
        bool fits = word + 4 <= m.size();
        if (fits) memcpy(&old, &m[word], 4);
        int kind = random.below(9);
        if (kind == 0 && at < m.size()) m[at] ^= char(1 << random.below(8));
        if (kind == 1 && at < m.size()) m[at] = char(random.next());
        if (kind == 2 && fits) memcpy(&m[word], &value, 4);
        if (kind == 3 && fits) memcpy(&m[word + 2 * random.below(2)], &value, 2);
        if (kind == 4 && fits) value = old + random.below(9) - 4, memcpy(&m[word], &value, 4);
        if (kind == 5) m.erase(std::min(at, m.size()), length);
        if (kind == 6) m.insert(std::min(at, m.size()), m.substr(std::min(at, m.size()), length));
        if (kind == 7)
            m.insert(std::min(at, m.size()),
                     std::string(1 + random.below(64), char(random.next())));
        if (kind == 8) m += std::string(1 + random.below(64), char(random.next()));
        if (m.size() < 40) return m;
    }
    return m;
}

struct Loader {
    std::string path, valid;
    std::function<void()> read;              // loads the file and checks what it got
    std::function<void(std::string&)> mend;  // makes sizes fit again, so that a mutant gets further
    bool checksummed, cut_may_pass;          // no mutant may pass; what is cut off may be missing
};

static void fuzz(const Loader& loader) {
    MemoryLimit limit;
    Random random(20);
    size_t accepted = 0, refused = 0;
    auto run = [&](const std::string& bytes) {
        write_file(loader.path, bytes);
        bool taken = accepts(loader.path, loader.read);
        if (bytes != loader.valid) (taken ? accepted : refused)++;
        return taken;
    };
    ASSERT_TRUE(run(loader.valid));
    for (size_t length = 0; length < loader.valid.size(); length++) {
        bool taken = run(loader.valid.substr(0, length));
        ASSERT_TRUE(loader.cut_may_pass || !taken) << "cut to " << length << " bytes";
        ASSERT_FALSE(testing::Test::HasFailure()) << "cut to " << length << " bytes";
    }
    accepted = refused = 0;
    for (int i = 0; i < 12000; i++) {
        std::string bytes = mutant(loader.valid, random);
        if (loader.mend && random.below(2)) loader.mend(bytes);
        bool taken = run(bytes);
        ASSERT_FALSE(loader.checksummed && taken && bytes != loader.valid) << "mutant " << i;
        ASSERT_FALSE(testing::Test::HasFailure()) << "mutant " << i;
    }
    EXPECT_GE(refused, 100u);  // else the mutants are too tame, or too wild, to say anything
    EXPECT_TRUE(loader.checksummed || accepted >= 100);
    ASSERT_TRUE(run(loader.valid));
    unlink(loader.path.c_str());
    EXPECT_FALSE(accepts(loader.path, loader.read));
    std::filesystem::create_directory(loader.path);
    EXPECT_FALSE(accepts(loader.path, loader.read));
    std::filesystem::remove(loader.path);
}

static int32_t header_word(const std::string& bytes, int i) {
    int32_t word;
    memcpy(&word, &bytes[4 * i], 4);
    return word;
}

static Plan only_parameters(const Plan& plan) {
    Plan out = plan;
    out.tensors.clear();
    for (const Tensor& t : plan.tensors) {
        if (t.category == "parameters") out.tensors.push_back(t);
    }
    return out;
}

static void fuzz_model(int type) {
    Folder folder;
    const std::string path = folder / "model.bin", copy = folder / "copy.bin";
    const Config c = {3, 11, 2, 2, 4, 12};
    Options o;
    o.batch = o.seq = o.total_batch = 1;
    Tiny tiny(c, o);
    tiny.randomise(21);
    write_model(tiny.plan, c, type, path)->commit();
    auto read = [&] {
        Config found = read_model_config(path);
        Model s;
        Plan plan = only_parameters(model_plan(s, found, o));
        model_allocate(s, plan);
        std::unique_ptr<float, decltype(&free)> owner(s.params[0], free);
        read_model(plan, path);
        // What was taken is what stands there: written again, it is the same file. Words 8 to 255
        // have no meaning.
        std::string bytes = read_file(path);
        write_model(plan, found, header_word(bytes, 1) == 5 ? TYPE_BF16 : TYPE_FP32, copy)
            ->commit();
        std::string again = read_file(copy);
        ASSERT_EQ(bytes.size(), again.size());
        ASSERT_EQ(memcmp(bytes.data(), again.data(), 32), 0);
        ASSERT_EQ(memcmp(bytes.data() + HEADER_BYTES, again.data() + HEADER_BYTES,
                         bytes.size() - HEADER_BYTES),
                  0);
        for (int i = 2; i < 8; i++) ASSERT_GE(header_word(bytes, i), 1);
    };
    auto mend = [&](std::string& bytes) {
        if (bytes.size() < HEADER_BYTES) return;
        int h[8];
        for (int i = 0; i < 8; i++) h[i] = header_word(bytes, i);
        for (int i = 2; i < 8; i++) {
            if (h[i] < 0 || h[i] > 40) return;
        }
        bytes.resize(HEADER_BYTES +
                     parameter_count({h[2], h[3], h[4], h[5], h[6], h[7]}) * (h[1] == 3 ? 4 : 2));
    };
    fuzz({path, read_file(path), read, mend, false, false});
}

TEST(Load, ModelFp32) { fuzz_model(TYPE_FP32); }

TEST(Load, ModelBf16) { fuzz_model(TYPE_BF16); }

TEST(Load, ModelRoundTrip) {
    Folder folder;
    Options o = odd_options(GAUSSIAN, 7);
    for (int type : {TYPE_FP32, TYPE_BF16}) {
        Tiny one(odd_config(), o), two(odd_config(), o);
        one.randomise(22);
        write_model(one.plan, odd_config(), type, folder / "m.bin")->commit();
        std::string bytes = read_file(folder / "m.bin");
        // Llm.c's order.
        const int want[] = {20240326, type == TYPE_FP32 ? 3 : 5, 8, 37, 2, 5, 25, 40};
        for (int i = 0; i < 8; i++) EXPECT_EQ(header_word(bytes, i), want[i]) << i;
        Config c = read_model_config(folder / "m.bin");
        EXPECT_EQ(memcmp(&c, &one.s.config, sizeof(c)), 0);
        read_model(two.plan, folder / "m.bin");
        size_t at = HEADER_BYTES;
        for (int i = 0; i < PARAMS; i++) {
            int64_t n = param_count(c, i);
            for (int64_t j = 0; j < n; j++) {
                float saved = one.s.params[i][j],
                      expected = type == TYPE_FP32 ? saved : float_of_bf16(bf16_of_float(saved));
                ASSERT_EQ(two.s.params[i][j], expected) << param_rows[i].name << " " << j;
            }
            EXPECT_TRUE(type == TYPE_BF16 || memcmp(&bytes[at], one.s.params[i], n * 4) == 0)
                << param_rows[i].name;
            at += n * (type == TYPE_FP32 ? 4 : 2);
        }
        EXPECT_EQ(at, bytes.size());
    }
}

static Loader tokens_loader(const std::string& path) {
    Random random(23);
    std::vector<int> values(150);
    for (int& value : values) value = random.below(50);
    auto read = [path] {
        Data data = find_data("--train", path);
        cut_data(data, "--train", 4);
        ASSERT_EQ(data.shards.size(), 1u);
        const int64_t bytes = int64_t(std::filesystem::file_size(path));
        ASSERT_EQ(data.shards[0].start + data.tokens * data.shards[0].width, bytes);
        ASSERT_TRUE(data.V >= 1 && data.V <= 65536);
        data.shuffled = true;
        int inputs[4], targets[4];
        for (int64_t place = 0; place < data.sequences; place++) {
            read_sequence(data, place, inputs, targets);
            for (int t = 0; t < 4; t++)
                ASSERT_TRUE(inputs[t] >= 0 && inputs[t] < data.V && targets[t] >= 0 &&
                            targets[t] < data.V);
        }
    };
    auto mend = [](std::string& bytes) {
        if (bytes.size() % 2) bytes.pop_back();
        int32_t count = int32_t(bytes.size() - HEADER_BYTES) / 2;
        if (bytes.size() >= HEADER_BYTES) memcpy(&bytes[8], &count, 4);
    };
    return {path,  header_bytes({TOKENS_MAGIC, 1, 150, 50}) + uint16_bytes(values),
            read,  mend,
            false, false};
}

TEST(Load, Tokens) {
    Folder folder;
    fuzz(tokens_loader(folder / "tokens.bin"));
}

TEST(Load,
     TokensWithoutTheirName) {  // then a file whose magic number is lost, or cut, is plain text
    Folder folder;
    Loader loader = tokens_loader(folder / "tokens");
    loader.cut_may_pass = true;
    fuzz(loader);
}

TEST(Load, TokensThatChangeUnderneath) {
    Folder folder;
    const std::string path = folder / "tokens.bin", valid = tokens_loader(path).valid;
    write_file(path, valid);
    Data data = find_data("--train", path);
    cut_data(data, "--train", 4);
    int inputs[4], targets[4];
    std::filesystem::resize_file(path, HEADER_BYTES + 100);
    EXPECT_FALSE(accepts(path, [&] { read_sequence(data, 36, inputs, targets); }));
}

TEST(Load, Tokenizer) {
    Folder folder;
    const std::string path = folder / "tokenizer.bin";
    std::string valid = header_bytes({TOKENIZER_MAGIC, 2, 40, 39});
    for (int i = 0; i < 40; i++) valid += char(i % 7) + std::string(i % 7, char('a' + i % 26));
    auto read = [&] {
        Tokenizer t = read_tokenizer(path);
        size_t bytes = HEADER_BYTES;
        for (const std::string& piece : t.pieces) bytes += 1 + piece.size();
        ASSERT_EQ(bytes, std::filesystem::file_size(path));
        ASSERT_TRUE(t.end_of_text >= 0 && size_t(t.end_of_text) < t.pieces.size());
    };
    fuzz({path, valid, read, nullptr, false, false});
    write_file(path, valid);
    Tokenizer t = read_tokenizer(path);
    EXPECT_EQ(t.pieces.size(), 40u);
    EXPECT_EQ(t.pieces[0], "");
    EXPECT_EQ(t.pieces[9], "jj");
    EXPECT_EQ(t.end_of_text, 39);
}

TEST(Load, HellaSwag) {
    Folder folder;
    const std::string path = folder / "hellaswag.bin";
    const int V = 50;
    std::string valid;
    Random random(24);
    for (int i = 0; i < 5; i++) {
        std::vector<int> words = {65535, 0, i, i % 4, 4};
        for (int list = 0; list < 5; list++) {
            words.push_back(1 + random.below(6));
            for (int n = words.back(); n > 0; n--) words.push_back(random.below(V));
        }
        words[1] = int(words.size() * 2);
        valid += uint16_bytes(words);
    }
    valid = header_bytes({HELLASWAG_MAGIC, 1, 5, 80}) + valid;
    auto read = [&] {
        std::vector<Example> examples = read_hellaswag(path, V);
        size_t bytes = HEADER_BYTES;
        for (const Example& e : examples) {
            ASSERT_TRUE(e.label >= 0 && e.label < 4);
            std::vector<std::vector<int>> lists = {e.context};
            for (auto& ending : e.endings) lists.push_back(ending);
            bytes += 10;
            for (auto& list : lists) {
                ASSERT_FALSE(list.empty());
                for (int token : list) ASSERT_TRUE(token >= 0 && token < V);
                bytes += 2 + 2 * list.size();
            }
        }
        ASSERT_EQ(bytes, std::filesystem::file_size(path));
    };
    fuzz({path, valid, read, nullptr, false, false});
}

TEST(Load, State) {
    Folder folder;
    const std::string path = folder / "state.bin";
    const Config c = {2, 3, 1, 1, 2, 4};
    Options o = odd_options(SPARSE, 0.5);
    o.batch = o.seq = o.total_batch = 1;
    Tiny saved(c, o), loaded(c, o);
    Random random(25);
    auto states = [](Tiny& tiny) {
        std::vector<float*> groups;
        for (float** group : {tiny.s.params, tiny.s.m, tiny.s.v})
            groups.insert(groups.end(), group, group + PARAMS);
        return groups;
    };
    auto count = [&](int i) {
        int which = param_rows[i % PARAMS].linear;
        return param_count(c, i % PARAMS, i < PARAMS || which < 0 ? 0 : saved.s.linear[which].r);
    };
    for (int i = 0; i < 3 * PARAMS; i++) {
        Floats values = random.reals(count(i));
        std::copy(values.begin(), values.end(), states(saved)[i]);
    }
    const Identity identity = {
        {"--rank", "0.5"}, {"--seed", "1337"}, {"--train", "22 sequences of vocabulary 3"}};
    write_state(saved.plan, identity, 123456, path)->commit();
    auto read = [&] {
        ASSERT_EQ(read_state(loaded.plan, identity, path), 123456);
        for (int i = 0; i < 3 * PARAMS; i++)
            expect_same("state", states(loaded)[i], states(saved)[i], count(i));
    };
    fuzz({path, read_file(path), read, nullptr, true, false});
    // Other flags: the message begins with the one that differs.
    write_state(saved.plan, identity, 1, path)->commit();
    for (size_t i = 0; i < identity.size(); i++) {
        Identity other = identity;
        other[i].second = "22";
        try {
            read_state(loaded.plan, other, path);
            ADD_FAILURE() << "accepted another " << identity[i].first;
        } catch (const Failure& failure) {
            EXPECT_EQ(failure.status, 2);
            EXPECT_EQ(failure.message.find(identity[i].first + ": "), 0u) << failure.message;
            EXPECT_NE(failure.message.find(identity[i].second), std::string::npos)
                << failure.message;
        }
    }
}

int main(int argc, char** argv) {
    testing::InitGoogleTest(&argc, argv);
#if defined(USE_OPENBLAS)
    openblas_set_num_threads(1);  // as the trainer does before its first product
#endif
    return RUN_ALL_TESTS();
}
