"""The parity gate: what was converted must give back the same bytes, and compute the same logits."""

import contextlib
import gc
import importlib
import importlib.util
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil

from flexolmo_jax.checkpoint.manifests import ModelManifest
from flexolmo_jax.checkpoint.model_directory import stack_experts
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.errors import UserError
from flexolmo_jax.inference.model import Model
from flexolmo_jax.interop.architectures import HuggingFaceArchitecture
from flexolmo_jax.interop.hf_directory import same_bytes
from flexolmo_jax.interop.safetensors_io import Stored
from flexolmo_jax.interop.tensors import Tensor, tensor_values
from flexolmo_jax.model.decoder import separate_layers

MAX_DIFFERENCE, MAX_KL = 1e-4, 1e-6
BATCH, LENGTH = 2, 64
NOT_INSTALLED = "torch and transformers are not installed (pip install 'flexolmo-jax[interop]' brings them)"
NOT_IN_TRANSFORMERS = "transformers does not compute this architecture"
PEAK_COPIES = 2  # memory for loading a model, here and in transformers, in copies of its float32 parameters


class Difference(NamedTuple):
    """How far two models' logits are apart on some tokens.

    Attributes:
      max_abs: the largest absolute difference of a logit.
      kl: KL divergence of the second from the first, nats, mean over tokens.
      tokens: how many were compared.
    """

    max_abs: float
    kl: float
    tokens: int

    def __str__(self) -> str:
        return f"max abs difference {self.max_abs:.2g}, KL {self.kl:.2g} nats, over {self.tokens} tokens"


