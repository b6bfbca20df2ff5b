"""Run an exported file and the network it was made from on the same data, and compare."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ExportError, UsageError
from .running import run_file, runner_of
from .source import Source
from .unrounding import unrounded

TOLERANCE = 1e-5
"""How far float outputs may be apart, relative to the largest: sums are made in another order elsewhere."""


@dataclass(frozen=True)
class Check:
    """How an exported file compares with what it was made from."""

    total: int
    """Predictions: one per image, or one per character of text."""
    agreeing: int
    """Those whose most likely class is the same."""
    relative_error: float
    """Largest difference of two outputs, over the largest output."""
    correct: int
    """Predictions of the exported file that are right; 0 if the right ones were not given."""
    correct_before: int
    """The same of what it was made from."""


def check_export(
    path: str | os.PathLike[str],
    source: Source,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    exact: bool,
) -> Check:
    """Compare an exported file with its source.

    Args:
        path: the file.
        source: what it was made from.
        batches: (inputs, class numbers) for networks of one input.
        exact: whether it has to be the same function, up to the order of sums: all but int8. Where the source rounds
            activations, it is compared without that.

    Raises:
        ExportError: `exact`, and an output differs by more than 1e-5 of the largest, or another class is predicted.
        UsageError: there is no batch.
    """
    model = unrounded(source.model) if exact else source.model
    run, before = run_file(path, model), runner_of(model)
    total = agreeing = correct = correct_before = 0
    worst = largest = 0.0
    torn = 0
    for inputs, targets in batches:
        found, expected = run(inputs), before(inputs)
        worst = max(worst, float((found - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
        same = found.argmax(-1) == expected.argmax(-1)
        # where the two best classes are as close as rounding is, either is right
        best = expected.topk(min(2, expected.shape[-1]), -1).values
        torn += int((~same & (best[..., 0] - best[..., -1] <= 2 * TOLERANCE * largest)).sum())
        total += same.numel()
        agreeing += int(same.sum())
        correct += int((found.argmax(-1) == targets).sum())
        correct_before += int((expected.argmax(-1) == targets).sum())
    if not total:
        raise UsageError("check: expected at least one batch, found none\nhint: give a data set that is not empty")
    error = worst / largest if largest else worst
    if exact and not (error <= TOLERANCE and agreeing + torn == total):
        raise ExportError(
            f"`{path}`: expected outputs within {TOLERANCE:g} of the network's, found {error:.2g} and "
            f"{total - agreeing} of {total} predictions that differ\nhint: please report this with the network"
        )
    return Check(total, agreeing, error, correct, correct_before)


def sample(inputs: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """Inputs of the same shapes for a batch of this size: noise, or the first example's whole numbers again."""
    chance = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn([batch, *x.shape[1:]], generator=chance).to(x.dtype)
        if x.is_floating_point()
        else x[:1].repeat(batch, *[1] * (x.ndim - 1))
        for x in inputs
    )
