"""
The trainer's HellaSwag score of a model by transformers, against losses that PyTorch computes
ending by ending.

Ten examples, written by data_prep/hellaswag.py's own function. The score is the share of examples
whose right ending has the lowest mean loss, so the labels decide what it must be.
"""

import json
import os
import sys

import numpy as np
import pytest

import formats
import with_transformers
from conftest import Run, check_one_line

sys.path.insert(0, os.path.join(formats.ROOT, "data_prep"))
import common  # noqa: E402
import hellaswag  # noqa: E402
import hf  # noqa: E402

VOCAB, T, EXAMPLES = 97, 16, 10


def draw_examples(seed):
    """
    Three times EXAMPLES pairs (context, endings). Some are longer than the sequence: they lose
    their beginning.
    """
    rng = np.random.default_rng(seed)

    def tokens(low, high):
        return rng.integers(0, VOCAB, rng.integers(low, high)).tolist()
    # of the first two no token of the context is left, nor all of the ending
    sizes = [((1, 3), (T + 1, T + 9))] * 2 + [((1, 24), (1, 9))] * (3 * EXAMPLES - 2)
    return [(tokens(*context), [tokens(*ending) for _ in range(4)]) for context, ending in sizes]


def write_examples(path, examples, labels):
    encoded = [hellaswag.encode_example(i, label, *example)
               for i, (example, label) in enumerate(zip(examples, labels))]
    header = common.header(hellaswag.MAGIC, hellaswag.VERSION, len(encoded), max(map(len, encoded)))
    path.write_bytes(header + b"".join(encoded))


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """
    A folder with a model, the examples, and the mean loss of each ending, (examples, 4). The two
    best endings of an example differ by far more than the rounding of a loss, which is some 1e-6,
    so that no other way to add up may choose another ending.
    """
    folder = tmp_path_factory.mktemp("hellaswag")
    config = dict(n_positions=T + 4, vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=24)
    with_transformers.good("make", folder, json.dumps(config))
    hf.import_model(str(folder), str(folder / "model.bin"), "fp32")
    examples = draw_examples(6)
    (folder / "examples.json").write_text(json.dumps(examples))
    with_transformers.good("score", folder, folder / "examples.json", folder / "out.npz", T)
    formats.write_tokens(folder / "tokens.bin", np.arange(3 * T) % VOCAB, VOCAB)
    losses = np.load(folder / "out.npz")["losses"]
    clear = np.flatnonzero(np.diff(np.sort(losses, axis=1)[:, :2])[:, 0] > 1e-3)[:EXAMPLES]
    assert len(clear) == EXAMPLES
    return folder, [examples[i] for i in clear], losses[clear]


def score(folder, out, *options):
    run = out / f"run{len(list(out.glob('run*')))}"
    done = formats.run_trainer(["-e", folder / "model.bin", "--train", folder / "tokens.bin", "-t",
                                T, "-x", 0, "-v", -1, "--hellaswag", out / "hs.bin", "-o", run,
                                *options])
    assert done.returncode == 0, done.stderr
    (evaluation,) = Run(done, run).evaluations
    assert f"| hellaswag {evaluation['hellaswag']:.4f}" in done.stdout
    return evaluation["hellaswag"]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_score(judged, tmp_path, batch):
    folder, examples, losses = judged
    order = np.argsort(losses, axis=1)
    best, second = order[:, 0].tolist(), order[:, 1].tolist()
    for right in 0, 1, 7, EXAMPLES:
        write_examples(tmp_path / "hs.bin", examples, best[:right] + second[right:])
        assert score(folder, tmp_path, "-b", batch) == right / EXAMPLES


def test_each_example(judged, tmp_path):
    """One by one, with each ending in turn as the right one, so that no two mistakes cancel."""
    folder, examples, losses = judged
    sums = losses * [[len(ending[-T:]) for ending in endings] for _, endings in examples]
    assert (losses.argmin(1)
            != sums.argmin(1)).any(), "a score by the sum of losses would be another"
    for example, best in zip(examples, losses.argmin(1)):
        for label in {int(best), (int(best) + 1) % 4}:
            write_examples(tmp_path / "hs.bin", [example], [label])
            assert score(folder, tmp_path) == (label == best)


@pytest.mark.parametrize("count", [2, 3])
def test_fewer_endings(judged, tmp_path, count):
    """As data_prep/sst2.py writes them: two answers."""
    folder, examples, losses = judged
    fewer = [(context, endings[:count]) for context, endings in examples]
    best = losses[:, :count].argmin(1)
    assert (losses.argmin(1) >= count).any(), "an ending that is left out would have been chosen"
    for batch in 1, 8:
        write_examples(tmp_path / "hs.bin", fewer, best.tolist())
        assert score(folder, tmp_path, "-b", batch) == 1
    write_examples(tmp_path / "hs.bin", fewer, ((best + 1) % count).tolist())
    assert score(folder, tmp_path) == 0


@pytest.mark.parametrize("label, count", [(2, 2), (0, 1), (0, 5)])
def test_bad_count(train, tmp_path, label, count):
    write_examples(tmp_path / "hs.bin", [([5, 6], [[7], [8, 9], [7], [1], [2]][:count])], [label])
    check_one_line(train("-x", 0, "--hellaswag", tmp_path / "hs.bin", status=2).stderr, "hs.bin",
                   "the number of endings")
