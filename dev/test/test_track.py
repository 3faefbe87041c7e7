"""dev/track.py: what a log holds, by TensorBoard's own reader, and as wandb and trackio get it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import formats

TOOL = os.path.join(formats.ROOT, "dev", "track.py")
STEPS = 5

# Packages that note what they are told, in place of those that take a server or a large download.
STUB = """
import json, os
class Run:
    def note(self, what, **kw):
        with open(os.environ["NOTES"], "a") as file:
            file.write(json.dumps([what, kw]) + "\\n")
    def log(self, values, step): self.note("log", values=values, step=step)
    def finish(self): self.note("finish")
def init(**kw):
    Run().note("init", **{"dir": os.environ.get("TRACKIO_DIR"), **kw})
    return Run()
log, finish = Run().log, Run().finish
"""


def header():
    return {"options": {"steps": STEPS, "lr": 0.001, "model": "d2"}, "plan": {}, "device": "cpu",
            "revision": "0"}


def step(number, loss):
    return {"step": number, "loss": loss, "norm": 1.5, "lr": 1e-3, "ms": 3.0,
            "tokens_per_second": 100.0}


def write(folder, *records, mode="w"):
    folder.mkdir(exist_ok=True)
    with open(folder / "log.jsonl", mode) as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run_folder(tmp_path):
    """A run that was cut off at step 3 and resumed at step 2."""
    write(tmp_path / "mine", header(), step(1, 5.5), step(2, 5.25),
          {"step": 2, "val_loss": 5.125, "sample": "text"}, step(3, 5.0), header(), step(3, 5.0),
          step(4, 4.5), step(5, 4.25), {"step": 5, "val_loss": 4.125, "bits_per_byte": 2.5})
    return tmp_path / "mine"


def environment(tmp_path, **more):
    (tmp_path / "packages").mkdir(exist_ok=True)
    for name in "wandb", "trackio":
        (tmp_path / "packages" / f"{name}.py").write_text(STUB)
    env = {name: value for name, value in os.environ.items()
           if name not in ("WANDB_MODE", "TRACKIO_DIR")}
    return dict(env, PYTHONPATH=str(tmp_path / "packages"), NOTES=str(tmp_path / "notes"), **more)


def run(*args, **kw):
    return subprocess.run([sys.executable, TOOL, *map(str, args)], capture_output=True, text=True,
                          timeout=100, **kw)


def notes(tmp_path):
    return [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]


def test_tensorboard(run_folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    done = run(run_folder, "--to", "tensorboard")
    assert done.returncode == 0 and "7 records" in done.stdout, done.stderr
    events = accumulator.EventAccumulator(str(run_folder / "tensorboard"))
    events.Reload()
    assert {tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in ("loss", "val_loss", "bits_per_byte")} == {
        "loss": [(1, 5.5), (2, 5.25), (3, 5.0), (4, 4.5), (5, 4.25)],
        "val_loss": [(2, 5.125), (5, 4.125)], "bits_per_byte": [(5, 2.5)]}
    assert sorted(events.Tags()["scalars"]) == sorted(
        ["loss", "norm", "lr", "ms", "tokens_per_second", "val_loss", "bits_per_byte"])


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_others(tmp_path, run_folder, tracker):
    done = run(run_folder, "--to", tracker, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr
    (begin, how), *logs, end = notes(tmp_path)
    assert begin == "init" and how["name"] == "mine" and how["config"] == header()["options"]
    assert how.get("mode") == ("offline" if tracker == "wandb" else None)
    assert how["dir"] == str(run_folder / ("trackio" if tracker == "trackio" else ""))\
        .rstrip("/")
    assert [kw["step"] for _, kw in logs] == [1, 2, 2, 3, 4, 5, 5] and end == ["finish", {}]
    assert logs[2][1]["values"] == {"val_loss": 5.125}


def wait_for(tmp_path, count):
    for _ in range(300):
        if os.path.exists(tmp_path / "notes") and len(notes(tmp_path)) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{count} notes did not come")


def begin_following(tmp_path):
    return subprocess.Popen([sys.executable, TOOL, tmp_path / "mine", "--to", "wandb", "--follow"],
                            env=environment(tmp_path), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_follow(tmp_path):
    """A line that is half written waits; after the last step it ends by itself."""
    write(tmp_path / "mine", header(), step(1, 5.5))
    with open(tmp_path / "mine" / "log.jsonl", "a") as file:
        file.write('{"step": 2, ')
    with begin_following(tmp_path) as process:
        wait_for(tmp_path, 2)
        with open(tmp_path / "mine" / "log.jsonl", "a") as file:
            file.write('"loss": 5.0}\n')
        wait_for(tmp_path, 3)
        assert process.poll() is None
        write(tmp_path / "mine", step(5, 4.0), {"step": 5, "val_loss": 3.5}, mode="a")
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0, said
    assert [kw.get("step") for _, kw in notes(tmp_path)] == [None, 1, 2, 5, 5, None]


def test_follow_is_ended(tmp_path):
    """Ctrl-C ends the tracker's run too."""
    write(tmp_path / "mine", header(), step(1, 5.5))
    with begin_following(tmp_path) as process:
        wait_for(tmp_path, 2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130
    assert notes(tmp_path)[-1] == ["finish", {}]


@pytest.mark.parametrize("args, named", [
    (["none", "--to", "wandb"], ["none/log.jsonl", "No such file"]),
    (["mine", "none", "--to", "wandb"], ["none/log.jsonl"]),
    (["bad", "--to", "wandb"], ["bad/log.jsonl", "not a log"]),
    (["mine", "--to", "aim"], ["--to", "aim", "tensorboard"]),
    (["mine"], ["--to"]),
    (["mine", "mine", "--to", "wandb", "--follow"], ["--follow"]),
    (["mine", "--to", "trackio"], ["--to trackio", "pip install trackio"]),
])
def test_bad_input(tmp_path, run_folder, args, named):
    write(tmp_path / "bad", {"x": 1})
    env = environment(tmp_path)
    (tmp_path / "packages" / "trackio.py").write_text("raise ModuleNotFoundError(name='trackio')")
    done = run(*args, env=env, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("track.py: ")
    for word in named:
        assert word in done.stderr
    assert not (tmp_path / "notes").exists() and os.listdir(run_folder) == ["log.jsonl"]
