"""
Faults that runs met in the world: a busy machine, folders with a history, signals, odd data, closed
descriptors.

They are tried on the trainer that TRAINER names, else on the CPU's; what matters to the host's text
alone, on the CUDA trainer under nogpu as well, where that is built.
"""

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import time
import zipfile

import numpy as np
import pytest

import formats
from conftest import NAME, TINY, check_one_line, check_refused, environment, make_text

NOGPU = os.path.join(formats.ROOT, "build", "train_nogpu_fp32")


@pytest.fixture(params=["cpu", pytest.param("nogpu", marks=pytest.mark.slow)])
def trainer(request):
    """Each trainer in turn."""
    if request.param == "cpu":
        return formats.trainer_path()
    if not os.path.exists(NOGPU):
        pytest.skip("build/train_nogpu_fp32 is not built here")
    return NOGPU


def cases(names, *values):
    """Each on the CPU trainer. The CUDA trainer has the same text for them, byte for byte
    (test_cuda.py), and under nogpu its steps are slow: there the last one."""
    on_nogpu = pytest.param("nogpu", *values[-1], marks=pytest.mark.slow)
    return pytest.mark.parametrize("trainer, " + names,
                                   [("cpu", *value) for value in values] + [on_nogpu],
                                   indirect=["trainer"])


def start(trainer, *args, **kw):
    return subprocess.Popen([trainer, *map(str, args)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kw)


def first_step(process):
    """Waits for the first line of a step."""
    for line in process.stdout:
        if line.startswith("step "):
            return line
    raise AssertionError(process.stderr.read())


def go(trainer, *args, status=0, **kw):
    """A run to its end."""
    done = subprocess.run([trainer, *map(str, args)], text=True, capture_output=True,
                          env=environment(), timeout=300, **kw)
    assert done.returncode == status, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done


def files(folder, ending=".bin"):
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(ending))


def lines_of(folder):
    """The lines of log.jsonl; of starts, the options alone."""
    with open(folder / "log.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [record.get("options", record) for record in records]

# ----------------------------------------------------------------------------
# threads


def plain_environment():
    return {name: value for name, value in os.environ.items()
            if not name.startswith(("OMP_", "GOMP_", "KMP_"))}


@cases("given", ["OMP_WAIT_POLICY=active"], ["GOMP_SPINCOUNT=100"], ["KMP_BLOCKTIME=1"], [""])
def test_waiting_threads_sleep(given, trainer, text):
    """
    Whatever the OpenMP runtime: it reads its variables from the environment that the process began
    with. Who has chosen how threads wait keeps that. The process keeps its name.
    """
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
    done = subprocess.run([formats.trainer_path(), *map(str, TINY), "--train", text, "-x", "0"],
                          text=True, capture_output=True, preexec_fn=preexec_fn,
                          env=plain_environment() | more, check=True)
    return int(done.stdout.split(" threads")[0].split()[-1])


def test_threads_keep_to_affinity(text):
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity here")
    one = sorted(os.sched_getaffinity(0))[:1]
    assert threads_used(lambda: os.sched_setaffinity(0, one), text) == 1
    assert threads_used(None, text, OMP_NUM_THREADS="3") == 3


def test_threads_keep_to_a_quota(text):
    """A control group of one CPU's time, version 1 or 2, where this user may make one."""
    group = next((folder for folder in ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup")
                  if os.access(folder, os.W_OK) and os.path.exists(f"{folder}/cgroup.procs")),
                 None)
    if group is None:
        pytest.skip("no control group can be made here; "
                    "test_cpu's Threads.Quota reads made-up ones")
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

# ----------------------------------------------------------------------------
# descriptors


@cases("closed", [">&-"], ["2>&-"], ["<&-"], [">&- 2>&-"], ["<&- >&- 2>&-"])
def test_closed_descriptors(closed, trainer, text, tmp_path):
    """What is printed goes to no file that the run opens, and the run does its work."""
    out = tmp_path / "out"
    args = [trainer, *map(str, TINY), "--train", str(text), "-x", "3", "-v", "2", "-n", "-1", "-o",
            str(out)]
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *args], env=environment(),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0
    header, steps, evaluations = formats.read_log(out)
    assert [step["step"]
            for step in steps] == [1, 2, 3] and [e["step"] for e in evaluations] == [2, 3]
    formats.read_model(out / "model_00000003.bin")
    assert (b"step 3/3" in done.stdout) == (">&-" not in closed.replace("2>&-", ""))

