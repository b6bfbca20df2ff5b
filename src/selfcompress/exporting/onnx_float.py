"""Network -> ONNX in float: standard operators, any batch size, batch norms folded into the convolutions before them.

torch's own exporter writes the graph; it folds a batch norm where that is exact, and leaves it where it is not.
"""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..capturing import export_program
from ..errors import UsageError

EXTRA = {
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "onnxruntime.quantization": "onnx",
    "safetensors.torch": "safetensors",
}
"""Modules that an export needs -> the extra of this package that brings them."""


def need(module: str) -> Any:
    """Import a module that not everybody has. Raises `UsageError` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"export: needs `{module}`, which cannot be imported: {error}\n"
            f"hint: pip install 'selfcompress[{EXTRA[module]}]'"
        ) from error


@contextmanager
def hushed() -> Iterator[None]:
    """Without the warnings of the exporters about their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "root", "")]
    before = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def to_onnx(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> Any:
    """A plain network as an `onnx.ModelProto` whose inputs are `input_0` …, and outputs `output_0` …

    Raises `UsageError` for a network that torch's exporters refuse, and where `onnx` or `onnxscript` is missing.
    """
    onnx = need("onnx")
    need("onnxscript")
    program = export_program(model, example_inputs)
    with hushed(), torch.no_grad():
        try:
            written = torch.onnx.export(program, dynamo=True, verbose=False)
        except Exception as error:  # whatever it finds no ONNX for
            raise UsageError(
                f"model: torch cannot export it to ONNX: {str(error).splitlines()[0]}\n"
                "hint: `--to torch` keeps torch's own operators"
            ) from error
    assert written is not None
    proto = written.model_proto
    _rename(proto)
    for node in proto.graph.node:  # the exporter's notes on the code, with its paths
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _rename(proto: Any) -> None:
    """Give inputs, outputs and their free axes names that do not depend on the network's code."""
    graph = proto.graph
    names = {value.name: f"input_{i}" for i, value in enumerate(graph.input)}
    names |= {value.name: f"output_{i}" for i, value in enumerate(graph.output) if value.name not in names}
    symbols: dict[str, str] = {}
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                symbols.setdefault(dim.dim_param, "batch" if axis == 0 else f"length_{len(symbols)}")
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = symbols[dim.dim_param]
        del value.metadata_props[:]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
