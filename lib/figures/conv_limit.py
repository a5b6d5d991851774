"""Whether networks trained on CIFAR-10 converge as their depth grows. No theorem says so; it is measured here.

`lib.cifar.depth_limit` trains weight-tied networks of growing depth along the same flow, and measures the distance
between depths L and 2L. If this distance falls as L^-p with p > 0, the sum over doublings is finite. The networks then
converge, with an error of order L^-p. This says something about depth only where the distance is larger than what a
change of one last bit makes of it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib import checks
from lib.cifar import depth_table
from lib.cifar.depth_table import DOUBLE_DEPTH, KIND, KINDS, LAST_BIT, MEASURES
from lib.figures.claim import (
    BEYOND,
    OPEN,
    Claim,
    Read,
    factor_below,
    judge_margin,
    judge_rate,
)
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import (
    BLACK,
    GREY,
    draw_color_bar,
    make_color_scale,
    make_panels,
    set_depth_axis,
    styled,
    write_across,
)
from lib.rates import NO_SLOPE, Slope, fit_slope
from lib.tables import Table, from_rows, group, select, word

ROWS = {
    "weights_conv1": "weights of conv1,\n$L$ to $2L$",
    "hidden_states": "hidden states,\n$L$ to $2L$",
    "logits": "logits,\n$L$ to $2L$",
    "steepness": r"$L\,\max_k\,\|Z_{k+1}-Z_k\|_F$",
}
# Of `fit_slopes`. ``least`` and ``most`` are distances relative to those that a changed last bit makes.
COLUMNS = (*KIND, "epochs", "epoch", "measure", "seeds", "slope", "low", "high", "least", "most")
# A distance says something about depth if it is at least so many times the distance of the copy, which is one of the
# shallowest network.
ABOVE_ROUNDING = 3


@dataclass(frozen=True)
class Config:
    """The numbers of complete ``epochs`` after which distances are drawn, a line each."""

    epochs: list[int]

    def __post_init__(self) -> None:
        checks.check_fields(self, "epochs")


def compute(config: Config, progress: Progress = silent) -> Data:
    """The table ``checkpoints/depth_limit.csv``, and its slopes (`fit_slopes`)."""
    table = depth_table.read()
    return {"conv_limit": table, "conv_limit_slopes": fit_slopes(table)}


def select_kind(table: Table, kind: tuple[str, str, str]) -> dict[str, np.ndarray]:
    """The rows of one of `KINDS`."""
    return select(table, **dict(zip(KIND, kind, strict=True)))


def name_kind(activation: str, normalisation: str, stem_activation: str) -> str:
    """Networks in words: "GELU, batch norm, ReLU stem"."""
    norm = "no norm" if normalisation == "none" else f"{normalisation} norm"
    return f"{word(activation)}, {norm}, {word(stem_activation)} stem"


def _arrange_by_seed(rows: Table, measure: str) -> dict[int, dict[int, float]]:
    """{seed: {depth: value}} of the rows in which the measure is known and positive."""
    values = np.asarray(rows[measure], dtype=float)
    found: dict[int, dict[int, float]] = {}
    for seed, depth, value in zip(rows["seed"].tolist(), rows["depth"].tolist(), values.tolist(), strict=True):
        if math.isfinite(value) and value > 0:
            found.setdefault(seed, {})[depth] = value
    return found


def _average(runs: Table, measure: str) -> tuple[list[int], np.ndarray, np.ndarray, int]:
    """The depths of a measure, its geometric means over the seeds that have all of them, those of its multiples of the
    copy's distance over the seeds that have a copy (nan without one), and the number of seeds."""
    seeds = _arrange_by_seed(select(runs, compared_with=DOUBLE_DEPTH), measure)
    depths = sorted(set().union(*seeds.values()))
    copied = select(runs, compared_with=LAST_BIT, depth=min(depths, default=0))
    copies = _arrange_by_seed(copied, measure) if measure in MEASURES else {}
    complete = {seed: values for seed, values in seeds.items() if len(values) == len(depths)}
    logs = {seed: np.log([values[L] for L in depths]) for seed, values in complete.items()}
    beside = [values - math.log(copies[seed][depths[0]]) for seed, values in logs.items() if seed in copies]
    unknown = np.full(len(depths), math.nan)
    values = np.exp(np.mean(list(logs.values()), axis=0)) if logs else unknown
    return depths, values, np.exp(np.mean(beside, axis=0)) if beside else unknown, len(logs)


