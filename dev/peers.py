#!/usr/bin/env python3
"""
The trainer beside the methods that people would take instead, each from its own package: the same
GPT-2 from the same initial weights, the same tokens in the same order, the same number of steps.
Every method is run at each of its learning rates with the first seed, and the best --best of them
at their best rate with the other seeds; checkpoint, full and ours5, whose losses are those of
another but for rounding, are run once, at the other's best rate. Then each is timed for some steps,
in turn and several times, so that a noisy machine treats all alike. Writes results.csv, results.md
and loss_memory.png into --out. Started again, it goes on: what is done is not done again.

  adamw       full rank, PyTorch's AdamW: the baseline
  checkpoint  the same, with PyTorch's gradient checkpointing of each block
  galore      galore-torch (arXiv 2403.03507)
  apollo      apollo-torch (arXiv 2412.05270)
  lomo        lomo-optim (arXiv 2306.09782): SGD within the backward pass
  adalomo     lomo-optim (arXiv 2310.10195)
  muon        torch.optim.Muon, in PyTorch 2.9 and newer
  velora      arXiv 2405.17991; no package: its formulas, in this file
  compact     CompAct, arXiv 2410.15352; no package: its formulas, in this file
  full        this trainer, --rank 1 --optimizer adamw
  ours        this trainer as it is by default; ours5: with -r 5, which recomputes each block

The packages: pip install torch galore-torch apollo-torch lomo-optim. One that is not there, or
fails, is a row that says so. Data are token shards (data_prep/prepare.py).

example: peers.py --out runs/peers --train 'data/mine/train_*.bin' --val 'data/mine/val_*.bin' \\
             -e d4 --channels 128 --context 128 -b 16 --steps 4000 --warmup 100
"""

import argparse
import csv
import glob
import hashlib
import importlib.metadata
import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from types import SimpleNamespace

import ablate
import plot  # also makes data_prep/common.py known
import common
import hf
from common import Parser, Problem, whole_number
import numpy as np

TOKENS_HEADER = 1024
BETAS, EPS, CLIP, FINAL_LR = (0.9, 0.95), 1e-8, 1.0, 0.1  # the trainer's defaults
MEASURED_STEP = 1  # whose memory is counted: the first one with the optimizer's state
ROUNDS, TIMED_STEPS = 3, 15  # of timing
LINEAR = ["qkv", "attproj", "fc", "fcproj"]
COMPRESSED = ["qkv", "fc", "fcproj"]  # as the trainer's default
# A model .bin's tensors in torch_gpt2.py.
PARTS = {"wte": "wte", "wpe": "wpe", "ln_f": "lnf", "ln_1": "ln1", "attn.c_attn": "qkv",
         "attn.c_proj": "attproj", "ln_2": "ln2", "mlp.c_fc": "fc", "mlp.c_proj": "fcproj"}

# ----------------------------------------------------------------------------
# data


def permute(i, n, seed, stream):
    """The trainer's random permutation of 0..n-1, at i."""
    half = 1
    while 1 << 2 * half < n:
        half += 1
    mask = (1 << half) - 1
    while True:
        for turn in range(6):
            left, right = i >> half, i & mask
            i = right << half | (left ^ (philox(seed, stream, turn << 32 | right) & mask))
        if i < n:
            return i


def philox(seed, stream, index):
    """The first word of Philox4x32-10's block (Salmon et al., SC'11)."""
    low = 0xFFFFFFFF
    c, k = [index & low, index >> 32, stream & low, stream >> 32], [seed & low, seed >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & low, p >> 32 ^ c[3] ^ k[1], p & low]
        k = [k[0] + 0x9E3779B9 & low, k[1] + 0xBB67AE85 & low]
    return c[0]


