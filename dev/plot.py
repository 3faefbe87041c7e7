#!/usr/bin/env python3
"""
Draws the loss of runs of the trainer against their steps: training loss smoothed, with the raw
curve faint behind it, and validation loss. Each DIR holds a run's log.jsonl (the trainer's --out);
a run that is still going, or was cut off, is drawn as far as it came. The legend names the options
in which the runs differ. What holds no run is named and passed over, so that runs/* may be given.

example: plot.py runs/full runs/quarter --out loss.png
"""

import os
import sys
from fractions import Fraction
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "data_prep"))
try:
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
    import common
    from common import Parser, Problem, run
except ImportError as missing:
    print(f"{os.path.basename(sys.argv[0])}: the Python package {missing.name} is missing: "
          "pip install -r dev/requirements.txt", file=sys.stderr)
    sys.exit(2)

# Okabe and Ito's colours, which the colour-blind tell apart, without their yellow, which is faint
# on white.
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES = ["-", "--", "-.", ":"]

MOST_RAW = 12  # runs whose unsmoothed curves are drawn too; those of more would hide everything
# options without a meaning at full rank
COMPRESSION = ["compress", "projection", "gap", "alpha", "moments"]
# options that do not change what is learnt
NO_MATTER = ["out", "plan", "tokenizer", "resume", "dump"]

# ----------------------------------------------------------------------------
# logs


def read_log(folder):
    """
    DIR/log.jsonl: options, plan, device and revision, as the last start noted them; arrays steps,
    losses, speeds (tokens/s), ms, of each step, and val_steps, val_losses of each evaluation;
    bits_per_byte of the last one, or None.
    """
    head, records = common.read_log(folder)
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "val_loss" in record]

    def array(those, name, kind=float):
        return np.array([record[name] for record in those], kind)

    try:
        return SimpleNamespace(
            folder=folder, options=dict(head["options"]), plan=dict(head["plan"]),
            device=head["device"], revision=head["revision"], steps=array(steps, "step", int),
            losses=array(steps, "loss"), speeds=array(steps, "tokens_per_second"),
            ms=array(steps, "ms"), val_steps=array(evaluations, "step", int),
            val_losses=array(evaluations, "val_loss"),
            bits_per_byte=evaluations[-1].get("bits_per_byte") if evaluations else None)
    except (KeyError, TypeError, ValueError):
        raise Problem(f"{os.path.join(folder, 'log.jsonl')}: is not a log of the trainer, whose "
                      "first line holds the options and the plan") from None


