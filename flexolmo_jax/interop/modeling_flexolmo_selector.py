"""A FlexOlmo mixture whose experts are chosen by a selector, in PyTorch, for transformers 5 or newer.

This file stands beside exported weights: `AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)`. It
needs nothing but PyTorch and transformers, and it is FlexOlmo as transformers has it, but for this: the logits of
experts are their evidence, or the sum of that and the router's logits. Evidence is how much likelier the text so far is
in an expert's own text than in public text, in nats:

    evidence after a token = evidence_decay * evidence before it + log_ratio[bucket of the n-gram that ends in it]

It starts at 0 in every document, that is where `position_ids` are 0; the first n - 1 tokens of a document add nothing.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.models.flex_olmo.configuration_flex_olmo import FlexOlmoConfig
from transformers.models.flex_olmo.modeling_flex_olmo import (
    FlexOlmoDecoderLayer,
    FlexOlmoForCausalLM,
    FlexOlmoMLP,
    FlexOlmoModel,
    FlexOlmoTopKRouter,
)

BUCKETS = 2**16  # of hashed n-grams
MULTIPLIER, FINALIZER, UINT32 = 0x9E3779B1, 0x85EBCA6B, 2**32 - 1  # of the hash


class FlexOlmoSelectorConfig(FlexOlmoConfig):
    """The configuration of FlexOlmo, and `selection`, `ngram_order` and `evidence_decay`.

    `selection` is "ngram", where the evidence takes the place of the router's logits, or "router+ngram", where it is
    added to them.
    """

    model_type = "flex_olmo_selector"
    # Those of FlexOlmo split experts that are fused.
    base_model_tp_plan = None
    base_model_ep_plan = None


class FlexOlmoSelectorRouter(FlexOlmoTopKRouter):
    """Weights of the top k experts of each token, by softmax over logits in float32."""

    def __init__(self, config):
        super().__init__(config)
        self.uses_hidden_states = config.selection.startswith("router+")
        self.bias = nn.Parameter(torch.zeros(config.num_experts))

    def forward(self, hidden_states, evidence):
        """Returns (logits [tokens, experts], weights [tokens, k], experts [tokens, k])."""
        logits = evidence - self.bias.float().abs()
        if self.uses_hidden_states:
            logits = logits + functional.linear(hidden_states.float(), self.weight.float())
        # Of equal weights the first is taken, as at the start of a document; torch.topk takes any.
        weights, experts = torch.sort(logits.softmax(-1), dim=-1, descending=True, stable=True)
        weights, experts = weights[:, : self.top_k], experts[:, : self.top_k]
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return logits, weights, experts


class FlexOlmoSelectorMoE(nn.Module):
    """The weighted sum of the chosen experts; the others are not computed."""

    def __init__(self, config):
        super().__init__()
        self.gate = FlexOlmoSelectorRouter(config)
        self.experts = nn.ModuleList(FlexOlmoMLP(config) for _ in range(config.num_experts))

    def forward(self, hidden_states, evidence):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, chosen = self.gate(x, evidence.reshape(-1, evidence.shape[-1]))
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, rank = torch.where(chosen == expert)
            weighted = self.experts[expert](x[token]) * weights[token, rank, None]
            y.index_add_(0, token, weighted.to(y.dtype))
        return y.reshape(hidden_states.shape)


class FlexOlmoSelectorDecoderLayer(FlexOlmoDecoderLayer):
    """A block of FlexOlmo that hands the evidence to its experts."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.mlp = FlexOlmoSelectorMoE(config)

    def forward(self, hidden_states, evidence, **kwargs):
        attended, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states, evidence))


class NgramSelector(nn.Module):
    """The evidence for each expert, from the tokens so far."""

    log_ratio: torch.Tensor

    def __init__(self, config):
        super().__init__()
        self.order, self.decay = config.ngram_order, config.evidence_decay
        self.register_buffer("log_ratio", torch.zeros(BUCKETS, config.num_experts))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, tokens, is_token, positions, evidence):
        """The evidence after each new token, float32 [batch, length, experts], before `log_scale`.

        Args:
          tokens: ids [batch, T], those that were read before first, and then the new ones.
          is_token: bool [batch, T]; False for padding, which changes nothing.
          positions: [batch, length], the position of each new token in its document.
          evidence: float32 [batch, experts], after the tokens that were read before.
        """
        is_new = is_token[:, -positions.shape[1] :]
        has_context = is_new & (positions >= self.order - 1)
        new = torch.where(has_context[..., None], self.log_ratio[self._buckets(tokens, is_token, positions)], 0.0)
        keep = torch.where(is_new, torch.where(positions > 0, self.decay, 0.0), 1.0)
        after = []
        for i in range(positions.shape[1]):  # one by one, so that the result does not depend on how a text is cut
            evidence = keep[:, i, None] * evidence + new[:, i]
            after.append(evidence)
        return torch.stack(after, dim=1)

    def _buckets(self, tokens, is_token, positions):
        """The bucket of the n-gram that ends at each new token; padding between its tokens is left out."""
        index = torch.arange(tokens.shape[1], device=tokens.device)
        last = torch.where(is_token, index, 0).cummax(dim=1).values  # the last token that is no padding
        at = index[-positions.shape[1] :].expand(positions.shape)
        value = torch.zeros_like(at)
        for _ in range(self.order):
            value = (value * MULTIPLIER + tokens.gather(1, at) + 1) & UINT32
            at = last.gather(1, (at - 1).clamp(min=0))
        return ((value * FINALIZER) & UINT32) >> 16


