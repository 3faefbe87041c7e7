#!/usr/bin/env python3
"""
Shows the tensors of a file that the trainer wrote with --dump: parameters,
activations, gradients and projections of one step.

Without a name: all of them, each with its shape, smallest and greatest value
and root mean square. With a name: that tensor's values. With --npz: the same
tensors, or the one, as a file for numpy.load.

example: dump.py step.dump
         dump.py step.dump grad.fcw.0
         dump.py step.dump --npz step.npz
"""

import argparse
import math
import os
import signal
import struct
import sys

try:
    import numpy as np
except ImportError:
    print("dump.py: the Python package numpy is missing: pip install numpy", file=sys.stderr)
    sys.exit(2)


class Problem(ValueError):
    """Something the user can mend. Its text is the one line the user gets to see."""


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the usage as well
        raise Problem(f"{message} (see --help)")


def map_file(path):
    if os.path.isfile(path) and os.path.getsize(path) == 0:  # NumPy maps no empty file
        raise Problem(f"{path}: is empty; what the trainer's --dump wrote is wanted")
    return np.memmap(path, np.uint8, "r")


def read(path):
    """
    The records of a --dump file: a dict from names to float32 arrays, in the file's order. They are
    maps of the file, which may be larger than memory.

    A record is an int32, the length of its name; the name; an int32, the number of dimensions; an
    int64 for each; its values as float32. All is little-endian.
    """
    data, records, at, start = np.asarray(map_file(path)), {}, 0, 0

    def take(layout):
        nonlocal at
        values = struct.unpack_from("<" + layout, data, at)
        at += struct.calcsize("<" + layout)
        return values

    try:
        while at < data.size:
            start = at
            name = take(f"{take('i')[0]}s")[0].decode()
            shape = take(f"{take('i')[0]}q")
            if name in records or not name.isprintable() or min(shape, default=0) < 0:
                raise ValueError
            end = at + 4 * math.prod(shape)
            records[name] = data[at:end].view("<f4").reshape(shape)
            at = end
    except (struct.error, ValueError):
        raise Problem(f"{path}: the record at byte {start:,} is broken or cut short; "
                      "what the trainer's --dump wrote is wanted") from None
    return records


def lift(records, name):
    """
    The gradient of a linear layer's weight, such as "fcw.0", in the weight's own shape (m, n). Of a
    compressed layer that is G P^T, from G (m, r) and P (n, r): an unbiased estimate of the full
    gradient; at full rank it is the gradient itself.
    """
    gradient = records["grad." + name]
    return gradient @ records["proj." + name].T if "proj." + name in records else gradient


def print_list(records):
    width = max(map(len, records))
    print(f"{'name':{width}}  {'shape':>20} {'min':>12} {'max':>12} {'rms':>12}")
    for name, values in records.items():
        shape = " x ".join(map(str, values.shape))
        numbers = []  # an empty tensor has none; a NaN shows in each of the three
        if values.size:
            rms = math.sqrt(np.mean(np.square(values, dtype=np.float64)))
            numbers = [values.min(), values.max(), rms]
        print(f"{name:{width}}  {shape:>20} " + " ".join(f"{number:12.5g}" for number in numbers))


def write_npz(path, records):
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **records)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("file", metavar="FILE", help="what the trainer's --dump wrote")
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this tensor's values")
    parser.add_argument("--npz", metavar="OUT",
                        help="write the tensors to this file instead of printing")
    args = parser.parse_args()

    records = read(args.file)
    if args.name is not None:
        if args.name not in records:
            raise Problem(f"{args.file}: has no tensor {args.name}; "
                          f"dump.py {args.file} lists what there is")
        records = {args.name: records[args.name]}
    if args.npz is not None:
        write_npz(args.npz, records)
    elif args.name is not None:
        print(records[args.name])
    else:
        print_list(records)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `dump.py FILE | head` ends quietly
    try:
        main()
    except Problem as problem:
        print(f"dump.py: {problem}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"dump.py: {error.filename or 'error'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
