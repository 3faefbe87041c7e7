#!/usr/bin/env python3
"""
Builds, tests and times the CUDA trainer on this machine's GPU; dev/gpu_check.sh looks for the tools
and starts this.

It goes through a list of parts, the most important first, until the time is up: tests in both
precisions, GPT-2 d12 at full rank and compressed, the same in PyTorch, compute-sanitizer on a small
model, then d24, d48 and all other settings. A part that fails is recorded and the rest goes on.
What is known is written to dev/results/ after each part, so an interruption loses nothing.
"""

import argparse
import array
import datetime
import fcntl
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import roofline

ROOT = Path(__file__).resolve().parent.parent
SEQ = 1024  # tokens of a sequence
BATCH = 64  # sequences, or as many as fit
STEPS = 20
FIRST_TIMED = 5  # the first steps also pay for loading kernels and for the clocks to settle
LIBRARIES = 0.06  # of the free memory, for the context, cuBLAS and what the driver keeps
MODELS = ["d12", "d24", "d48"]
LEVELS = range(6)
RANKS = {"1": "full rank", "0.5": "1/2", "0.25": "1/4", "0.125": "1/8"}
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
GIB = 1 << 30
TRAINER = "./build/train_gpt2_compactcu_bf16"

# What compute-sanitizer watches: two heads of 64, two tiles of a sequence of which one is cut off,
# padded words, two micro batches a step, and a new projection before the second step.
SMALL = ["-e", "d2", "--context", "128", "-t", "100", "-b", "2", "-d", "400", "-x", "2", "-v", "0",
         "--gap", "1", "--moments", "move"]
SMALL_VOCABULARY = 300


class Failed(Exception):
    """A part has failed: why, in a line, and the figures that there are all the same."""

    def __init__(self, why, figures=None):
        super().__init__(why)
        self.figures = figures or {}


class CutOff(Failed):
    """A part was stopped before it could say whether it is well."""


class NotHere(Exception):
    """A part needs something that this machine lacks."""


class NoTime(Exception):
    """A part would take longer than what is left."""


class Part:
    """
    commands: what the part will run, for --dry-run; act(check) returns its figures; seconds: what
    must be left to begin it.
    """

    def __init__(self, name, kind, commands, act, seconds, quick=False):
        self.name, self.kind, self.commands = name, kind, commands
        self.act, self.seconds, self.quick = act, seconds, quick

# ----------------------------------------------------------------------------
# commands


class Check:
    """What the parts share: the options, the device, when to end, and what is known so far."""

    def __init__(self, options, device):
        self.options, self.device = options, device
        self.began = time.monotonic()
        self.folder = Path("build/gpu_check")  # from ROOT, where all of this runs
        self.records = []  # of the parts that are done
        self.flop_rate = {}  # model: FLOP/s of its runs so far
        self.startup = 8.0  # seconds of a run outside its steps; measured as runs go by
        self.batches = {}  # model: sequences that fit
        self.stem = None  # of the results' names, once something is written
        self.child = None
        self.commands = []  # of the part that is running

    def left(self):
        """Seconds until the time is up; a few are kept for the last words."""
        return self.options.minutes * 60 - 3 - (time.monotonic() - self.began)

    def environment(self):
        chosen = {"CUDA_VISIBLE_DEVICES": self.device["id"]} if self.device.get("id") else {}
        return dict(os.environ, CUDA_DEVICE_ORDER="PCI_BUS_ID", **chosen)

    def run(self, command, limit, log=None):
        """
        Runs a command, for `limit` seconds or what is left of the time at most. Returns (status,
        seconds, output); status None where it was stopped. The output goes to a file, so that a
        talkative program cannot fill the memory.
        """
        self.commands.append(shown(command))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / (log or "last.log")
        began = time.monotonic()
        with open(path, "wb") as out:
            try:  # in a session of its own: a stop then reaches the children of the child
                self.child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT,
                                              stdin=subprocess.DEVNULL, env=self.environment(),
                                              start_new_session=True)
                status = self.child.wait(max(1.0, min(limit, self.left())))
            except OSError as error:
                raise Failed(f"{command[0]}: {error.strerror}")
            except subprocess.TimeoutExpired:
                status = None
            finally:
                self.stop_child()
        if status is None and self.left() < 1:
            raise CutOff("the time was up")
        return status, time.monotonic() - began, path.read_text(errors="replace")

    def stop_child(self):
        if self.child and self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()
        self.child = None


def shown(command):
    return shlex.join(["python3" if word == sys.executable else word for word in command])


def last_words(output, lines=12):
    """The end of what a program said: where its error stands."""
    return "\n".join(output.strip().splitlines()[-lines:])[-2000:]


