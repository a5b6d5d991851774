"""What training adds to layers of weight-tied, Gaussian-process and i.i.d. initialisation (section 4.3)."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lib import checks
from lib.dense import limit
from lib.dense.distances import largest_successive_distance
from lib.dense.network import NetworkConfig, Weights, hidden_states, initial_functions, initialise, outputs
from lib.dense.training import train
from lib.digits import STATE_DECIMALS, round_difference
from lib.figures.claim import BEYOND, OPEN, RATE_OURS, Claim, Read, fit_over_seeds, judge_rates
from lib.figures.experiment import Progress, compute_runs, silent, take_last, vary_seed
from lib.figures.results import Data
from lib.figures.style import BLACK, COLORS, MARKERS, make_panels, set_depth_axis, styled
from lib.measures import integral_distance
from lib.rates import SlopeOverSeeds, fit_mean_slope
from lib.tables import Table, from_rows, select

WIDE = {"linewidth": 2.6, "markersize": 6, "zorder": 1.5}
DASHED = {"linestyle": "--", "markerfacecolor": "white"}
TRAINED = 0.1  # the largest share of the first loss that is left in a network that counts as trained


@dataclass(frozen=True)
class Config:
    """Initialisations, compared at several ``depths`` by what ``iterations`` of training add to the weights.

    The Gaussian processes have these ``length_scales``. ``initial_V`` says whether i.i.d. layers and Gaussian processes
    draw V too; the weight-tied case has V = 0, as in the paper. ``network`` gives everything else, and the first of
    ``seeds`` consecutive seeds.
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
        checks.check_fields(self, "length_scales", "iterations", "learning_rate", "tolerance", "seeds", depths=2)
        checks.slope_range(self.slope_from, self.depths)
        self.cases  # noqa: B018 (the configurations check themselves)

    @property
    def cases(self) -> dict[str, NetworkConfig]:
        """The initialisations by name."""

        make = partial(dataclasses.replace, self.network)
        process = partial(make, initialisation="gaussian-process", initial_V=self.initial_V)
        return {
            "weight-tied": make(initialisation="weight-tied", initial_V="zero"),
            **{f"Gaussian process {scale:g}": process(length_scale=scale) for scale in self.length_scales},
            "iid": make(initialisation="iid", initial_V=self.initial_V),
            "iid 1/sqrt(L)": make(initialisation="iid", residual_scaling="1/sqrt(L)", initial_V="drawn"),
        }


def compute(config: Config, progress: Progress = silent) -> Data:
    """Two tables on what training adds to the weights, D_k = Z_k(t) - Z_k(0) at the last iteration.

    The first has columns seed, case, depth, start (the first loss), loss (the last loss), and

    - ``successive``: max over k of |D_{k+1} - D_k|_F, divided by ``size``, the root of the mean over k of |D_k|_F^2;
    - ``distance``: the distance of D^L from the limit's D in the integral norm. i.i.d. layers have no such limit: for
      them it is the distance from the deepest network's D (nan for the deepest network itself);
    - ``output``: the same for the outputs F(x), as a root mean square over the training inputs and coordinates. i.i.d.
      layers have a limit as functions of x (`lib.figures.mean_limit`), but not as weights;
    - ``variation``: the sum over k of |g_{k+1} - g_k|^2 for g_k = h_k(t) - h_k(0), averaged over the training inputs.
      This quadratic variation of what training adds to the hidden states is of order 1/L for an ordinary differential
      equation, and of order 1 for a stochastic one.

    The second has one entry of W_k(t) - W_k(0), for the first seed's deepest network: columns case, s = k/L, entry.
    """
    seeds = [network.seed for network in vary_seed(config.network, config.seeds)]
    runs = [(case, dataclasses.replace(network, seed=seed)) for seed in seeds for case, network in config.cases.items()]
    rows, entries = [], []
    found = compute_runs(_measure_case, config, runs, progress)
    for (case, network), (part, entry) in zip(runs, found, strict=True):
        named = {"seed": network.seed, "case": case}
        rows += [named | row for row in part]
        if network.seed == seeds[0]:
            s = (k / config.depths[-1] for k in range(1, len(entry) + 1))
            entries += [{"case": case, "s": at, "entry": value} for at, value in zip(s, entry, strict=True)]
    return {"initialisation": from_rows(rows), "initialisation_weights": from_rows(entries)}


