"""From Hugging Face: a dense OLMo-2 becomes an anchor, a FlexOlmo a model.

Tensors are read as they are written, a few at a time, and compared afterwards: what was written, in Hugging Face's form
again, must have the bytes of what was read.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from flexolmo_jax.checkpoint.manifests import ANCHOR_NAME, NAME_RULE, ExpertRecord, ModelManifest, is_expert_name
from flexolmo_jax.checkpoint.model_directory import open_model, size, write_model
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.combine.opt_out import IMPORTED
from flexolmo_jax.errors import UserError
from flexolmo_jax.interop import names, parity
from flexolmo_jax.interop.config import CLASSES, DENSE, MIXTURE, SEQUENCE_LENGTH
from flexolmo_jax.interop.hugging_face import HuggingFace, absent_leaves, open_hugging_face
from flexolmo_jax.interop.sidecar import FOLDER, Sidecar, open_sidecar, restore
from flexolmo_jax.interop.tokenizer_files import import_tokenizer, read_tokenizer, unused_eos
from flexolmo_jax.progress import byte_progress

Experts = dict[str, dict[str, Slice]]


def import_model(
    source: str, out: epath.PathLike, expert_names: Sequence[str] = (), public_rows_from: str | None = None
) -> tuple[ModelManifest, list[str]]:
    """Makes a model directory of a Hugging Face directory.

    A dense model becomes an anchor; its router rows are zeros, as such a model has none, or those of the first expert
    of a FlexOlmo directory. Biases are zeros. A directory that `export_hf` wrote gives back what was exported.

    Args:
      source: local directory.
      out: the model directory to make.
      expert_names: of the experts after the first, in the order of the source; expert1, expert2, ... by default. The
        model keeps its experts sorted by name.
      public_rows_from: for a dense source, a FlexOlmo directory whose first expert's router rows the anchor takes.

    Returns:
      (the manifest, lines that say what was found).

    Raises:
      UserError: the source is not read here, a name is no name, or the parity gate fails.
    """
    opened = open_hugging_face(pathlib.Path(source), "--source")
    sidecar = _open_sidecar(opened, expert_names, public_rows_from)
    order = [ANCHOR_NAME, *_names(opened, expert_names, sidecar)]
    experts = _experts(opened, order, sidecar, _public_rows(opened, public_rows_from))
    digest, eos_id = read_tokenizer(opened.path, opened.config)
    lines = unused_eos(opened.path, opened.config)
    if not digest:
        lines.append(f"{source}: has no tokenizer.json; the model takes and gives token ids only")
    manifest = ModelManifest(
        architecture=dataclasses.asdict(opened.config.architecture),
        experts=[ExpertRecord(name=name, leaves={}, card={}) for name in experts],
        shared={},
        top_k=opened.config.top_k,
        tokenizer_digest=digest,
        eos_id=eos_id,
    )

    def complete(directory: epath.Path, manifest: ModelManifest) -> ModelManifest:
        changes = _changes(manifest, sidecar.manifest) if sidecar else []
        restored = sidecar is not None and not changes
        if restored:
            manifest = sidecar.manifest
            restore(sidecar, directory)
        import_tokenizer(opened.path, directory, manifest)
        gate = _check(opened, directory, manifest, order)
        if changes:
            lines.append(f"{source}: was changed since its export ({', '.join(changes)}); imported as it is now")
        if not restored:
            note = imported_note(opened, gate) | {"experts": order}
            note |= {"public_rows_from": _name(public_rows_from)} if public_rows_from else {}
            manifest = _as_known(manifest, sidecar.manifest) if sidecar else manifest
            manifest = _with_anchor_card(manifest, {SEQUENCE_LENGTH: opened.config.max_length, IMPORTED: note})
        lines.extend(gate.lines())
        return manifest

    return write_model(out, manifest, opened.shared, experts, complete=complete, title="import"), lines


def imported_note(opened: HuggingFace, gate: parity.Parity) -> dict[str, Any]:
    """What a data card says of the import."""
    config = opened.config
    return {"from": _name(opened.path), "class": CLASSES[MIXTURE if config.num_experts else DENSE], **gate.as_dict()}


def failed(opened: HuggingFace, different: Sequence[str]) -> UserError:
    """The error of a round trip that did not give back what was read."""
    return UserError(
        f"--source={opened.path}: {len(different)} tensors, {different[0]} first, do not come back with their bytes; "
        "was the directory written to in the meantime?"
    )


def _name(path: str | pathlib.Path) -> str:
    return pathlib.Path(path).absolute().name


def _open_sidecar(opened: HuggingFace, expert_names: Sequence[str], public_rows_from: str | None) -> Sidecar | None:
    sidecar = open_sidecar(opened, "--source")
    if sidecar is None:
        return None
    for flag, value in (("--expert_names", expert_names), ("--public_rows_from", public_rows_from)):
        if value:
            raise UserError(f"{flag}: {opened.path / FOLDER} says this; leave the flag out, or remove the folder")
    return sidecar


def _names(opened: HuggingFace, given: Sequence[str], sidecar: Sidecar | None) -> list[str]:
    """The names of the experts after the first, in the order of the source."""
    if sidecar:
        return sidecar.manifest.roster[1:]
    count = len(opened.experts) - 1
    if not given:
        width = len(str(count))  # so that the order of the names is that of the experts
        return [f"expert{i:0{width}d}" for i in range(1, count + 1)]
    if len(given) != count:
        raise UserError(f"--expert_names={','.join(given)}: {len(given)} names for the {count} experts after the first")
    for name in given:
        if not is_expert_name(name):
            raise UserError(f"--expert_names: {name!r} is no name; {NAME_RULE}")
        if given.count(name) > 1:
            raise UserError(f"--expert_names: {name} came twice; give each expert a name of its own")
    return list(given)


def _public_rows(opened: HuggingFace, path: str | None) -> Slice | None:
    """The first expert's router rows of another directory."""
    if path is None:
        return None
    if opened.config.num_experts:
        raise UserError(f"--public_rows_from={path}: --source has router rows of its own; leave the flag out")
    other = open_hugging_face(pathlib.Path(path), "--public_rows_from")
    if not other.config.num_experts:
        raise UserError(f"--public_rows_from={path}: a dense model has no router rows; give a FlexOlmo directory")
    rows = other.experts[0][names.ROUTER_WEIGHT]
    arch = opened.config.architecture
    if rows.shape != (arch.num_layers, arch.d_model):
        raise UserError(
            f"--public_rows_from={path}: its rows are {list(rows.shape)} (layers, width), "
            f"the model's would be {[arch.num_layers, arch.d_model]}; give a pair trained on this model"
        )
    return rows