class SelectorLayer(DynamicLayer):
    """What the selector keeps, as one more layer of the cache, so that all that is done to a cache is done to it too.

    In the place of keys it has the evidence after each token, float32 [batch, 1, T, experts]; in that of values the
    tokens, int64 [batch, 1, T, 1].
    """

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        self.values = value_states[..., :0, :]  # theirs would have the dtype of keys

    @property
    def evidence(self):
        """The evidence after the last token, float32 [batch, experts]."""
        return self.keys[:, 0, -1]  # pyright: ignore[reportOptionalSubscript]

    @property
    def tokens(self):
        """The tokens that were read, int64 [batch, T]."""
        return self.values[:, 0, :, 0]  # pyright: ignore[reportOptionalSubscript]


class SelectorSettings:
    """What transformers is told of the models below."""

    config: FlexOlmoSelectorConfig
    config_class = FlexOlmoSelectorConfig
    _no_split_modules = ["FlexOlmoSelectorDecoderLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["selector"]  # noqa: RUF012
    _can_compile_fullgraph = False
    _supports_attention_backend = False  # programs with a cache of their own would lose the selector's state


class FlexOlmoSelectorModel(SelectorSettings, FlexOlmoModel):
    """FlexOlmo's decoder with a selector."""

    def __init__(self, config):
        super().__init__(config)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(FlexOlmoSelectorDecoderLayer(config, i) for i in layers)
        self.selector = NgramSelector(config)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,  # pyright: ignore[reportGeneralTypeIssues]
    ):
        """As in FlexOlmo, but for what the selector needs: ids, a dynamic cache, and a mask [batch, all tokens]."""
        if input_ids is None:
            raise ValueError("the selector reads token ids; give input_ids and not inputs_embeds")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        state = self._state(past_key_values)
        evidence = self._evidence(input_ids, attention_mask, position_ids, state)
        outputs = super().forward(  # which hands all further arguments to the layers
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            evidence=self.selector.log_scale.exp() * evidence,  # pyright: ignore[reportCallIssue]
            **kwargs,  # pyright: ignore[reportCallIssue]
        )
        if past_key_values is not None:
            if state is None:  # only now, since some caches make the layers before it as they go
                state = SelectorLayer()
                past_key_values.layers.append(state)
            state.update(evidence[:, None], input_ids[:, None, :, None])
        return outputs

    def _evidence(self, input_ids, attention_mask, position_ids, state):
        """The evidence after each token of `input_ids`, float32 [batch, length, experts]."""
        batch, length = input_ids.shape
        tokens, before = input_ids, torch.zeros(batch, self.config.num_experts, device=input_ids.device)
        if state is not None and state.get_seq_length():
            tokens, before = torch.cat([state.tokens, input_ids], dim=1), state.evidence
        if attention_mask is None:
            is_token = torch.ones_like(tokens, dtype=torch.bool)
        elif attention_mask.shape == tokens.shape:
            is_token = attention_mask.to(tokens.device, torch.bool)
        else:
            expected, found = list(tokens.shape), list(attention_mask.shape)
            raise ValueError(f"attention_mask has shape {found}; it must be {expected}, with the tokens in the cache")
        if position_ids is None:
            position_ids = (is_token.cumsum(dim=1) - 1)[:, -length:]
        return self.selector(tokens, is_token, position_ids.expand(batch, length), before)

    def _state(self, cache: Cache | None):
        """The selector's layer of a cache, if it has one."""
        if cache is None:
            return None
        if cache.is_compileable:
            raise ValueError("a static cache has no place for the selector's state; use a dynamic cache, the default")
        state = next((layer for layer in cache.layers if isinstance(layer, SelectorLayer)), None)
        if state is None and cache.get_seq_length():
            raise ValueError("past_key_values were computed without the selector; start without them")
        return state


class FlexOlmoSelectorForCausalLM(SelectorSettings, FlexOlmoForCausalLM):
    """FlexOlmo with a selector, and a head."""

    def __init__(self, config):
        super().__init__(config)
        self.model = FlexOlmoSelectorModel(config)
        self.post_init()
