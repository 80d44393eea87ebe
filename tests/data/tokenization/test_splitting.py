"""Texts encoded in chunks against the same texts encoded whole, by every kind of tokenizer that can be split."""

import itertools
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from flexolmo_jax.data.text.bad_records import BadRecordError
from flexolmo_jax.data.tokenization import splitting
from flexolmo_jax.data.tokenization.splitting import Splitter
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer, byte_tokenizer

EOS = "<|endoftext|>"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Whatever might lie across a cut, or look across it: for each rule of the tokenizers below, what it treats apart.
ATOMS = [
    *(" ", "  ", "   ", " " * 30, "\n", "\r\n", "\n\n", "\t", "\x0b", "\x85", "\u00a0", "\u2028", "\u3000"),
    *("a", "b", "Ab", "dog", "x" * 40, "1", "23", "4567", "\u0663", "\u2167", "\u00bd", "\u00b2", "\u2474"),
    *("'s", "'", "\u2019", "\u017f", ".", "\uff0c", "!!", "...", "_", "-", "/", "//", "|", "^", "`", "~", "$", "<=>"),
    *("|||", "|||IP|||", "a.b", "a.", "K.k", "\u212a.k", "K.", "fi.", "\ufb01.", EOS, "<|", "|>"),
    *("\u00e9", "e\u0301", "\u0301", "\u0345", "\u0958", "\u0130", "\u03a3", "\u00aa", "\u0600", "\u05b0", "\u0e33"),
    *("\u6570", "\u5b66", "\u3002", "\u3001", "\u30a2", "\u304b\u3099", "\ud55c", "\u1112\u1161\u11ab"),
    *("\U0001f469\u200d\U0001f467", "\u200d", "\U0001f1e9\U0001f1ea", "\ufeff", "\u2581", "\0"),
]


def byte_level(prefix=False, regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert), byte_level(regex=False)])


def trained(pre_tokenizer, normalizer=None, tokens=(), trainer=None):
    model = {"Unigram": models.Unigram, "WordLevel": models.WordLevel}.get(type(trainer).__name__[:-7], models.BPE)
    backend = tokenizers.Tokenizer(model())
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    default = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    texts = [Path(__file__).read_text()]
    if trainer is None:  # also texts like those of the tests, so that whatever stays together in them becomes tokens
        texts += ("".join(random.Random(n).choices(ATOMS, k=50)) for n in range(300))
    backend.train_from_iterator(texts, trainer or default)
    backend.add_special_tokens([EOS])
    backend.add_tokens(list(tokens))
    return backend


def unigram():
    return trainers.UnigramTrainer(vocab_size=400, special_tokens=["?"], unk_token="?", show_progress=False)


def word_level():
    return trainers.WordLevelTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)


def added(*contents, **options):
    return [AddedToken(content, **options) for content in contents]


SPLIT = {
    "bytes": lambda: byte_tokenizer().backend,
    "gpt2": lambda: trained(byte_level()),
    "gpt2_with_prefix": lambda: trained(byte_level(prefix=True)),
    "neox": lambda: trained(byte_level(), normalizers.NFC(), added(*(" " * n for n in range(2, 25)), normalized=True)),
    "cl100k": lambda: trained(split(CL100K), None, added("|||IP|||", "a.b", "<|", normalized=False)),
    "cl100k_removed": lambda: trained(split(CL100K, "removed", invert=True)),
    "qwen": lambda: trained(split(CL100K.replace("{1,3}", "")), normalizers.NFC(), added("K.k", normalized=True)),
    "o200k": lambda: trained(split(O200K)),
    "digits": lambda: trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])),
    "nfkc_lowercase": lambda: trained(
        byte_level(), normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), added("fi.", normalized=True)
    ),
    "nfd": lambda: trained(byte_level(), normalizers.NFD()),
    "metaspace": lambda: trained(pre_tokenizers.Metaspace(prepend_scheme="first"), trainer=unigram()),
    "metaspace_always": lambda: trained(pre_tokenizers.Metaspace(prepend_scheme="always"), trainer=unigram()),
    "whitespace": lambda: trained(pre_tokenizers.Whitespace(), trainer=word_level()),
    "whitespace_split": lambda: trained(pre_tokenizers.WhitespaceSplit(), trainer=word_level()),
}
WHOLE = {
    "unknown_pattern": lambda: trained(split(r"\w+ \w+|.")),
    "looks_behind": lambda: trained(split(CL100K + r"|(?<=a) b")),
    "removes_matches": lambda: trained(split(CL100K, "removed")),
    "merges_across_words": lambda: trained(byte_level(regex=False)),
    "prepends": lambda: trained(byte_level(), normalizers.Prepend("x")),
    "strips": lambda: trained(byte_level(), normalizers.Strip()),
    "whole_metaspace": lambda: trained(pre_tokenizers.Metaspace(split=False), trainer=unigram()),
    "token_strips": lambda: trained(byte_level(), None, added("<|", rstrip=True)),
    "token_is_a_word": lambda: trained(byte_level(), None, added("dog", single_word=True)),
    "token_composes": lambda: trained(byte_level(), normalizers.NFC(), added("\u00e9", normalized=True)),
}


