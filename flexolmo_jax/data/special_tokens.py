"""Special tokens of a `tokenizers.Tokenizer`, and a copy of it to which their names are plain text.

`tokenizers` encodes the name of a special token as that token wherever the model's own vocabulary holds it: "</s>" in a
text would end the document. In the copy such an entry has a name that no text holds, under the same id.
"""

import json
import secrets
from collections.abc import Collection, Mapping
from typing import Any

import tokenizers
from tokenizers import models

KNOWN_EOS = (
    *("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]"),
    *("<EOS>", "<|eos|>", "<|EOS|>", "<end_of_text>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)


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
    added = backend.get_added_tokens_decoder().get(backend.token_to_id(name))
    if added and not added.special:
        return True
    if backend.model.token_to_id(name) is None:
        return False
    return not isinstance(backend.model, models.BPE) or _is_merged(json.loads(backend.to_str())["model"], name)


def without_special_tokens(backend: tokenizers.Tokenizer, eos: str) -> tokenizers.Tokenizer:
    """A tokenizer with the same ids that encodes the names of special tokens as plain text.

    Decoding skips what is special. `eos` is that too if its name is a known one, be it marked or not; another name may
    be a word. The token for unknown text stays what it is. Dropout is off, and decoders that fail on short texts do not
    fail. Where nothing is to be changed, it is `backend` itself.
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
    """Whether a BPE model makes that token of plain text: a single character, a whole word, or what a merge gives."""
    prefix = len(model["continuing_subword_prefix"] or "")
    merged = (first + second[prefix:] for first, second in model["merges"])
    return model["ignore_merges"] or len(name) == 1 or any(token == name for token in merged)


def _renamed(model: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The same model with other names for some tokens; merges that concern them are left out."""
    if model["type"] == "Unigram":
        return model | {"vocab": [[names.get(piece, piece), score] for piece, score in model["vocab"]]}
    renamed = model | {"vocab": {names.get(name, name): id for name, id in model["vocab"].items()}}
    if model["type"] != "BPE":
        return renamed
    prefix = len(model["continuing_subword_prefix"] or "")
    merges = [pair for pair in model["merges"] if not _concerns(*pair, prefix, names.keys())]
    return renamed | {"merges": merges, "dropout": None}


def _concerns(first: str, second: str, prefix: int, names: Collection[str]) -> bool:
    return first in names or second in names or first + second[prefix:] in names


def _total(decoder: Any) -> Any:
    """A decoder that gives the same texts and has one for every list of tokens.

    `Strip` with a `stop` panics on text that is shorter than what it strips; here a pattern strips it.
    """
    if not decoder:
        return decoder
    if decoder["type"] == "Sequence":
        return decoder | {"decoders": [_total(part) for part in decoder["decoders"]]}
    if decoder["type"] != "Strip" or not decoder["stop"]:
        return decoder
    character = f"\\x{{{ord(decoder['content']):x}}}"
    patterns = rf"\A{character}{{0,{decoder['start']}}}", rf"{character}{{0,{decoder['stop']}}}\z"
    parts = [{"type": "Replace", "pattern": {"Regex": pattern}, "content": ""} for pattern in patterns]
    return {"type": "Sequence", "decoders": parts}
