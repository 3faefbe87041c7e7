"""
The Makefile and dev/setup.sh on machines that this one is not: nvidia-smi, nvcc, apt-get and the
like are small scripts here.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)


def settings(folder, **more):
    """
    The environment with the scripts of `folder` before all others, and without what a make around
    this, or the user, has set.
    """
    own = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "CUDA_VISIBLE_DEVICES", "CUDA_HOME",
           "GPU_COMPUTE_CAPABILITY", "PRECISION", "EXTRA", "CXX", "CXXFLAGS", "NO_OPENMP", "NVCC",
           "PYTHON"}
    return {**{k: v for k, v in os.environ.items() if k not in own},
            "PATH": f"{folder}:{os.environ['PATH']}", **more}

# ----------------------------------------------------------------------------
# the card

KNOWN = "75 80 86 87 88 89 90 100 103 110 120 121"  # CUDA 13's


@pytest.fixture
def make(tmp_path):
    """
    make(answers, *arguments) runs make where nvidia-smi gives these compute capabilities, each on a
    line.
    """
    def run(answers, *arguments, known=KNOWN, **environment):
        script(tmp_path / "bin/nvidia-smi",
               f"case $* in *compute_cap*) printf '{answers}' ;; *name*) echo 'Test 9000' ;; esac")
        script(tmp_path / "bin/nvcc", f"for i in {known}; do echo compute_$i; done")
        return subprocess.run(["make", "-B", *arguments], cwd=ROOT,
                              env=settings(tmp_path / "bin", **environment), capture_output=True,
                              text=True)
    return run


def built_for(done):
    assert done.returncode == 0 and done.stderr == "", done.stderr
    code, ptx = re.findall(r"code=sm_(\S+)", done.stdout), re.findall(r"code=compute_(\S+)",
                                                                      done.stdout)
    assert code == ptx == re.findall(r"arch=compute_(\S+?),", done.stdout)[::2]
    return code


@pytest.mark.parametrize("answers, wanted", [
    (r"9.0\n", "90"), (r"8.9\n", "89"), (r"12.0\n", "120"), (r"10.0\n10.0\n", "100"),
    # no card, and other answers
    ("", "80"), (r"NVIDIA-SMI has failed: it needs driver 9.0\n", "80"),
    (r"No devices were found\n", "80"), (r"[N/A]\n", "80"), (r"v9.0\n9\n", "80"),
    (r"Field \"compute_cap\" is not a valid field to query.\n", "80"),
    (r"12.9\n", "121"), (r"13.5\n", "121"), (r"10.1\n", "100"),  # newer than the toolkit
    (r"9.0\n8.6\n9.0\n", "86 90"), (r"6.1\n8.6\n", "86"), (r"12.9\n12.1\n", "121"),  # several cards
])
def test_built_for_the_card(answers, wanted, make):
    assert built_for(make(answers, "-n", "train_gpt2_compactcu")) == wanted.split()


def test_built_for_what_the_toolkit_knows(make):
    assert built_for(make(r"12.0\n", "-n", "test_gpt2cu", known="80 86 87 89 90")) == ["90"]


def test_hidden_cards(make):
    """
    CUDA_VISIBLE_DEVICES may hide all cards. Where it hides some, each is built for, as its numbers
    are not nvidia-smi's.
    """
    for hidden in ("", "-1"):
        assert built_for(make(r"9.0\n", "-n", "train_gpt2_compactcu",
                              CUDA_VISIBLE_DEVICES=hidden)) == ["80"]
        assert "device: none" in make(r"6.1\n", "found", CUDA_VISIBLE_DEVICES=hidden).stdout
    assert built_for(make(r"8.6\n9.0\n", "-n", "train_gpt2_compactcu",
                          CUDA_VISIBLE_DEVICES="1")) == ["86", "90"]


def test_in_fp32_from_7_5_on(make):
    assert built_for(make(r"7.5\n", "-n", "train_gpt2_compactcu", "PRECISION=FP32")) == ["75"]
    assert built_for(make(r"7.0\n7.5\n8.6\n", "-n", "train_gpt2_compactcu",
                          "PRECISION=FP32")) == ["75", "86"]
    done = make(r"7.5\n", "-s", "train_gpt2_compactcu")
    assert done.returncode == 2 and "PRECISION=FP32" in done.stdout + done.stderr


def test_a_capability_that_is_given(make):
    for given in ("90", "9.0"):
        assert built_for(make(r"8.0\n", "-n", "train_gpt2_compactcu",
                              "GPU_COMPUTE_CAPABILITY=" + given)) == ["90"]
        assert built_for(make(r"6.1\n", "-n", "train_gpt2_compactcu",
                              GPU_COMPUTE_CAPABILITY=given)) == ["90"]


@pytest.mark.parametrize("answers, given, words",
                         [(r"6.1\n", None, "Test 9000 has 6.1"),
                          (r"7.0\n5.2\n", None, "Test 9000 has 5.2 7.0"),
                          (r"9.0\n", "70", "GPU_COMPUTE_CAPABILITY is 70"),
                          ("", "ninety", "GPU_COMPUTE_CAPABILITY is ninety")])
def test_too_old(answers, given, words, make):
    """One line instead of the compiler's many; what needs no card goes on."""
    given = ["GPU_COMPUTE_CAPABILITY=" + given] if given else []
    for target in ("train_gpt2_compactcu", "test_gpt2cu"):
        done = make(answers, "-s", target, *given)
        assert (done.returncode == 2
                and f"{target} needs a card of compute capability " in done.stdout
                and words in done.stdout), done.stdout
        assert done.stderr.count("\n") == 1, done.stderr  # make's own
    demo = make(answers, "-n", "demo", *given)
    assert (demo.returncode == 0 and "nvcc" not in demo.stdout
            and "./train_gpt2_compact --train" in demo.stdout)


