"""Real weights <-> integer levels, with a learned number format for every output channel.

A format is a pair (bits b, exponent e), both real. As published both are trained; for code length b stays at the most
that a file holds, and nothing is clipped. Two grids:

- `"eq1"`, as published (Cséfalvay & Imber, arXiv 2301.13142, eq. 1): levels -round(2^(b-1)) … round(2^(b-1) - 1), so
  b = 0 gives exactly zero, and any 0 < b <= log2(3) is a working {-1, 0} channel;
- `"symmetric"`: levels -m … m, clipped at 2^(b-1) - 1/2, so that everything below one whole level is exactly dead.

Rounding is to nearest, ties to even. Its gradient is passed straight through; all other gradients are exact: inside the
range dq/dx = 1, dq/db = 0, dq/de = ln2·(q - x); clipped dq/dx = 0, dq/db = ±ln2·2^(b-1)·2^e, dq/de = ln2·q.

Where gradients are *damped*, that of a row is multiplied by min(1, ‖q‖ / ‖x‖) first. Behind a norm the gradient of a
filter goes with 1 / ‖q‖, since the norm undoes the filter's length. A filter of which hardly a level is left is thrown
about by gradients many times as large as its own length, ‖x‖, asks for: plain SGD makes it a hundred times as long in a
few steps, and there neither loss nor price can turn it any more. Multiplied, the gradient is that of a filter in the
direction of q, as long as x. A row without a level has none: a norm would amplify what it gets 300 times.

`quantize` is one `autograd.Function` that keeps the weight (which lives anyway) and the two format vectors, and
computes the rest again in the backward pass.

Everything works on *rows*: a matrix with one row per output channel (`to_rows` / `from_rows`). Bytes are not this
file's business: see `coder.py` and `rate.py`.
"""

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .errors import UsageError
from .fusing import dot_rows, fused

Grid = Literal["eq1", "symmetric"]
GRIDS: tuple[Grid, ...] = ("eq1", "symmetric")
LN2 = math.log(2.0)
TINY = 1e-30
"""A length that counts as nothing."""
MAX_BITS = 16.0
"""Formats are kept within 0 … 16 bits, because the file's levels are 16-bit integers."""


def to_rows(weight: Tensor, axis: int | None, groups: int = 1) -> Tensor:
    """View a weight as a matrix (channels, weights per channel).

    Args:
        weight: a tensor of any shape.
        axis: the axis of the output channels: 0 for Linear and convolutions, 1 for transposed convolutions and
            embeddings, None for one format for the whole tensor (the matrix then has one row).
        groups: for transposed convolutions with groups, whose axis 1 holds only the channels of one group.

    Inverse: `from_rows`. For axis 0 and None it is a view.
    """
    if axis is None:
        return weight.reshape(1, -1)
    if axis == 0:
        return weight.reshape(weight.shape[0], -1)
    if groups > 1:  # (groups · in, out, …) -> (groups · out, in · …)
        split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        return split.transpose(1, 2).reshape(groups * weight.shape[1], -1)
    return weight.movedim(axis, 0).reshape(weight.shape[axis], -1)


