"""The settings of a training run, section by section; each field is documented below it.

"Paper" is LongMem, section 3 (arXiv 2306.07174). Counts are tokens, lanes or optimizer steps, as their names say; times
are minutes. Relative paths are taken from the current directory, not from the folder of the YAML file.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from longmem.settings import Above, Below, From, UpTo

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
