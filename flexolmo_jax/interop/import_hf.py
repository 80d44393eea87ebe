"""From Hugging Face: a dense model becomes an anchor, a mixture a model, a published pair a contribution.

Tensors are read as they are written, a few at a time, and compared afterwards: what was written, in Hugging Face's form
again, must have the bytes of what was read.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from flexolmo_jax.checkpoint.copying import write_tree
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
    expecting,
    open_merged_router,
    open_model,
    open_params,
    size,
    write_contribution,
    write_model,
)
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.checkpoint.statistics import open_statistics
from flexolmo_jax.combine.merge import read_anchor
from flexolmo_jax.combine.opt_out import IMPORTED, with_merged_router
from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.interop import parity
from flexolmo_jax.interop.config import SEQUENCE_LENGTH
from flexolmo_jax.interop.hf_directory import (
    FOLDER,
    Opened,
    Sidecar,
    absent_leaves,
    import_tokenizer,
    open_directory,
    open_sidecar,
    read_tokenizer,
    restore,
    same_bytes,
    unused_eos,
)
from flexolmo_jax.interop.tensors import ROUTER_BIAS, ROUTER_WEIGHT
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.model.selectors import read_derived
from flexolmo_jax.progress import byte_progress

Experts = dict[str, dict[str, Slice]]


def import_model(
    source: str, out: epath.PathLike, expert_names: Sequence[str] = (), router_weights_from: str | None = None
) -> tuple[ModelManifest, list[str]]:
    """Makes a model directory of a Hugging Face directory.

    A dense model becomes an anchor. Its router weights are zeros, as such a model has none, or those of the first
    expert of a mixture. Biases are zeros. A directory that `export_hf` wrote gives back what was exported.

    Args:
      source: local directory.
      out: the model directory to make.
      expert_names: of the experts after the first, in the order of the source; expert1, expert2, ... by default. The
        model keeps its experts sorted by name.
      router_weights_from: for a dense source, a mixture whose first expert's router weights the anchor takes.

    Returns:
      (the manifest, lines that say what was found).

    Raises:
      UserError: the source is not read here, a name is no name, or the parity gate fails. The source keeps a selector,
        and is not as it was exported, with the folder in which the selector's statistics are.
    """
    opened = open_directory(pathlib.Path(source))
    sidecar = _open_sidecar(opened, expert_names, router_weights_from)
    if opened.kind.has_selector and sidecar is None:
        raise UserError(
            f"{source}: has a selector's tables, and not the statistics that they are derived from; copy it again with "
            f"the folder {FOLDER}/ of its export"
        )
    order = [ANCHOR_NAME, *_names(opened, expert_names, sidecar)]
    experts = _experts(opened, order, sidecar, _router_weights(opened, router_weights_from))
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
        selection=opened.config.selection,
    )

    def complete(directory: epath.Path, manifest: ModelManifest) -> ModelManifest:
        """Compares what was written with the source; gives back the exported manifest where nothing has changed."""
        changes = _changes(manifest, sidecar.manifest) if sidecar else []
        if changes and opened.kind.has_selector:
            raise UserError(
                f"{source}: was changed since its export ({', '.join(changes)}); one with a selector is imported only "
                "as it was exported"
            )
        restored = sidecar is not None and not changes
        if sidecar is not None and restored:
            manifest = sidecar.manifest
            restore(sidecar, directory)
        import_tokenizer(opened.path, directory, manifest)
        gate = _check(opened, directory, manifest, order)
        if changes:
            lines.append(f"{source}: was changed since its export ({', '.join(changes)}); imported as it is now")
        if not restored:
            note = _imported_note(opened, gate) | {"experts": order}
            note |= {"router_weights_from": _name(router_weights_from)} if router_weights_from else {}
            manifest = _as_known(manifest, sidecar.manifest) if sidecar else manifest
            manifest = _with_anchor_card(manifest, {SEQUENCE_LENGTH: opened.config.max_length, IMPORTED: note})
        lines.extend(gate.lines())
        return manifest

    return write_model(out, manifest, opened.shared, experts, complete=complete, title="import"), lines


def import_contribution(
    source: str, anchor: epath.PathLike, expert: str, out: epath.PathLike
) -> tuple[ContributionManifest, list[str]]:
    """Makes a contribution of the second expert of a pair, a mixture of two.

    All that the pair shares with the anchor is compared with it first, bit for bit: the shared leaves, and the first
    expert's feed-forward, router weights and bias. Where a leaf of the pair has another dtype, it must be the anchor's,
    cast to that. A directory that `export_hf` wrote gives back the contribution that was exported, also where its bias
    was left out.

    Args:
      source: local directory of the pair.
      anchor: model directory of the anchor.
      expert: name of the expert.
      out: the contribution directory to make.

    Returns:
      (the manifest, lines that say what was found).

    Raises:
      UserError: the source is no such pair, or not of this anchor, or the parity gate fails.
    """
    if not is_expert_name(expert):
        raise ArgumentError("expert", expert, f"is no name; {NAME_RULE}")
    base = read_anchor(anchor)
    opened = open_directory(pathlib.Path(source))
    if opened.kind.has_selector:
        raise UserError(f"{source}: keeps the selector of a model; import it as a model")
    if opened.config.num_experts != 2:
        raise UserError(f"{source}: has {opened.config.num_experts or 1} experts; a contribution comes of two")
    shared, experts = open_model(anchor, base)
    shared = _in_dtypes_of(opened.shared, shared)
    first = _in_dtypes_of(opened.experts[0], experts[ANCHOR_NAME])
    _check_architecture(opened, base, anchor)
    _check_router_weights(opened, first, anchor)
    common = {name: tensor for name, tensor in opened.table.items() if not any(key.expert for key in tensor.leaves)}
    with byte_progress("compare", size(shared) + size(first)) as advance:
        different = parity.check_bytes(common, opened.stored, shared, [first], advance)
    if different:
        count = f"{len(different)} of {len(common)} shared tensors differ"
        raise _wrong_anchor(f"{source}: {different[0]} is not the anchor's ({count})")
    sidecar = open_sidecar(opened)
    _check_anchor(sidecar, base, first, source, anchor)
    without_bias = absent_leaves(opened.experts[1], opened.config.architecture, source)
    leaves = opened.experts[1] | without_bias | (_bias(sidecar) if sidecar else {})
    merged = with_merged_router(sidecar.manifest).experts[1] if sidecar else None
    statistics = open_statistics(sidecar.path, sidecar.manifest)[merged.name] if sidecar and merged else {}
    lines: list[str] = []

    def complete(directory: epath.Path, manifest: ContributionManifest) -> ContributionManifest:
        """Compares what was written with the source; gives back the owner's manifest where nothing has changed."""
        written = {
            leaf: Slice(stored, None, f"{source}: leaf {leaf}") for leaf, stored in open_params(directory).items()
        }
        rest = {name: tensor for name, tensor in opened.table.items() if name not in common}
        different = parity.check_bytes(rest, opened.stored, shared, [first, written])
        if different:
            raise _round_trip_error(opened, different)
        pair = base.but(experts=[base.experts[0], ExpertRecord.of(manifest)], top_k=opened.config.top_k)
        gate = _gate(opened, pair, shared, {ANCHOR_NAME: first | without_bias, expert: written | without_bias})
        exported = merged is not None and manifest.leaves == merged.stored
        if merged is not None and not exported:
            lines.append(f"{source}: was changed since its export; imported as it is now, without its owner's card")
        lines.extend(gate.lines())
        if merged is None or not exported:
            return manifest.but(card={IMPORTED: _imported_note(opened, gate)})
        if not merged.contribution:
            return manifest.but(card=merged.card, leaves=merged.leaves, casts=merged.casts)
        if statistics:
            write_tree(directory / STATISTICS, expecting(statistics, merged.statistics), str)
        owner = ContributionManifest(**{key: x for key, x in merged.contribution.items() if key != "digest"})
        return owner.but(**({} if owner.name == expert else {"name": expert}), casts=merged.casts)

    manifest = ContributionManifest(
        name=expert, anchor_digest=base.anchor_digest, architecture=base.architecture, card={}, leaves={}
    )
    return write_contribution(out, manifest, leaves, complete=complete), lines


