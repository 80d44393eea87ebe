"""Trains every way to combine owners on the development set, over several seeds, and prints what the method promises.

    python examples/development_set.py --out=runs/development_set
    python examples/development_study.py runs/development_set/corpora runs/study --seeds 0 1 2

For each seed: an anchor on public text; for each of six owners an expert alone (`solo`) and a pair; the merges of
both; and, for comparison, a mixture that starts from copies of the anchor and is trained on the text of all owners at
once, with the shared leaves frozen (`joint`) or with every leaf trained (`unrestricted`). These two take as many steps
as an expert, each with as many tokens of each domain.

What is there already is not made again: an interrupted study goes on where it stopped, and seeds can be added.
Choose settings by `--split=validation`; `test` is for the final results. `results-SPLIT.json` has all scores.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from commands import flexolmo, title
from comparison import Scores, compare, findings, gap_closed, mean_scores, own_shares

import flexolmo_jax
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.evaluation.loss import evaluate_shown
from flexolmo_jax.evaluation.report import bits_per_byte
from flexolmo_jax.evaluation.results import AVERAGE, bits_per_byte_table, with_average
from flexolmo_jax.tables import show

ROOT = pathlib.Path(__file__).resolve().parent.parent
PUBLIC = "public"
OWNERS = ("code", "novels", "scripture", "mail", "mathematics", "german")
UNOWNED = ("headers", "legal", "french", "encyclopedia", "dictionary", "manuals")
RIVALS = ("pair", "joint", "unrestricted")
EVALUATION: dict[str, Any] = {"length": 256, "batch_size": 16}  # tokens of a sequence, sequences
TOP_K = 4  # of the mixtures with a router, as published
TINY_MODEL = ["--config.model.num_layers=1", "--config.model.d_model=64", "--config.model.d_ff=96"]
EXPERTS_ONLY = "((r'blocks/moe/experts/.*', 'trainable'), (r'.*', 'frozen'))"


SIZES = {
    "full": {
        "anchor": ["--config.steps=1200", "--config.data.batch_size=8", "--config.optimizer.learning_rate=2e-3"],
        "expert": ["--config.steps=400"],
        "batch": 4,  # sequences of an expert's step
    },
    # Enough to see that every step runs; the results mean nothing.
    "small": {
        "anchor": ["--config.steps=4", "--config.data.batch_size=2", *TINY_MODEL],
        "expert": ["--config.steps=2"],
        "batch": 1,
    },
}
# A copy of the anchor's feed-forward, and a router's weights to break the symmetry of copies.
UNTRAINED = [
    "--config.steps=1",
    "--config.optimizer.learning_rate=0",
    "--config.init.router_weight_stddev=0.02",
    "--config.init.router_bias=0",
]


class Study:
    """The runs and models of one seed, in a folder of its own."""

    def __init__(self, folder: pathlib.Path, corpora: pathlib.Path, seed: int, size: Mapping[str, Any]):
        self.folder, self.corpora, self.seed, self.size = folder, corpora, seed, size

    def anchor(self) -> pathlib.Path:
        """The model trained on public text."""
        tokenizer = Corpus.open(self.corpora / PUBLIC / "train")
        flags = [f"--config.model.vocab_size={tokenizer.vocab_size}", *self.size["anchor"]]
        return self._train("anchor", "anchor.py:tiny", [PUBLIC], flags) / "model"

    def contributions(self, kind: str) -> list[pathlib.Path]:
        """One of each owner: a `solo`, a `pair`, or an untrained `copy` of the anchor's feed-forward."""
        config = "expert.py:tiny" if kind == "solo" else "pair.py:tiny"
        flags = [
            f"--config.start_from={self.anchor()}",
            f"--config.data.batch_size={self.size['batch']}",
            *(UNTRAINED if kind == "copy" else self.size["expert"]),
        ]
        return [
            self._train(f"{kind}-{owner}", config, [owner], [*flags, f"--config.expert={owner}"]) / "contribution"
            for owner in OWNERS
        ]

    def merge(self, kind: str) -> pathlib.Path:
        """The merge of these contributions: of solos as is the default, of others as published."""
        out = self.folder / "models" / kind
        if not out.exists():
            contributions = [f"--contribution={path}" for path in self.contributions(kind)]
            published = [] if kind == "solo" else ["--selection=router", f"--top_k={TOP_K}"]
            flexolmo("merge", f"--anchor={self.anchor()}", *contributions, f"--out={out}", *published)
        return out

    def jointly(self, kind: str) -> pathlib.Path:
        """A mixture that starts from copies of the anchor, trained on the text of all."""
        flags = [
            f"--config.start_from={self.merge('copy')}",
            f"--config.data.batch_size={self.size['batch'] * (1 + len(OWNERS))}",
            *self.size["expert"],
            "--config.optimizer.learning_rate=1.5e-3",
            "--config.optimizer.warmup_steps=20",
            "--config.optimizer.weight_decay=0.0",
        ]
        if kind == "joint":
            flags.append(f"--config.partition={EXPERTS_ONLY}")
        return self._train(kind, "joint.py:tiny", [PUBLIC, *OWNERS], flags) / "model"

    def evaluate(self, split: str, rivals: Sequence[str]) -> dict[str, Any]:
        """{"bits_per_byte": {model: {domain}}, "own_shares": {owner: share}}, kept in a file of the folder."""
        file = self.folder / f"{split}.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        owned, unowned = (
            {domain: Corpus.open(self.corpora / domain / split) for domain in domains}
            for domains in ((PUBLIC, *OWNERS), UNOWNED)
        )
        if not results:
            merged = self.merge("solo")
            evaluated = compare(self.anchor(), merged, owned, EVALUATION["length"])
            scores = bits_per_byte(evaluated, separator="-without:")
            model = flexolmo_jax.load(merged)
            for label, without in (("merged", []), ("anchor", model.roster[1:])):
                losses = evaluate_shown(model, unowned, title=label, without=without, **EVALUATION)
                scores[label] |= {domain: loss.bits_per_byte for domain, loss in losses.items()}
            results = {"bits_per_byte": scores, "own_shares": own_shares(evaluated["merged"])}
            file.write_text(json.dumps(results, indent=2) + "\n")
        for kind in rivals:
            if kind not in results["bits_per_byte"]:
                model = self.merge("pair") if kind == "pair" else self.jointly(kind)
                losses = evaluate_shown(flexolmo_jax.load(model), owned, title=kind, **EVALUATION)
                results["bits_per_byte"][kind] = {domain: loss.bits_per_byte for domain, loss in losses.items()}
                file.write_text(json.dumps(results, indent=2) + "\n")
        return results

    def _train(self, run: str, config: str, domains: Sequence[str], flags: Sequence[str]) -> pathlib.Path:
        """Trains in a process of its own, unless it is done; an interrupted run goes on."""
        out = self.folder / run
        if not ((out / "model").exists() or (out / "contribution").exists()):
            config = os.path.relpath(ROOT / "configs" / config)
            data = ",".join(str(self.corpora / domain / "train") for domain in domains)
            flexolmo(
                "train",
                f"--config={config}",
                f"--workdir={out}",
                f"--config.seed={self.seed}",
                f"--config.data.train={data}",
                *flags,
            )
        return out