def _measure_case(config: Config, run: tuple[str, NetworkConfig]) -> tuple[list[dict], list[float]]:
    # The rows of one seed and case; the entry of W_k(t) - W_k(0) in each layer of the deepest network.
    _, network = run
    found = [_train(config, network.at_depth(depth)) for depth in config.depths]
    deepest, rows = found[-1], []
    moved, output = _train_limit(config, network) if network.initialisation != "iid" else (None, deepest.output)
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
        measured = {name: round_difference(value, STATE_DECIMALS) for name, value in measured.items()}
        losses = {"start": trained.losses[0], "loss": trained.losses[1]}
        rows.append({"depth": depth} | losses | trained.sizes | measured)
    return rows, [round_difference(entry) for entry in deepest.moved.W[:, 0, 0].tolist()]


@dataclass
class Trained:
    """What training did to a network: the first and the last loss, what it added to the weights, the columns
    ``successive``, ``size`` and ``variation`` of the table, and the outputs (n, d')."""

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
    moved = _subtract(end[1], start)
    squares = sum(Z.square().flatten(1).sum(dim=1) for Z in (moved.V, moved.W))
    size = math.sqrt(float(squares.mean()))
    successive = largest_successive_distance(moved) / size
    variation = float((states - before).diff(dim=0).square().sum()) / network.samples
    sizes = {"successive": round_difference(successive), "size": round_difference(size)}
    return Trained((first[0], end[0]), moved, sizes, variation, outputs(end[1], states))


def _train_limit(config: Config, network: NetworkConfig) -> tuple[limit.TrainedODE, Tensor]:
    # What training adds to the limit's weights as functions of s, and the outputs of the limit.
    schedule = config.learning_rate, config.iterations, [config.iterations]
    ode = take_last(limit.train(network, *schedule, tolerance=config.tolerance)).ode
    weights_at, data = initial_functions(network)
    moved = _subtract(ode.weights, weights_at(ode.grid.s.cpu()).to(ode.grid.s))
    return limit.TrainedODE(ode.config, ode.grid, moved), ode(data.x, 0.01 * config.tolerance)


def _subtract(end: Weights, start: Weights) -> Weights:
    return Weights(end.V - start.V, end.W - start.W)


def _label_case(case: str) -> str:
    if case.startswith("Gaussian process"):
        return rf"Gaussian process, $\ell={case.split()[-1]}$"
    return {"iid": "i.i.d.", "iid 1/sqrt(L)": r"i.i.d., scaling $1/\sqrt{L}$"}.get(case, case)


