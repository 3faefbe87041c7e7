"""The trainer as its user sees it: what each option does to a run, and what it must leave alone."""

import glob
import json
import math
import os
import re
import shutil

import numpy as np
import pytest

import formats
from conftest import LEVELS, TINY, VOCAB, check_one_line, check_refused, draw, make_text

ALL = "qkv,attproj,fc,fcproj"
PROJECTIONS = ["gaussian", "rademacher", "sparse"]  # that are drawn
# (rank, compressed layers, projection): full rank, and each projection in all layers
METHODS = {"full rank": ["--rank", 1.0]}
METHODS.update({p: ["--rank", 0.25, "--projection", p, "--compress", ALL] for p in PROJECTIONS})
METHODS["muon"] = [*METHODS["sparse"], "--moments", "move", "--optimizer", "muon"]
METHODS["muon, full rank"] = ["--rank", 1.0, "--optimizer", "muon"]
WIDTH = {"qkv": 1, "attproj": 1, "fc": 1, "fcproj": 4}  # of a linear layer's input, in channels
# A loss in the log is rounded to 6 decimals.
LOGGED = 1e-6


def same_run(a, b, step):
    """Bit for bit: the log's losses and norms, and the weights."""
    assert a.losses == b.losses and a.norms == b.norms and len(a.losses) == step
    assert a.bits(step) == b.bits(step), "the losses are equal, the weights are not"

# ----------------------------------------------------------------------------
# full rank is the same program


@pytest.mark.parametrize("flags", [["--rank", 1.0], ["--rank", 1], ["--rank", 64],
                                   ["--compress", "none", "--rank", 0.25]])
def test_ratio_one_is_full_rank(flags, train):
    common = ["-x", 8, "-n", -1, "-l", 1e-2, "--gap", 3]
    full = train(*common, "--rank", 1.0, "--compress", "none")
    for more in ([], ["--moments", "move"], ["--projection", "sparse", "--moments", "reset"],
                 ["--alpha", 0.5]):
        same_run(full, train(*common, *flags, *more), 8)
    assert train(*common, "--rank", 0.25).losses != full.losses

# ----------------------------------------------------------------------------
# levels of recomputation


def same_gradients(dumps):
    """
    Of runs that differ in nothing that should show: losses, logits and all gradients are equal to
    the bit.
    """
    for level, dump in enumerate(dumps):
        assert {n for n in dump if n.startswith("grad.")} == {n for n in dumps[0]
                                                              if n.startswith("grad.")}
        for name in dumps[0]:
            if name.startswith("grad.") or name in ("loss", "logits"):
                assert dump[name].tobytes() == dumps[0][name].tobytes(), f"{name} at level {level}"


@pytest.mark.parametrize("method", METHODS)
def test_levels_are_bit_equal(method, train):
    args = [*METHODS[method], "-x", 10, "-n", -1, "-l", 1e-2, "--gap", 4, "-t", 27]
    runs = [train(*args, "-r", level, dump=True) for level in LEVELS]
    for other in runs:
        same_run(runs[0], other, 10)
    same_gradients([run.dump for run in runs])


@pytest.mark.parametrize("method", ["full rank", "sparse"])
def test_levels_are_bit_equal_with_two_bits(method, train):
    runs = [train(*METHODS[method], "--gelu", "2bit", "-x", 5, "-n", -1, "-r", level, dump=True)
            for level in (0, 1, 2)]
    for other in runs:
        same_run(runs[0], other, 5)
    same_gradients([run.dump for run in runs])

# ----------------------------------------------------------------------------
# a tape of few bits: the backward pass again

# Approx-BP, arXiv 2406.16282
CUTS = [-3.1858810036855245, -0.001178821281161997, 3.190832613414926]
# of GELU's stand-in below, between and above them
SLOPES = np.array([0, -0.04922261145617846, 1.0487405950855512, 1.0])


def groups(name, heads):
    """A row's int8 scales for each token: for qkv and atty one a head, else one."""
    return {"qkv": 3 * heads, "atty": heads}.get(name, 1)


def tensor(dump, name, layer):
    """
    A row as the tape gives it back, from 8 bits where it has these alone; None where it has
    neither.
    """
    whole, codes = dump.get(f"act.{name}.{layer}"), dump.get(f"act.{name}.int8.{layer}")
    if whole is not None or codes is None:
        return whole if whole is None else whole.astype(float)
    scales = dump[f"act.{name}.scale.{layer}"].astype(float)
    parts = codes.astype(float).reshape(*scales.shape, -1)
    return (parts * scales[..., None]).reshape(codes.shape)


def gelu_and_slope(x):
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    slope = (1 + t) / 2 + x * (1 - t * t) / 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return x * (1 + t) / 2, slope


def statistics(x):
    """Mean and 1/sigma of each token, as LayerNorm has them."""
    return x.mean(1, keepdims=True), 1 / np.sqrt(x.var(1, keepdims=True) + 1e-5)


def layernorm(x, w, b):
    mean, rstd = statistics(x)
    return (x - mean) * rstd * w + b


def layernorm_backward(dy, x, mean, rstd, w):
    """dx, and the gradients of w and b."""
    norm = (x - mean.reshape(-1, 1)) * rstd.reshape(-1, 1)
    d = dy * w
    dx = (d - d.mean(1, keepdims=True)
          - norm * (d * norm).mean(1, keepdims=True)) * rstd.reshape(-1, 1)
    return dx, (dy * norm).sum(0), dy.sum(0)


def attention(qkv, B, heads):
    """q, k, v (B, heads, T, hs), and the scores of each query with what is not in its future."""
    N, C = qkv.shape[0], qkv.shape[1] // 3
    q, k, v = qkv.reshape(B, N // B, 3, heads, C // heads).transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(2, 3) / math.sqrt(C // heads)
    scores[..., np.triu(np.ones(scores.shape[-2:], bool), 1)] = -np.inf
    return q, k, v, scores


def by_token(x):  # (B, heads, T, hs) -> (N, C)
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0] * x.shape[2], -1)


def attention_backward(dout, qkv, out, lse, B, heads):
    """With the softmax from the log of its denominator."""
    q, k, v, scores = attention(qkv, B, heads)
    p = np.exp(scores - lse.reshape(*scores.shape[:3], 1))
    dout, out = (x.reshape(B, -1, heads, v.shape[3]).transpose(0, 2, 1, 3) for x in (dout, out))
    ds = p * (dout @ v.swapaxes(2, 3) - (dout * out).sum(3, keepdims=True)) / math.sqrt(v.shape[3])
    return np.concatenate(
        [by_token(x) for x in (ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dout)], 1)


