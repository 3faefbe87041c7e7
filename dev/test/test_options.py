"""
The command line: what it offers, and that whatever is wrong ends in one line that names it, and
status 2.
"""

import functools
import json
import os
import re

import numpy as np
import pytest

import formats
from conftest import LEVELS, TINY, check_one_line, check_refused, environment, plan

# What a person may type for a number
NO_NUMBER = ["", "x", "8x", "x8", "1e", "nan", "-nan", "inf", "-inf", "1e400", "-1e400", " 8", "8 ",
             "8,0", "1.2.3", "--", "½", "\t8", "8;"]
NO_INTEGER = NO_NUMBER + ["1.5", "2.0", "1e3", "0x10", "99999999999999999999",
                          "-99999999999999999999", "9223372036854775808", "4294967297"]
COUNT = NO_INTEGER + ["-1", "-2"]  # where there is no "-1 = at the end"
EVERY = NO_INTEGER + ["-2", "-100"]
REAL = NO_NUMBER + ["-1", "-1e-9"]
SIZE = ["", "x", "GB", "8x", "x8", "1e", "nan", "inf", "-inf", "1e400", " 8", "8,0", "1.2.3", "--",
        "½", "\t8", "8;", "abc", ".", "+8", "24XB", "-1GB", "-1", "1e30GB", "1e18",
        "99999999999999999999", "24GBB", "24iB", "24G B", "24 G iB", "24GB x", "24PB", "0x7A120"]


def choice(*names):
    first = names[0]
    return ["", "x", "0", "1", "none", first + "x", first.upper(), first[:3], " " + first,
            first + " ", ",".join(names)]


# Option -> (its letter, values that are wrong for it). A new option fails
# test_every_option_is_tried until it is here.
OPTIONS = {
    "train": ("i", ["", "no-such-file", "no-such-*"]),
    "val": ("j", ["", "no-such-file", "no-such-*"]),
    "model": ("e", ["", "d", "d0", "d-1", "d+1", "d 4", "d12x", "d1.5", "D12", "12", "gpt2",
                    "d1025", "d99999999999999999999"]),
    "channels": ("", COUNT),
    "heads": ("", COUNT),
    "layers": ("", COUNT),
    "context": ("", COUNT),
    "out": ("o", [""]),
    "tokenizer": ("", [""]),
    "prompt": ("", [""]),
    "batch": ("b", COUNT + ["0", "65536"]),
    "seq": ("t", COUNT + ["33"]),  # 33: the tiny model's context is 32
    "total-batch": ("d", COUNT + ["63", "65", "32"]),  # no multiples of 2 * 32
    "steps": ("x", EVERY),
    "lr": ("l", REAL),
    "warmup": ("u", COUNT),
    "final-lr-frac": ("q", REAL + ["1.01"]),
    "schedule": ("k", choice("cosine", "linear", "constant", "wsd")),
    "weight-decay": ("c", REAL),
    "clip": ("", REAL),
    "beta1": ("", REAL + ["1", "2"]),
    "beta2": ("", REAL + ["1", "2"]),
    "eps": ("", REAL + ["1.1"]),
    "rank": ("", REAL + ["0", "0.0", "-0.5", "1.5", "2.25"]),
    "compress": ("", ["", "x", ",", "qkv,", ",qkv", "qkv,,fc", "qkv,x", "qkv fc", "none,qkv",
                      "qkv,none", "QKV", "all"]),
    "optimizer": ("", choice("adamw", "muon")),
    "projection": ("", choice("gaussian", "rademacher", "sparse")),
    "gap": ("", COUNT),
    "alpha": ("", REAL),
    "moments": ("", choice("keep", "move", "reset")),
    "recompute": ("r", COUNT + ["6"]),
    "gelu": ("", choice("exact", "2bit")),
    "tape": ("", choice("full", "int8")),
    "master": ("", [x for x in choice("fp32", "none") if x != "none"]),
    "offload": ("", None),
    "memory": ("", SIZE),
    "plan": ("", None),  # None: takes no value after a space; --plan=json is tried below
    "val-every": ("v", EVERY),
    "val-batches": ("m", EVERY),
    "val-first": ("", None),
    "sample-every": ("s", EVERY),
    "sample-tokens": ("g", COUNT + ["0"]),
    "temperature": ("", REAL),
    "top-k": ("", COUNT),
    "hellaswag": ("", [""]),
    "checkpoint-every": ("n", EVERY),
    "keep": ("", COUNT),
    "checkpoint-type": ("", choice("fp32", "bf16")),
    "resume": ("y", None),
    "seed": ("", [x for x in COUNT if x != "4294967297"]),  # which may be a seed like any other
    "overfit": ("", None),
    "dump": ("", [""]),
    "help": ("h", None),
}

