"""Text to token ids and back, with a tokenizer of Hugging Face's `tokenizers` (`tokenizer.json`).

`tokenizers` encodes the name of a special token as that token if the model's own vocabulary contains it: "</s>" in a
text would end the document. So texts are encoded by a copy of the tokenizer in which such an entry has the same id and
a name that no text contains.
"""

import dataclasses
import functools
import hashlib
import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers

from flexolmo_jax.data.text.bad_records import BadRecordError
from flexolmo_jax.data.tokenization.splitting import CHUNK_CHARACTERS, Splitter
from flexolmo_jax.errors import UserError, rust_errors

BYTES = "bytes"
KNOWN_EOS = (
    *("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]"),
    *("<EOS>", "<|eos|>", "<|EOS|>", "<end_of_text>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)
_RARE = "\U00012000\U0010fffd"  # where a tokenizer has tokens for these characters, it has them for all
_LARGEST_FILE = 1 << 29  # bytes; the largest tokenizers have a tenth of it
_SAVE = "transformers writes one: AutoTokenizer.from_pretrained(DIR).save_pretrained(OUT)"


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` and its end-of-sequence token, made by `load_tokenizer`.

    Attributes:
      backend: the tokenizer as its file has it.
      eos_id: the id that terminates a document; no text is encoded to it.
      label: its name in errors.
      file: content of its `tokenizer.json`, if it was loaded from one.
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
        return without_special_tokens(self.backend, str(self.backend.id_to_token(self.eos_id)))

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

    def unknown_text(self, unknown: int, tokens: int) -> str | None:
        """A warning where encoding loses text: characters have no token, or `unknown` of `tokens` are `unknown_id`."""
        if self.drops_unknown:
            return f"{self.label}: has no token for unknown text; characters that it does not know were left out"
        if not unknown or self.unknown_id is None:
            return None
        name = self.backend.id_to_token(self.unknown_id)
        return f"{unknown:,} of {tokens:,} tokens ({unknown / tokens:.2%}) are {name!r}, unknown text"

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the size that an embedding table needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, of the serialised tokenizer with sorted keys and no spaces."""
        canonical = json.dumps(json.loads(self.backend.to_str()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32 [length], with no special token before, after or within.

        Raises:
          UserError: characters of the text have no token, and there is none for unknown text.
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

    def chunk_ends(self, text: str) -> list[int]:
        """Returns the ends of chunks of `text` that, encoded separately, give the ids of the whole.

        Raises:
          BadRecordError: a chunk is too large to encode, and this tokenizer does not allow to split it.
        """
        if len(text) <= CHUNK_CHARACTERS:
            return [len(text)] if text else []
        return self._splitter.chunk_ends(text)

    def check(self, text: str) -> None:
        """Raises BadRecordError where `text` cannot be encoded: a chunk is too large, or characters have no token."""
        self.chunk_ends(text)
        if self._refuses_unknown:
            try:
                self.encode(text)
            except UserError as error:
                raise BadRecordError(str(error), "no token") from error

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

    @property
    def is_byte_level(self) -> bool:
        """Whether each id stands for bytes of its own, whatever is around it."""
        return isinstance(self.backend.decoder, decoders.ByteLevel)

    def count_bytes(self, ids: np.ndarray) -> int:
        """Returns the number of UTF-8 bytes of the text that was encoded to `ids` [length].

        Ids of a byte-level tokenizer are not decoded, since that takes some 100 bytes of memory per id.
        """
        if self.is_byte_level:
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
        """Writes a `tokenizer.json` that `load_tokenizer` and `transformers` read; a loaded file is copied.

        Serialized again, the scores of a Unigram model could change in the last digit.
        """
        epath.Path(path).write_bytes((self.file or self.backend.to_str(pretty=True)).encode())

    def _unknown_text(self, texts: Sequence[str]) -> UserError | None:
        """The error for characters without a token; None where that is not the problem."""
        for text in texts:
            failing = _first_failing(self.plain, text)
            if failing is not None:
                return UserError(
                    f"{self.label}: has no token for {failing[:40]!r}, in the text {text[:40]!r}, nor one for unknown "
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
      eos_token: the token that terminates documents; by default the first well-known name in the vocabulary, special
        tokens first.
      eos_id: the same as an id; it takes precedence over `eos_token`.
      label: name of the source in errors; by default `source`.
      eos_label: name of the option that selects EOS, for errors; by default "eos_token".

    Raises:
      UserError: the file is missing or is not a tokenizer, or no token can serve as EOS.
    """
    label = label or str(source)
    eos_label = eos_label or "eos_token"
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
    """Raises UserError where plain text could be encoded to EOS.

    With `kept`, a model was trained with this EOS: only the text of its name is tried.
    """
    backend, label, eos_id = tokenizer.backend, tokenizer.label, tokenizer.eos_id
    eos = backend.id_to_token(eos_id)
    if eos is None:
        raise UserError(f"{label}: has no token {eos_id}, the EOS; name the right tokenizer.json")
    others = [name for name, id in backend.get_vocab().items() if id == eos_id and name != eos]
    if others:
        raise UserError(f"{label}: has the id {eos_id} for {eos!r}, its EOS, and for {others[0]!r}; fix its ids")
    named = {*special_ids(backend), *KNOWN_EOS}
    if eos not in named:  # it may be a word, which texts may contain
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
    """The characters that represent bytes: themselves where printable, else U+0100, U+0101, ... in order."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: ord(character) for character in characters if ord(character) < 256}
    others = sorted(set(range(256)) - set(vocabulary.values()))
    return vocabulary | dict(zip(characters[len(vocabulary) :], others, strict=True))


def special_ids(backend: tokenizers.Tokenizer) -> dict[str, int]:
    """{name: id} of the tokens that `tokenizer.json` marks as special."""
    return {token.content: id for id, token in backend.get_added_tokens_decoder().items() if token.special}


def unknown_token(backend: tokenizers.Tokenizer) -> str | None:
    """The name of the token that stands for unknown text, where the vocabulary has one."""
    if isinstance(backend.model, models.Unigram):  # it does not say
        id = json.loads(backend.to_str())["model"]["unk_id"]
        return None if id is None else backend.model.id_to_token(id)
    name = backend.model.unk_token
    return None if name is None or backend.model.token_to_id(name) is None else name


def may_come_from_text(backend: tokenizers.Tokenizer, name: str) -> bool:
    """Whether encoding plain text can give the token of that name, which is in the vocabulary."""
    id = backend.token_to_id(name)
    added = None if id is None else backend.get_added_tokens_decoder().get(id)
    if added and not added.special:
        return True
    if backend.model.token_to_id(name) is None:
        return False
    return not isinstance(backend.model, models.BPE) or _is_merged(json.loads(backend.to_str())["model"], name)


def without_special_tokens(backend: tokenizers.Tokenizer, eos: str) -> tokenizers.Tokenizer:
    """A tokenizer with the same ids that encodes the names of special tokens as plain text.

    Decoding skips special tokens, and `eos` if it has a well-known name, marked as special or not; another name may be
    a word. The token for unknown text is unchanged. Dropout is off, and decoders that fail on short texts are replaced.
    Returns `backend` itself if nothing has to change.
    """
    special = special_ids(backend)
    marks_eos = eos in KNOWN_EOS and eos not in special
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else None
    inside = {name for name in {*special, *([eos] * marks_eos)} if backend.model.token_to_id(name) is not None}
    as_it_is = not marks_eos and _total(decoder) == decoder and not getattr(backend.model, "dropout", None)
    if as_it_is and not inside:
        return backend
    document = json.loads(backend.to_str())
    model = document["model"]
    hidden = {name for name in inside - {unknown_token(backend)} if model["type"] != "BPE" or _is_merged(model, name)}
    if as_it_is and not hidden:
        return backend
    names = {name: f"\U0010ffff{secrets.token_hex(16)}" for name in hidden}
    added = document["added_tokens"]
    if marks_eos:
        others = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [token for token in added if token["content"] != eos]
        added.append({"id": backend.token_to_id(eos), "content": eos, "special": True} | others)
    document["added_tokens"] = [token | {"content": names.get(token["content"], token["content"])} for token in added]
    document |= {"decoder": _total(decoder), "post_processor": None, "model": _renamed(model, names)}
    copy = tokenizers.Tokenizer.from_str(json.dumps(document))
    copy.encode_special_tokens = True
    return copy


def _is_merged(model: Mapping[str, Any], name: str) -> bool:
    """Whether a BPE model encodes plain text to that token: a single character, a whole word, or a merge."""
    prefix = len(model["continuing_subword_prefix"] or "")
    merged = (first + second[prefix:] for first, second in model["merges"])
    return model["ignore_merges"] or len(name) == 1 or any(token == name for token in merged)


def _renamed(model: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The same model with other names for some tokens, and without the merges that involve them."""
    if model["type"] == "Unigram":
        return model | {"vocab": [[names.get(token, token), score] for token, score in model["vocab"]]}
    renamed = model | {"vocab": {names.get(name, name): id for name, id in model["vocab"].items()}}
    if model["type"] != "BPE":
        return renamed
    prefix = len(model["continuing_subword_prefix"] or "")
    merges = [pair for pair in model["merges"] if not _concerns(pair[0], pair[1], prefix, names.keys())]
    return renamed | {"merges": merges, "dropout": None}


def _concerns(first: str, second: str, prefix: int, names: Collection[str]) -> bool:
    return first in names or second in names or first + second[prefix:] in names


def _total(decoder: Any) -> Any:
    """An equivalent decoder that does not fail on any list of tokens.

    `Strip` with a `stop` panics on text that is shorter than what it strips; a pattern strips it instead.
    """
    if not decoder:
        return decoder
    if decoder["type"] == "Sequence":
        return decoder | {"decoders": [_total(stage) for stage in decoder["decoders"]]}
    if decoder["type"] != "Strip" or not decoder["stop"]:
        return decoder
    character = f"\\x{{{ord(decoder['content']):x}}}"
    patterns = rf"\A{character}{{0,{decoder['start']}}}", rf"{character}{{0,{decoder['stop']}}}\z"
    stages = [{"type": "Replace", "pattern": {"Regex": pattern}, "content": ""} for pattern in patterns]
    return {"type": "Sequence", "decoders": stages}
