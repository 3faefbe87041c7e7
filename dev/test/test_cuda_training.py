"""The CUDA trainer as a user meets it, run on a CPU by dev/nogpu: it trains like the CPU trainer, its plan is what it takes, it says what would fit."""
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU = Path(os.environ.get("TRAINER", ROOT / "train_gpt2_compact"))
NOGPU = {"bf16": ROOT / "build/train_nogpu_bf16", "fp32": ROOT / "build/train_nogpu_fp32"}
SHAPE = ["-e", "d2", "--channels", "64", "--heads", "1", "--context", "40", "-b", "2", "-l", "1e-3", "-v", "0"]


@pytest.fixture(scope="module", autouse=True)
def built():
    if not all(path.exists() for path in NOGPU.values()):
        pytest.skip("the CUDA trainer is not built for dev/nogpu: no CUDA headers or no libboost-context")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_bytes((ROOT / "train_gpt2_compact.cu").read_bytes()[:40000])
    return str(path)


def run(binary, *arguments, **environment):
    environment = dict(os.environ, OMP_NUM_THREADS="1", **environment)
    return subprocess.run([str(binary), *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300)


def losses(folder):
    return [line["loss"] for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in line]


@pytest.mark.parametrize("precision", NOGPU)
@pytest.mark.parametrize("method", [["--rank", "1"], ["--rank", "0.25"], ["--rank", "0.25", "--projection", "sparse", "-r", "2"]], ids=" ".join)
def test_learns_like_the_cpu_trainer(corpus, tmp_path, precision, method):
    flags = ["--train", corpus, *SHAPE, *method, "-x", 12, "--gap", 5]
    for name, binary in ("cpu", CPU), ("cuda", NOGPU[precision]):
        result = run(binary, *flags, "-o", tmp_path / name)
        assert result.returncode == 0, result.stderr
    # fp32: sums in another order, 1e-7 each, grown by 12 Adam steps. bf16: a logit is off by up to 2^-9 of its size of about 1,
    # and the mean over 80 tokens averages that; weights differ by roundings of 2^-9 relative.
    bound = {"fp32": 2e-4, "bf16": 1e-2}[precision]
    cpu, cuda = losses(tmp_path / "cpu"), losses(tmp_path / "cuda")
    assert len(cuda) == 12 and max(abs(a - b) for a, b in zip(cpu, cuda)) < bound
    assert cuda[-1] < cuda[0] - 0.5


def test_resume_is_bit_exact(corpus, tmp_path):
    flags = ["--train", corpus, *SHAPE, "-k", "constant", "--gap", 3, "--moments", "move", "-n", "-1"]
    assert run(NOGPU["bf16"], *flags, "-x", 8, "-o", tmp_path / "whole").returncode == 0
    assert run(NOGPU["bf16"], *flags, "-x", 4, "-o", tmp_path / "parts").returncode == 0
    assert run(NOGPU["bf16"], *flags, "-x", 8, "-y", "-o", tmp_path / "parts").returncode == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    for name in "model_00000008.bin", "state_00000008.bin":
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_plan_is_what_the_device_gives(corpus):
    """The run goes through in the memory of its plan, rounded up to a whole MiB, and not in less."""
    flags = ["--train", corpus, *SHAPE, "-b", 8, "-x", 1]
    plan = json.loads(run(NOGPU["bf16"], *flags, "--plan=json").stdout)
    mebibytes = plan["total_bytes"] / 2**20
    assert plan["total_bytes"] == sum(t["bytes"] for t in plan["tensors"]) == sum(plan["categories"].values())
    enough = run(NOGPU["bf16"], *flags, NOGPU_MEMORY_MB=str(int(mebibytes) + 1))
    assert enough.returncode == 0, enough.stderr
    short = run(NOGPU["bf16"], *flags, NOGPU_MEMORY_MB=str(int(mebibytes)))
    assert short.returncode == 1 and "not enough memory" in short.stderr and str(f"{plan['total_bytes']:,}") in short.stderr


def test_out_of_memory_names_a_batch_that_fits(corpus):
    flags = ["--train", corpus, *SHAPE, "-b", 8, "-x", 1]
    plan = json.loads(run(NOGPU["bf16"], *flags, "--plan=json").stdout)
    limit = {"NOGPU_MEMORY_MB": str(int(plan["total_bytes"] / 2**20 * 0.8))}
    short = run(NOGPU["bf16"], *flags, **limit)
    advice = re.search(r"-b (\d+) -d (\d+) would fit", short.stderr)
    assert short.returncode == 1 and len(short.stderr.splitlines()) == 1 and advice and int(advice[1]) < 8
    fits = run(NOGPU["bf16"], *flags, "-b", advice[1], "-d", advice[2], **limit)
    assert fits.returncode == 0, fits.stderr


def test_channels_that_the_kernels_cannot_take(corpus):
    result = run(NOGPU["bf16"], "--train", corpus, "-e", "d1", "--channels", 60, "--heads", 1, "-x", 1)
    assert result.returncode == 2 and result.stderr.startswith("train_gpt2_compact: --channels: ") and len(result.stderr.splitlines()) == 1
