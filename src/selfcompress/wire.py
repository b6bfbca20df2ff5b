"""The small parts that the header of a `.scn` file is made of: LEB128 integers, text, names, sizes; see
`docs/format.md`, 1 and 2.

`Writer` and `Reader` are inverse, call by call. The reader distrusts what it reads: whatever is wrong ends in a
`FormatError` that says `what` was to be read.
"""

from .errors import FormatError

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

    def name(self, name: bytes, previous: bytes) -> None:
        """A name in UTF-8, by what it shares with the name before it."""
        shared = 0
        while shared < min(len(name), len(previous)) and name[shared] == previous[shared]:
            shared += 1
        while shared < len(name) and _WORD <= name[shared] < _LEAD:  # no character is torn apart
            shared -= 1
        rest = _shortened(name[shared:])
        self.uint(shared)
        self.uint(len(rest))
        self.data += rest

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

    def name(self, previous: bytes, limit: int) -> bytes:
        """A name after the name before it, of at most `limit` bytes."""
        shared = self.uint("name", len(previous))
        whole = previous[:shared] + _lengthened(self.take(self.uint("name", limit), "name"))
        if len(whole) > limit:
            raise FormatError(f"name: expected at most {limit} bytes, found {len(whole)}")
        try:
            previous[:shared].decode()
            whole.decode()
        except UnicodeDecodeError:
            raise FormatError(f"name: expected UTF-8 text, found {whole[:16]!r}") from None
        return whole

    def shape(self, axes: int, what: str) -> tuple[int, ...]:
        """As many sizes, each at most 2^31."""
        return tuple(self.uint(what, 1 << 31) for _ in range(axes))


def _shortened(text: bytes) -> bytes:
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
    """Undo `_shortened`."""
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
