"""Integer levels <-> bytes: the probability model of a weight matrix and the entropy coder that uses it.

The model. A level k of the weight in row i (output channel), column j (input channel) and tap t (kernel position) is
zero, or not, with odds that multiply over the three axes, and what is not zero decays geometrically:

    p(k ≠ 0) = 2^x / (1 + 2^x),   x = (index - 40) / 2,   index = offset + 2·(row_i + column_j + tap_t), kept in 0 … 63
    p(|k| | k ≠ 0) ~ (μ / (1 + μ))^|k|,   |k| = 1 … top,   μ = 2^((decay - 8) / 2),   both signs alike

A model may have a context (`contexts.py`): then the index also depends on how many neighbours of the weight live, and
the odds of the two signs on theirs, where neighbours are weights that were coded before. And rows may have a decay
each, as channels with many levels stand beside others with few: then signs are coded first, all of a matrix, and sizes
after them, so that there are as many tables as indices and decays, not as pairs of them.

Offsets in steps of one octave lose less than 0.03 bits per living weight against real-valued ones and cost two or
three bits each. Rows and columns that are wholly zero are named by a mask and cost nothing more.

Why tables of integers: a decoder must find the very same probabilities on every machine, so they are computed with
integer arithmetic, as 24-bit frequencies (`frequencies`), and the loss reads its prices from the same tables
(`prices`). Weights that share an index are coded together with one fixed table; that is what makes it fast: range
coding with one fixed table (`constriction`) takes a few nanoseconds a symbol, a model per symbol ten times as much.

Side information (the offsets, exponents, masks) is coded adaptively in blocks that double in length, each with the
frequencies of all symbols before it: no tables travel with the file (`Encoder.integers`).

Knows numpy and constriction, not torch. The file around it is `container.py`; fitting a model to weights is `rate.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from .contexts import Context, distances, passes, sum_of_neighbours
from .errors import FormatError

Ints = NDArray[np.int64]

TOTAL_BITS = 24
TOTAL = 1 << TOTAL_BITS
INDICES = 64
"""Number of activity indices, half an octave of odds apart."""
CENTER = 40
"""The index with odds one to one."""
DECAYS = range(-16, 32)
"""Decay indices, half an octave of mean excess level apart: where levels are rarely above one they lie below zero."""
MAX_TOP = 32767
"""Largest level that a file can hold."""
OFFSET_RANGE = 32
"""Offsets of rows, columns and taps lie in -32 … 32 octaves."""

_SQRT2_16 = 92682  # round(sqrt(2) · 2^16): the only irrational number of the model, fixed here for all time
_FINE = 40  # bits of the geometric tail's fixed-point arithmetic


def _half_octaves(n: int) -> tuple[int, int]:
    """2^(n/2) as an exact integer fraction (numerator, denominator)."""
    whole, odd = divmod(n, 2)
    numerator, denominator = (_SQRT2_16, 1 << 16) if odd else (1, 1)
    return (numerator << whole, denominator) if whole >= 0 else (numerator, denominator << -whole)


@lru_cache(maxsize=256)
def _tail(decay: int, top: int) -> Ints:
    """(top,) shares of the levels 1 … top among the living ones, as integers that sum to at most 2^24."""
    if top == 1:
        return np.array([TOTAL], np.int64)
    mu, one = _half_octaves(decay - 8)
    value, values = 1 << _FINE, []
    for _ in range(top):
        values.append(value)
        value = value * mu // (mu + one)
    total = sum(values)
    return np.array([(v << TOTAL_BITS) // total for v in values], np.int64)


_SHARE_BITS = 15


def positive_share(tilt: int) -> int:
    """Out of 2^15: how many of the living levels are positive where the odds of it are 2^(tilt/2)."""
    odds, one = _half_octaves(abs(tilt))
    share = (odds << _SHARE_BITS) // (odds + one)
    return share if tilt >= 0 else (1 << _SHARE_BITS) - share


@lru_cache(maxsize=4096)
def frequencies(index: int, decay: int, top: int, tilt: int = 0) -> Ints:
    """Frequencies of the levels -top … top out of 2^24; each at least 1, their sum exactly 2^24.

    Args:
        index: activity index, 0 … 63.
        decay: decay index, -16 … 31.
        top: largest absolute level, 0 … 32767. With 0 there is one level, zero, which is free.
        tilt: half octaves of odds for a positive level against a negative one, -28 … 28.

    Returns:
        (2·top + 1,) integers. They depend on nothing but the arguments: integer arithmetic throughout.
    """
    if top == 0:
        return np.array([TOTAL], np.int64)
    odds, one = _half_octaves(index - CENTER)
    shared = TOTAL - (2 * top + 1)  # every level has one unit of its own; the rest is shared out
    living = odds * shared // (odds + one) * _tail(decay, top)  # below 2^48
    positive = positive_share(tilt)
    up, down = (1 + ((living * s) >> (TOTAL_BITS + _SHARE_BITS)) for s in (positive, (1 << _SHARE_BITS) - positive))
    zero = TOTAL - int(up.sum()) - int(down.sum())
    return np.concatenate([down[::-1], [zero], up])


@lru_cache(maxsize=256)
def size_frequencies(decay: int, top: int) -> Ints:
    """Frequencies of the absolute values 1 … top of living levels out of 2^24; each at least 1, their sum exactly 2^24.

    Args:
        decay: decay index, -16 … 31.
        top: largest absolute level, 1 … 32767.

    Returns:
        (top,) integers, from integer arithmetic alone.
    """
    table = 1 + (_tail(decay, top) * (TOTAL - top) >> TOTAL_BITS)
    table[0] += TOTAL - table.sum()
    return table


@lru_cache(maxsize=64)
def geometric(top: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(48,) bits of each further level, and of the first, at each of `DECAYS`, where there are `top` levels:
    `frequencies` but for rounding."""
    mean = np.exp2((np.array(DECAYS) - 8) / 2)
    further = np.log2((1 + mean) / mean)
    return further, np.log2((1 - np.exp2(-further * top)) / (1 - np.exp2(-further)))


