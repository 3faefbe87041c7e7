"""
Text after a prompt: -e MODEL --prompt TEXT. Prompts are encoded as tiktoken does it, of which a
megabyte is compared where GPT-2's vocabulary is in ../shared/data/gpt2 beside the repository; a
vocabulary of 300 tokens, made here, is compared anywhere.
"""

import os
import pathlib
import random
import re
import subprocess
import sys

import pytest

import formats
from conftest import check_refused, environment, make_text

ROOT = pathlib.Path(__file__).resolve().parents[2]
GPT2 = ROOT.parent / "shared" / "data" / "gpt2"
END_OF_TEXT = "<|endoftext|>"
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def speak(*args, **kw):
    """Runs a trainer; its standard output as bytes."""
    trainer = kw.pop("trainer", formats.trainer_path())
    done = subprocess.run([trainer, *map(str, args)], capture_output=True, timeout=600,
                          env=environment(), **kw)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def learnt(tmp_path_factory):
    """The folder of a run on bytes, with two models."""
    folder = tmp_path_factory.mktemp("learnt")
    text = folder / "text.txt"
    text.write_text(make_text(20000))
    done = formats.run_trainer(["-e", "d2", "--channels", 32, "--heads", 2, "--context", 48, "-b",
                                8, "-l", 1e-2, "-x", 400, "-n", 200, "-v", 0, "--train", text, "-o",
                                folder / "run"])
    assert done.returncode == 0, done.stderr
    return folder / "run"

# ----------------------------------------------------------------------------
# what is written where


def test_prompt_and_what_follows(learnt):
    """
    Nothing else on standard output, the same text for a folder and its newest model, another for
    another seed.
    """
    text = speak("-e", learnt, "--prompt", "the cat ", "-g", 60)
    assert text.startswith(b"the cat ") and len(text) == 8 + 60
    assert (b"the" in text[8:] or b"and" in text[8:]
            or b"sees" in text[8:]), "it has learnt no word at all"
    assert speak("-e", learnt / "model_00000400.bin", "--prompt", "the cat ", "-g", 60) == text
    assert speak("-e", learnt / "model_00000200.bin", "--prompt", "the cat ", "-g", 60) != text
    assert speak("-e", learnt, "--prompt", "the cat ", "-g", 60, "--seed", 2) != text


def test_training_from_a_folder(learnt, train):
    """-e takes a run's folder there, too."""
    losses = [train("-e", model, "-x", 2, "-v", 0, "-b", 2).losses
              for model in (learnt, learnt / "model_00000400.bin")]
    assert losses[0] == losses[1]


def test_a_name_without_a_slash(learnt):
    """
    A folder is one whatever its name, but for those of models, such as d4. What concerns training
    alone is no matter.
    """
    done = formats.run_trainer(["-e", learnt.name, "--prompt", "the cat ", "-g", 9, "-d", 77, "-n",
                                5, "-b", 3],
                               cwd=learnt.parent)
    assert done.stdout.encode() == speak("-e", learnt, "--prompt", "the cat ", "-g", 9)
    (learnt.parent / "d4").symlink_to(learnt)
    options = ["-x", 0, "-b", 1, "-t", 8, "-v", 0, "--train", learnt.parent / "text.txt"]
    fresh, trained = (formats.run_trainer(["-e", name, *options], cwd=learnt.parent).stdout
                      for name in ("d4", learnt.name))
    assert "d4: 4 layers" in fresh and "model_00000400.bin: " in trained


def test_from_standard_input(learnt):
    """As it is: bytes that are no UTF-8, zeros, ends of lines; and nothing at all."""
    for prompt in (b"the cat ", b"\0\xff\r\n", b"a" * 5000):
        assert speak("-e", learnt, "--prompt", "-", "-g", 1, input=prompt).startswith(prompt)
    assert len(speak("-e", learnt, "--prompt", "-", "-g", 5, input=b"").decode()) > 0


def test_choices(learnt):
    """
    --temperature 0 and --top-k 1 are the same choice; past the context it goes on, and says so
    before.
    """
    likeliest = speak("-e", learnt, "--prompt", "the", "-g", 200, "--temperature", 0)
    assert likeliest == speak("-e", learnt, "--prompt", "the", "-g", 200, "--top-k", 1, "--seed",
                              5) and len(likeliest) == 203
    done = formats.run_trainer(["-e", learnt, "--prompt", "the", "-g", 200])
    assert ("the model sees 48 tokens; where they are full, it goes on from the last half of them"
            in done.stderr)
    assert "the model sees" not in formats.run_trainer(["-e", learnt, "--prompt", "the", "-g",
                                                        45]).stderr


def test_text_is_whole(learnt):
    """Whatever bytes come, the output is UTF-8: at so high a temperature any of them do."""
    assert "\ufffd" in speak("-e", learnt, "--prompt", "x", "-g", 900, "--temperature", 100,
                             "--top-k", 0).decode()


