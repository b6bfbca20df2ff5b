"""A compressed network for other programs: ONNX in float and in int8, torch's own formats; see `docs/export.md`.

`export` makes a file of any kind, `check_export` runs it again against what it was made from, `compare_latency` and
`measure_latency` time networks and files in one interleaved run.
"""

from .checking import Check as Check
from .checking import check_export as check_export
from .checking import sample as sample
from .comparing import Compared as Compared
from .comparing import compare_export as compare_export
from .comparing import compare_latency as compare_latency
from .export import KINDS as KINDS
from .export import ROUNDING as ROUNDING
from .export import Exported as Exported
from .export import Kind as Kind
from .export import export as export
from .export import onnx_files as onnx_files
from .export import pad as pad
from .latency import Latency as Latency
from .latency import measure_latency as measure_latency
from .memory import Peak as Peak
from .memory import measure_memory as measure_memory
from .padding import pad_channels as pad_channels
from .source import Levels as Levels
from .source import Source as Source
from .source import open_source as open_source
