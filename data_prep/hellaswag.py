#!/usr/bin/env python3
"""
HellaSwag's validation set (10,042 examples) to hellaswag_val.bin, the file for
the trainer's --hellaswag.

Reads HellaSwag's own JSON lines, or six lines for each example: context, index
of the right ending, four endings. Unpacks .gz, .bz2 and .xz on the way. In the
six-line format a context begins with an activity, as in "Clean and jerk: A
lady walks to a barbell."; in JSON that is a field of its own. Both ways the
activity is left out, unless --activity.

The .bin, as llm.c has it, is a header of 256 int32, [0] = 20240522, [1] = 1,
[2] = examples, [3] = bytes of the longest one; then for each example, as
uint16: 65535; the example's bytes, from the 65535 on; its index; the index of
the right ending; 4; the number of the context's tokens, and the tokens; for
each ending the number of its tokens, and the tokens. An ending is tokenised
with a space before it.

example: hellaswag.py
         hellaswag.py --file hellaswag_val_full.txt.bz2 --limit 1000
"""

import itertools
import json
import os
import shlex

import numpy as np
from common import (Parser, Problem, add_tokenizer_options, check_file, download, header,
                    load_tokenizer, read_lines, run, whole_file, whole_number, writing)

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
MAGIC, VERSION = 20240522, 1
EXAMPLE_START = 65535
LARGEST = 65535  # uint16: number of examples, bytes of an example


def read_json(line, activity):
    """An example (context, index of the right ending, endings) from a line of JSON."""
    fields = json.loads(line)
    context = fields["ctx"]
    if activity:
        context = fields["activity_label"] + ": " + context
    return context, int(fields["label"]), fields["endings"]


def read_six(lines, activity):
    """
    An example from six lines. (The file that goes round in this format lacks WikiHow's marks
    [title] and [step], which the JSON has.)
    """
    context, label, *endings = lines
    before, colon, after = context.partition(": ")
    # an activity has no full stop, so "He sat. She said: go" begins with none
    if colon and not activity and "." not in before:
        context = after
    return context, int(label), endings


def read_examples(path, activity):
    """Yields the examples of a file of either format."""
    lines = []  # of a six-line example, so far
    for number, line in read_lines(path):
        if not lines and not line.strip():
            continue
        try:
            if not lines and line.startswith("{"):
                context, label, endings = read_json(line, activity)
            else:
                lines.append(line)
                if len(lines) < 6:
                    continue
                (context, label, endings), lines = read_six(lines, activity), []
            good = bool(context) and 0 <= label < 4 and len(endings) == 4
            size = sum(map(len, [context, *endings]))
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise Problem(f"{path}: line {number}: not an example of HellaSwag: neither JSON with "
                          "ctx, label and four endings, nor the last of six lines: context, "
                          "index of the right ending (0 to 3), four endings")
        if size > LARGEST:
            raise Problem(f"{path}: line {number}: an example of {size} characters, "
                          f"more than {LARGEST}, does not fit the format")
        yield context, label, endings
    if lines:
        raise Problem(f"{path}: ends inside an example, after {len(lines)} of its six lines")


def encode_example(index, label, context, endings):
    """An example's part of the file; context and endings are tokens."""
    parts = [[EXAMPLE_START, 0, index, label, len(endings)]]
    for tokens in [context, *endings]:
        parts += [[len(tokens)], tokens]
    stream = np.concatenate(parts).astype("<u4")
    if stream.size * 2 > LARGEST:
        raise Problem(f"example {index}: {stream.size * 2} bytes, more than {LARGEST}, "
                      "do not fit the format")
    stream[1] = stream.size * 2
    return stream.astype("<u2").tobytes()


def main():
    parser = Parser(__doc__)
    parser.add_argument("--file", metavar="FILE",
                        help="the examples, if they are on this machine (default: download them)")
    parser.add_argument("--url", default=URL, help="where to download them (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", default="data/hellaswag",
                        help="folder for hellaswag_val.bin and the download (default: %(default)s)")
    parser.add_argument("--limit", metavar="N", type=whole_number(1, LARGEST), default=LARGEST,
                        help="take the first N examples only (default: all)")
    parser.add_argument("--activity", action="store_true",
                        help="begin each context with its activity (default: the context alone, "
                        "as llm.c does)")
    add_tokenizer_options(parser)
    args = parser.parse_args()

    if args.file is not None:
        check_file("--file", args.file)
    tokenizer = load_tokenizer(args)
    path = args.file
    if path is None:
        path = os.path.join(args.out, "hellaswag_val.jsonl")
        download(args.url, path)

    examples = list(itertools.islice(read_examples(path, args.activity), args.limit))
    if not examples:
        raise Problem(f"{path}: no examples in there")
    texts = []
    for context, _, endings in examples:
        texts += [context] + [" " + ending for ending in endings]
    if tokenizer.name == "bytes":
        texts = [text.encode(errors="replace") for text in texts]
    tokens = tokenizer.encode(texts)
    encoded = [encode_example(i, label, tokens[5 * i], tokens[5 * i + 1:5 * i + 5])
               for i, (_, label, _) in enumerate(examples)]

    out = os.path.join(args.out, "hellaswag_val.bin")
    with writing(args.out):
        os.makedirs(args.out, exist_ok=True)
        with whole_file(out) as file:
            file.write(header(MAGIC, VERSION, len(encoded), max(map(len, encoded))))
            file.writelines(encoded)
    print(f"wrote {out}: {len(encoded):,} examples, {tokenizer.name}")
    print("evaluate on it while training:\n"
          f"  ./train_gpt2_compact --hellaswag {shlex.quote(out)} ...")


if __name__ == "__main__":
    run(main)
