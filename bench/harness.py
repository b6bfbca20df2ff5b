"""What all trainings of the bench share: the tasks, the spread over seeds, and the record of a row.

`train.py` runs our own rows, `rivals.py` those of other people's methods; both take their tasks from here and write
records of the same shape, so that one table can hold them.
"""

import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import selfcompress
from selfcompress.container import LevelTensor, read, read_file, write, write_file
from selfcompress.fitting import fit_levels
from selfcompress.recipes.datasets import load_dataset
from selfcompress.recipes.recipe import Recipe
from selfcompress.recipes.training import EVALUATION_BATCH, FILE, RESULT, build_for
from selfcompress.scoring import file_bytes, score_file

MLP = Recipe(dataset="mnist", network="lenet-300-100", augment=True, shift=1, anneal=0.6, gamma_warmup=0.3, epochs=40)
LENET = replace(MLP, network="lenet5", epochs=25)
CONV5 = replace(MLP, network="conv5", epochs=15)
RESNET = Recipe(
    dataset="cifar10", network="resnet9", width=16, epochs=10, optimizer="adam", lr=2e-3, anneal=0.8, gamma_warmup=0.2
)
RECORDS = Path(__file__).parent / "records"
SOURCE = "source.txt"


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
    steps and all else stay as they were trained; the result says which code wrote the file.
    """
    result = json.loads((folder / RESULT).read_text())
    path = folder / FILE
    contents = read(read_file(path))
    records = tuple(refitted(r) if isinstance(r, LevelTensor) else r for r in contents.records)
    write_file(path, write(replace(contents, records=records)))
    recipe = Recipe.from_dict({**result["recipe"], "data_dir": data_dir})
    dataset = load_dataset(recipe.dataset, data_dir, validation=recipe.validation)
    fresh = build_for(dataset, recipe.network, recipe.width)
    score = score_file(path, fresh, dataset.test_batches(EVALUATION_BATCH))
    assert score.correct == result["score"]["correct"], f"{folder}: the file is not the network that was trained"
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
