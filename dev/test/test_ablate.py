"""
dev/ablate.py and dev/plot.py on tiny models: sweeps that end, break off, fail and go on; their
tables and their pictures.
"""

import contextlib
import csv
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

import formats
from conftest import SHAPE, make_text

pytestmark = pytest.mark.slow

ROOT = Path(formats.ROOT)
TRAINER = os.path.abspath(os.environ.get("TRAINER", ROOT / "train_gpt2_compact"))
sys.path.insert(0, str(ROOT / "dev"))
import ablate  # noqa: E402
import plot  # noqa: E402

PICTURES = ["curves.png", "loss_flops.png", "loss_memory.png", "loss_ratio.png", "speed_memory.png"]
STEPS = 24
# full rank, the projections as they are listed
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
METHODS = ["full rank",
           *(f"rank {ratio}, {p}" for ratio in ("1/2", "1/4") for p in ("gaussian", "sparse"))]

# A trainer that notes in `calls`, a line a time, when a run begins (+) and ends (-) and with which
# flags; plans it leaves alone. Those runs whose flags hold $WHERE go wrong in the way that $HOW
# names.
WRAPPER = """#!/bin/bash
[ "$1" = --plan=json ] && exec {trainer} "$@"
echo "+ $*" >> {calls}
case " $* " in
    *" $WHERE "*) case $HOW in
        hang) {trainer} "$@" -x 5; echo $$ > {calls}.pid; while sleep 0.05; do echo waiting; done ;;
        short) exec {trainer} "$@" -x 5 ;;
        signal) kill -9 $$ ;;
    esac ;;
esac
[ "$HOW" = slow ] && sleep 0.4
{trainer} "$@"
status=$?
echo "- $*" >> {calls}
exit $status
"""


class Sweep:
    """Runs ablate.py on the tiny model, and knows what it left in its folder."""

    def __init__(self, folder):
        self.folder, self.out, self.calls = folder, folder / "out", folder / "calls"
        self.calls.touch()
        (folder / "text.txt").write_text(make_text(3000))
        self.binary = folder / "trainer.sh"
        self.binary.write_text(WRAPPER.replace("{trainer}",
                                               TRAINER).replace("{calls}", str(self.calls)))
        self.binary.chmod(0o755)
        self.process = None

    def start(self, *options, how="", where="", **settings):
        command = [sys.executable, ROOT / "dev/ablate.py", "--binary", self.binary, "--out",
                   self.out, "--train", self.folder / "text.txt", *SHAPE, "--steps", STEPS,
                   *([] if "--lr-sweep" in options else ["-l", "1e-2"]), *options]
        environment = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", HOW=how,
                           WHERE=where or "no such flags")
        self.process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, env=environment,
                                        **settings)
        return self.process

    def run(self, *options, status=0, **settings):
        said = self.start(*options, **settings).communicate(timeout=100)
        assert self.process.returncode == status, said
        return "".join(said)

    @property
    def begun(self):
        return [line[2:] for line in self.calls.read_text(errors="replace").splitlines()
                if line.startswith("+")]

    @property
    def rows(self):
        with open(self.out / "results.csv", newline="") as file:
            return list(csv.DictReader(file))

    @property
    def table(self):
        return (self.out / "results.md").read_text()

    @property
    def folders(self):
        return sorted(path.name for path in self.out.iterdir() if path.is_dir())


@pytest.fixture
def sweep(tmp_path):
    made = Sweep(tmp_path)
    yield made
    if made.process and made.process.poll() is None:
        made.process.kill()
        made.process.communicate()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """
    A sweep that is done, to look at: full rank, and two ratios by two projections, each with two
    seeds.
    """
    made = Sweep(tmp_path_factory.mktemp("sweep"))
    made.said = made.run("--ratios", "1,1/2,0.25", "--optimizers", "adamw", "--projections",
                         "gaussian,sparse", "--seeds", "1,2", "-v", 8)
    made.command = made.process.args
    return made


