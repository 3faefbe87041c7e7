"""--projection eigen: the basis and what it follows, its refreshes, the step through it, and what the plan says of it.

The orthonormal factor itself is tested in test_cpu.cpp, updates against double precision in test_parity.py; the tests that
every projection has to pass are with the others, in test_training.py and test_checkpoint.py.
"""

import math
import shutil

import numpy as np
import pytest

import formats
from conftest import LEVELS, check_one_line, check_sums, draw, plan, tensors
from test_training import ALL, LOGGED, WIDTH, same_run

EIGEN = ["--projection", "eigen", "--compress", ALL]
INPUT = {"qkvw": "ln1", "attprojw": "atty", "fcw": "ln2", "fcprojw": "fch_gelu"}  # what a weight is multiplied with
NAMES = [f"{weight}.{layer}" for weight in INPUT for layer in (0, 1)]  # of the tiny model's compressed layers
ROUND = 2.0**-24
ORTHONORMAL = 3e-6  # Q^T Q is off by the rounding of some sums: 4e-7 was the most, 1.2e-6 where they are taken without vectors


def inputs(train, *args):
    """x (N, n) of every layer in a run's first step. The forward pass is exact: full rank has the same, and keeps it whole."""
    dump = train(*args, "--rank", 1, "--projection", "gaussian", "-x", 1, dump=True).dump
    found = {}
    for name in NAMES:
        weight, layer = name.split(".")
        x = dump[f"act.{INPUT[weight]}.{layer}"].astype(float)
        found[name] = x.reshape(-1, x.shape[-1])
    return found


def bases(dump):
    """Q (n, r) of every layer, in double precision."""
    return {name: dump["proj." + name].astype(float) for name in NAMES}


def saved_bases(run, step):
    """The same from a state, where Q^T are the last of the tensors."""
    shapes = [t["shape"] for t in run.header["plan"]["tensors"] if t["category"] == "basis"]
    assert len(shapes) == len(INPUT)
    data = np.fromfile(run.state(step), "<f4")[:-2]  # without the checksum
    found, at = {}, len(data) - sum(map(math.prod, shapes))
    for weight, (L, r, n) in zip(INPUT, shapes):
        for layer in range(L):
            found[f"{weight}.{layer}"] = data[at:at + r * n].reshape(r, n).T.astype(float)
            at += r * n
    return found


def go_on(train, run, *args):
    """A run resumed for a step, which it dumps."""
    resumed = train(*args, "-y", out=shutil.copytree(run.out, run.out + "on"), dump=True)
    assert "resumed after step" in resumed.stdout
    return resumed


def check_orthonormal(Q, said):
    error = np.abs(Q.T @ Q - np.eye(Q.shape[1])).max()
    assert error <= ORTHONORMAL, f"{said}: Q^T Q is off by {error:.1e}"


def iterate(Q, x, iterations):
    for _ in range(iterations):
        Q, R = np.linalg.qr(x.T @ (x @ Q))
        Q = Q * np.sign(np.diag(R))
    return Q


# ---------------------------------------------------------------------------- the basis

@pytest.mark.parametrize("rank", [5, 0.5, 1])
def test_basis_is_iterated(rank, train):
    """Four iterations from the stream's numbers in the first step, then as many as asked for from where the basis was."""
    args = ["--overfit", "-b", 8, "-l", 0, "--compress", ALL, "--seed", 21]  # a rate of 0: the inputs stay
    x = inputs(train, *args)
    args += ["--projection", "eigen", "--rank", rank, "--gap", 1, "--refresh-iterations", 3, "-n", -1]
    run = train(*args, "-x", 1, dump=True)
    first, second = bases(run.dump), bases(go_on(train, run, *args, "-x", 2).dump)
    for name in NAMES:
        linear, layer = name.split("w.")
        n = 16 * WIDTH[linear]
        r = rank if rank > 1 else int(rank * n)
        start = draw("eigen", n, r, 21, linear, int(layer), 0)
        for got, was, iterations in ((first[name], start, 4), (second[name], first[name], 3)):
            assert got.shape == (n, r)
            check_orthonormal(got, name)
            # What a product errs by is a few roundings of the greatest eigenvalue; a column of Q shows it in units of its own.
            # LayerNorm takes the mean away: of the whole basis the last column's eigenvalue is 0, and GELU's last are small.
            want = iterate(was, x[name], iterations)
            values = np.linalg.eigvalsh(x[name].T @ x[name])[::-1]
            seen = values[:r] > 1e-4 * values[0]
            assert seen.sum() > min(r, 12) - 2
            error = np.abs(got - want)[:, seen].max(axis=0)
            assert (error <= 30 * ROUND * values[0] / values[:r][seen]).all(), (name, iterations, error)
    assert (saved_bases(run, 1)[name] == first[name]).all()


