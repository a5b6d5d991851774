"""Networks of one block that differ only in their depth, trained side by side, and the distances of their layers."""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lib import checks
from lib.blocks.block import Block, describe_same_block
from lib.blocks.network import INITIALISATIONS, BlockNetwork, Loss, convert_data
from lib.blocks.training import check_optimizer, train
from lib.measures import integral_distance
from lib.parallel import use_one_thread
from lib.tables import from_rows

ALL = "all"  # the parameter's name in rows on all of them together
ONE_THREAD = 2**15  # entries of x on the CPU, below which products gain nothing from a second thread
STEP = {torch.float64: 1e-3, torch.float32: 2e-2}  # of the difference that replaces the derivative, by dtype


@dataclass(frozen=True)
class DistancesConfig:
    """Networks of one ``block`` (a factory, see `lib.blocks.network.BlockNetwork`) at several ``depths``.

    Main arguments: ``x`` (n, ...) and ``y`` (see `lib.blocks.network.convert_data`); ``iterations`` T, steps of
    ``learning_rate`` times the multiplier L; ``record_at``, the iterations that have rows in the table (default: only
    T).

    Other arguments: ``loss``, (F(x), y) -> one number; ``initialisation``, "weight-tied" or "iid"; ``seed`` of the
    blocks; ``optimizer``, only "sgd"; ``chunk``, see `BlockNetwork`.
    """

    block: Block
    depths: Sequence[int]
    x: Tensor
    y: Tensor
    iterations: int = 60
    learning_rate: float = 0.1
    record_at: Sequence[int] | None = None
    loss: Loss = nn.functional.mse_loss
    initialisation: str = "weight-tied"
    seed: int = 0
    optimizer: str = "sgd"
    chunk: int = 32

    def __post_init__(self) -> None:
        for name in ("depths", "iterations", "learning_rate", "record_at", "seed", "chunk"):
            object.__setattr__(self, name, checks.plain(getattr(self, name)))
        checks.positive_ints("depths", self.depths, least=2)
        checks.positive_int("iterations", self.iterations)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.choice("initialisation", self.initialisation, INITIALISATIONS)
        check_optimizer(self.optimizer)
        if self.record_at is not None:  # it may be a generator
            object.__setattr__(self, "record_at", list(checks.record_iterations(self.record_at, self.iterations)))
            if not self.record_at:
                raise ValueError("record_at is empty, expected the iterations that have rows, such as the last one.")
        for name, values in zip("xy", convert_data(self.x, self.y, self.loss), strict=True):
            object.__setattr__(self, name, values)

    @property
    def recorded(self) -> list[int]:
        """The iterations that have rows in the table."""
        return sorted({self.iterations} if self.record_at is None else {*self.record_at})


def _squares(Z: Tensor) -> Tensor:
    """|Z_k|_F^2 of each layer: (L, ...) -> (L,)."""
    return Z.reshape(len(Z), -1).square().sum(dim=1)


@dataclass
class _Measured:
    """The start of the network of one depth, and maxima over its states so far."""

    network: BlockNetwork
    start: dict[str, Tensor]
    start_output: Tensor
    largest: dict[str, float]

    def update(self) -> None:
        squares = {name: _squares(torch.diff(Z, dim=0)) for name, Z in self.network.weights.items()}
        squares[ALL] = sum(squares.values())
        for name, each in squares.items():
            self.largest[name] = max(self.largest.get(name, 0.0), math.sqrt(float(each.max())))

    def movement(self, names: Iterable[str]) -> dict[str, float]:
        """The distance of these parameters from their start: the largest of a layer, and that of all relative to its
        norm."""
        change = sum(_squares(self.network.weights[name] - self.start[name]) for name in names)
        norm = math.sqrt(sum(float(self.start[name].square().sum()) for name in names))
        return {
            "moved": math.sqrt(float(change.max())),
            "moved_share": math.sqrt(float(change.sum())) / norm if norm else math.nan,
        }

    def from_linear(self) -> float:
        """|F_t - F_0 - DF_0 (Z(t) - Z(0))| / |F_t - F_0|, norms over the data; nan if the output has not changed.

        DF_0 is a central difference, which also works for blocks without forward-mode derivatives.
        """
        change = self.network.output - self.start_output
        if not change.any():
            return math.nan
        step, weights = STEP[change.dtype], self.network.weights
        ahead, back = (
            self.network.output_at({name: Z + sign * step * (weights[name] - Z) for name, Z in self.start.items()})
            for sign in (1, -1)
        )
        return float((change - (ahead - back) / (2 * step)).norm() / change.norm())