def chunks(splitter, text):
    ends = splitter.chunk_ends(text)
    found = [text[start:end] for start, end in itertools.pairwise([0, *ends])]
    assert "".join(found) == text
    return found


@pytest.mark.parametrize("name", SPLIT)
def test_chunks_encode_to_the_ids_of_the_whole(name, monkeypatch):
    backend = SPLIT[name]()
    tokenizer, splitter, rng, cuts = Tokenizer(backend, 0), Splitter(backend), random.Random(name), 0
    for number in range(250):
        monkeypatch.setattr(splitting, "CHUNK_CHARACTERS", rng.choice([1, 2, 5, 13]))
        atoms = rng.sample(ATOMS, rng.randint(2, 12)) if number % 2 else ATOMS
        text = "".join(rng.choices(atoms, k=rng.randint(5, 120)))
        found = chunks(splitter, text)
        ids = [ids.tolist() for ids in tokenizer.encode_batch(found)]
        assert [*itertools.chain(*ids)] == tokenizer.encode(text).tolist(), (text, found)
        cuts += len(found) - 1
    assert cuts > 150


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_split_for_certain_is_whole(name, monkeypatch):
    monkeypatch.setattr(splitting, "CHUNK_CHARACTERS", 1)
    splitter = Splitter(WHOLE[name]())
    assert chunks(splitter, "a dog, and 12 dogs.\n" * 20) == ["a dog, and 12 dogs.\n" * 20]
    monkeypatch.setattr(splitting, "MAX_CHUNK_BYTES", 100)
    with pytest.raises(BadRecordError, match=r"^has more than 0 MiB from character 0 on that this tokenizer can only"):
        splitter.chunk_ends("a dog, and 12 dogs.\n" * 20)


@pytest.mark.parametrize("stretch", ["x", " ", "\u6570", "\U0001f469\u200d", "\n", "="])
def test_a_long_stretch_without_a_cut_is_one_chunk(stretch, monkeypatch):
    splitter = Splitter(SPLIT["cl100k"]())
    text = "a b " * 50 + stretch * 3000 + " and so on" * 50
    monkeypatch.setattr(splitting, "CHUNK_CHARACTERS", 50)
    found = chunks(splitter, text)
    assert max(map(len, found)) < 3000 * len(stretch) + 50
    assert sum(len(part) <= 50 for part in found) > 8
    monkeypatch.setattr(splitting, "MAX_CHUNK_BYTES", 2000)
    with pytest.raises(BadRecordError, match=r"from character 1\d\d on that this tokenizer"):
        splitter.chunk_ends(text)


def test_chunks_are_as_long_as_they_may_be():
    backend = byte_tokenizer().backend
    text = "\u6570" * 200_000
    assert Splitter(backend).chunk_ends(text) == [1 << 16, 2 << 16, 3 << 16, 200_000]
    assert Tokenizer(backend, 256).chunk_ends("") == []
    assert Tokenizer(backend, 256).chunk_ends("short") == [5]