class Shards:
    """Sequences of T + 1 tokens from token shards, in the trainer's order where a seed is given."""
    SHARDS, SEQUENCES = 9, 10  # purposes of random streams

    def __init__(self, option, pattern, T, seed=None):
        self.T, self.seed = T, seed
        self.paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not self.paths:
            raise Problem(f"{option}: no file matches '{pattern}'; token shards are wanted")
        self.shards = [self.open(option, path) for path in self.paths]
        self.counts = [max(0, len(shard) - 1) // T for shard in self.shards]
        if sum(self.counts) == 0:
            raise Problem(f"{option}: {self.paths[0]}: too few tokens for one sequence of {T}")

    def open(self, option, path):
        with common.reading(path):
            fields, size = np.fromfile(path, "<i4", 4), os.path.getsize(path)
        if (size < TOKENS_HEADER or list(fields[:2]) != [common.TOKENS_MAGIC, 1]
                or size != TOKENS_HEADER + 2 * fields[2] or size == TOKENS_HEADER):
            raise Problem(f"{option}: {path} is no token shard; data_prep/prepare.py makes them")
        self.vocabulary = int(fields[3]) or hf.GPT2_VOCABULARY
        return np.memmap(path, "<u2", "r", TOKENS_HEADER)

    def sequence(self, place):
        epoch, left = divmod(place, sum(self.counts))
        for i in range(len(self.shards)):
            number = i
            if self.seed is not None:
                number = permute(i, len(self.shards), self.seed, epoch << 32 | self.SHARDS)
            if left < self.counts[number]:
                break
            left -= self.counts[number]
        if self.seed is not None:
            stream = epoch << 32 | number << 8 | self.SEQUENCES
            left = permute(left, self.counts[number], self.seed, stream)
        return self.shards[number][left * self.T:(left + 1) * self.T + 1].astype(np.int64)

    def batch(self, place, rows):
        return np.stack([self.sequence(place + row) for row in range(rows)])


def bytes_per_token(val, sequences, folder):
    """As the trainer counts them; None where the tokens' spelling is not known."""
    path = os.path.join(folder, "tokenizer.bin")
    if not os.path.exists(path):
        return 1.0 if val.vocabulary <= 256 else None
    tokenizer = common.read_tokenizer(path)
    lengths = np.array([len(piece) for piece in tokenizer.table])
    if tokenizer.vocabulary > 256:
        lengths[tokenizer.end_of_text] = 0
    return float(np.mean([lengths[val.sequence(i)[1:]].mean() for i in range(sequences)]))

# ----------------------------------------------------------------------------
# memory


def storage(tensor):
    """Where a tensor's numbers lie, and how many bytes lie there."""
    memory = tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()
    return memory.data_ptr(), memory.nbytes()


class Tape:
    """Counts what autograd keeps: each piece of memory once, as long as something keeps it."""

    def __init__(self, known):
        self.known, self.kept, self.live, self.peak = known, {}, 0, 0

    def pack(self, tensor):
        return Kept(self, tensor.detach())

    def unpack(self, kept):
        return kept.tensor


class Kept:
    def __init__(self, tape, tensor):
        self.tape, self.tensor, (self.at, size) = tape, tensor, storage(tensor)
        count, _ = tape.kept.get(self.at, (0, size))
        tape.kept[self.at] = count + 1, size
        if count == 0 and self.at not in tape.known:
            tape.live += size
            tape.peak = max(tape.peak, tape.live)

    def __del__(self):
        count, size = self.tape.kept.pop(self.at)
        if count > 1:
            self.tape.kept[self.at] = count - 1, size
        elif self.at not in self.tape.known:
            self.tape.live -= size


def state_bytes(thing, seen):
    """The bytes of all tensors that an optimizer's state holds, projections included."""
    if hasattr(thing, "data_ptr"):
        at, size = storage(thing)
        new = at not in seen
        seen.add(at)
        return size * new
    if isinstance(thing, dict):
        return sum(state_bytes(value, seen) for value in thing.values())
    if isinstance(thing, (list, tuple)):
        return sum(state_bytes(value, seen) for value in thing)
    return state_bytes(vars(thing), seen) if "project" in type(thing).__module__ else 0

# ----------------------------------------------------------------------------
# methods
# Each makes a model ready and gives update(loss, lr), which does the backward pass and a step, and
# the optimizers, whose state counts.


def groups_of(model, names, linear={}, weight_decay=0.1):
    """Parameter groups: the weights of the linear layers named, with more settings, and the rest,
    in which matrices decay and vectors do not."""
    chosen = [p for name, p in model.named_parameters() if name.endswith(".weight")
              and name.split(".")[-2] in names]
    ids = set(map(id, chosen))
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups = [{"params": [p for p in rest if p.dim() == 2], "weight_decay": weight_decay},
              {"params": [p for p in rest if p.dim() != 2], "weight_decay": 0.0}]
    return groups, {"params": chosen, "weight_decay": weight_decay, **linear}


def stepping(model, *optimizers):
    import torch
    parameters = [p for p in model.parameters() if p.requires_grad]

    def update(loss, lr):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    return update, optimizers


def torch_adamw(groups):
    import torch
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS)


def adamw(model, job):
    groups, linear = groups_of(model, LINEAR)
    return stepping(model, torch_adamw([*groups, linear]))