class Parity(NamedTuple):
    """What the gate found.

    Attributes:
      tensors: how many have identical bytes.
      compared: how far the logits are apart, or why they were not compared.
    """

    tensors: int
    compared: Difference | str

    @property
    def logits(self) -> Difference | None:
        """The difference, where there is one."""
        return None if isinstance(self.compared, str) else self.compared

    def lines(self) -> list[str]:
        """What to print."""
        return [
            f"round trip: identical bytes in all {self.tensors} tensors",
            f"logits, float32, against transformers: {self.logits}"
            if self.logits
            else f"logits were not compared: {self.compared}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """The same for a data card."""
        found = {"tensors_with_identical_bytes": self.tensors}
        if self.logits:
            return found | {"logits": self.logits._asdict()}
        return found | {"logits": "not compared", "because": self.compared}


def check_bytes(
    table: Mapping[str, Tensor],
    stored: Mapping[str, Stored],
    shared: Mapping[str, Slice],
    experts: Sequence[Mapping[str, Slice]],
    advance: Callable[[int], None] = lambda size: None,
) -> list[str]:
    """Compares tensors, as they would be exported from our leaves, with the bytes of a directory.

    Args:
      table: which tensors.
      stored: where the directory's are stored.
      shared: our shared leaves.
      experts: our experts' leaves, in the order of the directory's experts.
      advance: called with the number of bytes compared, as they are.

    Returns:
      The names of those that differ.
    """
    different = []
    for name, tensor in table.items():
        values = stored[name].read()
        if not same_bytes(tensor_values(tensor, shared, experts), values):
            different.append(name)
        advance(values.nbytes)
    return different


def too_large(shared: Mapping[str, Slice], experts: Mapping[str, Mapping[str, Slice]]) -> str:
    """Says how much memory a float32 model of these leaves needs, and how much is free; "" where it fits."""
    parameters = sum(math.prod(part.shape) for leaves in (shared, *experts.values()) for part in leaves.values())
    needed, free = PEAK_COPIES * 4 * parameters, psutil.virtual_memory().available
    return f"needs about {needed / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} are free" if needed > free else ""


def in_memory(
    manifest: ModelManifest,
    shared: Mapping[str, Slice],
    experts: Mapping[str, Mapping[str, Slice]],
    derived: Mapping[str, np.ndarray] | None = None,
) -> Model:
    """A float32 model of these leaves on the first device, where `load` puts them too; `derived` are a selector's."""
    device = jax.devices()[0]
    params = {path: jax.device_put(leaf, device) for path, leaf in (derived or {}).items()}
    for path, content in stack_experts(shared, experts).items():
        stacked = not isinstance(content, Slice)
        values = np.stack([_whole(part) for part in content], axis=1) if stacked else _whole(content)
        for name, leaf in separate_layers({path: values}, int(manifest.architecture["num_layers"])).items():
            params[name] = jax.device_put(np.asarray(leaf, np.float32), device)
    return Model(manifest, params)


def compare_logits(
    directory: pathlib.Path,
    manifest: ModelManifest,
    shared: Mapping[str, Slice],
    experts: Mapping[str, Mapping[str, Slice]],
    kind: HuggingFaceArchitecture,
    derived: Mapping[str, np.ndarray],
) -> Difference | str:
    """Compares the logits of a directory, as transformers computes them, with ours on random tokens, in float32.

    Only one of the two models is in memory at a time.

    Args:
      directory: in Hugging Face's form.
      manifest: of our model.
      shared: our shared leaves.
      experts: our experts' leaves.
      kind: the directory's architecture.
      derived: our leaves that are derived when a model is loaded, `selectors.read_derived`.

    Returns:
      The difference, or why there is none: transformers does not compute the architecture, torch and transformers are
      not installed, or the memory is too small.

    Raises:
      UserError: transformers cannot load the directory, or the logits are further apart than the gate allows.
    """
    if not kind.in_transformers:
        return NOT_IN_TRANSFORMERS
    reason = too_large(shared, experts) if transformers_installed() else NOT_INSTALLED
    if reason:
        return reason
    tokens = random_tokens(int(manifest.architecture["vocab_size"]), min(LENGTH, manifest.context_length))
    with _cycles_freed():
        expected = _transformers_logits(directory, tokens, kind)
    difference = compare(expected, our_logits(in_memory(manifest, shared, experts, derived), tokens))
    # Written so that NaN fails.
    if not (difference.max_abs <= MAX_DIFFERENCE and difference.kl <= MAX_KL):
        raise UserError(
            f"{directory}: its logits here and in transformers differ ({difference}); at most {MAX_DIFFERENCE:g} and "
            f"{MAX_KL:g} are allowed, so nothing was written; please report this with the directory's config.json"
        )
    return difference


def transformers_installed() -> bool:
    """Whether torch and transformers are installed."""
    return all(map(importlib.util.find_spec, ("torch", "transformers")))


def random_tokens(vocab_size: int, length: int = LENGTH) -> np.ndarray:
    """Token ids [BATCH, length], the same at every call."""
    return np.random.default_rng(0).integers(0, vocab_size, (BATCH, length))


def our_logits(model: Model, tokens_BxS: np.ndarray) -> np.ndarray:
    """float32 [batch, length, vocab], at the device's full precision."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.logits(tokens_BxS))


def compare(first: np.ndarray, second: np.ndarray) -> Difference:
    """The difference of two arrays of logits [batch, length, vocab]."""
    log_p, log_q = (_log_softmax(logits.astype(np.float64)) for logits in (first, second))
    kl_BxS = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    return Difference(float(np.abs(first - second).max()), float(kl_BxS.mean()), kl_BxS.size)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _whole(part: Slice) -> np.ndarray:
    return part.read(tuple(slice(0, length) for length in part.shape))


def _transformers_logits(
    directory: pathlib.Path, tokens: np.ndarray, kind: HuggingFaceArchitecture | None = None
) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    if kind and kind.modeling:  # from this package: code in a directory that others may have written is not run
        loader = getattr(importlib.import_module(f"flexolmo_jax.interop.{kind.modeling}"), kind.class_name)
    try:
        with _quiet():
            loaded = loader.from_pretrained(
                str(directory), dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
            model, info = loaded
    except Exception as error:  # transformers raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{directory}: transformers cannot load it ({reason}); version 5 or newer is needed") from error
    problems = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info.get(kind, ())]
    if problems:
        raise UserError(
            f"{directory}: transformers does not find its weights as they are ({problems[0]}); use version 5"
        )
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens), use_cache=False).logits.float().numpy()


@contextlib.contextmanager
def _cycles_freed() -> Iterator[None]:
    """Frees the reference cycles made inside; to search all objects of a large process would take seconds."""
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from showing bars; errors are raised anyway."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
