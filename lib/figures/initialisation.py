"""Initialisations beside each other: weight-tied, Gaussian processes, i.i.d. (section 4.3)."""

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
from lib.dense.distances import successive_squares
from lib.dense.network import NetworkConfig, Weights, hidden_states, initialise, outputs
from lib.dense.training import lockstep, train
from lib.digits import difference
from lib.figures.claim import LEAST_DEPTH, Claim, Read, fit_in_depth, judge_rate, select_last
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import BLACK, COLORS, GREY, MARKERS, depth_axis, panels, styled
from lib.measures import integral_distance
from lib.tables import from_rows, select


@dataclass(frozen=True)
class Config:
    """Initialisations compared at several ``depths``, before and after ``iterations`` of training.

    ``length_scales``: those of the Gaussian processes. ``initial_V``: whether i.i.d. layers and Gaussian processes
    draw V as well; the weight-tied case is the paper's, V = 0. ``network`` gives everything else.
    """

    network: NetworkConfig
    depths: list[int]
    length_scales: list[float]
    iterations: int
    initial_V: str = "drawn"
    learning_rate: float = 0.1
    tolerance: float = 1e-5
    slope_from: int = 16

    def __post_init__(self) -> None:
        checks.make_plain(self)
        checks.positive_ints("depths", self.depths, least=2)
        checks.positive_floats("length_scales", self.length_scales)
        checks.positive_int("iterations", self.iterations)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.positive_float("tolerance", self.tolerance)
        checks.two_sizes(self.slope_from, self.depths)
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
    """Two tables: how layers and hidden states behave as the depth grows, and one entry of W across the layers.

    The first has columns case, iteration (0 and the last), depth, loss,

    - ``successive``: max over k of |Z_{k+1} - Z_k|_F;
    - ``distance``: of Z^L from the limit Z in the integral norm, or, if there is no limit (i.i.d.), from the
      deepest network (nan for itself);
    - ``output``: the same of the outputs F(x), root mean square over the training inputs and coordinates: i.i.d. layers
      have a limit as functions of x (`lib.figures.mean_limit`), though not as weights;
    - ``variation``: sum over k of |h_{k+1} - h_k|^2, averaged over the training inputs: the quadratic variation,
      of order 1/L for an ordinary differential equation and of order 1 for a stochastic one.

    The second has columns case, iteration, s = k/L, entry for the deepest network.
    """
    rows, entries = [], []
    moments = [0, config.iterations]
    for case, network in progress(config.cases.items(), len(config.cases)):
        smooth = network.initialisation != "iid"
        _, data = initialise(network)
        trainings = [
            train(network.at_depth(L), config.learning_rate, config.iterations, moments) for L in config.depths
        ]
        if smooth:
            reference = limit.train(
                network, config.learning_rate, config.iterations, moments, tolerance=config.tolerance
            )
            trainings.append(reference)
        for records in lockstep(trainings):
            networks = records[:-1] if smooth else records
            deepest = networks[-1].weights
            expected = records[-1].ode(data.x) if smooth else _output(network, config.depths[-1], deepest, data.x)
            iteration = networks[-1].iteration
            for depth, record in zip(config.depths, networks, strict=True):
                weights = record.weights
                if smooth:
                    parts = records[-1].ode.distance_to_network(weights).values()
                elif depth < config.depths[-1]:
                    parts = (integral_distance(weights.V, deepest.V), integral_distance(weights.W, deepest.W))
                else:
                    parts = (math.nan,)
                squares = sum(successive_squares(weights))
                states = hidden_states(network.at_depth(depth), weights, data.x)
                apart = (outputs(weights, states) - expected).square().mean().sqrt()
                variation = states.diff(dim=0).square().sum() / config.network.samples
                rows.append(
                    {
                        "case": case,
                        "iteration": iteration,
                        "depth": depth,
                        "loss": record.loss,
                        "successive": difference(math.sqrt(float(squares.max()))),
                        "distance": difference(math.hypot(*parts)),
                        "output": difference(float(apart)) if smooth or depth < config.depths[-1] else math.nan,
                        "variation": difference(float(variation)),
                    }
                )
            for k, entry in enumerate(deepest.W[:, 0, 0].tolist(), start=1):
                entries.append({"case": case, "iteration": iteration, "s": k / len(deepest.W), "entry": entry})
    return {"initialisation": from_rows(rows), "initialisation_weights": from_rows(entries)}


