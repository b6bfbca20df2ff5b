"""How many bits a weight matrix costs: differentiable for the loss, exact for the file, one formula.

Two rates:

- `"bit-depth"`, as published (arXiv 2301.13142): a layer costs I·H·W·Σ_i b_i (eq. 4), or, coupled with the layers that
  feed it, eq. 5. Nominal bits: with the grid of eq. 1 they are not the size of any file.
- `"code-length"`: a level k costs -log2 p(k) under the probability model with which `coder.py` writes the file. The
  value of the loss is the length of the code, read from the coder's own tables at the current levels; only its
  *gradient* is relaxed. With u = w / 2^e the price of a level is drawn as a curve through the points
  (|k|, price(|k|)): between 0 and 1 its slope is 2|u| times the step from zero to one, beyond 1 it is the constant
  price of one more level. So a weight near zero feels no pull and can come back, and the pull is full at the rounding
  threshold |u| = 1/2.

The model's parameters need no gradient. They are fitted in closed form to the levels every few steps (`fitting.py`),
and where they are optimal the derivative of the code length with respect to them is zero (envelope theorem). Which
neighbours live is looked up then, too: until the next fit each weight keeps the surroundings of that moment.
"""

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .coder import DECAYS, INDICES, Ints, LevelModel, geometric, positive_share, prices
from .fusing import dot_rows, fused
from .quantizer import LN2, Grid, limits
from .surroundings import shifts, surroundings

_DEAREST = 4.09
"""Bits of a further level, at most, that the first is taken to cost as much as."""


class PriceTable:
    """A fitted model as tensors: what each weight costs as zero, what the first level adds, and each further one.

    Args:
        model: fitted to `levels`.
        levels: (rows, columns · taps) integers, stored as floats.
        taps: kernel positions.

    Attributes:
        levels: those that the model was fitted to, as integers, where it looks at neighbours; else None.
        zero: () bits of a matrix of zeros. Dead rows and columns are named by a mask and cost nothing.
        first: (rows, columns · taps) bits that a level of ±1 costs more than a zero, in the mean of both signs.
        tilt: (rows, columns · taps) bits that a positive one costs more than this mean, and a negative one less, as
            neighbours have it; None where no model looks at them.
        further: (rows, 1) bits of each further level.
    """

    def __init__(self, model: LevelModel, levels: Tensor, taps: int = 1) -> None:
        self.model = model
        of_signs = prices(0, 1)
        device = levels.device

        def on_device(values: NDArray[np.int16]) -> Tensor:
            return torch.from_numpy(values).to(device, torch.int32)

        rows = on_device(_filled(model.rows, model.alive_rows))
        columns = on_device(_filled(model.columns, model.alive_columns))
        octaves = columns[:, None] + on_device(model.taps.astype(np.int16))[None, :]
        index = (2 * rows + model.offset)[:, None] + 2 * octaves.flatten()[None, :]
        self.levels: Tensor | None = None
        likely: Tensor | None = None
        if model.context is not None:
            self.levels = levels.to(torch.int8 if model.top < 128 else torch.int16)
            kind, likely = surroundings(self.levels, model.context.pitch)
            index += torch.from_numpy(shifts(model.context).astype(np.int32)).to(device)[kind.int()]
        index.clamp_(0, INDICES - 1)
        alive_rows, alive_columns = (torch.from_numpy(m).to(device) for m in (model.alive_rows, model.alive_columns))
        coded = alive_rows[:, None] & alive_columns.repeat_interleave(taps)[None, :]
        zero = torch.as_tensor(of_signs[:, 0], dtype=levels.dtype, device=device)
        first = torch.as_tensor(of_signs[:, 1] - of_signs[:, 0], dtype=levels.dtype, device=device)
        further, size_of_one = geometric(max(model.top, 1))
        decays = (
            rows.new_full((len(rows),), model.decay)
            if model.decays is None
            else on_device(_filled(model.decays, model.alive_rows))
        )
        self.zero = zero[index].mul_(coded).sum()
        of_rows = decays - DECAYS[0]
        self.further = torch.as_tensor(further, dtype=levels.dtype, device=device)[of_rows][:, None]
        self.first = first[index].add_(
            torch.as_tensor(size_of_one, dtype=levels.dtype, device=device)[of_rows][:, None]
        )
        self.tilt: Tensor | None = None
        if model.context is not None and likely is not None:
            share = positive_share(model.context.tilt) / 2**15
            same, opposite = -float(np.log2(2 * share)), -float(np.log2(2 - 2 * share))
            likely = likely.to(levels.dtype)
            self.first += likely.square() * ((same + opposite) / 2)
            self.tilt = likely * ((same - opposite) / 2)

    def first_of(self, sign: Tensor) -> Tensor:
        """(rows, columns · taps) bits that a level of ±1 with this sign costs more than a zero."""
        return _first_of(sign, self.first, self.tilt)


def _first_of(sign: Tensor, first: Tensor, tilt: Tensor | None) -> Tensor:
    return first if tilt is None else torch.addcmul(first, sign, tilt)


