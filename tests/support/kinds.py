"""Tiny tokenizers of every kind, trained on a few sentences."""

import functools
import json

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from flexolmo_jax.data.tokenization.tokenizer import load_tokenizer
from flexolmo_jax.errors import UserError

TEXTS = (
    "The quick brown fox jumps over the lazy dog. It isn't lazy, is it?",
    "Pack my box with five dozen liquor jugs; then walk away, quietly.",
    "A naïve café owner — 20 years old! — says: 'don't', and we do not.",
    "the end of the document . the end of the other document , too",
    "Hello , world ! Hello, you there ( and there ).",
)
HARD = ("日本語 🙂 e\u0301 \ufffd", "  two  spaces \n\t and lines  ", "x" * 40)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _trained(model, trainer, *, pre=None, normalizer=None, decoder=None, texts=TEXTS):
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.normalizer, backend.decoder = pre, normalizer, decoder
    backend.train_from_iterator(texts, trainer)
    return backend


def _with_bytes(backend, **model):
    """The same with a token for each byte at the end of the model's vocabulary."""
    document = json.loads(backend.to_str())
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary |= {name: len(vocabulary) + place for place, name in enumerate(BYTES)}
    else:
        vocabulary += [[name, -20.0] for name in BYTES]
    document["model"] |= {"byte_fallback": True, **model}
    return tokenizers.Tokenizer.from_str(json.dumps(document))


def byte_level_bpe():
    """As GPT-2 and OLMo: EOS is an added token."""
    level = pre_tokenizers.ByteLevel
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=level.alphabet(), show_progress=False)
    backend = _trained(models.BPE(), trainer, pre=level(add_prefix_space=False), decoder=decoders.ByteLevel())
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def bpe_with_byte_fallback():
    """As Llama 2: special tokens in the vocabulary, a space before the text that decoding strips."""
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    backend = _trained(
        models.BPE(unk_token="<unk>"), trainer, normalizer=prepend, decoder=decoders.Sequence(list(parts))
    )
    return _with_bytes(backend)


def bpe_with_byte_fallback_without_prefix():
    """As Gemma: no space is put before a text."""
    backend = bpe_with_byte_fallback()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def bpe_with_first_space():
    """As Llama since: a space before the first word of a text only, and BOS before a text by default."""
    backend = bpe_with_byte_fallback()
    backend.normalizer, backend.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def bpe_without_unknown():
    """Drops characters that it does not know."""
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["</s>"], show_progress=False)
    return _trained(models.BPE(), trainer, pre=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace())


def bpe_with_suffix():
    """A suffix ends each word, and decodes to a space where another token follows."""
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>", show_progress=False
    )
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    return _trained(model, trainer, pre=pre_tokenizers.Whitespace(), decoder=decoders.BPEDecoder(suffix="</w>"))


