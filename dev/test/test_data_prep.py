"""
Tests of the tools in data_prep/. No network: what is downloaded comes from a file:// address, or
fails at a closed port.

GPT-2's vocabulary is taken from ../shared/data/gpt2 beside the repository; without it the tests
that need it are skipped.
"""

import bz2
import glob
import gzip
import json
import lzma
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("tqdm")

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "data_prep"
SHARED = ROOT.parent / "shared" / "data"
VOCABULARY = ["--vocab-bpe", SHARED / "gpt2" / "vocab.bpe", "--encoder-json",
              SHARED / "gpt2" / "encoder.json"]
BYTES = ["--tokenizer", "bytes"]
NO_SERVER = "http://127.0.0.1:9"

sys.path.insert(0, str(TOOLS))
import common  # noqa: E402
import hellaswag  # noqa: E402
import prepare  # noqa: E402

try:
    import tiktoken  # noqa: F401
    LACKING = ("" if (SHARED / "gpt2" / "vocab.bpe").is_file()
               else f"no GPT-2 vocabulary in {os.path.relpath(SHARED, ROOT)}/gpt2")
except ImportError:
    LACKING = "no tiktoken"
needs_gpt2 = pytest.mark.skipif(bool(LACKING), reason=LACKING)


@pytest.fixture(scope="module")
def gpt2():
    return common.gpt2_tokenizer(*[str(path) for path in VOCABULARY[1::2]])


def run(tool, *args, **options):
    # as without a network: every download goes to a port where nobody answers
    environment = dict(os.environ, http_proxy=NO_SERVER, https_proxy=NO_SERVER,
                       HTTPS_PROXY=NO_SERVER, PYTHONDONTWRITEBYTECODE="1")
    environment.update(options.pop("env", {}))
    return subprocess.run([sys.executable, str(TOOLS / tool), *map(str, args)], env=environment,
                          text=True, capture_output=True, timeout=100, **options)


def good(tool, *args, **options):
    result = run(tool, *args, **options)
    assert result.returncode == 0, result.stderr
    return result


