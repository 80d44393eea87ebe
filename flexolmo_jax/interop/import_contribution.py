"""From Hugging Face: a published pair, a FlexOlmo of two experts, becomes a contribution to its anchor."""

import dataclasses
import pathlib
from collections.abc import Mapping

from etils import epath

from flexolmo_jax.checkpoint.casts import check_digests
from flexolmo_jax.checkpoint.manifests import (
    ANCHOR_NAME,
    NAME_RULE,
    ContributionManifest,
    ExpertRecord,
    ModelManifest,
    is_expert_name,
)
from flexolmo_jax.checkpoint.model_directory import (
    STATISTICS,
    open_merged_router,
    open_model,
    open_params,
    open_statistics,
    size,
    write_contribution,
)
from flexolmo_jax.checkpoint.params import Slice, write_tree
from flexolmo_jax.combine.merge import read_anchor
from flexolmo_jax.combine.opt_out import IMPORTED, with_merged_router
from flexolmo_jax.errors import UserError
from flexolmo_jax.interop import names, parity
from flexolmo_jax.interop.hugging_face import HuggingFace, absent_leaves, open_hugging_face, same_bytes
from flexolmo_jax.interop.import_hf import failed, imported_note
from flexolmo_jax.interop.sidecar import Sidecar, open_sidecar
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.progress import byte_progress


def import_contribution(
    source: str, anchor: epath.PathLike, name: str, out: epath.PathLike
) -> tuple[ContributionManifest, list[str]]:
    """Makes a contribution of the second expert of a pair.

    All that the pair shares with the anchor is compared with it first, bit for bit: the shared leaves, and the first
    expert's feed-forward, router rows and bias. Where a leaf of the pair has another dtype, it must be the anchor's,
    cast to that. A directory that `export_hf` wrote gives back the contribution that was exported, also where its bias
    was left out.

    Args:
      source: local directory of the pair.
      anchor: model directory of the anchor.
      name: of the expert.
      out: the contribution directory to make.

    Returns:
      (the manifest, lines that say what was found).

    Raises:
      UserError: the source is no such pair, or not of this anchor, or the parity gate fails.
    """
    if not is_expert_name(name):
        raise UserError(f"--expert={name}: is no name; {NAME_RULE}")
    base = read_anchor(anchor)
    opened = open_hugging_face(pathlib.Path(source), "--source")
    if opened.config.num_experts != 2:
        raise UserError(f"--source={source}: has {opened.config.num_experts or 1} experts; a contribution comes of two")
    shared, own = open_model(anchor, base)
    shared = _in_dtypes_of(opened.shared, shared)
    first = _in_dtypes_of(opened.experts[0], own[ANCHOR_NAME])
    _check_architecture(opened, base, anchor)
    _check_rows(opened, first, anchor)
    same = {key: tensor for key, tensor in opened.table.items() if all(not part.expert for part in tensor.parts)}
    with byte_progress("compare", size(shared) + size(first)) as advance:
        different = parity.check_bytes(same, opened.stored, shared, [first], advance)
    if different:
        raise UserError(
            f"--source={source}: {different[0]} is not the anchor's ({len(different)} of {len(same)} shared tensors "
            f"differ); give the --anchor that the pair was trained on"
        )
    label = f"--source={source}"
    sidecar = open_sidecar(opened, "--source")
    _check_anchor(sidecar, base, first, source, anchor)
    without_bias = absent_leaves(opened.experts[1], opened.config.architecture, label)
    leaves = opened.experts[1] | without_bias | (_bias(sidecar) if sidecar else {})
    merged = with_merged_router(sidecar.manifest).experts[1] if sidecar else None
    statistics = open_statistics(sidecar.path, sidecar.manifest)[merged.name] if sidecar else {}
    lines = []

    def complete(directory: epath.Path, manifest: ContributionManifest) -> ContributionManifest:
        """Compares what was written with the source; gives back the owner's manifest of what is still its export."""
        written = {
            leaf: Slice(stored, None, f"{label}: leaf {leaf}") for leaf, stored in open_params(directory).items()
        }
        different = parity.check_bytes(
            {key: tensor for key, tensor in opened.table.items() if key not in same},
            opened.stored,
            shared,
            [first, written],
        )
        if different:
            raise failed(opened, different)
        pair = base.but(experts=[base.experts[0], ExpertRecord.of(manifest)], top_k=opened.config.top_k)
        experts = {ANCHOR_NAME: first | without_bias, name: written | without_bias}
        gate = parity.Parity(len(opened.table), parity.compare_logits(opened.path, pair, shared, experts))
        exported = merged is not None and manifest.leaves == merged.stored
        if merged is not None and not exported:
            lines.append(f"{source}: was changed since its export; imported as it is now, without its owner's card")
        lines.extend(gate.lines())
        if not exported:
            return manifest.but(card={IMPORTED: imported_note(opened, gate)})
        if not merged.contribution:
            return manifest.but(card=merged.card, leaves=merged.leaves, casts=merged.casts)
        if statistics:
            digests = write_tree(directory / STATISTICS, statistics, str)
            check_digests(digests, merged.statistics, statistics)
        owner = ContributionManifest(**{key: x for key, x in merged.contribution.items() if key != "digest"})
        return owner.but(**({} if owner.name == name else {"name": name}), casts=merged.casts)

    manifest = ContributionManifest(
        name=name, anchor_digest=base.anchor_digest, architecture=base.architecture, card={}, leaves={}
    )
    return write_contribution(out, manifest, leaves, complete=complete), lines


