"""Other people's methods on the tasks of `train.py`: bytes of a real file against the error of the restored file.

    python bench/rivals.py --data-dir DATA                                       # everything; resumable
    python bench/rivals.py --data-dir DATA --only resnet9-diffq --penalty 5 --seeds 0
    python bench/rivals.py --data-dir DATA --validation 10000 --runs runs/val --only lenet5-prune-4bit --ratio 0.7

A row is a task and a method. All rows of a task have the batches, epochs, augmentation, optimizer and schedule of the
learning rate of its rows in `train.py`, and start from the same weights. The methods:

- `uniform-8`, `-4`, `-2`: quantisation-aware training with one bit depth for all weights and a learned step per output
  channel, on the levels -2^(b-1) … 2^(b-1) - 1 (as LSQ, Esser et al. 2020); our quantizer with its bits frozen.
- `diffq`: the package of Défossez, Adi and Synnaeve (arXiv 2104.09987), a bit depth for each 8 weights. `--penalty` is
  the weight of the model's size in its loss, per 2^20 bytes; 10 is that of its README for a network of this size
  (ResNet-20). Biases, norms and tensors that do not split into groups of 8 are in half precision.
- `prune-4bit`: torch-pruning (Fang et al., CVPR 2023) cuts channels of least group norm, a few after every epoch of the
  first half, until `--ratio` of each layer's are gone; then 4 bits as above. The optimizer starts anew at every cut.

diffq's file is the smallest of what its package gives (bit-packed or not; as it is, through zlib, through lzma) and of
its levels in our coder; all sizes are in the record. `pip install --target FOLDER --no-deps diffq torch-pruning` and
FOLDER in PYTHONPATH bring the two packages; without them the other methods run.

A row with a setting of its own is named and recorded with it, such as `resnet9-diffq-5`.
"""

import argparse
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness import LENET, MLP, RECORDS, RESNET, RESNET_LONG, finish, keep, name_only, show, summarize
from selfcompress import SelfCompressor, load, save
from selfcompress.container import (
    Contents,
    LevelTensor,
    NormTensor,
    Number,
    RawTensor,
    Record,
    read,
    read_file,
    write,
    write_file,
)
from selfcompress.converting import plain_name
from selfcompress.errors import CheckpointError, NonFiniteError, UsageError
from selfcompress.fitting import fit_levels
from selfcompress.recipes.datasets import Dataset, load_dataset
from selfcompress.recipes.recipe import Recipe
from selfcompress.recipes.training import (
    CHECKPOINT,
    EVALUATION_BATCH,
    FILE,
    FLOAT_FILE,
    FORMAT_LR,
    RESULT,
    Result,
    build_for,
    groups_of,
    load_teacher,
    make_optimizers,
    settle_norms,
    task_loss,
)
from selfcompress.reporting import EpochRecord, RunSummary
from selfcompress.scoring import (
    Batch,
    Stopwatch,
    count_living,
    describe_machine,
    describe_versions,
    file_bytes,
    load_float,
    save_float,
    score_model,
)
from selfcompress.shrinking import sync_sizes

TASKS = {"lenet-300-100": MLP, "lenet5": LENET, "resnet9": RESNET, "resnet9-long": RESNET_LONG}
PACKAGES = {"diffq": "diffq", "prune-4bit": "torch-pruning"}
"""What a method needs beside this package: names on PyPI, which are those of the modules but for hyphens."""
DIFFQ_GROUP = 8
DIFFQ_BITS_LR = 1e-3


@dataclass(frozen=True)
class Task:
    """A recipe with its data in memory."""

    recipe: Recipe
    dataset: Dataset

    def build(self) -> nn.Module:
        return build_for(self.dataset, self.recipe.network, self.recipe.width)

    def batches(self) -> Iterator[Batch]:
        """The examples that scores are taken on."""
        return iter(self.dataset.test_batches(EVALUATION_BATCH))