def how_it_ended(status, seconds):
    if status is None:
        return f"stopped at its limit, after {seconds:.0f} s"
    return f"ended with status {status}"

# ----------------------------------------------------------------------------
# the device


class Sampler:
    """Watches a device's memory, clock and power while a program runs."""

    FIELDS = ["memory.used", "clocks.sm", "power.draw"]

    def __init__(self, device):
        self.samples = []
        chosen = ["-i", device["id"]] if device.get("id") else []
        command = ["nvidia-smi", *chosen, f"--query-gpu={','.join(self.FIELDS)}",
                   "--format=csv,noheader,nounits", "-lms", "100"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        text=True)
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()
        for _ in range(30):  # the first sample, from before the program, is what others hold
            if self.samples or self.process.poll() is not None:
                break
            time.sleep(0.1)

    def read(self):
        for line in self.process.stdout:
            self.samples.append([number(cell) for cell in line.split(",")])

    def stop(self):
        """
        {peak_bytes: beyond what was in use before; clock_mhz, power_w: medians while the memory was
        in use}
        """
        self.process.terminate()
        self.process.wait()
        self.thread.join(2)
        return read_samples(self.samples)


def read_samples(samples):
    rows = [row for row in samples if len(row) == 3 and row[0] is not None]
    if len(rows) < 2:
        return {}
    peak = max(row[0] for row in rows)
    busy = [row for row in rows if row[0] > (rows[0][0] + peak) / 2]
    figures = {"peak_bytes": int((peak - rows[0][0]) * (1 << 20))}
    for name, column in (("clock_mhz", 1), ("power_w", 2)):
        values = [row[column] for row in busy if row[column] is not None]
        if values:
            figures[name] = statistics.median(values)
    return figures


def number(text):
    """Of nvidia-smi, which also says [N/A]."""
    try:
        return float(text)
    except ValueError:
        return None


