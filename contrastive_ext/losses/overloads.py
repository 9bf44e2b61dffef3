"""What a loss returns, for type checkers: one tensor, with return_stats=True that and a record. At run time nothing.

One decorator reads both from the function it stands on, in place of three copies of every signature. A call that says
`return_stats` is matched by that keyword alone, because no type takes a keyword out of a signature: its other arguments
are checked when it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from torch import Tensor

_P = ParamSpec("_P")
_Self = TypeVar("_Self", contravariant=True)
_Stats = TypeVar("_Stats", covariant=True)


class LossFunction(Protocol[_P, _Stats]):
    """A function of the arguments _P, `return_stats` among them."""

    __name__: str

    # mypy sees overlaps: a call without `return_stats` reaches the last alone, whose _P has it too
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, *args: Any, return_stats: Literal[True], **options: Any
    ) -> tuple[Tensor, _Stats]: ...
    @overload
    def __call__(self, *args: Any, return_stats: Literal[False], **options: Any) -> Tensor: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, *args: Any, return_stats: bool, **options: Any
    ) -> Tensor | tuple[Tensor, _Stats]: ...
    @overload
    def __call__(self, *args: _P.args, **options: _P.kwargs) -> Tensor: ...


class LossMethod(Protocol[_P, _Stats]):
    """A method that is a `LossFunction` of an instance. Its `self` is positional-only: mypy takes no other from _P."""

    def __get__(self, instance: Any, owner: type | None = None, /) -> LossFunction[_P, _Stats]: ...


def returns_stats(function: Callable[_P, Tensor | tuple[Tensor, _Stats]]) -> LossFunction[_P, _Stats]:
    """The function itself."""
    return cast("LossFunction[_P, _Stats]", function)


def method_returns_stats(
    method: Callable[Concatenate[_Self, _P], Tensor | tuple[Tensor, _Stats]],
) -> LossMethod[_P, _Stats]:
    """The method itself."""
    return cast("LossMethod[_P, _Stats]", method)
