"""The whole journey on one machine, on text found there: corpora, anchor, experts, merge, opt-out, report.

    python examples/quickstart.py runs/quickstart

Everything an owner or a coordinator would do runs as the `flexolmo` command they would type, in a process of its
own; each command is printed. An expert's process is given the anchor's directory and its own corpora, nothing else.
"""

import argparse
import filecmp
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import local_texts
from commands import flexolmo, title
from comparison import compare, findings, own_shares

import flexolmo_jax
from flexolmo_jax.checkpoint.model_directory import CERTIFICATE_FILE
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.evaluation.loss import ModelResults
from flexolmo_jax.evaluation.report import Certificate, bits_per_byte, read_curve, write_report
from flexolmo_jax.evaluation.results import bits_per_byte_table
from flexolmo_jax.tables import show

ROOT = pathlib.Path(__file__).resolve().parent.parent
PUBLIC, OWNERS = "public", ("code", "headers", "legal")
DOMAINS = (PUBLIC, *OWNERS)
LEAVES = "code"  # the owner who opts out
LENGTH = 256  # tokens of a sequence
PROMPT_BYTES = 64
# In so short a run, many small steps learn more of the same tokens than few large ones.
SMALL_STEPS = ["--config.data.batch_size=2", "--config.evaluation.every=250"]
TINY_STEPS = ["--config.data.batch_size=2", "--config.steps=4", "--config.optimizer.warmup_steps=1"]
SIZES = {
    "full": {
        "train_bytes": 2_500_000,
        "heldout_bytes": 24_000,
        "anchor": [*SMALL_STEPS, "--config.steps=950", "--config.optimizer.learning_rate=2e-3"],
        "expert": [*SMALL_STEPS, "--config.steps=300"],
    },
    # Enough to see that every step runs; the results mean nothing.
    "small": {
        "train_bytes": 100_000,
        "heldout_bytes": 4_000,
        "anchor": [*TINY_STEPS, "--config.model.num_layers=1", "--config.model.d_model=64", "--config.model.d_ff=96"],
        "expert": TINY_STEPS,
    },
}
INTRODUCTION = (
    "Each data owner trained one expert in the frozen public anchor, on data that never left the owner. The "
    "contributed experts were then merged into one model, from which any owner can opt out."
)


