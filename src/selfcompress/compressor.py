"""What a training loop holds: the price of the network's size, and the cutting of what has died.

    compressor = SelfCompressor(model, (x,), gamma=0.5)
    optimizer = torch.optim.Adam(compressor.param_groups(lr=1e-3))
    for x, y in loader:
        loss = F.cross_entropy(model(x), y) + compressor.penalty()
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        compressor.step(optimizer)

Λ = Λ0 + γ·Q (arXiv 2301.13142, eq. 2), where Q is the size in bits over the number of weights of the starting network.

The probability models behind the code length are fitted anew every `refresh_every` steps; channels are looked over
every `check_every` steps, and cut when they were dead at two looks in a row. Both are counted in steps, so that a
resumed run does the same at the same step; the models in use are part of the state.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel

from .activations import MAX_ACTIVATION_BITS, Activations
from .axes import Axes, ChannelClass, find_axes
from .budget import Budget, parse_target
from .coder import LevelModel, integers_bits
from .container import LevelTensor, size_bits, write
from .contexts import Context
from .converting import Compressed, Format, convert, plain_name
from .copies import meta_copy
from .costs import Cost, Targets, parse_targets
from .errors import CallOrderError, CheckpointError, NonFiniteError, UsageError
from .fitting import context_bits, fit_levels, side_bits
from .holding import Holding
from .packing import contents_of, pack, step_bits
from .pricing import Prices, plan_prices
from .quantizer import GRIDS, MAX_BITS, ChannelQuantizer, Grid
from .rate import PriceTable, bit_depth, code_length, coupled_bit_depth
from .shrinking import Kept, Plan, Positions, apply_plan, check_copy, find_dead, resize, silence_step
from .sites import round_activations
from .steering import Steering, smallest_bytes
from .trial import tried

Rate = Literal["code-length", "bit-depth"]
RATES: tuple[Rate, ...] = ("code-length", "bit-depth")
STATE_VERSION = 7
EXPONENT_RESOLUTION = 4
"""Exponents are used, and stored, in steps of a quarter octave: a step of 19 % between two steps."""
INITIAL_BITS = 8.0
BITS_ABOVE = 2.0
"""A network starts with so many bits a weight more than its target has: the size is to fall to it, and some way, as
what has fallen below comes back slowly."""
ACTIVATION_GAMMA = 0.0003
INT8_BITS = 7.999
"""Weights that are multiplied with rounded activations have so many bits at most: no level is beyond ±127."""
FILE_BITS = 15.999
"""Others have so many at most: no level is beyond ±32767, the largest in a file."""
SILENCE_PER_STEP = 1e-3
"""By so much a training step takes biases of zeroed channels towards zero: the paper's L1 loss, as a proximal step."""


@dataclass(frozen=True)
class Size:
    """How large a network is now."""

    size_bytes: int
    """Bytes of the file that `save` would write."""
    weights_alive: int
    """Weights of the compressed tensors that are still there."""
    weights_nonzero: int
    """Those of them that are not zero."""
    weights_total: int
    """Weights of the compressed tensors at the start."""
    channels_alive: int
    """Output channels of the compressed tensors that are still there."""
    channels_total: int


@dataclass(frozen=True)
class StepReport:
    """What a call of `SelfCompressor.step` has cut. False where that is nothing."""

    step: int
    """Number of the training step, from 1."""
    plan: Plan | None
    notes: tuple[str, ...] = ()
    """What optimizers had to forget for it: state that could not be cut along."""

    def __bool__(self) -> bool:
        return bool(self.plan)

    def __str__(self) -> str:
        return "\n".join([f"step {self.step}: {self.plan if self.plan else 'nothing cut'}", *self.notes])