def _imported_note(opened: Opened, gate: parity.Parity) -> dict[str, Any]:
    """What a data card says of the import."""
    return {"from": _name(opened.path), "class": opened.kind.class_name, **gate.as_dict()}


def _round_trip_error(opened: Opened, different: Sequence[str]) -> UserError:
    return UserError(
        f"{opened.path}: {len(different)} tensors, {different[0]} first, do not come back with their bytes; "
        "was the directory written to in the meantime?"
    )


def _name(path: str | pathlib.Path) -> str:
    return pathlib.Path(path).absolute().name


def _gate(
    opened: Opened,
    manifest: ModelManifest,
    shared: Mapping[str, Slice],
    experts: Mapping[str, Mapping[str, Slice]],
    derived: Mapping[str, np.ndarray] | None = None,
) -> parity.Parity:
    """Compares the logits; the bytes were found equal before."""
    difference = parity.compare_logits(opened.path, manifest, shared, experts, opened.kind, derived or {})
    return parity.Parity(len(opened.table), difference)


# Of a model.


def _open_sidecar(opened: Opened, expert_names: Sequence[str], router_weights_from: str | None) -> Sidecar | None:
    sidecar = open_sidecar(opened)
    if sidecar is None:
        return None
    arguments = {"expert_names": ",".join(expert_names), "router_weights_from": router_weights_from}
    for argument, value in arguments.items():
        if value:
            raise ArgumentError(
                argument, value, f"{opened.path / FOLDER} holds this; leave it out, or remove the folder"
            )
    return sidecar