def backward_again(dump, heads, level):
    """
    Every gradient of a dump, in double precision, from its logits and from what its tape has at
    this level; what it has not is computed from that.
    """
    B, T, V = dump["logits"].shape
    N, L = B * T, sum(name.startswith("act.lse.") for name in dump)
    p = {name[6:]: value.astype(float) for name, value in dump.items() if name.startswith("param.")}
    inputs, targets = (dump[name].reshape(-1).astype(int) for name in ("inputs", "targets"))
    grads = {}

    def linear_backward(name, layer, dy, x, z):
        """x or, on the tape, z in its place"""
        P = dump.get(f"proj.{name}w.{layer}")
        if z is None:
            z = x if P is None else x @ P.astype(float)
        grads[f"{name}w.{layer}"], grads[f"{name}b.{layer}"] = dy.T @ z, dy.sum(0)
        return dy @ p[name + "w"][layer]

    logits = dump["logits"].reshape(N, V).astype(float)
    d = np.exp(logits - logits.max(1, keepdims=True))
    d /= d.sum(1, keepdims=True)
    d[np.arange(N), targets] -= 1
    d /= N
    grads["wte"] = np.zeros_like(p["wte"])
    grads["wte"][:V] = d.T @ dump["act.lnf"].astype(float)
    stream, grads["lnfw"], grads["lnfb"] = layernorm_backward(
        d @ p["wte"][:V], dump[f"act.residual.{L}"].astype(float), dump["act.lnf_mean"],
        dump["act.lnf_rstd"], p["lnfw"])
    for i in reversed(range(L)):
        row = {name: tensor(dump, name, i) for name in ("residual", "ln1", "qkv", "atty",
                                                        "residual2", "ln2", "fch", "fch_gelu")}
        z = {name: tensor(dump, name + ".z", i) for name in row}
        bits = dump.get(f"act.fch.2bit.{i}")

        def forward(linear, x):
            return x @ p[linear + "w"][i].T + p[linear + "b"][i]
        if row["ln1"] is None:
            row["ln1"] = layernorm(row["residual"], p["ln1w"][i], p["ln1b"][i])
        if row["qkv"] is None:
            row["qkv"] = forward("qkv", row["ln1"])
        lse = dump[f"act.lse.{i}"].astype(float)
        if row["atty"] is None:
            _, _, v, scores = attention(row["qkv"], B, heads)
            lse = np.log(np.exp(scores).sum(3))
            row["atty"] = by_token(np.exp(scores - lse[..., None]) @ v)
            row["residual2"] = row["residual"] + forward("attproj", row["atty"])
        if row["ln2"] is None:
            row["ln2"] = layernorm(row["residual2"], p["ln2w"][i], p["ln2b"][i])
        if row["fch"] is None and bits is None:
            row["fch"] = forward("fc", row["ln2"])
        if bits is None:
            gelu, slope = gelu_and_slope(row["fch"])
        else:
            gelu, slope = row["fch_gelu"], SLOPES[bits.astype(int)]
        d = linear_backward("fcproj", i, stream, gelu, z["fch_gelu"]) * slope
        d = linear_backward("fc", i, d, row["ln2"], z["ln2"])
        kept = dump[f"act.ln2_mean.{i}"], dump[f"act.ln2_rstd.{i}"]
        mean, rstd = statistics(row["residual2"]) if level >= 2 else kept
        d, grads[f"ln2w.{i}"], grads[f"ln2b.{i}"] = layernorm_backward(d, row["residual2"], mean,
                                                                       rstd, p["ln2w"][i])
        stream = stream + d
        d = linear_backward("attproj", i, stream, row["atty"], None)
        d = attention_backward(d, row["qkv"], row["atty"], lse, B, heads)
        d = linear_backward("qkv", i, d, row["ln1"], z["ln1"])
        kept = dump[f"act.ln1_mean.{i}"], dump[f"act.ln1_rstd.{i}"]
        mean, rstd = statistics(row["residual"]) if level >= 2 else kept
        d, grads[f"ln1w.{i}"], grads[f"ln1b.{i}"] = layernorm_backward(d, row["residual"], mean,
                                                                       rstd, p["ln1w"][i])
        stream = stream + d
    np.add.at(grads["wte"], inputs, stream)
    grads["wpe"] = np.zeros_like(p["wpe"])
    np.add.at(grads["wpe"], np.arange(N) % T, stream)
    return grads


@pytest.fixture
def wide(tmp_path, shards):
    """
    A model whose weights are wide, so that GELU's inputs lie on both sides of all cuts, and shards
    for it: as arguments.
    """
    config = dict(context=32, vocab=VOCAB, layers=2, heads=2, channels=24, padded_vocab=104)
    params = formats.draw_model(config, 5)
    params["fcw"] *= 3
    formats.write_model(tmp_path / "wide.bin", config, params)
    return ["-e", tmp_path / "wide.bin", "--train", shards / "train_0.bin", "-b", 2, "-t", 29, "-x",
            1]


@pytest.mark.parametrize("method", ["full rank", "gaussian", "sparse"])
@pytest.mark.parametrize("kept", ["", "--gelu 2bit", "--tape int8", "--gelu 2bit --tape int8"])
def test_gradients_are_those_of_the_tape(kept, method, train, wide):
    """
    At every level, of what the tape has: floats, or 2 and 8 bits of each element in their place.
    """
    for level in LEVELS[:3] if "2bit" in kept else LEVELS:
        dump = train(*wide, *METHODS[method], *kept.split(), "-r", level, dump=True).dump
        grads = backward_again(dump, 2, level)
        assert {"grad." + name for name in grads} == {name for name in dump
                                                      if name.startswith("grad.")}
        for name, want in grads.items():
            error = np.abs(dump["grad." + name] - want).max() / np.abs(want).max()
            # fp32 through two blocks, 1e-6 measured; what 2 and 8 bits change is 1e-3 and more
            assert error <= 1e-5, f"{name} at level {level} is off by {error:.1e}"


def test_what_int8_keeps(train, wide):
    """
    The forward pass is exact; a row is then kept in multiples of 1/127 of the greatest of its
    group, rounded to nearest. What this costs a gradient: up to a percent.
    """
    full, few = (train(*wide, "--rank", 1, "--tape", tape, dump=True).dump
                 for tape in ("full", "int8"))
    for name in ("loss", "logits", "act.ln1.1", "act.fch.0", "act.lse.1"):
        assert few[name].tobytes() == full[name].tobytes(), name
    for layer in (0, 1):
        for name in ("residual", "qkv", "atty", "residual2"):
            assert f"act.{name}.{layer}" not in few
            x, codes, scale = (full[f"act.{name}.{layer}"], few[f"act.{name}.int8.{layer}"],
                               few[f"act.{name}.scale.{layer}"])
            assert scale.shape == (58, groups(name, 2)) and codes.shape == x.shape
            x, codes = (values.reshape(*scale.shape, -1) for values in (x, codes))
            assert np.abs(codes).max() == 127 and np.array_equal(codes, np.rint(codes))
            assert np.allclose(scale, np.abs(x).max(2) / 127, rtol=2e-7, atol=0)
            # half a step, and the rounding of the quotient: 127 times 6e-8
            assert (np.abs(x - codes * scale[..., None].astype(float)) <= scale[..., None]
                    * (0.5 + 2e-5)).all(), name
    apart = {name: np.linalg.norm(few[name] - full[name]) / np.linalg.norm(full[name])
             for name in full if name.startswith("grad.")}
    # 0.0013 and 0.0083 measured
    assert 1e-3 < apart["grad.fcw.0"] and max(apart.values()) < 0.02, apart


def test_what_two_bits_keep(train, wide):
    full, few = (train(*wide, "--rank", 1, "--gelu", gelu, dump=True).dump
                 for gelu in ("exact", "2bit"))
    for name in ("loss", "logits", "act.fch_gelu.1", "act.qkv.0", "grad.fcprojw.1"):
        assert few[name].tobytes() == full[name].tobytes(), name
    met = set()
    for layer in (0, 1):
        x, bits = full[f"act.fch.{layer}"], few[f"act.fch.2bit.{layer}"]
        assert f"act.fch.{layer}" not in few and bits.shape == x.shape
        assert np.array_equal(bits, (x[..., None] > np.float32(CUTS)).sum(2))
        met |= set(bits.reshape(-1))
    assert met == {0, 1, 2, 3}
    cosines = {name: (few[name] * full[name]).sum() / np.linalg.norm(few[name])
               / np.linalg.norm(full[name])
               for name in full if name.startswith("grad.")}
    # 0.926 is the least measured
    assert 0.85 < min(cosines.values()) and cosines["grad.fcw.0"] < 0.99, cosines

