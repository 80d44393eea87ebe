"""Converts text files to a corpus directory: flat token files in which every document is terminated by EOS.

    flexolmo tokenize --input='texts/*.txt' --input=news.jsonl.gz --out=corpora/news

The suffix of a file's name tells its format, in any case, also with .gz, .bz2, .xz or .zst after it (see --format). In
records with several fields, the document is under "text" (see --text_key). Files with other suffixes are one document
each, whole. JSON in such a file is refused: rename it, or give its --format. docs/data.md has more.
"""

import os
import re

from absl import flags

from flexolmo_jax.data.sources import SOURCES
from flexolmo_jax.data.splits import DEFAULT_KEY, parse_splits

_FORMATS = "; ".join(
    f"{name} ({', '.join(source.suffixes) or 'any other suffix'}): a document is {source.document}"
    for name, source in SOURCES.items()
)

_INPUT = flags.DEFINE_multi_string("input", [], "File or glob of text files; give the flag once for each.")
_FORMAT = flags.DEFINE_enum(
    "format", "auto", ["auto", *SOURCES], f"Format of the files. auto: by the suffix of each. {_FORMATS}."
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
    "Number of processes, each of which tokenizes whole input files; 0: one for each core. The corpus is the same.",
    lower_bound=0,
)
# Arguments of the library in its messages.
_ARGUMENT = re.compile(r"\b(?=format=\w|text_key( \(|$))")


def run() -> None:
    """Tokenizes, and prints the counts."""
    from flexolmo_jax.data.bad_records import StoppedError
    from flexolmo_jax.data.corpus_writer import NoTextError
    from flexolmo_jax.data.tokenizer import load_tokenizer
    from flexolmo_jax.data.tokenizing import tokenize_files
    from flexolmo_jax.errors import UserError

    if not _INPUT.value:
        raise UserError("--input: none given; give the flag once for each file or glob")
    if not _TEXT_KEY.value:
        raise UserError("--text_key: is empty; name the key that holds a document")
    splits = parse_splits(_SPLIT.value, _SPLIT_KEY.value) if _SPLIT.value else None
    tokenizer = load_tokenizer(
        _TOKENIZER.value, _EOS.value, label=f"--tokenizer={_TOKENIZER.value}", eos_label="--eos_token"
    )
    try:
        made = tokenize_files(
            _OUT.value,
            _INPUT.value,
            tokenizer,
            text_key=_TEXT_KEY.value,
            format=_FORMAT.value,
            skip=_ON_ERROR.value == "skip",
            splits=splits,
            license=_LICENSE.value,
            processes=_PROCESSES.value or len(os.sched_getaffinity(0)),
        )
    except NoTextError as error:
        raise UserError(f"--input: {_with_flags(error.problem)}") from error
    except StoppedError as error:
        raise UserError(f"{_with_flags(str(error))}; --on_error=skip leaves such records out") from error
    for path, corpus in made.corpora.items():
        print(f"{path}: {corpus.documents:,} documents, {corpus.tokens:,} tokens, {corpus.bytes:,} bytes of text")
    if made.bad_records.count:
        first = _with_flags(made.bad_records.first())
        print(f"{_OUT.value}: bad records left out: {made.bad_records.count:,} (in corpus.json), {first}")
    tokens = sum(corpus.tokens for corpus in made.corpora.values())
    warning = tokenizer.unknown_text(made.unknown, tokens)
    if warning:
        print(warning)


def _with_flags(message: str) -> str:
    """A message of the library in which its arguments are flags."""
    return _ARGUMENT.sub("--", message)