def _compute_means(rows: Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The depths at which the column is positive for every seed, and its geometric mean over the seeds."""
    found = {depth: select(rows, depth=depth)[column] for depth in np.unique(rows["depth"])}
    depths = [depth for depth, values in found.items() if (values > 1e-10).all()]
    return np.array(depths), np.array([math.exp(np.log(found[depth]).mean()) for depth in depths])


def fit_slopes(table: Table, case: str, slope_from: int) -> dict[str, SlopeOverSeeds]:
    """The slopes in L of successive, distance, output and variation, as means over the seeds (`fit_mean_slope`).
    Distances of i.i.d. networks are fitted without the deepest one, which is their reference."""
    rows = select(table, case=case)
    shallower = {name: column[rows["depth"] < max(rows["depth"])] for name, column in rows.items()}
    to_reference = shallower if case.startswith("iid") else rows
    by_column = {"successive": rows, "distance": to_reference, "output": to_reference, "variation": rows}
    return {column: fit_mean_slope(of_column, column, slope_from) for column, of_column in by_column.items()}


@styled
def draw(data: Data, config: Config) -> Figure:
    """What training adds, for each initialisation: its roughness across the layers, its distance and that of the
    outputs from the limit, and the quadratic variation of hidden states, against depth, as geometric means over the
    seeds. Then one entry across the layers."""
    table, entries = data["initialisation"], data["initialisation_weights"]
    figure, axes = make_panels(3, 2, height=5.2)
    successive, distance, output, variation, entry, legend = axes.flat
    by_column = {"successive": successive, "distance": distance, "output": output, "variation": variation}
    for case, color, marker in zip(config.cases, cycle((BLACK, *COLORS)), cycle(MARKERS), strict=False):
        # Some curves coincide: a wide one is below, a dashed one with hollow markers is above.
        style = {"weight-tied": WIDE, "iid": WIDE, "iid 1/sqrt(L)": DASHED}
        style = {"color": color, "marker": marker} | style.get(case, {})
        for column, panel in by_column.items():
            panel.plot(*_compute_means(select(table, case=case), column), **style)
        rows = select(entries, case=case)
        if not case.startswith("iid"):
            entry.plot(rows["s"], rows["entry"], color=color, linewidth=1.3, zorder=2)
        elif case == "iid":
            entry.plot(rows["s"], rows["entry"], color=color, linewidth=0.5, zorder=1)
        legend.plot([], [], label=_label_case(case), **style)
    titles = {
        successive: r"$\max_k\,\|D_{k+1}-D_k\|_F$ over the size of $D$",
        distance: "$D$ to its limit (i.i.d.: deepest)",
        output: "outputs to limit (i.i.d.: deepest)",
        variation: r"variation of $h_k(t)-h_k(0)$",
    }
    for panel, title in titles.items():
        set_depth_axis(panel, table["depth"])
        panel.set(yscale="log", title=title)
    entry.set(xlabel="$s=k/L$", title=f"one entry of $W_k(t)-W_k(0)$, $L={max(table['depth'])}$")
    legend.set_axis_off()
    legend.legend(loc="center left", title="$D=Z(t)-Z(0)$, means over seeds", title_fontsize=8)
    return figure


NAMES = {
    "weight-tied": "Weight-tied layers",
    "iid": "i.i.d. layers",
    "iid 1/sqrt(L)": "i.i.d. layers, 1/sqrt(L)",
}


def judge_claims(read: Read) -> Iterator[Claim]:
    """What training adds is smooth or rough, as the initialisation is. A claim is open if a network is not trained."""
    table = read("initialisation")

    def judge_cases(statement, where, column, cases, expected: float, bound: int, what: str = "slope in L") -> Claim:
        parts = [select(table, case=case) for case in cases]
        fits = [fit_over_seeds(rows, column) for rows in parts]
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
            yield judge_cases(statement, BEYOND, "successive", [case], 0.0, -1)
        else:
            statement = f"{what}: what training adds is smooth: {measure} is O(1/L)"
            yield judge_cases(statement, section, "successive", [case], -1.0, 1)
            smooth.append(case)
    statement = "Smooth initialisations: D^L converges to the limit's D as 1/L, (int |D^L - D|_F^2 ds)^(1/2)"
    what = f"largest slope in L over {len(smooth)} initialisations"
    yield judge_cases(statement, section + RATE_OURS, "distance", smooth, -1.0, 1, what)
    for case, expected, kind in (("iid", -1.0, "an ordinary"), ("iid 1/sqrt(L)", 0.0, "a stochastic")):
        scaling = "1/sqrt(L)" if "sqrt" in case else "1/L"
        statement = f"i.i.d. layers, {scaling}: h_k(t) - h_k(0) varies as for {kind} differential equation"
        what = "quadratic variation over k, mean over x, slope in L"
        yield judge_cases(statement, BEYOND, "variation", [case], expected, 0, what)
