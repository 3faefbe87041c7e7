"""The memory plan: what --plan says, and that a run takes what its plan says."""

import os
import random
import re
import resource
import shutil
import subprocess
import time

import numpy as np
import pytest

import formats
from conftest import (LEVELS, TINY, check_fit, check_one_line, check_refused, check_sums, count,
                      environment, plan, tensors)

ALL = "qkv,attproj,fc,fcproj"
DEFAULT = "qkv,fc,fcproj"
# layers, channels, heads
SHAPES = {"d12": (12, 768, 12), "d24": (24, 1024, 16), "d36": (36, 1280, 20), "d48": (48, 1600, 25),
          "d6": (6, 384, 6)}
MILLION = 1 << 20


VARIANTS = [[], ["--rank", 1, "--optimizer", "adamw"], ["--rank", 1],
            ["--rank", 0.125, "--moments", "move"],
            ["--projection", "sparse", "--moments", "move", "--rank", 100],
            ["--compress", ALL, "-r", 2], ["--compress", "none", "--optimizer", "adamw"],
            ["-r", 1, "--projection", "rademacher", "-d", 8192], ["-r", 4],
            ["-r", 5, "--tape", "int8", "--master", "none"], ["--gelu", "2bit", "--tape", "int8"],
            ["--optimizer", "adamw"]]
FULL_RANK = ["--rank", 1, "--optimizer", "adamw"]
# its best
LIKE_LLM_C = [*FULL_RANK, "-r", 2, "--gelu", "exact", "--tape", "full", "--master", "fp32"]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(map(str, v)))
def test_json(variant):
    shape = ["-e", "d6", "-b", 2, "-t", 512]
    p, other = plan(*shape, *variant), plan(*shape, *variant, *LIKE_LLM_C)
    assert set(p) == {"total_bytes", "host_bytes", "full_rank_total_bytes", "full_rank_level_2",
                      "categories", "tensors", "flops_per_token", "options"}
    check_sums(p)
    assert p["full_rank_total_bytes"] == plan(*shape, *variant, *FULL_RANK)["total_bytes"]
    assert p["full_rank_level_2"] == {key: other[key] for key in ("total_bytes", "flops_per_token")}
    full = variant in (["--rank", 1, "--optimizer", "adamw"],
                       ["--compress", "none", "--optimizer", "adamw"])
    assert ((p["total_bytes"] == p["full_rank_total_bytes"]) == full
            and p["total_bytes"] <= p["full_rank_total_bytes"])
    long = {"-r": "--recompute", "-d": "--total-batch"}
    for name, value in zip(variant[::2], variant[1::2]):
        assert p["options"][long.get(name, name)[2:]] == value


@pytest.mark.parametrize(
    "variant", [[], ["-r", 4, "--tape", "int8", "--projection", "sparse"], ["--gelu", "2bit"]],
    ids=lambda v: " ".join(map(str, v)))
def test_text_says_the_same(variant):
    """
    Both plans print the same tensors and, in MiB, the same bytes; beside this run's stand those
    that it is compared with.
    """
    shape = ["-e", "d6", "-b", 2, *variant]
    columns = [plan(*shape), plan(*shape, *FULL_RANK), plan(*shape, *LIKE_LLM_C)]
    said = formats.run_trainer([*shape, "--plan"])
    assert said.returncode == 0 and said.stderr == ""

    def mebibytes(n):
        return f"{n // MILLION:,}.{n % MILLION * 10 // MILLION} MiB"
    top, table = said.stdout.split("\n\n")
    assert len(top.splitlines()) == len(columns[0]["tensors"])
    for t, line in zip(columns[0]["tensors"], top.splitlines()):
        shape = " x ".join(map(str, t["shape"]))
        assert line.split() == [t["category"], t["name"], *shape.split(), t["type"],
                                *mebibytes(t["bytes"]).split()]
    wanted = [["memory", "this run", "full rank", "full rank, -r 2"]]
    for category in columns[0]["categories"]:
        wanted.append([category] + [mebibytes(p["categories"].get(category, 0)) for p in columns])
    wanted.append(["total"] + [mebibytes(p["total_bytes"]) for p in columns])
    wanted.append([f"{100 * p['total_bytes'] / columns[2]['total_bytes']:.0f} %" for p in columns])
    wanted.append(["matrix products, FLOPs a token"])
    for part in ("forward", "backward", "recompute", "projection", "update", "total"):
        wanted.append([part] + [f"{p['flops_per_token'][part]:.4g}" for p in columns])
    wanted.append(
        [f"{100 * p['flops_per_token']['total'] / columns[2]['flops_per_token']['total']:.0f} %"
         for p in columns])
    assert [re.split(" {2,}", line.strip()) for line in table.splitlines()] == wanted