def one_line(tool, result, *words):
    """The tool said what was wrong in one line, and that line names each of the words."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert (result.stderr.startswith(f"{tool}: ") and result.stderr.count("\n") == 1
            and result.stderr.endswith("\n")), result.stderr
    for word in words:
        assert str(word) in result.stderr


def read_shard(path, vocabulary):
    data = Path(path).read_bytes()
    header = np.frombuffer(data[:1024], dtype="<i4")
    tokens = np.frombuffer(data[1024:], dtype="<u2")
    assert list(header[:4]) == [20240520, 1, len(tokens), vocabulary]
    assert not header[4:].any()
    return tokens


def read_split(folder, split, vocabulary):
    shards = [read_shard(path, vocabulary) for path in sorted(Path(folder).glob(f"{split}_*.bin"))]
    return np.concatenate(shards) if shards else np.zeros(0, dtype="<u2")


def read_table(path):
    """The header's first four fields and the tokens' bytes of a tokenizer.bin."""
    data = Path(path).read_bytes()
    header = struct.unpack("<256i", data[:1024])
    assert not any(header[4:])
    table, at = [], 1024
    while at < len(data):
        table.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    assert at == len(data) and len(table) == header[2]
    return header[:4], table


def bytes_of(folder, split):
    return read_split(folder, split, 256).astype(np.uint8).tobytes()


def names(folder):
    return sorted(os.listdir(folder))


def words(size, seed=1, separator=" "):
    """Some text: about `size` characters of words, some of them not ASCII."""
    draw = random.Random(seed)
    some = ["the", "of", "it's", "GPT-2", "1984", "naïve", "Ωμέγα", "日本語", "🙂", "Shakespeare",
            "(and)", "don't\n", "\n", " ", "end.\n\n"]
    text = separator.join(draw.choice(some) for _ in range(size // 6))
    return text if separator == " " else text.replace("\n", "").replace(" ", separator)

# ----------------------------------------------------------------------------
# formats


def test_bytes_format(tmp_path):
    data = bytes(range(1, 256)) * 4 + b"\xff\xfe not UTF-8 \xc3"
    (tmp_path / "in").write_bytes(data)
    good("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES)
    assert names(tmp_path / "out") == ["tokenizer.bin", "train_000000.bin", "val_000000.bin"]
    assert bytes_of(tmp_path / "out", "train") + bytes_of(tmp_path / "out", "val") == data
    expected = (struct.pack("<256i", 20240328, 2, 256, 10, *[0] * 252)
                + b"".join(bytes([1, byte]) for byte in range(256)))
    assert (tmp_path / "out" / "tokenizer.bin").read_bytes() == expected


@needs_gpt2
def test_gpt2_format(tmp_path, gpt2):
    texts = ["Hello world\n" * 30, "The end is <|endoftext|> here.\n" * 20, words(3000)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    good("prepare.py", *sorted(tmp_path.glob("*.txt")), "--out", out, *VOCABULARY)
    train, val = read_split(out, "train", 50257), read_split(out, "val", 50257)
    # "Hello", " world", in GPT-2's published ids
    assert train[0] == 50256 and list(train[1:3]) == [15496, 995]
    assert val[0] != 50256  # the last document goes on in it

    fields, table = read_table(out / "tokenizer.bin")
    assert fields == (20240328, 2, 50257, 50256)
    assert table[15496] == b"Hello" and table[50256] == b"<|endoftext|>"
    tokens = np.concatenate([train, val])
    starts = list(np.flatnonzero(tokens == 50256)) + [len(tokens)]
    assert len(starts) == 4  # one for each document; the one spelled in a text is ordinary text
    for text, start, stop in zip(texts, starts, starts[1:]):
        assert b"".join(table[token] for token in tokens[start + 1:stop]).decode() == text


@needs_gpt2
@pytest.mark.parametrize("separator", [" ", "\n", "  \n\n ", "\u3000", ""])
def test_pieces_have_the_tokens_of_the_whole(tmp_path, gpt2, separator):
    """
    Text of many blocks has the tokens that it has when tokenised at once, however words are
    separated.
    """
    text = words(6 * common.BLOCK, separator=separator or " ")
    if not separator:  # no whitespace at all: cut in words, so only what is decoded is the same
        text = text.replace(" ", "").replace("\n", "")
    (tmp_path / "in").write_bytes(text.encode())
    good("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *VOCABULARY, "--val-fraction", 0)
    tokens = read_split(tmp_path / "out", "train", 50257)[1:]
    assert b"".join(gpt2.table[token] for token in tokens).decode() == text
    if separator in (" ", "\n", "  \n\n "):
        import tiktoken
        ranks = {gpt2.table[token]: token for token in range(50256)}
        encoding = tiktoken.Encoding("whole", pat_str=common.GPT2_WORDS, mergeable_ranks=ranks,
                                     special_tokens={"<|endoftext|>": 50256})
        assert np.array_equal(tokens, encoding.encode_ordinary(text))


def test_cut_text():
    block = common.BLOCK
    gap = "a" + " " * 3 * block + "b" * 3 * block
    for text in "a" * 5 * block, " " * 5 * block, "ab " * 2 * block, gap, words(5 * block), "x":
        pieces = list(common.cut_text(text[i:i + block] for i in range(0, len(text), block)))
        assert "".join(pieces) == text
        assert all(0 < len(piece) <= 2 * block for piece in pieces)
    pieces = list(common.cut_text(["one two  ", " three\nfour", " five"]))
    assert (pieces == ["one two", "   three\nfour", " five"]
            or pieces == ["one two", "   three", "\nfour five"])


@needs_gpt2
def test_long_words_and_long_whitespace(tmp_path, gpt2):
    """tiktoken itself dies of a million spaces."""
    text = "begin" + " " * 10**6 + "\n" * 10**6 + "a" * 10**6 + "end"
    (tmp_path / "in").write_text(text)
    good("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *VOCABULARY, "--val-fraction", 0)
    assert b"".join(gpt2.table[token]
                    for token in read_split(tmp_path / "out", "train", 50257)[1:]).decode() == text


@needs_gpt2
def test_invalid_utf8(tmp_path, gpt2):
    """Bytes that are not UTF-8 become U+FFFD; a character across two blocks does not."""
    data = b"x" * (common.BLOCK - 1) + "é".encode() + b" caf\xe9 au lait\n" * 5 + b"\xe2\x82"
    (tmp_path / "in").write_bytes(data)
    result = good("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *VOCABULARY,
                  "--val-fraction", 0)
    assert (result.stderr.count("\n") == 1 and "U+FFFD" in result.stderr
            and str(tmp_path / "in") in result.stderr)
    tokens = read_split(tmp_path / "out", "train", 50257)[1:]
    assert b"".join(gpt2.table[token] for token in tokens).decode() == data.decode(errors="replace")

# ----------------------------------------------------------------------------
# split, shards, inputs


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.01, 0.9])
def test_split_at_a_line(tmp_path, fraction):
    draw = random.Random(2)
    lines = "".join("é" * draw.randrange(60) + "\n" for _ in range(3000)).encode()
    (tmp_path / "in").write_bytes(lines)
    good("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES, "--val-fraction",
         fraction)
    train, val = bytes_of(tmp_path / "out", "train"), bytes_of(tmp_path / "out", "val")
    assert train + val == lines
    assert train.endswith(b"\n")
    # at most half of the longest line, 121 bytes, off
    assert abs(len(val) - fraction * len(lines)) <= 61


@pytest.mark.parametrize("size", [25, 102, 300004])  # nine tenths of it end within a character
def test_split_within_a_line(tmp_path, size):
    """Without a newline the split is at a character."""
    data = ("€" * size).encode()  # of three bytes
    (tmp_path / "in").write_bytes(data)
    good("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES)
    train, val = bytes_of(tmp_path / "out", "train"), bytes_of(tmp_path / "out", "val")
    assert train + val == data
    assert set(val.decode()) == {"€"}
    assert abs(len(val) - 0.1 * len(data)) < 3


def test_split_keeps_near(tmp_path):
    """
    A line that is most of the text does not become validation as a whole, nor is validation empty.
    """
    data = b"short\n" + b"long " * 1000 + b"\n"
    (tmp_path / "in").write_bytes(data)
    good("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES)
    assert 250 <= len(bytes_of(tmp_path / "out", "val")) <= 750


def test_split_over_documents(tmp_path):
    """The fraction is of all the text: here the last of ten documents, and no part of another."""
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"{i} line\n" * 100)
    good("prepare.py", tmp_path, "--out", tmp_path / "out", *BYTES)
    assert bytes_of(tmp_path / "out", "val") == b"9 line\n" * 100
    assert bytes_of(tmp_path / "out", "train") == b"".join(b"%d line\n" % i * 100 for i in range(9))


@needs_gpt2
def test_document_starts(tmp_path):
    """End-of-text stands where a document begins, in validation too, and not where one goes on."""
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("a line\n" * 100)
    starts = {}
    for fraction in "0.1", "0.15":
        good("prepare.py", tmp_path, "--out", tmp_path / "out", *VOCABULARY, "--val-fraction",
             fraction)
        starts[fraction] = [list(np.flatnonzero(read_split(tmp_path / "out", split,
                                                           50257) == 50256))
                            for split in ("train", "val")]
    assert [len(at) for at in starts["0.1"]] == [9, 1] and starts["0.1"][1] == [0]
    assert [len(at) for at in starts["0.15"]] == [9, 1] and starts["0.15"][1][0] > 0


def test_no_validation(tmp_path):
    (tmp_path / "in").write_text("text\n" * 10)
    result = good("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES,
                  "--val-fraction", 0)
    assert names(tmp_path / "out") == ["tokenizer.bin", "train_000000.bin"]
    assert "--train" in result.stdout and "--val" not in result.stdout


def test_shards(tmp_path):
    data = words(20000).encode()
    (tmp_path / "in").write_bytes(data)
    out = tmp_path / "an out"
    result = good("prepare.py", tmp_path / "in", "--out", out, *BYTES, "--shard-tokens", "1e3")
    shards = sorted(out.glob("train_*.bin"))
    assert [path.name for path in shards] == [f"train_{i:06d}.bin"
                                              for i in range(len(shards))] and len(shards) > 10
    assert all(len(read_shard(path, 256)) == 1000 for path in shards[:-1])
    assert 0 < len(read_shard(shards[-1], 256)) <= 1000
    assert bytes_of(out, "train") + bytes_of(out, "val") == data
    assert (f"./train_gpt2_compact --train '{out}/train_*.bin' --val '{out}/val_*.bin'"
            in result.stdout)
    assert (f"train_000000.bin to {shards[-1].name}: {len(bytes_of(out, 'train')):,} tokens"
            in result.stdout)

    # a later run with fewer shards leaves none of the earlier ones, and nothing that is not its own
    # is touched
    (out / "train_notes.bin").write_text("mine")
    result = good("prepare.py", tmp_path / "in", "--out", out, *BYTES, "--val-fraction", 0)
    assert names(out) == ["tokenizer.bin", "train_000000.bin", "train_notes.bin"]
    assert "earlier run" in result.stdout


def test_last_shard_full(tmp_path):
    """Tokens that fill the shards exactly leave no empty one behind."""
    (tmp_path / "in").write_bytes(b"a" * 3000)
    good("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES, "--shard-tokens", 1000,
         "--val-fraction", 0)
    assert [len(read_shard(path, 256))
            for path in sorted((tmp_path / "out").glob("*_*.bin"))] == [1000] * 3


@pytest.mark.parametrize("ending, pack", [(".gz", gzip.compress), (".bz2", bz2.compress),
                                          (".xz", lzma.compress), (".GZ", gzip.compress)])
def test_compressed(tmp_path, ending, pack):
    data = words(200000).encode()
    (tmp_path / "in.txt").write_bytes(data)
    (tmp_path / ("in.txt" + ending)).write_bytes(pack(data))
    for name in "in.txt", "in.txt" + ending:
        good("prepare.py", tmp_path / name, "--out", tmp_path / ("out " + name), *BYTES)
    for name in "train_000000.bin", "val_000000.bin", "tokenizer.bin":
        assert (tmp_path / "out in.txt" / name).read_bytes() == (tmp_path / f"out in.txt{ending}"
                                                                 / name).read_bytes()


def test_folder(tmp_path):
    """
    In sorted order, files before the folders beside them; what is hidden, empty or not text is left
    out.
    """
    folder = tmp_path / "in"
    for name, data in [("b.txt", b"2"), ("a.txt", b"1"), ("z/c.txt", b"4"), ("m/d.txt", b"3"),
                       (".git/config", b"x"), (".hidden", b"x"), ("empty", b""),
                       ("picture.png", b"\x89PNG\0"),
                       ("late.bin", b"x" * 3 * common.BLOCK + b"\0")]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    result = good("prepare.py", folder, "--out", tmp_path / "out", *BYTES, "--val-fraction", 0)
    assert bytes_of(tmp_path / "out", "train") == b"1234"
    assert (result.stderr.count("\n") == 1 and "late.bin" in result.stderr
            and "picture.png" in result.stderr)


def test_links(tmp_path):
    """Linked files and folders are read; a folder that is read already is not read again, whatever
    leads there."""
    for name in ("in/a/1.txt", "elsewhere/2.txt", "3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(Path(name).stem)
    (tmp_path / "in/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/c.txt").symlink_to(tmp_path / "3.txt")
    (tmp_path / "in/a/round").symlink_to(tmp_path / "in")
    result = good("prepare.py", f"{tmp_path}/in/", tmp_path / "elsewhere", "--out",
                  tmp_path / "out", *BYTES, "--val-fraction", 0)
    assert bytes_of(tmp_path / "out", "train") == b"312"
    said = "skipped, read already under another name: "
    assert result.stderr == f"{said}{tmp_path}/in/a/round\n{said}{tmp_path}/elsewhere\n"


def test_what_a_folder_cannot_give(tmp_path, monkeypatch):
    """Whatever is in a folder, is not hidden and cannot be read ends the run; nothing is passed
    over without a word."""
    folder = tmp_path / "in"
    (folder / "locked").mkdir(parents=True)
    (folder / "good.txt").write_text("text\n" * 100)
    (folder / "nowhere").symlink_to("nothing")
    args = ["prepare.py", folder, "--out", tmp_path / "out", *BYTES]
    one_line("prepare.py", run(*args), folder / "nowhere", "link to nothing")
    (folder / "nowhere").unlink()
    os.mkfifo(folder / "pipe")
    one_line("prepare.py", run(*args), folder / "pipe", "regular file")
    (folder / "pipe").unlink()
    assert names(tmp_path) == ["in"]

    scandir = os.scandir  # root may read any folder, so that permissions would test nothing

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(common.Problem, match="/locked: cannot read the folder: Permission denied"):
        list(prepare.find_files([str(folder)]))
    good(*args)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_under_another_name(tmp_path, pack):
    data = words(20000).encode()
    (tmp_path / "in.txt").write_bytes(pack(data))
    good("prepare.py", tmp_path / "in.txt", "--out", tmp_path / "out", *BYTES)
    assert bytes_of(tmp_path / "out", "train") + bytes_of(tmp_path / "out", "val") == data


NOT_TEXT = [(b"PK\3\4" + b"\0a" * 50, "zip"), (b"\x28\xb5\x2f\xfd" + b"ab" * 50, "zstd"),
            ("text\n".encode("utf-16") * 20, "UTF-16"), (b"7z\xbc\xaf\x27\x1c" + b"a" * 50, "7z"),
            (b"%PDF-1.7\n" + b"a" * 50, "PDF"),
            (struct.pack("<256i", 20240520, 1, 2, *253 * [0]) + b"a\0b\0", "trainer")]


@pytest.mark.parametrize("data, named", NOT_TEXT, ids=[named for _, named in NOT_TEXT])
def test_not_text(tmp_path, data, named):
    """What is packed or no text is never taken for text: named itself it is refused, in a folder
    passed over with a word."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "x.txt"
    path.write_bytes(data)
    one_line("prepare.py", run("prepare.py", path, "--out", tmp_path / "out", *BYTES), path, named)
    (tmp_path / "in" / "y.txt").write_text("good\n" * 50)
    result = good("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES,
                  "--val-fraction", 0)
    assert bytes_of(tmp_path / "out", "train") == b"good\n" * 50
    assert result.stderr.count("\n") == 1 and str(path) in result.stderr and named in result.stderr
    one_line("fineweb.py", run("fineweb.py", "--jsonl", path, "--out", tmp_path / "other", *BYTES),
             path, named)


