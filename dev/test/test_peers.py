"""dev/peers.py: that PyTorch and the trainer solve the same problem, the methods that are written
out there, and a comparison from its start to its tables."""

import csv
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import conftest
import formats

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
sys.path.insert(0, os.path.join(formats.ROOT, "dev"))
import peers  # noqa: E402

# one worker makes what they share; each run begins with importing PyTorch
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("peers")]

TOOL = os.path.join(formats.ROOT, "dev", "peers.py")
SHAPE = ["-e", "d2", "--channels", 16, "--heads", 2, "--context", 32, "-b", 2]
VOCAB = 123  # a text's characters, and padding to 128


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder with three shards of a text, of different sizes, fewer than ten steps take."""
    folder = tmp_path_factory.mktemp("text")
    tokens = np.frombuffer(conftest.make_text(1100).encode(), np.uint8)
    for name, part in (("train_0", tokens[:330]), ("train_1", tokens[330:400]),
                       ("train_2", tokens[400:600]), ("val", tokens[600:])):
        formats.write_tokens(folder / f"{name}.bin", part, VOCAB)
    return folder


def command(shards, out, *more):
    return [sys.executable, TOOL, "--out", out, "--train", f"{shards}/train_*.bin",
            "--val", f"{shards}/val.bin", *SHAPE, "--steps", 10, "--warmup", 3,
            "--binary", formats.trainer_path(), *more]


def compare(shards, out, *more, status=0, **env):
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **env)
    done = subprocess.run(list(map(str, command(shards, out, *more))), capture_output=True,
                          text=True, env=env)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def rows_of(out):
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def results(out):
    found = {}
    for path in out.glob("*-s1-*.json"):
        found[path.name.split("-")[0]] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def done(shards, tmp_path_factory):
    """Ten steps of all that takes no package but PyTorch, at one rate."""
    out = tmp_path_factory.mktemp("peers") / "out"
    compare(shards, out, "--methods", "adamw,checkpoint,velora,compact,full,ours5", "--lrs",
            "1e-2")
    return out


def test_the_same_problem(done):
    """The losses of full-rank AdamW, through three shards and into a second epoch (17
    sequences, 20 in ten steps), agree with the
    trainer's: both compute in float32, and the log has 6 decimals."""
    found = results(done)
    theirs, ours = found["adamw"], found["full"]
    assert len(theirs["losses"]) == 10 and theirs["losses"][-1] < theirs["losses"][0] - 0.5
    assert np.abs(np.subtract(theirs["losses"], ours["losses"])).max() < 1e-5
    assert abs(theirs["val_loss"] - ours["val_loss"]) < 1e-5
    assert np.abs(np.subtract(theirs["losses"], found["compact"]["losses"])).max() > 5e-3


def test_order_of_sequences(shards, tmp_path):
    """As the trainer's dump shows it of the first step; the whole of an epoch has each sequence."""
    done = formats.run_trainer([*SHAPE[:-1], 5, "--train", f"{shards}/train_*.bin", "-x", 1,
                                "--seed", 7, "--dump", tmp_path / "dump"])
    assert done.returncode == 0, done.stderr
    ours = peers.Shards("--train", f"{shards}/train_*.bin", 32, 7)
    batch = ours.batch(0, 5)
    dump = formats.read_dump(tmp_path / "dump")
    assert np.array_equal(dump["inputs"].reshape(5, 32), batch[:, :-1])
    assert np.array_equal(dump["targets"].reshape(5, 32), batch[:, 1:])
    n = sum(ours.counts)
    epochs = [ours.batch(epoch * n, n).tolist() for epoch in range(2)]
    plain = peers.Shards("--train", f"{shards}/train_*.bin", 32).batch(0, n).tolist()
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == sorted(plain)


