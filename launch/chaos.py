"""Kills processes of runs at random moments, starts them again, and compares the result with that of undisturbed runs.

    bash launch/chaos.sh [--kills=20] [--processes=2] [--seed=0] [OUT]

An anchor and an expert are trained by several processes each, and merged. Kills (SIGKILL, one process or all) come at
random times, and as soon as a checkpoint, an output or a merge is being written. Prints a table, and exits with status
1 if a result differs by a byte, or a process does not end within a minute after another was killed.
"""

import argparse
import contextlib
import filecmp
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from glob import glob  # that of pathlib fails where a folder vanishes meanwhile
from typing import NamedTuple

import numpy as np
from rich.text import Text

from flexolmo_jax.data.corpus_writer import write_corpus
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from flexolmo_jax.tables import plain_table, show

LIMIT = 60  # seconds in which all must have ended after a kill
TINY = [
    *("--config.model.num_layers=2", "--config.model.d_model=64", "--config.model.num_heads=2"),
    *("--config.model.num_kv_heads=2", "--config.model.d_ff=96", "--config.optimizer.warmup_steps=2"),
]
RUN = [
    *("--config.steps=60", "--config.checkpoint.every=5", "--config.data.sequence_length=64"),
    *("--config.data.batch_size=8", "--config.mesh.data=1", "--config.mesh.fsdp=-1"),
    *("--config.distributed.heartbeat_timeout=10", "--config.distributed.start_timeout=45"),
]
# What is there while something is written, as a pattern in the folder.
WRITING = {
    "checkpoint": "*/checkpoints/*tmp*",
    "output": "**/.*.incomplete",
}


class Command(NamedTuple):
    """A command of the journey: its name, flags, output, and whether several processes run it."""

    name: str
    arguments: list[str]
    output: str
    spans: bool


class Kill(NamedTuple):
    """What happened at a kill."""

    command: str
    moment: str
    killed: str
    statuses: str
    seconds: float


def journey(corpora: pathlib.Path, folder: pathlib.Path) -> list[Command]:
    """The commands that end in a merged model in `folder`."""
    anchor = ["train", "--config=configs/anchor.py:tiny", f"--workdir={folder}/anchor", *TINY, *RUN]
    expert = ["train", "--config=configs/pair.py:tiny", f"--workdir={folder}/news", "--config.expert=news", *RUN]
    expert += [f"--config.start_from={folder}/anchor/model", "--config.optimizer.warmup_steps=2"]
    merge = ["merge", f"--anchor={folder}/anchor/model", f"--contribution={folder}/news/contribution"]
    public = ["--config.publish.public_documents=20", f"--config.data.train={corpora}/public"]
    return [
        Command("anchor", [*anchor, *public], "anchor/model", spans=True),
        Command("expert", [*expert, f"--config.data.train={corpora}/news"], "news/contribution", spans=True),
        Command("merge", [*merge, f"--out={folder}/merged"], "merged", spans=False),
    ]


