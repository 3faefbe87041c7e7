#!/usr/bin/env python3
"""
Tiny Shakespeare (1.1 MB, 338,025 GPT-2 tokens) to token shards: downloads it,
then does as prepare.py does. The last 10 % of the text is validation.

example: tinyshakespeare.py
         tinyshakespeare.py --file input.txt --tokenizer bytes --out data/bytes
"""

import os

from common import (Parser, add_shard_option, add_tokenizer_options, check_file, download,
                    load_tokenizer, run)
from prepare import prepare

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def main():
    parser = Parser(__doc__)
    parser.add_argument("--file", metavar="FILE",
                        help="the text, if it is on this machine (default: download it)")
    parser.add_argument("--url", default=URL, help="where to download it (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", default="data/tinyshakespeare",
                        help="folder for the shards and the download (default: %(default)s)")
    add_tokenizer_options(parser)
    add_shard_option(parser)
    args = parser.parse_args()

    if args.file is not None:
        check_file("--file", args.file)
    tokenizer = load_tokenizer(args)
    path = args.file
    if path is None:
        path = os.path.join(args.out, "tinyshakespeare.txt")
        download(args.url, path)
    prepare([path], args.out, tokenizer, 0.1, args.shard_tokens).report()


if __name__ == "__main__":
    run(main)