# ----------------------------------------------------------------------------
# shapes


@pytest.mark.parametrize("name", SHAPES)
def test_parameters(name):
    L, C, NH = SHAPES[name]
    p = plan("-e", name)
    config = dict(context=1024, vocab=50257, layers=L, heads=NH, channels=C, padded_vocab=50304)
    got = {n: tuple(t["shape"]) for n, t in tensors(p).items() if t["category"] == "parameters"}
    assert got == formats.param_shapes(config)
    assert tensors(p)["lse"]["shape"] == [L, 4096, NH] and tensors(p)["logits"]["shape"][1] == 50257


@pytest.mark.parametrize("rank, compressed", [(0.25, DEFAULT), (0.125, ALL), (0.3, "fcproj"),
                                              (100, "qkv,attproj"), (500, DEFAULT), (1.0, ALL)])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_compressed_shapes(optimizer, rank, compressed):
    """
    Gradient and moments of a compressed weight are (m, r) a layer, in fp32; of all others, as the
    weight. A ratio's rank is a multiple of 8 from 8 on. Muon, which is for the linear layers, has
    no second moment.
    """
    p = plan("-e", "d6", "--rank", rank, "--compress", compressed, "--optimizer", optimizer)
    L, C, NH = SHAPES["d6"]
    config = dict(context=1024, vocab=50257, layers=L, heads=NH, channels=C, padded_vocab=50304)
    for name, shape in formats.param_shapes(config).items():
        wanted = list(shape)
        if name.endswith("w") and name[:-1] in compressed.split(","):
            n = shape[2]
            wanted[2] = min(
                n, rank if rank > 1 else n if rank == 1 else int(int(rank * n + 0.5) / 8 + 0.5) * 8)
        for group in ("grad.", "m.", "v."):
            if group == "v." and optimizer == "muon" and name in ("qkvw", "attprojw", "fcw",
                                                                  "fcprojw"):
                assert group + name not in tensors(p)
                continue
            t = tensors(p)[group + name]
            assert t["shape"] == wanted and t["type"] == "fp32", t


# The design's table: width in channels of what is kept for each token and layer, level by level.
TAPE = {"residual": [1, 1, 1, 1, 1, 1], "ln1": [1, 1, 0, 0, 0, 0], "qkv": [3, 3, 3, 3, 0, 0],
        "atty": [1, 1, 1, 1, 1, 0], "residual2": [1, 1, 1, 1, 1, 0], "ln2": [1, 1, 0, 0, 0, 0],
        "fch": [4, 4, 4, 0, 0, 0], "fch_gelu": [4, 0, 0, 0, 0, 0]}
SUMS = [16, 12, 10, 6, 3, 1]
# what z stands in for, and of which layer it is the input
Z = {"ln1": "qkv", "ln2": "fc", "fch_gelu": "fcproj"}


def tape(p):
    """
    What the tape has, in channels for each token and layer, and its type; and the rest of it, in
    elements.
    """
    N, C = p["options"]["batch"] * p["options"]["seq"], tensors(p)["wte"]["shape"][1]
    L = tensors(p)["qkvw"]["shape"][0]
    found = {n: t for n, t in tensors(p).items() if t["category"] == "tape"}
    rows = {n: t for n, t in found.items() if n.split(".")[0] in TAPE and not n.endswith(".scale")}
    for t in rows.values():
        assert t["shape"][:2] == [L, N], t
    rest = {n: count(t) for n, t in found.items() if n not in rows}
    return {n: (t["shape"][2] / C, t["type"]) for n, t in rows.items()}, rest


