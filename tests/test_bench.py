"""The bench of trainings: it can be cut at any time, and a row is what its file is."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = str(Path(__file__).parent.parent / "bench")
sys.path.insert(0, BENCH)
try:
    import from_trained
    import table
    import targets
    import tolerances
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


def test_the_float_row_of_a_task_teaches_its_other_rows_and_is_trained_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCH)  # for the processes

    def call(where: str, *options: str) -> None:
        rows = f"--data-dir none --full --seeds 0 --epochs 1 --only {ROW} resnet9-full-float".split()
        places = ["--runs", str(tmp_path / where), "--records", str(tmp_path / where)]
        train.main([*rows, *options, *places])

    def file_of(where: str) -> bytes:
        return (tmp_path / where / f"{ROW}-epochs1-teacher-0" / "net.scn").read_bytes()

    call("own", "--teacher", "own", "--jobs", "2")
    float_run = tmp_path / "own" / "resnet9-full-float-epochs1-0"
    record = json.loads((tmp_path / "own" / f"{ROW}-epochs1-teacher.json").read_text())
    assert record["recipe"]["teacher"] == float_run.name
    assert record["command"].endswith(f"--only {ROW} --epochs '1' --teacher 'own'")
    assert (tmp_path / "own" / "resnet9-full-float-epochs1.json").exists()
    call("named", "--teacher", str(float_run))
    assert file_of("named") == file_of("own")

    clock = itertools.count()
    monkeypatch.setattr(train, "minutes_now", lambda: float(next(clock)))
    capsys.readouterr()
    call("cut", "--teacher", "own", "--minutes", "3")  # no teacher yet, nobody to be taught
    assert capsys.readouterr().out.strip() == (
        "resnet9-full-float-epochs1 0: stopped in epoch 1; the same command goes on"
    )
    monkeypatch.undo()
    assert train.float_row("lenet5-code-length") == train.float_row("lenet5-bit-depth") == "lenet5-float"
    assert train.float_row("resnet9-long-defaults") == train.float_row("resnet9-long-float") == "resnet9-long-float"
    assert train.float_row("vgg16-100kB") == "resnet9-full-float"
    assert all(train.float_row(row) in train.ROWS | train.FULL for row in train.ROWS | train.FULL)


def test_a_row_with_settings_of_its_own_is_named_by_them() -> None:
    assert train.named("lenet5-code-length", {}) == "lenet5-code-length"
    changes = {"gamma": 2.4, "teacher": "/somewhere/run"}
    assert train.named("lenet5-code-length", changes) == "lenet5-code-length-gamma2.4-teacher"
    assert train.named("lenet5-code-length", {"target": "1500 B"}) == "lenet5-code-length-target1500B"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of two epochs on digits, in processes that find the scripts."""
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setitem(targets.TASKS, "digits", replace(targets.TASKS["digits"], width=40, epochs=2, batch_size=256))
    monkeypatch.setitem(targets.GAMMAS, "digits", (0.1, 2.0))


def options_of(folder: Path, jobs: int) -> list[str]:
    places = ["--runs", str(folder / "runs"), "--records", str(folder / "records")]
    return ["--data-dir", "none", "--only", "digits", "--seeds", "1", "0", "--jobs", str(jobs), *places]