@lru_cache(maxsize=256)
def prices(decay: int, top: int) -> NDArray[np.float64]:
    """(64, top + 1) bits of a level of absolute value 0 … top at each activity index: what `frequencies` charge."""
    rows = [frequencies(index, decay, top)[top:] for index in range(INDICES)]
    return TOTAL_BITS - np.log2(np.array(rows, np.float64))


@dataclass(frozen=True, eq=False)
class LevelModel:
    """The probability model of one weight matrix with the axes (rows, columns, taps)."""

    offset: int
    """Activity index that all weights share, -64 … 127; with the other offsets added it is kept in 0 … 63."""
    decay: int
    """Decay index, -16 … 31."""
    top: int
    """Largest absolute level, 0 … 32767; 0 means that all levels are zero."""
    alive_rows: NDArray[np.bool_]
    """(rows,) False where all levels of the row are zero."""
    alive_columns: NDArray[np.bool_]
    """(columns,) False where all levels of the column are zero."""
    rows: Ints | None
    """Octaves of each living row, -32 … 32; None where all are zero."""
    columns: Ints | None
    """Octaves of each living column, -32 … 32; None where all are zero."""
    taps: Ints
    """(taps,) octaves of each kernel position, -32 … 32."""
    context: Context | None = None
    """What neighbours change; None for nothing."""
    decays: Ints | None = None
    """Decay index of each living row, -16 … 31, in place of `decay`, which is 0 then; None where all rows share it.
    Never where `top` is 1: there are no sizes then."""

    def indices(self) -> NDArray[np.uint8]:
        """(living rows, living columns, taps) activity index of each weight that is coded."""
        rows = np.zeros(int(self.alive_rows.sum()), np.int64) if self.rows is None else self.rows
        columns = np.zeros(int(self.alive_columns.sum()), np.int64) if self.columns is None else self.columns
        inner = 2 * (columns[:, None] + self.taps[None, :]) + self.offset
        result = np.empty((len(rows), *inner.shape), np.uint8)
        for octaves in np.unique(rows):  # rows of the same octaves are alike
            result[rows == octaves] = np.clip(inner + 2 * octaves, 0, INDICES - 1)
        return result

    @property
    def uniform(self) -> bool:
        """Whether all weights share one index."""
        return self.rows is None and self.columns is None and not self.taps.any()

    @property
    def of_signs(self) -> "LevelModel":
        """The model of the signs alone, which are levels of -1 … 1."""
        return replace(self, top=min(self.top, 1), decay=0, decays=None)