class Rival:
    """A method: what it changes in training, and how it writes the network. This one changes nothing: float training.

    Attributes:
        model: what is trained, and scored during training.
        optimizers: their parameter groups carry their starting rates as `initial_lr`.
        compressor: our quantizers, once a method has attached them.
        forms: bytes of the network in each form that the method's file could have taken, by name.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model = task.build()
        self.start = count_living(self.model)
        self.float_bytes = float_bytes(self.model)
        self.compressor: SelfCompressor | None = None
        self.forms: dict[str, int | None] = {}
        matrices, vectors = (
            [p for p in self.model.parameters() if (p.ndim >= 2) == matrix] for matrix in (True, False)
        )
        decays = ((matrices, task.recipe.weight_decay), (vectors, 0.0))
        self.optimize([{"params": p, "lr": task.recipe.lr, "weight_decay": d} for p, d in decays if p])

    def optimize(self, groups: list[dict[str, Any]], formats: dict[str, Any] | None = None) -> None:
        """Make the recipe's optimizers for these parameter groups."""
        self.optimizers = make_optimizers(self.task.recipe, groups, formats, torch.device("cpu"))

    def quantize(self, bits: int) -> None:
        """Attach our quantizers with one frozen bit depth; steps are learned, biases stay in float."""
        recipe = self.task.recipe
        self.compressor = SelfCompressor(
            self.model,
            self.task.dataset.example_inputs(2),
            gamma=0.0,
            rate="bit-depth",
            grid="eq1",
            initial_bits=bits,
            check_every=0,
        )
        for tensor in self.compressor.compressed:
            tensor.quantizer.bits.requires_grad_(False)
        format_lr = FORMAT_LR if recipe.optimizer == "sgd" else 10 * recipe.lr
        groups = self.compressor.param_groups(lr=recipe.lr, weight_decay=recipe.weight_decay, format_lr=format_lr)
        for group in groups:
            group.pop("eps")  # the published method's; the other rows of the task have the optimizer's own
        self.optimize(groups[:-1], groups[-1])

    def begin(self, epoch: int) -> None:
        """Change the network before an epoch (from 1)."""

    def penalty(self) -> Tensor | float:
        """What is added to the loss of the task."""
        return self.compressor.penalty() if self.compressor is not None else 0.0

    def stepped(self) -> None:
        """Called after every step of the optimizer."""
        if self.compressor is not None:
            self.compressor.step(self.optimizers)

    def sizes(self) -> dict[str, Any]:
        """The part of an `EpochRecord` that says how big the network is now."""
        if self.compressor is not None:
            sizes = asdict(self.compressor.size())
        else:
            sizes = {**asdict(count_living(self.model)), "size_bytes": self.bytes_now()}
            sizes["weights_alive"] = sizes["weights_total"]
        return sizes | {"weights_total": self.start.weights_total, "channels_total": self.start.channels_total}

    def bytes_now(self) -> int:
        """Bytes of a network without our quantizers."""
        return float_bytes(self.model)

    def state_dict(self) -> dict[str, Any]:
        compressor = None if self.compressor is None else self.compressor.state_dict()
        model = None if compressor else self.model.state_dict()
        return {"model": model, "compressor": compressor, "optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.compressor is not None:
            self.compressor.load_state_dict(state["compressor"])
        else:
            self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)

    def write(self, folder: Path) -> Path:
        """Write the network's file."""
        if self.compressor is None:
            path = folder / FLOAT_FILE
            save_float(self.model, path)
        else:
            path = folder / FILE
            save(self.model, path, metadata=self.task.recipe.label)
        return path

    def restore(self, path: Path) -> nn.Module:
        """The network of a file, from nothing but the file and the code of the network."""
        fresh = self.task.build()
        return load_float(path, into=fresh) if path.name == FLOAT_FILE else load(path, into=fresh)


class Uniform(Rival):
    """Quantisation-aware training at one bit depth, from the first step on."""

    def __init__(self, task: Task, bits: int) -> None:
        super().__init__(task)
        self.quantize(bits)


