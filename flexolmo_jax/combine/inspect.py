"""What a directory is, and whether its content is what its manifest says."""

import collections
import functools
import math
from collections.abc import Mapping
from typing import Any

from etils import epath
from rich.table import Table
from rich.text import Text

from flexolmo_jax.checkpoint import model_directory
from flexolmo_jax.checkpoint.manifests import STACK, Casts, ExpertRecord, ModelManifest
from flexolmo_jax.checkpoint.model_directory import check_content, check_leaves, check_model, read_model
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.checkpoint.statistics import open_statistics
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.curation.summary import count_duplicates, length_table, samples
from flexolmo_jax.data.tokenization.tokenizer import load_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.privacy import CARD_KEY, privacy_words
from flexolmo_jax.model.selectors import SELECTORS
from flexolmo_jax.tables import printable


def describe(path: epath.PathLike, check: bool, num_samples: int = 0) -> tuple[dict[str, Any], Table]:
    """Reads a directory's manifest and, with `check`, all of its content.

    Args:
      path: a model, a contribution or a corpus.
      check: whether to read everything, and compare it with the digests.
      num_samples: of documents of a corpus to show.

    Returns:
      ({fact: value} of the whole, a table of the experts, or of the lengths of a corpus's documents).

    Raises:
      UserError: not one of our directories, or its content is not what its manifest says.
    """
    if not epath.Path(path).is_dir():
        state = "is a file" if epath.Path(path).exists() else "no such directory"
        raise UserError(f"{path}: {state}; give a model, a contribution or a corpus directory")
    kind = model_directory.kind_of(path)
    if kind is None:
        raise UserError(f"{path}: neither a model, a contribution nor a corpus; give one of these directories")
    corpus = functools.partial(_corpus, num_samples=num_samples)
    facts, table = {"model": _model, "contribution": _contribution, "corpus": corpus}[kind](path, check)
    return {"directory": f"{path}: a {kind}", **facts, "digests": "hold" if check else "not checked"}, table


def _model(path: epath.PathLike, check: bool) -> tuple[dict[str, Any], Table]:
    manifest = read_model(path, strict=True)
    shared, experts = model_directory.open_model(path, manifest)
    statistics = open_statistics(path, manifest)
    if check:
        check_model(manifest, shared, experts)
        check_content(statistics, {expert.name: expert.statistics for expert in manifest.experts})
        _check_other_files(epath.Path(path), manifest)
    facts = {
        **({} if manifest.method == STACK else {"method": manifest.method}),
        "architecture": _architecture(manifest.architecture),
        "anchor digest": manifest.anchor_digest,
        "shared leaves": f"{_parameters(shared):,} parameters",
        "dtype": _dtypes({"": shared, **experts}),
        **_casts([(expert.name, expert.casts) for expert in manifest.experts], manifest.casts),
        **_statistics(statistics, {expert.name: expert.card for expert in manifest.experts}),
        "experts per token": f"{min(manifest.top_k, len(manifest.experts))} of {len(manifest.experts)}",
        "tuned since": ", ".join(manifest.tuned.leaves) if manifest.tuned else "nothing",
    }
    members = [(expert, experts[expert.name]) for expert in manifest.experts]
    return facts, _roster([*members, *((expert, {}) for expert in manifest.combined)])


def _check_other_files(path: epath.Path, manifest: ModelManifest) -> None:
    """Checks what lies beside a model's parameters: tokenizer, merged router, public sample."""
    tokenizer = path / model_directory.TOKENIZER_FILE
    if tokenizer.exists() and load_tokenizer(tokenizer, eos_id=manifest.eos_id).digest != manifest.tokenizer_digest:
        raise UserError(f"{tokenizer}: not the tokenizer that the model was trained with; copy it again")
    if manifest.tuned:
        check_content(model_directory.open_merged_router(path, manifest), manifest.stored_router)
    if (path / model_directory.PUBLIC).exists():
        Corpus.open(path / model_directory.PUBLIC).verify()


def _contribution(path: epath.PathLike, check: bool) -> tuple[dict[str, Any], Table]:
    manifest = model_directory.read_contribution(path, strict=True)
    leaves = {leaf: Slice(s, None, f"{path}: leaf {leaf}") for leaf, s in model_directory.open_params(path).items()}
    check_leaves(leaves, manifest.leaves, str(path))
    statistics = open_statistics(path, manifest)
    if check:
        check_content({"expert": leaves}, {"expert": manifest.stored})
        check_content(statistics, {manifest.name: manifest.statistics})
    facts = {
        "manifest digest": manifest.digest,
        "architecture": _architecture(manifest.architecture),
        "anchor digest": manifest.anchor_digest,
        "dtype": _dtypes({"expert": leaves}),
        **_casts([(manifest.name, manifest.casts)]),
        **_statistics(statistics, {manifest.name: manifest.card}),
    }
    return facts, _roster([(ExpertRecord.of(manifest), leaves)])


