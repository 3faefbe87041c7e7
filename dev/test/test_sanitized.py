"""
The tests again, with the trainer and the unit tests built with AddressSanitizer and UBSan: a
finding ends the program, so its test fails.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ["test_cpu.py", "test_training.py", "test_checkpoint.py", "test_options.py", "test_plan.py",
         "test_parity.py"]
# Not for the sanitizers. First what takes time and memory of theirs for the program's. Then what
# reaches no branch of the trainer, by gcov's count, that the others do not reach too, and is half
# of the work: losses of many steps, the same with other numbers.
LEFT_OUT = ["loss_curve", "random_moments", "live", "takes_what_its_plan", "needs_no_memory",
            "not_enough_memory", "without_master_weights", "overfit", "killed_while_saving",
            "goldens_are_what", "updates_over_three_epochs", "files_beyond_2_gib",
            "(compressed_updates and not odd)", "(resume_is_exact and 10)", "test_flops[",
            "test_memory[", "(test_sizes and not GiB)", "ten_muon_steps"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_sanitized(name):
    binaries = {"TRAINER": ROOT / "build/train_sanitized",
                "TEST_CPU": ROOT / "build/test_cpu_sanitized"}
    for path in binaries.values():
        if not path.exists():
            pytest.skip(f"{path.relative_to(ROOT)} is not built")
    environment = dict(os.environ, **{key: str(path) for key, path in binaries.items()})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               str(Path(__file__).with_name(name)), "-k",
               " and ".join("not " + name for name in LEFT_OUT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
