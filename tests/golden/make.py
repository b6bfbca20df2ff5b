"""The contents of the golden files. Run as a program it writes the files anew: do so only with a new format version."""

from pathlib import Path

import numpy as np

from selfcompress.coder import LevelModel
from selfcompress.container import (
    Activation,
    Contents,
    GraphRecord,
    LevelTensor,
    NormLevels,
    NormTensor,
    Number,
    RawTensor,
    ScaleLevels,
    matrix_shape,
    norm_of_levels,
    tensor_of_scales,
    write,
)
from selfcompress.contexts import Context
from selfcompress.graph import END, Axis, DType, Graph, Input, Node, Result, Stored

FOLDER = Path(__file__).parent


def _levels(
    name: str,
    levels: np.ndarray,
    shape: tuple[int, ...],
    *,
    axis: int | None = 0,
    original_shape: tuple[int, ...] | None = None,
    groups: int = 1,
    resolution: int = 4,
    exponents: list[int],
    offset: int = 40,
    decay: int = 4,
    rows: list[int] | None = None,
    columns: list[int] | None = None,
    taps: list[int] | None = None,
    context: Context | None = None,
    decays: list[int] | None = None,
) -> LevelTensor:
    transposed = groups > 1 and axis == 1
    cube = levels.reshape(matrix_shape(shape, axis, groups if transposed else 1)).astype(np.int16)
    return LevelTensor(
        name=name,
        original_shape=original_shape or shape,
        shape=shape,
        axis=axis,
        groups=groups,
        transposed=transposed,
        resolution=resolution if cube.any() else 1,
        exponents=np.array(exponents, np.int64),
        model=LevelModel(
            offset=offset,
            decay=decay,
            top=int(np.abs(cube).max(initial=0)),
            alive_rows=cube.any(axis=(1, 2)),
            alive_columns=cube.any(axis=(0, 2)),
            rows=None if rows is None else np.array(rows, np.int64),
            columns=None if columns is None else np.array(columns, np.int64),
            taps=np.array(taps or [0] * cube.shape[2], np.int64),
            context=context,
            decays=None if decays is None else np.array(decays, np.int64),
        ),
        levels=cube,
    )


def tiny() -> Contents:
    """One linear layer of four inputs and three outputs, of which one of each is dead; the one of `docs/format.md`."""
    levels = np.array([[1, 0, 0, -2], [0, 0, 0, 0], [3, -1, 0, 1]])
    bias = np.array([0.5, 0.0, -1.0], np.float16)
    weight = _levels("fc.weight", levels, (3, 4), exponents=[-9, -8], offset=42, decay=6)
    return Contents((weight, RawTensor("fc.bias", bias)), "mini")


def full() -> Contents:
    """Everything that the format knows: all kinds, flags, axes, masks of both forms, large levels."""
    k = np.arange(5 * 3 * 4)
    conv = ((k * k * 7 + k) % 11 - 5) * (k % 3 == 0)
    wide = np.zeros((3, 400), np.int64)
    wide[:, 150:260] = (np.arange(330) % 5 - 2).reshape(3, 110)
    wide[2] = 0
    deep = np.where(np.arange(2 * 3 * 2 * 3) % 4 == 1, 32767 - np.arange(36) * 300, 0)
    return Contents(
        (
            _levels(
                "conv.weight",
                conv.reshape(5, 3, 2, 2),
                (5, 3, 2, 2),
                original_shape=(8, 3, 2, 2),
                exponents=[-9, 4, -8, -31, 0],
                decay=9,
                rows=[1, 0, -3, 2, 0],
                columns=[0, -1, 4],
                taps=[0, 1, -2, 0],
            ),
            RawTensor("conv.bias", np.array([1e-3, -2.5, 7.0, 1e6, 0.1], np.float32)),
            NormTensor("norm", np.array([1, 0.5, -2], np.float16), np.array([0, 3, -0.25], np.float16)),
            NormTensor("norm2", np.array([1e8], np.float32), np.array([-1e-8], np.float32)),
            _levels(
                "wide.weight",
                wide,
                (3, 400),
                exponents=[100, -3],
                resolution=64,
                offset=-20,
                columns=None,
                rows=[9, -9],
            ),
            _levels("up.weight", deep, (6, 3, 2), axis=1, groups=2, exponents=[0, 1, 2, 3, 4, 5], offset=127, decay=31),
            _levels("emb.weight", np.array([[2, 0, 0], [1, 0, -1]]), (3, 2), axis=1, exponents=[-4, -4], decay=0),
            _levels("gone.weight", np.zeros((2, 0)), (2, 0, 3), original_shape=(4, 2, 3), groups=2, exponents=[]),
            _levels("wide.bias", np.array([0, 1, -1]), (3,), axis=None, exponents=[-7], decay=12),
            RawTensor("a", np.float64(0.1).reshape(())),
            RawTensor("b", np.array([-(2**62), 5], np.int64)),
            RawTensor("c", np.array([[-7]], np.int32)),
            RawTensor("d", np.array([300, -300], np.int16)),
            RawTensor("e", np.array([-128, 127], np.int8)),
            RawTensor("f", np.array([0, 255], np.uint8)),
            RawTensor("g", np.array([True, False])),
            RawTensor("größe", np.zeros((0, 3), np.float16)),
        ),
        "µ-net ✓",
    )


