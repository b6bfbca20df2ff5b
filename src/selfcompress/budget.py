"""γ that steers itself: along a planned path of sizes to a target, which the file then meets.

What is here: `parse_target` turns what a user says ("200 kB", "2 %", "0.5 bits/weight") into bytes; `Budget` says what
γ should be, told the size every so often. It knows nothing of networks: `steering.py` asks it, and `trimming.py` takes
away the little that is over the target at the end.

The path comes down as a network does at a fixed γ: exponentially in the logarithm of the size, with a time constant of
a fifth of the run, and longer for what is pulled at weakly, since it has little way to go; in a run that is too short
for that by the same factor in each step. It never waits, but goes over into a line that is at 1.2 times the target
after four sevenths of the time until it lands, 1 % above the target: after two thirds of a run that is long enough, so
that formats can settle and weights have time on fixed grids, and else later, but while the learning rate, which usually
falls there, can still answer. γ follows a PI controller on the logarithms:

    e = ln(size / path),   d ln γ = K_p·de + K_i·max(t, 1/4, 1 / (1 + w)²)·e·dt
    (t: share of the run; w = ln(first size / target), at least 0)

The size answers γ with a slope of -1/2 to -3/4 in logarithms, and a delay of a few percent of a long run, but of a
fifth of one of 1,400 steps (measured on the recipes). K_p is as much larger as this delay, and with it the time
constant of the path, is a larger share of the run. K_i grows with t, so that a network that is behind a steep path at
first goes its own way: a γ that forces it onto the path rises to several times the one that holds it at the target
later, and what that takes away does not come back. A path that hardly falls has no such beginning. γ starts at a small
share of the ratio of the two gradients, of the loss and of the size, so that the scale of the loss does not matter.
"""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from .errors import UsageError

UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
"""Bytes in each unit, by its name in lower case."""
BITS_PER_WEIGHT = ("bits/weight", "bit/weight", "bpw")
APPROACH = (4 / 7, math.log(1.2))
"""Share of the time until it lands after which the path has come down to so many factors e above the target …"""
PART = 0.3
"""… or to this part of the way where that is less, so that it does not leave the way to the end …"""
LANDS = (0.65, 0.875)
"""… and share of the run after which it lands, at least and at most. LeNet-5 on MNIST errs a fifth less where formats
settle after 0.7 of a run, and what falls all the way cannot settle."""
LANDS_AFTER = 3.25
"""Time constants after which it lands, within these bounds."""
LANDING = math.log(1.01)
"""It lands so many factors e above the target, so that little is left to be trimmed. Above, because what is below is
lost. It never rises: weights that have gone come back slowly."""
FALL, QUICKEST = 0.2, 300
"""Time constant of the path, as a share of the run, and the least that it is in steps. At a fixed γ networks have one
of 300 to 800 steps (measured on the recipes) …"""
FAR = 2.2
"""… if they fall by so many factors e or more; by fewer, it is longer by the square of how much fewer they are."""
START, LEAST_WAY = 0.01, 0.1
"""First γ, in ratios of gradients, for each factor e that the size has to fall by, and the least of these factors: what
hardly has to fall would be below its path at once, and comes back slowly; at no γ at all it grows far above its path,
and γ is too small to answer."""
PROPORTIONAL = (15.0, 3.0, 6.0)
"""K_p for each time constant of the path, as a share of the run, and its bounds. More than is needed does harm: γ falls
while the size catches up with the path, and then has yet to rise to where it holds the size."""
INTEGRAL, LEAST_URGENCY = 60.0, 0.25
"""K_i at the end of the run, and the least share of it before."""
BELOW = 3.0
"""K_i is so many times as large below the target, as it takes longer to grow than to shrink; between target and path in
proportion. Far above the target there is way to go still, and a γ that falls far is too low when it has to hold it."""
NEAR = math.log(1.2)
"""So many factors e the size is above its path at most for it to have landed with it; below it may be for good, where a
cost is the tighter target."""
STEEPEST = 0.5
LOWEST, HIGHEST = 0.03, 3.0
"""Bounds of γ, in first ones and in ratios of gradients. At the lower one it does nothing any more, and were it lower
still it would have too far to go when it is needed: where something else takes the size below its path for a time, such
as the price of a cost. At the upper one the size pulls three times as hard as the loss did at the start
(0.5 % of ResNet-9 asks for more than once): in a run that is too short for its target γ would rise on, unanswered,
until nothing of the network is left."""

_TARGET = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(.*?)\s*", re.DOTALL)


def amount_of(target: object) -> tuple[float, str]:
    """Number and unit of a target, the unit in lower case and without spaces; the unit `?` for what is neither."""
    if isinstance(target, int) and not isinstance(target, bool):
        return float(target), "b"
    match = _TARGET.fullmatch(target) if isinstance(target, str) else None
    return (float(match[1]), match[2].lower().replace(" ", "")) if match else (0.0, "?")


