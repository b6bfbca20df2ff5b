"""The file against its inverse, its literal bytes, a second reader, and everything that may come in its place."""

import importlib.util
import os
import random
import re
import struct
import sys
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from selfcompress.coder import Decoder, Encoder, LevelModel
from selfcompress.container import (
    MAX_EXPONENTS,
    MAX_NAME,
    Activation,
    Contents,
    GraphRecord,
    LevelTensor,
    NormTensor,
    Number,
    RawTensor,
    Record,
    fewest_bytes,
    matrix_shape,
    most_weights,
    read,
    read_file,
    size_bits,
    write,
    write_file,
)
from selfcompress.errors import FormatError, OutputError
from selfcompress.graph import END, OPERATORS, DType, Graph, Result, Stored, Value
from selfcompress.heading import PRIMER, HeaderReader, write_header
from selfcompress.wire import NAME_WORDS, Field, Writer

HERE = Path(__file__).parent


def script(path: Path) -> ModuleType:
    """A Python file that lies beside data, as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


golden = script(HERE / "golden" / "make.py")
second = script(HERE / "golden" / "reader.py")
hostile = script(HERE / "hostile" / "make.py")


def assert_same(found: Contents, expected: Contents) -> None:
    assert found.metadata == expected.metadata
    assert [r.name for r in found.records] == [r.name for r in expected.records]
    for a, b in zip(found.records, expected.records, strict=True):
        assert type(a) is type(b)
        if isinstance(a, LevelTensor) and isinstance(b, LevelTensor):
            for field in ("original_shape", "shape", "axis", "groups", "transposed", "resolution"):
                assert getattr(a, field) == getattr(b, field), (a.name, field)
            assert a.levels.dtype == np.int16
            assert np.array_equal(a.levels, b.levels), a.name
            assert a.exponents.tolist() == b.exponents.tolist()
            assert a.model.top == b.model.top
            assert a.matrix == a.levels.shape
        elif isinstance(a, NormTensor) and isinstance(b, NormTensor):
            for x, y in ((a.scale, b.scale), (a.shift, b.shift)):
                assert x.dtype == y.dtype
                assert np.array_equal(x, y)
        elif isinstance(a, RawTensor) and isinstance(b, RawTensor):
            assert a.values.dtype == b.values.dtype
            assert a.values.shape == b.values.shape
            assert a.values.tobytes() == b.values.tobytes()
        else:
            assert a == b


def some_levels(
    name: str = "w", *, seed: int = 0, shape: tuple[int, ...] = (6, 5, 3, 3), **changes: object
) -> LevelTensor:
    rng = np.random.default_rng(seed)
    cube = rng.integers(-3, 4, matrix_shape(shape, 0)) * (rng.random(matrix_shape(shape, 0)) < 0.5)
    cube[1:2], cube[:, 3:4], cube[0, 0, 0] = 0, 0, 1
    rows, columns = cube.any((1, 2)), cube.any((0, 2))
    top = int(np.abs(cube).max(initial=0))
    model = LevelModel(
        39, 7, top, rows, columns, rng.integers(-2, 3, rows.sum()), None, rng.integers(-1, 2, cube.shape[2])
    )
    values: dict[str, object] = {
        "name": name,
        "original_shape": shape,
        "shape": shape,
        "axis": 0,
        "groups": 1,
        "transposed": False,
        "resolution": 4,
        "exponents": rng.integers(-40, 9, rows.sum()),
        "model": model,
        "levels": cube.astype(np.int16),
    }
    return LevelTensor(**(values | changes))  # type: ignore[arg-type]


# -- what is written is read


@pytest.mark.parametrize("name", sorted(golden.GOLDEN))
def test_golden_contents_have_these_bytes(name: str) -> None:
    assert write(golden.GOLDEN[name](), golden.version(name)) == golden.stored(name)


@pytest.mark.parametrize("name", sorted(golden.GOLDEN))
def test_golden_bytes_have_these_contents(name: str) -> None:
    assert_same(read(golden.stored(name)), golden.GOLDEN[name]())


def tensor_in_order(record: LevelTensor) -> list[tuple[int, int | None]]:
    """(level, exponent) of each weight in the order of the tensor, by way of numpy's own axis moves."""
    exponents = np.full(record.levels.shape[0], 10**6)
    exponents[record.model.alive_rows] = record.exponents
    both = np.stack([record.levels.astype(np.int64), np.broadcast_to(exponents[:, None, None], record.levels.shape)])
    shape = record.shape
    if record.axis == 1 and record.transposed:
        groups = record.groups
        grid = both.reshape(2, groups, shape[1], shape[0] // groups, *shape[2:])
        both = np.moveaxis(grid, 2, 3)
    elif record.axis == 1:
        both = np.moveaxis(both.reshape(2, shape[1], shape[0], *shape[2:]), 1, 2)
    flat = both.reshape(2, -1)
    return [(int(k), None if e == 10**6 else int(e)) for k, e in flat.T]


def graph_in_pairs(graph: Graph) -> tuple[Any, Any, Any]:
    """A graph in the words of the second reader."""
    constants = {None: "none", False: "false", True: "true"}

    def pair(value: Value) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return "list", [pair(item) for item in value]
        if type(value) is int and value == END:
            return "end", None
        if value is None or isinstance(value, bool):
            return constants[value], None
        if isinstance(value, Result):
            return "result", value.index
        if isinstance(value, Stored | DType):
            return ("record" if isinstance(value, Stored) else "type"), value.name
        return {int: "int", float: "float", str: "text"}[type(value)], value

    inputs = [(i.dtype, [(axis.size, int(axis.free)) for axis in i.axes]) for i in graph.inputs]
    nodes = [(OPERATORS.index(node.operator), [pair(v) for v in node.arguments]) for node in graph.nodes]
    return inputs, nodes, pair(graph.output)


@pytest.mark.parametrize("name", sorted(golden.GOLDEN))
def test_a_second_reader_written_from_the_page_agrees(name: str) -> None:
    contents = read(golden.stored(name))
    found, metadata = second.read(golden.stored(name))
    assert metadata == contents.metadata
    assert list(found) == [r.name for r in contents.records]
    for record in contents.records:
        entry = found[record.name]
        if isinstance(record, LevelTensor):
            assert entry[0] == list(record.shape)
            assert entry[2] == list(record.original_shape)
            if record.model.top:
                assert [(k, e) for k, e, _ in entry[1]] == tensor_in_order(record)
                assert {r for _, _, r in entry[1]} == {record.resolution}
            else:
                assert not any(k for k, _, _ in entry[1])
        elif isinstance(record, Number):
            assert entry == record.value
        elif isinstance(record, Activation):
            assert entry == (record.top, record.signed, record.exponent)
        elif isinstance(record, GraphRecord):
            assert entry == graph_in_pairs(record.graph)
        elif isinstance(record, NormTensor):
            assert entry[1:] == (record.scale.tolist(), record.shift.tolist())
        else:
            assert entry == (list(record.values.shape), record.values.ravel().tolist())


def test_a_second_reader_agrees_on_random_files() -> None:
    for seed in range(12):
        shapes = [(6, 5, 3, 3), (2, 30), (40, 4, 1), (1, 5)]
        records = tuple(some_levels(f"layer{i}.weight", seed=seed + i, shape=s) for i, s in enumerate(shapes))
        data = write(Contents(records, "é" * seed))
        found, metadata = second.read(data)
        assert metadata == "é" * seed
        for record in records:
            assert [(k, e) for k, e, _ in found[record.name][1]] == tensor_in_order(record)


def test_the_page_lists_the_operators() -> None:
    page = (HERE.parent / "docs" / "format.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ((?:`[^`]+` ?)+)\|$", page[page.index("### 5.3") :], re.MULTILINE)
    listed = {int(first): re.findall(r"`([^`]+)`", names) for first, names in rows}
    assert [name for first in sorted(listed) for name in listed[first]] == list(OPERATORS)
    assert all(listed[first] == list(OPERATORS[first : first + 10]) for first in listed)


def test_the_page_lists_the_words_of_names() -> None:
    page = (HERE.parent / "docs" / "format.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ((?:`[^`]+` ?)+)\|$", page[: page.index("**Kind**")], re.MULTILINE)
    listed = [(int(first), re.findall(r"`([^`]+)`", words)) for first, words in rows]
    assert [word for _, words in listed for word in words] == [word.decode() for word in NAME_WORDS]
    assert [first for first, _ in listed] == [128, 144, 160, 176]


def test_the_page_lists_what_is_usual_in_a_header() -> None:
    page = (HERE.parent / "docs" / "format.md").read_text(encoding="utf-8")
    section = page[page.index("### 4.8") : page.index("## 5.")]
    rows = re.findall(r"^\| [^|]+ \| `([0-9a-f ]+)` \|$", section, re.MULTILINE)
    assert [bytes.fromhex(told) for told in rows] == list(PRIMER.values())


@pytest.mark.parametrize(
    ("name", "size"),
    [("conv1.weight", 2 + 4), ("features.0.weight", 2 + 4), ("layers.10.self_attn.q_proj.weight", 2 + 9), ("möwe", 7)],
)
def test_words_in_names_take_a_byte(name: str, size: int) -> None:
    plain = len(write(Contents((RawTensor("", np.zeros(1, np.float16)),)), version=1))
    assert len(write(Contents((RawTensor(name, np.zeros(1, np.float16)),)), version=1)) == plain - 2 + size


def test_the_page_shows_the_golden_file() -> None:
    page = (HERE.parent / "docs" / "format.md").read_text(encoding="utf-8")
    table = page[page.index("## 7.") : page.index("## 8.")]
    shown = re.findall(r"^\| (\d+) \| `([0-9a-f ]+)`", table, re.MULTILINE)
    at = 0
    for offset, digits in shown:
        assert int(offset) == at
        at += len(bytes.fromhex(digits))
    assert b"".join(bytes.fromhex(digits) for _, digits in shown) == golden.stored("tiny")
    assert ", ".join(str(f) for f in second.table(42, 6, 3)) in table


@pytest.mark.parametrize("shape", [(1, 1), (6, 5), (6, 5, 3), (2, 5, 1, 1), (3, 7, 2, 2, 2), (6, 5, 1, 1, 1, 1, 1, 2)])
@pytest.mark.parametrize("metadata", ["", "plain", "größer ✓\n\0", "x" * 1000])
def test_contents_come_back(shape: tuple[int, ...], metadata: str) -> None:
    contents = Contents((some_levels(shape=shape), RawTensor("b", np.arange(4.0, dtype=np.float32))), metadata)
    assert_same(read(write(contents)), contents)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3), (1, 2, 1, 2, 1, 2, 1, 2)])
