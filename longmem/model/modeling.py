"""LongMemModel and LongMemForCausalLM: frozen backbone, memory and side network behind the usual interfaces."""

import copy
import dataclasses
import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import TransformersKwargs

from longmem.backbone.cache_names import CACHE_NAMES, as_keyword, named_for, one_cache
from longmem.backbone.capture import BackboneStates
from longmem.backbone.loading import take
from longmem.backbone.structure import (
    UnsupportedBackboneError,
    adapters_in_words,
    computes_exactly,
    probe_ids,
    same_logits,
)
from longmem.configuration import LongMemConfig
from longmem.errors import did_you_mean
from longmem.memory import MemoryBank
from longmem.memory.checks import checked, got, validate_count, validate_text
from longmem.memory.finding import FindableMemory, FoundPassage
from longmem.memory.memorize import Memorized, memorize
from longmem.memory.protocols import Memory
from longmem.model.attention import MemoryRead
from longmem.model.memory_attention import banks_per_lane, refuse_other_encoder
from longmem.model.neighbours import Neighbours
from longmem.model.pretrained import LongMemPreTrainedModel
from longmem.model.reads import in_pieces, of_one_state, passages_read, table_of_reads
from longmem.model.side_network import add_side_slots
from longmem.streaming import MemoryStream, start_stream

# Where texts begin that trainers of others packed into one row; the backbone's attention knows what to do with it.
PACKED_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
STATES_OF_ONE_NETWORK = ("output_attentions", "output_hidden_states")
MEMORY_OPTIONS = ("memory", "output_memory_reads", "output_memory_keys")


@dataclasses.dataclass
class LongMemOutput(CausalLMOutputWithPast):
    """Output of a LongMem model.

    Beside the usual fields: `memory_keys` and `memory_values`, where asked for one tensor `lanes kv_heads tokens dim` per
    memory layer, position-free, of the tokens just read, for the caller to write; `memory_reads`, one `MemoryRead` per
    reading layer, and `memory_neighbours`, what the neighbours of each token whose logits are kept have predicted.
    """

    memory_keys: tuple[Tensor, ...] | None = None
    memory_values: tuple[Tensor, ...] | None = None
    memory_reads: tuple[MemoryRead, ...] | None = None
    memory_neighbours: Neighbours | None = None


@dataclasses.dataclass
class LongMemModelOutput(BaseModelOutputWithPast):
    """Output of a LongMem model without its head; its own fields are those of `LongMemOutput`."""

    memory_keys: tuple[Tensor, ...] | None = None
    memory_values: tuple[Tensor, ...] | None = None
    memory_reads: tuple[MemoryRead, ...] | None = None


class AllReads(list[tuple[MemoryRead, ...]]):
    """What `generate` hands to `forward` as `output_memory_reads`, to find the reads of all its steps in it."""


