"""Merging: an anchor and any set of contributions become one model, without training, chunk by chunk."""

from collections.abc import Sequence

from etils import epath

from flexolmo_jax.checkpoint.casts import cast_slices
from flexolmo_jax.checkpoint.manifests import ANCHOR_NAME, STACK, ModelManifest
from flexolmo_jax.checkpoint.model_directory import (
    copy_tokenizer,
    open_model,
    open_statistics,
    read_model,
    write_model,
)
from flexolmo_jax.checkpoint.params import digest_slice
from flexolmo_jax.combine import stack
from flexolmo_jax.combine.contribution import Alias, Member, open_contribution
from flexolmo_jax.combine.methods import Inputs, Method
from flexolmo_jax.errors import ArgumentError, UserError

METHODS: dict[str, Method] = {method.name: method for method in (stack.STACK,)}


def merge(
    anchor: epath.PathLike,
    contributions: Sequence[epath.PathLike | Alias],
    out: epath.PathLike,
    top_k: int,
    dtype: str | None = None,
    method: str = STACK,
) -> ModelManifest:
    """Merges contributions into a model directory; the order in which they are given does not matter.

    Every leaf is digested on its way and compared with what the manifests say. A contribution's leaf that has another
    dtype than the anchor's is cast to that, and every leaf to `dtype` where it is given; the manifest records it
    (docs/formats.md).

    Args:
      anchor: model directory of the anchor.
      contributions: contribution directories, or aliases of them.
      out: the model directory to make.
      top_k: how many experts compute each token (all of them, where there are fewer).
      dtype: of all leaves ("float32", "bfloat16" or "float16"), or None: those of the anchor.
      method: a name in `METHODS`.

    Raises:
      UserError: an input is not what its manifest says, or holds what does not belong in it, two contributions have
        one name, a value is too large for its dtype, or `out` exists.
    """
    combine = method_of(method)
    inputs = gather(anchor, contributions, top_k, dtype)
    if not combine.keeps_experts:
        _check_members(inputs.members)
    outputs = combine.combine(inputs)
    return write_model(
        out,
        outputs.manifest,
        outputs.shared,
        outputs.experts,
        statistics={m.expert.name: m.statistics for m in inputs.members if m.expert.name in outputs.experts},
        complete=lambda directory, manifest: copy_tokenizer(anchor, directory),
        title=f"{len(inputs.members)} experts",
    )


def method_of(name: str) -> Method:
    """The method of that name; raises ArgumentError where there is none."""
    if name not in METHODS:
        raise ArgumentError("method", name, f"no such method; use one of {', '.join(METHODS)}")
    return METHODS[name]


def gather(
    anchor: epath.PathLike, contributions: Sequence[epath.PathLike | Alias], top_k: int, dtype: str | None = None
) -> Inputs:
    """Opens what a method combines, without reading a leaf's content.

    Raises:
      UserError: as `merge`, but for what only reading the content shows.
    """
    if top_k < 1:
        raise ArgumentError("top_k", top_k, "must be at least 1")
    manifest = read_anchor(anchor)
    shared, experts = cast_slices(manifest, *open_model(anchor, manifest), dtype)
    leaves = experts[ANCHOR_NAME]
    members: dict[str, Member] = {}
    labels: dict[str, str] = {}
    for contribution in contributions:
        member = open_contribution(contribution, manifest, leaves)
        name = member.expert.name
        if name in members:
            path = contribution.path if isinstance(contribution, Alias) else contribution
            raise UserError(
                f"{contribution}: its expert is called '{name}', as that of {labels[name]} is; "
                f"give one of them another name (NAME={path})"
            )
        members[name], labels[name] = member, str(contribution)
    first = Member(manifest.experts[0], leaves, open_statistics(anchor, manifest)[ANCHOR_NAME])
    return Inputs(manifest, shared, [first, *(members[name] for name in sorted(members))], top_k)


def read_anchor(path: epath.PathLike) -> ModelManifest:
    """Reads the manifest of an anchor.

    Raises:
      UserError: no model directory, or a merged model, or one that was trained on after a merge.
    """
    manifest = read_model(path, strict=True)
    if len(manifest.experts) > 1 or manifest.method != STACK:
        names = manifest.roster + [expert.name for expert in manifest.combined]
        raise UserError(f"{path}: a merged model ({', '.join(names)}); give the anchor it was made from")
    if manifest.tuned:
        raise UserError(f"{path}: was trained on after a merge; give the anchor as it was published")
    return manifest


def _check_members(members: Sequence[Member]) -> None:
    """Reads every leaf of the members; raises UserError where one is not what its manifest says."""
    for member in members:
        for leaf, part in member.leaves.items():
            digest_slice(part._replace(cast=None, digest=member.expert.stored[leaf]), leaf)
