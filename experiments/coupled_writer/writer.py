"""A backbone that is trained along with its reader: what LongMem avoids, for comparison and for those who want it.

In Memorizing Transformers (arXiv 2203.08913) the same weights write and read, and both are trained, so what was written
before a step is not what would be written after it. Here the gradient reaches the backbone through the hidden states that the
side network takes from it (entry, residuals, LM head). What is stored is cut off from it.

    writer = couple(model)
    optimizer = torch.optim.AdamW([*model.side_network.parameters(), *writer.parameters.values()])
    ...
    optimizer.step()
    writer.moved()  # after every step: what is stored so far is one version older

From here on what is in a bank goes stale, and its refresh policy says what is done about that. The default refuses what an
earlier version of the writer wrote; `longmem.memory.refresh.UNBOUNDED` reads it as it is.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from longmem.backbone.cache_names import CACHE_NAMES
from longmem.backbone.capture import Backbone, BackboneStates
from longmem.encoder.stamp import EncoderStamp
from longmem.encoder.tripwire import Tripwire
from longmem.encoder.watch import Encoder
from longmem.model.modeling import LongMemForCausalLM


class CoupledWriter(Backbone):
    """A view of a model's backbone that lets it be trained; `couple` puts it in place.

    `parameters` are what is trained, by their names in the backbone; `version` is the number of times they moved; `average`
    is a moving average of the backbone that writes in its stead, or None.

    Args:
        model: whose backbone this is.
        decay: of the moving average; None: the trained backbone itself writes.
    """

    def __init__(self, model: LongMemForCausalLM, decay: float | None) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.decay, self.version = decay, 0
        self.average = None if decay is None else Backbone(copy.deepcopy(model.backbone))
        super().__init__(model.backbone)
        hidden_layers, config = model.side_network.hidden_layers, model.config
        adds_last = config.residual_states == "post_norm" and self.num_layers in hidden_layers
        final_norm = config.final_norm != "side" or adds_last
        self.parameters = parameters_of_states(self, hidden_layers, final_norm=final_norm)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        before = model.encoder
        self.encoder = MovingEncoder(self.average or self, before.config, before.recipe)

    # What a backbone does, with gradients ------------------------------------------------------------------------------

    def make_ready(self) -> None:
        """Keep the backbone in eval mode (no dropout), and its parameters trained.

        Raises:
            ValueError: something has frozen them.
        """
        self.model.eval()
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:
                raise ValueError(
                    f"the backbone's parameter {name} must stay trainable while the writer is coupled, but something has "
                    "frozen it, such as another model that shares the backbone; give each model a backbone of its own, or "
                    "call `decouple` first."
                )

    def run(
        self,
        input_ids: Int[Tensor, "lanes tokens"],
        *,
        hidden_layers: Collection[int],
        memory_layers: Collection[int] = (),
        with_final_states: bool = False,
        **inputs: Any,
    ) -> BackboneStates:
        """Return what a frozen backbone does; hidden states carry gradients, keys and values never do.

        Raises:
            ValueError: a moving average writes and the backbone was given a cache, which the average could not go on from.
        """
        states = self.observe(input_ids, hidden_layers, memory_layers, with_final_states, inputs)
        if self.average is not None and states.keys:
            self._let_average_write(states, input_ids, inputs)
        for part in (states.keys, states.values):
            part.update({layer: tensor.detach() for layer, tensor in part.items()})
        return states

    def encode(
        self, input_ids: Int[Tensor, "lanes tokens"], memory_layers: Sequence[int], **inputs: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return keys and values of whatever writes: the average, or the trained backbone itself."""
        if self.average is not None:
            return self.average.encode(input_ids, memory_layers, **inputs)
        return super().encode(input_ids, memory_layers, **inputs)

    def _let_average_write(self, states: BackboneStates, input_ids: Tensor, inputs: dict[str, Any]) -> None:
        if any(inputs.get(name) is not None for name in CACHE_NAMES):
            raise ValueError(
                "`cache` must be None while a moving average of the backbone writes memory, got a cache; pass "
                "`use_cache=False` or, when training is over, call `decouple`."
            )
        assert self.average is not None
        layers = list(states.keys)
        keys, values = self.average.encode(input_ids, layers, **inputs)
        states.keys, states.values = dict(zip(layers, keys, strict=True)), dict(zip(layers, values, strict=True))

    # Moving ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def moved(self) -> None:
        """Take note that an optimizer has just moved the parameters: what is stored so far is one version older.

        The average follows: `decay * average + (1 - decay) * parameter`.
        """
        self.version += 1
        if self.average is not None and self.decay is not None:
            for name, parameter in self.parameters.items():
                self.average.model.get_parameter(name).lerp_(parameter, 1 - self.decay)
        self.encoder.note_move()

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a checkpoint needs, by name: the parameters and, if there is one, their average."""
        found: dict[str, Tensor] = {f"parameters.{name}": parameter for name, parameter in self.parameters.items()}
        if self.average is not None:
            found |= {f"average.{name}": self.average.model.get_parameter(name) for name in self.parameters}
        return {name: tensor.detach() for name, tensor in found.items()}

    def numbers(self) -> dict[str, Any]:
        """Return what else a checkpoint needs: the version, and the name of the encoder with the number of its moves."""
        return {"version": self.version, "encoder": self.encoder.name, "moves": self.encoder.moves}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Go on as the writer whose `tensors` and `numbers` these are."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.version = numbers["version"]
        self.encoder.go_on(numbers["encoder"], numbers["moves"])


class MovingEncoder(Encoder):
    """An encoder that moves on purpose: named by a word and the number of its moves, because hashing each would be dear."""

    is_moving = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.name, self.moves = secrets.token_hex(8), 0
        self.note_move()  # from being frozen to being trained

    def stamp(self, *, exact: bool = False) -> EncoderStamp:
        """Return the stamp of the last move; a change that nobody told of is a move of its own."""
        if self._stamp is None or self.was_touched():
            self.note_move()
        assert self._stamp is not None
        return self._stamp

    def note_move(self) -> None:
        """Count a move."""
        self.go_on(self.name, self.moves + 1)

    def go_on(self, name: str, moves: int) -> None:
        """Be the encoder of this name after so many moves."""
        self.name, self.moves = name, moves
        # An optimizer writes to weights and replaces nothing: path and recipe stay what they were.
        self._tripwire, self._sketch = Tripwire(self.path), None
        recipe = self.recipe() if self._stamp is None else self._stamp.recipe
        self._stamp = EncoderStamp(f"{name}+{moves}", {**recipe, "moves": moves})

    def refuse_trainable(self) -> None:
        """Do nothing: it is trained on purpose."""

    def refuse_moved(self, since: EncoderStamp) -> None:
        """Do nothing: it moves on purpose."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy starts with: a name of its own, for it moves by itself."""
        return {**super().__getstate__(), "name": secrets.token_hex(8)}