def test_text_that_begins_like_an_archive(tmp_path):
    (tmp_path / "in").write_text("BZh is how bzip2's files begin.\n" * 9)
    good("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES, "--val-fraction", 0)
    assert bytes_of(tmp_path / "out", "train") == (tmp_path / "in").read_bytes()


def test_tokens_without_a_header(tmp_path):
    """As other trainers write them: numbers, which would be trained on as bytes."""
    np.arange(1000, dtype="<u2").tofile(tmp_path / "train.bin")
    result = run("prepare.py", tmp_path / "train.bin", "--out", tmp_path / "out", *BYTES)
    one_line("prepare.py", result, tmp_path / "train.bin", "tokens without a header",
             "--type uint16")


@pytest.mark.parametrize("kind, dtype", [("uint16", "<u2"), ("uint32", "<u4")])
def test_type(tmp_path, kind, dtype):
    """Of token ids without a header, files named val... are validation; or the end of all is."""
    ids = (np.arange(100_000) * 7919 % 251).astype(dtype)  # longer than a block
    for name, part in (("train.bin", ids[:70_000]), ("val.bin", ids[70_000:])):
        part.tofile(tmp_path / name)
    args = ["--type", kind, *BYTES, "--out", tmp_path / "out", "--shard-tokens", 64_000]
    good("prepare.py", tmp_path / "val.bin", tmp_path / "train.bin", *args)
    assert np.array_equal(read_split(tmp_path / "out", "train", 256), ids[:70_000])
    assert np.array_equal(read_split(tmp_path / "out", "val", 256), ids[70_000:])
    assert read_table(tmp_path / "out" / "tokenizer.bin")[0][2] == 256

    good("prepare.py", tmp_path / "train.bin", *args, "--val-fraction", 0.25)
    assert np.array_equal(read_split(tmp_path / "out", "train", 256), ids[:52_500])
    assert np.array_equal(read_split(tmp_path / "out", "val", 256), ids[52_500:70_000])


def test_type_of_characters(tmp_path):
    """nanoGPT's meta.pkl says which they are. It may hold plain values alone: others could run
    code."""
    characters = "\n abcé"
    meta = {"vocab_size": 6, "itos": dict(enumerate(characters)),
            "stoi": {c: i for i, c in enumerate(characters)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    (np.arange(600, dtype="<u2") % 6).tofile(tmp_path / "train.bin")
    args = [tmp_path / "train.bin", "--type", "uint16", "--out", tmp_path / "out"]
    good("prepare.py", *args)
    fields, table = read_table(tmp_path / "out" / "tokenizer.bin")
    assert fields[2:] == (6, 0) and table == [c.encode() for c in characters]
    assert len(read_split(tmp_path / "out", "train", 6)) == 540

    shutil.rmtree(tmp_path / "out")
    for bad in (dict(meta, itos=Path("x")), {"itos": {1: "a"}}, [1]):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(bad))
        one_line("prepare.py", run("prepare.py", *args), "meta.pkl")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    np.array([5, 6], "<u2").tofile(tmp_path / "train.bin")
    one_line("prepare.py", run("prepare.py", *args), "train.bin", "id 6", "characters, has 6")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data, args, named", [
    (np.array([1, 300], "<u2").tobytes(), ["uint16"], ["train.bin", "id 300", "bytes, has 256"]),
    (np.array([1, 2], "<u2").tobytes(), ["uint32"], ["train.bin", "id 131,073"]),
    (b"abc", ["uint16"], ["train.bin", "3 bytes"]),
    (b"", ["uint16"], ["train.bin", "0 bytes"]),
    (np.array([20240520, 1], "<i4").tobytes(), ["uint16"], ["train.bin", "the trainer takes"]),
    (np.ones(3, "<u2").tobytes(), ["uint16"], ["--val-fraction 0.1", "too few"]),
    (np.ones(3, "<u2").tobytes(), ["uint8"], ["--type", "uint8"]),
    (None, ["uint16"], ["train.bin", "is no file"]),
])
def test_type_bad_input(tmp_path, data, args, named):
    if data is None:
        (tmp_path / "train.bin").mkdir()
    else:
        (tmp_path / "train.bin").write_bytes(data)
    result = run("prepare.py", tmp_path / "train.bin", "--out", tmp_path / "out", "--type", *args,
                 *BYTES)
    one_line("prepare.py", result, *named)
    assert not (tmp_path / "out").exists()


