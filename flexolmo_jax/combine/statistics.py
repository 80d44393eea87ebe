"""Statistics for a contribution or an anchor that has none, from the corpora that it was trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from flexolmo_jax.checkpoint.manifests import ANCHOR_NAME, ModelManifest
from flexolmo_jax.checkpoint.model_directory import (
    PUBLIC,
    copy_files,
    copy_tokenizer,
    kind_of,
    open_model,
    open_params,
    read_contribution,
    write_contribution,
    write_model,
)
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.combine.merge import read_anchor
from flexolmo_jax.data.corpus import Corpus, verify_corpora
from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.model.privacy import CARD_KEY, Privacy, make_privacy
from flexolmo_jax.model.selectors import SELECTORS
from flexolmo_jax.training.statistics import collect_statistics


def add_statistics(
    source: epath.PathLike,
    data: Sequence[epath.PathLike],
    out: epath.PathLike,
    selector: str = "ngram",
    epsilon: float = 0.0,
    delta: float = 1e-6,
    clip: float = 8.0,
) -> None:
    """Makes a copy of a contribution or an anchor that has statistics of corpora, in place of others.

    A contribution's manifest is made anew, so it is its owner who runs this.

    Args:
      source: contribution directory, or model directory of an anchor.
      data: corpus directories, at least one: all that it was trained on, but for public ones of an owner.
      out: the directory to make.
      selector: a name in `SELECTORS`.
      epsilon: of differential privacy for the statistics (`model.privacy`); 0: they are exact.
      delta: of differential privacy.
      clip: L2 norm to which the counts of a document are scaled down, with an epsilon.

    Raises:
      ArgumentError: no such selector, or a value out of its bounds.
      UserError: an input is damaged, a corpus has another tokenizer or other documents than the data card says, the
        source is a merged model, or `out` exists.
    """
    if selector not in SELECTORS:
        raise ArgumentError("selector", selector, f"no such selector; use one of {', '.join(SELECTORS)}")
    source, corpora = epath.Path(source), [Corpus.open(path) for path in data]
    if kind_of(source) == "contribution":
        manifest = read_contribution(source, strict=True)
        leaves = {leaf: Slice(part, None, f"{source}: leaf {leaf}") for leaf, part in open_params(source).items()}
        privacy = _privacy(source, manifest.card, corpora, epsilon, delta, clip)
        statistics = _collect(source, manifest.architecture, corpora, selector, privacy)
        manifest = manifest.but(statistics={}, card=_card(manifest.card, privacy))
        write_contribution(out, manifest, leaves, statistics=statistics)
        return
    manifest = read_anchor(source)
    for corpus in corpora:
        if corpus.tokenizer_digest != manifest.tokenizer_digest:
            raise UserError(f"{corpus.path}: its tokenizer is not that of {source}; give a corpus made with that one")
    anchor = manifest.experts[0]
    privacy = _privacy(source, anchor.card, corpora, epsilon, delta, clip)
    statistics = _collect(source, manifest.architecture, corpora, selector, privacy)
    shared, experts = open_model(source, manifest)

    def complete(directory: epath.Path, _: ModelManifest) -> None:
        copy_tokenizer(source, directory)
        copy_files(source / PUBLIC, directory / PUBLIC)

    manifest = manifest.but(experts=[anchor.but(statistics={}, card=_card(anchor.card, privacy))])
    write_model(out, manifest, shared, experts, statistics={ANCHOR_NAME: statistics}, complete=complete)


def _privacy(
    source: epath.Path, card: Mapping[str, Any], corpora: Sequence[Corpus], epsilon: float, delta: float, clip: float
) -> Privacy | None:
    """The privacy of statistics of corpora that have as many documents as the data card says."""
    documents, found = card.get("documents"), sum(map(len, corpora))
    if isinstance(documents, int) and found != documents:
        problem = f"was trained on {documents} documents, and the corpora have {found}; give all that it was trained on"
        raise UserError(f"{source}: {problem}")
    return make_privacy(epsilon, delta, clip, found)


def _card(card: Mapping[str, Any], privacy: Privacy | None) -> dict[str, Any]:
    """A data card with the privacy of new statistics, in place of that of others."""
    rest = {key: value for key, value in card.items() if key != CARD_KEY}
    return {**rest, CARD_KEY: privacy.card()} if privacy else rest


def _collect(
    source: epath.Path,
    architecture: Mapping[str, Any],
    corpora: Sequence[Corpus],
    selector: str,
    privacy: Privacy | None,
) -> dict[str, Slice]:
    """The statistics of corpora that fit the source, {leaf: slice}."""
    sizes, used = Architecture.from_dict(architecture, str(source)), max(corpus.vocab_size for corpus in corpora)
    if used > sizes.vocab_size:
        raise UserError(f"{source}: has {sizes.vocab_size} token ids, and the corpora {used}; use its own tokenizer")
    verify_corpora(corpora)
    return collect_statistics(SELECTORS[selector], corpora, sizes, privacy)
