#!/usr/bin/env python3
"""
GPT-2's weights from Hugging Face's transformers to the trainer's model .bin, and back; from
nanoGPT; to GGUF, which llama.cpp reads.

hf.py import SOURCE MODEL.bin
    SOURCE is a folder with config.json and model.safetensors (or
    pytorch_model.bin, which takes PyTorch to read), or the name of such a model
    on the Hugging Face Hub, which is downloaded once: gpt2, gpt2-medium,
    gpt2-large, gpt2-xl; or a ckpt.pt of nanoGPT. The vocabulary is padded with
    zero rows to a multiple of 128. A tokenizer of byte pairs in the folder
    becomes tokenizer.bin beside MODEL.bin.

hf.py export MODEL.bin FOLDER
    Writes FOLDER/config.json, model.safetensors and generation_config.json, in
    fp32 without the padding, for GPT2LMHeadModel.from_pretrained(FOLDER).
    llama.cpp's convert_hf_to_gguf.py takes the folder where the tokenizer is
    GPT-2's; it refuses those that it does not know, bytes among them.

hf.py gguf MODEL.bin FILE.gguf
    Writes the model and its tokenizer, whichever it is, in one file.

The tokenizer of an export is --tokenizer FILE, else tokenizer.bin beside
MODEL.bin, where a run leaves it, else bytes where the vocabulary is 256.

The .bin, as llm.c has it, is a header of 256 int32, [0] = 20240326, [1] = 3
(fp32) or 5 (bf16), [2] = context, [3] = vocabulary, [4] = layers, [5] = heads,
[6] = channels, [7] = padded vocabulary; then the weights, each over all layers.

example: hf.py import gpt2 gpt2.bin
         hf.py export runs/mine/model_00001000.bin mine/
         hf.py gguf runs/mine/model_00001000.bin mine.gguf --type f16
"""

import contextlib
import json
import os
import re
import struct
import warnings
from types import SimpleNamespace

# says it if NumPy is missing
from common import (Parser, Problem, byte_tokenizer, header, holding, missing_package,
                    read_tokenizer, reading, run, whole_file, write_tokenizer)
import numpy as np

MAGIC, FP32, BF16 = 20240326, 3, 5
HEADER_BYTES = 1024
LONGEST = 100 << 20  # bytes of a safetensors file's header, as the package has it
PAD_TO = 128
GPT2_VOCABULARY, GPT2_END_OF_TEXT, GPT2_PADDED = 50257, 50256, 50304

# The header's fields from [2] on: name here, name in config.json, range.
FIELDS = [("context", "n_positions", 1, 1 << 20), ("vocabulary", "vocab_size", 1, 1 << 16),
          ("layers", "n_layer", 1, 1 << 10), ("heads", "n_head", 1, 1 << 10),
          ("channels", "n_embd", 1, 1 << 16)]

NANOGPT_FIELDS = ["block_size", "vocab_size", "n_layer", "n_head", "n_embd"]  # the same, there

# What else of config.json changes the model, and the one value that the trainer's GPT-2 has, which
# is also what transformers takes where the file says nothing.
FIXED = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
         "tie_word_embeddings": True, "scale_attn_weights": True,
         "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}

# Of a layer: name in transformers, shape here in channels, and whether it is a Conv1D, whose weight
# is transposed there.
LAYER = {"ln_1.weight": ((1,), False), "ln_1.bias": ((1,), False),
         "attn.c_attn.weight": ((3, 1), True), "attn.c_attn.bias": ((3,), False),
         "attn.c_proj.weight": ((1, 1), True), "attn.c_proj.bias": ((1,), False),
         "ln_2.weight": ((1,), False), "ln_2.bias": ((1,), False),
         "mlp.c_fc.weight": ((4, 1), True), "mlp.c_fc.bias": ((4,), False),
         "mlp.c_proj.weight": ((1, 4), True), "mlp.c_proj.bias": ((1,), False)}

PREFIX = "transformer."  # before a tensor's name, where the model was saved with its head
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # constants that older versions saved too