def test_memory(done):
    """The parts, of what can be counted by hand."""
    found = results(done)
    numbers = 2 * (12 * 16 * 16 + 13 * 16) + 2 * 16 + (VOCAB + 32) * 16
    adamw, full = found["adamw"], found["full"]
    assert adamw["parameter_bytes"] == adamw["gradient_bytes"] == 4 * numbers
    # two moments, and a step count for each tensor
    assert 8 * numbers <= adamw["state_bytes"] <= 8 * numbers + 8 * 28
    assert full["parameter_bytes"] == 4 * (numbers + (128 - VOCAB) * 16)
    tape = {name: result["tape_bytes"] for name, result in found.items()}
    assert tape["checkpoint"] < tape["compact"] < tape["adamw"] and tape["velora"] < tape["adamw"]
    # of the inputs from ln1 and ln2, 16 wide, and from GELU, 64 wide, in two layers, a quarter
    assert tape["adamw"] - tape["compact"] == 2 * 2 * 32 * 4 * (16 + 16 + 64) * 3 // 4
    assert found["ours5"]["tape_bytes"] < full["tape_bytes"] / 4
    assert found["compact"]["state_bytes"] < adamw["state_bytes"]
    # what the tables compare: of PyTorch the parts, of the trainer its whole plan
    compared = {row["method"]: int(row["memory_bytes"]) for row in rows_of(done)}
    parts = sum(adamw[part + "_bytes"] for part in ("parameter", "gradient", "state", "tape"))
    assert compared["AdamW, full rank"] == parts
    assert compared["this trainer, full rank, AdamW"] == full["total_bytes"]


def test_checkpointing_changes_nothing(done):
    found = results(done)
    assert found["checkpoint"]["losses"] == pytest.approx(found["adamw"]["losses"], abs=1e-6)


def test_twins(shards, tmp_path):
    """What only computes again is run once, at the other's best rate, and gets no second seed."""
    compare(shards, tmp_path / "out", "--methods", "checkpoint,adamw", "--lrs", "1e-2,1e-5",
            "--seeds", "1,2", "--best", 2, "--jobs", 2)
    assert sorted((row["method"], float(row["lr"]), row["seed"], row["choice"])
                  for row in rows_of(tmp_path / "out")) == [
        ("AdamW, full rank", 1e-5, "1", "not taken"),
        ("AdamW, full rank", 1e-2, "1", "taken, at the edge of the list"),
        ("AdamW, full rank", 1e-2, "2", "taken, at the edge of the list"),
        ("AdamW, gradient checkpointing", 1e-2, "1", "taken")]


def test_tables(done):
    rows = rows_of(done)
    assert [row["status"] for row in rows] == ["ok"] * 6
    assert all(row["choice"] == "taken" for row in rows)
    for row in rows:  # a token is a byte
        bits = float(row["val_loss"]) / math.log(2)
        assert float(row["bits_per_byte"]) == pytest.approx(bits, rel=1e-5)
    text = (done / "results.md").read_text()
    for method in "AdamW, full rank", "CompAct, from its formulas", "this trainer, default, -r 5":
        line, = (line for line in text.splitlines() if line.startswith(f"| {method} | 1 | 0.01 |"))
        assert " ± " in line.split("|")[6], "tokens/s, over rounds"
    assert len(list(done.glob("timed-*.json"))) == 6 * peers.ROUNDS
    assert (done / "loss_memory.png").stat().st_size > 10_000
    assert not list(done.glob("*.tmp")) and not list(done.glob("trainer-*"))


def test_goes_on(shards, done):
    """What is done is not done again; with another option all is."""
    before = {path: path.stat().st_mtime_ns for path in done.glob("*.json")}
    next(iter(done.glob("velora*.json"))).unlink()
    args = ["--methods", "adamw,checkpoint,velora,compact,full,ours5", "--lrs", "1e-2"]
    compare(shards, done, *args)
    after = {path: path.stat().st_mtime_ns for path in done.glob("*.json")}
    assert before.keys() == after.keys()
    assert {path.name[:6] for path in after if after[path] != before[path]} == {"velora"}


def test_rates_seeds_and_failures(shards, tmp_path):
    """The best rate gets the second seed; a package that is broken, and a rate that diverges, are
    rows that say so."""
    (tmp_path / "galore_torch.py").write_text("raise ImportError('is broken')")
    said = compare(shards, tmp_path / "out", "--methods", "adamw,galore,lomo", "--best", 1, "--lrs",
                   "1e-2,1e-5,1e30", "--seeds", "1,2", status=1, PYTHONPATH=str(tmp_path))
    rows = {(row["method"], float(row["lr"]), row["seed"]): row
            for row in rows_of(tmp_path / "out")}
    name = "AdamW, full rank"
    assert rows[name, 1e-2, "1"]["status"] == rows[name, 1e-2, "2"]["status"] == "ok"
    assert rows[name, 1e-2, "1"]["choice"] == rows[name, 1e-2, "2"]["choice"] == "taken"
    assert (name, 1e-5, "2") not in rows and rows[name, 1e-5, "1"]["choice"] == "not taken"
    assert rows[name, 1e30, "1"]["status"] == "diverged"
    for lr in (1e-2, 1e-5, 1e30):
        assert "is broken" in rows["GaLore", lr, "1"]["status"]
    assert "is broken" in said.stderr
    assert "| GaLore |  |  |" in (tmp_path / "out" / "results.md").read_text()

