r"""A size at which steps and decoding are compared with those of other programs.

    flexolmo benchmark --config=configs/benchmark.py --versus=transformers

The default fits two CPU cores: a step of any kind takes a few seconds there, in float32. The argument is the number of
token ids; with `configs/benchmark.py:50304` the head is as large a part of the work as in models of that width.
Training steps take two micro-batches; with --config.data.grad_accum_steps=1 they take one.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(vocab_size: str = "512") -> ConfigDict:
    """Returns the configuration of the benchmark with a vocabulary of that size."""
    config = base.get_config()
    config.model.vocab_size = int(vocab_size)
    config.model.num_layers = 8
    config.model.d_model = 512
    config.model.num_heads = config.model.num_kv_heads = 8
    config.model.d_ff = 1376
    config.moe.num_experts, config.moe.top_k = 4, 2
    config.data.sequence_length = 512
    config.data.batch_size = 4
    config.compute.remat = "dots"
    config.data.grad_accum_steps = 2  # micro-batches halve what is kept for the backward pass
    config.steps = 1000
    config.loss.router_z_loss = 1e-3
    return config