def fit_slopes(table: Table) -> dict[str, list]:
    """The slope in L of every measure, for each kind of network and epoch, fitted to geometric means over the seeds.

    The columns are `COLUMNS`. ``low`` and ``high`` bound the 95 % interval of the fit (nan with two depths). Seeds
    that lack a depth are left out.
    """
    rows = []
    for kind in KINDS:
        for (epochs, epoch), runs in sorted(group(select_kind(table, kind), "epochs", "epoch").items()):
            for measure in (*MEASURES, "steepness"):
                depths, values, multiples, seeds = _average(runs, measure)
                fit = fit_slope(depths, values) if seeds and len(depths) > 1 else NO_SLOPE
                bounds = (multiples.min(), multiples.max()) if len(depths) else 2 * (math.nan,)
                found = (*kind, int(epochs), int(epoch), measure, seeds, fit.slope, fit.low, fit.high, *bounds)
                rows.append(dict(zip(COLUMNS, found, strict=True)))
    return from_rows(rows, COLUMNS)


@styled
def draw(data: Data, config: Config) -> Figure:
    """Distances between depths L and 2L, and L times the largest successive distance, against L after several epochs.
    There is a column for each kind of network that is trained, and a line and a cross for each epoch and seed."""
    table, epochs = data["conv_limit"], config.epochs
    runs = {kind: select_kind(table, kind) for kind in KINDS}
    kinds = [kind for kind in KINDS if np.isin(runs[kind]["epoch"], epochs).any()]
    figure, axes = make_panels(max(len(kinds), 1), len(ROWS), height=7.8, sharex=True, sharey="row", squeeze=False)
    color, mappable = make_color_scale(epochs)
    for column, kind in zip(axes.T, kinds, strict=bool(kinds)):
        for panel, measure in zip(column, ROWS, strict=True):
            _draw_lines(panel, runs[kind], measure, epochs, color)
        column[0].set_title(name_kind(*kind).replace(", ", "\n"))
        column[-1].set_xlabel("depth $L$")
    for panel, label in zip(axes[:, 0], ROWS.values(), strict=True):
        panel.set(ylabel=label, yscale="log")
    if kinds:
        depths = np.unique(table["depth"])
        set_depth_axis(axes[-1, 0], depths)
        axes[-1, 0].set_xticks([depths[0] / 2, *depths], ["copy", *depths])
        axes[-1, 0].set_xlim(left=0.4 * depths[0])
    else:
        write_across(axes[0, 0], "no network is measured after these epochs", color=GREY)
    place = {"location": "bottom", "pad": 0.01, "aspect": 50}
    draw_color_bar(figure, mappable, axes, "epochs complete", ticks=list(epochs), **place)
    figure.legend(
        handles=[
            Line2D([], [], color=GREY, linestyle="--", linewidth=1, label="$1/L$"),
            Line2D([], [], color=BLACK, marker="x", linestyle="", label="copy with one last bit changed"),
        ],
        loc="outside upper right",
        ncols=2,
    )
    return figure


