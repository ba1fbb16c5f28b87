"""The table of architectures: a tiny random model per type, and what is asked of each.

`docs/supported-models.md` is written from this list: `python tests/model/architectures.py docs/supported-models.md`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longmem.backbone.capture import Backbone
from longmem.backbone.structure import UnsupportedBackboneError

# What a tiny model has, where its configuration knows the field.
SIZES = dict(
    **dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4),
    **dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, sliding_window=8),
    **dict(n_embd=32, n_head=4, n_layer=4, n_inner=48, d_model=32, ffn_dim=48, word_embed_proj_dim=32),
    **dict(decoder_layers=4, decoder_attention_heads=4, decoder_ffn_dim=48),
    **dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    **dict(shared_expert_intermediate_size=16, dff=48),
    **dict(n_group=1, topk_group=1),
    **dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    **dict(bos_token_id=None, eos_token_id=None, pad_token_id=None),
)
LATENT = dict(num_key_value_heads=4)  # multi-head latent attention has no groups
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
MIXED = dict(layer_types=["conv", "full_attention", "full_attention", "conv"])
PLAIN = (
    "afmoe apertus arcee aria_text biogpt bitnet cohere cohere2 cohere2_moe ctrl diffllama "
    "doge ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode "
    "gpt_neox gpt_oss granite granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax jais2 jetmoe "
    "lfm3 llama mellum mimo_v2_flash minimax_m2 ministral ministral3 mistral mixtral nanochat nemotron "
    "olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 "
    "qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma"
)
# Options of the tiny model, beside `SIZES`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{name: {} for name in PLAIN.split()},
    **dict.fromkeys(("deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), LINEAR),
    "cwm": dict(bos_token_id=0, eos_token_id=1),
    "falcon": dict(alibi=True),
    "gemma4_text": dict(vocab_size_per_layer_input=97, hidden_size_per_layer_input=8),
    "llama4_text": {},
    "nemotron_h": dict(mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=16),
    "lfm2": MIXED,
    "lfm2_moe": MIXED,
    "modernbert-decoder": dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=3, sep_token_id=4),
}
# Fields of LongMemConfig that a type needs.
FORMS: dict[str, dict[str, Any]] = {"llama4_text": dict(memory_layers=[3])}
# What the table names beside what it finds out.
REMARKS = {
    "falcon": "ALiBi, as here, or rotary",
    "gpt_oss": "attention sinks",
    "llama4_text": "only layers without rotation can be stored",
}
# Types that can't be supported, the options of a tiny model, and what the refusal says is missing.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({}, "not causal"),
    "bloom": ({}, "ALL_ATTENTION_FUNCTIONS"),
    "deepseek_v2": (LATENT, "position_embeddings"),
    "gpt_neo": (dict(num_layers=4, attention_types=[[["global", "local"], 2]], num_heads=4), "ALL_ATTENTION_FUNCTIONS"),
    "gptj": (dict(rotary_dim=4), "does not undo it|ALL_ATTENTION_FUNCTIONS"),  # from transformers 5.24 on; before
    "mamba": ({}, "ALL_ATTENTION_FUNCTIONS"),
    "mpt": (dict(n_layers=4, n_heads=4), "ALL_ATTENTION_FUNCTIONS"),
    "rwkv": ({}, "ALL_ATTENTION_FUNCTIONS"),
    "xlstm": ({}, "ALL_ATTENTION_FUNCTIONS"),
}


def tiny_config(model_type: str, options: dict[str, Any]) -> PreTrainedConfig:
    """Return a small configuration: `SIZES`, as far as the type has these fields, and the options."""
    config_class = type(AutoConfig.for_model(model_type))
    fields = {field.name for field in dataclasses.fields(config_class)}
    aliases: dict[str, str] = getattr(config_class, "attribute_map", {})
    sizes = {name: size for name, size in SIZES.items() if name in fields or name in aliases}
    for alias, name in aliases.items():  # one name for one number
        if alias in sizes and name in sizes:
            del sizes[name]
    return AutoConfig.for_model(model_type, **{**sizes, **options})


def build(model_type: str, options: dict[str, Any] | None = None) -> PreTrainedModel:
    """Return a random model of the type, with weights large enough that every mistake shows in its logits."""
    torch.manual_seed(3)
    config = tiny_config(model_type, ARCHITECTURES[model_type] if options is None else options)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def describe(model_type: str, backbone: Backbone) -> str:
    """Return the row of a type in the docs: name, class, positions, attention, layers that can be stored, remark."""
    model, structure = backbone.model, backbone.structure
    layers = [structure.layers[number] for number in structure.storable_layers]
    turned = [layer for layer in layers if layer.rotation is not None]
    positions = (
        "rotary" if len(turned) == len(layers) else "none, absolute or ALiBi" if not turned else "rotary in some layers"
    )
    config = model.config.get_text_config()
    traits = [
        "grouped heads" if layers[0].num_kv_heads < layers[0].num_heads else "",
        "sliding windows" if "sliding_attention" in (getattr(config, "layer_types", None) or ()) else "",
        "experts" if any("expert" in name.lower() for name, _ in model.named_modules()) else "",
        "layers without attention" if any(not layer.num_heads for layer in structure.layers) else "",
        REMARKS.get(model_type, ""),
    ]
    cells = [f"`{model_type}`", f"`{type(model).__name__}`", positions, ", ".join(filter(None, traits))]
    return f"| {' | '.join(cells)} |"


def document(rows: Sequence[str]) -> str:
    """Return the text of `docs/supported-models.md`."""
    refused = "\n".join(f"| `{model_type}` | {refusal(model_type)} |" for model_type in sorted(REFUSED))
    return TEXT.format(count=len(ARCHITECTURES), rows="\n".join(rows), refused=refused)


def refusal(model_type: str) -> str:
    """Return the sentence with which a type is refused."""
    try:
        Backbone(build(model_type, REFUSED[model_type][0]))
    except UnsupportedBackboneError as error:
        return str(error)
    raise AssertionError(f"{model_type} is supported: move it to ARCHITECTURES")


TEXT = """# Supported models

Written by `make docs` from `tests/model/architectures.py`; do not edit. Nothing in the package knows any of these {count}
types: what a decoder is made of is found by running it over a few tokens. A type that is not listed may well work; when it
can't, construction says what is missing.

For every row `tests/model/test_architectures.py` builds a tiny random model and checks: with an empty memory it is the
backbone; memory changes its logits; no logit depends on later tokens; decoding with a cache gives the logits of one full
forward; text stored from another position is stored and read the same; only the side network gets gradients; a saved model
comes back the same; continuations that share a cached context have the likelihoods of full passes.

| type | class | positions | also |
|---|---|---|---|
{rows}

"Grouped heads", "experts" and so on say what the tiny model has; sizes and mixtures of the real ones differ.

## Refused, and why

| type | message |
|---|---|
{refused}
"""

if __name__ == "__main__":
    rows = [describe(model_type, Backbone(build(model_type))) for model_type in sorted(ARCHITECTURES)]
    Path(sys.argv[1]).write_text(document(rows), encoding="utf-8")
