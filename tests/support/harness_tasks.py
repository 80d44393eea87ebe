"""The local tasks of lm-evaluation-harness, and tiny models for them that can be exported without loss."""

import contextlib
import pathlib

import pytest

from flexolmo_jax.combine.merge import merge
from flexolmo_jax.inference import engine
from tests.support import small

ROOT = pathlib.Path(__file__).parents[2]
TASKS = ROOT / "tests" / "data_files" / "tasks"
NAMES = ("local_choice", "local_generate", "local_last_word", "local_rolling")
EXPERTS = ("code", "news")


def write_models(home):
    """Writes `home/merged` with all experts and `home/without-NAME` for each; no expert has a bias."""
    leaves = small.random_leaves(seed=0)
    leaves["blocks/moe/anchor/router/bias"] *= 0
    leaves["head"] *= 0.5
    anchor = small.anchor(home / "anchor", leaves=leaves)
    contributions = {}
    for seed, name in enumerate(EXPERTS, start=1):
        leaves_of_expert = small.expert_leaves(anchor, seed)
        leaves_of_expert["router/bias"] *= 0
        contributions[name] = small.contribution(home / name, anchor, leaves=leaves_of_expert)
    merge(anchor, list(contributions.values()), home / "merged", top_k=2)
    for name in EXPERTS:
        merge(anchor, [home / other for other in EXPERTS if other != name], home / f"without-{name}", top_k=2)


@contextlib.contextmanager
def offline(cache):
    """Runs at the root of the repository, which the tasks' paths start from, with `cache` for their data.

    All sequences are padded to one length, so that few programs are compiled.
    """
    import datasets
    from lm_eval import evaluator

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        patch.setenv("DISABLE_MULTIPROC", "1")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        # It lists the installed packages in another process, for a field that no test reads.
        patch.setattr(evaluator, "add_env_info", lambda storage: None)
        patch.setattr(engine, "MIN_BUCKET", 128)
        yield