def tensors(shape):
    """
    The tensors in the .bin's order: triples (name in transformers, shape in the .bin, whether it is
    transposed in transformers).
    """
    C = shape.channels
    yield "wte.weight", (shape.padded, C), False
    yield "wpe.weight", (shape.context, C), False
    for part, (channels, transposed) in LAYER.items():
        for layer in range(shape.layers):
            yield f"h.{layer}.{part}", tuple(n * C for n in channels), transposed
    yield "ln_f.weight", (C,), False
    yield "ln_f.bias", (C,), False


def split_name(name):
    """h.3.mlp.c_fc.weight -> 3, mlp.c_fc, weight; the layer is None outside the layers."""
    return re.fullmatch(r"(?:h\.(\d+)\.)?(.*)\.(weight|bias)", name).groups()


def check_shape(path, values):
    """
    A model's shape from the header's fields, checked as the trainer does. `values` are pairs (name
    for an error message, value).
    """
    shape = SimpleNamespace()
    for (field, _, low, high), (name, value) in zip(FIELDS, values):
        if type(value) is not int or not low <= value <= high:
            raise Problem(f"{path}: its {name} is {value!r}, not a whole number from {low} to "
                          f"{high}")
        setattr(shape, field, value)
    if shape.channels % shape.heads:
        raise Problem(f"{path}: {shape.channels} channels do not divide into {shape.heads} heads")
    return shape

# ----------------------------------------------------------------------------
# import


def find_source(source):
    """The folder that `source` names, or where the model of that name was downloaded to."""
    if os.path.isdir(source):
        return source
    if os.path.exists(source):
        raise Problem(f"{source}: is no folder; give the folder with config.json and "
                      "model.safetensors, or nanoGPT's ckpt.pt")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise Problem(f"{source}: there is no such folder, "
                      "and it is no name of a model on the Hub such as gpt2")
    try:
        import huggingface_hub
    except ImportError:
        raise Problem(f"{source}: there is no such folder, and to download a model of that name "
                      + missing_package("huggingface_hub")) from None
    try:
        download = huggingface_hub.snapshot_download
        folder = download(source, allow_patterns=["config.json", "model.safetensors",
                                                  "tokenizer.json", "vocab.json"])
        if not os.path.exists(os.path.join(folder, "model.safetensors")):
            folder = download(source, allow_patterns=["config.json", "pytorch_model.bin"])
    except Exception as error:  # of the network, of the Hub, of the disk
        reason = (str(error).splitlines() or [""])[0]
        raise Problem(f"{source}: there is no such folder, and no model of that name could be "
                      f"downloaded ({type(error).__name__}: {reason}); "
                      "give a folder with config.json and model.safetensors") from None
    return folder