def _check_anchor(
    sidecar: Sidecar | None,
    base: ModelManifest,
    first: Mapping[str, Slice],
    source: str,
    anchor: epath.PathLike,
) -> None:
    """What no tensor says of the anchor, its bias: the sidecar has its digest, and other writers know none."""
    if sidecar and sidecar.manifest.anchor_digest != base.anchor_digest:
        raise UserError(
            f"--source={source}: was made on the anchor {sidecar.manifest.anchor_digest[:12]}, and --anchor={anchor} "
            f"is {base.anchor_digest[:12]}, which differs in its bias; give the anchor that the pair was trained on"
        )
    if not sidecar and first[names.ROUTER_BIAS].read((slice(None),)).any():
        raise UserError(
            f"--source={source}: says nothing of biases, and that of --anchor={anchor} is not zero; "
            "give the anchor that the pair was trained on"
        )


def _bias(sidecar: Sidecar) -> dict[str, Slice]:
    """The expert's bias as its owner made it, which lies in the router as merged where it was left out."""
    name, held = sidecar.manifest.roster[1], sidecar.leaves
    if sidecar.manifest.tuned:
        held = open_merged_router(sidecar.path, sidecar.manifest)
    return {names.ROUTER_BIAS: held[name][names.ROUTER_BIAS]}


def _in_dtypes_of(theirs: Mapping[str, Slice], ours: Mapping[str, Slice]) -> dict[str, Slice]:
    """Our leaves, each cast to the dtype of theirs, where there is one."""
    return {leaf: part.as_dtype(theirs[leaf].dtype) if leaf in theirs else part for leaf, part in ours.items()}


def _check_architecture(opened: HuggingFace, base: ModelManifest, anchor: epath.PathLike) -> None:
    ours = Architecture.from_dict(base.architecture, str(anchor))
    # Of two experts both compute every token, so that their weights sum to 1 anyway.
    theirs = dataclasses.replace(opened.config.architecture, norm_topk_prob=ours.norm_topk_prob)
    odd = [f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)]
    if odd:
        raise UserError(
            f"--source={opened.path}: has another architecture than the anchor ({', '.join(odd)} differ); "
            "give the --anchor that the pair was trained on"
        )


def _check_rows(opened: HuggingFace, first: Mapping[str, Slice], anchor: epath.PathLike) -> None:
    """The anchor's rows are its own: a pair that was trained against others cannot be merged with it."""
    theirs, ours = (
        part.read((slice(None), slice(None)))
        for part in (opened.experts[0][names.ROUTER_WEIGHT], first[names.ROUTER_WEIGHT])
    )
    if same_bytes(theirs, ours):
        return
    if not ours.any():
        raise UserError(
            f"--source={opened.path}: its public expert has router rows, and those of --anchor={anchor} are zeros; "
            f"import the anchor anew with --public_rows_from={opened.path}"
        )
    raise UserError(
        f"--source={opened.path}: the router rows of its public expert are not those of --anchor={anchor}; "
        "give the anchor that the pair was trained on"
    )
