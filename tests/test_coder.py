"""The entropy coder against its inverse, against plain-integer arithmetic, and against what it says it will spend."""

import contextlib
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from selfcompress import coder
from selfcompress.coder import (
    DECAYS,
    TOTAL,
    Decoder,
    Encoder,
    LevelModel,
    frequencies,
    integers_bits,
    levels_bits,
    mask_bits,
    prices,
    size_frequencies,
)
from selfcompress.contexts import Context
from selfcompress.errors import FormatError

SOURCES = Path(coder.__file__).parent
TOPS = (1, 2, 3, 7, 127, 32767)


def model_of(levels: NDArray[np.int64], offset: int, decay: int, **offsets: NDArray[np.int64] | None) -> LevelModel:
    rows, columns, taps = (offsets.get(name) for name in ("rows", "columns", "taps"))
    alive_rows, alive_columns = levels.any(axis=(1, 2)), levels.any(axis=(0, 2))
    return LevelModel(
        offset=offset,
        decay=decay,
        top=int(np.abs(levels).max(initial=0)),
        alive_rows=alive_rows,
        alive_columns=alive_columns,
        rows=None if rows is None else rows[alive_rows],
        columns=None if columns is None else columns[alive_columns],
        taps=np.zeros(levels.shape[2], np.int64) if taps is None else taps,
    )


def draw_levels(rng: np.random.Generator, shape: tuple[int, int, int], top: int, share: float) -> NDArray[np.int64]:
    levels = rng.integers(-top, top + 1, shape) * (rng.random(shape) < share)
    if levels.size:
        levels.flat[rng.integers(levels.size)] = top  # so that `top` is what it says
    return levels


def there_and_back(levels: NDArray[np.int64], model: LevelModel) -> bytes:
    encoder = Encoder()
    encoder.levels(levels.astype(np.int16), model)
    data = encoder.finish()
    decoder = Decoder(data)
    found = decoder.levels(levels.shape, model)
    decoder.finish()
    assert found.dtype == np.int16
    assert np.array_equal(found, levels)
    return data


# -- frequencies


@pytest.mark.parametrize("top", TOPS)
def test_frequencies_are_positive_symmetric_and_sum_to_two_to_the_24(top: int) -> None:
    step = 1 if top < 1000 else 9
    for index in range(0, 64, step):
        for decay in range(-16, 32, step):
            table = frequencies(index, decay, top)
            assert len(table) == 2 * top + 1
            assert table.sum() == TOTAL
            assert table.min() >= 1
            assert np.array_equal(table, table[::-1])
            assert (np.diff(table[top + 1 :]) <= 0).all()


def test_frequencies_are_the_model_of_the_docstring() -> None:
    for index in range(0, 64, 3):
        for decay in range(-16, 32, 3):
            for top in (1, 2, 5, 40):
                odds, mean = 2 ** ((index - 40) / 2), 2 ** ((decay - 8) / 2)
                tail = np.array([(mean / (1 + mean)) ** k for k in range(1, top + 1)])
                half = odds / (1 + odds) * tail / tail.sum() / 2
                expected = np.concatenate([half[::-1], [1 - 2 * half.sum()], half])
                found = frequencies(index, decay, top) / TOTAL
                assert np.allclose(found, expected, rtol=2e-5, atol=(2 * top + 2) / TOTAL)


@pytest.mark.parametrize(
    ("arguments", "literal"),
    [
        ((40, 8, 0), [16777216]),
        ((40, 8, 1), [4194304, 8388608, 4194304]),
        ((0, 0, 1), [8, 16777200, 8]),
        ((63, 31, 1), [8385712, 5792, 8385712]),
        ((42, 6, 3), [430185, 1290555, 3871664, 5592408, 3871664, 1290555, 430185]),
        ((41, 9, 2), [1815198, 3098736, 6949348, 3098736, 1815198]),
        ((7, 31, 4), [23, 23, 23, 23, 16777032, 23, 23, 23, 23]),
        ((55, 13, 2), [3832511, 4510009, 92176, 4510009, 3832511]),
        ((42, -7, 2), [30557, 5561847, 5592408, 5561847, 30557]),
    ],
)
def test_frequencies_are_these_numbers_on_every_machine(arguments: tuple[int, int, int], literal: list[int]) -> None:
    assert frequencies(*arguments).tolist() == literal


@pytest.mark.parametrize("top", TOPS)
def test_frequencies_of_sizes_are_positive_decreasing_and_sum_to_two_to_the_24(top: int) -> None:
    for decay in DECAYS:
        table = size_frequencies(decay, top)
        assert len(table) == top
        assert table.sum() == TOTAL
        assert table.min() >= 1
        assert (np.diff(table) <= 0).all()


