"""The paper's claims, one in each row. The room of a figure judges its claims from the figure's tables."""

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lib import checks, paths, tables
from lib.figures import (
    bounds,
    clipping,
    conv_limit,
    figure_1_left,
    figure_2,
    figure_3,
    figure_4,
    initialisation,
    long_time,
    mean_limit,
    neural_ode,
    pl_condition,
    relu_counterexample,
    table_1,
)
from lib.figures.claim import BEYOND, FAILS, HOLDS, OPEN, Claim
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import BLACK, BLUE, GREY, VERMILION, make_panels, styled
from lib.tables import Table, from_rows

# The rooms that judge claims: first the theorems, then the networks trained on CIFAR-10, then results beyond the paper.
ROOMS = (
    neural_ode,
    figure_1_left,
    clipping,
    pl_condition,
    bounds,
    long_time,
    figure_2,
    initialisation,
    relu_counterexample,
    figure_3,
    table_1,
    figure_4,
    mean_limit,
    conv_limit,
)


@dataclass(frozen=True)
class Config:
    """The tables of this ``profile`` are judged. Raises ValueError if it does not have every figure in `ROOMS`."""

    profile: str = "paper"

    def __post_init__(self) -> None:
        judged = {room.__name__.rpartition(".")[2] for room in ROOMS}
        having = [each.name for each in sorted(paths.PROFILES.iterdir()) if each.is_dir()]
        whole = [name for name in having if judged <= {file.stem for file in (paths.PROFILES / name).glob("*.yaml")}]
        checks.choice("profile", self.profile, ["quick", *whole])


def compute(config: Config, progress: Progress = silent) -> Data:
    """The table of ``claims.csv``: a row for each `Claim`."""
    return {"claims": from_rows(asdict(claim) for claim in judge_all(config.profile))}


WORDS = ("statement", "where", "measured", "criterion", "interval", "verdict", "figure")


def make_readable(data: Data) -> dict[str, list]:
    """The columns for readers."""
    return {name: data["claims"][name] for name in WORDS}


def find_folder(profile: str) -> Path:
    """The folder of a profile's tables: ``figures`` for "paper", ``figures/<profile>`` for every other."""
    return paths.FIGURES if profile == "paper" else paths.FIGURES / profile


def read_table(profile: str, name: str) -> dict[str, np.ndarray]:
    """The table ``<name>.csv`` of a profile. Raises FileNotFoundError, with the command that makes the table."""
    path = find_folder(profile) / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{paths.shorten(path)} is missing: `make figures PROFILE={profile}` makes it.")
    return tables.read_csv(path)


def judge_all(profile: str = "paper") -> list[Claim]:
    """Judge every claim from the tables of ``profile``. Returns them in the order of the paper's statements.

    Raises ValueError if the profile does not have these figures, FileNotFoundError if a figure is not made yet.
    """
    Config(profile)
    found = [claim for room in ROOMS for claim in room.judge_claims(partial(read_table, profile))]
    order = ["Prop. 2", "Prop. 3", "Thm 4", "Def. 1", "Thm 6", "section 4.3", "App. D"]
    order += ["Fig. 3", "Table 1", "Appendix", BEYOND]
    return sorted(found, key=lambda claim: next(i for i, name in enumerate(order) if claim.where.startswith(name)))


VERDICT_STYLES = {
    HOLDS: {"color": BLUE},
    OPEN: {"color": GREY, "markerfacecolor": "white"},
    FAILS: {"color": VERMILION, "marker": "D"},
}
FARTHEST = 3.0  # the largest distance to the criterion that is drawn, in powers of ten


def order_rows(table: Table) -> np.ndarray:
    """The indices of the rows in the order of the picture: failing claims, then open ones, then all others."""
    rank = [[FAILS, OPEN, HOLDS].index(verdict) for verdict in table["verdict"]]
    return np.argsort(rank, kind="stable")


def _compute_margins(low: float, high: float, at_least: float, at_most: float) -> tuple[float, float]:
    # The least and the largest distance of an interval to the bounds. Between two bounds it is largest in the middle.
    middle = (at_most + at_least) / 2
    points = [low, high, *([middle] if low < middle < high else [])]
    margins = [float(np.min([at_most - point, point - at_least])) for point in points]
    return min(margins), max(margins)


@styled
def draw(data: Data, config: Config) -> Figure:
    """Every claim with its distance to the criterion. For slopes in L this is a difference, with the 95 % interval over
    the seeds and, pale, the interval of the fit. For everything else it is in powers of ten, at most `FARTHEST`."""
    table = {name: np.asarray(column)[order_rows(data["claims"])] for name, column in data["claims"].items()}
    count = len(table["verdict"])
    figure, (slopes, factors) = make_panels(2, height=0.8 + 0.165 * count, width=10.5, width_ratios=[1, 1])
    places = np.arange(count)[::-1]
    at_most, slope, at_least = (np.asarray(table[name], dtype=float) for name in ("at_most", "slope", "at_least"))
    for row, place in enumerate(places):
        style = VERDICT_STYLES[table["verdict"][row]] | {"linewidth": 1, "zorder": 3}
        margin = float(table["margin"][row])
        if math.isfinite(slope[row]):
            allowed = at_least[row], at_most[row]
            least, most = _compute_margins(table["low"][row], table["high"][row], *allowed)
            reach = np.nan_to_num([[max(margin - least, 0)], [max(most - margin, 0)]])
            slopes.errorbar(margin, place, xerr=reach, capsize=2, **{"marker": "o"} | style)
            of_fit = _compute_margins(table["fit_low"][row], table["fit_high"][row], *allowed)
            slopes.plot(of_fit, (place, place), color=style["color"], linewidth=4, alpha=0.25, zorder=2)
        elif not math.isnan(margin):
            factors.plot(np.clip(margin, -FARTHEST, FARTHEST), place, **{"marker": "o"} | style)
    labels = [f"{statement} ({where})" for statement, where in zip(table["statement"], table["where"], strict=True)]
    slopes.set_yticks(places, labels, fontsize=6.5)
    for label, verdict in zip(slopes.get_yticklabels(), table["verdict"], strict=True):
        label.set_color(VERDICT_STYLES[verdict]["color"] if verdict != HOLDS else BLACK)
    factors.set_yticks(places, [])
    slopes.set_xlabel("slopes: to the criterion,\n95 % over seeds (pale: fit)")
    factors.set_xlabel("all else: powers of ten\nto the criterion")
    for panel in (slopes, factors):
        panel.axvline(0, color=GREY, linewidth=1, zorder=1)
        panel.set_ylim(-0.7, count - 0.3)
        panel.hlines(places, *panel.get_xlim(), color="#EEEEEE", linewidth=0.6, zorder=0)
        panel.tick_params(axis="y", length=0)
    factors.set_xlim(-1.05 * FARTHEST, 1.05 * FARTHEST)
    for verdict, style in VERDICT_STYLES.items():
        number = int((table["verdict"] == verdict).sum())
        style = {"marker": "o", "linestyle": ""} | style
        factors.plot([], [], label=f"{number} {verdict}", **style)
    figure.legend(*factors.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure
