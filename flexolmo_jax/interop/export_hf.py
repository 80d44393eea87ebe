"""To Hugging Face: an anchor becomes a dense model, a merged model a mixture, an anchor with a contribution a pair.

What is written is what `AutoModelForCausalLM.from_pretrained` and vLLM load. Tensors are written one at a time, and the
finished directory is read back: mapped to our leaves again, it must have the digests of the manifest.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from flexolmo_jax.checkpoint import model_directory
from flexolmo_jax.checkpoint.atomic import atomic_directory
from flexolmo_jax.checkpoint.casts import cast_router, cast_slices, with_digests
from flexolmo_jax.checkpoint.copying import digest_slice
from flexolmo_jax.checkpoint.manifests import (
    BY_ROUTER,
    MOE,
    ModelManifest,
    digest_name,
    is_router_leaf,
    without_selector,
)
from flexolmo_jax.checkpoint.model_directory import open_merged_router, open_model, size
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.checkpoint.statistics import open_statistics
from flexolmo_jax.combine.merge import gather
from flexolmo_jax.combine.stack import stack
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.tokenization.tokenizer import load_tokenizer
from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.interop import architectures, card, parity
from flexolmo_jax.interop.architectures import FLEX_OLMO_SELECTOR, HuggingFaceArchitecture
from flexolmo_jax.interop.config import CONFIG_FILE
from flexolmo_jax.interop.hf_directory import (
    FOLDER,
    copy_certificate_and_sample,
    export_tokenizer,
    open_directory,
    open_sidecar,
    same_bytes,
    write_sidecar,
)
from flexolmo_jax.interop.safetensors_io import write_tensors
from flexolmo_jax.interop.tensors import ROUTER_BIAS, Tensor, each_tensor, tensor_dtype, tensor_values
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.model.selectors import NgramSelector, read_derived
from flexolmo_jax.paths import is_remote
from flexolmo_jax.progress import byte_progress

SAMPLE_TEXT = (
    "An anchor is trained on public text. Each owner of closed text trains one expert on it, in private, and ships the "
    "expert alone. A coordinator merges the experts into one model, and any owner may leave it again, at any time."
)


class Source(NamedTuple):
    """What is exported.

    Attributes:
      path: the model directory, or the anchor's of a pair: where the tokenizer is.
      label: names it in errors.
      manifest: of the model, or of the merge of the pair.
      shared: its shared leaves.
      experts: {expert: {leaf: slice}}.
      statistics: {expert: {leaf: slice}}.
      derived: its selector's leaves, {path: float32}, which are derived from the statistics; none in a pair.
      merged_router: of a model that was changed after its merge, what `model_directory.open_merged_router` gives.
      pair: whether `path` is only the anchor's, so that its certificate and public sample are not exported.
    """

    path: epath.Path
    label: str
    manifest: ModelManifest
    shared: dict[str, Slice]
    experts: dict[str, dict[str, Slice]]
    statistics: dict[str, dict[str, Slice]]
    derived: dict[str, np.ndarray]
    merged_router: dict[str, dict[str, Slice]] | None = None
    pair: bool = False


def open_source(model: epath.PathLike, dtype: str | None = None) -> Source:
    """Opens an anchor or a model directory, to be exported in `dtype`, by default as it is.

    Raises:
      UserError: it is no such directory or damaged, or a value is too large for `dtype`.
    """
    manifest = model_directory.read_model(model, strict=True)
    slices = cast_slices(manifest, *open_model(model, manifest), dtype)
    router = None
    if manifest.tuned:
        router = open_merged_router(model, manifest)
        manifest, router = cast_router(manifest, router, dtype)
    statistics = open_statistics(model, manifest)
    derived = read_derived(manifest, statistics, str(model))
    return _resolved(Source(epath.Path(model), str(model), manifest, *slices, statistics, derived, router))


def open_pair(contribution: epath.PathLike, anchor: epath.PathLike, dtype: str | None = None) -> Source:
    """Opens an anchor and a contribution as the model that their merge would be.

    Raises:
      UserError: either is damaged, the contribution was made on another anchor, or a value is too large for its dtype.
    """
    inputs = gather(anchor, [contribution], 2, dtype, BY_ROUTER)
    statistics = {member.expert.name: member.statistics for member in inputs.members}
    return _resolved(Source(epath.Path(anchor), str(contribution), *stack(inputs), statistics, {}, pair=True))


def _resolved(source: Source) -> Source:
    """The same with a manifest that records the casts; reads the leaves that are cast, and checks them."""
    groups = {"": source.shared, **source.experts}
    cast = {name: {leaf: part for leaf, part in leaves.items() if part.cast} for name, leaves in groups.items()}
    found = {name: dict(digests) for name, digests in source.manifest.stored.items()}
    with byte_progress("cast", sum(map(size, cast.values()))) as advance:
        for name, leaves in cast.items():
            for leaf, part in leaves.items():
                found[name][leaf] = digest_slice(part, digest_name(leaf))
                advance(part.nbytes)
    return source._replace(manifest=with_digests(source.manifest, groups, found))


def export(
    source: Source,
    out: epath.PathLike,
    shard_bytes: int = 5 * 10**9,
    drop_bias: bool = False,
    model_type: str | None = None,
    drop_selector: bool = False,
    keep_selector: bool = False,
) -> list[str]:
    """Makes a Hugging Face directory.

    Args:
      source: what `open_source` or `open_pair` opened.
      out: local directory to make.
      shard_bytes: of tensors in a file at most.
      drop_bias: leave out expert biases, for which Hugging Face's form has no place, and measure what that changes.
      model_type: a key of `architectures.ARCHITECTURES`; by default that of the first which fits the model.
      drop_selector: leave out the selector, for which the published form has no place either, so that the router alone
        chooses experts, and measure what that changes.
      keep_selector: write the form that has a place for it, and for biases, which transformers loads with the code that
        lies beside the weights; the same as `model_type` "flex_olmo_selector".

    Returns:
      Lines that say what was found.

    Raises:
      UserError: there is a selector, or biases are not zero, and they are neither kept nor to be dropped, or the memory
        is too small to measure what that changes, a selector is to be kept and there is none, the source is not what
        its manifest says, the parity gate fails, or `out` exists.
    """
    if is_remote(out):
        raise UserError(f"{out}: must be a local directory; copy it to its place afterwards")
    architecture = Architecture.from_dict(source.manifest.architecture, source.label)
    if keep_selector:
        model_type = _keeping_model_type(model_type, drop_selector)
    kind = architectures.choose(architecture, len(source.experts), source.label, model_type)
    selection, biased = source.manifest.selection, _biased_experts(source)
    if kind.has_selector and not source.derived:
        raise UserError(f"{source.label}: has no selector to keep; export it without keep_selector")
    is_dropped = selection != BY_ROUTER and not kind.has_selector
    if is_dropped and not drop_selector:
        raise UserError(
            f"{source.label}: the published form has no place for the selection '{selection}'; keep_selector writes a "
            "form with code of its own that has, drop_selector leaves experts to the router and measures what changes"
        )
    if ROUTER_BIAS in kind.names.of_expert(architecture):
        biased = []
    if biased and not drop_bias:
        raise UserError(
            f"{source.label}: Hugging Face's form has no place for the bias of {', '.join(biased)}; drop_bias "
            "leaves it out and measures how the logits change"
        )
    with atomic_directory(out) as directory:
        dropped: dict[str, dict[str, parity.Difference]] = {}
        for what, is_there, without in (
            (f"the selection '{selection}'", is_dropped, _without_selector),
            (f"the biases of {', '.join(biased)}", bool(biased), _without_bias),
        ):
            if is_there:
                before, source = source, without(source)
                dropped[what] = _measure_dropping(before, source)
        manifest = source.manifest
        table = _table(kind, manifest)
        placed = {key.leaf for tensor in table.values() for key in tensor.leaves}
        unplaced = {
            name: {leaf: part for leaf, part in leaves.items() if leaf not in placed}
            for name, leaves in source.experts.items()
        }
        write_sidecar(directory, manifest, unplaced, source.merged_router, source.statistics)
        if not source.pair:
            copy_certificate_and_sample(source.path, directory / FOLDER)
        files = _write_weights(directory, table, source, kind, shard_bytes)
        document = _config_document(kind, manifest, source.shared["embedding"].dtype)
        (directory / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n")
        if kind.modeling:
            code = resources.files("flexolmo_jax.interop").joinpath(f"{kind.modeling}.py")
            (directory / f"{kind.modeling}.py").write_bytes(code.read_bytes())
        has_tokenizer = export_tokenizer(source.path, directory, manifest)
        gate = _check(directory, source, kind)
        flags = [
            *(["keep_selector"] if kind.has_selector else []),
            *(["drop_selector"] if is_dropped else []),
            *(["drop_bias"] if biased else []),
        ]
        page = card.model_card(
            manifest,
            kind,
            parameters=_sizes(source),
            gate=gate,
            dropped=dropped,
            has_tokenizer=has_tokenizer,
            flags=flags,
        )
        (directory / card.CARD_FILE).write_text(page)
    lines = [f"without {what}, on {text}: {d}" for what, changes in dropped.items() for text, d in changes.items()]
    if not has_tokenizer:
        lines.append("no tokenizer.json: the directory takes and gives token ids only")
    content = f"{len(source.experts)} experts" if len(source.experts) > 1 else "an anchor"
    return [f"{out}: {content}, {len(files)} file{'s' * (len(files) > 1)} of weights", *lines, *gate.lines()]


def _keeping_model_type(model_type: str | None, drop_selector: bool) -> str:
    """The form with a place for a selector, unless other arguments say otherwise."""
    if drop_selector:
        raise ArgumentError("keep_selector", True, "drop_selector leaves it out; give one of the two")
    if model_type not in (None, FLEX_OLMO_SELECTOR.model_type):
        problem = f"has no place for a selector; leave it out, or give {FLEX_OLMO_SELECTOR.model_type}"
        raise ArgumentError("model_type", model_type, problem)
    return FLEX_OLMO_SELECTOR.model_type


def _biased_experts(source: Source) -> list[str]:
    """Experts of a merged model whose bias is not zero; an anchor alone always has weight 1."""
    if len(source.experts) == 1:
        return []
    biases = {name: leaves[ROUTER_BIAS].read((slice(None),)) for name, leaves in source.experts.items()}
    return [name for name, bias in biases.items() if np.any(bias != 0)]


def _without_bias(source: Source) -> Source:
    """The same with biases of zero: a change after the merge, so that the router as merged is kept beside."""
    experts, roster = {}, []
    for expert in source.manifest.experts:
        old = source.experts[expert.name][ROUTER_BIAS]
        zeros = Slice(np.zeros(old.shape, old.dtype), None, old.name)
        experts[expert.name] = {**source.experts[expert.name], ROUTER_BIAS: zeros}
        digests = {**expert.leaves, ROUTER_BIAS: digest_slice(zeros, ROUTER_BIAS)}
        casts = {leaf: cast for leaf, cast in expert.casts.items() if leaf != ROUTER_BIAS}
        roster.append(expert.but(leaves=digests, casts=casts))
    before = source.manifest.tuned
    trained = {*(before.leaves if before else ()), MOE + "experts/" + ROUTER_BIAS}
    tuned = source.manifest.tuned_in(trained, None if before else {"description": "expert biases were left out"})
    merged_router = source.merged_router or {
        name: {leaf: part for leaf, part in leaves.items() if is_router_leaf(leaf)}
        for name, leaves in source.experts.items()
    }
    manifest = source.manifest.but(experts=roster, tuned=tuned)
    return source._replace(manifest=manifest, experts=experts, merged_router=merged_router)


def _without_selector(source: Source) -> Source:
    """The same with the router alone to choose experts; statistics stay beside."""
    manifest, tuned = source.manifest, source.manifest.tuned
    if tuned:
        tuned = tuned.but(leaves=[leaf for leaf in tuned.leaves if leaf in without_selector({leaf: None})])
    manifest = manifest.but(selection=BY_ROUTER, shared=without_selector(manifest.shared), tuned=tuned)
    return source._replace(manifest=manifest, shared=without_selector(source.shared), derived={})


def _measure_dropping(before: Source, after: Source) -> dict[str, parity.Difference]:
    """{sample: how far the logits move from one source to the other}; one of them is in memory at a time."""
    reason = parity.too_large(before.shared, before.experts)
    if reason:
        problem = f"measuring what it changes {reason}; export on a machine with more memory"
        raise ArgumentError("drop_bias" if before.manifest.selection == BY_ROUTER else "drop_selector", True, problem)
    samples, logits = _samples(before), []
    for source in (before, after):
        model = parity.in_memory(source.manifest, source.shared, source.experts, source.derived)
        logits.append({name: parity.our_logits(model, tokens) for name, tokens in samples.items()})
        del model
    return {name: parity.compare(*(found[name] for found in logits)) for name in samples}


def _samples(source: Source) -> dict[str, np.ndarray]:
    """{name: token ids [BATCH, LENGTH]}: random ones, and text: the model's public sample, or `SAMPLE_TEXT`."""
    samples = {"random tokens": parity.random_tokens(int(source.manifest.architecture["vocab_size"]))}
    tokenizer = source.path / model_directory.TOKENIZER_FILE
    if (source.path / model_directory.PUBLIC).exists():
        corpus = Corpus.open(source.path / model_directory.PUBLIC)
        text, ids = "its public sample", _first_tokens(corpus)
    elif tokenizer.exists():
        encoder = load_tokenizer(tokenizer, eos_id=source.manifest.eos_id, label=str(tokenizer))
        text, ids = "text", encoder.encode(SAMPLE_TEXT)
    else:
        return samples
    if len(ids):
        samples[text] = np.resize(ids, (parity.BATCH, parity.LENGTH)).astype(np.int32)
    return samples


