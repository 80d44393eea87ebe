"""Every configuration file builds for every size, is locked, and its partition covers its model."""

import importlib
import math
import pathlib
import re
import shlex

import jax
import pytest
from ml_collections import ConfigDict

from configs import base, keys, models
from flexolmo_jax import sharding
from flexolmo_jax.model.architecture import ANCHOR, PAIR, SOLO, Architecture, Layout
from flexolmo_jax.model.decoder import Compute, Decoder
from flexolmo_jax.training.optimizer import make_schedule
from flexolmo_jax.training.run import build_model
from flexolmo_jax.training.state import trainable_paths
from tests.support import small

CONFIGS = sorted(
    path.stem for path in pathlib.Path(base.__file__).parent.glob("*.py") if "get_config(size" in path.read_text()
)
SIZES = tuple(models._SIZES)
STACKED = Layout("stacked", 3, 2)
SOLO_LEAVES = {f"blocks/moe/expert/{leaf}" for leaf in ("gate", "up", "down")}
# The layout each one trains, the leaves it trains, and the tokens of its published setting (docs/method.md).
TRAINS = {
    "anchor": (ANCHOR, lambda path: not re.search("moe/anchor/router/.*", path), 1e12),
    "flexmix": (ANCHOR, lambda path: not re.search("moe/anchor/router/.*", path), 1e12),
    "expert": (SOLO, lambda path: path in SOLO_LEAVES, 50e9),
    "pair": (PAIR, lambda path: path.startswith("blocks/moe/expert/"), 50e9),
    "router": (STACKED, lambda path: path.endswith(("experts/router/weight", "experts/router/bias")), 5e9),
    "joint": (STACKED, lambda path: True, 50e9),
}
# What a command needs besides `--config`, `--workdir` and data.
STARTS = {
    "expert": {"config.start_from", "config.expert"},
    "pair": {"config.start_from", "config.expert"},
    "router": {"config.start_from"},
    "joint": {"config.start_from"},
}


def get_config(name, *size):
    return importlib.import_module(f"configs.{name}").get_config(*size)


def names(config):
    """All dotted keys, sections included."""
    return {key.rsplit(".", 1)[0] for key in keys.flatten(config) if "." in key} | keys.flatten(config).keys()


def test_every_configuration_is_known_here():
    assert set(CONFIGS) == set(TRAINS), "add the new configuration to TRAINS"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
