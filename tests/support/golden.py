"""Reads the golden models: tiny random ones with the outputs that transformers computed for them."""

import json
import pathlib

import numpy as np
from safetensors.numpy import load_file

from flexolmo_jax.model.architecture import ANCHOR, Architecture, Layout

GOLDEN = pathlib.Path(__file__).parents[1] / "data_files" / "golden"
DENSE, MIXTURE = "olmo2_dense", "flex_e4k2"


def load(name):
    """Returns (architecture, layout, params {path: float32 array}, outputs {name: array})."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    architecture = Architecture(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        d_ff=config["intermediate_size"],
        rope_theta=config["rope_parameters"]["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    )
    experts = config.get("num_experts", 0)
    layout = Layout("stacked", experts, config["num_experts_per_tok"]) if experts else ANCHOR
    weights = load_file(GOLDEN / name / "model.safetensors")
    outputs = dict(np.load(GOLDEN / name / "golden.npz"))
    return architecture, layout, convert(weights, architecture, layout), outputs


def convert(weights, architecture, layout):
    """Hugging Face names and [out, in] matrices to a flat dict of our leaves."""
    arch, layers = architecture, range(architecture.num_layers)

    def stack(template):
        return np.stack([weights[f"model.layers.{i}.{template}.weight"] for i in layers])

    def heads(name, count):
        kernel_LxDxHC = stack(f"self_attn.{name}").transpose(0, 2, 1)
        return kernel_LxDxHC.reshape(*kernel_LxDxHC.shape[:2], count, arch.head_dim)

    params = {
        "embedding": weights["model.embed_tokens.weight"],
        "head": weights["lm_head.weight"].T,
        "final_norm/scale": weights["model.norm.weight"],
        "blocks/attention/query": heads("q_proj", arch.num_heads),
        "blocks/attention/key": heads("k_proj", arch.num_kv_heads),
        "blocks/attention/value": heads("v_proj", arch.num_kv_heads),
        "blocks/attention/out": stack("self_attn.o_proj")
        .transpose(0, 2, 1)
        .reshape(len(layers), arch.num_heads, arch.head_dim, arch.d_model),
        "blocks/attention/query_norm/scale": stack("self_attn.q_norm").reshape(len(layers), -1, arch.head_dim),
        "blocks/attention/key_norm/scale": stack("self_attn.k_norm").reshape(len(layers), -1, arch.head_dim),
        "blocks/attention_norm/scale": stack("post_attention_layernorm"),
        "blocks/moe_norm/scale": stack("post_feedforward_layernorm"),
    }
    if layout.kind == "anchor":
        for leaf in ("gate", "up", "down"):
            params[f"blocks/moe/anchor/{leaf}"] = stack(f"mlp.{leaf}_proj").transpose(0, 2, 1)
        params["blocks/moe/anchor/router/weight"] = np.zeros((len(layers), arch.d_model), np.float32)
        params["blocks/moe/anchor/router/bias"] = np.zeros((len(layers),), np.float32)
    else:
        for leaf in ("gate", "up", "down"):
            experts = [stack(f"mlp.experts.{e}.{leaf}_proj") for e in range(layout.num_experts)]
            params[f"blocks/moe/experts/{leaf}"] = np.stack(experts, axis=1).swapaxes(2, 3)
        params["blocks/moe/experts/router/weight"] = stack("mlp.gate")
        params["blocks/moe/experts/router/bias"] = np.zeros((len(layers), layout.num_experts), np.float32)
    return params
