"""Faults that runs met in the world: a busy machine, folders with a history, signals, odd data, closed descriptors.

They are tried on the trainer that TRAINER names, else on the CPU's; what matters to the host's text alone, on the CUDA trainer
under nogpu as well, where that is built."""

import os
import subprocess
import time

import pytest

import formats
from conftest import TINY, environment

NOGPU = os.path.join(formats.ROOT, "build", "train_nogpu_fp32")


@pytest.fixture(params=["cpu", "nogpu"])
def trainer(request):
    """Each trainer in turn."""
    if request.param == "cpu":
        return formats.trainer_path()
    if not os.path.exists(NOGPU):
        pytest.skip("build/train_nogpu_fp32 is not built here")
    return NOGPU


def start(trainer, *args, **kw):
    return subprocess.Popen([trainer, *map(str, args)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


def first_step(process):
    """Waits for the first line of a step."""
    for line in process.stdout:
        if line.startswith("step "):
            return line
    raise AssertionError(process.stderr.read())


# ---------------------------------------------------------------------------- threads

def plain_environment():
    return {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}


@pytest.mark.parametrize("given", ["", "OMP_WAIT_POLICY=active", "GOMP_SPINCOUNT=100", "KMP_BLOCKTIME=1"])
def test_waiting_threads_sleep(given, trainer, text):
    """Whatever the OpenMP runtime: it reads its variables from the environment that the process began
    with. Who has chosen how threads wait keeps that. The process keeps its name."""
    if not os.path.exists("/proc/self/environ"):
        pytest.skip("no /proc here: a Mac's runtime reads the variable when it is first used")
    env = plain_environment() | dict([given.split("=")] if given else [])
    with start(trainer, *TINY, "--train", text, "-x", 1000000, "-v", 0, env=env) as process:
        first_step(process)
        with open(f"/proc/{process.pid}/environ") as file:
            found = file.read().split("\0")
        with open(f"/proc/{process.pid}/comm") as file:
            name = file.read().strip()
        process.kill()
    chosen = [entry for entry in found if entry.startswith(("OMP_WAIT", "GOMP_SPIN", "KMP_BLOCK"))]
    assert chosen == [given or "OMP_WAIT_POLICY=passive"]
    assert name == os.path.basename(trainer)[:15]


def threads_used(preexec_fn, text, **more):
    """As the configuration says it."""
    done = subprocess.run([formats.trainer_path(), *map(str, TINY), "--train", text, "-x", "0"], text=True, capture_output=True,
                          preexec_fn=preexec_fn, env=plain_environment() | more, check=True)
    return int(done.stdout.split(" threads")[0].split()[-1])


def test_threads_keep_to_affinity(text):
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity here")
    one = sorted(os.sched_getaffinity(0))[:1]
    assert threads_used(lambda: os.sched_setaffinity(0, one), text) == 1
    assert threads_used(None, text, OMP_NUM_THREADS="3") == 3


def test_threads_keep_to_a_quota(text):
    """A control group of one CPU's time, version 1 or 2, where this user may make one."""
    group = next((folder for folder in ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup") if os.access(folder, os.W_OK)
                  and os.path.exists(f"{folder}/cgroup.procs")), None)
    if group is None:
        pytest.skip("no control group can be made here; test_cpu's Threads.Quota reads made-up ones")
    group = f"{group}/train_gpt2_compact_test_{os.getpid()}"
    try:
        os.mkdir(group)
        v1 = os.path.exists(f"{group}/cpu.cfs_quota_us")
        with open(f"{group}/cpu.cfs_quota_us" if v1 else f"{group}/cpu.max", "w") as file:
            file.write("100000" if v1 else "100000 100000")
    except OSError as error:
        pytest.skip(f"no control group with a quota can be made here: {error}")

    def enter():
        with open(f"{group}/cgroup.procs", "w") as file:
            file.write(str(os.getpid()))
    try:
        assert threads_used(enter, text) == 1
        assert threads_used(enter, text, OMP_NUM_THREADS="2") == 2  # who says how many has them
    finally:
        for _ in range(100):  # until the last process is gone from it
            try:
                os.rmdir(group)
                break
            except OSError:
                time.sleep(0.01)


# ---------------------------------------------------------------------------- descriptors

@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors(closed, trainer, text, tmp_path):
    """What is printed goes to no file that the run opens, and the run does its work."""
    out = tmp_path / "out"
    args = [trainer, *map(str, TINY), "--train", str(text), "-x", "3", "-v", "2", "-n", "-1", "-o", str(out)]
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *args], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0
    header, steps, evaluations = formats.read_log(out)
    assert [step["step"] for step in steps] == [1, 2, 3] and [e["step"] for e in evaluations] == [2, 3]
    formats.read_model(out / "model_00000003.bin")
    assert (b"step 3/3" in done.stdout) == (">&-" not in closed.replace("2>&-", ""))
