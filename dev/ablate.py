#!/usr/bin/env python3
"""
Trains at several rank ratios, projections and so on, and compares loss, memory and speed. Runs the trainer once for each
combination of what is listed, and writes into --out: results.csv, results.md, pictures, and a folder a run.

Whatever is not an option of this program goes to the trainer as it is: --train, -e, -b, --steps, --lr (see the trainer's
--help). What is not listed is as the trainer has it by default. Ratio 1 is full rank, which knows no projection, gap, alpha,
moments and compressed layers, and is run once per level and seed; if eigen is among --projections, its whole basis as well.

Started again, it goes on: runs that are done stay as they are; those that failed or were cut off begin anew. A run is
known by the trainer's name and all its options, given or default: with another option it is another run.

example: ablate.py --ratios 1,1/2,1/4,1/8 --projections gaussian,sparse --seeds 1,2,3 --out runs/sweep \\
             --train input.txt -e d4 --channels 128 --context 128 -b 16 --steps 500 --lr 1e-3
"""

import argparse
import csv
import fcntl
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

FIRST_STEPS = 5  # they also pay for touching memory and for clocks to settle: their speed does not count
LAST_STEPS = 20  # whose mean is the final training loss: that of one step is noisy
COMPRESSION = {"projection": "projections", "gap": "gaps", "refresh-iterations": "refresh", "alpha": "alphas", "moments": "moments",
               "compress": "compress"}  # option: its list
AT_EDGE = "taken, at the edge of the list"

# ---------------------------------------------------------------------------- the command line


def meaning(text):
    """What a value is compared by: 0.5 and 5e-1 are one number, fc,qkv and qkv,fc one set of layers."""
    try:
        return float(text)
    except ValueError:
        return frozenset(text.split(","))


def listed(kind=str, separator=","):
    """An argparse type: a list of values, each kept once."""
    def parse(text):
        values = [value.strip() for value in text.split(separator)]
        if not all(values):
            raise argparse.ArgumentTypeError(f"{text!r} is empty, or has an empty place; values separated by {separator} are wanted")
        kept = {}
        for value in map(kind, values):
            kept.setdefault(meaning(value), value)
        return list(kept.values())
    return parse


def ratio(text):
    """1/4 or 0.25 -> "0.25" """
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = 0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio in (0, 1], such as 1/4 or 0.25")
    return f"{float(value):.9g}"


def rate(text):
    value = meaning(text)
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a learning rate above 0")
    return text


def parse_options(words):
    parser = Parser(__doc__)
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="where results and runs go")
    parser.add_argument("--ratios", metavar="LIST", type=listed(ratio), default=["1", "0.5", "0.25", "0.125"], help="rank ratios (1,1/2,1/4,1/8)")
    for name, what in (("projections", "say gaussian,sparse,eigen"), ("gaps", "steps between new projections"),
                       ("refresh", "of --refresh-iterations; only eigen has them"), ("alphas", "scales of the update"),
                       ("moments", "say keep,move"), ("levels", "of --recompute"), ("seeds", "")):
        parser.add_argument("--" + name, metavar="LIST", type=listed(), default=[None], help=what)
    parser.add_argument("--compress", metavar="LISTS", type=listed(separator="/"), default=[None],
                        help="lists of layers, separated by a slash: qkv,fc,fcproj/fc,fcproj")
    parser.add_argument("--lr-sweep", metavar="LIST", type=listed(rate), default=[None],
                        help="learning rates; each method is run at all of them with the first seed, with the other seeds at its best one")
    parser.add_argument("--jobs", metavar="N", type=whole_number(1, 1024), default=1, help="runs at once (default: %(default)s)")
    parser.add_argument("--binary", metavar="FILE", help="the trainer (default: train_gpt2_compactcu where it is built and there is a GPU, "
                        "else train_gpt2_compact, which make builds if it is missing)")
    args, args.trainer = parser.parse_known_args(words)
    if len(args.lr_sweep) == 1 and args.lr_sweep[0]:
        raise Problem("--lr-sweep: wants two rates or more; for one, --lr")
    if args.refresh != [None] and "eigen" not in args.projections:
        raise Problem("--refresh: only eigen has iterations; --projections, which must list it, does not")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise Problem(f"--out: {args.out} is a file; a folder is wanted")
    return args


