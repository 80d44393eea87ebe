"""Answers: objects as the OpenAI API has them, with each expert's share besides; whole, or in chunks."""

import abc
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flexolmo_jax.inference.request import Continuation, TokenLogprobs, Update
from flexolmo_jax.serving.logprobs import TextOffsets, chat_logprobs, completion_logprobs
from flexolmo_jax.serving.parsing import Completion, Served


class Reply(abc.ABC):
    """Writes the objects of one answer, whole or in chunks."""

    prefix: str
    kind: str
    kind_of_chunks: str

    def __init__(self, completion: Completion, served: Served):
        """Gives the answer its id and its time."""
        self._completion, self._served = completion, served
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": completion.model,
        }
        self._chunk_head = self._head | {"object": self.kind_of_chunks}
        self._chunk_tail = {"usage": None} if completion.include_usage else {}

    def whole(self, continuations: Sequence[Continuation]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = [
            self._whole_choice(index, continuation) | self._ended(continuation)
            for index, continuation in enumerate(continuations)
        ]
        return self._head | {"choices": choices, "usage": self._usage(continuations)}

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks that may be sent before anything is written."""
        for index in range(len(self._completion.requests)):
            choice = self._first(index)
            if choice is not None:
                yield self._chunk_head | {"choices": [choice]} | self._chunk_tail

    def chunk(self, index: int, update: Update) -> dict[str, Any] | None:
        """What is new in a choice; the last of them comes with the end. None where there is nothing to tell."""
        told = update.logprobs is not None and len(update.logprobs.token_ids) > 0
        if not (update.text or told or update.continuation):
            return None
        choice = self._choice(index, update.text, update.logprobs if told else None)
        if update.continuation is not None:
            choice |= self._ended(update.continuation)
        return self._chunk_head | {"choices": [choice]} | self._chunk_tail

    def usage_chunk(self, continuations: Sequence[Continuation]) -> dict[str, Any]:
        """What ends a stream that was asked to include the usage."""
        return self._chunk_head | {"choices": [], "usage": self._usage(continuations)}

    @abc.abstractmethod
    def _whole_choice(self, index: int, continuation: Continuation) -> dict[str, Any]:
        """A whole choice."""

    @abc.abstractmethod
    def _first(self, index: int) -> dict[str, Any] | None:
        """What a choice begins with, if that is known before anything is written."""

    @abc.abstractmethod
    def _choice(self, index: int, text: str, told: TokenLogprobs | None) -> dict[str, Any]:
        """A part of a choice."""

    def _ended(self, continuation: Continuation) -> dict[str, Any]:
        """Why a choice ended, and its experts."""
        choice = {"finish_reason": continuation.finish_reason, "experts": dict(continuation.experts)}
        if self._completion.experts_per_layer:
            shares = [dict(zip(continuation.experts, layer, strict=True)) for layer in continuation.layers.tolist()]
            choice["experts_per_layer"] = shares
        return choice

    def _usage(self, continuations: Sequence[Continuation]) -> dict[str, Any]:
        """Tokens, a prompt's once however many choices it has; the experts' shares, a mean weighted by tokens."""
        requests = self._completion.requests
        prompt = sum(len(request.token_ids) for request in requests[:: self._completion.n])
        new = sum(len(continuation.token_ids) for continuation in continuations)
        tokens = [
            len(request.token_ids) + len(continuation.token_ids)
            for request, continuation in zip(requests, continuations, strict=True)
        ]
        experts = {
            name: float(np.average([continuation.experts[name] for continuation in continuations], weights=tokens))
            for name in continuations[0].experts
        }
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new, "experts": experts}


class CompletionReply(Reply):
    """Answers of `/v1/completions`."""

    prefix = "cmpl"
    kind = kind_of_chunks = "text_completion"

    def __init__(self, completion: Completion, served: Served):
        """No token was told of yet."""
        super().__init__(completion, served)
        self._offsets: dict[int, TextOffsets] = {}

    def _whole_choice(self, index, continuation):
        return self._choice(index, self._echo(index) + continuation.text, continuation.logprobs)

    def _first(self, index):
        # What a prompt's tokens are told with comes later; a client expects them with the text.
        return (
            self._choice(index, self._echo(index), None)
            if self._echo(index) and not self._completion.logprobs
            else None
        )

    def chunk(self, index, update):
        """The text of the prompt comes with its tokens."""
        if self._completion.logprobs and index not in self._offsets:
            update = update._replace(text=self._echo(index) + update.text)
        return super().chunk(index, update)

    def _choice(self, index, text, told):
        logprobs = None
        if told is not None:
            if index not in self._offsets:
                request = self._completion.requests[index]
                before = () if request.prompt_logprobs else request.token_ids
                self._offsets[index] = TextOffsets(self._served.decode, before)
            offsets = [self._offsets[index].next(id) for id in told.token_ids]
            logprobs = completion_logprobs(told, self._served.strings, offsets)
        return {"index": index, "text": text, "finish_reason": None, "logprobs": logprobs}

    def _echo(self, index: int) -> str:
        return self._completion.echoes[index]


class ChatReply(Reply):
    """Answers of `/v1/chat/completions`."""

    prefix, kind, kind_of_chunks = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _whole_choice(self, index, continuation):
        message = {"role": "assistant", "content": continuation.text, "refusal": None}
        logprobs = self._logprobs(continuation.logprobs)
        return {"index": index, "message": message, "finish_reason": None, "logprobs": logprobs}

    def _first(self, index):
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}

    def _choice(self, index, text, told):
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "finish_reason": None, "logprobs": self._logprobs(told)}

    def _logprobs(self, told: TokenLogprobs | None) -> dict[str, Any] | None:
        return None if told is None else chat_logprobs(told, self._served.strings)
