"""Gradients with states that are computed backwards instead of stored: their errors, and their memory."""

import math
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import checks, tables
from lib.cifar import records
from lib.cifar.measured import named_rows
from lib.dense.branch import dense_branch, dense_layers
from lib.dense.network import NetworkConfig, initialise
from lib.dense.training import train
from lib.figures.experiment import Progress, silent, take_last
from lib.figures.results import Data
from lib.figures.style import (
    BLUE,
    COLORS,
    GREY,
    GUIDE,
    INITIALISATION_COLORS,
    leave_room_for_legend,
    make_panels,
    set_depth_axis,
    set_layers_axis,
    styled,
    write_across,
)
from lib.ode import reversible
from lib.rates import Slope, fit_slope
from lib.tables import Table, select

LINES = {"Euler": "-", "Heun": "--"}
SHOWN_BELOW = 1e3  # larger relative errors are not drawn


@dataclass(frozen=True)
class Config:
    """Fully connected networks of several ``depths``, trained for ``iterations`` with ``learning_rate``. Slopes are
    fitted over the depths from ``slope_from`` on."""

    network: NetworkConfig
    depths: list[int]
    iterations: int
    learning_rate: float = 0.01
    slope_from: int = 16

    def __post_init__(self) -> None:
        checks.check_fields(self, "iterations", "learning_rate", depths=2)
        checks.slope_range(self.slope_from, self.depths)


def compute(config: Config, progress: Progress = silent) -> Data:
    """The tables of `measure_dense` and `read_convolutional`, and ``checkpoints/memory.csv``."""
    return {
        "reversible": measure_dense(config, progress),
        "reversible_cifar": read_convolutional(),
        "reversible_memory": records.read_measured("memory"),
    }


def measure_dense(config: Config, progress: Progress = silent) -> dict[str, list]:
    """The table of ``reversible.csv``: initialisation, method, depth, and the relative errors of
    `reversible.measure_errors`, state (of h_0) and gradient (of the loss with respect to the layers)."""
    rows = []
    cases = [(initialisation, depth) for initialisation in INITIALISATION_COLORS for depth in config.depths]
    for initialisation, depth in progress(cases, len(cases)):
        network = replace(config.network, initialisation=initialisation, depth=depth)
        training = train(network, config.learning_rate, config.iterations, [config.iterations])
        weights, data = take_last(training).weights, initialise(network)[1]
        f, layers = dense_branch(network), dense_layers(weights)
        for method in reversible.METHODS:
            errors = reversible.measure_errors(method, f, layers, data.x, lambda h, y=data.y: (h - y).square().mean())
            rows.append({"initialisation": initialisation, "method": method, "depth": depth, **errors})
    return tables.from_rows(rows)


def read_convolutional() -> dict[str, list]:
    """The table of ``reversible_cifar.csv``: network (in words), depth, kind, and the columns of
    ``checkpoints/reversible.csv`` except run. Without that file it is empty."""
    return tables.from_rows(named_rows("reversible"))


def fit_error_slope(table: Table, initialisation: str, method: str, slope_from: int) -> Slope:
    """The slope in L of the relative error of the gradient."""
    rows = select(table, initialisation=initialisation, method=method)
    return fit_slope(rows["depth"], rows["gradient"], slope_from)


def compare_gradient_with_state(*found: Table) -> tuple[float, float]:
    """The least and the largest ratio of the error of a gradient to the error of h_0, over all rows in which the error
    of h_0 is below 1; nan if there is no such row. The stem computes h_0 anyway, so that its error is known in use."""
    ratios = []
    for table in found:
        state, gradient = (np.asarray(table[name]) for name in ("state", "gradient"))
        ratios += (gradient / state)[state < 1].tolist()
    return (min(ratios), max(ratios)) if ratios else (math.nan, math.nan)


@styled
def draw(data: Data, config: Config) -> Figure:
    """Errors of gradients against the depth, of fully connected and of convolutional networks, and the memory. Errors
    above `SHOWN_BELOW` are not drawn."""
    dense, cifar, memory = (data[f"reversible{name}"] for name in ("", "_cifar", "_memory"))
    figure, (left, middle, right) = make_panels(3, height=3.5, width_ratios=[1, 1.1, 0.9])
    for initialisation, color in INITIALISATION_COLORS.items():
        for method, line in LINES.items():
            rows = select(dense, initialisation=initialisation, method=method)
            label = f"{tables.word(initialisation)}, {method}"
            left.plot(rows["depth"], rows["gradient"], "o", linestyle=line, color=color, label=label)
            left.plot(rows["depth"], rows["state"], "o", linestyle="none", color=color, markerfacecolor="white")
    left.plot([], [], "o", color=GREY, markerfacecolor="white", label="hollow: of $h_0$")
    left.set(yscale="log", ylabel="relative error of the gradient", title="fully connected")
    set_depth_axis(left, dense["depth"])
    leave_room_for_legend(left, 0.55)
    left.legend(loc="lower left", fontsize=7, labelspacing=0.2)
    names = list(dict.fromkeys(cifar.get("network", ())))
    for name, color in zip(names, COLORS, strict=False):
        for method, line in LINES.items():
            rows = select(cifar, network=name, method=method)
            error = np.where(rows["gradient"] < SHOWN_BELOW, rows["gradient"], np.nan)
            middle.plot(rows["layers"], error, "o", linestyle=line, color=color, markersize=3,
                        label=name if method == "Euler" else None)  # fmt: skip
    middle.axhline(1, linestyle=":", **GUIDE)
    middle.set(yscale="log", title="CIFAR-10 (dashed: Heun)")
    _draw_memory(right, memory)
    for panel, table in ((middle, cifar), (right, memory)):
        panel.set_xlabel("layers")
        if len(table.get("layers", ())):
            set_layers_axis(panel, table["layers"])
        else:
            write_across(panel, "nothing is measured yet:\nmake measure")
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    return figure


def _draw_memory(axes: Axes, memory: Table) -> None:
    for column, label, color in (("stored", "stored", GREY), ("backwards", "backwards", BLUE)):
        axes.plot(memory["layers"], memory[column], "o-", color=color, label=label)
    axes.legend(loc="upper left", title="states", title_fontsize=8)
    axes.set(ylabel="memory (MB)", title="memory of a gradient")
