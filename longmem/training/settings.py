"""The settings of a training run, section by section, their YAML files, and the checks at the door.

Each field is documented below it. "Paper" is LongMem, section 3 (arXiv 2306.07174). Counts are tokens, lanes or optimizer
steps, as their names say; times are minutes. Relative paths are taken from the current directory, not from the folder of the
YAML file.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Annotated, Any, Literal, TypeVar

from transformers import PreTrainedConfig

from longmem.configuration import LongMemConfig
from longmem.errors import did_you_mean
from longmem.memory.index.kinds import validate_index
from longmem.settings import Above, Below, From, UpTo, read_section, read_settings
from longmem.settings.nested import leaves

# Of `LongMemConfig`, these are the backbone's: `model.backbone` names it.
NOT_FOR_CONFIG = ("backbone_name_or_path", "backbone_config")
# Settings that a run which goes on may get anew: they change nothing of what it computes.
MAY_CHANGE = (
    *("output", "logging.", "checkpoints.", "validation."),
    *("features.ahead", "features.max_gigabytes", "optimization.max_minutes"),
)

Settings = TypeVar("Settings", bound="TrainingSettings")
Count = Annotated[int, From(1)]
Number = Annotated[int, From(0)]  # 0 switches something off
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The frozen backbone and the side network that is trained beside it."""

    backbone: str = "smollm2-135m"
    """Name of a model (`longmem.model.names`). A side network that was saved is trained on; else the backbone gets a new one,
    also the packaged backbone of the default, which needs no download."""

    backbone_dtype: Dtype = "float32"
    """Dtype of the backbone's weights. float32 is right on a CPU; bfloat16 halves a GPU's memory, and the side network
    then stays trainable with `config.side_network_dtype: float32`."""

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `LongMemConfig` for a new side network, such as `chunk_size`; none for a saved model, which has its own."""


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The texts, and how they are laid out in lanes: rows of a batch that each read documents from start to end."""

    train: str
    """What to train on: `python-manual`, a .txt or .jsonl file, a folder of them, a saved dataset or a name on the Hub."""

    validation: str | None = None
    """What to validate on, named like `train`; None: no validation."""

    text_column: str = "text"
    """Column that holds the text, where there are columns."""

    max_train_tokens: Count | None = None
    """Take so many tokens of `train` at most; None: all."""

    max_validation_tokens: Count | None = None
    """Take so many tokens of `validation` at most; None: all."""

    num_documents: Count | None = None
    """Take so many documents at most, which bounds a dataset that is streamed; None: all."""

    document_tokens: Count | None = None
    """Read so many tokens of a document at most, from its start, so that a short run sees many documents; None: all."""

    recall_share: Annotated[float, From(0), Below(1)] = 0.0
    """Hide facts in the training texts, and let about this share of them be questions about these, further on: what teaches a
    side network to find (`longmem/data/recall.py`). 0: the texts as they are."""

    window: Annotated[int, From(2)] = 1024
    """Tokens of a segment: what a lane reads in one forward pass, beside its memory (paper: 1,024)."""

    lanes: Count = 4
    """Rows of a batch, over all processes together, so that the number of processes changes no result (except with
    `memory.foreign_lanes`, which are lanes of the same process). The default fits a laptop."""

    lanes_per_document: Count = 1
    """Lanes that a document is divided among; each reads one stretch of it. More than 1 when there are fewer documents
    than lanes. `lanes` must be a multiple of it."""

    shuffle: bool = True
    """Draw the order of documents anew in every epoch, from `seed`. The text inside a document always keeps its order."""

    at_document_border: Literal["reset", "keep"] = "reset"
    """Whether a lane's memory is emptied when its next document begins. `reset` never lets a document read another, and
    so teaches nothing about memories that do not fit; `keep` leaves older documents in it as distractors."""

    cache: str | None = None
    """Folder of tokenised texts; None: the package's cache (`LONGMEM_CACHE`)."""


