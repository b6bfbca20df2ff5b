"""Does the file have the size that was asked for, and what does steering cost? Targets against fixed γ, per network.

    python bench/targets.py --data-dir DATA                    # everything; resumable, a finished run is not repeated
    python bench/targets.py --data-dir DATA --only lenet5 --targets "5 %" "2 %"
    python bench/targets.py --data-dir DATA --only lenet5 --no-fixed

Every target is one run, from the same start and with no option of its own. A target counts as met if the file has 0.97
to 1 times its bytes. The fixed γ of the same schedule are a curve of accuracy against bytes; a target's accuracy is
compared with that curve at the bytes of its own file, where the curve has points on both sides. Writes
`records/targets.json`, one entry for each network, and prints the table.
"""

import argparse
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from harness import LENET, MLP, RECORDS, RESNET, finish
from selfcompress.recipes.recipe import Recipe, default_recipe
from selfcompress.recipes.training import CHECKPOINT, train
from selfcompress.scoring import describe_machine, describe_versions

TASKS: dict[str, Recipe] = {
    "lenet-300-100": replace(MLP, epochs=10),
    "lenet5": replace(LENET, epochs=8),
    "resnet9": replace(RESNET, epochs=4),
    "gpt": replace(default_recipe("text", "gpt"), epochs=3, anneal=0.6),
    "digits": default_recipe("digits"),
}
TARGETS = ("30 %", "10 %", "5 %", "2 %", "1 %")
GAMMAS: dict[str, tuple[float, ...]] = {
    "lenet-300-100": (0.01, 0.05, 0.2, 0.8, 3.0),
    "lenet5": (0.01, 0.05, 0.2, 1.0, 4.0),
    "resnet9": (0.01, 0.05, 0.2, 0.6, 2.0),
    "gpt": (0.01, 0.03, 0.1, 0.3, 1.0),
    "digits": (0.01, 0.05, 0.2, 0.5, 1.5),
}
MET = (0.97, 1.0)


def run(name: str, recipe: Recipe, runs: Path) -> dict[str, Any]:
    folder = runs / name.replace(" ", "")
    result = finish(
        folder,
        lambda: train(
            recipe,
            folder,
            resume=(folder / CHECKPOINT).exists(),
            on_epoch=lambda r: print(f"{name}: {r.to_json()}", flush=True),
        ),
    )
    summary = result["summary"]
    found = {key: summary[key] for key in ("file_bytes", "float_bytes", "accuracy", "loss", "weights_alive")}
    return found | {"source": result["source"], "seed": recipe.seed}


def on_the_curve(fixed: list[dict[str, Any]], size: float) -> float | None:
    """Accuracy at this size between the two fixed γ around it, linear in the logarithm of the size."""
    points = sorted((p["file_bytes"], p["accuracy"]) for p in fixed)
    for (a, low), (b, high) in pairwise(points):
        if a <= size <= b:
            share = (math.log(size) - math.log(a)) / (math.log(b) - math.log(a)) if b > a else 0.0
            return float(low + share * (high - low))
    return None


def row(target: str, found: dict[str, Any], fixed: list[dict[str, Any]]) -> dict[str, Any]:
    share = float(target.rstrip(" %")) / 100
    asked = int(share * found["float_bytes"])
    accuracy = on_the_curve(fixed, found["file_bytes"])
    return found | {
        "target": target,
        "target_bytes": asked,
        "share_of_target": found["file_bytes"] / asked,
        "met": MET[0] <= found["file_bytes"] / asked <= MET[1],
        "fixed_gamma_accuracy": accuracy,
    }


def show(records: dict[str, Any]) -> None:
    print("| network | target | bytes asked for | file, bytes | share | met | accuracy, % | fixed γ, % |")
    print("|---|---|---|---|---|---|---|---|")
    for name, record in records.items():
        for r in record["targets"]:
            fixed = "" if r["fixed_gamma_accuracy"] is None else f"{100 * r['fixed_gamma_accuracy']:.2f}"
            print(
                f"| {name} | {r['target']} | {r['target_bytes']:,} | {r['file_bytes']:,} | {r['share_of_target']:.3f} "
                f"| {'yes' if r['met'] else 'no'} | {100 * r['accuracy']:.2f} | {fixed} |"
            )


def parser_of(doc: str | None, runs: str) -> argparse.ArgumentParser:
    """Options that this script and `tolerances.py` have in common."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--only", nargs="*", choices=TASKS, help="networks; all but `digits` if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path(runs))
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def main() -> None:
    parser = parser_of(__doc__, "runs/targets")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--no-fixed", action="store_true", help="leave out the runs of fixed γ")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.records / "targets.json"
    records: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in args.only or [n for n in TASKS if n != "digits"]:
        recipe = replace(TASKS[name], data_dir=args.data_dir, seed=args.seed)
        found = {t: run(f"{name}-{t}", replace(recipe, target=t), args.runs) for t in args.targets}
        gammas = () if args.no_fixed else GAMMAS[name]
        fixed = [run(f"{name}-gamma{g}", replace(recipe, gamma=g), args.runs) | {"gamma": g} for g in gammas]
        records[name] = {
            "command": f"python bench/targets.py --data-dir DATA --only {name}",
            "recipe": replace(recipe, data_dir=None).to_dict(),
            "targets": [row(t, f, fixed) for t, f in found.items()],
            "fixed": fixed,
            "machine": describe_machine(torch.device("cpu")),
            "versions": describe_versions(),
        }
        args.records.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records, indent=2) + "\n")
    show(records)


if __name__ == "__main__":
    main()
