"""The memory plan: what --plan says, and that a run takes what its plan says."""

import json
import os
import resource
import shutil
import subprocess
import time

import numpy as np
import pytest

import formats
from conftest import TINY, check_one_line, environment

BYTES = {"fp32": 4, "bf16": 2, "int32": 4, "int64": 8}
ALL = "qkv,attproj,fc,fcproj"
DEFAULT = "qkv,fc,fcproj"
# layers, channels, heads
SHAPES = {"d12": (12, 768, 12), "d24": (24, 1024, 16), "d36": (36, 1280, 20), "d48": (48, 1600, 25), "d6": (6, 384, 6)}
MILLION = 1 << 20


def plan(*args, **kw):
    done = formats.run_trainer([*args, "--plan=json"], **kw)
    assert done.returncode == 0 and done.stderr == "", done
    return json.loads(done.stdout)  # which fails where there is anything else


def tensors(p):
    return {t["name"]: t for t in p["tensors"]}


def count(t):
    n = 1
    for d in t["shape"]:
        n *= d  # Python's own numbers: they do not overflow
    return n


def check_sums(p):
    assert len(tensors(p)) == len(p["tensors"]), "a name occurs twice"
    for t in p["tensors"]:
        assert set(t) == {"name", "category", "shape", "type", "bytes"}
        assert t["bytes"] == count(t) * BYTES[t["type"]] > 0, t
    for category, size in p["categories"].items():
        assert size == sum(t["bytes"] for t in p["tensors"] if t["category"] == category)
    assert sum(p["categories"].values()) == sum(t["bytes"] for t in p["tensors"]) == p["total_bytes"]
    f = p["flops_per_token"]
    assert set(f) == {"forward", "backward", "recompute", "projection", "update", "total"}
    assert abs(sum(f.values()) - 2 * f["total"]) <= 5  # each is rounded to a whole number


VARIANTS = [[], ["--rank", 1], ["--rank", 0.125, "--moments", "move"],
            ["--projection", "sparse", "--moments", "move", "--rank", 100],
            ["--compress", ALL, "-r", 2], ["--compress", "none"], ["-r", 1, "--projection", "rademacher", "-d", 8192]]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(map(str, v)))
def test_json(variant):
    p = plan("-e", "d6", "-b", 2, "-t", 512, *variant)
    assert set(p) == {"total_bytes", "full_rank_total_bytes", "categories", "tensors", "flops_per_token", "options"}
    check_sums(p)
    assert p["full_rank_total_bytes"] == plan("-e", "d6", "-b", 2, "-t", 512, *variant, "--rank", 1)["total_bytes"]
    full = variant in (["--rank", 1], ["--compress", "none"])
    assert (p["total_bytes"] == p["full_rank_total_bytes"]) == full and p["total_bytes"] <= p["full_rank_total_bytes"]
    long = {"-r": "--recompute", "-d": "--total-batch"}
    for name, value in zip(variant[::2], variant[1::2]):
        assert p["options"][long.get(name, name)[2:]] == value


def test_text_says_the_same():
    """Both plans print the same tensors and, in MiB, the same bytes."""
    p, said = plan("-e", "d6", "-b", 2), formats.run_trainer(["-e", "d6", "-b", 2, "--plan"])
    assert said.returncode == 0 and said.stderr == ""

    def mebibytes(n):
        return f"{n // MILLION:,}.{n % MILLION * 10 // MILLION} MiB"
    for t in p["tensors"]:
        lines = [line for line in said.stdout.splitlines() if line.split()[:2] == [t["category"], t["name"]]]
        assert len(lines) == 1, t
        for part in (" x ".join(map(str, t["shape"])), mebibytes(t["bytes"]), t["type"]):
            assert part in lines[0]
    total, = [line for line in said.stdout.splitlines() if line.split()[:1] == ["total"]]
    assert mebibytes(p["total_bytes"]) in total and mebibytes(p["full_rank_total_bytes"]) in total


# ---------------------------------------------------------------------------- shapes