def test_gap_0_is_the_first_basis_for_ever(train):
    args = [*EIGEN, "--gap", 0, "-l", 1e-2, "-k", "constant", "-n", -1]
    run = train(*args, "-x", 3, dump=True)
    resumed = go_on(train, run, *args, "-x", 4)
    for name in NAMES:
        assert (resumed.dump["proj." + name] == run.dump["proj." + name]).all()
        assert (saved_bases(resumed, 4)[name] == bases(run.dump)[name]).all()


def test_converges_to_the_eigenvectors(train):
    """On fixed inputs, 400 iterations: to each vector of its own, the first eigenvalue's first."""
    args = ["--overfit", "-b", 8, "-l", 0, "--compress", ALL]
    x = inputs(train, *args)
    args += ["--projection", "eigen", "--rank", 0.5, "--gap", 1, "--refresh-iterations", 400, "-n", -1]
    Q = bases(go_on(train, train(*args, "-x", 1), *args, "-x", 2).dump)
    for name in NAMES:
        r = Q[name].shape[1]
        values, vectors = (a[..., ::-1] for a in np.linalg.eigh(x[name].T @ x[name]))
        along = (Q[name] * vectors[:, :r]).sum(0)
        angles = np.linalg.norm(Q[name] - vectors[:, :r] * along, axis=0)
        # A neighbour's share falls by the quotient of the eigenvalues each time, from a start of any size, 100 at most here; and
        # rounding, a little of the greatest eigenvalue, turns a column by its part of the distance to the neighbour.
        before, after = np.r_[np.inf, values[:r - 1]], values[1:r + 1]
        left = np.maximum(values[:r] / before, after / values[:r]) ** 404
        allowed = 100 * left + 10 * ROUND * values[0] / np.minimum(before - values[:r], values[:r] - after)
        told = allowed < 0.1
        assert told.mean() >= 0.75 and told[0], f"{name}: these inputs say little"
        assert (angles <= allowed)[told].all(), (name, angles, allowed)
        along = ((x[name] @ Q[name]) ** 2).sum(0)
        assert (along[1:] <= 1.01 * along[:-1]).all(), f"{name}: not in the order of the eigenvalues"


def coupling(x, Q):
    """How far z's second moment is from diagonal: what stands beside it, as correlations; root mean square, and greatest."""
    z = x @ Q
    moment = z.T @ z
    size = np.sqrt(np.diag(moment))
    beside = np.abs(moment / np.outer(size, size))[~np.eye(len(size), dtype=bool)]
    return math.sqrt((beside**2).mean()), beside.max()


@pytest.mark.parametrize("steps, gap, iterations, rms, most", [(10, 10, 20, 0.01, 0.05), (60, 10, 1, 0.1, 0.6)])
def test_a_refresh_makes_the_second_moment_diagonal(steps, gap, iterations, rms, most, train):
    """At once with many iterations, and with one at a time as training goes on; the model has moved since the last."""
    args = ["--overfit", "-b", 8, "-l", 1e-3, "-k", "constant", "--compress", ALL]
    more = ["--projection", "eigen", "--rank", 0.25, "--gap", gap, "--refresh-iterations", iterations, "-n", -1]
    run = train(*args, *more, "-x", steps)
    x, old = inputs(train, *args, "-e", run.model(steps)), saved_bases(run, steps)
    dump = go_on(train, run, *args, *more, "-x", steps + 1).dump
    was, now = [], []
    for name, Q in bases(dump).items():
        was.append(coupling(x[name], old[name]))
        now.append(coupling(x[name], Q))
        assert now[-1][0] < 0.75 * was[-1][0] and now[-1][0] < rms and now[-1][1] < most, (name, was[-1], now[-1])
        weight, layer = name.split(".")
        if weight != "attprojw":  # z is of the new basis
            z = x[name] @ Q
            assert np.abs(dump[f"act.{INPUT[weight]}.z.{layer}"].reshape(z.shape) - z).max() <= 3e-6 * np.abs(z).max()
    assert np.mean(now, axis=0)[0] < 0.25 * np.mean(was, axis=0)[0]
    assert np.max(was) > 0.8