def _first_tokens(corpus: Corpus) -> np.ndarray:
    ids, at = np.zeros(0, np.int32), 0
    while len(ids) < parity.BATCH * parity.LENGTH and at < len(corpus):
        ids, at = np.concatenate([ids, corpus[at].astype(np.int32)]), at + 1
    return ids


def _write_weights(
    directory: epath.Path,
    table: Mapping[str, Tensor],
    source: Source,
    kind: HuggingFaceArchitecture,
    shard_bytes: int,
) -> list[str]:
    experts = list(source.experts.values())
    tensors = {name: (tensor.shape, tensor_dtype(tensor, source.shared, experts)) for name, tensor in table.items()}
    derived = {name: source.derived[leaf] for leaf, name in kind.names.derived.items()}
    tensors |= {name: (values.shape, values.dtype) for name, values in derived.items()}

    def values(name: str) -> np.ndarray:
        return derived[name] if name in derived else tensor_values(table[name], source.shared, experts)

    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    with byte_progress("export", total) as advance:
        return write_tensors(
            pathlib.Path(directory),
            tensors,
            values,
            shard_bytes,
            advance,
        )


def _table(kind: HuggingFaceArchitecture, manifest: ModelManifest) -> dict[str, Tensor]:
    architecture = Architecture.from_dict(manifest.architecture, "the model")
    return dict(each_tensor(kind.names, architecture, len(manifest.experts) if kind.is_mixture else None))


