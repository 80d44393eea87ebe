"""The manifests of model and contribution directories: who made which leaves, and their digests (docs/formats.md).

An owner's manifest is never changed: every model that holds the owner's expert keeps it as it was published, under any
name. What was published is identified by digests that stay; where a leaf was cast since, a `Cast` stands beside.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
from etils import epath
from pydantic import AfterValidator, Field

from flexolmo_jax.checkpoint import Dtype
from flexolmo_jax.checkpoint.atomic import commit
from flexolmo_jax.checkpoint.digests import combined_digest, document_digest
from flexolmo_jax.errors import UserError, first_line

FORMAT = 2
MOE = "blocks/moe/"
SELECTOR = "selector/"  # begins the paths of a model's leaves that belong to its selector
BY_ROUTER = "router"  # the selection of a model without a selector
ROUTER = "router/"  # begins the names of an expert's leaves that belong to the router
STACK = "stack"  # the method of every model whose experts lie side by side
ANCHOR_NAME = "anchor"
NAME_RULE = f"use lower-case letters, digits, - and _, and not '{ANCHOR_NAME}'"
DEFAULT_LENGTH = 4096  # tokens in a sequence, where a data card does not say


def is_expert_name(name: str) -> bool:
    """Whether a contributed expert can have that name (`NAME_RULE`)."""
    return re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) is not None and name != ANCHOR_NAME


def digest_name(path: str) -> str:
    """The name under which a leaf is digested: an expert's leaf has the same one in every layout."""
    return path.removeprefix(MOE).split("/", 1)[1] if path.startswith(MOE) else path


def is_router_leaf(path: str) -> bool:
    """Whether a leaf, by its path in a model or its name in an expert, belongs to the router."""
    return digest_name(path).startswith((ROUTER, SELECTOR))


Value = TypeVar("Value")


def without_selector(shared: Mapping[str, Value]) -> dict[str, Value]:
    """What a model's experts share, {path: anything}, but what belongs to its selector."""
    return {path: value for path, value in shared.items() if not path.startswith(SELECTOR)}


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    def but(self, **changes: Any) -> Self:
        """The same with other values; they are not checked."""
        return self.model_copy(update=changes)


class Cast(_Record):
    """A leaf that is stored in another dtype than it was published in.

    Attributes:
      dtypes: the published one, ..., the stored one; each step is one rounding.
      digest: of what is stored.
    """

    dtypes: Annotated[list[Dtype], Field(min_length=2)]
    digest: str


Casts = dict[str, Cast]


def stored_digests(leaves: Mapping[str, str], casts: Mapping[str, Cast]) -> dict[str, str]:
    """{leaf: digest of what is stored}."""
    return {leaf: casts[leaf].digest if leaf in casts else digest for leaf, digest in leaves.items()}


def _check_casts(leaves: Mapping[str, str], casts: Casts) -> None:
    unknown = casts.keys() - leaves.keys()
    if unknown:
        raise ValueError(f"a cast of {min(unknown)}, which is none of the leaves")


def _expert_name(name: str) -> str:
    if not is_expert_name(name):
        raise ValueError(f"an expert named '{name}'; {NAME_RULE}")
    return name


class ContributionManifest(_Record):
    """An expert as its owner published it (`contribution.json`). Keys that are not known here are kept.

    Attributes:
      name: of the expert.
      anchor_digest: of the anchor that it was trained on.
      architecture: the fields of `model.architecture.Architecture`.
      card: the data card.
      leaves: {leaf: digest}.
      statistics: {leaf: digest} of the leaves in `statistics/`.
      casts: of leaves that someone cast since (`casts.json`); no part of the owner's manifest.
    """

    model_config = pydantic.ConfigDict(extra="allow")

    format: Literal[2] = FORMAT
    kind: Literal["contribution"] = "contribution"
    name: Annotated[str, AfterValidator(_expert_name)]
    anchor_digest: str
    architecture: dict[str, bool | int | float | str]
    card: dict[str, Any]
    leaves: dict[str, str]
    statistics: dict[str, str] = {}
    casts: Casts = Field(default={}, exclude=True)

    def document(self) -> dict[str, Any]:
        """The manifest as JSON; one that was read is given back as it was."""
        document = {"format": self.format, "kind": self.kind, **self.model_dump(exclude_unset=True)}
        document.pop("digest", None)
        return document | {"digest": document_digest(document)}

    @property
    def digest(self) -> str:
        """Of the whole manifest, and so of all that the owner published."""
        return document_digest(self.document())

    @property
    def stored(self) -> dict[str, str]:
        """{leaf: digest of what is stored}."""
        return stored_digests(self.leaves, self.casts)


