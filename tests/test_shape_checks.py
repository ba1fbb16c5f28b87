"""The shape checks themselves: on in every test, for shapes, and for nothing else."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Protocol, Self

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from shape_checks import EVERY, FIRST_CALLS, at_times, check_shapes
from torch import Tensor

from longmem.memory import finding, shards
from longmem.memory.index import exact_top_chunks
from longmem.model import attention, memory_attention, side_network

if TYPE_CHECKING:
    from nowhere import Absent


class NotAtRunTime(Protocol):
    def read(self) -> str: ...


class Mixed:
    @jaxtyped(typechecker=check_shapes)
    def rows(
        self,
        queries: Float[Tensor, "tokens dim"],
        pair: tuple[Float[Tensor, " tokens"], int],
        how: NotAtRunTime,
        absent: Absent | None = None,
    ) -> Float[Tensor, " tokens"]:
        return queries[:, 0]

    @jaxtyped(typechecker=check_shapes)
    def wrong_result(self, queries: Float[Tensor, "tokens dim"]) -> Float[Tensor, " tokens"]:
        return queries[0]

    @jaxtyped(typechecker=check_shapes)
    def itself(self) -> Self:
        return self


def test_the_package_is_checked():
    def call_often() -> None:  # other tests may have called it often enough for not every call to be checked
        for _ in range(EVERY):
            exact_top_chunks(torch.ones(1, 1, 2), torch.ones(2, 3, 2), 1)

    with pytest.raises(TypeCheckError, match="search_keys"):
        call_often()


def test_the_first_calls_are_checked_and_every_tenth_behind_them():
    checked = []
    call = at_times(lambda: checked.append(True), lambda: checked.append(False))
    for _ in range(FIRST_CALLS + 3 * EVERY):
        call()
    assert all(checked[:FIRST_CALLS])
    assert checked[FIRST_CALLS:].count(True) == 3


def test_all_functions_with_shapes_are_checked_and_no_others():
    """Told by the text of annotations; the names of jaxtyping have no other use in the package."""
    checked = {True: 0, False: 0}
    for module in (attention, memory_attention, side_network, finding, shards):
        owners = [module, *(each for each in vars(module).values() if inspect.isclass(each))]
        for function in (each for owner in owners for each in vars(owner).values() if inspect.isfunction(each)):
            if getattr(function, "__module__", "") == module.__name__ and function.__qualname__ != "<lambda>":
                source = inspect.unwrap(function)
                shaped = any(re.search(r"\b(Float|Int|Bool)\[", str(hint)) for hint in source.__annotations__.values())
                assert not shaped or hasattr(function, "__wrapped__"), function.__qualname__
                checked[shaped] += 1
    assert min(checked.values()) > 10
    assert not hasattr(finding.span_around, "__wrapped__")


def test_right_shapes_pass_whatever_the_other_annotations():
    assert Mixed().rows(torch.ones(3, 2), (torch.ones(3), 0), how="no protocol").shape == (3,)
    assert isinstance(Mixed().itself(), Mixed)


def test_wrong_shapes_are_refused():
    with pytest.raises(TypeCheckError, match="queries"):
        Mixed().rows(torch.ones(3), (torch.ones(3), 0), how=None)
    with pytest.raises(TypeCheckError, match="pair"):
        Mixed().rows(torch.ones(3, 2), (torch.ones(4), 0), how=None)
    with pytest.raises(TypeCheckError, match="return"):
        Mixed().wrong_result(torch.ones(3, 2))