def test_raw_numbers_of_every_kind_come_back(dtype: str, shape: tuple[int, ...]) -> None:
    values = (np.arange(np.prod(shape)).reshape(shape) % 2 * 101).astype(dtype)
    contents = Contents((RawTensor("x", values), RawTensor("y", values[::-1] if shape else values)))
    assert_same(read(write(contents)), contents)


@pytest.mark.parametrize(
    "names",
    [
        ["a"],
        ["a", "ab", "abc", "b", ""],
        ["", "a"],
        ["é", "è", "ée"],
        ["n" * MAX_NAME],
        ["conv1.weight", "conv1.bias", "blocks.0.attn.q_proj.weights", "ü.weight", "üw.\x7f\x80weight", "✓bias𝄞norm"],
    ],
)
def test_names_come_back(names: list[str]) -> None:
    contents = Contents(tuple(RawTensor(n, np.zeros(1, np.float16)) for n in names))
    assert_same(read(write(contents)), contents)


@pytest.mark.parametrize(("version", "size"), [(1, 10), (2, 14), (3, 13)])
def test_an_empty_network_takes_little(version: int, size: int) -> None:
    data = write(Contents(()), version)
    assert len(data) == size
    assert version > 1 or data == hostile.file()
    assert read(data).records == ()


def test_a_header_in_the_stream_takes_less_and_one_that_is_too_long_is_left_as_it_is() -> None:
    for count, version in ((30, 3), (1 << 15, 1)):
        contents = Contents(tuple(RawTensor(f"layer.{i}.scale", np.zeros(1, np.int8)) for i in range(count)))
        data = write(contents)
        assert data[3] == version
        assert_same(read(data), contents)
    plain, coded, primed = (len(write(golden.CONTENTS["full"](), version)) for version in (1, 2, 3))
    assert primed < coded < plain - 60


