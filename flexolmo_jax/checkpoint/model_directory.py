"""Model and contribution directories (docs/formats.md): what they hold, how they are read, checked and written."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pydantic
import tensorstore as ts
from etils import epath

from flexolmo_jax.checkpoint.atomic import atomic_directory
from flexolmo_jax.checkpoint.casts import Experts, check_digests, new_casts, with_casts
from flexolmo_jax.checkpoint.files import FILE, Content, Names, check_files, is_system_file
from flexolmo_jax.checkpoint.manifests import (
    MOE,
    Casts,
    ContributionManifest,
    Manifest,
    ModelManifest,
    digest_name,
    is_router_leaf,
    problem,
    read_manifest,
    write_manifest,
)
from flexolmo_jax.checkpoint.params import Slice, digest_slice, open_tree, write_tree
from flexolmo_jax.checkpoint.zarr import tree_content
from flexolmo_jax.errors import NotFoundError, UserError
from flexolmo_jax.progress import byte_progress, progress_bar

PARAMS = "params"
STATISTICS = "statistics"  # leaves of owners that are no parameters; in a model under EXPERT/
MERGED_ROUTER = "merged_router"  # of a model that was tuned after its merge: the router as the merge made it
MODEL_FILE = "model.json"
CONTRIBUTION_FILE = "contribution.json"
CASTS_FILE = "casts.json"  # of a contribution that was cast after its owner published it
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FOLDER = "hugging_face"  # what an imported model had beside it: settings of the tokenizer, of generation
TOKENIZER_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
CERTIFICATE_FILE = "certificate.json"  # what an opt-out guarantees
PUBLIC = "public"  # the sample of public data that came with an anchor, a corpus
CORPUS_FILE = "corpus.json"


def _corpus_content(folder: epath.Path) -> Names | None:
    try:
        files = [file["name"] for file in json.loads((folder / CORPUS_FILE).read_bytes())["files"]]
        return dict.fromkeys([CORPUS_FILE, TOKENIZER_FILE, *files], FILE)
    except (OSError, ValueError, KeyError, TypeError):
        return None


_TOKENIZER_CONTENT: dict[str, Content] = dict.fromkeys(map(str, TOKENIZER_FILES), FILE)


class Kind(NamedTuple):
    """A kind of directory: the manifest that makes it complete, and all that it may hold."""

    name: str
    manifest: str
    content: dict[str, Content]


MODEL = Kind(
    "model",
    MODEL_FILE,
    {
        MODEL_FILE: FILE,
        PARAMS: tree_content,
        STATISTICS: tree_content,
        MERGED_ROUTER: tree_content,
        TOKENIZER_FILE: FILE,
        TOKENIZER_FOLDER: _TOKENIZER_CONTENT,
        PUBLIC: _corpus_content,
        CERTIFICATE_FILE: FILE,
    },
)
CONTRIBUTION = Kind(
    "contribution",
    CONTRIBUTION_FILE,
    {CONTRIBUTION_FILE: FILE, CASTS_FILE: FILE, PARAMS: tree_content, STATISTICS: tree_content},
)


def kind_of(directory: epath.PathLike) -> str | None:
    """Returns "model", "contribution", "corpus", or None for anything else."""
    files = {MODEL.name: MODEL_FILE, CONTRIBUTION.name: CONTRIBUTION_FILE, "corpus": CORPUS_FILE}
    return next((kind for kind, file in files.items() if (epath.Path(directory) / file).exists()), None)


def read_model(directory: epath.PathLike, strict: bool = False) -> ModelManifest:
    """Reads the manifest of a model directory.

    Args:
      directory: local or remote.
      strict: whether nothing else may be in the directory, and no link may lead out of it.

    Raises:
      UserError: not a model directory, or a damaged, altered or older manifest, or what `strict` refuses.
    """
    return _read(ModelManifest, MODEL, directory, strict, str(directory))


def read_contribution(
    directory: epath.PathLike, strict: bool = False, label: str | None = None
) -> ContributionManifest:
    """Reads the manifest of a contribution directory; `label` names it in errors, otherwise as `read_model`."""
    manifest = _read(ContributionManifest, CONTRIBUTION, directory, strict, label or str(directory))
    file = epath.Path(directory) / CASTS_FILE
    if not file.exists():
        return manifest
    try:
        casts = pydantic.TypeAdapter(Casts).validate_json(file.read_bytes(), strict=True)
    except pydantic.ValidationError as error:
        raise UserError(f"{file}: damaged ({problem(error)}); copy the directory again from its source") from None
    if not casts.keys() <= manifest.leaves.keys():
        raise UserError(f"{file}: damaged (names unknown leaves); copy the directory again from its source")
    return manifest.but(casts=casts)


def _read(kind: type[Manifest], files: Kind, directory: epath.PathLike, strict: bool, label: str) -> Manifest:
    directory = epath.Path(directory)
    if not directory.exists():
        raise NotFoundError(f"{label}: no such directory; give a {files.name} directory")
    if not (directory / files.manifest).exists():
        found = kind_of(directory)
        state = f"is a {found} directory" if found else f"has no {files.manifest}"
        raise UserError(f"{label}: {state}; give a {files.name} directory")
    if strict:
        check_files(directory, files.content, label)
    if not (directory / files.manifest).is_file():
        raise UserError(f"{label}: {files.manifest} is no file; copy the directory again from its source")
    return read_manifest(kind, directory / files.manifest)


def split_experts(
    tree: Mapping[str, Any], roster: Sequence[str], source: str, dtypes: Mapping[str, np.dtype] | None = None
) -> tuple[dict[str, Slice], Experts]:
    """Splits a model's flat tree (stored or in memory) into shared leaves and each expert's own.

    Args:
      tree: {path: array}.
      roster: the names of the experts.
      source: names the tree in errors.
      dtypes: {path: dtype} that leaves are cast to as they are read; by default they stay as they are.

    Returns:
      ({path: slice} of the shared leaves, {expert name: {leaf: slice}} in the order of the roster).
    """
    shared: dict[str, Slice] = {}
    experts: Experts = {name: {} for name in roster}
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


def stack_experts(
    shared: Mapping[str, Slice], experts: Mapping[str, Mapping[str, Slice]]
) -> dict[str, Slice | list[Slice]]:
    """The inverse of `split_experts`: {path: content} of a model's tree, for `write_tree`."""
    leaves: dict[str, Slice | list[Slice]] = dict(shared)
    members = list(experts.values())
    for leaf in members[0]:
        if len(members) == 1:
            leaves[f"{MOE}anchor/{leaf}"] = members[0][leaf]
        else:
            leaves[f"{MOE}experts/{leaf}"] = [expert[leaf] for expert in members]
    return leaves


