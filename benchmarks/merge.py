"""Wall time and memory of `flexolmo merge` and `flexolmo opt-out`, next to copying and reading the same bytes.

    python benchmarks/merge.py --experts 4 16

An anchor and its contributions have random float32 weights. In turns, each command runs in a process of its own,
`cp -r` copies as many bytes as the command writes, and every byte that it must read is read once; inputs lie in the
page cache if they fit. Times are medians. "work" is the time after Python has started and the modules are imported,
"command" that from start to end; the ratio is work to copying and reading. Memory is the peak of the process above what
it held before. Linux only.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from flexolmo_jax.checkpoint.manifests import (
    ANCHOR_NAME,
    MOE,
    ContributionManifest,
    ExpertRecord,
    ModelManifest,
    digest_name,
)
from flexolmo_jax.checkpoint.model_directory import PARAMS, TOKENIZER_FILE, write_contribution, write_model
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer
from flexolmo_jax.model.architecture import ANCHOR, Architecture
from flexolmo_jax.model.decoder import Decoder
from flexolmo_jax.model.selectors import BUCKETS

COMMAND = """
import json, re, sys, time
from flexolmo_jax import cli
from flexolmo_jax.combine import merge, opt_out

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

before, start = peak(), time.perf_counter()
cli.main(sys.argv[1:])
print(json.dumps({"seconds": time.perf_counter() - start, "memory": peak() - before}))
"""


def main() -> None:
    """Measures every number of experts, prints a table, and writes the results to a file if asked."""
    options = _options()
    results = []
    for experts in options.experts:
        with tempfile.TemporaryDirectory(dir=options.directory) as home:
            results += _measure(pathlib.Path(home), experts, options)
    _show(results)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({**vars(options), "results": results}, file, indent=2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(d_model=1024, d_ff=2752, layers=16, heads=16, vocab=512, runs=5, pause=6).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--experts", type=int, nargs="+", default=[4], help="with the anchor")
    parser.add_argument("--directory", help="where to put a temporary directory; the system's own by default")
    parser.add_argument("--json", help="file for the results")
    return parser.parse_args()


def _measure(home: pathlib.Path, experts: int, options: argparse.Namespace) -> list[dict]:
    """Merges the inputs, then opts the last expert out; the disk holds two copies of the weights at most."""
    architecture = make_architecture(options, options.vocab)
    names = write_inputs(home / "inputs", experts, architecture)
    inputs = [f"--anchor={home}/inputs/anchor", *(f"--contribution={home}/inputs/{name}" for name in names)]
    merge = ["merge", *inputs, f"--out={home}/out"]
    results = [_compare(merge, home / "inputs", home / "out", options)]
    run_command([*merge[:-1], f"--out={home}/model"])
    shutil.rmtree(home / "inputs")
    # What opting out reads and writes: the model without the files of an expert. Links to them take no room.
    shutil.copytree(home / "model", home / "rest", copy_function=os.link)
    for part in (home / "rest" / PARAMS).glob("blocks.moe.experts.*/c.*"):
        if part.name.split(".")[2] == str(experts - 1):
            part.unlink()
    opt_out = ["opt-out", f"--model={home}/model", f"--expert={names[-1]}", f"--out={home}/out"]
    results.append(_compare(opt_out, home / "rest", home / "out", options))
    return [{"experts": experts, **result} for result in results]


def make_architecture(options: argparse.Namespace, vocab_size: int) -> Architecture:
    """The architecture that the options describe."""
    return Architecture(
        vocab_size=vocab_size,
        num_layers=options.layers,
        d_model=options.d_model,
        num_heads=options.heads,
        num_kv_heads=options.heads,
        d_ff=options.d_ff,
        rope_theta=10_000.0,
        norm_eps=1e-6,
    )


def write_inputs(
    home: pathlib.Path, experts: int, architecture: Architecture, tokenizer: Tokenizer | None = None
) -> list[str]:
    """Writes an anchor and contributions with random weights; returns the names of the contributions.

    With a tokenizer the anchor has it, and all have statistics of text that was never there, for a selector.
    """
    rng = np.random.default_rng(0)
    leaves = {
        path: Slice(_random(rng, path, leaf.shape), None, path)
        for path, leaf in Decoder(architecture, ANCHOR).abstract().items()
    }
    shared = {path: leaf for path, leaf in leaves.items() if not path.startswith(MOE)}
    expert = {digest_name(path): leaf for path, leaf in leaves.items() if path.startswith(MOE)}
    manifest = ModelManifest(
        architecture=dataclasses.asdict(architecture),
        experts=[ExpertRecord(name=ANCHOR_NAME, leaves={}, card={})],
        shared={},
        top_k=1,
        tokenizer_digest=tokenizer.digest if tokenizer else "",
        eos_id=tokenizer.eos_id if tokenizer else 0,
    )

    def complete(directory: epath.Path, written: ModelManifest) -> None:
        if tokenizer:
            tokenizer.save(directory / TOKENIZER_FILE)

    def statistics() -> dict[str, Slice]:
        if not tokenizer:
            return {}
        counts = rng.poisson(rng.gamma(0.1, 100, BUCKETS))
        arrays = {"ngram/counts": counts.astype(np.int64), "ngram/documents": np.array(1000)}
        return {leaf: Slice(array, None, leaf) for leaf, array in arrays.items()}

    of_experts, of_anchor = {ANCHOR_NAME: expert}, {ANCHOR_NAME: statistics()}
    anchor = write_model(home / "anchor", manifest, shared, of_experts, statistics=of_anchor, complete=complete)
    names = [f"owner-{i:04}" for i in range(1, experts)]
    for name in names:
        for leaf in expert.values():
            leaf.source[...] += 1e-3  # no two experts have the same weights
        contribution = ContributionManifest(
            name=name, anchor_digest=anchor.anchor_digest, architecture=anchor.architecture, card={}, leaves={}
        )
        write_contribution(home / name, contribution, expert, statistics=statistics())
    return names


def _random(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """A leaf as it is before training, float32."""
    return np.ones(shape, np.float32) if path.endswith("scale") else 0.02 * rng.standard_normal(shape, np.float32)


def _compare(arguments: list[str], source: pathlib.Path, out: pathlib.Path, options: argparse.Namespace) -> dict:
    """Runs a command, which makes `out`, and copies and reads `source`, in turns."""
    runs, commands, copies, reads = [], [], [], []
    _read(source)
    total = directory_size(source)
    for _ in range(options.runs):
        commands.append(_timed(lambda: runs.append(run_command(arguments)), options.pause, total))
        size = directory_size(out)
        shutil.rmtree(out)
        copies.append(_timed(lambda: subprocess.run(["cp", "-r", source, out], check=True), options.pause, total))
        shutil.rmtree(out)
        reads.append(_timed(lambda: _read(source), options.pause, 0))
    seconds = float(np.median([run["seconds"] for run in runs]))
    copy, read = float(np.median(copies)), float(np.median(reads))
    return {
        "command": arguments[0],
        "gigabytes": size / 1e9,
        "copied_gigabytes": total / 1e9,
        "seconds": seconds,
        "command_seconds": float(np.median(commands)),
        "copy_seconds": copy,
        "read_seconds": read,
        "ratio": seconds / (copy + read),
        "memory_megabytes": max(run["memory"] for run in runs) / 2**20,
    }


def _timed(run: Callable[[], object], pause: int, size: int) -> float:
    """Seconds of a run that writes `size` bytes, from a state that is the same for all.

    Nothing waits to be written; the file system (ext4) has forgotten inodes that were just freed, around which it
    searches for some seconds; and a virtual machine has the memory again that it gave back to its host: twice the
    size, because the pages that are then written to need not be the same.
    """
    os.sync()
    time.sleep(pause)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    np.ones(min(2 * size, free // 4 * 3), np.uint8)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def run_command(arguments: list[str]) -> dict:
    """Runs a command in a process of its own; returns its seconds and its memory in bytes."""
    command = [sys.executable, "-c", COMMAND, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def directory_size(directory: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _read(directory: pathlib.Path) -> None:
    block = bytearray(2**22)
    for file in directory.rglob("*"):
        if file.is_file():
            with open(file, "rb", buffering=0) as stream:
                while stream.readinto(block):
                    pass


def _show(results: list[dict]) -> None:
    table = Table("experts", "GB", "work, s", "cp, s", "read, s", "ratio", "command, s", "MiB")
    for r in results:
        times = [f"{r[key]:.2f}" for key in ("seconds", "copy_seconds", "read_seconds", "ratio", "command_seconds")]
        table.add_row(
            f"{r['command']} of {r['experts']}", f"{r['gigabytes']:.2f}", *times, f"{r['memory_megabytes']:.0f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
