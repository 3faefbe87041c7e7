#!/usr/bin/env python3
"""
Labelled sentences for fine-tuning, with a loss on the answer alone; and what
came of it.

sst2.py prepare TRAIN.tsv VAL.tsv
    Reads lines `sentence<TAB>label` under the header line `sentence<TAB>label`,
    as GLUE has SST-2 (train.tsv and dev.tsv), and writes to DIR: train.bin and
    val.bin, token shards for --train and --val; answers.bin, the validation
    sentences with all answers, for --hellaswag, whose score is then the
    accuracy; tokenizer.bin.

sst2.py score RUN ...
    Of runs that trained on these (-o RUN --hellaswag DIR/answers.bin): the
    accuracy, and the memory planned beside that of full rank.

An example is a sequence of T tokens: end-of-text, the prompt "SENTENCE newline
Sentiment:", the answer " positive" or " negative", end-of-text up to T.
Accuracy compares the answers' likelihoods after the prompt.

The shards are token files of version 2: a header of 256 int32, [0] = 20240520,
[1] = 2, [2] = token count, [3] = vocabulary size, [4] = T; then an int32 per
token: the token where it is predicted, ~token (below 0) where it is only read.
The loss is the mean over the predicted ones. Sequence i begins at token i T,
and one end-of-text more stands at the end, as the last sequence's last target.

answers.bin is a HellaSwag .bin (see hellaswag.py) with as many endings an
example as there are answers, 2 to 4.

example: sst2.py prepare SST-2/train.tsv SST-2/dev.tsv --out data/sst2
         sst2.py score runs/sst2 runs/sst2_full
"""

import os
import shlex

from common import (TOKENS_MAGIC, Parser, Problem, add_tokenizer_options, header, holding,
                    load_tokenizer, read_lines, read_log, run, whole_file, whole_number,
                    write_tokenizer, writing)
import hellaswag
import numpy as np

MASKED_VERSION = 2  # of a token file with an int32 per token
COLUMNS = ["sentence", "label"]
MOST = 4096  # tokens of a sequence; an example of answers.bin, which has at most 32767, then fits
ROUND_TO = 8  # T, where it is not given

# ----------------------------------------------------------------------------
# prepare


def read_examples(path, answers):
    """The examples of a file: pairs (sentence, label)."""
    examples = []
    for number, line in read_lines(path):
        fields = line.split("\t")
        if number == 1:
            if fields != COLUMNS:
                raise Problem(f"{path}: line 1 is {line[:80]!r}, not the header sentence<TAB>label")
            continue
        if len(fields) != 2 or not fields[0].strip() or fields[1] not in map(str, range(answers)):
            raise Problem(f"{path}: line {number} is not a sentence, a tab and a label from 0 to "
                          f"{answers - 1}")
        examples.append((fields[0].strip(), int(fields[1])))
    if not examples:
        raise Problem(f"{path}: no examples in there")
    return examples


def encode(tokenizer, texts):
    """Texts to arrays of int32, whose ~token is negative."""
    if tokenizer.name == "bytes":
        texts = [text.encode(errors="replace") for text in texts]
    return [tokens.astype(np.int32) for tokens in tokenizer.encode(texts)]


def lay_out(examples, answers, T, end_of_text):
    """Examples, pairs (the prompt's tokens, label), to a shard's words, (len(examples) * T + 1)."""
    words = np.full(len(examples) * T + 1, ~end_of_text, "<i4")
    for i, (prompt, label) in enumerate(examples):
        example = np.concatenate([~prompt, answers[label]])
        words[i * T + 1:i * T + 1 + len(example)] = example
    return words


def write_shard(path, words, vocabulary, T):
    with whole_file(path) as file:
        file.write(header(TOKENS_MAGIC, MASKED_VERSION, len(words), vocabulary, T))
        file.write(words.tobytes())


def write_answers(path, examples, answers, end_of_text):
    encoded = []
    for i, (prompt, label) in enumerate(examples):
        context = np.concatenate([[end_of_text], prompt])
        encoded.append(hellaswag.encode_example(i & 65535, label, context, answers))
    with whole_file(path) as file:
        file.write(header(hellaswag.MAGIC, hellaswag.VERSION, len(encoded), max(map(len, encoded))))
        file.writelines(encoded)