def checkpoint(model, job):
    import torch
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=True)
    made = adamw(model, job)
    model.blocks = torch.nn.ModuleList(map(Checkpointed, model.blocks))
    return made


def galore(model, job):
    from galore_torch import GaLoreAdamW
    groups, linear = groups_of(model, LINEAR, {"rank": job.rank, "update_proj_gap": 200,
                                               "scale": 0.25, "proj_type": "std"})
    return stepping(model, GaLoreAdamW([*groups, linear], lr=0.0, betas=BETAS, eps=EPS,
                                       no_deprecation_warning=True))


def apollo(model, job):
    from apollo_torch import APOLLOAdamW
    groups, linear = groups_of(model, LINEAR, {
        "rank": job.rank, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std",
        "proj": "random", "scale_type": "channel"})
    return stepping(model, APOLLOAdamW([*groups, linear], lr=0.0, betas=BETAS, eps=EPS))


def fused(optimizer):
    def update(loss, lr):
        if optimizer.clip_grad_norm is not None:
            optimizer.grad_norm(loss)  # a backward pass of its own
        optimizer.fused_backward(loss, lr)
    return update, [optimizer]


def lomo(model, job):
    from lomo_optim import Lomo
    return fused(Lomo(model, lr=0.0, clip_grad_norm=CLIP))


def adalomo(model, job):
    import torch
    from lomo_optim import AdaLomo
    if job.device == "cpu":  # the package moves its state to a GPU without asking
        torch.Tensor.cuda = lambda tensor: tensor
    return fused(AdaLomo(model, lr=0.0, loss_scale=1.0))


def muon(model, job):
    import torch
    if not hasattr(torch.optim, "Muon"):
        raise Problem(f"PyTorch {torch.__version__} has no torch.optim.Muon; 2.9 and newer have")
    groups, linear = groups_of(model, LINEAR)
    return stepping(model, torch_adamw(groups), torch.optim.Muon(
        linear["params"], lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))


def replace_linears(model, made):
    for block in model.blocks:
        for name in COMPRESSED:
            setattr(block, name, made(getattr(block, name)))


def velora(model, job):
    """Keeps of every 1/ratio neighbours of an input their component along one direction, which is
    the mean over the first batch."""
    import torch
    import torch.nn.functional as F

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, direction):
            ctx.save_for_backward(x.reshape(-1, len(direction)) @ direction, weight, direction)
            return F.linear(x, weight, bias)

        @staticmethod
        def backward(ctx, dy):
            kept, weight, direction = ctx.saved_tensors
            rows = dy.reshape(-1, dy.shape[-1])
            x = torch.outer(kept, direction).reshape(len(rows), -1)
            return dy @ weight, rows.T @ x, rows.sum(0), None

    class Linear(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight, self.bias, self.direction = linear.weight, linear.bias, None

        def forward(self, x):
            if self.direction is None:
                mean = x.detach().reshape(-1, round(1 / job.ratio)).mean(0)
                self.direction = mean / mean.norm()
            return Function.apply(x, self.weight, self.bias, self.direction)
    replace_linears(model, Linear)
    return adamw(model, job)


def compact(model, job):
    """Keeps z = x P; the gradient dy^T z, and AdamW's moments, have the shape of `small`, whose
    change by a step is lifted to the weight. P is drawn again wherever it is needed."""
    import torch
    import torch.nn.functional as F

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, small, P):
            ctx.save_for_backward(x @ P, weight)
            return F.linear(x, weight, bias)

        @staticmethod
        def backward(ctx, dy):
            z, weight = ctx.saved_tensors
            rows = dy.reshape(-1, dy.shape[-1])
            return dy @ weight, None, rows.sum(0), rows.T @ z.reshape(len(rows), -1), None

    class Linear(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            m, n = linear.weight.shape
            self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
            r = max(1, round(job.ratio * n))
            self.small = torch.nn.Parameter(linear.weight.new_zeros(m, r))
            self.epoch, self.number = 0, len(compressed)
            compressed.append(self)

        def projection(self):
            generator = torch.Generator(self.weight.device)
            generator.manual_seed(job.seed << 32 | self.epoch << 16 | self.number)
            shape = self.weight.shape[1], self.small.shape[1]
            return torch.randn(shape, generator=generator, device=self.weight.device,
                               dtype=self.weight.dtype) / math.sqrt(shape[1])

        def forward(self, x):
            return Function.apply(x, self.weight, self.bias, self.small, self.projection())
    compressed, steps = [], 0
    replace_linears(model, Linear)
    groups, _ = groups_of(model, [])
    small = [layer.small for layer in compressed]
    ids = set(map(id, small))
    groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in ids]
    groups.append({"params": small, "weight_decay": 0.0})
    base, optimizers = stepping(model, torch_adamw(groups))

    def update(loss, lr):
        nonlocal steps
        base(loss, lr)
        steps += 1
        with torch.no_grad():
            for layer in compressed:  # small has become minus lr times the step
                layer.weight.mul_(1 - lr * 0.1).add_(layer.small @ layer.projection().T)
                layer.small.zero_()
                layer.epoch = steps // 50
    return update, optimizers


