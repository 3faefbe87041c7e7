#!/usr/bin/env python3
"""
The frontier that the trainer's flags reach: bytes of a training run against the FLOPs of its matrix
products, for every recomputation level, rank ratio and kind of projection, as `--plan=json` says.
Nothing is run and no GPU is needed.

example: dev/frontier.py              draws dev/results/frontier.png
         dev/frontier.py --table      prints the numbers as well
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import plot  # also makes data_prep/common.py known
import common
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

ROOT = Path(plot.ROOT)
# bf16, as a GPU trains; both print a plan on any machine
BINARIES = ["train_gpt2_compactcu", "train_gpt2_compact_nogpu"]
MODELS = [("d12", 64, "GPT-2 124M (d12), B = 64"), ("d48", 4, "GPT-2 1.5B (d48), B = 4")]
RATIOS = {"1": "full rank", "0.5": "1/2", "0.25": "1/4", "0.125": "1/8"}
COLOURS = dict(zip(RATIOS, plot.COLOURS))
KINDS = {"gaussian": ("--", "o"), "sparse": ("-", "s")}  # rademacher's cost is gaussian's
LEVELS = range(6)


def stop(why):
    print(f"frontier.py: {why}", file=sys.stderr)
    sys.exit(2)


def plan(binary, *flags):
    done = subprocess.run([binary, "--plan=json", *map(str, flags)], capture_output=True, text=True)
    if done.returncode != 0:
        stop(done.stderr.strip())
    return json.loads(done.stdout)


def curves(binary, model, batch):
    """
    {(ratio, projection): [(FLOPs over those of full rank at level 2, bytes) of each level]}, and
    the bytes of full rank at level 2.
    """
    found = {}
    for ratio, kind in itertools.product(RATIOS, KINDS):
        if ratio == "1" and kind != "sparse":
            continue  # there is no projection at full rank
        found[ratio, kind] = []
        for level in LEVELS:
            said = plan(binary, "-e", model, "-b", batch, "-t", 1024, "--rank", ratio,
                        "--optimizer", "adamw", "--projection", kind, "-r", level)
            base = said["full_rank_level_2"]
            flops = said["flops_per_token"]["total"] / base["flops_per_token"]["total"]
            found[ratio, kind].append((flops, said["total_bytes"]))
    return found, base["total_bytes"]


def draw(panels, out):
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (title, found, base) in zip(axes, panels):
        for (ratio, kind), points in found.items():
            line, marker = KINDS[kind]
            axis.plot([100 * flops for flops, _ in points], [size / 1e9 for _, size in points],
                      line, marker=marker, markersize=5, color=COLOURS[ratio], linewidth=1.5,
                      zorder=3)
            before, top = None, 0
            for level, (flops, size) in zip(LEVELS, points):
                # of levels that nearly coincide the first one is named
                if flops != before or top - size > 0.04 * base:
                    axis.annotate(level, (100 * flops, size / 1e9), xytext=(4, 4),
                                  textcoords="offset points", fontsize=7, color=COLOURS[ratio])
                    top = size
                before = flops
        axis.axvline(100, color="#999999", linewidth=0.8, zorder=1)
        axis.axhline(base / 1e9, color="#999999", linewidth=0.8, zorder=1)
        axis.set_title(title + ", T = 1024, bf16")
        axis.set_xlabel("matrix-product FLOPs a token, % of full rank at level 2")
        axis.set_ylabel("memory of the run, GB (10$^9$ bytes)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    lines = [Line2D([], [], color=COLOURS["1"], marker="s", label="full rank")]
    for ratio, kind in itertools.product([r for r in RATIOS if r != "1"], KINDS):
        line, marker = KINDS[kind]
        lines.append(Line2D([], [], color=COLOURS[ratio], linestyle=line, marker=marker,
                            label=f"rank {RATIOS[ratio]}, {kind}"))
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False,
                  title="small numbers: --recompute level; grey lines: full rank at level 2")
    with common.whole_file(str(out)) as file:
        figure.savefig(file, format="png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", help="the trainer that is asked (the first built of "
                        + ", ".join(BINARIES) + ")")
    parser.add_argument("--out", type=Path, default=ROOT / "dev/results/frontier.png")
    parser.add_argument("--table", action="store_true", help="print the numbers")
    args = parser.parse_args()
    binary = args.binary or next((str(ROOT / b) for b in BINARIES if (ROOT / b).exists()), None)
    if binary is None or not Path(binary).exists():
        stop(f"--binary: {binary or 'none of ' + ', '.join(BINARIES)} is there; "
             "make train_gpt2_compact_nogpu builds one")
    if args.out.suffix != ".png":
        stop(f"--out: {args.out} does not end in .png")
    panels = [(title, *curves(binary, model, batch)) for model, batch, title in MODELS]
    for title, found, base in panels if args.table else []:
        print(f"{title}: full rank at level 2 takes {base / 1e9:.2f} GB")
        print(f"{'rank':10} {'projection':10} "
              + " ".join(f"{'level ' + str(level):>14}" for level in LEVELS))
        for (ratio, kind), points in found.items():
            cells = [f"{size / 1e9:5.2f} GB {100 * flops:3.0f} %" for flops, size in points]
            print(f"{RATIOS[ratio]:10} {kind if ratio != '1' else '':10} "
                  + " ".join(cell.rjust(14) for cell in cells))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(panels, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
