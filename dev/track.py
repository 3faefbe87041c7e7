#!/usr/bin/env python3
"""
Shows runs of the trainer where people look at runs: TensorBoard, Weights & Biases or trackio. Each
DIR holds a run's log.jsonl (the trainer's --out). What is there is written at once; with --follow
also what comes, until the run's last step or Ctrl-C. The trainer knows nothing of it.

All stays on this machine: wandb is offline unless WANDB_MODE says otherwise (`wandb sync` sends it
later); trackio's files go to DIR/trackio unless TRACKIO_DIR names another folder.

example: track.py runs/mine --to tensorboard && tensorboard --logdir runs/mine/tensorboard
         track.py runs/mine --to wandb --follow
"""

import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "data_prep"))
import common
from common import Parser, Problem

POLL = 2.0  # seconds between looks at a log that is followed
PROJECT = "train_gpt2_compact"

# ---------------------------------------------------------------------------- where to
# Each begins a run, and gives two functions: log(step, {name: number}) and finish().


def tensorboard(folder, name, options):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    writer = EventFileWriter(os.path.join(folder, "tensorboard"))

    def log(step, values):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)
                                 for tag, value in values.items()])
        writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
    return log, writer.close


def wandb(folder, name, options):
    import wandb
    run = wandb.init(project=PROJECT, name=name, dir=folder, config=options,
                     mode=os.environ.get("WANDB_MODE", "offline"))
    return lambda step, values: run.log(values, step=step), run.finish


def trackio(folder, name, options):
    os.environ.setdefault("TRACKIO_DIR", os.path.abspath(os.path.join(folder, "trackio")))
    import trackio
    trackio.init(project=PROJECT, name=name, config=options)
    return lambda step, values: trackio.log(values, step=step), trackio.finish


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}

# ---------------------------------------------------------------------------- from where


def numbers(record):
    return {name: float(value) for name, value in record.items()
            if name != "step" and isinstance(value, (int, float))}


def follow(folder, track, following):
    """
    Passes a run's records on, each once: what a resumed run did again is the same again. A run
    that is followed is over when its last step is there and no more comes.
    """
    options = common.read_log(folder)[0]["options"]
    log, finish = track(folder, os.path.basename(os.path.abspath(folder)), options)
    passed = set()
    try:
        while True:
            header, records = common.read_log(folder)
            fresh = [record for record in records
                     if (record["step"], "loss" in record) not in passed]
            for record in fresh:
                log(record["step"], numbers(record))
                passed.add((record["step"], "loss" in record))
            over = (header["options"]["steps"], True) in passed and not fresh
            if over or not following:
                return len(passed)
            time.sleep(POLL)
    except KeyError:
        raise Problem(f"{os.path.join(folder, 'log.jsonl')}: is no log of the trainer, whose "
                      "records have a step") from None
    finally:
        finish()


def main():
    parser = Parser(__doc__)
    parser.add_argument("folders", metavar="DIR", nargs="+", help="folders that hold a log.jsonl")
    parser.add_argument("--to", choices=TRACKERS, required=True, help="what to show them by")
    parser.add_argument("--follow", action="store_true",
                        help="go on until the run's last step; of one run")
    args = parser.parse_args()
    if args.follow and len(args.folders) > 1:
        raise Problem("--follow: takes one run; start it once for each")
    for folder in args.folders:
        common.read_log(folder)  # before anything is written
    for folder in args.folders:
        try:
            count = follow(folder, TRACKERS[args.to], args.follow)
        except ImportError as error:
            raise Problem(f"--to {args.to}: the Python package {error.name} is missing: "
                          f"pip install {args.to}") from None
        print(f"{folder}: {count:,} records to {args.to}")


if __name__ == "__main__":
    common.run(main)
