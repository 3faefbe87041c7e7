"""
data_prep/sst2.py: its files, the loss on answers alone in the trainer, and a fine-tuning run with
its accuracy.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import formats
import with_transformers
from conftest import Run, check_one_line

ROOT = Path(formats.ROOT)
TOOL = ROOT / "data_prep" / "sst2.py"
GPT2 = ROOT.parent / "shared" / "data" / "gpt2"
TRAIN = [("a fine film ", 1), ("dull", 0), ("it's bad , really bad ", 0),
         ('"so \u00fcber" good', 1)]
VAL = [("a weak plot", 0), ("lovely", 1)]
END = 10  # the byte tokenizer's end-of-text


def run(*args, env={}):
    return subprocess.run([sys.executable, TOOL, *map(str, args)], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1", **env))


def good(*args):
    done = run(*args)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def refused(done, *words):
    assert done.returncode == 2 and done.stdout == "", done.stdout + done.stderr
    assert done.stderr.startswith("sst2.py: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert str(word) in done.stderr, f"'{word}' is not named: {done.stderr}"


def write_tsv(path, examples):
    path.write_text("sentence\tlabel\n" + "".join(f"{sentence}\t{label}\n"
                                                  for sentence, label in examples),
                    encoding="utf-8")
    return path


@pytest.fixture
def inputs(tmp_path):
    return write_tsv(tmp_path / "train.tsv", TRAIN), write_tsv(tmp_path / "dev.tsv", VAL)


def read_shard(path, vocab, T):
    header, words = np.fromfile(path, "<i4", 256), np.fromfile(path, "<i4", offset=1024)
    assert list(header[:5]) == [20240520, 2, len(words), vocab, T] and not header[5:].any()
    return words.tolist()


def expected_shard(encode, examples, end, answers, question, T):
    words = []
    for sentence, label in examples:
        example = ([~end] + [~token for token in encode(f"{sentence.strip()}\n{question}")]
                   + encode(" " + answers[label]))
        words += example + [~end] * (T - len(example))
    return words + [~end]


def expected_answers(encode, examples, end, answers, question):
    out = []
    for index, (sentence, label) in enumerate(examples):
        context, words = [end] + encode(f"{sentence.strip()}\n{question}"), []
        for part in [context] + [encode(" " + answer) for answer in answers]:
            words += [len(part)] + part
        out.append(np.array([65535, 2 * (5 + len(words)), index, label, len(answers)] + words,
                            "<u2").tobytes())
    header = np.zeros(256, "<i4")
    header[:4] = [20240522, 1, len(out), max(map(len, out))]
    return header.tobytes() + b"".join(out)


def to_bytes(text):
    return list(text.encode())

# ----------------------------------------------------------------------------
# prepare


def test_prepare(tmp_path, inputs):
    said = good("prepare", *inputs, "--out", tmp_path / "out", "--tokenizer", "bytes")
    assert sorted(os.listdir(tmp_path / "out")) == ["answers.bin", "tokenizer.bin", "train.bin",
                                                    "val.bin"]
    answers, question = ["negative", "positive"], "Sentiment:"
    T = 48  # the third example has 1 + 22 + 10 + 9 tokens
    for name, examples in ("train.bin", TRAIN), ("val.bin", VAL):
        assert read_shard(tmp_path / "out" / name, 256, T) == expected_shard(
            to_bytes, examples, END, answers, question, T)
    assert (tmp_path / "out" / "answers.bin").read_bytes() == expected_answers(
        to_bytes, VAL, END, answers, question)
    assert f"-t {T} -b 16 -l 2e-5 --projection gaussian --rank 8 --alpha 2 --gap 500" in said


@pytest.mark.skipif(not (GPT2 / "vocab.bpe").is_file(),
                    reason="no GPT-2 vocabulary in ../shared/data/gpt2")
def test_prepare_for_gpt2(tmp_path, inputs):
    """In GPT-2's own ids, which are published: " negative" and " positive" are one token each."""
    good("prepare", *inputs, "--out", tmp_path / "out", "--vocab-bpe", GPT2 / "vocab.bpe",
         "--encoder-json", GPT2 / "encoder.json")
    words = read_shard(tmp_path / "out" / "train.bin", 50257, 16)
    assert [word for word in words if word >= 0] == [3967, 4633, 4633, 3967]
    assert words[:7] == [~50256, ~64, ~3734, ~2646, ~198, ~31837,
                         ~3681] and words[7:11] == [~25, 3967, ~50256, ~50256]
    assert words[16] == words[-1] == ~50256 and len(words) == 4 * 16 + 1


