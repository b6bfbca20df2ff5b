"""The small parts that the header of a `.scn` file is made of: LEB128 integers, text, sizes; see `docs/format.md`, 1.

`Writer` and `Reader` are inverse, call by call. The reader distrusts what it reads: whatever is wrong ends in a
`FormatError` that says `what` was to be read.
"""

from .errors import FormatError


class Writer:
    """Bytes of the header."""

    def __init__(self) -> None:
        self.data = bytearray()

    def uint(self, value: int) -> None:
        """A whole number >= 0."""
        assert value >= 0
        while value > 127:
            self.data.append(value & 127 | 128)
            value >>= 7
        self.data.append(value)

    def sint(self, value: int) -> None:
        """A whole number of either sign."""
        self.uint(2 * value if value >= 0 else -2 * value - 1)

    def text(self, value: str) -> None:
        """Text, its length first."""
        raw = value.encode()
        self.uint(len(raw))
        self.data += raw

    def shape(self, shape: tuple[int, ...]) -> None:
        """The sizes of a shape, without their number."""
        for size in shape:
            self.uint(size)


class Reader:
    """Bytes of the header, read without trust."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        if count > len(self.data) - self.at:
            raise FormatError(f"{what}: {count} bytes expected, {len(self.data) - self.at} left")
        self.at += count
        return self.data[self.at - count : self.at]

    def uint(self, what: str, limit: int = 1 << 40) -> int:
        """A whole number of 0 … limit."""
        value = shift = 0
        while True:
            byte = self.take(1, what)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128 or shift > 42:
                break
        if value > limit:
            raise FormatError(f"{what}: expected at most {limit}, found {value}")
        return value

    def sint(self, what: str, limit: int = 1 << 40) -> int:
        """A whole number of -limit … limit."""
        value = self.uint(what, 2 * limit)
        return value // 2 if value % 2 == 0 else -(value + 1) // 2

    def text(self, what: str) -> str:
        """Text, its length first."""
        raw = self.take(self.uint(what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise FormatError(f"{what}: expected UTF-8 text, found {raw[:16]!r}") from None

    def shape(self, axes: int, what: str) -> tuple[int, ...]:
        """As many sizes, each at most 2^31."""
        return tuple(self.uint(what, 1 << 31) for _ in range(axes))
