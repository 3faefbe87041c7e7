"""Several processes that share each step (make MPI=1, mpirun): they train as one process does, stay
alike to the bit, go on from one another's checkpoints, and end together.

The processes are real ones, on this machine. The CUDA trainer runs under dev/nogpu, its calls to
NCCL by a stand-in. They sum their gradients in another order than one
process does: losses are held to TOLERANCE, a few units of their sixth and last decimal.

What depends on whose MPI it is, is tried with MPICH as well, where Debian's stands beside the one
that mpirun and mpicxx are of.
"""

import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time

import numpy as np
import pytest

import formats
from conftest import NAME, TINY
from test_hellaswag import write_examples

TRAINER = os.path.join(formats.ROOT, "build", "train_mpi")
CUDA_TRAINER = os.path.join(formats.ROOT, "build", "train_nogpu_mpi")
MPICH_TRAINER = os.path.join(formats.ROOT, "build", "train_mpich")
TOLERANCE = 5e-6
STEPS, TOKENS = 20, 8 * 32  # of a step: 8 sequences
# for the CUDA trainer, which is slow here: 4 sequences a step
SMALLEST = ["--channels", 8, "--heads", 1, "--context", 8, "-b", 1, "-d", 4 * 8]
METHODS = {
    "full": ["--rank", 1],
    "adamw": ["--rank", 0.25, "--gap", 7],
    "gaussian": ["--rank", 0.25, "--projection", "gaussian"],
    "muon_full": ["--rank", 1, "--optimizer", "muon"],
    "muon": ["--rank", 0.5, "--optimizer", "muon", "--gap", 7],
    "master": ["--rank", 0.5, "--optimizer", "muon", "--master", "none", "--moments", "move",
               "--gap", 7],
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    shutil.which("mpirun") is None or not os.path.exists(TRAINER),
    reason="no MPI: apt-get install openmpi-bin libopenmpi-dev, make build/train_mpi")]
CUDA = pytest.param(CUDA_TRAINER, id="cuda", marks=pytest.mark.skipif(
    not os.path.exists(CUDA_TRAINER),
    reason="no build/train_nogpu_mpi: it needs CUDA's headers and Boost"))
MPICH = pytest.param(MPICH_TRAINER, id="mpich", marks=pytest.mark.skipif(
    shutil.which("mpirun.mpich") is None or not os.path.exists(MPICH_TRAINER),
    reason="no build/train_mpich: apt-get install mpich libmpich-dev"))
CPU = pytest.param(TRAINER, id="cpu")


@functools.cache
def mpirun(trainer):
    """Open MPI's is told that processes may share a processor; MPICH's has no such option."""
    name = "mpirun.mpich" if trainer == MPICH_TRAINER else "mpirun"
    said = subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout
    return [name, *["--oversubscribe", "--bind-to", "none"] * ("Open MPI" in said)]


def command(trainer, count, *parts, before=()):
    """
    What starts `count` processes, or so many for each of several parts; and in each part the words
    before the trainer's name.
    """
    words = [*mpirun(trainer)]
    for i, part in enumerate(parts):
        words += [":"] * (i > 0) + ["-np", str(count), *(before[i] if before else []), trainer,
                                    *map(str, part)]
    return words


def environment():
    return dict(os.environ, OMP_NUM_THREADS="1", NOGPU_DEVICES="4",
                OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")  # in a container


def options(data, *more):
    """TOKENS tokens of a step are shared in micro batches of 2."""
    return [*TINY, "--train", data, "-d", TOKENS, "-x", STEPS, "-n", 0, "--lr", 3e-3, *more]


def together(count, *parts, status=0, trainer=TRAINER, before=()):
    done = subprocess.run(command(trainer, count, *parts, before=before), capture_output=True,
                          text=True, timeout=120, env=environment(), stdin=subprocess.DEVNULL)
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


@pytest.mark.parametrize("trainer", [MPICH])
def test_another_mpi(text, tmp_path, trainer):
    more = [*METHODS["muon"], "-v", 10, "-m", -1]
    for count in (1, 2):
        together(count, options(text, *more, "-o", tmp_path / str(count)), trainer=trainer)
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), atol=TOLERANCE)
    assert logged(tmp_path / "2")[0]["processes"] == 2
    # started by the mpirun of the other one
    done = subprocess.run([*mpirun(TRAINER), "-np", "2", trainer, *map(str, options(text))],
                          capture_output=True, text=True, timeout=60, env=environment())
    line, = said(done.stderr)
    assert done.returncode != 0 and "2 processes that do not find one another" in line


