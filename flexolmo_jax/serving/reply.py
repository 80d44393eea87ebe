"""Answers of `/v1/completions`: objects as the OpenAI API has them, with each expert's share besides."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexolmo_jax.inference.request import Continuation
from flexolmo_jax.serving.schema import Completion


class Reply:
    """Writes the objects of one answer, whole or in chunks."""

    def __init__(self, completion: Completion):
        """Gives the answer its id and its time."""
        self._completion = completion
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": completion.model,
        }

    def whole(self, continuations: Sequence[Continuation]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = [
            self._choice(index, self._completion.echoes[index] + continuation.text, continuation)
            for index, continuation in enumerate(continuations)
        ]
        return self._head | {"choices": choices, "usage": self._usage(continuations)}

    def chunk(self, index: int, text: str, continuation: Continuation | None) -> dict[str, Any]:
        """New text of a choice; the last of them comes with its whole continuation."""
        chunk = self._head | {"choices": [self._choice(index, text, continuation)]}
        return chunk | {"usage": None} if self._completion.include_usage else chunk

    def usage_chunk(self, continuations: Sequence[Continuation]) -> dict[str, Any]:
        """What ends a stream that was asked to include the usage."""
        return self._head | {"choices": [], "usage": self._usage(continuations)}

    def _choice(self, index: int, text: str, continuation: Continuation | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "finish_reason": None, "logprobs": None}
        if continuation is None:
            return choice
        choice |= {"finish_reason": continuation.finish_reason, "experts": dict(continuation.experts)}
        if self._completion.experts_per_layer:
            shares = [dict(zip(continuation.experts, row, strict=True)) for row in continuation.layers.tolist()]
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