@needs_gpt2
def test_byte_order_mark(tmp_path):
    """It is no part of the text, and no token."""
    text = words(3000).encode()
    for name, data in ("plain", text), ("marked", b"\xef\xbb\xbf" + text):
        (tmp_path / name).write_bytes(data)
        good("prepare.py", tmp_path / name, "--out", tmp_path / f"{name}.out", *VOCABULARY,
             "--val-fraction", 0)
    plain, marked = (read_split(tmp_path / f"{name}.out", "train", 50257)
                     for name in ("plain", "marked"))
    assert np.array_equal(plain, marked)


def test_lines_of_json(tmp_path):
    """Lines end at \\n, with \\r before it or not, and nowhere else; a byte order mark stands
    before the first."""
    texts = ["one\u2028two\u0085three", "four\x0cfive", "six"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    good("fineweb.py", "--jsonl", tmp_path / "in.jsonl", "--out", tmp_path / "out", *BYTES,
         "--shard-tokens", 10)
    got = bytes_of(tmp_path / "out", "val") + bytes_of(tmp_path / "out", "train")
    assert got.decode() == "".join(text + "\n" for text in texts)


def test_names_of_any_bytes(tmp_path):
    """A file's name need not be text, and a folder's may hold what means something in a pattern."""
    folder = tmp_path / os.fsdecode(b"caf\xe9 [1]*")
    folder.mkdir()
    (folder / os.fsdecode(b"\xe9.txt")).write_text("some text\n" * 50)
    (folder / os.fsdecode(b"\xe8.txt")).write_bytes(b"\0")
    result = good("prepare.py", folder, "--out", folder / "out", *BYTES)
    assert "caf" in result.stdout and "Traceback" not in result.stderr
    (tmp_path / "[1]").mkdir()
    (tmp_path / "1").mkdir()
    result = good("prepare.py", folder / os.fsdecode(b"\xe9.txt"), "--out", tmp_path / "[1]",
                  *BYTES)
    command = shlex.split(result.stdout.splitlines()[-1])
    for option, split in ("--train", "train"), ("--val", "val"):
        pattern = command[command.index(option) + 1]
        assert glob.glob(pattern) == [str(tmp_path / "[1]" / f"{split}_000000.bin")]


def test_one_at_a_time(tmp_path):
    """A folder or file that another program is writing is left alone, and is free when that one has
    died."""
    (tmp_path / "in").write_text("some text\n" * 50)
    args = ["prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES]
    with common.holding(tmp_path / "out"):
        one_line("prepare.py", run(*args), tmp_path / "out", "another program")
    assert names(tmp_path / "out") == []
    good(*args)

    target = str(tmp_path / "file")
    Path(target).write_text("earlier")
    with common.whole_file(target) as file:
        file.write(b"first")
        with pytest.raises(common.Problem, match="another program is writing"):
            with common.whole_file(target):
                pass
    assert Path(target).read_text() == "first" and names(tmp_path) == ["file", "in", "out"]

    held = f"""
import sys, time
sys.path.insert(0, {str(TOOLS)!r})
import common
file, folder = common.whole_file({target!r}), common.holding({str(tmp_path / "out")!r})
file.__enter__().write(b"half")
folder.__enter__()
print("held", flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-B", "-c", held], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        one_line("prepare.py", run(*args), "another program")
    finally:
        child.kill()
        child.wait()
    good(*args)
    with common.whole_file(target) as file:
        file.write(b"last")
    assert Path(target).read_text() == "last" and not Path(target + ".tmp").exists()


def test_what_a_killed_run_left(tmp_path):
    """Goes when the next one begins, though that writes fewer shards, or fails."""
    (tmp_path / "out").mkdir()
    for name in "train_000007.bin.tmp", "val_000000.bin.tmp", "tokenizer.bin.tmp", "mine.tmp":
        (tmp_path / "out" / name).write_text("half")
    (tmp_path / "in").write_text("")
    run("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES)
    assert names(tmp_path / "out") == ["mine.tmp"]


def test_closed_descriptors(tmp_path):
    """With standard output and error closed a tool does its work, and nothing that it prints goes
    into its files."""
    (tmp_path / "in").write_text("some text\n" * 50)
    command = shlex.join([sys.executable, "-B", str(TOOLS / "prepare.py"), str(tmp_path / "in"),
                          "--out", str(tmp_path / "out"), *BYTES])
    for closed in ">&-", ">&- 2>&-", "<&- >&- 2>&-":
        done = subprocess.run(["sh", "-c", f"{command} {closed}"], stderr=subprocess.DEVNULL)
        assert done.returncode == 0
        got = bytes_of(tmp_path / "out", "train") + bytes_of(tmp_path / "out", "val")
        assert got == (tmp_path / "in").read_bytes()
        shutil.rmtree(tmp_path / "out")


def test_file_with_nul(tmp_path):
    """Named by itself, a file with a NUL byte is meant: good as bytes, not as text."""
    (tmp_path / "in").write_bytes(b"\0\1\2")
    good("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES, "--val-fraction", 0)
    assert bytes_of(tmp_path / "out", "train") == b"\0\1\2"
    if not LACKING:
        one_line("prepare.py",
                 run("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *VOCABULARY),
                 tmp_path / "in", "NUL")

# ----------------------------------------------------------------------------
# memory

# Runs a tool as its own only child and prints the most memory that child had. The process between
# is small: the peak of a process counts from its fork, when it has its parent's memory, and this
# one's is large.
MEASURE = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
           "stdout=subprocess.DEVNULL); "
           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")


def peak_kib(*args):
    command = [sys.executable, "-c", MEASURE, sys.executable, str(TOOLS / "prepare.py"),
               *map(str, args)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True,
                              timeout=100).stdout)


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
@pytest.mark.parametrize("separator", ["\n", " ", ""], ids=["lines", "words", "letters"])
@pytest.mark.slow
def test_memory_is_bounded(tmp_path, tokenizer, separator):
    """
    60 MB (GPT-2: 15 MB) take at most 40 MB more than 1 kB: to hold the text and its tokens takes 60
    MB and 120 MB (GPT-2: 15 MB and, as a list, 150 MB).
    """
    block = separator.join(["word", "naïve", "1984"] * 30000)[:300000].encode() + separator.encode()
    options = BYTES if tokenizer == "bytes" else VOCABULARY
    (tmp_path / "small").write_bytes(block[:1000])
    with open(tmp_path / "large", "wb") as file:
        while file.tell() < (60e6 if tokenizer == "bytes" else 15e6):
            file.write(block)
    small = peak_kib(tmp_path / "small", "--out", tmp_path / "out", *options)
    large = peak_kib(tmp_path / "large", "--out", tmp_path / "out", *options)
    print(f"peak: {small} KiB for 1 kB, "
          f"{large} KiB for {(tmp_path / 'large').stat().st_size} bytes")
    assert large - small < 40 * 1024

# ----------------------------------------------------------------------------
# interruption


# Stops while the shard train_000003.bin is being written, and waits to be interrupted.
STOP_IN_A_SHARD = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import common, prepare
encode_all = prepare.encode_all
def stopping(*args):
    for i, pair in enumerate(encode_all(*args)):
        if i == 5:
            print("stopped", flush=True)
            time.sleep(60)
        yield pair
prepare.encode_all = stopping
common.PROGRAM = "prepare.py"
common.run(prepare.main)
"""


@pytest.mark.parametrize("how, status",
                         [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_interrupted(tmp_path, how, status):
    (tmp_path / "in").write_bytes(b"some text\n" * 100000)
    args = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--shard-tokens", "100000",
            *BYTES]
    child = subprocess.Popen([sys.executable, "-B", "-c", STOP_IN_A_SHARD, str(TOOLS), *args],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "stopped\n"
        assert "train_000003.bin.tmp" in names(tmp_path / "out")
        child.send_signal(how)
        _, stderr = child.communicate(timeout=20)
    finally:
        child.kill()
    assert child.returncode == status
    assert stderr.count("\n") == (1 if how == signal.SIGINT else 0) and "Traceback" not in stderr
    shards = [name for name in names(tmp_path / "out") if name != "train_000003.bin.tmp"]
    assert shards == ["tokenizer.bin", "train_000000.bin", "train_000001.bin", "train_000002.bin"]
    assert [len(read_shard(tmp_path / "out" / name, 256)) for name in shards[1:]] == [100000] * 3
    assert how == signal.SIGKILL or "train_000003.bin.tmp" not in names(tmp_path / "out")

    # and the next run leaves nothing of it
    good("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES)
    assert names(tmp_path / "out") == ["tokenizer.bin", "train_000000.bin", "val_000000.bin"]


def test_no_space(tmp_path):
    """
    A shard that cannot be written to its end: one line, and no part of it left. What an earlier run
    wrote stays.
    """
    (tmp_path / "in").write_bytes(b"some text\n" * 100000)
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))}
    result = run("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES, **limit)
    one_line("prepare.py", result, "--out", tmp_path / "out", "large")
    assert names(tmp_path / "out") == []
    # stays in the file's buffer, and fails when the file is completed
    (tmp_path / "short").write_bytes(b"some text\n" * 200)
    short = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))}
    one_line("prepare.py",
             run("prepare.py", tmp_path / "short", "--out", tmp_path / "out", *BYTES, **short),
             "large")
    assert names(tmp_path / "out") == []

    good("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES, "--shard-tokens", 300000)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    one_line("prepare.py",
             run("prepare.py", tmp_path / "in", "--out", tmp_path / "out", *BYTES, **limit),
             "large")
    assert {name: (tmp_path / "out" / name).read_bytes()
            for name in names(tmp_path / "out")} == before

