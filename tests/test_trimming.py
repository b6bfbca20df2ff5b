"""What is trimmed fits, and nothing cheaper would have: against all choices of a small layer, one by one."""

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from selfcompress import SelfCompressor
from selfcompress.fitting import fit_levels
from selfcompress.packing import pack
from selfcompress.rate import PriceTable
from selfcompress.trimming import least, trim


def layer(weight: Tensor, **options: str) -> SelfCompressor:
    """A compressor of one linear layer whose levels are steps of 1/16 in every row."""
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    compressor = SelfCompressor(model, (torch.zeros(1, weight.shape[1]),), **options)  # type: ignore[arg-type]
    (tensor,) = compressor.compressed
    with torch.no_grad():
        tensor.quantizer.exponent.fill_(-4.0)
        tensor.quantizer.bits.fill_(6.0)
        tensor.original.copy_(weight / 16)
    return compressor


def levels_left(compressor: SelfCompressor) -> float:
    return float(sum(c.levels().abs().sum() for c in compressor.compressed))


def test_what_fits_is_left_as_it_is() -> None:
    compressor = layer(torch.randn(4, 6) * 3)
    before = compressor.compressed[0].original.detach().clone()
    assert trim(compressor.compressed, lambda: 10.0, 10.0) == 0
    assert torch.equal(compressor.compressed[0].original, before)


@pytest.mark.parametrize("taken", [1, 2, 4])
def test_the_levels_that_go_are_those_with_the_least_error_for_a_bit(taken: int) -> None:
    torch.manual_seed(0)
    weight = torch.tensor([[0.55, 1.4, 0.0, -0.9], [-0.7, 0.1, 2.3, 1.49], [0.2, -3.1, 0.6, 0.0]])
    compressor = layer(weight)
    (tensor,) = compressor.compressed
    levels = tensor.levels()
    table = PriceTable(fit_levels(levels), levels)

    def cost(choice: tuple[tuple[int, int], ...]) -> float:
        """Squared levels of error that a choice adds, per bit that it saves, of its dearest member."""
        worst = 0.0
        for i, j in choice:
            k, u = abs(float(levels[i, j])), abs(float(weight[i, j]))
            saved = float(table.first[i, j]) if k == 1 else float(table.further[i, 0])
            worst = max(worst, ((u - k + 1) ** 2 - (u - k) ** 2) / saved)
        return worst

    living = [(i, j) for i, j in itertools.product(range(3), range(4)) if levels[i, j] != 0]
    best = min(itertools.combinations(living, taken), key=cost)
    total = levels_left(compressor)
    assert trim(compressor.compressed, lambda: levels_left(compressor), total - taken) == taken
    lowered = levels.abs() - tensor.levels().abs()
    assert {(int(i), int(j)) for i, j in lowered.nonzero()} == set(best)
    assert lowered.max() == 1


@pytest.mark.parametrize(
    ("shape", "most"),
    [
        (lambda number, root: root - number, 8),
        (lambda number, root: math.exp(-number / 6e5) - math.exp(-root / 6e5), 10),
        (lambda number, root: float(math.ceil((root - number) / 500)), 22),
        (lambda number, root: 1.0 if number < root else -1e-9, 22),
    ],
    ids=["straight", "bent", "steps", "cliff"],
)
def test_the_least_that_fits_is_found_in_few_questions(shape: Callable[[int, float], float], most: int) -> None:
    """21 are those of a bisection."""
    randoms = random.Random(0)
    for count in (1, 2, 3, 10, 1000, 1_700_000):
        for root in (1e-3, *(randoms.uniform(0, count) for _ in range(20)), count - 1e-3):
            asked: list[int] = []

            def excess(number: int, root: float = root, asked: list[int] = asked) -> float:
                asked.append(number)
                return shape(number, root)

            found = least(excess, count, shape(0, root), shape(count, root))
            assert shape(found, root) <= 0 < shape(found - 1, root)
            assert len(asked) <= math.ceil(math.log2(count)) + 1
            assert len(asked) <= most or not 1 < root < count - 1
            assert all(0 < number < count for number in asked)


def test_where_one_level_less_is_not_enough_steps_grow() -> None:
    torch.manual_seed(0)
    compressor = layer(torch.randn(8, 12) * 200)
    (tensor,) = compressor.compressed
    tensor.quantizer.bits.data.fill_(12.0)
    wanted = 0.7 * levels_left(compressor)
    before = tensor.original.detach().clone()
    trim(compressor.compressed, lambda: levels_left(compressor), wanted)
    assert 0.97 * wanted < levels_left(compressor) <= wanted
    assert bool((tensor.quantizer.exponent > -4).any())
    # the weights themselves are hardly moved: by half a step at most
    step = torch.exp2(tensor.quantizer.used_exponent())[:, None]
    assert bool(((tensor.original - before).abs() <= step).all())


def test_what_can_not_fit_ends_with_zeros() -> None:
    compressor = layer(torch.tensor([[2.0, -1.0], [1.0, 0.0]]))
    trim(compressor.compressed, lambda: 5.0, 1.0)
    assert levels_left(compressor) == 0


@pytest.mark.parametrize("options", [{}, {"rate": "bit-depth"}])
@pytest.mark.parametrize("share", [0.95, 0.5])
def test_the_file_of_a_network_fits_and_is_not_much_smaller(options: dict[str, str], share: float) -> None:
    torch.manual_seed(0)
    compressor = layer(torch.randn(40, 60) * 2, **options)
    limit = math.floor(share * len(pack(compressor.model)))
    signs = compressor.compressed[0].levels().sign()
    trim(compressor.compressed, lambda: len(pack(compressor.model)), limit)
    assert limit - 12 <= len(pack(compressor.model)) <= limit
    after = compressor.compressed[0].levels()
    assert bool(((after.sign() == signs) | (after == 0)).all())
