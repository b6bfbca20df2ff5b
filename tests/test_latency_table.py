"""Times between those that were measured, and tables as files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from selfcompress.errors import DataError
from selfcompress.latency_table import LatencyTable, LayerTimes, read_table
from selfcompress.workload import Operator

TIMES = LayerTimes((1, 4, 10), (2, 6), ((1.0, 3.0), (2.0, 8.0), (5.0, 9.0)))
OPERATOR = Operator("convolution", (8, 8), (3, 3), (1, 1), (0, 0), (1, 1), 2, True)


def at(inputs: float, outputs: float) -> float:
    return float(TIMES.at(*torch.tensor([inputs, outputs], dtype=torch.float64)))


def test_what_was_measured_is_read_as_it_is() -> None:
    found = [[at(i, o) for o in TIMES.outputs] for i in TIMES.inputs]
    assert found == [list(row) for row in TIMES.seconds]


def test_between_them_times_are_linear_in_each_width() -> None:
    assert at(2.5, 2) == pytest.approx((1 + 2) / 2)
    assert at(4, 3) == pytest.approx(2 + 6 / 4)
    assert at(7, 4) == pytest.approx((2 + 8 + 5 + 9) / 4)


def test_outside_of_them_times_are_those_of_the_edge() -> None:
    assert at(0.2, 1) == 1.0
    assert at(50, 60) == 9.0


def test_a_single_width_has_no_slope() -> None:
    times = LayerTimes((3,), (2, 4), ((1.0, 2.0),))
    inputs, outputs = torch.tensor(3.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    times.at(inputs, outputs).backward()
    assert inputs.grad is None or inputs.grad == 0
    assert outputs.grad == pytest.approx(0.5)


@pytest.mark.parametrize(("inputs", "outputs"), [(2.2, 3.1), (5.0, 5.5), (9.9, 2.1)])
def test_the_slopes_are_those_of_differences(inputs: float, outputs: float) -> None:
    widths = torch.tensor([inputs, outputs], dtype=torch.float64, requires_grad=True)
    TIMES.at(widths[0], widths[1]).backward()
    assert widths.grad is not None
    slopes = [(at(inputs + 1e-5, outputs) - at(inputs - 1e-5, outputs)) / 2e-5]
    slopes += [(at(inputs, outputs + 1e-5) - at(inputs, outputs - 1e-5)) / 2e-5]
    assert widths.grad.tolist() == pytest.approx(slopes)


def table() -> LatencyTable:
    return LatencyTable({OPERATOR: TIMES}, 1e-5, 1.5, "onnxruntime", 1, 2, {"processor": "one"})


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table().write(tmp_path / "table.json")
    read = read_table(tmp_path / "table.json")
    assert vars(read) == vars(table()) | {"path": str(tmp_path / "table.json")}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"layers": [{}]},
        {"layers": [{"operator": {"kind": "sum"}, "inputs": [1], "outputs": [1], "seconds": [[1]]}]},
        {
            "layers": [
                {"operator": {"kind": "product", "size": [1]}, "inputs": [2, 1], "outputs": [1], "seconds": [[1]]}
            ]
        },
        {"layers": [{"operator": {"kind": "product", "size": [1]}, "inputs": [1], "outputs": [1], "seconds": [[-1]]}]},
        {"layers": [{"operator": {"kind": "product", "size": [1]}, "inputs": [1], "outputs": [1], "seconds": [[]]}]},
        {"factor": float("nan")},
        {"constant_s": "fast"},
    ],
)
def test_what_is_no_table_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table().write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="expected a table of times"):
        read_table(path)


@pytest.mark.parametrize("text", ["", "[]", "7", '{"version": 1}', "\x00"])
def test_another_file_is_refused_with_the_command_that_makes_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(DataError, match="selfcompress measure"):
        read_table(tmp_path / "table.json")
