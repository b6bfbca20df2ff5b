"""The probability model with the shortest code for given levels, its own description included.

First without neighbours, from marginal counts alone: offsets are whole octaves, a sum over all weights collapses to one
over the few distinct offsets, and the log-likelihood of an exponential family needs no more than its marginals. Then,
for matrices whose rows have a second direction (`pitch`), with neighbours (`contexts.py`): the same regression on the
few numbers of a context and on the offsets in turn, each from one count over all weights. What is shorter is taken.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .coder import (
    CENTER,
    DECAYS,
    MAX_TOP,
    OFFSET_RANGE,
    Ints,
    LevelModel,
    integers_bits,
    mask_bits,
    positive_share,
)
from .contexts import MAX_TILT, STRONGEST, Context
from .errors import UsageError
from .quantizer import LN2
from .surroundings import KINDS, shifts, surroundings

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
    magnitudes: Ints
    """(rows,) sum of the absolute levels of each row."""
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
        magnitudes=magnitude.sum(1, dtype=torch.float64).cpu().numpy().astype(np.int64),
        top=int(magnitude.max()) if magnitude.numel() else 0,
    )


def _sigmoid2(octaves: Floats) -> Floats:
    """2^x / (1 + 2^x) without overflow."""
    return 1.0 / (1.0 + np.exp2(np.clip(-octaves, -60, 60)))


def _log2_odds(share: Floats, whole: Floats | float) -> Floats:
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
    return _offsets_given(living, base, values, np.broadcast_to(times, (len(living), len(times))))


def _offsets_given(living: Ints, base: float, values: Floats, times: Floats) -> Ints:
    """Whole octaves of each entry of an axis whose weights have, beside `base`, these octaves so many `times`."""
    used = times.any(0)
    values, times = values[used], times[:, used]
    size = times.sum(1)
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
    decay, decays = _fit_decays(marginals[0], counts.magnitudes[alive_rows] - marginals[0], counts.top)
    return LevelModel(
        offset=int(np.clip(round(2 * base) + CENTER, -64, 127)),
        decay=decay,
        top=counts.top,
        alive_rows=alive_rows,
        alive_columns=alive_columns,
        rows=chosen[0] if chosen[0].any() else None,
        columns=chosen[1] if chosen[1].any() else None,
        taps=chosen[2],
        decays=decays,
    )


def _fit_decays(living: Ints, excess: Ints, top: int) -> tuple[int, Ints | None]:
    """The decay of all rows, and None, or, where that is shorter, 0 and one for each.

    A row pays for being told apart: its decay is the best for its levels and for what it costs to name it among the
    others, which are counted in turn. Half a level more than there is counts in the choice (Krichevsky-Trofimov), so
    that one that comes to a row of ones is not too dear. That there are no levels above `top` is not made use of: where
    a row has about as many of each, its code would be a little shorter with all alike, and no price would pull them
    down.
    """
    if top < 2:
        return 0, None
    mean = excess.sum() / max(living.sum(), 1)
    shared = int(np.clip(round(2 * np.log2(mean)) + 8, DECAYS[0], DECAYS[-1]))
    means = np.exp2((np.array(DECAYS) - 8) / 2)
    further = np.log2((1 + means) / means)
    bits = living[:, None] * np.log2(1 + means) + excess[:, None] * further
    choice = bits + 0.5 * further
    places = choice.argmin(1)
    for _ in range(4):
        times = np.bincount(places, minlength=len(DECAYS)) + 0.5
        places = (choice - np.log2(times / times.sum())).argmin(1)
    decays = places.astype(np.int64) + DECAYS[0]
    own = float(bits[np.arange(len(bits)), places].sum()) + offset_bits(decays)
    return (0, decays) if own < bits[:, DECAYS.index(shared)].sum() else (shared, None)


def offset_bits(offsets: Ints) -> float:
    """Bits that a list of offsets, or of decays, costs in the file: its range and its values."""
    if not len(offsets):
        return 0.0
    low, high = int(offsets.min()), int(offsets.max())
    return 12.0 + integers_bits(offsets, low, high)


def side_bits(model: LevelModel) -> float:
    """Bits of the model's own description in the file: masks, offsets, decays of rows, and a context.

    Scalars that every model has are counted with the header.
    """
    every = (model.rows, model.columns, model.taps if model.taps.any() else None, model.decays)
    lists = [o for o in every if o is not None]
    masks = mask_bits(model.alive_rows) + mask_bits(model.alive_columns) if model.top else 0.0
    return masks + sum(offset_bits(o) for o in lists) + context_bits(model.context)


def context_bits(context: Context | None) -> float:
    """Bits that a context takes in the header: a byte for each of its numbers, and one more for the flags."""
    return 0.0 if context is None else 8.0 * (6 + max(1, -(-context.pitch.bit_length() // 7)))


SHORTEST = 24
"""Rows of fewer positions are not looked at for neighbours."""
_SAMPLE = 128
_SAMPLE_WEIGHTS = 1 << 15
"""Weights in which neighbours are looked for before all are."""
_SPAN = 64


def fit_levels(levels: Tensor, taps: int = 1, pitch: int | None = None) -> LevelModel:
    """The model with the shortest code for a matrix of levels, with neighbours or without.

    Args:
        levels: (rows, columns · taps) integers, which may be stored as floats.
        taps: kernel positions.
        pitch: positions in a line of a row, such as the width of a kernel; None to look for one.
    """
    counts = count(levels, taps)
    plain = fit(counts)
    if plain.top == 0 or levels.shape[1] < SHORTEST:
        return plain
    if pitch is None:
        pitch = find_pitch(levels)
    if pitch is None or not 2 <= pitch <= levels.shape[1] // 2:
        return plain
    every = levels.numel() // _SAMPLE_WEIGHTS
    if every > 1:  # a regression over all weights takes five times as long as all else: first a look at some rows
        some = levels[::every]
        some_counts = count(some, taps)
        some_plain = fit(some_counts)
        look = _Regression(some, taps, some_plain, some_counts, pitch)
        if some_plain.top and look.bits(look.with_context(some_plain)) >= look.bits(some_plain):
            return plain
    regression = _Regression(levels, taps, plain, counts, pitch)
    with_context = regression.best()
    return with_context if regression.bits(with_context) < regression.bits(plain) else plain


def find_pitch(levels: Tensor) -> int | None:
    """The distance, 3 positions or more, at which weights of a row are most likely to live together; None if none is.

    For a linear layer that reads an image it is the width of the image.
    """
    living = (levels[:: max(1, len(levels) // _SAMPLE)] != 0).cpu().numpy().astype(np.float64)
    living = living[living.any(1)]
    if not len(living):
        return None
    length = living.shape[1]
    expected = living.mean(1, keepdims=True) * living.mean(0, keepdims=True) / living.mean()
    spectrum = np.fft.rfft(living - expected, 2 * length, axis=1)
    together = np.fft.irfft((np.abs(spectrum) ** 2).sum(0))[3 : length // 2 + 1]
    if not len(together) or together.max() <= 0:
        return None
    return 3 + int(together.argmax())


class _Regression:
    """Fits offsets and a context to the same levels, each given the others."""

    def __init__(self, levels: Tensor, taps: int, plain: LevelModel, counts: Marginals, pitch: int) -> None:
        self.plain, self.pitch = plain, pitch
        self.marginals = (counts.rows[plain.alive_rows], counts.columns[plain.alive_columns], counts.taps)
        device = levels.device
        kind, sign = surroundings(levels, pitch)
        rows = torch.from_numpy(np.flatnonzero(plain.alive_rows)).to(device)
        places = torch.from_numpy(np.flatnonzero(np.repeat(plain.alive_columns, taps))).to(device)

        def coded(matrix: Tensor) -> Tensor:
            return matrix[rows][:, places]

        signs = coded(levels.sign().to(torch.int8))
        self.kind, self.living = coded(kind), signs != 0
        agreement = (signs * coded(sign)).flatten()
        self.same, self.opposite = int((agreement > 0).sum()), int((agreement < 0).sum())
        self.owners = (
            torch.arange(len(rows), device=device)[:, None],
            torch.arange(len(places), device=device)[None, :] // taps,
            torch.arange(len(places), device=device)[None, :] % taps,
        )

    def best(self) -> LevelModel:
        """The best model with a context: fits in turn, and then leaves out the axes that do not pay."""
        model = self.with_context(self.plain)
        model = self.with_context(self._with_offsets(model))
        bits = self.bits(model)
        for axis in ("rows", "columns", "taps"):
            values = getattr(model, axis)
            if values is None or not values.any():
                continue
            nothing: Any = np.zeros_like(values) if axis == "taps" else None
            without = replace(model, **{axis: nothing})
            without = self.with_context(without)
            if self.bits(without) < bits:
                model, bits = without, self.bits(without)
        return model

    def bits(self, model: LevelModel) -> float:
        """Bits to say which weights live, their signs, and the part of the description that is open to choice."""
        times, living, octaves = self._cells(model)
        shift = self._shifts(model)[:, None] / 2
        odds = (model.offset - CENTER) / 2 + shift + octaves[None, :]
        bits = float((times * np.log2(1 + np.exp2(np.clip(odds, -60, 60))) - living * odds).sum())
        bits += int(living.sum()) + side_bits(model)
        if model.context is None:
            return bits
        share = positive_share(model.context.tilt) / 2**15
        return bits - self.same * math.log2(2 * share) - self.opposite * math.log2(2 - 2 * share)

    @staticmethod
    def _shifts(model: LevelModel) -> Ints:
        return np.zeros(KINDS, np.int64) if model.context is None else shifts(model.context)

    def _octaves(self, model: LevelModel, axes: tuple[int, ...] = (0, 1, 2)) -> Tensor:
        """(rows, places) octaves that the offsets of some axes add."""
        device = self.kind.device
        total = torch.zeros(1, 1, dtype=torch.int64, device=device)
        for axis in axes:
            values = (model.rows, model.columns, model.taps)[axis]
            if values is not None:
                total = total + torch.from_numpy(np.asarray(values, np.int64)).to(device)[self.owners[axis]]
        return total.clamp(-_SPAN, _SPAN)

    def _cells(self, model: LevelModel) -> tuple[Floats, Floats, Floats]:
        """(kinds, octaves) number of weights, and of living ones, of that kind and these octaves; and the octaves."""
        span = 2 * _SPAN + 1
        key = self.kind.to(torch.int64) * span + (self._octaves(model) + _SPAN)
        times = torch.bincount(key.flatten(), minlength=KINDS * span)
        living = torch.bincount(key[self.living], minlength=KINDS * span)
        shape = (KINDS, span)
        return (
            times.cpu().numpy().reshape(shape).astype(np.float64),
            living.cpu().numpy().reshape(shape).astype(np.float64),
            np.arange(-_SPAN, _SPAN + 1).astype(np.float64),
        )

    def with_context(self, model: LevelModel) -> LevelModel:
        """The model with the context, and the common offset, that fit best to its other offsets."""
        times, living, octaves = self._cells(model)
        steps = np.arange(5.0)
        design = np.zeros((KINDS, 5))  # common offset, bases of two passes, slopes of two passes
        design[:, 0] = 1
        design[1:6, 1], design[6:, 2], design[1:6, 3], design[6:, 4] = 1, 1, steps, steps
        start = np.array([(model.offset - CENTER) / 2, 0, 0, 0, 0])
        if model.context is not None:
            start[1:] = np.array([*model.context.bases, *model.context.slopes]) / 2
        free = [0, 1, 2, 3, 4]
        for rounded in ((3, 4), (1, 2), (0,)):  # what has been rounded is made up for by the rest
            start = _newton(start, design, free, times, living, octaves)
            for i in rounded:
                start[i] = np.clip(round(2 * start[i]), -STRONGEST, STRONGEST) / 2
                free.remove(i)
        numbers = [int(2 * x) for x in start]
        tilt = round(2 * float(np.log2((self.same + 0.5) / (self.opposite + 0.5))))
        context = Context(
            self.pitch,
            (numbers[1], numbers[2]),
            (numbers[3], numbers[4]),
            int(np.clip(tilt, -MAX_TILT, MAX_TILT)),
        )
        return replace(model, offset=int(np.clip(numbers[0] + CENTER, -64, 127)), context=context)

    def _with_offsets(self, model: LevelModel) -> LevelModel:
        """The model with offsets, of the axes that have some, that fit best to its context."""
        device = self.kind.device
        shift = torch.from_numpy(self._shifts(model)).to(device)[self.kind.to(torch.int64)]
        for axis, name in enumerate(("rows", "columns", "taps")):
            values = getattr(model, name)
            if values is None or not values.any():
                continue
            others = (shift + 2 * self._octaves(model, tuple(a for a in range(3) if a != axis))).clamp(
                -2 * _SPAN, 2 * _SPAN
            )
            span = 4 * _SPAN + 1
            key = self.owners[axis] * span + (others + 2 * _SPAN)
            times = torch.bincount(key.flatten(), minlength=len(values) * span)
            offsets = _offsets_given(
                self.marginals[axis],
                (model.offset - CENTER) / 2,
                np.arange(-2 * _SPAN, 2 * _SPAN + 1) / 2,
                times.cpu().numpy().reshape(len(values), span).astype(np.float64),
            )
            found: dict[str, Any] = {name: offsets}
            model = replace(model, **found)
        return model


def _newton(start: Floats, design: Floats, free: list[int], times: Floats, living: Floats, octaves: Floats) -> Floats:
    """Logistic regression in octaves on cells (kinds, octaves), of the numbers `free`; the others stay."""
    theta = start.copy()
    some = design[:, free]
    for _ in range(12):
        share = _sigmoid2((design @ theta)[:, None] + octaves[None, :])
        gradient = some.T @ (living - times * share).sum(1)
        curvature = some.T @ ((times * share * (1 - share)).sum(1)[:, None] * some) * LN2
        change = np.linalg.solve(curvature + 1e-3 * np.eye(len(free)), gradient)
        theta[free] += np.clip(change, -4, 4)
        theta = np.clip(theta, -_SPAN / 2, _SPAN / 2)
        if np.abs(change).max() < 1e-3:
            break
    return theta
