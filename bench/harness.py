"""What all trainings of the bench share: the tasks, several at once, the spread over seeds, and the record of a row.

`train.py` runs our own rows, `rivals.py` those of other people's methods; both take their tasks from here and write
records of the same shape, so that one table can hold them. `targets.py` and `tolerances.py` write a file each, with an
entry for every network.
"""

import hashlib
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

import selfcompress
from selfcompress.container import LevelTensor, read, read_file, write, write_file
from selfcompress.fitting import fit_levels
from selfcompress.recipes.datasets import load_dataset
from selfcompress.recipes.recipe import Recipe, default_recipe
from selfcompress.recipes.run_folder import FILE, RESULT
from selfcompress.recipes.training import EVALUATION_BATCH, build_for
from selfcompress.scoring import describe_machine, describe_versions, file_bytes, score_file

MLP = replace(default_recipe("mnist", "lenet-300-100"), epochs=40)
LENET = replace(MLP, network="lenet5", epochs=25)
CONV5 = replace(MLP, network="conv5", epochs=15)
RESNET = Recipe(
    dataset="cifar10", network="resnet9", width=16, epochs=10, optimizer="adam", lr=2e-3, anneal=0.8, gamma_warmup=0.2
)
RESNET_LONG = replace(
    RESNET, epochs=30, optimizer="sgd", lr=0.2, weight_decay=5e-4, precision="bfloat16", settle=1.0, hold=1.0
)
"""Half an hour on one core that multiplies bfloat16 in hardware; hours on others. Formats learn to the end: that makes
no difference here (docs/dials.md), and these rows were run before they stayed by default."""
RECORDS = Path(__file__).parent / "records"
SOURCE = "source.txt"

Job = TypeVar("Job")
Found = TypeVar("Found")


class OutOfTimeError(Exception):
    """A run had to stop before it was done; the same command goes on with it."""


def results(
    run: Callable[[Job], Found], jobs: Sequence[Job], *, at_once: int, threads: int
) -> Iterator[tuple[Job, Found]]:
    """Each job with what `run` makes of it, as they are done; those that time is too short for are left out.

    Several at once run in processes of their own, so that `run` has to be a function that a module names.
    """
    if at_once == 1:
        torch.set_num_threads(threads)
        for job in jobs:
            try:
                yield job, run(job)
            except OutOfTimeError as stop:
                print(stop)
                return
        return
    # a process that has begun with CUDA cannot be forked
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        waiting = {pool.submit(run, job): job for job in jobs}
        for future in as_completed(waiting):
            try:
                yield waiting[future], future.result()
            except OutOfTimeError as stop:
                print(stop)


def source_digest() -> str:
    """Which code runs: the start of the SHA-256 of all its files, names and contents, in order."""
    root = Path(selfcompress.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def finish(folder: Path, go_on: Callable[[], object]) -> dict[str, Any]:
    """The result of the run in `folder`; if it is not there yet, `go_on` must make it.

    Which code ran is noted beside the folder, once for every start.
    """
    source = folder.parent / f"{folder.name}-{SOURCE}"
    if not (folder / RESULT).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "a", encoding="utf-8") as file:
            file.write(source_digest() + "\n")
        go_on()
    result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    result["recipe"].pop("data_dir")
    result["recipe"]["teacher"] = name_only(result["recipe"].get("teacher"))
    result["source"] = source.read_text().split() if source.exists() else []
    return result


def name_only(path: str | None) -> str | None:
    """Which run a path leads to, not where it is."""
    return None if path is None else Path(path).name


