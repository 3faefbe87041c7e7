#!/usr/bin/env python3
"""
Rewrites the table in README.md: what each variant is predicted to move and compute, by `--predict`
of every binary, and how long it was measured to take, where dev/results/variants_*.json has lines
of `--json` about it.

Usage: python3 dev/cuda/table.py [--check]   after `make -C dev/cuda nogpu` (or `make -C dev/cuda`)
--check writes nothing and ends with status 1 if the table is out of date.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
README = HERE / "README.md"
BEGIN, END = "<!-- the table: made by table.py -->\n", "<!-- end of the table -->\n"


def fail(message):
    print(f"table.py: {message}", file=sys.stderr)
    sys.exit(2)


def predictions():
    """{layer: its lines}, of either binary: they predict the same."""
    layers = {}
    for source in sorted(HERE.glob("*.cu")):
        binary = ROOT / "build/cuda" / f"{source.stem}_nogpu"
        if not binary.exists():
            binary = ROOT / "build/cuda" / source.stem
        if not binary.exists():
            fail(f"build/cuda/{source.stem}_nogpu is not there: make -C dev/cuda nogpu")
        said = subprocess.run([binary, "--predict"], capture_output=True, text=True)
        if said.returncode != 0:
            fail(f"{binary.name} --predict: {said.stderr.strip()}")
        layers[source.stem] = [json.loads(line) for line in said.stdout.splitlines()]
    return layers


def measurements():
    """{device and precision: {(layer, variant): line}}; of several lines the last counts."""
    devices = {}
    for path in sorted(ROOT.glob("dev/results/variants_*.json")):
        for line in path.read_text().splitlines():
            m = json.loads(line)
            name = f"{m['device'].split(',')[0]}, {m['precision']}"
            devices.setdefault(name, {})[m["layer"], m["variant"]] = m
    return devices


def cell(lines, variant):
    """A measured time, where one is there for the same variant at the same size."""
    m = lines.get((variant["layer"], variant["variant"]))
    if not m or (m["idea"], m["size"]) != (variant["idea"], variant["size"]):
        return ""
    return f"{1e3 * m['ms']:.1f} ({100 * m['floor_ms'] / m['ms']:.0f} %)"


def table(layers, devices):
    text = "" if devices else "\nNo measured times yet: dev/results holds no variants_*.json.\n"
    for layer, variants in layers.items():
        size = ", ".join(f"{name} = {n}" for name, n in variants[0]["size"].items())
        text += f"\n**{layer}**, {size}, {variants[0]['precision']}\n\n"
        measured = "".join(f" {name}: us (of the floor) |" for name in devices)
        text += f"| | variant | MB | floor, MB | GFLOP |{measured}\n"
        text += "|---|---|---|---|---|" + "---|" * len(devices) + "\n"
        for v in variants:
            cells = [str(v["variant"]), v["idea"], f"{v['bytes'] / 1e6:,.1f}",
                     f"{v['floor_bytes'] / 1e6:,.1f}", f"{v['flops'] / 1e9:,.3f}"]
            cells += [cell(lines, v) for lines in devices.values()]
            text += "| " + " | ".join(cells) + " |\n"
    return text + "\n"


def main():
    if sys.argv[1:] not in ([], ["--check"]):
        fail(f"{' '.join(sys.argv[1:])}: the one option is --check")
    text = README.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        fail(f"README.md: needs the lines {BEGIN.strip()} and {END.strip()}, once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    new = before + BEGIN + table(predictions(), measurements()) + END + after
    if len(sys.argv) == 1:
        README.write_text(new)
    elif new != text:
        print("table.py: the table in dev/cuda/README.md is out of date: python3 dev/cuda/table.py",
              file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
