"""The last line of `pytest dev`: it counts the tests of all folders, as dev/conftest.py has it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_last_line_counts_all_folders():
    names = ["test_lines_keep_their_numbers", "test_reads_loads"]  # of dev/nogpu and dev/test; neither needs anything built
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "dev", "-k", " or ".join(names)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "2 passed, 0 failed", done.stdout
