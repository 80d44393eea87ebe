"""Text files to a corpus, in several processes, resumable.

Input files are divided into units. Each is tokenized by one process into a work directory, which outlives an
interruption; when all are there, their tokens are put together in the order of the input. So what comes out depends on
the input and the settings alone: not on the number of processes, nor on when they were interrupted.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from etils import epath

from flexolmo_jax.checkpoint.atomic import atomic_directory, check_absent, commit
from flexolmo_jax.data.corpus import MANIFEST, Corpus
from flexolmo_jax.data.corpus_writer import (
    NAMES,
    TOKENS_PER_FILE,
    NoTextError,
    describe_sources,
    dropped,
    finish_corpus,
)
from flexolmo_jax.data.ingest.splits import Splits
from flexolmo_jax.data.ingest.units import Settings, Unit, plan_units, tokenize_unit
from flexolmo_jax.data.ingest.work_directory import WorkDirectory
from flexolmo_jax.data.ingest.worker_pool import map_in_processes
from flexolmo_jax.data.text.bad_records import BadRecords, StoppedError
from flexolmo_jax.data.text.documents import AUTO, matching_files
from flexolmo_jax.data.token_files import DTYPES, TokenFileWriter, map_document_ends, map_token_file, token_dtype
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer
from flexolmo_jax.errors import ArgumentError
from flexolmo_jax.progress import byte_progress

SPLITS_FILE = "splits.json"
_COUNTS = ("documents", "tokens", "bytes")


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """What `tokenize_files` made.

    Attributes:
      corpora: the corpus, or that of each split, by path.
      bad_records: what was skipped.
      unknown: number of tokens that stand for unknown text.
    """

    corpora: dict[str, Corpus]
    bad_records: BadRecords
    unknown: int


def tokenize_files(
    out: epath.PathLike,
    patterns: Sequence[str],
    tokenizer: Tokenizer,
    *,
    text_key: str = "text",
    format: str = AUTO,
    skip: bool = False,
    splits: Splits | None = None,
    license: str = "",
    processes: int = 1,
    tokens_per_file: int = TOKENS_PER_FILE,
) -> Tokenized:
    """Tokenizes text files into a new corpus directory, or a directory of corpora, which is complete or absent.

    Memory of each process holds one document and a batch of chunks. What is finished lies in a work directory; after
    an interruption the same call resumes from it. A progress bar is shown.

    Args:
      out: the directory to make.
      patterns: the input, as in `matching_files`.
      tokenizer: encodes the texts; a copy is stored in the corpus.
      text_key: as in `read_file`.
      format: as in `read_file`.
      skip: whether records without usable text are skipped, and counted; else the first is an error.
      splits: makes a corpus of each split, in a directory of its name.
      license: under which the texts may be used, for corpus.json.
      processes: number of processes; 1 is this one, with the threads of `tokenizers`.
      tokens_per_file: a new token file starts when the current one has this many.

    Raises:
      NoTextError: there is no document with text.
      StoppedError: a record has no usable text, and is not to be skipped.
      UserError: `out` exists, a pattern matches no file, a file changes while it is read, a split has no document, or
        the work directory is of other settings.
    """
    commits = (SPLITS_FILE, (SPLITS_FILE, *splits.shares)) if splits else (MANIFEST, NAMES)
    check_absent(out, *commits)
    units = plan_units(matching_files(patterns), format)
    pipes = [file for unit in units for file in unit.pipes]
    if pipes and processes > 1:
        raise ArgumentError("processes", processes, f"{pipes[0]} is a pipe, which only a single process can read")
    work = WorkDirectory(out)
    settings = Settings(
        tokenizer=str(work.tokenizer),
        tokenizer_digest=tokenizer.digest,
        eos_id=tokenizer.eos_id,
        label=tokenizer.label,
        text_key=text_key,
        format=format,
        skip=skip,
        splits=splits,
    )
    with work.opened(settings, tokenizer):
        records, bad_records = _tokenize(units, settings, work, processes)
        _check_documents(records, bad_records, settings, work)
        card: dict[str, Any] = {"license": license} if license else {}
        card |= dropped(sum(record["empty"] for record in records), bad_records)
        with atomic_directory(out, *commits) as directory:
            for name in settings.split_names:
                folder = directory / name if splits else directory
                folder.mkdir(exist_ok=True)
                shares = [record["splits"][name] for record in records]
                files = _join(folder, shares, work, tokenizer, tokens_per_file)
                card["sources"] = _sources(units, shares)
                if splits:
                    card["split"] = splits.description(name)
                finish_corpus(folder, tokenizer, _totals(shares), files, card)
            if splits:
                commit(directory / SPLITS_FILE, {"shares": splits.shares, "key": splits.key})
    paths = [os.path.join(out, name) for name in splits.shares] if splits else [os.fspath(out)]
    unknown = sum(record["unknown"] for record in records)
    return Tokenized({path: Corpus.open(path) for path in paths}, bad_records, unknown)


def _tokenize(
    units: Sequence[Unit], settings: Settings, work: WorkDirectory, processes: int
) -> tuple[list[dict[str, Any]], BadRecords]:
    """Tokenizes the units that are not finished; returns the records of all, and the bad ones of the input."""
    records: list[dict[str, Any]] = []
    bad_records = BadRecords(settings.skip)
    with contextlib.closing(_records(units, settings, work, processes)) as found:
        try:
            for record in found:
                bad_records.extend(record["bad_records"])
                records.append(record)
        except StoppedError as error:
            totals = _totals([split for record in records for split in record["splits"].values()])
            documents, tokens = totals["documents"] + error.documents, totals["tokens"] + error.tokens
            kept = f"finished files are kept in {work.path}" if work.holds_finished else ""
            raise error.after(documents, tokens, kept) from error
    return records, bad_records


def _records(
    units: Sequence[Unit], settings: Settings, work: WorkDirectory, processes: int
) -> Generator[dict[str, Any], None, None]:
    """Yields the record of each unit in order; those that are not finished are tokenized, with a progress bar."""
    finished = {unit.key: record for unit in units if (record := work.record(unit))}
    todo = [unit for unit in units if unit.key not in finished]
    call = functools.partial(tokenize_unit, settings=settings, directory=str(work.path))
    left = sum(unit.size for unit in todo)
    total = sum(unit.size for unit in units)
    with (
        byte_progress("Tokenized", total, total - left) as advance,
        contextlib.closing(map_in_processes(call, todo, processes, advance)) as results,
    ):
        for unit in units:
            yield finished[unit.key] if unit.key in finished else next(results)


def _check_documents(
    records: Sequence[Mapping[str, Any]], bad_records: BadRecords, settings: Settings, work: WorkDirectory
) -> None:
    """Raises an error where there is no document, or none in a split; the work directory is of no use then."""
    documents = {
        name: _totals([record["splits"][name] for record in records])["documents"] for name in settings.split_names
    }
    if not all(documents.values()):
        work.remove()
    if not any(documents.values()):
        raise NoTextError(bad_records)
    for name, count in documents.items():
        if settings.splits and not count:
            split = ",".join(f"{name}:{share}" for name, share in settings.splits.shares.items())
            raise ArgumentError(
                "split", split, f"none of {sum(documents.values()):,} documents falls into {name!r}; give it more"
            )


def _join(
    directory: epath.Path,
    shares: Sequence[Mapping[str, Any]],
    work: WorkDirectory,
    tokenizer: Tokenizer,
    tokens_per_file: int,
) -> list[dict[str, Any]]:
    """Writes the token files of a split from those of the units, in order; returns their descriptions."""
    dtype = DTYPES[token_dtype(tokenizer.vocab_size)]
    folder = epath.Path(work.path)
    with contextlib.closing(TokenFileWriter(directory, dtype, tokens_per_file)) as writer:
        for file in itertools.chain.from_iterable(share["files"] for share in shares):
            tokens = map_token_file(folder / file["name"], file["tokens"], dtype)
            ends = map_document_ends(folder / file["ends"]["name"], file["documents"], file["tokens"])
            writer.extend(tokens, ends)
        return writer.close()


def _totals(shares: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {count: sum(sum(share[count]) for share in shares) for count in _COUNTS}


def _sources(units: Sequence[Unit], shares: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The part of a corpus's card that says how much each input file gave to it."""
    sources: dict[str, dict[str, Any]] = {}
    for unit, share in zip(units, shares, strict=True):
        for place, entry in enumerate(unit.inputs):
            source = sources.setdefault(entry.file, {"file": entry.file, **dict.fromkeys(_COUNTS, 0)})
            for count in _COUNTS:
                source[count] += share[count][place]
    return describe_sources(list(sources.values()))
