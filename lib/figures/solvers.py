"""Trained networks solved as ODEs: errors of solvers against evaluations of the layers, and orders of convergence."""

from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import checks, tables
from lib.cifar.measured import named_rows
from lib.dense.branch import dense_branch, dense_layers
from lib.dense.network import NetworkConfig, initialise
from lib.dense.training import train
from lib.digits import round_difference
from lib.figures.experiment import Progress, silent, take_last
from lib.figures.results import Data
from lib.figures.style import BLUE, GREEN, GREY, GUIDE, PURPLE, VERMILION, make_panels, styled, write_across
from lib.ode import solvers as ode
from lib.rates import fit_slope
from lib.tables import Table, select

DENSE = (("weight-tied", "gelu"), ("iid", "gelu"), ("weight-tied", "relu"))  # initialisation, activation
FLOOR = 1e-10  # smaller errors are rounding errors, or the error of the reference
SHOWN_BELOW = 30.0  # larger relative errors are not drawn


@dataclass(frozen=True)
class Config:
    """Fully connected networks as in Figure 2, trained for ``iterations`` with ``learning_rate``. They are then solved
    as ODEs with each number of ``steps``, and adaptively to each of ``tolerances``. Orders are fitted over the numbers
    of steps from ``order_from`` to the depth."""

    network: NetworkConfig
    iterations: int
    learning_rate: float
    steps: list[int]
    tolerances: list[float]
    order_from: int = 8

    def __post_init__(self) -> None:
        checks.check_fields(self, "iterations", "learning_rate", "steps", "tolerances")
        checks.slope_range(self.order_from, [count for count in self.steps if count <= self.network.depth])


def compute(config: Config, progress: Progress = silent) -> Data:
    """The tables of `measure_errors` and `fit_orders`."""
    table = measure_errors(config, progress)
    return {"solvers": table, "solvers_orders": fit_orders(table, config.order_from)}


def measure_errors(config: Config, progress: Progress = silent) -> dict[str, list]:
    """The table of ``solvers.csv``: network (in words), depth, kind ("dense" or "cifar") and the columns of
    `ode.measure_solver_errors`. The rows of convolutional networks are from ``checkpoints/solvers.csv``."""
    rows = []
    for initialisation, activation in progress(DENSE, len(DENSE)):
        network = replace(config.network, initialisation=initialisation, activation=activation)
        training = train(network, config.learning_rate, config.iterations, [config.iterations])
        weights, x = take_last(training).weights, initialise(network)[1].x
        errors = ode.measure_solver_errors(
            dense_branch(network), dense_layers(weights), x, config.steps, config.tolerances
        )
        name = f"{tables.word(activation)}, {tables.word(initialisation)}"
        for row in tables.rows(errors):
            known = {column: round_difference(row[column]) for column in ("error", "error_network")}
            rows.append({"network": name, "depth": network.depth, "kind": "dense"} | row | known)
    return tables.from_rows(rows + named_rows("solvers"))


def fit_orders(table: Table, order_from: int = 8) -> dict[str, list]:
    """The table of ``solvers_orders.csv``: network, depth, kind, method, order, beyond, stays.

    ``order`` is minus the slope of the error in the number of steps, from ``order_from`` to the depth. ``beyond`` is
    the same for steps of at most half a layer. Both leave out errors above 1 and below `FLOOR`, and are nan if fewer
    than two are left. ``stays`` is the distance to the network itself with as many steps as layers.
    """
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
    """A panel for each network, with a colour for each solver: the distance to the ODE (full) and to the network itself
    (faint) against the evaluations. The first three fully connected networks are above, the first three convolutional
    ones below. Errors above `SHOWN_BELOW` are not drawn."""
    table = data["solvers"]
    rows = [[name for name in dict.fromkeys(table["network"]) if kind in select(table, network=name)["kind"]]
            for kind in ("dense", "cifar")]  # fmt: skip
    figure, axes = make_panels(3, rows=2, height=5.2, sharex="row")
    for line, names in zip(axes, rows, strict=True):
        for place, panel in enumerate(line):
            if place < len(names):
                _draw_solvers(panel, select(table, network=names[place]))
            else:
                write_across(panel, "none is here")
                panel.set_axis_off()
        line[0].set_ylabel("relative distance of $H(1)$")
    for panel in axes[1]:
        panel.set_xlabel("evaluations of a layer")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, columnspacing=1.2)
    return figure


def _draw_solvers(axes: Axes, table: Table) -> None:
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
    axes.axhline(own["error"][0], linestyle="--", label="network to ODE", **GUIDE)
    axes.plot([], [], ":", color=GREY, alpha=0.7, label="distance to the network")
    axes.axvline(own["evaluations"][0], linestyle=":", **GUIDE | {"linewidth": 0.8})
    name = str(own["network"][0])
    axes.set(xscale="log", yscale="log", title=f"CIFAR-10:\n{name}" if own["kind"][0] == "cifar" else name)
