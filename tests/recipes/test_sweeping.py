"""A sweep: how gammas are spread, that processes share its runs, what is picked, and that it goes on after a stop."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from selfcompress import scoring
from selfcompress.errors import CheckpointError, NonFiniteError, OutputError, UsageError
from selfcompress.recipes import run_folder, sweeping, training
from selfcompress.recipes.datasets import load_dataset
from selfcompress.recipes.recipe import Recipe
from selfcompress.reporting import Point, pareto_front

optuna = pytest.importorskip("optuna", reason="sweeps need the optional Optuna")

SMALL = Recipe(width=16, epochs=2, batch_size=256, lr=5e-3, augment=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sweeping.Sweep]:
    folder = tmp_path_factory.mktemp("sweep")
    return folder, sweeping.sweep(replace(SMALL, validation=200), folder, runs=3, gamma_from=0.2, gamma_to=20)


def test_every_point_is_a_run_with_its_file(finished: tuple[Path, sweeping.Sweep]) -> None:
    folder, found = finished
    assert [point.number for point in found.points] == [0, 1, 2]
    assert [point.gamma for point in found.points] == pytest.approx([0.2, 20, 2])
    held_out = load_dataset("digits", validation=200)
    for point in found.points:
        assert Path(point.folder) == folder / f"run-00{point.number}"
        assert training.read_recipe(point.folder).gamma == point.gamma
        file = Path(point.folder) / "net.scn"
        score = scoring.score_file(
            file, training.build_for(held_out, SMALL.network, SMALL.width), held_out.test_batches(100)
        )
        assert (file.stat().st_size, score.accuracy) == (point.file_bytes, point.accuracy)
    assert (found.scored_on, found.unfinished, found.failed) == ("validation", 0, ())
    assert json.loads((folder / "points.json").read_text()) == json.loads(json.dumps(asdict(found)))


def test_a_sweep_goes_on_and_leaves_finished_runs_alone(finished: tuple[Path, sweeping.Sweep], tmp_path: Path) -> None:
    recipe, url = replace(SMALL, epochs=1), f"sqlite:///{tmp_path / 'a.db'}"
    two = sweeping.sweep(recipe, tmp_path, runs=2, storage=url)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run-*/*")}
    assert sweeping.sweep(recipe, tmp_path, runs=2, storage=url) == two
    three = sweeping.sweep(recipe, tmp_path, runs=3, storage=url)
    assert three.points[:2] == two.points
    assert len(three.points) == 3
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_gammas_fill_every_gap_evenly_on_a_logarithmic_scale() -> None:
    assert [sweeping.spread(number) for number in range(9)] == [0, 1, 1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]
    for power in range(1, 8):
        numbers = sorted(sweeping.spread(number) for number in range(2**power + 1))
        assert numbers == [i / 2**power for i in range(2**power + 1)]


WORKER = """
import sys
from dataclasses import replace
from selfcompress.recipes import sweeping
from selfcompress.recipes.recipe import Recipe
recipe = Recipe(width=16, epochs=int(sys.argv[4]), batch_size=256, lr=5e-3, augment=False)
sweeping.sweep(recipe, sys.argv[1], runs=int(sys.argv[2]), storage=sys.argv[3] or None)
"""


def worker(folder: Path, runs: int, storage: str = "", epochs: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(runs), storage, str(epochs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def trials_of(url: str) -> list[Any]:
    return optuna.load_study(study_name=SMALL.label, storage=url).get_trials()


def test_two_processes_share_a_study_and_no_run_is_made_twice(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    workers = [worker(tmp_path / name, 7, url) for name in ("a", "b")]
    for process in workers:
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
    complete = [t for t in trials_of(url) if t.state == optuna.trial.TrialState.COMPLETE]
    assert len(complete) == 7
    files = [path.parent.name for path in tmp_path.glob("*/run-*/net.scn")]
    assert len(files) == 7
    assert set(Counter(files).values()) == {1}
    assert len({t.params["gamma"] for t in complete}) == 7
    assert all((tmp_path / name).glob("run-*") for name in ("a", "b"))


def test_a_run_whose_process_was_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    process = worker(tmp_path, 1, epochs=400)
    checkpoint = tmp_path / "run-000" / run_folder.CHECKPOINT
    deadline = time.monotonic() + 120
    while not (checkpoint.exists() and len(run_folder.read_checkpoint(checkpoint)["records"]) >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = len(run_folder.read_checkpoint(checkpoint)["records"])

    seen: list[int] = []

    def on_part(title: str, epochs: int) -> tuple[training.OnEpoch, training.OnStep]:
        def on_step(epoch: int, step: int, steps: int) -> None:
            seen.append(epoch)
            raise KeyboardInterrupt  # it would take long

        return lambda record: None, on_step

    with pytest.raises(training.Interrupted):
        sweeping.sweep(replace(SMALL, epochs=400), tmp_path, runs=1, on_part=on_part)
    assert seen == [done + 1]
    assert [path.name for path in tmp_path.glob("run-*")] == ["run-000"]


def test_a_stopped_run_is_finished_by_the_next_call_in_its_own_folder(tmp_path: Path) -> None:
    def on_part(title: str, epochs: int) -> tuple[None, training.OnStep]:
        def on_step(epoch: int, step: int, steps: int) -> None:
            if title.startswith("run 1") and epoch == 2:
                raise KeyboardInterrupt

        return None, on_step

    with pytest.raises(training.Interrupted):
        sweeping.sweep(SMALL, tmp_path / "parts", runs=3, on_part=on_part)
    parts = sweeping.sweep(SMALL, tmp_path / "parts", runs=3)
    whole = sweeping.sweep(SMALL, tmp_path / "whole", runs=3)
    assert {p.gamma: (p.file_bytes, p.accuracy) for p in parts.points} == {
        p.gamma: (p.file_bytes, p.accuracy) for p in whole.points
    }
    assert {Path(p.folder).name for p in parts.points} == {"run-000", "run-001", "run-002"}


def test_a_run_without_a_number_for_a_loss_is_noted_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    true_train = training.train

    def train(*args: Any, **kwargs: Any) -> training.Result:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise NonFiniteError("epoch 1, step 1: the loss is nan\nhint: lower it")
        return true_train(*args, **kwargs)

    monkeypatch.setattr(sweeping, "train", train)
    for _ in range(2):
        found = sweeping.sweep(replace(SMALL, epochs=1), tmp_path, runs=2)
        assert [point.number for point in found.points] == [1]
        assert found.failed == ("run 0, gamma 0.1: epoch 1, step 1: the loss is nan",)
    assert calls == 2


@pytest.mark.parametrize(
    ("change", "gammas", "name"), [({"epochs": 9}, {}, "epochs"), ({}, {"gamma_to": 5.0}, "gammas")]
)
def test_a_study_of_other_runs_is_refused(
    finished: tuple[Path, sweeping.Sweep], change: dict[str, Any], gammas: dict[str, float], name: str
) -> None:
    recipe = replace(SMALL, validation=200, **change)
    with pytest.raises(CheckpointError, match=f"it was started with `{name}` = .*\nhint: "):
        sweeping.sweep(recipe, finished[0], runs=3, **{"gamma_from": 0.2, "gamma_to": 20, **gammas})


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/a.db", "mysql+nodriver://host/a"])
def test_a_database_that_cannot_be_used_is_one_clear_error(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "OPENINGS", 1)
    with pytest.raises(OutputError, match=r"the database cannot be used: .*\nhint: "):
        sweeping.sweep(SMALL, tmp_path, runs=1, storage=url)


@pytest.mark.parametrize("arguments", [{"runs": 0}, {"gamma_from": 0.0}, {"gamma_from": 3.0}, {"gamma_to": math.inf}])
def test_a_sweep_refuses_what_cannot_work(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"expected .*\nhint: "):
        sweeping.sweep(SMALL, tmp_path / "run", **{"runs": 1, **arguments})
    assert not (tmp_path / "run").exists()


def test_without_optuna_there_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"needs the package `optuna`\nhint: `pip install 'selfcompress\[sweep\]'`"):
        sweeping.sweep(SMALL, tmp_path, runs=1)


POINTS = [
    Point(number, 1.0, size, accuracy, f"run-{number}")
    for number, (size, accuracy) in enumerate(
        [(4000, 0.99), (2000, 0.97), (3000, 0.97), (1000, 0.5), (9000, 0.985), (2000, 0.96)]
    )
]


def test_the_front_is_what_no_other_point_beats() -> None:
    def beaten(a: Point, b: Point) -> bool:
        return b.file_bytes <= a.file_bytes and b.accuracy >= a.accuracy and b != a

    expected = {a.number for a in POINTS if not any(beaten(a, b) for b in POINTS)}
    assert {point.number for point in pareto_front(POINTS)} == expected == {0, 1, 3}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("accuracy >= 97", 1),
        ("accuracy>=97.5 %", 0),
        ("error <= 3.0", 1),
        (" error <= 50 ", 3),
        ("bytes <= 3999", 1),
        ("bytes <= 9000", 0),
        ("bytes <= 1000.", 3),
    ],
)
def test_the_smallest_file_that_qualifies_is_picked_or_the_most_accurate_under_a_limit(text: str, number: int) -> None:
    assert sweeping.pick(POINTS, sweeping.parse_condition(text)).number == number


@pytest.mark.parametrize("text", ["accuracy >= 99.1", "error <= 0.9", "bytes <= 999"])
def test_if_no_file_qualifies_it_is_said_how_near_they_came(text: str) -> None:
    with pytest.raises(UsageError, match=f"none of 6 files meets `{text}`: the most accurate has 99.00 % at 4,000"):
        sweeping.pick(POINTS, sweeping.parse_condition(text))
    with pytest.raises(UsageError, match="no run is finished"):
        sweeping.pick([], sweeping.parse_condition(text))


@pytest.mark.parametrize("text", ["", "accuracy", "accuracy <= 99", "bytes >= 3", "size <= 3", "accuracy >= high"])
def test_a_condition_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected a condition on accuracy, error or bytes, found .*\nhint: "):
        sweeping.parse_condition(text)


def test_the_file_that_is_handed_over_is_that_of_the_run(finished: tuple[Path, sweeping.Sweep], tmp_path: Path) -> None:
    point = finished[1].points[1]
    path = sweeping.hand_over(point, tmp_path)
    assert path == tmp_path / "best.scn"
    assert path.read_bytes() == (Path(point.folder) / "net.scn").read_bytes()
