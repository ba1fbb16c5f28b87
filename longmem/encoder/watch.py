"""The encoder of a model: its stamp and its sketch, computed when something has changed and not before."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from longmem.backbone.capture import Backbone
from longmem.backbone.structure import input_device
from longmem.encoder.sketch import Sketch, sketch
from longmem.encoder.stamp import EncoderPath, EncoderStamp, encoder_path, hash_tensors
from longmem.encoder.tripwire import Tripwire
from longmem.errors import StaleMemoryError


class Encoder:
    """Return the encoder that `backbone` is for some memory layers, under watch.

    Args:
        backbone: whose path to these layers is watched.
        memory_layers: layers whose keys and values are stored.
        recipe: what else determines what is stored; called when a stamp is made.
    """

    def __init__(self, backbone: Backbone, memory_layers: Sequence[int], recipe: Callable[[], dict[str, Any]]) -> None:
        self._backbone, self._layers, self._recipe = backbone, tuple(memory_layers), recipe
        self._tripwire: Tripwire | None = None
        self._stamp: EncoderStamp | None = None
        self._sketch: Sketch | None = None
        self._path: EncoderPath | None = None
        # A moving encoder (coupled training) is named by a word and the number of its moves: hashing each would be dear.
        self._moves = 0
        self._name = ""

    @property
    def path(self) -> EncoderPath:
        """Return the tensors that what is stored depends on."""
        if self._path is None:
            self._path = encoder_path(self._backbone, self._layers)
        return self._path

    @property
    def is_moving(self) -> bool:
        """Return whether the encoder moves on purpose, so that its moves are counted and not hashed."""
        return bool(self._name)

    def encode(
        self, input_ids: Int[Tensor, "lanes tokens"], **inputs: Any
    ) -> tuple[list[Float[Tensor, "_ kv_heads tokens dim"]], list[Float[Tensor, "_ kv_heads tokens value_dim"]]]:
        """Return position-free keys and values of the tokens, one of each per memory layer, without gradients.

        `inputs`: what the backbone's own forward takes beside them.
        """
        return self._backbone.encode(input_ids.to(input_device(self._backbone.model)), self._layers, **inputs)

    def stamp(self, *, exact: bool = False) -> EncoderStamp:
        """Return the encoder's stamp: the one known as long as the tripwire sees no change, else made anew.

        It takes about 1.4 s per GB of weights to make. `exact`: make it in any case, which finds what the tripwire cannot see.
        """
        if self._name:
            if self._tripwire is None or self._tripwire.changed() is not None:
                self.note_move()
            assert self._stamp is not None
            return self._stamp
        if exact or self._stamp is None or self._tripwire is None or self._tripwire.changed() is not None:
            self._watch_anew()
            self._stamp = EncoderStamp(hash_tensors(self.path.tensors()), self._recipe())
        return self._stamp

    def stamp_for_reading(self) -> EncoderStamp:
        """Return the encoder's stamp, after a look at whether it stays what it is.

        Raises:
            StaleMemoryError: a weight of the encoder requires a gradient, or a module of it is in training mode.
        """
        known, tripwire = self._stamp, self._tripwire
        if known is not None and tripwire is not None and not self._name:
            sign, change = tripwire.trainable(), tripwire.changed()
            if sign is None and change is None:
                return known
        # Before the stamp: to make one anew the backbone is run, which freezes it, and nobody would hear of it.
        self.refuse_trainable()
        stamp = self.stamp()
        self.refuse_trainable()
        return stamp

    def sketch(self) -> Sketch:
        """Return the sketch of the encoder's weights as they are now; see `longmem/encoder/sketch.py`."""
        if self._tripwire is None or self._tripwire.changed() is not None:
            self.stamp()
        if self._sketch is None:
            self._sketch = sketch(self.path.tensors())
        return self._sketch

    def note_move(self) -> None:
        """Say that the encoder has moved, on purpose (coupled training): from now on its moves are counted, not hashed."""
        if not self._name:
            self._name = secrets.token_hex(8)
        self._moves += 1
        self._stamp_move()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint of a moving encoder needs: its name and the number of its moves."""
        return {"name": self._name, "moves": self._moves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the moving encoder that `state_dict` describes, whose weights were restored before."""
        self._name, self._moves = state["name"], state["moves"]
        self._stamp_move()

    def refuse_trainable(self) -> None:
        """Raise StaleMemoryError if a weight of the encoder requires a gradient, or a module of it is in training mode."""
        if self._name:  # a coupled writer trains on purpose
            return
        if self._tripwire is not None and (sign := self._tripwire.trainable()) is not None:
            raise StaleMemoryError(
                f"the encoder must stay frozen and in eval mode while its memory is read, but {sign}: after the next step "
                "of an optimizer, or with dropout, stored keys would be another encoder's. Call `model.requires_grad_()` and "
                "`model.train()` on the LongMem model, which leave the backbone as it is; to train the writer on purpose, use "
                "coupled training."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy starts with: nothing of the original's modules, and a name of its own if it moves."""
        lost = dict.fromkeys(("_tripwire", "_stamp", "_sketch", "_path"))
        return {**self.__dict__, **lost, "_name": secrets.token_hex(8) if self._name else ""}

    def _stamp_move(self) -> None:
        # At every step of an optimizer, which writes to weights and replaces nothing: path and recipe stay what they were.
        self._tripwire, self._sketch = Tripwire(self.path), None
        recipe = self._recipe() if self._stamp is None else self._stamp.recipe
        self._stamp = EncoderStamp(f"{self._name}+{self._moves}", {**recipe, "moves": self._moves})

    def _watch_anew(self) -> None:
        # Modules may have been replaced (adapters), so the path itself is looked for again.
        self._path = self._sketch = None
        self._tripwire = Tripwire(self.path)
