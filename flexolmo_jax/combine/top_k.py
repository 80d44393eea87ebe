"""A copy of a merged model in which another number of experts computes each token."""

from etils import epath

from flexolmo_jax.checkpoint.manifests import ModelManifest
from flexolmo_jax.checkpoint.model_directory import (
    CERTIFICATE_FILE,
    PUBLIC,
    copy_files,
    copy_tokenizer,
    open_merged_router,
    open_model,
    read_model,
    write_model,
)
from flexolmo_jax.checkpoint.statistics import open_statistics
from flexolmo_jax.errors import ArgumentError, UserError


def copy_with_top_k(model: epath.PathLike, top_k: int, out: epath.PathLike) -> ModelManifest:
    """Makes a model directory that differs from another one in `top_k` alone, and so in `model.json` alone.

    Every leaf is compared with its digest as it is copied.

    Args:
      model: directory of a merged model.
      top_k: how many experts compute each token, from 1 to the number of experts.
      out: the model directory to make.

    Returns:
      The manifest of the copy.

    Raises:
      ArgumentError: `top_k` is out of range.
      UserError: no model directory, an anchor, a model that is damaged or holds what does not belong in it, or `out`
        exists.
    """
    source, manifest = epath.Path(model), read_model(model, strict=True)
    check_several_experts(model, manifest)
    count = len(manifest.experts)
    if not 1 <= top_k <= count:
        raise ArgumentError("top_k", top_k, f"must be from 1 to {count}, the number of experts")
    shared, experts = open_model(model, manifest)

    def complete(directory: epath.Path, written: ModelManifest) -> None:
        copy_tokenizer(source, directory)
        copy_files(source / PUBLIC, directory / PUBLIC)
        if (source / CERTIFICATE_FILE).exists():
            (source / CERTIFICATE_FILE).copy(directory / CERTIFICATE_FILE)

    return write_model(
        out,
        manifest.but(top_k=top_k),
        shared,
        experts,
        statistics=open_statistics(model, manifest),
        merged_router=open_merged_router(model, manifest) if manifest.tuned else None,
        complete=complete,
        title="copy",
    )


def check_several_experts(model: epath.PathLike, manifest: ModelManifest) -> None:
    """Raises UserError where the model has one expert alone, which computes every token."""
    if len(manifest.experts) == 1:
        raise UserError(f"{model}: has one expert, which computes every token; give a merged model")
