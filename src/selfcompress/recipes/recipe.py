"""What a training run is: one frozen value with everything that its result depends on.

`default_recipe` gives the settings that were found for a data set and a network; variants use `dataclasses.replace`.
A recipe goes into the checkpoint and into `result.json`, so it holds plain numbers and strings only.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from ..activations import MAX_ACTIVATION_BITS
from ..compressor import ACTIVATION_GAMMA, RATES, Rate
from ..distilling import SHARE, TEMPERATURE
from ..errors import CheckpointError, FormatError, UsageError
from ..quantizer import GRIDS, Grid

Optimizer = Literal["adam", "adamw", "sgd"]
Precision = Literal["float32", "bfloat16"]
LEARNING_RATE_FLOOR = 0.01
"""Share of the learning rate that is left at the end of the annealing."""
SETTLE, HOLD = 0.7, 0.9
"""Shares of the run after which formats stay, and weights that flip are held, unless a recipe says otherwise."""


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Raises `UsageError` for a value outside of its range.
    """

    dataset: str = "digits"
    """Name of the data set: see `datasets.py`."""
    network: str = "lenet-300-100"
    """Name of the network: see `networks.py`."""
    width: int | None = None
    """Channels of the network's first stage; None for the network's own default. Some networks have no such option."""
    start: str | None = None
    """Trained weights to begin with: a `.pt`, `.pth` or `.safetensors` file, or the folder of a float run. None begins
    with random ones. A run that is resumed does not read it again."""
    teacher: str | None = None
    """A trained network to learn from: weights as `start` names them, or a run's folder or a `.scn` file, which may be
    of another network on the same data. It is read again when the run is resumed."""
    teacher_share: float = SHARE
    """Weight of the teacher's answers in the loss, against the labels', 0 … 1."""
    teacher_temperature: float = TEMPERATURE
    """Temperature of both networks' answers in that part of the loss, > 0."""
    gamma: float = 0.3
    """Weight of the size in the loss: nats per (bit per weight of the starting network), >= 0. More: smaller file."""
    target: str | None = None
    """The size to end at, in place of `gamma`: `200 kB`, `2 %` of the float network, or `0.5 bits/weight`. Also, or
    instead, amounts of costs: `200 kB and 5 MMAC`."""
    latency_table: str | None = None
    """A file that `selfcompress measure` made, for a target in ms."""
    rate: Rate = "code-length"
    """How the loss counts bits: `code-length`, or `bit-depth` as published."""
    grid: Grid | None = None
    """The levels a weight can take: `symmetric` or `eq1`; None for the one that belongs to the rate."""
    activation_bits: float | None = None
    """Bits, 2 … 8, from which number formats of activations start to be learned; None leaves activations in float."""
    activation_gamma: float = ACTIVATION_GAMMA
    """Weight of these bits in the loss: nats per bit that a number has in the mean, >= 0."""
    epochs: int = 20
    """Passes over the training set, >= 1."""
    batch_size: int = 128
    """Examples per step, >= 1."""
    optimizer: Optimizer = "adam"
    """`adam`, `adamw` or `sgd`. Beside `sgd` the number formats have an Adam of their own."""
    lr: float = 1e-3
    """Learning rate of the weights, > 0. The number formats have their own."""
    momentum: float = 0.9
    """Nesterov's momentum of `sgd`, 0 … 1; the others do not use it."""
    weight_decay: float = 0.0
    """Weight decay of the weights, >= 0; never on biases, norms or formats."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes, 0 … 1."""
    anneal: float = 0.4
    """Share of the run, at its end, in which the learning rate falls along a cosine to a hundredth; constant before."""
    settle: float | None = None
    """Share of the run after which number formats stay as they are, so that weights settle on a fixed grid; 1 never.
    None for `SETTLE` by code length, under a target of size not before its path has landed, and never by bit depth."""
    hold: float | None = None
    """Share of the run after which weights that flip between two levels are held, and formats stay, too: see
    `SelfCompressor.hold`; 1 never. None for `HOLD` by code length, and never by bit depth."""
    gamma_warmup: float = 0.0
    """Share of the run, at its start, in which gamma rises linearly from zero."""
    augment: bool = True
    """Whether training examples are varied, in the way of their data set: moved, mirrored, cut elsewhere."""
    shift: int | None = None
    """Pixels by which images are moved at most; None for the data set's own. Not for `text`."""
    cutout: int = 0
    """Side in pixels of a square that is blanked at a random place of every training image, >= 0. Not for `text`."""
    precision: Precision = "float32"
    """Numbers that layers compute with in training: `float32`, or `bfloat16` by automatic mixed precision, which is
    faster where the hardware has it. Weights, formats and prices are float32 in either case, and so is all scoring."""
    compile: bool = False
    """Whether rounding and pricing of weights are compiled by `torch.compile`."""
    validation: int = 0
    """Training examples held out. When > 0, scores are taken on them and the test set is never looked at."""
    seed: int = 0
    """Start of all randomness: initial weights, order of the examples, augmentation."""
    device: str = "cpu"
    """Where to compute: `cpu`, `cuda`, `cuda:1`, `mps`."""
    data_dir: str | None = None
    """Folder that holds the data sets; None for the environment variable's. `digits` needs none."""

    def __post_init__(self) -> None:
        checks = {
            "width": (self.width is None or self.width >= 1, "a whole number >= 1"),
            "teacher_share": (0 <= self.teacher_share <= 1, "a number of 0 … 1"),
            "teacher_temperature": (0 < self.teacher_temperature < float("inf"), "a number > 0"),
            "gamma": (0 <= self.gamma < float("inf"), "a number >= 0"),
            "rate": (self.rate in RATES, f"one of {', '.join(RATES)}"),
            "grid": (self.grid is None or self.grid in GRIDS, f"one of {', '.join(GRIDS)}"),
            "activation_bits": (
                self.activation_bits is None or 2 <= self.activation_bits <= MAX_ACTIVATION_BITS,
                f"a number of 2 … {MAX_ACTIVATION_BITS:g}",
            ),
            "activation_gamma": (0 <= self.activation_gamma < float("inf"), "a number >= 0"),
            "epochs": (self.epochs >= 1, "a whole number >= 1"),
            "batch_size": (self.batch_size >= 1, "a whole number >= 1"),
            "optimizer": (self.optimizer in get_args(Optimizer), f"one of {', '.join(get_args(Optimizer))}"),
            "lr": (0 < self.lr < float("inf"), "a number > 0"),
            "momentum": (0 <= self.momentum < 1, "a number of 0 … 1"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "a number >= 0"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "a number of 0 … 1"),
            "anneal": (0 <= self.anneal <= 1, "a number of 0 … 1"),
            "settle": (self.settle is None or 0 <= self.settle <= 1, "a number of 0 … 1"),
            "hold": (self.hold is None or 0 <= self.hold <= 1, "a number of 0 … 1"),
            "gamma_warmup": (0 <= self.gamma_warmup <= 1, "a number of 0 … 1"),
            "cutout": (self.cutout >= 0, "a whole number >= 0"),
            "precision": (self.precision in get_args(Precision), f"one of {', '.join(get_args(Precision))}"),
            "validation": (self.validation >= 0, "a whole number >= 0"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise UsageError(f"`{name}`: expected {expected}, got `{getattr(self, name)}`\nhint: change `{name}`")

    @property
    def label(self) -> str:
        """Data set and network in the few bytes that the file's metadata has for them, such as `cifar10 resnet9:16`."""
        return f"{self.dataset} {self.network}" + (f":{self.width}" if self.width is not None else "")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON types. Inverse: `Recipe.from_dict`."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Recipe":
        """A recipe from `to_dict`'s values. Raises `CheckpointError` if they are not those of a recipe."""
        try:
            return Recipe(**values)
        except TypeError as error:
            raise CheckpointError(
                f"the recipe of the checkpoint does not fit this version: {error}\n"
                "hint: go on with the version that started the run, or start anew in another folder"
            ) from error

    def lr_factor(self, progress: float) -> float:
        """What the learning rate is multiplied by after the share `progress` (0 … 1) of all steps."""
        start = 1.0 - self.anneal
        if self.anneal == 0 or progress <= start:
            return 1.0
        falling = 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - start) / self.anneal)))
        return LEARNING_RATE_FLOOR + (1.0 - LEARNING_RATE_FLOOR) * falling

    def settles(self, progress: float, landed: bool = True) -> bool:
        """Whether formats stay as they are after the share `progress` (0 … 1) of all steps.

        If the recipe does not say when, they wait until the size has `landed` on its target.
        """
        if self.settle is not None:
            return _is_late(progress, self.settle)
        return landed and self.rate == "code-length" and _is_late(progress, SETTLE)

    def holds(self, progress: float) -> bool:
        """Whether weights that flip are held after the share `progress` (0 … 1) of all steps."""
        usual = HOLD if self.rate == "code-length" else 1.0
        return _is_late(progress, usual if self.hold is None else self.hold)

    def gamma_at(self, progress: float) -> float:
        """Gamma after the share `progress` (0 … 1) of all steps."""
        return self.gamma * (min(1.0, progress / self.gamma_warmup) if self.gamma_warmup else 1.0)