# The design's table, with the letters that llm.c's users know
DESIGN = ("i train, j val, e model, channels, heads, layers, context, o out, b batch, t seq, "
          "d total-batch, x steps, l lr, u warmup, q final-lr-frac, k schedule, c weight-decay, "
          "clip, beta1, beta2, eps, optimizer, rank, compress, projection, gap, alpha, moments, "
          "r recompute, gelu, tape, master, offload, memory, plan, v val-every, m val-batches, "
          "s sample-every, g sample-tokens, hellaswag, n checkpoint-every, keep, y resume, seed, "
          "overfit, dump")


# Options whose default is a code that --help says in words
CODES = {"channels": "0", "heads": "0", "layers": "0", "context": "0", "steps": "-1", "memory": "0",
         "sample-every": "0", "checkpoint-every": "-1"}


@functools.lru_cache(None)
def helped():
    """--help, read: option -> (letter, argument, words, default)."""
    done = formats.run_trainer(["--help"])
    assert done.returncode == 0 and done.stderr == ""
    rows = {}
    for line in done.stdout.splitlines():
        m = re.fullmatch(r" +(?:-(\w), )?--([a-z0-9-]+)(?: ([A-Z]+))?(?: +(.*))?", line)
        if m:
            default = re.search(r"\(([^()]*)\)$", m.group(4) or "")
            rows[m.group(2)] = (m.group(1) or "", m.group(3) or "", m.group(4) or "",
                                default.group(1) if default else "")
    return rows


@pytest.fixture
def ask(text):
    """
    ask(*options): the trainer on the tiny model and text, for one step where it comes to that.
    """
    return lambda *args, **kw: formats.run_trainer(
        [*TINY, "--train", text, "-x", 1, "-v", 0, *args], env=environment(), **kw)

# ----------------------------------------------------------------------------
# help


def test_help():
    rows = helped()
    for entry in DESIGN.split(", "):
        letter, name = entry.split() if " " in entry else ("", entry)
        assert name in rows, f"--help does not tell of --{name}"
        assert rows[name][0] == letter
    assert formats.run_trainer(["-h"]).stdout == formats.run_trainer(["--help"]).stdout
    options = [line for line in formats.run_trainer(["--help"]).stdout.splitlines()
               if re.match(r" +-", line)]
    assert len(options) == len(rows), "a line of --help is not understood here"
    assert all(words for _, _, words, _ in rows.values()), "an option without a word of help"


def test_defaults_in_help_are_those_in_use():
    used = json.loads(formats.run_trainer(["--plan=json"]).stdout)["options"]
    for name, (_, _, _, default) in helped().items():
        if name in ("plan", "help", "seq", "total-batch"):  # the last two become what others say
            continue
        if name in CODES:
            assert str(used[name]) == CODES[name] and default, name
            continue
        shown = used[name] if isinstance(used[name], str) else json.dumps(used[name])
        if isinstance(used[name], bool):
            assert not used[name]
        elif default or shown:
            assert default == shown or float(default) == float(shown), name
    assert used["seq"] == 1024 and used["total-batch"] == 4096


def test_every_option_is_tried():
    assert {name: row[0] for name, row in helped().items()} == {
        name: letter for name, (letter, _) in OPTIONS.items()}
    for name, (_, argument, _, _) in helped().items():
        assert bool(argument) == (OPTIONS[name][1] is not None), f"--{name} {argument}"

# ----------------------------------------------------------------------------
# values


@pytest.mark.parametrize("name", [name for name, (_, bad) in OPTIONS.items() if bad is not None])
def test_bad_values(name, ask):
    letter, bad = OPTIONS[name]
    ask = functools.partial(ask, *["--plan"] * (name == "memory"))  # if it were taken, it would be
    for value in bad:
        check_refused(ask(f"--{name}={value}"), f"--{name}")
    # the value as an argument of its own; and none at all
    for spelt in ["--" + name] + ["-" + letter] * bool(letter):
        check_refused(ask(spelt, bad[-1]), f"--{name}")
        check_refused(ask(spelt), spelt)


@pytest.mark.parametrize("name", [name for name, (_, bad) in OPTIONS.items() if bad is None])
def test_options_without_value(name, ask):
    for value in ("x", "1", "true", "Json"):
        check_refused(ask(f"--{name}={value}"), f"--{name}")


RANGE = re.compile(r"is not (a whole number|a number) from (\S+) to (\S+)\n")


