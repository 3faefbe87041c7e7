"""What the tests of the trainer's behaviour share: small data, short runs, and the report's last line."""

import os

import numpy as np
import pytest

import formats

# A model that starts, trains some steps and ends within some hundredths of a second.
TINY = ["-e", "d2", "--channels", 16, "--heads", 2, "--context", 32, "-b", 2]
VOCAB = 100  # of the shards
NAME = "train_gpt2_compact: "  # what a line on standard error begins with


# ---------------------------------------------------------------------------- data

def make_text(size, seed=7):
    """Words of a small language, so that a model has something to learn. The same on every machine."""
    rng = np.random.Generator(np.random.PCG64(seed))
    words = ["the", "cat", "dog", "sees", "a", "house", "and", "runs", "to", "water", "old", "night", "says", "blue"]
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
        formats.write_tokens(folder / (name + ".bin"), (rng.random(size) * VOCAB).astype(int), VOCAB)
    return folder


# ---------------------------------------------------------------------------- runs

class Run:
    """What a run of the trainer said and left behind."""

    def __init__(self, done, out):
        self.status, self.stdout, self.stderr, self.out = done.returncode, done.stdout, done.stderr, out

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
    """train(*options) runs the trainer on the tiny model and text, except where the options say otherwise, each time in
    a new folder, and wants it to end with the status given. dump=True reads --dump into .dump."""
    count = 0

    def run(*args, out=None, status=0, threads=1, dump=False, **kw):
        nonlocal count
        count += 1
        out = str(out or tmp_path / f"run{count}")
        args = ([] if "-e" in args else TINY) + ([] if "--train" in args else ["--train", text]) + list(args) + ["-o", out]
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


@pytest.fixture(scope="session")
def levels():
    """The levels of --recompute that this trainer offers."""
    offered = [r for r in range(6) if formats.run_trainer(["--plan=json", "-r", r]).returncode == 0]
    assert offered[:3] == [0, 1, 2] and offered == list(range(len(offered)))
    return offered


# ---------------------------------------------------------------------------- the report's last line: N passed, N failed

outcomes, skips = {}, []


def note(report, outcome):
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(getattr(report, "wasxfail", ""))
        skips.append(f"skipped {report.nodeid}: {reason.removeprefix('Skipped: ')}")
        outcome = "skipped"
    elif report.failed:
        outcome = "failed"
    if outcomes.get(report.nodeid) != "failed":  # a test may pass and its cleaning up fail
        outcomes[report.nodeid] = outcome


def pytest_runtest_logreport(report):
    if report.when == "call" or not report.passed:
        note(report, "passed")


def pytest_collectreport(report):
    if not report.passed:
        note(report, "failed")


def pytest_unconfigure(config):
    counts = {kind: list(outcomes.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    line = f"{counts['passed']} passed, {counts['failed']} failed"
    if counts["skipped"]:
        line += f", {counts['skipped']} skipped"
    out = config.get_terminal_writer()
    for skip in skips:
        out.line(skip)
    out.line(line)
    out.flush()