@pytest.mark.parametrize("name", SHAPES)
def test_parameters(name):
    L, C, NH = SHAPES[name]
    p = plan("-e", name)
    config = dict(context=1024, vocab=50257, layers=L, heads=NH, channels=C, padded_vocab=50304)
    got = {n: tuple(t["shape"]) for n, t in tensors(p).items() if t["category"] == "parameters"}
    assert got == formats.param_shapes(config)
    assert tensors(p)["lse"]["shape"] == [L, 4096, NH] and tensors(p)["logits"]["shape"][1] == 50257


@pytest.mark.parametrize("rank, compressed", [(0.25, DEFAULT), (0.125, ALL), (0.3, "fcproj"), (100, "qkv,attproj"),
                                              (500, DEFAULT), (1.0, ALL)])
def test_compressed_shapes(rank, compressed):
    """Gradient and both moments of a compressed weight are (m, r) a layer, in fp32; of all others, as the weight."""
    p = plan("-e", "d6", "--rank", rank, "--compress", compressed)
    L, C, NH = SHAPES["d6"]
    config = dict(context=1024, vocab=50257, layers=L, heads=NH, channels=C, padded_vocab=50304)
    for name, shape in formats.param_shapes(config).items():
        wanted = list(shape)
        if name.endswith("w") and name[:-1] in compressed.split(","):
            n = shape[2]
            wanted[2] = min(n, rank if rank > 1 else int(rank * n + 0.5))
        for group in ("grad.", "m.", "v."):
            t = tensors(p)[group + name]
            assert t["shape"] == wanted and t["type"] == "fp32", t


# The design's table: width in channels of what is kept for each token and layer, level by level.
TAPE = {"residual": [1, 1, 1, 1, 1, 1], "ln1": [1, 1, 0, 0, 0, 0], "qkv": [3, 3, 3, 3, 0, 0], "atty": [1, 1, 1, 1, 1, 0],
        "residual2": [1, 1, 1, 1, 1, 0], "ln2": [1, 1, 0, 0, 0, 0], "fch": [4, 4, 4, 0, 0, 0], "fch_gelu": [4, 0, 0, 0, 0, 0]}
SUMS = [16, 12, 10, 6, 3, 1]
Z = {"ln1": "qkv", "ln2": "fc", "fch_gelu": "fcproj"}  # what z stands in for, and of which layer it is the input


@pytest.mark.parametrize("rank", [1.0, 0.5, 0.25, 0.125])
@pytest.mark.parametrize("compressed", [DEFAULT, ALL, "fcproj"])
def test_tape(compressed, rank, levels):
    L, C, NH = SHAPES["d6"]
    N = 2 * 512
    for level in levels:
        p = plan("-e", "d6", "-b", 2, "-t", 512, "--rank", rank, "--compress", compressed, "-r", level)
        by_name, total = {n: t for n, t in tensors(p).items() if t["category"] == "tape"}, 0
        for name, widths in TAPE.items():
            rho = rank if Z.get(name) in compressed.split(",") else 1
            t = by_name.pop(name if rho == 1 else name + ".z", None)
            elements = count(t) if t else 0
            if name == "residual":
                elements -= N * C  # the stream out of the last block
            assert elements == L * N * C * widths[level] * rho, f"{name} at level {level}: {t}"
            total += elements / (L * N * C)
        if rank == 1:
            assert total == SUMS[level]
        elif compressed != "fcproj":
            assert total == {0: 10 + 6 * rank, 1: 10 + 2 * rank}.get(level, SUMS[level])
        # the rest: a few floats a token, and the last LayerNorm
        rest = {"ln1_mean": L * N, "ln1_rstd": L * N, "ln2_mean": L * N, "ln2_rstd": L * N, "lse": L * N * NH,
                "lnf": N * C, "lnf_mean": N, "lnf_rstd": N}
        assert {n: count(t) for n, t in by_name.items()} == rest