def said_by(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def find_device():
    """What nvidia-smi says of the first device that programs may see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    fields = ["name", "driver_version", "compute_cap", "memory.total", "memory.free", "memory.used",
              "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu"]
    said = said_by("nvidia-smi", "-i", visible or "0", "--query-gpu=" + ",".join(fields),
                   "--format=csv,noheader,nounits")
    if not said:
        sys.exit("gpu_check.py: nvidia-smi does not describe the device; is its driver running?")
    device = dict(zip(fields, [cell.strip() for cell in said.splitlines()[0].split(",")]))
    device["id"] = visible or "0"
    driver_cuda = re.search(r"CUDA Version: *([\d.]+)", said_by("nvidia-smi"))
    nvcc = re.search(r"release ([\d.]+)", said_by("nvcc", "--version"))
    device["cuda of the driver"] = driver_cuda[1] if driver_cuda else "unknown"
    device["cuda toolkit"] = nvcc[1] if nvcc else "unknown"
    return device


def revision():
    described = os.environ.get("REVISION") or said_by("git", "describe", "--always", "--dirty")
    return described or "unknown"

# ----------------------------------------------------------------------------
# data


def write_tokens(path, count, vocabulary):
    """A shard of random tokens: the time of a step does not depend on what they say."""
    tokens = array.array("H", random.Random(1).choices(range(vocabulary), k=count))
    header = struct.pack("<256i", 20240520, 1, count, vocabulary, *[0] * 252)
    path.write_bytes(header + tokens.tobytes())


def data(check, name="tokens.bin", count=STEPS * BATCH * SEQ + 1, vocabulary=50257):
    path = check.folder / name
    if not path.exists():
        check.folder.mkdir(parents=True, exist_ok=True)
        write_tokens(path, count, vocabulary)
    return str(path)

# ----------------------------------------------------------------------------
# parts: build and test


def binary(program, precision):
    return f"build/{program}_{precision.lower()}"


def build_commands(precision):
    return [["make", "-B", "-k", "-j2", "train_gpt2_compactcu", "test_gpt2cu",
             f"PRECISION={precision}"]]


def build(check, precision):
    """
    make writes both precisions to one name: each is moved away, and bf16, make's default, is laid
    there again.
    """
    programs = ["train_gpt2_compactcu", "test_gpt2cu"]
    for program in programs:
        Path(program).unlink(missing_ok=True)
    command = build_commands(precision)[0] + [f"REVISION={revision()}"]
    status, seconds, output = check.run(command, 300, f"build_{precision.lower()}.log")
    missing = []
    for program in programs:
        # a compiler that was stopped may leave half a program
        if status is not None and Path(program).exists():
            shutil.move(program, binary(program, precision))
        else:
            missing.append(program)
            Path(binary(program, precision)).unlink(missing_ok=True)  # not an old one in its place
        if Path(binary(program, "BF16")).exists():
            shutil.copy2(binary(program, "BF16"), program)
    if missing or status != 0:
        raise Failed(f"make {how_it_ended(status, seconds)}, "
                     f"without {' and '.join(missing) or 'a word'}:\n{last_words(output)}")
    return {}


def test(check, precision):
    limit = max(75, 0.25 * 60 * check.options.minutes)  # something must be left for the rest
    status, seconds, output = check.run(["./" + binary("test_gpt2cu", precision)], limit,
                                        f"test_{precision.lower()}.log")
    figures = read_test(output)
    if status is None and not figures["failed"]:
        raise CutOff(f"{how_it_ended(status, seconds)}; {figures['passed']} passed until then",
                     figures)
    if status != 0 or figures["failed"] or not figures["passed"]:
        words = "\n".join(figures["failures"]) or last_words(output, 3)
        raise Failed(f"{how_it_ended(status, seconds)}: {check_words(figures)}\n{words}", figures)
    return figures


def read_test(output):
    """Counts the cases of test_gpt2cu, a line each, also where it did not come to its end."""
    cases = [line for line in output.splitlines() if re.search(r" (ok|FAILED)$", line)]
    failures = [re.sub(r"  +", "  ", line) for line in cases if line.endswith(" FAILED")]
    return {"passed": len(cases) - len(failures), "failed": len(failures), "failures": failures}

# ----------------------------------------------------------------------------
# parts: compute-sanitizer


def sanitizer_commands(tool, precision, projection, train="build/gpu_check/small.bin"):
    trainer = "./" + binary("train_gpt2_compactcu", precision)
    level = "2" if projection == "sparse" else "0"
    method = ["--optimizer", "muon"]
    if projection != "muon":
        method = ["--optimizer", "adamw", "--projection", projection]
    return [["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", trainer,
             "--train", train, *SMALL, *method, "-r", level]]


def sanitize(check, tool, precision, projection):
    if not shutil.which("compute-sanitizer"):
        raise NotHere("compute-sanitizer was not found")
    train = data(check, "small.bin", 4096, SMALL_VOCABULARY)
    command, = sanitizer_commands(tool, precision, projection, train)
    log = f"{tool}_{precision.lower()}_{projection}.log"
    status, seconds, output = check.run(command, 120, log)
    figures = read_sanitizer(output)
    if status != 0 or figures["findings"] != 0:
        raise Failed(f"{how_it_ended(status, seconds)}; {figures['summary'] or 'no summary'}\n"
                     f"{last_words(output)}", figures)
    return figures


def read_sanitizer(output):
    """The tool's last line, and the number in it: errors or hazards."""
    lines = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    count = re.match(r"\d+", lines[-1]) if lines else None
    return {"summary": lines[-1] if lines else None, "findings": int(count[0]) if count else None}

# ----------------------------------------------------------------------------
# parts: time of a step


def method_text(rank, projection, optimizer):
    method = "full rank" if rank == "1" else f"{RANKS[rank]} {projection}"
    return method + " muon" * (optimizer == "muon")


class Setting:
    """What is timed: a model, a rank, a projection, a level of recomputation, an optimizer."""

    def __init__(self, model, rank, projection, level, optimizer="adamw"):
        self.model, self.rank, self.projection = model, rank, projection
        self.level, self.optimizer = level, optimizer

    @property
    def name(self):
        method = method_text(self.rank, self.projection, self.optimizer)
        return f"{self.model} {method}, level {self.level}"

    def flags(self, batch):
        return ["-e", self.model, "-b", str(batch), "-t", str(SEQ), "--rank", self.rank,
                "--projection", self.projection, "--optimizer", self.optimizer,
                "-r", str(self.level)]


def plan_command(trainer, setting, batch):
    return [trainer, *setting.flags(batch), "--plan=json"]


def timing_command(trainer, setting, batch, steps, train, out):
    return [trainer, "--train", train, *setting.flags(batch), "-x", str(steps), "-v", "0",
            "-n", "0", "-l", "1e-4", "-o", out]


def ask_plan(check, trainer, setting, batch):
    command = plan_command(trainer, setting, batch)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30,
                              env=check.environment())
    except OSError as error:
        raise Failed(f"{trainer}: {error.strerror}")
    except subprocess.TimeoutExpired:
        raise Failed("--plan=json takes over 30 s")
    if done.returncode != 0:
        raise Failed(f"--plan=json: {last_words(done.stderr)}")
    return json.loads(done.stdout)


