"""Norms that take statistics over channels, and still divide by their number once some of these are gone.

A channel of zeros adds nothing to the sums of a norm. So one that remembers over how many channels D it was made to go
computes the same from the d that are left:

    mean = Σx / D,   variance = (Σ(x - mean)² + (D - d) · mean²) / D

Behind the norm such a channel is -mean / σ · scale + shift: it is silent if these two are zero as well. Standardised
weights are normed so, too, each row over its columns, by a batch norm.

A module that *remembers* runs its own code, but within it layer norms, group norms of one group, RMS norms, batch norms
without running statistics and means over channels go over all that were there first. Where only shapes matter, as on
the meta device, they are torch's own: an analysis sees the operator that the code asks for.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .meta import only_shapes_of
from .mixing import Mixin, mix

FIRST_WIDTH = "_first_width"
"""Attribute of a module that remembers: over how many channels its statistics go."""


class _WholeWidth(TorchFunctionMode):
    """Within it, statistics over channels go over `width` of them, of which those that are not there are zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.met = False
        """Whether there was such a statistic."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        statistic = _STATISTICS.get(getattr(func, "__name__", ""))
        if statistic is None:
            return func(*args, **(kwargs or {}))
        self.met = True
        return statistic(func, self.width, *args, **(kwargs or {}))


def _layer_norm(
    func: Any, width: int, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None,
    eps: float = 1e-5, cudnn_enable: bool = True,
) -> Tensor:  # fmt: skip
    if only_shapes_of(input):
        return func(input, input.shape[-1:], weight, bias, eps)  # type: ignore[no-any-return]
    normed = _normed(input, (-1,), width, eps)
    return _affine(normed, weight, bias, input)


def _rms_norm(
    func: Any, width: int, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor:
    if only_shapes_of(input):
        return func(input, input.shape[-1:], weight, eps)  # type: ignore[no-any-return]
    x = _wide(input)
    square = x.square().sum(-1, keepdim=True) / width
    return _affine(x * torch.rsqrt(square + (torch.finfo(x.dtype).eps if eps is None else eps)), weight, None, input)


def _group_norm(
    func: Any, width: int, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:  # fmt: skip
    if only_shapes_of(input):
        return func(input, 1, weight, bias, eps)  # type: ignore[no-any-return]
    normed = _normed(input, tuple(range(1, input.ndim)), width * prod(input.shape[2:]), eps)
    weight, bias = (None if v is None else v.reshape(-1, *[1] * (input.ndim - 2)) for v in (weight, bias))
    return _affine(normed, weight, bias, input)


def _batch_norm(
    func: Any, width: int, input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if only_shapes_of(input) or running_mean is not None:
        return func(input, running_mean, running_var, weight, bias, training, momentum, eps)  # type: ignore[no-any-return]
    weight, bias = (None if v is None else v.reshape(-1, 1) for v in (weight, bias))
    return _affine(_normed(input, (0, 2), width, eps), weight, bias, input)


def _mean(func: Any, width: int, input: Tensor, dim: Any, *args: Any, **kwargs: Any) -> Tensor:
    mean: Tensor = func(input, dim, *args, **kwargs)
    (axis,) = (dim,) if isinstance(dim, int) else dim
    return mean if only_shapes_of(input) else mean * (input.shape[axis] / width)


def _wide(x: Tensor) -> Tensor:
    """At least in single precision, as torch's own norms compute."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normed(x: Tensor, axes: tuple[int, ...], count: int, eps: float) -> Tensor:
    """x with mean 0 and variance 1 over `axes`, and over zeros that make it `count` numbers."""
    x = _wide(x)
    missing = count - prod(x.shape[axis] for axis in axes)
    mean = x.sum(axes, keepdim=True) / count
    centered = x - mean
    variance = (centered.square().sum(axes, keepdim=True) + missing * mean.square()) / count
    return centered * torch.rsqrt(variance + eps)


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None, like: Tensor) -> Tensor:
    x = x if scale is None else x * scale
    x = x if shift is None else x + shift
    return x if torch.is_autocast_enabled(like.device.type) else x.to(like.dtype)


_STATISTICS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rms_norm": _rms_norm,
    "batch_norm": _batch_norm,
    "mean": _mean,
}


class Remembering(Mixin):
    """Mixed into the class of a module by `remember`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own code, with statistics over as many channels as there were."""
        mode = _WholeWidth(vars(self)[FIRST_WIDTH])
        with mode:
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if isinstance(out, Tensor) and only_shapes_of(out) and not mode.met:
            raise RuntimeError("its statistics over channels are taken by an operator that is not known")
        return out


def remember(module: nn.Module, width: int) -> None:
    """Let a module's statistics over channels go on over `width` of them while they become fewer, in place."""
    mix(Remembering, module)
    vars(module).setdefault(FIRST_WIDTH, width)