# ----------------------------------------------------------------------------
# data that is something else


def ask(*args, trainer=None, **kw):
    return subprocess.run([trainer or formats.trainer_path(), *map(str, TINY), "-x", "1", "-v", "0",
                           *map(str, args)],
                          text=True, capture_output=True, env=environment(), **kw)


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
STARTS = {"zst": b"\x28\xb5\x2f\xfd", "lz4": b"\x04\x22\x4d\x18", "7z": b"7z\xbc\xaf\x27\x1c",
          "pdf": b"%PDF-1.7", "parquet": b"PAR1", "npy": b"\x93NUMPY\1\0"}
SAID = {"gz": "gzip", "bz2": "bzip2", "zst": "zstd", "pdf": "PDF", "parquet": "Parquet",
        "npy": "NumPy", "zip": "zip"}


def foreign_file(kind, folder, name):
    content = make_text(4000).encode()
    path = folder / name
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("text.txt", content)
    else:
        path.write_bytes(PACKERS[kind](content) if kind in PACKERS else STARTS[kind] + content)
    return path


@pytest.mark.parametrize("kind", [*PACKERS, *STARTS, "zip"])
def test_packed_files(kind, trainer, text, tmp_path):
    """By what they hold, whatever they are called; the line says what they are and what to do."""
    for name in (f"text.txt.{kind}", "text.txt", "text.bin"):
        path = foreign_file(kind, tmp_path, name)
        check_refused(ask("--train", path, trainer=trainer), path, SAID.get(kind, kind))
        check_refused(ask("--train", text, "--val", path, trainer=trainer), path,
                      SAID.get(kind, kind))
    for option in ("--tokenizer", "--hellaswag", "-e"):
        done = ask("--train", text, option, path)
        assert done.returncode == 2
        check_one_line(done.stderr, path, SAID.get(kind, kind))


def test_headerless_tokens(trainer, tmp_path):
    """As nanoGPT writes them: GPT-2's ids, or those of characters; and as 32 bits."""
    rng = np.random.Generator(np.random.PCG64(3))
    gpt2 = np.minimum(rng.zipf(1.3, 20000) * 7, 50256)  # a fifth of them below 256, as of English
    characters = rng.integers(0, 65, 5001)
    for ids, kind in ((gpt2, "<u2"), (characters, "<u2"), (gpt2, "<u4"), (characters, "<i4"),
                      (gpt2, "<i8")):
        for name in ("train.bin", "train.dat"):
            (tmp_path / name).write_bytes(ids.astype(kind).tobytes())
            check_refused(ask("--train", tmp_path / name, trainer=trainer), tmp_path / name,
                          "16 bits" if kind == "<u2" else "32 bits", "without a header", "nanoGPT",
                          "prepare.py")


def test_text_in_utf_16(text, tmp_path):
    content = make_text(3000) + "Grüße €"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        bom = b"\xfe\xff" if encoding == "utf-16-be" else b""
        (tmp_path / "text.txt").write_bytes(bom + content.encode(encoding))
        check_refused(ask("--train", tmp_path / "text.txt"), "text.txt", "UTF-16")


def test_own_files_of_another_kind(text, tmp_path):
    """The files of one format, given for another."""
    out = tmp_path / "out"
    assert ask("--train", text, "-n", -1, "-o", out).returncode == 0
    for kind, said in (("model", "GPT-2 model file"), ("state", "training state")):
        plain = shutil.copy(out / f"{kind}_00000001.bin", tmp_path / kind)
        for path in (out / f"{kind}_00000001.bin", plain):
            check_refused(ask("--train", path), path, said, "token shard")