@pytest.mark.parametrize("version", [2, 3])
def test_a_header_in_the_stream_comes_back_byte_by_byte(version: int) -> None:
    chance, header, encoder = random.Random(version), Writer(), Encoder()
    for _ in range(2000):
        header.put(bytes([chance.choice([0, 1, 2, 200, chance.randrange(256)])]), Field(chance.randrange(len(Field))))
    write_header(header, encoder, version)
    reader = HeaderReader(Decoder(encoder.finish()), 2000, version)
    for field, byte in zip(header.fields, header.data, strict=True):
        assert reader.take(1, "byte", Field(field)) == bytes([byte])


def test_what_is_usual_is_cheap_from_the_first_layer_on() -> None:
    def size(shapes: dict[str, tuple[int, ...]], version: int) -> int:
        header, encoder, previous = Writer(), Encoder(), b""
        for name, shape in shapes.items():
            header.name(name.encode(), previous)
            previous = name.encode()
            header.uint(0, Field.KIND)
            header.uint(len(shape), Field.AXES)
            header.shape(shape)
        write_header(header, encoder, version)
        return len(encoder.finish())

    usual = {"conv1.weight": (16, 3, 3, 3), "conv1.bias": (16,), "fc.weight": (10, 128), "fc.bias": (10,)}
    unusual = {"Zx~7&weight": (229, 101, 77, 83), "Zx~7&bias": (229,), "!?.weight": (113, 229), "!?.bias": (113,)}
    assert size(usual, 3) < 0.7 * size(usual, 2)
    assert size(unusual, 3) < 1.15 * size(unusual, 2)  # and what is not costs little more


