"""What a LongMem model shares with every pretrained model of transformers: making, saving, loading, training modes."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from longmem import files
from longmem.backbone.capture import Backbone
from longmem.backbone.loading import (
    BACKBONE_OPTIONS,
    HUB_OPTIONS,
    LOAD_OPTIONS,
    load_backbone,
    load_tokenizer,
    refuse_unknown_options,
    start_of,
    take,
    tokenizer_fingerprint,
)
from longmem.backbone.packaged import PACKAGED_BACKBONES
from longmem.backbone.structure import BackboneStructure, UnsupportedBackboneError, input_device
from longmem.configuration import NOTED_BY_OTHERS, LongMemConfig
from longmem.console import without_transformers_bars
from longmem.encoder.path import configuration_recipe
from longmem.encoder.stamp import ALL_HEADS, NO_START, SINKS_STORED, EncoderStamp
from longmem.encoder.watch import Encoder
from longmem.memory.checks import checked, got
from longmem.model import saving, side_state
from longmem.model.names import backbone_location, look_up
from longmem.model.side_network import SideNetwork

# How keys are freed of their positions, and which token a mean key is made of: raised when stored numbers change.
STORED_FORMAT = 1
# What the Auto classes of transformers and others pass on by habit; it says nothing about a side network.
LOAD_HABITS: tuple[str, ...] = ("_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs", "code_revision")
LOAD_HABITS += ("trust_remote_code", "weights_only")


class BackboneHead(nn.Module):
    """The backbone's LM head, without weights of its own: nothing that looks for modules to train finds the frozen one."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self._head = [backbone.get_output_embeddings()]  # in a list: its parameters are the backbone's

    @property
    def weight(self) -> Tensor:
        """Weights of the head, `vocabulary hidden`."""
        return self._head[0].weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the head, `vocabulary`, None where it has none."""
        return getattr(self._head[0], "bias", None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return what the head gives."""
        return self._head[0](hidden_states)


