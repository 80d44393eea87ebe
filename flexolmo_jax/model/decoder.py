"""The OLMo-2 decoder with a FlexOlmo mixture of experts in every block."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from flexolmo_jax import sharding
from flexolmo_jax.checkpoint.manifests import SELECTOR
from flexolmo_jax.model import selectors
from flexolmo_jax.model.architecture import Architecture, Layout
from flexolmo_jax.model.attention import Attention, KVCache, RotaryEmbedding
from flexolmo_jax.model.dispatch import EXPERT_RESIDUALS, choose_dispatch
from flexolmo_jax.model.kernels import causal_attention
from flexolmo_jax.model.kernels.accelerator_attention import is_cudnn
from flexolmo_jax.model.kernels.blockwise_attention import ATTENTION_OUTPUT, LOG_NORMALIZER
from flexolmo_jax.model.kernels.expert_loop import EXPERT_OUTPUTS
from flexolmo_jax.model.layers import MLP_RESIDUALS, RMSNorm
from flexolmo_jax.model.leaves import parameter
from flexolmo_jax.model.moe import MoE

_POLICIES = jax.checkpoint_policies
_KERNELS = _POLICIES.save_from_both_policies(
    is_cudnn,
    _POLICIES.save_only_these_names(ATTENTION_OUTPUT, LOG_NORMALIZER, EXPERT_RESIDUALS, EXPERT_OUTPUTS),
)
_FEED_FORWARD = _POLICIES.save_from_both_policies(_KERNELS, _POLICIES.save_only_these_names(MLP_RESIDUALS))
# In descending order of what they keep.
REMAT_POLICIES = {
    "none": None,
    "dots": _POLICIES.save_from_both_policies(_FEED_FORWARD, _POLICIES.dots_with_no_batch_dims_saveable),
    "feed_forward": _FEED_FORWARD,
    "kernels": _KERNELS,
    "full": _POLICIES.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed; nothing here changes its parameters.

    Attributes:
      dtype: of activations and matmuls, "float32" or "bfloat16" (norms and router stay in float32).
      remat: a key of `REMAT_POLICIES`: what the backward pass recomputes instead of keeping.
      unroll: blocks per iteration of the scan over layers.
      input_gradient: whether the first block's input needs a gradient; if not, scanned blocks compute none.
      rules: logical axis -> mesh axes; empty for no constraints.
      scan_layers: True: the blocks' leaves are stacked over layers, `blocks/*`, and scanned. False: each block has
        leaves of its own, `blocks_0/*`, `blocks_1/*`, ... (`separate_layers`), which a cache requires.
      platform: of the devices that compute (`sharding.platform_of`), which "auto" depends on.
      attention: implementation of attention without a cache: a key of `causal_attention.KERNELS`, or "auto".
      dispatch: implementation of stacked experts: a key of `dispatch.DISPATCH`, or "auto".
    """

    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    input_gradient: bool = True
    rules: sharding.Rules = ()
    scan_layers: bool = True
    platform: str = "cpu"
    attention: str = "auto"
    dispatch: str = "auto"

    def __post_init__(self):
        """Replaces "auto" by the fastest implementation on the platform."""
        if self.attention == "auto":
            object.__setattr__(self, "attention", causal_attention.choose(self.platform))
        if self.dispatch == "auto":
            object.__setattr__(self, "dispatch", choose_dispatch(self.platform))


class Output(NamedTuple):
    """Output of the decoder; XLA removes the computation of fields that the caller does not use.

    Attributes:
      hidden_BxSxD: the head's input, in the dtype of the computation.
      logits_BxSxV: float32.
      router_logits_LxBxSxE: float32, before `expert_mask`.
      router_weights_LxBxSxE: float32, after `expert_mask`; they sum to 1.
      cache: the updated cache of each layer, or None without one.
      selector_state: that of the model's selector after the tokens, or None without one.
    """

    hidden_BxSxD: jax.Array
    logits_BxSxV: jax.Array
    router_logits_LxBxSxE: jax.Array
    router_weights_LxBxSxE: jax.Array
    cache: Sequence[KVCache] | None
    selector_state: selectors.State | None


