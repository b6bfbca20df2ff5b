"""The header of a `.scn` file in its stream: bytes that are likely where they stand take less than eight bits.

Headers are short and say the same again and again: axes, resolutions, flags, sizes of one layer that are those of the
next. Each byte is a symbol of a table that is made from how often each value was there before, in the same field (and a
little, in any), and from how likely values are before anything is known: small ones. See `docs/format.md`, 4.8.
"""

import math

import numpy as np

from .coder import TOTAL, TOTAL_BITS, Decoder, Encoder, Ints
from .errors import FormatError
from .wire import Field, Reader, Writer

_FIRST = np.repeat(np.array([16, 8, 4, 2, 1], np.int64), [8, 8, 16, 112, 112])
"""Weight of each byte before anything is known."""
_IN_FIELD, _ANYWHERE = 256, 8
"""Weight of each time that it was there."""


class ByteModel:
    """What to expect of the next byte, from all before it."""

    def __init__(self) -> None:
        self._anywhere = _FIRST.copy()
        self._in_field = np.zeros((len(Field), 256), np.int64)

    def table(self, field: int) -> Ints:
        """Frequencies of the 256 bytes out of 2^24."""
        weights = self._anywhere + self._in_field[field]
        table = 1 + weights * (TOTAL - 256) // int(weights.sum())
        table[int(table.argmax())] += TOTAL - int(table.sum())
        return np.asarray(table, np.int64)

    def count(self, field: int, byte: int) -> None:
        """Note that this byte was there."""
        self._anywhere[byte] += _ANYWHERE
        self._in_field[field, byte] += _IN_FIELD


def write_header(header: Writer, stream: Encoder) -> None:
    """Write all bytes of a header as symbols of the stream."""
    model = ByteModel()
    for field, byte in zip(header.fields, header.data, strict=True):
        stream.symbol(byte, model.table(field))
        model.count(field, byte)


class HeaderReader(Reader):
    """A header that `write_header` wrote, byte by byte as it is asked for."""

    def __init__(self, stream: Decoder, size: int) -> None:
        """`size`: bytes that there are."""
        super().__init__(b"")
        self._stream, self._size, self._bits, self._model = stream, size, 0.0, ByteModel()

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self._size

    @property
    def bits(self) -> float:
        """What has been read so far takes in the stream."""
        return self._bits

    def take(self, count: int, what: str, field: Field = Field.GRAPH) -> bytes:
        """The next bytes."""
        if count > self._size - self.at:
            raise FormatError(f"{what}: {count} bytes expected, {self._size - self.at} left")
        found = bytearray()
        for _ in range(count):
            table = self._model.table(field)
            byte = self._stream.symbol(table)
            self._model.count(field, byte)
            self._bits += TOTAL_BITS - math.log2(int(table[byte]))
            found.append(byte)
        self.at += count
        return bytes(found)
