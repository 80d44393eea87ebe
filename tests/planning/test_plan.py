"""Plans of steps, compiled for TPUs and GPUs that are not there, against sums made here.

Each in a process of its own: the compiler goes by environment variables, and the emulated devices are to stay.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.plan
tpus, gpus = (
    pytest.mark.skipif(not importlib.util.find_spec(compiler), reason=f"{compiler} is not installed")
    for compiler in ("libtpu", "jax_cuda13_plugin")
)

# Of configs/models.py's tiny.
V, LAYERS, D, F = 320, 4, 128, 352
BLOCK = 4 * D * D + 4 * D  # query, key, value, out; norms of queries, keys, and after attention and mixture
SHARED = LAYERS * BLOCK + 2 * V * D + D
EXPERT = LAYERS * (3 * D * F + D + 1)
STEPS = 2 * 4  # bytes: Adam and the schedule count steps


def flexolmo_plan(*arguments):
    command = [sys.executable, "-m", "flexolmo_jax", "plan", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def planned(tmp_path_factory, *arguments):
    """(standard output, JSON) of a plan."""
    file = tmp_path_factory.mktemp("plan") / "new" / "plan.json"
    done = flexolmo_plan(*arguments, f"--json={file}")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


@pytest.fixture(scope="module", params=[pytest.param("v5e:2x4", marks=tpus), pytest.param("h200:8", marks=gpus)])
def expert(request, tmp_path_factory):
    """(topology, standard output, JSON) of a plan for eight devices."""
    return request.param, *planned(tmp_path_factory, "--config=configs/expert.py:tiny", f"--topology={request.param}")


def test_parameters_and_optimizer_are_what_the_architecture_says(expert):
    _, _, made = expert
    assert made["parameters"] == SHARED + 2 * EXPERT
    memory = made["memory"]
    assert memory["trained"] == 4 * EXPERT
    assert memory["frozen"] == 4 * (SHARED + EXPERT)
    assert memory["optimizer"] == 8 * EXPERT + STEPS
    assert memory["batch"] == 4 * 4 * 256  # a sequence
    held = sum(memory[part] for part in ("trained", "frozen", "optimizer", "batch"))
    assert memory["temporaries"] == memory["peak"] - held > 0
    assert memory["fits"]
    assert made["tokens"] == 8 * 256
    assert (made["devices"], made["mesh"]["data"]) == (8, 8)


def test_the_gradient_is_summed_over_all_copies(expert):
    topology, _, made = expert
    total, *others = made["collectives"]  # what sends most comes first
    assert (total["kind"], total["axes"]) == ("all-reduce", ["data"])
    gradient = 4 * EXPERT * 2 * 7 / 8
    assert gradient <= total["bytes_sent"] < 1.01 * gradient  # and a few sums over tokens
    assert total["seconds"] == pytest.approx(total["bytes_sent"] / {"v5e:2x4": 2 * 45e9, "h200:8": 450e9}[topology])
    assert sum(other["bytes_sent"] for other in others) < 0.02 * gradient  # for GPUs, of the router, for its top-k
    assert made["roofline"]["sent_bytes"] == sum(each["bytes_sent"] for each in (total, *others))
    assert made["roofline"]["limits"]["interconnect"] == pytest.approx(
        sum(each["seconds"] for each in (total, *others))
    )


def test_the_tables_show_what_the_json_has(expert):
    topology, shown, made = expert
    kind, available = {"v5e:2x4": ("TPU v5 lite", "15.75"), "h200:8": ("NVIDIA H200", "132.81")}[topology]
    assert f"{made['parameters']:,} parameters on {topology}: 8 devices ({kind}), mesh data 8" in shown
    assert f"{made['memory']['peak'] / 2**20:.2f} MiB" in shown
    assert f"{made['collectives'][0]['bytes_sent'] / 1e6:.2f} MB" in shown
    assert all(sentence in shown for sentence in made["advice"])
    assert made["advice"][0].startswith(f"fits: 0.05 of {available} GiB")
    assert ("XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in shown) == (topology == "h200:8")
    assert made["config"]["model"]["d_model"] == D
    assert "Traceback" not in shown


@pytest.mark.parametrize("topology", [pytest.param("v5e:2x4", marks=tpus), pytest.param("h200:8", marks=gpus)])
def test_experts_and_what_they_share_are_split_over_an_axis_of_their_own(tmp_path_factory, topology):
    arguments = ("--config=configs/joint.py:tiny", f"--topology={topology}", "--config.mesh.expert=4")
    _, made = planned(tmp_path_factory, *arguments)
    assert made["parameters"] == SHARED + 4 * EXPERT
    # One of four experts; of what they share, norms of queries and keys are whole.
    whole = LAYERS * 2 * D
    assert made["memory"]["trained"] == 4 * ((SHARED - whole) / 4 + whole + EXPERT)
    assert made["memory"]["optimizer"] == 2 * made["memory"]["trained"] + STEPS
    axes = {(total["kind"], *total["axes"]) for total in made["collectives"]}
    assert {("all-gather", "expert"), ("reduce-scatter", "expert"), ("all-reduce", "data")} <= axes


@gpus
def test_a_mixture_compiles_with_the_kernels_for_hopper(tmp_path_factory):
    """They are traced for GPUs that are not there."""
    sizes = ("--config.model.d_ff=384", "--config.data.sequence_length=1024", "--config.compute.dtype=bfloat16")
    _, made = planned(tmp_path_factory, "--config=configs/joint.py:tiny", "--topology=h200:1", *sizes)
    assert made["memory"]["fits"]
    memory = made["memory"]
    assert made["roofline"]["hbm_bytes"] > 2 * (memory["trained"] + memory["optimizer"])


@tpus
def test_a_step_that_does_not_fit_says_so(tmp_path_factory):
    values = ("--config.data.batch_size=65536", "--config.data.sequence_length=2048")
    shown, made = planned(tmp_path_factory, "--config=configs/expert.py:tiny", "--topology=v5e:2x4", *values)
    assert not made["memory"]["fits"]
    assert made["memory"]["peak"] > made["memory"]["available"] == int(15.75 * 2**30)
    assert made["collectives"] is None
    assert made["roofline"]["hbm_bytes"] is None
    assert list(made["roofline"]["limits"]) == ["arithmetic"]
    assert made["advice"][0].startswith("does not fit: ")
    assert "try --config.mesh.data=1 --config.mesh.fsdp=8 or --config.data.grad_accum_steps=" in made["advice"][0]
    assert made["advice"][0] in shown


@gpus
@pytest.mark.parametrize("topology", ["h200:1", "h100:1"])
def test_an_expert_of_the_published_size_fits_a_gpu_of_141_gigabytes_alone(tmp_path_factory, topology):
    arguments = ("--config=configs/expert.py:7b", f"--topology={topology}", "--config.data.batch_size=2")
    _, made = planned(tmp_path_factory, *arguments)
    memory = made["memory"]
    assert memory["fits"] == (topology == "h200:1")
    # 4.3 billion parameters that are trained, and their moments, in float32; 7.3 billion frozen ones in bfloat16.
    assert memory["trained"] + memory["optimizer"] == pytest.approx(12 * 4.33e9, rel=0.01)
    assert memory["frozen"] == pytest.approx(2 * 7.3e9, rel=0.01)
    # The gradient, and of each of 32 blocks what enters it and the results of its matmuls and of attention.
    tokens, width, hidden = 2 * 4096, 4096, 11_008
    needed = 4 * 4.33e9 + 2 * 32 * tokens * ((1 + 4 + 1 + 2) * width + 4 * hidden)
    assert needed < memory["temporaries"] < 1.1 * needed


@tpus
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--topology=v5e:3x5",), "--topology=v5e:3x5: no slice that the TPU compiler knows"),
        (("--topology=v5e:2x4", "--config.mesh.data=3"), "--config.mesh: data=3, fsdp=1, expert=1, tensor=1 does not"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(arguments, words):
    done = flexolmo_plan("--config=configs/expert.py:tiny", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.startswith("flexolmo plan: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
