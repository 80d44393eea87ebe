"""FlexOlmo in JAX: language models whose data owners stay in control."""


def __getattr__(name: str):
    """Loads the Python interface on first use, so that importing a part does not import it all."""
    if name in ("load", "Model"):
        from flexolmo_jax.inference import model

        return getattr(model, name)
    raise AttributeError(f"module 'flexolmo_jax' has no attribute '{name}'")
