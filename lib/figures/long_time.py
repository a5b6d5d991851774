"""Training for long: the Polyak-Lojasiewicz condition and the rate of the loss (Def. 1, Prop. 5, Thm 6)."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from matplotlib.figure import Figure

from lib import checks
from lib.dense import limit, spectral
from lib.dense.limit import LIMIT
from lib.dense.network import NetworkConfig, hidden_states, initialise, outputs
from lib.dense.solver import squared_speed
from lib.dense.training import Record, lockstep, train
from lib.digits import LIMIT_DECIMALS, difference, known_digits, significant, square
from lib.figures.claim import Claim, Read, find_largest, fit_in_depth, judge, judge_rate
from lib.figures.experiment import Progress, evenly, largest_norm, mean_log_loss_rate, silent
from lib.figures.results import Data
from lib.figures.style import BLACK, COLORS, GREY, color_scale, depth_label, panels, styled
from lib.tables import from_rows, select

SAME_RATE = 0.1  # by how much of one rate of the loss another may differ
LEAST_RATIO = 1e-3  # what counts as a positive mu


@dataclass(frozen=True)
class Config:
    """Networks of several ``widths`` and ``seeds`` (at the network's depth), then of several ``depths`` (at its width).

    The former train for ``width_iterations``, the latter and the limit for ``iterations``, all with
    ``learning_rate``; losses and PL ratios are kept ``recorded`` times. ``tolerance``: see `limit.train`.
    """

    network: NetworkConfig
    widths: list[int]
    seeds: list[int]
    depths: list[int]
    width_iterations: int
    iterations: int
    learning_rate: float = 0.03
    recorded: int = 50
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        checks.make_plain(self)
        checks.positive_ints("widths", self.widths)
        checks.positive_ints("seeds", self.seeds, least=0)
        checks.positive_ints("depths", self.depths)
        checks.positive_int("width_iterations", self.width_iterations)
        checks.positive_int("iterations", self.iterations)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.positive_int("recorded", self.recorded, least=2)
        checks.positive_float("tolerance", self.tolerance)
        checks.positive_float("target_scale", self.network.target_scale)  # the ratio divides by the loss
        spectral.check_exists(self.network)


def polyak_lojasiewicz_ratio(record: Record | limit.LimitRecord) -> float:
    """(|dl/dA|^2 + L sum_k |dl/dZ_k|^2 + |dl/dB|^2) / l, which Def. 1 bounds below by mu; the same for the limit, whose
    middle term is an integral over s (`lib.dense.solver.squared_speed`)."""
    return squared_speed(record.solver) / record.loss


def _point(record: Record | limit.LimitRecord, learning_rate: float) -> dict[str, float]:
    # The ratio divides by the loss: it has no more digits, but two of them even next to where the loss is rounding.
    ratio = significant(polyak_lojasiewicz_ratio(record), max(2, known_digits(record.loss)))
    time = learning_rate * record.iteration
    return {"iteration": record.iteration, "time": time, "loss": square(record.loss), "ratio": ratio}


def by_width(config: Config, progress: Progress = silent) -> dict[str, list]:
    """PL ratios along training: columns width, seed, iteration, time, loss, ratio."""
    recorded = evenly(config.width_iterations, config.recorded)
    runs = [(width, seed) for width in config.widths for seed in config.seeds]
    rows = []
    for width, seed in progress(runs, len(runs)):
        network = dataclasses.replace(config.network, width=width, seed=seed)
        for record in train(network, config.learning_rate, config.width_iterations, recorded):
            rows.append({"width": width, "seed": seed, **_point(record, config.learning_rate)})
    return from_rows(rows)


def by_depth(config: Config, progress: Progress = silent) -> tuple[dict[str, list], ...]:
    """Three tables on the ``depths`` and the limit: training curves, the weights at the end, nearness to the limit.

    The first has columns depth, iteration, time, loss, ratio; the second depth, s, entry_V, entry_W (layer k at
    s = (k - 1/2)/L; those entries of V and of W that vary most over s in the limit); the third depth, distance_V,
    distance_W (integral norm), residual (the largest |F(x_i) - y_i|).
    """
    recorded = evenly(config.iterations, config.recorded)
    arguments = config.learning_rate, config.iterations, recorded
    trainings = [limit.train(config.network, *arguments, tolerance=config.tolerance)]
    trainings += [train(config.network.at_depth(depth), *arguments) for depth in config.depths]
    rows = []
    for records in progress(lockstep(trainings), len(recorded)):
        for depth, record in zip([LIMIT, *config.depths], records, strict=True):
            rows.append({"depth": depth, **_point(record, config.learning_rate)})
    ode = records[0].ode
    liveliest = [int(values.flatten(1).std(dim=0).argmax()) for values in (ode.weights.V, ode.weights.W)]
    weights, nearness = [], []
    _, data = initialise(config.network)
    for depth, record in zip([LIMIT, *config.depths], records, strict=True):
        if depth == LIMIT:
            s = torch.linspace(0, 1, 101, dtype=torch.float64)
            Z, distances, output = ode.weights_at(s), {"V": 0.0, "W": 0.0}, ode(data.x)
        else:
            s = (torch.arange(depth, dtype=torch.float64) + 0.5) / depth
            Z, distances = record.weights, ode.distance_to_network(record.weights)
            output = outputs(Z, hidden_states(config.network.at_depth(depth), Z, data.x))
        entries = [values.flatten(1)[:, entry].tolist() for values, entry in zip((Z.V, Z.W), liveliest, strict=True)]
        for position, V, W in zip(s.tolist(), *entries, strict=True):
            weights.append({"depth": depth, "s": position, "entry_V": difference(V), "entry_W": difference(W)})
        away = {f"distance_{name}": difference(distance, LIMIT_DECIMALS) for name, distance in distances.items()}
        nearness.append({"depth": depth, **away, "residual": difference(largest_norm(output - data.y))})
    return (
        from_rows(sorted(rows, key=lambda row: (row["depth"], row["iteration"]))),
        from_rows(weights),
        from_rows(nearness),
    )


def compute(config: Config, progress: Progress = silent) -> Data:
    """The tables of `by_width` and `by_depth`."""
    curves, weights, nearness = by_depth(config, progress)
    return {
        "long_time": by_width(config, progress),
        "long_time_depths": curves,
        "long_time_weights": weights,
        "long_time_limit": nearness,
    }


@styled
def draw(data: Data, config: Config) -> Figure:
    """PL ratios for several widths, then losses and final weights for several depths and the limit."""
    ratios, curves, weights = (data[name] for name in ("long_time", "long_time_depths", "long_time_weights"))
    samples = config.network.samples
    figure, ((along, least), (loss, final)) = panels(2, 2, height=4.8)
    widths, seeds = np.unique(ratios["width"]), np.unique(ratios["seed"])
    color, _ = color_scale(widths, log=True)
    for width in widths:
        rows = [select(ratios, width=width, seed=seed) for seed in seeds]
        middle = np.median([row["ratio"] for row in rows], axis=0)
        along.plot(rows[0]["time"], middle, color=color(width), label=f"$m={width}$")
        minima = [row["ratio"].min() for row in rows]
        least.plot([width] * len(minima), minima, "o", color=color(width))
    lowest = [np.median([select(ratios, width=width, seed=seed)["ratio"].min() for seed in seeds]) for width in widths]
    least.plot(widths, lowest, "-", color=GREY, zorder=0, label="median")
    least.axvline(samples, color=GREY, linestyle=":", linewidth=1)
    least.annotate("$m=n$", (samples, 0), (3, 3), xycoords=("data", "axes fraction"), textcoords="offset points")
    least.set_xscale("log", base=2)
    least.set_xlabel("width $m$")
    least.set_title("smallest PL ratio along training, a dot a seed")
    along.set_xlabel("training time $t$")
    along.set_title("PL ratio" + (", median over seeds" if len(seeds) > 1 else ""))
    along.legend(ncols=2, loc="best", labelspacing=0.25, handlelength=1.2)
    depths = np.unique(curves["depth"])
    for depth, hue, line in zip(depths, cycle((BLACK, *COLORS)), cycle(("-", "--", "-.", ":", "--")), strict=False):
        label, rows = depth_label(depth), select(curves, depth=depth)
        loss.plot(rows["time"], rows["loss"], line, color=hue, label=label, linewidth=1.6)
        rows = select(weights, depth=depth)
        if depth == LIMIT:
            final.plot(rows["s"], rows["entry_V"], color=hue, label=label)
        else:
            edges = np.linspace(0, 1, depth + 1)
            final.stairs(rows["entry_V"], edges, baseline=None, color=hue, label=label, linewidth=0.9)
    loss.set_xlabel("training time $t$")
    loss.set_title("loss")
    final.set_xlabel("$s=k/L$")
    final.set_title(f"one entry of $V$ at $t={curves['time'][-1]:.0f}$")
    for axes in (along, least, loss):
        axes.set_yscale("log")
    for axes in (loss, final):
        axes.legend(loc="best", labelspacing=0.25)
    return figure


def claims(read: Read) -> Iterator[Claim]:
    ratios = read("long_time")
    widths, seeds = np.unique(ratios["width"]), np.unique(ratios["seed"])
    paths_of = {width: [select(ratios, width=width, seed=seed)["ratio"] for seed in seeds] for width in widths}
    middle = int(np.median(widths))
    wide = [path for width in widths if width >= middle for path in paths_of[width]]
    least = [path.min() for path in wide]
    narrow = np.median([path.min() for path in paths_of[widths[0]]])
    yield Claim(
        "The PL ratio stays above a positive mu along training, for wide networks",
        "Def. 1, Prop. 5",
        f"smallest ratio along training {np.median(least):.3f} for m >= {middle}, {narrow:.3f} for m = {widths[0]} "
        "(medians)",
        f"at least {LEAST_RATIO}, and for no m >= {middle} reached in the second half of training",
        f"[{min(least):.3f}, {max(least):.3f}] over widths and seeds",
        judge(min(least) >= LEAST_RATIO and all(path.argmin() < len(path) / 2 for path in wide)),
        "long_time",
    )
    curves, ends = read("long_time_depths"), read("long_time_limit")
    rates, quarters, losses = [], [], []
    for depth in np.unique(curves["depth"]):
        rows = select(curves, depth=depth)
        by_time = {"iteration": rows["time"], "loss": rows["loss"]}
        rates.append(mean_log_loss_rate(by_time))
        third, fourth = (rows["time"] >= rows["time"][-1] * start for start in (0.5, 0.75))
        quarters.append([mean_log_loss_rate({name: column[part] for name, column in by_time.items()}, 1.0)
                         for part in (third & ~fourth, fourth)])  # fmt: skip
        losses.append(rows["loss"][-1] / rows["loss"][0])
    third, fourth = np.array(quarters).T
    yield Claim(
        "The loss goes to 0 at a linear rate",
        "Thm 6",
        f"falls to {max(losses):.1e} of its start; rate of the limit {third[0]:.3f} in the third quarter, "
        f"{fourth[0]:.3f} in the last",
        f"at every depth the two rates within {100 * SAME_RATE:.0f} % (of a power of t, the second is 29 % lower)",
        "",
        judge(bool(max(losses) < 1e-3 and (np.abs(fourth - third) < SAME_RATE * third).all())),
        "long_time",
    )
    spread = max(rates) / min(rates) - 1
    yield Claim(
        "The rate does not depend on L",
        "Thm 6",
        f"rates differ by {100 * spread:.1f} % over depths from {min(d for d in ends['depth'] if d)} to infinity",
        f"within {100 * SAME_RATE:.0f} %",
        f"[{min(rates):.4f}, {max(rates):.4f}]",
        judge(spread < SAME_RATE),
        "long_time",
    )
    finite = {name: column[ends["depth"] != LIMIT] for name, column in ends.items()}
    fit = find_largest(fit_in_depth(finite, f"distance_{name}", at_least=4) for name in "VW")
    yield judge_rate("The weights at the end of long training converge to the limit's", "Thm 6", "long_time", fit, -1.0)
    residual = select(ends, depth=LIMIT)["residual"][0]
    yield Claim(
        "The neural ODE of the trained limit interpolates the data",
        "Thm 6",
        f"largest |F(x_i) - y_i| {residual:.1e}",
        "below 0.01",
        "",
        judge(residual < 1e-2),
        "long_time",
    )
