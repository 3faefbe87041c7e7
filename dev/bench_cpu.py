#!/usr/bin/env python3
"""
Milliseconds that a step of GPT-2 d12 (B=4, T=64, fp32) takes on this machine's CPU: full rank,
compressed, and llm.c.

The variants take turns, round after round, so that a machine whose speed drifts slows all of them
alike; the figure is the median over all rounds. Needs nothing but the built trainer. The trainer
without BLAS takes its turn too, if build/train_no_blas is there; so does llm.c's train_gpt2, if
--llmc names its folder.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from gpu_check import write_tokens

ROOT = Path(__file__).resolve().parent.parent


def trainer_steps(binary, folder, steps, flags):
    """ms of each step but the first, which also pays for touching its memory."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    command = [str(binary), "--train", str(folder / "train.bin"), "-b", "4", "-t", "64", "-x",
               str(steps + 1), "-v", "0", "-n", "0", "-o", str(out)]
    subprocess.run(command + flags, check=True, stdout=subprocess.DEVNULL)
    lines = (out / "log.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line)["ms"] for line in lines[2:]]


def llmc_steps(binary, folder, steps):
    """Runs llm.c's program where it finds random weights and the same tokens, for some steps."""
    process = subprocess.Popen([str(binary)], cwd=folder, stdout=subprocess.PIPE, text=True)
    times = []
    for line in process.stdout:
        match = re.match(r"step (\d+): train loss .* \(took ([\d.]+) ms\)", line)
        if match and int(match[1]) > 0:
            times.append(float(match[2]))
        if len(times) == steps:
            break
    process.kill()
    process.wait()
    return times


def prepare_llmc(folder):
    """The files that llm.c's train_gpt2 opens, in the places where it looks for them."""
    command = [str(ROOT / "train_gpt2_compact"), "--train", str(folder / "train.bin"), "-b", "1",
               "-t", "64", "-x", "0", "-v", "0", "-n", "-1", "-o", str(folder / "weights"),
               "--compress", "none"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (folder / "weights/model_00000000.bin").rename(folder / "gpt2_124M.bin")
    shutil.rmtree(folder / "weights")
    data = folder / "dev/data/tinyshakespeare"
    data.mkdir(parents=True)
    shutil.copy(folder / "train.bin", data / "tiny_shakespeare_train.bin")
    shutil.copy(folder / "train.bin", data / "tiny_shakespeare_val.bin")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmc", type=Path, metavar="DIR",
                        help="folder with llm.c's train_gpt2, built by its own Makefile")
    parser.add_argument("--steps", type=int, default=2,
                        help="steps of a variant in a round (default 2)")
    parser.add_argument("--rounds", type=int, default=5,
                        help="rounds (default 5: medians of 10 steps)")
    args = parser.parse_args()
    own, plain = ROOT / "train_gpt2_compact", ROOT / "build/train_no_blas"
    if not own.exists():
        sys.exit("bench_cpu.py: ./train_gpt2_compact is not built: make")
    if args.llmc and not (args.llmc / "train_gpt2").exists():
        sys.exit(f"bench_cpu.py: --llmc: {args.llmc} has no train_gpt2; "
                 "build it there with `make train_gpt2`")
    # of all alike: where other work runs, threads that spin while they wait slow everything
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "train.bin", 64 * 1024, 50257)
        full, quarter = ["--rank", "1", "--optimizer", "adamw"], ["--rank", "0.25"]
        flags = {"full rank": full,
                 "rank 1/4, sparse": [*quarter, "--optimizer", "adamw", "--projection", "sparse"],
                 "rank 1/4, sparse, muon": [*quarter, "--projection", "sparse"],
                 "rank 1/4, gaussian": [*quarter, "--optimizer", "adamw",
                                        "--projection", "gaussian"]}
        variants = {name: partial(trainer_steps, own, folder, args.steps, chosen)
                    for name, chosen in flags.items()}
        if plain.exists():
            variants["full rank, no BLAS"] = partial(trainer_steps, plain, folder, args.steps, full)
        if args.llmc:
            prepare_llmc(folder)
            llmc = args.llmc.resolve() / "train_gpt2"
            variants["llm.c"] = partial(llmc_steps, llmc, folder, args.steps)
        times = {variant: [] for variant in variants}
        for round_number in range(args.rounds):
            for variant, run in variants.items():
                times[variant] += run()
                print(f"round {round_number + 1}: {variant}: "
                      f"{statistics.median(times[variant]):.0f} ms", file=sys.stderr)
    base = statistics.median(times["full rank"])
    print(f"| GPT-2 d12, B=4, T=64, fp32 | median of {args.steps * args.rounds}, "
          "ms a step | speed, full rank = 1 |\n|---|---|---|")
    for variant, values in times.items():
        median = statistics.median(values)
        print(f"| {variant} | {median:.0f} | {base / median:.2f} |")


if __name__ == "__main__":
    main()