@pytest.mark.parametrize("rank", [1.0, 0.5, 0.25, 0.125])
@pytest.mark.parametrize("compressed", [DEFAULT, ALL, "fcproj"])
def test_tape(compressed, rank):
    L, C, NH = SHAPES["d6"]
    N = 2 * 512
    for level in LEVELS:
        rows, rest = tape(plan("-e", "d6", "-b", 2, "-t", 512, "--rank", rank, "--compress",
                               compressed, "-r", level))
        wanted = {name: (widths[level], "fp32") for name, widths in TAPE.items()
                  if widths[level] > 0}
        for name, layer in Z.items():
            if name in wanted and layer in compressed.split(",") and rank < 1:
                wanted[name + ".z"] = (wanted.pop(name)[0] * rank, "fp32")
        assert rows == wanted
        total = sum(width for width, _ in rows.values())
        if rank == 1:
            assert total == SUMS[level]
        elif compressed != "fcproj":
            assert total == {0: 10 + 6 * rank, 1: 10 + 2 * rank}.get(level, SUMS[level])
        # the rest: a few floats a token
        assert rest == {"ln1_mean": L * N, "ln1_rstd": L * N, "ln2_mean": L * N, "ln2_rstd": L * N,
                        "lse": L * N * NH, "lnf_mean": N, "lnf_rstd": N}


@pytest.mark.parametrize("rank", [1.0, 0.25])
def test_tape_of_few_bits(rank):
    """
    int8 takes what is no layer's input alone, with a scale for each token, or for each head of it.
    2 bits of fch do not give its GELU again: that stays until fch itself is computed again, which
    leaves no bits to keep.
    """
    L, C, NH = SHAPES["d6"]
    N = 2 * 512
    shape = ["-e", "d6", "-b", 2, "-t", 512, "--rank", rank]
    for level in LEVELS:
        plain, rest = tape(plan(*shape, "-r", level))
        scales = {"residual": 1, "qkv": 3 * NH, "atty": NH, "residual2": 1}
        held = {n: n in plain for n in scales}
        int8 = {n + ".int8" * held.get(n, False): (width, "int8" if n in scales else "fp32")
                for n, (width, _) in plain.items()}
        rest_of_int8 = dict(rest, **{n + ".scale": L * N * scales[n] for n in scales if held[n]})
        assert tape(plan(*shape, "-r", level, "--tape", "int8")) == (int8, rest_of_int8)
        if level < 3:
            gelu = {"fch_gelu": (4, "fp32")} if rank == 1 else {"fch_gelu.z": (4 * rank, "fp32")}
            for before, more in ((plain, []), (int8, ["--tape", "int8"])):
                bits = {n: kept for n, kept in before.items()
                        if n != "fch"} | {"fch.2bit": (4, "2bit")} | gelu
                assert tape(plan(*shape, "-r", level, "--gelu", "2bit", *more))[0] == bits
        else:
            check_refused(formats.run_trainer([*shape, "-r", level, "--gelu", "2bit", "--plan"]),
                          "--gelu", "--recompute")


