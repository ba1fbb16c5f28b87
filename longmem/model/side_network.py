"""The trainable residual side network: copies of backbone layers, cross-network residuals, layers that read memory."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from longmem.backbone.capture import Backbone, BackboneStates
from longmem.backbone.interception import LayerCall, handled_by, local_implementation
from longmem.backbone.structure import LayerStructure, UnsupportedBackboneError
from longmem.configuration import LongMemConfig
from longmem.memory.protocols import EncodingModel, Memory
from longmem.memory.visibility import READING, end_pass
from longmem.model.attention import MemoryRead
from longmem.model.copies import ModuleCopier
from longmem.model.lora import adapter_names, add_adapters, merge_adapters
from longmem.model.memory_attention import MemoryReader, Turns
from longmem.model.neighbours import Neighbours, neighbours_of

# The learned numbers of a layer, by the ends of their names. They may learn at a rate of their own.
OF_MEMORY = ("memory_bias", "memory_null", "memory_log_distance")  # how much is read, and as if from how far
GATES = (*OF_MEMORY, "output_scale")  # and how much the layer adds
end_outside_of_graphs = torch.compiler.disable(end_pass)  # reads are counted under locks


class SideLayer(nn.Module):
    """One side layer: a copy of a backbone layer, perhaps reading memory, perhaps with a learned output scale.

    Args:
        config: the model's configuration.
        number: i, the number of this side layer; it is a copy of backbone layer `config.source_layer(i)`.
        source: that backbone layer.
        copier: what makes the copy.
        cache_slot: layer index that this layer's keys and values take in the shared cache.
    """

    def __init__(
        self, config: LongMemConfig, number: int, source: LayerStructure, copier: ModuleCopier, cache_slot: int
    ) -> None:
        super().__init__()
        self.layer, attention = copier.layer(source, cache_slot)
        self.source_layer = config.source_layer(number)
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Tensor] = checkpoint
        self.memory_layer = config.memory_layer_of(number)
        self.config = config
        self.reading_heads = None if self.memory_layer is None else config.heads_of(self.memory_layer)
        self._attention = [attention]  # in a list: it is registered once, inside `layer`
        self._source = source
        self.memory_bias: nn.Parameter | None = None
        self.memory_null: nn.Parameter | None = None
        self.memory_log_distance: nn.Parameter | None = None
        if self.memory_layer is not None:
            refuse_local_implementation(config, attention)
            start = torch.full((source.num_heads,), float(config.memory_bias_init or 0.0))
            self.memory_bias = nn.Parameter(start.to(next(self.layer.parameters()).device))
            if config.memory_null_init is not None:
                self.memory_null = nn.Parameter(torch.full_like(self.memory_bias, float(config.memory_null_init)))
            if config.distance_per == "head" and source.rotation is not None:
                log_distance = math.log(min(config.memory_distance, source.reach or config.memory_distance))
                self.memory_log_distance = nn.Parameter(torch.full_like(self.memory_bias, log_distance))
        self.output_scale: nn.Parameter | None = None
        if config.init == "identity":
            self.output_scale = nn.Parameter(
                next(self.layer.parameters()).new_zeros(config.get_text_config().hidden_size)
            )

    @property
    def num_kv_heads(self) -> int:
        """The key-value heads of this layer, whether they read or not."""
        return self._source.num_kv_heads

    @property
    def attention(self) -> nn.Module:
        """The module of this layer that attends."""
        return self._attention[0]

    def forward(
        self,
        hidden_states: Float[Tensor, "lanes tokens hidden"],
        call: LayerCall,
        memory: Sequence[Memory] | None,
        turns: Turns | None = None,
    ) -> tuple[Float[Tensor, "lanes tokens hidden"], MemoryRead | None]:
        """Return the layer's output, without the cross-network residual, and what it read.

        Args:
            hidden_states: what enters the layer.
            call: how the backbone called the layer that this one copies.
            memory: one bank for each lane, or None to read nothing.
            turns: shared by the layers of one pass (`MemoryReader`).
        """
        reader = None
        if memory is not None and self.memory_bias is not None and self.memory_layer is not None:
            positions = call.position_embeddings if self._source.rotation is not None else None
            reader = MemoryReader(
                self.config,
                self.memory_layer,
                self._source,
                self.memory_bias,
                memory,
                positions,
                self.memory_null,
                self.reading_heads,
                turns,
                self.memory_log_distance,
            )
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # Around all of it: in the backward pass, the handler would no longer be there for a layer that recomputes
            # itself alone.
            output = self._gradient_checkpointing_func(self._compute, hidden_states, call, reader)
        else:
            output = self._compute(hidden_states, call, reader)
        return output, None if reader is None else reader.read

    def _compute(self, hidden_states: Tensor, call: LayerCall, reader: MemoryReader | None) -> Tensor:
        if reader is None:
            output = call.replay(self.layer, hidden_states)
        else:
            with handled_by({self.attention: reader}):
                output = call.replay(self.layer, hidden_states)
        if self.output_scale is not None:
            output = hidden_states + self.output_scale.to(output.dtype) * (output - hidden_states)
        return output


class SideNetwork(nn.Module):
    """The residual side network (LongMem, section 2.2), fed by the backbone's hidden states.

    Args:
        config: the model's configuration.
        backbone: the frozen model, whose modules are copied.
    """

    def __init__(self, config: LongMemConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        layers = backbone.structure.layers
        dtype = None if config.side_network_dtype is None else getattr(torch, config.side_network_dtype)
        copier = ModuleCopier(
            backbone.model, config.side_layer_options or {}, dtype, share_matrices=config.lora is not None
        )
        self.layers = nn.ModuleList(
            SideLayer(config, number, layers[config.source_layer(number)], copier, cache_slot=len(layers) + slot)
            for slot, number in enumerate(config.side_layers)
        )
        # Backbone layer whose input enters the first side layer, and the numbers of the layers that are built.
        self.num_backbone_layers = len(layers)
        self.entry, self.numbers = config.layer_reduction_factor * config.first_side_layer, list(config.side_layers)
        self.final_modules: nn.ModuleList | None = None
        if config.final_norm == "side":
            self.final_modules = copier.modules(backbone.structure.final_modules)
        if config.lora is not None:
            add_adapters(self.layers, config.lora)
            super().requires_grad_(False)  # the final norm too
            self.requires_grad_(True)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return, by name, what training may change: every weight or, with LoRA, adapters and gates."""
        floating = {name: weight for name, weight in self.named_parameters() if weight.is_floating_point()}
        if self.config.lora is None:
            return floating
        adapters = adapter_names(self)
        return {name: weight for name, weight in floating.items() if name in adapters or name.endswith(GATES)}

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set whether `trained_parameters` are trained; False freezes every other weight as well."""
        if not requires_grad:
            return super().requires_grad_(False)
        for weight in self.trained_parameters().values():
            weight.requires_grad_(True)
        return self

    def merge_lora(self) -> None:
        """Fold the adapters into the copied weights, all of which can be trained from then on.

        Raises:
            ValueError: the network has no adapters.
        """
        if self.config.lora is None:
            raise ValueError("`merge_lora` needs a model with LoRA, got `config.lora` None: there is nothing to merge.")
        for module in self.modules():  # the backbone's own matrices must stay as they are
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
        merge_adapters(self)
        self.config.lora = None
        self.requires_grad_(True)

    @property
    def hidden_layers(self) -> set[int]:
        """The backbone's hidden states that the side network needs: numbers of the layers they enter, L for the last."""
        return {self.entry, *(end for number in self.numbers for end in self.residual_ends(number))}

    def residual_ends(self, number: int) -> tuple[int, ...]:
        """Return (to, from): side layer i is followed by adding `h[to] - h[from]`; empty when nothing lies between."""
        factor = self.config.layer_reduction_factor
        start = factor * number + (1 if self.config.residual == "substitute" else 0)
        end = factor * (number + 1)
        return () if start == end else (end, start)

    def forward(
        self,
        states: BackboneStates,
        memory: Sequence[Memory] | None = None,
        reader: EncodingModel | None = None,
        predicted: int | Tensor | None = None,
    ) -> tuple[Float[Tensor, "lanes tokens hidden"], list[MemoryRead], Neighbours | None]:
        """Return the hidden states that replace the backbone's last ones, before its final norm, what was read, and neighbours.

        Of each bank one state is read, from the first search to the last gather, which may be in the backward pass.

        Args:
            states: hidden states and layer calls of the backbone for the same tokens.
            memory: one bank for each lane, or None to read nothing.
            reader: the model for which the banks were made ready; None: the last for which this thread has done so.
            predicted: the tokens behind which neighbours predict, by keys and values in `states`: so many last ones, 0 for
                all, or those at these places; None: none do.
        """
        if memory is None:
            return *self._run(states, None), None
        taken: dict[Any, Any] = {}
        token = READING.set((reader, taken))
        try:
            is_empty = holds_nothing(memory)
            hidden_states, reads = self._run(states, None if is_empty else memory)
            if predicted is None or is_empty:
                return hidden_states, reads, None
            features = {layer: (states.keys[layer], states.values[layer]) for layer in states.keys}
            return hidden_states, reads, neighbours_of(features, memory, self.config.num_neighbours, predicted)
        finally:
            end_outside_of_graphs(token, taken)

    def _run(self, states: BackboneStates, memory: Sequence[Memory] | None) -> tuple[Tensor, list[MemoryRead]]:
        dtype = self.dtype
        reads: list[MemoryRead] = []
        turns: Turns = {}
        start = states.hidden_states[self.entry]
        hidden_states = start.to(dtype)
        for number, layer in zip(self.numbers, self.layers, strict=True):
            source: int = layer.source_layer  # type: ignore[assignment]
            call = states.calls[source].in_dtype(dtype, computed_in=start.dtype)
            hidden_states, read = layer(hidden_states, call, memory, turns)
            if read is not None:
                reads.append(read)
            if ends := self.residual_ends(number):
                upper, lower = ends
                # To the dtype of the side network, and to where the last layer was placed.
                passed, skipped = self._upper_state(states, upper), states.hidden_states[lower]
                hidden_states = hidden_states + (passed.to(hidden_states) - skipped.to(hidden_states))
        return hidden_states, reads

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the side network computes: that of its weights."""
        return next(parameter.dtype for name, parameter in self.named_parameters() if "memory_" not in name)

    def _upper_state(self, states: BackboneStates, number: int) -> Tensor:
        if states.final_states is not None and number == self.num_backbone_layers:
            return states.final_states
        return states.hidden_states[number]


@torch.compiler.disable  # banks take locks
def holds_nothing(memory: Sequence[Memory]) -> bool:
    """Return whether every bank is empty."""
    return all(bank.is_empty for bank in memory)


def refuse_local_implementation(config: LongMemConfig, attention: nn.Module) -> None:
    """Raise if joint fusion can't be computed by the attention implementation the backbone was loaded with."""
    name = local_implementation(attention)
    if config.fusion == "joint" and name not in ("sdpa", "eager"):
        raise UnsupportedBackboneError(
            f'`fusion="joint"` needs a backbone loaded with attn_implementation "sdpa" or "eager", got "{name}"; '
            'load it with one of them, or use `fusion="gated"`, which works with any.'
        )


def add_side_slots(cache: Cache, num_layers: int, source_layers: Iterable[int]) -> None:
    """Give a cache made for the backbone one more slot per side layer, of the kind its source layer has.

    One cache for both networks means that beams, cropping and batch selection reach both. A cache without fixed
    layers grows by itself.

    Raises:
        ValueError: the backbone alone has already filled the cache.
    """
    if len(cache.layers) != num_layers:
        return
    if cache.get_seq_length() > 0:
        raise ValueError(
            "`cache` holds the backbone's keys but none of the side network; "
            "pass a new `DynamicCache` (or None) and the whole text."
        )
    cache.layers.extend(copy.deepcopy(cache.layers[source]) for source in source_layers)
