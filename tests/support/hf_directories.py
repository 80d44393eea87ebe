"""Directories in Hugging Face's form for tests, written with the library of safetensors."""

import json
import pathlib
import shutil

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.support import golden

INDEX = "model.safetensors.index.json"


def weights(directory):
    """{name: array} of all tensors of a directory, sharded or not."""
    found = {}
    for file in sorted(pathlib.Path(directory).glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def config(directory):
    return json.loads((pathlib.Path(directory) / "config.json").read_text())


def write(path, tensors, document, shards=1, **files):
    """Writes a directory of these tensors and this config.json; `files` are {stem of a .json file: document}."""
    path.mkdir()
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
        for file in sorted(set(weight_map.values())):
            save_file({name: tensors[name] for name in names if weight_map[name] == file}, path / file)
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, content in {"config": document, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def golden_with(path, name=golden.MIXTURE, tensors=None, shards=1, **changes):
    """A golden model with other tensors ({name: array}, by default its own) or other keys in config.json."""
    source = golden.GOLDEN / name
    return write(path, weights(source) if tensors is None else tensors, config(source) | changes, shards)


def fused(tensors, num_experts):
    """The same tensors with each layer's experts in two, as transformers holds them in memory."""
    rest = {name: x for name, x in tensors.items() if ".mlp.experts." not in name}
    for layer in sorted({name.split(".")[2] for name in tensors if name.startswith("model.layers.")}):
        stem = f"model.layers.{layer}.mlp.experts"

        def every(kind, stem=stem):
            return np.stack([tensors[f"{stem}.{e}.{kind}_proj.weight"] for e in range(num_experts)])

        rest[f"{stem}.gate_up_proj"] = np.concatenate([every("gate"), every("up")], axis=1)
        rest[f"{stem}.down_proj"] = every("down")
    return rest


def first_experts(tensors, num_experts):
    """Tensors of a model with only its first experts."""
    kept = {}
    for name, x in tensors.items():
        if ".mlp.experts." in name and int(name.split(".")[5]) >= num_experts:
            continue
        kept[name] = x[:num_experts].copy() if name.endswith("mlp.gate.weight") else x
    return kept


def dense(tensors):
    """Tensors of a dense model: those of a mixture's first expert."""
    first = {name: x for name, x in first_experts(tensors, 1).items() if not name.endswith("mlp.gate.weight")}
    return {name.replace("mlp.experts.0.", "mlp."): x for name, x in first.items()}


def dense_config(mixture):
    keys = ("num_experts", "num_experts_per_tok", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef")
    document = {key: value for key, value in mixture.items() if key not in keys}
    return document | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}


def assert_same_weights(first, second):
    """All tensors of two directories have one dtype, one shape and the same bytes."""
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name, x in first.items():
        assert (x.dtype, x.shape, x.tobytes()) == (second[name].dtype, second[name].shape, second[name].tobytes()), name


def copy(source, path):
    shutil.copytree(source, path)
    return path
