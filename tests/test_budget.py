"""Targets against arithmetic by hand; the controller against plants whose laws are written here, not taken from it."""

import math
import random
from itertools import pairwise

import pytest

from selfcompress.budget import Budget, parse_target
from selfcompress.errors import UsageError


@pytest.mark.parametrize(
    ("target", "size"),
    [
        (1, 1),
        (200_000, 200_000),
        ("900", 900),
        ("900 B", 900),
        ("200 kB", 200_000),
        ("200kb", 200_000),
        (" 1.5 MB ", 1_500_000),
        ("1 KiB", 1024),
        ("2 MiB", 2 * 1024**2),
        ("0.001 GB", 1_000_000),
        ("2 %", 8_000),
        ("0.5%", 2_000),
        ("100 %", 400_000),
        ("0.5 bits/weight", 6_250),
        ("1 bit/weight", 12_500),
        (".5 bpw", 6_250),
    ],
)
def test_a_target_in_any_unit_is_the_bytes_that_it_says(target: int | str, size: int) -> None:
    assert parse_target(target, float_bytes=400_000) == size  # 100,000 numbers of 32 bits


@pytest.mark.parametrize(
    "target",
    ["", "small", "-1 kB", "2 % of it", "1e3", "kB", "1 TB", "0", 0, -5, True, 0.02, None, "0.0001 %", "1,5 kB"],
)
def test_what_is_no_size_is_refused(target: object) -> None:
    with pytest.raises(UsageError, match="target: expected"):
        parse_target(target, float_bytes=100_000)  # type: ignore[arg-type]


class Plant:
    """A network as the controller sees it: ln(size) runs after start - slope·ln(γ / knee), slowly, slower upwards."""

    def __init__(self, first: float, slope: float, delay: float, knee: float, growth: float, noise: float) -> None:
        self.first, self.slope, self.delay, self.knee, self.growth = first, slope, delay, knee, growth
        self.now, self.at = first, 0.0
        self.noise, self.random = noise, random.Random(1)

    def after(self, gamma: float, passed: float) -> float:
        """The size once a share `passed` of the run went by at this γ."""
        rest = self.first - self.slope * math.log1p(gamma / self.knee)
        delay = self.delay if rest < self.now else self.delay / self.growth
        self.now += (rest - self.now) * (1 - math.exp(-passed * self.speed() / delay))
        self.at += passed
        return math.exp(self.now + self.random.gauss(0, self.noise))

    def speed(self) -> float:
        return 1.0


class ShortRun(Plant):
    """One of 1,400 steps: the size takes a fifth of it to answer, and longer as the learning rate falls."""

    def speed(self) -> float:
        return (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * max(0.0, (self.at - 0.2) / 0.8)))) ** 0.7


def steer(plant: Plant, budget: Budget, ratio: float, updates: int = 200) -> list[tuple[float, float]]:
    """Run the controller on a plant; returns size over path, and γ, at every update."""
    every = budget.total_steps // updates
    gamma = budget.start(every, math.exp(plant.first), ratio)
    course = []
    for step in range(2 * every, budget.total_steps + 1, every):
        size = plant.after(gamma, every / budget.total_steps)
        gamma = budget.update(step, size)
        course.append((size / budget.path(step), gamma))
    return course


@pytest.mark.parametrize("share", [0.3, 0.1, 0.02, 0.005])
@pytest.mark.parametrize("knee", [1e-4, 1.0, 1e4])  # the scale of the loss
@pytest.mark.parametrize("pull", [0.02, 0.1, 0.5])
@pytest.mark.parametrize(("slope", "delay", "growth"), [(0.5, 0.05, 1.0), (0.4, 0.1, 0.3), (0.8, 0.02, 0.1)])
def test_the_size_lands_on_the_target_whatever_the_scale_of_the_loss(
    share: float, knee: float, pull: float, slope: float, delay: float, growth: float
) -> None:
    first = 1e6
    plant = Plant(math.log(first), slope, delay, knee, growth, noise=0.003)
    holds = knee * (share ** (-1 / slope) - 1)  # the γ at which the plant stays at the target
    budget = Budget(int(share * first), 20_000)
    course = steer(plant, budget, ratio=holds / pull)
    sizes = [size for size, _ in course]
    assert all(0.97 < size < 1.03 for size in sizes[-8:])  # what is above is trimmed
    assert max(sizes[120:]) < 1.4  # it is behind a falling path, but not for long
    assert max(gamma for _, gamma in course) < 1.75 * holds  # what a higher γ takes away does not come back


@pytest.mark.parametrize(("share", "pull"), [(0.2, 0.02), (0.075, 0.12), (0.04, 0.3)])
def test_a_short_run_lands_too_with_little_to_trim(share: float, pull: float) -> None:
    plant = ShortRun(math.log(1e6), slope=0.75, delay=0.2, knee=1.0, growth=0.3, noise=0.0)
    holds = share ** (-1 / 0.75) - 1
    course = steer(plant, Budget(int(share * 1e6), 1_400), ratio=holds / pull, updates=60)
    assert 0.98 < course[-3][0] < 1.035
    assert max(gamma for _, gamma in course) < 3.4 * holds


