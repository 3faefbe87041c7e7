#!/usr/bin/env python3
"""
Milliseconds that a step of a plain GPT-2 takes in PyTorch, for comparison with the CUDA trainer.
The last line printed is one JSON object.

It is the usual fast recipe: fp32 weights, gradients and moments, the products in bf16 by autocast
(so fp32 is the master copy), attention by scaled_dot_product_attention, the head tied to the
embedding, fused AdamW, gradients clipped to a norm of 1, torch.compile. The tokens are random; the
shapes, the padded vocabulary, the weight decay and the loss read at each step are the CUDA
trainer's. Where a batch does not fit, half of it is taken twice, so a step has the same tokens.
"""

import argparse
import json
import sys
import time

try:
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
except ImportError:
    print("torch_gpt2.py: PyTorch is not here", file=sys.stderr)
    sys.exit(3)

# layers, channels
WIDTHS = {"d12": (12, 768), "d24": (24, 1024), "d36": (36, 1280), "d48": (48, 1600)}
VOCABULARY, PADDED, HEAD = 50257, 50304, 64


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.heads = channels // HEAD
        self.ln1, self.ln2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.attproj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.fc, self.fcproj = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, HEAD).transpose(1, 2)
                   for part in self.qkv(self.ln1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, layers, channels, context, vocabulary):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, channels), nn.Embedding(context, channels)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(layers))
        self.lnf = nn.LayerNorm(channels)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if "proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe.weight[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x, targets)

    def head(self, x, targets):
        logits = F.linear(self.lnf(x), self.wte.weight)  # the head is the embedding
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))


def train(options, micro, device):
    """ms and loss of each step."""
    torch.manual_seed(1)
    layers, channels = WIDTHS[options.model]
    layers, channels = options.layers or layers, options.channels or channels
    vocabulary = min(options.vocabulary, VOCABULARY)
    padded = PADDED if vocabulary == VOCABULARY else vocabulary
    model = GPT(layers, channels, options.seq, padded).to(device)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8,
                                  fused=device == "cuda")
    compute = model
    if options.compile == "model":
        compute = torch.compile(model)
    elif options.compile == "block":
        for block in model.blocks:
            block.compile()
        model.head = torch.compile(model.head)
    times, losses = [], []
    for _ in range(options.steps):
        # on the host, from where a loader would bring it
        batch = torch.randint(vocabulary, (options.batch, options.seq + 1))
        if device == "cuda":
            torch.cuda.synchronize()
        began, total = time.perf_counter(), 0.0
        for first in range(0, options.batch, micro):
            rows = batch[first:first + micro].to(device)
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = compute(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
            share = len(rows) / options.batch
            (loss * share).backward()
            total += loss.detach() * share
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total))  # waits for the forward pass
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return times, losses


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(WIDTHS), default="d12")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", choices=["model", "block", "none"], default="model",
                        help="the whole model at once, or block by block, which compiles faster")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--layers", type=int,
                        help="override the model's shape, as --channels does, "
                        "to try this where there is no GPU")
    parser.add_argument("--channels", type=int)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    return parser.parse_args()


def main():
    options = parse_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch_gpt2.py: this PyTorch finds no CUDA device", file=sys.stderr)
        return 3
    torch.set_float32_matmul_precision("high")
    micro = options.batch
    while True:
        try:
            times, losses = train(options, micro, options.device)
            break
        except torch.cuda.OutOfMemoryError:
            if micro == 1:
                print("torch_gpt2.py: not one sequence fits into the memory", file=sys.stderr)
                return 1
        micro = (micro + 1) // 2  # out here nothing holds the tensors of the try any more
        torch._dynamo.reset()  # neither do compiled graphs
        torch.cuda.empty_cache()
    how = {"model": "torch.compile of the whole model",
           "block": "torch.compile block by block, and of the head with the loss",
           "none": "not compiled"}[options.compile]
    how += "; bf16 autocast over fp32 weights, fused AdamW, scaled_dot_product_attention"
    allocated = torch.cuda.max_memory_allocated() if options.device == "cuda" else 0
    print(json.dumps({"torch": torch.__version__, "how": how, "micro_batch": micro, "ms": times,
                      "losses": losses, "allocated_bytes": allocated}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