def choose_binary(given):
    if given:
        return os.path.abspath(given)
    cuda, cpu = (os.path.join(plot.ROOT, name) for name in ("train_gpt2_compactcu", "train_gpt2_compact"))
    try:
        gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        has_gpu = gpus.returncode == 0 and gpus.stdout.startswith("GPU")
    except OSError:
        has_gpu = False
    if has_gpu and os.path.exists(cuda):
        return cuda
    if has_gpu:
        print("there is a GPU, but no train_gpt2_compactcu: make train_gpt2_compactcu", file=sys.stderr)
    if not os.path.exists(cpu) and subprocess.run(["make", "-C", plot.ROOT, os.path.basename(cpu)], stdout=sys.stderr).returncode != 0:
        raise Problem(f"{os.path.basename(cpu)} is missing, and make, see above, could not build it")
    return cpu

# ---------------------------------------------------------------------------- what to run


def list_methods(args):
    """The methods, each a dict of the trainer's options that are listed: all but the seed and the learning rate."""
    methods = []
    for rank, level, *values in itertools.product(args.ratios, args.levels, *(getattr(args, name) for name in COMPRESSION.values())):
        full_rank = {"rank": "1", "recompute": level}
        method = dict(full_rank, rank=rank, **dict(zip(COMPRESSION, values)))
        eigen = method["projection"] == "eigen"
        if not eigen:
            method["refresh-iterations"] = None
        if rank == "1" or method["compress"] == "none":
            methods.append(full_rank)
        if (rank != "1" or eigen) and method["compress"] != "none":
            methods.append(method)
    methods = [{name: value for name, value in method.items() if value is not None} for method in methods]
    return [method for i, method in enumerate(methods) if method not in methods[:i]]


def ratio_of(run):
    return 1 if plot.is_full_rank(run.options) else run.options["rank"]


def labels(runs, *leave_out):
    return plot.labels([run.options for run in runs], leave_out)


def environment(jobs):
    """The trainer's. Threads that wait give way, and runs at the same time share the cores."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    return {"OMP_WAIT_POLICY": "passive", **threads, **os.environ}


def ask_plan(args, flags):
    """A run's options and plan. What the trainer does not like it says itself, and that is the end."""
    try:
        done = subprocess.run([args.binary, "--plan=json", *flags], capture_output=True, text=True, errors="replace", env=environment(args.jobs))
    except OSError as error:
        raise Problem(f"--binary: {args.binary} cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        sys.stderr.write(done.stderr or f"{args.binary}: ended with status {done.returncode}\n")
        sys.exit(2)
    try:
        plan = json.loads(done.stdout)
        return plan.pop("options"), plan
    except (ValueError, KeyError, AttributeError):
        raise Problem(f"--binary: {args.binary} printed no plan; is it the trainer, and no --plan or --help among its flags?") from None


def plan_run(args, number, method, seed, lr):
    """One run: method `number` with a seed and a learning rate, where they are listed."""
    chosen = dict(method, **({"seed": seed} if seed else {}), **({"lr": lr} if lr else {}))
    flags = [word for name, value in chosen.items() for word in ("--" + name, value)] + args.trainer
    options, plan = ask_plan(args, flags)
    for name, value in chosen.items():
        settled, wanted = meaning(str(options[name])), meaning(value)
        if settled != wanted and not (isinstance(settled, float) and isinstance(wanted, float) and math.isclose(settled, wanted, rel_tol=1e-6)):
            raise Problem(f"--{name}: is {value} by what is listed, and {options[name]} by the flags for the trainer; drop one of the two")
    if method["rank"] == "1" and "projection" not in method and not plot.is_full_rank(options):
        raise Problem("--projection: eigen, for which ratio 1 is not full rank, is to be listed by --projections")
    if not options["train"]:
        raise Problem("--train: is missing; give it token shards or any text file")
    if options["steps"] < 1:
        raise Problem("--steps: is missing; a sweep compares runs of the same number of steps")
    if lr and options["val-every"] == 0:
        raise Problem("--lr-sweep: chooses by validation loss, which --val-every 0 leaves out")
    # What makes it this run and no other. The bytes of the parameters tell a trainer for bf16 from one for fp32.
    known = [{name: value for name, value in options.items() if name not in plot.NO_MATTER}, os.path.basename(args.binary),
             plan["categories"]["parameters"]]
    words = ["full"] if plot.is_full_rank(options) else [f"{options['rank']:g}", options["projection"]]
    words += [f"r{options['recompute']}", f"lr{options['lr']:g}", f"s{options['seed']}"]
    words += [hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]]
    name = "-".join(words)
    return SimpleNamespace(method=number, lr=lr, flags=flags, options=options, plan=plan, name=name, folder=os.path.join(args.out, name),
                           log=None, status="not run yet", lr_choice="not taken" if lr else "")

