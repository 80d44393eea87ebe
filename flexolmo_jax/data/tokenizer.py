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

from flexolmo_jax.data.bad_records import BadRecordError
from flexolmo_jax.data.special_tokens import (
    KNOWN_EOS,
    may_come_from_text,
    special_ids,
    unknown_token,
    without_special_tokens,
)
from flexolmo_jax.data.splitting import PIECE_CHARACTERS, Splitter
from flexolmo_jax.errors import UserError, rust_errors

BYTES = "bytes"
_RARE = "\U00012000\U0010fffd"  # where a tokenizer has tokens for these characters, it has them for all
_LARGEST_FILE = 1 << 29  # bytes; the largest tokenizers have a tenth of it
_SAVE = "transformers writes one: AutoTokenizer.from_pretrained(DIR).save_pretrained(OUT)"


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` and its end-of-sequence token, made by `load_tokenizer`.

    Attributes:
      backend: the tokenizer as its file has it.
      eos_id: the id that closes a document; no text is ever encoded to it.
      label: what errors call it.
      file: the content of its `tokenizer.json`; None: it has none yet.
    """

    backend: tokenizers.Tokenizer
    eos_id: int
    label: str = "the tokenizer"
    file: str | None = None

    def __post_init__(self):
        # tokenizer.json keeps truncation and padding, and forgets this flag.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True

    @functools.cached_property
    def plain(self) -> tokenizers.Tokenizer:
        """The tokenizer that encodes and decodes: the same ids, but special tokens' names are plain text."""
        return without_special_tokens(self.backend, self.backend.id_to_token(self.eos_id))

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """The id that stands for unknown text; None: there is none."""
        name = unknown_token(self.plain)
        return None if name is None else self.plain.token_to_id(name)

    @functools.cached_property
    def drops_unknown(self) -> bool:
        """Whether characters without a token give none, and are lost."""
        once, twice = _ids_if_any(self, _RARE), _ids_if_any(self, 2 * _RARE)
        return self.unknown_id is None and once is not None and once == twice

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
        """Returns the ids of `text`, int32 [length], with no special token before, after or within.

        Raises:
          UserError: the tokenizer has no token for a part of the text, nor one for unknown text.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes many texts at once, in parallel; an int32 array [length] for each, as `encode` gives."""
        try:
            with rust_errors(f"{self.label}: cannot encode a text", "choose another tokenizer"):
                encodings = self.plain.encode_batch_fast(list(texts), add_special_tokens=False)
        except UserError as error:
            raise self._unknown_text(texts) or error from error.__cause__
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def piece_ends(self, text: str) -> list[int]:
        """Returns where the pieces of `text` end that, encoded each alone, give the ids of the whole.

        Raises:
          BadRecordError: a piece is too large to be encoded, since this tokenizer cannot be split there.
        """
        if len(text) <= PIECE_CHARACTERS:
            return [len(text)] if text else []
        return self._splitter.piece_ends(text)

    def check(self, text: str) -> None:
        """Raises BadRecordError where `text` cannot be encoded: too large at once, or a part of it has no token."""
        self.piece_ends(text)
        if self._refuses_unknown:
            try:
                self.encode(text)
            except UserError as error:
                raise BadRecordError(str(error)) from error

    @functools.cached_property
    def _refuses_unknown(self) -> bool:
        """Whether text without a token cannot be encoded at all."""
        return _ids_if_any(self, _RARE) is None

    @functools.cached_property
    def _splitter(self) -> Splitter:
        return Splitter(self.plain)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids` [length]; special tokens give none, and broken UTF-8 gives U+FFFD."""
        return self.plain.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

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
        special = set(special_ids(self.plain).values())
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, id in self.backend.get_vocab(with_added_tokens=True).items():
            if id not in special:
                lengths[id] = len(token) if alphabet.issuperset(token) else len(token.encode())
        return lengths

    def save(self, path: epath.PathLike) -> None:
        """Writes a `tokenizer.json` that `load_tokenizer` and `transformers` read: the one that was loaded, as it was.

        Written anew, the scores of a Unigram model would not always be read as the same numbers.
        """
        epath.Path(path).write_bytes((self.file or self.backend.to_str(pretty=True)).encode())

    def _unknown_text(self, texts: Sequence[str]) -> UserError | None:
        """What of which text has no token; None where that is not what is wrong."""
        for text in texts:
            piece = _first_failing(self.plain, text)
            if piece is not None:
                return UserError(
                    f"{self.label}: has no token for {piece[:40]!r}, in the text {text[:40]!r}, nor one for unknown "
                    "text (unk_token); choose a tokenizer that has one"
                )
        return None


def byte_tokenizer() -> Tokenizer:
    """Returns the tokenizer of raw UTF-8: id b is byte b, and id 256 is `<|endoftext|>`."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([KNOWN_EOS[0]])
    return Tokenizer(backend, eos_id=256)


