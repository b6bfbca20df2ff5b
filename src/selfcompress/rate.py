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

The model's parameters need no gradient. They are fitted in closed form to the levels every few steps (`fit`), and where
they are optimal the derivative of the code length with respect to them is zero (envelope theorem).

`fit` works on marginal counts alone, so its cost does not grow with the weights: offsets are whole octaves, a sum over
all weights collapses to one over the few distinct offsets, and the log-likelihood of an exponential family needs no
more than its marginals.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .coder import (
    CENTER,
    DECAYS,
    INDICES,
    MAX_TOP,
    OFFSET_RANGE,
    Ints,
    LevelModel,
    integers_bits,
    mask_bits,
    prices,
)
from .errors import UsageError
from .quantizer import LN2, Grid, limits

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Marginals:
    """All that `fit` needs to know of a matrix of levels (rows, columns, taps)."""

    rows: Ints
    """(rows,) number of living (non-zero) levels in each row."""
    columns: Ints
    """(columns,) number of living levels in each column."""
    taps: Ints
    """(taps,) number of living levels at each kernel position."""
    magnitude: int
    """Sum of the absolute levels."""
    top: int
    """Largest absolute level."""


def count(levels: Tensor, taps: int = 1) -> Marginals:
    """Count the living levels of a matrix (rows, columns · taps) of integers, which may be stored as floats."""
    cube = levels.reshape(levels.shape[0], -1, taps)
    living = cube != 0
    by_column_tap = living.sum(0, dtype=torch.int32)
    magnitude = levels.abs()
    return Marginals(
        rows=living.sum((1, 2)).cpu().numpy().astype(np.int64),
        columns=by_column_tap.sum(1).cpu().numpy().astype(np.int64),
        taps=by_column_tap.sum(0).cpu().numpy().astype(np.int64),
        magnitude=int(magnitude.sum(dtype=torch.float64)),
        top=int(magnitude.max()) if magnitude.numel() else 0,
    )


def _sigmoid2(octaves: Floats) -> Floats:
    """2^x / (1 + 2^x) without overflow."""
    return 1.0 / (1.0 + np.exp2(np.clip(-octaves, -60, 60)))


def _log2_odds(share: Floats, whole: float) -> Floats:
    return np.asarray(np.log2((share + 0.5) / (whole - share + 0.5)), np.float64)


def _spread(*offsets: Ints) -> tuple[Floats, Floats]:
    """Distinct sums of one offset from each list, in order, and how often each occurs."""
    times: Floats = np.ones(1)
    for offset in offsets:
        times = np.convolve(times, np.bincount(offset + OFFSET_RANGE, minlength=2 * OFFSET_RANGE + 1))
    values = np.flatnonzero(times)
    return (values - OFFSET_RANGE * len(offsets)).astype(np.float64), times[values]


def _center(base: float, living: int, *offsets: Ints) -> float:
    """The common log2-odds at which as many living weights are expected as there are (Newton's method)."""
    values, times = _spread(*offsets)
    for _ in range(8):
        share = _sigmoid2(base + values)
        slope = LN2 * float((times * share * (1 - share)).sum())
        change = float(np.clip((living - float((times * share).sum())) / max(slope, 1e-9), -4, 4))
        base += change
        if abs(change) < 1e-3:
            break
    return base


def _axis_offsets(living: Ints, base: float, others: tuple[Ints, ...]) -> Ints:
    """Whole octaves of each entry of an axis, given the common log2-odds and the other axes' offsets."""
    values, times = _spread(*others)
    size = float(times.sum())
    result = np.zeros(len(living))
    for _ in range(4):
        expected = (_sigmoid2(base + result[:, None] + values[None, :]) * times).sum(1)
        result += _log2_odds(living.astype(np.float64), size) - _log2_odds(expected, size)
    return np.clip(np.rint(result), -OFFSET_RANGE, OFFSET_RANGE).astype(np.int64)


