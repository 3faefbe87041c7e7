"""The last line of a report counts the tests of all folders: that is dev/conftest.py's."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_last_line_counts_all_folders():
    tests = ["dev/nogpu/test_nogpu.py::test_lines_keep_their_numbers",
             "dev/test/test_static.py::test_reads_loads"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
                          cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0
            and done.stdout.splitlines()[-1] == "2 passed, 0 failed"), done.stdout