class LongMemModel(LongMemPreTrainedModel):
    """A LongMem model without its LM head: it returns the last hidden state, after the final norm.

    Args:
        config: the configuration; copied.
        backbone: the causal LM that the configuration describes.
        tokenizer: the backbone's tokenizer; opened by name on first use when left out.
    """

    def __init__(
        self, config: LongMemConfig, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        super().__init__(config, backbone, tokenizer)
        if config.residual == "substitute":
            self._check_against_backbone()

    # Reading -----------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "lanes tokens"],
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "lanes tokens"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the last hidden state, `lanes tokens hidden`; arguments are those of `LongMemForCausalLM.forward`."""
        hidden_states, fields, _ = self._read(input_ids, attention_mask, position_ids, **kwargs)
        normed = self._backbone.head_inputs(hidden_states, self.side_network.final_modules)
        return LongMemModelOutput(last_hidden_state=normed, **fields)

    @torch.compiler.disable(recursive=False)  # it only calls; what it calls is compiled
    def _read(
        self,
        input_ids: Int[Tensor, "lanes tokens"],
        attention_mask: Tensor | None,
        position_ids: Int[Tensor, "lanes tokens"] | None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        memory: Memory | Sequence[Memory] | None = None,
        output_memory_reads: bool = False,
        output_memory_keys: bool = False,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        predicted: int | Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "lanes tokens hidden"], dict[str, Any], Neighbours | None]:
        """Return hidden states before the final norm, the fields that outputs with and without a head share, and neighbours."""
        packed = {name: kwargs.pop(name) for name in PACKED_ROWS if kwargs.get(name) is not None}
        if kwargs := {name: True for name in STATES_OF_ONE_NETWORK if getattr(self.config, name)} | kwargs:
            refuse_unknown_inputs(self, kwargs)
        cache = one_cache(cache, past_key_values)
        if not torch.compiler.is_compiling():
            check_inputs(self, input_ids, attention_mask, position_ids, cache, labels)
            flags = {"use_cache": use_cache, "output_memory_keys": output_memory_keys}
            check_choices(flags, output_memory_reads)
        banks = None if memory is None else banks_per_lane(self, memory, input_ids.shape[0])
        if use_cache and self.training and any(layer.gradient_checkpointing for layer in self.side_network.layers):
            raise ValueError(
                "`use_cache` must be False in training with gradient checkpointing, which would fill the cache twice, got True."
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config.get_text_config())
        if cache is not None:
            sources = (layer.source_layer for layer in self.side_network.layers)
            add_side_slots(cache, self._backbone.num_layers, sources)  # type: ignore[arg-type]
        inputs: dict[str, Any] = {
            "use_cache": cache is not None,
            "attention_mask": attention_mask,
            "cache": cache,
            **packed,
        }
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        # Neighbours are found by keys and values of the backbone; what is read into a cache now may be asked for them later.
        has_neighbours = self.config.num_neighbours > 0 and not self.training and predicted is not None
        with_keys = output_memory_keys or (has_neighbours and (banks is not None or cache is not None))
        # Sinks are forgotten in what is stored; a token that is looked up has its own key, wherever padding ends.
        is_start = has_neighbours and (cache is None or not cache.get_seq_length())
        states = self._states(input_ids, with_keys, forgets_sinks=not has_neighbours, **inputs)
        hidden_states, reads, neighbours = self.side_network(states, banks, self, predicted if has_neighbours else None)
        # Without `found`, which keeps for whoever holds it what a bank has since given up.
        is_wanted = output_memory_reads is not False and output_memory_reads is not None
        kept = tuple(replace(read.of_all_heads(), found=()) for read in reads) if is_wanted else None
        if isinstance(output_memory_reads, AllReads):
            output_memory_reads.append(kept or ())
        keys = list(states.keys.values())
        if output_memory_keys and is_start:
            keys = self.encoder.without_sinks(keys)
        fields = {
            "memory_keys": tuple(keys) if output_memory_keys else None,
            "memory_values": tuple(states.values.values()) if output_memory_keys else None,
            "memory_reads": kept,
            **as_keyword(cache),
        }
        return hidden_states, fields, neighbours

    @torch.compiler.disable  # frozen: hooks watch it, and exceptions end its run
    def run_backbone(
        self,
        input_ids: Int[Tensor, "lanes tokens"],
        *,
        extra_hidden_layers: Sequence[int] = (),
        with_keys: bool = True,
        **inputs: Any,
    ) -> BackboneStates:
        """Return what the frozen backbone gives to side network and memory: all that depends on no trained weight.

        Args:
            input_ids: tokens.
            extra_hidden_layers: layers whose input is kept beside what the side network needs; L is the last one's output.
            with_keys: keep keys and values of the memory layers.
            inputs: what the backbone's own forward takes (attention_mask, position_ids, cache, use_cache).
        """
        self._check_inputs_of_backbone(input_ids, inputs)
        if any(layer not in range(self._backbone.num_layers + 1) for layer in extra_hidden_layers):
            raise ValueError(
                f"`extra_hidden_layers` must be layers from 0 to {self._backbone.num_layers}, got {got(extra_hidden_layers)}."
            )
        return self._states(input_ids, with_keys, extra_hidden_layers, **inputs)

    @torch.compiler.disable  # as `run_backbone`
    def _states(
        self,
        input_ids: Tensor,
        with_keys: bool,
        extra_hidden_layers: Sequence[int] = (),
        forgets_sinks: bool = True,
        **inputs: Any,
    ) -> BackboneStates:
        hidden_layers = self.side_network.hidden_layers
        with_final_states = self.config.residual_states == "post_norm" and self._backbone.num_layers in hidden_layers
        cache = inputs.get("cache")
        is_start = forgets_sinks and (cache is None or not cache.get_seq_length())
        states = self._backbone.run(
            input_ids,
            hidden_layers=hidden_layers.union(extra_hidden_layers),
            memory_layers=(self.config.memory_layers or ()) if with_keys else (),
            with_final_states=with_final_states,
            **inputs,
        )
        if states.keys:
            parts = (states.keys, states.values)
            stored = self.encoder.stored(*(list(part.values()) for part in parts), is_start=is_start)
            for part, tensors in zip(parts, stored, strict=True):
                part.update(zip(part, tensors, strict=True))
        return states

    def _check_inputs_of_backbone(self, input_ids: Tensor, inputs: dict[str, Any]) -> None:
        known = {*CACHE_NAMES, *TransformersKwargs.__annotations__, *signature(type(self.backbone).forward).parameters}
        for name in inputs.keys() - known:
            raise ValueError(
                f"`{name}` must be an input of {type(self.backbone).__name__}, which has none of that name."
                f"{did_you_mean(name, known)}"
            )
        cache = one_cache(*map(inputs.get, CACHE_NAMES))
        check_inputs(self, input_ids, inputs.get("attention_mask"), inputs.get("position_ids"), cache)

    @torch.no_grad()
    def find(self, memory: FindableMemory, text: str, k: int = 10) -> list[FoundPassage]:
        """Return the `k` passages of a memory that the reading heads single out for a text, best first; see `bank.find`."""
        is_text = isinstance(text, str) and bool(text)
        if is_text:
            validate_text("text", text)
        if not (ids := self.tokenizer(text)["input_ids"] if is_text else []):
            raise ValueError(f"`text` must hold at least one token, got {got(text)}.")
        validate_count("k", k)
        refuse_other_encoder(self, memory)
        read_ids = torch.tensor([ids], device=self.input_device)

        def read() -> list[FoundPassage]:
            pieces = in_pieces(self, read_ids, self.config.segment_length, memory, logits_to_keep=1)
            reads = table_of_reads([each.memory_reads for each in pieces], len(ids))
            return passages_read(reads, memory, k, self.tokenizer)

        return of_one_state(memory, read)

    # Writing -----------------------------------------------------------------------------------------------------------

    def encode(
        self, input_ids: Int[Tensor, "lanes tokens"], **inputs: Any
    ) -> tuple[list[Float[Tensor, "_ kv_heads tokens dim"]], list[Float[Tensor, "_ kv_heads tokens value_dim"]]]:
        """Return position-free keys and values of the tokens, one of each per memory layer, without gradients.

        `inputs`: what the backbone's own forward takes. Raises ValueError for ids or a mask that `forward` would refuse.
        """
        self._check_inputs_of_backbone(input_ids, inputs)
        return self.encoder.encode(input_ids, **inputs)

    @checked
    def memorize(
        self,
        bank: MemoryBank,
        text_or_ids: str | Sequence[int] | Tensor,
        document_id: str,
        *,
        append: bool = False,
        tags: Sequence[str] = (),
        dated: float | None = None,
        valid_until: float | None = None,
        reuse: tuple[MemoryBank, str] | None = None,
        batch_size: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Memorized:
        """Encode a document with the frozen backbone and write it to the bank; return how many of its tokens can be read.

        That is a number with attributes: `num_encoded`, and `num_forgotten` if the bank was too full to keep all it had.

        The text is read in windows of `segment_length` tokens, counted from the start of the document. When anything fails,
        nothing of a new document stays; in a folder, nothing of what was to be appended either.

        Args:
            bank: where to write.
            text_or_ids: text, or token ids of the backbone's tokenizer.
            document_id: name of the document; must be new to the bank, or with `append` known.
            append: continue the document, with text that may be blank, such as an empty line. The tokens of the window that
                it ends in are read again, so that the bank holds what it would if all had been memorized at once; if they are
                not known, a new window begins.
            tags: of a new document; `bank.select(tags=...)` reads by them.
            dated: when the content of a new document was true, in seconds since 1970; None: when it was written.
            valid_until: when it ceases to be; from then on no search finds it. None: never.
            reuse: a bank and a document of it; windows of the same tokens are copied from there and not encoded.
            batch_size: windows encoded at once.
            progress: called with (tokens done, tokens in all) after every step.

        Raises:
            ValueError: empty text, ids outside the vocabulary, duplicate id, or a bank of another encoder.
        """
        refuse_other_encoder(self, bank)
        return memorize(
            self,
            bank,
            text_or_ids,
            document_id,
            append=append,
            tags=tags,
            dated=dated,
            valid_until=valid_until,
            reuse=reuse,
            batch_size=batch_size,
            progress=progress,
        )

    @torch.no_grad()
    def _check_against_backbone(self) -> None:
        """Raise if copies of the backbone's layers, called as the backbone calls its own, do not give its logits."""
        tokens = probe_ids(self.backbone)
        expected = self.backbone(tokens, use_cache=False).logits
        is_exact = computes_exactly(self.backbone) and self.side_network.dtype == torch.float32
        try:
            found = self._backbone.logits(self._read(tokens, None, None)[0], 0, self.side_network.final_modules)
        except Exception:  # whatever an architecture makes of layers that return what they were given
            found = torch.full_like(expected, torch.nan)
        if not same_logits(found, expected, is_exact):
            self._backbone.may_pass_layers = False
            found = self._backbone.logits(self._read(tokens, None, None)[0], 0, self.side_network.final_modules)
        if not same_logits(found, expected, is_exact):
            raise UnsupportedBackboneError(
                f"{type(self.backbone).__name__}: copies of its upper layers give logits that differ from its own by "
                f"{(found - expected).abs().max():.3g}; its layers do more than their arguments say."
                f"{adapters_in_words(self.backbone)}"
            )


class LongMemForCausalLM(LongMemModel, GenerationMixin):
    """A causal LM with long-term memory (LongMem, arXiv 2306.07174).

    Make one with `from_backbone` (new side network) or `from_pretrained` (saved side network). Only the side network is
    trained and saved; the backbone is frozen and in eval mode whatever mode the model is in.

    Args:
        config: the configuration; copied.
        backbone: the causal LM that the configuration describes.
        tokenizer: the backbone's tokenizer; opened by name on first use when left out.
    """

    @property
    def base_model(self) -> LongMemModel:
        """The model without its head, of the very same parts: trainers of others ask it for the last hidden state."""
        base = copy.copy(self)
        base.__class__ = LongMemModel  # type: ignore[assignment]
        base.__dict__.pop("forward", None)  # what somebody put in place of this model's
        return base

    def forward(
        self,
        input_ids: Int[Tensor, "lanes tokens"],
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "lanes tokens"] | None = None,
        cache: Cache | None = None,
        labels: Int[Tensor, "lanes tokens"] | None = None,
        use_cache: bool | None = None,
        memory: Memory | Sequence[Memory] | None = None,
        logits_to_keep: int | Tensor = 0,
        output_memory_reads: bool = False,
        output_memory_keys: bool = False,
        num_items_in_batch: int | Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> LongMemOutput:
        """Return logits and, where asked for, keys and values of these tokens for the caller to write; the bank is only read.

        With `config.num_neighbours`, outside of training, they are log-probabilities wherever neighbours in memory have a
        share: of the networks' prediction, mixed with theirs (`longmem/model/neighbours.py`).

        Args:
            input_ids: tokens.
            attention_mask: 1 for tokens, 0 for padding, `lanes past+tokens`.
            position_ids: positions, where the backbone takes them.
            cache: that of both networks, from the output of an earlier call with `use_cache=True`.
            labels: targets, -100 for none; shifted inside, as in transformers.
            use_cache: return the cache for the next call.
            memory: one bank that every lane reads, or a list with one bank per lane; None reads nothing.
            logits_to_keep: compute logits of the last so many tokens only (0: all).
            output_memory_reads: return who read what.
            output_memory_keys: return position-free keys and values of these tokens, for the caller to write. Without them
                no backbone layer runs whose output is not needed.
            num_items_in_batch: divide the summed loss by this instead of the number of targets here (gradient
                accumulation; transformers' Trainer passes it).
            past_key_values: the name of `cache` before transformers 5.24; either will do.

        Raises:
            ValueError: the number of banks does not fit the lanes, or a bank was written by another encoder.
        """
        as_object = kwargs.get("return_dict")
        if not torch.compiler.is_compiling():
            check_choices({}, False, logits_to_keep, num_items_in_batch)
        hidden_states, fields, neighbours = self._read(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            use_cache,
            memory,
            output_memory_reads,
            output_memory_keys,
            past_key_values,
            labels,
            logits_to_keep,
            **kwargs,
        )
        logits = self._backbone.logits(hidden_states, logits_to_keep, self.side_network.final_modules)
        if neighbours is not None:
            logits = neighbours.mixed_into(logits)
            fields["memory_neighbours"] = neighbours if output_memory_reads else None
        loss = None
        if labels is not None:
            shared = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **shared)
        output = LongMemOutput(loss=loss, logits=logits, **fields)
        is_object = self.config.return_dict if as_object is None else as_object
        return output if is_object else output.to_tuple()  # type: ignore[return-value]  # as transformers' models have it

    def generate(self, *given: Any, **options: Any) -> Any:
        """Return what transformers' `generate` returns, with what a LongMem model takes beside it; all is checked first.

        Args:
            given: as for transformers' `generate`: `inputs`, `generation_config`, ...
            options: as for transformers' `generate`, and: `memory`, as for `forward`; `output_memory_reads=True`, with
                `return_dict_in_generate=True`, for `memory_reads` in what is returned, for each step of the networks what
                `forward` returns.

        Raises:
            ValueError: ids, mask or memory break a rule of `forward`, or the text would outgrow learned positions.
        """
        reads = check_generation(self, given, options)
        output = super().generate(*given, **options)
        if reads is not None:
            output["memory_reads"] = tuple(reads)
        return output

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return the inputs of the next step of `generate`, as the backbone would have them for itself.

        Its architecture may know of more than the cache, as that a rotary kind changes for all tokens past a length (LongRoPE).
        """
        backbone: Any = self.backbone
        if type(backbone).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
            return super().prepare_inputs_for_generation(input_ids, **kwargs)
        prepared = backbone.prepare_inputs_for_generation(input_ids, **named_for(backbone, kwargs))
        ours = signature(LongMemForCausalLM.forward).parameters.keys() | kwargs.keys()
        return {name: value for name, value in prepared.items() if name in ours}

    def create_masks_for_generate(self, config: LongMemConfig, **given: Any) -> Any:
        """Return masks for a cache of fixed size, as the backbone makes them: its configuration alone says how it attends."""
        make = getattr(self.backbone, "create_masks_for_generate", create_masks_for_generate)
        return make(config=self.backbone.config, **given)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ValueError: paged caches hold the layers of one network. `generate_batch` of transformers ends here."""
        raise ValueError(
            "continuous batching is not available, because two networks run, each with its cache; `generate` takes a padded "
            "batch, and `longmem serve` answers many at once."
        )

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **given: Any) -> Any:  # type: ignore[override]
        """Return what drafts tokens in assisted generation; memory goes to an assistant of the same encoder, uncopied.

        transformers' own method, private but the one place (5.24), copies every argument for the assistant, banks too.
        """
        ours = take(kwargs := dict(model_kwargs), MEMORY_OPTIONS)
        generator: Any = super()._get_candidate_generator(model_kwargs=kwargs, **given)  # type: ignore[misc]
        assistant = given.get("assistant_model")
        if isinstance(assistant, LongMemForCausalLM) and assistant.encoder_fingerprint() == self.encoder_fingerprint():
            generator.assistant_kwargs |= take(ours, ["memory"])
        return generator

    @checked
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
        stream = start_stream(self, memory, document_id, window, keep, seed)
        refuse_other_encoder(self, memory)
        return stream


