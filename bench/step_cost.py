"""What a training step costs with quantizers and penalty, over the plain float step: at the start, and after cuts.

    python bench/step_cost.py --out bench/records/step_cost.json
    python bench/step_cost.py --network lenet5 --after runs/mnist/lenet5-code-length-0/net.scn

Batch 128, Adam, all threads that torch takes. All kinds of step alternate in one process, so that a machine that slows
down slows all of them; a ratio is that of the medians over rounds. Fits of the probability models and looks for dead
channels fall due every 50 steps: a round has that many, so that it pays for them in full. `--after` adds the step of
the small network in a file, with a compressor attached anew: what a step costs at the end of the run that wrote it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import selfcompress as sc
from selfcompress.recipes.networks import build_network
from selfcompress.scoring import describe_machine, describe_versions

BATCH = 128
SHAPES = {"resnet9": (3, 32, 32), "resnet20": (3, 32, 32), "vgg16": (3, 32, 32)}
"""Shape of an image; (1, 28, 28) for all others."""
Batch = tuple[torch.Tensor, torch.Tensor]


def float_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-5)

    def step() -> None:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def compressing_step(model: nn.Module, rate: str, batch: Batch) -> Callable[[], None]:
    # a tiny gamma and learning rate: all costs, nothing removed
    compressor = sc.SelfCompressor(model.train(), (batch[0][:2],), gamma=1e-6, rate=rate)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(compressor.param_groups(lr=1e-7, format_lr=1e-7))

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
    parser.add_argument("--width", type=int, help="16 for resnet9, else the network's own")
    parser.add_argument("--after", type=Path, help="a .scn file of this network")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50, help="steps a round; looks and fits fall due every 50")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    width = 16 if args.network == "resnet9" and args.width is None else args.width
    shape = SHAPES.get(args.network, (1, 28, 28))
    torch.manual_seed(0)

    def build() -> nn.Module:
        return build_network(args.network, input_shape=shape, num_classes=10, width=width)

    images = torch.randn(BATCH, *shape[1:], shape[0]).permute(0, 3, 1, 2)  # channels last, as the data sets give them
    batch = (images, torch.randint(0, 10, (BATCH,)))
    steps = {"float": float_step(build(), batch)}
    for rate in ("code-length", "bit-depth"):
        steps[rate] = compressing_step(build(), rate, batch)
    if args.after:
        steps["code-length, after the cuts"] = compressing_step(sc.load(args.after, into=build()), "code-length", batch)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        seconds(step, 3)
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, args.steps))
    median = {name: statistics.median(values) for name, values in times.items()}
    options = f"--network {args.network}" + (f" --width {width}" if width else "")
    options += f" --after {args.after}" if args.after else ""
    record = {
        "command": f"python bench/step_cost.py {options} --rounds {args.rounds} --steps {args.steps}",
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