class SelfCompressor:
    """Lets `model` shrink while it trains.

    Args:
        model: any network with weights that make channels: those of layers, and those that its code uses by hand;
            quantizers are attached in place.
        example_inputs: what `model(*example_inputs)` takes, to find out which channels depend on each other.
        gamma: compression factor γ >= 0, weight of the size in the loss; 0 leaves out the price, more gives smaller
            files. None for 0.5, or, with a target, whatever leads there.
        target: the size that the file is to have after `total_steps`, in place of `gamma`: bytes (`200_000`,
            `"200 kB"`), a share of the float network (`"2 %"`), or `"0.5 bits/weight"`. The file then has 0.97 … 1
            times these bytes, without metadata, and never more. Also, or instead, amounts of costs that the network is
            not to exceed: `"200 kB and 5 MMAC"`, or `["200 kB", "5 MMAC"]`; see `costs.py` for their units.
        total_steps: training steps of the whole run; needed with a target. The learning rate should fall in the
            second half of the run.
        costs: what the loss charges for beside bytes, and the price of each: what taking away all of it would be worth,
            in units of the loss. None for a cost that a target sets; those of `costs.KNOWN` need not be named then.
        rate: `"code-length"`, the bits that the file takes, or `"bit-depth"`, as published.
        grid: `"symmetric"` or `"eq1"`; None takes symmetric for code length, eq. 1 for bit depth.
        coupled: for bit depth, eq. 5 in place of eq. 4.
        initial_bits: bit depth to start from, which just reaches the largest weight of each channel. None for 8, or
            more where a target leaves room for more.
        activation_bits: bit depth, 2 … 8, from which activations start that convolutions and linear layers read, or
            convolutions give (see `sites.py`); their steps and bits are learned, too. None leaves them in float.
        activation_gamma: weight >= 0 of these bits in the loss: nats per bit that a number has in the mean.
        include: names of further parameters to compress.
        skip: names of parameters or modules to leave in float.
        refresh_every: steps between two fits of the probability models, >= 1.
        check_every: steps between two looks for dead channels, >= 0; 0 never cuts.
        compile: round and price weights in training with kernels made by `torch.compile`, which needs what that needs.
            On a CPU a small network's step takes three fifths of the time; on a GPU nothing was gained, see
            `ReplayedStep`. The network itself is not compiled.

    Attributes:
        gamma: may be set at any time; a target sets it anew every few steps.
        target_bytes: the target in bytes, or None.
        left: parameters that stay in float, with the reason.
        activations: the learned formats of activations.
        axes: which channels live and die together.
        history: a `StepReport` for every cut.

    Raises:
        UsageError: nothing to compress, an example input that does not fit, an unknown option, a target below the
            smallest file that this network can become. NonFiniteError: a weight is NaN or infinite. The model is left
            alone then.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: tuple[Any, ...],
        *,
        gamma: float | None = None,
        target: int | str | Sequence[int | str] | None = None,
        total_steps: int | None = None,
        costs: Mapping[Cost, float | None] | None = None,
        rate: Rate = "code-length",
        grid: Grid | None = None,
        coupled: bool = False,
        initial_bits: float | None = None,
        activation_bits: float | None = None,
        activation_gamma: float = ACTIVATION_GAMMA,
        include: Sequence[str] = (),
        skip: Sequence[str] = (),
        refresh_every: int = 50,
        check_every: int = 50,
        compile: bool = False,
    ) -> None:
        if rate not in RATES:
            raise UsageError(f"rate: expected one of {', '.join(f'`{r}`' for r in RATES)}, found `{rate}`")
        if grid is not None and grid not in GRIDS:
            raise UsageError(f"grid: expected one of {', '.join(f'`{g}`' for g in GRIDS)}, found `{grid}`")
        if coupled and rate != "bit-depth":
            raise UsageError('coupled: eq. 5 is a form of the bit depth\nhint: use `rate="bit-depth"` with it')
        if refresh_every < 1:
            raise UsageError(f"refresh_every: expected 1 step or more, found {refresh_every}")
        if check_every < 0:
            raise UsageError(f"check_every: expected 0 steps or more, found {check_every}\nhint: 0 never cuts")
        if activation_bits is not None and not 2 <= activation_bits <= MAX_ACTIVATION_BITS:
            raise UsageError(f"activation_bits: expected 2 to {MAX_ACTIVATION_BITS:g} bits, found {activation_bits:g}")
        if not 0 <= activation_gamma < math.inf:
            raise UsageError(f"activation_gamma: expected a finite number of 0 or more, found {activation_gamma}")
        asked = Targets(None, (), {}) if target is None else parse_targets(target, costs or {})
        if gamma is not None and asked.size is not None:
            raise UsageError("gamma: found beside `target`, which sets it\nhint: leave one of them out")
        if asked.amounts and not check_every:
            raise UsageError("check_every: 0 never cuts, and a target of a cost is met by cuts\nhint: leave it out")
        if (target is None) != (total_steps is None):
            raise UsageError(
                "total_steps: belongs to `target`, and a target needs it\n"
                'hint: `target="200 kB", total_steps=epochs * len(loader)`'
            )
        self.model, self.rate, self.coupled = model, rate, coupled
        first_gamma = _checked_gamma(0.0 if asked.size is not None else 0.5 if gamma is None else gamma)
        self.refresh_every, self.check_every = refresh_every, check_every
        target_bytes = None
        if asked.size is not None:
            numbers = sum(v.numel() for v in model.state_dict().values() if v.is_floating_point())
            target_bytes = parse_target(asked.size, float_bytes=4 * numbers)
            if initial_bits is None:
                weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)  # norms take next to nothing
                initial_bits = min(max(INITIAL_BITS, 8 * target_bytes / max(weights, 1) + BITS_ABOVE), FILE_BITS)
        initial_bits = INITIAL_BITS if initial_bits is None else initial_bits
        self.target_bytes, self._total_steps = target_bytes, total_steps
        published = rate == "bit-depth"
        form = Format(
            grid=grid or ("eq1" if published else "symmetric"),
            initial_bits=min(initial_bits, FILE_BITS) if initial_bits <= MAX_BITS else initial_bits,
            resolution=None if published else EXPONENT_RESOLUTION,
            biases=not published,
        )
        self.axes: Axes = tried(model, example_inputs, find_axes(model, example_inputs))
        attach = partial(convert, form=form, include=include, skip=skip, outputs=self.axes.outputs)
        budget = None
        if total_steps is not None and total_steps < 1:
            raise UsageError(f"total_steps: expected 1 step or more, found {total_steps}")
        if target_bytes is not None and total_steps is not None:
            budget = self._plan(target_bytes, total_steps, attach)
        pricing = plan_prices(
            model,
            self.axes,
            example_inputs,
            costs=costs or {},
            targets=asked,
            total_steps=total_steps or 0,
            attach=attach,
        )
        self.compressed, self.left = attach(model)
        self._compile = compile
        self._most_bits = [
            INT8_BITS if activation_bits is not None and c.quantizer.axis is not None else FILE_BITS
            for c in self.compressed
        ]
        for tensor, most in zip(self.compressed, self._most_bits, strict=True):
            tensor.quantizer.compiled = compile
            if not published:
                _learn_step_alone(tensor.quantizer, most)
                tensor.quantizer.damped = tensor.quantizer.axis is not None
        self.activation_bits, self.activation_gamma = activation_bits, activation_gamma
        self.activations = Activations()
        if activation_bits is not None:
            self.activations = round_activations(model, example_inputs, activation_bits)
        self._rounded = 0
        self._kept = Kept.full(self.axes)
        self.history: list[StepReport] = []
        self._weights = [c for c in self.compressed if c.quantizer.axis is not None]
        self.weights_total = sum(c.original.numel() for c in self._weights)
        like = self.compressed[0].original
        self._factor = torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        self.gamma = first_gamma
        self._steering = self._steered(budget) if budget else None
        self._holding: Holding | None = None
        self._prices = pricing and Prices(
            pricing,
            model,
            self.axes,
            self.compressed,
            by_bits=published,
            pulled=self._pulled(),
            refresh_every=refresh_every,
        )
        self.channels_total = sum(c.quantizer.bits.numel() for c in self._weights)
        self._steps = self._revision = 0
        self._suspects: Plan | None = None
        self._tables: dict[str, PriceTable] = {}
        self._side_bits = self._fixed_bits = 0.0
        self._priced = self._backpropagated = False
        self._checked: list[weakref.ref[Optimizer | nn.Module]] = []
        self._find_inputs()
        self._measure_fixed()

    @property
    def gamma(self) -> float:
        """The compression factor γ; may be set at any time. Raises `UsageError` if it is negative or not finite."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: float) -> None:
        self._gamma = _checked_gamma(value)
        # a tensor, so that a recorded step reads the γ of its own moment
        self._factor.fill_(value / self.weights_total)

    def param_groups(
        self, *, lr: float, weight_decay: float = 0.0, format_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Parameter groups for any optimizer of `torch.optim`.

        Args:
            lr: learning rate of the network's own parameters.
            weight_decay: of compressed weights only; biases, norms and formats have none.
            format_lr: learning rate of exponents, and of bit depths that learn, in octaves and bits. None takes 10·lr
                for code length and, as published, 0.5 for bit depth. Both are rates of an Adam: where weights are
                trained by SGD, formats, which are the last group, want an Adam of their own, at 0.02.

        For bit depth the groups also carry the published epsilons, 1e-3 for formats and 1e-5 for all else, which Adam
        and its kin read.

        Returns:
            Three groups: compressed weights, other parameters, formats. Together all parameters of the model but the
            bit depths where they do not learn, which is for code length.
        """
        weights = [c.original for c in self._weights]
        formats = self._formats()
        taken = {id(p) for p in (*weights, *formats, *(c.quantizer.bits for c in self.compressed))}
        others = [p for p in self.model.parameters() if id(p) not in taken]
        published = self.rate == "bit-depth"
        if format_lr is None:
            format_lr = 0.5 if published else 10 * lr
        groups: list[dict[str, Any]] = [
            {"params": weights, "lr": lr, "weight_decay": weight_decay},
            {"params": others, "lr": lr, "weight_decay": 0.0},
            {"params": formats, "lr": format_lr, "weight_decay": 0.0},
        ]
        if published:
            for group, eps in zip(groups, (1e-5, 1e-5, 1e-3), strict=True):
                group["eps"] = eps
        return [group for group in groups if group["params"]]

    def _formats(self) -> list[nn.Parameter]:
        """The parameters of formats that learn, or did until they settled."""
        quantizers = [c.quantizer for c in self.compressed]
        of_weights = [
            p for q in quantizers for p in ((q.bits, q.exponent) if self.rate == "bit-depth" else (q.exponent,))
        ]
        return [*of_weights, *self.activations.parameters()]

    @property
    def _learning(self) -> bool:
        """Whether formats still do."""
        return any(p.requires_grad for p in self._formats())

    def penalty(self) -> Tensor:
        """γ·Q, to be added to the loss: Q is the size in bits over the weights of the starting network (eq. 2).

        With the price of what is charged for beside bytes: see `costs.py`.

        For code length the size is that of the whole file: levels, side information, header, and what stays in float.
        For bit depth it is nominal, eq. 4 or 5. Where activations have formats, their mean bits are added, weighed by
        `activation_gamma`. Returns a scalar that is differentiable in weights and formats.
        """
        if self.rate == "code-length" and not self._tables:
            self._refresh()
        self._factor = self._factor.to(self.compressed[0].original.device)
        # a loss may be computed in half precision, the size is not
        with torch.autocast(self.compressed[0].original.device.type, enabled=False):
            penalty = self._factor * self._bits()
            if self.activations:
                penalty = penalty + self.activation_gamma * self.activations.mean_bits()
            if self._prices:
                penalty = penalty + self._prices.penalty()
        self._priced = True
        # by bit depths alone, a price of formats that have settled leads nowhere
        fixed = self.rate == "bit-depth" and not self._learning
        if (self.gamma == 0 or fixed) and not self._prices:
            self._backpropagated = True  # nothing to go back
        if penalty.requires_grad:
            penalty.register_hook(self._note_backward)  # type: ignore[no-untyped-call]
        return penalty

    def settled(self) -> object | None:
        """What the penalty is computed with beside weights, formats and γ, as something that can be compared.

        None where a step does more than compute: before controllers have set out, and activations are rounded.
        """
        steering = not self._steering or self._steering.budget.started
        prices = not self._prices or self._prices.started
        if not (steering and prices and self._steps and len(self.activations) == len(self.activations.quantizers)):
            return None
        return self._revision, tuple(self.prices.values())

    @property
    def landed(self) -> bool:
        """Whether the path of the size has come down to its target, and the size with it: then formats may `settle`.

        True without such a target. Targets of costs do not matter: what they take away are channels, as they stand.
        """
        return not self._steering or self._steering.budget.has_landed(self._steps)

    def fall_evenly(self) -> None:
        """Plan the way to the target by the same factor in each step, to keep states on it. Before the first step."""
        if self._steering:
            self._steering.budget.even = True

    def note_replay(self) -> None:
        """Say that penalty and `backward` were replayed: see `replaying.py`."""
        self._priced = self._backpropagated = True

    def penalty_bytes(self) -> float:
        """The size that `penalty` charges for at this moment, with models fitted for it, in bytes: Q·N / 8."""
        in_use = self._tables, self._side_bits
        if self.rate == "code-length":
            self._refresh()
        size = self._priced_bytes()
        self._tables, self._side_bits = in_use  # training goes on as if nobody had looked
        return size

    def size(self) -> Size:
        """The exact size now: of the file that `save` would write (without metadata), and of the network."""
        return Size(
            size_bytes=len(pack(self.model)),
            weights_alive=sum(c.original.numel() for c in self._weights),
            weights_nonzero=sum(int(torch.count_nonzero(c.levels())) for c in self._weights),
            weights_total=self.weights_total,
            channels_alive=sum(c.quantizer.bits.numel() for c in self._weights),
            channels_total=self.channels_total,
        )

    def read_costs(self) -> dict[Cost, float]:
        """What the network costs as it stands, exactly, of all that has a price or a target; see `Cost.units`."""
        return self._prices.read() if self._prices else {}

    @property
    def unmet(self) -> tuple[str, ...]:
        """After the last step, a line for each target of a cost that was not met, and for a size that training was far
        from, so that much had to be taken away at once."""
        of_size = self._steering.unmet if self._steering else ()
        return (*of_size, *(self._prices.unmet if self._prices else ()))

    @property
    def prices(self) -> dict[Cost, float]:
        """The price of each cost now; a target sets it anew every few steps."""
        return dict(self._prices.prices) if self._prices else {}

    def step(self, optimizer: Optimizer | Sequence[Optimizer], *, averages: Sequence[nn.Module] = ()) -> StepReport:
        """To be called after every `optimizer.step()`: keeps formats in range and cuts channels that have died.

        Cutting changes parameters, buffers, gradients and the optimizer's state in place; the function that the network
        computes stays the same.

        Args:
            optimizer: the one that trains the network, or all of them. Any will do: state that cannot be cut along is
                dropped, and the report's notes say so (see `optimizers.py`).
            averages: running averages of the network, `torch.optim.swa_utils.AveragedModel`s or plain copies that are
                averaged by hand, made after the SelfCompressor. The same members are cut from them, and what survives
                keeps its values. They average older weights, in which these channels may still have been alive: so
                *the cut can change what an average computes*, by what it remembers of dead channels.

        Returns:
            What was cut; False where that is nothing.

        Raises:
            CallOrderError: the penalty was not part of the loss, or `backward` was not called.
            UsageError: the optimizers lack the formats, or an average is no copy of the network as it is now.
            NonFiniteError: a weight or a format is NaN or infinite, which is looked for at every refresh and at every
                look for dead channels.
        """
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        copies = [average.module if isinstance(average, AveragedModel) else average for average in averages]
        self._check_call(optimizers, copies)
        self._priced = self._backpropagated = False
        self._steps += 1
        look = bool(self.check_every) and self._steps % self.check_every == 0
        refresh = self._steps % self.refresh_every == 0
        if look or refresh:
            self._check_finite()
        with torch.no_grad():
            bits: list[Tensor] = [c.quantizer.bits for c in self.compressed]
            torch._foreach_clamp_min_(bits, 0.0)
            torch._foreach_clamp_max_(bits, self._most_bits)
        if self._holding is not None:
            self._holding.step()
        self.activations.keep_in_range()
        if len(self.activations) != self._rounded:
            self._measure_fixed()
        thinned = self._prices.thin(self._steps) if self._prices else ()
        at_once = bool(thinned) or bool(self._prices and self._prices.is_last(self._steps))
        cut_along = optimizers if self._holding is None else [*optimizers, self._holding]
        plan, notes = self._look(cut_along, copies, at_once=at_once) if look or at_once else (None, ())
        fitted = self.rate == "code-length" and bool(plan or refresh)
        if fitted:
            self._refresh()
        if self._steering and self._steering.due(self._steps):
            notes = (*notes, *self._steer(self._steering, fitted=fitted))
        if self._prices:
            notes = (*thinned, *notes, *self._prices.steer(self._steps))
        if self._holding is not None and (look or notes):
            self._holding.let_go()  # what was silenced, thinned or trimmed
        report = StepReport(self._steps, plan, notes)
        if report:
            self.history.append(report)
        return report

    def settle(self) -> None:
        """From now on formats stay as they are, so that weights learn on fixed grids.

        For the last third of a run; with a target once the size has `landed`, and without weight decay from there on,
        which would take it below: norms do not mind that all weights of a channel shrink, but a grid that stays has
        fewer and fewer levels for them. There is no way back; calling it again does nothing.
        """
        for parameter in self._formats():
            parameter.requires_grad_(False)
            parameter.grad = None

    def hold(self) -> None:
        """From now on weights whose level flips to and fro are held at the level where they mostly are.

        For the last tenth of a run, when learning rates are small. Formats stay, too, as after `settle`; channels
        seldom die after it. There is no way back; calling it again does nothing. See `holding.py`.
        """
        self.settle()
        if self._holding is None:
            self._holding = Holding(self.compressed)

    def state_dict(self) -> dict[str, Any]:
        """All that a new process needs to go on, the network included: tensors, numbers, strings, and dicts of them.

        Safe for `torch.load(..., weights_only=True)`.
        """
        return {
            "version": STATE_VERSION,
            "config": self._config(),
            "model": self.model.state_dict(),
            "kept": self._kept.to_dict(),
            "steps": self._steps,
            "gamma": self.gamma,
            "suspects": self._suspects.to_dict() if self._suspects else None,
            "tables": {name: _table_to_dict(table) for name, table in self._tables.items()},
            "side_bits": self._side_bits,
            "fixed_bits": self._fixed_bits,
            "budget": self._steering.budget.to_dict() if self._steering else None,
            "costs": self._prices.state_dict() if self._prices else {},
            "settled": not self._learning,
            "holding": self._holding.state_dict() if self._holding is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make a fresh network, with a new SelfCompressor around it, the one that was saved, as small as it was.

        The optimizer's state is loaded after this, with its own `load_state_dict`; so is an average of the network,
        made after this.

        Raises:
            CheckpointError: not such a state, or one of another network or with other options; nothing is changed then.
        """
        self._check_state(state)
        try:
            kept = Kept.from_dict(state["kept"])
            suspects = Plan.from_dict(state["suspects"]) if state["suspects"] else None
            tables = {name: _table_from_dict(values) for name, values in state["tables"].items()}
            budget = Budget(**state["budget"]) if state["budget"] else None
            budgets = {name: Budget(**values) for name, values in state["costs"].items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"state: damaged: {type(error).__name__}: {error}") from error
        self._check_shapes(state["model"], kept)
        if kept != self._kept:
            resize(self.model, self.axes, kept)
        self._kept = kept
        self.model.load_state_dict(state["model"])
        self._steps, self.gamma, self._suspects = state["steps"], state["gamma"], suspects
        if budget:
            self._steering = self._steered(budget)
        self._rounded = len(self.activations)
        if state["settled"]:
            self.settle()
        if state["holding"] is not None:
            self.hold()
            assert self._holding is not None
            self._holding.load_state_dict(state["holding"])
        if self._prices:
            self._prices.load_budgets(budgets)
        self._priced = self._backpropagated = False
        self._find_inputs()
        # without neighbours, a model does not ask for the levels that it was fitted to
        levels = {c.name: tables.get(c.name, (None, None))[1] for c in self.compressed}
        self._set_tables(
            {name: model for name, (model, _) in tables.items()},
            {
                c.name: c.levels() if (found := levels[c.name]) is None else found.to(c.original)
                for c in self.compressed
            },
        )
        # as they were measured, on weights of an earlier step
        self._side_bits, self._fixed_bits = state["side_bits"], state["fixed_bits"]

    def _config(self) -> dict[str, Any]:
        quantizers = {
            c.name: [*c.quantizer.original_shape, c.quantizer.grid, c.quantizer.resolution or 0]
            for c in self.compressed
        }
        return {
            "rate": self.rate,
            "coupled": self.coupled,
            "target_bytes": self.target_bytes,
            "total_steps": self._total_steps,
            "costs": self._prices.config() if self._prices else {},
            "activation_bits": self.activation_bits,
            "quantizers": quantizers,
        }

    def _check_state(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise CheckpointError(
                f"state: expected one made by `SelfCompressor.state_dict()`, version {STATE_VERSION}, found "
                + (f"version {state.get('version')}" if isinstance(state, dict) else f"a `{type(state).__name__}`")
            )
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise CheckpointError(f"state: lacks {', '.join(f'`{key}`' for key in sorted(missing))}")
        ours, theirs = self._config(), state["config"]
        for key in ("rate", "coupled", "target_bytes", "total_steps", "costs", "activation_bits"):
            if ours[key] != theirs.get(key):
                raise CheckpointError(
                    f"{key}: `{theirs.get(key)}` in the checkpoint, `{ours[key]}` here\n"
                    "hint: make the SelfCompressor with the options it was saved with"
                )
        for name in ours["quantizers"].keys() | theirs["quantizers"].keys():
            found, expected = ours["quantizers"].get(name, "nothing"), theirs["quantizers"].get(name, "nothing")
            if found != expected:
                raise CheckpointError(
                    f"`{name}`: {expected} in the checkpoint, {found} here\n"
                    "hint: build the network with the code and the options it was saved with"
                )

    def _check_shapes(self, tensors: dict[str, Any], kept: Kept) -> None:
        """Try on a copy without numbers whether the network, made as small as `kept` says, takes these tensors."""
        shadow = meta_copy(self.model)
        if kept != self._kept:
            if self._kept != Kept.full(self.axes):
                raise CheckpointError(
                    "model: channels have been cut from it already, others than in the checkpoint\n"
                    "hint: load into a freshly built network with a new SelfCompressor around it"
                )
            resize(shadow, self.axes, kept)
        ours, theirs = (
            {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
            for state in (shadow.state_dict(), tensors)
        )
        for name in sorted(ours.keys() | theirs.keys()):
            found, expected = ours.get(name, "nothing"), theirs.get(name, "nothing")
            if found != expected:
                raise CheckpointError(
                    f"`{plain_name(name)}`: {expected} in the checkpoint, {found} here\n"
                    "hint: build the network with the code and the options it was saved with"
                )

    def _check_call(self, optimizers: Sequence[Optimizer], averages: Sequence[nn.Module]) -> None:
        if not self._priced:
            raise CallOrderError(
                "step: `penalty()` has not been called since the last step\n"
                "hint: `loss = task_loss + compressor.penalty()`, then `loss.backward()`, `optimizer.step()` and "
                "`compressor.step(optimizer)`"
            )
        if not self._backpropagated:
            raise CallOrderError(
                "step: the penalty took no part in `backward()`\n"
                "hint: add `compressor.penalty()` to the loss before `loss.backward()`"
            )
        used: list[Optimizer | nn.Module] = [*optimizers, *averages]
        if len(used) == len(self._checked) and all(
            known() is one for known, one in zip(self._checked, used, strict=True)
        ):
            return
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        for tensor in self.compressed:
            for what, parameter in (
                ("weight", tensor.original),
                ("bit depths", tensor.quantizer.bits),
                ("exponents", tensor.quantizer.exponent),
            ):
                if parameter.requires_grad and id(parameter) not in held:
                    raise UsageError(
                        f"optimizer: lacks the {what} of `{tensor.name}`\n"
                        "hint: make it after the SelfCompressor, from `compressor.param_groups(lr=...)`"
                    )
        if any(p.requires_grad and id(p) not in held for p in self.activations.parameters()):
            raise UsageError(
                "optimizer: lacks the formats of activations\n"
                "hint: make it after the SelfCompressor, from `compressor.param_groups(lr=...)`"
            )
        for number, average in enumerate(averages):
            check_copy(average, self.model, f"averages[{number}]")
        self._advise(optimizers)
        self._checked = [weakref.ref(one) for one in used]

    def _advise(self, optimizers: Sequence[Optimizer]) -> None:
        """Warn of an optimizer that formats hardly learn with: it would be found by the size of the files alone."""
        if self.rate == "bit-depth":
            return
        steps = {id(c.quantizer.exponent) for c in self.compressed if c.quantizer.exponent.requires_grad}
        groups = [group for optimizer in optimizers if isinstance(optimizer, SGD) for group in optimizer.param_groups]
        if any(id(p) in steps for group in groups if group["lr"] > 0 for p in group["params"]):
            warnings.warn(
                "optimizer: number formats hardly learn by SGD, as their gradients are tiny and differ by powers of "
                "ten: files come out larger, more than twice as large where it was measured\n"
                "hint: give them an Adam of their own: `*groups, formats = compressor.param_groups(lr=0.1, "
                "format_lr=0.02)`, `optimizers = [SGD(groups, momentum=0.9, nesterov=True), Adam([formats])]`, "
                "`compressor.step(optimizers)`",
                stacklevel=4,
            )

    def _note_backward(self, grad: Tensor) -> None:
        self._backpropagated = True
        if self._steering and not self._steering.budget.started:
            self._steering.note_scale(float(grad))
        if self._prices and not self._prices.started:
            self._prices.note_scale(float(grad))

    def _bits(self) -> Tensor:
        """The size that the loss charges for, in bits."""
        if self.rate == "bit-depth":
            return self._nominal_bits()
        # filled in, not copied: a copy cannot be recorded
        total = torch.full((), self._side_bits + self._fixed_bits, device=self.compressed[0].original.device)
        for c in self.compressed:
            q = c.quantizer
            table = self._tables[c.name]
            compile = self._compile and torch.is_grad_enabled()
            formats = q.bits, q.used_exponent(), q.grid
            total = total + code_length(c.rows(), *formats, table, clips=q.clips, compile=compile)
        return total

    def _plan(self, size: int, total_steps: int, attach: Callable[[nn.Module], object]) -> Budget:
        """The way to a size, if there is one. The network is as it was found."""
        least = smallest_bytes(self.model, self.axes, attach)
        if size < least:
            raise UsageError(
                f"target: {size:,} bytes cannot be met: with every weight zero, and all channels cut that can be, "
                f"the file of this network has {least:,} bytes\n"
                "hint: ask for more, or start from a network with fewer layers, or less that stays in float"
            )
        return Budget(size, total_steps)

    def _pulled(self) -> list[nn.Parameter]:
        """The parameters whose gradients say how loss and price compare."""
        return [c.quantizer.bits if self.rate == "bit-depth" else c.original for c in self._weights]

    def _steered(self, budget: Budget) -> Steering:
        return Steering(budget, self.compressed, self._pulled(), self.refresh_every)

    def _steer(self, steering: Steering, *, fitted: bool) -> tuple[str, ...]:
        """Set γ for the steps to come, and trim at the end; `fitted` says that the models are of this moment."""
        self._check_finite()
        size = self._priced_bytes() if fitted else self._size_now()
        self.gamma = steering.update(self._steps, size, lambda: self._bits() / self.weights_total)
        trimmed = steering.trim(self._steps, size, self._size_now, lambda: len(pack(self.model)))
        if trimmed and self.rate == "code-length":
            self._refresh()
        return (f"{trimmed} weights moved one level towards zero to meet the target",) if trimmed else ()

    def _size_now(self) -> float:
        """Bytes of the file: for code length by the price, which is quicker."""
        if self.rate == "bit-depth":
            return float(len(pack(self.model)))
        self._refresh()
        return self._priced_bytes()

    def _priced_bytes(self) -> float:
        """The size by the models in use, in bytes."""
        with torch.no_grad():
            return float(self._bits()) / 8

    def _refresh(self) -> None:
        """Fit the probability models to the levels as they are now."""
        self._check_finite()
        levels = {c.name: c.levels() for c in self.compressed}
        models = {c.name: fit_levels(levels[c.name], c.taps, c.pitch) for c in self.compressed}
        self._set_tables(models, levels)

    def _check_finite(self) -> None:
        for c in self.compressed:
            for what, values in (
                ("weights", c.original),
                ("bit depths", c.quantizer.bits),
                ("exponents", c.quantizer.exponent),
            ):
                if not bool(torch.isfinite(values).all()):
                    raise NonFiniteError(
                        f"`{c.name}`: NaN or infinity in the {what} at step {self._steps}\n"
                        "hint: lower the learning rate, or go back to the last checkpoint"
                    )
        if not all(bool(torch.isfinite(p)) for p in self.activations.parameters()):
            raise NonFiniteError(
                f"activations: NaN or infinity in their formats at step {self._steps}\n"
                "hint: lower the learning rate, or go back to the last checkpoint"
            )

    def _set_tables(self, models: dict[str, LevelModel], levels: dict[str, Tensor]) -> None:
        """Make price tables of models that were fitted to these levels."""
        self._tables, self._side_bits = {}, step_bits(self.model)
        self._revision += 1
        for c in self.compressed:
            if c.name not in models:
                continue
            model = models[c.name]
            self._tables[c.name] = PriceTable(model, levels[c.name], c.taps)
            self._side_bits += side_bits(model) + _exponent_bits(c, model)

    def _measure_fixed(self) -> None:
        """What the file holds beside levels, their side information, norms and scales; it changes only with the shapes.

        And when activations begin to be rounded; the bytes of their formats hardly vary.
        """
        self._rounded = len(self.activations)
        self._revision += 1
        contents = contents_of(self.model)
        levels = [r for r in contents.records if isinstance(r, LevelTensor)]
        coded = sum(size_bits(r) + context_bits(r.model.context) for r in levels) + step_bits(self.model)
        self._fixed_bits = 8 * len(write(contents)) - coded

    def _look(
        self, optimizers: Sequence[Optimizer], averages: Sequence[nn.Module], *, at_once: bool
    ) -> tuple[Plan | None, tuple[str, ...]]:
        """Drive to zero what dead channels still emit; cut those that were dead at the last look, too, or `at_once`."""
        silence_step(self.model, self.axes, self._kept, SILENCE_PER_STEP * self.check_every)
        dead = find_dead(self.model, self.axes, self._kept)
        plan = dead if at_once else dead & self._suspects if self._suspects else None
        self._suspects = dead
        if not plan:
            return None, ()
        notes: list[str] = []
        self._kept = apply_plan(
            plan, self.model, self.axes, self._kept, optimizers, averages=averages, on_note=notes.append
        )
        self._find_inputs()
        self._measure_fixed()
        return plan, tuple(notes)

    def _nominal_bits(self) -> Tensor:
        """Eq. 4 or 5 over all weights. Inputs that are dead or gone cost nothing."""
        total = torch.zeros((), device=self.compressed[0].original.device)
        for c in self._weights:
            bits, inputs = c.quantizer.bits, self._inputs.get(c.name)
            if inputs is None:
                total = total + bit_depth(bits, c.rows().shape[1])
                continue
            # groups of a transposed convolution; those of other convolutions share their input positions
            groups = c.quantizer.groups
            taps = c.rows().shape[1] * groups // inputs.length
            parts = (bits, inputs.bits(), inputs.outside.to(bits.device))
            for mine, feeding, outside in zip(*(p.view(groups, -1) for p in parts), strict=True):
                if self.coupled:
                    total = total + coupled_bit_depth(mine, feeding, taps)
                else:
                    total = total + bit_depth(mine, taps * (feeding.detach() > 0).sum())
                total = total + bit_depth(mine, taps * outside.sum())
        return total

    def _find_inputs(self) -> None:
        """Which channels feed which inputs of the compressed weights; it changes with every cut."""
        if self._prices:
            self._prices.resized(self._kept)
        weights = {c.name: c for c in self._weights}
        positions = Positions(self.model, self.axes, self._kept)
        self._inputs: dict[str, _Inputs] = {}
        for c, members in zip(self.axes.classes, self._kept.members, strict=True):
            producers = self._producers(c, members, positions)
            for reader in c.having("reads") if producers else ():
                weight = weights.get(reader.tensor)
                if weight is None or weight.quantizer.axis == reader.axis:
                    continue
                owned = [positions.now(reader, m) for m in members]
                inputs = self._inputs.setdefault(reader.tensor, _Inputs(weight.original, reader.axis))
                inputs.connect(producers, owned)

    def _producers(
        self, c: ChannelClass, members: Sequence[int], positions: Positions
    ) -> list[tuple[nn.Parameter, list[list[int]]]]:
        """Bit depths of all that produces a class, and which of them belong to each member.

        Nothing if the class is produced, in part, by what has no bit depths along it: then it is never without bits.
        """
        weights = {w.name: w for w in self._weights}
        found = []
        for producer in c.having("produces"):
            weight = weights.get(producer.tensor)
            if weight is None or weight.quantizer.axis != producer.axis:
                return []
            length = weight.original.shape[producer.axis]  # of one group, in a transposed convolution
            starts = [g * length for g in range(weight.quantizer.groups)]
            found.append(
                (weight.quantizer.bits, [[s + i for s in starts for i in positions.now(producer, m)] for m in members])
            )
        return found


class _Inputs:
    """Which channels feed the inputs of a weight.

    Attributes:
        length: number of inputs.
        outside: (length,) whether an input is fed by what has no bit depths, such as the network's own input.
    """

    def __init__(self, weight: Tensor, axis: int) -> None:
        self.length = weight.shape[axis]
        self.outside = torch.ones(self.length, dtype=torch.bool, device=weight.device)
        self._sources: list[_Source] = []

    def connect(self, producers: Sequence[tuple[nn.Parameter, list[list[int]]]], inputs: list[list[int]]) -> None:
        """Note that each member of a class owns these `inputs`, and these rows of each of its producers."""
        columns, owners = _flattened(inputs, self.outside.device)
        self.outside[columns] = False
        rows = [_flattened(rows, bits.device) for bits, rows in producers]
        self._sources.append(
            _Source(
                bits=[bits for bits, _ in producers],
                rows=[index for index, _ in rows],
                members=torch.cat([member for _, member in rows]),
                count=len(inputs),
                columns=columns,
                owners=owners,
            )
        )

    def bits(self) -> Tensor:
        """(length,) bit depth of the channel that feeds each input, 0 for those from outside.

        Where several weights produce a channel, as in a residual sum, it is the largest.
        """
        like = self._sources[0].bits[0]
        result = like.new_zeros(self.length)
        for s in self._sources:
            produced = torch.cat([bits[index.to(bits.device)] for bits, index in zip(s.bits, s.rows, strict=True)])
            # not from zero on: a zero would tie with a producer of no bits, and take half of its gradient
            lowest = like.new_full((s.count,), -math.inf)
            largest = lowest.scatter_reduce(0, s.members.to(like.device), produced, "amax")
            result = result.index_copy(0, s.columns.to(like.device), largest[s.owners.to(like.device)])
        return result


@dataclass(frozen=True, eq=False)
class _Source:
    """The channels of a class that feed a weight."""

    bits: list[nn.Parameter]
    """Bit depths of each producer."""
    rows: list[Tensor]
    """Of each producer, the rows that belong to the class …"""
    members: Tensor
    """… and to which of its members, over all producers."""
    count: int
    """Number of members."""
    columns: Tensor
    """The inputs that belong to the class …"""
    owners: Tensor
    """… and to which of its members."""


def _learn_step_alone(quantizer: ChannelQuantizer, most: float) -> None:
    """Leave a format its exponent to learn: where a code is paid for, a level costs what it costs, at any range.

    A range that is learned, too, clips the largest weights of a channel, whose gradients are a hundred times those of
    rounding and fall on the exponent as well: it then answers its price ten times more slowly (`docs/log.md`).
    """
    quantizer.bits.data.fill_(most)
    quantizer.bits.requires_grad_(False)
    quantizer.clips = most < FILE_BITS


def _checked_gamma(value: float) -> float:
    if not 0 <= value < math.inf:
        raise UsageError(f"gamma: expected a finite number of 0 or more, found {value}")
    return value


def _flattened(lists: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """All entries of the lists, and the number of the list that each is from."""
    return (
        torch.tensor([i for part in lists for i in part], device=device),
        torch.tensor([number for number, part in enumerate(lists) for _ in part], device=device),
    )


def _exponent_bits(tensor: Compressed, model: LevelModel) -> float:
    """Bits of the exponents of a tensor in the file: one for every living row."""
    if not model.top:
        return 0.0
    used = tensor.quantizer.used_exponent().detach() * (tensor.quantizer.resolution or 1)
    values = used.round().cpu().numpy().astype(np.int64)[model.alive_rows]
    return integers_bits(values, int(values.min()), int(values.max()))


def _table_to_dict(table: PriceTable) -> dict[str, Any]:
    model = table.model
    lists = {"rows": model.rows, "columns": model.columns, "taps": model.taps, "decays": model.decays}
    masks = {"alive_rows": model.alive_rows, "alive_columns": model.alive_columns}
    tensors = {k: None if v is None else torch.from_numpy(v.copy()) for k, v in (lists | masks).items()}
    context = None if model.context is None else asdict(model.context)
    numbers = {"offset": model.offset, "decay": model.decay, "top": model.top}
    return {**numbers, **tensors, "context": context, "levels": table.levels}


def _table_from_dict(values: dict[str, Any]) -> tuple[LevelModel, Tensor | None]:
    """The model, and the levels that it was fitted to where it looks at neighbours."""
    plain: dict[str, Any] = {
        k: v.numpy() if isinstance(v, Tensor) else v for k, v in values.items() if k not in ("context", "levels")
    }
    context = None if values["context"] is None else Context(**values["context"])
    return LevelModel(**plain, context=context), values["levels"]
