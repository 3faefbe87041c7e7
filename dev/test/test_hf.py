"""
data_prep/hf.py: weights from transformers to the trainer and back, from nanoGPT, to GGUF, and
what the trainer makes of them.

No network: a model on the Hub is one in a cache that the test lays out. What needs transformers
itself is skipped where with_transformers.py finds no Python that has it and PyTorch.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import formats
import with_transformers

sys.path.insert(0, os.path.join(formats.ROOT, "data_prep"))
import hf  # noqa: E402

TOOL = Path(formats.ROOT) / "data_prep" / "hf.py"
CONFIG = dict(context=24, vocab=151, layers=3, heads=4, channels=32, padded_vocab=256)
HF_CONFIG = dict(n_positions=24, vocab_size=151, n_layer=3, n_head=4, n_embd=32)

# A parameter's tensors in transformers, for layer l where it has layers, and whether they are
# transposed there.
NAMES = {"wte": ("wte.weight", False), "wpe": ("wpe.weight", False), "lnfw": ("ln_f.weight", False),
         "lnfb": ("ln_f.bias", False), "ln1w": ("h.{l}.ln_1.weight", False),
         "ln1b": ("h.{l}.ln_1.bias", False), "qkvw": ("h.{l}.attn.c_attn.weight", True),
         "qkvb": ("h.{l}.attn.c_attn.bias", False), "attprojw": ("h.{l}.attn.c_proj.weight", True),
         "attprojb": ("h.{l}.attn.c_proj.bias", False), "ln2w": ("h.{l}.ln_2.weight", False),
         "ln2b": ("h.{l}.ln_2.bias", False), "fcw": ("h.{l}.mlp.c_fc.weight", True),
         "fcb": ("h.{l}.mlp.c_fc.bias", False), "fcprojw": ("h.{l}.mlp.c_proj.weight", True),
         "fcprojb": ("h.{l}.mlp.c_proj.bias", False)}


def run(*args, env={}):
    return subprocess.run([sys.executable, TOOL, *map(str, args)], capture_output=True, text=True,
                          env=dict(os.environ, HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1",
                                   **env))


def good(*args, env={}):
    done = run(*args, env=env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def refused(done, *words):
    """One line that names each of the words, and status 2."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("hf.py: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert str(word) in done.stderr, f"'{word}' is not named: {done.stderr}"


def tensors_of(params):
    """A model of formats.py as transformers has it, without the prefix."""
    tensors = {}
    for param, (name, transposed) in NAMES.items():
        for record, values in formats.per_layer(param, params[param]):
            tensors[name.format(l=record.rpartition(".")[2])] = np.ascontiguousarray(
                values.T if transposed else values)
    tensors["wte.weight"] = tensors["wte.weight"][:CONFIG["vocab"]]
    return tensors


def save(folder, tensors, **config):
    from safetensors.numpy import save_file
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **HF_CONFIG, **config}))


@pytest.fixture(scope="module")
def params():
    params = formats.draw_model(CONFIG, 3)
    params["wte"][CONFIG["vocab"]:] = 0
    return params


@pytest.fixture
def model(tmp_path, params):
    """model.bin of the parameters."""
    formats.write_model(tmp_path / "model.bin", CONFIG, params)
    return tmp_path / "model.bin"

# ----------------------------------------------------------------------------
# files


def test_export(tmp_path, model, params):
    from safetensors.numpy import load_file
    said = good("export", model, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "generation_config.json",
                                                    "model.safetensors"]
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    got, want = load_file(tmp_path / "out" / "model.safetensors"), tensors_of(params)
    assert sorted(got) == sorted("transformer." + name for name in want)
    for name, values in want.items():
        assert got["transformer." + name].dtype == np.float32
        assert np.array_equal(got["transformer." + name], values), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: config[name] for name in HF_CONFIG} == HF_CONFIG
    assert config["n_ctx"] == HF_CONFIG["n_positions"]
    assert "without a tokenizer" in said
    assert f"{sum(values.size for values in want.values()):,} parameters" in said