# ----------------------------------------------------------------------------
# no master weights


def is_bf16(values):
    return not (np.ascontiguousarray(values, "<f4").view("<u4") & 0xFFFF).any()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_without_master_weights(method, train):
    """
    All weights are bf16 at all times, and the model learns as with fp32. Rounded to nearest it
    would not: at this rate a step is far below half of a weight's last bit.
    """
    args = [*METHODS[method], "-x", 150, "-l", 1e-3, "-k", "constant", "-n", 50, "--keep", 0, "-v",
            -1, "-b", 8]
    full, none = (train(*args, "--master", master) for master in ("fp32", "none"))
    assert all(is_bf16(values) for step in (50, 150) for values in none.params(step).values())
    assert not is_bf16(full.params(50)["fcw"])
    apart = np.abs(np.subtract(full.losses, none.losses)).max()
    assert 0 < apart < 0.05 < 0.5 < none.losses[0] - none.losses[-1], (apart, none.losses[-1])
    again = train(*args, "--master", "none")
    assert again.bits(150) == none.bits(150)


def test_first_weights_without_master(train, tmp_path):
    """Those of a file, and those drawn: rounded to nearest, before the first step."""
    config = dict(context=32, vocab=256, layers=2, heads=2, channels=16, padded_vocab=256)
    params = formats.draw_model(config, 3)
    formats.write_model(tmp_path / "model.bin", config, params)
    for shape, want in ((["-e", tmp_path / "model.bin", "-b", 2], params),
                        (TINY, train("-x", 0, "-n", -1).params(0))):
        dump = train(*shape, "--master", "none", "-x", 1, dump=True).dump
        for name, values in want.items():
            assert np.array_equal(dump["param." + name], formats.round_bf16(values)), name

# ----------------------------------------------------------------------------
# batches and the order of the data


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_is_a_larger_batch(method, train):
    """-b 2 four times over is -b 8: the same sums in another order."""
    common = [*METHODS[method], "-x", 10, "-l", 1e-3, "--eps", 1e-3, "-d", 8 * 32]
    runs = {b: train(*common, "-b", b, dump=True) for b in (8, 2, 1)}
    whole = runs.pop(8)
    for b, run in runs.items():
        dump, want = run.dump, whole.dump
        for name in want:
            if name.startswith("grad."):
                # 256 tokens' terms of mixed sign summed in fp32: some ten times its 6e-8, of the
                # greatest element
                assert np.abs(dump[name]
                              - want[name]).max() <= 3e-6 * np.abs(want[name]).max(), (name, b)
        # the losses average that out; --eps 1e-3 keeps Adam from scaling up gradients of rounding
        # alone
        assert np.abs(np.subtract(run.losses, whole.losses)).max() <= 3 * LOGGED
        assert np.allclose(run.norms, whole.norms, rtol=1e-5, atol=LOGGED)
        # the last micro batch
        assert np.array_equal(dump["inputs"].reshape(b, 32), want["inputs"].reshape(8, 32)[8 - b:])
    assert whole.losses != train(*common[:-1], 4 * 32, "-b", 4).losses


def sequence_losses(train, shards, *args):
    """Each step's loss with weights that stay as they are: the loss of its sequences."""
    return train("--train", shards / "train_*.bin", "-l", 0, *args).losses


def test_data_order(train, shards):
    """
    Shards of 704, 333 and 1025 tokens make 21 + 10 + 32 = 63 sequences of 32. Each epoch brings
    each once, in another order, and a step's sequences are the same for any micro batch, where an
    epoch ends inside it too.
    """
    one = sequence_losses(train, shards, "-b", 1, "-x", 3 * 63)
    epochs = [one[i:i + 63] for i in (0, 63, 126)]
    assert len(set(epochs[0])) > 60  # a loss tells its sequence
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert sequence_losses(train, shards, "-b", 1, "-x", 63, "--seed", 2) != epochs[0]
    wanted = np.mean(np.reshape(one[:186], (31, 6)), 1)
    for b in (1, 2, 3, 6):
        # a mean of means that are rounded to 6 decimals, in fp32 sums of 192 losses of 4.6
        assert np.abs(sequence_losses(train, shards, "-b", b, "-d", 6 * 32, "-x",
                                      31) - wanted).max() <= 2 * LOGGED


def test_sequences_are_cut_as_described(train, tmp_path):
    """
    Sequence i reads tokens [iT, iT + T] and predicts the last T of them; a last token that none
    follows is left out.
    """
    tokens = np.arange(7 * 9 + 1) % 61
    for size, count in ((64, 7), (63, 6)):
        path = tmp_path / f"{size}.bin"
        formats.write_tokens(path, tokens[:size], 61)
        dump = train("--train", path, "-t", 9, "-b", count, "-x", 1, dump=True).dump
        rows = np.concatenate(
            [dump["inputs"].reshape(count, 9), dump["targets"].reshape(count, 9)[:, -1:]], 1)
        wanted = np.stack([tokens[i * 9:i * 9 + 10] for i in range(count)])
        assert sorted(map(tuple, rows)) == sorted(map(tuple, wanted))
        assert np.array_equal(dump["targets"].reshape(count, 9)[:, :-1],
                              dump["inputs"].reshape(count, 9)[:, 1:])
        assert len(train("--train", path, "-t", 9, "-b", 1).steps) == count  # once through the data