NUMBERS = [name for name, (_, bad) in OPTIONS.items() if bad and "1.2.3" in bad]


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in ("rank", "memory")])
def test_ranges_are_what_the_refusal_says(name):
    """
    The ends that it tells are taken, or refused for another reason; what lies just outside is
    refused.
    """
    def refusal(value):
        done = formats.run_trainer(["--plan", f"--{name}={value}"])
        return done.returncode == 2 and f"--{name}:" in done.stderr and RANGE.search(done.stderr)
    kind, low, high = refusal("x").groups()
    if kind == "a whole number":
        low, high = int(float(low)), int(float(high))
        assert refusal(low - 1) and refusal(high + 1)
    else:
        assert refusal(float(low) - 1e-6) and refusal(float(high) * 1.000001)
    assert not refusal(low) and not refusal(high)


def test_good_values(ask):
    """What a range includes is taken: so that the refusals above are not refusals of everything."""
    good = {"channels": [2, 64], "heads": [1, 16], "layers": [1], "context": [32], "batch": [1],
            "seq": [1, 32, 0], "total-batch": [0, 64], "steps": [0, 1],
            "lr": [0, 100, "1e-3", "+.5", "1E-3"], "warmup": [0, 1000000000],
            "final-lr-frac": [0, 1], "schedule": ["cosine", "linear", "constant", "wsd"],
            "weight-decay": [0, 100], "clip": [0, 1e9], "beta1": [0, 0.999], "beta2": [0, 0.999],
            "eps": [1e-8, 1], "rank": ["1", "1.0", "1e-9", 2, 1000000, "0.25", "1e0"],
            "compress": ["none", "qkv", "fc,qkv", "attproj,fcproj,fc,qkv"],
            "optimizer": ["adamw", "muon"], "projection": ["gaussian", "rademacher", "sparse"],
            "gap": [0, 1, 1000000000], "alpha": [0, 4], "moments": ["keep", "move", "reset"],
            "recompute": LEVELS, "gelu": ["exact", "2bit"], "tape": ["full", "int8"],
            "master": ["fp32", "none"], "memory": [0, "1MB", "500 KiB", "6e5"],
            "val-every": [-1, 0], "val-batches": [-1, 0, 1], "sample-every": [-1, 0],
            "sample-tokens": [1], "temperature": [0, 100], "top-k": [0, 1, 300],
            "checkpoint-every": [0], "keep": [0, 5], "checkpoint-type": ["fp32", "bf16"],
            "seed": [0, 2147483647], "model": ["d1", "d3"]}
    # and what a model has to stand beside
    files = {"train", "val", "out", "tokenizer", "hellaswag", "dump"}
    assert set(good) == {name for name, (_, bad) in OPTIONS.items()
                         if bad is not None} - files - {"prompt"}
    for name, values in good.items():
        for value in values:
            done = ask(f"--{name}={value}")
            assert done.returncode == 0 and done.stderr == "", (name, value, done)


@pytest.mark.parametrize(
    "unit, bytes_", [("", 1), ("B", 1), ("b", 1), ("K", 1e3), ("kB", 1e3), ("MB", 1e6), ("mb", 1e6),
                     ("GB", 1e9), ("G", 1e9), ("TB", 1e12), ("KiB", 2**10), ("MiB", 2**20),
                     ("GiB", 2**30), ("Gi", 2**30), ("gib", 2**30), ("TiB", 2**40)])
def test_sizes(unit, bytes_):
    for number in ("24", "500", "1.5", "2e3", "1E2", "0.5"):
        for between in ("", " "):
            if float(number) * bytes_ < 1e9:  # of a d1, which takes some of that
                done = formats.run_trainer(["-e", "d1", "--plan", "--memory",
                                            number + between + unit])
                assert done.returncode == 0 or done.stderr.startswith(
                    f"train_gpt2_compact: --memory: {int(float(number) * bytes_):,} bytes")
            else:
                got = plan("-e", "d1", "-t", 8, "--memory",
                           number + between + unit)["options"]["memory"]
                assert got == int(float(number) * bytes_), number + between + unit


def test_no_such_option(ask):
    for words in (["--bogus"], ["--bogus=3"], ["--bogus", "3"], ["-Z"], ["-Zx"], ["stray"], ["-"],
                  ["--", "stray"]):
        name = {"3": "--bogus", "--bogus=3": "--bogus", "-Zx": "-Z"}.get(words[-1], words[-1])
        check_refused(ask(*words), name)
    check_refused(ask("--c", 3), "--c")  # may be several
    for words in (["stray", "--bogus"], ["-y", "stray", "--bogus"]):
        check_refused(ask(*words))
    check_refused(formats.run_trainer([]), "--train")