def smooth(values, reach):
    """
    The mean of up to `reach` values before, and as many after. At the beginning, which is steep,
    both sides are cut alike.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    before = np.minimum(reach, at)
    after = np.minimum(before, len(values) - 1 - at)
    with np.errstate(invalid="ignore"):  # inf - inf, where it diverged
        return (sums[at + after + 1] - sums[at - before]) / (before + after + 1)

# ----------------------------------------------------------------------------
# what a run is called


def is_full_rank(options):
    return options["compress"] == "none" or float(options["rank"]) == 1


def has_meaning(options, name):
    """Whether an option means something to a run: at full rank those of compression do not."""
    return name not in COMPRESSION or not is_full_rank(options)


def rank_text(rank):
    """0.25 -> 1/4; a whole rank as it is."""
    return str(Fraction(float(rank)).limit_denominator(1000))


def words(options, name):
    """One option of a run, as the legend says it."""
    value = options.get(name)
    if name == "rank":
        return "full rank" if is_full_rank(options) else f"rank {rank_text(value)}"
    if value is None or not has_meaning(options, name):
        return ""
    if isinstance(value, bool) or value == "":
        return name if value else f"no {name}"
    if name in ("projection", "optimizer"):
        return str(value)
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def labels(many, leave_out=()):
    """
    For each of many runs' options: the rank and whatever else differs among them. Empty where
    nothing does.
    """
    names = dict.fromkeys(name for options in many for name in options)
    first = [name for name in ("rank", "projection", "optimizer") if name in names]

    def differ(name, some):
        return len({words(options, name) for options in some} - {""}) > 1

    differing = [name for name in dict.fromkeys([*first, *names])
                 if name not in NO_MATTER and name not in leave_out and differ(name, many)]
    if "gap" in differing:
        # a gap that follows from projection and optimizer, as where none is given, says nothing
        alike = {}
        for options in many:
            pair = options.get("projection"), options.get("optimizer")
            alike.setdefault(pair, []).append(options)
        if not any(differ("gap", some) for some in alike.values()):
            differing.remove("gap")
    return [", ".join(filter(None, (words(options, name) for name in differing)))
            for options in many]

# ----------------------------------------------------------------------------
# pictures


def save(figure, path):
    """Writes a PNG, whole or not at all."""
    with common.whole_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def new_figure(columns, entries):
    """A figure with room beside its axes for a legend of these entries."""
    width = 0.6 + 4.7 * columns + 0.07 * max(map(len, entries))  # inches; 0.07 for a letter
    figure = Figure(figsize=(width, max(4.2, 0.8 + 0.21 * len(entries))), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, sharex=True)[0]
    for axis in axes:
        axis.grid(True, color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def look(number, kind=None):
    """
    How a line is drawn. Number 0 is black; after it come six colours, each with a marker. `kind`
    sets apart, by marker and dashes, what has one colour; without it, numbers above six go on with
    the same colours and other dashes.
    """
    colour, turn = (1 + (number - 1) % 6, (number - 1) // 6) if number else (0, 0)
    marker, dashes = (colour, turn) if kind is None else (kind, kind)
    return {"color": COLOURS[colour], "marker": MARKERS[marker % 7],
            "linestyle": DASHES[dashes % 4], "linewidth": 1.4, "markersize": 5}


def plain(text):
    """A name as it is: not set as a formula between two $, with what is no text shown as bytes, and
    not left out of the legend where it begins with _."""
    text = text.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def draw_curves(logs, names, looks, path):
    """
    Loss against step, training on the left, validation on the right. Runs of one name have one line
    in the legend.
    """
    figure, (train, val) = new_figure(2, set(names))
    train.set(title="Training loss, smoothed", xlabel="step", ylabel="loss (nats per token)")
    val.set(title="Validation loss", xlabel="step", ylabel="loss (nats per token)")
    train.xaxis.set_major_locator(MaxNLocator(integer=True))
    # low and high: of the training curves after their first twentieth, which would leave no room
    # for the rest
    low, high, handles = [], [], {}
    reach = max(1, max(len(log.losses) for log in logs) // 50)
    for log, name, line in zip(logs, names, looks):
        smoothed = smooth(log.losses, reach)
        raw = len(logs) <= MOST_RAW
        if raw:
            train.plot(log.steps, log.losses, color=line["color"], alpha=0.15, linewidth=0.8)
        train.plot(log.steps, smoothed, **dict(line, marker=None))
        handles[name], = val.plot(log.val_steps, log.val_losses, **line,
                                  markevery=1 + len(log.val_steps) // 20)
        low.append(log.losses if raw else smoothed)
        high.append(smoothed[len(smoothed) // 20:])
    low, high = (values[np.isfinite(values)] for values in map(np.concatenate, (low, high)))
    if low.size and high.size:
        space = 0.08 * (high.max() - low.min()) or 1.0
        train.set_ylim(low.min() - space, high.max() + space)
    if not any(len(log.val_losses) for log in logs):
        val.set_yticks([])
        val.text(0.5, 0.5, "no validation loss", transform=val.transAxes, ha="center")
    figure.legend(handles.values(), map(plain, handles), loc="outside right upper", frameon=False,
                  fontsize="small")
    save(figure, path)


def mean_and_deviation(values):
    """Over seeds. A single value has no deviation."""
    with np.errstate(invalid="ignore"):  # inf - inf, where one diverged
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def draw_series(series, path, title, xlabel, ylabel, ticks=None, markers=None, frontier=False):
    """
    A line a series: the mean over seeds, and their standard deviation as an error bar. A series has
    a label; a look; points [(x, [y of each seed], marker)]; and start, the (x, y) of full rank to
    which its line leads, or None. ticks: {x: text}, on a logarithmic axis. markers: {marker: text},
    where they tell apart points and not series. frontier: a grey line joins the points that no
    other one beats in both x and y.
    """
    markers = markers or {}
    several = any(len(ys) > 1 for one in series for _, ys, _ in one.points)
    entries = [one.label for one in series] + list(markers.values())
    figure, (axis,) = new_figure(1, entries + 2 * frontier * ["not beaten in both"])
    axis.set_title(title + ("\n(mean ± standard deviation over seeds)" if several else ""),
                   fontsize="medium")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if ticks:
        axis.set_xscale("log")
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.set_xticks([], minor=True)
    handles, places = [], []
    joined = [one for one in series if one.look["linestyle"] != "none"]
    for one in series:
        aside = 1
        if ticks and several and one in joined:
            # the series have the same x: apart, their error bars do not hide each other, and the
            # middle is left to full rank
            aside = 1.03**(joined.index(one) - (len(joined) - 1) // 2 - 0.5)
        means = [(x * aside, *mean_and_deviation(ys)) for x, ys, _ in one.points]
        places += [(x, y) for x, y, _ in means]
        axis.plot(*zip(*([one.start] if one.start else []), *((x, y) for x, y, _ in means)),
                  **dict(one.look, marker=None), zorder=2)
        for (x, y, deviation), (_, _, marker) in zip(means, one.points):
            axis.errorbar(x, y, yerr=deviation or None,
                          **dict(one.look, marker=marker, linestyle="none"), elinewidth=1,
                          capsize=3, zorder=3)
        alike = {marker for _, _, marker in one.points}
        handles.append(Line2D([], [], label=plain(one.label),
                              **dict(one.look, marker=alike.pop() if len(alike) == 1 else None)))
    handles += [Line2D([], [], label=text, color="0.4", linestyle="none", marker=marker)
                for marker, text in markers.items()]
    best = [place for place in sorted(places)
            if not any(x <= place[0] and y <= place[1] and (x, y) != place for x, y in places)]
    if frontier and len(best) > 1:
        axis.step(*zip(*best), where="post", color="0.85", linewidth=4, zorder=1)
        handles.append(Line2D([], [], label="frontier: not\nbeaten in both", color="0.85",
                              linewidth=4))
    if axis.get_ylim()[1] > 9999:
        axis.yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize="small")
    save(figure, path)

# ----------------------------------------------------------------------------
# the program


def main():
    parser = Parser(__doc__)
    parser.add_argument("folders", metavar="DIR", nargs="+", help="folders that hold a log.jsonl")
    parser.add_argument("-o", "--out", metavar="FILE.png", default="loss.png",
                        help="the picture (default: %(default)s)")
    args = parser.parse_args()
    if not args.out.lower().endswith(".png"):
        raise Problem(f"--out: {args.out} does not end in .png, "
                      "the one kind of picture that this draws")
    if not os.path.isdir(os.path.dirname(args.out) or "."):
        raise Problem(f"--out: there is no folder {os.path.dirname(args.out)}")
    logs, problems = [], []
    for folder in args.folders:
        try:
            logs.append(read_log(folder))
            if not len(logs[-1].steps):
                raise Problem(f"{os.path.join(logs.pop().folder, 'log.jsonl')}: holds no step yet")
        except Problem as problem:
            problems.append(problem)
    if not logs:
        raise problems[0]
    for problem in problems:
        print(f"passed over: {problem}", file=sys.stderr)
    names, given = [], labels([log.options for log in logs])
    for name, log in zip(given, logs):
        if name and given.count(name) > 1:
            name += f" ({log.folder})"
        names.append(name or log.folder)
    draw_curves(logs, names, [look(number) for number in range(len(logs))], args.out)
    print(args.out)


if __name__ == "__main__":
    run(main)