def test_demo_takes_the_card(make):
    assert "./train_gpt2_compactcu --train" in make(r"9.0\n", "-n", "demo").stdout


def test_warnings_stop_only_where_asked(make):
    assert "-Werror" not in make(r"9.0\n", "-n", "train_gpt2_compactcu").stdout
    assert "-Werror all-warnings" in make(r"9.0\n", "-n", "train_gpt2_compactcu",
                                          "EXTRA=-Werror").stdout

# ----------------------------------------------------------------------------
# a Mac without libomp


def test_a_mac_without_libomp(tmp_path):
    script(tmp_path / "bin/uname", "echo Darwin")
    script(tmp_path / "bin/c++", "case $* in *-lomp*|*-fopenmp*) exit 1 ;; esac")
    for arguments, words in ([], "brew install libomp"), (["NO_OPENMP=1"],
                                                          "no OpenMP: one thread;"):
        done = subprocess.run(["make", "found", "CXX=c++", *arguments], cwd=ROOT,
                              env=settings(tmp_path / "bin"), capture_output=True, text=True)
        assert done.returncode == 0 and words in done.stdout, done
    script(tmp_path / "bin/c++", "case $* in *-lomp*) ;; *-fopenmp*) exit 1 ;; esac")
    done = subprocess.run(["make", "found", "CXX=c++"], cwd=ROOT, env=settings(tmp_path / "bin"),
                          capture_output=True, text=True)
    assert "-Xclang -fopenmp" in done.stdout and "brew" not in done.stdout, done


def test_help_names_targets_and_settings():
    said = subprocess.run(["make", "help"], cwd=ROOT, env=settings(ROOT), capture_output=True,
                          text=True).stdout
    for word in ("make check", "make test", "NATIVE=", "CXX=", "NO_BLAS=1",
                 "GPU_COMPUTE_CAPABILITY="):
        assert word in said, word

# ----------------------------------------------------------------------------
# dev/setup.sh

# A Python whose packages are the lines of a file: it makes environments, which are copies of
# itself, and has a pip.
PYTHON = """
echo "python $*" >> CALLS
case $* in
    *"-m venv"*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
    *"-m pip install"*) [ -z "$NO_NETWORK" ] || { echo "no network" >&2; exit 1; } ;;
    *ensurepip*) grep -qx python3-venv THERE ;;
    *torch*) grep -qx python3-torch THERE ;;
esac
"""