class ExpertRecord(_Record):
    """An expert of a model.

    Attributes:
      name: in the roster.
      leaves: {leaf: digest} as published, or as trained since.
      card: the data card of its owner.
      statistics: {leaf: digest} of its leaves in `statistics/`.
      casts: of the leaves that are stored in another dtype than they were published in.
      contribution: its owner's manifest, as it was published; None: it came without one.
    """

    name: str
    leaves: dict[str, str]
    card: dict[str, Any]
    statistics: dict[str, str] = {}
    casts: Casts = {}
    contribution: dict[str, Any] | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        _check_casts(self.leaves, self.casts)
        if self.contribution is not None:
            try:
                owner = _checked(ContributionManifest, self.contribution)
            except pydantic.ValidationError as error:
                raise ValueError(f"contribution.{problem(error)}") from None
            except AlteredError as error:
                raise AlteredError(f"contribution of {self.name}: {error}") from None
            for field in ("card", "statistics"):
                if getattr(owner, field) != getattr(self, field):
                    raise ValueError(f"{field} of {self.name} differs from its owner's manifest")
            if owner.leaves.keys() != self.leaves.keys():
                raise ValueError(f"leaves of {self.name} differ from its owner's manifest")
        return self

    @classmethod
    def of(cls, contribution: ContributionManifest, name: str | None = None) -> "ExpertRecord":
        """The record of a contribution; `name` is the one in the roster, by default its owner's."""
        return cls(
            name=name or contribution.name,
            leaves=contribution.leaves,
            card=contribution.card,
            statistics=contribution.statistics,
            casts=contribution.casts,
            contribution=contribution.document(),
        )

    @property
    def digest(self) -> str:
        """Of what its owner published: of the owner's manifest, or of the leaves where it came without one."""
        return self.contribution["digest"] if self.contribution else combined_digest(self.leaves)

    @property
    def stored(self) -> dict[str, str]:
        """{leaf: digest of what is stored}."""
        return stored_digests(self.leaves, self.casts)

    @property
    def owner_name(self) -> str:
        """The name that its owner gave it; another one in the roster is an alias."""
        return self.contribution["name"] if self.contribution else self.name


class Tuning(_Record):
    """What was trained after a merge.

    Attributes:
      leaves: paths of the trained leaves.
      merged_router: {expert: {leaf: digest}} of the router as it was published and merged (`merged_router/`).
      card: the data card of that training.
      casts: {expert: casts} of the router as it was merged.
    """

    leaves: list[str]
    merged_router: dict[str, dict[str, str]]
    card: dict[str, Any] = {}
    casts: dict[str, Casts] = {}

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        for name, casts in self.casts.items():
            _check_casts(self.merged_router.get(name, {}), casts)
        return self


