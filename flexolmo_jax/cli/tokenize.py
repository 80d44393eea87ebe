"""Turns texts into a corpus directory: flat token files, each document closed by EOS.

    flexolmo tokenize --input='texts/*.txt' --input=news.jsonl --out=corpora/news

A text file is one document; a line of a .jsonl file is an object whose "text" is one.
"""

from absl import flags

_INPUT = flags.DEFINE_multi_string("input", [], "File or glob of .txt or .jsonl; give the flag once for each.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "bytes", "A Hugging Face tokenizer.json, or 'bytes'.")
_EOS = flags.DEFINE_string("eos_token", None, "The token that closes a document, where it cannot be told.")
_OUT = flags.DEFINE_string("out", None, "Corpus directory to make.")
flags.mark_flags_as_required(["out"])


def run() -> None:
    """Tokenizes, and prints the counts."""
    from flexolmo_jax.data.corpus import write_corpus
    from flexolmo_jax.data.documents import read_documents
    from flexolmo_jax.data.tokenizer import load_tokenizer
    from flexolmo_jax.errors import UserError

    if not _INPUT.value:
        raise UserError("--input: none given; give the flag once for each file or glob")
    tokenizer = load_tokenizer(_TOKENIZER.value, eos_token=_EOS.value)
    corpus = write_corpus(_OUT.value, read_documents(_INPUT.value), tokenizer, progress=True)
    print(f"{_OUT.value}: {corpus.documents:,} documents, {corpus.tokens:,} tokens, {corpus.bytes:,} bytes of text")
