r"""What a merge of many experts costs at small width: time and memory of each command, by the number of experts.

    python benchmarks/scaling.py --experts 4 64 1000

An anchor of bytes and contributions have random float32 weights and random statistics. For each number of experts, each
command runs in a process of its own: `merge` with a selector; `evaluate` of 16 KiB and `generate` of 64 tokens, where
the selector chooses the experts, top-1; a step of router tuning, top-4, with 16 sequences of 256 tokens; `opt-out` of
an owner. Times include loading and compiling, but not Python's start; that of a step is the last of three. Memory is
the peak of the process above what it held before. Linux only.
"""

import argparse
import json
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np
from merge import directory_size, make_architecture, run_command, write_inputs
from rich.text import Text

from flexolmo_jax.combine.top_k import copy_with_top_k
from flexolmo_jax.data.corpus_writer import write_corpus
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from flexolmo_jax.tables import plain_table, show

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "router.py"
TEXT_BYTES = 1 << 14
STEPS = 3


def main() -> None:
    """Measures every number of experts, prints a table, and writes the results to a file if asked."""
    options = _options()
    results = []
    for experts in options.experts:
        with tempfile.TemporaryDirectory(dir=options.directory) as home:
            results.append(_measure(pathlib.Path(home), experts, options))
    _show(results)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps({**vars(options), "results": results}, indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(d_model=128, d_ff=352, layers=4, heads=4).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 64, 1000], help="with the anchor")
    parser.add_argument("--directory", help="where to put a temporary directory; the system's own by default")
    parser.add_argument("--json", help="file for the results")
    return parser.parse_args()


def _measure(home: pathlib.Path, experts: int, options: argparse.Namespace) -> dict:
    """{command: {"seconds", "memory"}} and the size of the model."""
    tokenizer = byte_tokenizer()
    architecture = make_architecture(options, tokenizer.vocab_size)
    names = write_inputs(home / "inputs", experts, architecture, tokenizer)
    letters = np.random.default_rng(0).integers(97, 123, TEXT_BYTES, np.uint8)
    corpus = write_corpus(home / "text", [letters.tobytes().decode()], tokenizer).path
    inputs = [f"--anchor={home}/inputs/anchor", *(f"--contribution={home}/inputs/{name}" for name in names)]
    model, result = home / "model", dict[str, Any](experts=experts)
    result["merge"] = run_command(["merge", *inputs, f"--out={model}", "--selection=ngram", "--top_k=1"])
    shutil.rmtree(home / "inputs")
    result["gigabytes"] = directory_size(model) / 1e9
    result["evaluate"] = run_command(["evaluate", f"--model={model}", f"--data={corpus}", "--compilation_cache="])
    result["generate"] = run_command(
        ["generate", f"--model={model}", "--prompt=abc", "--max_new_tokens=64", "--compilation_cache="]
    )
    result["router step"] = _router_step(home, corpus)
    result["opt-out"] = run_command(["opt-out", f"--model={model}", f"--expert={names[-1]}", f"--out={home}/out"])
    return result


def _router_step(home: pathlib.Path, corpus: object) -> dict:
    """Tunes the router for a few steps; the seconds are those of the last one."""
    copy_with_top_k(home / "model", 4, home / "top-4")
    flags = [f"--config={CONFIG}:tiny", f"--workdir={home}/tuned", f"--config.start_from={home}/top-4"]
    flags += [f"--config.data.train={corpus}", f"--config.steps={STEPS}", "--config.optimizer.warmup_steps=1"]
    flags += ["--config.data.batch_size=16", "--config.log.every=1", "--config.log.by_layer=False"]
    result = run_command(["train", *flags, "--compilation_cache="])
    last = (home / "tuned" / "metrics.jsonl").read_text().splitlines()[-1]
    return {**result, "seconds": json.loads(last)["step_seconds"]}


def _show(results: list[dict]) -> None:
    commands = ("merge", "opt-out", "evaluate", "generate", "router step")
    table = plain_table("experts", ("model, GB", *commands))
    for result in results:
        cells = [f"{result[name]['seconds']:.1f} s, {result[name]['memory'] / 2**20:.0f} MiB" for name in commands]
        table.add_row(Text(f"{result['experts']:,}"), f"{result['gigabytes']:.2f}", *cells)
    show(table)


if __name__ == "__main__":
    main()
