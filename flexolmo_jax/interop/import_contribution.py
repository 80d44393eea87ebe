"""From Hugging Face: a published pair, a FlexOlmo of two experts, becomes a contribution to its anchor."""

import dataclasses
import pathlib
from collections.abc import Mapping

from etils import epath

from flexolmo_jax.checkpoint import directories
from flexolmo_jax.checkpoint.atomic import atomic_directory
from flexolmo_jax.checkpoint.tree import Slice, write_tree
from flexolmo_jax.checkpoint.verify import open_model
from flexolmo_jax.errors import UserError
from flexolmo_jax.interop import names, parity
from flexolmo_jax.interop.hugging_face import HuggingFace, absent_leaves, open_hugging_face, same_bytes
from flexolmo_jax.interop.import_hf import IMPORTED, failed, imported_note
from flexolmo_jax.interop.sidecar import open_sidecar
from flexolmo_jax.merging.contribution import size
from flexolmo_jax.merging.merge import read_anchor
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.progress import byte_progress


def import_contribution(
    source: str, anchor: epath.PathLike, name: str, out: epath.PathLike
) -> tuple[directories.Contribution, list[str]]:
    """Makes a contribution of the second expert of a pair.

    All that the pair shares with the anchor is compared with it first, bit for bit: the shared leaves, and the first
    expert's feed-forward and router rows.

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
    if not directories.is_expert_name(name):
        raise UserError(f"--expert={name}: is no name; {directories.NAME_RULE}")
    base = read_anchor(anchor)
    opened = open_hugging_face(pathlib.Path(source), "--source")
    if opened.config.num_experts != 2:
        raise UserError(f"--source={source}: has {opened.config.num_experts or 1} experts; a contribution comes of two")
    shared, own = open_model(anchor, base, f"--anchor={anchor}")
    first = own[directories.ANCHOR_NAME]
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
    leaves = opened.experts[1] | absent_leaves(opened.experts[1], opened.config.architecture, label)
    sidecar = open_sidecar(opened, "--source")
    if sidecar:
        leaves |= sidecar.leaves[sidecar.manifest.roster[1]]
    with atomic_directory(out) as directory:
        with byte_progress("import", size(leaves)) as advance:
            content = dict(sorted(leaves.items()))
            digests = write_tree(directory / directories.PARAMS, content, lambda leaf: leaf, advance)
        expert = directories.Expert(name, dict(sorted(digests.items())), {})
        written = {
            leaf: Slice(stored, None, f"{label}: leaf {leaf}")
            for leaf, stored in directories.open_params(directory).items()
        }
        different = parity.check_bytes(
            {key: tensor for key, tensor in opened.table.items() if key not in same},
            opened.stored,
            shared,
            [first, written],
        )
        if different:
            raise failed(opened, different)
        pair = dataclasses.replace(base, experts=(base.experts[0], expert), top_k=opened.config.top_k)
        experts = {directories.ANCHOR_NAME: first, name: written}
        gate = parity.Parity(len(opened.table), parity.compare_logits(opened.path, pair, shared, experts))
        before = sidecar.manifest.experts[1] if sidecar else None
        exported = before is not None and dict(before.leaves) == dict(expert.leaves)
        card = before.card if exported else {IMPORTED: imported_note(opened, gate)}
        contribution = directories.Contribution(
            dataclasses.replace(expert, card=card), base.anchor_digest, base.architecture
        )
        contribution.write(directory)
    return contribution, gate.lines()


def _check_architecture(opened: HuggingFace, base: directories.Model, anchor: epath.PathLike) -> None:
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
    theirs, ours = (part.read((slice(None), slice(None))) for part in (opened.experts[0][names.ROW], first[names.ROW]))
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
