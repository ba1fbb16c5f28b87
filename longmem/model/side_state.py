"""What sites that train the same side network send each other: its own tensors, by the names that `save_pretrained` uses.

The average of two such states is all that federated training needs. A bank is no part of it, nor is any tensor of the
backbone, which every site has.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from longmem.model.saving import PREFIX, saved_names
from longmem.model.side_network import SideNetwork


def side_state(side_network: SideNetwork, backbone: nn.Module) -> dict[str, Tensor]:
    """Return copies of the tensors that `saved_names` lists, each with memory of its own."""
    return {name: tensor.clone() for name, tensor in own_tensors(side_network, backbone).items()}


def load_side_state(side_network: SideNetwork, backbone: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the tensors of `side_state` into the side network: all of them and nothing else, or nothing at all."""
    current = own_tensors(side_network, backbone)
    refuse_other_names(current, state)
    for name, tensor in state.items():
        refuse_other_values(name, tensor, current[name])
    for name, tensor in state.items():
        current[name].copy_(tensor)


def own_tensors(side_network: SideNetwork, backbone: nn.Module) -> dict[str, Tensor]:
    """Return the tensors themselves, detached, so that what is written into them is in the side network."""
    tensors, names = side_network.state_dict(), saved_names(side_network)
    own = {PREFIX + name: tensor.detach() for name, tensor in tensors.items() if name in names}
    others = [*backbone.named_parameters(), *backbone.named_buffers()]
    refuse_shared(own, {f"backbone.{name}": tensor for name, tensor in others})
    return own


def refuse_shared(own: Mapping[str, Tensor], backbone: Mapping[str, Tensor]) -> None:
    """Raise if a tensor of the side network lies in memory of the backbone: sending it would send the backbone."""
    owners = {place(tensor): name for name, tensor in backbone.items() if tensor.numel()}
    for name, tensor in own.items():
        if tensor.numel() and (owner := owners.get(place(tensor))) is not None:
            raise ValueError(
                f"`{name}` must have memory of its own, but shares that of `{owner}`; "
                "give the side network a copy (`copy.deepcopy` of the module), as `from_backbone` does."
            )


def place(tensor: Tensor) -> tuple[torch.device, int]:
    """Return what identifies the memory of a tensor; where it has none of its own (meta, quantized), the tensor itself."""
    try:
        address = 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
    except RuntimeError:  # a subclass that keeps its numbers in other tensors
        address = 0
    return tensor.device, address or id(tensor)


def refuse_other_names(current: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise if a state has other names than this model's, naming the first missing and the first unexpected one."""
    missing = sorted(current.keys() - state.keys())
    unexpected = sorted(state.keys() - current.keys(), key=str)
    problems = [
        f"{word} `{names[0]}` ({len(names)} in all)"
        for word, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ValueError(
            f"`state` must have the names of this model's `side_state_dict()`, got {' and '.join(problems)}; it must come "
            "from a model with the same backbone and configuration, LoRA included."
        )


def refuse_other_values(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise if one tensor of a state can't take the place of `like`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"`{name}` of `state` must be a tensor, got {type(tensor).__name__}; take `side_state_dict()`."
        )
    if tensor.shape != like.shape:
        raise ValueError(
            f"`{name}` of `state` must have the shape {tuple(like.shape)}, got {tuple(tensor.shape)}; it must come from a "
            "model with the same backbone and configuration."
        )
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(
            f"`{name}` of `state` must be finite, got NaN or infinity; leave out the site whose training diverged."
        )
