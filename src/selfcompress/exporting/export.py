"""Write a network in one of the formats that other programs read."""

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..capturing import export_program
from ..container import write_file
from ..errors import UsageError
from .checking import sample
from .choosing import pad_for_speed
from .latency import measure_latency
from .onnx_float import need, to_onnx
from .onnx_int8 import to_int8
from .onnx_learned import to_learned_int8
from .onnx_narrow import narrow
from .onnx_nbits import to_nbits
from .padding import pad_channels
from .rewriting import sample_arrays, time_both
from .running import Runner, run_onnx, runner_of
from .source import Levels, Source, open_source
from .unrounding import unrounded

Kind = Literal["onnx", "onnx-int8", "onnx-nbits", "torch", "safetensors"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SAMPLES = 8
"""Examples that an int8 network is calibrated with when it is only timed."""
RUNS, SECONDS = 100, 0.6
"""Timed runs of each network in a comparison of widths, at most, and time for all of them."""
ROUNDING: tuple[Kind, ...] = ("onnx-int8", "onnx-nbits")
"""Kinds that round activations, so that outputs differ a little."""


@dataclass(frozen=True)
class Exported:
    """A file that `export` wrote."""

    path: Path
    kind: Kind
    size_bytes: int
    notes: tuple[str, ...] = ()
    """What stayed in float or was not padded, and why; what was timed, and whether it was taken."""


def export(
    model: nn.Module | str | os.PathLike[str] | Source,
    out: str | os.PathLike[str],
    *,
    to: Kind,
    example_inputs: tuple[Tensor, ...] | None = None,
    into: nn.Module | None = None,
    calibration: Iterable[tuple[Tensor, ...]] = (),
    multiple: int | Literal["auto"] = 1,
) -> Exported:
    """Write a network for another program.

    Args:
        model: a `.scn` file; or a network, with a `SelfCompressor` attached or plain. It is not changed.
        out: where to; written all or nothing.
        to: `onnx` (float), `onnx-int8` (weights in int8, activations in uint8), `onnx-nbits` (linear layers in 2, 4 or
            8 bits where that is faster on this machine), `torch` (a `.pt2` of torch.export) or `safetensors` (the
            state dict alone).
        example_inputs: positional arguments of the network, tensors whose axis 0 is the batch. A file with a graph
            needs none.
        into: for a file without a graph: the network as its code builds it; changed.
        calibration: for `onnx-int8`: batches of inputs, from which the ranges of activations are taken. Not needed
            where the file says how activations are rounded; the other formats leave them in float then.
        multiple: pad channels with zeros to multiples of this, >= 1; the function does not change. `auto` finds for
            each layer what is fastest on this machine, by timing it there.

    Returns:
        Where and how large the file is, and notes.

    Raises:
        UsageError: an argument is missing, or the network cannot be written in this format, or a library for it is not
            installed. FormatError: the `.scn` file. OutputError: the place cannot be written.
    """
    if to not in KINDS:
        raise UsageError(f"to: expected one of {', '.join(KINDS)}, found `{to}`\nhint: spell it as listed")
    source = model if isinstance(model, Source) else open_source(model, example_inputs=example_inputs, into=into)
    calibration = list(calibration)
    source, notes = pad(source, multiple, to, calibration)
    network = source.model if to == "onnx-int8" else unrounded(source.model)
    if network is not source.model:
        notes += ("activations are rounded in the .scn file, and not in this format",)
    if to == "safetensors":
        safetensors = need("safetensors.torch")
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in network.state_dict().items()}
        data = safetensors.save(tensors, {"format": "pt"})
    elif to == "torch":
        buffer = io.BytesIO()
        torch.export.save(export_program(network, source.example_inputs), buffer)
        data = buffer.getvalue()
    else:
        data, more = onnx_files(source, (to,), calibration)[to]
        notes += more
    write_file(out, data)
    return Exported(Path(out), to, len(data), notes)