def _by_key(keys: NDArray[np.uint8]) -> tuple[Ints, Iterator[tuple[int, int, int]]]:
    """Order that sorts weights by a key, keeping the matrix order inside one, and (key, start, stop) of each run."""
    flat = keys.reshape(-1)
    order = np.argsort(flat, kind="stable")
    stops = np.cumsum(np.bincount(flat, minlength=1))
    starts = np.concatenate([[0], stops[:-1]])
    return order, ((k, int(starts[k]), int(stops[k])) for k in np.flatnonzero(starts < stops).tolist())


def _categorical(table: Ints) -> Any:
    """The coder's model with exactly these frequencies.

    constriction gives each of the n symbols one unit and shares 2^24 - n among them in proportion to the weights it is
    given. With weights frequency - 1, whose sum is 2^24 - n, the share is the weight itself: no rounding takes place.
    """
    return constriction.stream.model.Categorical((table - 1).astype(np.float64), perfect=False)


@lru_cache(maxsize=8)
def _flat_table(width: int) -> Ints:
    return np.full(1 << width, TOTAL >> width, np.int64)


def _flat(width: int) -> Any:
    """The coder's model of `width` raw binary digits."""
    return _categorical(_flat_table(width))


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of 4, 4, 8, 16 … elements: each as long as all before it."""
    start, stop = 0, min(4, length)
    while start < length:
        yield start, stop
        start, stop = stop, min(2 * stop, length)


def _counted(counts: Ints) -> Ints:
    """Frequencies out of 2^24 for symbols seen `counts` times, half a sighting added to each (Krichevsky-Trofimov)."""
    weights = 2 * counts + 1
    table = 1 + weights * (TOTAL - len(counts)) // weights.sum()
    table[int(np.argmax(table))] += TOTAL - table.sum()
    return np.asarray(table, np.int64)


def integers_bits(values: Sequence[int] | NDArray[Any], low: int, high: int) -> float:
    """Bits that `Encoder.integers` spends on these values."""
    symbols = np.asarray(values, np.int64).reshape(-1) - low
    counts, bits = np.zeros(high - low + 1, np.int64), 0.0
    for start, stop in _blocks(len(symbols) if high > low else 0):
        table = _counted(counts)
        bits += float((TOTAL_BITS - np.log2(table[symbols[start:stop]])).sum())
        counts += np.bincount(symbols[start:stop], minlength=len(counts))
    return bits


def _runs(mask: NDArray[np.bool_]) -> Ints:
    """Lengths of the runs of equal values, in order."""
    edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    return np.diff(np.concatenate([[0], edges, [len(mask)]])).astype(np.int64)


def _widths(values: Ints) -> Ints:
    """Number of binary digits of each positive integer."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


_CHUNK = 1 << 20
"""Levels that are decoded at once: a damaged count meets the end of memory politely, and the cache is put to use."""
_WIDTH_RANGE = (1, 32)
_RUN_WIDTHS = (1, 16)
_LONGEST_RUN = (1 << 16) - 1


def mask_bits(mask: NDArray[np.bool_]) -> float:
    """Bits that `Encoder.mask` spends on this mask."""
    if not len(mask):
        return 0.0
    return 1.0 + min(integers_bits(mask, 0, 1), _mask_bits_as_runs(mask))


def _mask_bits_as_runs(mask: NDArray[np.bool_]) -> float:
    runs = _runs(mask)
    if runs.max() > _LONGEST_RUN:
        return float("inf")
    widths = _widths(runs)
    count_bits = integers_bits(_widths(np.array([len(runs)])), *_WIDTH_RANGE) + len(runs).bit_length() - 1
    return 1.0 + count_bits + integers_bits(widths, *_RUN_WIDTHS) + float((widths - 1).sum())


def _checked(condition: bool, what: str) -> None:
    if not condition:
        raise FormatError(f"entropy-coded part: {what}")


def _living(levels: NDArray[Any], model: LevelModel) -> NDArray[Any]:
    """(living rows, living columns, taps) the levels that are coded; a view where nothing is dead."""
    if not model.alive_rows.all():
        levels = levels[model.alive_rows]
    return levels if model.alive_columns.all() else levels[:, model.alive_columns]


def _places(model: LevelModel, length: int) -> list[Ints]:
    """The positions of a row, of living columns, that each of the three passes codes."""
    assert model.context is not None
    living = np.repeat(model.alive_columns, len(model.taps))
    number = passes(length, model.context.pitch)
    return [np.flatnonzero(living & (number == n)) for n in range(3)]


