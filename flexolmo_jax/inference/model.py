"""A model in memory, for notebooks and other programs: `flexolmo_jax.load`."""

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
from flexolmo_jax.data.pipeline import ARRAYS
from flexolmo_jax.data.tokenizer import Tokenizer, load_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.inference.engine import Engine, bucket
from flexolmo_jax.inference.request import DEFAULT_NEW_TOKENS, Continuation, Request, new_tokens
from flexolmo_jax.memory import check_fits, trim_after_compiling
from flexolmo_jax.model.architecture import Architecture, Layout
from flexolmo_jax.model.decoder import Compute, Decoder, separate_layers
from flexolmo_jax.model.loss import make_loss_step

DTYPES = ("float32", "bfloat16")
MAX_SLOTS = 32
STOP_STEPS = 8  # tokens after which stop strings are looked for


class Scores(NamedTuple):
    """What `Model.score` returns, arrays [batch, length]; entry s concerns token s, given those before it.

    Attributes:
      log_likelihood_BxS: float32, in nats; 0 for the first token, which nothing precedes.
      greedy_BxS: bool, whether the token is the likeliest; True for the first.
    """

    log_likelihood_BxS: np.ndarray
    greedy_BxS: np.ndarray


class Model:
    """An anchor or a merged model, ready to compute."""

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
        layout = Layout.of_roster(len(manifest.experts), top_k or manifest.top_k)
        architecture = Architecture.from_dict(manifest.architecture, "the model")
        compute = Compute(dtype, scan_layers=False, platform=sharding.platform_of(jax.devices()[0]))
        self.decoder = Decoder(architecture, layout, compute)

    @property
    def roster(self) -> list[str]:
        """Expert names, the anchor first, in the order of the router's logits."""
        return self.manifest.roster

    def expert_mask(self, without: Sequence[str]) -> np.ndarray:
        """Bool [experts]: False for the experts to leave out.

        Raises:
          UserError: a name is not on the roster, or nothing would be left.
        """
        if isinstance(without, str):
            raise UserError(f"without is the text {without!r}; give a list of names")
        unknown = [name for name in without if name not in self.roster]
        if unknown:
            raise UserError(f"--without={unknown[0]}: not on the roster, which is {', '.join(self.roster)}")
        mask_E = np.array([name not in without for name in self.roster])
        if not mask_E.any():
            raise UserError(f"--without={without[-1]}: no expert would be left; keep at least one")
        return mask_E

    def logits(self, token_ids: Any, without: Sequence[str] = (), top_k: int | None = None) -> jax.Array:
        """float32 [batch, length, vocab] for integer token ids [batch, length].

        Args:
          token_ids: rows of one document each.
          without: names of experts to leave out, as if they had opted out.
          top_k: experts per token; by default what the model says.
        """
        if top_k is not None and top_k < 1:
            raise UserError(f"logits: top_k is {top_k}; it must be at least 1")
        decoder = self.decoder
        if top_k is not None and decoder.layout.kind == "stacked":
            decoder = decoder.clone(layout=Layout.of_roster(len(self.roster), top_k))
        return _forward(decoder, self.params, self._tokens(token_ids), self.expert_mask(without)).logits_BxSxV

    def loss_step(self, batch: Mapping[str, np.ndarray], mask_E: np.ndarray) -> dict[str, jax.Array]:
        """Sums of a batch of `data.pipeline`: tokens, cross_entropy (nats), routing_E."""
        return _loss(self.decoder, self.params, dict(batch), mask_E)

    def loss_bytes(self, batch_size: int, length: int) -> int:
        """Bytes that `loss_step` takes beside the parameters, for batches of that shape; compiles it to know."""
        batch = dict.fromkeys(ARRAYS, jax.ShapeDtypeStruct((batch_size, length), np.int32))
        analysis = _loss.lower(self.decoder, self.params, batch, self.expert_mask(())).compile().memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    def score(self, token_ids: Any, without: Sequence[str] = ()) -> Scores:
        """How likely each token is after those before it, for integer token ids [batch, length].

        Rows may be filled up with any tokens at the end: what comes later changes nothing.
        """
        tokens_BxS = self._tokens(token_ids)
        return Scores(*jax.device_get(_score(self.decoder, self.params, tokens_BxS, self.expert_mask(without))))

    def _tokens(self, token_ids: Any) -> np.ndarray:
        """Token ids as int32 [batch, length]; raises UserError where they are none of the vocabulary."""
        tokens_BxS, size = np.asarray(token_ids), self.decoder.architecture.vocab_size
        if tokens_BxS.ndim != 2 or not np.issubdtype(tokens_BxS.dtype, np.integer):
            raise UserError(
                f"token_ids: {tokens_BxS.dtype.name}{list(tokens_BxS.shape)}; give integers [batch, length]"
            )
        if tokens_BxS.size and not 0 <= tokens_BxS.min() <= tokens_BxS.max() < size:
            raise UserError(f"token_ids: from {tokens_BxS.min()} to {tokens_BxS.max()}; the vocabulary has {size}")
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
        """Continues each prompt until its document ends, a stop string comes, or `max_new_tokens` are written.

        Args:
          prompts: texts, each read as the beginning of a document, or token ids, taken as they are.
          max_new_tokens: at most so many tokens; None: `DEFAULT_NEW_TOKENS`, as far as `max_length` allows.
          without: names of experts to leave out.
          temperature: of sampling; 0 takes the likeliest token.
          seed: of sampling; each prompt draws on its own.
          top_k: only the so many likeliest tokens are drawn from; 0: all.
          top_p: only the fewest likeliest tokens whose probability reaches it are drawn from; 1: all.
          stop: strings that end the text, before themselves.
          on_text: called with (index of the prompt, new text) as text becomes final.
          min_p: only tokens at least so probable as this share of the likeliest one are drawn from; 0: all.
          repetition_penalty: on tokens of the prompt and the continuation; 1: none.
          presence_penalty: on tokens of the continuation; 0: none.
          frequency_penalty: the same for each time that they were written; 0: none.
          stop_token_ids: tokens that end the text as EOS does.
          ignore_eos: whether EOS does not end the text.
          logprobs: None, or how many of the likeliest tokens `Continuation.logprobs` tells with each token.
          prompt_logprobs: whether it tells of the prompt's tokens too.
          max_length: tokens of a prompt and its continuation together, at most; None: the model's context,
            `manifest.context_length`.

        Raises:
          UserError: a value makes no sense, it is a text and the model has no tokenizer, or it is longer than allowed.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts is the text {prompts!r}; give a list of prompts")
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
          UserError: a text, and the model has no tokenizer; or half a character is in it.
        """
        if not isinstance(prompt, str):
            return np.atleast_1d(prompt).tolist()
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer.json, which text needs; give token ids, or another model")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"prompt {prompt!r}: is not UTF-8 ({error.reason}); give it in that encoding") from None
        return [self.manifest.eos_id, *self.tokenizer.encode(prompt).tolist()]


