"""Elementwise work on matrices of weights as one kernel, by `torch.compile`, where the user asks for it.

Rounding and pricing are some forty small operations on each tensor. On a CPU they cost a few passes over the weights;
an accelerator is done with each before the next one has been asked for, and waits.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


@cache
def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    # shapes change with every cut: kernels for all sizes, made once
    kernels = torch.compile(function, dynamic=True)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # of parameters torch takes the shape for fixed, whatever it is told
        plain: Any = (a.detach() if isinstance(a, Tensor) else a for a in args)
        return kernels(*plain, **kwargs)

    return call


def fused(function: Callable[P, R], *, compile: bool) -> Callable[P, R]:
    """The function, or, with `compile`, its compiled form: made at its first call, and then kept for all callers."""
    return _compiled(function) if compile else function


def dot_rows(a: Tensor, b: Tensor) -> Tensor:
    """(C, n), (C, n) -> (C,) sums of the products along each row."""
    return (a * b).sum(1)  # `einsum` makes a matrix product of each row of this, which takes ten times as long
