"""
What the data tools share: one-line errors, opening inputs, the two tokenizers,
token shards, downloads.

All files are little-endian; every header is 256 int32, unused ones zero.
tokens     [0] = 20240520, [1] = 1, [2] = token count, [3] = vocabulary size;
           then a uint16 per token.
tokenizer  [0] = 20240328, [1] = 2, [2] = vocabulary size, [3] = end-of-text id;
           then per token a length byte and its bytes.
"""

import argparse
import bz2
import codecs
import contextlib
import fcntl
import glob
import gzip
import http.client
import io
import json
import lzma
import os
import re
import shlex
import signal
import sys
import urllib.request
import zlib
from types import SimpleNamespace

PROGRAM = os.path.basename(sys.argv[0])
REQUIREMENTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "requirements.txt")


def missing_package(name):
    requirements = shlex.quote(os.path.relpath(REQUIREMENTS))
    return f"the Python package {name} is missing: pip install -r {requirements}"


try:
    import numpy as np
    from tqdm import tqdm
except ImportError as missing:
    print(f"{PROGRAM}: {missing_package(missing.name)}", file=sys.stderr)
    sys.exit(2)

TOKENS_MAGIC, TOKENS_VERSION = 20240520, 1
TOKENIZER_MAGIC, TOKENIZER_VERSION = 20240328, 2
MAX_SHARD_TOKENS = 2**31 - 1  # the header's token count is an int32

BLOCK = 1 << 16  # read, and given to the tokenizer, at once: bytes or characters
BATCH = 1 << 21  # tokenised at once, in blocks, on all cores

# ----------------------------------------------------------------------------
# command line and errors


class Problem(Exception):
    """Something the user can mend. Its text is the one line the user gets to see."""


class Parser(argparse.ArgumentParser):
    def __init__(self, description):
        super().__init__(description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):  # argparse would print the usage as well
        raise Problem(f"{message} (see --help)")


def run(main):
    """
    Runs a tool's main. Exit status: 0; 2 after a problem, which is one line on stderr; 130 after
    Ctrl-C; 143 after SIGTERM.
    """
    # as an exception, SIGTERM runs the code that removes unfinished files, as Ctrl-C does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # if one of descriptors 0 to 2 is closed, the next file that is opened would get it
    while (unused := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(unused)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w")
                              for stream in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    try:
        main()
    except Problem as problem:
        print(f"{PROGRAM}: {problem}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{PROGRAM}: {error.filename or 'error'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; unfinished files were removed", file=sys.stderr)
        sys.exit(130)


def whole_number(low, high):
    """An argparse type: a whole number from low to high; 1e8 is one too."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = 0.5
        if not value.is_integer() or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(value)
    return parse


def add_tokenizer_options(parser):
    parser.add_argument("--tokenizer", choices=["gpt2", "bytes"], default="gpt2",
                        help="gpt2: GPT-2's 50257 tokens; bytes: each byte is a token, 256 in all "
                        "(default: %(default)s)")
    parser.add_argument("--vocab-bpe", metavar="FILE",
                        help="GPT-2's vocab.bpe on this machine "
                        "(default: tiktoken downloads it, once)")
    parser.add_argument("--encoder-json", metavar="FILE",
                        help="GPT-2's encoder.json on this machine, with --vocab-bpe")


def add_shard_option(parser):
    parser.add_argument("--shard-tokens", metavar="N", type=whole_number(1, MAX_SHARD_TOKENS),
                        default=10**8,
                        help="tokens in a shard; the last one has the rest (default: %(default)s)")


def some(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

# ----------------------------------------------------------------------------
# reading


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# first bytes of files that are packed like that
STARTS = {b"\x1f\x8b\x08": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz"}
NOT_TEXT = {b"PK\3\4": "a zip archive; unpack it first",
            b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it first",
            b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
            b"\x04\x22\x4d\x18": "packed by lz4; unpack it first",
            b"\xff\xfe": "text in UTF-16; convert it to UTF-8 first",
            b"\xfe\xff": "text in UTF-16; convert it to UTF-8 first",
            b"%PDF-": "a PDF; convert it to text first",
            TOKENS_MAGIC.to_bytes(4, "little"): "tokens, which the trainer takes as they are"}


def start_of(path):
    with open(path, "rb") as file:
        return file.read(16)


def what_starts(table, start):
    return next((what for begin, what in table.items() if start.startswith(begin)), None)


def open_input(path):
    """Opens a file for reading bytes, unpacked on the way if its ending or its first bytes say .gz,
    .bz2 or .xz."""
    ending, start = os.path.splitext(path)[1].lower(), start_of(path)
    # a text may well begin with BZh
    if what_starts(STARTS, start) == ".bz2" and start[4:10] != b"1AY&SY":
        start = b""
    return OPENERS.get(ending if ending in OPENERS else what_starts(STARTS, start),
                       open)(path, "rb")


def not_text(path):
    """What a file is by its first bytes, if that is something else than plain text, and what to do
    about it."""
    with reading(path):
        return what_starts(NOT_TEXT, start_of(path))


def check_text(path):
    if not_text(path):
        raise Problem(f"{path}: is not plain text but {not_text(path)}")


@contextlib.contextmanager
def reading(path):
    """Turns what can go wrong while `path` is read into one line that names it."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise Problem(f"{path}: broken or not what its ending says: {error}") from None
    except OSError as error:
        raise Problem(f"{path}: cannot read: {error.strerror or error}") from None


def read_blocks(path, file, count=float("inf")):
    """Yields the next `count` bytes of `file`, or what there is, in blocks."""
    while count > 0:
        with reading(path):
            block = file.read(int(min(BLOCK, count)))
        if not block:
            return
        count -= len(block)
        yield block


def read_lines(path):
    """Yields (number, line) of a text file, counted from 1, without line ends, \\n or \\r\\n, and
    the byte order mark at its start."""
    check_text(path)
    with reading(path), open_input(path) as file:
        for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace",
                                                       newline="\n"), 1):
            yield number, line.rstrip("\r\n")