@dataclass
class DistancesState:
    """The state of `distance_steps` at ``iteration`` t, by depth.

    ``losses`` are those at the iterations 0..t. ``weights`` {parameter: (L, ...)} change in place. ``rows`` are those
    of the table so far.
    """

    config: DistancesConfig
    iteration: int = 0
    losses: dict[int, list[float]] = field(default_factory=dict)
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    measured: dict[int, _Measured] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def max_distances(self, parameter: str = ALL) -> list[float]:
        """max over k and the states so far of |Z_{k+1} - Z_k|_F, for each depth."""
        return [self.measured[depth].largest[parameter] for depth in self.config.depths]

    def table(self, by_parameter: bool = False) -> dict[str, list]:
        """The rows so far, as `successive_distances` describes them."""
        return from_rows(row for row in self.rows if (row["parameter"] == ALL) != by_parameter)

    def _measure(self) -> None:
        depths = self.config.depths
        for depth in depths:
            measured, weights = self.measured[depth], self.weights[depth]
            linear = measured.from_linear()
            groups = {ALL: list(weights)} | {name: [name] for name in weights}
            for parameter, names in groups.items():
                others = {"to_double": 2 * depth, "to_deepest": depths[-1] if depth < depths[-1] else 0}
                to_others = {name: self._distance(names, depth, other) for name, other in others.items()}
                self.rows.append(
                    {
                        "depth": depth,
                        "parameter": parameter,
                        "step": self.iteration,
                        "learning_rate_multiplier": depth,
                        "loss": self.losses[depth][-1],
                        "max_distance": measured.largest[parameter],
                        **to_others,
                        **measured.movement(names),
                        "from_linear": linear,
                    }
                )

    def _distance(self, names: Iterable[str], depth: int, other: int) -> float:
        """The distance between two depths, as functions of s that are constant on each cell [(k-1)/L, k/L)."""
        if other not in self.weights:
            return math.nan
        pairs = ([self.weights[each][name].reshape(each, -1) for each in (depth, other)] for name in names)
        return math.hypot(*(integral_distance(*pair) for pair in pairs))


def distance_steps(config: DistancesConfig) -> Iterator[DistancesState]:
    """Train the networks side by side; yields the state after each iteration (the same object, growing)."""
    trainings = [
        train(
            config.block, depth, config.x, config.y, config.learning_rate, config.iterations,
            loss=config.loss, initialisation=config.initialisation, seed=config.seed, chunk=config.chunk,
        )
        for depth in config.depths
    ]  # fmt: skip
    state, recorded = DistancesState(config), config.recorded
    for records in zip(*trainings, strict=True):
        if not state.measured:
            _check_same_start([record.network for record in records])
        for depth, record in zip(config.depths, records, strict=True):
            if depth not in state.measured:
                start = {name: Z.clone() for name, Z in record.weights.items()}
                state.measured[depth] = _Measured(record.network, start, record.network.output, {})
            state.measured[depth].update()
            state.losses.setdefault(depth, []).append(record.loss)
            state.weights[depth] = record.weights
        state.iteration = records[0].iteration
        if state.iteration in recorded:
            state._measure()
        yield state