class TestEverySize:
    def test_it_has_the_keys_of_base_and_no_other(self, name, size):
        assert names(get_config(name, size)) == names(base.get_config())

    def test_it_is_locked_in_every_section(self, name, size):
        config = get_config(name, size)
        for section in (config, *(value for value in config.values() if hasattr(value, "items"))):
            with pytest.raises((AttributeError, KeyError)):
                section.no_such_key = 1

    def test_its_partition_covers_its_model(self, name, size):
        config = get_config(name, size)
        layout, trains, _ = TRAINS[name]
        paths = Decoder(Architecture(**config.model), layout).abstract()
        assert trainable_paths(paths, config.partition) == {path for path in paths if trains(path)}

    def test_its_fresh_model_has_the_layout_it_trains(self, name, size):
        config = get_config(name, size)
        fresh = {"anchor": ANCHOR, "flexmix": ANCHOR, "expert": SOLO, "pair": PAIR}.get(
            name, Layout("stacked", *((4, 2) if size == "tiny" else (8, 4)))
        )
        assert build_model(config)[0].layout == fresh

    def test_its_model_divides_over_sixteen_devices(self, name, size):
        config = get_config(name, size)
        model = Decoder(Architecture(**config.model), TRAINS[name][0], Compute(config.compute.dtype))
        shape = [16 if config.mesh[axis] == -1 else config.mesh[axis] for axis in sharding.MESH_AXES]
        mesh = jax.sharding.AbstractMesh(tuple(shape), sharding.MESH_AXES)
        sharding.leaf_shardings(model.abstract(), model.logical_axes(), mesh, config.sharding_rules)

    def test_its_learning_rate_starts_at_nothing_and_ends_where_it_says(self, name, size):
        config = get_config(name, size)
        schedule, peak = make_schedule(config.optimizer, config.steps), config.optimizer.learning_rate
        assert schedule(0) == 0
        assert math.isclose(schedule(config.optimizer.warmup_steps), peak, rel_tol=1e-6)
        assert math.isclose(schedule(config.steps), peak * config.optimizer.final_fraction, rel_tol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_size_is_tiny_unless_another_is_named(name):
    assert get_config(name).to_dict() == get_config(name, "tiny").to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_published_setting_has_the_published_number_of_tokens(name):
    config = get_config(name, "7b")
    tokens = config.steps * config.data.batch_size * config.data.sequence_length
    assert math.isclose(tokens, TRAINS[name][2], rel_tol=1e-3)


def test_the_largest_size_is_the_published_one():
    decoder = Decoder(Architecture(**get_config("anchor", "7b").model), ANCHOR)
    parameters = sum(math.prod(leaf.shape) for leaf in decoder.abstract().values())
    assert round(parameters / 1e9, 1) == 7.3


def test_an_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'huge'.*tiny, 190m, 1b, 7b"):
        get_config("anchor", "huge")


def test_the_benchmark_changes_values_of_base_alone():
    config = get_config("benchmark")
    assert config.is_locked
    assert names(config) == names(base.get_config())
    assert [get_config("benchmark", *size).model.vocab_size for size in ((), ("50304",))] == [512, 50_304]
    assert build_model(config)[0].layout == Layout("stacked", 4, 2)


def test_flexmix_has_the_published_sizes():
    names, paths, billions = zip(*get_config("flexmix").data.mixture, strict=True)
    assert len(set(names)) == len(set(paths)) == 8
    assert sum(billions) == pytest.approx(3003.9)  # 3T tokens in all
    assert dict(zip(names, billions, strict=True))["public"] == max(billions) == 2370


def test_base_is_locked():
    assert base.get_config().is_locked
    with pytest.raises(AttributeError):
        base.get_config().data.sequnce_length = 8


def test_every_key_is_explained_where_it_is_declared():
    lines = pathlib.Path(base.__file__).read_text().splitlines()
    declared = {}
    for number, line in enumerate(lines):
        if match := re.match(r"\s+config\.([\w.]+) = ", line):
            comment = re.search(r"#\s*(\S.*)$", line) or re.match(r"\s*# (\S.*)$", lines[number - 1])
            assert match[1] not in declared, f"configs/base.py:{number + 1}: {match[1]} is declared twice"
            declared[match[1]] = comment
    assert declared.keys() == names(base.get_config())
    unexplained = [key for key, comment in declared.items() if not comment]
    assert not unexplained, f"configs/base.py: say what they mean and their unit, in a comment: {unexplained}"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_docstring_holds_the_command(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    # From the command on, up to an empty line: a line that ends without a backslash would end the command early.
    first, *more = text[text.index("    flexolmo") :].split("\n\n")[0].replace("\\\n", "").strip().splitlines()
    assert not more, "a command over several lines needs a backslash at the end of each but the last"
    program, command, *flags = shlex.split(first)
    values = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    assert (program, command, values["config"]) == ("flexolmo", "train", f"configs/{name}.py:tiny")
    data = set() if get_config(name).data.mixture else {"config.data.train"}
    assert values.keys() >= {"workdir"} | data | STARTS.get(name, set())


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--config.data.accumulate=2", "--config.data.accumulate is now --config.data.grad_accum_steps"),
        ("--config.mixture.top_k=2", "--config.mixture is now --config.moe"),
    ],
)
def test_a_flag_with_an_old_key_is_refused_with_the_new_one(tmp_path, monkeypatch, flag, line):
    monkeypatch.chdir(pathlib.Path(base.__file__).parents[1])
    result = small.flexolmo("train", "--config=configs/anchor.py:tiny", f"--workdir={tmp_path}/run", flag)
    small.assert_refused(result, "train", line)


def test_a_configuration_file_with_an_old_key_is_refused_with_the_new_one(tmp_path):
    file = tmp_path / "old.py"
    file.write_text(
        "from configs import anchor\ndef get_config():\n  c = anchor.get_config()\n  c.data.accumulate = 2\n"
    )
    result = small.flexolmo("train", f"--config={file}", f"--workdir={tmp_path}/run")
    small.assert_refused(result, "train", "--config.data.accumulate is now --config.data.grad_accum_steps")


def test_bounds_hold_values_in_them_alone():
    declared = ConfigDict({"count": keys.key(0, keys.at_least(1, below=3)), "rate": 0.5})
    assert keys.defaults(declared).to_dict() == {"count": 0, "rate": 0.5}

    def problem(**values):
        return keys.first_problem(declared, ConfigDict({"count": 1, "rate": 0.5} | values))

    assert problem() is None
    assert problem(count=0) == ("count", 0, "must be at least 1 and below 3")
    assert problem(count=3) == ("count", 3, "must be at least 1 and below 3")
    assert problem(rate=float("inf")) == ("rate", float("inf"), "must be a finite number")
    assert problem(other=1)[0] == "other"