@torch.compiler.disable
def check_inputs(
    model: LongMemModel,
    input_ids: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    cache: Any = None,
    labels: Any = None,
) -> None:
    """Raise ValueError for inputs over which the networks would fail, or that they would take for something else.

    Shapes and dtypes are compared first; then all values are looked at at one stroke, which costs a GPU one wait. Masks of
    four axes and dictionaries of masks, which transformers makes for caches of fixed size, are let through.
    """
    if not is_integers(input_ids) or input_ids.dtype not in (torch.int64, torch.int32) or input_ids.ndim != 2:
        raise ValueError(
            f"`input_ids` must be a tensor of integers, (lanes, tokens), got {described(input_ids)}; "
            '`tokenizer(text, return_tensors="pt")` makes it, to be passed on as `**inputs`.'
        )
    lanes, tokens = input_ids.shape
    if not lanes or not tokens:
        raise ValueError(
            f"`input_ids` must hold at least one token, got shape {tuple(input_ids.shape)}; leave out empty rows."
        )
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(f"`cache` must be a Cache of transformers, got {got(cache)}; take it from an earlier output.")
    lengths = (
        () if cache is None else (each.get_seq_length() for each in cache.layers if hasattr(each, "get_seq_length"))
    )
    past = max(map(int, lengths), default=0)
    embeddings: Any = model._backbone.model.get_input_embeddings()
    vocabulary = getattr(embeddings, "num_embeddings", None) or model.config.get_text_config().vocab_size
    limit = model._backbone.position_limit
    ranges = [("input_ids", input_ids, 0, vocabulary - 1, "were they made by the tokenizer of another model?")]
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
        pass
    elif attention_mask is not None and not isinstance(attention_mask, dict):
        is_mask = is_integers(attention_mask, or_flags=True) and attention_mask.ndim == 2
        if not is_mask or tuple(attention_mask.shape) != (lanes, past + tokens):
            raise ValueError(
                f"`attention_mask` must be integers or truth values, {(lanes, past + tokens)} for {lanes} rows of {past} "
                f"tokens in the cache and {tokens} new ones, got {described(attention_mask)}; 1 is for tokens, 0 for padding."
            )
        ranges.append(("attention_mask", attention_mask, 0, 1, "1 is for tokens, 0 for padding."))
    if position_ids is not None:
        if (
            not is_integers(position_ids)
            or position_ids.ndim < 2
            or position_ids.shape[-2:] not in ((lanes, tokens), (1, tokens))
        ):
            raise ValueError(
                f"`position_ids` must be integers, {(lanes, tokens)} as `input_ids`, got {described(position_ids)}; "
                "leave them out to count from the cache."
            )
        last = 2**31 if limit is None else limit - 1
        ranges.append(("position_ids", position_ids, 0, last, "the first token of a text stands at 0."))
    elif limit is not None and past + tokens > limit:
        raise ValueError(beyond_positions(model, "input_ids", past + tokens))
    if labels is not None:
        if not is_integers(labels) or labels.shape != input_ids.shape:
            raise ValueError(
                f"`labels` must be integers, {(lanes, tokens)} as `input_ids`, got {described(labels)}; shifted inside."
            )
        counted = labels.where(labels != -100, labels.new_zeros(()))
        ranges.append(("labels", counted, 0, vocabulary - 1, "-100 is for tokens that do not count."))
    found = torch.stack(
        [each for _, tensor, *_ in ranges for each in tensor.long().to(input_ids.device).aminmax()]
    ).tolist()
    for (name, _, least, most, way_out), low, high in zip(ranges, found[::2], found[1::2], strict=True):
        if low < least or high > most:
            raise ValueError(f"`{name}` must be from {least} to {most}, got {low} to {high}; {way_out}")