def test_frequencies_of_sizes_are_geometric() -> None:
    for decay, top in [(-16, 2), (-3, 4), (0, 3), (8, 5), (17, 40), (31, 300)]:
        mean = 2 ** ((decay - 8) / 2)
        tail = np.array([(mean / (1 + mean)) ** k for k in range(top)])
        assert np.allclose(size_frequencies(decay, top) / TOTAL, tail / tail.sum(), rtol=2e-5, atol=(top + 2) / TOTAL)


@pytest.mark.parametrize(
    ("arguments", "literal"),
    [
        ((5, 1), [16777216]),
        ((6, 3), [11614996, 3871665, 1290555]),
        ((8, 4), [8947850, 4473923, 2236962, 1118481]),
        ((31, 2), [8390056, 8387160]),
        ((0, 2), [15845149, 932067]),
        ((-16, 2), [16773122, 4094]),
        ((-5, 3), [16593900, 181335, 1981]),
    ],
)
def test_frequencies_of_sizes_are_these_numbers_on_every_machine(
    arguments: tuple[int, int], literal: list[int]
) -> None:
    assert size_frequencies(*arguments).tolist() == literal


def test_bits_of_sizes_are_what_the_frequencies_charge() -> None:
    for top in (1, 2, 7, 200):
        further, first = coder.geometric(top)
        for place, decay in enumerate(DECAYS):
            charged = size_frequencies(decay, top)
            usual = np.flatnonzero(charged > 1000)  # below, the unit that each has at least counts
            expected = -np.log2(charged[usual] / TOTAL)
            assert first[place] + usual * further[place] == pytest.approx(expected, rel=2e-3, abs=1e-4)


def test_prices_are_what_the_frequencies_charge() -> None:
    table = prices(6, 3)
    assert table.shape == (64, 4)
    assert table[42, 0] == pytest.approx(-math.log2(5592408 / TOTAL))
    assert table[42].tolist() == pytest.approx([-math.log2(f / TOTAL) for f in frequencies(42, 6, 3)[3:]])


@pytest.mark.parametrize(("index", "decay", "top"), [(0, 0, 1), (40, 8, 2), (63, 31, 127), (21, 17, 7), (33, 2, 32767)])
def test_the_range_coder_uses_exactly_these_frequencies(index: int, decay: int, top: int) -> None:
    """After one symbol its interval is the table's, in units of (2^64 - 1) // 2^24."""
    table = frequencies(index, decay, top)
    below = np.concatenate([[0], np.cumsum(table)])
    unit = (2**64 - 1) >> 24
    symbols = range(len(table)) if top < 1000 else [0, 1, 7, top - 1, top, top + 1, 2 * top]
    for symbol in symbols:
        encoder = constriction.stream.queue.RangeEncoder()
        encoder.encode(np.array([symbol], np.int32), coder._categorical(table))
        words, (lower, size) = encoder.pos()
        expected_lower, expected_size = unit * int(below[symbol]), unit * int(table[symbol])
        if expected_size < 2**32:  # one word has been written and the state moved up
            expected_lower, expected_size = (expected_lower << 32) % 2**64, expected_size << 32
            assert words == 1
        assert (lower, size) == (expected_lower, expected_size)


def test_equal_and_counted_tables_reach_the_range_coder_unchanged() -> None:
    unit = (2**64 - 1) >> 24
    tables = [coder._flat_table(width) for width in range(1, 9)]
    tables += [coder._counted(np.array(c)) for c in ([0, 0], [7, 0], [1, 2, 3], [10**7, 1], [0] * 65537)]
    for table in tables:
        assert table.sum() == TOTAL
        assert table.min() >= 1
        for symbol in (0, len(table) - 1, len(table) // 3):
            encoder = constriction.stream.queue.RangeEncoder()
            encoder.encode(np.array([symbol], np.int32), coder._categorical(table))
            size = unit * int(table[symbol])
            assert encoder.pos()[1][1] == (size if size >= 2**32 else size << 32)


# -- levels


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("offset", [-64, 0, 20, 40, 55, 127])
def test_levels_come_back_for_every_range_and_activity(top: int, offset: int, rng: np.random.Generator) -> None:
    decays = DECAYS if top < 1000 else (-16, 0, 15, 31)
    for decay in decays:
        levels = draw_levels(rng, (3, 5, 3), top, 0.4)
        rows, columns, taps = (rng.integers(-32, 33, n) for n in levels.shape)
        there_and_back(levels, model_of(levels, offset, decay, rows=rows, columns=columns, taps=taps))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 1), (7, 1, 1), (2, 3, 9), (13, 11, 1), (5, 1, 4), (64, 33, 1)])
