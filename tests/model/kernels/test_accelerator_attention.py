"""Attention by the kernels of accelerators, interpreted where there is none, against plain attention."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import SHARDING_RULES
from flexolmo_jax import sharding
from flexolmo_jax.model.decoder import REMAT_POLICIES, Compute, Decoder
from flexolmo_jax.model.kernels import accelerator_attention
from flexolmo_jax.model.kernels.accelerator_attention import cudnn, splash
from flexolmo_jax.model.kernels.causal_attention import attend
from tests.support.pallas_interpreter import interpreted
from tests.support.tiny import ARCHITECTURE, COMPILE_FAST, LAYOUTS, assert_trees_close, random_batch

HEADS, KV_HEADS, HEAD_DIM, LENGTH = 4, 2, 16, 256
# A sequence of one document; of three, whose ends are no multiples of a block, and padding; of one token and padding.
SEGMENT_IDS = random_batch([[256], [100, 3, 130], [1], [128, 128]], LENGTH)["segment_ids"]


def random_arguments(length=LENGTH, dtype=jnp.float32):
    """(query, key, value, cotangent)."""
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.normal(size=(len(SEGMENT_IDS), length, heads, HEAD_DIM)), dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )


def plain(query, key, value, segment_ids):
    """Softmax over all keys, of which those of other documents and those to come weigh nothing."""
    length = query.shape[1]
    key, value = (jnp.repeat(y, query.shape[2] // y.shape[2], axis=2) for y in (key, value))
    scores = jnp.einsum("bsnc,btnc->bnst", query, key) / query.shape[-1] ** 0.5
    visible = (segment_ids[:, :, None] == segment_ids[:, None, :]) & np.tri(length, dtype=bool)
    weights = jnp.where(visible[:, None], jnp.exp(scores), 0)
    return jnp.einsum("bnst,btnc->bsnc", weights / weights.sum(-1, keepdims=True), value)


def with_gradients(attend, arguments, segment_ids=SEGMENT_IDS):
    *inputs, cotangent = arguments

    def computed(cotangent, *inputs):
        out, pull = jax.vjp(lambda *inputs: attend(*inputs, segment_ids), *inputs)
        return out, *pull(cotangent)

    with interpreted():
        return jax.jit(computed, compiler_options=COMPILE_FAST)(cotangent, *inputs)


@pytest.fixture(scope="module")
def expected():
    return jax.device_get(with_gradients(plain, random_arguments()))


@pytest.mark.parametrize("block", [128, 512])
def test_splash_attention_is_causal_and_keeps_documents_apart(monkeypatch, expected, block):
    monkeypatch.setattr(accelerator_attention, "SPLASH_BLOCK", block)
    assert_trees_close(with_gradients(splash, random_arguments()), expected, 1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("kernel", ["splash", "blockwise"])
def test_attention_is_computed_where_sequences_and_heads_are(expected, kernel):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "expert": 1, "tensor": 2})
    with jax.set_mesh(mesh):
        heads = jax.NamedSharding(mesh, sharding.partition_spec(("batch", None, "heads", None), SHARDING_RULES))
        arguments = jax.device_put(random_arguments(), heads)
        actual = with_gradients(lambda *a: attend(kernel, *a, SHARDING_RULES), arguments)
    assert_trees_close(actual, expected, 1e-5)
    assert actual[0].sharding.shard_shape(actual[0].shape) == (1, LENGTH, HEADS // 2, HEAD_DIM)


def test_splash_attention_takes_bfloat16():
    low = random_arguments(dtype=jnp.bfloat16)
    actual = with_gradients(splash, low)
    assert {x.dtype for x in actual} == {jnp.dtype(jnp.bfloat16)}
    exact = with_gradients(plain, [jnp.float32(x) for x in low])
    assert_trees_close(actual, jax.device_get(exact), 0.02)


@pytest.mark.parametrize("kernel", [splash, cudnn])
def test_what_a_kernel_does_not_take_is_computed_without_it(kernel):
    """A length that is no multiple of 128; float32."""
    arguments = tuple(x[:, :40] for x in random_arguments())
    segment_ids = SEGMENT_IDS[:, :40]
    expected = jax.device_get(with_gradients(plain, arguments, segment_ids))
    assert_trees_close(with_gradients(kernel, arguments, segment_ids), expected, 1e-5)


@pytest.mark.parametrize(
    ("length", "head_dim", "dtype", "implementation"),
    [
        (256, 128, "bfloat16", "cudnn"),
        (40, 8, "float16", "cudnn"),
        (256, 128, "float32", "xla"),
        (255, 128, "bfloat16", "xla"),
        (256, 12, "bfloat16", "xla"),
        (256, 256, "bfloat16", "xla"),
    ],
)
def test_cudnn_is_asked_for_what_it_takes(length, head_dim, dtype, implementation):
    """Which it is depends on shapes and dtype alone; the kernel itself runs where there is a GPU."""
    inputs = [jax.ShapeDtypeStruct((2, length, heads, head_dim), dtype) for heads in (4, 2, 2)]
    with mock.patch.object(jax.nn, "dot_product_attention", side_effect=lambda query, *_, **__: query) as asked:
        jax.eval_shape(cudnn, *inputs, jax.ShapeDtypeStruct((2, length), "int32"))
    assert asked.call_args.kwargs["implementation"] == implementation
    assert asked.call_args.kwargs["is_causal"]


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_cudnn_computes_attention_once_unless_nothing_is_kept(remat):
    model = Decoder(ARCHITECTURE, LAYOUTS["pair"], Compute("bfloat16", remat, attention="cudnn"))

    def loss(leaves, tokens):
        return jnp.sum(model.apply_flat(leaves, tokens).hidden_BxSxD.astype(jnp.float32))

    # To trace a kernel, JAX asks whether its library is there.
    with mock.patch("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", return_value=91000):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(model.abstract(), jax.ShapeDtypeStruct((2, 16), jnp.int32))
    computed = re.findall(r"dot_product_attention_(fwd|bwd)_wrapper\[", str(jaxpr))
    assert sorted(computed) == ["bwd"] + ["fwd"] * (1 + (remat == "full"))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_cudnn_attention_is_causal_and_keeps_documents_apart():
    low = random_arguments(dtype=jnp.bfloat16)
    exact = with_gradients(plain, [jnp.float32(x) for x in low])
    assert_trees_close(with_gradients(cudnn, low), jax.device_get(exact), 0.02)
