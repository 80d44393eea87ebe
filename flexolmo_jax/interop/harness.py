"""lm-evaluation-harness on a model, whole or with experts left out (extra `eval`).

`FlexOlmoLM` takes the place of the harness's `hf`: text becomes tokens, requests are cut to length, and texts end just
as they do for `hf` on the exported directory. `evaluate_tasks` runs tasks on a model, whole and with each contributed
expert left out.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import tokenizers
from etils import epath
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, warning_once

from flexolmo_jax.errors import ArgumentError, NotFoundError, UserError
from flexolmo_jax.inference.engine import Engine, bucket
from flexolmo_jax.inference.model import Model, load, seeds
from flexolmo_jax.inference.request import Request
from flexolmo_jax.progress import progress_bar

_LOGGER = logging.getLogger(__name__)
# Draws for the standard error of a metric that has none in closed form; the harness's own 100,000 take minutes.
BOOTSTRAP_ITERS = 1000

# A metric's "value", and its "standard_error" or None where the harness gives none.
Estimate = Mapping[str, float | None]
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
          max_length: tokens that the model may see, what comes before is cut off; by default, as many as in a
            sequence that the anchor was trained on.
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
            raise ArgumentError("dtype", dtype, "must be float32 or bfloat16")
        self.model = path if isinstance(path, Model) else load(str(path), dtype)
        if self.model.tokenizer is None:
            label = path if isinstance(path, str) else "the model"
            raise UserError(f"{label}: has no tokenizer.json; tasks are texts and need one")
        names = without if isinstance(without, list | tuple) else str(without).split("+")
        self.without = tuple(str(name) for name in names if name != "")
        self.model.expert_mask(self.without)
        trained_on = self.model.manifest.context_length
        self.max_length = _whole_number("max_length", trained_on if max_length is None else max_length, least=1)
        self._add_bos_token = add_bos_token
        self._prefix_token_id = self.eot_token_id if prefix_token_id is None else prefix_token_id
        if self._prefix_token_id not in range(self.model.tokenizer.vocab_size):
            raise ArgumentError("prefix_token_id", prefix_token_id, "the tokenizer has no such token")
        # A copy: a special token's name in a text is that token here, and plain text in a corpus.
        backend = self.model.tokenizer.backend
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.add_special_tokens([backend.id_to_token(self.eot_token_id)])  # as transformers marks it

    @property
    def eot_token_id(self) -> int:
        tokenizer = self.model.tokenizer
        return self.model.manifest.eos_id if tokenizer is None else tokenizer.eos_id

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
            raise ArgumentError(
                "max_length", self.max_length, f"a task's continuation has {longest} tokens; allow as many"
            )
        # Nothing may be left of a context that was white space, which belongs to the continuation.
        texts = ((context or [self.prefix_token_id]) + continuation for _, context, continuation in chunk)
        sequences = [tokens[-(self.max_length + 1) :] for tokens in texts]
        length = min(bucket(max(map(len, sequences))), self.max_length + 1)
        shape = min(bucket(len(sequences), 1), self.batch_size), length
        tokens_BxS = np.full(shape, self.eot_token_id, np.int32)
        for tokens_S, tokens in zip(tokens_BxS, sequences, strict=False):
            tokens_S[: len(tokens)] = tokens
        scores = self.model.score(tokens_BxS, without=self.without)
        for i, (tokens, (_, _, continuation)) in enumerate(zip(sequences, chunk, strict=True)):
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
        arguments = (cast(tuple[Any, ...], request.args) for request in requests)
        asked = [self._request(args[0], args[1], seed) for args, seed in zip(arguments, each_seed, strict=True)]
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i].token_ids))
        engine = Engine(self.model, slots=min(bucket(max(len(asked), 1), 1), self.batch_size))
        texts = [""] * len(asked)
        with self._progress("generate_until", len(asked), disable_tqdm) as advance:
            for index, update in engine.run([asked[i] for i in order]):
                if update.continuation:
                    i = order[index]
                    texts[i] = update.continuation.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    advance(1)
        return texts

    def _request(self, context: str, gen_kwargs: dict[str, Any], seed: int) -> Request:
        """The engine's request for a context and the generation arguments of its task."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        until, max_gen_toks = kwargs.pop("until"), kwargs.pop("max_gen_toks")
        if kwargs.get("num_beams") == 1:
            del kwargs["num_beams"]
        unknown = sorted(kwargs.keys() - {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"})
        if unknown:
            raise UserError(f"generation_kwargs: {unknown[0]}={kwargs[unknown[0]]} is not offered; leave it out")
        room = self.max_length - max_gen_toks
        if room < 1:
            raise ArgumentError(
                "max_length", self.max_length, f"must be above the {max_gen_toks} tokens of max_gen_toks"
            )
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

    @contextlib.contextmanager
    def _progress(self, kind: str, total: int, disabled: bool) -> Iterator[Callable[[int], None]]:
        """A progress bar over requests; yields the function that advances it."""
        with progress_bar(shown=not disabled) as progress:
            task = progress.add_task(" ".join((kind, *(f"without {name}" for name in self.without))), total=total)
            yield lambda count: progress.advance(task, count)


def _whole_number(name: str, value: Any, least: int) -> int:
    if not str(value).isdecimal() or int(value) < least:
        raise ArgumentError(name, value, f"must be a whole number, at least {least}")
    return int(value)


def evaluate_tasks(
    model: Model,
    tasks: Sequence[str],
    *,
    include_path: epath.PathLike | None = None,
    limit: int | None = None,
    without: Sequence[str] = (),
    batch_size: int = 8,
    max_length: int | None = None,
) -> dict[str, dict[str, Estimate]]:
    """Runs tasks on the whole model, then with each contributed expert left out; progress on standard error.

    Args:
      model: a loaded model.
      tasks: names of tasks, groups or tags, or patterns such as "mmlu_*".
      include_path: a directory with tasks of one's own.
      limit: at most so many documents of each task.
      without: where given, only the model without these experts is evaluated.
      batch_size: requests computed at once.
      max_length: tokens that the model may see; by default, as many as in a sequence that the anchor was trained on.

    Returns:
      {"full model", "without NAME", ...: {"TASK:METRIC": estimate}}. A group that has metrics of its own
      stands for its tasks.

    Raises:
      UserError: a task is unknown or cannot be run, or a name is not on the roster.
    """
    if include_path is not None and not epath.Path(include_path).is_dir():
        raise NotFoundError(f"{include_path}: no such directory; give one with task files (.yaml)")
    left_out = [without] if without else [(), *([name] for name in model.roster[1:])]
    manager = _TaskManager(include_path=None if include_path is None else os.fspath(include_path))
    names = _match(manager, tasks)
    matrix = {}
    for experts in left_out:
        lm = _FlexOlmoLM(model, without=experts, batch_size=batch_size, max_length=max_length)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the harness prints, and a table is to come
                results = _evaluate(
                    lm,
                    tasks=names,
                    task_manager=manager,
                    limit=limit,
                    bootstrap_iters=BOOTSTRAP_ITERS,
                    log_samples=False,
                )
        except UserError:  # some are ValueErrors too
            raise
        except ValueError as error:  # how the harness refuses a task
            raise ArgumentError("tasks", ",".join(tasks), str(error)) from error
        matrix[_label(experts)] = _estimates(results)
    return matrix


# Decorators of the harness hide their arguments from type checkers.
_evaluate: Any = simple_evaluate
_TaskManager: Any = TaskManager
_FlexOlmoLM: Any = FlexOlmoLM


def _label(without: Sequence[str]) -> str:
    return f"without {', '.join(without)}" if without else "full model"


def _match(manager: TaskManager, tasks: Sequence[str]) -> list[str]:
    """The names that the tasks stand for, each once."""
    matches = {task: manager.match_tasks([task]) for task in tasks}
    for task, found in matches.items():
        if not found:
            raise ArgumentError(
                "tasks", task, "no such task; `lm_eval ls tasks` lists them, and include_path adds your own"
            )
    return list(dict.fromkeys(name for found in matches.values() for name in found))


def _estimates(results: Mapping[str, Any]) -> dict[str, Estimate]:
    """{"TASK:METRIC": estimate} of what the harness returns, with its filter where that is not the plain one."""
    subtasks = {name for group in results.get("groups", ()) for name in results["group_subtasks"][group]}
    estimates = {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, filter_name = key.partition(",")
            if task in subtasks or not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{filter_name}")  # "N/A" where there is none
            error = float(error) if isinstance(error, int | float) else None
            column = f"{task}:{metric}" if filter_name == "none" else f"{task}:{key}"
            estimates[column] = {"value": float(value), "standard_error": error}
    return estimates