def _corpus(path: epath.PathLike, check: bool, num_samples: int) -> tuple[dict[str, Any], Table]:
    corpus = Corpus.open(path)
    facts = {
        "documents": f"{corpus.documents:,}",
        "tokens": f"{corpus.tokens:,} ({corpus.dtype.name}, in {len(corpus.files):,} files)",
        "bytes of text": f"{corpus.bytes:,}",
        "tokenizer digest": corpus.tokenizer_digest,
        **_corpus_card(corpus.card),
    }
    if check:
        corpus.verify()
        corpus.refuse_ids()
        duplicates = count_duplicates(corpus)
        facts["exact duplicates"] = f"{duplicates:,} ({duplicates / corpus.documents:.2%} of documents)"
    return facts | samples(corpus, num_samples), length_table(corpus)


def _corpus_card(card: Mapping[str, Any]) -> dict[str, str]:
    """Lines for what corpus.json says of the origin of documents, and of what was left out."""
    facts = {"license": str(card["license"])} if card.get("license") else {}
    if "sources" in card:
        names = ", ".join(file["file"] for file in card["sources"]["files"][:3])
        more = card["sources"]["count"] - 3
        facts["input files"] = f"{card['sources']['count']:,}: {names}" + (f" and {more:,} more" if more > 0 else "")
    if "split" in card:
        shares = ", ".join(f"{name} {share}" for name, share in card["split"]["shares"].items())
        facts["split"] = f"{card['split']['name']} (of {shares}; key {card['split']['key']!r})"
    if card.get("dropped"):
        facts["left out"] = ", ".join(f"{reason}: {count:,}" for reason, count in card["dropped"].items())
    return facts


def _roster(members: list[tuple[ExpertRecord, Mapping[str, Slice]]]) -> Table:
    table = Table("expert", "digest", "parameters", "trained tokens", "data")
    for expert, leaves in members:
        card = expert.card
        tokens = card.get("trained_tokens")
        trained = f"{tokens:,}" if isinstance(tokens, int) else "-"
        words = "; ".join(printable(card[key]) for key in ("description", "license") if card.get(key)) or "-"
        # Text: what an owner wrote is no markup.
        table.add_row(Text(full_name(expert)), expert.digest[:12], f"{_parameters(leaves):,}", trained, Text(words))
    return table


def full_name(expert: ExpertRecord) -> str:
    """The name in the roster, and its owner's where that is another."""
    return expert.name if expert.owner_name == expert.name else f"{expert.name} (its owner's {expert.owner_name})"


def _dtypes(groups: Mapping[str, Mapping[str, Slice]]) -> str:
    """The dtypes of leaves, the most frequent first, and how many have each where there are several."""
    counts = collections.Counter(part.dtype.name for leaves in groups.values() for part in leaves.values())
    return ", ".join(f"{name} ({n} leaves)" if len(counts) > 1 else name for name, n in counts.most_common())


def _casts(experts: list[tuple[str, Casts]], shared: Casts | None = None) -> dict[str, str]:
    """A line where leaves are stored in another dtype than they were published in."""
    groups = [*experts, ("shared", shared or {})]
    counts = collections.Counter((name, " to ".join(c.dtypes)) for name, casts in groups for c in casts.values())
    lines = "; ".join(f"{name}: {n} leaves from {dtypes}" for (name, dtypes), n in counts.items())
    return {"cast": lines} if lines else {}


def _statistics(
    statistics: Mapping[str, Mapping[str, Slice]], cards: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Lines where experts have statistics: their leaves, what these reveal, and how private they are."""
    with_some = {name: leaves for name, leaves in statistics.items() if leaves}
    if not with_some:
        return {}
    found = {leaf.split("/")[0] for leaves in with_some.values() for leaf in leaves}
    reveals = "; ".join(selector.reveals for name, selector in SELECTORS.items() if name in found)
    return {
        "statistics": "; ".join(f"{name}: {', '.join(leaves)}" for name, leaves in with_some.items()),
        **({"they reveal": reveals} if reveals else {}),
        "their privacy": "; ".join(f"{name}: {privacy_words(cards[name].get(CARD_KEY))}" for name in with_some),
    }


def _parameters(leaves: Mapping[str, Slice]) -> int:
    return sum(math.prod(part.shape) for part in leaves.values())


def _architecture(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())