def test_options_change_what_they_should():
    base = plan("-e", "d6")
    def difference(*args):
        other = tensors(plan("-e", "d6", *args))
        own = tensors(base)
        return sorted(n for n in own.keys() | other.keys() if own.get(n) != other.get(n))
    for same in (["-x", 5], ["--alpha", 2], ["--moments", "reset"], ["--gap", 1], ["-d", 16384], ["-s", 5],
                 ["-n", 1, "-o", "x"], ["--projection", "rademacher"]):
        assert difference(*same) == [], same
    assert difference("--moments", "move") == ["projection_change", "projection_next"]
    assert difference("--moments", "move", "--gap", 0) == []
    assert difference("--projection", "sparse") == ["projection", "projection_shift"]
    assert "z" not in tensors(base) and "z" in tensors(plan("-e", "d6", "-r", 2))
    assert not [n for n in tensors(plan("-e", "d6", "--rank", 1)) if n.startswith("projection") or n.endswith(".z")]
    assert difference("-e", "d6", "--context", 2048, "-t", 1024) == ["grad.wpe", "m.wpe", "v.wpe", "wpe"]


# ---------------------------------------------------------------------------- FLOPs

@pytest.mark.parametrize("projection", ["gaussian", "rademacher", "sparse"])
@pytest.mark.parametrize("rho", [1.0, 0.25, 0.125])
@pytest.mark.parametrize("name", ["d12", "d24", "d6"])
def test_flops(name, rho, projection):
    """The design's table, in units of C^2 for each layer and token; attention is 2 T/C forward and 5 T/C backward, the head
    2 V C and 4 V C."""
    L, C, _ = SHAPES[name]
    T, V = 256, 50257
    f = plan("-e", name, "-t", T, "--rank", rho, "--projection", projection)["flops_per_token"]
    dense = rho < 1 and projection != "sparse"

    def units(flops, head, attention):
        return (flops - head * V * C) / (L * C * C) - attention * T / C
    wanted = {"forward": (24, 2, 2), "backward": (24 + (2 + 22 * rho if rho < 1 else 24), 4, 5), "recompute": (0, 0, 0),
              "projection": (36 * rho if dense else 0, 0, 0)}
    for part, (want, head, attention) in wanted.items():
        assert abs(units(f[part], head, attention) - want) < 1e-6, part
    total = {1.0: (72, 72), 0.25: (64.5, 55.5), 0.125: (57.25, 52.75)}[rho][projection == "sparse"]
    assert abs(units(f["total"] - f["update"], 6, 7) - total) < 1e-6


def test_flops_of_the_update():
    """U P^T is once a step, whatever the tokens in it: 2 m n r a layer. attproj is not compressed; a sparse P takes none."""
    L, C, _ = SHAPES["d6"]
    for tokens in (4096, 65536):
        f = plan("-e", "d6", "-d", tokens, "--rank", 0.25)["flops_per_token"]
        assert abs(f["update"] - L * 2 * 0.25 * (3 + 4 + 16) * C**3 / tokens) <= 1
    assert plan("-e", "d6", "--projection", "sparse")["flops_per_token"]["update"] == 0
    assert plan("-e", "d6", "--rank", 1)["flops_per_token"]["update"] == 0


# ---------------------------------------------------------------------------- sizes

def limit_memory(size):
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size))


@pytest.mark.parametrize("name", ["d12", "d24", "d36", "d48"])
def test_plan_needs_no_memory_and_no_data(name):
    """In an address space of 1 GiB, less than any of the plans."""
    begun = time.time()
    p = plan("-e", name, preexec_fn=limit_memory(1 << 30), env=environment())
    assert p["total_bytes"] > 1 << 30
    assert time.time() - begun < 4  # a hundredth of that on an idle machine
    check_sums(p)


@pytest.mark.parametrize("args", [["-e", "d48", "-b", 64],
                                  ["-e", "d48", "-b", 64, "-r", 2, "--compress", ALL, "--moments", "move", "--rank", 0.9],
                                  ["-e", "d1024", "--channels", 65536, "--heads", 1024, "-b", 1024, "--context", 1 << 20],
                                  ["-e", "d2", "--channels", 65536, "--rank", 0.999, "--projection", "sparse"]])
