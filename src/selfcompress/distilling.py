"""Distillation: a network that shrinks learns from the outputs of one that did not have to (Hinton, Vinyals and Dean
2015, arXiv 1503.02531).

A small network has room for what the labels say, but little to find it with; the probabilities that a good network
gives to the wrong classes say more of an example than its label does. The loss stays in nats per prediction, so that
gamma means what it means without a teacher.
"""

import torch.nn.functional as F
from torch import Tensor

from .errors import UsageError

SHARE = 0.7
TEMPERATURE = 3.0


def distillation_loss(
    outputs: Tensor,
    teacher_outputs: Tensor,
    targets: Tensor,
    *,
    share: float = SHARE,
    temperature: float = TEMPERATURE,
    label_smoothing: float = 0.0,
) -> Tensor:
    """A mean of two losses: against the labels, and against what a teacher answers.

        (1 - share)·cross_entropy(outputs, targets) + share·T²·KL(softmax(teacher_outputs / T) ‖ softmax(outputs / T))

    T² keeps the gradient of the second part at the scale of the first's (arXiv 1503.02531, section 2).

    Args:
        outputs: logits of the network in training, (..., classes).
        teacher_outputs: logits of the teacher for the same inputs, of the same shape. No gradient goes there.
        targets: class numbers, (...).
        share: weight of the teacher's part, 0 … 1.
        temperature: T, > 0. Higher ones tell more of the classes that are unlikely.
        label_smoothing: share of each label that is spread over all classes, in the first part only.

    Returns the loss, in nats per prediction. Raises `UsageError` for shapes that differ and values out of range.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> float(distillation_loss(logits, logits, torch.tensor([0, 1]), share=1.0))
        0.0
    """
    if outputs.shape != teacher_outputs.shape:
        raise UsageError(
            f"`teacher_outputs`: expected the shape of the outputs, {tuple(outputs.shape)}, "
            f"found {tuple(teacher_outputs.shape)}\nhint: give the teacher the same batch, and as many classes"
        )
    if not 0 <= share <= 1:
        raise UsageError(f"`share`: expected a number of 0 … 1, got `{share}`\nhint: 0.5 weighs both parts alike")
    if not 0 < temperature < float("inf"):
        raise UsageError(f"`temperature`: expected a number > 0, got `{temperature}`\nhint: 1 … 5 are usual")
    outputs, teacher_outputs = outputs.flatten(0, -2), teacher_outputs.detach().flatten(0, -2)
    labels = F.cross_entropy(outputs, targets.flatten(), label_smoothing=label_smoothing)
    teacher = F.kl_div(
        F.log_softmax(outputs / temperature, -1),
        F.log_softmax(teacher_outputs / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - share) * labels + share * temperature**2 * teacher
