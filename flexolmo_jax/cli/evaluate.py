"""Computes the held-out loss of a model on corpora: a row for each.

flexolmo evaluate --model=runs/merged --data=corpora/news/heldout --data=corpora/code/heldout --without=news
"""

from absl import flags

_MODEL = flags.DEFINE_string("model", None, "Model directory.")
_DATA = flags.DEFINE_multi_string("data", [], "Corpus directory; give the flag once for each.")
_WITHOUT = flags.DEFINE_multi_string("without", [], "Name of an expert to leave out; give the flag once for each.")
_LENGTH = flags.DEFINE_integer("length", 256, "Tokens in a row.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows computed at once.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of parameters and computation.")
_JSON = flags.DEFINE_string("json", None, "File to write the figures to.")
flags.mark_flags_as_required(["model"])


def run() -> None:
    """Evaluates, and prints the table."""
    import json

    from etils import epath

    from flexolmo_jax.errors import UserError
    from flexolmo_jax.evaluation.loss import evaluate_shown
    from flexolmo_jax.evaluation.tables import loss_table, show
    from flexolmo_jax.inference.model import load
    from flexolmo_jax.training.inputs import open_corpora

    if not _DATA.value:
        raise UserError("--data: none given; give the flag once for each corpus directory")
    corpora = open_corpora(_DATA.value)
    model = load(_MODEL.value, _DTYPE.value)
    losses = evaluate_shown(
        model, corpora, title="evaluate", without=_WITHOUT.value, length=_LENGTH.value, batch_size=_BATCH_SIZE.value
    )
    rows = {label: loss.as_dict() for label, loss in losses.items()}
    show(loss_table(rows))
    if _JSON.value:
        file = epath.Path(_JSON.value)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=2) + "\n")