def test_other_text(tmp_path):
    """Other words, three answers, a given length, packed input."""
    import gzip
    for name in "train", "dev":
        with gzip.open(tmp_path / f"{name}.tsv.gz", "wt") as file:
            file.write("sentence\tlabel\nred light\t0\nblue\t2\n")
    good("prepare", tmp_path / "train.tsv.gz", tmp_path / "dev.tsv.gz", "--out", tmp_path / "out",
         "--tokenizer", "bytes", "--answers", "warm,so so,cold", "--question", "It is", "--seq", 29)
    args = [("red light", 0), ("blue", 2)], END, ["warm", "so so", "cold"], "It is"
    assert read_shard(tmp_path / "out" / "train.bin", 256,
                      29) == expected_shard(to_bytes, *args, 29)
    assert (tmp_path / "out" / "answers.bin").read_bytes() == expected_answers(to_bytes, *args)


@pytest.mark.parametrize(
    "text, args, named",
    [("", [], ["train.tsv", "no examples"]),
     ("sentence\tlabel\n", [], ["train.tsv", "no examples"]),
     ("index\tsentence\n0\tgood\n", [], ["train.tsv", "line 1", "sentence<TAB>label"]),
     ("sentence\tlabel\ngood\t1\ngood\n", [], ["train.tsv", "line 3", "0 to 1"]),
     ("sentence\tlabel\ngood\t2\n", [], ["train.tsv", "line 2", "0 to 1"]),
     ("sentence\tlabel\ngood\t-1\n", [], ["train.tsv", "line 2"]),
     ("sentence\tlabel\ngood\tbad\t1\n", [], ["train.tsv", "line 2"]),
     ("sentence\tlabel\n \t1\n", [], ["train.tsv", "line 2"]),
     ("sentence\tlabel\ngood\t1\nvery good\t1\n", ["--seq", "25"],
      ["train.tsv: line 3", "30 tokens", "--seq 25"]),
     ("sentence\tlabel\ngood\t1\n", ["--seq", "1"], ["--seq", "'1'"]),
     ("sentence\tlabel\ngood\t1\n", ["--answers", "yes"], ["--answers yes", "2 to 4"]),
     ("sentence\tlabel\ngood\t1\n", ["--answers", "yes,yes"], ["--answers yes,yes", "different"]),
     ("sentence\tlabel\ngood\t1\n", ["--answers", "a,b,c,d,e"], ["--answers a,b,c,d,e"]),
     ("sentence\tlabel\n" + "good" * 2000 + "\t1\n", [],
      ["train.tsv: line 2", "8021 tokens", "4096"])])
def test_bad_input(tmp_path, text, args, named):
    for name in "train.tsv", "dev.tsv":
        (tmp_path / name).write_text(text)
    paths = [tmp_path / "train.tsv", tmp_path / "dev.tsv"]
    refused(run("prepare", *paths, "--out", tmp_path / "out", "--tokenizer", "bytes", *args),
            *named)
    assert not (tmp_path / "out").exists()


