"""What the tests of the trainer's behaviour share: small data and short runs."""

import json
import math
import os
import subprocess

import numpy as np
import pytest

import formats

# A model that starts, trains some steps and ends within some hundredths of a second.
SHAPE = ["-e", "d2", "--channels", 16, "--heads", 2, "--context", 32, "-b", 2]
TINY = [*SHAPE, "--optimizer", "adamw"]
VOCAB = 100  # of the shards
NAME = "train_gpt2_compact: "  # what a line on standard error begins with
LEVELS = range(6)  # of --recompute

# ----------------------------------------------------------------------------
# data


def make_text(size, seed=7):
    """
    Words of a small language, so that a model has something to learn. The same on every machine.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    words = ["the", "cat", "dog", "sees", "a", "house", "and", "runs", "to", "water", "old",
             "night", "says", "blue"]
    text = ""
    while len(text) < size:
        text += words[int(rng.random() * len(words))] + (" " if rng.random() < 0.85 else ".\n")
    return text[:size]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A plain text of 6,000 bytes."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(make_text(6000))
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder with three shards for training, of different sizes, and val.bin."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.Generator(np.random.PCG64(8))
    for name, size in (("train_0", 704), ("train_1", 333), ("train_2", 1025), ("val", 500)):
        formats.write_tokens(folder / (name + ".bin"), (rng.random(size) * VOCAB).astype(int),
                             VOCAB)
    return folder

# ----------------------------------------------------------------------------
# runs


class Run:
    """What a run of the trainer said and left behind."""

    def __init__(self, done, out):
        self.status, self.stdout, self.stderr, self.out = (done.returncode, done.stdout,
                                                           done.stderr, out)

    @property
    def header(self):
        return formats.read_log(self.out)[0]

    @property
    def steps(self):
        return formats.read_log(self.out)[1]

    @property
    def evaluations(self):
        return formats.read_log(self.out)[2]

    @property
    def losses(self):
        return [step["loss"] for step in self.steps]

    @property
    def norms(self):
        return [step["norm"] for step in self.steps]

    @property
    def dump(self):
        return formats.read_dump(os.path.join(self.out, "dump"))

    def model(self, step):
        return os.path.join(self.out, f"model_{step:08d}.bin")

    def state(self, step):
        return os.path.join(self.out, f"state_{step:08d}.bin")

    def params(self, step):
        return formats.read_model(self.model(step))[1]

    def bits(self, step):
        """The model file, byte for byte."""
        with open(self.model(step), "rb") as f:
            return f.read()


def environment(threads=1):
    """One thread by default: a tiny model would spend its time waking up the others."""
    return dict(os.environ, OMP_NUM_THREADS=str(threads))


@pytest.fixture
def train(text, tmp_path):
    """
    train(*options) runs the trainer on the tiny model and text, except where the options say
    otherwise, each time in a new folder, and wants it to end with the status given. dump=True reads
    --dump into .dump.
    """
    count = 0

    def run(*args, out=None, status=0, threads=1, dump=False, **kw):
        nonlocal count
        count += 1
        out = str(out or tmp_path / f"run{count}")
        args = [*([] if "-e" in args else TINY), *([] if "--train" in args else ["--train", text]),
                "-n", 0, *args, "-o", out]
        if dump:
            args += ["--dump", os.path.join(out, "dump")]
        kw.setdefault("env", environment(threads))
        done = Run(formats.run_trainer(args, **kw), out)
        assert done.status == status, f"{' '.join(map(str, args))}\n{done.stdout}\n{done.stderr}"
        return done
    return run


def check_refused(done, *names, status=2):
    """One line on standard error that names what is wrong, and nothing else anywhere."""
    said = f"{done.args}\nstatus {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == status, said
    assert done.stdout == "", said
    check_one_line(done.stderr, *names, said=said)


def check_one_line(stderr, *names, said=""):
    said = said or stderr
    assert stderr.startswith(NAME) and stderr.endswith("\n") and stderr.count("\n") == 1, said
    for name in names:
        assert str(name) in stderr, f"'{name}' is not named:\n{said}"

# ----------------------------------------------------------------------------
# projections


def philox(seed, stream, index):
    """Philox4x32-10's block for each index: (len(index), 4) words. Salmon et al., SC'11."""
    low = np.uint64(0xFFFFFFFF)
    index, thirty_two = np.asarray(index, np.uint64), np.uint64(32)
    c = [index & low, index >> thirty_two, np.full_like(index, stream & 0xFFFFFFFF),
         np.full_like(index, stream >> 32)]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(q >> thirty_two) ^ c[1] ^ np.uint64(k[0]), q & low,
             (p >> thirty_two) ^ c[3] ^ np.uint64(k[1]), p & low]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, 1)


def draw(kind, n, r, seed, linear, layer, epoch):
    """
    P (n, r) in double precision, from the description of the random stream. A run's dump shows P of
    epoch 0 alone.
    """
    stream = epoch << 32 | layer << 8 | ["qkv", "attproj", "fc", "fcproj"].index(linear)

    def signs(count):
        words = philox(seed, stream, np.arange((count + 127) // 128))
        bits = words[:, :, None] >> np.arange(32, dtype=np.uint64) & np.uint64(1)
        return 1.0 - 2.0 * bits.reshape(-1)[:count].astype(float)

    if kind == "rademacher":
        return signs(n * r).reshape(n, r) / math.sqrt(r)
    if kind == "gaussian":  # Box-Muller as in cuRAND: u in (0, 1], an angle in (0, 2 pi]
        u = (philox(seed, stream, np.arange((n * r + 3) // 4)).astype(float) + 0.5) / 2.0**32
        length, angle = np.sqrt(-2 * np.log(u[:, [0, 2]])), 2 * math.pi * u[:, [1, 3]]
        return np.stack([length * np.sin(angle), length * np.cos(angle)],
                        2).reshape(-1)[:n * r].reshape(n, r) / math.sqrt(r)
    stripes = np.arange((n + r - 1) // r)
    shift = philox(seed, stream, (1 << 32) + stripes)[:, 0].astype(int) % r
    P = np.zeros((n, r))
    P[np.arange(n), (np.arange(n) + shift[np.arange(n) // r]) % r] = signs(n)
    return P

# ----------------------------------------------------------------------------
# plans

BITS = {"fp32": 32, "bf16": 16, "int32": 32, "int8": 8, "2bit": 2, "byte": 8}


def plan(*args, trainer=None, **kw):
    """What --plan=json says, of the CPU trainer or of another."""
    command = [trainer or formats.trainer_path(), *map(str, args), "--plan=json"]
    # as for the runs: a plan has attention's tiles for each thread
    kw.setdefault("env", environment())
    done = subprocess.run(command, capture_output=True, text=True, **kw)
    assert done.returncode == 0 and done.stderr == "", done
    return json.loads(done.stdout)  # which fails where there is anything else


def tensors(p):
    """By name; without the gaps between them, of which there are many."""
    return {t["name"]: t for t in p["tensors"] if t["type"] != "byte"}


def count(t):
    n = 1
    for d in t["shape"]:
        n *= d  # Python's own numbers: they do not overflow
    return n


def check_sums(p):
    assert len(tensors(p)) == sum(t["type"] != "byte" for t in p["tensors"]), "a name occurs twice"
    for t in p["tensors"]:
        assert set(t) == {"name", "category", "shape", "type", "bytes"}
        assert t["bytes"] == (count(t) * BITS[t["type"]] + 7) // 8 > 0, t
    for category, size in p["categories"].items():
        assert size == sum(t["bytes"] for t in p["tensors"] if t["category"] == category)
    assert p["host_bytes"] == p["categories"].get("host", 0)
    assert (sum(p["categories"].values()) == sum(t["bytes"] for t in p["tensors"])
            == p["total_bytes"] + p["host_bytes"])
    f = p["flops_per_token"]
    assert set(f) == {"forward", "backward", "recompute", "projection", "update", "total"}
    assert abs(sum(f.values()) - 2 * f["total"]) <= 5  # each is rounded to a whole number


def check_fit(size, *args, wish, rows=0, first=0, last=5, trainer=None):
    """
    What --memory makes of `size` bytes, of -b `wish` and -r `first`: the least level at which that
    batch fits, and there the greatest that does; where it fits at none, the greatest that fits at
    any. With `rows` sequences in a step, a batch divides them.
    """
    def of(batch, level, *more):
        return plan(*args, "-b", batch, "-r", level, *["-d", rows * seq] * bool(rows), *more,
                    trainer=trainer)

    def fits(batch, level):
        return of(batch, level)["total_bytes"] <= size
    seq = plan(*args, trainer=trainer)["options"]["seq"]
    chosen = of(wish, first, "--memory", size)
    level, batch = chosen["options"]["recompute"], chosen["options"]["batch"]
    said = f"{size} bytes, {args}: -b {wish} of {rows}, -r {first} became -b {batch}, -r {level}"
    assert (first <= level <= last
            and chosen["total_bytes"] == of(batch, level)["total_bytes"] <= size), said
    greater = [b for b in range(batch + 1, rows + 1) if rows % b == 0] if rows else [batch + 1]
    wish = max(b for b in range(1, min(wish, rows) + 1) if rows % b == 0) if rows else wish
    assert not greater or not fits(greater[0], level), said + ", more would fit"
    if batch >= wish:
        assert not any(fits(wish, lower)
                       for lower in range(first, level)), said + ", it would fit at a lower level"
    else:
        assert not any(fits(greater[0], other) for other in range(first, last + 1)), (
            said + ", more would fit at another level")
        assert not any(fits(batch, lower) for lower in range(first, level)), (
            said + ", as many would fit at a lower level")
    return level, batch