def test_values_that_are_not_finite_come_back() -> None:
    contents = Contents((RawTensor("x", np.array([np.inf, -np.inf, np.nan], np.float16)),))
    assert_same(read(write(contents)), contents)


def test_writing_twice_gives_the_same_bytes() -> None:
    assert write(golden.full()) == write(golden.full())


def test_the_size_of_a_tensor_is_what_it_adds_to_the_stream() -> None:
    for seed in range(6):
        small, both = some_levels("a", seed=seed), some_levels("b", seed=seed + 50, shape=(30, 20, 2))
        without = len(write(Contents((small,))))
        more = 8 * (len(write(Contents((small, both)))) - without)
        header = 8 * (1 + 1 + 1 + 1 + 1 + 1 + 3 + 1 + 2 + 1 + 1 + 4 + 2 + 3)
        assert -64 <= more - size_bits(both) <= header + 64


# -- what cannot be written


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (RawTensor("x", np.zeros(2, np.complex64)), r"`x`: numbers of type complex64 cannot be stored, only float16"),
        (RawTensor("x", np.zeros([1] * 9)), r"`x`: expected at most 8 axes, found 9"),
        (RawTensor("x" * 1025, np.zeros(1)), r"`x+…`: expected a name of at most 1024 bytes"),
        (some_levels(exponents=np.array([-500, 0, 0, 0, 0])), r"`w`: exponents -125 … 0 octaves, expected at most 100"),
        (
            some_levels(exponents=np.array([0, 0, 0, 0, MAX_EXPONENTS + 1]), resolution=1000),
            r"`w`: exponents 0 … 65.537 octaves, expected at most 100 in absolute value and 65.536 apart",
        ),
    ],
)
def test_what_no_reader_would_take_is_not_written(record: Record, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        write(Contents((record,)))


def test_more_weights_than_a_reader_would_take_are_not_written() -> None:
    shape = (2000, 2000)
    dead = LevelModel(0, 0, 0, np.zeros(2000, bool), np.zeros(2000, bool), None, None, np.zeros(1, np.int64))
    tensor = some_levels(original_shape=shape, shape=shape, model=dead, levels=np.zeros((2000, 2000, 1), np.int16))
    with pytest.raises(
        FormatError, match=r"4000000 weights in \d+ bytes: a file of that length holds at most \d+\nhint"
    ):
        write(Contents((tensor,)))


@pytest.mark.parametrize(
    "weights", [0, 1, 1 << 20, (1 << 20) + 1, (1 << 20) + 8192, 3_500_000, 34_603_008, 34_603_009, 10**9]
)
def test_the_fewest_bytes_of_a_file_are_just_enough_for_its_weights(weights: int) -> None:
    size = fewest_bytes(weights)
    assert weights <= most_weights(size)
    assert size == 0 or weights > most_weights(size - 1)


def test_the_weights_a_file_may_hold_grow_with_its_length() -> None:
    assert [most_weights(n) for n in (0, 1, 4096, 4097, 10**6)] == [
        1 << 20,
        (1 << 20) + 8192,
        (1 << 20) + 8192 * 4096,
        (1 << 20) + 8192 * 4096 + 512,
        (1 << 20) + 8192 * 4096 + 512 * (10**6 - 4096),
    ]


# -- what must not be trusted


def read_politely(data: bytes) -> FormatError | None:
    """Read; return the error if it is the one it has to be; watch time and memory."""
    tracemalloc.start()
    started = time.perf_counter()
    try:
        read(data)
    except FormatError as error:
        return error
    finally:
        taken, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert taken < 2  # a tenth of that on an idle machine, without the tracing
        assert peak < 64 << 20
    return None


@pytest.mark.parametrize("name", sorted(hostile.FILES))
def test_hostile_files_are_refused_with_a_reason(name: str) -> None:
    data, message = hostile.FILES[name]
    assert (HERE / "hostile" / f"{name}.scn").read_bytes() == data
    error = read_politely(data)
    assert error is not None
    assert re.search(message, str(error)), str(error)


def test_the_folder_holds_no_other_files() -> None:
    assert {p.stem for p in (HERE / "hostile").glob("*.scn")} == set(hostile.FILES)


@pytest.mark.parametrize("name", sorted(golden.GOLDEN))
def test_a_file_cut_off_anywhere_is_refused(name: str) -> None:
    data = golden.stored(name)
    for length in range(len(data)):
        with pytest.raises(FormatError, match=r"truncated|starts with"):
            read(data[:length])


def test_a_file_with_any_bit_turned_over_is_refused() -> None:
    data = golden.stored("tiny")
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError, match=r"checksum|starts with|format version"):
            read(bytes(changed))