def load_tokenizer(
    source: epath.PathLike,
    eos_token: str | None = None,
    *,
    eos_id: int | None = None,
    label: str | None = None,
    eos_label: str | None = None,
) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      source: a `tokenizer.json`, or "bytes" for `byte_tokenizer`.
      eos_token: the token that closes documents; by default the first well-known name in the vocabulary, and one that
        is marked as special before those that are not.
      eos_id: the same as an id, for those who kept it with the file; it stands before `eos_token`.
      label: what to call the source in errors; by default --tokenizer and its name, or its name if `eos_id` is given.
      eos_label: where the user says which token EOS is, for errors; by default --eos_token.

    Raises:
      UserError: the file is missing or is no tokenizer, or no token can serve as EOS.
    """
    label = label or (f"--tokenizer={source}" if eos_id is None else str(source))
    eos_label = eos_label or ("--eos_token" if eos_id is None else "--eos_token of `flexolmo tokenize`")
    backend, file = (byte_tokenizer().backend, None) if source == BYTES else _read(epath.Path(source), label)
    chosen = _find_eos(backend, label, eos_token, eos_label) if eos_id is None else eos_id
    tokenizer = Tokenizer(backend, chosen, label, file)
    _check_eos(tokenizer, eos_label, kept=eos_id is not None)
    return tokenizer


def _read(path: epath.Path, label: str) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer of a file, and the file's content."""
    if path.is_dir():
        missing = "" if (path / "tokenizer.json").exists() else f", or make one ({_SAVE})"
        raise UserError(f"{label}: is a directory; name the tokenizer.json in it{missing}")
    if not path.exists():
        raise UserError(f'{label}: no such file; name a tokenizer.json, or "{BYTES}"')
    if path.stat().length > _LARGEST_FILE:
        raise UserError(f"{label}: is too large for a tokenizer.json ({path.stat().length:,} bytes); name another file")
    refused = f"{label}: is not a tokenizer.json of Hugging Face"
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{refused} ({error.reason}); {_SAVE}") from error
    with rust_errors(refused, _SAVE):
        return tokenizers.Tokenizer.from_str(text), text


def _find_eos(backend: tokenizers.Tokenizer, label: str, eos_token: str | None, eos_label: str) -> int:
    names = KNOWN_EOS if eos_token is None else (eos_token,)
    ids = [id for name in names if (id := backend.token_to_id(name)) is not None]
    if ids:
        special = special_ids(backend).values()
        return min(ids, key=lambda id: id not in special)
    if eos_token is None:
        raise UserError(f"{label}: has no EOS token of a known name; say which it is with {eos_label}")
    raise UserError(f"{eos_label}={eos_token}: is not in the vocabulary of {label}")


def _check_eos(tokenizer: Tokenizer, eos_label: str, kept: bool) -> None:
    """Raises UserError where plain text could be encoded to EOS, or its name, if a model was trained with it."""
    backend, label, eos_id = tokenizer.backend, tokenizer.label, tokenizer.eos_id
    eos = backend.id_to_token(eos_id)
    if eos is None:
        raise UserError(f"{label}: has no token {eos_id}, the EOS; name the right tokenizer.json")
    others = [name for name, id in backend.get_vocab().items() if id == eos_id and name != eos]
    if others:
        raise UserError(f"{label}: has the id {eos_id} for {eos!r}, its EOS, and for {others[0]!r}; fix its ids")
    named = {*special_ids(backend), *KNOWN_EOS}
    if eos not in named:  # it may be a word, and is not hidden from texts
        if eos_id in (_ids_if_any(tokenizer, eos) or ()) or (not kept and may_come_from_text(backend, eos)):
            raise UserError(
                f"{label}: encodes the plain text {eos!r} as its EOS; "
                f"mark that token special in added_tokens, or choose another with {eos_label}"
            )
    elif any(eos_id in (_ids_if_any(tokenizer, text) or ()) for text in (_RARE, eos)):
        raise UserError(f"{label}: {eos!r} is EOS and stands for unknown text too; choose another with {eos_label}")


def _ids_if_any(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """The ids of a text, or None where the tokenizer refuses it."""
    try:
        return tokenizer.encode(text).tolist()
    except UserError:
        return None


def _first_failing(backend: tokenizers.Tokenizer, text: str) -> str | None:
    """The first word of a text, or character of a word, that the tokenizer's model has no token for."""
    try:
        with rust_errors(text, ""):
            normalized = backend.normalizer.normalize_str(text) if backend.normalizer else text
            split = backend.pre_tokenizer.pre_tokenize_str(normalized) if backend.pre_tokenizer else [(normalized, ())]
    except UserError:
        return None
    word = next((word for word, _ in split if _fails(backend, word)), None)
    if word is None or not isinstance(backend.model, models.Unigram):
        return word
    return next((character for character in word if _fails(backend, character)), word)


def _fails(backend: tokenizers.Tokenizer, word: str) -> bool:
    try:
        with rust_errors(word, ""):
            backend.model.tokenize(word)
    except UserError:
        return True
    return False


def _byte_vocabulary() -> dict[str, int]:
    """The characters that stand for bytes: themselves where printable, else U+0100 and on, in order."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: ord(character) for character in characters if ord(character) < 256}
    others = sorted(set(range(256)) - set(vocabulary.values()))
    return vocabulary | dict(zip(characters[len(vocabulary) :], others, strict=True))