# ---------------------------------------------------------------------------- inputs that have fewer directions than the basis

def scaled_model(path, scale):
    """A model whose layers' inputs are of a given size: LayerNorm's, and with them GELU's."""
    config = dict(context=32, vocab=256, layers=2, heads=2, channels=16, padded_vocab=256)
    params = formats.draw_model(config, 3)
    for name in ("ln1w", "ln1b", "ln2w", "ln2b"):
        params[name] = (scale * params[name]).astype(np.float32)
    formats.write_model(path, config, params)
    return ["-e", path]


@pytest.mark.parametrize("moments", ["keep", "move"])
@pytest.mark.parametrize("kind", ["few tokens", "one token", "one byte", "nothing", "tiny", "huge"])
def test_any_inputs(kind, moments, train, tmp_path):
    """Q stays orthonormal and the training finite: with fewer tokens than columns, with rows that are all the same, with inputs of
    0, and with such as make x^T x very small or large."""
    (tmp_path / "a.txt").write_text("a" * 400)
    flags = {"few tokens": ["-b", 1, "-t", 4], "one token": ["-b", 1, "-t", 1], "nothing": 0, "tiny": 1e-10, "huge": 1e4,
             "one byte": ["-b", 4, "-t", 1, "--train", tmp_path / "a.txt"]}[kind]
    if not isinstance(flags, list):
        flags = [*scaled_model(tmp_path / "model.bin", flags), "-b", 2, "-t", 8]
    args = [*flags, *EIGEN, "--rank", 0.5, "--gap", 2, "--moments", moments, "-n", 1, "--keep", 0, "-v", 0]
    run = train(*args, "-x", 6, dump=True)  # which ends with status 1 where a loss or a norm is not finite
    for name, Q in bases(run.dump).items():
        check_orthonormal(Q, f"{name} in the first step")
    for step in (2, 3, 6):
        for name, Q in saved_bases(run, step).items():
            check_orthonormal(Q, f"{name} after step {step}")
        assert all(np.isfinite(values).all() for values in run.params(step).values())


# ---------------------------------------------------------------------------- runs that must be the same

@pytest.mark.parametrize("moments", ["keep", "move", "reset"])
def test_resume_across_a_refresh(moments, train):
    """Refreshes are in steps 3 and 5; stopped before, between and after them, at any level of recomputation, it is one run."""
    args = [*EIGEN, "--gap", 2, "--refresh-iterations", 2, "--moments", moments, "-l", 1e-2, "-k", "constant", "-b", 1, "-d", 64]
    args += ["-n", 1, "--keep", 0]
    whole = train(*args, "-x", 5)
    changed = [any((saved_bases(whole, step)[name] != saved_bases(whole, step + 1)[name]).any() for name in NAMES)
               for step in range(1, 5)]
    assert changed == [False, True, False, True]
    for level in LEVELS:
        run = train(*args, "-r", level, "-x", 5)
        same_run(whole, run, 5)
        for step in (1, 2, 3, 4) if level in (0, 5) else ():
            out = shutil.copytree(run.out, f"{run.out}at{step}",
                                  ignore=shutil.ignore_patterns(*(f"*_0000000{later}.bin" for later in range(step + 1, 6))))
            resumed = train(*args, "-r", level, "-x", 5, "-y", out=out)
            assert f"resumed after step {step}\n" in resumed.stdout
            same_run(whole, resumed, 5)
            with open(whole.state(5), "rb") as a, open(resumed.state(5), "rb") as b:
                assert a.read() == b.read(), "other moments, or another basis"


