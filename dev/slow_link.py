#!/usr/bin/env python3
"""
What a smaller gradient saves where processes on several machines share a step: two processes of the
trainer (make MPI=1) on this machine, whose loopback is slowed down to a network's speed, in a
network namespace of their own. Both directions share the link. Prints a table: each method's bytes
of gradients, and at each speed the median of its steps' milliseconds. The methods take turns,
several times, so that a noisy machine treats all alike.

Linux, as root or where users may make namespaces; Open MPI; iproute2.

example: slow_link.py --train input.txt -e d4 --channels 256 --context 128 -b 8
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile

import plot  # also makes data_prep/common.py known
import common
from common import Parser, Problem, whole_number

METHODS = {"full rank, AdamW": ["--rank", "1", "--optimizer", "adamw"],
           "rank 1/4": ["--rank", "0.25"], "rank 1/8": ["--rank", "0.125"],
           "rank 1/16": ["--rank", "0.0625"]}
FIRST_STEPS = 2  # they also pay for touching memory
PROCESSES = 2
# Every message through the loopback, none through shared memory.
MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none", "--mca", "btl", "tcp,self",
          "--mca", "btl_tcp_if_include", "lo", "-np", str(PROCESSES)]
SLOW = ("ip link set lo up && tc qdisc add dev lo root tbf rate {}mbit burst 256kb latency 100ms "
        '&& exec "$@"')


def parse_options():
    parser = Parser(__doc__)
    parser.add_argument("--rates", metavar="LIST", default="10000,1000,100",
                        help="Mbit/s (default: %(default)s)")
    parser.add_argument("--rounds", metavar="N", type=whole_number(1, 100), default=3,
                        help="turns (default: %(default)s)")
    parser.add_argument("--steps", metavar="N", type=whole_number(FIRST_STEPS + 1, 1000), default=8,
                        help="of a turn (default: %(default)s)")
    parser.add_argument("--binary", default=os.path.join(plot.ROOT, "train_gpt2_compact"),
                        help="the trainer, built with MPI=1 (default: train_gpt2_compact)")
    args, trainer = parser.parse_known_args()
    args.trainer = [os.path.abspath(args.binary), *trainer, "-x", str(args.steps), "-n", "0", "-v",
                    "0"]
    try:
        args.rates = [whole_number(1, 100000)(rate) for rate in args.rates.split(",")]
    except Exception:
        raise Problem(f"--rates: {args.rates} is no list of Mbit/s, such as 1000,100") from None
    for tool in ("mpirun", "unshare", "tc"):
        if not shutil.which(tool):
            raise Problem(f"{tool} is missing: apt-get install openmpi-bin util-linux iproute2")
    return args


def milliseconds(command, out, env):
    """Of each step but the first ones."""
    done = subprocess.run([*command, "-o", out], capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise Problem(f"{' '.join(command)} failed: {done.stderr.strip()}")
    with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as log:
        steps = [json.loads(line) for line in log]
    shutil.rmtree(out)
    return [step["ms"] for step in steps if "ms" in step][FIRST_STEPS:]


def gradients(args, flags):
    done = subprocess.run([*args.trainer, *flags, "--plan=json"], capture_output=True, text=True)
    if done.returncode != 0:
        raise Problem(done.stderr.strip())
    return json.loads(done.stdout)["categories"]["gradients"]


def main():
    args = parse_options()
    threads = max(1, (os.cpu_count() or 1) // PROCESSES)
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), OMPI_ALLOW_RUN_AS_ROOT="1",
               OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    times = {(name, rate): [] for name in METHODS for rate in args.rates}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for rate in args.rates:
                for name, flags in METHODS.items():
                    command = ["unshare", *user, "--net", "sh", "-c", SLOW.format(rate), "sh",
                               *MPIRUN, *args.trainer, *flags]
                    times[name, rate] += milliseconds(command, os.path.join(folder, "run"), env)
                    print(f"turn {turn + 1}/{args.rounds}: {rate} Mbit/s, {name}", file=sys.stderr)
    print_table(args, {key: statistics.median(value) for key, value in times.items()})


def print_table(args, medians):
    baseline = next(iter(METHODS))
    print("| method | gradients | " + " | ".join(f"{rate:,} Mbit/s" for rate in args.rates) + " |")
    print("|---|---|" + "---|" * len(args.rates))
    for name, flags in METHODS.items():
        cells = [f"{medians[name, rate]:,.0f} ms "
                 f"({medians[baseline, rate] / medians[name, rate]:.2f} ×)" for rate in args.rates]
        print(f"| {name} | {gradients(args, flags) / 1e6:.1f} MB | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    common.run(main)
