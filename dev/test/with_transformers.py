"""
GPT-2 by transformers: what the tests hold data_prep/hf.py, and the trainer on its files, to.

The tests call ask(command, ...), which runs this file under a Python that has PyTorch, where there
is one, with the packages of the tests' own Python behind: PyTorch may be the system's, and
transformers not.

make FOLDER CONFIG            a random model of CONFIG (JSON) to FOLDER, and to FOLDER/pickled as
                              pytorch_model.bin
load FOLDER OUT               its tensors, as from_pretrained finds them
train FOLDER JOB OUT HYPER    its logits, and AdamW steps of HYPER (JSON) on inputs and targets
                              (B, T), a target below 0 being without loss: the losses, and the
                              trained tensors
score FOLDER EXAMPLES OUT T   for examples (JSON: context, endings) the mean loss of each ending;
                              rows of T + 1 tokens at most
tokens FOLDER TEXTS OUT       the ids of each of TEXTS (JSON) by the folder's tokenizer, and what
                              they spell
checkpoint FILE MODEL ARGS    writes a checkpoint as nanoGPT does, of tensors in an .npz and
                              model_args (JSON)
run TOOL ...                  one of the tools, so that it finds PyTorch
Numbers go in and out as .npz. All is computed in double precision.
"""

import functools
import json
import os
import runpy
import subprocess
import sys


@functools.lru_cache(None)
def python_with_transformers():
    for python in (sys.executable, "/usr/bin/python3", "python3"):
        try:
            if command(python, "try").returncode == 0:
                return python
        except OSError:
            pass
    return None


def command(python, *args):
    packages = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    return subprocess.run([python, __file__, packages, *map(str, args)], capture_output=True,
                          text=True, env=dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"))


def ask(*args):
    """What the command left behind: status, output, errors."""
    import pytest
    if python_with_transformers() is None:
        pytest.skip("no Python with PyTorch and transformers here")
    return command(python_with_transformers(), *args)


def good(*args):
    done = ask(*args)
    assert done.returncode == 0, done.stderr
    return done

# ----------------------------------------------------------------------------
# under a Python with PyTorch


def tensors(model):
    return {name: values.detach().numpy() for name, values in model.state_dict().items()}


def make(folder, config):
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**json.loads(config)))
    with torch.no_grad():
        # no bias 0 and no LayerNorm 1: every term of the model counts
        for name, values in model.named_parameters():
            values.normal_(1.0 if "ln_" in name and "weight" in name else 0.0, 0.15)
    model.save_pretrained(folder)
    # the newest transformers write no pytorch_model.bin any more
    model.config.save_pretrained(os.path.join(folder, "pickled"))
    torch.save(model.state_dict(), os.path.join(folder, "pickled", "pytorch_model.bin"))
    np.savez(os.path.join(folder, "tensors.npz"), **tensors(model))


def open_model(folder):
    model, about = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(about.values()), about  # missing, unexpected, mismatched
    return model.eval()


def load(folder, out):
    np.savez(out, **tensors(open_model(folder)))


def train(folder, job, out, hyper):
    hyper, job = json.loads(hyper), np.load(job)
    inputs, targets = (torch.as_tensor(job[name]).long() for name in ("inputs", "targets"))
    model, results = open_model(folder).double(), {"losses": []}
    groups = [{"params": [p for p in model.parameters() if (p.dim() == 2) == decays],
               "weight_decay": hyper["weight_decay"] if decays else 0.0}
              for decays in (True, False)]
    adam = torch.optim.AdamW(groups, lr=hyper["lr"], betas=(hyper["beta1"], hyper["beta2"]),
                             eps=hyper["eps"])
    for step in range(hyper["steps"]):
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1),
                                                 targets.flatten().clamp(min=-1), ignore_index=-1)
        if step == 0:
            results["logits"] = logits.detach().numpy()
        results["losses"].append(loss.item())
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), hyper["clip"])
        adam.step()
    np.savez(out, **results, **tensors(model))


def score(folder, examples, out, T):
    model, losses = open_model(folder).double(), []
    with open(examples) as file:
        examples = json.load(file)
    for context, endings in examples:
        losses.append([])
        for ending in endings:
            row = torch.tensor((context + ending)[-int(T) - 1:])
            logits = model(row[None, :-1]).logits[0]
            token_losses = -torch.log_softmax(logits, 1)[range(len(row) - 1), row[1:]]
            losses[-1].append(token_losses[-len(ending):].mean().item())
    np.savez(out, losses=np.array(losses))


def tokens(folder, texts, out):
    from transformers import AutoTokenizer
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), json.loads(texts)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    with open(out, "w") as file:
        json.dump([ids, list(map(tokenizer.decode, ids))], file)


def checkpoint(path, model, args):
    state = {name: torch.as_tensor(values) for name, values in np.load(model).items()}
    args, floats = json.loads(args), {}
    # earlier ones do not read numbers with a point, where they are to read safely
    if torch.__version__ >= "2":
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.ones(2)
        optimizer = torch.optim.AdamW([parameter], lr=1e-3)
        optimizer.step()
        floats = {"optimizer": optimizer.state_dict(), "config": {"dropout": 0.0}}
    torch.save({"model": state, "model_args": args, "iter_num": 5,
                "best_val_loss": torch.tensor(1.5), **floats},
               path)


def try_out():
    # a dummy where PyTorch is too old
    GPT2LMHeadModel(GPT2Config(vocab_size=2, n_positions=2, n_embd=2, n_layer=1, n_head=1))


def run(tool, *args):
    sys.argv = [tool, *args]
    sys.path.insert(0, os.path.dirname(tool))
    runpy.run_path(tool, run_name="__main__")


if __name__ == "__main__":
    sys.path += sys.argv[1].split(os.pathsep)
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.set_num_threads(1)  # the tensors are tiny
    with torch.set_grad_enabled(sys.argv[2] == "train"):
        {"try": try_out, "make": make, "load": load, "train": train, "score": score,
         "tokens": tokens, "checkpoint": checkpoint, "run": run}[sys.argv[2]](*sys.argv[3:])