def main() -> None:
    """Runs every step, and leaves `results.json` and `report.html` in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=pathlib.Path, default=pathlib.Path("runs/quickstart"))
    parser.add_argument("--size", choices=SIZES, default="full", help="'small' only shows that every step runs")
    arguments = parser.parse_args()
    out, size = arguments.out, SIZES[arguments.size]
    if out.exists():
        sys.exit(f"quickstart.py: {out} exists already; name a new folder, or remove this one first")
    started = time.monotonic()

    title("1. Corpora from text on this machine")
    make_corpora(out, size["train_bytes"], size["heldout_bytes"])

    title("2. The anchor is trained on the public corpus, then each owner trains an expert alone")
    train(out, "anchor", "anchor.py:tiny", PUBLIC, size["anchor"])
    for owner in OWNERS:
        start = [f"--config.start_from={out}/anchor/model", f"--config.expert={owner}"]
        train(out, owner, "expert.py:tiny", owner, [*start, *size["expert"]])

    title("3. The contributions are merged, and compared on held-out text")
    merge(out, "merged", OWNERS)
    held_out = {domain: Corpus.open(out / "corpora" / domain / "heldout") for domain in DOMAINS}
    evaluated = compare(out / "anchor" / "model", out / "models" / "merged", held_out, LENGTH)

    title(f"4. The owner of '{LEAVES}' opts out")
    opt_out = leave(out)

    title("5. What the merged model writes")
    samples = continue_prompts(out, held_out)

    scores = bits_per_byte(evaluated, separator="-without:")
    found = findings(scores, own_shares(evaluated["merged"]), PUBLIC)
    results = {
        "bits_per_byte": scores,
        "findings": {finding.text: finding.holds for finding in found},
        "routing": {domain: dict(loss.routing) for domain, loss in evaluated["merged"].losses.items()},
        "opt_out": opt_out,
        "samples": samples,
        "settings": settings(out, time.monotonic() - started),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    report(out, evaluated, results)

    title("Bits per byte of held-out text (lower is better)")
    show(bits_per_byte_table(scores, DOMAINS))
    for finding in found:
        print(finding)
    print(f"opting out: {opt_out['guarantee']}")
    print(f"compared with the merge that never had '{LEAVES}': {'identical' if opt_out['identical'] else 'DIFFERENT'}")
    print(f"{results['settings']['seconds']} seconds; see {out}/report.html and {out}/results.json")
    if not opt_out["identical"]:
        sys.exit(1)


def make_corpora(out: pathlib.Path, train_bytes: int, heldout_bytes: int) -> None:
    """Writes texts and `out/corpora/DOMAIN/{train,heldout}`; no document is in two of them."""
    texts = local_texts.gather(train_bytes, heldout_bytes)
    local_texts.write_jsonl(texts, out / "texts")
    for domain, splits in texts.items():
        for split in splits:
            source, corpus = out / "texts" / f"{domain}.{split}.jsonl", out / "corpora" / domain / split
            flexolmo("tokenize", f"--input={source}", "--tokenizer=bytes", f"--out={corpus}")


def train(out: pathlib.Path, run: str, config: str, domain: str, flags: Sequence[str]) -> None:
    """Trains in a process of its own; `config` is a file of `configs` with its argument."""
    config = os.path.relpath(ROOT / "configs" / config)
    corpora = out / "corpora" / domain
    data = [f"--config.data.train={corpora}/train", f"--config.evaluation.data={corpora}/heldout"]
    flexolmo("train", f"--config={config}", f"--workdir={out}/{run}", *data, *flags)


def merge(out: pathlib.Path, name: str, owners: Sequence[str]) -> None:
    """Merges the contributions of some owners into `out/models/NAME`."""
    contributions = [f"--contribution={out}/{owner}/contribution" for owner in owners]
    flexolmo("merge", f"--anchor={out}/anchor/model", *contributions, f"--out={out}/models/{name}")


def report(out: pathlib.Path, evaluated: Mapping[str, ModelResults], results: Mapping[str, Any]) -> None:
    """Writes `out/report.html`."""
    labelled = {label.replace("solo:", "only "): result for label, result in evaluated.items()}
    opt_out = results["opt_out"]
    facts = {
        "expert removed": opt_out["expert"],
        "files compared": opt_out["files"],
        "identical to the merge that never had it": "yes" if opt_out["identical"] else "NO",
        "guarantee": opt_out["guarantee"],
    }
    write_report(
        out / "report.html",
        labelled,
        title="How the experts merged",
        introduction=INTRODUCTION,
        certificates=[Certificate("Opt-out certificate", facts, opt_out["identical"])],
        curves=curves(out),
        samples=[{"title": sample["domain"], **sample} for sample in results["samples"]],
        settings=results["settings"],
    )


def leave(out: pathlib.Path) -> dict[str, Any]:
    """Opts an owner out, and compares every file with the merge that never had that owner."""
    without, never = out / "models" / f"without-{LEAVES}", out / "models" / f"never-{LEAVES}"
    flexolmo("opt-out", f"--model={out}/models/merged", f"--expert={LEAVES}", f"--out={without}")
    merge(out, never.name, [owner for owner in OWNERS if owner != LEAVES])
    files = {path.relative_to(never) for path in never.rglob("*") if path.is_file()}
    left = {path.relative_to(without) for path in without.rglob("*") if path.is_file()} - {
        pathlib.Path(CERTIFICATE_FILE)
    }
    same, _, _ = filecmp.cmpfiles(without, never, sorted(files), shallow=False)
    certificate = json.loads((without / CERTIFICATE_FILE).read_text())
    return {
        "expert": LEAVES,
        "files": len(files),
        "identical": left == files and len(same) == len(files),
        "guarantee": certificate["guarantee"],
    }


def continue_prompts(out: pathlib.Path, held_out: Mapping[str, Corpus]) -> list[dict[str, Any]]:
    """Continues the beginning of a held-out document of each domain."""
    model = flexolmo_jax.load(out / "models" / "merged")
    prompts = [_prompt(corpus) for corpus in held_out.values()]
    continuations = model.generate(prompts, max_new_tokens=96, temperature=0.5)
    samples = []
    for domain, prompt, continuation in zip(held_out, prompts, continuations, strict=True):
        samples.append({"domain": domain, "prompt": prompt, "text": continuation.text, "experts": continuation.experts})
        shares = ", ".join(f"{name} {share:.0%}" for name, share in continuation.experts.items())
        print(f"--- {domain} [{shares}]\n{prompt}|{continuation.text}")
    return samples


def _prompt(corpus: Corpus) -> str:
    """The beginning of the first document whose beginning is mostly letters."""
    decode = corpus.tokenizer().decode
    beginnings = [decode(corpus[i][:PROMPT_BYTES]) for i in range(len(corpus))]
    return next((text for text in beginnings if sum(map(str.isalpha, text)) > len(text) / 2), beginnings[0])


def curves(out: pathlib.Path) -> dict[str, list[dict[str, float]]]:
    """The training curves of each run, with the held-out loss on the run's own domain."""
    runs = {"anchor": PUBLIC, **{owner: owner for owner in OWNERS}}
    return {
        run: [
            {key.replace("/heldout", f"/{domain}"): value for key, value in record.items()}
            for record in read_curve(out / run / "metrics.jsonl")
        ]
        for run, domain in runs.items()
    }


def settings(out: pathlib.Path, seconds: float) -> dict[str, Any]:
    """What the results depend on."""
    config = json.loads((out / "anchor" / "config.json").read_text())
    expert = json.loads((out / OWNERS[0] / "config.json").read_text())
    return {
        "layers": config["model"]["num_layers"],
        "d_model": config["model"]["d_model"],
        "steps of the anchor": config["steps"],
        "steps of an expert": expert["steps"],
        "tokens per step": config["data"]["batch_size"] * config["data"]["sequence_length"],
        "public share of an expert's sequences": expert["data"]["public_share"],
        "seconds": round(seconds),
        "peak memory of a process, GiB": round(peak_memory(), 2),
    }


def peak_memory() -> float:
    """The most memory that this process, or the largest one it ran, held at a time, in GiB."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, kilobytes on Linux
    return max(resource.getrusage(who).ru_maxrss for who in whose) * unit / 2**30


if __name__ == "__main__":
    main()
