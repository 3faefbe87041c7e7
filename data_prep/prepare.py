#!/usr/bin/env python3
"""
Turns text into token shards for the trainer: DIR/train_000000.bin ...,
DIR/val_000000.bin ... and DIR/tokenizer.bin.

Each file is a document; with --tokenizer gpt2 it begins with end-of-text.
Files packed as .gz, .bz2 or .xz are unpacked on the way; other archives are
refused. Folders are walked in sorted order, linked ones too; hidden files and
folders are left out, and so is, named, what is not text.

The last part of all the text, measured in bytes, is validation. Everything is
streamed, so inputs may be larger than memory; each is read twice, the first
time to measure it.

With --type uint16 or uint32 the inputs are files of token ids without a header, as nanoGPT writes
them. Those whose names begin with val are validation; where there are none, the last part is.
nanoGPT's meta.pkl beside them says which characters the ids stand for, else --tokenizer does.

example: prepare.py books/ notes.txt.gz --out data/books
         prepare.py --type uint16 openwebtext/train.bin openwebtext/val.bin --out data/owt
"""

import argparse
import codecs
import os
import pickle
import sys
from types import SimpleNamespace

from common import (BLOCK, Parser, Problem, ShardWriter, add_shard_option, add_tokenizer_options,
                    check_text, encode_all, load_tokenizer, not_text, open_input, read_blocks,
                    reading, run, some)
import numpy as np
from tqdm import tqdm


def find_files(inputs):
    """The files that the inputs name, or hold: pairs (path, whether it was found in a folder)."""
    seen = set()  # folders: links can lead to one again, and round in a circle
    for path in inputs:
        if not os.path.isdir(path):
            check_regular(path)
            yield path, False
            continue
        for folder, folders, names in os.walk(path, onerror=cannot_walk, followlinks=True):
            if os.path.realpath(folder) in seen:
                print(f"skipped, read already under another name: {folder}", file=sys.stderr)
                folders.clear()
                continue
            seen.add(os.path.realpath(folder))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith("."):
                    check_regular(os.path.join(folder, name))
                    yield os.path.join(folder, name), True


def cannot_walk(error):
    raise Problem(f"{error.filename}: cannot read the folder: {error.strerror}; give one that you "
                  "may read")


def check_regular(path):
    if os.path.isfile(path):
        return
    if os.path.exists(path):
        raise Problem(f"{path}: neither a folder nor a regular file; a pipe, say, cannot be read "
                      "twice: give a file")
    raise Problem(f"{path}: " + ("is a link to nothing; remove or mend it" if os.path.islink(path)
                                 else "there is no such file or folder"))


def examine(path, bar):
    """Reads a file: its bytes (unpacked), whether there is a NUL, whether it is valid UTF-8."""
    size, has_nul, is_utf8 = 0, False, True
    decoder = codecs.getincrementaldecoder("utf-8")()
    with reading(path), open_input(path) as file:
        for block in read_blocks(path, file):
            size += len(block)
            bar.update(len(block))
            has_nul = has_nul or b"\0" in block
            if is_utf8:
                try:
                    decoder.decode(block)
                except UnicodeDecodeError:
                    is_utf8 = False
    unfinished_character = decoder.getstate()[0]
    return size, has_nul, is_utf8 and not unfinished_character


def find_documents(files, tokenizer):
    """
    The documents among the files: pairs (path, size in bytes). Prints what is left out and what is
    damaged.
    """
    documents, skipped, not_utf8 = [], {}, []
    with tqdm(unit="B", unit_scale=True, desc="measuring", leave=False, disable=None) as bar:
        for path, in_folder in files:
            kind = not_text(path)
            if kind and not in_folder:
                check_text(path)
            size, has_nul, is_utf8 = examine(path, bar)
            if kind or has_nul and in_folder:
                skipped.setdefault(kind or "NUL bytes", []).append(path)
                continue
            if has_nul and path.endswith(".bin"):
                raise Problem(f"{path}: has NUL bytes, as tokens without a header have; give the "
                              "text itself, or --type uint16, or uint32, for such tokens")
            if has_nul and tokenizer.name != "bytes":
                raise Problem(f"{path}: has a NUL byte, so it is not UTF-8 text; "
                              "unpack or convert it, or use --tokenizer bytes")
            if not is_utf8 and tokenizer.name != "bytes":
                not_utf8.append(path)
            if size:
                documents.append((path, size))
    for kind, paths in skipped.items():
        print(f"skipped, not text ({kind}): {some(paths)}", file=sys.stderr)
    if not_utf8:
        print(f"not UTF-8 throughout, bad bytes become U+FFFD: {some(not_utf8)}", file=sys.stderr)
    return documents


