"""
Checkpoints: going on is as if nothing had been, whatever happens between; and model files that
others can read.
"""

import os
import random
import resource
import shutil
import subprocess
import time

import numpy as np
import pytest

import formats
from conftest import LEVELS, NAME, TINY, VOCAB, check_one_line, environment, make_text

METHODS = [["--rank", 1.0]] + [["--projection", p, "--moments", m]
                               for p in ("gaussian", "rademacher", "sparse")
                               for m in ("keep", "move", "reset")]
METHODS += [["--optimizer", "muon", *flags]
            for flags in (["--rank", 1.0], ["--moments", "keep"],
                          ["--projection", "gaussian", "--moments", "move"])]
FEW_BITS = ["--gelu 2bit -r 2", "--tape int8 -r 4", "--master none",
            "--master none --gelu 2bit --tape int8 --moments move",
            "--optimizer muon --master none --tape int8 --moments reset"]
CONSTANT = ["-k", "constant", "-l", 1e-2]  # a rate that does not depend on --steps


def content(path):
    with open(path, "rb") as f:
        return f.read()


def files(folder, ending=".bin"):
    return sorted(name for name in os.listdir(folder) if name.endswith(ending))


def same_end(run, whole, step):
    assert content(run.model(step)) == content(whole.model(step)), "other weights"
    assert content(run.state(step)) == content(whole.state(step)), "other moments"
    assert [s["step"] for s in run.steps] == list(
        range(1, step + 1)), "a step is missing in the log, or there twice"
    assert run.losses == whole.losses and run.norms == whole.norms

# ----------------------------------------------------------------------------
# train 20 = train 10, stop, resume, 10 more

# the projection's epoch changes at other steps than the run stops, or at the same
@pytest.mark.parametrize("gap", [7, 10])
@pytest.mark.parametrize("method", METHODS + [flags.split() for flags in FEW_BITS],
                         ids=lambda m: "-".join(map(str, m[1::2])))
def test_resume_is_exact(method, gap, train):
    args = [*CONSTANT, *method, "--gap", gap, "-b", 1, "-d", 2 * 32]
    whole = train(*args, "-x", 20, "-n", -1)
    part = train(*args, "-x", 10, "-n", -1)
    assert part.losses == whole.losses[:10]
    part = train(*args, "-x", 20, "-n", -1, "-y", out=part.out)
    assert "resumed after step 10" in part.stdout
    same_end(part, whole, 20)


def test_resume_in_a_schedule(train):
    """
    Stopped in the middle of what --steps says; the log has steps that are done again. Evaluations
    are there once too.
    """
    args = ["-l", 1e-2, "-u", 5, "-x", 20, "-n", 6, "-v", 4, "-s", 5, "-g", 10, "--gap", 3,
            "--keep", 0]
    whole = train(*args)
    part = shutil.copytree(whole.out, whole.out + "b")
    for step in (18, 20):
        os.remove(f"{part}/state_{step:08d}.bin")
    resumed = train(*args, "-y", out=part)
    assert "resumed after step 12" in resumed.stdout
    same_end(resumed, whole, 20)
    assert resumed.evaluations == whole.evaluations and resumed.header == whole.header


def test_resume_with_another_micro_batch_or_level(train):
    """
    What may change between: how a step is cut (the sums' order changes) and what is computed again
    (nothing does).
    """
    args = [*CONSTANT, "--projection", "gaussian", "-d", 8 * 32, "-n", -1, "--eps", 1e-3]
    whole = train(*args, "-b", 4, "-x", 20)
    part = train(*args, "-b", 4, "-x", 10).out
    for level in LEVELS:
        resumed = train(*args, "-b", 4, "-r", level, "-x", 20, "-y",
                        out=shutil.copytree(part, f"{part}r{level}"))
        same_end(resumed, whole, 20)
    for b in (1, 8):
        resumed = train(*args, "-b", b, "-x", 20, "-y", out=shutil.copytree(part, f"{part}b{b}"))
        # losses to some roundings in their sixth decimal: another order of the data would show in
        # the first
        assert np.abs(np.subtract(resumed.losses, whole.losses)).max() < 5e-6