def test_what_is_text_stays_text(text, tmp_path):
    """
    A byte-order mark, carriage returns, other alphabets, a beginning like a packer's name, a NUL
    here and there.
    """
    words = make_text(3000)
    texts = [b"\xef\xbb\xbf" + words.encode(), words.replace("\n", "\r\n").encode(),
             ("Ж日本" + words).encode(), b"BZh was here. " + words.encode(),
             b"PAR and 7z" + words.encode(), words.encode() + b"\0\0", words.encode("latin-1"),
             np.random.Generator(np.random.PCG64(3)).integers(0, 256, 5000).astype("u1").tobytes()]
    for content in texts:
        (tmp_path / "text").write_bytes(content)
        done = ask("--train", tmp_path / "text")
        assert done.returncode == 0 and done.stderr == "", (content[:20], done.stderr)

# ----------------------------------------------------------------------------
# names and vocabularies


def test_a_name_that_exists_is_a_name(trainer, tmp_path):
    for name in ("a[1].txt", "b?.txt", "c*.txt", "d\\.txt", "~e.txt"):
        (tmp_path / name).write_text(make_text(3000))
        for path in (tmp_path / name, name):
            done = ask("--train", path, trainer=trainer, cwd=tmp_path)
            assert done.returncode == 0 and "1 file," in done.stdout, (name, done.stderr)
    (tmp_path / "c2.txt").write_text(make_text(2000))
    assert "1 file, 2,700 tokens" in ask("--train", "c*.txt", cwd=tmp_path).stdout
    (tmp_path / "c*.txt").unlink()
    (tmp_path / "c3.txt").write_text(make_text(2000))
    assert "2 files," in ask("--train", "c*.txt", cwd=tmp_path).stdout  # now it is a pattern
    (tmp_path / "shards[1]").mkdir()
    formats.write_tokens(tmp_path / "shards[1]" / "train.bin", np.arange(1000) % 256, 256)
    assert ask("--train", tmp_path / "shards[1]" / "train.bin").returncode == 0


def test_a_model_with_more_words(trainer, text, tmp_path):
    """
    Special words, or padding that counts as words: the data's ids are all below. Far more are
    another tokenizer's.
    """
    def model(vocab):
        config = dict(context=32, vocab=vocab, layers=1, heads=1, channels=8, padded_vocab=vocab)
        formats.write_model(tmp_path / f"{vocab}.bin", config, formats.draw_model(config, 1))
        return tmp_path / f"{vocab}.bin"

    def with_model(vocab, *args):
        return subprocess.run([trainer, "-e", model(vocab), "-b", "2", "-x", "1", "-v", "-1",
                               *map(str, args)],
                              text=True, capture_output=True, env=environment())
    data = tmp_path / "gpt2.bin"
    formats.write_tokens(data, np.minimum(np.arange(500) * 101, 50256))
    formats.write_tokens(tmp_path / "val.bin", np.full(100, 50257), 50258)
    for vocab in (50257, 50258, 50304):
        done = with_model(vocab, "--train", data, "--val", data)
        assert done.returncode == 0 and "loss" in done.stdout, done.stderr
    # and validation data may know the new words, where the training data do not
    assert with_model(50258, "--train", data, "--val", tmp_path / "val.bin").returncode == 0
    check_refused(with_model(50257, "--train", data, "--val", tmp_path / "val.bin"), "--val", 50258,
                  50257)
    check_refused(with_model(50256, "--train", data), "--train", 50257, 50256)
    assert with_model(257, "--train", text).returncode == 0  # bytes, and an end of text
    check_refused(with_model(50257, "--train", text), "--train", 256, 50257)

# ----------------------------------------------------------------------------
# text that is not plain


def test_lines_of_the_log(trainer, tmp_path, shards):
    """
    Whatever a sample or a name holds, each line of the log is one line to any reader, and CRLF is
    the end of one.
    """
    pieces = ["a", "\r\n", "\r", "\n", "\u2028", "\u2029", "\x85", "\x9b", "\x0b", "\x0c", "\x1c",
              "\ufeff", "é", "\r\n"] * 8
    header = np.zeros(256, "<i4")
    header[:4] = [20240328, 2, len(pieces), 0]
    packed = b"".join(bytes([len(piece.encode())]) + piece.encode() for piece in pieces)
    (tmp_path / "tokens").write_bytes(header.tobytes() + packed)
    out = tmp_path / "line\u2028and\u2029paragraph"
    done = ask("--train", shards / "train_0.bin", "--tokenizer", tmp_path / "tokens", "-s", -1,
               "-g", 500, "--temperature", 9, "--top-k", 0, "-o", out, trainer=trainer)
    assert done.returncode == 0 and "\x9b" not in done.stdout
    raw = (out / "log.jsonl").read_bytes().decode("utf-8")
    assert raw.splitlines() == raw.split("\n")[:-1]
    lines = [json.loads(line) for line in raw.splitlines()]
    sample = lines[-1]["sample"]
    assert lines[0]["options"]["out"] == str(out)  # the same name, not one like it
    assert "\r" not in sample and "a\n" in sample and all(character in sample
                                                          for character in "\u2028\u2029\ufffdé")
    shown = done.stdout.split("--- sample ---\n")[1].split("\n--------------")[0]
    assert shown == sample


