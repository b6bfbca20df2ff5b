"""Channels that a residual sum keeps alive on one side only: does it pay to make the convolutions beside it narrow?

    python bench/one_sided.py                                  # -> bench/records/one_sided.json, about 5 minutes
    python bench/one_sided.py --shape 512x4 --seconds 1 --out try.json      # a part, quickly

Two residual blocks of two 3 × 3 convolutions, behind a first convolution, with the widths and image sizes of ResNet-9,
ResNet-20 and ResNet-18. In each block the second convolution writes zeros into a random share of the stream's
channels, and the first reads the same share with zero weights. `full` computes them, `narrow` is what
`exporting/onnx_narrow.py` makes of all four convolutions, in float and in int8. `taken` says how many of the four an
export would take, timed one by one.

Needs onnx, onnxscript and onnxruntime. Run it on a machine that does nothing else.
"""

import argparse
import json
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfcompress.exporting import compare_latency, sample
from selfcompress.exporting.onnx_float import to_onnx
from selfcompress.exporting.onnx_int8 import to_int8
from selfcompress.exporting.onnx_narrow import narrow
from selfcompress.exporting.rewriting import Arrays
from selfcompress.exporting.source import Levels
from selfcompress.scoring import describe_machine, describe_versions

RECORD = Path(__file__).parent / "records" / "one_sided.json"
SHAPES = ("16x32", "64x8", "128x16", "512x4", "64x56", "128x28", "256x14", "512x7")
"""Channels × pixels each way: two of ResNet-20, two of ResNet-9, four of ResNet-18."""


class Blocks(nn.Module):
    """A first convolution and two residual blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.into = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.out = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for into, out in zip(self.into, self.out, strict=True):
            x = torch.relu(x + out(torch.relu(into(x))))
        return x


def build(width: int, share: float) -> tuple[Blocks, dict[str, Levels]]:
    """Blocks of random levels, a share of which is gone on the branches, and the levels."""
    torch.manual_seed(0)
    model, levels = Blocks(width).eval(), {}
    gone = torch.randperm(width)[: round(share * width)]
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        values = torch.randint(-16, 17, module.weight.shape, dtype=torch.int16)
        assert module.bias is not None
        if name.startswith("into"):
            values[:, gone] = 0
        if name.startswith("out"):
            values[gone] = 0
            module.bias.data[gone] = 0
        step = torch.full((width, 1, 1, 1), 2.0**-4 / (3 * width**0.5))
        module.weight.data = values * step
        levels[f"{name}.weight"] = Levels(values, step)
    return model, levels


def always(before: bytes, after: bytes, inputs: Arrays) -> tuple[float, float]:
    """Take every convolution."""
    return 1.0, 0.0


def measure(shape: str, share: float, args: argparse.Namespace) -> dict[str, Any]:
    width, pixels = map(int, shape.split("x"))
    inputs = (torch.zeros(2, width, pixels, pixels),)
    model, levels = build(width, share)
    full = to_onnx(model, inputs)
    small, small_levels, _ = narrow(full, levels, inputs, always)
    notes = narrow(full, levels, inputs)[2]
    calibration = [sample(inputs, 4)]
    files = {
        "full": full,
        "narrow": small,
        "full, int8": to_int8(full, levels, calibration)[0],
        "narrow, int8": to_int8(small, small_levels, calibration)[0],
    }
    rows = compare_latency(
        {name: proto.SerializeToString() for name, proto in files.items()},
        inputs,
        batches=(1, 32),
        threads=(1,),
        runs=args.runs,
        seconds=args.seconds,
        with_memory=False,
    )
    latencies = [asdict(t) for row in rows for t in row.latencies]
    median = {(t["name"].removesuffix(", ONNX Runtime"), t["batch"]): t["median_s"] for t in latencies}
    faster = {
        f"{kind}, batch {batch}": median[f"full{ending}", batch] / median[f"narrow{ending}", batch]
        for kind, ending in (("float", ""), ("int8", ", int8"))
        for batch in (1, 32)
    }
    taken = sum(note.endswith(", taken") for note in notes)
    return {"shape": shape, "gone": share, "taken": taken, "narrow_is_faster_by": faster, "latencies": latencies}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--gone", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each shape, share and batch size")
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    record: dict[str, Any] = {
        "command": f"python bench/one_sided.py --runs {args.runs} --seconds {args.seconds:g} "
        f"--shape {' '.join(args.shape)} --gone {' '.join(map(str, args.gone))}",
        "machine": describe_machine(),
        "versions": describe_versions() | {n: metadata.version(n) for n in ("onnx", "onnxscript", "onnxruntime")},
        "rows": [],
    }
    for shape in args.shape:
        for share in args.gone:
            row = measure(shape, share, args)
            record["rows"].append(row)
            gains = " · ".join(f"{name} {gain:.2f} ×" for name, gain in row["narrow_is_faster_by"].items())
            print(f"{shape:7} {share:.0%} gone: {gains} · {row['taken']} of 4 taken", flush=True)
            args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
