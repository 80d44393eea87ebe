"""Model and contribution directories (docs/formats.md): what they hold, how they are read, checked and written."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pydantic
import tensorstore as ts
from etils import epath

from flexolmo_jax import distributed
from flexolmo_jax.checkpoint.atomic import atomic_directory
from flexolmo_jax.checkpoint.casts import Experts, group_digests, with_digests
from flexolmo_jax.checkpoint.copying import digest_slice, write_tree
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
from flexolmo_jax.checkpoint.params import Slice, open_tree
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
        files = json.loads((folder / CORPUS_FILE).read_bytes())["files"]
        names = [part["name"] for file in files for part in (file, file.get("ends")) if part]
        return dict.fromkeys([CORPUS_FILE, TOKENIZER_FILE, *names], FILE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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


class Tree(NamedTuple):
    """A tree to be written.

    Attributes:
      leaves: {path: content}, as `write_tree` takes them.
      digest_name: path -> the name that enters a leaf's digest.
    """

    leaves: Mapping[str, Slice | Sequence[Slice]]
    digest_name: Callable[[str], str] = str

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        contents = ([part] if isinstance(part, Slice) else part for part in self.leaves.values())
        return sum(part.nbytes for content in contents for part in content)


def split_experts(tree: Mapping[str, Any], roster: Sequence[str], source: str) -> tuple[dict[str, Slice], Experts]:
    """Splits a model's flat tree into shared leaves and each expert's own.

    Args:
      tree: {path: array}, stored or in memory, or {path: slice}.
      roster: the names of the experts.
      source: names the tree in errors.

    Returns:
      ({path: slice} of the shared leaves, {expert name: {leaf: slice}} in the order of the roster).
    """
    shared: dict[str, Slice] = {}
    experts: Experts = {name: {} for name in roster}
    for path, array in tree.items():
        part = array if isinstance(array, Slice) else Slice(array, None, f"{source}: leaf {path}")
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
    """Reads groups of leaves and compares them with the digests that are named for each group.

    Of several processes each reads its share.
    """
    leaves = [item for group, leaves in groups.items() for item in expecting(leaves, named[group]).items()]
    with progress_bar() as progress:
        for leaf, part in progress.track(leaves[distributed.index() :: distributed.count()], description="digests"):
            digest_slice(part, digest_name(leaf))


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
      The manifest that was written; what `complete` changes is known to process 0 alone.

    Raises:
      UserError: a leaf is not what the manifest says, is not finite, or too large for its dtype; or `path` exists.
    """
    trees = model_trees(manifest, shared, experts) | trees_beside(manifest, statistics or {}, merged_router or {})
    return _write(path, MODEL, manifest, {"": shared, **experts}, trees, complete, title)


def write_contribution(
    path: epath.PathLike,
    manifest: ContributionManifest,
    leaves: Mapping[str, Slice],
    *,
    statistics: Mapping[str, Slice] | None = None,
    complete: Callable[[epath.Path, ContributionManifest], ContributionManifest | None] = lambda directory, found: None,
) -> ContributionManifest:
    """Writes a contribution directory, whole or not at all; arguments and errors are those of `write_model`."""
    trees = {PARAMS: Tree(dict(sorted(expecting(leaves, manifest.stored).items())))}
    if statistics:
        if manifest.statistics:
            check_leaves(statistics, manifest.statistics, str(path))
        trees[STATISTICS] = Tree(dict(sorted(expecting(statistics, manifest.statistics).items())))
    return _write(path, CONTRIBUTION, manifest, {"": leaves}, trees, complete, "write")


def _write(
    path: epath.PathLike,
    kind: Kind,
    manifest: Manifest,
    slices: Mapping[str, Mapping[str, Slice]],
    trees: Mapping[str, Tree],
    complete: Callable[[epath.Path, Manifest], Manifest | None],
    title: str,
) -> Manifest:
    """Writes a directory: its trees, what `complete` adds, and last the manifest, with the digests of `slices`."""
    with atomic_directory(path, kind.manifest, kind.content) as directory:
        with byte_progress(title, sum(tree.nbytes for tree in trees.values())) as advance:
            digests = {folder: write_tree(directory / folder, *tree, advance) for folder, tree in trees.items()}
        found = group_digests(digests[PARAMS], slices)
        manifest = with_digests(manifest, slices, found, digests.get(STATISTICS))
        with distributed.primary_alone(kind.manifest) as is_this:
            if is_this:
                manifest = complete(directory, manifest) or manifest
                if isinstance(manifest, ContributionManifest) and manifest.casts:
                    document = {leaf: cast.model_dump() for leaf, cast in sorted(manifest.casts.items())}
                    (directory / CASTS_FILE).write_text(json.dumps(document, indent=2) + "\n")
                write_manifest(directory / kind.manifest, manifest)
    return manifest


def model_trees(
    manifest: ModelManifest, shared: Mapping[str, Slice], experts: Mapping[str, Mapping[str, Slice]]
) -> dict[str, Tree]:
    """{folder: tree} of a model's parameters, or of some of them."""
    stored = manifest.stored
    parts = {name: expecting(leaves, stored[name]) for name, leaves in {"": shared, **experts}.items()}
    return {PARAMS: Tree(stack_experts(parts.pop(""), parts), digest_name)}


def trees_beside(
    manifest: ModelManifest,
    statistics: Mapping[str, Mapping[str, Slice]],
    merged_router: Mapping[str, Mapping[str, Slice]],
) -> dict[str, Tree]:
    """{folder: tree} of what stands beside a model's parameters: statistics, if any; of a tuned one the merged router.

    Raises:
      UserError: a leaf of the statistics is missing, or not in the manifest, where that names them.
    """
    trees, leaves = dict[str, Tree](), dict[str, Slice]()
    for expert in sorted(manifest.experts, key=lambda expert: expert.name):
        parts = statistics.get(expert.name, {})
        if expert.statistics:
            check_leaves(parts, expert.statistics, f"the statistics of {expert.name}")
        leaves |= {f"{expert.name}/{leaf}": part for leaf, part in sorted(expecting(parts, expert.statistics).items())}
    if leaves:
        trees[STATISTICS] = Tree(leaves, lambda path: path.split("/", 1)[1])
    if manifest.tuned:
        stored = manifest.stored_router
        router = {name: expecting(parts, stored[name]) for name, parts in merged_router.items()}
        trees[MERGED_ROUTER] = Tree(stack_experts({}, router), digest_name)
    return trees


def expecting(leaves: Mapping[str, Slice], digests: Mapping[str, str]) -> dict[str, Slice]:
    """The leaves, those without a digest with the one that is named for them: each is compared as it is read."""
    return {leaf: part._replace(digest=part.digest or digests.get(leaf)) for leaf, part in leaves.items()}


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