def read_log(folder):
    """
    A run's log.jsonl: its header, and the records after it. Of several headers, one for each start,
    it is the last; what a start did again stands for what was done before. Lines end at \\n alone,
    and one without its end is being written, or was cut off.
    """
    path = os.path.join(folder, "log.jsonl")
    try:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            lines = file.read().split("\n")[:-1]
    except OSError as error:
        raise Problem(f"{path}: cannot be read: {error.strerror}; a run's --out folder is "
                      "wanted") from None
    header, starts, records = None, False, []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if "options" in record:
                record["plan"]  # is there too
                header, starts = record, True
                continue
            if starts:
                records = [before for before in records if before["step"] < record["step"]]
                starts = False
            records.append(record)
        except (ValueError, KeyError, TypeError):
            raise Problem(f"{path}: line {number} is no record of the trainer's: not a log of it, "
                          "or damaged") from None
    if header is None:
        raise Problem(f"{path}: is not a log of the trainer, which begins with the run's options")
    return header, records


def check_file(option, path):
    if not os.path.isfile(path):
        problem = "is not a regular file" if os.path.exists(path) else "there is no such file"
        raise Problem(f"{option} {path}: {problem}; give the name of a file")

# ----------------------------------------------------------------------------
# writing


def lock(file, what):
    """Keeps a file, or a folder, for this program as long as it is open; however the program ends,
    it is free again."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Problem(f"{what}: another program is writing there") from None


@contextlib.contextmanager
def holding(folder):
    """Makes a folder for this program to write into, and no other one meanwhile."""
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, folder)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_file(path):
    """Opens a file that appears under its name when it is complete, or not at all."""
    temporary = path + ".tmp"
    with open(temporary, "ab") as file:  # emptied when it is known to be no other program's
        lock(file, path)
        if not os.path.exists(temporary) or not os.path.samestat(os.fstat(file.fileno()),
                                                                 os.stat(temporary)):
            raise Problem(f"{path}: another program has just written it")  # what is open is its
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.remove(temporary)
            raise


@contextlib.contextmanager
def writing(folder):
    """Turns what can go wrong while `folder` is written to into one line that names it."""
    try:
        yield
    except OSError as error:
        raise Problem(f"--out {folder}: cannot write there: {error.strerror or error}; "
                      "give a folder that you may write to, with enough space") from None


def header(*values):
    """The bytes of a header that begins with `values`."""
    full = np.zeros(256, dtype="<i4")
    full[:len(values)] = values
    return full.tobytes()


def write_tokenizer(path, tokenizer):
    with whole_file(path) as file:
        file.write(header(TOKENIZER_MAGIC, TOKENIZER_VERSION, tokenizer.vocabulary,
                          tokenizer.end_of_text))
        for token in tokenizer.table:
            file.write(bytes([len(token)]) + token)


class ShardWriter:
    """
    Writes train_000000.bin, train_000001.bin ..., val_000000.bin ... and tokenizer.bin to a folder.

    A shard is written under a temporary name. Once complete it gets its token count and its own
    name, so it is whole or absent. A run removes all shards of an earlier run, since the trainer
    takes whatever is named train_*.bin; they stay until the first new one is complete.
    """

    def __init__(self, folder, tokenizer, shard_tokens):
        self.folder, self.tokenizer, self.shard_tokens = folder, tokenizer, shard_tokens
        self.held = contextlib.ExitStack()   # the folder, from now on
        self.open = {}                       # split -> the file being written
        self.count = {}                      # split -> tokens in it
        self.done = {"train": [], "val": []}  # split -> token counts of the complete shards
        with writing(folder):
            self.held.enter_context(holding(folder))
            for name in os.listdir(folder):
                if re.fullmatch(r"((train|val)_\d{6,}|tokenizer)\.bin\.tmp", name):
                    os.remove(os.path.join(folder, name))  # of a run that was killed
            with open(os.path.join(folder, "train_000000.bin.tmp"), "wb"):
                pass  # fails now, if it has to fail, and not after an hour
            os.remove(os.path.join(folder, "train_000000.bin.tmp"))

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        try:
            if error is None:
                with writing(self.folder):
                    for split in list(self.open):
                        self.complete(split)
        finally:
            for file in self.open.values():  # not complete, after an error
                with contextlib.suppress(OSError):
                    file.close()
                with contextlib.suppress(OSError):
                    os.remove(file.name)
            self.held.close()

    def path(self, split, number):
        return os.path.join(self.folder, f"{split}_{number:06d}.bin")

    def write(self, split, tokens):
        """Appends an array of uint16 tokens to a split, through as many shards as it takes."""
        with writing(self.folder):
            while len(tokens):
                if split not in self.open:
                    self.open[split] = open(self.path(split, len(self.done[split])) + ".tmp", "wb")
                    self.open[split].write(header())
                    self.count[split] = 0
                fitting = tokens[:self.shard_tokens - self.count[split]]
                tokens = tokens[len(fitting):]
                self.open[split].write(fitting.astype("<u2").tobytes())
                self.count[split] += len(fitting)
                if self.count[split] == self.shard_tokens:
                    self.complete(split)

    def complete(self, split):
        file, count = self.open[split], self.count[split]
        file.seek(0)
        file.write(header(TOKENS_MAGIC, TOKENS_VERSION, count, self.tokenizer.vocabulary))
        file.flush()
        os.fsync(file.fileno())
        file.close()
        if not self.done["train"] and not self.done["val"]:
            self.remove_earlier()
            write_tokenizer(os.path.join(self.folder, "tokenizer.bin"), self.tokenizer)
        os.replace(file.name, self.path(split, len(self.done[split])))
        del self.open[split]
        self.done[split].append(count)

    def remove_earlier(self):
        being_written = {os.path.basename(file.name) for file in self.open.values()}
        shard = re.compile(r"(train|val)_\d{6,}\.bin(\.tmp)?")
        earlier = [name for name in os.listdir(self.folder)
                   if shard.fullmatch(name) and name not in being_written]
        for name in earlier:
            os.remove(os.path.join(self.folder, name))
        if earlier:
            print(f"removed from {self.folder}, shards of an earlier run: {some(sorted(earlier))}")

    def report(self):
        """Prints what was written and how to train on it."""
        print(f"wrote to {self.folder}:")
        for split, counts in self.done.items():
            if counts:
                names = os.path.basename(self.path(split, 0))
                if len(counts) > 1:
                    names += " to " + os.path.basename(self.path(split, len(counts) - 1))
                print(f"  {names}: {sum(counts):,} tokens")
        print(f"  tokenizer.bin: {self.tokenizer.vocabulary:,} tokens, {self.tokenizer.name}")
        command = "./train_gpt2_compact"
        for split, counts in self.done.items():
            if counts:
                command += f" --{split} " + shlex.quote(os.path.join(glob.escape(self.folder),
                                                                     f"{split}_*.bin"))
        print(f"train on it:\n  {command}")

# ----------------------------------------------------------------------------
# tokenizers. Each has
#   name, vocabulary (its size), end_of_text (an id),
#   document_start    the tokens that each document begins with,
#   table             the bytes of each token,
#   encode            list of texts -> list of uint16 arrays,
#   pieces            blocks of a document's bytes -> texts that encode takes

# GPT-2's rule for cutting text into words, before byte pairs are merged within each.
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


def load_tokenizer(args):
    """The tokenizer that the options of add_tokenizer_options ask for."""
    local = [("--vocab-bpe", args.vocab_bpe), ("--encoder-json", args.encoder_json)]
    if args.tokenizer == "bytes":
        for option, path in local:
            if path is not None:
                raise Problem(f"{option} belongs to --tokenizer gpt2; "
                              "leave it out with --tokenizer bytes")
        return byte_tokenizer()
    for option, path in local:
        if path is None and (args.vocab_bpe or args.encoder_json):
            raise Problem(f"{option} FILE is missing: --vocab-bpe and --encoder-json go together")
        if path is not None:
            check_file(option, path)
    return gpt2_tokenizer(args.vocab_bpe, args.encoder_json)


def byte_tokenizer():
    """
    Each byte is a token. Nothing marks where a document begins; the newline, 10, stands in as the
    end-of-text id.
    """
    return SimpleNamespace(
        name="bytes", vocabulary=256, end_of_text=10, document_start=np.zeros(0, dtype=np.uint16),
        table=[bytes([byte]) for byte in range(256)],
        encode=lambda texts: [np.frombuffer(text, np.uint8).astype(np.uint16) for text in texts],
        pieces=lambda blocks: blocks)


def gpt2_tokenizer(vocab_bpe=None, encoder_json=None):
    """
    GPT-2's byte pairs, by tiktoken. Each document begins with end-of-text; where a text spells that
    token out, it is plain text.
    """
    try:
        import tiktoken
        import tiktoken.load
    except ImportError:
        raise Problem(missing_package("tiktoken") + "; or use --tokenizer bytes") from None
    if vocab_bpe is None:
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # of requests, mostly
            raise Problem("cannot download GPT-2's vocabulary, "
                          f"{GPT2_FILES}vocab.bpe and {GPT2_FILES}encoder.json "
                          f"({type(error).__name__}); get both by hand and give --vocab-bpe FILE "
                          "--encoder-json FILE, or use --tokenizer bytes, which needs "
                          "neither") from None
    else:
        # else tiktoken would keep a copy by the file's path, and never read the file again
        os.environ["TIKTOKEN_CACHE_DIR"] = ""
        try:
            ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(vocab_bpe, encoder_json)
            if len(ranks) != 50256:
                raise ValueError
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
            raise Problem(f"--vocab-bpe {vocab_bpe}, --encoder-json {encoder_json}: "
                          "not the two files of GPT-2's vocabulary; "
                          f"they are {GPT2_FILES}vocab.bpe and {GPT2_FILES}encoder.json") from None
        encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_WORDS, mergeable_ranks=ranks,
                                     special_tokens={"<|endoftext|>": 50256})

    def encode(texts):
        batch = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        return [np.array(tokens, dtype=np.uint16) for tokens in batch]

    return SimpleNamespace(
        name="gpt2", vocabulary=50257, end_of_text=50256,
        document_start=np.array([50256], dtype=np.uint16),
        table=[encoding.decode_single_token_bytes(token) for token in range(50257)],
        encode=encode, pieces=lambda blocks: cut_text(decode(blocks)))


def read_tokenizer(path):
    """Vocabulary size, end_of_text id and table of a tokenizer.bin."""
    with reading(path), open(path, "rb") as file:
        data = file.read()
    fields = np.frombuffer(data[:16].ljust(16, b"\0"), "<i4").tolist()
    table, at = [], 1024
    while at < len(data) and len(table) < fields[2]:
        table.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    end_of_text = 50256 if fields[1] == 1 else fields[3]  # version 1 is GPT-2's, and does not say
    if (fields[0] != TOKENIZER_MAGIC or fields[1] not in (1, 2) or len(table) != fields[2]
            or at != len(data) or not 0 <= end_of_text < len(table)):
        raise Problem(f"{path}: is no tokenizer.bin, or is damaged")
    return SimpleNamespace(vocabulary=len(table), end_of_text=end_of_text, table=table)


def decode(blocks):
    """Blocks of UTF-8 to text. A character may lie across two blocks; bytes that are not UTF-8
    become U+FFFD, and a byte order mark at the start nothing."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
    for block in blocks:
        text = decoder.decode(block)
        if text:
            yield text
    text = decoder.decode(b"", final=True)  # U+FFFD for a character cut short by the end
    if text:
        yield text


