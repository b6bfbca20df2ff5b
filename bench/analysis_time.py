"""How long finding the classes of channels takes, against the number of operators: networks of one kind, ever deeper.

    python bench/analysis_time.py                # into bench/records/analysis_time.json; prints the table
    python bench/zoo.py --table                  # puts it into docs/zoo.md

Needs timm (`--path FOLDER` adds a folder to look for it in). Operators are the calls of ATen of one run. Times are
processor time of one thread, of analysis and trials together.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness import RECORDS
from selfcompress.axes import find_axes
from selfcompress.scoring import describe_machine, describe_versions
from selfcompress.trial import tried

RECORD = RECORDS / "analysis_time.json"


def vision_transformer(depth: int) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model("vit_tiny_patch16_224", depth=depth)
    return network


def resnet(depth: int) -> nn.Module:
    import timm

    network: nn.Module = timm.models.resnet.ResNet(block=timm.models.resnet.Bottleneck, layers=[depth] * 4)
    return network


def swin(depth: int) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 2, depth, 2))
    return network


KINDS: dict[str, tuple[Callable[[int], nn.Module], Sequence[int]]] = {
    "vision transformer, blocks": (vision_transformer, (6, 12, 24, 48)),
    "ResNet, bottlenecks a stage": (resnet, (2, 4, 8, 16)),
    "Swin, blocks of the third stage": (swin, (6, 12, 24, 48)),
}


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def measure(network: nn.Module) -> dict[str, Any]:
    inputs = (torch.randn(2, 3, 224, 224),)
    with torch.no_grad(), Counted() as counted:
        network(*inputs)
    start = time.process_time()
    axes = tried(network, inputs, find_axes(network, inputs))
    return {"operators": counted.calls, "seconds": time.process_time() - start, "classes": len(axes.classes)}


def lines(record: dict[str, Any]) -> list[str]:
    """The table, in Markdown."""
    found = ["| networks of one kind | operators | seconds | milliseconds an operator |", "|---|---|---|---|"]
    for kind, rows in record["kinds"].items():
        cells = [
            f"{kind}: {', '.join(str(r['depth']) for r in rows)}",
            ", ".join(f"{r['operators']:,}" for r in rows).replace(", ", " / "),
            " / ".join(f"{r['seconds']:.1f}" for r in rows),
            " / ".join(f"{1000 * r['seconds'] / r['operators']:.1f}" for r in rows),
        ]
        found.append(f"| {' | '.join(cells)} |")
    return found


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Options of the scripts that need networks which other people wrote."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", action="append", default=[], help="folders in which to look for the zoos")
    parser.add_argument("--before", help="a module to import first, such as one that makes torchvision importable")
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Make the zoos importable, as these options say, and the times those of one thread."""
    sys.path[:0] = args.path
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.before:
        __import__(args.before)


def main() -> None:
    prepare(parser_of(__doc__).parse_args())
    kinds = {kind: [{"depth": n, **measure(make(n))} for n in depths] for kind, (make, depths) in KINDS.items()}
    record = {"kinds": kinds, "machine": describe_machine(), "versions": describe_versions()}
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print("\n".join(lines(record)))


if __name__ == "__main__":
    main()
