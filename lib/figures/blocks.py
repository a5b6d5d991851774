"""Residual blocks of all kinds: which stay samples of a Lipschitz function of depth while they train, and how long."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from lib import checks
from lib.blocks.catalogue import BLOCKS, make_block
from lib.blocks.distances import successive_distances
from lib.blocks.training import gaussian_data
from lib.figures.experiment import Progress, compute_runs, silent
from lib.figures.results import Data
from lib.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    TEXT_WIDTH,
    VERMILION,
    draw_rate_line,
    set_depth_axis,
    set_plain_ticks,
    styled,
)
from lib.rates import fit_slope, mean_interval
from lib.tables import Table, from_rows, rows, select, word

WITHIN = 0.1  # how far from -1 a slope may lie
NO_ACTIVATION = "none"


@dataclass(frozen=True)
class Config:
    """Networks of several ``blocks`` on board, with every one of ``activations``, at several ``depths`` and ``seeds``.

    A block is named as in `lib.blocks.catalogue.BLOCKS`, with a norm after a comma, as in "convolution, batch norm".
    ``iterations`` lists the training times that are looked at, in steps of ``learning_rate`` (times L for the layers).
    A seed draws the block and its Gaussian data. ``slope_from``: the smallest depth that slopes are fitted over.
    """

    blocks: list[str]
    activations: list[str]
    depths: list[int]
    seeds: list[int]
    iterations: list[int]
    learning_rate: float = 0.2
    slope_from: int = 8

    def __post_init__(self) -> None:
        # The first step leaves layers equal.
        checks.check_fields(self, "learning_rate", depths=2, seeds=0, iterations=2)
        for name in ("blocks", "activations"):
            checks.distinct_texts(name, getattr(self, name))
        for block in self.blocks:
            for activation in self.activations:
                make_factory(block, activation)
        checks.slope_range(self.slope_from, self.depths)

    @property
    def cases(self) -> list[tuple[str, str]]:
        """Each block with each activation that it can have."""
        return [
            (block, activation)
            for block in self.blocks
            for activation in (self.activations if _find_kind(block).activated else [NO_ACTIVATION])
        ]


def _find_kind(block: str):
    return BLOCKS[block.partition(", ")[0]]


def make_factory(block: str, activation: str) -> partial:
    """What makes the block of that name, such as "convolution, batch norm", with that activation."""
    name, _, norm = block.partition(", ")
    return make_block(name, activation, norm.removesuffix(" norm") or "none")


def compute(config: Config, progress: Progress = silent) -> Data:
    """The table of ``blocks.csv``: for each block, activation, seed, depth and entry of ``iterations``, the columns of
    `lib.blocks.successive_distances`, and the training ``time`` t, which is the step times the learning rate."""
    runs = [(seed, *case) for seed in config.seeds for case in config.cases]
    return {"blocks": from_rows(row for part in compute_runs(_train, config, runs, progress) for row in part)}


def _train(config: Config, run: tuple[int, str, str]) -> list[dict]:
    seed, block, activation = run
    x, y = gaussian_data(_find_kind(block).shape, seed)
    table = successive_distances(
        make_factory(block, "gelu" if activation == NO_ACTIVATION else activation),
        config.depths,
        x,
        y,
        iterations=config.iterations[-1],
        learning_rate=config.learning_rate,
        record_at=config.iterations,
        seed=seed,
    )
    case = {"block": block, "activation": activation, "seed": seed}
    return [case | {"time": float(f"{row['step'] * config.learning_rate:.12g}")} | row for row in rows(table)]


def fit_slopes(table: Table, slope_from: int) -> dict[str, list]:
    """For each block, activation and time: the slope in L of ``max_distance``, its mean over seeds with a 95 % interval
    (Student's t; nan with one seed), the mean slope of ``to_double`` (over all depths that have their double; nan if
    there is one alone), and the medians of ``loss``, ``moved`` and ``from_linear`` at the largest depth."""
    found = []
    for block, activation, time in _list_cases(table):
        of_case = select(table, block=block, activation=activation, time=time)
        runs = [select(of_case, seed=seed) for seed in np.unique(of_case["seed"])]
        fits = [fit_slope(run["depth"], run["max_distance"], slope_from).slope for run in runs]
        doubles = [fit_slope(run["depth"], run["to_double"]).slope for run in runs if (run["to_double"] > 0).sum() > 1]
        low, high = mean_interval(fits)
        deepest = select(of_case, depth=max(of_case["depth"]))
        case = {"block": block, "activation": activation, "time": float(time)}
        case |= {"slope": float(np.mean(fits)), "low": low, "high": high}
        case["slope_to_double"] = float(np.mean(doubles)) if doubles else math.nan
        found.append(case | {name: float(np.median(deepest[name])) for name in ("loss", "moved", "from_linear")})
    return from_rows(found)


def _name_activation(activation: str) -> str:
    return "no activation" if activation == NO_ACTIVATION else word(activation)


def _list_cases(table: Table) -> Iterator[tuple[str, str, float]]:
    keys = zip(table["block"], table["activation"], table["time"], strict=True)
    return iter(dict.fromkeys((str(block), str(activation), float(time)) for block, activation, time in keys))


def format_slopes(table: Table, slope_from: int) -> list[str]:
    """The slopes as lines of a table, one for each block, activation and time, below a line that names the columns."""
    line = "{:24} {:13} {:>5} {:>6}  {:15} {:>8} {:>6} {:>6} {:>12}"
    lines = [line.format("block", "activation", "t", "slope", "interval", "L to 2L", "loss", "moved", "from linear")]
    for row in rows(fit_slopes(table, slope_from)):
        numbers = (f"{row[name]:.2f}" for name in ("slope_to_double", "loss", "moved", "from_linear"))
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
        case = row["block"], _name_activation(row["activation"]), f"{row['time']:g}"
        lines.append(line.format(*case, f"{row['slope']:.2f}", interval, *numbers))
    return lines


def conclude(table: Table, slope_from: int) -> str:
    """What the table says, in a sentence: the slopes at the first and the last training time, and how many of them are
    near -1, of blocks with a smooth activation or none, and of those with ReLU."""
    fits = fit_slopes(table, slope_from)
    activations, times, found_slopes = (np.array(fits[name]) for name in ("activation", "time", "slope"))
    relu = activations == "relu"
    parts = []
    for kind, chosen in (("smooth blocks", ~relu), ("ReLU", relu)):
        found = []
        for time in dict.fromkeys((times.min(), times.max())):
            at = found_slopes[chosen & (times == time)]
            near = (np.abs(at + 1) <= WITHIN).sum()
            found += [f"{min(at):.2f} to {max(at):.2f} at t = {time:g} ({near} of {len(at)})"] if len(at) else []
        parts += [f"with {kind} {' and '.join(found)}"] if found else []
    return f"Slopes in L (in brackets, how many are within {WITHIN} of -1): {'; '.join(parts)}."


# --- The picture ------------------------------------------------------------------------------------------------------

HUES = {
    "gelu": BLUE,
    "relu": VERMILION,
    "silu": GREEN,
    "tanh": PURPLE,
    NO_ACTIVATION: BLACK,
}


@styled
def draw(data: Data, config: Config) -> Figure:
    """Left, the slope of every block at the first and at the last training time, with its interval over seeds. Right,
    for the first and the last block, the largest successive distance at the first time and the distance to the network
    twice as deep at the last one, medians over seeds."""
    table, slope_from = data["blocks"], config.slope_from
    fits = fit_slopes(table, slope_from)
    blocks, times = list(dict.fromkeys(fits["block"])), np.unique(fits["time"])
    figure = Figure(figsize=(TEXT_WIDTH, 4.6), layout="constrained")
    axes = figure.subplot_mosaic([["slope", "layers"], ["slope", "double"]], width_ratios=[1.2, 1])
    _draw_slopes(axes["slope"], fits, blocks, times)
    columns = {
        "layers": ("max_distance", times[0], rf"$\max_{{k,\,t\leq {times[0]:g}}}\,\|Z_{{k+1}}(t)-Z_k(t)\|_F$"),
        "double": ("to_double", times[-1], rf"$\|Z^{{L}}-Z^{{2L}}\|$ at $t={times[-1]:g}$"),
    }
    shown = dict(zip(dict.fromkeys((blocks[0], blocks[-1])), (("o", "-"), ("s", "--")), strict=False))
    for name, (column, time, title) in columns.items():
        for block, (marker, line) in shown.items():
            for activation in dict.fromkeys(select(table, block=block)["activation"]):
                depths, middle = _take_medians(select(table, block=block, activation=activation, time=time), column)
                axes[name].plot(depths, middle, marker=marker, linestyle=line, color=HUES[activation])
                fitted = depths[depths >= slope_from]
                if block == blocks[0] and activation != "relu" and len(fitted) > 1:
                    draw_rate_line(axes[name], depths, fit_slope(depths, middle, slope_from), -1.0)
        set_depth_axis(axes[name], np.unique(table["depth"]))
        axes[name].set_yscale("log")
        axes[name].yaxis.set_minor_formatter(NullFormatter())
        if np.ptp(np.log10(axes[name].get_ylim())) < 1.5:
            set_plain_ticks(axes[name].yaxis)
        axes[name].set_title(title)
    for activation in dict.fromkeys(fits["activation"]):
        axes["layers"].plot([], [], color=HUES[activation], label=_name_activation(activation))
    for block, (marker, line) in shown.items():
        axes["layers"].plot([], [], marker=marker, linestyle=line, color=GREY, label=f"right: {block}")
    for time, fill in zip(dict.fromkeys((times[0], times[-1])), ("white", GREY), strict=False):
        style = {"marker": "o", "linestyle": "", "color": GREY, "markerfacecolor": fill}
        axes["layers"].plot([], [], label=f"left: slope at $t={time:g}$", **style)
    axes["layers"].plot([], [], "--", color=GREY, linewidth=1, label="slope $-1$")
    figure.legend(*axes["layers"].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _draw_slopes(axes: Axes, fits: Table, blocks: list[str], times: np.ndarray) -> None:
    for row, block in enumerate(blocks):
        activations = list(dict.fromkeys(select(fits, block=block)["activation"]))
        for number, activation in enumerate(activations):
            place = -row - 0.26 * (number - (len(activations) - 1) / 2)
            at = [select(fits, block=block, activation=activation, time=time) for time in (times[0], times[-1])]
            axes.plot([each["slope"][0] for each in at], [place] * 2, color=HUES[activation], linewidth=0.7, alpha=0.5)
            for each, fill in zip(at, ("white", HUES[activation]), strict=True):
                reach = np.abs([each["low"] - each["slope"], each["high"] - each["slope"]])
                style = {"color": HUES[activation], "markerfacecolor": fill, "capsize": 1.5, "linewidth": 1}
                axes.errorbar(each["slope"], [place], xerr=np.nan_to_num(reach), fmt="o", **style)
    axes.axvline(-1, color=GREY, linestyle="--", linewidth=1, zorder=0)
    axes.axvline(0, color="#B8B8B8", linewidth=1, zorder=0)
    axes.set_yticks(-np.arange(len(blocks)), [block.replace(", ", ",\n") for block in blocks])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-len(blocks) + 0.45, 0.55)
    axes.set_title("slope in $L$ of the largest successive distance")


def _take_medians(rows: Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The depths at which the column is a number, and its median over seeds at each."""
    depths = np.unique(rows["depth"][np.isfinite(rows[column])])
    return depths, np.array([np.median(select(rows, depth=depth)[column]) for depth in depths])