def start(command: Command, processes: int) -> list[subprocess.Popen]:
    """Starts a command, in several processes if it spans them."""
    count, place = (processes if command.spans else 1), []
    if count > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            place = [f"--coordinator=localhost:{free.getsockname()[1]}", f"--num_processes={count}"]
    program = [sys.executable, "-m", "flexolmo_jax", *command.arguments, *place]
    flags = [[f"--process_id={index}"] if place else [] for index in range(count)]
    return [
        subprocess.Popen([*program, *of_process], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for of_process in flags
    ]


def is_writing(folder: pathlib.Path, pattern: str, since: float) -> bool:
    """Whether something like the pattern is there that has changed since then; former kills have left some, too."""
    found = glob(pattern, root_dir=folder, recursive=True) if pattern else ()
    for name in found:
        with contextlib.suppress(FileNotFoundError):
            if (folder / name).stat().st_mtime > since:
                return True
    return False


def kill(started: Sequence[subprocess.Popen], folder: pathlib.Path, pattern: str, delay: float, rng: random.Random):
    """Kills one of the processes or all, after `delay` seconds or, with a pattern, when a path like that is there.

    Returns (which were killed, exit statuses of all, seconds until all had ended); None where they ended before.
    """
    began, since = time.monotonic(), time.time()
    while time.monotonic() < began + delay and not is_writing(folder, pattern, since):
        if all(process.poll() is not None for process in started):
            return None
        time.sleep(0.002 if pattern else 0.02)
    if any(process.poll() is not None for process in started):
        for process in started:
            process.wait()
        return None
    chosen = rng.choice([[process] for process in started] + [list(started)])
    for process in chosen:
        process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    for process in started:
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            sys.exit(f"chaos.py: a process did not end within {LIMIT} seconds after another was killed")
    which = "all" if len(chosen) == len(started) else f"process {started.index(chosen[0])}"
    statuses = ", ".join(str(process.returncode) for process in started if process not in chosen) or "-"
    return which, statuses, time.monotonic() - killed


def run(command: Command, processes: int) -> float:
    """Runs a command to its end; returns its seconds."""
    began = time.monotonic()
    started = start(command, processes)
    statuses = [process.wait() for process in started]
    if any(statuses):
        sys.exit(f"chaos.py: {command.name} ended with status {', '.join(map(str, statuses))}")
    return time.monotonic() - began


def same(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    names = [{str(path.relative_to(of)) for path in of.rglob("*") if path.is_file()} for of in (first, second)]
    return names[0] == names[1] and not any(filecmp.cmpfiles(first, second, names[0], shallow=False)[1:])


def write_corpora(folder: pathlib.Path) -> None:
    """Corpora of made-up words."""
    for seed, name in enumerate(("public", "news")):
        rng = np.random.default_rng(seed)
        words = ["".join(chr(97 + letter) for letter in rng.integers(0, 26, 5)) for _ in range(50)]
        texts = [" ".join(rng.choice(words, 40)) for _ in range(100)]
        if not (folder / name).exists():
            write_corpus(folder / name, texts, byte_tokenizer())


def main() -> None:
    """Runs the journey undisturbed, then with kills, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=pathlib.Path, default=pathlib.Path("runs/chaos"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        sys.exit(f"chaos.py: {options.out} exists already; name a new folder, or remove this one first")
    corpora, straight, disturbed = (options.out / name for name in ("corpora", "straight", "disturbed"))
    write_corpora(corpora)
    rng = random.Random(options.seed)
    seconds = {command.name: run(command, options.processes) for command in journey(corpora, straight)}
    kills: list[Kill] = []
    commands = journey(corpora, disturbed)
    for number, command in enumerate(commands):
        wanted = round(options.kills * (number + 1) / len(commands))
        moments = ["any time", *WRITING] if command.spans else ["any time", "output"]
        while len(kills) < wanted:
            moment = moments[len(kills) % len(moments)]
            limit, began = seconds[command.name] * (rng.random() if moment == "any time" else 2), time.monotonic()
            happened = kill(start(command, options.processes), disturbed, WRITING.get(moment, ""), limit, rng)
            if happened is None:  # it ended first: once more, and sooner
                seconds[command.name] = min(seconds[command.name], time.monotonic() - began)
                shutil.rmtree(disturbed / pathlib.Path(command.output).parts[0])
                continue
            kills.append(Kill(command.name, moment, *happened))
            print(
                f"kill {len(kills)} of {options.kills}: {kills[-1].command}, {moment}: {kills[-1].killed}", flush=True
            )
        if not (disturbed / command.output).exists():
            run(command, options.processes)
    table = plain_table("command", ("kills", "moments", "others ended with", "within, s", "the same bytes"))
    differs = False
    for command in commands:
        of_command = [event for event in kills if event.command == command.name]
        equal = same(straight / command.output, disturbed / command.output)
        differs = differs or not equal
        statuses = sorted({event.statuses for event in of_command})
        table.add_row(
            Text(command.name),
            str(len(of_command)),
            ", ".join(f"{moment} {sum(e.moment == moment for e in of_command)}" for moment in ("any time", *WRITING)),
            "; ".join(statuses),
            f"{max((event.seconds for event in of_command), default=0):.1f}",
            "yes" if equal else "NO",
        )
    show(table)
    sys.exit(differs)


if __name__ == "__main__":
    main()
