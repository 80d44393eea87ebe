"""The counts, against the matmuls in the gradient of a plain decoder written out here, layer by layer."""

import dataclasses
import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval

from configs.base import PARTITIONS
from flexolmo_jax.model.architecture import Layout
from flexolmo_jax.model.decoder import REMAT_POLICIES, Compute, Decoder
from flexolmo_jax.model.flops import decode_step_bytes, decode_step_flops, recomputed_flops, train_step_flops
from flexolmo_jax.training.state import trainable_paths
from tests.support.tiny import ARCHITECTURE, LAYOUTS, STACKED, random_leaves

BATCH, LENGTH = 2, 5
TIED = dataclasses.replace(ARCHITECTURE, tied_embeddings=True)
KIND = {"anchor": "anchor", "solo": "solo", "pair": "pair", "router": "stacked", "joint": "stacked"}


def plain_loss(leaves, arch, layout, tokens):
    """Cross-entropy of a sequence, with every matmul an einsum and attention over all positions."""

    def normed(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + arch.norm_eps) * scale.reshape(-1)

    def heads(x):
        return x.reshape(*x.shape[:2], -1, arch.head_dim)

    def feed_forward(x, gate, up, down):
        return jnp.einsum("bsf,fd->bsd", jax.nn.silu(jnp.einsum("bsd,df->bsf", x, gate)) * (x @ up), down)

    x = leaves["embedding"][tokens]
    length = tokens.shape[1]
    for layer in range(arch.num_layers):
        block = {path.removeprefix("blocks/"): leaf[layer] for path, leaf in leaves.items() if "blocks/" in path}
        query, key, value = (
            x @ block[f"attention/{name}"].reshape(arch.d_model, -1) for name in ("query", "key", "value")
        )
        query, key = (normed(y, block[f"attention/{name}_norm/scale"]) for y, name in ((query, "query"), (key, "key")))
        group = arch.num_heads // arch.num_kv_heads
        query, key, value = heads(query), *(jnp.repeat(heads(y), group, axis=2) for y in (key, value))
        scores = jnp.einsum("bshc,bthc->bhst", query, key) * arch.head_dim**-0.5
        scores = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -1e9))
        out = jnp.einsum("bhst,bthc->bshc", scores, value).reshape(x.shape)
        out = out @ block["attention/out"].reshape(-1, arch.d_model)
        x = x + normed(out, block["attention_norm/scale"])
        sets = [
            {leaf: block[f"moe/{name}/{leaf}"] for leaf in ("gate", "up", "down", "router/weight", "router/bias")}
            for name in layout.sets
        ]
        if layout.num_experts == 1:
            mixed = feed_forward(x, *(sets[0][leaf] for leaf in ("gate", "up", "down")))
        elif layout.kind == "pair":
            logits = jnp.stack([x @ s["router/weight"] - jnp.abs(s["router/bias"]) for s in sets], -1)
            weights = jax.nn.softmax(logits)
            outs = [feed_forward(x, s["gate"], s["up"], s["down"]) for s in sets]
            mixed = sum(weights[..., i, None] * out for i, out in enumerate(outs))
        else:
            (experts,) = sets
            weights = jax.nn.softmax(
                jnp.einsum("bsd,ed->bse", x, experts["router/weight"]) - jnp.abs(experts["router/bias"])
            )
            weights, chosen = jax.lax.top_k(weights, layout.top_k)
            gate, up, down = (experts[leaf][chosen] for leaf in ("gate", "up", "down"))
            hidden = jax.nn.silu(jnp.einsum("bsd,bskdf->bskf", x, gate)) * jnp.einsum("bsd,bskdf->bskf", x, up)
            mixed = jnp.sum(weights[..., None] * jnp.einsum("bskf,bskfd->bskd", hidden, down), axis=2)
        x = x + normed(mixed, block["moe_norm/scale"])
    x = normed(x, leaves["final_norm/scale"])
    head = leaves["embedding"].T if arch.tied_embeddings else leaves["head"]
    return -jnp.sum(jax.nn.log_softmax(x @ head)[..., 0])


def dot_flops(jaxpr):
    """[(FLOPs, whether it is of attention's [length, length] kind)] of all dots."""
    dots = []
    for equation in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            dots += dot_flops(inner)
        if equation.primitive.name == "dot_general":
            left, right = (v.aval.shape for v in equation.invars)
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.outvars[0].aval.shape
            flops = 2 * math.prod(shape) * math.prod(left[axis] for axis in contracted)
            dots.append((flops, any(s[-2:] == (LENGTH, LENGTH) and len(s) == 4 for s in (left, right, shape))))
    return dots


@functools.cache
def plain_gradient(arch, layout):
    """(jaxpr of the loss and its gradient with respect to all leaves, for each output the leaf or None: the loss)."""
    leaves = Decoder(arch, layout).abstract()
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    step = jax.value_and_grad(lambda leaves, tokens: plain_loss(leaves, arch, layout, tokens))
    return jax.make_jaxpr(step)(leaves, tokens).jaxpr, [None, *sorted(leaves)]