def unigram():
    """As T5: Unigram's own vocabulary holds the special tokens, at the best score."""
    trainer = trainers.UnigramTrainer(
        vocab_size=140, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    space = {"pre": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}
    return _trained(models.Unigram(), trainer, normalizer=normalizers.NFKC(), **space)


def unigram_with_byte_fallback():
    """Bytes, then a decoder that removes the first space."""
    backend = _with_bytes(unigram())
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return backend


def wordpiece():
    """As BERT: lower case, spaces cleaned up, all special tokens in the vocabulary, some around a text by default."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[EOS]"]
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    bert = {"pre": pre_tokenizers.BertPreTokenizer(), "normalizer": normalizers.BertNormalizer(lowercase=True)}
    backend = _trained(models.WordPiece(unk_token="[UNK]"), trainer, decoder=decoders.WordPiece(cleanup=True), **bert)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    return backend


def wordpiece_without_unknown():
    """Refuses words that it does not know."""
    document = json.loads(wordpiece().to_str())
    document["model"]["unk_token"] = "[nothing]"
    return tokenizers.Tokenizer.from_str(json.dumps(document))


def _words(*special):
    words = dict.fromkeys(word for text in TEXTS for word in text.split())
    return {word: id for id, word in enumerate([*special, *words])}


def word_level():
    """Special tokens in the vocabulary that nothing marks as special, and no decoder."""
    backend = tokenizers.Tokenizer(models.WordLevel(_words("[UNK]", "[EOS]"), unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def word_level_with_holes():
    """Special tokens marked as such, ids with holes between them."""
    words = {word: 3 * id for word, id in _words("<unk>", "<pad>", "</s>").items()}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<unk>", "<pad>", "</s>"])
    return backend


def characters_with_ctc():
    """Characters; repetitions are dropped, and "|" is a space."""
    names = ["<pad>", "<unk>", "</s>", "|", *sorted(set("".join(TEXTS)) - {" "})]
    backend = tokenizers.Tokenizer(models.WordLevel({name: id for id, name in enumerate(names)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "|")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.CTC()
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


def added_tokens():
    """Added tokens of every sort, special and not."""
    backend = byte_level_bpe()
    token = tokenizers.AddedToken
    backend.add_tokens([token("fox", lstrip=True), token(" dog", rstrip=True), token("IT", single_word=True)])
    backend.add_tokens([token("é\ufffd", normalized=True), token("日本", normalized=False)])
    backend.add_special_tokens([token("<mask>", lstrip=True), token("<s>", normalized=True)])
    return backend


def _with_decoder(make, *parts):
    def changed():
        backend = make()
        backend.decoder = decoders.Sequence(list(parts)) if parts else None
        return backend

    return changed


_SPACE, _JOIN = decoders.Replace("▁", " "), decoders.Fuse()
WHOLE = ("replace_in_text", "pattern_in_text")  # kinds whose text may change to the end
KINDS = {
    make.__name__: make
    for make in (
        *(byte_level_bpe, bpe_with_byte_fallback, bpe_with_byte_fallback_without_prefix, bpe_without_unknown),
        *(bpe_with_first_space, bpe_with_suffix, unigram, unigram_with_byte_fallback),
        *(wordpiece, wordpiece_without_unknown),
        *(word_level, word_level_with_holes, characters_with_ctc, added_tokens),
    )
} | {
    "strip_both_ends": _with_decoder(unigram, _SPACE, _JOIN, decoders.Strip(" ", 1, 2)),
    "strip_each_token": _with_decoder(unigram, decoders.Strip("▁", 1, 1), _SPACE),
    "replace_in_tokens": _with_decoder(unigram, decoders.Replace(Regex("[▁e]+"), "<>"), _JOIN),
    "replace_in_text": _with_decoder(unigram, _SPACE, _JOIN, decoders.Replace(" t", "T"), decoders.Strip(" ", 1, 0)),
    "pattern_in_text": _with_decoder(unigram, _SPACE, _JOIN, decoders.Replace(Regex(" +$"), "!")),
    "wordpiece_joined": _with_decoder(wordpiece, decoders.WordPiece(cleanup=False), _JOIN),
    "bytes_then_words": _with_decoder(
        bpe_with_byte_fallback, _SPACE, decoders.ByteFallback(), decoders.WordPiece(prefix="s"), _JOIN
    ),
    "bytes_of_bytes": _with_decoder(bpe_with_byte_fallback, decoders.ByteFallback(), decoders.ByteLevel()),
    "byte_level_stripped": _with_decoder(byte_level_bpe, decoders.ByteLevel(), decoders.Strip("e", 2, 1)),
    "suffix_of_byte_level": _with_decoder(byte_level_bpe, decoders.BPEDecoder(suffix="e"), decoders.ByteLevel()),
    "suffix_within": _with_decoder(unigram, decoders.BPEDecoder(suffix="▁")),
    "no_decoder": _with_decoder(unigram),
}


@functools.cache
def make(kind):
    """The tokenizer file of a kind, as text."""
    return KINDS[kind]().to_str()


def write(kind, directory):
    """Writes the tokenizer.json of a kind into a directory; returns the file."""
    file = directory / "tokenizer.json"
    file.write_text(make(kind), encoding="utf-8")
    return file


def load(kind, directory):
    """The tokenizer of a kind, loaded from a file that is written into a directory."""
    return load_tokenizer(write(kind, directory))


def ids(tokenizer, text):
    """The ids of a text; none where the tokenizer refuses it."""
    try:
        return tokenizer.encode(text).tolist()
    except UserError:
        return []
