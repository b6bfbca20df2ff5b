"""Operators on the meta device: the shapes of what torch computes there step by step, in Python.

An analysis runs a network many times on the meta device. Most of that time went into a few operators whose arithmetic
torch takes apart there; the shapes of their results are plain. Whatever is not in the one form that is known here, with
sizes that fit, is left to torch, which says what is wrong with it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_SHAPES_ONLY = ContextVar("_SHAPES_ONLY", default=False)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within it nobody looks at the numbers that a network computes, only at its operators and their shapes."""
    token = _SHAPES_ONLY.set(True)
    try:
        yield
    finally:
        _SHAPES_ONLY.reset(token)


def only_shapes_of(x: Tensor) -> bool:
    """Whether nobody looks at the numbers of a tensor."""
    return x.is_meta or _SHAPES_ONLY.get()


def leaves(values: Iterable[Any]) -> Iterator[Any]:
    """What is in lists of lists: all that operators take, and much quicker than torch's own way through any nest."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from leaves(value)
        else:
            yield value


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an ATen operator, of which on the meta device only shape, type and layout matter."""
    shape = _SHAPES.get(func._schema.name)
    if shape is not None and isinstance(args[0], Tensor) and args[0].device.type == "meta":
        tensors = [a for a in args if isinstance(a, Tensor)]
        if all(t.dtype == args[0].dtype and t.device.type == "meta" for t in tensors):
            result = shape(*args, **kwargs)
            if result is not None:
                return result
    return func(*args, **kwargs)


def _batch_norm(x: Tensor, *options: Any) -> tuple[Tensor, ...] | None:
    """With running statistics: (input, weight, bias, mean, variance, whether to train, …)."""
    vectors = [v for v in options[:4] if v is not None]
    if options[4] is True or not vectors or any(v.shape != x.shape[1:2] for v in vectors):
        return None
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


def _layer_norm(x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    own = x.shape[x.ndim - len(shape) :]
    if tuple(own) != tuple(shape) or any(v is not None and v.shape != own for v in (weight, bias)):
        return None
    statistics = (*x.shape[: x.ndim - len(shape)], *[1] * len(shape))
    return x.new_empty(x.shape), x.new_empty(statistics), x.new_empty(statistics)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or bias.shape != b.shape[1:]:
        return None
    return a.new_empty(a.shape[0], b.shape[1])


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return torch.empty_like(x)


_SHAPES: dict[str, Callable[..., Any]] = {
    "aten::native_batch_norm": _batch_norm,
    "aten::native_layer_norm": _layer_norm,
    "aten::addmm": _addmm,
    "aten::gelu": _gelu,
}
