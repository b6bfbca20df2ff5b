"""The small parts that the header of a `.scn` file is made of: LEB128 integers, text, names, sizes; see
`docs/format.md`, 1 and 2.

`Writer` and `Reader` are inverse, call by call. The reader distrusts what it reads: whatever is wrong ends in a
`FormatError` that says `what` was to be read. Each byte belongs to a field, by which `heading.py` tells what to expect.
"""

from enum import IntEnum

from .errors import FormatError


class Field(IntEnum):
    """What a byte of the header is part of."""

    GRAPH = 0
    TEXT_LENGTH = 1
    TEXT = 2
    RECORDS = 3
    SHARED = 4
    NAME_LENGTH = 5
    NAME = 6
    KIND = 7
    FLAGS = 8
    AXES = 9
    SIZE = 10
    SIZE_NOW = 11
    GROUPS = 12
    TOP = 13
    OFFSET = 14
    DECAY = 15
    RESOLUTION = 16
    PITCH = 17
    CONTEXT = 18
    LOWEST = 19
    SPAN = 20
    SIGNS = 21
    STEP = 22
    NORM_LOWEST = 23
    NORM_SPAN = 24
    NUMBER = 25
    ROUNDING = 26


NAME_WORDS = (
    b"weight", b"bias", b"conv", b"norm", b"fc", b"linear", b"bn", b"ln_", b"layer", b"layers.", b"block", b"blocks.",
    b"stages.", b"features.", b"stem", b"downsample", b"shortcut", b"attn", b"attention", b"self_attn", b"mlp",
    b"proj", b"qkv", b"query", b"key", b"value", b"q_proj", b"k_proj", b"v_proj", b"out_proj", b"o_proj", b"in_proj",
    b"up_proj", b"down_proj", b"gate", b"embed", b"embedding", b"pos_embed", b"position", b"token", b"cls_token",
    b"head", b"lm_head", b"classifier", b"dense", b"output", b"out", b"intermediate", b"encoder", b"decoder",
    b"transformer", b"model.", b"running_mean", b"running_var", b"num_batches_tracked", b"num_heads", b"depthwise",
    b"pointwise", b"se.", b"reduce", b"expand", b"scale", b".0.", b".1.",
)  # fmt: skip
"""Words that stand in names as one byte, 128 + their number, which begins no character of UTF-8. Never changed."""
_LONGEST_FIRST = sorted(range(len(NAME_WORDS)), key=lambda number: -len(NAME_WORDS[number]))
_WORD = 0x80
_LEAD = 0xC0
"""Bytes from here on begin a character of several bytes; those from `_WORD` on continue one, or are a word."""


class Writer:
    """Bytes of the header."""

    def __init__(self) -> None:
        self.data, self.fields = bytearray(), bytearray()

    def put(self, data: bytes, field: Field = Field.GRAPH) -> None:
        """Bytes as they are."""
        self.data += data
        self.fields += bytes([field]) * len(data)

    def uint(self, value: int, field: Field = Field.GRAPH) -> None:
        """A whole number >= 0."""
        assert value >= 0
        while value > 127:
            self.put(bytes([value & 127 | 128]), field)
            value >>= 7
        self.put(bytes([value]), field)

    def sint(self, value: int, field: Field) -> None:
        """A whole number of either sign."""
        self.uint(2 * value if value >= 0 else -2 * value - 1, field)

    def text(self, value: str) -> None:
        """Text, its length first."""
        raw = value.encode()
        self.uint(len(raw), Field.TEXT_LENGTH)
        self.put(raw, Field.TEXT)

    def name(self, name: bytes, previous: bytes) -> None:
        """A name in UTF-8, by what it shares with the name before it."""
        shared = 0
        while shared < min(len(name), len(previous)) and name[shared] == previous[shared]:
            shared += 1
        while shared < len(name) and _WORD <= name[shared] < _LEAD:  # no character is torn apart
            shared -= 1
        rest = shortened(name[shared:])
        self.uint(shared, Field.SHARED)
        self.uint(len(rest), Field.NAME_LENGTH)
        self.put(rest, Field.NAME)

    def shape(self, shape: tuple[int, ...], field: Field = Field.SIZE) -> None:
        """The sizes of a shape, without their number."""
        for size in shape:
            self.uint(size, field)


class Reader:
    """Bytes of the header, read without trust."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    @property
    def size(self) -> int:
        """How many bytes there are at most."""
        return len(self.data)

    @property
    def bits(self) -> float:
        """What has been read so far takes in the file."""
        return 8.0 * self.at

    def take(self, count: int, what: str, field: Field = Field.GRAPH) -> bytes:
        """The next bytes."""
        if count > len(self.data) - self.at:
            raise FormatError(f"{what}: {count} bytes expected, {len(self.data) - self.at} left")
        self.at += count
        return self.data[self.at - count : self.at]

    def uint(self, what: str, limit: int = 1 << 40, field: Field = Field.GRAPH) -> int:
        """A whole number of 0 … limit."""
        value = shift = 0
        while True:
            byte = self.take(1, what, field)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128 or shift > 42:
                break
        if value > limit:
            raise FormatError(f"{what}: expected at most {limit}, found {value}")
        return value

    def sint(self, what: str, limit: int, field: Field) -> int:
        """A whole number of -limit … limit."""
        value = self.uint(what, 2 * limit, field)
        return value // 2 if value % 2 == 0 else -(value + 1) // 2

    def text(self, what: str) -> str:
        """Text, its length first."""
        raw = self.take(self.uint(what, field=Field.TEXT_LENGTH), what, Field.TEXT)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise FormatError(f"{what}: expected UTF-8 text, found {raw[:16]!r}") from None

    def name(self, previous: bytes, limit: int) -> bytes:
        """A name after the name before it, of at most `limit` bytes."""
        shared = self.uint("name", len(previous), Field.SHARED)
        length = self.uint("name", limit, Field.NAME_LENGTH)
        whole = previous[:shared] + _lengthened(self.take(length, "name", Field.NAME))
        if len(whole) > limit:
            raise FormatError(f"name: expected at most {limit} bytes, found {len(whole)}")
        try:
            previous[:shared].decode()
            whole.decode()
        except UnicodeDecodeError:
            raise FormatError(f"name: expected UTF-8 text, found {whole[:16]!r}") from None
        return whole

    def shape(self, axes: int, what: str, field: Field = Field.SIZE) -> tuple[int, ...]:
        """As many sizes, each at most 2^31."""
        return tuple(self.uint(what, 1 << 31, field) for _ in range(axes))


def shortened(text: bytes) -> bytes:
    """Text with bytes for the words in it: from left to right, the longest that fits."""
    result, at = bytearray(), 0
    while at < len(text):
        number = next((n for n in _LONGEST_FIRST if text.startswith(NAME_WORDS[n], at)), None)
        if number is None:
            result.append(text[at])
            at += 1
        else:
            result.append(_WORD + number)
            at += len(NAME_WORDS[number])
    return bytes(result)


def _lengthened(data: bytes) -> bytes:
    """Undo `shortened`."""
    result, at = bytearray(), 0
    while at < len(data):
        byte = data[at]
        if _WORD <= byte < _LEAD:
            if byte - _WORD >= len(NAME_WORDS):
                raise FormatError(f"name: expected the number of a word, found {byte - _WORD}")
            result += NAME_WORDS[byte - _WORD]
            at += 1
        else:  # a character: its first byte says how many there are
            size = 1 if byte < _LEAD else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            result += data[at : at + size]
            at += size
    return bytes(result)
