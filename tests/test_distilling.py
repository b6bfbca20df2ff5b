"""The loss against a teacher: what it is by hand, and what it takes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from selfcompress import distillation_loss
from selfcompress.errors import UsageError

OUTPUTS = torch.tensor([[1.0, -0.5, 0.25], [0.0, 2.0, -1.0]], dtype=torch.float64)
TEACHER = torch.tensor([[3.0, 0.0, -1.0], [0.5, 0.5, 4.0]], dtype=torch.float64)
TARGETS = torch.tensor([0, 2])


def probabilities(logits: Tensor, temperature: float) -> list[list[float]]:
    rows = [[math.exp(z / temperature) for z in row] for row in logits.tolist()]
    return [[e / sum(row) for e in row] for row in rows]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_what_the_formula_says(share: float, temperature: float) -> None:
    labels = -sum(math.log(p[t]) for p, t in zip(probabilities(OUTPUTS, 1.0), TARGETS.tolist(), strict=True)) / 2
    pairs = zip(probabilities(TEACHER, temperature), probabilities(OUTPUTS, temperature), strict=True)
    divergence = sum(t * math.log(t / o) for ts, os in pairs for t, o in zip(ts, os, strict=True)) / 2
    found = distillation_loss(OUTPUTS, TEACHER, TARGETS, share=share, temperature=temperature)
    assert float(found) == pytest.approx((1 - share) * labels + share * temperature**2 * divergence, rel=1e-12)


def test_positions_of_a_text_are_predictions_like_any_other() -> None:
    wide = [values.reshape(1, 2, -1) for values in (OUTPUTS, TEACHER)]
    found = distillation_loss(*wide, TARGETS.reshape(1, 2))
    assert torch.equal(found, distillation_loss(OUTPUTS, TEACHER, TARGETS))


def test_nothing_is_learned_by_the_teacher() -> None:
    outputs, teacher = OUTPUTS.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    distillation_loss(outputs, teacher, TARGETS).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None
    assert outputs.grad is not None
    assert outputs.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"share": 1.5}, "`share`: expected a number of 0 … 1, got `1.5`"),
        ({"share": math.nan}, "`share`: expected a number of 0 … 1, got `nan`"),
        ({"temperature": 0.0}, "`temperature`: expected a number > 0, got `0.0`"),
        ({"teacher_outputs": TEACHER[:, :2]}, r"expected the shape of the outputs, \(2, 3\), found \(2, 2\)"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        distillation_loss(**{"outputs": OUTPUTS, "teacher_outputs": TEACHER, "targets": TARGETS, **change})
