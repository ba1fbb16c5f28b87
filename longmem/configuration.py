"""Configuration of a LongMem model: one field, one decision; every check in one place."""

import copy
import dataclasses
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from longmem.errors import did_you_mean

# Keys that transformers itself hands to every configuration; anything else that is not a field is a mistake.
INHERITED_KEYS = frozenset(
    ("name_or_path", "_name_or_path", "torch_dtype", "dtype", "num_labels", "attn_implementation", "auto_map")
    + ("experts_implementation", "output_attentions", "model_type", "tie_word_embeddings", "_commit_hash")
)
# Layer types of transformers' hybrid models that hold no keys: state-space and convolution layers, lone MLPs.
WITHOUT_ATTENTION = ("linear_attention", "conv", "moe", "mlp")
DEFAULT_BIAS = {"joint": -1.0, "gated": 0.0}


@strict
class LongMemConfig(PreTrainedConfig):
    """Configuration of a frozen backbone, its side network and how the side network reads memory.

    Args:
        backbone_name_or_path: hub name, local folder or packaged name of the frozen causal LM.
        backbone_revision: hub revision of the backbone.
        backbone_config: configuration of the backbone; copied, because transformers resets the attention
            implementation of a configuration object that sits inside another one.
        layer_reduction_factor: R; side layer i stands for backbone layers R*i to R*i+R-1. The paper uses 2. The default
            is 1, the side network starting at the first memory layer: it costs the same and reads better
            (`docs/experiments.md`).
        memory_layers: backbone layers whose keys and values are stored, multiples of R; side layer `layer / R` reads
            them. The paper stores one (the 18th of 24). Default: all from 8/15 to 4/5 of the stack.
        chunk_size: tokens of a chunk, the unit of retrieval (paper: 4).
        num_retrieved_tokens: K, tokens read by every query and head, a multiple of `chunk_size`. The paper reads 64; the
            default is 32, which halves the cost of reading and keeps most of the gain (`docs/experiments.md`).
        segment_length: tokens of one window of text, in encoding and in training (paper: 1,024).
        memory_distance: tokens between a query and what it retrieved, for rotary models, whose stored keys have no
            position of their own. 0 is harmful, and so is far beyond the text it was tuned on (`docs/experiments.md`).
        residual: `"substitute"` (side layers replace the layers they copy) or `"paper"` (section 2.2 of the paper).
        residual_states: whether the backbone's last hidden state is taken before (`"pre_norm"`, as in the paper's
            equation) or after (`"post_norm"`, as in the released code) its final norm.
        fusion: `"joint"` (one softmax over local and retrieved tokens) or `"gated"` (two, mixed per head: the paper).
        init: `"backbone"` copies layers; `"identity"`, for `residual="paper"`, also scales what every layer adds by a
            learned vector that starts at zero, so that training starts from the backbone's own function.
        memory_bias_init: start of the learned bias per head: added to retrieved scores (joint, default -1), or the
            gate before its sigmoid (gated, default 0 as in the paper).
    """

    model_type: ClassVar[str] = "longmem"

    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    backbone_config: Any = None
    layer_reduction_factor: int = 1
    memory_layers: list[int] | None = None
    chunk_size: int = 4
    num_retrieved_tokens: int = 32
    segment_length: int = 1024
    memory_distance: int = 64
    residual: Literal["substitute", "paper"] = "substitute"
    residual_states: Literal["pre_norm", "post_norm"] = "pre_norm"
    fusion: Literal["joint", "gated"] = "joint"
    init: Literal["backbone", "identity"] = "backbone"
    memory_bias_init: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_fields(type(self), kwargs)
        if isinstance(self.backbone_config, dict):
            fields = dict(self.backbone_config)
            self.backbone_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        elif self.backbone_config is not None:
            self.backbone_config = copy.deepcopy(self.backbone_config)
        if self.memory_layers is None and self.backbone_config is not None:
            self.memory_layers = default_memory_layers(self.get_text_config(), self.layer_reduction_factor)
        if self.memory_bias_init is None:
            self.memory_bias_init = DEFAULT_BIAS.get(self.fusion, 0.0)
        super().__post_init__(**kwargs)

    @property
    def num_backbone_layers(self) -> int:
        """L, the number of decoder layers of the backbone."""
        return self.get_text_config().num_hidden_layers

    @property
    def first_side_layer(self) -> int:
        """Return the first side layer that is built.

        Under `residual="substitute"` the layers below the first reading layer would repeat the backbone, so they are
        left out; the paper's form runs them all.
        """
        if self.residual == "paper":
            return 0
        return min(self.memory_layers or [0]) // self.layer_reduction_factor

    @property
    def side_layers(self) -> range:
        """The side layers that are built; side layer i is a copy of backbone layer `R * i`."""
        return range(self.first_side_layer, self.num_backbone_layers // self.layer_reduction_factor)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the backbone's text configuration: `generate` sizes its cache from it."""
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, the backbone's configuration as a nested dict."""
        values = super().to_dict()
        if isinstance(self.backbone_config, PreTrainedConfig):
            values["backbone_config"] = self.backbone_config.to_dict()
        return values

    def validate_sizes(self) -> None:
        """Check lengths and counts, which need no backbone."""
        for name in ("layer_reduction_factor", "chunk_size", "num_retrieved_tokens", "segment_length"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.memory_distance < 0:
            raise ValueError(
                f"`memory_distance` must be 0 or more tokens, got {self.memory_distance}; 64 is the default."
            )
        if self.num_retrieved_tokens % self.chunk_size:
            nearest = max(self.num_retrieved_tokens - self.num_retrieved_tokens % self.chunk_size, self.chunk_size)
            raise ValueError(
                "`num_retrieved_tokens` must be a multiple of `chunk_size`, "
                f"got {self.num_retrieved_tokens} and {self.chunk_size}; {nearest} would do."
            )
        if self.segment_length < self.chunk_size:
            raise ValueError(
                f"`segment_length` must hold at least one chunk of `chunk_size` {self.chunk_size} tokens, "
                f"got {self.segment_length}."
            )
        if self.residual_states == "post_norm" and self.residual != "paper":
            raise ValueError(
                '`residual_states="post_norm"` belongs to `residual="paper"`, got residual="substitute", where it would '
                'put a normed state among raw ones; use `residual_states="pre_norm"`.'
            )
        if self.init == "identity" and self.residual != "paper":
            raise ValueError(
                '`init="identity"` belongs to `residual="paper"`, got residual="substitute", which starts as the '
                'backbone by itself; use `init="backbone"`.'
            )

    def validate_layers(self) -> None:
        """Check what depends on the backbone's depth and window, once the backbone is known."""
        if self.backbone_config is None:
            return
        num_layers, factor = self.num_backbone_layers, self.layer_reduction_factor
        if num_layers % factor:
            divisors = [str(n) for n in range(1, num_layers + 1) if num_layers % n == 0]
            raise ValueError(
                f"`layer_reduction_factor` must divide the backbone's {num_layers} layers, got {factor}; "
                f"one of {', '.join(divisors)} does."
            )
        layers = self.memory_layers or []
        if (
            any(layer not in range(0, num_layers, factor) for layer in layers)
            or not layers
            or sorted(set(layers)) != list(layers)
        ):
            raise ValueError(
                f"`memory_layers` must be ascending, different multiples of `layer_reduction_factor` ({factor}) below "
                f"the backbone's {num_layers} layers, got {layers}; the default would be "
                f"{default_memory_layers(self.get_text_config(), factor)}."
            )
        window = getattr(self.get_text_config(), "max_position_embeddings", None)
        if window and self.segment_length > window:
            raise ValueError(
                f"`segment_length` must fit the backbone's window of {window} tokens "
                f"(`max_position_embeddings`), got {self.segment_length}."
            )


def default_memory_layers(backbone_config: PreTrainedConfig, factor: int) -> list[int]:
    """Return the multiples of `factor` from 8/15 to 4/5 of the stack, at least one: layers 16 to 23 of 30.

    Measured on SmolLM2-135M: reading below the middle harms an untrained side network, and reading in the last fifth
    costs more than it gains (`docs/experiments.md`). Layers of hybrid models that do not attend are passed over.
    """
    num_layers = backbone_config.num_hidden_layers
    layer_types = getattr(backbone_config, "layer_types", None) or ["full_attention"] * num_layers
    start, end = num_layers * 8 // 15, num_layers * 4 // 5
    candidates = [layer for layer in range(0, num_layers, factor) if layer_types[layer] not in WITHOUT_ATTENTION]
    chosen = [layer for layer in candidates if start <= layer < end]
    return chosen or sorted(candidates, key=lambda layer: abs(layer - num_layers // 2))[:1] or [0]


def refuse_unknown_fields(config_class: type, given: dict[str, Any]) -> None:
    """Raise ValueError for the first key of `given` that no field takes, with the closest field's name."""
    known = [field.name for field in dataclasses.fields(config_class)]
    for key in given:
        if key not in INHERITED_KEYS and key not in known:
            raise ValueError(
                f"`{key}` is not a field of {config_class.__name__}.{did_you_mean(key, known)} "
                "Fields are listed in its docstring."
            )
