"""No line of the sources, and of the prose that is written by hand, passes column 100."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACES = [".", ".ci", "data_prep", "dev", "dev/cuda", "dev/nogpu", "dev/nogpu/include",
          "dev/nogpu/samples", "dev/test", "dev/results", "dev/results/*"]
KINDS = ["*.py", "*.cpp", "*.cu", "*.cuh", "*.h", "*.sh", "*.md", "Makefile", "run"]
MADE = ["results.md"]  # in dev/results, by ablate.py and peers.py
PATHS = sorted({path.relative_to(ROOT) for place in PLACES for kind in KINDS
                for path in ROOT.glob(f"{place}/{kind}") if path.name not in MADE})


def written(path):
    """A file's lines: of Markdown neither tables, nor what programs printed (```text)."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = re.sub(r"^```text\n.*?^```$", lambda block: "\n" * block[0].count("\n"), text,
                      flags=re.M | re.S)
        text = re.sub(r"^\|.*$", "", text, flags=re.M)
    return text.splitlines()


def test_paths_are_found():
    names = set(map(str, PATHS))
    assert {"train_gpt2_compact.cpp", "train_gpt2_compact.cu", "test_gpt2.cu", "Makefile",
            "README.md", ".ci/run", "dev/cuda/common.cuh", "dev/nogpu/include/nogpu.h",
            "dev/results/eigenbasis.md", "dev/test/test_lines.py"} <= names
    assert not any(name.startswith("build") for name in names)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_width(path):
    long = [number for number, line in enumerate(written(path), 1) if len(line) > 100]
    assert long == [], f"{path}: lines {long}"