def test_options_change_what_they_should():
    base = ["-e", "d6", "--projection", "gaussian"]
    def difference(*args, base=base):
        own, other = tensors(plan(*base)), tensors(plan(*base, *args))
        return sorted(n for n in own.keys() | other.keys() if own.get(n) != other.get(n))
    for same in (["-x", 5], ["--alpha", 2], ["--moments", "reset"], ["--gap", 1], ["-d", 16384],
                 ["-n", 1, "-o", "x"], ["--projection", "rademacher"], ["--master", "none"]):
        assert difference(*same) == [], same
    assert difference("-s", 5) == ["keys_values"]
    assert difference("--moments", "move") == ["projection_change", "projection_next"]
    assert difference("--moments", "move", "--gap", 0) == []
    assert difference("--projection", "sparse") == ["projection", "projection_shift"]
    assert "z" not in tensors(plan(*base)) and "z" in tensors(plan(*base, "-r", 2))
    assert not [n for n in tensors(plan("-e", "d6", "--rank", 1))
                if n.startswith("projection") or n.endswith(".z")]
    assert difference("-e", "d6", "--context", 2048, "-t", 1024) == ["grad.wpe", "m.wpe", "v.wpe",
                                                                     "wpe"]
    # a row that the tape does not keep whole has a place for the block at hand: among them `spare`,
    # four channels wide
    levels = [difference("-r", r + 1, base=[*base, "-r", r, "--rank", 1]) for r in range(5)]
    assert levels == [["fch_gelu"], ["ln1", "ln2"], ["fch", "spare"], ["qkv"],
                      ["atty", "qkv", "residual2"]]
    assert difference("--gelu", "2bit") == ["fch", "fch.2bit"]
    rows = ["atty", "qkv", "residual", "residual2"]
    assert difference("--tape", "int8") == sorted(
        [f"{row}.{part}" for row in rows for part in ("int8", "scale")] + rows + ["spare"])

# ----------------------------------------------------------------------------
# FLOPs


@pytest.mark.parametrize("projection", ["gaussian", "rademacher", "sparse"])
@pytest.mark.parametrize("rho", [1.0, 0.25, 0.125])
@pytest.mark.parametrize("name", ["d12", "d24", "d6"])
def test_flops(name, rho, projection):
    """
    The design's table, in units of C^2 for each layer and token; attention is 2 T/C forward and 5
    T/C backward, the head 2 V C and 4 V C.
    """
    L, C, _ = SHAPES[name]
    T, V = 256, 50257
    f = plan("-e", name, "-t", T, "--rank", rho, "--projection", projection)["flops_per_token"]
    dense = rho < 1 and projection != "sparse"

    def units(flops, head, attention):
        return (flops - head * V * C) / (L * C * C) - attention * T / C
    wanted = {"forward": (24, 2, 2), "backward": (24 + (2 + 22 * rho if rho < 1 else 24), 4, 5),
              "recompute": (0, 0, 0), "projection": (36 * rho if dense else 0, 0, 0)}
    for part, (want, head, attention) in wanted.items():
        assert abs(units(f[part], head, attention) - want) < 1e-6, part
    # fc again at level 3, qkv at level 4, attproj and attention's forward pass at level 5; the rest
    # as it was
    again = {1: (0, 0), 2: (0, 0), 3: (8, 0), 4: (8 + 6, 0), 5: (8 + 6 + 2, 2)}
    for level, (want, attention) in again.items():
        for more in ([], ["--tape", "int8"]):
            other = plan("-e", name, "-t", T, "--rank", rho, "--projection", projection, "-r",
                         level, *more)["flops_per_token"]
            assert abs(units(other["recompute"], 0, attention) - want) < 1e-6, level
            assert other == dict(f, recompute=other["recompute"], total=other["total"])
    total = {1.0: (72, 72), 0.25: (64.5, 55.5), 0.125: (57.25, 52.75)}[rho][projection == "sparse"]
    assert abs(units(f["total"] - f["update"], 6, 7) - total) < 1e-6


