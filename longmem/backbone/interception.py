"""One attention function, registered with transformers, that lets the caller see or replace the attention of a layer.

The registry is the only place where 340-odd architectures meet: whatever their projections, norms and rotations, they all
call a function with queries, keys and values. A module is *intercepted* when its configuration names our function;
without a handler for the current call the function is the one the module used before.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

IMPLEMENTATION = "longmem"
LocalAttention = Callable[..., tuple[Tensor, Tensor | None]]
# (local attention, module, query, key, value, attention_mask, **kwargs) -> (output, weights), as transformers has it:
# query `lanes heads tokens dim`, key and value `lanes kv_heads keys dim`, output `lanes tokens heads dim`.
Handler = Callable[..., tuple[Tensor, Tensor | None]]

# Handlers belong to one forward pass, so they live in a context variable: threads that share a model do not meet.
_handlers: ContextVar[Mapping[nn.Module, Handler] | None] = ContextVar("longmem_attention_handlers", default=None)


@contextlib.contextmanager
def handled_by(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Route the attention of intercepted modules (keys of `handlers`) to their handlers inside the block."""
    token = _handlers.set(handlers)
    try:
        yield
    finally:
        _handlers.reset(token)


def intercept(module: nn.Module) -> None:
    """Make the attention module call `dispatch_attention`; other modules keep their implementation and their masks.

    The module gets its own shallow copy of the configuration. `_attn_implementation_internal` is private; setting the
    public property would reset nested configurations (transformers 5.23).
    """
    config: Any = module.config
    if config._attn_implementation == IMPLEMENTATION:
        return
    own_config = copy.copy(config)
    own_config.intercepted_attn_implementation = config._attn_implementation
    own_config._attn_implementation_internal = IMPLEMENTATION
    module.config = own_config


def local_implementation(module: nn.Module) -> str:
    """Return the name of the attention implementation that the module used before it was intercepted."""
    return module.config.intercepted_attn_implementation or "eager"  # type: ignore[union-attr, return-value]


def local_attention(module: nn.Module) -> LocalAttention:
    """Return the attention function that the module used before it was intercepted."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return AttentionInterface().get_interface(local_implementation(module), eager)


def dispatch_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Return the handler's output for this module, or that of its own attention when nobody handles it."""
    handler = (_handlers.get() or {}).get(module)
    if handler is None:
        return local_attention(module)(module, *args, **kwargs)
    return handler(local_attention(module), module, *args, **kwargs)


AttentionInterface.register(IMPLEMENTATION, dispatch_attention)