@pytest.mark.parametrize("trainer", [CUDA])
@pytest.mark.parametrize("method", ["full", "adamw", "gaussian", "muon_full", "muon"])
def test_the_cuda_trainer(text, tmp_path, method, trainer):
    """Layers' gradients on their way while the layers below compute, two micro batches a process.
    Then each goes on in the middle, with the other's number of processes."""
    more = [*METHODS[method], *SMALLEST, "-v", 10, "-m", 2, "-n", 10, "--keep", 0]
    found = {}
    for count in (1, 2):
        out = tmp_path / str(count)
        together(count, options(text, *more, "-o", out), trainer=trainer)
        found[count] = losses(out)
        for kind in ("model", "state"):
            os.unlink(out / f"{kind}_{STEPS:08d}.bin")
        done = together(3 - count, options(text, *more, "-o", out, "-y"), trainer=trainer)
        assert "resumed after step 10\n" in done.stdout
        found[f"{count}, then {3 - count}"] = losses(out)
    for name, values in found.items():
        assert len(values) == STEPS, name
        np.testing.assert_allclose(values, found[1], atol=TOLERANCE, err_msg=name)


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
@pytest.mark.parametrize("trainer", [CPU, MPICH])
def test_bad_input_is_said_once(text, more, names, trainer):
    done = together(2, options(text, *more), status=2, trainer=trainer)
    line, = said(done.stderr)
    assert line.startswith(NAME + "process 0: ") and all(name in line for name in names), line


def test_a_folder_in_use(text, tmp_path):
    together(2, options(text, "-x", 2, "-o", tmp_path))
    line, = said(together(2, options(text, "-x", 2, "-o", tmp_path), status=2).stderr)
    assert "--out" in line and "earlier run" in line


@pytest.mark.parametrize("trainer", [CPU, MPICH, CUDA])
def test_one_that_fails_ends_all(text, tmp_path, trainer):
    """The second process alone cannot read its data."""
    began = time.monotonic()
    done = together(1, options(text), options(tmp_path / "missing"), status=2, trainer=trainer)
    line, = said(done.stderr)
    assert line.startswith(NAME + "process 1: ") and "missing" in line
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("trainer, first", [
    (*CPU.values, ["sh", "-c", 'ulimit -v "$0" && exec "$@"', str(3 << 19)]),
    pytest.param(*CUDA.values, ["env", "NOGPU_MEMORY_MB=1"], marks=CUDA.marks),
], ids=["cpu", "cuda"])
@pytest.mark.parametrize("who", range(2))
def test_one_without_memory_ends_all(text, trainer, first, who):
    """The batch takes 2 GB, one process may have 1.5 GiB; or it has a GPU of 1 MB."""
    batch = 32768 if trainer == TRAINER else 2
    before = [[], []]
    before[who] = first
    part = options(text, "-b", batch, "-d", 2 * batch * 32)
    began = time.monotonic()
    line, = said(together(1, part, part, status=1, trainer=trainer, before=before).stderr)
    assert line.startswith(f"{NAME}process {who}: ") and "memory" in line
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


def running(trainer, out):
    """The process numbers of a run that writes to `out`, of the trainer alone."""
    command = ["pgrep", "-f", f"^{trainer} .*{out}"]
    return sorted(map(int, subprocess.run(command, capture_output=True, text=True).stdout.split()))


