"""Whether networks trained on CIFAR-10 converge as their depth grows. No theorem says so; it is measured here.

`lib.cifar.depth_limit` trains weight-tied networks of growing depth along the same flow, and measures the distance
between depths L and 2L. If this distance falls as L^-p with p > 0, the sum over doublings is finite. The networks then
converge, with an error of order L^-p.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import checks
from lib.cifar import depth_limit
from lib.cifar.depth_limit import MEASURES
from lib.figures.claim import BEYOND, Claim, Read, combine_margins, judge_margin
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import GREY, draw_color_bar, make_color_scale, make_panels, set_depth_axis, styled, write_across
from lib.measures import NO_SLOPE, fit_slope
from lib.tables import Table, from_rows, select, word

FAMILIES = (("gelu", "batch"), ("gelu", "none"), ("gelu", "group"), ("relu", "batch"))
ROWS = {
    "weights_conv1": "weights of conv1",
    "hidden_states": "hidden states",
    "logits": "logits",
    "steepness": r"$L\,\max_k\,\|Z_{k+1}-Z_k\|_F$",
}
COLUMNS = ("activation", "normalisation", "epoch", "measure", "seeds", "slope", "low", "high")  # of `fit_slopes`
CONVERGES = 0.5  # the exponent p from which on distances count as falling with the depth


@dataclass(frozen=True)
class Config:
    """The numbers of complete ``epochs`` after which distances are drawn, a line each."""

    epochs: list[int]

    def __post_init__(self) -> None:
        checks.check_fields(self, "epochs")


def compute(config: Config, progress: Progress = silent) -> Data:
    """The table ``checkpoints/depth_limit.csv``, and its slopes (`fit_slopes`)."""
    table = depth_limit.read()
    return {"conv_limit": table, "conv_limit_slopes": fit_slopes(table)}


def name_family(activation: str, normalisation: str) -> str:
    """A family in words: "GELU, batch norm"."""
    return f"{word(activation)}, {'no norm' if normalisation == 'none' else f'{normalisation} norm'}"


def describe_missing(activation: str, normalisation: str) -> str:
    """The sentence for a family without rows."""
    return f"{name_family(activation, normalisation)}: not trained yet, `make train-depths` does it."


def _compute_means(table: Table, measure: str, **chosen) -> tuple[np.ndarray, np.ndarray]:
    """The depths at which a measure is known and positive, and its geometric means over the seeds."""
    rows = select(table, **chosen)
    values = np.asarray(rows[measure], dtype=float)
    known = np.isfinite(values) & (values > 0)
    depths = np.unique(rows["depth"][known])
    return depths, np.array([np.exp(np.log(values[known & (rows["depth"] == L)]).mean()) for L in depths])


def fit_slopes(table: Table) -> dict[str, list]:
    """The slope in L of every measure, for each family and epoch, fitted to geometric means over the seeds.

    The columns are `COLUMNS`. ``low`` and ``high`` bound the 95 % interval of the fit (nan with two depths).
    """
    rows = []
    for activation, normalisation in FAMILIES:
        family = {"activation": activation, "normalisation": normalisation}
        runs = select(table, **family)
        for epoch in np.unique(runs["epoch"]).astype(int):
            for measure in (*MEASURES, "steepness"):
                depths, values = _compute_means(runs, measure, epoch=epoch)
                fit = fit_slope(depths, values) if len(depths) > 1 else NO_SLOPE
                seeds = len(np.unique(select(runs, epoch=epoch)["seed"]))
                values = (int(epoch), measure, seeds, fit.slope, fit.low, fit.high)
                rows.append(family | dict(zip(COLUMNS[2:], values, strict=True)))
    return from_rows(rows, COLUMNS)


def find_last_converging_epoch(rates: Table, activation: str, normalisation: str, measure: str) -> int:
    """The last epoch up to which the slope is always at most -1/2 (`CONVERGES`); 0 if it is not at the first epoch."""
    rows = select(rates, activation=activation, normalisation=normalisation, measure=measure)
    last = 0
    for epoch, slope in zip(rows["epoch"], rows["slope"], strict=True):
        if not slope <= -CONVERGES:
            break
        last = int(epoch)
    return last


@styled
def draw(data: Data, config: Config) -> Figure:
    """Distances between depths L and 2L, and L times the largest successive distance, against L after several epochs.
    There is a column for each family, and a line for each epoch and seed."""
    table, epochs = data["conv_limit"], config.epochs
    figure, axes = make_panels(len(FAMILIES), len(ROWS), height=7.6, sharex=True, sharey="row")
    color, mappable = make_color_scale(epochs)
    for column, (activation, normalisation) in zip(axes.T, FAMILIES, strict=True):
        runs = select(table, activation=activation, normalisation=normalisation)
        for panel, measure in zip(column, ROWS, strict=True):
            _draw_lines(panel, runs, measure, epochs, color)
        column[0].set_title(name_family(activation, normalisation))
        column[-1].set_xlabel("depth $L$")
    for panel, label in zip(axes[:, 0], ROWS.values(), strict=True):
        panel.set(ylabel=label, yscale="log")
    if len(table["depth"]):
        set_depth_axis(axes[-1, 0], np.unique(table["depth"]))
        axes[-1, 0].set_xticks(np.unique(table["depth"]), np.unique(table["depth"]))
    place = {"location": "bottom", "pad": 0.01, "aspect": 50}
    draw_color_bar(figure, mappable, axes, "epochs complete", ticks=list(epochs), **place)
    return figure


def _draw_lines(panel: Axes, runs: Table, measure: str, epochs: Sequence[int], color) -> None:
    for epoch in epochs:
        for seed in np.unique(runs["seed"]):
            depths, values = _compute_means(runs, measure, epoch=epoch, seed=seed)
            if len(depths):
                panel.plot(depths, values, "o-", color=color(epoch), markersize=3, linewidth=1)
    if not panel.lines:
        write_across(panel, "not trained yet", color=GREY)
        panel.set_axis_off()
    elif measure != "steepness":  # 1/L, to compare with
        depths, values = _compute_means(runs, measure, epoch=max(set(epochs) & set(runs["epoch"].tolist())))
        panel.plot(depths, 1.5 * values[0] * depths[0] / depths, "--", color=GREY, linewidth=1, zorder=0)


CLAIMED = (  # measure, its name in words, its norm
    ("weights_conv1", "weights of conv1", "(int |Z^L - Z^2L|_F^2 ds)^(1/2) over the size of Z^2L"),
    ("logits", "logits", "root mean square over test images and classes, over the size of those of depth 2L"),
)


def judge_claims(read: Read) -> Iterator[Claim]:
    """Trained convolutional networks converge. A family is judged if it has been trained."""
    rates = read("conv_limit_slopes")
    for activation, normalisation in FAMILIES:
        for measure, words, norm in CLAIMED:
            rows = select(rates, activation=activation, normalisation=normalisation, measure=measure)
            if not len(rows["epoch"]):
                continue
            family = name_family(activation, normalisation)
            last, end = find_last_converging_epoch(rates, activation, normalisation, measure), rows["epoch"][-1]
            slope, low, high = (rows[name][-1] for name in ("slope", "low", "high"))
            margin = combine_margins(*(-CONVERGES - each for each in rows["slope"]))
            seeds = rows["seeds"][-1]
            measured = f"{seeds} run{'' if seeds == 1 else 's'}, slope in L {slope:.2f} after {end} epochs"
            yield judge_margin(
                f"CIFAR-10, {family}: {words} of depths L and 2L come together, {norm}",
                BEYOND,
                "conv_limit",
                margin,
                f"{measured}; at most -{CONVERGES:g} up to epoch {last}",
                f"slope at most -{CONVERGES:g} after every epoch",
                f"[{low:.2f}, {high:.2f}]",
                **{"slope": slope, "low": low, "high": high, "at_most": -CONVERGES},
            )
