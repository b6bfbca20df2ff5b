"""Neural networks that shrink while they train, and the small file they become.

compressor = SelfCompressor(model, example_inputs, gamma=0.5)     # attach
... compressor.penalty() in the loss, compressor.step(optimizer) after each step ...
save(model, "net.scn")                                            # as many bytes as the loss said
load("net.scn", into=model_code())                                # a plain, small network
export("net.scn", "net.onnx", to="onnx", ...)                     # for other programs
"""

from . import errors as errors
from .compressor import SelfCompressor as SelfCompressor
from .compressor import Size as Size
from .compressor import StepReport as StepReport
from .converting import restore as restore
from .costs import ActivationMemory as ActivationMemory
from .costs import BitOperations as BitOperations
from .costs import Cost as Cost
from .costs import Latency as Latency
from .costs import Macs as Macs
from .costs import Weights as Weights
from .costs import read_cost as read_cost
from .distilling import distillation_loss as distillation_loss
from .explaining import Explanation as Explanation
from .explaining import explain as explain
from .exporting import Exported as Exported
from .exporting import export as export
from .measuring import measure_table as measure_table
from .packing import FileSummary as FileSummary
from .packing import TensorSummary as TensorSummary
from .packing import inspect as inspect
from .packing import load as load
from .packing import save as save
from .replaying import ReplayedStep as ReplayedStep

__version__ = "0.1.0"
__all__ = [
    "ActivationMemory",
    "BitOperations",
    "Cost",
    "Explanation",
    "Exported",
    "FileSummary",
    "Latency",
    "Macs",
    "ReplayedStep",
    "SelfCompressor",
    "Size",
    "StepReport",
    "TensorSummary",
    "Weights",
    "distillation_loss",
    "errors",
    "explain",
    "export",
    "inspect",
    "load",
    "measure_table",
    "read_cost",
    "restore",
    "save",
]
