"""Networks that other people wrote, through the check of `bench/zoo.py`: a cut finds all the dead and changes nothing.

They need torchvision, timm and transformers. `SELFCOMPRESS_ZOO` may name folders in which to look for them, separated
as in `PATH`, and `SELFCOMPRESS_ZOO_BEFORE` a module to import first. A network whose zoo is not there is skipped.
"""

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

TOLERANCE = 1e-9
REMOVABLE = {  # at least this share of the weights, and what makes the network worth a look
    "torchvision:resnet18": 1.0,  # residual sums
    "torchvision:shufflenet_v2_x0_5": 0.99,  # channels dealt out by a shuffle
    "timm:resmlp_12_224": 0.96,  # a stream without a norm, scaled by parameters (1, 1, C)
    "timm:nfnet_l0": 0.99,  # standardised weights
    "timm:levit_128s": 0.99,  # a table of positions for each head
    "transformers:gpt2": 0.99,  # weights the other way round
    "transformers:llama": 0.99,  # heads in groups, and rotated
    "transformers:t5": 0.97,  # two stacks, a shared embedding
}


@pytest.fixture(scope="module")
def zoo() -> Iterator[ModuleType]:
    """`bench/zoo.py`, with the folders of the zoos in the path."""
    spec = importlib.util.spec_from_file_location("bench_zoo", Path(__file__).parents[1] / "bench" / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    spec.loader.exec_module(module)
    sys.path[:0] = [folder for folder in os.environ.get("SELFCOMPRESS_ZOO", "").split(os.pathsep) if folder]
    if first := os.environ.get("SELFCOMPRESS_ZOO_BEFORE"):
        importlib.import_module(first)
    yield module
    sys.path[:] = before


@pytest.mark.parametrize("name", REMOVABLE)
def test_a_cut_finds_all_the_dead_and_changes_nothing(zoo: ModuleType, name: str) -> None:
    source = name.partition(":")[0]
    with warnings.catch_warnings(action="ignore"):  # theirs
        pytest.importorskip(source, reason=f"needs {source}, see SELFCOMPRESS_ZOO", exc_type=ImportError)
        record = zoo.examine(name)
    assert record["removable"] >= REMOVABLE[name]
    assert record["not_found_dead"] == 0
    assert record["parameters_left"] < 0.95
    assert max(record[key] for key in ("error_eval", "error_train", "error_reloaded")) <= TOLERANCE