def _draw_lines(panel: Axes, runs: Table, measure: str, epochs: Sequence[int], color) -> None:
    drawn = sorted(set(epochs) & set(runs["epoch"].tolist()))
    for epoch in drawn:
        now = select(runs, epoch=epoch)
        for values in _arrange_by_seed(select(now, compared_with=DOUBLE_DEPTH), measure).values():
            panel.plot(list(values), list(values.values()), "o-", color=color(epoch), markersize=3, linewidth=1)
        copies = _arrange_by_seed(select(now, compared_with=LAST_BIT), measure) if measure in MEASURES else {}
        for values in copies.values():
            panel.plot(np.array(list(values)) / 2, list(values.values()), "x", color=color(epoch), markersize=5)
    depths, values, _, seeds = _average(select(runs, epoch=drawn[-1]), measure)
    if measure in MEASURES and seeds:  # 1/L, to compare with the last epoch
        guide = 1.5 * values[0] * depths[0] / np.array(depths)
        panel.plot(depths, guide, "--", color=GREY, linewidth=1, zorder=0)


CLAIMED = (  # measure, its name in words, its norm
    ("weights_conv1", "weights of conv1", "(int |Z^L - Z^2L|_F^2 ds)^(1/2) over the size of Z^2L"),
    ("logits", "logits", "root mean square over test images and classes, over the size of those of depth 2L"),
)


def judge_claims(read: Read) -> Iterator[Claim]:
    """With a GELU in the stem, networks converge as their depth grows; this is open where rounding hides it. With a
    ReLU in the stem, differences of depth are no larger than rounding. Both are open before the schedule ends."""
    rates = read("conv_limit_slopes")
    for kind in KINDS:
        rows = select_kind(rates, kind)
        if not len(rows["epoch"]):
            continue
        rows = select(rows, epochs=max(rows["epochs"]))
        last = select(rows, epoch=max(rows["epoch"]))
        for measure, words, norm in CLAIMED:
            yield _judge_distances(kind, select(last, measure=measure), words, norm)
        steepness = select(last, measure="steepness")
        statement = f"CIFAR-10, {name_kind(*kind)}: L max_k |Z_(k+1) - Z_k|_F stays bounded as L grows"
        yield _judge_slope(statement, steepness, 0.0, _count_runs(steepness))


def _judge_distances(kind: tuple[str, str, str], row: Table, words: str, norm: str) -> Claim:
    least, most = row["least"][0], row["most"][0]
    known = math.isfinite(least)
    multiple = f"{least:.3g} to {most:.3g} times as large as" if known else "not compared with the distance"
    measured = f"{norm}, {_count_runs(row)}: {multiple} after a change of one last bit"
    if kind[-1] == "relu":
        claim = judge_margin(
            f"CIFAR-10, {name_kind(*kind)}: {words} of depths L and 2L are as near as rounding allows",
            BEYOND,
            "conv_limit",
            factor_below(most, ABOVE_ROUNDING),
            measured,
            f"at most {ABOVE_ROUNDING} times",
        )
        return _open_unless(_is_finished(row), claim)
    statement = f"CIFAR-10, {name_kind(*kind)}: {words} of depths L and 2L come together as 1/L"
    claim = _judge_slope(statement, row, -1.0, measured)
    return _open_unless(least >= ABOVE_ROUNDING, claim)


def _judge_slope(statement: str, row: Table, expected: float, measured: str) -> Claim:
    fit = Slope(*(float(row[name][0]) for name in ("slope", "low", "high")), constant=math.nan)
    claim = judge_rate(statement, BEYOND, "conv_limit", fit, expected, f"{measured}, slope in L")
    claim = replace(claim, interval=f"fit [{fit.low:.3f}, {fit.high:.3f}]")  # the fit is to means over the runs
    return _open_unless(_is_finished(row), claim)


def _is_finished(row: Table) -> bool:
    return row["epoch"][0] == row["epochs"][0]


def _open_unless(condition: bool, claim: Claim) -> Claim:
    return claim if condition else replace(claim, verdict=OPEN)


def _count_runs(row: Table) -> str:
    seeds, epoch, epochs = (row[name][0] for name in ("seeds", "epoch", "epochs"))
    return f"{seeds} run{'' if seeds == 1 else 's'}, after epoch {epoch} of {epochs}"