@pytest.mark.parametrize(
    ("way", "total", "even", "lands"),
    [
        (4.0, 10_000, False, 0.65),
        (2.2, 10_000, False, 0.65),
        (2.0, 10_000, False, 3.25 * 0.242),  # little way to go: slowly
        (1.6, 10_000, False, 0.875),
        (4.0, 1_300, False, 3.25 * 300 / 1_300),  # few steps: slowly
        (4.0, 1_000, False, 0.875),
        (4.0, 10_000, True, 0.875),
    ],
)
def test_a_path_lands_early_where_there_is_time_for_it(way: float, total: int, even: bool, lands: float) -> None:
    budget = Budget(1_000, total, even=even)
    assert not budget.has_landed(total)  # it has not set out
    budget.start(0, 1_000 * math.exp(way), 1.0)
    assert budget.lands == pytest.approx(lands)


@pytest.mark.parametrize("pull", [0.003, 0.01, 0.1])
def test_what_hardly_has_to_fall_is_not_pushed_below_its_target(pull: float) -> None:
    plant = Plant(math.log(1e6), slope=0.5, delay=0.02, knee=1.0, growth=0.02, noise=0.003)
    holds = 0.8 ** (-1 / 0.5) - 1
    course = steer(plant, Budget(800_000, 20_000), ratio=holds / pull)
    assert min(size for size, _ in course) > 0.88
    assert course[-1][0] < 1.2  # what is above is trimmed


def test_the_path_falls_and_never_rises_and_ends_just_above_the_target() -> None:
    budget = Budget(1_000, 1_000)
    budget.start(5, 50_000.0, 1.0)
    path = [budget.path(step) for step in range(1_001)]
    assert path[0] == pytest.approx(50_000)
    assert path[-1] == pytest.approx(1_010)  # what is above is trimmed, and what is below is lost
    assert path == sorted(path, reverse=True)


def test_a_long_run_falls_as_at_a_fixed_gamma_and_a_short_or_an_even_one_straight() -> None:
    def left(total: int, even: bool, *at: float) -> list[float]:
        """Share of the way, in logarithms, that is left of it after these shares of a run."""
        budget = Budget(1_000, total, even=even)
        budget.start(0, 100_000.0, 1.0)
        return [math.log(budget.path(int(share * total)) / 1_000) / math.log(100) for share in at]

    exponential = pytest.approx([math.exp(-0.5), math.exp(-1), math.exp(-1.5)], abs=0.02)
    assert left(10_000, False, 0.1, 0.2, 0.3) == exponential
    above = math.log(1.2) / math.log(100)
    straight = pytest.approx([1 - 0.2 * (1 - above), 1 - 0.4 * (1 - above), 1 - 0.8 * (1 - above)], abs=0.001)
    assert left(10_000, True, 0.1, 0.2, 0.4) == left(300, False, 0.1, 0.2, 0.4) == straight
    assert all(
        a <= b + 0.003 for a, b in zip(left(10_000, False, 0.5, 0.7), left(10_000, True, 0.5, 0.7), strict=True)
    )  # nowhere above the straight one, but by what it lands above
    assert left(10_000, True, 0.875) == [0]


@pytest.mark.parametrize(("way", "time_constant"), [(4.0, 0.2), (2.2, 0.2), (2.0, 0.242), (1.6, 0.378125)])
def test_what_has_little_way_to_go_falls_more_slowly(way: float, time_constant: float) -> None:
    budget = Budget(100_000, 10_000)
    budget.start(0, 100_000 * math.exp(way), 1.0)
    assert math.log(budget.path(1_000) / 100_000) == pytest.approx(way * math.exp(-0.1 / time_constant), abs=1e-4)


def test_a_path_that_hardly_falls_does_not_leave_its_way_to_the_end() -> None:
    budget = Budget(100_000, 10_000)
    budget.start(0, 110_000.0, 1.0)
    assert budget.path(5_000) == pytest.approx(100_000 * 1.1**0.3)


