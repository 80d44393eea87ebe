"""A model in memory, for notebooks and other programs: `flexolmo_jax.load`."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flexolmo_jax.checkpoint import directories, tree
from flexolmo_jax.data.tokenizer import Tokenizer, load_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.architecture import Architecture, Layout
from flexolmo_jax.model.decoder import Compute, Decoder
from flexolmo_jax.training.step import make_loss_step


class Continuation(NamedTuple):
    """What `Model.generate` returns for a prompt.

    Attributes:
      text: the continuation.
      token_ids: its tokens.
      experts: {expert: share of the routing weight} over prompt and continuation, mean over layers.
    """

    text: str
    token_ids: list[int]
    experts: Mapping[str, float]


class Model:
    """An anchor or a merged model, ready to compute."""

    def __init__(
        self,
        manifest: directories.Model,
        params: Mapping[str, jax.Array],
        tokenizer: Tokenizer | None = None,
        dtype: str = "float32",
        top_k: int | None = None,
    ):
        """Wraps parameters that are in memory already; see `load`."""
        self.manifest = manifest
        self.params = dict(params)
        self.tokenizer = tokenizer
        layout = Layout.of_roster(len(manifest.experts), top_k or manifest.top_k)
        architecture = Architecture.from_dict(manifest.architecture, "the model")
        self._decoder = Decoder(architecture, layout, Compute(dtype))

    @property
    def roster(self) -> list[str]:
        """Expert names, the anchor first, in the order of the router's logits."""
        return self.manifest.roster

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the parameters, {path: leaf}, as the manifest has them."""
        return self._decoder.abstract()

    def expert_mask(self, without: Sequence[str]) -> np.ndarray:
        """Bool [experts]: False for the experts to leave out.

        Raises:
          UserError: a name is not on the roster, or nothing would be left.
        """
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
        decoder = self._decoder
        if top_k is not None and decoder.layout.kind == "stacked":
            decoder = decoder.clone(layout=Layout.of_roster(len(self.roster), top_k))
        return _forward(decoder, self.params, jnp.asarray(token_ids), self.expert_mask(without)).logits_BxSxV

    def loss_step(self, batch: Mapping[str, np.ndarray], mask_E: np.ndarray) -> dict[str, jax.Array]:
        """Sums of a batch of `data.pipeline`: tokens, cross_entropy (nats), routing_E."""
        return _loss(self._decoder, self.params, dict(batch), mask_E)

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        without: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Continuation]:
        """Continues each prompt until its document ends or `max_new_tokens` are written.

        Args:
          prompts: texts; each is read as the beginning of a document.
          max_new_tokens: at most so many tokens.
          without: names of experts to leave out.
          temperature: of sampling; 0 takes the most likely token.
          seed: of sampling.
        """
        if self.tokenizer is None:
            raise UserError("generate: the model has no tokenizer.json; text needs one")
        if max_new_tokens < 1 or not 0 <= temperature < math.inf:
            raise UserError("max_new_tokens must be at least 1, temperature at least 0 and finite")
        if not prompts:
            return []
        eos = self.tokenizer.eos_id
        encoded = [[eos, *self.tokenizer.encode(prompt).tolist()] for prompt in prompts]
        starts_B = np.array([len(ids) for ids in encoded])
        # Lengths are rounded up so that prompts of about the same length share a compilation.
        length = -(-(int(starts_B.max()) + max_new_tokens) // 64) * 64
        tokens_BxS = np.full((len(encoded), length), eos, np.int32)
        for row, ids in zip(tokens_BxS, encoded, strict=True):
            row[: len(ids)] = ids
        ends_B = starts_B + max_new_tokens
        tokens_BxS, ends_B, share_BxE = jax.device_get(
            _generate(
                self._decoder,
                self.params,
                tokens_BxS,
                starts_B,
                ends_B,
                self.expert_mask(without),
                eos,
                np.float32(temperature),
                jax.random.key(seed),
            )
        )
        out = []
        for row, start, end, share_E in zip(tokens_BxS, starts_B, ends_B, share_BxE, strict=True):
            ids = row[start:end].tolist()
            experts = {name: float(share) for name, share in zip(self.roster, share_E, strict=True)}
            out.append(Continuation(self.tokenizer.decode(ids), ids, experts))
        return out


def load(path: epath.PathLike, dtype: str = "float32") -> Model:
    """Loads an anchor or model directory onto the first device.

    Args:
      path: the directory, local or `gs://`.
      dtype: of the parameters and of the computation, "float32" or "bfloat16".

    Raises:
      UserError: not a model directory, or a damaged one.
    """
    manifest = directories.Model.read(path, flag="--model")
    stored = directories.open_params(path)
    file = epath.Path(path) / directories.TOKENIZER_FILE
    model = Model(manifest, {}, load_tokenizer(file, eos_id=manifest.eos_id) if file.exists() else None, dtype)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for name, leaf in model.abstract().items():
        label = f"--model={path}: leaf {name}"
        if name not in stored or tuple(stored[name].shape) != leaf.shape:
            raise UserError(f"{label} is missing or misshapen; copy the directory again from its source")
        model.params[name] = tree.read_leaf(stored[name], device, jnp.dtype(dtype), label)
    return model


@functools.partial(jax.jit, static_argnums=0)
def _forward(decoder, params, tokens_BxS, mask_E):
    return decoder.apply_flat(params, tokens_BxS, expert_mask=mask_E)


@functools.partial(jax.jit, static_argnums=0)
def _loss(decoder, params, batch, mask_E):
    return make_loss_step(decoder)(params, batch, mask_E)


@functools.partial(jax.jit, static_argnums=0)
def _generate(decoder, params, tokens_BxS, starts_B, ends_B, mask_E, eos, temperature, key):
    """Writes one token a step into every row that has not ended.

    Each step computes the whole row again: causality keeps what lies ahead of the position out of it.

    Returns:
      (tokens_BxS, ends_B: where each row's text ends, shares_BxE of the routing weight up to there).
    """
    rows = jnp.arange(tokens_BxS.shape[0])

    def write(carry):
        tokens_BxS, at_B, ends_B, key = carry
        key, draw = jax.random.split(key)
        logits_BxV = decoder.apply_flat(params, tokens_BxS, expert_mask=mask_E).logits_BxSxV[rows, at_B - 1]
        sampled_B = jax.random.categorical(draw, logits_BxV / jnp.maximum(temperature, 1e-6))
        next_B = jnp.where(temperature > 0, sampled_B, jnp.argmax(logits_BxV, axis=-1))
        running_B = at_B < ends_B
        ends_B = jnp.where(running_B & (next_B == eos), at_B, ends_B)
        next_B = jnp.where(running_B, next_B, tokens_BxS[rows, at_B])
        tokens_BxS = tokens_BxS.at[rows, at_B].set(next_B)
        return tokens_BxS, jnp.where(at_B < ends_B, at_B + 1, at_B), ends_B, key

    carry = (tokens_BxS, starts_B, ends_B, key)
    tokens_BxS, _, ends_B, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[1] < carry[2]), write, carry)
    weights_LxBxSxE = decoder.apply_flat(params, tokens_BxS, expert_mask=mask_E).router_weights_LxBxSxE
    seen_BxS = jnp.arange(tokens_BxS.shape[1]) < ends_B[:, None]
    share_BxE = jnp.einsum("LBSE,BS->BE", weights_LxBxSxE, seen_BxS.astype(jnp.float32))
    return tokens_BxS, ends_B, share_BxE / jnp.sum(share_BxE, axis=-1, keepdims=True)
