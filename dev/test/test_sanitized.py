"""The tests again, with the trainer and the unit tests built with AddressSanitizer and UBSan: a finding ends the program, so its test fails."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ["test_cpu.py", "test_training.py", "test_checkpoint.py", "test_options.py", "test_plan.py", "test_parity.py"]
# Not for the sanitizers, which take time and memory of their own; these run without.
LEFT_OUT = "not loss_curve and not random_moments and not live and not takes_what_its_plan and not needs_no_memory and not not_enough_memory"


@pytest.mark.parametrize("name", FILES)
def test_sanitized(name):
    binaries = {"TRAINER": ROOT / "build/train_sanitized", "TEST_CPU": ROOT / "build/test_cpu_sanitized"}
    for path in binaries.values():
        if not path.exists():
            pytest.skip(f"{path.relative_to(ROOT)} is not built")
    environment = dict(os.environ, **{key: str(path) for key, path in binaries.items()})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(name)), "-k", LEFT_OUT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
