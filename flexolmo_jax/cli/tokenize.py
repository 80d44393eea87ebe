"""Turns texts into a corpus directory: flat token files, each document closed by EOS.

    flexolmo tokenize --input='texts/*.txt' --input=news.jsonl.gz --out=corpora/news

The suffix of a file says what it is, in any case, also with .gz, .bz2, .xz or .zst after it: each line of a .jsonl or
.ndjson file is an object whose "text" is a document; a .json file holds such lines, an array of such objects or of
strings, or one object; each row of a .parquet file is a document; any other file is a document, whole. JSON
in a file that is not named so is refused: rename it, or say its --format. docs/data.md has more.
"""

from absl import flags

_FORMATS = ("auto", "text", "jsonl", "json", "parquet")

_INPUT = flags.DEFINE_multi_string("input", [], "File or glob of files of text; give the flag once for each.")
_FORMAT = flags.DEFINE_enum("format", "auto", _FORMATS, "What the files are; by default, what their suffixes say.")
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
_EOS = flags.DEFINE_string("eos_token", None, "The token that closes a document, where it cannot be told.")
_OUT = flags.DEFINE_string("out", None, "Corpus directory to make.")
flags.mark_flags_as_required(["out"])


def run() -> None:
    """Tokenizes, and prints the counts."""
    from flexolmo_jax.data.bad_records import BadRecords
    from flexolmo_jax.data.corpus import unknown_text, write_corpus
    from flexolmo_jax.data.documents import read_documents
    from flexolmo_jax.data.tokenizer import load_tokenizer
    from flexolmo_jax.errors import UserError

    if not _INPUT.value:
        raise UserError("--input: none given; give the flag once for each file or glob")
    if not _TEXT_KEY.value:
        raise UserError("--text_key: is empty; name the key that holds a document")
    tokenizer = load_tokenizer(_TOKENIZER.value, eos_token=_EOS.value)
    bad_records = BadRecords(skip=_ON_ERROR.value == "skip")
    documents = read_documents(
        _INPUT.value,
        text_key=_TEXT_KEY.value,
        format=_FORMAT.value,
        bad_records=bad_records,
        check=tokenizer.check,
    )
    corpus = write_corpus(_OUT.value, documents, tokenizer, bad_records=bad_records, progress=True)
    print(f"{_OUT.value}: {corpus.documents:,} documents, {corpus.tokens:,} tokens, {corpus.bytes:,} bytes of text")
    if bad_records.count:
        print(f"{_OUT.value}: bad records left out: {bad_records.count:,} (in corpus.json), {bad_records.first()}")
    for line in unknown_text(corpus, tokenizer):
        print(line)
