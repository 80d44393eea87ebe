"""Decoding a few tokens at a time: its cost, and what waits for the end."""

import pytest

from flexolmo_jax.data.tokenization.decoding import IncrementalDecoder
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer
from tests.support import kinds


@pytest.mark.parametrize("kind", [kind for kind in kinds.KINDS if kind not in kinds.WHOLE])
def test_a_long_text_is_decoded_a_few_tokens_at_a_time(kind, tmp_path, monkeypatch):
    tokenizer, decoded = kinds.load(kind, tmp_path), []
    decode = Tokenizer.decode
    ids = 100 * tokenizer.encode("the end of the document").tolist()
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: decoded.append(len(ids)) or decode(self, ids))
    decoder = IncrementalDecoder(tokenizer)
    text = "".join(decoder.add([id]) for id in ids) + decoder.tail
    assert text == decode(tokenizer, ids)
    assert sum(decoded) < 40 * len(ids)


def test_bytes_are_not_decoded_until_they_end(tmp_path, monkeypatch):
    tokenizer, decoded = kinds.load("bpe_with_byte_fallback", tmp_path), []
    character = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "語".encode()]
    word = tokenizer.encode("dog").tolist()
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: decoded.append(len(ids)) or decode(self, ids))
    decoder = IncrementalDecoder(tokenizer)
    assert decoder.add(word) == "dog"
    decoded.clear()
    assert [decoder.add([id]) for id in 100 * character] == [""] * 300
    assert decoded == []
    assert decoder.add(word) == 100 * "語" + " dog"


@pytest.mark.parametrize("kind", kinds.WHOLE)
def test_text_that_may_change_to_its_end_comes_at_the_end(kind, tmp_path):
    tokenizer = kinds.load(kind, tmp_path)
    ids = tokenizer.encode("the end of the document").tolist()
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.add([id]) for id in ids] == [""] * len(ids)
    assert decoder.tail == tokenizer.decode(ids)