def test_counts_beyond_32_bits(args):
    p = plan(*args)
    check_sums(p)
    assert max(map(count, p["tensors"])) > 2**33
    assert p["full_rank_total_bytes"] == plan(*args, "--rank", 1)["total_bytes"]


def test_not_enough_memory(text):
    done = formats.run_trainer(["--train", text, "-e", "d24", "-t", 64, "-x", 1, "-v", 0], env=environment(),
                               preexec_fn=limit_memory(1 << 30))
    assert done.returncode == 1
    check_one_line(done.stderr, "memory")


def peak(args):
    """The most memory that a run had resident at one time, in bytes: the kernel's own mark, read until the run ends."""
    command = [formats.trainer_path(), *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()) as run:
        most = 0
        while run.poll() is None:
            try:
                with open(f"/proc/{run.pid}/status") as f:
                    most = max([most] + [int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM")])
            except FileNotFoundError:
                pass
            time.sleep(0.002)
        assert run.returncode == 0, run.stderr.read()
    return most


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here to read a process's memory from")


@pytest.fixture(scope="module")
def program(text):
    """The program itself: what a run takes whose plan is next to nothing."""
    args = [*TINY, "--train", text, "-x", 50, "-v", 0]
    taken = peak(args) - plan(*args)["total_bytes"]
    assert taken < 32 * MILLION  # with its libraries; 7 measured
    return taken


@needs_proc
@pytest.mark.parametrize("method", ["--rank 1", "--rank 1 -r 2", "--rank 0.25", "--rank 0.25 -r 2 --projection sparse",
                                    f"--compress {ALL} -r 1 --moments move --gap 1 -v 1 -s 1 -n 1 -o OUT"])
def test_a_run_takes_what_its_plan_says(method, program, text, tmp_path):
    """About half of it is tape. A context far longer than the sequences makes parameters, gradients and moments large at no
    cost in time. The last one has all that may happen between steps: validation, samples, checkpoints."""
    args = ["--train", text, "-e", "d4", "--channels", 64, "--heads", 2, "--context", 100000, "-t", 54, "-b", 250]
    args += ["-x", 2, "-v", 0]
    args += [tmp_path / "out" if word == "OUT" else word for word in method.split()]
    p = plan(*args)
    assert 250 * MILLION < p["total_bytes"] < 600 * MILLION and p["categories"]["tape"] > 100 * MILLION
    taken = peak(args) - program
    shutil.rmtree(tmp_path / "out", ignore_errors=True)  # 200 MB
    # 5 %: buffers for files and for BLAS, pages that only half belong to a tensor
    assert 0.95 < taken / p["total_bytes"] < 1.05, (taken, p["total_bytes"])


@needs_proc
@pytest.mark.parametrize("kind", ["shard", "text"])
def test_files_beyond_2_gib(kind, program, tmp_path):
    """A file that is one hole, of the most tokens that a header can tell. Half of its sequences begin past 2^31 bytes: an
    offset in 32 bits would be negative for them. Nothing but the sequences in use is in memory."""
    path = tmp_path / ("big.bin" if kind == "shard" else "big.txt")
    if kind == "shard":
        formats.write_tokens(path, [], 1)
        with open(path, "r+b") as f:
            f.seek(8)
            f.write(np.array([2**31 - 1, 100], "<i4").tobytes())
    else:
        path.touch()
    try:
        os.truncate(path, 1024 + 2 * (2**31 - 1) if kind == "shard" else 5 * 10**9)
    except OSError as error:
        pytest.skip(f"no file of 5 GB here: {error}")
    out = tmp_path / "out"
    args = [*TINY, "--train", path, "-b", 4, "-x", 100, "-v", -1, "-m", 2, "-o", out]
    assert peak(args) - program < 16 * MILLION
    losses = [step["loss"] for step in formats.read_log(out)[1]]
    assert len(losses) == 100 and losses[-1] < losses[0]  # zeros are soon learnt
