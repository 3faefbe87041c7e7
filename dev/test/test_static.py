"""
What the compiler says of the CUDA trainer's kernels, on any machine with nvcc; no GPU is needed.

Compiles train_gpt2_compact.cu for sm_80, sm_90 and sm_120 with the Makefile's own flags, in both
precisions, and holds: no warnings, no spilled registers, no stack frames, tensor-core instructions
in the attention kernels, 16-byte loads in the memory-bound ones. Run directly, it prints registers,
shared memory and theoretical occupancy of every kernel.

The machine code is read with cuobjdump, from the toolkit or from pip's nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "train_gpt2_compact.cu"
PRECISIONS = ["BF16", "FP32"]
ARCHITECTURES = ["sm_80", "sm_90", "sm_120"]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("static")]  # compiled once, for all of them

# Kernels that may spill or keep a stack frame: {name: why that is no loss}. Without a reason there
# is no exception.
MAY_SPILL = {}

FLASH = ["attention_flash_forward", "attention_flash_dq", "attention_flash_dkv"]

# Kernels whose time is that of moving bytes: each reads what is large in it by 16 bytes a thread.
# Not here: fold_kernel, whose rows need not begin on 16 bytes (any rank), dequantize_kernel, which
# reads 8 codes a thread, add_partial_sums, norm_kernel and sparse_change_kernel, whose data are
# small, and the kernels that draw P, which read nothing.
WIDE = ["layernorm_kernel", "layernorm_backward_kernel", "gelu_forward_kernel",
        "gelu_backward_kernel", "embedding_forward_kernel", "word_backward_kernel",
        "position_backward_kernel", "column_sums", "cross_entropy_kernel", "squares_kernel",
        "quantize_kernel", "adam_kernel", "direction_kernel", "round_kernel",
        "sparse_update_kernel"]

# A multiprocessor's limits, from the CUDA programming guide's table of compute capabilities: warps,
# blocks, KiB of shared memory.
LIMITS = {"sm_80": (64, 32, 164), "sm_90": (64, 32, 228), "sm_120": (48, 24, 100)}
REGISTERS = 64 * 1024

# Dynamic shared memory in bytes at the size of GPT-2 d12 with rank 1/4, for the table.
DYNAMIC = {"layernorm_kernel": 4 * 768 * 2, "attention_plain_forward": (128 + 2 * 64 + 32) * 4,
           "attention_plain_dq": (2 * 128 + 3 * 64) * 4,
           "attention_plain_dkv": (2 * 128 + 4 * 64) * 4, "sparse_update_kernel": 192 * 4}
THREADS = 256  # of a block whose kernel states no bound

# ----------------------------------------------------------------------------
# compiling


def nvcc_command(precision):
    """
    nvcc and the flags that the Makefile builds with, for sm_80 and the PTX beside it; [] where it
    finds no nvcc.
    """
    around = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # of a `make test` that runs this: not for here
    settings = {k: v for k, v in os.environ.items() if k not in around}
    said = subprocess.run(["make", "-s", f"PRECISION={precision}", "GPU_COMPUTE_CAPABILITY=80",
                           "REVISION=static", "EXTRA=-Werror", "--eval",
                           "flags-of-nvcc: ; $(info $(if $(NVCC),$(NVCC) $(NVCC_FLAGS))) @true",
                           "flags-of-nvcc"],
                          cwd=ROOT, env=settings, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return shlex.split(said.stdout)


def known(nvcc, arch):
    """Whether this nvcc can build for an architecture: sm_120 came with CUDA 12.8."""
    said = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    return arch in said.stdout.split()


class Build:
    """
    One compilation, for all architectures: the object file, and what was said while it was made.
    """

    def __init__(self, precision, folder):
        self.object = Path(folder) / f"{precision}.o"
        self.command = nvcc_command(precision)
        self.architectures = [a for a in ARCHITECTURES if known(self.command[0], a)]
        for arch in self.architectures:
            if arch != "sm_80":
                self.command += ["-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}"]
        self.command += ["-Xptxas", "-v", "-c", str(SOURCE), "-o", str(self.object)]
        done = subprocess.run(self.command, capture_output=True, text=True)
        self.status, self.said = done.returncode, done.stdout + done.stderr
        self.kernels = read_ptxas(self.said)
        self.assembly = {}

    def sass(self, arch):
        """{kernel: its machine code} for an architecture."""
        if arch not in self.assembly:
            tool = find_cuobjdump(self.command[0])
            # nvdisasm lies beside it
            settings = dict(os.environ, PATH=os.pathsep.join([str(Path(tool).parent),
                                                              os.environ.get("PATH", "")]))
            done = subprocess.run([tool, "-sass", "-arch", arch, str(self.object)],
                                  capture_output=True, text=True, env=settings)
            assert done.returncode == 0, done.stderr
            self.assembly[arch] = {plain_name(part.split()[0]): part
                                   for part in done.stdout.split("Function : ")[1:]}
        return self.assembly[arch]


def compile_all(folder):
    """
    {precision: Build}, both at once: no more, since a compilation takes its core for a while and
    some memory.
    """
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(PRECISIONS,
                        pool.map(lambda precision: Build(precision, folder), PRECISIONS)))


def find_cuobjdump(nvcc):
    """Beside nvcc, on PATH, or in one of pip's packages; or None."""
    beside = Path(nvcc).resolve().parent / "cuobjdump"
    packages = [tool for folder in sys.path
                for tool in Path(folder or ".").glob("nvidia/*/bin/cuobjdump")]
    found = [str(tool) for tool in [beside, *packages] if tool.exists()]
    return shutil.which("cuobjdump") or (found[0] if found else None)

