"""Several processes that share each step (make MPI=1, mpirun): they train as one process does, stay
alike to the bit, go on from one another's checkpoints, and end together.

The processes are real ones, on this machine. The CUDA trainer runs under dev/nogpu, its calls to
NCCL by a stand-in. They sum their gradients in another order than one
process does: losses are held to TOLERANCE, a few units of their sixth and last decimal.
"""

import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

import formats
from conftest import NAME, TINY
from test_hellaswag import write_examples

TRAINER = os.path.join(formats.ROOT, "build", "train_mpi")
CUDA_TRAINER = os.path.join(formats.ROOT, "build", "train_nogpu_mpi")
TOLERANCE = 5e-6
STEPS, TOKENS = 20, 8 * 32  # of a step: 8 sequences
METHODS = {
    "full": ["--rank", 1],
    "adamw": ["--rank", 0.25, "--projection", "gaussian"],
    "muon": ["--rank", 0.5, "--optimizer", "muon", "--gap", 7],
    "master": ["--rank", 0.5, "--optimizer", "muon", "--master", "none", "--moments", "move",
               "--gap", 7],
}

pytestmark = pytest.mark.skipif(
    shutil.which("mpirun") is None or not os.path.exists(TRAINER),
    reason="no MPI: apt-get install openmpi-bin libopenmpi-dev, make build/train_mpi")


def command(trainer, count, *parts):
    """What starts `count` processes, or so many for each of several parts."""
    words = ["mpirun", "--oversubscribe", "--bind-to", "none"]
    for i, part in enumerate(parts):
        words += [":"] * (i > 0) + ["-np", str(count), trainer, *map(str, part)]
    return words


def environment():
    return dict(os.environ, OMP_NUM_THREADS="1", NOGPU_DEVICES="4",
                OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")  # in a container


def options(data, *more):
    """TOKENS tokens of a step are shared in micro batches of 2."""
    return [*TINY, "--train", data, "-d", TOKENS, "-x", STEPS, "-n", 0, "--lr", 3e-3, *more]


def together(count, *parts, status=0, trainer=TRAINER):
    done = subprocess.run(command(trainer, count, *parts), capture_output=True, text=True,
                          timeout=120, env=environment(), stdin=subprocess.DEVNULL)
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done


def said(stderr):
    """The trainer's own lines; mpirun adds its own."""
    return [line for line in stderr.splitlines() if line.startswith(NAME)]


def logged(out):
    return formats.read_log(str(out))


def losses(out):
    return np.array([step["loss"] for step in logged(out)[1]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 4])
def test_many_equal_one(text, tmp_path, count, method):
    more = [*METHODS[method], "-v", 10, "-m", -1]
    together(1, options(text, *more, "-o", tmp_path / "one"))
    together(count, options(text, *more, "-o", tmp_path / "many"))
    (one, steps, checks), (many, _, others) = logged(tmp_path / "one"), logged(tmp_path / "many")
    assert len(steps) == STEPS and len(checks) == 2
    # with rounded weights, the last bit of a gradient decides now and then which way one is rounded
    tolerance = 2e-4 if method == "master" else TOLERANCE
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "many"), atol=tolerance)
    for a, b in zip(checks, others):
        assert abs(a["val_loss"] - b["val_loss"]) <= tolerance
    assert "processes" not in one and many["processes"] == count


@pytest.mark.skipif(not os.path.exists(CUDA_TRAINER),
                    reason="no build/train_nogpu_mpi: it needs CUDA's headers and Boost")
@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_the_cuda_trainer(text, tmp_path, method):
    """Layers' gradients on their way while the layers below compute, two micro batches a process.
    The loop around it is the text of both trainers."""
    more = [*METHODS[method], "-d", 8 * 16, "-t", 16, "-x", 8, "-v", 4, "-m", 2]
    together(1, options(text, *more, "-o", tmp_path / "one"), trainer=CUDA_TRAINER)
    together(2, options(text, *more, "-o", tmp_path / "two"), trainer=CUDA_TRAINER)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=TOLERANCE)
    assert len(losses(tmp_path / "two")) == 8


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (4, 2)])
def test_resumes_with_other_numbers(text, tmp_path, before, after):
    more = [*METHODS["muon"], "-n", 9, "--keep", 0]
    together(1, options(text, *more, "-o", tmp_path / "whole"))
    out = tmp_path / "run"
    together(before, options(text, *more, "-o", out))
    for kind in ("model", "state"):
        for step in (STEPS, 18):
            os.unlink(out / f"{kind}_{step:08d}.bin")
    done = together(after, options(text, *more, "-o", out, "-y"))
    assert "resumed after step 9\n" in done.stdout
    np.testing.assert_allclose(losses(out), losses(tmp_path / "whole"), atol=TOLERANCE)


def test_hellaswag_is_shared(text, tmp_path):
    """An odd number of examples: the shares differ."""
    rng = np.random.default_rng(5)
    examples = [([int(rng.integers(256))], [rng.integers(0, 256, 5).tolist() for _ in range(4)])
                for _ in range(13)]
    write_examples(tmp_path / "examples.bin", examples, rng.integers(0, 4, 13).tolist())
    scores = []
    for count in (1, 3):
        out = tmp_path / str(count)
        together(count, options(text, "-d", 12 * 32, "-x", 2, "-v", -1, "--hellaswag",
                                tmp_path / "examples.bin", "-o", out))
        scores.append([check["hellaswag"] for check in logged(out)[2]])
    assert scores[0] == scores[1] and len(scores[0]) == 1


