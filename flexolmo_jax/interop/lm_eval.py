"""lm-evaluation-harness on a model directory, with any experts left out (extra `eval`).

The model `flexolmo` takes the place of the harness's `hf` in all that its command line does:

    python -m flexolmo_jax.interop.lm_eval --model flexolmo --model_args path=DIR,without=news --tasks hellaswag

Text becomes tokens, requests are cut to length, and texts end just as they do for `hf` on the exported directory.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tokenizers
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, warning_once

from flexolmo_jax.errors import UserError
from flexolmo_jax.inference.engine import Engine, bucket
from flexolmo_jax.inference.model import Model, load, seeds
from flexolmo_jax.inference.request import Request
from flexolmo_jax.progress import progress_bar

_LOGGER = logging.getLogger(__name__)
# What `TemplateLM` makes of a loglikelihood request: (its two texts or None, context, continuation).
_Tokens = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("flexolmo")
class FlexOlmoLM(TemplateLM):
    """An anchor or a merged model for the harness."""

    def __init__(
        self,
        path: str | Model,
        without: str | Sequence[str] = "",
        batch_size: int = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: str = "float32",
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Loads a model.

        Args:
          path: a model directory, or a model that is loaded already.
          without: names of experts to leave out, joined by "+" (a comma would end the argument), or a list.
          batch_size: requests computed at once.
          max_length: tokens that the model may see, what comes before is cut off; by default, as many as in a row
            that the anchor was trained on.
          max_gen_toks: tokens written at most, where the task does not say.
          dtype: of parameters and computation, "float32" or "bfloat16".
          add_bos_token: put the prefix token in front of every text, or no special token at all; by default, what
            tokenizer.json says.
          prefix_token_id: what stands before a text without context; by default the model's EOS.
          seed: of sampling, for tasks that ask for it.
          max_batch_size: not used; the harness passes it to every model.
          device: not used, likewise; JAX takes the first device it finds.

        Raises:
          UserError: a value makes no sense, the directory is no model, or it has no tokenizer.
        """
        super().__init__()
        self.batch_size = _whole_number("batch_size", batch_size, least=1)
        self.max_gen_toks = _whole_number("max_gen_toks", max_gen_toks, least=1)
        self._seed = _whole_number("seed", seed, least=0)
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype={dtype}: must be float32 or bfloat16")
        self.model = path if isinstance(path, Model) else load(str(path), dtype)
        if self.model.tokenizer is None:
            source = f"path={path}: it" if isinstance(path, str) else "the model"
            raise UserError(f"{source} has no tokenizer.json; tasks are texts and need one")
        names = without if isinstance(without, list | tuple) else str(without).split("+")
        self.without = tuple(str(name) for name in names if name != "")
        self.model.expert_mask(self.without)
        trained_on = self.model.manifest.context_length
        self.max_length = _whole_number("max_length", trained_on if max_length is None else max_length, least=1)
        self._add_bos_token = add_bos_token
        self._prefix_token_id = self.eot_token_id if prefix_token_id is None else prefix_token_id
        if self._prefix_token_id not in range(self.model.tokenizer.vocab_size):
            raise UserError(f"prefix_token_id={prefix_token_id}: the tokenizer has no such token")
        # A copy: a special token's name in a text is that token here, and plain text in a corpus.
        backend = self.model.tokenizer.backend
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.add_special_tokens([backend.id_to_token(self.eot_token_id)])  # as transformers marks it

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix_token_id

    def get_model_info(self) -> dict[str, Any]:
        """What the harness keeps with the results: the experts, and those left out."""
        return {"experts": self.model.roster, "without": list(self.without)}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; a prefix token that the text begins with is not put in front again."""
        if add_special_tokens is None:
            has_prefix = string.startswith(self._backend.decode([self.prefix_token_id], skip_special_tokens=False))
            add_special_tokens = False if has_prefix else self._add_bos_token
        ids = self._backend.encode(string, add_special_tokens=add_special_tokens is None).ids
        return [self.prefix_token_id, *ids] if add_special_tokens else ids

    def _loglikelihood_tokens(
        self, requests: list[_Tokens], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log probability of the continuation in nats, whether greedy decoding would write it) of each request."""
        longer = sum(len(context + continuation) > self.max_length + 1 for _, context, continuation in requests)
        if longer:
            _LOGGER.warning("%d requests are longer than max_length=%d and cut in front", longer, self.max_length)
        order, answers = Collator(requests, sort_fn=lambda request: -len(request[1] + request[2])), []
        with self._progress("loglikelihood", len(requests), disable_tqdm) as advance:
            for chunk in order.get_batched(n=self.batch_size):
                for request, answer in zip(chunk, self._score(chunk), strict=True):
                    answers.append(answer)
                    if request[0] is not None:  # a window of a longer text has no texts of its own
                        self.cache_hook.add_partial("loglikelihood", request[0], answer)
                advance(len(chunk))
        return order.get_original(answers)

    def _score(self, chunk: list[_Tokens]) -> Iterator[tuple[float, bool]]:
        """Scores requests in one batch, its shape rounded up."""
        longest = max(len(continuation) for _, _, continuation in chunk)
        if longest > self.max_length:
            raise UserError(f"max_length={self.max_length}: a task's continuation has {longest} tokens; allow as many")
        # Nothing may be left of a context that was white space, which belongs to the continuation.
        texts = ((context or [self.prefix_token_id]) + continuation for _, context, continuation in chunk)
        rows = [tokens[-(self.max_length + 1) :] for tokens in texts]
        shape = min(bucket(len(rows), 1), self.batch_size), min(bucket(max(map(len, rows))), self.max_length + 1)
        tokens_BxS = np.full(shape, self.eot_token_id, np.int32)
        for row_S, tokens in zip(tokens_BxS, rows, strict=False):
            row_S[: len(tokens)] = tokens
        scores = self.model.score(tokens_BxS, without=self.without)
        for i, (tokens, (_, _, continuation)) in enumerate(zip(rows, chunk, strict=True)):
            scored = slice(len(tokens) - len(continuation), len(tokens))
            log_likelihood = scores.log_likelihood_BxS[i, scored].sum(dtype=np.float64)
            yield float(log_likelihood), bool(scores.greedy_BxS[i, scored].all())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log probability of each text, in nats: every token is scored once, after as many as fit before it."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that continues each context, up to EOS, the first of its stop strings, or its last token."""
        each_seed = seeds(self._seed, len(requests))
        todo = [self._request(*request.args, seed) for request, seed in zip(requests, each_seed, strict=True)]
        order = sorted(range(len(todo)), key=lambda i: -len(todo[i].token_ids))
        engine = Engine(self.model, slots=min(bucket(max(len(todo), 1), 1), self.batch_size))
        texts = [""] * len(todo)
        with self._progress("generate_until", len(todo), disable_tqdm) as advance:
            for index, update in engine.run([todo[i] for i in order]):
                if update.continuation:
                    i = order[index]
                    texts[i] = update.continuation.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    advance(1)
        return texts

    def _request(self, context: str, gen_kwargs: dict[str, Any], seed: int) -> Request:
        """What the engine is asked for a context and the generation arguments of its task."""
        kwargs = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        until, max_gen_toks = kwargs.pop("until"), kwargs.pop("max_gen_toks")
        if kwargs.get("num_beams") == 1:
            del kwargs["num_beams"]
        unknown = sorted(kwargs.keys() - {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"})
        if unknown:
            raise UserError(f"generation_kwargs: {unknown[0]}={kwargs[unknown[0]]} is not offered; leave it out")
        room = self.max_length - max_gen_toks
        if room < 1:
            raise UserError(f"max_length={self.max_length}: must be above the {max_gen_toks} tokens of max_gen_toks")
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        if len(tokens) > room:
            warning_once(_LOGGER, f"contexts of more than {room} tokens, which max_gen_toks leaves, are cut in front")
        until = handle_stop_sequences(until, self._backend.id_to_token(self.eot_token_id))
        return Request(
            tokens[-room:],
            max_gen_toks,
            self.without,
            temperature=float(kwargs.get("temperature", 0.0)),  # 0 unless the task wants samples
            top_k=kwargs.get("top_k", 0),
            top_p=kwargs.get("top_p", 1.0),
            min_p=kwargs.get("min_p") or 0.0,
            repetition_penalty=kwargs.get("repetition_penalty") or 1.0,
            seed=seed,
            stop=[stop for stop in until if stop],
        )

    @contextmanager
    def _progress(self, kind: str, total: int, disabled: bool) -> Iterator[Callable[[int], None]]:
        """A bar over requests; yields what moves it on."""
        with progress_bar(shown=not disabled) as progress:
            task = progress.add_task(" ".join((kind, *(f"without {name}" for name in self.without))), total=total)
            yield lambda count: progress.advance(task, count)


def _whole_number(name: str, value: Any, least: int) -> int:
    if not str(value).isdecimal() or int(value) < least:
        raise UserError(f"{name}={value}: must be a whole number, at least {least}")
    return int(value)


def main() -> None:
    """The command line `lm_eval`, with the model `flexolmo`."""
    # Bootstrapped errors would otherwise be computed in forks of a process whose JAX threads do not survive them.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        cli_evaluate()
    except UserError as error:
        sys.stderr.write(f"lm_eval: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