def test_the_first_micro_batch_makes_the_basis(train, tmp_path):
    """All later ones of the step are projected on it. Two micro batches of the same rows are a step of one of them."""
    flags = [*EIGEN, "--gap", 2, "-l", 1e-3, "--eps", 1e-3, "-b", 1, "-n", -1]
    one, two = (train(*flags, "-d", rows * 32, "-x", 1, dump=True).dump for rows in (1, 2))
    last = inputs(train, "--compress", ALL, "-b", 1, "-d", 64)
    for name in NAMES:
        assert (one["proj." + name] == two["proj." + name]).all()
        weight, layer = name.split(".")
        if weight != "attprojw":
            z = two[f"act.{INPUT[weight]}.z.{layer}"].reshape(32, -1)
            assert np.abs(z - last[name] @ bases(two)[name]).max() <= 3e-6 * np.abs(z).max()
    assert (one["inputs"] != two["inputs"]).any()

    (tmp_path / "periodic.txt").write_text("the cat sees a dog, old and blue" * 40)  # 32 bytes: all sequences are the same
    once, twice = (train(*flags, "--train", tmp_path / "periodic.txt", "-d", rows * 32, "-x", 5) for rows in (1, 2))
    assert np.abs(np.subtract(once.losses, twice.losses)).max() <= 3 * LOGGED
    for name, Q in saved_bases(once, 5).items():
        assert np.abs(Q - saved_bases(twice, 5)[name]).max() <= 1e-4, name


def test_threads(train):
    """As for the other projections: equal to rounding, and bit for bit with the same number."""
    args = [*EIGEN, "--gap", 2, "-x", 5, "-n", -1, "-l", 1e-3, "--eps", 1e-3, "-t", 31]
    one, two, again = (train(*args, threads=n) for n in (1, 2, 2))
    same_run(two, again, 5)
    assert np.abs(np.subtract(one.losses, two.losses)).max() <= 3 * LOGGED


@pytest.mark.parametrize("was, now", [("eigen", "gaussian"), ("sparse", "eigen")])
def test_a_state_is_for_its_own_projection(was, now, train):
    out = train("--projection", was, "-x", 2, "-n", -1).out
    run = train("--projection", now, "-x", 4, "-y", out=out, status=2)
    check_one_line(run.stderr, "--projection:", was, now)


# ---------------------------------------------------------------------------- the step

@pytest.mark.parametrize("rank", [0.125, 0.25, 0.5, 1])
def test_a_step_is_as_long_as_at_full_rank(rank, train):
    """Adam's first step is 1 or -1 in each coordinate: of length sqrt(m r) here, so through Q times sqrt(n / r) it is sqrt(m n)."""
    lr, eps, alpha = 1e-2, 1e-12, 0.5
    args = ["-l", lr, "--eps", eps, "-c", 0, "-n", -1, "-x", 1, "--clip", 0, "-b", 8, "-k", "constant"]
    run, full = train(*args, *EIGEN, "--rank", rank, "--alpha", alpha, dump=True), train(*args, "--rank", 1)
    for name, Q in bases(run.dump).items():
        weight, layer = name.split(".")
        W, G = run.dump["param." + weight][int(layer)].astype(float), run.dump["grad." + name].astype(float)
        n, r = Q.shape
        change = run.params(1)[weight][int(layer)] - W
        U = G / (np.abs(G) + eps)
        # Rounding of W, at most 0.13 and so 2^-27, and a few roundings of the step.
        assert np.abs(change + lr * alpha * math.sqrt(n / r) * U @ Q.T).max() <= 2.0**-27 + 1e-6 * lr, name
        want = np.linalg.norm(full.params(1)[weight][int(layer)] - W)
        if rank < 1:  # in the last direction of all there are no inputs, LayerNorm having taken the mean away: U is less than 1
            assert abs(np.linalg.norm(change) / want / alpha - 1) <= 1e-3, name


def test_learns(train):
    """Through a fourth of the columns nearly as well as at full rank, at the same rate."""
    args = ["-l", 3e-3, "-x", 150, "-b", 8]
    eigen, full = (np.mean(train(*args, *more).losses[-10:]) for more in ([*EIGEN, "--gap", 10], ["--rank", 1]))
    assert full < 2.5 and eigen < full + 0.2


# ---------------------------------------------------------------------------- the plan

L, C = 6, 384  # of d6
SHAPES = {"qkvw": (3 * C, C), "attprojw": (C, C), "fcw": (4 * C, C), "fcprojw": (C, 4 * C)}