def test_nothing_to_resume_yet(train, tmp_path):
    """-y from the beginning, for a script that is started again until it is through."""
    plain = train("-x", 4, "-n", -1)
    run = train("-x", 4, "-n", -1, "-y", out=tmp_path / "new")
    same_end(run, plain, 4)


def test_resume_when_all_is_done(train):
    """
    Started again when it is through, a run does nothing: no step and no evaluation is in the log
    twice.
    """
    args = ["-x", 6, "-n", 3, "-v", 3, "-s", 3, "-g", 10]
    out = train(*args).out
    before = {name: content(f"{out}/{name}") for name in os.listdir(out)}
    train(*args, "-y", out=out)
    assert {name: content(f"{out}/{name}") for name in os.listdir(out)} == before


def test_resume_when_more_is_done_than_asked_for(train):
    """
    -x below the step that was saved: nothing is trained, and nothing is saved under a step that it
    does not belong to.
    """
    args = [*CONSTANT, "-n", 3, "--keep", 0, "-v", 2]
    part = train(*args, "-x", 9)
    before = {name: content(f"{part.out}/{name}") for name in files(part.out)}
    run = train(*args, "-x", 5, "-y", out=part.out)
    assert {name: content(f"{part.out}/{name}") for name in files(part.out)} == before
    assert "step 5/5" not in run.stdout and "loss" not in run.stdout
    same_end(train(*args, "-x", 12, "-y", out=part.out), train(*args, "-x", 12), 12)


def test_folder_with_odd_name(train, tmp_path):
    """Characters that mean something in a pattern are a name's like any other."""
    args = [*CONSTANT, "-n", 2, "--keep", 1]
    whole = train(*args, "-x", 8)
    out = tmp_path / "run[1] *?"
    train(*args, "-x", 4, out=out)
    run = train(*args, "-x", 8, "-y", out=out)
    same_end(run, whole, 8)
    assert files(out) == files(whole.out) == ["model_00000008.bin", "state_00000008.bin"]

# ----------------------------------------------------------------------------
# states that do not fit

OTHER = {"--rank": 0.5, "--projection": "gaussian", "--gap": 3, "--moments": "reset",
         "--compress": "qkv", "--seed": 3, "--seq": 16, "--total-batch": 128, "--channels": 32,
         "--heads": 4, "--layers": 3, "--context": 48, "--gelu": "2bit", "--tape": "int8",
         "--master": "none", "--optimizer": "muon"}


@pytest.fixture(scope="module")
def saved(text, tmp_path_factory):
    """A folder with checkpoints of steps 3 and 6, and the options that made it."""
    out = tmp_path_factory.mktemp("saved")
    args = [*TINY, "--train", text, "-t", 32, "-d", 64, "--layers", 2, *CONSTANT, "--gap", 4, "-n",
            3]
    done = formats.run_trainer([*args, "-x", 6, "-o", out], env=environment())
    assert done.returncode == 0, done.stderr
    return out, args


@pytest.mark.parametrize("flag", OTHER)
def test_resume_refuses_other_flags(flag, saved, train, tmp_path):
    source, args = saved
    out = shutil.copytree(source, tmp_path / "out")
    before = {name: content(out / name) for name in os.listdir(out)}
    run = train(*args, "-x", 9, flag, OTHER[flag], "-y", out=out, status=2)
    check_one_line(run.stderr, flag + ":", "state_00000006.bin")
    assert {name: content(out / name)
            for name in os.listdir(out)} == before, "a refused run has changed the folder"


@pytest.mark.parametrize("flags",
                         ["--gelu 2bit", "--tape int8", "--master none", "--optimizer muon"])
def test_resume_refuses_to_forget_a_flag(flags, train):
    """A run that kept few bits does not go on without."""
    out = train(*flags.split(), "-x", 2, "-n", -1).out
    check_one_line(train("-x", 4, "-y", out=out, status=2).stderr, flags.split()[0] + ":",
                   "state_00000002.bin")
    train(*flags.split(), "-x", 4, "-y", out=out)