def pad(
    source: Source, multiple: int | Literal["auto"], to: Kind, calibration: Iterable[tuple[Tensor, ...]] = ()
) -> tuple[Source, tuple[str, ...]]:
    """The source padded as `export` does it, and notes. Raises `UsageError` for a multiple that is none."""
    if multiple == "auto":
        batches = [tuple(x[:SAMPLES] for x in inputs) for inputs in calibration][:1]  # ranges do not change the time
        return pad_for_speed(source, lambda sources: _times(sources, to, batches))
    if multiple < 1:
        raise UsageError(
            f"multiple: expected a whole number of 1 or more, or `auto`, found {multiple}\nhint: 8 is usual"
        )
    return pad_channels(source, multiple) if multiple > 1 else (source, ())


def _times(sources: Sequence[Source], to: Kind, calibration: Sequence[tuple[Tensor, ...]]) -> list[float]:
    """Seconds of a batch of one on one thread, of each network in this format, one run of each in turn."""
    runners = [_runner(source, to, calibration) for source in sources]
    setups = {str(i): lambda threads, run=run: run for i, run in enumerate(runners)}
    example = sources[0].example_inputs
    found = measure_latency(
        setups, lambda batch: sample(example, batch), batches=(1,), threads=(1,), runs=RUNS, seconds=SECONDS
    )
    return [item.low_s for item in found]  # the quarter that nothing else disturbed


def _runner(source: Source, to: Kind, calibration: Sequence[tuple[Tensor, ...]]) -> Runner:
    """The network as `export` writes it, but for layers that are timed one by one."""
    network = unrounded(source.model)
    if to in ("torch", "safetensors"):
        return runner_of(network)
    if to != "onnx-int8":
        return run_onnx(to_onnx(network, source.example_inputs).SerializeToString())
    if network is not source.model:
        learned, _ = to_learned_int8(to_onnx(source.model, source.example_inputs), source.levels)
        return run_onnx(learned.SerializeToString())
    rounded, _ = to_int8(to_onnx(network, source.example_inputs), source.levels, calibration)
    return run_onnx(rounded.SerializeToString())


def onnx_files(
    source: Source, kinds: Iterable[Kind], calibration: Iterable[tuple[Tensor, ...]] = ()
) -> dict[Kind, tuple[bytes, tuple[str, ...]]]:
    """The bytes of ONNX files of one network, and notes on each: by kind. Arguments and errors as of `export`."""
    network = unrounded(source.model)
    learned = network is not source.model  # the file says how activations are rounded
    plain = to_onnx(network, source.example_inputs)
    proto, levels, notes = narrow(plain, source.levels, source.example_inputs)
    found: dict[Kind, tuple[bytes, tuple[str, ...]]] = {}
    for kind in kinds:
        result: Any = proto
        more: tuple[str, ...] = ()
        if kind == "onnx-int8" and learned:
            result, more = to_learned_int8(to_onnx(source.model, source.example_inputs), source.levels)
            found[kind] = result.SerializeToString(), more
            continue
        if kind == "onnx-int8":
            result, more = _int8(source, plain, proto, levels, list(calibration))
        elif kind == "onnx-nbits":
            result, more = to_nbits(proto, levels, source.example_inputs)
        found[kind] = result.SerializeToString(), notes + more
    return found


def _int8(
    source: Source, plain: Any, proto: Any, levels: dict[str, Levels], calibration: list[tuple[Tensor, ...]]
) -> tuple[Any, tuple[str, ...]]:
    """The network in int8 and notes: narrow if that is faster in int8, too, where a layer itself takes less time."""
    result, notes = to_int8(proto, levels, calibration)
    if levels.keys() == source.levels.keys():
        return result, notes
    other, _ = to_int8(plain, source.levels, calibration)
    inputs = sample_arrays(proto, source.example_inputs)
    before, after = time_both(other.SerializeToString(), result.SerializeToString(), inputs)
    said = f"the same in int8: {1e6 * before:.0f} to {1e6 * after:.0f} µs"
    return (result, (*notes, said)) if after < before else (other, (*notes, f"{said}, all left as it is"))
