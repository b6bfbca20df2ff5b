"""Peak memory of an ONNX file in ONNX Runtime, measured in a process that does nothing else.

The process loads numpy and ONNX Runtime, opens the file and runs it twice; the peak of an otherwise equal process with
an empty network is taken off. What remains are the numbers of the file, ONNX Runtime's copies of them in the order
that its kernels like, and activations.
"""

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import UsageError
from .onnx_float import need

# ru_maxrss is no use on Linux: a new process starts from the peak of the one that started it
_CHILD = """
import json, sys
import numpy, onnxruntime

def peak():
    try:
        with open("/proc/self/status") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 3
inputs = {name: numpy.ones(shape, dtype) for name, (shape, dtype) in json.loads(sys.argv[2]).items()}
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for _ in range(2):
    session.run(None, inputs)
print(peak())
"""


@dataclass(frozen=True)
class Peak:
    """Memory of one network for one batch, on one thread."""

    batch: int
    peak_bytes: int
    """Beyond that of an empty network; 0 where less than the measurement tells."""


def measure_memory(data: bytes, inputs: tuple[Tensor, ...]) -> int | None:
    """Peak bytes of a process that loads and runs an ONNX file, beyond those of a process with an empty network.

    Args:
        data: the file.
        inputs: of the shapes and types to run it with; all of their numbers are 1 there.

    Returns None where the system does not tell. Raises `UsageError` for a file that ONNX Runtime does not run.
    """
    names = [value.name for value in need("onnx").load_from_string(data).graph.input]
    peak = _run(data, {n: (list(x.shape), str(x.dtype).split(".")[-1]) for n, x in zip(names, inputs, strict=True)})
    empty = _empty_peak()
    return None if peak is None or empty is None else max(0, peak - empty)


@functools.cache
def _empty_peak() -> int | None:
    helper = need("onnx").helper
    x, y = (helper.make_tensor_value_info(name, 1, [1]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "empty", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return _run(model.SerializeToString(), {"x": ([1], "float32")})


def _run(data: bytes, inputs: Mapping[str, tuple[list[int], str]]) -> int | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        path.write_bytes(data)
        command = [sys.executable, "-c", _CHILD, str(path), json.dumps(inputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return int(done.stdout)
    reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    if reason.startswith("ModuleNotFoundError: No module named 'resource'"):
        return None
    raise UsageError(f"memory: the network does not run in a process of its own: {reason}\nhint: is it whole?")