def test_targets_are_compared_with_the_curve_of_their_own_seed_however_many_run_at_once(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(where: str, jobs: int) -> dict[str, Any]:
        targets.main([*options_of(tmp_path / where, jobs), "--targets", "25 %"])
        return json.loads((tmp_path / where / "records" / "targets.json").read_text())["digits"]

    alone = call("alone", 1)
    assert [r["seed"] for r in alone["targets"]] == [1, 0]
    assert [(r["seed"], r["gamma"]) for r in alone["fixed"]] == [(1, 0.1), (1, 2.0), (0, 0.1), (0, 2.0)]
    for r in alone["targets"]:
        curve = sorted((f["file_bytes"], f["accuracy"]) for f in alone["fixed"] if f["seed"] == r["seed"])
        inside = curve[0][0] <= r["file_bytes"] <= curve[1][0]
        expected = pytest.approx(
            np.interp(np.log(r["file_bytes"]), np.log([b for b, _ in curve]), [a for _, a in curve])
        )
        assert r["fixed_gamma_accuracy"] == (expected if inside else None)
    assert any(r["fixed_gamma_accuracy"] is not None for r in alone["targets"])
    assert call("together", 2) == alone

    monkeypatch.delattr(targets, "train")  # what is done is not done again
    assert call("alone", 1) == alone


def test_the_table_of_targets_has_means_and_spreads_over_seeds() -> None:
    rows = [
        {"target": "5 %", "target_bytes": 2000, "file_bytes": size, "share_of_target": size / 2000, "met": size <= 2000,
         "accuracy": accuracy, "fixed_gamma_accuracy": fixed}
        for size, accuracy, fixed in ((1990, 0.97, 0.98), (1970, 0.96, None), (2010, 0.95, 0.97))
    ]  # fmt: skip
    assert targets.table({"digits": {"targets": rows}}).splitlines()[-1] == (
        "| digits | 5 % | 2,000 | 1,990 ± 20 | 0.985 … 1.005 | 2 of 3 | 96.00 ± 1.00 | 97.50 ± 0.71 | -1.50 ± 0.71 |"
    )


def test_a_row_of_the_table_says_the_settings_that_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "RECORDS", tmp_path)
    for name, target in (
        ("lenet5-diffq", None),
        ("lenet5-diffq-40", None),
        ("lenet5-prune-4bit-0.7", None),
        ("lenet5-code-length-gamma3.2-epochs100", None),
        ("lenet5-code-length-target0.5%-teacher", "0.5%"),
        ("lenet5-69kB", "69 kB"),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"recipe": {"target": target}}))
    assert {m: [said for said, _ in table.records("lenet5", m)] for m in ("diffq", "prune-4bit", "code-length")} == {
        "diffq": ["", "penalty 40"],
        "prune-4bit": ["cut 0.7"],
        "code-length": ["target 0.5%, teacher", "target 69 kB", "γ = 3.2, epochs 100"],
    }


def test_tolerances_are_searched_from_the_float_network_of_their_seed(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(where: str, jobs: int, *searched: str) -> dict[str, Any]:
        tolerances.main([*options_of(tmp_path / where, jobs), "--tolerances", *searched])
        return json.loads((tmp_path / where / "records" / "tolerances.json").read_text())["digits"]

    together = call("together", 2, "80", "20")
    assert [(r["seed"], r["tolerance"]) for r in together["tolerances"]] == [(1, 20), (1, 80), (0, 20), (0, 80)]
    for r in together["tolerances"]:
        folder = tmp_path / "together" / "runs"
        assert r["file_bytes"] == (folder / f"digits-{r['tolerance']:g}-{r['seed']}" / "net.scn").stat().st_size
        of_float = json.loads((folder / f"digits-float-{r['seed']}" / "result.json").read_text())
        assert r["float_score"] == of_float["score"]
        assert of_float["recipe"]["validation"] > 0
    assert "2 of 2" in capsys.readouterr().out
    alone = call("alone", 1, "80")["tolerances"]  # not along the trunk of another tolerance
    assert alone == [r for r in together["tolerances"] if r["tolerance"] == 80]
    for r in alone:
        metrics = (tmp_path / "alone" / "runs" / f"digits-80-{r['seed']}").rglob("metrics.jsonl")
        assert r["epochs_trained"] == sum(len(path.read_text().splitlines()) for path in metrics)

    monkeypatch.delattr(tolerances, "find_smallest")
    monkeypatch.delattr(tolerances, "train_float")
    assert call("together", 1, "20", "80") == together


def test_a_trained_network_is_scored_before_any_step_and_compressed_in_a_tenth_of_its_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(from_trained.TASKS["digits"], width=40, epochs=20, batch_size=256)
    monkeypatch.setitem(from_trained.TASKS, "digits", recipe)

    def call() -> dict[str, Any]:
        from_trained.main([*options_of(tmp_path, 1), "--targets", "20 %"])
        return json.loads((tmp_path / "records" / "from_trained.json").read_text())["digits"]

    entry = call()
    assert [r["seed"] for r in entry["rows"]] == [1, 0]
    for r in entry["rows"]:
        folder = tmp_path / "runs" / f"digits-20%-{r['seed']}"
        (found,) = r["compressed"]
        assert found["file_bytes"] == (folder / "net.scn").stat().st_size <= 0.2 * r["float_bytes"]
        assert found["epochs"] == len((folder / "metrics.jsonl").read_text().splitlines()) == 2
        of_float = json.loads((tmp_path / "runs" / f"digits-float-{r['seed']}" / "result.json").read_text())
        assert r["float"] == of_float["summary"]["accuracy"]
        assert 0.5 < r["attached"] == pytest.approx(r["float"], abs=0.02)  # one step of training moves it further
    monkeypatch.delattr(from_trained, "train")
    monkeypatch.delattr(from_trained, "train_float")
    assert call() == entry