@pytest.mark.parametrize("rank", [0.25, 0.3, 100, 1])
@pytest.mark.parametrize("linears", [ALL, "qkv,fc,fcproj", "fcproj", "none"])
def test_plan(linears, rank):
    """Q^T of each compressed layer is kept, in a category of its own; all else is as for another dense projection, but for its
    place: instead of P there is what the orthonormal factor takes."""
    shape = ["-e", "d6", "-b", 2, "-t", 512, "--compress", linears, "--rank", rank]
    p, other, full = plan(*shape, "--projection", "eigen"), plan(*shape, "--projection", "gaussian"), plan(*shape, "--rank", 1, "--projection", "gaussian")
    check_sums(p)
    wanted, rows = {}, []
    for weight, (m, n) in SHAPES.items():
        if weight[:-1] in linears.split(","):
            r = rank if rank > 1 else int(rank * n + 0.5)
            wanted["basis." + weight] = [L, r, n]
            rows.append((m, n, r))
    found = {name: t for name, t in tensors(p).items() if t["category"] == "basis"}
    assert {name: t["shape"] for name, t in found.items()} == wanted and all(t["type"] == "fp32" for t in found.values())
    assert p["categories"].get("basis", 0) == sum(L * r * n * 4 for m, n, r in rows)
    for category in ("parameters", "gradients", "moments", "data"):
        assert p["categories"][category] == other["categories"][category]
    extra = {name for name, t in tensors(p).items() if t["category"] == "workspace"} - set(tensors(other))
    assert extra - {"z"} == ({"qr", "qr_reflectors", "qr_t", "qr_products"} if rows else set())
    assert "projection" not in tensors(p)
    assert p["full_rank_total_bytes"] == full["total_bytes"] and p["full_rank_level_2"] == full["full_rank_level_2"]
    assert (p["total_bytes"] == full["total_bytes"]) == (not rows)
    if rank == 1 and rows:  # a whole basis is no full rank: z stands in for x, and the basis is there besides
        assert p["total_bytes"] > full["total_bytes"] and "ln1.z" in tensors(p) or "qkv" not in linears
        assert p["flops_per_token"]["projection"] > 0 == full["flops_per_token"]["projection"]


@pytest.mark.parametrize("rank", [0.25, 1])
@pytest.mark.parametrize("gap, iterations, batch, total", [(0, 1, 4, 4), (50, 1, 4, 4), (10, 3, 4, 16), (1, 2, 1, 8)])
def test_flops(gap, iterations, batch, total, rank):
    """A refresh is x Q and x^T z of the first micro batch, and twice 2 n r^2 for the orthonormal factor; spread over the tokens of
    all steps to the next."""
    T = 256
    flags = ["-e", "d6", "-t", T, "-b", batch, "-d", total * T, "--rank", rank, "--compress", ALL]
    f = plan(*flags, "--projection", "eigen", "--gap", gap, "--refresh-iterations", iterations)["flops_per_token"]
    projection = update = refresh = 0
    for m, n in SHAPES.values():
        r = rank * n
        projection += L * 2 * n * r
        update += L * 2 * m * n * r / (total * T)
        refresh += L * iterations * (2 * 2 * batch * T * n * r + 2 * 2 * n * r * r)
    wanted = projection + (refresh / (gap * total * T) if gap else 0)
    assert abs(f["projection"] - wanted) <= 1 and abs(f["update"] - update) <= 1
    dense = plan(*flags)["flops_per_token"]
    assert f["forward"] == dense["forward"] and f["backward"] == dense["backward"] and f["recompute"] == 0


def test_whole_basis_is_not_full_rank(train):
    """One-sided: another optimizer, with the same forward pass."""
    args = ["-x", 4, "-n", -1, "-l", 1e-2]
    full, whole = train(*args, "--rank", 1, dump=True), train(*args, *EIGEN, "--rank", 1, dump=True)
    assert whole.losses[0] == full.losses[0] and whole.losses[1:] != full.losses[1:]
    for name, Q in bases(whole.dump).items():
        G = full.dump["grad." + name].astype(float)
        assert Q.shape[0] == Q.shape[1] and np.abs(whole.dump["grad." + name] - G @ Q).max() <= 3e-6 * np.abs(G).max()
        assert abs(np.linalg.norm(whole.dump["grad." + name]) / np.linalg.norm(G) - 1) <= 1e-6  # a rotation