def test_bad_arguments(tmp_path, inputs):
    options = ["--tokenizer", "bytes", "--out"]
    refused(run("prepare", inputs[0], *options, tmp_path / "out"), "1 files", "two")
    refused(run("prepare", inputs[0], tmp_path / "none", *options, tmp_path / "out"), "none",
            "No such file")
    refused(run("prepare", *inputs, *options, inputs[0]), "train.tsv", "cannot write")
    refused(run("measure", *inputs), "measure", "prepare")
    refused(run("score", tmp_path), "log.jsonl", "No such file")
    for log, named in ("{}\n", "not a log of"), ("[]\n", "not a log of"), ("", "not a log of"), (
            '{"options": {}, "plan": {}}\n{"step": 1, "loss": 2.0}\n', "--hellaswag"):
        (tmp_path / "log.jsonl").write_text(log)
        refused(run("score", tmp_path), "log.jsonl", named)
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(name='numpy')")
    refused(run("score", tmp_path, env={"PYTHONPATH": str(tmp_path)}), "numpy", "pip install")


def test_marked_and_windows_text(tmp_path, inputs):
    """A byte order mark and \\r\\n, as a spreadsheet writes them, change nothing."""
    good("prepare", *inputs, "--out", tmp_path / "plain", "--tokenizer", "bytes")
    for path in inputs:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    good("prepare", *inputs, "--out", tmp_path / "marked", "--tokenizer", "bytes")
    for name in os.listdir(tmp_path / "plain"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "marked" / name).read_bytes()


def test_score_of_a_run_with_several_starts(tmp_path):
    """The last header holds; what a start did again replaces what it stood for; a sample may hold
    any sign."""
    def header(rank):
        return {"options": {"rank": rank},
                "plan": {"total_bytes": 1 << 20, "full_rank_total_bytes": 2 << 20}}
    records = [header(0.5), {"step": 1, "loss": 2.0},
               {"step": 2, "hellaswag": 0.9, "sample": "a\u2028b"}, {"step": 3, "hellaswag": 1.0},
               header(0.25), {"step": 2, "loss": 1.5}, {"step": 2, "hellaswag": 0.5}]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 3')
    row = good("score", tmp_path).splitlines()[1].split()
    assert row[1:] == ["0.25", "2", "0.5000", "0.5000", "1.0", "2.0"]

# ----------------------------------------------------------------------------
# the loss on answers alone

B, T, VOCAB = 4, 12, 151
TINY = ["-e", "d2", "--channels", 16, "--heads", 2, "--context", T, "-b", B, "-v", 0, "--optimizer",
        "adamw"]


def write_masked(path, words, T=T, vocab=VOCAB):
    header = np.zeros(256, "<i4")
    header[:5] = [20240520, 2, len(words), vocab, T]
    path.write_bytes(header.tobytes() + np.asarray(words, "<i4").tobytes())
    return path


def draw_words(seed, share=0.2):
    """
    A shard of B sequences with some tokens to be predicted, and so few that the mean is not that
    over all.
    """
    rng = np.random.default_rng(seed)
    words = rng.integers(0, VOCAB, B * T + 1)
    return np.where(rng.random(words.size) < share, words, ~words)


@pytest.fixture
def masked(tmp_path):
    return write_masked(tmp_path / "masked.bin", draw_words(1))


def train(out, tokens, *options):
    """A run that ends well; its dump is read."""
    done = formats.run_trainer([*TINY, "--train", tokens, "-o", out, "--dump", out / "dump",
                                *options])
    assert done.returncode == 0, done.stderr
    return Run(done, out)


