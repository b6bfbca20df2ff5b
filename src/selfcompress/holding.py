"""The end of a run: levels that flip to and fro are held, so that all others learn beside what is certain.

A weight that is best between two levels is pushed up while it is rounded down, and down while it is rounded up: it
crosses the middle again and again, as often at a small learning rate as at a large one, and every flip is noise for
the rest of the network (Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022). The price
of a level pulls many weights to just such a place. As proposed there, a weight that flips too often is held at the
level at which it mostly was. Formats must not learn any more: a step that changes rounds all its weights anew.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from .converting import Compressed
from .quantizer import from_rows, to_rows

FADING = 0.01
"""Weight of the newest step in the running means, of flips and of levels, once there are so many."""
OFTEN = 0.02
"""A weight that flips in so large a share of the steps is held …"""
BEFORE = 100
"""… but none before so many steps have been seen, since a mean of fewer says little."""


class Holding(Optimizer):
    """Watches the levels of tensors after each step, and holds those that flip often.

    An optimizer by torch's name: so what it remembers is cut with the network, saved and loaded as that of others.

    Args:
        compressed: the tensors.
    """

    def __init__(self, compressed: Sequence[Compressed]) -> None:
        self._compressed = compressed
        super().__init__([c.original for c in compressed], {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # there is no loss to ask for
        """Look at the levels, and put the weights that are held back to where they are held."""
        for c in self._compressed:
            levels, memory = c.levels(), self.state[c.original]
            if not memory:
                # all in the type of the weights: torch makes it that, whenever an optimizer's state is loaded
                memory |= {name: _shaped(c, levels.clone()) for name in ("last", "mean")}
                memory |= {name: torch.zeros_like(c.original) for name in ("flips", "held")}
                memory["seen"] = torch.zeros((), device=levels.device)
                continue
            last, mean, flips, held = (_matrix(c, memory[name]) for name in ("last", "mean", "flips", "held"))
            memory["seen"] += 1
            newest = (1 / memory["seen"]).clamp(min=FADING).to(flips)  # plain means at first
            flips = flips.lerp((levels != last).to(flips.dtype), newest)
            held = held > 0
            now = held | (flips > OFTEN) & (memory["seen"] >= BEFORE)
            mean = torch.where(held, mean, mean.lerp(levels, newest))
            mean = torch.where(now, mean.round(), mean)
            c.original.copy_(_shaped(c, torch.where(now, mean * _steps(c), c.rows())))
            last = torch.where(now, mean, levels)
            values = {"last": last, "mean": mean, "flips": flips, "held": now.to(mean.dtype)}
            memory |= {name: _shaped(c, value) for name, value in values.items()}

    @torch.no_grad()
    def let_go(self) -> None:
        """Stop holding weights that something else than the optimizer has moved since the last step."""
        for c in self._compressed:
            memory = self.state[c.original]
            if memory:
                mean, held = (_matrix(c, memory[name]) for name in ("mean", "held"))
                moved = (held > 0) & (c.rows() != mean * _steps(c))
                now = {"held": torch.where(moved, 0.0, held), "mean": torch.where(moved, c.levels(), mean)}
                now["flips"] = torch.where(moved, 0.0, _matrix(c, memory["flips"]))
                memory |= {name: _shaped(c, value) for name, value in now.items()}

    @property
    def held(self) -> int:
        """How many weights are held."""
        return sum(int(self.state[c.original]["held"].sum()) for c in self._compressed if self.state[c.original])


def _matrix(c: Compressed, value: Tensor) -> Tensor:
    """(C, n) what is remembered of each weight, one output channel per row."""
    return to_rows(value, c.quantizer.axis, c.quantizer.groups)


def _shaped(c: Compressed, rows: Tensor) -> Tensor:
    """The same in the shape of the weights."""
    return from_rows(rows, tuple(c.original.shape), c.quantizer.axis, c.quantizer.groups)


def _steps(c: Compressed) -> Tensor:
    """(C, 1) the steps between levels."""
    return torch.exp2(c.quantizer.used_exponent())[:, None]
