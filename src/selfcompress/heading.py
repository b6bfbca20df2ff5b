"""The header of a `.scn` file in its stream: bytes that are likely where they stand take less than eight bits.

Headers are short and say the same again and again: axes, resolutions, flags, sizes of one layer that are those of the
next; graphs do, too. Each byte is a symbol of a table that is made from what was there before in the same field, in all
and after the same one, two and three bytes of it, and from how likely values are before anything is known. So that the
first bytes are cheap, too, the model has seen a *primer* before them: for each field a few bytes that are usual there.
See `docs/format.md`, 4.8.

Version 2 has no primer and looks at no byte before.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import Protocol

import numpy as np

from .coder import TOTAL, TOTAL_BITS, Decoder, Encoder, Ints
from .errors import FormatError
from .wire import Field, Reader, Writer, shortened

_FIRST = np.repeat(np.array([16, 8, 4, 2, 1], np.int64), [8, 8, 16, 112, 112])
"""Weight of each byte before anything is known."""
_IN_FIELD_2, _ANYWHERE_2 = 256, 8
"""Version 2: weight of each time that it was there, in this field and in any."""
_IN_PRIMER, _IN_HEADER = (64, 256, 512, 1024), (64, 512, 2048, 8192)
"""Weight of each time that it was there in this field: at all, and after the same one, two, three bytes of it."""
_MASKS = (0xFF, 0xFFFF, 0xFFFFFF)
"""The last one, two, three bytes of a field's last three."""

_NAMES = (
    b"conv1.weight", b"bias", b"2.weight", b"bias", b"norm1", b"layer1.0.conv2.weight", b"bn2", b"fc.weight", b"bias",
    b"0.weight", b".3.", b"layers.1.attn.q_proj.weight", b"bias", b"head.weight", b"blocks.0.norm2",
)  # fmt: skip
_LABELS = b"digits mnist fashion-mnist cifar10 imagefolder text lenet-300-100 lenet5 conv5 resnet9 resnet20 vgg16 gpt"
PRIMER: Mapping[Field, bytes] = {
    Field.TEXT_LENGTH: bytes([18, 12]),
    Field.TEXT: _LABELS,
    Field.RECORDS: bytes([6, 8, 12, 17]),
    Field.SHARED: bytes([0, 4, 6, 5, 12, 7, 9, 2, 11, 16, 18, 0, 5, 7]),
    Field.NAME_LENGTH: bytes([1, 1, 1, 3, 4, 3, 4, 5, 2, 6, 8, 10, 12]),
    Field.NAME: b"".join(map(shortened, _NAMES)),
    Field.KIND: bytes([0, 0, 0, 15, 0, 0, 15, 0, 0, 16, 1]),
    Field.FLAGS: bytes([64, 2, 130, 2, 64, 0, 152, 2, 66, 2, 128, 2, 136, 2]),
    Field.AXES: bytes([4, 1, 4, 1, 2, 1, 2]),
    Field.SIZE: bytes([
        16, 3, 3, 3, 16, 32, 16, 3, 3, 32, 64, 32, 3, 3, 64, 128, 1, 64, 3, 3, 128, 1, 128, 1, 128, 1, 128, 4, 10, 128,
        1, 10, 244, 3, 128, 2,
    ]),
    Field.SIZE_NOW: bytes([10, 3, 3, 3, 20, 12, 3, 3, 30, 20, 3, 3, 40, 10]),
    Field.TOP: bytes([1, 2, 4, 3, 0, 1, 6, 0, 8, 10, 15]),
    Field.OFFSET: bytes([72, 66, 80, 88, 96, 140, 1, 84, 76, 144, 1, 70]),
    Field.DECAY: bytes([32, 0, 32, 8, 5, 32, 0]),
    Field.RESOLUTION: bytes([4, 4, 4]),
    Field.PITCH: bytes([3, 3, 5]),
    Field.CONTEXT: bytes([1, 0, 2, 2, 6, 0, 1, 4, 3, 8, 0, 3, 0, 4, 10]),
    Field.LOWEST: bytes([3, 21, 5, 1, 37, 7, 11, 3, 9, 29, 0, 13, 17, 33]),
    Field.SPAN: bytes([3, 4, 2, 5, 8, 0, 6, 3, 7, 12, 10, 0, 4]),
    Field.SIGNS: bytes([0, 0, 1]),
    Field.STEP: bytes([11, 11, 13]),
    Field.NORM_LOWEST: bytes([12, 91, 129, 1, 47, 171, 2]),
}  # fmt: skip
"""What is usual in each field, in an order that is usual there; nothing in the others. Never changed."""