def main() -> None:
    """Trains what is missing of each seed, evaluates, and prints scores and findings, means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=pathlib.Path, help="as development_set.py writes them")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--rivals", choices=RIVALS, nargs="*", default=RIVALS, help="what to compare the merge with")
    parser.add_argument("--size", choices=SIZES, default="full", help="'small' only shows that every step runs")
    options = parser.parse_args()
    missing = [domain for domain in (PUBLIC, *OWNERS, *UNOWNED) if not (options.corpora / domain).exists()]
    if missing:
        sys.exit(f"development_study.py: {options.corpora}: has no corpora of {', '.join(missing)}")
    seeds = {}
    for seed in options.seeds:
        title(f"seed {seed}")
        study = Study(options.out / f"seed-{seed}", options.corpora, seed, SIZES[options.size])
        seeds[seed] = study.evaluate(options.split, options.rivals)
    (options.out / f"results-{options.split}.json").write_text(json.dumps(seeds, indent=2) + "\n")
    shown = [*seeds.values()]
    scores = mean_scores(seed["bits_per_byte"] for seed in shown)
    shares = mean_scores({"": seed["own_shares"]} for seed in shown)[""]
    title(f"Bits per byte of {options.split} text (lower is better), mean over seeds: {len(shown)}")
    show(bits_per_byte_table(scores, (PUBLIC, *OWNERS)))
    for finding in findings(scores, shares, PUBLIC, UNOWNED):
        print(finding)
    for line in gaps(scores):
        print(line)


def gaps(scores: Scores) -> list[str]:
    """How far the merge of solos comes from the merge of pairs to each mixture that is trained jointly."""
    averages = {model: values[AVERAGE] for model, values in with_average(scores, (PUBLIC, *OWNERS)).items()}
    lines = []
    for kind, target in (("joint", 0.6), ("unrestricted", None)):
        if "pair" in averages and kind in averages:
            share = gap_closed(averages["pair"], averages["merged"], averages[kind])
            answer = "   " if target is None else f"{'yes' if share >= target else 'NO':<3}"
            bound = "" if target is None else f"at least {target:.0%} of "
            lines.append(f"{answer} {bound}the gap from the published merge to '{kind}' is closed: {share:.1%}")
    return lines


if __name__ == "__main__":
    main()
