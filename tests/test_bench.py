"""The bench of trainings: it can be cut at any time, and a row is what its file is."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCH = str(Path(__file__).parent.parent / "bench")
sys.path.insert(0, BENCH)
try:
    import train
finally:
    sys.path.remove(BENCH)

ROW = "resnet9-full-3%"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows on 8 × 8 digits, with few channels."""
    for name, recipe in train.FULL.items():
        small = replace(
            recipe,
            dataset="digits",
            network="lenet-300-100",
            width=40,
            epochs=2,
            batch_size=256,
            lr=4e-3,
            compile=False,
        )
        monkeypatch.setitem(train.FULL, name, replace(small, target="9 %") if small.target else small)


def test_a_run_that_is_cut_after_every_few_steps_ends_as_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(where: str, minutes: float) -> None:
        folder = tmp_path / where
        options = f"--data-dir none --full --seeds 0 --minutes {minutes} --only {ROW}".split()
        train.main([*options, "--runs", str(folder / "runs"), "--records", str(folder / "records")])

    call("whole", 60)
    whole = json.loads((tmp_path / "whole" / "records" / f"{ROW}.json").read_text())
    assert whole["scored_on"] == "test"
    assert whole["file_bytes"]["mean"] == (tmp_path / "whole" / "runs" / f"{ROW}-0" / "net.scn").stat().st_size

    steps = [0]

    def tick() -> int:
        steps[0] += 1
        return steps[0]

    monkeypatch.setattr(train, "minutes_now", tick)  # a clock that ticks at every look, after each of 6 steps an epoch
    for _ in range(4):
        steps[0] = 0
        call("cut", 8)
    capsys.readouterr()
    record = tmp_path / "cut" / "records" / f"{ROW}.json"
    assert record.exists()
    assert (tmp_path / "cut" / "runs" / f"{ROW}-0" / "net.scn").read_bytes() == (
        tmp_path / "whole" / "runs" / f"{ROW}-0" / "net.scn"
    ).read_bytes()


def test_several_trainings_at_once_give_what_they_give_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCH)  # for the processes

    def call(where: str, jobs: int) -> dict[str, object]:
        options = f"--data-dir none --full --only resnet9-full-float --seeds 1 0 --jobs {jobs}".split()
        train.main([*options, "--runs", str(tmp_path / where), "--records", str(tmp_path / where)])
        record = json.loads((tmp_path / where / "resnet9-full-float.json").read_text())
        return {"seeds": [r["recipe"]["seed"] for r in record["runs"]], "loss": record["loss"]}

    alone = call("alone", 1)
    assert alone["seeds"] == [0, 1]
    assert call("together", 2) == alone


def test_every_row_can_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(train, "minutes_now", lambda: float(next(clock)))
    for row in train.FULL:
        options = f"--data-dir none --full --seeds 0 --minutes 0 --only {row}".split()
        train.main([*options, "--runs", str(tmp_path / "runs"), "--records", str(tmp_path / "records")])
        assert f"{row} 0: stopped in epoch 1; the same command goes on" in capsys.readouterr().out


def test_a_row_with_settings_of_its_own_is_named_by_them() -> None:
    assert train.named("lenet5-code-length", {}) == "lenet5-code-length"
    changes = {"gamma": 2.4, "teacher": "/somewhere/run"}
    assert train.named("lenet5-code-length", changes) == "lenet5-code-length-gamma2.4-teacher"
    assert train.named("lenet5-code-length", {"target": "1500 B"}) == "lenet5-code-length-target1500B"
