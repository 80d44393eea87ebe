"""The same steps by transformers and PyTorch, as fast as their own switches make them.

Frozen parameters have `requires_grad` off and, in mixed precision, the dtype of frozen leaves. transformers holds the
kernels of the anchor and the expert in one tensor. In the expert step the `eager` implementation gets a list of two
parameters instead, the anchor's frozen; the others need one tensor, so that they train both halves (joining two tensors
in each step takes them as long).
"""

from typing import Any

import psutil
import torch
import transformers

from flexolmo_jax.benchmark.worker import Spec, Step
from flexolmo_jax.errors import UserError

# What the names of the parameters that a step trains contain.
TRAINED = {"anchor": [""], "joint": [""], "solo": ["mlp."], "pair": ["mlp."], "router": ["mlp.gate."]}
TRAINED_OF_LISTS = ["mlp.gate.", "proj.1"]


class TorchStep(Step):
    """A step of transformers."""

    _device = "cuda" if torch.cuda.is_available() else "cpu"

    def build(self) -> dict[str, Any]:
        """Makes a model, which its first step compiles where that is asked for."""
        torch.manual_seed(self._config.seed)
        with torch.device(self._device):
            return {"platform": self._device, "tokens": self._make()}

    def _make(self) -> int:
        """Makes what a step takes; returns its tokens."""
        raise NotImplementedError

    def wait(self) -> None:
        """Waits for the device."""
        if self._device == "cuda":
            torch.cuda.synchronize()

    def device_memory(self) -> int | None:
        """Peak bytes in use on the device."""
        return torch.cuda.max_memory_allocated() if self._device == "cuda" else None


class TrainStep(TorchStep):
    """Forward pass, cross-entropy, backward pass, clipping and AdamW."""

    def _make(self) -> int:
        options = self._config.optimizer
        check_memory(self._spec, self._batch_size // self._config.data.grad_accum_steps * self._length)
        model = random_model(self._spec).train()
        freeze(model, self._spec)
        self._tokens = torch.randint(self._config.model.vocab_size, (self._batch_size, self._length))
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained,
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self._forward = torch.compile(model) if self._spec.compiled else model
        return self._tokens.numel()

    def step(self) -> None:
        """Takes a step."""
        dtype, count = getattr(torch, self._config.compute.dtype), self._config.data.grad_accum_steps
        for tokens in self._tokens.chunk(count):
            with torch.autocast(self._device, dtype, enabled=dtype != torch.float32):
                loss = self._forward(input_ids=tokens, labels=tokens, use_cache=False).loss
            (loss / count).backward()
        if self._config.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(self._trained, self._config.optimizer.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()


class Decoding(TorchStep):
    """Greedy `generate`, from prompts of half a sequence to a whole one."""

    def _make(self) -> int:
        check_memory(self._spec, self._batch_size * self._length)
        self._new = self._length // 2
        self._model = random_model(self._spec).to(getattr(torch, self._config.compute.dtype)).eval()
        self._prompts = torch.randint(self._config.model.vocab_size, (self._batch_size, self._length - self._new))
        if self._spec.compiled:
            self._model.forward = torch.compile(self._model.forward)
        return self._batch_size * self._new

    def step(self) -> None:
        """Generates."""
        length = {"max_new_tokens": self._new, "min_new_tokens": self._new, "do_sample": False}
        cache = {"cache_implementation": "static"} if self._spec.compiled else {}
        with torch.no_grad():
            self._model.generate(self._prompts, attention_mask=torch.ones_like(self._prompts), **length, **cache)


def random_model(spec: Spec) -> Any:
    """With fresh weights: a dense OLMo-2 for the anchor, a FlexOlmo for all else."""
    model = spec.config.model
    sizes: dict[str, Any] = dict(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.d_ff,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tied_embeddings,
        max_position_embeddings=spec.config.data.sequence_length,
        **dict.fromkeys(("bos_token_id", "pad_token_id", "eos_token_id")),
    )
    if not spec.experts:
        return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**sizes))
    experts, top_k = (2, 2) if spec.step == "pair" else (spec.config.moe.num_experts, spec.config.moe.top_k)
    sizes |= dict(num_experts=experts, num_experts_per_tok=top_k, norm_topk_prob=model.norm_topk_prob)
    built = transformers.FlexOlmoForCausalLM(transformers.FlexOlmoConfig(**sizes))
    built.set_experts_implementation(spec.experts)
    return built


def freeze(model: Any, spec: Spec) -> None:
    """Leaves what the step trains trainable, and nothing else."""
    trained = TRAINED[spec.step]
    if spec.step == "pair" and spec.experts == "eager":
        trained = TRAINED_OF_LISTS
        for layer in model.model.layers:
            _split_experts(layer.mlp.experts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(substring in name for substring in trained))
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, spec.config.compute.frozen_dtype))


def _split_experts(experts: torch.nn.Module) -> None:
    """Replaces each tensor of all experts by a list of parameters, one for each expert."""
    for name, stacked in list(experts.named_parameters()):
        delattr(experts, name)
        setattr(experts, name, torch.nn.ParameterList(torch.nn.Parameter(x.clone()) for x in stacked.detach()))


def check_memory(spec: Spec, tokens: int) -> None:
    """Refuses `batched_mm` if its copies of kernels, for each token those of its experts, do not fit.

    The copies of all layers are kept for the backward pass; generation keeps those of one layer.
    """
    model, top_k = spec.config.model, 2 if spec.step == "pair" else spec.config.moe.top_k
    layers = 1 if spec.step == "decode" else model.num_layers
    needed = 4 * layers * tokens * top_k * 3 * model.d_model * model.d_ff
    if spec.experts == "batched_mm" and needed > psutil.virtual_memory().available / 2:
        raise UserError(f"would copy {needed / 2**30:.0f} GiB of kernels")
