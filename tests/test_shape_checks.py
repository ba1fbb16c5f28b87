"""The shape checks themselves: on in every test, for shapes, and for nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from shape_checks import check_shapes
from torch import Tensor

from longmem.memory.index import exact_top_chunks

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
    with pytest.raises(TypeCheckError, match="search_keys"):
        exact_top_chunks(torch.ones(1, 1, 2), torch.ones(2, 3, 2), 1)


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