class Block(nn.Module):
    """h = x + norm(attention(x)); out = h + norm(mixture(h)): norms come after the sub-layers."""

    architecture: Architecture
    layout: Layout
    compute: Compute

    @nn.compact
    def __call__(self, x_BxSxD, segment_ids_BxS, positions_BxS, rotary, expert_mask, evidence_BxSxE, cache=None):
        """Returns (residual stream, (router logits, router weights [batch, length, experts], cache))."""
        arch, rules, dtype = self.architecture, self.compute.rules, jnp.dtype(self.compute.dtype)
        attention = Attention(arch, dtype, rules, self.compute.attention, name="attention")
        attended, cache = attention(x_BxSxD, segment_ids_BxS, positions_BxS, rotary, cache)
        x_BxSxD = x_BxSxD + RMSNorm(arch.norm_eps, name="attention_norm")(attended)
        x_BxSxD = sharding.constrain(x_BxSxD, ("batch", "length", None), rules)
        moe = MoE(arch, self.layout, dtype, rules, self.compute.dispatch, name="moe")
        mixed, routing = moe(x_BxSxD, expert_mask, evidence_BxSxE)
        x_BxSxD = x_BxSxD + RMSNorm(arch.norm_eps, name="moe_norm")(mixed)
        return sharding.constrain(x_BxSxD, ("batch", "length", None), rules), (*routing, cache)


class Selection(nn.Module):
    """A selector's evidence for each expert, whose tables are leaves of the model, though derived and not trained."""

    architecture: Architecture
    layout: Layout
    selector: selectors.Selector

    @nn.compact
    def __call__(
        self,
        tokens_BxS: jax.Array,
        positions_BxS: jax.Array,
        expert_mask: jax.Array | None,
        state: selectors.State | None,
    ) -> tuple[jax.Array, selectors.State]:
        """Returns (evidence float32 [batch, length, experts], the state after the tokens)."""
        selector, experts = self.selector, self.layout.num_experts
        shapes = selector.table_shapes(experts)
        tables = {name: parameter(self, name, shape, (None,) * len(shape)) for name, shape in shapes.items()}
        # The inverse temperature of the posterior.
        scale = jnp.exp(parameter(self, "log_scale", (), (), nn.initializers.zeros).astype(jnp.float32))
        if state is None:
            state = selectors.new_state(selector, self.architecture, tokens_BxS.shape[0], experts)
        is_token_BxS = None
        if expert_mask is not None and expert_mask.ndim > 1:  # where no expert is on there is no token
            is_token_BxS = jnp.broadcast_to(
                jnp.any(expert_mask, axis=-1).reshape(len(tokens_BxS), -1), tokens_BxS.shape
            )
        evidence_BxSxE, state = selectors.advance(selector, tables, state, tokens_BxS, positions_BxS, is_token_BxS)
        return scale * evidence_BxSxE, state