# The last place in a text where a word ends and whitespace follows. GPT-2's words end there,
# whatever stands before and after, so a text cut there has the tokens of the whole.
LAST_WORD_END = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


def cut_text(texts):
    """
    Cuts a document, given in texts of at most a block, anew: into pieces of at most two blocks that
    together have the tokens of the whole.

    Only a word or a stretch of whitespace longer than a block is cut inside, and a token there may
    differ. That is as well: tiktoken is slow on such words and gives up on such whitespace.
    """
    rest = ""
    for text in texts:
        if rest:
            end = LAST_WORD_END.match(rest)
            end = end.end() if end else len(rest)
            yield rest[:end]
            rest = rest[end:]
        rest += text
    if rest:
        yield rest


def encode_all(tokenizer, pieces):
    """Pairs (label, text) to pairs (label, tokens), in the same order, one batch at a time."""
    labels, texts, size = [], [], 0
    for label, text in pieces:
        labels.append(label)
        texts.append(text)
        size += len(text) + 100  # what an empty one takes
        if size >= BATCH:
            yield from zip(labels, tokenizer.encode(texts))
            labels, texts, size = [], [], 0
    yield from zip(labels, tokenizer.encode(texts))

# ----------------------------------------------------------------------------
# downloads


def download(url, path):
    """Downloads a file, unless it is there from an earlier run."""
    if os.path.exists(path):
        print(f"{path} is there from an earlier run; not downloaded again")
        return

    def failed(reason):
        return Problem(f"cannot download {url}: {reason}; "
                       "get it by hand and give it with --file FILE")

    try:
        response = urllib.request.urlopen(url, timeout=30)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise failed(getattr(error, "reason", error)) from None
    size = int(response.headers.get("Content-Length") or 0)
    folder = os.path.dirname(path)
    with response, writing(folder):
        os.makedirs(folder, exist_ok=True)
        with whole_file(path) as file, tqdm(total=size or None, unit="B", unit_scale=True,
                                            desc="downloading", disable=None) as bar:
            while True:
                try:
                    block = response.read(BLOCK)
                except (OSError, http.client.HTTPException) as error:
                    raise failed(error) from None
                if not block:
                    break
                file.write(block)
                bar.update(len(block))
            if size and file.tell() != size:
                raise failed(f"the connection ended after {file.tell()} of {size} bytes")