@dataclasses.dataclass(frozen=True)
class MemorySettings:
    """What a lane can read beside its window."""

    enabled: bool = True
    """False trains the baseline of equal compute: the same side network on the same tokens, which never reads."""

    tokens: Count = 65_536
    """Capacity of a lane's memory, a multiple of the chunk size; the oldest tokens leave (paper: 65,536)."""

    start_tokens: Count | None = None
    """Capacity at the first step of a curriculum; None: `tokens` from the start, as in the paper."""

    growth_steps: Number = 0
    """Optimizer steps over which the capacity doubles, at even distances, from `start_tokens` to `tokens`."""

    foreign_lanes: Number = 0
    """Other lanes whose memories a lane reads as well. Their texts do not fit its own and teach it to tell them apart
    (the crossbatch of Focused Transformer, arXiv 2307.03170). The paper shares one memory among all lanes of a GPU.
    They are lanes of the same process, so here alone the number of processes changes what is read."""

    index: str = "flat"
    """Kind of search index, with settings if any, as in `ivf:probed_share=0.06`. `flat` is exact and, in memories of
    this size, fast."""


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Which tokens count for more than one in the next-token loss."""

    long_context_weight: Annotated[float, From(0)] = 0.0
    """Extra weight of tokens that the frozen backbone predicts better with a longer context than the window: those
    that memory can help. 0, as in the paper: all tokens count the same, and the longer context is not computed."""

    long_context_tokens: Annotated[int, From(2)] = 2048
    """Tokens of that longer context, more than `data.window` and at most what the backbone was made for."""


@dataclasses.dataclass(frozen=True)
class OptimizationSettings:
    """AdamW, its schedule, and how the gradient is computed."""

    steps: Count | None = None
    """Optimizer steps of the run. Exactly one of `steps` and `epochs` must be given."""

    epochs: Annotated[float, Above(0)] | None = None
    """Passes over the training tokens, which may be a fraction of one."""

    learning_rate: Annotated[float, Above(0)] = 2e-4
    """Highest learning rate, reached after the warm-up (paper: 2e-4)."""

    gate_learning_rate: Annotated[float, Above(0)] | None = None
    """The same for memory biases, gates and output scales, single numbers that move too little at the rate of matrices;
    None: `learning_rate`."""

    weight_decay: Annotated[float, From(0)] = 0.01
    """Decay of weight matrices (paper: 0.01)."""

    beta1: Annotated[float, From(0), Below(1)] = 0.9
    """Decay of the mean gradient (paper: 0.9)."""

    beta2: Annotated[float, From(0), Below(1)] = 0.98
    """Decay of the mean squared gradient (paper: 0.98)."""

    epsilon: Annotated[float, Above(0)] = 1e-8
    """What is added to the root of the mean squared gradient (torch's default)."""

    warmup_steps: Number = 100
    """Steps over which the learning rate grows linearly, before the highest one; fewer than the run has."""

    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls after the warm-up, to just above 0 at the last step, or stays (paper: linear)."""

    clip_norm: Annotated[float, Above(0)] = 1.0
    """Largest norm of the gradient; a longer one is scaled down."""

    gradient_accumulation: Count = 1
    """Batches of one window per lane whose gradients make one optimizer step."""

    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of matrix products during training, of accelerate. fp16 needs a GPU."""

    gradient_checkpointing: bool = False
    """Recompute side layers in the backward pass instead of keeping what they computed: less memory, more time."""

    trained: Literal["all", "reading_attention", "gates"] = "all"
    """What moves: the whole side network, as in the paper; only attention and memory bias of the layers that read; or only
    gates, a few numbers per head: memory biases, null slots and output scales.
    With LoRA, `all` is all that LoRA leaves trainable."""

    max_minutes: Annotated[float, Above(0)] | None = None
    """Begin no step after so many minutes; None: run to the end."""


@dataclasses.dataclass(frozen=True)
class ExchangeSettings:
    """What processes send each other while they train; one process alone computes the same whatever is set here."""

    every_steps: Number = 0
    """0: gradients are averaged in every step, and the number of processes changes no result. More: each process takes so
    many optimizer steps on its own lanes, with the mean loss and the clipping of its own gradient, then side network and
    what AdamW remembers are averaged (local SGD, arXiv 1805.09767), also after the last step. In between, only the numbers of
    the log are sent. A run stops, validates and writes checkpoints at averages alone. For slow connections; 1 is no
    substitute for 0: the mean of AdamW's steps is not AdamW's step with the mean gradient."""


@dataclasses.dataclass(frozen=True)
class FeatureSettings:
    """What the frozen backbone computes for a window, which is the same in every epoch: kept in a cache, or made ahead."""

    folder: str | None = None
    """Folder of the cache; None: compute each time."""

    dtype: Dtype = "float16"
    """Dtype in the cache. float16 has half the size of float32 and eight times finer steps than bfloat16; bfloat16 is for
    backbones whose hidden states go beyond 65,504."""

    max_gigabytes: Annotated[float, Above(0)] | None = None
    """Write nothing more when the cache is so large (10^9 bytes); None: no limit."""

    ahead: Number = 0
    """Batches that a thread computes, or reads from the cache, before the training step that needs them; results are the
    same to the last bit. Each takes the memory of its hidden states, keys and values. 0: in the training step itself. It
    pays where side network and backbone leave each other something of the machine: cores, a disk, or a second device."""


@dataclasses.dataclass(frozen=True)
class ValidationSettings:
    """Loss of backbone, memory off, memory on and wrong memory on the same tokens of `data.validation`."""

    every_steps: Number = 0
    """Optimizer steps from one validation to the next; 0: only after the last."""

    documents: Count = 4
    """Documents that are scored; each one's wrong memory comes from another."""

    memory_tokens: Count = 8192
    """Tokens of a document that are written to memory before its first window is scored."""

    windows: Count = 4
    """Windows of `data.window` tokens that are scored in each document."""


@dataclasses.dataclass(frozen=True)
class LoggingSettings:
    """What is written down while the run goes on."""

    every_steps: Count = 1
    """Optimizer steps from one line of `log.jsonl` to the next."""

    tensorboard: bool = False
    """Write the same numbers for TensorBoard, into `tensorboard/` of the run's folder; needs the extra `train`."""


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """What a run that was stopped can go on from."""

    every_steps: Number = 0
    """Optimizer steps from one checkpoint to the next; 0: only after the last."""

    keep: Count = 2
    """Newest checkpoints that are kept; older ones are deleted."""


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """All settings of a training run. Check those that you make in Python with `validate_settings`.

    A subclass may add sections, for an extension of the run.
    """

    output: str
    """Folder of the run: settings, log, checkpoints and, at the end, the trained model."""

    data: DataSettings
    optimization: OptimizationSettings
    seed: Annotated[int, From(0), UpTo(2**32 - 1)] = 0
    """Of everything that is drawn: new weights, the order of documents."""

    model: ModelSettings = ModelSettings()
    memory: MemorySettings = MemorySettings()
    loss: LossSettings = LossSettings()
    exchange: ExchangeSettings = ExchangeSettings()
    features: FeatureSettings = FeatureSettings()
    validation: ValidationSettings = ValidationSettings()
    logging: LoggingSettings = LoggingSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()


def load_settings(
    path: str | PathLike[str],
    overrides: Sequence[str] = (),
    kind: type[Settings] = TrainingSettings,  # type: ignore[assignment]
) -> Settings:
    """Return the settings in a YAML file, changed by overrides and checked; see `longmem.settings.read_settings`.

    An override may also set a field of `LongMemConfig`, as in `model.config.chunk_size=8`. `kind`: the class of settings,
    which may have more sections.

    Raises ValueError if the file is missing or no YAML, or a setting is unknown, missing, of another type or out of range.
    """
    settings = read_settings(kind, path, overrides, free={"model.config": config_fields()})
    validate_settings(settings)
    return settings


def refuse_changed_settings(settings: TrainingSettings, path: str | PathLike[str]) -> None:
    """Raise ValueError if a run that is to go on would get other settings than it began with, naming them.

    What decides only how long a run lasts, what it writes down and where may change.
    """
    changes = []
    runs = (dataclasses.asdict(each) for each in (load_settings(path, kind=type(settings)), settings))
    before, now = ({name: value for name, value in leaves(run) if value != {}} for run in runs)
    for name in sorted(before.keys() | now.keys()):
        free = name.startswith(MAY_CHANGE)
        if not free and before.get(name) != now.get(name):
            changes.append(f"`{name}` was {before.get(name)!r} and is {now.get(name)!r}")
    if changes:
        raise ValueError(
            f"a run with checkpoints goes on with the settings it began with, in {path}, but {', '.join(changes)}; "
            "take them back, or give another `output`."
        )


def validate_settings(settings: TrainingSettings) -> None:
    """Raise ValueError for the first value of another type or out of its range, and for values that contradict another.

    A setting that would be ignored is an error as well. What depends on the backbone is checked when it is loaded.
    """
    if not isinstance(settings, TrainingSettings):
        got = type(settings).__name__
        raise ValueError(f"`settings` must be TrainingSettings, got {got}; `load_settings` reads them from a file.")
    read_section(type(settings), dataclasses.asdict(settings))
    for contradiction in contradictions(settings):
        raise ValueError(contradiction)


def config_fields() -> list[str]:
    """Return the names that `model.config` may have: fields of `LongMemConfig` of its own."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)} | set(NOT_FOR_CONFIG)
    return [field.name for field in dataclasses.fields(LongMemConfig) if field.name not in inherited]


def contradictions(settings: TrainingSettings) -> Iterator[str]:
    """Yield, for each setting that contradicts another or would be ignored, what must be changed."""
    known = config_fields()
    for name in settings.model.config:
        if name in NOT_FOR_CONFIG:
            yield f"`model.config.{name}` must be left out: `model.backbone` names the backbone."
        elif name not in known:
            yield (
                f"`model.config.{name}` is not a field of LongMemConfig.{did_you_mean(str(name), known)} Fields are "
                "listed in its docstring."
            )
    data = settings.data
    if data.lanes % data.lanes_per_document:
        yield (
            f"`data.lanes` must be a multiple of `data.lanes_per_document`, got {data.lanes} and "
            f"{data.lanes_per_document}; {data.lanes_per_document * -(-data.lanes // data.lanes_per_document)} would do."
        )
    if data.validation is None:
        for name, value in (
            ("data.max_validation_tokens", data.max_validation_tokens),
            ("validation.every_steps", settings.validation.every_steps),
        ):
            if value:
                yield (
                    f"`{name}` needs `data.validation`, got {value} without a text to validate on; name one, or leave "
                    f"`{name}` out."
                )
    memory = settings.memory
    try:
        validate_index(memory.index)
    except ValueError as error:
        yield f"`memory.index`: {error}"
    if (memory.start_tokens is None) != (memory.growth_steps == 0):
        yield (
            "`memory.start_tokens` and `memory.growth_steps` must be given together, got "
            f"{memory.start_tokens} and {memory.growth_steps}; leave out both for {memory.tokens:,} tokens from the start."
        )
    if memory.start_tokens is not None and memory.start_tokens > memory.tokens:
        yield (
            f"`memory.start_tokens` must be at most `memory.tokens`, got {memory.start_tokens} and {memory.tokens}; a "
            "memory grows."
        )
    if memory.foreign_lanes >= data.lanes:
        yield (
            f"`memory.foreign_lanes` must be below `data.lanes`, got {memory.foreign_lanes} and {data.lanes}; a lane "
            f"has {data.lanes - 1} others."
        )
    if not memory.enabled and (memory.foreign_lanes or memory.growth_steps):
        yield (
            "`memory.foreign_lanes` and `memory.growth_steps` must be 0 where `memory.enabled` is false, got "
            f"{memory.foreign_lanes} and {memory.growth_steps}; nothing is read there."
        )
    loss, window = settings.loss, data.window
    if loss.long_context_weight and loss.long_context_tokens <= window:
        yield (
            f"`loss.long_context_tokens` must be more than `data.window`, got {loss.long_context_tokens} and {window}; "
            f"{2 * window} would do."
        )
    optimization = settings.optimization
    if (optimization.steps is None) == (optimization.epochs is None):
        yield (
            "Exactly one of `optimization.steps` and `optimization.epochs` must be given, got "
            f"{optimization.steps} and {optimization.epochs}; set the other to null."
        )
    if optimization.steps is not None and optimization.warmup_steps >= optimization.steps:
        yield (
            "`optimization.warmup_steps` must be below `optimization.steps`, so that the learning rate is reached, got "
            f"{optimization.warmup_steps} and {optimization.steps}; {optimization.steps // 10} would do."
        )
    if settings.features.max_gigabytes is not None and settings.features.folder is None:
        yield (
            f"`features.max_gigabytes` needs `features.folder`, got {settings.features.max_gigabytes} without a folder; "
            "name one, or leave it out."
        )
    every = settings.exchange.every_steps
    if not every:
        return
    if optimization.mixed_precision == "fp16":
        yield (
            f"`exchange.every_steps` must be 0 with `optimization.mixed_precision: fp16`, got {every}: each process would "
            "scale its losses, and skip steps, in its own way; bf16 needs no such scale."
        )
    for name, value in (
        ("checkpoints.every_steps", settings.checkpoints.every_steps),
        ("validation.every_steps", settings.validation.every_steps),
    ):
        if value % every:
            yield (
                f"`{name}` must be a multiple of `exchange.every_steps`, got {value} and {every}: in between, every process "
                f"has a side network of its own; {value + -value % every} would do."
            )