def test_steps_default_to_once_through_the_data(train, shards):
    run = train("--train", shards / "train_*.bin", "-b", 2, "-d", 4 * 32)
    assert [s["step"] for s in run.steps] == list(range(1, 63 // 4 + 1))


def test_seeds(train):
    args = ["-x", 5, "-n", -1, "-s", 2, "-g", 20]
    for method in METHODS.values():
        runs = [train(*args, *method, "--seed", seed, dump=True) for seed in (1, 1, 2)]
        same_run(runs[0], runs[1], 5)
        a, b, c = (run.dump for run in runs)
        assert [e.get("sample") for e in runs[0].evaluations] == [e.get("sample")
                                                                  for e in runs[1].evaluations]
        assert [e.get("sample") for e in runs[0].evaluations] != [e.get("sample")
                                                                  for e in runs[2].evaluations]
        assert all(a[name].tobytes() == b[name].tobytes() for name in a)
        assert runs[0].losses != runs[2].losses
        drawn = [n for n in a if n.startswith("proj.")] + ["param.wte", "param.qkvw",
                                                           "param.fcprojw", "inputs"]
        assert not [n for n in drawn if np.array_equal(a[n], c[n])], "another seed draws the same"


def test_threads(train):
    """
    Any number of threads: products are cut differently, so equal to rounding; with the same number,
    bit for bit.
    """
    args = ["--rank", 0.25, "--compress", ALL, "-x", 5, "-n", -1, "-l", 1e-3, "--eps", 1e-3, "-t",
            31]
    one, three, again = (train(*args, threads=n) for n in (1, 3, 3))
    same_run(three, again, 5)
    assert np.abs(np.subtract(one.losses, three.losses)).max() <= 3 * LOGGED  # as for accumulation

# ----------------------------------------------------------------------------
# a replay of projections, moments and update


@pytest.mark.parametrize("moments", ["keep", "move", "reset"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_updates_over_three_epochs(projection, moments, train):
    """
    The weights of every step, from gradients at full rank and projections drawn here. A later
    step's gradient is the first one of a run at full rank that starts from that step's model file.
    """
    seed, gap, steps, rank = 21, 2, 5, 5  # a rank that divides nothing
    lr, alpha, decay, clip, b1, b2, eps = 1e-2, 0.5, 0.1, 1.0, 0.8, 0.9, 1e-2
    common = ["--overfit", "--seed", seed, "-l", lr, "-k", "constant", "-c", decay, "--clip", clip,
              "--beta1", b1, "--beta2", b2, "--eps", eps, "-n", 1, "--keep", 0]
    flags = ["--rank", rank, "--projection", projection, "--gap", gap, "--moments", moments,
             "--alpha", alpha]
    fresh = train(*common, *flags, "-x", 0)
    run = train(*common, *flags, "-x", steps, dump=True)
    shapes = {f"{x}w": (x, 16 * WIDTH[x]) for x in ("qkv", "fc", "fcproj")}
    shown, m, v, age, clipped = run.dump, {}, {}, 0, []
    params, model = fresh.params(0), fresh.model(0)
    for step in range(steps):
        epoch = step // gap
        dump = train(*common, "-e", model, "-b", 2, "-x", 1, "--rank", 1.0, dump=True).dump
        G, P, old = {}, {}, {}
        for name in formats.PARAMS:
            for record, _ in formats.per_layer(name, params[name]):
                G[record] = dump["grad." + record].astype(float)
                if name in shapes:
                    linear, n = shapes[name]
                    layer = int(record.split(".")[1])
                    P[record] = draw(projection, n, rank, seed, linear, layer, epoch)
                    old[record] = draw(projection, n, rank, seed, linear, layer, max(0, epoch - 1))
                    G[record] = G[record] @ P[record]
        if step == 0:
            for record in P:  # fp32 sines and logarithms err by some ulp of a normal of at most 5
                assert np.abs(shown["proj." + record] - P[record]).max() <= 2e-6
                assert np.abs(shown["grad." + record]
                              - G[record]).max() <= 3e-6 * np.abs(G[record]).max()
        elif step % gap == 0:
            for record in P:
                if moments == "reset":
                    m[record], v[record] = 0, 0
                elif moments == "move":
                    m[record] = m[record] @ old[record].T @ P[record]
        norm = math.sqrt(sum((g * g).sum() for g in G.values()))  # of the compressed gradients
        assert abs(run.norms[step] - norm) <= 1e-5 * norm + LOGGED
        clipped.append(norm > clip)
        for name in formats.PARAMS:
            parts = []
            for record, W in formats.per_layer(name, params[name].astype(float)):
                g = G[record] * min(1, clip / norm)
                age = 1 + (step % gap if moments == "reset" and record in P else step)
                m[record] = b1 * m.get(record, 0) + (1 - b1) * g
                v[record] = b2 * v.get(record, 0) + (1 - b2) * g * g
                U = m[record] / (1 - b1**age) / (np.sqrt(v[record] / (1 - b2**age)) + eps)
                U = alpha * U @ P[record].T if record in P else U
                parts.append(W - lr * (U + (decay * W if name in formats.DECAYED else 0)))
            wanted = parts[0] if name in formats.WITHOUT_LAYER else np.stack(parts)
            # In units of lr: a weight of at most 1 is rounded by 6e-8, that is 6e-6, which is what
            # is measured; a gradient's error of some 1e-8 is divided by eps: 1e-6. A moment that is
            # not moved, not reset or corrected with a wrong age makes 0.03 to 0.5.
            error = np.abs(run.params(step + 1)[name] - wanted).max() / lr
            assert error <= 3e-5, f"{name} after step {step + 1} is off by {error:.1e} lr"
        params, model = run.params(step + 1), run.model(step + 1)
    assert True in clipped


def row_space(change, r):
    """
    The space that the rows of a weight's change span, which is that of P's columns: (n, r),
    orthonormal.
    """
    u, s, vt = np.linalg.svd(change.astype(float))
    # one fp32 rounding of weights of 0.1 is 4e-9, a step is 1e-2; 1e-7 measured, and 0.08 for the
    # last that counts
    assert s[r] < 1e-5 * s[0] < s[r - 1], f"the step is not of rank {r}: {s}"
    return vt[:r].T


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_projections_of_later_epochs(projection, train):
    """After a resume, --dump shows the first step that follows, with its epoch's projections."""
    args = ["--projection", projection, "--gap", 3, "-n", 1, "--keep", 0, "--seed", 21, "--rank", 5,
            "-k", "constant"]
    out = train(*args, "-x", 8).out
    for step in (2, 3, 5, 7):
        later = shutil.ignore_patterns(*(f"state_*{i}.bin" for i in range(step + 1, 9)))
        part = shutil.copytree(out, f"{out}at{step}", ignore=later)
        run = train(*args, "-x", step + 1, "-y", out=part, dump=True)
        assert f"resumed after step {step}\n" in run.stdout
        for layer in (0, 1):
            for linear in ("qkv", "fc", "fcproj"):
                P = draw(projection, 16 * WIDTH[linear], 5, 21, linear, layer, step // 3)
                assert np.abs(run.dump[f"proj.{linear}w.{layer}"] - P).max() <= 2e-6, (step, linear)


@pytest.mark.parametrize("gap", [0, 1, 2, 3])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_new_projection_every_gap_steps(projection, gap, train):
    """
    A compressed layer's step lies in the space of its P: it changes with the epoch, and only then.
    """
    r, steps = 4, 6
    args = ["--rank", r, "--projection", projection, "--gap", gap, "-l", 1e-2, "-k", "constant",
            "-c", 0, "-n", 1, "--keep", 0]
    weights = [train(*args, "-x", 0).params(0)]
    run = train(*args, "-x", steps, dump=True)
    weights += [run.params(step + 1) for step in range(steps)]
    for name, layer in (("qkvw", 0), ("qkvw", 1), ("fcw", 0), ("fcprojw", 1)):
        spaces = [row_space(weights[i + 1][name][layer] - weights[i][name][layer], r)
                  for i in range(steps)]
        spaces.insert(0, np.linalg.qr(run.dump[f"proj.{name}.{layer}"].astype(float))[0])
        for i in range(steps):
            # squared cosines add up to r for one space; two random ones of dimension r = 4 in 16 or
            # 64 give 1 and less
            shared = (spaces[i].T @ spaces[i + 1]) ** 2
            new = gap > 0 and i > 0 and i % gap == 0
            assert shared.sum() < 3.6 if new else shared.sum() > r - 1e-3, (name, i, shared.sum())


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_moments_differ_after_the_first_epoch_only(projection, train):
    runs = [train("--projection", projection, "--gap", 3, "--moments", m, "-x", 5, "-n", 1,
                  "--keep", 0, "-l", 1e-2)
            for m in ("keep", "move", "reset")]
    for step in (1, 2, 3):
        assert (len({run.bits(step) for run in runs})
                == 1), f"moments matter at step {step}, before there is a new projection"
    for step in (4, 5):
        assert len({run.bits(step)
                    for run in runs}) == 3, f"two ways with the moments are one at step {step}"

# ----------------------------------------------------------------------------
# which layers, which rank


@pytest.mark.parametrize("layers", ["qkv", "attproj", "fc", "fcproj", "qkv,fcproj", ALL])
def test_compress_changes_what_it_names(layers, train):
    full = train("--rank", 1.0, "-x", 1, dump=True).dump
    dump = train("--rank", 0.25, "--compress", layers, "-x", 1, dump=True).dump
    assert dump["logits"].tobytes() == full["logits"].tobytes(), "the forward pass is not exact"
    named = {f"grad.{x}w.{l}" for x in layers.split(",") for l in range(2)}
    for name in full:
        if name in named:
            assert dump[name].shape == (full[name].shape[0], full[name].shape[1] // 4)
        elif name.startswith("grad."):
            assert dump[name].tobytes() == full[name].tobytes(), f"{name} has changed"
    assert {name[5:] for name in dump if name.startswith("proj.")} == {name[5:] for name in named}
    assert np.abs(dump["proj." + sorted(named)[0][5:]]).max() > 0


@pytest.mark.parametrize("rank, narrow, wide",
                         [(0.1, 2, 6), (0.01, 1, 1), (0.5, 8, 32), (0.9, None, 56), (3, 3, 3),
                          (16, None, 16), (40, None, 40)])
def test_ranks(rank, narrow, wide, train):
    """
    Inputs of 16 and 64: a ratio is of each, rounded, at least 1, and from 8 on to a multiple of 8;
    a whole rank is the same for all, and full where an input is no wider.
    """
    dump = train("--rank", rank, "--projection", "gaussian", "-x", 1, dump=True).dump
    assert dump["grad.fcprojw.0"].shape == (16, wide) and dump["proj.fcprojw.0"].shape == (64, wide)
    assert (dump["grad.qkvw.1"].shape == (48, narrow or 16)
            and dump["grad.fcw.1"].shape == (64, narrow or 16))
    assert ("proj.qkvw.0" in dump) == (narrow is not None)

# ----------------------------------------------------------------------------
# learning rate, clipping, decay


def schedule(kind, step, steps, lr, warmup, last):
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    if kind == "cosine":
        return lr * (last + (1 - last) * (1 + math.cos(math.pi * done)) / 2)
    if kind == "linear":
        return lr * (1 - (1 - last) * done)
    start = max(warmup, steps * 4 // 5)
    if kind == "wsd" and step >= start:
        return lr * (last + (1 - last) * (1 - math.sqrt((step - start) / (steps - start))))
    return lr


@pytest.mark.parametrize("warmup, last", [(0, 0.1), (5, 0), (5, 1), (23, 0.5)])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_schedules(kind, warmup, last, train):
    run = train("-x", 25, "-l", 2e-3, "-u", warmup, "-q", last, "-k", kind)
    wanted = [schedule(kind, step, 25, 2e-3, warmup, last) for step in range(25)]
    # logged with 9 digits
    assert np.allclose([s["lr"] for s in run.steps], wanted, rtol=1e-8, atol=0)


def test_the_logged_rate_is_the_rate_used(train):
    """
    Adam's first step is lr times the gradient's sign, where that is far above eps; vectors do not
    decay.
    """
    args = ["-l", 8e-3, "-u", 4, "-n", -1]
    before, run = train(*args, "-x", 0).params(0), train(*args, "-x", 1)
    moved = np.abs(run.params(1)["lnfb"] - before["lnfb"])
    assert np.allclose(moved, run.steps[0]["lr"],
                       rtol=1e-3) and abs(run.steps[0]["lr"] - 2e-3) < 1e-12


def test_clipping(train):
    """
    The norm in the log is that before clipping. With an eps far above the gradients, Adam's first
    step is g / eps, so that what clipping does can be seen in it.
    """
    args = ["-x", 1, "-n", -1, "-l", 1.0, "-c", 0, "--eps", 1.0, "--rank", 1.0]
    before = train(*args[2:], "-x", 0).params(0)
    runs = {clip: train(*args, "--clip", clip) for clip in (0, 1000, 0.01)}
    norm = runs[0].norms[0]
    assert norm > 0.5 and all(run.norms == [norm] for run in runs.values())
    assert runs[0].bits(1) == runs[1000].bits(1)
    for name in ("wte", "lnfb", "fcw"):
        free, held = (runs[clip].params(1)[name].astype(float) - before[name] for clip in (0, 0.01))
        g = -free / (1 - np.abs(free))  # of free = -g / (|g| + 1)
        s = 0.01 / norm
        # weights of up to 0.1 are rounded by 4e-9, in both steps; the held one is 4e-5 to 1e-3
        assert np.abs(held + g * s / (np.abs(g
                                             * s) + 1)).max() <= 2e-8 and np.abs(held).max() > 1e-5


@pytest.mark.parametrize("projection", ["sparse", "gaussian"])
def test_muon_steps_have_one_size(train, projection):
    """
    The root mean square of a weight's step is 0.2 lr at every rank, as far as Newton-Schulz makes
    singular values 1 (0.7 to 1.2), and P P^T of the ones drawn is the identity (gaussian: 0.1).
    """
    args = ["-n", -1, "-l", 1e-2, "-k", "constant", "-c", 0, "--optimizer", "muon"]
    args += ["--channels", 32, "-b", 8, "--projection", projection]
    before = train(*args, "-x", 0).params(0)
    for rank in (1.0, 0.5, 0.25, 0.125):
        after = train(*args, "-x", 1, "--rank", rank).params(1)
        for name in ("qkvw", "fcw", "fcprojw"):
            size = np.sqrt(np.mean(np.square(after[name].astype(float) - before[name]))) / 1e-2
            assert 0.2 * 0.65 < size < 0.2 * 1.25, (rank, name)


def test_weight_decay_is_for_matrices(train):
    args = ["-x", 1, "-n", -1, "-l", 1e-2, "-k", "constant"]
    for method in METHODS.values():
        before = train(*method, *args[2:], "-x", 0).params(0)
        plain, decayed = train(*method, *args, "-c",
                               0).params(1), train(*method, *args, "-c", 20).params(1)
        for name in formats.PARAMS:
            if name in formats.DECAYED:
                # lr * 20 = 0.2 of the weight before the step; two roundings of weights of 0.1
                assert np.abs(plain[name] - decayed[name]
                              - 0.2 * before[name]).max() <= 3e-8 and before[name].any()
            else:
                assert np.array_equal(plain[name], decayed[name]), f"{name} decays"

# ----------------------------------------------------------------------------
# learning


@pytest.mark.slow
def test_overfit(train):
    """
    One batch again and again is soon known by heart; the text as a whole is not. Measured: 0.022
    and 2.7.
    """
    args = ["-x", 200, "-l", 2e-2, "-u", 10, "--channels", 32]
    for method in METHODS.values():
        assert train(*args, *method, "--overfit").losses[-1] < 0.5
    assert train(*args).losses[-1] > 1.0


def test_sample_shows_what_was_learnt(train, tmp_path):
    path = tmp_path / "abcd.txt"
    path.write_text("abcd" * 500)
    run = train("--train", path, "-x", 60, "-l", 1e-2, "-s", -1, "-g", 40, "--temperature", 0)
    assert "abcdabcdabcdabcd" in run.evaluations[-1]["sample"]


CORPUS = os.path.join(formats.ROOT, "..", "shared", "data", "tinyshakespeare.txt")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """
    (path, bound): Tiny Shakespeare, or else the project's own sources.

    A bound is in units of the corpus's entropy, the loss of guessing each byte by its frequency
    alone. Measured for ranks 1, 1/2, 1/4 and 1/8 with three seeds, least to greatest; and with the
    compressed layers at rest (--alpha 0):
    Tiny Shakespeare  0.752-0.755  0.756-0.764  0.762-0.770  0.769-0.775   0.931
    the sources       0.798-0.816  0.808-0.814  0.813-0.843  0.822-0.831   0.903
    The sources change with time, so they have more room.
    """
    path, bound = CORPUS, 0.80
    if not os.path.exists(path):
        path, bound = tmp_path_factory.mktemp("corpus") / "sources.txt", 0.87
        kinds = ("*.cpp", "*.cu", "*/*.py", "dev/*/*.py", "dev/*/*.cu*")
        content = b"".join(open(f, "rb").read() for kind in kinds
                           for f in sorted(glob.glob(os.path.join(formats.ROOT, kind))))
        # in another order, so that the tenth for validation is like the rest
        pieces = np.random.Generator(np.random.PCG64(1)).permutation(len(content) // 1000)
        path.write_bytes(b"".join(content[1000 * i:1000 * i + 1000] for i in pieces))
    share = np.bincount(np.fromfile(path, np.uint8)) + 0.0
    share = share[share > 0] / share.sum()
    return path, bound * -(share * np.log(share)).sum()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0.5, 0.25, 0.125])
def test_loss_curve(rank, corpus, train):
    """200 steps of a model of 0.8 million parameters."""
    path, bound = corpus
    run = train("--train", path, "-e", "d4", "--channels", 128, "--heads", 4, "--context", 32, "-b",
                8, "-x", 200, "-l", 2e-3, "-u", 20, "-v", -1, "-m", 100, "--rank", rank)
    assert run.evaluations[-1]["val_loss"] < bound
    # log 256 = 5.55, before anything is known
    assert np.isfinite(run.losses).all() and 5.3 < run.losses[0] < 6.0

# ----------------------------------------------------------------------------
# evaluation


@pytest.mark.parametrize("method", [[], ["--rank", 1.0, "-r", 1],
                                    ["-r", 2, "--projection", "sparse", "--moments", "move"],
                                    ["--optimizer", "muon", "--moments", "move"]])
def test_evaluation_changes_nothing(method, train, tmp_path):
    """Validation, HellaSwag, and samples far longer than the context, after every step."""
    swag = tmp_path / "swag.bin"
    write_hellaswag(swag, [(1, [1, 2], [[3], [4, 5], [6] * 50, [7]])])
    args = ["-x", 8, "-n", -1, "-l", 1e-2, "--gap", 3, *method]
    plain = train(*args, "-v", 0)
    assert not plain.evaluations
    for more in (["-s", 1, "-g", 70, "-v", 0], ["-v", 1, "-m", -1],
                 ["-v", 1, "-m", 1, "--hellaswag", swag, "-s", 2, "-g", 33]):
        run = train(*args, *more)
        same_run(plain, run, 8)
        assert len(run.evaluations) == 8
    assert all(len(e["sample"].encode()) >= 33 for e in run.evaluations if e["step"] % 2 == 0)


def test_validation_is_the_last_tenth_of_a_text(train, text, tmp_path):
    content = text.read_bytes()
    tail = tmp_path / "tail.txt"
    tail.write_bytes(content[5400:])
    whole = train("-x", 0, "-v", -1, "-m", -1).evaluations
    assert whole == train("-x", 0, "-v", -1, "-m", -1, "--val",
                          tail).evaluations and whole[0]["val_loss"] > 5
    # all of the text is for training where there is another for validation
    head = tmp_path / "head.txt"
    head.write_bytes(content[:5400])
    args = ["-b", 1, "-l", 0, "-x", 168, "-v", 0]
    own, cut, full = train(*args), train(*args, "--train", head, "--val",
                                         tail), train(*args, "--val", tail)
    assert sorted(own.losses) == sorted(cut.losses) != sorted(full.losses)


def test_validation_batches(train, shards):
    """
    The mean over sequences: the same for any batch, though the last one is not full. 499 tokens are
    15 sequences of 32.
    """
    args = ["--train", shards / "train_*.bin", "--val", shards / "val.bin", "-x", 0, "-v", -1, "-m"]
    cases = ((1, -1), (4, -1), (15, 1), (4, 9), (4, 2), (1, 8))
    losses = {(b, m): train(*args, m, "-b", b).evaluations[0]["val_loss"] for b, m in cases}
    everything = losses[1, -1]
    assert all(abs(losses[key] - everything) <= 2 * LOGGED for key in ((4, -1), (15, 1), (4, 9)))
    assert abs(losses[4, 2] - losses[1, 8]) <= 2 * LOGGED < abs(losses[4, 2] - everything)


def test_bits_per_byte(train, tmp_path):
    """The loss in bits, over the bytes that the predicted tokens spell, of which an end of text has
    none; left out where that is not known."""
    plain = train("-x", 0, "-v", -1).evaluations[0]
    assert abs(plain["bits_per_byte"] - plain["val_loss"] / math.log(2)) <= 2 * LOGGED
    vocab, end = 300, 299
    tokens = np.random.Generator(np.random.PCG64(4)).integers(0, vocab, 1000)
    tokens[::50] = end
    formats.write_tokens(tmp_path / "tokens.bin", tokens, vocab)
    args = ["--train", tmp_path / "tokens.bin", "--val", tmp_path / "tokens.bin", "-x", 0, "-v", -1,
            "-m"]
    assert "bits_per_byte" not in train(*args, -1).evaluations[0]
    pieces = [b"x" * (i % 7) for i in range(vocab)]
    # the last token is not in a smaller vocabulary
    for count, known in ((vocab, True), (vocab - 1, False)):
        header = np.zeros(256, "<i4")
        header[:4] = [20240328, 2, count, min(end, count - 1)]
        table = b"".join(bytes([len(piece)]) + piece for piece in pieces[:count])
        (tmp_path / "tokenizer.bin").write_bytes(header.tobytes() + table)
        for batches, sequences in ((-1, 31), (5, 10)):
            found = train(*args, batches).evaluations[0]
            assert ("bits_per_byte" in found) == known
            if known:
                predicted = tokens[1:sequences * 32 + 1]
                size = sum(len(pieces[token]) for token in predicted if token != end)
                wanted = found["val_loss"] * len(predicted) / math.log(2) / size
                assert abs(found["bits_per_byte"] - wanted) <= 2 * LOGGED


def test_shards_without_validation(train, shards):
    run = train("--train", shards / "train_*.bin", "-x", 4, "-v", 1, "-s", 2)
    before = run.stdout[:run.stdout.index("step 1/")]
    assert len(re.findall("no validation|validation: none",
                          before)) == 1 and "| val " not in run.stdout
    assert not [e for e in run.evaluations if "val_loss" in e] and len(run.losses) == 4
    assert run.stderr == ""


def write_hellaswag(path, examples):
    """examples: (label, context, four endings), all of them lists of tokens."""
    words, longest = [], 0
    for index, (label, context, endings) in enumerate(examples):
        body = [index, label, 4, len(context), *context]
        for ending in endings:
            body += [len(ending), *ending]
        words += [65535, 2 * (len(body) + 2), *body]
        longest = max(longest, 2 * (len(body) + 2))
    header = np.zeros(256, "<i4")
    header[:4] = [20240522, 1, len(examples), longest]
    with open(path, "wb") as f:
        f.write(header.tobytes() + np.asarray(words, "<u2").tobytes())


def echo_model(path, wte):
    """
    A model whose blocks add nothing: the logits after a token are lnf(wte[token]) wte^T, whatever
    came before.
    """
    vocab, channels = wte.shape
    config = dict(context=16, vocab=vocab, layers=1, heads=1, channels=channels, padded_vocab=vocab)
    params = {name: np.zeros(shape, np.float32)
              for name, shape in formats.param_shapes(config).items()}
    params.update(wte=wte.astype(np.float32), lnfw=np.ones(channels, np.float32))
    formats.write_model(path, config, params)


def hellaswag_score(wte, examples, context):
    x = wte - wte.mean(1, keepdims=True)
    x /= np.sqrt((x * x).mean(1, keepdims=True) + 1e-5)
    logits = x @ wte.T
    losses = np.log(np.exp(logits).sum(1, keepdims=True)) - logits  # [token before, token]
    right = 0
    for label, start, endings in examples:
        means = [np.mean([losses[a, b] for a, b in zip((start + e)[-len(e) - 1:], e)][-context:])
                 for e in endings]
        right += int(np.argmin(means)) == label
    return right / len(examples)


def test_hellaswag(train, shards, tmp_path):
    """
    Tokens on a circle: after a token, the same one is the likeliest and its neighbours come next.
    """
    angles = 2 * np.pi * np.arange(VOCAB) / VOCAB
    wte = 1.5 * np.stack([sign * wave(k * angles) for k in (1, 2) for wave in (np.cos, np.sin)
                          for sign in (1, -1)],
                         1)
    model, swag = tmp_path / "echo.bin", tmp_path / "swag.bin"
    echo_model(model, wte)
    examples = [
        # the first word of an ending follows the context's last
        (2, [1, 50], [[51], [49], [50], [40]]),
        # the mean decides: the sum is the greatest
        (0, [9], [[9, 9, 9, 9, 9, 9, 9, 9], [12], [13], [14]]),
        # each word of an ending counts
        (3, [5, 80, 30], [[31, 60], [60, 30], [31, 75], [30, 30]]),
        (1, [70, 20], [[20] * 6 + [70], [20], [20] * 2 + [60], [70]]),
        # a context longer than the model's, and endings that are
        (1, list(range(40)), [[0] * 3, [39] * 3, [20] * 3, [10] * 3]),
        (0, [3], [[3] * 30, [3, 50] * 15, [3, 20] * 15, [3, 60] * 15]),
        # and some that it gets wrong
        (1, [8, 90], [[90], [40], [20], [10]]),
        (2, [8, 90], [[89, 90, 91], [92], [10, 10, 10], [70]])]
    want = hellaswag_score(wte, examples, 16)
    assert want == 6 / 8
    write_hellaswag(swag, examples)
    for b in (1, 3, 4, 7):
        run = train("-e", model, "--train", shards / "train_0.bin", "-x", 0, "-v", -1,
                    "--hellaswag", swag, "-b", b)
        assert [e["hellaswag"] for e in run.evaluations] == [want], b
    for label in range(4):  # every label is read
        write_hellaswag(swag, [(label, [50], [[50 if i == label else 20] for i in range(4)])] * 3)
        run = train("-e", model, "--train", shards / "train_0.bin", "-x", 0, "-v", -1,
                    "--hellaswag", swag)
        assert run.evaluations[0]["hellaswag"] == 1

# ----------------------------------------------------------------------------
# what is written: console and log

STEP = re.compile(r"step (\d+)/(\d+) \| loss (\d+\.\d{4})( \| val \d+\.\d{4})?( \| hellaswag "
                  r"[01]\.\d{4})? \| norm (\d+\.\d\d) \| lr (\d\.\de-\d\d) "
                  r"\| \d+\.\d ms \| [\d,]+ tok/s( \| \d+ % MFU \(\d+ % by 6 N\))?( \| eta \d+s)?")


def test_console(train, text):
    run = train("-x", 12, "-v", 5, "-s", 6, "-g", 50)
    lines = run.stdout.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    matches = [STEP.fullmatch(line) for line in steps]
    assert all(matches), steps
    assert [m.group(1, 2) for m in matches] == [(str(i), "12") for i in range(1, 13)]
    assert [bool(m.group(4)) for m in matches] == [i in (5, 10, 12) for i in range(1, 13)]
    assert [bool(m.group(9)) for m in matches] == [True] * 11 + [False]
    for m, step in zip(matches, run.steps):  # the same numbers as in the log, rounded
        assert abs(float(m.group(3)) - step["loss"]) <= 0.51e-4 and abs(float(m.group(6))
                                                                        - step["norm"]) <= 0.51e-2
        assert abs(float(m.group(7)) / step["lr"] - 1) <= 0.051
    before = "\n".join(lines[:lines.index(steps[0])])
    for word in ("device", "d2", "2 layers", "2 heads", "16 channels", "context 32", "rank 0.25",
                 "sparse", "every 100 steps", "total"):
        assert before.count(word), f"the configuration does not tell {word}"
    plan = json.loads(formats.run_trainer([*TINY, "--train", text, "--plan=json", "-x", 12]).stdout)
    for name in plan["categories"]:
        assert name in before
    assert run.stdout.count("--- sample ---") == 2
    grouped = [line for line in steps if re.search(r"\d{4,} tok/s", line)]
    assert not grouped, "thousands are to be set apart"


def test_log(train, tmp_path):
    data = tmp_path / 'bytes "and" signs.txt'
    data.write_bytes(bytes((np.random.Generator(np.random.PCG64(3)).random(5000)
                            * 256).astype(np.uint8)))
    swag = tmp_path / "swag.bin"
    write_hellaswag(swag, [(1, [1, 2], [[3], [4, 5], [6], [7]])])
    out = tmp_path / "a" / "b\\c"  # folders are made
    run = train("--train", data, "-x", 6, "-v", 3, "-s", 2, "-g", 200, "--top-k", 0,
                "--temperature", 2, "--hellaswag", swag, "-l", 1e-3, "--seed", 5, out=out)
    run.stdout.encode()  # text=True has read it: it is UTF-8
    with open(out / "log.jsonl", "rb") as f:
        raw = f.read()
    assert raw.endswith(b"\n")
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", raw), "control characters in the log"
    lines = [json.loads(line) for line in raw.decode("utf-8").splitlines()]
    first = lines[0]
    assert first["device"] and first["revision"]
    assert {"total_bytes", "full_rank_total_bytes", "categories", "tensors",
            "flops_per_token"} <= set(first["plan"])
    options = first["options"]
    named = set(re.findall(r"--([a-z0-9-]+) ",
                           formats.run_trainer(["--help"]).stdout)) - {"help", "plan"}
    assert named <= set(options), named - set(options)
    wanted = {"train": str(data), "steps": 6, "lr": 1e-3, "seed": 5, "rank": 0.25,
              "projection": "sparse", "gap": 100, "compress": "qkv,fc,fcproj", "moments": "keep",
              "resume": False, "seq": 32, "total-batch": 64, "out": str(out)}
    assert {name: options[name] for name in wanted} == wanted
    for line in lines[1:]:
        if "loss" in line:
            assert set(line) == {"step", "loss", "norm", "lr", "ms", "tokens_per_second"}
            # 64 tokens a step; ms has 3 decimals, a step takes at least 0.05 ms
            assert abs(line["tokens_per_second"] * line["ms"] / 64e3 - 1) < 0.02
        else:
            assert set(line) <= {"step", "val_loss", "bits_per_byte", "hellaswag", "sample"}
            assert len(line) > 1
    steps = {key: [line["step"] for line in lines[1:] if key in line]
             for key in ("loss", "val_loss", "hellaswag", "sample")}
    assert steps == {"loss": [1, 2, 3, 4, 5, 6], "val_loss": [3, 6], "hellaswag": [3, 6],
                     "sample": [2, 4, 6]}
    samples = [line["sample"] for line in lines[1:] if "sample" in line]
    assert all("\ufffd" in sample for sample in samples), "200 random bytes make no good UTF-8"
    for key in (b'"loss"', b'"norm"', b'"val_loss"', b'"bits_per_byte"'):
        values = re.findall(key + rb": ([^,}]+)", raw)
        assert values and all(re.fullmatch(rb"\d+\.\d{6}", value) for value in values), values


def test_samples_of_any_bytes(train, shards, tmp_path):
    """
    Tokens may stand for bytes that are no UTF-8, or that a terminal acts on: overlong forms,
    surrogates, beyond U+10FFFF, cut short, control characters. Good ones stay as they are.
    """
    bad = [b"\xc0\x80", b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf", b"\xed\xa0\x80",
           b"\xed\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf8\x88\x80\x80\x80",
           b"\xff", b"\xfe", b"\x80", b"\xe2\x82", b"\xf0\x9f\x98", b"\x00", b"\x1b[2J", b"\x07",
           b"\x7f", b"\r"]
    good = ["a", '"', "\\", "\n", "\t", "/", "é", "߿", "ࠀ", "€", "퟿", "\ue000", "😀", "\U0010ffff",
            "\\u0041"]
    pieces = (bad + [piece.encode() for piece in good] * 3)[:VOCAB]
    pieces += [b" "] * (VOCAB - len(pieces))
    header = np.zeros(256, "<i4")
    header[:4] = [20240328, 2, VOCAB, 0]
    (tmp_path / "tok.bin").write_bytes(header.tobytes()
                                       + b"".join(bytes([len(piece)]) + piece for piece in pieces))
    run = train("--train", shards / "train_0.bin", "--tokenizer", tmp_path / "tok.bin", "-x", 1,
                "-s", -1, "-g", 3000, "--top-k", 0, "--temperature", 5, text=False)
    with open(os.path.join(run.out, "log.jsonl"), "rb") as f:
        raw = f.read()
    for said in (raw, run.stdout):
        said = said.decode("utf-8")  # which is strict
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", said)
    sample = json.loads(raw.decode("utf-8").splitlines()[-1])["sample"]
    assert all(piece in sample for piece in good) and "\ufffd" in sample


def test_log_is_written_as_it_goes(train):
    """A run that is stopped leaves the steps it has done: here one that stops itself."""
    run = train("-x", 200, "-l", 100, "--clip", 0, status=1)
    check_one_line(run.stderr, "step ", "not finite")
    assert 0 < len(run.losses) < 200 and np.isfinite(run.losses).all()
    assert f"step {len(run.losses) + 1}:" in run.stderr


def test_log_is_json_when_the_model_breaks(train):
    """Validation meets the broken weights before the next step does."""
    run = train("-x", 200, "-l", 100, "--clip", 0, "-v", 1, status=1)
    check_one_line(run.stderr, "not finite")
    with open(os.path.join(run.out, "log.jsonl")) as f:
        for line in f:
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "nan" not in run.stdout and "inf" not in run.stdout

# ----------------------------------------------------------------------------
# shapes


@pytest.mark.parametrize("T", [1, 33, 65, 100])
def test_lengths_that_are_no_multiple_of_a_tile(T, train, tmp_path):
    """
    A token's logits do not depend on what comes later, so a short sequence is the beginning of a
    long one.
    """
    tokens = np.random.Generator(np.random.PCG64(5)).random(131) * VOCAB
    long, short = tmp_path / "long.bin", tmp_path / "short.bin"
    formats.write_tokens(long, tokens.astype(int), VOCAB)
    formats.write_tokens(short, tokens.astype(int)[:T + 1], VOCAB)
    shape = ["-e", "d2", "--channels", 24, "--heads", 3, "--context", 130, "-b", 1, "-x", 2, "-n",
             -1, "-l", 1e-2, "--optimizer", "adamw"]
    whole = train(*shape, "--train", long, dump=True).dump
    for method in METHODS.values():
        runs = [train(*shape, "--train", short, "-t", T, *method, "-r", level, dump=True)
                for level in LEVELS]
        for run in runs:
            same_run(runs[0], run, 2)
        dump = run.dump
        assert np.array_equal(dump["inputs"].reshape(-1), tokens.astype(int)[:T])
        # products of 24 to 96 terms in fp32, for logits of up to 0.5: 1e-7 measured
        assert np.abs(dump["logits"].reshape(T, VOCAB)
                      - whole["logits"].reshape(130, VOCAB)[:T]).max() < 1e-6
        assert run.losses[1] < run.losses[0], "two steps on one sequence"


def test_unpadded_vocabulary(train, shards, tmp_path):
    """A model file without padding: the same run as with rows of padding that no token has."""
    config = dict(context=32, vocab=VOCAB, layers=2, heads=2, channels=16, padded_vocab=VOCAB)
    params = formats.draw_model(config, 1)
    padded = dict(params, wte=np.concatenate([params["wte"], np.zeros((28, 16), np.float32)]))
    formats.write_model(tmp_path / "a.bin", config, params)
    formats.write_model(tmp_path / "b.bin", dict(config, padded_vocab=128), padded)
    args = ["--train", shards / "train_*.bin", "-b", 2, "-x", 6, "-n", -1, "-l", 1e-2, "-s", 3]
    a, b = (train("-e", tmp_path / name, *args) for name in ("a.bin", "b.bin"))
    assert a.losses == b.losses and a.norms == b.norms
    assert formats.read_model(a.model(6))[0] == config
    for name, values in a.params(6).items():
        assert np.array_equal(values, b.params(6)[name][:len(values)]), name
    assert not b.params(6)["wte"][VOCAB:].any(), "padding has learnt something"


@pytest.mark.parametrize("eps", [0, 1e-30, 1e-8])
def test_what_is_saved_can_be_loaded(eps, train, text):
    """
    Positions that no sequence reaches have no gradient, and with no eps Adam's step is 0/0 there:
    it must be 0, or the option be refused.
    """
    refusal = formats.run_trainer([*TINY, "--train", text, "--eps", eps, "--plan"])
    if refusal.returncode == 2:
        return check_refused(refusal, "--eps")
    run = train("-x", 3, "-n", -1, "--eps", eps, "-t", 16, "-c", 0)
    assert not np.isnan(run.params(3)["wpe"]).any()
    again = train("-e", run.model(3), "-b", 2, "-t", 16, "-x", 0, "-v", -1)
    assert again.evaluations[0]["val_loss"] == run.evaluations[-1]["val_loss"]

# ----------------------------------------------------------------------------
# data that is too little


@pytest.mark.parametrize("size", [0, 1, 32])
def test_too_few_tokens(size, tmp_path):
    (tmp_path / "few.txt").write_text(make_text(size))
    formats.write_tokens(tmp_path / "few.bin", np.zeros(size, int), VOCAB)
    for name in ("few.txt", "few.bin"):
        check_refused(formats.run_trainer([*TINY, "--train", tmp_path / name, "-v", 0]), "--train",
                      name)