@pytest.mark.parametrize("chosen", range(8))
def test_levels_come_back_with_any_choice_of_offsets(
    shape: tuple[int, int, int], chosen: int, rng: np.random.Generator
) -> None:
    for share in (0.0, 0.05, 0.5, 1.0):
        levels = draw_levels(rng, shape, 5, share)
        names = ("rows", "columns", "taps")
        offsets = {
            name: rng.integers(-3, 4, size) if chosen >> i & 1 else None
            for i, (name, size) in enumerate(zip(names, shape, strict=True))
        }
        there_and_back(levels, model_of(levels, 38, 9, **offsets))


@pytest.mark.parametrize("top", TOPS[1:])
@pytest.mark.parametrize("context", [None, Context(3, (3, -2), (2, -1), 5)])
def test_levels_come_back_where_rows_have_decays_of_their_own(
    top: int, context: Context | None, rng: np.random.Generator
) -> None:
    levels = draw_levels(rng, (9, 5, 9), top, 0.4)
    levels[3], levels[:, 2] = 0, 0
    levels[0, 0, 0] = top
    rows, columns, taps = (rng.integers(-3, 4, n) for n in levels.shape)
    for offsets in ({}, {"rows": rows, "columns": columns, "taps": taps}):
        model = model_of(levels, 38, 0, **offsets)
        model = replace(model, decays=rng.integers(-16, 32, int(model.alive_rows.sum())), context=context)
        data = there_and_back(levels, model)
        assert 0 <= 8 * len(data) - levels_bits(levels, model) <= 64


def test_signs_come_first_and_then_the_sizes_in_order_of_their_decay(rng: np.random.Generator) -> None:
    """What `docs/format.md` promises."""
    levels = draw_levels(rng, (4, 5, 2), 3, 0.5)
    levels[:, 0, 0] = -2
    decays = np.array([9, -2, 9, 31])
    model = replace(model_of(levels, 36, 0), decays=decays)
    slow = constriction.stream.queue.RangeEncoder()
    signs = np.sign(levels).reshape(-1).astype(np.int32)
    slow.encode(signs + 1, coder._categorical(frequencies(36, 0, 1)))
    for decay in DECAYS:
        for k in levels[decays == decay].flat:
            if k:
                slow.encode(np.array([abs(k) - 1], np.int32), coder._categorical(size_frequencies(decay, 3)))
    assert there_and_back(levels, model) == slow.get_compressed().astype("<u4").tobytes()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 9), (0, 3, 1), (3, 0, 1), (0, 0, 1)])
def test_levels_that_are_all_zero_take_no_bytes(shape: tuple[int, int, int]) -> None:
    levels = np.zeros(shape, np.int64)
    assert there_and_back(levels, model_of(levels, 40, 8)) == b""


def test_more_levels_than_are_decoded_at_once_come_back(rng: np.random.Generator) -> None:
    levels = draw_levels(rng, (3, coder._CHUNK // 2 + 1, 1), 2, 0.1)
    there_and_back(levels, model_of(levels, 34, 4))
    there_and_back(levels, model_of(levels, 34, 4, rows=np.array([0, -1, 0])))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4)),
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0, 1),
    top=st.integers(1, 300),
    offset=st.integers(-64, 127),
    decay=st.integers(-16, 31),
    reach=st.integers(0, 32),
)
def test_whatever_is_written_is_read(
    shape: tuple[int, int, int], seed: int, share: float, top: int, offset: int, decay: int, reach: int
) -> None:
    rng = np.random.default_rng(seed)
    levels = draw_levels(rng, shape, top, share)
    rows, columns, taps = (rng.integers(-reach, reach + 1, n) for n in shape)
    there_and_back(levels, model_of(levels, offset, decay, rows=rows, columns=columns, taps=taps))


@pytest.mark.parametrize("top", [1, 6])
@pytest.mark.parametrize("chosen", [0, 7])
def test_levels_take_the_bytes_their_prices_say(top: int, chosen: int, rng: np.random.Generator) -> None:
    levels = draw_levels(rng, (40, 30, 9), top, 0.2)
    offsets = [rng.integers(-3, 4, n) if chosen else None for n in levels.shape]
    model = model_of(levels, 37, 10, rows=offsets[0], columns=offsets[1], taps=offsets[2])
    price = 0.0
    rows, columns = model.rows, model.columns
    for i in range(40):  # the slow way: one weight after the other
        for j in range(30):
            for t in range(9):
                index = model.offset + 2 * int(model.taps[t])
                index += 0 if rows is None or columns is None else 2 * int(rows[i] + columns[j])
                table = frequencies(min(max(index, 0), 63), 10, top)
                price -= math.log2(table[levels[i, j, t] + top] / TOTAL)
    assert 0 <= 8 * len(there_and_back(levels, model)) - price <= 64


