"""
dev/gpu_check.sh without a GPU: its list of parts, its readers and its tables, and whole runs with
stand-ins for the tools.

In the whole runs nvidia-smi, nvcc, make and compute-sanitizer are small scripts, and what `make`
builds is the CPU trainer under the CUDA trainer's name, held to a tiny model: its plans and logs
are real.
"""

import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TRAINER = os.path.abspath(os.environ.get("TRAINER", ROOT / "train_gpt2_compact"))

spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "dev/gpu_check.py")
gpu_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)

# ----------------------------------------------------------------------------
# a machine with a GPU, as far as the script sees

NVIDIA_SMI = """#!/bin/bash
case "$*" in
    *-lms*) echo "500, 210, 70.00"; while sleep 0.1; do echo "2548, 1980, 600.50"; done ;;
    *--query-gpu=name*driver_version*)
        echo "NVIDIA Test 9000, 580.1, 9.0, 11000, 10000, 500, 210, 1980, 3201, 700.00, 30" ;;
    *--query-gpu=name*) echo "NVIDIA Test 9000" ;;
    *) echo "| NVIDIA-SMI 580.1    Driver Version: 580.1    CUDA Version: 13.0 |" ;;
esac
"""
NVCC = """#!/bin/bash
echo "Cuda compilation tools, release 13.0, V13.0.88"
"""
MAKE = """#!/bin/bash
case "$*" in *FP32*) [ -z "$NO_FP32" ] || { echo "error: no FP32 today"; exit 2; } ;; esac
cat > train_gpt2_compactcu <<'END'
#!/bin/bash
exec {trainer} "$@" --channels 64 --layers 1 --heads 1 --context 32 -t 32 --train {text}
END
cat > test_gpt2cu <<'END'
#!/bin/bash
echo "dump        grad.qkvw.0      1.00e-03 of 2.00e-03      0.1 s  ok"
[ -z "$SLOW_TEST" ] || sleep 1000
if [ "$BAD_TEST" ]; then
    echo "curve-full-rank   loss    9.00e-03 of 2.00e-03      0.1 s  FAILED"
    exit 1
fi
echo "curve-sparse   loss     1.00e-03 of 2.00e-03      0.1 s  ok"
END
chmod +x train_gpt2_compactcu test_gpt2cu
"""
SANITIZER = """#!/bin/bash
echo "========= COMPUTE-SANITIZER"
case $2 in
    racecheck) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ;;
    *) echo "========= ERROR SUMMARY: 0 errors" ;;
esac
"""
NO_TORCH = "import sys\nprint('torch_gpt2.py: PyTorch is not here')\nsys.exit(3)\n"


@pytest.fixture
def machine(tmp_path, text):
    """start(*options, **environment): the script, on a copy of what it needs, as a process."""
    if not os.path.exists(TRAINER):
        pytest.skip("the CPU trainer is not built")
    for name in ("gpu_check.sh", "gpu_check.py", "roofline.py"):
        (tmp_path / "dev").mkdir(exist_ok=True)
        shutil.copy(ROOT / "dev" / name, tmp_path / "dev" / name)
    (tmp_path / "dev/torch_gpt2.py").write_text(NO_TORCH)
    (tmp_path / "bin").mkdir()
    make = MAKE.replace("{trainer}", TRAINER).replace("{text}", str(text))
    for name, script in {"nvidia-smi": NVIDIA_SMI, "nvcc": NVCC, "make": make,
                         "compute-sanitizer": SANITIZER}.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    processes = []

    def start(*options, **environment):
        others = [folder for folder in os.environ["PATH"].split(os.pathsep)
                  if not (Path(folder) / "compute-sanitizer").exists()]
        settings = dict(os.environ, PATH=os.pathsep.join([str(tmp_path / "bin"), *others]),
                        CUDA_HOME="/nonexistent", OMP_NUM_THREADS="1", REVISION="v1-2-gabc",
                        PYTHON=sys.executable, **environment)
        command = ["bash", str(tmp_path / "dev/gpu_check.sh"), *options]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                          text=True, env=settings))
        return processes[-1]
    yield start
    for process in processes:
        process.kill()
        process.wait()