def _keys(rows: NDArray[Any], model: LevelModel, number: int, places: Ints) -> NDArray[np.uint8]:
    """(living rows · places,) activity index · 3 + 1 + sign of the tilt of each weight that a pass codes.

    `rows` holds what the passes before have coded, and zeros: at the end of a line, a step leads to the next one, whose
    weights may not be known yet.
    """
    assert model.context is not None
    columns = np.zeros(len(model.alive_columns), np.int64)
    if model.columns is not None:
        columns[model.alive_columns] = model.columns
    inner = (2 * (columns[:, None] + model.taps[None, :]).reshape(-1)[places] + model.offset).astype(np.int16)
    outer = np.zeros(len(rows), np.int64) if model.rows is None else model.rows
    index = (2 * outer).astype(np.int16)[:, None] + inner[None, :]  # narrow numbers: memory is what this waits for
    sign = np.zeros(1, np.int8)
    if number:
        steps = distances(number, model.context.pitch)
        signs = np.sign(rows).astype(np.int8)
        living = sum_of_neighbours(np.abs(signs), steps)[:, places]
        index += model.context.bases[number - 1] + model.context.slopes[number - 1] * living.astype(np.int16)
        sign = np.sign(sum_of_neighbours(signs, steps)[:, places])
    return np.asarray(3 * np.clip(index, 0, INDICES - 1) + 1 + sign, np.uint8).reshape(-1)


def levels_bits(levels: NDArray[Any], model: LevelModel) -> float:
    """Bits that `Encoder.levels` spends on a matrix of levels (rows, columns, taps)."""
    if model.top == 0:
        return 0.0
    if model.decays is not None:
        of_sizes = sum(
            float((TOTAL_BITS - np.log2(size_frequencies(decay, model.top)[sizes])).sum())
            for decay, sizes in _sizes_by_decay(levels, model)
        )
        return levels_bits(np.sign(levels), model.of_signs) + of_sizes
    if model.context is None:
        sizes = np.abs(_living(levels, model).astype(np.int64))
        return float(prices(model.decay, model.top)[model.indices().astype(np.int64), sizes].sum())
    return sum(float((TOTAL_BITS - np.log2(table[symbols])).sum()) for symbols, table in _runs_in_passes(levels, model))


def _runs_in_passes(levels: NDArray[Any], model: LevelModel) -> Iterator[tuple[NDArray[np.int32], Ints]]:
    """Symbols and their table, one run after the other, in the order of the three passes."""
    assert model.context is not None
    rows = levels[model.alive_rows].reshape(int(model.alive_rows.sum()), levels.shape[1] * levels.shape[2])
    known = np.zeros_like(rows)
    for number, places in enumerate(_places(model, rows.shape[1])):
        order, runs = _by_key(_keys(known, model, number, places))
        coded = rows[:, places].reshape(-1)[order].astype(np.int32) + model.top
        for key, start, stop in runs:
            yield coded[start:stop], _table_of(key, model, model.context)
        known[:, places] = rows[:, places]


