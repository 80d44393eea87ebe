"""Text to token ids and back: every tokenizer is a Hugging Face `tokenizers` one (`tokenizer.json`)."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers

from flexolmo_jax.data.splitting import PIECE_CHARACTERS, Splitter
from flexolmo_jax.errors import UserError, rust_errors

BYTES = "bytes"
_KNOWN_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` and its end-of-sequence token, made by `load_tokenizer`.

    Attributes:
      backend: what encodes and decodes.
      eos_id: the id that closes a document; no text is ever encoded to it.
    """

    backend: tokenizers.Tokenizer
    eos_id: int

    def __post_init__(self):
        # tokenizer.json keeps truncation and padding, and forgets this flag.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding table needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, of the serialised tokenizer with sorted keys and no spaces."""
        canonical = json.dumps(json.loads(self.backend.to_str()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32 [length], with no special token before, after or within."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes many texts at once, in parallel; an int32 array [length] for each, as `encode` gives."""
        with rust_errors("the tokenizer cannot encode a text", "mend its tokenizer.json, or choose another"):
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def piece_ends(self, text: str) -> list[int]:
        """Returns where the pieces of `text` end that, encoded each alone, give the ids of the whole.

        Raises:
          BadRecordError: a piece is too large to be encoded, since this tokenizer cannot be split there.
        """
        if len(text) <= PIECE_CHARACTERS:
            return [len(text)] if text else []
        return self._splitter.piece_ends(text)

    @functools.cached_property
    def _splitter(self) -> Splitter:
        return Splitter(self.backend)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids` [length]; special tokens give none, and broken UTF-8 gives U+FFFD."""
        return self.backend.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def count_bytes(self, ids: np.ndarray) -> int:
        """Returns the number of UTF-8 bytes of the text that was encoded to `ids` [length].

        A byte-level tokenizer need not decode them, which takes some 100 bytes of memory for each.
        """
        if isinstance(self.backend.decoder, decoders.ByteLevel):
            return int(self._bytes_of_tokens[ids].sum())
        return len(self.decode(ids).encode())

    @functools.cached_property
    def _bytes_of_tokens(self) -> np.ndarray:
        """The number of bytes that each id decodes to in a byte-level tokenizer, int64 [vocab_size]."""
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        special = {id for id, token in self.backend.get_added_tokens_decoder().items() if token.special}
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, id in self.backend.get_vocab(with_added_tokens=True).items():
            if id not in special:
                lengths[id] = len(token) if alphabet.issuperset(token) else len(token.encode())
        return lengths

    def save(self, path: epath.PathLike) -> None:
        """Writes a `tokenizer.json` that `load_tokenizer` and `transformers` read."""
        epath.Path(path).write_bytes(self.backend.to_str(pretty=True).encode())


def byte_tokenizer() -> Tokenizer:
    """Returns the tokenizer of raw UTF-8: id b is byte b, and id 256 is `<|endoftext|>`."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_KNOWN_EOS[0]])
    return Tokenizer(backend, eos_id=256)


def load_tokenizer(
    source: epath.PathLike,
    eos_token: str | None = None,
    *,
    eos_id: int | None = None,
    label: str | None = None,
    eos_label: str = "--eos_token",
) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      source: a `tokenizer.json`, or "bytes" for `byte_tokenizer`.
      eos_token: the token that closes documents; by default the first well-known name in the vocabulary.
      eos_id: the same as an id, for those who kept it with the file; it stands before `eos_token`.
      label: what to call the source in errors; by default --tokenizer and its name.
      eos_label: where the user says which token EOS is, for errors.

    Raises:
      UserError: the file is missing or is no tokenizer, or no token can serve as EOS.
    """
    label = label or f"--tokenizer={source}"
    backend = byte_tokenizer().backend if source == BYTES else _read(epath.Path(source), label)
    tokenizer = Tokenizer(backend, _find_eos(backend, label, eos_token, eos_label) if eos_id is None else eos_id)
    eos_text = backend.id_to_token(tokenizer.eos_id)
    if eos_text is None:
        raise UserError(f"{label}: has no token {eos_id}, the EOS; name the right tokenizer.json")
    if tokenizer.eos_id in tokenizer.encode(eos_text):
        raise UserError(
            f"{label}: encodes the plain text {eos_text!r} as its EOS; "
            f"mark that token special in added_tokens, or choose another with {eos_label}"
        )
    return tokenizer


def _read(path: epath.Path, label: str) -> tokenizers.Tokenizer:
    if path.is_dir():
        raise UserError(f"{label}: is a directory; name the tokenizer.json in it")
    if not path.exists():
        raise UserError(f'{label}: no such file; name a tokenizer.json, or "{BYTES}"')
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{label}: is not a tokenizer.json of Hugging Face ({error.reason}); name another") from error
    with rust_errors(f"{label}: is not a tokenizer.json of Hugging Face", "name another, or fetch it again"):
        return tokenizers.Tokenizer.from_str(text)


def _find_eos(backend: tokenizers.Tokenizer, label: str, eos_token: str | None, eos_label: str) -> int:
    names = _KNOWN_EOS if eos_token is None else (eos_token,)
    ids = [id for name in names if (id := backend.token_to_id(name)) is not None]
    if ids:
        return ids[0]
    if eos_token is None:
        raise UserError(f"{label}: has no EOS token of a known name; say which it is with {eos_label}")
    raise UserError(f"{eos_label}={eos_token}: is not in the vocabulary of {label}")


def _byte_vocabulary() -> dict[str, int]:
    """The characters that stand for bytes: themselves where printable, else U+0100 and on, in order."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: ord(character) for character in characters if ord(character) < 256}
    others = sorted(set(range(256)) - set(vocabulary.values()))
    return vocabulary | dict(zip(characters[len(vocabulary) :], others, strict=True))