# name: what the tables call it, the function or the trainer's flags, learning rates, packages
METHODS = {
    "adamw": ("AdamW, full rank", adamw, [1e-3, 3e-3, 6e-3], []),
    "checkpoint": ("AdamW, gradient checkpointing", checkpoint, [1e-3, 3e-3, 6e-3], []),
    "galore": ("GaLore", galore, [3e-3, 1e-2, 3e-2], ["galore-torch"]),
    "apollo": ("APOLLO", apollo, [3e-3, 1e-2, 3e-2], ["apollo-torch"]),
    "lomo": ("LOMO", lomo, [1e-1, 3e-1, 1.0], ["lomo-optim"]),
    "adalomo": ("AdaLomo", adalomo, [1e-2, 3e-2, 1e-1], ["lomo-optim"]),
    "muon": ("Muon, full rank", muon, [3e-3, 6e-3, 1e-2], []),
    "velora": ("VeLoRA, from its formulas", velora, [1e-3, 3e-3, 6e-3], []),
    "compact": ("CompAct, from its formulas", compact, [3e-3, 5e-3, 1e-2], []),
    "full": ("this trainer, full rank, AdamW", ["--rank", "1", "--optimizer", "adamw"],
             [1e-3, 3e-3, 6e-3], []),
    "ours": ("this trainer, default", [], [4e-3, 6e-3, 8e-3], []),
    "ours5": ("this trainer, default, -r 5", ["-r", "5"], [4e-3, 6e-3, 8e-3], []),
}
# their losses are the other's
TWINS = {"checkpoint": "adamw", "full": "adamw", "ours5": "ours"}

# ----------------------------------------------------------------------------
# one run


def load_model(path, device):
    """The trainer's model file as torch_gpt2.py's model, and its shape."""
    import torch
    import torch.nn.functional as F
    import torch_gpt2
    if not hasattr(F, "scaled_dot_product_attention"):  # before PyTorch 2.0
        def attention(q, k, v, is_causal):
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            return F.softmax(scores.masked_fill(future, -math.inf), 3) @ v
        F.scaled_dot_product_attention = attention
    shape, numbers = hf.open_model(path)
    torch_gpt2.HEAD = shape.channels // shape.heads
    model = torch_gpt2.GPT(shape.layers, shape.channels, shape.context, shape.vocabulary)
    at, state = 0, {}
    for name, wanted, _ in hf.tensors(shape):
        values = numbers[at:at + int(np.prod(wanted))].reshape(wanted)
        at += values.size
        layer, part, kind = hf.split_name(name)
        name = f"blocks.{layer}." * (layer is not None) + f"{PARTS[part]}.{kind}"
        values = values[:shape.vocabulary] if part == "wte" else values
        state[name] = torch.from_numpy(np.array(values))
    model.load_state_dict(state)
    return model.to(device), shape


def learning_rate(step, job):
    """The trainer's cosine, of a step from 0."""
    if step < job.warmup:
        return job.lr * (step + 1) / job.warmup
    low, done = job.lr * FINAL_LR, (step - job.warmup) / max(1, job.steps - job.warmup)
    return low + 0.5 * (1 + math.cos(math.pi * done)) * (job.lr - low)