def split_documents(documents, val_fraction):
    """
    Triples (path, bytes for training, bytes for validation): of all bytes, the last val_fraction is
    for validation.
    """
    total = sum(size for _, size in documents)
    val = round(total * val_fraction)
    # how far from there a split is as good; it leaves something of either part
    reach = min(BLOCK, val // 2, (total - val) // 2)
    train_left, parts = total - val, []
    for path, size in documents:
        train = max(0, min(size, train_left))
        if 0 < train < size:
            train = place_to_split(path, size, train, reach)
        train_left -= size
        parts.append((path, train, size - train))
    if val_fraction and not 0 < sum(part[1] for part in parts) < total:
        raise Problem(f"--val-fraction {val_fraction}: {total} bytes of text are too few to split; "
                      "give more, or --val-fraction 0")
    return parts


def place_to_split(path, size, place, reach):
    """
    Of a document the start of a line nearest to byte `place`, so that validation begins with a
    whole line; where none is within `reach` bytes, the next character. The document's begin and end
    count as starts of a line.
    """
    first = max(0, place - reach - 1)
    with reading(path), open_input(path) as file:
        for _ in read_blocks(path, file, first):
            pass  # not seek, since the file may be packed
        near = b"".join(read_blocks(path, file, place + reach + 4 - first))
    starts = [0, size] + [first + i + 1 for i, byte in enumerate(near) if byte == ord("\n")]
    nearest = min(starts, key=lambda start: abs(start - place))
    if abs(nearest - place) <= reach:
        return nearest
    # at most three bytes continue a character; they are 10xxxxxx in binary
    for byte in near[place - first:place - first + 3]:
        if byte >> 6 != 0b10:
            break
        place += 1
    return place


def read_pieces(parts, tokenizer, bar):
    """
    All the text in pieces that the tokenizer takes: pairs ((split, whether a document begins),
    piece).
    """
    for path, train, val in parts:
        begins = True
        with reading(path), open_input(path) as file:
            for split, size in ("train", train), ("val", val):
                blocks = track(path, read_blocks(path, file, size), size, bar)
                for piece in tokenizer.pieces(blocks):
                    yield (split, begins), piece
                    begins = False


def track(path, blocks, size, bar):
    """Passes blocks on, moves the bar along, and checks that they come to `size` bytes."""
    for block in blocks:
        size -= len(block)
        bar.update(len(block))
        yield block
    if size:
        raise Problem(f"{path}: became shorter while it was read; run this again")


def prepare(inputs, out, tokenizer, val_fraction, shard_tokens):
    """
    Writes the token shards of all text in `inputs`, files and folders, to the folder `out`. Returns
    the finished ShardWriter.
    """
    files = list(find_files(inputs))
    with ShardWriter(out, tokenizer, shard_tokens) as shards:
        documents = find_documents(files, tokenizer)
        if not documents:
            raise Problem(f"{some(inputs)}: no text in there; give text files, "
                          "or folders that hold some")
        parts = split_documents(documents, val_fraction)
        total = sum(size for _, size in documents)
        with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=None) as bar:
            pieces = read_pieces(parts, tokenizer, bar)
            for (split, begins), tokens in encode_all(tokenizer, pieces):
                if begins:
                    shards.write(split, tokenizer.document_start)
                shards.write(split, tokens)
    return shards


# ----------------------------------------------------------------------------
# token ids without a header


