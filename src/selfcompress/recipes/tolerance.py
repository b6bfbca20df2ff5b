"""The smallest file that loses no more than a given accuracy, without a γ or a size to guess.

A trunk starts from the float network and trains at a constant learning rate while its size falls, by the same factor in
each epoch, to far below any use. Its beginning is kept, and then its state whenever it has fallen by another 15 %. A
branch goes on from a kept state: its learning rate falls to the floor while a target holds its size, or, where the next
state is much smaller, takes it to one of the sizes between; its file is loaded again and scored on examples that were
held out. Which branches are made is a bisection: accuracy is taken to fall with the size, but for what chance does with
so few examples; where two branches say otherwise, the outcome notes it. The test set is looked at once, for the chosen
file.

Each part is a run in a folder of its own, so a search that is stopped goes on where it was. The trunk is the first half
of a run towards a target: there the planned path of sizes falls (`budget.py`), and the landing is never reached.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..compressor import SelfCompressor
from ..container import write_file
from ..errors import CheckpointError, UsageError
from ..reporting import Attempt, EpochRecord
from ..scoring import Score, file_bytes, score_file, score_model
from ..steering import smallest_bytes
from .datasets import load_dataset
from .recipe import Recipe
from .run_folder import (
    CHECKPOINT,
    FILE,
    RESULT,
    claimed,
    make_folder,
    read_checkpoint,
    refuse_run,
    write_checkpoint,
)
from .starting import load_weights
from .training import (
    OnPart,
    Result,
    build_for,
    check_origin,
    evaluation_batch,
    find_device,
    read_recipe,
    train,
    train_float,
    train_part,
)

SEARCH = "search.json"
"""What a search was started with; in its folder."""
TRUNK = "trunk"
"""The folder of the trunk, in that of its search. One that is there already is gone on with."""
HELD_OUT = 10
"""One of so many training examples is held out if the recipe holds out none."""
SPACING = 0.85
"""A state is kept when the size has fallen to this share of the last one that was kept. Sizes that are tried are no
closer, and hardly further apart."""
ATTACHED = 4
"""Attaching leaves a float network one of so many of its bytes: 8 bits of 32."""
BRANCH = 0.3
"""Epochs of a branch, as a share of the recipe's."""
FLOOR = 1e-3
"""The trunk's path leads towards this share of the float network …"""
LEAST = 1.5
"""… or towards so many times the smallest file that this network can become, whichever is more."""
BEYOND = 8
"""So many sizes below the smallest state are tried, too, as far as the trunk would have gone: it may lag behind."""
HOPELESS = (0.2, 3)
"""The trunk ends early when it was so far below the accuracy that is wanted in so many epochs on end."""


@dataclass(frozen=True)
class Found:
    """The outcome of a search. `result.json` holds the same."""

    recipe: Recipe
    tolerance: float
    """Percentage points."""
    file_bytes: int
    float_bytes: int
    float_score: Score
    """Of the float network, on the examples held out."""
    score: Score
    """Of the chosen file, loaded into a fresh network, on the examples held out."""
    test_score: Score
    """The same on the test set, which nothing was chosen by."""
    attempts: tuple[Attempt, ...]
    """All files that were tried, from the largest to the smallest."""
    notes: tuple[str, ...]
    """What speaks against the outcome."""