def run_torch(job):
    """A run in PyTorch: its result."""
    import torch
    torch.manual_seed(job.seed)
    model, shape = load_model(job.init, job.device)
    job.rank = max(1, round(job.ratio * shape.channels))
    train = Shards("--train", job.train, shape.context, job.seed)
    val = Shards("--val", job.val, shape.context)
    known = {storage(p)[0] for p in model.parameters()}
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    update, optimizers = METHODS[job.method][1](model, job)

    def loss_of(rows):
        rows = torch.from_numpy(rows).to(job.device)
        with torch.autocast("cuda", torch.bfloat16) if job.device == "cuda" else nullcontext():
            return model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    losses, speeds, tape, gradients = [], [], Tape(known), 0
    for step in range(job.steps):
        rows, began = train.batch(step * job.batch, job.batch), time.perf_counter()
        model.zero_grad(set_to_none=True)
        if step == min(MEASURED_STEP, job.steps - 1):
            with torch.autograd.graph.saved_tensors_hooks(tape.pack, tape.unpack):
                loss = loss_of(rows)
                update(loss, learning_rate(step, job))
            gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters()
                            if p.grad is not None)
        else:
            loss = loss_of(rows)
            update(loss, learning_rate(step, job))
        if job.device == "cuda":
            torch.cuda.synchronize()
        losses.append(float(loss.detach()))
        speeds.append(job.batch * shape.context / (time.perf_counter() - began))
        if not math.isfinite(losses[-1]):
            break
        if step % 100 == 99:
            print(f"step {step + 1}/{job.steps} | loss {losses[-1]:.4f}", flush=True)
    sequences = min(sum(val.counts), job.val_batches * job.batch)
    with torch.no_grad():
        sums = [float(loss_of(val.batch(at, min(job.batch, sequences - at))))
                * min(job.batch, sequences - at) for at in range(0, sequences, job.batch)]
    val_loss = sum(sums) / sequences
    per_token = bytes_per_token(val, sequences, os.path.dirname(val.paths[0]))
    speeds = [speed for step, speed in enumerate(speeds) if step != MEASURED_STEP]
    state = sum(state_bytes({name: value for name, value in vars(optimizer).items()
                             if name not in ("param_groups", "model", "defaults")}, set(known))
                for optimizer in optimizers)
    result = dict(
        losses=losses, val_loss=val_loss,
        bits_per_byte=per_token and val_loss / math.log(2) / per_token,
        tokens_per_second=float(np.median(speeds[min(ablate.FIRST_STEPS, len(speeds) - 1):])),
        parameter_bytes=parameters, gradient_bytes=gradients, state_bytes=state,
        tape_bytes=tape.peak, total_bytes=None, device=f"PyTorch {torch.__version__}, CPU")
    if job.device == "cuda":
        result.update(total_bytes=torch.cuda.max_memory_allocated(),
                      device=f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}")
    return result


def run_trainer(job):
    """A run of this trainer: its result. The plan is what it allocates."""
    folder = os.path.join(os.path.dirname(job.result), "trainer-" + job.name)
    shutil.rmtree(folder, ignore_errors=True)
    command = [job.binary, "-e", job.init, "--train", job.train, "--val", job.val,
               "-b", job.batch, "-x", job.steps, "-l", job.lr, "-u", job.warmup, "-v", -1,
               "-m", job.val_batches, "-n", 0, "--seed", job.seed, "-o", folder,
               *METHODS[job.method][1]]
    if subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL).returncode:
        raise Problem("the trainer failed, see above")
    log = plot.read_log(folder)
    shutil.rmtree(folder)
    sizes = log.plan["categories"]
    return dict(losses=log.losses.tolist(), val_loss=float(log.val_losses[-1]),
                bits_per_byte=log.bits_per_byte, tokens_per_second=ablate.speed(log),
                parameter_bytes=sizes["parameters"], gradient_bytes=sizes["gradients"],
                state_bytes=sizes["moments"], tape_bytes=sizes["tape"],
                total_bytes=log.plan["total_bytes"], device=log.device)


def run_job(text):
    """What the program does when it is started for one run: the result goes to a file."""
    job = SimpleNamespace(**json.loads(text))
    result = (run_torch if callable(METHODS[job.method][1]) else run_trainer)(job)
    with common.whole_file(job.result) as file:
        file.write(json.dumps(result).encode())

# ----------------------------------------------------------------------------
# all runs


def plan_runs(args, seed, pairs, **change):
    """Runs of pairs (method, learning rate). A run is known by all that it depends on."""
    init = os.path.join(args.out, f"init-s{seed}", "model_00000000.bin")
    runs = []
    for method, lr in pairs:
        job = dict(method=method, lr=lr, seed=seed, init=init, train=args.train, val=args.val,
                   batch=args.batch, steps=args.steps, warmup=args.warmup, ratio=args.ratio,
                   val_batches=args.val_batches, device=args.device, binary=args.binary)
        job.update(change)
        known = dict(job, init=ablate.content(init), binary=os.path.basename(args.binary))
        for option in "train", "val":
            known[option] = list(map(ablate.content, Shards(option, known[option], 1).paths))
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]
        name = "timed-" * ("turn" in change) + f"{method}-lr{lr:g}-s{seed}-{digest}"
        job.update(name=name, result=os.path.join(args.out, name + ".json"))
        runs.append(SimpleNamespace(**job, job=job, found=None, status=ablate.NOT_RUN, choice=""))
    return runs


