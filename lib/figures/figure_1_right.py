"""Figure 1, right: trained weights converge to the large-depth limit (Thm 4)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lib import checks
from lib.dense import conventions, limit, spectral
from lib.dense.distances import distance
from lib.dense.network import NetworkConfig
from lib.dense.training import Record, run_in_lockstep, train
from lib.digits import DECIMALS, LIMIT_DECIMALS, round_difference
from lib.figures.experiment import Progress, silent, sort_rows, take_last
from lib.figures.results import Data
from lib.figures.style import (
    COLORS,
    MARKERS,
    compute_cell_edges,
    draw_color_bar,
    draw_rate_line,
    format_number,
    leave_room_for_legend,
    make_panels,
    set_depth_axis,
    styled,
)
from lib.rates import fit_slope


@dataclass(frozen=True)
class Config:
    """Figure 1 right: the distance between networks of several ``depths`` and the large-depth limit.

    Every ``every``-th of the states t < ``iterations`` is compared. With the ``reference`` "network", a network of
    ``reference_depth`` layers stands for the limit. With "limit", the equations of the limit are solved, to an error of
    ``tolerance`` in the distances. For ``sampling`` see `conventions.SAMPLING_RULES`. Rates are fitted over the depths
    from ``slope_from`` on.
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
        checks.check_fields(self, "depths", "iterations", "every", "learning_rate", "reference_depth", "tolerance")
        checks.choice("reference", self.reference, REFERENCES)
        checks.choice("sampling", self.sampling, conventions.SAMPLING_RULES)
        checks.slope_range(self.slope_from, self.depths)
        if self.reference == "limit":
            spectral.check_limit_exists(self.network)
        if self.reference == "network" and self.depths[-1] >= self.reference_depth:
            raise ValueError(
                f"reference_depth is {self.reference_depth}, expected more than the deepest network's "
                f"{self.depths[-1]} layers."
            )

    @property
    def recorded(self) -> list[int]:
        """The iterations t whose states are compared, with the last one."""
        return sorted({*range(0, self.iterations, self.every), self.iterations - 1})

    @property
    def steps(self) -> int:
        """How many states are compared."""
        return len(self.recorded)


def _compare_with_network(config: Config) -> Iterable[Callable[[Record], tuple[float, float]]]:
    """At each recorded iteration, a function from a record to its distances of V and of W from a deep network."""
    network = config.network.at_depth(config.reference_depth)
    for reference in train(network, config.learning_rate, config.recorded[-1], config.recorded):

        def distances(record: Record, deep=reference.weights) -> tuple[float, float]:
            weights = record.weights
            return tuple(distance(*pair, config.sampling) for pair in ((weights.V, deep.V), (weights.W, deep.W)))

        yield distances


def _compare_with_limit(config: Config) -> Iterable[Callable[[Record], tuple[float, float]]]:
    """The same, with distances from the solution of the limit's equations."""
    records = limit.train(
        config.network, config.learning_rate, config.recorded[-1], config.recorded, tolerance=config.tolerance
    )
    for reference in records:

        def distances(record: Record, ode=reference.ode) -> tuple[float, float]:
            by_name = ode.distance_to_network(record.weights, config.sampling)
            return by_name["V"], by_name["W"]

        yield distances


REFERENCES = {"network": _compare_with_network, "limit": _compare_with_limit}


def compute_steps(config: Config) -> Iterator[Data]:
    """The table of `compute` so far, after each recorded iteration."""
    trainings = [
        train(config.network.at_depth(depth), config.learning_rate, config.recorded[-1], config.recorded)
        for depth in config.depths
    ]
    decimals = LIMIT_DECIMALS if config.reference == "limit" else DECIMALS
    rows = []
    for distances, records in zip(REFERENCES[config.reference](config), run_in_lockstep(trainings), strict=True):
        for depth, record in zip(config.depths, records, strict=True):
            V, W = (round_difference(value, decimals) for value in distances(record))
            rows.append({"depth": depth, "iteration": record.iteration, "distance_V": V, "distance_W": W})
        yield {"figure_1_right": sort_rows(rows, "depth", "iteration")}


def compute(config: Config, progress: Progress = silent) -> Data:
    """The table of ``figure_1_right.csv``: a row for each depth and each recorded iteration."""
    return take_last(progress(compute_steps(config), config.steps))


@styled
def draw(data: Data, config: Config) -> Figure:
    """The distance to the limit: images over (iteration, depth) for V and W, in which 0 is white, and the rate at the
    last iteration."""
    table, slope_from = data["figure_1_right"], config.slope_from
    depths, iterations = np.unique(table["depth"]), np.unique(table["iteration"])
    shape = len(depths), len(iterations)
    order = np.lexsort((table["iteration"], table["depth"]))
    images = {Z: np.asarray(table[f"distance_{Z}"])[order].reshape(shape) for Z in "VW"}
    figure, axes = make_panels(3, width_ratios=[1, 1, 0.95])
    edges = compute_cell_edges(iterations)
    for panel, (Z, image) in zip(axes, images.items(), strict=False):
        # Twelve orders of magnitude below the largest, and below 1e-13, there are only rounding errors.
        positive = np.ma.masked_less_equal(image, max(image.max() * 1e-12, 1e-13))
        if positive.count() == 0:
            panel.set_axis_off()
            continue
        # The first steps are orders of magnitude below the rest, so the scale starts at the 2 % quantile.
        norm = LogNorm(np.quantile(positive.compressed(), 0.02), positive.max())
        mesh = panel.pcolormesh(edges, np.arange(len(depths) + 1), positive, norm=norm, rasterized=True)
        panel.set_yticks(np.arange(len(depths)) + 0.5, [str(depth) for depth in depths])
        panel.set(xlabel="training iteration", title=rf"$\|{Z}^L(\cdot,t)-{Z}(\cdot,t)\|$")
        draw_color_bar(figure, mesh, panel, location="bottom", pad=0.02, aspect=25, extend="min")
    axes[0].set_ylabel(r"depth $L$")
    rate = axes[2]
    for Z, color, marker in zip("VW", COLORS, MARKERS, strict=False):
        final = images[Z][:, -1]
        if (final[depths >= slope_from] > 0).sum() >= 2:
            fit = fit_slope(depths, final, slope_from)
            draw_rate_line(rate, depths[depths >= slope_from], fit, -1.0, "slope $-1$" if Z == "W" else None)
            rate.plot(depths, final, marker + "-", color=color, label=f"${Z}$: slope {format_number(fit.slope)}")
        else:
            rate.plot(depths, np.where(final > 0, final, np.nan), marker + "-", color=color, label=f"${Z}$")
    set_depth_axis(rate, depths)
    if any((image[:, -1] > 0).any() for image in images.values()):  # at t = 0 all depths agree
        rate.set_yscale("log")
    rate.set_title(f"at iteration {iterations[-1]}")
    leave_room_for_legend(rate, 0.35)
    rate.legend(loc="lower left")
    return figure