@torch.compiler.disable
def check_choices(flags: dict[str, Any], reads: Any, logits_to_keep: Any = 0, num_items_in_batch: Any = None) -> None:
    """Raise ValueError for what `forward` is to return, and in which way, if it has no meaning."""
    for name, value in (flags if isinstance(reads, AllReads) else {**flags, "output_memory_reads": reads}).items():
        if value is not None and value is not True and value is not False:
            raise ValueError(f"`{name}` must be True or False, got {got(value)}; leave it out for the default.")
    is_count = isinstance(logits_to_keep, int) and not isinstance(logits_to_keep, bool) and logits_to_keep >= 0
    if not is_count and not is_integers(logits_to_keep):
        raise ValueError(
            f"`logits_to_keep` must be 0 (all) or a number of last tokens, or their places, got {got(logits_to_keep)}."
        )
    if not isinstance(num_items_in_batch, Tensor | None):
        is_number = isinstance(num_items_in_batch, int | float) and not isinstance(num_items_in_batch, bool)
        if not is_number or not num_items_in_batch > 0:
            raise ValueError(
                f"`num_items_in_batch` must be a number above 0, got {got(num_items_in_batch)}; leave it out."
            )


def check_generation(model: LongMemForCausalLM, given: tuple[Any, ...], options: dict[str, Any]) -> list[Any] | None:
    """Raise ValueError for what `generate` could not do; return where the reads of its steps go, None if nobody asked.

    `options` are changed: for `output_memory_reads` they get that list.
    """
    ids = options.get("input_ids", options.get("inputs", given[0] if given else None))
    if ids is not None or "input_ids" in options or given or "inputs" in options:
        check_inputs(model, ids, options.get("attention_mask"), cache=None, position_ids=options.get("position_ids"))
        if options.get("memory") is not None:
            banks_per_lane(model, options["memory"], len(ids))  # type: ignore[arg-type]  # checked above
    chosen = options.get("generation_config", given[1] if len(given) > 1 else None) or model.generation_config

    def setting(name: str) -> Any:
        return options[name] if options.get(name) is not None else getattr(chosen, name, None)

    if (new_tokens := setting("max_new_tokens")) is not None:
        validate_count("max_new_tokens", new_tokens)
    limit = model._backbone.position_limit
    if ids is not None and limit is not None:
        last = ids.shape[1] + new_tokens if new_tokens is not None else setting("max_length") or 0
        if last - 1 > limit:  # the last token is chosen and not read
            raise ValueError(beyond_positions(model, "max_new_tokens", last - 1))
    if options.get("output_memory_keys"):
        raise ValueError(
            "`output_memory_keys` must be left out of `generate`, got True: keys of tokens that were chosen are not kept; "
            "`model.stream(bank)` writes what leaves its window, and `forward` returns keys."
        )
    if setting("assistant_early_exit") is not None:
        raise ValueError(
            f"`assistant_early_exit` must be left out, got {got(setting('assistant_early_exit'))}: a side network can't stop "
            "at a layer; `assistant_model=model.backbone` drafts without it."
        )
    reads = options.pop("output_memory_reads", False)
    check_choices({}, reads)
    if not reads:
        return None
    if not setting("return_dict_in_generate"):
        raise ValueError(
            "`output_memory_reads=True` needs `return_dict_in_generate=True`, got False: ids alone hold no reads; add it."
        )
    options["output_memory_reads"] = collected = AllReads()
    return collected


