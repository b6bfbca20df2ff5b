"""The same integer levels through our coder, the ISO standard's and general compressors: bytes, and seconds each way.

    python bench/coders.py runs/mnist/*/net.scn runs/mnist/*/net.f32 --out bench/records/coders.json

Sources: the levels of `.scn` files, as they were trained; the weights of float runs, rounded to 8 and to 4 bits per
output channel; and random matrices of two million weights at the densities of `packing_speed.py`, on which nothing but
arithmetic takes time. Every coder gets the same integers, knows their shapes and nothing else, and is timed in seconds
of the processor, as the median of several rounds. What it decodes must equal what it was given.

- `ours`: the levels part of a `.scn` file (masks, model and levels, coded as there; no names, exponents or checksum),
  with the fitting of the model in the time.
- `nncodec`: ISO/IEC 15938-17 (Neural Network Coding), the entropy coder DeepCABAC of Fraunhofer's own implementation,
  with its default settings; one stream for all tensors, without the standard's headers. Only its calls are timed. The
  integers go in directly, so that nothing is rounded; dependent quantisation would be a choice of other levels.
- `nncodec plain`: the same without the encoder's search for the best adaptation rates (`param_opt`), which is faster.
- `xz`, `zstd`, `zlib` at their strongest usual levels, on 8-bit integers, or 16-bit ones where levels do not fit.

`pip install --target FOLDER --no-deps nncodec zstandard`, and FOLDER in PYTHONPATH; what is missing is left out, and
the record says why. Of nncodec its compiled coder alone is loaded: the package around it wants a dozen others.
"""

import argparse
import importlib.util
import json
import lzma
import math
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from packing_speed import DENSITIES
from selfcompress.coder import Decoder, Encoder, LevelModel
from selfcompress.container import VERSION, LevelTensor, read, read_file
from selfcompress.contexts import Context
from selfcompress.fitting import fit_levels
from selfcompress.heading import HeaderReader, write_header
from selfcompress.recipes.datasets import SAMPLES
from selfcompress.recipes.networks import build_network
from selfcompress.scoring import describe_machine, describe_versions, file_bytes, load_float
from selfcompress.wire import Field, Writer

Levels = NDArray[np.int16]
Shape = tuple[int, ...]

RANDOM_SHAPE = (1024, 2048, 1)
ROUNDS_S = 4.0
"""No further round of a coder is begun after so many seconds."""


@dataclass(frozen=True)
class Source:
    name: str
    tensors: list[Levels]
    """Each (rows, columns, taps)."""
    file_bytes: int | None = None
    """Of the `.scn` file that the levels are from."""


@dataclass(frozen=True)
class Coder:
    encode: Callable[[list[Levels]], bytes]
    decode: Callable[[bytes, list[Shape]], list[NDArray[Any]]]


def encode_ours(tensors: list[Levels]) -> bytes:
    header, later = Writer(), list[Callable[[Encoder], None]]()
    for levels in tensors:
        model = fit_levels(torch.from_numpy(levels.reshape(levels.shape[0], -1)), levels.shape[2])
        header.uint(model.top, Field.TOP)
        if not model.top:
            continue
        lists = [model.rows, model.columns, model.taps if model.taps.any() else None, model.decays]
        header.uint(sum(1 << i for i, values in enumerate([*lists, model.context]) if values is not None), Field.FLAGS)
        header.sint(model.offset, Field.OFFSET)
        header.sint(model.decay, Field.DECAY)
        if model.context is not None:
            header.uint(model.context.pitch, Field.PITCH)
            for value in (*model.context.bases, *model.context.slopes, model.context.tilt):
                header.sint(value, Field.CONTEXT)
        later += [partial(Encoder.mask, mask=model.alive_rows), partial(Encoder.mask, mask=model.alive_columns)]
        for values in lists:
            if values is not None:
                low, high = int(values.min()), int(values.max())
                header.sint(low, Field.LOWEST)
                header.uint(high - low, Field.SPAN)
                later.append(partial(Encoder.integers, values=values, low=low, high=high))
        later.append(partial(Encoder.levels, levels=levels, model=model))
    stream = Encoder()
    write_header(header, stream, VERSION)
    for call in later:
        call(stream)
    return stream.finish()