# ----------------------------------------------------------------------------
# contradictions


def test_contradictions(ask, shards, train, tmp_path):
    check_refused(ask("-d", 96), "--total-batch")
    check_refused(ask("-t", 64), "--seq")
    check_refused(ask("-t", 7, "-d", 64), "--total-batch")
    check_refused(ask("--channels", 20, "--heads", 3), "--heads")
    check_refused(ask("-b", 1000000, "--context", 1048576, "-t", 1048576), "--batch")
    for level in (3, 4, 5):
        for more in ([], ["--memory", "1GB"], ["--memory", 1000]):
            check_refused(ask("--gelu", "2bit", "-r", level, *more), "--gelu", "--recompute")
    check_refused(ask("--offload"), "--offload", "GPU")
    check_refused(ask("--offload", "--dump", tmp_path / "dump"), "--offload")
    check_refused(ask("--memory", "1GB", "-d", 96 + 1), "--total-batch")
    check_refused(ask("-n", 1), "--checkpoint-every", "--out")
    check_refused(ask("-y"), "--resume", "--out")
    model = train("-x", 0, "-n", -1).model(0)
    # the same shape is one too many too
    for name, value in (("channels", 16), ("heads", 2), ("layers", 2), ("context", 32)):
        done = formats.run_trainer(["-e", model, "--train", shards / "train_0.bin", "-b", 1,
                                    f"--{name}", value])
        check_refused(done, f"--{name}", model)
    check_refused(formats.run_trainer(["-e", model, "--train", shards / "train_0.bin", "-b", 2]),
                  "--train", "100", "256")
    check_refused(formats.run_trainer(["-e", model, "-t", 33, "--plan"]), "--seq")
    check_refused(ask("--val", shards / "val.bin"), "--val", "100", "256")
    formats.write_tokens(tmp_path / "a.bin", np.zeros(100, int), 50)
    formats.write_tokens(tmp_path / "b.bin", np.zeros(100, int), 51)
    check_refused(formats.run_trainer([*TINY, "--train", tmp_path / "?.bin"]), "b.bin", "50", "51")
    check_refused(formats.run_trainer([*TINY, "--plan=json", "-d", 96]), "--total-batch")

# ----------------------------------------------------------------------------
# files


def write_header(path, words, rest=b""):
    header = np.zeros(256, "<i4")
    header[:len(words)] = words
    path.write_bytes(header.tobytes() + rest)
    return path


@pytest.mark.parametrize("name", ["train", "val", "model", "tokenizer", "hellaswag"])
def test_files_that_cannot_be(name, ask, tmp_path):
    """Not there, a folder, of another kind, cut short, too long: the line names the file."""
    (tmp_path / "folder.bin").mkdir()
    (tmp_path / "words.bin").write_text("not what it is called, but long enough to have a header. "
                                        * 40)
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "short.bin").write_bytes(b"1234567")
    config = [32, 256, 1, 1, 8, 256]
    floats = 4 * sum(int(np.prod(s))
                     for s in formats.param_shapes(dict(zip(formats.CONFIG, config))).values())
    kinds = {"tokens": ([20240520, 1, 1000, 256], 2000), "model": ([20240326, 3, *config], floats),
             "swag": ([20240522, 1, 1, 26], 26), "tokenizer": ([20240328, 2, 3, 2], 6)}
    own = {"train": "tokens", "val": "tokens", "hellaswag": "swag"}.get(name, name)
    for kind, (words, size) in kinds.items():
        if kind != own:
            write_header(tmp_path / f"{kind}.bin", words, bytes(size))
    words, size = kinds[own]
    write_header(tmp_path / "cut.bin", words, bytes(size - 1))
    write_header(tmp_path / "cut-off.bin", words)
    write_header(tmp_path / "long.bin", words, bytes(size + 1))
    write_header(tmp_path / "version.bin", [words[0], 99, *words[2:]], bytes(size))
    write_header(tmp_path / "many.bin", [*words[:2], 2**31 - 1, *words[3:]], bytes(size))
    write_header(tmp_path / "negative.bin", [*words[:2], -1, *words[3:]], bytes(size))
    tried = [tmp_path / "missing.bin"] + sorted(tmp_path.iterdir())
    assert len(tried) == 14
    for path in tried:
        done = formats.run_trainer(["-e", path,
                                    "--plan"]) if name == "model" else ask(f"--{name}", path)
        assert done.returncode == 2, done
        check_one_line(done.stderr, path.name)