# ----------------------------------------------------------------------------
# reading


def plain_name(mangled):
    """The name in _Z11some_kernelPfi."""
    match = re.match(r"_Z(\d+)", mangled)
    return mangled[match.end():match.end() + int(match[1])] if match else mangled


def read_ptxas(said):
    """
    {architecture: {kernel: {registers, shared, stack, stores, loads}}} from what `ptxas -v` says.
    """
    kernels = {}
    for entry in said.split("Compiling entry function '")[1:]:
        name, arch = re.match(r"(\w+)' for '(\w+)'", entry).groups()
        stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, "
                                         r"(\d+) bytes spill loads",
                                         entry).groups()
        used = re.search(r"Used (\d+) registers.*", entry)
        shared = re.search(r"(\d+) bytes smem", used[0])
        kernels.setdefault(arch, {})[plain_name(name)] = {
            "registers": int(used[1]), "shared": int(shared[1]) if shared else 0,
            "stack": int(stack), "stores": int(stores), "loads": int(loads)}
    return kernels


def spills(kernel):
    return kernel["stack"] + kernel["stores"] + kernel["loads"] > 0


def source_kernels():
    """{kernel: threads of its block} as the source states them; None where it states none."""
    source = SOURCE.read_text()
    numbers = {name: int(value) for name, value in re.findall(r"\b([A-Z_]+) = (\d+)\b", source)}

    def threads(bound):  # of "threads" or "threads, blocks a multiprocessor"
        # a number, or a product of the source's constants
        return eval(bound.split(",")[0], {"__builtins__": {}}, numbers) if bound else None
    found = re.findall(r"__global__ void\s+(?:__launch_bounds__\(([^)]*)\)\s+)?(\w+)\(", source)
    return {name: threads(bound) for bound, name in found}


def loads_of_16_bytes(sass):
    """Loads from global memory, to registers or straight to shared memory, of 16 bytes a thread."""
    return len(re.findall(r"\bLDG(?:STS)?\.[\w.]*128\b", sass))