# ----------------------------------------------------------------------------
# bad input: one line, status 2


@pytest.fixture
def inputs(tmp_path):
    """
    A folder with a good text, an empty file, an empty folder, and files that are not what their
    names say.
    """
    (tmp_path / "text").write_text("Some text.\n" * 100)
    (tmp_path / "two").write_text("ab")
    (tmp_path / "empty").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "binary").write_bytes(b"\0")
    os.mkfifo(tmp_path / "pipe")
    for ending in ".gz", ".bz2", ".xz":
        (tmp_path / ("bad" + ending)).write_text("This is not compressed.")
    for ending, pack in (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress):
        (tmp_path / ("half" + ending)).write_bytes(pack(random.Random(3).randbytes(20000))[:5000])
    return tmp_path


@pytest.mark.parametrize(
    "args, named",
    [([], ["INPUT", "--out"]), (["text"], ["--out"]), (["--out", "out"], ["INPUT"]),
     (["none", "--out", "out"], ["none", "no such file"]),
     (["text", "none", "--out", "out"], ["none", "no such file"]),
     (["pipe", "--out", "out"], ["pipe"]), (["empty", "--out", "out"], ["empty", "no text"]),
     (["empty", "folder", "--out", "out"], ["no text"]),
     (["text", "--out", "text"], ["--out text", "cannot write"]),
     (["text", "--out", "text/out"], ["--out text/out", "cannot write"]),
     (["text", "--out", "/proc/none"], ["--out /proc/none", "cannot write"]),
     (["text", "--out", "out", "--val-fraction", "1"], ["--val-fraction", "'1'", "0.1"]),
     (["text", "--out", "out", "--val-fraction", "-0.1"], ["--val-fraction"]),
     (["text", "--out", "out", "--val-fraction", "nan"], ["--val-fraction", "'nan'"]),
     (["text", "--out", "out", "--val-fraction", "ten"], ["--val-fraction", "'ten'"]),
     (["two", "--out", "out", "--val-fraction", "0.1"], ["--val-fraction", "too few"]),
     (["text", "--out", "out", "--shard-tokens", "0"],
      ["--shard-tokens", "'0'", "from 1 to 2147483647"]),
     (["text", "--out", "out", "--shard-tokens", "2147483648"], ["--shard-tokens", "'2147483648'"]),
     (["text", "--out", "out", "--shard-tokens", "1.5"], ["--shard-tokens", "'1.5'"]),
     (["text", "--out", "out", "--shard-tokens", "nan"], ["--shard-tokens", "'nan'"]),
     (["text", "--out", "out", "--shard-tokens", "inf"], ["--shard-tokens", "'inf'"]),
     (["text", "--out", "out", "--shard-tokens", "many"], ["--shard-tokens", "'many'"]),
     (["text", "--out", "out", "--tokenizer", "gpt3"], ["--tokenizer", "gpt3", "bytes"]),
     (["text", "--out", "out", "--vocab-bpe", "text"], ["--vocab-bpe", "--tokenizer gpt2"]),
     (["text", "--out", "out", "--encoder-json", "text"], ["--encoder-json", "--tokenizer gpt2"]),
     (["text", "--out", "out", "--no-such-option"], ["--no-such-option"]),
     (["bad.gz", "--out", "out"], ["bad.gz"]), (["bad.bz2", "--out", "out"], ["bad.bz2"]),
     (["bad.xz", "--out", "out"], ["bad.xz"]), (["half.gz", "--out", "out"], ["half.gz"]),
     (["half.bz2", "--out", "out"], ["half.bz2"]), (["half.xz", "--out", "out"], ["half.xz"])],
    ids=lambda value: " ".join(value))