# ---------------------------------------------------------------------------- running


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
    """One run of the trainer, in a folder that gets its name when all is done. begin(command, ...) starts a process, or, when
    all are to stop, does not."""
    unfinished = run.folder + ".part"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    bar.reset(run.options["steps"])
    bar.set_description(run.name)
    last = ""
    with open(os.path.join(unfinished, "output.txt"), "w", encoding="utf-8") as output:
        # Both outputs come through one pipe: should this program be killed, the trainer ends as well, at its next line.
        process = begin([args.binary, "--out", unfinished, *run.flags], env=environment(args.jobs), text=True, errors="replace",
                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
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
    if status == 0 and take_log(run, unfinished):
        shutil.rmtree(run.folder, ignore_errors=True)
        os.rename(unfinished, run.folder)
    else:
        how = f"ended by signal {-status}" if status < 0 else f"status {status}" if status else "ended without its last step"
        run.status = f"failed, {how}: {last}"


def train_all(runs, args, finished):
    """Trains runs, some at once, and calls finished(run) after each. Whatever ends this early ends the trainers too."""
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


def choose_rates(runs, rates):
    """Marks for each method, all of whose runs have the same seed, the run with the lowest validation loss. Returns {method: that run}."""
    edges = [min(rates, key=float), max(rates, key=float)]
    best = {}
    for number in dict.fromkeys(run.method for run in runs):
        tried = [run for run in runs if run.method == number]
        whole = [run for run in tried if run.log]
        if any(len(run.log.val_losses) == 0 for run in whole):
            raise Problem("--lr-sweep: chooses by validation loss, and there is none; give --val")
        if whole:
            taken = min(whole, key=lambda run: run.log.val_losses[-1])
            taken.lr_choice = AT_EDGE if taken.lr in edges else "taken"
            best[number] = taken
    return best


def counts(run):
    """Whether a run is done and stands for its method: of a sweep of learning rates, only those at the method's best one do."""
    return run.log is not None and run.lr_choice != "not taken"

# ---------------------------------------------------------------------------- results


def speed(log):
    """Tokens per second, the median without the first steps."""
    return float(np.median(log.speeds[min(FIRST_STEPS, len(log.speeds) - 1):]))


def val_loss(run):
    return float(run.log.val_losses[-1]) if run.log and len(run.log.val_losses) else None


def row_of(run, full_rank):
    """A run's figures, {column: value}; None where there is none. full_rank: {(level, seed): validation loss}."""
    row = {"name": run.name, "ratio": ratio_of(run), **{name: run.options[name] if plot.has_meaning(run.options, name) else None for name in COMPRESSION}}
    row.update(level=run.options["recompute"], seed=run.options["seed"], lr=run.options["lr"], lr_choice=run.lr_choice, steps=run.options["steps"])
    row.update(dict.fromkeys(["final_train_loss", "final_val_loss", "best_val_loss", "perplexity_above_full_rank_percent"]))
    row.update(plan_bytes=run.plan["total_bytes"], full_rank_bytes=run.plan["full_rank_total_bytes"],
               flops_per_token=run.plan["flops_per_token"]["total"], tokens_per_second=None, seconds=None, status=run.status)
    if run.log:
        row.update(final_train_loss=float(run.log.losses[-LAST_STEPS:].mean()), tokens_per_second=speed(run.log), seconds=run.log.ms.sum() / 1e3)
    if val_loss(run) is not None:
        base = full_rank.get((row["level"], row["seed"]))
        row.update(final_val_loss=val_loss(run), best_val_loss=float(run.log.val_losses.min()),
                   perplexity_above_full_rank_percent=None if base is None else 100 * math.expm1(val_loss(run) - base))
    return row


def write_whole(path, text):
    with open(path + ".part", "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.replace(path + ".part", path)


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def shown(column, value):
    """A figure for the eye."""
    if value is None or value == "":
        return ""
    if column == "ratio":
        return plot.rank_text(value)
    if column.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if column.endswith("_loss"):
        return f"{value:.4f}"
    if column.endswith("_percent"):
        return f"{value:+.2f}"
    if column == "flops_per_token":
        return f"{value / 1e6:,.2f} M"
    if column == "tokens_per_second":
        return f"{value:,.0f}"
    return f"{value:.1f}" if column == "seconds" else f"{value:g}" if isinstance(value, float) else str(value)


def over_seeds(column, rows):
    """Mean and standard deviation, as far as there are several values."""
    values = [row[column] for row in rows if row[column] is not None]
    if not values:
        return ""
    mean, deviation = plot.mean_and_deviation(values)
    return shown(column, mean) + (f" ± {shown(column, deviation).lstrip('+')}" if len(values) > 1 else "")


def markdown(args, runs, rows, pictures):
    text = "# Sweep\n\n"
    logs = [run.log for run in runs if run.log]
    text += "".join(f"- {what}: {'; '.join(dict.fromkeys(values))}\n" for what, values in
                    (("device", [log.device for log in logs]), ("trainer's revision", [log.revision for log in logs])) if values)
    text += f"- command: `{shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])}`\n"
    if args.jobs > 1:
        text += f"- {args.jobs} runs at once: their speeds are lower than that of one alone\n"

    those = [run for run in runs if counts(run)]
    names = {run.method: name or "all" for run, name in zip(those, labels(those, "seed", "lr"))}
    if names:
        figures = ["final_train_loss", "final_val_loss", "perplexity_above_full_rank_percent", "tokens_per_second"]
        head = ["method", "runs", "lr", "training loss", "validation loss", "perplexity above full rank, %", "tokens/s", "plan", "of full rank's",
                "FLOPs per token"]
        lines = []
        for number, name in names.items():
            chosen = [row for run, row in zip(runs, rows) if run.method == number and counts(run)]
            plan = chosen[0]["plan_bytes"]
            edge = " (edge)" if chosen[0]["lr_choice"] == AT_EDGE else ""
            lines.append([name, len(chosen), f"{chosen[0]['lr']:g}{edge}", *(over_seeds(column, chosen) for column in figures),
                          shown("plan_bytes", plan), f"{100 * plan / chosen[0]['full_rank_bytes']:.0f} %",
                          shown("flops_per_token", chosen[0]["flops_per_token"])])
        text += "\n## Methods\n\nMean ± standard deviation over seeds. The training loss is the mean of the last "
        text += f"{LAST_STEPS} steps, the speed the median of all steps but the first {FIRST_STEPS}; the plan is all the memory of a run.\n\n"
        text += table(head, lines)
        if any(run.lr_choice == AT_EDGE for run in those):
            text += "\n**(edge): best at the edge of the list of learning rates; a wider one may have better.**\n"
    text += "".join(f"\n![{os.path.basename(path)}]({os.path.basename(path)})\n" for path in pictures)

    differing = [column for column in rows[0] if len({str(row[column]) for row in rows if row[column] is not None}) > 1]
    alike = {column: next((row[column] for row in rows if row[column] is not None), "") for column in rows[0] if column not in differing}
    alike = [f"{column} {shown(column, value)}" for column, value in alike.items() if value != ""]
    text += f"\n## Runs\n\nThe seconds are those of the training steps alone. Alike in all runs that have it: {', '.join(alike)}.\n\n"
    text += table([column.replace("_", " ") for column in differing], [[shown(column, row[column]) for column in differing] for row in rows])
    return text


def write_tables(args, runs, pictures=()):
    runs = sorted(runs, key=lambda run: run.method)
    full_rank = {(run.options["recompute"], run.options["seed"]): val_loss(run) for run in runs if counts(run) and plot.is_full_rank(run.options)}
    rows = [row_of(run, full_rank) for run in runs]
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
    # A line is one way to compress, and its points are the ratios; full rank has a line for each level. A line has a colour, a ratio a marker.
    lines = dict(zip([run.method for run in those], labels(those, "rank", "seed", "lr")))
    compressed = [run for run in those if not plot.is_full_rank(run.options)]
    # the lowest ratio has all lines, in the order of the lists; ratio 1 has not
    numbers = {line: 1 + i for i, line in enumerate(dict.fromkeys(lines[run.method] for run in sorted(compressed, key=ratio_of)))}
    ratios = sorted({ratio_of(run) for run in compressed}, reverse=True)
    markers = dict(zip(ratios, itertools.cycle(plot.MARKERS)))
    levels = list(dict.fromkeys(run.options["recompute"] for run in those))

    def look_of_line(run):
        if plot.is_full_rank(run.options):  # a star, black at the first level
            return dict(plot.look(0), color=str(0.35 * levels.index(run.options["recompute"]) % 1), marker="*", markersize=10, linestyle="none")
        number = numbers[lines[run.method]]
        return plot.look(number, number - 1 if len(numbers) <= 6 else None)  # as long as they last, each colour has its own dashes

    def look_of_method(run):
        if plot.is_full_rank(run.options):
            return dict(look_of_line(run), linestyle="-")
        if len(numbers) > 6 or len(ratios) > 7:  # too few colours, or markers
            return plot.look(1 + methods.index(run.method))
        return plot.look(numbers[lines[run.method]], ratios.index(ratio_of(run)))

    def series(x, y, by_ratio=False):
        """For plot.draw_series; x and y are functions of a run. by_ratio: the markers are those of the ratios."""
        groups, starts, found = {}, {}, []
        for run in sorted(those, key=ratio_of, reverse=True):
            if y(run) is not None:
                line = lines[run.method]
                number = 0 if plot.is_full_rank(run.options) else numbers[line]
                groups.setdefault((number, line), {}).setdefault(ratio_of(run), []).append(run)
        for (number, line), points in sorted(groups.items()):  # full rank comes first
            full, run = number == 0, next(iter(points.values()))[0]
            level, look = run.options["recompute"], look_of_line(run)
            points = [(x(same[0]), [y(run) for run in same], markers[ratio] if by_ratio and not full else look["marker"])
                      for ratio, same in points.items()]
            if full:
                starts[level] = (points[0][0], plot.mean_and_deviation(points[0][1])[0])
            label = ", ".join(filter(None, ["full rank", line])) if full else line or run.options["projection"]
            start = None if full or run.options["projection"] == "eigen" else starts.get(level)  # eigen's ratio 1 is its own
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

    unit, size = ("GiB", 2**30) if any(run.plan["total_bytes"] >= 2**30 for run in those) else ("MiB", 2**20)
    loss, plan = "final validation loss (nats per token)", f"memory of a run ({unit})"
    told = {marker: f"rank {plot.rank_text(ratio)}" for ratio, marker in markers.items()}
    if those:
        names = [name or run.name for run, name in zip(those, labels(those, "seed"))]
        plot.draw_curves([run.log for run in those], names, [look_of_method(run) for run in those], path("curves.png"))
    if any(val_loss(run) is not None for run in those):
        ticks = {ratio_of(run): plot.rank_text(ratio_of(run)) for run in those}
        plot.draw_series(series(ratio_of, val_loss), path("loss_ratio.png"), "Loss against rank ratio", "rank ratio", loss, ticks)
        plot.draw_series(series(memory, val_loss, True), path("loss_memory.png"), "Loss against memory", plan, loss, markers=told, frontier=True)
        plot.draw_series(series(flops, val_loss, True), path("loss_flops.png"), "Loss against matrix FLOPs",
                         "FLOPs of matrix products per token (millions)", loss, markers=told, frontier=True)
    if those:
        plot.draw_series(series(memory, lambda run: speed(run.log), True), path("speed_memory.png"), "Speed against memory", plan,
                         "speed (tokens per second)", markers=told)
    swept = [run for run in runs if run.lr and run.log and run.method in methods and run.options["seed"] == runs[0].options["seed"]]
    if swept:
        names = dict(zip([run.method for run in swept], labels(swept, "lr")))
        found = []
        for number, name in names.items():
            same = sorted((run for run in swept if run.method == number), key=lambda run: run.options["lr"])
            look = look_of_method(same[0])
            points = [(run.options["lr"], [val_loss(run)], look["marker"]) for run in same]
            found.append(SimpleNamespace(label=name or "all", look=look, points=points, start=None))
        ticks = {float(lr): lr for lr in args.lr_sweep}
        plot.draw_series(found, path("loss_lr.png"), "Loss against learning rate", "highest learning rate", loss, ticks)
    return paths

# ---------------------------------------------------------------------------- the program


def main():
    args = parse_options(sys.argv[1:])
    args.binary = choose_binary(args.binary)
    methods, seeds, rates = list_methods(args), args.seeds, args.lr_sweep
    sweeps = rates != [None]
    runs = [plan_run(args, number, method, seed, lr)
            # a machine whose speed drifts then slows all methods alike
            for seed in (seeds[:1] if sweeps else seeds) for number, method in enumerate(methods) for lr in rates]
    os.makedirs(args.out, exist_ok=True)
    lock = os.open(args.out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Problem(f"--out: another sweep is at work in {args.out}") from None
    sys.stdout.reconfigure(line_buffering=True)
    total = len(runs) + (len(methods) * (len(seeds) - 1) if sweeps else 0)
    print(f"methods: {len(methods)}; runs: {total}; trainer: {args.binary}")
    overall = tqdm(total=total, unit="run", disable=None)

    def finished(run):
        figures = f"val {run.log.val_losses[-1]:.4f}" if run.log and len(run.log.val_losses) else run.status
        overall.write(f"{run.name}: {figures}")
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
    if sweeps:
        best = choose_rates(runs, rates)
        others = []
        for seed, number in itertools.product(seeds[1:], best):
            run = plan_run(args, number, methods[number], seed, best[number].lr)
            run.lr_choice = best[number].lr_choice
            others.append(run)
        runs += others
        train_rest(others)
    overall.close()
    write_tables(args, runs, draw(args, runs))
    failed = [run for run in runs if not run.log]
    for run in failed:
        print(f"{run.name}: {run.status}", file=sys.stderr)
    for run in runs:
        if run.lr_choice == AT_EDGE and run.options["seed"] == runs[0].options["seed"]:
            print(f"{run.name}: its learning rate is the best of the list, and at its edge: a wider list may have a better one", file=sys.stderr)
    print(f"{len(runs) - len(failed)} of {len(runs)} runs are done: {os.path.join(args.out, 'results.md')}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    common.run(main)