# ----------------------------------------------------------------------------
# methods


def a_model(method, ratio):
    """One linear layer in place of a model's, and what the method makes of it."""
    block = torch.nn.Module()
    for name in peers.COMPRESSED:
        setattr(block, name, torch.nn.Linear(8, 6))
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([block])
    layer = torch.nn.Linear(8, 6)
    layer.load_state_dict(block.qkv.state_dict())
    made = method(model, SimpleNamespace(ratio=ratio, seed=1))
    return block.qkv, layer, made


def both(ours, plain, x, dy):
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(each) for layer, each in zip((ours, plain), inputs)]
    for output in outputs:
        output.backward(dy)
    assert torch.equal(*outputs) and torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-6)
    assert torch.allclose(ours.bias.grad, plain.bias.grad, atol=1e-6)


def test_compact():
    """Output, and gradients of input and bias, are exact; the weight's is dW P; a step is lifted by
    P^T and decays the weight; after 50 steps P is another."""
    torch.manual_seed(1)
    ours, plain, (update, _) = a_model(peers.compact, 0.5)
    x, dy = torch.randn(3, 5, 8), torch.randn(3, 5, 6)
    both(ours, plain, x, dy)
    P = ours.projection()
    assert P.shape == (8, 4) and torch.equal(P, ours.projection())
    assert torch.allclose(ours.small.grad, plain.weight.grad @ P, atol=1e-5)
    ours.small.grad = ours.bias.grad = None
    before = ours.weight.clone()
    update((ours(x) * dy).sum(), 0.1)
    # AdamW's first step is the gradient's sign
    want = before * 0.99 - 0.1 * torch.sign(plain.weight.grad @ P) @ P.T
    assert torch.allclose(ours.weight, want, atol=1e-5) and not ours.small.any()
    for _ in range(49):
        assert torch.equal(ours.projection(), P)
        update((ours(x) * dy).sum(), 0.0)
    assert not torch.equal(ours.projection(), P)


def test_velora():
    """The weight's gradient is that of inputs of which each part is replaced by its component along
    one direction; so it is exact where all lie along it."""
    torch.manual_seed(1)
    ours, plain, _ = a_model(peers.velora, 0.25)
    dy = torch.randn(5, 6)
    x = torch.outer(torch.rand(10), torch.tensor([1.0, -2, 3, 0.5])).reshape(5, 8)
    both(ours, plain, x, dy)
    assert torch.allclose(ours.weight.grad, plain.weight.grad, atol=1e-5)
    ours.weight.grad = plain.weight.grad = ours.bias.grad = plain.bias.grad = None
    x = torch.randn(5, 8)
    both(ours, plain, x, dy)
    d = ours.direction
    along = torch.outer(x.reshape(10, 4) @ d, d).reshape(5, 8)
    assert torch.allclose(ours.weight.grad, dy.T @ along, atol=1e-5)

# ----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize("options, named", [
    (["--train", "none_*.bin"], ["--train", "none_*.bin"]),
    (["--val", "text"], ["--val", "text", "prepare.py"]),
    (["--methods", "adamw,sgd"], ["--methods", "sgd"]),
    (["--lrs", "0"], ["--lrs"]), (["--lrs", "nan"], ["--lrs"]), (["--seeds", "-1"], ["--seeds"]),
    (["--ratio", "2"], ["--ratio", "'2'"]), (["--steps", "0"], ["--steps"]),
    (["--channels", "17"], ["17", "heads"]), (["--context", "x"], ["--context"]),
    (["--context", "2000"], ["--train"]),
    (["--out", "text"], ["text"]), (["--such"], ["--such"]),
])
def test_bad_input(shards, tmp_path, options, named):
    (tmp_path / "text").write_text("Some text\n" * 1000)
    done = subprocess.run(list(map(str, command(shards, "out", "--methods", "adamw", *options))),
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    for word in named:
        assert word in done.stderr, done.stderr
    assert not list(tmp_path.glob("out/*"))


def test_pytorch_is_missing(shards, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    done = compare(shards, tmp_path / "out", status=2, PYTHONPATH=str(tmp_path))
    assert done.stderr.count("\n") == 1 and "pip install torch" in done.stderr