def test_levels_are_coded_in_order_of_their_index(rng: np.random.Generator) -> None:
    """What `docs/format.md` promises: the stream equals that of a loop over all indices."""
    levels = draw_levels(rng, (4, 5, 2), 3, 0.5)
    rows, columns, taps = (rng.integers(-2, 3, n) for n in levels.shape)
    model = model_of(levels, 36, 5, rows=rows, columns=columns, taps=taps)
    slow = constriction.stream.queue.RangeEncoder()
    for index in range(64):
        for i, j, t in np.ndindex(4, 5, 2):
            if np.clip(36 + 2 * (rows[i] + columns[j] + taps[t]), 0, 63) == index:
                symbol = np.array([levels[i, j, t] + 3], np.int32)
                slow.encode(symbol, coder._categorical(frequencies(index, 5, 3)))
    assert there_and_back(levels, model) == slow.get_compressed().astype("<u4").tobytes()


def encode_like_the_page(symbols: list[tuple[NDArray[np.int64], int]]) -> list[int]:
    """Section 4.1 of `docs/format.md`: what was emitted is one long number, so that a carry takes care of itself."""
    emitted, count, low, size = 0, 0, 0, 2**64 - 1
    for table, symbol in symbols:
        scale = size // 2**24
        low += scale * int(table[:symbol].sum())
        size = scale * int(table[symbol])
        emitted, low = emitted + low // 2**64, low % 2**64
        if size < 2**32:
            emitted, count = emitted * 2**32 + low // 2**32, count + 1
            low, size = low % 2**32 * 2**32, size * 2**32
    if symbols:
        point = low + 2**32 - 1
        emitted, point = emitted + point // 2**64, point % 2**64
        emitted, count = emitted * 2**32 + point // 2**32, count + 1
        if (low + size) % 2**64 // 2**32 == point // 2**32:
            emitted, count = emitted * 2**32, count + 1
    return [emitted >> 32 * (count - 1 - i) & 0xFFFFFFFF for i in range(count)]


