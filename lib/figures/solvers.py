"""Trained networks integrated as ODEs: errors of solvers against evaluations of the layers, and their orders."""

from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import checks, tables
from lib.cifar.measured import named_rows
from lib.dense.branch import dense_branch, dense_layers
from lib.dense.network import NetworkConfig, initialise
from lib.dense.training import train
from lib.digits import difference
from lib.figures.experiment import Progress, last, silent
from lib.figures.results import Data
from lib.figures.style import BLUE, GREEN, GREY, PURPLE, VERMILION, panels, styled, write_across
from lib.measures import fit_slope
from lib.ode import solvers as ode
from lib.tables import Table, select

# (initialisation, activation) of the fully connected networks.
DENSE = (("weight-tied", "gelu"), ("iid", "gelu"), ("weight-tied", "relu"))
# Errors below are rounding, or that of the reference.
FLOOR = 1e-10
SHOWN_BELOW = 30.0  # a relative error


@dataclass(frozen=True)
class Config:
    """Fully connected networks as in Figure 2, trained for ``iterations`` with ``learning_rate``, then solved as ODEs
    in each of ``steps``, and adaptively to each of ``tolerances``. Orders are fitted over the steps from
    ``order_from`` to the depth."""

    network: NetworkConfig
    iterations: int
    learning_rate: float
    steps: list[int]
    tolerances: list[float]
    order_from: int = 8

    def __post_init__(self) -> None:
        checks.make_plain(self)
        checks.positive_int("iterations", self.iterations)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.positive_ints("steps", self.steps)
        checks.positive_floats("tolerances", self.tolerances)
        checks.slope_range(self.order_from, [count for count in self.steps if count <= self.network.depth])


def compute(config: Config, progress: Progress = silent) -> Data:
    """The tables of `solve` and `orders`."""
    table = solve(config, progress)
    return {"solvers": table, "solvers_orders": orders(table, config.order_from)}


def solve(config: Config, progress: Progress = silent) -> dict[str, list]:
    """The table of ``solvers.csv``: network (in words), depth, kind ("dense" or "cifar") and the columns of
    `ode.measure_solver_errors`; the convolutional networks' rows are those of ``checkpoints/solvers.csv``."""
    rows = []
    for initialisation, activation in progress(DENSE, len(DENSE)):
        network = replace(config.network, initialisation=initialisation, activation=activation)
        training = train(network, config.learning_rate, config.iterations, [config.iterations])
        weights, x = last(training).weights, initialise(network)[1].x
        errors = ode.measure_solver_errors(
            dense_branch(network), dense_layers(weights), x, config.steps, config.tolerances
        )
        name = f"{tables.word(activation)}, {tables.word(initialisation)}"
        for row in tables.rows(errors):
            known = {column: difference(row[column]) for column in ("error", "error_network")}
            rows.append({"network": name, "depth": network.depth, "kind": "dense"} | row | known)
    return tables.from_rows(rows + named_rows("solvers"))


def orders(table: Table, order_from: int = 8) -> dict[str, list]:
    """The table of ``solvers_orders.csv``: network, depth, kind, method, order (minus the slope of the error in the
    steps from ``order_from`` to the depth), beyond (the same with steps of at most half a layer) and stays (with as
    many steps as layers, the distance to the network). Of errors above 1 or down at rounding there is no order: nan
    with fewer than two others."""
    rows = []
    for network in dict.fromkeys(table["network"]):
        for method in ode.METHODS:
            chosen = select(table, network=network, method=method)
            if not len(chosen["steps"]):
                continue
            depth, steps, error = chosen["depth"][0], chosen["steps"], chosen["error"]
            ranges = {"order": (steps >= order_from) & (steps <= depth), "beyond": steps >= 2 * depth}
            found = {
                name: -fit_slope(steps[part], error[part]).slope if part.sum() > 1 else np.nan
                for name, part in ((name, part & (error > FLOOR) & (error < 1)) for name, part in ranges.items())
            }
            stays = chosen["error_network"][steps == depth]
            which = {"network": str(network), "depth": int(depth), "kind": str(chosen["kind"][0])}
            rows.append(which | {"method": method} | found | {"stays": stays[0] if len(stays) else np.nan})
    return tables.from_rows(rows)


METHOD_COLORS = {"Euler": BLUE, "Heun": VERMILION, "RK4": GREEN, ode.ADAPTIVE: PURPLE}


@styled
def draw(data: Data, config: Config) -> Figure:
    """A panel for each network: distance to the ODE (full) and to the network itself (faint) against the evaluations,
    a colour for each solver; fully connected networks above, the first three of each kind. Errors above `SHOWN_BELOW`
    are not drawn."""
    table = data["solvers"]
    rows = [[name for name in dict.fromkeys(table["network"]) if kind in select(table, network=name)["kind"]]
            for kind in ("dense", "cifar")]  # fmt: skip
    figure, axes = panels(3, rows=2, height=5.2, sharex="row")
    for line, names in zip(axes, rows, strict=True):
        for place, panel in enumerate(line):
            if place < len(names):
                _solvers(panel, select(table, network=names[place]))
            else:
                write_across(panel, "none is here")
                panel.set_axis_off()
        line[0].set_ylabel("relative distance of $H(1)$")
    for panel in axes[1]:
        panel.set_xlabel("evaluations of a layer")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, columnspacing=1.2)
    return figure


def _solvers(axes: Axes, table: Table) -> None:
    for (method, color), marker in zip(METHOD_COLORS.items(), "osD^", strict=True):
        rows = select(table, method=method)
        order = np.argsort(rows["evaluations"])
        for column, style in (("error", {"label": method}), ("error_network", {"alpha": 0.35, "linestyle": ":"})):
            if column == "error_network" and method == ode.ADAPTIVE:
                continue
            found = rows[column][order]
            found = np.where((found < SHOWN_BELOW) & (found > FLOOR / 10), found, np.nan)
            axes.plot(rows["evaluations"][order], found, marker=marker, markersize=3, color=color,
                      **{"linewidth": 1.1, "linestyle": "-"} | style)  # fmt: skip
    own = select(table, method="network")
    axes.axhline(own["error"][0], color=GREY, linestyle="--", linewidth=1, zorder=0, label="the network")
    axes.plot([], [], ":", color=GREY, alpha=0.7, label="to the network")
    axes.axvline(own["evaluations"][0], color=GREY, linestyle=":", linewidth=0.8, zorder=0)
    name = str(own["network"][0])
    axes.set(xscale="log", yscale="log", title=f"CIFAR-10:\n{name}" if own["kind"][0] == "cifar" else name)
