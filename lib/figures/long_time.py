"""Training for long: the rate of the loss and the limit of the weights (Thm 6)."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from matplotlib.figure import Figure

from lib import checks
from lib.dense import limit, lojasiewicz, spectral
from lib.dense.limit import LIMIT
from lib.dense.network import NetworkConfig, hidden_states, initialise, outputs
from lib.dense.training import Record
from lib.digits import LIMIT_DECIMALS, count_known_digits, round_difference, round_significant, round_square
from lib.figures.claim import (
    RATE_OURS,
    Claim,
    Read,
    combine_margins,
    factor_above,
    factor_below,
    fit_over_seeds,
    judge,
    judge_rates,
    require_rows,
)
from lib.figures.experiment import (
    Progress,
    compute_runs,
    fit_loss_rate,
    largest_norm,
    silent,
    space_evenly,
    train_beside_limit,
    vary_seed,
)
from lib.figures.results import Data
from lib.figures.style import BLACK, COLORS, label_depth, make_panels, styled
from lib.tables import Table, from_rows, select

SAME_RATE = 0.1  # by how much of one rate of the loss another may differ
# The rate of the last quarter of training over that of the quarter before: 1 for e^(-mu t), ROOT for e^(-c sqrt(t)) and
# POWER for a power of t, whatever c and the exponent.
ROOT = (1 - math.sqrt(0.75)) / (math.sqrt(0.75) - math.sqrt(0.5))
POWER = math.log(4 / 3) / math.log(3 / 2)
SUSTAINED = 0.87  # at least, for a linear rate
LOSS_FALLS = 1e-3  # to what share of its start
ROUNDING = 1e-14  # the share of the first loss below which the loss of the limit is that of its solver's tolerance
INTERPOLATES = 1e-2  # what counts as no residual


@dataclass(frozen=True)
class Config:
    """Networks of several ``depths`` beside the limit, trained for ``iterations`` with ``learning_rate``.

    ``seeds``: how many draws of weights and data, with consecutive seeds from the network's on. Losses and PL ratios
    are kept ``recorded`` times. ``tolerance``: see `limit.train`.
    """

    network: NetworkConfig
    depths: list[int]
    iterations: int
    learning_rate: float = 0.03
    recorded: int = 50
    seeds: int = 1
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        checks.check_fields(self, "depths", "iterations", "learning_rate", "seeds", "tolerance", recorded=2)
        checks.positive_float("target_scale", self.network.target_scale)  # the ratio divides by the loss
        spectral.check_limit_exists(self.network)


def _measure_point(record: Record | limit.LimitRecord, learning_rate: float) -> dict[str, float]:
    loss = round_square(record.loss)
    # The ratio divides by the loss: it has no more digits, but two of them next to where the loss is rounding.
    ratio = round_significant(lojasiewicz.ratio(record), max(2, count_known_digits(record.loss))) if loss else math.nan
    return {"iteration": record.iteration, "time": learning_rate * record.iteration, "loss": loss, "ratio": ratio}


def compute(config: Config, progress: Progress = silent) -> Data:
    """Three tables on the ``depths`` and the limit: training curves, the weights at the end, nearness to the limit.

    The first has columns seed, depth, iteration, time, loss, ratio (`lojasiewicz.ratio`; nan if the loss is 0 up to
    rounding). The second, of the first seed, has depth, s, entry_V, entry_W (layer k at s = (k - 1/2)/L; those entries
    of V and of W that vary most over s in the limit). The third has seed, depth, distance_V, distance_W (integral
    norm), residual (the largest |F(x_i) - y_i|).
    """
    found = compute_runs(_train_seed, config, vary_seed(config.network, config.seeds), progress)
    curves, weights, nearness = zip(*found, strict=True)
    curves = sorted(itertools.chain(*curves), key=lambda row: (row["seed"], row["depth"], row["iteration"]))
    return {
        "long_time": from_rows(curves),
        "long_time_weights": from_rows(weights[0]),
        "long_time_limit": from_rows(itertools.chain(*nearness)),
    }


def _train_seed(config: Config, network: NetworkConfig) -> tuple[list[dict], list[dict], list[dict]]:
    recorded, rows = space_evenly(config.iterations, config.recorded), []
    for records in train_beside_limit(network, config.depths, config.learning_rate, recorded, config.tolerance):
        for depth, record in zip([LIMIT, *config.depths], records, strict=True):
            rows.append({"seed": network.seed, "depth": depth, **_measure_point(record, config.learning_rate)})
    return rows, _read_liveliest(config, records), _measure_nearness(config, network, records)


def _measure_nearness(config: Config, network: NetworkConfig, records: tuple) -> list[dict]:
    _, data = initialise(network)
    ode, found = records[0].ode, []
    for depth, record in zip([LIMIT, *config.depths], records, strict=True):
        if depth == LIMIT:
            distances, output = {"V": 0.0, "W": 0.0}, ode(data.x)
        else:
            distances = ode.distance_to_network(record.weights)
            output = outputs(record.weights, hidden_states(network.at_depth(depth), record.weights, data.x))
        away = {f"distance_{name}": round_difference(distance, LIMIT_DECIMALS) for name, distance in distances.items()}
        residual = round_difference(largest_norm(output - data.y))
        found.append({"seed": network.seed, "depth": depth, **away, "residual": residual})
    return found


def _read_liveliest(config: Config, records: tuple) -> list[dict]:
    ode, found = records[0].ode, []
    liveliest = [int(values.flatten(1).std(dim=0).argmax()) for values in (ode.weights.V, ode.weights.W)]
    for depth, record in zip([LIMIT, *config.depths], records, strict=True):
        if depth == LIMIT:
            s = torch.linspace(0, 1, 101, dtype=torch.float64)
            Z = ode.weights_at(s)
        else:
            s, Z = (torch.arange(depth, dtype=torch.float64) + 0.5) / depth, record.weights
        entries = [values.flatten(1)[:, entry].tolist() for values, entry in zip((Z.V, Z.W), liveliest, strict=True)]
        for position, V, W in zip(s.tolist(), *entries, strict=True):
            found.append(
                {"depth": depth, "s": position, "entry_V": round_difference(V), "entry_W": round_difference(W)}
            )
    return found


@styled
def draw(data: Data, config: Config) -> Figure:
    """Losses and PL ratios along training and final weights, for several depths and the limit, of the first seed.

    Ratios are drawn until the loss is down to `ROUNDING`.
    """
    curves, weights = data["long_time"], data["long_time_weights"]
    curves = select(curves, seed=min(curves["seed"]))
    figure, (loss, ratio, final) = make_panels(3)
    depths = np.unique(curves["depth"])
    for depth, hue, line in zip(depths, cycle((BLACK, *COLORS)), cycle(("-", "--", "-.", ":", "--")), strict=False):
        label, rows = label_depth(depth), select(curves, depth=depth)
        loss.plot(rows["time"], rows["loss"], line, color=hue, label=label, linewidth=1.6)
        known = _find_resolved(rows)
        ratio.plot(rows["time"][known], rows["ratio"][known], line, color=hue, label=label, linewidth=1.6)
        rows = select(weights, depth=depth)
        if depth == LIMIT:
            final.plot(rows["s"], rows["entry_V"], color=hue, label=label)
        else:
            edges = np.linspace(0, 1, depth + 1)
            final.stairs(rows["entry_V"], edges, baseline=None, color=hue, label=label, linewidth=0.9)
    loss.set_title("loss")
    ratio.set_title(r"PL ratio, $-\frac{d}{dt}\log\ell$")
    final.set_xlabel("$s=k/L$")
    final.set_title(f"one entry of $V$ at $t={curves['time'][-1]:.0f}$")
    for axes in (loss, ratio):
        axes.set_xlabel("training time $t$")
        axes.set_yscale("log")
    for axes in (loss, final):
        axes.legend(loc="best", labelspacing=0.25)
    return figure


def _find_resolved(rows: Table) -> np.ndarray:
    # Until the loss is down to rounding: fast seeds are there long before slow ones.
    known = ~np.maximum.accumulate(rows["loss"] <= ROUNDING * rows["loss"][0])
    known[0] = True
    return known


def _group_runs(curves: Table) -> Iterator[tuple[tuple[int, int], Table]]:
    # The curves of each (seed, depth) that there is.
    for seed in np.unique(curves["seed"]):
        for depth in np.unique(select(curves, seed=seed)["depth"]):
            yield (int(seed), int(depth)), select(curves, seed=seed, depth=depth)


def _select_resolved(curves: Table) -> Iterator[tuple[tuple[int, int], Table]]:
    for run, rows in _group_runs(curves):
        known = _find_resolved(rows)
        yield run, {name: column[known] for name, column in rows.items()}


def fit_rates(curves: Table) -> dict[tuple[int, int], float]:
    """-d(log loss)/dt over the second half of training, by (seed, depth).

    Training counts until the loss is down to `ROUNDING`.
    """
    return {run: fit_loss_rate(rows["time"], rows["loss"]) for run, rows in _select_resolved(curves)}


def measure_late_rates(curves: Table) -> dict[tuple[int, int], tuple[float, float]]:
    """The mean of -d(log loss)/dt over the third quarter of training and over the last, by (seed, depth).

    Training counts as in `fit_rates`. Both are nan if a loss of the run is missing.
    """
    found = {}
    for run, rows in _select_resolved(curves):
        ends = np.array([0.5, 0.75, 1.0]) * rows["time"][-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            fallen = -np.diff(np.interp(ends, rows["time"], np.log(rows["loss"]))) / np.diff(ends)
        found[run] = tuple(fallen.tolist()) if np.isfinite(rows["loss"]).all() else (math.nan, math.nan)
    return found


def find_least_ratios(curves: Table) -> dict[tuple[int, int], float]:
    """The least PL ratio of training, as long as `fit_rates`, by (seed, depth)."""
    return {run: float(np.min(rows["ratio"])) for run, rows in _select_resolved(curves)}


def _divide_rates(third: float, fourth: float) -> float:
    # The last rate over the one before. A loss that does not fall in the end keeps nothing of its rate.
    return 0.0 if fourth <= 0 else fourth / third if third > 0 else math.nan


def judge_claims(read: Read) -> Iterator[Claim]:
    curves, ends = read("long_time"), read("long_time_limit")
    found, least, late = (made(curves) for made in (fit_rates, find_least_ratios, measure_late_rates))
    seeds, all_there = sorted({seed for seed, _ in found}), require_rows(curves, "seed", "depth", "iteration")
    falls = [rows["loss"][-1] / rows["loss"][0] for _, rows in _group_runs(curves)]
    kept = [_divide_rates(*both) for both in late.values()]
    lowest = min(least.values(), key=lambda ratio: -math.inf if math.isnan(ratio) else ratio)
    positive = math.nan if math.isnan(lowest) else math.inf if lowest > 0 else -math.inf
    margin = combine_margins(
        *(factor_below(fall, LOSS_FALLS) for fall in falls),
        *(factor_above(share, SUSTAINED) for share in kept),
        positive,
        all_there,
    )
    yield Claim(
        "The loss goes to 0 at a linear rate at least, at every depth",
        "Thm 6",
        f"{len(seeds)} seeds: falls to {np.max(falls):.1e} of its start or less; rate of the last quarter of training "
        f"at least {np.min(kept):.2f} times that of the quarter before; least PL ratio over t {lowest:.3f}",
        f"below 1/1000; at least {SUSTAINED:.2f} times (exponential: 1, exp(-c sqrt(t)): {ROOT:.2f}, any power of t: "
        f"{POWER:.2f}); above 0, at every depth and seed",
        f"least PL ratios [{lowest:.3f}, {np.max(list(least.values())):.3f}] over seeds and depths, rates of the "
        f"second half [{min(found.values()):.3f}, {max(found.values()):.3f}]",
        judge(margin),
        "long_time",
        margin,
    )
    by_seed = [[rate for (each, _), rate in found.items() if each == seed] for seed in seeds]
    # Of one depth, or of losses that do not fall, there is nothing to compare.
    by_seed = [one if len(one) > 1 and np.min(one) > 0 else [math.nan] for one in by_seed]
    spreads = [float(np.max(one) / np.min(one) - 1) for one in by_seed]
    margin = combine_margins(*(factor_below(spread, SAME_RATE) for spread in spreads), all_there)
    yield Claim(
        "The rate does not depend on L",
        "Thm 6; equality ours",
        f"{len(seeds)} seeds: rates differ by {100 * np.max(spreads):.2g} % at most over depths from "
        f"{min(d for d in ends['depth'] if d)} to infinity",
        f"within {100 * SAME_RATE:.0f} % for every seed",
        f"[{100 * np.min(spreads):.2g} %, {100 * np.max(spreads):.2g} %] over seeds",
        judge(margin),
        "long_time",
        margin,
    )
    finite = {name: column[ends["depth"] != LIMIT] for name, column in ends.items()}
    fits = [fit_over_seeds(finite, f"distance_{name}") for name in "VW"]
    statement = "Weights at the end of long training: (int |Z^L - Z|_F^2 ds)^(1/2), of V and of W, is O(1/L)"
    yield judge_rates(statement, "Thm 6" + RATE_OURS, "long_time", fits, -1.0, "larger slope in L")
    residuals = select(ends, depth=LIMIT)["residual"]
    all_there = require_rows(ends, "seed", "depth")
    margin = combine_margins(*(factor_below(residual, INTERPOLATES) for residual in residuals), all_there)
    yield Claim(
        "The neural ODE of the trained limit interpolates the data",
        "Thm 6",
        f"{len(seeds)} seeds: largest |F(x_i) - y_i| over i {np.max(residuals):.1e}",
        f"below {INTERPOLATES:g}",
        "",
        judge(margin),
        "long_time",
        margin,
    )