class Decoder(nn.Module):
    """Embedding, blocks, final norm, head."""

    architecture: Architecture
    layout: Layout
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self,
        tokens_BxS: jax.Array,
        segment_ids_BxS: jax.Array | None = None,
        positions_BxS: jax.Array | None = None,
        expert_mask: jax.Array | None = None,
        cache: Sequence[KVCache] | None = None,
        selector_state: selectors.State | None = None,
    ) -> Output:
        """Computes the logits of every position.

        Args:
          tokens_BxS: integer token ids.
          segment_ids_BxS: a token attends only to tokens of its own segment; by default a sequence is one segment.
          positions_BxS: position within the document; by default within the sequence.
          expert_mask: bool [experts], [batch, experts] or [batch, length, experts]; False switches an expert off.
          cache: a `KVCache` for each block, with the sequences' earlier positions; segments have no effect then.
          selector_state: with a cache, that of the model's selector after the earlier positions.
        """
        arch, rules = self.architecture, self.compute.rules
        if segment_ids_BxS is None:
            segment_ids_BxS = jnp.ones_like(tokens_BxS)
        if positions_BxS is None:
            positions_BxS = jnp.broadcast_to(jnp.arange(tokens_BxS.shape[1]), tokens_BxS.shape)

        embedding_VxD = parameter(self, "embedding", (arch.vocab_size, arch.d_model), ("vocab", "embed"))
        # Gathered over fsdp before the lookup; otherwise the partitioner would gather the looked-up vectors.
        table_VxD = sharding.constrain(embedding_VxD.astype(self.compute.dtype), ("vocab", None), rules)
        x_BxSxD = table_VxD[tokens_BxS]
        x_BxSxD = sharding.constrain(x_BxSxD, ("batch", "length", None), rules)

        # Once for all blocks: cosines cost more than everything else between the matmuls of queries and keys.
        rotary = RotaryEmbedding.of(positions_BxS, arch.head_dim, arch.rope_theta)
        evidence_BxSxE = None
        selector = selectors.selector_of(self.layout.selection)
        if selector:
            selection = Selection(arch, self.layout, selector, name=SELECTOR.rstrip("/"))
            evidence_BxSxE, selector_state = selection(tokens_BxS, positions_BxS, expert_mask, selector_state)
            evidence_BxSxE = sharding.constrain(evidence_BxSxE, ("batch", "length", None), rules)
        context = (segment_ids_BxS, positions_BxS, rotary, expert_mask, evidence_BxSxE)
        blocks = self._scanned_blocks if self.compute.scan_layers else self._separate_blocks
        x_BxSxD, (router_logits, router_weights, cache) = blocks(x_BxSxD, context, cache)

        x_BxSxD = RMSNorm(arch.norm_eps, name="final_norm")(x_BxSxD)
        if arch.tied_embeddings:
            head_DxV = embedding_VxD.T
        else:
            head_DxV = parameter(self, "head", (arch.d_model, arch.vocab_size), ("embed", "vocab"))
        logits_BxSxV = jnp.einsum(
            "BSD,DV->BSV",
            x_BxSxD,
            head_DxV.astype(self.compute.dtype),
            preferred_element_type=jnp.float32,
        )
        logits_BxSxV = sharding.constrain(logits_BxSxV, ("batch", "length", "vocab"), rules)
        return Output(x_BxSxD, logits_BxSxV, router_logits, router_weights, cache, selector_state)

    def head(self, params: Mapping[str, jax.Array]) -> jax.Array:
        """The head [d_model, vocab] of flat parameters, in the dtype of the computation, gathered over fsdp."""
        head_DxV = params["embedding"].T if self.architecture.tied_embeddings else params["head"]
        return sharding.constrain(head_DxV.astype(self.compute.dtype), (None, "vocab"), self.compute.rules)

    def _scanned_blocks(self, x_BxSxD, context, cache):
        """Scans one block over stacked leaves. `nn.scan` declares them, `scan_blocks` applies them."""
        fields = (self.architecture, self.layout, self.compute)
        if self.is_initializing():
            stacked_block = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  # its declared type is too narrow
                length=self.architecture.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return stacked_block(*fields, name="blocks")(x_BxSxD, *context)

        def block(leaves, x_BxSxD, context):
            return Block(*fields, parent=None, name="blocks").apply({"params": leaves}, x_BxSxD, *context)

        policy, compute = REMAT_POLICIES[self.compute.remat], self.compute
        if policy:
            # Only in an unrolled loop could XLA merge recomputed operations with those of the forward pass.
            block = jax.checkpoint(block, policy=policy, prevent_cse=compute.unroll > 1)
        leaves = self.variables["params"]["blocks"]
        length = self.architecture.num_layers
        return scan_blocks(
            block, leaves, x_BxSxD, context, length, unroll=compute.unroll, input_gradient=compute.input_gradient
        )

    def _separate_blocks(self, x_BxSxD, context, cache):
        """Applies blocks with separate leaves: slicing a stack would cost a copy of each leaf at each token."""
        outputs = []
        for i in range(self.architecture.num_layers):
            block = Block(self.architecture, self.layout, self.compute, name=f"blocks_{i}")
            x_BxSxD, output = block(x_BxSxD, *context, cache=cache[i] if cache else None)
            outputs.append(output)
        logits, weights, cache = zip(*outputs, strict=True)
        return x_BxSxD, (jnp.stack(logits), jnp.stack(weights), cache)

    def apply_flat(self, params: dict[str, jax.Array], *args: Any, **kwargs: Any) -> Output:
        """Calls the decoder with a flat dict of parameters, {path: leaf}."""
        variables = {"params": traverse_util.unflatten_dict(params, sep="/")}
        return cast(Output, self.apply(variables, *args, **kwargs))

    def init_flat(self, key: jax.Array) -> dict[str, jax.Array]:
        """Fresh parameters as a flat dict {path: float32 leaf}."""
        return _flat(nn.unbox(self.init(key, jnp.zeros((1, 2), jnp.int32))["params"]))

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the parameters, {path: leaf}, without computing them."""
        return {path: box.value for path, box in self._declared().items()}

    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axis names of the parameters, {path: one name per dimension}."""
        return {path: tuple(box.names) for path, box in self._declared().items()}

    def _declared(self) -> dict[str, nn.LogicallyPartitioned]:
        # How a model is computed changes no leaf, and the simplest way is traced in the least time.
        return _declared(self.architecture, self.layout, self.compute.scan_layers)


