"""Write a network in one of the formats that other programs read."""

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..capturing import export_program
from ..container import write_file
from ..errors import UsageError
from .onnx_float import need, to_onnx
from .onnx_int8 import to_int8
from .onnx_learned import find_roundings, to_learned_int8
from .padding import pad_channels
from .source import Source, open_source
from .unrounding import unrounded

Kind = Literal["onnx", "onnx-int8", "torch", "safetensors"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Exported:
    """A file that `export` wrote."""

    path: Path
    kind: Kind
    size_bytes: int
    notes: tuple[str, ...] = ()
    """What stayed in float or was not padded, and why."""


def export(
    model: nn.Module | str | os.PathLike[str] | Source,
    out: str | os.PathLike[str],
    *,
    to: Kind,
    example_inputs: tuple[Tensor, ...] | None = None,
    into: nn.Module | None = None,
    calibration: Iterable[tuple[Tensor, ...]] = (),
    multiple: int = 1,
) -> Exported:
    """Write a network for another program.

    Args:
        model: a `.scn` file; or a network, with a `SelfCompressor` attached or plain. It is not changed.
        out: where to; written all or nothing.
        to: `onnx` (float), `onnx-int8` (weights in int8, activations in uint8), `torch` (a `.pt2` of torch.export) or
            `safetensors` (the state dict alone).
        example_inputs: positional arguments of the network, tensors whose axis 0 is the batch. A file with a graph
            needs none.
        into: for a file without a graph: the network as its code builds it; changed.
        calibration: for `onnx-int8`: batches of inputs, from which the ranges of activations are taken. Not needed
            where the file says how activations are rounded; the other formats leave them in float then.
        multiple: pad channels with zeros to multiples of this, >= 1; the function does not change.

    Returns:
        Where and how large the file is, and notes.

    Raises:
        UsageError: an argument is missing, or the network cannot be written in this format, or a library for it is not
            installed. FormatError: the `.scn` file. OutputError: the place cannot be written.
    """
    if to not in KINDS:
        raise UsageError(f"to: expected one of {', '.join(KINDS)}, found `{to}`\nhint: spell it as listed")
    if multiple < 1:
        raise UsageError(f"multiple: expected a whole number of 1 or more, found {multiple}\nhint: 8 is usual")
    source = model if isinstance(model, Source) else open_source(model, example_inputs=example_inputs, into=into)
    notes: tuple[str, ...] = ()
    if multiple > 1:
        source, notes = pad_channels(source, multiple)
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
        proto = to_onnx(network, source.example_inputs)
        if to == "onnx-int8":
            learned = bool(find_roundings(proto))
            proto, more = (
                to_learned_int8(proto, source.levels) if learned else to_int8(proto, source.levels, calibration)
            )
            notes += more
        data = proto.SerializeToString()
    write_file(out, data)
    return Exported(Path(out), to, len(data), notes)
