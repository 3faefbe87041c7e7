#!/usr/bin/env python3
"""
GPT-2's weights from Hugging Face's transformers to the trainer's model .bin, and back.

hf.py import SOURCE MODEL.bin
    SOURCE is a folder with config.json and model.safetensors (or
    pytorch_model.bin, which takes PyTorch to read), or the name of such a model
    on the Hugging Face Hub, which is downloaded once: gpt2, gpt2-medium,
    gpt2-large, gpt2-xl. The vocabulary is padded with zero rows to a multiple
    of 128.

hf.py export MODEL.bin FOLDER
    Writes FOLDER/config.json, model.safetensors and generation_config.json, in
    fp32 without the padding, for GPT2LMHeadModel.from_pretrained(FOLDER).

The .bin, as llm.c has it, is a header of 256 int32, [0] = 20240326, [1] = 3
(fp32) or 5 (bf16), [2] = context, [3] = vocabulary, [4] = layers, [5] = heads,
[6] = channels, [7] = padded vocabulary; then the weights, each over all layers.

example: hf.py import gpt2 gpt2.bin
         hf.py export runs/mine/model_00001000.bin mine/
"""

import json
import os
import re
import struct
from types import SimpleNamespace

# says it if NumPy is missing
from common import Parser, Problem, header, holding, missing_package, reading, run, whole_file
import numpy as np

MAGIC, FP32, BF16 = 20240326, 3, 5
HEADER_BYTES = 1024
LONGEST = 100 << 20  # bytes of a safetensors file's header, as the package has it
PAD_TO = 128
GPT2_VOCABULARY, GPT2_END_OF_TEXT = 50257, 50256

# The header's fields from [2] on: name here, name in config.json, range.
FIELDS = [("context", "n_positions", 1, 1 << 20), ("vocabulary", "vocab_size", 1, 1 << 16), ("layers", "n_layer", 1, 1 << 10),
          ("heads", "n_head", 1, 1 << 10), ("channels", "n_embd", 1, 1 << 16)]

# What else of config.json changes the model, and the one value that the trainer's GPT-2 has. transformers takes it for granted
# where nothing is said.
FIXED = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
         "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}

# Of a layer: name in transformers, shape here in channels, whether it is a Conv1D, whose weight is transposed there.
LAYER = {"ln_1.weight": ((1,), False), "ln_1.bias": ((1,), False),
         "attn.c_attn.weight": ((3, 1), True), "attn.c_attn.bias": ((3,), False),
         "attn.c_proj.weight": ((1, 1), True), "attn.c_proj.bias": ((1,), False),
         "ln_2.weight": ((1,), False), "ln_2.bias": ((1,), False),
         "mlp.c_fc.weight": ((4, 1), True), "mlp.c_fc.bias": ((4,), False),
         "mlp.c_proj.weight": ((1, 4), True), "mlp.c_proj.bias": ((1,), False)}

PREFIX = "transformer."  # before a tensor's name, where the model was saved with its head
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # constants that older versions saved too


def tensors(shape):
    """The tensors in the .bin's order: triples (name in transformers, shape in the .bin, whether that is transposed there)."""
    C = shape.channels
    yield "wte.weight", (shape.padded, C), False
    yield "wpe.weight", (shape.context, C), False
    for part, (channels, transposed) in LAYER.items():
        for layer in range(shape.layers):
            yield f"h.{layer}.{part}", tuple(n * C for n in channels), transposed
    yield "ln_f.weight", (C,), False
    yield "ln_f.bias", (C,), False


def check_shape(path, values):
    """A model's shape from the header's fields, checked as the trainer does; `values` are pairs (name to say, value)."""
    shape = SimpleNamespace()
    for (field, _, low, high), (name, value) in zip(FIELDS, values):
        if type(value) is not int or not low <= value <= high:
            raise Problem(f"{path}: its {name} is {value!r}, not a whole number from {low} to {high}")
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
        raise Problem(f"{source}: is no folder; give the folder with config.json and model.safetensors")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise Problem(f"{source}: there is no such folder, and it is no name of a model on the Hub such as gpt2")
    try:
        import huggingface_hub
    except ImportError:
        raise Problem(f"{source}: there is no such folder, and to download a model of that name "
                      + missing_package("huggingface_hub")) from None
    try:
        folder = huggingface_hub.snapshot_download(source, allow_patterns=["config.json", "model.safetensors"])
        if not os.path.exists(os.path.join(folder, "model.safetensors")):
            folder = huggingface_hub.snapshot_download(source, allow_patterns=["config.json", "pytorch_model.bin"])
    except Exception as error:  # of the network, of the Hub, of the disk
        reason = (str(error).splitlines() or [""])[0]
        raise Problem(f"{source}: there is no such folder, and no model of that name could be downloaded "
                      f"({type(error).__name__}: {reason}); give a folder with config.json and model.safetensors") from None
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
        raise Problem(f"{path}: n_inner is {get('n_inner')!r}; the trainer's GPT-2 has four times n_embd")
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


def open_pytorch(path):
    try:
        import torch
    except ImportError:
        raise Problem(f"{path}: takes PyTorch to read; install torch, or get the model's model.safetensors") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(values, torch.Tensor) for values in state.values()):
            raise ValueError
    except Exception as error:  # of pickle, of zip, of PyTorch
        raise Problem(f"{path}: is no file of weights by PyTorch ({type(error).__name__})") from None
    try:
        torch.zeros(1).numpy()
    except RuntimeError as error:
        raise Problem(f"{path}: PyTorch {torch.__version__} does not work with NumPy "
                      f"{np.__version__} ({str(error).splitlines()[0]}); "
                      "install a newer torch, or numpy<2") from None
    return list(state), lambda name: state[name].float().numpy()


