"""Throughput of `flexolmo tokenize`, next to that of the batch encoder of `tokenizers` on the same cores.

    python benchmarks/tokenizing.py --tokenizer=tokenizer.json --megabytes=64 --processes=2

Texts of random words, in as many JSON-lines files as `--files`. In turns, `Tokenizer.encode_batch_fast` encodes all
texts, which are in memory, with the library's own threads, and `flexolmo tokenize` makes a corpus of the files, with so
many processes. Seconds are medians; those of the command are from its start to its end, "work" is without the time that
it takes for files of one word each. Use as many processes as `tokenizers` has threads: one for each core. On a machine
with other work, compare seconds of CPU time, which all threads and processes add to. Linux and macOS only.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import tokenizers
from rich.console import Console

from flexolmo_jax.data.tokenization.tokenizer import load_tokenizer
from flexolmo_jax.tables import plain_table, show

BATCH = 1024  # texts


def main() -> None:
    """Measures both in turns, prints a table, and writes the results to a file if asked."""
    options = _options()
    tokenizer = load_tokenizer(options.tokenizer)
    texts = _texts(options.megabytes * 1_000_000)
    size = sum(len(text.encode()) for text in texts)
    times: dict[str, list[tuple[float, float]]] = {"tokenizers": [], "command": [], "start": []}
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        folder = pathlib.Path(name)
        _write(folder / "texts", texts, options.files)
        _write(folder / "word", ["word"] * options.files, options.files)
        for _ in range(options.runs):
            times["tokenizers"].append(_seconds(lambda: _encode(tokenizer.plain, texts)))
            times["start"].append(_seconds(lambda: _tokenize(folder, "word", options)))
            times["command"].append(_seconds(lambda: _tokenize(folder, "texts", options)))
    results = {"bytes": size, **{kind: _medians(times, place) for place, kind in enumerate(("seconds", "cpu_seconds"))}}
    table = plain_table("", ["seconds", "MB/s", "CPU seconds", "MB per CPU second"])
    for name in ("tokenizers", "command", "work"):
        seconds, cpu = results["seconds"][name], results["cpu_seconds"][name]
        table.add_row(name, f"{seconds:.2f}", f"{size / 1e6 / seconds:.2f}", f"{cpu:.2f}", f"{size / 1e6 / cpu:.2f}")
    show(table, Console())
    for name in ("seconds", "cpu_seconds"):
        results[f"ratio of {name}"] = ratio = results[name]["tokenizers"] / results[name]["work"]
        print(f"throughput of the work to that of tokenizers, by {name}: {ratio:.0%}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({**vars(options), **results}, file, indent=2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="bytes", help="a tokenizer.json, or 'bytes'")
    parser.add_argument("--megabytes", type=float, default=64, help="of text")
    parser.add_argument("--files", type=int, default=8, help="number of input files")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", help="where to put a temporary directory; the system's own by default")
    parser.add_argument("--json", help="file for the results")
    return parser.parse_args()


def _texts(size: float) -> list[str]:
    """Documents of some 3,000 characters; frequent words are short, as in prose."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwygpbvk"))
    words = ["".join(rng.choice(letters, 2 + int(np.log2(rank + 1)) // 2 + rng.integers(3))) for rank in range(30_000)]
    ranks = np.minimum(rng.zipf(1.2, size=int(size / 4)), len(words)) - 1
    texts, total = [], 0
    for start in range(0, len(ranks), 600):
        texts.append(" ".join(words[rank] for rank in ranks[start : start + 600]))
        total += len(texts[-1])
        if total >= size:
            break
    return texts


def _write(folder: pathlib.Path, texts: list[str], files: int) -> None:
    folder.mkdir()
    for number in range(files):
        lines = (json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts[number::files]))
        (folder / f"{number:05}.jsonl").write_text("".join(lines))


def _encode(backend: tokenizers.Tokenizer, texts: list[str]) -> None:
    for start in range(0, len(texts), BATCH):
        backend.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)


def _tokenize(folder: pathlib.Path, texts: str, options: argparse.Namespace) -> None:
    out = folder / "corpus"
    flags = [f"--input={folder / texts}/*", f"--tokenizer={options.tokenizer}", f"--processes={options.processes}"]
    subprocess.run(
        [sys.executable, "-m", "flexolmo_jax", "tokenize", *flags, f"--out={out}"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run(["rm", "-r", out], check=True)


def _medians(times: dict[str, list[tuple[float, float]]], place: int) -> dict[str, float]:
    seconds = {name: statistics.median(run[place] for run in runs) for name, runs in times.items()}
    return seconds | {"work": seconds["command"] - seconds["start"]}


def _seconds(call: Callable[[], None]) -> tuple[float, float]:
    """Seconds that a call takes, and seconds of CPU time."""
    start, cpu = time.perf_counter(), _cpu_seconds()
    call()
    return time.perf_counter() - start, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
