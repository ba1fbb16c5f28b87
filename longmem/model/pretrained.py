"""What a LongMem model shares with every pretrained model of transformers: making, saving, loading, training modes."""

import contextlib
import copy
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import upload_folder
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from longmem import files
from longmem.backbone import Backbone, load_backbone, load_tokenizer
from longmem.backbone.loading import tokenizer_fingerprint
from longmem.backbone.structure import BackboneStructure, UnsupportedBackboneError, input_device
from longmem.configuration import LongMemConfig
from longmem.console import without_transformers_bars
from longmem.encoder.stamp import ALL_HEADS, SINKS_STORED, EncoderStamp, configuration_recipe
from longmem.encoder.watch import Encoder
from longmem.model import saving, side_state
from longmem.model.names import backbone_location, look_up
from longmem.model.side_network import SideNetwork

# How keys are freed of their positions, and which token a mean key is made of: raised when stored numbers change.
STORED_FORMAT = 1


class LongMemPreTrainedModel(PreTrainedModel):
    """A frozen backbone and its side network; `LongMemForCausalLM` says what they compute together.

    Args:
        config: the configuration; copied.
        backbone: the causal LM that the configuration describes.
        tokenizer: the backbone's tokenizer; opened by name on first use when left out.

    `encoder` watches over what the backbone writes. Set `backbone_was_trained` when you have changed the backbone's weights:
    its name no longer stands for them, so `save_pretrained` insists on `save_backbone=True` from then on.
    """

    config: LongMemConfig  # transformers reads the configuration class from this annotation
    base_model_prefix = "side_network"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(
        self, config: LongMemConfig, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        config = LongMemConfig.from_dict({**config.to_dict(), "backbone_config": backbone.config.to_dict()})
        super().__init__(config)
        self._backbone = Backbone(backbone)
        self.backbone = backbone
        refuse_unstorable_layers(config, self._backbone.structure)
        self.side_network = SideNetwork(config, self._backbone)
        self._tokenizer = tokenizer
        self.encoder = self._encoder_of(self._backbone)
        self.backbone_was_trained = False
        self.generation_config = GenerationConfig.from_dict(backbone.generation_config.to_dict())
        self.post_init()

    # Making and saving -------------------------------------------------------------------------------------------------

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PathLike[str] | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backbone_options: dict[str, Any] | None = None,
        **config_fields: Any,
    ) -> Self:
        """Return a model with a new side network on any Hugging Face causal LM.

        Args:
            backbone: name of a model (`longmem.model.names`), of which the backbone alone is opened, or a loaded causal LM.
            tokenizer: needed to pass text when `backbone` is a loaded model that has no name.
            backbone_options: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, ...).
            config_fields: fields of `LongMemConfig`.

        Raises:
            ValueError: a field is unknown or breaks a rule, or the architecture is not supported.
        """
        if isinstance(backbone, str | PathLike):
            named = look_up(backbone, config_fields.get("backbone_revision"))
            if named.backbone is None:
                raise ValueError(
                    f"`backbone` must be the name of a model whose backbone can be opened, but {named.name} does not name "
                    "its own (it was made from a model without a name); pass that model."
                )
            if named.origin == "saved":  # its revision is of the backbone's repository, not of the side network's
                config_fields["backbone_revision"] = named.backbone_revision
            config_fields["backbone_name_or_path"] = named.backbone
            revision = config_fields.get("backbone_revision")
            backbone = load_backbone(named.backbone, revision, **(backbone_options or {}))
        elif not isinstance(backbone, PreTrainedModel) or not backbone.can_generate():
            raise ValueError(
                "`backbone` must be a name, a folder or a causal LM of transformers (with a language-model head), "
                f"got {type(backbone).__name__}; try `AutoModelForCausalLM.from_pretrained(...)`."
            )
        else:
            config_fields.setdefault("backbone_name_or_path", backbone.config.name_or_path or None)
        return cls(LongMemConfig(backbone_config=backbone.config, **config_fields), backbone, tokenizer)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        backbone: PreTrainedModel | None = None,
        revision: str | None = None,
        backbone_options: dict[str, Any] | None = None,
        strict_backbone: bool = True,
        **options: Any,
    ) -> Self:
        """Return a saved model: its side network on its backbone, opened by the name in the configuration.

        Args:
            pretrained_model_name_or_path: name of a model that has a side network (`longmem.model.names`): a folder or hub
                name that `save_pretrained` wrote, or the packaged name "smollm2-135m".
            backbone: a loaded backbone to use instead of opening one by name.
            revision: hub revision of the saved side network.
            backbone_options: passed to `AutoModelForCausalLM.from_pretrained` (device_map, ...).
            strict_backbone: refuse a backbone of other weights, or of another rotary scaling, than the side network was saved
                beside; False warns instead. It looks at a sample of the numbers of large weights.
            options: `dtype` is passed on to the backbone; `config` replaces the saved one.

        Raises:
            ValueError: a weight is missing, left over, of another shape or not finite, a file is damaged, the backbone is
                another one, or the name has no side network.
            OSError: the name is of no folder, and the hub has no such repository or can't be reached.
        """
        folder = look_up(pretrained_model_name_or_path, revision).require_side_network()
        config = copy.deepcopy(options.pop("config", None)) or LongMemConfig.from_pretrained(folder)
        loading = {**(backbone_options or {})}
        if (dtype := options.pop("dtype", None)) is not None:
            loading["dtype"] = dtype
        saving.refuse_unknown_options(options)
        if backbone is None:
            if not config.backbone_name_or_path:
                raise ValueError(
                    f"{folder} does not name its backbone (it was made from a model without a name); "
                    "pass `backbone=` with that model."
                )
            config.backbone_name_or_path = backbone_location(folder, config.backbone_name_or_path)
            backbone = load_backbone(config.backbone_name_or_path, config.backbone_revision, **loading)
        saving.refuse_other_backbone(config, backbone)
        model = cls(config, backbone)
        stamp = saving.load_side_network(model.side_network, folder)
        saving.refuse_other_weights(stamp, backbone, strict=strict_backbone)
        if (folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        save_backbone: bool = False,
        **options: Any,
    ) -> None:
        """Write the side network (safetensors), the configuration and a model card; the backbone is named, not copied.

        All of it counts at once: a process that is killed meanwhile leaves the model before, or this one. Other files in the
        folder stay.

        With LoRA, the copied weights are the backbone's and not written: adapters, memory biases, output scales, and what
        else has `requires_grad`.

        Args:
            save_directory: folder to write to; made if missing.
            dtype: of the weights in the file, such as `torch.bfloat16` for half the room of float32; None leaves them as
                they are. The loaded network has the dtype of its configuration all the same.
            save_backbone: write the backbone too, with its tokenizer, into the folder `backbone` inside, and name that one. A
                backbone that was trained is nowhere else.
            options: `push_to_hub=True` uploads the folder (with `repo_id=`), as in transformers.

        Raises:
            OSError: there is no room, or no permission; what was saved there before is whole.
            ValueError: the path is a file, `dtype` is no floating-point dtype, an option is unknown, or the backbone was
                trained and would be lost.
        """
        if self.backbone_was_trained and not save_backbone:
            raise ValueError(
                "`save_backbone` must be True for a model whose backbone was trained and is no longer "
                f"{self.config.backbone_name_or_path}, got False; `save_pretrained(folder, save_backbone=True)` writes both."
            )
        dtype = saving.saved_dtype(dtype)
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"`save_directory` must be a folder, got the file {folder}.")
        push_to_hub, repo_id = options.pop("push_to_hub", False), options.pop("repo_id", folder.name)
        state = options.pop("state_dict", None) or self.state_dict()
        is_main_process, token = options.pop("is_main_process", True), options.pop("token", None)
        sharding = {"max_shard_size": options.pop("max_shard_size")} if "max_shard_size" in options else {}
        for habit in ("safe_serialization", "save_function"):  # of accelerate and the Trainer; it is always safetensors
            options.pop(habit, None)
        saving.refuse_unknown_options(options)
        if not is_main_process:
            return
        self.config.architectures = [type(self).__name__]
        num_trained = sum(weight.numel() for weight in self.side_network.trained_parameters().values())
        with files.new_contents(folder, saving.WEIGHTS) as draft:
            saving.write_weights(self.side_network, state, draft, dtype, **sharding)
            if save_backbone:
                self._write_backbone(draft / saving.BACKBONE_FOLDER)
            saving.write_description(self.config, num_trained, draft, with_backbone=save_backbone, place=folder)
            self.generation_config.save_pretrained(draft)
            saving.seal_weights(draft, self.backbone)
        if push_to_hub:
            upload_folder(repo_id=repo_id, folder_path=folder, token=token)

    def _write_backbone(self, folder: Path) -> None:
        """Write the backbone, and the tokenizer if there is one."""
        with without_transformers_bars():
            self.backbone.save_pretrained(folder)
        if self._tokenizer is not None or self.config.backbone_name_or_path:
            with contextlib.suppress(OSError):  # a backbone in a folder without a tokenizer is given token ids
                self.tokenizer.save_pretrained(folder)

    def side_state_dict(self) -> dict[str, torch.Tensor]:
        """Return copies of what `save_pretrained` writes, by the same names: the tensors that one site sends another.

        Side network alone (with LoRA what is trained), never a bank, never a tensor of the backbone. Names and shapes of two
        models agree if their backbones and configurations do, so federated averaging is the mean of their tensors, given to
        `load_side_state_dict` of each.

        Raises:
            ValueError: a tensor of the side network lies in memory of the backbone.
        """
        return side_state.side_state(self.side_network, self.backbone)

    def load_side_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put in the tensors of another model's `side_state_dict`, or of a mean of several; all fit, or nothing changes.

        Banks stay valid: what they hold is made by the backbone alone.

        Raises:
            ValueError: a tensor is missing, left over, of another shape or not finite; the message names the first.
        """
        side_state.load_side_state(self.side_network, self.backbone, state)

    def merge_lora(self) -> Self:
        """Fold the adapters into the copied weights; `config.lora` becomes None, and all weights are trained and saved.

        Raises:
            ValueError: the model has no adapters.
        """
        self.side_network.merge_lora()
        return self

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer, opened on first use."""
        if self._tokenizer is None:
            if not self.config.backbone_name_or_path:
                raise ValueError(
                    "this model has no tokenizer, because its backbone has no name; pass token ids, "
                    "or `tokenizer=` to `from_backbone`."
                )
            self._tokenizer = load_tokenizer(self.config.backbone_name_or_path, self.config.backbone_revision)
        return self._tokenizer

    def encoder_stamp(self, *, exact: bool = False) -> EncoderStamp:
        """Return what determines the numbers that this model stores: a hash of the encoder's weights, and the recipe.

        It is kept until the tripwire (`longmem/encoder/tripwire.py`) sees that the encoder was touched, and then made anew, at
        about 1 s per GB of weights. `exact`: make it anew in any case.
        """
        return self.encoder.stamp(exact=exact)

    def encoder_fingerprint(self) -> str:
        """Return the digest of `encoder_stamp`: two models with one fingerprint store the same numbers for the same ids."""
        return self.encoder_stamp().digest

    def _encoder_recipe(self) -> dict[str, Any]:
        names = ("memory_layers", "chunk_size", "segment_length")
        recipe: dict[str, Any] = {name: getattr(self.config, name) for name in names}
        recipe["memory_heads"] = self.config.memory_heads or ALL_HEADS
        recipe["sinks"] = "forgotten" if self.config.forget_sinks else SINKS_STORED
        try:
            tokenizer = tokenizer_fingerprint(self.tokenizer)
        except (OSError, ValueError, ImportError):
            tokenizer = None  # the model has none, or it can't be reached: then it can't be compared
        dtype = str(self.backbone.dtype).removeprefix("torch.")
        stored = {"format": STORED_FORMAT, "dtype": dtype, "tokenizer": tokenizer}
        return recipe | stored | configuration_recipe(self.backbone)

    def _encoder_of(self, backbone: Backbone) -> Encoder:
        config = self.config
        return Encoder(
            backbone, config.memory_layers or [0], self._encoder_recipe, config.memory_heads, config.forget_sinks
        )

    @property
    def backbone_view(self) -> Backbone:
        """How the backbone is run: what gives hidden states, keys, values and logits.

        Put a subclass of `Backbone` here to have them computed in another way: elsewhere, with gradients, or with other weights
        for what is stored. `encoder` then watches over the new view's model; if something else writes, replace it too.
        """
        return self._backbone

    @backbone_view.setter
    def backbone_view(self, view: Backbone) -> None:
        if view.model is not self.backbone:
            raise ValueError(
                "`backbone_view` must be a view of this model's own `backbone`, got one of another "
                f"{type(view.model).__name__}; make it from `model.backbone`."
            )
        self._backbone, self.encoder = view, self._encoder_of(view)

    # What transformers asks for ----------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Set the side network's mode; the backbone stays in eval mode.

        It is never put into training mode in between: another thread may run it right now.
        """
        self.training = mode
        for name, module in self.named_children():
            module.train(mode and name != "backbone")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set whether the side network is trained, with LoRA its adapters, biases and scales; the backbone stays as it is."""
        self.side_network.requires_grad_(requires_grad)
        return self

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        """Switch recomputation of side layers in the backward pass; the backbone keeps nothing for a backward pass anyway.

        transformers' own method, private but meant to be overridden (5.23), would reach the layers inside ours.

        Raises:
            ValueError: reentrant checkpointing is asked for; it passes no gradient to the first side layer.
        """
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "`use_reentrant` must be False: what enters the first side layer has no gradient, got True; leave it out."
            )
        layers: list[Any] = list(self.side_network.layers)
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = enable and number % every_n_layers == 0
            layer._gradient_checkpointing_func = gradient_checkpointing_func

    def enable_input_require_grads(self) -> None:
        """Do nothing: the side network gets its gradients whatever enters it."""

    @property
    def input_device(self) -> torch.device:
        """Where token ids are expected."""
        return input_device(self.backbone)

    def get_input_embeddings(self) -> Any:
        """Return the backbone's token embeddings."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return the backbone's LM head."""
        return self.backbone.get_output_embeddings()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Leave every weight as it is: the backbone is pretrained, the side network a copy of it."""


def refuse_unstorable_layers(config: LongMemConfig, structure: BackboneStructure) -> None:
    """Raise UnsupportedBackboneError if a memory layer has no keys that can be stored."""
    for layer in config.memory_layers or ():
        if (obstacle := structure.layers[layer].obstacle) is not None:
            raise UnsupportedBackboneError(
                f"`memory_layers` must be layers whose keys can be stored, {structure.storable_layers} of this backbone, "
                f"got {config.memory_layers}: {obstacle}."
            )
