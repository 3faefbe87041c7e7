#!/usr/bin/env python3
"""
Trains at several ranks, projections and so on, and compares loss, memory and speed. Runs the
trainer once for each combination of what is listed, and writes into --out: results.csv, results.md,
pictures, and a folder a run.

Whatever is not an option of this program goes to the trainer as it is: --train, -e, -b, --steps,
--lr (see the trainer's --help). What is not listed is as the trainer has it by default. Ratio 1 is
full rank, which knows no projection, gap, alpha, moments and compressed layers, and is run once per
optimizer, level and seed.

Not all combinations are wanted? --also "OPTIONS" adds those that this line would give with these
options in place of its own or after them, be they lists of this program or flags of the trainer; it
may be given several times.

Where several learning rates or weight decays are listed, each method is run at all pairs of them
with the first seed, and with the other seeds at its best pair.

Started again, it goes on: runs that are done stay as they are; those that failed or were cut off
begin anew. A run is known by the trainer's name, all its options, given or default, and what its
data hold: with any other it is another run.

example: ablate.py --ratios 1,1/2,1/4,64 --projections gaussian,sparse --seeds 1,2,3 \\
             --lr-sweep 1e-3,2e-3,4e-3 --out runs/sweep \\
             --also "--optimizers muon --ratios 1/4 --projections sparse --gap 100" \\
             --train input.txt -e d4 --channels 128 --context 128 -b 16 --steps 500
"""

import argparse
import contextlib
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from fractions import Fraction
from types import SimpleNamespace

import plot  # also makes data_prep/common.py known
import common
from common import Parser, Problem, whole_number
import numpy as np
from tqdm import tqdm

FIRST_STEPS = 5  # whose speed does not count: they touch memory first, and clocks settle
LAST_STEPS = 20  # whose mean is the final training loss: that of one step is noisy
MOST_ERRORS = 3  # standard errors by which means must differ to count; see RULE
COMPRESSION = {"projection": "projections", "gap": "gaps", "alpha": "alphas", "moments": "moments",
               "compress": "compress"}  # option: its list
NOT_RUN = "not run yet"
NOT_TAKEN, TAKEN, AT_EDGE = "not taken", "taken", "taken, at the edge of the list"
BLOCK, BLOCKS = 1 << 20, 64  # bytes that are read at once for a file's hash; how many are, at most
SHARED = ["out", "seeds", "jobs", "binary", "also"]  # what --also cannot change

# ----------------------------------------------------------------------------
# the command line


def meaning(text):
    """What a value is compared by: 0.5 and 5e-1 are one number, fc,qkv and qkv,fc one set."""
    try:
        return float(text)
    except ValueError:
        return frozenset(text.split(","))


def listed(kind=str, separator=","):
    """An argparse type: a list of values, each kept once."""
    def parse(text):
        values = [value.strip() for value in text.split(separator)]
        if not all(values):
            raise argparse.ArgumentTypeError(f"{text!r} is empty, or has an empty place; "
                                             f"values separated by {separator} are wanted")
        kept = {}
        for value in map(kind, values):
            kept.setdefault(meaning(value), value)
        return list(kept.values())
    return parse


def rank(text):
    """1/4 or 0.25 -> "0.25", and 64 -> "64" """
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = 0
    if not 0 < value <= 1 and (value < 1 or value.denominator > 1):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a ratio in (0, 1], such as 1/4 or "
                                         "0.25, nor a whole rank, such as 64")
    return f"{float(value):.9g}"


def rate(text):
    value = meaning(text)
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a learning rate above 0")
    return text


def decay(text):
    value = meaning(text)
    if not isinstance(value, float) or not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a weight decay of 0 or more")
    return text


