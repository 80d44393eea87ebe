"""Model and contribution directories: what their manifests say and where their leaves lie.

`HOLDS` lists what a model and a contribution directory hold (docs/formats.md). Weights are known by digests of their
content: one for each leaf of each expert, and one for each leaf that all experts share. An expert's digests are the
same in its contribution and in every model it is merged into; where a leaf was cast, the digest of what is stored
stands beside.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from flexolmo_jax.checkpoint.files import FILE, Described, Names, check_files, is_system_file
from flexolmo_jax.checkpoint.roster import (
    ANCHOR_NAME,
    CONTRIBUTION_TYPES,
    NAME_RULE,
    Casts,
    Expert,
    check_types,
    is_expert_name,
    read_casts,
    stored_digests,
)
from flexolmo_jax.checkpoint.tree import Slice, combined_digest, open_tree
from flexolmo_jax.checkpoint.zarr import TREE
from flexolmo_jax.errors import UserError

FORMAT = 1
MOE = "blocks/moe/"
PARAMS = "params"
MODEL_FILE = "model.json"
CONTRIBUTION_FILE = "contribution.json"
TOKENIZER_FILE = "tokenizer.json"
DEFAULT_LENGTH = 4096  # tokens in a sequence, where a data card does not say
TOKENIZER_FOLDER = "hugging_face"  # what an imported model had beside it: settings of the tokenizer, of generation
TOKENIZER_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
CERTIFICATE_FILE = "certificate.json"  # what an opt-out guarantees
PUBLIC = "public"  # the sample of public data that came with an anchor, a corpus
# A model that was tuned after its merge keeps the router as the merge made it, in a tree of its own.
MERGED_ROUTER = "merged_router"
ROUTER_LEAVES = (MOE + "experts/router/weight", MOE + "experts/router/bias")
_ROUTER = ("router/bias", "router/weight")  # the same, as an expert's own


def _held_in_corpus(description: epath.Path) -> Names | None:
    try:
        files = [file["name"] for file in json.loads(description.read_bytes())["files"]]
        return dict.fromkeys(["corpus.json", TOKENIZER_FILE, *files], FILE)
    except (ValueError, KeyError, TypeError):
        return None


# By kind, what a directory holds at most.
HOLDS = {
    "model": {
        MODEL_FILE: FILE,
        PARAMS: TREE,
        MERGED_ROUTER: TREE,
        TOKENIZER_FILE: FILE,
        TOKENIZER_FOLDER: dict.fromkeys(TOKENIZER_FILES, FILE),
        PUBLIC: Described("corpus.json", _held_in_corpus),
        CERTIFICATE_FILE: FILE,
    },
    "contribution": {CONTRIBUTION_FILE: FILE, PARAMS: TREE},
}

# What a manifest holds: {key: type}.
_MODEL = {"architecture": dict, "experts": list, "shared": dict, "top_k": int, "tokenizer_digest": str, "eos_id": int}
_TUNED = {"leaves": list, "merged_router": dict}


def digest_name(path: str) -> str:
    """The name under which a leaf is digested: an expert's leaf has the same one in every layout."""
    return path.removeprefix(MOE).split("/", 1)[1] if path.startswith(MOE) else path


