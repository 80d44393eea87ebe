"""`flexolmo export-hf --keep-selector`: with the code that goes out, transformers computes what this project does.

Statistics are random, and every bucket has its own evidence, so that experts change every few tokens.
"""

import ast
import contextlib
import dataclasses
import json
import pathlib
import shutil
import types

import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.interop import parity
from flexolmo_jax.model.selectors import LOG_SCALE
from tests.support import hf_directories as hf
from tests.support import small
from tests.support.small import assert_refused, flexolmo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flexolmo_jax.interop import modeling_flexolmo_selector as modeling  # noqa: E402  it imports torch

OWNERS = ("code", "math", "news")
# name: (selection, experts of a token, norm_topk_prob, leaves that were tuned after the merge)
CASES = {
    "selector, tuned": ("ngram", 1, False, (LOG_SCALE, small.ROUTER[1])),
    "selector and router": ("router+ngram", 2, True, ()),
}
EOS, NEW = 256, 16


@contextlib.contextmanager
def quiet():
    with parity._quiet():
        yield


def load(directory, **options):
    with quiet():
        return transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()


def run(command, *flags):
    result = flexolmo(command, *flags)
    assert (result.status, result.err) == (0, ""), result
    return result.out


def make(home, selection, top_k, norm_topk_prob, tuned):
    """A merge of random experts whose biases are not zero; returns its directory."""
    architecture = dataclasses.replace(small.ARCHITECTURE, norm_topk_prob=norm_topk_prob)
    anchor = small.anchor(home / "anchor", 0, architecture, statistics=small.ngram_statistics(0))
    for seed, name in enumerate(OWNERS, 1):
        small.contribution(home / name, anchor, seed=seed, statistics=small.ngram_statistics(seed))
    merge(anchor, [home / name for name in OWNERS], home / "merged", top_k=top_k, selection=selection)
    if not tuned:
        return home / "merged"
    return small.tuned(home / "tuned", home / "merged", small.corpus(home / "corpus"), tuned)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A model, its export, and both in memory."""
    home = tmp_path_factory.mktemp("selector")
    path = make(home, *CASES[request.param])
    printed = run("export-hf", f"--model={path}", f"--out={home}/out", "--keep-selector")
    return types.SimpleNamespace(
        path=path,
        out=home / "out",
        printed=printed,
        ours=flexolmo_jax.load(path),
        theirs=load(home / "out"),
        tokens=np.random.default_rng(1).integers(0, 256, (parity.BATCH, parity.LENGTH)),
    )


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory):
    """A model and its export, whose logits were not compared."""
    home = tmp_path_factory.mktemp("unchecked")
    path = make(home, *CASES["selector, tuned"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "transformers_installed", lambda: False)
        run("export-hf", f"--model={path}", f"--out={home}/out", "--keep-selector")
    return types.SimpleNamespace(home=home, path=path, out=home / "out")


def evidence(cache):
    """What the selector keeps in a cache, [batch, length, experts]."""
    return cache.layers[-1].keys[:, 0]


def greedy(model, prompts, **options):
    """The most likely NEW tokens after prompts of several lengths, in one batch with padding before them."""
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    ids = torch.tensor([[EOS] * count + prompt for count, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * count + [1] * (length - count) for count in padding])
    settings = transformers.GenerationConfig(
        **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": EOS} | options
    )
    with quiet():
        return model.generate(ids, attention_mask=mask, generation_config=settings)[:, length:].tolist()


def test_logits_are_those_of_this_project(case):
    assert "logits, float32, against transformers: max abs difference" in case.printed
    with torch.no_grad():
        found = case.theirs(torch.from_numpy(case.tokens), output_router_logits=True)
    expected = parity.our_logits(case.ours, case.tokens)
    np.testing.assert_allclose(found.logits, expected, atol=1e-4, rtol=0)
    chosen = found.router_logits[0].reshape(*case.tokens.shape, -1).argmax(-1)
    assert (torch.bincount(chosen.flatten(), minlength=4) > 4).sum() > 2  # several experts take part,
    assert (chosen[:, 1:] != chosen[:, :-1]).sum() > 10  # and they change within a text


def test_a_cache_changes_nothing_however_a_text_is_cut(case):
    tokens, cache, found = torch.from_numpy(case.tokens), None, []
    with torch.no_grad():
        whole = case.theirs(tokens, use_cache=True)
        for part in tokens.split([1, 1, 1, 20, 1, 2, 38], dim=1):
            out = case.theirs(part, past_key_values=cache, use_cache=True)
            cache, found = out.past_key_values, [*found, out.logits]
    torch.testing.assert_close(torch.cat(found, dim=1), whole.logits, atol=1e-4, rtol=0)
    assert torch.equal(evidence(cache), evidence(whole.past_key_values))


def test_padding_changes_nothing_before_after_and_between(case):
    """Evidence is the same to the bit: in one call, and where the padding is in the cache."""
    real, padding = case.tokens[:1, :9], [0, 1, 4, 5, 8, 11, 12]
    is_token = torch.ones(1, 16, dtype=torch.long)
    is_token[0, padding] = 0
    tokens = torch.full((1, 16), 7)
    tokens[is_token.bool()] = torch.from_numpy(real[0])
    with torch.no_grad():
        expected = case.theirs(torch.from_numpy(real), use_cache=True)
        whole = case.theirs(tokens, attention_mask=is_token, use_cache=True)
        first = case.theirs(tokens[:, :6], attention_mask=is_token[:, :6], use_cache=True).past_key_values
        rest = case.theirs(tokens[:, 6:], attention_mask=is_token, past_key_values=first)
    for cache in (whole.past_key_values, rest.past_key_values):
        assert torch.equal(evidence(cache)[is_token.bool()][None], evidence(expected.past_key_values))


def test_greedy_tokens_are_those_of_this_project_in_any_batch(case):
    prompts = [case.tokens[0, :9].tolist(), case.tokens[1, :3].tolist(), [EOS]]
    together = greedy(case.theirs, prompts)
    for prompt, written in zip(prompts, together, strict=True):
        assert greedy(case.theirs, [prompt]) == [written]
        padded = np.zeros((parity.BATCH, parity.LENGTH), int)  # the shape that is compiled
        padded[0, : len(prompt) + NEW] = prompt + written
        expected = parity.our_logits(case.ours, padded)[0].argmax(-1)
        assert expected[len(prompt) - 1 : len(prompt) - 1 + NEW].tolist() == written


def test_beams_and_rejected_guesses_take_the_selector_along(case):
    prompts = [case.tokens[0, :9].tolist(), case.tokens[1, :3].tolist()]
    beams = greedy(case.theirs, prompts, num_beams=3)
    assert beams == greedy(case.theirs, prompts, num_beams=3, use_cache=False)
    repeated = prompts[0][:4] * 3  # so that there is something to guess
    assert greedy(case.theirs, [repeated], prompt_lookup_num_tokens=4) == greedy(case.theirs, [repeated])


def test_a_packed_document_starts_anew(case):
    documents = torch.from_numpy(case.tokens[:1]).split([20, 44], dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    with torch.no_grad():
        packed = case.theirs(torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits
        alone = [case.theirs(document).logits for document in documents]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-4, rtol=0)


def test_of_equal_weights_the_first_are_taken():
    config = modeling.FlexOlmoSelectorConfig(
        hidden_size=4, num_experts=8, num_experts_per_tok=3, selection="ngram", ngram_order=1, evidence_decay=0.5
    )
    _, weights, experts = modeling.FlexOlmoSelectorRouter(config)(torch.zeros(2, 4), torch.zeros(2, 8))
    assert experts.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 8))


def test_what_the_selector_cannot_follow_is_refused(unchecked):
    model = load(unchecked.out)
    ids = torch.arange(6)[None]
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 6, 16))
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 5\]; it must be \[1, 6\]"):
        model(ids, attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="use a dynamic cache"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    cache = transformers.DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8), layer)
    with pytest.raises(ValueError, match="computed without the selector"):
        model(ids, past_key_values=cache)


def test_tables_stay_float32(unchecked):
    model = load(unchecked.out, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {x.dtype for x in (model.model.selector.log_ratio, model.model.selector.log_scale)} == {torch.float32}
    (expected,) = (x for name, x in flexolmo_jax.load(unchecked.path).params.items() if name.endswith("log_ratio"))
    np.testing.assert_array_equal(model.model.selector.log_ratio, expected)


def test_it_is_loaded_with_its_code_or_not_at_all(unchecked):
    with pytest.raises(ValueError, match="trust_remote_code=True"), quiet():
        transformers.AutoModelForCausalLM.from_pretrained(unchecked.out, trust_remote_code=False)
    # What vLLM's backend asks.
    assert not modeling.FlexOlmoSelectorModel._supports_attention_backend


def test_the_code_needs_nothing_but_torch_and_transformers(unchecked):
    code = (unchecked.out / "modeling_flexolmo_selector.py").read_text()
    assert code == pathlib.Path(modeling.__file__).read_text()
    imported = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imported}
    assert {name.split(".")[0] for name in names} == {"torch", "transformers"}


def test_the_card_says_how_to_load_it(unchecked):
    page = (unchecked.out / "README.md").read_text()
    assert 'from_pretrained("DIRECTORY", dtype="auto", trust_remote_code=True)' in page
    assert "vLLM does not load it" in page
    assert "vllm serve" not in page
    assert "no place for" not in page
    assert "DIRECTORY-without-code --keep_selector" in page


def test_logits_too_far_apart_leave_nothing(unchecked, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling, "FINALIZER", 12345)
    result = flexolmo("export-hf", f"--model={unchecked.path}", f"--out={tmp_path}/out", "--keep-selector")
    assert_refused(result, "export-hf", "its logits here and in transformers differ", "nothing was written")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "flags", "words"),
    [
        ("tuned", ["--keep-selector", "--drop-selector"], ["--keep_selector", "give one of the two"]),
        ("tuned", ["--keep-selector", "--model-type=flex_olmo"], ["--model_type=flex_olmo", "no place for a selector"]),
        ("anchor", ["--keep-selector"], ["anchor", "has no selector to keep"]),
        ("by-router", ["--keep-selector"], ["by-router", "has no selector to keep"]),
        ("tuned", [], ["selection 'ngram'", "keep_selector", "drop_selector"]),
    ],
)
def test_flags_that_do_not_fit_are_refused(unchecked, tmp_path, no_transformers, model, flags, words):
    home = unchecked.home
    if model == "by-router" and not (home / model).exists():
        merge(home / "anchor", [home / name for name in OWNERS], home / model, top_k=2, selection="router")
    result = flexolmo("export-hf", f"--model={home / model}", f"--out={tmp_path}/out", *flags)
    assert_refused(result, "export-hf", *words)
    assert not list(tmp_path.iterdir())


def test_what_goes_out_comes_back_and_no_code_is_run(case, tmp_path):
    """Every file of the model directory; the directory's own code is not what its logits are compared with."""
    shutil.copytree(case.out, tmp_path / "source")
    (tmp_path / "source" / "modeling_flexolmo_selector.py").write_text("raise SystemExit('was run')")
    printed = run("import-hf", f"--source={tmp_path}/source", f"--out={tmp_path}/back")
    assert "logits, float32, against transformers: max abs difference" in printed
    assert small.files(tmp_path / "back") == small.files(case.path)


