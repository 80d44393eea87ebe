"""Small configurations, as their steps are planned."""

from configs import joint, pair
from flexolmo_jax.model.architecture import PAIR, Layout

SIZES = dict(vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=24)
LAYOUTS = {"pair": PAIR, "stacked": Layout("stacked", 4, 2)}


def config(kind="pair", mesh=None, values=()):
    """A configuration of 16 sequences of 32 tokens; `values` are those of other keys, {"data.grad_accum_steps": 2}."""
    made = {"pair": pair, "stacked": joint}[kind].get_config("tiny")
    made.model.update(SIZES)
    made.data.batch_size, made.data.sequence_length = 16, 32
    made.mesh.update({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | (mesh or {"data": 8}))
    made.update_from_flattened_dict(dict(values))
    return made