def test_flops_of_the_update():
    """
    U P^T is once a step, whatever the tokens in it: 2 m n r a layer. attproj is not compressed; a
    sparse P takes none. Muon's five iterations of X (a, b), b not the longer side, take 2 a b^2 for
    X X^T, 2 b^3 for its square and 2 a b^2 for the product with X; q, k and v are three matrices.
    """
    L, C, _ = SHAPES["d6"]
    adamw = ["--optimizer", "adamw"]
    for tokens in (4096, 65536):
        f = plan("-e", "d6", "-d", tokens, "--rank", 0.25, "--projection", "gaussian",
                 *adamw)["flops_per_token"]
        assert abs(f["update"] - L * 2 * 0.25 * (3 + 4 + 16) * C**3 / tokens) <= 1
        #      q, k, v            attproj   fc          fcproj
        for rank, matrices in ((0.25, [(1, 0.25)] * 3 + [(1, 1), (4, 0.25), (1, 1)]),
                               (1, [(1, 1)] * 3 + [(1, 1), (4, 1), (4, 1)])):
            f = plan("-e", "d6", "-d", tokens, "--rank", rank)["flops_per_token"]
            assert abs(f["update"] / (L * 5 * sum(4 * a * b**2 + 2 * b**3
                                                  for a, b in matrices) * C**3 / tokens) - 1) < 1e-6
    assert plan("-e", "d6", *adamw)["flops_per_token"]["update"] == 0
    assert plan("-e", "d6", "--rank", 1, *adamw)["flops_per_token"]["update"] == 0

# ----------------------------------------------------------------------------
# --memory chooses what fits

SMALL = ["-e", "d3", "--channels", 64, "--context", 64, "-t", 48]


@pytest.mark.parametrize(
    "flags, rows, last",
    [(["--rank", 1], 0, 5), ([], 24, 5), (["--projection", "sparse", "--tape", "int8"], 0, 5),
     (["--gelu", "2bit"], 0, 2), (["--gelu", "2bit", "--tape", "int8"], 24, 2)],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else v)
def test_memory(flags, rows, last):
    """Sizes of all kinds, and those at which a plan just fits and just does not."""
    rng, shape, chosen = random.Random(31), [*SMALL, *flags], set()
    total = ["-d", rows * 48] * bool(rows)
    sizes = [rng.randrange(90_000_000, 120_000_000) for _ in range(4)]
    for level, batch in ((0, 6), (1, 4), (2, 12), (last, 3), (last, 24)):
        exact = plan(*shape, "-b", batch, "-r", level, *total)["total_bytes"]
        sizes += [exact, exact - 1]
    for size in sizes:
        chosen.add(check_fit(size, *shape, wish=rng.randrange(1, 30), rows=rows,
                             first=rng.randrange(last), last=last))
    assert (len({level for level, _ in chosen}) > 2
            and len(chosen) > 4), f"these sizes try little: {chosen}"


def test_memory_that_does_not_suffice():
    """The line tells how much would: that is enough, and a byte less is not."""
    for more in ([], ["--rank", 1], ["--gelu", "2bit"], ["-r", 5], ["-d", 480],
                 ["--projection", "sparse", "--tape", "int8"]):
        said = formats.run_trainer([*SMALL, *more, "--memory", 1000, "--plan"])
        check_refused(said, "--memory", "1,000 bytes")
        least = int(re.search(r"a single sequence takes ([\d,]+) or more",
                              said.stderr).group(1).replace(",", ""))
        p = plan(*SMALL, *more, "--memory", least)
        assert p["options"]["batch"] == 1 and p["total_bytes"] == least
        check_refused(formats.run_trainer([*SMALL, *more, "--memory", least - 1, "--plan"]),
                      "--memory", f"{least - 1:,} bytes")


def test_memory_says_what_it_chose(train, text):
    """
    In the plan's text, and in a run: its log has what it ran with, and it trains like a run that
    was given just that.
    """
    size = plan(*TINY, "--train", text, "-b", 5, "-r", 3)["total_bytes"]
    given = ["--train", text, "-b", 5, "-r", 1, "--memory", size]
    said = formats.run_trainer([*TINY, *given, "--plan"]).stdout
    level, batch = map(int,
                       re.search(rf"^of {size:,} bytes: chose --recompute (\d), -b (\d+)$", said,
                                 re.M).groups())
    p = plan(*TINY, *given)
    assert (level, batch) == (p["options"]["recompute"],
                              p["options"]["batch"]) and level >= 2 and batch >= 5
    run, alone = train(*given, "-x", 3), train("-b", batch, "-r", level, "-x", 3)
    assert f"of {size:,} bytes: chose --recompute {level}, -b {batch}\n" in run.stdout
    assert (run.header["options"]["recompute"], run.header["options"]["batch"]) == (level, batch)
    assert run.losses == alone.losses and run.header["plan"] == alone.header["plan"]

