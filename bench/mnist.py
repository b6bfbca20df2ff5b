"""MNIST, LeNet-300-100 and LeNet-5 (Caffe's 20-50-500): bytes of the file against test error, three seeds.

    python bench/mnist.py --data-dir DATA      # everything; resumable, a finished run is not repeated
    python bench/mnist.py --data-dir DATA --only lenet5-code-length --seeds 0
    python bench/mnist.py --data-dir DATA --validation 10000 --only ... --gamma 1.4     # choose a hyper-parameter

Rows: the float network; the published method as published (bit depth, grid of eq. 1); code length. All rows have the
same epochs, batch size, augmentation (images moved by up to one pixel) and schedule of the learning rate.
Hyper-parameters were chosen on 10,000 training images held out (`--validation 10000`); the reported error is that of
the file, loaded into a fresh network, on the test set.
"""

import argparse
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from selfcompress.recipes.recipe import Recipe
from selfcompress.recipes.training import CHECKPOINT, RESULT, train, train_float

MLP = Recipe(dataset="mnist", network="lenet-300-100", augment=True, shift=1, anneal=0.6, gamma_warmup=0.3, epochs=40)
CONV = replace(MLP, network="lenet5", epochs=25)
ROWS: dict[str, Recipe] = {
    "lenet-300-100-float": replace(MLP, gamma=0.0),
    "lenet-300-100-bit-depth": replace(MLP, rate="bit-depth", gamma=0.03, weight_decay=5e-4),
    "lenet-300-100-code-length": replace(MLP, gamma=1.0),
    "lenet5-float": replace(CONV, gamma=0.0),
    "lenet5-bit-depth": replace(CONV, rate="bit-depth", gamma=0.03, weight_decay=5e-4),
    "lenet5-code-length": replace(CONV, gamma=1.7),
}
RECORDS = Path(__file__).parent / "records"


def run(name: str, recipe: Recipe, runs: Path) -> dict[str, Any]:
    """Train one row with one seed, or take up where it was left, and return its result."""
    folder = runs / f"{name}-{recipe.seed}"
    if not (folder / RESULT).exists():
        started = (folder / CHECKPOINT).exists()
        start = train_float if name.endswith("-float") else train
        start(
            recipe, folder, resume=started, on_epoch=lambda r: print(f"{name} {recipe.seed}: {r.to_json()}", flush=True)
        )
    result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    result["recipe"].pop("data_dir")
    return result


def spread(values: list[float]) -> dict[str, float | int]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "n": len(values),
    }


def summarize(name: str, recipe: Recipe, results: list[dict[str, Any]]) -> dict[str, Any]:
    summaries = [r["summary"] for r in results]
    return {
        "row": name,
        "command": f"python bench/mnist.py --data-dir DATA --only {name}",
        "scored_on": results[0]["scored_on"],
        "file_bytes": spread([s["file_bytes"] for s in summaries]),
        "error_percent": spread([100 * (1 - s["accuracy"]) for s in summaries]),
        "loss_bytes_over_file_bytes": [r["size_share"] for r in results],
        "weights_alive": spread([s["weights_alive"] for s in summaries]),
        "channels_alive": spread([s["channels_alive"] for s in summaries]),
        "seconds_first_epoch": spread([s["seconds_first"] for s in summaries]),
        "seconds_last_epoch": spread([s["seconds_last"] for s in summaries]),
        "recipe": asdict(replace(recipe, data_dir=None)),
        "runs": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--only", nargs="*", choices=ROWS, help="rows to run; all if not given")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/mnist"), help="folder for checkpoints and files")
    parser.add_argument("--validation", type=int, default=0)
    parser.add_argument("--gamma", type=float)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.only or ROWS:
        recipe = replace(ROWS[name], data_dir=args.data_dir, validation=args.validation)
        if args.gamma is not None:
            recipe = replace(recipe, gamma=args.gamma)
        if args.epochs is not None:
            recipe = replace(recipe, epochs=args.epochs)
        args.runs.mkdir(parents=True, exist_ok=True)
        record = summarize(name, recipe, [run(name, replace(recipe, seed=seed), args.runs) for seed in args.seeds])
        print(json.dumps({k: v for k, v in record.items() if k not in ("runs", "recipe")}, indent=2), flush=True)
        if not args.validation:
            RECORDS.mkdir(exist_ok=True)
            (RECORDS / f"mnist_{name}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