def test_half_a_character_waits(learnt):
    """
    One that the prompt has begun waits for its end; what no text ends is shown for what it is, and
    nothing is lost.
    """
    for prompt in (b"the \xe2", b"the \xf0\x9f"):
        text = speak("-e", learnt, "--prompt", "-", "-g", 1, input=prompt).decode()
        assert (text[:len(prompt)] == "the " + "\ufffd" * (len(prompt) - 4)
                and len(text) == len(prompt) + 1), text


def test_it_streams(learnt):
    """The prompt and the first characters are there long before the end."""
    with subprocess.Popen(
        [formats.trainer_path(), "-e", learnt, "--prompt", "the", "-g", "1000000"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment()) as process:
        first = process.stdout.read(200)
        process.kill()
    assert first.startswith(b"the") and len(first) == 200


def test_memory_is_planned(learnt):
    """No gradients, no moments, no tape: weights, cache, and what a piece of a prompt takes."""
    out = formats.run_trainer(["-e", learnt, "--prompt", "x", "--plan"]).stdout
    assert ("keys_values" in out and "grad." not in out and "m.wte" not in out
            and "dresidual" not in out)


@pytest.mark.parametrize("options, names", [
    (["--prompt", "x"], ["--prompt", "--model", "d12"]),
    (["-e", "LEARNT", "--prompt", "x", "--train", "y"], ["--prompt", "--train"]),
    (["-e", "EMPTY", "--prompt", "x"], ["--model", "EMPTY", "model_STEP.bin"]),
    (["-e", "LEARNT", "--prompt", "x", "--tokenizer", "EMPTY/none"], ["EMPTY/none"]),
    (["-e", "LEARNT", "--prompt", "x", "--tokenizer", "GREAT"], ["--tokenizer", "300", "256"]),
    (["-e", "LEARNT", "--prompt", ""], ["--prompt", "empty"])])
def test_refusals(learnt, tmp_path, options, names):
    (tmp_path / "empty").mkdir()
    write_tokenizer(tmp_path / "great", [bytes([i % 256]) * (1 + i // 256) for i in range(300)],
                    299)
    places = {"LEARNT": learnt, "EMPTY": tmp_path / "empty", "GREAT": tmp_path / "great"}

    def placed(words):
        for name, path in places.items():
            words = [word.replace(name, str(path)) for word in words]
        return words
    check_refused(formats.run_trainer(placed(options)), *placed(names))


def test_no_tokenizer(train, tmp_path):
    """
    More ids than bytes and no tokenizer beside the model: that is said. A run leaves its data's
    tokenizer beside its model.
    """
    (tmp_path / "data").mkdir()
    formats.write_tokens(tmp_path / "data" / "train_0.bin", [i % 300 for i in range(500)], 300)
    options = ["-e", "d2", "--channels", 16, "--heads", 2, "--context", 32, "-b", 2, "--train",
               tmp_path / "data" / "train_*.bin", "-x", 1, "-n", -1, "-v", 0]
    run = train(*options)
    check_refused(formats.run_trainer(["-e", run.out, "--prompt", "x"]), "--tokenizer",
                  "tokenizer.bin", run.out)
    pieces = [bytes([i])
              for i in range(256)] + [b"piece%d" % i for i in range(43)] + [b"<|endoftext|>"]
    write_tokenizer(tmp_path / "data" / "tokenizer.bin", pieces, 299)
    run = train(*options)
    assert pathlib.Path(run.out, "tokenizer.bin").read_bytes() == (tmp_path / "data"
                                                                   / "tokenizer.bin").read_bytes()
    assert speak("-e", run.out, "--prompt", "x y", "-g", 20).startswith(b"x y")

# ----------------------------------------------------------------------------
# the CUDA trainer


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "build/train_nogpu_fp32").exists(),
                    reason="no build/train_nogpu_fp32: `make build/train_nogpu_fp32`")
def test_cuda_says_the_same(learnt):
    """
    In fp32 the logits agree to 1e-5 or so, and a draw hardly ever lies so near to the border
    between two tokens.
    """
    options = ["-e", learnt, "--prompt", make_text(300), "-g", 70, "--seed", 3]
    assert speak(*options, trainer=str(ROOT / "build/train_nogpu_fp32")) == speak(*options)

# ----------------------------------------------------------------------------
# encoding

ENCODER = """
#define TESTING
#include "train_gpt2_compact.cpp"
int main(int, char** argv) {
    std::string raw;
    for (int c; (c = getchar()) != EOF;) raw += char(c);
    for (int id : encode(read_tokenizer(argv[1]), raw)) printf("%d\\n", id);
}
"""


def write_tokenizer(path, pieces, end_of_text):
    with open(path, "wb") as file:
        file.write(b"".join(number.to_bytes(4, "little")
                            for number in (20240328, 2, len(pieces),
                                           end_of_text)).ljust(1024, b"\0"))
        file.write(b"".join(bytes([len(piece)]) + piece for piece in pieces))


@pytest.fixture(scope="session")
def encode(tmp_path_factory):
    """encode(pieces, end_of_text, text): the trainer's tokens of a text."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "encoder.cpp").write_text(ENCODER)
    subprocess.run([os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-w", '-DREVISION="test"',
                    f"-I{ROOT}", folder / "encoder.cpp", "-o", folder / "encoder"],
                   check=True)

    def run(pieces, end_of_text, text):
        write_tokenizer(folder / "tokenizer.bin", pieces, end_of_text)
        done = subprocess.run([folder / "encoder", folder / "tokenizer.bin"], input=text.encode(),
                              capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return [int(word) for word in done.stdout.split()]
    return run


def mixed_text(size):
    """Prose, code, all scripts, blanks of all kinds, contractions, unassigned characters."""
    rng = random.Random(1)
    prose = "".join((ROOT / name).read_text()
                    for name in ("README.md", "train_gpt2_compact.cpp", "dev/ablate.py"))
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    awkward = (" \t\n\r\u00a0\u2028\u3000 's'T'll've "
               "0129aZ\u00e9\u0301\u00bd\u2167\u4e2d\uc5b4\U0001f642<|endoftext|>")
    blocks = [0x400, 0x590, 0x900, 0xE00, 0x3040, 0x4E00, 0xAC00, 0x1F300]
    kinds = [lambda: prose[(at := rng.randrange(len(prose))):at + rng.randrange(400)],
             lambda: "".join(rng.choices(every, k=rng.randrange(30))),
             lambda: "".join(rng.choices(awkward, k=rng.randrange(40))),
             lambda: "".join(chr(block + rng.randrange(90)) + rng.choice(["", "", " "])
                             for block in [rng.choice(blocks)] for _ in range(rng.randrange(40)))]
    pieces, length = [], 0
    while length < size:
        pieces.append(rng.choice(kinds)())
        length += len(pieces[-1].encode())
    return "".join(pieces)


def check_like_tiktoken(encode, encoding, ranks):
    pieces = sorted(ranks, key=ranks.get) + [END_OF_TEXT.encode()]
    for text in (mixed_text(1_000_000), "a" * 100_000, "ab" * 5000 + " " * 20000,
                 "\u00a0" * 1000 + "x", "", END_OF_TEXT,
                 f"one  {END_OF_TEXT}{END_OF_TEXT} two<|endoftext|"):
        assert encode(pieces, len(ranks),
                      text) == encoding.encode(text, allowed_special="all"), repr(text[:40])


def test_small_vocabulary(encode):
    """
    Merges of a vocabulary that was made by counting pairs, in which the longest token is often not
    the one that is taken.
    """
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)}
    rng = random.Random(3)
    for _ in range(400):
        ranks.setdefault(rng.choice(list(ranks)[-300:])
                         + rng.choice([b"a", b"b", b"e", b" ", b"th", b"in", b"\xe4", b"0"]),
                         len(ranks))
    encoding = tiktoken.Encoding("small", pat_str=WORDS, mergeable_ranks=ranks,
                                 special_tokens={END_OF_TEXT: len(ranks)})
    check_like_tiktoken(encode, encoding, ranks)


@pytest.mark.skipif(not (GPT2 / "vocab.bpe").is_file(),
                    reason="no GPT-2 vocabulary in ../shared/data/gpt2")
def test_like_gpt2(encode):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    ranks = data_gym_to_mergeable_bpe_ranks(str(GPT2 / "vocab.bpe"), str(GPT2 / "encoder.json"))
    encoding = tiktoken.Encoding("gpt2", pat_str=WORDS, mergeable_ranks=ranks,
                                 special_tokens={END_OF_TEXT: len(ranks)})
    check_like_tiktoken(encode, encoding, ranks)


def test_letters_and_numbers():
    """The tables name the same characters as tiktoken's \\p{L} and \\p{N}, all of Unicode."""
    tiktoken = pytest.importorskip("tiktoken")
    sys.path.insert(0, str(ROOT / "dev"))
    source = (ROOT / "train_gpt2_compact.cpp").read_text()
    for kind, name in (("L", "letters"), ("N", "numbers")):
        table = "".join(re.findall('"(.*)"',
                                   re.search(rf"unicode_{name} =\n(.*?);\n", source, re.S)[1]))
        edges, edge, distance = [], 0, 0
        for digit in map(ord, table):
            distance = distance * 32 + (digit - 40 if digit < 93 else digit - 93)
            if digit < 93:
                edge, distance = edge + distance, 0
                edges.append(edge)
        named = {code for begin, end in zip(edges[::2], edges[1::2]) for code in range(begin, end)}
        one = tiktoken.Encoding(name, pat_str=rf"\p{{{kind}}}",
                                mergeable_ranks={bytes([i]): i for i in range(256)},
                                special_tokens={})
        wanted = {code for code in range(0x110000)
                  if not 0xD800 <= code < 0xE000 and one.encode_ordinary(chr(code))}
        assert named == wanted, [hex(code) for code in sorted(named ^ wanted)[:20]]
