"""
Tests of nogpu: python -m pytest dev/nogpu. They need g++, Boost.Context and the CUDA toolkit's
headers (CUDA_HOME, or where nvcc is); the samples are compiled for a GPU too where nvcc is.
"""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("nogpu")]  # the samples are built once

HERE = Path(__file__).resolve().parent
SAMPLES = HERE / "samples"

spec = importlib.util.spec_from_file_location("translate", HERE / "translate.py")
translate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(translate)


def cuda_home():
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    nvcc = shutil.which("nvcc")
    return Path(nvcc).resolve().parents[1] if nvcc else None


def build(name, folder, sanitize):
    home = cuda_home()
    if not home or not (home / "include" / "cuda_runtime.h").exists():
        pytest.skip("no CUDA toolkit: set CUDA_HOME, or have nvcc on PATH")
    source, program = folder / f"{name}.cpp", folder / name
    translated = subprocess.run([sys.executable, HERE / "translate.py", SAMPLES / f"{name}.cu"],
                                capture_output=True, text=True)
    assert translated.returncode == 0, translated.stderr
    source.write_text(translated.stdout)
    flags = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all" if sanitize else "-O2"
    compiled = subprocess.run(["g++", "-std=c++17", *flags.split(), "-fopenmp", "-Wall", "-Wextra",
                               "-Werror", "-D__NOGPU__", f"-I{HERE / 'include'}", "-isystem",
                               home / "include", source, "-lboost_context", "-o", program],
                              capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    return program


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Gives the program of a sample, built once."""
    built = {}

    def get(name, sanitize=True):
        if (name, sanitize) not in built:
            built[name, sanitize] = build(name, tmp_path_factory.mktemp(f"{name}_{sanitize}"),
                                          sanitize)
        return built[name, sanitize]
    return get


def run(program, *arguments, **settings):
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "2",
                               **{k: str(v) for k, v in settings.items()}})

# ----------------------------------------------------------------------------
# what is right is right


@pytest.mark.parametrize("name", ["basics", "mma", "philox", "cublas"])
def test_sample(programs, name):
    r = run(programs(name))
    assert r.returncode == 0 and "all checks passed" in r.stdout, r.stdout + r.stderr


@pytest.mark.parametrize("name", ["basics", "mma"])
def test_orders(programs, name):
    """No order of blocks and threads makes a right kernel wrong."""
    for seed in range(2, 6):
        r = run(programs(name), NOGPU_SEED=seed)
        assert r.returncode == 0, f"seed {seed}\n" + r.stdout + r.stderr


def test_without_sanitizers(programs):
    r = run(programs("basics", sanitize=False))
    assert r.returncode == 0, r.stdout + r.stderr


def test_other_device(programs):
    """A device with 99 KB of shared memory and 1 MB of memory in all."""
    r = run(programs("basics"), NOGPU_SHARED_KB=99, NOGPU_MEMORY_MB=1)
    assert r.returncode == 0, r.stdout + r.stderr
    r = run(programs("basics"), NOGPU_SHARED_KB=64)          # the sample takes 80,000 bytes
    assert r.returncode == 1 and "invalid argument" in r.stdout, r.stdout + r.stderr

# ----------------------------------------------------------------------------
# what is wrong is found

# The message that each planted bug must give, and the kernel that it must name.
FOUND = {
    "divergent_barrier": (r"divergent barrier: .* at __syncthreads, bugs.cu:(20|22), "
                          r".* __syncthreads, bugs.cu:(20|22)",
                          "divergent_barrier"),
    "early_exit": (r"31 threads exited(.|\n)*__syncthreads at bugs.cu:28 is not reached by all "
                   r"threads of the block",
                   "early_exit"),
    "exited_lane": (r"thread exits while thread \(\d+,0,0\) waits for it in "
                    r"__shfl_xor_sync|__shfl_xor_sync .*: thread \(9,0,0\), "
                    r"in the mask 0xffffffff, has exited",
                    "exited_lane"),
    "shuffle_in_branch": (r"56 threads wait at __syncthreads(.|\n)* 8 threads wait in "
                          r"__shfl_xor_sync",
                          "shuffle_in_branch"),
    "not_in_mask": (r"calling lane \d+ is not in the mask 0x0000ffff", "not_in_mask"),
    "two_operations": (r"different operations: "
                       r".*__shfl_xor_sync.*__ballot_sync|different operations: "
                       r".*__ballot_sync.*__shfl_xor_sync",
                       "two_operations"),
    "shared_overrun": (r"0 bytes past the end of __shared__ tile, 132 bytes", "shared_overrun"),
    "shared_underrun": (r"12 bytes before __shared__ tile, 132 bytes", "shared_overrun"),
    "dynamic_overrun": (r"0 bytes past the end of dynamic shared memory, 256 bytes",
                        "dynamic_overrun"),
    "global_overrun": (r"0 bytes past the end of device memory, 1024 bytes", "global_write"),
    "global_underrun": (r"(12|8|4) bytes before device memory, 1024 bytes", "global_write"),
    "freed": (r"at byte \d+ of freed device memory, 1024 bytes", "global_write"),
    "arena_gap": (r"at byte 400 of device memory, 1024 bytes", "global_write"),
    "misaligned": (r"misaligned address .* for type 'struct float4'", "misaligned"),
    "misaligned_shared": (r"misaligned address .* for type 'struct float4'", "misaligned_shared"),
    "ldmatrix_misaligned": (r"ldmatrix.x2 at bugs.cu:\d+: "
                            r"the row's address .* is not a multiple of 16",
                            "ldmatrix_misaligned"),
    "too_many_threads": (r"more threads in a block than __launch_bounds__\(64\) allows",
                         "small_block"),
    "null_pointer": (r"Segmentation fault at address", "null_pointer"),
    "host_pointer": (r"kernel global_write: argument 1 is a host pointer", None),
    "device_pointer": (r"at byte 12 of device memory(.|\n)*host code used a device pointer", None),
    "copy_too_long": (r"cudaMemcpy: the source is .* too small", None),
    "copy_direction": (r"cudaMemcpy: the destination is not what the direction says", None),
    "freed_twice": (r"cudaFree of what cudaMalloc did not give, or twice", None),
    "cublas_overrun": (r"cublasSgemm: matrix A, 16 x 17 with leading dimension 16, "
                       r"1088 bytes .* not within one device allocation",
                       None)}


@pytest.mark.parametrize("bug", FOUND)
def test_found(programs, bug):
    message, kernel = FOUND[bug]
    r = run(programs("bugs"), bug, NOGPU_SEED=7)
    assert r.returncode != 0, r.stdout
    assert re.search(message, r.stderr), r.stderr
    if kernel:
        assert re.search(rf"in kernel {kernel}, launch 1, .* block \(\d+,0,0\), thread \(\d+,0,0\)",
                         r.stderr), r.stderr
        assert "NOGPU_SEED=7" in r.stderr


# Bugs that show in the results: whether the program's own check sees them is a matter of the order,
# which must be bad for every seed here.
SHOWN = {"missing_barrier": True, "barrier_before_rewrite": True, "missing_syncwarp": True,
         "uninitialised_global": True, "uninitialised_shared": False, "missing_wait": True,
         "missing_commit": True, "async_too_early": True, "block_order": False,
         "unawaited_copy": True, "copies_on_two_streams": True}


@pytest.mark.parametrize("bug", SHOWN)
def test_shown(programs, bug):
    for seed in (1, 2, 3, 4):
        r = run(programs("bugs"), bug, NOGPU_SEED=seed)
        assert r.returncode == 1 and re.search(rf"{bug}: element \d+ is",
                                               r.stdout), f"seed {seed}\n" + r.stdout + r.stderr
        # there another round's value is read
        if bug != "barrier_before_rewrite":
            assert "read before it was written" in r.stdout, r.stdout
    if SHOWN[bug]:
        r = run(programs("bugs"), bug, "right")
        assert r.returncode == 0 and f"{bug}: right" in r.stdout, r.stdout + r.stderr


def test_same_seed_same_run(programs):
    """A seed gives the same order again: the same thread is named."""
    runs = {run(programs("bugs"), "not_in_mask", NOGPU_SEED=5).stderr for _ in range(3)}
    assert len(runs) == 1
    assert len({run(programs("bugs"), "not_in_mask", NOGPU_SEED=s).stderr.replace(f"SEED={s}", "")
                for s in range(8)}) > 1


def test_bug_samples_find_nothing_else(programs):
    r = run(programs("bugs"), "none")
    assert r.returncode == 0 and "nothing found" in r.stdout and not r.stderr, r.stdout + r.stderr

# ----------------------------------------------------------------------------
# the rewriting


def rewrite(tmp_path, text, **files):
    for name, content in files.items():
        (tmp_path / name.replace("_cuh", ".cuh")).write_text(content)
    path = tmp_path / "x.cu"
    path.write_text(text)
    return translate.translate(str(path), set())


def test_launches(tmp_path):
    out = rewrite(tmp_path,
                  'f<<<1, n>>>(a, b);\nns::g<4, (N > 2)><<<dim3(a, b), g(c, d), smem, '
                  's>>>();\n// h<<<1, 2>>>(x)\nchar c = \'"\'; const char* s = "k<<<1, 2>>>(y)"; '
                  'x = 1\'000 << 2;\n')
    assert 'nogpu::launch(nogpu::config("f", 1, n), f, a, b);' in out
    assert ('nogpu::launch(nogpu::config("ns::g<4, (N > 2)>", dim3(a, b), g(c, d), smem, s), '
            'ns::g<4, (N > 2)>);'
            in out)
    assert '// h<<<1, 2>>>(x)' in out and '"k<<<1, 2>>>(y)"' in out and "x = 1'000 << 2;" in out


def test_lines_keep_their_numbers(tmp_path):
    text = ('f<<<1,\n  2>>>\n  (a,\n   b);\n__shared__ float\n  x[3], '
            '// note\n  y;\n#pragma unroll 4\nlast;\n')
    # after the #line
    assert rewrite(tmp_path, text).split("\n").index("last;") == text.split("\n").index("last;") + 1


def test_shared_variables(tmp_path):
    out = rewrite(tmp_path,
                  "__global__ void k() { __shared__ alignas(16) unsigned char a[N * 2][T<3, "
                  "4>::size], b; extern __shared__ float4 d[]; }")
    assert 'typedef unsigned char nogpu_type_of_a[N * 2][T<3, 4>::size];' in out
    assert 'nogpu::shared_id("a", sizeof(nogpu_type_of_a), 16)' in out
    assert 'typedef unsigned char nogpu_type_of_b;' in out
    assert 'float4* d = (float4*)nogpu::dynamic_shared(alignof(float4));' in out
    with pytest.raises(SystemExit, match="x.cu:2: a __shared__ declaration"):
        rewrite(tmp_path, "\n__shared__ float x = 3;")


def test_includes(tmp_path):
    out = rewrite(tmp_path,
                  '#include "a.cuh"\n#if 0\n#include "a.cuh"\n#endif\n// #include "gone.cuh"\n'
                  'last;\n',
                  a_cuh="#pragma once\nf<<<1, 1>>>();\n")
    assert out.count("nogpu::launch") == 1 and "#pragma" not in out
    lines = out.split("\n")
    at = lines.index("last;")
    number = max(i for i in range(at) if lines[i].startswith("#line"))
    assert int(lines[number].split()[1]) + at - number - 1 == 6

# ----------------------------------------------------------------------------
# the same sources for a GPU


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("name", ["basics", "mma", "philox", "cublas", "bugs", "bench"])
def test_compiles_for_a_gpu(name, tmp_path):
    r = subprocess.run(["nvcc", "-arch=sm_80", "-std=c++17", "-Werror", "all-warnings", "-c",
                        SAMPLES / f"{name}.cu", "-o", tmp_path / "x.o"],
                       capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    assert not r.stderr.strip(), r.stderr
