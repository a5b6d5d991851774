"""Networks that differ only in their depth, trained side by side for `explore_depth`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lib import checks
from lib.checks import Divergence
from lib.dense.distances import SuccessiveDistance
from lib.dense.network import NetworkConfig, Weights
from lib.dense.training import run_in_lockstep, train
from lib.figures.experiment import Progress, read_entries, silent, take_last
from lib.parallel import use_one_thread
from lib.rates import Slope, fit_slope
from lib.tables import from_rows

ROUNDING = 1e-12  # layers of order 1 at a smaller distance are equal up to rounding in float64
SMALLEST_DEPTH = 4


def list_depths(deepest: int) -> list[int]:
    """The powers of two from `SMALLEST_DEPTH` on that are below ``deepest``, and ``deepest``. If it is 2 or more, there
    are at least two depths."""
    smallest = min(SMALLEST_DEPTH, max(deepest // 2, 1))
    return [2**power for power in range(20) if smallest <= 2**power < deepest] + [deepest]


def fit_above_rounding(depths: Iterable[int], distances: Iterable[float]) -> Slope | None:
    """The rate in L of successive distances; None if fewer than two are above rounding."""
    found = [pair for pair in zip(depths, distances, strict=True) if pair[1] > ROUNDING]
    return fit_slope(*zip(*found, strict=True)) if len(found) > 1 else None


@dataclass(frozen=True)
class DepthsConfig:
    """Networks that differ only in their depth, trained together for the states t <= ``iterations``.

    ``depths`` are their L. ``network`` gives everything else; its depth is not used.
    """

    network: NetworkConfig
    depths: list[int]
    iterations: int
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        checks.check_fields(self, "iterations", "learning_rate", depths=2)


@dataclass
class DepthsState:
    """The state of `depths_steps` at ``iteration`` t, by depth.

    ``losses`` are those at the iterations 0..t. ``weights`` change in place. ``distances`` are the values of
    `SuccessiveDistance` over the states so far. ``start`` holds the deepest network's weights at t = 0.
    """

    config: DepthsConfig
    iteration: int
    losses: dict[int, list[float]]
    weights: dict[int, Weights]
    distances: dict[int, dict[str, float]]
    start: Weights | None = None

    def slope(self) -> Slope | None:
        """The rate in L of max over k and t of |Z_{k+1}(t) - Z_k(t)|_F, fitted over depths >= 8. None if layers are
        equal up to rounding, or if there are fewer than two such depths."""
        depths = [depth for depth in self.config.depths if depth >= 8]
        return fit_above_rounding(depths, [self.distances[depth]["max_distance"] for depth in depths])

    def tables(self, row: int, column: int) -> dict[str, dict[str, list]]:
        """The tables "loss", "weights" (the entry (``row``, ``column``) of V_k and W_k) and "distance"."""
        depths = self.config.depths
        weights = [
            {"depth": depth, "layer": layer, "row": row, "column": column, "entry_V": V, "entry_W": W}
            for depth in depths
            for layer, (V, W) in enumerate(zip(*read_entries(self.weights[depth], row, column), strict=True), start=1)
        ]
        losses = [
            {"depth": depth, "iteration": iteration, "loss": loss}
            for depth in depths
            for iteration, loss in enumerate(self.losses[depth])
        ]
        distances = [{"depth": depth, "iterations": self.iteration + 1, **self.distances[depth]} for depth in depths]
        return {"loss": from_rows(losses), "weights": from_rows(weights), "distance": from_rows(distances)}


def depths_steps(config: DepthsConfig) -> Iterator[DepthsState]:
    """Train the networks side by side; yields the state after each iteration (the same object, growing)."""
    trainings = [
        train(config.network.at_depth(depth), config.learning_rate, config.iterations) for depth in config.depths
    ]
    running = {depth: SuccessiveDistance() for depth in config.depths}
    state = DepthsState(config, 0, {depth: [] for depth in config.depths}, {}, {})
    for records in run_in_lockstep(trainings):
        for depth, record in zip(config.depths, records, strict=True):
            running[depth].update(record.weights)
            state.losses[depth].append(record.loss)
            state.weights[depth] = record.weights
            state.distances[depth] = running[depth].values()
            state.iteration = record.iteration
        state.start = state.start or records[-1].weights.clone()
        yield state


def train_depths(config: DepthsConfig, progress: Progress = silent) -> DepthsState:
    """The state of `depths_steps` after the last iteration."""
    with use_one_thread():
        return take_last(progress(depths_steps(config), config.iterations + 1))


@dataclass
class Comparison:
    """One or two networks side by side: their ``states``, and the messages of those that diverged."""

    states: list[DepthsState]
    sentence: str = ""

    @property
    def iteration(self) -> int:
        return max(state.iteration for state in self.states)


def advance_in_turns(trainings: Sequence[Iterator[DepthsState]]) -> Iterator[Comparison]:
    """Advance trainings in turns; yields the same object after every turn. A training that diverges stays as it is."""
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
