"""
The kernel variants of dev/cuda, each against the CPU trainer: run on a CPU by dev/nogpu, under the
sanitizers. And their harness: what it says of kernels that are wrong, its command line, its
predictions and the table made of them.

Nothing is built but the wrong kernels. `make test` builds build/cuda/*_nogpu where the headers of
the CUDA toolkit and Boost.Context are.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "dev/cuda").glob("*.cu"))
BUILT = ROOT / "build/cuda"
# The kernels' threads take turns on one processor; more of them gain nothing here.
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
VERDICT = re.compile(r"^ *(\d+)  (passed|FAILED)  ", re.M)

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not list(BUILT.glob("*_nogpu")),
                                 reason="build/cuda holds no nogpu binary: their making needs the "
                                 "headers of the CUDA toolkit, and Boost.Context; "
                                 "make -C dev/cuda nogpu")]


def run(binary, *args, status=0, **env):
    done = subprocess.run([binary, *map(str, args)], capture_output=True, text=True, timeout=300,
                          env={**ENVIRONMENT, **env}, cwd=ROOT)
    assert (done.returncode
            == status), f"{done.args}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done


@pytest.fixture(params=SOURCES, ids=lambda source: source.stem)
def binary(request):
    built = BUILT / (request.param.stem + "_nogpu")
    assert built.exists(), f"{built.name} is not built: make -C dev/cuda nogpu"
    newest = max(path.stat().st_mtime
                 for path in (request.param, request.param.with_name("common.cuh")))
    assert (built.stat().st_mtime
            >= newest), f"{built.name} is older than its source: make -C dev/cuda nogpu"
    return built


def predicted(binary):
    # A megabyte of device memory: nothing may be allocated.
    return [json.loads(line)
            for line in run(binary, "--predict", NOGPU_MEMORY_MB="1").stdout.splitlines()]


def test_variants(binary):
    said = run(binary, "--check").stdout
    verdicts = VERDICT.findall(said)
    assert len(verdicts) >= 2, said
    assert verdicts == [(str(i + 1), "passed") for i in range(len(predicted(binary)))], said
    assert (f"\n{len(verdicts)} passed, 0 failed\n" in said
            and said.endswith("not timed: a CPU in a GPU's place\n"))


def test_one_variant(binary):
    assert VERDICT.findall(run(binary, 2, "--check").stdout) == [("2", "passed")]
    assert [line["variant"]
            for line in map(json.loads, run(binary, "--predict", 2).stdout.splitlines())] == [2]


def test_predictions(binary):
    lines = predicted(binary)
    assert [line["variant"] for line in lines] == list(range(1, len(lines) + 1))
    assert len({line["idea"] for line in lines}) == len(lines)
    for line in lines:
        assert line["layer"] + "_nogpu" == binary.name and line["precision"] in ("bf16", "fp32")
        assert line["size"] and all(isinstance(n, int) for n in line["size"].values())
        assert (line["bytes"] >= line["floor_bytes"] > 0
                and line["flops"] >= line["floor_flops"] >= 0), line


def test_the_trainers_own_is_among_them(binary):
    assert any("the trainer's" in line["idea"] for line in predicted(binary))


@pytest.mark.parametrize("args, names",
                         [(["0"], "0:"), (["999"], "999:"), (["-1"], "-1:"), (["2x"], "2x:"),
                          ([""], ":"), (["--nothing"], "--nothing:"), (["1", "2"], "2:"),
                          (["--check", "--predict"], "--predict:"), (["--json"], "--json:"),
                          (["--json", "out", "--predict"], "--json:"),
                          (["--json", "out"], "--json:")],
                         ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_arguments(binary, args, names):
    done = run(binary, *args, status=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done
    assert done.stderr.startswith(f"{binary.name.removesuffix('_nogpu')}: {names}"), done.stderr
    assert not (ROOT / "out").exists()


def test_nothing_is_left_over():
    """A binary without a source, from before a file was renamed, would hide that it is gone."""
    assert {path.name for path in BUILT.glob("*_nogpu")} == {source.stem + "_nogpu"
                                                             for source in SOURCES}


def test_table():
    if any(line["precision"] != "bf16" for source in SOURCES
           for line in predicted(BUILT / (source.stem + "_nogpu"))):
        pytest.skip("the table is that of bf16, and these binaries were built with PRECISION=FP32")
    done = subprocess.run([sys.executable, ROOT / "dev/cuda/table.py", "--check"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

# ----------------------------------------------------------------------------
# kernels that are wrong

WRONG = r"""
#include "common.cuh"

