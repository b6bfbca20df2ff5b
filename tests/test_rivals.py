"""The bench of other people's methods: each trains like our rows do, resumes, and is judged by its restored file."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfcompress import load
from selfcompress.container import LevelTensor, read, read_file
from selfcompress.errors import CheckpointError, UsageError
from selfcompress.recipes.datasets import load_dataset
from selfcompress.recipes.recipe import Recipe
from selfcompress.recipes.run_folder import CHECKPOINT
from selfcompress.recipes.training import EVALUATION_BATCH, settle_norms, train_float
from selfcompress.scoring import score_model

BENCH = str(Path(__file__).parent.parent / "bench")
sys.path.insert(0, BENCH)
try:
    import coders
    import rival
    import rival_diffq
    import rival_hgq
    import rivals
finally:
    sys.path.remove(BENCH)

RECIPE = Recipe(dataset="digits", network="lenet-300-100", width=48, gamma=0.0, epochs=4, batch_size=64, lr=4e-3)
NORMED = replace(RECIPE, network="resnet9", width=6)
METHODS = ("uniform-4", "diffq", "hgq", "prune-4bit")


def bring(method: str) -> None:
    """Skip the test where the method's package is not there."""
    try:
        if method in rivals.PACKAGES:
            rival.needed(method)
    except UsageError as error:
        pytest.skip(str(error))


class KilledError(Exception):
    """Stands for the end of the process."""