def prepare(paths, out, tokenizer, question, answers, T):
    answers = encode(tokenizer, [" " + answer for answer in answers])
    end_of_text = tokenizer.end_of_text
    examples, longest = {}, 0
    for split, path in zip(("train", "val"), paths):
        sentences, labels = zip(*read_examples(path, len(answers)))
        prompts = encode(tokenizer, [f"{sentence}\n{question}" for sentence in sentences])
        examples[split] = list(zip(prompts, labels))
        for number, (prompt, label) in enumerate(examples[split], 2):  # under the header line
            longest = max(longest, 1 + len(prompt) + len(answers[label]))
            if longest > (T or MOST):
                raise Problem(f"{path}: line {number} takes {longest} tokens, "
                              f"more than --seq {T or MOST}")
    T = T or -(-longest // ROUND_TO) * ROUND_TO

    path = {name: os.path.join(out, name + ".bin")
            for name in ("train", "val", "answers", "tokenizer")}
    with writing(out), holding(out):
        # so that files of an earlier run never stand beside those of this one
        for earlier in filter(os.path.exists, path.values()):
            os.remove(earlier)
        write_tokenizer(path["tokenizer"], tokenizer)
        write_answers(path["answers"], examples["val"], answers, end_of_text)
        for split in examples:
            write_shard(path[split], lay_out(examples[split], answers, T, end_of_text),
                        tokenizer.vocabulary, T)
    print(f"wrote to {out}, {tokenizer.name}, sequences of {T} tokens:")
    print(f"  train.bin: {len(examples['train']):,} examples; val.bin and answers.bin: "
          f"{len(examples['val']):,}")
    files = [f"--{option} {shlex.quote(path[name])}" for option, name in
             (("train", "train"), ("val", "val"), ("hellaswag", "answers"))]
    print("fine-tune with the CompAct paper's projection, rank, alpha and gap:\n"
          f"  ./train_gpt2_compact -e gpt2.bin {' '.join(files)} -t {T} -b 16 -l 2e-5 "
          "--projection gaussian --rank 8 --alpha 2 --gap 500 -o runs/sst2")

# ----------------------------------------------------------------------------
# score


def read_run(folder):
    """Of a run's log: its options, its plan, and its evaluations that have an accuracy."""
    header, records = read_log(folder)
    evaluations = [record for record in records if "hellaswag" in record]
    if not evaluations:
        raise Problem(f"{os.path.join(folder, 'log.jsonl')}: has no accuracy; train with "
                      "--hellaswag DIR/answers.bin")
    return header["options"], header["plan"], evaluations


def score(folders):
    runs = [read_run(folder) for folder in folders]
    width = max(map(len, [*folders, "run"]))
    print(f"{'run':{width}}  {'rank':>6} {'step':>8} {'accuracy':>9} {'best':>7} "
          f"{'memory, MiB':>12} {'full rank':>12}")
    for folder, (options, plan, evaluations) in zip(folders, runs):
        last, best = evaluations[-1], max(line["hellaswag"] for line in evaluations)
        memory, full = (plan[name] / 2**20 for name in ("total_bytes", "full_rank_total_bytes"))
        print(f"{folder:{width}}  {options['rank']:6g} {last['step']:8,} "
              f"{last['hellaswag']:9.4f} {best:7.4f} {memory:12,.1f} {full:12,.1f}")

# ----------------------------------------------------------------------------


def main():
    parser = Parser(__doc__)
    parser.add_argument("command", choices=["prepare", "score"])
    parser.add_argument("paths", metavar="PATH", nargs="+",
                        help="prepare: two .tsv, or .tsv.gz; score: folders of runs")
    options = parser.add_argument_group("of prepare")
    options.add_argument("--out", metavar="DIR", default="data/sst2",
                         help="folder for the files (default: %(default)s)")
    options.add_argument("--seq", metavar="T", type=whole_number(2, MOST),
                         help="tokens of a sequence (default: the longest example's, "
                         f"up to a multiple of {ROUND_TO})")
    options.add_argument("--question", default="Sentiment:",
                         help="what follows the sentence (default: %(default)s)")
    options.add_argument("--answers", metavar="A,B", default="negative,positive",
                         help="2 to 4 answers, to labels 0, 1 ... (default: %(default)s)")
    add_tokenizer_options(options)
    args = parser.parse_args()
    if args.command == "score":
        score(args.paths)
        return
    answers = args.answers.split(",")
    if not 2 <= len(answers) <= 4 or not all(answers) or len(set(answers)) < len(answers):
        raise Problem(f"--answers {args.answers}: give 2 to 4 different answers, "
                      "with commas between")
    if len(args.paths) != 2:
        raise Problem(f"prepare: {len(args.paths)} files; give two, for training and for "
                      "validation")
    prepare(args.paths, args.out, load_tokenizer(args), args.question, answers, args.seq)


if __name__ == "__main__":
    run(main)