def _price(
    rows: Tensor,
    bits: Tensor,
    exponent: Tensor,
    grid: Grid,
    zero: Tensor,
    first: Tensor,
    tilt: Tensor | None,
    further: Tensor,
    clips: bool,
    gradients: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Price of a matrix, and, if asked for, its gradients with respect to rows, bits and exponent."""
    # Numbers in place of conditions: on a CPU `where` and comparisons take ten times as long as a product.
    scale = torch.exp2(-exponent)[:, None]
    scaled = real = rows * scale
    if clips:
        low, high = limits(bits, grid)
        real = torch.minimum(torch.maximum(scaled, low[:, None]), high[:, None])
    size, sign = real.abs(), real.sign()
    level = size.round()
    lives = level.clamp(max=1)
    first = _first_of(sign, first, tilt)
    total = zero + (lives * first).sum() + (level.sub_(lives).sum(1) * further[:, 0]).sum()
    if not gradients:
        return total, None, None, None
    # The slope of the price in the real level, away from zero; 2|u|·first below one level, see the module.
    # Where nearly all weights live, a zero is the rarest and dearest level: a network of ±1 would never leave
    # that state, so the gradient takes the price for unimodal. (A further level that hardly any weight has is dear for
    # another reason, and says nothing about the first.)
    below_one = torch.maximum(first, further.clamp(max=_DEAREST)).mul_(size).mul_(2)
    slope = torch.lerp(below_one, further, size.floor_().clamp_(max=1)).mul_(sign)
    for_bits = None
    if clips:
        outside = scaled != real
        for_bits = dot_rows(slope.abs(), outside.to(slope.dtype)).mul_(torch.exp2(bits - 1) * LN2)
        slope.masked_fill_(outside, 0.0)
    for_exponent = dot_rows(slope, scaled).mul_(-LN2)
    return total, slope.mul_(scale), for_bits, for_exponent


class _CodeLength(torch.autograd.Function):
    """Price of the levels of a matrix; its gradient is worked out on the way, so that one matrix is kept, not five."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        bits: Tensor,
        exponent: Tensor,
        grid: Grid,
        table: PriceTable,
        clips: bool,
        compile: bool,
    ) -> Tensor:
        total, *gradients = fused(_price, compile=compile)(
            rows,
            bits,
            exponent,
            grid,
            table.zero,
            table.first,
            table.tilt,
            table.further,
            clips,
            any(ctx.needs_input_grad),
        )
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None, None, None]:
        (grad,) = grads
        for_rows, for_bits, for_exponent = ctx.saved_tensors
        of_bits = None if for_bits is None else for_bits * grad
        return for_rows * grad, of_bits, for_exponent * grad, None, None, None, None


def code_length(
    rows: Tensor,
    bits: Tensor,
    exponent: Tensor,
    grid: Grid,
    table: PriceTable,
    *,
    clips: bool = True,
    compile: bool = False,
) -> Tensor:
    """Bits of the code of a weight matrix at its current levels, differentiable in all three tensors.

    Args:
        rows: (C, n) real weights.
        bits: (C,) bit depths; they enter where weights are clipped.
        exponent: (C,) base-2 logarithms of the steps, as used by the network.
        grid: grid of the levels.
        table: prices from a model that was fitted to levels of this matrix, perhaps some steps ago.
        clips: whether weights may lie outside of the range; if not, `bits` has no gradient, as in `quantize`.
        compile: compute with kernels made by `torch.compile`.

    Returns:
        Scalar, in bits. The weights' own code only: for what describes the model see `side_bits`.
    """
    return cast(Tensor, _CodeLength.apply(rows, bits, exponent, grid, table, clips, compile))  # type: ignore[no-untyped-call]


def bit_depth(bits: Tensor, living_inputs: Tensor | float) -> Tensor:
    """Nominal bits of a layer, eq. 4 of arXiv 2301.13142: I·H·W·Σ_i b_i.

    Args:
        bits: (C,) bit depths, >= 0.
        living_inputs: weights per channel that read a living input (I·H·W with the dead inputs left out).

    Returns:
        Scalar, in bits.
    """
    return bits.sum() * living_inputs


def coupled_bit_depth(bits: Tensor, producer_bits: Tensor, taps: int) -> Tensor:
    """Nominal bits of a layer and the layer that feeds it, eq. 5 of arXiv 2301.13142.

    Args:
        bits: (C,) bit depths of the layer.
        producer_bits: (I,) bit depth of the channel that feeds each input of the layer.
        taps: kernel positions H·W.

    Returns:
        Scalar, in bits: H·W·(#{j: b'_j > 0}·Σ_i b_i + #{i: b_i > 0}·Σ_j b'_j). It counts each weight about twice.
    """
    feeding, living = (producer_bits > 0).sum(), (bits > 0).sum()
    return taps * (feeding * bits.sum() + living * producer_bits.sum())


def _filled(offsets: Ints | None, alive: NDArray[np.bool_]) -> NDArray[np.int16]:
    """Offsets, or decays, of all entries of an axis: those of dead ones are the lowest of the living."""
    result = np.zeros(len(alive), np.int16)
    if offsets is not None and len(offsets):
        result[:] = offsets.min()
        result[alive] = offsets
    return result