def decode_ours(data: bytes, shapes: list[Shape]) -> list[NDArray[Any]]:
    stream = Decoder(data)
    header = HeaderReader(stream, len(data), VERSION)
    heads = [_read_head(header) for _ in shapes]
    result = []
    for (rows, columns, taps), head in zip(shapes, heads, strict=True):
        if head is None:
            result.append(np.zeros((rows, columns, taps), np.int16))
            continue
        alive = stream.mask(rows), stream.mask(columns)
        lengths = (int(alive[0].sum()), int(alive[1].sum()), taps, int(alive[0].sum()))
        lists = [
            None if limits is None else stream.integers(n, *limits)
            for n, limits in zip(lengths, head.ranges, strict=True)
        ]
        offsets = lists[2] if lists[2] is not None else np.zeros(taps, np.int64)
        model = LevelModel(
            head.offset, head.decay, head.top, *alive, lists[0], lists[1], offsets, head.context, lists[3]
        )
        result.append(stream.levels((rows, columns, taps), model))
    stream.finish()
    return result


@dataclass(frozen=True)
class _Head:
    """Of a matrix what the header says."""

    top: int
    offset: int
    decay: int
    context: Context | None
    ranges: list[tuple[int, int] | None]


def _read_head(header: HeaderReader) -> _Head | None:
    top = header.uint("top", field=Field.TOP)
    if not top:
        return None
    flags = header.uint("flags", field=Field.FLAGS)
    offset, decay = header.sint("offset", 128, Field.OFFSET), header.sint("decay", 64, Field.DECAY)
    context = None
    if flags >> 4:
        pitch = header.uint("pitch", field=Field.PITCH)
        numbers = [header.sint("context", 64, Field.CONTEXT) for _ in range(5)]
        context = Context(pitch, (numbers[0], numbers[1]), (numbers[2], numbers[3]), numbers[4])
    ranges: list[tuple[int, int] | None] = []
    for i in range(4):
        low = header.sint("range", 64, Field.LOWEST) if flags >> i & 1 else None
        ranges.append(None if low is None else (low, low + header.uint("range", field=Field.SPAN)))
    return _Head(top, offset, decay, context, ranges)