def _names(opened: Opened, expert_names: Sequence[str], sidecar: Sidecar | None) -> list[str]:
    """The names of the experts after the first, in the order of the source."""
    if sidecar:
        return sidecar.manifest.roster[1:]
    count = len(opened.experts) - 1
    if not expert_names:
        width = len(str(count))  # so that the order of the names is that of the experts
        return [f"expert{i:0{width}d}" for i in range(1, count + 1)]
    names = ",".join(expert_names)
    if len(expert_names) != count:
        raise ArgumentError("expert_names", names, f"{len(expert_names)} names for the {count} experts after the first")
    for name in expert_names:
        if not is_expert_name(name):
            raise ArgumentError("expert_names", names, f"{name!r} is no name; {NAME_RULE}")
        if list(expert_names).count(name) > 1:
            raise ArgumentError("expert_names", names, f"{name} came twice; give each expert a name of its own")
    return list(expert_names)


def _router_weights(opened: Opened, path: str | None) -> Slice | None:
    """The first expert's router weights of another directory."""
    if path is None:
        return None
    argument = "router_weights_from"
    if opened.config.num_experts:
        raise ArgumentError(argument, path, "the source has router weights of its own; leave it out")
    other = open_directory(pathlib.Path(path))
    if not other.config.num_experts:
        raise ArgumentError(argument, path, "a dense model has no router weights; give a mixture")
    weights = other.experts[0][ROUTER_WEIGHT]
    arch = opened.config.architecture
    if weights.shape != (arch.num_layers, arch.d_model):
        raise ArgumentError(
            argument,
            path,
            f"its router weights are {list(weights.shape)} (layers, d_model), "
            f"the model's would be {[arch.num_layers, arch.d_model]}; give a pair trained on this model",
        )
    return weights


def _experts(opened: Opened, order: Sequence[str], sidecar: Sidecar | None, router_weights: Slice | None) -> Experts:
    """All leaves of each expert: those that were opened, and those that Hugging Face's form does not hold."""
    experts = {}
    for name, leaves in zip(order, opened.experts, strict=True):
        absent = absent_leaves(leaves, opened.config.architecture, str(opened.path))
        if router_weights and name == ANCHOR_NAME:
            absent[ROUTER_WEIGHT] = router_weights
        experts[name] = leaves | absent | (sidecar.leaves[name] if sidecar else {})
    return {name: experts[name] for name in [order[0], *sorted(order[1:])]}


def _check(opened: Opened, directory: epath.Path, manifest: ModelManifest, order: Sequence[str]) -> parity.Parity:
    """The parity gate: opens what was written, and compares it with the source."""
    shared, experts = open_model(directory, manifest)
    total = sum(size(leaves) for leaves in (opened.shared, *opened.experts))
    with byte_progress("compare", total) as advance:
        different = parity.check_bytes(opened.table, opened.stored, shared, [experts[name] for name in order], advance)
    derived = read_derived(manifest, open_statistics(directory, manifest), str(opened.path)) if opened.derived else {}
    for leaf, stored in opened.derived.items():
        if not same_bytes(stored.read(), derived[leaf]):
            different.append(opened.kind.names.derived[leaf])
    if different:
        raise _round_trip_error(opened, different)
    return _gate(opened, manifest, shared, experts, derived)


def _changes(now: ModelManifest, then: ModelManifest) -> list[str]:
    """What of an exported model is no longer what its manifest says."""
    experts = len(now.experts)
    changes = []
    for name, leaves in now.stored.items():
        altered = [leaf for leaf, digest in leaves.items() if digest != then.stored[name].get(leaf)]
        changes += [f"{leaf} of {name}" if name else leaf for leaf in altered]
    changes = [f"{changes[0]} and {len(changes) - 1} more leaves"] if len(changes) > 3 else changes
    settings = (
        ("experts per token", min(now.top_k, experts) != min(then.top_k, experts)),
        ("eos_token_id", now.eos_id != then.eos_id),
        ("tokenizer.json", now.tokenizer_digest != then.tokenizer_digest),
        ("selection", now.selection != then.selection),
    )
    return changes + [name for name, changed in settings if changed]


