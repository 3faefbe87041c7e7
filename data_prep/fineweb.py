#!/usr/bin/env python3
"""
FineWeb's sample of 10 billion tokens to token shards, streamed from Hugging
Face.

The first shard is validation, val_000000.bin; the rest is training,
train_000000.bin and so on. Each document begins with GPT-2's end-of-text (with
--tokenizer bytes it ends with a newline instead). When the run is interrupted
or the connection breaks, the shards complete so far stay. The whole sample
takes some 20 GB of disk.

example: fineweb.py --max-tokens 1e9
         fineweb.py --jsonl documents.jsonl.gz --shard-tokens 1e6
"""

import json
import logging

from common import (BLOCK, Parser, Problem, ShardWriter, add_shard_option, add_tokenizer_options,
                    check_file, encode_all, load_tokenizer, missing_package, read_lines, run,
                    whole_number)
from tqdm import tqdm

DATASET, SAMPLE = "HuggingFaceFW/fineweb", "sample-10BT"


def read_jsonl(path):
    """The documents in a file of lines {"text": ...}."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError):
            text = None
        if not isinstance(text, str):
            raise Problem(f'{path}: line {number} is not a JSON object with a string "text"')
        yield text


def read_hub():
    """The documents of the sample on Hugging Face, as they come in."""
    try:
        import datasets
    except ImportError:
        raise Problem(missing_package("datasets") + '; or give a file of lines {"text": ...} '
                      'with --jsonl FILE') from None
    # it warns of each retry in several lines, across the progress bar
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    print(f"opening {DATASET}, {SAMPLE}, on Hugging Face; "
          "a bad connection is tried for half a minute", flush=True)
    try:
        for row in datasets.load_dataset(DATASET, name=SAMPLE, split="train", streaming=True):
            yield row["text"]
    except Exception as error:  # whatever datasets and the packages below it raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Problem(f"cannot download {DATASET}, {SAMPLE}: {reason}; complete shards stay; "
                      "without a connection give a file "
                      'of lines {"text": ...} with --jsonl FILE') from None


def read_pieces(documents, tokenizer):
    """The documents in pieces that the tokenizer takes: pairs (whether one begins, piece)."""
    for text in documents:
        if tokenizer.name == "bytes":
            text += "\n"
        data = text.encode(errors="replace")  # JSON can hold half a surrogate pair
        begins = True
        for piece in tokenizer.pieces(data[i:i + BLOCK] for i in range(0, len(data), BLOCK)):
            yield begins, piece
            begins = False


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out", metavar="DIR", default="data/fineweb",
                        help="folder for the shards; shards of an earlier run in it are replaced "
                        "(default: %(default)s)")
    parser.add_argument("--jsonl", metavar="FILE",
                        help='take the documents from this file of lines {"text": ...}; '
                        'may be .gz, .bz2 or .xz (default: download)')
    parser.add_argument("--max-tokens", metavar="N", type=whole_number(1, 10**13),
                        help="stop after so many tokens, validation included (default: all)")
    add_shard_option(parser)
    add_tokenizer_options(parser)
    args = parser.parse_args()

    if args.max_tokens is not None and args.max_tokens <= args.shard_tokens:
        raise Problem(f"--max-tokens {args.max_tokens} leaves nothing to train on, since the first "
                      f"shard, --shard-tokens {args.shard_tokens}, is validation; "
                      "make one larger or the other smaller")
    if args.jsonl is not None:
        check_file("--jsonl", args.jsonl)
    tokenizer = load_tokenizer(args)
    documents = read_jsonl(args.jsonl) if args.jsonl is not None else read_hub()

    written = 0
    with ShardWriter(args.out, tokenizer, args.shard_tokens) as shards, \
            tqdm(total=args.max_tokens, unit=" tokens", unit_scale=True, disable=None) as bar:

        def write(tokens):
            nonlocal written
            if args.max_tokens is not None:
                tokens = tokens[:args.max_tokens - written]
            val = max(0, args.shard_tokens - written)
            shards.write("val", tokens[:val])
            shards.write("train", tokens[val:])
            written += len(tokens)
            bar.update(len(tokens))

        for begins, tokens in encode_all(tokenizer, read_pieces(documents, tokenizer)):
            if begins:
                write(tokenizer.document_start)
            write(tokens)
            if written == args.max_tokens:
                break
        if written <= args.shard_tokens:
            raise Problem(f"{args.jsonl or DATASET}: {written} tokens in all, none left to train "
                          "on after the first shard, which is validation; give more text, "
                          f"or a --shard-tokens below {written}")
    shards.report()


if __name__ == "__main__":
    run(main)