def test_resume_refuses_other_data(saved, train, tmp_path):
    source, args = saved
    out = shutil.copytree(source, tmp_path / "out")
    (tmp_path / "other.txt").write_text(make_text(5000))
    check_one_line(train(*args, "--train", tmp_path / "other.txt", "-x", 9, "-y", out=out,
                         status=2).stderr,
                   "--train:")

# ----------------------------------------------------------------------------
# damage


def damages(size, data):
    """Name -> the damaged file, made from the good one."""
    def flip(at):
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]
    lines = data.index(b"--rank=") + len(b"--rank=0.2")
    return {"empty": b"", "a header's part": data[:100], "half": data[:size // 2],
            "one byte short": data[:-1], "one byte long": data + b"\0", "magic": flip(0),
            "version": flip(4), "step": flip(8), "length of the flags": flip(12),
            "huge length of the flags": data[:12] + b"\xff\xff\xff\x7f" + data[16:],
            "a flag's value": flip(lines), "unused header": flip(1000), "a weight": flip(size // 4),
            "a moment": flip(size - 100), "checksum": flip(size - 1), "zeros": bytes(size),
            "another file": b"x" * 3000}


DAMAGES = list(damages(2000, bytes(1100) + b"--rank=0.25\n" + bytes(888)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_states(damage, saved, train, tmp_path):
    source, args = saved
    out = tmp_path / "out"
    shutil.copytree(source, out)

    def harm(step):
        path = out / f"state_{step:08d}.bin"
        path.write_bytes(damages(os.path.getsize(path), content(path))[damage])

    # the newest: the one before serves, and what follows is as it was
    harm(6)
    run = train(*args, "-x", 6, "-y", out=out)
    assert run.stderr.count("\n") == 1 and "state_00000006.bin" in run.stderr
    assert "resumed after step 3" in run.stdout
    for name in files(source):
        assert content(out / name) == content(source / name), name
    # all: a line each, and none of the files is touched
    harm(3), harm(6)
    before = {name: content(out / name) for name in files(out)}
    run = train(*args, "-x", 6, "-y", out=out, status=2)
    assert ("state_00000003.bin" in run.stderr.splitlines()[-1]
            and run.stderr.splitlines()[-1].startswith(NAME))
    assert run.stderr.count("\n") == 2
    os.remove(out / "state_00000006.bin")
    check_one_line(train(*args, "-x", 6, "-y", out=out, status=2).stderr, "state_00000003.bin")
    assert all(content(out / name) == before[name] for name in files(out))


def test_keep_never_costs_the_newest(saved, train, tmp_path):
    """Two damaged states of later steps must not push out what is saved now."""
    source, args = saved
    out = tmp_path / "out"
    shutil.copytree(source, out)
    for step in (8, 9):
        (out / f"state_{step:08d}.bin").write_bytes(b"damaged")
    run = train(*args, "-n", 1, "-x", 7, "-y", out=out)
    assert run.stderr.count("\n") == 2
    assert "resumed after step 7" in train(*args, "-x", 7, "-y", out=out).stdout


def test_folder_of_an_earlier_run(saved, train, tmp_path):
    """
    A new run, without -y, where an older and longer one lies: refused, or else its own checkpoints
    are what is kept.
    """
    source, args = saved
    out = tmp_path / "out"
    shutil.copytree(source, out)
    done = formats.run_trainer([*args, "-x", 2, "-n", 1, "--seed", 5, "-o", out], env=environment())
    if done.returncode == 2:
        assert files(out) == files(source)
        return check_one_line(done.stderr, "--out")
    whole = train(*args, "-x", 4, "-n", 1, "--seed", 5)
    run = train(*args, "-x", 4, "-n", 1, "--seed", 5, "-y", out=out)
    assert "resumed after step 2" in run.stdout
    same_end(run, whole, 4)

# ----------------------------------------------------------------------------
# killed


def newest(out):
    states = files(out)
    steps = [int(name[6:14]) for name in states if name.startswith("state_")]
    return max(steps, default=0)


@pytest.mark.slow
def test_killed_while_saving(text, tmp_path):
    """
    200 times, and on until 10 were while saving. Each life goes on where the one before ended; in
    the end all is as if it had been one.
    """
    out, rng, kill, while_saving, sizes = tmp_path / "out", random.Random(11), 0, 0, {}
    out.mkdir()
    args = [*TINY, "--train", text, *CONSTANT, "--gap", 7, "--moments", "move", "-n", 1, "-v", 0,
            "-o", out]
    command = [formats.trainer_path(), *map(str, args), "-y", "-x", "1000000"]
    while kill < 200 or while_saving < 10:
        kill += 1
        assert kill <= 2000, f"of 2000 kills {while_saving} while saving: no test of that"
        was, begun = newest(out), time.time()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              env=environment()) as life:
            # Mostly once it has got somewhere, which takes 10 ms or, on a busy machine, 100; else
            # in its first moments.
            while (kill % 5 and newest(out) == was and life.poll() is None
                   and time.time() < begun + 20):
                time.sleep(0.001)
            time.sleep(rng.random() * 0.02)
            life.kill()
            said = life.stderr.read()
        assert life.returncode == -9 and said == b"", said
        while_saving += any(name.startswith(("state", "model")) for name in files(out, ".tmp"))
        for name in files(out):  # under its final name a file is whole
            kind, size = name[:5], os.path.getsize(out / name)
            assert sizes.setdefault(kind,
                                    size) == size, f"{name} has {size} bytes, not {sizes[kind]}"
            if kind == "model":
                formats.read_model(out / name)
        last = newest(out)
        done = formats.run_trainer([*args, "-y", "-x", last + 1], env=environment())
        assert done.returncode == 0 and done.stderr == "" and newest(out) == last + 1, done
        assert last == 0 or f"resumed after step {last}\n" in done.stdout, done
        assert [s["step"] for s in formats.read_log(out)[1]] == list(range(1, last + 2))
    last = newest(out) + 3
    done = formats.run_trainer([*args, "-y", "-x", last], env=environment())
    assert done.returncode == 0, done.stderr
    alone = tmp_path / "alone"
    done = formats.run_trainer([*args, "-x", last, "-n", -1, "-o", alone], env=environment())
    assert done.returncode == 0, done.stderr
    losses = [[s["loss"] for s in formats.read_log(folder)[1]] for folder in (out, alone)]
    assert losses[0] == losses[1]
    for name in files(alone):
        assert content(out / name) == content(alone / name)
    assert files(out, ".tmp") == [], "left over from a kill"

# ----------------------------------------------------------------------------
# no room, no folder


@pytest.mark.parametrize("file", ["model_00000008.bin", "state_00000008.bin"])
def test_disk_full(file, train, tmp_path):
    """A file whose place leads to /dev/full cannot be written: no space left on the device."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    args = [*CONSTANT, "-n", 4]
    whole = train(*args, "-x", 12)
    out = tmp_path / "out"
    train(*args, "-x", 4, out=out)
    before = {name: content(out / name) for name in files(out)}
    os.symlink("/dev/full", out / (file + ".tmp"))
    run = train(*args, "-x", 12, "-y", out=out, status=1)
    check_one_line(run.stderr, file, "No space left")
    assert all(content(out / name) == data for name, data in before.items())
    assert "state_00000008.bin" not in files(out)
    same_end(train(*args, "-x", 12, "-y", out=out), whole, 12)


@pytest.mark.parametrize("place", ["model_", "state_", "the last byte of a state_", "log.jsonl"])
def test_files_may_not_grow(place, train, tmp_path):
    """
    A limit on the size of files is met in the model file, in the state, or in the log. Python
    ignores the signal that comes with it, and so does its child where restore_signals is off.
    """
    args = [*CONSTANT, "-n", 50, "-v", 0]
    once, out = train(*args, "-x", 1), tmp_path / "out"
    model, state = os.path.getsize(once.model(1)), os.path.getsize(once.state(1))
    limit = {"model_": model // 2, "state_": (model + state) // 2,
             "log.jsonl": state + 10_000}.get(place, state - 1)
    run = train(*args, "-x", 5000, out=out, status=1, restore_signals=False,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    check_one_line(run.stderr, place.split()[-1], "cannot be written")
    last = newest(out)
    assert (last > 0) == (place == "log.jsonl")
    resumed = train(*args, "-x", last + 5, "-y", out=out)
    assert [s["step"] for s in resumed.steps] == list(range(1, last + 6))
    assert resumed.losses == train(*args, "-x", last + 5).losses


def test_out_that_cannot_be(train, tmp_path):
    """Not by permissions, which root is above: where a folder should be, there is a file."""
    (tmp_path / "file").write_text("x")
    for more in ([], ["-y"]):
        for out in (tmp_path / "file" / "out", tmp_path / "file"):
            run = train("-x", 1, "-n", 1, *more, out=out, status=2)
            check_one_line(run.stderr, "--out", tmp_path / "file")
            assert run.stdout == ""

# ----------------------------------------------------------------------------
# what is kept; model files


def test_keep(train):
    for keep, steps in ((0, [2, 4, 6, 7]), (1, [7]), (2, [6, 7]), (3, [4, 6, 7]),
                        (9, [2, 4, 6, 7])):
        run = train("-x", 7, "-n", 2, "--keep", keep)
        assert files(run.out) == [f"{kind}_{step:08d}.bin" for kind in ("model", "state")
                                  for step in steps]
        assert files(run.out, ".tmp") == []
    assert files(train("-x", 7, "-n", -1).out) == ["model_00000007.bin", "state_00000007.bin"]
    assert files(train("-x", 7, "-n", 0).out) == []


def test_model_file_is_llm_cs(train, shards):
    run = train("--train", shards / "train_*.bin", "-x", 3, "-n", -1)
    data = content(run.model(3))
    header = np.frombuffer(data, "<i4", 256)
    assert header[:8].tolist() == [20240326, 3, 32, VOCAB, 2, 2, 16, 128] and not header[8:].any()
    config, params = formats.read_model(run.model(3))  # and its size is what the header says
    assert not params["wte"][VOCAB:].any() and all(values.any() for values in params.values())
    assert 0.015 < params["wte"][:VOCAB].std() < 0.025 and abs(params["ln1w"].mean() - 1) < 0.01


def evaluate(train, model, data):
    return train("-e", model, "--train", data, "-b", 2, "-x", 0, "-v",
                 -1).evaluations[0]["val_loss"]


def test_model_file_loads_again(train, text, tmp_path):
    """What is written is what was trained: to the bit in fp32, rounded to nearest in bf16."""
    args = ["-x", 30, "-l", 2e-2, "-n", -1, "-v", -1]
    exact, short = train(*args), train(*args, "--checkpoint-type", "bf16")
    loss = exact.evaluations[-1]["val_loss"]
    assert evaluate(train, exact.model(30), text) == loss == short.evaluations[-1]["val_loss"]
    config, params = formats.read_model(exact.model(30))
    rounded = {name: formats.round_bf16(values) for name, values in params.items()}
    formats.write_model(tmp_path / "rounded.bin", config, rounded)
    header = np.frombuffer(content(short.model(30)), "<i4", 8)
    assert header[1] == 5
    for name, values in formats.read_model(short.model(30))[1].items():
        assert np.array_equal(values, rounded[name]), name
    assert evaluate(train, short.model(30), text) == evaluate(train, tmp_path / "rounded.bin", text)
    # so the bits above are told apart from those of fp32
    assert not np.array_equal(params["fcw"], rounded["fcw"])
    # the state holds all bits whatever the model file's type, so that going on is exact
    whole = train(*args, *CONSTANT)
    part = train(*args, *CONSTANT, "-x", 20, "--checkpoint-type", "bf16").out
    resumed = train(*args, *CONSTANT, "--checkpoint-type", "bf16", "-y", out=part)
    assert content(resumed.state(30)) == content(whole.state(30))


def test_training_on_from_a_model_file(train, text):
    """The weights come from the file, the moments start anew; the shape is the file's."""
    run = train("-x", 40, "-n", -1, "-l", 2e-2, "-v", -1)
    again = train("-e", run.model(40), "-b", 2, "-x", 10, "-v", 0, "--optimizer", "adamw")
    assert (again.losses[0] < run.losses[0] - 1
            and again.header["plan"]["categories"] == run.header["plan"]["categories"])
