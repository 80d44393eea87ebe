"""The tokenizer against UTF-8 itself, and against tokenizer files with every trap a file can hold."""

import hashlib
import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer, load_tokenizer
from flexolmo_jax.errors import UserError
from tests.support import kinds

EOS = "<|endoftext|>"
TEXTS = [
    "plain",
    " leading and trailing \n\t\r\n",
    f"{EOS}, {EOS}{EOS} and <|endof",
    "naïve café, 数学, שלום, 🧑‍🔬, e\u0301, \u00a0\u2028\ufeff\x00\x7f",
    "".join(map(chr, range(256))),
]


def random_text(seed: int, length: int = 2000) -> str:
    rng = random.Random(seed)
    points = (rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]) for _ in range(length))
    return "".join(map(chr, points))


def word_tokenizer(*words: str, special: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(special))
    return backend


def write(path, backend: tokenizers.Tokenizer):
    path.write_text(backend.to_str(), encoding="utf-8")
    return path


@pytest.mark.parametrize("text", [*TEXTS, random_text(0), random_text(1)])
def test_byte_tokenizer_is_utf8(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, np.frombuffer(text.encode(), np.uint8))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


def test_byte_tokenizer_constants():
    tokenizer = byte_tokenizer()
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (256, 257)
    assert tokenizer.backend.id_to_token(256) == EOS
    assert tokenizer.decode([0x61, 0xFF, 0x62]) == "a\ufffdb"


def test_encode_batch_is_encode_of_each():
    tokenizer = byte_tokenizer()
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode("").shape == (0,)


def test_save_and_load(tmp_path):
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.eos_id, loaded.vocab_size, loaded.digest) == (256, 257, tokenizer.digest)
    record = json.loads((tmp_path / "tokenizer.json").read_bytes())
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    assert loaded.digest == hashlib.sha256(canonical).hexdigest()
    for text in TEXTS:
        np.testing.assert_array_equal(loaded.encode(text), np.frombuffer(text.encode(), np.uint8))


def test_digest_is_of_content_not_of_layout(tmp_path):
    backend = word_tokenizer("?", "a", "b", special=("</s>",))
    record = json.loads(backend.to_str())
    compact, shuffled = tmp_path / "a.json", tmp_path / "b.json"
    compact.write_text(json.dumps(record, separators=(",", ":")))
    shuffled.write_text(json.dumps(dict(reversed(record.items())), indent=3))
    other = write(tmp_path / "c.json", word_tokenizer("?", "a", "c", special=("</s>",)))
    assert load_tokenizer(compact).digest == load_tokenizer(shuffled).digest
    assert load_tokenizer(compact).digest != load_tokenizer(other).digest


def test_encode_adds_drops_and_pads_nothing(tmp_path):
    backend = word_tokenizer("?", "a", "b", special=("<s>", "</s>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 4)]
    )
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    assert len(backend.encode("a b a b").ids) == 8
    tokenizer = load_tokenizer(write(tmp_path / "tokenizer.json", backend))
    assert tokenizer.encode("a b a b").tolist() == [1, 2, 1, 2]
    assert tokenizer.encode("a </s> <s>").tolist() == [1, 0, 0]


def test_vocabulary_with_holes_counts_up_to_the_largest_id(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"?": 0, "a": 7, "</s>": 99}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    assert load_tokenizer(write(tmp_path / "tokenizer.json", backend)).vocab_size == 100


def test_eos_is_the_argument_or_a_known_name(tmp_path):
    path = write(tmp_path / "tokenizer.json", word_tokenizer("?", "a", special=("<stop>", "<eos>", "</s>")))
    assert load_tokenizer(path).eos_id == 4
    assert load_tokenizer(path, "<eos>").eos_id == 3
    assert load_tokenizer(path, "<stop>").eos_id == 2
    assert load_tokenizer(path, eos_id=2).eos_id == 2


@pytest.mark.parametrize(
    ("special", "eos_token", "message"),
    [
        (("<stop>",), None, r"^.*tokenizer\.json: .*say which it is with eos_token$"),
        (("</s>",), "<stop>", r"^eos_token=<stop>: is not in the vocabulary of .*json$"),
        (("</s>",), "a", r"^.*: encodes the plain text 'a' as its EOS; "),
    ],
)
def test_eos_errors(tmp_path, special, eos_token, message):
    path = write(tmp_path / "tokenizer.json", word_tokenizer("?", "a", special=special))
    with pytest.raises(UserError, match=message):
        load_tokenizer(path, eos_token)


@pytest.mark.parametrize(
    ("special", "eos_id", "message"),
    [
        (("<stop>",), None, r"^the file: has no EOS token of a known name; say which it is with the key$"),
        (("</s>",), 1, r"^the file: encodes the plain text 'a' as its EOS; .* choose another with the key$"),
        (("</s>",), 9, r"^the file: has no token 9, the EOS; "),
        (None, None, r"^the file: is not a tokenizer.json"),
    ],
)
def test_errors_name_what_the_caller_says(tmp_path, special, eos_id, message):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}" if special is None else word_tokenizer("?", "a", special=special).to_str())
    with pytest.raises(UserError, match=message):
        load_tokenizer(path, eos_id=eos_id, label="the file", eos_label="the key")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "is not a tokenizer.json"),
        (b'{"a": 1}', "is not a tokenizer.json"),
        (b"[1, 2", "is not a tokenizer.json"),
        (b"\xff\xfe{}", "is not a tokenizer.json"),
    ],
)
def test_file_errors(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}: {message}") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_directory_instead_of_file(tmp_path):
    with pytest.raises(UserError, match=r"is a directory; name the tokenizer\.json in it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "2.0"}, "Unknown tokenizer version '2.0'"),
        ({"model": {"type": "Novel"}}, "ModelUntagged"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "Cannot parse precompiled_charsmap"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
            "parenthesis",
        ),
    ],
)
def test_a_file_that_tokenizers_cannot_read_is_one_line(changes, reason, tmp_path, capfd):
    """One of them panics, and would write a stack to standard error."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(word_tokenizer("?", "</s>").to_str()) | changes))
    with pytest.raises(UserError, match=reason) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
    assert "save_pretrained(OUT)" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UserError, match=r"too large for a tokenizer\.json \(1,073,741,824 bytes\)"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("model", "text", "word"),
    [
        (models.WordLevel({"a": 0, "</s>": 1}), "a a wörd b", "'wörd'"),
        (models.WordPiece({"a": 0, "##a": 1, "</s>": 2}), "aa wörd", "'wörd'"),
        (models.Unigram([("a", -1.0), ("</s>", 0.0)]), "aaöa", "'ö'"),
    ],
)
def test_text_that_has_no_token_is_named(model, text, word, tmp_path):
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    path = write(tmp_path / "tokenizer.json", backend)
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("a").tolist() == [0]
    with pytest.raises(UserError, match=rf"^{path}: has no token for {word}, in the text '{text}', nor"):
        tokenizer.encode_batch(["a", text])
    assert (tokenizer.unknown_id, tokenizer.drops_unknown) == (None, False)


def test_what_stands_for_unknown_text(tmp_path):
    names = {"unigram": "<unk>", "wordpiece": "[UNK]", "word_level": "[UNK]", "bpe_with_suffix": "<unk>"}
    for kind in kinds.KINDS:
        tokenizer = kinds.load(kind, tmp_path)
        if kind in names:
            assert tokenizer.unknown_id == tokenizer.backend.token_to_id(names[kind])
        assert tokenizer.drops_unknown == (kind == "bpe_without_unknown")
