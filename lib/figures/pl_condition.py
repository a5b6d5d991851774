"""The Polyak-Lojasiewicz condition over a grid of widths and targets: where it holds, and where it fails (Prop. 5)."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib import checks
from lib.dense import lojasiewicz
from lib.dense.network import NetworkConfig
from lib.dense.training import Record, train
from lib.digits import count_known_digits, round_significant
from lib.figures.claim import Claim, Read, combine_margins, factor_above, judge_margin, require_rows
from lib.figures.experiment import Progress, compute_runs, fit_loss_rate, silent
from lib.figures.results import Data
from lib.figures.style import BLUE, GREEN, GREY, VERMILION, draw_color_bar, make_panels, styled
from lib.tables import Table, from_rows, select

KEEPS = 0.5  # the share of mu(0) that mu(t) has to keep
DONE = 1e-6  # of the first loss: no plateau is left
NO_CONSTANT = 1e-10  # what is no constant but rounding
BORDERS = {":": "n-d", "--": "n"}  # the widths that lines are drawn at
BORDER = {"color": "black", "linewidth": 1.2}


@dataclass(frozen=True)
class Config:
    """Networks of every width in ``widths``, for targets of every size in ``target_scales``, with ``seeds`` draws of
    weights and data, consecutive seeds from the network's on.

    Each trains until `DONE`, or for ``iterations`` at most, with ``learning_rate``. It is looked at ``recorded`` times
    or fewer, at equal steps of log t. Raises ValueError unless A and B are trained, q >= d + d' and n > d, as Prop. 5
    has it.
    """

    network: NetworkConfig
    widths: list[int]
    target_scales: list[float]
    seeds: int
    iterations: int
    learning_rate: float = 0.03
    recorded: int = 40

    def __post_init__(self) -> None:
        checks.check_fields(self, "widths", "target_scales", "seeds", "iterations", "learning_rate", recorded=4)
        object.__setattr__(self, "target_scales", sorted(self.target_scales))
        network = self.network
        if not network.train_ends or network.hidden < network.dimension + network.outputs:
            raise ValueError(
                f"train_ends is {network.train_ends} and q is {network.hidden}, expected True and at least d + d' = "
                f"{network.dimension + network.outputs}, as in Prop. 5."
            )
        if network.samples <= network.dimension:
            raise ValueError(
                f"samples is {network.samples}, expected more than d = {network.dimension}: otherwise A and B alone "
                "can fit the data at any width."
            )

    @property
    def runs(self) -> list[tuple[int, float, int]]:
        """(width, target scale, seed) of every network."""
        seeds = [self.network.seed + k for k in range(self.seeds)]
        return list(itertools.product(self.widths, self.target_scales, seeds))

    @property
    def moments(self) -> list[int]:
        """The iterations that are looked at: 0, and then at equal steps of their logarithm."""
        return [0, *sorted({round(t) for t in np.geomspace(1, self.iterations, self.recorded - 1)})]


def compute(config: Config, progress: Progress = silent) -> Data:
    """The table of ``pl_condition.csv``, a row a run: columns width, target_scale, seed, samples, start and loss (the
    first loss and the last), iteration (the last), rate (of the loss, -d(log l)/dt over the second half of training),

    - ``ratio``: the smallest `lojasiewicz.ratio` over the recorded moments, ``when``, the share of training that was
      over then, and the shares ``of_A``, ``of_Z``, ``of_B`` in the squared gradient at that moment;
    - ``mu_start`` and ``mu``: the constant `lojasiewicz.constant` at t = 0, and its smallest value over the moments.
    """
    return {"pl_condition": from_rows(compute_runs(_measure_run, config, config.runs, progress))}


def _measure_run(config: Config, run: tuple[int, float, int]) -> dict[str, float]:
    width, scale, seed = run
    network = dataclasses.replace(config.network, width=width, target_scale=scale, seed=seed)
    points = list(_measure_points(config, network))
    least = min(points, key=lambda point: point["ratio"])
    end = points[-1]
    iterations, losses = [each["iteration"] for each in points], [each["loss"] for each in points]
    rate = fit_loss_rate(iterations, losses) / config.learning_rate
    return (
        {"width": width, "target_scale": scale, "seed": seed, "samples": network.samples}
        | {"start": points[0]["loss"], "loss": end["loss"], "iteration": end["iteration"]}
        | {"rate": round_significant(rate, 5)}
        | {"ratio": least["ratio"], "when": least["iteration"] / end["iteration"]}
        | {f"of_{name}": round_significant(least[name], 5) for name in "AZB"}
        | {"mu_start": points[0]["mu"], "mu": min(each["mu"] for each in points)}
    )


def _measure_points(config: Config, network: NetworkConfig) -> Iterator[dict[str, float]]:
    start = None
    for record in train(network, config.learning_rate, config.iterations, config.moments):
        yield _measure_point(network, record)
        start = start or record.loss
        if record.loss < DONE * start:
            return


def _measure_point(network: NetworkConfig, record: Record) -> dict[str, float]:
    mu = lojasiewicz.constant(network, record.weights, record.solver.data.x)
    point = {"iteration": record.iteration, "loss": round_significant(record.loss, count_known_digits(record.loss))}
    ratio = round_significant(lojasiewicz.ratio(record), max(2, count_known_digits(record.loss)))
    return (
        point
        | {"ratio": ratio, "mu": round_significant(mu, 6) if mu > NO_CONSTANT else 0.0}
        | lojasiewicz.shares(record)
    )


def take_medians(table: Table, column: str) -> np.ndarray:
    """The median over the seeds, by (target scale, width)."""
    scales, widths = np.unique(table["target_scale"]), np.unique(table["width"])
    return np.array([[np.median(select(table, target_scale=s, width=m)[column]) for m in widths] for s in scales])


def _compute_shares_kept(table: Table) -> np.ndarray:
    # The least of mu / mu(0) over time, of every network; 0 where mu(0) is.
    return np.divide(table["mu"], table["mu_start"], out=table["mu"] * 0.0, where=table["mu_start"] != 0)


def find_least_shares(table: Table) -> np.ndarray:
    """By (target scale, width), the least of mu / mu(0) over time and seeds; 0 where mu(0) is."""
    scales, widths = np.unique(table["target_scale"]), np.unique(table["width"])
    cells = ([_compute_shares_kept(select(table, target_scale=s, width=m)) for m in widths] for s in scales)
    return np.array([[np.min(shares) for shares in row] for row in cells])


@styled
def draw(data: Data, config: Config) -> Figure:
    """Heat maps over m/n and the size of the targets, medians over seeds: the smallest ratio along training, the
    smallest constant mu, the rate of the loss; then whose gradient the smallest ratio is, at the smallest targets.

    The red frame holds the cells in which mu keeps half of mu(0) in every seed; the lines are at m = n - d and m = n,
    as the legend says.
    """
    table = data["pl_condition"]
    figure, ((ratio, constant), (rate, parts)) = make_panels(2, 2, height=5.4)
    maps = (
        (ratio, "ratio", "smallest PL ratio, median over draws"),
        (constant, "mu", r"smallest PL constant $\mu$, median over draws"),
        (rate, "rate", r"rate $-\frac{d}{dt}\log\ell$, second half, median"),
    )
    for axes, column, title in maps:
        _draw_map(figure, axes, table, column, title, config.network.dimension)
    _draw_shares(parts, table)
    marks = [
        Line2D([], [], color=VERMILION, linewidth=2, label=rf"$\mu(t)\geq{KEEPS:g}\,\mu(0)>0$ for all $t$ and seeds"),
        *(Line2D([], [], **BORDER, linestyle=line, label=f"$m={word}$") for line, word in BORDERS.items()),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks))
    return figure


def _draw_map(figure: Figure, axes: Axes, table: Table, column: str, title: str, dimension: int) -> None:
    values = take_medians(table, column)
    scales, widths = np.unique(table["target_scale"]), np.unique(table["width"])
    samples = int(np.min(table["samples"]))
    shown = np.ma.masked_less_equal(np.nan_to_num(values), 0)
    if shown.count():
        mesh = axes.pcolormesh(shown, norm=LogNorm(shown.min(), shown.max()), edgecolor="white", linewidth=0.5)
        draw_color_bar(figure, mesh, axes, pad=0.02, aspect=22)
    for i, j in zip(*np.nonzero(np.ma.getmaskarray(shown)), strict=True):
        axes.text(j + 0.5, i + 0.5, "0", ha="center", va="center", fontsize=7, color=GREY)
    axes.set_xticks(np.arange(len(widths)) + 0.5, [f"{m / samples:.2g}" for m in widths])
    axes.set_yticks(np.arange(len(scales)) + 0.5, [f"{s:g}" for s in scales])
    inside = np.pad(find_least_shares(table) >= KEEPS, 1)
    for i, j in itertools.product(range(1, len(scales) + 1), range(1, len(widths) + 1)):
        x, y = j - 1, i - 1
        edges = (((x, x + 1), (y, y), inside[i - 1, j]), ((x, x + 1), (y + 1, y + 1), inside[i + 1, j]),
                 ((x, x), (y, y + 1), inside[i, j - 1]), ((x + 1, x + 1), (y, y + 1), inside[i, j + 1]))  # fmt: skip
        for xs, ys, neighbour in edges:
            if inside[i, j] and not neighbour:
                axes.plot(xs, ys, color=VERMILION, linewidth=2, zorder=3, clip_on=False, solid_capstyle="projecting")
    for width, line in zip((samples - dimension, samples), BORDERS, strict=True):
        axes.axvline(np.searchsorted(widths, width), linestyle=line, **BORDER)
    axes.set_xlabel("$m/n$")
    axes.set_ylabel("size of the targets")
    axes.set_title(title)


def _draw_shares(axes: Axes, table: Table) -> None:
    small = select(table, target_scale=min(table["target_scale"]))
    widths = np.unique(small["width"])
    below = np.zeros(len(widths))
    for name, color in (("A", BLUE), ("Z", VERMILION), ("B", GREEN)):
        share = np.array([np.mean(select(small, width=m)[f"of_{name}"]) for m in widths])
        axes.bar(np.arange(len(widths)) + 0.5, share, bottom=below, color=color, width=0.8, label=f"${name}$")
        below = below + share
    samples = int(np.min(table["samples"]))
    axes.set_xticks(np.arange(len(widths)) + 0.5, [f"{m / samples:.2g}" for m in widths])
    axes.set_xlabel("$m/n$")
    axes.set_ylabel("share of the left side")
    axes.set_title(f"whose gradient, targets of size {min(table['target_scale']):g}, mean")
    axes.set_ylim(0, 1.25)
    axes.legend(loc="upper center", ncols=3)


def judge_part(part: Table) -> float:
    """The margin of the criterion for the networks of a part of the table: mu keeps `KEEPS` of mu(0), which is not
    0."""
    return combine_margins(*(factor_above(share, KEEPS) for share in _compute_shares_kept(part)))


def select_wide(table: Table) -> Table:
    """The networks of m >= n."""
    wide = table["width"] >= table["samples"]
    return {name: column[wide] for name, column in table.items()}


def judge_claims(read: Read) -> Iterator[Claim]:
    """For widths m >= n and all sizes of the targets. The claim is open if a network has not trained to the end."""
    table = read("pl_condition")
    wide = select_wide(table)
    share, start = (
        float(np.min(values, initial=math.inf)) for values in (_compute_shares_kept(wide), wide["mu_start"])
    )
    left = float(np.max(wide["loss"] / wide["start"], initial=0.0))
    trained = math.inf if left <= DONE else math.nan
    margin = combine_margins(judge_part(wide), require_rows(table, "width", "target_scale", "seed"), trained)
    yield judge_margin(
        "m >= n: the PL constant mu(t), the least ratio over all residuals, stays above a positive mu",
        "Def. 1, Prop. 5",
        "pl_condition",
        margin,
        f"{len(np.unique(wide['seed']))} seeds: mu(t) at least {share:.2f} mu(0), mu(0) at least {start:.1e}; of the "
        f"loss at most {left:.0e} is left",
        f"at least {KEEPS:g} mu(0) > 0 at every t, width, size of the targets and seed, until at most {DONE:.0e} of "
        "the loss is left",
    )
