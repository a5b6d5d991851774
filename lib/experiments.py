"""The experiments of Figures 1 and 2: each trains, reduces trajectories as they arise, returns tidy tables.

Each is a generator ``..._steps`` of the tables so far, for a picture that grows while it trains, and a function that
runs it to its end.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lib import checks, conventions, limit
from lib.digits import DECIMALS, LIMIT_DECIMALS, difference, square
from lib.distances import SuccessiveDistance, distance
from lib.network import NetworkConfig, Weights
from lib.tables import from_rows
from lib.training import Record, lockstep, train

# Wraps an iterable of a known length, as `lib.training.progress` does with a bar.
Progress = Callable[[Iterable, int], Iterable]


def silent(records: Iterable, total: int) -> Iterable:
    """No progress bar."""
    return records


def evenly(iterations: int, count: int) -> list[int]:
    """At most ``count`` >= 2 evenly spaced iterations from 0 to ``iterations``, both among them."""
    return sorted({round(t) for t in np.linspace(0, iterations, min(count, iterations + 1))})


def _last(steps: Iterable):
    return deque(steps, maxlen=1).pop()


def _sorted_table(rows: list[dict], *columns: str) -> dict[str, list]:
    return from_rows(sorted(rows, key=lambda row: [row[column] for column in columns]))


@dataclass(frozen=True)
class SuccessiveDistanceConfig:
    """Figure 1 left: networks of several ``depths``, trained with ``learning_rate`` (steps L * eta).

    ``iterations`` lists the training times x: a curve each, over the states t < x. ``slope_from`` is the
    smallest depth that the slope is fitted over. ``network`` gives everything else (its depth is not used).
    """

    network: NetworkConfig
    depths: list[int]
    iterations: list[int]
    learning_rate: float = 0.01
    slope_from: int = 16

    def __post_init__(self) -> None:
        checks.positive_ints("depths", self.depths, least=2)
        checks.positive_ints("iterations", self.iterations)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.two_sizes(self.slope_from, self.depths)

    @property
    def steps(self) -> int:
        """How many states are looked at."""
        return self.iterations[-1]


def successive_distance_steps(config: SuccessiveDistanceConfig) -> Iterator[dict[str, list]]:
    """The table of `successive_distance` so far, after each iteration (empty until the first training time)."""
    trainings = []
    for depth in config.depths:
        network = config.network.at_depth(depth)
        trainings.append(train(network, config.learning_rate, config.iterations[-1] - 1))
    running = [SuccessiveDistance() for _ in config.depths]
    rows = []
    for records in lockstep(trainings):
        for depth, record, so_far in zip(config.depths, records, running, strict=True):
            so_far.update(record.weights)
            if record.iteration + 1 in config.iterations:
                distances = {name: difference(value) for name, value in so_far.values().items()}
                rows.append({"depth": depth, "iterations": record.iteration + 1, **distances})
        yield _sorted_table(rows, "depth", "iterations")


def successive_distance(config: SuccessiveDistanceConfig, progress: Progress = silent) -> dict[str, list]:
    """The table of ``figure_1_left.csv``: a row for each depth and each training time in ``iterations``."""
    return _last(progress(successive_distance_steps(config), config.steps))


@dataclass(frozen=True)
class LimitDistanceConfig:
    """Figure 1 right: the distance between networks of several ``depths`` and the large-depth limit.

    The states t < ``iterations`` are compared, every ``every``-th. ``reference`` is "network", a network of
    ``reference_depth`` layers in the limit's place, or "limit", the solution of the limit's own equations
    to an error of ``tolerance`` (in the unit of the distances themselves). ``sampling``: see
    `conventions.SAMPLING_RULES`. ``slope_from``: the smallest depth that the rate is fitted over.
    """

    network: NetworkConfig
    depths: list[int]
    iterations: int
    every: int = 1
    learning_rate: float = 0.01
    reference: str = "network"
    reference_depth: int = 2**14
    sampling: str = "integral"
    tolerance: float = 1e-5
    slope_from: int = 16

    def __post_init__(self) -> None:
        checks.positive_ints("depths", self.depths)
        checks.positive_int("iterations", self.iterations)
        checks.positive_int("every", self.every)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.choice("reference", self.reference, REFERENCES)
        checks.positive_int("reference_depth", self.reference_depth)
        checks.choice("sampling", self.sampling, conventions.SAMPLING_RULES)
        checks.positive_float("tolerance", self.tolerance)
        checks.two_sizes(self.slope_from, self.depths)
        if self.reference == "limit":
            limit.check_exists(self.network)
        if self.reference == "network" and self.depths[-1] >= self.reference_depth:
            raise ValueError(
                f"reference_depth is {self.reference_depth}, expected more than the deepest network's "
                f"{self.depths[-1]} layers."
            )

    @property
    def recorded(self) -> list[int]:
        """The iterations t whose states are compared, the last one among them."""
        return sorted({*range(0, self.iterations, self.every), self.iterations - 1})

    @property
    def steps(self) -> int:
        """How many states are looked at."""
        return len(self.recorded)


def _network_reference(config: LimitDistanceConfig) -> Iterable[Callable[[Record], tuple[float, float]]]:
    """At each recorded iteration a function: a network's record -> its distances of V and of W."""
    network = config.network.at_depth(config.reference_depth)
    for reference in train(network, config.learning_rate, config.recorded[-1], config.recorded):

        def distances(record: Record, deep=reference.weights) -> tuple[float, float]:
            weights = record.weights
            return tuple(distance(*pair, config.sampling) for pair in ((weights.V, deep.V), (weights.W, deep.W)))

        yield distances


