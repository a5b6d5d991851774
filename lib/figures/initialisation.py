"""Initialisations beside each other: what training adds to weight-tied, Gaussian and i.i.d. layers (section 4.3)."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lib import checks
from lib.dense import limit
from lib.dense.distances import largest_successive_distance
from lib.dense.network import NetworkConfig, Weights, hidden_states, initial_functions, initialise, outputs
from lib.dense.training import train
from lib.digits import STATE_DECIMALS, difference
from lib.figures.claim import BEYOND, OPEN, RATE_OURS, Claim, Read, judge_rates, slope_over_seeds
from lib.figures.experiment import Progress, last, silent
from lib.figures.results import Data
from lib.figures.style import BLACK, COLORS, GREY, MARKERS, depth_axis, panels, styled
from lib.measures import integral_distance
from lib.rates import SlopeOverSeeds, mean_slope
from lib.tables import Table, from_rows, select

WIDE = {"linewidth": 2.6, "markersize": 6}
TRAINED = 0.1  # the share of the first loss that is left once a network counts as trained


@dataclass(frozen=True)
class Config:
    """Initialisations compared at several ``depths``, by what ``iterations`` of training add to the weights.

    ``length_scales``: those of the Gaussian processes. ``initial_V``: whether i.i.d. layers and Gaussian processes
    draw V as well; the weight-tied case is the paper's, V = 0. ``network`` gives everything else, with ``seeds``
    consecutive seeds from its own on.
    """

    network: NetworkConfig
    depths: list[int]
    length_scales: list[float]
    iterations: int
    initial_V: str = "drawn"
    learning_rate: float = 0.1
    tolerance: float = 1e-5
    slope_from: int = 16
    seeds: int = 1

    def __post_init__(self) -> None:
        checks.make_plain(self)
        checks.positive_ints("depths", self.depths, least=2)
        checks.positive_floats("length_scales", self.length_scales)
        checks.positive_int("iterations", self.iterations)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.positive_float("tolerance", self.tolerance)
        checks.slope_range(self.slope_from, self.depths)
        checks.positive_int("seeds", self.seeds)
        self.cases  # noqa: B018 (the configurations check themselves)

    @property
    def cases(self) -> dict[str, NetworkConfig]:
        """The initialisations by name."""

        def case(initialisation: str, **changes) -> NetworkConfig:
            return dataclasses.replace(self.network, initialisation=initialisation, **changes)

        drawn = {"initial_V": self.initial_V}
        processes = {
            f"Gaussian process {scale:g}": case("gaussian-process", length_scale=scale, **drawn)
            for scale in self.length_scales
        }
        return {
            "weight-tied": case("weight-tied", initial_V="zero"),
            **processes,
            "iid": case("iid", **drawn),
            "iid 1/sqrt(L)": case("iid", residual_scaling="1/sqrt(L)", initial_V="drawn"),
        }


def compute(config: Config, progress: Progress = silent) -> Data:
    """Two tables: what training adds as the depth grows, and one entry of it across the layers.

    With D_k = Z_k(t) - Z_k(0) at the last iteration, the first has columns seed, case, depth, start (the first loss),
    loss (the last one),

    - ``successive``: max over k of |D_{k+1} - D_k|_F, over ``size``, the root of the mean over k of |D_k|_F^2;
    - ``distance``: of D^L from the limit's D in the integral norm, or, where there is no limit (i.i.d.), from the
      deepest network's (nan for itself);
    - ``output``: the same of the outputs F(x), root mean square over the training inputs and coordinates: i.i.d. layers
      have a limit as functions of x (`lib.figures.mean_limit`), though not as weights;
    - ``variation``: sum over k of |g_{k+1} - g_k|^2 for g_k = h_k(t) - h_k(0), averaged over the training inputs: the
      quadratic variation of what training adds to the hidden states, of order 1/L for an ordinary differential
      equation and of order 1 for a stochastic one.

    The second has columns case, s = k/L, entry: one entry of W_k(t) - W_k(0), of the first seed's deepest network.
    """
    seeds = [config.network.seed + k for k in range(config.seeds)]
    runs = [(seed, case, network) for seed in seeds for case, network in config.cases.items()]
    rows, entries = [], []
    for seed, case, network in progress(runs, len(runs)):
        network = dataclasses.replace(network, seed=seed)
        found = [_train(config, network.at_depth(depth)) for depth in config.depths]
        deepest = found[-1]
        moved, output = _limit(config, network) if network.initialisation != "iid" else (None, deepest.output)
        for depth, trained in zip(config.depths, found, strict=True):
            if moved is not None:
                parts = moved.distance_to_network(trained.moved).values()
            elif trained is deepest:
                parts = (math.nan,)
            else:
                parts = (integral_distance(getattr(trained.moved, Z), getattr(deepest.moved, Z)) for Z in "VW")
            reference = moved is not None or trained is not deepest
            apart = float((trained.output - output).square().mean().sqrt()) if reference else math.nan
            measured = {"distance": math.hypot(*parts), "output": apart, "variation": trained.variation}
            measured = trained.sizes | {name: difference(value, STATE_DECIMALS) for name, value in measured.items()}
            losses = {"start": trained.losses[0], "loss": trained.losses[1]}
            rows.append({"seed": seed, "case": case, "depth": depth} | losses | measured)
        if seed == seeds[0]:
            for k, entry in enumerate(deepest.moved.W[:, 0, 0].tolist(), start=1):
                entries.append({"case": case, "s": k / config.depths[-1], "entry": difference(entry)})
    return {"initialisation": from_rows(rows), "initialisation_weights": from_rows(entries)}


@dataclass
class Trained:
    """What training did to a network: its first and last loss, what it added to the weights, the sizes ``successive``
    and ``size`` and the ``variation`` of the table, and the outputs (n, d')."""

    losses: tuple[float, float]
    moved: Weights
    sizes: dict[str, float]
    variation: float
    output: Tensor


def _train(config: Config, network: NetworkConfig) -> Trained:
    start, data = initialise(network)
    before = hidden_states(network, start, data.x)
    first, end = (
        (record.loss, record.weights)
        for record in train(network, config.learning_rate, config.iterations, [0, config.iterations])
    )
    states = hidden_states(network, end[1], data.x)
    moved = _difference(end[1], start)
    squares = sum(Z.square().flatten(1).sum(dim=1) for Z in (moved.V, moved.W))
    size = math.sqrt(float(squares.mean()))
    successive = largest_successive_distance(moved) / size
    variation = float((states - before).diff(dim=0).square().sum()) / network.samples
    sizes = {"successive": difference(successive), "size": difference(size)}
    return Trained((first[0], end[0]), moved, sizes, variation, outputs(end[1], states))


def _limit(config: Config, network: NetworkConfig) -> tuple[limit.TrainedODE, Tensor]:
    # What training adds to the limit's weights, as functions of s, and the limit's outputs.
    schedule = config.learning_rate, config.iterations, [config.iterations]
    ode = last(limit.train(network, *schedule, tolerance=config.tolerance)).ode
    weights_at, data = initial_functions(network)
    moved = _difference(ode.weights, weights_at(ode.grid.s.cpu()).to(ode.grid.s))
    return limit.TrainedODE(ode.config, ode.grid, moved), ode(data.x, 0.01 * config.tolerance)


def _difference(end: Weights, start: Weights) -> Weights:
    return Weights(end.V - start.V, end.W - start.W)


def _case_label(case: str) -> str:
    if case.startswith("Gaussian process"):
        return rf"Gaussian process, $\ell={case.split()[-1]}$"
    return {"iid": "i.i.d.", "iid 1/sqrt(L)": r"i.i.d., scaling $1/\sqrt{L}$"}.get(case, case)


def _means(rows: Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The depths at which the column is positive for every seed, and its geometric mean over the seeds."""
    found = {depth: select(rows, depth=depth)[column] for depth in np.unique(rows["depth"])}
    depths = [depth for depth, values in found.items() if (values > 1e-10).all()]
    return np.array(depths), np.array([math.exp(np.log(found[depth]).mean()) for depth in depths])


def slopes(table: Table, case: str, slope_from: int) -> dict[str, SlopeOverSeeds]:
    """Of successive, distance, output and variation: the slope in L, a mean over the seeds (`lib.rates.mean_slope`).
    The deepest i.i.d. network is left out of distance and output, as these are taken from it."""
    rows = select(table, case=case)
    shallower = {name: column[rows["depth"] < max(rows["depth"])] for name, column in rows.items()}
    to_reference = shallower if case.startswith("iid") else rows
    by_column = {"successive": rows, "distance": to_reference, "output": to_reference, "variation": rows}
    return {column: mean_slope(of_column, column, slope_from) for column, of_column in by_column.items()}


@styled
def draw(data: Data, config: Config) -> Figure:
    """What training adds to each initialisation, against depth: how rough it is across the layers, how far weights and
    outputs are from the limit's, the quadratic variation of hidden states; geometric means over the seeds. Then one
    entry across the layers. ``table`` and ``entries`` have the columns of ``initialisation.csv`` and
    ``initialisation_weights.csv``."""
    table, entries = data["initialisation"], data["initialisation_weights"]
    figure, axes = panels(3, 2, height=5.2)
    successive, distance, output, variation, entry, legend = axes.flat
    by_column = {"successive": successive, "distance": distance, "output": output, "variation": variation}
    for case, color, marker in zip(config.cases, cycle((BLACK, *COLORS)), cycle(MARKERS), strict=False):
        # Curves that lie on each other: a wide one below, a dashed one with open markers above.
        style = {"weight-tied": WIDE, "iid": WIDE, "iid 1/sqrt(L)": {"linestyle": "--", "markerfacecolor": "white"}}
        style = {"color": color, "marker": marker} | style.get(case, {})
        for column, panel in by_column.items():
            panel.plot(*_means(select(table, case=case), column), **style)
        rows = select(entries, case=case)
        if not case.startswith("iid"):
            entry.plot(rows["s"], rows["entry"], color=color, linewidth=1.3, zorder=2)
        elif case == "iid":
            entry.plot(rows["s"], rows["entry"], color=color, linewidth=0.5, zorder=1)
        legend.plot([], [], label=_case_label(case), **style)
    titles = {
        successive: r"$\max_k\,\|D_{k+1}-D_k\|_F$ over the size of $D$",
        distance: "$D$ to its limit",
        output: "outputs to their limit",
        variation: r"variation of $h_k(t)-h_k(0)$",
    }
    for panel, title in titles.items():
        depth_axis(panel, table["depth"])
        panel.set_yscale("log")
        panel.set_title(title)
    entry.set_xlabel("$s=k/L$")
    entry.set_title(f"one entry of $W_k(t)-W_k(0)$, $L={max(table['depth'])}$")
    legend.set_axis_off()
    legend.plot([], [], " ", color=GREY, label="i.i.d.: to the deepest network")
    legend.legend(loc="center left", title="$D=Z(t)-Z(0)$, means over seeds", title_fontsize=8)
    return figure


NAMES = {
    "weight-tied": "Weight-tied layers",
    "iid": "i.i.d. layers",
    "iid 1/sqrt(L)": "i.i.d. layers, 1/sqrt(L)",
}


def claims(read: Read) -> Iterator[Claim]:
    """That training itself adds what is smooth or rough, in networks that are trained: else a claim is open."""
    table = read("initialisation")

    def judged(statement, where, column, cases, expected: float, bound: int, what: str = "slope in L") -> Claim:
        parts = [select(table, case=case) for case in cases]
        fits = [slope_over_seeds(rows, column) for rows in parts]
        claim = judge_rates(statement, where, "initialisation", fits, expected, what, bound)
        left = float(np.max([np.max(rows["loss"] / rows["start"]) for rows in parts]))
        trained = f", once the loss is below {100 * TRAINED:.0f} % of its start"
        measured = f"{claim.measured}; at most {100 * left:.0f} % of the loss is left"
        changes = {"measured": measured, "criterion": claim.criterion + trained}
        return dataclasses.replace(claim, **changes, **({} if left <= TRAINED else {"verdict": OPEN}))

    section, smooth = "section 4.3", []
    for case in dict.fromkeys(table["case"]):
        what = NAMES.get(case, f"Gaussian process of length scale {case.split()[-1]}")
        measure = "max over k of |D_(k+1) - D_k|_F over the size of D = Z(t) - Z(0)"
        if case.startswith("iid"):
            statement = f"{what}: what training adds is rough: {measure} does not fall"
            yield judged(statement, BEYOND, "successive", [case], 0.0, -1)
        else:
            statement = f"{what}: what training adds is smooth: {measure} is O(1/L)"
            yield judged(statement, section, "successive", [case], -1.0, 1)
            smooth.append(case)
    statement = "Smooth initialisations: D^L converges to the limit's D as 1/L, (int |D^L - D|_F^2 ds)^(1/2)"
    what = f"largest slope in L over {len(smooth)} initialisations"
    yield judged(statement, section + RATE_OURS, "distance", smooth, -1.0, 1, what)
    for case, expected, kind in (("iid", -1.0, "an ordinary"), ("iid 1/sqrt(L)", 0.0, "a stochastic")):
        scaling = "1/sqrt(L)" if "sqrt" in case else "1/L"
        statement = f"i.i.d. layers, {scaling}: h_k(t) - h_k(0) varies as for {kind} differential equation"
        what = "quadratic variation over k, mean over x, slope in L"
        yield judged(statement, BEYOND, "variation", [case], expected, 0, what)
