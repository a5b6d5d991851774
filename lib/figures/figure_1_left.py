"""Figure 1, left: layers that start equal stay within K/L of each other (Prop. 3)."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from lib import checks
from lib.dense.distances import SuccessiveDistance
from lib.dense.network import NetworkConfig
from lib.dense.training import run_in_lockstep, train
from lib.digits import round_difference
from lib.figures.claim import Claim, Read, fit_over_seeds, judge_rate, select_last
from lib.figures.experiment import Progress, silent, sort_rows, take_last
from lib.figures.results import Data
from lib.figures.style import (
    describe_intervals,
    draw_color_bar,
    draw_rate_line,
    format_number,
    leave_room_for_legend,
    make_color_scale,
    make_panels,
    set_depth_axis,
    styled,
)
from lib.rates import fit_mean_slope, fit_slope
from lib.tables import select


@dataclass(frozen=True)
class Config:
    """Figure 1 left: networks of several ``depths``, trained with ``learning_rate`` (steps L * eta).

    ``iterations`` lists the training times x: a curve each, over the states t < x. ``slope_from`` is the
    smallest depth that slopes are fitted over. ``network`` gives everything else (its depth is not used), with the
    first of ``seeds`` seeds, which are consecutive. The first is drawn, at all depths; the others, at depths up to
    ``repeat_depth``, say how much slopes differ from draw to draw.
    """

    network: NetworkConfig
    depths: list[int]
    iterations: list[int]
    learning_rate: float = 0.01
    slope_from: int = 16
    seeds: int = 1
    repeat_depth: int = 256

    def __post_init__(self) -> None:
        checks.check_fields(self, "iterations", "learning_rate", "seeds", "repeat_depth", depths=2)
        checks.slope_range(self.slope_from, self.depths)
        if self.seeds > 1:
            checks.slope_range(self.slope_from, [depth for depth in self.depths if depth <= self.repeat_depth])

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(seed, depth) of every network."""
        first = self.network.seed
        further = [(first + k, L) for k in range(1, self.seeds) for L in self.depths if self.repeat_depth >= L]
        return [(first, L) for L in self.depths] + further

    @property
    def fitted(self) -> list[int]:
        """The depths that slopes are fitted over: those of every seed from ``slope_from`` on."""
        deepest = self.depths[-1] if self.seeds == 1 else self.repeat_depth
        return [depth for depth in self.depths if self.slope_from <= depth <= deepest]

    @property
    def steps(self) -> int:
        """How many states are looked at."""
        return self.iterations[-1]


def compute_steps(config: Config) -> Iterator[Data]:
    """The table of `compute` so far, after each iteration; nothing until the first training time."""
    networks = [dataclasses.replace(config.network, seed=seed, depth=depth) for seed, depth in config.runs]
    trainings = [train(network, config.learning_rate, config.iterations[-1] - 1) for network in networks]
    running = [SuccessiveDistance() for _ in config.runs]
    rows = []
    for records in run_in_lockstep(trainings):
        for (seed, depth), record, so_far in zip(config.runs, records, running, strict=True):
            so_far.update(record.weights)
            if record.iteration + 1 in config.iterations:
                distances = {name: round_difference(value) for name, value in so_far.values().items()}
                rows.append({"seed": seed, "depth": depth, "iterations": record.iteration + 1, **distances})
        yield {"figure_1_left": sort_rows(rows, "seed", "depth", "iterations")} if rows else {}


def compute(config: Config, progress: Progress = silent) -> Data:
    """The table of ``figure_1_left.csv``: a row for each seed, depth and training time in ``iterations``."""
    return take_last(progress(compute_steps(config), config.steps))


@styled
def draw(data: Data, config: Config) -> Figure:
    """Successive distance against depth, a curve for each training time, of the first seed: the paper's quantity, then
    the released aggregate, with slopes over all seeds. Rows that are 0 are not drawn."""
    table, slope_from = data["figure_1_left"], config.slope_from
    columns = select(table, seed=min(table["seed"]))
    aggregate = np.maximum(columns["aggregate_V"], columns["aggregate_W"])
    times = [t for t in np.unique(columns["iterations"]) if aggregate[columns["iterations"] == t].max() > 0]
    depths = np.unique(columns["depth"])
    figure, axes = make_panels(2)
    color, mappable = make_color_scale(times or [0])
    quantities = (
        (columns["max_distance"], r"$\max_{k,\,t}\;\|Z_{k+1}(t)-Z_k(t)\|_F$", "the paper's quantity", -1.0),
        (aggregate, r"$\left(\sum_{t,\,k}\;\|Z_{k+1}(t)-Z_k(t)\|_F^2\right)^{1/2}$", "the released aggregate", -0.5),
    )
    for panel, (values, label, title, exponent) in zip(axes, quantities, strict=True):
        fit = None
        for time in times:
            rows = (columns["iterations"] == time) & (values > 0)
            order = np.argsort(columns["depth"][rows])
            x, y = columns["depth"][rows][order], values[rows][order]
            panel.plot(x, y, "o-", color=color(time), markeredgewidth=0)
            if (x >= slope_from).sum() >= 2:
                fit = fit_slope(x, y, slope_from)
        if fit is not None:
            fitted = depths[depths >= slope_from]
            draw_rate_line(panel, fitted, fit, exponent, f"slope ${'-1' if exponent == -1 else '-1/2'}$")
            end = select(table, iterations=times[-1])
            end["aggregate"] = np.maximum(end["aggregate_V"], end["aggregate_W"])
            over = fit_mean_slope(end, "max_distance" if exponent == -1 else "aggregate", slope_from)
            depths_over = f"$L={config.fitted[0]}$ to ${config.fitted[-1]}$"
            words = (
                f"slope, {times[-1]} iterations: {format_number(over.slope)}\n{describe_intervals(over)}, {depths_over}"
            )
            panel.legend(loc="lower left", title=words, title_fontsize=7)
        set_depth_axis(panel, depths)
        panel.set_yscale("log")
        leave_room_for_legend(panel, 0.3)
        panel.set_ylabel(label)
        panel.set_title(title)
    if times:
        draw_color_bar(figure, mappable, axes, "training iterations", pad=0.01, aspect=28)
    return figure


def judge_claims(read: Read) -> Iterator[Claim]:
    left = select_last(read("figure_1_left"), "iterations")
    statement = "Layers that start equal: max over k and t <= T of |Z_(k+1)(t) - Z_k(t)|_F is at most K/L"
    fit = fit_over_seeds(left, "max_distance", own_depths=True)
    yield judge_rate(statement, "Prop. 3, Fig. 1 left", "figure_1_left", fit, -1.0)