# ----------------------------------------------------------------------------
# sizes


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


@pytest.mark.parametrize(
    "args",
    [["-e", "d48", "-b", 64],
     ["-e", "d48", "-b", 64, "-r", 2, "--compress", ALL, "--moments", "move", "--rank", 0.9],
     ["-e", "d1024", "--channels", 65536, "--heads", 1024, "-b", 1024, "--context", 1 << 20],
     ["-e", "d2", "--channels", 65536, "--rank", 0.999, "--projection", "sparse"]])
def test_counts_beyond_32_bits(args):
    p = plan(*args)
    check_sums(p)
    assert max(map(count, p["tensors"])) > 2**33
    assert p["full_rank_total_bytes"] == plan(*args, *FULL_RANK)["total_bytes"]


def test_not_enough_memory(text):
    done = formats.run_trainer(["--train", text, "-e", "d24", "-t", 64, "-x", 1, "-v", 0],
                               env=environment(), preexec_fn=limit_memory(1 << 30))
    assert done.returncode == 1
    check_one_line(done.stderr, "memory")


def peak(args):
    """
    The most memory that a run had resident at one time, in bytes: the kernel's own mark, read until
    the run ends.
    """
    command = [formats.trainer_path(), *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          env=environment()) as run:
        most = 0
        while run.poll() is None:
            try:
                with open(f"/proc/{run.pid}/status") as f:
                    most = max([most] + [int(line.split()[1]) * 1024 for line in f
                                         if line.startswith("VmHWM")])
            except FileNotFoundError:
                pass
            time.sleep(0.002)
        assert run.returncode == 0, run.stderr.read()
    return most


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"),
                                reason="no /proc here to read a process's memory from")


@pytest.fixture(scope="module")
def program(text):
    """The program itself: what a run takes whose plan is next to nothing."""
    args = [*TINY, "--train", text, "-x", 50, "-v", 0]
    taken = peak(args) - plan(*args)["total_bytes"]
    assert taken < 32 * MILLION  # with its libraries; 7 measured
    return taken


@needs_proc
@pytest.mark.parametrize(
    "method", ["--rank 1", "--rank 1 -r 2", "--rank 0.25", "--rank 0.25 -r 3 --projection sparse",
               "--rank 0.25 -r 5", "--rank 0.25 --gelu 2bit --tape int8 --master none",
               f"--compress {ALL} -r 1 --moments move --gap 1 -v 1 -s 1 -n 1 -o OUT"])
def test_a_run_takes_what_its_plan_says(method, program, text, tmp_path):
    """
    A good part of it is tape. A context far longer than the sequences makes parameters, gradients
    and moments large at no cost in time. The last one has all that may happen between steps:
    validation, samples, checkpoints.
    """
    args = ["--train", text, "-e", "d4", "--channels", 64, "--heads", 2, "--context", 100000, "-t",
            54, "-b", 250]
    args += ["-x", 2, "-v", 0]
    args += [tmp_path / "out" if word == "OUT" else word for word in method.split()]
    p = plan(*args)
    assert (150 * MILLION < p["total_bytes"] < 600 * MILLION
            and p["categories"]["tape"] > 10 * MILLION)
    taken = peak(args) - program
    shutil.rmtree(tmp_path / "out", ignore_errors=True)  # 200 MB
    # 5 %: buffers for files and for BLAS, pages that only half belong to a tensor
    assert 0.95 < taken / p["total_bytes"] < 1.05, (taken, p["total_bytes"])


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shard", "text"])
def test_files_beyond_2_gib(kind, program, tmp_path):
    """
    A file that is one hole, of the most tokens that a header can tell. Half of its sequences begin
    past 2^31 bytes: an offset in 32 bits would be negative for them. Nothing but the sequences in
    use is in memory.
    """
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