def wait_for(condition, what):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def gone(pid):
    """Whether a process has ended, waited for or not."""
    try:
        os.kill(pid, 0)
        return (Path("/proc/self").exists()
                and Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z")
    except (ProcessLookupError, FileNotFoundError):
        return True

# ----------------------------------------------------------------------------
# a whole sweep


def test_which_runs(done):
    """
    Full rank is run once a seed, not once a projection; a ratio reaches the trainer as a number.
    """
    assert (len(done.begun) == len(set(done.begun)) == 10
            and done.folders == sorted(row["name"] for row in done.rows))
    options = [formats.read_log(done.out / name)[0]["options"] for name in done.folders]
    ran = sorted((o["rank"], o["projection"], o["seed"]) for o in options)
    assert ran == sorted([(1, "sparse", seed) for seed in (1, 2)]
                         + [(ratio, projection, seed) for ratio in (0.5, 0.25)
                            for projection in ("gaussian", "sparse") for seed in (1, 2)])
    begins = sorted(name[:name.index("-r0-lr0.01-s")] for name in done.folders)
    assert begins == sorted(2 * ["full"] + [f"{ratio}-{p}" for ratio in (0.5, 0.25)
                                            for p in 2 * ("gaussian", "sparse")])
    assert all(o["steps"] == STEPS and o["lr"] == 0.01 and o["channels"] == 16 for o in options)
    assert "10 of 10 runs are done" in done.said and len(re.findall(r"val \d\.\d{4}\n",
                                                                    done.said)) == 10


def test_the_csv_says_what_the_logs_say(done):
    logs = {name: formats.read_log(done.out / name) for name in done.folders}
    base = {head["options"]["seed"]: evaluations[-1]["val_loss"]
            for name, (head, _, evaluations) in logs.items() if name.startswith("full")}
    for row in done.rows:
        head, steps, evaluations = logs[row["name"]]
        options, plan, full = head["options"], head["plan"], row["name"].startswith("full")
        assert [evaluation["step"] for evaluation in evaluations] == [8, 16, 24]
        for column, option in (("projection", "projection"), ("gap", "gap"), ("alpha", "alpha"),
                               ("moments", "moments"), ("compress", "compress")):
            assert row[column] == ("" if full else str(options[option]))
        assert float(row["rank"]) == options["rank"] and row["weight_decay"] == "0.1"
        assert row["level"] == "0" and row["seed"] == str(options["seed"])
        assert row["lr"] == "0.01" and row["steps"] == "24" and row["status"] == "ok"
        figures = {
            "final_train_loss": statistics.mean(step["loss"] for step in steps[-20:]),
            "final_val_loss": evaluations[-1]["val_loss"],
            "perplexity": math.exp(evaluations[-1]["val_loss"]),
            "bits_per_byte": evaluations[-1]["bits_per_byte"],
            "best_val_loss": min(evaluation["val_loss"] for evaluation in evaluations),
            "perplexity_above_full_rank_percent": 100 * (math.exp(evaluations[-1]["val_loss"])
                                                         / math.exp(base[options["seed"]]) - 1),
            "plan_bytes": plan["total_bytes"], "full_rank_bytes": plan["full_rank_total_bytes"],
            "flops_per_token": plan["flops_per_token"]["total"],
            "tokens_per_second": statistics.median(step["tokens_per_second"] for step in steps[5:]),
            "seconds": sum(step["ms"] for step in steps) / 1000}
        for column, value in figures.items():
            assert float(row[column]) == pytest.approx(value, rel=1e-9, abs=1e-9), column
    for column, count in (("final_val_loss", 10), ("plan_bytes", 5), ("flops_per_token", 5)):
        assert len({row[column] for row in done.rows}) == count, column


def test_the_table(done):
    lines = [line.strip("| ").split(" | ") for line in done.table.splitlines()
             if line.startswith("| ")]
    methods = {line[0]: line for line in lines[2:7]}
    assert list(methods) == METHODS
    for method, begin in (("rank 1/4, gaussian", "0.25-gaussian"),
                          ("rank 1/4, sparse", "0.25-sparse")):
        rows = [row for row in done.rows if row["name"].startswith(begin)]
        losses = [float(row["final_val_loss"]) for row in rows]
        line = methods[method]
        assert (line[1] == "2"
                and line[4] == f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}")
        perplexities = list(map(math.exp, losses))
        mean, deviation = statistics.mean(perplexities), statistics.stdev(perplexities)
        assert line[5] == f"{mean:.3f} ± {deviation:.3f}"
        bits = statistics.mean(losses) / math.log(2)
        # whose last digit hangs on the log's rounding
        assert line[7].startswith(f"{bits:.4f}"[:-1])
        base = [float(row["final_val_loss"]) for row in done.rows if row["name"].startswith("full")]
        error = math.sqrt(statistics.variance(losses) / 2 + statistics.variance(base) / 2)
        errors = (statistics.mean(losses) - statistics.mean(base)) / error
        assert line[8] == ("**better**" if errors < -3 else "worse" if errors > 3 else "alike")
        share = int(rows[0]["plan_bytes"]) / int(rows[0]["full_rank_bytes"])
        assert line[10] == f"{100 * share:.0f} %"
        assert line[12] == f"{int(rows[0]['flops_per_token']) / 1e6:.2f} M"
    assert methods["full rank"][6] == "+0.00 ± 0.00" and methods["full rank"][8] == "baseline"
    assert "standard errors" in done.table and "lr 0.01" in done.table and "status ok" in done.table
    for name in PICTURES + done.folders:
        assert name in done.table


def pixels(path, colour):
    """How many pixels of a PNG are of a colour."""
    return int((np.abs(picture(path)
                       - [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]).max(axis=2)
                < 0.01).sum())


def picture(path):
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return imread(path)[:, :, :3]


def check_picture(path, *colours):
    """
    Not blank: it varies, it has many shades (of smoothed edges), and what stands for each series is
    there.
    """
    image = picture(path)
    assert min(image.shape[:2]) > 400 and image.std() > 0.05, path
    assert len(np.unique((image * 255).astype(int) @ [1, 256, 65536])) > 50, path
    for colour in colours:
        assert pixels(path, colour) > 200, f"{path} has nothing in {colour}"


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(done, name):
    check_picture(done.out / name, BLACK, BLUE, ORANGE)
    assert not list(done.out.glob("*.part"))


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in place of files."""
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure))
    return drawn


def check_legend(figure, labels):
    """These labels, beside the axes and not upon them, within the figure."""
    legend, = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == labels
    figure.draw_without_rendering()
    place = legend.get_window_extent()
    assert (figure.bbox.x0 <= place.x0 and place.x1 <= figure.bbox.x1 + 1
            and figure.bbox.y0 <= place.y0)
    for axis in figure.axes:
        assert not place.overlaps(axis.get_tightbbox()), "the legend covers the axes"
        assert axis.get_xlabel() and axis.get_ylabel() and axis.get_title()


def test_curves_hold_the_losses(done, figures):
    logs = [plot.read_log(done.out / name) for name in done.folders[:3]]
    plot.draw_curves(logs, ["a", "b, which is rather long", "a"],
                     [plot.look(0), plot.look(1), plot.look(0)], "")
    check_legend(figures[0], ["a", "b, which is rather long"])
    train, val = figures[0].axes
    for log, raw, smoothed, evaluations in zip(logs, train.lines[::2], train.lines[1::2],
                                               val.lines):
        assert np.array_equal(raw.get_xydata(),
                              np.stack([log.steps, log.losses], 1)) and raw.get_alpha() < 0.5
        assert np.array_equal(smoothed.get_xydata(),
                              np.stack([log.steps, plot.smooth(log.losses, 1)], 1))
        assert np.array_equal(evaluations.get_xydata(),
                              np.stack([log.val_steps, log.val_losses], 1))
        low, high = train.get_ylim()
        assert low < log.losses.min() and high > smoothed.get_ydata()[1:].max()
    assert len(train.lines) == 6 and len(val.lines) == 3


def test_series_hold_their_points(figures):
    full = ablate.SimpleNamespace(label="full", look=dict(plot.look(0), linestyle="none"),
                                  points=[(1.0, [2.0, 2.2], "*")], start=None)
    one = ablate.SimpleNamespace(label="one", look=plot.look(1),
                                 points=[(0.5, [3.0], "o"), (0.25, [5.0, 2.0, 8.0], "s")],
                                 start=(1.0, 2.1))
    plot.draw_series([full, one], "", "title", "x", "y", markers={"o": "half", "s": "quarter"},
                     frontier=True)
    check_legend(figures[0], ["full", "one", "half", "quarter", "frontier: not\nbeaten in both"])
    axis, = figures[0].axes
    points = [container[0].get_xydata()[0].tolist() + [container[0].get_marker()]
              for container in axis.containers]
    assert [point[2] for point in points] == ["*", "o", "s"]
    assert [point[:2] for point in points] == [pytest.approx(place)
                                               for place in ([1.0, 2.1], [0.5, 3.0], [0.25, 5.0])]
    bars = [container.has_yerr and np.ptp(container[2][0].get_segments()[0][:, 1])
            for container in axis.containers]
    assert bars == [pytest.approx(2 * statistics.stdev([2.0, 2.2])), False, pytest.approx(2 * 3.0)]
    lines = [line.get_xydata().tolist() for line in axis.lines]
    assert [[1.0, 2.1], [0.5, 3.0],
            [0.25, 5.0]] in lines and "standard deviation" in axis.get_title()
    assert [[0.25, 5.0], [0.5, 3.0], [1.0, 2.1]] in lines  # the frontier: here nothing is beaten


def test_frontier_and_places(figures):
    def line(label, *points, number=1):
        return ablate.SimpleNamespace(label=label, look=plot.look(number),
                                      points=[(x, [y], "o") for x, y in points], start=None)
    plot.draw_series([line("a", (1, 5), (2, 4), (2, 4.5), (3, 4)),
                      line("b", (2, 6), (4, 1), (5, 2))],
                     "", "t", "x", "y", frontier=True)
    assert [[1, 5], [2, 4], [4, 1]] in [line.get_xydata().tolist()
                                        for line in figures[0].axes[0].lines]
    ticks = {0.25: "1/4", 0.5: "1/2", 1.0: "1"}
    plot.draw_series([line("a", (0.25, 1)), line("b", (0.25, 1))], "", "t", "x", "y", ticks=ticks)
    axis, = figures[1].axes
    assert [text.get_text()
            for text in axis.get_xticklabels()] == list(ticks.values()) and axis.get_title() == "t"
    # a line and its marker, twice; none moved
    assert [line.get_xdata()[0] for line in axis.lines if len(line.get_xdata())] == [0.25] * 4
    both = [ablate.SimpleNamespace(label=label, look=plot.look(1), points=[(0.25, [1, 2], "o")],
                                   start=None) for label in "ab"]
    plot.draw_series(both, "", "t", "x", "y", ticks=ticks)
    a, b = (container[0].get_xdata()[0] for container in figures[2].axes[0].containers)
    assert 0.24 < a < 0.25 < b < 0.26  # error bars beside each other


def test_pictures_hold_the_sweep(done, figures, monkeypatch):
    """
    Started again on a sweep that is done, only the pictures are made: their points are those of the
    table.
    """
    monkeypatch.setattr(sys, "argv", done.command[1:])
    with pytest.raises(SystemExit) as caught:
        ablate.main()
    assert caught.value.code == 0 and len(done.begun) == 10
    curves, loss_ratio, loss_memory, loss_flops, speed_memory = figures
    check_legend(curves, METHODS)
    assert len(curves.axes[1].lines) == 10
    check_legend(loss_ratio, ["full rank", "gaussian", "sparse"])
    check_legend(speed_memory, ["full rank", "gaussian", "sparse", "rank 1/2", "rank 1/4"])
    colours = {"": BLACK, "gaussian": BLUE, "sparse": ORANGE}
    loss, memory = (("final_val_loss", "final validation loss (nats per token)"),
                    ("plan_bytes", "memory of a run (MiB)", 2**20))
    flops = ("flops_per_token", "FLOPs of matrix products per token (millions)", 1e6)
    for figure, (x, x_name, unit), (y, y_name) in (
        (loss_ratio, ("rank", "rank ratio", 1), loss), (loss_memory, memory, loss),
        (loss_flops, flops, loss),
        (speed_memory, memory, ("tokens_per_second", "speed (tokens per second)"))):
        wanted = {}
        for row in done.rows:
            mark = {"1": "*", "0.5": "o", "0.25": "s"}[row["rank"]]
            if x == "rank":
                mark = {"gaussian": "o", "sparse": "s"}.get(row["projection"], "^")
            key = (row["rank"], colours[row["projection"]], mark if row["projection"] else "*")
            wanted.setdefault(key, [float(row[x]) / unit, []])[1].append(float(row[y]))
        axis, = figure.axes
        assert axis.get_xlabel() == x_name and axis.get_ylabel() == y_name
        points = [(container[0].get_xydata()[0], to_hex(container[0].get_color()).upper(),
                   container[0].get_marker()) for container in axis.containers]
        full, = (list(place) for place, colour, _ in points if colour == BLACK)
        joined = {to_hex(line.get_color()).upper(): line for line in axis.lines
                  if len(line.get_xdata()) == 3}
        starts = [joined[colour].get_xydata()[0].tolist() == full for colour in (BLUE, ORANGE)]
        assert len(points) == 5 and starts == [True, True]
        assert [joined[colour].get_linestyle() for colour in (BLUE, ORANGE)] == ["-", "--"]
        for (_, colour, mark), (at, ys) in wanted.items():
            # there, error bars stand side by side
            near = pytest.approx([at, statistics.mean(ys)],
                                 rel=0.05 if figure is loss_ratio else 1e-9)
            assert [1 for place, c, m in points
                    if (c, m) == (colour, mark) and list(place) == near], (x, y, colour, mark)


def test_looks():
    """No two of 24 lines look alike; nor do six lines of seven ratios."""
    for looks in ([plot.look(number) for number in range(25)],
                  [plot.look(number, kind) for number in range(1, 7) for kind in range(7)]):
        assert len({tuple(look.values()) for look in looks}) == len(looks)
    assert (plot.look(0)["color"] == BLACK and plot.look(1)["color"] == BLUE
            and plot.look(2, 3)["color"] == ORANGE)


def test_many_ratios_have_one_colour(sweep):
    sweep.run("--ratios", "1,1/2,1/4,1/8,1/16", "--projections", "sparse")
    assert [row["status"] for row in sweep.rows] == ["ok"] * 5
    for name in PICTURES:
        check_picture(sweep.out / name, BLACK, BLUE)
        assert pixels(sweep.out / name, ORANGE) == pixels(sweep.out / name, GREEN) == 0

# ----------------------------------------------------------------------------
# sweeps that break off


def test_goes_on_after_a_kill(sweep):
    # the fourth run is seed 2 at full rank
    options = ["--ratios", "1,1/2", "--projections", "gaussian,sparse", "--seeds", "1,2"]
    sweep.start(*options, how="hang", where="--rank 1 --seed 2")
    pid = sweep.folder / "calls.pid"
    wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"), "the run did not begin")
    unfinished = [name for name in sweep.folders if name.endswith(".part")]
    assert (len(sweep.folders) == 4 and len(unfinished) == 1
            and len(formats.read_log(sweep.out / unfinished[0])[1]) == 5)
    assert ([row["status"] for row in sweep.rows].count("ok") == 3
            and [row["status"] for row in sweep.rows].count("not run yet") == 3)
    sweep.process.send_signal(signal.SIGKILL)
    sweep.process.communicate()
    wait_for(lambda: gone(int(pid.read_text())), "the trainer outlives the sweep")
    begun, times = sweep.begun, {name: (sweep.out / name / "log.jsonl").stat().st_mtime_ns
                                 for name in sweep.folders if name not in unfinished}

    assert "3 of 6 runs are done already" in sweep.run(*options)
    again = sweep.begun[len(begun):]
    assert len(again) == 3 and begun[3] == again[0] and len(set(begun[:3] + again)) == 6
    assert len(sweep.folders) == 6 and not [name for name in sweep.folders
                                            if name.endswith(".part")]
    assert all((sweep.out / name / "log.jsonl").stat().st_mtime_ns == before
               for name, before in times.items())
    assert ([row["status"] for row in sweep.rows] == ["ok"] * 6
            and sorted(row["name"] for row in sweep.rows) == sweep.folders)
    assert all(len(formats.read_log(sweep.out / name)[1]) == STEPS for name in sweep.folders)

    # with nothing changed there is nothing to do; with a flag for the trainer all runs are others;
    # a log cut off is no result
    count = len(sweep.begun)
    cut = sweep.out / sweep.folders[0] / "log.jsonl"
    cut.write_bytes(cut.read_bytes()[:-200])
    sweep.run(*options)
    assert len(sweep.begun) == count + 1 and len(formats.read_log(cut.parent)[1]) == STEPS
    sweep.run(*options, "-c", "0.2", "-v", "0")
    assert len(sweep.begun) == count + 7 and len(sweep.folders) == 12 and len(sweep.rows) == 6
    # nothing to draw it from
    assert {row["final_val_loss"]
            for row in sweep.rows} == {""} and "loss_ratio.png" not in sweep.table


def test_stops_when_told(sweep):
    sweep.start("--ratios", "1,1/2", "--jobs", "2", how="hang", where="--rank 0.5")
    pid = sweep.folder / "calls.pid"
    table = sweep.out / "results.csv"
    wait_for(lambda: pid.exists() and pid.read_text().endswith("\n")
             and ",ok\n" in table.read_text(), "the runs did not begin")
    sweep.process.send_signal(signal.SIGTERM)
    sweep.process.communicate(timeout=20)
    assert sweep.process.returncode == 143 and gone(int(pid.read_text()))
    assert len(sweep.folders) == 1 and sorted(row["status"]
                                              for row in sweep.rows) == ["not run yet", "ok"]


def test_only_one_at_a_time(sweep):
    sweep.start("--ratios", "1", how="hang", where="--rank 1")
    wait_for((sweep.folder / "calls.pid").exists, "the run did not begin")
    first, sweep.process = sweep.process, None
    try:
        said = sweep.run("--ratios", "1", status=2)
    finally:
        first.send_signal(signal.SIGTERM)
        first.communicate()
    assert f"{sweep.out}: another program is writing there" in said and said.count("\n") == 1


def test_another_sweep_in_the_folder(sweep):
    """Its tables get another name. A wider sweep, or one of more seeds, is the same one going
    on."""
    sweep.run("--ratios", "1", "--seeds", "1")
    for options in (["--seeds", "1,2"], ["--seeds", "1,2", "--ratios", "1,1/2"]):
        assert "another sweep" not in sweep.run("--ratios", "1", *options)
    first = sweep.table
    leave(sweep.out, "gone.part/output.txt", "mine.part/notes.txt", "loss_lr.png.tmp",
          "results.csv.tmp", "mine.tmp")
    assert "results_1.md" in sweep.run("--ratios", "1/2", "--seeds", "1,2")
    assert (sweep.out / "results_1.md").read_text() == first
    assert "full" in (sweep.out / "results_1.csv").read_text()
    assert len(sweep.rows) == 2 and not list(sweep.out.glob("results_2*"))
    assert {path.name for path in sweep.out.iterdir()
            if path.suffix in (".part", ".tmp")} == {"mine.part", "mine.tmp"}
    sweep.run("--ratios", "1/4", "--seeds", "3")
    assert (sweep.out / "results_2.md").exists()


def leave(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("half")


def test_names_of_any_bytes(sweep):
    """Of data: Latin-1, blanks, formulas; the tables are UTF-8 all the same."""
    data = sweep.folder / os.fsdecode(b"caf\xe9 $x$.txt")
    data.write_text((sweep.folder / "text.txt").read_text())
    sweep.run("--ratios", "1", "--train", data)
    assert "caf\\udce9 $x$.txt" in sweep.table and [row["status"] for row in sweep.rows] == ["ok"]
    again = sweep.run("--ratios", "1")
    assert "1 of 1 runs are done already" in again and len(sweep.begun) == 1

# ----------------------------------------------------------------------------
# runs that fail


def test_a_run_fails(sweep):
    options = ["--ratios", "1/2,1", "--alphas", "1,1e9"]  # the second of three runs
    said = sweep.run(*options, status=1)
    assert "2 of 3 runs are done" in said
    ok, failed, last = sweep.rows
    assert (ok["status"] == last["status"] == "ok" and failed["alpha"] == "1000000000.0"
            and failed["final_val_loss"] == "")
    assert re.fullmatch(r"failed, status 1: \w+: step \d+: the loss or its gradient is not finite; "
                        r".*",
                        failed["status"])
    assert failed["status"] in said and failed["status"] in sweep.table
    assert sorted(sweep.folders) == sorted([ok["name"], last["name"], failed["name"] + ".part"])
    sweep.run(*options, status=1)
    # what failed is tried again, and only that
    assert len(sweep.begun) == 4 and sweep.begun[1] == sweep.begun[3]
    for name in PICTURES:
        check_picture(sweep.out / name, BLACK, BLUE)


@pytest.mark.parametrize("how, why",
                         [("signal", r"failed, ended by signal 9: "),
                          ("short", r"failed, ended without its last step: step 5/5 .*")])
def test_a_trainer_breaks(sweep, how, why):
    sweep.run("--ratios", "1,1/2", how=how, where="--rank 0.5", status=1)
    assert [row["status"]
            for row in sweep.rows][0] == "ok" and re.fullmatch(why, sweep.rows[1]["status"])
    assert len(sweep.folders) == 2 and sweep.folders[0] == sweep.rows[1]["name"] + ".part"

# ----------------------------------------------------------------------------
# several at once; learning rates


def test_jobs(sweep):
    sweep.run("--ratios", "1,1/2,1/4,1/8", "--jobs", "2", how="slow")
    assert [row["status"] for row in sweep.rows] == ["ok"] * 4 and len(sweep.folders) == 4
    running, most = 0, 0
    for line in sweep.calls.read_text().splitlines():
        running += 1 if line.startswith("+") else -1
        most = max(most, running)
    assert most == 2 and running == 0
    assert "2 runs at once" in sweep.table


def check_rates(sweep, rates):
    """
    Each method's best rate is the one that the runs of the first seed say, and the other seeds are
    run at it alone. Returns who took what.
    """
    taken = {}
    for ratio in ("1", "0.25"):
        rows = [row for row in sweep.rows if row["rank"] == ratio]
        first = [row for row in rows if row["seed"] == "1"]
        assert {float(row["lr"]) for row in first} == set(rates) and len(first) == len(rates)
        best = min(first, key=lambda row: float(row["final_val_loss"]))
        choice = ("taken, at the edge of the list" if float(best["lr"]) in (min(rates), max(rates))
                  else "taken")
        assert [(row["seed"], row["lr"]) for row in rows
                if row["choice"] != "not taken"] == [("1", best["lr"]), ("2", best["lr"])]
        assert {row["choice"] for row in rows} == {choice, "not taken"}
        assert {row["status"] for row in rows} == {"ok"}
        taken[ratio] = float(best["lr"])
    return taken


def rates_in_table(sweep):
    return [line.strip("| ").split(" | ")[:3] for line in sweep.table.splitlines()
            if "±" in line and "|" in line]


def test_learning_rates(sweep):
    options = ["--ratios", "1,1/4", "--seeds", "1,2", "--projection", "gaussian"]
    said = sweep.run(*options, "--lr-sweep", "1e-2,1e-4,1e-3")
    assert check_rates(sweep,
                       [1e-2, 1e-4, 1e-3]) == {"1": 0.01, "0.25": 0.01} and len(sweep.begun) == 8
    assert said.count("at its edge") == 2 and "best at the edge" in sweep.table
    assert rates_in_table(sweep) == [["full rank", "2", "0.01 (edge)"],
                                     ["rank 1/4", "2", "0.01 (edge)"]]
    # the runs that there are stay and count; at 10 losses are above 20
    said = sweep.run(*options, "--lr-sweep", "1e-2,1e-4,1e-3,10")
    assert check_rates(sweep, [1e-2, 1e-4, 1e-3, 10]) == {"1": 0.01, "0.25": 0.01}
    assert len(sweep.begun) == 10
    assert "edge" not in said + sweep.table
    base = next(row for row in sweep.rows if row["rank"] == "1" and row["seed"] == "2")
    for row in sweep.rows:
        if row["seed"] == "2":
            above = 100 * math.expm1(float(row["final_val_loss"]) - float(base["final_val_loss"]))
            assert float(row["perplexity_above_full_rank_percent"]) == pytest.approx(above)
    assert rates_in_table(sweep) == [["full rank", "2", "0.01"], ["rank 1/4", "2", "0.01"]]
    for name in PICTURES + ["loss_lr.png"]:
        check_picture(sweep.out / name, BLACK, BLUE)


def test_weight_decays(sweep):
    """Chosen together with the rate, by the method that lists them; --also adds methods, with lists
    of their own."""
    said = sweep.run("--ratios", "1", "--seeds", "1,2", "--lr-sweep", "1e-2,1e-3", "--decays",
                     "0,20,0.1", "--also",
                     "--ratios 1/4,8 --projections sparse --lr-sweep 1e-2 --decays 0.1")
    assert len(sweep.begun) == 6 + 1 + 4 and "11 of 11 runs are done" in said
    first = [row for row in sweep.rows if row["rank"] == "1" and row["seed"] == "1"]
    pairs = {(lr, decay) for lr in ("0.01", "0.001") for decay in ("0", "20", "0.1")}
    assert {(row["lr"], row["weight_decay"]) for row in first} == pairs
    best = min(first, key=lambda row: float(row["final_val_loss"]))
    taken = [(row["seed"], row["lr"], row["weight_decay"]) for row in sweep.rows
             if row["rank"] == "1" and row["choice"].startswith("taken")]
    assert taken == [(seed, best["lr"], best["weight_decay"]) for seed in "12"]
    assert best["weight_decay"] != "20"
    fixed = [(rank, seed, "0.01", "0.1", "") for rank in ("0.25", "8") for seed in "12"]
    assert [(row["rank"], row["seed"], row["lr"], row["weight_decay"], row["choice"])
            for row in sweep.rows if row["rank"] != "1"] == fixed
    assert {row["projection"] for row in sweep.rows} == {"", "sparse"}
    check_picture(sweep.out / "loss_lr.png", BLACK)


def test_all_at_edges(sweep):
    """A list's ends are edges, but a weight decay of 0 has no lower one."""
    for decays, edge in (("0,50", False), ("0.1,50", True), ("30,50", True)):
        sweep.run("--ratios", "1", "--decays", decays, "-l", "1e-2")
        taken, = (row for row in sweep.rows if row["choice"] != "not taken")
        assert taken["weight_decay"] == decays.split(",")[0]
        assert taken["choice"] == "taken" + edge * ", at the edge of the list"
        assert ("(edge)" in sweep.table) == edge and "loss_lr.png" not in sweep.table


def test_whole_ranks(sweep):
    """They stand at the share of columns that they keep, and are named in table and legend."""
    sweep.run("--ratios", "1,1/2,8", "--projections", "sparse")
    rows = [line.strip("| ").split(" | ") for line in sweep.table.splitlines()
            if line.startswith("| ")]
    assert [row[0] for row in rows[2:5]] == ["full rank", "rank 1/2", "rank 8"]
    assert [row["rank"] for row in sweep.rows] == ["1", "0.5", "8"]
    assert sweep.rows[2]["name"].startswith("8-sparse-muon-r0")
    assert float(sweep.rows[2]["plan_bytes"]) < float(sweep.rows[1]["plan_bytes"])
    for name in PICTURES:
        check_picture(sweep.out / name, BLACK, BLUE, ORANGE)


def test_optimizers(sweep, figures, monkeypatch):
    """Each has a full rank of its own; the baseline is AdamW's, wherever it stands. Folders, table
    and pictures name them."""
    options = ["--ratios", "1,1/4", "--projections", "sparse", "--optimizers", "muon,adamw",
               "--seeds", "1,2"]
    sweep.run(*options)
    rows = [line.strip("| ").split(" | ") for line in sweep.table.splitlines()
            if line.startswith("| ")]
    assert [row[0] for row in rows[2:6]] == ["full rank, muon", "rank 1/4, muon",
                                             "full rank, adamw", "rank 1/4, adamw"]
    assert [row[8] == "baseline" for row in rows[2:6]] == [False, False, True, False]
    assert {(row["optimizer"], row["rank"]): row["name"].split("-r0")[0]
            for row in sweep.rows} == {("muon", "1"): "full-muon",
                                       ("muon", "0.25"): "0.25-sparse-muon", ("adamw", "1"): "full",
                                       ("adamw", "0.25"): "0.25-sparse"}
    for row in sweep.rows:
        wanted = ("adamw", "1", row["seed"])
        base, = (other for other in sweep.rows
                 if (other["optimizer"], other["rank"], other["seed"]) == wanted)
        assert float(row["perplexity_above_full_rank_percent"]) == pytest.approx(
            100 * math.expm1(float(row["final_val_loss"]) - float(base["final_val_loss"])))
    monkeypatch.setattr(sys, "argv", [str(word) for word in sweep.process.args[1:]])
    with pytest.raises(SystemExit):
        ablate.main()
    for figure in figures[1:4]:
        found = {text.get_text() for text in figure.legends[0].get_texts()}
        assert found >= {"full rank, adamw", "full rank, muon", "muon", "adamw"}


def test_share_of_columns(tmp_path):
    (tmp_path / "text.txt").write_text(make_text(3000))
    args = ablate.parse_options(["--out", "out", "--train", str(tmp_path / "text.txt"), "--steps",
                                 "3", "--projections", "sparse", "--ratios", "1,1/4,8,16,32,64",
                                 "--compress", "qkv,fc,fcproj/fcproj", *map(str, SHAPE)])
    args.binary = TRAINER
    ranks = {(run.options["compress"].count(","), ablate.rank_of(run)): ablate.ratio_of(run)
             for run in ablate.plan_first_seed(args)}
    # inputs of 16, 16 and 64 channels
    assert ranks == {(2, 1): 1, (2, 0.25): 0.25, (0, 0.25): 0.25, (2, 8): 24 / 96, (2, 16): 48 / 96,
                     (2, 32): 64 / 96, (2, 64): 1, (0, 8): 1 / 8, (0, 16): 1 / 4, (0, 32): 1 / 2,
                     (0, 64): 1}


def test_changed_data(sweep):
    """Data are known by what they hold: a file of equal name, size and time is another one; a copy
    of it is not."""
    text = sweep.folder / "text.txt"
    old, times = text.read_text(), (text.stat().st_atime_ns, text.stat().st_mtime_ns)
    sweep.run("--ratios", "1")
    first = sweep.rows
    text.write_text(old[:1500] + "?" + old[1501:])
    os.utime(text, ns=times)
    sweep.run("--ratios", "1")
    assert len(sweep.begun) == 2 and sweep.rows[0]["name"] != first[0]["name"]
    (sweep.folder / "a copy.txt").write_text(old)
    said = sweep.run("--ratios", "1", "--train", sweep.folder / "a copy.txt")
    assert len(sweep.begun) == 2 and "1 of 1 runs are done already" in said and sweep.rows == first


def test_which_files_are_data(tmp_path, monkeypatch):
    """
    As the trainer takes them: a name that exists is a name, else a pattern; the last one holds.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("a[1].txt", "a1.txt", "b1.bin", "b2.bin", "m.bin"):
        Path(name).write_text(name)
    files = ablate.data_files
    assert files(["--train", "a[1].txt"]) == {"train": ["a[1].txt"]}
    assert files(["-i", "none", "--train=b[12].bin", "--val", "a?.txt", "-e", "m.bin"]) == {
        "train": ["b1.bin", "b2.bin"], "val": ["a1.txt"], "model": ["m.bin"]}
    assert files(["-i", "b*", "-e", "d4", "--hellaswag", "a1.txt", "-b", "4", "-x", "3"]) == {
        "train": ["b1.bin", "b2.bin"], "hellaswag": ["a1.txt"]}
    Path("a[1].txt").unlink()
    assert files(["-i", "a[1].txt"]) == {"train": ["a1.txt"]}


def test_data_change_while_it_runs(sweep):
    text = sweep.folder / "text.txt"
    sweep.start("--ratios", "1,1/2", how="slow")
    wait_for(lambda: sweep.begun, "the runs did not begin")
    text.write_text(text.read_text().replace("cat", "cow"))
    said = "".join(sweep.process.communicate(timeout=100))
    assert sweep.process.returncode == 1 and "0 of 2 runs are done" in said
    assert len(sweep.begun) == 1
    said = "failed, the data are not those with which the sweep began; start it again"
    assert {row["status"] for row in sweep.rows} == {said}
    assert not [name for name in sweep.folders if not name.endswith(".part")]


def test_hash_of_a_large_file(tmp_path, monkeypatch):
    """One of more than all the blocks is read in part, from all over it, its end included."""
    monkeypatch.setattr(ablate, "BLOCK", 16)
    path, seen = tmp_path / "file", set()
    for at in (None, 0, 15, 5000, 9999):
        data = bytearray(b"x" * 10000)
        if at is not None:
            data[at] = 0
        path.write_bytes(data)
        seen.add(ablate.hash_file(str(path), 10000, at))
    assert len(seen) >= 4
    hashes = set()
    for at in range(1000):  # and a smaller one whole
        path.write_bytes(b"x" * at + b"y" + b"x" * (999 - at))
        hashes.add(ablate.hash_file(str(path), 1000, at))
    assert len(hashes) == 1000


def test_judgement():
    """By three standard errors of the difference of the means; what failed, and one seed alone, is
    not judged."""
    def runs(*losses):
        return [ablate.SimpleNamespace(log=None if loss is None
                                       else ablate.SimpleNamespace(val_losses=np.array([loss])))
                for loss in losses]
    # deviation 0.1; beside equal ones the error is 0.1 sqrt(2/3) = 0.0816
    base = runs(2.0, 2.1, 2.2)
    for shift, verdict in ((-0.25, "**better**"), (-0.24, "alike"), (0.24, "alike"),
                           (0.25, "worse"), (math.inf, "worse")):
        assert ablate.judge(runs(*(loss + shift for loss in (2.0, 2.1, 2.2))), base) == verdict
    assert ablate.judge(runs(1.0), base) == ablate.judge(runs(1.0, 1.0), base[:1]) == ""
    assert ablate.judge(runs(1.0, None, 1.0), base) == "1 failed"
    assert ablate.judge(runs(2.0, 2.0), runs(2.0, 2.0)) == "alike"
    assert ablate.judge(runs(1.9, 1.9), runs(2.0, 2.0)) == "**better**"


def test_a_loss_beyond_all_bounds(done, tmp_path, figures, monkeypatch):
    """exp of a diverged loss does not end table or pictures; such a run is not the best one."""
    copied = tmp_path / "out"
    shutil.copytree(done.out, copied)
    for begin, loss in (("full", "1e5"), ("0.5-sparse", "800.5"), ("0.25-sparse", "NaN"),
                        ("0.25-gaussian", "Infinity")):
        name = next(name for name in done.folders if name.startswith(begin))
        path = copied / name / "log.jsonl"
        path.write_text(re.sub(r'"val_loss": [^,}]+', f'"val_loss": {loss}',
                               re.sub(r'"loss": [^,}]+', f'"loss": {loss}', path.read_text())))
    monkeypatch.setattr(sys, "argv", [str(copied) if word == str(done.out) else word
                                      for word in done.command[1:]])
    with pytest.raises(SystemExit) as caught:
        ablate.main()
    table = (copied / "results.md").read_text()
    assert caught.value.code == 0 and "inf" in table and "Traceback" not in table
    assert len(figures) == 5
    for figure in figures:
        figure.draw_without_rendering()


def test_learning_rates_need_a_validation_loss(sweep):
    # a shard: nothing of it is set aside
    formats.write_tokens(sweep.folder / "text.txt", np.arange(2000) % 50, 50)
    said = sweep.run("--ratios", "1", "--lr-sweep", "1e-2,1e-3", status=2)
    assert said.endswith("ablate.py: --lr-sweep: chooses by validation loss, and there is none; "
                         "give --val\n")

# ----------------------------------------------------------------------------
# the command line


def line_of(program, options, monkeypatch, capfd):
    """
    What a program that ends with status 2 says, run in this process, which spares loading it anew:
    its own line or the trainer's.
    """
    monkeypatch.setattr(sys, "argv", [program.__name__ + ".py", *map(str, options)])
    with pytest.raises((plot.Problem, SystemExit)) as caught:
        program.main()
    out, err = capfd.readouterr()
    line = str(caught.value) + "\n" if caught.type is plot.Problem else err
    assert (caught.type is plot.Problem
            or caught.value.code == 2) and out == "" and line.count("\n") == 1, line
    return line


@pytest.mark.parametrize(
    "options, words",
    [(["--ratios", "1,0"], "--ratios: '0' is neither a ratio in (0, 1]"),
     (["--ratios", "3/2"], "--ratios: '3/2' is neither"),
     (["--ratios", "64.5"], "--ratios: '64.5' is neither"),
     (["--ratios", "1/0"], "--ratios: '1/0' is neither"),
     (["--decays", "0,-0.1"], "--decays: '-0.1' is not a weight decay"),
     (["--also", "--seeds 3"], "--also: --seeds is one for all combinations"),
     (["--also", "--ratios 1 --also x"], "--also: --also is one for all"),
     (["--also", "--ratios '1"], "--also: \"--ratios '1\": No closing quotation"),
     (["--also", "--nonsense 3"], "train_gpt2_compact: --nonsense: "),
     (["--decays", "0,0.1", "-c", "0.2"],
      "--weight-decay: is 0 by what is listed, and 0.2 by the flags"),
     (["--seeds", ""], "--seeds: '' is empty"),
     (["--compress", "qkv,fc/"], "--compress: 'qkv,fc/' "),
     (["--lr-sweep", "1e-3,-1"], "--lr-sweep: '-1' is not a learning rate"),
     (["--lr-sweep", "1e-3,1e-2", "-v", "0"],
      "--lr-sweep: chooses by validation loss, which --val-every 0"),
     (["--jobs", "0"], "--jobs: '0' is not a whole number"),
     (["--projections", "gaussian,cauchy"], "train_gpt2_compact: --projection: 'cauchy' "),
     (["--nonsense"], "train_gpt2_compact: --nonsense: "),
     (["--rank", "0.3"], "--rank: is 1 by what is listed, and 0.3 by the flags for the trainer"),
     (["--train", "nothing.txt"], "train_gpt2_compact: --train: no file matches 'nothing.txt'"),
     (["--steps", "-1"], "--steps: is missing"), (["--plan"], "printed no plan"),
     (["--binary", "/nonexistent"], "--binary: /nonexistent cannot be run: No such file"),
     (["--out", "text.txt"], "--out: text.txt is a file")])
def test_bad_options(tmp_path, monkeypatch, capfd, options, words):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(make_text(3000))
    options = ["--binary", TRAINER, "--out", "out", "--train", "text.txt", *SHAPE, "--steps", 3,
               *options]
    assert words in line_of(ablate, options, monkeypatch, capfd)
    assert os.listdir() == ["text.txt"]


@pytest.mark.parametrize("left_out, words",
                         [("--train", "--train: is missing"),
                          ("--out", "the following arguments are required: -o/--out")])
def test_missing_options(tmp_path, left_out, words):
    (tmp_path / "text.txt").write_text(make_text(3000))
    options = {"--train": "text.txt", "--out": "out", "--binary": TRAINER, "--steps": "3",
               "-e": "d2"}
    command = [sys.executable, str(ROOT / "dev/ablate.py"),
               *(word for name, value in options.items() if name != left_out
                 for word in (name, value))]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode,
            ended.stdout) == (2, "") and words in ended.stderr and ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_package_is_missing(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no module', name='matplotlib')\n")
    for tool in ("plot.py", "ablate.py"):
        ended = subprocess.run([sys.executable, str(ROOT / "dev" / tool), "x"], capture_output=True,
                               text=True, env=dict(os.environ, PYTHONPATH=tmp_path))
        assert ended.returncode == 2
        assert ended.stderr == (f"{tool}: the Python package matplotlib is missing: "
                                "pip install -r dev/requirements.txt\n")


def methods(*options):
    args = ablate.parse_options(["--out", "out", *options])
    return [method for group in args.groups for method in ablate.list_methods(group)]


def test_methods():
    assert methods() == [{"rank": rank} for rank in ("1", "0.5", "0.25", "0.125")]
    assert methods("--ratios", "1/3,0.25") == [{"rank": "0.333333333"}, {"rank": "0.25"}]
    assert methods("--ratios", "1,1/2,5e-1", "--projections", "a,b", "--levels", "0,2", "--gaps",
                   "5") == [{"rank": "1", "recompute": "0"}, {"rank": "1", "recompute": "2"},
                            *({"rank": "0.5", "recompute": level, "projection": projection,
                               "gap": "5"} for level in "02" for projection in "ab")]
    assert (methods("--ratios", "1/2,1", "--compress", "qkv,fc/none/fc,qkv", "--moments", "keep")
            == [{"rank": "0.5", "moments": "keep", "compress": "qkv,fc"}, {"rank": "1"}])
    assert len(methods("--alphas", "1,0.25,1.0", "--moments", "keep,move")) == 13
    assert methods("--ratios", "1,64,2e1", "--optimizers", "adamw,muon") == [
        {"rank": rank, "optimizer": optimizer}
        for optimizer in ("adamw", "muon") for rank in ("1", "64", "20")]
    assert methods("--ratios", "1", "--projections", "a", "--also", "--ratios 1/2",
                   "--also", "--ratios 1/4 --optimizers=muon -c 3") == [
        {"rank": "1"}, {"rank": "0.5", "projection": "a"},
        {"rank": "0.25", "projection": "a", "optimizer": "muon"}]


def test_what_makes_a_run_another(tmp_path):
    (tmp_path / "text.txt").write_text(make_text(3000))
    (tmp_path / "other").symlink_to(TRAINER)

    def name(*options, binary=TRAINER, seed=None, lr=None):
        train = ["--out", "out", "--train", tmp_path / "text.txt", "--steps", 3, *SHAPE, *options]
        args = ablate.parse_options([str(word) for word in train])
        args.binary = binary
        return ablate.plan_run(args, args.groups[0], {"rank": "0.25"}, seed, lr, None).name
    first = name()
    for same in (name("--gap", 100), name("--projection", "sparse"), name("-l", "3e-4"),
                 name("--jobs", 2), name("--tokenizer", "none.bin"),
                 name(seed="1337", lr="0.0003")):
        assert same == first
    others = [name("--gap", 49), name("-l", "4e-4"), name("-b", 3), name("-c", 0.2),
              name("--clip", 2), name("--overfit"), name(seed="2"),
              name(binary=str(tmp_path / "other"))]
    assert len({first, *others}) == 9


def test_which_binary(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / "bin").mkdir()
    smi, cuda, cpu = (tmp_path / "bin/nvidia-smi", tmp_path / "train_gpt2_compactcu",
                      tmp_path / "train_gpt2_compact")
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA Test'\n")
    smi.chmod(0o755)
    (tmp_path / "Makefile").write_text("train_gpt2_compact:\n\tfalse\n")
    with pytest.raises(plot.Problem, match="train_gpt2_compact is missing"):
        ablate.choose_binary(None)
    (tmp_path / "Makefile").write_text("train_gpt2_compact:\n\ttouch $@\n")
    assert ablate.choose_binary(None) == str(cpu) and cpu.exists()
    cuda.touch()
    assert ablate.choose_binary(None) == str(cuda)
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert ablate.choose_binary(None) == str(cpu)
    assert ablate.choose_binary("x/trainer") == os.path.abspath("x/trainer")

# ----------------------------------------------------------------------------
# plot.py


@pytest.fixture
def cut(done, tmp_path):
    """A copy of a run whose log ends in the middle of a line; the log's lines."""
    lines = (done.out
             / next(name for name in done.folders
                    if name.startswith("full"))/ "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/log.jsonl").write_text("".join(lines[:14]) + lines[14][:20])
    return lines


def test_plot(done, cut, tmp_path):
    others = [str(done.out / name) for name in done.folders if name.startswith("0.25-sparse")]
    command = [sys.executable, str(ROOT / "dev/plot.py"), "cut", *others, "--out", "picture.png"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "picture.png\n", "")
    check_picture(tmp_path / "picture.png", BLACK, BLUE, ORANGE)
    log = plot.read_log(tmp_path / "cut")
    assert (list(log.steps) == list(range(1, 13)) and list(log.val_steps) == [8]
            and log.losses[0] == json.loads(cut[1])["loss"])


def test_plot_passes_over_what_is_no_run(done, tmp_path, monkeypatch, capfd):
    """And says so: runs/* may be given. A name may look like a formula, and need not be text."""
    name = next(name for name in done.folders if name.startswith("full"))
    strange = ["_hidden", r"$\frac{$", os.fsdecode(b"\xe9")]
    for folder in strange:
        shutil.copytree(done.out / name, tmp_path / folder)
    (tmp_path / "results.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    drawn = []
    monkeypatch.setattr(plot.common, "whole_file",
                        lambda path: contextlib.nullcontext(io.BytesIO()))
    monkeypatch.setattr(plot.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot.py", *sorted(os.listdir())])
    plot.main()
    out, err = capfd.readouterr()
    assert out == "loss.png\n" and err.count("\n") == err.count("passed over: ") == 2
    assert "empty/log.jsonl" in err and "results.csv" in err
    check_legend(drawn[0], [r"\$\frac{\$", " _hidden", r"\udce9"])


def test_a_log_of_several_starts(tmp_path):
    """The last header holds, and what a start did again stands for what it did before. Lines end at
    \\n alone."""
    def start(**options):
        return {"revision": "r", "device": "d", "options": options, "plan": {}}

    def step(number, loss):
        return {"step": number, "loss": loss, "norm": 1.0, "lr": 0.1, "ms": 1.0,
                "tokens_per_second": 1.0}
    records = [start(lr=1), step(1, 5.0), {"step": 1, "val_loss": 5.5, "bits_per_byte": 8.0},
               step(2, 4.0), {"step": 2, "sample": "one\u2028two\u2029three\x85four"}, step(3, 3.0),
               start(lr=2), step(2, 4.5), {"step": 2, "val_loss": 4.6, "bits_per_byte": 6.6}]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 3, "lo', encoding="utf-8")
    log = plot.read_log(tmp_path)
    assert log.options == {"lr": 2} and log.steps.tolist() == [1, 2]
    assert log.losses.tolist() == [5.0, 4.5]
    assert log.val_steps.tolist() == [1, 2] and log.val_losses.tolist() == [5.5, 4.6]
    assert log.bits_per_byte == 6.6


@pytest.mark.parametrize("what, words", [
    ("nothing", "cut/log.jsonl: cannot be read: No such file"),
    ("empty", "cut/log.jsonl: is not a log of the trainer"),
    ("head", "cut/log.jsonl: holds no step yet"),
    ("middle", "cut/log.jsonl: line 3 is no record of the trainer's"),
    ("other", "cut/log.jsonl: is not a log of the trainer"),
])
def test_plot_bad_logs(cut, tmp_path, monkeypatch, capfd, what, words):
    log = tmp_path / "cut/log.jsonl"
    contents = {"empty": "", "head": cut[0],
                "middle": "".join([*cut[:2], cut[2][:9] + "\n", *cut[3:]]),
                "other": '{"step": 1}\n'}
    log.write_text(contents[what]) if what in contents else log.unlink()
    monkeypatch.chdir(tmp_path)
    assert words in line_of(plot, ["cut", "--out", "picture.png"], monkeypatch, capfd)
    assert os.listdir() == ["cut"]


@pytest.mark.parametrize("options, words",
                         [(["--out", "loss.pdf"], "--out: loss.pdf does not end in .png"),
                          (["-o", "no/loss.png"], "--out: there is no"),
                          (["--nonsense"], "--nonsense")])
def test_plot_bad_options(cut, tmp_path, monkeypatch, capfd, options, words):
    monkeypatch.chdir(tmp_path)
    assert words in line_of(plot, ["cut", *options], monkeypatch, capfd)


def test_labels():
    base = {"rank": 0.25, "compress": "qkv,fc", "projection": "gaussian", "gap": 50, "alpha": 1,
            "lr": 0.001, "seed": 1, "recompute": 0, "overfit": False, "out": "x"}

    def labels(*changes, **how):
        return plot.labels([dict(base, **change) for change in changes], **how)
    assert labels({}) == [""] and labels({}, {"out": "y"}) == ["", ""]
    assert labels({"rank": 1}, {}, {"projection": "sparse"}) == ["full rank", "rank 1/4, gaussian",
                                                                 "rank 1/4, sparse"]
    assert labels({}, {"projection": "sparse", "gap": 5}, {"projection": "sparse", "gap": 10}) == [
        "gaussian, gap 50", "sparse, gap 5", "sparse, gap 10"]
    # a gap means nothing at full rank
    assert labels({"compress": "none", "gap": 5},
                  {"rank": 0.333333333}) == ["full rank", "rank 1/3"]
    assert labels({"seed": 2, "lr": 1e-4}, {}) == ["lr 0.0001, seed 2", "lr 0.001, seed 1"]
    assert labels({"seed": 2, "lr": 1e-4}, {}, leave_out=["seed"]) == ["lr 0.0001", "lr 0.001"]
    assert (labels({"recompute": 2}, {}) == ["recompute 2", "recompute 0"]
            and labels({"overfit": True}, {}) == ["overfit", "no overfit"])
    assert labels({"optimizer": "muon"}, {"optimizer": "adamw", "rank": 1}) == [
        "rank 1/4, muon", "full rank, adamw"]
    # each has its own gap by default
    assert labels({"optimizer": "muon", "gap": 100}, {"optimizer": "adamw"}) == ["muon", "adamw"]
    assert labels({"rank": 64.0}, {}) == ["rank 64", "rank 1/4"]
    assert labels({"weight-decay": 0.0}, {"weight-decay": 0.1}) == [
        "weight-decay 0", "weight-decay 0.1"]
    # an option that this file does not know
    assert labels({"gelu": "2bit"}, {"gelu": "none"}) == ["gelu 2bit", "gelu none"]


def test_smoothing():
    values = np.random.default_rng(1).normal(size=40)
    for reach in (1, 3, 50):
        for i, smoothed in enumerate(plot.smooth(values, reach)):
            before = min(reach, i)
            assert smoothed == pytest.approx(values[i - before:i + before + 1].mean())
    assert plot.smooth(np.array([2.0]), 3) == [2.0]
    # a slope stays where it is
    assert plot.smooth(np.arange(9.0), 3)[:6] == pytest.approx(np.arange(6.0))


def test_mean_and_deviation():
    assert plot.mean_and_deviation([3.0]) == (3.0, 0.0)
    assert plot.mean_and_deviation([1.0, 2.0, 6.0]) == pytest.approx((3.0,
                                                                      statistics.stdev([1, 2, 6])))