def parse_target(target: int | str, *, float_bytes: int) -> int:
    """The size that a user asks for, in bytes.

    Args:
        target: bytes (`200_000`, `"200 kB"`; 1 kB = 1000 bytes, 1 KiB = 1024), a share of the float network (`"2 %"`),
            or bits for each of its numbers (`"0.5 bits/weight"`).
        float_bytes: what the float network takes as raw 32-bit numbers.

    Raises:
        UsageError: not one of these, or less than one byte.
    """
    number, unit = amount_of(target)
    if unit in UNITS:
        size = number * UNITS[unit]
    elif unit == "%":
        size = number / 100 * float_bytes
    elif unit in BITS_PER_WEIGHT:
        size = number * float_bytes / 32
    else:
        raise UsageError(
            f"target: expected bytes, a share of the float network or bits per weight, found `{target}`\n"
            'hint: `200_000`, `"200 kB"`, `"2 %"` or `"0.5 bits/weight"`'
        )
    if not 1 <= size < math.inf:
        raise UsageError(f"target: expected 1 byte or more, found `{target}`, which is {size:g} bytes")
    return int(size)


@dataclass
class Budget:
    """What γ should be, so that a network ends at a size.

    Args:
        target_bytes: size to end at, >= 1.
        total_steps: training steps of the run, >= 1.
        steepest: by so much ln γ rises at most from one update to the next; it falls as fast as it likes.
        even: whether the path falls by the same factor in each step, however long the run, to the target itself: where
            states on the way are wanted, or where what is above the path is taken away.
    """

    target_bytes: int
    total_steps: int
    steepest: float = STEEPEST
    even: bool = False
    first_bytes: float = 0.0
    """Size at the first update; 0 before it."""
    gradient_ratio: float = 0.0
    """Of the mean absolute gradients of the loss and of Q with respect to the weights, at the first update."""
    gamma: float = 0.0
    error: float = 0.0
    """ln(size / path) at the last update."""
    last_step: int = 0
    left_over: float = 0.0
    """Largest size, in targets, that was trimmed at the end."""

    @property
    def started(self) -> bool:
        """Whether γ has a first value: 0 until `start`."""
        return self.first_bytes > 0

    def start(self, step: int, size_bytes: float, gradient_ratio: float) -> float:
        """Set out from a size.

        Args:
            step: training steps done.
            size_bytes: size now.
            gradient_ratio: see the attribute; >= 0.

        Returns:
            The first γ.
        """
        self.first_bytes, self.last_step = max(size_bytes, 1.0), step
        self.gradient_ratio = gradient_ratio
        self.gamma = self.first_gamma
        self.error = math.log(size_bytes / self.path(step))
        return self.gamma

    @property
    def first_gamma(self) -> float:
        """γ to set out with."""
        return START * max(self.way, LEAST_WAY) * self.gradient_ratio

    @property
    def way(self) -> float:
        """By so many factors e the size has to fall in all."""
        return max(math.log(self.first_bytes / self.target_bytes), 0.0)

    @property
    def time_constant(self) -> float:
        """That of the path where it falls exponentially, as a share of the run."""
        longer = max(1.0, FAR / max(self.way, LEAST_WAY)) ** 2
        return max(FALL, QUICKEST / self.total_steps) * longer

    @property
    def lands(self) -> float:
        """Share of the run after which the path has come down."""
        earliest, latest = LANDS
        return latest if self.even else min(max(LANDS_AFTER * self.time_constant, earliest), latest)

    def has_landed(self, step: int) -> bool:
        """Whether the path has come down by this step, and the size with it."""
        return self.started and step >= self.lands * self.total_steps and self.error <= NEAR

    def path(self, step: int) -> float:
        """The size planned for a step, in bytes."""
        at, way, lands = step / self.total_steps, self.way, self.lands
        end = 0.0 if self.even else min(LANDING, way)
        near, near_at = max(min(APPROACH[1], PART * way), end), APPROACH[0] * lands
        left = way - (way - near) * at / near_at
        if not self.even:
            left = min(left, way * math.exp(-at / self.time_constant))
        landing = near - (near - end) * (at - near_at) / (lands - near_at)
        return self.target_bytes * math.exp(max(left, landing, end))

    def update(self, step: int, size_bytes: float) -> float:
        """γ for the steps to come, after `step` steps, at a size of `size_bytes` now. To be called after `start`."""
        path = self.path(step)
        error = math.log(max(size_bytes, 1.0) / path)
        passed = (step - self.last_step) / self.total_steps
        urgency = max(step / self.total_steps, LEAST_URGENCY, 1 / (1 + self.way) ** 2)
        below = min(-error / max(math.log(path / self.target_bytes), 1e-9), 1.0) if error < 0 else 0.0
        integral = INTEGRAL * urgency * (1 + (BELOW - 1) * below)
        times, least, most = PROPORTIONAL
        proportional = min(max(times * self.time_constant, least), most)
        change = proportional * (error - self.error) + integral * error * passed
        gamma = self.gamma * math.exp(min(change, self.steepest))
        self.gamma = min(max(gamma, LOWEST * self.first_gamma), HIGHEST * self.gradient_ratio)
        self.error, self.last_step = error, step
        return self.gamma

    def to_dict(self) -> dict[str, Any]:
        """All numbers of the state. Inverse: `Budget(**values)`."""
        return asdict(self)