def _output(network: NetworkConfig, depth: int, weights: Weights, x: Tensor) -> Tensor:
    return outputs(weights, hidden_states(network.at_depth(depth), weights, x))


def _case_label(case: str) -> str:
    if case.startswith("Gaussian process"):
        return rf"Gaussian process, $\ell={case.split()[-1]}$"
    return {"iid": "i.i.d.", "iid 1/sqrt(L)": r"i.i.d., scaling $1/\sqrt{L}$"}.get(case, case)


COLUMNS = ("successive", "distance", "output", "variation")  # of the table, a panel each


@styled
def draw(data: Data, config: Config) -> Figure:
    """Successive distance, distances of weights and of outputs to the limit and quadratic variation against depth, for
    each initialisation.

    Open markers and thin lines: before training; full ones: after.
    """
    table, entries = data["initialisation"], data["initialisation_weights"]
    figure, axes = panels(3, 2, height=5.2)
    successive, distance, output, variation, entry, legend = axes.flat
    cases = list(dict.fromkeys(table["case"]))
    before, after = np.unique(table["iteration"])
    for case, color, marker in zip(cases, cycle((BLACK, *COLORS)), cycle(MARKERS), strict=False):
        for iteration, style in ((before, {"markerfacecolor": "white", "linewidth": 0.7}), (after, {})):
            rows = select(table, case=case, iteration=iteration)
            for panel, name in zip((successive, distance, output, variation), COLUMNS, strict=True):
                values = np.where(np.nan_to_num(rows[name]) > 1e-10, rows[name], np.nan)
                panel.plot(rows["depth"], values, marker + "-", color=color, **style)
        rows = select(entries, case=case, iteration=after)
        if case != "iid 1/sqrt(L)":
            width = 0.5 if case == "iid" else 1.3
            entry.plot(rows["s"], rows["entry"], color=color, linewidth=width, zorder=1 if case == "iid" else 2)
        legend.plot([], [], marker + "-", color=color, label=_case_label(case))
    legend.plot([], [], "o", color=GREY, markerfacecolor="white", label="open: before training,\nif it differs")
    titles = {
        successive: r"$\max_k\,\|Z_{k+1}-Z_k\|_F$",
        distance: "weights to their limit",
        output: "outputs to their limit",
        variation: r"$\sum_k\,\|h_{k+1}-h_k\|^2$",
    }
    for panel, title in titles.items():
        depth_axis(panel, table["depth"])
        panel.set_yscale("log")
        panel.set_title(title)
    entry.set_xlabel("$s=k/L$")
    entry.set_title(f"one entry of $W_k$, $L={max(table['depth'])}$")
    legend.set_axis_off()
    legend.legend(loc="center left", title="i.i.d.: to the deepest network", title_fontsize=8)
    return figure


def claims(read: Read) -> Iterator[Claim]:
    table = read("initialisation")
    after = select_last(table)
    longest = {}
    for case in dict.fromkeys(table["case"]):
        rows = select(after, case=case)
        smooth = not case.startswith("iid")
        # A Gaussian process of length scale ell is resolved by depths well above 1/ell.
        at_least = max(LEAST_DEPTH, 8 / float(case.split()[-1])) if case.startswith("Gaussian") else LEAST_DEPTH
        fit = fit_in_depth(rows, "successive", int(at_least))
        names = {
            "weight-tied": "Weight-tied layers",
            "iid": "i.i.d. layers",
            "iid 1/sqrt(L)": "i.i.d. layers, 1/sqrt(L)",
        }
        what = names.get(case, f"Gaussian process of length scale {case.split()[-1]}")
        statement = f"{what}: {'smooth' if smooth else 'rough'} after training"
        expected, bound = (-1.0, 1) if smooth else (0.0, -1)
        yield judge_rate(statement, "section 4.3", "initialisation", fit, expected, bound=bound)
        longest[case] = rows
    for case, expected, kind in (("iid", -1.0, "an ordinary"), ("iid 1/sqrt(L)", 0.0, "a stochastic")):
        fit = fit_in_depth(longest[case], "variation")
        scaling = "1/sqrt(L)" if "sqrt" in case else "1/L"
        statement = f"i.i.d. layers, {scaling}: hidden states vary as for {kind} differential equation"
        what = "quadratic variation, slope in L"
        yield judge_rate(statement, "section 4.3", "initialisation", fit, expected, what, bound=0)