def test_loss_and_gradient_of_the_predicted(tmp_path, masked):
    """
    The loss is the mean over the predicted tokens, and the last LayerNorm's gradient is of them
    alone.
    """
    dump = train(tmp_path / "run", masked, "-x", 1).dump
    logits, targets, x = (dump[name].astype(np.float64)
                          for name in ("logits", "targets", "act.lnf"))
    targets, logits = targets.astype(int).ravel(), logits.reshape(B * T, VOCAB)
    words = np.fromfile(masked, "<i4", offset=1024)
    assert sorted(targets[targets >= 0]) == sorted(words[1:][words[1:] >= 0])
    # what is not predicted is read
    assert sorted(dump["inputs"].ravel()) == sorted(np.where(words < 0, ~words, words)[:-1])
    predicted = np.flatnonzero(targets >= 0)
    assert 0 < len(predicted) < B * T / 2
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    # float32: a loss is off by some 1e-6, a sum over B T tokens of products as well
    assert abs(dump["loss"][0] + np.log(p[predicted, targets[predicted]]).mean()) < 1e-5
    p[predicted, targets[predicted]] -= 1
    dlogits = np.zeros_like(p)
    dlogits[predicted] = p[predicted] / len(predicted)
    dlnf = dlogits @ dump["param.wte"][:VOCAB].astype(np.float64)
    want = (dlnf * (x.reshape(B * T, -1) - dump["param.lnfb"]) / dump["param.lnfw"]).sum(0)
    assert np.abs(dump["grad.lnfw"] - want).max() < 1e-5 * np.abs(want).max()
    assert np.abs(dump["grad.lnfb"] - dlnf.sum(0)).max() < 1e-5 * np.abs(dlnf.sum(0)).max()


def test_all_predicted_is_an_ordinary_shard(tmp_path):
    """Bit for bit."""
    tokens = np.abs(draw_words(2)) % VOCAB
    write_masked(tmp_path / "masked.bin", tokens)
    formats.write_tokens(tmp_path / "plain.bin", tokens, VOCAB)
    a, b = (train(tmp_path / name, tmp_path / f"{name}.bin", "-x", 5, "-n", -1)
            for name in ("masked", "plain"))
    assert a.losses == b.losses and a.norms == b.norms and a.bits(5) == b.bits(5)


def test_accumulated_micro_batches_are_the_batch(tmp_path, masked):
    """
    The mean is over the step's predicted tokens, though micro batches differ in how many they have.
    """
    counts = [np.sum(part >= 0) for part in np.fromfile(masked, "<i4", offset=1028).reshape(B, T)]
    assert len(set(counts)) > 1
    flags = ["-x", 4, "-l", "1e-2", "--eps", "1e-3", "--projection", "gaussian"]
    whole = train(tmp_path / "whole", masked, *flags)
    parts = train(tmp_path / "parts", masked, *flags, "-b", 1, "-d", B * T)
    # sums in another order, 6e-8 each, and the log's 6 decimals; the mean of four means would be
    # off by 1e-2
    assert np.abs(np.array(whole.losses) - parts.losses).max() < 5e-6
    assert np.abs(np.array(whole.norms) / parts.norms - 1).max() < 5e-5


def test_validation_loss_is_the_mean_over_the_predicted(tmp_path, masked):
    done = formats.run_trainer([*TINY, "--train", masked, "--val", masked, "-x", 0, "-v", -1, "-m",
                                -1, "-b", 3, "-o", tmp_path / "a"])
    assert done.returncode == 0, done.stderr
    (evaluation,) = Run(done, tmp_path / "a").evaluations
    first = train(tmp_path / "b", masked, "-x", 1)  # the same four sequences, before any step
    assert abs(evaluation["val_loss"] - first.losses[0]) < 3e-6


@pytest.mark.slow
def test_training_agrees_with_transformers(tmp_path):
    """A model by transformers, ten AdamW steps at full rank on masked targets."""
    config = dict(n_positions=T, vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=24)
    hyper = dict(steps=10, lr=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-3, clip=1.0)
    folder = tmp_path / "model"
    with_transformers.good("make", folder, json.dumps(config))
    subprocess.run([sys.executable, TOOL.with_name("hf.py"), "import", folder,
                    tmp_path / "model.bin"],
                   check=True, capture_output=True)
    masked = write_masked(tmp_path / "masked.bin", draw_words(3))
    run = train(tmp_path / "run", masked, "-e", tmp_path / "model.bin", "--channels", 0, "--heads",
                0, "--context", 0, "-x", 10, "--overfit", "--rank", 1, "-l", 1e-2, "-k", "constant",
                "--eps", 1e-3)
    np.savez(tmp_path / "job.npz", inputs=run.dump["inputs"], targets=run.dump["targets"])
    with_transformers.good("train", folder, tmp_path / "job.npz", tmp_path / "want.npz",
                           json.dumps(hyper))
    want = np.load(tmp_path / "want.npz")["losses"]
    assert want[-1] < want[0] - 0.5
    # float32 against float64: each loss to some 1e-6, and weights that ten steps have moved apart
    # by some 1e-5 lr
    assert np.abs(run.losses - want).max() < 1e-5 * want[0]


