"""Models by name: their architecture, and how they are trained as far as that goes by size."""

from ml_collections import ConfigDict

_SIZES = {
    # Bytes as tokens; a step takes a fraction of a second on two CPU cores.
    "tiny": dict(vocab_size=320, num_layers=4, d_model=128, num_heads=4, num_kv_heads=4, d_ff=352),
    # The published vocabulary (dolma2 tokenizer) from here on.
    "190m": dict(vocab_size=100_352, num_layers=12, d_model=768, num_heads=12, num_kv_heads=12, d_ff=3072),
    "1b": dict(vocab_size=100_352, num_layers=16, d_model=2048, num_heads=16, num_kv_heads=16, d_ff=8192),
    "7b": dict(vocab_size=100_352, num_layers=32, d_model=4096, num_heads=32, num_kv_heads=32, d_ff=11_008),
}


def set_size(config: ConfigDict, size: str) -> None:
    """Writes the architecture of a named size into `config.model`, with its batch, computation and mesh."""
    if size not in _SIZES:
        raise ValueError(f"unknown size '{size}'; choose one of {', '.join(_SIZES)}")
    config.model.update(_SIZES[size])
    if size == "tiny":
        config.data.sequence_length = 256
        config.data.batch_size = 8
    else:
        config.data.sequence_length = 4096
        config.data.batch_size = 1024
        config.compute.dtype = "bfloat16"
        config.compute.remat = "dots"
        config.mesh.data, config.mesh.fsdp = 1, -1