def _limit_reference(config: LimitDistanceConfig) -> Iterable[Callable[[Record], tuple[float, float]]]:
    """The same for the limit's own equations."""
    records = limit.train(
        config.network, config.learning_rate, config.recorded[-1], config.recorded, tolerance=config.tolerance
    )
    for reference in records:

        def distances(record: Record, ode=reference.ode) -> tuple[float, float]:
            by_name = ode.distance_to_network(record.weights, config.sampling)
            return by_name["V"], by_name["W"]

        yield distances


REFERENCES = {"network": _network_reference, "limit": _limit_reference}


def limit_distance_steps(config: LimitDistanceConfig) -> Iterator[dict[str, list]]:
    """The table of `limit_distance` so far, after each recorded iteration."""
    trainings = [
        train(config.network.at_depth(depth), config.learning_rate, config.recorded[-1], config.recorded)
        for depth in config.depths
    ]
    decimals = LIMIT_DECIMALS if config.reference == "limit" else DECIMALS
    rows = []
    for distances, records in zip(REFERENCES[config.reference](config), lockstep(trainings), strict=True):
        for depth, record in zip(config.depths, records, strict=True):
            V, W = (difference(value, decimals) for value in distances(record))
            rows.append({"depth": depth, "iteration": record.iteration, "distance_V": V, "distance_W": W})
        yield _sorted_table(rows, "depth", "iteration")


def limit_distance(config: LimitDistanceConfig, progress: Progress = silent) -> dict[str, list]:
    """The table of ``figure_1_right.csv``: a row for each depth and each recorded iteration."""
    return _last(progress(limit_distance_steps(config), config.steps))


@dataclass(frozen=True)
class LongTimeConfig:
    """Figure 2: one network, trained for long.

    ``recorded`` is the number of times, at most 100, at which the entry (``row``, ``column``) of V_k and of
    W_k is kept, evenly spaced over the states t <= ``iterations``; the loss is kept every ``loss_every``
    iterations. Indices count from 0 in the layout of `lib.network`: V_k is (m, q), W_k (q, m).
    """

    network: NetworkConfig
    iterations: int
    learning_rate: float = 0.005
    recorded: int = 100
    loss_every: int = 1
    row: int = 0
    column: int = 0

    def __post_init__(self) -> None:
        checks.positive_int("iterations", self.iterations)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.positive_int("recorded", self.recorded, least=2)
        checks.positive_int("loss_every", self.loss_every)
        if self.recorded > 100:
            raise ValueError(f"recorded is {self.recorded}, expected at most 100 lines in one picture.")
        largest = min(self.network.hidden, self.network.width) - 1
        for name in ("row", "column"):
            checks.positive_int(name, getattr(self, name), least=0)
            if getattr(self, name) > largest:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected at most {largest}, so that both V_k "
                    f"({self.network.width} x {self.network.hidden}) and W_k have that entry."
                )

    @property
    def weight_iterations(self) -> list[int]:
        """The iterations whose weights are kept, the first and the last among them."""
        return evenly(self.iterations, self.recorded)

    @property
    def loss_iterations(self) -> list[int]:
        """The iterations whose loss is kept, the first and the last among them."""
        return sorted({*range(0, self.iterations + 1, self.loss_every), self.iterations})

    @property
    def kept(self) -> list[int]:
        """The iterations of which anything is kept."""
        return sorted({*self.weight_iterations, *self.loss_iterations})

    @property
    def steps(self) -> int:
        """How many states are looked at."""
        return len(self.kept)


def entries(weights: Weights, row: int, column: int) -> tuple[list[float], list[float]]:
    """The entry (``row``, ``column``) of V_k: (m, q) and of W_k: (q, m) across the layers."""
    return weights.V[:, row, column].tolist(), weights.W[:, row, column].tolist()


def long_time_steps(config: LongTimeConfig) -> Iterator[tuple[dict[str, list], dict[str, list]]]:
    """The tables of `long_time` so far, after each iteration in ``config.kept`` (the same two dicts, growing)."""
    keep_weights, keep_loss = set(config.weight_iterations), set(config.loss_iterations)
    loss = {"iteration": [], "loss": []}
    columns = ("iteration", "layer", "row", "column", "entry_V", "entry_W")
    weights = {name: [] for name in columns}
    layers = range(1, config.network.depth + 1)
    for record in train(config.network, config.learning_rate, config.iterations, config.kept):
        if record.iteration in keep_loss:
            loss["iteration"].append(record.iteration)
            loss["loss"].append(square(record.loss))
        if record.iteration in keep_weights:
            curves = (map(difference, curve) for curve in entries(record.weights, config.row, config.column))
            constant = [record.iteration], [config.row], [config.column]
            iteration, row, column = (value * config.network.depth for value in constant)
            for name, values in zip(columns, (iteration, layers, row, column, *curves), strict=True):
                weights[name].extend(values)
        yield loss, weights


def long_time(config: LongTimeConfig, progress: Progress = silent) -> tuple[dict[str, list], dict[str, list]]:
    """The tables of ``figure_2.csv`` and ``figure_2_weights.csv``."""
    return _last(progress(long_time_steps(config), config.steps))


def mean_log_loss_rate(loss: dict[str, list], last: float = 0.5) -> float:
    """-d(log loss)/dt per iteration over the ``last`` part of training (least squares)."""
    t, value = np.asarray(loss["iteration"], dtype=float), np.asarray(loss["loss"], dtype=float)
    keep = (t >= t[-1] * (1 - last)) & (value > 0)
    if keep.sum() < 2:
        return math.nan
    return float(-np.polyfit(t[keep], np.log(value[keep]), 1)[0])