def counted(arch, layout, trainable):
    """FLOPs of the dots that the loss and the gradients of these leaves need."""
    jaxpr, outputs = plain_gradient(arch, layout)
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [leaf is None or leaf in trainable for leaf in outputs])
    # Of LENGTH x LENGTH positions, causality leaves LENGTH (LENGTH + 1) / 2.
    return sum(flops * (LENGTH + 1) / (2 * LENGTH) if attention else flops for flops, attention in dot_flops(needed))


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("arch", [ARCHITECTURE, TIED], ids=["untied", "tied"])
def test_a_training_step_has_the_matmuls_of_its_gradient(kind, arch):
    layout = LAYOUTS[KIND[kind]]
    trainable = trainable_paths(Decoder(arch, layout).abstract(), PARTITIONS[kind])
    assert train_step_flops(arch, layout, trainable, BATCH, LENGTH) == counted(arch, layout, trainable)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_so_does_every_leaf_trained_alone(layout):
    for leaf in Decoder(ARCHITECTURE, layout).abstract():
        if not (
            layout.num_experts == 1 and leaf.endswith(("router/weight", "router/bias"))
        ):  # the plain decoder has no use for them
            assert train_step_flops(ARCHITECTURE, layout, {leaf}, BATCH, LENGTH) == counted(
                ARCHITECTURE, layout, {leaf}
            ), leaf


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_decoding_a_sequence_token_by_token_costs_a_forward_pass(layout):
    tokens = sum(decode_step_flops(ARCHITECTURE, layout, BATCH, keys) for keys in range(1, LENGTH + 1))
    assert tokens == counted(ARCHITECTURE, layout, set())


def flops_of_dots(jaxpr, times=1):
    """FLOPs of all dots, those inside loops as often as these run; of attention, what causality leaves."""
    total = 0.0
    for equation in jaxpr.eqns:
        loops = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        total += sum(flops_of_dots(inner, loops) for inner in jax.extend.core.jaxprs_in_params(equation.params))
        if equation.primitive.name not in ("dot_general", "ragged_dot_general"):
            continue
        left = equation.invars[0].aval.shape
        numbers = equation.params.get("dimension_numbers")
        numbers = numbers or equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        shape = equation.outvars[0].aval.shape
        flops = times * 2 * math.prod(shape) * math.prod(left[axis] for axis in numbers[0][0])
        # Attention's have a batch of heads and positions; of LENGTH x LENGTH LENGTH (LENGTH + 1) / 2 count.
        is_attention = bool(numbers[1][0]) and LENGTH in (*left, *shape)
        total += flops * (LENGTH + 1) / (2 * LENGTH) if is_attention else flops
    return total


def gradient_flops(layout, trainable, remat):
    """FLOPs of the dots in the gradient of the blocks as the project computes them."""
    model = Decoder(ARCHITECTURE, layout, Compute(remat=remat, attention="blockwise", dispatch="ragged"))
    leaves = model.abstract()
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)

    def loss(trained, frozen, tokens):
        return jnp.sum(model.apply_flat({**frozen, **trained}, tokens).hidden_BxSxD)

    frozen = {path: leaf for path, leaf in leaves.items() if path not in trainable}
    jaxpr = jax.make_jaxpr(jax.grad(loss))({path: leaves[path] for path in trainable}, frozen, tokens).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return flops_of_dots(needed)


@pytest.mark.parametrize("kind", [*PARTITIONS, "all chosen"])
def test_recomputed_flops_are_those_that_rematerialization_adds_to_the_gradient(kind):
    layout = Layout("stacked", 2, 2) if kind == "all chosen" else LAYOUTS[KIND[kind]]
    leaves = Decoder(ARCHITECTURE, layout).abstract()
    trainable = trainable_paths(leaves, PARTITIONS.get(kind, PARTITIONS["joint"]))
    flops = {remat: gradient_flops(layout, trainable, remat) for remat in REMAT_POLICIES}
    for remat in REMAT_POLICIES:
        again = flops[remat] - flops["none"]
        if kind == "all chosen" and remat != "none":  # experts that see all tokens are summed by a matmul: not counted
            again -= 2 * BATCH * LENGTH * ARCHITECTURE.num_layers * layout.num_experts * ARCHITECTURE.d_model
        assert recomputed_flops(ARCHITECTURE, layout, remat, BATCH, LENGTH) == again, remat


def test_decoding_reads_the_weights_that_its_tokens_choose():
    params = random_leaves(Decoder(ARCHITECTURE, STACKED))
    read = {count: decode_step_bytes(ARCHITECTURE, STACKED, params, count, 13.0) for count in (1, 2)}
    layers, expert = 2, 4 * (3 * 32 * 24 + 32 + 1)
    sequence = 4 * (2 * layers * 16 * 13 + 32)  # cache of two heads of 8, and embedding
    # Of four experts one token chooses two, two tokens three; the rest is read once.
    assert read[2] - read[1] == pytest.approx(layers * expert + sequence)
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 + 16  # attention, three norms of the width and that of keys
    shared = layers * block + 32 + 32 * 64  # and the last norm, and the head
    assert read[1] == pytest.approx(4 * shared + 2 * layers * expert + sequence)
    # Of a selector's table each token reads a number for each of the four experts.
    params["selector/log_ratio"] = jnp.zeros((1000, 4))
    assert decode_step_bytes(ARCHITECTURE, STACKED, params, 2, 13.0) == pytest.approx(read[2] + 2 * 4 * 4)
