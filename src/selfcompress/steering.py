"""Makes a network land on a target: measures what a `Budget` has to know, and trims what is over it at the end.

Until the first update γ is 0, so that the gradients seen are those of the loss alone: their size, over that of the
price, is where γ starts from. Over the last steps of the run levels that are over the target are taken away, while
training can still make up for it, and after the last step whatever is left of them: then by the file itself.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .axes import Axes
from .budget import Budget
from .container import needed_bytes
from .converting import Compressed
from .packing import contents_of
from .shrinking import Kept, apply_plan, find_dead
from .trimming import trim

UPDATES = 60
"""How often γ is set anew in a run, at least: more often only where the models are fitted more often."""
TRIMMING = 0.97
"""Share of the run after which levels are taken away."""
TRIMMED = 0.995
"""Down to this share of the target, because the size that is looked at until the last step is an estimate."""
TOO_MUCH = 1.1
"""Size, in targets, from which on trimming is worth a word: up to a tenth training mostly makes up for, more is a sign
that the run was too short."""


class Steering:
    """Sets γ and trims.

    Args:
        budget: says what γ should be.
        compressed: tensors that levels can be taken from.
        priced: the parameters whose gradients say how loss and price compare.
        refresh_every: steps between two fits of the probability models.
    """

    def __init__(
        self, budget: Budget, compressed: Sequence[Compressed], priced: Sequence[nn.Parameter], refresh_every: int
    ) -> None:
        self.budget = budget
        self.every = max(1, min(refresh_every, budget.total_steps // UPDATES))
        self._compressed, self._priced = compressed, priced
        self._scale = 1.0
        self._gradients: dict[int, Tensor] = {}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._see)  # type: ignore[no-untyped-call]
            for p in priced
            if p.requires_grad
        ]

    def note_scale(self, scale: float) -> None:
        """Say by what the whole loss was multiplied on its way back, as for half precision or accumulation."""
        self._scale = abs(scale) or 1.0

    def _see(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._gradients[id(parameter)] = (
            parameter.grad.abs().sum()
        )  # not looked at here: an accelerator would have to wait

    def due(self, step: int) -> bool:
        """Whether something is to be done after this step."""
        total = self.budget.total_steps
        return step <= total and (step % self.every == 0 or step == total)

    def update(self, step: int, size_bytes: float, price: Callable[[], Tensor]) -> float:
        """γ from here on, at this size; `price` computes Q."""
        if self.budget.started:
            return self.budget.update(step, size_bytes)
        gradients = torch.autograd.grad(price(), self._priced, allow_unused=True)
        of_price = sum(float(g.abs().sum()) for g in gradients if g is not None)
        of_loss = sum(map(float, self._gradients.values())) / self._scale
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._gradients = [], {}
        return self.budget.start(step, size_bytes, of_loss / of_price if of_price > 0 and of_loss > 0 else 1.0)

    def trim(self, step: int, size_bytes: float, size_of: Callable[[], float], file_bytes: Callable[[], int]) -> int:
        """Take away levels that are over the target, late in the run.

        Args:
            step: training steps done.
            size_bytes: the size that training has come to.
            size_of: computes the size now, perhaps by an estimate.
            file_bytes: computes the bytes of the file.

        Returns:
            The number of weights that lost a level.
        """
        if step < TRIMMING * self.budget.total_steps:
            return 0
        self.budget.left_over = max(self.budget.left_over, size_bytes / self.budget.target_bytes)
        changed = trim(self._compressed, size_of, TRIMMED * self.budget.target_bytes)
        if step == self.budget.total_steps:
            changed += trim(self._compressed, file_bytes, self.budget.target_bytes)
        return changed

    @property
    def unmet(self) -> tuple[str, ...]:
        """Once levels have been taken away, a line where these were so many that accuracy is likely to suffer."""
        if self.budget.left_over <= TOO_MUCH:
            return ()
        times, steps = self.budget.left_over, self.budget.total_steps
        return (
            f"the target of size was not met by training, which came to {times:.2f} times it: the rest was taken away "
            f"at the end of {steps:,} steps, and accuracy with it; more epochs or a larger target leave less to take",
        )


def smallest_bytes(model: nn.Module, axes: Axes, attach: Callable[[nn.Module], object]) -> int:
    """Bytes of the smallest file that a network can become: everything cut or zero that can be.

    What stays are names and shapes, one channel of each layer, and all that is left in float.

    Args:
        model: the network as it was found; it is copied.
        axes: what was found on it.
        attach: puts the quantizers on a network, in place.
    """
    small = copy.deepcopy(model)
    attach(small)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    kept = Kept.full(axes)
    apply_plan(find_dead(small, axes, kept), small, axes, kept)
    return needed_bytes(contents_of(small))
