"""FlexOlmo in JAX: language models whose data owners stay in control."""

import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexolmo_jax.inference.model import Model, load

__all__ = ["Model", "__version__", "load"]

try:
    __version__ = importlib.metadata.version("flexolmo-jax")
except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Loads the Python interface on first use: `import flexolmo_jax` alone imports no JAX."""
    if name in ("load", "Model"):
        from flexolmo_jax.inference import model

        return getattr(model, name)
    raise AttributeError(f"module 'flexolmo_jax' has no attribute '{name}'")
