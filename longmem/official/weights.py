"""Weight names of the released code and of this package, and the configuration that its weights describe."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from longmem.model.modeling import LongMemForCausalLM
from longmem.model.saving import load_strictly
from longmem.official.configuration_newgpt import NewGPTConfig
from longmem.official.newgpt import NewGPTForCausalLM

# Constants of its source that no checkpoint tells: newgpt.py:89, layer_norm.py:29.
BACKBONE_EPS, SIDE_EPS = 1e-6, 1e-5
# The side network's checkpoint holds its backbone under this prefix.
OWN_BACKBONE = "decoder.pretrained_model."
BACKBONE = "decoder.model."
# Second names of backbone weights (never called: E10), and a version number.
ALIASES = {"decoder.embed_tokens.weight", "decoder.output_projection.weight", "decoder.version"}
MODULES = {
    "self_attn.q_proj": "layer.attn.q_proj",
    "self_attn.k_proj": "layer.attn.k_proj",
    "self_attn.v_proj": "layer.attn.v_proj",
    "self_attn.out_proj": "layer.attn.out_proj",
    "self_attn.memory_bias": "memory_bias",
    "fc1": "layer.mlp.fc_in",
    "fc2": "layer.mlp.fc_out",
    "ln_1": "layer.ln_1",
}
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+?)(\.weight|\.bias)?")


def side_name(official: str) -> str:
    """Return this package's name, inside `side_network`, of a weight of the released side network.

    >>> side_name("decoder.layers.3.fc1.bias")
    'layers.3.layer.mlp.fc_in.bias'
    """
    if official.startswith("decoder.layer_norm."):
        return official.replace("decoder.layer_norm.", "final_modules.0.")
    match = LAYER.fullmatch(official)
    if match is None or match[2] not in MODULES:
        raise ValueError(f"`{official}` is no weight of the released side network that this package knows.")
    return f"layers.{match[1]}.{MODULES[match[2]]}{match[3] or ''}"


def official_name(name: str) -> str:
    """Return the released code's name of a weight of `side_network`.

    >>> official_name("layers.3.memory_bias")
    'decoder.layers.3.self_attn.memory_bias'
    """
    if name.startswith("final_modules.0."):
        return name.replace("final_modules.0.", "decoder.layer_norm.")
    _, number, rest = name.split(".", 2)
    module, dot, last = rest.rpartition(".") if rest != "memory_bias" else (rest, "", "")
    official = next(official for official, ours in MODULES.items() if ours == module)
    return f"decoder.layers.{number}.{official}{dot}{last}"


def backbone_weights(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's weights, found in its own checkpoint or in that of a side network, under our names."""
    prefix = BACKBONE if any(name.startswith(BACKBONE) for name in official) else OWN_BACKBONE + BACKBONE
    return {name.removeprefix(prefix): tensor for name, tensor in official.items() if name.startswith(prefix)}


def side_weights(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the side network's own weights under our names."""
    own = {name: tensor for name, tensor in official.items() if not name.startswith(OWN_BACKBONE)}
    return {side_name(name): tensor for name, tensor in own.items() if name not in ALIASES}


def count_layers(names: Collection[str], pattern: str) -> int:
    """Return one more than the highest number that the pattern's group finds in the names, 0 for none."""
    return max((int(match[1]) + 1 for name in names if (match := re.match(pattern, name))), default=0)


def needed(weights: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    """Return a weight. Raises ValueError where it is missing."""
    if name not in weights:
        raise ValueError(f"{where} has no weight `{name}`, so it is not of the released architecture.")
    return weights[name]


def build_backbone(weights: Mapping[str, Tensor], num_heads: int, **fields: Any) -> NewGPTForCausalLM:
    """Return a backbone with these weights, all of them, under our names (`backbone_weights`); its sizes are theirs.

    No weight tells `num_heads`; `fields` are further ones of `NewGPTConfig`.
    Raises ValueError if weights are missing, left over or of another shape.
    """
    embeddings = needed(weights, "transformer.wte.weight", "the backbone")
    config = NewGPTConfig(
        vocab_size=embeddings.shape[0],
        hidden_size=embeddings.shape[1],
        num_hidden_layers=count_layers(weights, r"transformer\.h\.(\d+)\."),
        num_attention_heads=num_heads,
        intermediate_size=needed(weights, "transformer.h.0.mlp.fc_in.weight", "the backbone").shape[0],
        **{"layer_norm_eps": BACKBONE_EPS, **fields},
    )
    model = NewGPTForCausalLM(config)
    torch.nn.Module.to(model, embeddings.dtype)
    load_strictly(model, weights, "the backbone's checkpoint")
    return model.eval()


def build_model(
    backbone: NewGPTForCausalLM, weights: Mapping[str, Tensor], side_options: Mapping[str, Any], **fields: Any
) -> LongMemForCausalLM:
    """Return the released model on its backbone, with these side weights.

    Args:
        backbone: from `build_backbone`.
        weights: of the side network, under our names (`side_weights`).
        side_options: settings of side layers beside their inner size; `layer_norm_eps` is the source's when left out.
        fields: of `LongMemConfig`, among them `layer_reduction_factor` and `memory_layers`, the one layer that is stored.

    Raises ValueError if the weights do not fit each other or the settings.
    """
    factor, (retrieval_layer,) = fields["layer_reduction_factor"], fields["memory_layers"]
    num_side_layers = count_layers(weights, r"layers\.(\d+)\.")
    readers = [int(name.split(".")[1]) for name in weights if name.endswith(".memory_bias")]
    if readers != [retrieval_layer // factor]:
        raise ValueError(
            f"the side layers with a `memory_bias` are {readers}, but layer {retrieval_layer} of the backbone, at factor "
            f"{factor}, is read by side layer {retrieval_layer // factor}; one that is too deep is read by none (E7)."
        )
    options = {
        "intermediate_size": needed(weights, "layers.0.layer.mlp.fc_in.weight", "the side network").shape[0],
        "layer_norm_eps": SIDE_EPS,
        **side_options,
    }
    # Its `--reload-ptm-layer` copies the layer after the first of each group (E16); at factor 1 there is none.
    last = backbone.config.num_hidden_layers - 1
    try:
        model = LongMemForCausalLM.from_backbone(
            backbone,
            num_side_layers=num_side_layers,
            side_layer_offset=1 if factor * (num_side_layers - 1) < last else 0,
            residual="paper",
            residual_states="post_norm",
            fusion="gated",
            final_norm="side",
            side_layer_options=options,
            **fields,
        )
    except ValueError as error:
        raise ValueError(f"the released settings have no form here: {error}") from error
    load_strictly(model.side_network, weights, "the side network's checkpoint")
    return model.eval()
