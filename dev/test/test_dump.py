"""
dev/dump.py: its reader against records written from the format's description, what it prints, and
lifted gradients.
"""

import os
import random
import struct
import subprocess
import sys

import numpy as np
import pytest

import formats
from dump import Problem, lift, read

TOOL = os.path.join(formats.ROOT, "dev", "dump.py")
RECORDS = {"loss": np.array([2.5], np.float32),
           "param.ln1w": np.array([[3, -4, 0], [0, 0, 12]], np.float32),
           "act.odd.0": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
           "scalar": np.array(7, np.float32), "empty": np.zeros((0, 3), np.float32)}


def encode(name, values):
    return (struct.pack("<i", len(name)) + name.encode()
            + struct.pack(f"<i{values.ndim}q", values.ndim, *values.shape)
            + values.astype("<f4").tobytes())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "step.dump"
    path.write_bytes(b"".join(encode(name, values) for name, values in RECORDS.items()))
    return path


def run(*args, **kw):
    return subprocess.run([sys.executable, TOOL, *map(str, args)], capture_output=True, text=True,
                          **kw)


def good(*args):
    done = run(*args)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def refused(done, *words):
    assert done.returncode == 2 and done.stdout == "", done.stdout + done.stderr
    assert done.stderr.startswith("dump.py: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert str(word) in done.stderr, f"'{word}' is not named: {done.stderr}"


def same(got, want):
    assert list(got) == list(want)
    for name, values in want.items():
        assert got[name].dtype == np.float32 and got[name].shape == values.shape, name
        assert np.array_equal(got[name], values), name


def test_read(file):
    same(read(file), RECORDS)


def test_list(file):
    lines = [line.split() for line in good(file).splitlines()]
    assert lines == [["name", "shape", "min", "max", "rms"], ["loss", "1", "2.5", "2.5", "2.5"],
                     ["param.ln1w", "2", "x", "3", "-4", "12", "5.3072"],  # sqrt(169 / 6)
                     ["act.odd.0", "2", "x", "3", "x", "4", "0", "23", "13.423"],  # sqrt(4324 / 24)
                     ["scalar", "7", "7", "7"], ["empty", "0", "x", "3"]]


def test_list_shows_what_is_not_finite(tmp_path):
    (tmp_path / "dump").write_bytes(encode("a", np.array([1, np.nan]))
                                    + encode("b", np.array([1, np.inf])))
    lines = [line.split() for line in good(tmp_path / "dump").splitlines()]
    assert lines[1:] == [["a", "2", "nan", "nan", "nan"], ["b", "2", "1", "inf", "inf"]]


def test_one(file):
    assert good(file, "param.ln1w") == "[[ 3. -4.  0.]\n [ 0.  0. 12.]]\n"


def test_npz(file, tmp_path):
    assert good(file, "--npz", tmp_path / "all.npz") == ""
    same(dict(np.load(tmp_path / "all.npz")), RECORDS)
    good(file, "param.ln1w", "--npz", tmp_path / "one.npz")
    same(dict(np.load(tmp_path / "one.npz")), {"param.ln1w": RECORDS["param.ln1w"]})
    assert sorted(os.listdir(tmp_path)) == ["all.npz", "one.npz", "step.dump"]


@pytest.mark.parametrize("projection", ["gaussian", "sparse"])
def test_lift(train, projection):
    """A lifted gradient is the full one times P P^T. Both runs have the same first step."""
    full = train("--rank", 1, "-x", 1, dump=True).dump
    compressed = train("--rank", 0.25, "--projection", projection, "-x", 1, dump=True).dump
    for name in "qkvw.0", "fcw.1", "fcprojw.0", "attprojw.1", "lnfw":
        gradient = full["grad." + name].astype(np.float64)
        assert lift(full, name) is full["grad." + name]
        if "proj." + name in compressed:
            assert compressed["grad." + name].shape[1] == gradient.shape[1] // 4
            P = compressed["proj." + name].astype(np.float64)
            gradient = gradient @ P @ P.T
        assert lift(compressed, name).shape == gradient.shape
        # three products of 16 to 64 terms in float32, roundoff 6e-8, each sum off by some 1e-6 of
        # the greatest element
        assert np.abs(lift(compressed,
                           name) - gradient).max() <= 1e-5 * np.abs(gradient).max(), name


def test_cut_short(file):
    """
    Cut anywhere but between two records, a file is refused; between two it is the records before.
    """
    whole, ends = file.read_bytes(), {}
    for name, values in RECORDS.items():
        ends[max(ends, default=0) + len(encode(name, values))] = len(ends) + 1
    for size in range(1, len(whole)):
        file.write_bytes(whole[:size])
        if size in ends:
            same(read(file), dict(list(RECORDS.items())[:ends[size]]))
        else:
            with pytest.raises(Problem, match="broken or cut short"):
                read(file)


def test_hostile(file):
    """Whatever the bytes, there is an answer or one clear line."""
    whole, draw = file.read_bytes(), random.Random(4)
    heads = [encode(name, values)[:-values.nbytes or None] for name, values in RECORDS.items()]
    for i in range(1000):
        data = bytearray(whole if i % 2 else heads[i // 2 % len(heads)] + whole)
        for _ in range(draw.choice([1, 2, 8])):
            data[draw.randrange(len(data) if i % 4 else 40)] = draw.choice([0, 1, 2, 127, 128, 255])
        file.write_bytes(data)
        try:
            for name, values in read(file).items():
                assert isinstance(name, str) and values.nbytes <= len(data)
        except Problem as problem:
            assert str(problem).count("\n") == 0


@pytest.mark.parametrize(
    "record",
    [encode("a", np.zeros(2)) * 2, struct.pack("<i1siqq", 1, b"a", 2, -1, -2) + bytes(8),
     struct.pack("<i1siq", 1, b"a", 1, -1), struct.pack("<i1siqq", 1, b"a", 2, 2**62, 4),
     struct.pack("<i1siqq", 1, b"a", 2, 2**62, 0), struct.pack("<i1si", 1, b"a", 2**31 - 1),
     encode("\x1b[2J", np.zeros(1)), struct.pack("<i1siq", 1, b"\xff", 1, 0)],
    ids=["twice", "-1 x -2", "-1", "2^62 x 4", "2^62 x 0", "2^31 dimensions", "control", "no text"])
def test_bad_record(tmp_path, record):
    (tmp_path / "dump").write_bytes(encode("fine", np.zeros(3)) + record)
    refused(run(tmp_path / "dump"), "dump: ", "broken or cut short")


def test_bad_input(file, tmp_path):
    refused(run(file, "grad.none"), file, "grad.none")
    refused(run(tmp_path / "none"), "none", "No such file")
    refused(run(tmp_path), tmp_path, "directory")
    refused(run(), "FILE")
    refused(run(file, "--npz"), "--npz")
    refused(run(file, "--npz", tmp_path / "none" / "out.npz"), "none", "No such file")
    (tmp_path / "nothing").touch()
    refused(run(tmp_path / "nothing"), "nothing", "is empty")
    assert sorted(os.listdir(tmp_path)) == ["nothing", "step.dump"]


def test_a_closed_pipe_is_no_error(file):
    """As in `dump.py FILE | head -0`."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([sys.executable, TOOL, file], stdout=theirs, stderr=subprocess.PIPE,
                          text=True)
    os.close(theirs)
    assert done.stderr == ""