class ModelManifest(_Record):
    """A model, or an anchor, which is a model of one expert (`model.json`).

    Attributes:
      architecture: the fields of `model.architecture.Architecture`.
      experts: the roster, the anchor first, then by name.
      shared: {path: digest} of the leaves that all experts share.
      top_k: how many experts compute each token (all of them, where the roster is shorter).
      tokenizer_digest: digest of the `tokenizer.json` it was trained with.
      eos_id: the token that ends a document.
      tuned: what was trained after the merge; None: nothing.
      casts: of the shared leaves that are stored in another dtype than they were published in.
      method: how the experts were combined (`combine.merge.METHODS`).
      selection: what chooses experts (`model.selectors.SELECTIONS`).
      combined: the experts that went into such a method, where they are no longer in the roster.
    """

    format: Literal[2] = FORMAT
    kind: Literal["model"] = "model"
    architecture: dict[str, bool | int | float | str]
    experts: list[ExpertRecord]
    shared: dict[str, str]
    top_k: Annotated[int, Field(ge=1)]
    tokenizer_digest: str
    eos_id: int
    tuned: Tuning | None = None
    casts: Casts = {}
    method: str = STACK
    selection: str = BY_ROUTER
    combined: list[ExpertRecord] = []

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        names = self.roster
        if names[:1] != [ANCHOR_NAME] or len(set(names)) < len(names) or not all(map(is_expert_name, names[1:])):
            raise ValueError(f"a roster of {names}")
        _check_casts(self.shared, self.casts)
        if self.tuned and not set(names) <= self.tuned.merged_router.keys():
            raise ValueError("tuned.merged_router lacks an expert of the roster")
        trained = {digest_name(path) for path in self.tuned.leaves} if self.tuned else set()
        for expert in self.experts:
            published = expert.contribution["leaves"] if expert.contribution else expert.leaves
            changed = {leaf for leaf, digest in expert.leaves.items() if published[leaf] != digest}
            if not changed <= trained:
                raise ValueError(f"{min(changed - trained)} of {expert.name} differs from its owner's manifest")
        return self

    def document(self) -> dict[str, Any]:
        """The manifest as JSON."""
        document = {
            "format": self.format,
            "kind": self.kind,
            "method": self.method,
            "anchor_digest": self.anchor_digest,
            "architecture": self.architecture,
            "experts": [e.model_dump(exclude_defaults=True) | {"digest": e.digest} for e in self.experts],
            "shared": self.shared,
            "top_k": self.top_k,
            "tokenizer_digest": self.tokenizer_digest,
            "eos_id": self.eos_id,
            "tuned": self.tuned and self.tuned.model_dump(exclude_defaults=True),
        }
        rest = self.model_dump(include={"casts", "combined", "selection"}, exclude_defaults=True)
        return {**document, **rest, "digest": document_digest({**document, **rest})}

    @property
    def roster(self) -> list[str]:
        """The names of the experts, the anchor first."""
        return [expert.name for expert in self.experts]

    @property
    def stored(self) -> dict[str, dict[str, str]]:
        """{expert: {leaf: digest of what is stored}}, and under "" the shared leaves'."""
        return {"": stored_digests(self.shared, self.casts), **{e.name: e.stored for e in self.experts}}

    @property
    def content_digest(self) -> str:
        """Of all parameters as they are stored, whatever the path of the directory."""
        shared, *experts = self.stored.values()
        return combined_digest({**shared, **dict(zip(self.roster, map(combined_digest, experts), strict=True))})

    @property
    def merged_router(self) -> dict[str, dict[str, str]]:
        """{expert: {leaf: digest}} of the router as it was published and merged, whatever was trained since."""
        if self.tuned:
            return {name: self.tuned.merged_router[name] for name in self.roster}
        return {e.name: _only_router(e.leaves) for e in self.experts}

    @property
    def merged_router_casts(self) -> dict[str, Casts]:
        """{expert: casts} of the router as merged; an expert without any has no entry."""
        casts = self.tuned.casts if self.tuned else {e.name: _only_router(e.casts) for e in self.experts}
        return {name: casts[name] for name in self.roster if casts.get(name)}

    def tuned_in(self, leaves: Iterable[str], card: Mapping[str, Any] | None = None) -> Tuning:
        """What `tuned` is when these leaves were trained since the merge; `card` of the data, by default as it was."""
        before = self.tuned.card if self.tuned else {}
        return Tuning(
            leaves=sorted(leaves),
            merged_router=self.merged_router,
            card=before if card is None else dict(card),
            casts=self.merged_router_casts,
        )

    @property
    def stored_router(self) -> dict[str, dict[str, str]]:
        """{expert: {leaf: digest of what is stored}} of the router as merged."""
        casts = self.merged_router_casts
        return {name: stored_digests(leaves, casts.get(name, {})) for name, leaves in self.merged_router.items()}

    @property
    def context_length(self) -> int:
        """Tokens that the model sees at once, at most: a sequence of the anchor's training, or `DEFAULT_LENGTH`."""
        length = self.experts[0].card.get("sequence_length")
        return length if type(length) is int and length > 0 else DEFAULT_LENGTH

    @property
    def anchor_digest(self) -> str:
        """The digest that contributions name: of all leaves of the anchor they were trained against.

        A router tuned after the merge does not change it, nor does a cast; training the shared leaves does, as that
        anchor is gone.
        """
        leaves = self.experts[0].leaves | self.merged_router[ANCHOR_NAME]
        anchor = {f"{ANCHOR_NAME}/{leaf}": digest for leaf, digest in leaves.items()}
        return combined_digest(without_selector(self.shared) | anchor)


Manifest = TypeVar("Manifest", ModelManifest, ContributionManifest)


def write_manifest(file: epath.Path, manifest: ModelManifest | ContributionManifest) -> None:
    """Writes a manifest; once it is there, its directory is complete."""
    commit(file, manifest.document())


def read_manifest(kind: type[Manifest], file: epath.Path) -> Manifest:
    """Reads a manifest.

    Raises:
      UserError: it is damaged, altered, or of another format; one line names the file and the field.
    """
    try:
        document = json.loads(file.read_text(), parse_constant=_refuse_constant)
        version = document.get("format") if isinstance(document, dict) else None
        if type(version) is int and version != FORMAT:
            convert = f"convert it: flexolmo convert --source={file.parent} --out=DIR"
            remedy = convert if version == 1 else f"this version reads format {FORMAT}"
            raise UserError(f"{file}: format {version}; {remedy}")
        if version is None:
            raise _damaged(file, "format: missing")
        return _checked(kind, document)
    except pydantic.ValidationError as error:
        raise _damaged(file, problem(error)) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(file, first_line(error)) from None
    except AlteredError as error:
        raise UserError(f"{file}: altered ({error}); copy the directory again from its source") from None


class AlteredError(Exception):
    """A manifest has not the digest that it names."""


def _checked(kind: type[Manifest], document: Mapping[str, Any]) -> Manifest:
    """A document as a manifest; raises pydantic.ValidationError or AlteredError."""
    manifest = kind.model_validate({key: value for key, value in document.items() if key != "digest"})
    found, named = document_digest(document), str(document.get("digest"))
    if named != found:
        raise AlteredError(f"its digest is {found[:12]}, the manifest says {named[:12]}")
    return manifest


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def problem(error: pydantic.ValidationError) -> str:
    """The first field that is wrong, and why."""
    first = error.errors(include_url=False, include_context=False)[0]
    field, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return f"{field}: {reason}" if field else reason


def _only_router(values: Mapping[str, Any]) -> dict[str, Any]:
    return {leaf: value for leaf, value in values.items() if is_router_leaf(leaf)}


def _damaged(file: epath.Path, reason: str) -> UserError:
    return UserError(f"{file}: damaged ({' '.join(reason.split())}); copy the directory again from its source")