class ByteModel(Protocol):
    """What to expect of the next byte, from all before it."""

    def table(self, field: int) -> Ints:
        """Frequencies of the 256 bytes out of 2^24."""

    def count(self, field: int, byte: int) -> None:
        """Note that this byte was there."""


class _Seen:
    """What was seen of each field, by weight: its bytes, and those after the same one, two and three."""

    def __init__(self, weights: tuple[int, ...]) -> None:
        self._weights = weights
        self._in_field = np.zeros((len(Field), 256), np.int64)
        self._after: tuple[dict[int, dict[int, int]], ...] = ({}, {}, {})
        """For one, two, three bytes: field and these bytes -> the weight of each byte that came after them."""
        self.last = [0] * len(Field)
        """The last three bytes of each field, the newest lowest."""

    def see(self, field: int, byte: int) -> None:
        """Note the next byte of a field."""
        self._in_field[field, byte] += self._weights[0]
        for after, mask, weight in zip(self._after, _MASKS, self._weights[1:], strict=True):
            followers = after.setdefault(field << 24 | self.last[field] & mask, {})
            followers[byte] = followers.get(byte, 0) + weight
        self.last[field] = (self.last[field] << 8 | byte) & 0xFFFFFF

    def add_to(self, weights: Ints, field: int, last: int) -> None:
        """Add, in place, the weight of each byte after these three."""
        weights += self._in_field[field]
        for after, mask in zip(self._after, _MASKS, strict=True):
            for byte, weight in after.get(field << 24 | last & mask, {}).items():
                weights[byte] += weight


@cache
def _primer() -> _Seen:
    seen = _Seen(_IN_PRIMER)
    for field, usual in PRIMER.items():
        for byte in usual:
            seen.see(field, byte)
    return seen


class _PrimedModel:
    """That of version 3."""

    def __init__(self) -> None:
        self._seen = _Seen(_IN_HEADER)

    def table(self, field: int) -> Ints:
        """See `ByteModel`."""
        weights, last = _FIRST.copy(), self._seen.last[field]
        for seen in (_primer(), self._seen):
            seen.add_to(weights, field, last)
        return _table(weights)

    def count(self, field: int, byte: int) -> None:
        """See `ByteModel`."""
        self._seen.see(field, byte)


class _FieldModel:
    """That of version 2."""

    def __init__(self) -> None:
        self._anywhere = _FIRST.copy()
        self._in_field = np.zeros((len(Field), 256), np.int64)

    def table(self, field: int) -> Ints:
        """See `ByteModel`."""
        return _table(self._anywhere + self._in_field[field])

    def count(self, field: int, byte: int) -> None:
        """See `ByteModel`."""
        self._anywhere[byte] += _ANYWHERE_2
        self._in_field[field, byte] += _IN_FIELD_2


def _table(weights: Ints) -> Ints:
    table = 1 + weights * (TOTAL - 256) // int(weights.sum())
    table[int(table.argmax())] += TOTAL - int(table.sum())
    return np.asarray(table, np.int64)


def _model(version: int) -> ByteModel:
    return _FieldModel() if version == 2 else _PrimedModel()


def write_header(header: Writer, stream: Encoder, version: int) -> None:
    """Write all bytes of a header as symbols of the stream, as a version of the format has them: 2 or 3."""
    model = _model(version)
    for field, byte in zip(header.fields, header.data, strict=True):
        stream.symbol(byte, model.table(field))
        model.count(field, byte)


class HeaderReader(Reader):
    """A header that `write_header` wrote, byte by byte as it is asked for."""

    def __init__(self, stream: Decoder, most: int, version: int) -> None:
        """`most`: bytes that there may be."""
        super().__init__(b"")
        self._stream, self._most, self._bits, self._model = stream, most, 0.0, _model(version)

    @property
    def size(self) -> int:
        """How many bytes there are at most."""
        return self._most

    @property
    def bits(self) -> float:
        """What has been read so far takes in the stream."""
        return self._bits

    def take(self, count: int, what: str, field: Field = Field.GRAPH) -> bytes:
        """The next bytes."""
        if count > self._most - self.at:
            raise FormatError(f"{what}: {count} bytes expected, {self._most - self.at} left")
        found = bytearray()
        for _ in range(count):
            table = self._model.table(field)
            byte = self._stream.symbol(table)
            self._model.count(field, byte)
            self._bits += TOTAL_BITS - math.log2(int(table[byte]))
            found.append(byte)
        self.at += count
        return bytes(found)
