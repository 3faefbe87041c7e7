"""
The CUDA trainer against the CPU trainer: each case of test_gpt2.cu is a test here, in bf16 and in
fp32, under dev/nogpu with the sanitizers, and on the GPU where there is one. And the text that both
trainers share is the same.

Nothing is built. The binaries are those that TEST_GPT2_BF16 and TEST_GPT2_FP32 name, or
build/test_gpt2_bf16_sanitized and build/test_gpt2_fp32_sanitized, which `make test` builds where
the headers of the CUDA toolkit and Boost.Context are; and ./test_gpt2cu. Where one is missing its
tests are skipped, unless it was named.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900  # a case takes up to 15 s; the rest is for a busy machine
# The kernels' threads take turns on one processor; more of them gain little here and would wait for
# each other in the CPU trainer.
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "passive",
               "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
RULER = "// " + "=" * 97
# Where the CUDA trainer is held to itself, bit by bit, and where it writes and reads files in other
# shapes: in bf16 these reach all that they reach in fp32, whose kernels are the same with another
# type.
IN_BF16_ALONE = re.compile("levels-|repeat-|offload-|(evaluate|resume|model-file|memory|dump)-")


def cases():
    for precision in ("bf16", "fp32"):
        named = os.environ.get("TEST_GPT2_" + precision.upper())
        path = Path(named or ROOT / "build" / f"test_gpt2_{precision}_sanitized").resolve()
        if not path.exists() and not named:
            reason = (f"build/{path.name} is not there: "
                      "its making needs the headers of the CUDA toolkit, and Boost.Context")
            yield pytest.param(path, None, id=precision, marks=pytest.mark.skip(reason=reason))
            continue
        listed = subprocess.run([path, "--list"], capture_output=True, text=True, timeout=60,
                                check=True)
        for case in listed.stdout.split():
            if precision == "fp32" and not named and IN_BF16_ALONE.match(case):
                continue
            yield pytest.param(path, case, id=f"{precision}-{case}")


def run(command, **kw):
    done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                          timeout=SECONDS, **kw)
    passed = done.returncode == 0 and done.stdout.endswith(" passed, 0 failed\n")
    if not passed or done.stdout.endswith("\n0 passed, 0 failed\n"):
        said = done.stdout + done.stderr
        pytest.fail(f"{command}: exit status {done.returncode}\n{said[-8000:]}", pytrace=False)
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path, case", list(cases()))
def test_case(path, case, tmp_path):
    """
    Alone in a process: an error that nogpu or a sanitizer finds ends it, and the other cases still
    run.
    """
    said = run([str(path), case], env={**ENVIRONMENT, "TMPDIR": str(tmp_path)})
    assert said.endswith("\n1 passed, 0 failed\n")


def device():
    """The name of the GPU, or an empty string."""
    if not shutil.which("nvidia-smi"):
        return ""
    done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
                          capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


@pytest.mark.slow
def test_gpu(tmp_path):
    """All cases on the GPU itself, in the precision that ./test_gpt2cu was built for."""
    if not device():
        pytest.skip("nvidia-smi finds no GPU")
    if not (ROOT / "test_gpt2cu").exists():
        pytest.skip("test_gpt2cu is not there: make test_gpt2cu")
    run([str(ROOT / "test_gpt2cu")], env={**os.environ, "TMPDIR": str(tmp_path)})

# ----------------------------------------------------------------------------
# what both trainers share

TRAINERS = ["train_gpt2_compact.cpp", "train_gpt2_compact.cu"]
# The order of a trainer: in both files, a section's title begins with these words.
ORDER = ["the host, in short", "layers", "the compressed linear layer", "the optimizer",
         "the model:", "all else of the host"]


def sections(path):
    """A source's sections: the lines between two rulers are a title, what follows is the text."""
    pieces = (ROOT / path).read_text().split(RULER + "\n")
    titles, texts = pieces[1::2], pieces[2::2]
    assert len(titles) == len(texts) >= len(ORDER), f"{path}: its rulers do not come in pairs"
    return list(zip(titles, texts))


@pytest.mark.parametrize("part", [ORDER[0], ORDER[-1]])
def test_shared_text(part):
    """Byte for byte, title included."""
    cpp, cu = ([section for section in sections(path) if section[0].startswith("// " + part)]
               for path in TRAINERS)
    assert len(cpp) == len(cu) == 1
    assert cpp[0][0] == cu[0][0] and "the same text in both trainers" in cpp[0][0]
    for number, (a, b) in enumerate(zip(cpp[0][1].split("\n"), cu[0][1].split("\n")), 1):
        assert a == b, f"line {number} of '{part}' differs"
    assert cpp == cu
    assert len(cpp[0][1]) > 5000


@pytest.mark.parametrize("path", TRAINERS)
def test_order(path):
    """
    What a model needs of the host stands first, and is short; the rest of the host stands last.
    """
    titles = [title for title, _ in sections(path)]
    found = [word for title in titles for word in ORDER if title.startswith("// " + word)]
    assert found == ORDER, titles
    assert titles[0].startswith("// " + ORDER[0]) and titles[-1].startswith("// " + ORDER[-1])


# A layer's function or kernel, the first that a reader meets, and within how many lines of the top
# it stands.
FIRST = {"train_gpt2_compact.cpp": r"^static void \w+_forward\(",
         "train_gpt2_compact.cu": r"^__global__ "}


@pytest.mark.parametrize("path", FIRST)
def test_first_layer_stands_near_the_top(path):
    text = (ROOT / path).read_text()
    first = re.search(FIRST[path], text, re.M)
    assert first and text.count("\n", 0, first.start()) < 300


@pytest.mark.parametrize("path", ["test_gpt2.cu", "dev/cuda/common.cuh"])
def test_headers_come_first(path):
    """
    Where both trainers are included within namespaces, all of their headers stand before: what one
    declared in there nothing would find.
    """
    def headers(text):
        return set(re.findall(r"^\s*#\s*include <(.*)>", text, re.M))
    before = (ROOT / path).read_text().split("\nnamespace", 1)[0]
    both = "".join((ROOT / trainer).read_text()
                   for trainer in ("train_gpt2_compact.cpp", "train_gpt2_compact.cu"))
    unused = {"cblas.h", "Accelerate/Accelerate.h", "mpi.h", "nccl.h"}  # here
    assert headers(both) - unused - headers(before) == set()
