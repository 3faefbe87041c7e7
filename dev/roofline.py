#!/usr/bin/env python3
"""
The predicted time of a training step on a GPU, kernel by kernel, from bytes and FLOPs; and that of
llm.c's step for the same model.

    dev/roofline.py --card h100 -e d12 -b 64          a table; other flags are the trainer's
    dev/roofline.py --card 3060 --json -e d48 -b 1    one JSON object

Nothing is run but the trainer's --plan=json. A kernel takes the longer of the times of its bytes
and of its FLOPs, at the card's rates times the efficiencies below, and LAUNCH for each launch. Its
floor is the same at the data sheet's rates. Bytes are those that must come from memory: what a
thread reads again within a row comes from the caches. test_roofline.py holds the launches to those
of a real step.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# the last one's plan has the same shapes, in fp32
BINARIES = ["train_gpt2_compactcu", "train_gpt2_compact_nogpu", "train_gpt2_compact"]
X = 2  # bytes of an activation or weight: bf16

# GB/s; bf16 TFLOP/s with fp32 sums, without sparsity (both by the data sheets); then the share of
# the latter that is reached by large products, and by attention forward and backward. H100:
# cuBLAS's 600 TFLOP/s as published by many, attention as simulated in dev/cuda/attention.md
# (mma.sync has 62 % of wgmma's rate there). A100: 260 TFLOP/s, and attention as FlashAttention-2
# published. GeForce halves the rate of tensor cores with fp32 sums, so they come near it. An L4's
# clock falls under load: 72 W.
CARDS = {"h100": (3350, 989, 0.61, 0.375, 0.43), "a100": (2039, 312, 0.83, 0.55, 0.50),
         "4090": (1008, 165.2, 0.92, 0.75, 0.70), "3060": (360, 25.5, 0.92, 0.75, 0.70),
         "l4": (300, 121, 0.60, 0.45, 0.40)}
# as the driver calls them
NAMES = {"h100": "H100 80GB HBM3", "a100": "A100-SXM4-80GB", "4090": "GeForce RTX 4090",
         "3060": "GeForce RTX 3060", "l4": "NVIDIA L4"}
MEMORY = 0.9  # of the data sheet's bandwidth, as large copies reach
PLAIN = 0.02  # of the tensor cores' rate: attention without them, for heads that are not of 64
LAUNCH = 2e-6  # seconds between a kernel's end and the next one's first results
# seconds a micro batch in which the device waits: a synchronisation, 65,536 losses summed, tokens
# that are there copied, a line written
HOST = 0.3e-3
# attention in llm.c, of the data sheet, forward and backward, on an H100 as FlashAttention-3's
# paper has it; else as above
CUDNN = (0.29, 0.35)

# outputs, inputs in channels
LINEARS = {"qkv": (3, 1), "attproj": (1, 1), "fc": (4, 1), "fcproj": (1, 4)}
# the row of the tape that z stands in for
Z_OF = {"qkv": "ln1", "fc": "ln2", "fcproj": "fch_gelu"}


class Launches:
    """{name: [launches, bytes, FLOPs, seconds, least seconds]} on a card."""

    def __init__(self, card):
        self.bandwidth, peak, product, forward, backward = CARDS[card]
        self.peak = peak * 1e12
        self.reached = {"product": product, "forward": forward, "backward": backward,
                        "plain": PLAIN}
        self.kernels, self.times = {}, 1

    def add(self, name, size, flops=0.0, rate="product", launches=1, late=0):
        """late: of the bytes, those that are read when the sums are done: nothing hides them."""
        bandwidth, sums = self.bandwidth * 1e9, flops / self.peak
        sizes, last = (size - late) / bandwidth, late / bandwidth
        seconds = max(sizes / MEMORY, sums / self.reached[rate]) + last / MEMORY + launches * LAUNCH
        entry = self.kernels.setdefault(name, [0] * 5)
        for i, part in enumerate((launches, size, flops, seconds, max(sizes + last, sums))):
            entry[i] += self.times * part

    def product(self, name, m, n, k, out=X, beta=False, launches=1):
        """c (m, n) = a b, or with beta added to what stands there; the sizes of one launch."""
        self.add("matmul " + name, launches * (X * (m + n) * k + out * m * n * (1 + beta)),
                 launches * 2.0 * m * n * k, launches=launches, late=launches * beta * out * m * n)

    def report(self, tokens, wait):
        rows = {**self.kernels, "waiting for the host": (0, 0, 0, wait, 0.0)}
        rows = [{"name": name, "launches": a, "bytes": round(b), "flops": round(f),
                 "floor_ms": 1e3 * least, "ms": 1e3 * seconds}
                for name, (a, b, f, seconds, least) in rows.items()]
        total = sum(row["ms"] for row in rows)
        return {"total_ms": total, "tokens_per_second": 1e3 * tokens / total,
                "kernels": sorted(rows, key=lambda row: -row["ms"])}


class Shape:
    """
    What the plan says: the model's shape, the options, and how the tape keeps each row (absent: not
    at all).
    """

    def __init__(self, plan):
        tensors = {t["name"]: t for t in plan["tensors"]
                   if t["type"] != "byte" and t["name"] != "alignment"}
        self.options = o = plan["options"]
        self.Vp, self.C = tensors["wte"]["shape"]
        self.L = tensors["ln1w"]["shape"][0]
        self.B, self.T = o["batch"], o["seq"]
        self.N, self.NH = self.B * self.T, tensors["lse"]["shape"][-1]
        self.params = {name: t["shape"] for name, t in tensors.items()
                       if t["category"] == "parameters"}
        self.r = {which: tensors[f"grad.{which}w"]["shape"][2] for which in LINEARS}
        names = [t["name"].split(".") for t in plan["tensors"] if t["category"] == "tape"]
        self.kept = {name: how[0] if how else "whole" for name, *how in names if how != ["scale"]}
        self.ld = (self.Vp + 7) // 8 * 8
        self.micro_batches = o["total-batch"] // self.N

    def linear(self, which):
        """Outputs, inputs, rank, and whether that is less than the inputs."""
        m, n = (self.C * width for width in LINEARS[which])
        return m, n, self.r[which], self.r[which] < n

    def on_tape(self, which):
        return which in Z_OF and self.kept.get(Z_OF[which]) == "z"


def count(shape):
    return shape[0] * count(shape[1:]) if shape else 1


class Step(Launches):
    """The trainer's step, in the order of train_gpt2_compact.cu and by its functions' names."""

    def __init__(self, card, s):
        super().__init__(card)
        self.s, self.NC = s, X * s.N * s.C  # NC: bytes of a channel's width of activations
        self.sparse = s.options["projection"] == "sparse"
        self.times = s.micro_batches
        self.forward()
        self.classifier()
        self.layernorm_backward(accumulate=False)
        for _ in range(s.L):
            self.block_backward()
        words = min(s.N, s.Vp)  # at most so many occur
        self.add("word_backward_kernel", self.NC + 8 * words * s.C)
        self.add("position_backward_kernel", self.NC + 8 * s.T * s.C)
        self.times = 1
        self.update()

    def draw(self, which):
        _, n, r, _ = self.s.linear(which)
        self.add(self.s.options["projection"] + "_kernel", 4 * n if self.sparse else X * n * r)

    def fold(self, which, wanted):
        """The bytes that a kernel writes of z on the way, where it folds."""
        if not (wanted and self.sparse):
            return 0
        self.draw(which)
        return X * self.s.N * self.s.r[which]

    def make_z(self, which):
        _, n, r, _ = self.s.linear(which)
        self.draw(which)
        if self.sparse:
            self.add("fold_kernel", X * self.s.N * (n + r))
        else:
            self.product(f"{which} z", self.s.N, r, n)

    def layernorm(self, which, delta, wanted):
        self.add("layernorm_kernel",
                 self.NC * (2 + 2 * delta) + 8 * self.s.N + self.fold(which, wanted))

    def linear_forward(self, which, training):
        m, n, _, _ = self.s.linear(which)
        self.product(f"{which} forward", self.s.N, m, n)
        if training and self.s.on_tape(which) and not self.sparse:
            self.make_z(which)

    def attention(self, backward):
        """
        Tensor cores: tiles on the diagonal count whole; keys and values, or queries and dout, are
        read again from the cache.
        """
        s = self.s
        flash = s.C == 64 * s.NH
        square = 2.0 * s.B * s.NH * s.T * s.T / 2 * (s.C // s.NH)  # FLOPs of one causal product
        whole = square * (1 + 0.5 / ((s.T + 127) // 128))
        again = (s.T + 127) // 128 / 2  # plain: from memory for every 128 rows
        if not backward and flash:
            self.add("attention_flash_forward", 4 * self.NC, 2 * whole, "forward")
        elif not backward:
            self.add("attention_plain_forward", self.NC * (2 + 2 * again), 2 * square, "plain")
        elif flash:
            sums = s.B * -(-s.T // 128) * 2 * s.C
            self.sum_columns("attention_flash_dq", 6 * self.NC, sums, 3 * whole, "backward")
            self.add("attention_flash_dkv", 6 * self.NC, 4 * whole, "backward")
        else:
            self.add("attention_plain_dq", self.NC * (5 + 2 * again), 3 * square, "plain")
            self.add("attention_plain_dkv", self.NC * (4 + 2 * again), 4 * square, "plain")
            self.sum_columns("column_sums", 3 * self.NC, 64 * 3 * s.C)

    def tape(self, kernel, rows):
        for row, width in rows.items():
            if self.s.kept.get(row) == "int8":
                self.add(kernel, self.NC * width * 1.5)

    def attention_half(self, delta, training):
        self.layernorm("qkv", delta, training and self.s.on_tape("qkv"))
        self.linear_forward("qkv", training)
        self.attention(backward=False)
        if training:
            self.tape("quantize_kernel", {"residual": 1, "qkv": 3, "atty": 1})
        self.linear_forward("attproj", training)
        self.layernorm("fc", True, training and self.s.on_tape("fc"))
        if training:
            self.tape("quantize_kernel", {"residual2": 1})

    def forward(self):
        self.add("embedding_forward_kernel", 2 * self.NC)
        for layer in range(self.s.L):
            self.attention_half(layer > 0, True)
            self.linear_forward("fc", True)
            bits = self.s.N * self.s.C if self.s.kept.get("fch") == "2bit" else 0
            folded = self.fold("fcproj", self.s.on_tape("fcproj"))
            self.add("gelu_forward_kernel", 8 * self.NC + bits + folded)
            self.linear_forward("fcproj", True)
        self.layernorm(None, True, False)

    def classifier(self):
        s = self.s
        free = (4 * self.wide_rows() - s.N) * s.C // s.ld  # rows of logits that `wide` has room for
        chunk = min(s.N, max(free, 1024))
        for first in range(0, s.N, chunk):
            rows = min(chunk, s.N - first)
            self.product("logits", rows, s.Vp, s.C)
            # a large cache may spare it the second reading
            self.add("cross_entropy_kernel", 3 * X * rows * s.ld)
            self.product("dlnf", rows, s.C, s.Vp)
            self.product("dwte", s.Vp, s.C, rows, out=4, beta=first > 0)

    def sum_columns(self, kernel, size, sums, flops=0.0, rate="product"):
        """A kernel that leaves partial sums, so many in all, for another one to add up."""
        self.add(kernel, size + 4 * sums, flops, rate)
        self.add("add_partial_sums", 4 * sums)

    def layernorm_backward(self, accumulate=True):
        bands = -(-self.s.N // max(8, -(-self.s.N // 1024)))
        self.sum_columns("layernorm_backward_kernel", self.NC * (3 + accumulate),
                         bands * 3 * self.s.C)

    def linear_backward(self, which, folded=False):
        m, n, r, compressed = self.s.linear(which)
        if compressed and not self.s.on_tape(which) and not folded:
            self.make_z(which)
        self.product(f"{which} gradient", m, r, self.s.N, out=4)
        self.product(f"{which} dx", self.s.N, n, m)

    def block_backward(self):
        s, kept = self.s, self.s.kept
        # z that is folded where its input is made again
        now = {which: self.sparse and s.linear(which)[3] and not s.on_tape(which)
               for which in LINEARS}
        self.tape("dequantize_kernel", {"residual": 1, "atty": 1, "residual2": 1})
        if "atty" not in kept:
            self.attention_half(False, False)
        elif "fch" not in kept:
            self.layernorm("fc", False, False)
        if "fch" not in kept:
            self.linear_forward("fc", False)
        again = {row: row not in kept for row in ("fch_gelu", "ln2", "ln1")}
        if again["fch_gelu"]:
            self.add("gelu_forward_kernel", 8 * self.NC + self.fold("fcproj", now["fcproj"]))
        self.linear_backward("fcproj", again["fch_gelu"] and now["fcproj"])
        widths = 8.5 if kept.get("fch") == "2bit" else 12
        self.sum_columns("gelu_backward_kernel", widths * self.NC, 64 * 4 * s.C)
        if again["ln2"]:
            self.layernorm("fc", False, now["fc"])
        self.linear_backward("fc", again["ln2"] and now["fc"])
        self.layernorm_backward()
        self.linear_backward("attproj")
        self.tape("dequantize_kernel", {"qkv": 3})
        if again["ln1"]:
            self.layernorm("qkv", False, now["qkv"])
        if "qkv" not in kept and "atty" in kept:
            self.linear_forward("qkv", False)
        self.attention(backward=True)
        self.linear_backward("qkv", again["ln1"] and now["qkv"])
        self.layernorm_backward()

    def update(self):
        s, muon = self.s, self.s.options["optimizer"] == "muon"
        # bytes of a weight that moves, with its fp32 copy
        moved = 2 * X if s.options["master"] == "none" else 8 + X
        weights = {which + "w": which for which in LINEARS}
        gradients = [s.L * shape[1] * s.r[weights[name]] if name in weights else count(shape)
                     for name, shape in s.params.items()]
        self.add("squares_kernel", 4 * sum(gradients))
        self.add("norm_kernel", 0)
        for name, shape in s.params.items():
            if name not in weights:
                self.add("adam_kernel", count(shape) * (moved + 4 + 16))
            elif muon:
                self.muon_update(weights[name], moved)
            for _ in range(s.L if name in weights else 0):
                self.linear_update(weights[name], moved, muon)

    def linear_update(self, which, moved, muon):
        m, n, r, compressed = self.s.linear(which)
        # bytes of an element of the optimizer's step: Muon's, or Adam's gradient and moments
        direction = X if muon else 4 + 16
        if not compressed:
            self.add("lift_kernel" if muon else "adam_kernel", m * n * (moved + direction))
            return
        self.draw(which)
        if self.sparse:
            self.add("sparse_update_kernel", m * n * moved + m * r * direction)
            return
        if not muon:
            self.add("direction_kernel", m * r * (direction + X))
        none = self.s.options["master"] == "none"
        self.product(f"{which} lift", m, n, r, out=4, beta=not none)
        self.add("lift_kernel" if none else "round_kernel", m * n * (moved + 4 if none else 4 + X))

    def muon_update(self, which, moved):
        """As many layers at once as the workspace of the tape holds."""
        s = self.s
        most = min(s.L, self.wide_rows() * 4 * s.C // self.muon_elements(which))
        for first in range(0, s.L, most):
            blocks, rows, r, k = self.muon_shape(which)
            batch = blocks * min(most, s.L - first)
            size = batch * rows * r
            self.add("muon_momentum_kernel", size * (12 + X))
            self.add("muon_scale_kernel", 2 * size * X)
            products = [(k, k, max(rows, r), False), (k, k, k, True), (rows, r, k, True)]
            for m, n, inner, beta in products:
                elements = (m + n) * inner + m * n * (1 + beta)
                self.add("matmul Newton-Schulz", 5 * batch * X * elements,
                         5 * 2.0 * batch * m * n * inner, launches=5)

    def muon_shape(self, which):
        m, _, r, _ = self.s.linear(which)
        blocks = 3 if which == "qkv" else 1
        return blocks, m // blocks, r, min(m // blocks, r)

    def wide_rows(self):
        rows = [self.s.N]
        if self.s.options["optimizer"] == "muon":
            rows += [-(-self.muon_elements(which) // (4 * self.s.C)) for which in LINEARS]
        return max(rows)

    def muon_elements(self, which):
        blocks, rows, r, k = self.muon_shape(which)
        return blocks * (64 * 8 // X + 2 * rows * r + 2 * (-(-k * k // 8) * 8))


class LlmC(Launches):
    """
    llm.c's step at full rank, with cuDNN's attention and its defaults: bf16 gradients, GELU again
    in the backward pass, one chunk of logits.
    """

    def __init__(self, card, s):
        super().__init__(card)
        if card == "h100":
            self.reached.update(forward=CUDNN[0], backward=CUDNN[1])
        N, C, NC = s.N, s.C, X * s.N * s.C
        square = 2.0 * s.B * s.T * s.T / 2 * C
        parameters = sum(count(shape) for shape in s.params.values())
        self.times = s.micro_batches
        self.add("encoder forward", 2 * NC)
        self.product("logits", N, s.Vp, C)
        self.add("classifier", 3 * X * N * s.Vp)
        self.product("dlnf", N, C, s.Vp)
        self.product("dwte", s.Vp, C, N, beta=True)
        self.add("encoder backward", 2 * NC, launches=2)
        self.add("layernorm forward", 4 * NC)
        self.add("layernorm backward", 3 * NC)
        self.times = s.micro_batches * s.L
        self.add("layernorm forward", 8 * NC, launches=2)
        self.add("attention forward", 4 * NC, 2 * square, "forward")
        self.add("attention backward", 8 * NC, 5 * square, "backward")
        self.add("gelu forward", 16 * NC, launches=2)
        self.add("gelu backward", 12 * NC)
        self.add("layernorm backward", 8 * NC, launches=2)
        for which in LINEARS:
            m, n, _, _ = s.linear(which)
            self.product(f"{which} forward", N, m, n)
            self.add("bias backward", X * N * m, launches=2)
            self.product(f"{which} gradient", m, n, N, beta=True)
            self.product(f"{which} dx", N, n, m)
        self.times = 1
        self.add("zero gradients", X * parameters)
        self.add("global norm", X * parameters)
        self.add("adamw", parameters * (X + 16 + 8 + X), launches=len(s.params))


def card_of(device):
    """The card that the driver's name for a device means, or None: a laptop's is another card."""
    return next((card for card, name in NAMES.items() if device.endswith(name)), None)


def ask_plan(flags):
    binary = next((ROOT / b for b in BINARIES if (ROOT / b).exists()), None)
    if binary is None:
        stop(f"none of {', '.join(BINARIES)} is there to be asked for its plan; "
             "make train_gpt2_compact builds one")
    done = subprocess.run([str(binary), *flags, "--plan=json"], capture_output=True, text=True)
    if done.returncode != 0:
        stop(done.stderr.strip())
    return json.loads(done.stdout)


def predict(card, plan):
    s = Shape(plan)
    tokens, wait = s.options["total-batch"], s.micro_batches * HOST
    return {**Step(card, s).report(tokens, wait), "llmc": LlmC(card, s).report(tokens, wait)}


def stop(why):
    print(f"roofline.py: {why}", file=sys.stderr)
    sys.exit(2)


def table(rows, total):
    lines = [f"{'kernel':26} {'launches':>8} {'GB':>9} {'TFLOP':>8} {'floor, ms':>10} {'ms':>9}"]
    lines += [f"{r['name']:26} {r['launches']:8,} {r['bytes'] / 1e9:9.2f} "
              f"{r['flops'] / 1e12:8.2f} {r['floor_ms']:10.2f} {r['ms']:9.2f}"
              for r in rows if r["ms"] >= 0.0005 * total]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--card", choices=CARDS, default="h100", type=str.lower)
    parser.add_argument("--json", action="store_true",
                        help="one object: total_ms, tokens_per_second, kernels, and llmc likewise")
    args, flags = parser.parse_known_args()
    plan = ask_plan(flags)
    found = predict(args.card, plan)
    if args.json:
        print(json.dumps(found))
        return
    for title, part in ("This trainer", found), ("llm.c at full rank", found["llmc"]):
        print(f"{title}, predicted for one {args.card.upper()}: {part['total_ms']:.1f} ms a step, "
              f"{part['tokens_per_second']:,.0f} tokens a second\n")
        print(table(part["kernels"], part["total_ms"]) + "\n")
    print(f"memory, by the plan: {plan['total_bytes'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