class PruneThenQuantize(Rival):
    """Channels are cut during the first half of the epochs, the rest is trained at `bits` bits."""

    def __init__(self, task: Task, ratio: float, bits: int) -> None:
        super().__init__(task)
        if not 0 <= ratio < 1:
            raise UsageError(f"ratio: expected a share of the channels, 0 … 1, found {ratio}")
        if task.recipe.epochs < 2:
            raise UsageError("epochs: expected 2 or more, half of them to prune in, found 1")
        self.pruning = needed("prune-4bit")
        self.ratio, self.bits = ratio, bits
        self.cuts = task.recipe.epochs // 2

    def begin(self, epoch: int) -> None:
        cut = epoch - 1
        if 1 <= cut <= self.cuts:
            self._prune(cut)
        if cut == self.cuts:
            self.quantize(self.bits)

    def _prune(self, cut: int) -> None:
        """Cut number `cut`, from 1. What each takes depends on the network alone, so that a resumed run does the same.

        torch-pruning's own schedule over several steps counts from the network that its pruner was made with.
        """
        kept, before = (1 - self.ratio * n / self.cuts for n in (cut, cut - 1))
        outputs = [module for module in self.model.modules() if isinstance(module, nn.Linear)][-1]
        self.model.eval()  # the pruner runs the network: norms must not take that for data
        self.pruning.pruner.BasePruner(
            self.model,
            self.task.dataset.example_inputs(2),
            importance=self.pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1 - kept / before,
            ignored_layers=[outputs],
        ).step()
        self.model.zero_grad()
        groups = groups_of(self.optimizers)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        now = [p for p in (matrices, vectors) if p]
        self.optimize([{**group, "params": params} for group, params in zip(groups, now, strict=True)])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        tensors = state["model"] or state["compressor"]["model"]
        resize(self.model, {plain_name(name): tuple(value.shape) for name, value in tensors.items()})
        if state["compressor"] is not None:
            self.quantize(self.bits)
        super().load_state_dict(state)

    def restore(self, path: Path) -> nn.Module:
        """The file says the shapes that pruning left; the network is built, made so small, and filled in."""
        shapes: dict[str, tuple[int, ...]] = {}
        for record in read(read_file(path)).records:
            if isinstance(record, LevelTensor):
                shapes[record.name] = record.original_shape
            elif isinstance(record, RawTensor):
                shapes[record.name] = record.values.shape
            elif isinstance(record, NormTensor):
                names = ("weight", "bias", "running_mean", "running_var")
                shapes |= {f"{record.name}.{name}": record.scale.shape for name in names}
        fresh = self.task.build()
        resize(fresh, shapes)
        return load(path, into=fresh)