def test_bad_input(inputs, args, named):
    result = run("prepare.py", *(args if "--tokenizer" in args else args + BYTES), cwd=inputs)
    skipped = "skipped, not text (NUL bytes): folder/binary\n"
    if "folder" in args:
        assert result.stderr.startswith(skipped)
        result.stderr = result.stderr[len(skipped):]
    one_line("prepare.py", result, *named)
    assert not list(inputs.glob("out/*"))


@pytest.mark.parametrize(
    "args, named",
    [(["--vocab-bpe", "text"], ["--encoder-json FILE", "go together"]),
     (["--encoder-json", "text"], ["--vocab-bpe FILE", "go together"]),
     (["--vocab-bpe", "none", "--encoder-json", "text"], ["--vocab-bpe none"]),
     (["--vocab-bpe", "text", "--encoder-json", "folder"], ["--encoder-json folder"]),
     (["--vocab-bpe", "text", "--encoder-json", "text"],
      ["--vocab-bpe text", "--encoder-json text"]),
     (["--vocab-bpe", "folder/binary", "--encoder-json", "empty"], ["--encoder-json empty"]),
     (["--vocab-bpe", "small.bpe", "--encoder-json", "small.json"], ["--vocab-bpe small.bpe"]),
     (["--vocab-bpe", "other.bpe", "--encoder-json", "small.json"], ["--vocab-bpe other.bpe"])],
    ids=lambda value: " ".join(value))
def test_bad_vocabulary(inputs, args, named):
    pytest.importorskip("tiktoken")
    # a vocabulary of single bytes: whole, but not GPT-2's. What is not printable is written as
    # characters from 256 on.
    printable = [chr(byte) for byte in range(256) if chr(byte).isprintable() and byte != 32]
    characters = printable + [chr(256 + i) for i in range(256 - len(printable))]
    (inputs / "small.json").write_text(json.dumps({character: i
                                                   for i, character in enumerate(characters)}))
    (inputs / "small.bpe").write_text("#version: 0.2\n")
    (inputs / "other.bpe").write_text("#version: 0.2\na b\n")
    one_line("prepare.py", run("prepare.py", "text", "--out", "out", *args, cwd=inputs), *named)


@needs_gpt2
def test_vocabulary_is_read_anew(inputs):
    """A vocabulary file is never taken from tiktoken's cache, which goes by name alone."""
    for name, path in ("v", VOCABULARY[1]), ("e", VOCABULARY[3]):
        (inputs / name).write_bytes(path.read_bytes())
    args = ["text", "--out", "out", "--vocab-bpe", "v", "--encoder-json", "e"]
    cache = {"TIKTOKEN_CACHE_DIR": str(inputs / "cache")}
    good("prepare.py", *args, cwd=inputs, env=cache)
    (inputs / "v").write_text("not a vocabulary")
    one_line("prepare.py", run("prepare.py", *args, cwd=inputs, env=cache), "--vocab-bpe v")


def test_vocabulary_download_fails(inputs):
    pytest.importorskip("tiktoken")
    result = run("prepare.py", "text", "--out", "out", cwd=inputs,
                 env={"TIKTOKEN_CACHE_DIR": str(inputs / "cache")})
    one_line("prepare.py", result, "vocab.bpe", "encoder.json", "--vocab-bpe", "--encoder-json",
             "--tokenizer bytes")


@pytest.mark.parametrize("tool, args, package",
                         [("prepare.py", ["--help"], "numpy"), ("hellaswag.py", ["--help"], "tqdm"),
                          ("prepare.py", ["text", "--out", "out"], "tiktoken"),
                          ("fineweb.py", BYTES, "datasets")])
def test_missing_package(inputs, tool, args, package):
    (inputs / "packages").mkdir()
    (inputs / "packages" / f"{package}.py").write_text("raise "
                                                       f"ModuleNotFoundError(name={package!r})")
    result = run(tool, *args, cwd=inputs, env={"PYTHONPATH": str(inputs / "packages")})
    one_line(tool, result, package, "pip install -r", "requirements.txt")


@pytest.mark.parametrize("tool", ["prepare.py", "tinyshakespeare.py", "fineweb.py", "hellaswag.py"])
def test_help(tool):
    assert os.access(TOOLS / tool,
                     os.X_OK) and (TOOLS / tool).read_text().startswith("#!/usr/bin/env python3\n")
    text = " ".join(good(tool, "--help").stdout.split())  # lines are broken anywhere
    assert "(default: gpt2)" in text and "--vocab-bpe" in text and "example:" in text
    assert tool == "prepare.py" or "(default: data/" in text
    assert "None" not in text

# ----------------------------------------------------------------------------
# Tiny Shakespeare


def test_tinyshakespeare(tmp_path):
    """--file, a download, and prepare.py come to the same."""
    data = words(50000).encode()
    (tmp_path / "in").write_bytes(data)
    good("tinyshakespeare.py", "--file", tmp_path / "in", "--out", tmp_path / "a", *BYTES)
    good("tinyshakespeare.py", "--url", (tmp_path / "in").as_uri(), "--out", tmp_path / "b", *BYTES)
    good("prepare.py", tmp_path / "in", "--out", tmp_path / "c", *BYTES)
    assert names(tmp_path / "b") == ["tinyshakespeare.txt"] + names(tmp_path / "a")
    for name in "train_000000.bin", "val_000000.bin", "tokenizer.bin":
        assert len({(tmp_path / folder / name).read_bytes() for folder in "abc"}) == 1
    again = good("tinyshakespeare.py", "--url", NO_SERVER, "--out", tmp_path / "b", *BYTES)
    assert "not downloaded again" in again.stdout


@needs_gpt2
@pytest.mark.skipif(not (SHARED / "tinyshakespeare.txt").is_file(),
                    reason="no tinyshakespeare.txt in ../shared/data")
def test_tinyshakespeare_in_gpt2(tmp_path):
    """The whole text has the number of tokens that everybody gets."""
    good("tinyshakespeare.py", "--file", SHARED / "tinyshakespeare.txt", "--out", tmp_path,
         *VOCABULARY)
    train, val = read_split(tmp_path, "train", 50257), read_split(tmp_path, "val", 50257)
    # end-of-text; one more where the split parts two newlines
    assert 338025 + 1 <= len(train) + len(val) <= 338025 + 2
    assert 0.09 < len(val) / len(train) < 0.13


