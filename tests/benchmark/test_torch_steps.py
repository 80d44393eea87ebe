"""The steps of transformers do the same work: they train what the step names, and nothing else, on the same loss."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from ml_collections import FrozenConfigDict  # noqa: E402

from configs import benchmark as config_file  # noqa: E402
from flexolmo_jax.benchmark.torch_steps import Decoding, TrainStep, check_memory, random_model  # noqa: E402
from flexolmo_jax.benchmark.worker import Spec  # noqa: E402
from flexolmo_jax.errors import UserError  # noqa: E402


def spec(step, experts="", **overrides):
    config = config_file.get_config("64")
    sizes = {
        "model.num_layers": 2,
        "model.d_model": 32,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.d_ff": 24,
        "data.sequence_length": 8,
        "data.batch_size": 2,
    }
    config.update_from_flattened_dict({**sizes, **overrides})
    return Spec("transformers", step, FrozenConfigDict(config), experts)


def changed(step, experts):
    """The parameters that a step changes."""
    subject = TrainStep(spec(step, experts))
    built = subject.build()
    assert built["tokens"] == 16
    before = {name: parameter.detach().clone() for name, parameter in subject._forward.named_parameters()}
    subject.step()
    return {name for name, x in subject._forward.named_parameters() if not torch.equal(x, before[name])}, before.keys()


def test_the_anchor_is_dense_and_trained_whole():
    trained, everything = changed("anchor", "")
    assert trained == everything
    assert not any("experts" in name for name in everything)


def test_of_the_pair_the_expert_alone_is_trained_where_it_has_parameters_of_its_own():
    trained, everything = changed("pair", "eager")
    layers = [f"model.layers.{i}.mlp" for i in range(2)]
    leaves = [("gate.weight", "experts.gate_up_proj.1", "experts.down_proj.1")]
    assert trained == {f"{layer}.{leaf}" for layer in layers for leaf in leaves[0]}
    assert {f"{layer}.experts.down_proj.0" for layer in layers} < everything


def test_of_the_pair_one_tensor_is_trained_whole():
    trained, everything = changed("pair", "grouped_mm")
    assert trained == {name for name in everything if ".mlp." in name}


def test_of_the_mixture_all_or_the_router_is_trained():
    trained, everything = changed("joint", "grouped_mm")
    assert trained == everything
    assert changed("router", "eager")[0] == {name for name in everything if ".mlp.gate." in name}


@pytest.mark.parametrize("step", ["pair", "joint"])
def test_each_implementation_computes_the_same_loss(step):
    losses = []
    for experts in ("eager", "grouped_mm", "batched_mm"):
        subject = TrainStep(spec(step, experts, **{"optimizer.learning_rate": 0.0}))
        subject.build()
        losses.append(subject._forward(input_ids=subject._tokens, labels=subject._tokens).loss.item())
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


def test_the_pair_has_two_experts_and_other_steps_those_of_the_mixture():
    assert [random_model(spec(step, "eager")).config.num_experts for step in ("pair", "joint", "decode")] == [2, 4, 4]
    assert random_model(spec("joint", "eager")).config.num_experts_per_tok == 2


def test_micro_batches_add_up_to_the_gradient_of_the_batch():
    norms = []
    for count in (1, 2):
        fixed = {"optimizer.learning_rate": 0.0, "optimizer.clip_norm": 0.0}
        subject = TrainStep(spec("joint", "grouped_mm", **{"data.grad_accum_steps": count, **fixed}))
        subject.build()
        zero_grad = subject._optimizer.zero_grad
        subject._optimizer.zero_grad = lambda: None
        subject.step()
        subject._optimizer.zero_grad = zero_grad
        norms.append(torch.stack([parameter.grad.norm() for parameter in subject._trained]))
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-7)


def test_mixed_precision_holds_frozen_parameters_as_a_run_does():
    subject = TrainStep(spec("pair", "eager", **{"compute.dtype": "bfloat16", "compute.frozen_dtype": "bfloat16"}))
    subject.build()
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in subject._forward.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_generation_writes_half_of_each_sequence():
    subject = Decoding(spec("decode", "grouped_mm"))
    assert subject.build()["tokens"] == 2 * 4
    generate, written = subject._model.generate, []
    subject._model.generate = lambda *args, **kwargs: written.append(generate(*args, **kwargs))
    subject.step()
    assert written[0].shape == (2, 8)


def test_copies_of_kernels_that_do_not_fit_are_refused():
    huge = {"data.batch_size": 2**20}
    check_memory(spec("joint", "grouped_mm", **huge), tokens=2**23)
    check_memory(spec("joint", "batched_mm"), tokens=16)
    # 2 layers of 2 experts a token, each with 3 matrices of 32 x 24 floats.
    with pytest.raises(UserError, match=f"would copy {2 * 2 * 3 * 32 * 24 * 4 * 2**23 // 2**30} GiB"):
        check_memory(spec("joint", "batched_mm", **huge), tokens=2**23)