@pytest.mark.parametrize("length", [0, 1, 2, 5, 40, 600])
def test_the_range_coder_is_the_one_of_the_page(length: int, rng: np.random.Generator) -> None:
    tables = [frequencies(0, 0, 1), frequencies(40, 8, 2), frequencies(63, 31, 30), coder._flat_table(8)]
    for _ in range(40):
        chosen = [tables[i] for i in rng.integers(0, 4, length)]
        # the outermost symbols, over and over, are what makes carries
        symbols = [(t, int(rng.choice([0, len(t) - 1, len(t) // 2, rng.integers(len(t))]))) for t in chosen]
        encoder = constriction.stream.queue.RangeEncoder()
        for table, symbol in symbols:
            encoder.encode(np.array([symbol], np.int32), coder._categorical(table))
        assert encode_like_the_page(symbols) == encoder.get_compressed().tolist()


# -- integers, digits, masks


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 8, 9, 31, 1000])
@pytest.mark.parametrize(("low", "high"), [(0, 0), (-5, -5), (0, 1), (-3, 4), (0, 255), (-40000, 25536)])
def test_integers_come_back_and_cost_what_was_said(length: int, low: int, high: int, rng: np.random.Generator) -> None:
    for values in (rng.integers(low, high + 1, length), np.full(length, high), np.full(length, low)):
        encoder = Encoder()
        encoder.integers(values, low, high)
        data = encoder.finish()
        decoder = Decoder(data)
        assert decoder.integers(length, low, high).tolist() == values.tolist()
        decoder.finish()
        assert -1e-9 <= 8 * len(data) - integers_bits(values, low, high) <= 64


def test_integers_learn_from_the_blocks_before() -> None:
    """Blocks of 4, 4, 8, 16 …, each priced with the counts of all before and half a sighting for everything."""
    values = [0, 0, 1, 0, 2, 2, 0, 0, 0, 0]
    bits = 0.0
    for i, value in enumerate(values):
        seen = values[: 0 if i < 4 else 4 if i < 8 else 8]
        bits -= math.log2((seen.count(value) + 0.5) / (len(seen) + 1.5))
    assert integers_bits(values, 0, 2) == pytest.approx(bits, abs=1e-5)


def test_digits_come_back_at_every_width(rng: np.random.Generator) -> None:
    for width in range(1, 33):
        values = rng.integers(1 << (width - 1), 1 << width, 9)
        values[:2] = 1 << (width - 1), (1 << width) - 1
        assert coder._widths(values).tolist() == [width] * 9
        encoder = Encoder()
        encoder.digits(values, coder._widths(values))
        data = encoder.finish()
        decoder = Decoder(data)
        assert decoder.digits(coder._widths(values)).tolist() == values.tolist()
        decoder.finish()
        assert 0 <= 8 * len(data) - 9 * (width - 1) <= 64
    mixed = np.array([1, 2**31, 3, 70000, 1, 256, 255, 65535])
    encoder = Encoder()
    encoder.digits(mixed, coder._widths(mixed))
    assert Decoder(encoder.finish()).digits(coder._widths(mixed)).tolist() == mixed.tolist()


def masks() -> list[NDArray[np.bool_]]:
    rng = np.random.default_rng(1)
    found = [np.zeros(0, bool)]
    for length in (1, 2, 3, 17, 1000):
        found += [np.zeros(length, bool), np.ones(length, bool), np.arange(length) % 2 == 0, rng.random(length) < 0.3]
        found += [np.arange(length) < length // 3, np.arange(length) // 40 % 2 == 1]
    for length in (65535, 65536, 65537, 200000):  # around the longest run
        found += [np.ones(length, bool), np.arange(length) > 5, np.arange(length) == 65535]
    return found


@pytest.mark.parametrize("mask", masks(), ids=lambda m: f"{m.sum()}of{len(m)}")
def test_masks_come_back_and_cost_what_was_said(mask: NDArray[np.bool_]) -> None:
    encoder = Encoder()
    encoder.mask(mask)
    data = encoder.finish()
    decoder = Decoder(data)
    assert np.array_equal(decoder.mask(len(mask)), mask)
    decoder.finish()
    assert -1e-9 <= 8 * len(data) - mask_bits(mask) <= 64


def test_long_runs_are_cheap() -> None:
    mask = np.arange(4096) // 1000 % 2 == 0
    assert mask_bits(mask) < 0.03 * integers_bits(mask, 0, 1) + 100
    assert mask_bits(np.ones(60000, bool)) < 64


# -- damage


def test_an_odd_length_is_refused() -> None:
    with pytest.raises(FormatError, match="expected a whole number of 32-bit words, found 7 bytes"):
        Decoder(b"1234567")


def read_to_the_end(data: bytes, shape: tuple[int, int, int], model: LevelModel) -> None:
    decoder = Decoder(data)
    decoder.levels(shape, model)
    decoder.finish()


def test_words_left_over_and_words_missing_are_refused(rng: np.random.Generator) -> None:
    levels = draw_levels(rng, (20, 20, 1), 3, 0.5)
    model = model_of(levels, 38, 8)
    data = there_and_back(levels, model)
    for damaged in (data + b"\1\2\3\4" * 2, data + data, data[4:], b""):
        with pytest.raises(FormatError, match=r"entropy-coded part: "):
            read_to_the_end(damaged, levels.shape, model)
    left = Decoder(b"\0\0\0\0" * 3)
    with pytest.raises(FormatError, match="its length is not that of its contents"):
        left.finish()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.binary(max_size=64), length=st.integers(0, 300))
def test_damaged_bytes_give_values_in_range_or_an_error(data: bytes, length: int) -> None:
    data = data[: len(data) // 4 * 4]
    model = LevelModel(40, 9, 5, np.ones(3, bool), np.ones(4, bool), None, np.arange(4), np.zeros(2, np.int64))
    with contextlib.suppress(FormatError):
        decoder = Decoder(data)
        assert len(decoder.mask(length)) == length
        values = decoder.integers(length, -7, 90)
        assert values.min(initial=0) >= -7
        assert values.max(initial=0) <= 90
        assert np.abs(decoder.levels((3, 4, 2), model)).max() <= 5
        decoder.finish()


@pytest.mark.parametrize("module", ["coder", "container"])
def test_decoding_needs_no_torch(module: str) -> None:
    """Without the package's front door, which brings in training, these modules live on numpy and constriction."""
    program = (
        "import sys, types, importlib\n"
        "sys.modules['torch'] = None\n"
        f"package = types.ModuleType('selfcompress'); package.__path__ = [{str(SOURCES)!r}]\n"
        "sys.modules['selfcompress'] = package\n"
        f"importlib.import_module('selfcompress.{module}')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