@pytest.mark.parametrize("tool", ["tinyshakespeare.py", "hellaswag.py"])
@pytest.mark.parametrize("url", [NO_SERVER + "/a/file.txt", "file:///no/such/file.txt", "nonsense"])
def test_download_fails(tmp_path, tool, url):
    one_line(tool, run(tool, "--url", url, "--out", "out", *BYTES, cwd=tmp_path),
             f"cannot download {url}", "--file FILE")
    assert names(tmp_path) == []


def test_download_is_cut_short(tmp_path, monkeypatch):
    """A connection that ends early leaves no file that the next run would take for whole."""
    import io
    from types import SimpleNamespace

    class Short(io.BytesIO):
        headers = {"Content-Length": "100"}

    monkeypatch.setattr(common.urllib, "request",
                        SimpleNamespace(urlopen=lambda url, timeout: Short(b"x" * 60)))
    with pytest.raises(common.Problem, match="60 of 100 bytes.*--file FILE"):
        common.download("http://host/file", str(tmp_path / "out" / "file"))
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("tool", ["tinyshakespeare.py", "hellaswag.py"])
def test_file_missing(tmp_path, tool):
    one_line(tool, run(tool, "--file", "none", *BYTES, cwd=tmp_path), "--file none", "no such file")
    assert names(tmp_path) == []

# ----------------------------------------------------------------------------
# FineWeb


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n"
                            for i, text in enumerate(texts)))


def test_fineweb_jsonl(tmp_path):
    texts = [words(500, seed) for seed in range(100)]
    write_jsonl(tmp_path / "in.jsonl", texts)
    whole = "".join(text + "\n" for text in texts).encode()
    good("fineweb.py", "--jsonl", tmp_path / "in.jsonl", "--out", tmp_path / "out", *BYTES,
         "--shard-tokens", "10000")
    shards = names(tmp_path / "out")
    assert [name for name in shards if name.startswith("val")] == ["val_000000.bin"]
    assert bytes_of(tmp_path / "out", "val") == whole[:10000]
    assert bytes_of(tmp_path / "out", "train") == whole[10000:]
    assert len(shards) == 2 + (len(whole) - 1) // 10000

    good("fineweb.py", "--jsonl", tmp_path / "in.jsonl", "--out", tmp_path / "out", *BYTES,
         "--shard-tokens", "10000", "--max-tokens", "12345")
    assert names(tmp_path / "out") == ["tokenizer.bin", "train_000000.bin", "val_000000.bin"]
    assert bytes_of(tmp_path / "out", "train") == whole[10000:12345]


@needs_gpt2
def test_fineweb_gpt2(tmp_path, gpt2):
    texts = [words(300, seed) for seed in range(50)] + ["", "half a pair \ud800.", " " * 10**6]
    write_jsonl(tmp_path / "in.jsonl", texts)
    good("fineweb.py", "--jsonl", tmp_path / "in.jsonl", "--out", tmp_path / "out", *VOCABULARY,
         "--shard-tokens", "100000")
    tokens = np.concatenate([read_split(tmp_path / "out", split, 50257)
                             for split in ("val", "train")])
    starts = list(np.flatnonzero(tokens == 50256)) + [len(tokens)]
    decoded = [b"".join(gpt2.table[token] for token in tokens[a + 1:b]).decode()
               for a, b in zip(starts, starts[1:])]
    assert decoded == [text.replace("\ud800", "?") for text in texts if text]


# What the package datasets does for fineweb.py: documents one by one, and then maybe the connection
# breaks.
DATASETS = """
def load_dataset(path, name, split, streaming):
    assert (path, name, split, streaming) == ("HuggingFaceFW/fineweb", "sample-10BT", "train", True)
    for i in range({documents}):
        yield dict(text="a document of 26 letters..", id=i)
    if {breaks}:
        raise ConnectionError("the server\\nhung up")
"""


def hub(folder, **values):
    (folder / "datasets.py").write_text(DATASETS.format(**values))
    return {"PYTHONPATH": str(folder)}


def test_fineweb_hub(tmp_path):
    environment = hub(tmp_path, documents=1000, breaks=False)
    good("fineweb.py", *BYTES, "--shard-tokens", 10000, "--max-tokens", 15000, cwd=tmp_path,
         env=environment)
    whole = b"a document of 26 letters..\n" * 1000
    assert bytes_of(tmp_path / "data/fineweb", "val") == whole[:10000]
    assert bytes_of(tmp_path / "data/fineweb", "train") == whole[10000:15000]


def test_fineweb_connection(tmp_path):
    """No connection: one line. One that breaks: one line, and the shards complete by then stay."""
    result = run("fineweb.py", *BYTES, "--out", "out", cwd=tmp_path,
                 env=hub(tmp_path, documents=0, breaks=True))
    one_line("fineweb.py", result, "HuggingFaceFW/fineweb", "the server hung up", "--jsonl FILE")
    assert names(tmp_path / "out") == []
    result = run("fineweb.py", *BYTES, "--out", "out", "--shard-tokens", "1e6", cwd=tmp_path,
                 env=hub(tmp_path, documents=200000, breaks=True))
    one_line("fineweb.py", result, "the server hung up")
    shards = names(tmp_path / "out")
    assert shards[:2] == ["tokenizer.bin", "train_000000.bin"] and shards[-1] == "val_000000.bin"
    assert all(len(read_shard(tmp_path / "out" / name, 256)) == 10**6 for name in shards[1:])


@pytest.mark.parametrize(
    "lines, args, named",
    [('{"text": "a"}\n', ["--shard-tokens", "10", "--max-tokens", "10"],
      ["--max-tokens 10", "--shard-tokens 10"]),
     ('{"text": "a"}\n', ["--max-tokens", "0"], ["--max-tokens", "'0'"]),
     ('{"text": "abc"}\n', ["--shard-tokens", "10"], ["in.jsonl", "4 tokens", "--shard-tokens"]),
     ("", ["--shard-tokens", "10"], ["in.jsonl", "0 tokens"]),
     ('{"text": "a"}\n{"text": 1}\n', [], ["in.jsonl", "line 2", "text"]),
     ('{"text": "a"}\n{"words": "a"}\n', [], ["in.jsonl", "line 2"]),
     ('{"text": "a"}\n[]\n', [], ["in.jsonl", "line 2"]),
     ('{"text": "a"}\n\n{"text"\n', [], ["in.jsonl", "line 3"]),
     ('{"text": "a"}\n', ["--jsonl", "none"], ["--jsonl none", "no such file"])])
def test_fineweb_bad_input(tmp_path, lines, args, named):
    (tmp_path / "in.jsonl").write_text(lines)
    one_line("fineweb.py",
             run("fineweb.py", "--jsonl", "in.jsonl", "--out", "out", *BYTES, *args, cwd=tmp_path),
             *named)
    assert not list(tmp_path.glob("out/*"))

# ----------------------------------------------------------------------------
# HellaSwag

