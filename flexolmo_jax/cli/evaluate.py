"""Evaluates a model: held-out loss on corpora, one line for each; or scores on tasks of lm-evaluation-harness.

flexolmo evaluate --model=runs/merged --data=corpora/news/heldout --data=corpora/code/heldout --without=news
flexolmo evaluate --model=runs/merged --data=corpora/news/heldout --baseline
flexolmo evaluate --model=runs/merged --tasks=hellaswag,lambada_openai
flexolmo evaluate --model=runs/merged --data=corpora/news/heldout --top_k=1,2,4 --out=runs/merged-faster

Tasks give the opt-out matrix: one line for the full model, and one without each contributed expert. With --without
there is a single line, the model without those. Standard errors are in parentheses.

With --top_k the table has one line for each number of experts per token: active FLOPs of a token, bits per byte of each
corpus and their average. The smallest number whose average is at most 0.5% above the lowest is recommended, and --out
writes a copy of the model with it. --baseline adds a line for the anchor alone. With --without the numbers are those of
the experts that are left; --out refuses it, since the copy has all experts, and --top_k refuses --tasks.
"""

import math
import re

from absl import flags

from flexolmo_jax.cli import model_flags

_MODEL, _DTYPE, _WITHOUT = model_flags.model(), model_flags.dtype(), model_flags.without()
_DATA = flags.DEFINE_multi_string("data", [], "Corpus directory; give the flag once for each.")
_TASKS = flags.DEFINE_list("tasks", [], "Tasks of lm-evaluation-harness, separated by commas (extra `eval`).")
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Directory with tasks of your own.")
_LIMIT = flags.DEFINE_integer("limit", None, "Documents of each task at most, for a trial.", lower_bound=1)
_BASELINE = flags.DEFINE_bool("baseline", False, "Show the anchor's bits per byte of each corpus beside the model's.")
_TOP_K = flags.DEFINE_list(
    "top_k",
    None,
    "Numbers of experts per token to compare on the corpora, separated by commas, each from 1 to the number of "
    "experts. Recommends the smallest whose average bits per byte is at most 0.5% above the lowest.",
)
_OUT = flags.DEFINE_string(
    "out", None, "Model directory to make: a copy of the model with the recommended number of experts per token."
)
_LENGTH = flags.DEFINE_integer("length", 256, "Tokens of a sequence of a corpus.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length",
    None,
    "Tokens that the model may see in a task; by default, a sequence of its training.",
    lower_bound=1,
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Sequences computed at once.", lower_bound=1)
_VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "Compare every token file with its digest first: reads the corpora once more, at about 1 GB/s a core.",
)
_JSON = flags.DEFINE_string("json", None, "File to write the results to.")
SMALL_BATCH = 2**15  # tokens of a batch that always fits
MEMORY_REMEDY = "give a lower --length or --batch_size, or --dtype=bfloat16"


def run() -> None:
    """Evaluates, and prints a table of the corpora, or of the numbers of experts per token, and one of the tasks."""
    from flexolmo_jax.cli.files import write_json
    from flexolmo_jax.combine.top_k import copy_with_top_k
    from flexolmo_jax.data.corpus import open_corpora, verify_corpora
    from flexolmo_jax.evaluation.results import loss_table, opt_out_table
    from flexolmo_jax.evaluation.top_k import top_k_notes, top_k_table
    from flexolmo_jax.inference.model import load
    from flexolmo_jax.tables import show

    _check_flags()
    evaluate_tasks = _harness() if _TASKS.value else None
    values = [] if _TOP_K.value is None else _top_k_values()
    corpora = open_corpora(_DATA.value)
    if _VERIFY.value:
        verify_corpora(list(corpora.values()))
    model = load(_MODEL.value, _DTYPE.value)
    results, tables, notes = {}, [], []
    if values:
        results["top_k"] = _top_k_results(model, corpora, values)
        tables.append(top_k_table(results["top_k"]))
        notes += top_k_notes(results["top_k"])
    elif corpora:
        results["data"] = _losses(model, corpora)
        tables.append(loss_table(results["data"]))
    if evaluate_tasks:
        results["tasks"] = evaluate_tasks(
            model,
            _TASKS.value,
            include_path=_INCLUDE_PATH.value,
            limit=_LIMIT.value,
            without=_WITHOUT.value,
            batch_size=_BATCH_SIZE.value,
            max_length=_MAX_LENGTH.value,
        )
        tables.append(opt_out_table(results["tasks"]))
    for table in tables:
        show(table)
    if _BASELINE.value:
        print(_about_baseline(model))
    for note in notes:
        print(note)
    if _JSON.value:
        write_json(_JSON.value, results)
    if _OUT.value is not None:
        made = copy_with_top_k(_MODEL.value, results["top_k"]["recommended"], _OUT.value)
        print(f"{_OUT.value}: top-{made.top_k}, otherwise as {_MODEL.value}")