def find_smallest(
    recipe: Recipe,
    out_dir: str | os.PathLike[str],
    *,
    tolerance: float,
    baseline_run: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_part: OnPart = lambda title, epochs: (None, None),
) -> Found:
    """Find the smallest file that stays within `tolerance` of the float network's accuracy, and write it.

    The float network is that of `baseline_run`, or else the one that the recipe starts from, or else one that is
    trained first. Its training must not have seen the examples held out.

    Args:
        recipe: what to train; `epochs` are those of the float network and of the trunk. If `validation` is 0, as many
            examples are held out as in the baseline run, or else a tenth of the training set.
        out_dir: folder of the search; made if it is missing. The file is `net.scn` in it.
        tolerance: how much accuracy may be lost on the examples held out, in percentage points, >= 0.
        baseline_run: folder of a float run of the same network that held out the same examples.
        resume: go on with the search that is there; recipe, tolerance and baseline must be the same.
        on_part: see `OnPart`.

    Raises:
        UsageError: no file that was tried stays within the tolerance; or a value is outside of its range, or the folder
            holds a run. CheckpointError: the search in the folder was started with other values. And what
            `train` raises, `Interrupted` included.
    """
    folder = Path(out_dir)
    if not 0 <= tolerance < 100:
        raise UsageError(
            f"`tolerance`: expected percentage points of 0 … 100, got `{tolerance}`\nhint: for example 0.5"
        )
    if recipe.target is not None:
        raise UsageError("`target`: found beside `tolerance`, which chooses the size\nhint: leave one of them out")
    baseline_dir = None if baseline_run is None else str(baseline_run)
    if resume:
        search = _read_search(folder)
        _check_same_search(folder, search, recipe, tolerance, baseline_dir)
        recipe = replace(search.recipe, device=recipe.device, data_dir=recipe.data_dir)
    else:
        refuse_run(folder, SEARCH)
        search = _begin(recipe, tolerance, baseline_dir)
        recipe = search.recipe
        make_folder(folder)  # now that data, network and weights are known to be there
    with claimed(folder):
        if not resume:
            refuse_run(folder, SEARCH)  # another process may have been quicker
            write_file(folder / SEARCH, (json.dumps(asdict(search), indent=2) + "\n").encode())
        return _Running(recipe, search, folder, on_part).run()


@dataclass(frozen=True)
class Search:
    """What a search was started with; `search.json` holds the same."""

    recipe: Recipe
    """With the examples that are held out."""
    tolerance: float
    """Percentage points."""
    baseline_run: str | None
    float_score: Score | None
    """Of given weights, which may be gone when the search is resumed; None where the float network is trained here."""


def read_search(out_dir: str | os.PathLike[str]) -> Search | None:
    """What the search in a folder was started with; None if there is none.

    Raises `CheckpointError` if it cannot be read.
    """
    return _read_search(Path(out_dir)) if (Path(out_dir) / SEARCH).exists() else None


def _read_search(folder: Path) -> Search:
    path = folder / SEARCH
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        score = values["float_score"]
        return Search(
            recipe=Recipe.from_dict(values["recipe"]),
            tolerance=float(values["tolerance"]),
            baseline_run=values["baseline_run"],
            float_score=None if score is None else Score(**score),
        )
    except OSError as error:
        raise CheckpointError(
            f"`{path}`: no search to resume: {error.strerror or error}\n"
            "hint: name the folder of a started one, or leave `--resume` out"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"`{path}`: expected what a search was started with, found something else: {error}\n"
            "hint: start the search anew in another folder"
        ) from error