def occupancy(arch, registers, shared, threads):
    """The share of a multiprocessor's warps that can be there at once, and what limits them."""
    warps, blocks, kibibytes = LIMITS[arch]
    each = -(-threads // 32)
    # handed out by 256 to a warp, warps by 4
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // 4 * 4 // each
    # the system keeps 1 KiB a block
    by_shared = kibibytes * 1024 // (-(-(shared + 1024) // 128) * 128)
    counts = {"warps": warps // each, "blocks": blocks, "registers": by_registers,
              "shared memory": by_shared}
    limit = min(counts, key=counts.get)
    return counts[limit] * each / warps, limit

# ----------------------------------------------------------------------------
# tests


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    if not nvcc_command("BF16"):
        pytest.skip("no nvcc: the CUDA trainer's kernels cannot be compiled here")
    return compile_all(tmp_path_factory.mktemp("static"))


@pytest.fixture(params=PRECISIONS)
def build(request, builds):
    if builds[request.param].status != 0:
        pytest.skip("does not compile")  # test_compiles_without_warnings fails for it
    return builds[request.param]


@pytest.fixture(params=ARCHITECTURES)
def arch(request, build):
    if request.param not in build.architectures:
        pytest.skip(f"this nvcc does not know {request.param}")
    return request.param


@pytest.fixture
def sass(build, arch):
    if not find_cuobjdump(build.command[0]):
        pytest.skip("no cuobjdump: machine code cannot be read here; "
                    "pip's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm have it")
    return build.sass(arch)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_compiles_without_warnings(builds, precision):
    """
    -Werror stops at the compiler's warnings; those of ptxas and of the host's compiler would be
    words in between.
    """
    built = builds[precision]
    rest = [line for line in built.said.splitlines()
            if not re.match(r"ptxas info|\s*\d+ bytes stack frame|$", line)]
    assert (built.status == 0 and "-Werror" in built.command
            and rest == []), f"{shlex.join(built.command)}\n{built.said}"


def test_every_kernel_is_seen(build, arch):
    seen, written = set(build.kernels[arch]), set(source_kernels())
    # fp32 can do without these
    assert seen <= written and written - seen <= set(FLASH if "-DPRECISION_FP32" in build.command
                                                     else [])


def test_no_spills(build, arch):
    assert {name: k for name, k in build.kernels[arch].items()
            if spills(k) and name not in MAY_SPILL} == {}


def test_exceptions_are_needed(builds):
    """An exception that no kernel makes use of has outlived its reason."""
    compiled = [kernels for built in builds.values() for kernels in built.kernels.values()]
    assert set(MAY_SPILL) <= {name for kernels in compiled for name, k in kernels.items()
                              if spills(k)}


def test_attention_runs_on_tensor_cores(sass):
    products = {name: len(re.findall(r"\bHMMA\.16816\.F32\.BF16\b", sass[name])) for name in FLASH
                if name in sass}
    # four products of 32 x 64 by 64 x 16 at least, 16 each
    assert all(count >= 64 for count in products.values()), products


def test_no_local_memory(sass):
    """What ptxas reports, seen in the code itself."""
    assert [name for name, code in sass.items()
            if re.search(r"\b(LDL|STL)\b", code) and name not in MAY_SPILL] == []


def test_loads_of_16_bytes(sass):
    narrow = [name for name in WIDE + FLASH if name in sass and loads_of_16_bytes(sass[name]) == 0]
    assert {name: sorted(set(re.findall(r"\bLDG[\w.]*", sass[name]))) for name in narrow} == {}


# Every name of CUDA's host libraries that the trainer uses. Each stands in the headers of CUDA
# 12.0, the oldest toolkit that is supported: look a new one up there before it is added.
CUDA_12_0 = """
    cublasCreate cublasGemmEx cublasHandle_t cublasLtHandle_t cublasLtMatmul
    cublasLtMatmulAlgoGetHeuristic cublasLtMatmulDescAttributes_t cublasLtMatmulDescInit
    cublasLtMatmulDescOpaque_t cublasLtMatmulDescSetAttribute cublasLtMatmulHeuristicResult_t
    cublasLtMatmulPreferenceAttributes_t cublasLtMatmulPreferenceInit
    cublasLtMatmulPreferenceOpaque_t cublasLtMatmulPreferenceSetAttribute cublasLtMatrixLayout_t
    cublasLtMatrixLayoutInit cublasLtMatrixLayoutOpaque_t cublasLtMatrixLayoutSetAttribute
    cublasMath_t cublasOperation_t cublasSetMathMode cublasSetStream cublasSetWorkspace
    cublasStatus_t cudaDataType_t cudaDeviceProp cudaDeviceSynchronize cudaError_t
    cudaErrorInsufficientDriver cudaErrorMemoryAllocation cudaErrorNoDevice
    cudaErrorNoKernelImageForDevice cudaErrorUnsupportedPtxVersion cudaEvent_t cudaEventCreate
    cudaEventCreateWithFlags cudaEventDisableTiming cudaEventElapsedTime cudaEventRecord
    cudaEventSynchronize cudaFree cudaFreeHost cudaFuncAttributeMaxDynamicSharedMemorySize
    cudaFuncSetAttribute cudaGetDevice cudaGetDeviceProperties cudaGetErrorName cudaGetErrorString
    cudaGetLastError cudaMalloc cudaMallocHost cudaMemcpy cudaMemcpyAsync cudaMemcpyDeviceToDevice
    cudaMemcpyDeviceToHost cudaMemcpyHostToDevice cudaMemcpyKind cudaMemGetInfo cudaMemset
    cudaMemsetAsync cudaSetDevice cudaStream_t cudaStreamCreateWithFlags cudaStreamNonBlocking
    cudaStreamSynchronize cudaStreamWaitEvent cudaSuccess curand_init curand_normal4
    curandStatePhilox4_32_10_t
""".split()


def test_nothing_newer_than_cuda_12_0():
    code = "\n".join(line.split("//")[0] for line in SOURCE.read_text().splitlines()
                     if not line.startswith("#include"))
    used = set(re.findall(r"\b(?:cuda|cublas(?:Lt)?|curand)(?:[A-Z]|_[a-z])\w*", code))
    assert used - set(CUDA_12_0) == set()


# The readers, on words as the compiler says them: these hold where there is no compiler, too.

PTXAS = """ptxas info    : 218048 bytes gmem, 72 bytes cmem[3]
ptxas info    : Compiling entry function '_Z11some_kernelPfi' for 'sm_80'
ptxas info    : Function properties for _Z11some_kernelPfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers, 400 bytes cmem[0]
ptxas info    : Compile time = 27.151 ms
ptxas info    : Compiling entry function '_Z5other3Foo' for 'sm_90'
ptxas info    : Function properties for _Z5other3Foo
    48 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, 33792 bytes smem, 404 bytes cmem[0]
"""


def test_reads_ptxas():
    assert read_ptxas(PTXAS) == {"sm_80": {"some_kernel": {"registers": 24, "shared": 0, "stack": 0,
                                                           "stores": 0, "loads": 0}},
                                 "sm_90": {"other": {"registers": 255, "shared": 33792, "stack": 48,
                                                     "stores": 8, "loads": 4}}}


def test_reads_loads():
    for line, wide in {"LDG.E.128 R8, [R2.64]": 1, "LDGSTS.E.BYPASS.128 [R1], [R2.64]": 1,
                       "LDG.E.128.CONSTANT R8, [R2.64]": 1, "LDG.E.64 R8, [R2.64]": 0,
                       "LDG.E.U16 R8, [R2.64]": 0, "STG.E.128 [R2.64], R8": 0,
                       "LDS.128 R4, [R1]": 0}.items():
        assert loads_of_16_bytes("    /*0010*/   " + line + " ;") == wide, line


def test_occupancy():
    """As NVIDIA's occupancy calculator has it."""
    assert occupancy("sm_80", 32, 0, 256) == (1.0, "warps")
    assert occupancy("sm_90", 128, 32768, 128) == (0.25, "registers")
    assert occupancy("sm_90", 224, 33792, 128) == (0.125, "registers")
    assert occupancy("sm_80", 64, 33000, 128)[1] == "shared memory"
    assert occupancy("sm_120", 24, 0, 32) == (0.5, "blocks")


def test_source_is_read():
    kernels = source_kernels()
    assert set(WIDE + FLASH + list(DYNAMIC) + list(MAY_SPILL)) <= set(kernels)
    assert (kernels["attention_flash_forward"] == 128 and kernels["cross_entropy_kernel"] == 1024
            and kernels["adam_kernel"] is None)

# ----------------------------------------------------------------------------
# the table


def main():
    if not nvcc_command("BF16"):
        print("test_static.py: needs nvcc, of the CUDA toolkit 12 or 13", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        builds = compile_all(folder)
        for precision, built in builds.items():
            if built.status != 0:
                print(built.said, file=sys.stderr)
                return 1
            readable = find_cuobjdump(built.command[0])
            print(f"\n{precision}: registers / bytes of shared memory / occupancy and its limit; "
                  "spilled bytes where there are any\n")
            print("| kernel | threads | " + " | ".join(built.architectures)
                  + " | loads of 16 bytes |")
            print("|---|---|" + "---|" * (len(built.architectures) + 1))
            for name, threads in source_kernels().items():
                if name not in built.kernels[built.architectures[0]]:
                    continue
                cells = [name, str(threads or THREADS)]
                for arch in built.architectures:
                    k = built.kernels[arch][name]
                    shared = k["shared"] + DYNAMIC.get(name, 0)
                    share, limit = occupancy(arch, k["registers"], shared, threads or THREADS)
                    spilled = (f", spills {k['stores']} / {k['loads']}, stack {k['stack']}"
                               if spills(k) else "")
                    cells.append(f"{k['registers']} / {shared} / {100 * share:.0f} % "
                                 f"{limit}{spilled}")
                cells.append(" ".join(str(loads_of_16_bytes(built.sass(a)[name]))
                                      for a in built.architectures) if readable else "?")
                print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