def _activity_bits(base: float, marginals: tuple[Ints, ...], offsets: tuple[Ints, ...]) -> float:
    """Bits to say which weights live, with these log2-odds: -log-likelihood, from the marginals alone."""
    values, times = _spread(*offsets)
    silent = float((times * np.log2(1 + np.exp2(np.clip(base + values, -60, 60)))).sum())
    gained = base * float(marginals[0].sum())
    return silent - gained - sum(float((m * o).sum()) for m, o in zip(marginals, offsets, strict=True))


def fit(counts: Marginals) -> LevelModel:
    """The probability model with the shortest code, its own description included, for levels with these marginals.

    Of the three axes (rows, columns, taps) those offsets are kept whose gain exceeds their price.
    """
    if counts.top > MAX_TOP:
        raise UsageError(
            f"levels: expected at most {MAX_TOP} in absolute value, found {counts.top}\n"
            "hint: lower `initial_bits`; formats of more than 16 bits are float territory"
        )
    alive_rows, alive_columns = counts.rows > 0, counts.columns > 0
    living = int(counts.rows.sum())
    marginals = (counts.rows[alive_rows], counts.columns[alive_columns], counts.taps)
    flat = tuple(np.zeros(len(m), np.int64) for m in marginals)
    size = float(np.prod([len(m) for m in marginals]))
    base = float(_log2_odds(np.array([living], np.float64), size)[0]) if living else 0.0
    offsets = list(flat)
    if living and len(marginals[0]) > 1:
        for _ in range(2):
            for axis in range(3):
                others = tuple(o for i, o in enumerate(offsets) if i != axis)
                offsets[axis] = _axis_offsets(marginals[axis], base, others)
            base = _center(base, living, *offsets)
    best_bits, best = float("inf"), (base, flat)
    for choice in range(8):
        chosen = tuple(o if choice >> i & 1 else z for i, (o, z) in enumerate(zip(offsets, flat, strict=True)))
        if any(choice >> i & 1 and not o.any() for i, o in enumerate(offsets)):
            continue  # the same as without that axis
        center = _center(base, living, *chosen) if living else 0.0
        bits = _activity_bits(center, marginals, chosen) + sum(offset_bits(c) for c in chosen if c.any())
        if bits < best_bits:
            best_bits, best = bits, (center, chosen)
    base, chosen = best
    excess = counts.magnitude / living - 1 if living else 0.0
    return LevelModel(
        offset=int(np.clip(round(2 * base) + CENTER, -64, 127)),
        decay=int(np.clip(round(2 * np.log2(max(excess, 1e-9))) + 8, 0, DECAYS - 1)),
        top=counts.top,
        alive_rows=alive_rows,
        alive_columns=alive_columns,
        rows=chosen[0] if chosen[0].any() else None,
        columns=chosen[1] if chosen[1].any() else None,
        taps=chosen[2],
    )


def offset_bits(offsets: Ints) -> float:
    """Bits that a list of offsets costs in the file: its range and its values."""
    if not len(offsets):
        return 0.0
    low, high = int(offsets.min()), int(offsets.max())
    return 12.0 + integers_bits(offsets, low, high)


def side_bits(model: LevelModel) -> float:
    """Bits of the model's own description in the file: masks and offsets; scalars are counted with the header."""
    lists = [o for o in (model.rows, model.columns, model.taps if model.taps.any() else None) if o is not None]
    masks = mask_bits(model.alive_rows) + mask_bits(model.alive_columns) if model.top else 0.0
    return masks + sum(offset_bits(o) for o in lists)


