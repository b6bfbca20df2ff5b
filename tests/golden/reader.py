"""A second reader, written from `docs/format.md` alone: plain Python integers, no numpy, nothing of the package.

It is slow and trusts its file; it shows that the page says enough. Returns {name: (shape, values)}, levels as exact
`(level, exponent, resolution)` triples, all flat in matrix order of the tensor.
"""

import itertools
import math
import struct
import zlib

RAW = {3: "e", 4: "f", 5: "d", 6: "q", 7: "i", 8: "h", 9: "b", 10: "B", 11: "?"}


class Cursor:
    """Bytes of the header."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n, field="graph"):
        self.at += n
        return self.data[self.at - n : self.at]

    def uint(self, field="graph"):
        value, place, byte = 0, 1, 128
        while byte >= 128:
            (byte,) = self.take(1, field)
            value += (byte % 128) * place
            place *= 128
        return value

    def sint(self, field):
        u = self.uint(field)
        return -(u + 1) // 2 if u % 2 else u // 2

    def uints(self, n, field="size"):
        return [self.uint(field) for _ in range(n)]

    def numbers(self, code, n):
        return list(struct.unpack(f"<{n}{code}", self.take(n * struct.calcsize(code))))


class Stream:
    """The range decoder of section 4.1 and what is built on it."""

    def __init__(self, data):
        self.words = list(struct.unpack(f"<{len(data) // 4}I", data))
        self.range, self.read, self.used = 2**64 - 1, 0, False
        self.d = self.word() * 2**32 + self.word()

    def word(self):
        self.read += 1
        return self.words[self.read - 1] if self.read <= len(self.words) else 0

    def symbol(self, table):
        self.used = True
        scale = self.range // 2**24
        q = self.d // scale
        assert q < 2**24
        s = below = 0
        while q >= below + table[s]:
            below += table[s]
            s += 1
        self.d -= scale * below
        self.range = scale * table[s]
        if self.range < 2**32:
            self.range *= 2**32
            self.d = self.d * 2**32 + self.word()
        return s

    def integers(self, count, low, high):
        n, result, block = high - low + 1, [], 4
        if n == 1:
            return [low] * count
        while len(result) < count:
            w = [2 * result.count(s) + 1 for s in range(n)]
            total = sum(w)
            table = [1 + x * (2**24 - n) // total for x in w]
            table[table.index(max(table))] += 2**24 - sum(table)
            result += [self.symbol(table) for _ in range(min(block, count - len(result)))]
            block = max(4, len(result))
        return [s + low for s in result]

    def digits(self, widths):
        values = [2 ** (v - 1) for v in widths]
        for v in range(2, max(widths) + 1):
            for shift in range(0, v - 1, 8):
                b = min(8, v - 1 - shift)
                for i, width in enumerate(widths):
                    if width == v:
                        values[i] += self.symbol([2**24 // 2**b] * 2**b) * 2**shift
        return values

    def mask(self, length):
        if length == 0:
            return []
        if self.integers(1, 0, 1) == [0]:
            return [x == 1 for x in self.integers(length, 0, 1)]
        (first,) = self.integers(1, 0, 1)
        (number,) = self.digits(self.integers(1, 1, 32))
        runs = self.digits(self.integers(number, 1, 16))
        assert sum(runs) == length
        return [(first + i) % 2 == 1 for i, run in enumerate(runs) for _ in range(run)]

    def done(self):
        return self.read >= len(self.words) and (not self.used or self.d < 2**33 - 1)


def power(n):
    """2^(n/2) as a fraction."""
    h, odd = divmod(n, 2)
    top, bottom = (92682, 2**16) if odd else (1, 1)
    return (top * 2**h, bottom) if h >= 0 else (top, bottom * 2**-h)


def table(a, decay, top, tilt=0):
    m, u = power(decay - 8)
    v = [2**40]
    while len(v) < top:
        v.append(v[-1] * m // (m + u))
    total = sum(v)
    tail = [x * 2**24 // total for x in v]
    o, u = power(a - 40)
    living = o * (2**24 - (2 * top + 1)) // (o + u)
    o, u = power(abs(tilt))
    share = o * 2**15 // (o + u)
    up, down = (share, 2**15 - share) if tilt >= 0 else (2**15 - share, share)
    f = [1 + living * x * up // 2**39 for x in tail]
    g = [1 + living * x * down // 2**39 for x in tail]
    return [*g[::-1], 2**24 - sum(f) - sum(g), *f]


def table_of_sizes(decay, top):
    m, u = power(decay - 8)
    v = [2**40]
    while len(v) < top:
        v.append(v[-1] * m // (m + u))
    total = sum(v)
    g = [1 + (x * 2**24 // total) * (2**24 - top) // 2**24 for x in v]
    g[0] += 2**24 - sum(g)
    return g


def strides(shape):
    """How far apart neighbours along each axis lie in matrix order."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def places(shape, axis, groups, transposed):
    """R, C, T and, in their matrix order, where each element of the matrix lies in the flat tensor."""
    size = math.prod(shape)
    if axis is None:
        return 1, size, 1, list(range(size))
    taps = math.prod(shape[2:])
    if axis == 0:
        rows = shape[0]
        return rows, size // (rows * taps) if rows * taps else 0, taps, list(range(size))
    split = [groups, shape[0] // groups, *shape[1:]] if transposed else [1, *shape]
    step = strides(split)
    order = [
        g * step[0] + i * step[1] + o * step[2] + t
        for g in range(split[0])
        for o in range(split[2])
        for i in range(split[1])
        for t in range(taps)
    ]
    return split[0] * split[2], split[1], taps, order


def levels_header(c):
    flags = c.uint("flags")
    axes = c.uint("axes")
    h = {"flags": flags, "axis": (None, 0, 1)[flags // 64 % 3], "original": c.uints(axes)}
    h["shape"] = c.uints(axes, "size now") if flags & 2 else h["original"]
    h["groups"] = c.uint("groups") if flags & 4 else 1
    h["top"] = c.uint("top")
    if h["top"]:
        h["offset"], decay, h["resolution"] = c.sint("offset"), c.uint("decay"), c.uint("resolution")
        h["decay"] = decay if decay <= 32 else 32 - decay
        if flags >= 192:
            h["pitch"] = c.uint("pitch")
            numbers = [c.sint("context") for _ in range(5)]
            h["base"], h["slope"], h["tilt"] = [0, *numbers[:2]], [0, *numbers[2:4]], numbers[4]
        for bit in (8, 16, 32, "decays", 0):
            if bit == 0 or (h["decay"] == 32 if bit == "decays" else flags & bit):
                low = c.sint("lowest")
                h[bit] = (low, low + c.uint("span"))
    return h


def levels(h, stream):
    size = math.prod(h["shape"])
    rows, columns, taps, order = places(h["shape"], h["axis"], h["groups"], h["flags"] & 1)
    h["dead"] = [True] * rows
    if not h["top"]:
        return [(0, None, None)] * size
    alive_rows, alive_columns = stream.mask(rows), stream.mask(columns)
    h["dead"] = [not alive for alive in alive_rows]
    offsets = []
    for bit, alive in ((8, alive_rows), (16, alive_columns), (32, [True] * taps)):
        values = iter(stream.integers(sum(alive), *h[bit]) if bit in h else [0] * sum(alive))
        offsets.append([next(values) if living else None for living in alive])
    values = iter(stream.integers(sum(alive_rows), *h["decays"]) if "decays" in h else [])
    decays = [next(values) if living and "decays" in h else None for living in alive_rows]
    values = iter(stream.integers(sum(alive_rows), *h[0]))
    exponents = [next(values) if living else None for living in alive_rows]
    coded = []
    for i, j, t in itertools.product(range(rows), range(columns), range(taps)):
        if alive_rows[i] and alive_columns[j]:
            a = h["offset"] + 2 * (offsets[0][i] + offsets[1][j] + offsets[2][t])
            coded.append((min(max(a, 0), 63), i, j, t))
    result = [None] * size
    for place, i in zip(order, (i for i in range(rows) for _ in range(columns * taps)), strict=True):
        result[place] = (0, exponents[i], h["resolution"])
    found = {}
    for number in range(3):
        # without a context all weights are of the first pass
        chosen = [x for x in coded if "pitch" not in h or which_pass(x[2] * taps + x[3], h["pitch"]) == number]
        todo = []
        for a, i, j, t in chosen if "pitch" in h or number == 0 else []:
            around = [found.get((i, j * taps + t + d), 0) for d in neighbours(number, h.get("pitch"))]
            tilt = 0
            if number:
                signs = [(k > 0) - (k < 0) for k in around]
                raw = h["offset"] + 2 * (offsets[0][i] + offsets[1][j] + offsets[2][t])
                raw += h["base"][number] + h["slope"][number] * sum(k != 0 for k in around)
                a = min(max(raw, 0), 63)
                tilt = (sum(signs) > 0) - (sum(signs) < 0)
            todo.append((a, tilt, i, j, t))
        for a, tilt, i, j, t in sorted(todo):
            decay, top = (0, 1) if "decays" in h else (h["decay"], h["top"])
            level = stream.symbol(table(a, decay, top, tilt * h.get("tilt", 0))) - top
            found[i, j * taps + t] = level
            result[order[(i * columns + j) * taps + t]] = (level, exponents[i], h["resolution"])
    if "decays" in h:  # what was read are signs
        for decay, i, j in sorted((decays[i], i, j) for (i, j), sign in found.items() if sign):
            size = 1 + stream.symbol(table_of_sizes(decay, h["top"]))
            result[order[i * columns * taps + j]] = (size * found[i, j], exponents[i], h["resolution"])
    return result


SIGNS = ((1, 1), (0, 1), (-1, 1), (0, 0), (-1, 0), (-1, -1))


def norm_header(c):
    h = {"channels": c.uint("size")}
    if h["channels"]:
        h["signs"], h["step"] = SIGNS[c.uint("signs")], c.sint("step")
        for what in ("exponents", "shifts"):
            h[what] = (0, 0)
            if what == "shifts" or h["signs"] != (0, 0):
                low = c.sint("norm lowest")
                h[what] = (low, low + c.uint("norm span"))
    return h


def norm(h, dead, stream):
    """Section 3.1; `dead` are the rows that do not live of the levels before."""
    n = h["channels"]
    if not n:
        return [0], [], []
    if len(dead) != n:
        dead = [False] * n
    signs = [None] * n
    for group in (False, True):
        places = [i for i in range(n) if dead[i] == group]
        for i, sign in zip(places, stream.integers(len(places), *h["signs"]), strict=True):
            signs[i] = sign
    exponents = iter(stream.integers(sum(s != 0 for s in signs), *h["exponents"]))
    scales = [s * 2.0 ** (next(exponents) / 32) if s else 0.0 for s in signs]
    return [n], scales, [k * 2.0 ** h["step"] for k in stream.integers(n, *h["shifts"])]


def scales_header(c):
    h = {"shape": c.uints(c.uint("axes")), "signs": (0, 0), "exponents": (0, 0)}
    if math.prod(h["shape"]):
        h["signs"] = SIGNS[c.uint("signs")]
        if h["signs"] != (0, 0):
            low = c.sint("norm lowest")
            h["exponents"] = (low, low + c.uint("norm span"))
    return h


def scales(h, stream):
    """Section 3.2."""
    signs = stream.integers(math.prod(h["shape"]), *h["signs"])
    exponents = iter(stream.integers(sum(s != 0 for s in signs), *h["exponents"]))
    return h["shape"], [s * 2.0 ** (next(exponents) / 32) if s else 0.0 for s in signs]


def which_pass(place, pitch):
    """Section 4.6."""
    line, rest = place // pitch % 2, place % pitch % 2
    return line if line == rest else 2


def neighbours(number, pitch):
    return {0: [], 1: [-pitch - 1, 1 - pitch, pitch - 1, pitch + 1], 2: [-pitch, -1, 1, pitch]}[number] if pitch else []


DTYPES = ("float16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


def value(c, now, names):
    """One value of section 5.3, as a pair of its tag and what it stands for."""
    payload, tag = divmod(c.uint(), 8)
    if tag == 0:
        return "result", now - 1 - payload
    if tag == 1:
        return "record", names[payload]
    if tag == 2:
        return "int", -(payload + 1) // 2 if payload % 2 else payload // 2
    if tag == 3:
        return "list", [value(c, now, names) for _ in range(payload)]
    if tag == 4:
        return ("none", "false", "true", "end")[payload], None
    if tag == 5:
        return "type", DTYPES[payload]
    if tag == 6:
        return "float", c.numbers("d", 1)[0]
    return "text", c.take(payload).decode("ascii")


def graph(c, names):
    """Inputs, nodes and output of section 5."""
    size, stored = c.uint(), c.uint()
    data = c.take(stored)
    c = Cursor(data if size == stored else zlib.decompress(data, -15))
    inputs = [(DTYPES[c.uint()], [divmod(c.uint(), 2) for _ in range(c.uint())]) for _ in range(c.uint())]
    now, nodes = len(inputs), []
    for _ in range(c.uint()):
        operator = c.uint()
        nodes.append((operator, [value(c, now, names) for _ in range(c.uint())]))
        now += 1
    return inputs, nodes, value(c, now, names)


WORDS = (
    b"weight", b"bias", b"conv", b"norm", b"fc", b"linear", b"bn", b"ln_", b"layer", b"layers.", b"block", b"blocks.",
    b"stages.", b"features.", b"stem", b"downsample", b"shortcut", b"attn", b"attention", b"self_attn", b"mlp",
    b"proj", b"qkv", b"query", b"key", b"value", b"q_proj", b"k_proj", b"v_proj", b"out_proj", b"o_proj", b"in_proj",
    b"up_proj", b"down_proj", b"gate", b"embed", b"embedding", b"pos_embed", b"position", b"token", b"cls_token",
    b"head", b"lm_head", b"classifier", b"dense", b"output", b"out", b"intermediate", b"encoder", b"decoder",
    b"transformer", b"model.", b"running_mean", b"running_var", b"num_batches_tracked", b"num_heads", b"depthwise",
    b"pointwise", b"se.", b"reduce", b"expand", b"scale", b".0.", b".1.",
)  # fmt: skip


def with_words(data):
    """What a name goes on with: section 2."""
    result, inside = b"", 0
    for byte in data:
        if inside or not 128 <= byte < 192:
            inside = inside - 1 if inside else sum(byte >= first for first in (0xC0, 0xE0, 0xF0))
            result += bytes([byte])
        else:
            result += WORDS[byte - 128]
    return result


PRIMER = {
    "text length": "12 0c",
    "text": b"digits mnist fashion-mnist cifar10 imagefolder text lenet-300-100 lenet5 conv5 resnet9 resnet20 vgg16 "
    b"gpt".hex(" "),
    "records": "06 08 0c 11",
    "shared": "00 04 06 05 0c 07 09 02 0b 10 12 00 05 07",
    "name length": "01 01 01 03 04 03 04 05 02 06 08 0a 0c",
    "name": "82 31 2e 80 81 32 2e 80 81 83 31 88 31 be 82 32 2e 80 86 32 84 2e 80 81 30 2e 80 2e 33 2e"
    " 89 31 2e 91 2e 9a 2e 80 81 a9 2e 80 8b 30 2e 83 32",
    "kind": "00 00 00 0f 00 00 0f 00 00 10 01",
    "flags": "40 02 82 02 40 00 98 02 42 02 80 02 88 02",
    "axes": "04 01 04 01 02 01 02",
    "size": "10 03 03 03 10 20 10 03 03 20 40 20 03 03 40 80 01 40 03 03 80 01 80 01 80 01 80 04 0a 80 01 0a f4 03 80"
    " 02",
    "size now": "0a 03 03 03 14 0c 03 03 1e 14 03 03 28 0a",
    "top": "01 02 04 03 00 01 06 00 08 0a 0f",
    "offset": "48 42 50 58 60 8c 01 54 4c 90 01 46",
    "decay": "20 00 20 08 05 20 00",
    "resolution": "04 04 04",
    "pitch": "03 03 05",
    "context": "01 00 02 02 06 00 01 04 03 08 00 03 00 04 0a",
    "lowest": "03 15 05 01 25 07 0b 03 09 1d 00 0d 11 21",
    "span": "03 04 02 05 08 00 06 03 07 0c 0a 00 04",
    "signs": "00 00 01",
    "step": "0b 0b 0d",
    "norm lowest": "0c 5b 81 01 2f ab 02",
}


class Heading(Cursor):
    """The header in the stream: section 4.8."""

    def __init__(self, stream, version):
        self.stream, self.version, self.before, self.at = stream, version, [], 0
        self.primer = {field: b"\0\0\0" + bytes.fromhex(usual) for field, usual in PRIMER.items()}
        self.field = {}  # the bytes of each, after three zeros

    def weights(self, field):
        w = [16 if s < 8 else 8 if s < 16 else 4 if s < 32 else 2 if s < 144 else 1 for s in range(256)]
        if self.version == 2:
            for f, s in self.before:
                w[s] += 8 + 256 * (f == field)
            return w
        here = self.field.get(field, b"\0\0\0")
        for seen, each in ((self.primer.get(field, b""), (64, 256, 512, 1024)), (here, (64, 512, 2048, 8192))):
            for at in range(3, len(seen)):
                for order, weight in enumerate(each):
                    w[seen[at]] += weight * (seen[at - order : at] == here[len(here) - order :])
        return w

    def take(self, n, field="graph"):
        for _ in range(n):
            w = self.weights(field)
            total = sum(w)
            table = [1 + x * (2**24 - 256) // total for x in w]
            table[table.index(max(table))] += 2**24 - sum(table)
            found = self.stream.symbol(table)
            self.before.append((field, found))
            self.field[field] = self.field.get(field, b"\0\0\0") + bytes([found])
            self.at += 1
        return bytes(s for _, s in self.before[self.at - n :])


def read(data):
    assert data[:3] == b"SCN"
    assert struct.unpack("<I", data[-4:])[0] == zlib.crc32(data[:-4])
    c = raw = Cursor(data[4:-4])
    if data[3] > 1:
        assert data[3] <= 3
        size = c.uint() if data[3] == 2 else None
        raw = Cursor(c.take(c.uint()))
        stream = Stream(c.data[c.at :])
        c = Heading(stream, data[3])
    else:
        assert data[3] == 1
    metadata = c.take(c.uint("text length"), "text").decode()
    heads, name = [], b""
    for _ in range(c.uint("records")):
        shared = c.uint("shared")
        name = name[:shared] + with_words(c.take(c.uint("name length"), "name"))
        kind = c.uint("kind")
        if kind == 0:
            heads.append((name.decode(), kind, levels_header(c)))
        elif kind == 15:
            heads.append((name.decode(), kind, norm_header(c)))
        elif kind == 16:
            heads.append((name.decode(), kind, scales_header(c)))
        elif kind == 12:
            heads.append((name.decode(), kind, c.uint("number")))
        elif kind == 14:
            top, signed = divmod(c.uint("rounding"), 2)
            heads.append((name.decode(), kind, (top, bool(signed), c.sint("rounding"))))
        elif kind == 13:
            heads.append((name.decode(), kind, graph(c, [head[0] for head in heads])))
        else:
            heads.append((name.decode(), kind, c.uints(1 if kind < 3 else c.uint("axes"))))
    plain = {}
    for name, kind, shape in heads:
        if kind in (1, 2):
            plain[name] = (shape, raw.numbers("ef"[kind - 1], shape[0]), raw.numbers("ef"[kind - 1], shape[0]))
        elif kind in (12, 13, 14, 15, 16):
            plain[name] = shape
        elif kind:
            plain[name] = (shape, raw.numbers(RAW[kind], math.prod(shape)))
    if data[3] == 1:
        stream = Stream(c.data[c.at :])
    else:
        assert raw.at == len(raw.data)
        assert size in (None, c.at)
    result, dead = {}, []
    for name, kind, head in heads:
        if kind == 0:
            result[name] = (head["shape"], levels(head, stream), head["original"])
            dead = head["dead"]
        elif kind in (15, 16):
            result[name] = norm(head, dead, stream) if kind == 15 else scales(head, stream)
        else:
            result[name] = plain[name]
    assert stream.done()
    return result, metadata