def from_rows(rows: Tensor, shape: tuple[int, ...], axis: int | None, groups: int = 1) -> Tensor:
    """Undo `to_rows`: a matrix (channels, weights per channel) becomes a tensor of `shape` again."""
    if axis is None or axis == 0:
        return rows.reshape(shape)
    if groups > 1:
        split = rows.reshape(groups, shape[1], shape[0] // groups, *shape[2:])
        return split.transpose(1, 2).reshape(shape)
    moved = (shape[axis], *(size for i, size in enumerate(shape) if i != axis))
    return rows.reshape(moved).movedim(0, axis).contiguous()


def limits(bits: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The real clipping limits (lowest, highest), in units of one level, of channels of `bits` bits each."""
    half = torch.exp2(bits - 1)
    if grid == "symmetric":
        return 0.5 - half, half - 0.5
    return -half, half - 1


def to_levels(rows: Tensor, bits: Tensor, exponent: Tensor, grid: Grid) -> Tensor:
    """Integer levels, as a float tensor, of `rows` (C, n) in the formats `bits` and `exponent` (C,)."""
    low, high = limits(bits, grid)
    scaled = rows * torch.exp2(-exponent)[:, None]
    return torch.minimum(torch.maximum(scaled, low[:, None]), high[:, None]).round_()


def _rounded(rows: Tensor, bits: Tensor, exponent: Tensor, grid: Grid) -> Tensor:
    """`to_levels` times the step 2^e."""
    return to_levels(rows, bits, exponent, grid).mul_(torch.exp2(exponent)[:, None])


def _damping(levels: Tensor, scaled: Tensor) -> Tensor:
    """(C, 1) lengths of rows of levels, over those of what they are rounded from, at most 1; 0 for rows of zeros."""
    length, real = (torch.linalg.vector_norm(rows, dim=1) for rows in (levels, scaled))
    damping: Tensor = (length / real.clamp_min_(TINY)).clamp_max_(1.0)[:, None]
    return damping


def _gradients(
    grad: Tensor, rows: Tensor, bits: Tensor, exponent: Tensor, grid: Grid, clips: bool, damped: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The straight-through gradients of the module's docstring, with respect to rows, bits and exponent."""
    step = torch.exp2(exponent)[:, None]
    if not clips:
        scaled = rows * torch.exp2(-exponent)[:, None]
        levels = scaled.round()
        if damped:
            grad = grad * _damping(levels, scaled)
        return grad, None, dot_rows(grad, levels.sub_(scaled)) * step[:, 0] * LN2
    low, high = (limit[:, None] for limit in limits(bits, grid))
    scaled = rows / step
    clipped = torch.minimum(torch.maximum(scaled, low), high)
    if damped:
        grad = grad * _damping(clipped.round(), scaled)
    # -1, 0, +1 for weights below, inside and above the range
    side = torch.sub(scaled, clipped).sign_()
    # round(clipped) - (scaled where inside): the bracket of dq/de = ln2 · 2^e · [...], for both cases at once
    bracket = clipped.round().addcmul_(scaled, (side == 0).to(scaled.dtype), value=-1)
    grad_exponent = dot_rows(grad, bracket) * step[:, 0] * LN2
    grad_bits = dot_rows(grad, side) * step[:, 0] * torch.exp2(bits - 1) * LN2
    return grad * (side == 0), grad_bits, grad_exponent


class _Quantize(torch.autograd.Function):
    """`_rounded`, with `_gradients`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        bits: Tensor,
        exponent: Tensor,
        grid: Grid,
        clips: bool,
        damped: bool,
        compile: bool,
    ) -> Tensor:
        ctx.options, ctx.compile = (grid, clips, damped), compile
        ctx.save_for_backward(rows, bits, exponent)
        return fused(_rounded, compile=compile)(rows, bits, exponent, grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rows, bits, exponent = ctx.saved_tensors
        found = fused(_gradients, compile=ctx.compile)(grad, rows, bits, exponent, *ctx.options)
        return *found, None, None, None, None


def quantize(
    rows: Tensor,
    bits: Tensor,
    exponent: Tensor,
    grid: Grid = "symmetric",
    *,
    clips: bool = True,
    damped: bool = False,
    compile: bool = False,
) -> Tensor:
    """Round `rows` (C, n) to the grids of their channels: eq. 1 of arXiv 2301.13142 or its symmetric sister.

    Args:
        rows: real weights, one output channel per row.
        bits: (C,) bit depths, >= 0.
        exponent: (C,) base-2 logarithms of the step between two levels.
        grid: `"eq1"` or `"symmetric"`.
        clips: whether weights may lie outside of the range. If not, the gradient does not look, which takes less
            time, and `bits` has none; what lies outside all the same is clipped.
        damped: whether the gradient of a row is multiplied by min(1, ‖q‖ / ‖x‖); see above.
        compile: compute with kernels made by `torch.compile`.

    Returns:
        The quantised weights, same shape; differentiable in all three tensors.
    """
    return cast(Tensor, _Quantize.apply(rows, bits, exponent, grid, clips, damped, compile))  # type: ignore[no-untyped-call]


class _Snap(torch.autograd.Function):
    """Round to a multiple of 1/`steps`; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, steps: int) -> Tensor:
        return (value * steps).round_().div_(steps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def snap(value: Tensor, steps: int) -> Tensor:
    """`value` rounded to multiples of 1/`steps`, ties to even; the gradient passes straight through."""
    return cast(Tensor, _Snap.apply(value, steps))  # type: ignore[no-untyped-call]


class ChannelQuantizer(nn.Module):
    """The parametrization that makes one tensor compressible: attach it with `torch.nn.utils.parametrize`.

    Attributes:
        bits: (C,) bit depth of each channel, in bits; trained for the published rate.
        exponent: (C,) trained base-2 logarithm of each channel's step.
        axis: axis of the output channels, or None for one format for the whole tensor.
        groups: groups of a transposed convolution, else 1.
        resolution: the exponent that is *used* is rounded to multiples of 1/resolution, because the file stores it so;
            None uses it as it is (as published).
        original_shape: the shape of the tensor before anything was removed.
        clips, damped: whether weights may lie outside of the range, and gradients are damped; see `quantize`.
        compiled: whether training computes with kernels made by `torch.compile`.
    """

    per_channel = ("bits", "exponent")
    """Parameters that are cut along with the weight's output channels."""

    bits: nn.Parameter
    exponent: nn.Parameter

    def __init__(
        self,
        weight: Tensor,
        *,
        axis: int | None,
        groups: int = 1,
        grid: Grid = "symmetric",
        initial_bits: float = 8.0,
        resolution: int | None = 4,
    ) -> None:
        super().__init__()
        if grid not in GRIDS:
            raise UsageError(f"grid: expected one of {', '.join(f'`{g}`' for g in GRIDS)}, found `{grid}`")
        if not 0 < initial_bits <= MAX_BITS:
            raise UsageError(
                f"initial_bits: expected more than 0 and at most {MAX_BITS:g} bits, found {initial_bits:g}"
            )
        self.axis, self.groups, self.grid, self.resolution = axis, groups, grid, resolution
        self.original_shape = tuple(weight.shape)
        self.clips, self.damped, self.compiled = True, False, False
        rows = to_rows(weight.detach(), axis, groups)
        self.bits = nn.Parameter(rows.new_full((rows.shape[0],), initial_bits))
        self.exponent = nn.Parameter(initial_exponent(rows, initial_bits, grid))

    def used_exponent(self) -> Tensor:
        """(C,) the exponent that the network computes with: the one that goes into the file."""
        if self.resolution is None:
            return self.exponent
        return snap(self.exponent, self.resolution)

    def rows(self, weight: Tensor) -> Tensor:
        """(C, n) the unquantised weights, one output channel per row."""
        return to_rows(weight, self.axis, self.groups)

    def levels(self, weight: Tensor) -> Tensor:
        """(C, n) the integer levels of `weight`, as a float tensor without gradient."""
        with torch.no_grad():
            return to_levels(self.rows(weight), self.bits, self.used_exponent(), self.grid)

    def forward(self, weight: Tensor) -> Tensor:
        """Quantise `weight`; any shape whose output channels are the ones this was made for."""
        compile = self.compiled and self.training
        formats = self.bits, self.used_exponent(), self.grid
        quantized = quantize(self.rows(weight), *formats, clips=self.clips, damped=self.damped, compile=compile)
        return from_rows(quantized, tuple(weight.shape), self.axis, self.groups)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.grid}, axis={self.axis}, channels={self.bits.numel()}"


def initial_exponent(rows: Tensor, bits: float, grid: Grid) -> Tensor:
    """(C,) exponents with which `bits` bits just reach the largest weight of each row.

    Rows of zeros get the exponent of the tensor's largest weight, or -8 where all is zero, so that they can learn.
    """
    top = rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    fallback = top.max() if top.numel() and bool(top.max() > 0) else top.new_tensor(2.0**-8 * 2 ** (bits - 1))
    top = torch.where(top > 0, top, fallback)
    reach = limits(top.new_tensor(bits), grid)[1].clamp(min=0.5)
    return torch.log2(top / reach)
