"""Writes an HTML page that compares models on held-out corpora: losses, opt-outs, routing shares and plots.

flexolmo report --model=anchor=runs/anchor/model --model=runs/merged --data=corpora/news/heldout --out=report.html

A model with several contributed experts is evaluated once more without each of them. The page is one file, which
fetches nothing.
"""

from absl import flags

from flexolmo_jax.cli import model_flags

_MODELS = flags.DEFINE_multi_string(
    "model", [], "Model directory, or NAME=DIR to call it NAME; give the flag once for each."
)
_DATA = flags.DEFINE_multi_string(
    "data", [], "Corpus directory, or NAME=DIR to call it NAME; give the flag once for each."
)
_RUNS = flags.DEFINE_multi_string(
    "run", [], "Workdir of a training run whose curves to plot, or NAME=DIR; give the flag once for each."
)
_REFERENCE = flags.DEFINE_string("reference", None, "The model to compare the others with; by default the first.")
_TITLE = flags.DEFINE_string("title", "Evaluation report", "Title of the page.")
_LENGTH = flags.DEFINE_integer("length", 256, "Tokens of a sequence.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Sequences computed at once.", lower_bound=1)
_DTYPE = model_flags.dtype()
_OUT = flags.DEFINE_string("out", None, "HTML file to write.", required=True)
MEMORY_REMEDY = "give a lower --length or --batch_size, or --dtype=bfloat16"


def run() -> None:
    """Evaluates the models, prints the table of bits per byte, and writes the page."""
    from etils import epath

    from flexolmo_jax.cli.files import label_paths
    from flexolmo_jax.data.corpus import Corpus
    from flexolmo_jax.errors import ArgumentError, UserError
    from flexolmo_jax.evaluation import report
    from flexolmo_jax.evaluation.loss import evaluate_models
    from flexolmo_jax.evaluation.results import bits_per_byte_table
    from flexolmo_jax.tables import show

    for flag in (_MODELS, _DATA):
        if not flag.value:
            raise UserError(f"--{flag.name}: none given; give the flag once for each directory")
    out = epath.Path(_OUT.value)
    if out.is_dir():
        raise ArgumentError("out", out, "is a directory; name a file, such as report.html")
    models = label_paths("model", _MODELS.value)
    if _REFERENCE.value is not None and _REFERENCE.value not in models:
        raise ArgumentError("reference", _REFERENCE.value, f"is no model; give one of {', '.join(models)}")
    corpora = {label: Corpus.open(path) for label, path in label_paths("data", _DATA.value).items()}
    runs = label_paths("run", _RUNS.value)
    curves = {label: report.read_curve(epath.Path(path) / "metrics.jsonl") for label, path in runs.items()}
    sizes = {"length": _LENGTH.value, "batch_size": _BATCH_SIZE.value}
    results = evaluate_models(models, corpora, dtype=_DTYPE.value, **sizes)
    settings = {
        **{f"model {label}": path for label, path in models.items()},
        **{f"corpus {label}": str(corpus.path) for label, corpus in corpora.items()},
        "tokens of a sequence": _LENGTH.value,
        "dtype": _DTYPE.value,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    report.write_report(
        out,
        results,
        reference=_REFERENCE.value,
        title=_TITLE.value,
        certificates=report.opt_out_certificates(results),
        curves=curves,
        settings=settings,
    )
    show(bits_per_byte_table(report.bits_per_byte(results), list(corpora)))
    print(f"{out}: models {len(models)}, corpora {len(corpora)}")