def _experts(opened: HuggingFace, order: Sequence[str], sidecar: Sidecar | None, public_rows: Slice | None) -> Experts:
    """All leaves of each expert: those that were opened, and those that Hugging Face's form does not hold."""
    label = f"--source={opened.path}"
    experts = {}
    for name, leaves in zip(order, opened.experts, strict=True):
        absent = absent_leaves(leaves, opened.config.architecture, label)
        if public_rows and name == ANCHOR_NAME:
            absent[names.ROUTER_WEIGHT] = public_rows
        experts[name] = leaves | absent | (sidecar.leaves[name] if sidecar else {})
    return {name: experts[name] for name in [order[0], *sorted(order[1:])]}


def _check(opened: HuggingFace, directory: epath.Path, manifest: ModelManifest, order: Sequence[str]) -> parity.Parity:
    """The parity gate: opens what was written, and compares it with the source."""
    shared, experts = open_model(directory, manifest)
    total = sum(size(leaves) for leaves in (opened.shared, *opened.experts))
    with byte_progress("compare", total) as advance:
        different = parity.check_bytes(opened.table, opened.stored, shared, [experts[name] for name in order], advance)
    if different:
        raise failed(opened, different)
    return parity.Parity(len(opened.table), parity.compare_logits(opened.path, manifest, shared, experts))


def _changes(now: ModelManifest, then: ModelManifest) -> list[str]:
    """What of an exported model is no longer what its manifest says."""
    experts = len(now.experts)
    changes = []
    for name, leaves in now.stored.items():
        odd = [leaf for leaf, digest in leaves.items() if digest != then.stored[name].get(leaf)]
        changes += [f"{leaf} of {name}" if name else leaf for leaf in odd]
    changes = [f"{changes[0]} and {len(changes) - 1} more leaves"] if len(changes) > 3 else changes
    settings = (
        ("experts per token", min(now.top_k, experts) != min(then.top_k, experts)),
        ("eos_token_id", now.eos_id != then.eos_id),
        ("tokenizer.json", now.tokenizer_digest != then.tokenizer_digest),
    )
    return changes + [name for name, changed in settings if changed]


def _as_known(now: ModelManifest, then: ModelManifest) -> ModelManifest:
    """The manifest of a changed model with what is still known of it: cards, and all of leaves that are the same."""

    def known(found, published, stored, casts):
        same = {leaf for leaf, digest in found.items() if digest == stored.get(leaf)}
        leaves = {leaf: published[leaf] if leaf in same else digest for leaf, digest in found.items()}
        return leaves, {leaf: cast for leaf, cast in casts.items() if leaf in same}

    experts = []
    for mine, theirs in zip(now.experts, then.experts, strict=True):
        leaves, casts = known(mine.leaves, theirs.leaves, theirs.stored, theirs.casts)
        owners = theirs.contribution if leaves == theirs.leaves else None
        experts.append(mine.but(leaves=leaves, card=theirs.card, casts=casts, contribution=owners))
    shared, casts = known(now.shared, then.shared, then.stored[""], then.casts)
    return now.but(experts=experts, shared=shared, casts=casts)


def _with_anchor_card(manifest: ModelManifest, more: Mapping[str, Any]) -> ModelManifest:
    """The manifest with more on the anchor's data card."""
    anchor, *others = manifest.experts
    return manifest.but(experts=[anchor.but(card={**anchor.card, **more}), *others])
