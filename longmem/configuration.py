"""Configuration of a LongMem model: one field, one decision; every check in one place."""

import contextlib
import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from longmem.errors import did_you_mean
from longmem.settings.reading import in_words

# Keys that transformers itself hands to every configuration; anything else that is not a field is a mistake.
INHERITED_KEYS = frozenset(
    ("name_or_path", "_name_or_path", "torch_dtype", "dtype", "num_labels", "attn_implementation", "auto_map")
    + ("experts_implementation", "output_attentions", "model_type", "tie_word_embeddings", "_commit_hash")
)
# What loops and pipelines of others note in a configuration, and so in its file.
NOTED_BY_OTHERS = (
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "task_specific_params",
)
# What transformers promises of every configuration, and what its users take from there: answered by the backbone's.
OF_BACKBONE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "use_cache"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
# Layer types of transformers' hybrid models that hold no keys: state-space and convolution layers, lone MLPs.
WITHOUT_ATTENTION = ("linear_attention", "conv", "moe", "mlp")
# Fields in which a side layer must be as the backbone, whose hidden states it adds and whose keys and values it reads.
SHARED_WITH_BACKBONE = frozenset(
    ("hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads")
    + ("head_dim", "vocab_size", "model_type")
)
MOST_NEIGHBOURS = 1024
ALL_LINEAR = "all-linear"
LORA_KEYS = ("rank", "alpha", "target_modules", "dropout")
Config = TypeVar("Config", bound=PreTrainedConfig)


class _Default(int):
    """A default that adapts, as nobody has given it: it is told apart from the same number that somebody gave."""


DEFAULT_SEGMENT_LENGTH = _Default(1024)
DEFAULT_BIAS = {"joint": -1.0, "gated": 0.0}


def with_plain_errors(config_class: type[Config]) -> type[Config]:
    """Let a configuration say what it refuses by a ValueError: the rule's own sentence, or name, kind, value and default."""
    make, assign = config_class.__init__, config_class.__setattr__
    fields = {field.name: field for field in dataclasses.fields(config_class)}

    def plainly(call: Callable[..., None], *args: Any, given: Mapping[str, Any], **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except StrictDataclassFieldValidationError as error:
            name = str(error).split("'")[1]
            kind = fields[name].type  # the text of an annotation, where it is of transformers' own fields
            rule = kind if isinstance(kind, str) else in_words(kind)
            raise ValueError(
                f"`{name}` must be {rule}, got {given.get(name)!r}; the default is {fields[name].default!r}."
            ) from None
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from None
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"{config_class.__name__} must be given fields of the kinds that its docstring names, got what transformers "
                f"refuses: {error}."
            ) from error

    @functools.wraps(make)
    def init(self: Config, *args: Any, **kwargs: Any) -> None:
        plainly(make, self, *args, given={**dict(zip(fields, args, strict=False)), **kwargs}, **kwargs)

    @functools.wraps(assign)
    def setattr_(self: Config, name: str, value: Any) -> None:
        plainly(assign, self, name, value, given={name: value})

    config_class.__init__, config_class.__setattr__ = init, setattr_  # type: ignore[method-assign, assignment]
    return config_class


