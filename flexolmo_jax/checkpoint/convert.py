"""Directories of format 1, as earlier versions wrote them, become directories of format 2.

Format 1 digested a leaf as one stream of bytes, named some leaves otherwise, and covered neither the name nor the card
of an expert. Everything that a directory holds is compared with its digests of format 1, and then written anew. An
owner's manifest is made anew, too, so it can only be made of leaves that are stored as they were published.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pydantic
from etils import epath

from flexolmo_jax.checkpoint.casts import Experts
from flexolmo_jax.checkpoint.copying import check_digest, digest_slice
from flexolmo_jax.checkpoint.digests import chunk_shape, chunks, combined_digest, whole
from flexolmo_jax.checkpoint.files import check_files
from flexolmo_jax.checkpoint.manifests import (
    ANCHOR_NAME,
    MOE,
    ContributionManifest,
    ExpertRecord,
    ModelManifest,
    Tuning,
    digest_name,
    is_router_leaf,
    problem,
)
from flexolmo_jax.checkpoint.model_directory import (
    CERTIFICATE_FILE,
    CONTRIBUTION,
    MERGED_ROUTER,
    MODEL,
    PARAMS,
    PUBLIC,
    check_leaves,
    copy_files,
    copy_tokenizer,
    kind_of,
    split_experts,
    write_contribution,
    write_model,
)
from flexolmo_jax.checkpoint.params import Slice, open_tree
from flexolmo_jax.errors import UserError, first_line

_MIXTURE = "blocks/mixture"  # of a path in format 1, what is blocks/moe
_ROUTER = {"router/weight": "row", "router/bias": "bias"}  # {leaf of an expert: its name in format 1}
_AGAIN = "copy the directory again from its source"


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="allow")
    architecture: dict[str, bool | int | float | str]


class _Contribution(_Record):
    expert: str
    anchor_digest: str
    leaves: dict[str, str]
    card: dict[str, Any]
    casts: dict[str, Any] = {}


class _Expert(pydantic.BaseModel):
    name: str
    leaves: dict[str, str]
    card: dict[str, Any]
    casts: dict[str, Any] = {}
    contribution: _Contribution | None = None


class _Tuned(pydantic.BaseModel):
    leaves: list[str]
    merged_router: dict[str, dict[str, str]]
    card: dict[str, Any] = {}
    casts: dict[str, Any] = {}


class _Model(_Record):
    experts: list[_Expert]
    shared: dict[str, str]
    top_k: int
    tokenizer_digest: str
    eos_id: int
    tuned: _Tuned | None = None
    casts: dict[str, Any] = {}

    @property
    def anchor_digest(self) -> str:
        leaves = {**self.experts[0].leaves, **(self.tuned.merged_router[ANCHOR_NAME] if self.tuned else {})}
        return combined_digest({**self.shared, **{f"{ANCHOR_NAME}/{leaf}": digest for leaf, digest in leaves.items()}})


def convert(source: epath.PathLike, out: epath.PathLike, anchor: epath.PathLike | None = None) -> list[str]:
    """Converts a model or a contribution directory.

    Args:
      source: of format 1.
      out: the directory to make.
      anchor: for a contribution, the model directory of its anchor, also of format 1.

    Returns:
      Lines that say what was found.

    Raises:
      UserError: a directory is damaged, altered or not of format 1, `anchor` is missing or another one, leaves are not
        stored as they were published, or `out` exists.
    """
    kind = kind_of(source)
    if kind == "model":
        if anchor is not None:
            raise UserError(f"{anchor}: only a contribution is converted with its anchor; leave it out")
        return _convert_model(epath.Path(source), epath.Path(out))
    if kind == "contribution":
        if anchor is None:
            raise UserError(f"{source}: a contribution; give the directory of its anchor, of format 1, as well")
        return _convert_contribution(epath.Path(source), epath.Path(anchor), epath.Path(out))
    raise UserError(f"{source}: neither a model nor a contribution directory; give one of format 1")


def _convert_model(source: epath.Path, out: epath.Path) -> list[str]:
    old, shared, experts = _open_model(source)
    if old.casts or any(e.casts for e in old.experts) or (old.tuned and old.tuned.casts):
        raise UserError(
            f"{source}: holds leaves that were cast, so that what their owners published is not there; convert the "
            "anchor and the contributions, and merge them again"
        )
    tuned, router = _open_tuning(source, old)
    manifest = ModelManifest(
        architecture=old.architecture,
        experts=[ExpertRecord(name=expert.name, leaves={}, card=expert.card) for expert in old.experts],
        shared={},
        top_k=old.top_k,
        tokenizer_digest=old.tokenizer_digest,
        eos_id=old.eos_id,
        tuned=tuned,
    )
    # Owners' manifests name leaves, and the anchor, as they were published: all but the router's must be here still.
    published = tuned is None or all(map(is_router_leaf, tuned.leaves))
    owners = {e.name: e.contribution for e in old.experts if published and e.contribution}
    for name, owner in owners.items():
        if owner.anchor_digest != old.anchor_digest:
            raise UserError(f"{source / MODEL.manifest}: damaged (contribution of {name}: another anchor); {_AGAIN}")

    def complete(directory: epath.Path, manifest: ModelManifest) -> ModelManifest:
        copy_tokenizer(source, directory)
        copy_files(source / PUBLIC, directory / PUBLIC)
        records = []
        for expert in manifest.experts:
            contribution = None
            if expert.name in owners:
                leaves = {**expert.leaves, **manifest.merged_router[expert.name]}
                contribution = _owner_manifest(owners[expert.name], manifest.anchor_digest, leaves).document()
            records.append(expert.but(contribution=contribution))
        manifest = manifest.but(experts=records)
        if (source / CERTIFICATE_FILE).exists():
            _convert_certificate(source / CERTIFICATE_FILE, directory / CERTIFICATE_FILE, manifest)
        return manifest

    write_model(out, manifest, shared, experts, merged_router=router, complete=complete, title="convert")
    lost = [e.name for e in old.experts if e.contribution and e.name not in owners]
    note = "trained on after the merge, so without the owners' manifests of"
    return [f"{out}: {', '.join(manifest.roster)}", *([f"{source}: {note} {', '.join(lost)}"] if lost else [])]


def _convert_contribution(source: epath.Path, anchor: epath.Path, out: epath.Path) -> list[str]:
    old = _read(_Contribution, source, CONTRIBUTION.manifest, CONTRIBUTION.content)
    if old.casts:
        raise UserError(f"{source}: was cast after its owner published it; convert what the owner published")
    base, shared, experts = _open_model(anchor)
    if old.anchor_digest != base.anchor_digest or base.tuned:
        raise UserError(
            f"{source}: made on another anchor ({old.anchor_digest[:12]}, not {base.anchor_digest[:12]}, which is "
            f"{anchor}); give the anchor it was trained on"
        )
    digests = {path: digest_slice(part, path) for path, part in shared.items()}
    digests |= {f"{ANCHOR_NAME}/{leaf}": digest_slice(part, leaf) for leaf, part in experts[ANCHOR_NAME].items()}
    leaves = {
        _new_path(leaf): Slice(stored, None, f"{source}: leaf {leaf}")
        for leaf, stored in open_tree(source / PARAMS).items()
    }
    _check(leaves, old.leaves, str(source))
    write_contribution(out, _owner_manifest(old, combined_digest(digests), {}), leaves)
    return [f"{out}: {old.expert}"]


def _owner_manifest(old: _Contribution, anchor_digest: str, leaves: Mapping[str, str]) -> ContributionManifest:
    extra = {key: x for key, x in (old.model_extra or {}).items() if key not in ("format", "kind", "digest")}
    return ContributionManifest(
        name=old.expert,
        anchor_digest=anchor_digest,
        architecture=old.architecture,
        card=old.card,
        leaves=dict(sorted(leaves.items())),
        **extra,
    )


def _open_model(path: epath.Path) -> tuple[_Model, dict[str, Slice], Experts]:
    """Opens a model, and compares every leaf with its digest."""
    old = _read(_Model, path, MODEL.manifest, MODEL.content)
    stored = {_new_path(leaf): array for leaf, array in open_tree(path / PARAMS).items()}
    roster = [expert.name for expert in old.experts]
    shared, experts = split_experts(stored, roster, str(path))
    _check(shared, _stored(old.shared, old.casts), str(path))
    for expert in old.experts:
        _check(experts[expert.name], _stored(expert.leaves, expert.casts), f"{path}: expert {expert.name}")
        if expert.contribution and expert.contribution.card != expert.card:
            raise UserError(
                f"{path / MODEL.manifest}: damaged (the card of {expert.name} is not its owner's); {_AGAIN}"
            )
    return old, shared, experts


def _open_tuning(path: epath.Path, old: _Model) -> tuple[Tuning | None, Experts | None]:
    """What was trained after the merge, and the router as it was merged."""
    if old.tuned is None:
        return None, None
    folder, roster = path / MERGED_ROUTER, [expert.name for expert in old.experts]
    stored = {_new_path(leaf): array for leaf, array in open_tree(folder).items()}
    router = split_experts(stored, roster, str(folder))[1]
    for name, leaves in router.items():
        _check(leaves, old.tuned.merged_router.get(name, {}), str(folder))
    digests = {
        name: {leaf: digest_slice(part, leaf) for leaf, part in sorted(leaves.items())}
        for name, leaves in router.items()
    }
    trained = sorted(map(_new_path, old.tuned.leaves))
    return Tuning(leaves=trained, merged_router=digests, card=old.tuned.card), router


def _read(kind: type, directory: epath.Path, file: str, content: Mapping[str, Any]) -> Any:
    if not (directory / file).exists():
        raise UserError(f"{directory}: has no {file}; give a directory of format 1")
    check_files(directory, content, str(directory))
    try:
        document = json.loads((directory / file).read_text())
        version = document["format"]
        if version != 1:
            raise UserError(f"{directory / file}: format {version}; only format 1 is converted")
        return kind.model_validate(document)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = problem(error) if isinstance(error, pydantic.ValidationError) else first_line(error)
        raise UserError(f"{directory / file}: damaged ({reason}); {_AGAIN}") from None


def _convert_certificate(source: epath.Path, file: epath.Path, manifest: ModelManifest) -> None:
    """What a certificate says of experts that are gone stays, in digests of format 1."""
    certificate = json.loads(source.read_text())
    digests = {expert.name: expert.digest for expert in manifest.experts}
    removed = [{**line, "format": 1} for line in certificate["removed"]]
    remaining = [{**line, "digest": digests[line["name"]]} for line in certificate["remaining"]]
    changed = {"removed": removed, "remaining": remaining, "anchor_digest": manifest.anchor_digest}
    changed["trained_together"] = sorted(map(_new_path, certificate.get("trained_together", [])))
    file.write_text(json.dumps({**certificate, **changed}, indent=2) + "\n")


def _new_path(path: str) -> str:
    """The name in format 2 of a leaf of a tree."""
    names = {old: new for new, old in _ROUTER.items()}
    head, _, leaf = path.rpartition("/")
    if head in ("", f"{_MIXTURE}/anchor", f"{_MIXTURE}/experts"):
        leaf = names.get(leaf, leaf)
    head = head.replace(f"{_MIXTURE}/", MOE).replace(f"{_MIXTURE}_norm", "blocks/moe_norm")
    return f"{head}/{leaf}" if head else leaf


def _old_name(leaf: str) -> str:
    """The name under which format 1 digested a leaf; an expert's by its own name."""
    return _ROUTER.get(leaf, leaf.replace("blocks/moe_norm", f"{_MIXTURE}_norm"))


def _stored(leaves: Mapping[str, str], casts: Mapping[str, Any]) -> dict[str, str]:
    return {leaf: casts[leaf]["digest"] if leaf in casts else digest for leaf, digest in leaves.items()}


def _check(leaves: Mapping[str, Slice], digests: Mapping[str, str], label: str) -> None:
    """Raises UserError unless these leaves, under their new names, have the digests of format 1 under the old ones."""
    check_leaves({_old_name(leaf): part for leaf, part in leaves.items()}, digests, label)
    for leaf, part in leaves.items():
        name = _old_name(leaf)
        check_digest(part.name, _digest(part, digest_name(name)), digests[name])


def _digest(part: Slice, name: str) -> str:
    """The digest of format 1: SHA-256 of a header and of a leaf's bytes in C order."""
    header = json.dumps([name, part.source_dtype.name, list(part.shape)])
    digest = hashlib.sha256(header.encode() + b"\n")
    for index in chunks(whole(part.shape), chunk_shape(part.shape, part.source_dtype.itemsize)):
        digest.update(part.read_source(index).tobytes())
    return digest.hexdigest()
