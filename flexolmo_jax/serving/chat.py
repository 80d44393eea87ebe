"""Conversations to token ids, by the chat template of the model's tokenizer.

The ids are those of transformers' `apply_chat_template(..., add_generation_prompt=True)`. One thing differs: names of
special tokens that are written in a *message* stay plain text, so that nobody who is quoted in a conversation can end a
turn or begin another. Special tokens of the template itself become their ids.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import tokenizers
from etils import epath
from jinja2 import ext, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flexolmo_jax.checkpoint.model_directory import TOKENIZER_FOLDER
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError, rust_errors

_LARGEST = 2**22  # characters that a template may write, and steps that it may count with range()
_PRIVATE = range(0xE000, 0xF900)  # characters without a meaning
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What a template may raise, at the messages as at itself, besides errors of its own.
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


class ChatTemplate:
    """A chat template and the tokenizer that it is for."""

    def __init__(self, source: str, tokenizer: Tokenizer, special: Mapping[str, str], end_ids: Sequence[int] = ()):
        """Compiles a template.

        Args:
          source: of jinja2.
          tokenizer: of the model.
          special: what the template may name, such as "eos_token".
          end_ids: tokens that end a turn, besides EOS.

        Raises:
          jinja2.TemplateError: it is no template.
        """
        self._template, self._special = _environment().from_string(source), dict(special)
        self._source, self._plain, self.end_ids = source, tokenizer, tuple(end_ids)
        # A copy that knows special tokens by their names.
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        tokens = self._backend.get_added_tokens_decoder()
        self._special_ids = {id for id, token in tokens.items() if token.special}
        contents = sorted((tokens[id].content for id in self._special_ids), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, contents)) or "(?!)")

    def encode(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """The token ids of a conversation, its next turn begun.

        Raises:
          UserError: the template refuses the messages, or fails on them.
        """
        used = set(self._source).union(*(value for message in messages for value in message.values()))
        mark = next((chr(code) for code in _PRIVATE if chr(code) not in used), None)
        if mark is None:
            raise UserError(f"they hold all {len(_PRIVATE)} private characters from U+E000; leave one out")

        def marked(text: str) -> str:
            return self._names.sub(lambda name: name[0][0] + mark + name[0][1:], text)

        messages = [{key: marked(value) for key, value in message.items()} for message in messages]
        text, marks = "", set()
        for part in re.split(f"({mark})", self._render(messages, add_generation_prompt)):
            if part == mark:
                marks.add(len(text))
            else:
                text += part
        return self._encode(text, marks)

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        known = {"messages": messages, "tools": None, "documents": None, "range": _counting_range()} | self._special
        chunks, size = [], 0
        try:
            for chunk in self._template.generate(known, add_generation_prompt=add_generation_prompt):
                chunks.append(chunk)
                size += len(chunk)
                if size > _LARGEST:
                    raise UserError(f"the chat template writes more than {_LARGEST} characters")
        except _FAILURES as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the chat template does not take them: {reason or type(error).__name__}") from error
        return "".join(chunks)

    def _encode(self, text: str, marks: set[int]) -> list[int]:
        """The ids of a text, in which names of special tokens are plain text where a mark is one character behind."""
        try:
            with rust_errors("the tokenizer cannot encode the conversation", "choose a model with another"):
                encoding = self._backend.encode(text, add_special_tokens=False)
        except UserError:
            self._plain.encode(text)  # which says what of the text has no token
            raise
        is_named = [id in self._special_ids for id in encoding.ids]
        is_quoted = [
            named and any(place in marks for place in range(start + 1, end + 1))
            for named, (start, end) in zip(is_named, encoding.offsets, strict=True)
        ]
        ids, stretch, start, quoted = [], [], 0, False
        ends = [*zip(encoding.ids, encoding.offsets, is_named, is_quoted, strict=True)]
        for id, (first, last), named, quote in [*ends, (None, (len(text), len(text)), True, False)]:
            quoted = quoted or quote
            if not named or quote:
                stretch.append(id)
                continue
            # Between two of the template's own special tokens: what transformers makes of it, if nothing is quoted.
            ids += self._plain.encode(text[start:first]).tolist() if quoted else stretch
            ids, stretch, start, quoted = [*ids, *([] if id is None else [id])], [], last, False
        return ids


def load_chat_template(directory: epath.Path, tokenizer: Tokenizer) -> ChatTemplate | str:
    """The chat template of a model directory; or why there is none, in a line."""
    kept = directory / TOKENIZER_FOLDER
    config, file = _read_json(kept / "tokenizer_config.json"), kept / "chat_template.jinja"
    try:
        source = file.read_text() if file.exists() else config.get("chat_template")
    except UnicodeDecodeError as error:
        return _unreadable(error, file)
    if isinstance(source, list):  # several of them by their names
        source = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}.get("default")
    if not isinstance(source, str):
        return (
            f"the model has no chat template: in its {kept.name}/ is neither {file.name} nor a chat_template in "
            "tokenizer_config.json; use /v1/completions"
        )
    eos = tokenizer.backend.id_to_token(tokenizer.eos_id)
    special: dict[str, str] = {} if eos is None else dict.fromkeys(("bos_token", "eos_token", "pad_token"), eos)
    if config:
        special_tokens = _read_json(kept / "special_tokens_map.json") | config
        named = {name: special_tokens.get(name) for name in _NAMED}
        named = {name: each.get("content") if isinstance(each, dict) else each for name, each in named.items()}
        special = {name: each for name, each in named.items() if isinstance(each, str)}
    ends = _read_json(kept / "generation_config.json").get("eos_token_id")
    ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.backend.token_to_id(special.get("eos_token", ""))]
    try:
        return ChatTemplate(
            source, tokenizer, special, [id for id in dict.fromkeys(ends) if type(id) is int and id >= 0]
        )
    except (jinja2.TemplateError, RecursionError) as error:
        return _unreadable(error, file)


def _unreadable(error: Exception, file: epath.Path) -> str:
    reason = " ".join(str(error).split())
    return (
        f"the model's chat template cannot be read ({reason}); use /v1/completions, or fix "
        f"{file.parent.name}/{file.name}"
    )


def _read_json(file: epath.Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


class _Generation(ext.Extension):
    """`{% generation %}`, which marks for training what the assistant says: here, nothing but what is in it."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser):
        """Reads to the end of the tag."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2 without access to Python, and with bounds: a template comes with a model, from anywhere."""

    intercepted_binops = frozenset(["+", "%", "*", "**"])

    def call_binop(self, context, operator, left, right):
        """Refuses what would fill the memory."""
        if operator in ("*", "**"):
            sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right)]
            if operator == "**" or sizes[0] * sizes[1] > _LARGEST:
                raise SecurityError(f"a chat template may not compute with {operator} here")
        elif operator == "%" and isinstance(left, str):  # a width may be any number
            raise SecurityError("a chat template may not format with % here")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str | list | tuple) and len(result) > _LARGEST:
            raise SecurityError(f"a chat template may not make what is longer than {_LARGEST}")
        return result


class _Namespace(jinja2.utils.Namespace):
    """The names of a template, among which those of Python's internals may not be."""

    def __init__(self, *args, **kwargs):
        for name in dict(*args, **kwargs):
            _refuse_private(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name, value):
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a chat template may not set {name}")


def _counting_range():
    """A range() that counts no further than `_LARGEST` in all."""
    left = _LARGEST

    def counting_range(*bounds):
        nonlocal left
        numbers = range(*bounds)
        left -= len(numbers)
        if left < 0:
            raise SecurityError(f"a chat template may count to {_LARGEST} in all")
        return numbers

    return counting_range


def _environment() -> _Environment:
    """What templates expect to find, as transformers gives it."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
    environment.filters["tojson"] = tojson
    for name in ("lipsum", "cycler", "joiner"):  # jinja2's own, which count without a bound; transformers' have no use
        environment.globals.pop(name, None)
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
    }
    return environment