def results(tmp_path, suffix=""):
    stem = tmp_path / "dev/results" / f"nvidia-test-9000-v1-2-gabc{suffix}"
    known = json.loads(stem.with_name(stem.name + ".json").read_text())
    return known, {r["name"]: r
                   for r in known["parts"]}, stem.with_name(stem.name + ".md").read_text()


def test_a_quick_run(machine, tmp_path):
    process = machine("--quick")
    said, _ = process.communicate(timeout=170)
    assert process.returncode == 0, said
    known, parts, table = results(tmp_path, "-quick")
    assert known["device"] == "NVIDIA Test 9000" and known["driver"] == "580.1"
    assert known["cuda_toolkit"] == "13.0" and known["cuda_of_the_driver"] == "13.0"
    assert (known["revision"] == "v1-2-gabc" and known["date"]
            and known["details"]["clocks.max.sm"] == "1980")
    assert {r["state"] for r in parts.values()} == {"ok"} and all(r["commands"]
                                                                  for r in parts.values()), said
    assert parts["test bf16"]["figures"]["passed"] == 2
    full, sparse = parts["d12 full rank, "
                         "level 0"]["figures"], parts["d12 1/4 sparse, level 0"]["figures"]
    assert (full["steps"] == sparse["steps"] == 10
            and full["ms_least"] <= full["ms"] <= full["ms_most"])
    assert (full["batch"] == sparse["batch"] == gpu_check.BATCH
            and full["plan_bytes"] == full["full_rank_plan_bytes"] > sparse["plan_bytes"])
    assert full["largest_batch"] < sparse["largest_batch"]
    assert (full["peak_bytes"] == 2048 << 20 and full["clock_mhz"] == 1980
            and full["power_w"] == 600.5)
    assert "| d12 | 64 | 1/4 sparse | 0 |" in table and "memcheck bf16 sparse | ok" in table
    assert "d48 full rank level 0" in table.split("## Left out")[1]
    assert ("train_gpt2_compactcu_bf16 --train build/gpu_check/tokens.bin -e d12 -b 64"
            in table.split("## Commands")[1])
    assert ((tmp_path / "train_gpt2_compactcu").exists()
            and not list((tmp_path / "dev/results").glob("*.tmp")))


def test_what_fails_is_told_and_the_rest_goes_on(machine, tmp_path):
    process = machine("--only", "d12 1/8 sparse, level 1", "--out", str(tmp_path / "elsewhere"),
                      NO_FP32="1")
    said, _ = process.communicate(timeout=100)
    assert (process.returncode == 1 and "build fp32: failed" in said
            and "1 failed: build fp32" in said), said
    known = json.loads(next((tmp_path / "elsewhere").glob("*-part.json")).read_text())
    parts = {r["name"]: r for r in known["parts"]}
    assert "no FP32 today" in parts["build fp32"]["why"] and parts["d12 1/8 sparse, "
                                                                   "level 1"]["state"] == "ok"
    assert "error: no FP32 today" in next(
        (tmp_path / "elsewhere").glob("*.md")).read_text().split("## Failed")[1]