def _table_of(key: int, model: LevelModel, context: Context) -> Ints:
    return frequencies(key // 3, model.decay, model.top, (key % 3 - 1) * context.tilt)


def _rows_by_decay(model: LevelModel) -> Iterator[tuple[int, Ints]]:
    """Each decay that rows have, from the least on, and the numbers of these rows."""
    assert model.decays is not None
    rows = np.flatnonzero(model.alive_rows)
    return ((decay, rows[model.decays == decay]) for decay in np.unique(model.decays).tolist())


def _sizes_by_decay(levels: NDArray[Any], model: LevelModel) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Absolute values of living levels, less one, of the rows of each decay, in matrix order."""
    for decay, rows in _rows_by_decay(model):
        chosen = np.abs(levels[rows].astype(np.int32))
        yield decay, chosen[chosen > 0] - 1


class Encoder:
    """Writes levels and integers into one entropy-coded stream; `Decoder` reads them back in the same order."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def symbol(self, value: int, table: Ints) -> None:
        """Write one symbol of a table of frequencies whose sum is 2^24."""
        self._coder.encode(np.array([value], np.int32), _categorical(table))

    def integers(self, values: Sequence[int] | NDArray[Any], low: int, high: int) -> None:
        """Write integers of the range low … high, which the reader must know, along with how many there are."""
        symbols = np.asarray(values, np.int64).reshape(-1) - low
        assert len(symbols) == 0 or (symbols.min() >= 0 and symbols.max() <= high - low), "value outside its range"
        if high == low:
            return
        counts = np.zeros(high - low + 1, np.int64)
        for start, stop in _blocks(len(symbols)):
            self._coder.encode(symbols[start:stop].astype(np.int32), _categorical(_counted(counts)))
            counts += np.bincount(symbols[start:stop], minlength=len(counts))

    def digits(self, values: Ints, widths: Ints) -> None:
        """Write the binary digits below the leading one of positive integers whose widths the reader knows."""
        for width in range(2, int(widths.max(initial=1)) + 1):
            rest = values[widths == width] - (1 << (width - 1))
            for shift in range(0, width - 1, 8):
                size = min(8, width - 1 - shift)
                chunk = ((rest >> shift) & ((1 << size) - 1)).astype(np.int32)
                self._coder.encode(chunk, _flat(size))

    def mask(self, mask: NDArray[np.bool_]) -> None:
        """Write booleans: as they are, or as run lengths where that is shorter."""
        if not len(mask):
            return
        as_runs = _mask_bits_as_runs(mask) < integers_bits(mask, 0, 1)
        self.integers([int(as_runs)], 0, 1)
        if not as_runs:
            self.integers(mask, 0, 1)
            return
        runs = _runs(mask)
        self.integers([int(mask[0])], 0, 1)
        for values, widths in ((np.array([len(runs)]), _WIDTH_RANGE), (runs, _RUN_WIDTHS)):
            self.integers(_widths(values), *widths)
            self.digits(values, _widths(values))

    def levels(self, levels: NDArray[Any], model: LevelModel) -> None:
        """Write a matrix of levels (rows, columns, taps) with a model that the reader knows."""
        if model.top == 0:
            return
        if model.decays is not None:
            levels = np.asarray(levels)
            self.levels(np.sign(levels), model.of_signs)
            for decay, sizes in _sizes_by_decay(levels, model):
                self._coder.encode(sizes, _categorical(size_frequencies(decay, model.top)))
            return
        if model.context is not None:
            for symbols, table in _runs_in_passes(np.asarray(levels), model):
                self._coder.encode(symbols, _categorical(table))
            return
        alive = _living(np.asarray(levels), model).reshape(-1)
        runs = iter([(int(np.clip(model.offset, 0, INDICES - 1)), 0, len(alive))])
        if not model.uniform:
            order, runs = _by_key(model.indices())
            alive = alive[order]
        for index, start, stop in runs:
            symbols = alive[start:stop].astype(np.int32)  # first wider, then shifted: 16 bits do not hold 2·top
            symbols += model.top
            self._coder.encode(symbols, _categorical(frequencies(index, model.decay, model.top)))

    def finish(self) -> bytes:
        """The stream: a whole number of little-endian 32-bit words."""
        return np.asarray(self._coder.get_compressed(), "<u4").tobytes()


class Decoder:
    """Reads what `Encoder` wrote, in the same order. Damaged bytes give values in range or a `FormatError`."""

    def __init__(self, data: bytes) -> None:
        _checked(len(data) % 4 == 0, f"expected a whole number of 32-bit words, found {len(data)} bytes")
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
        self._empty = not data

    def _symbols(self, count: int, table: Ints) -> NDArray[np.int32]:
        _checked(not (self._empty and count), "it is missing")  # no symbol is coded in no words
        try:
            return np.asarray(self._coder.decode(_categorical(table), count), np.int32)
        except (AssertionError, ValueError) as error:  # constriction names invalid data so
            raise FormatError(f"entropy-coded part: damaged, {error}") from None

    def symbol(self, table: Ints) -> int:
        """Read one symbol of a table of frequencies whose sum is 2^24."""
        return int(self._symbols(1, table)[0])

    def integers(self, count: int, low: int, high: int) -> Ints:
        """Read `count` integers of the range low … high."""
        _checked(low <= high, f"an empty range, {low} … {high}")
        result = np.zeros(count, np.int64)
        if high == low:
            return result + low
        counts = np.zeros(high - low + 1, np.int64)
        for start, stop in _blocks(count):
            result[start:stop] = self._symbols(stop - start, _counted(counts))
            counts += np.bincount(result[start:stop], minlength=len(counts))
        return result + low

    def digits(self, widths: Ints) -> Ints:
        """Read positive integers of these widths."""
        values = np.int64(1) << (widths - 1)
        for width in range(2, int(widths.max(initial=1)) + 1):
            chosen = widths == width
            for shift in range(0, width - 1, 8):
                size = min(8, width - 1 - shift)
                values[chosen] += self._symbols(int(chosen.sum()), _flat_table(size)).astype(np.int64) << shift
        return np.asarray(values, np.int64)

    def mask(self, count: int) -> NDArray[np.bool_]:
        """Read `count` booleans."""
        if not count:
            return np.zeros(0, np.bool_)
        if not self.integers(1, 0, 1)[0]:
            return self.integers(count, 0, 1).astype(np.bool_)
        first = bool(self.integers(1, 0, 1)[0])
        number = int(self.digits(self.integers(1, *_WIDTH_RANGE))[0])
        _checked(number <= count, f"{number} runs in a mask of {count}")
        runs = self.digits(self.integers(number, *_RUN_WIDTHS))
        _checked(int(runs.sum()) == count, f"runs of {int(runs.sum())} in a mask of {count}")
        return np.repeat((np.arange(number) % 2 == 0) == first, runs)

    def levels(self, shape: tuple[int, int, int], model: LevelModel) -> NDArray[np.int16]:
        """Read a matrix of levels (rows, columns, taps), as int16."""
        if model.top == 0:
            return np.zeros(shape, np.int16)
        if model.decays is not None:
            return self._signs_and_sizes(shape, model)
        if model.context is not None:
            return self._levels_in_passes(shape, model)
        inner = (int(model.alive_rows.sum()), int(model.alive_columns.sum()), shape[2])
        alive = np.empty(inner[0] * inner[1] * inner[2], np.int16)
        if model.uniform:
            index = int(np.clip(model.offset, 0, INDICES - 1))
            self._levels_into(alive, frequencies(index, model.decay, model.top), model.top)
        else:
            order, runs = _by_key(model.indices())
            coded = np.empty_like(alive)
            for index, start, stop in runs:
                self._levels_into(coded[start:stop], frequencies(index, model.decay, model.top), model.top)
            alive[order] = coded
        if inner == shape:
            return alive.reshape(shape)
        result = np.zeros(shape, np.int16)
        result[np.ix_(model.alive_rows, model.alive_columns)] = alive.reshape(inner)
        return result

    def _levels_in_passes(self, shape: tuple[int, int, int], model: LevelModel) -> NDArray[np.int16]:
        assert model.context is not None
        result = np.zeros((shape[0], shape[1] * shape[2]), np.int16)
        rows = np.zeros((int(model.alive_rows.sum()), shape[1] * shape[2]), np.int16)
        for number, places in enumerate(_places(model, rows.shape[1])):
            order, runs = _by_key(_keys(rows, model, number, places))
            coded = np.empty(len(order), np.int16)
            for key, start, stop in runs:
                self._levels_into(coded[start:stop], _table_of(key, model, model.context), model.top)
            found = np.empty_like(coded)
            found[order] = coded
            rows[:, places] = found.reshape(len(rows), len(places))
        result[model.alive_rows] = rows
        return result.reshape(shape)

    def _signs_and_sizes(self, shape: tuple[int, int, int], model: LevelModel) -> NDArray[np.int16]:
        levels = self.levels(shape, model.of_signs)
        for decay, rows in _rows_by_decay(model):
            chosen = levels[rows]
            living = chosen != 0
            sizes = np.empty(int(living.sum()), np.int16)
            self._levels_into(sizes, size_frequencies(decay, model.top), -1)
            chosen[living] *= sizes
            levels[rows] = chosen
        return levels

    def _levels_into(self, target: NDArray[np.int16], table: Ints, top: int) -> None:
        """Fill `target` with levels of one table, whose first symbol is the level -top."""
        for start in range(0, len(target), _CHUNK):
            part = target[start : start + _CHUNK]
            part[:] = self._symbols(len(part), table) - top

    def finish(self) -> None:
        """Check that the stream ends here. Raises `FormatError` where words are left, or were missing."""
        _checked(self._coder.maybe_exhausted(), "its length is not that of its contents")
