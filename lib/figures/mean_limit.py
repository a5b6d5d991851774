"""The mean ODE: networks of independently drawn layers also have a limit in the depth.

In mean-field scaling (`lib.dense.conventions`) the residual branch of a network of L layers of m units is a mean over
its L m units, and every unit moves by O(eta) in a step. Let all units (v, w) start as independent draws from one law
rho_0. Then, as L m -> infinity, the network converges to the mean ODE, with row vectors

    dH/ds = E[ s(H w / sqrt(q)) v ],      H(0) = x,      (v, w) ~ rho_t(s),      rho_0(s) = rho_0 for every s,
    dv/dt = -sum_i s(H_i w / sqrt(q)) P_i,               dw/dt = -sum_i s'(H_i w / sqrt(q)) (P_i . v) H_i / sqrt(q),

where P_i(s) is the adjoint of sample i (`lib.dense.limit`). The error is of order 1/L + 1/sqrt(L m) (Chizat 2025, "The
hidden width of deep ResNets", arXiv 2509.10167). The layers themselves stay rough. The limit does not depend on m.
A network of weight-tied initialisation converges to the neural ODE of its own m units, with an error of order 1/L.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from lib import activations, checks
from lib.dense import limit, spectral
from lib.dense.network import Data as Samples
from lib.dense.network import NetworkConfig, Weights, hidden_states, initialise
from lib.dense.training import Record, train
from lib.figures.claim import (
    BEYOND,
    LEAST_DEPTH,
    Claim,
    Read,
    combine_margins,
    factor_below,
    judge_margin,
    judge_rate,
    select_last,
)
from lib.figures.experiment import Progress, silent, space_evenly
from lib.figures.results import Data
from lib.figures.style import (
    BLUE,
    GREEN,
    GREY,
    GUIDE,
    MARKERS,
    VERMILION,
    draw_slopes,
    leave_room_above,
    leave_room_for_legend,
    make_color_scale,
    make_panels,
    set_depth_axis,
    set_plain_ticks,
    styled,
)
from lib.rates import compute_root_mean_squares, fit_slope_in_depth, fit_two_terms
from lib.tables import Table, from_rows, select

MEAN, OWN = "mean ODE", "own ODE"
QUANTITIES = {"output": "outputs", "hidden_states": "hidden states", "loss": "losses"}


@dataclass(frozen=True)
class Config:
    """Networks of several ``depths`` and ``widths``, each with ``seeds`` draws of its weights, and their limits.

    Main arguments: ``network`` gives everything else; its seed and width determine the data, which all networks share.
    Networks of more than ``most_units`` units L m are left out. ``iterations`` and ``learning_rate`` are as in
    `lib.dense.training.train`. The mean ODE is an independent network of i.i.d. layers, of ``reference_depth`` and
    ``reference_width``. Networks of the narrowest width are also trained from weight-tied initialisation, and compared
    with the limit of their own units and with the mean ODE.

    Other arguments: ``recorded`` is the number of iterations that are compared, evenly spaced. For ``tolerance`` see
    `limit.train`. Slopes are fitted over the depths from ``slope_from`` on.
    """

    network: NetworkConfig
    depths: list[int]
    widths: list[int]
    seeds: int
    iterations: int
    learning_rate: float = 0.3
    reference_depth: int = 4096
    reference_width: int = 128
    most_units: int = 32768
    recorded: int = 5
    tolerance: float = 1e-5
    slope_from: int = 16

    def __post_init__(self) -> None:
        single = ("widths", "iterations", "learning_rate", "tolerance")
        checks.check_fields(
            self, *single, "reference_depth", "reference_width", "most_units", depths=2, seeds=2, recorded=2
        )
        checks.slope_range(self.slope_from, self.depths)
        activations.check_smooth(self.network.activation)
        checks.choice("convention", self.network.convention, ["mean-field"])
        spectral.check_limit_exists(dataclasses.replace(self.network, initialisation="weight-tied"))
        if not self.network.ends_are_identity:
            raise ValueError(
                "The network has matrices A and B that are not the identity: expected d = d' = q, none trained."
            )
        smallest = self.depths[0]
        for depth in (*self.depths, self.reference_depth):
            if depth % smallest:
                raise ValueError(
                    f"A depth is {depth}, expected multiples of the smallest, {smallest}: hidden states are compared "
                    f"after every {smallest}th part of the layers."
                )
        if self.most_units < smallest * self.widths[-1]:
            raise ValueError(
                f"most_units is {self.most_units}, which leaves no network of width {self.widths[-1]}: expected at "
                f"least {smallest * self.widths[-1]}."
            )

    @property
    def times(self) -> list[int]:
        """The iterations that are compared, with the first and the last one."""
        return space_evenly(self.iterations, self.recorded)

    def make_network(self, initialisation: str, width: int, depth: int, seed: int) -> NetworkConfig:
        """The network with that draw of its weights: ``seed`` is 0 for the mean ODE, and 1, 2, ... for the others."""
        return dataclasses.replace(
            self.network, initialisation=initialisation, width=width, depth=depth, seed=self.network.seed + seed
        )

    @property
    def runs(self) -> list[tuple[str, int, int, int]]:
        """(initialisation, width, depth, seed) of every network."""
        sizes = [(m, L) for m in self.widths for L in self.depths if L * m <= self.most_units]
        kinds = [("iid", m, L) for m, L in sizes]
        kinds += [("weight-tied", m, L) for m, L in sizes if m == self.widths[0]]
        return [(*kind, seed) for kind in kinds for seed in range(1, self.seeds + 1)]


@dataclass
class Moment:
    """A network or a limit at one iteration: its loss, and its hidden states at s = 0, 1/k, ..., 1: (k+1, n, q)."""

    loss: float
    states: Tensor

    def measure_distances(self, other: "Moment") -> dict[str, float]:
        """The distances from another: root mean squares over samples and coordinates, and the largest over s for hidden
        states."""
        apart = (self.states - other.states).square().mean(dim=(1, 2)).sqrt()
        return {
            "output": float(apart[-1]),
            "hidden_states": float(apart.max()),
            "loss": abs(self.loss - other.loss),
        }


def _train_network(config: Config, network: NetworkConfig, data: Samples) -> Iterator[tuple[Record, Moment]]:
    weights, _ = initialise(network)
    start = weights, data
    for record in train(network, config.learning_rate, config.iterations, config.times, start=start):
        states = hidden_states(network, record.weights, data.x)
        yield record, Moment(record.loss, states[:: network.depth // config.depths[0]])


def _train_own_limit(config: Config, network: NetworkConfig, data: Samples) -> list[Moment]:
    s = torch.linspace(0, 1, config.depths[0] + 1, dtype=torch.float64)
    records = limit.train(
        network, config.learning_rate, config.iterations, config.times, tolerance=config.tolerance, data=data
    )
    return [Moment(record.loss, record.ode.hidden_states(data.x, s)) for record in records]


def compute(config: Config, progress: Progress = silent) -> Data:
    """Three tables: distances from the limits, and a few hidden states and weights after training.

    The first has columns initialisation, reference ("mean ODE" or "own ODE"), width, depth, seed, iteration, and the
    distances ``output``, ``hidden_states`` and ``loss`` (`Moment.measure_distances`). The second has the first
    coordinate of the hidden states of three inputs, for the mean ODE (depth 0) and the first draw of the narrowest
    i.i.d. networks: columns depth, s, input, value. The third has one entry of W_k, for the first draw of the narrowest
    networks of middle depth: columns initialisation, s, entry.
    """
    _, data = initialise(config.network.at_depth(1))
    reference = config.make_network("iid", config.reference_width, config.reference_depth, 0)
    mean = list(_train_network(config, reference, data))
    few = data.x[:3]
    shown_states = {0: _thin_states(reference, mean[-1][0].weights, few)}
    mean = [moment for _, moment in mean]
    own = {}
    narrow, middle = config.widths[0], config.depths[len(config.depths) // 2]
    rows, weights = [], []
    for initialisation, width, depth, seed in progress(config.runs, len(config.runs)):
        network = config.make_network(initialisation, width, depth, seed)
        references = {MEAN: mean}
        if initialisation == "weight-tied":
            if seed not in own:
                own[seed] = _train_own_limit(config, network, data)
            references[OWN] = own[seed]
        named = {"initialisation": initialisation, "width": width, "depth": depth, "seed": seed}
        for place, (record, moment) in enumerate(_train_network(config, network, data)):
            for name, moments in references.items():
                distances = moment.measure_distances(moments[place])
                rows.append(named | {"reference": name, "iteration": record.iteration} | distances)
        if width == narrow and seed == 1:
            if initialisation == "iid" and depth in (config.depths[0], config.depths[-1]):
                shown_states[depth] = _thin_states(network, record.weights, few)
            if depth == middle:
                for k, entry in enumerate(record.weights.W[:, 0, 0].tolist(), start=1):
                    weights.append({"initialisation": initialisation, "s": k / depth, "entry": entry})
    trajectories = [
        {"depth": depth, "s": k / (len(states) - 1), "input": number, "value": float(value)}
        for depth, states in shown_states.items()
        for k, values in enumerate(states)
        for number, value in enumerate(values)
    ]
    return {
        "mean_limit": from_rows(rows),
        "mean_limit_states": from_rows(trajectories),
        "mean_limit_weights": from_rows(weights),
    }


def _thin_states(network: NetworkConfig, weights: Weights, x: Tensor) -> Tensor:
    """The first coordinate of the hidden states of inputs x: (k, d), at about 128 layers or fewer: (., k)."""
    states = hidden_states(network, weights, x)[..., 0]
    return states[:: max(1, network.depth // 128)]


# --- The picture ------------------------------------------------------------------------------------------------------

QUANTITY_COLORS = dict(zip(QUANTITIES, (BLUE, GREEN, VERMILION), strict=True))
# For networks of the narrowest width: initialisation and reference, and their line and marker.
KINDS = {("iid", MEAN): ("-", "o"), ("weight-tied", OWN): ("--", "s")}


@styled
def draw(data: Data, config: Config) -> Figure:
    """Weights and hidden states across the layers, slopes along training, and distances from the limits against depth
    and width."""
    table, states, weights = (data[f"mean_limit{name}"] for name in ("", "_states", "_weights"))
    slope_from = config.slope_from
    figure, ((rough, smooth, slopes), (widths, together, kinds)) = make_panels(3, 2, height=5.6)
    narrow, last = min(table["width"]), max(table["iteration"])
    end = select(table, iteration=last)
    _draw_across_layers(rough, smooth, states, weights, narrow)
    _draw_slopes_in_time(slopes, table, narrow, slope_from)
    _draw_by_width(widths, together, end)
    _draw_by_kind(kinds, end, narrow, slope_from)
    return figure


def _draw_across_layers(rough: Axes, smooth: Axes, states: Table, weights: Table, narrow: int) -> None:
    for name, label, style in (
        ("iid", "i.i.d.", {"color": VERMILION, "linewidth": 0.7}),
        ("weight-tied", "weight-tied", {"color": BLUE, "linewidth": 1.6}),
    ):
        rows = select(weights, initialisation=name)
        rough.plot(rows["s"], rows["entry"], label=label, **style)
    rough.set(xlabel="$s=k/L$", title=f"one entry of $W_k$, trained, $L={len(rows['s'])}$")
    rough.legend(loc="upper right", ncols=2, handlelength=1.2, columnspacing=1)
    leave_room_above(rough, 0.15)
    depths = np.unique(states["depth"])
    colors = [GREY, VERMILION][-len(depths) + 1 :]
    for depth, color in [*zip(depths[1:], colors, strict=True), (0, "black")]:
        for number in np.unique(states["input"]):
            rows = select(states, depth=depth, input=number)
            style = {"linewidth": 1.3, "linestyle": (0, (3, 2))} if depth == 0 else {"linewidth": 1, "color": color}
            label = None if number else ("mean ODE" if depth == 0 else f"$L={depth}$")
            smooth.plot(rows["s"], rows["value"], **{"color": color} | style, label=label)
    smooth.set(xlabel="$s=k/L$", title=f"hidden states, i.i.d., $m={narrow}$")
    smooth.legend(loc="upper center", ncols=3, handlelength=1.2, columnspacing=0.8, fontsize=7)
    leave_room_above(smooth, 0.15)


def _draw_slopes_in_time(axes: Axes, table: Table, narrow: int, slope_from: int) -> None:
    iterations = np.unique(table["iteration"])
    for (initialisation, reference), (line, marker) in KINDS.items():
        for shift, (quantity, color) in zip((-1, 0, 1), QUANTITY_COLORS.items(), strict=True):
            times, fits = [], []
            for iteration in iterations:
                chosen = {"initialisation": initialisation, "reference": reference, "width": narrow}
                rows = select(table, iteration=iteration, **chosen)
                if rows[quantity].min() > 1e-12:  # networks that start on their limit have no distance yet
                    times.append(iteration + shift * 0.012 * iterations[-1])
                    fits.append(fit_slope_in_depth(rows, quantity, slope_from, **chosen))
            draw_slopes(axes, times, fits, fmt=marker + line, color=color, markersize=3.5)
    for slope, text in ((-0.5, "i.i.d."), (-1, "weight-tied")):
        axes.axhline(slope, linestyle=":", **GUIDE)
        axes.annotate(text, (0.98, slope), (0, 14), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", fontsize=8)  # fmt: skip
    axes.set(xlabel="training iteration", title="slope in $L$", ylim=(-1.4, 0.1))


def _draw_by_width(alone: Axes, together: Axes, table: Table) -> None:
    fit, points = (made(table, "output", initialisation="iid") for made in (fit_two_terms, compute_root_mean_squares))
    widths = np.unique(points["width"])
    color, _ = make_color_scale(widths, log=True)
    for width, marker in zip(widths, cycle(MARKERS), strict=False):
        rows = select(points, width=width)
        style = {"color": color(width), "linewidth": 0.8, "capsize": 2, "fmt": marker}
        for axes, x, scale in (
            (alone, rows["depth"], 1.0),
            (together, rows["depth"] / width, np.sqrt(rows["depth"] * width)),
        ):
            bars = np.maximum([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0) * scale
            axes.errorbar(x, rows["value"] * scale, bars, label=f"$m={width}$", **style)
        alone.plot(rows["depth"], fit.value(rows["depth"], width), color=color(width), linewidth=1, zorder=0)
    ratios = np.geomspace(*np.quantile(points["depth"] / points["width"], [0, 1]), 100)
    # The distance times sqrt(L m) depends on L/m alone, so m = 1 is enough.
    together.plot(ratios, fit.value(ratios, 1) * np.sqrt(ratios), color=GREY, linewidth=1.2, zorder=0)
    if 0 < fit.crossover < math.inf:
        together.axvline(fit.crossover, linestyle=":", **GUIDE)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 8, "color": GREY}
        together.annotate("$1/L$", (fit.crossover, 0.93), (-4, 0), ha="right", **place)
        together.annotate(r"$1/\sqrt{Lm}$", (fit.crossover, 0.93), (4, 0), **place)
    alone.set(yscale="log", title="outputs from the mean ODE, i.i.d.")
    set_depth_axis(alone, points["depth"])
    _leave_room_below(alone, 0.25)
    alone.legend(loc="lower left", ncols=2, columnspacing=0.6, labelspacing=0.2, handlelength=0.8, fontsize=7)
    together.set(xscale="log", yscale="log", xlabel="$L/m$", title=r"the same, times $\sqrt{Lm}$")
    set_plain_ticks(together.yaxis)


def _draw_by_kind(axes: Axes, end: Table, narrow: int, slope_from: int) -> None:
    tied = compute_root_mean_squares(end, "output", initialisation="weight-tied", reference=MEAN)
    axes.plot(tied["depth"], tied["value"], "x:", color=GREY, linewidth=1)
    for (initialisation, reference), (line, marker) in KINDS.items():
        for quantity, color in QUANTITY_COLORS.items():
            chosen = {"initialisation": initialisation, "reference": reference, "width": narrow}
            points = compute_root_mean_squares(end, quantity, **chosen)
            fit = fit_slope_in_depth(end, quantity, slope_from, **chosen)
            axes.plot(points["depth"], points["value"], marker, color=color)
            fitted = points["depth"][points["depth"] >= slope_from]
            axes.plot(fitted, fit.constant * fitted**fit.slope, line, color=color, linewidth=1)
    for quantity, color in QUANTITY_COLORS.items():
        axes.plot([], [], "-", color=color, label=QUANTITIES[quantity])
    for label, marker in (("i.i.d.", "o-"), ("weight-tied", "s--")):
        axes.plot([], [], marker, color="black", linewidth=1, label=label)
    axes.plot([], [], "x:", color=GREY, label="outputs, tied, mean ODE")
    axes.set(yscale="log", title=f"i.i.d. and weight-tied, $m={narrow}$")
    set_depth_axis(axes, end["depth"])
    _leave_room_below(axes, 0.5)
    axes.legend(loc="lower left", labelspacing=0.2, fontsize=7)


def _leave_room_below(axes: Axes, share: float) -> None:
    """Lengthen a logarithmic y axis downwards by this share of its length for a legend, without minor tick labels."""
    leave_room_for_legend(axes, share)
    axes.yaxis.set_minor_formatter(NullFormatter())


MEASURES = {"output": "root mean square over x and draws", "loss": "root mean square over draws",
            "hidden_states": "largest over s of the root mean square over x, root mean square over draws"}  # fmt: skip
TWO_TERMS_WITHIN = 0.2  # the largest relative deviation of distances from their fit by two terms


def judge_claims(read: Read) -> Iterator[Claim]:
    end = select_last(read("mean_limit"))
    narrow, seeds = min(end["width"]), len(np.unique(end["seed"]))
    kinds = (
        ("iid", MEAN, "i.i.d. layers", "the mean ODE's as 1/sqrt(L)", -0.5),
        ("weight-tied", OWN, "Weight-tied layers, mean-field scaling", "their own ODE's as 1/L", -1.0),
    )
    for initialisation, reference, layers, where_to, expected in kinds:
        for quantity, word in QUANTITIES.items():
            chosen = {"initialisation": initialisation, "reference": reference, "width": narrow}
            fit = fit_slope_in_depth(end, quantity, LEAST_DEPTH, **chosen)
            statement = f"{layers}: trained {word} converge to {where_to}"
            what = f"{MEASURES[quantity]}, at the end: slope in L"
            yield judge_rate(statement, BEYOND, "mean_limit", fit, expected, what, 0)
    fit = fit_two_terms(end, "output", initialisation="iid")
    widths = [int(width) for width in np.unique(select(end, initialisation="iid")["width"])]
    least = float(np.min([*fit.a_interval, *fit.b_interval]))
    both = math.nan if math.isnan(least) else math.inf if least > 0 else -math.inf
    margin = combine_margins(factor_below(fit.residual, TWO_TERMS_WITHIN), both)
    yield judge_margin(
        "i.i.d. layers: the distance of the outputs from the mean ODE's is of order 1/L + 1/sqrt(L m)",
        BEYOND,
        "mean_limit",
        margin,
        f"{MEASURES['output']}, at the end: {seeds} seeds, m = {', '.join(map(str, widths))}: root of "
        f"({fit.a:.2g}/L)^2 + {fit.b:.2g}^2/(L m), {100 * fit.residual:.0f} % off",
        f"within {100 * TWO_TERMS_WITHIN:.0f} % (root mean square over sizes), both terms above 0",
        "a [{:.2g}, {:.2g}], b [{:.2g}, {:.2g}]".format(*fit.a_interval, *fit.b_interval),
    )