class Plain(pickle.Unpickler):
    """Reads a pickle of numbers, strings and dicts; any other object in it could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def nanogpt_characters(path):
    """The tokenizer that nanoGPT's meta.pkl holds: each character of its text is a token."""
    try:
        with reading(path), open(path, "rb") as file:
            itos = Plain(file).load()["itos"]
        table = [itos[token].encode() for token in range(len(itos))]
    except Problem:
        raise
    except Exception as error:  # of pickle, or of what stands in it
        raise Problem(f"{path}: is no meta.pkl of nanoGPT ({error}); remove it, or give the text "
                      "itself") from None
    end_of_text = table.index(b"\n") if b"\n" in table else 0
    return SimpleNamespace(name="characters", vocabulary=len(table), end_of_text=end_of_text,
                           table=table)


def read_tokens(path, kind):
    """The ids of a file, in arrays of at most a block."""
    with reading(path), open(path, "rb") as file:
        for block in read_blocks(path, file):
            yield np.frombuffer(block, kind)


def count_tokens(path, kind, tokenizer):
    """How many ids a file holds; all must be of the tokenizer."""
    if not os.path.isfile(path):
        raise Problem(f"{path}: is no file; --type takes files of token ids")
    check_text(path)  # nor is it tokens, where it is packed or has a header
    size, width = os.path.getsize(path), np.dtype(kind).itemsize
    if size == 0 or size % width:
        raise Problem(f"{path}: has {size:,} bytes, which are no ids of {width} bytes each")
    greatest = max(int(tokens.max()) for tokens in read_tokens(path, kind))
    if greatest >= tokenizer.vocabulary:
        raise Problem(f"{path}: holds the id {greatest:,}, and the vocabulary, {tokenizer.name}, "
                      f"has {tokenizer.vocabulary:,}; is --type right, and --tokenizer?")
    return size // width


def prepare_tokens(args):
    """Writes the token shards of files of ids without a header."""
    kind = {"uint16": "<u2", "uint32": "<u4"}[args.type]
    meta = os.path.join(os.path.dirname(args.inputs[0]), "meta.pkl")
    tokenizer = nanogpt_characters(meta) if os.path.exists(meta) else load_tokenizer(args)
    val = [path for path in args.inputs if os.path.basename(path).startswith("val")]
    train = [path for path in args.inputs if path not in val]
    counts = {path: count_tokens(path, kind, tokenizer) for path in args.inputs}
    total = sum(counts[path] for path in train)
    fraction = 0 if val else args.val_fraction
    left = total - round(total * fraction)
    if fraction and not 0 < left < total:
        raise Problem(f"--val-fraction {fraction}: {total} tokens are too few to split; give more, "
                      "or --val-fraction 0")
    with ShardWriter(args.out, tokenizer, args.shard_tokens) as shards:
        for path in train:
            for tokens in read_tokens(path, kind):
                shards.write("train", tokens[:left])
                shards.write("val", tokens[left:])
                left -= min(left, len(tokens))
        for path in val:
            for tokens in read_tokens(path, kind):
                shards.write("val", tokens)
    return shards

# ----------------------------------------------------------------------------


def fraction(text):
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up to, "
                                         "not including, 1, such as 0.1")
    return value


def main():
    parser = Parser(__doc__)
    parser.add_argument("inputs", metavar="INPUT", nargs="+",
                        help="text files and folders of text files")
    parser.add_argument("--out", metavar="DIR", required=True,
                        help="folder for the shards; made if need be, "
                        "shards of an earlier run in it are replaced")
    parser.add_argument("--type", choices=["text", "uint16", "uint32"], default="text",
                        help="of the inputs: text, or token ids without a header "
                        "(default: %(default)s)")
    add_tokenizer_options(parser)
    parser.add_argument("--val-fraction", metavar="F", type=fraction, default=0.1,
                        help="part of it, its end, kept for validation; 0: none "
                        "(default: %(default)s)")
    add_shard_option(parser)
    args = parser.parse_args()
    if args.type == "text":
        shards = prepare(args.inputs, args.out, load_tokenizer(args), args.val_fraction,
                         args.shard_tokens)
    else:
        shards = prepare_tokens(args)
    shards.report()


if __name__ == "__main__":
    run(main)
