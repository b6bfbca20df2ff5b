"""What a training step costs with quantizers and penalty, over the plain float step, before anything is removed.

    python bench/step_cost.py --out bench/records/step_cost.json

Batch 128 of 3 × 32 × 32, Adam, all threads that torch takes. Float and compressing steps alternate in one process, so
that a machine that slows down slows both; the ratio is that of the medians. Fits of the probability models and looks
for dead channels fall due every 50 steps: a round has that many, so that it pays for them in full.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from selfcompress import SelfCompressor
from selfcompress.recipes.networks import build_network
from selfcompress.scoring import describe_machine, describe_versions

BATCH = 128


def float_step(network: str, width: int | None, batch: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], None]:
    model = build_network(network, input_shape=(3, 32, 32), num_classes=10, width=width).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def step() -> None:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def compressing_step(
    network: str, width: int | None, rate: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> Callable[[], None]:
    model = build_network(network, input_shape=(3, 32, 32), num_classes=10, width=width).train()
    # a tiny gamma and learning rate: all costs, nothing removed
    compressor = SelfCompressor(model, (batch[0][:2],), gamma=1e-6, rate=rate)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(compressor.param_groups(lr=1e-5, format_lr=1e-6))

    def step() -> None:
        loss = F.cross_entropy(model(batch[0]), batch[1]) + compressor.penalty()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if compressor.step(optimizer):
            raise RuntimeError("a channel was cut: the comparison is void")

    return step


def seconds(step: Callable[[], None], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet9")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50, help="steps a round; looks and fits fall due every 50")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    batch = (torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,)))
    steps = {"float": float_step(args.network, args.width, batch)}
    for rate in ("code-length", "bit-depth"):
        steps[rate] = compressing_step(args.network, args.width, rate, batch)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        seconds(step, 3)
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, args.steps))
    median = {name: statistics.median(values) for name, values in times.items()}
    record = {
        "command": f"python bench/step_cost.py --network {args.network} --width {args.width}",
        "batch": BATCH,
        "seconds_per_step": times,
        "median_s": median,
        "ratio_to_float": {name: value / median["float"] for name, value in median.items()},
        "threads": torch.get_num_threads(),
        "machine": describe_machine(torch.device("cpu")),
        "versions": describe_versions(),
    }
    print(json.dumps(record, indent=2))
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
