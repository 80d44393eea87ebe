"""Model and contribution directories: what their manifests say and where their leaves lie.

A model directory holds `model.json`, `params/` and `tokenizer.json`; a contribution directory holds
`contribution.json` and `params/`. Weights are known by digests of their content: one for each leaf of each
expert, and one for each leaf that all experts share. An expert's digests are the same in its contribution
and in every model it is merged into.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tensorstore as ts
from etils import epath

from flexolmo_jax.checkpoint.tree import Slice, combined_digest, open_tree, write_tree
from flexolmo_jax.errors import UserError

FORMAT = 1
ANCHOR_NAME = "anchor"
MIXTURE = "blocks/mixture/"
PARAMS = "params"
MODEL_FILE = "model.json"
CONTRIBUTION_FILE = "contribution.json"
TOKENIZER_FILE = "tokenizer.json"
DEFAULT_LENGTH = 4096  # tokens in a sequence, where a data card does not say
TOKENIZER_FOLDER = "hugging_face"  # what an imported model had beside it: settings of the tokenizer, of generation
# A model that was tuned after its merge keeps the router as the merge made it, in a tree of its own.
MERGED_ROUTER = "merged_router"
ROUTER_LEAVES = (MIXTURE + "experts/row", MIXTURE + "experts/bias")

NAME_RULE = f"use lower-case letters, digits, - and _, and not '{ANCHOR_NAME}'"

# What a manifest holds: {key: type}.
_MODEL = {"architecture": dict, "experts": list, "shared": dict, "top_k": int, "tokenizer_digest": str, "eos_id": int}
_TUNED = {"leaves": list, "merged_router": dict}
_EXPERT = {"name": str, "leaves": dict, "card": dict}
_CONTRIBUTION = {"expert": str, "leaves": dict, "card": dict, "anchor_digest": str, "architecture": dict}


def is_expert_name(name: str) -> bool:
    """Whether a contributed expert can have that name (`NAME_RULE`)."""
    return re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) is not None and name != ANCHOR_NAME


def digest_name(path: str) -> str:
    """The name under which a leaf is digested: an expert's leaf has the same one in every layout."""
    return path.rsplit("/", 1)[1] if path.startswith(MIXTURE) else path


