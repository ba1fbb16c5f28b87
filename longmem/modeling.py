"""LongMemForCausalLM: frozen backbone, memory and side network behind the usual causal-LM interface."""

import dataclasses
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from longmem import saving
from longmem.attention import MemoryRead, ReadableMemory
from longmem.backbone import Backbone, load_backbone, load_tokenizer
from longmem.backbone.loading import encoder_fingerprint
from longmem.backbone.structure import UnsupportedBackboneError, probe_ids
from longmem.configuration import LongMemConfig
from longmem.input_checks import banks_per_lane, refuse_other_encoder, refuse_unknown_inputs, refuse_unstorable_layers
from longmem.memorizing import memorize
from longmem.memory import MemoryBank
from longmem.side_network import SideNetwork, add_side_slots
from longmem.streaming import MemoryStream, start_stream

Memory = ReadableMemory | Sequence[ReadableMemory]


@dataclasses.dataclass
class LongMemOutput(CausalLMOutputWithPast):
    """Output of a LongMem model.

    Beside the usual fields: `memory_keys` and `memory_values`, one tensor `lanes kv_heads tokens dim` per memory layer,
    position-free, of the tokens just read, for the caller to write; `memory_reads`, one `MemoryRead` per reading layer.
    """

    memory_keys: tuple[Tensor, ...] | None = None
    memory_values: tuple[Tensor, ...] | None = None
    memory_reads: tuple[MemoryRead, ...] | None = None


class LongMemForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal LM with long-term memory (LongMem, arXiv 2306.07174).

    Make one with `from_backbone` (new side network) or `from_pretrained` (saved side network). Only the side network is
    trained and saved; the backbone is frozen and in eval mode whatever mode the model is in.

    Args:
        config: the configuration; copied.
        backbone: the causal LM that the configuration describes.
        tokenizer: the backbone's tokenizer; opened by name on first use when left out.
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
        self._fingerprint: str | None = None
        self.generation_config = GenerationConfig.from_dict(backbone.generation_config.to_dict())
        self.post_init()
        if config.residual == "substitute":
            self._check_against_backbone()

    # Making and saving -------------------------------------------------------------------------------------------------

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backbone_options: dict[str, Any] | None = None,
        **config_fields: Any,
    ) -> Self:
        """Return a model with a new side network on any Hugging Face causal LM.

        Args:
            backbone: hub name, local folder, packaged name ("smollm2-135m") or a loaded causal LM.
            tokenizer: needed to pass text when `backbone` is a loaded model that has no name.
            backbone_options: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, ...).
            config_fields: fields of `LongMemConfig`.

        Raises:
            ValueError: a field is unknown or breaks a rule, or the architecture is not supported.
        """
        revision = config_fields.get("backbone_revision")
        if isinstance(backbone, str):
            config_fields["backbone_name_or_path"] = backbone
            backbone = load_backbone(backbone, revision, **(backbone_options or {}))
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
        **options: Any,
    ) -> Self:
        """Return a saved model: its side network on its backbone, opened by the name in the configuration.

        Args:
            pretrained_model_name_or_path: folder or hub name that `save_pretrained` or `push_to_hub` wrote.
            backbone: a loaded backbone to use instead of opening one by name.
            revision: hub revision of the saved side network.
            backbone_options: passed to `AutoModelForCausalLM.from_pretrained` (device_map, ...).
            options: `dtype` is passed on to the backbone; `config` replaces the saved one.

        Raises:
            ValueError: a weight is missing, left over, or of another shape, or the folder holds no LongMem model.
        """
        folder = saving.local_folder(pretrained_model_name_or_path, revision)
        config = options.pop("config", None) or LongMemConfig.from_pretrained(folder)
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
            config.backbone_name_or_path = saving.backbone_location(folder, config.backbone_name_or_path)
            backbone = load_backbone(config.backbone_name_or_path, config.backbone_revision, **loading)
        saving.refuse_other_backbone(config, backbone)
        model = cls(config, backbone)
        saving.load_side_network(model.side_network, folder)
        return model.eval()

    def save_pretrained(self, save_directory: str | PathLike[str], **options: Any) -> None:  # type: ignore[override]
        """Write the side network (safetensors), the configuration and a model card; the backbone is named, not copied.

        Args:
            save_directory: folder to write to; made if missing.
            options: `push_to_hub=True` uploads the folder (with `repo_id=`), as in transformers.
        """
        saving.save_model(self, save_directory, **options)

    # Reading -----------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "lanes tokens"],
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "lanes tokens"] | None = None,
        past_key_values: Cache | None = None,
        labels: Int[Tensor, "lanes tokens"] | None = None,
        use_cache: bool | None = None,
        memory: Memory | None = None,
        logits_to_keep: int | Tensor = 0,
        output_memory_reads: bool = False,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> LongMemOutput:
        """Return logits, and the keys and values of these tokens for the caller to write; the bank is only read.

        Args:
            input_ids: tokens.
            attention_mask: 1 for tokens, 0 for padding, `lanes past+tokens`.
            position_ids: positions, where the backbone takes them.
            past_key_values: cache of both networks, made by an earlier call with `use_cache=True`.
            labels: targets, -100 for none; shifted inside, as in transformers.
            use_cache: return `past_key_values` for the next call.
            memory: one bank that every lane reads, or a list with one bank per lane; None reads nothing.
            logits_to_keep: compute logits of the last so many tokens only (0: all).
            output_memory_reads: return who read what.
            num_items_in_batch: divide the summed loss by this instead of the number of targets here (gradient
                accumulation; transformers' Trainer passes it).

        Raises:
            ValueError: the number of banks does not fit the lanes, or a bank was written by another encoder.
        """
        refuse_unknown_inputs(kwargs)
        banks = None if memory is None else banks_per_lane(self, memory, input_ids.shape[0])
        if use_cache and self.training and self.is_gradient_checkpointing:
            raise ValueError(
                "`use_cache` must be False in training with gradient checkpointing, which would fill the cache twice, got True."
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.get_text_config())
        if past_key_values is not None:
            sources = (layer.source_layer for layer in self.side_network.layers)
            add_side_slots(past_key_values, self._backbone.num_layers, sources)  # type: ignore[arg-type]
        inputs: dict[str, Any] = {"use_cache": past_key_values is not None}
        for name, value in (("attention_mask", attention_mask), ("past_key_values", past_key_values)):
            inputs[name] = value
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        hidden_layers = self.side_network.hidden_layers
        states = self._backbone.run(
            input_ids,
            hidden_layers=hidden_layers,
            memory_layers=self.config.memory_layers or (),
            with_final_states=self.config.residual_states == "post_norm" and self._backbone.num_layers in hidden_layers,
            **inputs,
        )
        hidden_states, reads = self.side_network(states, banks)
        logits = self._backbone.logits(hidden_states, logits_to_keep, self.side_network.final_modules)
        loss = None
        if labels is not None:
            shared = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **shared)
        return LongMemOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            memory_keys=tuple(states.keys.values()),
            memory_values=tuple(states.values.values()),
            memory_reads=tuple(reads) if output_memory_reads else None,
        )

    # Writing -----------------------------------------------------------------------------------------------------------

    def encode(
        self, input_ids: Int[Tensor, "lanes tokens"], **inputs: Any
    ) -> tuple[list[Float[Tensor, "_ kv_heads tokens dim"]], list[Float[Tensor, "_ kv_heads tokens value_dim"]]]:
        """Return position-free keys and values of the tokens, one of each per memory layer, without gradients."""
        return self._backbone.encode(input_ids, self.config.memory_layers or (), **inputs)

    def memorize(
        self,
        bank: MemoryBank,
        text_or_ids: str | Sequence[int] | Tensor,
        document_id: str,
        *,
        batch_size: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Encode a document with the frozen backbone and write it to the bank; return its number of tokens.

        The text is read in windows of `segment_length` tokens. When anything fails, nothing of the document stays.

        Args:
            bank: where to write.
            text_or_ids: text, or token ids of the backbone's tokenizer.
            document_id: name of the document; must be new to the bank.
            batch_size: windows encoded at once.
            progress: called with (tokens done, tokens in all) after every step.

        Raises:
            ValueError: empty text, ids outside the vocabulary, duplicate id, or a bank of another encoder.
        """
        refuse_other_encoder(self, bank)
        return memorize(self, bank, text_or_ids, document_id, batch_size=batch_size, progress=progress)

    def stream(
        self,
        memory: MemoryBank,
        *,
        document_id: str = "stream",
        window: int | None = None,
        keep: int | None = None,
        seed: int = 0,
    ) -> MemoryStream:
        """Return a stream: unlimited tokens in and out, of which the bank gets those that leave the local window.

        Args:
            memory: the bank to read and to write to; it may hold other documents.
            document_id: name of the stream's document in the bank; must be new to it.
            window: tokens in the local window at most; default and upper limit are `segment_length`.
            keep: tokens that stay when others leave; `window - keep` must be a multiple of the chunk size. Default: half.
            seed: of the random numbers that sampling draws; they are the stream's own.

        Raises:
            ValueError: a size breaks these rules, the bank has the document already or is another encoder's.
        """
        refuse_other_encoder(self, memory)
        return start_stream(self, memory, document_id, window, keep, seed)

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

    def encoder_fingerprint(self) -> str:
        """Return a hash of everything that determines what this model stores: weights up to the memory layers, recipe.

        Computed once (about 1 s per GB of weights), because the backbone never changes.
        """
        if self._fingerprint is None:
            layers = [structure.layer for structure in self._backbone.structure.layers]
            names = ("memory_layers", "chunk_size", "segment_length")
            recipe = {name: getattr(self.config, name) for name in names}
            self._fingerprint = encoder_fingerprint(self.backbone, layers, self.config.memory_layers or [0], recipe)
        return self._fingerprint

    @torch.no_grad()
    def _check_against_backbone(self) -> None:
        """Raise if copies of the backbone's layers, called as the backbone calls its own, do not give its logits."""
        tokens = probe_ids(self.backbone)
        expected, found = self.backbone(tokens, use_cache=False).logits, self(tokens).logits
        # Copies in another dtype, or of quantized layers, round otherwise: a mistake must be larger than that to be told.
        full = self.side_network.dtype == self.backbone.dtype == torch.float32 and not hasattr(self.backbone, "hf_quantizer")
        tolerance = 1e-3 if full else 0.1
        if not torch.allclose(found, expected, atol=tolerance * max(expected.abs().max().item(), 1), rtol=0):
            raise UnsupportedBackboneError(
                f"{type(self.backbone).__name__}: copies of its upper layers give logits that differ from its own by "
                f"{(found - expected).abs().max():.3g}; its layers do more than their arguments say."
            )

    # What transformers asks for ----------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Set the side network's mode; the backbone stays in eval mode."""
        super().train(mode)
        if hasattr(self, "backbone"):
            self.backbone.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set whether the side network is trained; the backbone never is."""
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

    def get_input_embeddings(self) -> Any:
        """Return the backbone's token embeddings."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return the backbone's LM head."""
        return self.backbone.get_output_embeddings()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Leave every weight as it is: the backbone is pretrained, the side network a copy of it."""


AutoConfig.register("longmem", LongMemConfig, exist_ok=True)
AutoModelForCausalLM.register(LongMemConfig, LongMemForCausalLM, exist_ok=True)
