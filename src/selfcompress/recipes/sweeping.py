"""Accuracy against bytes: the same recipe with many gammas, in an Optuna study that several processes can share.

Gammas are spread evenly on a logarithmic scale however many runs there are: run i takes the i-th number of van der
Corput's sequence (Sobol's in one dimension), so that each further run halves a gap. Optuna keeps the book, in SQLite or
any database that it knows. It gives no trial's number twice, from which follows which run a trial is: its place. Every
run is a folder with its file, and goes on from its checkpoint, as a new trial, when the process that had it is gone.

Left out: samplers that learn. There is one dial, and the whole front is wanted.
"""

import importlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..container import read_file, write_file
from ..errors import CheckpointError, NonFiniteError, OutputError, UsageError
from ..reporting import Point, pareto_front
from .recipe import Recipe
from .run_folder import CHECKPOINT, FILE, make_folder
from .training import OnPart, read_recipe, train

STUDY = "study.db"
"""The study's SQLite file, in the folder of the sweep, unless another database is named."""
POINTS = "points.json"
BEST = "best.scn"
"""The file that was picked."""
LOCK_SECONDS = 120
"""So long a process waits for another one to let go of the SQLite file."""
OPENINGS = 5
"""How often the database is tried."""


@dataclass(frozen=True)
class Sweep:
    """What a study holds. `points.json` in the folder holds the same."""

    points: tuple[Point, ...]
    """Finished runs, by their place in the sweep."""
    unfinished: int
    """Runs that other processes are still at."""
    failed: tuple[str, ...]
    """What went wrong in runs without a file."""
    scored_on: str
    """`test`, or `validation` if the recipe holds examples out."""

    @property
    def front(self) -> list[Point]:
        """The Pareto front, by bytes."""
        return pareto_front(self.points)


