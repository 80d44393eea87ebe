"""Converts text files to a corpus directory: flat token files in which every document is terminated by EOS.

    flexolmo tokenize --input='texts/*.txt' --input=news.jsonl.gz --out=corpora/news
    flexolmo tokenize --input='shards/*.jsonl.zst' --processes=0 --split=train:0.99,validation:0.01 --out=corpora/web
    flexolmo tokenize --input='/data/*.npy' --format=tokens --tokenizer=tokenizer.json --out=corpora/theirs

The suffix of a file's name tells its format, in any case, also with .gz, .bz2, .xz or .zst after it (see --format). In
records with several fields, the document is under "text" (see --text_key). Files with other suffixes are one document
each, whole. JSON in such a file is refused: rename it, or give its --format. After an interruption the same command
resumes from what is in OUT.incomplete. docs/data.md has more.
"""

import os
import re
from typing import TYPE_CHECKING

from absl import flags

from flexolmo_jax.data.ingest.splits import DEFAULT_KEY, parse_splits
from flexolmo_jax.data.text.sources import SOURCES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flexolmo_jax.data.corpus import Corpus
    from flexolmo_jax.data.text.bad_records import BadRecords
    from flexolmo_jax.data.tokenization.tokenizer import Tokenizer

_FORMATS = "; ".join(
    f"{name} ({', '.join(source.suffixes) or 'any other suffix'}): a document is {source.document}"
    for name, source in SOURCES.items()
)

_TOKENS = "tokens"

_INPUT = flags.DEFINE_multi_string("input", [], "File or glob of text files; give the flag once for each.")
_FORMAT = flags.DEFINE_enum(
    "format",
    "auto",
    ["auto", *SOURCES, _TOKENS],
    f"Format of the files. auto: by the suffix of each. {_FORMATS}. {_TOKENS}: ids that another program wrote, flat "
    "uint16 or uint32 (.npy, .bin, .ds) with documents terminated by EOS; the corpus refers to these files.",
)
_TEXT_KEY = flags.DEFINE_string(
    "text_key",
    "text",
    "The key (of Parquet, the column) that holds a document; a.b is the key b of the object under a.",
)
_ON_ERROR = flags.DEFINE_enum(
    "on_error",
    "stop",
    ("stop", "skip"),
    "At a record (or a file) without usable text: stop, and make no corpus; or skip it, and list it in corpus.json.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["uint16", "uint32"],
    f"Type of the ids, with --format={_TOKENS}; by default uint16 if the tokenizer has at most 65,536.",
)
_TOKENIZER = flags.DEFINE_string("tokenizer", "bytes", "A Hugging Face tokenizer.json, or 'bytes'.")
_EOS = flags.DEFINE_string("eos_token", None, "The token that terminates documents; by default a well-known one.")
_OUT = flags.DEFINE_string("out", None, "Corpus directory to make.", required=True)
_SPLIT = flags.DEFINE_string(
    "split",
    "",
    "Names and shares of splits, such as train:0.98,validation:0.01,test:0.01: --out is then a directory of corpora. A "
    "hash of the text decides where a document falls, the same for every input and tokenizer.",
)
_SPLIT_KEY = flags.DEFINE_string(
    "split_key", DEFAULT_KEY, "Key of that hash, public: with another one documents fall elsewhere."
)
_LICENSE = flags.DEFINE_string("license", "", "License under which the texts may be used, for corpus.json.")
_PROCESSES = flags.DEFINE_integer(
    "processes",
    1,
    "Number of processes, which share the input; 0: one for each core. The corpus is the same.",
    lower_bound=0,
)
# Arguments of the library in its messages.
_ARGUMENT = re.compile(r"\b(?=format=\w|dtype=\w|text_key( \(|$))")


def run() -> None:
    """Tokenizes, and prints the counts."""
    from flexolmo_jax.data.corpus_writer import NoTextError
    from flexolmo_jax.data.text.bad_records import StoppedError
    from flexolmo_jax.data.tokenization.tokenizer import load_tokenizer
    from flexolmo_jax.errors import UserError

    if not _INPUT.value:
        raise UserError("--input: none given; give the flag once for each file or glob")
    if not _TEXT_KEY.value:
        raise UserError("--text_key: is empty; name the key that holds a document")
    tokenizer = load_tokenizer(
        _TOKENIZER.value, _EOS.value, label=f"--tokenizer={_TOKENIZER.value}", eos_label="--eos_token"
    )
    try:
        if _FORMAT.value == _TOKENS:
            _refer(tokenizer)
        else:
            _tokenize(tokenizer)
    except NoTextError as error:
        raise UserError(f"--input: {_with_flags(error.problem)}") from error
    except StoppedError as error:
        raise UserError(f"{_with_flags(str(error))}; --on_error=skip leaves such records out") from error


def _tokenize(tokenizer: "Tokenizer") -> None:
    """Makes a corpus of text files."""
    from flexolmo_jax.data.ingest.tokenizing import tokenize_files
    from flexolmo_jax.errors import UserError

    if _DTYPE.value:
        raise UserError(f"--dtype={_DTYPE.value}: is for token files; give --format={_TOKENS} too, or leave it out")
    made = tokenize_files(
        _OUT.value,
        _INPUT.value,
        tokenizer,
        text_key=_TEXT_KEY.value,
        format=_FORMAT.value,
        skip=_ON_ERROR.value == "skip",
        splits=parse_splits(_SPLIT.value, _SPLIT_KEY.value) if _SPLIT.value else None,
        license=_LICENSE.value,
        processes=_PROCESSES.value or len(os.sched_getaffinity(0)),
    )
    _print_counts(made.corpora, made.bad_records)
    warning = tokenizer.unknown_text(made.unknown, sum(corpus.tokens for corpus in made.corpora.values()))
    if warning:
        print(warning)


def _refer(tokenizer: "Tokenizer") -> None:
    """Makes a corpus that refers to token files."""
    from flexolmo_jax.data.ingest.referred_files import refer_to_token_files
    from flexolmo_jax.data.text.bad_records import BadRecords
    from flexolmo_jax.errors import UserError

    if _SPLIT.value:
        raise UserError(f"--split={_SPLIT.value}: needs text, by which documents are split; leave it out")
    bad_records = BadRecords(_ON_ERROR.value == "skip")
    options = {"dtype": _DTYPE.value, "license": _LICENSE.value, "bad_records": bad_records}
    corpus = refer_to_token_files(_OUT.value, _INPUT.value, tokenizer, **options)
    _print_counts({_OUT.value: corpus}, bad_records)


def _print_counts(corpora: "Mapping[str, Corpus]", bad_records: "BadRecords") -> None:
    for path, corpus in corpora.items():
        print(f"{path}: {corpus.documents:,} documents, {corpus.tokens:,} tokens, {corpus.bytes:,} bytes of text")
    if bad_records.count:
        first = _with_flags(bad_records.first())
        print(f"{_OUT.value}: bad records left out: {bad_records.count:,} (in corpus.json), {first}")


def _with_flags(message: str) -> str:
    """A message of the library in which its arguments are flags."""
    return _ARGUMENT.sub("--", message)
