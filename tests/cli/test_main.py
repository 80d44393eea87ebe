"""The table of commands, their help, and the errors that all commands share."""

import importlib.metadata
import pathlib
import re
import subprocess
import sys
from unittest import mock

import pytest

import flexolmo_jax
from flexolmo_jax import cli
from tests.support import small
from tests.support.small import assert_refused, flexolmo

# ml_collections loads configuration files with a deprecated method of Python.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

FLAGS = {
    "select-proxies": ["own", "public", "out", "documents", "tokens", "diversity", "embedder", "report"],
    "clean": ["data", "against", "out", "json", "drop", "repeats", "ngram", "overlap", "near"],
    "tokenize": [
        *("input", "format", "text_key", "on_error", "dtype", "tokenizer", "eos_token", "out", "split", "split_key"),
        *("license", "processes"),
    ],
    "train": ["config", "workdir", "verify", "distributed", "coordinator", "num_processes", "process_id"],
    "merge": ["anchor", "model", "contribution", "replace", "out", "method", "selection", "top_k", "dtype"],
    "statistics": ["source", "data", "out", "selector", "epsilon", "delta", "clip"],
    "opt-out": ["model", "expert", "out", "keep_tuned_router"],
    "evaluate": [
        *("model", "data", "tasks", "include_path", "limit", "without", "length", "max_length", "batch_size"),
        *("dtype", "verify", "json", "baseline", "top_k", "out"),
    ],
    "report": ["model", "data", "run", "reference", "title", "length", "batch_size", "dtype", "out"],
    "generate": [
        *("model", "prompt", "without", "max_new_tokens", "temperature", "top_k", "top_p", "stop", "seed"),
        *("layers", "dtype", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("stop_token_ids", "ignore_eos", "max_length"),
    ],
    "serve": [
        *("model", "name", "host", "port", "slots", "queue", "max_length", "dtype", "verbose"),
        *("api_key_file", "cors_origin"),
    ],
    "benchmark": ["config", "step", "runs", "num_experts", "selection", "processes", "versus", "json"],
    "plan": ["config", "topology", "json"],
    "convert": ["source", "anchor", "out"],
    "inspect": ["check", "config", "samples"],
    "import-hf": ["source", "out", "expert_names", "router_weights_from", "as_contribution", "anchor", "expert"],
    "export-hf": [
        "model",
        "contribution",
        "anchor",
        "out",
        "shard_size",
        "dtype",
        "model_type",
        "drop_bias",
        "drop_selector",
        "keep_selector",
    ],
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Tests name configurations by their path in the repository."""
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("main")
    small.corpus(home / "corpus")
    small.anchor(home / "anchor")
    small.contribution(home / "news", home / "anchor", seed=1)
    small.anchor(home / "run" / "model")
    return home


def test_version_is_that_of_the_package():
    assert flexolmo("--version") == (0, f"flexolmo {flexolmo_jax.__version__}\n", "")
    assert flexolmo_jax.__version__ == importlib.metadata.version("flexolmo-jax")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_without_arguments_it_lists_the_commands(arguments):
    result = flexolmo(*arguments)
    assert (result.status, result.err) == (0, "")
    for command, summary in cli.COMMANDS.items():
        assert re.search(rf"^  {command} +{re.escape(summary)}$", result.out, re.MULTILINE)


def test_every_command_is_covered_here():
    assert FLAGS.keys() == cli.COMMANDS.keys()


@pytest.mark.parametrize("command", FLAGS)
def test_help_of_a_command_names_its_flags_and_shows_an_example(command):
    result = flexolmo(command, "--help")
    assert (result.status, result.err) == (0, "")
    assert f"flexolmo {command} " in result.out
    described = re.findall(r"^ +--(?:\[no\])?(\w+): \S", result.out, re.MULTILINE)
    assert sorted(described) == sorted([*FLAGS[command], "traceback", "compilation_cache"])
    # Flags need no order, and help no valid flags.
    assert flexolmo(command, "--nonsense", "--help") == result


@pytest.mark.parametrize("flag", ["--traceback", "--compilation_cache=", "--compilation-cache=x"])
def test_common_flags_may_precede_the_command(flag):
    before, after = flexolmo(flag, "inspect", "nosuch"), flexolmo("inspect", flag, "nosuch")
    assert before.status == after.status == 2
    assert before.err.splitlines()[-1] == after.err.splitlines()[-1]
    assert before.err.splitlines()[-1].startswith("flexolmo inspect: nosuch")


def test_traceback_shows_where_an_error_comes_from():
    result = flexolmo("inspect", "nosuch", "--traceback")
    first, *_, last = result.err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert "inspect.py" in result.err
    assert last == flexolmo("inspect", "nosuch").err.strip()


def test_a_bug_ends_with_status_1_and_its_line(monkeypatch):
    monkeypatch.setattr("flexolmo_jax.combine.inspect.describe", mock.Mock(side_effect=KeyError("odd")))
    result = flexolmo("inspect", "x")
    assert (result.status, result.out, result.err.count("\n")) == (1, "", 1)
    assert re.search(r"^flexolmo inspect: KeyError: 'odd' \(flexolmo_jax/cli/inspect.py:\d+\); ", result.err)
    assert "report" in result.err
    assert "--traceback" in result.err


def test_out_of_memory_errors_name_what_to_lower(monkeypatch):
    monkeypatch.setattr("flexolmo_jax.inference.model.load", mock.Mock(side_effect=MemoryError))
    for command, flags in {"generate": "--max_new_tokens", "serve": "--slots"}.items():
        monkeypatch.setattr("flexolmo_jax.serving.server.load", mock.Mock(side_effect=MemoryError))
        arguments = ["--prompt=a"] if command == "generate" else ["--port=0"]
        assert_refused(flexolmo(command, "--model=x", *arguments), command, "out of memory", flags)


def test_an_interrupted_command_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(
        "flexolmo_jax.data.tokenization.tokenizer.load_tokenizer", mock.Mock(side_effect=KeyboardInterrupt)
    )
    result = flexolmo("tokenize", "--input=README.md", "--tokenizer=bytes", "--out=x")
    assert (result.status, result.out, result.err) == (130, "", "flexolmo tokenize: interrupted\n")


def test_a_closed_pipe_is_not_an_error():
    command = f"{sys.executable} -m flexolmo_jax | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141)  # the output may be complete before the reader ends
    assert done.stderr == ""


def test_an_unknown_command_is_refused():
    assert_refused(flexolmo("fine-tune", "--model=x"), "fine-tune", "is not a command", *cli.COMMANDS)


@pytest.mark.parametrize("command", FLAGS)
def test_an_unknown_flag_is_refused(command):
    assert_refused(flexolmo(command, "--no_such_flag=1"), command, "no_such_flag", f"flexolmo {command} --help")


REQUIRED = {
    "tokenize": {"out": "x"},
    "select-proxies": {"own": "x", "public": "x", "out": "x"},
    "clean": {},
    "train": {"config": "configs/anchor.py", "workdir": "x"},
    "merge": {"anchor": "x", "out": "x"},
    "statistics": {"source": "x", "out": "x"},
    "opt-out": {"model": "x", "out": "x"},
    "evaluate": {"model": "x"},
    "report": {"out": "x"},
    "generate": {"model": "x"},
    "serve": {"model": "x"},
    "benchmark": {"config": "configs/benchmark.py"},
    "plan": {"config": "configs/expert.py", "topology": "v5e:2x4"},
    "convert": {"source": "x", "out": "x"},
    "import-hf": {"source": "x", "out": "x"},
    "export-hf": {"out": "x"},
}


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command in REQUIRED for flag in REQUIRED[command]])
def test_a_missing_flag_is_refused(command, flag):
    others = [f"--{name}={value}" for name, value in REQUIRED[command].items() if name != flag]
    assert_refused(flexolmo(command, *others), command, f"--{flag}", f"flexolmo {command} --help")


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("tokenize", "input"),
        ("clean", "data"),
        ("merge", "contribution"),
        ("statistics", "data"),
        ("opt-out", "expert"),
        ("evaluate", "data"),
        ("report", "model"),
        ("generate", "prompt"),
    ],
)
def test_a_missing_repeated_flag_is_refused(command, flag, tmp_path):
    values = [f"--{name}={tmp_path}/{value}" for name, value in REQUIRED[command].items()]
    assert_refused(flexolmo(command, *values), command, f"--{flag}: none given", "give the flag once for each")


@pytest.mark.parametrize("command", REQUIRED)
def test_an_argument_that_is_not_a_flag_is_refused(command):
    values = [f"--{name}={value}" for name, value in REQUIRED[command].items()]
    assert_refused(flexolmo(command, *values, "junk"), command, "'junk' is not a flag", "--name=value")


@pytest.mark.parametrize(
    ("command", "argument"),
    [
        ("merge", "--top_k=many"),
        ("merge", "--top_k=1.5"),
        ("evaluate", "--length=x"),
        ("generate", "--temperature=warm"),
        ("opt-out", "--keep_tuned_router=perhaps"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(command, argument):
    assert_refused(flexolmo(command, argument), command, argument)


def test_top_k_below_one_is_refused(home, tmp_path):
    values = [f"--anchor={home}/anchor", f"--contribution={home}/news", f"--out={tmp_path}/out"]
    assert_refused(flexolmo("merge", *values, "--top_k=0"), "merge", "--top_k=0", "at least 1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--model", "--flagfile=nosuch"])
def test_flags_that_absl_cannot_parse_are_refused(option):
    assert_refused(flexolmo("evaluate", option), "evaluate", option.partition("=")[2] or option)


CONFIG_FILES = {
    "syntax": ("def get_config(:", ["syntax.py", "SyntaxError"]),
    "name": ("nope", ["name.py", "NameError", "nope"]),
    "module": ("import no_such_module", ["module.py", "no_such_module"]),
    "raises": ("def get_config(): 1 / 0", ["raises.py", "division by zero"]),
    "empty": ("", ["empty.py", "get_config"]),
    "exits": ("raise SystemExit('enough')", ["exits.py", "SystemExit", "enough"]),
    "key": (
        "from configs import base\ndef get_config():\n    config = base.get_config()\n    config.nokey = 1",
        ["key.py", "nokey", "configs/base.py"],
    ),
}


@pytest.mark.parametrize("name", CONFIG_FILES)
@pytest.mark.parametrize("override", [[], ["--config.steps=3"]])
def test_a_faulty_configuration_file_is_refused(tmp_path, name, override):
    text, words = CONFIG_FILES[name]
    (tmp_path / f"{name}.py").write_text(text)
    arguments = [f"--config={tmp_path}/{name}.py", f"--workdir={tmp_path}/work", *override]
    assert_refused(flexolmo("train", *arguments), "train", *words)
    assert not (tmp_path / "work").exists()


ANCHOR = "--config=configs/anchor.py"
DATA = "--config.data.train={home}/corpus"
EXPERT = ["--config=configs/expert.py", "--config.expert=news", DATA]
BAD_RUNS = [
    (["--config=nosuch.py"], ["--config=nosuch.py", "no such file", "configs/expert.py"]),
    (["--config=nosuch.py", DATA], ["--config=nosuch.py", "no such file", "configs/expert.py"]),
    (["--config={home}"], ["Is a directory", "{home}"]),
    (["--config="], ["config", "empty"]),
    (["--config=configs/anchor.py:huge"], ["--config=configs/anchor.py:huge", "tiny, 190m, 1b, 7b"]),
    ([ANCHOR, "--config.nokey=1"], ["nokey", "configs/base.py"]),
    ([ANCHOR, "--config.optimizer.nokey=1"], ["nokey", "configs/base.py"]),
    ([ANCHOR, "--config.steps=many"], ["--config.steps=many"]),
    ([ANCHOR, "--config.steps=2.5"], ["--config.steps=2.5"]),
    ([ANCHOR, "--config.optimizer=3"], ["--config.optimizer=3"]),
    (["--config.steps=3", ANCHOR], ["--config.steps=3", "before a value for --config"]),
    ([ANCHOR, DATA, "--config.steps=0"], ["--config.steps=0", "at least 1"]),
    ([ANCHOR, DATA, "--config.seed=-1"], ["--config.seed=-1", "at least 0"]),
    ([ANCHOR, DATA, "--config.partition=3"], ["--config.partition", "pairs"]),
    ([ANCHOR, DATA, "--config.data.sequence_length=0"], ["--config.data.sequence_length=0", "at least 1"]),
    ([ANCHOR, DATA, "--config.compute.dtype=float8"], ["--config.compute.dtype=float8", "bfloat16"]),
    ([ANCHOR, DATA, "--config.model.d_model=0"], ["d_model is 0", "positive"]),
    ([ANCHOR, DATA, "--config.model.vocab_size=8"], ["--config.model.vocab_size=8", "257"]),
    ([ANCHOR, DATA, "--config.mesh.data=3"], ["--config.mesh", "data=3", "8 devices"]),
    ([ANCHOR], ["--config.data.train", "empty", "flexolmo tokenize"]),
    ([ANCHOR, "--config.data.train={home}/nosuch"], ["nosuch", "no such directory", "flexolmo tokenize"]),
    ([ANCHOR, "--config.data.train={home}/anchor"], ["anchor", "not a corpus", "flexolmo tokenize"]),
    ([ANCHOR, DATA, "--config.start_from={home}/nosuch"], ["--config.start_from", "give a model directory"]),
    ([ANCHOR, DATA, "--config.start_from={home}/news"], ["--config.start_from", "is a contribution directory"]),
    (EXPERT, ["--config.start_from", "give its model directory"]),
    (["--config=configs/expert.py", DATA], ["--config.start_from: empty", "an expert starts from an anchor"]),
    (
        ["--config=configs/router.py", DATA],
        ["--config.start_from: empty", "a mixture of 4 experts starts from a merge"],
    ),
    ([ANCHOR, DATA, "--config.moe.top_k=0"], ["--config.moe.top_k=0", "at least 1"]),
    ([*EXPERT, "--config.expert=anchor"], ["--config.expert=anchor", "lower-case"]),
    ([*EXPERT, "--config.expert=A/b"], ["--config.expert=A/b", "lower-case"]),
    (
        ["--config=configs/expert.py", DATA, "--config.start_from={home}/anchor"],
        ["--config.expert: empty", "name the expert", "lower-case"],
    ),
    (
        ["--config=configs/expert.py", DATA, "--config.start_from={home}/anchor", "--config.expert="],
        ["--config.expert: empty", "name the expert"],
    ),
    ([*EXPERT, "--config.expert=my news"], ["--config.expert=my news", "lower-case"]),
    (
        [ANCHOR, DATA, "--config.start_from={home}/anchor", "--config.expert=news"],
        ["--config.partition", "configs/expert.py", "config.expert=NAME"],
    ),
    ([*EXPERT, "--config.start_from={home}/run"], ["is the workdir of a run", "{home}/run/model"]),
    ([ANCHOR, DATA, "--config.optimizer.learning_rate=nan"], ["learning_rate=nan", "finite"]),
    ([ANCHOR, DATA, "--config.loss.z_loss=inf"], ["--config.loss.z_loss=inf", "finite"]),
    (
        ["--config=configs/pair.py", *EXPERT[1:], "--config.start_from={home}/anchor"],
        ["--config.data.public_share", "--config.data.public=DIR"],
    ),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_RUNS, ids=lambda value: value[-1])
def test_a_bad_run_is_refused(home, tmp_path, arguments, words):
    arguments = [argument.format(home=home) for argument in arguments]
    result = flexolmo("train", f"--workdir={tmp_path}/work", *arguments)
    assert_refused(result, "train", *(word.format(home=home) for word in words))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--config=configs/expert.py:tiny"], ["--config", "configs/expert.py"]])
def test_configurations_of_this_package_are_found_from_anywhere(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert_refused(flexolmo("train", *arguments, "--workdir=work"), "train", "an expert starts from an anchor")


def test_a_configuration_that_is_here_comes_before_that_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/expert.py").write_text("nope")
    assert_refused(flexolmo("train", "--config=configs/expert.py", "--workdir=work"), "train", "NameError", "nope")


def test_as_a_program_it_ends_with_status_2(home):
    """The same in a process of its own, started with `python -m`."""
    command = [sys.executable, "-m", "flexolmo_jax", "inspect", str(home / "nosuch")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_refused(small.Result(done.returncode, done.stdout, done.stderr), "inspect", home / "nosuch")