def test_a_text_with_crlf(text, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"ab\r\n" * 1000)
    done = ask("--train", tmp_path / "text.txt", "-x", 80, "-l", 1e-2, "-s", -1, "-g", 60,
               "--temperature", 0)
    assert "ab\nab\nab\n" in done.stdout and "\ufffd" not in done.stdout

# ----------------------------------------------------------------------------
# nothing lost by a default or a signal


def test_saved_at_the_end(trainer, text, tmp_path):
    """With --out, unless -n 0 says no."""
    args = [*TINY, "--train", text, "-v", 0, "-x", 3]
    go(trainer, *args, "-o", tmp_path / "a")
    assert files(tmp_path / "a") == ["model_00000003.bin", "state_00000003.bin"]
    go(trainer, *args, "-o", tmp_path / "b", "-n", 0)
    assert files(tmp_path / "b") == []
    go(trainer, *args)
    check_one_line(go(trainer, *args, "-n", -1, status=2).stderr, "--checkpoint-every", "--out")


@cases("number, options", *((number, options)
                            for options in (["-n", 0], ["-o", "out", "-n", 0], ["-o", "out"])
                            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)))
def test_signal_saves(number, options, trainer, text, tmp_path):
    """
    The step is finished; what is saved is as if the run had been that long, and the run goes on
    from it.
    """
    args = [*TINY, "--train", text, "-v", 0, "-k", "constant", *options]
    # nohup has its programs ignore some
    with start(trainer, *args, "-x", 1000000, cwd=tmp_path, env=environment(),
               preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)) as process:
        first_step(process)
        process.send_signal(number)
        shown, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said.startswith(f"{NAME}ended by {number.name} after step ") and said.count("\n") == 1
    last = int(said.split("after step ")[1].split(";")[0].split(",")[0])
    assert shown.rstrip().split("\n")[-1].startswith(f"step {last}/") if shown else last == 1
    if len(options) != 2 or options[0] == "-n":
        assert "nothing is saved" in said and not any(tmp_path.glob("*/*.bin"))
        return
    assert "-y" in said and files(tmp_path / "out") == [f"model_{last:08d}.bin",
                                                        f"state_{last:08d}.bin"]
    assert [line["step"] for line in lines_of(tmp_path / "out")[1:]] == list(range(1, last + 1))
    assert f"resumed after step {last}\n" in go(trainer, *args, "-x", last + 2, "-y",
                                                cwd=tmp_path).stdout
    assert [line["step"]
            for line in formats.read_log(tmp_path / "out")[1]] == list(range(1, last + 3))


def test_signal_with_the_pipe_gone(text, tmp_path):
    """
    Ctrl-C ends the `| tee` as well: what cannot be printed any more must not cost the checkpoint.
    """
    with start(formats.trainer_path(), *TINY, "--train", text, "-x", 1000000, "-v", 0, "-o",
               tmp_path / "out", env=environment()) as process:
        first_step(process)
        process.send_signal(signal.SIGINT)
        process.stdout.close()
        said = process.stderr.read()
        process.wait(60)
    # the latter: the pipe was gone before the signal came
    assert process.returncode in (130, -signal.SIGPIPE), said
    assert process.returncode != 130 or len(files(tmp_path / "out")) == 2


def slow(text):
    """Steps that take a long while."""
    return ["--train", text, "-e", "d4", "--channels", 256, "--context", 512, "-b", 4, "-d",
            1024 * 2048, "-v", 0, "-x", 5]