def test_hostile_model_headers(tmp_path):
    """Counts that would take the machine's memory, or overflow when multiplied, come to nothing."""
    good = [20240326, 3, 32, 256, 1, 1, 8, 256]
    for at, values in {2: (0, -5, 2**31 - 1), 3: (0, -1, 65537, 2**31 - 1),
                       4: (0, -1, 2**31 - 1, 1024), 5: (0, -1, 3, 2**30),
                       6: (0, -8, 65536, 2**31 - 8), 7: (0, 255, -1, 2**31 - 1)}.items():
        for value in values:
            words = list(good)
            words[at] = value
            path = write_header(tmp_path / "model.bin", words, bytes(1000))
            check_refused(formats.run_trainer(["-e", path, "--plan"]), path)
    config = dict(zip(formats.CONFIG, good[2:]))
    params = formats.draw_model(config, 1)
    params["fcw"][0, 3, 1] = np.nan
    formats.write_model(tmp_path / "nan.bin", config, params)
    (tmp_path / "text.txt").write_text("a text " * 200)
    done = formats.run_trainer(["-e", tmp_path / "nan.bin", "--train", tmp_path / "text.txt", "-x",
                                1])
    assert done.returncode == 2
    check_one_line(done.stderr, "nan.bin", "fcw")


def test_values_out_of_range_in_data(ask, tmp_path):
    """A token that is not in the vocabulary, in a shard or in HellaSwag; a label that is none."""
    formats.write_tokens(tmp_path / "t.bin", np.full(200, 60), 50)
    done = formats.run_trainer([*TINY, "--train", tmp_path / "t.bin", "-x", 1])
    assert done.returncode == 2
    check_one_line(done.stderr, "t.bin", "60", "50")

    def swag(*words):
        return write_header(tmp_path / "swag.bin", [20240522, 1, 1, 100],
                            np.array(words, "<u2").tobytes())
    endings = [1, 5, 1, 6, 1, 7, 1, 8]
    assert ask("--hellaswag", swag(65535, 30, 0, 3, 4, 1, 9, *endings)).returncode == 0
    for words in ([65535, 30, 0, 4, 4, 1, 9, *endings], [65535, 30, 0, 3, 5, 1, 9, *endings],
                  [65535, 30, 0, 3, 4, 1, 256, *endings], [65535, 32, 0, 3, 4, 1, 9, *endings],
                  [65534, 30, 0, 3, 4, 1, 9, *endings], [65535, 30, 1, 3, 4, 1, 9, *endings],
                  [65535, 28, 0, 3, 4, 0, *endings], [65535, 30, 0, 3, 4, 60000, 9, *endings],
                  [65535, 30, 0, 3, 4, 1, 9, *endings, 1],
                  [65535, 30, 0, 3, 4, 1, 9, *endings[:-1]]):
        done = ask("--hellaswag", swag(*words))
        assert done.returncode == 2, (words, done)
        check_one_line(done.stderr, "swag.bin")


@pytest.mark.parametrize("kind", ["missing folder", "folder", "under a file"])
def test_dump_that_cannot_be(kind, ask, text, tmp_path):
    path = {"missing folder": tmp_path / "no" / "dump", "folder": tmp_path,
            "under a file": text / "dump"}[kind]
    before = sorted(os.listdir(tmp_path)), sorted(os.listdir(tmp_path.parent))
    done = ask("--dump", path)
    assert done.returncode in (1, 2)
    check_one_line(done.stderr, path)
    assert (sorted(os.listdir(tmp_path)),
            sorted(os.listdir(tmp_path.parent))) == before, "something is left"


ODD = ["two\nlines", "bell\x07 and escape\x1b[31m",
       b"no utf-8 \xff\xfe".decode("utf-8", "surrogateescape")]


def test_odd_characters(ask):
    """A value or a name that a terminal would act on is shown without harm, and on one line."""
    options = ["--train", "--val", "--tokenizer", "--hellaswag", "--model", "--batch", "--lr",
               "--schedule", "--rank", "--compress", ""]
    harmful = []
    for option in options:
        for odd in ODD:
            value = {"": "--" + odd, "--batch": "8" + odd}.get(option, "./" + odd)
            done = ask(*([option] if option else []), value, text=False)
            assert done.returncode == 2, done
            if done.stderr.count(b"\n") != 1 or re.search(rb"[\x00-\x09\x0b-\x1f\x7f]",
                                                          done.stderr) or b"\xff" in done.stderr:
                harmful.append(done.stderr)
    assert not harmful