def write_experts(
    path: epath.Path,
    shared: Mapping[str, Slice],
    experts: Mapping[str, Mapping[str, Slice]],
    advance: Callable[[int], None] = lambda size: None,
) -> dict[str, dict[str, str]]:
    """Writes the tree of a model; returns {expert: {leaf: digest}}, and under "" the shared leaves'."""
    digests = write_tree(path, stack_experts(shared, experts), digest_name, advance)
    found: dict[str, dict[str, str]] = {group: {} for group in ("", *experts)}
    for leaf, values in sorted(digests.items()):
        if not leaf.startswith(MOE):
            found[""][leaf] = str(values)
            continue
        for name, digest in zip(experts, values if isinstance(values, list) else [values], strict=True):
            found[name][digest_name(leaf)] = digest
    return found


def open_params(directory: epath.PathLike) -> dict[str, ts.TensorStore]:
    """Opens the parameters of a model or a contribution for reading."""
    return open_tree(epath.Path(directory) / PARAMS)


def open_model(path: epath.PathLike, manifest: ModelManifest) -> tuple[dict[str, Slice], Experts]:
    """Opens a model's leaves as `split_experts` gives them, without reading their content.

    Raises:
      UserError: a leaf is missing, or not in the manifest.
    """
    shared, experts = split_experts(open_params(path), manifest.roster, str(path))
    check_leaves(shared, manifest.shared, str(path))
    for expert in manifest.experts:
        check_leaves(experts[expert.name], expert.leaves, f"{path}: expert {expert.name}")
    return shared, experts


def open_merged_router(path: epath.PathLike, manifest: ModelManifest) -> Experts:
    """The router as the merge made it, {expert: {leaf: slice}}; a model tuned since keeps it beside its own."""
    folder = epath.Path(path) / (MERGED_ROUTER if manifest.tuned else PARAMS)
    router = {leaf: stored for leaf, stored in open_tree(folder).items() if is_router_leaf(leaf)}
    experts = split_experts(router, manifest.roster, str(folder))[1]
    for name, leaves in manifest.merged_router.items():
        check_leaves(experts[name], leaves, str(folder))
    return experts