def parse_options(words):
    """The options; .groups holds one for the command line and one for each --also."""
    parser = Parser(__doc__)
    parser.add_argument("-o", "--out", metavar="DIR", required=True,
                        help="where results and runs go")
    parser.add_argument("--ratios", metavar="LIST", type=listed(rank),
                        default=["1", "0.5", "0.25", "0.125"],
                        help="rank ratios (1,1/2,1/4,1/8); above 1: whole ranks, the same columns "
                        "for all layers")
    for name, what in (("optimizers", "say adamw,muon"),
                       ("projections", "say gaussian,sparse"),
                       ("gaps", "steps between new projections"),
                       ("alphas", "scales of the update"), ("moments", "say keep,move"),
                       ("levels", "of --recompute"), ("seeds", "")):
        parser.add_argument("--" + name, metavar="LIST", type=listed(), default=[None], help=what)
    parser.add_argument("--compress", metavar="LISTS", type=listed(separator="/"), default=[None],
                        help="lists of layers, separated by a slash: qkv,fc,fcproj/fc,fcproj")
    parser.add_argument("--lr-sweep", metavar="LIST", type=listed(rate), default=[None],
                        help="learning rates, of which each method takes its best")
    parser.add_argument("--decays", metavar="LIST", type=listed(decay), default=[None],
                        help="weight decays, likewise")
    parser.add_argument("--also", metavar="OPTIONS", action="append", default=[],
                        help="further combinations: this line, and these options after it")
    parser.add_argument("--jobs", metavar="N", type=whole_number(1, 1024), default=1,
                        help="runs at once (default: %(default)s)")
    parser.add_argument("--binary", metavar="FILE",
                        help="the trainer (default: train_gpt2_compactcu where it is built and "
                        "there is a GPU, else train_gpt2_compact, which make builds if it is "
                        "missing)")
    args, _ = parser.parse_known_args(words)
    args.groups = []
    for more in ["", *args.also]:
        try:
            group, group.trainer = parser.parse_known_args(words + shlex.split(more))
        except ValueError as error:
            raise Problem(f"--also: {more!r}: {error}") from None
        changed = [name for name in SHARED if getattr(group, name) != getattr(args, name)]
        if changed:
            raise Problem(f"--also: --{changed[0]} is one for all combinations; give it outside")
        args.groups.append(group)
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise Problem(f"--out: {args.out} is a file; a folder is wanted")
    return args


def choose_binary(given):
    if given:
        return os.path.abspath(given)
    cpu = os.path.join(plot.ROOT, "train_gpt2_compact")
    cuda = cpu + "cu"
    try:
        gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        has_gpu = gpus.returncode == 0 and gpus.stdout.startswith("GPU")
    except OSError:
        has_gpu = False
    if has_gpu and os.path.exists(cuda):
        return cuda
    if has_gpu:
        print("there is a GPU, but no train_gpt2_compactcu: make train_gpt2_compactcu",
              file=sys.stderr)
    if not os.path.exists(cpu):
        make = ["make", "-C", plot.ROOT, "train_gpt2_compact"]
        if subprocess.run(make, stdout=sys.stderr).returncode != 0:
            raise Problem("train_gpt2_compact is missing, and make, see above, could not build it")
    return cpu

# ----------------------------------------------------------------------------
# what to run


def list_methods(args):
    """The methods, each a dict of the trainer's options that are listed: all but the seed, the
    learning rate and the weight decay."""
    methods = []
    lists = [args.optimizers, args.ratios, args.levels,
             *(getattr(args, name) for name in COMPRESSION.values())]
    for optimizer, rank, level, *values in itertools.product(*lists):
        full_rank = {"rank": "1", "recompute": level, "optimizer": optimizer}
        method = dict(full_rank, rank=rank, **dict(zip(COMPRESSION, values)))
        if rank == "1" or method["compress"] == "none":
            method = full_rank
        method = {name: value for name, value in method.items() if value is not None}
        if method not in methods:
            methods.append(method)
    return methods


def rank_of(run):
    return 1 if plot.is_full_rank(run.options) else run.options["rank"]


def ratio_of(run):
    """The rank ratio; of a whole rank, the columns kept in all beside the inputs of the layers that
    keep them."""
    channels = next(tensor["shape"][-1] for tensor in run.plan["tensors"]
                    if tensor["name"] == "wte")
    inputs = [channels * (4 if layer == "fcproj" else 1)
              for layer in run.options["compress"].split(",")]
    rank = rank_of(run)
    return rank if rank <= 1 else sum(min(rank, n) for n in inputs) / sum(inputs)


def labels(runs, *leave_out):
    return plot.labels([run.options for run in runs], leave_out)