@with_plain_errors
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
        memory_layers: backbone layers whose keys and values are stored; side layer `layer // R` reads them. Multiples of
            R, or with `residual="paper"` any that have readers of their own. The paper stores one (the 18th of 24).
            Default: all multiples of R from 8/15 to 4/5 of the stack.
        memory_heads: for each memory layer, in their order, the key-value heads that are stored, searched and read; None: all.
            Few heads of a model look back far, and bytes and search time fall with their number
            (`longmem.calibrate_heads` finds them).
        chunk_size: tokens of a chunk, the unit of retrieval (paper: 4).
        start_token_ids: what the backbone has met before every text, such as the id of `<bos>`; None: nothing. They stand
            before each window that is encoded, trained on or scored, and are not stored. `from_backbone` takes those that the
            tokenizer puts before a text.
        forget_sinks: store the first token of each encoded window with a key of zero, and so tokens directly behind it whose
            keys are like its own. Language models park attention on these tokens, so nearly every query would find
            them, in every window of a long memory, and they say nothing.
        start_reads: whether a token that sees no other, the first of a text, reads memory too. Attention is parked on it: an
            untrained network that lets it read spoils it, and with it all that follows (`docs/experiments.md`). A trained
            one has learned to.
        search: what a query is compared with to find chunks: their mean keys (`"chunk_mean"`, the paper's form) or the key of
            each token (`"token"`), the best of which finds its chunk. A mean of keys hardly finds a single token; tokens take
            `chunk_size` times the search.
        choice_per: whether each query `"head"` chooses chunks for itself (the paper's form), or the query heads of a key-value
            head as a `"group"`, by their mean query, which takes as many searches as there are key-value heads. It changes
            what is read, not what is stored.
        num_retrieved_tokens: K, tokens read by every query and head, a multiple of `chunk_size`. The paper reads 64; the
            default is 32, which halves the cost of reading and keeps most of the gain (`docs/experiments.md`).
        num_neighbours: how many of the tokens in memory that are most like the present one predict beside the networks, by what
            came after them, the more the nearer they are (kNN-LM; `longmem/model/neighbours.py`). It helps most where
            memory holds many examples of one form, such as labelled texts. It searches as often again, and the backbone runs up
            to the last memory layer. 0: none do; 64 is what was measured. In training none do.
        segment_length: tokens of one window of text, in encoding and in training (paper: 1,024). The default is that or,
            with a warning, the window of a backbone that has less.
        memory_distance: tokens between a query and what it retrieved, for rotary models, whose stored keys have no
            position of their own. 0 is harmful, and so is far beyond the text it was tuned on (`docs/experiments.md`). In a
            layer with a sliding window it is at most what that window reaches.
        distance_per: whether that is the distance of the whole `"model"`, or each query `"head"` learns one of its own, from
            `memory_distance` on. Heads that look for facts want what they find to be near, others far: near, it disturbs what
            they do with the text at hand. Layers without rotation learn none.
        residual: `"substitute"` (side layers replace the layers they copy) or `"paper"` (section 2.2 of the paper).
        residual_states: whether the backbone's last hidden state is taken before (`"pre_norm"`, as in the paper's
            equation) or after (`"post_norm"`, as in the released code) its final norm.
        fusion: `"joint"` (one softmax over local and retrieved tokens) or `"gated"` (two, mixed per head: the paper).
        init: `"backbone"` copies layers; `"identity"`, for `residual="paper"`, also scales what every layer adds by a
            learned vector that starts at zero, so that training starts from the backbone's own function.
        side_layer_offset: side layer i copies backbone layer `R * i` plus this; the released code has 1. This field and
            the next three belong to `residual="paper"`.
        num_side_layers: side layers, None for L / R. Where it is given, R need not divide L.
        final_norm: what stands between the last side layer and the LM head: the `"backbone"`'s own, or a copy that the
            `"side"` network trains, as in the released code.
        side_layer_options: fields of the backbone's configuration that the side network has differently (activation,
            epsilon, inner size); weights of another shape than the backbone's start as new ones do.
        side_network_dtype: dtype of the side network's weights and of its computation, "float32", "bfloat16" or
            "float16"; None for the backbone's. Train a half-precision backbone's side network in float32.
        memory_bias_init: start of the learned bias per head: added to retrieved scores (joint, default -1), or the
            gate before its sigmoid (gated, default 0 as in the paper).
        memory_null_init: start of a learned score per head of a null slot: what was found counts by the share that it has
            beside this score, so that weak finds count for little; None: no null slot. Only with joint fusion.
        lora: None to train every weight of the side network; or settings of LoRA (`longmem.model.lora`), as a `peft.LoraConfig`
            or such as `{"rank": 32}`. Copied weights are frozen, and trained are `rank`-wide adapters of the linear layers
            named by `target_modules` (default: all), scaled by `alpha / rank` (default 2), with `dropout` (default 0), beside
            memory biases and output scales. Norms stay frozen: they are few and act on all that passes, memory or not.
    """

    model_type: ClassVar[str] = "longmem"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *("past_key_values", "cache", "memory_keys", "memory_values", "memory_reads", "memory_neighbours")
    ]

    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    backbone_config: Any = None
    layer_reduction_factor: int = 1
    memory_layers: list[int] | None = None
    memory_heads: list[list[int]] | None = None
    chunk_size: int = 4
    start_token_ids: list[int] | None = None
    forget_sinks: bool = False
    start_reads: bool = True
    search: Literal["chunk_mean", "token"] = "chunk_mean"
    choice_per: Literal["head", "group"] = "head"
    num_retrieved_tokens: int = 32
    num_neighbours: int = 0
    segment_length: int = DEFAULT_SEGMENT_LENGTH
    memory_distance: int = 64
    distance_per: Literal["model", "head"] = "model"
    residual: Literal["substitute", "paper"] = "substitute"
    residual_states: Literal["pre_norm", "post_norm"] = "pre_norm"
    fusion: Literal["joint", "gated"] = "joint"
    init: Literal["backbone", "identity"] = "backbone"
    side_layer_offset: int = 0
    num_side_layers: int | None = None
    final_norm: Literal["backbone", "side"] = "backbone"
    side_layer_options: dict[str, Any] | None = None
    side_network_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    memory_bias_init: float | int | None = None
    memory_null_init: float | int | None = None
    lora: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_fields(type(self), kwargs)
        if isinstance(self.backbone_config, dict):
            fields = dict(self.backbone_config)
            if "model_type" not in fields:
                raise ValueError(
                    f"`backbone_config` must say its `model_type`, got the fields {list(fields)}; `config.to_dict()` of a "
                    "causal LM has it."
                )
            try:
                self.backbone_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
            except ValueError as error:
                known = did_you_mean(str(self.backbone_config["model_type"]), CONFIG_MAPPING)
                raise ValueError(
                    "`backbone_config` must be one that transformers knows, got model_type "
                    f"{self.backbone_config['model_type']!r};"
                    f"{known} it says: {str(error)[:80]}"
                ) from error
        elif self.backbone_config is not None and not isinstance(self.backbone_config, PreTrainedConfig):
            raise ValueError(
                "`backbone_config` must be the configuration of a causal LM, or its fields, got "
                f"{self.backbone_config!r}; `model.config` is one."
            )
        elif self.backbone_config is not None:
            self.backbone_config = copy.deepcopy(self.backbone_config)
        if isinstance(self.segment_length, _Default):
            self.segment_length = self._default_segment_length()
        if self.memory_layers is None and self.backbone_config is not None and self.layer_reduction_factor > 0:
            depth = min(self.num_backbone_layers, self.layer_reduction_factor * self.side_layers.stop)
            self.memory_layers = default_memory_layers(self.get_text_config(), self.layer_reduction_factor, depth)
        if self.memory_bias_init is None:
            self.memory_bias_init = DEFAULT_BIAS.get(self.fusion, 0.0)
        if self.lora is not None:
            self.lora = complete_lora_settings(self.lora)
        super().__post_init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return what is not the side network's to say, but the backbone's (`OF_BACKBONE`)."""
        if name in OF_BACKBONE and self.__dict__.get("backbone_config") is not None:
            # A RuntimeError: it differs from layer to layer, and transformers has no one answer.
            with contextlib.suppress(RuntimeError):
                return getattr(self.get_text_config(), name)
        raise AttributeError(f"`{type(self).__name__}` has no field `{name}`.", name=name, obj=self)

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
        """The side layers that are built; side layer i is a copy of backbone layer `source_layer(i)`."""
        last = self.num_side_layers or self.num_backbone_layers // self.layer_reduction_factor
        return range(self.first_side_layer, last)

    def source_layer(self, number: int) -> int:
        """Return the backbone layer that a side layer copies, and as which it is called."""
        return self.layer_reduction_factor * number + self.side_layer_offset

    def memory_layer_of(self, number: int) -> int | None:
        """Return the memory layer that a side layer reads, None if it reads none."""
        read = (layer for layer in self.memory_layers or () if layer // self.layer_reduction_factor == number)
        return next(read, None)

    def heads_of(self, memory_layer: int) -> list[int] | None:
        """Return the key-value heads of a memory layer that are stored and read, None for all."""
        if self.memory_heads is None or self.memory_layers is None:
            return None
        return self.memory_heads[self.memory_layers.index(memory_layer)]

    def _default_segment_length(self) -> int:
        window = (
            None if self.backbone_config is None else getattr(self.get_text_config(), "max_position_embeddings", None)
        )
        room = window if isinstance(window, int) else 0
        if room and self.start_token_ids:  # whole chunks, as a usual window has them
            room -= len(self.start_token_ids)
            room -= room % self.chunk_size
        if not 0 < room < DEFAULT_SEGMENT_LENGTH:
            return int(DEFAULT_SEGMENT_LENGTH)
        warnings.warn(
            f"`segment_length` is {room}, the window of this backbone, and not the usual {DEFAULT_SEGMENT_LENGTH}.",
            stacklevel=5,
        )
        return room

    def missing_start(self, ids: Sequence[int]) -> list[int]:
        """Return what has to stand before the token ids of a text: the start tokens, or nothing where they do already.

        >>> config = LongMemConfig(start_token_ids=[2])
        >>> config.missing_start([7, 8]), config.missing_start([2, 7, 8])
        ([2], [])
        """
        start = self.start_token_ids or []
        return [] if list(ids[: len(start)]) == start else [*start]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the backbone's text configuration: `generate` sizes its cache from it."""
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration that a file holds, with fields of `kwargs` in place of its own.

        Unlike the constructor it takes what it does not understand, as notes of others and fields of later versions: these
        are left out, with one warning. That of another model is the backbone's, for a new side network on it.
        """
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            config_dict = {"backbone_config": config_dict}
        names = {each.name for each in dataclasses.fields(cls)}
        given = {**config_dict, **{name: kwargs.pop(name) for name in (names - {"dtype"}) & kwargs.keys()}}
        asked = {name: kwargs.pop(name) for name in NOTED_BY_OTHERS if name in kwargs}
        if fixed := [name for name in OF_BACKBONE if name in kwargs]:
            raise ValueError(f"`{fixed[0]}` must be the backbone's own, got {kwargs[fixed[0]]!r}; leave it out.")
        noted = {name: given.pop(name) for name in NOTED_BY_OTHERS if name in given} | asked
        if unknown := sorted(given.keys() - names - INHERITED_KEYS):
            warnings.warn(
                f"a configuration of {cls.__name__} holds what this version does not understand and leaves out: "
                f"{', '.join(unknown)}.",
                stacklevel=2,
            )
        found = super().from_dict({name: value for name, value in given.items() if name not in unknown}, **kwargs)
        config, unused = found if isinstance(found, tuple) else (found, None)
        for name, value in noted.items():
            setattr(config, name, value)
        return config if unused is None else (config, unused | asked)  # a model's own `generate` takes them too

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: a saved folder needs no copy of this module."""

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
        if not 0 <= self.num_neighbours <= MOST_NEIGHBOURS:
            raise ValueError(
                f"`num_neighbours` must be from 0, for none, to {MOST_NEIGHBOURS}, got {self.num_neighbours}; 64 is usual."
            )
        if self.memory_distance < 0:
            raise ValueError(
                f"`memory_distance` must be 0 or more tokens, got {self.memory_distance}; 64 is the default."
            )
        if self.memory_distance < 1 and self.distance_per == "head":
            raise ValueError(
                f'`memory_distance` must be 1 or more tokens with `distance_per="head"`, got {self.memory_distance}: heads '
                "learn the logarithm of their distance; 64 is the default."
            )
        for name in ("memory_bias_init", "memory_null_init"):
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value}; leave it out for the default.")
        if any(layer < 0 for layer in self.memory_layers or ()):
            raise ValueError(
                f"`memory_layers` must be layers counted from 0, got {self.memory_layers}; leave out the others."
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
                '`residual_states="post_norm"` must come with `residual="paper"`, got residual="substitute", where it would '
                'put a normed state among raw ones; use `residual_states="pre_norm"`.'
            )
        for name, usual in (("side_layer_offset", 0), ("num_side_layers", None), ("final_norm", "backbone")):
            self._refuse_beside_substitute(name, getattr(self, name) == usual, usual)
        self._refuse_beside_substitute("side_layer_options", not self.side_layer_options, None)
        if self.init == "identity" and self.residual != "paper":
            raise ValueError(
                '`init="identity"` must come with `residual="paper"`, got residual="substitute", which starts as the '
                'backbone by itself; use `init="backbone"`.'
            )
        if self.memory_null_init is not None and self.fusion != "joint":
            raise ValueError(
                f'`memory_null_init` must come with `fusion="joint"`, got {self.memory_null_init} with fusion="{self.fusion}", '
                "whose share of memory does not depend on scores; leave it at None."
            )
        if self.lora is not None and self.side_layer_options:
            raise ValueError(
                "`lora` trains beside copies of the backbone's weights and saves none of them, got `side_layer_options` "
                f"{self.side_layer_options}, under which weights may be new; leave one of the two out."
            )

    def validate_layers(self) -> None:
        """Check what depends on the backbone's depth and window, once the backbone is known."""
        if self.backbone_config is None or self.layer_reduction_factor < 1:  # which another rule refuses
            return
        num_layers, factor = self.num_backbone_layers, self.layer_reduction_factor
        if num_layers % factor and self.num_side_layers is None:
            divisors = [str(n) for n in range(1, num_layers + 1) if num_layers % n == 0]
            raise ValueError(
                f"`layer_reduction_factor` must divide the backbone's {num_layers} layers, got {factor}; "
                f"one of {', '.join(divisors)} does."
            )
        if self.residual == "paper":
            self._validate_side_layers(num_layers, factor)
        layers = self.memory_layers or []
        any_depth = self.residual == "paper"
        readers = [layer // factor for layer in layers]
        if (
            any(layer not in range(0, num_layers, 1 if any_depth else factor) for layer in layers)
            or any(reader not in self.side_layers for reader in readers)
            or not layers
            or sorted(set(readers if any_depth else layers)) != list(readers if any_depth else layers)
        ):
            rule = (
                "layers with readers of their own" if any_depth else f"multiples of `layer_reduction_factor` ({factor})"
            )
            depth = min(num_layers, factor * self.side_layers.stop) if any_depth else num_layers
            raise ValueError(
                f"`memory_layers` must be ascending, different {rule} below the backbone's {num_layers} layers, got "
                f"{layers}; side layer m // {factor} of {self.side_layers.stop} reads layer m; "
                f"the default would be {default_memory_layers(self.get_text_config(), factor, depth)}."
            )
        self._validate_memory_heads(layers)
        self._validate_side_layer_options()
        width = self.get_text_config().hidden_size
        if self.lora is not None and self.lora["rank"] > width:
            raise ValueError(
                f"`rank` of `lora` must be at most {width}, the backbone's hidden size, got {self.lora['rank']}; a product of "
                "that width can already be any change of a weight."
            )
        window, start = getattr(self.get_text_config(), "max_position_embeddings", None), self.start_token_ids or ()
        if window and self.segment_length + len(start) > window:
            behind = f" behind {len(start)} `start_token_ids`" if start else ""
            raise ValueError(
                f"`segment_length` must fit the backbone's window of {window} tokens "
                f"(`max_position_embeddings`){behind}, got {self.segment_length}."
            )
        vocabulary = getattr(self.get_text_config(), "vocab_size", None)
        if any(token not in range(vocabulary or token + 1) for token in start):
            raise ValueError(
                f"`start_token_ids` must be ids of the backbone's vocabulary, 0 to {(vocabulary or 1) - 1}, got "
                f"{self.start_token_ids}; None for none."
            )

    def _validate_memory_heads(self, layers: list[int]) -> None:
        if self.memory_heads is None:
            return
        text = self.get_text_config()
        count = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
        are_heads = len(self.memory_heads) == len(layers) and all(
            own and list(own) == sorted(set(own)) and own[0] >= 0 and (count is None or own[-1] < count)
            for own in self.memory_heads
        )
        if not are_heads:
            raise ValueError(
                f"`memory_heads` must have a list for each of the {len(layers)} `memory_layers`, of ascending, different "
                f"key-value heads from 0 to {'the last' if count is None else count - 1}, none of them empty, got "
                f"{self.memory_heads}; leave a layer without heads out of `memory_layers`."
            )

    def _refuse_beside_substitute(self, name: str, is_usual: bool, usual: Any) -> None:
        if self.residual != "paper" and not is_usual:
            raise ValueError(
                f'`{name}` must come with `residual="paper"`, got {getattr(self, name)!r} with residual="{self.residual}", '
                f"whose side layers stand in for the layers they copy; leave it at {usual!r}."
            )

    def _validate_side_layers(self, num_layers: int, factor: int) -> None:
        count = self.num_side_layers
        if count is not None and count not in range(1, num_layers // factor + 1):
            raise ValueError(
                f"`num_side_layers` must be from 1 to {num_layers // factor} (a backbone of {num_layers} layers, "
                f"`layer_reduction_factor` {factor}), got {count}."
            )
        room = num_layers - 1 - factor * (self.side_layers.stop - 1)
        if self.side_layer_offset not in range(room + 1):
            raise ValueError(
                f"`side_layer_offset` must be from 0 to {room}, so that the last side layer has a layer to copy, "
                f"got {self.side_layer_offset}."
            )

    def _validate_side_layer_options(self) -> None:
        known = list(self.get_text_config().to_dict())
        for name in self.side_layer_options or {}:
            if name not in known:
                raise ValueError(
                    f"`side_layer_options` must name fields of {type(self.get_text_config()).__name__}, got `{name}`."
                    f"{did_you_mean(name, known)}"
                )
            if name in SHARED_WITH_BACKBONE:
                raise ValueError(
                    f"`side_layer_options` can't change `{name}`, got {self.side_layer_options}: hidden states, keys and "
                    "values are the backbone's; leave it out."
                )


def default_memory_layers(backbone_config: PreTrainedConfig, factor: int, depth: int) -> list[int]:
    """Return the multiples of `factor` from 8/15 to 4/5 of `depth` layers, at least one: layers 16 to 23 of 30.

    Measured on SmolLM2-135M: reading below the middle harms an untrained side network, and reading in the last fifth
    costs more than it gains (`docs/experiments.md`). Layers of hybrid models that do not attend are passed over.
    """
    layer_types = getattr(backbone_config, "layer_types", None) or ["full_attention"] * depth
    start, end = depth * 8 // 15, depth * 4 // 5
    candidates = [layer for layer in range(0, depth, factor) if layer_types[layer] not in WITHOUT_ATTENTION]
    chosen = [layer for layer in candidates if start <= layer < end]
    return chosen or sorted(candidates, key=lambda layer: abs(layer - depth // 2))[:1] or [0]


def refuse_unknown_fields(config_class: type, given: dict[str, Any]) -> None:
    """Raise ValueError for the first key of `given` that no field takes, with the closest field's name."""
    known = [field.name for field in dataclasses.fields(config_class)]
    for key in given:
        if key not in INHERITED_KEYS and key not in known:
            raise ValueError(
                f"`{key}` is not a field of {config_class.__name__}.{did_you_mean(key, known)} "
                "Fields are listed in its docstring."
            )


def lora_settings_of(config: Any) -> dict[str, Any]:
    """Return the settings that a `peft.LoraConfig` stands for.

    Raises:
        ValueError: it asks for more than the adapters of a side network can do.
    """
    given, usual = config.to_dict(), type(config)().to_dict()
    names = {"r": "rank", "lora_alpha": "alpha", "target_modules": "target_modules", "lora_dropout": "dropout"}
    without_effect = {*names, "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
    for name in given.keys() - without_effect:
        if given[name] != usual.get(name):
            raise ValueError(
                f"`{name}` of the LoraConfig in `lora` can't be had in a side network that is saved with its adapters, got "
                f"{given[name]!r}; leave it out, or make the model without `lora` and use `peft.get_peft_model(model, config)`."
            )
    settings = {ours: given[theirs] for theirs, ours in names.items() if given[theirs] is not None}
    if not isinstance(targets := settings.get("target_modules", ALL_LINEAR), str):
        settings["target_modules"] = sorted(targets)
    return settings


def complete_lora_settings(given: Any) -> dict[str, Any]:
    """Return LoRA settings with every key that was left out at its default, as a new dictionary.

    `given` is a dictionary with these keys, or a `peft.LoraConfig`.

    `rank`: width of the trained products. `alpha`: their weight is `alpha / rank`; default `2 * rank`. `target_modules`:
    endings of the names of linear layers, such as `["q_proj", "mlp.up_proj"]`; default `"all-linear"`. `dropout`: share of
    what enters A that is left out in training; default 0.

    Raises:
        ValueError: a key is unknown, `rank` is missing, or a value breaks its rule.

    >>> complete_lora_settings({"rank": 8})
    {'rank': 8, 'alpha': 16.0, 'target_modules': 'all-linear', 'dropout': 0.0}
    """
    if hasattr(given, "lora_alpha"):
        given = lora_settings_of(given)
    if not isinstance(given, dict):
        raise ValueError(
            f'`lora` must be a dict of settings or a peft.LoraConfig, got {given!r}; `lora={{"rank": 32}}` is usual.'
        )
    for key in given:
        if key not in LORA_KEYS:
            raise ValueError(
                f"`lora` has the keys {', '.join(LORA_KEYS)}, got `{key}`.{did_you_mean(str(key), LORA_KEYS)}"
            )
    rank = given.get("rank")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(
            f'`lora` needs a `rank` of 1 or more, an integer, got {rank!r}; `lora={{"rank": 32}}` is usual.'
        )
    alpha = given.get("alpha", 2 * rank)
    if not is_number(alpha) or not 0 < alpha < math.inf:
        raise ValueError(f"`alpha` of `lora` must be a number above 0, got {alpha!r}; leave it out for {2 * rank}.")
    dropout = given.get("dropout", 0.0)
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"`dropout` of `lora` must be from 0 to below 1, got {dropout!r}; leave it out for none.")
    targets = given.get("target_modules", ALL_LINEAR)
    are_names = (
        isinstance(targets, list | tuple) and targets and all(isinstance(name, str) and name for name in targets)
    )
    if targets != ALL_LINEAR and not are_names:
        raise ValueError(
            f"`target_modules` of `lora` must be a list of module-name endings, at least one, or {ALL_LINEAR!r}, "
            f"got {targets!r}; leave it out for every linear layer."
        )
    chosen = ALL_LINEAR if targets == ALL_LINEAR else list(targets)
    return {"rank": rank, "alpha": float(alpha), "target_modules": chosen, "dropout": float(dropout)}


def is_number(value: Any) -> bool:
    """Return whether the value is an int or a float, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)