def test_export_of_bf16(tmp_path, model, params):
    from safetensors.numpy import load_file
    formats.write_model(model, CONFIG, params, formats.BF16)
    good("export", model, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, values in tensors_of(params).items():
        assert np.array_equal(got["transformer." + name], formats.round_bf16(values)), name


def test_there_and_back(tmp_path, model):
    """
    An import of an export is the same file, bit for bit; over what stands there from an earlier
    one, too.
    """
    for _ in range(2):
        good("export", model, tmp_path / "out")
        good("import", tmp_path / "out", tmp_path / "new" / "again.bin")
        assert (tmp_path / "new" / "again.bin").read_bytes() == model.read_bytes()
    assert sorted(os.listdir(tmp_path / "new")) == ["again.bin"]


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_import(tmp_path, model, params, prefix, kind):
    tensors = {prefix + name: values for name, values in tensors_of(params).items()}
    # some files hold it, as they do attention's masks
    tensors["lm_head.weight"] = tensors[prefix + "wte.weight"]
    tensors[prefix + "h.0.attn.bias"] = np.tril(np.ones((1, 1, 24, 24), np.float32))
    tensors[prefix + "h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
    save(tmp_path / "in", tensors)
    good("import", tmp_path / "in", tmp_path / "out.bin",
         *(["--type", "bf16"] if kind == "bf16" else []))
    formats.write_model(model, CONFIG, params, formats.BF16 if kind == "bf16" else formats.FP32)
    assert (tmp_path / "out.bin").read_bytes() == model.read_bytes()


def test_import_of_half_precision(tmp_path, params):
    save(tmp_path / "in",
         {name: values.astype(np.float16) for name, values in tensors_of(params).items()})
    good("import", tmp_path / "in", tmp_path / "out.bin")
    for name, values in formats.read_model(tmp_path / "out.bin")[1].items():
        assert np.array_equal(values, params[name].astype(np.float16)), name


def test_import_of_bf16(tmp_path, params):
    """Widened, which loses nothing; beside tensors of other types, and where a name is in the
    file's metadata as well."""
    tensors, data, header, at = tensors_of(params), b"", {"__metadata__": {"format": "pt"}}, 0
    for name, values in tensors.items():
        half = name.startswith("h.")
        part = formats.to_bf16(values).tobytes() if half else values.tobytes()
        header[name] = {"dtype": "BF16" if half else "F32", "shape": list(values.shape),
                        "data_offsets": [at, at + len(part)]}
        data, at = data + part, at + len(part)
    text = json.dumps(header).encode()
    save(tmp_path / "in", tensors)
    data = len(text).to_bytes(8, "little") + text + data
    (tmp_path / "in" / "model.safetensors").write_bytes(data)
    good("import", tmp_path / "in", tmp_path / "out.bin")
    for name, values in formats.read_model(tmp_path / "out.bin")[1].items():
        layered = name not in formats.WITHOUT_LAYER
        wanted = formats.round_bf16(params[name]) if layered else params[name]
        assert np.array_equal(values, wanted), name


# What a PyTorch that is built for NumPy 1 does beside NumPy 2.
OLD_TORCH = """
__version__ = "2.2.0"
class Tensor:
    def float(self): return self
    def numpy(self): raise RuntimeError("Numpy is not available")
def zeros(n): return Tensor()
def load(path, map_location, weights_only): return {"wte.weight": Tensor()}
"""


def test_pytorch_and_numpy_do_not_fit(tmp_path, params):
    save(tmp_path / "in", tensors_of(params))
    (tmp_path / "in" / "model.safetensors").rename(tmp_path / "in" / "pytorch_model.bin")
    (tmp_path / "torch.py").write_text(OLD_TORCH)
    done = run("import", tmp_path / "in", tmp_path / "out.bin", env={"PYTHONPATH": str(tmp_path)})
    refused(done, "pytorch_model.bin", "PyTorch 2.2.0", f"NumPy {np.__version__}", "numpy<2")
    assert not (tmp_path / "out.bin").exists()


@pytest.mark.parametrize("layers, channels, count", [(12, 768, 124439808), (24, 1024, 354823168),
                                                     (36, 1280, 774030080), (48, 1600, 1557611200)])
def test_sizes(tmp_path, layers, channels, count):
    """
    The four sizes have their published numbers of parameters, and the padded vocabulary of llm.c's
    files.
    """
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="gpt2", n_positions=1024,
                                                          vocab_size=50257, n_layer=layers,
                                                          n_head=channels // 64, n_embd=channels)))
    shape = hf.read_config(str(tmp_path / "config.json"))
    assert shape.padded == 50304
    assert sum(np.prod(wanted)
               for _, wanted, _ in hf.tensors(shape)) == count + (50304 - 50257) * channels


def test_hub(tmp_path, params, model):
    """A model's name is looked up in the Hub's cache, which takes no network."""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    save(snapshot, tensors_of(params))
    (tmp_path / "hub" / "models--some--model" / "refs").mkdir()
    (tmp_path / "hub" / "models--some--model" / "refs" / "main").write_text("0123")
    said = good("import", "some/model", tmp_path / "out.bin",
                env={"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert "151" in said and (tmp_path / "out.bin").read_bytes() == model.read_bytes()
    done = run("import", "some/other", tmp_path / "other.bin",
               env={"HF_HUB_CACHE": str(tmp_path / "hub")})
    refused(done, "some/other", "no such folder", "downloaded", "give a folder")
    assert not (tmp_path / "other.bin").exists()


def test_missing_package(tmp_path, params):
    save(tmp_path / "in", tensors_of(params))
    shutil.copytree(tmp_path / "in", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    for package, source in (("safetensors", tmp_path / "in"), ("torch", tmp_path / "pickled"),
                            ("huggingface_hub", "gpt2"), ("numpy", "gpt2")):
        packages = tmp_path / package
        packages.mkdir()
        (packages / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
        refused(run("import", source, tmp_path / "out.bin", env={"PYTHONPATH": str(packages)}),
                package)

# ----------------------------------------------------------------------------
# bad input


def untied(tensors):
    tensors["lm_head.weight"] = tensors["wte.weight"] + 1


def not_finite(tensors):
    tensors["ln_f.bias"][5] = np.inf  # found when most of the file is written


@pytest.mark.parametrize(
    "config, change, named",
    [({"activation_function": "gelu"}, None,
      ["config.json", "activation_function", "'gelu'", "gelu_new"]),
     ({"model_type": "llama"}, None, ["config.json", "model_type", "'llama'"]),
     ({"scale_attn_by_inverse_layer_idx": True}, None, ["scale_attn_by_inverse_layer_idx"]),
     ({"tie_word_embeddings": False}, None, ["tie_word_embeddings"]),
     ({"layer_norm_epsilon": 1e-6}, None, ["layer_norm_epsilon"]),
     ({"n_inner": 64}, None, ["n_inner", "64"]),
     ({"n_head": 5}, None, ["config.json", "32 channels", "5 heads"]),
     ({"n_layer": None}, None, ["config.json", "n_layer"]),
     ({"n_positions": 0}, None, ["config.json", "n_positions"]),
     ({"vocab_size": 1 << 20}, None, ["config.json", "vocab_size"]),
     ({"n_embd": 32.5}, None, ["config.json", "n_embd"]),
     ({"n_embd": 64}, None, ["model.safetensors", "wte.weight", "(151, 32)", "(151, 64)"]),
     ({"n_layer": 4}, None, ["model.safetensors", "has no tensor h.3.ln_1.weight"]),
     ({"n_layer": 2}, None, ["model.safetensors", "h.2."]),
     ({}, lambda t: t.pop("ln_f.bias"), ["model.safetensors", "has no tensor ln_f.bias"]),
     ({}, lambda t: t.update({"h.1.attn.c_attn.weight": t["h.1.attn.c_attn.weight"].T.copy()}),
      ["h.1.attn.c_attn.weight", "(96, 32)", "(32, 96)"]),
     ({}, lambda t: t.update({"score.weight": np.zeros((2, 32), np.float32)}), ["score.weight"]),
     ({}, lambda t: t.update({"ln_f.bias": np.zeros(32, np.int32)}), ["ln_f.bias", "I32", "F32"]),
     ({}, untied, ["lm_head.weight", "wte.weight"]), ({}, not_finite, ["ln_f.bias", "not finite"])])
def test_bad_model(tmp_path, params, config, change, named):
    tensors = {name: values.copy() for name, values in tensors_of(params).items()}
    if change:
        change(tensors)
    save(tmp_path / "in", tensors, **config)
    refused(run("import", tmp_path / "in", tmp_path / "out.bin"), *named)
    assert os.listdir(tmp_path) == ["in"]


def test_bad_files(tmp_path, params, model):
    save(tmp_path / "in", tensors_of(params))
    weights, config = tmp_path / "in" / "model.safetensors", tmp_path / "in" / "config.json"
    whole, described = weights.read_bytes(), config.read_bytes()
    weights.write_bytes(whole[:-1])
    refused(run("import", tmp_path / "in", tmp_path / "out.bin"), weights, "cut short")
    weights.unlink()
    refused(run("import", tmp_path / "in", tmp_path / "out.bin"),
            "neither model.safetensors nor pytorch_model.bin")
    for text in b"[1]", b"{", b"\xff":
        config.write_bytes(text)
        refused(run("import", tmp_path / "in", tmp_path / "out.bin"), config, "no config.json")
    config.unlink()
    refused(run("import", tmp_path / "in", tmp_path / "out.bin"), config, "No such file")
    refused(run("import", model, tmp_path / "out.bin"), model, "is no folder")
    refused(run("import", tmp_path / "none", tmp_path / "out.bin"), "none", "no such folder")
    weights.write_bytes(whole)
    config.write_bytes(described)
    refused(run("import", tmp_path / "in", model / "out.bin"), "model.bin")
    refused(run("import", tmp_path / "in"), "TO")
    refused(run("import", tmp_path / "in", "out.bin", "--type", "fp16"), "--type", "fp16")
    refused(run("import", tmp_path / "in", "out.bin", "--type", "f16"), "--type", "gguf")
    refused(run("export", model, "out", "--type", "bf16"), "--type", "import")
    refused(run("change", model, "out"), "change", "export")
    refused(run("import", tmp_path / "in", "out.bin", "--tokenizer", "t"), "--tokenizer", "export")
    refused(run("gguf", model, tmp_path / "out.gguf"), model, "--tokenizer FILE")
    refused(run("gguf", weights, tmp_path / "out.gguf"), weights, "no GPT-2 model file")
    assert sorted(os.listdir(tmp_path)) == ["in", "model.bin"]


@pytest.mark.parametrize("at, value, named",
                         [(0, 20240520, "is no GPT-2 model file"), (1, 2, "is no GPT-2 model file"),
                          (2, 0, "its context is 0"), (3, 70000, "its vocabulary is 70000"),
                          (4, -1, "its layers is -1"), (5, 5, "5 heads"),
                          (6, 36, "its header asks for"), (7, 150, "its padded vocabulary is 150"),
                          (7, 257, "its header asks for"), (None, 1000, "is no GPT-2 model file"),
                          (None, 5000, "its header asks for"), (None, 0, "is no GPT-2 model file")])
def test_bad_bin(tmp_path, model, at, value, named):
    data = bytearray(model.read_bytes())
    if at is None:
        data = data[:value]
    else:
        data[4 * at:4 * at + 4] = value.to_bytes(4, "little", signed=True)
    model.write_bytes(data)
    refused(run("export", model, tmp_path / "out"), "model.bin", named)
    assert os.listdir(tmp_path) == ["model.bin"]

# ----------------------------------------------------------------------------
# tokenizers

GPT2 = Path(formats.ROOT).parent / "shared" / "data" / "gpt2"
needs_gpt2 = pytest.mark.skipif(not GPT2.is_dir(), reason="no GPT-2 vocabulary in shared/data/gpt2")
TEXTS = ["Hello world", " it's 2026, naïve\n\n\tmain() {  }\r\n", "日本語 \U0001f642\x00\x7f"]


def write_tokenizer(path, table, end_of_text):
    header = np.zeros(256, "<i4")
    header[:4] = [20240328, 2, len(table), end_of_text]
    path.write_bytes(header.tobytes() + b"".join(bytes([len(t)]) + t for t in table))


@pytest.fixture(scope="module")
def gpt2():
    import common
    return common.gpt2_tokenizer(str(GPT2 / "vocab.bpe"), str(GPT2 / "encoder.json"))


def small_model(folder, vocab):
    """A model of that vocabulary: its file, its parameters."""
    config = dict(CONFIG, vocab=vocab, padded_vocab=-(-vocab // 128) * 128, layers=2)
    params = formats.draw_model(config, 5)
    params["wte"][vocab:] = 0
    formats.write_model(folder / "model.bin", config, params)
    return folder / "model.bin", params


@needs_gpt2
def test_merges(gpt2):
    """Which pairs become which token follows from the tokens alone: those of GPT-2's own file."""
    lines = (GPT2 / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    assert hf.merges_of(gpt2) == lines[1:50001]


def check_tokenizer(folder, want, tmp_path):
    with_transformers.good("tokens", folder, json.dumps(TEXTS), tmp_path / "tokens.json")
    ids, spelled = json.loads((tmp_path / "tokens.json").read_text())
    assert ids == want and spelled == TEXTS


@needs_gpt2
@pytest.mark.slow
def test_export_with_gpt2s_tokenizer(tmp_path, gpt2):
    """Of tokenizer.bin beside the model, as a run leaves it, transformers makes tiktoken's ids;
    and back."""
    model, _ = small_model(tmp_path, 50257)
    write_tokenizer(tmp_path / "tokenizer.bin", gpt2.table, 50256)
    good("export", model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|endoftext|>"
    check_tokenizer(tmp_path / "out", [ids.tolist() for ids in gpt2.encode(TEXTS)], tmp_path)

    said = good("import", tmp_path / "out", tmp_path / "new" / "model.bin")
    again = tmp_path / "new" / "tokenizer.bin"
    assert "tokenizer.bin" in said
    assert again.read_bytes() == (tmp_path / "tokenizer.bin").read_bytes()
    write_tokenizer(again, gpt2.table[:9], 0)  # another model's
    said = good("import", tmp_path / "out", tmp_path / "new" / "model.bin")
    assert "left alone" in said and len(again.read_bytes()) == 1024 + 18
    os.remove(tmp_path / "out" / "tokenizer.json")
    shutil.copy(GPT2 / "encoder.json", tmp_path / "out" / "vocab.json")  # as GPT-2's folder has it
    os.remove(again)
    good("import", tmp_path / "out", tmp_path / "new" / "model.bin")
    assert again.read_bytes() == (tmp_path / "tokenizer.bin").read_bytes()


def test_export_of_bytes(tmp_path):
    model, _ = small_model(tmp_path, 256)
    good("export", model, tmp_path / "out")
    check_tokenizer(tmp_path / "out", [list(text.encode()) for text in TEXTS], tmp_path)
    good("import", tmp_path / "out", tmp_path / "new" / "model.bin")
    write_tokenizer(tmp_path / "want.bin", [bytes([b]) for b in range(256)], 10)
    assert (tmp_path / "new" / "tokenizer.bin").read_bytes() == (tmp_path / "want.bin").read_bytes()


@pytest.mark.parametrize("command", ["export", "gguf"])
def test_bad_tokenizer(tmp_path, model, command):
    given, out = tmp_path / "t", tmp_path / "out"
    for table, named in (([b"a", b"b", b"abc"], "abc"), ([b"a", b"a"], "twice"),
                         ([bytes([i, i]) for i in range(152)], "152 tokens")):
        write_tokenizer(given, table, 0)
        refused(run(command, model, out, "--tokenizer", given), named)
    for data in (b"", b"x" * 2000, given.read_bytes()[:-1], given.read_bytes() + b"x"):
        given.write_bytes(data)
        refused(run(command, model, out, "--tokenizer", given), given, "no tokenizer.bin")
    refused(run(command, model, out, "--tokenizer", tmp_path / "none"), "none")
    assert sorted(os.listdir(tmp_path)) == ["model.bin", "t"]

# ----------------------------------------------------------------------------
# GGUF


def gguf_logits(path, inputs):
    """GPT-2's logits, from what a GGUF holds and from nothing else; in double precision."""
    from gguf import GGUFReader, dequantize
    reader = GGUFReader(path)
    field = {name: value.contents() for name, value in reader.fields.items()}
    w = {t.name: dequantize(t.data, t.tensor_type).astype(float) for t in reader.tensors}
    heads = field["gpt2.attention.head_count"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x**2).mean(-1, keepdims=True) + field["gpt2.attention.layer_norm_epsilon"])
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]
    B, T = inputs.shape
    x = w["token_embd.weight"][inputs] + w["position_embd.weight"][:T]
    for layer in range(field["gpt2.block_count"]):
        blk = f"blk.{layer}."
        qkv = linear(norm(x, blk + "attn_norm"), blk + "attn_qkv")
        q, k, v = (part.reshape(B, T, heads, -1).swapaxes(1, 2) for part in np.split(qkv, 3, -1))
        scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]) + np.triu(np.full((T, T), -np.inf), 1)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = (p / p.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(B, T, -1)
        x = x + linear(y, blk + "attn_output")
        h = linear(norm(x, blk + "ffn_norm"), blk + "ffn_up")
        h = h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))) / 2
        x = x + linear(h, blk + "ffn_down")
    assert field["gpt2.feed_forward_length"] == h.shape[-1]
    assert field["gpt2.embedding_length"] == x.shape[-1]
    return field, norm(x, "output_norm") @ w["token_embd.weight"].T


# float32 has a unit roundoff of 6e-8, f16 one of 5e-4, bf16 of 4e-3; the weights are so rounded,
# and a logit ends some ten products in a row
@pytest.mark.parametrize("kind, tolerance", [("fp32", 1e-5), ("f16", 5e-3), ("bf16", 4e-2)])
def test_gguf(tmp_path, kind, tolerance):
    """What is read back has the trainer's own logits."""
    pytest.importorskip("gguf")
    model, _ = small_model(tmp_path, 256)
    tokens = np.random.default_rng(5).integers(0, 256, 2 * 20 + 1)
    formats.write_tokens(tmp_path / "tokens.bin", tokens, 256)
    done = formats.run_trainer(["-e", model, "--train", tmp_path / "tokens.bin", "-b", 2, "-t", 20,
                                "-x", 1, "--dump", tmp_path / "dump"])
    assert done.returncode == 0, done.stderr
    dump = formats.read_dump(tmp_path / "dump")
    good("gguf", model, tmp_path / "out.gguf", "--type", kind)
    field, logits = gguf_logits(tmp_path / "out.gguf", dump["inputs"].astype(int).reshape(2, 20))
    near("logits", logits, dump["logits"].reshape(logits.shape), tolerance)
    assert field["general.architecture"] == "gpt2" and field["gpt2.context_length"] == 24
    assert len(field["tokenizer.ggml.tokens"]) == 256
    assert field["tokenizer.ggml.tokens"][ord(" ")] == "Ġ"
    assert not (tmp_path / "out.gguf.tmp").exists()


@needs_gpt2
@pytest.mark.slow
def test_gguf_has_gpt2s_tokenizer(tmp_path, gpt2):
    gguf = pytest.importorskip("gguf")
    model, _ = small_model(tmp_path, 50257)
    write_tokenizer(tmp_path / "t", gpt2.table, 50256)
    good("gguf", model, tmp_path / "out.gguf", "--tokenizer", tmp_path / "t")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 50256
    want = json.loads((GPT2 / "encoder.json").read_text(encoding="utf-8"))
    assert fields["tokenizer.ggml.tokens"].contents() == sorted(want, key=want.get)
    assert fields["tokenizer.ggml.merges"].contents() == hf.merges_of(gpt2)
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[:-1] == [gguf.TokenType.NORMAL] * 50256 and types[-1] == gguf.TokenType.CONTROL


def test_gguf_beyond_f16(tmp_path):
    pytest.importorskip("gguf")
    model, params = small_model(tmp_path, 256)
    params["fcw"][1, 2, 3] = 1e5
    formats.write_model(model, dict(CONFIG, vocab=256, padded_vocab=256, layers=2), params)
    refused(run("gguf", model, tmp_path / "out.gguf", "--type", "f16"), model, "ffn_up", "bf16")
    assert os.listdir(tmp_path) == ["model.bin"]

# ----------------------------------------------------------------------------
# nanoGPT


def checkpoint(path, tensors, **args):
    """As nanoGPT writes it, whose linear layers are not transposed."""
    np.savez(path.with_suffix(".npz"), **tensors)
    args = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": True,
            "vocab_size": 151, **args}
    with_transformers.good("checkpoint", path, path.with_suffix(".npz"), json.dumps(args))
    os.remove(path.with_suffix(".npz"))


def nanogpt_tensors(params, prefix="_orig_mod.transformer."):
    tensors = {}
    for name, values in tensors_of(params).items():
        linear = values.ndim == 2 and name.startswith("h.")
        tensors[prefix + name] = values.T.copy() if linear else values
    tensors["_orig_mod.lm_head.weight"] = tensors[prefix + "wte.weight"]
    return tensors


def import_ckpt(path, out):
    return with_transformers.ask("run", TOOL, "import", path, out)


def test_nanogpt(tmp_path, model, params):
    checkpoint(tmp_path / "ckpt.pt", nanogpt_tensors(params))
    done = import_ckpt(tmp_path / "ckpt.pt", tmp_path / "out.bin")
    assert done.returncode == 0 and "GELU" in done.stdout, done.stderr
    assert (tmp_path / "out.bin").read_bytes() == model.read_bytes()


@pytest.mark.slow
def test_nanogpt_without_biases(tmp_path, params):
    """They are 0 then; and a vocabulary of 50304 is GPT-2's."""
    tensors = {name: values for name, values in nanogpt_tensors(params, "transformer.").items()
               if not name.endswith("bias") and "lm_head" not in name}
    tensors["transformer.wte.weight"] = np.ones((50304, 32), np.float32)
    checkpoint(tmp_path / "ckpt.pt", tensors, bias=False, vocab_size=50304)
    assert import_ckpt(tmp_path / "ckpt.pt", tmp_path / "out.bin").returncode == 0
    config, got = formats.read_model(tmp_path / "out.bin")
    assert (config["vocab"], config["padded_vocab"]) == (50257, 50304)
    assert got["wte"][:50257].all() and not got["wte"][50257:].any()
    for name in formats.PARAMS[2:]:
        assert np.array_equal(got[name], 0 * params[name] if name.endswith("b") else params[name])


@pytest.mark.slow
def test_nanogpt_bad_input(tmp_path, params):
    path = tmp_path / "ckpt.pt"
    tensors = nanogpt_tensors(params)
    for change, args, named in (({}, {"n_head": 5}, "5 heads"), ({}, {"n_layer": 4}, "h.3."),
                                ({}, {"n_embd": 64}, "(151, 64)"),
                                ({}, {"block_size": None}, "None"),
                                ({"rope": np.ones(3)}, {}, "rope")):
        checkpoint(path, {**tensors, **change}, **args)
        refused(import_ckpt(path, tmp_path / "out.bin"), path, named)
    with_transformers.good("checkpoint", path, write_npz(tmp_path / "n.npz", tensors), "null")
    refused(import_ckpt(path, tmp_path / "out.bin"), path, "no checkpoint of nanoGPT")
    path.write_bytes(pickle.dumps(Path("x")))
    refused(import_ckpt(path, tmp_path / "out.bin"), path, "PyTorch")
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "n.npz"]


def write_npz(path, tensors):
    np.savez(path, **tensors)
    return path

# ----------------------------------------------------------------------------
# with transformers


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A folder with a random model by transformers, and the same model for the trainer."""
    folder = tmp_path_factory.mktemp("transformers")
    with_transformers.good("make", folder, json.dumps(HF_CONFIG))
    good("import", folder, folder / "model.bin")
    return folder


def loaded(folder, out):
    with_transformers.good("load", folder, out)
    return dict(np.load(out))


def test_transformers_reads_the_same_weights_back(random_model, tmp_path):
    good("export", random_model / "model.bin", tmp_path / "out")
    got, want = (loaded(tmp_path / "out", tmp_path / "out.npz"),
                 dict(np.load(random_model / "tensors.npz")))
    assert sorted(got) == sorted(want) and len(want) == 5 + 12 * HF_CONFIG["n_layer"]
    for name, values in want.items():
        assert np.array_equal(got[name],
                              values) and got[name].dtype == values.dtype == np.float32, name


@pytest.mark.slow
def test_pytorch_model_bin(random_model, tmp_path):
    with_transformers.good("run", TOOL, "import", random_model / "pickled", tmp_path / "out.bin")
    assert (tmp_path / "out.bin").read_bytes() == (random_model / "model.bin").read_bytes()
    folder = tmp_path / "in"
    shutil.copytree(random_model / "pickled", folder)
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    refused(with_transformers.ask("run", TOOL, "import", folder, tmp_path / "out2.bin"),
            "pytorch_model.bin", "PyTorch")


def near(name, got, want, tolerance, unit=None):
    """
    got differs from want nowhere by more than tolerance in units of want's greatest element, or of
    unit.
    """
    error = np.abs(np.asarray(got, np.float64).reshape(want.shape)
                   - want).max() / (unit or np.abs(want).max())
    assert error <= tolerance, f"{name} is off by {error:.2e}, {tolerance:.0e} allowed"


def test_trainer_and_transformers_agree(random_model, tmp_path):
    """
    Logits and loss of a model by transformers, ten AdamW steps, and the trained model back in
    transformers.
    """
    B, T = 3, 20
    hyper = dict(steps=10, lr=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-3, clip=1.0)
    tokens = np.random.default_rng(5).integers(0, 151, B * T + 1)
    formats.write_tokens(tmp_path / "tokens.bin", tokens, 151)
    out = tmp_path / "run"
    done = formats.run_trainer(
        ["-e", random_model / "model.bin", "--train", tmp_path / "tokens.bin", "-b", B, "-t", T,
         "-x", hyper["steps"], "--overfit", "--optimizer", "adamw", "--rank", 1, "-o", out, "-n",
         -1, "--dump", tmp_path / "dump", "-l", hyper["lr"], "-k", "constant", "-c",
         hyper["weight_decay"], "--beta1", hyper["beta1"], "--beta2", hyper["beta2"], "--eps",
         hyper["eps"], "--clip", hyper["clip"]])
    assert done.returncode == 0, done.stderr
    dump = formats.read_dump(tmp_path / "dump")
    np.savez(tmp_path / "job.npz", inputs=dump["inputs"], targets=dump["targets"])
    with_transformers.good("train", random_model, tmp_path / "job.npz", tmp_path / "want.npz",
                           json.dumps(hyper))
    want = dict(np.load(tmp_path / "want.npz"))

    # float32 has a unit roundoff of 6e-8. A logit ends some ten products in a row of 32 to 128
    # terms, each off by about 1e-6.
    near("logits", dump["logits"], want["logits"], 1e-5)
    near("loss", dump["loss"], want["losses"][:1], 2e-6)
    # the log has 6 decimals
    near("losses", [step["loss"] for step in formats.read_log(out)[1]], want["losses"], 5e-6)
    assert want["losses"][-1] < want["losses"][0] - 0.5, "ten steps change the model"

    # In units of lr, which is about what a step moves a weight by. eps = 1e-3 keeps U = m /
    # (sqrt(v) + eps) from magnifying the rounding of gradients near 0, so ten steps are off by some
    # 1e-5; a wrong decay or eps would be off by more than 1e-2.
    good("export", out / f"model_{hyper['steps']:08d}.bin", tmp_path / "out")
    got = loaded(tmp_path / "out", tmp_path / "out.npz")
    before = dict(np.load(random_model / "tensors.npz"))
    for name, values in got.items():
        near(name, values, want[name], 2e-4, hyper["lr"])
        assert not np.array_equal(values, before[name]), f"{name} has not been trained"
