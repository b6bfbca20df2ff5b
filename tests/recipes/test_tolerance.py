"""The search for the smallest file: what it promises of the file, how it bisects, and that it goes on after a stop."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from selfcompress import scoring
from selfcompress.budget import Budget
from selfcompress.container import read, write
from selfcompress.errors import CheckpointError, DataError, UsageError
from selfcompress.recipes import run_folder, tolerance, training
from selfcompress.recipes.datasets import load_dataset
from selfcompress.recipes.recipe import Recipe
from selfcompress.recipes.starting import load_weights
from selfcompress.reporting import Attempt, EpochRecord

SMALL = Recipe(width=20, epochs=6, batch_size=160, lr=1e-2, augment=False, validation=300)
POINTS = 6.0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tolerance.Found]:
    folder = tmp_path_factory.mktemp("tolerance") / "search"
    return folder, tolerance.find_smallest(SMALL, folder, tolerance=POINTS)


def score(path: Path, batches: Any) -> scoring.Score:
    model = training.build_for(load_dataset("digits"), SMALL.network, SMALL.width)
    return scoring.score_file(path, model, batches)


def test_the_file_keeps_the_tolerance_on_what_was_held_out_and_is_the_smallest_that_did(
    finished: tuple[Path, tolerance.Found],
) -> None:
    folder, found = finished
    held_out = load_dataset("digits", validation=300).test_batches(100)
    model = load_weights(folder / "float", into=training.build_for(load_dataset("digits"), SMALL.network, SMALL.width))
    baseline = scoring.score_model(model, held_out)
    assert baseline.correct == found.float_score.correct
    kept = score(folder / "net.scn", held_out)
    assert kept.correct == found.score.correct
    assert 100 * (baseline.correct - kept.correct) / 300 <= POINTS
    assert found.file_bytes == (folder / "net.scn").stat().st_size < found.float_bytes / 5
    files = {path: path.stat().st_size for path in folder.glob("branch-*/net.scn")}
    assert sorted(files.values(), reverse=True) == [attempt.file_bytes for attempt in found.attempts]
    within = [size for path, size in files.items() if baseline.correct - score(path, held_out).correct <= 3 * POINTS]
    assert min(within) == found.file_bytes


def test_the_test_set_is_scored_for_the_chosen_file_alone(finished: tuple[Path, tolerance.Found]) -> None:
    folder, found = finished
    expected = score(folder / "net.scn", load_dataset("digits").test_batches(100))
    assert (found.test_score.correct, found.test_score.total) == (expected.correct, 360)
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(asdict(found)))
    for part in (folder / "float", *folder.glob("branch-*")):
        assert json.loads((part / "result.json").read_text())["scored_on"] == "validation"


def test_a_branch_ends_at_the_size_of_its_state_or_at_one_before_the_next(
    finished: tuple[Path, tolerance.Found],
) -> None:
    folder, found = finished
    records = [json.loads(line) for line in (folder / "trunk" / "metrics.jsonl").read_text().splitlines()]
    sizes = [found.float_bytes // 4] + [record["size_bytes"] for record in records] + [0]
    between = 0
    for attempt in found.attempts:
        began, following = sizes[attempt.epoch : attempt.epoch + 2]
        (path,) = (
            path
            for path in folder.glob(f"branch-{attempt.epoch:04d}-*/net.scn")
            if path.stat().st_size == attempt.file_bytes
        )
        asked = int(path.parent.name.split("-")[2])
        label = attempt.file_bytes - len(write(replace(read(path.read_bytes()), metadata="")))
        assert following < asked <= began
        between += asked < began
        # branches of a few steps have little time to come back up from where the trunk was going
        assert 0.6 * asked <= attempt.file_bytes - label <= asked
    assert between


def test_the_trunk_falls_by_the_same_factor_in_each_step(finished: tuple[Path, tolerance.Found]) -> None:
    state = run_folder.read_checkpoint(finished[0] / "trunk" / "checkpoint.pt")["compressor"]
    budget = Budget(**state["budget"])
    budget.total_steps = 10_000  # a run of that many steps would not fall so, else
    sizes = [budget.path(step) for step in range(0, 5_000, 500)]
    factors = [b / a for a, b in pairwise(sizes)]
    assert factors == pytest.approx([factors[0]] * 9)


def interrupt_in(part: str, epoch: int) -> tolerance.OnPart:
    def on_part(title: str, epochs: int) -> tuple[None, training.OnStep]:
        def on_step(now: int, step: int, steps: int) -> None:
            if title.startswith(part) and (now, step) == (epoch, 2):
                raise KeyboardInterrupt

        return None, on_step

    return on_part


def test_a_search_that_is_stopped_anywhere_goes_on_to_the_same_file(
    finished: tuple[Path, tolerance.Found], tmp_path: Path
) -> None:
    resume = False
    for part, epoch in (("float", 2), ("trunk", 1), ("trunk", 6), ("branch 1", 1), ("branch 2", 1)):
        with pytest.raises(training.Interrupted):
            tolerance.find_smallest(
                SMALL, tmp_path / "run", tolerance=POINTS, resume=resume, on_part=interrupt_in(part, epoch)
            )
        resume = True
        torch.manual_seed(99)
    found = tolerance.find_smallest(SMALL, tmp_path / "run", tolerance=POINTS, resume=True)
    assert found == finished[1]
    assert (tmp_path / "run/net.scn").read_bytes() == (finished[0] / "net.scn").read_bytes()


def test_a_float_run_is_used_as_it_is_and_needed_only_once(
    finished: tuple[Path, tolerance.Found], tmp_path: Path
) -> None:
    shutil.copytree(finished[0] / "float", tmp_path / "float")
    arguments = {"tolerance": POINTS, "baseline_run": tmp_path / "float"}
    with pytest.raises(training.Interrupted):
        tolerance.find_smallest(SMALL, tmp_path / "run", on_part=interrupt_in("trunk", 2), **arguments)
    shutil.rmtree(tmp_path / "float")
    found = tolerance.find_smallest(SMALL, tmp_path / "run", resume=True, **arguments)
    assert found.attempts == finished[1].attempts
    assert found.float_score.correct == finished[1].float_score.correct
    assert not (tmp_path / "run" / "float").exists()


def test_where_no_file_qualifies_there_is_none_and_the_numbers_are_said(
    finished: tuple[Path, tolerance.Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(SMALL, start=str(finished[0] / "float"), epochs=3)
    scores = iter(scoring.Score(number, 300, 1.0) for number in range(200, 300))
    monkeypatch.setattr(training, "score_file", lambda *_: next(scores))
    with pytest.raises(
        UsageError, match=r"within 2 points of the float network's \d\d.\d\d % on 300 examples .*\nhint: "
    ):
        tolerance.find_smallest(recipe, tmp_path / "run", tolerance=2)
    assert not (tmp_path / "run" / "net.scn").exists()
    assert not (tmp_path / "run" / "result.json").exists()
    assert len(list((tmp_path / "run").glob("branch-0000-*/net.scn"))) >= 1  # the largest state was tried


def test_what_the_baseline_run_held_out_is_held_out_again(
    finished: tuple[Path, tolerance.Found], tmp_path: Path
) -> None:
    with pytest.raises(training.Interrupted):
        tolerance.find_smallest(
            replace(SMALL, validation=0),
            tmp_path,
            tolerance=1,
            baseline_run=finished[0] / "float",
            on_part=interrupt_in("trunk", 1),
        )
    search = tolerance.read_search(tmp_path)
    assert search is not None
    assert search.recipe.validation == 300


def test_a_tenth_is_held_out_if_nothing_is_said(finished: tuple[Path, tolerance.Found], tmp_path: Path) -> None:
    with pytest.raises(training.Interrupted):
        tolerance.find_smallest(replace(SMALL, validation=0), tmp_path, tolerance=1, on_part=interrupt_in("float", 1))
    search = tolerance.read_search(tmp_path)
    assert search is not None
    assert search == tolerance.Search(replace(SMALL, validation=143), 1, None, None)


def test_a_baseline_that_may_have_seen_the_held_out_examples_is_refused(
    finished: tuple[Path, tolerance.Found], tmp_path: Path
) -> None:
    for change, expected in (
        ({"validation": 200}, "expected a float run with `validation` = `200`, found `300`"),
        ({"width": 25}, "expected a run of `digits lenet-300-100:25`"),
    ):
        with pytest.raises((UsageError, DataError), match=expected):
            tolerance.find_smallest(
                replace(SMALL, **change), tmp_path / "run", tolerance=1, baseline_run=finished[0] / "float"
            )
        assert not (tmp_path / "run").exists()


def test_what_is_missing_is_said_before_a_folder_is_made(tmp_path: Path) -> None:
    for change, expected in (
        ({"start": str(tmp_path / "no.pt")}, "no.pt`: cannot be read"),
        ({"dataset": "mnist", "data_dir": str(tmp_path / "data")}, "data"),
        ({"network": "lenet7"}, "lenet7"),
        ({"device": "abacus"}, "abacus"),
    ):
        with pytest.raises((DataError, UsageError), match=expected):
            tolerance.find_smallest(replace(SMALL, **change), tmp_path / "run", tolerance=1)
        assert not (tmp_path / "run").exists()


def test_a_search_goes_on_only_as_it_was_started(finished: tuple[Path, tolerance.Found]) -> None:
    folder = finished[0]
    for change, arguments, name in (
        ({}, {"tolerance": 1}, "tolerance"),
        ({"seed": 5}, {"tolerance": POINTS}, "seed"),
        ({}, {"tolerance": POINTS, "baseline_run": "elsewhere"}, "baseline_run"),
    ):
        with pytest.raises(CheckpointError, match=f"was started with `{name}` = .*\nhint: "):
            tolerance.find_smallest(replace(SMALL, **change), folder, resume=True, **arguments)
    with pytest.raises(UsageError, match="expected a new or empty folder, found a run"):
        tolerance.find_smallest(SMALL, folder, tolerance=POINTS)
    with pytest.raises(CheckpointError, match="no search to resume"):
        tolerance.find_smallest(SMALL, folder / "nothing", tolerance=POINTS, resume=True)


@pytest.mark.parametrize("value", [-0.1, 100, float("nan")])
def test_a_tolerance_is_of_points(tmp_path: Path, value: float) -> None:
    with pytest.raises(UsageError, match="expected percentage points"):
        tolerance.find_smallest(SMALL, tmp_path / "run", tolerance=value)


def search(count: int, qualifies: Callable[[int], bool], guess: tuple[int, int]) -> tuple[dict[int, bool], int]:
    """All that a search tries."""
    tried: dict[int, bool] = {}
    while (number := tolerance.next_branch(tried, count, guess)) is not None:
        assert number not in tried
        assert 0 <= number < count
        tried[number] = qualifies(number)
    return tried, len(tried)


def test_the_bisection_finds_the_last_that_qualifies_whatever_the_guess() -> None:
    for count in range(1, 12):
        for good in range(count):
            for bad in range(good + 1, count + 1):
                for last in range(-1, count):
                    tried, number = search(count, lambda i, last=last: i <= last, (good, bad))
                    found = max((i for i, qualifies in tried.items() if qualifies), default=-1)
                    assert found == last
                    assert last >= 0 or tried[0] is False
                    assert number <= 8


def test_chance_is_the_standard_error_of_a_difference_of_two_counts() -> None:
    assert tolerance.chance(scoring.Score(90, 100, 0.0), accuracy=0.85) == pytest.approx(5.0)  # the root of 10 + 15
    rng = torch.Generator().manual_seed(1)
    wrong = (torch.rand(2, 4000, 1000, generator=rng) < 0.03).sum(-1).float()
    spread = 100 * (wrong[0] - wrong[1]).std() / 1000
    assert tolerance.chance(scoring.Score(970, 1000, 0.0), 0.97) == pytest.approx(float(spread), rel=0.05)


def test_a_near_miss_does_not_end_the_way_down_but_is_not_chosen(tmp_path: Path) -> None:
    floats = scoring.Score(970, 1000, 0.0)

    def run(correct: list[int]) -> tuple[list[int], int | None]:
        tried: dict[int, Attempt] = {}
        what = tolerance.Search(SMALL, 0.5, None, None)
        running = tolerance._Running(SMALL, what, tmp_path, lambda title, epochs: (None, None))
        while (i := running._next(tried, len(correct), (0, len(correct)), floats)) is not None:
            lost = (970 - correct[i]) / 10
            tried[i] = Attempt(1000 - i, correct[i] / 1000, lost, 1, lost <= 0.5)
        good = [i for i, a in tried.items() if a.qualifies]
        return list(tried), max(good, default=None)

    assert run([970, 968, 966, 964, 967, 900, 880, 860]) == ([4, 6, 5], 4)
    assert run([970, 968, 966, 966, 964, 964, 880, 860])[1] == 3  # the miss by one example is gone back on
    assert run([970, 968, 966, 966, 964, 967, 880, 860])[1] == 5  # a miss by one example, and less of a file behind it
    assert run([900, 880, 870, 860, 850, 840, 830, 820])[1] is None


def test_a_good_guess_takes_four_branches_at_most() -> None:
    for last in range(10, 18):
        assert search(40, lambda i, last=last: i <= last, (10, 18))[1] <= 4


def record(epoch: int, size: int) -> EpochRecord:
    return EpochRecord(epoch, 0.0, 0.0, 0.9, size, 0.0, 0.0, 1, 1, 1, 1, 1, 0.0)


def test_states_are_kept_where_the_size_has_fallen_by_fifteen_percent() -> None:
    sizes = [1000, 900, 850, 900, 723, 722, 300, 299]
    kept = tolerance.kept_of([record(i, size) for i, size in enumerate(sizes)])
    assert [r.size_bytes for r in kept] == [1000, 850, 722, 300]


def test_sizes_between_two_states_are_as_far_apart_as_states_are() -> None:
    states = [tolerance.State(epoch, size, 0.9) for epoch, size in ((1, 1000), (2, 850), (3, 200))]
    found = [(start.state.epoch, start.size_bytes) for start in tolerance.starts_of(states, 150)]
    assert found == [
        (1, 1000),
        *((2, round(850 * (200 / 850) ** (i / 9))) for i in range(9)),
        *((3, round(200 * (150 / 200) ** (i / 2))) for i in range(2)),  # and down to where the trunk would have gone
    ]
    sizes = [size for _, size in found]
    assert all(0.83 < small / large < 0.88 for large, small in pairwise(sizes))
    assert tolerance.starts_of(states[:1], 1000) == [tolerance.Start(states[0], 1000)]
    far = [start.size_bytes for start in tolerance.starts_of(states[:1], 1)]
    assert far == [round(1000 * 0.85**i) for i in range(9)]  # but not very far below the last state


def test_a_branch_comes_down_from_its_state_to_the_size_between() -> None:
    """Not at once: γ would answer a size that is far above the path by taking too much."""
    state = {
        "compressor": {"config": {"total_steps": 800}, "budget": {"gradient_ratio": 2.0}, "gamma": 0.5},
        "recipe": {"epochs": 16},
    }
    start = tolerance.Start(tolerance.State(2, 3000, 0.9), 2000)
    branch = tolerance.branched(state, replace(SMALL, epochs=2), start)["compressor"]
    budget = Budget(**branch["budget"])
    assert budget.total_steps == branch["config"]["total_steps"] == 100
    assert (budget.path(0), budget.path(100)) == (pytest.approx(3000), pytest.approx(2020))  # a percent is trimmed
    assert (budget.gamma, budget.gradient_ratio) == (0.5, 2.0)
    beginning = tolerance.Start(tolerance.State(0, 9000, 0.9), 4000)
    of_beginning = tolerance.branched(state, replace(SMALL, epochs=2), beginning)["compressor"]
    assert not Budget(**of_beginning["budget"]).started  # there is no γ yet to go on with


def attempt(size: int, qualifies: bool) -> Attempt:
    return Attempt(size, 0.9, 1.0, 1, qualifies)


def test_what_speaks_against_the_outcome_is_said() -> None:
    def notes(total: int, *verdicts: bool) -> str:
        tried = [attempt(100 - i, qualifies) for i, qualifies in enumerate(verdicts)]
        return " ".join(tolerance._notes(1.0, scoring.Score(total, total, 0.0), tried))

    assert notes(1000, True, False) == ""
    assert "one of the 100 examples held out is 1.00 points" in notes(100, True, False)
    assert "a smaller file qualifies though a larger one does not" in notes(1000, False, True, False)
    assert "the smallest size that was tried still qualifies" in notes(1000, True, True)
