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

import selfcompress
from selfcompress.recipes.recipe import Recipe
from selfcompress.recipes.training import RESULT

MLP = Recipe(dataset="mnist", network="lenet-300-100", augment=True, shift=1, anneal=0.6, gamma_warmup=0.3, epochs=40)
LENET = replace(MLP, network="lenet5", epochs=25)
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
    result["source"] = source.read_text().split() if source.exists() else []
    return result


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
        "seconds_first_epoch": spread([s["seconds_first"] for s in summaries]),
        "seconds_last_epoch": spread([s["seconds_last"] for s in summaries]),
        "recipe": asdict(replace(recipe, data_dir=None)),
        "runs": results,
    }


def show(record: dict[str, Any]) -> None:
    """Print the short part of a record."""
    print(json.dumps({k: v for k, v in record.items() if k not in ("runs", "recipe")}, indent=2), flush=True)


def keep(record: dict[str, Any], folder: Path) -> None:
    """Write a record under the name of its row."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{record['row']}.json").write_text(json.dumps(record, indent=2) + "\n")