@pytest.mark.parametrize("change, options, named", [
    (dict(T=T - 1), [], ["--seq", "masked.bin", "11"]),
    ({}, ["-t", T // 2], ["--seq", "masked.bin", "12"]),
    (dict(vocab=70), [], ["masked.bin", "not below 70"]),
])
def test_bad_shard(tmp_path, change, options, named):
    write_masked(tmp_path / "masked.bin", draw_words(1), **change)
    done = formats.run_trainer([*TINY, "--train", tmp_path / "masked.bin", "-x", 1, *options])
    assert done.returncode == 2, done.stdout + done.stderr
    check_one_line(done.stderr, *named)


def test_shard_cut_short(tmp_path, masked):
    masked.write_bytes(masked.read_bytes()[:-2])
    done = formats.run_trainer([*TINY, "--train", masked])
    assert done.returncode == 2
    check_one_line(done.stderr, "masked.bin", "4 after 1,024")

# ----------------------------------------------------------------------------
# fine-tuning


def test_fine_tuning(tmp_path):
    """
    A tiny model learns from its answers which words are kind; the score is the trainer's, beside
    the memory of the plan.
    """
    draw = random.Random(1)
    kind = [["bad", "awful", "dull", "poor", "weak"], ["good", "great", "lovely", "superb", "fine"]]
    nouns = ["film", "plot", "end"]

    def examples(count):
        labels = [draw.randrange(2) for _ in range(count)]
        return [(f"the {draw.choice(nouns)} is {draw.choice(kind[label])}", label)
                for label in labels]
    write_tsv(tmp_path / "train.tsv", examples(400)), write_tsv(tmp_path / "dev.tsv", examples(50))
    data, runs = tmp_path / "data", [tmp_path / "rank8", tmp_path / "full"]
    good("prepare", tmp_path / "train.tsv", tmp_path / "dev.tsv", "--out", data, "--tokenizer",
         "bytes")
    for out, options in zip(runs,
                            (["--projection", "gaussian", "--rank", 8, "--alpha", 2, "--gap", 500],
                             ["--rank", 1])):
        done = formats.run_trainer(["-e", "d2", "--channels", 64, "--heads", 4, "--context", 48,
                                    "-t", 40, "-b", 16, "-x", 150, "-l", 3e-3, "-u", 10, "-v", 50,
                                    "--optimizer", "adamw", "--train", data / "train.bin", "--val",
                                    data / "val.bin", "--hellaswag", data / "answers.bin", "-o",
                                    out, *options])
        assert done.returncode == 0, done.stderr
    head, *rows = [line.split() for line in good("score", *runs).splitlines()]
    assert head[:4] == ["run", "rank", "step",
                        "accuracy"] and [row[0] for row in rows] == list(map(str, runs))
    for row, out in zip(rows, runs):
        first, _, evaluations = formats.read_log(out)
        assert row[1] == f"{first['options']['rank']:g}" and row[2] == "150"
        assert row[3] == f"{evaluations[-1]['hellaswag']:.4f}"
        assert row[4] == f"{max(line['hellaswag'] for line in evaluations):.4f}"
        assert row[5] == f"{first['plan']['total_bytes'] / 2**20:.1f}"
        assert row[6] == f"{first['plan']['full_rank_total_bytes'] / 2**20:.1f}"
        assert evaluations[-1]["hellaswag"] >= 0.9, "half of it is luck"
    assert float(rows[0][5]) < float(rows[0][6]) == float(rows[1][5])