@pytest.fixture
def begin():
    """
    begin(trainer, out, *words) starts a run that writes to `out`: the run, its standard output, and
    its processes' numbers, once it has trained some steps. A test that fails leaves none behind.
    """
    runs = []

    def start(trainer, out, *words, **kw):
        stdout = tempfile.TemporaryFile("w+")
        run = subprocess.Popen(command(trainer, *words, **kw), stdin=subprocess.DEVNULL, text=True,
                               stdout=stdout, stderr=subprocess.PIPE, env=environment())
        runs.append(run)
        deadline = time.monotonic() + 60
        log = out / "log.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < 6:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        return run, stdout, running(trainer, out)
    yield start
    for run in runs:
        if run.poll() is None:
            run.terminate()
            run.communicate(timeout=30)


@pytest.mark.parametrize("trainer", [CPU, CUDA, MPICH])
@pytest.mark.parametrize("turn", range(2))
def test_one_killed_ends_all(text, tmp_path, turn, trainer, begin):
    """At a random moment. What has been saved by then is whole: one process goes on from it."""
    more = [*SMALLEST, "-n", 3] if trainer == CUDA_TRAINER else ["-n", 50]
    rng = np.random.default_rng(turn)
    endless = options(text, *more, "-x", 10**6, "-o", tmp_path)
    run, stdout, processes = begin(trainer, tmp_path, 2, endless)
    assert len(processes) == 2
    time.sleep(rng.uniform(0, 1))
    os.kill(processes[turn], signal.SIGKILL)
    _, stderr = run.communicate(timeout=20)
    stdout.seek(0)
    lines = [line.lower() for line in [*stderr.splitlines(), *stdout] if "step" not in line]
    named = (f"pid {processes[turn]} " if trainer == MPICH_TRAINER else f"process rank {turn} ")
    assert run.returncode != 0 and any(named in line for line in lines), lines
    assert any("killed" in line for line in lines), lines
    deadline = time.monotonic() + 10
    while running(trainer, tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(trainer, tmp_path)
    last = logged(tmp_path)[1][-1]["step"]
    done = together(1, options(text, *more, "-x", last + 3, "-o", tmp_path, "-y"), trainer=trainer)
    assert f"step {last + 3}/{last + 3}" in done.stdout


SLOW_DISK = """
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <string>

extern "C" int fsync(int file) {
    char name[4096] = {};
    std::string link = "/proc/self/fd/" + std::to_string(file);
    if (readlink(link.c_str(), name, sizeof(name) - 1) < 0) abort();
    if (strstr(name, "/model_")) sleep(4);
    return 0;
}
"""


@pytest.fixture(scope="session")
def slow_disk(tmp_path_factory):
    """The words before a program whose models, each synced twice, take 8 seconds to the disk."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "slow.cpp").write_text(SLOW_DISK)
    subprocess.run([os.environ.get("CXX", "c++"), "-shared", "-fPIC", "slow.cpp", "-o", "slow.so"],
                   cwd=folder, check=True)
    return ["env", f"LD_PRELOAD={folder / 'slow.so'}"]


@pytest.mark.parametrize("trainer", [CPU, MPICH])
def test_a_request_to_end_saves(text, tmp_path, trainer, slow_disk, begin):
    """To the processes themselves: Open MPI's mpirun, asked to end, reads no more of what they
    print, and kills them after a second. All end after the same step, once the first one has saved,
    whose disk is slow."""
    endless = options(text, "-x", 10**6, "-n", -1, "-o", tmp_path)
    run, _, processes = begin(trainer, tmp_path, 1, endless, endless, before=[slow_disk, []])
    assert len(processes) == 2
    for process in processes:
        os.kill(process, signal.SIGTERM)
    _, stderr = run.communicate(timeout=60)
    line, = said(stderr)
    assert line.startswith(NAME + "process 0: ended by SIGTERM after step "), line
    assert "-y goes on" in line
    step = int(line.split("after step ")[1].split(";")[0])
    assert os.path.exists(tmp_path / f"state_{step:08d}.bin")
    assert not running(trainer, tmp_path)


def test_memory_is_chosen_for_the_share(text):
    """--memory takes a batch that divides a process's sequences, not all of them."""
    done = together(4, options(text, "--memory", "1GB", "--plan"))
    assert "-b 2\n" in done.stdout
