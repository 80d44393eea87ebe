"""Tokens per second of `Model.generate` and of transformers' `generate`, side by side on one random model.

    python benchmarks/generation.py

Both sides hold the same float32 weights (brought over by `flexolmo import-hf`) and must write the same tokens.
Times are medians over alternating runs. The memory rate is what a step must read (every weight but the
embedding's and those of experts that no token chose) over the time of a step, next to the rate at which the machine
reads a large array with all its cores. Needs the extra `interop`.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

import flexolmo_jax
from flexolmo_jax import cli
from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.request import Request

# The third, batched_mm, copies the experts' kernels for every token: on a CPU it is slower than these many times over.
IMPLEMENTATIONS = ("eager", "grouped_mm")
OURS = "flexolmo"


def main() -> None:
    """Measures every batch size, prints a table, and writes the figures where asked."""
    options = _options()
    with tempfile.TemporaryDirectory() as home:
        theirs = _random_model(options)
        theirs.save_pretrained(f"{home}/hf")
        with contextlib.redirect_stdout(io.StringIO()):
            cli.main(["import-hf", f"--source={home}/hf", f"--out={home}/model"])
        ours = flexolmo_jax.load(f"{home}/model")
    results = [_measure(ours, theirs, batch, options) for batch in options.batch]
    for result in results:
        _show(result)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({**vars(options), "results": results}, file, indent=2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(d_model=512, d_ff=1376, layers=8, heads=8, experts=4, top_k=2, vocab=50_304, prompt=64, new=64, runs=5)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts at once")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


def _random_model(options: argparse.Namespace) -> transformers.FlexOlmoForCausalLM:
    config = transformers.FlexOlmoConfig(
        vocab_size=options.vocab,
        hidden_size=options.d_model,
        intermediate_size=options.d_ff,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        initializer_range=0.05,
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=options.vocab - 1,
    )
    torch.manual_seed(0)
    return transformers.FlexOlmoForCausalLM(config).eval()


def _measure(ours, theirs, batch: int, options: argparse.Namespace) -> dict:
    # Token ids of prompts, away from the special ones.
    prompts = np.random.default_rng(0).integers(1, options.vocab - 1, (batch, options.prompt))
    sides = {OURS: lambda: [c.token_ids for c in ours.generate(prompts.tolist(), options.new)]}
    for implementation in IMPLEMENTATIONS:
        sides[f"transformers, {implementation}"] = lambda name=implementation: _theirs(theirs, name, prompts, options)
    written = {name: run() for name, run in sides.items()}  # compiles, too
    seconds = {name: [] for name in (*sides, "decode", "read")}
    for _ in range(options.runs):
        for name, run in sides.items():
            _timed(run, seconds[name])
        engine = Engine(ours, slots=batch)
        engine.add([Request(prompt, options.new) for prompt in prompts.tolist()])
        engine.step(options.new // 4)
        _timed(lambda engine=engine: engine.step(options.new), seconds["decode"])
        _timed(_read, seconds["read"])
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    step = median["decode"] / (options.new - options.new // 4)
    best = min(median[name] for name in sides if name != OURS)
    return {
        "batch": batch,
        "same_tokens": all(tokens == written[OURS] for tokens in written.values()),
        "tokens_per_second": {name: batch * options.new / median[name] for name in sides},
        "ratio": best / median[OURS],
        "step_ms": 1e3 * step,
        "step_gigabytes_per_second": _touched(ours, batch, options) / step / 1e9,
        "memory_gigabytes_per_second": _READ.nbytes / median["read"] / 1e9,
    }


def _timed(run, times: list[float]) -> None:
    time.sleep(0.5)  # threads of the side before spin a while before they sleep
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)


def _theirs(model, implementation: str, prompts: np.ndarray, options: argparse.Namespace) -> list[list[int]]:
    model.set_experts_implementation(implementation)
    tokens = torch.from_numpy(prompts)
    length = {"max_new_tokens": options.new, "min_new_tokens": options.new, "do_sample": False}
    with torch.no_grad():
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **length)
    return out[:, options.prompt :].tolist()


_READ = np.ones(100_000_000, np.float32)


def _read() -> None:
    parts = np.array_split(_READ, os.cpu_count())
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(np.sum, parts))


def _touched(model, batch: int, options: argparse.Namespace) -> float:
    """Bytes that a step must read: all weights but the embedding, and the experts that its tokens chose.

    With one token these are its top-k; with several, the number that independent choices would reach.
    """
    experts = options.experts * (1 - (1 - options.top_k / options.experts) ** batch)
    sizes = {path: leaf.nbytes for path, leaf in model.params.items() if path != "embedding"}
    return sum(size * (experts / options.experts if "/experts/" in path else 1) for path, size in sizes.items())


def _show(result: dict) -> None:
    table = Table("batch of " + str(result["batch"]), "tokens/s")
    for name, rate in result["tokens_per_second"].items():
        table.add_row(name, f"{rate:.1f}")
    console = Console()
    console.print(table)
    console.print(
        f"{result['ratio']:.2f} times the best of transformers; the same tokens: {result['same_tokens']}; "
        f"a step takes {result['step_ms']:.2f} ms and reads {result['step_gigabytes_per_second']:.1f} GB/s, "
        f"memory {result['memory_gigabytes_per_second']:.1f} GB/s\n"
    )


if __name__ == "__main__":
    main()