def take_result(run):
    try:
        with open(run.result, encoding="utf-8") as file:
            run.found = json.load(file)
    except FileNotFoundError:
        return False
    run.status = "ok" if math.isfinite(run.found["val_loss"]) else "diverged"
    return True


def do(run, jobs):
    """One run, where it is not done: in a process of its own, so that what it imports, patches or
    breaks touches no other. It shares the cores with jobs - 1 others. Returns the run."""
    if take_result(run):
        return run
    done = subprocess.run([sys.executable, os.path.abspath(__file__), "--job", json.dumps(run.job)],
                          stdout=sys.stderr, stderr=subprocess.PIPE, text=True, errors="replace",
                          env=ablate.environment(jobs))
    if done.returncode != 0 or not take_result(run):
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        run.status = "failed: " + lines[-1].removeprefix(f"{common.PROGRAM}: ")
    return run


def make_init(args, seed):
    """The initial weights, which the trainer draws and writes."""
    folder = os.path.join(args.out, f"init-s{seed}")
    if not os.path.exists(os.path.join(folder, "model_00000000.bin")):
        shutil.rmtree(folder, ignore_errors=True)
        command = [args.binary, "--train", args.train, *args.shape, "--seed", str(seed), "-x", "0",
                   "-b", str(args.batch), "-n", "-1", "-o", folder]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise Problem(done.stderr.strip() or f"{args.binary}: status {done.returncode}")


def choose(runs):
    """Marks each method's best run, and whether its rate stands at the edge of the list."""
    best = []
    for method in dict.fromkeys(run.method for run in runs):
        tried = [run for run in runs if run.method == method]
        whole = [run for run in tried if run.status == "ok"]
        for run in tried:
            run.choice = ablate.NOT_TAKEN
        if whole:
            taken = min(whole, key=lambda run: run.found["val_loss"])
            rates = [run.lr for run in tried]
            edge = len(rates) > 1 and taken.lr in (min(rates), max(rates))
            taken.choice = ablate.AT_EDGE if edge else ablate.TAKEN
            best.append(taken)
    return sorted(best, key=lambda run: run.found["val_loss"])

# ----------------------------------------------------------------------------
# results


def memory(run):
    """Bytes by which methods are compared: of this trainer all that it allocates."""
    parts = (run.found[part + "_bytes"] for part in ("parameter", "gradient", "state", "tape"))
    return run.found["total_bytes"] or sum(parts)


FIGURES = ["final_train_loss", "val_loss", "bits_per_byte", "tokens_per_second", "memory_bytes",
           "parameter_bytes", "gradient_bytes", "state_bytes", "tape_bytes", "total_bytes",
           "device"]


def row_of(run):
    row = {"name": run.name, "method": METHODS[run.method][0], "lr": run.lr, "seed": run.seed,
           "choice": run.choice, "steps": run.steps, **dict.fromkeys(FIGURES)}
    if run.found:
        row.update({column: run.found.get(column) for column in FIGURES})
        row.update(final_train_loss=float(np.mean(run.found["losses"][-ablate.LAST_STEPS:])),
                   memory_bytes=memory(run))
    return dict(row, status=run.status)


NOTES = """
Every method starts from the same weights, which the trainer drew and wrote, and takes the same
tokens in the same order; its learning rate is the best of those tried with the first seed. Cosine
schedule down to a tenth, weight decay 0.1 on matrices (none in LOMO and AdaLomo), gradients
clipped to a norm of 1 (not in AdaLomo). Rank ratio {ratio:g}: GaLore and APOLLO in all linear
layers (their projection is renewed every 200 steps, scales 0.25 and 1), CompAct (Gaussian, renewed
every 50 steps, alpha 1) and VeLoRA, whose sub-tokens are as long as gives the same memory, in qkv,
fc and fcproj. Muon at full rank takes q, k and v as one matrix.

Speed: mean and standard deviation of {rounds} rounds, in each of which every method is started in
turn for {steps} steps; of a round the median, without the first steps. Those of the runs, below,
stood beside whatever else the machine did.

Memory, of this trainer: all that it allocates, its workspace included. Of PyTorch on a GPU: what it
allocated at its peak. Of PyTorch on a CPU less: parameters, gradients, optimizer's state, and at
its peak what autograd keeps, each piece once (counted by saved-tensor hooks in the second step);
temporaries are not counted. LOMO's and AdaLomo's gradients live one at a time and are counted as
none.
"""