def test_a_path_never_waits_before_it_lands() -> None:
    """Where it does, γ falls far before the size is to fall again, and rises too late."""
    for times in (1.1, 3, 10, 100):
        budget = Budget(1_000, 10_000)
        budget.start(0, 1_000.0 * times, 1.0)
        down = int(10_000 * budget.lands)
        sizes = [budget.path(step) for step in range(down // 2, down, 100)]
        assert times == 1.1 or all(a > b for a, b in pairwise(sizes))
        assert all(1_000 <= size <= 1_000 * times for size in sizes)
        assert budget.path(5_000) < 1_200.1
        assert budget.path(down) == budget.path(10_000) == pytest.approx(1_010)
        assert [budget.has_landed(step) for step in (0, down - 1, down, 10_000)] == [False, False, True, True]


def test_a_network_that_is_small_enough_is_left_alone() -> None:
    budget = Budget(10_000, 1_000)
    first = budget.start(5, 4_000.0, 1.0)
    assert budget.path(0) == budget.path(1_000) == pytest.approx(10_000)
    gammas = [first, *(budget.update(step, 4_000.0) for step in range(10, 1_000, 5))]
    assert gammas == sorted(gammas, reverse=True)


def test_what_grows_over_its_target_is_held_there() -> None:
    """The rest without γ is half as large again as the target; the network begins below it."""
    plant = Plant(math.log(150_000), slope=0.5, delay=0.05, knee=1.0, growth=0.5, noise=0.0)
    plant.now = math.log(87_000)
    holds = 1.5 ** (1 / 0.5) - 1
    budget = Budget(100_000, 1_400)
    gamma = budget.start(20, 87_000.0, holds / 0.002)
    sizes = []
    for step in range(40, 1_401, 20):
        sizes.append(plant.after(gamma, 20 / 1_400))
        gamma = budget.update(step, sizes[-1])
    assert max(sizes) < 115_000
    assert 0.97 < sizes[-1] / 100_000 < 1.03


@pytest.mark.parametrize(("start", "error", "times"), [(2_000, 0.02, 1.03), (2_000, 0.2, 1.27), (9_000, 0.05, 3.0)])
def test_gamma_falls_faster_the_nearer_to_the_target_it_is_below_the_path(
    start: int, error: float, times: float
) -> None:
    """Far above the target there is way to go still: a γ that falls there is too low to hold the target."""

    def change(error: float) -> float:
        """Of ln γ, while the size stays that far from the path, in logarithms."""
        budget = Budget(1_000, 10_000)
        budget.start(0, 100_000.0, 1.0)
        budget.gamma, budget.last_step = 1.0, start
        steps = range(start + 50, start + 550, 50)
        gammas = [budget.update(step, math.exp(error) * budget.path(step)) for step in steps]
        return -math.log(gammas[-1] / gammas[0])

    assert change(-error) == pytest.approx(-times * change(error), rel=0.03)


@pytest.mark.parametrize(("way", "total", "gain"), [(4.0, 10_000, 3.0), (4.0, 1_000, 4.5), (1.0, 10_000, 6.0)])
def test_gamma_answers_a_change_more_strongly_where_the_path_is_slow(way: float, total: int, gain: float) -> None:
    budget = Budget(1_000, total)
    first = budget.start(0, 1_000 * math.exp(way), 1.0)
    assert math.log(budget.update(1, budget.path(1) * 1.02) / first) == pytest.approx(gain * math.log(1.02), rel=0.01)


@pytest.mark.parametrize(("way", "share"), [(4.0, 0.25), (0.25, 0.64)])
def test_a_distance_from_the_path_counts_from_the_beginning_and_most_with_little_way_to_go(
    way: float, share: float
) -> None:
    budget = Budget(1_000, 10_000)
    budget.start(0, 1_000 * math.exp(way), 1.0)
    gammas = [budget.update(step, math.exp(0.1) * budget.path(step)) for step in range(100, 700, 100)]
    assert math.log(gammas[-1] / gammas[0]) == pytest.approx(60 * share * 0.1 * 0.05)


def test_gamma_rises_by_steps_that_are_bounded_and_falls_to_a_floor() -> None:
    budget = Budget(1_000, 1_000)
    first = budget.start(5, 1e6, 1.0)
    assert budget.update(10, 1e9) == pytest.approx(first * math.exp(0.5))
    for step in range(15, 1_000, 5):
        budget.update(step, 1.0)
    assert budget.gamma == pytest.approx(0.03 * first)


def test_a_size_that_was_below_its_path_for_half_of_a_run_lands_all_the_same() -> None:
    """As where a price of channels takes levels away, too: γ falls for want of anything to do, and has to come back."""
    plant = Plant(math.log(1e6), slope=0.5, delay=0.05, knee=1.0, growth=0.5, noise=0.0)
    budget = Budget(150_000, 12_000)
    holds = 0.15 ** (-1 / 0.5) - 1
    gamma = budget.start(60, 1e6, holds / 0.3)
    for step in range(120, 12_001, 60):
        size = plant.after(gamma, 60 / 12_000)
        gamma = budget.update(step, min(size, 200_000.0) if step < 6_000 else size)
    assert size < 1.05 * 150_000


def test_a_size_has_landed_with_its_path_or_it_has_not() -> None:
    for size, landed in ((1_000.0, True), (1_190.0, True), (1_250.0, False), (300.0, True)):
        budget = Budget(1_000, 10_000)
        budget.start(0, 50_000.0, 1.0)
        budget.update(7_000, size)
        assert budget.has_landed(7_000) == landed


def test_a_size_that_does_not_answer_is_not_pulled_at_ever_harder() -> None:
    budget = Budget(1_000, 1_000)
    budget.start(5, 1e6, 2.5)
    assert max(budget.update(step, 1e6) for step in range(10, 1_001, 5)) == pytest.approx(3 * 2.5)


def test_a_budget_goes_on_from_its_numbers() -> None:
    one = Budget(1_000, 1_000)
    one.start(5, 50_000.0, 2.0)
    one.update(10, 49_000.0)
    other = Budget(**one.to_dict())
    assert [one.update(s, 48_000.0 - s) for s in range(15, 100, 5)] == [
        other.update(s, 48_000.0 - s) for s in range(15, 100, 5)
    ]
