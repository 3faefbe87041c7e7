"""
GPT-2 and its training step in plain PyTorch, in double precision: what the trainers are held to.

    reference.py --make-goldens [--out DIR]   computes goldens/*.npz anew
    reference.py --evaluate JOB.npz OUT.npz   answers one question of test_parity.py

It shares no code with the trainers. The gradients are autograd's, the optimizer is
torch.optim.AdamW; CompAct's update and Muon have no counterpart in PyTorch and are written out in
train_compact. Being in double precision, its own rounding does not count: what a comparison shows
is the trainer's.
"""

import argparse
import json
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import formats

HERE = os.path.dirname(os.path.abspath(__file__))
LINEAR = ["qkvw", "attprojw", "fcw", "fcprojw"]

# ----------------------------------------------------------------------------
# the model


def forward(p, config, inputs, targets, act):
    """
    Logits (B, T, V) and mean loss. Every activation goes into the dict act, under its name in a
    dump.
    """
    B, T = inputs.shape
    C, NH = config["channels"], config["heads"]
    heads = lambda t: t.view(B, T, NH, C // NH).transpose(1, 2)  # (B, T, C) -> (B, NH, T, hs)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    x = p["wte"][inputs] + p["wpe"][:T]
    for l in range(config["layers"]):
        act[f"act.residual.{l}"] = x
        ln1 = F.layer_norm(x, (C,), p["ln1w"][l], p["ln1b"][l], 1e-5)
        qkv = F.linear(ln1, p["qkvw"][l], p["qkvb"][l])
        q, k, v = map(heads, qkv.split(C, dim=2))
        scores = q @ k.transpose(2, 3) / math.sqrt(C // NH)
        scores = scores.masked_fill(future, -math.inf)
        atty = (F.softmax(scores, dim=3) @ v).transpose(1, 2).reshape(B, T, C)
        residual2 = x + F.linear(atty, p["attprojw"][l], p["attprojb"][l])
        ln2 = F.layer_norm(residual2, (C,), p["ln2w"][l], p["ln2b"][l], 1e-5)
        fch = F.linear(ln2, p["fcw"][l], p["fcb"][l])
        fch_gelu = F.gelu(fch, approximate="tanh")
        x = residual2 + F.linear(fch_gelu, p["fcprojw"][l], p["fcprojb"][l])
        for name, value in [("ln1", ln1), ("qkv", qkv), ("atty", atty), ("residual2", residual2),
                            ("ln2", ln2), ("fch", fch), ("fch_gelu", fch_gelu)]:
            act[f"act.{name}.{l}"] = value
    act[f"act.residual.{config['layers']}"] = x
    act["act.lnf"] = F.layer_norm(x, (C,), p["lnfw"], p["lnfb"], 1e-5)
    # the head is tied to wte; its padded rows are no tokens and have no logit
    logits = act["act.lnf"] @ p["wte"][:config["vocab"]].T
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return logits, loss


def backward(p, config, inputs, targets):
    """Zeroes the gradients, then fills them; returns activations, logits and loss."""
    act = {}
    for t in p.values():
        t.grad = None
    logits, loss = forward(p, config, inputs, targets, act)
    loss.backward()
    return act, logits.detach(), loss.item()


def parameters(params, dtype=torch.float64):
    return {name: torch.tensor(params[name], dtype=dtype, requires_grad=True)
            for name in formats.PARAMS}


def first_step(params, config, inputs, targets):
    """Activations, logits, loss and gradients before any update, under their names in a dump."""
    p = parameters(params)
    act, logits, loss = backward(p, config, inputs, targets)
    out = {name: value.detach().numpy() for name, value in act.items()}
    out["logits"], out["loss"] = logits.numpy(), np.array([loss])
    for name in formats.PARAMS:
        for record, part in formats.per_layer(name, p[name].grad.numpy()):
            out["grad." + record] = part
    return out

# ----------------------------------------------------------------------------
# training


def train(params, config, inputs, targets, hyper, steps):
    """
    AdamW, again and again on one batch. Returns losses and gradient norms before each update, and
    the parameters.
    """
    p = parameters(params)
    groups = [{"params": [p[n] for n in formats.PARAMS if n in formats.DECAYED],
               "weight_decay": hyper["weight_decay"]},
              {"params": [p[n] for n in formats.PARAMS if n not in formats.DECAYED],
               "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=hyper["lr"], betas=(hyper["beta1"], hyper["beta2"]),
                             eps=hyper["eps"])
    losses, norms = [], []
    for _ in range(steps):
        losses.append(backward(p, config, inputs, targets)[2])
        norms.append(torch.nn.utils.clip_grad_norm_(list(p.values()), hyper["clip"]).item())
        adam.step()
    return np.array(losses), np.array(norms), {name: t.detach().numpy() for name, t in p.items()}


def adamw_direction(G, moments, step, hyper):
    M, V = moments
    M += (1 - hyper["beta1"]) * (G - M)
    V += (1 - hyper["beta2"]) * (G * G - V)
    return M / (1 - hyper["beta1"] ** step) / ((V / (1 - hyper["beta2"] ** step)).sqrt()
                                               + hyper["eps"])


def muon_direction(G, moments, blocks):
    """
    Nesterov's momentum, its singular values put through the polynomial of the five Newton-Schulz
    iterations; each of the blocks (q, k and v) by itself.
    """
    M = moments[0]
    M.mul_(0.95).add_(G)
    parts = []
    for X in (G + 0.95 * M).chunk(blocks):
        U, S, V = torch.linalg.svd(X, full_matrices=False)
        S = S / S.norm()
        for _ in range(5):
            S = 3.4445 * S - 4.7750 * S ** 3 + 2.0315 * S ** 5
        parts.append(0.2 * math.sqrt(max(X.shape)) * (U * S) @ V)
    return torch.cat(parts)


def train_compact(params, config, inputs, targets, hyper, steps, proj):
    """
    As train, but tensors that have projections, proj["qkvw.0"] and so on, learn from gradients
    times these: (epochs, n, r), the next one after every hyper["gap"] steps. The linear layers'
    optimizer is hyper["optimizer"].
    """
    p = parameters(params)
    proj = {name: torch.tensor(P, dtype=torch.float64) for name, P in proj.items()}
    moments, losses, norms = {}, [], []
    for step in range(steps):
        _, _, loss = backward(p, config, inputs, targets)
        losses.append(loss)
        epoch, begun = divmod(step, hyper.get("gap", steps))
        now = {record: P[epoch] for record, P in proj.items()}
        todo = []
        for name in formats.PARAMS:
            for (record, W), (_, G) in zip(formats.per_layer(name, p[name].detach()),
                                           formats.per_layer(name, p[name].grad)):
                todo.append((name, record, W, G @ now[record] if record in now else G))
        norm = math.sqrt(sum((G * G).sum().item() for _, _, _, G in todo))
        scale = min(1.0, hyper["clip"] / norm)
        for name, record, W, G in todo:
            decay = hyper["weight_decay"] if name in formats.DECAYED else 0.0
            mv = moments.setdefault(record, (torch.zeros_like(G), torch.zeros_like(G)))
            if record in now and step > 0 and begun == 0 and hyper["moments"] != "keep":
                moved = mv[0] @ proj[record][epoch - 1].T @ now[record]
                mv[0].copy_(moved if hyper["moments"] == "move" else torch.zeros_like(moved))
            if hyper.get("optimizer") == "muon" and name in LINEAR:
                U = muon_direction(scale * G, mv, 3 if name == "qkvw" else 1)
            else:
                U = adamw_direction(scale * G, mv, step + 1, hyper)
            if record in now:
                U = hyper["alpha"] * U @ now[record].T
            W -= hyper["lr"] * (U + decay * W)
        norms.append(norm)
    return np.array(losses), np.array(norms), {name: t.detach().numpy() for name, t in p.items()}

# ----------------------------------------------------------------------------
# goldens

# Clipping is active in some of the ten steps and not in the others; test_parity.py asserts that it
# is.
CASES = {
    # a padded vocabulary, T below the context, the default eps
    "padded": dict(config=dict(context=40, vocab=50, layers=2, heads=4, channels=16,
                               padded_vocab=64),
                   B=2, T=17, seed=4, hyper=dict(lr=1e-2, clip=1.1, eps=1e-8)),
    # odd sizes, no padding, T equal to the context, an eps of the gradients' size
    "odd": dict(config=dict(context=7, vocab=257, layers=1, heads=3, channels=12, padded_vocab=257),
                B=3, T=7, seed=2, hyper=dict(lr=1e-2, clip=1.1, eps=1e-3)),
    # one token
    "one": dict(config=dict(context=5, vocab=11, layers=3, heads=1, channels=6, padded_vocab=16),
                B=1, T=1, seed=3, hyper=dict(lr=1e-2, clip=2.4, eps=1e-3)),
    # more tokens than a tile of attention and a chunk of the classifier take; most activations
    # would be too much to keep
    "long": dict(config=dict(context=131, vocab=30, layers=1, heads=2, channels=8,
                             padded_vocab=32),
                 keep=["act.atty.0"], B=2, T=131, seed=5, hyper=dict(lr=1e-2, clip=0.25, eps=1e-3)),
}
STEPS = 10


def batch(tokens, B, T):
    """inputs and targets (B, T), in the order of the file"""
    tokens = torch.as_tensor(tokens)
    return tokens[:-1].view(B, T), tokens[1:].view(B, T)


def make_golden(case):
    config, B, T = case["config"], case["B"], case["T"]
    hyper = dict(beta1=0.9, beta2=0.95, weight_decay=0.1, **case["hyper"])
    params = formats.draw_model(config, case["seed"])
    tokens = np.random.Generator(np.random.PCG64(case["seed"])).integers(
        0, config["vocab"], B * T + 1)
    inputs, targets = batch(tokens, B, T)
    out = first_step(params, config, inputs, targets)
    if "keep" in case:
        out = {name: v for name, v in out.items()
               if name.startswith("grad.") or name in ["loss"] + case["keep"]}
    losses, norms, trained = train(params, config, inputs, targets, hyper, STEPS)
    for name, value in trained.items():
        out["trained." + name] = value
    rounded = {name: formats.round_bf16(value) for name, value in params.items()}
    bf16_loss = first_step(rounded, config, inputs, targets)["loss"]
    out = {name: value.astype(np.float32) for name, value in out.items()}
    out.update(losses=losses, norms=norms, bf16_loss=bf16_loss, tokens=tokens.astype(np.uint16))
    about = dict(config=config, B=B, T=T, seed=case["seed"], hyper=hyper, steps=STEPS,
                 sha256=formats.checksum(params))
    out["about"] = np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8)
    return out


def make_goldens(directory):
    os.makedirs(directory, exist_ok=True)
    for name, case in CASES.items():
        path = os.path.join(directory, name + ".npz")
        np.savez_compressed(path, **make_golden(case))
        print(f"{path}: {os.path.getsize(path)} bytes")

# ----------------------------------------------------------------------------
# questions from test_parity.py


def evaluate(job_path, out_path):
    """
    The job holds the model, the batch and, as proj.NAME.LAYER, the projections of all epochs if
    there are any.
    """
    job = np.load(job_path)
    about = json.loads(job["about"].tobytes())
    config, hyper = about["config"], about["hyper"]
    params = {name: job["param." + name] for name in formats.PARAMS}
    proj = {name[5:]: job[name] for name in job.files if name.startswith("proj.")}
    inputs, targets = torch.tensor(job["inputs"]).long(), torch.tensor(job["targets"]).long()
    out = first_step(params, config, inputs, targets)
    if proj or hyper.get("optimizer") == "muon":
        losses, norms, trained = train_compact(params, config, inputs, targets, hyper,
                                               about["steps"], proj)
    else:
        losses, norms, trained = train(params, config, inputs, targets, hyper, about["steps"])
    out.update({"trained." + name: value for name, value in trained.items()}, losses=losses,
               norms=norms)
    np.savez(out_path, **out)


def main():
    parser = argparse.ArgumentParser(description="GPT-2 in PyTorch, to hold the trainers to")
    parser.add_argument("--make-goldens", action="store_true", help="compute the goldens anew")
    parser.add_argument("--out", default=os.path.join(HERE, "goldens"),
                        help="where to (goldens/ beside this file)")
    parser.add_argument("--evaluate", nargs=2, metavar=("JOB", "OUT"),
                        help="answer a job of test_parity.py")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are tiny
    if args.make_goldens:
        make_goldens(args.out)
    elif args.evaluate:
        evaluate(*args.evaluate)
    else:
        parser.error("--make-goldens or --evaluate")


if __name__ == "__main__":
    main()
