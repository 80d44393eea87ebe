"""A model in memory, for notebooks and other programs: `flexolmo_jax.load`."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flexolmo_jax import sharding
from flexolmo_jax.checkpoint.manifests import ModelManifest
from flexolmo_jax.checkpoint.model_directory import TOKENIZER_FILE, open_params, read_model
from flexolmo_jax.checkpoint.params import read_leaf
from flexolmo_jax.checkpoint.statistics import open_statistics
from flexolmo_jax.data.batches.pipeline import ARRAYS
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.inference.engine import Engine, bucket
from flexolmo_jax.inference.request import DEFAULT_NEW_TOKENS, Continuation, Request, new_tokens
from flexolmo_jax.memory import check_fits, trim_after_compiling
from flexolmo_jax.model.architecture import Architecture, Layout
from flexolmo_jax.model.decoder import Compute, Decoder, separate_layers
from flexolmo_jax.model.loss import make_loss_step
from flexolmo_jax.model.selectors import read_derived

DTYPES = ("float32", "bfloat16")
MAX_SLOTS = 32
STOP_STEPS = 8  # tokens between two searches for stop strings


class Scores(NamedTuple):
    """The result of `Model.score`, arrays [batch, length]; entry s is about token s, given the tokens before it.

    Attributes:
      log_likelihood_BxS: float32, in nats; 0 for the first token.
      greedy_BxS: bool, whether the token is the most likely one; True for the first token.
    """

    log_likelihood_BxS: np.ndarray
    greedy_BxS: np.ndarray


class Model:
    """An anchor or a merged model in memory."""

    def __init__(
        self,
        manifest: ModelManifest,
        params: Mapping[str, jax.Array],
        tokenizer: Tokenizer | None = None,
        dtype: str = "float32",
        top_k: int | None = None,
    ):
        """Wraps parameters that are in memory already, {path: leaf} with separate layers; see `load`."""
        trim_after_compiling()
        self.manifest = manifest
        self.params = dict(params)
        self.tokenizer = tokenizer
        layout = Layout.of_roster(len(manifest.experts), top_k or manifest.top_k, manifest.selection)
        architecture = Architecture.from_dict(manifest.architecture, "the model")
        compute = Compute(dtype, scan_layers=False, platform=sharding.platform_of(jax.devices()[0]))
        self.decoder = Decoder(architecture, layout, compute)

    @property
    def roster(self) -> list[str]:
        """Names of the experts, the anchor first, in the order of the router logits."""
        return self.manifest.roster

    def expert_mask(self, without: Sequence[str]) -> np.ndarray:
        """Bool [experts]: False for the experts to leave out.

        Raises:
          ArgumentError: a name is not on the roster, or no expert would be left.
        """
        if isinstance(without, str):
            raise ArgumentError("without", repr(without), "is one text; it must be a list of names")
        unknown = [name for name in without if name not in self.roster]
        if unknown:
            raise ArgumentError("without", unknown[0], f"not on the roster, which is {', '.join(self.roster)}")
        mask_E = np.array([name not in without for name in self.roster])
        if not mask_E.any():
            raise ArgumentError("without", without[-1], "no expert would be left; keep at least one")
        return mask_E

    def with_top_k(self, top_k: int) -> "Model":
        """The model with another number of experts per token; both have the same arrays as parameters.

        Args:
          top_k: experts that compute each token; all of them, where there are fewer.

        Raises:
          ArgumentError: the number is below 1.
        """
        if top_k < 1:
            raise ArgumentError("top_k", top_k, "it must be at least 1")
        layout = dataclasses.replace(self.decoder.layout, top_k=min(top_k, len(self.roster)))
        model = copy.copy(self)
        model.decoder = self.decoder.clone(layout=layout)
        return model

    def logits(self, token_ids: Any, without: Sequence[str] = (), top_k: int | None = None) -> jax.Array:
        """float32 [batch, length, vocab] for integer token ids [batch, length].

        Args:
          token_ids: sequences of one document each.
          without: names of experts to leave out, as if they had opted out.
          top_k: experts per token; None: the number of the model.

        Raises:
          ArgumentError: an invalid value.
        """
        decoder = self.decoder if top_k is None else self.with_top_k(top_k).decoder
        return _forward(decoder, self.params, self._tokens(token_ids), self.expert_mask(without)).logits_BxSxV

    def loss_step(self, batch: Mapping[str, np.ndarray], mask_E: np.ndarray) -> dict[str, jax.Array]:
        """Sums of a batch of `data.pipeline`: tokens, cross_entropy (nats), routing_E."""
        return _loss(self.decoder, self.params, dict(batch), mask_E)

    def loss_bytes(self, batch_size: int, length: int) -> int:
        """Bytes that `loss_step` needs besides the parameters, for batches of that shape; compiles it."""
        batch = dict.fromkeys(ARRAYS, jax.ShapeDtypeStruct((batch_size, length), np.int32))
        analysis = _loss.lower(self.decoder, self.params, batch, self.expert_mask(())).compile().memory_analysis()
        if analysis is None:  # the platform reports none
            return 0
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    def score(self, token_ids: Any, without: Sequence[str] = ()) -> Scores:
        """The log likelihood of each token given the tokens before it, for integer token ids [batch, length].

        Padding at the end may be any tokens, since later tokens change nothing.
        """
        tokens_BxS = self._tokens(token_ids)
        return Scores(*jax.device_get(_score(self.decoder, self.params, tokens_BxS, self.expert_mask(without))))

    def _tokens(self, token_ids: Any) -> np.ndarray:
        """Token ids as int32 [batch, length]; raises ArgumentError for other shapes and ids out of range."""
        tokens_BxS, size = np.asarray(token_ids), self.decoder.architecture.vocab_size
        if tokens_BxS.ndim != 2 or not np.issubdtype(tokens_BxS.dtype, np.integer):
            shown = f"{tokens_BxS.dtype.name}{list(tokens_BxS.shape)}"
            raise ArgumentError("token_ids", shown, "it must be integers [batch, length]")
        if tokens_BxS.size and not 0 <= tokens_BxS.min() <= tokens_BxS.max() < size:
            shown = f"{tokens_BxS.min()}..{tokens_BxS.max()}"
            raise ArgumentError("token_ids", shown, f"ids must be 0 to {size - 1}")
        return tokens_BxS.astype(np.int32)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int | None = None,
        without: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
        *,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
        max_length: int | None = None,
    ) -> list[Continuation]:
        """Continues each prompt until EOS, a stop string, or `max_new_tokens` new tokens.

        Args:
          prompts: texts, each the beginning of a document, or token ids, which are used unchanged.
          max_new_tokens: maximum number of new tokens; None: `DEFAULT_NEW_TOKENS`, or fewer if `max_length` requires.
          without: names of experts to leave out.
          temperature: of sampling; 0: greedy.
          seed: of sampling; each prompt has its own random numbers.
          top_k: sample from the k most likely tokens; 0: from all.
          top_p: sample from the fewest most likely tokens whose total probability reaches it; 1: from all.
          stop: strings that end the text; the text excludes them.
          on_text: called with (index of the prompt, new text) when text is final.
          min_p: sample from tokens with at least this fraction of the largest probability; 0: from all.
          repetition_penalty: of tokens of the prompt and the continuation; 1: none.
          presence_penalty: of tokens of the continuation; 0: none.
          frequency_penalty: the same, once for each occurrence; 0: none.
          stop_token_ids: tokens that end the text as EOS does.
          ignore_eos: whether EOS does not end the text.
          logprobs: None, or the number of most likely tokens in `Continuation.logprobs` for each token.
          prompt_logprobs: whether it includes the tokens of the prompt.
          max_length: maximum number of tokens of a prompt and its continuation together; None: the model's context,
            `manifest.context_length`.

        Raises:
          ArgumentError: an invalid value, or a text although the model has no tokenizer.
          ContextError: a prompt and its continuation are longer than `max_length`.
        """
        if isinstance(prompts, str):
            raise ArgumentError("prompts", repr(prompts), "is one text; it must be a list of prompts")
        context = self.manifest.context_length if max_length is None else max_length
        requests = []
        for ids, prompt_seed in zip(map(self.encode, prompts), seeds(seed, len(prompts)), strict=True):
            options = (without, temperature, top_k, top_p, prompt_seed, stop, min_p, repetition_penalty)
            options += (presence_penalty, frequency_penalty, stop_token_ids, ignore_eos, logprobs, prompt_logprobs)
            request = Request(ids, DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens, *options)
            count = new_tokens(len(ids), max_new_tokens, DEFAULT_NEW_TOKENS, context)
            requests.append(dataclasses.replace(request, max_new_tokens=count))
        if not requests:
            return []
        engine = Engine(self, slots=min(bucket(len(requests), 1), MAX_SLOTS))
        steps = 1 if on_text else STOP_STEPS if stop else max(request.max_new_tokens for request in requests)
        done: dict[int, Continuation] = {}
        for index, update in engine.run(requests, steps):
            if on_text and update.text:
                on_text(index, update.text)
            if update.continuation:
                done[index] = update.continuation
        return [done[index] for index in range(len(requests))]

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt: a text is the beginning of a document, after the EOS of the one before.

        Raises:
          ArgumentError: a text although the model has no tokenizer, or one that is not UTF-8.
        """
        if not isinstance(prompt, str):
            return np.atleast_1d(prompt).tolist()
        if self.tokenizer is None:
            problem = "the model has no tokenizer.json, which text needs; give token ids, or another model"
            raise ArgumentError("prompts", repr(prompt), problem)
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            problem = f"is not UTF-8 ({error.reason}); give it in that encoding"
            raise ArgumentError("prompts", repr(prompt), problem) from None
        return [self.manifest.eos_id, *self.tokenizer.encode(prompt).tolist()]


