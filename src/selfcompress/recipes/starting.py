"""Trained weights to begin with: a state dict, a `.safetensors` file, or the folder of a float run.

Nothing in a file is executed: state dicts are read with torch's `weights_only`. Names and shapes must be those of the
network; what a file lacks is never made up. Left out: files that wrap the state dict in something else.
"""

import importlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, FormatError
from ..scoring import load_float
from .run_folder import FLOAT_FILE


def load_weights(path: str | os.PathLike[str], into: nn.Module) -> nn.Module:
    """Fill `into` with trained weights, and return it.

    Args:
        path: a `.pt` or `.pth` file with the state dict of the network, a `.safetensors` file, or the folder of a float
            run. Numbers are converted to the network's types. Counters, such as those of batch norm, may be missing.
        into: the network, in float, before anything is attached to it.

    Raises:
        DataError: the file is missing, damaged, of another kind, or of another network; `into` is as it was then.
    """
    path = Path(path)
    if path.is_dir():
        try:
            return load_float(path / FLOAT_FILE, into)
        except (OSError, FormatError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            raise DataError(
                f"`{path}`: expected the folder of a finished float run of this network: `{FLOAT_FILE}`: {reason}\n"
                "hint: name what `--baseline` made, such as `runs/digits-lenet-300-100/float`"
            ) from error
    readers: dict[str, Callable[[bytes], Any]] = {
        ".pt": _read_torch,
        ".pth": _read_torch,
        ".safetensors": _read_safetensors,
    }
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(
            f"`{path}`: expected a file that ends in {', '.join(f'`{suffix}`' for suffix in readers)}, "
            "or the folder of a float run\nhint: `torch.save(model.state_dict(), 'net.pt')` makes such a file"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"`{path}`: cannot be read: {error.strerror or error}\nhint: check the name") from error
    try:
        tensors = reader(data)
    except ImportError as error:
        raise DataError(
            f"`{path}`: reading it needs the package `safetensors`\n"
            "hint: `pip install safetensors`, or make a `.pt` file of the state dict"
        ) from error
    except Exception as error:  # both readers raise many kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"`{path}`: expected a state dict, found {len(data)} other bytes: {reason}\n"
            "hint: write it with `torch.save(model.state_dict(), 'net.pt')`"
        ) from error
    _check(path, tensors, into)
    into.load_state_dict(tensors, strict=False)  # strict but for counters
    return into


def _read_torch(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _read_safetensors(data: bytes) -> Any:
    return importlib.import_module("safetensors.torch").load(data)


def _check(path: Path, tensors: Any, model: nn.Module) -> None:
    """Refuse what is not the state dict of this network, by the first entry that differs."""
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        kind = type(tensors).__name__
        inside = f" with {', '.join(f'`{name}`' for name in list(tensors)[:4])}" if isinstance(tensors, dict) else ""
        raise DataError(
            f"`{path}`: expected a state dict, which holds tensors only, found a `{kind}`{inside}\n"
            "hint: write it with `torch.save(model.state_dict(), 'net.pt')`"
        )
    ours = model.state_dict()
    optional = {name for name, value in ours.items() if not value.is_floating_point()}
    for name in sorted(ours.keys() | tensors.keys()):
        expected, found = (str(tuple(t[name].shape)) if name in t else "nothing" for t in (ours, tensors))
        if expected != found and not (found == "nothing" and name in optional):
            raise DataError(
                f"`{path}`: `{name}`: expected {expected}, found {found}\n"
                "hint: train the network that the weights are of: see `--network` and `--width`"
            )
