"""Architectures by name: values of `config.model`."""

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
    """Writes the architecture of a named size into `config.model`."""
    if size not in _SIZES:
        raise ValueError(f"unknown size '{size}'; choose one of {', '.join(_SIZES)}")
    config.model.update(_SIZES[size])