class LongMemPreTrainedModel(PreTrainedModel):
    """A frozen backbone and its side network; `LongMemForCausalLM` says what they compute together.

    The side network is a submodule, the backbone is not: `parameters()`, `state_dict()`, optimizers, wrappers and adapters see
    what can be trained. `to`, `half` and their like move both.

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
        refuse_other_kinds(
            ("config", config, LongMemConfig, "a LongMemConfig", "`from_backbone` makes it"),
            ("backbone", backbone, PreTrainedModel, "a causal LM", "`from_backbone` opens one by name"),
            ("tokenizer", tokenizer, Callable | None, "a tokenizer", "`AutoTokenizer` opens one"),
        )
        config = LongMemConfig.from_dict({**config.to_dict(), "backbone_config": backbone.config.to_dict()})
        super().__init__(config)
        self._backbone = Backbone(backbone)
        refuse_unstorable_layers(config, self._backbone.structure)
        self.side_network = SideNetwork(config, self._backbone)
        self.lm_head = BackboneHead(backbone)
        self._tokenizer = tokenizer
        self._open_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None
        if (placed := getattr(backbone, "hf_device_map", None)) is not None:
            self.hf_device_map = {f"backbone.{name}": device for name, device in placed.items()}
        self.encoder = self._encoder_of(self._backbone)
        self.backbone_was_trained = False
        self.generation_config = GenerationConfig.from_dict(backbone.generation_config.to_dict())
        self.post_init()
        # On the private field (5.24), because the public one would change configurations inside.
        self.config._attn_implementation_internal = backbone.config._attn_implementation

    # Making and saving -------------------------------------------------------------------------------------------------

    @classmethod
    @checked
    def from_backbone(
        cls,
        backbone: str | PathLike[str] | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backbone_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """Return a model with a new side network on any Hugging Face causal LM.

        Args:
            backbone: name of a model (`longmem.model.names`), of which the backbone alone is opened, or a loaded causal LM.
            tokenizer: needed to pass text when `backbone` is a loaded model that has no name.
            backbone_options: options of `AutoModelForCausalLM.from_pretrained`, as they can also be given beside the fields.
            options: fields of `LongMemConfig`, of which `start_token_ids` are by default what the tokenizer puts before a text,
                and how a backbone is loaded that is given by name (dtype, device_map,
                attn_implementation, quantization_config, revision, subfolder, token, cache_dir, ...).

        Raises:
            ValueError: a field is unknown or breaks a rule, or the architecture is not supported.
        """
        loading = take(options, (*BACKBONE_OPTIONS, *HUB_OPTIONS, "revision", "subfolder")) | (backbone_options or {})
        open_tokenizer = None
        if isinstance(backbone, str | PathLike):
            hub = {name: loading[name] for name in HUB_OPTIONS if name in loading}
            revision = loading.pop("revision", None)
            if revision is not None and options.setdefault("backbone_revision", revision) != revision:
                raise ValueError(
                    "`revision` and `backbone_revision` are one option under two names, got "
                    f"{revision!r} and {options['backbone_revision']!r}; leave one out."
                )
            if subfolder := loading.pop("subfolder", ""):
                backbone = Path(backbone, subfolder)
                if not backbone.is_dir():
                    raise ValueError(
                        f"`subfolder` must be in a local folder, because a saved model names its backbone by one name, got "
                        f"{subfolder!r} of {backbone.parent}; download it, and name its folder."
                    )
            named = look_up(backbone, options.get("backbone_revision"), **hub)
            if named.backbone is None:
                raise ValueError(
                    f"`backbone` must be the name of a model whose backbone can be opened, but {named.name} does not name "
                    "its own (it was made from a model without a name); pass that model."
                )
            if named.origin == "saved":  # its revision is of the backbone's repository, not of the side network's
                options["backbone_revision"] = named.backbone_revision
            options["backbone_name_or_path"] = named.backbone
            revision = options.get("backbone_revision")
            backbone = load_backbone(named.backbone, revision, **loading)
            open_tokenizer = functools.partial(load_tokenizer, named.backbone, revision, **_tokenizer_options(loading))
        elif isinstance(backbone, LongMemPreTrainedModel):
            raise ValueError(
                f"`backbone` must be a causal LM alone, got a {type(backbone).__name__}; pass its `.backbone`."
            )
        elif not isinstance(backbone, PreTrainedModel) or not backbone.can_generate():
            raise ValueError(
                "`backbone` must be a name, a folder or a causal LM of transformers (with a language-model head), "
                f"got {type(backbone).__name__}; try `AutoModelForCausalLM.from_pretrained(...)`."
            )
        elif loading:
            raise ValueError(
                f"`{next(iter(loading))}` says how a backbone is loaded, got it with one that is loaded already; give it to "
                "`AutoModelForCausalLM.from_pretrained`, or pass the backbone's name."
            )
        elif name := options.setdefault("backbone_name_or_path", backbone.config.name_or_path or None):
            open_tokenizer = functools.partial(load_tokenizer, name, options.get("backbone_revision"))
        opened = tokenizer
        if "start_token_ids" not in options:
            with contextlib.suppress(OSError, ValueError, ImportError):  # then the model is given token ids
                opened = open_tokenizer() if opened is None and open_tokenizer is not None else opened
            is_one = isinstance(opened, PreTrainedTokenizerBase)  # others may know no special tokens
            start, vocabulary = start_of(opened) if is_one else None, backbone.config.get_text_config().vocab_size
            # A tokenizer may be given that knows more tokens than the backbone.
            options["start_token_ids"] = start if start and max(start) < vocabulary else None
        config = LongMemConfig(backbone_config=backbone.config, **options)
        config.name_or_path = backbone.config.name_or_path or ""
        model = cls(config, backbone, tokenizer)
        model._tokenizer, model._open_tokenizer = opened, open_tokenizer
        return model

    @classmethod
    def _from_config(cls, config: LongMemConfig, **options: Any) -> Self:
        """Return a model with random weights, backbone and all: what the Auto classes' `from_config` calls (5.24).

        Raises:
            ValueError: the configuration has no `backbone_config`.
        """
        if config.backbone_config is None:
            raise ValueError(
                "`config` must have a `backbone_config` to make a backbone of, got None; `AutoConfig` opens one."
            )
        return cls(config, AutoModelForCausalLM.from_config(config.backbone_config, **options))

    @classmethod
    @checked
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        config: LongMemConfig | str | PathLike[str] | None = None,
        backbone: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backbone_options: dict[str, Any] | None = None,
        generation_config: GenerationConfig | None = None,
        strict_backbone: bool = True,
        revision: str | None = None,
        subfolder: str = "",
        variant: str | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Self:
        """Return a saved model: its side network on its backbone, opened by the name in the configuration.

        transformers' own method can't do it: it makes models empty, and ours copies layers of a backbone that it has watched.

        Args:
            pretrained_model_name_or_path: name of a model that has a side network (`longmem.model.names`): a folder or hub
                name that `save_pretrained` wrote, or the packaged name "smollm2-135m".
            config: replaces the saved one, or where it is.
            backbone: a loaded backbone to use instead of opening one by name.
            tokenizer: to use instead of the saved one, or where none was saved the backbone's.
            backbone_options: options of `AutoModelForCausalLM.from_pretrained` for the backbone alone (trust_remote_code, ...).
            generation_config: instead of the saved one.
            revision: hub revision of the saved side network.
            strict_backbone: refuse a backbone of other weights, or of another rotary scaling, than the side network was saved
                beside; False warns instead. It looks at a sample of the numbers of large weights.
            subfolder: where in the folder or repository the side network is.
            variant: of its weights, as `save_pretrained(variant=...)` wrote them.
            output_loading_info: also return what was missing, as transformers does; it is nothing, or there is an error.
            options: how the backbone is loaded, placed and run (dtype, device_map, max_memory, attn_implementation,
                quantization_config, ...), where files of all three come from (cache_dir, force_download, local_files_only,
                token), and fields of `LongMemConfig` to change, among them `use_cache`, `pad_token_id` and the like.

        Raises:
            ValueError: a weight is missing, left over, of another shape or not finite, a file is damaged, the backbone is
                another one, or the name has no side network.
            OSError: the name is of no folder, and the hub has no such repository or can't be reached.
        """
        refuse_other_kinds(
            ("config", config, LongMemConfig | str | PathLike | None, "a LongMemConfig", "leave it out"),
            ("backbone", backbone, PreTrainedModel | None, "a loaded causal LM", "leave it out"),
            ("generation_config", generation_config, GenerationConfig | None, "a GenerationConfig", "leave it out"),
        )
        take(options, LOAD_HABITS)
        hub, loading = take(options, HUB_OPTIONS), take(options, LOAD_OPTIONS)
        known = [each.name for each in dataclasses.fields(LongMemConfig)]
        fields = {name: options.pop(name) for name in (*known, *NOTED_BY_OTHERS) if name in options}
        _refuse_what_is_strict(options, [*known, *NOTED_BY_OTHERS])
        folder = look_up(pretrained_model_name_or_path, revision, subfolder, **hub).require_side_network()
        files.refuse_pipes(folder)
        if config is None or not isinstance(config, LongMemConfig):
            config = LongMemConfig.from_pretrained(folder if config is None else config)
        settings = LongMemConfig.from_dict({**config.to_dict(), **fields})
        if config._attn_implementation is not None:  # where AutoModel puts the option
            loading.setdefault("attn_implementation", config._attn_implementation)
        loading = {**hub, **loading, **(backbone_options or {})}
        if backbone is None:
            if not settings.backbone_name_or_path:
                text = settings.get_text_config()
                raise ValueError(
                    f"{folder} does not name its backbone (it was made from a model that has no name for others); "
                    f"pass `backbone=` with that model, a {text.model_type} of {text.num_hidden_layers} layers and hidden size "
                    f"{text.hidden_size}."
                )
            settings.backbone_name_or_path = named = backbone_location(folder, settings.backbone_name_or_path)
            if Path(named).is_dir() and look_up(named).origin == "saved":
                raise ValueError(
                    f"the backbone that {folder} names must be a causal LM, got the LongMem model in {named}; pass `backbone=` "
                    "with the one that it was saved beside."
                )
            backbone = load_backbone(settings.backbone_name_or_path, settings.backbone_revision, **loading)
        elif unused := [name for name in loading if name not in HUB_OPTIONS]:
            raise ValueError(
                f"`{unused[0]}` says how a backbone is loaded, got it with a loaded `backbone`; leave one out."
            )
        saving.refuse_other_backbone(settings, backbone)
        settings.name_or_path = str(pretrained_model_name_or_path)
        model = cls(settings, backbone, tokenizer)
        stamp = saving.load_side_network(model.side_network, folder, variant)
        saving.refuse_other_weights(stamp, backbone, strict=strict_backbone)
        if generation_config is not None:
            model.generation_config = generation_config
        elif (folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_dict(files.read_json(folder / GENERATION_CONFIG_NAME))
        model.generation_config.update(**{name: fields[name] for name in NOTED_BY_OTHERS if name in fields})
        is_own = (folder / "tokenizer_config.json").is_file()
        place = (str(folder), None) if is_own else None
        if place is None and settings.backbone_name_or_path:
            place = settings.backbone_name_or_path, settings.backbone_revision
        if place is not None:
            # Nobody is asked whether code in the folder is to be run; a backbone's own is as trusted as the backbone.
            asked = _tokenizer_options({"trust_remote_code": False} | loading if is_own else loading)
            model._open_tokenizer = functools.partial(load_tokenizer, *place, **asked)
        names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        nothing: dict[str, set[str]] = {name: set() for name in names}
        return (model.eval(), nothing) if output_loading_info else model.eval()  # type: ignore[return-value]

    @checked
    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        save_backbone: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> None:
        """Write the side network (safetensors), configuration, tokenizer and a model card; the backbone is named, not copied.

        All of it counts at once: a process that is killed meanwhile leaves the model before, or this one. Other files in the
        folder stay.

        transformers opens the folder by name: after `import longmem`, or with `trust_remote_code=True`. With LoRA, the copied
        weights are the backbone's and not written: adapters, memory biases, output scales, and what else has
        `requires_grad`. A model with adapters of `add_adapter` is saved as transformers does: adapters alone.

        Args:
            save_directory: folder to write to; made if missing.
            is_main_process: whether this process writes.
            state_dict: to be written instead of the model's own.
            push_to_hub: upload it as well, as `push_to_hub` does (with `private`, `token`, `commit_message`, ...).
            dtype: of the weights in the file, such as `torch.bfloat16` for half the room of float32; None leaves them as
                they are. The loaded network has the dtype of its configuration all the same.
            save_backbone: write the backbone too, with its tokenizer, into the folder `backbone` inside, and name that one. A
                backbone that was trained is nowhere else.
            repo_id: repository on the hub; default: the folder's name.
            options: of transformers (max_shard_size, variant, ...).

        Raises:
            OSError: there is no room, or no permission; what was saved there before is whole.
            ValueError: the path is a file or the backbone's own folder, `dtype` is no floating-point dtype, an option is
                unknown, or the backbone was trained and would be lost.
        """
        folder = Path(save_directory)
        self._refuse_to_lose_backbone(save_backbone, folder)
        dtype = saving.saved_dtype(dtype)
        if folder.is_file():
            raise ValueError(f"`save_directory` must be a folder, got the file {folder}.")
        take(options, saving.SAVE_HABITS)
        upload = take(options, saving.PUSH_OPTIONS)
        if upload.keys() - {"token"} and not push_to_hub:
            raise ValueError(f"`{next(iter(upload))}` is of an upload, got it without `push_to_hub=True`; add that.")
        refuse_unknown_options(options.keys() - set(saving.SAVE_OPTIONS), saving.KNOWN_OPTIONS)
        if not is_main_process:
            return
        state = saving.own_state(self.side_network, self.state_dict() if state_dict is None else state_dict, dtype)
        with files.new_contents(folder, saving.pattern_of_weights(options.get("variant"))) as draft:
            self._write(draft, state, save_backbone, place=folder, **options)
        if push_to_hub:
            self.push_to_hub(repo_id or folder.name, dtype=dtype, save_backbone=save_backbone, **upload, **options)

    def _write(
        self, folder: Path, state: dict[str, Tensor], save_backbone: bool, place: Path | None, **options: Any
    ) -> None:
        """Write a folder that will be at `place`; None: elsewhere, so paths of this machine are left out."""
        with without_transformers_bars():
            super().save_pretrained(folder, True, state, save_original_format=False, **options)
        if getattr(self, "_hf_peft_config_loaded", False):
            return
        places = [folder]
        if save_backbone:
            places.append(folder / saving.BACKBONE_FOLDER)
            with without_transformers_bars():
                self.backbone.save_pretrained(places[1])
        if (tokenizer := self._tokenizer_if_any()) is not None:
            for each in places:
                tokenizer.save_pretrained(each)
        num_trained = sum(weight.numel() for weight in self.side_network.trained_parameters().values())
        saving.write_description(self.config, num_trained, folder, with_backbone=save_backbone, place=place)
        saving.seal_weights(folder, self.backbone)

    def _tokenizer_if_any(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer, None if there is none or it can't be reached: then a model is given token ids."""
        try:
            return self.tokenizer
        except (OSError, ValueError, ImportError):
            return None

    @checked
    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        dtype: torch.dtype | str | None = None,
        save_backbone: bool = False,
        commit_message: str = "Upload LongMem side network",
        commit_description: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> Any:
        """Upload what `save_pretrained` writes, without paths of this machine; return what the hub says of the commit.

        transformers' own method would put a card of its own in the place of ours. A backbone that is a local folder is sent
        along with `save_backbone=True`; otherwise card and configuration say what others must have.

        Args:
            repo_id: repository, made if there is none.
            private: whether a new repository is private; None: as its owner's are by default.
            token: of the hub; None: the stored one.
            dtype: as for `save_pretrained`, like `save_backbone` and `options` (max_shard_size, ...).
            save_backbone: send the backbone too.
            commit_message: of the commit.
            commit_description: of the commit.
            revision: branch to commit to.
            create_pr: open a pull request instead of committing.
        """
        self._refuse_to_lose_backbone(save_backbone)
        dtype = saving.saved_dtype(dtype)
        take(options, saving.SAVE_HABITS)
        refuse_unknown_options(options.keys() - set(saving.SAVE_OPTIONS), saving.KNOWN_OPTIONS)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "model")
            state = saving.own_state(self.side_network, self.state_dict(), dtype)
            self._write(folder, state, save_backbone, place=None, **options)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    def _refuse_to_lose_backbone(self, save_backbone: bool, folder: Path | None = None) -> None:
        named = self.config.backbone_name_or_path
        if folder and named and named not in PACKAGED_BACKBONES and Path(named).resolve() == folder.resolve():
            raise ValueError(
                "`save_directory` must be another folder than that of the backbone, which stays whole and is opened by its "
                f"name, got {folder}; name a new one."
            )
        if self.backbone_was_trained and not save_backbone:
            raise ValueError(
                "`save_backbone` must be True for a model whose backbone was trained and is no longer "
                f"{self.config.backbone_name_or_path}, got False; `save_pretrained(folder, save_backbone=True)` writes both."
            )

    def side_state_dict(self) -> dict[str, torch.Tensor]:
        """Return copies of what `save_pretrained` writes, by the same names: the tensors that one site sends another.

        Side network alone (with LoRA what is trained), never a bank, never a tensor of the backbone. Names and shapes of two
        models agree if their backbones and configurations do, so federated averaging is the mean of their tensors, given to
        `load_side_state_dict` of each.

        Raises:
            ValueError: a tensor of the side network lies in memory of the backbone.
        """
        return side_state.side_state(self.side_network, self.backbone)

    @checked
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
            if self._open_tokenizer is not None:
                self._tokenizer = self._open_tokenizer()
            elif self.config.backbone_name_or_path:
                self._tokenizer = load_tokenizer(self.config.backbone_name_or_path, self.config.backbone_revision)
            else:
                raise ValueError(
                    "this model has no tokenizer, because its backbone has no name; pass token ids, "
                    "or `tokenizer=` to `from_backbone`."
                )
        return self._tokenizer

    @checked
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
        recipe["sinks"] = "all forgotten" if self.config.forget_sinks else SINKS_STORED
        recipe["start_token_ids"] = self.config.start_token_ids or NO_START
        found = self._tokenizer_if_any()
        tokenizer = None if found is None else tokenizer_fingerprint(found)  # None can't be compared
        dtype = str(self.backbone.dtype).removeprefix("torch.")
        stored = {"format": STORED_FORMAT, "dtype": dtype, "tokenizer": tokenizer}
        return recipe | stored | configuration_recipe(self.backbone)

    def _encoder_of(self, backbone: Backbone) -> Encoder:
        return Encoder(backbone, self.config, self._encoder_recipe)

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
        """Set the side network's mode; the backbone is in eval mode, and never in between: another thread may run it."""
        self.backbone.eval()
        return super().train(mode)

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

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or cast the backbone along: `to`, `half`, `cuda` and their like end here, and it is no submodule."""
        self.backbone._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def backbone(self) -> PreTrainedModel:
        """The frozen causal LM."""
        return self._backbone.model

    @property
    def device(self) -> torch.device:
        """Where token ids are expected; layers may be elsewhere under a device map."""
        return input_device(self.backbone)

    input_device = device

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's dtype; that of the side network is `side_network.dtype`."""
        return self.backbone.dtype

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """Names of the state that a checkpoint does not hold: with LoRA, copies of the backbone's weights."""
        saved = saving.saved_names(self.side_network)
        return {saving.PREFIX + name for name in self.side_network.state_dict() if name not in saved}

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, value: Any) -> None:
        """Leave it at that: transformers collects submodules' names here, of which there are none."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: a saved folder carries `saving.SHIM_CODE`, and needs no copy of this package's modules."""

    def get_input_embeddings(self) -> Any:
        """Return the backbone's token embeddings."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return the backbone's LM head."""
        return self.lm_head

    @checked
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Return the token embeddings, which keep their size.

        Raises:
            ValueError: another size is asked for.
        """
        size = self.get_input_embeddings().weight.shape[0]
        wanted, name = size if new_num_tokens is None else new_num_tokens, "new_num_tokens"
        if pad_to_multiple_of is not None:
            wanted, name = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of, f"{name}` up to `pad_to_multiple_of"
        self._refuse_other_vocabulary(name, wanted, size, f"backbone's {size}")
        return self.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Raise ValueError unless these are the backbone's own embeddings, which alone can be the model's."""
        self._refuse_other_vocabulary("value", value, self.get_input_embeddings(), "backbone's token embeddings")

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Raise ValueError unless this is the backbone's own head, which alone can be the model's."""
        self._refuse_other_vocabulary("new_embeddings", new_embeddings, self.lm_head, "backbone's head")

    @staticmethod
    def _refuse_other_vocabulary(name: str, value: Any, own: Any, in_words: str) -> None:
        if value is not own and value != own:
            raise ValueError(
                f"`{name}` must stay the {in_words}, because its vocabulary is frozen with it, got {got(value)}; resize and "
                "train the backbone first, and give that one to `from_backbone`."
            )

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError for another than the model was made with: how layers are watched and copied depends on it."""
        if attn_implementation != self.config._attn_implementation:
            raise ValueError(
                f"`attn_implementation` must stay {self.config._attn_implementation!r}, with which the model was made, got "
                f"{attn_implementation!r}; `from_pretrained(..., attn_implementation=...)` opens it with another."
            )

    @checked
    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of all weights, the backbone's with them, each once; `return_buffers`: and of the buffers."""
        own: list[Tensor] = [*self.backbone.parameters(), *self.parameters()]
        own += [*self.backbone.buffers(), *self.buffers()] if return_buffers else []
        return sum({id(each): each.nbytes for each in own}.values())

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Leave every weight as it is: the backbone is pretrained, the side network a copy of it."""


def refuse_other_kinds(*rules: tuple[str, Any, Any, str, str]) -> None:
    """Raise ValueError for the first argument that is not of its kind: (name, value, kind, in words, way out)."""
    for name, value, kind, rule, way_out in rules:
        if not isinstance(value, kind):
            raise ValueError(f"`{name}` must be {rule} of transformers, got {got(value)}; {way_out}.")


def refuse_unstorable_layers(config: LongMemConfig, structure: BackboneStructure) -> None:
    """Raise UnsupportedBackboneError if a memory layer has no keys that can be stored."""
    for layer in config.memory_layers or ():
        if (obstacle := structure.layers[layer].obstacle) is not None:
            raise UnsupportedBackboneError(
                f"`memory_layers` must be layers whose keys can be stored, {structure.storable_layers} of this backbone, "
                f"got {config.memory_layers}: {obstacle}."
            )


def _tokenizer_options(loading: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options for loading a backbone that its tokenizer takes as well."""
    return {name: loading[name] for name in (*HUB_OPTIONS, "trust_remote_code", "code_revision") if name in loading}


def _refuse_what_is_strict(options: dict[str, Any], fields: list[str]) -> None:
    """Raise ValueError for options of transformers under which weights would not be what was saved, and unknown ones."""
    for name, usual in (("ignore_mismatched_sizes", False), ("use_safetensors", True), ("strict", True)):
        if (value := options.pop(name, usual)) not in (usual, None):
            raise ValueError(
                f"`{name}` must be {usual}, because a side network is its safetensors, all of them, got {value}; leave it out."
            )
    refuse_unknown_options(
        options,
        (*LOAD_OPTIONS, *HUB_OPTIONS, "backbone", "backbone_options", "revision", "config", "subfolder", *fields),
    )