def open_weights(folder):
    """Of a model's weights: the path, the tensors' names there by their names without prefix, and a function that reads one."""
    for name, opener in ("model.safetensors", open_safetensors), ("pytorch_model.bin", open_pytorch):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            names, read = opener(path)
            return path, {name[len(PREFIX):] if name.startswith(PREFIX) else name: name for name in names}, read
    raise Problem(f"{folder}: has neither model.safetensors nor pytorch_model.bin; weights in several files are written as one "
                  "by save_pretrained(folder, max_shard_size='50GB')")


def to_bf16(values):
    """float32 to the 16 bits of bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2")


def widen(bits):
    """The 16 bits of bf16 to float32."""
    return (bits.astype("<u4") << 16).view("<f4")


def import_model(source, out, kind):
    folder = find_source(source)
    shape = read_config(os.path.join(folder, "config.json"))
    path, names, read = open_weights(folder)

    def get(name, wanted):
        if name not in names:
            raise Problem(f"{path}: has no tensor {name}, which GPT-2 has")
        values = read(names[name])
        if values.shape != wanted:
            raise Problem(f"{path}: {name} has the shape {values.shape}; config.json asks for {wanted}")
        if not np.isfinite(values).all():
            raise Problem(f"{path}: {name} holds a value that is not finite")
        return values.astype("<f4", copy=False)

    unknown = set(names) - {name for name, _, _ in tensors(shape)} - {"lm_head.weight"}
    unknown = sorted(name for name in unknown if not MASKS.fullmatch(name))
    if unknown:
        raise Problem(f"{path}: holds {unknown[0]}, which is no tensor of a GPT-2 of {shape.layers} layers with a language "
                      "model's head")
    wte = get("wte.weight", (shape.vocabulary, shape.channels))
    if "lm_head.weight" in names and not np.array_equal(get("lm_head.weight", wte.shape), wte):
        raise Problem(f"{path}: lm_head.weight is not wte.weight; the trainer's GPT-2 has one matrix for both")

    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    with whole_file(out) as file:
        fields = [getattr(shape, field) for field, *_ in FIELDS]
        file.write(header(MAGIC, BF16 if kind == "bf16" else FP32, *fields, shape.padded))
        for name, wanted, transposed in tensors(shape):
            if name == "wte.weight":
                values = np.concatenate([wte, np.zeros((shape.padded - shape.vocabulary, shape.channels), "<f4")])
            else:
                values = get(name, wanted[::-1] if transposed else wanted)
                values = values.T if transposed else values
            file.write((to_bf16(values) if kind == "bf16" else values).tobytes())
    print(f"wrote {out}: {describe(shape)}, {kind}")

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
        raise Problem(f"{path}: its padded vocabulary is {shape.padded}, not {shape.vocabulary} to {1 << 17}")
    numbers = sum(int(np.prod(wanted)) for _, wanted, _ in tensors(shape))
    bytes_each = 4 if fields[1] == FP32 else 2
    if size != HEADER_BYTES + numbers * bytes_each:
        raise Problem(f"{path}: has {size:,} bytes; its header asks for {HEADER_BYTES + numbers * bytes_each:,}")
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


def export_model(model, folder):
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise Problem(missing_package("safetensors")) from None
    shape, numbers = open_model(model)
    end_of_text = GPT2_END_OF_TEXT if shape.vocabulary == GPT2_VOCABULARY else None
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    config = {"architectures": ["GPT2LMHeadModel"], **FIXED, **{name: getattr(shape, field) for field, name, *_ in FIELDS},
              "n_inner": None, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "torch_dtype": "float32", **ends}

    paths = [os.path.join(folder, name) for name in ("config.json", "model.safetensors", "generation_config.json")]
    with holding(folder):
        if os.path.exists(paths[0]):
            os.remove(paths[0])  # so that an earlier model's never stands beside this one's weights
        with whole_file(paths[1]) as file:
            mode = os.fstat(file.fileno()).st_mode
            save_file(dict(read_tensors(shape, numbers)), file.name, metadata={"format": "pt"})
            os.chmod(file.name, mode)  # some versions of safetensors let the owner alone read it
        write_json(paths[2], ends)
        write_json(paths[0], config)
    print(f"wrote {', '.join(paths)}: {describe(shape)}")

# ----------------------------------------------------------------------------


def describe(shape):
    numbers = sum(int(np.prod(wanted)) for _, wanted, _ in tensors(shape)) - (shape.padded - shape.vocabulary) * shape.channels
    return (f"{shape.layers} layers, {shape.heads} heads, {shape.channels} channels, context {shape.context}, vocabulary "
            f"{shape.vocabulary}: {numbers:,} parameters")


def main():
    parser = Parser(__doc__)
    parser.add_argument("command", choices=["import", "export"])
    parser.add_argument("source", metavar="FROM", help="import: a folder, or a name on the Hub; export: a model .bin")
    parser.add_argument("target", metavar="TO", help="import: the .bin to write; export: the folder to write")
    parser.add_argument("--type", choices=["fp32", "bf16"], help="of the weights in the .bin, for import (default: fp32)")
    args = parser.parse_args()
    if args.command == "import":
        import_model(args.source, args.target, args.type or "fp32")
    elif args.type is not None:
        raise Problem("--type belongs to import; leave it out with export, which writes fp32")
    else:
        export_model(args.source, args.target)


if __name__ == "__main__":
    run(main)
