"""Files that no reader may trust, put together byte by byte after `docs/format.md`, and what is to be said about each.

Run as a program it writes them anew into this folder. All but the foreign ones carry a correct checksum.
"""

import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

FOLDER = Path(__file__).parent
STREAM = bytes.fromhex("320bb856")


def uint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def sint(value: int) -> bytes:
    return uint(2 * value if value >= 0 else -2 * value - 1)


def uints(*values: int) -> bytes:
    return b"".join(uint(v) for v in values)


def signed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def name(text: str | bytes, shared: int = 0) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return uints(shared, len(raw)) + raw


def file(*records: bytes, count: int | None = None, raw: bytes = b"", stream: bytes = b"", head: bytes = b"") -> bytes:
    number = len(records) if count is None else count
    return signed(b"SCN\x01" + (head or uint(0)) + uint(number) + b"".join(records) + raw + stream)


def coded(header: int, raw: int, rest: bytes) -> bytes:
    """A file of version 2: bytes that the header is said to have, bytes of raw numbers, and what follows."""
    return signed(b"SCN\x02" + uints(header, raw) + rest)


def primed(raw: int, rest: bytes) -> bytes:
    """A file of version 3: bytes of raw numbers, and what follows."""
    return signed(b"SCN\x03" + uints(raw) + rest)


def _tiny() -> tuple[int, int, bytes]:
    """Of the smallest golden file: bytes of its header and of its raw numbers, and all that follows."""
    data = bytes.fromhex((FOLDER.parent / "golden" / "tiny-2.hex").read_text())
    return data[4], data[5], data[6:-4]


TINY = _tiny()


def _tiny_primed() -> tuple[int, bytes]:
    """The same of version 3, which does not say how long its header is."""
    data = bytes.fromhex((FOLDER.parent / "golden" / "tiny-3.hex").read_text())
    return data[4], data[5:-4]


PRIMED = _tiny_primed()


def levels(
    *,
    flags: int = 64,
    axes: int | None = None,
    original: tuple[int, ...] = (3, 4),
    shape: tuple[int, ...] | None = None,
    groups: int | None = None,
    top: int = 3,
    offset: int = 42,
    decay: int = 6,
    resolution: int = 4,
    context: tuple[int, ...] = (),
    ranges: tuple[tuple[int, int], ...] = ((-9, 1),),
    called: str = "w",
) -> bytes:
    body = name(called) + uint(0) + uints(flags, len(original) if axes is None else axes, *original)
    body += uints(*(shape or ())) + (uint(groups) if groups is not None else b"") + uint(top)
    if top:
        body += sint(offset) + uints(decay, resolution)
        body += (
            uints(*context[:1])
            + b"".join(sint(v) for v in context[1:])
            + b"".join(sint(a) + uint(b) for a, b in ranges)
        )
    return body


def plain(kind: int, *shape: int, called: str | bytes = "x", shared: int = 0) -> bytes:
    return name(called, shared) + uints(kind, len(shape), *shape)


def activation(code: int, exponent: int = 0, *, called: str = "x..in") -> bytes:
    return name(called) + uints(14, code) + sint(exponent)


def graph(
    body: bytes,
    *,
    size: int | None = None,
    stored: bytes | None = None,
    called: str = ".",
) -> bytes:
    """A record of a graph: `size` is what it says, `stored` the bytes that are there for `body`."""
    kept = body if stored is None else stored
    return name(called) + uints(13, len(body) if size is None else size, len(kept)) + kept


def deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(body) + packer.flush()


# inputs, nodes, output: one input of float32 (2, 4) with a free batch; values are uint(8 · payload + tag)
INPUT = uints(1, 1, 2, 5, 8)
OUTPUT = uints(0)
BOMB = bytes(1 << 16)


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("net/data.pkl"), b"x")
    return buffer.getvalue()


