"""
Readers and writers of the trainer's files, in NumPy alone, and a way to run the trainer.

They are written from the description of the formats, not from the trainer's code, so that a test
that goes through them checks the trainer's own reading and writing too. Everything is
little-endian.

A model is (config, params): config is a dict with the keys context, vocab, layers, heads, channels
and padded_vocab; params is a dict from the names in PARAMS to float32 arrays, each whole over all
layers.
"""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "dev"))
from dump import read as read_dump  # noqa: E402, F401

MODEL_MAGIC, TOKENS_MAGIC = 20240326, 20240520
HEADER = 256  # int32 words before the data, in model and token files alike
FP32, BF16 = 3, 5  # versions of the model file
CONFIG = ["context", "vocab", "layers", "heads", "channels", "padded_vocab"]  # header words 2 to 7
PARAMS = ["wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb",
          "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb", "lnfw", "lnfb"]
WITHOUT_LAYER = ["wte", "wpe", "lnfw", "lnfb"]  # the others have one tensor a layer
# AdamW decays the matrices. ln1w and its like are (L, C) in the file but vectors to a layer, so the
# set goes by name.
DECAYED = ["wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"]

# ----------------------------------------------------------------------------
# models


def param_shapes(config):
    """The shape of every parameter, in the order of the file."""
    L, C = config["layers"], config["channels"]
    return {"wte": (config["padded_vocab"], C), "wpe": (config["context"], C),
            "ln1w": (L, C), "ln1b": (L, C),
            "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C), "attprojw": (L, C, C), "attprojb": (L, C),
            "ln2w": (L, C), "ln2b": (L, C),
            "fcw": (L, 4 * C, C), "fcb": (L, 4 * C), "fcprojw": (L, C, 4 * C), "fcprojb": (L, C),
            "lnfw": (C,), "lnfb": (C,)}


def per_layer(name, values):
    """(record name, its part of values) for each record that a parameter has in a dump."""
    if name in WITHOUT_LAYER:
        return [(name, values)]
    return [(f"{name}.{l}", values[l]) for l in range(len(values))]


def draw_model(config, seed):
    """
    A model to try things on. Its weights are wide, so that every term of a gradient counts. Uniform
    numbers come straight from the generator's bits, with no library function between, so every
    NumPy draws the same.
    """
    rng, params = np.random.Generator(np.random.PCG64(seed)), {}
    for name, shape in param_shapes(config).items():
        mean = 1.0 if name in ("ln1w", "ln2w", "lnfw") else 0.0
        values = mean + 0.15 * np.sqrt(3.0) * (2 * rng.random(shape) - 1)  # standard deviation 0.15
        params[name] = values.astype(np.float32)
    return params


def checksum(params):
    h = hashlib.sha256()
    for name in PARAMS:
        h.update(params[name].astype("<f4").tobytes())
    return h.hexdigest()


def to_bf16(x):
    """float32 -> the 16 bits of bf16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, "<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def from_bf16(bits):
    return (bits.astype("<u4") << 16).view("<f4")


def round_bf16(x):
    """float32 values as they are after a trip through bf16."""
    return from_bf16(to_bf16(x))


def write_model(path, config, params, version=FP32):
    header = np.zeros(HEADER, "<i4")
    header[:8] = [MODEL_MAGIC, version] + [config[key] for key in CONFIG]
    with open(path, "wb") as f:
        f.write(header.tobytes())
        for name, shape in param_shapes(config).items():
            values = np.asarray(params[name])
            assert values.shape == shape, f"{name} is {values.shape}, must be {shape}"
            f.write((to_bf16(values) if version == BF16 else values.astype("<f4")).tobytes())


def read_model(path):
    data = open(path, "rb").read()
    header = np.frombuffer(data, "<i4", HEADER)
    assert header[0] == MODEL_MAGIC, f"{path} is no model file"
    assert header[1] in (FP32, BF16), f"{path} has version {header[1]}"
    config = {key: int(header[2 + i]) for i, key in enumerate(CONFIG)}
    kind = "<f4" if header[1] == FP32 else "<u2"
    params, at = {}, HEADER * 4
    for name, shape in param_shapes(config).items():
        values = np.frombuffer(data, kind, int(np.prod(shape)), at)
        at += values.nbytes
        params[name] = (values.copy() if kind == "<f4" else from_bf16(values)).reshape(shape)
    assert at == len(data), f"{path} holds {len(data)} bytes, its header says {at}"
    return config, params

# ----------------------------------------------------------------------------
# tokens


def write_tokens(path, tokens, vocab=0):
    """vocab 0 stands for GPT-2's 50257."""
    tokens = np.asarray(tokens)
    header = np.zeros(HEADER, "<i4")
    header[:4] = [TOKENS_MAGIC, 1, tokens.size, vocab]
    with open(path, "wb") as f:
        f.write(header.tobytes() + tokens.astype("<u2").tobytes())


def read_tokens(path):
    data = open(path, "rb").read()
    header = np.frombuffer(data, "<i4", HEADER)
    assert header[0] == TOKENS_MAGIC and header[1] == 1, f"{path} is no token file"
    tokens = np.frombuffer(data, "<u2", -1, HEADER * 4)
    assert tokens.size == header[
        2], f"{path} holds {tokens.size} tokens, its header says {header[2]}"
    return tokens, int(header[3])

# ----------------------------------------------------------------------------
# what the trainer writes


def read_log(directory):
    """
    log.jsonl of an output directory as (first line, the lines of the steps, the other lines but
    those of later starts).
    """
    with open(os.path.join(directory, "log.jsonl")) as f:
        lines = [json.loads(line) for line in f]
    later = [line for line in lines[1:] if "options" not in line]
    return lines[0], [line for line in later if "loss" in line], [line for line in later
                                                                  if "loss" not in line]


def trainer_path():
    path = os.environ.get("TRAINER") or os.path.join(ROOT, "train_gpt2_compact")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is missing: build it with `make train_gpt2_compact`")
    return path


def run_trainer(args, trainer=None, **kw):
    """
    Runs the trainer, or another one, to its end; the arguments may be paths and numbers. Its exit
    status is not judged.
    """
    kw.setdefault("capture_output", True)
    kw.setdefault("text", True)
    kw.setdefault("timeout", 600)
    # one thread, as the models are tiny: it would spend its time waking up the others
    kw.setdefault("env", {"OMP_NUM_THREADS": "1", **os.environ})
    return subprocess.run([trainer or trainer_path()] + [str(a) for a in args], **kw)