def environment(jobs):
    """The trainer's. Threads that wait give way, and runs at the same time share the cores."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    return {"OMP_WAIT_POLICY": "passive", **threads, **os.environ}


def ask_plan(args, flags):
    """A run's options and plan. Of bad flags the trainer itself says so, and that is the end."""
    try:
        done = subprocess.run([args.binary, "--plan=json", *flags], capture_output=True, text=True,
                              errors="replace", env=environment(args.jobs))
    except OSError as error:
        raise Problem(f"--binary: {args.binary} cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        sys.stderr.write(done.stderr or f"{args.binary}: ended with status {done.returncode}\n")
        sys.exit(2)
    try:
        plan = json.loads(done.stdout)
        return plan.pop("options"), plan
    except (ValueError, KeyError, AttributeError):
        raise Problem(f"--binary: {args.binary} printed no plan; is it the trainer, "
                      "and no --plan or --help among its flags?") from None


def data_files(flags):
    """The files whose content is data to the trainer, by its flags {option: paths}. A name that
    exists is a name, else a pattern."""
    parser = argparse.ArgumentParser(add_help=False)
    for names in (["-i", "--train"], ["-j", "--val"], ["--hellaswag"], ["-e", "--model"]):
        parser.add_argument(*names, default="")
    named = vars(parser.parse_known_args(flags)[0])
    found = {option: [name] if os.path.exists(name) else sorted(glob.glob(os.path.expanduser(name)))
             for option, name in named.items()}
    return {option: paths for option, paths in found.items()
            if paths and all(map(os.path.isfile, paths))}


def content(path):
    """A file's hash; of a large one, of blocks all over it."""
    info = os.stat(path)
    return hash_file(path, info.st_size, info.st_mtime_ns, info.st_ino)


@functools.cache
def hash_file(path, size, *_):
    found = hashlib.blake2b(str(size).encode(), digest_size=16)
    with common.reading(path), open(path, "rb") as file:
        for at in sorted({*range(0, size, max(BLOCK, size // BLOCKS)), max(0, size - BLOCK)}):
            file.seek(at)
            found.update(file.read(BLOCK))
    return found.hexdigest()


def data_of(flags):
    return {option: list(map(content, paths)) for option, paths in data_files(flags).items()}


def plan_run(args, group, method, seed, lr, decay):
    """One run: a method with a seed, a learning rate and a weight decay, where they are listed."""
    listed = {"seed": seed, "lr": lr, "weight-decay": decay}
    chosen = dict(method, **{name: value for name, value in listed.items() if value is not None})
    flags = [word for name, value in chosen.items() for word in ("--" + name, value)]
    flags += ["--checkpoint-every", "0", *group.trainer]
    options, plan = ask_plan(args, flags)
    for name, value in chosen.items():
        settled, wanted = meaning(str(options[name])), meaning(value)
        numbers = isinstance(settled, float) and isinstance(wanted, float)
        if settled != wanted and not (numbers and math.isclose(settled, wanted, rel_tol=1e-6)):
            raise Problem(f"--{name}: is {value} by what is listed, and {options[name]} by the "
                          "flags for the trainer; drop one of the two")
    if not options["train"]:
        raise Problem("--train: is missing; give it token shards or any text file")
    if options["steps"] < 1:
        raise Problem("--steps: is missing; a sweep compares runs of the same number of steps")
    # What makes it this run and no other. The bytes of the parameters tell a trainer for bf16 from
    # one for fp32.
    data = data_of(group.trainer)
    known = {name: value for name, value in options.items()
             if name not in [*plot.NO_MATTER, *data, "checkpoint-every"]
             and plot.has_meaning(options, name)}
    known.update(data=data, trainer=os.path.basename(args.binary),
                 parameters=plan["categories"]["parameters"])
    words = [f"{options['rank']:g}", options["projection"]]
    if plot.is_full_rank(options):
        words = ["full"]
    words += [name for name in [options.get("optimizer", "adamw")] if name != "adamw"]
    words += [f"r{options['recompute']}", f"lr{options['lr']:g}"]
    words += [f"c{decay}"] * (decay is not None) + [f"s{options['seed']}"]
    words += [hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]]
    # what all runs of the method have
    same = json.dumps({name: value for name, value in known.items() if name not in listed},
                      sort_keys=True)
    name = "-".join(words)
    return SimpleNamespace(group=group, chosen=method, same=same, lr=lr, decay=decay, flags=flags,
                           options=options, plan=plan, data=data, name=name,
                           folder=os.path.join(args.out, name), log=None, status=NOT_RUN, choice="")


def plan_first_seed(args):
    """The runs of the first seed: of each method one, or, where several learning rates or weight
    decays are listed, one for each pair."""
    runs = {}
    for group in args.groups:
        for method, lr, decay in itertools.product(list_methods(group), group.lr_sweep,
                                                   group.decays):
            run = plan_run(args, group, method, args.seeds[0], lr, decay)
            runs.setdefault(run.name, run)
    runs, numbers = list(runs.values()), {}
    for run in runs:
        run.method = numbers.setdefault(run.same, len(numbers))
    for run in runs:
        if sum(other.method == run.method for other in runs) > 1:
            run.choice = NOT_TAKEN
            if run.options["val-every"] == 0:
                raise Problem("--lr-sweep: chooses by validation loss, which --val-every 0 leaves "
                              "out")
    return runs


def plan_other_seeds(args, runs):
    found = []
    # a machine whose speed drifts then slows all methods alike
    for seed, run in itertools.product(args.seeds[1:], runs):
        found.append(plan_run(args, run.group, run.chosen, seed, run.lr, run.decay))
        found[-1].method, found[-1].choice = run.method, run.choice
    return found

# ----------------------------------------------------------------------------
# running


def take_log(run, folder):
    """Whether a folder holds the whole run; if so, the run's log is read."""
    try:
        log = plot.read_log(folder)
    except Problem:
        return False
    if len(log.steps) == 0 or log.steps[-1] < run.options["steps"]:
        return False
    run.log, run.plan, run.status = log, log.plan, "ok"
    return True


def train(run, args, bar, begin):
    """
    One run of the trainer, in a folder that gets its name when all is done. begin(command, ...)
    starts a process, or, when all are to stop, does not.
    """
    def changed():
        if data_of(run.group.trainer) != run.data:
            run.status = "failed, the data are not those with which the sweep began; start it again"
        return run.status.startswith("failed")
    if changed():
        return
    unfinished = run.folder + ".part"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished, exist_ok=True)
    bar.reset(run.options["steps"])
    bar.set_description(run.name)
    last = ""
    with open(os.path.join(unfinished, "output.txt"), "w", encoding="utf-8") as output:
        # Both outputs come through one pipe: should this program be killed, the trainer ends too,
        # at its next line.
        process = begin([args.binary, "--out", unfinished, *run.flags], env=environment(args.jobs),
                        text=True, errors="replace", stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        if process is None:
            return
        for line in process.stdout:
            output.write(line)
            last = line.strip() or last
            step = re.match(r"step (\d+)/\d+ \| loss ([^ ]+)", line)
            if step:
                bar.set_postfix_str(f"loss {step[2]}", refresh=False)
                bar.update(int(step[1]) - bar.n)
        process.stdout.close()
        status = process.wait()
    if changed():
        return
    if status == 0 and take_log(run, unfinished):
        shutil.rmtree(run.folder, ignore_errors=True)
        os.rename(unfinished, run.folder)
        return
    how = "ended without its last step"
    if status != 0:
        how = f"ended by signal {-status}" if status < 0 else f"status {status}"
    run.status = f"failed, {how}: {last}"


def train_all(runs, args, finished):
    """
    Trains runs, some at once, and calls finished(run) after each. Whatever ends this early ends the
    trainers too.
    """
    processes, stopped, lock, bars = {}, threading.Event(), threading.Lock(), queue.Queue()
    for i in range(min(args.jobs, len(runs))):
        bars.put(tqdm(total=1, position=i + 1, leave=False, unit="step", disable=None))

    def work(run):
        def begin(command, **settings):
            with lock:
                if not stopped.is_set():
                    processes[run.name] = subprocess.Popen(command, **settings)
                    return processes[run.name]
        bar = bars.get()
        train(run, args, bar, begin)
        with lock:
            processes.pop(run.name, None)
        if stopped.is_set():
            shutil.rmtree(run.folder + ".part", ignore_errors=True)
        bars.put(bar)
        return run

    pool = ThreadPoolExecutor(args.jobs)
    try:
        for future in as_completed([pool.submit(work, run) for run in runs]):
            finished(future.result())
    finally:
        with lock:
            stopped.set()
            for process in processes.values():
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)
        pool.shutdown(cancel_futures=True)
        while not bars.empty():
            bars.get().close()


def choose_best(runs):
    """Marks of each method that has several runs, all of one seed, the one with the lowest
    validation loss. Returns those."""
    best = []
    for number in dict.fromkeys(run.method for run in runs if run.choice):
        tried = [run for run in runs if run.method == number]
        whole = [run for run in tried if run.log]
        if any(val_loss(run) is None for run in whole):
            raise Problem("--lr-sweep: chooses by validation loss, and there is none; give --val")
        if whole:
            taken = min(whole, key=lambda run: (math.isnan(val_loss(run)), val_loss(run)))
            lists = [{run.options[name] for run in tried} for name in ("lr", "weight-decay")]
            at = [taken.options[name] for name in ("lr", "weight-decay")]
            edge = any(len(values) > 1 and value > 0 and value in (min(values), max(values))
                       for values, value in zip(lists, at))
            taken.choice = AT_EDGE if edge else TAKEN
            best.append(taken)
    return best


def stands(run):
    """Whether a run stands for its method: of those between which it chooses, only the best one
    does."""
    return run.choice != NOT_TAKEN


def counts(run):
    return run.log is not None and stands(run)

# ----------------------------------------------------------------------------
# results


def speed(log):
    """Tokens per second, the median without the first steps."""
    return float(np.median(log.speeds[min(FIRST_STEPS, len(log.speeds) - 1):]))


def val_loss(run):
    return float(run.log.val_losses[-1]) if run.log and len(run.log.val_losses) else None


def perplexity(loss):
    """exp of a loss; infinite where a double cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def row_of(run, baseline):
    """A run's figures, {column: value}; None where there is none. baseline: {seed: validation
    loss}."""
    row = {"name": run.name, "rank": rank_of(run), "optimizer": run.options.get("optimizer"),
           **{name: run.options[name] if plot.has_meaning(run.options, name) else None
              for name in COMPRESSION}}
    row.update(level=run.options["recompute"], seed=run.options["seed"], lr=run.options["lr"],
               weight_decay=run.options["weight-decay"], choice=run.choice,
               steps=run.options["steps"])
    row.update(dict.fromkeys(["final_train_loss", "final_val_loss", "perplexity", "bits_per_byte",
                              "best_val_loss", "perplexity_above_full_rank_percent"]))
    row.update(plan_bytes=run.plan["total_bytes"],
               full_rank_bytes=run.plan["full_rank_total_bytes"],
               flops_per_token=run.plan["flops_per_token"]["total"], tokens_per_second=None,
               seconds=None, status=run.status)
    if run.log:
        row.update(final_train_loss=float(run.log.losses[-LAST_STEPS:].mean()),
                   tokens_per_second=speed(run.log), seconds=run.log.ms.sum() / 1e3)
    if val_loss(run) is not None:
        base = baseline.get(row["seed"])
        row.update(final_val_loss=val_loss(run), perplexity=perplexity(val_loss(run)),
                   bits_per_byte=run.log.bits_per_byte,
                   best_val_loss=float(run.log.val_losses.min()),
                   perplexity_above_full_rank_percent=None if base is None
                   else 100 * (perplexity(val_loss(run) - base) - 1))
    return row


def baseline_of(runs):
    """The method that all are compared with: full rank, the first one listed, with AdamW if there
    is one."""
    full_rank = [(run.options.get("optimizer", "adamw") != "adamw", run.method) for run in runs
                 if plot.is_full_rank(run.options)]
    return min(full_rank)[1] if full_rank else None


def judge(those, base):
    """What the runs of a method count as beside those of the baseline. See RULE."""
    failed = sum(not run.log for run in those)
    if failed:
        return f"{failed} failed"
    losses, base = ([val_loss(run) for run in runs if val_loss(run) is not None]
                    for runs in (those, base))
    if min(len(losses), len(base)) < 2:
        return ""
    (mean, deviation), (wanted, spread) = map(plot.mean_and_deviation, (losses, base))
    error = math.sqrt(deviation**2 / len(losses) + spread**2 / len(base))
    if abs(mean - wanted) <= MOST_ERRORS * error:
        return "alike"
    return "**better**" if mean < wanted else "worse"


RULE = f"""
A method counts as **better** (or worse) than the baseline if the mean of its validation losses
over seeds is lower (higher) by more than {MOST_ERRORS} standard errors of the difference of the
means, √(s₁²/n₁ + s₂²/n₂), with s the standard deviation over n seeds; else the two are alike: these
runs do not tell them apart. Of methods that do not differ, with three seeds each, about 4 in 100
count as better or worse by chance. One seed counts for nothing.
"""


def write_whole(path, text):
    with common.whole_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # file names need not be valid text


def keep_earlier(args, runs):
    """What another sweep has left in the folder: its tables get another name, and of runs or files
    that it did not finish nothing is left."""
    for entry in list(os.scandir(args.out)):
        if entry.name.endswith(".part") and os.path.exists(os.path.join(entry.path, "output.txt")):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif re.fullmatch(r"(results\.\w+|\w+\.png)\.tmp", entry.name):
            os.remove(entry.path)
    try:
        with open(os.path.join(args.out, "results.csv"), encoding="utf-8", errors="replace",
                  newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return
    names, seeds = {run.name for run in runs}, {str(run.options["seed"]) for run in runs[:1]}
    later = set(args.seeds) - seeds  # whose runs are known when a best one is
    if all(row.get("name") in names or row.get("seed") in later for row in rows):
        return
    number = next(i for i in itertools.count(1)
                  if not os.path.exists(os.path.join(args.out, f"results_{i}.csv")))
    for ending in ("md", "csv"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(os.path.join(args.out, f"results.{ending}"),
                      os.path.join(args.out, f"results_{number}.{ending}"))
    print(f"the tables of another sweep, which were in {args.out}, are results_{number}.md and "
          f"results_{number}.csv now")


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n"
                   for line in lines)


def shown(column, value):
    """A figure for the eye."""
    if value is None or value == "":
        return ""
    if column == "rank":
        return plot.rank_text(value)
    if column == "perplexity":
        return f"{value:,.3f}" if value < 1e4 else f"{value:.3g}"
    if column.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if column.endswith("_loss") or column == "bits_per_byte":
        return f"{value:.4f}"
    if column.endswith("_percent"):
        return f"{value:+.2f}" if value < 1e4 else f"{value:+.3g}"
    if column == "flops_per_token":
        return f"{value / 1e6:,.2f} M"
    if column == "tokens_per_second":
        return f"{value:,.0f}"
    if column == "seconds":
        return f"{value:.1f}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def over_seeds(column, rows):
    """Mean and standard deviation, as far as there are several values."""
    values = [row[column] for row in rows if row[column] is not None]
    if not values:
        return ""
    mean, deviation = plot.mean_and_deviation(values)
    if len(values) == 1 or not math.isfinite(mean):
        return shown(column, mean)
    return f"{shown(column, mean)} ± {shown(column, deviation).lstrip('+')}"


def markdown(args, runs, rows, pictures):
    text = "# Sweep\n\n"
    logs = [run.log for run in runs if run.log]
    if logs:
        text += f"- device: {'; '.join(dict.fromkeys(log.device for log in logs))}\n"
        revisions = dict.fromkeys(log.revision for log in logs)
        text += f"- trainer's revision: {'; '.join(revisions)}\n"
    text += f"- command: `{shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])}`\n"
    if args.jobs > 1:
        text += f"- {args.jobs} runs at once: their speeds are lower than that of one alone\n"

    those = [run for run in runs if counts(run)]
    names = {run.method: name or "all"
             for run, name in zip(those, labels(those, "seed", "lr", "weight-decay"))}
    if names:
        base = baseline_of(those)
        figures = ["final_val_loss", "perplexity", "perplexity_above_full_rank_percent",
                   "bits_per_byte"]
        head = ["method", "runs", "lr", "weight decay", "validation loss", "perplexity",
                "above the baseline, %", "bits per byte", "counts as", "memory", "of full rank's",
                "tokens/s", "FLOPs per token"]
        lines = []
        for number, name in names.items():
            chosen = [row for run, row in zip(runs, rows) if run.method == number and counts(run)]
            first, plan = chosen[0], chosen[0]["plan_bytes"]
            tried = [run for run in runs
                     if run.method == number and stands(run) and run.status != NOT_RUN]
            verdict = judge(tried, [run for run in those if run.method == base])
            lines.append([name, len(chosen),
                          f"{first['lr']:g}" + " (edge)" * (first["choice"] == AT_EDGE),
                          f"{first['weight_decay']:g}",
                          *(over_seeds(column, chosen) for column in figures),
                          "baseline" if number == base else verdict,
                          shown("plan_bytes", plan),
                          f"{100 * plan / first['full_rank_bytes']:.0f} %",
                          over_seeds("tokens_per_second", chosen),
                          shown("flops_per_token", first["flops_per_token"])])
        if not any(line[head.index("bits per byte")] for line in lines):
            for line in [head, *lines]:
                del line[7]
        text += "\n## Methods\n\nMean ± standard deviation over seeds. The memory is all that a "
        text += "run takes, by its plan; the speed is the median of all steps but the first "
        text += f"{FIRST_STEPS}.\n\n"
        text += table(head, lines) + (RULE if base is not None else "")
        if any(run.choice == AT_EDGE for run in those):
            text += "\n**(edge): best at the edge of the list of learning rates or weight decays; "
            text += "a wider one may have better.**\n"
    text += "".join(f"\n![{os.path.basename(path)}]({os.path.basename(path)})\n"
                    for path in pictures)

    differing, alike = [], []
    for column in rows[0]:
        values = [row[column] for row in rows if row[column] is not None]
        if len(set(map(str, values))) > 1:
            differing.append(column)
        elif values and values[0] != "":
            alike.append(f"{column} {shown(column, values[0])}")
    text += f"\n## Runs\n\nThe training loss is the mean of the last {LAST_STEPS} steps. The "
    text += "seconds are those of the training steps alone. Alike in all runs that have it: "
    text += ", ".join(alike) + ".\n\n"
    text += table([column.replace("_", " ") for column in differing],
                  [[shown(column, row[column]) for column in differing] for row in rows])
    return text


def write_tables(args, runs, pictures=()):
    runs = sorted(runs, key=lambda run: run.method)
    base = baseline_of(runs)
    baseline = {run.options["seed"]: val_loss(run)
                for run in runs if counts(run) and run.method == base}
    rows = [row_of(run, baseline) for run in runs]
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(os.path.join(args.out, "results.csv"), out.getvalue())
    write_whole(os.path.join(args.out, "results.md"), markdown(args, runs, rows, pictures))


def draw(args, runs):
    """The pictures, of the runs that are done. Returns their paths."""
    those = sorted(filter(counts, runs), key=lambda run: run.method)
    methods = list(dict.fromkeys(run.method for run in those))
    # A line is one way to compress, and its points are the ranks, whole ones apart; each full rank
    # is a line. A line has a colour, a rank a marker.
    lines = {run.method: ", ".join(filter(None, [name, "whole rank" * (rank_of(run) > 1)]))
             for run, name in zip(those, labels(those, "rank", "seed", "lr", "weight-decay"))}
    compressed = [run for run in those if not plot.is_full_rank(run.options)]
    # the lowest ratio has all lines, in the order of the lists; ratio 1 has not
    order = dict.fromkeys(lines[run.method] for run in sorted(compressed, key=ratio_of))
    numbers = {line: number for number, line in enumerate(order, 1)}
    ranks = sorted({rank_of(run) for run in compressed}, key=lambda rank: (rank > 1, -rank))
    markers = dict(zip(ranks, itertools.cycle(plot.MARKERS)))
    full = list(dict.fromkeys(run.method for run in those if plot.is_full_rank(run.options)))

    def look_of_line(run):
        if plot.is_full_rank(run.options):  # a star; the first is black
            return dict(plot.look(0), color=str(0.35 * full.index(run.method) % 1), marker="*",
                        markersize=10, linestyle="none")
        number = numbers[lines[run.method]]
        # as long as they last, each colour has its own dashes
        return plot.look(number, number - 1 if len(numbers) <= 6 else None)

    def look_of_method(run):
        if plot.is_full_rank(run.options):
            return dict(look_of_line(run), linestyle="-")
        if len(numbers) > 6 or len(ranks) > 7:  # too few colours, or markers
            return plot.look(1 + methods.index(run.method))
        return plot.look(numbers[lines[run.method]], ranks.index(rank_of(run)))

    def series(x, y, by_rank=False):
        """For plot.draw_series; x and y are functions of a run. by_rank: the markers are those of
        the ranks."""
        groups, starts, found = {}, {}, []
        for run in sorted(those, key=ratio_of, reverse=True):
            if y(run) is not None:
                line = lines[run.method]
                number = 0 if plot.is_full_rank(run.options) else numbers[line]
                groups.setdefault((number, line), {}).setdefault(rank_of(run), []).append(run)
        for (number, line), points in sorted(groups.items()):  # full rank comes first
            whole, run = number == 0, next(iter(points.values()))[0]
            same, look = (run.options["recompute"], run.options.get("optimizer")), look_of_line(run)
            points = [(x(those[0]), [y(run) for run in those],
                       markers[rank] if by_rank and not whole else look["marker"])
                      for rank, those in points.items()]
            if whole:
                starts[same] = (points[0][0], plot.mean_and_deviation(points[0][1])[0])
            label = line or run.options["projection"]
            if whole:
                label = ", ".join(filter(None, ["full rank", line]))
            start = None if whole else starts.get(same)
            found.append(SimpleNamespace(label=label, look=look, points=points, start=start))
        return found

    def memory(run):
        return run.plan["total_bytes"] / size

    def flops(run):
        return run.plan["flops_per_token"]["total"] / 1e6

    paths = []

    def path(name):
        paths.append(os.path.join(args.out, name))
        return paths[-1]

    unit, size = "MiB", 2**20
    if any(run.plan["total_bytes"] >= 2**30 for run in those):
        unit, size = "GiB", 2**30
    loss, plan = "final validation loss (nats per token)", f"memory of a run ({unit})"
    told = {marker: f"rank {plot.rank_text(rank)}" for rank, marker in markers.items()}
    if those:
        names = [name or run.name for run, name in zip(those, labels(those, "seed"))]
        plot.draw_curves([run.log for run in those], names, [look_of_method(run) for run in those],
                         path("curves.png"))
    if any(val_loss(run) is not None for run in those):
        ticks = {ratio_of(run): plot.rank_text(ratio_of(run)) for run in those}
        plot.draw_series(series(ratio_of, val_loss), path("loss_ratio.png"),
                         "Loss against rank ratio", "rank ratio", loss, ticks)
        plot.draw_series(series(memory, val_loss, True), path("loss_memory.png"),
                         "Loss against memory", plan, loss, markers=told, frontier=True)
        plot.draw_series(series(flops, val_loss, True), path("loss_flops.png"),
                         "Loss against matrix FLOPs",
                         "FLOPs of matrix products per token (millions)", loss, markers=told,
                         frontier=True)
    if those:
        plot.draw_series(series(memory, lambda run: speed(run.log), True), path("speed_memory.png"),
                         "Speed against memory", plan, "speed (tokens per second)", markers=told)
    swept = [run for run in runs if run.choice and run.log and run.method in methods
             and run.options["seed"] == runs[0].options["seed"]]
    if len({run.options["lr"] for run in swept}) > 1:
        groups = {}
        for run, name in zip(swept, labels(swept, "lr")):
            groups.setdefault((run.method, name), []).append(run)
        found = []
        for (number, name), same in groups.items():
            same = sorted(same, key=lambda run: run.options["lr"])
            decays = sorted({run.options["weight-decay"] for run in swept if run.method == number})
            look = look_of_method(same[0])
            if len(decays) > 1:
                look["linestyle"] = plot.DASHES[decays.index(same[0].options["weight-decay"]) % 4]
            points = [(run.options["lr"], [val_loss(run)], look["marker"]) for run in same]
            found.append(SimpleNamespace(label=name or "all", look=look, points=points, start=None))
        ticks = {lr: f"{lr:g}" for lr in sorted({run.options["lr"] for run in swept})}
        plot.draw_series(found, path("loss_lr.png"), "Loss against learning rate",
                         "highest learning rate", loss, ticks)
    return paths

# ----------------------------------------------------------------------------
# the program


def main():
    args = parse_options(sys.argv[1:])
    args.binary = choose_binary(args.binary)
    first = plan_first_seed(args)
    with common.holding(args.out):
        sweep(args, first)


def sweep(args, first):
    """Trains the runs of the first seed and what follows from them, and writes tables and
    pictures."""
    runs = first + plan_other_seeds(args, [run for run in first if not run.choice])
    keep_earlier(args, runs)
    sys.stdout.reconfigure(line_buffering=True)
    methods = {run.method for run in runs}
    total = len(first) + len(methods) * (len(args.seeds) - 1)
    print(f"methods: {len(methods)}; runs: {total}; trainer: {args.binary}")
    overall = tqdm(total=total, unit="run", disable=None)

    def finished(run):
        loss = val_loss(run)
        overall.write(f"{run.name}: {run.status if loss is None else f'val {loss:.4f}'}")
        overall.update(1)
        write_tables(args, runs)

    def train_rest(some):
        rest = [run for run in some if not take_log(run, run.folder)]
        if len(rest) < len(some):
            overall.write(f"{len(some) - len(rest)} of {len(some)} runs are done already")
            overall.update(len(some) - len(rest))
        write_tables(args, runs)
        train_all(rest, args, finished)

    train_rest(runs)
    others = plan_other_seeds(args, choose_best(first))
    if others:
        runs += others
        train_rest(others)
    overall.close()
    write_tables(args, runs, draw(args, runs))
    failed = [run for run in runs if not run.log]
    for run in failed:
        print(f"{run.name}: {run.status}", file=sys.stderr)
    for run in runs:
        if run.choice == AT_EDGE and run in first:
            print(f"{run.name}: its learning rate or weight decay is the best of the list, and at "
                  "its edge: a wider list may have a better one", file=sys.stderr)
    print(f"{len(runs) - len(failed)} of {len(runs)} runs are done: "
          f"{os.path.join(args.out, 'results.md')}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    common.run(main)