def markdown(args, runs, rows):
    text = f"# Peers\n\n- command: `{shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])}`\n"
    devices = dict.fromkeys(row["device"] for row in rows if row["device"])
    text += "".join(f"- device: {device}\n" for device in devices)
    text += f"- packages: {packages()}\n\n"
    lines = []
    for method in dict.fromkeys(run.method for run in runs):
        those = [(run, row) for run, row in zip(runs, rows) if run.method == method]
        taken = [row for run, row in those if run.choice in (ablate.TAKEN, ablate.AT_EDGE)]
        if not taken:
            lines.append([METHODS[method][0], "", "", "", "", "", "", those[0][0].status])
            continue
        edge = " (edge)" * any(row["choice"] == ablate.AT_EDGE for row in taken)
        failed = [run.status for run, _ in those if run.status not in ("ok", ablate.NOT_RUN)]
        lines.append([METHODS[method][0], len(taken), f"{taken[0]['lr']:g}{edge}",
                      *(ablate.over_seeds(column, taken) for column in
                        ("val_loss", "bits_per_byte")),
                      ablate.over_seeds("tokens_per_second", args.timings.get(method, [])),
                      ablate.shown("memory_bytes", taken[0]["memory_bytes"]),
                      f"{len(failed)} of its rates: {failed[0]}" if failed else ""])
    text += ablate.table(["method", "runs", "lr", "validation loss", "bits per byte", "tokens/s",
                          "memory", "note"], lines)
    text += NOTES.format(ratio=args.ratio, rounds=ROUNDS, steps=TIMED_STEPS)
    text += "\n**(edge): best at the edge of its list of rates; a wider one may have better.**\n"
    text += "\n![loss_memory.png](loss_memory.png)\n\n## Runs\n\n"
    columns = ["method", "lr", "seed", "final_train_loss", "val_loss", "tokens_per_second",
               "parameter_bytes", "gradient_bytes", "state_bytes", "tape_bytes", "status"]
    return text + ablate.table([column.replace("_", " ") for column in columns],
                               [[ablate.shown(column, row[column]) for column in columns]
                                for row in rows])


def packages():
    names = ["torch", *(name for method in METHODS.values() for name in method[3])]
    found = []
    for name in dict.fromkeys(names):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def write_results(args, runs):
    order = list(METHODS)
    runs = sorted(runs, key=lambda run: (order.index(run.method), run.seed, run.lr))
    rows = [row_of(run) for run in runs]
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    ablate.write_whole(os.path.join(args.out, "results.csv"), out.getvalue())
    ablate.write_whole(os.path.join(args.out, "results.md"), markdown(args, runs, rows))
    taken = [run for run in runs if run.choice in (ablate.TAKEN, ablate.AT_EDGE)]
    series = []
    for method in dict.fromkeys(run.method for run in taken):
        those = [run for run in taken if run.method == method]
        number = order.index(method)
        look = dict(plot.look(number), marker=plot.MARKERS[number % len(plot.MARKERS)],
                    linestyle="none", markersize=7)
        points = [(memory(those[0]) / 2**20, [run.found["val_loss"] for run in those],
                   look["marker"])]
        series.append(SimpleNamespace(label=METHODS[method][0], look=look, points=points,
                                      start=None))
    if series:
        plot.draw_series(series, os.path.join(args.out, "loss_memory.png"), "Loss against memory",
                         "memory (MiB)", "final validation loss (nats per token)", frontier=True)

# ----------------------------------------------------------------------------
# the program


def list_of(kind, wanted):
    def parse(text):
        try:
            values = [kind(value) for value in text.split(",")]
        except ValueError:
            values = [None]
        if not all(map(wanted, values)):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of such values, separated by "
                                             "commas")
        return list(dict.fromkeys(values))
    return parse


def ratio(text):
    try:
        value = float(ablate.rank(text))
    except argparse.ArgumentTypeError:
        value = math.inf
    if value > 1:  # a whole rank
        raise argparse.ArgumentTypeError(f"{text!r} is no ratio in (0, 1], such as 1/4")
    return value


