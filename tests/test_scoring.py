"""Scores, float files and counts against slow, obvious versions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfcompress import scoring
from selfcompress.errors import FormatError, UsageError


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def batches(count: int, sizes: tuple[int, ...] = (4, 7, 1)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(count)
    return [
        (torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes[:count]
    ]


def obvious_score(outputs: np.ndarray, targets: np.ndarray) -> tuple[int, int, float]:
    correct, loss = 0, 0.0
    for row, target in zip(outputs.astype(np.float64), targets, strict=True):
        correct += int(row.argmax() == target)
        loss += math.log(sum(math.exp(value) for value in row)) - row[target]
    return correct, len(targets), loss / len(targets)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_score_is_that_of_a_loop_over_single_examples(count: int) -> None:
    model = small_network()
    data = batches(count)
    score = scoring.score_model(model, data)

    model.eval()
    with torch.no_grad():
        outputs = model(torch.cat([x for x, _ in data])).numpy()
    correct, total, loss = obvious_score(outputs, torch.cat([y for _, y in data]).numpy())
    assert (score.correct, score.total) == (correct, total)
    assert score.loss == pytest.approx(loss, rel=1e-6)
    assert score.accuracy == correct / total
    assert score.error == pytest.approx(1 - correct / total)
    assert score.bits_per_prediction == pytest.approx(loss / math.log(2), rel=1e-6)


def test_every_character_of_a_text_is_one_prediction() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11))
    x, y = torch.randint(0, 11, (3, 5)), torch.randint(0, 11, (3, 5))
    with torch.no_grad():
        outputs = model(x).reshape(-1, 11).numpy()
    score = scoring.score_model(model, [(x, y)])
    correct, total, loss = obvious_score(outputs, y.reshape(-1).numpy())
    assert (score.correct, score.total, score.loss) == (correct, total, pytest.approx(loss, rel=1e-6))


@pytest.mark.parametrize("training", [True, False])
def test_scoring_changes_neither_mode_nor_running_statistics(training: bool) -> None:
    model = small_network().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scoring.score_model(model, batches(2))
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_batch_is_an_error_that_says_so() -> None:
    with pytest.raises(UsageError, match="expected at least one batch, got none"):
        scoring.score_model(small_network(), [])


def test_a_float_file_is_four_bytes_a_number_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = small_network()
    model(torch.randn(8, 6))  # running statistics that are not those of a fresh network
    path = tmp_path / "net.f32"
    size = scoring.save_float(model, path)
    assert size == path.stat().st_size == 4 * (6 * 5 + 5 + 4 * 5 + 5 * 3 + 3)

    torch.manual_seed(1)
    other = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    assert scoring.load_float(path, into=other) is other
    x = torch.randn(4, 6)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_a_float_file_of_another_network_is_refused(tmp_path: Path) -> None:
    scoring.save_float(nn.Linear(2, 3), tmp_path / "net.f32")
    with pytest.raises(FormatError, match="expected 20 bytes for this network, found 36"):
        scoring.load_float(tmp_path / "net.f32", into=nn.Linear(4, 1))


def test_counts_are_those_of_numpy() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3, 4))
    with torch.no_grad():
        model[0].weight[1] = 0  # a dead channel
        model[0].weight[0, 0, 0, 0] = 0
        model[2].weight[:, 1] = 0
        model[2].weight[3] = 0  # another
    weights = [model[0].weight.detach().numpy(), model[2].weight.detach().numpy()]
    counts = scoring.count_living(model)
    assert counts.weights_total == 2 * 3 * 4 + 3 * 4
    assert counts.weights_nonzero == sum(np.count_nonzero(w) for w in weights) == 24 - 8 - 1 + 6
    assert (counts.channels_alive, counts.channels_total) == (2 + 3, 3 + 4)


def test_a_stopwatch_measures_the_block() -> None:
    with scoring.Stopwatch(torch.device("cpu")) as watch:
        sum(range(10))
    assert 0 < watch.seconds < 5


def test_a_result_says_on_what_it_was_measured() -> None:
    assert {"system", "processor", "cores", "threads", "device"} <= set(scoring.describe_machine())
    assert scoring.describe_versions()["torch"] == torch.__version__


def test_multiply_accumulates_are_those_of_the_formulas() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, stride=2))
    images = (torch.zeros(1, 3, 10, 10),)
    assert scoring.count_macs(conv, images) == 100 * 8 * 3 * 9 + 16 * 8 * 2 * 9
    assert scoring.count_macs(small_network(), (torch.zeros(5, 6),)) == 5 * (6 * 5 + 5 * 3)


def test_counting_leaves_the_model_in_its_mode() -> None:
    model = small_network().train()
    before = model[2].running_mean.clone()
    scoring.count_macs(model, (torch.randn(5, 6),))
    assert model.training
    assert torch.equal(model[2].running_mean, before)