def open_statistics(path: epath.PathLike, manifest: ModelManifest | ContributionManifest) -> Experts:
    """The statistics of a model's experts, or of a contribution's one, {expert: {leaf: slice}}; most have none.

    Raises:
      UserError: a leaf is missing, or not in the manifest.
    """
    folder = epath.Path(path) / STATISTICS
    stored = open_tree(folder) if folder.exists() else {}
    if isinstance(manifest, ContributionManifest):
        named, prefix = {manifest.name: manifest.statistics}, ""
    else:
        named, prefix = {e.name: e.statistics for e in manifest.experts}, "{}/"
    paths = {prefix.format(name) + leaf: (name, leaf) for name, leaves in named.items() for leaf in leaves}
    check_leaves(stored, dict.fromkeys(paths, ""), str(folder))
    experts: Experts = {name: {} for name in named}
    for leaf_path, (name, leaf) in paths.items():
        experts[name][leaf] = Slice(stored[leaf_path], None, f"{folder}: leaf {leaf_path}")
    return experts


def check_leaves(leaves: Mapping[str, Any], digests: Mapping[str, str], source: str) -> None:
    """Raises UserError unless exactly the leaves that a manifest names are there."""
    mismatched = leaves.keys() ^ digests.keys()
    if mismatched:
        state = "missing" if min(mismatched) in digests else "not in its manifest"
        raise UserError(f"{source}: leaf {min(mismatched)} is {state}; copy the directory again from its source")


def check_model(manifest: ModelManifest, shared: Mapping[str, Slice], experts: Experts) -> None:
    """Reads every leaf that `open_model` opened; raises UserError where one is not what the manifest says."""
    check_content({"": dict(shared), **experts}, manifest.stored)


def check_content(groups: Mapping[str, Mapping[str, Slice]], named: Mapping[str, Mapping[str, str]]) -> None:
    """Reads groups of leaves and compares them with the digests that are named for each group."""
    with progress_bar() as progress:
        task = progress.add_task("digests", total=sum(map(len, groups.values())))
        for group, leaves in groups.items():
            for leaf, part in leaves.items():
                check_digests({leaf: digest_slice(part, digest_name(leaf))}, named[group], leaves)
                progress.advance(task)


def size(leaves: Mapping[str, Slice]) -> int:
    """Bytes of a set of leaves."""
    return sum(part.nbytes for part in leaves.values())


def write_model(
    path: epath.PathLike,
    manifest: ModelManifest,
    shared: Mapping[str, Slice],
    experts: Mapping[str, Mapping[str, Slice]],
    *,
    statistics: Mapping[str, Mapping[str, Slice]] | None = None,
    merged_router: Mapping[str, Mapping[str, Slice]] | None = None,
    complete: Callable[[epath.Path, ModelManifest], ModelManifest | None] = lambda directory, manifest: None,
    title: str = "write",
) -> ModelManifest:
    """Writes a model directory, whole or not at all.

    Every leaf is compared with its digest in the manifest as it is copied, and a cast is recorded. A leaf that has no
    digest in the manifest is a new one, and gets its digest.

    Args:
      path: the directory to make.
      manifest: what is known of the model.
      shared: {path: slice} of the leaves that all experts share.
      experts: {expert: {leaf: slice}} in the order of the roster.
      statistics: {expert: {leaf: slice}}, as `open_statistics` gives them.
      merged_router: of a tuned model, as `open_merged_router` gives it.
      complete: called with the directory and its manifest when all else is written; writes what lies beside the
        parameters, and may return another manifest.
      title: of the progress bar.

    Returns:
      The manifest that was written.

    Raises:
      UserError: a leaf is not what the manifest says, is not finite, or too large for its dtype; or `path` exists.
    """
    total = sum(map(size, (shared, *experts.values())))
    with atomic_directory(path, MODEL.manifest, MODEL.content) as directory:
        with byte_progress(title, total) as advance:
            found = write_experts(directory / PARAMS, shared, experts, advance)
        manifest = with_casts(manifest, {"": shared, **experts}, found)
        digests = write_statistics(directory, statistics or {}, manifest)
        manifest = manifest.but(experts=[e.but(statistics=digests[e.name]) for e in manifest.experts])
        if manifest.tuned:
            write_merged_router(directory, merged_router or {}, manifest)
        manifest = complete(directory, manifest) or manifest
        write_manifest(directory / MODEL_FILE, manifest)
    return manifest