def _config_document(kind: HuggingFaceArchitecture, manifest: ModelManifest, dtype: np.dtype) -> dict[str, Any]:
    """The `config.json` of a model; `dtype` is that of the weights."""
    architecture = Architecture.from_dict(manifest.architecture, "the model")
    config = kind.config.of(
        architecture,
        num_experts=len(manifest.experts),
        top_k=min(manifest.top_k, len(manifest.experts)),
        max_length=manifest.context_length,
        eos_ids=(manifest.eos_id,),
        selection=manifest.selection,
        order=NgramSelector().order(architecture),
    )
    return kind.header() | config.document() | {"dtype": dtype.name}


def _check(directory: epath.Path, source: Source, kind: HuggingFaceArchitecture) -> parity.Parity:
    """The parity gate: maps the finished directory back, and compares it with the manifest."""
    path, manifest = pathlib.Path(directory), source.manifest
    opened = open_directory(path, label=source.label)
    sidecar = open_sidecar(opened)
    if sidecar is None:
        raise UserError(f"{directory}: lost the folder that it was written with; is another program at work there?")
    with byte_progress("compare", size(source.shared) + sum(map(size, source.experts.values()))) as advance:
        _check_leaves(opened.shared, manifest.stored[""], advance)
        for expert, leaves in zip(manifest.experts, opened.experts, strict=True):
            _check_leaves(leaves | sidecar.leaves[expert.name], expert.stored, advance)
    for leaf, stored in opened.derived.items():
        if not same_bytes(stored.read(), source.derived[leaf]):
            raise UserError(f"{directory}: {kind.names.derived[leaf]} is not what was written; is the disk damaged?")
    difference = parity.compare_logits(path, manifest, source.shared, source.experts, kind, source.derived)
    return parity.Parity(len(opened.table), difference)


def _check_leaves(leaves: Mapping[str, Slice], digests: Mapping[str, str], advance) -> None:
    if leaves.keys() != digests.keys():
        raise UserError(f"leaf {min(leaves.keys() ^ digests.keys())} has no place in Hugging Face's form")
    for leaf, part in leaves.items():
        digest_slice(part._replace(digest=digests[leaf]), digest_name(leaf))
        advance(size({leaf: part}))


def _sizes(source: Source) -> dict[str, int]:
    """{expert: its parameters}, and under "" those that all share."""

    def count(leaves):
        return sum(math.prod(part.shape) for part in leaves.values())

    return {"": count(source.shared), **{name: count(leaves) for name, leaves in source.experts.items()}}