@functools.lru_cache
def _declared(architecture: Architecture, layout: Layout, scan_layers: bool) -> dict[str, nn.LogicallyPartitioned]:
    """The parameters of a decoder, {path: shape and dtype, boxed with their logical axes}."""
    decoder = Decoder(architecture, layout, Compute(scan_layers=scan_layers), parent=None)
    variables = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return _flat(variables["params"])


def scan_blocks(
    block: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    leaves: Any,
    x: jax.Array,
    context: Any,
    length: int,
    unroll: int = 1,
    input_gradient: bool = True,
) -> tuple[jax.Array, Any]:
    """Applies a block once for each layer; the backward pass can end at the first block's leaves.

    Args:
      block: (leaves of a layer, x, context) -> (x, output).
      leaves: pytree of stacked leaves, [layers, ...].
      x: input of the first layer; the inputs of all layers have its shape and dtype.
      context: pytree passed to every layer. Without `input_gradient` it gets no gradient.
      length: the number of layers.
      unroll: layers per iteration of the loop.
      input_gradient: whether the gradient of x is needed. If not, it is 0, and the backward pass of the first layer
        computes the gradients of its leaves only.

    Returns:
      (x after the last layer, outputs [layers, ...]).
    """
    if input_gradient:
        return jax.lax.scan(lambda x, layer: block(layer, x, context), x, leaves, length, unroll=unroll)
    apply, is_first = _end_at_first(block), jnp.arange(length) == 0
    return jax.lax.scan(lambda x, layer: apply(*layer, x, context), x, (is_first, leaves), length, unroll=unroll)


def _end_at_first(block: Callable) -> Callable:
    """The block as a function (is_first, leaves, x, context), in which the first block gives x no gradient."""

    @jax.custom_vjp
    def run(is_first, leaves, x, context):
        return block(leaves, x, context)

    def forward(is_first, leaves, x, context):
        out, vjp = jax.vjp(lambda leaves, x: block(leaves, x, context), leaves, x)
        return out, (is_first, vjp)

    def backward(residuals, cotangents):
        is_first, vjp = residuals

        def end():
            d_leaves, d_x = vjp(cotangents)
            return d_leaves, jnp.zeros_like(d_x)  # the computation of d_x is dead code

        return None, *jax.lax.cond(is_first, end, lambda: vjp(cotangents)), None

    run.defvjp(forward, backward)
    return run


def separate_layers(leaves: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Converts {path: leaf} of stacked layers, `blocks/*`, to separate layers, `blocks_0/*`, `blocks_1/*`, ..."""
    separate = {}
    for path, leaf in leaves.items():
        if path.startswith("blocks/"):
            separate |= {path.replace("blocks", f"blocks_{i}", 1): leaf[i] for i in range(num_layers)}
        else:
            separate[path] = leaf
    return separate


def _flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")