def seeds(seed: int, count: int) -> list[int]:
    """Seeds of `count` independent requests, from one seed."""
    Request([0], seed=seed)  # checks the seed
    return np.random.SeedSequence(seed).generate_state(count).tolist()


def load(path: epath.PathLike, dtype: str = "float32") -> Model:
    """Loads an anchor or model directory onto the first device.

    Args:
      path: the directory, local or `gs://`.
      dtype: of the parameters and of the computation, "float32" or "bfloat16".

    Raises:
      NotFoundError: there is no such directory.
      ArgumentError: the dtype is not supported.
      UserError: not a model directory, a damaged one, or one that does not fit in memory.
    """
    if dtype not in DTYPES:
        raise ArgumentError("dtype", dtype, f"it must be one of {', '.join(DTYPES)}")
    manifest = read_model(path)
    stored = open_params(path)
    file = epath.Path(path) / TOKENIZER_FILE
    model = Model(manifest, {}, load_tokenizer(file, eos_id=manifest.eos_id) if file.exists() else None, dtype)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    expected = model.decoder.clone(compute=Compute()).abstract()
    derived = read_derived(manifest, open_statistics(path, manifest), str(path))
    for name, leaf in expected.items():
        if name in derived:
            model.params[name] = jax.device_put(derived[name], device)
        elif name not in stored or tuple(stored[name].shape) != leaf.shape:
            raise UserError(f"{path}: leaf {name} is missing or misshapen; copy the directory again from its source")
    leaves = {name: stored[name] for name in expected.keys() - derived.keys()}
    size = sum(math.prod(leaf.shape) for leaf in expected.values()) * jnp.dtype(dtype).itemsize
    remedy = "load a smaller model" if dtype == "bfloat16" else "use dtype bfloat16, or a smaller model"
    check_fits(size, f"{path}: as {dtype} it", remedy)
    separate = separate_layers(leaves, model.decoder.architecture.num_layers)
    # The largest first: reading a leaf takes two or three times its memory.
    for name, leaf in sorted(separate.items(), key=lambda item: math.prod(item[1].shape), reverse=True):
        model.params[name] = read_leaf(leaf, device, jnp.dtype(dtype), f"{path}: leaf {name}")
    return model


@functools.partial(jax.jit, static_argnums=0)
def _forward(decoder, params, tokens_BxS, mask_E):
    return decoder.apply_flat(params, tokens_BxS, expert_mask=mask_E)


@functools.partial(jax.jit, static_argnums=0)
def _loss(decoder, params, batch, mask_E):
    return make_loss_step(decoder)(params, batch, mask_E)


@functools.partial(jax.jit, static_argnums=0)
def _score(decoder, params, tokens_BxS, mask_E):
    logits_BxSxV = decoder.apply_flat(params, tokens_BxS, expert_mask=mask_E).logits_BxSxV[:, :-1]
    log_normalizer_BxS = jax.nn.logsumexp(logits_BxSxV, axis=-1)
    logit_BxS = jnp.take_along_axis(logits_BxSxV, tokens_BxS[:, 1:, None], axis=-1)[..., 0]
    greedy_BxS = jnp.argmax(logits_BxSxV, axis=-1) == tokens_BxS[:, 1:]
    first = ((0, 0), (1, 0))
    return jnp.pad(logit_BxS - log_normalizer_BxS, first), jnp.pad(greedy_BxS, first, constant_values=True)
