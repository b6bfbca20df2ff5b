"""Run an exported file: a function from batches of inputs to outputs, whatever the format."""

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import FormatError
from .onnx_float import hushed, need

Runner = Callable[..., Tensor]
"""Inputs of the network -> its first output."""


def runner_of(model: nn.Module) -> Runner:
    """A network, run by torch in evaluation mode."""
    model.eval()

    def run(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return _first(model(*inputs))

    return run


def _first(outputs: Any) -> Tensor:
    while isinstance(outputs, tuple | list):
        outputs = outputs[0]
    return cast(Tensor, outputs)


def open_session(data: bytes, *, threads: int = 1) -> Any:
    """ONNX Runtime's session of a file, on the processor. Raises `UsageError` if that is not installed."""
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # a thread that spins while it waits for work takes a core from the network that is timed next
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run_onnx(data: bytes, *, threads: int = 1) -> Runner:
    """An ONNX file, run by ONNX Runtime on the processor. Raises `UsageError` if that is not installed."""
    session = open_session(data, threads=threads)
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        arrays = {name: x.contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return run


def run_file(path: str | os.PathLike[str], model: nn.Module, *, threads: int = 1) -> Runner:
    """An exported file of any kind, told by its ending and its first bytes.

    Args:
        path: the file.
        model: what it was made from; a file of safetensors is filled into a copy of it.
        threads: of ONNX Runtime; torch has its own setting.

    Raises `FormatError` for a file that none of the formats' own libraries reads.
    """
    data = Path(path).read_bytes()
    try:
        if data[:2] == b"PK":
            # torch asks for this ending
            with tempfile.TemporaryDirectory() as folder, hushed():
                named = Path(folder) / "network.pt2"
                named.write_bytes(data)
                return runner_of(_NoModes(torch.export.load(named).module()))
        if data[8:9] == b"{":
            twin = copy.deepcopy(model)
            twin.load_state_dict(need("safetensors.torch").load(data))
            return runner_of(twin)
        return run_onnx(data, threads=threads)
    except (RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"`{path}`: cannot be run: {str(error).splitlines()[0]}") from error


class _NoModes(nn.Module):
    """A loaded program, which refuses to be asked for evaluation mode: it is always in that."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self._run = program.forward

    def forward(self, *inputs: Tensor) -> Any:
        return self._run(*inputs)
