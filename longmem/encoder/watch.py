"""The encoder of a model: its stamp and its sketch, computed when something has changed and not before."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from longmem.backbone.capture import Backbone
from longmem.backbone.structure import input_device
from longmem.configuration import LongMemConfig
from longmem.encoder.path import EncoderPath, encoder_path, hash_tensors
from longmem.encoder.sketch import Sketch, sketch
from longmem.encoder.stamp import EncoderStamp
from longmem.encoder.tripwire import Tripwire
from longmem.errors import StaleMemoryError

# Distance of a sink's key from that of the first token, as a share of that one's distance from the mean key. In SmolLM2-135M
# sinks are at 0.00 to 0.11, other tokens at 0.64 and more.
SINK_SHARE = 0.3


def leading_alike(keys: Float[Tensor, "lanes kv_heads tokens dim"]) -> Bool[Tensor, "lanes kv_heads tokens 1"]:
    """Return which tokens at the start of a window have keys like the first token's: that, and others behind it without a gap.

    Distances are to the first key, and are compared with its distance from the mean key, because most of a key can be that.

    >>> leading_alike(torch.tensor([[[[9.0, 0.0], [9.0, 0.5], [0.0, 1.0], [9.0, 0.0], [0.0, 0.0]]]])).flatten()
    tensor([ True,  True, False, False, False])
    """
    own, first = keys.float(), keys[:, :, :1].float()
    limit = SINK_SHARE * (first - own.mean(dim=2, keepdim=True)).norm(dim=-1)
    limit = limit.maximum(0.01 * first.norm(dim=-1))  # a copy, but for rounding, where all tokens are copies
    return ((own - first).norm(dim=-1) <= limit).cumprod(dim=2).bool().unsqueeze(-1)


def of_row(inputs: dict[str, Any], number: int) -> dict[str, Any]:
    """Return inputs of a forward pass for one of its rows."""
    return {
        name: value[number : number + 1] if isinstance(value, Tensor) and len(value) > 1 else value
        for name, value in inputs.items()
    }


class Encoder:
    """The encoder that a backbone is for the memory layers of a model.

    Args:
        backbone: what encodes.
        config: the model's; it says which layers and heads are stored, what stands before each window, and whether sinks,
            its first token and those directly behind whose keys are like that one's, are stored with a key of zero.
        recipe: returns what else determines what is stored.
    """

    is_moving = False  # one that moves at every step, a subclass, is sketched only where a refresh policy asks for it

    def __init__(
        self,
        backbone: Backbone,
        config: LongMemConfig,
        recipe: Callable[[], dict[str, Any]],
    ) -> None:
        self.backbone, self.config, self.recipe = backbone, config, recipe
        self.memory_layers = tuple(config.memory_layers or [0])
        self._tripwire: Tripwire | None = None
        self._stamp: EncoderStamp | None = None
        self._sketch: Sketch | None = None
        self._path: EncoderPath | None = None

    @property
    def path(self) -> EncoderPath:
        """Return the tensors that what is stored depends on."""
        if self._path is None:
            self._path = encoder_path(self.backbone, self.memory_layers)
        return self._path

    def encode(
        self, input_ids: Int[Tensor, "lanes tokens"], **inputs: Any
    ) -> tuple[list[Float[Tensor, "_ kv_heads tokens dim"]], list[Float[Tensor, "_ kv_heads tokens value_dim"]]]:
        """Return position-free keys and values of the tokens for each memory layer; each row is a window of text.

        `inputs`: of the backbone's forward, for these tokens. A row that begins with the start tokens is taken as it is.
        """
        ids = input_ids.to(input_device(self.backbone.model))
        # Without start tokens ids are not looked at, which a GPU would have to be waited for.
        begun = [not self.config.missing_start(row) for row in ids.tolist()] if self.config.start_token_ids else []
        if all(begun):
            return self.stored(*self.backbone.encode(ids, self.memory_layers, **inputs))
        if any(begun):
            rows = [self.encode(row[None], **of_row(inputs, number)) for number, row in enumerate(ids)]
            keys, values = ([torch.cat(layer) for layer in zip(*part, strict=True)] for part in zip(*rows, strict=True))
            return keys, values
        ids, inputs, places = self.with_start(ids, **inputs)
        stored = self.stored(*self.backbone.encode(ids, self.memory_layers, **inputs))
        keys, values = (
            [layer.gather(2, places[:, None, :, None].expand(-1, layer.shape[1], -1, layer.shape[3])) for layer in part]
            for part in stored
        )
        return keys, values

    def with_start(
        self, input_ids: Int[Tensor, "lanes tokens"], **inputs: Any
    ) -> tuple[Int[Tensor, "lanes longer"], dict[str, Any], Int[Tensor, "lanes tokens"]]:
        """Return windows of text behind the model's start tokens, which stand behind padding on the left.

        With them come inputs of the backbone's forward made as long, and where the windows' own tokens stand.
        """
        count, (lanes, tokens) = len(self.config.start_token_ids or ()), input_ids.shape
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        for name, value in (("attention_mask", mask), ("position_ids", positions)):
            if count and value is not None and value.ndim != 2:
                raise ValueError(
                    f"`{name}` must have the axes (lanes, tokens) where the model has `start_token_ids`, got shape "
                    f"{tuple(value.shape)}; leave it out, or encode each window by itself."
                )
        first = input_ids.new_zeros(lanes, 1) if mask is None else mask.long().argmax(dim=1, keepdim=True)
        new, own = (torch.arange(size, device=input_ids.device) for size in (count, tokens))
        places = own + count * (own >= first)

        def longer(rows: Tensor, begin: Tensor) -> Tensor:
            made = rows.new_empty(lanes, tokens + count).scatter_(1, places, rows.expand(lanes, -1))
            return made.scatter_(1, first + new, begin.to(rows).expand(lanes, -1))

        if mask is not None:
            inputs["attention_mask"] = longer(mask, torch.ones_like(new))
        if positions is not None:
            whole = positions.expand(lanes, -1)
            inputs["position_ids"] = longer(whole + count, whole.gather(1, first) + new)
        return longer(input_ids, input_ids.new_tensor(self.config.start_token_ids or [])), inputs, places

    def stored(
        self,
        keys: Sequence[Float[Tensor, "_ kv_heads tokens dim"]],
        values: Sequence[Float[Tensor, "_ kv_heads tokens value_dim"]],
        *,
        is_start: bool = True,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return of all memory layers' keys and values what is stored; `is_start`: they are of tokens that begin a window."""
        if self.config.memory_heads is not None and keys:
            keys, values = (
                [layer[:, heads] for layer, heads in zip(part, self.config.memory_heads, strict=True)]
                for part in (keys, values)
            )
        return self.without_sinks(keys) if is_start else list(keys), list(values)

    def without_sinks(self, keys: Sequence[Float[Tensor, "_lanes _kv_heads tokens _dim"]]) -> list[Tensor]:
        """Return keys that begin a window as they are stored: those of sinks are zero, if sinks are forgotten."""
        return [layer.masked_fill(leading_alike(layer), 0) if self.config.forget_sinks else layer for layer in keys]

    @torch.compiler.disable
    def stamp(self, *, exact: bool = False) -> EncoderStamp:
        """Return the encoder's stamp, made anew (1.4 s per GB of weights) if the tripwire sees a change, or if `exact`."""
        if exact or self._stamp is None or self.was_touched():
            self._watch_anew()
            self._stamp = EncoderStamp(hash_tensors(self.path.tensors()), self.recipe())
        return self._stamp

    def was_touched(self) -> bool:
        """Return whether the tripwire sees a change since the stamp was made; true before the first stamp."""
        return self._tripwire is None or self._tripwire.changed() is not None

    def stamp_for_reading(self) -> EncoderStamp:
        """Return the encoder's stamp, after a look at whether it stays what it is, as `refuse_trainable` does."""
        known, tripwire = self._stamp, self._tripwire
        if not (known is None or tripwire is None or self.is_moving or tripwire.trainable() or tripwire.changed()):
            return known
        # Before the stamp: to make one anew the backbone is run, which freezes it, and nobody would hear of it.
        self.refuse_trainable()
        stamp = self.stamp()
        self.refuse_trainable()
        return stamp

    def sketch(self) -> Sketch:
        """Return the sketch of the encoder's weights as they are now; see `longmem/encoder/sketch.py`."""
        if self.was_touched():
            self.stamp()
        if self._sketch is None:
            self._sketch = sketch(self.path.tensors())
        return self._sketch

    def refuse_trainable(self) -> None:
        """Raise StaleMemoryError if a weight of the encoder requires a gradient, or a module of it is in training mode."""
        if self._tripwire is not None and (sign := self._tripwire.trainable()) is not None:
            raise StaleMemoryError(
                f"the encoder must stay frozen and in eval mode while its memory is read, but {sign}: after the next step "
                "of an optimizer, or with dropout, stored keys would be another encoder's. Call `model.requires_grad_()` and "
                "`model.train()` on the LongMem model, which leave the backbone as it is."
            )

    def refuse_moved(self, since: EncoderStamp) -> None:
        """Raise StaleMemoryError if the encoder is another one than that of an earlier stamp, by a hash of all its weights."""
        now = self.stamp(exact=True)
        if now.digest != since.digest:
            raise StaleMemoryError(
                f"the backbone must not move in training, but its encoder was {since.digest} when the run began and is "
                f"{now.digest} now; they differ in {', '.join(since.diff(now))}. What this run has learned was read from "
                "memories that the backbone would not write again: leave its weights alone."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy starts with: nothing of the original's modules."""
        return {**self.__dict__, **dict.fromkeys(("_tripwire", "_stamp", "_sketch", "_path"))}

    def _watch_anew(self) -> None:
        # Modules may have been replaced (adapters), so the path itself is looked for again.
        self._path = self._sketch = None
        self._tripwire = Tripwire(self.path)