def rewrite(folder: Path, data_dir: str) -> None:
    """Write the file of a finished run anew, with the probability models of today, and score it again.

    For runs whose training does not depend on the code of the levels, such as those of the published method. Levels,
    steps and all else stay as they were trained; the result says which code wrote the file. A float run has no levels.
    """
    path = folder / FILE
    if not path.exists():
        return
    result = json.loads((folder / RESULT).read_text())
    contents = read(read_file(path))
    records = tuple(refitted(r) if isinstance(r, LevelTensor) else r for r in contents.records)
    anew = folder / f"new-{FILE}"
    write_file(anew, write(replace(contents, records=records)))
    recipe = Recipe.from_dict({**result["recipe"], "data_dir": data_dir})
    dataset = load_dataset(recipe.dataset, data_dir, validation=recipe.validation)
    fresh = build_for(dataset, recipe.network, recipe.width)
    score = score_file(anew, fresh, dataset.test_batches(EVALUATION_BATCH))
    assert score.correct == result["score"]["correct"], f"{folder}: the file is not the network that was trained"
    anew.replace(path)
    result["size_share"] *= result["summary"]["file_bytes"] / file_bytes(path)
    result["summary"]["file_bytes"] = file_bytes(path)
    result["rewritten_by"] = source_digest()
    (folder / RESULT).write_text(json.dumps(result, indent=2) + "\n")


def refitted(tensor: LevelTensor) -> LevelTensor:
    """The same levels with the model that fits them best today."""
    rows, columns, taps = tensor.levels.shape
    if not tensor.levels.any():
        return tensor
    pitch = None if taps == 1 else tensor.shape[-1] if tensor.shape[-1] > 1 else taps
    levels = torch.from_numpy(tensor.levels.reshape(rows, columns * taps))
    return replace(tensor, model=fit_levels(levels, taps, pitch))


def spread(values: list[float]) -> dict[str, float | int]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "n": len(values),
    }


def show_spread(values: list[float], digits: int = 2) -> str:
    """Their mean, and the standard deviation where there are several; nothing for none."""
    if not values:
        return ""
    found = spread(values)
    return f"{found['mean']:,.{digits}f}" + (f" ± {found['std']:,.{digits}f}" if len(values) > 1 else "")


def summarize(name: str, command: str, recipe: Recipe, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of a row: what its runs, one for each seed, have in common."""
    summaries = [r["summary"] for r in results]
    return {
        "row": name,
        "command": command,
        "scored_on": results[0]["scored_on"],
        "file_bytes": spread([s["file_bytes"] for s in summaries]),
        "error_percent": spread([100 * (1 - s["accuracy"]) for s in summaries]),
        "loss": spread([s["loss"] for s in summaries]),
        "loss_bytes_over_file_bytes": [r["size_share"] for r in results],
        "weights_alive": spread([s["weights_alive"] for s in summaries]),
        "channels_alive": spread([s["channels_alive"] for s in summaries]),
        "macs": spread([r["macs"] for r in results]) if all("macs" in r for r in results) else None,
        "seconds_first_epoch": spread([s["seconds_first"] for s in summaries]),
        "seconds_last_epoch": spread([s["seconds_last"] for s in summaries]),
        "recipe": asdict(replace(recipe, data_dir=None, teacher=name_only(recipe.teacher))),
        "runs": results,
    }


def show(record: dict[str, Any]) -> None:
    """Print the short part of a record."""
    print(json.dumps({k: v for k, v in record.items() if k not in ("runs", "recipe")}, indent=2), flush=True)


def keep(record: dict[str, Any], folder: Path) -> None:
    """Write a record under the name of its row."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{record['row']}.json").write_text(json.dumps(record, indent=2) + "\n")


def keep_entry(path: Path, name: str, recipe: Recipe, command: str, found: dict[str, Any]) -> None:
    """Write what was found for a network into the file that has an entry for each of them."""
    entries = read_entries(path)
    entries[name] = {
        "command": command,
        "recipe": replace(recipe, data_dir=None).to_dict(),
        **found,
        "machine": describe_machine(torch.device(recipe.device)),
        "versions": describe_versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=2) + "\n")


def read_entries(path: Path) -> dict[str, Any]:
    """The entries that were written there, by the network; none if there is no such file."""
    return dict(json.loads(path.read_text())) if path.exists() else {}
