"""Networks that differ in nothing but their depth, trained side by side: what `explore_depth` shows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lib import checks
from lib.checks import Divergence
from lib.dense.distances import SuccessiveDistance
from lib.dense.network import NetworkConfig, Weights
from lib.dense.training import lockstep, one_thread, train
from lib.figures.experiment import Progress, entries, last, silent
from lib.measures import Slope, fit_slope
from lib.tables import from_rows

# Layers at most this far apart are equal up to rounding (of float64, for weights of order 1).
ROUNDING = 1e-12
SMALLEST_DEPTH = 4


def depths_up_to(deepest: int) -> list[int]:
    """The powers of two from `SMALLEST_DEPTH` on below ``deepest``, and ``deepest``: two depths at least, if it is 2 or
    more."""
    smallest = min(SMALLEST_DEPTH, max(deepest // 2, 1))
    return [2**power for power in range(20) if smallest <= 2**power < deepest] + [deepest]


def fit_above_rounding(depths: Iterable[int], distances: Iterable[float]) -> Slope | None:
    """The rate in L of successive distances; None if fewer than two are more than rounding."""
    found = [pair for pair in zip(depths, distances, strict=True) if pair[1] > ROUNDING]
    return fit_slope(*zip(*found, strict=True)) if len(found) > 1 else None


@dataclass(frozen=True)
class DepthsConfig:
    """Networks that differ in nothing but their depth, trained together for the states t <= ``iterations``.

    ``depths`` lists their L; ``network`` gives everything else (its depth is not used).
    """

    network: NetworkConfig
    depths: list[int]
    iterations: int
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        checks.make_plain(self)
        checks.positive_ints("depths", self.depths, least=2)
        checks.positive_int("iterations", self.iterations)
        checks.positive_float("learning_rate", self.learning_rate)


@dataclass
class DepthsState:
    """What a training of `depths_steps` has come to at ``iteration`` t, by depth.

    ``losses`` at the iterations 0..t, ``weights`` the live ones, ``distances`` the values of `SuccessiveDistance`
    over the states so far; ``start`` the deepest network's weights at t = 0.
    """

    config: DepthsConfig
    iteration: int
    losses: dict[int, list[float]]
    weights: dict[int, Weights]
    distances: dict[int, dict[str, float]]
    start: Weights | None = None

    def slope(self) -> Slope | None:
        """The rate in L of max over k and t of |Z_{k+1}(t) - Z_k(t)|_F, fitted over the depths of at least 8;
        None as long as layers are equal up to rounding, or with fewer than two such depths."""
        depths = [depth for depth in self.config.depths if depth >= 8]
        return fit_above_rounding(depths, [self.distances[depth]["max_distance"] for depth in depths])

    def tables(self, row: int, column: int) -> dict[str, dict[str, list]]:
        """As tidy tables: "loss", the entry (``row``, ``column``) of V_k and W_k as "weights", and "distance"."""
        depths = self.config.depths
        weights = [
            {"depth": depth, "layer": layer, "row": row, "column": column, "entry_V": V, "entry_W": W}
            for depth in depths
            for layer, (V, W) in enumerate(zip(*entries(self.weights[depth], row, column), strict=True), start=1)
        ]
        losses = [
            {"depth": depth, "iteration": iteration, "loss": loss}
            for depth in depths
            for iteration, loss in enumerate(self.losses[depth])
        ]
        distances = [{"depth": depth, "iterations": self.iteration + 1, **self.distances[depth]} for depth in depths]
        return {"loss": from_rows(losses), "weights": from_rows(weights), "distance": from_rows(distances)}


def depths_steps(config: DepthsConfig) -> Iterator[DepthsState]:
    """Train the networks in lockstep; yields the state after each iteration (the same object, growing)."""
    trainings = [
        train(config.network.at_depth(depth), config.learning_rate, config.iterations) for depth in config.depths
    ]
    running = {depth: SuccessiveDistance() for depth in config.depths}
    state = DepthsState(config, 0, {depth: [] for depth in config.depths}, {}, {})
    for records in lockstep(trainings):
        for depth, record in zip(config.depths, records, strict=True):
            running[depth].update(record.weights)
            state.losses[depth].append(record.loss)
            state.weights[depth] = record.weights
            state.distances[depth] = running[depth].values()
            state.iteration = record.iteration
        state.start = state.start or records[-1].weights.clone()
        yield state


def growing_depths(config: DepthsConfig, progress: Progress = silent) -> DepthsState:
    """The state of `depths_steps` after the last iteration."""
    with one_thread():
        return last(progress(depths_steps(config), config.iterations + 1))


@dataclass
class Comparison:
    """One or two networks side by side: their ``states``, and a ``sentence`` for each that diverged."""

    states: list[DepthsState]
    sentence: str = ""

    @property
    def iteration(self) -> int:
        return max(state.iteration for state in self.states)


def side_by_side(trainings: Sequence[Iterator[DepthsState]]) -> Iterator[Comparison]:
    """Advance trainings in turns, one that diverges stays where it is; yields the same object after every turn."""
    comparison = Comparison([next(training) for training in trainings])
    yield comparison
    going = dict(enumerate(trainings))
    while going:
        for number, training in list(going.items()):
            try:
                comparison.states[number] = next(training)
            except StopIteration:
                del going[number]
            except Divergence as error:
                del going[number]
                comparison.sentence = f"{comparison.sentence} {error}".strip()
            yield comparison