def _check_same_start(networks: Sequence[BlockNetwork]) -> None:
    """Raise ValueError unless the first layers of all these networks are the same."""
    expected = {name: Z[0] for name, Z in networks[0].weights.items()}
    if ALL in expected:
        name = type(networks[0].block).__name__
        raise ValueError(f"{name} has a parameter {ALL}, the table's word for all of them together: rename it.")
    for network in networks[1:]:
        if network.block is networks[0].block:
            raise ValueError(describe_same_block(network.block))
        found = {name: Z[0] for name, Z in network.weights.items()}
        if found.keys() != expected.keys() or not all(torch.equal(found[name], expected[name]) for name in found):
            raise ValueError(
                f"block() makes a {type(network.block).__name__} with other parameters at each call, from the same "
                "seed: draw them with torch's own random numbers on the CPU, so that networks differ in nothing but "
                "depth."
            )


def compare_depths(
    config: DistancesConfig, progress: Callable[[Iterable, int], Iterable] | None = None
) -> DistancesState:
    """The state of `distance_steps` after the last iteration. ``progress`` may show a bar."""
    states = distance_steps(config)
    small = config.x.device.type == "cpu" and config.x.numel() < ONE_THREAD
    with use_one_thread() if small else contextlib.nullcontext():
        return deque(progress(states, config.iterations + 1) if progress else states, maxlen=1).pop()


# The fields of `DistancesConfig` that `successive_distances` takes by name as ``options``.
OPTIONS = ("loss", "initialisation", "seed", "optimizer", "chunk")


def successive_distances(
    block: Block,
    depths: Sequence[int],
    x: Tensor,
    y: Tensor,
    *,
    iterations: int = 60,
    learning_rate: float = 0.1,
    record_at: Sequence[int] | None = None,
    by_parameter: bool = False,
    progress: Callable[[Iterable, int], Iterable] | None = None,
    **options: Any,
) -> dict[str, list]:
    """Train networks of ``block`` at several ``depths`` and measure the distances of their layers.

    Main arguments: ``block``, a class or function without arguments that makes a `torch.nn.Module` whose ``forward(h)``
    keeps the shape of h; ``x`` (n, ...), which is h_0, and the targets ``y`` of the output h_L, as tensors, arrays or
    lists; ``iterations``, steps of ``learning_rate`` (times L, for the flow dZ_k/dt = -L dl/dZ_k).

    Other arguments: ``record_at``, the iterations that have rows (default: the last one); ``by_parameter``, a row for
    each parameter instead of one for all together; ``progress``, such as `lib.progress`, a bar; ``options``: ``loss``,
    ``initialisation`` ("weight-tied" or "iid"), ``seed``, ``chunk`` and the like of `DistancesConfig`.

    Returns a table with the columns ``depth`` L, ``parameter``, ``step`` t, ``learning_rate_multiplier`` (L), ``loss``
    and

    - ``max_distance``: max over layers k and states up to t of |Z_{k+1} - Z_k|_F. Its slope in L is -1 if the layers
      sample a Lipschitz function of s = k/L, and 0 if they are independent;
    - ``to_double``, ``to_deepest``: (int_0^1 |Z^L(s) - Z^M(s)|_F^2 ds)^(1/2) at t, for M = 2L and for the largest M
      (nan if there is no such network);
    - ``moved``: max over k of |Z_k(t) - Z_k(0)|_F; ``moved_share``: that of all layers together, over the norm of Z(0);
    - ``from_linear``: |F_t - F_0 - DF_0 (Z(t) - Z(0))| / |F_t - F_0|, near 0 if the network stays close to its
      linearisation. Layers are then alike because they hardly move ("lazy training"), whatever the block.

    Steps that are too long for the flow make layers differ even before they diverge: if the slope depends on
    ``learning_rate`` at the same time t, it is not that of the flow.

    Raises TypeError or ValueError, one sentence, for a block or values that do not fit; `Divergence` if the loss
    stops being finite.
    """
    if unknown := [name for name in options if name not in OPTIONS]:
        raise TypeError(f"successive_distances has no option {unknown[0]}, expected some of: {', '.join(OPTIONS)}.")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is {progress!r}, expected a function, such as `lib.progress`.")
    config = DistancesConfig(block, depths, x, y, iterations, learning_rate, record_at, **options)
    return compare_depths(config, progress).table(by_parameter)