def test_second_interrupt(text, tmp_path):
    args = slow(text)
    long_text = tmp_path / "long.txt"
    long_text.write_text(text.read_text() * 2)
    args[1] = long_text
    with start(formats.trainer_path(), *args, "-o", tmp_path / "out", env=environment()) as process:
        while not (tmp_path / "out/log.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.5)  # it has begun its first step, which takes minutes
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        process.communicate()
    assert files(tmp_path / "out") == []


def test_ignored_signals_stay_ignored(text):
    """As nohup leaves them."""
    with start(formats.trainer_path(), *TINY, "--train", text, "-x", 1000000, "-v", 0,
               env=environment(),
               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        first_step(process)
        process.send_signal(signal.SIGHUP)
        for _ in range(20):
            assert process.stdout.readline().startswith("step ")
        process.kill()


def test_full_disk_is_foreseen(trainer, text, tmp_path):
    """No disk holds a checkpoint of each of a billion steps; three of them it does."""
    args = [*TINY, "--train", text, "-v", 0, "-n", 1, "-o", tmp_path / "out"]
    done = go(trainer, *args, "-x", 1000000000, "--keep", 0, status=1)
    check_one_line(done.stderr, "--out", "1,000,000,000 checkpoints", "--keep")
    assert "step 1/" not in done.stdout
    with start(trainer, *args, "-x", 1000000000, env=environment()) as process:
        first_step(process)
        process.kill()
    model, state = (sum(path.stat().st_size
                        for path in (tmp_path / "out").glob(f"{kind}_00000001.bin"))
                    for kind in ("model", "state"))
    if model and state:  # not killed before
        each = int(done.stderr.split("checkpoints of ")[1].split(" bytes")[0].replace(",", ""))
        assert model + state - 2048 < each <= model + state

# ----------------------------------------------------------------------------
# a folder in use, or with a history


def test_earlier_log_is_not_replaced(trainer, text, tmp_path):
    args = [*TINY, "--train", text, "-v", 0, "-n", 0, "-o", tmp_path]
    go(trainer, *args, "-x", 5)
    before = (tmp_path / "log.jsonl").read_bytes()
    check_one_line(go(trainer, *args, "-x", 3, status=2).stderr, "--out", tmp_path, "log",
                   "--resume")
    assert (tmp_path / "log.jsonl").read_bytes() == before
    # nothing to resume: step 1 is done again
    assert "log.jsonl.1" in go(trainer, *args, "-x", 3, "-y").stdout
    assert (tmp_path / "log.jsonl.1").read_bytes() == before
    assert [line["step"] for line in formats.read_log(tmp_path)[1]] == [1, 2, 3]


def test_start_that_came_to_nothing(trainer, text, tmp_path):
    """It leaves a log without a step, which is no history."""
    args = [*TINY, "--train", text, "-v", 0, "-n", 0, "-o", tmp_path]
    go(trainer, *args, "-x", 0)
    assert len(lines_of(tmp_path)) == 1
    go(trainer, *args, "-x", 2)
    assert [line["step"] for line in formats.read_log(tmp_path)[1]] == [1, 2]


def test_folder_in_use(trainer, text, tmp_path):
    """Until the other ends, however it does. The same folder by another name is the same."""
    args = [*TINY, "--train", text, "-v", 0]
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with start(trainer, *args, "-x", 1000000, "-n", 1, "-o", tmp_path / "out",
               env=environment()) as process:
        first_step(process)
        for more in ([], ["-y"]):
            check_one_line(go(trainer, *args, "-x", 3, "-o", tmp_path / "link", *more,
                              status=2).stderr,
                           "--out", "in use")
        process.kill()
        process.communicate()
    go(trainer, *args, "-x", 3, "-o", tmp_path / "link", "-y")


def test_half_done_files_are_tidied(trainer, text, tmp_path):
    """Those of the trainer alone, and under its lock."""
    args = [*TINY, "--train", text, "-v", 0, "-o", tmp_path]
    go(trainer, *args, "-x", 3)
    half = ["model_00000004.bin.tmp", "state_00000004.bin.tmp", "log.jsonl.tmp",
            "tokenizer.bin.tmp", "model_00000004.bin"]
    others = ["mine.tmp", "model_4.bin.tmp", "model_00000002.bin", "model_best.bin",
              "model_00000009.bin.tmp"]
    for name in half + others[:-1]:
        (tmp_path / name).write_text("x")
    (tmp_path / others[-1]).symlink_to("/nowhere")
    go(trainer, *args, "-x", 3, "-y")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([*others, "lock", "log.jsonl", "model_00000003.bin",
                           "state_00000003.bin"])


def test_models_without_states_stay(text, tmp_path):
    """Somebody has deleted the states, which are large: the models are all there is."""
    args = [*TINY, "--train", text, "-v", 0, "-o", tmp_path]
    go(formats.trainer_path(), *args, "-x", 3)
    (tmp_path / "state_00000003.bin").unlink()
    go(formats.trainer_path(), *args, "-x", 2, "-y")
    assert "model_00000003.bin" in files(tmp_path)

# ----------------------------------------------------------------------------
# what happened stands in the log


def test_each_start_writes_its_header(trainer, text, tmp_path):
    args = [*TINY, "--train", text, "--val", text, "-v", 0, "-n", 2, "-k", "constant", "-o",
            tmp_path]
    go(trainer, *args, "-x", 5, "-l", "1e-3")
    (tmp_path / "state_00000005.bin").unlink()
    (tmp_path / "model_00000005.bin").unlink()
    (tmp_path / "val.txt").write_text(make_text(3000))
    go(trainer, *args, "-x", 6, "-l", "2e-3", "-c", 0, "--val", tmp_path / "val.txt", "-y")
    with open(tmp_path / "log.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    # no step twice
    assert ["options" in record or record["step"]
            for record in records] == [True, 1, 2, 3, 4, True, 5, 6]
    first, second = records[0], records[5]
    assert [(h["options"]["lr"], h["options"]["weight-decay"], h["options"]["resume"])
            for h in (first, second)] == [(0.001, 0.1, False), (0.002, 0, True)]
    assert first.keys() == second.keys() == {"revision", "device", "data", "options", "plan"}
    assert first["data"]["train"] == second["data"]["train"] == first["data"]["val"] != second[
        "data"]["val"]


@cases("place, size", *((place, size) for size in (6000, 3000000) for place in (0, 0.5, -1)))
def test_changed_data_are_noticed(place, size, trainer, tmp_path):
    """
    By what they hold: the size is the same, and so is the name. A large file's middle is looked at
    here and there.
    """
    data = tmp_path / "data.txt"
    data.write_text(make_text(6000) * (size // 6000))
    args = [*TINY, "--train", data, "-v", 0, "-o", tmp_path / "out"]
    go(trainer, *args, "-x", 2)
    content = bytearray(data.read_bytes())
    at = place if isinstance(place, int) else size // 2
    end = at + size // 10 if size > 6000 and at > 0 else at + 1 or None
    content[at:end] = b"#" * len(content[at:end])
    data.write_bytes(content)
    assert len(content) == size
    check_one_line(go(trainer, *args, "-x", 3, "-y", status=2).stderr, "--train: ",
                   "state_00000002.bin", "hash")
    data.write_text(make_text(6000) * (size // 6000))
    data.rename(tmp_path / "moved.txt")
    # another name, or time, is no other data
    go(trainer, *args, "-x", 3, "-y", "--train", tmp_path / "moved.txt")


def test_changed_rate_is_said(trainer, text, tmp_path):
    args = [*TINY, "--train", text, "-v", 0, "-l", "3e-4", "-o", tmp_path / "a"]
    go(trainer, *args, "-x", 4)
    said = ("the learning rate was 6.95e-05 at step 4/4 and is 1.88e-04 at step 5/9: --steps, "
            "--lr or its schedule has changed")
    assert said in go(trainer, *args, "-x", 9, "-y").stdout
    for more in (["-l", "1e-3"], ["-u", 20], ["-q", 0.5]):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        assert "the learning rate was" in go(trainer, *args, "-x", 10, "-y", *more, "-o",
                                             tmp_path / "b").stdout
    args += ["-k", "constant", "-o", tmp_path / "c"]
    go(trainer, *args, "-x", 2)
    assert "the learning rate was" not in go(trainer, *args, "-x", 4, "-y").stdout


def checksum(data):
    total = 0
    for word in np.frombuffer(data, "<u4").tolist():
        total = (total ^ word) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        total ^= total >> 29
    return total.to_bytes(8, "little")


def rewrite_state(path, change):
    """A state with other lines of flags, as another revision would have written it."""
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], "<i4").copy()
    lines = change(raw[1024:1024 + header[3]].decode().rstrip("\n") + "\n").encode()
    lines += b"\n" * (-len(lines) % 4)
    tensors = raw[1024 + header[3]:-8]
    header[3] = len(lines)
    raw = header.tobytes() + lines + tensors
    path.write_bytes(raw + checksum(raw))


def test_states_of_other_revisions(trainer, text, tmp_path):
    """
    An older one lacks options, which then did as some value does now; a newer one has options that
    are not known.
    """
    args = [*TINY, "--train", text, "-v", 0, "-k", "constant", "-o", tmp_path]
    go(trainer, *args, "-x", 2)
    state = tmp_path / "state_00000002.bin"
    good = state.read_bytes()
    rewrite_state(state, lambda lines: lines)
    assert state.read_bytes() == good
    lack = ("--optimizer", "--gelu", "--tape", "--master", "steps", "rate")
    old = lambda lines: "".join(line.split(", hash")[0].rstrip("\n") + "\n"
                                for line in lines.splitlines() if not line.startswith(lack))
    rewrite_state(state, old)
    old_state = state.read_bytes()
    for more, then in (("--gelu 2bit", "exact"), ("--tape int8", "full"),
                       ("--optimizer muon", "adamw")):
        done = go(trainer, *args, "-x", 4, "-y", *more.split(), status=2)
        check_one_line(done.stderr, more.split()[0] + ": ", "no such option",
                       f"with {then}, not {more.split()[1]}")
    assert state.read_bytes() == old_state
    assert "resumed after step 2" in go(trainer, *args, "-x", 4, "-y").stdout
    state.write_bytes(good)
    (tmp_path / "state_00000004.bin").unlink()
    rewrite_state(state, lambda lines: "--magic=yes\n" + lines)
    check_one_line(go(trainer, *args, "-x", 4, "-y", status=2).stderr, "--magic: ",
                   "saved with yes", "this revision lacks")

# ----------------------------------------------------------------------------
# for the eye


def test_time_left(trainer, text):
    lines = [line for line in go(trainer, *TINY, "--train", text, "-v", 0, "-x",
                                 3).stdout.splitlines() if line.startswith("step ")]
    assert [re.search(r" tok/s.* \| eta \d+s$", line) is not None
            for line in lines] == [True, True, False]
    with start(trainer, *TINY, "--train", text, "-v", 0, "-x", 1000000000,
               env=environment()) as process:
        line = first_step(process)
        process.kill()
    assert re.search(r" \| eta \d+d\d+h$", line.rstrip("\n"))


def test_validation_first(trainer, text, tmp_path):
    """Before the first step, of the fresh weights: the rest is as without."""
    args = [*TINY, "--train", text, "-v", 2, "-s", 2, "-g", 4, "-n", 2, "-x", 4]
    go(trainer, *args, "-o", tmp_path / "a")
    shown = go(trainer, *args, "-o", tmp_path / "b", "--val-first").stdout
    (_, steps, plain), (_, same_steps, more) = (formats.read_log(tmp_path / name) for name in "ab")
    assert [s["loss"] for s in steps] == [s["loss"] for s in same_steps]
    assert more[0].keys() == {"step", "val_loss",
                              "bits_per_byte"} and more[0]["step"] == 0 and more[1:] == plain
    assert abs(more[0]["val_loss"] - np.log(256)) < 0.1 and "step 0/4 | val " in shown
    assert files(tmp_path / "a") == files(tmp_path / "b") == [
        f"{kind}_0000000{n}.bin" for kind in ("model", "state") for n in (2, 4)]
    go(trainer, *args, "-v", 0, "-x", 6, "-o", tmp_path / "b", "--val-first", "-y")
    assert [line["step"] for line in formats.read_log(tmp_path / "b")[2]].count(0) == 1