def test_one_prints_and_writes(text, tmp_path):
    done = together(2, options(text, "-x", 3, "-s", -1, "-g", 4, "-n", -1, "-o", tmp_path))
    assert done.stdout.count("step 1/3") == done.stdout.count("--- sample ---") == 1
    assert "2 accumulated in each of 2 processes" in done.stdout
    assert "exchanged by each of 2 processes, a step" in done.stdout
    names = ["lock", "log.jsonl", "model_00000003.bin", "state_00000003.bin"]
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("more, names", [
    (["-b", 3], ["--total-batch", "of 2 processes", "192"]),
    (["--rank", "3x"], ["--rank", "3x"]),
    (["--train", "/nowhere"], ["--train", "/nowhere"]),
])
def test_bad_input_is_said_once(text, more, names):
    done = together(2, options(text, *more), status=2)
    line, = said(done.stderr)
    assert line.startswith(NAME + "process 0: ") and all(name in line for name in names), line


def test_a_folder_in_use(text, tmp_path):
    together(2, options(text, "-x", 2, "-o", tmp_path))
    line, = said(together(2, options(text, "-x", 2, "-o", tmp_path), status=2).stderr)
    assert "--out" in line and "earlier run" in line


def test_one_that_fails_ends_all(text, tmp_path):
    """The second process alone cannot read its data."""
    began = time.monotonic()
    done = together(1, options(text), options(tmp_path / "missing"), status=2)
    line, = said(done.stderr)
    assert line.startswith(NAME + "process 1: ") and "missing" in line
    assert time.monotonic() - began < 30


def test_folders_that_differ(text, tmp_path):
    """As on machines that share no disk: one process finds a checkpoint, the other none."""
    more = ["-n", 5, "-x", 10]
    together(1, options(text, *more, "-o", tmp_path / "a"))
    os.mkdir(tmp_path / "b")
    parts = [options(text, *more, "-x", STEPS, "-y", "-o", tmp_path / name) for name in ("a", "b")]
    lines = said(together(1, *parts, status=1).stderr)
    assert len(lines) == 1 and "same folder for all processes" in lines[0]


def test_weights_that_come_apart(text, tmp_path):
    """The second process begins with other weights than the first: the next validation tells."""
    for seed in (1, 2):
        more = ["-x", 1, "-n", -1, "--seed", seed]
        together(1, options(text, *more, "-o", tmp_path / str(seed)))
    models = [tmp_path / str(seed) / "model_00000001.bin" for seed in (1, 2)]
    parts = [["-e", model, *options(text, "-v", 4)[2:]] for model in models]
    for part in parts:  # the file says what the model's shape is
        del part[part.index("--channels"):part.index("--channels") + 6]
    done = together(1, *parts, status=1)
    line, = said(done.stderr)
    assert "step 4: the processes' weights have come apart" in line
    together(1, parts[0], parts[0])


def running(out):
    """The process numbers of a run that writes to `out`, of the trainer alone."""
    command = ["pgrep", "-f", f"^{TRAINER} .*{out}"]
    return sorted(map(int, subprocess.run(command, capture_output=True, text=True).stdout.split()))


def begin(text, out):
    """A run without end, and the numbers of its processes, once it has trained some steps."""
    whole = options(text, "-x", 10**6, "-n", 50, "-o", out)
    run = subprocess.Popen(command(TRAINER, 2, whole), stdin=subprocess.DEVNULL, text=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
    deadline = time.monotonic() + 60
    log = out / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 6:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return run, running(out)


@pytest.mark.parametrize("turn", range(2))
def test_one_killed_ends_all(text, tmp_path, turn):
    """At a random moment. What has been saved by then is whole: one process goes on from it."""
    rng = np.random.default_rng(turn)
    run, processes = begin(text, tmp_path)
    assert len(processes) == 2
    time.sleep(rng.uniform(0, 1))
    os.kill(processes[turn % 2], signal.SIGKILL)
    _, stderr = run.communicate(timeout=20)
    assert run.returncode != 0 and "rank" in stderr and "killed" in stderr.lower(), stderr
    deadline = time.monotonic() + 10
    while running(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(tmp_path)
    last = logged(tmp_path)[1][-1]["step"]
    done = together(1, options(text, "-x", last + 3, "-n", 50, "-o", tmp_path, "-y"))
    assert f"step {last + 3}/{last + 3}" in done.stdout


def test_a_request_to_end_saves(text, tmp_path):
    """To the processes themselves: mpirun, asked to end, reads no more of what they print, and
    kills them after a second. All end after the same step, and the checkpoint is whole."""
    run, processes = begin(text, tmp_path)
    for process in processes:
        os.kill(process, signal.SIGTERM)
    _, stderr = run.communicate(timeout=60)
    line, = said(stderr)
    assert "ended by SIGTERM after step" in line and "-y goes on" in line
    step = int(line.split("after step ")[1].split(";")[0])
    assert os.path.exists(tmp_path / f"state_{step:08d}.bin")
    assert not running(tmp_path)


def test_memory_is_chosen_for_the_share(text):
    """--memory takes a batch that divides a process's sequences, not all of them."""
    done = together(4, options(text, "--memory", "1GB", "--plan"))
    assert "-b 2\n" in done.stdout