def couple(model: LongMemForCausalLM, *, average: float | None = None) -> CoupledWriter:
    """Let the backbone be trained too, and return the writer, whose `parameters` an optimizer is to be given.

    Call this when the model is on its device. Save the model with `save_backbone=True`; its average is not written.

    Args:
        model: whose backbone is trained from here on: every parameter that hidden states and logits depend on.
        average: decay of an exponential moving average of the backbone, such as 0.999 (the momentum encoder of MoCo, arXiv
            1911.05722). The average then writes everything that is stored, in a forward pass of its own, and the trained
            backbone gives hidden states alone. None: the trained backbone writes.

    Raises:
        ValueError: the writer is coupled already, `average` is not between 0 and 1, or the backbone is not in float32.
    """
    if isinstance(model.backbone_view, CoupledWriter):
        raise ValueError("`couple` needs a frozen writer, but it is coupled; call `decouple` first.")
    if average is not None and not 0 < average < 1:
        raise ValueError(
            f"`average` must be above 0 and below 1, got {average}; 0.999 is usual, None lets the trained backbone write."
        )
    writer = CoupledWriter(model, average)
    model.backbone_view, model.encoder = writer, writer.encoder
    model.backbone_was_trained = True
    return writer


def decouple(model: LongMemForCausalLM) -> LongMemForCausalLM:
    """Freeze the backbone as it is now, and return the model; the backbone writes from here on, its average is dropped.

    It is another encoder than the one that wrote banks before, and their refresh policies treat it so.
    """
    model.backbone_view = Backbone(model.backbone)
    return model


def parameters_of_states(
    backbone: Backbone, hidden_layers: Collection[int], *, final_norm: bool
) -> dict[str, nn.Parameter]:
    """Return, by name, the parameters that hidden states of some layers and the logits depend on.

    Layers above the highest of those hidden states are left out: the side network computes in their stead.

    Args:
        backbone: whose parameters these are.
        hidden_layers: numbers of the layers that the hidden states enter; L stands for the output of the last one.
        final_norm: whether the backbone's own final norm is used.

    Raises:
        ValueError: some of them cannot be trained: quantized, in half precision or offloaded.
    """
    structure = backbone.structure
    border = max(hidden_layers)
    unused: list[nn.Module] = [layer.layer for layer in structure.layers[border:]]
    unused += [] if final_norm else structure.final_modules
    used: list[nn.Module] = [layer.layer for layer in structure.layers[:border]]
    left_out = ids_of(unused) - ids_of(used)  # a few architectures share weights between layers
    found = {name: weight for name, weight in backbone.model.named_parameters() if id(weight) not in left_out}
    for name, weight in found.items():
        if weight.dtype not in (torch.float32, torch.float64) or weight.is_meta:
            state = "offloaded" if weight.is_meta else f"of dtype {weight.dtype}"
            raise ValueError(
                f"the backbone must be on its devices in float32 to be trained, which keeps small updates, but {name} is "
                f"{state}; load it with `dtype=torch.float32`, without quantization and offloading."
            )
    return found


def ids_of(modules: Collection[nn.Module]) -> set[int]:
    """Return what tells the parameters of some modules from all others."""
    return {id(weight) for module in modules for weight in module.parameters()}
