"""NewGPT, the backbone of LongMem's released code, as a model class of transformers.

Source: github.com/Victorwz/LongMem, commit b7f3c6b, `hf_newgpt/modeling_newgpt.py`; written anew from what it computes.
Nothing in transformers fits: attention and MLP in parallel behind ONE layer norm, ALiBi, no biases in the attention, an
untied LM head with one. Module names are those of its checkpoints.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from longmem.backbone.cache_names import as_keyword, cache_of, one_cache
from longmem.official.configuration_newgpt import NewGPTConfig


def alibi_slopes(num_heads: int) -> Float[Tensor, " heads"]:
    """Return the slope of every head (ALiBi, arXiv 2108.12409): a geometric series for a power of two; further heads
    take every other slope of the series for twice as many.

    >>> alibi_slopes(3)
    tensor([0.0625, 0.0039, 0.2500])
    """
    power = 1 << (num_heads.bit_length() - 1)
    series = torch.exp2(-8 / power * torch.arange(1, power + 1))
    between = torch.exp2(-4 / power * (2 * torch.arange(num_heads - power) + 1))
    return torch.cat([series, between])


def alibi_bias(
    slopes: Float[Tensor, " heads"], attention_mask: Float[Tensor, "#lanes keys"]
) -> Float[Tensor, "#lanes heads 1 keys"]:
    """Return slope times position of the KEY, counted over real tokens.

    A softmax does not see what all keys of a query share, so this equals a bias by distance (ALiBi's own form).
    """
    positions = (attention_mask.cumsum(-1) - 1) * attention_mask
    return slopes[:, None, None] * positions[:, None, None, :]


def alibi_causal_mask(
    slopes: Float[Tensor, " heads"], attention_mask: Tensor | None, num_queries: int, num_keys: int
) -> Float[Tensor, "#lanes heads queries keys"]:
    """Return what is added to the scores, in float32: the ALiBi bias where a key may be seen, the lowest number elsewhere.

    `attention_mask`: 1 for tokens and 0 for padding, `lanes keys`, cached tokens included; None for no padding. Queries are
    the last of the keys.
    """
    if attention_mask is None:
        attention_mask = slopes.new_ones(1, num_keys)
    elif attention_mask.shape[1:] != (num_keys,):
        raise ValueError(
            f"`attention_mask` must be (rows, {num_keys}): one number for each cached and each new token, "
            f"got {tuple(attention_mask.shape)}."
        )
    causal = slopes.new_ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    visible = causal & attention_mask.bool()[:, None, None, :]
    bias = alibi_bias(slopes, attention_mask.to(slopes.dtype))
    return torch.where(visible, bias, torch.finfo(slopes.dtype).min)


class NewGPTAttention(nn.Module):
    """Self-attention without biases, computed in float32 whatever the model's dtype, as in the released code."""

    is_causal = True

    def __init__(self, config: NewGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(
        self,
        hidden_states: Float[Tensor, "lanes tokens hidden"],
        attention_mask: Tensor,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "lanes tokens hidden"], Tensor | None]:
        """Return the attention's output, and its weights where the attention function gives them."""
        query, key, value = (
            projection(hidden_states).float().unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        kind = self.config._attn_implementation
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        scaling = self.head_dim**-0.5
        output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return self.out_proj(output.flatten(2).to(hidden_states.dtype)), weights


class NewGPTMLP(nn.Module):
    """Two linear layers with biases."""

    def __init__(self, config: NewGPTConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None  # set when the configuration was made
        self.fc_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc_out = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Float[Tensor, "lanes tokens hidden"]) -> Float[Tensor, "lanes tokens hidden"]:
        return self.dropout(self.fc_out(self.activation(self.fc_in(hidden_states))))


class NewGPTLayer(nn.Module):
    """A parallel block: `attention(n) + mlp(n) + x` with `n = layer_norm(x)`."""

    def __init__(self, config: NewGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = NewGPTAttention(config, layer_idx)
        self.mlp = NewGPTMLP(config)

    def forward(
        self, hidden_states: Float[Tensor, "lanes tokens hidden"], attention_mask: Tensor, **kwargs: Any
    ) -> Float[Tensor, "lanes tokens hidden"]:
        normed = self.ln_1(hidden_states)
        attended, _ = self.attn(normed, attention_mask, **kwargs)
        return attended + self.mlp(normed) + hidden_states


class NewGPTPreTrainedModel(PreTrainedModel):
    """What the classes below share with transformers."""

    config: NewGPTConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    _no_split_modules = ["NewGPTLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": NewGPTLayer, "attentions": NewGPTAttention}


class NewGPTModel(NewGPTPreTrainedModel):
    """The decoder: embeddings, blocks, final layer norm. Hidden states are not scaled and have no position embedding."""

    def __init__(self, config: NewGPTConfig) -> None:
        super().__init__(config)
        self.wte: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.h = nn.ModuleList(NewGPTLayer(config, number) for number in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the normed last hidden states, and the cache.

        Exactly one of `input_ids` and `inputs_embeds` is needed. `position_ids` is taken, as every caller in
        transformers passes it, and not used: ALiBi counts the tokens of `attention_mask`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given.")
        hidden_states: Tensor = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        cache = one_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else int(cache.get_seq_length())
        num_queries = hidden_states.shape[1]
        slopes = alibi_slopes(self.config.num_attention_heads).to(hidden_states.device)
        mask = alibi_causal_mask(slopes, attention_mask, num_queries, past + num_queries)
        for layer in self.h:
            hidden_states = layer(hidden_states, mask, cache=cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states), **as_keyword(cache))


class NewGPTForCausalLM(NewGPTPreTrainedModel, GenerationMixin):
    """NewGPT with its LM head, which has a bias and is not tied to the embeddings."""

    def __init__(self, config: NewGPTConfig) -> None:
        super().__init__(config)
        self.transformer = NewGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits of the last `logits_to_keep` tokens (0: all), and the loss where there are `labels`."""
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=one_cache(cache, past_key_values),
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **as_keyword(cache_of(outputs)),
        )


AutoConfig.register("newgpt", NewGPTConfig, exist_ok=True)
AutoModelForCausalLM.register(NewGPTConfig, NewGPTForCausalLM, exist_ok=True)
