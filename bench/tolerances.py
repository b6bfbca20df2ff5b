"""The smallest file that loses no more than so many points: what `--tolerance` finds, and what is true of it.

    python bench/tolerances.py --data-dir DATA                              # everything; resumable
    python bench/tolerances.py --data-dir DATA --only lenet5 --tolerances 0.5

The networks and schedules are those of `bench/targets.py`. The float network is trained once for each of them, without
the examples that are held out, and all tolerances are searched from it. A tolerance is kept on these examples by
construction; what the chosen file loses on the test set, which nothing was chosen by, stands beside it. Writes
`records/tolerances.json`, one entry for each network, and prints the table.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from harness import source_digest
from selfcompress.recipes.datasets import load_dataset
from selfcompress.recipes.recipe import Recipe
from selfcompress.recipes.tolerance import HELD_OUT, SEARCH, Found, find_smallest
from selfcompress.recipes.training import (
    CHECKPOINT,
    EVALUATION_BATCH,
    FLOAT_FILE,
    METRICS,
    RESULT,
    build_for,
    train_float,
)
from selfcompress.scoring import describe_machine, describe_versions, load_float, score_model
from targets import TASKS, parser_of

TOLERANCES = (0.2, 0.5)


def baseline(recipe: Recipe, folder: Path) -> float:
    """Train the float network in `folder`, if it is not there; its accuracy on the test set."""
    if not (folder / RESULT).exists():
        train_float(recipe, folder, resume=(folder / CHECKPOINT).exists())
    dataset = load_dataset(recipe.dataset, recipe.data_dir)
    network = load_float(folder / FLOAT_FILE, into=build_for(dataset, recipe.network, recipe.width))
    return score_model(network, dataset.test_batches(EVALUATION_BATCH)).accuracy


def search(recipe: Recipe, folder: Path, tolerance: float, baseline_run: Path) -> dict[str, Any]:
    """Search in `folder`, or take up where it was left."""
    if not (folder / RESULT).exists():
        found = asdict(
            find_smallest(
                recipe,
                folder,
                tolerance=tolerance,
                baseline_run=baseline_run,
                resume=(folder / SEARCH).exists(),
                on_part=lambda title, epochs: (lambda r: print(f"{folder.name}, {title}: {r.to_json()}"), None),
            )
        )
    else:
        found = json.loads((folder / RESULT).read_text())
    # every part of a search is a run in a folder of its own: what was trained in all
    epochs = sum(len(path.read_text().splitlines()) for path in folder.rglob(METRICS))
    kept = {name: found[name] for name in Found.__dataclass_fields__ if name != "recipe"}
    return kept | {"epochs_trained": epochs}


def row(found: dict[str, Any], float_test: float) -> dict[str, Any]:
    lost = 100 * (accuracy(found["float_score"]) - accuracy(found["score"]))
    lost_test = 100 * (float_test - accuracy(found["test_score"]))
    return found | {"lost_points": lost, "lost_points_test": lost_test, "kept": lost <= found["tolerance"] + 1e-9}


def accuracy(score: dict[str, Any]) -> float:
    return float(score["correct"] / score["total"])


def show(records: dict[str, Any]) -> None:
    print("| network | tolerance | file, bytes | share of float | lost, held out | kept | lost, test | epochs |")
    print("|---|---|---|---|---|---|---|---|")
    for name, record in records.items():
        for r in record["tolerances"]:
            share = 100 * r["file_bytes"] / r["float_bytes"]
            print(
                f"| {name} | {r['tolerance']:g} | {r['file_bytes']:,} | {share:.2f} % "
                f"| {r['lost_points']:.2f} | {'yes' if r['kept'] else 'no'} | {r['lost_points_test']:.2f} "
                f"| {r['epochs_trained']} + {record['recipe']['epochs']} |"
            )


def main() -> None:
    parser = parser_of(__doc__, "runs/tolerances")
    parser.add_argument("--tolerances", nargs="*", type=float, default=list(TOLERANCES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.records / "tolerances.json"
    records: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in args.only or [n for n in TASKS if n != "digits"]:
        recipe = replace(TASKS[name], data_dir=args.data_dir, seed=args.seed)
        size = load_dataset(recipe.dataset, recipe.data_dir).train_size
        recipe = replace(recipe, validation=size // HELD_OUT)
        float_run = args.runs / f"{name}-float-{args.seed}"
        float_test = baseline(replace(recipe, gamma=0.0), float_run)
        found = [search(recipe, args.runs / f"{name}-{t:g}-{args.seed}", t, float_run) for t in args.tolerances]
        records[name] = {
            "command": f"python bench/tolerances.py --data-dir DATA --only {name}",
            "recipe": replace(recipe, data_dir=None).to_dict(),
            "float_test_accuracy": float_test,
            "tolerances": [row(f, float_test) for f in found],
            "source": source_digest(),
            "machine": describe_machine(torch.device("cpu")),
            "versions": describe_versions(),
        }
        args.records.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records, indent=2) + "\n")
    show(records)


if __name__ == "__main__":
    main()
