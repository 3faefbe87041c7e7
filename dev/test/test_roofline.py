"""
dev/roofline.py: its launches are those of a real step, run on a CPU by dev/nogpu; what it prints is
what the issue's users read.
"""
import collections
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import plan

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dev"))
import roofline  # noqa: E402

NOGPU = ROOT / "build/train_nogpu_bf16"
SHAPE = ["-e", "d3", "--channels", "64", "--heads", "1", "--context", "40", "-b", "2", "-v", "0",
         "--gap", "0"]
SETTINGS = ["", "--rank 1", "--rank 1 --optimizer adamw -d 160",
            "--projection gaussian --optimizer adamw", "--projection rademacher --master none",
            "--compress qkv,attproj,fc,fcproj", "--gelu 2bit --tape int8", "--heads 2 -d 160",
            *(f"-r {level}" for level in range(1, 6)), "-r 4 --rank 1",
            "-r 5 --projection gaussian --tape int8"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(" ".join(random.Random(1).choices("a few words again and again".split(),
                                                      k=1000)))
    return str(path)


def launches(corpus, folder, flags):
    """
    Of one step: {kernel: launches}, "product" for all of cuBLAS's, and these products' FLOPs; two
    steps less one.
    """
    found, sums = [], []
    for steps in 1, 2:
        path = folder / f"launches{steps}"
        done = subprocess.run([str(NOGPU), "--train", corpus, *flags, "-x", str(steps)],
                              capture_output=True, text=True,
                              env=dict(os.environ, OMP_NUM_THREADS="1", NOGPU_LAUNCHES=str(path)))
        assert done.returncode == 0, done.stderr
        rows = [(name, list(map(int, size)))
                for name, *size in map(str.split, path.read_text().splitlines())]
        found.append(collections.Counter(name for name, _ in rows))
        sums.append(sum(2 * m * n * k * count for name, (m, n, k, count) in rows
                        if name == "product"))
    return found[1] - found[0], sums[1] - sums[0]


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_launches_are_those_of_a_step(corpus, tmp_path, setting):
    if not NOGPU.exists():
        pytest.skip("the CUDA trainer is not built for dev/nogpu: "
                    "no CUDA headers or no libboost-context")
    flags = [*SHAPE, *setting.split()]
    real, flops = launches(corpus, tmp_path, flags)
    step = roofline.Step("h100",
                         roofline.Shape(plan("--train", corpus, *flags, trainer=str(NOGPU))))
    said, sums = collections.Counter(), 0
    for name, (number, _, work, *_) in step.kernels.items():
        product = name.startswith("matmul")
        said["product" if product else name] += number
        sums += work * product
    assert said == real
    assert abs(sums - flops) < 1e-9 * flops


def predict(*flags):
    done = subprocess.run([sys.executable, str(ROOT / "dev/roofline.py"), *flags],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_json():
    found = json.loads(predict("--card", "h100", "--json", "-b", "64"))
    for part in found, found["llmc"]:
        assert abs(sum(row["ms"] for row in part["kernels"]) - part["total_ms"]) < 1e-6
        assert abs(part["tokens_per_second"] - 64 * 1024 * 1e3 / part["total_ms"]) < 1
        for row in part["kernels"]:
            assert set(row) == {"name", "launches", "bytes", "flops", "floor_ms", "ms"}
            assert row["floor_ms"] <= row["ms"], row
            # a sum of maxima may be more than the maximum of sums
            floor = 1e3 * max(row["bytes"] / 3350e9, row["flops"] / 989e12)
            assert row["floor_ms"] >= 0.999 * floor, row


def test_a_step_is_no_faster_than_its_products():
    """
    The FLOPs are those of the plan, but for attention, whose tiles on the diagonal count whole and
    which multiplies 7 times backward where 5 are needed.
    """
    p = plan("-b", "64", "--rank", "1")
    rows = roofline.predict("h100", p)["kernels"]
    products = sum(row["flops"] for row in rows if row["name"].startswith("matmul"))
    attention = 12 * 7 * 1024 * 768
    # padded words
    assert abs(products / 65536 / (p["flops_per_token"]["total"] - attention) - 1) < 2e-3


def test_faster_cards_are_faster_and_the_title_says_predicted():
    times = [json.loads(predict("--card", card, "--json", "-b", "4"))["total_ms"]
             for card in ("h100", "a100", "4090", "l4", "3060")]
    assert times == sorted(times)
    title = predict("--card", "3060", "-b", "4").splitlines()[0]
    assert "predicted" in title and "3060" in title


def test_names_of_cards():
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100",
             "NVIDIA GeForce RTX 4090": "4090", "NVIDIA GeForce RTX 3060": "3060",
             "NVIDIA L4": "l4", "NVIDIA L40": None, "NVIDIA GeForce RTX 4090 D": None,
             "NVIDIA GeForce RTX 3060 Laptop GPU": None}
    assert {name: roofline.card_of(name)
            for name in names} == names and set(names.values()) == {*roofline.CARDS, None}


@pytest.mark.parametrize("flags, word",
                         [(["--card", "none"], "--card"), (["--rank", "-1"], "--rank")])
def test_bad_input(flags, word):
    done = subprocess.run([sys.executable, str(ROOT / "dev/roofline.py"), *flags],
                          capture_output=True, text=True)
    assert done.returncode == 2 and word in done.stderr and done.stdout == ""
