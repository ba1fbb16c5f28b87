"""The frozen backbone at work: hidden states, position-free keys and values, and logits of given hidden states."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from longmem.backbone.cache_names import CACHE_NAMES, cache_argument
from longmem.backbone.interception import EnoughSeen, LayerCall, first, handled_by, split_call
from longmem.backbone.structure import (
    PROBE_LENGTH,
    BackboneStructure,
    UnsupportedBackboneError,
    computes_exactly,
    inspect_backbone,
    position_limit,
    probe_ids,
    same_logits,
)


@dataclasses.dataclass
class BackboneStates:
    """What one run of the backbone leaves for the side network and for memory.

    `hidden_states[l]` (`lanes tokens hidden`) enters layer l; index L is the output of the last layer and
    `final_states` the same after the final norm, when asked for. `keys` and `values` (`lanes kv_heads tokens dim`) are
    position-free and belong to the tokens of this run.
    """

    hidden_states: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    calls: dict[int, LayerCall] = dataclasses.field(default_factory=dict)
    keys: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    values: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    final_states: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class _Recording:
    numbers: Mapping[nn.Module, int]
    states: BackboneStates
    hidden_layers: Collection[int]
    passed_from: int  # layers from here on only say how they were called, and pass on what enters them


_recording: ContextVar[_Recording | None] = ContextVar("longmem_backbone_recording", default=None)


class Backbone:
    """A view of a frozen causal LM: what LongMem needs of it.

    A subclass may compute hidden states, keys or values in another way; `LongMemForCausalLM.backbone_view` takes it.

    Args:
        model: a causal LM of transformers; its parameters are frozen, and it is kept in eval mode from here on.

    Raises:
        UnsupportedBackboneError: something the memory needs is not there; the message says what.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.may_pass_layers = True  # False where layers do more than their calls say
        self._cache_name = cache_argument(model)
        self.freeze()
        try:
            self.structure: BackboneStructure = inspect_backbone(model)
            self._numbers = {layer.layer: number for number, layer in enumerate(self.structure.layers)}
            self.position_limit = position_limit(model)
            self._implementation = model.config._attn_implementation
            self._head = head_without_decoder(model, self.structure.decoder_name)
            watch_layers(self.structure)
            self._check_against_plain_forward()
        except UnsupportedBackboneError:
            raise
        except Exception as error:
            raise UnsupportedBackboneError(
                f"{type(model).__name__} could not be run over {PROBE_LENGTH} tokens and observed: "
                f"{type(error).__name__}: {error}"
            ) from error

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return len(self.structure.layers)

    def freeze(self) -> None:
        """Switch off training of every parameter and every training-time behaviour, whoever switched them on."""
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def make_ready(self) -> None:
        """Freeze again what somebody has made trainable; called before every run."""
        if self.model.training or any(parameter.requires_grad for parameter in self.model.parameters()):
            self.freeze()

    @torch.no_grad()
    def run(
        self,
        input_ids: Int[Tensor, "lanes tokens"],
        *,
        hidden_layers: Collection[int],
        memory_layers: Collection[int] = (),
        with_final_states: bool = False,
        **inputs: Any,
    ) -> BackboneStates:
        """Return hidden states of `hidden_layers`, layer calls, and keys and values of `memory_layers`; no LM head runs.

        Layers above all that is asked for are not computed: they only say how they were called.

        Args:
            input_ids: tokens to read.
            hidden_layers: layers whose input is kept; L means the output of the last one, before the final norm.
            memory_layers: layers whose keys and values are kept, position-free.
            with_final_states: also keep the last hidden state after the final norm.
            inputs: what the backbone's own forward takes (attention_mask, position_ids, cache, use_cache).
        """
        return self.observe(input_ids, hidden_layers, memory_layers, with_final_states, inputs)

    def observe(
        self,
        input_ids: Int[Tensor, "lanes tokens"],
        hidden_layers: Collection[int],
        memory_layers: Collection[int],
        with_final_states: bool,
        inputs: dict[str, Any],
    ) -> BackboneStates:
        """Return the same as `run`, in whatever gradient mode torch is."""
        states, layers = BackboneStates(), self.structure.layers
        cache = inputs.get("cache")
        handlers = {layers[layer].attention: self._keep_keys(states, layer, None, cache) for layer in memory_layers}
        passed_from = self.num_layers
        if self.may_pass_layers:
            first_slots = first_of_each_kind(cache, self.num_layers)
            passed_from = max([*hidden_layers, *(number + 1 for number in [*memory_layers, *first_slots]), 0])
            refuse_gaps(cache, passed_from)
        self._record(states, hidden_layers, handlers, input_ids, inputs, passed_from)
        if with_final_states:
            states.final_states = self.final_norm(states.hidden_states[self.num_layers])
        return states

    @torch.no_grad()
    def encode(
        self, input_ids: Int[Tensor, "lanes tokens"], memory_layers: Sequence[int], **inputs: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return position-free keys and values, each `lanes kv_heads tokens dim`, one of each per memory layer.

        The run ends at the keys of the highest memory layer: no later layer, no norm, no LM head is computed.
        """
        states, layers, highest = BackboneStates(), self.structure.layers, max(memory_layers)
        handlers = {layers[layer].attention: self._keep_keys(states, layer, highest) for layer in memory_layers}
        self._record(states, (), handlers, input_ids, {"use_cache": False, **inputs})
        return [states.keys[layer] for layer in memory_layers], [states.values[layer] for layer in memory_layers]

    def final_norm(
        self, hidden_states: Float[Tensor, "lanes tokens hidden"], modules: Iterable[nn.Module] | None = None
    ) -> Float[Tensor, "lanes tokens hidden"]:
        """Return the hidden states after what stands between the last layer and the LM head, or after `modules`."""
        for module in self.structure.final_modules if modules is None else modules:
            hidden_states = first(module(hidden_states))
        return hidden_states

    def logits(
        self,
        hidden_states: Float[Tensor, "lanes tokens hidden"],
        logits_to_keep: int | Tensor = 0,
        final_modules: Iterable[nn.Module] | None = None,
    ) -> Float[Tensor, "lanes kept vocabulary"]:
        """Return the logits of hidden states as they leave the last layer: final norm, LM head, the model's own scaling.

        `final_modules`: to run in place of the backbone's own final norm.
        """
        normed = self.head_inputs(hidden_states, final_modules)
        return self._head(inputs_embeds=normed, logits_to_keep=logits_to_keep, use_cache=False).logits

    def head_inputs(
        self, hidden_states: Float[Tensor, "lanes tokens hidden"], final_modules: Iterable[nn.Module] | None = None
    ) -> Float[Tensor, "lanes tokens hidden"]:
        """Return what the LM head is given: the hidden states after the final norm, in the backbone's dtype."""
        if final_modules is None:
            hidden_states = hidden_states.to(self.model.dtype)
        return self.final_norm(hidden_states, final_modules).to(self.model.dtype)

    def _record(
        self,
        states: BackboneStates,
        hidden_layers: Collection[int],
        handlers: Mapping[nn.Module, Callable[..., Any]],
        input_ids: Tensor,
        inputs: dict[str, Any],
        passed_from: int | None = None,
    ) -> None:
        self.make_ready()
        if self.model.config._attn_implementation != self._implementation:
            raise ValueError(
                "the attention implementation of the backbone must stay what it was when the model was made, "
                f'"{self._implementation}", got "{self.model.config._attn_implementation}"; '
                "load the backbone with the one you want and make the model anew."
            )
        named = {self._cache_name if name in CACHE_NAMES else name: value for name, value in inputs.items()}
        passed_from = self.num_layers if passed_from is None else passed_from
        token = _recording.set(_Recording(self._numbers, states, hidden_layers, passed_from))
        try:
            with contextlib.ExitStack() as stack:
                if handlers and torch.is_autocast_enabled(input_ids.device.type):
                    # What is stored is computed in the backbone's own dtype, which the encoder's recipe names.
                    stack.enter_context(torch.autocast(input_ids.device.type, enabled=False))
                stack.enter_context(handled_by(handlers))
                stack.enter_context(contextlib.suppress(EnoughSeen))
                self.model(input_ids, **named)
        finally:
            _recording.reset(token)

    def _keep_keys(
        self, states: BackboneStates, number: int, last: int | None, cache: Cache | None = None
    ) -> Callable[..., Any]:
        """Return an attention handler that keeps the new tokens' keys and values of a layer, and ends the run at `last`."""
        structure = self.structure.layers[number]

        def handler(
            local: Callable[..., Any],
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            **kwargs: Any,
        ) -> Any:
            # A cache prepends what it holds; one of fixed size has room behind it, one that slides holds less than it has seen.
            slot: Any = None if cache is None else cache.layers[number]
            stop = key.shape[2] if slot is None else min(int(slot.get_seq_length()), key.shape[2])
            new_keys, new_values = (each[:, :, stop - query.shape[2] : stop] for each in (key, value))
            if slot is not None:  # which may write the next tokens over these
                new_keys, new_values = new_keys.clone(), new_values.clone()
            if structure.rotation is not None:
                new_keys = structure.rotation.undo(new_keys, states.calls[number].position_embeddings)
            states.keys[number], states.values[number] = new_keys, new_values
            if number == last:
                raise EnoughSeen
            return local(module, query, key, value, attention_mask, **kwargs)

        return handler

    @torch.no_grad()
    def _check_against_plain_forward(self) -> None:
        """Raise if final norm and head, as found, do not give the model's own logits."""
        tokens = probe_ids(self.model)
        expected = self.model(tokens, use_cache=False).logits
        states = self.run(tokens, hidden_layers=[self.num_layers], use_cache=False)
        found = self.logits(states.hidden_states[self.num_layers])
        if not same_logits(found, expected, is_exact=computes_exactly(self.model)):
            raise UnsupportedBackboneError(
                f"{type(self.model).__name__}: logits computed from the last layer's output differ from the model's own "
                f"by {(found - expected).abs().max():.3g}; it does more between its last layer and its logits than a "
                f"norm and a head ({[type(module).__name__ for module in self.structure.final_modules]})."
            )


def watch_layers(structure: BackboneStructure) -> None:
    """Let the layers' inputs and the last one's output be recorded, once however many models share the backbone.

    The hooks are plain functions that know no model, so that a copied or reopened model records its own layers.
    """
    for layer in structure.layers:
        if not isinstance(layer.layer.forward, PassableForward):
            layer.layer.forward = PassableForward(layer.layer, layer.layer.forward)
        if _record_input not in layer.layer._forward_pre_hooks.values():
            layer.layer.register_forward_pre_hook(_record_input, with_kwargs=True)
    last = structure.layers[-1].layer
    if _record_output not in last._forward_hooks.values():
        last.register_forward_hook(_record_output)


def _record_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    recording = _recording.get()
    if recording is None or layer not in recording.numbers:
        return
    number = recording.numbers[layer]
    hidden_states, recording.states.calls[number] = split_call(args, kwargs)
    if number in recording.hidden_layers:
        recording.states.hidden_states[number] = hidden_states


def _record_output(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    recording = _recording.get()
    if recording is None or layer not in recording.numbers:
        return
    number = recording.numbers[layer] + 1
    if number in recording.hidden_layers:
        recording.states.hidden_states[number] = first(output)
    raise EnoughSeen


class PassableForward:
    """The `forward` of a decoder layer, which a run of the backbone may pass by: the layer then returns what enters it.

    Args:
        layer: the decoder layer.
        compute: its `forward` as it was.
    """

    def __init__(self, layer: nn.Module, compute: Callable[..., Any]) -> None:
        self.layer, self.compute = layer, compute
        self._others: int | None = None  # values that it returns beside the hidden states; None: no tuple
        functools.update_wrapper(self, compute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recording = _recording.get()
        if recording is not None and recording.numbers.get(self.layer, -1) >= recording.passed_from:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            return hidden_states if self._others is None else (hidden_states, *[None] * self._others)
        output = self.compute(*args, **kwargs)
        self._others = len(output) - 1 if isinstance(output, tuple) else None
        return output


def first_of_each_kind(cache: Any, num_layers: int) -> list[int]:
    """Return the first layer of each kind of cache slot: a cache says by these how much it holds, so they must be filled."""
    if cache is None:
        return []
    kinds: dict[type, int] = {}
    for number, slot in enumerate(cache.layers[:num_layers]):
        kinds.setdefault(type(slot), number)
    return list(kinds.values()) or [0]


def refuse_gaps(cache: Any, num_layers: int) -> None:
    """Raise ValueError if some of the first layers have less in the cache than others: they were passed by before."""
    slots = [] if cache is None else [slot for slot in cache.layers[:num_layers] if hasattr(slot, "get_seq_length")]
    lengths = [int(slot.get_seq_length()) for slot in slots]
    if lengths and min(lengths) < max(lengths):
        raise ValueError(
            "`output_memory_keys` or `config.num_neighbours` must be set from the first call with a cache on, got it later: "
            "layers that were not computed for the tokens before have nothing there; pass a new cache and the whole text."
        )


class _DecoderOutput(BaseModelOutputWithPast):
    """Output of a decoder that ran nothing: whatever else a head asks for (cross attentions, router logits) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _GivenHiddenStates(nn.Module):
    """Stands where the decoder was and returns the hidden states it is given; it has the decoder's other attributes."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self._decoder = [decoder]  # in a list: its parameters are registered once, in the model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_decoder"][0], name)

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=inputs_embeds)


def head_without_decoder(model: PreTrainedModel, decoder_name: str) -> nn.Module:
    """Return a shallow copy of the causal LM, sharing its weights, whose decoder passes `inputs_embeds` through.

    Calling it runs exactly what the architecture does after its decoder: LM head, scaling, soft capping.
    """
    *parents, last = decoder_name.split(".")
    root = parent = shallow_copy(model)
    for name in parents:
        parent._modules[name] = shallow_copy(parent.get_submodule(name))
        parent = parent.get_submodule(name)
    parent._modules[last] = _GivenHiddenStates(parent.get_submodule(last))
    return root


def shallow_copy(module: nn.Module) -> Any:
    """Return a module with the same parameters and submodules, whose submodules can be replaced on their own."""
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    clone.__dict__.pop("forward", None)  # accelerate's device hooks leave one that is bound to the original
    return clone
