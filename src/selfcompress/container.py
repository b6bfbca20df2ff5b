"""The `.scn` file: named tensors of levels and of plain numbers <-> bytes. Specified in `docs/format.md`.

    magic "SCN" · version · bytes of the raw numbers · raw numbers · entropy-coded stream · CRC-32

The stream begins with the header (metadata, number of records, records), whole bytes that `heading.py` codes; integers
are LEB128 (7 bits a byte, low ones first), signed ones zigzagged. Then it holds, record after record, masks, offsets,
exponents and levels, see `coder.py`. Files of version 1 have the header in front of the raw numbers, as it is; those of
version 2 say how long it is.

The reader distrusts what it reads: the checksum comes first, every length is checked against what is left, and no array
is made that the length of the file does not justify (`most_weights`). It executes nothing, and whatever is wrong ends
in a `FormatError`. Writing gives the same bytes for the same contents on every platform, and refuses what `read` would.

Knows numpy, not torch. What the tensors mean to a module is `packing.py`.
"""

import contextlib
import math
import os
import secrets
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .coder import (
    DECAYS,
    MAX_TOP,
    OFFSET_RANGE,
    Decoder,
    Encoder,
    Ints,
    LevelModel,
    integers_bits,
    levels_bits,
    mask_bits,
)
from .contexts import MAX_PITCH, MAX_TILT, STRONGEST, Context
from .errors import FormatError, OutputError
from .graph import DTYPES, Graph, decode_graph, encode_graph
from .heading import HeaderReader, write_header
from .wire import Field, Reader, Writer

MAGIC = b"SCN"
VERSION = 3
MAX_AXES = 8
MAX_NAME = 1 << 10
"""Bytes of a record's name: names share their beginnings, so that a short file could hold many long ones."""
MAX_NUMBER = 1 << 31
MAX_EXPONENTS = 1 << 16
"""Exponents of one tensor may span at most so many steps."""
MAX_SHIFT = 1 << 15
"""Shifts of a norm have at most so many steps."""
MAX_OCTAVES = 100
"""Exponents lie in -100 … 100 octaves: beyond, a step times a level does not fit single precision."""
NORM_RESOLUTION = 32
"""Exponents of norms' scales are multiples of 1/32 octave: two differ by 2.2 %."""

ACTIVATION_SIDES = ("..in", "..out")
"""How names of activations end: no part of a module's name is empty."""
ACTIVATION_RESOLUTION = 16
"""Exponents of activations are multiples of 1/16 octave: two steps differ by 4.4 %."""
GRAPH_NAME = "."
"""Name of the record of the graph. No parameter has a name that starts with a dot: such records are the graph's own."""