class DiffQ(Rival):
    """DiffQ, used as its README says: its quantizer, its penalty, its bits in an Adam at a rate of 1e-3."""

    def __init__(self, task: Task, penalty: float) -> None:
        super().__init__(task)
        if not 0 <= penalty < float("inf"):
            raise UsageError(f"penalty: expected a number of 0 or more, found {penalty}")
        self.package = needed("diffq")
        self.weight = penalty
        self.quantizer = self._attach(self.model)
        if task.recipe.optimizer == "sgd":
            self.optimizers.append(torch.optim.Adam([{"params": []}]))
        self.quantizer.setup_optimizer(self.optimizers[-1], lr=DIFFQ_BITS_LR)

    def _attach(self, model: nn.Module) -> Any:
        left = [
            f"{prefix}.{name}"
            for prefix, module in model.named_modules()
            for name, p in module.named_parameters(recurse=False)
            if not self._groups(p)
        ]
        return self.package.DiffQuantizer(model, min_size=0, float16=True, group_size=DIFFQ_GROUP, exclude=left)

    @staticmethod
    def _groups(parameter: Tensor) -> bool:
        """Whether a parameter is quantised: a weight that splits into groups."""
        return parameter.ndim >= 2 and parameter.numel() % DIFFQ_GROUP == 0

    def penalty(self) -> Tensor | float:
        size: Tensor = self.quantizer.model_size()
        return self.weight * size

    def bytes_now(self) -> int:
        """The package's own count, before any entropy coding."""
        return int(self.quantizer.true_model_size() * 2**20)

    def write(self, folder: Path) -> Path:
        """Write the smallest form that gives the network back, and return its path; note the bytes of all."""
        with self.quantizer.enter_quantize():
            wanted = {name: p.detach().clone() for name, p in self.model.named_parameters() if self._groups(p)}
        files = {}
        for packed in (True, False):
            raw = self._package_bytes(packed)
            for suffix, (squeeze, _) in SQUEEZERS.items():
                files[f"{'packed' if packed else 'plain'}{suffix}"] = squeeze(raw)
        files[f"levels{Path(FILE).suffix}"] = self._coder_bytes()
        best: Path | None = None
        for form, data in files.items():
            path = folder / f"net.{form}"
            write_file(path, data)
            found = dict(self.restore(path).named_parameters())
            # its packer forgets groups of 15 bits; the two ways to multiply out a level differ in the last place
            right = all(torch.allclose(found[name], value, rtol=1e-5, atol=1e-7) for name, value in wanted.items())
            self.forms[form] = len(data) if right else None
            if right and (best is None or len(data) < file_bytes(best)):
                best = path
        assert best is not None, "levels as they are always come back"
        return best

    def restore(self, path: Path) -> nn.Module:
        fresh = self.task.build()
        if path.suffix == Path(FILE).suffix:
            return self._from_coder_bytes(read_file(path), fresh)
        raw = SQUEEZERS[path.suffix if path.suffix in SQUEEZERS else ""][1](read_file(path))
        state = torch.load(io.BytesIO(raw), weights_only=True)
        quantizer = self._attach(fresh)
        quantizer.restore_quantized_state(state)
        quantizer.detach()
        for name, value in fresh.named_buffers():
            if name in state["buffers"]:
                value.copy_(state["buffers"][name])
        return fresh.eval()

    def _halves(self) -> dict[str, Tensor]:
        """Statistics of norms, which the package leaves to its user."""
        return {name: value.half() for name, value in self.model.named_buffers() if value.is_floating_point()}

    def _package_bytes(self, packed: bool) -> bytes:
        state = self.quantizer.get_quantized_state(packed=packed)
        # its own entry names the class and its options: bytes that the reader here can do without
        state["meta"] = {"packed": packed}
        state["buffers"] = self._halves()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    def _coder_bytes(self) -> bytes:
        """Its levels in our coder: groups of the same bit depth are one matrix, with zero in the middle."""
        state = self.quantizer.get_quantized_state(packed=False)
        names = [name for name, p in self.model.named_parameters() if self._groups(p)]
        records: list[Record] = []
        for name, (levels, (low, high), bits) in zip(names, state["quantized"], strict=True):
            usual = int(bits.mode().values)
            records += [
                RawTensor(name, np.array([low, high], np.float32)),
                Number(f"{name}.usual", usual),
                level_record(f"{name}.bits", (bits.long() - usual)[:, None]),
            ]
            records += [
                level_record(f"{name}.{b}", levels[bits == b].long() - level_of_zero(low, high, b))
                for b in sorted(set(bits.tolist()))
            ]
        own = (*names, *(n for n, _ in self.model.named_parameters() if n.endswith(self.quantizer.suffix)))
        rest = {n: p.detach().half() for n, p in self.model.named_parameters() if n not in own}
        records += [RawTensor(n, v.numpy()) for n, v in (rest | self._halves()).items()]
        return write(Contents(tuple(records)))

    def _from_coder_bytes(self, data: bytes, fresh: nn.Module) -> nn.Module:
        records = {record.name: record for record in read(data).records}
        state = fresh.state_dict()
        for name, place in state.items():
            found = records.get(name)
            if not isinstance(found, RawTensor):
                continue  # the norms' counters of batches, which evaluation does not need
            if f"{name}.bits" not in records:
                place.copy_(torch.from_numpy(found.values))
                continue
            low, high = map(float, found.values)
            usual, depths = records[f"{name}.usual"], records[f"{name}.bits"]
            assert isinstance(usual, Number)
            assert isinstance(depths, LevelTensor)
            bits = torch.from_numpy(depths.levels[:, 0, 0].astype(np.int64)) + usual.value
            groups = place.view(-1, DIFFQ_GROUP)
            for b in sorted(set(bits.tolist())):
                record = records[f"{name}.{b}"]
                assert isinstance(record, LevelTensor)
                levels = torch.from_numpy(record.levels[:, :, 0].astype(np.float64)) + level_of_zero(low, high, b)
                groups[bits == b] = (levels / (2**b - 1) * (high - low) + low).float()
        fresh.load_state_dict(state)
        return fresh.eval()


