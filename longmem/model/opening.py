"""Opening a model by name, whatever the name stands for (`longmem.model.names`)."""

from __future__ import annotations

from typing import Any

from longmem.configuration import LongMemConfig
from longmem.model.modeling import LongMemForCausalLM
from longmem.model.names import CHANGEABLE, NamedModel, look_up


def refuse_config_of_saved(named: NamedModel, config_fields: dict[str, Any]) -> None:
    """Raise ValueError if there are settings for a saved side network, which has its own."""
    if named.origin == "saved" and config_fields:
        raise ValueError(
            f"{named.name} has its settings; they can be changed for a new side network only: {config_fields}."
        )


def open_model(name: str, *, dtype: str | None = None, **config_fields: Any) -> LongMemForCausalLM:
    """Return the model that a name stands for, with its side network or, if it has none, with a new one; in eval mode.

    Args:
        name: of a model, as `longmem.model.names` says.
        dtype: such as "bfloat16", of backbone and side network alike, also where a saved model was trained in another;
            None leaves both as they were saved.
        config_fields: fields of `LongMemConfig` for a new side network, which then stands beside a packaged backbone as well;
            `num_neighbours` alone leaves the side network that is there.

    Raises:
        ValueError: settings are given for a saved side network, which has its own.
    """
    named = look_up(name)
    if named.side_network is None or not config_fields.keys() <= CHANGEABLE:
        refuse_config_of_saved(named, config_fields)
        options = None if dtype is None else {"dtype": dtype}
        return LongMemForCausalLM.from_backbone(name, backbone_options=options, **config_fields).eval()
    if dtype is None:
        return LongMemForCausalLM.from_pretrained(named.side_network, **config_fields).eval()
    config = LongMemConfig.from_pretrained(named.side_network, **config_fields)
    config.side_network_dtype = None  # the backbone's
    return LongMemForCausalLM.from_pretrained(named.side_network, config=config, dtype=dtype).eval()