def test_two_checks(machine, tmp_path):
    """Neither at the same time, nor one over the other's results."""
    (tmp_path / "build/gpu_check").mkdir(parents=True, exist_ok=True)
    held = os.open(tmp_path / "build/gpu_check", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    process = machine("--only", "nothing")
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 2 and "another check is at work" in said
    assert not (tmp_path / "dev/results").exists()
    os.close(held)
    for suffix in "-part", "-part-2":
        process = machine("--only", "nothing")
        said, _ = process.communicate(timeout=100)
        assert process.returncode == 0, said
        first = results(tmp_path, "-part")[2]
        assert "build bf16" in results(tmp_path, suffix)[1]
    assert results(tmp_path, "-part")[2] == first


def test_a_failing_test(machine, tmp_path):
    process = machine("--only", "test", BAD_TEST="1")
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 1, said
    why = results(tmp_path, "-part")[1]["test fp32"]["why"]
    assert why == ("ended with status 1: 1 passed, 1 failed\n"
                   "curve-full-rank  loss  9.00e-03 of 2.00e-03  0.1 s  FAILED")


def test_tools_that_are_not_here(machine, tmp_path):
    (tmp_path / "bin/compute-sanitizer").unlink()
    process = machine("--only", "c")  # parts with a c in their names: the sanitizers and PyTorch
    said, _ = process.communicate(timeout=250)
    assert process.returncode == 0, said
    known, parts, table = results(tmp_path, "-part")
    lacking = {name for name, r in parts.items() if r["state"] == "not here"}
    assert lacking == {p.name for p in gpu_check.all_parts()
                       if p.kind == "sanitizer" or "PyTorch" in p.name}
    assert ("PyTorch d24: torch_gpt2.py: PyTorch is not here" in table
            and "racecheck bf16 sparse: compute-sanitizer was not found" in table)


def test_ends_in_time(machine, tmp_path):
    began = time.monotonic()
    process = machine("--minutes", "0.25", SLOW_TEST="1")
    said, _ = process.communicate(timeout=60)
    # what a busy machine may take to start and end all processes; the test would sleep 1000 s
    assert time.monotonic() - began < 15 + 10, said
    known, parts, table = results(tmp_path)
    assert (process.returncode == 0 and parts["test bf16"]["state"] == "cut off"
            and "d48 full rank, level 0" in known["left_out"])
    assert "left out: " in said and "PyTorch d12" in said


def running_in(folder):
    """The processes that work in a folder, where the system shows them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found += [process.name] if os.readlink(process / "cwd").startswith(str(folder)) else []
        except OSError:
            pass  # another's, or gone by now
    return found


def test_an_interruption_loses_nothing(machine, tmp_path):
    process = machine(SLOW_TEST="1")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("dev/results/*.md")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert results(tmp_path)[1]["build bf16"]["state"] == "ok"  # while the next part runs
    while not (tmp_path / "build/gpu_check/test_bf16.log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(running_in(tmp_path)) >= 2 or not Path("/proc").exists()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    known, parts, table = results(tmp_path)
    assert (process.returncode == 130 and parts["test bf16"]["why"] == "interrupted"
            and len(known["left_out"]) > 60)
    assert running_in(tmp_path) == [], "a program of the check is still running"

# ----------------------------------------------------------------------------
# the command line


def bare(tmp_path, *tools):
    """A PATH with these tools, and little else."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in ("bash", "dirname", "env", "git", "python3"):
        (folder / tool).symlink_to(sys.executable if tool == "python3" else shutil.which(tool))
    for tool in tools:
        (folder / tool).write_text("#!/bin/bash\n")
        (folder / tool).chmod(0o755)
    return dict(os.environ, PATH=str(folder), CUDA_HOME="/nonexistent")


@pytest.mark.parametrize("there, missing", [([], "nvidia-smi"), (["nvidia-smi"], "nvcc"),
                                            (["nvidia-smi", "nvcc"], "make")])
def test_a_tool_is_missing(tmp_path, there, missing):
    done = subprocess.run(["bash", str(ROOT / "dev/gpu_check.sh")], env=bare(tmp_path, *there),
                          capture_output=True, text=True)
    assert (done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
            and missing in done.stderr), done


def test_no_driver(tmp_path):
    environment = bare(tmp_path, "nvidia-smi", "nvcc", "make")
    (tmp_path / "tools/nvidia-smi").write_text("#!/bin/bash\nexit 9\n")
    done = subprocess.run(["bash", str(ROOT / "dev/gpu_check.sh")], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "gpu_check.sh: nvidia-smi finds no GPU\n"


@pytest.mark.parametrize("options", [["--minutes", "0"], ["--minutes", "x"], ["--minutes", "nan"],
                                     ["--nonsense"], ["--only"]])
def test_bad_options(tmp_path, options):
    done = subprocess.run(["bash", str(ROOT / "dev/gpu_check.sh"), "--dry-run", *options],
                          env=bare(tmp_path), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and options[0] in done.stderr


def test_dry_run_lists_all_parts(tmp_path):
    """With no tool but Python, and nothing written."""
    done = subprocess.run(["bash", str(ROOT / "dev/gpu_check.sh"), "--dry-run"], env=bare(tmp_path),
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    names = [line.split(". ", 1)[1].split(" (about")[0] for line in done.stdout.splitlines()
             if line[0].isdigit()]
    assert len(names) == len(set(names))
    for model in ("d12", "d24", "d48"):
        assert f"PyTorch {model}" in names
        for level in (0, 1, 2):
            methods = ["full rank"] + [f"{rank} {projection}" for rank in ("1/2", "1/4", "1/8")
                                       for projection in ("gaussian", "sparse")]
            assert {f"{model} {method}, level {level}" for method in methods} <= set(names)
    for precision in ("bf16", "fp32"):
        assert {f"build {precision}", f"test {precision}"} <= set(names)
        assert {f"{tool} {precision} sparse"
                for tool in ("memcheck", "racecheck", "initcheck", "synccheck")} <= set(names)
    first = ["test bf16", "test fp32", "d12 full rank, level 0", "d12 1/4 sparse, level 0",
             "d12 1/4 sparse muon, level 0", "PyTorch d12", "memcheck bf16 sparse",
             "racecheck bf16 muon", "d24 full rank, level 0", "d48 full rank, level 0",
             "d12 1/2 gaussian, level 1"]
    # the most important first
    assert [names.index(name) for name in first] == sorted(names.index(name) for name in first)
    for words in ("make -B -k -j2 train_gpt2_compactcu test_gpt2cu PRECISION=FP32",
                  "compute-sanitizer --tool racecheck",
                  "--rank 0.125 --projection sparse --optimizer adamw -r 2", "--plan=json",
                  "dev/torch_gpt2.py --model d48 --batch 64 --seq 1024"):
        assert words in done.stdout
    assert str(ROOT) not in done.stdout


def test_quick_is_short():
    quick = [part for part in gpu_check.all_parts() if part.quick]
    assert {"test bf16", "d12 full rank, level 0",
            "d12 1/4 sparse, level 0"} <= {p.name for p in quick}
    assert sum(p.seconds for p in quick) < 170
    assert not any("fp32" in part.name or "PyTorch" in part.name for part in quick)

# ----------------------------------------------------------------------------
# readers and tables

LOG = [{"revision": "v1", "device": "d", "options": {}, "plan": {}}] + [
    {"step": i + 1, "loss": 10.0 - i, "norm": 1.0, "lr": 1e-4, "ms": ms, "tokens_per_second": 1.0}
    for i, ms in enumerate([900.0, 50.0, 9.0, 9.0, 30.0, 10.0, 20.0])]


def test_reads_a_log(tmp_path):
    lines = [json.dumps(record) for record in LOG] + ['{"step": 7, "val_loss": 3.5}',
                                                      '{"step": 8, "loss": 1.0, "no']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    records = gpu_check.read_log(tmp_path / "log.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6,
                                            7] and gpu_check.read_log(tmp_path / "none") == []
    figures = gpu_check.step_figures(records, flops=4e12, tokens=1000)
    # 4e12 / 0.02 s
    assert (figures["ms"] == 20.0 and figures["tokens_per_second"] == 50_000
            and figures["tflops"] == 200)
    assert (figures["ms_least"], figures["ms_most"], figures["steps"]) == (10.0, 30.0, 7)
    assert (figures["first_loss"], figures["last_loss"]) == (10.0, 4.0)
    assert (gpu_check.step_figures(records[:4], 1, 1)["steps"] == 4
            and "ms" not in gpu_check.step_figures(records[:4], 1, 1))
    assert gpu_check.step_figures([], 1, 1) == {"steps": 0}


def test_reads_the_tests_lines():
    said = ("a   grad   1e-3 of 2e-3    0.1 s  ok\nb   is not finite      0.1 s  FAILED\nc  x  0.2 "
            "s  ok\n2 passed, 1 failed\n")
    assert gpu_check.read_test(said) == {"passed": 2, "failed": 1,
                                         "failures": ["b  is not finite  0.1 s  FAILED"]}
    assert gpu_check.read_test("Segmentation fault\n") == {"passed": 0, "failed": 0, "failures": []}


def test_reads_the_sanitizer():
    assert gpu_check.read_sanitizer("========= ERROR SUMMARY: 0 errors\n")["findings"] == 0
    assert gpu_check.read_sanitizer("========= ERROR SUMMARY: 12 errors\n") == {
        "summary": "12 errors", "findings": 12}
    assert gpu_check.read_sanitizer("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, "
                                    "1 warning)\n")["findings"] == 2
    assert gpu_check.read_sanitizer("killed\n") == {"summary": None, "findings": None}


def test_reads_samples():
    rows = [[500.0, 210.0, 70.0], [600.0, 300.0, 90.0], [4596.0, 1900.0, 600.0],
            [4000.0, 1700.0, None], [500.0, 210.0, 70.0]]
    assert gpu_check.read_samples(rows) == {"peak_bytes": 4096 << 20, "clock_mhz": 1800.0,
                                            "power_w": 600.0}
    assert gpu_check.read_samples([]) == gpu_check.read_samples(rows[:1]) == gpu_check.read_samples(
        [[None, 1.0, 1.0]]) == {}
    assert gpu_check.number(" 12.5 ") == 12.5 and gpu_check.number(" [N/A]") is None


@pytest.mark.parametrize("each, fixed, room", [(100, 1000, 5000), (100, 1000, 1099), (7, 0, 10_000),
                                               (64, 31, 95), (100, 1000, 10)])
def test_largest_batch(each, fixed, room):
    def bytes_of(batch):
        return -(-(fixed + each * batch) // 256) * 256  # tensors begin on 256 bytes
    fitting = [b for b in range(1, 3000) if bytes_of(b) <= room]
    most = max(fitting, default=0)
    assert (most - 2 <= gpu_check.largest_batch(bytes_of, room) <= most
            and gpu_check.largest_batch(bytes_of, room, 3) <= 3)
    if most:
        assert gpu_check.largest_batch(bytes_of, room) > 0


def made_up():
    def timing(name, state="ok", why="", **figures):
        return {"name": name, "kind": "timing", "state": state, "why": why, "seconds": 9.0,
                "commands": ["run " + name], "figures": figures}
    full = dict(model="d12", rank="1", projection=None, recompute=0, batch=64, ms=200.0,
                predicted_ms=190.0, tokens_per_second=327680.0, tflops=300.4, mfu_percent=31,
                steps=20, last_loss=10.8251, plan_bytes=30 << 30, peak_bytes=31 << 30,
                largest_batch=250)
    sparse = dict(full, rank="0.25", projection="sparse", ms=160.0, plan_bytes=20 << 30,
                  peak_bytes=21 << 30, largest_batch=400)
    torch = dict(model="d12", rank="1", projection=None, recompute=None, batch=64, ms=250.0,
                 tokens_per_second=262144.0, steps=20, last_loss=10.9, torch="2.9", how="compiled",
                 micro_batch=64, allocated_bytes=40 << 30)
    details = ("compute_cap", "memory.total", "memory.free", "clocks.sm", "clocks.max.sm",
               "clocks.mem", "power.limit")
    test = {"name": "test bf16", "kind": "test", "state": "failed",
            "why": "ended with status 1: 3 passed, 1 failed\nx FAILED", "seconds": 3.2,
            "commands": ["./test"], "figures": {"passed": 3, "failed": 1}}
    return {"date": "2025-01-01 00:00 UTC", "revision": "v1", "device": "NVIDIA X", "driver": "1",
            "cuda_toolkit": "13.0", "cuda_of_the_driver": "13.0", "minutes": 9.0, "seconds": 500.0,
            "details": {name: "1" for name in details},
            "parts": [test, timing("d12 full rank, level 0", **full),
                      timing("d12 1/4 sparse, level 0", **sparse), timing("PyTorch d12", **torch),
                      timing("d12 1/4 sparse muon, level 0", **dict(sparse, optimizer="muon")),
                      timing("d12 1/4 gaussian, level 0", "failed", "--plan=json: boom")],
            "left_out": ["d48 full rank, level 0"]}


def test_the_table():
    text = gpu_check.markdown(made_up())
    lines = text.splitlines()
    assert ("| d12 | 64 | full rank | 0 | 200.0 | 190.0 | 327,680 | 300 | 31 | 1.00 | 30.00 | "
            "31.00 | 250 | 20 | 10.8251 |  |"
            in lines)
    assert ("| d12 | 64 | 1/4 sparse | 0 | 160.0 | 190.0 | 327,680 | 300 | 31 | 1.25 | 20.00 | "
            "21.00 | 400 | 20 | 10.8251 |  |"
            in lines)
    assert ("| d12 | 64 | 1/4 sparse muon | 0 | 160.0 | 190.0 | 327,680 | 300 | 31 | 1.25 | 20.00 "
            "| 21.00 | 400 | 20 | 10.8251 |  |"
            in lines)
    assert ("| d12 | 64 | PyTorch |  | 250.0 |  | 262,144 |  |  | 0.80 |  |  |  | 20 | 10.9000 |  |"
            in lines)
    assert "| test bf16 | failed | 3 | 3 passed, 1 failed |" in lines
    assert ("- test bf16: ended with status 1: 3 passed, 1 failed" in lines
            and "      x FAILED" in lines)
    assert ("- d12 1/4 gaussian, level 0: --plan=json: boom" in lines
            and "d48 full rank level 0" in lines and "run PyTorch d12" in lines)
    assert "PyTorch 2.9, d12: compiled; micro batch 64; its own peak 40.00 GiB." in lines
    rows = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 2  # two tables, each with rows of one length


def test_nothing_done_yet():
    known = dict(made_up(), parts=[], left_out=[])
    assert "Failed" not in gpu_check.markdown(known) and "| model" not in gpu_check.markdown(known)


def test_file_names():
    assert gpu_check.safe("NVIDIA GeForce RTX 4090 (Laptop) "
                          "/ µ") == "nvidia-geforce-rtx-4090-laptop"
    assert gpu_check.safe("v1.0-3-gabc-dirty") == "v1.0-3-gabc-dirty"
    assert gpu_check.safe("../../x") == "x" and gpu_check.safe("") == "unknown"


def test_the_small_model_runs(tmp_path):
    """What compute-sanitizer watches is a run that the trainer takes."""
    if not os.path.exists(TRAINER):
        pytest.skip("the CPU trainer is not built")
    gpu_check.write_tokens(tmp_path / "small.bin", 4096, gpu_check.SMALL_VOCABULARY)
    for projection in ("sparse", "gaussian", "muon"):
        command = gpu_check.sanitizer_commands("memcheck", "BF16", projection,
                                               str(tmp_path / "small.bin"))[0]
        trainer = command.index("./build/train_gpt2_compactcu_bf16")
        done = subprocess.run([TRAINER, *command[trainer + 1:], "-o", str(tmp_path / projection)],
                              capture_output=True, text=True,
                              env=dict(os.environ, OMP_NUM_THREADS="1"))
        assert done.returncode == 0 and len(gpu_check.read_log(tmp_path / projection
                                                               / "log.jsonl")) == 2, done.stderr


def test_pytorch_comparison_runs():
    """
    The model's definition, where there is a PyTorch that is new enough; compiled it is only on a
    GPU.
    """
    torch = pytest.importorskip("torch", reason="no PyTorch")
    if not hasattr(torch.nn.functional, "scaled_dot_product_attention"):
        pytest.skip("PyTorch older than 2.0")
    shape = ["--layers", "2", "--channels", "128", "--vocabulary", "300", "--seq", "32", "--batch",
             "3", "--steps", "3"]
    done = subprocess.run([sys.executable, str(ROOT / "dev/torch_gpt2.py"), "--device", "cpu",
                           "--compile", "none", *shape],
                          capture_output=True, text=True)
    said = json.loads(done.stdout.splitlines()[-1])
    # ln 300 = 5.70
    assert done.returncode == 0 and len(said["ms"]) == 3 and all(5.6 < loss < 5.9
                                                                 for loss in said["losses"])