def largest_batch(bytes_of, room, most=None):
    """
    The most sequences whose plan takes no more than `room`. Plans grow by the sequence, so one of 1
    and one of more say how many; where a tensor is rounded up, it may be a few less.
    """
    some = 9
    one = bytes_of(1)
    each = max(1, (bytes_of(some) - one) / (some - 1))
    batch = int((room - one) / each) + 1 if room >= one else 0
    # the trainer takes no more tokens than 2^30, nor more sequences than 65535
    batch = min(batch, most or min((1 << 30) // SEQ, 65535))
    while batch > 0 and bytes_of(batch) > room:
        batch -= 1
    return batch


def room(check):
    return number(check.device["memory.free"]) * (1 << 20) * (1 - LIBRARIES)


def choose_batch(check, trainer, setting):
    """
    One batch for all settings of a model, so that they can be compared: what fits at full rank with
    everything kept. Where not even one sequence does, each setting takes what it can.
    """
    def largest(setting, most=None):
        return largest_batch(lambda batch: ask_plan(check, trainer, setting, batch)["total_bytes"],
                             room(check), most)

    if setting.model not in check.batches:
        hardest = Setting(setting.model, "1", "gaussian", 0)
        check.batches[setting.model] = largest(hardest, BATCH)
    own = largest(setting)
    return check.batches[setting.model] or min(own, BATCH), own


def expected_seconds(check, setting, flops):
    """
    Of a step, by what this model's earlier runs (or those of a smaller one) show; None while there
    are none.
    """
    known = [m for m in MODELS[:MODELS.index(setting.model) + 1] if m in check.flop_rate]
    return flops / check.flop_rate[known[-1]] if known else None


def time_trainer(check, setting, trainer=TRAINER, steps=STEPS):
    batch, largest = choose_batch(check, trainer, setting)
    if batch == 0:
        raise Failed("not one sequence fits into the free memory")
    # those that looked for the batch are its like, and are not listed
    check.commands.append(shown(plan_command(trainer, setting, batch)))
    plan = ask_plan(check, trainer, setting, batch)
    flops = plan["flops_per_token"]["total"] * batch * SEQ
    step = expected_seconds(check, setting, flops)
    if step is not None:  # fewer where a step takes long
        steps = max(FIRST_TIMED + 3, min(steps, int(15 / step)))
    if step is not None and check.startup + steps * step > check.left():
        raise NoTime()
    out = check.folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    command = timing_command(trainer, setting, batch, steps, data(check), str(out))
    sampler = Sampler(check.device)
    try:
        status, seconds, output = check.run(command, 120, "run.log")
    finally:
        sampled = sampler.stop()
    records = read_log(out / "log.jsonl")
    figures = {"model": setting.model, "rank": setting.rank,
               "projection": setting.projection if setting.rank != "1" else None,
               "optimizer": setting.optimizer, "recompute": setting.level, "batch": batch,
               "seq": SEQ, "largest_batch": largest, "plan_bytes": plan["total_bytes"],
               "full_rank_plan_bytes": plan["full_rank_total_bytes"],
               "flops_per_token": plan["flops_per_token"],
               **step_figures(records, flops, batch * SEQ), **sampled}
    card = roofline.card_of(check.device["name"])
    if card:
        figures["predicted_ms"] = roofline.predict(card, plan)["total_ms"]
    utilisation = re.findall(r"(\d+) % MFU", output)
    if utilisation:
        timed = utilisation[FIRST_TIMED - 1:] or utilisation
        figures["mfu_percent"] = int(statistics.median(map(int, timed)))
    shutil.rmtree(out, ignore_errors=True)
    if status != 0:
        raise Failed(f"{how_it_ended(status, seconds)}, after {figures['steps']} steps:\n"
                     f"{last_words(output, 3)}", figures)
    if figures["steps"] < FIRST_TIMED or not math.isfinite(figures["last_loss"]):
        raise Failed(f"only {figures['steps']} steps in its log, "
                     f"last loss {figures.get('last_loss')}", figures)
    check.flop_rate[setting.model] = flops / (figures["ms"] / 1e3)
    check.startup = max(2.0, seconds - figures["all_steps_seconds"])
    return figures


def read_log(path):
    """The steps of a log.jsonl. Its first line describes the run; its last may be cut off."""
    if not path.exists():
        return []
    steps = []
    for line in path.read_text(errors="replace").split("\n"):  # lines end there alone
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "ms" in record:
            steps.append(record)
    return steps


def step_figures(records, flops, tokens):
    timed = [r["ms"] for r in records if r["step"] >= FIRST_TIMED]
    figures = {"steps": len(records)}
    if timed:
        ms = statistics.median(timed)
        figures.update(ms=ms, ms_least=min(timed), ms_most=max(timed),
                       tokens_per_second=1e3 * tokens / ms, tflops=flops / ms / 1e9)
    if records:
        figures.update(first_loss=records[0]["loss"], last_loss=records[-1]["loss"],
                       all_steps_seconds=sum(r["ms"] for r in records) / 1e3)
    return figures

# ----------------------------------------------------------------------------
# parts: the kernels' variants


def variant_programs():
    return sorted(path.stem for path in (ROOT / "dev/cuda").glob("*.cu"))


def variant_commands(lines="dev/results/variants_DEVICE-REVISION.json"):
    return [[f"build/cuda/{name}", "--json", lines] for name in variant_programs()]


def time_variants(check):
    """
    Each variant of each layer against the CPU, then its time: lines that dev/cuda/table.py makes a
    table of.
    """
    status, seconds, output = check.run(["make", f"-j{os.cpu_count()}", "-C", "dev/cuda"], 300,
                                        "build_variants.log")
    if status != 0:
        raise Failed(f"make {how_it_ended(status, seconds)}:\n{last_words(output)}")
    which = f"{safe(check.device['name'])}-{safe(check.options.revision)}"
    lines = Path(check.options.out) / f"variants_{which}.json"
    lines.parent.mkdir(parents=True, exist_ok=True)
    lines.unlink(missing_ok=True)
    figures, unwell = {"passed": 0, "failed": 0}, []
    for command in variant_commands(str(lines)):
        status, seconds, output = check.run(command, 60, Path(command[0]).name + ".log")
        if status != 0:
            unwell.append(f"{command[0]} {how_it_ended(status, seconds)}:\n{last_words(output, 3)}")
        for passed, failed in re.findall(r"^(\d+) passed, (\d+) failed$", output, re.MULTILINE):
            figures["passed"] += int(passed)
            figures["failed"] += int(failed)
    if unwell:
        raise Failed("\n".join(unwell), figures)
    return figures

# ----------------------------------------------------------------------------
# parts: the same bits twice, and PyTorch


def twice_commands(train="build/gpu_check/tokens.bin", folder="build/gpu_check"):
    flags = ["-e", "d12", "-b", "4", "-t", str(SEQ), "-x", "6", "-v", "0", "--gap", "2",
             "--moments", "move", "--projection", "gaussian"]
    return [[TRAINER, "--train", train, *flags, "-n", "0", "-o", f"{folder}/{which}"]
            for which in ("first", "second")]


def twice(check):
    """
    Two runs with one seed agree bit for bit: in loss and norm of every step, to the last digit that
    is printed.
    """
    runs = []
    for command in twice_commands(data(check), str(check.folder)):
        shutil.rmtree(command[-1], ignore_errors=True)
        status, seconds, output = check.run(command, 60, "twice.log")
        if status != 0:
            raise Failed(f"{how_it_ended(status, seconds)}:\n{last_words(output, 3)}")
        runs.append([(r["step"], r["loss"], r["norm"])
                     for r in read_log(Path(command[-1]) / "log.jsonl")])
        shutil.rmtree(command[-1], ignore_errors=True)
    if runs[0] != runs[1] or len(runs[0]) != 6:
        raise Failed(f"the runs differ: {runs[0]} and {runs[1]}")
    return {"steps": len(runs[0])}


def torch_commands(model, batch=BATCH, steps=STEPS):
    compiled = "model" if model == "d12" else "block"  # a whole deep model takes minutes to compile
    shape = ["--model", model, "--batch", str(batch), "--seq", str(SEQ), "--steps", str(steps)]
    return [[sys.executable, "dev/torch_gpt2.py", *shape, "--compile", compiled]]


def time_torch(check, model):
    batch = check.batches.get(model, BATCH)
    if batch == 0:
        raise Failed("not one sequence of the trainer's own full-rank run fits into the free "
                     "memory")
    command, = torch_commands(model, batch)
    sampler = Sampler(check.device)
    try:
        status, seconds, output = check.run(command, 180, f"torch_{model}.log")
    finally:
        sampled = sampler.stop()
    if status == 3:
        raise NotHere(last_words(output, 1))
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if status != 0 or not lines:
        raise Failed(f"{how_it_ended(status, seconds)}:\n{last_words(output, 5)}")
    said = json.loads(lines[-1])
    records = [{"step": i + 1, "ms": ms, "loss": loss}
               for i, (ms, loss) in enumerate(zip(said.pop("ms"), said.pop("losses")))]
    figures = {"model": model, "rank": "1", "projection": None, "recompute": None, "batch": batch,
               "seq": SEQ, **said, **sampled}
    figures.update(step_figures(records, 0, batch * SEQ))
    figures.pop("tflops", None)  # the trainer's plan counts FLOPs, PyTorch does not
    if "ms" not in figures:
        raise Failed(f"only {figures['steps']} steps", figures)
    return figures

# ----------------------------------------------------------------------------
# the list of parts, the most important first


def all_parts():
    parts, timed = [], set()

    def timing(model, rank, projection, level, quick=False, optimizer="adamw"):
        setting = Setting(model, rank, projection, level, optimizer)
        if setting.name in timed:
            return
        timed.add(setting.name)
        command = timing_command(TRAINER, setting, BATCH, STEPS, "build/gpu_check/tokens.bin",
                                 "build/gpu_check/run")

        def act(check):
            return time_trainer(check, setting, steps=STEPS // 2 if check.options.quick else STEPS)

        commands = [plan_command(TRAINER, setting, BATCH), command]
        seconds = {"d12": 10, "d24": 15, "d48": 30}[model]
        parts.append(Part(setting.name, "timing", commands, act, seconds, quick))

    def sanitizers(precision, projection):
        for tool in TOOLS:
            def act(check, tool=tool):
                return sanitize(check, tool, precision, projection)

            name = f"{tool} {precision.lower()} {projection}"
            commands = sanitizer_commands(tool, precision, projection)
            quick = name == "memcheck bf16 sparse"
            parts.append(Part(name, "sanitizer", commands, act, 5, quick))

    def pytorch(model, seconds):
        parts.append(Part(f"PyTorch {model}", "timing", torch_commands(model),
                          lambda check: time_torch(check, model), seconds))

    def build_and_test(precision, quick):
        name, program = precision.lower(), "./" + binary("test_gpt2cu", precision)
        parts.append(Part("build " + name, "build", build_commands(precision),
                          lambda check: build(check, precision), 20, quick))
        parts.append(Part("test " + name, "test", [[program]],
                          lambda check: test(check, precision), 10, quick))

    build_and_test("BF16", True)
    build_and_test("FP32", False)
    for level in (0, 2):
        timing("d12", "1", "gaussian", level, True)
        timing("d12", "0.25", "sparse", level, True)
        timing("d12", "0.25", "gaussian", level, True)
        timing("d12", "0.25", "sparse", level, optimizer="muon")
        timing("d12", "1", "gaussian", level, optimizer="muon")
    timing("d12", "0.25", "sparse", 4)
    pytorch("d12", 40)
    parts.append(Part("kernel variants", "test", [["make", "-C", "dev/cuda"], *variant_commands()],
                      time_variants, 90))
    sanitizers("BF16", "sparse")
    sanitizers("BF16", "gaussian")
    sanitizers("BF16", "muon")
    parts.append(Part("same bits twice", "test", twice_commands(), twice, 10))
    for model, seconds in (("d24", 40), ("d48", 60)):
        timing(model, "1", "gaussian", 0)
        timing(model, "0.25", "sparse", 0)
        timing(model, "0.25", "gaussian", 0)
        timing(model, "0.25", "sparse", 0, optimizer="muon")
        timing(model, "0.25", "sparse", 2)
        timing(model, "0.125", "sparse", 5)
        pytorch(model, seconds)
    sanitizers("FP32", "sparse")
    # what is not timed above; at full rank the two projections are one setting
    for model, level, rank in itertools.product(MODELS, LEVELS, RANKS):
        for projection in ("gaussian", "sparse"):
            timing(model, rank, projection, level)
    return parts

# ----------------------------------------------------------------------------
# results


def safe(name):
    """For a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "unknown"


def describe(check, parts):
    """Everything that is known at this moment, for the JSON."""
    done = {record["name"] for record in check.records}
    now = datetime.datetime.now(datetime.timezone.utc)
    device = check.device
    return {"date": now.strftime("%Y-%m-%d %H:%M UTC"), "revision": check.options.revision,
            "device": device["name"], "driver": device["driver_version"],
            "cuda_toolkit": device["cuda toolkit"],
            "cuda_of_the_driver": device["cuda of the driver"], "details": device,
            "minutes": check.options.minutes, "seconds": round(time.monotonic() - check.began, 1),
            "parts": check.records,
            "left_out": [part.name for part in parts if part.name not in done]}


def write_results(check, parts):
    known = describe(check, parts)
    stem = f"{safe(known['device'])}-{safe(known['revision'])}"
    stem += "-quick" * check.options.quick  # what is not the whole does not take its place
    stem += "-part" * bool(check.options.only)
    folder = Path(check.options.out)
    folder.mkdir(parents=True, exist_ok=True)
    if check.stem is None:  # nor does one check that of another
        stems = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        check.stem = next(free for free in stems if not (folder / f"{free}.json").exists())
    stem = check.stem
    for ending, text in ((".json", json.dumps(known, indent=1) + "\n"), (".md", markdown(known))):
        (folder / (stem + ending + ".tmp")).write_text(text)
        os.replace(folder / (stem + ending + ".tmp"), folder / (stem + ending))
    return folder / (stem + ".md")


def table(head, rows):
    return "".join("| " + " | ".join(row) + " |\n" for row in [head, ["---"] * len(head), *rows])


def decimal(value, digits=0, unit=1.0):
    return "" if value is None else f"{value / unit:,.{digits}f}"


def timing_row(record, base):
    """base: ms at full rank with everything kept, of the same model and batch."""
    f, ms = record["figures"], record["figures"].get("ms")
    method = method_text(f["rank"], f["projection"], f.get("optimizer"))
    if record["name"].startswith("PyTorch"):
        method = "PyTorch"
    return [f["model"], str(f["batch"]), method, decimal(f["recompute"]), decimal(ms, 1),
            decimal(f.get("predicted_ms"), 1), decimal(f.get("tokens_per_second")),
            decimal(f.get("tflops")), decimal(f.get("mfu_percent")),
            decimal(base / ms, 2) if ms and base else "",
            decimal(f.get("plan_bytes"), 2, GIB), decimal(f.get("peak_bytes"), 2, GIB),
            decimal(f.get("largest_batch")), decimal(f.get("steps")),
            decimal(f.get("last_loss"), 4), "" if record["state"] == "ok" else record["state"]]


COLUMNS = f"""\
ms: median of the steps from the fifth; predicted: by dev/roofline.py, where it knows the card;
TFLOP/s: the plan's matrix products, recomputation and projection included; MFU: as the trainer
prints it. "full rank takes": the time of full rank with everything kept, level 0, in units of this
row's. plan: what the trainer allocates; peak: what the device's memory in use rose by, context and
libraries included. largest B: by the plan, with {100 * LIBRARIES:.0f} % of the free memory left to
libraries."""


def markdown(known):
    d = known["details"]
    text = f"# {known['device']}, revision {known['revision']}\n\n"
    text += f"{known['date']}; driver {known['driver']}, CUDA {known['cuda_toolkit']} "
    text += f"(driver's: {known['cuda_of_the_driver']}); compute capability {d['compute_cap']}; "
    text += f"memory {d['memory.total']} MiB, {d['memory.free']} free at the start; "
    text += f"clocks at the start: SM {d['clocks.sm']} of at most {d['clocks.max.sm']} MHz, "
    text += f"memory {d['clocks.mem']} MHz; power limit {d['power.limit']} W. "
    text += f"Took {known['seconds']:.0f} s of {60 * known['minutes']:.0f}.\n"
    checks = [r for r in known["parts"] if r["kind"] != "timing"]
    timings = [r for r in known["parts"] if r["kind"] == "timing" and r["figures"].get("model")]
    if checks:
        rows = [[r["name"], r["state"], decimal(r["seconds"]), check_words(r["figures"])]
                for r in checks]
        text += "\n## Builds, tests, compute-sanitizer\n\n"
        text += table(["part", "result", "s", ""], rows)
    if timings:
        base = {(f["model"], f["batch"]): f.get("ms")
                for f in (r["figures"] for r in timings)
                if f["rank"] == "1" and f["recompute"] == 0 and f.get("optimizer") != "muon"}
        rows = []
        for model in MODELS:
            for r in timings:
                if r["figures"]["model"] == model:
                    rows.append(timing_row(r, base.get((model, r["figures"]["batch"]))))
        head = ["model", "B", "method", "level", "ms", "predicted", "tokens/s", "TFLOP/s", "MFU %",
                "full rank takes", "plan GiB", "peak GiB", "largest B", "steps", "loss", ""]
        text += f"\n## Time of a step, B sequences of {SEQ} tokens, bf16\n\n" + table(head, rows)
        text += f"\n{COLUMNS}\n"
    for f in (r["figures"] for r in timings if "torch" in r["figures"]):
        text += f"\nPyTorch {f['torch']}, {f['model']}: {f['how']}; "
        text += f"micro batch {f['micro_batch']}; "
        text += f"its own peak {f['allocated_bytes'] / GIB:.2f} GiB.\n"
    for title, state in (("Failed", "failed"), ("Cut off", "cut off"),
                         ("Not on this machine", "not here")):
        rows = [r for r in known["parts"] if r["state"] == state]
        if rows:
            text += f"\n## {title}\n\n" + "".join(why_item(r) for r in rows)
    if known["left_out"]:
        text += "\n## Left out\n\n"
        text += ", ".join(name.replace(",", "") for name in known["left_out"]) + "\n"
    commands = [command for record in known["parts"] for command in record["commands"]]
    return text + "\n## Commands\n\n```\n" + "\n".join(commands) + "\n```\n"


def why_item(record):
    """The reason's first line, and what a program said below it."""
    first, *rest = record["why"].splitlines() or [""]
    below = "".join(f"      {line}\n" for line in rest)
    return f"- {record['name']}: {first}\n" + (f"\n{below}\n" if rest else "")


def check_words(figures):
    if "passed" in figures:
        return f"{figures['passed']} passed, {figures['failed']} failed"
    return figures.get("summary") or ""

# ----------------------------------------------------------------------------
# command line


def do_part(check, part):
    """Does a part and records it, however it ends."""
    began, check.commands = time.monotonic(), []
    record = {"name": part.name, "kind": part.kind, "state": "failed", "why": "interrupted",
              "figures": {}, "commands": check.commands}
    check.records.append(record)
    try:
        record.update(figures=part.act(check), state="ok", why="")
    except Failed as failure:
        record.update(state="cut off" if isinstance(failure, CutOff) else "failed",
                      why=str(failure), figures=failure.figures)
    except NoTime:
        check.records.remove(record)
    except NotHere as missing:
        record.update(state="not here", why=str(missing))
    except Exception as error:  # a defect of this script: the other parts are worth having
        record.update(why=f"{type(error).__name__}: {error}")
    finally:
        record["seconds"] = round(time.monotonic() - began, 1)
    return record


def one_line(record):
    f = record["figures"]
    why = record["why"].splitlines()[0] if record["why"] else ""
    if "ms" not in f:
        return why or check_words(f)
    words = f"{f['ms']:.1f} ms"
    if "predicted_ms" in f:
        words += f" ({f['predicted_ms']:.1f} predicted)"
    words += f", {f['tokens_per_second']:,.0f} tok/s"
    words += f", peak {decimal(f.get('peak_bytes'), 2, GIB) or '?'} GiB"
    if "plan_bytes" in f:
        words += f" of a plan of {f['plan_bytes'] / GIB:.2f}"
    return words + (f"; {why}" if why else "")


def parse_options():
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float,
                        help="ends within this time (default 9, with --quick 3); "
                        "what does not fit is left out")
    parser.add_argument("--quick", action="store_true",
                        help="bf16 only: the tests, d12 in six settings, memcheck")
    parser.add_argument("--only", metavar="TEXT",
                        help="only parts whose name contains this, and the builds")
    parser.add_argument("--out", metavar="DIR", default=str(ROOT / "dev/results"),
                        help="where the results go (dev/results)")
    parser.add_argument("--dry-run", action="store_true",
                        help="print what would be run, and stop; needs no GPU")
    options = parser.parse_args()
    if options.minutes is None:
        options.minutes = 3.0 if options.quick else 9.0
    if not 0.1 <= options.minutes <= 24 * 60:
        parser.error("--minutes: wants a number from 0.1 to 1440")
    options.out = os.path.abspath(options.out)
    return options


def main():
    options = parse_options()
    parts = all_parts()
    wanted = [part for part in parts if part.quick or not options.quick]
    if options.only:
        wanted = [part for part in wanted if options.only in part.name or part.kind == "build"]
    os.chdir(ROOT)
    options.revision = revision()
    if options.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # its reader may have seen enough
        for i, part in enumerate(wanted):
            print(f"{i + 1}. {part.name} (about {part.seconds} s)")
            for command in part.commands:
                print("     " + shown(command))
        print(f"until {options.minutes:g} minutes are up; B={BATCH}, "
              f"or what fits into the device's free memory less {100 * LIBRARIES:.0f} %")
        return 0
    check = Check(options, find_device())
    check.folder.mkdir(parents=True, exist_ok=True)
    held = os.open(check.folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this program ends, however it does
    except BlockingIOError:
        print(f"gpu_check.sh: {check.folder}: another check is at work there", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)
    print(f"{check.device['name']}, driver {check.device['driver_version']}, "
          f"CUDA {check.device['cuda toolkit']}, revision {options.revision}; "
          f"{options.minutes:g} minutes", flush=True)
    status, path = 0, None
    try:
        for part in wanted:
            if check.left() < (1 if part.kind == "build" else part.seconds):
                continue  # a shorter one may still fit; without a build there is nothing to do
            record = do_part(check, part)
            path = write_results(check, parts)
            if record not in check.records:
                continue
            at = time.monotonic() - check.began
            line = f"[{at:4.0f} s] {record['name']}: {record['state']}; {one_line(record)}"
            print(line.rstrip("; "), flush=True)
    except KeyboardInterrupt:
        check.stop_child()
        status = 130
    if check.records:
        path = write_results(check, parts)
    failed = [r["name"] for r in check.records if r["state"] == "failed"]
    left_out = [p.name for p in wanted if p.name not in {r["name"] for r in check.records}]
    if left_out:
        print(f"left out: {'; '.join(left_out)}")
    print(f"{len(check.records) - len(failed)} parts done, {len(failed)} failed"
          + ": " * bool(failed) + "; ".join(failed))
    if path:
        print(path)
    return status or (1 if failed else 0)


def interrupt(number, frame):
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