def write_contribution(
    path: epath.PathLike,
    manifest: ContributionManifest,
    leaves: Mapping[str, Slice],
    *,
    statistics: Mapping[str, Slice] | None = None,
    complete: Callable[[epath.Path, ContributionManifest], ContributionManifest | None] = lambda directory, found: None,
) -> ContributionManifest:
    """Writes a contribution directory, whole or not at all; arguments and errors are those of `write_model`."""
    with atomic_directory(path, CONTRIBUTION.manifest, CONTRIBUTION.content) as directory:
        with byte_progress("write", size(leaves)) as advance:
            found = write_tree(directory / PARAMS, dict(sorted(leaves.items())), str, advance)
        digests = {leaf: str(digest) for leaf, digest in found.items()}
        casts = new_casts(manifest.leaves, manifest.casts, leaves, digests)
        manifest = manifest.but(leaves={**digests, **manifest.leaves}, casts=casts)
        if statistics:
            found = write_tree(directory / STATISTICS, dict(sorted(statistics.items())), str)
            digests = {leaf: str(digest) for leaf, digest in found.items()}
            if manifest.statistics:
                check_leaves(digests, manifest.statistics, str(path))
                check_digests(digests, manifest.statistics, statistics)
            manifest = manifest.but(statistics=digests)
        manifest = complete(directory, manifest) or manifest
        if manifest.casts:
            document = {leaf: cast.model_dump() for leaf, cast in sorted(manifest.casts.items())}
            (directory / CASTS_FILE).write_text(json.dumps(document, indent=2) + "\n")
        write_manifest(directory / CONTRIBUTION_FILE, manifest)
    return manifest


def write_merged_router(
    directory: epath.Path, router: Mapping[str, Mapping[str, Slice]], manifest: ModelManifest
) -> None:
    """Writes what `open_merged_router` reads; raises UserError where it is not what the manifest says."""
    found = write_experts(directory / MERGED_ROUTER, {}, router)
    for name, leaves in router.items():
        check_digests(found[name], manifest.stored_router[name], leaves)


def write_statistics(
    directory: epath.Path, statistics: Mapping[str, Mapping[str, Slice]], manifest: ModelManifest
) -> dict[str, dict[str, str]]:
    """Writes what `open_statistics` reads, if anything; returns {expert: {leaf: digest}}.

    Raises:
      UserError: a leaf is not what the manifest says, where it names it.
    """
    leaves = {
        f"{name}/{leaf}": part for name, parts in sorted(statistics.items()) for leaf, part in sorted(parts.items())
    }
    digests = write_tree(directory / STATISTICS, leaves, lambda path: path.split("/", 1)[1]) if leaves else {}
    found: dict[str, dict[str, str]] = {expert.name: {} for expert in manifest.experts}
    for path, digest in digests.items():
        name, leaf = path.split("/", 1)
        found[name][leaf] = str(digest)
    for expert in manifest.experts:
        if expert.statistics:
            parts = statistics.get(expert.name, {})
            check_leaves(parts, expert.statistics, f"the statistics of {expert.name}")
            check_digests(found[expert.name], expert.statistics, parts)
    return found


def copy_files(source: epath.Path, directory: epath.Path) -> None:
    """Copies the files of a folder without folders, where there is one, to the folder that `directory` will be."""
    if source.is_dir():
        directory.mkdir()
        for file in source.iterdir():
            if not file.is_dir() and not is_system_file(file.name):
                file.copy(directory / file.name)


def copy_tokenizer(source: epath.PathLike, directory: epath.Path) -> None:
    """Copies `tokenizer.json`, and what else an import kept of it, from one model directory to another."""
    tokenizer = epath.Path(source) / TOKENIZER_FILE
    if tokenizer.exists():
        tokenizer.copy(directory / TOKENIZER_FILE)
    copy_files(epath.Path(source) / TOKENIZER_FOLDER, directory / TOKENIZER_FOLDER)
