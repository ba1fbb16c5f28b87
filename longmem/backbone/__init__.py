"""The frozen backbone: finding its parts, running it, taking its keys free of position."""

from longmem.backbone.capture import Backbone, BackboneStates, LayerCall
from longmem.backbone.loading import load_backbone, load_tokenizer
from longmem.backbone.structure import UnsupportedBackboneError

__all__ = [
    "Backbone",
    "BackboneStates",
    "LayerCall",
    "UnsupportedBackboneError",
    "load_backbone",
    "load_tokenizer",
]