def sweep(
    recipe: Recipe,
    out_dir: str | os.PathLike[str],
    *,
    runs: int,
    gamma_from: float = 0.1,
    gamma_to: float = 3.0,
    storage: str | None = None,
    on_part: OnPart = lambda title, epochs: (None, None),
) -> Sweep:
    """Train a recipe with `runs` gammas in all, and return what came out.

    A sweep that is there goes on: finished runs stay, and a run whose process died on this machine goes on from its
    checkpoint. Processes that name the same study share its runs.

    Args:
        recipe: what to train; its gamma is not used.
        out_dir: folder of the sweep; made if it is missing.
        runs: runs of the study in all, >= 1, those of other processes and of earlier calls included.
        gamma_from: smallest gamma, > 0.
        gamma_to: largest gamma.
        storage: the URL of a database, such as `postgresql://…`; None for an SQLite file in the folder. A study is
            known by what it trains, such as `digits lenet-300-100`.
        on_part: see `OnPart`.

    Raises:
        UsageError: a value outside of its range, or Optuna is not installed. CheckpointError: the study is of another
            recipe or other gammas. OutputError: the database cannot be used. And what `train` raises, but for
            `NonFiniteError`, which the study notes.
    """
    if runs < 1:
        raise UsageError(f"`runs`: expected a whole number >= 1, got `{runs}`\nhint: change `runs`")
    if not 0 < gamma_from < gamma_to < math.inf:
        raise UsageError(
            f"`gamma_from`, `gamma_to`: expected 0 < from < to, got `{gamma_from}` and `{gamma_to}`\n"
            "hint: 0.1 and 3 suit cross-entropy on small images"
        )
    if recipe.target is not None:
        raise UsageError("`target`: a sweep chooses gammas\nhint: leave `target` out")
    optuna = _optuna()
    folder = Path(out_dir).absolute()
    make_folder(folder)
    try:
        study = _open(optuna, storage or f"sqlite:///{folder / STUDY}", recipe, (gamma_from, gamma_to))
        _queue_orphans(optuna, study)
        while (trial := _claim(optuna, study, runs)) is not None:
            gamma = trial.suggest_float("gamma", gamma_from, gamma_to, log=True)
            _train(optuna, study, trial, replace(recipe, gamma=gamma), folder, on_part)
        found = _collect(optuna, study, recipe)
    except _database_errors(optuna) as error:
        raise _unusable(storage or str(folder / STUDY), error) from error
    write_file(folder / POINTS, (json.dumps(asdict(found), indent=2) + "\n").encode())
    return found


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
    except ImportError as error:
        raise UsageError(
            "sweep: needs the package `optuna`\nhint: `pip install 'selfcompress[sweep]'`, or `pip install optuna`"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _database_errors(optuna: Any) -> tuple[type[Exception], ...]:
    """What is raised for a database that cannot be used."""
    errors = importlib.import_module("sqlalchemy.exc")
    return (optuna.exceptions.StorageInternalError, errors.SQLAlchemyError)


def _unusable(place: str, error: Exception) -> OutputError:
    return OutputError(
        f"`{place}`: the database cannot be used: {str(error).splitlines()[0]}\n"
        "hint: check the URL of `--storage`, its driver and its rights"
    )


def _open(optuna: Any, url: str, recipe: Recipe, gammas: tuple[float, float]) -> Any:
    """The study of a recipe, new or already there."""
    options = {"connect_args": {"timeout": LOCK_SECONDS}} if url.startswith("sqlite") else {}
    for attempt in range(1, OPENINGS + 1):
        try:
            study = optuna.create_study(
                study_name=recipe.label,
                storage=optuna.storages.RDBStorage(url, engine_kwargs=options),
                sampler=_sampler(optuna),
                directions=["minimize", "minimize"],
                load_if_exists=True,
            )
            break
        except _database_errors(optuna):  # also where two processes make the tables at the same moment
            if attempt == OPENINGS:
                raise
            time.sleep(0.2 * attempt)
        except ImportError as error:  # the database's driver is not installed
            raise _unusable(url, error) from error
    # the gamma of the recipe is not used, and where it is computed may differ between processes
    wanted = replace(recipe, gamma=0.0, device="cpu", data_dir=None).to_dict() | {"gammas": list(gammas)}
    started = study.user_attrs.get("recipe")
    if started is None:
        study.set_user_attr("recipe", wanted)
        return study
    for name, value in wanted.items():
        if started.get(name) != value:
            raise CheckpointError(
                f"study `{recipe.label}`: it was started with `{name}` = `{started.get(name)}`, not `{value}`\n"
                "hint: go on with the options it was started with, or start another sweep with another `--out`, "
                "and another `--storage` if you name one"
            )
    return study


def spread(number: int) -> float:
    """The `number`-th (from 0) of numbers that fill 0 … 1 evenly: 0, 1, then van der Corput's 1/2, 1/4, 3/4, 1/8, …"""
    if number < 2:
        return float(number)
    index, value, share = number - 1, 0.0, 0.5
    while index:
        value += share * (index & 1)
        index, share = index >> 1, share / 2
    return value


def _sampler(optuna: Any) -> Any:
    """What draws the gammas. Optuna's own sampler of this kind needs SciPy, and counts beside the study."""

    class Spread(optuna.samplers.BaseSampler):  # type: ignore[misc, name-defined, unused-ignore]
        """A trial's place is that of its gamma."""

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> float:
            low, high = param_distribution.low, param_distribution.high
            value = low * (high / low) ** spread(trial.user_attrs["place"])
            return float(min(max(value, low), high))

    return Spread()


def _owner() -> str:
    return f"{socket.gethostname()} {os.getpid()}"


def _alive(owner: str) -> bool:
    """Whether the process that has a run lives. Those of other machines are taken to."""
    host, _, process = owner.rpartition(" ")
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def _queue_orphans(optuna: Any, study: Any) -> None:
    """Queue the runs whose process has died."""
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        owner = trial.user_attrs.get("owner")
        if owner is not None and not _alive(owner):
            _queue(optuna, study, trial)


def _queue(optuna: Any, study: Any, trial: Any) -> None:
    """Let some process take up a run that is not finished, in the folder that holds what was done."""
    try:
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # of several processes that try, one succeeds
    except (ValueError, RuntimeError, optuna.exceptions.OptunaError):
        return
    study.enqueue_trial(trial.params, user_attrs={name: trial.user_attrs[name] for name in ("place", "folder")})


def _claim(optuna: Any, study: Any, runs: int) -> Any:
    """A trial for this process, with its place; None if all runs have been taken."""
    trials = study.get_trials(deepcopy=False)
    waiting = any(t.state == optuna.trial.TrialState.WAITING for t in trials)
    if not waiting and len(_taken(trials)) >= runs:
        return None
    trial = study.ask()
    if "place" in trial.user_attrs:  # it was queued again
        return trial
    place = _place(optuna, study.get_trials(deepcopy=False), trial.number)
    if place >= runs:  # another process was quicker
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return None
    trial.set_user_attr("place", place)
    return trial


def _taken(trials: Sequence[Any]) -> set[int]:
    return {t.user_attrs["place"] for t in trials if "place" in t.user_attrs}


def _place(optuna: Any, trials: Sequence[Any], number: int) -> int:
    """The first place that no trial has and none that began earlier is about to take."""
    running = [t for t in trials if t.state == optuna.trial.TrialState.RUNNING and "place" not in t.user_attrs]
    earlier = len([t for t in running if t.number < number])
    taken = _taken(trials)
    free = [place for place in range(len(taken) + earlier + 1) if place not in taken]
    return free[earlier]


def _train(optuna: Any, study: Any, trial: Any, recipe: Recipe, sweep_folder: Path, on_part: OnPart) -> None:
    """Do the run of a trial, or what is left of it."""
    place = trial.user_attrs["place"]
    folder = Path(trial.user_attrs.get("folder", sweep_folder / f"run-{place:03d}"))
    trial.set_user_attr("folder", str(folder))
    trial.set_user_attr("owner", _owner())
    title = f"run {place}, gamma {recipe.gamma:.3g}"
    on_epoch, on_step = on_part(title, recipe.epochs)
    resume = (folder / CHECKPOINT).exists()
    if resume:  # the gamma that it has, to the last bit
        recipe = replace(read_recipe(folder), device=recipe.device, data_dir=recipe.data_dir)
    try:
        result = train(recipe, folder, resume=resume, on_epoch=on_epoch, on_step=on_step)
    except NonFiniteError as error:
        trial.set_user_attr("problem", f"{title}: {str(error).splitlines()[0]}")
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return
    except BaseException:
        _queue(optuna, study, trial)
        raise
    trial.set_user_attr("accuracy", result.score.accuracy)
    study.tell(trial, [result.summary.file_bytes, result.score.error])


def _collect(optuna: Any, study: Any, recipe: Recipe) -> Sweep:
    states = optuna.trial.TrialState
    trials = study.get_trials(deepcopy=False)
    points = tuple(
        Point(
            t.user_attrs["place"], t.params["gamma"], int(t.values[0]), t.user_attrs["accuracy"], t.user_attrs["folder"]
        )
        for t in sorted(trials, key=lambda t: t.user_attrs.get("place", 0))
        if t.state == states.COMPLETE
    )
    return Sweep(
        points=points,
        unfinished=sum(t.state in (states.RUNNING, states.WAITING) for t in trials),
        failed=tuple(t.user_attrs["problem"] for t in trials if "problem" in t.user_attrs),
        scored_on="validation" if recipe.validation else "test",
    )


@dataclass(frozen=True)
class Condition:
    """What a file has to meet. Made by `parse_condition`."""

    text: str
    quantity: str
    """`accuracy`, `error` or `bytes`."""
    limit: float
    """Percent, or bytes."""

    def met_by(self, point: Point) -> bool:
        """Whether a point is good enough."""
        if self.quantity == "accuracy":
            return 100 * point.accuracy >= self.limit - 1e-9
        if self.quantity == "error":
            return 100 * point.error <= self.limit + 1e-9
        return point.file_bytes <= self.limit


def parse_condition(text: str) -> Condition:
    """What a user asks of a file: `accuracy >= 99.0`, `error <= 1.0` (both in percent) or `bytes <= 4000`.

    Raises `UsageError` for anything else.
    """
    match = re.fullmatch(r"\s*(accuracy\s*>=|error\s*<=|bytes\s*<=)\s*(\d+(?:\.\d*)?|\.\d+)\s*%?\s*", text)
    if match is None:
        raise UsageError(
            f"`pick`: expected a condition on accuracy, error or bytes, found `{text}`\n"
            'hint: "accuracy >= 99.0", "error <= 1.0" (both in percent) or "bytes <= 4000"'
        )
    return Condition(text.strip(), match[1][:-2].strip(), float(match[2]))


def pick(points: Sequence[Point], condition: Condition) -> Point:
    """The smallest file that meets a condition; for a limit of bytes, the most accurate one.

    Raises `UsageError` if none does, with how near the runs came.
    """
    good = [point for point in points if condition.met_by(point)]
    if not points:
        raise UsageError(
            f"`pick`: expected `{condition.text}`, but no run is finished\nhint: wait, or look at the runs"
        )
    if not good:
        best, least = max(points, key=lambda p: p.accuracy), min(points, key=lambda p: p.file_bytes)
        raise UsageError(
            f"`pick`: none of {len(points)} files meets `{condition.text}`: the most accurate has "
            f"{100 * best.accuracy:.2f} % at {best.file_bytes:,} bytes, the smallest {100 * least.accuracy:.2f} % at "
            f"{least.file_bytes:,} bytes\nhint: ask for less, or sweep further with `--gamma-from`, `--gamma-to` and "
            "more `--epochs`"
        )
    if condition.quantity == "bytes":
        return min(good, key=lambda p: (-p.accuracy, p.file_bytes, p.number))
    return min(good, key=lambda p: (p.file_bytes, -p.accuracy, p.number))


def hand_over(point: Point, out_dir: str | os.PathLike[str]) -> Path:
    """Copy the file of a point to `best.scn` in the folder. Raises `FormatError` if it is no longer there."""
    path = Path(out_dir) / BEST
    write_file(path, read_file(Path(point.folder) / FILE))
    return path
