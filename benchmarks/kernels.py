"""Speed of the grouped matmul and of attention on this machine's device.

    python benchmarks/kernels.py --tokens 65536 --experts 4 --d_model 2048 --d_ff 8192

Measures the grouped matmul of `--tokens` routed tokens, divided unevenly among `--experts` experts, by the
implementations for any device and the one chosen for this device, beside one plain matmul of all tokens; and causal
attention of `--batch` sequences of `--length` tokens, of one document and of eight. All in bfloat16. Times are means of
`--runs` calls after a first one. FLOPs are those that are needed: for attention, of a single document without masked
scores. `mosaic` is `blocks` where its tiles do not fit.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Column, Table

from flexolmo_jax import sharding
from flexolmo_jax.model.kernels import causal_attention, grouped_matmul

ANYWHERE = ("ragged", "blocks")  # grouped matmuls for all devices
DOCUMENTS = (1, 8)


def main() -> None:
    """Measures and prints a table."""
    options = _options()
    platform = sharding.platform_of(jax.devices()[0])
    table = Table(Column("", no_wrap=True))
    for name in ("forward, ms", "TFLOP/s", "with gradients, ms", "TFLOP/s"):
        table.add_column(name, justify="right")
    for name, flops, function, arguments in (*_grouped(options, platform), *_attention(options, platform)):
        cells = [name]
        # The backward pass of a matmul is two.
        for timed, times in ((_forward(function), 1), (_with_gradients(function), 3)):
            seconds = _seconds(jax.jit(timed), arguments, options.runs)
            cells += [f"{seconds * 1e3:.2f}", f"{times * flops / seconds / 1e12:.2f}"]
        table.add_row(*cells)
    Console().print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", table, sep="\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(
        tokens=65_536, experts=4, d_model=2048, d_ff=8192, batch=2, length=4096, heads=32, head_dim=128, runs=20
    )
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    return parser.parse_args()


def _grouped(options: argparse.Namespace, platform: str) -> Iterator[tuple]:
    """(name, FLOPs of the forward pass, function, its arguments, the cotangent last)."""
    shapes = (options.tokens, options.d_model), (options.experts, options.d_model, options.d_ff)
    x_RxD, kernels_ExDxF, cotangent_RxF = _random(*shapes, (options.tokens, options.d_ff))
    rng = np.random.default_rng(0)
    sizes_E = jnp.asarray(rng.multinomial(options.tokens, rng.dirichlet([20] * options.experts)), jnp.int32)
    flops = 2 * options.tokens * options.d_model * options.d_ff
    yield "matmul", flops, jnp.matmul, (x_RxD, kernels_ExDxF[0], cotangent_RxF)
    for name in dict.fromkeys((*ANYWHERE, grouped_matmul.choose(platform))):

        def multiply(x_RxD, kernels_ExDxF, name=name):
            return grouped_matmul.grouped_matmul(x_RxD, kernels_ExDxF, sizes_E, name)

        yield f"grouped: {name}", flops, multiply, (x_RxD, kernels_ExDxF, cotangent_RxF)


def _attention(options: argparse.Namespace, platform: str) -> Iterator[tuple]:
    """The same of attention."""
    shape = (options.batch, options.length, options.heads, options.head_dim)
    arguments = _random(shape, shape, shape, shape)
    flops = 2 * options.batch * options.heads * options.length**2 * options.head_dim
    name = causal_attention.choose(platform)
    for documents in DOCUMENTS:
        segment_ids_S = 1 + jnp.arange(options.length) * documents // options.length
        segment_ids_BxS = jnp.broadcast_to(segment_ids_S, shape[:2])
        attend = functools.partial(causal_attention.KERNELS[name], segment_ids_BxS=segment_ids_BxS)
        yield f"{name}, documents: {documents}", flops, attend, arguments


def _random(*shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def _forward(function: Callable) -> Callable:
    return lambda *arguments: function(*arguments[:-1])


def _with_gradients(function: Callable) -> Callable:
    def both(*arguments):
        *inputs, cotangent = arguments
        output, vjp = jax.vjp(function, *inputs)
        return output, vjp(cotangent)

    return both


def _seconds(function: Callable, arguments: list[jax.Array], runs: int) -> float:
    """The mean time of a call."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    for _ in range(runs):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / runs


if __name__ == "__main__":
    main()