def load_cabac() -> Any:
    """The compiled coder of `nncodec`, without the package around it. Raises `ImportError`."""
    for folder in sys.path:
        for path in Path(folder, "nncodec", "extensions").glob("deepCABAC*.so"):
            spec = importlib.util.spec_from_file_location("deepCABAC", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ImportError("no nncodec/extensions/deepCABAC*.so in PYTHONPATH")


def cabac_coder(cabac: Any, *, search: bool) -> Coder:
    """DeepCABAC as `nncodec.nn.encode` sets it: 11 unary flags, the second edition's profile, zero rows skipped."""
    unary, profile = 11, 1
    no_history = (cabac.HdspMode.AlwaysOff, np.zeros(2, np.int8))
    whole = (0, 0)  # not a codebook

    def encode(tensors: list[Levels]) -> bytes:
        encoder = cabac.Encoder()
        for levels in tensors:
            matrix = np.ascontiguousarray(levels.reshape(levels.shape[0], -1), np.int32)
            zero_rows = (~matrix.any(1)).astype(np.int32)
            encoder.initCtxModels(unary, int(search))
            encoder.encodeLayer(matrix, 0, 0, profile, 0, 1, zero_rows, *no_history, *whole)
        return bytes(encoder.finish().tobytes())

    def decode(data: bytes, shapes: list[Shape]) -> list[NDArray[Any]]:
        decoder, result = cabac.Decoder(), []
        decoder.setStream(np.frombuffer(data, np.uint8).copy())
        for shape in shapes:
            matrix = np.zeros((shape[0], math.prod(shape[1:])), np.int32)
            decoder.initCtxModels(unary)
            decoder.decodeLayer(matrix, 0, 0, profile, 0, *no_history, *whole)
            result.append(matrix.reshape(shape))
        decoder.finish()
        return result

    return Coder(encode, decode)


def general_coder(compress: Callable[[bytes], bytes], decompress: Callable[[bytes], bytes]) -> Coder:
    def encode(tensors: list[Levels]) -> bytes:
        dtype = f"<i{integer_bytes(tensors)}"
        return compress(b"".join(levels.astype(dtype).tobytes() for levels in tensors))

    def decode(data: bytes, shapes: list[Shape]) -> list[NDArray[Any]]:
        raw = decompress(data)
        starts = np.cumsum([0, *(math.prod(shape) for shape in shapes)])
        flat = np.frombuffer(raw, f"<i{len(raw) // starts[-1]}")
        return [flat[a : a + math.prod(shape)].reshape(shape) for a, shape in zip(starts, shapes, strict=False)]

    return Coder(encode, decode)


def integer_bytes(tensors: list[Levels]) -> int:
    return 1 if all(levels.min(initial=0) >= -128 and levels.max(initial=0) <= 127 for levels in tensors) else 2


def available() -> tuple[dict[str, Coder], dict[str, str]]:
    """All coders that can be had here, and why the others cannot."""
    coders, missing = {"ours": Coder(encode_ours, decode_ours)}, {}
    try:
        cabac = load_cabac()
        coders |= {"nncodec": cabac_coder(cabac, search=True), "nncodec plain": cabac_coder(cabac, search=False)}
    except ImportError as error:
        missing["nncodec"] = str(error)
    strong = 9 | lzma.PRESET_EXTREME
    coders["xz"] = general_coder(lambda data: lzma.compress(data, preset=strong), lzma.decompress)
    try:
        zstd = import_module("zstandard")
        coders["zstd"] = general_coder(zstd.ZstdCompressor(level=19).compress, zstd.ZstdDecompressor().decompress)
    except ImportError as error:
        missing["zstd"] = str(error)
    coders["zlib"] = general_coder(lambda data: zlib.compress(data, 9), zlib.decompress)
    return coders, missing


def name_of(path: Path) -> str:
    """The last two folders of a run's file say which it is."""
    return "/".join(path.resolve().parts[-3:-1])


def from_file(path: Path) -> Source:
    tensors = [r.levels for r in read(read_file(path)).records if isinstance(r, LevelTensor)]
    return Source(name_of(path), [t for t in tensors if t.size], file_bytes(path))


def from_floats(path: Path, bits: int) -> Source:
    """Weights of a float run, rounded to nearest on 2^bits - 1 levels up to the largest weight of each channel."""
    recipe = json.loads((path.parent / "result.json").read_text())["recipe"]
    shape, classes = SAMPLES[recipe["dataset"]]
    network = build_network(recipe["network"], input_shape=shape, num_classes=classes, width=recipe["width"])
    load_float(path, into=network)
    top = 2 ** (bits - 1) - 1
    tensors = []
    for weight in (p.detach() for p in network.parameters() if p.ndim >= 2):
        rows = weight.reshape(weight.shape[0], weight.shape[1], -1)
        step = rows.abs().amax((1, 2), keepdim=True).clamp(min=1e-12) / top
        tensors.append((rows / step).round().numpy().astype(np.int16))
    return Source(f"{name_of(path)}, {bits} bits", tensors)


def random_source(name: str, threshold: float) -> Source:
    """Normal weights whose rows differ in scale by up to an octave."""
    rng = np.random.default_rng(0)
    scale = np.exp2(rng.uniform(-0.5, 0.5, (RANDOM_SHAPE[0], 1, 1))) * 2 * threshold
    return Source(f"random, {name}", [(rng.standard_normal(RANDOM_SHAPE) / scale).round().astype(np.int16)])


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """What `work` returns, and the median of its seconds of the processor over up to `repeats` rounds."""
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < ROUNDS_S:
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
    return result, statistics.median(seconds)


def entropy_bytes(tensors: list[Levels]) -> float:
    """What a code without contexts needs that knows how often each level occurs in each tensor, tables not counted."""
    bits = 0.0
    for levels in tensors:
        _, counts = np.unique(levels, return_counts=True)
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    return bits / 8


def measure(source: Source, coders: dict[str, Coder], repeats: int) -> dict[str, Any]:
    tensors, weights = source.tensors, sum(levels.size for levels in source.tensors)
    shapes: list[Shape] = [levels.shape for levels in tensors]
    results: dict[str, dict[str, float]] = {}
    for name, coder in coders.items():
        data, encode_s = timed(lambda coder=coder: coder.encode(tensors), repeats)  # type: ignore[misc]
        back, decode_s = timed(lambda coder=coder, data=data: coder.decode(data, shapes), repeats)  # type: ignore[misc]
        if not all(np.array_equal(a, b) for a, b in zip(back, tensors, strict=True)):
            raise SystemExit(f"{source.name}: {name} did not give the levels back")
        results[name] = {
            "bytes": len(data),
            "encode_s": encode_s,
            "decode_s": decode_s,
            "encode_levels_per_s": round(weights / encode_s),
            "decode_levels_per_s": round(weights / decode_s),
        }
    return {
        "source": source.name,
        "weights": weights,
        "nonzero": sum(int(np.count_nonzero(levels)) for levels in tensors),
        "entropy_bytes": entropy_bytes(tensors),
        "file_bytes": source.file_bytes,
        "coders": results,
    }


def compare(rows: list[dict[str, Any]], other: str) -> dict[str, Any]:
    """Our bytes and speed over those of another coder, source by source."""
    pairs = [(r["coders"]["ours"], r["coders"][other]) for r in rows]
    return {
        "bytes": {r["source"]: round(o["bytes"] / t["bytes"], 4) for r, (o, t) in zip(rows, pairs, strict=True)},
        "sources_not_larger": sum(o["bytes"] <= t["bytes"] for o, t in pairs),
        "sources": len(pairs),
        "times_faster_encoding": [round(t["encode_s"] / o["encode_s"], 2) for o, t in pairs],
        "times_faster_decoding": [round(t["decode_s"] / o["decode_s"], 2) for o, t in pairs],
    }


def print_row(row: dict[str, Any]) -> None:
    print(f"{row['source']}: {row['weights']:,} levels, {row['nonzero']:,} not zero, file {row['file_bytes']}")
    print(f"  {'entropy':<14}{row['entropy_bytes']:>12,.0f}")
    for name, r in row["coders"].items():
        speeds = (f"{r[f'{way}_levels_per_s'] / 1e6:8.2f} M/s {way[:3]}" for way in ("encode", "decode"))
        print(f"  {name:<14}{r['bytes']:>12,}  {'  '.join(speeds)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="`.scn` files, and `net.f32` of float runs")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    coders, missing = available()
    sources = [from_file(path) for path in args.files if path.suffix == ".scn"]
    sources += [from_floats(path, bits) for path in args.files if path.suffix == ".f32" for bits in (8, 4)]
    sources += [random_source(name, threshold) for name, threshold in DENSITIES.items()]
    rows = []
    for source in sources:
        rows.append(measure(source, coders, args.repeats))
        print_row(rows[-1])
    packages = {"nncodec": "nncodec", "zstd": "zstandard"}
    record = {
        "command": f"python bench/coders.py RUNS/*/net.scn RUNS/*/net.f32 --repeats {args.repeats}",
        "missing": missing,
        "ours_over": {name: compare(rows, name) for name in coders if name != "ours"},
        "sources": rows,
        "machine": describe_machine(),
        "versions": describe_versions()
        | {package: metadata.version(package) for name, package in packages.items() if name not in missing},
    }
    print(json.dumps(record["ours_over"], indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