# Kinds of a record: where its numbers are and how they are stored; one table, all else is derived from it
_LEVELS, _NORM, _NUMBER, _GRAPH, _ACTIVATION = "levels", "norm", "number", "graph", "activation"
_NORM_LEVELS, _SCALES = "levels of a norm", "scales"
_KINDS = (
    _LEVELS, *(f"{_NORM} {d}" for d in ("float16", "float32")), *DTYPES, _NUMBER, _GRAPH, _ACTIVATION, _NORM_LEVELS,
    _SCALES,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LevelTensor:
    """A tensor whose weights are levels times 2^exponent, one exponent per row (output channel)."""

    name: str
    """Qualified name, such as `conv1.weight`."""
    original_shape: tuple[int, ...]
    """Shape before anything was removed."""
    shape: tuple[int, ...]
    """Shape now."""
    axis: int | None
    """Axis of the output channels (0 or 1), or None where one exponent serves the whole tensor."""
    groups: int
    """Groups of the convolution that this is the weight of, else 1."""
    transposed: bool
    """Whether it is the weight of a transposed convolution with groups, whose rows are ordered by group."""
    resolution: int
    """Exponents are multiples of 1/resolution."""
    exponents: Ints
    """Exponents, in steps of 1/resolution, of the living rows."""
    model: LevelModel
    levels: NDArray[np.int16]
    """(rows, columns, taps)"""

    @property
    def matrix(self) -> tuple[int, int, int]:
        """(rows, columns, taps) of the levels."""
        return matrix_shape(self.shape, self.axis, self.groups if self.transposed else 1)


@dataclass(frozen=True, eq=False)
class ScaleLevels:
    """Scales in whole steps of their logarithm."""

    signs: Ints
    """-1, 0 or 1, in the shape of their tensor."""
    exponents: Ints
    """(not zero,) of the scales that are not zero, in matrix order, in steps of 1/`NORM_RESOLUTION` octave."""

    @property
    def values(self) -> NDArray[np.float64]:
        """The scales."""
        scales = self.signs.astype(np.float64)
        scales[self.signs != 0] *= np.exp2(self.exponents / NORM_RESOLUTION)
        return scales

    def bits(self) -> float:
        """Bits of the stream, from the coder's tables."""
        return sum(integers_bits(v, *_range_of(v)) for v in (self.signs.reshape(-1), self.exponents))


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A tensor whose weights have no levels: it is stored as it is, or as scales."""

    name: str
    values: NDArray[Any]
    scales: ScaleLevels | None = None
    """What the file has in place of the numbers, which are double then: `tensor_of_scales`."""


def tensor_of_scales(name: str, scales: ScaleLevels) -> RawTensor:
    """A tensor of the numbers that the levels stand for."""
    return RawTensor(name, scales.values, scales)


@dataclass(frozen=True, eq=False)
class NormLevels:
    """Scales and shifts of a norm in whole steps: of their logarithm, and of a power of two."""

    signs: Ints
    """(channels,) -1, 0 or 1: those of the scales."""
    exponents: Ints
    """Of the scales that are not zero, in steps of 1/`NORM_RESOLUTION` octave."""
    step: int
    """Shifts are multiples of 2^step."""
    shifts: Ints
    """(channels,) shifts in these steps."""

    def bits(self, dead: NDArray[np.bool_] | None = None) -> float:
        """Bits of the stream, from the coder's tables; `dead` as `_dead_before` has it."""
        return sum(integers_bits(values, *_range_of(values)) for values in self.lists(dead))

    def lists(self, dead: NDArray[np.bool_] | None) -> tuple[Ints, ...]:
        """The integers of the stream: signs of channels that are not dead, of those that are, exponents, shifts."""
        alone = np.zeros(len(self.signs), np.bool_) if dead is None else dead
        return self.signs[~alone], self.signs[alone], self.exponents, self.shifts


@dataclass(frozen=True, eq=False)
class NormTensor:
    """A normalisation layer in evaluation mode, x ↦ scale · x + shift: its statistics are folded in."""

    name: str
    """Qualified name of the module."""
    scale: NDArray[Any]
    shift: NDArray[Any]
    levels: NormLevels | None = None
    """What the file has in place of the numbers, which are double then: `norm_of_levels`."""


def norm_of_levels(name: str, levels: NormLevels) -> NormTensor:
    """A norm with the scales and shifts that the levels stand for."""
    scale = ScaleLevels(levels.signs, levels.exponents).values
    return NormTensor(name, scale, levels.shifts * 2.0**levels.step, levels)


@dataclass(frozen=True)
class Number:
    """A whole number in the network's own code that followed a cut, such as `blocks.0.attn.num_heads`."""

    name: str
    """Qualified name of the module, a dot, and the name of the attribute."""
    value: int
    """The number now, 0 … 2^31."""


@dataclass(frozen=True)
class Activation:
    """How an activation is rounded: to levels of 0, or -top - 1, … top, times 2^(exponent / 16)."""

    name: str
    """Qualified name of a module, two dots, and `in` (its first argument) or `out` (what it returns)."""
    exponent: int
    top: int
    """1 … 255; at most 127 where there are levels below zero."""
    signed: bool
    """Whether there are levels below zero, one more than above."""


@dataclass(frozen=True)
class GraphRecord:
    """What the network computes with the other records; its name is `GRAPH_NAME`, and it comes last."""

    graph: Graph
    size_bytes: int = field(default=0, compare=False)
    """Bytes of the graph in the file; not looked at in writing."""
    name: str = GRAPH_NAME


Record = LevelTensor | RawTensor | NormTensor | Number | Activation | GraphRecord


@dataclass(frozen=True, eq=False)
class Contents:
    """What a `.scn` file holds."""

    records: tuple[Record, ...]
    metadata: str = ""
    """Free text; the command line keeps the recipe's names here."""


def matrix_shape(shape: tuple[int, ...], axis: int | None, groups: int = 1) -> tuple[int, int, int]:
    """(rows, columns, taps) of a tensor seen as one row per output channel; taps are the axes from the third on."""
    size = int(np.prod(shape, dtype=np.int64))
    if axis is None:
        return 1, size, 1
    rows = shape[axis] * (groups if axis == 1 else 1)
    taps = int(np.prod(shape[2:], dtype=np.int64))
    return rows, (size // (rows * taps) if rows * taps else 0), taps


def most_weights(size_bytes: int) -> int:
    """How many weights a file of this length may hold: a short file must not cost a reader much memory.

    2^20 in any case, 8192 more per byte of the first 4096 bytes and 512 more per further byte. A network compressed
    ten thousand times stays below that; a file of one megabyte costs a reader no more than two gigabytes.
    """
    return (1 << 20) + 8192 * min(size_bytes, 4096) + 512 * max(size_bytes - 4096, 0)


def fewest_bytes(weights: int) -> int:
    """The shortest length of a file that may hold so many weights. Inverse: `most_weights`."""
    beyond = max(0, weights - (1 << 20))
    first = min(-(-beyond // 8192), 4096)
    return first + -(-max(0, beyond - 8192 * 4096) // 512)


def _weights(shape: tuple[int, ...]) -> int:
    """Weights of a tensor as `most_weights` counts them: an empty axis as one, because the others cost memory."""
    return math.prod(max(size, 1) for size in shape)  # Python integers: no overflow


class _Budget:
    """How many weights the length of the file still justifies."""

    def __init__(self, size_bytes: int) -> None:
        self.left, self.size_bytes = most_weights(size_bytes), size_bytes

    def spend(self, shape: tuple[int, ...], name: str) -> None:
        self.left -= _weights(shape)
        if self.left < 0:
            raise FormatError(
                f"`{name}`: shape {shape} has more weights than a file of {self.size_bytes} bytes may hold, which is "
                f"{most_weights(self.size_bytes)}"
            )


# Flags of a record of levels
_TRANSPOSED, _SHRUNK, _HAS_GROUPS, _HAS_ROWS, _HAS_COLUMNS, _HAS_TAPS = 1, 2, 4, 8, 16, 32
_AXES: tuple[int | None, ...] = (None, 0, 1)
_OWN_DECAYS = 32
"""In place of a decay: each living row has its own."""


def _range_of(values: Ints) -> tuple[int, int]:
    return (int(values.min()), int(values.max())) if len(values) else (0, 0)


def _decay_code(model: LevelModel) -> int:
    """How the header names the decay: itself, 32 for rows that have their own, and above that those below zero."""
    if model.decays is not None:
        return _OWN_DECAYS
    return model.decay if model.decay >= 0 else _OWN_DECAYS - model.decay


def _write_levels(tensor: LevelTensor, header: Writer, stream: "_Later") -> None:
    model = tensor.model
    taps = model.taps if model.taps.any() else None
    lists = (model.rows, model.columns, taps)
    flags = (
        _TRANSPOSED * tensor.transposed
        | _SHRUNK * (tensor.shape != tensor.original_shape)
        | _HAS_GROUPS * (tensor.groups != 1)
        | sum(
            flag for flag, found in zip((_HAS_ROWS, _HAS_COLUMNS, _HAS_TAPS), lists, strict=True) if found is not None
        )
    )
    header.uint((_AXES.index(tensor.axis) + len(_AXES) * (model.context is not None)) * 64 | flags, Field.FLAGS)
    header.uint(len(tensor.shape), Field.AXES)
    header.shape(tensor.original_shape)
    if flags & _SHRUNK:
        header.shape(tensor.shape, Field.SIZE_NOW)
    if flags & _HAS_GROUPS:
        header.uint(tensor.groups, Field.GROUPS)
    header.uint(model.top, Field.TOP)
    if not model.top:
        return
    header.sint(model.offset, Field.OFFSET)
    header.uint(_decay_code(model), Field.DECAY)
    header.uint(tensor.resolution, Field.RESOLUTION)
    if model.context is not None:
        header.uint(model.context.pitch, Field.PITCH)
        for value in (*model.context.bases, *model.context.slopes, model.context.tilt):
            header.sint(value, Field.CONTEXT)
    stream.mask(model.alive_rows)
    stream.mask(model.alive_columns)
    for values in (*lists, model.decays, tensor.exponents):
        if values is not None:
            low, high = _range_of(values)
            header.sint(low, Field.LOWEST)
            header.uint(high - low, Field.SPAN)
            stream.integers(values, low, high)
    stream.levels(tensor.levels, model)


def _read_range(
    header: Reader, name: str, low: int, high: int, most: int, fields: tuple[Field, Field] = (Field.LOWEST, Field.SPAN)
) -> tuple[int, int]:
    first = header.sint(f"`{name}` range", 1 << 31, fields[0])
    last = first + header.uint(f"`{name}` range", most, fields[1])
    if first < low or last > high:
        raise FormatError(f"`{name}`: a range within {low} … {high} expected, found {first} … {last}")
    return first, last


@dataclass(frozen=True)
class _LevelsHeader:
    """A record of levels as far as the header tells."""

    name: str
    original_shape: tuple[int, ...]
    shape: tuple[int, ...]
    axis: int | None
    groups: int
    transposed: bool
    resolution: int
    offset: int
    decay: int
    top: int
    context: Context | None
    ranges: tuple[tuple[int, int] | None, ...]
    """Ranges of the offsets of rows, columns and taps, of the decays of rows, and of the exponents."""


def _read_levels_header(name: str, header: Reader, budget: _Budget) -> _LevelsHeader:
    flags = header.uint(f"`{name}` flags", 2 * 64 * len(_AXES) - 1, Field.FLAGS)
    axis = _AXES[flags // 64 % len(_AXES)]
    axes = header.uint(f"`{name}` axes", MAX_AXES, Field.AXES)
    original = header.shape(axes, f"`{name}` shape")
    shape = header.shape(axes, f"`{name}` shape", Field.SIZE_NOW) if flags & _SHRUNK else original
    groups = header.uint(f"`{name}` groups", 1 << 31, Field.GROUPS) if flags & _HAS_GROUPS else 1
    if axis is not None and axes < axis + 1:
        raise FormatError(f"`{name}`: channel axis {axis} of a tensor with {axes} axes")
    if any(now > before for now, before in zip(shape, original, strict=True)):
        raise FormatError(f"`{name}`: shape {shape} is larger than the original {original}")
    transposed = bool(flags & _TRANSPOSED)
    first = shape[0] if axes else 0
    if not 1 <= groups <= max(first, 1) or first % groups or (transposed and axis != 1):
        raise FormatError(f"`{name}`: {groups} groups do not fit shape {shape}, channel axis {axis}")
    budget.spend(original, name)
    top = header.uint(f"`{name}` top level", MAX_TOP, Field.TOP)
    if not top:
        return _LevelsHeader(name, original, shape, axis, groups, transposed, 1, 0, 0, 0, None, ())
    offset = header.sint(f"`{name}` offset", 128, Field.OFFSET)
    decay = header.uint(f"`{name}` decay", _OWN_DECAYS - DECAYS[0], Field.DECAY)
    own_decays = decay == _OWN_DECAYS
    if own_decays and top == 1:
        raise FormatError(f"`{name}`: decays of rows whose levels are -1 … 1, expected none")
    resolution = header.uint(f"`{name}` resolution", 1 << 16, Field.RESOLUTION)
    if not resolution:
        raise FormatError(f"`{name}`: an exponent resolution of 0")
    context = _read_context(name, header) if flags // 64 >= len(_AXES) else None
    ranges: list[tuple[int, int] | None] = []
    for flag in (_HAS_ROWS, _HAS_COLUMNS, _HAS_TAPS):
        found = flags & flag
        ranges.append(_read_range(header, name, -OFFSET_RANGE, OFFSET_RANGE, 2 * OFFSET_RANGE) if found else None)
    ranges.append(_read_range(header, name, DECAYS[0], DECAYS[-1], len(DECAYS) - 1) if own_decays else None)
    reach = MAX_OCTAVES * resolution
    ranges.append(_read_range(header, name, -reach, reach, MAX_EXPONENTS))
    if decay >= _OWN_DECAYS:
        decay = _OWN_DECAYS - decay
    return _LevelsHeader(
        name, original, shape, axis, groups, transposed, resolution, offset, decay, top, context, tuple(ranges)
    )


def _read_context(name: str, header: Reader) -> Context:
    pitch = header.uint(f"`{name}` pitch", MAX_PITCH, Field.PITCH)
    numbers = [header.sint(f"`{name}` context", STRONGEST, Field.CONTEXT) for _ in range(4)]
    tilt = header.sint(f"`{name}` tilt", MAX_TILT, Field.CONTEXT)
    if pitch < 2:
        raise FormatError(f"`{name}`: a pitch of {pitch}, expected 2 or more")
    return Context(pitch, (numbers[0], numbers[1]), (numbers[2], numbers[3]), tilt)


def _read_levels(head: _LevelsHeader, stream: Decoder) -> LevelTensor:
    matrix = matrix_shape(head.shape, head.axis, head.groups if head.transposed else 1)
    if not head.top:
        rows, columns = np.zeros(matrix[0], np.bool_), np.zeros(matrix[1], np.bool_)
        none = np.zeros(0, np.int64)
        model = LevelModel(0, 0, 0, rows, columns, None, None, np.zeros(matrix[2], np.int64))
        levels = stream.levels(matrix, model)
        return LevelTensor(
            head.name, head.original_shape, head.shape, head.axis, head.groups, head.transposed, 1, none, model, levels
        )
    rows, columns = stream.mask(matrix[0]), stream.mask(matrix[1])
    living = int(rows.sum())
    counts = (living, int(columns.sum()), matrix[2], living, living)
    lists = [
        stream.integers(n, *limits) if limits is not None else None
        for n, limits in zip(counts, head.ranges, strict=True)
    ]
    taps = lists[2] if lists[2] is not None else np.zeros(matrix[2], np.int64)
    model = LevelModel(
        head.offset, head.decay, head.top, rows, columns, lists[0], lists[1], taps, head.context, lists[3]
    )
    exponents = lists[4]
    assert exponents is not None
    return LevelTensor(
        name=head.name,
        original_shape=head.original_shape,
        shape=head.shape,
        axis=head.axis,
        groups=head.groups,
        transposed=head.transposed,
        resolution=head.resolution,
        exponents=exponents,
        model=model,
        levels=stream.levels(matrix, model),
    )


_SIGN_RANGES = ((1, 1), (0, 1), (-1, 1), (0, 0), (-1, 0), (-1, -1))
"""Least and largest sign of the scales of a norm, by their code."""


def _dead_before(records: Sequence[Record], number: int, channels: int) -> NDArray[np.bool_] | None:
    """Which rows do not live of the last levels before a norm, if there are as many as it has channels.

    Such a row of zeros mostly is what the norm reads, so that a scale of zero is likely there.
    """
    before = next((r for r in reversed(records[:number]) if isinstance(r, LevelTensor)), None)
    if before is None or len(before.model.alive_rows) != channels:
        return None
    return ~before.model.alive_rows


def _write_norm(levels: NormLevels, dead: NDArray[np.bool_] | None, header: Writer, stream: "_Later") -> None:
    header.uint(len(levels.signs), Field.SIZE)
    if not len(levels.signs):
        return
    signs = _range_of(levels.signs)
    header.uint(_SIGN_RANGES.index(signs), Field.SIGNS)
    header.sint(levels.step, Field.STEP)
    ranges = [signs, signs]
    for values in (levels.exponents, levels.shifts):
        low, high = _range_of(values)
        ranges.append((low, high))
        if len(values):
            header.sint(low, Field.NORM_LOWEST)
            header.uint(high - low, Field.NORM_SPAN)
    for values, limits in zip(levels.lists(dead), ranges, strict=True):
        stream.integers(values, *limits)


@dataclass(frozen=True)
class _NormHeader:
    """A record of a norm in levels as far as the header tells."""

    name: str
    channels: int
    signs: tuple[int, int]
    step: int
    exponents: tuple[int, int]
    shifts: tuple[int, int]


_OF_NORM = (Field.NORM_LOWEST, Field.NORM_SPAN)


def _read_signs(name: str, header: Reader) -> tuple[int, int]:
    return _SIGN_RANGES[header.uint(f"`{name}` signs", len(_SIGN_RANGES) - 1, Field.SIGNS)]


def _read_exponents(name: str, header: Reader, signs: tuple[int, int]) -> tuple[int, int]:
    reach = MAX_OCTAVES * NORM_RESOLUTION
    return (0, 0) if signs == (0, 0) else _read_range(header, name, -reach, reach, MAX_EXPONENTS, _OF_NORM)


def _read_norm_header(name: str, header: Reader, budget: _Budget) -> _NormHeader:
    (channels,) = header.shape(1, f"`{name}` shape")
    budget.spend((2, channels), name)
    nothing = (0, 0)
    if not channels:
        return _NormHeader(name, 0, nothing, 0, nothing, nothing)
    signs = _read_signs(name, header)
    step = header.sint(f"`{name}` step", MAX_OCTAVES, Field.STEP)
    exponents = _read_exponents(name, header, signs)
    shifts = _read_range(header, name, -MAX_SHIFT, MAX_SHIFT, 2 * MAX_SHIFT, _OF_NORM)
    return _NormHeader(name, channels, signs, step, exponents, shifts)


def _read_norm(head: _NormHeader, dead: NDArray[np.bool_] | None, stream: Decoder) -> NormTensor:
    alone = np.zeros(head.channels, np.bool_) if dead is None else dead
    signs = np.zeros(head.channels, np.int64)
    for chosen in (~alone, alone):
        signs[chosen] = stream.integers(int(chosen.sum()), *head.signs)
    exponents = stream.integers(int(np.count_nonzero(signs)), *head.exponents)
    shifts = stream.integers(head.channels, *head.shifts)
    return norm_of_levels(head.name, NormLevels(signs, exponents, head.step, shifts))


def _write_scales(scales: ScaleLevels, header: Writer, stream: "_Later") -> None:
    header.uint(scales.signs.ndim, Field.AXES)
    header.shape(scales.signs.shape)
    if not scales.signs.size:
        return
    signs = scales.signs.reshape(-1)
    ends = _range_of(signs)
    header.uint(_SIGN_RANGES.index(ends), Field.SIGNS)
    stream.integers(signs, *ends)
    if len(scales.exponents):
        low, high = _range_of(scales.exponents)
        header.sint(low, Field.NORM_LOWEST)
        header.uint(high - low, Field.NORM_SPAN)
        stream.integers(scales.exponents, low, high)


@dataclass(frozen=True)
class _ScalesHeader:
    """A record of scales as far as the header tells."""

    name: str
    shape: tuple[int, ...]
    signs: tuple[int, int]
    exponents: tuple[int, int]


def _read_scales_header(name: str, header: Reader, budget: _Budget) -> _ScalesHeader:
    shape = header.shape(header.uint(f"`{name}` axes", MAX_AXES, Field.AXES), f"`{name}` shape")
    budget.spend(shape, name)
    if not math.prod(shape):
        return _ScalesHeader(name, shape, (0, 0), (0, 0))
    signs = _read_signs(name, header)
    return _ScalesHeader(name, shape, signs, _read_exponents(name, header, signs))


def _read_scales(head: _ScalesHeader, stream: Decoder) -> RawTensor:
    signs = stream.integers(math.prod(head.shape), *head.signs)
    exponents = stream.integers(int(np.count_nonzero(signs)), *head.exponents)
    return tensor_of_scales(head.name, ScaleLevels(signs.reshape(head.shape), exponents))


def write(contents: Contents, version: int = VERSION) -> bytes:
    """The bytes of a `.scn` file with these contents. Inverse: `read`.

    Version 1 has its header as it is, later ones in the stream, unless that is too long for it.

    Raises `FormatError` for contents that a file cannot hold: foreign types, a range of exponents beyond all measure.
    """
    body, size = _body(contents, version), _all_weights(contents)
    if size > most_weights(len(body) + 4):
        raise FormatError(
            f"{size} weights in {len(body) + 4} bytes: a file of that length holds at most "
            f"{most_weights(len(body) + 4)}\nhint: nearly all weights are zero; lower `gamma`"
        )
    return body + zlib.crc32(body).to_bytes(4, "little")


def needed_bytes(contents: Contents) -> int:
    """Bytes of a file with these contents, or, where it would be too short for its weights, of one that would do."""
    return max(len(_body(contents, VERSION)) + 4, fewest_bytes(_all_weights(contents)))


def _all_weights(contents: Contents) -> int:
    return sum(_weights(r.original_shape) for r in contents.records if isinstance(r, LevelTensor))


class _Later:
    """What is to be written into the stream, once it is known what the header is."""

    def __init__(self) -> None:
        self.calls: list[Callable[[Encoder], None]] = []

    def integers(self, values: Ints, low: int, high: int) -> None:
        self.calls.append(lambda stream: stream.integers(values, low, high))

    def mask(self, mask: NDArray[np.bool_]) -> None:
        self.calls.append(lambda stream: stream.mask(mask))

    def levels(self, levels: NDArray[Any], model: LevelModel) -> None:
        self.calls.append(lambda stream: stream.levels(levels, model))


def most_header_bytes(size_bytes: int, version: int) -> int:
    """How many bytes the header of a file of this length may come to, where it is in the stream: it takes time."""
    return min(1024 + 16 * size_bytes, 1 << 18 if version == 2 else 1 << 16)


def _body(contents: Contents, version: int) -> bytes:
    """All of a file but its checksum."""
    header, later, raw = Writer(), _Later(), bytearray()
    header.text(contents.metadata)
    header.uint(len(contents.records), Field.RECORDS)
    previous = b""
    for number, record in enumerate(contents.records):
        _check_writable(record)
        name = record.name.encode()
        header.name(name, previous)
        previous = name
        if isinstance(record, LevelTensor):
            header.uint(_KINDS.index(_LEVELS), Field.KIND)
            _write_levels(record, header, later)
        elif isinstance(record, Number):
            header.uint(_KINDS.index(_NUMBER), Field.KIND)
            header.uint(record.value, Field.NUMBER)
        elif isinstance(record, Activation):
            header.uint(_KINDS.index(_ACTIVATION), Field.KIND)
            header.uint(2 * record.top + record.signed, Field.ROUNDING)
            header.sint(record.exponent, Field.ROUNDING)
        elif isinstance(record, GraphRecord):
            header.uint(_KINDS.index(_GRAPH), Field.KIND)
            # the model of the header finds more in it than deflate does, and nothing in what is deflated
            deflated = version < 3
            header.put(encode_graph(record.graph, [r.name for r in contents.records], deflated=deflated))
        elif isinstance(record, NormTensor) and record.levels is not None:
            header.uint(_KINDS.index(_NORM_LEVELS), Field.KIND)
            dead = _dead_before(contents.records, number, len(record.scale))
            _write_norm(record.levels, dead, header, later)
        elif isinstance(record, NormTensor):
            header.uint(_KINDS.index(f"{_NORM} {record.scale.dtype}"), Field.KIND)
            header.uint(len(record.scale), Field.SIZE)
            raw += _little(record.scale) + _little(record.shift)
        elif record.scales is not None:
            header.uint(_KINDS.index(_SCALES), Field.KIND)
            _write_scales(record.scales, header, later)
        else:
            header.uint(_KINDS.index(str(record.values.dtype)), Field.KIND)
            header.uint(record.values.ndim, Field.AXES)
            header.shape(record.values.shape)
            raw += _little(record.values)
    stream, lengths = Encoder(), Writer()
    if version > 1:
        if version == 2:
            lengths.uint(len(header.data))
        lengths.uint(len(raw))
        write_header(header, stream, version)
    for call in later.calls:
        call(stream)
    whole = MAGIC + bytes([version]) + (header.data if version == 1 else lengths.data) + raw + stream.finish()
    too_long = version > 1 and len(header.data) > most_header_bytes(len(whole) + 4, version)
    return _body(contents, 1) if too_long else whole


def _check_writable(record: Record) -> None:
    """Refuse what `read` would refuse, before it is written."""
    if len(record.name.encode()) > MAX_NAME:
        raise FormatError(f"`{record.name[:40]}…`: expected a name of at most {MAX_NAME} bytes")
    if isinstance(record, Number):
        if not 0 <= record.value <= MAX_NUMBER:
            raise FormatError(f"`{record.name}`: expected a number of 0 … {MAX_NUMBER}, found {record.value}")
        return
    if isinstance(record, Activation):
        _check_activation(record)
        return
    if isinstance(record, NormTensor | GraphRecord):
        return
    shape = record.original_shape if isinstance(record, LevelTensor) else record.values.shape
    if len(shape) > MAX_AXES:
        raise FormatError(f"`{record.name}`: expected at most {MAX_AXES} axes, found {len(shape)}")
    if isinstance(record, RawTensor):
        if str(record.values.dtype) not in DTYPES:
            raise FormatError(
                f"`{record.name}`: numbers of type {record.values.dtype} cannot be stored, only {', '.join(DTYPES)}"
            )
        return
    low, high = _range_of(record.exponents)
    if high - low > MAX_EXPONENTS or max(high, -low) > MAX_OCTAVES * record.resolution:
        raise FormatError(
            f"`{record.name}`: exponents {low / record.resolution:g} … {high / record.resolution:g} octaves, expected "
            f"at most {MAX_OCTAVES} in absolute value and {MAX_EXPONENTS / record.resolution:g} apart"
            "\nhint: lower the learning rate of the formats"
        )


def _check_activation(record: Activation) -> None:
    if not record.name.endswith(ACTIVATION_SIDES):
        raise FormatError(f"`{record.name}`: expected the name of an activation to end in `..in` or `..out`")
    most = 127 if record.signed else 255
    if not 1 <= record.top <= most:
        raise FormatError(f"`{record.name}`: expected a largest level of 1 … {most}, found {record.top}")
    if abs(record.exponent) > MAX_OCTAVES * ACTIVATION_RESOLUTION:
        octaves = record.exponent / ACTIVATION_RESOLUTION
        raise FormatError(
            f"`{record.name}`: expected a step of 2^-{MAX_OCTAVES} … 2^{MAX_OCTAVES}, found 2^{octaves:g}"
        )


def _read_activation(name: str, header: Reader) -> Activation:
    code = header.uint(f"`{name}` largest level", 511, Field.ROUNDING)
    reach = MAX_OCTAVES * ACTIVATION_RESOLUTION
    record = Activation(name, header.sint(f"`{name}` exponent", reach, Field.ROUNDING), code // 2, code % 2 == 1)
    _check_activation(record)
    return record


def _little(values: NDArray[Any]) -> bytes:
    return values.astype(values.dtype.newbyteorder("<")).tobytes()


_Head = _LevelsHeader | _NormHeader | _ScalesHeader
_READ_HEADER: dict[str, Callable[[str, Reader, _Budget], _Head]] = {
    _LEVELS: _read_levels_header,
    _NORM_LEVELS: _read_norm_header,
    _SCALES: _read_scales_header,
}
"""Kinds whose numbers are in the stream."""


def read(data: bytes) -> Contents:
    """The contents of a `.scn` file. Inverse: `write`. Raises `FormatError` whatever is wrong with the bytes."""
    if data[:3] != MAGIC:
        raise FormatError(f"expected a selfcompress file, which starts with {MAGIC!r}, found {data[:3]!r}")
    if len(data) < 10:
        raise FormatError(f"expected at least 10 bytes, found {len(data)}: the file is truncated")
    if not 1 <= data[3] <= VERSION:
        raise FormatError(f"format version {data[3]}, this reader knows 1 to {VERSION}\nhint: upgrade selfcompress")
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise FormatError("the checksum does not match: the file is truncated or altered\nhint: copy it again")
    header, budget, version = Reader(data[4:-4]), _Budget(len(data)), data[3]
    raw = header
    if version > 1:
        size = most_header_bytes(len(data), version)
        if version == 2:
            size = header.uint("header", size)
        raw = Reader(header.take(header.uint("raw numbers", len(data)), "raw numbers"))
        stream = Decoder(header.data[header.at :])
        header = HeaderReader(stream, size, version)
    metadata = header.text("metadata")
    pending: list[tuple[str, str, tuple[int, ...]]] = []
    heads: list[_Head] = []
    numbers: list[Number] = []
    activations: list[Activation] = []
    graphs: list[GraphRecord] = []
    order: list[tuple[str, int]] = []
    previous, names = b"", dict[str, None]()
    for _ in range(header.uint("number of records", header.size, Field.RECORDS)):
        if graphs:
            raise FormatError(f"`{GRAPH_NAME}`: expected the graph as the last record")
        previous = header.name(previous, MAX_NAME)
        name = previous.decode()
        if name in names:
            raise FormatError(f"`{name}` occurs twice")
        names[name] = None
        kind = _KINDS[header.uint(f"`{name}` kind", len(_KINDS) - 1, Field.KIND)]
        if kind in _READ_HEADER:
            order.append((_LEVELS, len(heads)))
            heads.append(_READ_HEADER[kind](name, header, budget))
        elif kind == _NUMBER:
            order.append((_NUMBER, len(numbers)))
            numbers.append(Number(name, header.uint(f"`{name}`", MAX_NUMBER, Field.NUMBER)))
        elif kind == _ACTIVATION:
            order.append((_ACTIVATION, len(activations)))
            activations.append(_read_activation(name, header))
        elif kind == _GRAPH:
            if name != GRAPH_NAME:
                raise FormatError(f"`{name}`: expected a graph to have the name `{GRAPH_NAME}`")
            order.append((_GRAPH, 0))
            start = header.bits
            graph = decode_graph(header, list(names))
            graphs.append(GraphRecord(graph, round((header.bits - start) / 8)))
        else:
            order.append((kind, len(pending)))
            axes = 1 if kind.startswith(_NORM) else header.uint(f"`{name}` axes", MAX_AXES, Field.AXES)
            pending.append((name, kind, header.shape(axes, f"`{name}` shape")))
    plain = [_read_raw(raw, *entry) for entry in pending]
    if version == 1:
        stream = Decoder(header.data[header.at :])
    elif version == 2 and header.at != header.size:
        raise FormatError(f"header: {header.size} bytes expected, found {header.at}")
    elif raw.at != raw.size:
        raise FormatError(f"raw numbers: {raw.size} bytes expected, found {raw.at}")
    try:
        coded = _read_stream(heads, stream)
    except MemoryError:
        raise FormatError("there is not enough memory for the weights that the file says it holds") from None
    stream.finish()
    found: dict[str, Sequence[Record]] = {
        _LEVELS: coded,
        _NUMBER: numbers,
        _GRAPH: graphs,
        _ACTIVATION: activations,
    }
    return Contents(tuple(found.get(kind, plain)[i] for kind, i in order), metadata)


def _read_stream(heads: Sequence[_Head], stream: Decoder) -> list[Record]:
    """The records whose numbers are in the stream."""
    found: list[Record] = []
    for head in heads:
        if isinstance(head, _LevelsHeader):
            found.append(_read_levels(head, stream))
        elif isinstance(head, _ScalesHeader):
            found.append(_read_scales(head, stream))
        else:
            found.append(_read_norm(head, _dead_before(found, len(found), head.channels), stream))
    return found


def _read_raw(header: Reader, name: str, kind: str, shape: tuple[int, ...]) -> RawTensor | NormTensor:
    dtype = np.dtype(kind.removeprefix(f"{_NORM} ")).newbyteorder("<")
    count = math.prod(shape)
    if not count and _weights(shape) > 1 << 31:
        raise FormatError(f"`{name}`: shape {shape} is beyond all measure")

    def take() -> NDArray[Any]:
        data = header.take(count * dtype.itemsize, f"`{name}`")
        if dtype == np.bool_ and max(data, default=0) > 1:
            raise FormatError(f"`{name}`: a truth value of {max(data)}")
        raw = np.frombuffer(data, dtype)
        return raw.astype(dtype.newbyteorder("=")).reshape(shape)

    return NormTensor(name, take(), take()) if kind.startswith(_NORM) else RawTensor(name, take())


def size_bits(tensor: LevelTensor) -> float:
    """Bits of the stream that a tensor of levels takes, side information included, from the coder's tables."""
    model = tensor.model
    if not model.top:
        return 0.0
    bits = mask_bits(model.alive_rows) + mask_bits(model.alive_columns)
    for values in (model.rows, model.columns, model.taps, model.decays, tensor.exponents):
        if values is not None:
            bits += integers_bits(values, *_range_of(values))
    return bits + levels_bits(tensor.levels, model)


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` all or nothing: through a temporary file beside it. Raises `OutputError`."""
    target = Path(path)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        with temporary.open("xb") as file:  # unlike `tempfile`, with the permissions that the user gives to new files
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(
            f"`{target}`: cannot be written, {error.strerror or error}\nhint: choose another place or free some space"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file. Raises `FormatError` naming the path if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FormatError(f"`{path}`: cannot be read, {error.strerror or error}") from None