def seeds(seed: int, count: int) -> list[int]:
    """Seeds for `count` requests that draw independently, from one."""
    Request([0], seed=seed)  # refuses what is no seed
    return np.random.SeedSequence(seed).generate_state(count).tolist()


def load(path: epath.PathLike, dtype: str = "float32") -> Model:
    """Loads an anchor or model directory onto the first device.

    Args:
      path: the directory, local or `gs://`.
      dtype: of the parameters and of the computation, "float32" or "bfloat16".

    Raises:
      UserError: not a model directory, or a damaged one, or a dtype that is not computed in.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    manifest = read_model(path)
    stored = open_params(path)
    file = epath.Path(path) / TOKENIZER_FILE
    model = Model(manifest, {}, load_tokenizer(file, eos_id=manifest.eos_id) if file.exists() else None, dtype)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    expected = model.decoder.clone(compute=Compute()).abstract()
    for name, leaf in expected.items():
        if name not in stored or tuple(stored[name].shape) != leaf.shape:
            raise UserError(
                f"--model={path}: leaf {name} is missing or misshapen; copy the directory again from its source"
            )
    leaves = {name: stored[name] for name in expected}
    size = sum(math.prod(leaf.shape) for leaf in expected.values()) * jnp.dtype(dtype).itemsize
    remedy = "load a smaller model" if dtype == "bfloat16" else "load it as bfloat16 (--dtype), or a smaller model"
    check_fits(size, f"--model={path}: as {dtype} it", remedy)
    for name, leaf in separate_layers(leaves, model.decoder.architecture.num_layers).items():
        model.params[name] = read_leaf(leaf, device, jnp.dtype(dtype), f"--model={path}: leaf {name}")
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