def change_config(directory, **changes):
    (directory / "config.json").write_text(json.dumps(hf.config(directory) | changes))


def change_tensor(directory, name):
    tensors = hf.weights(directory)
    hf.save_file(tensors | {name: np.asarray(tensors[name] + 1)}, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: shutil.rmtree(path / "flexolmo"), ["the statistics", "flexolmo/"]),
        (lambda path: change_tensor(path, "model.selector.log_ratio"), ["model.selector.log_ratio first"]),
        (lambda path: change_tensor(path, "model.selector.log_scale"), ["changed since its export", LOG_SCALE]),
        (lambda path: change_config(path, selection="router+ngram"), ["changed since its export (selection)"]),
        (lambda path: change_config(path, selection="router"), ["config.json", 'selection is "router"']),
        (lambda path: change_config(path, ngram_order=2), ["config.json", "ngram_order is 2", "only 3"]),
        (lambda path: change_config(path, evidence_decay=0.5), ["config.json", "evidence_decay 0.5"]),
    ],
)
def test_what_was_changed_outside_is_not_imported(unchecked, tmp_path, no_transformers, change, words):
    shutil.copytree(unchecked.out, tmp_path / "source")
    change(tmp_path / "source")
    result = flexolmo("import-hf", f"--source={tmp_path}/source", f"--out={tmp_path}/back")
    assert_refused(result, "import-hf", f"{tmp_path}/source", *words)
    assert not (tmp_path / "back").exists()


def test_it_is_no_contribution(unchecked, tmp_path):
    flags = ["--as-contribution", f"--anchor={unchecked.home}/anchor", "--expert=news"]
    result = flexolmo("import-hf", f"--source={unchecked.out}", *flags, f"--out={tmp_path}/news")
    assert_refused(result, "import-hf", f"--source={unchecked.out}", "import it as a model")