def read_config(path):
    """The model's shape from its config.json."""
    try:
        with reading(path), open(path, encoding="utf-8-sig") as file:
            get = json.load(file).get
    except (ValueError, AttributeError) as error:
        raise Problem(f"{path}: is no config.json of transformers: {error}") from None
    for name, value in FIXED.items():
        if get(name, value) != value:
            raise Problem(f"{path}: {name} is {get(name)!r}; the trainer's GPT-2 has {value!r}")
    shape = check_shape(path, [(name, get(name)) for _, name, _, _ in FIELDS])
    if get("n_inner") not in (None, 4 * shape.channels):
        raise Problem(f"{path}: n_inner is {get('n_inner')!r}; "
                      "the trainer's GPT-2 has four times n_embd")
    shape.padded = -(-shape.vocabulary // PAD_TO) * PAD_TO
    return shape


def open_safetensors(path):
    """The names of a file's tensors, and a function that reads one as NumPy has it."""
    try:
        import safetensors
    except ImportError:
        raise Problem(missing_package("safetensors")) from None
    try:
        with reading(path), open(path, "rb") as data:
            length, = struct.unpack("<Q", data.read(8).ljust(8, b"\0"))
            entries = json.loads(data.read(min(length, LONGEST)))
            offsets = {name: 8 + length + entry["data_offsets"][0]
                       for name, entry in entries.items() if name != "__metadata__"}
        file = safetensors.safe_open(path, framework="np")
    except (ValueError, AttributeError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise Problem(f"{path}: is no safetensors file, or is cut short: {error}") from None

    def read(name):
        values = file.get_slice(name)
        kind, shape = values.get_dtype(), tuple(values.get_shape())
        if kind == "BF16":  # NumPy has no such type, and fp32 has all its values
            return widen(np.fromfile(path, "<u2", int(np.prod(shape)),
                                     offset=offsets[name]).reshape(shape))
        if kind not in ("F32", "F16"):
            raise Problem(f"{path}: {name} is {kind}, not F32, F16 or BF16; save the model anew, "
                          "after model.float()")
        return file.get_tensor(name)
    return list(file.keys()), read


def load_pytorch(path):
    """What torch.save wrote to a file, read so that nothing in it can run code."""
    try:
        import torch
    except ImportError:
        raise Problem(f"{path}: takes PyTorch to read; install torch, or get the model's "
                      "model.safetensors") from None
    try:
        with warnings.catch_warnings():  # an error says it all
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, of zip, of PyTorch
        raise Problem(f"{path}: is no file of weights by PyTorch, or none that PyTorch "
                      f"{torch.__version__} reads without running what is in it "
                      f"({type(error).__name__}); newer ones read more") from None
    try:
        torch.zeros(1).numpy()
    except RuntimeError as error:
        raise Problem(f"{path}: PyTorch {torch.__version__} does not work with NumPy "
                      f"{np.__version__} ({str(error).splitlines()[0]}); "
                      "install a newer torch, or numpy<2") from None
    return loaded


def names_and_read(path, state):
    """As open_safetensors, of a dict of PyTorch's tensors."""
    if not isinstance(state, dict) or not all(hasattr(each, "numpy") for each in state.values()):
        raise Problem(f"{path}: is no file of weights by PyTorch")
    return list(state), lambda name: state[name].float().numpy()


def open_pytorch(path):
    return names_and_read(path, load_pytorch(path))


def without_prefix(names):
    """Names of tensors as they stand in a file, by their names in GPT-2."""
    return {re.sub(rf"^(_orig_mod\.)?({re.escape(PREFIX)})?", "", name): name for name in names}


def open_weights(folder):
    """
    Of a model's weights: the path, the names there by the names without prefix, and a function that
    reads one tensor.
    """
    openers = {"model.safetensors": open_safetensors, "pytorch_model.bin": open_pytorch}
    for name, opener in openers.items():
        path = os.path.join(folder, name)
        if os.path.exists(path):
            names, read = opener(path)
            return path, without_prefix(names), read
    raise Problem(f"{folder}: has neither model.safetensors nor pytorch_model.bin; "
                  "weights in several files are written as one by save_pretrained(folder, "
                  "max_shard_size='50GB')")


def open_folder(folder):
    """The model in a folder of transformers."""
    shape = read_config(os.path.join(folder, "config.json"))
    path, names, read = open_weights(folder)
    return SimpleNamespace(path=path, says="config.json", shape=shape, names=names, read=read,
                           rows=shape.vocabulary, conv1d=True, biases=True)


def open_nanogpt(path):
    """
    The model in a checkpoint of nanoGPT, whose linear layers are stored as ours are. It pads
    GPT-2's vocabulary to 50304 and knows no other; without biases, ours are 0.
    """
    checkpoint = load_pytorch(path)
    try:
        names, read = names_and_read(path, checkpoint["model"])
        about = checkpoint["model_args"]
        sizes = [about[name] for name in NANOGPT_FIELDS]
    except (KeyError, TypeError):
        raise Problem(f"{path}: is no checkpoint of nanoGPT, which has model and "
                      "model_args") from None
    shape = check_shape(path, list(zip((field[1] for field in FIELDS), sizes)))
    rows = shape.vocabulary
    if rows == GPT2_PADDED:
        shape.vocabulary = GPT2_VOCABULARY
    shape.padded = -(-shape.vocabulary // PAD_TO) * PAD_TO
    return SimpleNamespace(path=path, says="model_args", shape=shape, names=without_prefix(names),
                           read=read, rows=rows, conv1d=False, biases=about.get("bias", True))


def to_bf16(values):
    """float32 to the 16 bits of bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2")


def widen(bits):
    """The 16 bits of bf16 to float32."""
    return (bits.astype("<u4") << 16).view("<f4")


def import_model(source, out, kind):
    nanogpt = source.endswith(".pt") and os.path.isfile(source)
    folder = None if nanogpt else find_source(source)
    model = open_nanogpt(source) if nanogpt else open_folder(folder)
    path, shape, names = model.path, model.shape, model.names

    def get(name, wanted):
        if name not in names:
            if name.endswith(".bias") and not model.biases:
                return np.zeros(wanted, "<f4")
            raise Problem(f"{path}: has no tensor {name}, which GPT-2 has")
        values = model.read(names[name])
        if values.shape != wanted:
            raise Problem(f"{path}: {name} has the shape {values.shape}; {model.says} asks for "
                          f"{wanted}")
        if not np.isfinite(values).all():
            raise Problem(f"{path}: {name} holds a value that is not finite")
        return values.astype("<f4", copy=False)

    unknown = set(names) - {name for name, _, _ in tensors(shape)} - {"lm_head.weight"}
    unknown = sorted(name for name in unknown if not MASKS.fullmatch(name))
    if unknown:
        raise Problem(f"{path}: holds {unknown[0]}, which is no tensor of a GPT-2 of "
                      f"{shape.layers} layers with a language model's head")
    wte = get("wte.weight", (model.rows, shape.channels))
    if "lm_head.weight" in names and not np.array_equal(get("lm_head.weight", wte.shape), wte):
        raise Problem(f"{path}: lm_head.weight is not wte.weight; "
                      "the trainer's GPT-2 has one matrix for both")
    wte = np.pad(wte[:shape.vocabulary], ((0, shape.padded - shape.vocabulary), (0, 0)))

    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    with whole_file(out) as file:
        fields = [getattr(shape, field) for field, *_ in FIELDS]
        file.write(header(MAGIC, BF16 if kind == "bf16" else FP32, *fields, shape.padded))
        for name, wanted, transposed in tensors(shape):
            if name == "wte.weight":
                values = wte
            else:
                transposed = transposed and model.conv1d
                values = get(name, wanted[::-1] if transposed else wanted)
                values = values.T if transposed else values
            file.write((to_bf16(values) if kind == "bf16" else values).tobytes())
    print(f"wrote {out}: {describe(shape)}, {kind}")
    if nanogpt:
        print("nanoGPT's GELU is the exact one, the trainer's the approximation by tanh that GPT-2 "
              "has: losses differ a little")
    else:
        import_tokenizer(folder, os.path.join(os.path.dirname(out), "tokenizer.bin"), shape)

# ----------------------------------------------------------------------------
# tokenizers of byte pairs, which spell each byte as a character that can be printed

PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
SPELLING = {byte: chr(byte) for byte in PRINTABLE}
SPELLING.update({byte: chr(256 + i) for i, byte in enumerate(OTHERS)})
BYTE_OF = {character: byte for byte, character in SPELLING.items()}
MARK = "<|endoftext|>"


def spell(piece):
    return "".join(SPELLING[byte] for byte in piece)


def find_tokenizer(given, model, shape):
    """The tokenizer of a model .bin, or None where none is known."""
    path = given or os.path.join(os.path.dirname(model), "tokenizer.bin")
    if not given and not os.path.exists(path):
        return byte_tokenizer() if shape.vocabulary == 256 else None
    tokenizer = read_tokenizer(path)
    if tokenizer.vocabulary > shape.vocabulary:
        raise Problem(f"{path}: has {tokenizer.vocabulary} tokens, {model} {shape.vocabulary}; "
                      "--tokenizer FILE names its own")
    if len(set(tokenizer.table)) < tokenizer.vocabulary:
        raise Problem(f"{path}: has the same token twice, as no tokenizer of byte pairs has")
    return tokenizer


def has_mark(tokenizer):
    """Whether its end of text is a token of its own, spelled out, and not one of the bytes."""
    return len(tokenizer.table[tokenizer.end_of_text]) > 1


def merges_of(tokenizer):
    """
    The pairs of tokens that become one, first the first. They are not in the file, but a token's
    id is its rank: merging by those below it leaves the two parts that it is merged from.
    """
    ids = {piece: token for token, piece in enumerate(tokenizer.table)}
    merges = []
    for token, piece in enumerate(tokenizer.table):
        if len(piece) < 2 or token == tokenizer.end_of_text:
            continue
        parts = [piece[i:i + 1] for i in range(len(piece))]
        while len(parts) > 2:
            joined = [a + b for a, b in zip(parts, parts[1:])]
            rank, i = min((ids.get(both, token), i) for i, both in enumerate(joined))
            if rank >= token:
                break
            parts[i:i + 2] = [joined[i]]
        if len(parts) > 2 or not all(part in ids for part in parts):
            raise Problem(f"the tokenizer's token {token}, {piece!r}, is no pair of earlier ones: "
                          "it is no tokenizer of byte pairs, which is the only kind that can "
                          "be written")
        merges.append(" ".join(map(spell, parts)))
    return merges


def tokenizer_files(tokenizer):
    """The tokenizer as transformers has it: {name of a JSON file: content}."""
    spelled = list(map(spell, tokenizer.table))
    end, added, mark = tokenizer.end_of_text, [], None
    if has_mark(tokenizer):
        mark = spelled[end] = tokenizer.table[end].decode(errors="replace")
        added = [{"id": end, "content": mark, "single_word": False, "lstrip": False,
                  "rstrip": False, "normalized": False, "special": True}]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
             "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
             "vocab": {name: token for token, name in enumerate(spelled)},
             "merges": merges_of(tokenizer)}
    return {"tokenizer.json": {"version": "1.0", "truncation": None, "padding": None,
                               "added_tokens": added, "normalizer": None, "pre_tokenizer": level,
                               "post_processor": None, "decoder": level, "model": model},
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast",
                                      "bos_token": mark, "eos_token": mark,
                                      "clean_up_tokenization_spaces": False}}


def read_vocabulary(folder):
    """Of the tokenizer in a folder of transformers, ids by spelling; None where there is none."""
    for name in "tokenizer.json", "vocab.json":
        path = os.path.join(folder, name)
        if os.path.exists(path):
            try:
                with reading(path), open(path, encoding="utf-8") as file:
                    vocabulary = json.load(file)
                if name == "vocab.json":
                    return dict(vocabulary)
                added = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
                return {**vocabulary["model"]["vocab"], **added}
            except (ValueError, KeyError, TypeError):
                return {}
    return None


def import_tokenizer(folder, path, shape):
    """Writes tokenizer.bin from the vocabulary of byte pairs in a folder, or says why not."""
    ids = read_vocabulary(folder)
    if ids is None:
        return
    try:
        spelled = {token: text for text, token in ids.items()}
        table = [bytes(BYTE_OF[c] for c in spelled[token]) for token in range(len(ids))]
    except (KeyError, TypeError):
        table = []
    if not 0 < len(table) <= shape.vocabulary or max(map(len, table)) > 255:
        print(f"{folder}: its tokenizer is not one of byte pairs for this model; left out")
        return
    end_of_text = ids.get(MARK, 10 if len(table) == 256 else 0)
    tokenizer = SimpleNamespace(vocabulary=len(table), end_of_text=end_of_text, table=table)
    if os.path.exists(path) and read_tokenizer(path) != tokenizer:
        print(f"{path}: belongs to another model and is left alone; the tokenizer is left out")
        return
    write_tokenizer(path, tokenizer)
    print(f"wrote {path}: {len(table):,} tokens")

# ----------------------------------------------------------------------------
# export


def open_model(path):
    """A .bin's shape, and its weights' numbers as they stand in the file."""
    with reading(path):
        size, fields = os.path.getsize(path), np.fromfile(path, "<i4", 8)
    if size < HEADER_BYTES or fields[0] != MAGIC or fields[1] not in (FP32, BF16):
        raise Problem(f"{path}: is no GPT-2 model file of version {FP32} (fp32) or {BF16} (bf16)")
    fields = fields.tolist()
    shape = check_shape(path, [(field[0], value) for field, value in zip(FIELDS, fields[2:7])])
    shape.padded = fields[7]
    if not shape.vocabulary <= shape.padded <= 1 << 17:
        raise Problem(f"{path}: its padded vocabulary is {shape.padded}, "
                      f"not {shape.vocabulary} to {1 << 17}")
    numbers = sum(int(np.prod(wanted)) for _, wanted, _ in tensors(shape))
    bytes_each = 4 if fields[1] == FP32 else 2
    if size != HEADER_BYTES + numbers * bytes_each:
        raise Problem(f"{path}: has {size:,} bytes; "
                      f"its header asks for {HEADER_BYTES + numbers * bytes_each:,}")
    return shape, np.memmap(path, f"<{'f4' if fields[1] == FP32 else 'u2'}", "r", HEADER_BYTES)


def read_tensors(shape, numbers):
    """The tensors as transformers has them: pairs (name, float32 array)."""
    at = 0
    for name, wanted, transposed in tensors(shape):
        values = numbers[at:at + np.prod(wanted)].reshape(wanted)
        at += values.size
        if values.dtype == np.uint16:
            values = widen(values)
        if name == "wte.weight":
            values = values[:shape.vocabulary]
        yield PREFIX + name, np.ascontiguousarray(values.T if transposed else values)


def write_json(path, values):
    with whole_file(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())


def export_model(model, folder, tokenizer):
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise Problem(missing_package("safetensors")) from None
    shape, numbers = open_model(model)
    tokenizer = find_tokenizer(tokenizer, model, shape)
    end_of_text = GPT2_END_OF_TEXT if shape.vocabulary == GPT2_VOCABULARY else None
    if tokenizer and has_mark(tokenizer):
        end_of_text = tokenizer.end_of_text
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    config = {"architectures": ["GPT2LMHeadModel"], **FIXED,
              **{name: getattr(shape, field) for field, name, *_ in FIELDS},
              "n_ctx": shape.context,  # as n_positions; converters read it
              "n_inner": None, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
              "torch_dtype": "float32", **ends}
    files = {"generation_config.json": ends, **(tokenizer_files(tokenizer) if tokenizer else {}),
             "config.json": config}

    weights = os.path.join(folder, "model.safetensors")
    with holding(folder):
        # so that none of an earlier model ever stands beside this one's weights
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))
        with whole_file(weights) as file:
            mode = os.fstat(file.fileno()).st_mode
            save_file(dict(read_tensors(shape, numbers)), file.name, metadata={"format": "pt"})
            os.chmod(file.name, mode)  # some versions of safetensors let the owner alone read it
        for name, values in files.items():
            write_json(os.path.join(folder, name), values)
    print(f"wrote {weights}, {', '.join(files)}: {describe(shape)}")
    if not tokenizer:
        print("without a tokenizer: there is no tokenizer.bin beside the model; --tokenizer FILE "
              "names one")

# ----------------------------------------------------------------------------
# GGUF

GGUF_TYPES = {"fp32": "F32", "f16": "F16", "bf16": "BF16"}
GGUF_NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm",
              "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
              "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


def gguf_name(name):
    """h.3.mlp.c_fc.weight -> blk.3.ffn_up.weight"""
    layer, part, kind = split_name(name)
    return f"blk.{layer}." * (layer is not None) + f"{GGUF_NAMES[part]}.{kind}"


def export_gguf(model, out, kind, given):
    try:
        import gguf
    except ImportError:
        raise Problem(missing_package("gguf")) from None
    shape, numbers = open_model(model)
    tokenizer = find_tokenizer(given, model, shape)
    if tokenizer is None:
        raise Problem(f"{model}: has no tokenizer.bin beside it, and a GGUF holds the tokenizer; "
                      "name one by --tokenizer FILE")
    merges = merges_of(tokenizer)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(whole_file(out))
        writer = gguf.GGUFWriter(file.name, "gpt2")
        stack.callback(writer.close)
        writer.add_file_type(getattr(gguf.LlamaFileType,
                                     {"fp32": "ALL_F32"}.get(kind, f"MOSTLY_{GGUF_TYPES[kind]}")))
        writer.add_block_count(shape.layers)
        writer.add_context_length(shape.context)
        writer.add_embedding_length(shape.channels)
        writer.add_feed_forward_length(4 * shape.channels)
        writer.add_head_count(shape.heads)
        writer.add_layer_norm_eps(FIXED["layer_norm_epsilon"])
        write_gguf_tokenizer(gguf, writer, tokenizer, merges, shape)
        for name, values in read_gguf_tensors(shape, numbers):
            # vectors, and what is added and not multiplied, stay whole: few bytes, and llama.cpp's
            # kernels want them so
            whole = kind == "fp32" or values.ndim == 1 or name.startswith("position_embd")
            if kind == "f16" and not whole and np.abs(values).max() > np.finfo(np.float16).max:
                raise Problem(f"{model}: {name} has a value beyond the range of f16; "
                              "take --type bf16")
            if whole:
                writer.add_tensor(name, values)
            elif kind == "f16":
                writer.add_tensor(name, values.astype(np.float16))
            else:
                writer.add_tensor(name, to_bf16(values).view(np.uint8),
                                  raw_dtype=gguf.GGMLQuantizationType.BF16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    print(f"wrote {out}: {describe(shape)}, {kind}")


def write_gguf_tokenizer(gguf, writer, tokenizer, merges, shape):
    spelled, end = list(map(spell, tokenizer.table)), tokenizer.end_of_text
    types = [gguf.TokenType.NORMAL] * tokenizer.vocabulary
    if has_mark(tokenizer):
        spelled[end] = tokenizer.table[end].decode(errors="replace")
        types[end] = gguf.TokenType.CONTROL
    else:
        end = 0  # of bytes: NUL, which no text has; llama.cpp would stop at another
    unused = range(tokenizer.vocabulary, shape.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(spelled + [f"[unused{token}]" for token in unused])
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * len(unused))
    # an empty list cannot be written, and llama.cpp wants one; it cuts what is no token in bytes
    writer.add_token_merges(merges or [f"{spelled[0]} {spelled[0]}"])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def read_gguf_tensors(shape, numbers):
    """The tensors with GGUF's names, in the .bin's shapes, which are ggml's as well."""
    for (name, values), (_, _, transposed) in zip(read_tensors(shape, numbers), tensors(shape)):
        values = values.T if transposed else values
        yield gguf_name(name[len(PREFIX):]), np.ascontiguousarray(values)

# ----------------------------------------------------------------------------


def describe(shape):
    numbers = sum(int(np.prod(wanted)) for _, wanted, _ in tensors(shape))
    numbers -= (shape.padded - shape.vocabulary) * shape.channels
    return (f"{shape.layers} layers, {shape.heads} heads, {shape.channels} channels, "
            f"context {shape.context}, vocabulary {shape.vocabulary}: {numbers:,} parameters")


def main():
    parser = Parser(__doc__)
    parser.add_argument("command", choices=["import", "export", "gguf"])
    parser.add_argument("source", metavar="FROM", help="import: a folder, a name on the Hub, or a "
                        "ckpt.pt; else a model .bin")
    parser.add_argument("target", metavar="TO", help="import: the .bin to "
                        "write; export: the folder to write; gguf: the file to write")
    parser.add_argument("--type", choices=["fp32", "bf16", "f16"], help="of the weights: in the "
                        ".bin, for import; or in the GGUF, which has f16 as well (default: fp32)")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.bin, for export and gguf")
    args = parser.parse_args()
    if args.command == "export" and args.type is not None:
        raise Problem("--type belongs to import and gguf; leave it out with export, which writes "
                      "fp32")
    if args.command == "import" and args.type == "f16":
        raise Problem("--type f16 belongs to gguf; a .bin has fp32 or bf16")
    if args.command == "import" and args.tokenizer is not None:
        raise Problem("--tokenizer belongs to export and gguf; import takes the tokenizer that "
                      "stands beside the weights")
    if args.command == "import":
        import_model(args.source, args.target, args.type or "fp32")
    elif args.command == "gguf":
        export_gguf(args.source, args.target, args.type or "fp32", args.tokenizer)
    else:
        export_model(args.source, args.target, args.tokenizer)


if __name__ == "__main__":
    run(main)
