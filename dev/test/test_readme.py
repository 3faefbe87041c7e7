"""
Every command that the README shows is run as it stands there, in its order and in one folder, on
small inputs and for a few steps: what SMALLER names is put behind it. What is not run stands in
NOT_RUN, with its reason.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import with_transformers
from test_data_prep import ROOT, SHARED, VOCABULARY, needs_gpt2

NOT_RUN = {
    "make": "the Makefile's targets run and are tested from the repository itself",
    "pip install": "dev/setup.sh brings the same packages",
    "data_prep/fineweb.py": "streams from the network; test_data_prep.py runs it on a file",
}
TINY_GPT2 = dict(n_layer=1, n_head=2, n_embd=16, vocab_size=50257, n_positions=96)
GIVEN = ["--vocab-bpe", "VOCABULARY/vocab.bpe", "--encoder-json", "VOCABULARY/encoder.json"]
# The start of a command, and what keeps it small and off the network: the trainer takes an option's
# last value.
SMALLER = {
    "data_prep/tinyshakespeare.py": ["--file", "input.txt", *GIVEN],
    "data_prep/prepare.py": GIVEN,
    "data_prep/hellaswag.py": ["--file", SHARED / "hellaswag_val_full.txt.bz2", "--limit", "5",
                               *GIVEN],
    "data_prep/sst2.py prepare": GIVEN,
    "./train_gpt2_compactcu": ["-e", "d1", "--channels", "16", "--heads", "2", "-b", "1",
                               "-t", "32", "-x", "1", "-m", "1", "-g", "3"],
    "./train_gpt2_compact -e gpt2.bin": ["-t", "16", "-x", "2", "-m", "1"],
    "./train_gpt2_compact -e runs": ["-g", "9"],
    "./train_gpt2_compact --train input.txt": ["-x", "6", "-m", "1", "-g", "9"],
    "./train_gpt2_compact --train 'data": ["--channels", "16", "--heads", "2", "-b", "2",
                                           "-m", "1", "-g", "9"],
    "dev/ablate.py": ["--channels", "16", "--heads", "2", "--steps", "3", "-u", "0", "-m", "1"],
}


def commands():
    """The README's, a line each, without the comments behind them."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = "".join(block for kind, block in blocks if not kind).replace("\\\n", "").splitlines()
    return [re.sub(r" +", " ", re.sub(r"\s+#.*", "", line)).strip() for line in lines]


def test_commands_are_found():
    found = commands()
    assert len(found) > 20 and sum(line.startswith("./train_gpt2_compact ") for line in found) >= 4
    for start in [*NOT_RUN, *SMALLER]:
        assert any(line.startswith(start)
                   for line in found), f"the README shows no '{start}' any more"


def small_inputs(folder):
    """
    What the README's user has: a text, more texts, GPT-2's folder, nanoGPT's checkpoint, SST-2.
    """
    prose = (ROOT / "README.md").read_text() * 3
    (folder / "input.txt").write_text(prose)
    (folder / "question.txt").write_text("Why?")
    (folder / "my_texts").mkdir()
    (folder / "my_texts/one.txt").write_text(prose)
    with_transformers.good("make", folder / "gpt2", json.dumps(TINY_GPT2))
    tensors = {f"transformer.{name.removeprefix('transformer.')}": values.T if linear(name, values)
               else values
               for name, values in np.load(folder / "gpt2/tensors.npz").items()
               if not name.startswith("lm_head")}
    np.savez(folder / "nano.npz", **tensors)
    args = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 96, "bias": True,
            "vocab_size": 50257}
    with_transformers.good("checkpoint", folder / "ckpt.pt", folder / "nano.npz", json.dumps(args))
    (folder / "SST-2").mkdir()
    for name in ("train", "dev"):
        (folder / f"SST-2/{name}.tsv").write_text("sentence\tlabel\n"
                                                  + "a good film\t1\na bad film\t0\n" * 40)


def linear(name, values):
    return values.ndim == 2 and ".h." in f".{name}"


@needs_gpt2
@pytest.mark.slow
def test_commands_run(tmp_path):
    python = with_transformers.python_with_transformers()
    nogpu = ROOT / "build/train_nogpu_bf16"
    if python is None:
        pytest.skip("no Python with PyTorch and transformers here")
    small_inputs(tmp_path)
    for name in ("train_gpt2_compact", "data_prep", "dev", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    if nogpu.exists():
        (tmp_path / "train_gpt2_compactcu").symlink_to(nogpu)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    (tmp_path / "bin/python3").chmod(0o755)
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = dict(os.environ, PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
                       PYTHONPATH=os.pathsep.join(packages), HF_HUB_OFFLINE="1",
                       OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    for line in commands():
        if (any(line.startswith(start) for start in NOT_RUN)
            or (line.startswith("./train_gpt2_compactcu") and not nogpu.exists())):
            continue
        smaller = next((more for start, more in SMALLER.items() if line.startswith(start)), [])
        words = [str(word).replace("VOCABULARY", str(VOCABULARY[1].parent)) for word in smaller]
        command, redirected, source = line.partition(" < ")
        done = subprocess.run(" ".join([command, *words]) + redirected + source, shell=True,
                              cwd=tmp_path, env=environment, capture_output=True, text=True,
                              timeout=300, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{line}\n{done.stdout[-500:]}{done.stderr[-1500:]}"
    for made in ("runs/sweep/results.md", "loss.png", "mine/config.json", "mine.gguf",
                 "runs/sst2/log.jsonl"):
        assert (tmp_path / made).exists(), made
    shutil.rmtree(tmp_path)