class Machine:
    """A machine with a checkout that holds dev/setup.sh, and some packages."""

    def __init__(self, folder, there, user=0):
        self.folder, self.calls, self.there = folder, folder / "calls", folder / "there"
        (folder / "dev/test").mkdir(parents=True)
        shutil.copy(ROOT / "dev/setup.sh", folder / "dev")
        (folder / "dev/test/requirements.txt").write_text("numpy\n")
        self.there.write_text("".join(package + "\n" for package in there.split()))
        fill = lambda text: text.replace("CALLS", str(self.calls)).replace("THERE", str(self.there))
        tools = {"id": f"echo {user}", "uname": "echo Linux", "sudo": "exit 1",
                 "python3": fill(PYTHON),
                 "c++": fill('case $* in *boost*) grep -qx libboost-context-dev THERE ;; *) '
                             'grep -qx g++ THERE ;; esac'),
                 "mpicxx": fill("grep -qx libopenmpi-dev THERE"),
                 "mpirun": fill("grep -qx openmpi-bin THERE"),
                 "pkg-config": fill("grep -qx pkg-config THERE && case $* in *openblas) grep -qx "
                                    "libopenblas-dev THERE ;; *gtest) "
                                    "grep -qx libgtest-dev THERE ;; esac"),
                 "apt-get": fill('echo "apt-get $*" >> CALLS; for p; do case $p in install|-*) ;; '
                                 '"$BAD") echo "E: no $BAD"; exit 100 ;; esac; done\n[ "$1" = '
                                 'update ] || for p; do case $p in install|-*) ;; *) '
                                 'echo $p >> THERE ;; esac; done')}
        for name, text in tools.items():
            script(folder / "bin" / name, text)

    def setup(self, **more):
        """What it says, what it called, and its status."""
        self.calls.write_text("")
        done = subprocess.run([self.folder / "dev/setup.sh"],
                              env=settings(self.folder / "bin", **more), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        return done.stdout, self.calls.read_text(), done.returncode


ALL = ("g++ pkg-config libopenblas-dev libgtest-dev libboost-context-dev libopenmpi-dev "
       "openmpi-bin python3-venv python3-torch")
HAVE = {"PYTHON": "python3", "NVCC": "/usr/local/cuda/bin/nvcc"}


def test_setup_as_root(tmp_path):
    """It says what it brings, and a second time there is nothing to say."""
    machine = Machine(tmp_path, "g++ python3-torch")
    said, calls, status = machine.setup(**HAVE)
    assert status == 0, said
    lines = said.splitlines()
    assert lines[0] == ("setup: installing pkg-config libopenblas-dev libgtest-dev "
                        "libboost-context-dev libopenmpi-dev openmpi-bin python3-venv (apt-get)")
    assert (len(lines) == 2 and "requirements.txt" in lines[1] and "nvidia" not in calls
            and "apt-get update" in calls)
    said, calls, status = machine.setup(**HAVE)
    assert (said, status) == ("", 0) and "apt-get" not in calls and "pip install" not in calls
    os.utime(tmp_path / "dev/test/requirements.txt")  # as if it had changed
    said, calls, status = machine.setup(**HAVE)
    assert said.splitlines() == [lines[1]] and "apt-get" not in calls


def test_setup_without_a_toolkit(tmp_path):
    machine = Machine(tmp_path, ALL)
    said, calls, status = machine.setup(PYTHON="python3", NVCC="")
    assert (status == 0 and "NVIDIA" in said and "nvidia-cuda-nvcc" in calls
            and "nvidia-cuda-runtime" in calls), said
    assert machine.setup(PYTHON="python3", NVCC="")[0] == ""


def test_setup_where_a_package_is_unknown(tmp_path):
    """The others are there, and the line names it."""
    machine = Machine(tmp_path, "g++ pkg-config python3-torch")
    said, _, status = machine.setup(**HAVE, BAD="libboost-context-dev")
    assert status == 0 and "libboost-context-dev: E: no libboost-context-dev" in said, said
    assert {"libgtest-dev", "libopenblas-dev", "python3-venv"} <= set(
        machine.there.read_text().split())


def test_setup_without_rights(tmp_path):
    """
    One line with the command; what can be had without is had, PyTorch by pip. Without a compiler or
    venv there is no going on.
    """
    machine = Machine(tmp_path / "some", "g++ pkg-config python3-venv", user=1000)
    said, calls, status = machine.setup(**HAVE)
    assert status == 0 and "apt-get" not in calls, said
    assert said.splitlines()[0].endswith(": sudo apt-get install --no-install-recommends "
                                         "libopenblas-dev libgtest-dev libboost-context-dev "
                                         "libopenmpi-dev openmpi-bin")
    assert "PyTorch" in said and re.search(r"pip install .* torch$", calls, re.M)
    for lacking in ("g++", "python3-venv"):
        machine = Machine(tmp_path / lacking, ALL.replace(lacking, ""), user=1000)
        said, calls, status = machine.setup(**HAVE)
        assert (status == 2 and len(said.splitlines()) == 2
                and f"sudo apt-get install --no-install-recommends {lacking}" in said), said
        assert "pip install" not in calls


def test_setup_without_network(tmp_path):
    machine = Machine(tmp_path, ALL)
    said, _, status = machine.setup(**HAVE, NO_NETWORK="1")
    assert status == 2 and said.splitlines()[-1] == "setup: the tests need these packages", said
    said, _, status = machine.setup(**HAVE)
    assert status == 0 and "requirements.txt" in said  # what failed is not taken for done