def _begin(recipe: Recipe, tolerance: float, baseline_run: str | None) -> Search:
    """See that all is there that a search needs."""
    device = find_device(recipe.device)
    if not recipe.validation and baseline_run is not None and (Path(baseline_run) / CHECKPOINT).exists():
        recipe = replace(recipe, validation=read_recipe(baseline_run).validation)
    if not recipe.validation:
        size = load_dataset(recipe.dataset, recipe.data_dir).train_size
        recipe = replace(recipe, validation=max(1, size // HELD_OUT))
    dataset = load_dataset(recipe.dataset, recipe.data_dir, validation=recipe.validation)
    model = build_for(dataset, recipe.network, recipe.width)
    score = None
    for source in (recipe.start, baseline_run):  # both are looked at, the second one counts
        if source is not None:
            check_origin(source, recipe)
            _check_unseen(source, recipe)
            load_weights(source, into=model.to(device))
            score = score_model(model, dataset.test_batches(evaluation_batch(device), device=device))
    return Search(recipe, tolerance, baseline_run, score)


def _check_same_search(
    folder: Path, search: Search, recipe: Recipe, tolerance: float, baseline_run: str | None
) -> None:
    started = {**search.recipe.to_dict(), "tolerance": search.tolerance, "baseline_run": search.baseline_run}
    wanted = {**recipe.to_dict(), "tolerance": tolerance, "baseline_run": baseline_run}
    for name, now in wanted.items():
        default = name == "validation" and not now  # the tenth that it was started with
        if started[name] != now and name not in ("device", "data_dir") and not default:
            raise CheckpointError(
                f"`{folder}`: the search was started with `{name}` = `{started[name]}`, not `{now}`\n"
                "hint: resume with the options it was started with (`--resume` and `--out` are enough)"
            )


def _check_unseen(folder: str, recipe: Recipe) -> None:
    """Refuse a float run that may have trained on what is held out here. Other weights do not say."""
    if not (Path(folder) / CHECKPOINT).exists():
        return
    found = read_recipe(folder)
    if found.dataset == recipe.dataset and found.validation != recipe.validation:
        raise UsageError(
            f"`{folder}`: expected a float run with `validation` = `{recipe.validation}`, found `{found.validation}`: "
            "it may have been trained on what is held out here\n"
            f"hint: train it with `--validation {recipe.validation}`, or search with the one that it has"
        )


@dataclass(frozen=True)
class State:
    """A state of the trunk that is kept."""

    epoch: int
    """After which it was; 0 for the beginning."""
    size_bytes: int
    accuracy: float
    """On the examples held out, 0 … 1."""


@dataclass(frozen=True)
class Start:
    """What a branch begins with."""

    state: State
    size_bytes: int
    """What it is to end with."""


@dataclass
class _Running:
    """A search in progress."""

    recipe: Recipe
    search: Search
    folder: Path
    on_part: OnPart

    def run(self) -> Found:
        baseline, source = self._baseline()
        limit = baseline.accuracy - self.search.tolerance / 100
        kept = self._trunk(source, limit)
        floats, floor = self._sizes()
        beginning = max([floats // ATTACHED, *(state.size_bytes for state in kept[:1])])
        starts = starts_of([State(0, beginning, baseline.accuracy), *kept], floor)
        results: dict[int, Result] = {}
        attempts: dict[int, Attempt] = {}
        guess = _guess([start.state.accuracy for start in starts], limit)
        while (number := self._next(attempts, len(starts), guess, baseline)) is not None:
            results[number] = result = self._branch(starts[number], len(attempts) + 1)
            lost = (baseline.correct - result.score.correct) / baseline.total
            attempts[number] = Attempt(
                file_bytes=result.summary.file_bytes,
                accuracy=result.score.accuracy,
                lost_points=100 * lost,
                epoch=starts[number].state.epoch,
                qualifies=100 * lost <= self.search.tolerance + 1e-9,
            )
        tried = tuple(attempts[number] for number in sorted(attempts))
        good = [number for number, attempt in attempts.items() if attempt.qualifies]
        if not good:
            best = max(tried, key=lambda attempt: attempt.accuracy)
            raise UsageError(
                f"tolerance: no file stays within {self.search.tolerance:g} points of the float network's "
                f"{100 * baseline.accuracy:.2f} % on {baseline.total:,} examples held out; the best of {len(tried)} "
                f"has {100 * best.accuracy:.2f} % at {best.file_bytes:,} bytes, the largest {tried[0].file_bytes:,} "
                "bytes\n"
                "hint: allow more, train longer (`--epochs`), or hold out more examples (`--validation`) where one of "
                "them makes the difference"
            )
        chosen = min(good, key=lambda number: attempts[number].file_bytes)
        write_file(self.folder / FILE, (self._branch_folder(starts[chosen]) / FILE).read_bytes())
        found = Found(
            recipe=self.recipe,
            tolerance=self.search.tolerance,
            file_bytes=file_bytes(self.folder / FILE),
            float_bytes=floats,
            float_score=baseline,
            score=results[chosen].score,
            test_score=score_on_test(self.recipe, self.folder / FILE),
            attempts=tried,
            notes=_notes(self.search.tolerance, baseline, tried),
        )
        write_file(self.folder / RESULT, (json.dumps(asdict(found), indent=2) + "\n").encode())
        return found

    def _next(self, attempts: Mapping[int, Attempt], count: int, guess: tuple[int, int], floats: Score) -> int | None:
        """The next state to try. A file that misses the tolerance by no more than chance does not end the way down."""
        lenient = {
            i: a.lost_points <= self.search.tolerance + chance(floats, a.accuracy) or a.qualifies
            for i, a in attempts.items()
        }
        number = next_branch(lenient, count, guess)
        if number is not None:
            return number
        return next_branch({i: a.qualifies for i, a in attempts.items()}, count, guess)

    def _baseline(self) -> tuple[Score, str]:
        """The float network's score on the examples held out, and where the trunk's weights are."""
        source = self.recipe.start or self.search.baseline_run
        if source is not None and self.search.float_score is not None:
            return self.search.float_score, source
        folder = self.folder / "float"
        on_epoch, on_step = self.on_part("float", self.recipe.epochs)
        started = (folder / CHECKPOINT).exists()
        result = train_float(self.recipe, folder, resume=started, on_epoch=on_epoch, on_step=on_step)
        return result.score, str(folder)

    def _trunk(self, source: str, limit: float) -> list[State]:
        """Let the float network shrink. The states kept after its epochs."""
        folder, epochs = self.folder / TRUNK, self.recipe.epochs
        if (folder / CHECKPOINT).exists():
            recipe = read_recipe(folder)
            recipe = replace(recipe, device=self.recipe.device, data_dir=self.recipe.data_dir)
        else:
            floor = self._sizes()[1] + len(self.recipe.label.encode())
            recipe = replace(
                self.recipe, start=source, target=f"{floor} B", epochs=2 * epochs, anneal=0.0, settle=1.0, hold=1.0
            )
        on_epoch, on_step = self.on_part("trunk", epochs)
        records: list[EpochRecord] = []

        def keep_state(epoch: int) -> None:
            if not self._state(epoch).exists():
                write_file(self._state(epoch), (folder / CHECKPOINT).read_bytes())

        def keep(record: EpochRecord) -> None:
            records.append(record)
            if kept_of(records)[-1].epoch == record.epoch:
                keep_state(record.epoch)
            if on_epoch is not None:
                on_epoch(record)

        def stop(done: Sequence[EpochRecord]) -> bool:
            if not done:
                keep_state(0)
            depth, times = HOPELESS
            last = [record.accuracy for record in done[-times:]]
            return len(done) >= epochs or (len(last) == times and max(last) < limit - depth)

        train_part(recipe, folder, stop=stop, on_epoch=keep, on_step=on_step)
        return kept_of(records)

    def _sizes(self) -> tuple[int, int]:
        """Bytes of the float network, and those that the trunk's path leads to."""
        dataset = load_dataset(self.recipe.dataset, self.recipe.data_dir, validation=self.recipe.validation)
        model = build_for(dataset, self.recipe.network, self.recipe.width)
        floats = 4 * sum(v.numel() for v in model.state_dict().values() if v.is_floating_point())
        compressor = SelfCompressor(model, dataset.example_inputs(), rate=self.recipe.rate, grid=self.recipe.grid)
        least = smallest_bytes(model, compressor.axes, lambda attached: None)
        return floats, math.ceil(max(FLOOR * floats, LEAST * least))

    def _state(self, epoch: int) -> Path:
        """Where the trunk's checkpoint after an epoch is kept."""
        return self.folder / TRUNK / f"epoch-{epoch:04d}.pt"

    def _branch_folder(self, start: Start) -> Path:
        """Named by the epoch of the state, and by the size in bytes."""
        return self.folder / f"branch-{start.state.epoch:04d}-{start.size_bytes}"

    def _branch(self, start: Start, number: int) -> Result:
        """Anneal from a state that was kept, at its size or on the way to a smaller one, and write the file."""
        folder = self._branch_folder(start)
        epochs = branch_epochs(self.recipe)
        if (folder / CHECKPOINT).exists():
            recipe = read_recipe(folder)
            recipe = replace(recipe, device=self.recipe.device, data_dir=self.recipe.data_dir)
        else:
            room = start.size_bytes + len(self.recipe.label.encode())
            recipe = replace(self.recipe, start=None, target=f"{room} B", epochs=epochs, anneal=1.0)
            make_folder(folder)
            write_checkpoint(
                folder / CHECKPOINT, branched(read_checkpoint(self._state(start.state.epoch)), recipe, start)
            )
        on_epoch, on_step = self.on_part(f"branch {number}, {start.size_bytes:,} bytes", epochs)
        return train(recipe, folder, resume=True, on_epoch=on_epoch, on_step=on_step)


def branch_epochs(recipe: Recipe) -> int:
    """Epochs of each branch in a search with this recipe."""
    return max(1, round(BRANCH * recipe.epochs))


def branched(state: dict[str, Any], recipe: Recipe, start: Start) -> dict[str, Any]:
    """The checkpoint of a run that has yet to begin, of `recipe`, from the trunk's `state` that `start` names.

    Its γ is the trunk's, and its target the size that `start` says.
    """
    compressor = dict(state["compressor"])
    config = compressor["config"]
    steps = config["total_steps"] * recipe.epochs // state["recipe"]["epochs"]
    compressor["config"] = config | {"target_bytes": start.size_bytes, "total_steps": steps}
    compressor["steps"] = 0
    compressor["budget"] = {"target_bytes": start.size_bytes, "total_steps": steps}
    if start.state.epoch:  # before the first one the trunk has no γ
        compressor["budget"] |= {
            "first_bytes": float(start.state.size_bytes),
            "gradient_ratio": state["compressor"]["budget"]["gradient_ratio"],
            "gamma": compressor["gamma"],
        }
    return state | {"compressor": compressor, "recipe": recipe.to_dict(), "records": []}


def kept_of(records: Sequence[EpochRecord]) -> list[State]:
    """The epochs of a trunk whose state is kept: the first, and each whose size is 15 % below that of the last."""
    kept: list[State] = []
    for record in records:
        if not kept or record.size_bytes <= SPACING * kept[-1].size_bytes:
            kept.append(State(record.epoch, record.size_bytes, record.accuracy))
    return kept


def starts_of(kept: Sequence[State], floor: int) -> list[Start]:
    """What branches may begin with, from the largest to the smallest.

    Every state kept, the sizes between them, and some below the last one, down to `floor` bytes at most.
    """
    last = kept[-1].size_bytes
    ends = [*(state.size_bytes for state in kept[1:]), max(last * SPACING ** (BEYOND + 1), min(floor, last))]
    starts = []
    for state, end in zip(kept, ends, strict=True):
        factor = end / state.size_bytes
        parts = max(1, round(math.log(factor) / math.log(SPACING)))
        starts += [Start(state, round(state.size_bytes * factor ** (part / parts))) for part in range(parts)]
    return starts


def chance(floats: Score, accuracy: float) -> float:
    """By how many points two networks can differ on so few examples by chance: one standard error.

    Of a difference of two counts of errors that is at most the root of their sum.
    """
    wrong = floats.total - floats.correct + (1 - accuracy) * floats.total
    return 100 * math.sqrt(wrong) / floats.total


def _guess(accuracies: Sequence[float], limit: float) -> tuple[int, int]:
    """Between which states the limit probably lies: annealing gains accuracy, seldom more than a few points."""
    good = max((i for i, accuracy in enumerate(accuracies) if accuracy >= limit), default=0)
    bad = next((i for i, accuracy in enumerate(accuracies) if i > good and accuracy < limit - 0.1), len(accuracies))
    return good, bad


def next_branch(tried: Mapping[int, bool], count: int, guess: tuple[int, int]) -> int | None:
    """Which of `count` states, from the largest to the smallest, to try next; None when there is no more to learn.

    Args:
        tried: states that were tried, and whether they qualified.
        count: number of states, >= 1.
        guess: a state that probably qualifies and a smaller one that probably does not; `count` for none.

    A bisection that starts within the guess, and leaves it where the guess was wrong.
    """
    good = max((i for i, qualifies in tried.items() if qualifies), default=-1)
    bad = min((i for i, qualifies in tried.items() if not qualifies and i > good), default=count)
    if bad - good <= 1:
        return None
    low = guess[0] if good < guess[0] < bad else good
    high = guess[1] if low < guess[1] < bad else bad
    if high - low > 1:
        return (low + high) // 2
    return low if low > good else high


def _notes(tolerance: float, baseline: Score, attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """What a reader should know before trusting the outcome; attempts from the largest to the smallest."""
    notes = []
    one = 100 / baseline.total
    if one > tolerance / 2:
        notes.append(
            f"one of the {baseline.total:,} examples held out is {one:.2f} points: hold out more for a finer choice"
        )
    qualified = [attempt.qualifies for attempt in attempts]
    if qualified != sorted(qualified, reverse=True):
        notes.append("a smaller file qualifies though a larger one does not: the differences are near the noise")
    if qualified[-1]:
        notes.append("the smallest size that was tried still qualifies: a smaller file may exist")
    return tuple(notes)


def score_on_test(recipe: Recipe, file: Path) -> Score:
    """Load a file of the recipe's network and score it on the real test set."""
    device = find_device(recipe.device)
    dataset = load_dataset(recipe.dataset, recipe.data_dir)
    fresh = build_for(dataset, recipe.network, recipe.width).to(device)
    return score_file(file, fresh, dataset.test_batches(evaluation_batch(device), device=device))