def heads() -> Contents:
    """A layer that lost one of three heads of two channels, and the number that followed."""
    levels = np.array([[1, 0], [0, -1], [2, 1], [0, 1]])
    weight = _levels("attn.qkv.weight", levels, (4, 2), original_shape=(6, 2), exponents=[-9, -8, -9, -9])
    return Contents((weight, Number("attn.num_heads", 2), Number("attn.width", 2**31)))


def _image(levels: np.ndarray, *, decay: int = 4, decays: list[int] | None = None) -> LevelTensor:
    """A layer that reads lines of 6, of which the weights of neighbours say what to expect."""
    return _levels(
        "image.weight",
        levels.reshape(4, 30),
        (4, 30),
        exponents=[-9, -8, -9, -7],
        offset=33,
        decay=decay,
        rows=[0, 1, -1, 0],
        context=Context(6, (-4, 3), (5, -6), 24),
        decays=decays,
    )


def lines() -> Contents:
    """Weights whose neighbours say what to expect: in lines of 6, in kernels of 3, and with no neighbour in reach."""
    k = np.arange(4 * 30)
    image = np.where((k // 6 + k // 3) % 4 == 0, (k // 7) % 3 - 1, 0) + 2 * (k % 37 == 5)
    kernel = np.where(np.arange(3 * 2 * 9) % 5 < 3, np.arange(54) // 9 % 3 - 1, 0)
    small = np.array([[0, 0, 0, 0], [1, -1, 0, 2], [0, 0, 0, 0]])
    return Contents(
        (
            _image(image),
            _levels(
                "kernel.weight",
                kernel.reshape(3, 2, 3, 3),
                (3, 2, 3, 3),
                original_shape=(4, 2, 3, 3),
                exponents=[1, 2, 1],
                columns=[1, -1],
                taps=[0, 1, 0, 2, 1, 0, 0, -1, 0],
                context=Context(3, (64, -64), (0, 2), -28),
            ),
            _levels("up.weight", small, (4, 3), axis=1, exponents=[3], context=Context(2**20, (0, 1), (1, 0), 0)),
        )
    )


def decays() -> Contents:
    """Rows that have a decay each: with a context, with offsets and dead rows, and all of the same."""
    k = np.arange(4 * 30)
    image = np.where((k // 6 + k // 3) % 4 == 0, ((k // 7) % 3 - 1) * (1 + k % 29 * (k // 30)), 0)
    mixed = np.array([[5, -1, 0, 300], [0, 0, 0, 0], [1, 1, 0, -1], [0, -9, 0, 2]])
    return Contents(
        (
            _image(image, decay=0, decays=[0, 12, 31, 12]),
            _levels("mixed.weight", mixed, (4, 4), exponents=[3, 3, 3], decay=0, columns=[0, 1, -1], decays=[20, 0, 9]),
            _levels("same.weight", 2 * mixed, (4, 4), exponents=[0, 0, 0], decay=0, decays=[7, 7, 7]),
        )
    )


def rare() -> Contents:
    """Levels that are rarely above one: a decay below zero, at its end, with a context, and in some rows."""
    k = np.arange(4 * 30)
    image = np.where((k // 6 + k // 3) % 4 == 0, (k // 7) % 3 - 1, 0) * np.where(k == 52, 2, 1)
    ones = np.where(np.arange(48) % 3 == 0, np.arange(48) // 12 % 2 * 2 - 1, 0)
    ones[21] = 4
    mixed = np.array([[5, -1, 0, 3], [0, 0, 0, 0], [1, 1, 0, -1], [0, -1, 0, 2]])
    return Contents(
        (
            _image(image, decay=-1),
            _levels("few.weight", ones.reshape(6, 8), (6, 8), exponents=[-9, -8, -9, -7, -9, -9], decay=-16),
            _levels("mixed.weight", mixed, (4, 4), exponents=[3, 3, 3], decay=0, decays=[8, -16, -3]),
        )
    )


def _norm(name: str, signs: list[int], exponents: list[int], step: int, shifts: list[int]) -> NormTensor:
    numbers = [np.array(values, np.int64) for values in (signs, exponents, shifts)]
    return norm_of_levels(name, NormLevels(numbers[0], numbers[1], step, numbers[2]))


def norms() -> Contents:
    """Norms in steps: of the layer before with its dead rows, of as many channels as no layer has, and odd ones."""
    k = np.arange(12 * 4)
    conv = np.where(k // 4 % 3 == 1, 0, k % 5 - 2)
    exponents = [-9, -8, -9, -7, -9, -9, -10, -9]
    scales = [1, 0, 1, 1, 0, -1, 1, 0, 1, 1, 1, 1]
    return Contents(
        (
            _norm("first", [1], [-3200], -100, [-32768]),
            _levels("conv.weight", conv.reshape(12, 4, 1, 1), (12, 4, 1, 1), exponents=exponents),
            _norm("norm", scales, [3, -7, 40, 3, 3, 2, -64, 3, 5], -6, [0, 3, -250, 9, 3, 3, 90, -3, 3, 2, 1, 0]),
            _norm("pair", [-1, -1], [3200, 3199], 100, [32768, 32767]),
            _norm("none", [0, 0, 0], [], 0, [7, 7, 7]),
            _norm("gone", [], [], 0, []),
            _norm("mixed", [1, -1, 0, 1, 1], [0, 0, 0, 0], -1, [1, -1, 0, 0, 0]),
        )
    )


def _scales(name: str, signs: list[int], exponents: list[int], *shape: int) -> RawTensor:
    return tensor_of_scales(name, ScaleLevels(np.array(signs, np.int64).reshape(shape), np.array(exponents, np.int64)))


def scales() -> Contents:
    """Vectors of scales: plain ones, of both signs, with axes of one, of zeros, none, and the ends of their ranges."""
    return Contents(
        (
            _scales("ln.weight", [1] * 10, [0, 3, -7, 0, 0, 2, 40, 0, 1, 0], 10),
            _scales("layer.scale", [1, -1, 0, 1], [-424, -420, -424], 4, 1, 1),
            _scales("zeros", [0, 0], [], 2),
            _scales("gone", [], [], 0, 3),
            _scales("ends", [-1, -1], [-3200, 3200], 2),
            _scales("one", [1], [-1]),
        )
    )


def graph() -> Contents:
    """The layer of `tiny`, a norm and a constant, with a graph that says everything that a graph can say."""
    weight, bias = tiny().records
    norm = NormTensor("norm", np.array([1, 0.5, -2], np.float16), np.array([0, 3, -0.25], np.float16))
    ramp = RawTensor(".0", np.array([0.5, 1.5, -1.0], np.float32))
    inputs = (Input("float32", (Axis(2, True), Axis(4, False))), Input("int64", (Axis(2, True),)))
    nodes = (
        Node("sym_size.int", (Result(0), 0)),
        Node("linear", (Result(0), Stored("fc.weight"), Stored("fc.bias"))),
        Node("norm", (Result(3), Stored("norm"), 1e-5)),
        Node("gelu", (Result(4), "tanh")),
        Node("+", (Result(2), 1000)),
        Node("arange.start", (1000, Result(6), DType("int64"))),
        Node("unsqueeze", (Result(7), -1)),
        Node("slice.Tensor", (Result(8), 1, None, END)),
        Node("add.Tensor", (Result(5), Stored(".0"))),
        Node("mul.Tensor", (Result(10), Result(9))),
        Node("max.dim", (Result(11), 1, False)),
        Node("getitem", (Result(12), 1)),
        Node("mean.dim", (Result(11), (-1,), True)),
    )
    return Contents(
        (weight, bias, norm, ramp, GraphRecord(Graph(inputs, nodes, (Result(14), (Result(13), Result(1))))))
    )


def rounded() -> Contents:
    """The layer of `tiny` between two activations that are rounded, and formats at the ends of their ranges."""
    weight, bias = tiny().records
    return Contents(
        (
            weight,
            bias,
            Activation("fc..in", -97, 127, True),
            Activation("fc..out", 5, 255, False),
            Activation("..in", -1600, 1, False),
            Activation("block.µ..out", 1600, 1, True),
        )
    )


CONTENTS = {
    "tiny": tiny,
    "full": full,
    "heads": heads,
    "lines": lines,
    "decays": decays,
    "rare": rare,
    "norms": norms,
    "scales": scales,
    "graph": graph,
    "rounded": rounded,
}
GOLDEN = {f"{name}{suffix}": contents for suffix in ("", "-2", "-3") for name, contents in CONTENTS.items()}
"""What is in each file, by its name: of version 1, or of the one with which it ends."""


def version(name: str) -> int:
    """The version of a golden file."""
    return int(name[-1]) if name[-2] == "-" else 1


def stored(name: str) -> bytes:
    """The bytes of a golden file."""
    return bytes.fromhex((FOLDER / f"{name}.hex").read_text())


if __name__ == "__main__":
    for file, contents in GOLDEN.items():
        text = write(contents(), version(file)).hex()
        lines = "\n".join(text[i : i + 96] for i in range(0, len(text), 96))
        (FOLDER / f"{file}.hex").write_text(lines + "\n")