def parse_options():
    parser, counts = Parser(__doc__), whole_number(1, 10**9)
    rates = list_of(float, lambda x: x is not None and 0 < x < math.inf)
    seeds = list_of(int, lambda x: x is not None and 0 <= x < 2**31)
    add = parser.add_argument
    add("-o", "--out", metavar="DIR", required=True, help="where results and runs go")
    add("-i", "--train", metavar="PATTERN", required=True, help="token shards")
    add("-j", "--val", metavar="PATTERN", required=True, help="token shards")
    add("-e", "--model", metavar="M", default="d12", help="any dN (default: %(default)s)")
    for name in "channels", "heads", "context":
        add("--" + name, metavar="N", help="override the model's shape")
    add("-b", "--batch", metavar="B", type=counts, default=4,
        help="sequences in a step (default: %(default)s)")
    add("-x", "--steps", metavar="N", type=counts, required=True, help="of each run")
    add("-u", "--warmup", metavar="N", type=whole_number(0, 10**9), default=0,
        help="steps of linear warm-up (default: %(default)s)")
    add("-m", "--val-batches", metavar="N", type=counts, default=20,
        help="of validation (default: %(default)s)")
    add("--ratio", metavar="R", type=ratio, default=0.25,
        help="rank ratio of the methods that have one (default: 1/4)")
    add("--methods", metavar="LIST", type=list_of(str, METHODS.__contains__),
        default=list(METHODS), help="some of those above (default: all)")
    add("--lrs", metavar="LIST", type=rates,
        help="learning rates, of all methods (default: three for each)")
    add("--seeds", metavar="LIST", type=seeds, default=[1], help="(default: 1)")
    add("--best", metavar="N", type=counts, default=3,
        help="methods that get the other seeds (default: %(default)s)")
    add("--jobs", metavar="N", type=whole_number(1, 1024), default=1,
        help="runs at once; timing is one after another (default: %(default)s)")
    add("--binary", metavar="FILE", help="the trainer (default: as ablate.py finds it)")
    args = parser.parse_args()
    args.shape = ["-e", args.model]
    for name in "channels", "heads", "context":
        if getattr(args, name):
            args.shape += ["--" + name, getattr(args, name)]
    return args


def main():
    if sys.argv[1:2] == ["--job"]:  # this program's own word to itself
        return run_job(sys.argv[2])
    args = parse_options()
    for option in "train", "val":
        Shards("--" + option, getattr(args, option), 1)
    try:
        import torch
    except ImportError:
        raise Problem("PyTorch is missing: pip install torch") from None
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.binary = ablate.choose_binary(args.binary)
    with common.holding(args.out):
        compare(args)


def compare(args):
    for seed in args.seeds:
        make_init(args, seed)
    # rates outermost: a machine whose speed drifts then treats all methods alike
    rates = {method: args.lrs or METHODS[method][2] for method in args.methods}
    twins = [method for method in args.methods if TWINS.get(method) in args.methods]
    pairs = [(method, rates[method][i]) for i in range(max(map(len, rates.values())))
             for method in args.methods if i < len(rates[method]) and method not in twins]
    runs = first = plan_runs(args, args.seeds[0], pairs)
    args.timings = {}  # method: its timed runs' results

    def do_all(some):
        pool = ThreadPoolExecutor(args.jobs)
        try:
            for done in as_completed([pool.submit(do, run, args.jobs) for run in some]):
                run = done.result()
                figure = f"val {run.found['val_loss']:.4f}" if run.found else run.status
                print(f"{run.name}: {figure}", flush=True)
                choose(first)
                write_results(args, runs)
        finally:  # interrupted, it begins no more
            pool.shutdown(cancel_futures=True)
    do_all(first)
    best = choose(first)
    lr_of = {run.method: run.lr for run in best}
    others = plan_runs(args, args.seeds[0], [
        (method, lr_of.get(TWINS[method], rates[method][0])) for method in twins])
    runs = first = first + others
    do_all(others)
    best = best[:args.best]
    for seed in args.seeds[1:]:
        others = plan_runs(args, seed, [(run.method, run.lr) for run in best])
        for run, chosen in zip(others, best):
            run.choice = chosen.choice
        runs = runs + others
        do_all(others)
    taken = [(run.method, run.lr) for run in choose(first)]
    for turn in range(ROUNDS):
        for run in plan_runs(args, args.seeds[0], taken, turn=turn, steps=TIMED_STEPS, warmup=0,
                             val_batches=1):
            if do(run, 1).found:
                args.timings.setdefault(run.method, []).append(run.found)
        write_results(args, runs)
    failed = [run for run in runs if not run.found]
    for run in failed:
        print(f"{run.name}: {run.status}", file=sys.stderr)
    print(f"{len(runs) - len(failed)} of {len(runs)} runs are done: "
          + os.path.join(args.out, "results.md"))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    common.run(main)