def beyond_positions(model: LongMemModel, argument: str, tokens: int) -> str:
    """Return the sentence for more tokens than the backbone has learned positions for."""
    return (
        f"`{argument}` must end within the {model._backbone.position_limit} positions that {type(model.backbone).__name__} "
        f"has learned, got {tokens} tokens; memorize what is long, or use `model.stream(bank)`, which has no end."
    )


def is_integers(value: Any, or_flags: bool = False) -> bool:
    """Return whether a value is a tensor of integers, or of truth values where these will do."""
    return isinstance(value, Tensor) and not (
        value.is_floating_point() or value.is_complex() or (value.dtype == torch.bool and not or_flags)
    )


def described(value: Any) -> str:
    """Return how an error message shows a tensor, or what stands in its place."""
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else got(value)


def refuse_unknown_inputs(model: LongMemModel, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for arguments of `forward` that ask for what is not done; warn of those that nobody knows.

    Let through is a name of transformers' own, or of the backbone's `forward`, with a value that asks for nothing. A name that
    looks like a misspelling of ours, or that is given a memory, is refused; any other is a newer library's, and ignored.
    """
    theirs = {*TransformersKwargs.__annotations__, *signature(type(model.backbone).forward).parameters}
    ours = [name for name in signature(LongMemForCausalLM.forward).parameters if name not in ("self", "kwargs")]
    for name, value in kwargs.items():
        if name in STATES_OF_ONE_NETWORK and value:
            raise ValueError(
                f"`{name}={value}` is not available: two networks run. Use `output_memory_reads=True` to see what was read."
            )
        if name == "return_dict":
            check_choices({name: value}, False)
        elif name in theirs:
            # `generate` reads stop strings with the tokenizer and, in transformers 5, hands it on.
            if value is not None and not (value is False and name.startswith("output_")):
                raise ValueError(f"`forward` got `{name}`, which a LongMem model does not use; leave it out.")
        elif close := difflib.get_close_matches(name, ours, n=1, cutoff=0.75):
            raise ValueError(f"`forward` got `{name}`, which it does not have. Did you mean `{close[0]}`?")
        elif any(hasattr(each, "search") for each in (value if isinstance(value, list | tuple) else [value])):
            raise ValueError(f"`forward` got a memory as `{name}`; pass it as `memory`.")
        elif name != "tokenizer":
            warnings.warn(f"`forward` ignores `{name}`, which a LongMem model does not know.", stacklevel=3)


AutoConfig.register("longmem", LongMemConfig, exist_ok=True)
AutoModel.register(LongMemConfig, LongMemModel, exist_ok=True)
AutoModelForCausalLM.register(LongMemConfig, LongMemForCausalLM, exist_ok=True)