class PriceTable:
    """A fitted model as tensors: what each weight costs as zero, what the first level adds, and each further one.

    Attributes:
        zero: (rows, columns · taps) bits of a zero level; 0 in dead rows and columns, which are named by a mask.
        first: (rows, columns · taps) bits that a level of ±1 costs more than a zero.
        further: bits of each further level.
        pull: (rows, columns · taps) `first` as the gradient knows it: never less than `further`, see `_CodeLength`.
    """

    def __init__(self, model: LevelModel, shape: tuple[int, int], taps: int, like: Tensor) -> None:
        self.model = model
        table = prices(model.decay, max(model.top, 1))
        rows = _filled(model.rows, model.alive_rows)
        columns = _filled(model.columns, model.alive_columns)
        octaves = rows[:, None, None] + columns[None, :, None] + model.taps.astype(np.int16)[None, None, :]
        index = torch.from_numpy(np.clip(2 * octaves + np.int16(model.offset), 0, INDICES - 1).astype(np.int32))
        index = index.reshape(shape).to(like.device)
        coded = torch.from_numpy(np.outer(model.alive_rows, np.repeat(model.alive_columns, taps))).to(like.device)
        zero = torch.as_tensor(table[:, 0], dtype=like.dtype, device=like.device)
        first = torch.as_tensor(table[:, 1] - table[:, 0], dtype=like.dtype, device=like.device)
        self.zero = zero[index].mul_(coded)
        self.first = first[index]
        mean = 2.0 ** ((model.decay - 8) / 2)
        self.further = float(np.log2((1 + mean) / mean))
        self.pull = self.first.clamp(min=self.further)


class _CodeLength(torch.autograd.Function):
    """Price of the levels of a matrix; its gradient is worked out on the way, so that one matrix is kept, not five."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bits: Tensor, exponent: Tensor, grid: Grid, table: PriceTable) -> Tensor:
        step = torch.exp2(exponent)[:, None]
        scaled = rows / step
        low, high = limits(bits, grid)
        clipped = torch.minimum(torch.maximum(scaled, low[:, None]), high[:, None])
        size = clipped.abs()
        level = size.round()
        total = table.zero.sum() + torch.where(level > 0, table.first + (level - 1) * table.further, 0.0).sum()
        if any(ctx.needs_input_grad):
            # The slope of the price in the real level, away from zero; 2|u|·first below one level, see the module.
            # Where nearly all weights live, a zero is the rarest and dearest level: a network of ±1 would never leave
            # that state, so the gradient takes the price for unimodal.
            slope = torch.where(size < 1, 2 * size * table.pull, table.further).mul_(scaled.sign())
            outside = scaled != clipped
            edge = torch.einsum("cn,cn->c", slope.abs(), outside.to(slope.dtype))
            slope.masked_fill_(outside, 0.0)
            grad_exponent = torch.einsum("cn,cn->c", slope, scaled).mul_(-LN2)
            ctx.save_for_backward(slope.div_(step), edge.mul_(torch.exp2(bits - 1) * LN2), grad_exponent)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (grad,) = grads
        for_rows, for_bits, for_exponent = ctx.saved_tensors
        return for_rows * grad, for_bits * grad, for_exponent * grad, None, None


def code_length(rows: Tensor, bits: Tensor, exponent: Tensor, grid: Grid, table: PriceTable) -> Tensor:
    """Bits of the code of a weight matrix at its current levels, differentiable in all three tensors.

    Args:
        rows: (C, n) real weights.
        bits: (C,) bit depths; they enter where weights are clipped.
        exponent: (C,) base-2 logarithms of the steps, as used by the network.
        grid: grid of the levels.
        table: prices from a model that was fitted to levels of this matrix, perhaps some steps ago.

    Returns:
        Scalar, in bits. The weights' own code only: for what describes the model see `side_bits`.
    """
    return cast(Tensor, _CodeLength.apply(rows, bits, exponent, grid, table))  # type: ignore[no-untyped-call]


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
    """Offsets of all entries of an axis: those of dead ones are the lowest of the living."""
    result = np.zeros(len(alive), np.int16)
    if offsets is not None and len(offsets):
        result[:] = offsets.min()
        result[alive] = offsets
    return result