def _check_flags():
    """Raises UserError where flags are missing or do not go together."""
    from flexolmo_jax.checkpoint.atomic import check_absent
    from flexolmo_jax.checkpoint.model_directory import MODEL
    from flexolmo_jax.errors import UserError

    if _TOP_K.value is not None and not _DATA.value:
        raise UserError("--top_k: compares losses on corpora; give --data")
    if _TOP_K.value is not None and _TASKS.value:
        raise UserError("--tasks: are not evaluated with --top_k, which compares losses on corpora; leave one out")
    if _OUT.value is not None:
        if _TOP_K.value is None:
            raise UserError(f"--out={_OUT.value}: is a copy with a number of experts per token; give --top_k")
        if _WITHOUT.value:
            raise UserError(f"--out={_OUT.value}: has all experts, and goes without --without; opt out first")
        check_absent(_OUT.value, MODEL.manifest, MODEL.content)
    if not _DATA.value and not _TASKS.value:
        raise UserError("--data: none given; give the flag once for each corpus directory, or name --tasks")
    if _BASELINE.value and not _DATA.value:
        raise UserError("--baseline: compares losses on corpora; give --data")


def _top_k_values():
    """The numbers of --top_k, which the manifest of the model bounds: large models load slowly."""
    from flexolmo_jax.checkpoint.model_directory import read_model
    from flexolmo_jax.combine.top_k import check_several_experts
    from flexolmo_jax.errors import ArgumentError, UserError

    if not _TOP_K.value:
        raise UserError("--top_k: none given; give numbers of experts, separated by commas")
    manifest = read_model(_MODEL.value, strict=_OUT.value is not None)
    check_several_experts(_MODEL.value, manifest)
    count = len(set(manifest.roster) - set(_WITHOUT.value))
    values = []
    for text in _TOP_K.value:
        value = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
        if not 1 <= value <= max(1, count):  # that no expert is left is for `evaluate` to say
            raise ArgumentError("top_k", text, f"must be an integer from 1 to {count}, the experts that take part")
        if value in values:
            raise ArgumentError("top_k", text, "is given twice")
        values.append(value)
    return values


def _top_k_results(model, corpora, values):
    """The results of each number of experts per token."""
    from flexolmo_jax.evaluation.top_k import evaluate_top_k

    sizes = _batch_sizes([model.with_top_k(value) for value in values], corpora)
    return evaluate_top_k(model, corpora, values, without=_WITHOUT.value, baseline=_BASELINE.value, **sizes)


def _losses(model, corpora):
    """{corpus: the columns of the table}."""
    from flexolmo_jax.evaluation.loss import evaluate_shown

    sizes = _batch_sizes([model], corpora)
    losses = evaluate_shown(model, corpora, title="evaluate", without=_WITHOUT.value, **sizes)
    columns = {label: loss.as_dict() for label, loss in losses.items()}
    contributed = model.roster[1:]
    if _BASELINE.value and contributed:
        for label, loss in evaluate_shown(model, corpora, title="anchor", without=contributed, **sizes).items():
            columns[label]["anchor"] = loss.as_dict()
    return columns


def _batch_sizes(models, corpora):
    """The length and the batch size, once every model is known to fit in memory with them."""
    from flexolmo_jax.memory import check_fits

    # Sequences longer than any corpus, and more of them than it fills, would be padding.
    tokens = max(corpus.tokens for corpus in corpora.values())
    length = min(_LENGTH.value, tokens)
    batch_size = min(_BATCH_SIZE.value, math.ceil(tokens / length))
    if batch_size * length > SMALL_BATCH:
        what = f"--length={_LENGTH.value}: a batch of {batch_size} x {length:,} tokens"
        for model in models:
            check_fits(model.loss_bytes(batch_size, length), what, MEMORY_REMEDY)
    return {"length": length, "batch_size": batch_size}


def _about_baseline(model):
    """A sentence on what the baseline is."""
    from flexolmo_jax.checkpoint.manifests import is_router_leaf

    if len(model.roster) == 1:
        return f"{_MODEL.value}: is an anchor, its own baseline."
    trained = [] if model.manifest.tuned is None else model.manifest.tuned.leaves
    if not all(map(is_router_leaf, trained)):
        return "anchor: the model without any contributed expert, after what was trained since the merge."
    return "anchor: the model without any contributed expert, which is the anchor it was merged from."


def _harness():
    """The function that runs tasks; the harness is an extra."""
    import os

    from flexolmo_jax.errors import UserError

    # A standard error that is bootstrapped would be computed in forks, which JAX's threads do not survive.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        from flexolmo_jax.interop.harness import evaluate_tasks
    except ModuleNotFoundError as error:
        raise UserError("--tasks: needs lm-eval; pip install 'flexolmo-jax[eval]'") from error
    return evaluate_tasks