FILES: dict[str, tuple[bytes, str]] = {
    # foreign
    "empty": (b"", r"expected a selfcompress file, which starts with b'SCN', found b''"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(20), r"which starts with b'SCN', found b'\\x89PN'"),
    "zip": (_zip(), r"found b'PK\\x03'"),
    "pickle": (pickle.dumps({"weight": [1.0]}, protocol=2), r"found b'\\x80\\x02}'"),
    "magic-only": (b"SCN", r"expected at least 10 bytes, found 3: the file is truncated"),
    "version-0": (signed(b"SCN\x00" + bytes(8)), r"format version 0, this reader knows 1 to 3\nhint: upgrade"),
    "version-255": (signed(b"SCN\xff" + bytes(8)), r"format version 255, this reader knows 1 to 3\nhint: upgrade"),
    "wrong-checksum": (file()[:-1] + b"\x00", r"the checksum does not match: the file is truncated or altered"),
    # head, in the stream
    "coded-header-beyond-measure": (coded(2**19, 0, bytes(8)), r"header: expected at most \d+, found 524288"),
    "coded-header-without-its-raw-numbers": (coded(4, 52, bytes(50)), r"raw numbers: 52 bytes expected, 50 left"),
    "coded-header-without-a-stream": (coded(4, 0, b""), r"entropy-coded part: .*missing"),
    "coded-header-of-zeros": (
        coded(4000, 0, bytes(300)),
        r"header: 4000 bytes expected, found 2",
    ),
    "coded-header-ends-early": (coded(TINY[0] - 1, TINY[1], TINY[2]), r"`fc.bias` shape: 1 bytes expected, 0 left"),
    "coded-header-goes-on": (
        coded(TINY[0] + 1, TINY[1], TINY[2]),
        r"header: 29 bytes expected, found 28",
    ),
    "coded-header-with-raw-numbers-left": (
        coded(TINY[0], TINY[1] + 4, bytes(4) + TINY[2]),
        r"raw numbers: 10 bytes expected, found 6",
    ),
    "primed-header-without-a-stream": (primed(1, bytes(1)), r"entropy-coded part: .*missing"),
    "primed-header-without-its-raw-numbers": (primed(52, bytes(50)), r"raw numbers: 52 bytes expected, 50 left"),
    "primed-header-with-too-few-raw-numbers": (
        primed(PRIMED[0] - 2, PRIMED[1][2:]),
        r"`fc.bias`: 6 bytes expected, 4 left",
    ),
    "primed-header-with-raw-numbers-left": (
        primed(PRIMED[0] + 4, bytes(4) + PRIMED[1]),
        r"raw numbers: 10 bytes expected, found 6",
    ),
    "primed-header-without-its-levels": (
        primed(PRIMED[0], PRIMED[1][:-4]),
        r"entropy-coded part: its length is not that of its contents",
    ),
    "primed-header-with-words-left": (
        primed(PRIMED[0], PRIMED[1] + bytes(8)),
        r"entropy-coded part: its length is not that of its contents",
    ),
    # head
    "metadata-beyond-the-end": (file(head=uint(2**39)), r"metadata: 549755813888 bytes expected, 1 left"),
    "metadata-not-utf8": (file(head=b"\x02\xff\xfe"), r"metadata: expected UTF-8 text, found b'\\xff\\xfe'"),
    "endless-integer": (file(head=b"\xff" * 12), r"metadata: expected at most \d+, found \d+"),
    "no-record-count": (signed(b"SCN\x01\x05hello"), r"number of records: 1 bytes expected, 0 left"),
    "a-trillion-records": (file(count=2**40), r"number of records: expected at most \d+, found 1099511627776"),
    "one-record-too-many": (file(levels(top=0), count=2), r"name: 1 bytes expected, 0 left"),
    # names
    "name-shares-more-than-there-is": (file(plain(3, 0, shared=1)), r"name: expected at most 0, found 1"),
    "name-beyond-the-end": (file(uints(0, 900)), r"name: 900 bytes expected, 0 left"),
    "name-too-long": (file(plain(3, 0, called="n" * 1025)), r"name: expected at most 1024, found 1025"),
    "name-grows-too-long": (
        file(plain(3, 0, called="n" * 1000), plain(3, 0, called="n" * 100, shared=1000)),
        r"name: expected at most 1024 bytes, found 1100",
    ),
    "name-of-words-too-long": (
        file(plain(3, 0, called=b"\x80" * 1024)),
        r"name: expected at most 1024 bytes, found 6144",
    ),
    "name-shares-half-a-character": (
        file(plain(3, 0, called="ü"), plain(3, 0, called="", shared=1)),
        r"name: expected UTF-8 text, found b'\\xc3'",
    ),
    "name-ends-in-a-character": (file(plain(3, 0, called=b"\xe2\x80")), r"expected UTF-8 text, found b'\\xe2\\x80'"),
    "name-not-utf8": (file(plain(3, 0, called=b"\xc3")), r"name: expected UTF-8 text, found b'\\xc3'"),
    "name-twice": (file(plain(3, 0), plain(3, 0, called="", shared=1)), r"`x` occurs twice"),
    # raw numbers
    "unknown-kind": (file(plain(17, 0)), r"`x` kind: expected at most 16, found 17"),
    "activation-without-levels": (file(activation(0)), r"`x..in`: expected a largest level of 1 … 255, found 0"),
    "activation-beyond-8-bits": (file(activation(512)), r"`x..in` largest level: expected at most 511, found 512"),
    "activation-with-a-sign-beyond-8-bits": (
        file(activation(2 * 128 + 1)),
        r"`x..in`: expected a largest level of 1 … 127, found 128",
    ),
    "activation-exponent-1601": (file(activation(9, 1601)), r"`x..in` exponent: expected at most 3200, found 3202"),
    "activation-of-no-side": (file(activation(9, called="x.in")), r"`x.in`: expected the name .* to end in `..in`"),
    "too-many-axes": (file(plain(3, *[1] * 9), raw=b"\0\0"), r"`x` axes: expected at most 8, found 9"),
    "raw-size-beyond-measure": (file(plain(3, 2**31 + 1)), r"`x` shape: expected at most 2147483648"),
    "raw-of-an-exabyte": (file(plain(6, 2**20, 2**20, 2**20)), r"`x`: 9223372036854775808 bytes expected, 0 left"),
    "raw-empty-but-huge": (file(plain(3, 0, *[2**31] * 7)), r"`x`: shape \(0, 2147483648, .* is beyond all measure"),
    "raw-missing": (file(plain(4, 2), raw=bytes(4)), r"`x`: 8 bytes expected, 4 left"),
    "norm-half-there": (file(name("n") + uints(1, 4), raw=bytes(8)), r"`n`: 8 bytes expected, 0 left"),
    "norm-of-a-gigabyte": (file(name("n") + uints(2, 2**30)), r"`n`: 4294967296 bytes expected, 0 left"),
    "norm-in-steps-without-end": (
        file(name("n") + uints(15, 2**30, 0, 0, 0, 0, 0, 0)),
        r"`n`: shape \(2, 1073741824\) has more weights than a file of \d+ bytes may hold",
    ),
    "norm-of-unknown-signs": (file(name("n") + uints(15, 4, 6)), r"`n` signs: expected at most 5, found 6"),
    "norm-step-101": (file(name("n") + uints(15, 4, 0, 202)), r"`n` step: expected at most 200, found 202"),
    "norm-exponents-beyond-measure": (
        file(name("n") + uints(15, 4, 0, 0, 6400, 1)),
        r"`n`: a range within -3200 … 3200 expected, found 3200 … 3201",
    ),
    "norm-shifts-beyond-measure": (
        file(name("n") + uints(15, 4, 3, 0, 65537, 0)),
        r"`n`: a range within -32768 … 32768 expected, found -32769 … -32769",
    ),
    "scales-without-end": (
        file(name("s") + uints(16, 1, 2**31, 0, 0, 0)),
        r"`s`: shape \(2147483648,\) has more weights than a file of \d+ bytes may hold",
    ),
    "scales-of-no-size": (file(name("s") + uints(16, 2, 0, 2**31)), r"`s`: shape \(0, 2147483648\) has more weights"),
    "scales-too-many-axes": (file(name("s") + uints(16, 9, *[1] * 9)), r"`s` axes: expected at most 8, found 9"),
    "scales-of-unknown-signs": (file(name("s") + uints(16, 1, 4, 6)), r"`s` signs: expected at most 5, found 6"),
    "scales-beyond-measure": (
        file(name("s") + uints(16, 1, 4, 0, 6401, 1)),
        r"`s`: a range within -3200 … 3200 expected, found -3201 … -3200",
    ),
    "scales-without-a-stream": (
        file(name("s") + uints(16, 1, 4, 0, 0, 9)),
        r"entropy-coded part: .*missing",
    ),
    "norm-without-a-stream": (
        file(name("n") + uints(15, 4, 0, 0, 0, 9, 0, 0)),
        r"entropy-coded part: .*missing",
    ),
    "truth-value-2": (file(plain(11, 2), raw=b"\x01\x02"), r"`x`: a truth value of 2"),
    # levels: header
    "unknown-flags": (file(levels(flags=384)), r"`w` flags: expected at most 383, found 384"),
    "pitch-1": (file(levels(flags=256, context=(1, 0, 0, 0, 0, 0))), r"`w`: a pitch of 1, expected 2 or more"),
    "pitch-without-end": (
        file(levels(flags=256, context=(2**20 + 1, *[0] * 5))),
        r"`w` pitch: expected at most 1048576",
    ),
    "context-65": (
        file(levels(flags=256, context=(2, 0, 65, 0, 0, 0))),
        r"`w` context: expected at most 128, found 130",
    ),
    "tilt-29": (file(levels(flags=256, context=(2, 0, 0, 0, 0, 29))), r"`w` tilt: expected at most 56, found 58"),
    "context-half-there": (
        signed(file(levels(flags=256, context=(2, 0), ranges=()))[:-4]),
        r"`w` context: 1 bytes expected, 0 left",
    ),
    "levels-too-many-axes": (file(levels(axes=9)), r"`w` axes: expected at most 8, found 9"),
    "levels-without-their-axis": (file(levels(original=())), r"`w`: channel axis 0 of a tensor with 0 axes"),
    "levels-without-axis-1": (file(levels(flags=128, original=(3,))), r"`w`: channel axis 1 of a tensor with 1 axes"),
    "grown": (file(levels(flags=66, shape=(3, 5))), r"`w`: shape \(3, 5\) is larger than the original \(3, 4\)"),
    "groups-0": (file(levels(flags=68, groups=0)), r"`w`: 0 groups do not fit shape \(3, 4\)"),
    "groups-that-do-not-divide": (file(levels(flags=133, groups=2)), r"`w`: 2 groups do not fit shape \(3, 4\)"),
    "groups-without-end": (
        file(levels(flags=133, original=(0, 4), groups=2**30)),
        r"`w`: 1073741824 groups do not fit",
    ),
    "transposed-without-axis-1": (file(levels(flags=65)), r"`w`: 1 groups do not fit shape \(3, 4\), channel axis 0"),
    "weights-without-end": (
        file(levels(original=(2**31, 2**31))),
        r"`w`: shape \(2147483648, 2147483648\) has more weights than a file of \d+ bytes may hold",
    ),
    "weights-without-end-in-parts": (
        file(*(levels(original=(1000, 999), called=f"w{i}") for i in range(9)), stream=STREAM),
        r"`w\d`: shape \(1000, 999\) has more weights than a file of \d+ bytes may hold",
    ),
    "weights-of-no-size": (file(levels(original=(0, 2**31))), r"`w`: shape \(0, 2147483648\) has more weights"),
    "weights-of-no-size-deep": (file(levels(original=(0, *[2**31] * 7))), r"`w`: shape .* has more weights"),
    "dead-weights-without-end": (file(levels(original=(2**30, 4), top=0)), r"`w`: shape .* has more weights"),
    "number-without-end": (
        file(name("heads") + uints(12, 2**31 + 1)),
        r"`heads`: expected at most 2147483648, found 2147483649",
    ),
    "top-40000": (file(levels(top=40000)), r"`w` top level: expected at most 32767, found 40000"),
    "offset-129": (file(levels(offset=129)), r"`w` offset: expected at most 256, found 258"),
    "decay-49": (file(levels(decay=49)), r"`w` decay: expected at most 48, found 49"),
    "decays-of-signs": (
        file(levels(decay=32, top=1, ranges=((0, 3), (-9, 1)))),
        r"`w`: decays of rows whose levels are -1 … 1, expected none",
    ),
    "row-decay-32": (
        file(levels(decay=32, ranges=((30, 2), (-9, 1)))),
        r"`w`: a range within -16 … 31 expected, found 30 … 32",
    ),
    "row-decay-minus-17": (
        file(levels(decay=32, ranges=((-17, 2), (-9, 1)))),
        r"`w`: a range within -16 … 31 expected, found -17 … -15",
    ),
    "row-decays-without-levels": (
        file(levels(decay=32, ranges=((0, 3), (-9, 1)))),
        r"entropy-coded part: it is missing",
    ),
    "resolution-0": (file(levels(resolution=0)), r"`w`: an exponent resolution of 0"),
    "resolution-65537": (file(levels(resolution=65537)), r"`w` resolution: expected at most 65536, found 65537"),
    "exponent-401": (file(levels(ranges=((400, 1),))), r"`w`: a range within -400 … 400 expected, found 400 … 401"),
    "exponents-far-apart": (
        file(levels(resolution=65536, ranges=((0, 65537),))),
        r"`w` range: expected at most 65536, found 65537",
    ),
    "row-offset-33": (
        file(levels(flags=72, ranges=((0, 33), (0, 0)))),
        r"`w`: a range within -32 … 32 expected, found 0 … 33",
    ),
    "tap-offset-minus-33": (
        file(levels(flags=96, ranges=((-33, 0), (0, 0)))),
        r"`w`: a range within -32 … 32 expected, found -33 … -33",
    ),
    "header-ends-early": (file(levels()[:-2]), r"`w` range: 1 bytes expected, 0 left"),
    # levels: stream
    "stream-missing": (file(levels()), r"entropy-coded part: it is missing"),
    "stream-of-7-bytes": (
        file(levels(), stream=STREAM + bytes(3)),
        r"entropy-coded part: expected a whole number of 32-bit words, found 7 bytes",
    ),
    "stream-too-long": (
        file(levels(), stream=STREAM + bytes(8)),
        r"entropy-coded part: its length is not that of its contents",
    ),
    "stream-without-levels": (
        file(plain(3, 1), raw=bytes(2), stream=STREAM * 3),
        r"entropy-coded part: its length is not that of its contents",
    ),
    # graph
    "graph-under-a-name": (
        file(graph(INPUT + uints(0) + OUTPUT, called="g")),
        r"`g`: expected a graph to have the name `.`",
    ),
    "graph-not-last": (
        file(graph(INPUT + uints(0) + OUTPUT), plain(3, 0)),
        r"`.`: expected the graph as the last record",
    ),
    "graph-missing": (file(name(".") + uints(13, 9, 9)), r"graph: 9 bytes expected, 0 left"),
    "graph-bomb": (
        file(graph(BOMB, stored=deflate(BOMB))),
        r"graph: 65536 bytes expected from \d+, at most \d+ are",
    ),
    "graph-of-another-size": (
        file(graph(bytes(600), size=599, stored=deflate(bytes(600)))),
        r"graph: its deflated bytes are not 599 bytes",
    ),
    "graph-shorter-than-stored": (file(graph(bytes(9), size=8)), r"graph: 8 bytes expected from 9"),
    "graph-damaged": (file(graph(bytes(99), stored=b"\xff" * 9)), r"graph: its deflated bytes are damaged"),
    "graph-goes-on": (file(graph(INPUT + uints(0) + OUTPUT + b"\0")), r"graph: 1 bytes after its end"),
    "graph-deflated-goes-on": (
        file(graph(bytes(600), stored=deflate(bytes(600)) + b"\0")),
        r"graph: 1 bytes after its end",
    ),
    "graph-of-a-trillion-inputs": (file(graph(uint(2**40))), r"inputs of the graph: expected at most 64, found"),
    "graph-input-beyond-measure": (
        file(graph(uints(1, 1, 2, 2**20, 2**20, 0) + OUTPUT)),
        r"graph: an input of more than 2\^31 numbers",
    ),
    "graph-input-of-no-type": (file(graph(uints(1, 9, 0, 0) + OUTPUT)), r"type of an input: expected at most 8"),
    "graph-of-a-trillion-nodes": (file(graph(INPUT + uint(2**40))), r"nodes of the graph: expected at most \d+"),
    "graph-operator-4096": (
        file(graph(INPUT + uints(1, 4096, 0) + OUTPUT)),
        r"operator: expected at most \d+, found 4096",
    ),
    "graph-many-arguments": (
        file(graph(INPUT + uints(1, 12, 65) + OUTPUT)),
        r"arguments of `conv1d`: expected at most 64",
    ),
    "graph-reads-the-future": (
        file(graph(INPUT + uints(1, 12, 1, 8) + OUTPUT)),
        r"graph: a result before the first: expected at most 0, found 1",
    ),
    "graph-reads-another-record": (
        file(graph(INPUT + uints(1, 12, 1, 8 * 7 + 1) + OUTPUT)),
        r"graph: record: expected at most 0, found 7",
    ),
    "graph-list-without-end": (
        file(graph(INPUT + uints(1, 12, 1, 8 * 2**30 + 3) + OUTPUT)),
        r"graph: list: expected at most \d+, found 1073741824",
    ),
    "graph-lists-too-deep": (
        file(graph(INPUT + uints(1, 12, 1, *[11] * 9) + OUTPUT)),
        r"graph: lists more than 4 deep",
    ),
    "graph-constant-9": (
        file(graph(INPUT + uints(1, 12, 1, 8 * 9 + 4) + OUTPUT)),
        r"graph: constant: expected at most 3",
    ),
    "graph-type-9": (file(graph(INPUT + uints(1, 12, 1, 8 * 9 + 5) + OUTPUT)), r"graph: type: expected at most 8"),
    "graph-number-of-36-bits": (
        file(graph(INPUT + uints(1, 12, 1, 8 * (2**36 + 1) + 2) + OUTPUT)),
        r"graph: whole number: expected at most 68719476736",
    ),
    "graph-float-cut-off": (file(graph(INPUT + uints(1, 12, 1, 6))), r"float in the graph: 8 bytes expected, 0 left"),
    "graph-float-2": (
        file(graph(INPUT + uints(1, 12, 1, 8 + 6) + OUTPUT)),
        r"graph: float: expected at most 0, found 1",
    ),
    "graph-text-too-long": (
        file(graph(INPUT + uints(1, 12, 1, 8 * 65 + 7) + bytes(65))),
        r"graph: text: expected at most 64",
    ),
    "graph-text-not-ascii": (
        file(graph(INPUT + uints(1, 12, 1, 8 * 2 + 7) + b"\xff\xff" + OUTPUT)),
        r"graph: expected ASCII text, found b'\\xff\\xff'",
    ),
    "graph-without-output": (file(graph(INPUT + uints(0) + uint(4))), r"graph: expected an output that is a result"),
    # masks in the form of runs: the first word says form 1, the rest says nonsense about their number
    "runs-without-end": (
        file(levels(original=(40, 2), ranges=((0, 0),)), stream=b"\xff\xff\xff\xfe" * 2),
        r"entropy-coded part: \d+ runs in a mask of 40",
    ),
    "no-code-word": (
        file(levels(original=(40, 2), ranges=((0, 0),)), stream=b"\xff\xff\xff\xff" * 2),
        r"entropy-coded part: damaged",
    ),
    "runs-that-do-not-add-up": (
        file(levels(original=(40, 2), ranges=((0, 0),)), stream=b"\0\0\0\x80" + b"\0\0\0\0" * 2),
        r"entropy-coded part: runs of \d+ in a mask of 40",
    ),
}


if __name__ == "__main__":
    for old in FOLDER.glob("*.scn"):
        old.unlink()
    for file_name, (data, _) in FILES.items():
        (FOLDER / f"{file_name}.scn").write_bytes(data)