def mutations(data: bytes, count: int) -> Iterator[bytes]:
    """Damaged copies of a file, each with a checksum that is right again."""
    chance = random.Random(0)
    body = data[:-4]
    for _ in range(count):
        changed = bytearray(body)
        for _ in range(chance.choice([1, 1, 1, 2, 5])):
            at = chance.randrange(4, len(changed))
            action = chance.randrange(6)
            if action == 0:
                changed[at] ^= 1 << chance.randrange(8)
            elif action == 1:
                changed[at] = chance.choice([0, 1, 127, 128, 255])
            elif action == 2:
                del changed[at : at + chance.choice([1, 4, 20])]
            elif action == 3:
                changed[at:at] = chance.randbytes(chance.choice([1, 4, 20]))
            elif action == 4:
                changed[at:at] = changed[chance.randrange(4, len(changed)) :][: chance.randrange(40)]
            else:
                changed[at : at + 1] = hostile.uint(chance.randrange(2 ** chance.randrange(1, 50)))
            if len(changed) < 8:
                changed += bytes(8)
        yield bytes(changed) + struct.pack("<I", zlib.crc32(changed))


@pytest.mark.parametrize(("name", "count"), [("tiny", 600), ("full", 200), ("graph", 600)])
def test_damage_under_a_correct_checksum_gives_contents_or_a_format_error(name: str, count: int) -> None:
    refused = 0
    for data in mutations(golden.stored(name), count):
        try:
            contents = read(data)
        except FormatError:
            refused += 1
            continue
        for record in contents.records:
            if isinstance(record, LevelTensor):
                assert record.levels.shape == record.matrix
                assert np.abs(record.levels.astype(int)).max(initial=0) <= record.model.top
                assert len(record.exponents) == record.model.alive_rows.sum()
    assert refused > count / 3


def test_every_cut_of_the_header_under_a_correct_checksum_gives_a_format_error() -> None:
    body = golden.stored("full")[:-4]
    for length in range(4, 290, 3):
        data = body[:length] + struct.pack("<I", zlib.crc32(body[:length]))
        with pytest.raises(FormatError):
            read(data)


# -- on disk


def test_a_file_is_written_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "net.scn"
    write_file(target, b"old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        OutputError, match=r"net.scn`: cannot be written, No space left on device\nhint: choose another"
    ):
        write_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
    monkeypatch.undo()
    write_file(target, b"new")
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "net.scn"
    write_file(target, b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_file(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("place", ["missing/net.scn", "folder", "file/net.scn"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputError, match=rf"{place}`: cannot be written, .*\nhint: "):
        write_file(tmp_path / place, b"new")
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("place", ["missing.scn", "folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(FormatError, match=rf"{place}`: cannot be read, "):
        read_file(tmp_path / place)
