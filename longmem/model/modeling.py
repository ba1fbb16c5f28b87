"""LongMemForCausalLM: frozen backbone, memory and side network behind the usual causal-LM interface."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import TransformersKwargs

from longmem.backbone.cache_names import as_keyword, one_cache
from longmem.backbone.capture import BackboneStates
from longmem.backbone.structure import UnsupportedBackboneError, computes_exactly, probe_ids, same_logits
from longmem.configuration import LongMemConfig
from longmem.memory import MemoryBank
from longmem.memory.finding import FindableMemory, FoundPassage, validate_count
from longmem.memory.memorize import Memorized, memorize
from longmem.memory.protocols import Memory
from longmem.model.attention import MemoryRead
from longmem.model.memory_attention import banks_per_lane, refuse_other_encoder
from longmem.model.pretrained import LongMemPreTrainedModel
from longmem.model.reads import in_pieces, of_one_state, passages_read, table_of_reads
from longmem.model.side_network import add_side_slots
from longmem.streaming import MemoryStream, start_stream


@dataclasses.dataclass
class LongMemOutput(CausalLMOutputWithPast):
    """Output of a LongMem model.

    Beside the usual fields: `memory_keys` and `memory_values`, where asked for one tensor `lanes kv_heads tokens dim` per
    memory layer, position-free, of the tokens just read, for the caller to write; `memory_reads`, one `MemoryRead` per
    reading layer.
    """

    memory_keys: tuple[Tensor, ...] | None = None
    memory_values: tuple[Tensor, ...] | None = None
    memory_reads: tuple[MemoryRead, ...] | None = None


class LongMemForCausalLM(LongMemPreTrainedModel, GenerationMixin):
    """A causal LM with long-term memory (LongMem, arXiv 2306.07174).

    Make one with `from_backbone` (new side network) or `from_pretrained` (saved side network). Only the side network is
    trained and saved; the backbone is frozen and in eval mode whatever mode the model is in.

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
        if kwargs:
            refuse_unknown_inputs(self.backbone, kwargs)
        cache = one_cache(cache, past_key_values)
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
        inputs: dict[str, Any] = {"use_cache": cache is not None, "attention_mask": attention_mask, "cache": cache}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        states = self.run_backbone(input_ids, with_keys=output_memory_keys, **inputs)
        hidden_states, reads = self.side_network(states, banks, self)
        logits = self._backbone.logits(hidden_states, logits_to_keep, self.side_network.final_modules)
        loss = None
        if labels is not None:
            shared = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **shared)
        return LongMemOutput(
            loss=loss,
            logits=logits,
            memory_keys=tuple(states.keys.values()) if output_memory_keys else None,
            memory_values=tuple(states.values.values()) if output_memory_keys else None,
            # Without `found`, which keeps for whoever holds it what a bank has since given up.
            memory_reads=tuple(replace(read, found=()) for read in reads) if output_memory_reads else None,
            **as_keyword(cache),
        )

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
        hidden_layers = self.side_network.hidden_layers
        with_final_states = self.config.residual_states == "post_norm" and self._backbone.num_layers in hidden_layers
        cache = inputs.get("cache")
        is_start = cache is None or not cache.get_seq_length()
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

    @torch.no_grad()
    def find(self, memory: FindableMemory, text: str, k: int = 10) -> list[FoundPassage]:
        """Return the `k` passages of a memory that the reading heads single out for a text, best first; see `bank.find`."""
        ids = torch.tensor([self.tokenizer(text)["input_ids"]], device=self.input_device, dtype=torch.int64)
        if not text or not ids.numel():
            raise ValueError(f"`text` must hold at least one token, got {text!r}.")
        validate_count(k)

        def read() -> list[FoundPassage]:
            pieces = in_pieces(self, ids, self.config.segment_length, memory, logits_to_keep=1)
            reads = table_of_reads([each.memory_reads for each in pieces], ids.shape[1])
            return passages_read(reads, memory, k, self.tokenizer)

        return of_one_state(memory, read)

    # Writing -----------------------------------------------------------------------------------------------------------

    def encode(
        self, input_ids: Int[Tensor, "lanes tokens"], **inputs: Any
    ) -> tuple[list[Float[Tensor, "_ kv_heads tokens dim"]], list[Float[Tensor, "_ kv_heads tokens value_dim"]]]:
        """Return position-free keys and values of the tokens, one of each per memory layer, without gradients."""
        return self.encoder.encode(input_ids, **inputs)

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

    @torch.no_grad()
    def _check_against_backbone(self) -> None:
        """Raise if copies of the backbone's layers, called as the backbone calls its own, do not give its logits."""
        tokens = probe_ids(self.backbone)
        expected = self.backbone(tokens, use_cache=False).logits
        is_exact = computes_exactly(self.backbone) and self.side_network.dtype == torch.float32
        try:
            found = self(tokens).logits
        except Exception:  # whatever an architecture makes of layers that return what they were given
            found = torch.full_like(expected, torch.nan)
        if not same_logits(found, expected, is_exact):
            self._backbone.may_pass_layers = False
            found = self(tokens).logits
        if not same_logits(found, expected, is_exact):
            raise UnsupportedBackboneError(
                f"{type(self.backbone).__name__}: copies of its upper layers give logits that differ from its own by "
                f"{(found - expected).abs().max():.3g}; its layers do more than their arguments say."
            )


def refuse_unknown_inputs(backbone: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Raise for arguments of `forward` that would be ignored; what transformers hands to every model is let through.

    That is: a name of transformers' own, or of the backbone's `forward`, with a value that asks for nothing.
    """
    theirs = {*TransformersKwargs.__annotations__, *signature(type(backbone).forward).parameters}
    for name, value in kwargs.items():
        if name in ("output_attentions", "output_hidden_states") and value:
            raise ValueError(
                f"`{name}={value}` is not available: two networks run. Use `output_memory_reads=True` to see what was read."
            )
        # `generate` reads stop strings with the tokenizer and, in transformers 5, hands it on.
        asks_for_nothing = value is None or (value is False and name.startswith("output_"))
        if name not in ("tokenizer", "return_dict") and not (name in theirs and asks_for_nothing):
            raise ValueError(f"`forward` got `{name}`, which a LongMem model does not use; leave it out.")


AutoConfig.register("longmem", LongMemConfig, exist_ok=True)
AutoModelForCausalLM.register(LongMemConfig, LongMemForCausalLM, exist_ok=True)