EXAMPLES = [("Clean and jerk", "A lady walks to a barbell: she", 3,
             ["waits.", "pulls.", "lifts it — twice.", "jumps."]),
            ("Youth", "How to read. Open a book.", 0, ["Read.", "", "Eat it.", "Close it."])]


def write_hellaswag(folder, examples=EXAMPLES):
    """The same examples as JSON lines and in the six-line format."""
    fields = "activity_label", "ctx", "label", "endings"
    (folder / "hs.jsonl").write_text("".join(json.dumps(dict(zip(fields, example), ind=9)) + "\n"
                                             for example in examples))
    (folder / "hs.txt").write_text("".join(f"{activity}: {context}\n{label}\n" + "\n".join(endings)
                                           + "\n"
                                           for activity, context, label, endings in examples),
                                   encoding="utf-8")


def expected_hellaswag(encode, examples=EXAMPLES):
    """The .bin, put together from its description."""
    out = []
    for index, (_, context, label, endings) in enumerate(examples):
        numbers = [label, 4, len(encode(context)), *encode(context)]
        for ending in endings:
            numbers += [len(encode(" " + ending)), *encode(" " + ending)]
        out.append(struct.pack(f"<{3 + len(numbers)}H", 65535, 2 * (3 + len(numbers)), index,
                               *numbers))
    return struct.pack("<256i", 20240522, 1, len(out), max(map(len, out)),
                       *[0] * 252) + b"".join(out)


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
def test_hellaswag(tmp_path, tokenizer, request):
    write_hellaswag(tmp_path)
    (tmp_path / "hs.txt.bz2").write_bytes(bz2.compress((tmp_path / "hs.txt").read_bytes()))
    options = BYTES if tokenizer == "bytes" else VOCABULARY
    if tokenizer == "bytes":
        def encode(text):
            return list(text.encode())
    else:
        def encode(text):
            return list(request.getfixturevalue("gpt2").encode([text])[0])
    for name in "hs.jsonl", "hs.txt", "hs.txt.bz2":
        good("hellaswag.py", "--file", tmp_path / name, "--out", tmp_path / "out", *options)
        assert names(tmp_path / "out") == ["hellaswag_val.bin"]
        assert (tmp_path / "out"
                / "hellaswag_val.bin").read_bytes() == expected_hellaswag(encode), name

        good("hellaswag.py", "--file", tmp_path / name, "--out", tmp_path / "out", *options,
             "--limit", 1)
        assert (tmp_path / "out" / "hellaswag_val.bin").read_bytes() == expected_hellaswag(
            encode, EXAMPLES[:1]), name

        good("hellaswag.py", "--file", tmp_path / name, "--out", tmp_path / "out", *options,
             "--activity")
        named = [(activity, f"{activity}: {context}", *rest)
                 for activity, context, *rest in EXAMPLES]
        assert (tmp_path / "out"
                / "hellaswag_val.bin").read_bytes() == expected_hellaswag(encode, named), name


def test_hellaswag_download(tmp_path):
    write_hellaswag(tmp_path)
    good("hellaswag.py", "--url", (tmp_path / "hs.jsonl").as_uri(), *BYTES, cwd=tmp_path)
    assert names(tmp_path / "data/hellaswag") == ["hellaswag_val.bin", "hellaswag_val.jsonl"]


def test_hellaswag_context_without_activity():
    lines = ["He sat down. She said: go", "1", "a", "b", "c", "d"]
    assert hellaswag.read_six(lines, False) == ("He sat down. She said: go", 1,
                                                ["a", "b", "c", "d"])


@needs_gpt2
@pytest.mark.skipif(not (SHARED / "hellaswag_val_full.txt.bz2").is_file(),
                    reason="no hellaswag_val_full.txt.bz2 in ../shared/data")
@pytest.mark.slow
def test_hellaswag_in_full(tmp_path):
    """
    All 10,042 examples: the file is as long as its examples say, and its longest one is as long as
    its header says.
    """
    good("hellaswag.py", "--file", SHARED / "hellaswag_val_full.txt.bz2", "--out", tmp_path,
         *VOCABULARY)
    data = (tmp_path / "hellaswag_val.bin").read_bytes()
    header, stream = np.frombuffer(data[:1024],
                                   dtype="<i4"), np.frombuffer(data[1024:], dtype="<u2").tolist()
    at, sizes, right = 0, [], []
    for index in range(10042):
        assert [stream[at], stream[at + 2], stream[at + 4]] == [65535, index, 4]
        inner = at + 5
        for _ in range(5):
            assert stream[inner] > 0
            inner += 1 + stream[inner]
        assert inner - at == stream[at + 1] // 2
        sizes.append(stream[at + 1])
        right.append(stream[at + 3])
        at = inner
    assert at == len(stream)
    assert list(header[:4]) == [20240522, 1, 10042, max(sizes)]
    assert np.bincount(right).tolist() == [2515, 2485, 2584, 2458]


@pytest.mark.parametrize("text, args, named", [
    ("", [], ["in", "no examples"]),
    ('{"ctx": "a", "label": 0, "endings": ["a", "b", "c"]}', [], ["in", "line 1"]),
    ('{"ctx": "a", "label": 4, "endings": ["a", "b", "c", "d"]}', [], ["in", "line 1"]),
    ('{"ctx": "a", "label": -1, "endings": ["a", "b", "c", "d"]}', [], ["in", "line 1"]),
    ('{"ctx": "a", "label": "", "endings": ["a", "b", "c", "d"]}', [], ["in", "line 1"]),
    ('{"ctx": "", "label": 1, "endings": ["a", "b", "c", "d"]}', [], ["in", "line 1"]),
    ('{"ctx": "a", "label": 1, "endings": ["a", "b", "c", 1]}', [], ["in", "line 1"]),
    ('{"ctx": 1, "label": 1, "endings": ["a", "b", "c", "d"]}', [], ["in", "line 1"]),
    ('{"ctx": "a", "label": 1, "endings": 5}', [], ["in", "line 1"]),
    ('{"ctx": "a", "label": 1, "endings": ["a", "b", "c", "d"]}', ["--activity"], ["in", "line 1"]),
    ('{"ctx": "a", "label": 1', [], ["in", "line 1"]),
    ("x: a\nb\nc\nd\ne\nf\n", [], ["in", "line 6", "six lines"]),
    ("x: a\n1\nc\nd\ne\nf\n\nx: a\n1\nc\n", [], ["in", "3 of its six lines"]),
    ("x: a\n1\n" + "c" * 70000 + "\nd\ne\nf\n", [], ["in", "line 6", "65535"]),
    ("x: a\n1\n" + "c" * 40000 + "\nd\ne\nf\n", [], ["example 0", "65535"]),
    ("x: a\n1\nc\nd\ne\nf\n", ["--limit", "0"], ["--limit", "'0'"]),
    ("x: a\n1\nc\nd\ne\nf\n", ["--out", "in"], ["--out in", "cannot write"]),
])
def test_hellaswag_bad_input(tmp_path, text, args, named):
    (tmp_path / "in").write_text(text)
    one_line("hellaswag.py",
             run("hellaswag.py", "--file", "in", "--out", "out", *BYTES, *args, cwd=tmp_path),
             *named)
    assert not (tmp_path / "out").exists()