def run(folder: Path, method: str, recipe: Recipe = RECIPE, kill_after: int = 0, **setting: Any) -> dict[str, Any]:
    def on_epoch(record: Any) -> None:
        if record.epoch == kill_after:
            raise KilledError

    chosen = rivals.METHODS[method]
    value = setting.get(chosen.setting, chosen.default)
    name = {"method": method, chosen.setting: value}
    rivals.train_rival(lambda task: chosen.start(task, value), name, recipe, folder, on_epoch=on_epoch)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_without_a_method_it_is_float_training_bit_for_bit(tmp_path: Path) -> None:
    rivals.train_rival(rivals.Rival, {"method": "none"}, RECIPE, tmp_path / "rival")
    train_float(RECIPE, tmp_path / "ours")
    assert (tmp_path / "rival" / "net.f32").read_bytes() == (tmp_path / "ours" / "net.f32").read_bytes()
    taught = replace(RECIPE, optimizer="sgd", lr=0.1, weight_decay=5e-4, teacher=str(tmp_path / "ours"), epochs=2)
    rivals.train_rival(rivals.Rival, {"method": "none"}, taught, tmp_path / "taught rival")
    train_float(taught, tmp_path / "taught")
    files = [(tmp_path / name / "net.f32").read_bytes() for name in ("taught rival", "taught", "ours")]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("recipe", [RECIPE, NORMED], ids=["linear", "norms"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_reported_is_the_file(tmp_path: Path, method: str, recipe: Recipe) -> None:
    bring(method)
    result = run(tmp_path, method, replace(recipe, epochs=2))
    path = tmp_path / result["summary"]["file"]
    assert result["summary"]["file_bytes"] == path.stat().st_size

    dataset = load_dataset("digits")
    chosen = rivals.METHODS[method]
    torch.manual_seed(99)  # nothing of the run may be left in the weights that the file is restored into
    fresh = chosen.start(rivals.Task(replace(recipe, epochs=2, seed=99), dataset), chosen.default)
    score = score_model(fresh.restore(path), dataset.test_batches(EVALUATION_BATCH))
    assert score.accuracy == result["summary"]["accuracy"] == result["score"]["correct"] / result["score"]["total"]
    assert abs(score.correct - result["trained_score"]["correct"]) <= 2  # steps and statistics are rounded in the file
    assert score.accuracy > 0.2  # it has learned something: chance is a tenth


SGD = {"optimizer": "sgd", "lr": 0.1}


@pytest.mark.parametrize(
    ("method", "after", "changes"),
    [
        ("uniform-4", 1, {}),
        ("diffq", 1, {}),
        ("hgq", 1, {}),
        ("prune-4bit", 1, {}),  # while it prunes …
        ("prune-4bit", 3, {}),  # … and when it is done
        ("uniform-4", 1, SGD),
        ("diffq", 1, SGD),
        ("hgq", 1, SGD),
        ("prune-4bit", 3, SGD),
    ],
)
def test_a_run_that_was_killed_ends_in_the_same_file(
    tmp_path: Path, method: str, after: int, changes: dict[str, Any]
) -> None:
    bring(method)
    recipe = replace(RECIPE, **changes)
    whole = run(tmp_path / "whole", method, recipe)
    with pytest.raises(KilledError):
        run(tmp_path / "killed", method, recipe, kill_after=after)
    resumed = run(tmp_path / "killed", method, recipe)
    file = whole["summary"]["file"]
    assert resumed["summary"]["file"] == file
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()
    assert resumed["score"] == whole["score"]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_uniform_has_the_levels_of_its_bit_depth_and_all_weights(tmp_path: Path, bits: int) -> None:
    result = run(tmp_path, f"uniform-{bits}", replace(RECIPE, epochs=2))
    tensors = [r for r in read(read_file(tmp_path / "net.scn")).records if isinstance(r, LevelTensor)]
    assert [t.name for t in tensors] == ["fc1.weight", "fc2.weight", "fc3.weight"]
    levels = np.concatenate([t.levels.ravel() for t in tensors])
    assert levels.min() >= -(2 ** (bits - 1))
    assert levels.max() <= 2 ** (bits - 1) - 1
    assert len(np.unique(levels)) > 2 ** (bits - 1)
    assert result["summary"]["weights_alive"] == result["summary"]["weights_total"] == levels.size


def test_pruning_cuts_its_share_of_every_hidden_layer(tmp_path: Path) -> None:
    bring("prune-4bit")
    result = run(tmp_path, "prune-4bit", ratio=0.75)
    shapes = {r.name: r.shape for r in read(read_file(tmp_path / "net.scn")).records if isinstance(r, LevelTensor)}
    assert shapes == {"fc1.weight": (12, 64), "fc2.weight": (4, 12), "fc3.weight": (10, 4)}  # of 48 and 16
    assert result["summary"]["weights_alive"] == 12 * 64 + 4 * 12 + 10 * 4
    assert result["summary"]["weights_total"] == 48 * 64 + 16 * 48 + 10 * 16


def test_all_forms_of_diffq_hold_the_weights_it_computes_with(tmp_path: Path) -> None:
    bring("diffq")
    recipe = replace(NORMED, epochs=1)
    result = run(tmp_path, "diffq", recipe, penalty=100.0)
    forms = result["forms"]
    assert set(forms) == {f"{p}{s}" for p in ("packed", "plain") for s in ("", ".zlib", ".lzma")} | {"levels.scn"}
    assert None not in forms.values()
    assert result["summary"]["file_bytes"] == min(forms.values())
    rival = rivals.DiffQ(rivals.Task(recipe, load_dataset("digits")), 100.0)
    rival.load_state_dict(torch.load(tmp_path / CHECKPOINT, weights_only=True)["rival"])
    settle_norms(rival.model, rival.task.dataset, recipe, torch.device("cpu"))  # the file's are taken after training
    inputs = rival.task.dataset.example_inputs(8)[0]
    with torch.no_grad():
        wanted = rival.model.eval()(inputs)
        for form in forms:
            restored = rival.restore(tmp_path / f"net.{form}")
            assert not any("_diffq" in name for name, _ in restored.named_parameters())
            torch.testing.assert_close(restored(inputs), wanted, atol=0.02, rtol=0.02)  # norms are in half precision


@pytest.mark.parametrize("method", ["diffq", "hgq"])
def test_a_higher_penalty_makes_files_smaller(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(method)
    for module in (rival_diffq, rival_hgq):
        monkeypatch.setattr(module, "BITS_LR", 0.05)  # so that a hundred steps are enough to lose a bit
    sizes = [run(tmp_path / f"{p}", method, penalty=p)["summary"]["file_bytes"] for p in (0.0, 1000.0)]
    assert sizes[1] < sizes[0]


def test_all_forms_of_hgq_hold_the_weights_it_computes_with(tmp_path: Path) -> None:
    bring("hgq")
    recipe = replace(NORMED, epochs=1)
    result = run(tmp_path, "hgq", recipe)
    forms = result["forms"]
    assert set(forms) == {f"plain{s}" for s in ("", ".zlib", ".lzma")} | {"rows.scn", "steps.scn"}
    assert result["summary"]["file_bytes"] == min(forms.values())
    assert result["summary"]["weights_total"] == sum(p.numel() for p in rivals_network(recipe) if p.ndim >= 2)
    trained = rivals.HighGranularity(rivals.Task(recipe, load_dataset("digits")), 10.0)
    trained.load_state_dict(torch.load(tmp_path / CHECKPOINT, weights_only=True)["rival"])
    weights = trained.rounded()
    assert max(len(w.unique()) for w in weights.values()) > 16
    for form in forms:
        restored = dict(trained.restore(tmp_path / f"net.{form}").named_parameters())
        assert all(torch.equal(restored[name], value) for name, value in weights.items())


def rivals_network(recipe: Recipe) -> list[torch.nn.Parameter]:
    """The parameters of a recipe's network as it is built."""
    return list(rivals.Task(recipe, load_dataset("digits")).build().parameters())


SHAPES = st.sampled_from([(5, 7), (3, 2, 3, 3), (6,), (2, 1)])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), SHAPES, st.integers(0, 8), st.sampled_from([3, 40]))
def test_weights_of_any_bit_depths_and_steps_come_back(
    seed: int, shape: tuple[int, ...], bits: int, octaves: int
) -> None:
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(
        rng.integers(-(2**bits), 2**bits + 1, shape) * 2.0 ** rng.integers(-octaves, octaves, shape)
    )
    values = values.float()
    values.view(len(values), -1)[rng.integers(len(values))] = 0
    odd, exponents = rival_hgq.split(values)
    assert np.array_equal((odd * 2.0**exponents).ravel(), values.numpy().ravel())
    assert np.all((odd % 2 == 1) | (odd == 0))
    for records_of in (rival_hgq.steps_of, rival_hgq.rows_of):
        try:
            found = {record.name: record for record in records_of("weight", values)}
        except OverflowError:
            assert octaves > 3  # 2^8 in steps that are 2^5 apart have their places in 16 bits
            continue
        assert torch.equal(rival_hgq.weights_of(found, {"weight": values})["weight"].float(), values)


def test_another_setting_does_not_go_on_with_a_run(tmp_path: Path) -> None:
    run(tmp_path, "uniform-4", replace(RECIPE, epochs=1))
    with pytest.raises(CheckpointError, match="expected the run"):
        run(tmp_path, "uniform-8", replace(RECIPE, epochs=1))


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rival.PACKAGES, "diffq", rival.Package("no-such-package", "no_such_module"))
    with pytest.raises(UsageError, match=r"needs `no-such-package`(.|\n)*pip install --target"):
        rival.needed("diffq")


