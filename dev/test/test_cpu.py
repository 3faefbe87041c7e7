"""
The C++ unit tests of the CPU trainer, test_cpu.cpp and test_curand.cpp: each case of each binary is
a test here.

Nothing is built. The binaries are those that TEST_CPU and TEST_CURAND name, or build/test_cpu and
build/test_curand; the head of each source says how they are made. Where one is missing its tests
are skipped, unless it was named.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# thousands of tiny loops: threads must not spin on a busy machine
PATIENT = {**os.environ, "OMP_WAIT_POLICY": "passive"}
# one case takes 2 s, and some 20 s under AddressSanitizer; the rest is for a busy machine
SECONDS = 600


def binary(variable, name):
    return Path(os.environ.get(variable) or ROOT / "build" / name).resolve()


def cases():
    for variable, name in (("TEST_CPU", "test_cpu"), ("TEST_CURAND", "test_curand")):
        path = binary(variable, name)
        if not path.exists() and not os.environ.get(variable):
            yield pytest.param(path, None, id=name,
                               marks=pytest.mark.skip(reason=f"build/{name} is not there: "
                                                      "its making needs GoogleTest, libgtest-dev"))
            continue
        listed = subprocess.run([path, "--gtest_list_tests"], capture_output=True, text=True,
                                timeout=60, check=True)
        suite = ""
        for line in listed.stdout.splitlines():
            line = line.split("#")[0].rstrip()  # what follows is the value of a parameter
            if line.startswith("  "):
                yield pytest.param(path, suite + line.strip(), id=f"{name}-{suite}{line.strip()}")
            elif line.endswith("."):
                suite = line


@pytest.mark.parametrize("path, case", list(cases()))
def test_case(path, case, tmp_path):
    done = subprocess.run([path, f"--gtest_filter={case}"], cwd=tmp_path, env=PATIENT,
                          timeout=SECONDS, capture_output=True, text=True, errors="replace")
    if "[  SKIPPED ]" in done.stdout:
        pytest.skip(done.stdout)
    if done.returncode != 0 or "[==========] 1 test " not in done.stdout:
        pytest.fail(f"{case}: exit status {done.returncode}\n{(done.stdout + done.stderr)[-8000:]}",
                    pytrace=False)