def _as_known(now: ModelManifest, then: ModelManifest) -> ModelManifest:
    """The manifest of a changed model with what is still known of it: cards, and all of leaves that are the same."""

    def known(found, published, stored, casts):
        same = {leaf for leaf, digest in found.items() if digest == stored.get(leaf)}
        leaves = {leaf: published[leaf] if leaf in same else digest for leaf, digest in found.items()}
        return leaves, {leaf: cast for leaf, cast in casts.items() if leaf in same}

    experts = []
    for new, old in zip(now.experts, then.experts, strict=True):
        leaves, casts = known(new.leaves, old.leaves, old.stored, old.casts)
        contribution = old.contribution if leaves == old.leaves else None
        experts.append(new.but(leaves=leaves, card=old.card, casts=casts, contribution=contribution))
    shared, casts = known(now.shared, then.shared, then.stored[""], then.casts)
    return now.but(experts=experts, shared=shared, casts=casts)


def _with_anchor_card(manifest: ModelManifest, more: Mapping[str, Any]) -> ModelManifest:
    """The manifest with more on the anchor's data card."""
    anchor, *others = manifest.experts
    return manifest.but(experts=[anchor.but(card={**anchor.card, **more}), *others])


# Of a contribution.


def _check_anchor(
    sidecar: Sidecar | None,
    base: ModelManifest,
    first: Mapping[str, Slice],
    source: str,
    anchor: epath.PathLike,
) -> None:
    """What no tensor says of the anchor, its bias: the sidecar has its digest, and other writers know none."""
    if sidecar and sidecar.manifest.anchor_digest != base.anchor_digest:
        found, expected = base.anchor_digest[:12], sidecar.manifest.anchor_digest[:12]
        reason = f"{found}, and that is {expected}: their {ROUTER_BIAS} differs"
        raise _wrong_anchor(f"{anchor}: is not the anchor of {source} ({reason})")
    if not sidecar and first[ROUTER_BIAS].read((slice(None),)).any():
        raise _wrong_anchor(f"{anchor}: its {ROUTER_BIAS} is not zero, and {source} says nothing of biases")


def _bias(sidecar: Sidecar) -> dict[str, Slice]:
    """The expert's bias as its owner made it, which is in the router as merged where it was left out."""
    name, leaves = sidecar.manifest.roster[1], sidecar.leaves
    if sidecar.manifest.tuned:
        leaves = open_merged_router(sidecar.path, sidecar.manifest)
    return {ROUTER_BIAS: leaves[name][ROUTER_BIAS]}


def _in_dtypes_of(opened: Mapping[str, Slice], leaves: Mapping[str, Slice]) -> dict[str, Slice]:
    """Our leaves, each cast to the dtype of the opened one, where there is one."""
    return {leaf: part.as_dtype(opened[leaf].dtype) if leaf in opened else part for leaf, part in leaves.items()}


def _check_architecture(opened: Opened, base: ModelManifest, anchor: epath.PathLike) -> None:
    expected = Architecture.from_dict(base.architecture, str(anchor))
    # Of two experts both compute every token, so that their weights sum to 1 anyway.
    found = dataclasses.replace(opened.config.architecture, norm_topk_prob=expected.norm_topk_prob)
    differing = [f.name for f in dataclasses.fields(expected) if getattr(expected, f.name) != getattr(found, f.name)]
    if differing:
        raise _wrong_anchor(f"{opened.path}: has another architecture than the anchor ({', '.join(differing)} differ)")


def _check_router_weights(opened: Opened, first: Mapping[str, Slice], anchor: epath.PathLike) -> None:
    """A pair that was trained against other router weights than the anchor's cannot be merged with it."""
    found, expected = (
        part.read((slice(None), slice(None))) for part in (opened.experts[0][ROUTER_WEIGHT], first[ROUTER_WEIGHT])
    )
    if same_bytes(found, expected):
        return
    if not expected.any():
        raise UserError(
            f"{anchor}: its router weights are zeros, and the public expert of {opened.path} has others; import the "
            f"anchor again with router_weights_from={opened.path}"
        )
    raise _wrong_anchor(f"{opened.path}: the router weights of its public expert are not those of {anchor}")


def _wrong_anchor(problem: str) -> UserError:
    return UserError(f"{problem}; give the anchor that the pair was trained on")