def _is_late(progress: float, since: float) -> bool:
    return since < 1.0 and progress >= since


def parse_label(label: str) -> tuple[str, str, int | None]:
    """Data set, network and width of a file's metadata. Inverse of `Recipe.label`.

    Raises `FormatError` if the text is not such a label.
    """
    words = label.split(" ")
    network, colon, width = words[-1].partition(":")
    if len(words) != 2 or not all(words) or not network or (colon and not (width.isascii() and width.isdigit())):
        raise FormatError(
            f"metadata of the file: expected `DATA NETWORK[:WIDTH]`, found `{label}`\n"
            "hint: the file was not written by `selfcompress train`; say what it is with `--data` and `--network`"
        )
    return words[0], network, int(width) if colon else None


DEFAULT_NETWORKS = {
    "digits": "lenet-300-100",
    "mnist": "lenet5",
    "fashion-mnist": "lenet5",
    "cifar10": "resnet9",
    "imagefolder": "resnet9",
    "text": "gpt",
}
"""The network for a data set if none is named."""


BEAR_SGD = ("resnet9", "resnet20", "vgg16")
"""Networks that learn colour images by SGD at a rate of 0.2: ResNet-9 better than by Adam (docs/dials.md), the others
were seen to bear it. `conv5` breaks, norms or not."""


def default_recipe(dataset: str = "digits", network: str | None = None) -> Recipe:
    """The settings found for a data set and a network (None: the data set's usual one).

    Names are not checked here: unknown ones get general settings, and an error where they are built.
    """
    network = network or DEFAULT_NETWORKS.get(dataset, "lenet5")
    recipe = Recipe(dataset=dataset, network=network)
    if dataset == "digits":
        return replace(recipe, gamma=0.5, epochs=150, batch_size=64, lr=4e-3, anneal=0.5)
    if dataset in ("mnist", "fashion-mnist"):
        return replace(recipe, epochs=30, anneal=0.6, gamma_warmup=0.3)
    if dataset == "text":
        return replace(
            recipe, epochs=10, batch_size=64, optimizer="adamw", weight_decay=0.01, anneal=0.8, gamma_warmup=0.1
        )
    recipe = replace(recipe, epochs=60, weight_decay=5e-4, gamma_warmup=0.1)
    if network in BEAR_SGD:
        return replace(recipe, optimizer="sgd", lr=0.2, anneal=0.8)
    return replace(recipe, optimizer="adamw")
