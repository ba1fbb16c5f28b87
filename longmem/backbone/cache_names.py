"""The name of the cache of keys and values: `cache` from transformers 5.24 on, `past_key_values` before, in calls and outputs.

Which one it is, is read off transformers and off the model that is called, never off a version number: code from the Hub
may have kept the old name.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
_NAME = next(name for name in CACHE_NAMES if name in _FIELDS)


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache of a call that may give it under either name.

    Raises:
        ValueError: it was given under both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("`cache` and `past_key_values` are one argument under two names, got both; leave one out.")
    return past_key_values if cache is None else cache


def as_keyword(cache: Cache | None) -> dict[str, Any]:
    """Return the cache under the name that it has in outputs and calls of the installed transformers, to be unpacked."""
    return {_NAME: cache}


def cache_of(output: Any) -> Any:
    """Return the cache of what a model or `generate` returned."""
    return getattr(output, _NAME)


def named_for(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call, the cache under the name that the `forward` of this model has for it."""
    name = cache_argument(model)
    return {name if given in CACHE_NAMES else given: value for given, value in inputs.items()}


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name that the `forward` of a model has for the cache."""
    return _argument(type(model).forward)


@functools.cache
def _argument(forward: Callable[..., Any]) -> str:
    names = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in names), _NAME)