@dataclasses.dataclass(frozen=True)
class Expert:
    """One line of the roster: name, {leaf: digest}, and the data card its owner wrote."""

    name: str
    leaves: Mapping[str, str]
    card: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return combined_digest(self.leaves)


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
        of the router as merged, which lies in `merged_router/`}, "card": of the data}.
    """

    architecture: Mapping[str, Any]
    experts: Sequence[Expert]
    shared: Mapping[str, str]
    top_k: int
    tokenizer_digest: str
    eos_id: int
    tuned: Mapping[str, Any] | None = None

    @property
    def roster(self) -> list[str]:
        return [expert.name for expert in self.experts]

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

        A router tuned after the merge does not change it; training the shared leaves does, as that anchor is gone.
        """
        leaves = {**self.experts[0].leaves, **(self.tuned["merged_router"][ANCHOR_NAME] if self.tuned else {})}
        anchor = {f"{ANCHOR_NAME}/{leaf}": digest for leaf, digest in leaves.items()}
        return combined_digest({**self.shared, **anchor})

    def write(self, directory: epath.Path) -> None:
        """Writes the manifest into a directory that already holds its parameters."""
        fields = dataclasses.asdict(self)
        for expert, record in zip(self.experts, fields["experts"], strict=True):
            record["digest"] = expert.digest
        document = {"format": FORMAT, "kind": "model", "anchor_digest": self.anchor_digest, **fields}
        (directory / MODEL_FILE).write_text(json.dumps(document, indent=2) + "\n")

    @classmethod
    def read(cls, directory: epath.PathLike, *, flag: str) -> "Model":
        """Reads a manifest; `flag` names the flag that asked for the directory.

        Raises:
          UserError: not a model directory, or a damaged or newer manifest.
        """
        document = _read_manifest(epath.Path(directory), MODEL_FILE, "model", flag)
        try:
            _check_types(document, _MODEL)
            for record in document["experts"]:
                _check_types(record, _EXPERT)
            experts = tuple(Expert(e["name"], e["leaves"], e["card"]) for e in document["experts"])
            names = [expert.name for expert in experts]
            if names[:1] != [ANCHOR_NAME] or len(set(names)) < len(names) or not all(map(is_expert_name, names[1:])):
                raise ValueError(f"a roster of {names}")
            if document["top_k"] < 1:
                raise ValueError(f"top_k {document['top_k']}")
            if document["tuned"] is not None:
                _check_types(document["tuned"], _TUNED)
                for name in names:
                    _check_types({"leaves": document["tuned"]["merged_router"][name]}, {"leaves": dict})
            return cls(
                architecture=document["architecture"],
                experts=experts,
                shared=document["shared"],
                top_k=document["top_k"],
                tokenizer_digest=document["tokenizer_digest"],
                eos_id=document["eos_id"],
                tuned=document["tuned"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(epath.Path(directory) / MODEL_FILE, error) from None


@dataclasses.dataclass(frozen=True)
class Contribution:
    """A contribution directory's manifest (`contribution.json`): an expert, and what it was trained on top of."""

    expert: Expert
    anchor_digest: str
    architecture: Mapping[str, Any]

    def write(self, directory: epath.Path) -> None:
        """Writes the manifest into a directory that already holds its parameters."""
        document = {
            "format": FORMAT,
            "kind": "contribution",
            "expert": self.expert.name,
            "digest": self.expert.digest,
            "anchor_digest": self.anchor_digest,
            "architecture": dict(self.architecture),
            "leaves": dict(self.expert.leaves),
            "card": dict(self.expert.card),
        }
        (directory / CONTRIBUTION_FILE).write_text(json.dumps(document, indent=2) + "\n")

    @classmethod
    def read(cls, directory: epath.PathLike, *, flag: str) -> "Contribution":
        """Reads a manifest; raises UserError as `Model.read` does."""
        document = _read_manifest(epath.Path(directory), CONTRIBUTION_FILE, "contribution", flag)
        try:
            _check_types(document, _CONTRIBUTION)
            if not is_expert_name(document["expert"]):
                raise ValueError(f"an expert named '{document['expert']}'; {NAME_RULE}")
            expert = Expert(document["expert"], document["leaves"], document["card"])
            return cls(expert, document["anchor_digest"], document["architecture"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(epath.Path(directory) / CONTRIBUTION_FILE, error) from None


def model_slices(
    tree: Mapping[str, Any], roster: Sequence[str], source: str
) -> tuple[dict[str, Slice], dict[str, dict[str, Slice]]]:
    """Splits a model's flat tree (stored or in memory) into shared leaves and each expert's own.

    Returns:
      ({path: slice} of the shared leaves, {expert name: {leaf: slice}} in the order of the roster).
    """
    shared, experts = {}, {name: {} for name in roster}
    for path, array in tree.items():
        label = f"{source}: leaf {path}"
        if not path.startswith(MIXTURE):
            shared[path] = Slice(array, None, label)
        elif len(roster) == 1:
            experts[roster[0]][digest_name(path)] = Slice(array, None, label)
        else:
            for i, name in enumerate(roster):
                experts[name][digest_name(path)] = Slice(array, i, f"{label} of expert {name}")
    return shared, experts


def model_leaves(
    shared: Mapping[str, Slice], experts: Mapping[str, Mapping[str, Slice]]
) -> dict[str, Slice | list[Slice]]:
    """The inverse of `model_slices`: {path: content} of a model tree with these experts, for `write_tree`."""
    leaves: dict[str, Slice | list[Slice]] = dict(shared)
    members = list(experts.values())
    for leaf in members[0]:
        if len(members) == 1:
            leaves[f"{MIXTURE}anchor/{leaf}"] = members[0][leaf]
        else:
            leaves[f"{MIXTURE}experts/{leaf}"] = [expert[leaf] for expert in members]
    return leaves


def split_digests(
    digests: Mapping[str, str | list[str]], roster: Sequence[str]
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Splits what `write_tree` returned for a model: ({shared path: digest}, [{leaf: digest} per expert])."""
    shared = {path: digest for path, digest in digests.items() if not path.startswith(MIXTURE)}
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


def write_merged_router(directory: epath.Path, router: Mapping[str, Mapping[str, Slice]]) -> dict[str, dict[str, str]]:
    """Writes what `merged_router` reads; returns {expert: {leaf: digest}}."""
    digests = write_tree(directory / MERGED_ROUTER, model_leaves({}, router), digest_name)
    return dict(zip(router, split_digests(digests, list(router))[1], strict=True))


def open_params(directory: epath.PathLike) -> dict[str, ts.TensorStore]:
    """Opens the parameters of a model or a contribution for reading."""
    return open_tree(epath.Path(directory) / PARAMS)


def copy_files(source: epath.Path, directory: epath.Path) -> None:
    """Copies the files of a folder without folders, where there is one, to the folder that `directory` will be."""
    if source.is_dir():
        directory.mkdir()
        for file in source.iterdir():
            if not file.is_dir():
                file.copy(directory / file.name)


def kind_of(directory: epath.PathLike) -> str | None:
    """Returns "model", "contribution", "corpus", or None for anything else."""
    files = {"model": MODEL_FILE, "contribution": CONTRIBUTION_FILE, "corpus": "corpus.json"}
    return next((kind for kind, file in files.items() if (epath.Path(directory) / file).exists()), None)


def _read_manifest(directory: epath.Path, file: str, kind: str, flag: str) -> dict[str, Any]:
    if not directory.exists():
        raise UserError(f"{flag}={directory}: no such directory; give a {kind} directory")
    if not (directory / file).exists():
        found = kind_of(directory)
        is_a = f"is a {found} directory" if found else f"has no {file}"
        raise UserError(f"{flag}={directory}: {is_a}; give a {kind} directory")
    try:
        document = json.loads((directory / file).read_text())
        version = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(directory / file, error) from None
    if version != FORMAT:
        raise UserError(f"{directory / file}: format {version}; this version reads format {FORMAT}")
    return document


def _check_types(record: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Raises KeyError or TypeError unless a record has these keys, with values of these types."""
    for key, expected in types.items():
        if not isinstance(record[key], expected):
            raise TypeError(f"{key} is no {expected.__name__}")
    for key in ("leaves", "shared"):
        if types.get(key) is dict and not all(isinstance(digest, str) for digest in record[key].values()):
            raise TypeError(f"{key}: a digest is no str")
    if "architecture" in types and not all(isinstance(x, int | float) for x in record["architecture"].values()):
        raise TypeError("architecture: a size is no number")


def _damaged(file: epath.Path, error: Exception) -> UserError:
    return UserError(f"{file}: damaged ({error!r}); copy the directory again from its source")