SQUEEZERS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "": (bytes, bytes),
    ".zlib": (partial(zlib.compress, level=9), zlib.decompress),
    ".lzma": (partial(lzma.compress, format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
}


def float_bytes(model: nn.Module) -> int:
    """Bytes of all numbers of a network as 32-bit floats."""
    return int(4 * sum(v.numel() for v in model.state_dict().values() if v.is_floating_point()))


def level_of_zero(low: float, high: float, bits: int) -> int:
    """The level next to zero of 2^bits levels from `low` to `high`."""
    return int(-low / (high - low) * (2**bits - 1) + 0.5)


def level_record(name: str, levels: Tensor) -> LevelTensor:
    """A matrix of integers as our file holds it, without exponents."""
    model = fit_levels(levels)
    shape = tuple(levels.shape)
    return LevelTensor(
        name=name,
        original_shape=shape,
        shape=shape,
        axis=0,
        groups=1,
        transposed=False,
        resolution=1,
        exponents=np.zeros(int(model.alive_rows.sum()), np.int64),
        model=model,
        levels=levels.numpy().astype(np.int16)[:, :, None],
    )


def resize(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give the parameters and buffers of `model` these shapes, in place; their values are zeros then."""
    for prefix, module in model.named_modules():
        for name, place in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            place.data = place.data.new_zeros(shapes.get(f"{prefix}.{name}".removeprefix("."), tuple(place.shape)))
        sync_sizes(module)


def needed(method: str) -> Any:
    """The package of a method. Raises `UsageError` if it is not there."""
    name = PACKAGES[method]
    try:
        return import_module(name.replace("-", "_"))
    except ImportError as error:
        raise UsageError(
            f"{method}: needs `{name}`: {error}\n"
            f"hint: `pip install --target FOLDER --no-deps {name}`, and name FOLDER in PYTHONPATH"
        ) from error


@dataclass(frozen=True)
class Method:
    """A method by name: how it starts, and the setting it has unless told otherwise."""

    start: Callable[[Task, float], Rival]
    setting: str
    """What the setting is called; `bits` are part of the name and cannot be set."""
    default: float


METHODS: dict[str, Method] = {
    **{f"uniform-{bits}": Method(lambda task, b: Uniform(task, int(b)), "bits", bits) for bits in (8, 4, 2)},
    "diffq": Method(DiffQ, "penalty", 10.0),
    "prune-4bit": Method(partial(PruneThenQuantize, bits=4), "ratio", 0.5),
}
ROWS = {f"{task}-{method}": (recipe, method) for task, recipe in TASKS.items() for method in METHODS}


def train_rival(
    start: Callable[[Task], Rival],
    setting: dict[str, Any],
    recipe: Recipe,
    folder: Path,
    *,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> None:
    """Train in `folder`, from its checkpoint if it has one, and write the file and `result.json`.

    The loop is that of `selfcompress.recipes.training`, with the method in place of the compressor. Raises
    `CheckpointError` if the folder holds another run, `NonFiniteError` if the loss is not a number.
    """
    torch.manual_seed(recipe.seed)
    dataset = load_dataset(recipe.dataset, recipe.data_dir, validation=recipe.validation, shift=recipe.shift)
    rival = start(Task(recipe, dataset))
    teacher = None if recipe.teacher is None else load_teacher(recipe.teacher, recipe, dataset)
    records: list[EpochRecord] = []
    run = {"recipe": asdict(replace(recipe, data_dir=None)), "setting": setting}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CHECKPOINT).exists():
        state = torch.load(folder / CHECKPOINT, weights_only=True)
        if state["run"] != run:
            raise CheckpointError(f"`{folder}`: expected the run {run}, found {state['run']}\nhint: use another folder")
        rival.load_state_dict(state["rival"])
        torch.set_rng_state(state["random"])
        records = [EpochRecord(**values) for values in state["records"]]
    for epoch in range(len(records) + 1, recipe.epochs + 1):
        record = train_epoch(rival, teacher, epoch)
        records.append(record)
        buffer = io.BytesIO()
        torch.save(
            {
                "run": run,
                "rival": rival.state_dict(),
                "random": torch.get_rng_state(),
                "records": [asdict(r) for r in records],
            },
            buffer,
        )
        write_file(folder / CHECKPOINT, buffer.getvalue())
        if on_epoch is not None:
            on_epoch(record)
    write_result(rival, setting, records, folder)


def train_epoch(rival: Rival, teacher: nn.Module | None, epoch: int) -> EpochRecord:
    """Train one epoch (from 1) and score it."""
    recipe = rival.task.recipe
    rival.begin(epoch)
    batches = rival.task.dataset.train_batches(recipe.batch_size, seed=recipe.seed, epoch=epoch, augment=recipe.augment)
    steps, total, examples = len(batches), 0.0, 0
    rival.model.train()
    with Stopwatch() as watch:
        for step, (inputs, targets) in enumerate(batches):
            factor = recipe.lr_factor(((epoch - 1) * steps + step) / (recipe.epochs * steps))
            for group in groups_of(rival.optimizers):
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
            task = task_loss(recipe, rival.model, teacher, inputs, targets)
            loss = task + rival.penalty()
            if not bool(torch.isfinite(loss.detach())):
                raise NonFiniteError(f"epoch {epoch}, step {step + 1}: the loss is {float(loss.detach())}")
            for optimizer in rival.optimizers:
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in rival.optimizers:
                optimizer.step()
            rival.stepped()
            total += float(task.detach()) * len(inputs)
            examples += len(inputs)
    score = score_model(rival.model, rival.task.batches())
    return EpochRecord(
        epoch=epoch,
        train_loss=total / examples,
        loss=score.loss,
        accuracy=score.accuracy,
        gamma=0.0,
        lr=recipe.lr * recipe.lr_factor(epoch / recipe.epochs),
        seconds=watch.seconds,
        **rival.sizes(),
    )


def write_result(rival: Rival, setting: dict[str, Any], records: list[EpochRecord], folder: Path) -> None:
    """Write the file, restore it into a fresh network, score that, and write `result.json`."""
    recipe = rival.task.recipe
    settle_norms(rival.model, rival.task.dataset, recipe, torch.device("cpu"))
    path = rival.write(folder)
    score = score_model(rival.restore(path), rival.task.batches())
    summary = RunSummary(
        name=setting["method"],
        file=path.name,
        file_bytes=file_bytes(path),
        float_bytes=rival.float_bytes,
        penalty_bytes=None,
        accuracy=score.accuracy,
        loss=score.loss,
        seconds_first=records[0].seconds,
        seconds_last=records[-1].seconds,
        **{name: value for name, value in rival.sizes().items() if name != "size_bytes"},
    )
    package = PACKAGES.get(setting["method"])
    result = Result(
        recipe=recipe,
        summary=summary,
        score=score,
        trained_score=score_model(rival.model, rival.task.batches()),
        scored_on="validation" if recipe.validation else "test",
        size_share=None,
        machine=describe_machine(),
        versions=describe_versions() | ({package: metadata.version(package)} if package else {}),
    )
    content = asdict(result) | {"setting": setting, "forms": rival.forms}
    write_file(folder / RESULT, (json.dumps(content, indent=2) + "\n").encode())


def run(name: str, recipe: Recipe, method: str, value: float, runs: Path) -> dict[str, Any]:
    """Train one row with one seed, or take up where it was left, and return its result.

    Raises `CheckpointError` if what is there was trained otherwise.
    """
    folder = runs / f"{name}-{recipe.seed}"
    chosen = METHODS[method]
    setting = {"method": method, chosen.setting: value}
    result = finish(
        folder,
        lambda: train_rival(
            lambda task: chosen.start(task, value),
            setting,
            recipe,
            folder,
            on_epoch=lambda r: print(f"{name} {recipe.seed}: {r.to_json()}", flush=True),
        ),
    )
    wanted = asdict(recipe) | {"teacher": name_only(recipe.teacher)}
    wanted.pop("data_dir")
    if (result["recipe"], result["setting"]) != (wanted, setting):
        raise CheckpointError(
            f"`{folder}`: expected a run of {wanted} with {setting}, "
            f"found one of {result['recipe']} with {result['setting']}\n"
            "hint: name another folder with `--runs`"
        )
    return result


def record_of(name: str, command: str, recipe: Recipe, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of a row, of the shape of `train.py`'s, with what is particular to a method."""
    return {
        **summarize(name, command, recipe, results),
        "setting": results[-1]["setting"],
        "forms_bytes": [r["forms"] for r in results],
        "versions": results[-1]["versions"],
        "machine": results[-1]["machine"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--only", nargs="*", choices=ROWS, help="rows to run; all if not given")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/rivals"), help="folder for checkpoints and files")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder for the records")
    parser.add_argument("--validation", type=int, default=0)
    parser.add_argument("--penalty", type=float, help="of diffq: weight of the size in its loss, per 2^20 bytes")
    parser.add_argument("--ratio", type=float, help="of prune-4bit: share of the channels to cut")
    parser.add_argument("--teacher", help="folder of a float run to learn from")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for row in args.only or ROWS:
        recipe, method = ROWS[row]
        recipe = replace(recipe, gamma=0.0, data_dir=args.data_dir, validation=args.validation, teacher=args.teacher)
        reported = not args.validation and args.epochs is None
        if args.epochs is not None:
            recipe = replace(recipe, epochs=args.epochs)
        name, command = row, f"python bench/rivals.py --data-dir DATA --only {row}"
        chosen = METHODS[method]
        value = getattr(args, chosen.setting, None)
        if value is None:
            value = chosen.default
        elif value != chosen.default:
            name, command = f"{row}-{value:g}", f"{command} --{chosen.setting} {value:g}"
        if args.teacher is not None:
            name, command = f"{name}-teacher", f"{command} --teacher RUN"
        results = []
        for seed in args.seeds:
            results.append(run(name, replace(recipe, seed=seed), method, value, args.runs))
            record = record_of(name, command, recipe, results)
            show(record)
            if reported:
                keep(record, args.records)


if __name__ == "__main__":
    main()