__global__ void scaled(float* y, const float* x, float by, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = by * x[i];
}

__global__ void summed(float* y, const float* x) { atomicAdd(y, x[blockIdx.x]); }

static std::vector<Variant> variants(Arrays& a, const Size& size) {
    int n = size[0], blocks = blocks_for(n, 32);
    float *x = a.normals_fp32(n), *y = a.room<float>(n), *z = a.put(Floats{0});
    auto by = [=, &a](float factor, int count) {
        return [=] { scaled<<<blocks, 32>>>(y, x, factor, count); };
    };
    auto check = [=, &a] {
        Floats want = a.start(x);
        for (float& w : want) w *= 2;
        expect("y", y, want, 1e-3, 0);
    };
    auto check_sum = [=, &a] {
        double sum = 0;
        for (float w : a.start(x)) sum += w;
        expect("z", z, {float(sum)}, 1e-3, 0);
    };
    auto sum = [=] { summed<<<n, 1>>>(z, x); };
    std::function<void()> small = n < 100 ? std::function<void()>(by(2, n)) : nullptr;
    Work work = {1, 1};
    return {{"right", work, work, by(2, n), check},
            {"a little off", work, work, by(2.01, n), check},
            {"one is left out", work, work, by(2, n - 1), check},
            {"nothing is launched", work, work, [] {}, check},
            {"another order each time", work, work, sum, check_sum},
            {"as it says", work, work, sum, check_sum, false},
            {"compares nothing", work, work, by(2, n), [] {}},
            {"for small sizes", work, work, small, check},
            {"for no size", work, work, nullptr, check},
            {"a block that is too large", work, work,
             [=] { scaled<<<1, 2048>>>(y, x, 2, n); }, check}};
}

int main(int argc, char** argv) {
    return harness({"wrong", {"n"}, {{33}, {777}}, {777}, variants}, argc, argv);
}
"""


def test_wrong_kernels(tmp_path):
    """The harness tells wrong kernels from right ones."""
    # of a `make test` around this
    settings = {k: v for k, v in os.environ.items()
                if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    compiler = subprocess.run(["make", "-s", "--eval", "how: ; $(info $(NOGPU)) @true", "how"],
                              cwd=ROOT, env=settings, capture_output=True, text=True)
    assert compiler.returncode == 0, compiler.stderr
    # where common.cuh and the compiler look for them
    for name in "train_gpt2_compact.cu", "train_gpt2_compact.cpp", "dev", "build":
        (tmp_path / name).symlink_to(ROOT / name)
    source = tmp_path / "a/b/wrong.cu"
    source.parent.mkdir(parents=True)
    source.write_text(WRONG)
    (source.parent / "common.cuh").symlink_to(ROOT / "dev/cuda/common.cuh")
    translated = subprocess.run([sys.executable, ROOT / "dev/nogpu/translate.py", source],
                                capture_output=True, text=True)
    assert translated.returncode == 0, translated.stderr
    (tmp_path / "wrong.cpp").write_text(translated.stdout)
    wrong = tmp_path / "wrong"
    built = subprocess.run(shlex.split(compiler.stdout) + ["wrong.cpp", "-lboost_context", "-o",
                                                           wrong],
                           cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    said = run(wrong, status=1).stdout
    right = {1, 6, 8}
    assert VERDICT.findall(said) == [(str(i), "passed" if i in right else "FAILED")
                                     for i in range(1, 11)], said
    assert "two runs differ" in said and said.count("compares nothing") == 3, said
    assert "\n3 passed, 7 failed\n" in said