def test_a_record_has_all_that_those_of_our_rows_have(tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=1)
    results = [rivals.run("row", replace(recipe, seed=s), "uniform-2", 2, tmp_path) for s in (0, 1)]
    record = rivals.record_of("row", "command", recipe, results)
    ours = json.loads((Path(BENCH) / "records" / "lenet-300-100-code-length.json").read_text())
    assert ours.keys() <= record.keys()
    assert {"setting", "versions", "machine"} <= record.keys()
    assert ours["runs"][0]["summary"].keys() <= record["runs"][0]["summary"].keys()
    sizes = [(tmp_path / f"row-{s}" / "net.scn").stat().st_size for s in (0, 1)]
    assert record["file_bytes"]["mean"] == sum(sizes) / 2
    assert record["file_bytes"]["n"] == 2
    again = rivals.run("row", recipe, "uniform-2", 2, tmp_path)
    assert again == results[0]  # nothing is done twice
    with pytest.raises(CheckpointError, match="expected a run of"):
        rivals.run("row", replace(recipe, epochs=2), "uniform-2", 2, tmp_path)


def test_every_row_of_the_bench_has_a_task_of_train_py_and_our_file_loads_as_it_is(tmp_path: Path) -> None:
    sys.path.insert(0, BENCH)
    try:
        import train
    finally:
        sys.path.remove(BENCH)
    for recipe, _ in rivals.ROWS.values():
        assert any(replace(own, gamma=recipe.gamma) == recipe for own in train.ROWS.values())
    run(tmp_path, "uniform-4", replace(RECIPE, epochs=1))
    task = rivals.Task(RECIPE, load_dataset("digits"))
    load(tmp_path / "net.scn", into=task.build())


@pytest.mark.parametrize("name", list(coders.available()[0]))
def test_every_coder_gives_back_levels_of_all_shapes(name: str, rng: np.random.Generator) -> None:
    coder = coders.available()[0][name]
    shapes = [(7, 5, 9), (1, 1, 1), (3, 40, 1), (1, 200, 1), (12, 1, 25)]
    tensors = [
        (rng.standard_normal(shape) * size).round().astype(np.int16) for shape in shapes for size in (0, 0.4, 60)
    ]
    tensors[-2][3:5] = 0
    for chosen in (tensors, [t // 4 for t in tensors]):  # 16-bit and 8-bit ones
        back = coder.decode(coder.encode(chosen), [t.shape for t in chosen])
        assert all(np.array_equal(a, b) for a, b in zip(back, chosen, strict=True))