@dataclasses.dataclass(frozen=True)
class Model:
    """A model directory's manifest (`model.json`).

    Attributes:
      architecture: the fields of `model.architecture.Architecture`.
      experts: the roster, the anchor first, then by name.
      shared: {path: digest} of the leaves that all experts share.
      top_k: how many experts compute each token (all of them, where the roster is shorter).
      tokenizer_digest: digest of the `tokenizer.json` it was trained with.
      eos_id: the token that closes a document.
      tuned: None, or what was trained after the merge: {"leaves": [paths], "merged_router": {expert: {leaf: digest}
        of the router as merged, which lies in `merged_router/`}, "card": of the data, and, where leaves of that
        router were cast, "casts": {expert: casts}}.
      casts: of the shared leaves that are stored in another dtype than they were published in.
    """

    architecture: Mapping[str, Any]
    experts: Sequence[Expert]
    shared: Mapping[str, str]
    top_k: int
    tokenizer_digest: str
    eos_id: int
    tuned: Mapping[str, Any] | None = None
    casts: Casts = dataclasses.field(default_factory=dict)

    @property
    def roster(self) -> list[str]:
        return [expert.name for expert in self.experts]

    @property
    def stored(self) -> dict[str, dict[str, str]]:
        """{expert: {leaf: digest of what is stored}}, and under "" the shared leaves'."""
        return {"": stored_digests(self.shared, self.casts), **{e.name: e.stored for e in self.experts}}

    @property
    def content_digest(self) -> str:
        """Of all that is stored, whatever the path of the directory."""
        shared, *experts = self.stored.values()
        return combined_digest({**shared, **dict(zip(self.roster, map(combined_digest, experts), strict=True))})

    @property
    def merged_router(self) -> dict[str, dict[str, str]]:
        """{expert: {leaf: digest}} of the router as it was published and merged, whatever was trained since."""
        if self.tuned:
            return {name: dict(self.tuned["merged_router"][name]) for name in self.roster}
        return {e.name: {leaf: e.leaves[leaf] for leaf in _ROUTER} for e in self.experts}

    @property
    def merged_router_casts(self) -> dict[str, Casts]:
        """{expert: casts} of the router as merged; an expert without any has no entry."""
        if self.tuned:
            casts = self.tuned.get("casts", {})
        else:
            casts = {e.name: {leaf: e.casts[leaf] for leaf in _ROUTER if leaf in e.casts} for e in self.experts}
        return {name: casts[name] for name in self.roster if casts.get(name)}

    def tuned_in(self, leaves: Iterable[str], card: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What `tuned` is when these leaves were trained since the merge; `card` of the data, by default as it was."""
        tuned = {**(self.tuned or {}), "leaves": sorted(leaves), "merged_router": self.merged_router}
        tuned |= {"card": card} if card is not None else {}
        casts = self.merged_router_casts
        return {k: v for k, v in tuned.items() if k != "casts"} | ({"casts": casts} if casts else {})

    @property
    def stored_router(self) -> dict[str, dict[str, str]]:
        """{expert: {leaf: digest of what is stored}} of the router as merged."""
        casts = self.merged_router_casts
        return {name: stored_digests(leaves, casts.get(name, {})) for name, leaves in self.merged_router.items()}

    @property
    def sequence_length(self) -> int | None:
        """Tokens in a row that the anchor was trained on, where its data card says so."""
        length = self.experts[0].card.get("sequence_length")
        return length if type(length) is int and length > 0 else None

    @property
    def context_length(self) -> int:
        """Tokens that the model sees at once, at most: a sequence of the anchor's training, or `DEFAULT_LENGTH`."""
        return self.sequence_length or DEFAULT_LENGTH

    @property
    def anchor_digest(self) -> str:
        """The digest that contributions name: of all leaves of the anchor they were trained against.

        A router tuned after the merge does not change it, nor does a cast; training the shared leaves does, as that
        anchor is gone.
        """
        leaves = {**self.experts[0].leaves, **(self.tuned["merged_router"][ANCHOR_NAME] if self.tuned else {})}
        anchor = {f"{ANCHOR_NAME}/{leaf}": digest for leaf, digest in leaves.items()}
        return combined_digest({**self.shared, **anchor})

    def write(self, directory: epath.Path) -> None:
        """Writes the manifest into a directory that already holds its parameters."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        casts = fields.pop("casts")
        fields["experts"] = [expert.document() for expert in self.experts]
        document = {"format": FORMAT, "kind": "model", "anchor_digest": self.anchor_digest, **fields}
        document |= {"casts": dict(sorted(casts.items()))} if casts else {}
        (directory / MODEL_FILE).write_text(json.dumps(document, indent=2) + "\n")

    @classmethod
    def read(cls, directory: epath.PathLike, *, flag: str, strict: bool = False) -> "Model":
        """Reads a manifest.

        Args:
          directory: the model directory.
          flag: names the flag that asked for it, in errors; "" where none did.
          strict: whether nothing else may be in the directory, and no link may lead out of it.

        Raises:
          UserError: not a model directory, or a damaged or newer manifest, or what `strict` refuses.
        """
        document = _read_manifest(epath.Path(directory), MODEL_FILE, "model", flag, strict)
        try:
            check_types(document, _MODEL)
            experts = tuple(map(Expert.read, document["experts"]))
            names = [expert.name for expert in experts]
            if names[:1] != [ANCHOR_NAME] or len(set(names)) < len(names) or not all(map(is_expert_name, names[1:])):
                raise ValueError(f"a roster of {names}")
            if document["top_k"] < 1:
                raise ValueError(f"top_k {document['top_k']}")
            if document["tuned"] is not None:
                check_types(document["tuned"], _TUNED)
                for name in names:
                    leaves = document["tuned"]["merged_router"][name]
                    check_types({"leaves": leaves}, {"leaves": dict})
                    casts = document["tuned"].get("casts", {}).get(name, {})
                    read_casts({"leaves": leaves, "casts": casts}, "leaves")
            return cls(
                architecture=document["architecture"],
                experts=experts,
                shared=document["shared"],
                top_k=document["top_k"],
                tokenizer_digest=document["tokenizer_digest"],
                eos_id=document["eos_id"],
                tuned=document["tuned"],
                casts=read_casts(document, "shared"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(epath.Path(directory) / MODEL_FILE, error) from None


@dataclasses.dataclass(frozen=True)
class Contribution:
    """A contribution directory's manifest (`contribution.json`): an expert, and what it was trained on top of."""

    expert: Expert
    anchor_digest: str
    architecture: Mapping[str, Any]

    def write(self, directory: epath.Path) -> None:
        """Writes the manifest into a directory that already holds its parameters.

        Keys that its owner wrote and that are not known here are kept; casts stand beside them.
        """
        casts = {"casts": dict(sorted(self.expert.casts.items()))} if self.expert.casts else {}
        document = (self.expert.contribution or {}) | {
            "format": FORMAT,
            "kind": "contribution",
            "expert": self.expert.name,
            "digest": self.expert.digest,
            "anchor_digest": self.anchor_digest,
            "architecture": dict(self.architecture),
            "leaves": dict(self.expert.leaves),
            "card": dict(self.expert.card),
        }
        (directory / CONTRIBUTION_FILE).write_text(json.dumps({**document, **casts}, indent=2) + "\n")

    @classmethod
    def read(cls, directory: epath.PathLike, *, flag: str, strict: bool = False) -> "Contribution":
        """Reads a manifest; arguments and errors are those of `Model.read`."""
        document = _read_manifest(epath.Path(directory), CONTRIBUTION_FILE, "contribution", flag, strict)
        try:
            check_types(document, CONTRIBUTION_TYPES)
            if not is_expert_name(document["expert"]):
                raise ValueError(f"an expert named '{document['expert']}'; {NAME_RULE}")
            casts = read_casts(document, "leaves")
            written = {key: value for key, value in document.items() if key != "casts"}
            expert = Expert(document["expert"], document["leaves"], document["card"], casts, written)
            return cls(expert, document["anchor_digest"], document["architecture"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(epath.Path(directory) / CONTRIBUTION_FILE, error) from None


def model_slices(
    tree: Mapping[str, Any], roster: Sequence[str], source: str, dtypes: Mapping[str, np.dtype] | None = None
) -> tuple[dict[str, Slice], dict[str, dict[str, Slice]]]:
    """Splits a model's flat tree (stored or in memory) into shared leaves and each expert's own.

    Args:
      tree: {path: array}.
      roster: the names of the experts.
      source: names the tree in errors.
      dtypes: {path: dtype} that leaves are cast to as they are read; by default they stay as they are.

    Returns:
      ({path: slice} of the shared leaves, {expert name: {leaf: slice}} in the order of the roster).
    """
    shared, experts = {}, {name: {} for name in roster}
    for path, array in tree.items():
        part = Slice(array, None, f"{source}: leaf {path}")
        part = part.as_dtype(dtypes[path]) if dtypes else part
        if not path.startswith(MOE):
            shared[path] = part
        elif len(roster) == 1:
            experts[roster[0]][digest_name(path)] = part
        else:
            for i, name in enumerate(roster):
                experts[name][digest_name(path)] = part._replace(expert=i, name=f"{part.name} of expert {name}")
    return shared, experts


def model_leaves(
    shared: Mapping[str, Slice], experts: Mapping[str, Mapping[str, Slice]]
) -> dict[str, Slice | list[Slice]]:
    """The inverse of `model_slices`: {path: content} of a model tree with these experts, for `write_tree`."""
    leaves: dict[str, Slice | list[Slice]] = dict(shared)
    members = list(experts.values())
    for leaf in members[0]:
        if len(members) == 1:
            leaves[f"{MOE}anchor/{leaf}"] = members[0][leaf]
        else:
            leaves[f"{MOE}experts/{leaf}"] = [expert[leaf] for expert in members]
    return leaves


def split_digests(
    digests: Mapping[str, str | list[str]], roster: Sequence[str]
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Splits what `write_tree` returned for a model: ({shared path: digest}, [{leaf: digest} per expert])."""
    shared = {path: digest for path, digest in digests.items() if not path.startswith(MOE)}
    experts: list[dict[str, str]] = [{} for _ in roster]
    for path in digests.keys() - shared.keys():
        values = digests[path] if isinstance(digests[path], list) else [digests[path]]
        for expert, digest in zip(experts, values, strict=True):
            expert[digest_name(path)] = digest
    return dict(sorted(shared.items())), [dict(sorted(expert.items())) for expert in experts]


def merged_router(directory: epath.PathLike, manifest: Model) -> dict[str, dict[str, Slice]]:
    """The router as the merge made it, {expert: {leaf: slice}}; a model tuned since keeps it beside its own."""
    path = epath.Path(directory) / (MERGED_ROUTER if manifest.tuned else PARAMS)
    stored = open_tree(path)
    missing = [leaf for leaf in ROUTER_LEAVES if leaf not in stored]
    if missing:
        raise UserError(f"{path}: leaf {missing[0]} is missing; copy the directory again from its source")
    router = {leaf: stored[leaf] for leaf in ROUTER_LEAVES}
    return model_slices(router, manifest.roster, str(path))[1]


def open_params(directory: epath.PathLike) -> dict[str, ts.TensorStore]:
    """Opens the parameters of a model or a contribution for reading."""
    return open_tree(epath.Path(directory) / PARAMS)


def copy_files(source: epath.Path, directory: epath.Path) -> None:
    """Copies the files of a folder without folders, where there is one, to the folder that `directory` will be."""
    if source.is_dir():
        directory.mkdir()
        for file in source.iterdir():
            if not file.is_dir() and not is_system_file(file.name):
                file.copy(directory / file.name)


def kind_of(directory: epath.PathLike) -> str | None:
    """Returns "model", "contribution", "corpus", or None for anything else."""
    files = {"model": MODEL_FILE, "contribution": CONTRIBUTION_FILE, "corpus": "corpus.json"}
    return next((kind for kind, file in files.items() if (epath.Path(directory) / file).exists()), None)


def _read_manifest(directory: epath.Path, file: str, kind: str, flag: str, strict: bool) -> dict[str, Any]:
    said = f"{flag}={directory}" if flag else str(directory)
    if not directory.exists():
        raise UserError(f"{said}: no such directory; give a {kind} directory")
    if not (directory / file).exists():
        found = kind_of(directory)
        is_a = f"is a {found} directory" if found else f"has no {file}"
        raise UserError(f"{said}: {is_a}; give a {kind} directory")
    if strict:
        check_files(directory, HOLDS[kind], said)
    if not (directory / file).is_file():
        raise UserError(f"{said}: {file} is no file; copy the directory again from its source")
    try:
        document = json.loads((directory / file).read_text())
        version = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(directory / file, error) from None
    if version != FORMAT:
        raise UserError(f"{directory / file}: format {version}; this version reads format {FORMAT}")
    return document


def _damaged(file: epath.Path, error: Exception) -> UserError:
    return UserError(f"{file}: damaged ({error!r}); copy the directory again from its source")
